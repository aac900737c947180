"""Tiny models, made once per run and family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.engine.tiny import TinyModel, make_tiny


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    made: dict[str, TinyModel] = {}

    def get(family: str) -> TinyModel:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def llama(tiny: Callable[[str], TinyModel]) -> TinyModel:
    return tiny("llama")
