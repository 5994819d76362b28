"""Named settings, as a paper has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_preset(
    preset: str | None, presets: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> None:
    """ValueError for a preset that is unknown, or that the settings given contradict."""
    if preset is None:
        return
    if preset not in presets:
        raise ValueError(
            f"preset must be None or one of {', '.join(map(repr, presets))}, but it is {preset!r}."
        )
    for name, value in presets[preset].items():
        if given[name] != value:
            raise ValueError(f"preset {preset!r} has {name}={value!r}, but {name} is {given[name]!r}.")
