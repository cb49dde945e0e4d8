"""A stage whose tensors or media are wrong, to test what its neighbours do. The prompt says how it lies.

    shape, dtype, name    tensors that the next stage cannot take
    nan                   values that are no numbers
    crc                   a flipped bit          huge    a header that announces 8 TiB
    cut                   a stream that ends too early
    more                  one bundle too many

`model.preset` of the config is the stage that it plays. A VAE lies in one way only: fewer bytes than announced.
"""

from __future__ import annotations

import torch

from benchmarks.sleeping_rank import LIMITS
from protos import dit_pb2, text_encoder_pb2, types_pb2, vae_pb2
from services.config import StageConfig
from services.rank_process import Call, run
from services.tensor_wire import chunk_message, frame_of, header_message, is_end
from services.tensors import bundle_frames

STAGES = {"text_encoder": types_pb2.STAGE_TEXT_ENCODER, "dit": types_pb2.STAGE_DIT, "vae": types_pb2.STAGE_VAE}
TEXT_WIDTH = 192
LATENT_SHAPE = (1, 256, 64)


class LyingProgram:
    """A RankProgram for three stages."""

    def __init__(self, config: StageConfig) -> None:
        self._stage = config.model.preset
        self._prompts: dict[int, str] = {}

    def describe(self) -> types_pb2.DescribeResponse:
        """As a replica of the demo model, but for the preview fit."""
        return types_pb2.DescribeResponse(
            stage=STAGES[self._stage], component_id=f"{self._stage}-lying", models=["demo"], limits=LIMITS
        )

    def opened(self, call: Call) -> None:
        """A new call."""

    def message(self, call: Call, data: bytes) -> None:
        """Lies as soon as the request is whole."""
        frame = None if self._stage == "text_encoder" else frame_of(data)
        if frame is None:
            self._prompts[call.id] = self._prompt(data)
        if self._stage == "text_encoder" or (frame is not None and is_end(frame)):
            {"text_encoder": self._encode, "dit": self._denoise, "vae": self._decode}[self._stage](call)
            del self._prompts[call.id]

    def _prompt(self, data: bytes) -> str:
        match self._stage:
            case "text_encoder":
                params = text_encoder_pb2.EncodeRequest.FromString(data).params
            case "dit":
                params = dit_pb2.DenoiseRequest.FromString(data).start.params
            case _:
                params = vae_pb2.DecodeRequest.FromString(data).start.params
        return params.prompt

    def _encode(self, call: Call) -> None:
        text = {"positive/text": torch.zeros(1, 7, TEXT_WIDTH), "negative/text": torch.zeros(1, 7, TEXT_WIDTH)}
        send_lies(call, self._prompts[call.id], text)
        call.send(text_encoder_pb2.EncodeResponse(usage=types_pb2.StageUsage()).SerializeToString())
        call.finish()

    def _denoise(self, call: Call) -> None:
        start = dit_pb2.BundleStart(kind=dit_pb2.BundleStart.KIND_LATENTS, step=1)
        call.send(dit_pb2.DenoiseResponse(step=dit_pb2.StepEvent(step=1, total=1)).SerializeToString())
        call.send(dit_pb2.DenoiseResponse(bundle=start).SerializeToString())
        send_lies(call, self._prompts[call.id], {"latents": torch.zeros(LATENT_SHAPE)})
        call.send(dit_pb2.DenoiseResponse(usage=types_pb2.StageUsage()).SerializeToString())
        call.finish()

    def _decode(self, call: Call) -> None:
        header = types_pb2.MediaHeader(mime="image/png", width=256, height=256, num_frames=1, nbytes=1000)
        call.send(vae_pb2.DecodeResponse(media=header).SerializeToString())
        call.send(vae_pb2.DecodeResponse(chunk=types_pb2.MediaChunk(data=b"\x89PNG")).SerializeToString())
        call.send(vae_pb2.DecodeResponse(usage=types_pb2.StageUsage()).SerializeToString())
        call.finish()

    def half_closed(self, call: Call) -> None:
        """Nothing more comes."""

    def cancelled(self, call: Call) -> None:
        """Forgets the call."""
        self._prompts.pop(call.id, None)

    def tick(self) -> bool:
        """Nothing waits."""
        return False

    def metrics(self) -> dict[str, float]:
        """Calls that wait for their tensors."""
        return {"jobs": float(len(self._prompts))}

    def drain(self) -> None:
        """Nothing runs."""


def send_lies(call: Call, lie: str, tensors: dict[str, torch.Tensor]) -> None:
    """Sends the tensors, spoilt in the way that `lie` names; an unknown lie is the truth."""
    first = next(iter(tensors))
    spoilt = {
        "shape": lambda: tensors | {first: tensors[first][..., :-1]},
        "dtype": lambda: tensors | {first: tensors[first].long()},
        "name": lambda: {f"other/{name}": tensor for name, tensor in tensors.items()},
        "nan": lambda: tensors | {first: tensors[first] + float("nan")},
    }
    messages = list(bundle_frames(spoilt.get(lie, lambda: tensors)()))
    if lie == "huge":
        shape = [2**20, 2**21]
        meta = types_pb2.TensorMeta(name=first, dtype=types_pb2.DTYPE_FLOAT32, shape=shape, nbytes=2**43)
        messages[0] = header_message(types_pb2.TensorHeader(tensors=[meta]))
    if lie == "crc":
        messages[1] = chunk_message(0, 0, b"\x01" + bytes(tensors[first].nbytes - 1))
    for message in messages[:-1] if lie == "cut" else messages * (2 if lie == "more" else 1):
        call.send(message)


if __name__ == "__main__":
    run(LyingProgram)
