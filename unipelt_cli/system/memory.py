"""How much memory there is, how a computation says that it took more, and how that is mended."""

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from unipelt_cli.errors import BackboneError, RunError

_SAID = (
    *("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory"),
    *("could not create a primitive", "could not create a memory object"),  # oneDNN's words for it
)


def is_exhausted(error: BaseException) -> bool:
    """Say whether an error means that a smaller batch could have fitted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and says_exhausted(str(error))


def says_exhausted(text: str) -> bool:
    """Say whether an error's words are those of a lack of memory."""
    return any(words in text for words in _SAID)


def release() -> None:
    """Give back what a failed computation held; call it outside of the `except` block."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc keeps what was freed, and has this alone
        ctypes.CDLL(None).malloc_trim(0)


def too_large() -> RunError:
    """Return the error for a single row that does not fit."""
    return RunError(
        "not even one row fits into memory",
        "lower model.max_length, or give a smaller backbone or another --device",
    )


def require(numbers: int, times: int, what: str, device: torch.device) -> None:
    """Raise BackboneError before float32 numbers, so many times each, are made that cannot fit.

    Nothing is refused where the machine does not say what it has.
    """
    needed = numbers * 4 * times
    free = available(device)
    if free is not None and needed > free:
        raise BackboneError(
            f"{what} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
            "give a smaller backbone, a method that trains less, or a machine with more memory",
        )


def activations(rows: int, length: int, config: Any) -> int:
    """Return the bytes that a batch keeps for the backward pass, about.

    That is sixteen numbers for each of a layer's units.
    """
    layers = getattr(config, "num_hidden_layers", 1)
    return int(4 * 16 * rows * length * layers * config.hidden_size)


def doubt(rows: int, length: int, config: Any, device: torch.device) -> str | None:
    """Say where a training batch may not fit, as far as that is known before; None elsewhere."""
    needed = activations(rows, length, config)
    free = available(device)
    if free is None or needed <= free:
        return None
    return (
        f"a batch of {rows} rows of {length} tokens may take {needed / 2**30:.0f} GiB, and "
        f"{free / 2**30:.0f} GiB are free: lower train.batch_size or model.max_length"
    )


def available(device: torch.device) -> int | None:
    """Return the bytes that a device can still give, or None where that cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [bound for bound in (_free(), _limit()) if bound is not None]
    return min(known, default=None)


def held(device: torch.device) -> int:
    """Return the bytes that this process has now; its peak where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak(device)


def peak(device: torch.device) -> int:
    """Return the most bytes that this process had since it began, or since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Measure the next run's peak by itself, where the system can do that, as Linux does."""
    release()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _free() -> int | None:
    """Return what the system would give without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _limit() -> int | None:
    """Return the limit of the container, in either of the ways in which Linux says it."""
    for path in _LIMITS:
        try:
            limit = int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there, or "max"
            continue
        if limit < 2**60:
            return limit
    return None


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
