"""The interface of a task: the columns that it reads, rows as tensors, the model that it trains,
the loss and the measures.

    read_data  read local files; needs no base
    open       check the base's config and return the processor (tokenizer or image processor)
    prepare    rows → Prepared
    segments   a row → the texts that the model reads and learns, for display
    load       the base with the head of the task
    collate    rows → a batch
    loss       (model, batch) → TaskLoss

The loss of a step is the sum of its batches' totals divided by the sum of their items, so batches
of unequal size are weighted correctly. An evaluation averages its measures in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from veneer import models
from veneer.attach import adapters_of, unwrap, use
from veneer.errors import ConfigError, DataError
from veneer.models.load import Base
from veneer.precision import at_least_float32
from veneer.registry import Registry
from veneer.train import data, prepare
from veneer.train.config import TrainConfig
from veneer.train.further import REFERENCE, start_of
from veneer.train.prepare import Prepared
from veneer.train.tokens import IGNORED, stretches

__all__ = ["TASKS", "Prepared", "RowSegment", "Rows", "Task", "TaskLoss", "register"]


class TaskLoss(NamedTuple):
    """The loss of a batch.

    Fields:
        total: the summed loss, a scalar with gradient.
        items: the number of summands (the same as `Task.items`).
        sums: each measure that these rows have, summed over the same items.
    """

    total: Tensor
    items: int
    sums: Mapping[str, Tensor]


class RowSegment(NamedTuple):
    """A segment of a row for display: whether the model learns it or only reads it, its name and
    its text."""

    learnt: bool
    name: str
    text: str


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Any]]):
    """Rows as the collator takes them.

    Fields:
        lengths: number of tokens by row, for grouping rows of similar length; 0 for images.
        index: by row, the index of its record.
        learnt: by row, the number of tokens that the output head sees.
        dropped, truncated: number of records that were too long.
    """

    rows: list[dict[str, Any]]
    lengths: list[int]
    index: list[int]
    learnt: list[int] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that the output head sees."""
        return sum(self.learnt)

    def dataset(self) -> Rows:
        return self


def extract_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """`Task.settings` of the run that wrote this task record into an adapter."""
    return {name: value for name, value in record.items() if name not in {"name", *RECORDED}}


class Task(ABC):
    """The task of one run. A subclass is registered under the name of its file.

    Attributes:
        measures: the names of the values that an evaluation reports beside the loss, each a mean
            over the items.
        required_columns, optional_columns: the roles of the columns that the task reads;
            `TrainConfig.columns` maps roles to names of columns.
        auto: the auto class of transformers that makes the model.
        item: the unit that the loss is a mean over, in words.
        compares: whether an evaluation also measures the base without the adapter. False for a
            base with a new head, whose result means nothing.
        compares_rows: whether the loss of a row depends on the other rows of its forward pass.
        one_pass: whether the loss needs a single forward of `inputs`, so that several runs can
            share it.
    """

    name: ClassVar[str] = ""
    measures: ClassVar[tuple[str, ...]] = ("accuracy",)
    required_columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ()
    auto: str = "AutoModelForCausalLM"
    item: ClassVar[str] = "example"
    compares: ClassVar[bool] = True
    compares_rows: ClassVar[bool] = False
    one_pass: ClassVar[bool] = False

    @classmethod
    def generates_text(cls) -> bool:
        """Whether the task trains a causal language model, which can generate text."""
        return cls.auto == "AutoModelForCausalLM"

    def __init__(
        self,
        config: TrainConfig,
        task_settings: Mapping[str, Any] | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        #: options of `load_base`
        self.loading = (
            {name: getattr(config, name) for name in LOADING} if loading is None else dict(loading)
        )
        #: the adapter folder whose training the run continues, or None
        self.further = start_of(config.adapter)
        if self.further is not None and self.further.task.get("name") == self.name:
            task_settings = task_settings or extract_settings(self.further.task)
        #: `settings` of the run that made the adapter, from the adapter's record; else empty
        self.recorded_settings: Mapping[str, Any] = task_settings or {}
        self.processor: Any = None
        self._records: dict[tuple[str, str], data.Records] = {}

    def needs_reference(self) -> bool:
        """Whether the loss compares the model with a `reference`."""
        return False

    def read_data(self) -> None:
        """Read local files before the base, so that an error in them is reported before a
        conversion of the base, which may take a minute. Data sets of the hub are read later: a
        missing base is noticed sooner than they download."""
        config = self.config
        for source, split in ((config.data, config.split), (config.eval_data, "train")):
            if source is not None and data.is_local(source):
                self._records[source, split] = self.read(source, split)

    def records(self, source: str, split: str) -> data.Records:
        """Return the records that ``read_data`` has read, and forget them; else call ``read``."""
        rows = self._records.pop((source, split), None)
        return self.read(source, split) if rows is None else rows

    def open(self) -> Any:
        """Check the base's config and return its processor. Reads no weights."""
        if self.generates_text():
            models.must_be_causal(self.config.base)
        self.processor = models.load_tokenizer(self.config.base)
        return self.processor

    def settings(self) -> dict[str, Any]:
        """Values, beside the configuration, that a later evaluation of the adapter needs; they
        must be valid JSON."""
        return {}

    def record(self) -> dict[str, Any]:
        """The task record of an adapter: the name, the fields of `RECORDED` that differ from their
        defaults, and `settings`."""
        default = TrainConfig.defaults()
        recorded = {name: getattr(self.config, name) for name in RECORDED}
        changed = {name: value for name, value in recorded.items() if value != default[name]}
        return {"name": self.name, **changed, **self.settings()}

    def prepare(self) -> Prepared:
        return prepare.prepare(self.config, self.records, self.encode, self.max_length())

    def max_length(self) -> int:
        return prepare.max_length(self.config)

    def read(self, source: str, split: str) -> data.Records:
        """Read the records of a source, with columns renamed to their roles."""
        raw, digest = data.raw_rows(source, split)
        return data.select_fields(
            raw, source, digest, self.required_columns, self.optional_columns, self.config.columns
        )

    @abstractmethod
    def encode(self, records: data.Records) -> Any:
        """Turn records into rows. Raises `DataError` with the location of an invalid row."""

    @abstractmethod
    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        """The segments of a row, in reading order."""

    def token_segments(self, name: str, ids: list[int], labels: list[int]) -> list[RowSegment]:
        """The segments of a sequence of token ids and labels, each named `name`."""
        return [
            RowSegment(learnt, name, self.processor.decode(segment_ids))
            for learnt, segment_ids in stretches(ids, labels)
        ]

    def load(self) -> Base:
        """Load the base with the head of the task, and the processor."""
        return Base(self.model(), self.processor, self.config.base)

    def model(self, **fields: Any) -> Any:
        """Load the base by the class `auto`. ``fields``: values for the model's config."""
        return models.load_head(self.config.base, self.auto, **self.loading, **fields)

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join rows to a batch."""

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        """The loss of a batch on the model's device. Measures are computed in eval mode at
        least."""

    def items(self, batch: Mapping[str, Any]) -> int:
        """The number of items that the loss of a batch sums; by default its rows."""
        return len(batch["labels"])

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the model's forward, taken from a batch."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def example(self, prepared: Prepared, device: Any) -> dict[str, Any]:
        """Keyword arguments of a forward that runs every adapted layer, from a short row."""
        inputs = self.inputs(
            self.collate([prepared.train.rows[short_row_index(prepared.train.lengths)]])
        )
        return {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def largest(self, prepared: Prepared) -> tuple[int, int]:
        """(tokens with padding, tokens that the output head sees) of the batch that needs the
        most memory."""
        rows: Rows = prepared.train
        longest_rows = sorted(range(len(rows)), key=rows.lengths.__getitem__, reverse=True)[
            : self.config.batch_size
        ]
        return len(longest_rows) * rows.lengths[longest_rows[0]], (
            sum(rows.learnt[i] for i in longest_rows) if rows.learnt else 0
        )

    def amount(self, rows: Any) -> str:
        """The size of the training data, in words."""
        tokens = f", {sum(rows.lengths):,} tokens" if any(rows.lengths) else ""
        return f"{len(rows):,} examples{tokens}"


#: the least length of a row for a check: attention must mix several tokens
MIN_TOKENS = 8
LOADING = ("precision", "device", "attention", "quantize", "device_map")
#: the fields of the configuration that `record` keeps. `reward` is left out, since it names code:
#: an evaluation must name the code that it runs.
RECORDED = ("columns", "beta", "answers", "answer_tokens", "temperature", "max_length")

TASKS: Registry[type[Task]] = Registry("task")


def register(cls: type[Task]) -> type[Task]:
    """A decorator that registers a task under the name of its file."""
    cls.name = cls.__module__.rpartition(".")[2]
    return TASKS.add(cls.name, cls)


def short_row_index(lengths: Sequence[int]) -> int:
    """The index of the shortest row of at least `MIN_TOKENS` tokens, else of the longest row. In
    a row of a single token, queries and keys get no gradient."""
    long_enough = [i for i, length in enumerate(lengths) if length >= MIN_TOKENS]
    if long_enough:
        return min(long_enough, key=lengths.__getitem__)
    return max(range(len(lengths)), key=lengths.__getitem__)


def pad_rows(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """[b, s]: rows of integers, padded with `fill` on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def token_batch(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int
) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, [b, s] each, padded on the right."""
    mask = [[1] * len(row) for row in ids]
    return {
        "input_ids": pad_rows(ids, pad),
        "attention_mask": pad_rows(mask, 0),
        "labels": pad_rows(labels, IGNORED),
    }


def labelled_loss(logits: Tensor, labels: Tensor) -> TaskLoss:
    """The summed cross-entropy at the positions that have a label, and the number of labels that
    are the most likely. `logits`: [..., n]; `labels`: [...]."""
    labels = labels.to(logits.device)
    labelled = labels != IGNORED
    labelled_logits, targets = logits[labelled], labels[labelled]
    wide = labelled_logits.to(at_least_float32(labelled_logits.dtype))
    correct = (labelled_logits.detach().argmax(dim=-1) == targets).sum()
    total = cross_entropy(wide, targets, reduction="sum")
    return TaskLoss(total, len(targets), {"accuracy": correct})


def padding_token(tokenizer: Any) -> int:
    """The id that pads short rows: the padding token, else the end-of-text token, else 0. The
    attention mask hides it."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if pad is None else pad


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """Context manager: within it the model is the reference policy, without gradients and dropout.
    The reference is the base without an adapter, which needs no second copy of the weights; in a
    run that continues an adapter, it is that adapter as loaded."""
    unwrapped = unwrap(model)
    training, adapters = unwrapped.training, adapters_of(unwrapped)
    unwrapped.eval()
    try:
        reference_name = (
            None if adapters is None or REFERENCE not in adapters.configs else REFERENCE
        )
        with torch.no_grad(), nullcontext() if adapters is None else use(unwrapped, reference_name):
            yield
    finally:
        unwrapped.train(training)


def apply_max_length(
    records: data.Records,
    rows: Sequence[dict[str, Any]],
    longest: Sequence[int],
    config: TrainConfig,
    limit: int,
    cut: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[list[int], list[dict[str, Any]], int]:
    """Drop or truncate rows whose longest text has more than `limit` tokens, or raise `DataError`,
    as `config.too_long` says.

    Args:
        longest: by row, the number of tokens of its longest text.
        cut: truncates a row.

    Returns:
        (indices of the retained rows, the rows, number of truncated rows).
    """
    long = [i for i, length in enumerate(longest) if length > limit]
    if long and config.too_long == "error":
        worst = max(long, key=longest.__getitem__)
        problem = (
            f"{len(long)} of {len(rows)} examples of {records.source} with more than {limit:,}"
            " tokens"
        )
        problem += f"; the longest, {records.locations[worst]}, has {longest[worst]:,}"
        do = (
            f"raise it with --max-length {longest[worst]} (if the model allows it), or choose"
            " --too-long truncate or "
        )
        raise DataError(problem, f"at most {limit:,}", f"{do}drop")
    if config.too_long == "truncate":
        long_indices = {*long}
        return (
            [*range(len(rows))],
            [cut(row) if i in long_indices else row for i, row in enumerate(rows)],
            len(long),
        )
    kept_indices = [i for i in range(len(rows)) if longest[i] <= limit]
    if not kept_indices:
        problem = f"all {len(rows)} examples of {records.source} have more than {limit:,} tokens"
        raise DataError(problem, f"some with at most {limit:,}", "raise max_length")
    return kept_indices, [rows[i] for i in kept_indices], 0


def read_text_column(records: data.Records, column: str) -> list[str]:
    """The values of a column that holds texts. `DataError`: one is empty or no text."""
    for row, location in zip(records.rows, records.locations, strict=True):
        if not isinstance(row[column], str) or not row[column].strip():
            problem = f"{records.source}, {location}: {column} is {row[column]!r}"[:300]
            raise DataError(problem, "text", "fix or remove that row")
    return [row[column] for row in records.rows]


def load_function(spec: str) -> Callable[..., Any]:
    """Import the function that `spec`, FILE.py:NAME, names. Raises `ConfigError`."""
    import importlib.util

    path, _, name = spec.rpartition(":")
    module_path = Path(path).expanduser()
    if not path or module_path.suffix != ".py" or not module_path.is_file():
        raise ConfigError(
            f"{spec!r}, and no such file", "FILE.py:NAME of a function", "correct the path"
        )
    module_spec: Any = importlib.util.spec_from_file_location(
        f"veneer_reward_{module_path.stem}", module_path
    )
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_")
        ]
        raise ConfigError(
            f"no function {name!r} in {module_path}; it has {', '.join(names) or 'none'}",
            "one",
            "name it",
        )
    return function
