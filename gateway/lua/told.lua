-- KEYS: request. ARGV: hash fields. Counts who would tell of a request's end. Returns the fields' values to the first;
-- nothing to the others, and for a request that is not there (any more): a failover may have lost it.
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HINCRBY', KEYS[1], 'told', 1) > 1 then return false end
return redis.call('HMGET', KEYS[1], unpack(ARGV))
