"""One of the processes that test_processes.py starts: it trains, and writes down what it saw."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.errors import CheckError, RunError, UnipeltError
from unipelt_cli.models.build import build
from unipelt_cli.models.classifier import Classifier
from unipelt_cli.models.evaluation import compute_logits, encode_rows
from unipelt_cli.runs.writer import Writer
from unipelt_cli.system import processes
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.tasks import get_task
from unipelt_cli.training import execution
from unipelt_cli.training.events import BatchHalved, Epoch, TaskRows
from unipelt_cli.training.loop import Training

SENTENCES = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(21)]
BATCH = 4  # the last batch has one row: one of two processes has none


def settings(backbone: str, method: str, **train: Any) -> Experiment:
    given = {"device": "cpu", "precision": "fp32", "batch_size": BATCH, "epochs": 2, **train}
    sections = {
        "data": {"task": "sst2"},
        "model": {"backbone": backbone, "pooling": "cls"},
        "method": {"name": method},
        "train": {"patience": 9, "learning_rate": 5e-3, **given},
    }
    return resolve([("", sections)])


def loop_of(backbone: str, method: str, joined: Processes = ALONE, **train: Any) -> Training:
    planned = settings(backbone, method, **train)
    tuned = build(planned, 2)
    rows = encode_rows(tuned, [SENTENCES], 128), np.arange(len(SENTENCES)) % 2
    return Training(tuned, get_task("sst2"), rows, rows, planned.train, (), joined)


def loop_of_two_tasks(backbone: str, joined: Processes = ALONE) -> Training:
    """Train two heads in turn: the one that is not asked must not even decay."""
    planned = settings(backbone, "unipelt-apl", weight_decay=0.5)
    tuned = build(planned, (2, 2))
    encoded, task = encode_rows(tuned, [SENTENCES], 128), get_task("sst2")
    rows, other = (encoded, np.arange(21) % 2), (encoded, np.arange(21) // 2 % 2)
    more = [TaskRows(get_task("cola"), other, other)]
    return Training(tuned, task, rows, rows, planned.train, more, joined)


LOOPS: dict[str, Callable[..., Training]] = {
    **{
        method: lambda backbone, joined=ALONE, method=method: loop_of(backbone, method, joined)
        for method in ("unipelt-apl", "child-tuning-f", "adalora")
    },
    "two tasks": loop_of_two_tasks,
}


def tensors_of(loop: Training) -> dict[str, torch.Tensor]:
    buffers = loop.tuned.buffers()
    return {name: own.detach().clone() for name, own in (loop.carried | buffers).items()}


@contextmanager
def lacking_memory(rows: int) -> Iterator[None]:
    """Let a training pass of more rows than these run out of memory."""
    pooled = Classifier.pooled

    def limited(self: Any, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        if len(attention_mask) > rows and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pooled(self, attention_mask, **inputs)

    Classifier.pooled = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        Classifier.pooled = pooled  # type: ignore[method-assign]


def error_of(do: Callable[[], Any]) -> str:
    try:
        return f"no error, but {do()}"
    except UnipeltError as error:
        return f"{type(error).__name__}: {error.message}; {error.hint}"


def tell(joined: Processes) -> dict[str, Any]:
    """Let one process fail, and return what this one heard of it."""

    def fail_in(rank: int) -> int:
        if joined.rank == rank:
            raise CheckError(f"rank {rank} failed", "do nothing")
        return joined.rank

    numbers = torch.tensor([joined.rank + 1.0, 2.0])
    joined.sum(numbers)
    shared = [torch.tensor([joined.rank == 0, True]), torch.tensor(5 - joined.rank)]
    joined.broadcast(shared)
    return {
        "main": joined.on_main(lambda: {"rank": joined.rank}),
        "nothing": joined.on_main(lambda: None),
        "main fails": error_of(lambda: joined.on_main(lambda: fail_in(0))),
        "each": joined.on_each(lambda: fail_in(9)),
        "each fails": error_of(lambda: joined.on_each(lambda: fail_in(1))),
        "any": [joined.any(False), joined.any(joined.rank == 1)],
        "gather": joined.gather(joined.rank),
        "sum": numbers.tolist(),
        "share": [own.tolist() for own in shared],
    }


def full_disk(backbone: str, rows: str, out: Path, joined: Processes) -> str:
    """Let the main process find the disk full at the first epoch."""
    own = {"task": None, "folds": 0, "train_file": rows, "text": "text", "label": "label", "k": 24}
    planned = settings(backbone, "lora").with_("data", **own)
    if joined.is_main:

        def refuse(self: Writer, kind: str, values: Any) -> None:
            raise RunError("metrics.jsonl: No space left on device", "free some")

        Writer.metric = refuse  # type: ignore[method-assign]
    return error_of(lambda: list(execution.execute(planned, out, "new", joined)))


def main(backbone: str, rows: str, out: Path) -> None:
    with processes.joined() as joined:
        said: dict[str, Any] = {"heard": tell(joined)}
        kept: dict[str, torch.Tensor] = {}
        for method, make in LOOPS.items():
            loop = make(backbone, joined)
            events = [event for event in loop.events() if isinstance(event, Epoch)]
            said[method] = [event.train_loss for event in events]
            kept |= {f"{method} {name}": own for name, own in tensors_of(loop).items()}
            logits = compute_logits(loop.tuned, loop.dev[0], 0, joined)
            kept[f"{method} logits"] = torch.from_numpy(logits)
        with lacking_memory(1 if joined.rank == 1 else 9):
            events = list(loop_of(backbone, "unipelt-apl", joined).events())
            said["halved"] = [e.micro_batch_size for e in events if isinstance(e, BatchHalved)]
        with lacking_memory(0 if joined.rank == 1 else 9):
            loop = loop_of(backbone, "unipelt-apl", joined)
            said["not one row"] = error_of(lambda: list(loop.events()))
        said["full disk"] = full_disk(backbone, rows, out / "run", joined)
        (out / f"{joined.rank}.json").write_text(json.dumps(said))
        torch.save(kept, out / f"{joined.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
