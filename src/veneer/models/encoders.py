"""Text encoders: recognise them, and load them with the pooling in their sentence-transformers
files.

    is_causal("folder")         from the config alone
    load_encoder("folder")      Encoder(model, tokenizer, name, pooling, normal, length)

The pooling is read from the files of sentence-transformers; the library itself is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.fileio.untrusted import parse
from veneer.models.load import Precision, load_head, tokenizer_at
from veneer.models.locate import config_of, find_base
from veneer.precision import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder(NamedTuple):
    """A loaded encoder, and how to compute one vector from its tokens.

    ``pooling`` is "mean", "cls" or "max" over the tokens, ``normal`` whether vectors have length 1,
    ``length`` the most tokens of a text, ``labels`` those of the head that it was loaded with.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    pooling: str
    normal: bool
    length: int
    labels: int = 0


def is_causal(source: str | Path) -> bool:
    """Whether a base is a causal language model, by its config alone. Raises as ``load_base``."""
    return _describe_non_causal(str(source)) is None


def must_be_causal(source: str | Path) -> None:
    """Refuse a base that ``load_base`` would load as a language model although it is none. Reads
    only its config.

    Raises:
        ConfigError: the base is an encoder, in which positions attend to the tokens to predict, or
            has another head; or as ``load_base``.
    """
    reason = _describe_non_causal(str(source))
    if reason is not None:
        advice = "to train another kind of model, call veneer.attach on it in Python and train it"
        do = f"choose a causal base; {advice} with transformers' Trainer or a loop of your own"
        raise ConfigError(f"{source}, {reason}", "a causal language model", do)


def _describe_non_causal(name: str) -> str | None:
    """A description of a base that is not a causal language model, by its config; None for a causal
    one."""
    from transformers.models.auto import modeling_auto as auto

    if (
        Path(find_base(name)) / "modules.json"
    ).is_file():  # sentence-transformers' list of the modules after the model
        return "an encoder of sentence-transformers"
    config = config_of(name)
    class_names, values = (
        getattr(config, "architectures", None) or (),
        [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()],
    )
    # includes classes that the user has registered
    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        registered: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        values += [
            cls.__name__ for cls in (registered if isinstance(registered, tuple) else (registered,))
        ]
    causal = {
        class_name
        for value in values
        for class_name in ((value,) if isinstance(value, str) else value)
    }
    class_text = " or ".join(class_names) or f"a {config.model_type} model"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        kind = "an encoder and a decoder" if config.is_encoder_decoder else "an encoder"
        return (
            f"whose config names {class_text}, {kind}: each position sees the tokens that it should"
            " predict"
        )
    if class_names and not any(class_name in causal for class_name in class_names):
        return f"whose config names {class_text}"
    return None


def is_scorer(source: str | Path) -> bool:
    """Whether a base is a classifier of one label: its logit scores a text, or a pair of them."""
    config = config_of(source)
    names = getattr(config, "architectures", None) or ()
    is_classifier = any(name.endswith("ForSequenceClassification") for name in names)
    return is_classifier and getattr(config, "num_labels", None) == 1


def load_encoder(
    source: str | Path,
    *,
    precision: Precision = "auto",
    device: str | None = None,
    with_head: bool = False,
    **loading: Any,
) -> Encoder:
    """An encoder in eval mode, with the pooling in its sentence-transformers files; without such
    files, the normalised mean of its tokens. ``with_head``: with its classifier, if it has one of
    one label. ``loading``: further arguments of ``load_base``.

    Raises:
        ConfigError: as ``load_base``, or an unknown pooling.
    """
    name = str(source)
    location = find_base(name)
    pooling, normal, longest = _pooling(Path(location))
    scores = with_head and is_scorer(source)
    auto = "AutoModelForSequenceClassification" if scores else "AutoModel"
    model: Any = load_head(source, auto, precision=precision, device=device, **loading)
    tokenizer = tokenizer_at(location, name)
    limits = (
        longest,
        getattr(model.config, "max_position_embeddings", None),
        tokenizer.model_max_length,
    )
    length = min(int(limit) for limit in limits if limit)
    return Encoder(model, tokenizer, name, pooling, normal, length, int(scores))


def pool(hidden: Tensor, mask: Tensor, how: str, normal: bool) -> Tensor:
    """One vector per row, [rows, width], in float32 (float64 if ``hidden`` is), of ``hidden``
    [rows, tokens, width]. ``mask``: [rows, tokens], 0 for padding. ``how``: "mean", "cls" (the
    first token) or "max"."""
    hidden, is_token = hidden.to(at_least_float32(hidden.dtype)), mask.bool()[..., None]
    if how == "cls":
        vectors = hidden[:, 0]
    elif how == "max":
        vectors = hidden.masked_fill(~is_token, float("-inf")).amax(1)
    else:
        vectors = (hidden * is_token).sum(1) / is_token.sum(1)
    return nn.functional.normalize(vectors, dim=-1) if normal else vectors


def _pooling(folder: Path) -> tuple[str, bool, int | None]:
    """(pooling, whether to normalise, maximum number of tokens) in the files of
    sentence-transformers."""

    def read(file: Path) -> Any:
        try:
            return parse(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise ConfigError(
                f"{file}, which is no JSON ({error})", "JSON", "get it again"
            ) from error

    modules = read(folder / "modules.json")
    if not modules:
        return "mean", True, None
    kinds = {str(module["type"]).rpartition(".")[2]: folder / module["path"] for module in modules}
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    config = read(kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    chosen = [
        name for name, value in config.items() if name.startswith("pooling_mode_") and value is True
    ]
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    if unknown or len(chosen) != 1 or chosen[0] not in names:
        problem = (
            f"modules {sorted(kinds)} with pooling {chosen or config.get('pooling_mode')} in"
            f" {folder}"
        )
        raise ConfigError(
            problem, "a transformer, one pooling of mean, cls or max, and Normalize", "use another"
        )
    longest = read(folder / "sentence_bert_config.json").get("max_seq_length")
    return names[chosen[0]], "Normalize" in kinds, longest
