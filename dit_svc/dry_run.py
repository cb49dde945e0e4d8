"""A dry run: one rank's part of a step on the meta device, where tensors have shapes and no bytes.

The model is built without weights and cut by the same `Partition`, the step goes through the same `Forward` as in
service; so what is counted is what a real rank does.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dit_svc.forward import Forward
from services.families import load_family
from services.family import Block, DenoiseState, DitModel, DitPart, Tensors
from services.parallel.collectives import sent_bytes, sent_calls
from services.parallel.degrees import Degrees
from services.parallel.hsdp import Shards, outside, plan_shards
from services.parallel.mesh import PlannedMesh
from services.parallel.partition import Partition
from services.parallel.pipeline import own_range
from services.request import ResolvedParams
from services.weights import ModelSource

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank does in one step of one request, all its guidance branches together.

    Attributes:
        passes: forwards.
        sent_bytes, sent_calls: by kind of collective, without HSDP's.
        matmul_flops, attention_flops: a multiplication and an addition are two.
        activation_bytes: of all tensors but weights that are alive at once in an eager forward, at the worst moment.
        outside_calls: of the parts outside the blocks, in their order.
    """

    passes: int
    sent_bytes: Mapping[str, int]
    sent_calls: Mapping[str, int]
    matmul_flops: int
    attention_flops: int
    activation_bytes: int
    outside_calls: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a rank's weights, between two forwards and while two blocks are whole."""

    held: int
    peak: int


class DryRun:
    """One rank's denoiser without weights.

    Args:
        source: a folder, of which only configs are read, or random weights.
        degrees: HSDP's are left out here, and asked for by methods.
        dtype: of the weights.
        branches: as in the engine's config.

    Raises:
        StartupError: the model does not fit the degrees.
    """

    def __init__(
        self, source: ModelSource, degrees: Degrees, rank: int, dtype: torch.dtype, branches: str = "auto"
    ) -> None:
        self.part = load_family(source.family).dit
        # FSDP needs process groups; what it holds and sends is arithmetic.
        self._mesh = PlannedMesh(replace(degrees, hsdp_shard=1, hsdp_replicate=1), rank)
        partition = Partition(self.part.plan, self.part.blocks, self._mesh)
        self.model = self.part.load(replace(source.without_weights(), partition=partition), META, dtype)
        for attend in self.model.attention.values():
            attend.kernel = _attention
        self._forward = Forward(self.model, _collating_on_meta(self.part, self.model), branches, self._mesh)
        pipeline = self._mesh["pipeline"]
        self._blocks: dict[str, list[Block]] = {}
        self._outside: dict[str, list[nn.Module]] = {}
        for name, module in self.model.modules.items():
            self._blocks[name] = list(own_range(self.part.blocks(module), pipeline.rank, pipeline.size))
            self._outside[name] = list(outside(module, self.part.blocks(module)))

    def weights(self, shards: int = 1) -> Weights:
        """What the rank holds with HSDP's `shards`; 1 shards nothing."""
        held = sum(_bytes(module) for module in self.model.modules.values())
        gathered = 0
        for name in self.model.modules:
            blocks, parts = self._plans(name, shards)
            held -= sum(plan.whole - plan.held for plan in (*blocks, *parts))
            pairs = zip(blocks, [*blocks[1:], Shards()], strict=True)
            gathered = max(gathered, *(block.gathered + following.gathered for block, following in pairs))
        return Weights(held, held + (gathered if shards > 1 else 0))

    def gathered(self, shards: int, step: Step) -> tuple[int, int]:
        """What the rank sends in a step so that shards become whole: bytes, and collectives."""
        if shards == 1:
            return 0, 0
        # Of several experts one runs in a step, and they are alike.
        blocks, parts = self._plans(next(iter(self.model.modules)), shards)
        sent = step.passes * sum(plan.sent for plan in blocks)
        sent += sum(calls * plan.sent for calls, plan in zip(step.outside_calls, parts, strict=True))
        return sent, step.passes * len(blocks) + sum(step.outside_calls)

    def _plans(self, name: str, shards: int) -> tuple[list[Shards], list[Shards]]:
        index = self._mesh.sharing.rank % shards
        blocks = [plan_shards(block.module, shards, index) for block in self._blocks[name]]
        return blocks, [plan_shards(part, shards, index) for part in self._outside[name]]

    def example(self, params: ResolvedParams, text_tokens: int) -> Tensors:
        """Random conditions as long as the model's text, or `text_tokens` where it may have any length."""
        return self.part.example_conditions(replace(self.model, device=CPU), params, text_tokens)

    def branches(self, params: ResolvedParams, conditions: Tensors) -> int:
        """Guidance branches of such a request's first step."""
        return len(self.part.branches(self.model, self._state(params, conditions)))

    def step(self, params: ResolvedParams, conditions: Tensors) -> Step:
        """The first step of a request that is alone.

        Raises:
            InvalidRequest: conditions or parameters that the model does not take.
        """
        state = self._state(params, conditions)
        parts = self._outside[self.part.expert(self.model, state)]
        before_bytes, before_calls = sent_bytes.copy(), sent_calls.copy()
        flops, alive = FlopCounterMode(display=False, custom_mapping=RING_FLOPS), LiveBytes(self.model)
        with torch.no_grad(), _calls_counted(parts) as calls, flops, alive:
            passes = self._forward.passes([state])
            for entering in passes:
                self._forward.beat(entering)
            while not self._forward.empty:
                self._forward.beat(None)
        by_operator = flops.get_flop_counts().get("Global", {})
        attention = sum(count for operator, count in by_operator.items() if operator in ATTENTION)
        return Step(
            passes=len(passes),
            sent_bytes=_since(before_bytes, sent_bytes),
            sent_calls=_since(before_calls, sent_calls),
            matmul_flops=sum(by_operator.values()) - attention,
            attention_flops=attention,
            activation_bytes=alive.peak,
            outside_calls=tuple(calls[part] for part in parts),
        )

    def _state(self, params: ResolvedParams, conditions: Tensors) -> DenoiseState:
        return self.part.prepare(replace(self.model, device=CPU), "dry-run", params, conditions)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, for as long as anybody holds them; weights do not count."""

    def __init__(self, model: DitModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        kept = [tensor for module in model.modules.values() for tensor in (*module.parameters(), *module.buffers())]
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


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: torch.Tensor | None) -> torch.Tensor:
    """Shapes and costs of a fused kernel: the meta device would take attention apart into its products."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mixed: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[0]
    return mixed.transpose(1, 2)


def _ring_flops(query: list[int], *_others: Any, out_shape: Any = None) -> int:
    """Each rank's queries [B, L, H, D] see the L keys of all `size` ranks, in two products."""
    rows, tokens, heads, width = query
    size: int = _others[-2]
    return 4 * rows * heads * width * tokens * tokens * size


RING_FLOPS = {torch.ops.lightloom.ring_attention: _ring_flops}
ATTENTION = {torch.ops.lightloom.ring_attention, torch.ops.aten._scaled_dot_product_flash_attention}


def _collating_on_meta(part: DitPart, model: DitModel) -> DitPart:
    """States hold real numbers, schedulers need them; batches go on without."""
    real = replace(model, device=CPU)
    return replace(part, collate=lambda _, rows: _to_meta(part.collate(real, rows)))


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if isinstance(value, tuple):
        return tuple(_to_meta(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _to_meta(getattr(value, field.name)) for field in fields(value)})
    return value


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _since(before: Counter[str], now: Counter[str]) -> dict[str, int]:
    return {kind: count - before[kind] for kind, count in now.items() if count > before[kind]}


@contextmanager
def _calls_counted(parts: Sequence[nn.Module]) -> Iterator[Counter[nn.Module]]:
    calls: Counter[nn.Module] = Counter()
    hooks = [part.register_forward_pre_hook(lambda module, _: calls.update([module])) for part in parts]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
