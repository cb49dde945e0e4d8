"""`lightloom generate`: one request with a live progress bar; Ctrl-C aborts it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightloom import client
from lightloom.connection import Connection
from services.errors import StartupError
from services.request import VIDEO_FORMATS, Media, check_total

FILES = ("png", "jpeg", "webp", "gif", "mp4", "wav", "flac", "raw", "zip")
FORMATS = {".jpg": "jpeg"} | {f".{name}": name for name in FILES}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    prompt: str
    model: str = ""
    negative_prompt: str | None = None
    size: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    frames: int | None = None
    images: tuple[Path, ...] = ()
    fps: float | None = None
    guidance_2: float | None = None
    video: bool = False
    interpolate: int = 0
    last_image: Path | None = None
    control_video: Path | None = None
    mask: Path | None = None

    def inputs(self) -> tuple[Media, ...]:
        """Pictures and clips, each with what it is for.

        Raises:
            StartupError: one cannot be read.
            InvalidRequest: they are too large together.
        """
        others = {"last_image": self.last_image, "video": self.control_video, "mask": self.mask}
        given = [("image", path) for path in self.images] + [(role, path) for role, path in others.items() if path]
        inputs = []
        for role, path in given:
            try:
                inputs.append(Media("", path.read_bytes(), role))
            except OSError as error:
                raise StartupError(f"the input {path} cannot be read: {error.strerror}") from error
        check_total(inputs, "inputs")
        return tuple(inputs)

    def options(self, output: Path) -> dict[str, Any]:
        """As fields of GenerationParams.

        Raises:
            StartupError: a size or an ending that cannot be read, no folder to write to.
        """
        if output.is_dir():
            raise StartupError(f"{output} is a folder: name a file, for example {output / 'out.png'}")
        if not output.parent.is_dir():
            raise StartupError(f"{output} cannot be written: there is no folder {output.parent}")
        if output.suffix.lower() not in FORMATS:
            raise StartupError(f"{output} ends with {output.suffix!r}: use one of {', '.join(FORMATS)}")
        if self.video and FORMATS[output.suffix.lower()] not in VIDEO_FORMATS:
            endings = ", ".join(f".{name}" for name in VIDEO_FORMATS)
            raise StartupError(f"--video writes {endings}: {output} is none of them")
        width, _, height = self.size.partition("x")
        if self.size and not (width.isdigit() and height.isdigit()):
            raise StartupError(f"--size is {self.size!r}: write WIDTHxHEIGHT, for example 256x256")
        return {
            "negative_prompt": self.negative_prompt,
            "width": int(width) if self.size else None,
            "height": int(height) if self.size else None,
            "steps": self.steps,
            "guidance": self.guidance,
            "guidance_2": self.guidance_2,
            "seed": self.seed,
            "num_frames": self.frames,
            "fps": self.fps,
            "output_format": FORMATS[output.suffix.lower()],
            "enable_frame_interpolation": bool(self.interpolate),
            "frame_interpolation_exp": self.interpolate or None,
        }


def generate_to_file(wish: Wish, output: Path, connection: Connection) -> client.Result:
    """Makes it, shows progress, writes the file and says what each stage took.

    Raises:
        StartupError, ServiceError: the request cannot be made or failed, or the cluster does not answer.
        KeyboardInterrupt: after Ctrl-C; the request is aborted.
    """
    console = Console(stderr=True)
    options, inputs = wish.options(output), wish.inputs()
    started_s = time.perf_counter()
    request_id = ""
    with (
        Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # Into a file or a pipe, a bar would be nothing but blank lines.
            disable=not console.is_terminal,
        ) as bar,
        connection.open() as gateway,
    ):
        task = bar.add_task("queued", total=1)

        def show(progress: client.Progress) -> None:
            nonlocal request_id
            request_id = progress.request_id
            if progress.frames:
                bar.update(task, description="frames", completed=progress.frames, total=progress.total_frames)
            else:
                bar.update(task, description=progress.state, completed=progress.step, total=progress.total or 1)

        try:
            result = gateway.generate(wish.prompt, model=wish.model, on_progress=show, images=inputs, **options)
        except KeyboardInterrupt:
            console.print(f"aborted request {request_id}" if request_id else "aborted")
            raise
    seconds = time.perf_counter() - started_s
    result.save(output)
    stages = ", ".join(f"{stage} {busy_s:.2f} s" for stage, busy_s in sorted(result.busy_s.items()))
    size = f"{result.width}x{result.height}"
    if result.num_frames > 1 and not result.fps:
        size += f", {result.num_frames} layers"
    elif result.num_frames > 1:
        size += f", {result.num_frames} frames at {result.fps:g} a second"
    console.print(f"{output}  {size}, seed {result.seed}, {seconds:.2f} s in all ({stages})", soft_wrap=True)
    console.print(f"request {result.request_id}", style="dim", soft_wrap=True)
    return result
