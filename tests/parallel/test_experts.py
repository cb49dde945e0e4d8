"""Experts over ranks: the results of one process, the tokens that travel counted one by one, the bytes a rank holds."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from services.config import ParallelSection
from services.errors import StartupError
from services.experts import Experts
from services.families import load_family
from services.families.hidream.moe import HiDreamTransformer
from services.parallel.degrees import Degrees
from services.parallel.experts import spread_experts
from services.parallel.mesh import Axis
from tests.oracle.harness import difference, run
from tests.parallel.jobs import Script

NAME, BLOCKS, EXPERTS = "hidream-full", 4, 4
LAYOUTS = {
    "cfg": (2, {"cfg_parallel_size": 2}),
    "ulysses": (2, {"ulysses_degree": 2}),
    "ring-uneven": (3, {"ring_degree": 3}),
    "cfg-ulysses": (4, {"cfg_parallel_size": 2, "ulysses_degree": 2}),
    "ulysses-tensor": (4, {"ulysses_degree": 2, "tensor_parallel_size": 2}),
    "ulysses-pipeline": (4, {"ulysses_degree": 2, "pipeline_parallel_size": 2}),
    "hsdp": (2, {"hsdp_shard_size": 2}),
}
WITH_EXPERTS = {"enable_expert_parallel": True}


def weight_bytes(folder, part: str) -> int:
    """Bytes of the stored transformer's weights whose names hold `part`."""
    total = 0
    with safe_open(folder / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file's handle is no mapping
            total += file.get_tensor(name).nbytes if part in name else 0
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spread_experts_give_what_one_process_gives(pool, prepared, layout):
    world, parallel = LAYOUTS[layout]
    subject = prepared(NAME)
    jobs, stock = subject.jobs(3)
    script = Script(jobs, abort={"r2": 3})
    reports = pool.run("denoise", world, str(subject.folder), parallel | WITH_EXPERTS, {"max_batch": 8}, script)
    for report in reports:
        assert report.finished.keys() == {"r0", "r1"}
        assert report.sent["all_to_all_uneven"] > 0
        for request_id, tensors in report.finished.items():
            assert difference(tensors, stock[request_id]) <= 1e-4, request_id


def test_each_rank_holds_its_share_of_the_experts_and_all_else(pool, prepared):
    subject = prepared(NAME)
    jobs, _ = subject.jobs(1)
    whole, experts = weight_bytes(subject.folder, ""), weight_bytes(subject.folder, ".ff_i.experts.")
    for (world, parallel), shares in (
        (LAYOUTS["cfg"], (1 / 2, 1 / 2)),
        (LAYOUTS["ring-uneven"], (1 / 2, 1 / 4, 1 / 4)),
    ):
        reports = pool.run("denoise", world, str(subject.folder), parallel | WITH_EXPERTS, {}, Script(jobs))
        for report, share in zip(reports, shares, strict=True):
            assert report.weight_bytes == whole - experts + experts * share
    assert experts > whole / 2


def test_as_many_tokens_travel_as_have_their_expert_elsewhere(pool, prepared, monkeypatch):
    """Rank 0 computes the positive branch and holds experts 0 and 1, rank 1 the negative one and experts 2 and 3."""
    subject = prepared(NAME)
    jobs, _ = subject.jobs(1)
    counts_seen: list[list[int]] = []
    bytes_a_token = set()
    forward = Experts.forward

    def counted(experts: Experts, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        counts_seen.append(counts.tolist())
        bytes_a_token.add(tokens.shape[1] * tokens.element_size())
        return forward(experts, tokens, counts)

    monkeypatch.setattr(Experts, "forward", counted)
    engine = subject.subject.engine(branches="serial", max_batch=1)
    engine.admit(jobs[0])
    run(engine, [])
    by_branch = torch.tensor(counts_seen).view(jobs[0].params.steps, 2, BLOCKS, EXPERTS).transpose(0, 1)
    leaving_0, leaving_1 = int(by_branch[0, ..., 2:].sum()), int(by_branch[1, ..., :2].sum())
    assert leaving_0 != leaving_1
    assert min(leaving_0, leaving_1) > 0
    world, parallel = LAYOUTS["cfg"]
    reports = pool.run("denoise", world, str(subject.folder), parallel | WITH_EXPERTS, {}, Script(jobs))
    # A rank sends its own tokens away, and the results of those that came to it back.
    [width] = bytes_a_token
    for report in reports:
        assert report.sent["all_to_all_uneven"] == (leaving_0 + leaving_1) * width


def axis(size: int) -> Axis:
    return Axis("", size, 0, None, tuple(range(size)))


def test_more_ranks_than_experts_are_refused_with_both_numbers():
    family = load_family("hidream")
    with torch.device("meta"):
        module = HiDreamTransformer.from_config(family.presets["hidream-i1-full"]["transformer"])
    with pytest.raises(StartupError, match="8 ranks share a block, but it has 4 experts"):
        spread_experts(module, family.dit.plan, axis(8))


def test_a_model_without_experts_is_refused():
    plan = load_family("wan").dit.plan
    with pytest.raises(StartupError, match="no experts"):
        spread_experts(torch.nn.Linear(2, 2), plan, axis(2))


@pytest.mark.parametrize("others", [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_degrees_without_ranks_that_share_blocks_are_refused(others):
    with pytest.raises(StartupError, match="enable_expert_parallel"):
        Degrees.of(ParallelSection(**others, enable_expert_parallel=True))
