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
from pathlib import Path
from typing import Any

from unipelt_cli.errors import ConfigError, RunError
from unipelt_cli.files import atomic, sealed
from unipelt_cli.files.lock import Claim
from unipelt_cli.runs.names import RECORDED, RESULT, STATE
from unipelt_cli.sweeps import worker
from unipelt_cli.text import first_line
from unipelt_cli.training.planning import Shared

Group = list[dict[str, Any]]
Files = dict[str, bytes]
NAMES = (*RECORDED, STATE, RESULT)
"""What a run directory can hold, the result last: its presence means that all is there."""
RETRIES = 5  # of a task whose node or process died
ANSWER_SECONDS = 5.0
PATIENCE = 60.0  # seconds for tasks that were asked to stop
_shared = Shared()


def run(
    groups: Sequence[Group],
    address: str | None,
    cpus: float,
    gpus: float,
    is_stopped: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """Train all groups on a cluster; yield their reports (see `worker.carry_out`).

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
            yield {"kind": "tick"}
            yield from ray.get(board.take.remote())
            done, _ = ray.wait(list(tasks), timeout=0.5)
            for ref in done:
                yield from ray.get(board.take.remote())
                yield from _received(ray, ref, tasks.pop(ref))


class _Board:
    """Where tasks write what happens, and read whether to stop."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.stopped = False

    def post(self, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def take(self) -> list[dict[str, Any]]:
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
    group: Group, files: Mapping[str, Files], cpus: float, board: Any
) -> tuple[list[dict[str, Any]], dict[str, Files]]:
    """Train a group in a directory of this machine; return how its cells ended, and their files.

    Progress goes to the board, which also says when to stop; what is unfinished then comes back
    so that it can go on.
    """
    import ray
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    ended: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="unipelt-") as root:
        places = {own["directory"]: Path(root, Path(own["directory"]).name) for own in group}
        homes = {str(place): home for home, place in places.items()}
        for home, content in files.items():
            _write(places[home], content)
        told = [{**own, "directory": str(places[own["directory"]])} for own in group]
        ask = _Asking(lambda: bool(ray.get(board.is_stopped.remote())))
        for report in worker.carry_out(told, _shared, ask) if not ask() else ():
            report = report | {"directory": homes[report["directory"]]}
            if report["kind"] in ("finished", "failed"):
                ended.append(report)
            else:
                ray.get(board.post.remote(report))
        return ended, {home: _read(place) for home, place in places.items()}


def _received(ray: Any, ref: Any, group: Group) -> Iterator[dict[str, Any]]:
    """Write what a task brought, and pass on how its cells ended."""
    try:
        ended, files = ray.get(ref)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()
        for own in group:
            yield {
                "directory": own["directory"],
                "kind": "failed",
                "error": f"its task ended with {type(error).__name__}: {said[-1] if said else ''}",
                "hint": "see the cluster's logs; then the same command and --retry",
            }
        return
    for home, content in files.items():
        if content:
            _write(Path(home), content)
    yield from ended


def _packed(group: Group) -> dict[str, Files]:
    """Read what was done before of the cells of a group."""
    there = {own["directory"]: _read(Path(own["directory"])) for own in group}
    return {directory: content for directory, content in there.items() if content}


def _read(directory: Path) -> Files:
    found = {name: directory / name for name in NAMES if (directory / name).is_file()}
    return {name: sealed.own_file(path).read_bytes() for name, path in found.items()}


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    with atomic.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with Claim(directory):
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
    own: dict[str, Any] = {"include_dashboard": False} if address is None else {"address": address}
    _require_answer(address)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **own)
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
    if not any(own.get("CPU", 0) >= cpus and own.get("GPU", 0) >= gpus for own in nodes):
        raise RunError(
            f"no node of the cluster has {cpus:g} CPUs and {gpus:g} GPUs for one group",
            "give less with --cpus and --gpus, or a cluster of larger nodes",
        )


def _here(ray: Any) -> dict[str, Any]:
    """Return the options that keep an actor on the node of this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
