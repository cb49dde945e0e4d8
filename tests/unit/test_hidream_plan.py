"""HiDream's plan at full size, without weights: what ranks hold, and how many graphs compiled blocks take."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageTransformer2DModel
from torch._dynamo.testing import CompileCounter

from services.families import load_family
from services.families.hidream.cut import Batch
from services.families.hidream.moe import HiDreamTransformer
from services.parallel.experts import spread_experts
from services.parallel.mesh import Axis
from services.parallel.tensor import PartialLinear, RowLinear, SumOverRanks, split_linears
from services.weights import open_source

FAMILY = load_family("hidream")
PLAN = FAMILY.dit.plan
CONFIG = FAMILY.presets["hidream-i1-full"]["transformer"]


def full_size(cls=HiDreamTransformer):
    with torch.device("meta"):
        return cls.from_config(CONFIG)


def axis(size: int, rank: int) -> Axis:
    return Axis("", size, rank, None, tuple(range(size)))


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in full_size().named_parameters()}


def test_the_model_has_the_librarys_weights_under_their_names(whole):
    library = {name: weight.shape for name, weight in full_size(HiDreamImageTransformer2DModel).named_parameters()}
    assert whole == library
    assert 17.0e9 < sum(shape.numel() for shape in whole.values()) < 17.2e9


def test_two_tensor_ranks_hold_half_of_the_weights_each_and_all_together(whole):
    cuts = []
    for rank in range(2):
        module = full_size()
        total = sum(weight.nbytes for weight in module.parameters())
        cuts.append(split_linears(module, PLAN, axis(2, rank)))
        assert sum(weight.nbytes for weight in module.parameters()) <= 0.52 * total
    assert cuts[0].keys() == cuts[1].keys()
    for name, first in cuts[0].items():
        held = [index for cut in (first, cuts[1][name]) for start, end in cut.ranges for index in range(start, end)]
        assert sorted(held) == list(range(whole[name][first.dim])), name
    linears = {name for name, shape in whole.items() if len(shape) == 2 and not name.endswith("gate.weight")}
    assert linears == {name for name in cuts[0] if len(whole[name]) == 2}, "a linear is whole on every rank"


def test_tensor_ranks_sum_a_feed_forward_once():
    module = full_size()
    split_linears(module, PLAN, axis(2, 0))
    for block in FAMILY.dit.blocks(module):
        kinds = [type(layer) for layer in block.module.ff_i.modules()]
        assert (kinds.count(PartialLinear), kinds.count(SumOverRanks), kinds.count(RowLinear)) == (5, 1, 0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_expert_ranks_hold_their_share_of_the_experts_and_all_else(whole, ranks):
    experts = {name: shape.numel() for name, shape in whole.items() if ".ff_i.experts." in name}
    absent = []
    for rank in range(ranks):
        module = full_size()
        absent.append(spread_experts(module, PLAN, axis(ranks, rank)))
        held = {name for name, _ in module.named_parameters()}
        assert held == whole.keys() - absent[rank]
        assert sum(experts[name] for name in held & experts.keys()) == sum(experts.values()) / ranks
    everybody = set.intersection(*map(set, absent))
    assert not everybody, "an expert is on no rank"


def test_two_graphs_a_block_class_serve_any_batch_and_size(tmp_path):
    FAMILY.tiny(tmp_path, "full", 0)
    module = FAMILY.dit.load(open_source(str(tmp_path)), torch.device("cpu"), torch.float32).modules[""]
    blocks = FAMILY.dit.blocks(module)
    torch._dynamo.reset()
    counters = {cls: CompileCounter() for cls in PLAN.block_classes}
    compiled = {
        cls: torch.compile(cls.forward, backend=counter, fullgraph=True, dynamic=True)
        for cls, counter in counters.items()
    }
    for block in blocks:
        block.module.forward = MethodType(compiled[type(block.module)], block.module)

    def forward(rows: int, height: int, width: int, *, apart: bool) -> torch.Tensor:
        batch = Batch(
            latents=torch.randn(rows, 16, height, width),
            timestep=torch.rand(rows) * 1000,
            t5=torch.randn(rows, 128, 40),
            llama=torch.randn(rows, 128, 3, 48),
            pooled=torch.randn(rows, 48),
        )
        streams = FAMILY.dit.embed(module, batch)
        for block in blocks:
            streams = block.run(streams)
            if apart:
                # As another rank or a cache hands them on.
                streams.hidden = streams.hidden + 1
                streams.text = streams.text.clone(memory_format=torch.contiguous_format)
        return FAMILY.dit.head(module, streams)

    with (
        torch.inference_mode(),
        torch.fx.experimental._config.patch(use_duck_shape=False),
        torch._dynamo.config.patch(capture_scalar_outputs=True),
    ):
        # One row and two as in a warm-up, then any: squares, and other shapes with filling.
        forward(1, 26, 28, apart=False)
        forward(2, 26, 28, apart=False)
        assert [counter.frame_count for counter in counters.values()] == [2, 2]
        for rows, height, width in ((3, 8, 8), (1, 28, 28), (4, 8, 12), (1, 10, 10)):
            for apart in (False, True):
                assert forward(rows, height, width, apart=apart).isfinite().all()
    torch._dynamo.reset()
    assert [counter.frame_count for counter in counters.values()] == [2, 2]
