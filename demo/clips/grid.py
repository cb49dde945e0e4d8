"""Draws docs/demo_clips.gif: held-out captions and the clips that the demo model makes of them.

`python -m demo.clips.grid`
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from demo.clips.evaluate import CHECKPOINT, held_out, make_clips
from demo.clips.scenes import NUM_FRAMES, SIDE_PX
from demo.grid import FONT, wrapped

TARGET = Path("docs/demo_clips.gif")
COLUMNS, ROWS, GAP_PX, CAPTION_PX, FRAMES_A_SECOND = 4, 2, 60, 72, 16
CHARS_A_LINE = 32


def main() -> None:
    """The first captions of the evaluation, in its order: nothing is picked."""
    prompts = [caption.text for _, caption in held_out(COLUMNS * ROWS)]
    clips = make_clips(CHECKPOINT, prompts, steps=20, guidance=4.0, batch=len(prompts), device=torch.device("cpu"))
    captions = Image.new("RGB", (COLUMNS * (SIDE_PX + GAP_PX), ROWS * (SIDE_PX + CAPTION_PX)), "white")
    pen = ImageDraw.Draw(captions)
    for index, prompt in enumerate(prompts):
        x, y = _place(index)
        pen.multiline_text((x + 2, y + SIDE_PX + 3), wrapped(prompt, CHARS_A_LINE), "black", font=FONT, spacing=2)
    sheets = [np.array(captions) for _ in range(NUM_FRAMES)]
    for index, clip in enumerate(clips):
        x, y = _place(index)
        for sheet, frame in zip(sheets, clip, strict=True):
            sheet[y : y + SIDE_PX, x : x + SIDE_PX] = frame
    first, *others = [Image.fromarray(sheet) for sheet in sheets]
    TARGET.parent.mkdir(exist_ok=True)
    first.save(TARGET, save_all=True, append_images=others, duration=1000 // FRAMES_A_SECOND, loop=0, optimize=True)


def _place(index: int) -> tuple[int, int]:
    """The upper left corner of a clip in px."""
    return index % COLUMNS * (SIDE_PX + GAP_PX), index // COLUMNS * (SIDE_PX + CAPTION_PX)


if __name__ == "__main__":
    main()
