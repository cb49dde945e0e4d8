-- KEYS: request, events. ARGV: an event id, count. Returns the events after that one, and the hash when one of them
-- is a status; nothing for an unknown request.
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
local entries = redis.call('XRANGE', KEYS[2], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
for _, entry in ipairs(entries) do
  if entry[2][2] == 'status' then return {entries, redis.call('HGETALL', KEYS[1])} end
end
return {entries, {}}
