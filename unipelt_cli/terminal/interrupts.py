"""Requests to stop: the first one ends a run resumably, the second at once."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from unipelt_cli.system.imports import is_importing
from unipelt_cli.system.processes import Processes

ECHO_SECONDS = 5.0
INTERRUPTED = 130
_was_asked = False


@contextmanager
def stop_on_request(processes: Processes) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second one interrupts.

    What launched several processes hands on what the terminal has told them already: an echo is
    no second request.
    """
    asked: float | None = None

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is None:
            asked = now
        elif not processes.are_several or now - asked > ECHO_SECONDS:
            processes.abandon()
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey_requests() -> None:
    """Treat a request to end, and Ctrl-C, as one thing from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
            signal.signal(number, _interrupt)


def was_asked() -> bool:
    """Say whether a request to end has come, whatever became of its KeyboardInterrupt."""
    return _was_asked


def _interrupt(number: int, frame: object) -> None:
    global _was_asked  # as the signal's own disposition is the process's
    if is_importing():  # nothing is written yet, and libraries end in odd ways
        os._exit(INTERRUPTED)
    _was_asked = True
    raise KeyboardInterrupt


def leave() -> None:
    """End an interrupted process; what it had to say has been said.

    Python itself would end by a signal where code inside a library was interrupted.
    """
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    os._exit(INTERRUPTED)
