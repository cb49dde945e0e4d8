"""What CUDA graphs need of peers' memory, with threads for ranks."""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from services.parallel import collectives, ring
from services.parallel.peer_memory import STEP_BYTES
from tests.unit.thread_ranks import Window, everywhere


@pytest.mark.parametrize("recorded", [False, True])
def test_a_window_that_a_graph_reads_outlives_a_larger_one(recorded) -> None:
    def work(_, peers):
        windows: list[Window] = []
        with peers.recorded(windows, []) if recorded else nullcontext():
            first = weakref.ref(peers.window("attended", 8))
        assert first() is peers.window("attended", STEP_BYTES)
        assert first() is not peers.window("returned", 8)
        assert first() is not peers.window("attended", STEP_BYTES + 1)
        alive = first() is not None
        windows.clear()
        return alive, first() is not None

    assert everywhere(2, work)[1] == [(recorded, False)] * 2


@pytest.mark.parametrize("shows", [0, 1, 4])
def test_ranks_meet_before_a_graphs_first_window_and_behind_its_last(shows) -> None:
    """Then it may follow anything, itself too: all that it is made of comes between."""

    def work(_, peers):
        meetings = []

        def make(size):
            window = made(size)
            meet = window.meet
            window.meet = lambda: (meetings.append(window), meet())
            return window

        made, peers._make = peers._make, make
        for _ in range(3):
            peers.all_gather(torch.ones(5), 2)
        meetings.clear()
        windows: list[Window] = []
        with peers.recorded(windows, []):
            for _ in range(shows):
                peers.all_gather(torch.ones(5), 2)
        inside = len(meetings)
        assert len(windows) == min(shows, 2)
        peers.all_gather(torch.ones(5), 2)
        return inside, len(meetings) - inside

    assert everywhere(2, work)[1] == [(shows + 2 if shows else 0, 1)] * 2


def test_a_graph_that_could_not_be_made_changes_nobodys_turn() -> None:
    def work(_, peers):
        peers.all_gather(torch.ones(5), 2)
        turn = peers._turn
        with pytest.raises(torch.OutOfMemoryError), peers.recorded([], []):
            peers.all_gather(torch.ones(5), 2)
            raise torch.OutOfMemoryError("no room")
        peers.hold(torch.ones(1))
        return turn == peers._turn

    assert everywhere(2, work)[1] == [True] * 2


def test_a_graph_holds_the_orders_that_a_rings_kernels_read(monkeypatch) -> None:
    def work(rank, peers):
        monkeypatch.setitem(collectives.peer_memory, f"of {rank}", peers)
        query, orders = torch.randn(1, 4, 2, 8), torch.arange(4).expand(2, 1, -1).contiguous()
        held = collectives.Held()
        with peers.recorded(held.windows, held.tensors):
            ring.ring_attention(query, query, query, orders, torch.tensor([[[0, 4]]] * 2), f"of {rank}", "sdpa")
        return held.tensors[0] is orders and len(held.windows)

    assert everywhere(2, work)[1] == [1] * 2


def test_a_graph_counts_what_it_sends_when_it_runs(monkeypatch) -> None:
    monkeypatch.setattr(collectives, "peer_memory", {})
    for counter in ("sent_bytes", "sent_calls"):
        monkeypatch.setattr(collectives, counter, Counter(ring=7))
    with collectives.held_by_graph() as held:
        collectives.count_sent("ring", torch.zeros(5), 1)
        collectives.count_sent("all_gather", torch.zeros(3), 2)
    assert +collectives.sent_bytes == +collectives.sent_calls == {"ring": 7}
    for _ in range(2):
        held.count()
    assert collectives.sent_bytes == {"ring": 7 + 2 * 20, "all_gather": 2 * 24}
    assert collectives.sent_calls == {"ring": 7 + 2, "all_gather": 2}
