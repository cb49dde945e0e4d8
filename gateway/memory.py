"""What requests in work hold in the gateway's memory, in bytes: the credits without which nothing more is claimed.

Latents wait here for a store or a VAE that is slow. How large they will be is reckoned from the request's pixels, by
the newest latents of its model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.cost import pixels
from gateway.work import Work

# Before a model's first latents: float32, 16 channels, one for each 8 x 8 pixels; those of videos are smaller.
FIRST_BYTES_A_PIXEL = 1.0
# Latents on their way to the VAE or the store, and a checkpoint of them or what the connections hold.
COPIES = 2


class Memory:
    """Counts it. One request may exceed `max_bytes`: the largest must run, too."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: dict[object, float] = {}
        self._bytes_a_pixel: dict[str, float] = {}

    @property
    def has_room(self) -> bool:
        """Whether one more request may come."""
        return sum(self._held.values()) < self._max_bytes

    @contextmanager
    def held_by(self, work: Work) -> Iterator[None]:
        """Counts a request for the length of the block."""
        place = object()
        a_pixel = self._bytes_a_pixel.get(work.params.model, FIRST_BYTES_A_PIXEL)
        self._held[place] = int(work.claim.record.get("bytes", b"0")) + COPIES * pixels(work.params) * a_pixel
        try:
            yield
        finally:
            del self._held[place]

    def learn(self, work: Work, latents_bytes: int) -> None:
        """A request's latents are whole."""
        self._bytes_a_pixel[work.params.model] = latents_bytes / pixels(work.params)
