"""Layers of plain architectures computed from their weights alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.layout import Layout
from unipelt_cli.models.tuned import TunedModel

PLAIN = sorted(name for name, layout in BACKBONES.items() if layout.is_plain)
ABSOLUTE = [name for name in PLAIN if name != "mpnet"]
IDS = torch.tensor([[2, 5, 9, 11, 30, 7, 3]])

Change = Callable[[Tensor], Tensor]


def keep(x: Tensor) -> Tensor:
    return x


def layer_by_hand(
    layer: nn.Module,
    layout: Layout,
    h: Tensor,
    key: Change = keep,
    value: Change = keep,
    attention: Change = keep,
    inner: Change = keep,
    output: Callable[[Tensor, Tensor], Tensor] = lambda h1, z: z,
    apart: Tensor | float = 0.0,
) -> Tensor:
    """Compute a post-norm layer of 4 heads from its weights alone, for rows without padding."""

    def linear(path: str, x: Tensor) -> Tensor:
        module: Any = layer.get_submodule(path)
        return functional.linear(x, module.weight, module.bias)

    def norm(path: str, x: Tensor) -> Tensor:
        module: Any = layer.get_submodule(path)
        return functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), -1, 4, x.shape[-1] // 4).transpose(1, 2)

    q = heads(linear(layout.query, h))
    k, v = heads(key(linear(layout.key, h))), heads(value(linear(layout.value, h)))
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + apart).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(h.shape)
    h1 = norm(layout.attention_norm, h + attention(linear(layout.attention_output, mixed)))
    z = linear(layout.output, inner(functional.gelu(linear(layout.intermediate, h1))))
    return norm(layout.output_norm, h1 + output(h1, z))


def by_hand(tuned: TunedModel, **changes: Callable[[int], Any]) -> Tensor:
    """Compute the last hidden state of IDS; each change is made for a layer by its index."""
    backbone, layout = tuned.classifier.backbone, tuned.pretrained.layout
    embeddings = backbone.get_submodule("embeddings")
    h: Tensor = changes.pop("embedded", lambda x: x)(embeddings(input_ids=IDS))
    biased: Any = getattr(backbone, "encoder", None)
    apart = getattr(biased, "compute_position_bias", lambda _: 0.0)(h)  # mpnet's
    for index, layer in enumerate(layout.layer_list(backbone)):
        made = {name: make(index) for name, make in changes.items()}
        h = layer_by_hand(layer, layout, h, apart=apart, **made)
    return h


def hidden_of(tuned: TunedModel) -> Tensor:
    with torch.no_grad():
        output = tuned.classifier.backbone(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    hidden: Tensor = output.last_hidden_state
    return hidden


def tensors_below(tuned: TunedModel, name: str) -> dict[str, Tensor]:
    """Return the tensors below a module of the backbone."""
    return dict(tuned.classifier.backbone.get_submodule(name).named_parameters())


def bottleneck(tensors: dict[str, Tensor], activation: Change) -> Change:
    def adapter(x: Tensor) -> Tensor:
        low = activation(x @ tensors["down.weight"].T + tensors["down.bias"])
        return low @ tensors["up.weight"].T + tensors["up.bias"]

    return adapter
