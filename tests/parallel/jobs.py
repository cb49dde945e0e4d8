"""What the ranks of the pool run: the denoiser over a mesh, as its rank processes run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from dit_svc.engine import Checkpointed, DenoiseJob, DitEngine, Event, Finished, Previewed
from dit_svc.loading import open_engine
from services.config import EngineSection, ModelSection, ParallelSection, ServiceSection, StageConfig
from services.families import load_family
from services.family import Tensors
from services.parallel.collectives import sent_bytes
from services.parallel.degrees import Degrees
from services.parallel.hsdp import ShardedWeights
from services.parallel.mesh import Axis, Mesh
from services.parallel.peer_memory import connect
from services.parallel.sequence import own_piece
from services.parallel.tensor_sequence import Layout
from services.parallel.vae_patch import PatchCodec
from services.parallel.vae_tiles import TileCodec
from services.request import ResolvedParams
from services.tensors import Bundle
from services.vae_attention import attend_by_products
from services.vae_on_gpu import speed_up
from services.weights import open_source
from tests.parallel.vaes import KINDS, vae_model
from text_encoder_svc.engine import open_engine as open_text_engine


@dataclass(frozen=True)
class Script:
    """What happens on the ranks.

    Attributes:
        jobs: one is admitted every tick.
        abort: job to abort after that many ticks, by id.
        checkpoint: job that is stopped with a checkpoint after that many ticks, by id.
    """

    jobs: Sequence[DenoiseJob]
    abort: dict[str, int] = field(default_factory=dict)
    checkpoint: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What came of it on one rank."""

    finished: dict[str, Tensors]
    checkpoints: dict[str, Bundle]
    previews: dict[str, list[bytes]]
    sent: dict[str, int]
    weight_bytes: int
    live_tensors: float
    ticks: int


def config_of(folder: str, parallel: ParallelSection, engine: dict) -> StageConfig:
    return StageConfig(
        service=ServiceSection(port=0),
        model=ModelSection(name="m", source=folder, device="cpu", dtype="float32"),
        parallel=parallel,
        engine=EngineSection(warmup=False, **engine),
    )


def denoise_long(rank: int, world: int, folder: str, parallel: dict[str, int], engine: dict, script: Script) -> Report:
    """`denoise`, where every sequence counts as long."""
    with patch("dit_svc.forward.ROWS_UP_TO_TOKENS", 0):
        return denoise(rank, world, folder, parallel, engine, script)


def denoise(rank: int, world: int, folder: str, parallel: dict[str, int], engine: dict, script: Script) -> Report:
    """Loads the folder's denoiser as the degrees say, runs the script to its end."""
    section = ParallelSection(**parallel)
    mesh = Mesh(Degrees.of(section), rank, "cpu")
    assert mesh.degrees.world == world
    with noted_shards() as shards:
        dit, _ = open_engine(config_of(folder, section, engine), mesh)
    sent_bytes.clear()
    events: list[Event] = []
    waiting, ticks = list(script.jobs), 0
    while waiting or dit.busy:
        if waiting:
            dit.admit(waiting.pop(0))
        for request_id, moment in script.abort.items():
            if moment == ticks:
                dit.abort(request_id)
        for request_id, moment in script.checkpoint.items():
            if moment == ticks:
                dit.request_checkpoint(request_id, stop=True)
        events += dit.tick()
        ticks += 1
    return Report(
        finished={event.request_id: event.tensors for event in events if isinstance(event, Finished)},
        checkpoints={
            event.request_id: Bundle(dict(event.tensors), event.attributes)
            for event in events
            if isinstance(event, Checkpointed)
        },
        previews=previews_of(events),
        sent=dict(sent_bytes),
        weight_bytes=weight_bytes(dit, shards),
        live_tensors=dit.metrics()["dit_live_tensors"],
        ticks=ticks,
    )


def denoise_each(
    rank: int, world: int, folder: str, runs: Sequence[tuple[dict[str, int], Script]], engine: dict
) -> list[Report]:
    """One script after the other, each in its layout."""
    return [denoise(rank, world, folder, parallel, engine, script) for parallel, script in runs]


def previews_of(events: Sequence[Event]) -> dict[str, list[bytes]]:
    """Encoded previews by request, in their order."""
    previews: dict[str, list[bytes]] = {}
    for event in events:
        if isinstance(event, Previewed):
            previews.setdefault(event.request_id, []).append(event.media.data)
    return previews


@contextmanager
def noted_shards() -> Iterator[list[ShardedWeights]]:
    """The shards that are made inside."""
    shards: list[ShardedWeights] = []

    def make(*arguments) -> ShardedWeights:
        shards.append(ShardedWeights(*arguments))
        return shards[-1]

    with patch("services.parallel.hsdp.ShardedWeights", make):
        yield shards


def weight_bytes(dit: DitEngine, shards: Sequence[ShardedWeights]) -> int:
    """Of what is on this rank between two forwards, without the places of whole blocks."""
    sharded = {id(weight) for shard in shards for weight in shard._weights}
    weights = [weight for module in dit.model.modules.values() for weight in module.parameters()]
    alone = [weight for weight in weights if id(weight) not in sharded]
    return sum(tensor.nbytes for tensor in (*alone, *(shard.held for shard in shards)))


def places_bytes(shards: Sequence[ShardedWeights]) -> int:
    """Of all places where weights are whole now."""
    storages = [shard._place.untyped_storage() for shard in shards if hasattr(shard, "_place")]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def gathered_bytes(rank: int, world: int, folder: str, parallel: dict[str, int], script: Script) -> list[int]:
    """Bytes of memory where weights are whole, whenever a block runs."""
    section = ParallelSection(**parallel)
    with noted_shards() as shards:
        dit, _ = open_engine(config_of(folder, section, {}), Mesh(Degrees.of(section), rank, "cpu"))
    plan = load_family(open_source(folder).family).dit.plan
    modules = [module for transformer in dit.model.modules.values() for module in transformer.modules()]
    seen: list[int] = []

    def watched(forward):
        def watch(*arguments, **options):
            seen.append(places_bytes(shards))
            return forward(*arguments, **options)

        return watch

    for block in modules:
        if isinstance(block, plan.block_classes):
            block.forward = watched(block.forward)
    for job in script.jobs:
        dit.admit(job)
    while dit.busy:
        dit.tick()
    return seen


@dataclass
class Fields:
    """Streams of two fields [B, S, 2]."""

    text: torch.Tensor
    hidden: torch.Tensor


def gather_and_scatter(
    rank: int, world: int, fields: tuple[str, ...], lengths: Sequence[tuple[int, int]], rows: int
) -> list[tuple[torch.Tensor, ...]]:
    """For each lengths of text and hidden: tokens gathered, what they must be, tokens scattered, own tokens."""
    axis = Mesh(Degrees(tensor=world), rank, "cpu")["tensor"]
    layout, results = Layout(fields, axis), []
    for text, hidden in lengths:
        streams = Fields(*(torch.arange(rows * n * 2.0).view(rows, n, 2) + 100 * n for n in (text, hidden)))
        layout.fit(streams)
        parts = [getattr(streams, field) for field in fields]
        pieces = [own_piece(part, 1, axis) for part in parts]
        whole = torch.cat(parts, dim=1)
        scattered = layout.scatter(whole).split([piece.shape[1] for piece in pieces], dim=1)
        # What else a piece has is filling, which holds anything.
        shares = [-(-part.shape[1] // world) for part in parts]
        real = [max(0, min(share, part.shape[1] - rank * share)) for part, share in zip(parts, shares, strict=True)]
        results.append(
            (
                layout.gather(torch.cat(pieces, dim=1)),
                whole,
                torch.cat([part[:, :count] for part, count in zip(scattered, real, strict=True)], dim=1),
                torch.cat([piece[:, :count] for piece, count in zip(pieces, real, strict=True)], dim=1),
            )
        )
    return results


@dataclass(frozen=True)
class Prompts:
    """What an encoder of text gets: requests in their order, those aborted before the first batch, and requests after.

    Attributes:
        later: submitted when all others are done, by id.
    """

    requests: dict[str, ResolvedParams]
    aborted: tuple[str, ...] = ()
    later: dict[str, ResolvedParams] = field(default_factory=dict)


@dataclass(frozen=True)
class TextReport:
    """What came of it on one rank; `cached` names requests that the cache had."""

    tensors: dict[str, Tensors]
    cached: set[str]
    weight_bytes: int
    metrics: dict[str, float]


def encode(rank: int, world: int, folder: str, prompts: Prompts) -> TextReport:
    """Loads the folder's text encoders over the ranks and encodes, at most two prompts a batch."""
    section = ParallelSection(tensor_parallel_size=world)
    return encode_all(config_of(folder, section, {"max_batch": 2}), Mesh(Degrees.of(section), rank, "cpu"), prompts)


def encode_all(config: StageConfig, mesh: Mesh | None, prompts: Prompts) -> TextReport:
    """The same on a mesh, or on one rank without."""
    engine, done = open_text_engine(config, mesh), []
    for submitted in (prompts.requests, prompts.later):
        for request_id, params in submitted.items():
            engine.submit(request_id, params)
        for request_id in prompts.aborted:
            engine.abort(request_id)
        while engine.busy:
            done += engine.tick()
    return TextReport(
        tensors={encoded.request_id: encoded.tensors for encoded in done},
        cached={encoded.request_id for encoded in done if encoded.cached},
        weight_bytes=sum(map(bytes_of, modules_in(engine._model))),
        metrics=engine.metrics(),
    )


def modules_in(value: object) -> list[torch.nn.Module]:
    """The encoders in a family's text model."""
    if isinstance(value, torch.nn.Module):
        return [value]
    inside = [getattr(value, item.name) for item in fields(value)] if is_dataclass(value) else value
    return [module for item in inside for module in modules_in(item)] if isinstance(inside, list | tuple) else []


def bytes_of(module: torch.nn.Module) -> int:
    """Of its weights; those that are tied count once."""
    return sum(weight.nbytes for weight in module.parameters())


@dataclass(frozen=True)
class VaeReport:
    """What a rank's VAE made of latents (chunks of frames each) and of pixels, and what it sent."""

    decoded: list[list[torch.Tensor]]
    encoded: list[torch.Tensor]
    sent: dict[str, int]


def share_vae(
    rank: int,
    world: int,
    kind: str,
    tile_px: int,
    latents: Sequence[torch.Tensor],
    pixels: Sequence[torch.Tensor],
    fused: bool = False,  # noqa: FBT001, FBT002
) -> VaeReport:
    """Decodes and encodes over the ranks, exactly or in tiles; one rank alone has no others to share with."""
    axis = Mesh(Degrees(patch=world), rank, "cpu")["patch"] if world > 1 else None
    return shared(kind, axis, tile_px, latents, pixels, fused=fused)


def shared(
    kind: str,
    axis: Axis | None,
    tile_px: int,
    latents: Sequence[torch.Tensor],
    pixels: Sequence[torch.Tensor],
    *,
    fused: bool = False,
) -> VaeReport:
    """The same on a rank's axis, or on one rank without; `fused`: its layers as GPUs have them."""
    model, about = vae_model(kind), KINDS[kind]
    codec = model.codec
    if fused:
        attend_by_products(model.module)
    if tile_px:
        codec = TileCodec(codec, tile_px, about.compression, axis)
    elif axis is not None:
        codec = PatchCodec(model, about.plan, about.compression, axis)
    if fused:
        speed_up(model.module)
    sent_bytes.clear()
    decoded = [list(codec.decode(each)) for each in latents]
    return VaeReport(decoded, [codec.encode(each) for each in pixels], dict(sent_bytes))


@dataclass(frozen=True)
class Gpus:
    """GPUs as ranks find them.

    Attributes:
        apart: ranks whose GPUs reach no other one's memory; hidden: whose process does not see the others'.
        empty: what the driver says to a rank that asks for memory; rendezvous: to one that shares it.
    """

    apart: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    empty: dict[int, str] = field(default_factory=dict)
    rendezvous: dict[int, str] = field(default_factory=dict)


def connected(rank: int, world: int, gpus: Gpus) -> tuple[str, int]:
    """What `connect` says to a rank: "peers", "none" or an error; and how many windows it asked memory for."""
    asked = []

    def refuse(refusals: dict[int, str]) -> torch.Tensor:
        if rank in refusals:
            raise RuntimeError(f"CUDA driver error: {refusals[rank]}")
        return torch.empty(0)

    def empty(size: int, **_: object) -> torch.Tensor:
        asked.append(size)
        return refuse(gpus.empty)

    def rendezvous(_: torch.Tensor, group: str) -> torch.Tensor:
        made = refuse(gpus.rendezvous)
        dist.barrier(group=dist.distributed_c10d._resolve_process_group(group))
        return made

    seen = [rank] if rank in gpus.hidden else list(range(world))
    patches = {
        "torch.cuda.current_device": lambda: seen.index(rank),
        "torch.cuda.device_count": lambda: len(seen),
        "torch.cuda.get_device_properties": lambda index: SimpleNamespace(uuid=f"GPU-{seen[index]}"),
        "torch.cuda.can_device_access_peer": lambda mine, other: mine != other and rank not in gpus.apart,
        "torch.cuda.empty_cache": lambda: None,
        "torch.distributed._symmetric_memory.empty": empty,
        "torch.distributed._symmetric_memory.rendezvous": rendezvous,
        "services.parallel.peer_memory.PeerMemory": lambda *_: "peers",
    }
    with ExitStack() as stack:
        for name, stub in patches.items():
            stack.enter_context(patch(name, stub))
        try:
            return str(connect(dist.new_group(list(range(world)))) or "none"), len(asked)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}", len(asked)
