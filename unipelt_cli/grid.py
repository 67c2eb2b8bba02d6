"""From one experiment to several that differ in a few settings."""

from unipelt_cli.config import Experiment
from unipelt_cli.errors import ConfigError


def over_seeds(
    experiment: Experiment, data_seeds: str | None, seeds: str | None
) -> dict[str, Experiment]:
    """Return a run for each data seed and each seed of two lists with commas, by a short label.

    Raises ConfigError for what is no list of numbers, and for rows that are drawn already.
    """
    if data_seeds is not None and experiment.data.prepared is not None:
        raise ConfigError(
            f"--data-seeds {data_seeds}: the rows of data.prepared are drawn already",
            "drop --data-seeds, or --prepared",
        )
    grid = {}
    for data_seed in _numbers("--data-seeds", data_seeds) or [experiment.data.data_seed]:
        for seed in _numbers("--seeds", seeds) or [experiment.train.seed]:
            varied = (("d", data_seed, data_seeds), ("s", seed, seeds))
            label = " ".join(f"{letter}{n}" for letter, n, given in varied if given is not None)
            one = experiment.replace("data", data_seed=data_seed)
            grid[label] = one.replace("train", seed=seed)
    return grid


def _numbers(flag: str, text: str | None) -> list[int]:
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise ConfigError(f"{flag} {text!r}: not numbers with commas", "write it like 111,222,333")
    if len({int(word) for word in words}) < len(words):
        raise ConfigError(f"{flag} {text!r}: a number is there twice", "give each once")
    return [int(word) for word in words]
