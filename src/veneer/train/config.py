"""The configuration of a training run: one pydantic model defines the YAML file, the flags and
their help.

    veneer train run.yaml --rank 32        flags override the file

An unknown field is an error that names the nearest known field. This module does not import torch,
so `veneer train --help` stays fast.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from veneer.errors import ConfigError, nearest
from veneer.train.comma_lists import split_commas

#: torch's name of a dtype -> its short name in the settings
_SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}

# Fields that may change when a run is resumed, because they do not affect the computed numbers.
FREE_ON_RESUME = frozenset(
    {
        "resume", "overwrite", "trackers", "save_every", "keep_checkpoints", "output",
        "offload_activations", "parallel", "shard_size", "record_example",
    }
)  # fmt: skip
#: fields whose value is a list; a flag gives it as one comma-separated text
LIST_FIELDS = ("targets", "exclude", "train_also", "add_tokens", "trainable_tokens", "trackers",
               "layers", "reward")  # fmt: skip

#: by setting that earlier versions lacked, the value that reproduces what they computed; settings
#: whose default reproduces it are left out
IMPLIED_SETTINGS = {"group_by_length": True}

# Fields that cannot be set together with `adapter`, because the adapter's files define them.
ADAPTER_FIELDS = (
    "rank", "alpha", "dropout", "targets", "exclude", "layers", "train_also", "bias", "variant",
    "adapter_dtype", "add_tokens", "trainable_tokens", "invocation",
)  # fmt: skip
# Fields that only the task sft reads.
SFT_FIELDS = (
    "messages_column", "prompt_column", "completion_column", "text_column", "completion_only",
    "packing", "cache_lower", "offload_activations",
)  # fmt: skip
#: tasks that support `invocation`: each row is a sequence of tokens of a causal language model
INVOKED_TASKS = ("sft", "dpo", "orpo", "kto", "grpo")


def _field_factory(panel_title: str) -> Any:
    """A function that defines a field of the panel ``panel_title`` of `veneer train --help`."""

    def field(default: Any, help: str, **limits: Any) -> Any:
        return Field(default, description=help, json_schema_extra={"panel": panel_title}, **limits)

    return field


_data, _task, _adapter, _optimiser, _run = map(
    _field_factory, ("Base and data", "Task", "Adapter", "Optimiser", "Run")
)


def task_names() -> list[str]:
    """Names of the tasks, from the files of `tasks/`, without importing them."""
    return sorted(file.stem for file in Path(__file__).with_name("tasks").glob("[a-z]*.py"))


class TrainConfig(BaseModel):
    """All settings of `veneer train`. Only `base`, `data` and `output` have no default.

    Defaults and their sources: rank 16 on all linear layers and a learning rate ten times that of
    full fine-tuning (2e-4 against the usual 2e-5) follow "LoRA Without Regret" (Schulman and
    Thinking Machines, 2025), which finds the factor of ten independent of rank and model size,
    attention-only adapters worse at equal parameters, and small batches better than large ones. The
    warm-up is short and weights do not decay, since B starts at zero and the update is small.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=False
    )

    base: str = _data(..., "Base model: a folder, a .gguf file, or a model id on the hub.")
    data: str = _data(
        ...,
        "Training data: .jsonl .json .csv .parquet .txt, a hub data set id, or a folder of images"
        " by label.",
    )
    output: Path = _run(..., "Folder for the adapter, the checkpoints and the log.")

    trust_remote_code: bool = _data(
        False,
        "Run code that lies beside the base, for a class that transformers lacks. Never an"
        " adapter's.",
    )
    eval_data: str | None = _data(
        None, "Data to evaluate on, in the same form as the training data."
    )
    eval_fraction: float = _data(
        0.0, "Without eval_data: hold out this share of the data.", ge=0, lt=1
    )
    eval_seed: int | None = _data(
        None, "Seed that chooses the rows of eval_fraction (default: seed).", ge=0
    )
    split: str = _data("train", "Which split of a hub data set to train on.")
    eval_split: str = _data("train", "Which split of a hub data set in eval_data to evaluate on.")
    messages_column: str | None = _data(None, "Column with the chat messages (default: messages).")
    prompt_column: str | None = _data(None, "Column with the prompt (default: prompt).")
    completion_column: str | None = _data(None, "Column with the completion (default: completion).")
    text_column: str | None = _data(None, "Column with plain text (default: text).")
    completion_only: bool = _data(
        True, "Learn completions and assistant turns only, not the prompts."
    )
    max_length: int | None = _data(
        None, "Longest example in tokens (default: the model's context, at most 2048).", ge=2
    )
    too_long: Literal["error", "truncate", "drop"] = _data(
        "error", "What to do with a longer example."
    )
    packing: bool = _data(
        False, "Pack several examples into one row, kept apart by the attention mask."
    )

    task: str = _task("sft", f"What to learn from the rows: {', '.join(task_names())}.")
    columns: dict[str, str] = _task(
        {},
        "Columns by their part in a task other than sft: label=intent,text=query (default: those"
        " very names).",
    )
    beta: float | None = _task(
        None,
        "dpo, kto, orpo: strength of the preference; grpo: of the KL to the base (default: 0.1,"
        " grpo 0).",
        ge=0,
    )
    reward: list[str] = _task([], "grpo: reward functions, FILE.py:NAME; their sum counts.")
    answers: int = _task(8, "grpo: answers to each prompt.", ge=2)
    answer_tokens: int = _task(128, "grpo: longest answer in tokens.", ge=1)
    temperature: float = _task(1.0, "grpo: temperature at which answers are drawn.", gt=0)
    rollouts: Literal["engine", "generate"] = _task(
        "engine",
        "grpo: how answers are computed: by the server's engine, or by transformers' own generate.",
    )

    adapter: str | None = _adapter(
        None,
        "Adapter to train further: a folder, library:NAME, or a place such as s3://…; what it"
        " changes and how are its own. dpo, kto and grpo then measure from it, not from the base.",
    )
    rank: int = _adapter(16, "Rank r of the adapter.", ge=1)
    alpha: float | None = _adapter(None, "Numerator of the scale (default: the variant's).", gt=0)
    dropout: float = _adapter(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    targets: str | list[str] = _adapter(
        "all-linear", "Layers to adapt: all-linear, attention, mlp, names or globs."
    )
    exclude: list[str] = _adapter([], "Layers to leave out.")
    train_also: list[str] = _adapter([], "Modules to train fully besides.")
    add_tokens: list[str] = _adapter(
        [], "Tokens to add to the tokenizer, and to train (saved beside the adapter)."
    )
    trainable_tokens: list[str] = _adapter(
        [], "Tokens of the tokenizer to train besides, by their texts."
    )
    invocation: str | None = _adapter(
        None,
        "Text that invokes the adapter: it acts on the tokens from its last occurrence in a row on,"
        " and the base on those before (aLoRA).",
        min_length=1,
    )
    variant: str = _adapter(
        "lora",
        "Adapter variant: lora, rslora, …; eva, corda and lora_ga start from the first rows of the"
        " data.",
    )
    bias: Literal["none", "targets", "all"] = _adapter("none", "Which biases train besides.")
    layers: list[int] | None = _adapter(
        None, "Which blocks to adapt, by index; -1 is the last (default: all)."
    )
    adapter_dtype: Literal["auto", "fp32", "bf16"] = _adapter(
        "auto", "Adapter's numbers; auto: fp32 on a 16-bit base."
    )

    learning_rate: float = _optimiser(
        2e-4, "Peak learning rate; about 10 × that of full fine-tuning.", gt=0
    )
    schedule: Literal["constant", "linear", "cosine"] = _optimiser(
        "cosine", "Learning rate after the warm-up."
    )
    warmup: float = _optimiser(0.03, "Warm-up: steps if ≥ 1, else a share of the run.", ge=0)
    epochs: float = _optimiser(1.0, "Passes over the data, unless max_steps is given.", gt=0)
    max_steps: int | None = _optimiser(None, "Stop after this many steps instead.", ge=1)
    batch_size: int = _optimiser(8, "Examples in one forward pass.", ge=1)
    grad_accum: int = _optimiser(1, "Forward passes in one step.", ge=1)
    group_by_length: bool = _optimiser(
        False,
        "Rows of like length share a batch: less padding, but a step teaches less than one of"
        " rows by chance.",
    )
    optimiser: str = _optimiser(
        "adamw_torch_fused",
        "Any optimiser that transformers knows: adamw, paged_adamw_8bit, lion_8bit, …",
    )
    weight_decay: float = _optimiser(0.0, "Weight decay.", ge=0)
    adam_beta2: float = _optimiser(0.999, "Adam's second-moment decay.", gt=0, lt=1)
    max_grad_norm: float = _optimiser(1.0, "Clip gradients to this norm; 0 switches it off.", ge=0)

    eval_every: int | None = _run(
        None, "Evaluate every so many steps (default: five times in a run).", ge=1
    )
    save_every: int | None = _run(
        None, "Checkpoint every so many steps (default: ten times in a run).", ge=1
    )
    keep_checkpoints: int = _run(
        2, "How many checkpoints to keep (with early_stopping at least 2: best and newest).", ge=1
    )
    early_stopping: int | None = _run(
        None, "Stop after so many evaluations without a gain; keep the best.", ge=1
    )
    seed: int = _run(0, "Seed of the initialisation, the order of the data and the dropout.", ge=0)
    data_seed: int | None = _run(None, "Seed of the order of the data (default: seed).", ge=0)
    precision: Literal["auto", "fp32", "bf16"] = _run(
        "auto", "Base weights; auto: bf16 where the hardware has it."
    )
    quantize: Literal["nf4", "fp4", "int8"] | None = _run(
        None,
        "Keep the base's linear layers in 4 or 8 bits (bitsandbytes); precision is then that of the"
        " products.",
    )
    device: Literal["cpu", "cuda", "mps", "xpu"] | None = _run(
        None,
        "Where to train (default: the GPU if there is one; CUDA_VISIBLE_DEVICES chooses among"
        " several).",
    )
    device_map: str | dict[str, int | str] | None = _run(
        None, "Spread the base over several GPUs: auto, balanced, … as transformers takes it."
    )
    parallel: Literal["ddp", "fsdp", "tp"] = _run(
        "ddp",
        "Under torchrun: ddp keeps the base whole in each process, fsdp spreads it over them, tp"
        " lets each compute a part of every matrix.",
    )
    shard_size: int | None = _run(
        None,
        "fsdp: the number of processes that hold a copy of the base between them, as in HSDP"
        " (default: all).",
        ge=2,
    )
    attention: str = _run(
        "auto",
        "Attention code: products, or any that transformers knows (eager, sdpa, flash_attention_2,"
        " …); auto: transformers' choice, and products where they are faster on a CPU.",
    )
    activation_checkpointing: bool = _run(
        False, "Recompute activations: less memory, about a third slower."
    )
    offload_activations: bool = _run(
        False, "Keep activations in main memory until backward: less memory of the GPU."
    )
    cache_lower: bool = _run(
        False,
        "Compute what the blocks below the lowest adapted one put out once a row, and keep it in"
        " memory.",
    )
    check: bool = _run(
        True, "Check before training that every adapter is reached and gets a gradient."
    )
    record_example: bool = _run(
        False,
        "Keep the system prompt and one prompt of the data in the adapter's record; the page of"
        " `veneer serve` opens with them.",
    )
    trackers: list[str] = _run(
        [], "Report to these trackers as well: tensorboard, wandb, mlflow, …"
    )
    resume: bool | None = _run(
        None, "Continue an unfinished run (default: if there is one with this configuration)."
    )
    overwrite: bool = _run(False, "Replace a run that is not resumed (--no-resume: any).")

    @field_validator("precision", "adapter_dtype", mode="before")
    @classmethod
    def _shorten_dtype(cls, value: Any) -> Any:
        """Replace torch's name of a dtype, or a ``torch.dtype``, by the short name."""
        return _SHORT_DTYPES.get(str(value).removeprefix("torch."), value)

    @field_validator("columns", mode="before")
    @classmethod
    def _parse_columns(cls, value: Any) -> Any:
        """Parse the text of the flag --columns: pairs `field=column`, separated by commas."""
        if not isinstance(value, str):
            return value
        pairs = [pair.strip().partition("=") for pair in value.split(",") if pair.strip()]
        if not all(field and column for field, _, column in pairs):
            raise ValueError("expected PART=COLUMN, several of them with commas between")
        fields = [field for field, _, _ in pairs]
        if repeated := next((field for field in fields if fields.count(field) > 1), None):
            raise ValueError(f"{repeated!r} twice; expected one column for each part")
        return {field: column for field, _, column in pairs}

    @field_validator(*LIST_FIELDS, mode="before")
    @classmethod
    def _split_list(cls, value: Any, info: ValidationInfo) -> Any:
        """Split a comma-separated text, which is how a flag gives a list. A single value becomes a
        list of one element; for `targets`, a list of one element becomes that element."""
        if isinstance(value, str) and "," in value:
            value = split_commas(value)
        if info.field_name == "targets":
            return value[0] if isinstance(value, list) and len(value) == 1 else value
        return [value] if isinstance(value, int | str) else value

    @field_validator("optimiser")
    @classmethod
    def _expand_optimiser(cls, value: str) -> str:
        return "adamw_torch_fused" if value == "adamw" else value

    @field_validator("task")
    @classmethod
    def _check_task(cls, value: str) -> str:
        tasks = task_names()
        if value not in tasks:
            raise ValueError(
                f"no such task{nearest(value, tasks)}; expected one of {', '.join(tasks)}"
            )
        return value

    @model_validator(mode="after")
    def _check_agreement(self) -> TrainConfig:
        sft_names, adapter_names = map(self.changed_names, (SFT_FIELDS, ADAPTER_FIELDS))
        is_evaluated = self.eval_data is not None or self.eval_fraction > 0
        problems = [  # (whether there is the problem, its description)
            (
                self.task == "sft" and self.columns,
                "columns is for the other tasks; name the columns of sft with prompt_column and its"
                " like",
            ),
            (
                self.task == "grpo" and not self.reward,
                "task grpo needs reward: FILE.py:NAME of a function",
            ),
            (self.task != "grpo" and self.reward, "reward needs task grpo"),
            (
                self.task != "sft" and sft_names,
                f"{', '.join(sft_names)} given for task {self.task}; expected task sft (the columns"
                " of other tasks are named in columns)",
            ),
            (
                self.invocation is not None and (self.packing or self.task not in INVOKED_TASKS),
                f"invocation is for rows of one sequence, of the tasks {', '.join(INVOKED_TASKS)};"
                f" found {'packing' if self.packing else f'task {self.task}'}",
            ),
            (
                self.eval_data is not None and self.eval_fraction,
                "eval_data and eval_fraction are both given; expected one of them",
            ),
            (
                self.early_stopping and not is_evaluated,
                "early_stopping needs something to evaluate on: give eval_data or eval_fraction",
            ),
            (
                self.early_stopping and (self.save_every or 0) % (self.eval_every or 1),
                f"early_stopping keeps the best checkpoint, so save_every ({self.save_every}) must"
                f" be a multiple of eval_every ({self.eval_every})",
            ),
            (
                self.shard_size is not None and self.parallel != "fsdp",
                f"shard_size is for parallel fsdp; found parallel {self.parallel}",
            ),
            (
                self.device is not None and self.device_map is not None,
                "device and device_map are both given; expected one: a map places all of the model",
            ),
            (
                self.adapter is not None and adapter_names,
                f"{', '.join(adapter_names)} beside adapter, which has its own: leave one of them"
                " out",
            ),
            (
                self.resume and self.overwrite,
                "resume and overwrite are both given; expected one of them",
            ),
        ]
        for is_wrong, description in problems:
            if is_wrong:
                raise ValueError(description)
        return self

    def changed_names(self, field_names: tuple[str, ...]) -> list[str]:
        """The names in `field_names` whose fields differ from their defaults."""
        defaults = self.defaults()
        return [name for name in field_names if getattr(self, name) != defaults[name]]

    def content(self) -> dict[str, Any]:
        """All fields by name, with their values as JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default values of the optional fields, by field."""
        return {
            name: info.default for name, info in cls.model_fields.items() if not info.is_required()
        }


def load_config(path: Path | None = None, **changes: Any) -> TrainConfig:
    """Read a configuration: the YAML file at `path`, overridden by the `changes` that are not None.
    Raises `ConfigError` if the file cannot be read or parsed, or if fields are unknown or have
    wrong values; all such fields are reported at once."""
    overrides = {name: value for name, value in changes.items() if value is not None}
    if path is None:
        return make_config(overrides)
    return make_config({**read_yaml(path), **overrides}, str(path))


def make_config(fields: dict[str, Any], source: str = "the arguments") -> TrainConfig:
    """Create `TrainConfig(**fields)`. Raises one `ConfigError` that lists all validation errors and
    names `source`, which says where the fields come from."""
    try:
        return TrainConfig(**fields)
    except ValidationError as error:
        lines = [_describe_problem(problem) for problem in error.errors()]
    raise ConfigError(
        f"{source} is not a valid training configuration:\n"
        + "\n".join(f"  - {line}" for line in lines)
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields in a YAML file. Raises `ConfigError` for a file that cannot be read or parsed."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        suggestion = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        raise ConfigError(
            f"The configuration {path} does not exist{suggestion}.\nDo: check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}).\nDo: save it as UTF-8."
        ) from error
    except yaml.YAMLError as error:
        mark, problem = (
            getattr(error, "problem_mark", None),
            getattr(error, "problem", None) or str(error),
        )
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(
            f"{path}{position} is not YAML: {problem}.\nExpected lines such as `rank: 16`.\nDo:"
            " fix it."
        ) from error
    except RecursionError as error:
        raise ConfigError(
            f"{path}, which is nested too deep", "lines such as `rank: 16`", "fix it"
        ) from error
    except ValueError as error:  # such as an invalid date or a huge number
        raise ConfigError(
            f"{path}, with a value that cannot be read ({error})"[:300],
            "lines such as `rank: 16`",
            "fix it",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror}.\nDo: check its permissions."
        ) from error
    document = {} if document is None else document
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(
            f"{path} holds a {type(document).__name__}; expected `name: value` lines.\nDo: see"
            " `veneer train --help`."
        )
    return document


def _describe_problem(problem: Any) -> str:
    """One line of text for `problem`, an entry of `errors()` of pydantic's `ValidationError`."""
    name = ".".join(str(key) for key in problem["loc"][:1])
    error_type, rejected = problem["type"], problem["input"]
    if error_type == "extra_forbidden":
        if name == "sweep":
            return "sweep is a section for `veneer sweep`"
        close_names = difflib.get_close_matches(name, TrainConfig.model_fields, n=1, cutoff=0.4)
        return f"unknown field {name!r}" + (
            f"; did you mean {close_names[0]!r}?" if close_names else "; see `veneer train --help`"
        )
    if error_type == "missing":
        description = TrainConfig.model_fields[name].description
        return f"{name} is missing: {description} (add `{name}: …` or --{name.replace('_', '-')})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: found {rejected!r}; {message[0].lower()}{message[1:]}" if name else message
