"""Checks of what is fetched or read: the packaged backbone, data, a model, the hub."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unipelt_cli.errors import UnipeltError
from unipelt_cli.system import network
from unipelt_cli.system.check import Check

if TYPE_CHECKING:
    from unipelt_cli.backbones.pretrained import Pretrained

LENGTH = 128  # what model.max_length is if nobody says


def check_minilm() -> Iterator[Check]:
    """Check the packaged backbone, every file by its sha256."""
    from unipelt_cli.backbones.minilm import MINILM, MINILM_SHA256
    from unipelt_cli.backbones.pretrained import find

    find(MINILM)
    described = f"whole: {len(MINILM_SHA256)} files by their sha256"
    yield Check("backbone minilm", True, described, is_needed=True)


def check_data() -> Iterator[Check]:
    """Say which tasks lie where UNIPELT_DATA leads."""
    from unipelt_cli.data import sources
    from unipelt_cli.tasks import TASKS, Glue

    data_root = os.environ.get("UNIPELT_DATA")
    if not data_root:
        why = "UNIPELT_DATA is not set: GLUE's tasks come from the hub, demo is packaged"
        yield Check("data", None, why)
        return
    root = Path(data_root)
    if (root / "manifest.json").is_file():
        yield Check("data", True, f"{data_root}: a prepared directory")
        return
    present, missing = list[str](), list[str]()
    for task in TASKS.values():
        if isinstance(task.source, Glue):
            try:
                files = sources.glue_files(task, root).values()
                (present if all(path.is_file() for path in files) else missing).append(task.name)
            except UnipeltError:
                missing.append(task.name)
    lacks = f"; not there: {', '.join(missing)}" if missing else ""
    remedy = "set UNIPELT_DATA to a directory in GLUE's layout, with MRPC/train.tsv in it"
    ok = bool(present)
    described = f"{data_root}: {', '.join(present) or 'no task'}{lacks if ok else ''}"
    yield Check("data", ok, described, None if ok else remedy)


def check_hub(answers: Callable[[], bool] | None) -> Check:
    """Say whether the hub answers; None where it is not to be asked."""
    if answers is None:
        return Check("hub", None, "not asked: offline")
    if answers():
        return Check("hub", True, "answers")
    return Check(
        "hub",
        None,  # nothing is wrong with a machine that has no network
        f"does not answer within {network.PROBE_SECONDS:.0f} s",
        "set HTTPS_PROXY or HF_ENDPOINT; --task demo and files on disk need no hub",
    )


def check_model(name: str) -> Iterator[Check]:
    """Say what a backbone is, which parts it can carry, and which methods it refuses."""
    if network.names_hub(name) and name not in network.cached_backbones():
        remedy = f"`unipelt train --task demo --model {name} --dry-run` fetches it"
        yield Check(f"backbone {name}", None, "not in the local cache", remedy)
        return
    from unipelt_cli import methods
    from unipelt_cli.backbones.pretrained import find

    pretrained = find(name)
    layout, config = pretrained.layout, pretrained.library_config()
    size = (pretrained.directory / "model.safetensors").stat().st_size
    yield Check(f"backbone {name}", True, f"safetensors, {size / 1e6:.0f} MB", is_needed=True)
    layers = getattr(config, "num_hidden_layers", "?")
    described = f"{layout.model_type}, {layers} layers of {config.hidden_size} numbers"
    yield Check("architecture", True, f"{described}; attention {', '.join(layout.attentions)}")
    lacks = "".join(f"; no {part}: {reason}" for part, reason in layout.lacks.items())
    yield Check("parts", True, f"{', '.join(layout.parts)}{lacks}")
    positions = layout.positions(config)
    fits = positions is None or positions >= LENGTH
    bound = "no bound" if positions is None else f"{positions} tokens a row"
    shorter = None if fits else f"--set model.max_length={positions}"
    yield Check("positions", fits, bound, shorter)
    tokenizer = pretrained.load_tokenizer()
    yield Check("tokenizer", True, f"{len(tokenizer):,} tokens", is_needed=True)
    yield from _check_reading(pretrained, tokenizer)
    refused = {
        method: reason
        for method, recipe in methods.table().items()
        for reason, _ in list(recipe.method.refusals(layout, config))[:1]
    }
    runs = f"{len(methods.table()) - len(refused)} of {len(methods.table())} run"
    listed = "".join(f"; not {method}: {reason}" for method, reason in refused.items())
    yield Check("methods", True, f"{runs}{listed}")


def _check_reading(pretrained: "Pretrained", tokenizer: Any) -> Iterator[Check]:
    """Say how its own files want rows read, and whether its tokenizer fits its vocabulary."""
    from unipelt_cli.backbones.tokenizer_files import case_note

    try:
        reading = pretrained.sentence_reading
    except UnipeltError as error:
        yield Check("pooling", False, error.message, error.hint)
        return
    if reading.pooling is not None:
        left = f"; left out behind it: {', '.join(reading.left_out)}" if reading.left_out else ""
        yield Check("pooling", True, f"{reading.pooling}, as {reading.file} says{left}")
    note = case_note(tokenizer, pretrained.directory, wants_small=reading.lower_cases)
    if note is not None:
        message, _, remedy = note.removeprefix(f"{pretrained.directory}: ").partition("; ")
        yield Check("capitals", None, message, remedy)
