"""What several methods are made of: linear units, adapters, low-rank pairs, prefixes."""

from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout

STD = 0.02


class Prefix(nn.Module):
    """Keys and values for every layer: a table through an MLP in training, plain rows once folded.

    The MLP runs once a step, not once an example.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],  # (N, P, D)
        width: int,
        generator: Generator,
        folded: bool,
        std: float = STD,
        start: Literal["normal", "uniform"] = "normal",
    ) -> None:
        super().__init__()
        layers, length, hidden = self.shape = shape
        self.folded = folded
        if folded:
            self.rows = nn.Parameter(torch.zeros(layers, 2, length, hidden))
        else:
            self.table = nn.Parameter(_normal((length, hidden), generator, std))
            self.down = new_linear(hidden, width, generator)
            self.up = new_linear(width, layers * 2 * hidden, generator)
            for linear in (self.down, self.up) if start == "uniform" else ():
                initialise_as_torch(linear, generator)

    def forward(self) -> Tensor:  # (N, 2, P, D)
        if self.folded:
            return self.rows
        layers, length, hidden = self.shape
        generated: Tensor = self.up(torch.tanh(self.down(self.table)))
        return generated.view(length, layers, 2, hidden).permute(1, 2, 0, 3)


class LowRank(nn.Module):
    """A LoRA: x -> (x A^T) B^T, scaled; A kaiming-uniform, B zero, so it starts as nothing."""

    def __init__(
        self, linear: nn.Linear, rank: int, generator: Generator, outputs: int | None = None
    ) -> None:
        super().__init__()
        outputs = linear.out_features if outputs is None else outputs
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5, generator=generator)

    def forward(self, x: Tensor, scale: Tensor | float) -> Tensor:  # (B, T, D) -> (B, T, D)
        low = functional.linear(x, self.a.to(x.dtype)) * scale
        return functional.linear(low, self.b.to(x.dtype))


class Adapter(nn.Module):
    """A bottleneck: x -> up(relu(down(x))); down N(0, 0.02), up N(0, std), every bias 0."""

    def __init__(
        self, hidden: int, bottleneck: int, generator: Generator, std: float = STD
    ) -> None:
        super().__init__()
        self.down = new_linear(hidden, bottleneck, generator)
        self.up = new_linear(bottleneck, hidden, generator, std)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        low = functional.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))
        low = self.activate(low)
        return functional.linear(low, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))

    def activate(self, low: Tensor) -> Tensor:  # (B, T, M) -> (B, T, M)
        """Apply the non-linearity between the two matrices."""
        return low.relu()


class NearIdentityAdapter(Adapter):
    """Houlsby et al. 2019: a GELU, and matrices so small that the residual alone counts."""

    def __init__(self, hidden: int, bottleneck: int, generator: Generator) -> None:
        super().__init__(hidden, bottleneck, generator)
        std = 1e-3
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, 0.0, std, -2 * std, 2 * std, generator)

    def activate(self, low: Tensor) -> Tensor:
        return functional.gelu(low)


class ParallelAdapter(Adapter):
    """He et al. 2022: down kaiming-uniform like a LoRA's A, up zero, so it starts as nothing.

    `dropout` acts between ReLU and up, as in their code.
    """

    def __init__(
        self, hidden: int, bottleneck: int, generator: Generator, dropout: float = 0.0
    ) -> None:
        super().__init__(hidden, bottleneck, generator)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout)

    def activate(self, low: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(super().activate(low))
        return dropped


def _normal(shape: tuple[int, ...], generator: Generator, std: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def train_norms(backbone: nn.Module, layout: Layout) -> None:
    """Let every LayerNorm of BERT's kind of backbone train: two a layer, and the embeddings'."""
    backbone.get_submodule(layout.embedding_norm).requires_grad_(True)
    for layer in layout.layer_list(backbone):
        for path in (layout.attention_norm, layout.output_norm):
            layer.get_submodule(path).requires_grad_(True)


def linear_at(layer: nn.Module, path: str) -> nn.Linear:
    """Return the linear unit at a path below a layer."""
    linear = layer.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def apply_linear(linear: Any, x: Tensor) -> Tensor:
    """Apply a float32 unit in the precision of what it gets."""
    weight: Tensor = linear.weight
    return functional.linear(x, weight.to(x.dtype), linear.bias.to(x.dtype))


def apply_norm(unit: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a float32 norm in the precision of what it gets."""
    weight, bias = unit.weight.to(x.dtype), unit.bias.to(x.dtype)
    return functional.layer_norm(x, unit.normalized_shape, weight, bias, unit.eps)


def initialise(linear: nn.Linear, generator: Generator, std: float = STD) -> None:
    """Draw a linear unit N(0, std) with zero bias, never from the global generator."""
    nn.init.normal_(linear.weight, 0.0, std, generator=generator)
    nn.init.zeros_(linear.bias)


def initialise_as_torch(linear: nn.Linear, generator: Generator) -> None:
    """Draw weight and bias uniformly in +-1 / sqrt(inputs), as torch does by itself."""
    bound = linear.in_features**-0.5
    for parameter in (linear.weight, linear.bias):
        nn.init.uniform_(parameter, -bound, bound, generator=generator)


def new_linear(inputs: int, outputs: int, generator: Generator, std: float = STD) -> nn.Linear:
    """Make a linear unit N(0, std) with zero bias."""
    linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    initialise(linear, generator, std)
    return linear
