"""What commands print: whole ids and bars on a narrow terminal, and what happens to processes in words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightloom.connection import Connection
from lightloom.member import ProcessRow
from lightloom.show import show_processes, show_status, show_trace
from lightloom.up import changes
from protos import gateway_pb2, types_pb2
from services.errors import InvalidRequest, UnknownRequest

ID = "0123456789abcdef" * 2
OTHER = "0123456789" + "f" * 22


class Gateway:
    """Answers as a client would, without a gateway."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def models(self):
        return [gateway_pb2.ModelInfo(name="demo", family="qwen_image", ready=True)]

    def list(self, limit):
        params = types_pb2.GenerationParams(prompt="[red] a prompt\nthat is much longer than the room beside an id")
        state = gateway_pb2.REQUEST_STATE_DONE
        return [
            gateway_pb2.RequestStatus(request_id=request_id, state=state, step=20, total_steps=20, params=params)
            for request_id in (ID, OTHER)[:limit]
        ]

    def trace(self, request_id):
        assert len(request_id) == 32, "as a gateway knows it"
        names = [("gateway", "gateway.denoise"), ("text_encoder-demo-1", "text.encode"), ("vae-demo-3", "vae.decode")]
        return [
            types_pb2.Span(process=process, name=name, start_unix_ns=index * 10**9, duration_ns=10**9)
            for index, (process, name) in enumerate(names)
        ]


def lines(monkeypatch, show, *arguments, **options):
    """What a command prints on a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("lightloom.show.output", lambda: console)
    monkeypatch.setattr(Connection, "open", lambda self: Gateway())
    show(Connection(address="127.0.0.1:1"), *arguments, **options)
    printed = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert all(len(line) <= 80 for line in printed), printed
    return printed


def test_ids_are_whole_on_a_narrow_terminal(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    [row] = [line for line in lines(monkeypatch, show_status, 20, as_json=False) if line.startswith(ID)]
    assert row.split()[:3] == [ID, "done", "20/20"]
    assert "[red] a prompt" in row and row.endswith("…")


def test_bars_fit_on_a_narrow_terminal(monkeypatch):
    first, *_, last = lines(monkeypatch, show_trace, [ID])[1:]
    assert "gateway.denoise" in first and "vae.decode" in last
    # One after the other: the last bar begins where the first has ended, and is whole.
    assert first.count("█") == last.count("█") >= 8
    assert first.rindex("█") < last.index("█")


def test_requests_stand_on_one_clock(monkeypatch):
    title, *rows = lines(monkeypatch, show_trace, [ID, "f" * 32])
    assert title.split()[:2] == ["request", "process"]
    assert [line.split()[0] for line in rows] == [ID[:8], "f" * 8] * 3
    places = [(line.index("█"), line.rindex("█")) for line in rows]
    assert places[::2] == places[1::2], "what happened at once is below each other"


def test_the_beginning_of_an_id_will_do(monkeypatch):
    _, *rows = lines(monkeypatch, show_trace, ["0123456789a", "f" * 32])
    assert {line.split()[0] for line in rows} == {ID[:8], "f" * 8}
    with pytest.raises(InvalidRequest, match=f"2 requests have ids that begin with '012345': {ID}, {OTHER}$"):
        lines(monkeypatch, show_trace, ["012345"])
    with pytest.raises(InvalidRequest, match="'01234' is too short: give 6 characters"):
        lines(monkeypatch, show_trace, ["01234"])
    with pytest.raises(UnknownRequest, match="none of the newest 2 requests has an id that begins with '0123456789b'"):
        lines(monkeypatch, show_trace, ["0123456789b"])


def row(**changed) -> ProcessRow:
    plain = {"name": "dit-demo-2", "address": "127.0.0.1:5", "pid": 7, "state": "serving"}
    more = {"restarts": 0, "rank_restarts": 0, "ranks": 1, "layout": "", "rank_pids": []}
    return ProcessRow(**{**plain, **more, **changed})


@pytest.mark.parametrize("columns", [80, 200])
def test_ranks_are_shown_with_their_layout_and_process_ids(columns):
    console = Console(file=io.StringIO(), width=columns)
    ranks = {"ranks": 4, "layout": "cfg 2 x ulysses 2", "rank_pids": [1234567, 1234568, 1234569, 1234570]}
    rows = [row(address="127.0.0.1:51234", pid=1234566, **ranks), row(name="vae-demo-3"), row(name="redis", ranks=0)]
    show_processes(console, rows)
    printed = console.file.getvalue()
    first, *_ = (line for line in printed.splitlines() if "dit" in line)
    assert first.split()[:4] == ["dit-demo-2", "serving", "127.0.0.1:51234", "1234566"]
    words = printed.split()
    assert all(word in words for word in ("(cfg", "x", "2):", "1234567,", "1234568,", "1234569,", "1234570"))
    if columns == 200:
        assert first.endswith(" 4 (cfg 2 x ulysses 2): 1234567, 1234568, 1234569, 1234570")
        [*_, vae, redis] = (line.split() for line in printed.splitlines())
        assert vae[-1] == "1" and redis[-1] == "-"


def test_replicas_are_shown_with_their_layout(monkeypatch):
    stage = types_pb2.STAGE_DIT
    replicas = [gateway_pb2.Replica(stage=stage, world_size=2, layout="ulysses 2"), gateway_pb2.Replica(stage=stage)]
    models = [gateway_pb2.ModelInfo(name="demo", family="qwen_image", ready=True, replicas=replicas)]
    monkeypatch.setattr(Gateway, "models", lambda self: models)
    printed = lines(monkeypatch, show_status, 1, as_json=False)
    assert any("dit 1 (ulysses 2), dit 1" in line for line in printed), printed


def test_what_happened_to_a_process():
    assert list(changes(None, row(state="starting"))) == ["starts at 127.0.0.1:5"]
    assert list(changes(row(state="starting"), row())) == ["serves"]
    assert list(changes(row(), row())) == []
    assert list(changes(row(), row(pid=0, state="down"))) == ["died"]
    assert list(changes(row(pid=0, state="down"), row(pid=8, restarts=1, state="starting"))) == [
        "was started again (restarts: 1)"
    ]
    assert list(changes(row(), row(pid=8, restarts=1, state="starting"))) == ["died", "was started again (restarts: 1)"]
    [lost] = changes(row(), row(rank_restarts=2, state="starting"))
    assert lost.startswith("lost a rank") and "2" in lost
