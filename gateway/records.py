"""What is in Redis: the names of its keys, all under one hash tag, and what comes out of them."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.ticket import Offer

PREFIX = "{ll}"
IDS, LEASES, FENCE, WAKE, DUE = (f"{PREFIX}:{name}" for name in ("ids", "leases", "fence", "wake", "due"))
LINK_KEY, PACES, PROBE = f"{PREFIX}:link-key", f"{PREFIX}:paces", f"{PREFIX}:probe"
# By model and number of frames: bytes of latents for each pixel of what was asked for.
LATENTS = f"{PREFIX}:latents"
TERMINAL = frozenset({"done", "failed", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that this gateway owns, as long as nobody has a higher fence.

    `queue` is where it waited, `left` how many more wait in the queues that were asked.
    """

    request_id: str
    fence: int
    record: dict[str, bytes]
    queue: str
    left: int


@dataclass(frozen=True, slots=True)
class Holding:
    """What a request's record says of its files: its owner's fence, and the artifact's name once it is done."""

    state: str
    fence: str
    file: str


@dataclass(frozen=True, slots=True)
class Queued:
    """What waits in a queue: requests, their pixels, and pixels times steps; those to be interpolated by themselves."""

    requests: int
    pixels: float
    pixel_steps: float
    interpolated: int = 0
    interpolated_pixels: float = 0.0

    def units(self, stage: str) -> float:
        """The work that it is for a stage, as `gateway/pace.py` counts it."""
        return {"dit": self.pixel_steps, "vae": self.pixels, "interpolation": self.pixels}.get(
            stage, float(self.requests)
        )


def queue_key(stage: str, component_id: str) -> str:
    """The queue of a stage's component."""
    return f"{PREFIX}:q:{stage}:{component_id}"


def slots_of(offer: Offer) -> tuple[str, int, float]:
    """The key of the requests that a replica has, how many it takes, and of what cost."""
    return f"{PREFIX}:slots:{offer.replica_id}" if offer.replica_id else "", offer.max_in_flight, offer.max_cost


def request_key(request_id: str) -> str:
    """The hash of a request."""
    return f"{PREFIX}:req:{request_id}"


def ids_key(tenant: str) -> str:
    """The ids of a tenant's requests."""
    return f"{IDS}:{tenant}"


def events_key(request_id: str) -> str:
    """The stream of a request's events."""
    return f"{PREFIX}:ev:{request_id}"


def inputs_key(request_id: str) -> str:
    """What a request was submitted with, until it has ended."""
    return f"{PREFIX}:in:{request_id}"
