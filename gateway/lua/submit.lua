-- KEYS: request, queue, ids, events, the tenant's ids. ARGV: id, sender, keep_s, timeout_s, max_queued,
-- max_queued_tenant, class, tenant, lease_s ('' leaves it in the queue), try, not_after ('' for never), slots of the
-- sender's replica and how many it has, then hash fields. Stores a request and queues it; one that nobody waits before
-- goes to the sender at once, if there is a slot. Returns the time and 1, 0 when the id exists, -1 when the queue is
-- full, -2 when nobody waits for the answer any more, or -3 when the tenant has too many in the queue; then fence and
-- hash when the sender has it, or the seconds that full queue takes to drain.
local id, sender, class, tenant, try, time = ARGV[1], ARGV[2], ARGV[7], ARGV[8], ARGV[10], now()
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- The same call once more, because the answer to its first try was lost.
  if redis.call('HGET', KEYS[1], 'try') == try and redis.call('HGET', KEYS[1], 'state') == 'running' then
    return {time, 0, redis.call('HGET', KEYS[1], 'fence'), redis.call('HGETALL', KEYS[1])}
  end
  return {time, 0}
end
if ARGV[11] ~= '' and tonumber(time) > tonumber(ARGV[11]) then return {time, -2} end
local waiting, own = redis.call('ZCARD', KEYS[2]), 0
if waiting > 0 then
  for any = 0, 2 do own = own + redis.call('ZCARD', KEYS[2] .. ':f:' .. any .. ':' .. tenant) end
end
if waiting >= tonumber(ARGV[5]) or own >= tonumber(ARGV[6]) then
  local gap_s = redis.call('HGET', KEYS[2] .. ':pace', 'gap_s') or 0
  if waiting >= tonumber(ARGV[5]) then return {time, -1, tostring(waiting * gap_s)} end
  return {time, -3, tostring(own * gap_s)}
end
redis.call('HSET', KEYS[1], 'state', 'queued', 'stage', 'dit', 'fence', 0, 'attempt', 0, 'created', time,
  'updated', time, 'deadline', time + ARGV[4], 'class', class, 'tenant', tenant, 'queue', KEYS[2], unpack(ARGV, 14))
-- Later than its deadline: what waits is never forgotten.
local kept_s = math.ceil(ARGV[3] + ARGV[4])
redis.call('EXPIRE', KEYS[1], kept_s)
for _, ids in ipairs({KEYS[3], KEYS[5]}) do
  redis.call('ZADD', ids, tonumber(time), id)
  redis.call('ZREMRANGEBYSCORE', ids, '-inf', time - kept_s)
  redis.call('EXPIRE', ids, kept_s)
end
tell(id, sender, 'status', 's', 'queued')
redis.call('EXPIRE', KEYS[4], kept_s)
if ARGV[9] ~= '' and waiting == 0 and has_slot(ARGV[12], ARGV[13]) then
  redis.call('HSET', KEYS[1], 'try', try)
  return {time, 1, take(id, sender, ARGV[9], ARGV[12]), redis.call('HGETALL', KEYS[1])}
end
enqueue(id, sender, KEYS[2])
return {time, 1}
