"""``convviz doctor``: which kernel serves each operation."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .._backend import CPU_ONLY

COLOURS = {"cuda": "green", "c++": "green", "reference": "yellow"}


def unsatisfied(info: dict[str, Any]) -> list[str]:
    """What CONVVIZ_BACKEND=native asks for and does not get: "op on device", for the devices there are."""
    if info["backend"] != "native":
        return []
    here = ["cpu", "cuda"] if info["devices"]["cuda"] else ["cpu"]
    return [
        f"{op} on {d}"
        for op, served in info["ops"].items()
        for d in here
        if served[d] == "reference" and not (d == "cuda" and op in CPU_ONLY)
    ]


def run(as_json: bool) -> int:
    """Print ``convviz_cuda.info()``; returns the exit code."""
    import convviz_cuda

    info = convviz_cuda.info()
    missing = unsatisfied(info)
    if as_json:
        typer.echo(json.dumps(info, indent=2))
        return 1 if missing else 0

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {
        **info["versions"],
        "backend": f"{info['backend']} (CONVVIZ_BACKEND)",
        **{f"build: {k}": v for k, v in info["build"].items()},
        **{k: ", ".join(v) or "none" if isinstance(v, list) else v for k, v in info["devices"].items()},
    }.items():
        facts.add_row(name.replace("_", " "), str(value))
    console.print(facts)
    console.print()
    table = Table(title="Which kernel serves each operation", title_justify="left")
    table.add_column("operation")
    table.add_column("CPU tensors")
    table.add_column("CUDA tensors")
    for op, served in info["ops"].items():
        table.add_row(op, *(f"[{COLOURS[served[d]]}]{served[d]}[/]" for d in ("cpu", "cuda")))
    console.print(table)
    if info["reason"]:
        console.print(info["reason"], markup=False, highlight=False, soft_wrap=True)
    if missing:
        console.print(
            f"CONVVIZ_BACKEND=native cannot be satisfied: no native kernel for {', '.join(missing)}.",
            style="red", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 1
    return 0
