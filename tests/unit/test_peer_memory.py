"""Collectives and Ulysses attention by way of peers' memory, with threads for ranks and plain memory for windows."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from services.attention import sdpa
from services.errors import StartupError
from services.families import load_family
from services.family import Block
from services.parallel import collectives, hsdp, peer_memory, ring, tensor_sequence, ulysses
from services.parallel.degrees import Degrees
from services.parallel.mesh import Axis, PlannedMesh
from services.parallel.peer_memory import STEP_BYTES, PeerMemory
from services.parallel.sequence import Places, SequenceParallel, own_piece, token_orders
from services.parallel.ulysses import Exchange
from services.parallel.vae_pieces import room_around
from tests.unit.thread_ranks import everywhere


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_give_what_they_say(ranks) -> None:
    brought = torch.randn(ranks, ranks, 5, 7)

    def work(rank, peers):
        mine = brought[rank]
        return (
            peers.all_to_all(mine),
            peers.all_gather(mine, ranks),
            peers.all_reduce(mine, ranks),
            peers.reduce_scatter(mine),
        )

    _, results = everywhere(ranks, work)
    for rank, (exchanged, gathered, total, piece) in enumerate(results):
        assert torch.equal(exchanged, brought[:, rank])
        assert torch.equal(gathered, brought)
        torch.testing.assert_close(total, brought.sum(0))
        assert torch.equal(total, results[0][2])
        torch.testing.assert_close(piece, brought[:, rank].sum(0))


def test_a_rank_that_runs_ahead_overwrites_nothing(ranks=3) -> None:
    def work(rank, peers):
        return [peers.all_to_all(torch.full((ranks, 1000), float(turn * ranks + rank))) for turn in range(40)]

    _, results = everywhere(ranks, work)
    for received in results:
        for turn, pieces in enumerate(received):
            assert pieces[:, 0].tolist() == [turn * ranks + rank for rank in range(ranks)]


def test_windows_grow_with_what_is_shown_and_never_shrink() -> None:
    sizes = [8, 4 * STEP_BYTES, 8, 2 * STEP_BYTES]

    def work(rank, peers):
        return [peers.all_gather(torch.full((size,), rank, dtype=torch.uint8), 2)[:, -1].tolist() for size in sizes]

    host, results = everywhere(2, work)
    assert results == [[[0, 1]] * 4] * 2
    assert sorted({memory.numel() for memory in host.made.values()}) == [STEP_BYTES, 4 * STEP_BYTES]
    assert len(host.made) == 2 * 2 * 2  # sizes, windows, ranks


def test_a_window_that_did_not_fit_is_made_when_less_is_shown() -> None:
    def work(rank, peers):
        make = peers._make

        def no_room(_size):
            raise torch.OutOfMemoryError("no room")

        peers._make = no_room
        with pytest.raises(torch.OutOfMemoryError):
            peers.all_gather(torch.zeros(2 * STEP_BYTES, dtype=torch.uint8), 2)
        peers._make = make
        return peers.all_gather(torch.full((8,), rank), 2)[:, 0].tolist()

    assert everywhere(2, work)[1] == [[0, 1]] * 2


@pytest.fixture
def fine(monkeypatch):
    """Windows as large as what they hold, nearly."""
    monkeypatch.setattr(peer_memory, "STEP_BYTES", 16)
    collectives.window_bytes.clear()
    yield
    collectives.window_bytes.clear()


def bytes_of(peers: PeerMemory) -> int:
    """Of a rank's windows."""
    return sum(peers._window_bytes.values()) + 2 * peers._shown_bytes


def around(ranks: int):
    """A ring's attention in which all tokens count."""
    return lambda tensor, group: ring.ring_attention(
        *[tensor[..., None].expand(-1, -1, -1, 8)] * 3,
        torch.arange(tensor.shape[1], device=tensor.device).expand(ranks, tensor.shape[0], -1),
        torch.tensor([0, tensor.shape[1]]).expand(ranks, tensor.shape[0], -1),
        group,
        "sdpa",
    )


COLLECTIVES = {
    "all_reduce": lambda tensor, group: collectives.all_reduce(tensor, group, 2),
    "all_gather": lambda tensor, group: collectives.all_gather(tensor, group, 2),
    "reduce_scatter": collectives.reduce_scatter,
    "gather_tokens": lambda tensor, group: tensor_sequence.gather_tokens(
        tensor, torch.arange(2 * tensor.shape[1], device=tensor.device), True, group, 2
    ),
    "scatter_tokens": lambda tensor, group: tensor_sequence.scatter_tokens(
        tensor, torch.arange(8, device=tensor.device), True, group, 2
    ),
    "ring": around(2),
    "ring of three": around(3),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_dry_run_knows_the_windows_of_collectives(kind, fine, monkeypatch) -> None:
    def work(rank, peers):
        monkeypatch.setitem(collectives.peer_memory, f"of {rank}", peers)
        for tokens in (3, 7, 5):
            COLLECTIVES[kind](torch.randn(2, tokens, 3), f"of {rank}")
        return bytes_of(peers)

    _, [made, *_] = everywhere(3 if kind == "ring of three" else 2, work)
    for tokens in (3, 7, 5):
        COLLECTIVES[kind](torch.empty(2, tokens, 3, device="meta"), "planned")
    uses = {"ring": ("ring",), "ring of three": ("ring", "ring next")}.get(kind, ("shown", "shown next"))
    assert collectives.window_bytes.keys() == {("planned", use) for use in uses}
    assert sum(collectives.window_bytes.values()) == made


@pytest.mark.parametrize("long", [8192, 1])
@pytest.mark.parametrize("heads", [3, 4])
def test_a_dry_run_knows_the_windows_of_ulysses(heads, long, fine, monkeypatch) -> None:
    monkeypatch.setattr(ulysses, "LONG_TOKENS", long)
    sequence = SequenceParallel(load_family("wan").dit.plan, PlannedMesh(Degrees(ulysses=2), 0))

    def work(rank, peers):
        for lengths in ([6, 9], [20, 3], [8, 8]):
            like = torch.empty(2, sum(-(-length // 2) for length in lengths), heads, 8)
            Exchange(peers, 2, lengths, like)
        return bytes_of(peers)

    _, [made, _] = everywhere(2, work)
    for lengths in ([6, 9], [20, 3], [8, 8]):
        orders = token_orders(tuple(lengths), 2, torch.device("meta"))
        sequence.places = Places(*orders, lengths=torch.tensor(lengths))
        like = torch.empty(2, sum(-(-length // 2) for length in lengths), heads, 8, device="meta")
        sequence.attend(sdpa, (like,), (like,), (like,), None)
    assert sum(collectives.window_bytes.values()) == made


def test_strided_tensors_are_shown_as_they_read() -> None:
    brought = torch.arange(24.0).view(2, 3, 4)

    def work(rank, peers):
        return peers.all_to_all((brought + 100 * rank).movedim(2, 0)[:2])

    _, results = everywhere(2, work)
    expected = brought.movedim(2, 0)
    for rank, received in enumerate(results):
        assert torch.equal(received, torch.stack([expected[rank], expected[rank] + 100]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("before", "behind"), [(1, 1), (0, 1), (2, 2)])
def test_a_piece_gets_the_edges_of_its_neighbours(before, behind, layout, monkeypatch) -> None:
    sizes = [4, 3, 3]
    picture = torch.randn(2, 3, 10, 10).contiguous(memory_format=layout)

    def work(rank, peers):
        monkeypatch.setitem(collectives.peer_memory, f"of {rank}", peers)
        start = sum(sizes[:rank])
        pieces = [picture.narrow(dim, start, sizes[rank]) for dim in (-2, -1)]
        rooms = [room_around(piece, dim, before, behind) for dim, piece in zip((-2, -1), pieces, strict=True)]
        for dim, room in zip((-2, -1), rooms, strict=True):
            collectives.fill_halo(room, dim, before, behind, f"of {rank}", rank, 3)
        return rooms

    _, results = everywhere(3, work)
    for rank, extended in enumerate(results):
        for dim, ours in zip((-2, -1), extended, strict=True):
            whole = F.pad(picture, (0, 0, before, behind) if dim == -2 else (before, behind))
            expected = whole.narrow(dim, sum(sizes[:rank]), sizes[rank] + before + behind)
            assert torch.equal(ours, expected)
            assert ours.is_contiguous(memory_format=layout)


def pieces_of(fields, ranks: int, rank: int, joined: bool):
    axis = Axis("", ranks, rank, None, ())
    pieces = [own_piece(field, 1, axis) for field in fields]
    return [torch.cat(pieces, dim=1)] if joined else pieces


@pytest.mark.parametrize("joined, long", [(True, 8192), (False, 8192), (False, 1)])
@pytest.mark.parametrize(
    "ranks, heads, lengths, filling",
    [
        (2, 4, (6, 10), None),
        (2, 10, (6, 10), None),
        (2, 3, (5, 9), [0, 2]),
        (3, 4, (2, 7, 1), [3, 0]),
        (3, 2, (4,), None),
    ],
)
def test_ulysses_is_attention_over_the_whole_sequence(
    ranks, heads, lengths, filling, joined, long, monkeypatch
) -> None:
    monkeypatch.setattr(ulysses, "LONG_TOKENS", long)
    torch.manual_seed(0)
    whole = [[torch.randn(2, length, heads, 8) for length in lengths] for _ in range(3)]
    fill = None if filling is None else torch.tensor(filling)
    expected = sdpa(*(torch.cat(fields, dim=1) for fields in whole), fill).split(list(lengths), dim=1)

    def work(rank, peers):
        streams = [piece for fields in whole for piece in pieces_of(fields, ranks, rank, joined)]
        results = []
        for _ in range(3):
            results.append(Exchange(peers, ranks, lengths, streams[0]).attend(streams, filling, "sdpa"))
        return results

    _, results = everywhere(ranks, work)
    for rank, calls in enumerate(results):
        for outputs in calls:
            for output, want in zip(outputs, pieces_of(expected, ranks, rank, joined), strict=True):
                torch.testing.assert_close(output, want)


def test_a_rank_that_runs_ahead_to_a_longer_sequence_overwrites_nothing(monkeypatch, ranks=2) -> None:
    collect = Exchange._collect

    def late(exchange, fields) -> None:
        time.sleep(0.2 * exchange._rank)
        collect(exchange, fields)

    monkeypatch.setattr(Exchange, "_collect", late)
    torch.manual_seed(0)
    sequences = [[torch.randn(1, length, 4, 8) for _ in range(3)] for length in (16, 160, 48)]
    expected = [sdpa(*sequence, None) for sequence in sequences]

    def work(rank, peers):
        results = []
        for sequence in sequences:
            streams = [piece for field in sequence for piece in pieces_of([field], ranks, rank, joined=False)]
            results += Exchange(peers, ranks, [sequence[0].shape[1]], streams[0]).attend(streams, None, "sdpa")
        return results

    _, results = everywhere(ranks, work)
    for rank, outputs in enumerate(results):
        for output, whole in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, *pieces_of([whole], ranks, rank, joined=False))


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_has_every_ranks_piece_once_its_own_first(ranks, late, fine) -> None:
    """Also where some come late to a piece, and windows grow meanwhile."""
    brought = [torch.randn(ranks, 2, length) for length in (5, 5, 5, 9, 9, 4)]

    def work(rank, peers):
        read = []
        for key, value in (pieces[rank] for pieces in brought):
            for owner, piece in ring._exchanged((key, value), peers, ranks):
                time.sleep(0.02 * (rank % 2 == late))
                read.append((owner, torch.stack(piece)))
        return read

    _, results = everywhere(ranks, work)
    for rank, read in enumerate(results):
        assert [owner for owner, _ in read] == [(rank - turn) % ranks for turn in range(ranks)] * len(brought)
        for index, (owner, piece) in enumerate(read):
            assert torch.equal(piece, brought[index // ranks][owner])


def experts(seed: int) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    made = {}
    for name, blocks in {"high": 5, "low": 4}.items():
        parts = [torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5).bfloat16()) for _ in range(blocks)]
        parts[1].register_parameter("scale", torch.nn.Parameter(torch.randn(())))
        made[name] = torch.nn.ModuleDict({"embed": torch.nn.Linear(3, 11), "blocks": torch.nn.ModuleList(parts)})
    return made


def blocks_of(modules) -> dict[str, list[Block]]:
    return {
        name: [Block("", part, lambda streams: streams) for part in module["blocks"]]
        for name, module in modules.items()
    }


def test_a_part_that_a_block_calls_does_not_wait_for_the_next_block(monkeypatch) -> None:
    registry: dict[str, PeerMemory] = {}
    monkeypatch.setattr(hsdp, "peer_memory", registry)
    expected, models = experts(0)["low"], [experts(0) for _ in range(2)]

    def work(rank, peers):
        registry[f"shards {rank}"] = peers
        asked: list[str] = []
        aside = peers.aside

        def noted():
            asked.append("aside")
            return aside()

        monkeypatch.setattr(peers, "aside", noted)
        modules = {"low": models[rank]["low"]}
        axis = Axis(f"shards {rank}", 2, rank, None, (0, 1))
        for _ in hsdp.shard(modules, blocks_of(modules), axis, torch.device("cpu"))["low"].whole():
            asked.append("block")
            assert torch.equal(modules["low"]["embed"](torch.ones(3)), expected["embed"](torch.ones(3)))
        return asked

    # A block's copies are asked for before the block in front of it runs; between them nothing else goes aside.
    order = ["aside", *["aside", "block"] * 3, "block"]
    assert everywhere(2, work)[1] == [order] * 2


@pytest.mark.parametrize("where", ["weight", "part", "experts"])
def test_weights_that_two_parts_share_are_refused_by_their_names(where) -> None:
    modules = experts(0)
    low = modules["low"]
    if where == "weight":
        low["blocks"][2][0].weight = low["blocks"][0][0].weight
        names = "low.blocks.0.0.weight and low.blocks.2.0.weight"
    elif where == "part":
        low["more"] = torch.nn.ModuleList([low["embed"]])
        names = "low.embed.weight and low.more.0.weight"
    else:
        low["embed"].bias = modules["high"]["embed"].bias
        names = "high.embed.bias and low.embed.bias"
    before = [weight.clone() for module in modules.values() for weight in module.parameters()]
    with pytest.raises(StartupError, match=f"HSDP does not shard a weight that several parts share: {names}$"):
        hsdp.shard(modules, blocks_of(modules), Axis("", 2, 0, None, (0, 1)), torch.device("cpu"))
    after = [weight for module in modules.values() for weight in module.parameters()]
    assert all(map(torch.equal, before, after))


def test_a_weight_that_one_part_has_twice_is_sharded_once(monkeypatch) -> None:
    registry: dict[str, PeerMemory] = {}
    monkeypatch.setattr(hsdp, "peer_memory", registry)
    models = [experts(0) for _ in range(2)]

    def work(rank, peers):
        registry[f"shards {rank}"] = peers
        modules = {"low": models[rank]["low"]}
        block = modules["low"]["blocks"][0]
        block.append(torch.nn.Linear(7, 5))
        block[2].weight = block[0].weight
        axis = Axis(f"shards {rank}", 2, rank, None, (0, 1))
        expected = block[0].weight.clone()
        whole = next(hsdp.shard(modules, blocks_of(modules), axis, torch.device("cpu"))["low"].whole()).module
        return torch.equal(whole[0].weight, expected) and torch.equal(whole[2].weight, expected)

    assert everywhere(2, work)[1] == [True] * 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_come_out_of_the_peers_shards(ranks, monkeypatch) -> None:
    expected = experts(0)
    registry: dict[str, PeerMemory] = {}
    monkeypatch.setattr(hsdp, "peer_memory", registry)
    models = [experts(0) for _ in range(ranks)]

    def work(rank, peers):
        registry[f"shards {rank}"] = peers
        modules = models[rank]
        sharded = hsdp.shard(
            modules,
            blocks_of(modules),
            Axis(f"shards {rank}", ranks, rank, None, tuple(range(ranks))),
            torch.device("cpu"),
        )
        for name in ("high", "low", "high"):
            embedded = modules[name]["embed"](torch.ones(3))
            assert torch.equal(embedded, expected[name]["embed"](torch.ones(3)))
            for block, theirs in zip(sharded[name].whole(), expected[name]["blocks"], strict=True):
                assert block.module.state_dict().keys() == theirs.state_dict().keys()
                for weight, whole in zip(block.module.parameters(), theirs.parameters(), strict=True):
                    assert torch.equal(weight, whole) and weight.dtype == whole.dtype
        return True

    _, results = everywhere(ranks, work)
    assert results == [True] * ranks
