"""What commands say and how they end: sentences on stderr, progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..progress import duration

BAD_ARGUMENTS, INTERRUPTED = 2, 130


class Refusal(Exception):
    """The command cannot do what it was asked: its text, a sentence, is printed and the exit code is 2."""


@contextmanager
def refusing() -> Iterator[None]:
    """Ends the command with a sentence: code 2 for arguments that make no sense, 130 for Ctrl-C."""
    try:
        yield
    except Refusal as error:
        say(str(error))
        raise typer.Exit(BAD_ARGUMENTS) from None
    except KeyboardInterrupt:
        say("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def arguments() -> Iterator[None]:
    """Errors of looking at arguments, which are sentences already, become refusals."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise Refusal(str(error)) from error


def say(sentence: str) -> None:
    """A sentence for the person, on stderr, so that stdout stays what the command is about."""
    typer.echo(f"convviz: {readable(sentence)}", err=True)


def counted(number: int, noun: str) -> str:
    """1 map, 2 maps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def readable(text: object) -> str:
    """Text that can be printed: file names may hold bytes that are no UTF-8 (lone surrogates in Python)."""
    return str(text).encode(errors="surrogateescape").decode(errors="replace")


class Counter:
    """Progress over ``total`` items: a line for each on stdout, and on a terminal a bar with the time left.

    console: where the bar goes, stderr unless given.
    """

    def __init__(self, total: int, what: str, console: Console | None = None):
        self.total, self.count = total, 0
        self._console = console or Console(stderr=True)
        self._start = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and total:
            parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            left = (TextColumn("left:"), TimeRemainingColumn())
            self._bar = Progress(*parts, *left, console=self._console, transient=True)
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Counter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, line: str) -> None:
        """One item more is done; ``line`` says what came out of it."""
        self.count += 1
        text = f"[{self.count}/{self.total}] {readable(line)}"
        if self._bar is None:
            left = (time.monotonic() - self._start) / self.count * (self.total - self.count)
            print(text + (f", about {duration(left)} left" if left else ""), flush=True)
            return
        self._bar.update(self._task, completed=self.count)
        if sys.stdout.isatty():
            self._above_bar(text)
        else:
            print(text, flush=True)

    def warn(self, sentence: str) -> None:
        """A sentence on stderr that does not tear the bar."""
        if self._bar is None:
            say(sentence)
        else:
            self._above_bar(f"convviz: {readable(sentence)}")

    def _above_bar(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
