"""The model card of an export: what was trained, on what, how well, and what it is not.

Names in it are strangers': they are shown as text, whatever Markdown they hold. No text of a row,
no path and no time is in it: the same run gives the same card, but for last digits of measures.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from unipelt_cli.backbones import pretrained
from unipelt_cli.exports import formats
from unipelt_cli.exports.job import Job
from unipelt_cli.exports.report import ExportReport
from unipelt_cli.files import atomic
from unipelt_cli.gates.report import gates_of
from unipelt_cli.gates.results import StaticReport
from unipelt_cli.metrics import loses_to_mean
from unipelt_cli.models.resampling import Sample, bootstrap_interval
from unipelt_cli.models.weighted_metrics import weighted_metric
from unipelt_cli.runs.run import Run
from unipelt_cli.system import network
from unipelt_cli.tasks import joint_positive
from unipelt_cli.text import shown_score

FILE = "README.md"
MOST_LABELS = 20  # whose counts are listed one by one
FEW_ROWS = 1000  # below so many train rows the card warns


def write(job: Job, report: ExportReport, snippet: str, directory: Path) -> None:
    """Write the card of a checked export as README.md of its folder."""
    text = "\n".join(lines(job, report, snippet)) + "\n"
    atomic.write(directory / FILE, text.encode())


def lines(job: Job, report: ExportReport, snippet: str) -> Iterator[str]:
    """Yield the card's lines."""
    run, to = job.run, report.format
    yield from _head(run, job.directory.name, formats.TARGETS[to].library, to)
    yield f"{_kind(run)}, and exported as `{to}`."
    yield from _section("Load it", ["```python", snippet, "```"])
    yield from _section("Constant gates", _static(report.static))
    yield from _section("Scores", _scores(run))
    yield from _section("Data", _data(run))
    yield from _section("Protocol", _protocol(run))
    yield from _section("Gates", _gates(job))
    yield from _section("Parity", _parity(report))
    yield from _section("Notes", [f"- {escaped(note)}" for note in report.notes])
    yield from _section("Limits", [f"- {limit}" for limit in _limits(run)])


def of_run(run: Run, repository: str) -> str:
    """Return the card of a run that is published as it is."""
    use = [
        "```sh",
        "pip install unipelt",
        f"unipelt verify hub:{repository}",
        f"echo 'some text' | unipelt predict hub:{repository} -",
        "```",
    ]
    content = [*_head(run, repository, "unipelt"), f"{_kind(run)}.", *_section("Use it", use)]
    if len(run.tasks) == 1:
        content += _section("Scores", _scores(run))
        content += _section("Data", _data(run))
        content += _section("Protocol", _protocol(run))
        content += _section("Limits", [f"- {limit}" for limit in _limits(run)])
    else:
        scores = run.outcome.test.items()
        positive = joint_positive(run.tasks).get("positive")
        rows = [[escaped(shown_score(name, positive)), f"{value:.4f}"] for name, value in scores]
        content += _section("Scores", _table(("metric", "test"), rows))
    return "\n".join(content) + "\n"


def _head(run: Run, name: str, library: str, *tags: str) -> Iterator[str]:
    yield from ("---", _metadata(run, name, library, tags), "---", "")
    task = ", ".join(escaped(each.name) for each in run.tasks)
    yield f"# {task}: {run.experiment.method_name} on {escaped(_backbone(run))}"
    yield ""


def _kind(run: Run) -> str:
    version = escaped(run.environment.get("unipelt", ""))
    if len(run.tasks) > 1:
        return f"{len(run.tasks)} tasks, a head each; trained by unipelt {version}"
    kind = "Regression" if run.task.is_regression else f"Text classification, {_labels(run)}"
    return f"{kind}; trained by unipelt {version} on {_rows(run, 'train')} rows"


def _backbone(run: Run) -> str:
    return pretrained.public_name(run.environment["backbone"]["name"])


def escaped(text: object) -> str:
    """Return somebody's text as one line that Markdown shows as it is."""
    line = re.sub(r"([\\`*_{}\[\]#!|~$])", r"\\\1", _one_line(text))
    # Nor do a bare address or tag become one.
    return re.sub(r"[&<>@]|:(?=//)|(?<=www)\.", lambda match: f"&#{ord(match[0])};", line)


def _one_line(text: object) -> str:
    """Return somebody's text without line breaks, and without marks that turn it around."""
    return "".join(
        character for character in " ".join(str(text).split()) if character.isprintable()
    )


def _metadata(run: Run, name: str, library: str, tags: Sequence[str]) -> str:
    """Return the YAML that the hub reads."""
    recorded_name = run.environment["backbone"]["name"]
    is_public = network.names_hub(recorded_name) or _backbone(run) != Path(recorded_name).name
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=_one_line(run.task.name),
            dataset_name=_one_line(run.task.name),
            dataset_split="test",
            metric_type=metric,
            metric_value=round(float(value), 4),
        )
        for metric, value in run.outcome.test.items()
    ]
    data = ModelCardData(
        base_model=_backbone(run) if is_public else None,
        pipeline_tag="text-classification",
        library_name=library or None,
        tags=["unipelt", run.experiment.method_name, *tags],
        model_name=_one_line(name),
        eval_results=results,
    )
    return data.to_yaml().strip()


def _section(title: str, content: Sequence[str] | Iterator[str]) -> Iterator[str]:
    """Yield a section, unless there is nothing in it."""
    if content_lines := list(content):
        yield from ("", f"## {title}", "", *content_lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _labels(run: Run) -> str:
    names = ", ".join(map(escaped, run.task.labels[:MOST_LABELS]))
    return f"{len(run.task.labels)} labels ({names}{', …' * (len(run.task.labels) > MOST_LABELS)})"


def _splits(run: Run) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], run.environment["data"]["splits"])


def _rows(run: Run, split: str) -> str:
    return f"{_splits(run)[split]['rows']:,}"


def _scores(run: Run) -> Iterator[str]:
    """Yield the scores, on test with the interval of rows drawn anew."""
    answers = run.predictions()
    rows = []
    for name, value in run.outcome.test.items():
        between = ""
        if answers is not None:
            predicted, expected = answers
            metric = weighted_metric(replace(run.task, metric=name))
            sample = Sample(expected, predicted[None], metric)
            low, high = bootstrap_interval([sample], np.random.default_rng(0))
            between = f"{low:.4f} to {high:.4f}"
        shown = escaped(shown_score(name, run.task.positive_label))
        dev = [f"{run.outcome.dev[name]:.4f}"] if run.outcome.dev else []
        rows.append([shown, *dev, f"{value:.4f}", between])
    dev = ["dev"] if run.outcome.dev else []
    yield from _table(("metric", *dev, _tested(run), "95 % of test rows drawn anew"), rows)
    yield ""
    if folds := run.outcome.folds:
        yield (
            f"Each of the {folds.rows:,} train rows was a test row once, for a model trained "
            f"on the other folds; the model here was trained on all of them."
        )
    yield "The interval is that of the test rows; of one run nothing shows what another seed gives."


def _tested(run: Run) -> str:
    """Say on which rows the scores are."""
    folds = run.outcome.folds
    return f"{folds.count} folds" if folds else "test"


def _static(report: StaticReport | None) -> Iterator[str]:
    """Yield what became of the gates and of submodules that were left out."""
    if report is None:
        return
    dropped = ", ".join(report.dropped) or "none"
    yield (
        "Every gate of the run is a constant here, its mean over the train rows. Left out, as "
        f"dev did not miss them: {dropped}. All of it could cost {report.cost:g} of dev "
        f"{report.metric}. The scores below are those of the run, before."
    )
    yield ""
    rows = [
        [name, f"{change.before:{form}}", f"{change.after:{form}}"]
        for name, change, form in (
            (f"dev {report.metric}", report.dev, ".4f"),
            (f"test {report.metric}", report.test, ".4f"),
            ("numbers stored", report.stored_parameters, ",.0f"),
        )
    ]
    yield from _table(("", "before", "after"), rows)


def _data(run: Run) -> Iterator[str]:
    """Yield what the rows are: their source, counts and hashes."""
    data = run.environment["data"]
    source = data["source"]
    named = f" ({escaped(source['name'])})" if isinstance(source.get("name"), str) else ""
    yield f"Source: {escaped(source.get('kind', 'unknown'))}{named}. Text columns: " + (
        f"{', '.join(map(escaped, run.task.text))}."
    )
    yield ""
    splits = _splits(run)
    rows = [
        [name, f"{described['rows']:,}", _sha256(described["row_ids"]), described["digest"][:12]]
        for name, described in splits.items()
    ]
    yield from _table(("split", "rows", "sha256 of the row ids", "sha256 of the rows"), rows)
    if 0 < len(run.task.labels) <= MOST_LABELS:
        yield ""
        counts = [
            [escaped(label), *(f"{described['labels'][label]:,}" for described in splits.values())]
            for label in run.task.labels
        ]
        yield from _table(("label", *splits), counts)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _protocol(run: Run) -> Iterator[str]:
    outcome, experiment, model = run.outcome, run.experiment, run.experiment.model
    pooling = run.result["pooling"]
    k = "all" if experiment.data.k is None else f"{experiment.data.k:,}"
    fingerprint = run.environment["backbone"]["fingerprint"][:12]
    yield f"- backbone {escaped(_backbone(run))}, fingerprint {fingerprint}"
    seeds = f"drawn by data seed {experiment.data.data_seed}; seed {experiment.train.seed}"
    yield f"- k = {k} train rows, {seeds}"
    if run.task.is_pair and model.pairs == "apart":
        yield (
            f"- each text of a pair cut to {model.max_length} tokens and read by itself, "
            f"{pooling} pooling; the head reads what their unit vectors u and v differ by, "
            "what they multiply to, and their cosine: |u - v|, u * v, cos"
        )
    else:
        yield f"- rows cut to {model.max_length} tokens, {pooling} pooling"
    once = "test was scored once, after training"
    if outcome.dev:
        yield (
            f"- the best of {outcome.epochs} epochs by {outcome.metric} on dev "
            f"(epoch {outcome.best_epoch}); {once}"
        )
    else:
        scored = f"scored by {_tested(run)}" if outcome.folds else once
        yield f"- no dev set: trained {outcome.epochs} epochs, to the schedule's end; {scored}"
    yield f"- {outcome.stored_parameters:,} numbers stored beside the backbone and the head"


def _gates(job: Job) -> Iterator[str]:
    """Yield how far each gate opens, the mean over the rows compared; nothing without gates."""
    count, encoded = job.rows.from_test, job.rows.encoded
    if count:  # made-up rows open them otherwise
        encoded = encoded.select(range(count))
    layers = gates_of(job.tuned, encoded)
    if not layers:
        return
    kind = "test rows of the parity check" if count else "made-up rows of the parity check"
    yield f"How far each opens, from 0 to 1: the mean over the {kind}."
    yield ""
    names = list(dict.fromkeys(name for layer in layers for name in layer))
    rows = [
        [str(number), *(f"{float(gates[n].mean()):.2f}" if n in gates else "" for n in names)]
        for number, gates in enumerate(layers)
    ]
    yield from _table(("layer", *names), rows)


def _parity(report: ExportReport) -> Iterator[str]:
    parity = report.parity
    drawn = parity.rows - parity.test_rows
    yield (
        f"The written files, loaded by their own library in float32 on a CPU, against the run: "
        f"logits differ by {parity.max_abs_logit_diff:.1e} at most and "
        f"{parity.mean_abs_logit_diff:.1e} on average, {parity.label_flips} labels differ, "
        f"over {parity.rows} rows ({parity.test_rows} of the test split, {drawn} made up). "
        f"Allowed: {report.tolerance:g}."
    )


def _limits(run: Run) -> Iterator[str]:
    """Yield what the card's reader must not expect."""
    splits = _splits(run)
    if run.outcome.collapsed:
        yield "**Collapsed**: it gives all test rows one answer. Do not use it."
    for comparison in run.outcome.against_mean.values():
        if loses_to_mean(comparison):
            yield "Its squared error on test is not below that of always saying the train mean."
    if splits["train"]["rows"] < FEW_ROWS:
        yield f"It saw {_rows(run, 'train')} labelled rows; expect rows unlike these to go wrong."
    unseen = [label for label in run.task.labels if not splits["train"]["labels"][label]]
    if unseen:
        yield f"It saw no row of {', '.join(map(escaped, unseen))}."
    if any(run.environment["data"].get("leakage", {}).values()):
        yield "Some rows are in two splits: the scores flatter it."
    yield "Its language is that of the rows, which nobody checked."
    yield "Its probabilities were not calibrated, nor was their calibration measured."
    yield "What bias the backbone or the rows bring was not measured."
