"""Models whose experts lie in denoisers of their own: who takes which steps, and what lacks. By what Describe says."""

from __future__ import annotations

from collections.abc import Sequence

from protos import types_pb2


def takes(facts: types_pb2.DescribeResponse, expert: str) -> bool:
    """Whether a replica makes the steps of that expert; "" for the first ones of a request."""
    return not facts.expert or facts.expert == (expert or next(iter(facts.experts), ""))


def following(facts: types_pb2.DescribeResponse) -> list[str]:
    """The experts that requests of a replica go on to."""
    experts = list(facts.experts)
    return experts[experts.index(facts.expert) + 1 :] if facts.expert in experts else []


def missing(held: Sequence[types_pb2.DescribeResponse]) -> list[str]:
    """Experts that none of a model's denoisers holds."""
    if not held or not all(facts.expert for facts in held):
        return []
    return [expert for expert in held[0].experts if expert not in {facts.expert for facts in held}]
