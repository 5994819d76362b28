"""Named settings, as a paper has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Presets = Mapping[str, Mapping[str, Any]]


def check_preset(preset: str | None, presets: Presets, given: Mapping[str, Any]) -> None:
    """ValueError for a preset that is unknown, or that one of the settings given contradicts."""
    if preset is None:
        return
    if not isinstance(preset, str) or preset not in presets:
        raise ValueError(
            f"preset must be None or one of {', '.join(map(repr, presets))}, but it is {preset!r}."
        )
    for name, value in presets[preset].items():
        if name in given and (not isinstance(given[name], type(value) | int) or given[name] != value):
            raise ValueError(f"preset {preset!r} has {name}={value!r}, but {name} is {given[name]!r}.")


def settled(
    preset: str | None, presets: Presets, given: Mapping[str, Any], usual: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings: a preset's, else those given, else the usual ones. None is what was not given."""
    given = {name: value for name, value in given.items() if value is not None}
    check_preset(preset, presets, given)
    return {**usual, **given, **presets.get(preset, {})}
