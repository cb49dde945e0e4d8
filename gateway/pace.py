"""How fast a replica works, learnt from the calls that it finishes.

Work is counted in units that a request's parameters tell: one for a text encoder, pixels for a VAE and an
interpolator, pixel-steps for a denoiser. By Little's law, a replica that has held n requests all the while and took t
seconds for one finishes n in those seconds, however it batches them: one unit of work takes it t / n / units seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.cost import pixel_steps, pixels
from protos import types_pb2

# Of the newest call in the moving average.
WEIGHT = 0.2


def units(stage: str, params: types_pb2.GenerationParams) -> float:
    """A request's work for a stage."""
    match stage:
        case "dit":
            return float(pixel_steps(params))
        case "vae" | "interpolation":
            return float(pixels(params))
    return 1.0


@dataclass(slots=True)
class Pace:
    """Seconds that a replica takes for a unit of work: a moving average, None before the first call has ended."""

    unit_s: float | None = None

    def learn(self, elapsed_s: float, in_flight: int, work: float) -> None:
        """A call has ended.

        Args:
            elapsed_s: from its arrival at the replica, the time in which it waited there included.
            in_flight: requests that the replica held meanwhile, this one included.
            work: in units.
        """
        if work <= 0:
            return
        newest_s = elapsed_s / max(1, in_flight) / work
        self.unit_s = newest_s if self.unit_s is None else self.unit_s + WEIGHT * (newest_s - self.unit_s)
