-- KEYS: request, leases. ARGV: id, fence, sender, after, count, state, stage, queue ('' keeps it running here), then
-- hash fields. Ends a stage under its fence: to the next stage's queue, on with the same owner, or to a terminal state.
-- Returns the state that it has now (cancelled, when an abort came first; running, when it was to be cancelled and nobody
-- had asked for that), or 'lost' when a newer owner has the request or it has ended; and what came after an event.
local id, target = ARGV[1], ARGV[6]
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return {'lost', {}, {}} end
local state = redis.call('HGET', KEYS[1], 'state')
-- The same owner once more: the answer to its first call was lost.
if state == target and state ~= 'running' then return {state, unpack(news(id, ARGV[4], ARGV[5]))} end
if state ~= 'running' and state ~= 'cancelling' then return {'lost', {}, {}} end
if target == 'cancelled' and state == 'running' then return {'running', unpack(news(id, ARGV[4], ARGV[5]))} end
if state == 'cancelling' then target = 'cancelled' end
free(id)
-- The next replica is another one: there it has done no harm yet. A next denoiser's checkpoints are among the fields.
redis.call('HDEL', KEYS[1], 'checkpoints', 'checkpoint_step', 'alone')
redis.call('HSET', KEYS[1], 'state', target, 'updated', now(), unpack(ARGV, 9))
if target == 'cancelled' then redis.call('HDEL', KEYS[1], 'artifact', 'file', 'checkpoints', 'checkpoint_step') end
if target == 'running' or target == 'queued' then redis.call('HSET', KEYS[1], 'stage', ARGV[7]) end
if target ~= 'running' then redis.call('ZREM', KEYS[2], id) end
if target == 'queued' then
  redis.call('HSET', KEYS[1], 'queue', ARGV[8], 'attempt', 0)
  enqueue(id, ARGV[3], ARGV[8])
end
if target == 'queued' or target == 'running' then tell(id, ARGV[3], 'status', 's', target)
else finish(id, ARGV[3], target) end
return {target, unpack(news(id, ARGV[4], ARGV[5]))}
