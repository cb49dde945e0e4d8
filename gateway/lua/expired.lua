-- KEYS: leases. Returns the ids whose lease has passed.
local t = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', tonumber(t[1]) + tonumber(t[2]) / 1e6, 'LIMIT', 0, 100)
