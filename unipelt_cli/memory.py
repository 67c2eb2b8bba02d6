"""How a computation says that it took more memory than there is, and how that is mended."""

import gc

import torch

from unipelt_cli.errors import RunError

_SAID = ("out of memory", "can't allocate memory", "not enough memory")


def is_exhausted(error: BaseException) -> bool:
    """Say whether an error means that a smaller batch could have fitted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def release() -> None:
    """Give back what a failed computation held; call it outside of the `except` block."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large() -> RunError:
    """Return the error for a single row that does not fit."""
    return RunError(
        "not even one row fits into memory",
        "lower model.max_length, or give a smaller backbone or another --device",
    )
