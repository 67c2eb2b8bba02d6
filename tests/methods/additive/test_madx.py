"""MAD-X learns a language first, and a task on top of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.backbones import Backbones, save_backbone
from support.models import (
    as_pass,
    batch_of,
    disturbed,
    experiment,
    logits_of,
    seen_by,
    train_on_sixteen,
    tuned_of,
)
from support.rows import SENTENCES
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.architectures import BACKBONES, get_layout
from unipelt_cli.errors import BackboneError
from unipelt_cli.methods.additive import compacter
from unipelt_cli.methods.additive.madx import Corruption
from unipelt_cli.methods.base import AttachContext
from unipelt_cli.models.build import build
from unipelt_cli.models.tuned import TunedModel


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_madxs_inverse_undoes_its_invertible_adapter(
    backbone_dir: Backbones, model_type: str
) -> None:
    tuned = disturbed(tuned_of(backbone_dir(model_type), "madx"), 0.3)
    adapter = tuned.classifier.backbone.invertible_adapters["language"]
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        there = adapter(x)
        left, right = x[..., :16], x[..., 16:]
        first = left + adapter.F(right)
        assert torch.allclose(there, torch.cat([first, right + adapter.G(first)], -1), atol=1e-6)
        assert (there - x).abs().max() > 0.1
        assert torch.allclose(adapter(there, rev=True), x, atol=1e-5)
    embeddings = tuned.classifier.backbone.embeddings
    hooks = seen_by(embeddings, lambda: logits_of(tuned, SENTENCES))[1]
    plain = seen_by(embeddings.LayerNorm, lambda: logits_of(tuned, SENTENCES))[1]
    assert torch.allclose(hooks, adapter(plain), atol=1e-5)


def test_madx_learns_the_language_first_and_then_leaves_it_alone(backbone_dir: Backbones) -> None:
    options = {"language_share": 3.0, "language_rate": 1.0}
    tuned = disturbed(tuned_of(backbone_dir("bert"), "madx", options=options))
    classifier = tuned.classifier
    start = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    at_change: dict[str, Tensor] = {}
    enter = type(tuned.method).enter_stage

    def watched(method: Any, backbone: nn.Module, stage: int) -> None:
        at_change.update({n: t.clone() for n, t in classifier.state_dict().items()})
        enter(method, backbone, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tuned.method), "enter_stage", watched)
        _, losses = train_on_sixteen(tuned, epochs=2, learning_rate=1e-2)
    assert min(losses[3:6]) < losses[0] - 0.1  # it learns to restore tokens
    first = {n for n in start if not torch.equal(start[n], at_change[n])}
    second = {n for n in start if not torch.equal(at_change[n], classifier.state_dict()[n])}
    parts = {
        part: {f"backbone.{n}" for n in compacter.tensors(classifier.backbone, part)}
        for part in ("language", "task")
    }
    assert first == parts["language"]
    assert second == parts["task"] | {"head.out.weight", "head.out.bias"}


def test_madxs_stack_with_an_idle_language_part_is_a_pfeiffer_adapter(
    backbone_dir: Backbones,
) -> None:
    directory = backbone_dir("bert")
    settings = experiment(directory, "madx")
    stacked, single = build(settings, 2, folded=True), tuned_of(directory, "adapter")
    disturbed(single)
    own = dict(stacked.classifier.named_parameters())
    with torch.no_grad():
        for name, parameter in single.classifier.named_parameters():
            if not parameter.requires_grad:
                continue
            there = name.replace("submodules.layers", "encoder.layer").replace(
                "adapter.", "output.adapters.task.adapter_"
            )
            own[there.replace("adapter_down", "adapter_down.0")].copy_(parameter)
        for name, parameter in own.items():
            if any(f"language.{last}" in name for last in ("adapter_up", "F.2", "G.2")):
                parameter.zero_()
        expected = logits_of(single, SENTENCES)
        assert torch.allclose(logits_of(stacked, SENTENCES), expected, atol=1e-5)
        for name, parameter in own.items():
            if "adapters.language.adapter_up" in name:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(logits_of(stacked, SENTENCES), expected, atol=1e-2)


def test_madxs_language_part_has_a_rate_of_its_own(backbone_dir: Backbones) -> None:
    tuned = tuned_of(backbone_dir("bert"), "madx", options={"language_rate": 0.3})
    rates = {name: tuned.method.rate(name) for name in tuned.method.fold(tuned.classifier.backbone)}
    language = compacter.tensors(tuned.classifier.backbone, "language").keys()
    assert rates == {name: 0.3 if name in language else 1.0 for name in rates}


@pytest.mark.parametrize("mask_id", [4, None])
def test_madx_corrupts_text_alone_and_each_row_at_least_once(mask_id: int | None) -> None:
    layout, generator = get_layout("bert"), torch.Generator()
    site = AttachContext(layout, generator, mask_id=mask_id, special_ids=frozenset({0, 2, 3}))
    corruption = Corruption(site, vocabulary=50, share=0.15)
    ids = torch.tensor([[2, *range(5, 45), 3, 5, 0], [2, 7, 3, *[0] * 41]]).repeat(200, 1)
    mask = (ids != 0).long()
    mask[0, -1] = 0
    torch.manual_seed(0)
    corrupted, chosen = corruption(ids, mask)
    text = mask.bool() & ~torch.isin(ids, torch.tensor([0, 2, 3]))
    assert not (chosen & ~text).any()
    assert chosen.any(1).all()
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    long = chosen[::2].float().sum() / text[::2].sum()
    assert 0.13 < long < 0.18
    changed = (corrupted != ids)[chosen].float().mean()
    assert 0.85 < changed < 0.93
    if mask_id is None:
        assert len(corrupted[chosen].unique()) > 40
    else:
        assert 0.75 < (corrupted[chosen] == 4).float().mean() < 0.85


def masked_model(directory: Path, model_type: str) -> Any:
    """Save a tiny masked language model as the library does, with a tokenizer; return it."""
    save_backbone(directory, model_type)
    classes = BACKBONES[model_type].classes
    config = getattr(transformers, f"{classes}Config").from_pretrained(directory)
    model = getattr(transformers, f"{classes}ForMaskedLM")(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(directory)
    return model


def restoring(tuned: TunedModel) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return the language part's loss on a batch, the corrupted ids, the places, and the batch."""
    batch = batch_of(tuned)
    backbone: Any = tuned.classifier.eval().backbone
    step = dataclasses.replace(as_pass(tuned, iter(())), inputs=batch)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        corrupted, chosen = backbone.corruption(batch["input_ids"], batch["attention_mask"])
        torch.manual_seed(5)
        return tuned.method.loss(step), corrupted, chosen, batch


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
def test_madx_restores_tokens_through_the_checkpoints_own_head(
    tmp_path: Path, model_type: str
) -> None:
    """With an idle language part it is the loss of the library's own masked language model."""
    model = masked_model(tmp_path, model_type)
    tuned = tuned_of(tmp_path, "madx")
    kept = compacter.tensors(tuned.classifier.backbone, "language")
    with torch.no_grad():
        for name, parameter in kept.items():
            if any(last in name for last in ("adapter_up", "F.2", "G.2")):
                parameter.zero_()
    loss, corrupted, chosen, batch = restoring(tuned)
    with torch.no_grad():
        logits = model(corrupted, attention_mask=batch["attention_mask"]).logits[chosen]
    expected = functional.cross_entropy(logits, batch["input_ids"][chosen])
    assert torch.allclose(loss, expected, rtol=1e-5)
    before = {name: tensor.clone() for name, tensor in tuned.classifier.state_dict().items()}
    train_on_sixteen(tuned, epochs=1, learning_rate=1e-2)
    head = [name for name in before if ".language_head." in name]
    assert len(head) == 5
    assert all(torch.equal(before[name], tuned.classifier.state_dict()[name]) for name in head)
    assert not any("language_head" in name for name in tuned.stored())


def test_the_inverse_stands_between_that_head_and_the_embedding_matrix(tmp_path: Path) -> None:
    model = masked_model(tmp_path, "bert")
    tuned = disturbed(tuned_of(tmp_path, "madx"), 0.3)
    backbone: Any = tuned.classifier.backbone
    loss, corrupted, chosen, batch = restoring(tuned)
    with torch.no_grad():
        states = backbone(**{**batch, "input_ids": corrupted}).last_hidden_state[chosen]
        left, right = model.cls.predictions.transform(states).chunk(2, dim=1)
        invertible = backbone.invertible_adapters["language"]
        second = right - invertible.G(left)
        first = left - invertible.F(second)
        logits = model.cls.predictions.decoder(torch.cat([first, second], 1))
    expected = functional.cross_entropy(logits, batch["input_ids"][chosen])
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_a_norm_may_have_the_names_that_old_checkpoints_give_it(tmp_path: Path) -> None:
    masked_model(tmp_path, "bert")
    loss = restoring(tuned_of(tmp_path, "madx"))[0]
    file = tmp_path / "model.safetensors"
    norm = "cls.predictions.transform.LayerNorm"
    tensors = load_file(file)
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        tensors[f"{norm}.{old}"] = tensors.pop(f"{norm}.{new}")
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(restoring(tuned_of(tmp_path, "madx"))[0], loss)
    assert tuned_of(tmp_path, "madx").classifier.backbone.language_head is not None


def test_a_checkpoint_with_half_such_a_head_is_refused(
    tmp_path: Path, backbone_dir: Backbones
) -> None:
    assert tuned_of(backbone_dir("bert"), "madx").classifier.backbone.language_head is None
    masked_model(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    dense = "cls.predictions.transform.dense.weight"
    for changed in (None, tensors[dense][:, :5].contiguous()):
        others = {name: tensor for name, tensor in tensors.items() if name != dense}
        save_file(others if changed is None else {**others, dense: changed}, file, {"format": "pt"})
        with pytest.raises(BackboneError) as caught:
            tuned_of(tmp_path, "madx")
        assert caught.value.message == (
            f"the checkpoint's head for masked tokens lacks or misshapes {dense}"
        )
        assert tuned_of(tmp_path, "adapter").classifier is not None
    save_file({**tensors, dense: tensors[dense] / 0}, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=f"tensor {dense} holds numbers that are not finite"):
        tuned_of(tmp_path, "madx")


def test_the_language_part_may_be_wider_than_the_tasks(backbone_dir: Backbones) -> None:
    options = {"reduction": 16, "language_reduction": 2}
    tuned = tuned_of(backbone_dir("bert"), "madx", options=options)
    widths = {
        part: {
            tensor.shape[0]
            for name, tensor in compacter.tensors(tuned.classifier.backbone, part).items()
            if "adapter_down" in name
        }
        for part in ("language", "task")
    }
    assert widths == {"language": {16}, "task": {2}}
