-- KEYS: leases, fence, then queues. ARGV: owner, lease_s. Takes the first request of the first queue that has one.
-- Returns the queue's number, id, fence, how many requests the queues still hold, and the hash; or nothing.
local id, key, number
for i = 3, #KEYS do
  repeat
    local popped = redis.call('ZPOPMIN', KEYS[i])
    id = popped[1]
    key = id and '{ll}:req:' .. id
  until not id or redis.call('HGET', key, 'state') == 'queued'
  number = i - 3
  if id then break end
end
if not id then return false end
local left = 0
for i = 3, #KEYS do left = left + redis.call('ZCARD', KEYS[i]) end
return {number, id, take(id, ARGV[1], ARGV[2]), left, redis.call('HGETALL', key)}
