"""A run folded into a plain sequence classifier of the transformers library, with its tokenizer."""

from pathlib import Path
from typing import Any

import transformers

from unipelt_cli.errors import RunError
from unipelt_cli.exports import adapters_folder
from unipelt_cli.exports.job import (
    Job,
    Writer,
    Written,
    compare_library,
    disagreement,
    labelled_config,
)
from unipelt_cli.exports.parity import padded
from unipelt_cli.methods import CannotMerge
from unipelt_cli.models.tuned import TunedModel, merge
from unipelt_cli.runs.run import Run


def plan(job: Job) -> Writer:
    """Fold a copy of the model; raise RunError where no plain classifier computes the same."""
    merged = job.copy()
    try:
        merge(merged)
    except CannotMerge as reason:
        raise RunError(
            f"{job.run.directory}: no plain classifier computes the same, {reason}",
            _remedy(job.run, merged),
        ) from None
    return lambda directory: _write(job, merged, directory)


def _write(job: Job, merged: TunedModel, directory: Path) -> Written:
    classifier(job.run, merged).save_pretrained(directory, safe_serialization=True)
    length = job.run.experiment.model.max_length
    tokenizer = job.tuned.pretrained.load_tokenizer()
    tokenizer.model_max_length = length  # where truncation=True cuts
    tokenizer.save_pretrained(directory)
    batches = padded(job.rows.encoded)
    parity = compare_library(job, batches, _load(directory), has_head=True)
    note = f"this run cuts rows to {length} tokens, as its tokenizer does with truncation=True"
    return Written(parity, [note], _snippet(job))


def _snippet(job: Job) -> str:
    row = '"a row"' if len(job.run.task.text) == 1 else '{"text": "one", "text_pair": "other"}'
    return (
        "from transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", {job.directory.name!r})\n'
        f"print(classify({row}, truncation=True, "
        f"max_length={job.run.experiment.model.max_length}))"
    )


def _remedy(run: Run, tuned: TunedModel) -> str:
    """Say what to do about a model that could not be merged (a copy: it may be spent here)."""
    problem = adapters_folder.problem(run, tuned)
    formats = "use --to onnx" if problem else "use --to adapters or --to onnx"
    if tuned.pretrained.layout.native is None:
        return formats
    misfit = tuned.misfit()
    if getattr(tuned.method, "gated", False) and misfit is None:
        return f"{formats}, or see with --static-gates what constant gates would cost"
    if tuned.method.unmergeable is not None or misfit is None:
        return formats
    return f"{formats}, or train with {misfit.flags}"  # that alone was in the way


def classifier(run: Run, tuned: TunedModel) -> Any:
    """Put a plain backbone and the head into the library's own classifier, strictly."""
    head, layout = tuned.classifier.head, tuned.pretrained.layout
    assert layout.native is not None  # only its pooling can be merged
    assert tuned.has_library_head
    tensors = {
        f"{layout.inside}.{name}": tensor
        for name, tensor in tuned.classifier.backbone.state_dict().items()
    }
    for path, linear in ((layout.native.out, head.out), (layout.native.dense, head.dense)):
        if linear is not None:
            tensors |= {f"{path}.{kind}": tensor for kind, tensor in linear.state_dict().items()}
    config = labelled_config(run, tuned)
    model = getattr(transformers, f"{layout.classes}ForSequenceClassification")(config)
    model.load_state_dict(tensors, strict=True)
    return model


def _load(directory: Path) -> Any:
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if lost := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise disagreement("transformers", str(lost[0]))
    return model.eval()
