-- KEYS: request. ARGV: id, an event id, count. Returns the events after that one, the hash when one of them is a status,
-- and 1 when no more will come (0 otherwise); nothing for an unknown request. Of one whose events have been forgotten, it
-- is the last, whatever came before.
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return false end
local entries, record = unpack(news(ARGV[1], ARGV[2], ARGV[3]))
local last = redis.call('HGET', KEYS[1], 'last_event')
if last and redis.call('EXISTS', '{ll}:ev:' .. ARGV[1]) == 0 then
  return {{{last, {'k', 'status', 's', state}}}, redis.call('HGETALL', KEYS[1]), 1}
end
local goes_on = state == 'queued' or state == 'running' or state == 'cancelling' or #entries == tonumber(ARGV[3])
return {entries, record, goes_on and 0 or 1}
