"""Whether replicas of several ranks, and features, fit their models and this machine, asked before anything is started.

Only the stages' own code knows, and it takes seconds to import: a process of its own does so, and only where a config
asks for one of them.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from lightloom.child import STARTUP_ERROR_CODE
from lightloom.cluster_config import ClusterConfig, stage_table
from lightloom.with_parent import with_parent
from services.config import StageConfig, environment_with_malloc, parse
from services.errors import StartupError
from services.parallel.degrees import Degrees

# Where `check_layout` of a stage is.
CHECKS = {"dit": "dit_svc.loading", "text_encoder": "text_encoder_svc.engine", "vae": "vae_svc.loading"}


# A model, a stage or `dit.EXPERT` of it, and the config of its replicas.
Stage = tuple[str, str, dict[str, Any]]


def special_stages(config: ClusterConfig) -> list[Stage]:
    """Those whose replicas have several ranks, features or experts that wait in the host's memory."""
    return [
        (model, kind, stage_table(config, model, kind))
        for model, entry in config.models.items()
        for kind in entry.stages
        if Degrees.of(entry.parallel_of(kind)).world > 1
        or (kind.partition(".")[0] == "dit" and (entry.features or entry.engine.offload_experts))
    ]


async def check_layouts(stages: Sequence[Stage]) -> None:
    """Asks whether they fit.

    Raises:
        StartupError: heads, blocks or GPUs that the degrees do not fit, with numbers that would do.
    """
    process = await asyncio.create_subprocess_exec(
        *with_parent((sys.executable, "-m", "lightloom.layouts")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment_with_malloc(),
        start_new_session=True,
    )
    try:
        _, said = await process.communicate(json.dumps(stages).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise StartupError(said.decode(errors="replace").strip().rpartition("\n")[2] or "the layouts cannot be checked")


def refusal(model: str, kind: str, table: dict[str, Any]) -> str:
    """Why such a replica cannot start; empty where it can."""
    from services.lockstep import take_gpus

    # The port is none that anything listens on.
    config = parse(StageConfig, table | {"service": table["service"] | {"port": 0}})
    try:
        take_gpus(config)
        importlib.import_module(CHECKS[kind.partition(".")[0]]).check_layout(config)
    except StartupError as error:
        return f"model {model!r}, {kind}: {error}"
    return ""


if __name__ == "__main__":
    # Nothing is left to collect when a process ends this soon, and imports take a third less without.
    gc.disable()
    for wanted in json.load(sys.stdin):
        if reason := refusal(*wanted):
            print(reason, file=sys.stderr)
            sys.exit(STARTUP_ERROR_CODE)
