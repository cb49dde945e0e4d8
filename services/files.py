"""Whether a file is another one than before. For files that are read again when they change."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int, int] | None


def stamp(path: str | Path) -> Stamp:
    """Differs when the file was written or replaced; None while there is none (or for an empty path)."""
    try:
        facts = Path(path).stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino
