"""Call a causal language model of transformers on the KV cache of ``slots.py``.

    logits = forward.fill(slots, …) | forward.decode(slots, …)    [rows, vocabulary], after the last
                                                                  token of each row

While a ``Forward`` is open, its calls differ from all other calls of the model in two ways:
attention reads keys and values from the slots, and the output head gets only the last hidden state
of each row. ``compare_logits`` tests with a few tokens whether the model still computes the same
logits as in its own forward.
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

#: begins the names under which attention and mask functions for the slots are registered
ATTENTION_PREFIX = "veneer_slots_"

#: the most tokens of prompts that ``Forward.together`` should compute in one call with the running
#: rows; longer prompts are computed in calls of their own
MAX_TOKENS_TOGETHER = 128

#: a function that takes the number of rows of a batch and returns a block in which calls of the
#: model on such a batch use no adapter
SelectRows = Callable[[int], AbstractContextManager[Any]]


class Forward:
    """Calls of a causal language model of transformers in eval mode, whose attention is replaced
    until ``close``.

    Attributes:
        logit_count: the number of logits of one token.
        forms: the sizes, dtype and device of each layer's keys and values; empty until
            ``compare_logits`` or the caller sets them.
        context: the most tokens of a row; None if the architecture sets no limit.

    Raises:
        ConfigError: the model is in training mode or already has an open ``Forward``, its adapter
            has invocation tokens, or its architecture cannot be called on the KV cache.
    """

    def __init__(self, model: Any) -> None:
        if model.training:
            raise ConfigError("a model in training mode", "one in eval mode", "call model.eval()")
        adapters = adapters_of(model)
        if adapters is not None and adapters.default.invocation_tokens:
            raise ConfigError(
                f"a model whose calls use {adapters.default.name!r}, which has invocation tokens",
                "a base, or an adapter that acts on every token",
                "detach it, and give the engine a bank that has its folder",
            )
        self.model, self.device = model, next(model.parameters()).device
        self._is_float32_or_wider = model.dtype.itemsize >= 4
        self.context, self.forms = context_limit(model.config), ()
        self.attention_name = model.config._attn_implementation
        self._own_attentions = _attentions_of(model.config, self.attention_name)
        forward_parameters = inspect.signature(type(model).forward).parameters
        self.cache_argument: Any = next(
            (name for name in ("cache", "past_key_values") if name in forward_parameters),
            None,
        )
        if self.cache_argument is None or "position_ids" not in forward_parameters:
            raise self._refusal("its forward takes no cache and position_ids")
        config = model.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or ())
        if layer_types - {"full_attention", "sliding_attention"}:
            raise self._refusal(f"layers of {', '.join(sorted(layer_types))}")
        if getattr(config, "kv_sharing_modes", None) is not None:
            raise self._refusal("layers that share keys and values")
        if self.attention_name.startswith(ATTENTION_PREFIX):
            raise ConfigError(
                "a model that an engine serves", "one that none does", "close that engine first"
            )
        slots_attention = ATTENTION_PREFIX + self.attention_name
        ALL_ATTENTION_FUNCTIONS.register(slots_attention, _attention_function(self.attention_name))
        ALL_MASK_ATTENTION_FUNCTIONS.register(slots_attention, _mask_function(self.attention_name))
        try:
            model.set_attn_implementation(slots_attention)
        except ValueError as error:
            model.set_attn_implementation(self._own_attentions)
            raise self._refusal(str(error)) from error
        if not model.config._attn_implementation.startswith(ATTENTION_PREFIX):
            model.set_attn_implementation(self._own_attentions)
            raise self._refusal("an attention of its own")
        head = model.get_output_embeddings()
        output_layer = model.get_input_embeddings() if head is None else head
        self.logit_count = output_layer.weight.shape[0]
        self._hooks: list[Any] = []
        if head is not None:
            self._hooks = [
                head.register_forward_pre_hook(_keep_last_tokens),
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
        """Restore the model's own attention and remove the hooks of its output head."""
        if not self._is_closed:
            self._is_closed = True
            for hook in self._hooks:
                hook.remove()
            self.model.set_attn_implementation(self._own_attentions)

    def fill(
        self,
        slots: Slots,
        rows: Sequence[Row],
        prompts: Sequence[Sequence[int]],
        starts: Sequence[int] = (),
        *,
        of_all_tokens: bool = False,
    ) -> Tensor:
        """Call the model on the tokens of ``prompts[i]`` and store their keys and values in
        ``rows[i]``, from column ``starts[i]`` on (0 by default). Returns the logits after the last
        token of each prompt, [rows, vocabulary]; with ``of_all_tokens`` those after every token,
        [rows, width, vocabulary], where width is at least the length of the longest prompt, and
        those behind the end of a prompt have no meaning."""
        starts = starts or [0] * len(prompts)
        counts = [len(ids) for ids in prompts]
        width = max(counts)
        if width > BLOCK or (any(starts) and self._is_float32_or_wider):
            # Rounding up gives fewer shapes, for each of which the CPU library caches a kernel. In
            # float32, it also makes the logits of a prompt independent of how many of its first
            # tokens are in the cache, bit for bit.
            width = round_up(width)
        # pad with the prompt's last token, a valid id; no real token attends to the padding
        ids = self._to_device([[*ids, *[ids[-1]] * (width - len(ids))] for ids in prompts])
        positions = torch.arange(width, device=self.device)
        positions = positions + self._to_device(list(starts))[:, None]
        # the positions of padding must not exceed the last one that the model supports
        positions.clamp_(max=min(slots.length, self.context or slots.length) - 1)
        last_tokens = self._to_device([count - 1 for count in counts]) if width > 1 else None
        with slots.fill(rows, starts, counts, width):
            return self._logits(slots, ids, positions, last_tokens, of_all_tokens=of_all_tokens)

    def _to_device(self, numbers: Any) -> Tensor:
        """A tensor of ``numbers`` (nested lists) on the model's device. It is copied there in one
        operation, for which the host does not wait."""
        return torch.tensor(numbers, device="cpu").to(self.device, non_blocking=True)

    def decode(
        self, slots: Slots, rows: Sequence[Row], tokens: Sequence[int], lengths: Sequence[int]
    ) -> Tensor:
        """Call the model on one more token of each row. Returns the logits after it, [rows,
        vocabulary].

        Args:
            rows: sorted by ``Row.position``.
            tokens: the id of the new token of each row.
            lengths: the number of tokens that each row holds before the new one.
        """
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
        the first token, tokens) each. Returns the logits after the new token of each row and after
        the last token of each piece, [rows + pieces, vocabulary]. In the batch of the call, each
        token is a row of its own."""
        ids, positions, wanted_rows = [*tokens], [*lengths], list(range(len(rows)))
        for _, start, piece in pieces:
            ids += piece
            positions += range(start, start + len(piece))
            wanted_rows.append(len(ids) - 1)
        ids_and_positions = self._to_device([ids, positions])
        piece_spans = [(row, start, len(piece)) for row, start, piece in pieces]
        with slots.together(rows, lengths, ids_and_positions[1, : len(rows)], piece_spans):
            CALL_STATE.rows = wanted_rows_tensor = self._to_device(wanted_rows)
            try:
                logits = self._logits(
                    slots, ids_and_positions[0][:, None], ids_and_positions[1][:, None], None
                )
            finally:
                CALL_STATE.rows = None
        # ``_keep_last_tokens`` has selected these rows already, unless the head is adapted or the
        # model has no head module.
        if len(logits) > len(wanted_rows):
            logits = logits.index_select(0, wanted_rows_tensor.to(logits.device))
        return logits

    def _logits(
        self,
        slots: Slots,
        ids: Tensor,
        positions: Tensor,
        last_tokens: Tensor | None,
        *,
        of_all_tokens: bool = False,
    ) -> Tensor:
        CALL_STATE.last = None if of_all_tokens else last_tokens
        try:
            logits = self.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=True,
                **{self.cache_argument: slots},
            ).logits
        finally:
            CALL_STATE.last = None
        if of_all_tokens:
            return logits
        # A model without a head module has no hook that selects the last tokens.
        if logits.shape[1] > 1 and last_tokens is not None:
            logits = _select_last(logits, last_tokens)
        return logits[:, -1]

    def compare_logits(
        self, length: int, select_base: SelectRows = lambda count: nullcontext()
    ) -> None:
        """Compare the logits of calls on the KV cache with those of the model's own forward, on at
        most nine tokens, and set ``forms``.

        Args:
            length: the most tokens of a row.
            select_base: takes the number of rows of a call, and returns a block in which such a
                call uses no adapter, because a trained adapter could amplify rounding errors. The
                block of the default changes nothing, for models without adapters.

        Raises:
            ConfigError: the logits differ, a call fails, or a sliding window is in the model's
                masks alone (``_check_windows``).
        """
        token_count = min(9, length)
        vocabulary_size = self.model.get_input_embeddings().weight.shape[0]
        ids = [(37 * i + 11) % vocabulary_size for i in range(token_count)]
        # Not in inference mode: the model may keep tensors of these calls, such as masks, and an
        # inference tensor cannot be used in later training.
        with torch.no_grad():
            with select_base(1):
                expected_logits = self.model(
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
        largest_logit = expected_logits.abs().amax().clamp_min(1e-3)
        tolerance = 0.05 if expected_logits.dtype.itemsize == 2 else 1e-3
        for column, logits in outputs:
            difference = float((logits - expected_logits[column]).abs().amax() / largest_logit)
            if not difference < tolerance:
                raise self._refusal(
                    f"whose logits on slots differ by {difference:.1%} from its own"
                )

    def _check_windows(self, windows: dict[str, set[int]]) -> None:
        """Raise ``ConfigError`` if a sliding window that is shorter than the longest row is in the
        model's masks alone. Calls on the KV cache do not use the model's masks. They apply the
        windows that the model passes to its attention function. ``windows``: the window sizes that
        were passed to mask functions ("mask") and to attention functions ("attention")."""
        layer_types = getattr(self.model.config.get_text_config(), "layer_types", None)
        if layer_types and "sliding_attention" not in layer_types:
            return  # some models make masks that none of their layers uses
        mask_only_windows = sorted(windows["mask"] - windows["attention"])
        if mask_only_windows and (self.context is None or mask_only_windows[0] < self.context):
            raise self._refusal(
                f"whose masks alone apply a sliding window of {mask_only_windows[0]:,} tokens"
            )

    def _trial(self, ids: Sequence[int], select_base: SelectRows) -> Any:
        """Call the model on the KV cache in each way that ``Forward`` offers. Yield (index of a
        token in ``ids``, logits after this token), for tokens of two rows of different size
        classes that are filled and decoded in the same calls; of a row that is filled in two calls;
        and of two rows in one call of ``together``. Set ``forms``."""
        token_count, half_count = len(ids), (len(ids) + 1) // 2
        slots = Slots(6, 2 * BLOCK, self.device, smallest=BLOCK)
        lengths = [max(1, half_count - 1), half_count]
        rows: Any = [slots.allocate(columns) for columns in (BLOCK, 2 * BLOCK)]
        with select_base(2):
            yield half_count - 1, self.fill(slots, rows, [ids[:length] for length in lengths])[1]
            while lengths[1] < token_count:
                yield lengths[1], self.decode(slots, rows, [ids[n] for n in lengths], lengths)[1]
                lengths = [n + 1 for n in lengths]
        rows = [slots.allocate(BLOCK)]
        with select_base(1):
            self.fill(slots, rows, [ids[:half_count]])
            if half_count < token_count:
                yield token_count - 1, self.fill(slots, rows, [ids[half_count:]], [half_count])[0]
        self.forms: tuple[LayerForm, ...] = tuple(slots.forms)
        if half_count > 1:
            rows = [slots.allocate(BLOCK), slots.allocate(2 * BLOCK)]
            with select_base(2):
                self.fill(slots, rows, [ids[:-1], ids[:1]])
            with select_base(half_count):
                pieces = [(rows[1], 1, ids[1:half_count])]
                logits = self.together(slots, rows[:1], ids[-1:], [token_count - 1], pieces)
            yield token_count - 1, logits[0]
            yield half_count - 1, logits[1]


def _attentions_of(config: Any, default: str) -> dict[str, Any]:
    """The names of the attention implementations of a config and its sub-configs, in the nested
    form that ``set_attn_implementation`` takes. ``default``: the name for a config without one."""
    sub_configs = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config._attn_implementation or default} | {
        name: _attentions_of(sub_config, default)
        for name, sub_config in sub_configs.items()
        if sub_config is not None
    }


def context_limit(config: Any) -> int | None:
    """The most tokens of a row, by a config of transformers; None if the architecture sets no
    limit.

    "dynamic" and "longrope" rotary embeddings use other frequencies beyond a certain length. In a
    call of several rows, the longest one would decide for all. Rows therefore end at that length,
    so that the logits of a row do not depend on other rows."""
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope_parameters = getattr(config, "rope_parameters", None) or {}
    for rope_settings in (
        rope_parameters,
        *(nested for nested in rope_parameters.values() if isinstance(nested, dict)),
    ):
        if rope_settings.get("rope_type") in ("dynamic", "longrope"):
            limits += [
                rope_settings.get("original_max_position_embeddings") or limits[0],
                getattr(config, "original_max_position_embeddings", None),
            ]
    return min((limit for limit in limits if limit), default=None)


def _keep_last_tokens(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of the output head. In a call on the KV cache, it passes to the head only
    the hidden state of each row's last token, [rows, 1, width]. In a call of ``Forward.together``,
    it passes only the batch rows in ``CALL_STATE.rows``, unless the head is adapted, because an
    adapter needs all rows of the batch."""
    last_tokens, rows = getattr(CALL_STATE, "last", None), getattr(CALL_STATE, "rows", None)
    if rows is not None and inputs and state_of(head) is None:
        return (inputs[0].index_select(0, rows.to(inputs[0].device)), *inputs[1:])
    if (
        last_tokens is None
        or not inputs
        or inputs[0].dim() != 3
        or inputs[0].shape[0] != len(last_tokens)
    ):
        return None
    return (_select_last(inputs[0], last_tokens), *inputs[1:])


def _take_few_rows(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of the output head, for decode calls with few rows, in which (W xᵀ)ᵀ may
    be faster than x Wᵀ (``kernels/weight_first.py``). If the head is a plain linear layer, it
    stores the hidden states in ``CALL_STATE.head_rows`` and passes none to the head. The forward
    hook ``_multiply_taken_rows`` then computes the output. The head's ``forward`` is not replaced
    instead, because another thread may attach an adapter to the head during the call."""
    CALL_STATE.head_rows = None
    if not inputs or inputs[0].dim() < 2 or not weight_first.STATE.is_used:
        return None  # not in a call of ``Forward.decode``
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
    """A forward hook of the output head: the output for the hidden states that ``_take_few_rows``
    has stored. None, which leaves ``output`` as it is, if it has stored none."""
    x = getattr(CALL_STATE, "head_rows", None)
    if x is None:
        return None
    CALL_STATE.head_rows = None
    return weight_first.linear(x.flatten(0, -2), head.weight, head.bias).view(*x.shape[:-1], -1)


def _select_last(values: Tensor, last_tokens: Tensor) -> Tensor:
    """Select from row i of ``values`` [rows, width, ·] the entry ``last_tokens[i]``:
    [rows, 1, ·]."""
    return values[torch.arange(len(values), device=values.device), last_tokens.to(values.device)][
        :, None
    ]


def _attention_function(implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function to register with transformers. In calls on the KV cache it computes
    ``attend``, in all other calls the attention that transformers has under the name
    ``implementation``."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if getattr(CALL_STATE, "call", None) is not None:
            _note_window("attention", kwargs.get("sliding_window"))
            return attend(query, scaling, kwargs), None
        if implementation == "eager":  # not registered; each model's Python module defines its own
            kernel = sys.modules[type(module).__module__].eager_attention_forward  # pyright: ignore
        else:
            kernel = ALL_ATTENTION_FUNCTIONS[implementation]
        return kernel(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)

    return attention


def _mask_function(implementation: str) -> Callable[..., Any]:
    """The mask function to register with transformers. In calls on the KV cache it returns no mask,
    in all other calls the mask of the attention that transformers has under the name
    ``implementation``."""

    def mask(*args: Any, **options: Any) -> Any:
        if getattr(CALL_STATE, "call", None) is not None:
            _note_window("mask", options.get("local_size"))
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **options)

    return mask


def _note_window(function: str, window: int | None) -> None:
    """Record the size of the sliding window that transformers passes to a mask function or an
    attention function (``function``: "mask" or "attention") during ``Forward.compare_logits``."""
    windows = getattr(CALL_STATE, "windows", None)
    if windows is not None and window is not None:
        windows[function].add(window)
