"""What contenders are compared on: one file a kind of task."""

from __future__ import annotations

from beyondprop.lab.tasks.base import ACCURACY, LOSS, R2, Kind, Metric, Task
from beyondprop.lab.tasks.classification import Classification
from beyondprop.lab.tasks.forms import check_net, load, of_dataset
from beyondprop.lab.tasks.images import AugmentedTask
from beyondprop.lab.tasks.loader import LoaderTask, evaluate
from beyondprop.lab.tasks.reconstruction import Reconstruction
from beyondprop.lab.tasks.regression import LossOnly, Regression
from beyondprop.lab.tasks.rows import RowsTask
from beyondprop.lab.tasks.sequences import AddingTask
from beyondprop.lab.tasks.streams import ContinualTask, average_accuracy, backward_transfer, forgetting

__all__ = [
    "ACCURACY",
    "LOSS",
    "R2",
    "AddingTask",
    "AugmentedTask",
    "Classification",
    "ContinualTask",
    "Kind",
    "LoaderTask",
    "LossOnly",
    "Metric",
    "Reconstruction",
    "Regression",
    "RowsTask",
    "Task",
    "average_accuracy",
    "backward_transfer",
    "check_net",
    "evaluate",
    "forgetting",
    "load",
    "of_dataset",
]
