"""`lightloom key`: make, list and revoke the API keys of a gateway. The file holds hashes only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="API keys of a gateway (the file that access.keys_file names).")

File = Annotated[Path, typer.Option("--file", help="Keys file; a running gateway follows its changes.")]
DEFAULT_FILE = Path("keys.jsonl")


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Who or what the key is for.")],
    scope: Annotated[list[str], typer.Option(help="generate, read, read_all or abort; repeatable.")],
    tenant: Annotated[str, typer.Option(help="Whose requests it makes and sees; default: the name.")] = "",
    requests_per_minute: Annotated[float, typer.Option(help="0: no limit.")] = 0.0,
    cost_per_hour: Annotated[
        float, typer.Option(help="Megapixel-steps (width * height * frames * steps / 10^6); 0: no limit.")
    ] = 0.0,
    file: File = DEFAULT_FILE,
) -> None:
    """Make a key. It is printed once, and stored nowhere."""
    from gateway.keys import ApiKey, create_key

    key = ApiKey(
        id="",
        name=name,
        tenant=tenant or name,
        scopes=tuple(scope),
        sha256="",
        requests_per_minute=requests_per_minute,
        cost_per_hour=cost_per_hour,
    )
    typer.echo(create_key(file, key))


@app.command("list")
def list_keys(file: File = DEFAULT_FILE) -> None:
    """Show the keys: names and what they allow."""
    import time

    from rich.console import Console
    from rich.table import Table

    from gateway.keys import read_keys

    table = Table("id", "name", "tenant", "scopes", "requests/min", "cost/h", "created", box=None)
    for key in read_keys(file):
        created = time.strftime("%Y-%m-%d", time.gmtime(key.created_unix_s))
        quotas = [f"{quota:g}" if quota else "-" for quota in (key.requests_per_minute, key.cost_per_hour)]
        table.add_row(key.id, key.name, key.tenant, ", ".join(key.scopes), *quotas, created)
    Console().print(table)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="Name or id of the key.")], file: File = DEFAULT_FILE) -> None:
    """Take a key away. Gateways refuse it from the next call on."""
    from gateway.keys import revoke_key

    key = revoke_key(file, name)
    typer.echo(f"revoked {key.name} ({key.id})")
