"""What requests in work hold in the gateway's memory, in bytes: the credits without which nothing more is claimed.

Latents wait here for a store or a VAE that is slow. How large they will be is reckoned from the request's pixels, by
the newest latents of its model with as many frames. Gateways tell each other through Redis: one that has not carried
any yet must not take a crowd that it cannot hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.cost import pixels
from gateway.state import State
from protos import types_pb2
from services.errors import StateStoreDown

# Before a model's first latents: float32, 16 channels, one for each 8 x 8 pixels; those of videos are smaller.
FIRST_BYTES_A_PIXEL = 1.0
# Latents on their way to the VAE or the store, and a checkpoint of them or what the connections hold.
COPIES = 2


class Memory:
    """Counts it. One request may exceed `max_bytes`: the largest must run, too."""

    def __init__(self, max_bytes: int, state: State) -> None:
        self._max_bytes = max_bytes
        self._state = state
        self._held: dict[object, tuple[types_pb2.GenerationParams, int]] = {}
        # By kind, and what of it Redis has been told.
        self._bytes_a_pixel: dict[str, float] = {}
        self._told: dict[str, float] = {}

    @property
    def has_room(self) -> bool:
        """Whether one more request may come."""
        return sum(self._bytes_of(params) + nbytes for params, nbytes in self._held.values()) < self._max_bytes

    def _bytes_of(self, params: types_pb2.GenerationParams) -> float:
        return COPIES * pixels(params) * self._bytes_a_pixel.get(_kind(params), FIRST_BYTES_A_PIXEL)

    @contextmanager
    def held_by(self, params: types_pb2.GenerationParams, nbytes: int) -> Iterator[None]:
        """Counts a request, which has so many bytes itself, for the length of the block."""
        place = object()
        self._held[place] = params, nbytes
        try:
            yield
        finally:
            del self._held[place]

    async def ask(self, params: types_pb2.GenerationParams) -> None:
        """Before the first latents of a kind here: what other gateways know."""
        kind = _kind(params)
        if kind not in self._bytes_a_pixel:
            with contextlib.suppress(StateStoreDown):
                known = await self._state.latents_bytes_a_pixel(kind)
                if known is not None:
                    self._told[kind] = self._bytes_a_pixel.setdefault(kind, known)

    def learn(self, params: types_pb2.GenerationParams, latents_bytes: int) -> None:
        """A request's latents are whole."""
        self._bytes_a_pixel[_kind(params)] = latents_bytes / pixels(params)

    async def tell(self, params: types_pb2.GenerationParams) -> None:
        """Tells the other gateways what is new of that request's kind."""
        kind = _kind(params)
        newest = self._bytes_a_pixel[kind]
        if newest != self._told.get(kind):
            with contextlib.suppress(StateStoreDown):
                await self._state.note_latents(kind, newest)
                self._told[kind] = newest


def _kind(params: types_pb2.GenerationParams) -> str:
    """A clip has fewer latents for each of its pixels than a picture: several frames are one."""
    return f"{params.model}/{params.num_frames}"
