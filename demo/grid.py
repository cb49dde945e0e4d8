"""Draws docs/demo_grid.png: held-out captions and what the demo model makes of them. `python -m demo.grid`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from demo.evaluate import CHECKPOINT, draw_with_model, held_out

TARGET = Path("docs/demo_grid.png")
COLUMNS, ROWS, SIDE_PX, CAPTION_PX = 4, 2, 192, 84
CHARS_A_LINE = 34
FONT = ImageFont.load_default(11)


def main() -> None:
    """The first captions of the evaluation, in its order: nothing is picked."""
    prompts = [caption.text for _, caption in held_out(COLUMNS * ROWS)]
    pictures = draw_with_model(
        CHECKPOINT, prompts, steps=20, guidance=4.0, batch=len(prompts), device=torch.device("cpu")
    )
    sheet = Image.new("RGB", (COLUMNS * (SIDE_PX + 8), ROWS * (SIDE_PX + CAPTION_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = index % COLUMNS * (SIDE_PX + 8), index // COLUMNS * (SIDE_PX + CAPTION_PX)
        sheet.paste(Image.fromarray(picture).resize((SIDE_PX, SIDE_PX)), (x, y))
        pen.multiline_text((x + 2, y + SIDE_PX + 3), wrapped(prompt, CHARS_A_LINE), "black", font=FONT, spacing=2)
    TARGET.parent.mkdir(exist_ok=True)
    sheet.save(TARGET, optimize=True)


def wrapped(text: str, chars_a_line: int) -> str:
    """Words in lines of fewer characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= chars_a_line:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    main()
