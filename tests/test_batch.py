"""Jobs: finding images, resuming, failing and being interrupted without losing anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from convviz_cuda import journal as journal_module
from convviz_cuda.batch import ImageError, Job, Result, find_images
from convviz_cuda.journal import Journal, digest, image_state, write_atomically

# Finding --------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(paths: list[Path], folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in paths]


def test_folders_files_and_patterns(tmp_path):
    touch(tmp_path, "b10.png", "b2.JPG", "sub/deep/c.tif", "notes.txt", "odd.dat")
    assert names(find_images([tmp_path]), tmp_path) == ["b2.JPG", "b10.png", "sub/deep/c.tif"]
    assert names(find_images([tmp_path / "*.png", tmp_path / "odd.dat"]), tmp_path) == ["b10.png", "odd.dat"]
    assert names(find_images([str(tmp_path / "**" / "*.tif")]), tmp_path) == ["sub/deep/c.tif"]


def test_each_file_once_in_the_order_given(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    given = [tmp_path / "c.png", tmp_path, tmp_path / "sub" / ".." / "a.png"]
    (tmp_path / "sub").mkdir()
    assert names(find_images(given), tmp_path) == ["c.png", "a.png", "b.png"]


def test_a_name_with_pattern_characters_is_a_file_first(tmp_path):
    touch(tmp_path, "a[1].png")
    assert names(find_images([tmp_path / "a[1].png"]), tmp_path) == ["a[1].png"]


def test_the_results_folder_is_passed_over(tmp_path):
    touch(tmp_path, "a.png", "out/pictures/a.guided.png")
    assert names(find_images([tmp_path], exclude=tmp_path / "out"), tmp_path) == ["a.png"]
    assert names(find_images([tmp_path / "**"], exclude=tmp_path / "out"), tmp_path) == ["a.png"]
    named = tmp_path / "out" / "pictures" / "a.guided.png"
    assert find_images([named], exclude=tmp_path / "out") == [named]


def test_nothing_found_is_an_error(tmp_path):
    touch(tmp_path, "notes.txt", "out/a.png")
    for argument, words in (
        (tmp_path / "nowhere.png", "no file or folder"),
        (tmp_path / "*.png", "matches the pattern"),
        (tmp_path, "no image in the folder"),
        ("", "empty argument"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            find_images([argument], exclude=tmp_path / "out")


# Writing --------------------------------------------------------------------------------


def test_write_atomically_replaces_whole_files_only(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    write_atomically(path, lambda file: file.write(b"first"))
    assert path.read_bytes() == b"first"

    def fail(file):
        file.write(b"sec")
        file.flush()
        assert path.read_bytes() == b"first"  # what is half written is not there yet
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_digest_depends_on_values_not_on_their_order():
    assert digest("a", {"x": 1, "y": [2]}) == digest("a", {"y": [2], "x": 1})
    assert digest("a", {"x": 1}) != digest("a", {"x": 2})


def row(identity: str, state=(1, 2), **files: str) -> dict:
    return {"id": identity, "image_state": list(state), "files": files}


def test_journal_creates_nothing_before_the_first_row(tmp_path):
    journal = Journal(tmp_path / "out")
    assert not journal.done("a", [1, 2])
    journal.compact()
    assert not (tmp_path / "out").exists()


def test_journal_knows_what_is_done(tmp_path):
    touch(tmp_path, "a.png")
    Journal(tmp_path).append(row("a", picture="a.png"))
    journal = Journal(tmp_path)
    assert journal.done("a", [1, 2])
    assert not journal.done("a", [1, 3])  # another image under that name
    assert not journal.done("b", [1, 2])
    (tmp_path / "a.png").unlink()
    assert not journal.done("a", [1, 2])  # its picture was deleted


@pytest.mark.parametrize("tail", [b'{"id": "b", "image_st', b'{"id": "b"', b"\x00\x00", b"\xff"])
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    Journal(tmp_path).append(row("a"))
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole + tail)
    journal = Journal(tmp_path)
    assert list(journal.rows) == ["a"]
    journal.append(row("c"))
    assert (tmp_path / "results.jsonl").read_bytes() == whole + json.dumps(row("c")).encode() + b"\n"


def test_a_last_row_without_its_line_end_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(json.dumps(row("a")).encode() + b"\n" + json.dumps(row("b")).encode())
    journal = Journal(tmp_path)
    assert journal.done("b", [1, 2])
    journal.append(row("c"))
    journal.append(row("d"))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}\n', '{"a": 1}\n', '{"a": 1}', "[]\n", "loss 0.1\n"])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="Line 1 of"):
        Journal(tmp_path)
    assert path.read_text() == text


def test_a_foreign_last_line_is_refused(tmp_path):
    Journal(tmp_path).append(row("a"))
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"loss": 1}\n')
    with pytest.raises(ValueError, match="Line 2 of"):
        Journal(tmp_path)


# Several processes ----------------------------------------------------------------------


def test_two_journals_of_one_folder_lose_no_row(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    for journal, identity in ((first, "a1"), (first, "a2"), (second, "b1"), (first, "a3"), (second, "b2")):
        journal.append(row(identity))
    first.append(row("a1", (3, 4)))
    second.compact()
    first.append(row("a4"))
    first.compact()
    found = Journal(tmp_path).rows
    assert sorted(found) == ["a1", "a2", "a3", "a4", "b1", "b2"]
    assert found["a1"] == row("a1", (3, 4))
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6


def test_two_journals_of_one_folder_never_share_a_file(tmp_path):
    """Neither knows the other's row: it comes after the files."""
    first, second = Journal(tmp_path), Journal(tmp_path)
    assert first.claim("cat.png", "1234567890") == "cat.png"
    with open(tmp_path / ".results.names", "ab") as file:
        file.write(b'\n["dog.png", "12')  # what an interruption left
    assert second.claim("cat.png", "abcdefghij") == "cat-abcdefgh.png"
    assert second.claim("dog.png", "abcdefghij") == "dog.png"
    assert first.claim("cat.png", "1234567890") == "cat.png"
    assert first.claim("dog.png", "1234567890") == "dog-12345678.png"
    assert Journal(tmp_path).claim("cat.png", "1234567890") == "cat.png"  # a run that goes on


def test_what_another_process_is_writing_is_no_torn_line(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    journal = Journal(tmp_path)
    journal.append(row("a", (0, 0)))  # something to compact
    journal.append(row("a"))
    for number, change in enumerate((lambda: journal.append(row("b")), journal.compact)):
        with open(tmp_path / ".results.names", "ab") as lock, open(journal.path, "ab", buffering=0) as file:
            fcntl.flock(lock, fcntl.LOCK_EX)
            line = json.dumps(row(f"other{number}")).encode() + b"\n"
            file.write(line[:10])
            thread = threading.Thread(target=change)
            thread.start()
            thread.join(0.2)  # long enough to come to the lock
            file.write(line[10:])
        thread.join()
    assert sorted(Journal(tmp_path).rows) == ["a", "b", "other0", "other1"]


def test_processes_that_append_and_compact_at_once(tmp_path):
    code = """
import sys
from pathlib import Path
from convviz_cuda.journal import Journal
folder, name = Path(sys.argv[1]), sys.argv[2]
journal = Journal(folder)
for i in range(60):
    for state in ([1, 2], [3, 4]):
        journal.append({"id": f"{name}{i}", "image_state": state, "files": {}})
    if i % 7 == 0:
        journal.compact()
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(journal_module.__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen([*command, name], env=environment) for name in "ab"]
    assert [process.wait(120) for process in running] == [0, 0]
    rows = Journal(tmp_path).rows
    assert sorted(rows) == sorted(f"{name}{i}" for name in "ab" for i in range(60))
    assert all(row["image_state"] == [3, 4] for row in rows.values())


def test_without_locks_a_journal_works_too(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "fcntl", None)
    journal = Journal(tmp_path)
    assert journal.claim("a.png", "a") == "a.png"
    for state in ((1, 1), (2, 2)):
        journal.append(row("a", state))
    journal.compact()
    assert Journal(tmp_path).rows == {"a": row("a", (2, 2))}


def test_later_rows_replace_earlier_ones(tmp_path):
    journal = Journal(tmp_path)
    for state in ((1, 1), (2, 2)):
        journal.append(row("a", state))
        journal.append(row("b", state))
    journal = Journal(tmp_path)
    assert journal.done("a", [2, 2]) and not journal.done("a", [1, 1])
    journal.compact()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row("a", (2, 2)), row("b", (2, 2))]
    journal.append(row("c"))
    assert list(Journal(tmp_path).rows) == ["a", "b", "c"]


def test_two_ids_never_share_a_file(tmp_path):
    journal = Journal(tmp_path)
    assert journal.claim("maps/cat.png", "1234567890") == "maps/cat.png"
    assert journal.claim("maps/cat.png", "1234567890") == "maps/cat.png"
    assert journal.claim("maps/cat.png", "abcdefghij") == "maps/cat-abcdefgh.png"
    journal.append(row("1234567890", picture="maps/cat.png"))
    assert Journal(tmp_path).claim("maps/cat.png", "zzzzzzzzzz") == "maps/cat-zzzzzzzz.png"


def test_file_names_that_are_no_utf8(tmp_path):
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    Journal(tmp_path).append({**row("a"), "image": name})
    assert Journal(tmp_path).rows["a"]["image"] == name


def test_image_state_changes_with_the_file(tmp_path):
    touch(tmp_path, "a.png")
    before = image_state(tmp_path / "a.png")
    assert image_state(tmp_path / "a.png") == before
    (tmp_path / "a.png").write_bytes(b"longer")
    assert image_state(tmp_path / "a.png") != before


# Jobs --------------------------------------------------------------------------------


class Squares:
    """A job that squares numbers: items are numbers, "read" makes text of them, files hold the squares."""

    def __init__(self, folder: Path, **options):
        self.batches: list[list[int]] = []
        self.done: list[int] = []
        self.failures: list[tuple[int, str]] = []
        self.threads: set[int] = set()
        self.job = Job(
            Journal(folder), self.read, self.work,
            on_item=lambda item, results: self.done.append(item),
            on_failure=lambda item, why: self.failures.append((item, why)),
            **{"batch_size": 3, "threads": 2, **options},
        )  # fmt: skip

    def read(self, item: int) -> str:
        self.threads.add(threading.get_ident())
        return str(item)

    def work(self, batch):
        self.batches.append([item for item, _ in batch])
        return [(item, [self.result(item, value)]) for item, value in batch]

    def result(self, item: int, value: str) -> Result:
        square = str(int(value) ** 2).encode()
        return Result(row(str(item), number=f"{item}.txt"), {f"{item}.txt": lambda file: file.write(square)})


def stored(folder: Path) -> list[int]:
    """Ids in the journal, each checked to have its complete file."""
    rows = Journal(folder).rows
    for identity in rows:
        assert (folder / f"{identity}.txt").read_text() == str(int(identity) ** 2)
    return [int(identity) for identity in rows]


def test_a_job_works_in_batches_and_stores_everything(tmp_path):
    squares = Squares(tmp_path)
    outcome = squares.job.run(range(8))
    assert squares.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert stored(tmp_path) == squares.done == list(range(8))
    assert (outcome.written, outcome.failed, outcome.interrupted) == (8, [], False)
    assert threading.get_ident() not in squares.threads
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]


def test_values_of_another_group_go_into_another_batch(tmp_path):
    squares = Squares(tmp_path, group=lambda value: int(value) % 2)
    squares.job.run(range(8))
    assert squares.batches == [[0, 2, 4], [1, 3, 5], [6], [7]]
    assert sorted(stored(tmp_path)) == list(range(8))


def test_many_groups_are_not_all_held_to_the_end(tmp_path):
    held, most = set(), 0

    class Watched(Squares):
        def read(self, item):
            held.add(item)
            return super().read(item)

        def work(self, batch):
            nonlocal most
            most = max(most, len(held))
            held.difference_update(item for item, _ in batch)
            return super().work(batch)

    squares = Watched(tmp_path, group=lambda value: value)
    squares.job.run(range(60))
    assert sorted(stored(tmp_path)) == list(range(60))
    assert most <= (4 + 2) * 3


def test_reading_does_not_run_away(tmp_path):
    read = []
    squares = Squares(tmp_path, batch_size=2)
    squares.job.read = lambda item: read.append(item) or str(item)
    squares.job.on_item = lambda item, results: counts.append(len(read) - item)
    counts: list[int] = []
    squares.job.run(range(40))
    assert max(counts) <= 2 * 2 + 2 * 2 + 1  # two batches ahead, two on the way to the disk


@pytest.mark.parametrize("error", [OSError, ValueError, ImageError])
def test_a_broken_item_fails_alone(tmp_path, error):
    squares = Squares(tmp_path)
    read = squares.job.read

    def broken(item):
        if item in (1, 4):
            raise error(f"{item} is broken.")
        return read(item)

    squares.job.read = broken
    outcome = squares.job.run(range(6))
    assert stored(tmp_path) == [0, 2, 3, 5]
    assert outcome.failed == squares.failures == [(1, "1 is broken."), (4, "4 is broken.")]


def test_an_item_that_memory_does_not_suffice_for_fails_alone(tmp_path):
    squares = Squares(tmp_path)
    read = squares.job.read

    def large(item):
        if item == 1:
            raise MemoryError  # has no text
        return read(item)

    squares.job.read = large
    outcome = squares.job.run(range(6))
    assert stored(tmp_path) == [0, 2, 3, 4, 5]
    assert outcome.failed == [(1, "There is not enough memory to read it.")]


def test_a_broken_batch_fails_what_it_did_not_give(tmp_path):
    class Broken(Squares):
        def work(self, batch):
            for item, value in batch:
                if item == 4:
                    raise ImageError("No.")
                yield item, [self.result(item, value)]

    squares = Broken(tmp_path)
    outcome = squares.job.run(range(9))
    assert stored(tmp_path) == [0, 1, 2, 3, 6, 7, 8]
    assert [item for item, _ in outcome.failed] == [4, 5]


@pytest.mark.parametrize("at", range(9))
def test_an_interrupt_keeps_what_was_worked_out(tmp_path, at):
    class Interrupted(Squares):
        def work(self, batch):
            for item, value in batch:
                if item == at:
                    raise KeyboardInterrupt
                yield item, [self.result(item, value)]

    squares = Interrupted(tmp_path)
    outcome = squares.job.run(range(9))
    assert outcome.interrupted
    assert stored(tmp_path) == squares.done == list(range(at))
    left = [i for i in range(9) if not Journal(tmp_path).done(str(i), [1, 2])]
    assert left == list(range(at, 9))
    Squares(tmp_path).job.run(left)
    assert stored(tmp_path) == list(range(9))


def test_any_other_error_ends_the_job_after_storing(tmp_path):
    class Wrong(Squares):
        def work(self, batch):
            if batch[0][0] == 3:
                raise RuntimeError("a bug")
            return super().work(batch)

    with pytest.raises(RuntimeError, match="a bug"):
        Wrong(tmp_path).job.run(range(9))
    assert stored(tmp_path) == [0, 1, 2]


def test_a_row_needs_its_files(tmp_path):
    """When a file cannot be written (here: a folder has its name), there is no row that claims it."""
    (tmp_path / "4.txt").mkdir()
    with pytest.raises(OSError):
        Squares(tmp_path).job.run(range(9))
    assert stored(tmp_path) == [0, 1, 2, 3]


def test_threads_end_with_the_job(tmp_path):
    before = threading.active_count()
    Squares(tmp_path).job.run(range(9))
    assert threading.active_count() == before
