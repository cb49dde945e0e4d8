-- KEYS: request, leases. ARGV: id, fence, lease_s, step, checkpoints ('' forgets them). Notes what a request can go on
-- from, and renews the lease. Returns the state, or 'lost' when a newer owner has the request or it has ended.
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 'lost' end
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'running' and state ~= 'cancelling' then return 'lost' end
redis.call('ZADD', KEYS[2], tonumber(now()) + tonumber(ARGV[3]), ARGV[1])
redis.call('HSET', KEYS[1], 'checkpoint_step', ARGV[4], 'checkpoints', ARGV[5])
return state
