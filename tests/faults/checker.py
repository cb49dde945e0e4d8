"""Proves the invariants of a run from its records alone: what clients saw, what workers did, what is left.

I1  every accepted request reaches exactly one terminal state, which its clients saw; only who was asked to is cancelled
I2  a DONE request has exactly one artifact, whole, and the same for store, manifest, Redis and client; others have none
    (what a gateway left that was killed while it cleared up goes with the sweep)
I3  nothing is committed under a fence when a newer one had begun to work; no replica works under an older one
I4  states follow the table
I5  leases, queues, slots, jobs, files under way and processes are given back
I6  no step later than 2 s after CANCELLED, or after the end of what kept its replica from hearing of it
I7  a recipe gives the same bytes as without faults
I8  a follower sees every event of the stream once, in order, however often it had to come back
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from tests.faults.history import History, Line

TERMINAL = {"done", "failed", "cancelled", "expired"}
FOLLOWS = {
    "": {"queued"},
    "queued": {"running", "cancelled", "expired", "failed"},
    "running": {"running", "queued", "cancelling", *TERMINAL},
    "cancelling": {"cancelled", "expired"},
    **{state: set() for state in TERMINAL},
}
AFTER_CANCEL_S = 2.0
# Pings after 10 s of silence, 5 s for the answer, and one more to act: no cut keeps news from a replica for longer.
FOUND_S = 16.0
CLEAN_UP_S = 2.0
# Workers write by the clock of the machine, Redis by its own of the same machine, rounded down to milliseconds.
CLOCKS_S = 0.05


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken invariant, of one request or (without an id) of the whole cluster."""

    invariant: str
    request_id: str
    message: str


def check(
    history: History,
    *,
    may_fail: Collection[str] = (),
    may_be_lost: bool = False,
    reference: dict[str, str] | None = None,
) -> list[Violation]:
    """All that is broken.

    Args:
        may_fail: prompts whose requests may end as FAILED.
        may_be_lost: what the state store has acknowledged may be gone: such requests must only end well. Whatever an
            owner did whose claim is gone is nobody's then.
        reference: sha256 by recipe, of a run without faults; of this run's own pictures when left out.
    """
    found = [Violation("I5", "", left) for left in history.final["left"]]
    begun, steps = history.of_workers("begin"), history.of_workers("step")
    lost = lost_writes(history)
    aborted = {line["id"] for line in history.clients if line["kind"] == "invoke" and line["op"] == "abort"}
    for request_id, accepted in history.accepted.items():
        request = history.final["requests"][request_id]
        allowed = {"done"} | ({"cancelled"} if request_id in aborted else set())
        allowed |= {"failed"} if accepted["recipe"]["prompt"] in may_fail else set()
        if may_be_lost and request_id in lost:
            found += [Violation("I1", request_id, message) for message in _one_end(request, allowed)]
            continue
        checks = (
            ("I1", _one_end(request, allowed)),
            ("I1", _lost(lost.get(request_id, 0))),
            ("I2", _artifact(request_id, request, history.final["artifacts"])),
            ("I2", _swept(request_id, request, history)),
            ("I3", _fences(begun.get(request_id, []), steps.get(request_id, []))),
            ("I3", _commit(request, begun.get(request_id, []))),
            ("I4", _table(request)),
            ("I6", _late_steps(request, steps.get(request_id, []), history.faults)),
        )
        found += [Violation(name, request_id, message) for name, messages in checks for message in messages]
    found += [broken for broken in _clients(history) if not (may_be_lost and broken.request_id in lost)]
    return found + list(_same_bytes(history, reference or {}))


def lost_writes(history: History) -> dict[str, int]:
    """By request: events that a client has seen and that are not in its stream, and times that nobody knew of it."""
    found: dict[str, int] = {}
    for line in history.clients:
        stored = history.final["requests"].get(line.get("id", ""), {"events": ()})["events"]
        seen = line["kind"] == "event" and all(line["event"] != event["id"] for event in stored)
        if seen or line["kind"] == "lost":
            found[line["id"]] = found.get(line["id"], 0) + 1
    return found


def _lost(writes: int) -> Iterator[str]:
    if writes:
        yield f"{writes} acknowledged writes are gone"


def _statuses(request: Line) -> list[Line]:
    return [event for event in request["events"] if event["kind"] == "status"]


def _one_end(request: Line, allowed: set[str]) -> Iterator[str]:
    ends = [event["state"] for event in _statuses(request) if event["state"] in TERMINAL]
    if ends != [request["state"]]:
        yield f"terminal events {ends}, the record says {request['state']!r}"
    if request["state"] not in allowed:
        yield f"ended as {request['state'] or 'lost'}, allowed is {sorted(allowed)}: {request['error'][:200]}"


def _artifact(request_id: str, request: Line, artifacts: dict[str, Line]) -> Iterator[str]:
    files = sorted(name for name in artifacts if name.partition(".")[0] == request_id)
    expected = [request["file"]] if request["state"] == "done" else []
    if files != expected:
        yield f"artifacts {files}, it should have {expected}"
    for name in set(files) & set(expected):
        sums = {request["sha256"], artifacts[name]["sha256"], artifacts[name]["manifest"]}
        if len(sums) != 1:
            yield f"file, manifest and record of {name} do not agree: {sorted(sums)}"


def _swept(request_id: str, request: Line, history: History) -> Iterator[str]:
    files = [name for name in history.final["swept"] if request_id in name]
    killed_s = [line["t"] for line in history.faults if line.get("what") == "kill" and "gateway" in line["name"]]
    changed_s = [event["t"] for event in _statuses(request)]
    if files and not any(0 <= killed - changed <= CLEAN_UP_S for killed in killed_s for changed in changed_s):
        yield f"{files} stayed until the sweep, and no gateway was killed that had to clear up"


def _fences(begun: list[Line], steps: list[Line]) -> Iterator[str]:
    newest: dict[str, int] = {}
    for line in sorted([*begun, *steps], key=lambda line: float(line["t"])):
        # A replica's memory of fences ends with its process.
        place = f"{line['replica']}/{line['pid']}"
        if line["fence"] < newest.get(place, 0):
            yield f"{place}: {line['kind']} under fence {line['fence']} after {newest[place]} had begun"
        newest[place] = max(newest.get(place, 0), line["fence"])


def _commit(request: Line, begun: list[Line]) -> Iterator[str]:
    done = [event["t"] for event in _statuses(request) if event["state"] == "done"]
    if done and request["file"]:
        fence = int(request["file"].rpartition(".")[2])
        newer = [line["fence"] for line in begun if line["t"] < done[0] - CLOCKS_S and line["fence"] > fence]
        if newer:
            yield f"committed under fence {fence}, when fence {max(newer)} had begun"


def _table(request: Line) -> Iterator[str]:
    before = ""
    for event in _statuses(request):
        if event["state"] not in FOLLOWS[before]:
            yield f"{event['state']} follows {before or 'nothing'}"
        before = event["state"]


def _late_steps(request: Line, steps: list[Line], faults: list[Line]) -> Iterator[str]:
    for event in _statuses(request):
        if event["state"] != "cancelled":
            continue
        heard_s = {line["replica"]: heard_by_s(line["replica"], event["t"], faults) for line in steps}
        late = [line for line in steps if line["t"] > heard_s[line["replica"]]]
        if late:
            places = sorted({line["replica"] for line in late})
            last_s = max(line["t"] for line in late) - event["t"]
            yield f"{len(late)} steps up to {last_s:.1f} s after it was cancelled, at {places}"


def heard_by_s(replica: str, cancelled_s: float, faults: list[Line]) -> float:
    """When a replica has heard of a cancel at last: AFTER_CANCEL_S behind the first moment at which nothing keeps it
    from that. Frozen, it wakes up in the middle of a step.
    """
    free_s = cancelled_s
    for start_s, end_s in _unreachable(replica, faults):
        if start_s <= free_s + AFTER_CANCEL_S:
            free_s = max(free_s, end_s)
    return free_s + AFTER_CANCEL_S


def _unreachable(replica: str, faults: list[Line]) -> list[tuple[float, float]]:
    """From when to when it was frozen or cut off, by start."""
    found = []
    for what, ends, bound_s in (("freeze", "thaw", math.inf), ("cut", "heal", FOUND_S)):
        times = {
            name: [line["t"] for line in faults if line.get("what") == name and line["name"] == replica]
            for name in (what, ends)
        }
        for start_s in times[what]:
            end_s = min((end_s for end_s in times[ends] if end_s >= start_s), default=math.inf)
            found.append((start_s, min(end_s, start_s + bound_s)))
    return sorted(found)


def _clients(history: History) -> list[Violation]:
    found = []
    seen: dict[str, list[Line]] = {}
    for line in history.clients:
        seen.setdefault(line.get("id", ""), []).append(line)
    for request_id, request in history.final["requests"].items():
        lines = seen.get(request_id, [])
        ends = {line["state"] for line in lines if line["kind"] == "end"}
        if ends - {request["state"]}:
            found.append(Violation("I1", request_id, f"clients saw {sorted(ends)}, it is {request['state']!r}"))
        if any(line["kind"] == "fail" and line["op"] == "follow" for line in lines):
            found.append(Violation("I1", request_id, "a follower never saw its end"))
        results = {line["sha256"] for line in lines if line["kind"] == "result"}
        if results - {request["sha256"]}:
            found.append(Violation("I2", request_id, f"a client got {sorted(results)}, not {request['sha256']}"))
        events = [line["event"] for line in lines if line["kind"] == "event"]
        stored = [event["id"] for event in request["events"]]
        if events and events != stored:
            missed, twice = set(stored) - set(events), len(events) - len(set(events))
            found.append(Violation("I8", request_id, f"missed {sorted(missed)}, {twice} twice, or out of order"))
    return found


def recipe_name(recipe: dict[str, Any]) -> str:
    """A recipe as a key."""
    return "/".join(str(value) for value in recipe.values())


def pictures(history: History) -> dict[str, set[str]]:
    """The sums of all finished requests by recipe."""
    found: dict[str, set[str]] = {}
    for request_id, accepted in history.accepted.items():
        if sha256 := history.final["requests"][request_id]["sha256"]:
            found.setdefault(recipe_name(accepted["recipe"]), set()).add(sha256)
    return found


def _same_bytes(history: History, reference: dict[str, str]) -> Iterator[Violation]:
    for recipe, sums in pictures(history).items():
        expected = {reference[recipe]} if recipe in reference else sums
        if sums != expected or len(sums) > 1:
            yield Violation("I7", "", f"recipe {recipe} gave {sorted(sums)}, expected {sorted(expected)}")
