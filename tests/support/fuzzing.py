"""What a stranger or a bad disk may make of a file, and what may come of reading it."""

import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from unipelt_cli.errors import UnipeltError

SECONDS = 10
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 2**31, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x" * 5000, "../../etc/passwd", "\x1b[31m\u202e", "\ud800", "hub", "minilm"),
    *([], {}, [None], [[]], {"": {}}, ["x"] * 1000, DEEP),
]


@contextmanager
def limited() -> Iterator[None]:
    """Let no case hang."""

    hung = []

    def late(*_: object) -> None:
        hung.append(True)  # whoever catches what is raised here
        raise AssertionError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert not hung, f"a case took more than {SECONDS} s"


def outcome(read: Callable[[], object]) -> str:
    """Read something; anything but an answer or an error of ours ends the test."""
    refusal: UnipeltError | None = None
    with limited():
        try:
            read()
        except UnipeltError as error:
            refusal = error
    if refusal is None:
        return "read"
    assert len(refusal.message.splitlines()) == 1
    assert refusal.hint
    return "refused"


def tell(what: str, seen: Counter[str]) -> None:
    """Say what came of the cases, where pytest is asked to show it (-s)."""
    sys.stdout.write(f"{what}: {dict(seen)}\n")


def damaged(content: bytes, chosen: random.Random) -> bytes:
    """Return bytes with a bit flipped, cut short, or with a piece put in, out or twice."""
    at, size = chosen.randrange(len(content)), chosen.choice([1, 7, 64, 4096])
    match chosen.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + chosen.randbytes(size) + content[at:]
        case 2:
            return content[:at] + content[at + size :]
        case 3:
            return content + content
        case _:
            flipped = content[at] ^ (1 << chosen.randrange(8))
            return content[:at] + bytes([flipped]) + content[at + 1 :]


def changed(value: Any, chosen: random.Random) -> Any:
    """Return a JSON value with one of its parts replaced, dropped or given another name."""
    if isinstance(value, dict) and value and chosen.random() < 0.9:
        key = chosen.choice(list(value))
        own = dict(value)
        match chosen.randrange(8):
            case 0:
                del own[key]
            case 1:
                own[chosen.choice(["x", "", "epoch", "sha256"])] = own.pop(key)
            case _:
                own[key] = changed(own[key], chosen)
        return own
    if isinstance(value, list) and value and chosen.random() < 0.7:
        at = chosen.randrange(len(value))
        return [*value[:at], changed(value[at], chosen), *value[at + 1 :]]
    return chosen.choice(VALUES)
