"""The engine of many machines: groups of cells as tasks of a Ray cluster.

Ray decides where and when a task runs, and runs it again elsewhere when its node dies. A task
trains in a directory of its own machine; what is in it comes back, and is written here.
"""

import importlib.util
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from unipelt_cli.errors import ConfigError, RunError
from unipelt_cli.files import atomic, sealed
from unipelt_cli.files.lock import DirectoryLock
from unipelt_cli.runs.names import RECORDED, RESULT, STATE
from unipelt_cli.sweeps import worker
from unipelt_cli.sweeps.cell_reports import CellEnd, CellFailed, CellReport, CellSpec
from unipelt_cli.text import first_line
from unipelt_cli.training.planning import RowCache

Files = dict[str, bytes]
NAMES = (*RECORDED, STATE, RESULT)
"""What a run directory can hold, the result last: its presence means that all is there."""
RETRIES = 5  # of a task whose node or process died
ANSWER_SECONDS = 5.0
PATIENCE = 60.0  # seconds for tasks that were asked to stop
_shared = RowCache()


def run(
    groups: Sequence[Sequence[CellSpec]],
    address: str | None,
    cpus: float,
    gpus: float,
    is_stopped: Callable[[], bool],
) -> Iterator[CellReport | None]:
    """Train all groups on a cluster; yield their reports, and None now and then.

    Without an address a cluster of this machine alone is started. Raises ConfigError without the
    package, and RunError where no cluster answers or none of its nodes is large enough.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine ray: the package ray is not installed", "pip install 'unipelt[ray]'"
        )
    import ray

    with _connected(ray, address), _kept(ray):
        _require(ray, cpus, gpus)
        board: Any = ray.remote(_Board).options(num_cpus=0, **_here(ray)).remote()
        task: Any = ray.remote(train_group).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        tasks = {task.remote(group, _packed(group), cpus, board): group for group in groups}
        end = None
        while tasks:
            if end is None and is_stopped():
                ray.get(board.stop.remote())
                end = time.monotonic() + PATIENCE
            if end is not None and time.monotonic() > end:
                return
            yield None
            yield from ray.get(board.take.remote())
            done, _ = ray.wait(list(tasks), timeout=0.5)
            for ref in done:
                yield from ray.get(board.take.remote())
                yield from _received(ray, ref, tasks.pop(ref))


class _Board:
    """Where tasks write what happens, and read whether to stop."""

    def __init__(self) -> None:
        self.reports: list[CellReport] = []
        self.stopped = False

    def post(self, report: CellReport) -> None:
        self.reports.append(report)

    def take(self) -> list[CellReport]:
        reports, self.reports = self.reports, []
        return reports

    def stop(self) -> None:
        self.stopped = True

    def is_stopped(self) -> bool:
        return self.stopped


class _Asking:
    """Asks a question now and then, since its answer comes over the network."""

    def __init__(self, ask: Callable[[], bool], every: float = 1.0) -> None:
        self.ask, self.every, self.last, self.answer = ask, every, -every, False

    def __call__(self) -> bool:
        if time.monotonic() - self.last >= self.every:
            self.last, self.answer = time.monotonic(), self.ask()
        return self.answer


def train_group(
    group: Sequence[CellSpec], files: Mapping[str, Files], cpus: float, board: Any
) -> tuple[list[CellEnd], dict[str, Files]]:
    """Train a group in a directory of this machine; return how its cells ended, and their files.

    Progress goes to the board, which also says when to stop; what is unfinished then comes back
    so that it can go on.
    """
    import ray
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    ended: list[CellEnd] = []
    with tempfile.TemporaryDirectory(prefix="unipelt-") as root:
        copies = {cell.directory: Path(root, Path(cell.directory).name) for cell in group}
        homes = {str(copy): home for home, copy in copies.items()}
        for home, content in files.items():
            _write(copies[home], content)
        moved = [replace(cell, directory=str(copies[cell.directory])) for cell in group]
        ask = _Asking(lambda: bool(ray.get(board.is_stopped.remote())))
        for report in worker.carry_out(moved, _shared, ask) if not ask() else ():
            report = replace(report, directory=homes[report.directory])
            if isinstance(report, CellEnd):
                ended.append(report)
            else:
                ray.get(board.post.remote(report))
        return ended, {home: _read(copy) for home, copy in copies.items()}


def _received(ray: Any, ref: Any, group: Sequence[CellSpec]) -> Iterator[CellEnd]:
    """Write what a task brought, and pass on how its cells ended."""
    try:
        ended, files = ray.get(ref)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        for cell in group:
            yield CellFailed(
                cell.directory,
                f"its task ended with {type(error).__name__}: {lines[-1] if lines else ''}",
                "see the cluster's logs; then the same command and --retry",
            )
        return
    for home, content in files.items():
        if content:
            _write(Path(home), content)
    yield from ended


def _packed(group: Sequence[CellSpec]) -> dict[str, Files]:
    """Read what was done before of the cells of a group."""
    contents = {cell.directory: _read(Path(cell.directory)) for cell in group}
    return {directory: content for directory, content in contents.items() if content}


def _read(directory: Path) -> Files:
    paths = {name: directory / name for name in NAMES if (directory / name).is_file()}
    return {name: sealed.own_file(path).read_bytes() for name, path in paths.items()}


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    with atomic.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(directory):
        for name in NAMES:
            if name in files:
                atomic.write(directory / name, files[name])
        if RESULT in files:
            with suppress(OSError):
                (directory / STATE).unlink()


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Join a cluster, or start one; its handlers of signals are not ours."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _require_answer(address)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address is None:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        else:
            ray.init(log_to_driver=False, logging_level="ERROR", address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, first_line(error)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _kept(ray: Any) -> Iterator[None]:
    """Turn the loss of the cluster itself, or of this process's node, into an error."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the cluster was lost: {first_line(error)}",
            "what came back is kept: the same command goes on from there",
        ) from None


def _require_answer(address: str | None) -> None:
    """Knock at a cluster's door: its own client would try for minutes, and end the process."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str | None, why: str) -> RunError:
    return RunError(
        f"--address {address}: no cluster answers ({why})",
        "start one with `ray start --head`, and give its address, or auto; "
        "where it asks for a token, set RAY_AUTH_MODE=token",
    )


def _require(ray: Any, cpus: float, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise RunError(
            f"no node of the cluster has {cpus:g} CPUs and {gpus:g} GPUs for one group",
            "give less with --cpus and --gpus, or a cluster of larger nodes",
        )


def _here(ray: Any) -> Mapping[str, Any]:
    """Return the options that keep an actor on the node of this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
