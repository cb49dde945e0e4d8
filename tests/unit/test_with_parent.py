"""A process started with its parent ends with it, also when that is killed."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from lightloom.with_parent import with_parent

PARENT = """
import subprocess, sys, time
from lightloom.with_parent import with_parent
child = subprocess.Popen(with_parent((sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")))
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_parent_takes_its_child_along() -> None:
    with subprocess.Popen((sys.executable, "-c", PARENT), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip() for _ in range(2)}
        [pid] = said - {"up"}
        child = psutil.Process(int(pid))
        parent.kill()
    gone, _ = psutil.wait_procs([child], 5)
    assert gone


def test_arguments_and_exit_codes_pass() -> None:
    script = "import sys; print(sys.argv[1:]); sys.exit(7)"
    done = subprocess.run(with_parent((sys.executable, "-c", script, "a b", "")), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (7, "['a b', '']")


def test_without_its_parent_it_does_not_start() -> None:
    command = with_parent((sys.executable, "-c", "print('started')"))
    position = command.index(str(os.getpid()))
    other = (*command[:position], "999999999", *command[position + 1 :])
    assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == ""
