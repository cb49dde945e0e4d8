"""Judges the demo's video model on held-out captions: `python -m demo.clips.evaluate`.

Neither the combinations (colour, shape, path) nor the sentence forms of these captions were trained on. The stock
diffusers pipeline makes the clips, the scorer reads the pixels. Prints shares (0 to 1) and the variance of the
distance covered a frame in square pixels, for the model's clips, for true scenes and for what the autoencoder alone
makes of those; the first two also with each other's captions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from numpy.typing import NDArray

from demo.clips import components
from demo.clips.captions import MovingCaption, held_out_pair
from demo.clips.scenes import NUM_FRAMES, SIDE_PX, MovingScene, draw_clip
from demo.clips.scorer import ClipTotals, score, total

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "wan"

Clip = NDArray[np.uint8]
Pair = tuple[MovingScene, MovingCaption]


def held_out(count: int, seed: int = 1234) -> list[Pair]:
    """Scenes with their captions."""
    rng = Random(seed)
    return [held_out_pair(rng) for _ in range(count)]


def make_clips(
    folder: Path, prompts: list[str], *, steps: int, guidance: float, batch: int, device: torch.device
) -> list[Clip]:
    """Clips of the stock pipeline in fp32; clip `i` has seed `i`."""
    pipeline = components.load(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    clips: list[Clip] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        output = pipeline(
            prompt=part,
            negative_prompt=[""] * len(part),
            guidance_scale=guidance,
            width=SIDE_PX,
            height=SIDE_PX,
            num_frames=NUM_FRAMES,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(start + index) for index in range(len(part))],
            output_type="np",
        )
        clips += list((output.frames * 255).round().astype(np.uint8))
    return clips


@torch.inference_mode()
def code_clips(folder: Path, clips: list[Clip], *, batch: int, device: torch.device) -> list[Clip]:
    """Clips encoded and decoded by the stock autoencoder in fp32."""
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device)
    coded: list[Clip] = []
    for start in range(0, len(clips), batch):
        pixels = torch.from_numpy(np.stack(clips[start : start + batch])).to(device)
        latents = vae.encode(pixels.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()
        frames = (127.5 * (vae.decode(latents).sample + 1)).round().clamp(0, 255).to(torch.uint8)
        coded += list(frames.permute(0, 2, 3, 4, 1).cpu().numpy())
    return coded


def judge(pairs: list[Pair], clips: list[Clip]) -> ClipTotals:
    """The shares of what is right."""
    return total(score(clip, scene, caption.names_speed) for clip, (scene, caption) in zip(clips, pairs, strict=True))


def shuffled(pairs: list[Pair]) -> list[Pair]:
    """Each pair in its neighbour's place."""
    return pairs[1:] + pairs[:1]


def main() -> None:
    """Makes clips, judges, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = held_out(args.captions)
    prompts = [caption.text for _, caption in pairs]
    clips = make_clips(args.model, prompts, steps=args.steps, guidance=args.guidance, batch=args.batch, device=device)
    true_clips = [draw_clip(scene) for scene, _ in pairs]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    facts = {
        "device": name,
        "steps": args.steps,
        "guidance": args.guidance,
        "model": asdict(judge(pairs, clips)),
        "model_shuffled_captions": asdict(judge(shuffled(pairs), clips)),
        "autoencoder": asdict(judge(pairs, code_clips(args.model, true_clips, batch=args.batch, device=device))),
        "true_scenes": asdict(judge(pairs, true_clips)),
        "true_scenes_shuffled_captions": asdict(judge(shuffled(pairs), true_clips)),
    }
    text = json.dumps(facts, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
