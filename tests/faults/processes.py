"""One process of a cluster under test: started, killed, frozen, ended, each by its pid, and each written down."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from lightloom.cluster_config import write_toml
from lightloom.with_parent import with_parent
from services.config import environment_with_malloc
from tests.faults.history import Recorder

ROOT = Path(__file__).resolve().parents[2]
END_TIMEOUT_S = 60.0


class Process:
    """`python -m MODULE --config FILE`. While `wanted`, the cluster starts it again when it ends."""

    def __init__(self, name: str, module: str, folder: Path, table: Mapping[str, Any], recorder: Recorder) -> None:
        self.name = name
        self.module = module
        self.table = {section: dict(values) for section, values in table.items()}
        self.wanted = False
        self.restarts = -1
        self._config = folder / f"{name}.toml"
        self._log = folder / f"{name}.log"
        self._recorder = recorder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the life that runs, or that has ended."""
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it must be started (again)."""
        return self._process is None or self._process.poll() is not None

    def start(self) -> None:
        """A new life, with the config as it is now. It ends with the thread that calls this."""
        write_toml(self._config, self.table)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                with_parent((sys.executable, "-m", self.module, "--config", str(self._config))),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment_with_malloc(),
                start_new_session=True,
            )
        self.wanted = True
        self.restarts += 1
        self._recorder.write("start", name=self.name, pid=self.pid)

    def family(self) -> list[psutil.Process]:
        """It and its rank, if it has one."""
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def rank_pid(self) -> int:
        """Of a stage's rank process; 0 while it is started."""
        ranks = self.family()[1:]
        return ranks[0].pid if ranks else 0

    def kill(self) -> None:
        """SIGKILL to the front; the kernel ends its rank."""
        self._recorder.write("fault", what="kill", name=self.name, pid=self.pid, ranks=[self.rank_pid()])
        self._signal([self.pid], signal.SIGKILL)

    def kill_rank(self) -> None:
        """SIGKILL to the rank; the front lives."""
        if rank := self.rank_pid():
            self._recorder.write("fault", what="kill rank", name=self.name, pid=self.pid, ranks=[rank])
            self._signal([rank], signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP to it and its rank."""
        self._recorder.write("fault", what="freeze", name=self.name, pid=self.pid, ranks=[self.rank_pid()])
        self._signal([process.pid for process in self.family()], signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT to both."""
        self._recorder.write("fault", what="thaw", name=self.name, pid=self.pid)
        self._signal([process.pid for process in self.family()], signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM, as a rolling restart sends it."""
        self._recorder.write("fault", what="terminate", name=self.name, pid=self.pid)
        self._signal([self.pid], signal.SIGTERM)

    def restart(self) -> None:
        """SIGTERM, and waits until the cluster has started it again."""
        lives = self.restarts
        self.terminate()
        while self.restarts == lives:
            time.sleep(0.05)

    def end(self) -> None:
        """For good: SIGTERM, also to one that is frozen. `wait` for it."""
        self.wanted = False
        if self._process is not None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)

    def wait(self) -> None:
        """Until it has ended; it is killed when it does not."""
        if self._process is None:
            return
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")

    def resident_bytes(self) -> int:
        """Of the process itself."""
        return int(psutil.Process(self.pid).memory_info().rss)

    @staticmethod
    def _signal(pids: list[int], number: int) -> None:
        for pid in pids:
            try:
                psutil.Process(pid).send_signal(number)
            except psutil.NoSuchProcess:
                continue
