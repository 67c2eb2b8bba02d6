"""Measure our tool and its peers side by side, in turn, on the same rows.

    python -m tests.benchmarks.speed [PART]... [--source DIR] [--json]

Without --source the rows are random words, as long as MRPC's. Peers need: pip install accelerate
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.contenders import Work, save_backbone
from tests.benchmarks.parts import epoch, floor, inference, memory, runs, saving, startup
from tests.benchmarks.quiet import quieten
from unipelt_cli.backbones.minilm import MINILM

Result = dict[str, Any]
Row = tuple[str, ...]
PARTS: dict[str, Callable[[Work, int, str], Result]] = {
    "epoch": epoch,
    "floor": floor,
    "inference": inference,
    "memory": memory,
    "startup": startup,
    "runs": runs,
    "saving": saving,
}


def epoch_table(result: Result) -> Table:
    rows = [
        (
            name,
            f"{own['seconds']:.2f}",
            f"{own['training']:.2f}",
            f"{own['evaluation']:.2f}",
            f"{own['cpu_seconds']:.1f}",
            f"{own['tokens_per_second']:,.0f}",
            _ratio(own["ratio"]),
            f"{own['fp32_ratio']['median']:.2f}",
        )
        for name, own in result["contenders"].items()
    ]
    ours = result["contenders"]["ours"]
    share = ours["training"] / (ours["training"] + ours["evaluation"])
    caption = (
        f"{result['tokens']:,} real tokens; ours, {result['precision']}: "
        f"{share:.0%} training, {1 - share:.0%} evaluation; fp32: times ours in fp32"
    )
    heads = ("one epoch", "s", "train", "eval", "CPU s", "tok/s", "times ours", "fp32")
    return _table(heads, rows, caption)


def floor_table(result: Result) -> Table:
    rows = [
        (
            name,
            own["precision"],
            f"{own['tera_operations']:.2f}",
            f"{own['floor_seconds']:.2f}",
            f"{own['seconds']:.2f}",
            f"{own['times_floor']:.2f}",
        )
        for name, own in result["passes"].items()
    ]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in result["rates"].items())
    heads = ("pass", "", "Top", "floor s", "s", "times floor")
    return _table(heads, rows, f"matrix products in GFLOP/s: {rates}")


def inference_table(result: Result) -> Table:
    rows = [
        (kind, name, f"{1000 * own['row_seconds']:.2f}", _ratio(own["ratio"]))
        for kind, models in result["kinds"].items()
        for name, own in models.items()
    ]
    heads = ("inference", "model", "ms a row", "times the bare model")
    return _table(heads, rows, f"{result['single']} single sentences, {result['batched']} rows")


def memory_table(result: Result) -> Table:
    rows = [
        (
            name,
            f"{own['before']:.0f}",
            f"{own['peak']:.0f}",
            f"{own['net']:.0f}",
            f"{own['ours_net_ratio']:.2f}",
            f"{own['ours_peak_ratio']:.2f}",
        )
        for name, own in result["contenders"].items()
    ]
    heads = ("memory, MiB", "loaded", "peak", "net", "ours/it net", "ours/it peak")
    return _table(heads, rows, "resident memory in one epoch; net: over the loaded model")


def startup_table(result: Result) -> Table:
    rows = [("to the first step", f"{result['wall']:.2f}", f"{result['cpu']:.2f}")]
    return _table(("startup", "wall s", "CPU s"), rows, f"median of {len(result['runs'])}")


def runs_table(result: Result) -> Table:
    rows = [
        (name, f"{own['seconds']:.2f}", _ratio(own["ratio"]))
        for name, own in result["kinds"].items()
    ]
    heads = (f"an epoch of {result['runs']} runs", "s", "times one run's")
    return _table(heads, rows, "training and evaluation")


def saving_table(result: Result) -> Table:
    rows = [
        (str(turn), f"{run['seconds']:.1f}", str(run["saves"]), f"{run['share']:.2%}")
        for turn, run in enumerate(result["runs"], 1)
    ]
    heads = (f"a run of {result['epochs']} epochs", "s", "saves", "share of time")
    return _table(heads, rows, f"a state is {result['bytes'] / 2**20:.0f} MiB")


TABLES = {
    "epoch": epoch_table,
    "floor": floor_table,
    "inference": inference_table,
    "memory": memory_table,
    "startup": startup_table,
    "runs": runs_table,
    "saving": saving_table,
}


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _table(heads: Sequence[str], rows: Sequence[Row], caption: str) -> Table:
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)  # the widest fits 80 columns
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--source", help="a directory in GLUE's layout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--k", type=int, default=500, help="train rows")
    parser.add_argument("--dev-size", type=int, default=1000)
    parser.add_argument("--backbone", choices=(MINILM, "bert-base"), default=MINILM)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one object on stdout")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return chosen


def machine(work: Work) -> Result:
    """Say what the figures were measured on."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": model[0] if model else platform.processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": work.threads,
        "torch": torch.__version__,
        "backbone": Path(work.backbone).name,
        "k": work.k,
        "dev_size": work.dev_size,
    }


def main() -> None:
    chosen = options()
    quieten()
    torch.set_num_threads(chosen.threads)
    console = Console(width=80, stderr=chosen.json)
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(
            chosen.source,
            chosen.k,
            chosen.dev_size,
            save_backbone(chosen.backbone, Path(scratch) / chosen.backbone),
            chosen.precision,
            chosen.threads,
        )
        results: Result = {"machine": machine(work)}
        console.print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
        for name in chosen.parts or PARTS:
            results[name] = PARTS[name](work, chosen.rounds, scratch)
            console.print("", TABLES[name](results[name]), sep="\n")
            gc.collect()
    if chosen.json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
