-- KEYS: leases. Returns the ids whose lease has passed.
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now(), 'LIMIT', 0, 100)
