"""The build backend: setuptools', but for an sdist that needs no torch.

Of setuptools, each hook asks setup.py what it requires, and setup.py cannot know for which: without this, packing the
files would first fetch torch where there is none.
"""

from __future__ import annotations

from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_sdist(config_settings: dict | None = None) -> list[str]:
    """Nothing: the files are packed as they are."""
    return []
