"""How a rank process begins: the command that starts it, and the first thing that it does.

`python -m services.rank_start X_svc.rank OPTIONS` runs that module with the options. Fronts and agents start ranks so.
"""

from __future__ import annotations

import gc
import runpy
import sys
from collections.abc import Mapping


def rank_command(module: str, options: Mapping[str, object]) -> list[str]:
    """The command line that runs a rank's module, with `--name value` for every option."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "services.rank_start", module, *words]


if __name__ == "__main__":
    # torch and the model libraries make a million objects that stay, and the collector would look through them again
    # and again: without it the imports take a third less. `services/rank_process.py` turns it on when they are done.
    gc.disable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
