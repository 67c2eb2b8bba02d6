"""The parts of the speed benchmark: each measures and returns plain numbers."""

import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks.contenders import (
    TASK,
    WARM_ROWS,
    Lap,
    Rows,
    Work,
    alternate,
    our_epoch,
    our_epochs_together,
    ratios,
)
from tests.benchmarks.floor import matmul_rate, operations
from tests.benchmarks.peers import (
    PEERS,
    bare_model,
    forward,
    peer_epoch,
    peer_model,
)
from tests.benchmarks.quiet import quieten
from unipelt_cli.models.batches import Encoded, by_length
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.names import STATE
from unipelt_cli.training import execution
from unipelt_cli.training.events import Epoch
from unipelt_cli.training.session import Session

SINGLE, BATCHED = 64, 512
STARTS = 3
RUNS = 5
MEBIBYTE = 2**20
Result = dict[str, Any]
Make = Callable[[Rows], Callable[[], Lap]]

EPOCHS_KEPT = 10


def epoch(work: Work, rounds: int, scratch: str) -> Result:
    """Time one whole epoch of every contender, in turn."""
    rows, tuned = work.rows(), work.tuned()
    makes = {"ours": _ours(work, tuned)}
    if tuned.precision != "fp32":
        makes["ours, fp32"] = _ours(work, work.tuned("fp32"))
    makes |= {name: _peer(work, name, scratch) for name in PEERS}
    laps: dict[str, list[Lap]] = {name: [] for name in makes}
    for make in makes.values():
        make(rows.head(*WARM_ROWS))()
    for _ in range(rounds):
        for name, make in makes.items():
            run = make(rows)
            gc.collect()
            laps[name].append(run())
    tokens = int(rows.train[0].lengths.sum() + rows.dev[0].lengths.sum())
    ours = laps["ours"]
    fp32 = laps.get("ours, fp32", ours)
    contenders = {
        name: {
            "seconds": median(lap.seconds for lap in own),
            "cpu_seconds": median(lap.cpu for lap in own),
            "training": median(lap.training for lap in own),
            "evaluation": median(lap.evaluation for lap in own),
            "tokens_per_second": tokens / median(lap.seconds for lap in own),
            "ratio": ratios([lap.seconds for lap in own], [lap.seconds for lap in ours]),
            "cpu_ratio": ratios([lap.cpu for lap in own], [lap.cpu for lap in ours]),
            "fp32_ratio": ratios([lap.seconds for lap in own], [lap.seconds for lap in fp32]),
        }
        for name, own in laps.items()
    }
    return {"tokens": tokens, "precision": tuned.precision, "contenders": contenders}


def _ours(work: Work, tuned: TunedModel) -> Make:
    return lambda rows: our_epoch(work, tuned, rows)


def _peer(work: Work, name: str, scratch: str) -> Make:
    model = peer_model(work)
    return lambda rows: peer_epoch(work, model, rows, scratch, is_padded=PEERS[name])


def floor(work: Work, rounds: int, scratch: str) -> Result:
    """Compare our passes, and the bare model's, with the time of their matrix products alone."""
    rows, tuned = work.rows(), work.tuned()
    config, device = tuned.pretrained.library_config(), tuned.device
    batches = _batches(rows.dev[0], device)
    bare = bare_model(work, tuned.precision, device, batches)
    run = our_epoch(work, tuned, rows)
    our_epoch(work, tuned, rows.head(*WARM_ROWS))()
    laps, forwards, rates = [], [], {"bf16": [], "fp32": []}
    for _ in range(rounds):
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            rates[precision].append(matmul_rate(config, dtype, device))
        laps.append(run())
        forwards += alternate({"bare": lambda: forward(bare, batches)}, 1)["bare"]
    rate = {precision: median(own) for precision, own in rates.items()}
    train = operations(rows.train[0].lengths, config, trains=True)
    evaluation = operations(rows.dev[0].lengths, config, trains=False)
    passes = {
        "our training": (train, [lap.training for lap in laps]),
        "our evaluation": (evaluation, [lap.evaluation for lap in laps]),
        "bare forward": (evaluation, forwards),
    }
    described = {
        name: _above(count, median(spent), tuned.precision, rate[tuned.precision])
        for name, (count, spent) in passes.items()
    }
    return {"rates": rate, "passes": described}


def _above(count: float, seconds: float, precision: str, rate: float) -> Result:
    return {
        "precision": precision,
        "tera_operations": count / 1e12,
        "floor_seconds": count / rate,
        "seconds": seconds,
        "times_floor": seconds * rate / count,
    }


def _batches(rows: Encoded, device: torch.device) -> list[dict[str, torch.Tensor]]:
    return [rows.batch(chosen, device) for chosen in by_length(rows.lengths)]


def inference(work: Work, rounds: int, scratch: str) -> Result:
    """Time gated models against the bare encoder of the same precision, in turn."""
    rows = work.rows().head(0, BATCHED).dev[0]
    tuned = work.tuned(folded=True)
    device, precision = tuned.device, tuned.precision
    singles = [_first_sentence(rows, row, device) for row in range(min(SINGLE, len(rows)))]
    kinds = {"single": (singles, len(singles)), "batched": (_batches(rows, device), len(rows))}
    models = {f"ours, {precision}": (tuned.classifier, precision)}
    if precision != "fp32":
        models["ours, fp32"] = (work.tuned("fp32", folded=True).classifier, "fp32")
    models["adapters, fp32"] = (peer_model(work).to(device).eval(), "fp32")
    return {
        "single": len(singles),
        "batched": len(rows),
        "kinds": {
            kind: _against_bare(work, models, batches, count, rounds)
            for kind, (batches, count) in kinds.items()
        },
    }


def _against_bare(
    work: Work, models: Result, batches: list[dict[str, torch.Tensor]], count: int, rounds: int
) -> Result:
    device = batches[0]["input_ids"].device
    used = {precision for _, precision in models.values()}
    all_models = models | {
        f"bare, {precision}": (bare_model(work, precision, device, batches), precision)
        for precision in sorted(used)
    }
    calls = {
        name: lambda model=model: forward(model, batches) for name, (model, _) in all_models.items()
    }
    alternate(calls, 1)
    spent = alternate(calls, rounds)
    return {
        name: {
            "precision": precision,
            "row_seconds": median(spent[name]) / count,
            "ratio": ratios(spent[name], spent[f"bare, {precision}"]),
        }
        for name, (_, precision) in all_models.items()
    }


def _first_sentence(rows: Encoded, row: int, device: torch.device) -> dict[str, torch.Tensor]:
    assert rows.types is not None
    length = rows.types[row].index(1)
    single = Encoded([rows.ids[row][:length]], [rows.types[row][:length]], rows.pad_id)
    return single.batch([0], device)


def memory(work: Work, rounds: int, scratch: str) -> Result:
    """Measure the resident memory that one epoch takes, each contender in a process of its own."""
    contenders: Result = {}
    for name in ("ours", "ours, fp32", *PEERS):
        # Started afresh: a forked process would begin with this one's memory.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            contenders[name] = process.submit(_peak, work, name, scratch).result()
    ours = contenders["ours"]
    for own in contenders.values():
        own["ours_net_ratio"] = ours["net"] / own["net"]
        own["ours_peak_ratio"] = ours["peak"] / own["peak"]
    return {"contenders": contenders}


def _peak(work: Work, name: str, scratch: str) -> dict[str, float]:
    """Return the MiB that this process holds before an epoch, and at most during it."""
    quieten()
    torch.set_num_threads(work.threads)
    if name in PEERS:
        make = _peer(work, name, scratch)
    else:
        make = _ours(work, work.tuned("fp32" if "fp32" in name else None))
    run = make(work.rows())
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak up to here
    run()
    peak = _status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBIBYTE
    return {"before": before, "peak": peak, "net": peak - before, "largest": largest}


def _status(key: str) -> float:
    """Return one of the kernel's counts for this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kibibytes) * 1024 / MEBIBYTE


def runs(work: Work, rounds: int, scratch: str) -> Result:
    """Time an epoch of several runs in one pass, of as many one after another, and of one."""
    rows, tuned = work.rows(), work.tuned()
    one = our_epoch(work, tuned, rows)
    calls = {
        "one": one,
        "one after another": lambda: [one() for _ in range(RUNS)],
        "together": our_epochs_together(work, RUNS, rows),
    }
    alternate(calls, 1)
    spent = alternate(calls, rounds)
    return {
        "runs": RUNS,
        "kinds": {
            name: {"seconds": median(own), "ratio": ratios(own, spent["one"])}
            for name, own in spent.items()
        },
    }


def saving(work: Work, rounds: int, scratch: str) -> Result:
    """Time what keeping the state takes of a run, epoch by epoch as a user's run keeps it."""
    experiment = work.experiment().with_("train", epochs=EPOCHS_KEPT, patience=EPOCHS_KEPT)
    if work.source is None:
        rows = {"task": "demo", "k": min(work.k, 100), "dev_size": min(work.dev_size, 200)}
        experiment = experiment.with_("data", **rows)
    spent: list[float] = []
    save = Session._save

    def timed(session: Any) -> None:
        start = time.perf_counter()
        save(session)
        spent.append(time.perf_counter() - start)

    runs = []
    Session._save = timed  # type: ignore[method-assign]
    try:
        for turn in range(rounds):
            spent.clear()
            start, directory = time.perf_counter(), Path(scratch) / f"kept-{turn}"
            for event in execution.execute(experiment, directory):
                if isinstance(event, Epoch) and event.epoch == EPOCHS_KEPT:
                    size = (directory / STATE).stat().st_size
            whole = time.perf_counter() - start
            runs.append({"seconds": whole, "saves": len(spent), "share": sum(spent) / whole})
    finally:
        Session._save = save  # type: ignore[method-assign]
    shares = [run["share"] for run in runs]
    share = {"median": median(shares), "min": min(shares), "max": max(shares)}
    return {"epochs": EPOCHS_KEPT, "bytes": size, "runs": runs, "share": share}


def startup(work: Work, rounds: int, scratch: str) -> Result:
    """Time `unipelt train` from the start of its process to its first optimiser step."""
    prepared = Path(scratch) / "prepared"
    rows = ["--task", "demo", "--k", str(min(work.k, 100))]
    if work.source is not None:
        rows = ["--task", TASK, "--k", str(work.k), "--dev-size", str(work.dev_size)]
        rows += ["--source", work.source]
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads)}
    python = [sys.executable, "-m"]
    subprocess.run(
        [*python, "unipelt_cli", "prepare", *rows, "--out", str(prepared)],
        check=True,
        capture_output=True,
        env=environment,
    )
    train = ["train", "--prepared", str(prepared), "--model", work.backbone]
    train += ["--precision", work.precision, "--set", "train.epochs=1"]
    runs = []
    for start in range(STARTS):
        out = ["--out", f"{scratch}/start-{start}"]
        command = [*python, "tests.benchmarks.first_step", str(time.monotonic()), *train, *out]
        ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        runs.append(json.loads(ended.stdout))
    return {key: median(run[key] for run in runs) for key in ("wall", "cpu")} | {"runs": runs}
