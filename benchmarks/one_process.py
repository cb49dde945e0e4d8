"""One process that holds a whole model, for `benchmarks.split`: one request after the other, or many in one engine.

A child process: reads a line `{"clients": N, "requests": M}`, makes M pictures, writes the seconds they took. One
client is `lightloom.Local`; more share the batches of the same three engines, each asking again as soon as it has its
picture.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.load import Work, prompt
from dit_svc.engine import DenoiseJob, Failed, Finished
from dit_svc.loading import open_engine as open_dit
from lightloom.local import Local
from services.clip_writer import encode_frames
from services.config import EngineSection, ModelSection, ServiceSection, StageConfig
from services.describe import limits_of, open_model
from services.request import GenerationParams, ResolvedParams, resolve
from text_encoder_svc.engine import open_engine as open_text
from vae_svc.engine import VaeChunk, VaeJob
from vae_svc.loading import open_engine as open_vae


class Engines:
    """Text encoder, denoiser and VAE under a closed loop of clients, all on this thread."""

    def __init__(self, source: str, work: Work, max_batch: int) -> None:
        config = StageConfig(
            service=ServiceSection(port=0),
            model=ModelSection(name=work.model, source=source),
            engine=EngineSection(max_batch=max_batch),
        )
        self._work = work
        self._limits = limits_of(config, open_model(config.model))
        self._text, (self._dit, _), self._vae = open_text(config), open_dit(config), open_vae(config)
        self._jobs: dict[str, ResolvedParams] = {}

    def run(self, clients: int, requests: int) -> None:
        """Makes `requests` pictures, `clients` at a time."""
        numbers = iter(range(requests))
        for _ in range(clients):
            self._ask(numbers)
        while self._jobs:
            self._encode()
            self._denoise()
            self._decode(numbers)

    def _ask(self, numbers: Iterator[int]) -> None:
        number = next(numbers, None)
        if number is None:
            return
        work = self._work
        params = GenerationParams(
            model=work.model,
            prompt=prompt(number),
            width=work.size_px,
            height=work.size_px,
            steps=work.steps,
            guidance=work.guidance,
        )
        self._jobs[str(number)] = resolve(params, self._limits, seed=number)
        self._text.submit(str(number), self._jobs[str(number)])

    def _encode(self) -> None:
        for encoded in self._text.tick() if self._text.busy else ():
            if encoded.error is not None:
                raise encoded.error
            job = DenoiseJob(encoded.request_id, self._jobs[encoded.request_id], dict(encoded.tensors))
            self._dit.admit(job)

    def _denoise(self) -> None:
        for event in self._dit.tick() if self._dit.busy else ():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                self._vae.submit(VaeJob(event.request_id, self._jobs[event.request_id], event.tensors))

    def _decode(self, numbers: Iterator[int]) -> None:
        for event in self._vae.tick():
            params = event.job.params
            if isinstance(event, VaeChunk):
                encode_frames(event.frames, params.output_format, params.quality, params.fps)
                continue
            if event.error is not None:
                raise event.error
            del self._jobs[event.job.request_id]
            self._ask(numbers)


def main() -> None:
    """Serves lines until there are no more."""
    settings = json.loads(sys.argv[1])
    source, max_batch, work = settings["source"], settings["max_batch"], Work(**settings["work"])
    sizes: dict[str, Any] = {
        "width": work.size_px,
        "height": work.size_px,
        "steps": work.steps,
        "guidance": work.guidance,
    }
    with torch.inference_mode(), Local(model=source, max_batch=max_batch, **sizes) as local:
        engines = Engines(source, work, max_batch)
        print("ready", flush=True)
        for line in sys.stdin:
            ask = json.loads(line)
            start_s = time.perf_counter()
            if ask["clients"] == 1:
                for number in range(ask["requests"]):
                    local.generate(prompt(number), seed=number)
            else:
                engines.run(ask["clients"], ask["requests"])
            print(time.perf_counter() - start_s, flush=True)


if __name__ == "__main__":
    main()
