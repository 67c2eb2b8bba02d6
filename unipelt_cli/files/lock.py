"""One writer a directory: a lock that says who holds it, and that a dead owner cannot keep."""

import fcntl
import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from unipelt_cli.errors import RunError
from unipelt_cli.files.atomic import writing
from unipelt_cli.files.strict import parse_json

LOCK = ".lock"
UNKNOWN = "another process"


@dataclass(frozen=True)
class _Owner:
    """The process that a lock file names."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def may_live(self) -> bool:
        """Whether it may still be there: of another host nobody can tell."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
        return True


class DirectoryLock:
    """The right to write in a directory, until it is released or the process ends.

    The system's file lock decides, and goes with its process however that ends, so a lock file
    that a killed one left holds nobody up. Where the file system knows no such locks, the owner
    that the file names decides: one of this host that is gone, too, holds nobody up.
    """

    def __init__(self, directory: Path) -> None:
        """Claim an existing directory; raise RunError while another process holds it."""
        self.path = directory / LOCK
        with writing(self.path):
            number = self._take()
            try:
                os.ftruncate(number, 0)
                os.pwrite(number, json.dumps(asdict(_here())).encode(), 0)
            except OSError:
                os.close(number)
                raise
        self._number: int | None = number

    def _take(self) -> int:
        while True:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                self._lock(number)
            except BaseException:
                os.close(number)
                raise
            if _is_at(number, self.path):
                return number
            os.close(number)  # its owner has just let it go

    def _lock(self, number: int) -> None:
        owner = _owner(number)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held(owner) from None
        except OSError:
            if owner is not None and owner.may_live:
                raise self._held(owner) from None

    def _held(self, owner: _Owner | None) -> RunError:
        return RunError(
            f"{self.path.parent}: {owner or UNKNOWN} is writing there",
            "wait until it has ended, or give another --out",
        )

    def release(self) -> None:
        """Let the directory go; a second time nothing happens."""
        if self._number is not None:
            with suppress(OSError):  # a lock file that stays holds nobody up
                self.path.unlink()  # before the lock goes: it is still ours
            os.close(self._number)
            self._number = None

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lock_owner(directory: Path) -> str | None:
    """Say which process writes in a directory now; None where none does, or nobody can tell."""
    try:
        number = os.open(directory / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return str(_owner(number) or UNKNOWN)
    except OSError:
        return None
    finally:
        os.close(number)
    return None


def _here() -> _Owner:
    return _Owner(os.getpid(), socket.gethostname())


def _owner(number: int) -> _Owner | None:
    """Read who wrote a lock file; None where nobody did, or not whole."""
    try:
        recorded = parse_json(os.pread(number, 1000, 0))
        return _Owner(int(recorded["pid"]), str(recorded["host"]))
    except (ValueError, KeyError, TypeError):
        return None


def _is_at(number: int, path: Path) -> bool:
    """Say whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(number), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
