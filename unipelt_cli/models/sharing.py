"""One frozen backbone for several runs: whether they can share it, and their answers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unipelt_cli.methods.base import SharedPasses
from unipelt_cli.models.tuned import TunedModel


def can_share(tuned: TunedModel) -> bool:
    """Say whether runs of this kind can share passes: nothing of the backbone itself trains."""
    return tuned.method.joint(tuned.classifier.backbone) is not None and not tuned.untrained


def share(first: TunedModel, other: TunedModel) -> None:
    """Let another run's model read the frozen tensors of the first, and free its own."""
    frozen = {
        name: parameter.data
        for name, parameter in first.classifier.backbone.named_parameters()
        if not parameter.requires_grad
    }
    for name, parameter in other.classifier.backbone.named_parameters():
        if not parameter.requires_grad:
            parameter.data = frozen[name]
    joints = [model.method.joint(model.classifier.backbone) for model in (first, other)]
    assert joints[0] is not None
    joints[0].lend(joints[1])


def can_join(first: TunedModel, other: TunedModel) -> bool:
    """Say whether two models that `can_share` give their answers in the same pass."""
    return (
        can_share(first)
        and can_share(other)
        and (first.method, first.pooling, first.pairs, first.precision, first.device)
        == (other.method, other.pooling, other.pairs, other.precision, other.device)
    )


def hold_once(earlier: Sequence[TunedModel], new: TunedModel) -> None:
    """Let a model and earlier ones, none of which trains, hold once what is equal in them."""
    for other in sorted(earlier, key=lambda model: _joint(model) is None):
        # Fused layers read the tensors that they were made of: they lend, and do not borrow.
        borrows = _joint(other) is None and _joint(new) is not None
        _lend(*((new, other) if borrows else (other, new)))


def _lend(first: TunedModel, other: TunedModel) -> None:
    lent = dict(first.classifier.backbone.named_parameters())
    for name, parameter in other.classifier.backbone.named_parameters():
        if name in lent and _is_same(lent[name].data, parameter.data):
            parameter.data = lent[name].data
    joints = _joint(first), _joint(other)
    alike = (first.precision, first.device) == (other.precision, other.device)
    if joints[0] is not None and joints[1] is not None and alike:
        joints[0].lend(joints[1])


def _joint(tuned: TunedModel) -> SharedPasses | None:
    return tuned.method.joint(tuned.classifier.backbone)


def _is_same(first: Tensor, other: Tensor) -> bool:
    alike = (first.dtype, first.shape, first.device) == (other.dtype, other.shape, other.device)
    return alike and (first.data_ptr() == other.data_ptr() or torch.equal(first, other))


def answer(tuned: Sequence[TunedModel], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what each of several models that `can_join` says of the same rows, in one pass."""
    joints = list(map(_joint, tuned))
    assert joints[0] is not None
    rows = [len(inputs["attention_mask"])] * len(tuned)
    joined = {name: tensor.repeat(len(tuned), 1) for name, tensor in inputs.items()}
    with joints[0].together(joints, rows):
        pooled = tuned[0].classifier.pooled(**joined)
    classifiers = [model.classifier for model in tuned]
    split = zip(classifiers, torch.split(pooled, rows), strict=True)
    return [classifier.read(classifier.combine(texts)) for classifier, texts in split]
