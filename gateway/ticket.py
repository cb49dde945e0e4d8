"""How a request stands in its queues: class, tenant, cost, deadline, bounds; and what a replica offers to a queue."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from gateway.cost import branches
from services.request import Limits, ResolvedParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What a queue must know of a request.

    Args:
        priority: below 0 is high, 0 normal, above 0 low; a class runs when none above it waits.
        tenant: shares fairly with the others of its class, by `weight` (above 0).
        cost: see `gateway.cost.cost_of`.
        nbytes: what its parameters take in Redis.
        batch: see `batch_key`.
        feed: see `feed_key`.
        timeout_s: from the submit to its deadline.
        keep_s: how long it is remembered after its deadline at least.
        age_s: after so long in a queue it moves up a class.
        max_queued, max_queued_tenant: it is refused when so many wait, or so many of its tenant.
        max_queued_cost, max_queued_bytes: it is refused when it would be more than that with all that wait.
    """

    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    cost: float = 1.0
    nbytes: int = 0
    batch: str = ""
    feed: str = ""
    timeout_s: float = 3600.0
    keep_s: float = 86_400.0
    age_s: float = 300.0
    max_queued: int = 10_000
    max_queued_tenant: int = 10_000
    max_queued_cost: float = math.inf
    max_queued_bytes: float = math.inf

    @property
    def priority_class(self) -> int:
        """0 high, 1 normal, 2 low."""
        return 1 + (self.priority > 0) - (self.priority < 0)


@dataclass(slots=True)
class Offer:
    """A replica that would get a queue's next request.

    Args:
        replica_id: as it describes itself; "" counts no slots.
        max_in_flight: requests that it takes at once, from all gateways.
        max_cost: their cost, of all together; one larger request runs by itself.
        batches: the batch keys that it runs.
        feeds: the feed keys that can be served now; None for all.
        full: set when a claim found no room.
    """

    replica_id: str = ""
    max_in_flight: int = 0
    max_cost: float = math.inf
    batches: Collection[str] = ()
    feeds: Collection[str] | None = None
    full: bool = False

    def feeds_one(self, feed: str) -> bool:
        """Whether a request with that feed key can be served now."""
        return self.feeds is None or feed in self.feeds


@dataclass(frozen=True, slots=True)
class Start:
    """That a submit claims its request at once, if nobody waits before it and the offered replica has a slot.

    Args:
        lease_s: of the claim.
        mark: names the submit in its claim, should the answer be lost.
    """

    lease_s: float
    offer: Offer = field(default_factory=Offer)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))


def batch_key(params: ResolvedParams, limits: Limits) -> str:
    """Equal for requests that can share a denoise step: shape, frames, branches."""
    return f"{params.width}x{params.height}x{params.num_frames}/{branches(params, limits)}"


def feed_key(model: str, *, with_inputs: bool, interpolated: bool = False) -> str:
    """Equal for requests that need the same stages beside the one that they wait for.

    Their conditions come from the model's text encoder, and from its VAE for inputs; models with equal weights share a
    denoiser and its queue, but not what feeds it. Beside their VAE, some need an interpolator.
    """
    return f"{'vae' if with_inputs else 'text'}{'+interpolation' if interpolated else ''}:{model}"
