"""Convert adapters between the formats ``veneer``, ``peft``, ``kohya``, ``diffusers``, ``gguf`` and
``dense``.

    source --read--> an adapter folder in PEFT's layout --write--> out

If the target format cannot hold a change, the conversion raises one error with every reason.
Contents that the target cannot store but that do not affect the model's output are dropped, and the
report lists them. Conversions to ``peft``, ``kohya`` and ``diffusers`` copy the factors A and B bit
by bit, unless ``dtype`` is given. If the two formats compute the scale from alpha by different
rules, the conversion changes alpha, so that scale · B A stays equal.

A ``veneer`` folder stores fingerprints (hashes) of the base's weights, so writing it needs the
base. Reading and writing ``gguf`` and reading ``kohya`` need the names of the base's weights.
``dense`` needs the weights themselves if ΔW depends on them, as for DoRA.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files import UnverifiedAdapter, folder, install_from, save
from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.file_names import tokenizer_folder
from veneer.adapter_files.folder import AdapterFiles
from veneer.attach import detach
from veneer.errors import AdapterError, ConfigError, listing, raise_all, sentence
from veneer.fileio.atomic import must_not_exist, new_file
from veneer.fileio.untrusted import Header, read_header
from veneer.formats import FORMATS, BaseFacts, LowRankChange, MisreadElsewhere, Options, peft
from veneer.formats._base import cast, read_tensors
from veneer.formats.parts import PARTS
from veneer.layers import parameter_path
from veneer.tools.convert import deltas
from veneer.tools.convert.base_info import BaseInfo, open_base
from veneer.tools.convert.file_contents import build_adapter, list_changes
from veneer.tools.convert.source_folder import read_source, read_tuner_type
from veneer.tools.convert.target_support import list_losses, require_supported
from veneer.tools.convert.token_changes import require_token_rows
from veneer.tools.report_text import rank_range

__all__ = ["FORMATS", "Conversion", "MisreadElsewhere", "conversion", "convert", "detect"]


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion; ``str(conversion)`` is readable text."""

    path: Path  # the written folder or file
    source: str  # the format of the source
    to: str  # the format of ``path``
    ranks: Mapping[str, int]  # the rank of each change, by the name of the changed weight
    full: tuple[str, ...]  # names of parameters that are trained in full
    left_out: tuple[str, ...]  # what the source holds and ``path`` lacks, with the reason
    # ‖ΔW − B A‖ / ‖ΔW‖ of each dense change that was factored into B A, by the weight's name
    errors: Mapping[str, float]

    def __str__(self) -> str:
        lines = [
            f"{self.source} to {self.to}: {len(self.ranks)} layers,"
            f" {rank_range(self.ranks.values())}"
        ]
        lines += [f"in full: {listing(self.full)}"] if self.full else []
        if self.errors:
            worst_weight = max(self.errors, key=self.errors.__getitem__)
            worst_error = f"{self.errors[worst_weight]:.2g}"
            lines.append(f"relative error of a product {worst_error} at most ({worst_weight})")
        lines += [f"left out: {reason}" for reason in self.left_out]
        return "\n".join([*lines, f"written to {self.path}"])


def convert(source: str | Path, out: str | Path, **options: Any) -> Path:
    """Call ``conversion`` with these arguments, and return the path of the written adapter."""
    return conversion(source, out, **options).path


def conversion(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    base: nn.Module | str | Path | None = None,
    dtype: str | None = None,
    part: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    whole: bool = False,
    overwrite: bool = False,
    verify_base: bool = True,
) -> Conversion:
    """Write the adapter ``source`` to ``out`` in the format ``to``.

    Args:
        source: an adapter folder or file of any format (see ``detect``).
        to: "veneer", "peft", "kohya", "diffusers", "gguf" or "dense".
        base: the base model, or an argument of ``models.load_base``. A conversion that needs only
            names and shapes also takes a model on the meta device or the folder of a diffusers
            pipeline. The model is not changed.
        dtype: "fp32", "bf16" or "fp16": the dtype of the tensors in ``out``. None keeps the
            source's dtype, except that "veneer" stores 16-bit factors in float32, the dtype in
            which Veneer trains them.
        part: the model of an image pipeline that the adapter changes, if the paths in the source do
            not name it: "unet", "transformer", "text_encoder", "text_encoder_2",
            "text_encoder_3", or "model" for LyCORIS names.
        rank, energy, whole: how to store a dense change: ``rank`` as a product of this rank,
            ``energy`` as a product of the lowest rank that keeps this share of ‖ΔW‖², ``whole`` as
            a parameter trained in full. Default: a product of the lowest rank with an error of at
            most 1e-6 · ‖ΔW‖.
        verify_base: whether to refuse a base that does not match the adapter's fingerprints.

    Warns:
        MisreadElsewhere: ``out`` is correct, but a common reader of its format misreads it.
        UnverifiedAdapter: ``base`` is missing, so that Veneer cannot check whether PEFT's result
            equals that of a changed weight.

    Raises:
        AdapterError: the source cannot be read, or ``to`` cannot hold it (with every reason).
            Nothing is written.
        BaseMismatchError: the adapter was made for another base.
        ConfigError: the format, dtype, part or base does not exist, or these two formats do not use
            an option.
        OutputExistsError: ``out`` exists and ``overwrite`` is False.
    """
    source, out = Path(source), Path(out)
    target, source_format = FORMATS[to], detect(source)
    options = check_conversion_options(dtype, part, rank, energy, whole, source_format, to)
    must_not_exist(out, overwrite, is_folder=to == "veneer" or target.write is None)
    base_info = open_base(base)
    tuner_type = read_tuner_type(source) if source_format == "peft" else None
    if source_format == to and tuner_type is None:
        problem = f"{source}, which is of the format {to!r} already"
        raise AdapterError(problem, "another format", "copy it, or choose another format")
    if to == "veneer" and base_info.load_model is None:
        problem = "no base, whose fingerprints the folder is to hold"
        raise AdapterError(
            problem, "the base that the adapter was made for", 'give base, or choose "peft"'
        )
    with tempfile.TemporaryDirectory() as temp_dir:
        saved_adapter, contents, errors = read_source(
            source, source_format, Path(temp_dir) / "adapter", base_info, options, verify_base
        )
        left_out = [*contents.left_out, *list_losses(saved_adapter, to)]
        require_supported(saved_adapter, source_format, target, base_info)
        if saved_adapter.tuner is not None and to == "peft":
            saved_adapter = folder.read(
                write_derived(
                    Path(temp_dir) / "plain", [saved_adapter], saved_adapter.low, saved_adapter.full
                )
            )
        weights_only = not FORMATS[source_format].peft
        adapted_base = partial(_adapted_base, base_info, saved_adapter, verify_base, weights_only)
        if to == "veneer":
            provenance = {"converted from": source_format, **contents.metadata}
            changes = _write_veneer(
                saved_adapter, out, base_info.facts, adapted_base, provenance, overwrite
            )
        elif target.write is None:  # "peft": all formats but this and "veneer" have a writer
            changes = _write_peft(saved_adapter, out, base_info.facts, options, overwrite)
        else:
            require_token_rows(saved_adapter, to, base_info.facts)
            changes = list_changes(saved_adapter, base_info.facts)
            adapter = build_adapter(saved_adapter, to, changes, base_info, adapted_base)
            changes = adapter.changes
            with new_file(out, overwrite=overwrite) as file_path:
                left_out += target.write(adapter, file_path, base_info.facts, options)
    ranks, full_names = _list_ranks(saved_adapter, changes), _list_full_names(saved_adapter)
    source_name = source_format if tuner_type is None else f"peft ({tuner_type})"
    return Conversion(out, source_name, to, ranks, full_names, tuple(left_out), errors)


def _list_ranks(saved_adapter: AdapterFiles, changes: Iterable[LowRankChange]) -> dict[str, int]:
    """The rank of each low-rank change, by the path of its weight. A weight with trained token rows
    and no low-rank change is listed with the number of these rows, which bounds its rank."""
    token_counts = {
        parameter_path(path, "weight"): len(trained_tokens.ids)
        for path, trained_tokens in saved_adapter.tokens.items()
    }
    return token_counts | {change.weight: change.layer.rank for change in changes}


def _list_full_names(saved_adapter: AdapterFiles) -> tuple[str, ...]:
    """The paths of the parameters that the adapter trains in full."""
    return tuple(
        parameter_path(path, name)
        for path, tensors in saved_adapter.full.items()
        for name in tensors
    )


def _write_veneer(
    saved_adapter: AdapterFiles,
    out: Path,
    base_facts: BaseFacts,
    adapted_base: Callable[[], AbstractContextManager[nn.Module]],
    provenance: Mapping[str, Any],
    overwrite: bool,
) -> tuple[LowRankChange, ...]:
    with adapted_base() as model:
        save(
            model,
            out,
            name=deltas.ADAPTER_NAME,
            base_name=saved_adapter.peft_config.get("base_model_name_or_path") or base_facts.name,
            provenance={**provenance, **saved_adapter.metadata.get("provenance", {})},
            overwrite=overwrite,
            tokenizer=tokenizer_folder(saved_adapter.path),
        )
    # the changes are read from the written folder, because their ranks may differ from the source's
    return list_changes(folder.read(out), base_facts)


def _write_peft(
    saved_adapter: AdapterFiles, out: Path, base_facts: BaseFacts, options: Options, overwrite: bool
) -> tuple[LowRankChange, ...]:
    tensors, _ = read_tensors(saved_adapter.path / peft.TENSORS)
    folder.write(
        out,
        {key: cast(tensor, options.dtype) for key, tensor in tensors.items()},
        saved_adapter.peft_config,
        base=None,
        changes=None,
        config=saved_adapter.config,
        provenance={},
        overwrite=overwrite,
        parameters={},
        tokenizer=tokenizer_folder(saved_adapter.path),
    )
    return list_changes(saved_adapter, base_facts)


@contextmanager
def _adapted_base(
    base_info: BaseInfo, saved_adapter: AdapterFiles, verify_base: bool, weights_only: bool
) -> Iterator[nn.Module]:
    """A context whose value is the base with the adapter installed on it; afterwards the adapter is
    detached. ``weights_only``: whether every change in the source is a change of a weight, rather
    than of a module's output. ``BaseMismatchError``: ``verify_base`` is True, and the adapter was
    made for another base. The warning ``UnverifiedAdapter`` is suppressed here, because
    ``require_supported`` gives it if the result of the conversion depends on it."""
    assert base_info.load_model is not None
    model = base_info.load_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedAdapter)
        install_from(
            model,
            saved_adapter.path,
            deltas.ADAPTER_NAME,
            trainable=False,
            verify_base=verify_base,
            of_weights=weights_only,
            untie=False,
        )
    try:
        yield model
    finally:
        detach(model, deltas.ADAPTER_NAME)


#: dtypes by the names that the option ``dtype`` accepts
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_conversion_options(
    dtype: str | None,
    part: str | None,
    rank: int | None,
    energy: float | None,
    whole: bool,
    source_format: str,
    target_format: str,
) -> Options:
    """The checked options of a conversion, as its readers and writers take them.

    Raises:
        ConfigError: an option has an invalid value, or the formats do not use it.
        AdapterError: more than one of ``rank``, ``energy`` and ``whole`` is given, or ``rank`` or
            ``energy`` has an invalid value.
    """
    formats_with_parts = [name for name in FORMATS.names() if FORMATS[name].parts]
    checks = [
        (
            dtype is not None and dtype not in DTYPES,
            f"dtype {dtype!r}",
            f"one of {', '.join(DTYPES)}",
            "choose one",
        ),
        (
            part is not None and part not in PARTS,
            f"part {part!r}",
            f"one of {', '.join(PARTS)}",
            "choose one",
        ),
        (
            part is not None and not {source_format, target_format} & {*formats_with_parts},
            f"a part, from {source_format} to {target_format}",
            f"one for {listing(formats_with_parts)} alone",
            "leave it out",
        ),
        (
            dtype is not None and target_format == "veneer",
            f"dtype {dtype!r} for a veneer folder, which holds the numbers as they train",
            "none",
            'leave it out, or choose "peft"',
        ),
        (
            source_format != "dense" and (rank is not None or energy is not None or whole),
            f"rank, energy or whole for a {source_format} adapter",
            "them for dense changes alone",
            "leave them out",
        ),
    ]
    problems = [sentence(*error_texts) for failed, *error_texts in checks if failed]
    raise_all(ConfigError, "These options cannot be used", problems)
    deltas.check_rank_options(rank, energy, whole)
    return Options(None if dtype is None else DTYPES[dtype], part, rank, energy, whole)


def detect(path: str | Path) -> str:
    """The format of the adapter at ``path``: "veneer", "peft", "kohya", "diffusers", "gguf" or
    "dense".

    Raises:
        AdapterError: nothing exists at ``path``, no format recognises it, or it holds a pickle.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    if not path.is_file():
        raise AdapterError(f"nothing at {path}", "an adapter", "check the path")
    with path.open("rb") as stream:
        first_bytes = stream.read(16)
    # a safetensors file begins with the length of its header in 8 bytes, then the header's JSON
    is_safetensors = first_bytes[8:9] == b"{"
    if not is_safetensors and first_bytes.startswith((b"PK", b"\x80")):
        problem = f"{path}, a pickle, which runs code as it is opened"
        raise AdapterError(problem, "safetensors or GGUF", "get the adapter as safetensors")
    header = read_header(path) if is_safetensors else Header({}, {}, 0)
    tensor_keys, metadata = header.tensors, header.metadata
    for format_ in FORMATS:
        if format_.recognises(first_bytes, tensor_keys, metadata):
            return format_.name
    if any(key.startswith(peft.PREFIX) for key in tensor_keys):
        problem = f"{path}, the tensors of a PEFT folder without its {peft.CONFIG}"
        raise AdapterError(problem, "the folder", "name the folder that holds both")
    problem = (
        f"{path} with keys such as {listing(sorted(tensor_keys), 2)}" if tensor_keys else str(path)
    )
    raise AdapterError(problem, f"one of {', '.join(FORMATS.names())}", "check the file")


def _detect_folder(path: Path) -> str:
    tensor_path = path / peft.TENSORS
    if tensor_path.is_file():
        return "veneer" if "veneer" in read_header(tensor_path).metadata else "peft"
    file_paths = sorted(path.iterdir())
    if pickle_names := [
        file_path.name
        for file_path in file_paths
        if file_path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    ]:
        problem = f"{listing(pickle_names, 2)} in {path}, a pickle, which runs code as it is opened"
        raise AdapterError(problem, peft.TENSORS, "save the adapter again as safetensors")
    file_names = [
        file_path.name for file_path in file_paths if file_path.suffix in (".safetensors", ".gguf")
    ]
    fix = f"name the file, such as {path / file_names[0]}" if file_names else "check the path"
    raise AdapterError(
        f"no {peft.TENSORS} in the folder {path}", "an adapter folder, or a file", fix
    )
