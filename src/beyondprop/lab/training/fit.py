"""The training loop: any rule on any task, with the same batches, schedule and clock for all.

>>> rule = AltMin(model, nn.CrossEntropyLoss())
>>> history = fit(rule, load("digits"), epochs=5, batch_size=50, seed=0)
>>> history.evaluations[-1]["accuracy"]

There is no trainer object to satisfy: whoever wants another loop calls `rule.step(x, y)` in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from beyondprop.lab.runs.context import recorded_warnings
from beyondprop.lab.tasks.loader import as_task
from beyondprop.lab.training.loop import Failed, History, Loop, Row, State, Training
from beyondprop.rules.base import LearningRule


def fit(
    rule: LearningRule,
    data: Any,
    training: Training | None = None,
    *,
    test: Any = None,
    after: History | None = None,
    log: Callable[[Row], None] | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
    save: Callable[[State], None] | None = None,
    resume: State | None = None,
    interrupted: Callable[[], bool] | None = None,
    **settings: Any,
) -> History:
    """Train a rule's model, evaluating it on the test rows, where there are any, as it goes.

    The order of the batches comes from `seed` and the epoch's number alone; dropout and what else the model draws comes
    from torch's global random state, which is yours to seed. The model trains in the mode that it is in: a part that you
    put in evaluation mode stays there. A last batch of a single row is left out where the model has a BatchNorm, which
    could not normalise it.

    A rule that wants the whole set gets all training rows at every step, in their own order: its epoch is one step. Its rows
    line up with those of other rules by epoch: `evaluate_every` is rounded to whole epochs, and `work` stays in units of a
    gradient on `batch_size` rows.

    Rows have: `step`; `epoch`; `samples` seen; `work`, in gradient-equivalents: what a step of plain backpropagation on the
    same batch costs in floating-point operations is 1; `seconds` of training, without evaluations, alignments and
    checkpoints; `train_loss`, the mean since the row before; the task's metrics by key (`accuracy`, `loss`); and `counters`,
    what the model's modules count, where they do.

    Args:
        rule: the rule; its model and the data are on one device (batches of a DataLoader are moved there).
        data: a task; a data set with `x_train`, `y_train` and, where there are any, `x_test`, `y_test`; a pair of tensors; or a
            DataLoader of pairs, the first of which is what the model takes (stage-wise rules take tensors alone).
        training: how it is trained; default: made of `settings`.
        test: what to evaluate on beside a pair of tensors (a pair, too) or a DataLoader (a pair or a DataLoader).
        after: what `fit` returned for a training with `stop`, of the same model on the same data by another rule: this one
            goes on with its next batch, in the middle of the schedule, and counts samples, work and seconds on from it.
        log: called with every row as it comes.
        progress: called with the steps done and all steps, some times a second; True shows a bar on the terminal.
        save: called with the state at every evaluation and every `save_every` seconds; the state's tensors are the live
            ones, to be written or copied before it returns.
        resume: a state that `save` got; rule, data and arguments must be as they were then.
        interrupted: asked after every step; where it says true, the state is saved and `KeyboardInterrupt` raised.
        **settings: what `Training` takes: `epochs`, `batch_size`, `seed`, `schedule`, `evaluate_every`, `early_stop`, ....

    Raises:
        TypeError: if `data` is nothing that can be trained on; the message says what is.
        ValueError: if an argument is out of its range; the message has the range.
        NonFiniteError: where the rule does; a row of kind failed is logged before. So it is with a factorisation that
            fails, and a device out of memory.
    """
    if training is None:
        training = Training(**settings)
    elif settings:
        raise TypeError(f"{', '.join(settings)} are given beside training; put them into it.")
    task = as_task(data, rule.loss.loss, test)
    with _bar() if progress is True else nullcontext(progress or None) as shown:
        loop = Loop(rule, task, training, after, log, shown, save, interrupted)
        if resume is not None:
            loop.restore(resume)
        with recorded_warnings(loop.warned, lambda message: loop.record("warning", {"message": message})):
            try:
                loop.run()
            except Failed as error:
                loop.record("failed", {"message": " ".join(str(error).split()) or type(error).__name__})
                raise
            finally:
                loop.give_back()
    return loop.history


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        bar_task = bar.add_task("training", total=1.0)
        yield lambda done, steps: bar.update(bar_task, completed=done, total=steps)
