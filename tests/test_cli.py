"""The command itself: its terminal output, its help, and what it says where it cannot start."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest
from cli_cases import ENVIRONMENT, invoke
from rich.console import Console

from convviz_cuda.cli.console import Counter, duration


def test_a_terminal_gets_a_bar_with_the_time_left():
    screen = io.StringIO()
    with Counter(4, "images", Console(file=screen, force_terminal=True, width=90)) as counter:
        counter.step("one")
        counter.warn("two is skipped")
        counter.step("two")
        time.sleep(0.15)  # the bar draws itself ten times a second
    assert "2/4" in screen.getvalue() and "left:" in screen.getvalue()
    assert "convviz: two is skipped" in screen.getvalue()


def test_elsewhere_there_are_lines(capsys):
    with Counter(2, "images", Console(file=io.StringIO())) as counter:
        counter.step("one [bold]")
        counter.warn("two is skipped")
        counter.step("caf\udce9")
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("[1/2] one [bold], about ") and first.endswith(" s left")
    assert second == "[2/2] caf\ufffd"
    assert err == "convviz: two is skipped\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_without_the_extra_one_sentence_says_what_to_install():
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('typer', 'PIL') else find(name, *a)\n"
        "from convviz_cuda.cli import main\n"
        "light = {'typer', 'rich', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "assert not light, light\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == (
        "convviz needs typer, pillow, which are not installed: pip install convviz_cuda[cli]"
    )


@pytest.mark.parametrize("start", ["script", "module"])
def test_an_unknown_backend_is_one_sentence(tmp_path, start):
    script = tmp_path / "convviz"  # as pip writes it
    script.write_text("from convviz_cuda.cli import main\nmain()\n")
    call = {"script": [script], "module": ["-m", "convviz_cuda.cli"]}[start]
    done = subprocess.run(
        [sys.executable, *call, "doctor"], env={**ENVIRONMENT, "CONVVIZ_BACKEND": "nonsense"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "convviz: CONVVIZ_BACKEND must be one of auto, reference, native, but it is 'nonsense'.\n"
    )


def test_version_and_help():
    from convviz_cuda import __version__

    assert invoke("--version").output.strip() == f"convviz_cuda {__version__}"
    commands = (
        "doctor",
        "demo",
        "attribute",
        "features",
        "evolve",
        "invariance",
        "correspond",
        "probes",
        "ablate",
    )
    for command in commands:
        assert command in invoke("--help").output
        assert invoke(command, "--help").exit_code == 0
