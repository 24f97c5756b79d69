"""How Alembic reaches the warehouse: WAREHOUSE_URL, one upgrade at a time, one transaction per migration."""

import os
import sys
from logging.config import fileConfig
from typing import TYPE_CHECKING

import psycopg
from alembic.command import downgrade as downgrade_command
from alembic.command import revision as revision_command
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from alembic import context

if TYPE_CHECKING:
    from alembic.operations import MigrationScript
    from alembic.runtime.migration import MigrationContext

# Longest wait for a lock on a table: while a migration waits, readers that come later queue behind it.
LOCK_TIMEOUT = "2s"
# Longest wait for another `alembic upgrade` to finish; a migration may build an index for minutes.
TURN_TIMEOUT = "10min"
TURN = "hashtextextended('alembic upgrade of de_dw', 0)"

options = context.get_x_argument(as_dictionary=True)
unknown = options.keys() - {"allow-data-loss", "lock-timeout"}
if unknown:
    raise CommandError(f"unknown -x {', '.join(sorted(unknown))}: known are allow-data-loss=yes and lock-timeout=2s")
SETTINGS = {
    "lock_timeout": options.get("lock-timeout", LOCK_TIMEOUT),
    "de_dw.allow_data_loss": options.get("allow-data-loss", "no"),
}


def number(context_: "MigrationContext", revision: object, directives: list["MigrationScript"]) -> None:
    """Give a new revision the next number instead of a random name, unless --rev-id named it."""
    scripts = ScriptDirectory.from_config(context.config).walk_revisions()
    last = max((int(script.revision) for script in scripts if script.revision.isdecimal()), default=0)
    if context.config.cmd_opts is None or context.config.cmd_opts.rev_id is None:
        directives[0].rev_id = f"{last + 1:04}"


def one_transaction_each() -> bool:
    """False for a downgrade: it is one transaction as a whole, so that a refusal in its middle undoes all of it."""
    return context.config.cmd_opts is None or context.config.cmd_opts.cmd[0] is not downgrade_command


def take_turn(connection: Connection) -> None:
    """Wait until no other upgrade of this database runs: two at once would both create what is missing.

    :raises sqlalchemy.exc.OperationalError: another upgrade took longer than TURN_TIMEOUT.
    """
    got_it = connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({TURN})").scalar_one()
    if not got_it:
        print("another alembic is at work on this database: waiting for it", file=sys.stderr)  # noqa: T201
        connection.exec_driver_sql(f"SET lock_timeout = '{TURN_TIMEOUT}'")
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({TURN})")


def run_online() -> None:
    """Migrate the database that WAREHOUSE_URL names.

    :raises CommandError: WAREHOUSE_URL is not set.
    """
    url = os.environ.get("WAREHOUSE_URL")
    if not url:
        raise CommandError(
            "WAREHOUSE_URL is not set: give the warehouse's owner, as in "
            "WAREHOUSE_URL=postgresql://owner:password@localhost:5432/de_dw alembic upgrade head "
            "(make up prints the one of the embedded server)"
        )

    def connect() -> psycopg.Connection:
        """psycopg reads the URL itself, so every form that psql takes is right: sockets, several hosts, service=."""
        conn = psycopg.connect(url)
        # Else nobody would see what a migration warns of.
        conn.add_notice_handler(lambda said: print(f"{said.severity}: {said.message_primary}", file=sys.stderr))  # noqa: T201
        return conn

    engine = create_engine("postgresql+psycopg://", creator=connect, poolclass=NullPool)
    with engine.connect() as connection:
        take_turn(connection)
        for name, value in SETTINGS.items():
            connection.exec_driver_sql("SELECT set_config(%s, %s, false)", (name, value))
        connection.commit()
        context.configure(connection=connection, transaction_per_migration=one_transaction_each())
        with context.begin_transaction():
            context.run_migrations()


def run_offline() -> None:
    """Print the migrations as SQL, for `psql -v ON_ERROR_STOP=1`."""
    context.configure(dialect_name="postgresql", transaction_per_migration=one_transaction_each())
    for name, value in SETTINGS.items():
        context.get_context().impl.static_output(f"SET {name} = '{value.replace(chr(39), chr(39) * 2)}';")
    with context.begin_transaction():
        context.run_migrations()


if context.config.cmd_opts is not None and context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)

if context.config.cmd_opts is not None and context.config.cmd_opts.cmd[0] is revision_command:
    # A new revision is only files: no database is asked.
    context.configure(dialect_name="postgresql", as_sql=True, process_revision_directives=number)
    context.run_migrations()
elif context.is_offline_mode():
    run_offline()
else:
    run_online()
