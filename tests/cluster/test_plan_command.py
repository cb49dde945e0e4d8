"""`lightloom plan` as people type it: tiny and full-size models, what it recommends and refuses."""

from __future__ import annotations

import re
import tomllib

import pytest

from services.config import ParallelSection
from services.families import load_family
from services.parallel.degrees import Degrees
from tests.cluster.test_cli import MODEL, lightloom, refused

FULL = ("--model", "random:0", "--family", "qwen_image", "--preset", "qwen-image")


def recommended(output: str) -> ParallelSection:
    """The section that can be put into a config as it stands."""
    start = output.index("[parallel]")
    return ParallelSection(**tomllib.loads(output[start:].split("\n\n")[0])["parallel"])


def rows(output: str) -> dict[str, list[str]]:
    """Cells by layout: on a pipe, every layout has one line."""
    table = output[output.index("layout ") :].split("\n\n")[0].splitlines()[1:]
    return {line[: line.index("  ")]: line[line.index("  ") :].split() for line in table if "  " in line}


def test_a_folder_with_rates_of_its_own(tmp_path):
    file = tmp_path / "rates.toml"
    file.write_text("reserve_gib = 5\n")
    options = ("--model", MODEL, "--gpus", 2, "--size", "256x256", "--rates", file, "--all")
    done = lightloom("plan", *options, COLUMNS="80")
    assert done.returncode == 0, done
    assert "Times are estimates" in done.stdout
    assert "256x256" in done.stdout and "5 GiB of each reserved" in done.stdout
    assert {"cfg_parallel_size 2", "ulysses_degree 2", "ring_degree 2", "hsdp_shard_size 2"} <= rows(done.stdout).keys()
    assert Degrees.of(recommended(done.stdout)).world == 2


def test_a_full_size_model_that_one_gpu_cannot_hold(here):
    done = here("plan", *FULL, "--gpus", 2, "--memory", "32GiB")
    assert done.returncode == 0, done
    table = rows(done.stdout)
    assert table["cfg_parallel_size 2"][-6:] == ["weights", "and", "reserve", "need", "41.1", "GiB"]
    assert table["tensor_parallel_size 2"][-1] == "fits"
    assert recommended(done.stdout) == ParallelSection(cfg_parallel_size=2, hsdp_shard_size=2)
    assert not re.sub(r"\d+ of 9 layouts\n", "", done.stderr)


def test_heads_that_do_not_divide_are_in_the_table(tmp_path, here, monkeypatch):
    monkeypatch.setattr("lightloom.plan_show.TOLD_EVERY_S", 0.0)
    load_family("wan").tiny(tmp_path / "m", "t2v", 0)
    done = here("plan", "--model", tmp_path / "m", "--gpus", 4, "--size", "64x96", "--frames", 9, "--all")
    cells = rows(done.stdout)["tensor_parallel_size 4"]
    assert " ".join(cells).endswith("does not divide the 6 attention heads: use 1, 2, 3, 6")
    # No terminal, no bar: lines say how far it is.
    told = re.findall(r"^(\d+) of (\d+) layouts$", done.stderr, re.MULTILINE)
    assert [(int(count), int(total)) for count, total in told] == [(count, len(told)) for count in range(len(told))]
    assert len(told) > 20


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*FULL, "--gpus", 0), 2, "--gpus is 0: it must be between 1 and 64"),
        ((*FULL, "--gpus", 2, "--size", "1000x1000"), 1, "width 1000 is not a multiple of 16: use 992 or 1008"),
        ((*FULL, "--gpus", 2, "--rates", "nowhere.toml"), 2, "nowhere.toml does not exist"),
        ((*FULL, "--gpus", 2, "--expert", "low_noise"), 2, "no expert 'low_noise': it has 1 only"),
        (("--model", "nowhere", "--gpus", 2), 2, "model folder nowhere does not exist"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(here, arguments, code, words):
    refused(here("plan", *arguments), code, words)
