"""Times between a fault and what followed, out of the records."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.history import History, Line


def requeued_s(history: History, whats: tuple[str, ...] = ("kill", "kill rank")) -> list[float]:
    """Seconds from each worker's fault to the moment at which each request that it denoised was in the queue again."""
    found = []
    for fault in history.faults:
        for rank in fault.get("ranks", ()) if fault.get("what") in whats else ():
            for request_id in _denoised_by(history, rank, fault["t"]):
                found += _next(history, request_id, "queued", fault["t"])
    return found


def _denoised_by(history: History, rank: int, at_s: float) -> Iterator[str]:
    steps = {line["id"]: line for line in history.workers if line["kind"] == "step" and line["pid"] == rank}
    for line in history.workers:
        if line["kind"] != "begin" or line["pid"] != rank or line["t"] > at_s:
            continue
        recipe = history.accepted.get(line["id"], {}).get("recipe")
        step = steps.get(line["id"], {"fence": line["fence"], "step": 0})
        if recipe and step["fence"] == line["fence"] and step["step"] < recipe["steps"]:
            yield line["id"]


def _next(history: History, request_id: str, state: str, after_s: float) -> list[float]:
    """Seconds until the next status event, if it is this one; nothing when another came first."""
    for event in history.final["requests"][request_id]["events"]:
        if event["kind"] == "status" and event["t"] > after_s:
            return [event["t"] - after_s] if event["state"] == state else []
    return []


def adopted_s(history: History, owned: list[str], since_s: float) -> list[float]:
    """Seconds until each of these requests was in the queue again."""
    return [seconds for request_id in owned for seconds in _next(history, request_id, "queued", since_s)]


def extra_steps(history: History) -> int:
    """How many steps were made more than once."""
    extra = 0
    for request_id, lines in history.of_workers("step").items():
        if request_id in history.accepted:
            extra += len(lines) - len({line["step"] for line in lines})
    return extra


def aborts_s(history: History) -> tuple[list[float], list[float]]:
    """Of aborts: how long those of queued requests took; and how long running ones went on denoising."""
    queued, running = [], []
    steps = history.of_workers("step")
    for line in history.clients:
        if line["kind"] == "ok" and line["op"] == "abort":
            began_s = line["t"] - line["seconds"]
            if line["state"] == "cancelled":
                queued.append(line["seconds"])
            elif line["state"] == "cancelling":
                last_s = max((step["t"] for step in steps.get(line["id"], ())), default=began_s)
                running.append(max(0.0, last_s - began_s))
    return queued, running


def refusals(history: History) -> list[Line]:
    """Submits that were told to come later."""
    return [line for line in history.clients if line["kind"] == "info" and line["op"] == "submit"]
