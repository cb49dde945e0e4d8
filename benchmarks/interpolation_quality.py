"""What interpolated pictures are worth: hidden frames of real clips, and moving layers of photographs.

Every second frame of a clip is hidden and made of its neighbours: by the network, by blending, and by warping along
OpenCV's DIS flow (`pip install opencv-python-headless`; without it, that column is empty). Figures are PSNR in dB.
Pairs with a scene cut between them have no right answer and are counted apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.interpolation.evaluate import mean_psnr, psnr
from demo.interpolation.layers import FAR, NEAR, Painter
from demo.interpolation.photographs import HELD_OUT, read_tiles
from interpolation_svc.clip import Clip
from interpolation_svc.cuts import cuts, thumbnails
from interpolation_svc.ifnet import IFNet

MOVING_PX = 2.0
SIDE_PX = 256

Picture = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Triplet:
    """PSNR in dB of a hidden frame by each way, and how far things move between its neighbours (mean, px)."""

    ours: float
    blending: float
    dis: float | None
    flow_px: float | None


def clip_figures(net: IFNet, path: Path, pairs: int) -> dict[str, Any]:
    """Figures of each clip of a folder (or of one file), and of all pairs together whose mean flow is above 2 px."""
    dis = dis_flow()
    facts: dict[str, Any] = {}
    everything: list[Triplet] = []
    for file in sorted(path.glob("*.mp4")) if path.is_dir() else [path]:
        found, at_cuts = judge(net, file, pairs, dis)
        everything += found
        facts[file.stem] = means(found) | {"pairs_at_cuts": at_cuts}
        print(f"{file.stem}: {facts[file.stem]}", flush=True)
    moving = [triplet for triplet in everything if (triplet.flow_px or 0.0) > MOVING_PX]
    facts["all pairs above 2 px"] = means(moving)
    print(f"all pairs above {MOVING_PX} px: {means(moving)}", flush=True)
    return facts


def judge(net: IFNet, file: Path, pairs: int, dis: Any) -> tuple[list[Triplet], int]:
    """The hidden frames of one clip, `pairs` at most and spread over it, and how many stood at a cut."""
    frames = list(decoded(file))
    starts = range(0, len(frames) - 2, 2)
    found, at_cuts = [], 0
    for index in np.unique(np.linspace(0, len(starts) - 1, min(pairs, len(starts))).astype(int)):
        first, hidden, second = frames[starts[index] : starts[index] + 3]
        thumbs = thumbnails(as_floats(np.stack([first, hidden, second])))
        if cuts(thumbs[:-1], thumbs[1:]).any():
            at_cuts += 1
            continue
        ours = torch.cat(list(Clip(net, 1, 1.0, 2).add(torch.from_numpy(np.stack([first, second])))))[1]
        blending = torch.lerp(as_floats(first[None]), as_floats(second[None]), 0.5)
        warped, flow_px = dis(first, second) if dis else (None, None)
        found.append(
            Triplet(
                ours=decibels(as_floats(ours.numpy()[None]), hidden),
                blending=decibels(blending, hidden),
                dis=None if warped is None else decibels(as_floats(warped[None]), hidden),
                flow_px=flow_px,
            )
        )
    return found, at_cuts


def means(triplets: list[Triplet]) -> dict[str, Any]:
    """Means over pairs, and the gains that count."""
    if not triplets:
        return {"pairs": 0}
    ours, blending = (statistics.mean(getattr(t, name) for t in triplets) for name in ("ours", "blending"))
    facts: dict[str, Any] = {"pairs": len(triplets), "ours_db": ours, "blending_db": blending}
    facts["over_blending_db"] = ours - blending
    with_flow = [(t.dis, t.flow_px) for t in triplets if t.dis is not None and t.flow_px is not None]
    if with_flow:
        dis, flow_px = (statistics.mean(column) for column in zip(*with_flow, strict=True))
        facts |= {"dis_db": dis, "over_dis_db": ours - dis, "mean_flow_px": flow_px}
    return {name: round(value, 2) for name, value in facts.items()}


def decoded(file: Path) -> Iterator[Picture]:
    """The frames of a clip, RGB."""
    import av

    open_container: Any = av.open
    with open_container(str(file)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def as_floats(pictures: Picture) -> torch.Tensor:
    """[N, H, W, 3] to [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def decibels(picture: torch.Tensor, hidden: Picture) -> float:
    """PSNR of a made picture [1, 3, H, W] against the hidden one."""
    return psnr(picture, as_floats(hidden[None])).item()


def dis_flow() -> Callable[[Picture, Picture], tuple[Picture, float]] | None:
    """What makes the middle of two pictures by DIS flow, and says how far things move; None without OpenCV.

    Flow both ways gives the flow from the middle to either side, by the rule of arXiv 1712.00080 (equation 4); the two
    warped pictures are averaged.
    """
    try:
        import cv2
    except ImportError:
        return None
    flow: Any = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def middle(first: Picture, second: Picture) -> tuple[Picture, float]:
        gray = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (first, second)]
        forth, back = flow.calc(gray[0], gray[1], None), flow.calc(gray[1], gray[0], None)
        y, x = np.mgrid[: first.shape[0], : first.shape[1]].astype(np.float32)
        to_first = 0.25 * (back - forth)
        warped = [
            cv2.remap(
                picture,
                x + sign * to_first[..., 0],
                y + sign * to_first[..., 1],
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            for picture, sign in ((first, 1), (second, -1))
        ]
        mixed = np.mean(np.stack(warped).astype(np.float32), axis=0).round().astype(np.uint8)
        return mixed, float(np.linalg.norm(forth, axis=-1).mean())

    return middle


def photograph_figures(net: IFNet, folder: Path, count: int) -> dict[str, Any]:
    """Moving layers of held-out photographs, up to 24 px and as far as in training, in the middle and at a quarter."""
    painter = Painter(read_tiles(folder, HELD_OUT).to(next(net.parameters()).device))
    facts = {}
    for name, ranges, wanted in (
        ("at 0.5", NEAR, 0.5),
        ("at 0.25", NEAR, 0.25),
        ("far, at 0.5", FAR, 0.5),
        ("far, at 0.25", FAR, 0.25),
    ):
        ours, blending = mean_psnr(
            net, painter, count=count, side_px=SIDE_PX, wanted=wanted, plain_share=0.0, ranges=ranges
        )
        row = {"ours_db": ours, "blending_db": blending, "over_blending_db": ours - blending}
        facts[name] = {column: round(value, 2) for column, value in row.items()}
        print(f"moving layers {name}: {facts[name]}", flush=True)
    return facts
