"""Write a run in another tool's format, load it there, and check that it computes the same."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from unipelt_cli import adapterhub, artifact, modeling, runs
from unipelt_cli.batches import Encoded
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.methods import CannotMerge
from unipelt_cli.methods.submodules import MERGEABLE, Submodules
from unipelt_cli.modeling import Tuned
from unipelt_cli.runs import Run

TOLERANCE = 1e-4
HOLDS = {"hf": MERGEABLE}
"""The parts that a format can hold without their gates, where it cannot hold all."""
CPU = torch.device("cpu")

Parity = dict[str, Any]


def export(run: Run, tuned: Tuned, to: str, directory: Path) -> dict[str, Any]:
    """Write a run's model to a new directory as `adapters` or `hf`; return what was checked.

    The parity compares this model with the written one, loaded by its own library in float32 on
    the CPU, each of the 64 probe rows alone and unpadded. Raises RunError for a directory that
    exists and for a model that the format cannot hold exactly: then nothing is written.
    """
    if len(run.tasks) > 1:
        raise RunError(
            f"{run.directory}: trained on several tasks, and no other format holds their heads",
            "train one task alone, with --task, and export that run",
        )
    parity, notes = _WRITERS[to](run, tuned, directory)
    if tuned.precision != "fp32":
        notes.append(f"this run computes in {tuned.precision}; the parity is that of float32")
    return {"format": to, "path": str(directory), "parity": parity, "notes": notes}


def holds(parity: Parity) -> bool:
    """Say whether the written model computes the same."""
    return bool(parity["max_abs_logit_diff"] <= TOLERANCE)


def _to_adapters(run: Run, tuned: Tuned, directory: Path) -> tuple[Parity, list[str]]:
    """Write a folder that `adapters` loads beside the backbone."""
    if problem := adapterhub.problem(run, tuned):
        message, remedy = problem
        may_fold = isinstance(tuned.method, Submodules) and tuned.pretrained.layout.native
        hint = f"{remedy}, or try --to hf" if may_fold else remedy
        raise RunError(message, hint)
    own = _copy(run, tuned)
    with _quiet(), artifact.new_directory(directory) as temporary:
        adapterhub.write(run, own, temporary)
        parity = _adapters_parity(own, adapterhub.load(own, temporary))
    return parity, list(_adapters_notes(run, own, directory))


def _adapters_parity(tuned: Tuned, model: Any) -> Parity:
    """Compare logits, or hidden states where no head was written."""
    rows, classifier = runs.probe_rows(tuned), tuned.classifier
    if adapterhub.has_head(tuned):
        logits = _each(classifier, rows)
        return _parity(logits, _each(lambda **row: model(**row).logits, rows))
    ours = _each(lambda **row: classifier.backbone(**row).last_hidden_state, rows)
    theirs = _each(lambda **row: model(**row).last_hidden_state, rows)
    return _parity(ours, theirs, lambda hidden: _read(tuned, hidden))


def _read(tuned: Tuned, hidden: Any) -> Tensor:
    """Return the logits that this model's head reads from unpadded hidden states."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.long)
    features = tuned.classifier._pool(BaseModelOutput(last_hidden_state=hidden), mask)
    logits: Tensor = tuned.classifier.head(features)
    return logits


def _adapters_notes(run: Run, tuned: Tuned, directory: Path) -> Iterator[str]:
    flags = "use_safetensors=True, set_active=True"  # without either it fails, or does nothing
    yield f"load it with model.load_adapter({str(directory)!r}, {flags})"
    method = tuned.method
    if method.pads_to_max_length:
        length = run.experiment.model.max_length
        yield f"this run averages gates over padding: pad every row to {length} tokens there too"
    elif getattr(method, "gated", False):
        yield "adapters averages gates over padding, so its results for padded batches differ"
    if not adapterhub.has_head(tuned):
        yield (
            f"adapters has no head that reads {tuned.pooling} pooling: none was written, "
            "and the parity is that of hidden states"
        )


def _to_hf(run: Run, tuned: Tuned, directory: Path) -> tuple[Parity, list[str]]:
    """Write a plain sequence classifier of the transformers library, with its tokenizer."""
    own, merged = _copy(run, tuned), _copy(run, tuned)
    try:
        modeling.merge(merged)
    except CannotMerge as reason:
        raise RunError(
            f"{run.directory}: no plain classifier computes the same, {reason}",
            _hf_remedy(run, merged),
        ) from None
    with _quiet(), artifact.new_directory(directory) as temporary:
        _plain_classifier(run, merged).save_pretrained(temporary, safe_serialization=True)
        own.tokenizer.save_pretrained(temporary)
        model = _load_plain(temporary)
        rows = runs.probe_rows(own)
        parity = _parity(
            _each(own.classifier, rows), _each(lambda **row: model(**row).logits, rows)
        )
    length = run.experiment.model.max_length
    return parity, [
        f"this run cuts rows to {length} tokens: give the tokenizer max_length={length} there too"
    ]


def _hf_remedy(run: Run, tuned: Tuned) -> str:
    """Say what to do about a model that could not be merged (a copy: it may be spent here)."""
    problem = adapterhub.problem(run, tuned)
    if tuned.pretrained.layout.native is None:
        return problem[1] if problem else "use --to adapters"
    adapters = f"{problem[1]} and use --to adapters" if problem else "use --to adapters"
    try:
        tuned.method.merge(tuned.classifier.backbone)
    except CannotMerge:
        return adapters
    # The method folds: only the pooling was in the way.
    native = "train with --set model.pooling=native"
    return native if problem else f"{adapters}, or {native}"


def _plain_classifier(run: Run, merged: Tuned) -> Any:
    """Put a merged backbone and the head into the library's own classifier, strictly."""
    pretrained, labels, head = merged.pretrained, run.task.labels, merged.classifier.head
    layout = pretrained.layout
    assert layout.native is not None  # only its pooling can be merged
    config = pretrained.library_config()
    config.num_labels = run.task.outputs
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification" if labels else "regression"
    tensors = {
        f"{layout.inside}.{name}": tensor
        for name, tensor in merged.classifier.backbone.state_dict().items()
    }
    for place, linear in ((layout.native.out, head.out), (layout.native.dense, head.dense)):
        if linear is not None:
            tensors |= {f"{place}.{kind}": tensor for kind, tensor in linear.state_dict().items()}
    classifier = getattr(transformers, f"{layout.classes}ForSequenceClassification")(config)
    classifier.load_state_dict(tensors, strict=True)
    return classifier


def _load_plain(directory: Path) -> Any:
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if lost := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise CheckError(
            f"transformers and the export disagree about the tensor {lost[0]}",
            "this is a bug in unipelt: please report it with the run's experiment.toml",
        )
    return model.eval()


_WRITERS: Mapping[str, Callable[[Run, Tuned, Path], tuple[Parity, list[str]]]] = {
    "adapters": _to_adapters,
    "hf": _to_hf,
}


def _copy(run: Run, tuned: Tuned) -> Tuned:
    """Build the model once more, in float32 on the CPU: merging it leaves the given one alone."""
    experiment = run.experiment.replace("train", device="cpu", precision="fp32")
    copy = modeling.build(experiment, run.task.outputs, tuned.pretrained, folded=True)
    copy.load(tuned.stored())
    return copy


def _each(model: Callable[..., Tensor], rows: Encoded) -> list[Tensor]:
    """Return what a model gives for each row alone, unpadded."""
    with torch.inference_mode():
        return [model(**rows.batch([row], CPU)) for row in range(len(rows))]


def _parity(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    to_logits: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Parity:
    """Summarise the differences between what two models gave for the same rows."""
    pairs = list(zip(ours, theirs, strict=True))
    differences = torch.cat([(own - their).abs().flatten() for own, their in pairs])
    with torch.inference_mode():
        flipped = [to_logits(own).argmax() != to_logits(their).argmax() for own, their in pairs]
    return {
        "rows": len(pairs),
        "max_abs_logit_diff": float(differences.max()),
        "mean_abs_logit_diff": float(differences.mean()),
        "label_flips": sum(map(int, flipped)),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings and advice off the terminal: the checks here are stricter."""
    logger, library = logging.getLogger("adapters"), logging.getLogger("transformers")
    levels = logger.level, library.level
    logger.setLevel(logging.ERROR)
    library.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(levels[0])
        library.setLevel(levels[1])
