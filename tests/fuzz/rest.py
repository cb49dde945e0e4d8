"""schemathesis on the REST API of a real gateway: `python -m tests.fuzz.rest --seconds 600`.

Needs `pip install schemathesis==4.32.5`. Every answer must have a status, a content type and a body that the OpenAPI
page announces, and none may be a server error; what breaks a schema, and what comes without a key, is refused. The
stages behind the gateway do nothing, at once. A run is repeated by its seed.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.scale import cluster
from gateway.keys import ApiKey, create_key
from services.config import environment_with_malloc

ROOT = Path(__file__).resolve().parents[2]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "ignored_auth",
    "unsupported_method",
)


async def fuzz(seconds: int, seed: int) -> int:
    """The exit code of schemathesis."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        key = ApiKey(id="", name="fuzz", tenant="fuzz", scopes=("generate", "read", "abort"), sha256="")
        api_key = create_key(folder / "keys.jsonl", key)
        access: dict[str, Any] = {"keys_file": folder / "keys.jsonl", "api_key": api_key}
        async with cluster(folder, 1, stage_module="tests.fuzz.instant_stage", **access) as running:
            code = await asyncio.to_thread(_schemathesis, folder, running.http, api_key, seconds, seed)
            headers = {"Authorization": f"Bearer {api_key}"}
            async with httpx.AsyncClient(base_url=running.http, headers=headers, timeout=60) as rest:
                listed = (await rest.get("/v1/requests", params={"limit": 1000})).json()["data"]
            print("the newest requests that were accepted:", dict(Counter(request["state"] for request in listed)))
            return code


def _schemathesis(folder: Path, url: str, api_key: str, seconds: int, seed: int) -> int:
    options = {
        "header": f"Authorization: Bearer {api_key}",
        "checks": ",".join(CHECKS),
        "phases": "examples,coverage,fuzzing,stateful",
        "max-time": seconds,
        "seed": seed,
        "request-timeout": 30,
    }
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "run", f"{url}/openapi.json", "--continue-on-failure"]
    command += [f"--{option}={value}" for option, value in options.items()]
    environment = environment_with_malloc() | {"SCHEMATHESIS_HOOKS": "tests.fuzz.rest_hooks", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=False, cwd=folder, env=environment).returncode


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(fuzz(arguments.seconds, arguments.seed)))


if __name__ == "__main__":
    main()
