"""How the heavy libraries are imported: once, when needed, and without what nothing here uses."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from unipelt_cli.text import first_line

_importing = False


@cache
def transformers() -> Any:
    """Import the transformers library, which asks once what it may use beside itself.

    It takes scikit-learn and scipy as optional, for text generation and object detection: where
    they are there it imports them with its models, for 1.4 s. So they look absent while it asks.
    """
    with importing():
        with _absent("sklearn", "scipy"):
            import transformers
        # It imports what all its models need only when asked for such a name.
        getattr(transformers, "PreTrainedModel")  # noqa: B009

    return transformers


@contextmanager
def importing() -> Iterator[None]:
    """Import in this block without collecting garbage, which modules are not.

    Python would look through all objects again and again: 0.6 s of 4 for torch and transformers.
    """
    global _importing  # as the collector's own switch is the process's
    if not gc.isenabled():
        yield
        return
    before = len(sys.modules)
    gc.disable()
    _importing = True
    try:
        yield
    finally:
        _importing = False
        if len(sys.modules) > before:
            gc.freeze()  # nor need later collections look at what was imported
        gc.enable()


def is_importing() -> bool:
    """Say whether libraries are imported right now: an exception can break one for good."""
    return _importing


@contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Make packages that are not imported yet look as if they were not installed.

    None in `sys.modules` says so, to `import` and to `importlib.util.find_spec`.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def guarded(refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Turn whatever a library raises over somebody's files into a refusal with its first line.

    A library in Rust may panic: that is no Exception, and writes to the terminal before.
    """
    try:
        with _mute():
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise refusal(first_line(error)) from None


@contextmanager
def _mute() -> Iterator[None]:
    """Send what is written to the terminal's error output nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed already
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def silenced() -> Iterator[None]:
    """Keep the library's progress and its advice about missing weights off the terminal."""
    logging = transformers().logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
