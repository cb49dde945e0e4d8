-- KEYS: request, leases, events. ARGV: id, fence, sender, lease_s, then event fields (kind, payload, step, total) or none.
-- Renews a lease and adds an event. Returns the state, or 'lost' when a newer owner has the request.
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 'lost' end
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'running' and state ~= 'cancelling' then return 'lost' end
local t = redis.call('TIME')
local now = t[1] .. '.' .. string.format('%06d', t[2])
redis.call('ZADD', KEYS[2], tonumber(now) + tonumber(ARGV[4]), ARGV[1])
if #ARGV > 4 then
  if tonumber(ARGV[8]) > 0 then redis.call('HSET', KEYS[1], 'step', ARGV[7], 'total', ARGV[8], 'updated', now) end
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'k', ARGV[5], 'p', ARGV[6])
  redis.call('PUBLISH', '{ll}:wake', 'e:' .. ARGV[3] .. ':' .. ARGV[1])
end
return state
