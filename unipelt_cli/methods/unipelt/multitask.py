"""UniPELT on several tasks: shared submodules, behind gates that also see the task.

The extension that Mao et al. 2022 (arXiv 2110.07577) leave to future work. The gate of a task is
mean_t sigmoid((w + w_task) . x_t + b + b_task): it starts as the plain gate, w_task = b_task = 0.
A shift b_task alone would move too little in a few hundred steps.
"""

from collections.abc import Iterator
from types import MappingProxyType

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from unipelt_cli.methods.base import CHECKS, AttachContext, Recipe
from unipelt_cli.methods.unipelt.inspection import container_of
from unipelt_cli.methods.unipelt.layer import LayerSubmodules
from unipelt_cli.methods.unipelt.method import Submodules


@dataclass(frozen=True, config=CHECKS)
class TaskGatedSubmodules(Submodules):
    """A gated union of submodules that several tasks share, with a gate term for each task."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.gated:
            yield "gated = False: there is no gate to see the task", "use another method, ungated"

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        super().attach(backbone, site)
        for layer in container_of(backbone).layers:
            assert isinstance(layer, LayerSubmodules)
            for _ in range(site.tasks):
                terms = {name: _zero_like(gate) for name, gate in layer.gates.items()}
                layer.task_gates.append(nn.ModuleDict(terms))

    def select(self, backbone: nn.Module, task: int) -> None:
        container_of(backbone).state.task = task


def _zero_like(gate: nn.Module) -> nn.Linear:
    """Make a linear unit of zeros; one task's has its own tensors, so only its batches move it."""
    assert isinstance(gate, nn.Linear)
    term = nn.Linear(gate.in_features, gate.out_features, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        term.weight.zero_()
        term.bias.zero_()
    return term


METHODS = MappingProxyType(
    {
        "unipelt-multi": Recipe(
            TaskGatedSubmodules(),
            5e-4,
            "hybrid",
            "adapter + prefix + LoRA, shared by tasks, with gates that see the task",
            "ours, after Mao et al. 2022",
        ),
    }
)
