-- KEYS: request, leases, events. ARGV: id, fence, sender, state, stage, queue ('' keeps it running here), then hash fields.
-- Ends a stage under its fence: to the next stage's queue, on with the same owner, or to a terminal state.
-- Returns the state that it has now (cancelled, when an abort came first), or 'lost' when a newer owner has the request
-- or it has ended.
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 'lost' end
local state = redis.call('HGET', KEYS[1], 'state')
-- The same owner once more: the answer to its first call was lost.
if state == ARGV[4] and state ~= 'running' then return state end
if state ~= 'running' and state ~= 'cancelling' then return 'lost' end
local target = ARGV[4]
if state == 'cancelling' then target = 'cancelled' end
local t = redis.call('TIME')
local now = t[1] .. '.' .. string.format('%06d', t[2])
for i = 7, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'state', target, 'updated', now)
if target == 'cancelled' then redis.call('HDEL', KEYS[1], 'artifact') end
if target == 'running' or target == 'queued' then redis.call('HSET', KEYS[1], 'stage', ARGV[5]) end
if target ~= 'running' then redis.call('ZREM', KEYS[2], ARGV[1]) end
if target == 'queued' then
  redis.call('HSET', KEYS[1], 'queue', ARGV[6], 'attempt', 0)
  redis.call('ZADD', ARGV[6], tonumber(redis.call('HGET', KEYS[1], 'priority')) * 1e11
    + tonumber(redis.call('HGET', KEYS[1], 'created')), ARGV[1])
  redis.call('PUBLISH', '{ll}:wake', 'q:' .. ARGV[3] .. ':')
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'k', 'status', 's', target)
redis.call('PUBLISH', '{ll}:wake', 'e:' .. ARGV[3] .. ':' .. ARGV[1])
return target
