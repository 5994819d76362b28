"""Progress of long calls on stderr: one line with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

# Seconds between two updates: often enough to look alive on a terminal, seldom enough not to fill a log file.
ON_TERMINAL, IN_LOG = 0.1, 10.0


def duration(seconds: float) -> str:
    """4 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Counts what is done of ``total`` and says it on stderr, the time left included; used in a ``with`` block.

    show: False makes it silent and free. file: where to write; stderr as it is when the block begins, unless given.
    skipped: so many were done before: they count, but no time was spent on them here.
    A block that an exception leaves keeps its last count on the screen.
    """

    def __init__(
        self,
        total: int,
        unit: str = "windows",
        show: bool = True,
        title: str = "",
        file: TextIO | None = None,
        *,
        skipped: int = 0,
    ) -> None:
        self.total, self.unit, self.show, self.title = total, unit, bool(show), title
        self.done = self.skipped = skipped
        self._file = file
        self._width = 0  # of the line on the terminal, so that a shorter one overwrites it

    def __enter__(self) -> Progress:
        self._file = self._file or sys.stderr
        self.show = self.show and self._file is not None and self.total > 0
        self._terminal = self.show and self._file.isatty()
        self._start = self._said = time.monotonic()
        return self

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.done += count
        if not self.show or self.done >= self.total:  # the end is said when the block is left
            return
        now = time.monotonic()
        if now - self._said < (ON_TERMINAL if self._terminal else IN_LOG):
            return
        self._said = now
        new = self.done - self.skipped
        left = (now - self._start) / new * (self.total - self.done) if new else None
        self._say("" if left is None else f", about {duration(left)} left")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.show or (kind is not None and not self._width):
            return
        spent = duration(time.monotonic() - self._start)
        self._say(f" in {spent}" if kind is None else f" in {spent}, then stopped")
        if self._terminal:
            print(file=self._file, flush=True)

    def _say(self, rest: str) -> None:
        title = f"{self.title}: " if self.title else ""
        line = f"{title}{self.done}/{self.total} {self.unit}{rest}"
        if self._terminal:
            print(f"\r{line:<{self._width}}", end="", file=self._file, flush=True)
        else:
            print(line, file=self._file, flush=True)
        self._width = len(line)
