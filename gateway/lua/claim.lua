-- KEYS: leases, fence, then queues. ARGV: owner, lease_s, error of those that come too late, then for each queue the
-- slots of the replica that would get the request, how many it has, the cost that it takes, the batch keys that it runs
-- (with spaces between), and the feeds that the sender has free encoders for (a list in JSON, '' for all). Takes the
-- request that is due in the first queue that has one, or one like those that run. Returns the queue's number, id, fence,
-- how many requests the queues still hold and the hash, or an empty list; the ids that have expired; and the numbers of
-- queues whose replica is full.
local WINDOW, MOST_PASSED, MOST_EXPIRED = 32, 8, 100

-- The first requests of a flow; with feeds, of those that want one of them.
local function front(queue, flow, feeds, count)
  local line, found, ids = queue .. ':f:' .. flow, {}, {}
  if not feeds then return redis.call('ZRANGE', line, 0, count - 1) end
  for _, feed in ipairs(feeds) do
    local part = queue .. ':n:' .. flow .. '/' .. feed
    for _, id in ipairs(redis.call('ZRANGE', part, 0, count - 1)) do
      local created = redis.call('ZSCORE', line, id)
      -- What had been forgotten when it left did not say what it wanted.
      if created then found[#found + 1] = {tonumber(created), id} else redis.call('ZREM', part, id) end
    end
  end
  table.sort(found, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
  for i = 1, math.min(count, #found) do ids[i] = found[i][2] end
  return ids
end

-- Affinity stays in the class and among the first 32, and passes no request over more than 8 times.
-- Returns id, flow, the ids that it passes over, and the flow that is due.
local function choose(queue, running, feeds)
  local due, first
  for _, flow in ipairs(redis.call('ZRANGE', queue .. ':flows', 0, feeds and -1 or 0)) do
    due, first = front(queue, flow, feeds, 1)[1], flow
    if due then break end
  end
  if not due then return nil end
  if not next(running) then return due, first, {}, first end
  local class = first:sub(1, 1)
  local next_class = string.format('(%.0f', (class + 1) * CLASS)
  local flows = redis.call('ZRANGEBYSCORE', queue .. ':flows', class * CLASS, next_class, 'LIMIT', 0, WINDOW)
  local passed = {}
  for _, flow in ipairs(flows) do
    for _, id in ipairs(front(queue, flow, feeds, math.floor(WINDOW / #flows))) do
      local request = redis.call('HMGET', '{ll}:req:' .. id, 'batch', 'passed')
      if running[request[1]] then
        return id, flow, passed, first
      end
      if tonumber(request[2] or 0) >= MOST_PASSED then return due, first, {}, first end
      -- What has been forgotten must not come back as a hash that counts this and never goes.
      if request[1] then passed[#passed + 1] = id end
    end
  end
  return due, first, {}, first
end

-- Virtual time goes on to the start tag that is due, and finish tags that it has passed say nothing any more.
local function advance(queue, first, time)
  local class, virtual = first:sub(1, 1), redis.call('ZSCORE', queue .. ':flows', first)
  -- Flows that cannot be fed now fall behind like idle ones, and do not make up for it later.
  for _, held in ipairs(redis.call('ZRANGEBYSCORE', queue .. ':flows', class * CLASS, '(' .. virtual)) do
    redis.call('ZADD', queue .. ':flows', virtual, held)
  end
  redis.call('ZREMRANGEBYSCORE', queue .. ':tags', class * CLASS, '(' .. virtual)
  redis.call('ZADD', queue .. ':tags', virtual, class)
  local pace = redis.call('HMGET', queue .. ':pace', 'claimed', 'gap_s')
  local gap_s = pace[1] and time - pace[1] or 0
  if pace[2] then gap_s = pace[2] + (gap_s - pace[2]) / 8 end
  redis.call('HSET', queue .. ':pace', 'claimed', time, unpack(pace[1] and {'gap_s', gap_s} or {}))
end

local time, expired, full = now(), {}, {}
for i = 3, #KEYS do
  local queue, running, slots, most, most_cost = KEYS[i], {}, unpack(ARGV, 5 * i - 11, 5 * i - 9)
  local feeds = ARGV[5 * i - 7] ~= '' and cjson.decode(ARGV[5 * i - 7])
  for batch in ARGV[5 * i - 8]:gmatch('%S+') do running[batch] = true end
  local open = has_room(slots, most, most_cost, 0)
  while open and #expired < MOST_EXPIRED do
    local id, flow, passed, first = choose(queue, running, feeds)
    if not id then break end
    local key = '{ll}:req:' .. id
    local request = redis.call('HMGET', key, 'state', 'deadline', 'cost', 'weight', 'alone')
    local runs = request[1] == 'queued' and tonumber(request[2]) > tonumber(time)
    -- One that runs alone waits at the replica. Nothing smaller goes before one that has no room, or it would never run.
    open = not runs or has_room(slots, most, most_cost, request[5] and 0 or request[3])
    if not open then break end
    if runs then
      for _, other in ipairs(passed) do redis.call('HINCRBY', '{ll}:req:' .. other, 'passed', 1) end
      advance(queue, first, time)
      leave(id, queue, flow, math.max(request[3] / request[4], LEAST_CHARGE))
      local fence, left = take(id, ARGV[1], ARGV[2], slots), 0
      for j = 3, #KEYS do left = left + redis.call('ZCARD', KEYS[j]) end
      return {{i - 3, id, fence, left, redis.call('HGETALL', key)}, expired, full}
    end
    leave(id, queue, flow, 0)
    if request[1] == 'queued' then
      expire(id, ARGV[1], ARGV[3])
      expired[#expired + 1] = id
    end
  end
  if not open then full[#full + 1] = i - 3 end
end
return {{}, expired, full}
