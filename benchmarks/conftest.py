"""Options, fixtures and the report of the benchmarks. See README.md beside this file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the helper modules beside this file, also for scripts that run on their own

from interleave import CLOCKS, OURS, Clock, Comparison, interleave  # noqa: E402
from report import Report, table  # noqa: E402

_REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convviz benchmarks")
    group.addoption(
        "--quick", action="store_true", help="every benchmark at a tiny size, one round: a smoke test"
    )
    group.addoption("--goals", action="store_true", help="a column that says which goals were reached")
    clock = "wall (default), or cpu: processor time, for a machine shared with other work"
    group.addoption("--clock", choices=sorted(CLOCKS), default="wall", help=clock)
    group.addoption("--threads", type=int, help="threads of PyTorch (default: PyTorch's own choice)")
    group.addoption("--rounds", type=int, help="rounds of every case (default: the case's own number)")
    results = "where to write DATE-MACHINE.json and .md (default: build/benchmarks; nothing with --quick)"
    group.addoption("--results", type=Path, metavar="DIR", help=results)


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("--threads") or (1 if config.getoption("--quick") else None)
    if threads:
        torch.set_num_threads(threads)
    # Captum warns at every call: that it sets hooks, that it asks for a gradient.
    config.addinivalue_line("filterwarnings", "ignore::UserWarning:captum")
    folder = config.getoption("--results")
    if folder is None and not config.getoption("--quick"):
        folder = config.rootpath / "build" / "benchmarks"
    config.stash[_REPORT] = Report(config.getoption("--clock"), folder)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[_REPORT]
    if not report.rows:
        return
    terminalreporter.section(f"{OURS} against the others: median, and the other's median / ours")
    for line in table(report.rows, config.getoption("--goals")):
        terminalreporter.line(line)
    if report.folder is not None:
        terminalreporter.line(f"\nwritten to {report.write(report.folder)}")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    return request.config.stash[_REPORT]


@pytest.fixture
def compare(benchmark: Any, report: Report, request: pytest.FixtureRequest) -> Callable[..., Comparison]:
    """Measures the sides of one case in turns and reports it. All sides must have been called once.

    scales: factors on what sides took that did a known part of the work.
    """

    def run(
        group: str,
        case: str,
        sides: dict[str, Callable[[], Any]],
        *,
        rounds: int,
        clock: Clock | None = None,
        goals: dict[str, float] | None = None,
        errors: dict[str, float] | None = None,
        notes: Callable[[float], dict[str, Any]] | None = None,
        scales: dict[str, float] | None = None,
    ) -> Comparison:
        options = request.config.option
        name = options.clock if clock is None else "device events"
        rounds = options.rounds or (1 if options.quick else rounds)
        benchmark.group, benchmark.name = group, case
        values = interleave(benchmark, sides, clock or CLOCKS[name], rounds)
        for side, scale in (scales or {}).items():
            values[side] = [value * scale for value in values[side]]
        comparison = Comparison(group, case, "s", name, values, goals or {}, errors or {})
        if notes is not None:
            comparison.notes = notes(comparison.median(OURS))
        benchmark.extra_info.update(comparison.as_json())
        report.add(comparison)
        return comparison

    return run
