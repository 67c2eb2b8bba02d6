"""Models of one method on a tiny backbone, trained, disturbed and looked into."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.rows import SENTENCES, SIXTEEN, SIXTEEN_LABELS
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import BERT_BASE
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.sections import TrainSettings
from unipelt_cli.methods import StagePosition, TrainingBatch, get
from unipelt_cli.models.build import build, count
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.tasks import get_task
from unipelt_cli.training.events import Epoch
from unipelt_cli.training.loop import Training


def experiment(backbone: Path, method: str, **sections: dict[str, Any]) -> Experiment:
    """Describe a run of a method on a tiny backbone; `options` are the method's own."""
    settings = {
        "data": {"task": "sst2"} | sections.get("data", {}),
        "model": {"backbone": str(backbone), "head_dropout": 0.0} | sections.get("model", {}),
        "method": {"name": method} | sections.get("options", {}),
        "train": {"device": "cpu", "precision": "fp32"} | sections.get("train", {}),
    }
    return resolve([("", settings)])


def disturbed(tuned: TunedModel, size: float = 0.1) -> TunedModel:
    """Move every trained tensor, so that what a method adds is visible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, size, generator=generator))
    return tuned


def by_the_hooks(tuned: TunedModel) -> TunedModel:
    """Leave the fused layers, for comparisons to the bit with methods that have none."""
    container: Any = tuned.classifier.backbone.submodules
    container.stack.leave()
    container.stack = None
    return tuned


def logits_of(tuned: TunedModel, sentences: list[str], pad_to: int | None = None) -> torch.Tensor:
    """Return the logits of sentences in one batch, padded to a length if one is given."""
    rows = encode_rows(tuned, [sentences], 128)
    with torch.no_grad():
        batch = rows.batch(range(len(sentences)), tuned.device)
        if pad_to is not None:
            batch = {
                name: torch.nn.functional.pad(tensor, (0, pad_to - tensor.shape[1]))
                for name, tensor in batch.items()
            }
        return tuned.classifier.eval()(**batch)


def bert_base_counts(name: str, head_parameters: int = 1538, **options: Any) -> tuple[int, int]:
    """Return what a method trains and stores on BERT-base, without the head."""
    settings = experiment(Path("minilm"), name, options=options) if options else None
    return count(settings.method if settings else get(name).method, BERT_BASE, head_parameters)


def built(directory: Path, method: str, folded: bool = False, **options: Any) -> TunedModel:
    return build(experiment(directory, method, options=options), 2, folded=folded)


def training_logits(tuned: TunedModel, pad_to: int = 0) -> Tensor:
    """Return the logits of one pass in training mode, with whatever noise that has."""
    inputs = encode_rows(tuned, [SENTENCES], 128).batch(range(len(SENTENCES)), tuned.device)
    short = max(0, pad_to - inputs["input_ids"].shape[1])
    inputs = {name: functional.pad(tensor, (0, short)) for name, tensor in inputs.items()}
    logits: Tensor = tuned.classifier.train()(**inputs)
    return logits


def as_pass(
    tuned: TunedModel, logits: Iterator[Tensor], is_regression: bool = False
) -> TrainingBatch:
    """Return a step whose passes give these logits, with the mean of the logits as criterion."""
    return TrainingBatch(
        tuned.classifier.backbone,
        {},
        StagePosition(0, 0, 1),
        is_regression,
        lambda: next(logits),
        lambda given: given.mean(),
    )


def tuned_of(directory: Path, name: str, outputs: int = 2, **sections: Any) -> TunedModel:
    return build(experiment(directory, name, **sections), outputs)


def seen_by(module: nn.Module, run: Callable[[], object]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what goes into a module and what comes out of it, its own hooks included."""
    found: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, output: found.append((args, output)))
    run()
    handle.remove()
    return found[-1]


def names_moved(tuned: TunedModel, **train: object) -> set[str]:
    before = {name: tensor.clone() for name, tensor in tuned.classifier.state_dict().items()}
    train_on_sixteen(tuned, **train)
    after = tuned.classifier.state_dict()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


ATTENTIONS = [
    (model_type, attention)
    for model_type in ("bert", "roberta", "electra", "distilbert")
    for attention in BACKBONES[model_type].attentions
]


def batch_of(tuned: TunedModel) -> dict[str, Tensor]:
    return encode_rows(tuned, [SENTENCES], 128).batch(range(len(SENTENCES)), tuned.device)


def plain_states(directory: Path, attention: str = "eager") -> tuple[Tensor, ...]:
    """Return the embeddings' output and every layer's, of the backbone without a method."""
    head = build(experiment(directory, "head", model={"attention": attention}), 2)
    with torch.no_grad():
        output = head.classifier.backbone(**batch_of(head), output_hidden_states=True)
    states: tuple[Tensor, ...] = output.hidden_states
    return states


def last_state(tuned: TunedModel) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = tuned.classifier.backbone(**batch_of(tuned)).last_hidden_state
    return hidden


def largest_difference(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Return the largest difference at real tokens: nothing else is ever read."""
    return float((one - other)[mask.bool()].abs().max())


def loop_on_sixteen(tuned: TunedModel, **train: object) -> Training:
    """Return a loop over sixteen sentences, which are train and dev in one, by no recipe's way."""
    settings = TrainSettings.model_validate({"learning_rate": 5e-4, "batch_size": 6, **train})
    rows = encode_rows(tuned, [SIXTEEN], 128), SIXTEEN_LABELS
    return Training(tuned, get_task("sst2"), rows, rows, settings)


def train_on_sixteen(tuned: TunedModel, **train: object) -> tuple[Training, list[float]]:
    """Train on sixteen sentences; return the loop and the epochs' losses."""
    loop = loop_on_sixteen(tuned, **train)
    return loop, [event.train_loss for event in loop.events() if isinstance(event, Epoch)]


def resolved(**sections: dict[str, Any]) -> Experiment:
    return resolve([("", {"data": {"task": "mrpc"}, **sections})])


def saved_by(tuned: TunedModel, training: bool = True) -> list[Tensor]:
    """Return what autograd keeps for the backward pass of one batch, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {p.untyped_storage().data_ptr() for p in tuned.classifier.parameters()}
    tuned.classifier.train(training)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tuned.classifier(**batch_of(tuned)).square().sum()
    loss.backward()
    return [tensor for place, tensor in kept.items() if place not in own]
