"""Tasks by form, as the command line takes them: `mnist`, `wine.csv:target=quality`, `autoencoder:mnist`, `adding:100`."""

from __future__ import annotations

import copy
from typing import Any

import torch

from beyondprop import _checks, data
from beyondprop.lab.registry import TaskSpec, register, tasks
from beyondprop.lab.tasks.base import Task
from beyondprop.lab.tasks.classification import Classification
from beyondprop.lab.tasks.images import images
from beyondprop.lab.tasks.reconstruction import autoencoder
from beyondprop.lab.tasks.regression import Regression
from beyondprop.lab.tasks.sequences import adding_problem
from beyondprop.lab.tasks.streams import permuted, split
from beyondprop.nn.structure import is_costly


def of_dataset(dataset: data.Dataset) -> Task:
    """Return classification or regression, as a data set's targets are."""
    kind = Classification if dataset.kind == "classification" else Regression
    return kind.task(dataset)


def from_arrays(x: Any, y: Any = None, **options: Any) -> Task:
    """Return the task of one's own arrays, DataFrame or torch Dataset; see `data.from_arrays` for the options."""
    return of_dataset(data.from_arrays(x, y, **options))


# Not in the protocol: a task of one's own need not have it.
Task.from_arrays = staticmethod(from_arrays)  # type: ignore[attr-defined]


def of_data(name: str, progress: data.Progress | None = None) -> Task:
    """Return the task of a data set by name, or of one's own file."""
    if data.is_file_form(name):
        return of_dataset(data.read_file(name))
    return of_dataset(data.load(_checks.one_of("data", name, data.names()), progress=progress))


def _of_kind(kind: str) -> Any:
    def load(name: str, progress: data.Progress | None = None) -> Task:
        embedded = {"classification": "digits", "regression": "diabetes"}
        task = of_data(name or embedded[kind], progress)
        found = type(getattr(task, "kind", None)).__name__
        if found.lower() != kind:
            raise ValueError(f"task {kind}: the targets of {name!r} are for {found}.")
        return task

    return load


# fmt: off
for _row in (
    ("classification", "classification:DATA", "labels: accuracy and loss; what --data alone means", _of_kind("classification")),
    ("regression", "regression:DATA", "numbers: R squared and loss; what --data alone means", _of_kind("regression")),
    ("images", "images:DATA[:centered][:pad=N][:flip]",
     "images with labels; `centered`: pixels 0 to 255 less the mean image; `pad`: random crops from a frame of N zeros; "
     "`flip`: half of them mirrored", images),
    ("autoencoder", "autoencoder:DATA", "images to themselves: summed binary cross-entropy an image", autoencoder),
    ("adding", "adding[:LENGTH]", "sequences: the adding problem, fresh in every batch", adding_problem),
    ("split", "split:DATA[:domain][:tasks=N]", "a stream: classes in pairs, one pass; average accuracy and forgetting", split),
    ("permuted", "permuted:DATA[:tasks=N][:rows=N]", "a stream: inputs permuted anew in each task", permuted),
):
    register(TaskSpec(*_row))
# fmt: on


def load(form: str, progress: data.Progress | None = None) -> Task:
    """Return the task of a form: a data set's name, a file with its target, or a registered kind with what it takes.

    Raises:
        ValueError: if there is none; the message has those that there are.
    """
    kind, _, rest = form.partition(":")
    if kind in tasks:
        return tasks.get(kind).load(rest, progress)
    if form in data.names() or data.is_file_form(form):
        return of_data(form, progress)
    known = [*data.names(), *tasks.names()]
    raise ValueError(
        f"data must be one of {', '.join(data.names())}, a file such as wine.csv:target=quality, or a task: "
        f"{', '.join(spec.form for spec in tasks)}; got {form!r}{_checks.hint(kind, known)}."
    )


def check_net(task: Task, model: Any, form: str) -> None:
    """Raise `ValueError` where a network does not fit a task's inputs or targets; nothing of it changes."""
    kind = getattr(task, "kind", None)
    if kind is None or is_costly(model):
        return
    rows = min(2, len(task.x_train))
    x, y = task.x_train[:rows].cpu(), task.y_train[:rows].cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        twin = copy.deepcopy(model).cpu().eval()
        try:
            output = twin(x)
        except Exception as error:
            shape = tuple(x.shape[1:])
            raise ValueError(
                f"net {form!r} does not take inputs of shape {shape}: {type(error).__name__}: {error}"
            ) from error
        try:
            kind.check(output, y)
        except Exception as error:
            raise ValueError(f"net {form!r} does not fit {task.name!r}: {error}") from error
