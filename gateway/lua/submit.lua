-- KEYS: request, queue, ids, events, the tenant's ids. ARGV: id, sender, priority, max_queued, keep_s, lease_s ('' leaves
-- it in the queue), try, not_after ('' for never), then hash fields. Stores a request and queues it; one that nobody
-- waits before goes to the sender at once. Returns the time and 1, 0 when the id exists, -1 when the queue is full, or
-- -2 when nobody waits for the answer any more; then fence and hash when the sender has it.
local id, sender, try, time = ARGV[1], ARGV[2], ARGV[7], now()
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- The same call once more, because the answer to its first try was lost.
  if redis.call('HGET', KEYS[1], 'try') == try and redis.call('HGET', KEYS[1], 'state') == 'running' then
    return {time, 0, redis.call('HGET', KEYS[1], 'fence'), redis.call('HGETALL', KEYS[1])}
  end
  return {time, 0}
end
if ARGV[8] ~= '' and tonumber(time) > tonumber(ARGV[8]) then return {time, -2} end
local waiting = redis.call('ZCARD', KEYS[2])
if waiting >= tonumber(ARGV[4]) then return {time, -1} end
redis.call('HSET', KEYS[1], 'state', 'queued', 'stage', 'dit', 'fence', 0, 'attempt', 0, 'created', time,
  'updated', time, 'priority', ARGV[3], 'queue', KEYS[2], unpack(ARGV, 9))
redis.call('EXPIRE', KEYS[1], ARGV[5])
for _, ids in ipairs({KEYS[3], KEYS[5]}) do
  redis.call('ZADD', ids, tonumber(time), id)
  redis.call('ZREMRANGEBYSCORE', ids, '-inf', tonumber(time) - tonumber(ARGV[5]))
  redis.call('EXPIRE', ids, ARGV[5])
end
tell(id, sender, 'status', 's', 'queued')
redis.call('EXPIRE', KEYS[4], ARGV[5])
if ARGV[6] ~= '' and waiting == 0 then
  redis.call('HSET', KEYS[1], 'try', try)
  return {time, 1, take(id, sender, ARGV[6]), redis.call('HGETALL', KEYS[1])}
end
enqueue(id, sender, KEYS[2])
return {time, 1}
