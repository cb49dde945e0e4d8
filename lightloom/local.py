"""A model in this process, without a cluster: for scripts and notebooks.

    with Local(model="demo/checkpoints/qwen_image", width=256, height=256, steps=20) as model:
        model.generate("a green star on a black background", seed=7).save("star.png")

The engines are those of the services, so batches form here too: `generate_many`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from dit_svc.engine import DenoiseJob, Failed, Finished
from dit_svc.loading import open_engine as open_dit
from lightloom.client import Result
from services.clip_writer import ClipWriter
from services.config import EngineSection, ModelSection, ServiceSection, StageConfig
from services.describe import limits_of, open_model
from services.errors import NotEnabled, StartupError
from services.family import Tensors
from services.media import check_mask, first_picture
from services.request import MAX_SEED, ResolvedParams, open_params, resolve
from text_encoder_svc.engine import open_engine as open_text
from vae_svc.engine import VaeChunk, VaeJob, encode_alone
from vae_svc.loading import open_engine as open_vae


class Local:
    """Text encoder, denoiser and VAE of one model. Use it as a context manager.

    Args:
        model: a diffusers-format folder, or `random:SEED` with `family` and `preset`.
        features: options by feature, as in a config's `[features]`.
        max_batch: requests that share a forward.
        defaults: parameters for requests that do not set them (width, height, steps, ...); without, the family's. A
            served model's own are in its cluster file.

    Raises:
        StartupError: the weights cannot be served.
    """

    def __init__(
        self,
        model: str,
        *,
        family: str = "",
        preset: str = "",
        device: str = "auto",
        features: Mapping[str, Mapping[str, Any]] | None = None,
        max_batch: int = 8,
        **defaults: Any,
    ) -> None:
        self._config = StageConfig(
            service=ServiceSection(port=0),
            model=ModelSection(name="local", source=model, family=family, preset=preset, device=device),
            engine=EngineSection(max_batch=max_batch),
            features=features or {},
        )
        self._defaults = defaults
        self._opened = False

    def __enter__(self) -> Local:
        with torch.inference_mode():
            self._limits = limits_of(self._config, open_model(self._config.model))
            self._text = open_text(replace(self._config, features={}))
            self._dit, _ = open_dit(self._config)
            self._vae = open_vae(replace(self._config, features={}))
        self._opened = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._text, self._dit, self._vae
        self._opened = False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate(self, prompt: str, **options: Any) -> Result:
        """One picture or clip; `options` are fields of GenerationParams."""
        [result] = self.generate_many([{"prompt": prompt, **options}])
        return result

    @torch.inference_mode()
    def generate_many(self, requests: Sequence[Mapping[str, Any]]) -> list[Result]:
        """Several at once, batched; results in the order of the requests.

        Raises:
            ServiceError: what one of them failed with.
        """
        if not self._opened:
            raise StartupError("use Local as a context manager: with Local(...) as model")
        jobs = {str(index): self._resolve(request) for index, request in enumerate(requests)}
        busy: dict[str, dict[str, float]] = {name: {} for name in jobs}
        try:
            for name, conditions in self._encode(jobs, busy).items():
                self._dit.admit(DenoiseJob(name, jobs[name], conditions))
            media = self._decode(jobs, self._denoise(busy), busy)
        finally:
            # After a failure, the others must not stay in the engines; after success, none is there.
            for name in jobs:
                self._text.abort(name)
                self._dit.abort(name)
                self._vae.abort(name)
        return [
            Result(
                request_id=name,
                mime=media[name][0],
                width=params.width,
                height=params.height,
                seed=params.seed,
                busy_s=busy[name],
                data=media[name][1],
                num_frames=params.num_frames,
                fps=params.fps,
            )
            for name, params in jobs.items()
        ]

    def _resolve(self, request: Mapping[str, Any]) -> ResolvedParams:
        params = open_params(**{"model": "local", **self._defaults, **request})
        picture = first_picture(params.inputs[: self._limits.most_inputs])
        if params.enable_frame_interpolation:
            raise NotEnabled("frames are interpolated in a cluster only", param="enable_frame_interpolation")
        check_mask(params.inputs[: self._limits.most_inputs], self._limits)
        return resolve(params, self._limits, seed=secrets.randbelow(MAX_SEED), picture=picture)

    def _encode(self, jobs: Mapping[str, ResolvedParams], busy: dict[str, dict[str, float]]) -> dict[str, Tensors]:
        conditions: dict[str, Tensors] = {}
        for name, params in jobs.items():
            self._text.submit(name, params)
        while self._text.busy:
            for encoded in self._text.tick():
                if encoded.error is not None:
                    raise encoded.error
                conditions[encoded.request_id] = dict(encoded.tensors)
                busy[encoded.request_id]["text_encoder"] = encoded.busy_s
        for name, params in jobs.items():
            if params.inputs:
                conditions[name] |= encode_alone(self._vae, VaeJob(name, params))
        return conditions

    def _denoise(self, busy: dict[str, dict[str, float]]) -> dict[str, Tensors]:
        latents: dict[str, Tensors] = {}
        while self._dit.busy:
            for event in self._dit.tick():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    latents[event.request_id] = event.tensors
                    busy[event.request_id]["dit"] = event.busy_s
        return latents

    def _decode(
        self, jobs: Mapping[str, ResolvedParams], latents: Mapping[str, Tensors], busy: dict[str, dict[str, float]]
    ) -> dict[str, tuple[str, bytes]]:
        media: dict[str, tuple[str, bytes]] = {}
        writers: dict[str, ClipWriter] = {}
        for name, tensors in latents.items():
            self._vae.submit(VaeJob(name, jobs[name], tensors))
        try:
            while self._vae.busy:
                for event in self._vae.tick():
                    name, params = event.job.request_id, event.job.params
                    if isinstance(event, VaeChunk):
                        if name not in writers:
                            num_frames = 0 if self._limits.output == "audio" else params.num_frames
                            options = (params.output_format, params.quality, params.fps, num_frames)
                            writers[name] = ClipWriter(*options)
                        writers[name].add(event.frames, event.sound)
                    elif event.error is not None:
                        raise event.error
                    else:
                        media[name] = writers[name].finish()
                        busy[name]["vae"] = event.busy_s
        finally:
            for writer in writers.values():
                writer.close()
        return media
