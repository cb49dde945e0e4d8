-- KEYS: request, queue, ids, events. ARGV: id, sender, priority, max_queued, keep_s, then hash fields.
-- Stores a request and queues it. Returns 1, 0 when the id exists, or -1 when the queue is full.
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[4]) then return -1 end
local time = now()
redis.call('HSET', KEYS[1], 'state', 'queued', 'stage', 'dit', 'fence', 0, 'attempt', 0, 'created', time,
  'updated', time, 'priority', ARGV[3], 'queue', KEYS[2], unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[3], tonumber(time), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', tonumber(time) - tonumber(ARGV[5]))
tell(ARGV[1], ARGV[2], 'status', 's', 'queued')
redis.call('EXPIRE', KEYS[4], ARGV[5])
enqueue(ARGV[1], ARGV[2], KEYS[2])
return 1
