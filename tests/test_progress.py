"""What long calls say on stderr."""

from __future__ import annotations

import io

import pytest

from convviz_cuda.progress import Progress


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("convviz_cuda.progress.time.monotonic", lambda: now[0])
    with Progress(100, "windows", title="Sweep", file=(screen := Screen())) as progress:
        for _ in range(10):
            now[0] += 6.0
            progress.advance(10)
    lines = screen.getvalue().split("\r")
    assert lines[1].rstrip() == "Sweep: 10/100 windows, about 54 s left"
    assert lines[-2].rstrip() == "Sweep: 90/100 windows, about 6 s left"
    assert lines[-1] == "Sweep: 100/100 windows in 1 min 0 s".ljust(len(lines[-2].rstrip())) + "\n"


def test_progress_in_a_log_is_seldom_and_says_where_it_stopped(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("convviz_cuda.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(100, "windows", file=log) as progress:
        for step in range(100):
            now[0] += 1.0
            progress.advance(1)
            if step == 24:
                raise KeyboardInterrupt
    assert log.getvalue().splitlines() == [
        "10/100 windows, about 1 min 30 s left",
        "20/100 windows, about 1 min 20 s left",
        "25/100 windows in 25 s, then stopped",
    ]


def test_what_an_earlier_call_did_took_no_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("convviz_cuda.progress.time.monotonic", lambda: now[0])
    with Progress(1000, "windows", file=(log := io.StringIO()), skipped=900) as progress:
        for _ in range(100):
            now[0] += 2.0
            progress.advance(1)
    lines = log.getvalue().splitlines()
    assert lines[0] == "905/1000 windows, about 3 min 10 s left"
    assert lines[-1] == "1000/1000 windows in 3 min 20 s"


def test_progress_that_is_not_shown():
    log = io.StringIO()
    for total, show in ((10, False), (0, True)):
        with Progress(total, "windows", show, file=log) as progress:
            progress.advance(5)
    assert not log.getvalue() and progress.done == 5
