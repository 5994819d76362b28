"""What a resumable job leaves in its folder, so that nothing done is lost.

``results.jsonl`` holds one row a line and names the files beside it. A file appears under its name only when
it is complete, and a row only after its files, so a job may be stopped at any moment, by any means, and
started again: what has a row is done. Several processes may write into one folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None


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

    A later row of an id replaces an earlier one. Nothing is created before the first ``append`` or ``claim``. A last
    line that an interruption left incomplete, which has no line end, is dropped; any other unreadable line raises
    ValueError. Other processes may append, claim and compact in the same folder meanwhile: ``.results.names`` is
    locked for each change, and holds the names that were claimed.
    """

    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)
    _names_read: int = 0  # bytes of .results.names

    @property
    def path(self) -> Path:
        return self.folder / "results.jsonl"

    def __post_init__(self) -> None:
        self._read()

    def _read(self) -> int:
        """Take in the rows of the file, and return how many lines hold one."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        if lines and _is_torn(lines[-1]):
            lines.pop()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                identity, files = row["id"], row["files"]
                owned = dict.fromkeys(files.values(), identity)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Line {number} of {self.path} is not a row of results; move the file away."
                ) from error
            self.rows[identity] = row
            self._owners.update(owned)
        return len(lines)

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
        if self._owners.get(name) == identity:
            return name
        with self._locked() as names:
            # Ids whose rows are still to come, here or in another process.
            names.seek(self._names_read)
            for line in names.read().split(b"\n"):
                with suppress(ValueError):  # an interruption left it incomplete
                    taken, owner = json.loads(line)
                    self._owners.setdefault(taken, owner)
            if self._owners.get(name, identity) != identity:
                stem, dot, suffix = name.rpartition(".")
                name = f"{stem}-{identity[:8]}{dot}{suffix}"
            if self._owners.get(name) != identity:
                # The line end comes first: it also ends what was left incomplete.
                names.write(b"\n" + json.dumps([name, identity]).encode())
            self._names_read = names.tell()
        self._owners[name] = identity
        return name

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, in one write."""
        line = _line(row)
        with self._locked(), open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    line = _end_last_line(file) + line
            file.write(line)
        self.rows[row["id"]] = row
        self._owners.update(dict.fromkeys(row["files"].values(), row["id"]))

    def compact(self) -> None:
        """Rewrite the file without replaced rows, if there are any."""
        if not self.path.is_file():
            return
        with self._locked():
            if self._read() > len(self.rows):  # with what other processes have added
                text = b"".join(map(_line, self.rows.values()))
                write_atomically(self.path, lambda file: file.write(text))

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file of names, while no other process changes the folder (where the file system has locks)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".results.names", "a+b") as names:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(names, fcntl.LOCK_EX)  # until it is closed
            yield names


def _line(row: dict[str, Any]) -> bytes:
    # ASCII, since a file name may hold bytes that are no UTF-8; they come as lone surrogates.
    return json.dumps(row).encode() + b"\n"


def _is_torn(line: bytes) -> bool:
    """Whether an interruption left this last line incomplete: no line end, and no part of a row is whole JSON."""
    if line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _end_last_line(file: BinaryIO) -> bytes:
    """The line end that a whole last row lacks; an incomplete one is cut off."""
    file.seek(0)
    last = file.read().splitlines(keepends=True)[-1]
    if not _is_torn(last):
        return b"\n"
    file.truncate(file.tell() - len(last))
    return b""
