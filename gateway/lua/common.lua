-- Stands before every script.

-- Seconds since 1970 by the clock of Redis, the only one there is.
local function now()
  local t = redis.call('TIME')
  return t[1] .. '.' .. string.format('%06d', t[2])
end

-- Beside a request's hash, which stays for a day, {ll}:ev:ID has its events, {ll}:in:ID holds its pictures, {ll}:pv:ID
-- the newest previews by event: a hash with pictures would go along with every status. Once it has ended, who follows has
-- an hour for its events, and a minute for the previews. Later, its hash tells of its end.
local EVENTS_AFTER_S, PREVIEWS_AFTER_S = 3600, 60
-- So many previews of a request are kept, the newest.
local MAX_PREVIEWS = 16

-- Adds an event (kind, then fields) to a request's stream, and wakes who follows it at other gateways than the sender.
-- Returns the event's id.
local function tell(id, sender, kind, ...)
  local event = redis.call('XADD', '{ll}:ev:' .. id, 'MAXLEN', '~', 1000, '*', 'k', kind, ...)
  redis.call('PUBLISH', '{ll}:wake', 'e:' .. sender .. ':' .. id)
  return event
end

-- Tells of a request's end, and drops what nobody needs of it any more.
local function finish(id, sender, state)
  redis.call('HSET', '{ll}:req:' .. id, 'last_event', tell(id, sender, 'status', 's', state))
  redis.call('DEL', '{ll}:in:' .. id)
  redis.call('EXPIRE', '{ll}:ev:' .. id, EVENTS_AFTER_S)
  redis.call('EXPIRE', '{ll}:pv:' .. id, PREVIEWS_AFTER_S)
end

-- Whether a replica takes one more request, of that cost. It is named by its slots: the requests that it has from all
-- gateways -> their cost, without end for one that runs alone. Nothing new comes beside that one; it may come while
-- others are still there, and the replica lets it begin when they have left. A replica without work takes any request.
local function has_room(slots, most, most_cost, cost)
  if slots == '' then return true end
  local held, load = redis.call('ZRANGE', slots, 0, -1, 'WITHSCORES'), 0
  for i = 2, #held, 2 do
    if held[i] == 'inf' then return false end
    load = load + held[i]
  end
  return #held / 2 < tonumber(most) and (load == 0 or load + cost <= tonumber(most_cost))
end

-- Ends a request's hold on its replica. Whatever ends a claim does it, so slots live as long as leases.
local function free(id)
  local slots = redis.call('HGET', '{ll}:req:' .. id, 'slots')
  if slots and slots ~= '' then redis.call('ZREM', slots, id) end
end

-- A fence above all before it. It is the time in microseconds, not a count: a failover may lose the newest fences, and the
-- new primary must not give them to others.
local function next_fence()
  local newest, time = redis.call('GET', '{ll}:fence') or 0, now():gsub('%.', '')
  local fence = string.format('%.0f', math.max(newest + 1, time + 0))
  redis.call('SET', '{ll}:fence', fence)
  return fence
end

-- Gives a request to an owner, with a lease, a new fence, and a slot of its replica; returns the fence.
local function take(id, owner, lease_s, slots)
  local key, time = '{ll}:req:' .. id, now()
  local fence = next_fence()
  -- A queued request was last updated when it came into its queue.
  redis.call('HINCRBYFLOAT', key, 'queued_s', tonumber(time) - tonumber(redis.call('HGET', key, 'updated')))
  redis.call('HSET', key, 'state', 'running', 'fence', fence, 'owner', owner, 'updated', time, 'slots', slots)
  if slots ~= '' then
    local request = redis.call('HMGET', key, 'cost', 'alone')
    redis.call('ZADD', slots, request[2] and 'inf' or request[1], id)
  end
  redis.call('HINCRBY', key, 'attempt', 1)
  redis.call('ZADD', '{ll}:leases', tonumber(time) + tonumber(lease_s), id)
  tell(id, owner, 'status', 's', 'running')
  return fence
end

-- The events of a request after one (none for ''), and its hash when one of them is a status. Previews that have been
-- forgotten come empty.
local function news(id, after, count)
  if after == '' then return {{}, {}} end
  local entries, record = redis.call('XRANGE', '{ll}:ev:' .. id, '(' .. after, '+', 'COUNT', count), nil
  for _, entry in ipairs(entries) do
    local event, parts = unpack(entry)
    if parts[2] == 'preview' then
      parts[3], parts[4] = 'p', redis.call('HGET', '{ll}:pv:' .. id, event) or ''
    elseif parts[2] == 'status' and not record then
      record = redis.call('HGETALL', '{ll}:req:' .. id)
    end
  end
  return {entries, record or {}}
end
