"""What a resumable job leaves in its folder, so that nothing done is lost.

``results.jsonl`` holds one row a line and names the files beside it. A file appears under its name only when
it is complete, and a row only after its files, so a job may be stopped at any moment, by any means, and
started again: what has a row is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO


def image_state(path: Path) -> list[int]:
    """Size and modification time of a file: tells whether a row still speaks of this image."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def digest(*parts: Any) -> str:
    """Sixteen hex digits of JSON-able values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a new file beside ``path``, then rename it. An exception leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            write(file)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@dataclass
class Journal:
    """``results.jsonl`` of a folder. Rows are dicts with "id" (what was asked), "image_state" and "files".

    A later row of an id replaces an earlier one. Nothing is created before the first ``append``. A last line
    that an interruption left incomplete is dropped; any other unreadable line raises ValueError.
    """

    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _end: int = 0  # length of the readable part of the file
    _lines: int = 0
    _unended: bytes = b""  # a complete last row that lacks its line end
    _owners: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "results.jsonl"

    def __post_init__(self) -> None:
        data = self.path.read_bytes() if self.path.is_file() else b""
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                identity, files = row["id"], row["files"]
                owned = dict.fromkeys(files.values(), identity)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"Line {number} of {self.path} is not a row of results; move the file away."
                ) from error
            self.rows[identity] = row
            self._owners.update(owned)
            self._end += len(line)
            self._lines += 1
        if self._lines and not data[: self._end].endswith(b"\n"):
            self._lines -= 1
            self._end -= len(lines[self._lines])
            self._unended = lines[self._lines] + b"\n"  # is written again with the next row

    def done(self, identity: str, state: list[int]) -> bool:
        """Whether there is a row of this id, about the image as it is now, with all of its files."""
        row = self.rows.get(identity)
        return (
            row is not None
            and row.get("image_state") == state
            and all((self.folder / name).is_file() for name in row["files"].values())
        )

    def claim(self, name: str, identity: str) -> str:
        """A relative file name for this id: ``name``, or one with the id in it if another id has that."""
        if self._owners.setdefault(name, identity) == identity:
            return name
        stem, dot, suffix = name.rpartition(".")
        name = f"{stem}-{identity[:8]}{dot}{suffix}"
        self._owners[name] = identity
        return name

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, in one write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = self._unended + _line(row)
        with open(self.path, "ab") as file:
            if file.tell() != self._end:  # the torn tail of an interrupted write
                file.truncate(self._end)
            file.write(line)
        self._unended = b""
        self._end += len(line)
        self._lines += line.count(b"\n")
        self.rows[row["id"]] = row
        self._owners.update(dict.fromkeys(row["files"].values(), row["id"]))

    def compact(self) -> None:
        """Rewrite the file without replaced rows, if there are any."""
        if self._lines + bool(self._unended) > len(self.rows):
            text = b"".join(map(_line, self.rows.values()))
            write_atomically(self.path, lambda file: file.write(text))
            self._end, self._lines, self._unended = len(text), len(self.rows), b""


def _line(row: dict[str, Any]) -> bytes:
    # ASCII, since a file name may hold bytes that are no UTF-8; they come as lone surrogates.
    return json.dumps(row).encode() + b"\n"
