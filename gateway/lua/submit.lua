-- KEYS: request, queue, ids, events. ARGV: id, sender, priority, max_queued, keep_s, then hash fields.
-- Stores a request and queues it. Returns 1, 0 when the id exists, or -1 when the queue is full.
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[4]) then return -1 end
local t = redis.call('TIME')
local now = t[1] .. '.' .. string.format('%06d', t[2])
redis.call('HSET', KEYS[1], 'state', 'queued', 'stage', 'dit', 'fence', 0, 'attempt', 0, 'created', now,
  'updated', now, 'priority', ARGV[3], 'queue', KEYS[2])
for i = 6, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], tonumber(ARGV[3]) * 1e11 + tonumber(now), ARGV[1])
redis.call('ZADD', KEYS[3], tonumber(now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', tonumber(now) - tonumber(ARGV[5]))
redis.call('XADD', KEYS[4], '*', 'k', 'status', 's', 'queued')
redis.call('EXPIRE', KEYS[4], ARGV[5])
redis.call('PUBLISH', '{ll}:wake', 'q:' .. ARGV[2] .. ':')
return 1
