"""Jobs over many images: finding them, reading ahead, working in batches, storing as it goes."""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from .journal import Journal, write_atomically

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"}
IMAGE_SUFFIXES |= {".pnm", ".ppm", ".tif", ".tiff", ".webp"}
Item = TypeVar("Item")
Value = TypeVar("Value")


class ImageError(Exception):
    """One image, or one group of images, cannot be worked on; the others can. The text is a sentence."""


def find_images(arguments: Iterable[str | Path], exclude: Path | None = None) -> list[Path]:
    """Image files from what a user types: files, folders (searched recursively by suffix) and glob patterns.

    Each file once, those of a folder or pattern in natural order (2 before 10). Files inside ``exclude``, the
    folder that results go to, are passed over unless named one by one. A named file may have any suffix.
    Raises FileNotFoundError for an argument that matches nothing.
    """
    inside = exclude.resolve() if exclude is not None else None
    found: dict[Path, Path] = {}
    for argument in arguments:
        if argument == "":  # to Path it is the working directory
            raise FileNotFoundError("An image is named by an empty argument.")
        path = Path(argument)
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
            nothing = f"There is no image in the folder {str(argument)!r}."
        elif path.exists():
            found.setdefault(path.resolve(), path)
            continue
        elif glob.has_magic(str(argument)):
            matches = [Path(p) for p in glob.glob(str(argument), recursive=True)]
            nothing = f"No file matches the pattern {str(argument)!r}."
        else:
            raise FileNotFoundError(f"There is no file or folder {str(argument)!r}.")
        resolved = [(p.resolve(), p) for p in sorted(matches, key=_natural) if p.is_file()]
        kept = [(r, p) for r, p in resolved if inside is None or inside not in r.parents]
        if not kept:
            raise FileNotFoundError(nothing)
        for r, p in kept:
            found.setdefault(r, p)
    return list(found.values())


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path).casefold())
    return [(1, int(part), "") if part.isdigit() and part.isascii() else (0, 0, part) for part in parts]


@dataclass(frozen=True)
class Result:
    """A row for the journal and its files: relative name -> what writes it. ``row["files"]`` names them."""

    row: dict[str, Any]
    files: dict[str, Callable[[BinaryIO], object]]


@dataclass
class Outcome:
    """How a job ended: rows written, items that failed with why, and whether it was interrupted."""

    written: int = 0
    failed: list[tuple[Any, str]] = field(default_factory=list)
    interrupted: bool = False


@dataclass
class Job(Generic[Item, Value]):
    """Reads items ahead in threads, works on batches in this thread, writes files in threads, appends rows.

    read: item -> value; an OSError, ValueError, ImageError or MemoryError fails that item only.
    work: list of (item, value) -> results, for values of one ``group``; an ImageError fails those items only,
        anything else ends the job, after what was worked out has been stored.
    on_item, on_failure: called in this thread after an item's rows are in the journal, or it has failed.
    """

    journal: Journal
    read: Callable[[Item], Value]
    work: Callable[[list[tuple[Item, Value]]], Iterable[tuple[Item, Sequence[Result]]]]
    group: Callable[[Value], Any] = lambda value: None
    on_item: Callable[[Item, Sequence[Result]], None] = lambda item, results: None
    on_failure: Callable[[Item, str], None] = lambda item, why: None
    batch_size: int = 8
    threads: int = min(8, os.cpu_count() or 1)
    _writing: deque[tuple[Item, Sequence[Result], list[Future[None]]]] = field(default_factory=deque)

    def run(self, items: Sequence[Item]) -> Outcome:
        """Work on all items. Ctrl-C ends it early, with everything that was worked out stored."""
        outcome = Outcome()
        pool = ThreadPoolExecutor(max(1, self.threads), thread_name_prefix="convviz")
        try:
            for batch in self._batches(pool, items, outcome):
                given = set()
                try:
                    for item, results in self.work(batch):
                        given.add(id(item))
                        writes = [
                            pool.submit(write_atomically, self.journal.folder / name, write)
                            for result in results
                            for name, write in result.files.items()
                        ]
                        self._writing.append((item, results, writes))
                except ImageError as error:
                    for item, _ in batch:
                        if id(item) not in given:
                            self._fail(outcome, item, str(error))
                # The batch before last is stored while the last one's files are being written.
                self._store(outcome, leave=len(batch))
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            try:
                self._store(outcome, leave=0)
            finally:
                pool.shutdown(cancel_futures=True)  # reading ahead is given up, writing was not
        return outcome

    def _batches(
        self, pool: ThreadPoolExecutor, items: Sequence[Item], outcome: Outcome
    ) -> Iterator[list[tuple[Item, Value]]]:
        ahead: deque[tuple[Item, Future[Value]]] = deque()
        coming = iter(items)
        groups: dict[Any, list[tuple[Item, Value]]] = {}
        while True:
            for item in coming:
                ahead.append((item, pool.submit(self.read, item)))
                if len(ahead) >= 2 * self.batch_size:
                    break
            if not ahead:
                break
            item, future = ahead.popleft()
            try:
                value = future.result()
            except (OSError, ValueError, ImageError) as error:
                self._fail(outcome, item, str(error))
                continue
            except MemoryError:
                self._fail(outcome, item, "There is not enough memory to read it.")
                continue
            batch = groups.setdefault(self.group(value), [])
            batch.append((item, value))
            if len(batch) == self.batch_size:
                yield groups.pop(self.group(value))
            elif sum(map(len, groups.values())) >= 4 * self.batch_size:
                # Pictures of many sizes: go on with what waits longest, or all would be held to the end.
                yield groups.pop(next(iter(groups)))
        yield from groups.values()

    def _fail(self, outcome: Outcome, item: Item, why: str) -> None:
        outcome.failed.append((item, why))
        self.on_failure(item, why)

    def _store(self, outcome: Outcome, leave: int) -> None:
        while len(self._writing) > leave:
            item, results, writes = self._writing[0]
            for write in writes:
                write.result()
            for result in results:
                self.journal.append(result.row)
                outcome.written += 1
            self._writing.popleft()
            self.on_item(item, results)
