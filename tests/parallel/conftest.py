"""The pool of rank processes, and each row's tiny model with what one process makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.request import GenerationParams
from tests.oracle import ROWS
from tests.oracle.harness import OracleRow, Subject, make_folder
from tests.parallel.pool import RankPool


class Prepared:
    """A row's tiny model on disk, its jobs, and the stock pipeline's results."""

    def __init__(self, row: OracleRow, folder) -> None:
        self.row = row
        self.folder = make_folder(row, folder)
        self.subject = Subject(row, self.folder)

    def jobs(self, count: int):
        """Jobs of one shape, and what the stock pipeline makes of each."""
        return self.jobs_of(*self.row.batch[:count])

    def jobs_of(self, *wishes: GenerationParams):
        """Jobs r0, r1 ... of these wishes, and what the stock pipeline makes of each."""
        params = {f"r{index}": self.subject.params(wish) for index, wish in enumerate(wishes)}
        jobs = [self.subject.job(name, wish) for name, wish in params.items()]
        return jobs, {name: self.subject.stock(wish) for name, wish in params.items()}


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    made = RankPool()
    yield made
    made.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Row name to its prepared model, made when first asked for."""
    made: dict[str, Prepared] = {}
    rows = {str(row): row for row in ROWS}

    def prepare(name: str) -> Prepared:
        if name not in made:
            with torch.inference_mode():
                made[name] = Prepared(rows[name], tmp_path_factory.mktemp(name))
        return made[name]

    return prepare


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
