"""Answers on stdout, talk on stderr: width, colour, encoding, and what cannot be written."""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from unipelt_cli.text import plain

COLUMNS, LINES = 80, 25
# What an encoding that is not Unicode gets in place of a sign, one for one: columns stay straight.
SIGNS = str.maketrans("±·…█▉▊▋▌▍▎▏━╸╺", "~..#####...---")
_TRAILING = re.compile(r" +(?=\n)")
_is_silenced = False
_is_stdout_free = True


class _Answers(io.TextIOBase):
    """Standard output: what a command was asked for; if it cannot be written, the command ends."""

    @property
    def stream(self) -> IO[str]:
        return sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(self._shown(text)))
        return len(text)

    def _shown(self, text: str) -> str:
        """Return what the stream can hold: no blanks at the ends of lines but on a terminal."""
        if not self.isatty():
            text = _TRAILING.sub("", text)
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            plain = text.translate(SIGNS)
            return plain.encode(self.encoding, "replace").decode(self.encoding)
        return text

    def flush(self) -> None:
        self._try(lambda: self.stream.flush())

    def isatty(self) -> bool:
        return bool(self._try(lambda: self.stream.isatty()))

    def fileno(self) -> int:
        return self.stream.fileno()

    def _try(self, do: Callable[[], Any]) -> Any:
        return None if self.stream is None or _is_silenced else do()


class _Talk(_Answers):
    """Standard error, whose reader may go or whose disk may fill: talk must not end a run."""

    @property
    def stream(self) -> IO[str]:
        return sys.stderr

    def _try(self, do: Callable[[], Any]) -> Any:
        try:
            return super()._try(do)
        except (OSError, ValueError):
            discard_stream(self.stream)
            return None


@contextmanager
def stdout_left_to_json(is_json: bool) -> Iterator[None]:
    """Inside, tables go to stderr if stdout is to hold one JSON object alone."""
    global _is_stdout_free
    _is_stdout_free = not is_json
    try:
        yield
    finally:
        _is_stdout_free = True


def silence() -> None:
    """Say nothing from now on: of several processes of one run, one talks."""
    global _is_silenced  # as the streams are the process's
    _is_silenced = True


def is_silenced() -> bool:
    """Say whether another process talks, and answers, in this one's place."""
    return _is_silenced


def discard_stream(stream: Any) -> None:
    """Send what a stream still holds, and all that comes, nowhere: Python ends without a word."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def console() -> Console:
    """Return the console for talk: stderr, 80 columns where nobody says otherwise."""
    return _console(_Talk())


def answers() -> Console:
    """Return the console for what a command was asked for: stdout, unless that is for JSON."""
    return _console(_Answers()) if _is_stdout_free else console()


def _console(file: _Answers) -> Console:
    width, height = _size(file)
    return Console(
        file=cast(IO[str], file),
        width=width,
        height=height,
        force_terminal=_forced(),
        highlight=False,
    )


def _size(file: _Answers) -> tuple[int, int]:
    """Return columns and lines; a terminal says them even where it can do nothing else."""
    try:
        terminal = os.get_terminal_size(file.fileno())
    except (OSError, ValueError, AttributeError):  # no terminal, or nothing at all
        terminal = os.terminal_size((0, 0))
    setting = os.environ.get("COLUMNS", "")
    columns = int(setting) if setting.isdecimal() else terminal.columns
    return columns or COLUMNS, terminal.lines or LINES


def _forced() -> bool | None:
    """Return False where nothing but text is wanted; without an answer rich looks by itself."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("CLICOLOR") == "0" else None


def can_move(out: Console) -> bool:
    """Say whether lines can be drawn again there: FORCE_COLOR colours a pipe, and no more."""
    return out.is_terminal and out.file.isatty() and not out.is_dumb_terminal


def terminal() -> tuple[str, str | None]:
    """Return what talk is written to: width, colours, encoding; and how to mend the last."""
    out = console()
    where = f"{out.width} columns" + ("" if out.file.isatty() else ", no terminal")
    description = f"{where}, {out.color_system or 'no'} colours, {out.encoding}"
    is_plain = not out.encoding.startswith("utf")
    return description, "PYTHONIOENCODING=utf-8 shows bars as they are" if is_plain else None


def error(message: str, hint: str) -> None:
    """Print what is wrong and what to do, each on a line of its own."""
    out = console()
    out.print(Text.assemble(("error: ", "bold red"), plain(message)), soft_wrap=True)
    out.print(Text.assemble(("hint: ", "bold cyan"), plain(hint)), soft_wrap=True)


def note(sentence: str) -> None:
    """Say what was decided in the user's place."""
    say(("note: ", "yellow"), sentence)


def say(*parts: str | tuple[str, str]) -> None:
    """Print one line of talk; what comes from data or names is never read as markup.

    A terminal's is broken between words, unless a word alone is wider: a path stays whole.
    """
    out = console()
    _print_line(out, parts, breaks=out.file.isatty())


def reply(*parts: str | tuple[str, str]) -> None:
    """Print a line of what was asked for, broken between words in pipes too."""
    _print_line(answers(), parts, breaks=True)


def _print_line(out: Console, parts: Sequence[str | tuple[str, str]], *, breaks: bool) -> None:
    clean = [(plain(p[0]), p[1]) if isinstance(p, tuple) else plain(p) for p in parts]
    line = Text.assemble(*clean)
    fits = breaks and max(map(cell_len, line.plain.split()), default=0) <= out.width
    out.print(line, soft_wrap=not fits)
