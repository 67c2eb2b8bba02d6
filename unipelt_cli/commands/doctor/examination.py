"""What of this machine and this installation works, and how the rest is mended.

Every part is looked at by itself: what is broken is one failed check, with the reason. Nothing
heavy is imported before it is that check's turn.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unipelt_cli.errors import UnipeltError
from unipelt_cli.system import network

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "unipelt"
NEEDED_EXTRA, UNSHOWN_EXTRAS = "demo", ("dev",)
MODULES = {"scikit-learn": "sklearn"}  # what is imported by another name than it is installed
MEMORY, DISK = 1_000_000_000, 100_000_000  # what training the demo takes at most
SIDE = 512  # of the matrices that are multiplied
MEASURE_SECONDS = 0.1
SLOWER = 1.25  # times as slow is not noise
LENGTH = 128  # what model.max_length is if nobody says


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `ok` is None for what is optional and absent, or not asked.

    `is_needed`: training the packaged task does not work where it fails.
    """

    what: str
    ok: bool | None
    found: str
    remedy: str | None = None
    is_needed: bool = False


def examine(
    model: str | None, *, offline: bool, terminal: tuple[str, str | None]
) -> Iterator[Check]:
    """Look at everything, and at a backbone too if one is named; `terminal` was looked at before.

    The libraries are kept off the network: the hub's one short probe runs beside their imports.
    """
    answers = None if offline or network.is_offline() else network.probing()
    network.settle(offline=True, needed=False)
    packages = list(_guarded("packages", _packages))
    broken = any(check.ok is False and check.is_needed for check in packages)
    yield from _guarded("python", _python)
    yield from packages
    yield from _guarded("extras", _extras)
    for what, section in (
        ("cpu", _cpu),
        ("device", _device),
        ("precision", _precision),
        ("memory", _memory),
        ("backbone minilm", _minilm),
        ("data", _data),
    ):
        yield from _guarded(what, section, after_broken=broken)
    yield _hub(answers)
    yield _writable("cache", network.caches()[0], "set HF_HOME to a folder that can be written")
    yield _writable("runs/", Path("runs"), "go to another directory, or give --out", needed=True)
    yield from _guarded("disk", _disk)
    yield Check("terminal", True, *terminal)
    if importlib.util.find_spec("kernels") is not None:
        said = "is installed: transformers may fetch and run code with it"
        yield Check("kernels", False, said, "pip uninstall kernels")
    if model is not None:
        name = f"backbone {model}"
        yield from _guarded(name, lambda: _model(model), after_broken=broken)


def _guarded(
    what: str, section: Callable[[], Iterator[Check]], *, after_broken: bool = False
) -> Iterator[Check]:
    """Yield a section's checks; what it raises is one that failed.

    Where a package is broken already, that is said above, and this one could not be checked.
    """
    try:
        yield from section()
    except UnipeltError as error:
        yield Check(what, False, error.message, error.hint, is_needed=True)
    except Exception as error:
        if after_broken:
            yield Check(what, None, "not checked: a package above is broken")
        else:
            yield Check(what, False, _reason(error), "mend the packages above", is_needed=True)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    ok = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    found = f"{platform.python_version()} on {platform.platform(terse=True)} ({wanted})"
    yield Check("python", ok, found, None if ok else f"use Python {wanted}", is_needed=True)


def _packages() -> Iterator[Check]:
    """Compare each required package with its supported range, and import it."""
    from packaging.requirements import Requirement

    try:
        said = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, False, "is not installed, only there", "pip install '.[demo]'")
        return
    for requirement in sorted(map(Requirement, said), key=lambda own: own.name):
        if _holds(requirement, ""):
            yield _package(requirement)


def _holds(requirement: "Requirement", extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: "Requirement") -> Check:
    name, wanted = requirement.name, f"'{requirement.name}{requirement.specifier}'"
    version, problem = _version(requirement)
    if problem is not None:
        return Check(name, False, problem, f"pip install {wanted}", is_needed=True)
    try:
        if name == "transformers":
            from unipelt_cli.system import imports

            imports.transformers()
        else:
            importlib.import_module(MODULES.get(name, name))
    except Exception as error:
        problem = f"{version} cannot be imported ({_reason(error)})"
        return Check(
            name, False, problem, f"pip install --force-reinstall {wanted}", is_needed=True
        )
    return Check(name, True, f"{version} ({requirement.specifier})", is_needed=True)


def _version(requirement: "Requirement") -> tuple[str, str | None]:
    """Return the version that is installed, and what is wrong with it."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "", "is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return version, None
    return version, f"{version} is not in the supported range {requirement.specifier}"


def _extras() -> Iterator[Check]:
    """Say of each extra whether its packages are there; none of them is imported."""
    from packaging.requirements import Requirement

    said = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        if extra in UNSHOWN_EXTRAS:
            continue
        own = [one for one in said if _holds(one, extra) and not _holds(one, "")]
        versions = {one.name: _version(one) for one in own}
        problems = [f"{name} {said}" for name, (_, said) in versions.items() if said]
        found = ", ".join(f"{name} {version}" for name, (version, _) in versions.items())
        is_needed = extra == NEEDED_EXTRA
        if not problems:
            yield Check(f"extra {extra}", True, found, is_needed=is_needed)
            continue
        is_there = any(version for version, said in versions.values() if said)
        remedy = f"pip install 'unipelt[{extra}]'"
        ok = False if is_needed or is_there else None
        yield Check(f"extra {extra}", ok, ", ".join(problems), remedy, is_needed)


def _cpu() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    found = f"{cores} of {os.cpu_count()} cores, {threads} threads{_processor()}"
    limited = threads < (cores or 1) and "OMP_NUM_THREADS" in os.environ
    remedy = "OMP_NUM_THREADS limits the threads: unset it to use every core" if limited else None
    yield Check("cpu", True, found, remedy)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor()
    return f", {name}" if name else ""


def _device() -> Iterator[Check]:
    import torch

    from unipelt_cli.models.build import choose_device

    device = choose_device("auto")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(place) for place in range(count))
        yield Check("device", True, f"cuda: {names}")
        return
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        found = f"a GPU's driver is there, and torch {torch.__version__} cannot use it"
        yield Check("device", False, found, "install torch for its CUDA: pytorch.org/get-started")
        return
    yield Check("device", True, device.type)


def _precision() -> Iterator[Check]:
    """Say what `auto` is here, and whether multiplying matrices agrees."""
    import torch

    from unipelt_cli.models.build import choose_device, choose_precision

    device = choose_device("auto")
    chosen = choose_precision("auto", device)
    share = _seconds(device, torch.bfloat16) / _seconds(device, torch.float32)
    found = f"auto is {chosen}; a product in bf16 takes {share:.2f} of fp32's time"
    wrong = share > SLOWER if chosen == "bf16" else share < 1 / SLOWER
    other = "fp32" if chosen == "bf16" else "bf16"
    yield Check("precision", True, found, f"--precision {other} may be faster" if wrong else None)


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


def _memory() -> Iterator[Check]:
    import torch

    from unipelt_cli.system import memory

    free = memory.available(torch.device("cpu"))
    if free is None:
        yield Check("memory", None, "the system does not say how much is free")
        return
    ok = free >= MEMORY
    remedy = None if ok else f"close programs: training the demo takes {MEMORY / 1e9:.0f} GB"
    yield Check("memory", ok, f"{free / 1e9:.1f} GB are free", remedy, is_needed=True)


def _minilm() -> Iterator[Check]:
    """Check the packaged backbone, every file by its sha256."""
    from unipelt_cli.backbones import pretrained

    pretrained.find(pretrained.MINILM)
    found = f"whole: {len(pretrained.MINILM_SHA256)} files by their sha256"
    yield Check("backbone minilm", True, found, is_needed=True)


def _data() -> Iterator[Check]:
    """Say which tasks lie where UNIPELT_DATA leads."""
    from unipelt_cli.data import sources
    from unipelt_cli.tasks import TASKS, Glue

    place = os.environ.get("UNIPELT_DATA")
    if not place:
        found = "UNIPELT_DATA is not set: GLUE's tasks come from the hub, demo is packaged"
        yield Check("data", None, found)
        return
    root = Path(place)
    if (root / "manifest.json").is_file():
        yield Check("data", True, f"{place}: a prepared directory")
        return
    there, missing = list[str](), list[str]()
    for task in TASKS.values():
        if isinstance(task.source, Glue):
            try:
                files = sources.glue_files(task, root).values()
                (there if all(path.is_file() for path in files) else missing).append(task.name)
            except UnipeltError:
                missing.append(task.name)
    lacks = f"; not there: {', '.join(missing)}" if missing else ""
    remedy = "set UNIPELT_DATA to a directory in GLUE's layout, with MRPC/train.tsv in it"
    ok = bool(there)
    found = f"{place}: {', '.join(there) or 'no task'}{lacks if ok else ''}"
    yield Check("data", ok, found, None if ok else remedy)


def _hub(answers: Callable[[], bool] | None) -> Check:
    if answers is None:
        return Check("hub", None, "not asked: offline")
    if answers():
        return Check("hub", True, "answers")
    return Check(
        "hub",
        None,  # nothing is wrong with a machine that has no network
        f"does not answer within {network.PROBE_SECONDS:.0f} s",
        "set HTTPS_PROXY or HF_ENDPOINT; --task demo and files on disk need no hub",
    )


def _writable(what: str, path: Path, remedy: str, *, needed: bool = False) -> Check:
    """Make a file that has no name where the path is, or would be, and let it go."""
    there = next(own for own in (path.absolute(), *path.absolute().parents) if own.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        said = f"{path} cannot be written ({error.strerror})"
        return Check(what, False, said, remedy, is_needed=needed)
    return Check(what, True, f"{path} can be written", is_needed=needed)


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= DISK
    remedy = None if ok else "free space, or give --out on another disk"
    found = f"{free / 1e9:.1f} GB are free here; a run takes about 1 MB"
    yield Check("disk", ok, found, remedy, is_needed=True)


def _model(name: str) -> Iterator[Check]:
    """Say what a backbone is, which parts it can carry, and which methods it refuses."""
    if network.names_hub(name) and name not in network.cached_backbones():
        remedy = f"`unipelt train --task demo --model {name} --dry-run` fetches it"
        yield Check(f"backbone {name}", None, "not in the local cache", remedy)
        return
    from unipelt_cli import methods
    from unipelt_cli.backbones import pretrained

    found = pretrained.find(name)
    layout, config = found.layout, found.library_config()
    size = (found.directory / "model.safetensors").stat().st_size
    yield Check(f"backbone {name}", True, f"safetensors, {size / 1e6:.0f} MB", is_needed=True)
    layers = getattr(config, "num_hidden_layers", "?")
    said = f"{layout.model_type}, {layers} layers of {config.hidden_size} numbers"
    yield Check("architecture", True, f"{said}; attention {', '.join(layout.attentions)}")
    lacks = "".join(f"; no {part}: {reason}" for part, reason in layout.lacks.items())
    yield Check("parts", True, f"{', '.join(layout.parts)}{lacks}")
    positions = layout.positions(config)
    fits = positions is None or positions >= LENGTH
    bound = "no bound" if positions is None else f"{positions} tokens a row"
    shorter = None if fits else f"--set model.max_length={positions}"
    yield Check("positions", fits, bound, shorter)
    tokenizer = found.load_tokenizer()
    yield Check("tokenizer", True, f"{len(tokenizer):,} tokens", is_needed=True)
    refused = {
        method: reason
        for method, recipe in methods.table().items()
        for reason, _ in list(recipe.method.refusals(layout, config))[:1]
    }
    runs = f"{len(methods.table()) - len(refused)} of {len(methods.table())} run"
    listed = "".join(f"; not {method}: {reason}" for method, reason in refused.items())
    yield Check("methods", True, f"{runs}{listed}")
