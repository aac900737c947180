"""Databases of each kind for the ledger's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ledger.postgresql import Cluster, NoPostgresqlError, cluster


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """A cluster for the whole run; on a machine without PostgreSQL its tests are skipped, in CI they fail."""
    try:
        made = cluster()
        with made as running:
            yield running
    except NoPostgresqlError as error:
        if os.environ.get("POD_TEST_POSTGRESQL") == "required":
            raise
        pytest.skip(str(error))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that a node may have."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite"
    running: Cluster = request.getfixturevalue("postgresql")
    return running.new_database()
