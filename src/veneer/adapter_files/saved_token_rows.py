"""Save and load the trained rows of embeddings and heads for single tokens: their tensors and
config fields in PEFT's files, and the weight of a model that a file means.

PEFT puts the rows into the module that the file names. If this is the input embedding, PEFT puts
them into the modules that the model ties to it, too. If other code reads the weight, or if the
weight also has a low-rank change, PEFT would compute another result, so that the saved config makes
it refuse the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files import peft_deviations, peft_mapping
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.record import ranges_of
from veneer.adapter_files.tuner_folder import weight_lookup_of
from veneer.attach import Change, ModelIndex, adapters_of, changes
from veneer.bases import storage_of, weight_of
from veneer.distributed import base_class
from veneer.errors import AdapterError, nearest, raise_all, sentence
from veneer.formats import peft, peft_tokens
from veneer.layers import ParamRef, kind_for, kind_of, parameter_path


def _token_changes(model_index: ModelIndex, adapter_name: str) -> Iterator[tuple[str, str, Change]]:
    """(path of the module, name of the weight, change) for each weight with trained token rows."""
    for path, _, weight_name, change in changes(model_index.model, adapter_name):
        if change.tokens is not None:
            yield path, weight_name, change


def file_tensors(model_index: ModelIndex, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of the adapter's trained token rows, by their key in PEFT's file."""
    return {
        peft.tensor_key(module_path, peft_tokens.LORA_ROWS_SUFFIX): (
            peft_mapping.file_tensor(change.token_rows)
        )
        for module_path, _, change in _token_changes(model_index, adapter_name)
    }


def config_fields(model_index: ModelIndex, adapter_name: str) -> dict[str, Any]:
    """The fields of PEFT's config for the trained tokens: their ids by module path. If PEFT would
    compute another result than Veneer, there is also a ``peft_type`` with the reason, which makes
    PEFT refuse the config."""
    fields: dict[str, Any] = {}
    refs_by_id = model_index.refs_by_parameter_id()
    for path, weight_name, change in _token_changes(model_index, adapter_name):
        tokens: Any = change.tokens
        fields.setdefault(peft_tokens.INDICES_FIELD, {})[path] = tokens.tolist()
        reason = deviation_reason(model_index, (path, weight_name), refs_by_id)
        if change.rank:
            reason = "PEFT takes no low-rank change of a module of which it trains tokens"
        if reason is not None:
            fields["peft_type"] = f"{peft.NOT_FOR_PEFT}: {path!r}: {reason}"
    return fields


def deviation_reason(
    model_index: ModelIndex,
    ref: ParamRef,
    refs_by_id: Mapping[int, list[ParamRef]],
    trained_paths: Collection[str] = (),
) -> str | None:
    """Why PEFT computes another result than a model with the trained rows in its weight; None if it
    computes the same result.

    Args:
        ref: (module path, name) of the weight, whose module has trained tokens in PEFT's file.
        refs_by_id: (module path, name) for each module that holds a weight, by the weight's ``id``.
        trained_paths: the paths of further modules with trained tokens in the file.
    """
    refs = model_index.holders_of(ref, refs_by_id)
    for module_path, parameter_name in refs:
        module = model_index.modules[module_path]
        reason = peft_deviations.deviation_reason(model_index, (module_path, parameter_name), False)
        if reason is None and module._parameters.get("bias") is not None:
            reason = "PEFT leaves out the bias of a layer of which it trains tokens"
        if reason is not None:
            return reason
    if trains_one_name(model_index, ref, refs_by_id, trained_paths):
        return "PEFT trains the tokens of one of the modules that share this weight"
    return None


def trains_one_name(
    model_index: ModelIndex,
    ref: ParamRef,
    refs_by_id: Mapping[int, list[ParamRef]],
    trained_paths: Collection[str] = (),
) -> bool:
    """Whether PEFT leaves a module unchanged that shares the weight ``ref``.

    Args:
        ref: (module path, name) of the weight, whose module has trained tokens in PEFT's file.
        refs_by_id: (module path, name) for each module that holds a weight, by the weight's ``id``.
        trained_paths: the paths of further modules with trained tokens in the file.
    """
    refs = model_index.holders_of(ref, refs_by_id)
    changed_paths = {*trained_paths, ref[0]}
    input_embedding = getattr(model_index.model, "get_input_embeddings", lambda: None)()
    if model_index.modules[ref[0]] is input_embedding:
        changed_paths |= {*_paths_tied_to_input(model_index)}
    return any(path not in changed_paths for path, _ in refs)


def _paths_tied_to_input(model_index: ModelIndex) -> Iterator[str]:
    """The paths of the modules into which PEFT also puts the token rows of the input embedding: the
    output layer and the modules in ``_tied_weights_keys``, if the config ties word embeddings."""
    if (
        getattr(getattr(model_index.model, "config", None), "tie_word_embeddings", False)
        is not True
    ):
        return
    output_layer: Any = getattr(model_index.model, "get_output_embeddings", lambda: None)()
    yield from (path for path, module in model_index.modules.items() if module is output_layer)
    for parent_path, module in model_index.modules.items():
        tied_keys = getattr(module, "_tied_weights_keys", None)
        for key in {*tied_keys, *tied_keys.values()} if isinstance(tied_keys, Mapping) else ():
            path = parameter_path(parent_path, key).rpartition(".")[0]
            if path in model_index.canonical:
                yield model_index.canonical[path]


def first_ref_at(
    model_index: ModelIndex, module_path: str, refs_by_id: Mapping[int, list[ParamRef]]
) -> ParamRef | None:
    """(module path, name) under which the model first holds the weight of the module at
    ``module_path``, a path in PEFT's file. The module there may be another one if the weight is
    tied. None if the model has no such weight. ``refs_by_id``: (module path, name) for each module
    that holds a weight, by the weight's ``id``."""
    path = model_index.canonical.get(module_path)
    layer_kind = None if path is None else kind_of(model_index.modules[path])
    if (
        path is None
        or layer_kind is None
        or weight_of(model_index.modules[path], layer_kind.weight) is None
    ):
        return None
    return model_index.holders_of((path, layer_kind.weight), refs_by_id)[0]


def match_tokens(
    model_index: ModelIndex, adapter_files: AdapterFiles, problems: list[str], by_peft_rules: bool
) -> dict[ParamRef, peft_tokens.TokenRows]:
    """The trained token rows of a folder, by (module path, name) of the weight of the model that
    they belong to. For rows that do not fit the weight, ``problems`` gets an error text.

    Args:
        by_peft_rules: whether another library wrote the folder, so that rows are also refused if
            PEFT computes another result with them than a model with these rows in its weight.
    """
    refs_by_id = model_index.refs_by_parameter_id()
    rows_by_ref: dict[ParamRef, peft_tokens.TokenRows] = {}
    for module_path, token_rows in adapter_files.tokens.items():
        first_ref = first_ref_at(model_index, module_path, refs_by_id)
        if first_ref is None:
            problem = (
                f"trained tokens of {module_path!r}, which this model"
                f" lacks{nearest(module_path, model_index.modules)}"
            )
            problems.append(
                sentence(problem, "the same modules", "load it on the model that it was trained on")
            )
            continue
        size_problem = _size_problem(model_index, adapter_files, first_ref, token_rows)
        earlier_rows = rows_by_ref.get(first_ref)
        if earlier_rows is not None and (
            earlier_rows.ids != token_rows.ids
            or not torch.equal(earlier_rows.rows, token_rows.rows)
        ):
            problem = (
                f"two sets of trained tokens for {parameter_path(*first_ref)!r}, whose names share"
                " one weight"
            )
            problems.append(sentence(problem, "one", "untie the weights first"))
        elif size_problem is not None:
            problems += [size_problem] if earlier_rows is None else []
        elif by_peft_rules:
            ref, trained_paths = ref_of(model_index, module_path), {*adapter_files.tokens}
            reason = deviation_reason(model_index, ref, refs_by_id, trained_paths)
            if reason is not None:
                problem = (
                    f"trained tokens of {module_path!r} that PEFT applies in another way: {reason}"
                )
                advice = "use PEFT for it"
                if trains_one_name(model_index, ref, refs_by_id, trained_paths):
                    advice = "load it with veneer.load(…, untie=True)"
                problems.append(sentence(problem, "rows of a weight", advice))
        rows_by_ref[first_ref] = token_rows
    problems += _missing_rows(model_index, adapter_files, rows_by_ref, refs_by_id)
    return rows_by_ref


def ref_of(model_index: ModelIndex, module_path: str) -> ParamRef:
    """(first path of the module, name of its weight) for the module at a path in PEFT's file."""
    layer_kind: Any = kind_of(model_index.modules[model_index.canonical[module_path]])
    return model_index.canonical[module_path], layer_kind.weight


def _size_problem(
    model_index: ModelIndex,
    adapter_files: AdapterFiles,
    first_ref: ParamRef,
    token_rows: peft_tokens.TokenRows,
) -> str | None:
    """The error text if the trained rows do not fit the weight ``first_ref`` of the model, because
    it is not a matrix of an embedding or linear layer, or has another width or number of rows; None
    if they fit."""
    module = model_index.modules[first_ref[0]]
    weight = weight_of(module, first_ref[1])
    storage: Any = storage_of(weight)
    weight_path = parameter_path(*first_ref)
    shape = storage.shape(weight) if storage is not None else ()
    if len(shape) != 2 or kind_for(module, first_ref[1]).name not in (
        "embedding",
        "linear",
    ):
        problem = f"trained tokens of {weight_path!r}, a {base_class(module).__name__}"
        return sentence(
            problem, "an embedding or a linear head", "load it on the model that it was trained on"
        )
    if token_rows.rows.shape[1] != shape[1]:
        problem = f"trained rows of {token_rows.rows.shape[1]} numbers for {weight_path!r}"
        return sentence(
            problem, f"{shape[1]}, as its own have", "load it on the model that it was trained on"
        )
    expected_row_count = (
        adapter_files.metadata.get("changes", {})
        .get(weight_path, {})
        .get("of", max(shape[0], token_rows.ids[-1] + 1))
    )
    if expected_row_count == shape[0]:
        return None
    problem = (
        f"an adapter of {expected_row_count} rows of {weight_path!r}, which has {shape[0]} in this"
        " model"
    )
    if expected_row_count < shape[0]:
        return sentence(
            problem,
            "as many",
            "load it on its own base, or shrink this one: model.resize_token_embeddings",
        )
    advice = (
        f"call model.resize_token_embeddings({expected_row_count}) first, or pass grow=True to"
        " veneer.load (`veneer merge` grows)"
    )
    return sentence(problem, "a base whose vocabulary grew as that of the adapter did", advice)


def _missing_rows(
    model_index: ModelIndex,
    adapter_files: AdapterFiles,
    rows_by_ref: Mapping[ParamRef, Any],
    refs_by_id: Mapping[int, list[ParamRef]],
) -> Iterator[str]:
    """The error texts for modules for which PEFT's config lists trained tokens, but the file has no
    rows. ``rows_by_ref``: the file's rows by (module path, name) of the weight."""
    token_ids = adapter_files.peft_config.get(peft_tokens.INDICES_FIELD) or {}
    for path_ending in token_ids if isinstance(token_ids, Mapping) else ():
        first_refs = {
            first_ref_at(model_index, path, refs_by_id)
            for path, aliases in model_index.aliases.items()
            if any(alias.endswith(path_ending) for alias in aliases)
        }
        if not first_refs & rows_by_ref.keys():
            problem = (
                f"trained tokens of {path_ending!r} in {peft.CONFIG}, and no rows of them in"
                f" {peft.TENSORS}"
            )
            yield sentence(problem, "both", "get the whole folder again")


def differs_from_record(
    adapter_files: AdapterFiles, weight_path: str, token_rows: peft_tokens.TokenRows | None
) -> bool:
    """Whether the record lists other trained tokens of a weight than the tensor file holds.
    ``token_rows``: those in the file; None if it has none."""
    recorded_ranges = adapter_files.metadata.get("changes", {}).get(weight_path, {}).get("tokens")
    return recorded_ranges != (None if token_rows is None else ranges_of(token_rows.ids))


def vocabulary_size(adapter_files: AdapterFiles) -> int:
    """The number of rows that the embeddings with trained tokens had in training, by the record.
    Without a record, the smallest number of rows that includes all these tokens."""
    return max(
        [
            *(change.get("of", 0) for change in adapter_files.metadata.get("changes", {}).values()),
            *(token_rows.ids[-1] + 1 for token_rows in adapter_files.tokens.values()),
            0,
        ]
    )


def grown_row_count(model: nn.Module, adapter_files: AdapterFiles) -> int | None:
    """The number of rows to which the vocabulary of a model must grow for an adapter; None if it is
    large enough.

    Raises:
        AdapterError: the model cannot grow, or the adapter has no values for some of the new rows,
            which would then be random.
    """
    if not adapter_files.tokens:
        return None
    model_index, new_row_count, problems = ModelIndex(model), vocabulary_size(adapter_files), []
    embedding_layers: list[Any] = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    embeddings = {
        id(layer.weight): layer
        for layer in embedding_layers
        if layer is not None and getattr(layer, "weight", None) is not None
    }
    old_row_count = min((len(layer.weight) for layer in embeddings.values()), default=new_row_count)
    if old_row_count >= new_row_count:
        return None
    if adapters_of(model) is not None:
        problems.append(
            sentence("a model with adapters", "one that may still grow", "load this adapter first")
        )
    refs_by_id = model_index.refs_by_parameter_id()
    trained_ids = {
        first_ref_at(model_index, module_path, refs_by_id): token_rows.ids
        for module_path, token_rows in adapter_files.tokens.items()
    }
    for layer in embeddings.values():
        first_ref = refs_by_id[id(layer.weight)][0]
        untrained_ids = sorted(
            {*range(old_row_count, new_row_count)} - {*trained_ids.get(first_ref, ())}
        )
        # beside trained rows or factors, PEFT saves the base's weight, which is not loaded
        is_in_file = "weight" in adapter_files.full.get(first_ref[0], ())
        is_replaced = is_in_file and not (
            first_ref in trained_ids or first_ref[0] in adapter_files.low
        )
        if untrained_ids and not is_replaced:
            problem = (
                f"row {', '.join(map(str, untrained_ids[:4]))} of {parameter_path(*first_ref)!r}"
                " that grew and was never trained"
            )
            advice = (
                "save the base as it grew (save_pretrained), and load on that; or train these"
                " rows too"
            )
            problems.append(sentence(problem, "rows that the adapter holds", advice))
        path, advice = first_ref[0], "save the base as it grew (save_pretrained), and load on that"
        if getattr(layer, "bias", None) is not None and "bias" not in adapter_files.full.get(
            path, ()
        ):
            problem = (
                f"{parameter_path(path, 'bias')!r}, of which {new_row_count - old_row_count}"
                " numbers would be new and in no file"
            )
            expected = "an output layer without a bias, or with one that the adapter holds"
            problems.append(sentence(problem, expected, advice))
    raise_all(AdapterError, f"The base cannot grow for {adapter_files.path}", problems)
    return new_row_count


@contextmanager
def grow_vocabulary(model: Any, path: Any) -> Iterator[None]:
    """A context that first grows the vocabulary of a model to that of the base of the adapter in
    the folder ``path``, if it is smaller. If the block raises an error, the vocabulary shrinks to
    its old size. ``AdapterError``: the vocabulary cannot grow (see ``grown_row_count``)."""
    old_row_count, new_row_count = (
        None,
        grown_row_count(model, read(path, weight_lookup_of(ModelIndex(model)))),
    )
    if new_row_count is not None:
        old_row_count = len(model.get_input_embeddings().weight)
        model.resize_token_embeddings(new_row_count, mean_resizing=False)
    try:
        yield
    except BaseException:
        if old_row_count is not None:
            model.resize_token_embeddings(old_row_count, mean_resizing=False)
        raise
