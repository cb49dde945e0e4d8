"""Encoded media on their way to a call's caller. For the ranks that make media."""

from __future__ import annotations

from collections.abc import Iterator

from protos import types_pb2
from services.channel import CALL_ROOM_BYTES
from services.clip_writer import ClipWriter
from services.rank_process import Call
from services.wire import media_messages


class MediaAnswer:
    """Sends what a writer makes, as the caller takes it: what it has no room for would hold up all other calls.

    All but the last `CALL_ROOM_BYTES`, the rest, is for `send_some`; then it is not full any more, and `send_rest` does
    not wait.
    """

    def __init__(self, call: Call, writer: ClipWriter) -> None:
        self.writer = writer
        self._call = call
        self._ended = False
        self._messages: Iterator[bytes] | None = None
        self._sent_bytes = 0

    def end(self) -> None:
        """Says that no frames follow."""
        self._ended = True
        self.writer.end()

    def is_full(self) -> bool:
        """Whether the encoder takes no more frames now, or after the last one more is to be sent than the rest."""
        return self.writer.is_full() or self._too_large()

    def send_some(self, header: types_pb2.MediaHeader) -> None:
        """Of large media, what the caller has room for now. `header` needs no mime type and no size."""
        while self._too_large() and not self._call.is_behind():
            self._send(next(self._begun(header)))

    def send_rest(self, header: types_pb2.MediaHeader) -> None:
        """Everything else, once the encoder has ended.

        Raises:
            Exception: what the encoder failed with.
        """
        for message in self._begun(header):
            self._send(message)

    def _too_large(self) -> bool:
        return self._ended and self.writer.made_bytes - self._sent_bytes > CALL_ROOM_BYTES

    def _begun(self, header: types_pb2.MediaHeader) -> Iterator[bytes]:
        if self._messages is None:
            header.mime, data = self.writer.finish()
            self._messages = media_messages(header, data)
        return self._messages

    def _send(self, message: bytes) -> None:
        self._call.send(message)
        self._sent_bytes += len(message)
