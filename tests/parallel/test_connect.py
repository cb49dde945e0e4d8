"""All ranks of a group use each other's memory or none does, whatever one of them finds; GPUs are stubs."""

from __future__ import annotations

import pytest

from tests.parallel.jobs import Gpus

RANKS = 3


def answers(pool, gpus: Gpus) -> set[tuple[str, int]]:
    return set(pool.run("connected", RANKS, gpus))


def test_gpus_that_reach_each_other_connect(pool) -> None:
    assert answers(pool, Gpus()) == {("peers", 1)}


@pytest.mark.parametrize("gpus", [Gpus(apart=(1,)), Gpus(hidden=(2,))], ids=["apart", "hidden"])
def test_one_gpu_that_reaches_no_other_is_known_before_memory_is_taken(pool, gpus) -> None:
    assert answers(pool, gpus) == {("none", 0)}


def test_no_room_on_one_rank_is_out_of_memory_on_all(pool) -> None:
    said = "OutOfMemoryError: no window of 33554432 bytes on rank 1: CUDA driver error: out of memory"
    assert answers(pool, Gpus(empty={1: "out of memory"})) == {(said, 1)}


def test_a_fault_of_one_gpu_is_not_taken_for_gpus_apart(pool) -> None:
    said = "RuntimeError: no window of 33554432 bytes on rank 0: CUDA driver error: device lost"
    assert answers(pool, Gpus(empty={0: "device lost"})) == {(said, 1)}


@pytest.mark.parametrize(
    "refused", ["operation not permitted", "peer access is not supported between these two devices"]
)
@pytest.mark.parametrize("where", ["empty", "rendezvous"])
def test_drivers_that_do_not_share_leave_it_to_nccl(pool, where, refused) -> None:
    ranks = (2,) if where == "empty" else range(RANKS)
    assert answers(pool, Gpus(**{where: dict.fromkeys(ranks, refused)})) == {("none", 1)}
