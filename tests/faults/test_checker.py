"""Each invariant of the checker by itself: a sound history passes, and one thing wrong with it is found."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.faults.checker import check
from tests.faults.history import History, Line

RECIPE = {"prompt": "a cat", "seed": 1, "steps": 2, "side_px": 64}


def status(number: int, state: str) -> Line:
    return {"id": f"{number}000-0", "t": float(number), "kind": "status", "state": state}


def worker(t: float, kind: str, fence: int) -> Line:
    return {"t": t, "kind": kind, "replica": "dit-0", "pid": 1, "id": "r", "fence": fence}


def fault(t: float, what: str, name: str) -> Line:
    return {"t": t, "kind": "fault", "what": what, "name": name}


def frozen(name: str, from_s: float, to_s: float) -> list[Line]:
    return [fault(from_s, "freeze", name), fault(to_s, "thaw", name)]


def sound() -> History:
    """One request: a worker died under fence 1, the next owner brought it to its end under fence 3."""
    states = ("queued", "running", "queued", "running", "running", "done")
    events = [status(number, state) for number, state in enumerate(states, 1)]
    clients = [
        {"t": 0.5, "kind": "invoke", "op": "submit", "key": "k", "recipe": RECIPE},
        {"t": 1.0, "kind": "ok", "op": "submit", "key": "k", "id": "r", "recipe": RECIPE},
        *({"t": event["t"], "kind": "event", "id": "r", "event": event["id"]} for event in events),
        {"t": 6.1, "kind": "end", "id": "r", "state": "done"},
        {"t": 6.2, "kind": "result", "id": "r", "sha256": "aa", "nbytes": 1},
    ]
    workers = [worker(2.1, "begin", 1), worker(2.2, "step", 1), worker(4.1, "begin", 3), worker(4.2, "step", 3)]
    request = {"state": "done", "fence": 3, "attempt": 2, "file": "r.3", "sha256": "aa", "error": "", "events": events}
    artifacts = {"r.3": {"sha256": "aa", "manifest": "aa"}}
    return History(clients, [], workers, {"requests": {"r": request}, "artifacts": artifacts, "left": [], "swept": []})


def lose(history: History) -> None:
    history.final["requests"]["r"] |= {"state": "", "events": [], "file": "", "sha256": ""}


def end_twice(history: History) -> None:
    history.final["requests"]["r"]["events"].append(status(7, "done"))


def cancel_unasked(history: History) -> None:
    history.final["requests"]["r"] |= {"state": "cancelled", "file": "", "sha256": ""}
    history.final["requests"]["r"]["events"][-1]["state"] = "cancelled"
    history.final["artifacts"].clear()


def keep_two_files(history: History) -> None:
    history.final["artifacts"]["r.1"] = {"sha256": "aa", "manifest": "aa"}


def damage_the_file(history: History) -> None:
    history.final["artifacts"]["r.3"]["sha256"] = "bb"


def commit_an_old_fence(history: History) -> None:
    history.final["requests"]["r"]["file"] = "r.1"
    history.final["artifacts"] = {"r.1": {"sha256": "aa", "manifest": "aa"}}


def work_under_an_old_fence(history: History) -> None:
    history.workers.append(worker(4.3, "step", 1))


def skip_a_state(history: History) -> None:
    del history.final["requests"]["r"]["events"][0]


def hold_a_lease(history: History) -> None:
    history.final["left"].append("lease of r")


def denoise_after_the_abort(history: History) -> None:
    cancel_unasked(history)
    history.clients.append({"t": 5.0, "kind": "invoke", "op": "abort", "id": "r"})
    history.workers.append(worker(8.5, "step", 3))


def denoise_while_another_is_frozen(history: History) -> None:
    denoise_after_the_abort(history)
    history.faults.extend(frozen("dit-1", 5.5, 8.4))


def denoise_long_after_the_thaw(history: History) -> None:
    denoise_after_the_abort(history)
    history.faults.extend(frozen("dit-0", 5.5, 6.4))


def denoise_in_an_endless_cut(history: History) -> None:
    denoise_after_the_abort(history)
    history.faults.append(fault(5.5, "cut", "dit-0"))
    history.workers.append(worker(24.0, "step", 3))


def leave_a_file_to_the_sweep(history: History) -> None:
    history.final["swept"].append("artifacts/r.1")


def make_other_bytes(history: History) -> None:
    for place in (history.final["requests"]["r"], history.clients[-1]):
        place["sha256"] = "bb"
    history.final["artifacts"]["r.3"] = {"sha256": "bb", "manifest": "bb"}


def lose_what_was_acknowledged(history: History) -> None:
    history.final["requests"]["r"]["events"].pop(1)


def forget_it(history: History) -> None:
    history.clients.append({"t": 1.0, "kind": "lost", "id": "r"})


def miss_an_event(history: History) -> None:
    del history.clients[4]


def test_a_sound_history_passes():
    assert check(sound(), reference={"a cat/1/2/64": "aa"}) == []


@pytest.mark.parametrize(
    ("invariant", "break_it"),
    [
        ("I1", lose),
        ("I1", lose_what_was_acknowledged),
        ("I1", forget_it),
        ("I1", end_twice),
        ("I1", cancel_unasked),
        ("I2", keep_two_files),
        ("I2", damage_the_file),
        ("I3", commit_an_old_fence),
        ("I3", work_under_an_old_fence),
        ("I4", skip_a_state),
        ("I5", hold_a_lease),
        ("I6", denoise_after_the_abort),
        ("I6", denoise_while_another_is_frozen),
        ("I6", denoise_long_after_the_thaw),
        ("I6", denoise_in_an_endless_cut),
        ("I2", leave_a_file_to_the_sweep),
        ("I7", make_other_bytes),
        ("I8", miss_an_event),
    ],
)
def test_what_is_wrong_is_found(invariant: str, break_it: Callable[[History], None]):
    history = copy.deepcopy(sound())
    break_it(history)
    assert invariant in {violation.invariant for violation in check(history, reference={"a cat/1/2/64": "aa"})}


@pytest.mark.parametrize("lose_it", [lose_what_was_acknowledged, forget_it])
def test_what_a_failover_may_lose_must_end_well_all_the_same(lose_it: Callable[[History], None]):
    history = copy.deepcopy(sound())
    lose_it(history)
    assert check(history, may_be_lost=True) == []
    history.final["requests"]["r"]["state"] = "running"
    assert {violation.invariant for violation in check(history, may_be_lost=True)} == {"I1"}


@pytest.mark.parametrize(
    "faults",
    [
        frozen("dit-0", 5.5, 8.4),
        # Cut off first, frozen while it still could not hear.
        [fault(5.9, "cut", "dit-0"), fault(6.8, "heal", "dit-0"), *frozen("dit-0", 7.0, 8.3)],
        [fault(4.0, "cut", "dit-0")],
    ],
)
def test_a_step_is_not_late_when_its_replica_could_not_hear_of_the_cancel(faults: list[Line]):
    history = copy.deepcopy(sound())
    denoise_after_the_abort(history)
    history.faults.extend(faults)
    assert "I6" not in {violation.invariant for violation in check(history)}


def test_a_killed_gateway_may_leave_a_file_to_the_sweep():
    history = copy.deepcopy(sound())
    leave_a_file_to_the_sweep(history)
    history.faults.append(fault(3.5, "kill", "gateway-1"))
    assert check(history) == []
