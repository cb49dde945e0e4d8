-- The queue of a stage's component, after common.lua: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) in
-- each priority class. A flow is what one tenant has waiting in one class, for example '1:acme'.
--   QUEUE         id -> when it came here
--   QUEUE:f:FLOW  id -> when it was submitted: the flow's own line
--   QUEUE:n:FLOW/FEED  the part of that line that wants the same of other stages
--   QUEUE:flows   flow -> start tag of its next request
--   QUEUE:tags    flow with nothing waiting -> finish tag of its last request; class -> virtual time
--   QUEUE:pace    when the last request was claimed, and the smoothed time between two claims
--   QUEUE:load    cost of all requests here, and bytes that their parameters take
--   {ll}:due      id -> when it expires or moves up a class, whichever is first
-- An empty queue keeps nothing: nobody waits, so nobody has to be treated fairly.

-- Tags of a class are above those of all more urgent ones. Costs are near 1 for a step of a picture, so a
-- thousand devices reach the next class after years without one moment of an empty queue.
local CLASS = 1e12
-- Tags must differ where a double has 12 digits before the point.
local LEAST_CHARGE = 0.001

-- Puts a request into a queue: behind older ones of its flow.
local function enqueue(id, sender, queue)
  local request = redis.call('HMGET', '{ll}:req:' .. id,
    'class', 'tenant', 'created', 'updated', 'deadline', 'age_s', 'cost', 'bytes', 'feed')
  local class, flow, due = request[1], request[1] .. ':' .. request[2], tonumber(request[5])
  if not redis.call('ZSCORE', queue .. ':flows', flow) then
    -- A finish tag that is still there is not behind virtual time.
    local finish, virtual = unpack(redis.call('ZMSCORE', queue .. ':tags', flow, class))
    redis.call('ZADD', queue .. ':flows', finish or virtual or class * CLASS, flow)
    redis.call('ZREM', queue .. ':tags', flow)
  end
  redis.call('ZADD', queue .. ':f:' .. flow, request[3], id)
  redis.call('ZADD', queue .. ':n:' .. flow .. '/' .. request[9], request[3], id)
  redis.call('ZADD', queue, request[4], id)
  redis.call('HINCRBYFLOAT', queue .. ':load', 'cost', request[7])
  redis.call('HINCRBYFLOAT', queue .. ':load', 'bytes', request[8])
  if class ~= '0' then due = math.min(due, now() + request[6]) end
  redis.call('ZADD', '{ll}:due', due, id)
  redis.call('PUBLISH', '{ll}:wake', 'q:' .. sender .. ':')
end

-- Takes a request out of a queue, and charges its flow.
local function leave(id, queue, flow, charge)
  local line, flows, tags = queue .. ':f:' .. flow, queue .. ':flows', queue .. ':tags'
  redis.call('ZREM', '{ll}:due', id)
  redis.call('ZREM', line, id)
  local cost, bytes, feed = unpack(redis.call('HMGET', '{ll}:req:' .. id, 'cost', 'bytes', 'feed'))
  if feed then redis.call('ZREM', queue .. ':n:' .. flow .. '/' .. feed, id) end
  redis.call('ZREM', queue, id)
  if redis.call('EXISTS', queue) == 0 then
    redis.call('DEL', flows, tags, queue .. ':pace', queue .. ':load')
    return
  end
  redis.call('HINCRBYFLOAT', queue .. ':load', 'cost', '-' .. (cost or 0))
  redis.call('HINCRBYFLOAT', queue .. ':load', 'bytes', '-' .. (bytes or 0))
  local tag = redis.call('ZINCRBY', flows, charge, flow)
  if redis.call('EXISTS', line) == 0 then
    redis.call('ZREM', flows, flow)
    redis.call('ZADD', tags, tag, flow)
  end
end

-- Ends a request that has left its queue too late.
local function expire(id, sender, error)
  redis.call('HSET', '{ll}:req:' .. id, 'state', 'expired', 'updated', now(), 'error', error)
  finish(id, sender, 'expired')
end
