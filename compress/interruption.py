"""Ctrl-C and SIGTERM: work stops where it can be continued, within seconds, with the usual code."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

PATIENCE_S = 4.0  # a call into a library that takes longer is not waited for
RETRY_S = 0.1  # until a signal that came during an import is looked at again
IMPORT = "<frozen importlib._bootstrap>"  # the file of what runs while a module is imported
ENDING = (signal.SIGINT, signal.SIGTERM)
MESSAGE = "compress: interrupted; a run goes on where it stopped: give the same command\n"


class InterruptedBySignal(KeyboardInterrupt):
    """A signal asked this process to end."""


@dataclass
class Signals:
    """What signals have asked of this process."""

    active: bool = False
    deferring: bool = False
    postponed: bool = False  # a module is being imported
    received: int | None = None

    @property
    def exit_code(self) -> int | None:
        """128 and the number of the signal, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
        return None if self.received is None else 128 + self.received

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; end the work unless it is to stop at a place of its own.

        An import is not interrupted: libraries in C++ that import modules abort the process.
        """
        waits = self.deferring and (self.received is None or self.postponed)
        self.received = number
        self.postponed = not waits and _is_importing(frame)
        if not waits and not self.postponed:
            raise InterruptedBySignal(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != IMPORT:
        frame = frame.f_back
    return frame is not None


_signals = Signals()


@contextlib.contextmanager
def ending_on_signals() -> Iterator[Signals]:
    """Turn SIGINT and SIGTERM into :class:`InterruptedBySignal` while the block runs.

    A library that does not return to Python is left after ``PATIENCE_S``: the process ends then
    and there, which is safe because files are written whole or not at all. Forked workers take
    signals as they would without this.

    Yields:
        What signals asked for; it stays readable after the block.
    """
    here, there = socket.socketpair()
    there.setblocking(False)
    _signals.active, _signals.postponed, _signals.received = True, False, None
    wakeup = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, _signals.handle) for number in ENDING}
    threading.Thread(target=_end_by_force, args=(here,), daemon=True).start()
    try:
        yield _signals
    finally:
        _signals.active = False
        signal.set_wakeup_fd(wakeup)
        there.close()  # ends the thread
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let the block go on after a signal until it calls :func:`stop_if_asked`.

    A second signal does not wait. Nothing changes where :func:`ending_on_signals` is not used.
    """
    _signals.deferring = True
    try:
        yield
    finally:
        _signals.deferring = False


def is_asked() -> bool:
    """Return whether a deferred signal waits."""
    return _signals.active and _signals.received is not None


def stop_if_asked() -> None:
    """End the work if a deferred signal waits.

    Raises:
        InterruptedBySignal: one does.
    """
    if is_asked():
        raise InterruptedBySignal(_signals.received)


def _leave_to_parent() -> None:
    """Give a forked worker the usual reaction to signals, and the parent's thread its peace."""
    if _signals.active:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _end_by_force(wakened: socket.socket) -> None:
    """Wait for SIGINT or SIGTERM; end the process if it still runs ``PATIENCE_S`` later.

    Until then it is told again of a signal that came during an import.
    """
    with wakened:
        number = 0
        while number not in ENDING:
            received = wakened.recv(1)
            if not received:  # the block has ended
                return
            number = received[0]
        deadline = time.monotonic() + PATIENCE_S
        while (left := deadline - time.monotonic()) > 0:
            wakened.settimeout(min(left, RETRY_S))
            with contextlib.suppress(TimeoutError):
                if not wakened.recv(64):
                    return
            if _signals.postponed:
                _tell_again(number)
                time.sleep(RETRY_S)  # until the main thread has looked at it
    sys.stderr.write(MESSAGE)
    sys.stderr.flush()
    os._exit(128 + number)


def _tell_again(number: int) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)
