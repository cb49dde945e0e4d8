"""What becomes of a call's frames, on its way to the caller. For the ranks that make media."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from protos import types_pb2
from services.channel import CALL_ROOM_BYTES
from services.clip_reader import Frames
from services.clip_writer import RAW_MIME, ClipWriter
from services.rank_process import Call
from services.sound import Sound
from services.wire import media_chunks, media_messages

# So much is sent at most that the caller has not taken. It is less than the front keeps for a call, and most chunks of
# frames (1080p: 24 MiB) leave in it and the rest, so that they need not wait for another tick.
SENT_AHEAD_BYTES = 2 * CALL_ROOM_BYTES


@dataclass(slots=True)
class _Queued:
    """Messages that belong together, and how many bytes of what they carry are to be sent."""

    messages: Iterator[bytes]
    left_bytes: int


class MediaAnswer:
    """Sends what is made as the caller takes it: what it has no room for would hold up all other calls, and waits here.

    All but the last `CALL_ROOM_BYTES`, the rest, leaves by `add`, `add_messages` and `send_some`; then it is not full
    any more, and `send_rest` does not wait.

    Args:
        header: of the media, without type and size.
        writer: what it has made of all frames is sent. Without one they leave raw, as they come: how many bytes they
            will be is known from the first on.
    """

    def __init__(self, call: Call, header: types_pb2.MediaHeader, writer: ClipWriter | None) -> None:
        self._call = call
        self._header = header
        self._writer = writer
        self._ended = self._begun = False
        self._queued: deque[_Queued] = deque()

    def add(self, frames: Frames, sound: Sound | None = None) -> None:
        """The next frames [F, H, W, C], and the next sound, as `ClipWriter.add`."""
        if self._writer is not None:
            self._writer.add(frames, sound)
        elif self._begun:
            self.add_messages(media_chunks(frames.tobytes()), frames.nbytes)
        else:
            self._begun = True
            self._header.mime = RAW_MIME
            all_bytes = self._header.num_frames * frames[0].nbytes
            self.add_messages(media_messages(self._header, frames.tobytes(), all_bytes), frames.nbytes)

    def add_messages(self, messages: Iterator[bytes], num_bytes: int) -> None:
        """Where the frames themselves go to another stage: the next ones, with their sound `num_bytes` together."""
        self._queued.append(_Queued(messages, num_bytes))
        self.send_some()

    def end(self) -> None:
        """Says that no frames follow."""
        self._ended = True
        if self._writer is not None:
            self._writer.end()

    def is_full(self) -> bool:
        """Whether the encoder takes no more frames now, or more is to be sent than the rest."""
        return self._too_large() or (self._writer is not None and self._writer.is_full())

    def is_done(self, timeout_s: float = 0.0) -> bool:
        """Whether everything is made; no frames follow. Waits for that, `timeout_s` at most."""
        return self._writer is None or self._writer.is_done(timeout_s)

    def send_some(self) -> None:
        """What the caller has room for now; of encoded media only if they are large."""
        if self._too_large():
            self._begin()
        while self._queued and not self._call.is_behind(SENT_AHEAD_BYTES):
            self._send_next()

    def send_rest(self) -> None:
        """Everything else, once the encoder has ended.

        Raises:
            Exception: what the encoder failed with.
        """
        self._begin()
        while self._queued:
            self._send_next()

    def close(self) -> None:
        """Ends the encoder; what it has not made is lost."""
        if self._writer is not None:
            self._writer.close()

    @property
    def behind_s(self) -> float:
        """Seconds for which the encoder alone was waited for."""
        return 0.0 if self._writer is None else self._writer.behind_s

    def _too_large(self) -> bool:
        left_bytes = sum(queued.left_bytes for queued in self._queued)
        if self._writer is not None and self._ended and not self._begun:
            left_bytes = self._writer.made_bytes
        return left_bytes > CALL_ROOM_BYTES

    def _begin(self) -> None:
        """Takes what the encoder has made."""
        if self._writer is not None and not self._begun:
            self._header.mime, data = self._writer.finish()
            self._queued.append(_Queued(media_messages(self._header, data), len(data)))
            self._begun = True

    def _send_next(self) -> None:
        queued = self._queued[0]
        message = next(queued.messages, None)
        if message is None:
            self._queued.popleft()
            return
        self._call.send(message)
        # A message is larger than what it carries: one must not pay for the next.
        queued.left_bytes = max(0, queued.left_bytes - len(message))
