"""Qwen-Image at full size on one GPU: diffusers' own pipeline and the cluster, on the same random weights.

`python -m benchmarks.full_size` runs both one after the other, each in processes of its own, and prints seconds per
step and end to end beside the floor (docs/performance.md). 1024x1024, guidance by two branches, bfloat16; the peer has
its blocks compiled and cuDNN attention. `--only stock` or `--only cluster` runs one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.load import Outcome, Work, timed_request, write_result

SOURCE, FAMILY, PRESET = "random:0", "qwen_image", "qwen-image"
SIDE_PX = 1024
GUIDANCE = 4.0
# Prompt tokens of the peer: as long as what the benchmark's prompts become, after the template's prefix.
TEXT_TOKENS = 34 + 24
TEMPLATE_TOKENS = 34
# FLOPs of one forward over the measured matmul and attention ceilings of one H100.
FLOOR_FORWARD_MS = 97.0


@dataclass(frozen=True, slots=True)
class Timing:
    """What one side took, in seconds; `step` is one scheduler step with both guidance branches."""

    end_to_end_s: float
    step_s: float
    runs: int


def run_stock(steps: int, runs: int) -> Timing:
    """diffusers' pipeline, compiled blocks and cuDNN attention. The text encoder runs on random ids of fixed length."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    from services.weights import open_source

    source = open_source(SOURCE, family=FAMILY, preset=PRESET)
    device, dtype = torch.device("cuda"), torch.bfloat16
    encoder = source.load_transformers(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, "text_encoder", device, dtype
    )
    transformer: Any = source.load(QwenImageTransformer2DModel, "transformer", device, dtype)
    transformer.set_attention_backend("_native_cudnn")
    transformer.compile_repeated_blocks(fullgraph=True)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(source.config("scheduler", "scheduler_config.json")),
        vae=source.load(AutoencoderKLQwenImage, "vae", device, dtype),
        text_encoder=encoder,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return asyncio.run(_time_runs(_stock_picture(pipeline, encoder, steps), steps, runs))


def _stock_picture(pipeline: Any, encoder: Any, steps: int) -> Any:
    import torch

    @torch.inference_mode()
    def embed() -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(1000, (1, TEXT_TOKENS), device="cuda")
        hidden = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        embeds = hidden.hidden_states[-1][:, TEMPLATE_TOKENS:]
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device="cuda")

    def picture(index: int) -> tuple[float, float]:
        moments: list[float] = []

        def stepped(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            torch.cuda.synchronize()
            moments.append(time.perf_counter())
            return values

        started = time.perf_counter()
        (positive, mask), (negative, negative_mask) = embed(), embed()
        pipeline(
            prompt_embeds=positive,
            prompt_embeds_mask=mask,
            negative_prompt_embeds=negative,
            negative_prompt_embeds_mask=negative_mask,
            true_cfg_scale=GUIDANCE,
            height=SIDE_PX,
            width=SIDE_PX,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(index),
            callback_on_step_end=stepped,
        ).images[0].save("/dev/null", format="png")
        step_s = (moments[-1] - moments[0]) / (len(moments) - 1)
        return time.perf_counter() - started, step_s

    async def timed(index: int) -> tuple[float, float]:
        return picture(index)

    return timed


async def _time_runs(picture: Any, steps: int, runs: int) -> Timing:
    await picture(0)
    pairs = [await picture(index + 1) for index in range(runs)]
    print(f"  {steps} steps: {[round(pair[0], 3) for pair in pairs]} s", flush=True)
    return Timing(statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs), runs)


async def run_cluster(steps: int, runs: int, run_dir: Path) -> tuple[Timing, dict[str, Any]]:
    """Gateway and the three services on one GPU, through gRPC."""
    import grpc

    from lightloom.cluster_config import ClusterConfig, GatewayEntry, ModelEntry
    from lightloom.launcher import Cluster
    from protos import gateway_pb2_grpc
    from services.client import CHANNEL_OPTIONS

    entry = ModelEntry(
        source=SOURCE,
        family=FAMILY,
        preset=PRESET,
        device="cuda",
        dtype="bfloat16",
        features={"attention": {}, "compile": {}},
    )
    config = ClusterConfig(models={"qwen": entry}, gateway=GatewayEntry(http_port=0, grpc_port=0))
    work = Work("qwen", SIDE_PX, steps, GUIDANCE)
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    async with Cluster(config, run_dir) as cluster:
        await cluster.wait_ready(540.0)
        ready_s = time.perf_counter() - started
        print(f"  ready after {ready_s:.1f} s", flush=True)
        async with grpc.aio.insecure_channel(cluster.grpc_address, options=CHANNEL_OPTIONS) as channel:
            stub = gateway_pb2_grpc.GatewayStub(channel)
            for index in range(runs + 1):
                outcomes.append(await timed_request(stub, work, index, time.perf_counter()))
                print(f"  {outcomes[-1]}", flush=True)
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        raise RuntimeError(f"the cluster failed: {failed[0]}")
    measured = outcomes[1:]
    timing = Timing(
        statistics.median(o.seconds for o in measured),
        statistics.median(o.busy_s["dit"] for o in measured) / steps,
        runs,
    )
    outside_s = statistics.median(o.outside_s for o in measured)
    facts = {
        "ready_s": ready_s,
        "busy_s": measured[-1].busy_s,
        "outside_s": outside_s,
        "outside_share": outside_s / timing.end_to_end_s,
    }
    return timing, facts


def _child(side: str, steps: int, runs: int) -> dict[str, Any]:
    print(f"{side}:", flush=True)
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.full_size", "--only", side, "--json", str(result)]
        subprocess.run([*command, "--steps", str(steps), "--runs", str(runs)], check=True)
        facts: dict[str, Any] = json.loads(result.read_text())
        return facts


def main() -> None:
    """Runs both sides, or one, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", choices=("stock", "cluster"))
    parser.add_argument("--run-dir", type=Path, default=Path("run/full_size"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.only == "stock":
        facts: dict[str, Any] = asdict(run_stock(args.steps, args.runs))
    elif args.only == "cluster":
        timing, more = asyncio.run(run_cluster(args.steps, args.runs, args.run_dir))
        facts = asdict(timing) | more
    else:
        facts = {
            "work": {"side_px": SIDE_PX, "steps": args.steps, "guidance": GUIDANCE, "preset": PRESET},
            "floor_step_s": 2 * FLOOR_FORWARD_MS / 1000,
            "stock": _child("stock", args.steps, args.runs),
            "cluster": _child("cluster", args.steps, args.runs),
        }
    write_result(args.json, "full_size", facts)


if __name__ == "__main__":
    main()
