"""The scripts on a real Redis against a small model in Python: hypothesis looks for calls after which they differ.

The scripts are the gateway's own but for two lines: the time comes from a list that the test sets, and the bounds of a
claim are small enough to be met often.
"""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.config import RedisSection
from gateway.records import LEASES, Claim, queue_key
from gateway.scripts import NAMES, source
from gateway.state import State
from gateway.ticket import Offer, Start, Ticket
from services.errors import Overloaded

DIT, VAE = queue_key("dit", "d"), queue_key("vae", "v")
CLOCK = "{ll}:test:clock"
WINDOW, MOST_PASSED, MAX_ATTEMPTS, LEASE_S, AGE_S = 4, 2, 2, 4.0, 5.0
MAX_QUEUED, MAX_QUEUED_TENANT, MAX_QUEUED_COST, MAX_QUEUED_BYTES, SLOTS, ROOM = 8, 5, 14.0, 30, 4, 6.0


def scripted(name: str) -> str:
    """A script with the test's clock and bounds."""
    text = source(name)
    for own, tests in (
        ("redis.call('TIME')", f"redis.call('LRANGE', '{CLOCK}', 0, 1)"),
        ("MOST_EXPIRED = 32, 8, 100", f"MOST_EXPIRED = {WINDOW}, {MOST_PASSED}, 100"),
    ):
        assert text.count(own) == (name == "claim" or "TIME" in own)
        text = text.replace(own, tests)
    return text


@dataclass
class Request:
    """What the model knows of a request."""

    ticket: Ticket
    created: int
    cls: int
    state: str = "queued"
    queue: str = DIT
    due: float = 0.0
    lease: float | None = None
    fence: int = 0
    attempt: int = 0
    passed: int = 0
    has_slot: bool = False
    alone: bool = False

    @property
    def flow(self) -> tuple[int, str]:
        return self.cls, self.ticket.tenant

    @property
    def deadline(self) -> float:
        return self.created + self.ticket.timeout_s


@dataclass
class Queue:
    """Tags by flow: start tags of those that wait, finish tags of those that do not; virtual times by class."""

    waiting: dict[tuple[int, str], float] = field(default_factory=dict)
    idle: dict[tuple[int, str], float] = field(default_factory=dict)
    virtual: dict[int, float] = field(default_factory=dict)


class Model:
    """What the scripts should do."""

    def __init__(self) -> None:
        self.now, self.fence = 1_000_000, 0
        self.requests: dict[str, Request] = {}
        self.queues = {DIT: Queue(), VAE: Queue()}

    def line(self, queue: str, flow: tuple[int, str] | None = None) -> list[str]:
        found = [i for i, r in self.requests.items() if (r.state, r.queue) == ("queued", queue)]
        found = [i for i in found if flow in (None, self.requests[i].flow)]
        return sorted(found, key=lambda i: (self.requests[i].created, i))

    def enqueue(self, i: str) -> None:
        r, queue = self.requests[i], self.queues[self.requests[i].queue]
        r.state, r.lease = "queued", None
        if r.flow not in queue.waiting:
            queue.waiting[r.flow] = max(queue.virtual.get(r.cls, 0.0), queue.idle.pop(r.flow, 0.0))
        r.due = min(r.deadline, self.now + AGE_S) if r.cls else r.deadline

    def leave(self, i: str, state: str, charge: float = 0.0) -> None:
        r, queue = self.requests[i], self.queues[self.requests[i].queue]
        r.state = state
        if not self.line(r.queue):
            self.queues[r.queue] = Queue()
            return
        queue.waiting[r.flow] += charge
        if not self.line(r.queue, r.flow):
            queue.idle[r.flow] = queue.waiting.pop(r.flow)

    def next_fence(self) -> int:
        self.fence = max(self.fence + 1, self.now * 1_000_000)
        return self.fence

    def take(self, i: str) -> None:
        r = self.requests[i]
        r.state, r.fence, r.attempt, r.lease = "running", self.next_fence(), r.attempt + 1, self.now + LEASE_S
        r.has_slot = True

    def full(self, cost: float = 0.0) -> bool:
        there = [r for r in self.requests.values() if r.has_slot]
        load = sum(r.ticket.cost for r in there)
        return len(there) >= SLOTS or any(r.alone for r in there) or bool(there) and load + cost > ROOM

    def front(self, queue: str, flow: tuple[int, str], feeds: list[str] | None) -> list[str]:
        return [i for i in self.line(queue, flow) if feeds is None or self.requests[i].ticket.feed in feeds]

    def choose(self, name: str, running: set[str], feeds: list[str] | None) -> tuple[str, list[str], str]:
        """The request, those that it passes over, and the one that is due."""
        flows = sorted(self.queues[name].waiting, key=lambda f: (f[0], self.queues[name].waiting[f], f[1]))
        due, passed = next((line[0] for f in flows if (line := self.front(name, f, feeds))), ""), []
        flows = [f for f in flows if f[0] == self.requests[due].cls] if due else []
        for flow in flows if running else ():
            for i in self.front(name, flow, feeds)[: WINDOW // len(flows)]:
                if self.requests[i].ticket.batch in running:
                    return i, passed, due
                if self.requests[i].passed >= MOST_PASSED:
                    return due, [], due
                passed.append(i)
        return due, [], due

    def claim(self, names: list[str], running: set[str], feeds: list[str] | None) -> tuple[str | None, list[str], bool]:
        expired: list[str] = []
        full = self.full()
        for name in names if not full else ():
            while self.line(name):
                i, passed, due = self.choose(name, running, feeds)
                if not i:
                    break
                r, queue = self.requests[i], self.queues[name]
                if r.deadline > self.now:
                    if self.full(0.0 if r.alone else r.ticket.cost):
                        full = True
                        break
                    for other in passed:
                        self.requests[other].passed += 1
                    now = queue.virtual[r.cls] = queue.waiting[self.requests[due].flow]
                    same = {flow: max(tag, now) for flow, tag in queue.waiting.items() if flow[0] == r.cls}
                    queue.waiting |= same
                    self.leave(i, "running", r.ticket.cost / r.ticket.weight)
                    self.take(i)
                    return i, expired, full
                self.leave(i, "expired")
                expired.append(i)
        return None, expired, full

    def sweep(self) -> list[str]:
        due = [i for i, r in self.requests.items() if r.state == "queued" and r.due <= self.now]
        expired = []
        for i in sorted(due, key=lambda i: (self.requests[i].due, i)):
            r = self.requests[i]
            self.leave(i, "expired")
            if r.deadline <= self.now:
                expired.append(i)
            else:
                r.cls -= 1
                self.enqueue(i)
        return expired

    def commit(self, i: str, fence: int, target: str) -> str:
        r = self.requests[i]
        if r.fence == fence and r.state == target != "running":
            return target
        if r.fence != fence or r.state not in ("running", "cancelling"):
            return "lost"
        if target == "cancelled" and r.state == "running":
            return "running"
        r.state, r.has_slot, r.alone = "cancelled" if r.state == "cancelling" else target, False, False
        if r.state == "queued":
            r.queue, r.attempt = VAE, 0
            self.enqueue(i)
        if r.state != "running":
            r.lease = None
        return r.state

    def requeue(self, i: str, fence: int | None, counts: bool) -> str:
        r = self.requests[i]
        if fence is None and (r.lease is None or r.lease > self.now):
            return "lost"
        if fence not in (None, r.fence) or r.state not in ("running", "cancelling"):
            return "lost"
        r.fence, r.lease, r.attempt, r.has_slot = self.next_fence(), None, r.attempt - (not counts), False
        if r.state == "cancelling":
            r.state = "cancelled"
        elif r.attempt >= MAX_ATTEMPTS and r.alone:
            r.state = "failed"
        else:
            r.alone = r.alone or r.attempt >= MAX_ATTEMPTS - 1
            self.enqueue(i)
        return r.state

    def abort(self, i: str) -> str:
        r = self.requests[i]
        if r.state == "queued":
            self.leave(i, "cancelled")
        elif r.state == "running":
            r.state = "cancelling"
        return r.state


KNOWN = precondition(lambda machine: machine.model.requests)
CLAIMED = precondition(lambda machine: machine.claims)
NEWEST = range(10)
CALLS = ("beat", "beat", "commit", "commit", "requeue")
OUTCOMES = ("running", "queued", "queued", "done", "failed", "cancelled")
RUNNING = (set(), {"x"}, {"y"}, {"x", "y"})
FEEDS = (None, None, ["p"], ["q q"], ["p", "q q"], ["other"])
ORDERS = ([DIT, VAE], [VAE, DIT])
THEN = ("sweep", "reap", "nothing")
TERMS = {
    "priority": (0, 0, 1, -1),
    "tenant": ("a", "b"),
    "cost": (1.0, 3.0),
    "nbytes": (1, 8),
    "batch": ("x", "y"),
    "feed": ("p", "q q"),
    "timeout_s": (7.0, 60.0, 60.0),
}
one = st.sampled_from


class Machine(RuleBasedStateMachine):
    """Each rule is a call, made to both; about one of the newest requests or claims, where it is about one."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.plain = redis.Redis.from_url(url, decode_responses=True)
        self.plain.flushall()
        self.model, self.state = Model(), State(RedisSection(url=url), "gateway")
        self.claims: list[Claim] = []
        self.expired: list[str] = []
        self.state._on_expired = self.expired.append
        for name in NAMES:
            self.state._scripts.by_name[name] = self.state._scripts.redis.register_script(scripted(name))
        self.set_clock()

    def set_clock(self) -> None:
        self.plain.delete(CLOCK)
        self.plain.rpush(CLOCK, self.model.now, 0)

    def run(self, call):
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        self.run(self.state.close())
        self.plain.close()
        self.loop.close()

    @rule(seconds=st.integers(0, 6), then=one(THEN))
    def time_passes(self, seconds: int, then: str) -> None:
        self.model.now += seconds
        self.set_clock()
        if then == "sweep":
            self.run(self.state.sweep())
            assert self.expired == self.model.sweep()
            self.expired.clear()
        elif then == "reap":
            leases = {i: r.lease for i, r in self.model.requests.items() if r.lease is not None}
            expired = self.run(self.state.expired())
            assert set(expired) == {i for i, end in leases.items() if end <= self.model.now}
            for i in expired:
                self.give_back(i, None, True)

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.several(seed)

    @rule(seed=st.integers(0, 2**32))
    def several(self, seed: int) -> None:
        """Calls of all kinds: hypothesis alone prefers to repeat a few."""
        draw = random.Random(seed)
        for _ in range(40):
            n, terms = draw.choice(NEWEST), {name: draw.choice(values) for name, values in TERMS.items()}
            owner = n, draw.choice(CALLS), draw.choice(OUTCOMES), draw.random() < 0.5
            calls = [
                *[lambda terms=terms: self.submit(terms, draw.random() < 0.5)] * 3,
                lambda: self.claim(draw.choice(ORDERS), draw.choice(RUNNING), draw.choice(FEEDS), draw.randint(1, 3)),
                lambda: self.time_passes(draw.randrange(5), draw.choice(THEN)),
            ]
            if self.claims:
                calls += [lambda owner=owner: self.owner(*owner)] * 3
            if self.model.requests:
                calls.append(lambda n=n: draw.choice((self.abort, self.reap_one_that_may_live))(n))
            draw.choice(calls)()
            self.same()

    @rule(terms=st.fixed_dictionaries({name: one(values) for name, values in TERMS.items()}), at_once=st.booleans())
    def submit(self, terms: dict, at_once: bool) -> None:
        bounds = {"age_s": AGE_S, "max_queued": MAX_QUEUED, "max_queued_tenant": MAX_QUEUED_TENANT}
        bounds |= {"max_queued_cost": MAX_QUEUED_COST, "max_queued_bytes": MAX_QUEUED_BYTES}
        ticket = Ticket(**terms, **bounds, weight=2.0 if terms["tenant"] == "b" else 1.0)
        model, i = self.model, f"r{len(self.model.requests):03d}"
        waiting = model.line(DIT)
        own = [w for w in waiting if model.requests[w].ticket.tenant == ticket.tenant]
        start = Start(LEASE_S, Offer("replica", SLOTS, ROOM)) if at_once else None
        at_once = at_once and not waiting and not model.full(ticket.cost)
        call = self.state.submit(i, DIT, ticket, {"params": b"p"}, start=start)
        work = sum(model.requests[w].ticket.cost for w in waiting) + ticket.cost
        nbytes = sum(model.requests[w].ticket.nbytes for w in waiting) + ticket.nbytes
        too_much = bool(waiting) and (work > MAX_QUEUED_COST or nbytes > MAX_QUEUED_BYTES)
        if len(waiting) >= MAX_QUEUED or len(own) >= MAX_QUEUED_TENANT or too_much:
            with pytest.raises(Overloaded):
                self.run(call)
            return
        stored, claim = self.run(call)
        model.requests[i] = Request(ticket, model.now, ticket.priority_class)
        if at_once:
            model.take(i)
        else:
            model.enqueue(i)
        assert stored and (claim is not None) == (model.requests[i].state == "running")
        self.claims += [claim] if claim else []

    @KNOWN
    @rule(n=one(NEWEST))
    def submit_again(self, n: int) -> None:
        again = self.state.submit(self.request(n), DIT, Ticket(), {}, start=Start(LEASE_S))
        assert self.run(again) == (False, None)

    def request(self, n: int) -> str:
        alive = [i for i, r in self.model.requests.items() if r.state in ("queued", "running", "cancelling")]
        known = alive if alive and n < 8 else list(self.model.requests)
        return known[-1 - n % len(known)]

    @rule(queues=one(ORDERS), running=one(RUNNING), feeds=one(FEEDS), times=st.integers(1, 4))
    def claim(self, queues: list[str], running: set[str], feeds: list[str] | None, times: int) -> None:
        for _ in range(times):
            offer = Offer("replica", SLOTS, ROOM, running, feeds)
            claim = self.run(self.state.claim(queues, LEASE_S, dict.fromkeys(queues, offer)))
            chosen, expired, full = self.model.claim(queues, running, feeds)
            assert offer.full == full
            assert (claim and claim.request_id, self.expired) == (chosen, expired)
            self.expired.clear()
            assert claim is None or claim.left == sum(len(self.model.line(queue)) for queue in queues)
            self.claims += [claim] if claim else []

    @CLAIMED
    @rule(n=one(NEWEST), what=one(CALLS), outcome=one(OUTCOMES), counts=st.booleans())
    def owner(self, n: int, what: str, outcome: str, counts: bool) -> None:
        claim = self.claims[-1 - n % len(self.claims)]
        i, r = claim.request_id, self.model.requests[claim.request_id]
        if what == "requeue":
            self.give_back(i, claim.fence, counts)
        elif what == "commit":
            state = self.run(self.state.commit(claim, outcome, "vae", VAE, {}))
            assert state == self.model.commit(i, claim.fence, outcome)
        else:
            holds = r.fence == claim.fence and r.state in ("running", "cancelling")
            assert self.run(self.state.beat(claim, LEASE_S)) == (r.state if holds else "lost")
            r.lease = self.model.now + LEASE_S if holds else r.lease

    def give_back(self, i: str, fence: int | None, counts: bool) -> None:
        state = self.run(self.state.requeue(i, fence, MAX_ATTEMPTS, counts, b"e"))
        assert state == self.model.requeue(i, fence, counts)

    @KNOWN
    @rule(n=one(NEWEST))
    def reap_one_that_may_live(self, n: int) -> None:
        self.give_back(self.request(n), None, True)

    @KNOWN
    @rule(n=one(NEWEST))
    def abort(self, n: int) -> None:
        i = self.request(n)
        assert self.run(self.state.abort(i)) == self.model.abort(i)

    @invariant()
    def same(self) -> None:
        model = self.model
        with self.plain.pipeline(transaction=False) as pipe:
            for i in model.requests:
                pipe.hmget(f"{{ll}}:req:{i}", "state", "class", "fence", "attempt", "alone")
            pipe.zrange(DIT, 0, -1).zrange(VAE, 0, -1).zrange(LEASES, 0, -1)
            pipe.zrange("{ll}:slots:replica", 0, -1, withscores=True).keys("{ll}:q:*")
            *records, dit, vae, leases, slots, keys = pipe.execute()
        assert records == [
            [r.state, str(r.cls), str(r.fence), str(r.attempt), "1" if r.alone else None]
            for r in model.requests.values()
        ]
        assert (set(dit), set(vae)) == (set(model.line(DIT)), set(model.line(VAE)))
        assert set(leases) == {i for i, r in model.requests.items() if r.lease is not None}
        there = {i: r for i, r in model.requests.items() if r.has_slot}
        assert dict(slots) == {i: math.inf if r.alone else r.ticket.cost for i, r in there.items()}
        assert not [key for key in keys if not model.line(DIT if key.startswith(DIT) else VAE)]


def test_the_scripts_do_what_the_model_does(url: str) -> None:
    run_state_machine_as_test(
        lambda: Machine(url),
        settings=settings(
            max_examples=40,
            stateful_step_count=6,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
