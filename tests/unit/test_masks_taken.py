"""A mask for a model that takes none: the refusal names the served models that do."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from gateway.access import ANONYMOUS
from gateway.config import GatewaySection, RedisSection, StagesSection
from gateway.dispatch import Dispatcher
from gateway.links import Links
from gateway.objects import Folder
from gateway.replicas import Replicas
from gateway.requests import RequestService
from gateway.state import State
from gateway.store import Store
from protos import gateway_pb2
from services.errors import InvalidRequest
from services.request import GenerationParams, Limits, Media
from services.wire import limits_to_proto

TEXT, EDIT = Limits(), Limits(min_inputs=1, max_inputs=1, optional_roles=("mask",))


class Served(Replicas):
    """Models by name."""

    def __init__(self, models: dict[str, Limits]) -> None:
        super().__init__(StagesSection(), lambda: None)
        self._served = models

    def limits(self, model: str) -> Limits:
        return self._served[model]

    def models(self) -> dict[str, gateway_pb2.ModelInfo]:
        return {
            name: gateway_pb2.ModelInfo(name=name, limits=limits_to_proto(limits))
            for name, limits in self._served.items()
        }


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({"demo": TEXT, "edit": EDIT, "edit-2509": EDIT}, "'demo' takes no mask; these do: edit, edit-2509"),
        ({"demo": TEXT, "other": TEXT}, "'demo' takes no mask; nor does any other that is served"),
    ],
)
async def test_it_is_refused_with_the_names_of_those_that_take_one(
    models: dict[str, Limits], says: str, tmp_path: Path
) -> None:
    # It is asked nothing before the limits are.
    state = State(RedisSection(url="redis://127.0.0.1:1/0"), "gateway")
    parts = state, cast(Dispatcher, None), Served(models), Store(Folder(tmp_path)), cast(Links, None)
    service = RequestService(*parts, GatewaySection(), {})
    inputs = (Media("image/png", b"p"), Media("image/png", b"m", "mask"))
    with pytest.raises(InvalidRequest, match=says):
        await service.submit(GenerationParams(prompt="p", model="demo", inputs=inputs), ANONYMOUS)
