"""A tokenizer without files, for `random:SEED` models under load tests: words become ids by a hash."""

from __future__ import annotations

import re
import zlib

_WORDS = re.compile(r"<\|\w+\|>|\w+|[^\w\s]|\n")


def hash_tokens(text: str, vocab_size: int) -> list[int]:
    """One id in [10, vocab_size) for each word, mark, newline and <|special|>. The same text gives the same ids."""
    return [10 + zlib.crc32(word.encode()) % (vocab_size - 10) for word in _WORDS.findall(text)]
