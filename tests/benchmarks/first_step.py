"""Run the command line until its first optimiser step, then print how long that took.

    python -m tests.benchmarks.first_step START train ...

START is time.monotonic() before this process was started: the clock is the machine's.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from typing import Any

OPTIMIZER = "torch.optim.optimizer"


class Watch(importlib.abc.MetaPathFinder):
    """Hook the first step when the optimisers are imported, whenever and wherever that is."""

    def __init__(self, start: float) -> None:
        self.start = start

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Backbones the one module as Python would, and have our hook put in after it ran."""
        if name != OPTIMIZER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.register_optimizer_step_post_hook(self.report)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def report(self, *_: Any) -> None:
        """Print wall and CPU seconds since the start, and stop at once."""
        spent = {"wall": time.monotonic() - self.start, "cpu": time.process_time()}
        sys.stdout.write(json.dumps(spent) + "\n")
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    sys.meta_path.insert(0, Watch(float(sys.argv.pop(1))))
    from unipelt_cli.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
