"""The command ``convviz``. Its packages are an extra (``cli``); importing convviz_cuda needs none of them."""

from __future__ import annotations

import importlib.util
import sys

PACKAGES = {
    "typer": "typer",
    "rich": "rich",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
}


def main() -> None:
    """Entry point of the script ``convviz``; exits with the command's code."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(
            f"convviz needs {', '.join(missing)}, which are not installed: pip install convviz_cuda[cli]"
        )
    from .app import app

    app()
