"""The tasks of `veneer train`, such as sft or dpo. Each has a file of its name, and the registry
`TASKS` maps its name to its class.

A task turns the records of a configuration's data into rows of tensors, loads a model with the head
that it needs, and computes the loss of a batch.
"""

from veneer.registry import import_all
from veneer.train.tasks._base import TASKS, Prepared, Rows, RowSegment, Task, TaskLoss, register

import_all(__name__, list(__path__))

__all__ = ["TASKS", "Prepared", "RowSegment", "Rows", "Task", "TaskLoss", "register"]
