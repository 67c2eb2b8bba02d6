"""A run as a folder that the PEFT library loads beside the backbone: names, configs, files.

Imports `peft` inside functions alone: the import takes seconds. PEFT passes over tensors that it
does not know and leaves at random those that it misses; `_load` checks both.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor

from unipelt_cli.errors import RunError
from unipelt_cli.exports.job import (
    Job,
    Writer,
    Written,
    compare_library,
    disagreement,
    labelled_config,
)
from unipelt_cli.exports.parity import padded
from unipelt_cli.files import atomic
from unipelt_cli.gates import report
from unipelt_cli.methods import LowRankUpdates, NoKnownForm, Rescalings
from unipelt_cli.models.tuned import TunedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INSIDE = "base_model.model"  # where PEFT puts the model that it wraps
Form = LowRankUpdates | Rescalings


def plan(job: Job) -> Writer:
    """Find the form that PEFT has of the method; raise RunError where it has none."""
    tuned, gates = job.tuned, None
    if job.part is not None:
        recorded = report.gates_of(tuned, job.rows.encoded)
        gates = [
            {name: fmean(map(float, values)) for name, values in layer.items()}
            for layer in recorded
        ]
    try:
        form = tuned.method.as_low_rank_or_rescaling(
            tuned.classifier.backbone, job.part, gates or ()
        )
    except NoKnownForm as reason:
        raise RunError(
            f"{job.run.directory}: PEFT has no such method, {reason}", _remedy(job)
        ) from None
    if tuned.untrained and not tuned.has_library_head:
        raise RunError(
            f"{job.run.directory}: the backbone came without a pooler, so the run trained one, "
            "and without a head the folder has no place for it",
            "train with --set model.pooling=cls",
        )
    return lambda directory: _write(job, form, bool(gates), directory)


def _remedy(job: Job) -> str:
    remedies = ["use --to onnx"]
    method, layout = job.tuned.method, job.tuned.pretrained.layout
    if method.unmergeable is None and layout.native is not None:
        misfit = job.tuned.misfit()
        native = "" if misfit is None else f"train with {misfit.flags}, "
        remedies = [f"{native}use --to hf", "--to onnx"]
    if job.part is None and "lora" in method.submodules:
        remedies.append("export another model, one part alone, with --part lora")
    return ", or ".join(remedies)


def _write(job: Job, form: Form, is_held: bool, directory: Path) -> Written:
    tuned = job.tuned
    config, tensors = _translate(form, tuned, f"{INSIDE}.{_inside(tuned)}")
    if tuned.has_library_head:
        tensors |= dict(_head_tensors(tuned))
    config.save_pretrained(directory)
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomic.write(directory / WEIGHTS, save(content, {"format": "pt"}))
    parity = compare_library(
        job,
        padded(job.rows.encoded),
        _load(job, directory),
        has_head=tuned.has_library_head,
    )
    notes = list(_notes(job, is_held))
    return Written(parity, notes, _snippet(job), compares_logits=tuned.has_library_head)


def _translate(form: Form, tuned: TunedModel, inside: str) -> tuple[Any, dict[str, Tensor]]:
    """Return PEFT's config of a form, and its tensors by the names they have there."""
    import peft

    shared: dict[str, Any] = {
        "task_type": "SEQ_CLS" if tuned.has_library_head else "FEATURE_EXTRACTION",
        "base_model_name_or_path": tuned.pretrained.public_name,
        "inference_mode": True,
        "modules_to_save": sorted(_saved(tuned)) if tuned.has_library_head else None,
    }
    if isinstance(form, LowRankUpdates):
        alpha = form.scale * form.rank
        config: Any = peft.LoraConfig(
            r=form.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=_pattern(form.pairs, tuned),
            **shared,
        )
        return config, {
            f"{inside}{path}.lora_{kind}.weight": tensor
            for path, pair in form.pairs.items()
            for kind, tensor in zip("AB", pair, strict=True)
        }
    config = peft.IA3Config(
        target_modules=_pattern([*form.outputs, *form.inputs], tuned),
        feedforward_modules=_pattern(form.inputs, tuned),
        **shared,
    )
    columns = {path: vector[:, None] for path, vector in form.outputs.items()}
    rows = {path: vector[None] for path, vector in form.inputs.items()}
    return config, {f"{inside}{path}.ia3_l": tensor for path, tensor in (columns | rows).items()}


def _pattern(paths: Any, tuned: TunedModel) -> str:
    """Return the pattern of exactly these modules: PEFT takes bare names as ends of names.

    Then output.dense would also be attention.output.dense.
    """
    numbered = {re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(path)) for path in paths}
    return rf"{re.escape(_inside(tuned))}(?:{'|'.join(sorted(numbered))})"


def _inside(tuned: TunedModel) -> str:
    """Return the path of the backbone in the model that PEFT wraps, with its dot."""
    return f"{tuned.pretrained.layout.inside}." if tuned.has_library_head else ""


def _saved(tuned: TunedModel) -> set[str]:
    """Return the names of the modules outside the submodules that the run trained."""
    native = tuned.pretrained.layout.native
    assert native is not None
    places = {path.split(".")[0] for path in (native.out, native.dense) if path}
    return places | {name.split(".")[0] for name in tuned.untrained}


def _head_tensors(tuned: TunedModel) -> Iterator[tuple[str, Tensor]]:
    native, head = tuned.pretrained.layout.native, tuned.classifier.head
    assert native is not None
    for path, linear in ((native.out, head.out), (native.dense, head.dense)):
        for kind, tensor in [] if linear is None else linear.named_parameters():
            yield f"{INSIDE}.{path}.{kind}", tensor.detach()
    for name in tuned.untrained:
        parameter = tuned.classifier.backbone.get_parameter(name)
        yield f"{INSIDE}.{_inside(tuned)}{name}", parameter.detach()


def _load(job: Job, directory: Path) -> Any:
    """Load the backbone and a written folder as a user of PEFT does, in float32.

    Raises CheckError unless PEFT holds exactly the tensors that were written.
    """
    import peft

    pretrained = job.tuned.pretrained
    layout = pretrained.layout
    config = labelled_config(job.run, job.tuned)
    plain = pretrained.library_class
    if job.tuned.has_library_head:
        plain = getattr(transformers, f"{layout.classes}ForSequenceClassification")
    model = peft.PeftModel.from_pretrained(
        plain.from_pretrained(
            pretrained.directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
        ),
        str(directory),
    )
    # Without the last word it asks the hub whether the vocabulary has grown.
    read_back = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(directory / WEIGHTS)
    for name in sorted(read_back.keys() | written.keys()):
        pair = read_back.get(name), written.get(name)
        if pair[0] is None or pair[1] is None or not torch.equal(pair[0], pair[1]):
            raise disagreement(f"PEFT {peft.__version__}", name)
    return model.eval()


def _notes(job: Job, is_held: bool) -> Iterator[str]:
    if job.part is not None:
        yield f"this is the part {job.part} alone, which is another model than the run's"
    if is_held:
        yield "its gate is held at each layer's mean over the rows compared"
    if misfit := job.tuned.misfit():
        yield (
            "the library's own classifier, which PEFT wraps, does not read "
            f"{misfit.reads}: no head was written, and the parity is that of hidden states"
        )


def _snippet(job: Job) -> str:
    tuned = job.tuned
    name, folder = tuned.pretrained.public_name, job.directory.name
    kind, more = tuned.pretrained.library_class.__name__, ""
    if tuned.has_library_head:
        kind, more = "AutoModelForSequenceClassification", f", num_labels={job.run.task.outputs}"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f"backbone = {kind}.from_pretrained({name!r}{more})\n"
        f"model = PeftModel.from_pretrained(backbone, {folder!r}).eval()"
    )
