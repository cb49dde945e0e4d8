-- KEYS: request, leases, fence. ARGV: id, fence ('' for the reaper), sender, max_attempts, counts (1 or 0), error.
-- Gives a running request back to its queue. The last attempt is made alone on its replica, and only one that was made
-- alone ends in failure, with the error: before, what its workers died of may have been another's doing.
-- Returns the new state, or 'lost'.
if ARGV[2] == '' then
  -- Since a reaper listed it, the owner may have renewed its lease, or another reaper and a new owner may have been here.
  local lease = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if not lease or tonumber(lease) > tonumber(now()) then return 'lost' end
elseif redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then
  return 'lost'
end
local state = redis.call('HGET', KEYS[1], 'state')
redis.call('ZREM', KEYS[2], ARGV[1])
if state ~= 'running' and state ~= 'cancelling' then return 'lost' end
free(ARGV[1])
-- From now on, it is nobody's who submitted it.
redis.call('HDEL', KEYS[1], 'try')
local target = 'queued'
local attempts, most = redis.call('HINCRBY', KEYS[1], 'attempt', ARGV[5] == '0' and -1 or 0), tonumber(ARGV[4])
if state == 'cancelling' then target = 'cancelled'
elseif attempts >= most and redis.call('HEXISTS', KEYS[1], 'alone') == 1 then
  target = 'failed'
  redis.call('HSET', KEYS[1], 'error', ARGV[6])
elseif attempts >= math.max(most - 1, 1) then
  redis.call('HSET', KEYS[1], 'alone', 1)
end
-- A new fence shuts out the owner that had it, whatever that one still does.
redis.call('HSET', KEYS[1], 'state', target, 'updated', now(), 'fence', next_fence(), 'step',
  redis.call('HGET', KEYS[1], 'checkpoint_step') or 0)
if target == 'queued' then
  enqueue(ARGV[1], ARGV[3], redis.call('HGET', KEYS[1], 'queue'))
  tell(ARGV[1], ARGV[3], 'status', 's', target)
else
  finish(ARGV[1], ARGV[3], target)
end
return target
