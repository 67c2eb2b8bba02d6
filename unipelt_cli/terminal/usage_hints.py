"""Hints for a mistyped command line, and for what other tools call things."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unipelt_cli.errors import nearest
from unipelt_cli.terminal import choices, completion

COMMANDS: Mapping[str, str] = {
    **dict.fromkeys(("run", "fit", "finetune", "fine-tune", "start", "learn"), "train"),
    **dict.fromkeys(("evaluate", "test", "score", "validate"), "eval"),
    **dict.fromkeys(("infer", "classify", "label", "inference"), "predict"),
    **dict.fromkeys(("ls", "show", "methods", "tasks", "runs"), "list"),
    **dict.fromkeys(("check", "env", "info", "version"), "doctor"),
    **dict.fromkeys(("convert", "save"), "export"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("inspect", "gates", "plot"), "inspect-gates"),
    **dict.fromkeys(("tune", "search", "suggest", "auto"), "recommend"),
    **dict.fromkeys(("grid", "bench", "benchmark"), "sweep"),
    **dict.fromkeys(("data", "download", "preprocess"), "prepare"),
}
OPTIONS: Mapping[str, str] = {
    **dict.fromkeys(("lr", "rate"), "--set train.learning_rate="),
    **dict.fromkeys(("num-epochs", "num-train-epochs", "epoch"), "--set train.epochs="),
    **dict.fromkeys(
        ("bs", "batch", "train-batch-size", "per-device-train-batch-size"),
        "--set train.batch_size=",
    ),
    **dict.fromkeys(
        ("max-len", "max-seq-len", "max-seq-length", "sequence-length"), "--set model.max_length="
    ),
    **dict.fromkeys(("early-stopping", "early-stopping-patience"), "--set train.patience="),
    **dict.fromkeys(("warmup-ratio", "warmup-steps"), "--set train.warmup="),
    "wd": "--set train.weight_decay=",
    "dropout": "--set model.head_dropout=",
    "max-grad-norm": "--set train.clip=",
    **dict.fromkeys(("output", "output-dir", "out-dir", "save-dir", "run-dir", "dir"), "--out "),
    **dict.fromkeys(("data-dir", "data-path"), "--source "),
    **dict.fromkeys(("file", "data", "csv", "train", "train-data", "input"), "--train-file "),
    **dict.fromkeys(("dev", "validation-file", "eval-file", "valid-file"), "--dev-file "),
    **dict.fromkeys(("text-column", "text-col"), "--text "),
    **dict.fromkeys(("label-column", "label-col", "target"), "--label "),
    **dict.fromkeys(
        ("model-name", "model-name-or-path", "base-model", "backbone", "pretrained"), "--model "
    ),
    **dict.fromkeys(("task-name", "glue-task"), "--task "),
    **dict.fromkeys(("peft", "adapter", "peft-method"), "--method "),
    **dict.fromkeys(("shots", "num-examples", "n", "num-samples", "samples"), "--k "),
    **dict.fromkeys(("config", "recipe"), "--preset "),
    **dict.fromkeys(("random-seed", "train-seed"), "--seed "),
}
FLAGS: Mapping[str, str] = {
    **dict.fromkeys(("gpu", "cuda", "use-cuda"), "--device cuda"),
    **dict.fromkeys(("no-cuda", "cpu", "use-cpu"), "--device cpu"),
    **dict.fromkeys(("fp16", "bf16", "amp"), "--precision bf16"),
    "fp32": "--precision fp32",
    **dict.fromkeys(("force", "overwrite-output-dir"), "--overwrite"),
    **dict.fromkeys(("continue", "resume-from-checkpoint"), "--resume"),
    **dict.fromkeys(("dryrun", "check"), "--dry-run"),
    **dict.fromkeys(("local-files-only", "no-network"), "--offline"),
}
SEVERAL: Mapping[str, str] = {
    "--seed": "--seeds {0} trains a run for each",
    "--data-seed": "--data-seeds {0} trains a run for each",
    "--k": "`unipelt sweep --k {0}` trains a run for each",
}


MISSING = {
    "run": "give a run's directory; `unipelt list runs` shows those below runs/",
    "file": "give a file with the run's text columns, or - to read lines from stdin",
    "what": f"give one of {', '.join(completion.LISTS)}",
    "directories": "give runs, or directories that hold some, for example runs/",
}


def command(name: str, commands: Sequence[str]) -> str:
    """Return the hint for a command that is not there."""
    ours = COMMANDS.get(name.casefold())
    return f"did you mean {ours}?" if ours in commands else nearest(name, commands)


def option(name: str, words: Sequence[str], options: Sequence[str]) -> str | None:
    """Return what to write in place of an option that is not there; None where nobody knows.

    `options` are those of the command, `words` those of the command line.
    """
    plain = name.lstrip("-").casefold().replace("_", "-")
    value = value_of(name, words)
    target = FLAGS.get(plain)
    if target is None:
        target = OPTIONS.get(plain) or (f"--{plain} " if f"--{plain}" in options else None)
        target = target or _setting(plain.replace("-", "_"))
        target = target and target + ("VALUE" if value is None else value)
    if target is None or target.split()[0] not in options:
        return None
    return f"write {target}"


def _setting(key: str) -> str | None:
    sections = [section for section in choices.SECTIONS if key in choices.settings(section)]
    return f"--set {sections[0]}.{key}=" if sections else None


def argument(word: str, words: Sequence[str], options: Sequence[str]) -> str | None:
    """Return what to write in place of a word that no option takes; None where nobody knows."""
    before = words[words.index(word) - 1] if word in words else ""
    places = {
        "--task": word in choices.tasks(),
        "--tasks": all(name in choices.tasks() for name in word.split(",")),
        "--method": word in choices.methods(),
        "--train-file": Path(word).suffix in (".csv", ".tsv", ".jsonl", ".parquet"),
        "--preset": word.endswith(".toml")
        or word in (*choices.presets(), *choices.published_presets())
        or word.startswith("few-labels/"),
    }
    if "." in before and before.partition(".")[0] in (*choices.SECTIONS, "method"):
        return f"write --set {before.rstrip('=')}={word}"
    flag_that_fits = next((flag for flag, fits in places.items() if fits and flag in options), None)
    return flag_that_fits and f"write {flag_that_fits} {word}"


def number(flag: str, value: str) -> str:
    """Return the hint for what is no whole number."""
    if all(part.strip().isdecimal() for part in value.split(",")) and flag in SEVERAL:
        return SEVERAL[flag].format(value)
    if flag == "--k" and value == "all":
        return "leave --k out to train on all rows"
    return "give a whole number"


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """Return what was written behind a flag, if anything was."""
    for index, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        following = words[index + 1 : index + 2]
        if word == flag and following and not _is_flag(following[0]):
            return following[0]
    return None


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()


def explain_usage_error(error: Any, words: Sequence[str]) -> tuple[str, str]:
    """Turn a parser's error into what is wrong and what to do."""
    message = " ".join(error.format_message().split())
    message = re.sub(r"\s*\(?Did you mean.*|\s*\(Possible options:.*", "", message).rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "unipelt"
    see = f"see `{path} --help`"
    if error.ctx is None:
        return message, see
    options = [o for p in error.ctx.command.params for o in p.opts if o.startswith("--")]
    name = getattr(error, "option_name", None)
    if name is not None:
        close = nearest(name, options).partition(" otherwise")[0]
        known = option(name, words, options)
        return message, known or (f"{close} {see}" if "?" in close else see)
    if unknown := re.match(r"No such command '(.*)'", message):
        return message, command(unknown[1], list(error.ctx.command.commands))
    if extra := re.match(r"Got unexpected extra argument\S* \(([^\s)]+)", message):
        known = argument(extra[1], words, options)
        return message.replace("(s)", ""), known or see
    if wrong := re.match(r"Invalid value for '(--\S+)'.*valid integer", message):
        value = value_of(wrong[1], words) or ""
        return f"{wrong[1]} {value!r}: not a whole number", number(wrong[1], value)
    missing = getattr(error, "param", None)
    if message.startswith("Missing") and missing is not None and missing.name in MISSING:
        return message, MISSING[missing.name]
    return message[0].upper() + message[1:], see
