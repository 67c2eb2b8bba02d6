"""A run's submodules as a folder that the `adapters` library loads: names, configs, files.

Imports `adapters` inside functions alone, as `methods.additive.compacter` does: the import takes
seconds. Written for 1.3.0, which merely logs what it misses or ignores in a folder; `load` checks
that.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from unipelt_cli.errors import RunError
from unipelt_cli.exports.job import Job, Writer, Written, compare_library, disagreement
from unipelt_cli.exports.parity import unpadded
from unipelt_cli.files import atomic
from unipelt_cli.methods.unipelt.layer import LayerSubmodules
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.run import Run

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
UNKNOWN = frozenset({"camembert", "mpnet", "modernbert"})
"""Architectures of ours for which `adapters` has no model class."""
UNWRITTEN: Mapping[str, str] = {
    "t5": "its backbone is the encoder of a t5, and adapters counts its prefix as positions",
    "bart": "its backbone is a bart, some of whose gates read other states in adapters",
}
"""Architectures of `adapters` that no folder is written for, each with the reason."""

POOLINGS = ("cls", "native")
"""What the heads of `adapters` read."""

PARTS = frozenset({"adapter", "prefix", "lora"})
"""The parts of ours that `adapters` has as the same function."""

PLACES: Mapping[str, tuple[str, str]] = {
    "distilbert": ("output_adapters", "self"),
    "albert": ("output_adapters", "self_prefix"),
}
"""Where a layer's adapter and the prefix are there, if not as in BERT."""

LAYER_NAMES: Mapping[str, tuple[str, ...]] = {
    "lora.query.a": ("{query}.loras.{name}.lora_A",),
    "lora.query.b": ("{query}.loras.{name}.lora_B",),
    "lora.value.a": ("{value}.loras.{name}.lora_A",),
    "lora.value.b": ("{value}.loras.{name}.lora_B",),
    "gates.lora": ("{query}.loras.{name}.gate", "{value}.loras.{name}.gate"),
    "gates.lora_query": ("{query}.loras.{name}.gate",),
    "gates.lora_value": ("{value}.loras.{name}.gate",),
    "gates.prefix": ("{attention}.prefix_tuning.prefix_gates.{name}",),
    "gates.adapter": ("{adapters}.adapters.{name}.gate",),
    "adapter.down": ("{adapters}.adapters.{name}.adapter_down.0",),
    "adapter.up": ("{adapters}.adapters.{name}.adapter_up",),
}
"""The names of a layer's submodules here and there; `adapters` has no shared LoRA gate."""


def problem(run: Run, tuned: TunedModel) -> tuple[str, str] | None:
    """Return why no folder holds this model and what to train instead, or None."""
    method, layout = tuned.method, tuned.pretrained.layout
    model_type = layout.model_type
    if not isinstance(method, Submodules) and method.unmergeable is not None:
        return (
            f"{run.directory}: method {run.experiment.method_name!r} adds what adapters has not",
            "train with --method unipelt-apl or one of its parts",
        )
    if reason := UNWRITTEN.get(model_type):
        remedy = "train on another backbone, such as a bert"
        if not isinstance(method, Submodules):
            misfit = tuned.misfit()
            flags = "" if misfit is None else f" with {misfit.flags}"
            remedy += f"{flags}, and use --to hf"
        return f"{run.directory}: {reason}", remedy
    if not isinstance(method, Submodules):
        misfit = tuned.misfit()
        native = "" if misfit is None else f"train with {misfit.flags} and "
        return (
            f"{run.directory}: method {run.experiment.method_name!r} adds no submodules, "
            "and adapters stores nothing else",
            f"{native}use --to hf",
        )
    gates_see_task = any("task_gates" in name for name, _ in tuned.classifier.named_parameters())
    if gates_see_task:
        return (
            f"{run.directory}: its gates see the task, and adapters has no such gates",
            "train with --method unipelt-apl",
        )
    if foreign := [part for part in method.parts if part not in PARTS]:
        others = [part for part in method.parts if part in PARTS] or Submodules().parts
        return (
            f"{run.directory}: has the part {foreign[0]!r}, and adapters has no such part",
            f"train without it (--set method.parts={','.join(others)})",
        )
    if model_type in UNKNOWN:
        return (
            f"{run.directory}: its backbone is a {model_type}, an architecture that adapters "
            "does not have",
            "train on another backbone, such as an xlm-roberta",
        )
    if tuned.untrained:
        return (
            f"{run.directory}: the backbone came without a pooler, so the run trained one, "
            "and an adapter folder has no place for it",
            "train with --set model.pooling=cls",
        )
    return None


def has_head(tuned: TunedModel) -> bool:
    """Say whether `adapters` has a classification head that reads what this model's head reads."""
    return tuned.misfit(*POOLINGS) is None


def plan(job: Job) -> Writer:
    """Check that a folder can hold the model; raise RunError where none can."""
    if obstacle := problem(job.run, job.tuned):
        message, remedy = obstacle
        may_fold = isinstance(job.tuned.method, Submodules) and job.tuned.pretrained.layout.native
        raise RunError(message, f"{remedy}, or try --to hf" if may_fold else remedy)
    return lambda directory: _write(job, directory)


def _write(job: Job, directory: Path) -> Written:
    write(job.run, job.tuned, directory)
    model = load(job.tuned, directory)
    # Gates there average over padding.
    batches = unpadded(job.rows.encoded)
    parity = compare_library(job, batches, model, has_head=has_head(job.tuned))
    return Written(parity, list(_notes(job)), _snippet(job), compares_logits=has_head(job.tuned))


def _notes(job: Job) -> Iterator[str]:
    method = job.tuned.method
    if method.pads_to_max_length:
        length = job.run.experiment.model.max_length
        yield f"this run averages gates over padding: pad every row to {length} tokens there too"
    elif getattr(method, "gated", False):
        yield "adapters averages gates over padding, so its results for padded batches differ"
    if misfit := job.tuned.misfit(*POOLINGS):
        yield (
            f"adapters has no head that reads {misfit.reads}: none was written, "
            "and the parity is that of hidden states"
        )


def _snippet(job: Job) -> str:
    flags = "use_safetensors=True, set_active=True"  # without either it fails, or does nothing
    return (
        "from adapters import AutoAdapterModel\n\n"
        f"model = AutoAdapterModel.from_pretrained({job.tuned.pretrained.public_name!r})\n"
        f"model.load_adapter({job.directory.name!r}, {flags})\n"
        "model.eval()"
    )


def write(run: Run, tuned: TunedModel, directory: Path) -> None:
    """Write the folder's files: the submodules, and the head where there is one for it."""
    name = "unipelt_" + re.sub(r"[^A-Za-z0-9_-]", "_", run.task.name)
    _write_config(directory / ADAPTER_CONFIG, _parts_config(tuned), tuned, name)
    atomic.write(directory / ADAPTER_WEIGHTS, save(dict(_renamed(tuned, name)), {"format": "pt"}))
    if has_head(tuned):
        _write_config(directory / HEAD_CONFIG, _head_config(run, tuned), tuned, name)
        weights = dict(_head_tensors(tuned, name))
        atomic.write(directory / HEAD_WEIGHTS, save(weights, {"format": "pt"}))


def load(tuned: TunedModel, directory: Path) -> Any:
    """Load the backbone and a written folder as a user of `adapters` does, in float32.

    Raises CheckError unless every tensor of the adapter and the head came from the folder.
    """
    import adapters

    pretrained = tuned.pretrained
    config = pretrained.library_config()
    model = adapters.AutoAdapterModel.from_pretrained(
        pretrained.directory,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
    )
    name = model.load_adapter(str(directory), use_safetensors=True, set_active=True)
    written = {
        key: tensor
        for file in (ADAPTER_WEIGHTS, HEAD_WEIGHTS)
        if (directory / file).is_file()
        for key, tensor in load_file(directory / file).items()
    }
    if wrong := next(_unread(model, name, written), None):
        raise disagreement(f"adapters {adapters.__version__}", wrong)
    return model.eval()


def _unread(model: Any, name: str, written: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield tensors of a loaded adapter that are not the written ones, and written ones unused.

    The prefix has a second name in every layer there; the folder holds it under one of them.
    """
    aliases: dict[int, dict[str, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        if f".{name}." in key:
            aliases.setdefault(tensor.data_ptr(), {})[key] = tensor
    used = set()
    for tensors in aliases.values():
        keys = tensors.keys() & written.keys()
        used |= keys
        if not any(torch.equal(tensors[key], written[key]) for key in keys):
            yield min(tensors)
    yield from sorted(written.keys() - used)


def _parts_config(tuned: TunedModel) -> Any:
    """Return the `adapters` config that has the same parts in the same sizes."""
    import adapters

    method, layer = tuned.method, tuned.classifier.backbone.get_submodule("submodules.layers.0")
    assert isinstance(method, Submodules)
    assert isinstance(layer, LayerSubmodules)
    configs: dict[str, Any] = {}
    if "prefix" in method.parts:
        configs["prefix"] = adapters.PrefixTuningConfig(
            flat=True, prefix_length=method.prefix_length
        )
    if "adapter" in method.parts:
        configs["adapter"] = adapters.SeqBnConfig(reduction_factor=method.reduction)
    if "lora" in method.parts:
        # A gate takes the place of alpha / r there: then B is written with the scale in it.
        configs["lora"] = adapters.LoRAConfig(r=method.rank, alpha=layer.scale * method.rank)
    parts = [
        config.replace(
            use_gating=method.gated,
            leave_out=sorted(layer for layer, name in method.left_out if name == part),
        )
        for part, config in configs.items()
    ]
    return parts[0] if len(parts) == 1 else adapters.ConfigUnion(*parts)


def _head_config(run: Run, tuned: TunedModel) -> Mapping[str, Any]:
    head, native = tuned.classifier.head, tuned.pretrained.layout.native
    return {
        "head_type": "classification",
        "num_labels": run.task.outputs,
        "layers": 1 if head.dense is None else 2,
        "activation_function": native.activation if native and head.dense else None,
        "label2id": {label: index for index, label in enumerate(run.task.labels)} or None,
        "use_pooler": tuned.classifier.reads_pooler,
        "bias": True,
        "dropout_prob": head.dropout.p,
    }


def _write_config(path: Path, config: Any, tuned: TunedModel, name: str) -> None:
    from adapters.configuration import build_full_config

    pretrained = tuned.pretrained
    full = build_full_config(
        config,
        tuned.classifier.backbone.config,
        model_name=pretrained.public_name,
        name=name,
        model_class=f"{pretrained.layout.classes}AdapterModel",
    )
    atomic.write_json(path, full)


def _renamed(tuned: TunedModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored submodules under the names that they have there."""
    layout, backbone, method = tuned.pretrained.layout, tuned.classifier.backbone, tuned.method
    assert isinstance(method, Submodules)
    adapters, prefix = PLACES.get(layout.model_type, ("output", "self_prefix"))
    layers = layout.layer_paths(backbone)
    places = {
        "query": layout.query,
        "value": layout.value,
        "attention": layout.attention,
        "adapters": adapters,
        "name": name,
    }
    for key, tensor in tuned.method.fold(backbone).items():
        if key == "submodules.prefix.rows":  # (N, 2, P, D), there flat in the order P, N, 2, D
            rows = tensor.permute(2, 0, 1, 3).flatten()
            pool = f"{layout.inside}.prefix_tuning.prefix_tunings.{name}"
            yield f"{pool}.{prefix}.control_trans", rows
            continue
        layer, path = key.removeprefix("submodules.layers.").split(".", 1)
        module, kind = (path, "") if path in LAYER_NAMES else path.rsplit(".", 1)
        if module.endswith(".b") and method.gated:
            tensor = tensor * method.lora_factor
        for pattern in LAYER_NAMES[module]:
            below = f"{pattern.format(**places)}.{kind}".rstrip(".")
            yield f"{layout.inside}.{layers[int(layer)]}.{below}", tensor.clone()


def _head_tensors(tuned: TunedModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the head's tensors: a layer there is dropout, linear unit, and activation if inner."""
    head = tuned.classifier.head
    linears = {1: head.out} if head.dense is None else {1: head.dense, 4: head.out}
    for module_name, linear in linears.items():
        for kind, tensor in linear.named_parameters():
            yield f"heads.{name}.{module_name}.{kind}", tensor.detach()
