"""How many runs train at a time, here or on a Ray cluster."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unipelt_cli.sweeps.grid import Cell
    from unipelt_cli.sweeps.sweep import Engine


class LocalWorkers:
    """How many processes train at a time, with how many threads, and how many runs in a pass."""

    def __init__(self, cells: "list[Cell]", workers: int | None) -> None:
        from unipelt_cli.system.devices import choose_device

        device = choose_device(cells[0].experiment.train.device)
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.cores = cores or 1
        self.gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        if workers is None:
            workers = self.gpus or (1 if device.type != "cpu" else self.cores)
        self.workers = max(1, min(workers, len(cells)))
        self.threads = max(1, self.cores // self.workers)

    def size(self, cells: "list[Cell]") -> int:
        """Return how many runs may share a pass: on a GPU all, else so that no core waits."""
        return len(cells) if self.gpus else max(1, len(cells) // (4 * self.workers))

    def engine(self) -> "Engine":
        from unipelt_cli.sweeps import local_engine

        return lambda groups, is_stopped: local_engine.run(
            groups, self.workers, self.threads, self.gpus, is_stopped
        )


class RayCluster:
    """A Ray cluster, which decides by itself how many processes train at a time."""

    workers = 1

    def __init__(self, address: str | None, cpus: float, gpus: float) -> None:
        self.address, self.cpus, self.gpus = address, cpus, gpus

    def size(self, cells: "list[Cell]") -> int:
        """Return how many runs may share a pass: on a GPU all."""
        return len(cells) if self.gpus else 1

    def engine(self) -> "Engine":
        from unipelt_cli.sweeps import ray_engine

        return lambda groups, is_stopped: ray_engine.run(
            groups, self.address, self.cpus, self.gpus, is_stopped
        )
