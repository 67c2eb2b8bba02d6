"""Parts of one batch on several cores at once, each core with operations of its own.

Small operations gain little from being split over threads, and wait for the slowest one each time;
whole parts of a batch wait for each other once.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from typing import TypeVar

import torch

Part = TypeVar("Part")
Answer = TypeVar("Answer")


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="rows")


def run_parts(function: Callable[[Part], Answer], parts: Sequence[Part]) -> list[Answer]:
    """Call a function on every part, several at the same time; return the answers in their order.

    torch's threads are divided among the parts; gradients are not recorded in the function.
    """
    threads = torch.get_num_threads()
    lanes = min(threads, len(parts))
    is_inference = torch.is_inference_mode_enabled()
    answers: dict[int, Answer] = {}
    turns = count()

    def work() -> None:
        torch.set_num_threads(threads // lanes)  # of this thread
        with torch.inference_mode(is_inference), torch.no_grad():
            while (turn := next(turns)) < len(parts):
                answers[turn] = function(parts[turn])

    others = [_pool().submit(work) for _ in range(lanes - 1)]
    try:
        work()
    finally:
        failures = [other.exception() for other in others]
        torch.set_num_threads(threads)
    for failure in failures:
        if failure is not None:
            raise failure
    return [answers[turn] for turn in range(len(parts))]
