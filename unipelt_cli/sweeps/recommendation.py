"""What a search leaves behind: the evidence of every candidate, and a preset of the chosen one."""

from collections.abc import Sequence
from dataclasses import dataclass

from unipelt_cli.config.experiment import resolve
from unipelt_cli.config.toml import dump_settings
from unipelt_cli.sweeps.candidates import Candidate
from unipelt_cli.sweeps.judges import FoldJudge, Judge
from unipelt_cli.sweeps.selection import best, floors, ranked


@dataclass(frozen=True)
class CandidateEvidence:
    """What is known of a candidate; `chosen_on_same_rows` is the score of the one it lost to."""

    method: str
    recipe: str
    learning_rate: float | None
    backbone: str
    score: float | None
    scores: Sequence[float]
    rows: int
    chosen_on_same_rows: float | None
    is_complete: bool
    rungs: int
    epochs: int
    stored_parameters: int
    seconds: float
    error: str | None


@dataclass(frozen=True)
class Evidence:
    """What is known of all candidates, and of what told them apart."""

    chosen: CandidateEvidence
    metric: str
    judged_by: str
    folds: int
    rows: int
    score_is_of_rows_that_chose: bool
    floor: CandidateEvidence | None
    floors: Sequence[CandidateEvidence]
    candidates: Sequence[CandidateEvidence]
    failed: Sequence[CandidateEvidence]
    untried: Sequence[str]
    budget_seconds: float


def describe(candidate: Candidate, chosen: Candidate | None = None) -> CandidateEvidence:
    """Return what is known of a candidate; beside the one that is chosen, too."""
    beside = None
    if chosen is not None and candidate.score is not None:
        beside = chosen.beside(candidate)[0]
    return CandidateEvidence(
        method=candidate.choice.method,
        recipe=candidate.choice.recipe,
        learning_rate=candidate.rate,
        backbone=candidate.experiment.model.backbone,
        score=candidate.score,
        scores=candidate.scores,
        rows=candidate.rows,
        chosen_on_same_rows=beside,
        is_complete=candidate.is_complete,
        rungs=candidate.rung + 1,
        epochs=candidate.epochs,
        stored_parameters=candidate.stored_parameters,
        seconds=round(candidate.seconds, 2),
        error=candidate.error,
    )


def evidence(
    candidates: Sequence[Candidate], judge: Judge, budget: float, *, reuses_test_rows: bool
) -> Evidence:
    """Return what is known of all candidates, and of what told them apart.

    `reuses_test_rows`: whether the rows that chose are also those of the run's score, which is
    then too high rather than too low.
    """
    chosen = best(candidates)
    beaten = [describe(each, chosen) for each in floors(candidates)]
    return Evidence(
        chosen=describe(chosen, chosen),
        metric=chosen.metric,
        judged_by="folds" if isinstance(judge, FoldJudge) else "dev",
        folds=len(judge.parts) if isinstance(judge, FoldJudge) else 0,
        rows=judge.rows,
        score_is_of_rows_that_chose=reuses_test_rows,
        floor=beaten[0] if beaten else None,
        floors=beaten,
        candidates=[describe(each, chosen) for each in ranked(candidates)],
        failed=[describe(each) for each in candidates if each.error is not None],
        untried=[each.name for each in untried(candidates)],
        budget_seconds=budget,
    )


def untried(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates whose turn never came."""
    return [each for each in candidates if each.rung < 0]


def preset(chosen: Candidate, judge: Judge) -> str:
    """Write what was chosen as a preset that `--preset` reads: all that a run of it takes.

    That is every setting that its method on its backbone would not have by itself, but for the
    rows. `train` on the same rows then repeats the run.
    """
    settings = chosen.experiment.settings()
    backbone, method = settings["model"]["backbone"], settings["method"]["name"]
    layer = {"model": {"backbone": backbone}, "method": {"name": method}}
    plain = resolve([("", {"data": settings["data"], **layer})]).settings()
    named = {"name", "backbone", *(() if chosen.rate is None else ("learning_rate",))}
    kept = {
        section: {
            key: value
            for key, value in settings[section].items()
            if key in named or value != plain[section].get(key)
        }
        for section in ("model", "method", "train")
    }
    written = {section: values for section, values in kept.items() if values}
    return f"# {_how(chosen, judge)}\n\n{dump_settings(written)}"


def _how(chosen: Candidate, judge: Judge) -> str:
    score = f"{chosen.metric} {chosen.score:.4f}"
    if isinstance(judge, FoldJudge):
        of_all = f"{chosen.rows} of the {judge.rows} train rows"
        return f"Chosen by folds: {score} on {of_all}, by trainings without them"
    seeds = "1 seed" if len(chosen.scores) == 1 else f"mean of {len(chosen.scores)} seeds"
    return f"Chosen on dev: {score}, {seeds}"
