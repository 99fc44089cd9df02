"""What a task is: which columns it reads, how a row becomes tensors, which model it trains, its
loss and measures.

    read_data  the rows, which need no base
    open     the processor (a tokenizer, an image processor), after the base's config has been looked at
    prepare  rows → Prepared
    shown    a row → what of it is read and learnt, for people
    load     the base with the head of the task
    collate  rows → a batch
    loss     (model, batch) → TaskLoss

The loss of a step is the sum of its batches' totals by the sum of their items, whatever their
sizes; so are the measures of an evaluation.
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
from torch.utils.data import Dataset

from veneer import models
from veneer.attach.lookup import adapters_of, unwrap
from veneer.attach.select import use
from veneer.errors import ConfigError, DataError
from veneer.models.load import Base
from veneer.registry import Registry
from veneer.train import data, prepare
from veneer.train.config import TrainConfig
from veneer.train.further import REFERENCE, start_of
from veneer.train.prepare import Prepared
from veneer.train.tokens import IGNORED, stretches

__all__ = ["TASKS", "Prepared", "Rows", "Shown", "Task", "TaskLoss", "register"]


class TaskLoss(NamedTuple):
    """Of a batch. `total`: the summed loss, a scalar with gradient; `items`: how many it sums (the
    same as `Task.items`); `sums`: of the task's measures, over the same items, those that these
    rows have."""

    total: Tensor
    items: int
    sums: Mapping[str, Tensor]


class Shown(NamedTuple):
    """A part of a row for people: whether it is learnt or read, what it is, and its text."""

    learnt: bool
    name: str
    text: str


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Any]]):
    """Rows as the collator takes them. `lengths[i]`: tokens of row i (0 where it has none to speak
    of), by which rows share a batch; `learnt[i]`: how many of them the output head sees;
    `index[i]`: the record it came from."""

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
        """How many tokens the output head sees."""
        return sum(self.learnt)

    def dataset(self) -> Rows:
        return self


def settings_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of an adapter's record of its task, what is `Task.settings`."""
    return {name: value for name, value in record.items() if name not in {"name", *RECORDED}}


class Task(ABC):
    """One run's task. A subclass is registered by its file's name.

    Attributes:
        measures: what an evaluation reports beside the loss, each a mean over the items.
        parts, optional: the columns that it reads, by their part.
        auto: the class of transformers that makes the model.
        item: what the loss is a mean over, in words.
        compares: whether the base is worth measuring beside the adapter: one with a new head is
            not.
        compares_rows: whether the loss of a row depends on the others of its forward pass.
        one_pass: whether the loss takes one pass of `inputs`, so that several runs can share it.
    """

    name: ClassVar[str] = ""
    measures: ClassVar[tuple[str, ...]] = ("accuracy",)
    parts: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    auto: str = "AutoModelForCausalLM"
    item: ClassVar[str] = "example"
    compares: ClassVar[bool] = True
    compares_rows: ClassVar[bool] = False
    one_pass: ClassVar[bool] = False

    @classmethod
    def continues(cls) -> bool:
        """Whether what it trains is a language model, which continues texts."""
        return cls.auto == "AutoModelForCausalLM"

    def __init__(
        self,
        config: TrainConfig,
        known: Mapping[str, Any] | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        #: how the base is loaded, as `load_base` takes it
        self.loading = (
            {name: getattr(config, name) for name in LOADING} if loading is None else dict(loading)
        )
        #: the adapter to train further
        self.further = start_of(config.adapter)
        if self.further is not None and self.further.task.get("name") == self.name:
            known = known or settings_in(self.further.task)
        #: what an adapter's record says of the task that made it: `settings` of that run
        self.known: Mapping[str, Any] = known or {}
        self.processor: Any = None
        self._records: dict[tuple[str, str], data.Records] = {}

    def refers(self) -> bool:
        """Whether the loss measures from a `reference`."""
        return False

    def read_data(self) -> None:
        """Read what lies in files, before the base is looked at, whose conversion may take a
        minute. A data set of the hub is asked for later, since a base is the quicker to find."""
        config = self.config
        for source, split in ((config.data, config.split), (config.eval_data, "train")):
            if source is not None and data.is_local(source):
                self._records[source, split] = self.read(source, split)

    def records(self, source: str, split: str) -> data.Records:
        """What ``read_data`` has read, which is then no longer kept, or what ``read`` reads now."""
        rows = self._records.pop((source, split), None)
        return self.read(source, split) if rows is None else rows

    def open(self) -> Any:
        """Look at the base's config, and return its processor. Reads no weights."""
        if self.continues():
            models.must_be_causal(self.config.base)
        self.processor = models.load_tokenizer(self.config.base)
        return self.processor

    def settings(self) -> dict[str, Any]:
        """What whoever measures the adapter must know beside the configuration, as JSON values."""
        return {}

    def record(self) -> dict[str, Any]:
        """What an adapter's record says of the task: its name, what of the configuration belongs to
        it, `settings`."""
        own, default = (
            {name: getattr(self.config, name) for name in RECORDED},
            TrainConfig.defaults(),
        )
        told = {name: value for name, value in own.items() if value != default[name]}
        return {"name": self.name, **told, **self.settings()}

    def prepare(self) -> Prepared:
        return prepare.prepare(self.config, self.records, self.encode, self.max_length())

    def max_length(self) -> int:
        return prepare.max_length(self.config)

    def read(self, source: str, split: str) -> data.Records:
        """The records of a source, with the columns by their part."""
        raw, digest = data.raw_rows(source, split)
        return data.select_fields(
            raw, source, digest, self.parts, self.optional, self.config.columns
        )

    @abstractmethod
    def encode(self, records: data.Records) -> Any:
        """Records as rows. Raises `DataError` with the place of a row that is wrong."""

    @abstractmethod
    def shown(self, row: dict[str, Any]) -> list[Shown]:
        """The parts of a row, in the order in which one would read them."""

    def stretches(self, name: str, ids: list[int], labels: list[int]) -> list[Shown]:
        """The same of token ids and their labels."""
        return [
            Shown(learnt, name, self.processor.decode(part))
            for learnt, part in stretches(ids, labels)
        ]

    def load(self) -> Base:
        """The base with the head of the task, and the processor."""
        return Base(self.model(), self.processor, self.config.base)

    def model(self, **fields: Any) -> Any:
        """The base as `auto` makes it. ``fields``: of its config."""
        return models.load_head(self.config.base, self.auto, **self.loading, **fields)

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows."""

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        """The loss of a batch on the model's device, and its measures if the model evaluates."""

    def items(self, batch: Mapping[str, Any]) -> int:
        """How many items a batch's loss sums: its rows, unless a task says otherwise."""
        return len(batch["labels"])

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model's forward takes, so that a check reaches all of it."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def example(self, prepared: Prepared, device: Any) -> dict[str, Any]:
        """Keyword arguments of the model's forward that reach all of it: of a short row."""
        inputs = self.inputs(self.collate([prepared.train.rows[short(prepared.train.lengths)]]))
        return {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def largest(self, prepared: Prepared) -> tuple[int, int]:
        """(tokens with padding, tokens that the output head sees) of the batch that needs the
        most."""
        rows: Rows = prepared.train
        longest = sorted(range(len(rows)), key=rows.lengths.__getitem__, reverse=True)[
            : self.config.batch_size
        ]
        return len(longest) * rows.lengths[longest[0]], (
            sum(rows.learnt[i] for i in longest) if rows.learnt else 0
        )

    def amount(self, rows: Any) -> str:
        """How much there is to learn, in words."""
        tokens = f", {sum(rows.lengths):,} tokens" if any(rows.lengths) else ""
        return f"{len(rows):,} examples{tokens}"


#: tokens of which some look at others
SEEN = 8
LOADING = ("precision", "device", "attention", "quantize", "device_map")
#: what `record` keeps of the configuration. Not `reward`: who measures an adapter names the code
#: that runs himself.
RECORDED = ("columns", "beta", "answers", "answer_tokens", "temperature", "max_length")

TASKS: Registry[type[Task]] = Registry("task")


def register(cls: type[Task]) -> type[Task]:
    """A decorator: the task under the name of its file."""
    cls.name = cls.__module__.rpartition(".")[2]
    return TASKS.add(cls.name, cls)


def short(lengths: Sequence[int]) -> int:
    """The shortest row of `SEEN` tokens or more, else the longest: in one of a single token queries
    and keys get no gradient."""
    numbers = range(len(lengths))
    return min(
        numbers,
        key=lambda i: (lengths[i] < SEEN, lengths[i] if lengths[i] >= SEEN else -lengths[i]),
    )


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """[b, s]: rows of numbers, filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def token_batch(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int
) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [b, s], filled on the right."""
    mask = [[1] * len(row) for row in ids]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded(mask, 0),
        "labels": padded(labels, IGNORED),
    }


def pad_of(tokenizer: Any) -> int:
    """What fills short rows: the padding token, else the end-of-text token; the mask hides it."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if pad is None else pad


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """A block in which the model is what a preference is measured from, without gradients and
    without dropout: its base alone, which needs no second copy of the weights, or the adapter that
    the run trains further, as it was."""
    plain = unwrap(model)
    training, attached = plain.training, adapters_of(plain)
    plain.eval()
    try:
        before = None if attached is None or REFERENCE not in attached.configs else REFERENCE
        with torch.no_grad(), nullcontext() if attached is None else use(plain, before):
            yield
    finally:
        plain.train(training)


def limited(
    records: data.Records, rows: Sequence[dict[str, Any]], longest: Sequence[int], config: TrainConfig, limit: int,
    cut: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[list[int], list[dict[str, Any]], int]:  # fmt: skip
    """(which rows are kept, the rows, how many were cut): `config.too_long` says what happens to a
    row whose longest text has more than `limit` tokens. Raises `DataError` as sft does."""
    long = [i for i, length in enumerate(longest) if length > limit]
    if long and config.too_long == "error":
        worst = max(long, key=longest.__getitem__)
        found = (
            f"{len(long)} of {len(rows)} examples of {records.source} with more than {limit:,}"
            " tokens"
        )
        found += f"; the longest, {records.places[worst]}, has {longest[worst]:,}"
        do = (
            f"raise it with --max-length {longest[worst]} (if the model allows it), or choose"
            " --too-long truncate or "
        )
        raise DataError(found, f"at most {limit:,}", f"{do}drop")
    if config.too_long == "truncate":
        which = {*long}
        return (
            [*range(len(rows))],
            [cut(row) if i in which else row for i, row in enumerate(rows)],
            len(long),
        )
    kept = [i for i in range(len(rows)) if longest[i] <= limit]
    if not kept:
        found = f"all {len(rows)} examples of {records.source} have more than {limit:,} tokens"
        raise DataError(found, f"some with at most {limit:,}", "raise max_length")
    return kept, [rows[i] for i in kept], 0


def texts_of(records: data.Records, part: str) -> list[str]:
    """The values of a part that must be text, and not empty."""
    for row, place in zip(records.rows, records.places, strict=True):
        if not isinstance(row[part], str) or not row[part].strip():
            found = f"{records.source}, {place}: {part} is {row[part]!r}"[:300]
            raise DataError(found, "text", "fix or remove that row")
    return [row[part] for row in records.rows]


def function_of(spec: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME names. Raises `ConfigError`."""
    import importlib.util

    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser()
    if not path or file.suffix != ".py" or not file.is_file():
        raise ConfigError(
            f"{spec!r}, and no such file", "FILE.py:NAME of a function", "correct the path"
        )
    module_spec: Any = importlib.util.spec_from_file_location(f"veneer_reward_{file.stem}", file)
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
            f"no function {name!r} in {file}; it has {', '.join(names) or 'none'}", "one", "name it"
        )
    return function
