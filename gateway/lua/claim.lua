-- KEYS: queue, leases, fence. ARGV: owner, lease_s. Takes the first request of a queue.
-- Returns its id, fence and hash, or nothing.
local id, key
repeat
  local popped = redis.call('ZPOPMIN', KEYS[1])
  if #popped == 0 then return false end
  id = popped[1]
  key = '{ll}:req:' .. id
until redis.call('HGET', key, 'state') == 'queued'
local t = redis.call('TIME')
local now = t[1] .. '.' .. string.format('%06d', t[2])
local fence = redis.call('INCR', KEYS[3])
redis.call('HSET', key, 'state', 'running', 'fence', fence, 'owner', ARGV[1], 'updated', now)
redis.call('HINCRBY', key, 'attempt', 1)
redis.call('ZADD', KEYS[2], tonumber(now) + tonumber(ARGV[2]), id)
redis.call('XADD', '{ll}:ev:' .. id, 'MAXLEN', '~', 1000, '*', 'k', 'status', 's', 'running')
redis.call('PUBLISH', '{ll}:wake', 'e:' .. id)
return {id, fence, redis.call('HGETALL', key)}
