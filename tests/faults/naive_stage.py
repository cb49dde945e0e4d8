"""A recording stage whose front knows no fences: what the checker must find out."""

from __future__ import annotations

import services.front
from protos import types_pb2
from services.admission import Admission
from tests.faults import stage


class NaiveAdmission(Admission):
    """Lets every owner in, also beside another one."""

    def take_over(self, method: str, context: types_pb2.RequestContext) -> None:
        """Takes them all, and ends none."""

    def release(self, context: types_pb2.RequestContext) -> None:
        """Ends none."""


if __name__ == "__main__":
    services.front.Admission = NaiveAdmission  # type: ignore[misc]
    stage.main()
