"""The arithmetic of `lightloom plan`: rates, layouts, what fits, what is said of it."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lightloom.plan import Job, Planner, sections_of
from lightloom.plan_rates import Rates, read_rates
from lightloom.plan_show import job_of, show_layouts
from lightloom.plan_wish import GIB, Wish, parse_memory
from services.config import ParallelSection
from services.errors import InvalidRequest, StartupError
from services.families import load_family
from services.parallel.degrees import Degrees
from services.weights import ModelSource

FULL = Wish("random:0", "qwen_image", "qwen-image", 2, "80GiB", "", None, None, 512)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("tiny")
    load_family("wan").tiny(folder, "t2v", 0)
    return job_of(Wish(str(folder), "", "", 4, "80GiB", "64x96", 9, None, 512))


@pytest.fixture(scope="module")
def layouts(tiny):
    """All of the tiny model on four GPUs."""
    return Planner(tiny, Rates()).layouts()


# ---- Rates ----------------------------------------------------------------------------------------------------------


def test_a_rates_file_changes_what_it_names(tmp_path):
    file = tmp_path / "rates.toml"
    file.write_text("all_to_all_gb_s = 17\ncollective_us = 1.5\n")
    assert read_rates(file) == replace(Rates(), all_to_all_gb_s=17.0, collective_us=1.5)
    assert read_rates(None) == Rates()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed = 1", "unknown config key rates.speed"),
        ("collective_us = 0", "collective_us is 0.0: it must be a number above 0"),
        ("matmul_tflops = nan", "it must be a number above 0"),
        ('matmul_tflops = "fast"', "rates.matmul_tflops must be of type float"),
    ],
)
def test_a_rates_file_that_cannot_be_meant_is_refused(tmp_path, text, words):
    file = tmp_path / "rates.toml"
    file.write_text(text)
    with pytest.raises(StartupError, match=words):
        read_rates(file)


def test_attention_has_its_measured_rates_at_both_ends_and_between_them():
    rates = Rates(compute_share=1.0)
    seconds = [rates.compute_s(0, 10**15, tokens) for tokens in (100, 4400, 12000, 33000, 10**6)]
    assert seconds[0] == seconds[1] == pytest.approx(1e3 / 555)
    assert 1e3 / 605 < seconds[2] < 1e3 / 555
    assert seconds[3] == seconds[4] == pytest.approx(1e3 / 605)
    assert Rates(compute_share=0.5).compute_s(787 * 10**12, 0, 1) == pytest.approx(2.0)


def test_a_kind_of_collective_has_its_rate_and_each_call_its_time():
    rates = Rates(all_to_all_gb_s=10, all_reduce_gb_s=20, all_gather_gb_s=40, ring_gb_s=80, collective_us=100)
    seconds = {kind: rates.wire_s(kind, 8 * 10**9, 10) for kind in ("all_to_all", "all_reduce", "hsdp", "ring")}
    assert seconds == pytest.approx({"all_to_all": 0.801, "all_reduce": 0.401, "hsdp": 0.201, "ring": 0.101})


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * GIB), ("141 gb", 141 * 10**9), ("0.5GiB", GIB // 2)])
def test_memory_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "-1GiB", "0GiB", "80MiB", "1e3GB"])
def test_memory_that_cannot_be_read_is_refused(text):
    with pytest.raises(StartupError, match="write it as 80GiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"gpus": 65}, StartupError, "--gpus is 65: it must be between 1 and 64"),
        ({"memory": "80"}, StartupError, "--memory is '80': write it as 80GiB"),
        ({"size": "big"}, StartupError, "--size is 'big': write WIDTHxHEIGHT"),
        ({"text_tokens": 0}, StartupError, "--text-tokens is 0"),
        ({"preset": "x"}, StartupError, "has no preset 'x', it has"),
        ({"family": "", "model": "random:0"}, StartupError, "random:0 has no shape of its own: give --family"),
        ({"frames": 5}, InvalidRequest, "num_frames is 5: it must be 1"),
        ({"guidance": 99.0}, InvalidRequest, "guidance is 99.0"),
    ],
)
def test_a_wish_that_cannot_be_meant_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        job_of(replace(FULL, **changes))


@pytest.mark.parametrize("wrong", [("--gpus", "0"), ("--gpus", "2", "--memory", "0"), ("--gpus", "2", "--size", "1")])
def test_a_wrong_option_is_answered_before_torch_is_imported(wrong):
    typed = ["lightloom", "plan", "--model", "random:0", "--family", "wan", "--preset", "x", *wrong]
    script = f"import sys\nsys.argv = {typed}\nfrom lightloom.cli import main\ntry:\n    main()\nfinally:\n"
    script += "    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n"), done
    assert done.stderr.startswith(f"error: {wrong[-2]} is ")


def test_layouts_whose_ranks_hold_the_same_build_one_model(tiny, monkeypatch):
    built: Counter[tuple[int, int, int]] = Counter()
    load = ModelSource.load

    def noted(source: ModelSource, *arguments: Any) -> Any:
        mesh = source.partition.mesh
        built[mesh.degrees.tensor, mesh.degrees.pipeline, mesh["pipeline"].rank] += 1
        return load(source, *arguments)

    monkeypatch.setattr(ModelSource, "load", noted)
    Planner(tiny, Rates()).layouts()
    # The model has two experts. What one rank alone holds is made once more, for what the planner asks of the request.
    assert {held: count for held, count in built.items() if count > 2} == {(1, 1, 0): 4}


# ---- Layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_every_layout_uses_all_gpus_once(gpus, branches):
    sections = list(sections_of(gpus, branches, experts=True))
    assert len(set(sections)) == len(sections)
    for section in sections:
        assert Degrees.of(section).world == gpus
        assert section.cfg_parallel_size <= branches
    axes = {
        (s.cfg_parallel_size, s.pipeline_parallel_size, s.ring_degree, s.ulysses_degree, s.tensor_parallel_size)
        for s in sections
        if s.hsdp_shard_size == 1 and not s.enable_expert_parallel
    }
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    expected = sum(
        cfg * pipeline * ring * ulysses * tensor == gpus and cfg <= branches
        for cfg in sizes
        for pipeline in sizes
        for ring in sizes
        for ulysses in sizes
        for tensor in sizes
    )
    assert len(axes) == expected


def test_a_tiny_model_fits_everywhere_but_where_its_heads_do_not_divide(layouts):
    refused = {tuple(layout.keys.items()): layout.refusal for layout in layouts if layout.refusal}
    assert refused == {
        (("tensor_parallel_size", 4),): "tensor_parallel_size 4 does not divide the 6 attention heads: use 1, 2, 3, 6"
    }
    assert not layouts[0].refusal
    for layout in layouts[:-1]:
        assert 0 < layout.busy_s <= layout.step_s
        assert layout.sent_bytes > 0 < layout.activation_bytes


@pytest.fixture(scope="module")
def full() -> dict[str, dict]:
    """Layouts of Qwen-Image on two GPUs, by their keys."""
    return {str(layout.keys): layout for layout in Planner(job_of(FULL), Rates()).layouts()}


def test_bytes_sent_are_those_that_two_gpus_counted():
    """A run of `benchmarks/layouts.py` on two H100: one request, prompts of 24 and 12 tokens."""
    counted = {"ulysses_degree": 3037593600 + 25165824, "tensor_parallel_size": 6075187200 + 30285824}
    found = {str(layout.keys): layout for layout in Planner(job_of(replace(FULL, text_tokens=24)), Rates()).layouts()}
    assert {key: found[str({key: 2})].sent_bytes for key in counted} == counted


def test_layouts_cost_what_they_are_made_of(full):
    cfg, tensor = full["{'cfg_parallel_size': 2}"], full["{'tensor_parallel_size': 2}"]
    pipeline, hsdp = full["{'pipeline_parallel_size': 2}"], full["{'hsdp_shard_size': 2}"]
    sharded = full["{'ulysses_degree': 2, 'hsdp_shard_size': 2}"]
    assert tensor.weight_bytes == pytest.approx(cfg.weight_bytes / 2, rel=0.01)
    assert sharded.weight_bytes == hsdp.weight_bytes < 0.55 * cfg.weight_bytes
    # Two branches make two passes; the pipeline is full for one of three beats, and always with more requests.
    assert pipeline.step_s == pytest.approx(1.5 * pipeline.busy_s)
    assert pipeline.busy_s == pytest.approx(cfg.step_s, rel=0.05)
    # Ranks that repeat each other's work gain nothing; what they gather travels behind it.
    assert hsdp.step_s == pytest.approx(2 * pipeline.busy_s, rel=0.05)
    assert list(full.values())[0] is cfg


def test_windows_are_counted_by_their_groups(full):
    """1024x1024 are 4096 tokens of a width of 3072; those of a text of 512 besides."""
    step, mib = 32, 2**20
    windows = {key: layout.window_bytes // mib for key, layout in full.items()}
    # Two of a step: the prediction.
    assert windows["{'cfg_parallel_size': 2}"] == 2 * step
    assert not windows["{'pipeline_parallel_size': 2}"] and not windows["{'hsdp_shard_size': 2}"]
    # Two rows: three tensors in one window and one in the other; of the pieces that are joined two.
    row = (4096 + 512) * 3072 * 2 // 2
    steps = [-(-size // (step * mib)) * step for size in (2 * 3 * row, 2 * row, 2 * 4096 * 3072)]
    assert windows["{'ulysses_degree': 2}"] == steps[0] + steps[1] + 2 * steps[2]


def test_room_for_all_but_the_windows_does_not_fit(tiny):
    pair = replace(tiny, gpus=2)
    [ulysses] = [each for each in Planner(pair, Rates()).layouts() if each.keys == {"ulysses_degree": 2}]
    memory_bytes = 3 * GIB + ulysses.weight_bytes + ulysses.activation_bytes + ulysses.window_bytes
    for room, refusal in ((memory_bytes, ""), (memory_bytes - 1, "needs 3.1 GiB")):
        layouts = Planner(replace(pair, memory_bytes=room), Rates()).layouts()
        assert [each.refusal for each in layouts if each.keys == ulysses.keys] == [refusal]


def test_a_denoiser_of_one_expert_holds_half_and_takes_its_own_steps(tiny):
    both = Planner(replace(tiny, gpus=1), Rates()).layouts()
    for expert in ("high_noise", "low_noise"):
        alone = Planner(replace(tiny, gpus=1, source=replace(tiny.source, expert=expert)), Rates()).layouts()
        assert [2 * layout.weight_bytes for layout in alone] == [layout.weight_bytes for layout in both]
        assert [layout.step_s for layout in alone] == [layout.step_s for layout in both]
    few = replace(tiny, gpus=1, source=replace(tiny.source, expert="low_noise"), params=replace(tiny.params, steps=1))
    with pytest.raises(StartupError, match="no step of such a request has the expert low_noise"):
        Planner(few, Rates()).layouts()


def test_slower_links_cost_time_where_they_are_used(full):
    slow = {
        str(layout.keys): layout for layout in Planner(job_of(FULL), replace(Rates(), all_reduce_gb_s=27.4)).layouts()
    }
    for key, layout in full.items():
        if "tensor" in key:
            assert slow[key].step_s - layout.step_s == pytest.approx(layout.sent_bytes * 9 / 274e9, rel=0.05)
        else:
            # Places of tokens are remembered: the second planner makes none.
            assert replace(slow[key], activation_bytes=layout.activation_bytes) == layout


def test_what_does_not_fit_says_what_it_needs():
    layouts = {str(layout.keys): layout for layout in Planner(job_of(replace(FULL, memory="40GiB")), Rates()).layouts()}
    whole, cut = layouts["{'ulysses_degree': 2}"], layouts["{'tensor_parallel_size': 2}"]
    assert whole.refusal == f"weights and reserve need {whole.weight_bytes / GIB + 3:.1f} GiB"
    assert not cut.refusal


def test_room_for_the_weights_but_not_for_a_step_does_not_fit(tiny):
    pair = replace(tiny, gpus=2)
    largest = max(Planner(pair, Rates()).layouts(), key=lambda layout: layout.activation_bytes)
    memory_bytes = 3 * GIB + largest.weight_bytes + largest.activation_bytes // 2
    layouts = Planner(replace(pair, memory_bytes=memory_bytes), Rates()).layouts()
    [found] = [layout for layout in layouts if layout.keys == largest.keys]
    assert found.refusal == "needs 3.0 GiB"


def test_an_expert_that_is_idle_is_on_the_host(tiny, layouts):
    offloading = replace(tiny, gpus=2, offload_experts=True)
    found = {str(layout.keys): layout for layout in Planner(offloading, Rates()).layouts()}
    resident = {str(layout.keys): layout for layout in Planner(replace(tiny, gpus=2), Rates()).layouts()}
    for key, layout in found.items():
        if "hsdp" in key:
            assert layout.refusal.startswith("engine.offload_experts does not go with hsdp")
            continue
        # The experts are alike, and so are steps.
        assert layout.weight_bytes == resident[key].weight_bytes / 2
        assert layout.host_bytes >= resident[key].weight_bytes and not resident[key].host_bytes
        assert (layout.step_s, layout.sent_bytes) == (resident[key].step_s, resident[key].sent_bytes)
    whole, cut = found["{'ulysses_degree': 2}"], found["{'tensor_parallel_size': 2}"]
    assert cut.host_bytes < 0.7 * whole.host_bytes
    said = io.StringIO()
    show_layouts(Console(file=said, width=240), offloading, Rates(), list(found.values()), everything=True)
    assert "host GiB" in said.getvalue()
    assert said.getvalue().endswith("[engine]\noffload_experts = true\n")


def test_a_full_size_model_of_two_experts_fits_where_one_does():
    wish = Wish("random:0", "wan", "wan2.2-t2v-a14b", 1, "40GiB", "", 5, None, 512)
    [resident], [offloading] = (
        Planner(job_of(replace(wish, offload_experts=offload)), Rates()).layouts() for offload in (False, True)
    )
    assert resident.refusal.startswith("weights and reserve need 56.3 GiB")
    assert not offloading.refusal
    assert offloading.weight_bytes == resident.weight_bytes / 2
    said = io.StringIO()
    show_layouts(Console(file=said, width=240), job_of(wish), Rates(), [offloading, resident], everything=False)
    assert "1 GPU of 40.0 GiB, 3 GiB of it reserved\n" in said.getvalue()


def test_one_expert_cannot_be_offloaded():
    with pytest.raises(StartupError, match="needs a model of several experts: this one has 1"):
        Planner(job_of(replace(FULL, offload_experts=True)), Rates())


# ---- What is said ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [72, 240])
def test_a_terminal_of_any_width_shows_all(tiny, layouts, width):
    said = io.StringIO()
    show_layouts(Console(file=said, width=width), tiny, Rates(), layouts, everything=True)
    text = said.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "Times are estimates" in text
    assert width < 100 or "does not divide the 6 attention heads: use 1, 2, 3, 6" in text
    section = tomllib.loads(text[text.index("[parallel]") :].partition("\n\n")[0])["parallel"]
    assert ParallelSection(**section) == layouts[0].section


def test_shards_that_nobody_needs_are_shown_when_all_is_asked_for(tiny, layouts):
    texts = []
    for everything in (False, True):
        said = io.StringIO()
        show_layouts(Console(file=said, width=240), tiny, Rates(), layouts, everything=everything)
        texts.append(said.getvalue())
    assert "more layouts: --all shows them" in texts[0]
    assert texts[0].count("hsdp_shard_size") < texts[1].count("hsdp_shard_size")
    assert len([line for line in texts[1].splitlines() if "fits" in line or "divide" in line]) == len(layouts)


def test_nothing_fits_is_said(tiny):
    job = replace(tiny, gpus=2, memory_bytes=GIB)
    said = io.StringIO()
    show_layouts(Console(file=said, width=240), job, Rates(), Planner(job, Rates()).layouts(), everything=False)
    assert "No layout fits" in said.getvalue()
    assert "[parallel]" not in said.getvalue()
