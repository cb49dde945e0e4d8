"""The `lightloom` command: start a cluster, make pictures, look at what happens.

Commands import what they need when they run, so that `--help` and `generate` start at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lightloom.connection import DEFAULT_RUN_DIR, Connection, RunDir, connected
from lightloom.key_commands import app as key_app
from services.errors import ServiceError, StartupError, Unauthenticated

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

app.add_typer(key_app, name="key")


def print_version(wanted: bool) -> None:
    """Of the installed package."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lightloom {version('lightloom')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Start a cluster, make pictures, look at what happens."""


@app.command()
def up(
    config: Annotated[Path, typer.Option("--config", help="Cluster file (TOML).")] = Path("deploy/config/demo.toml"),
    replicas: Annotated[list[str] | None, typer.Option("--replicas", help="STAGE=COUNT, repeatable.")] = None,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Start everything on this machine and serve until Ctrl-C."""
    import asyncio

    from lightloom.up import serve

    asyncio.run(serve(config, replicas or [], run_dir))


@app.command()
@connected
def generate(
    connection: Connection,
    prompt: str,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write; its ending chooses the format. Default: out.png, out.mp4."),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Make a clip.")] = False,
    model: Annotated[str, typer.Option(help="Model name; default: the only one served.")] = "",
    negative_prompt: Annotated[str | None, typer.Option()] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; default: the model's own.")] = "",
    steps: Annotated[int | None, typer.Option()] = None,
    guidance: Annotated[float | None, typer.Option()] = None,
    guidance_2: Annotated[float | None, typer.Option(help="Of the second expert; default: guidance.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of a clip.")] = None,
    interpolate: Annotated[int, typer.Option(min=0, help="How often to double a clip's frames and rate.")] = 0,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Picture to edit, to begin a clip with, or to refer to; repeatable."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Where to edit: transparent of a picture's, white of a control video's mask.")
    ] = None,
    last_image: Annotated[Path | None, typer.Option(help="Picture that a clip ends with.")] = None,
    control_video: Annotated[Path | None, typer.Option(help="MP4 file that steers a clip (input video).")] = None,
) -> None:
    """Make a picture (or clip) from a prompt, with a live progress bar."""
    from lightloom.generate import Wish, generate_to_file

    wish = Wish(
        prompt,
        model=model,
        negative_prompt=negative_prompt,
        size=size,
        steps=steps,
        guidance=guidance,
        guidance_2=guidance_2,
        seed=seed,
        frames=frames,
        fps=fps,
        video=video,
        interpolate=interpolate,
        images=tuple(image or ()),
        last_image=last_image,
        control_video=control_video,
        mask=mask,
    )
    generate_to_file(wish, output or Path("out.mp4" if video else "out.png"), connection)


@app.command()
@connected
def status(
    connection: Connection,
    limit: Annotated[int, typer.Option(help="Requests to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show processes, models, replicas and the newest requests."""
    from lightloom.show import show_status

    show_status(connection, limit, as_json=as_json)


@app.command()
@connected
def abort(
    connection: Connection,
    request_id: Annotated[str, typer.Argument(help="The whole id, so that no other request is hit.")],
) -> None:
    """Abort a request, queued or running."""
    with connection.open() as client:
        typer.echo(client.abort(request_id))


@app.command()
@connected
def trace(
    connection: Connection,
    request_ids: Annotated[list[str], typer.Argument(help="Whole ids, or at least the first 6 characters of each.")],
) -> None:
    """Draw a request's timeline over all processes, or those of several on one clock."""
    from lightloom.show import show_trace

    show_trace(connection, request_ids)


@app.command()
def scale(
    replicas: Annotated[list[str], typer.Argument(help="STAGE=COUNT, for example dit=3 or dit.low_noise=2.")],
    model: Annotated[str, typer.Option(help="Only this model's stages.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Change the number of replicas of a stage while requests run. Does not wait until new ones serve."""
    from lightloom.cluster_config import parse_replicas
    from lightloom.show import show_scaled

    show_scaled(run_dir, model, parse_replicas(replicas))


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A model folder, or random:SEED with --family and --preset.")],
    gpus: Annotated[int, typer.Option(help="Ranks of the group, a GPU each.")],
    family: Annotated[str, typer.Option(help="Of random weights.")] = "",
    preset: Annotated[str, typer.Option(help="Of random weights.")] = "",
    memory: Annotated[str, typer.Option(help="Of each GPU, as 80GiB; default: this machine's GPU, or 80GiB.")] = "",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; default: the model's own.")] = "",
    frames: Annotated[int | None, typer.Option(help="Frames of a clip; default: the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    text_tokens: Annotated[int, typer.Option(help="Of the prompt, for models that take any number.")] = 512,
    offload_experts: Annotated[
        bool, typer.Option("--offload-experts", help="With engine.offload_experts: of two experts, one on each GPU.")
    ] = False,
    expert: Annotated[str, typer.Option(help="The one that a denoiser holds; default: all the model has.")] = "",
    rates: Annotated[Path | None, typer.Option(help="Measured rates (TOML); default: H100 with NVLink.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every layout.")] = False,
) -> None:
    """Show which layouts of a denoiser fit on so many GPUs, and which is expected to be fastest. Runs nothing."""
    from lightloom.plan_rates import read_rates
    from lightloom.plan_wish import Wish

    wish = Wish(model, family, preset, gpus, memory, size, frames, guidance, text_tokens, offload_experts, expert)
    # What imports torch takes seconds: a wrong option need not wait for it.
    wish.check()
    read = read_rates(rates)

    from lightloom.plan_show import show_plan

    show_plan(wish, read, everything=everything)


@app.command()
def features() -> None:
    """Print which feature works with which model family, and why where it does not."""
    from lightloom.show import show_features

    show_features()


@app.command()
def doctor(
    run_dir: RunDir = DEFAULT_RUN_DIR, config: Annotated[Path, typer.Option()] = Path("deploy/config/demo.toml")
) -> None:
    """Check this machine: versions, GPU, Redis and its policy, ports, disk."""
    from lightloom.doctor import examine, show

    raise typer.Exit(show(examine(config, run_dir)))


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        app()
    except (StartupError, ServiceError) as error:
        key = "; commands take it from LIGHTLOOM_API_KEY" if isinstance(error, Unauthenticated) else ""
        print(f"error: {error}{key}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, StartupError) else 1) from None
