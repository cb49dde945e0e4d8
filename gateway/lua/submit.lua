-- KEYS: request, queue, ids, events, the tenant's ids. ARGV: id, sender, keep_s, timeout_s, max_queued,
-- max_queued_tenant, max_queued_cost, max_queued_bytes, class, tenant, cost, bytes, lease_s ('' leaves it in the queue),
-- try, not_after ('' for never), slots of the sender's replica, how many it has and the cost that it takes, then hash
-- fields, and its pictures ('' for none). Stores a request and queues it; one that nobody waits before goes to the
-- sender at once, if there is room. Returns the time and 1, 0 when the id exists, -1 when too many wait, -2 when nobody
-- waits for the answer any more, -3 when too many of the tenant wait, or -4 when too much work or too many bytes do;
-- then fence and hash when the sender has it, or the seconds that full queue takes to drain.
local id, sender, class, tenant, cost, bytes = ARGV[1], ARGV[2], ARGV[9], ARGV[10], ARGV[11], ARGV[12]
local lease_s, try, not_after, slots, time = ARGV[13], ARGV[14], ARGV[15], ARGV[16], now()
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- The same call once more, because the answer to its first try was lost.
  if redis.call('HGET', KEYS[1], 'try') == try and redis.call('HGET', KEYS[1], 'state') == 'running' then
    return {time, 0, redis.call('HGET', KEYS[1], 'fence'), redis.call('HGETALL', KEYS[1])}
  end
  return {time, 0}
end
if not_after ~= '' and tonumber(time) > tonumber(not_after) then return {time, -2} end
local waiting, own = redis.call('ZCARD', KEYS[2]), 0
if waiting > 0 then
  for any = 0, 2 do own = own + redis.call('ZCARD', KEYS[2] .. ':f:' .. any .. ':' .. tenant) end
end
local load = redis.call('HMGET', KEYS[2] .. ':load', 'cost', 'bytes')
local refused = (waiting >= tonumber(ARGV[5]) and -1) or (own >= tonumber(ARGV[6]) and -3)
  -- An empty queue takes any request.
  or (waiting > 0 and (load[1] + cost > tonumber(ARGV[7]) or load[2] + bytes > tonumber(ARGV[8])) and -4)
if refused then
  local gap_s = redis.call('HGET', KEYS[2] .. ':pace', 'gap_s') or 0
  return {time, refused, tostring((refused == -3 and own or waiting) * gap_s)}
end
redis.call('HSET', KEYS[1], 'state', 'queued', 'stage', 'dit', 'fence', 0, 'attempt', 0, 'created', time,
  'updated', time, 'deadline', time + ARGV[4], 'class', class, 'tenant', tenant, 'cost', cost, 'bytes', bytes,
  'queue', KEYS[2], unpack(ARGV, 19, #ARGV - 1))
-- Later than its deadline: what waits is never forgotten.
local kept_s = math.ceil(ARGV[3] + ARGV[4])
redis.call('EXPIRE', KEYS[1], kept_s)
if ARGV[#ARGV] ~= '' then redis.call('SET', '{ll}:in:' .. id, ARGV[#ARGV], 'EX', kept_s) end
for _, ids in ipairs({KEYS[3], KEYS[5]}) do
  redis.call('ZADD', ids, tonumber(time), id)
  redis.call('ZREMRANGEBYSCORE', ids, '-inf', time - kept_s)
  redis.call('EXPIRE', ids, kept_s)
end
tell(id, sender, 'status', 's', 'queued')
redis.call('EXPIRE', KEYS[4], kept_s)
if lease_s ~= '' and waiting == 0 and has_room(slots, ARGV[17], ARGV[18], tonumber(cost)) then
  redis.call('HSET', KEYS[1], 'try', try)
  return {time, 1, take(id, sender, lease_s, slots), redis.call('HGETALL', KEYS[1])}
end
enqueue(id, sender, KEYS[2])
return {time, 1}
