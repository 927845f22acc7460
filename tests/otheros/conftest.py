"""The models, built once for each run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.otheros.running import COMPILER, Model

MakeModel = Callable[[str], Model]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Return the model of a system."""
    made: dict[str, Model] = {}

    def make(system: str) -> Model:
        if COMPILER is None:
            pytest.skip("a model is built with a C compiler, and there is none")
        if system not in made:
            made[system] = Model(system, tmp_path_factory.mktemp(system))
        return made[system]

    return make
