"""Runs a command that ends with its parent: `python with_parent.py PID COMMAND ...`. The launcher starts processes so.

The kernel sends SIGTERM when the thread that started this process ends, however that happens. The same could be asked
for between fork and exec; but a fork of a process with gRPC's threads may crash before it gets there, a spawn may not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def with_parent(command: Sequence[str]) -> tuple[str, ...]:
    """The command as one that ends with this process."""
    # Nothing but the standard library is needed: without site packages Python starts in 10 ms.
    return (sys.executable, "-I", "-S", __file__, str(os.getpid()), *command)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # A parent that has ended already sends no signal.
    if os.getppid() == int(sys.argv[1]):
        os.execv(sys.argv[2], sys.argv[2:])
