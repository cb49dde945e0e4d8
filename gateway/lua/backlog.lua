-- KEYS: paces, then queues. ARGV: how many requests of a queue to look at, then names and values of paces.
-- Notes the paces; returns all that were noted, and of each queue its requests, their pixels, pixels times steps, and the
-- requests and pixels of those that are to be interpolated. Of a long queue it looks at the first ones, and takes the
-- rest to be like them.
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], 604800)
local queues = {}
for i = 2, #KEYS do
  local waiting, ids = redis.call('ZCARD', KEYS[i]), redis.call('ZRANGE', KEYS[i], 0, ARGV[1] - 1)
  local pixels, work, smooth, smooth_pixels = 0, 0, 0, 0
  for _, id in ipairs(ids) do
    local found = redis.call('HMGET', '{ll}:req:' .. id, 'pixels', 'total', 'feed')
    local size = tonumber(found[1] or 0)
    if string.find(found[3] or '', '+interpolation', 1, true) then
      smooth, smooth_pixels = smooth + 1, smooth_pixels + size
    end
    pixels, work = pixels + size, work + size * tonumber(found[2] or 0)
  end
  local times = #ids > 0 and waiting / #ids or 0
  local sums = {waiting}
  for _, sum in ipairs({pixels, work, smooth, smooth_pixels}) do
    sums[#sums + 1] = string.format('%.0f', sum * times)
  end
  queues[#queues + 1] = sums
end
return {redis.call('HGETALL', KEYS[1]), queues}
