-- KEYS: request. ARGV: id, an event id, count. Returns the events after that one, and the hash when one of them is a
-- status; nothing for an unknown request.
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
return news(ARGV[1], ARGV[2], ARGV[3])
