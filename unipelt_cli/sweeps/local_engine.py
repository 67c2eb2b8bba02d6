"""The engine of one machine: a few processes, each of which trains one group after another."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from unipelt_cli.sweeps.cell_reports import (
    CellEnd,
    CellFailed,
    CellReport,
    CellSpec,
    dump_group,
    parse_report,
)

PATIENCE = 60.0  # seconds until a process that was asked to stop is killed
LIVES = 2  # how many processes a group may end before it has failed


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    group: Sequence[CellSpec] | None = None
    open: set[str] = field(default_factory=set)
    """The directories of the group that have not ended."""
    rest: bytes = b""


def run(
    groups: Sequence[Sequence[CellSpec]],
    workers: int,
    threads: int,
    gpus: int,
    is_stopped: Callable[[], bool],
) -> Iterator[CellReport | None]:
    """Train all groups in so many processes; yield their reports, and None now and then.

    A process that dies, killed or out of memory, is replaced, and its group goes on from its last
    state; a second death is its failure. With GPUs each process sees one of them.
    """
    waiting = deque(groups)
    deaths: dict[str, int] = {}
    engine = _Engine(threads, gpus)
    try:
        while (waiting or engine.busy) and not is_stopped():
            while waiting and len(engine.busy) < workers:
                engine.give(waiting.popleft())
            yield None
            for worker, reports in engine.read(timeout=0.5):
                yield from reports
                if worker.process.poll() is None or not worker.open:
                    continue
                died, name = worker.process.returncode, min(worker.open)
                deaths[name] = deaths.get(name, 0) + 1
                rest = [cell for cell in worker.group or () if cell.directory in worker.open]
                if deaths[name] < LIVES:
                    waiting.appendleft(rest)
                else:
                    yield from (_death(cell.directory, died) for cell in rest)
        yield from engine.stop()
    finally:
        engine.kill()


def _death(directory: str, code: int) -> CellFailed:
    end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return CellFailed(
        directory,
        f"the process that trained it was {end}, {LIVES} times",
        "if memory ran out, give fewer --workers; then the same command and --retry",
    )


class _Engine:
    """The processes and their pipes."""

    def __init__(self, threads: int, gpus: int) -> None:
        self.threads, self.gpus = threads, gpus
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()

    @property
    def busy(self) -> list[_Worker]:
        """The processes that train now."""
        return [worker for worker in self.workers if worker.group is not None]

    def give(self, group: Sequence[CellSpec]) -> None:
        """Let an idle process, or a new one, train a group."""
        idle = [worker for worker in self.workers if worker.group is None]
        worker = idle[0] if idle else self._start()
        worker.group, worker.open = group, {cell.directory for cell in group}
        with suppress(BrokenPipeError):  # dead already: found when it is read from
            pipe = _pipe(worker.process.stdin)
            pipe.write(dump_group(group).encode())
            pipe.flush()

    def _start(self) -> _Worker:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self.gpus:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            known = seen.split(",") if seen else [str(n) for n in range(self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = known[len(self.workers) % len(known)]
        process = subprocess.Popen(
            [sys.executable, "-m", "unipelt_cli.sweeps.worker", str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us; we pass it on once
        )
        worker = _Worker(process)
        self.workers.append(worker)
        self.selector.register(_pipe(process.stdout), selectors.EVENT_READ, worker)
        return worker

    def read(self, timeout: float) -> Iterator[tuple[_Worker, list[CellReport]]]:
        """Yield the processes that said something, or died, with what they said."""
        for key, _ in self.selector.select(timeout):
            worker: _Worker = key.data
            content = os.read(key.fd, 1 << 16)
            *lines, worker.rest = (worker.rest + content).split(b"\n")
            reports = []
            for line in lines:
                report = parse_report(line)
                if report is None:
                    worker.group = None
                    continue
                if isinstance(report, CellEnd):
                    worker.open.discard(report.directory)
                reports.append(report)
            if not content:
                self._bury(worker)
            yield worker, reports

    def _bury(self, worker: _Worker) -> None:
        self.selector.unregister(_pipe(worker.process.stdout))
        self.workers.remove(worker)
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            with suppress(BrokenPipeError):
                _pipe(pipe).close()

    def stop(self) -> Iterator[CellReport]:
        """Ask all processes to stop, and yield what they still say."""
        for worker in self.workers:
            with suppress(BrokenPipeError):
                _pipe(worker.process.stdin).close()
            if worker.group is not None:
                worker.process.terminate()
        end = time.monotonic() + PATIENCE
        while self.workers and time.monotonic() < end:
            for _, reports in self.read(timeout=0.5):
                yield from reports

    def kill(self) -> None:
        """End what has not ended."""
        for worker in list(self.workers):
            worker.process.kill()
            self._bury(worker)
        self.selector.close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
