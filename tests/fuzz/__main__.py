"""Coverage-guided fuzzing: `python -m tests.fuzz tensor_frames --seconds 600`; needs `pip install atheris==3.0.0`.

New inputs go to a folder of their own and, merged to those that reach code no other one reaches, to
`tests/fuzz/corpus`, which the tests replay. An input that breaks its target is written to the working folder, and the
exit code says so.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

CORPUS = Path(__file__).parent / "corpus"
TARGETS = ("tensor_frames", "picture")
MAX_LENGTH = 4096


def main() -> None:
    """Fuzzes, then merges; each in a process of its own, because libFuzzer ends its process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--libfuzzer", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.libfuzzer is not None:
        _fuzz(arguments.target, arguments.libfuzzer)
        return
    from tests.fuzz.seeds import write_seeds

    kept = CORPUS / arguments.target
    kept.mkdir(parents=True, exist_ok=True)
    write_seeds(arguments.target, kept)
    with TemporaryDirectory() as name:
        found, merged = Path(name) / "found", Path(name) / "merged"
        found.mkdir()
        merged.mkdir()
        limit = f"-max_total_time={arguments.seconds}"
        code = _run(arguments.target, limit, f"-max_len={MAX_LENGTH}", "-timeout=10", str(found), str(kept))
        if code:
            sys.exit(code)
        _run(arguments.target, "-merge=1", str(merged), str(kept), str(found))
        for path in kept.iterdir():
            if not path.name.startswith("seed-"):
                path.unlink()
        for path in merged.iterdir():
            shutil.copy(path, kept / path.name)


def _run(target: str, *options: str) -> int:
    # libFuzzer starts its own command anew for a merge: it must be one that can be executed.
    with TemporaryDirectory() as folder:
        command = Path(folder) / "fuzz"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.fuzz {target} --libfuzzer "$0" "$@"\n')
        command.chmod(0o755)
        return subprocess.run([command, *options], check=False).returncode


def _fuzz(target: str, command: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["services", "PIL"]):
        from tests.fuzz.targets import TARGETS as functions
    atheris.Setup(command, functions[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
