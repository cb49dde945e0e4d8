"""A stage whose layout cannot work ends at start with one line that names numbers that would."""

from __future__ import annotations

import asyncio

import pytest
import torch

from services.families import load_family
from tests.cluster.test_start_up import check, run, stage


async def test_degrees_that_fit_nothing_stop_the_front(tmp_path):
    cases = {
        "world": ({"world_size": 4, "ulysses_degree": 2}, "world_size is 4, but the degrees multiply to 2"),
        "zero": ({"ring_degree": 0}, "parallel.ring_degree is 0: it must be between 1 and 1024"),
        "hsdp": ({"hsdp_shard_size": 2, "ulysses_degree": 4}, "use a shard size of 2, 4"),
        "experts": ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, "raise cfg_parallel_size"),
    }
    answers = await asyncio.gather(
        *(
            run("dit_svc", tmp_path / f"{name}.toml", stage("nowhere") | {"parallel": parallel})
            for name, (parallel, _) in cases.items()
        )
    )
    for answer, (_, words) in zip(answers, cases.values(), strict=True):
        check(answer, words)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("text_encoder_svc", ("the TextEncoder stage is spread over ranks by tensor_parallel_size only",)),
        ("vae_svc", ("the Vae stage is spread over ranks by vae_patch_parallel_size only",)),
    ],
)
async def test_stages_refuse_degrees_that_they_have_not(tmp_path, module, words):
    table = stage("nowhere") | {"parallel": {"ulysses_degree": 2}}
    check(await run(module, tmp_path / "stage.toml", table), *words)


async def test_ranks_refuse_what_does_not_fit_model_and_machine(tmp_path):
    load_family("qwen_image").tiny(tmp_path / "tiny", "t2i", 0)
    heads = stage(tmp_path / "tiny") | {"parallel": {"tensor_parallel_size": 3}}
    heads["model"]["device"] = "cpu"
    devices = stage(tmp_path / "tiny") | {"parallel": {"ulysses_degree": torch.cuda.device_count() + 2}}
    devices["model"]["device"] = "cuda"
    answers = await asyncio.gather(
        run("dit_svc", tmp_path / "heads.toml", heads), run("dit_svc", tmp_path / "devices.toml", devices)
    )
    check(answers[0], "parallel.tensor_parallel_size 3 does not divide the 2 attention heads: use 1, 2")
    check(answers[1], f"this host has {torch.cuda.device_count()}: let the degrees multiply to")
