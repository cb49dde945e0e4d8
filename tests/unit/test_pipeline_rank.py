"""What a rank of a pipeline passes on."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from services.family import ModelPlan
from services.parallel import pipeline
from services.parallel.mesh import Axis
from services.parallel.pipeline import PipelineRank


def test_what_is_on_its_way_does_not_change_with_the_blocks_next_results(monkeypatch):
    on_its_way = []

    def isend(tensor, *_args, **_options):
        on_its_way.append(tensor)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(pipeline.dist, "isend", isend)
    rank = PipelineRank(ModelPlan(block_classes=()), Axis("", 2, 0, None, (0, 1)))
    # As a CUDA graph leaves them: always at the same place.
    results = torch.ones(1, 4, 8)
    rank.send(SimpleNamespace(hidden=results))
    results.zero_()
    assert torch.equal(on_its_way[0], torch.ones(1, 4, 8))
