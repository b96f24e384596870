"""One run at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from compress import progress
from compress.errors import RunError

LOCK_FILE = "run.lock"  # says who works in the folder; one that is left behind locks nothing


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Keep other processes from running in ``root`` while the block runs; make it if need be.

    **Method:** a POSIX record lock on ``run.lock``. The kernel drops it when the process ends, by
    whatever cause, so there is no stale lock; it does not pass to forked workers, which may outlive
    a killed run, nor to a copy of the folder.

    Raises:
        RunError: another process runs there (the message has its pid), or nothing can be written.
    """
    is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = _opened(root / LOCK_FILE)
    except OSError as error:
        raise RunError(
            f"cannot be written: {error.strerror or error}",
            where=str(root),
            fix="Check the path and its permissions",
        ) from None
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            (root / LOCK_FILE).unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # something is in it
                root.rmdir()


def _opened(path: Path) -> int:
    """Return a locked descriptor of the file that ``path`` names.

    Raises:
        RunError: another process holds the lock.
        OSError: the file cannot be written.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has just ended and removed it


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:
        progress.warn(f"{path.parent}: this system has no file locks; run here once at a time")
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
        raise RunError(
            f"another run works in this folder: pid {holder or 'unknown'}",
            where=str(path.parent),
            fix="Wait until it ends, stop it, or give another folder with --out",
        ) from None
    except OSError as error:  # a network file system without locks
        progress.warn(f"{path.parent}: cannot be locked ({error.strerror}); run once at a time")


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
