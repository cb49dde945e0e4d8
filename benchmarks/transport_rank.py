"""The rank of a stage that only moves tensors, for `benchmarks.transport`.

The prompt of a Denoise call says what it does: `source` sends one bundle of `steps` MiB of random bytes, which
`prepare` has made before, `sink` takes one bundle and checks it, `ping` answers with one small message.
"""

from __future__ import annotations

import torch

from protos import dit_pb2, types_pb2
from services.config import StageConfig
from services.rank_process import Call, run
from services.tensor_wire import frame_of
from services.tensors import BundleReader

USAGE = dit_pb2.DenoiseResponse(usage=types_pb2.StageUsage(busy_s=0.001)).SerializeToString()


class TransportProgram:
    """A RankProgram that answers as soon as it has what it needs."""

    def __init__(self, _config: StageConfig) -> None:
        self._readers: dict[int, BundleReader] = {}
        self._payload = torch.empty(0)

    def describe(self) -> types_pb2.DescribeResponse:
        """Just enough."""
        return types_pb2.DescribeResponse(stage=types_pb2.STAGE_DIT)

    def opened(self, call: Call) -> None:
        """Nothing to do."""

    def message(self, call: Call, data: bytes) -> None:
        """Sends, collects or answers."""
        frame = frame_of(data)
        if frame is not None:
            if self._readers[call.id].feed(frame):
                self._end(call)
            return
        params = dit_pb2.DenoiseRequest.FromString(data).start.params
        if params.prompt == "sink":
            self._readers[call.id] = BundleReader()
            return
        if params.prompt == "prepare":
            self._payload = torch.randint(0, 256, (params.steps, 1024, 1024), dtype=torch.uint8)
        if params.prompt == "source":
            call.send_tensors({"x": self._payload})
        self._end(call)

    def half_closed(self, call: Call) -> None:
        """Nothing to do."""

    def cancelled(self, call: Call) -> None:
        """Forgets the call."""
        self._readers.pop(call.id, None)

    def tick(self) -> bool:
        """All work is done on arrival."""
        return False

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def drain(self) -> None:
        """Nothing to do."""

    def _end(self, call: Call) -> None:
        self._readers.pop(call.id, None)
        call.send(USAGE)
        call.finish()


if __name__ == "__main__":
    run(TransportProgram)
