"""The `lightloom` command: start a cluster, make pictures, look at what happens.

Commands import what they need when they run, so that `--help` and `generate` start at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from services.errors import ServiceError, StartupError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RunDir = Annotated[Path, typer.Option("--run-dir", help="Folder of a running cluster.")]
Address = Annotated[str, typer.Option("--address", help="host:port of a gateway; default: the cluster in --run-dir.")]
DEFAULT_RUN_DIR = Path(".lightloom")


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
def generate(
    prompt: str,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; its ending chooses the format.")
    ] = Path("out.png"),
    model: Annotated[str, typer.Option(help="Model name; default: the only one served.")] = "",
    negative_prompt: Annotated[str | None, typer.Option()] = None,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels; default: the model's own.")] = "",
    steps: Annotated[int | None, typer.Option()] = None,
    guidance: Annotated[float | None, typer.Option()] = None,
    guidance_2: Annotated[float | None, typer.Option(help="Of the second expert; default: guidance.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of a clip.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Input picture of an edit model, repeatable.")
    ] = None,
    address: Address = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Make a picture (or clip) from a prompt, with a live progress bar."""
    from lightloom.generate import Wish, generate_to_file

    wish = Wish(
        prompt, model, negative_prompt, size, steps, guidance, seed, frames, tuple(image or ()), fps, guidance_2
    )
    generate_to_file(wish, output, grpc_address(address, run_dir))


@app.command()
def status(address: Address = "", run_dir: RunDir = DEFAULT_RUN_DIR, limit: int = 20) -> None:
    """Show models, replicas and the newest requests."""
    from lightloom.show import show_status

    show_status(grpc_address(address, run_dir), run_dir, limit)


@app.command()
def abort(request_id: str, address: Address = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Abort a request, queued or running."""
    from lightloom.client import Client

    with Client(grpc_address(address, run_dir)) as client:
        typer.echo(client.abort(request_id))


@app.command()
def trace(request_id: str, address: Address = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Draw one request's timeline over all processes."""
    from lightloom.show import show_trace

    show_trace(request_id, grpc_address(address, run_dir))


@app.command()
def scale(
    replicas: Annotated[list[str], typer.Argument(help="STAGE=COUNT, for example dit=3.")],
    model: Annotated[str, typer.Option(help="Only this model's stages.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Change the number of replicas of a stage while requests run."""
    from lightloom.cluster_config import parse_replicas
    from lightloom.launcher import ask
    from lightloom.show import show_processes

    show_processes(
        ask(run_dir, {"command": "scale", "model": model, "replicas": parse_replicas(replicas)})["processes"]
    )


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
    rates: Annotated[Path | None, typer.Option(help="Measured rates (TOML); default: H100 with NVLink.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every layout.")] = False,
) -> None:
    """Show which layouts of a denoiser fit on so many GPUs, and which is expected to be fastest. Runs nothing."""
    from lightloom.plan_show import Wish, show_plan

    wish = Wish(model, family, preset, gpus, memory, size, frames, guidance, text_tokens)
    show_plan(wish, rates, everything=everything)


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


def grpc_address(address: str, run_dir: Path) -> str:
    """The address that was given, or the one of the cluster in the run folder.

    Raises:
        StartupError: neither.
    """
    if address:
        return address
    import json

    try:
        facts: dict[str, Any] = json.loads((run_dir / "cluster.json").read_text())
    except FileNotFoundError as error:
        raise StartupError(f"no cluster runs in {run_dir}: start one with `lightloom up`, or give --address") from error
    return str(facts["grpc"])


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        app()
    except (StartupError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, StartupError) else 1) from None
