"""The oracle's table: a row for every family and variant. `tests/unit/test_oracle.py` runs it.

To add a model: a file with its ROWS beside this one, and its name in `ROWS` here.
"""

from __future__ import annotations

from tests.oracle import flux, hidream, qwen_image, wan
from tests.oracle.harness import OracleRow

ROWS: tuple[OracleRow, ...] = (*flux.ROWS, *hidream.ROWS, *qwen_image.ROWS, *wan.ROWS)
