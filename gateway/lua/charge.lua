-- KEYS: quota. ARGV: amount, limit, window in seconds, of each of the key's quotas. Takes the amounts from all of them,
-- or from none; a negative amount is given back. Returns '0' and 0, or seconds to wait and the number of the quota.
local time = tonumber(now())
local elapsed = time - tonumber(redis.call('HGET', KEYS[1], 'at') or time)
local fields, longest, wait, which = {'at', string.format('%.6f', time)}, 0, 0, 0
for i = 1, #ARGV, 3 do
  local amount, limit, window = tonumber(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  -- By its window: a key may have lost or got another quota since.
  local name = 'left:' .. ARGV[i + 2]
  local left = tonumber(redis.call('HGET', KEYS[1], name) or limit) + math.max(elapsed, 0) * limit / window
  left = math.min(left, limit)
  local missing = (amount - left) * window / limit
  if missing > wait then wait, which = missing, (i - 1) / 3 end
  fields[#fields + 1] = name
  fields[#fields + 1] = string.format('%.9g', math.min(left - amount, limit))
  longest = math.max(longest, window)
end
if wait > 0 then return {string.format('%.6f', wait), which} end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('EXPIRE', KEYS[1], math.ceil(longest))
return {'0', 0}
