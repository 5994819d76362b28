"""``convviz attribute``: maps of many images under any model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from ..batch import Job, Result, find_images
from ..journal import Journal, image_state
from .console import INTERRUPTED, Counter, arguments, counted, readable, say
from .explain import Explainer, Task, class_text, explained_text
from .request import Request


def run(request: Request, images: Sequence[str]) -> int:
    """Do what was asked and print how it went; returns the exit code. A Refusal comes before any writing."""
    with arguments():
        paths = find_images(images, exclude=request.out)
        journal = Journal(request.out)
    explainer = Explainer(request, journal)
    if request.weights is None and request.model.startswith("torchvision:"):
        say(f"{request.model} without --weights has random weights: its maps show the architecture only.")
    tasks, there = _tasks(request, journal, paths)
    partly: dict[str, list[Path]] = {}  # by method, the images that others explained
    said: set[str] = set()
    with Counter(len(tasks), "images") as counter:

        def on_item(task: Task, results: Sequence[Result]) -> None:
            for method, why in explainer.problems.pop(task.name, {}).items():
                if why not in said:
                    counter.warn(f"{task.path}: {why}")
                said.add(why)
                partly.setdefault(method, []).append(task.path)
            row = results[0].row
            line = f"{task.path}: {class_text(row['prediction'])}"
            counter.step(line if row["unit"] is None else f"{line}; {explained_text(row)}")

        def on_failure(task: Task, why: str) -> None:
            counter.warn(f"{task.path} is skipped: {why}")
            counter.step(f"{task.path}: skipped")

        job = Job(
            journal, explainer.read, explainer.work,
            group=lambda pixels: tuple(pixels.inputs.shape),
            on_item=on_item, on_failure=on_failure, batch_size=request.batch_size,
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                # As sentences of the command's own, without the place in the code.
                warnings.showwarning = lambda message, *_, **__: counter.warn(str(message))
                outcome = job.run(tasks)
        except OSError as error:
            say(f"Cannot write to {request.out}: {error}")
            return 1
    if not outcome.interrupted:
        journal.compact()
    already = f" (there already: {there})" if there else ""
    print(readable(f"{counted(outcome.written, 'map')} written to {request.out}{already}."))
    if outcome.interrupted:
        left = len(tasks) - counter.count
        say(f"Interrupted with {counted(left, 'image')} to do; the same command goes on from here.")
        return INTERRUPTED
    if outcome.failed:
        names = ", ".join(str(task.path) for task, _ in outcome.failed)
        say(f"{len(outcome.failed)} of {counted(len(paths), 'image')} could not be used: {names}.")
    for method, left_out in partly.items():
        names = ", ".join(map(str, left_out))
        say(
            f"--method {method} failed for {counted(len(left_out), 'image')}: {names}. The others' maps are written."
        )
    return 1 if outcome.failed or partly else 0


def _tasks(request: Request, journal: Journal, paths: Sequence[Path]) -> tuple[list[Task], int]:
    """What is left to do, and how many maps are there already."""
    tasks, there = [], 0
    for path in paths:
        name = path.resolve().as_posix()
        try:
            state = image_state(path)
        except OSError:
            state = []  # gone in the meantime: reading it will say so
        ids = {m.name: request.identity(name, m) for m in request.methods}
        todo = {m: i for m, i in ids.items() if request.overwrite or not journal.done(i, state)}
        there += len(ids) - len(todo)
        if todo:
            tasks.append(Task(path, state, todo))
    return tasks, there
