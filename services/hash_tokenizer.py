"""A tokenizer without files, for `random:SEED` models under load tests: words become ids by a hash."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

_WORDS = re.compile(r"<\|\w+\|>|\w+|[^\w\s]|\n")


def hash_tokens(text: str, vocab_size: int, fixed: Mapping[str, int] | None = None) -> list[int]:
    """One id in [10, vocab_size) for each word, mark, newline and <|special|>. The same text gives the same ids.

    Args:
        fixed: words whose ids the model knows; no other word gets one of these ids.
    """
    fixed = fixed or {}
    taken = set(fixed.values())
    ids = []
    for word in _WORDS.findall(text):
        number = 10 + zlib.crc32(word.encode()) % (vocab_size - 10)
        while number in taken:
            number = 10 + (number - 9) % (vocab_size - 10)
        ids.append(fixed.get(word, number))
    return ids
