"""Collects the comparisons of a session, prints them and writes them as JSON and as a table to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from facts import facts, machine_name
from interleave import OURS, Comparison


def amount(value: float, unit: str) -> str:
    """A number as people read it: 12.3 ms, 45.6 MB."""
    for factor, name in (
        ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if unit == "s" else ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    ):
        if value >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value:.3g} {unit}"


def goal_text(row: dict[str, Any]) -> str:
    texts = []
    for side, least in row["goal"].items():
        ratio = row["ratio"][side]
        texts.append(f"{side} >= {least:.3g}x: {ratio:.2f}x {'reached' if ratio >= least else 'missed'}")
    return ", ".join(texts)


def _error_text(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.0e}" for name, value in row["error"].items())


def _note_text(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in row["notes"].items())  # fmt: skip


def table(rows: list[dict[str, Any]], goals: bool) -> list[str]:
    """Markdown, one table a group; every ratio is the other side's median divided by ours."""
    lines: list[str] = []
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == group]
        others = list(dict.fromkeys(side for row in chosen for side in row["ratio"]))
        extra = {"difference": _error_text, "notes": _note_text, **({"goal": goal_text} if goals else {})}
        extra = {name: text for name, text in extra.items() if any(text(row) for row in chosen)}
        head = ["case", OURS, *others, *extra]
        lines += ["", f"### {group}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in chosen:
            cells = [row["case"], amount(row["median"][OURS], row["unit"])]
            for side in others:
                known = side in row["ratio"]
                cells.append(
                    f"{amount(row['median'][side], row['unit'])} ({row['ratio'][side]:.2f}x)" if known else ""
                )
            lines.append(f"| {' | '.join([*cells, *(text(row) for text in extra.values())])} |")
    return lines


class Report:
    """The comparisons of one pytest session, written to ``folder`` after each, so that none is lost."""

    def __init__(self, clock: str, folder: Path | None) -> None:
        self.facts = facts(clock)
        self.folder = folder
        self.rows: list[dict[str, Any]] = []

    def add(self, comparison: Comparison) -> None:
        self.rows.append(comparison.as_json())
        if self.folder is not None:
            self.write(self.folder)

    def write(self, folder: Path) -> Path:
        """Into ``DATE-MACHINE.json`` and ``.md``; earlier cases of the same day, machine and commit stay."""
        name = f"{self.facts['date']}-{machine_name(self.facts)}" + (
            "-cpu-time" if self.facts["clock"] == "cpu" else ""
        )
        path = folder / f"{name}.json"
        rows = {(row["group"], row["case"]): row for row in self._same_run(path) + self.rows}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"facts": self.facts, "comparisons": list(rows.values())}, indent=1) + "\n"
        )
        path.with_suffix(".md").write_text(
            "\n".join([*self._heading(), *table(list(rows.values()), True)]) + "\n"
        )
        return path

    def _same_run(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        before = json.loads(path.read_text())
        same = all(before["facts"][key] == self.facts[key] for key in self.facts if key != "load_before")
        return before["comparisons"] if same else []

    def _heading(self) -> list[str]:
        known = self.facts
        where = known["gpu"] or f"{known['cpu']}, {known['isa']}, {known['threads']} threads"
        versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        clock = {"wall": "wall clock", "cpu": "processor time of all threads (the machine was shared)"}[
            known["clock"]
        ]
        return [
            f"# Measured on {known['date']}, commit {known['commit']}",
            "",
            f"{where}; {versions}. Medians of interleaved rounds, {clock}; in parentheses the other "
            f"side's median divided by ours (above 1: convviz needs less). "
            f"Load average before: {known['load_before']}.",
        ]
