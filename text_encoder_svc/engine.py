"""The text encoder's engine: prompts of many requests in one batch, and a cache of embeddings by content."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from services.config import StageConfig
from services.describe import limits_of, open_model, placement
from services.errors import ServiceError
from services.failures import failure_of
from services.families import load_family
from services.family import Tensors, TextInput, TextPart
from services.media import decode_image
from services.parallel.degrees import Degrees
from services.parallel.encoder import EncoderPartition
from services.parallel.mesh import Mesh, PlannedMesh
from services.request import ResolvedParams
from services.weights import ModelSource

WARMUP_SIDE_PX = 256


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request's embeddings, "<branch>/<name>" with batch dimension 1, or the error that ended it.

    `start_unix_ns` is when it came; `busy_s` leaves out the time that it waited for others.
    """

    request_id: str
    tensors: Tensors
    busy_s: float
    cached: bool
    start_unix_ns: int
    error: ServiceError | None = None


class EmbeddingCache:
    """The least recently used embeddings go when `max_bytes` are passed."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, Tensors] = OrderedDict()
        self.nbytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: str) -> Tensors | None:
        """The entry, now the most recently used one."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def put(self, key: str, tensors: Tensors) -> None:
        """Keeps an entry, unless it is larger than the whole cache."""
        size = _nbytes(tensors)
        if size > self._max_bytes or key in self._entries:
            return
        self._entries[key] = tensors
        self.nbytes += size
        while self.nbytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.nbytes -= _nbytes(oldest)


@dataclass(frozen=True, slots=True)
class _Job:
    request_id: str
    inputs: dict[str, TextInput]
    start_unix_ns: int
    prepared_s: float


class TextEngine:
    """Requests wait in `submit` order; a tick encodes up to `max_batch` prompts that the cache does not have."""

    def __init__(self, part: TextPart, model: object, max_batch: int, cache_bytes: int, *, single: bool = True) -> None:
        self._part = part
        self._model = model
        self._max_batch = max_batch
        self._single = single
        self._cache = EmbeddingCache(cache_bytes)
        self._waiting: deque[_Job] = deque()

    @property
    def busy(self) -> bool:
        """Whether requests wait."""
        return bool(self._waiting)

    def submit(self, request_id: str, params: ResolvedParams) -> None:
        """Queues a request. The negative prompt is encoded only where the family says that it counts.

        Raises:
            InvalidRequest: an input picture cannot be decoded.
        """
        start_ns, start_s = time.time_ns(), time.perf_counter()
        sees = self._part.sees(self._model)
        images = tuple(decode_image(media) for role in sees for media in params.inputs if media.role == role)
        texts = {"positive": params.prompt, "negative": params.negative_prompt}
        inputs = {branch: TextInput(texts[branch], images) for branch in self._part.branches(params)}
        self._waiting.append(_Job(request_id, inputs, start_ns, time.perf_counter() - start_s))

    def abort(self, request_id: str) -> None:
        """Forgets a request that waits."""
        self._waiting = deque(job for job in self._waiting if job.request_id != request_id)

    def tick(self) -> list[Encoded]:
        """Encodes one batch; returns the requests that are done."""
        start_s = time.perf_counter()
        jobs, missing, found = self._take()
        errors = self._encode(missing, found) if missing else {}
        busy_s = time.perf_counter() - start_s
        return [self._finish(job, missing, found, job.prepared_s + busy_s, errors) for job in jobs]

    def _encode(self, missing: dict[str, TextInput], found: dict[str, Tensors]) -> dict[str, ServiceError]:
        """Adds to `found` what can be encoded; returns why the rest cannot."""
        try:
            encoded = self._part.encode(self._model, list(missing.values()))
        except (ServiceError, torch.OutOfMemoryError) as error:
            # On one rank of several, the others are past this point: the group ends and starts anew.
            if not (self._single or isinstance(error, ServiceError)):
                raise
            # The retries come after this block: until its end the error holds what the forward had in memory.
            failure = failure_of(error)
        else:
            for key, tensors in zip(missing, encoded, strict=True):
                found[key] = {name: tensor[None].cpu() for name, tensor in tensors.items()}
                self._cache.put(key, found[key])
            return {}
        if len(missing) == 1:
            return dict.fromkeys(missing, failure)
        # Alone, each fails for its own reasons only.
        return {name: why for key, item in missing.items() for name, why in self._encode({key: item}, found).items()}

    def _finish(
        self,
        job: _Job,
        missing: dict[str, TextInput],
        found: dict[str, Tensors],
        busy_s: float,
        errors: dict[str, ServiceError],
    ) -> Encoded:
        keys = {branch: _key(item) for branch, item in job.inputs.items()}
        for key in keys.values():
            if key in errors:
                return Encoded(job.request_id, {}, busy_s, False, job.start_unix_ns, errors[key])
        tensors = {f"{branch}/{name}": tensor for branch, key in keys.items() for name, tensor in found[key].items()}
        cached = not any(key in missing for key in keys.values())
        return Encoded(job.request_id, tensors, busy_s, cached, job.start_unix_ns)

    def _take(self) -> tuple[list[_Job], dict[str, TextInput], dict[str, Tensors]]:
        jobs: list[_Job] = []
        missing: dict[str, TextInput] = {}
        found: dict[str, Tensors] = {}
        while self._waiting and len(missing) < self._max_batch:
            job = self._waiting.popleft()
            jobs.append(job)
            for item in job.inputs.values():
                key = _key(item)
                if key in found or key in missing:
                    continue
                entry = self._cache.get(key)
                if entry is None:
                    missing[key] = item
                else:
                    found[key] = entry
        return jobs, missing, found

    def warm_up(self, pictures: int) -> None:
        """One forward of one prompt and one of two.

        Args:
            pictures: that the model wants with each prompt.
        """
        images = (np.zeros((1, WARMUP_SIDE_PX, WARMUP_SIDE_PX, 3), np.uint8),) * pictures
        for count in (1, 2):
            self._part.encode(self._model, [TextInput("warm up " * (index + 1), images) for index in range(count)])

    def metrics(self) -> dict[str, float]:
        """Queue and cache."""
        return {
            "text_waiting": len(self._waiting),
            "text_cache_bytes": self._cache.nbytes,
            "text_cache_hits_total": self._cache.hits,
            "text_cache_misses_total": self._cache.misses,
        }


def open_engine(config: StageConfig, mesh: Mesh | None = None) -> TextEngine:
    """Loads the text encoder that a config names.

    Args:
        mesh: of the group, on a rank of several.

    Raises:
        StartupError: its weights cannot be served, or do not fit the number of ranks.
    """
    source = open_model(config.model)
    part = load_family(source.family).text
    if mesh is not None:
        source = _cut(source, part, mesh)
    model = part.load(source, *placement(config.model))
    limits = config.engine
    engine = TextEngine(part, model, limits.max_batch, limits.cache_bytes, single=mesh is None)
    if config.engine.warmup:
        wanted = limits_of(config, source)
        needed = ["image"] * wanted.min_inputs + list(wanted.needed_roles)
        engine.warm_up(sum(role in part.sees(model) for role in needed))
    return engine


def check_layout(config: StageConfig) -> None:
    """Whether the text encoder that a config names can be spread over ranks as it says. No weights are needed.

    Raises:
        StartupError: it cannot, with numbers that would do.
    """
    source = open_model(config.model)
    part = load_family(source.family).text
    mesh = PlannedMesh(Degrees.of(config.parallel), 0)
    part.load(_cut(source.without_weights(), part, mesh), torch.device("meta"), torch.float32)


def _cut(source: ModelSource, part: TextPart, mesh: Mesh) -> ModelSource:
    """The source of what this rank holds."""
    encoders = {subfolder: EncoderPartition(plan, mesh) for subfolder, plan in part.plans.items()}
    return replace(source, encoders=encoders)


def _key(item: TextInput) -> str:
    digest = hashlib.sha256(item.text.encode())
    for image in item.images:
        digest.update(str(image.shape).encode() + image.tobytes())
    return digest.hexdigest()


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
