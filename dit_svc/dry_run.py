"""A dry run: one rank's part of a step on the meta device, where tensors have shapes and no bytes.

The model is built without weights and cut by the same `Partition`, the step goes through the same `Forward` as in
service; so what is counted is what a real rank does. A block like two that have run, on streams like those they had,
does what they did: it is counted and not run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dit_svc.forward import Forward
from dit_svc.idle_experts import ONE_EXPERT, pinned_bytes
from services.errors import StartupError
from services.families import load_family
from services.family import Block, DenoiseState, DitModel, DitPart, Tensors
from services.parallel.collectives import sent_bytes, sent_calls, window_bytes
from services.parallel.degrees import Degrees
from services.parallel.hsdp import PLACES, Shards, outside, plan_shards
from services.parallel.mesh import PlannedMesh
from services.parallel.partition import Partition
from services.parallel.pipeline import own_range
from services.request import ResolvedParams
from services.weights import ModelSource

# (what is counted, its kind) -> how much.
Counts = Counter[tuple[str, Any]]

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank does in one step of one request, all its guidance branches together.

    Attributes:
        passes: forwards.
        sent_bytes, sent_calls: by kind of collective, without HSDP's.
        matmul_flops, attention_flops: a multiplication and an addition are two.
        activation_bytes: of all tensors but weights that are alive at once in an eager forward, at the worst moment.
        window_bytes: of the windows through which ranks read each other's memory, where their GPUs can; those that hold
            shards of HSDP are weights.
        outside_calls: of the parts outside the blocks, in their order.
    """

    passes: int
    sent_bytes: Mapping[str, int]
    sent_calls: Mapping[str, int]
    matmul_flops: int
    attention_flops: int
    activation_bytes: int
    window_bytes: int
    outside_calls: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a rank's weights, without the places where HSDP makes blocks whole, and with them.

    `host` are those pinned in the host's memory.
    """

    held: int
    peak: int
    host: int = 0


class DryRun:
    """One rank's denoiser without weights.

    Args:
        source: a folder, of which only configs are read, or random weights.
        degrees: HSDP's are left out here, and asked for by methods.
        dtype: of the weights.
        branches: as in the engine's config.
        model: what the rank holds, without weights and for this dry run only: it remembers what it has run. Made where
            it is left out.

    Raises:
        StartupError: the model does not fit the degrees.
    """

    def __init__(
        self,
        source: ModelSource,
        degrees: Degrees,
        rank: int,
        dtype: torch.dtype,
        branches: str = "auto",
        model: DitModel | None = None,
    ) -> None:
        self.part = load_family(source.family).dit
        self._branches = branches
        # HSDP needs process groups; what it holds and sends is arithmetic.
        self._mesh = PlannedMesh(replace(degrees, hsdp_shard=1, hsdp_replicate=1), rank)
        partition = Partition(self.part.plan, self.part.blocks, self._mesh)
        self.model = model or self.part.load(replace(source.without_weights(), partition=partition), META, dtype)
        for attend in self.model.attention.values():
            attend.kernel, attend.across = _attention, None
        self._tally = Tally()
        self._forward = Forward(self.model, self._planned(), branches, self._mesh)
        pipeline = self._mesh["pipeline"]
        self._blocks: dict[str, list[Block]] = {}
        self._outside: dict[str, list[nn.Module]] = {}
        for name, module in self.model.modules.items():
            self._blocks[name] = list(own_range(self.part.blocks(module), pipeline.rank, pipeline.size))
            self._outside[name] = list(outside(module, self.part.blocks(module)))

    def weights(self, shards: int = 1) -> Weights:
        """What the rank holds with HSDP's `shards`; 1 shards nothing."""
        held = sum(_bytes(module) for module in self.model.modules.values())
        if shards == 1:
            return Weights(held, held)
        largest = 0
        for name in self.model.modules:
            blocks, parts = self._plans(name, shards)
            held -= sum(plan.whole - plan.held for plan in (*blocks, *parts))
            largest = max(largest, *(plan.gathered for plan in blocks))
        return Weights(held, held + PLACES * largest)

    def offloaded_weights(self) -> Weights:
        """What the rank holds with `engine.offload_experts`: of its experts the largest, and all of them on the host.

        Raises:
            StartupError: there is one expert only.
        """
        if len(self.model.modules) < 2:
            raise StartupError(ONE_EXPERT)
        largest = max(_bytes(module) for module in self.model.modules.values())
        return Weights(largest, largest, pinned_bytes(self.model))

    def gathered(self, shards: int, step: Step) -> tuple[int, int]:
        """What the rank sends in a step so that shards become whole: bytes, and collectives."""
        if shards == 1:
            return 0, 0
        # Of several experts one runs in a step, and they are alike.
        blocks, parts = self._plans(next(iter(self.model.modules)), shards)
        # Branches share a gathering where one rank runs all of them and all blocks (`Forward`).
        shared = self._branches == "auto" and self._mesh["cfg"].size * self._mesh["pipeline"].size == 1
        gatherings = 1 if shared else step.passes
        sent = gatherings * sum(plan.sent for plan in blocks)
        sent += sum(calls * plan.sent for calls, plan in zip(step.outside_calls, parts, strict=True))
        return sent, gatherings * len(blocks) + sum(step.outside_calls)

    def _plans(self, name: str, shards: int) -> tuple[list[Shards], list[Shards]]:
        blocks = [plan_shards(block.module, shards) for block in self._blocks[name]]
        return blocks, [plan_shards(part, shards) for part in self._outside[name]]

    def example(self, params: ResolvedParams, text_tokens: int) -> Tensors:
        """Random conditions as long as the model's text, or `text_tokens` where it may have any length."""
        return self.part.example_conditions(replace(self.model, device=CPU), params, text_tokens)

    def branches(self, params: ResolvedParams, conditions: Tensors) -> int:
        """Guidance branches of such a request's first step."""
        return len(self.part.branches(self.model, self._state(params, conditions)))

    def step(self, params: ResolvedParams, conditions: Tensors) -> Step:
        """The first step of a request that is alone; of those with the held expert, where it is one of several.

        Raises:
            InvalidRequest: conditions or parameters that the model does not take.
            StartupError: no step is one of the held expert.
        """
        state = self._state(params, conditions)
        while self.part.expert(self.model, state) not in self.model.modules:
            state.step += 1
            if state.done:
                raise StartupError(f"no step of such a request has the expert {', '.join(self.model.modules)}")
        parts = self._outside[self.part.expert(self.model, state)]
        tally, alive = self._tally, LiveBytes(self.model.modules.values())
        with torch.no_grad(), tally.counting(parts), alive:
            passes = self._forward.passes([state])
            for entering in passes:
                self._forward.beat(entering)
            while not self._forward.empty:
                self._forward.beat(None)
        flops = tally.of("flops")
        attention = sum(count for operator, count in flops.items() if operator in ATTENTION)
        calls = tally.of("outside")
        return Step(
            passes=len(passes),
            sent_bytes=tally.of("bytes"),
            sent_calls=tally.of("calls"),
            matmul_flops=sum(flops.values()) - attention,
            attention_flops=attention,
            activation_bytes=alive.peak,
            window_bytes=tally.window_bytes,
            outside_calls=tuple(calls.get(part, 0) for part in parts),
        )

    def _planned(self) -> DitPart:
        """The family's functions: states hold real numbers, which schedulers need, and batches go on without."""
        part, real = self.part, replace(self.model, device=CPU)
        return replace(
            part,
            collate=lambda _, rows: _to_meta(part.collate(real, rows)),
            blocks=lambda module: [replace(block, run=self._tally.once(block)) for block in part.blocks(module)],
        )

    def _state(self, params: ResolvedParams, conditions: Tensors) -> DenoiseState:
        return self.part.prepare(replace(self.model, device=CPU), "dry-run", params, conditions)


class Tally:
    """Counts of one step, by what is counted and its kind: bytes, calls, flops, and calls of parts outside blocks."""

    def __init__(self) -> None:
        self._counts: Counts = Counter()
        self._again: Counts = Counter()
        self._flops = FlopCounterMode(display=False, custom_mapping=RING_FLOPS)
        self._outside: Counter[nn.Module] = Counter()
        self._seen: dict[Any, list[Counts]] = {}
        self._windows: dict[tuple[str, str], int] = {}

    @property
    def window_bytes(self) -> int:
        """Of all windows so far: they stay for the next step."""
        return sum(self._windows.values())

    def of(self, what: str) -> dict[Any, int]:
        """Counts of the last step, by kind."""
        return {kind: count for (counted, kind), count in self._counts.items() if counted == what}

    @contextmanager
    def counting(self, parts: Sequence[nn.Module]) -> Iterator[None]:
        """Counts a step, and the calls of these parts in it."""
        hooks = [part.register_forward_pre_hook(lambda module, _: self._outside.update([module])) for part in parts]
        before = self._now()
        window_bytes.clear()
        window_bytes.update(self._windows)
        try:
            with self._flops:
                yield
                self._counts = self._now() - before
                self._windows = dict(window_bytes)
        finally:
            for hook in hooks:
                hook.remove()

    def once(self, block: Block) -> Callable[[Any], Any]:
        """The block's `run`; of a kind that has been seen, it counts and does not run.

        Two of a kind are run: the first holds no more than what was embedded, others their inputs besides.
        """
        kind = (type(block.module), *(weight.shape for weight in block.module.parameters()))

        def run(streams: Any) -> Any:
            key = (kind, *(tensor.shape for tensor in _tensors(streams)))
            seen = self._seen.setdefault(key, [])
            if len(seen) == 2:
                self._again.update(seen[1])
                return streams
            before = self._now()
            made = block.run(streams)
            seen.append(self._now() - before)
            return made

        return run

    def _now(self) -> Counts:
        counts = self._again.copy()
        sources: dict[str, Mapping[Any, int]] = {
            "bytes": sent_bytes,
            "calls": sent_calls,
            "flops": self._flops.get_flop_counts().get("Global", {}),
            "outside": self._outside,
        }
        for what, by_kind in sources.items():
            for kind, count in by_kind.items():
                counts[what, kind] += count
        return counts


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, for as long as anybody holds them; weights do not count."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        kept = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self._known = {tensor.untyped_storage()._cdata for tensor in kept}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _filling: torch.Tensor | None
) -> torch.Tensor:
    """Shapes and costs of a fused kernel: the meta device would take attention apart into its products."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mixed: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[0]
    return mixed.transpose(1, 2)


def _ring_flops(
    query: list[int], _key: Any, _value: Any, orders: list[int], *_others: Any, out_shape: Any = None
) -> int:
    """Each rank's queries [B, L, H, D] see the L keys of all ranks, of orders [n, B, L], in two products."""
    rows, tokens, heads, width = query
    return 4 * rows * heads * width * tokens * tokens * orders[0]


RING_FLOPS = {torch.ops.lightloom.ring_parts: _ring_flops}
ATTENTION = {torch.ops.lightloom.ring_parts, torch.ops.aten._scaled_dot_product_flash_attention}


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if isinstance(value, tuple):
        return tuple(_to_meta(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _to_meta(getattr(value, field.name)) for field in fields(value)})
    return value


def _tensors(streams: Any) -> Iterator[torch.Tensor]:
    for field in fields(streams):
        value = getattr(streams, field.name)
        yield from (item for item in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(item))


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
