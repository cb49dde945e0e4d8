"""The text encoder's rank: calls in, embeddings out."""

from __future__ import annotations

import time

from protos import text_encoder_pb2, types_pb2
from services.config import StageConfig
from services.describe import describe, limits_of, open_model
from services.parallel.mesh import Mesh
from services.rank_process import Call, run
from services.telemetry import make_span
from services.wire import checked_from_proto, parsing
from text_encoder_svc.engine import Encoded, TextEngine, open_engine

NUMBERS = ("", "_2", "_3", "_4")
SUBFOLDERS = (
    "processor",
    "image_processor",
    "image_encoder",
    *(f"{kind}{number}" for kind in ("tokenizer", "text_encoder") for number in NUMBERS),
)


class TextEncoderProgram:
    """RankProgram of the service."""

    def __init__(self, config: StageConfig, mesh: Mesh | None = None) -> None:
        self._config = config
        self._limits = limits_of(config, open_model(config.model)).of_any_model()
        self._engine: TextEngine = open_engine(config, mesh)
        self._calls: dict[str, Call] = {}

    def describe(self) -> types_pb2.DescribeResponse:
        """This replica."""
        source = open_model(self._config.model)
        subfolders = [name for name in SUBFOLDERS if source.has(name)]
        return describe(self._config, types_pb2.STAGE_TEXT_ENCODER, source, subfolders)

    def opened(self, call: Call) -> None:
        """Everything comes in the message."""

    def message(self, call: Call, data: bytes) -> None:
        """Queues the request."""
        key = str(call.id)
        with parsing():
            params = checked_from_proto(text_encoder_pb2.EncodeRequest.FromString(data).params, self._limits)
        self._engine.submit(key, params)
        self._calls[key] = call

    def half_closed(self, call: Call) -> None:
        """Nothing more comes."""

    def cancelled(self, call: Call) -> None:
        """Forgets the request."""
        self._engine.abort(str(call.id))
        self._calls.pop(str(call.id), None)

    def tick(self) -> bool:
        """One batch."""
        if self._engine.busy:
            for encoded in self._engine.tick():
                self._answer(self._calls.pop(encoded.request_id), encoded)
        return self._engine.busy

    def _answer(self, call: Call, encoded: Encoded) -> None:
        if encoded.error is not None:
            call.fail(encoded.error)
            return
        call.send_tensors(encoded.tensors)
        span = make_span("text.encode", self._config.service.name, encoded.start_unix_ns, time.time_ns())
        usage = types_pb2.StageUsage(busy_s=encoded.busy_s, spans=[span], cached=encoded.cached)
        call.send(text_encoder_pb2.EncodeResponse(usage=usage).SerializeToString())
        call.finish()

    def metrics(self) -> dict[str, float]:
        """The engine's."""
        return self._engine.metrics()

    def drain(self) -> None:
        """What waits is short: it is finished."""


if __name__ == "__main__":
    run(TextEncoderProgram)
