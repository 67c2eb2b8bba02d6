"""Gradients of several processes, added up in one message."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipelt_cli.system.processes import Processes


class Gradients:
    """The gradients of parameters, and of the loss they belong to, over all processes.

    They go round in one buffer, which is made before memory can run out: many small messages
    would each wait for the slowest process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], processes: Processes) -> None:
        self.parameters, self.processes = parameters, processes
        if not processes.are_several or not parameters:
            return
        sizes = [parameter.numel() for parameter in parameters]
        total = sum(sizes)
        # Behind the gradients: how many processes have each, the loss, how many lack memory.
        self.buffer = torch.zeros(total + len(sizes) + 2, device=parameters[0].device)
        self.tail = self.buffer[total:]
        split = torch.split(self.buffer[:total], sizes)
        pairs = zip(split, parameters, strict=True)
        self.views = [view.view(parameter.shape) for view, parameter in pairs]

    def sum(self, loss: Tensor | None) -> Tensor | None:
        """Add up gradients and losses, this process's loss being None where it lacks memory.

        Returns the sum of the losses, or None, with nothing changed, where any process lacks it.
        """
        if not self.processes.are_several:
            return loss
        self._fill(loss)
        self.processes.sum(self.buffer)
        *holders, total, lacking = self.tail.tolist()
        if lacking:
            return None
        for parameter, view, count in zip(self.parameters, self.views, holders, strict=True):
            # What no process has a gradient for must not be decayed, and so gets none.
            parameter.grad = _laid_out(view, parameter) if count else None
        return torch.tensor(total)

    def _fill(self, loss: Tensor | None) -> None:
        self.buffer.zero_()
        if loss is None:
            self.tail[-1] = 1.0
            return
        self.tail[-2] = loss
        for index, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                self.tail[index] = 1.0


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient with the strides of its parameter, which the optimiser relies on."""
    if parameter.is_contiguous():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
