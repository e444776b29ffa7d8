"""The training loop: any rule, on tensors, with the same batches, schedule and clock for all.

>>> rule = AltMin(model, nn.CrossEntropyLoss())
>>> history = fit(rule, load("digits"), epochs=5, batch_size=50, seed=0)
>>> history.evaluations[-1]["test_accuracy"]

There is no trainer object to satisfy: whoever wants another loop calls `rule.step(x, y)` in it.
"""

from __future__ import annotations

from collections.abc import Callable

from beyondprop.lab.runs.context import recorded_warnings
from beyondprop.lab.training.loop import Data, Failed, History, Loop, Row, State
from beyondprop.rules.base import LearningRule


def fit(
    rule: LearningRule,
    data: Data,
    *,
    epochs: float,
    stop: float | None = None,
    after: History | None = None,
    batch_size: int,
    seed: int = 0,
    schedule: str = "linear",
    evaluate_every: int | None = None,
    alignment: bool = False,
    early_stop: int | None = None,
    log: Callable[[Row], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    save: Callable[[State], None] | None = None,
    save_every: float = 30.0,
    resume: State | None = None,
    interrupted: Callable[[], bool] | None = None,
    whole_set: bool | None = None,
) -> History:
    """Train a rule's model, evaluating it on the test rows as it goes.

    The order of the batches comes from `seed` and the epoch's number alone; dropout and what else the model draws comes
    from torch's global random state, which is yours to seed. The model trains in the mode that it is in: a part that you
    put in evaluation mode stays there. A last batch of a single row is left out where the model has a BatchNorm, which
    could not normalise it.

    A rule that wants the whole set gets all training rows at every step, in their own order: its epoch is one step. Its rows
    line up with those of other rules by epoch: `evaluate_every` is rounded to whole epochs, and `work` stays in units of a
    gradient on `batch_size` rows.

    Rows have: `step`; `epoch`; `samples` seen; `work`, in gradient-equivalents: what a step of plain backpropagation on the
    same batch costs in floating-point operations is 1; `seconds` of training, without evaluations, alignments and
    checkpoints; `train_loss`, the mean since the row before; `test_loss`; and `test_accuracy` for int64 labels.

    Args:
        rule: the rule; its model and the data are on one device.
        data: inputs and targets, `x_train`, `y_train`, `x_test`, `y_test`.
        epochs: passes over the training rows; fractions are welcome.
        stop: epoch at which to leave off, before all `epochs` are done; another rule may go on from there.
        after: what `fit` returned for a training with `stop`, of the same model on the same data by another rule: this one
            goes on with its next batch, in the middle of the schedule, and counts samples, work and seconds on from it.
        batch_size: rows in a batch.
        seed: of the order of the batches.
        schedule: of the learning rates, see `schedules.FORMS`; afterwards the optimizers have those that they came with.
        evaluate_every: steps between two evaluations; default: an epoch. There is one before the first step and one after
            the last in any case.
        alignment: record, at every evaluation, how each stage's update agrees with the gradient on a fixed training batch.
        early_stop: stop after this many evaluations in a row without an improvement in accuracy, or else loss.
        log: called with every row as it comes.
        progress: called with the steps done and all steps, some times a second.
        save: called with the state at every evaluation and every `save_every` seconds; the state's tensors are the live
            ones, to be written or copied before it returns.
        save_every: seconds between two saves.
        resume: a state that `save` got; rule, data and arguments must be as they were then.
        interrupted: asked after every step; where it says true, the state is saved and `KeyboardInterrupt` raised.
        whole_set: whether a step takes all training rows, not shuffled; default: what the rule itself says.

    Raises:
        ValueError: if an argument is out of its range; the message has the range.
        NonFiniteError: where the rule does; a row of kind failed is logged before. So it is with a factorisation that
            fails, and a device out of memory.
    """
    loop = Loop(
        rule=rule,
        data=data,
        epochs=epochs,
        stop=stop,
        after=after,
        batch_size=batch_size,
        seed=seed,
        schedule=schedule,
        evaluate_every=evaluate_every,
        alignment=alignment,
        early_stop=early_stop,
        log=log,
        progress=progress,
        save=save,
        save_every=save_every,
        interrupted=interrupted,
        whole_set=rule.whole_set if whole_set is None else whole_set,
    )
    if resume is not None:
        loop.restore(resume)
    with recorded_warnings(loop.warned, loop.on_warning):
        try:
            loop.run()
        except Failed as error:
            message = " ".join(str(error).split()) or type(error).__name__
            loop.record({"kind": "failed", "step": loop.step, "epoch": loop.epoch, "message": message})
            raise
        finally:
            loop.give_back()
    return loop.history
