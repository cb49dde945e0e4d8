-- KEYS: a hash that is not there. ARGV: sender. Publishes a message that only its sender's own listener has a use for.
-- The write changes nothing, but a server that is no primary any more refuses it.
redis.call('HDEL', KEYS[1], '')
redis.call('PUBLISH', '{ll}:wake', 'e:' .. ARGV[1] .. ':')
