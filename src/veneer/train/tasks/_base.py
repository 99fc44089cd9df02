"""The interface of a task: which columns it reads, how it turns them into batches, which model it
trains, and its loss and measures. Also helpers that several tasks use.

    read_data  read local files; needs no base
    open_base  check the base's config and load the processor (tokenizer or image processor)
    prepare    read the data, split off held-out rows, and encode → Prepared
    segments   a row → the texts that the model reads or learns to write, for display
    load       load the base with the head of the task
    collate    rows → a batch
    loss       (model, batch) → TaskLoss

The loss of a step is the sum of `TaskLoss.total` over its batches, divided by the sum of
`TaskLoss.items`, so that batches of unequal size are weighted correctly. An evaluation averages
each measure over the items in the same way.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from veneer import models
from veneer.attach import adapters_of, unwrap, use
from veneer.context import evaluation_mode
from veneer.errors import ConfigError, DataError
from veneer.models.load import Base
from veneer.precision import at_least_float32
from veneer.registry import Registry
from veneer.train import data, prepare
from veneer.train.causal import must_not_see_later_tokens
from veneer.train.config import TrainConfig
from veneer.train.further import REFERENCE_ADAPTER, read_initial_adapter
from veneer.train.prepare import Prepared, Rows
from veneer.train.tokens import IGNORED, label_runs

__all__ = ["TASKS", "Prepared", "RowSegment", "Rows", "Task", "TaskLoss", "register"]


class TaskLoss(NamedTuple):
    """The loss of a batch.

    Fields:
        total: the sum of the losses of all items (such as tokens), a scalar with gradient.
        items: the number of items of the batch; in training, what `Task.count_items` returns.
        sums: the sum of each measure over the same items, by the measure's name. In training,
            "tokens" may be the number of tokens that the loss computed besides those that the
            attention mask of the batch counts.
    """

    total: Tensor
    items: int
    sums: Mapping[str, Tensor]


class RowSegment(NamedTuple):
    """A segment of a row, for display.

    Fields:
        is_trained: whether the model learns to write or predict the segment; otherwise it only
            reads the segment.
        name: what the segment is, such as "prompt".
        text: the segment's text.
    """

    is_trained: bool
    name: str
    text: str


def extract_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `Task.settings` in `record`, a result of `Task.record` that a run wrote into
    its adapter's files."""
    return {name: value for name, value in record.items() if name not in {"name", *RECORDED_FIELDS}}


class Task(ABC):
    """The task of one run. A subclass is registered under the name of its file.

    Attributes:
        measures: the names of the values that an evaluation reports beside the loss, each a mean
            over the items.
        required_columns, optional_columns: the roles of the columns that the task reads, such as
            "prompt". A column has the name of its role unless `TrainConfig.columns` names another.
            Data that have an optional column have a value for it in every row.
        sparse_columns: further optional columns, which may hold nothing in some rows.
        auto_class: the name of the auto class of transformers that loads the model.
        loss_unit: the unit over which the loss is a mean, such as "token" or "pair".
        evaluates_base: whether an evaluation also measures the base without the adapter. False if
            the task adds a new head to the base, because the outputs of an untrained head mean
            nothing.
        compares_rows: whether the loss of a row depends on the other rows of its forward pass.
        uses_single_forward: whether the loss is computed from one forward of the model on `inputs`.
            Several runs can then share this forward.
    """

    name: ClassVar[str] = ""
    measures: ClassVar[tuple[str, ...]] = ("accuracy",)
    required_columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ()
    sparse_columns: ClassVar[tuple[str, ...]] = ()
    auto_class: str = "AutoModelForCausalLM"
    loss_unit: ClassVar[str] = "example"
    evaluates_base: ClassVar[bool] = True
    compares_rows: ClassVar[bool] = False
    uses_single_forward: ClassVar[bool] = False

    @classmethod
    def generates_text(cls) -> bool:
        """Whether the task trains a causal language model, which can generate text."""
        return cls.auto_class == "AutoModelForCausalLM"

    def __init__(
        self,
        config: TrainConfig,
        task_settings: Mapping[str, Any] | None = None,
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        #: keyword arguments of `models.load_head`; by default from the configuration
        self.load_options = (
            {name: getattr(config, name) for name in LOAD_OPTIONS}
            if load_options is None
            else dict(load_options)
        )
        #: the adapter that the run trains further; None if it trains a new adapter
        self.initial_adapter = read_initial_adapter(config.adapter)
        if self.initial_adapter is not None and self.initial_adapter.task.get("name") == self.name:
            task_settings = task_settings or extract_settings(self.initial_adapter.task)
        #: what `settings` returned in the run that trained the adapter; {} for a new adapter
        self.recorded_settings: Mapping[str, Any] = task_settings or {}
        self.processor: Any = None
        self._records: dict[tuple[str, str], data.Records] = {}

    def needs_reference(self) -> bool:
        """Whether the loss compares the model with a reference policy, which is the model before
        training (`reference`)."""
        return False

    def read_data(self) -> None:
        """Read the local data files, and keep the records until `records` returns them. Call this
        before `open_base`: an error in the data is then reported before a GGUF base is converted,
        which may take a minute. Data sets of the hub are downloaded only after `open_base`, so that
        a missing base is reported before the download."""
        config = self.config
        for source, split in (
            (config.data, config.split),
            (config.eval_data, config.eval_split),
        ):
            if source is not None and data.is_local(source):
                self._records[source, split] = self.read(source, split)

    def records(self, source: str, split: str) -> data.Records:
        """The records of a source. If `read_data` has read them, return and forget them, so that
        the caller can free their memory; else read them now."""
        local_records = self._records.pop((source, split), None)
        return self.read(source, split) if local_records is None else local_records

    def open_base(self) -> Any:
        """Check the base's config, and load and return its processor, but no weights. Raises
        `ConfigError` if the task needs a causal language model and the base is not one."""
        if self.generates_text():
            models.must_be_causal(self.config.base)
        self.processor = models.load_tokenizer(self.config.base)
        return self.processor

    def settings(self) -> dict[str, Any]:
        """The values that a later evaluation of the adapter needs in addition to the configuration,
        as JSON values by name. For classify: the kind of the rows and the labels."""
        return {}

    def record(self) -> dict[str, Any]:
        """The values that a run writes into its adapter's files, so that a later evaluation can
        create the same task: the task's name, the fields of `RECORDED_FIELDS` that differ from
        their defaults, and `settings`."""
        default_values = TrainConfig.defaults()
        recorded_fields = {name: getattr(self.config, name) for name in RECORDED_FIELDS}
        changed_fields = {
            name: value for name, value in recorded_fields.items() if value != default_values[name]
        }
        return {"name": self.name, **changed_fields, **self.settings()}

    def prepare(self) -> Prepared:
        return prepare.prepare(self.config, self.records, self.encode, self.max_length())

    def max_length(self) -> int:
        return prepare.max_length(self.config)

    def read(self, source: str, split: str) -> data.Records:
        """Read the records of a source (a file, or a data set of the hub). The columns of each
        record are named by their roles, such as "prompt"."""
        located_rows, digest = data.raw_rows(source, split)
        return data.select_fields(
            located_rows,
            source,
            digest,
            self.required_columns,
            self.optional_columns,
            self.config.columns,
            self.sparse_columns,
        )

    @abstractmethod
    def encode(self, records: data.Records) -> Any:
        """Turn records into the rows that `collate` takes. Raises `DataError` with the location of
        an invalid row."""

    @abstractmethod
    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        """The segments of a row, in reading order."""

    def token_segments(self, name: str, ids: list[int], labels: list[int]) -> list[RowSegment]:
        """The segments of a sequence of token ids with one label each: its stretches of tokens with
        labels, which the model learns to write, and without. Each gets the name `name`."""
        return [
            RowSegment(is_trained, name, self.processor.decode(segment_ids))
            for is_trained, segment_ids in label_runs(ids, labels)
        ]

    def load(self) -> Base:
        """Load the base with the head of the task. Raises `ConfigError` if the task needs a causal
        language model and the logits of the base depend on later tokens. A forward pass tests this,
        because the config does not always say whether a model is causal."""
        model = self.load_model()
        if self.generates_text():
            must_not_see_later_tokens(model, self.config.base)
        return Base(model, self.processor, self.config.base)

    def load_model(self, **fields: Any) -> Any:
        """Load the base by the class `auto_class`. ``fields``: values for fields of the model's
        config, such as num_labels."""
        return models.load_head(self.config.base, self.auto_class, **self.load_options, **fields)

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join rows into a batch: by name, tensors and other values that `loss` needs."""

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        """The loss of a batch whose tensors are on the model's device. In training mode,
        `TaskLoss.sums` may lack measures."""

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The number of items, such as tokens or pairs, whose losses `TaskLoss.total` sums; by
        default the number of labels."""
        return int((batch["labels"] != IGNORED).sum())

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the model's forward, taken from a batch."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def example(self, prepared: Prepared, device: Any) -> dict[str, Any]:
        """The model's keyword arguments for a short row of the training data. `veneer.attach.check`
        runs the model on them to prove that every adapted layer affects the output, so a forward
        with them must run every adapted layer."""
        inputs = self.inputs(
            self.collate([prepared.train.rows[short_row_index(prepared.train.lengths)]])
        )
        return move_batch(device, inputs)

    def largest_batch(self, prepared: Prepared) -> tuple[int, int]:
        """(number of tokens with padding, number of tokens that reach the output head) of the batch
        that needs the most memory: that of the longest rows."""
        rows = prepared.train
        longest_indices = sorted(range(len(rows)), key=rows.lengths.__getitem__, reverse=True)[
            : self.config.batch_size
        ]
        return len(longest_indices) * rows.lengths[longest_indices[0]], (
            sum(rows.head_token_counts[i] for i in longest_indices) if rows.head_token_counts else 0
        )

    def describe_size(self, rows: Rows) -> str:
        """The size of the training data, in words."""
        token_text = f", {sum(rows.lengths):,} tokens" if any(rows.lengths) else ""
        return f"{len(rows):,} examples{token_text}"


#: least number of tokens of an example row (`Task.example`), if the data have such a row
MIN_EXAMPLE_TOKENS = 8
#: the fields of the configuration that `models.load_head` takes
LOAD_OPTIONS = ("precision", "device", "attention", "quantize", "device_map")
#: the fields of the configuration that `Task.record` writes. `reward`, which names code to run, is
#: left out: the files of an adapter must not decide which code an evaluation runs.
RECORDED_FIELDS = ("columns", "beta", "answers", "answer_tokens", "temperature", "max_length")

TASKS: Registry[type[Task]] = Registry("task")


def register(cls: type[Task]) -> type[Task]:
    """Register a task under the name of its file. Use as a decorator of the class."""
    cls.name = cls.__module__.rpartition(".")[2]
    return TASKS.add(cls.name, cls)


def short_row_index(lengths: Sequence[int]) -> int:
    """The index of the shortest row of at least `MIN_EXAMPLE_TOKENS` tokens; of the longest row if
    all are shorter. A row of one token would not do as an example: its only attention weight is
    always 1, so adapted query and key projections would get no gradient. `lengths`: by row, its
    number of tokens."""
    long_enough_indices = [i for i, length in enumerate(lengths) if length >= MIN_EXAMPLE_TOKENS]
    if long_enough_indices:
        return min(long_enough_indices, key=lengths.__getitem__)
    return max(range(len(lengths)), key=lengths.__getitem__)


def pad_rows(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of integers as one tensor [rows, longest row], padded on the right with `fill`."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def token_batch(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """A batch of rows of token ids with one label each: input_ids, attention_mask and labels, int64
    of shape [rows, longest row] each, padded on the right. `pad_id`: the token id for padding."""
    attention_mask = [[1] * len(row) for row in ids]
    return {
        "input_ids": pad_rows(ids, pad_id),
        "attention_mask": pad_rows(attention_mask, 0),
        "labels": pad_rows(labels, IGNORED),
    }


def move_batch(device: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a batch with its tensors on `device`. Other values stay as they are."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def labelled_loss(logits: Tensor, labels: Tensor) -> TaskLoss:
    """The summed cross-entropy at the positions that have a label (other than `IGNORED`). The
    measure "accuracy" counts the positions where the label is the most likely class. `logits`:
    [..., classes]; `labels`: class indices, [...]."""
    labels = labels.to(logits.device)
    has_label = labels != IGNORED
    labelled_logits, targets = logits[has_label], labels[has_label]
    float_logits = labelled_logits.to(at_least_float32(labelled_logits.dtype))
    correct_count = (labelled_logits.detach().argmax(dim=-1) == targets).sum()
    total_loss = cross_entropy(float_logits, targets, reduction="sum")
    return TaskLoss(total_loss, len(targets), {"accuracy": correct_count})


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """A context manager in whose block `model` computes the reference policy, without gradients and
    dropout. The reference is the base without an adapter, so no second copy of the weights is
    needed. In a run that trains an existing adapter further, the reference is the base with that
    adapter as it was loaded."""
    unwrapped = unwrap(model)
    adapters = adapters_of(unwrapped)
    reference_name = (
        None if adapters is None or REFERENCE_ADAPTER not in adapters.configs else REFERENCE_ADAPTER
    )
    adapter_selection = nullcontext() if adapters is None else use(unwrapped, reference_name)
    with torch.no_grad(), evaluation_mode(unwrapped), adapter_selection:
        yield


def apply_max_length(
    records: data.Records,
    rows: Sequence[dict[str, Any]],
    text_lengths: Sequence[int],
    config: TrainConfig,
    limit: int,
    truncate: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[list[int], list[dict[str, Any]], int]:
    """Apply `config.too_long` to the rows whose longest text has more than `limit` tokens: truncate
    or drop them, or raise `DataError` ("error"). Also raises `DataError` if no row is left.

    Args:
        text_lengths: by row, the number of tokens of its longest text.
        limit: the maximal number of tokens of a text.
        truncate: a function that truncates the texts of a row to `limit` tokens. It is called for
            every row, so it must leave a shorter row as it is.

    Returns:
        (indices of the retained rows, the retained rows, number of truncated rows).
    """
    long_indices = [i for i, length in enumerate(text_lengths) if length > limit]
    if long_indices and config.too_long == "error":
        longest_index = max(long_indices, key=text_lengths.__getitem__)
        length = text_lengths[longest_index]
        raise DataError(
            f"{len(long_indices)} of {len(rows)} examples of {records.source} with more than"
            f" {limit:,} tokens; the longest, {records.locations[longest_index]}, has {length:,}",
            f"at most {limit:,}",
            f"raise it with --max-length {length} (if the model allows it), or choose --too-long"
            " truncate or drop",
        )
    if config.too_long == "truncate":
        return [*range(len(rows))], [*map(truncate, rows)], len(long_indices)
    retained_indices = [i for i in range(len(rows)) if text_lengths[i] <= limit]
    if not retained_indices:
        raise DataError(
            f"all {len(rows)} examples of {records.source} have more than {limit:,} tokens",
            f"some with at most {limit:,}",
            "raise max_length",
        )
    return retained_indices, [rows[i] for i in retained_indices], 0


def retained_positions(ids: Sequence[int], limit: int, tokenizer: Any) -> list[int]:
    """The positions of a sequence of token ids that remain when it is truncated to `limit` tokens:
    the first ones. If the last token is one of the tokenizer's special tokens, such as [SEP], it
    marks the end and remains in place of the last of these."""
    positions = [*range(min(len(ids), limit))]
    if len(ids) > limit and ids[-1] in tokenizer.all_special_ids:
        positions[-1] = len(ids) - 1
    return positions


def truncate_ids(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    """Truncate a sequence of token ids as `retained_positions` says."""
    return [ids[i] for i in retained_positions(ids, limit, tokenizer)]


def read_text_column(records: data.Records, column: str) -> list[str]:
    """The values of a column of texts. Raises `DataError` if a value is empty or no text."""
    for row, location in zip(records.rows, records.locations, strict=True):
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(
                f"{records.source}, {location}: {column} is {row[column]!r}"[:300],
                "text",
                "fix or remove that row",
            )
    return [row[column] for row in records.rows]


def load_function(spec: str) -> Callable[..., Any]:
    """Execute the file of `spec`, which has the form FILE.py:NAME, and return its function NAME.
    Raises `ConfigError` if the file or the function does not exist."""
    import importlib.util

    path_text, _, name = spec.rpartition(":")
    module_path = Path(path_text).expanduser()
    if not path_text or module_path.suffix != ".py" or not module_path.is_file():
        raise ConfigError(
            f"{spec!r}, and no such file", "FILE.py:NAME of a function", "correct the path"
        )
    path_hash = hashlib.sha256(str(module_path.resolve()).encode()).hexdigest()[:8]
    module_spec: Any = importlib.util.spec_from_file_location(
        f"veneer_reward_{module_path.stem}_{path_hash}", module_path
    )
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look a class's module up here
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        function_names = [
            function_name
            for function_name, value in vars(module).items()
            if callable(value) and not function_name.startswith("_")
        ]
        raise ConfigError(
            f"no function {name!r} in {module_path}; it has {', '.join(function_names) or 'none'}",
            "one",
            "name it",
        )
    return function
