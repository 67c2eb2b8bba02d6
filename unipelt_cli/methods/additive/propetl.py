"""One adapter for all layers, of which each layer keeps its own subnetwork by a binary mask.

ProPETL, Zeng, Zhang and Lu 2023 (arXiv 2305.17682). Shapes: hidden D, bottleneck m.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Published,
    Recipe,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import Adapter

PARTS = ("down", "up")


def top_share(scores: Tensor, share: float) -> Tensor:
    """Mark the share of scores that are largest in magnitude; a tie goes to the first place."""
    magnitude = scores.detach().abs().flatten()
    count = max(1, round(share * len(magnitude)))
    threshold = magnitude.kthvalue(len(magnitude) - count + 1).values
    above, level = magnitude > threshold, magnitude == threshold
    first = level.cumsum(0) <= count - above.sum()
    return (above | level & first).view_as(scores)


def straight_through(scores: Tensor, share: float) -> Tensor:
    """Return the mask of `top_share` as 0.0 and 1.0, with the gradient of the magnitudes."""
    magnitude = scores.abs()
    return top_share(scores, share).to(scores.dtype) + (magnitude - magnitude.detach())


def pack(bits: Tensor) -> Tensor:
    """Pack booleans of any shape into bytes, the first into the lowest bit: uint8 (n / 8)."""
    flat = bits.flatten().to(torch.uint8)
    rows = functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (rows << places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the booleans that `pack` took, in their shape."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places & 1).flatten()[: shape.numel()].view(shape).bool()


class LayerMask(nn.Module):
    """One layer's part of the prototype: scores in training, bits once folded."""

    def __init__(
        self, prototype: Adapter, share: float, generator: Generator, folded: bool
    ) -> None:
        super().__init__()
        self.share = share
        # a plain attribute: registered here too, the prototype would be stored by every layer
        self.prototype = (prototype,)
        for part in PARTS:
            shape = getattr(prototype, part).weight.shape
            if folded:
                self.register_buffer(part, torch.zeros(shape, dtype=torch.bool))
            else:
                scores = nn.Parameter(torch.empty(shape))
                # The authors keep their scores transposed, so that the fan is the other side's.
                nn.init.kaiming_uniform_(scores, 5**0.5, "fan_out", generator=generator)
                self.register_parameter(part, scores)

    def kept(self, part: str) -> Tensor:
        """Return which entries of a matrix this layer keeps."""
        held: Tensor = getattr(self, part)
        return held if held.dtype == torch.bool else top_share(held, self.share)

    def _linear(self, part: str, x: Tensor) -> Tensor:
        linear, held = getattr(self.prototype[0], part), getattr(self, part)
        chosen = held if held.dtype == torch.bool else straight_through(held, self.share)
        weight = linear.weight * chosen.to(linear.weight.dtype)
        return functional.linear(x, weight.to(x.dtype), linear.bias.to(x.dtype))

    def adapt(self, norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Add up(relu(down(norm(s)))) to the sum s that the layer's last norm gets: the hook."""
        (summed,) = args
        normed = norm.forward(summed)  # the frozen norm itself, without hooks
        return (summed + self._linear("up", self._linear("down", normed).relu()),)


class SharedAdapter(nn.Module):
    """The prototype and all layers' masks: `backbone.shared`."""

    def __init__(self, prototype: Adapter, masks: list[LayerMask]) -> None:
        super().__init__()
        self.prototype, self.masks = prototype, nn.ModuleList(masks)

    def each_mask(self) -> Iterator[tuple[str, LayerMask, str]]:
        """Yield the stored name, layer and part of every mask."""
        for index, mask in enumerate(self.masks):
            assert isinstance(mask, LayerMask)
            for part in PARTS:
                yield f"shared.masks.{index}.{part}", mask, part


@dataclass(frozen=True, config=CHECKS)
class ProPETL(Method):
    """A prototype adapter that every layer prunes in its own way: a bit a weight and layer.

    The paper does not say how scores start. As in the release they are uniform, those of the down
    matrix within 1 / sqrt(m) and those of the up matrix within 1 / sqrt(D): with the mask rate
    this decides how fast masks change.
    """

    reduction: Annotated[int, Field(ge=1, description="hidden size over bottleneck")] = 12
    share: Annotated[
        float, Field(gt=0, le=1, description="share of each matrix that a layer keeps")
    ] = 0.5
    mask_rate: Annotated[
        float, Field(gt=0, description="the scores' learning rate over the prototype's")
    ] = 30.0

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        return refuse_unusual_layers(layout)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        layout = site.layout
        layers = layout.layer_list(backbone)
        output = layers[0].get_submodule(layout.output)
        assert isinstance(output, nn.Linear)
        hidden = output.out_features
        prototype = Adapter(hidden, max(1, hidden // self.reduction), site.generator)
        masks = [LayerMask(prototype, self.share, site.generator, site.folded) for _ in layers]
        for layer, mask in zip(layers, masks, strict=True):
            layer.get_submodule(layout.output_norm).register_forward_pre_hook(mask.adapt)
        backbone.shared = SharedAdapter(prototype, masks)

    def rate(self, name: str) -> float:
        return self.mask_rate if name.startswith("shared.masks.") else 1.0

    def decays(self, name: str) -> bool:
        """Spare the scores: decay would change their ranking."""
        return not name.startswith("shared.masks.")

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the prototype and a bit for each weight and layer, in place of the scores."""
        packed = {name: pack(mask.kept(part)) for name, mask, part in _shared(backbone).each_mask()}
        return super().fold(backbone) | packed

    def unfold(self, backbone: nn.Module, stored: Mapping[str, Tensor]) -> None:
        rest = dict(stored)
        for name, mask, part in _shared(backbone).each_mask():
            held = mask.get_buffer(part)
            held.copy_(unpack(rest.pop(name), held.shape))
        super().unfold(backbone, rest)


def _shared(backbone: nn.Module) -> SharedAdapter:
    shared = backbone.shared
    assert isinstance(shared, SharedAdapter)
    return shared


METHODS = MappingProxyType(
    {
        "propetl": Recipe(
            ProPETL(),
            1e-4,
            "unified",
            "one adapter for all layers, masked by each",
            "Zeng et al. 2023",
            published=Published(
                1e-4, {"epochs": 20, "batch_size": 128, "warmup": 0.1, "weight_decay": 0.1}
            ),
        ),
    }
)
