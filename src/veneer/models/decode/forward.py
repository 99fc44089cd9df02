"""Call a causal language model of transformers on the KV cache of ``slots.py``.

    logits = forward.fill(slots, …) | forward.decode(slots, …)    [rows, vocabulary], after the last
                                                                  token of each row

While a ``Forward`` is open, its calls differ from all other calls of the model in two ways:
attention reads keys and values from the slots, and the output head gets only the last hidden state
of each row. A trial (``compare_logits``) shows whether the architecture still computes the same
logits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.attach import adapters_of, state_of
from veneer.errors import ConfigError
from veneer.kernels import weight_first
from veneer.models.decode.attention import BLOCK, CALL_STATE, attend, round_up
from veneer.models.decode.slots import LayerForm, Row, Slots

PREFIX = "veneer_slots_"

#: the most tokens of prompts that are computed in one call with the running rows
TOGETHER = 128

#: a function that takes a number of rows and returns a block in which calls on so many rows use no
#: adapter
SelectRows = Callable[[int], AbstractContextManager[Any]]


class Forward:
    """Calls of a causal language model of transformers in eval mode, whose attention is replaced
    until ``close``. ``logit_count``: the number of logits of one token. ``forms``: the form of each
    layer's keys and values. ``context``: the most tokens of a row, or None.

    Raises:
        ConfigError: the model is in training mode or already has an open ``Forward``, its adapter
            has invocation tokens, or its architecture cannot be called on the KV cache.
    """

    def __init__(self, model: Any) -> None:
        if model.training:
            raise ConfigError("a model in training mode", "one in eval mode", "call model.eval()")
        attached = adapters_of(model)
        if attached is not None and attached.default.invocation_tokens:
            raise ConfigError(
                f"a model whose calls use {attached.default.name!r}, which has invocation tokens",
                "a base, or an adapter that acts on every token",
                "detach it, and give the engine a bank that has its folder",
            )
        self.model, self.device = model, next(model.parameters()).device
        self._is_wide = model.dtype.itemsize >= 4
        self.context, self.forms = context(model.config), ()
        self.attention = model.config._attn_implementation
        self._attentions = _attentions_of(model.config, self.attention)
        parameters = inspect.signature(type(model).forward).parameters
        self.cache: Any = next(
            (name for name in ("cache", "past_key_values") if name in parameters), None
        )
        if self.cache is None or "position_ids" not in parameters:
            raise self._refusal("its forward takes no cache and position_ids")
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds - {"full_attention", "sliding_attention"}:
            raise self._refusal(f"layers of {', '.join(sorted(kinds))}")
        if getattr(config, "kv_sharing_modes", None) is not None:
            raise self._refusal("layers that share keys and values")
        if self.attention.startswith(PREFIX):
            raise ConfigError(
                "a model that an engine serves", "one that none does", "close that engine first"
            )
        name = PREFIX + self.attention
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(self.attention))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask(self.attention))
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            model.set_attn_implementation(self._attentions)
            raise self._refusal(str(error)) from error
        if not model.config._attn_implementation.startswith(PREFIX):
            model.set_attn_implementation(self._attentions)
            raise self._refusal("an attention of its own")
        head = model.get_output_embeddings()
        output_layer = model.get_input_embeddings() if head is None else head
        self.logit_count = output_layer.weight.shape[0]
        self._hooks: list[Any] = []
        if head is not None:
            self._hooks = [
                head.register_forward_pre_hook(_last_rows),
                head.register_forward_pre_hook(_take_few_rows),
                head.register_forward_hook(_multiply_taken_rows),
            ]
        self._is_closed = False

    def _refusal(self, problem: str) -> ConfigError:
        return ConfigError(
            f"{type(self.model).__name__}, {problem}",
            "an architecture whose attention goes through transformers' attention functions,"
            " causal, over all tokens or a sliding window",
            "serve it with --engine vllm",
        )

    def close(self) -> None:
        """Restore the model's own attention."""
        if not self._is_closed:
            self._is_closed = True
            for hook in self._hooks:
                hook.remove()
            self.model.set_attn_implementation(self._attentions)

    def fill(
        self,
        slots: Slots,
        rows: Sequence[Row],
        prompts: Sequence[Sequence[int]],
        starts: Sequence[int] = (),
        *,
        of_all_tokens: bool = False,
    ) -> Tensor:
        """Compute the tokens of ``prompts[i]`` and store their keys and values in ``rows[i]``, from
        column ``starts[i]`` on (0 by default). Returns the logits after the last token of each
        prompt, [rows, vocabulary]; with ``of_all_tokens`` those after every token, [rows, width,
        vocabulary], where width is the length of the longest prompt or more."""
        starts = starts or [0] * len(prompts)
        counts = [len(ids) for ids in prompts]
        width = max(counts)
        if width > BLOCK or (any(starts) and self._is_wide):
            # Rounding up gives fewer shapes, for each of which the CPU library caches a kernel. In
            # float32, a prompt then gets the same bits, however much of it is cached.
            width = round_up(width)
        # pad with the prompt's last token, a valid id; no real token attends to the padding
        ids = self._to_device([[*ids, *[ids[-1]] * (width - len(ids))] for ids in prompts])
        positions = torch.arange(width, device=self.device)
        positions = positions + self._to_device(list(starts))[:, None]
        # positions of padding may exceed the last position of the model
        positions.clamp_(max=min(slots.length, self.context or slots.length) - 1)
        last = self._to_device([count - 1 for count in counts]) if width > 1 else None
        with slots.fill(rows, starts, counts, width):
            return self._logits(slots, ids, positions, last, of_all_tokens=of_all_tokens)

    def _to_device(self, numbers: Any) -> Tensor:
        """These numbers as a tensor on the device, in one copy for which the host does not wait."""
        return torch.tensor(numbers, device="cpu").to(self.device, non_blocking=True)

    def decode(
        self, slots: Slots, rows: Sequence[Row], tokens: Sequence[int], lengths: Sequence[int]
    ) -> Tensor:
        """Logits [rows, vocabulary] after one more token of each row, given by ``tokens``. The rows
        are sorted by ``Row.position`` and hold ``lengths`` tokens."""
        ids, positions = self._to_device([tokens, lengths]).unbind()
        with (
            slots.decode(rows, lengths, positions),
            weight_first.use(),
        ):
            return self._logits(slots, ids[:, None], positions[:, None], None)

    def together(
        self,
        slots: Slots,
        rows: Sequence[Row],
        tokens: Sequence[int],
        lengths: Sequence[int],
        pieces: Sequence[tuple[Row, int, Sequence[int]]],
    ) -> Tensor:
        """Compute in one call what ``decode`` computes, and ``pieces`` of prompts: (row, column of
        the first token, tokens) each. Returns the logits after the token of each row and the last
        token of each piece, [rows + pieces, vocabulary]. In the batch each token is a row."""
        ids, positions, wanted = [*tokens], [*lengths], list(range(len(rows)))
        for _, start, piece in pieces:
            ids += piece
            positions += range(start, start + len(piece))
            wanted.append(len(ids) - 1)
        batch = self._to_device([ids, positions])
        spans = [(row, start, len(piece)) for row, start, piece in pieces]
        with slots.together(rows, lengths, batch[1, : len(rows)], spans):
            CALL_STATE.rows = rows_wanted = self._to_device(wanted)
            try:
                logits = self._logits(slots, batch[0][:, None], batch[1][:, None], None)
            finally:
                CALL_STATE.rows = None
        if len(logits) > len(wanted):  # the head computed all rows: it is adapted, or no module
            logits = logits.index_select(0, rows_wanted.to(logits.device))
        return logits

    def _logits(
        self,
        slots: Slots,
        ids: Tensor,
        positions: Tensor,
        last: Tensor | None,
        *,
        of_all_tokens: bool = False,
    ) -> Tensor:
        CALL_STATE.last = None if of_all_tokens else last
        try:
            logits = self.model(
                input_ids=ids, position_ids=positions, use_cache=True, **{self.cache: slots}
            ).logits
        finally:
            CALL_STATE.last = None
        if of_all_tokens:
            return logits
        if logits.shape[1] > 1 and last is not None:  # the head is no module, so no hook ran
            logits = _last(logits, last)
        return logits[:, -1]

    def compare_logits(
        self, length: int, select_base: SelectRows = lambda count: nullcontext()
    ) -> None:
        """Compare the logits of calls on the KV cache with those of the model's own forward, on at
        most nine tokens, and set ``forms``.

        Args:
            length: the most tokens of a row.
            select_base: selects the base for the calls of the trial.

        Raises:
            ConfigError: the logits differ, or a call fails.
        """
        steps = min(9, length)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = [(37 * i + 11) % vocabulary for i in range(steps)]
        # no inference mode: tensors that the model keeps of a call are used in training, too
        with torch.no_grad():
            with select_base(1):
                expected = self.model(
                    input_ids=torch.tensor([ids], device=self.device), use_cache=False
                ).logits[0]
            CALL_STATE.windows = windows = {"mask": set(), "attention": set()}
            try:
                outputs = list(self._trial(ids, select_base))
            except (
                NotImplementedError,
                AttributeError,
                TypeError,
                RuntimeError,
                KeyError,
            ) as error:
                raise self._refusal(
                    f"which failed in a trial ({type(error).__name__}: {error})"
                ) from error
            finally:
                CALL_STATE.windows = None
        self._check_windows(windows)
        magnitude = expected.abs().amax().clamp_min(1e-3)
        tolerance = 0.05 if expected.dtype.itemsize == 2 else 1e-3
        for column, logits in outputs:
            difference = float((logits - expected[column]).abs().amax() / magnitude)
            if not difference < tolerance:
                raise self._refusal(
                    f"whose logits on slots differ by {difference:.1%} from its own"
                )

    def _check_windows(self, windows: dict[str, set[int]]) -> None:
        """Raise ``ConfigError`` if the model applies a sliding window, which rows may exceed, by
        its masks alone. Calls on the KV cache do not use these masks. They apply the windows that
        the model passes to its attention function."""
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None)
        if kinds and "sliding_attention" not in kinds:
            return  # some models make masks that none of their layers uses
        masked = sorted(windows["mask"] - windows["attention"])
        if masked and (self.context is None or masked[0] < self.context):
            raise self._refusal(f"whose masks alone apply a sliding window of {masked[0]:,} tokens")

    def _trial(self, ids: Sequence[int], select_base: SelectRows) -> Any:
        """Yield (column, logits after the token of this column): of two rows of different size
        classes that are filled and decoded in the same calls, of a row that is filled in two calls,
        and of a row that is filled in the call in which another one decodes."""
        total, half = len(ids), (len(ids) + 1) // 2
        slots = Slots(6, 2 * BLOCK, self.device, smallest=BLOCK)
        lengths = [max(1, half - 1), half]
        rows: Any = [slots.allocate(columns) for columns in (BLOCK, 2 * BLOCK)]
        with select_base(2):
            yield half - 1, self.fill(slots, rows, [ids[:length] for length in lengths])[1]
            while lengths[1] < total:
                yield lengths[1], self.decode(slots, rows, [ids[n] for n in lengths], lengths)[1]
                lengths = [n + 1 for n in lengths]
        rows = [slots.allocate(BLOCK)]
        with select_base(1):
            self.fill(slots, rows, [ids[:half]])
            if half < total:
                yield total - 1, self.fill(slots, rows, [ids[half:]], [half])[0]
        self.forms: tuple[LayerForm, ...] = tuple(slots.forms)
        if half > 1:
            rows = [slots.allocate(BLOCK), slots.allocate(2 * BLOCK)]
            with select_base(2):
                self.fill(slots, rows, [ids[:-1], ids[:1]])
            with select_base(half):
                piece = [(rows[1], 1, ids[1:half])]
                logits = self.together(slots, rows[:1], ids[-1:], [total - 1], piece)
            yield total - 1, logits[0]
            yield half - 1, logits[1]


def _attentions_of(config: Any, default: str) -> dict[str, Any]:
    """The names of the attention implementations of a config and its sub-configs, in the nested
    form that ``set_attn_implementation`` takes. ``default``: for a config that names none."""
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config._attn_implementation or default} | {
        name: _attentions_of(each, default) for name, each in inner.items() if each is not None
    }


def context(config: Any) -> int | None:
    """The most positions of a row; None if the architecture sets no limit. Some rotary embeddings
    change their frequencies beyond a length, and the longest row of a call would decide for all
    rows. Rows therefore end before that length, so that no row depends on others."""
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (
        parameters,
        *(nested for nested in parameters.values() if isinstance(nested, dict)),
    ):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limits += [
                rope.get("original_max_position_embeddings") or limits[0],
                getattr(config, "original_max_position_embeddings", None),
            ]
    return min((limit for limit in limits if limit), default=None)


def _last_rows(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A hook before the output head. In a call on the KV cache, it passes on only the hidden state
    of each row's last token, [rows, 1, width]. In ``Forward.together``, it passes on those of the
    rows in ``CALL_STATE.rows``, unless the head is adapted, because an adapter expects all rows."""
    last, rows = getattr(CALL_STATE, "last", None), getattr(CALL_STATE, "rows", None)
    if rows is not None and inputs and state_of(head) is None:
        return (inputs[0].index_select(0, rows.to(inputs[0].device)), *inputs[1:])
    if last is None or not inputs or inputs[0].dim() != 3 or inputs[0].shape[0] != len(last):
        return None
    return (_last(inputs[0], last), *inputs[1:])


def _take_few_rows(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A hook before the output head. In a decode call with few rows, it passes no rows to a plain
    linear head, and stores them for ``_multiply_taken_rows``, which multiplies them as
    ``kernels/weight_first.py`` does. The head itself is not changed for this, because another
    thread may attach an adapter to it during the call."""
    CALL_STATE.head_rows = None
    if not inputs or inputs[0].dim() < 2 or not weight_first.STATE.is_used:
        return None  # no decode call
    x = inputs[0]
    if (
        type(head) is not nn.Linear
        or "forward" in head.__dict__
        or len(head._forward_hooks) > 1
        or torch_module._global_forward_hooks
        or next(reversed(head._forward_pre_hooks.values())) is not _take_few_rows
        or not weight_first.suits(x.flatten(0, -2), head.weight)
    ):
        return None
    CALL_STATE.head_rows = x
    return (x[:0],)


def _multiply_taken_rows(head: Any, inputs: Any, output: Tensor) -> Tensor | None:
    """The output of the head for the rows of ``_take_few_rows``; None if there are none."""
    x = getattr(CALL_STATE, "head_rows", None)
    if x is None:
        return None
    CALL_STATE.head_rows = None
    return weight_first.linear(x.flatten(0, -2), head.weight, head.bias).view(*x.shape[:-1], -1)


def _last(values: Tensor, last: Tensor) -> Tensor:
    """Select column ``last`` of each row of values [rows, width, ·] -> [rows, 1, ·]."""
    return values[torch.arange(len(values), device=values.device), last.to(values.device)][:, None]


def _attention(implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function to register with transformers. In calls on the KV cache it is
    ``attend``, and in all other calls the model's own ``implementation``."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        scaling: float | None = None,
        **further: Any,
    ) -> tuple[Tensor, Any]:
        if getattr(CALL_STATE, "call", None) is not None:
            _note_window("attention", further.get("sliding_window"))
            return attend(query, scaling, further), None
        if implementation == "eager":  # defined in the module of each model
            function = sys.modules[type(module).__module__].eager_attention_forward  # pyright: ignore
        else:
            function = ALL_ATTENTION_FUNCTIONS[implementation]
        return function(
            module, query, key, value, attention_mask, *args, scaling=scaling, **further
        )

    return attention


def _mask(implementation: str) -> Callable[..., Any]:
    """The mask function to register with transformers. It returns no mask in calls on the KV cache,
    and the mask of ``implementation`` in all other calls."""

    def mask(*args: Any, **options: Any) -> Any:
        if getattr(CALL_STATE, "call", None) is not None:
            _note_window("mask", options.get("local_size"))
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **options)

    return mask


def _note_window(function: str, window: int | None) -> None:
    """In a trial: record the sliding window that a mask or attention function is given."""
    windows = getattr(CALL_STATE, "windows", None)
    if windows is not None and window is not None:
        windows[function].add(window)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: those of the generation config, the config and the tokenizer."""
    sources = (
        getattr(model, "generation_config", None),
        model.config.get_text_config(),
        tokenizer,
    )
    ids: set[int | None] = set()
    for source in sources:
        end = getattr(source, "eos_token_id", None)
        ids |= {*end} if isinstance(end, list | tuple) else {end}
    return frozenset(id for id in ids if id is not None)
