"""Two processes train the frame interpolator as one would with both their batches, and end together. They even out the
latents of clips as one would with all the clips."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from demo import stage as stage_clock
from demo.clips import components
from demo.clips.batches import batch_of
from demo.clips.scenes import sample_moving_scene
from demo.clips.train_autoencoder import even_out
from demo.interpolation.layers import Painter, sample_clips
from demo.interpolation.photographs import TILE_PX
from demo.interpolation.train import draw_triples, loss_of, train
from demo.ranks import ALONE, Ranks, join, leave
from demo.stage import Stage
from interpolation_svc.ifnet import IFNet, IFNetSpec

ROOT = Path(__file__).parents[2]
BATCH, SIDE_PX, SEED = 2, 64, 5


def begun(ranks: Ranks = ALONE) -> tuple[Stage, IFNet, Painter]:
    """The same at every call; of the planned hour only the part before the learning rate falls is trained."""
    torch.manual_seed(SEED)
    net = IFNet(IFNetSpec((16, 12, 8, 8), encodes=True))
    stage = Stage(nn.ModuleDict({"net": net}), peak_lr=1e-3, ema_decay=0.99, planned_s=3600.0, ranks=ranks)
    return stage, net, Painter(torch.rand(2, 3, TILE_PX, TILE_PX))


def run(stage: Stage, net: IFNet, painter: Painter, seconds: float) -> None:
    wanted = {"seed": SEED, "batch": BATCH, "side": SIDE_PX, "run_minutes": seconds / 60, "as_served": False}
    train(stage, net, argparse.Namespace(**wanted), painter)


def evened_out(ranks: Ranks = ALONE) -> dict[str, torch.Tensor]:
    """The layers that turn the latents, by this rank's part of two clips."""
    scenes = batch_of([sample_moving_scene(rng) for rng in (Random(1), Random(2))])
    vae = components.build_autoencoder()
    components.copy_picture_autoencoder(vae)
    even_out(vae, scenes[slice(ranks.rank, None, ranks.size)], batch_size=1, ranks=ranks)
    layers = nn.ModuleDict({"in": vae.quant_conv, "out": vae.post_quant_conv})
    return {name: param.detach() for name, param in layers.named_parameters()}


def one_rank(folder: Path) -> None:
    """What torchrun starts twice. On rank 1 the time is up after one step."""
    torch.set_num_threads(1)
    ranks = join()
    if ranks.rank == 1:
        true_clock = stage_clock.time.monotonic
        stage_clock.time = SimpleNamespace(monotonic=lambda: 1000 * true_clock())  # type: ignore[assignment]
    stage, net, painter = begun(ranks)
    run(stage, net, painter, seconds=3.0)
    turned = evened_out(ranks)
    leave()
    stage.save(folder / f"{ranks.rank}.safetensors")
    save_file(turned, folder / f"turned_{ranks.rank}.safetensors")


def test_two_ranks_end_together_with_the_weights_of_one_that_has_both_batches(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=80, check=False
    )
    assert ended.returncode == 0, ended.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    stage, net, painter = begun()
    steps = ended.stdout.count("step ")
    assert steps > 2, "only rank 0 speaks, of each of the first steps once"
    generators = [torch.Generator().manual_seed(Ranks(rank, 2).seed(SEED)) for rank in (0, 1)]
    for _ in range(steps):
        for generator in generators:
            triples = draw_triples(painter, sample_clips(BATCH, SIDE_PX, 2, generator), generator)
            loss_of(net, triples)[0].backward()
        for param in net.parameters():
            assert param.grad is not None
            param.grad /= 2
        stage.update()
    for name, param in stage.params.items():
        assert torch.allclose(first[f"param/{name}"], param, rtol=0, atol=1e-6), name

    expected = evened_out()
    for rank in (0, 1):
        turned = load_file(tmp_path / f"turned_{rank}.safetensors")
        assert all(torch.allclose(turned[name], expected[name], rtol=1e-3, atol=1e-3) for name in expected)

    alone, net, painter = begun()
    alone.resume(tmp_path / "0.safetensors")
    assert alone.step == steps and alone.seconds > 0.0
    run(alone, net, painter, seconds=0.01)
    assert alone.step > steps


def test_every_rank_draws_clips_of_its_own_and_one_alone_those_of_before() -> None:
    assert Ranks().seed(7) == 7
    assert len({Ranks(rank, 4).seed(seed) for rank in range(4) for seed in range(9)}) == 36


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
