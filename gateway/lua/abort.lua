-- KEYS: request. ARGV: id, sender, never (1 or 0), tenant ('' for any). Cancels a queued request at once, marks a running
-- one, leaves an ended one. Returns the state afterwards, or nothing for an unknown id and for another tenant's request.
local state = redis.call('HGET', KEYS[1], 'state')
if not state then
  -- A submit of that id may still come, out of the buffer of a connection that was given up: it will find the id taken.
  if ARGV[3] == '1' then
    redis.call('HSET', KEYS[1], 'state', 'cancelled')
    redis.call('EXPIRE', KEYS[1], 60)
  end
  return false
end
if ARGV[4] ~= '' and redis.call('HGET', KEYS[1], 'tenant') ~= ARGV[4] then return false end
if state == 'queued' then
  local request = redis.call('HMGET', KEYS[1], 'queue', 'class', 'tenant')
  leave(ARGV[1], request[1], request[2] .. ':' .. request[3], 0)
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'updated', now())
  finish(ARGV[1], ARGV[2], 'cancelled')
  return 'cancelled'
elseif state == 'running' then
  redis.call('PUBLISH', '{ll}:wake', 'c:' .. ARGV[2] .. ':' .. ARGV[1])
  redis.call('HSET', KEYS[1], 'state', 'cancelling', 'updated', now())
  tell(ARGV[1], ARGV[2], 'status', 's', 'cancelling')
  return 'cancelling'
end
return state
