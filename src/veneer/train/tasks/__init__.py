"""The tasks of `veneer train`: one file a task, looked up by name in the registry `TASKS`.

A task turns the records of a configuration's data into rows of tensors, loads a model with the head
that it needs, and computes the loss of a batch.
"""

from veneer.registry import import_all
from veneer.train.tasks._base import TASKS, Prepared, Rows, RowSegment, Task, TaskLoss, register

import_all(__name__, list(__path__))

__all__ = ["TASKS", "Prepared", "RowSegment", "Rows", "Task", "TaskLoss", "register"]
