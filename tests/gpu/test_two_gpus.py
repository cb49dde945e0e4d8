"""One model over two GPUs, or a VAE over four, gives what one GPU gives."""

from __future__ import annotations

import pytest
import torch

from services.families import load_family
from tests.gpu.work import config_of, denoise, denoise_on, work_pictures, work_pictures_on
from tests.parallel.vaes import KINDS

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "cfg": {"cfg_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2},
    "tensor-sequence": {"tensor_parallel_size": 2, "tensor_sequence_parallel": True},
    "pipeline": {"pipeline_parallel_size": 2},
    "hsdp-ulysses": {"hsdp_shard_size": 2, "ulysses_degree": 2},
}
GRAPHS = ("ulysses", "ring", "tensor", "tensor-sequence", "cfg", "pipeline")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(layout, compiled, tmp_path) -> None:
    load_family("qwen_image").tiny(tmp_path, "t2i", 0)
    features = {"attention": {"backend": "sdpa"}} | ({"compile": {}} if compiled else {})
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        alone, _ = denoise(config_of(tmp_path, "float32", {}, {}), None, 8)
    spread = config_of(tmp_path, "float32", LAYOUTS[layout], features)
    for [(latents, figures)] in denoise_on(2, [spread], 8, tmp_path):
        assert latents.keys() == alone.keys()
        assert figures.get("dit_recompiles_total", 0) == 0
        for name, expected in alone.items():
            apart = (latents[name] - expected).abs().max() / expected.abs().max()
            assert apart < 1e-2, (name, apart)


# With one graph at a time others go, and what they hold with them, while requests of several shapes take turns.
ALL_GRAPHS = {"graphs": {"after": 1}}
ONE_GRAPH = {"graphs": {"after": 1, "kept": 1}}


@pytest.mark.parametrize(
    ("features", "layouts", "graphs"),
    [({}, GRAPHS, (ALL_GRAPHS, ONE_GRAPH))]
    + [({"compile": {}}, (layout,), (ONE_GRAPH,)) for layout in ("ulysses", "ring", "tensor")],
    ids=["eager", "compiled-ulysses", "compiled-ring", "compiled-tensor"],
)
def test_graphs_change_no_bit(features, layouts, graphs, tmp_path) -> None:
    load_family("qwen_image").tiny(tmp_path, "t2i", 0)
    both = {"attention": {"backend": "sdpa"}} | features
    configs = [
        config_of(tmp_path, "bfloat16", LAYOUTS[layout], both | each) for layout in layouts for each in ({}, *graphs)
    ]
    for made in denoise_on(2, configs, 8, tmp_path):
        for layout in layouts:
            (plain, counted), *replayed = (made.pop(0) for _ in range(1 + len(graphs)))
            for latents, figures in replayed:
                assert figures["dit_graph_replays_total"] > 0, layout
                assert figures.get("dit_recompiles_total") == counted.get("dit_recompiles_total"), layout
                assert all(torch.equal(plain[name], latents[name]) for name in plain), layout


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_vae_makes_what_one_gpu_makes(kind, world, tmp_path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    with torch.inference_mode():
        alone = work_pictures(kind, None)
    ranks = work_pictures_on(world, kind, tmp_path)
    for made in ranks:
        for ours, expected, others in zip(made, alone, ranks[0], strict=True):
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()
            assert torch.equal(ours, others)
