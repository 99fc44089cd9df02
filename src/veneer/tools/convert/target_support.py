"""Check what the target format can hold: an error for changes that it cannot hold, and a list of
other contents that the conversion loses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from veneer.adapter_files import UnverifiedAdapter
from veneer.adapter_files.file_names import tokenizer_folder
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_deviations import deviation_reasons
from veneer.adapter_files.peft_mapping import means_parameter, ref_at
from veneer.attach import ModelIndex
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.formats import FORMATS, Format, peft, peft_behaviour, peft_fields
from veneer.layers import kind_for
from veneer.tools.convert.base_info import BaseInfo


def require_supported(
    saved_adapter: AdapterFiles, source_format: str, target: Format, base_info: BaseInfo
) -> None:
    """Refuse an adapter that the format ``target`` cannot hold:

    - invocation tokens, unless ``target`` is "veneer" or "peft";
    - changes for which PEFT's result differs from that of a changed weight, if PEFT reads the
      target, or PEFT wrote the source and the target holds changes of weights;
    - folders in which B A is not the whole change, because PEFT subtracts an initial product from
      the base weight (PiSSA), or because the adapter has a bias beside B. They are accepted if the
      conversion installs the adapter on the base ("veneer", and "dense" with a base), because the
      change is then computed from the model.

    Raises:
        AdapterError: the adapter is refused.

    Warns:
        UnverifiedAdapter: a check needs the model of the base, which is missing.
    """
    if target.name not in ("veneer", "peft"):
        saved_adapter.refuse_invocation_tokens(f"format {target.name!r}")
    # if the adapter is installed on the base, `install_from` makes these checks
    needs_checks = target.name not in ("veneer", "dense") or base_info.load_model is None
    if needs_checks:
        peft_fields.check_config(saved_adapter.peft_config, saved_adapter.record is not None)
        output_change_paths = [
            name
            for name, change in saved_adapter.metadata.get("changes", {}).items()
            if change.get("module_only")
        ]
        if output_change_paths and not target.peft:
            raise AdapterError(
                f"changes of what modules give ({listing(output_change_paths, 3)}), whose weights"
                " others read unchanged",
                "changes of weights",
                'keep the adapter beside its base, or convert it to "peft"',
            )
    if target.peft and (reason := peft.not_for_peft(saved_adapter.peft_config)) is not None:
        raise AdapterError(
            f"an adapter that PEFT would apply in another way ({reason})",
            "changes that PEFT computes",
            "merge it, or convert it to dense",
        )
    if target.peft and saved_adapter.tuner is not None:
        raise_all(
            AdapterError,
            f"{saved_adapter.path} cannot be LoRA",
            list(_convolution_problems(saved_adapter, base_info)),
        )
    if (
        needs_checks
        and not target.peft
        and FORMATS[source_format].peft
        and saved_adapter.record is None
    ):
        _require_weight_changes(saved_adapter, target, base_info.structure)


def list_losses(saved_adapter: AdapterFiles, target_format: str) -> list[str]:
    """Descriptions of the contents that the conversion to ``target_format`` drops. None of them
    affects the output of the adapted model in inference."""
    hash_text = "hashes" if target_format == "dense" else "fingerprints of the base, hashes"
    variant, dropout = saved_adapter.config.variant, saved_adapter.config.dropout
    is_veneer, is_folder = target_format == "veneer", target_format in ("veneer", "peft")
    tokenizer_path = tokenizer_folder(saved_adapter.path)
    losses = [
        (saved_adapter.metadata and not is_veneer, f"the record: {hash_text} and provenance"),
        (
            saved_adapter.adapter_parameters and not is_veneer,
            f"the numbers of variant {variant!r}; the change that they amount to is kept",
        ),
        (
            saved_adapter.tokens and not is_folder,
            "the rows of trained tokens; kept is how they differ from this base's own, so it fits"
            " this base alone",
        ),
        (tokenizer_path is not None and not is_folder, "the tokenizer with the added tokens"),
        (dropout and not is_folder, f"dropout {dropout:g}, which counts in training alone"),
    ]
    return [description for is_lost, description in losses if is_lost]


def _convolution_problems(saved_adapter: AdapterFiles, base_info: BaseInfo) -> Iterator[str]:
    """The error texts for an adapter of another PEFT tuner (such as LoHa) that is to be written as
    LoRA: one for each changed convolution for which PEFT's LoRA would compute another result."""
    convolution_paths = [
        layer.target_path for layer in saved_adapter.low.values() if layer.A.dim() > 2
    ]
    if not convolution_paths:
        return
    assert base_info.load_model is not None  # without a base, ``read_source`` fails earlier
    model_index = ModelIndex(base_info.load_model())
    for path in convolution_paths:
        module = model_index.modules[model_index.canonical[path]]
        reason = peft_behaviour.deviation_reason(kind_for(module, "weight").name, module)
        if reason is not None:
            yield sentence(
                f"a change of {path!r}: {reason}", "layers that PEFT's LoRA computes", "merge it"
            )


def _require_weight_changes(
    saved_adapter: AdapterFiles, target: Format, model: nn.Module | None
) -> None:
    """Raise AdapterError if PEFT, which changes the output of a module, computes another result
    than a change of the module's weight would. ``model``: the base's modules; if it is None,
    nothing is checked, and the warning ``UnverifiedAdapter`` says so."""
    if model is None:
        layer_traits = "a dilation, a padding mode or a forward of its own"
        warnings.warn(
            f"Nobody checked what PEFT makes of {saved_adapter.path}: where a module reads another"
            f" one's weight, or a layer has {layer_traits}, that is no change of the weight, which"
            f" is what {target.name!r} holds. Give the model as base to have it checked.",
            UnverifiedAdapter,
            stacklevel=4,
        )
        return
    model_index, peft_config, problems = ModelIndex(model), saved_adapter.peft_config, []
    for path, layer in saved_adapter.low.items():
        ref = ref_at(model_index, path, peft_config)
        if ref is None:
            continue
        reader_reason, layer_reason = deviation_reasons(
            model_index,
            ref,
            layer,
            means_parameter(model_index, ref, peft_config),
            saved_adapter.tuner,
        )
        if reason := reader_reason or layer_reason:
            problem = (
                f"a change of {layer.target_path!r} that PEFT applies in another way: {reason}"
            )
            problems.append(sentence(problem, "a change of the weight", "use PEFT for it"))
    raise_all(AdapterError, "This adapter is none of the weights", problems)
