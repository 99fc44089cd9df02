"""Text encoders: recognise them by their configs, and load them with the pooling that
sentence-transformers recorded beside them.

    is_causal("folder")         whether a base is a causal model, by its config
    load_encoder("folder")      Encoder(model, tokenizer, name, pooling, normal, length)

The pooling is read from files of sentence-transformers; the library itself is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.fileio.untrusted import parse
from veneer.models.load import Precision, context_length_of, load_head, tokenizer_at
from veneer.models.locate import config_of, find_base, folder_of
from veneer.models.messages import loading
from veneer.precision import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder(NamedTuple):
    """A loaded encoder, and how to compute one vector from its tokens.

    Fields:
        pooling: "mean", "cls" (the first token) or "max" over the tokens.
        normal: whether vectors are normalised to length 1.
        length: the maximum number of tokens of a text.
        labels: the number of outputs of its classifier; 0 if it was loaded without one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    pooling: str
    normal: bool
    length: int
    labels: int = 0


def is_causal(source: str | Path) -> bool:
    """Whether a base is a causal language model, by its config. The errors are ``load_base``'s."""
    return _describe_non_causal(str(source)) is None


def must_be_causal(source: str | Path) -> None:
    """Refuse a base that is not a language model, which ``load_base`` would load as one all the
    same. Reads only its config.

    Raises:
        ConfigError: the base is an encoder, in which positions attend to the tokens that they
            should predict, or has another head; or an error of ``load_base``.
    """
    reason = _describe_non_causal(str(source))
    if reason is not None:
        advice = "to train another kind of model, call veneer.attach on it in Python and train it"
        do = f"choose a causal base; {advice} with transformers' Trainer or a loop of your own"
        raise ConfigError(f"{source}, {reason}", "a causal language model", do)


def _describe_non_causal(name: str) -> str | None:
    """A description of a base that is not a causal language model, by its config; None for a causal
    language model."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.utils.hub import cached_file

    # sentence-transformers' list of the modules that follow the model
    location, options = find_base(name), {"_raise_exceptions_for_missing_entries": False}
    with loading(name):
        modules_file = cached_file(location, "modules.json", **options)
    if modules_file is not None:
        return "an encoder of sentence-transformers"
    config = config_of(name)
    class_names = getattr(config, "architectures", None) or ()
    registered_classes = [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()]
    # includes classes that the user has registered
    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        classes: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        registered_classes += [
            cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))
        ]
    causal_classes = {
        class_name
        for names in registered_classes
        for class_name in ((names,) if isinstance(names, str) else names)
    }
    architecture = " or ".join(class_names) or f"a {config.model_type} model"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        structure = "an encoder and a decoder" if config.is_encoder_decoder else "an encoder"
        return (
            f"whose config names {architecture}, {structure}: each position sees the tokens that it"
            " should predict"
        )
    if class_names and not any(class_name in causal_classes for class_name in class_names):
        return f"whose config names {architecture}"
    return None


def is_scorer(source: str | Path) -> bool:
    """Whether a base is a classifier of one label, whose logit scores a text or a pair of texts."""
    config = config_of(source)
    class_names = getattr(config, "architectures", None) or ()
    is_classifier = any(
        class_name.endswith("ForSequenceClassification") for class_name in class_names
    )
    return is_classifier and getattr(config, "num_labels", None) == 1


def load_encoder(
    source: str | Path,
    *,
    precision: Precision = "auto",
    device: str | None = None,
    with_head: bool = False,
    **base_options: Any,
) -> Encoder:
    """An encoder in eval mode, with the pooling in its sentence-transformers files. Without such
    files, the pooling is the normalised mean of its tokens.

    Args:
        with_head: load its classifier too, if it has one with a single label.
        base_options: further arguments of ``load_base``.

    Raises:
        ConfigError: an error of ``load_base``, or an unknown pooling.
    """
    name = str(source)
    location = find_base(name)
    pooling, normal, max_length = _pooling(folder_of(name))
    has_scorer = with_head and is_scorer(source)
    auto_class = "AutoModelForSequenceClassification" if has_scorer else "AutoModel"
    model: Any = load_head(source, auto_class, precision=precision, device=device, **base_options)
    tokenizer = tokenizer_at(location, name)
    length_limits = (
        max_length,
        context_length_of(model.config),
        tokenizer.model_max_length,
    )
    length = min(int(limit) for limit in length_limits if limit)
    return Encoder(model, tokenizer, name, pooling, normal, length, int(has_scorer))


def pool(hidden: Tensor, mask: Tensor, pooling: str, normalize: bool) -> Tensor:
    """One vector per row, [rows, width], of ``hidden`` [rows, tokens, width]. The result is in
    float32, or in float64 if ``hidden`` is. ``mask`` [rows, tokens] is 0 for padding. ``pooling``
    is "mean", "cls" (the first token) or "max"."""
    hidden, is_token = hidden.to(at_least_float32(hidden.dtype)), mask.bool()[..., None]
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "max":
        vectors = hidden.masked_fill(~is_token, float("-inf")).amax(1)
    else:
        vectors = (hidden * is_token).sum(1) / is_token.sum(1)
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def _pooling(folder: Path) -> tuple[str, bool, int | None]:
    """(pooling, whether to normalise, maximum number of tokens) by the files of
    sentence-transformers in a folder."""

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
    path_of_type = {
        str(module["type"]).rpartition(".")[2]: folder / module["path"] for module in modules
    }
    unknown_types = sorted(path_of_type.keys() - {"Transformer", "Pooling", "Normalize"})
    config = read(path_of_type["Pooling"] / "config.json") if "Pooling" in path_of_type else {}
    pooling_of_key = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    # sentence-transformers 6 writes the pooling or a list; earlier versions write flags
    modes = config.get("pooling_mode") or [
        pooling_of_key.get(key, key)
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    modes = modes if isinstance(modes, list) else [modes]
    if unknown_types or len(modes) != 1 or modes[0] not in ("mean", "cls", "max"):
        raise ConfigError(
            f"modules {sorted(path_of_type)} with pooling {modes} in {folder}",
            "a transformer, one pooling of mean, cls or max, and Normalize",
            "use another",
        )
    max_length = read(folder / "sentence_bert_config.json").get("max_seq_length")
    return modes[0], "Normalize" in path_of_type, max_length
