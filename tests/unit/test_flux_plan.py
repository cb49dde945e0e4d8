"""FLUX's plan at full size, without weights: what a rank of two holds, and how many graphs compiled blocks take."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch._dynamo.testing import CompileCounter

from services.families import load_family
from services.families.flux.cut import Batch
from services.parallel.mesh import Axis
from services.parallel.tensor import split_linears
from services.weights import open_source

FAMILY = load_family("flux")


def full_size(preset: str) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(FAMILY.presets[preset]["transformer"])


@pytest.mark.parametrize("preset", ["flux1-dev", "flux1-schnell"])
def test_two_tensor_ranks_hold_half_of_the_weights_each_and_all_together(preset):
    whole = full_size(preset)
    shapes = {name: weight.shape for name, weight in whole.named_parameters()}
    total = sum(weight.nbytes for weight in whole.parameters())
    cuts = []
    for rank in range(2):
        module = full_size(preset)
        cuts.append(split_linears(module, FAMILY.dit.plan, Axis("", 2, rank, None, (0, 1))))
        assert sum(weight.nbytes for weight in module.parameters()) <= 0.52 * total
    assert cuts[0].keys() == cuts[1].keys()
    for name, first in cuts[0].items():
        held = [index for cut in (first, cuts[1][name]) for start, end in cut.ranges for index in range(start, end)]
        assert sorted(held) == list(range(shapes[name][first.dim])), name
    weights = {name for name in shapes if name.endswith(".weight") and len(shapes[name]) == 2}
    assert weights == {name for name in cuts[0] if name.endswith(".weight")}, "a linear is whole on every rank"


def test_a_single_blocks_last_linear_is_cut_in_its_attention_and_its_mlp():
    module = full_size("flux1-dev")
    cuts = split_linears(module, FAMILY.dit.plan, Axis("", 2, 1, None, (0, 1)))
    width = module.inner_dim
    cut = cuts["single_transformer_blocks.7.proj_out.weight"]
    assert (cut.dim, cut.ranges) == (1, ((width // 2, width), (3 * width, 5 * width)))
    # What the rank's share of the block brings to it: half of the heads, and half of the MLP.
    mine = [cuts[f"single_transformer_blocks.7.{name}.weight"].size for name in ("attn.to_v", "proj_mlp")]
    assert sum(mine) == cut.size


def test_two_graphs_a_block_class_serve_any_batch_text_and_size(tmp_path):
    FAMILY.tiny(tmp_path, "dev", 0)
    module = FAMILY.dit.load(open_source(str(tmp_path)), torch.device("cpu"), torch.float32).modules[""]
    blocks = FAMILY.dit.blocks(module)
    torch._dynamo.reset()
    counters = {cls: CompileCounter() for cls in FAMILY.dit.plan.block_classes}
    compiled = {
        cls: torch.compile(cls.forward, backend=counter, fullgraph=True, dynamic=True)
        for cls, counter in counters.items()
    }
    for block in blocks:
        block.module.forward = MethodType(compiled[type(block.module)], block.module)

    def forward(rows: int, text: int, image: int, *, apart: bool) -> torch.Tensor:
        batch = Batch(
            latents=torch.randn(rows, image, 64),
            timestep=torch.rand(rows),
            guidance=torch.rand(rows),
            text=torch.randn(rows, text, 40),
            pooled=torch.randn(rows, 24),
            rotary=(torch.randn(text, 4, 2), torch.randn(image, 4, 2)),
        )
        streams = FAMILY.dit.embed(module, batch)
        for block in blocks:
            streams = block.run(streams)
            if apart:
                # As another rank or a cache hands them on: the image changed, or both.
                streams.hidden = streams.hidden + 1
                streams.text = streams.text.clone(memory_format=torch.contiguous_format)
        return FAMILY.dit.head(module, streams)

    with torch.inference_mode(), torch.fx.experimental._config.patch(use_duck_shape=False):
        # One row and two as in a warm-up, then any.
        forward(1, 23, 182, apart=False)
        forward(2, 23, 182, apart=False)
        assert [counter.frame_count for counter in counters.values()] == [2, 2]
        for rows, text, image in ((3, 512, 20), (1, 512, 24), (4, 256, 9), (1, 77, 60)):
            for apart in (False, True):
                assert forward(rows, text, image, apart=apart).isfinite().all()
    torch._dynamo.reset()
    assert [counter.frame_count for counter in counters.values()] == [2, 2]
