"""Several processes that train one run: each with its share of every batch, and one that writes.

They are started by accelerate's launcher, or by any other that sets WORLD_SIZE, RANK, MASTER_ADDR
and MASTER_PORT. All of them take the same way through the program: wherever one can fail or be
stopped alone, they tell each other, so that nobody waits for a process that has left.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from unipelt_cli.errors import ConfigError, RunError, UnipeltError
from unipelt_cli.system.imports import importing

if TYPE_CHECKING:
    from torch import Tensor

Answer = TypeVar("Answer")


class Processes:
    """The processes of a run, as one of them sees them; by itself a process that is alone."""

    count = 1
    rank = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that talks and writes."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others to wait for."""
        return self.count > 1

    def on_main(self, do: Callable[[], Answer]) -> Answer:
        """Let the main process alone do something; return its answer, or raise its error, in all.

        An answer that is not None goes through a pickle to the others.
        """
        return do()

    def on_each(self, do: Callable[[], Answer]) -> Answer:
        """Do something in every process; where it fails in one, raise the error in all."""
        return do()

    def any(self, flag: bool) -> bool:
        """Say whether a flag is set in any process."""
        return flag

    def gather(self, value: Answer) -> list[Answer]:
        """Return every process's value, by rank."""
        return [value]

    def sum(self, tensor: "Tensor") -> None:
        """Add up a tensor of the same shape over the processes, in place and in all of them."""

    def broadcast(self, tensors: "Sequence[Tensor]") -> None:
        """Let the main process's numbers take the place of the others', in place."""

    def abandon(self) -> None:
        """Wait for no other process from now on: this one is about to end."""


class _Joined(Processes):
    """One of several processes, after they have found each other."""

    def __init__(self, count: int, rank: int) -> None:
        self.count, self.rank = count, rank
        self.is_left = False  # by another, or alone by its own will: now it can only end

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn the failure to reach another process, which has most likely ended, into an error."""
        try:
            yield
        except RuntimeError as error:
            self.is_left = True
            raise RunError(
                f"another process of this run has ended ({_line(error)})",
                "see what it said; --resume goes on from the state that was saved last",
            ) from None

    def on_main(self, do: Callable[[], Answer]) -> Answer:
        answer: Any = None
        failure = None
        if self.is_left:
            return do() if self.is_main else answer
        if self.is_main:
            try:
                answer = do()
            except UnipeltError as error:
                failure = _told(error)
        # Nearly always all went well, and there is nothing to hand on: one number says so.
        if self.any(failure is not None or answer is not None):
            answer, failure = self._broadcast_value((answer, failure))
        if failure is not None:
            raise _retold(*failure)
        return answer  # type: ignore[no-any-return]

    def on_each(self, do: Callable[[], Answer]) -> Answer:
        failure = None
        try:
            answer = do()
        except UnipeltError as error:
            failure = _told(error)
        if self.any(failure is not None):
            first = next(error for error in self.gather(failure) if error is not None)
            raise _retold(*first)
        return answer

    def any(self, flag: bool) -> bool:
        import torch

        flags = torch.tensor([int(flag)])
        with self._reaching():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags.item())

    def gather(self, value: Answer) -> list[Answer]:
        from accelerate.utils import gather_object

        with self._reaching():
            return list(gather_object([value]))

    def _broadcast_value(self, value: Answer) -> Answer:
        from accelerate.utils import broadcast_object_list

        values = [value]
        with self._reaching():
            broadcast_object_list(values)
        return values[0]

    def sum(self, tensor: "Tensor") -> None:
        import torch

        with self._reaching():
            torch.distributed.all_reduce(tensor)

    def broadcast(self, tensors: "Sequence[Tensor]") -> None:
        import torch

        with torch.no_grad():
            for tensor in tensors:
                plain = tensor.detach().contiguous()
                with self._reaching():  # as bytes: not every kind of number can be sent
                    torch.distributed.broadcast(plain.view(-1).view(torch.uint8), 0)
                tensor.copy_(plain)

    def abandon(self) -> None:
        self.is_left = True


ALONE = Processes()


def deferred_error(do: Callable[[], Answer]) -> Callable[[], Answer]:
    """Do something now; the function that is returned gives its answer, or raises its error.

    For what must come before the others are there, and yet end all of them where it fails.
    """
    try:
        answer = do()
    except UnipeltError as error:
        return partial(_raise, error)
    return lambda: answer


def _raise(error: UnipeltError) -> NoReturn:
    raise error


def launched() -> int:
    """Return how many processes were launched for one run, as the environment says.

    Raises ConfigError where it contradicts itself.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "" if size != "1" else "0")
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise ConfigError(
            f"WORLD_SIZE={size!r} and RANK={rank!r}: no number of processes, and which this one is",
            "launch them with `accelerate launch`, or unset both to train in one process",
        )
    if "RANK" not in os.environ and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys():
        raise ConfigError(  # a trap: nothing else tells that only one of them is there
            "accelerate launch started one process, though --num_processes says more",
            "add --multi_gpu, without GPUs too: then leave out --cpu, and end with --device cpu",
        )
    return int(size)


def is_first() -> bool:
    """Say whether this process is the one that talks, before the others can be reached."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Processes]:
    """Inside, this process knows the others that were launched with it; most often it is alone.

    Raises ConfigError where accelerate is missing, or the others cannot be reached.
    """
    count = launched()
    if count == 1:
        yield ALONE
        return
    state = _state(count)
    try:
        yield _Joined(state.num_processes, state.process_index)
    finally:
        state.destroy_process_group()


def _state(count: int) -> Any:
    """Find the other processes; with GPUs, each takes the one of its place on the machine."""
    try:
        with importing():
            from accelerate import PartialState
    except ImportError:
        raise ConfigError(
            f"{count} processes were launched, and accelerate is not installed",
            "install the extra: pip install 'unipelt[processes]'",
        ) from None
    import torch

    gpus = torch.cuda.device_count()
    on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    # Two processes on one GPU must not speak NCCL; whatever lies on the CPU never does.
    backend = None if not gpus else "cpu:gloo,cuda:nccl" if on_this_host <= gpus else "gloo"
    try:
        return PartialState(cpu=not gpus, **({"backend": backend} if backend else {}))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the {count} processes cannot reach each other ({_line(error)})",
            "check MASTER_ADDR and MASTER_PORT, which --main_process_port of the launcher sets",
        ) from None


def _line(error: BaseException) -> str:
    """Return what a library says first, without the place in its code that says it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S+:\d+\] *", "", lines[0]).partition(". ")[0][:200]


def _told(error: UnipeltError) -> tuple[type[UnipeltError], str, str]:
    return type(error), error.message, error.hint


def _retold(kind: type[UnipeltError], message: str, hint: str) -> UnipeltError:
    return kind(message, hint)
