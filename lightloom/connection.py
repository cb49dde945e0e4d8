"""Which gateway a command calls: the options for it, once for all commands, and the client that they name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightloom.control import ask
from services.config import TlsSection
from services.errors import NotReady, StartupError

if TYPE_CHECKING:
    from lightloom.client import Client

RunDir = Annotated[Path, typer.Option("--run-dir", help="Folder of a running cluster.")]
DEFAULT_RUN_DIR = Path(".lightloom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The gateway at an address, or the first one of the cluster in a run folder; the key is in LIGHTLOOM_API_KEY."""

    address: Annotated[
        str, typer.Option("--address", help="host:port of a gateway's gRPC; default: the cluster in --run-dir.")
    ] = ""
    run_dir: RunDir = DEFAULT_RUN_DIR
    ca: Annotated[
        str, typer.Option("--ca", help="Certificate that signed the gateway's (PEM); `system`: a public authority.")
    ] = ""
    cert: Annotated[str, typer.Option("--cert", help="Client certificate (PEM), if the gateway asks for one.")] = ""
    cert_key: Annotated[str, typer.Option("--cert-key", help="The client certificate's key (PEM).")] = ""

    def open(self) -> Client:
        """A client to it.

        Raises:
            StartupError: no address, and no cluster runs in the folder; or a certificate that cannot be used.
            NotReady: the cluster in the folder is still starting.
        """
        from lightloom.client import Client

        address = self.address or self._address_of_own_cluster()
        return Client(address, tls=TlsSection(ca=self.ca, cert=self.cert, key=self.cert_key))

    def cluster(self) -> dict[str, Any] | None:
        """What the `lightloom up` in the run folder says of its processes; None when none runs there, but an address
        is given.

        Raises:
            StartupError: as `open`.
        """
        try:
            return self._own_cluster()
        except StartupError:
            if not self.address:
                raise
            # The processes of a remote cluster are not ours to see.
            return None

    def _own_cluster(self) -> dict[str, Any]:
        try:
            return ask(self.run_dir, {"command": "status"})
        except StartupError as error:
            raise StartupError(f"{error}; --address names a gateway elsewhere") from error

    def _address_of_own_cluster(self) -> str:
        facts = self._own_cluster()
        if not facts["ready"]:
            late = [row["name"] for row in facts["processes"] if row["state"] != "serving"]
            waits = f": it waits for {', '.join(late)}" if late else ""
            raise NotReady(f"the cluster in {self.run_dir} is still starting{waits}", retry_after_s=1.0)
        return str(facts["grpc"])


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a Connection in the place of its parameter `connection`."""
    options = inspect.signature(Connection, eval_str=True).parameters

    @functools.wraps(command)
    def call(**arguments: Any) -> None:
        connection = Connection(**{name: arguments.pop(name) for name in options})
        command(connection=connection, **arguments)

    own = inspect.signature(command, eval_str=True)
    rest = [parameter for name, parameter in own.parameters.items() if name != "connection"]
    call.__signature__ = own.replace(parameters=[*rest, *options.values()])  # type: ignore[attr-defined]
    return call
