-- KEYS: request, leases. ARGV: id, fence, sender, lease_s, after, count, then event fields (kind, payload, step, total)
-- or none. Renews a lease and adds an event; of frames, whose number stands in the place of the step, no event, as a
-- clip has many bundles of them: the record keeps the most that there were, so that progress never goes back.
-- Returns the state, or 'lost' when a newer owner has the request; and what came after an event.
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return {'lost', {}, {}} end
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'running' and state ~= 'cancelling' then return {'lost', {}, {}} end
local time = now()
redis.call('ZADD', KEYS[2], tonumber(time) + tonumber(ARGV[4]), ARGV[1])
if #ARGV > 6 then
  if tonumber(ARGV[10]) > 0 then redis.call('HSET', KEYS[1], 'step', ARGV[9], 'total', ARGV[10], 'updated', time) end
  if ARGV[7] == 'frames' then
    local most = math.max(tonumber(ARGV[9]), tonumber(redis.call('HGET', KEYS[1], 'frames') or 0))
    redis.call('HSET', KEYS[1], 'frames', most, 'updated', time)
  elseif ARGV[7] == 'preview' then
    local previews = '{ll}:pv:' .. ARGV[1]
    redis.call('HSET', previews, tell(ARGV[1], ARGV[3], 'preview'), ARGV[8])
    redis.call('EXPIRE', previews, redis.call('TTL', KEYS[1]))
    local kept = redis.call('HKEYS', previews)
    -- Event ids begin with milliseconds, all of as many digits: the least is the oldest.
    table.sort(kept)
    for oldest = 1, #kept - MAX_PREVIEWS do redis.call('HDEL', previews, kept[oldest]) end
  else
    tell(ARGV[1], ARGV[3], ARGV[7], 'p', ARGV[8])
  end
end
return {state, unpack(news(ARGV[1], ARGV[5], ARGV[6]))}
