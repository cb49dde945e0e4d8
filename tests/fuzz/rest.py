"""schemathesis on the REST API of a real gateway: `python -m tests.fuzz.rest --seconds 600`.

Needs `pip install schemathesis==4.32.5`. Every answer must have a status, a content type and a body that the OpenAPI
page announces, and none may be a server error. The stages behind the gateway do nothing, at once.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.scale import cluster

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


async def fuzz(seconds: int, seed: int) -> int:
    """The exit code of schemathesis."""
    with TemporaryDirectory() as name:
        async with cluster(Path(name), 1, stage_module="tests.fuzz.instant_stage") as running:
            command = [
                *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{running.http}/openapi.json"),
                *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing,stateful"),
                *("--max-time", str(seconds), "--seed", str(seed), "--continue-on-failure", "--request-timeout", "30"),
            ]
            return (await asyncio.to_thread(subprocess.run, command, check=False)).returncode


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(fuzz(arguments.seconds, arguments.seed)))


if __name__ == "__main__":
    main()
