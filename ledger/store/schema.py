"""Opens a database and brings its schema up to date; refuses one that a newer program has written."""

from __future__ import annotations

from pathlib import Path
from sqlite3 import Connection as SqliteConnection

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from ledger.journal import JournalError

_BUSY_TIMEOUT_MS = 5_000
# A host that hangs is given up after these. The driver makes no shorter attempt than this one.
_CONNECT_TIMEOUT_S = 2
_SILENCE_MS = 2_500
# No query of ours takes long; without these a server that hangs would hang the node.
_POSTGRESQL_OPTIONS = f"-c lock_timeout={_BUSY_TIMEOUT_MS} -c statement_timeout=120000"


def connect(url: str) -> sa.Engine:
    """Nothing is opened yet. Raises JournalError or SQLAlchemy's errors for an URL that cannot be."""
    address = _address(url)
    if address.get_backend_name() == "sqlite":
        engine = sa.create_engine(address)
        sa.event.listen(engine, "connect", _configure_sqlite)
        return engine
    given: dict[str, int | str] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "tcp_user_timeout": _SILENCE_MS,
        "keepalives_idle": 1,
        "keepalives_interval": 1,
        "keepalives_count": 2,
        "options": _POSTGRESQL_OPTIONS,
    }
    arguments = {name: value for name, value in given.items() if name not in address.query}
    # A server that was restarted is found again without a failed request.
    return sa.create_engine(address, connect_args=arguments, pool_pre_ping=True)


def _address(url: str) -> sa.URL:
    """What cannot be read may hold a password, and so may what is read wrongly: no error repeats it."""
    try:
        address = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise JournalError("the ledger's database: this is no database URL") from None
    # An @ in a password would make the rest of it a host, whose name errors do tell.
    if address.get_backend_name() != "sqlite" and url.count("@") > 1:
        raise JournalError("the ledger's database: this is no database URL (an @ in a password is %40)")
    return address


def _configure_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    assert isinstance(connection, SqliteConnection)
    # FULL, because a settled entry that a peer has seen must not vanish with the power.
    for pragma in (f"busy_timeout={_BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").close()


def upgrade(engine: sa.Engine) -> None:
    """Raises JournalError for a schema that this program does not know."""
    config, script = _migrations()
    with engine.begin() as connection:
        if _current(connection, script) == script.get_current_head():
            return
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def check(engine: sa.Engine) -> None:
    """For readers, who change nothing. Raises JournalError unless the schema is this program's."""
    _, script = _migrations()
    with engine.connect() as connection:
        if _current(connection, script) != script.get_current_head():
            raise JournalError("the ledger's database is of an older gpu-pod; `pod up` brings it up to date")


def _migrations() -> tuple[Config, ScriptDirectory]:
    config = Config()
    location = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", location.replace("%", "%%"))
    return config, ScriptDirectory.from_config(config)


def _current(connection: sa.Connection, script: ScriptDirectory) -> str | None:
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in {step.revision for step in script.walk_revisions()}:
        raise JournalError(f"the ledger's database is of schema {current}, newer than this gpu-pod knows")
    return current
