"""Write a run in another tool's format, load it there, and check that it computes the same."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from unipelt_cli.errors import RunError
from unipelt_cli.exports import formats, model_card, parity
from unipelt_cli.exports.job import Job, Written, find_rows
from unipelt_cli.exports.report import CheckedParity, ExportReport
from unipelt_cli.files import atomic
from unipelt_cli.gates.results import StaticReport
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.run import Run, copied


class _TooFar(Exception):
    """What was written computes something else: it must not stay."""


def export_run(
    run: Run,
    tuned: TunedModel,
    to: str,
    directory: Path,
    *,
    source: str | None = None,
    tolerance: float | None = None,
    part: str | None = None,
    half: bool = False,
    static: StaticReport | None = None,
) -> ExportReport:
    """Write a run's model to a new directory in a format of `formats`; return what was checked.

    The parity compares this model with the written one, loaded by its own library in float32 on
    the CPU, on 256 rows: the run's test rows where they are found at `source`. Where logits differ
    by more than `tolerance` (the format's own unless given) nothing stays, and `written` is False.
    `part` asks for one part of a union alone; `static` is what `make_static` said, for the card.
    Raises RunError for a directory that exists and for a model that the format cannot hold: then
    nothing is written.
    """
    target = formats.get(to)
    if len(run.tasks) > 1:
        raise RunError(
            f"{run.directory}: trained on several tasks, and no other format holds their heads",
            "train one task alone, with --task, and export that run",
        )
    atomic.refuse_existing(directory)  # before all the work
    exact = copied(run, tuned)
    job = Job(run, exact, find_rows(run, exact, source), directory, part, half)
    with _quiet():
        write = target.plan(job)
        try:
            with atomic.new_directory(directory) as temporary:
                written = write(temporary)
                report = ExportReport(
                    format=to,
                    path=str(directory),
                    written=True,
                    static=static,
                    parity=CheckedParity(**asdict(written.parity), test_rows=job.rows.from_test),
                    tolerance=tolerance or _tolerance(run, written),
                    notes=[*written.notes, *_notes(job, tuned)],
                )
                if not report.holds:
                    raise _TooFar
                model_card.write(job, report, written.snippet, temporary)
                size = sum(path.stat().st_size for path in temporary.rglob("*"))
        except _TooFar:
            return replace(report, written=False)
    return replace(report, bytes=size)


def _tolerance(run: Run, written: Written) -> float:
    """Return how far a format's numbers may be off: values are as large as their labels."""
    (scale,) = run.scales
    return written.tolerance * (scale.unit if written.compares_logits else 1.0)


def _notes(job: Job, tuned: TunedModel) -> Iterator[str]:
    if not job.rows.from_test:
        why = "were not found again" if "test" in job.run.splits else "are not there"
        yield f"its test rows {why}, so rows of random tokens were compared"
    if tuned.precision != "fp32":
        rows = job.rows.encoded
        apart = parity.compare(rows, parity.padded(rows), job.tuned.classifier, tuned.classifier)
        yield (
            f"this run computes in {tuned.precision}, where its own logits differ from these by up "
            f"to {apart.max_abs_logit_diff:.2g}, and {apart.label_flips} of "
            f"{apart.rows} labels do; the parity is that of float32"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings and advice off the terminal: the checks here are stricter."""
    names = ("adapters", "transformers", "torch.onnx", "onnxruntime")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
