"""Judges the demo model on held-out captions: `python -m demo.evaluate`.

Neither the combinations (shape, colour, relation) nor the sentence forms of these captions were trained on. The stock
diffusers pipeline draws, the scorer reads the pixels. Prints shares (0 to 1) for all captions, by number of objects,
and for small objects; also the scorer's own figures on true scenes and on shuffled captions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from demo import components
from demo.captions import Caption, held_out_pair
from demo.scenes import Scene, draw
from demo.scorer import SceneScore, score, total

CHECKPOINT = Path(__file__).parent / "checkpoints" / "qwen_image"
NEGATIVE_PROMPT = " "

Picture = NDArray[np.uint8]


def held_out(count: int, seed: int = 1234) -> list[tuple[Scene, Caption]]:
    """Scenes of one, two and three objects in turn, with their captions."""
    rng = Random(seed)
    return [held_out_pair(rng, 1 + index % 3) for index in range(count)]


def draw_with_model(
    folder: Path, prompts: list[str], *, steps: int, guidance: float, batch: int, device: torch.device
) -> list[Picture]:
    """Pictures of the stock pipeline in fp32; picture `i` has seed `i`."""
    pipeline = components.pipeline_of(components.load(folder)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Picture] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        output = pipeline(
            prompt=part,
            negative_prompt=[NEGATIVE_PROMPT] * len(part),
            true_cfg_scale=guidance,
            width=256,
            height=256,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(start + index) for index in range(len(part))],
            output_type="np",
        )
        pictures += list((output.images * 255).round().astype(np.uint8))
    return pictures


def report(pairs: list[tuple[Scene, Caption]], pictures: list[Picture]) -> dict[str, Any]:
    """The shares, by kind."""
    scores = [score(picture, scene) for picture, (scene, _) in zip(pictures, pairs, strict=True)]

    def share(keep: list[bool]) -> dict[str, float]:
        return asdict(total(s for s, kept in zip(scores, keep, strict=True) if kept))

    counts = [len(scene.objects) for scene, _ in pairs]
    return {
        "all": share([True] * len(pairs)),
        "one_object": share([count == 1 for count in counts]),
        "two_objects": share([count == 2 for count in counts]),
        "three_objects": share([count == 3 for count in counts]),
        "small_objects": _small(pairs, scores),
    }


def scorer_report(pairs: list[tuple[Scene, Caption]]) -> dict[str, float]:
    """Share of agreement of the scorer on true scenes, and on each scene's picture with the next one's caption."""
    pictures = [draw(scene) for scene, _ in pairs]
    scenes = [scene for scene, _ in pairs]
    shuffled = scenes[1:] + scenes[:1]
    return {
        "true_scenes": total(score(p, s) for p, s in zip(pictures, scenes, strict=True)).agree,
        "shuffled_captions": total(score(p, s) for p, s in zip(pictures, shuffled, strict=True)).agree,
    }


def _small(pairs: list[tuple[Scene, Caption]], scores: list[SceneScore]) -> dict[str, float]:
    """Objects that the caption calls small."""
    verdicts = [
        found.right
        for (scene, caption), result in zip(pairs, scores, strict=True)
        for item, found in zip(scene.objects, result.objects, strict=True)
        if item.size == "small" and caption.names_sizes
    ]
    return {"count": len(verdicts), "objects": sum(verdicts) / max(1, len(verdicts))}


def main() -> None:
    """Draws, judges, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = held_out(args.captions)
    prompts = [caption.text for _, caption in pairs]
    pictures = draw_with_model(
        args.model, prompts, steps=args.steps, guidance=args.guidance, batch=args.batch, device=device
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    facts = {"device": name, "steps": args.steps, "guidance": args.guidance, "captions": args.captions}
    facts |= {"model": report(pairs, pictures), "scorer": scorer_report(pairs)}
    text = json.dumps(facts, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
