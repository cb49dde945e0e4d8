"""What the shape of a request says of its cost and of whom it can share a step with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.config import GatewayConfig
from gateway.cost import cost_of
from gateway.ticket import Ticket, batch_key
from services.config import parse
from services.errors import StartupError
from services.request import GenerationParams, Limits, ResolvedParams, resolve

LIMITS = Limits(max_frames=81, output="video", default_fps=16.0)


def params(limits: Limits = LIMITS, **changes: object) -> ResolvedParams:
    shape = {"width": 800, "height": 1600, "steps": 10}
    asked = GenerationParams(**{"model": "m", "prompt": "p", "guidance": 1.0, **shape, **changes})
    return resolve(asked, limits, seed=0)


def test_cost_grows_with_pixels_frames_steps_and_branches() -> None:
    assert cost_of(params(), LIMITS) == 12.8
    for change in ({"width": 1600}, {"num_frames": 2}, {"steps": 20}, {"guidance": 4.0}):
        assert cost_of(params(**change), LIMITS) == 25.6, change


def test_guidance_that_is_an_input_of_the_model_takes_no_branch() -> None:
    distilled = replace(LIMITS, separate_guidance_2=True, default_guidance_2=1.0)
    assert cost_of(params(distilled, guidance=4.0), distilled) == 12.8
    assert cost_of(params(distilled, guidance_2=4.0), distilled) == 25.6


def test_requests_of_one_shape_share_a_key() -> None:
    assert batch_key(params(seed=1), LIMITS) == batch_key(params(steps=20, prompt="q"), LIMITS)
    keys = {
        batch_key(params(**change), LIMITS) for change in ({}, {"width": 512}, {"num_frames": 5}, {"guidance": 4.0})
    }
    assert len(keys) == 4 and not any(" " in key for key in keys)


def test_priorities_make_three_classes() -> None:
    assert [Ticket(priority=priority).priority_class for priority in (-(2**31), -1, 0, 1, 2**31 - 1)] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tenants": {"acme": 0.0}}, r"tenants.acme is 0.0: a weight must be between 0.01 and 100"),
        ({"tenants": {"acme": float("nan")}}, r"tenants.acme is nan"),
        ({"tenants": {"acme": "2"}}, r"tenants.acme must be of type float"),
        ({"gateway": {"age_s": 0.0}}, r"gateway.age_s is 0.0: it must be above 0"),
        ({"gateway": {"max_queued_tenant": 0}}, r"gateway.max_queued_tenant is 0"),
    ],
)
def test_wrong_settings_are_refused_at_start(table: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        parse(GatewayConfig, table)


def test_weights_are_read() -> None:
    assert parse(GatewayConfig, {"tenants": {"acme": 2, "other": 0.5}}).tenants == {"acme": 2.0, "other": 0.5}
