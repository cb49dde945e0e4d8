-- KEYS: due. ARGV: sender, error of those that have expired, count. Ends queued requests whose deadline has passed, and
-- moves those that have waited long up a class. Returns how many there were, and the ids that have expired.
local time, expired = now(), {}
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', time, 'LIMIT', 0, ARGV[3])
for _, id in ipairs(due) do
  local key = '{ll}:req:' .. id
  local request = redis.call('HMGET', key, 'state', 'queue', 'class', 'tenant', 'deadline')
  if request[1] ~= 'queued' then
    redis.call('ZREM', KEYS[1], id)
  else
    leave(id, request[2], request[3] .. ':' .. request[4], 0)
    if tonumber(request[5]) <= tonumber(time) then
      expire(id, ARGV[1], ARGV[2])
      expired[#expired + 1] = id
    else
      redis.call('HINCRBY', key, 'class', -1)
      enqueue(id, ARGV[1], request[2])
    end
  end
end
return {#due, expired}
