"""`PeerEdges`' exchange with both neighbours as one Triton kernel: put, signal, wait and take.

A program puts its share of the edges into the neighbours' inboxes, raises a flag of its own there, waits for the flags
that the same program of each neighbour raises here, and takes what came into the room. No program waits for another one
of its own kernel, and there are few enough of them to run all at once.

A flag carries the number of the exchange, so it is never reset: one that is ahead was raised for the next exchange.
Flags are released after the bytes that they tell of, and acquired before those are read, for the whole system (the
memory model of PTX).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from services.parallel.edges import Edges

PROGRAMS = 128
"""At most: fewer than the programs of four warps that any GPU of a server runs at once."""
BLOCK = 1024
"""Words that a program moves at a time."""
FLAG_BYTES = 2 * 4 * PROGRAMS
"""A flag of four bytes for each program and side, at the start of a rank's memory."""
WORDS = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.int8: tl.int8}


@triton.jit
def _places(  # type: ignore[no-untyped-def]  # noqa: ANN202
    index,  # noqa: ANN001
    run,  # noqa: ANN001
    lines,  # noqa: ANN001
):
    """Where words of an edge lie in a room: runs of words that are one line, or row, of a frame apart."""
    frames, height, batch_stride, frame_stride, line_stride = lines
    line = index // run
    frame = line // height
    batch = frame // frames
    place = batch.to(tl.int64) * batch_stride + (frame - batch * frames).to(tl.int64) * frame_stride
    return place + (line - frame * height).to(tl.int64) * line_stride + (index - line * run)


@triton.jit  # type: ignore[untyped-decorator]
def _put(  # type: ignore[no-untyped-def]  # noqa: ANN202
    edge,  # noqa: ANN001
    inbox,  # noqa: ANN001
    run,  # noqa: ANN001
    count,  # noqa: ANN001
    lines,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        words = tl.load(edge + _places(index, run, lines), mask=index < count)
        tl.store(inbox + index, words, mask=index < count)


@triton.jit  # type: ignore[untyped-decorator]
def _take(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    inbox,  # noqa: ANN001
    edge,  # noqa: ANN001
    run,  # noqa: ANN001
    count,  # noqa: ANN001
    lines,  # noqa: ANN001
    CAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What came from a neighbour; zeros where there is none."""
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        if CAME:
            # Not by way of the first cache, which another GPU's stores do not reach.
            words = tl.load(inbox + index, mask=index < count, cache_modifier=".cg")
        else:
            words = tl.zeros((BLOCK,), edge.dtype.element_ty)
        tl.store(edge + _places(index, run, lines), words, mask=index < count)


@triton.jit
def _wait(  # type: ignore[no-untyped-def]  # noqa: ANN202
    flag,  # noqa: ANN001
    number,  # noqa: ANN001
):
    # One that is ahead by two would not have been raised before this one was seen; all others are old.
    ahead = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - number
    while (ahead != 0) & (ahead != 1):
        ahead = tl.atomic_add(flag, 0, sem="acquire", scope="sys") - number


# Arguments between the pointers and the constants; one kernel serves all numbers.
NUMBERS = (
    *("number", "inbox", "inbox_behind", "run_before", "run_behind", "count_before", "count_behind"),
    *("last", "place_behind", "frames", "height", "batch_stride", "frame_stride", "line_stride"),
)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=NUMBERS, do_not_specialize_on_alignment=("room",)
)
def _exchange(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    room,  # noqa: ANN001
    mine,  # noqa: ANN001
    before,  # noqa: ANN001
    behind,  # noqa: ANN001
    number,  # noqa: ANN001
    inbox,  # noqa: ANN001
    inbox_behind,  # noqa: ANN001
    run_before,  # noqa: ANN001
    run_behind,  # noqa: ANN001
    count_before,  # noqa: ANN001
    count_behind,  # noqa: ANN001
    last,  # noqa: ANN001
    place_behind,  # noqa: ANN001
    frames,  # noqa: ANN001
    height,  # noqa: ANN001
    batch_stride,  # noqa: ANN001
    frame_stride,  # noqa: ANN001
    line_stride,  # noqa: ANN001
    WORD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lines = (frames, height, batch_stride, frame_stride, line_stride)
    room = room.to(tl.pointer_type(WORD))
    # A rank's memory: flags and inbox of what comes from before, those of what comes from behind.
    if behind is not None:
        _put(room + last, (behind + inbox).to(tl.pointer_type(WORD)), run_before, count_before, lines, BLOCK)
    if before is not None:
        target = (before + inbox_behind).to(tl.pointer_type(WORD))
        _put(room + run_before, target, run_behind, count_behind, lines, BLOCK)
    # Until all threads' words are on their way.
    tl.debug_barrier()
    program = tl.program_id(0)
    if behind is not None:
        flag = behind.to(tl.pointer_type(tl.int32)) + program
        tl.atomic_xchg(flag, number, sem="release", scope="sys")
    if before is not None:
        flag = before.to(tl.pointer_type(tl.int32)) + PROGRAMS + program
        tl.atomic_xchg(flag, number, sem="release", scope="sys")
    own_flags = mine.to(tl.pointer_type(tl.int32)) + program
    if before is not None:
        _wait(own_flags, number)
    if behind is not None:
        _wait(own_flags + PROGRAMS, number)
    tl.debug_barrier()
    source = (mine + inbox).to(tl.pointer_type(WORD))
    _take(source, room, run_before, count_before, lines, before is not None, BLOCK)
    source = (mine + inbox_behind).to(tl.pointer_type(WORD))
    _take(source, room + place_behind, run_behind, count_behind, lines, behind is not None, BLOCK)


def exchange(room: torch.Tensor, memory: Sequence[torch.Tensor | None], number: int, inbox: int, edges: Edges) -> None:
    """See `PeerEdges.fill`.

    Args:
        memory: bytes of this rank, of the one before and of the one behind; None where there is none.
        number: of the exchange, the same on all ranks.
        inbox: where in a rank's memory the edges of this exchange begin.
    """
    most = max(edges.count_before, edges.count_behind)
    kernel: Any = _exchange[(min(max(triton.cdiv(most, BLOCK), 1), PROGRAMS),)]
    kernel(
        room,
        *memory,
        number,
        inbox,
        inbox + edges.count_before * edges.word.itemsize,
        edges.before,
        edges.behind,
        edges.count_before,
        edges.count_behind,
        edges.last,
        edges.behind_at,
        *edges.lines,
        WORD=WORDS[edges.word],
        PROGRAMS=PROGRAMS,
        BLOCK=BLOCK,
    )
