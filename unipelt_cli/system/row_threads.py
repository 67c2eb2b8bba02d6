"""Parts of one batch on several cores at once, each core with operations of its own.

Small operations gain little from being split over threads, and wait for the slowest one each time;
whole parts of a batch wait for each other once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import TypeVar

import torch

Part = TypeVar("Part")
Answer = TypeVar("Answer")


_lanes = 1


def shares_out(device: torch.device) -> bool:
    """Say whether a batch's rows are shared out on a device; others take them at once."""
    return device.type == "cpu"


def lanes() -> int:
    """Return how many parts run at the same time."""
    return _lanes


@contextmanager
def shared_out(wanted: bool) -> Iterator[None]:
    """Inside, torch's threads are lanes for parts, and each operation has one thread.

    Threads that wait for the next small operation would take the cores from the other lanes.
    """
    global _lanes  # as torch's own number of threads is
    before, threads = _lanes, torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    try:
        _lanes = threads
        torch.set_num_threads(1)
        yield
    finally:
        _lanes = before
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="rows")


def _go_on_alone() -> None:
    """In a forked process, use the one thread there is: torch would wait for its others forever."""
    global _lanes
    _lanes = 1
    _pool.cache_clear()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not where processes cannot fork
    os.register_at_fork(after_in_child=_go_on_alone)


def run_parts(function: Callable[[Part], Answer], parts: Sequence[Part]) -> list[Answer]:
    """Call a function on every part, in several lanes; return the answers in their order.

    Gradients are not recorded in the function.
    """
    if len(parts) == 1 and _lanes > 1:
        return [_with_all_threads(function, parts[0])]
    is_inference = torch.is_inference_mode_enabled()
    answers: dict[int, Answer] = {}
    turns = count()

    def work() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            while (turn := next(turns)) < len(parts):
                answers[turn] = function(parts[turn])

    def work_beside() -> None:
        torch.set_num_threads(1)  # of this thread
        work()

    others = [_pool().submit(work_beside) for _ in range(min(_lanes, len(parts)) - 1)]
    try:
        work()
    except BaseException:
        for _ in parts:  # the others take no more
            next(turns)
        raise
    finally:
        failures = [other.exception() for other in others]
    for failure in failures:
        if failure is not None:
            raise failure
    return [answers[turn] for turn in range(len(parts))]


def _with_all_threads(function: Callable[[Part], Answer], part: Part) -> Answer:
    """Call a function on the only part there is: its operations are split instead."""
    torch.set_num_threads(_lanes)
    try:
        with torch.no_grad():
            return function(part)
    finally:
        torch.set_num_threads(1)
