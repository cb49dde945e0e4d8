-- KEYS: request, leases, events. ARGV: id, fence ('' for the reaper), sender, max_attempts, counts (1 or 0), error.
-- Gives a running request back to its queue; one that has used up its attempts fails with the error.
-- Returns the new state, or 'lost'.
if ARGV[2] ~= '' and redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 'lost' end
local state = redis.call('HGET', KEYS[1], 'state')
redis.call('ZREM', KEYS[2], ARGV[1])
if state ~= 'running' and state ~= 'cancelling' then return 'lost' end
local t = redis.call('TIME')
local now = t[1] .. '.' .. string.format('%06d', t[2])
local target = 'queued'
if ARGV[5] == '0' then redis.call('HINCRBY', KEYS[1], 'attempt', -1) end
if state == 'cancelling' then target = 'cancelled'
elseif tonumber(redis.call('HGET', KEYS[1], 'attempt')) >= tonumber(ARGV[4]) then
  target = 'failed'
  redis.call('HSET', KEYS[1], 'error', ARGV[6])
end
-- A new fence shuts out the owner that had it, whatever that one still does.
redis.call('HSET', KEYS[1], 'state', target, 'updated', now, 'fence', redis.call('INCR', '{ll}:fence'), 'step', 0)
if target == 'queued' then
  redis.call('ZADD', redis.call('HGET', KEYS[1], 'queue'), tonumber(redis.call('HGET', KEYS[1], 'priority')) * 1e11
    + tonumber(redis.call('HGET', KEYS[1], 'created')), ARGV[1])
  redis.call('PUBLISH', '{ll}:wake', 'q:' .. ARGV[3] .. ':')
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'k', 'status', 's', target)
redis.call('PUBLISH', '{ll}:wake', 'e:' .. ARGV[3] .. ':' .. ARGV[1])
return target
