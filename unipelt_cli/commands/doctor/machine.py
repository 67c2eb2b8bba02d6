"""Checks of the machine: processor, device, precision, memory and disk."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unipelt_cli.system.check import Check

MEMORY, DISK = 1_000_000_000, 100_000_000  # what training the demo takes at most
SIDE = 512  # of the matrices that are multiplied
MEASURE_SECONDS = 0.1
SLOWER = 1.25  # times as slow is not noise


def check_processor() -> Iterator[Check]:
    """Name the processor, its cores and threads."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    described = f"{cores} of {os.cpu_count()} cores, {threads} threads{_processor()}"
    limited = threads < (cores or 1) and "OMP_NUM_THREADS" in os.environ
    remedy = "OMP_NUM_THREADS limits the threads: unset it to use every core" if limited else None
    yield Check("cpu", True, described, remedy)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor()
    return f", {name}" if name else ""


def check_device() -> Iterator[Check]:
    """Name what `--device auto` takes; a GPU that torch cannot use is a failure."""
    import torch

    from unipelt_cli.system.devices import choose_device

    device = choose_device("auto")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(device_index) for device_index in range(count))
        yield Check("device", True, f"cuda: {names}")
        return
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        problem = f"a GPU's driver is there, and torch {torch.__version__} cannot use it"
        yield Check("device", False, problem, "install torch for its CUDA: pytorch.org/get-started")
        return
    yield Check("device", True, device.type)


def check_precision() -> Iterator[Check]:
    """Say what `auto` is here, and whether multiplying matrices agrees."""
    import torch

    from unipelt_cli.system.devices import choose_device, choose_precision

    device = choose_device("auto")
    chosen = choose_precision("auto", device)
    share = _seconds(device, torch.bfloat16) / _seconds(device, torch.float32)
    described = f"auto is {chosen}; a product in bf16 takes {share:.2f} of fp32's time"
    wrong = share > SLOWER if chosen == "bf16" else share < 1 / SLOWER
    other = "fp32" if chosen == "bf16" else "bf16"
    yield Check(
        "precision", True, described, f"--precision {other} may be faster" if wrong else None
    )


def _seconds(device: Any, kind: Any) -> float:
    """Return the shortest time of a product of two matrices."""
    import torch

    matrix = torch.ones(SIDE, SIDE, device=device, dtype=kind)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type)
    best, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        matrix @ matrix
        if wait is not None:
            wait()
        best = min(best, time.perf_counter() - start)
    return best


def check_memory() -> Iterator[Check]:
    """Look at the memory that is free."""
    import torch

    from unipelt_cli.system import memory

    free = memory.available(torch.device("cpu"))
    if free is None:
        yield Check("memory", None, "the system does not say how much is free")
        return
    ok = free >= MEMORY
    remedy = None if ok else f"close programs: training the demo takes {MEMORY / 1e9:.0f} GB"
    yield Check("memory", ok, f"{free / 1e9:.1f} GB are free", remedy, is_needed=True)


def check_writable(what: str, path: Path, remedy: str, *, needed: bool = False) -> Check:
    """Make a file that has no name where the path is, or would be, and let it go."""
    folders = path.absolute(), *path.absolute().parents
    existing = next(folder for folder in folders if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        problem = f"{path} cannot be written ({error.strerror})"
        return Check(what, False, problem, remedy, is_needed=needed)
    return Check(what, True, f"{path} can be written", is_needed=needed)


def check_disk() -> Iterator[Check]:
    """Look at the room on the disk of the working directory."""
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= DISK
    remedy = None if ok else "free space, or give --out on another disk"
    room = f"{free / 1e9:.1f} GB are free here; a run takes about 1 MB"
    yield Check("disk", ok, room, remedy, is_needed=True)
