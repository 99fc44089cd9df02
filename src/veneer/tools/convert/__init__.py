"""Convert adapters between the formats ``veneer``, ``peft``, ``kohya``, ``diffusers``, ``gguf`` and
``dense``.

    source --read--> an adapter folder in PEFT's layout --write--> out

A conversion raises one error with every reason if the target format cannot hold a change. Contents
that change no output and that the target cannot store are listed in the report. Conversions to
``peft``, ``kohya`` and ``diffusers`` copy the factors bit by bit; where a format scales by another
rule, alpha changes and the product stays.

``veneer`` stores fingerprints of the base and so needs the base. Reading and writing ``gguf`` and
reading ``kohya`` need the names of the base's weights. ``dense`` needs the weights themselves where
ΔW depends on them.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files import UnverifiedAdapter, folder, install_from, save
from veneer.adapter_files.derived_folder import write_derived
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
    """The report of a conversion."""

    path: Path  # the written folder or file
    source: str  # the format of the source
    to: str  # the format of ``path``
    ranks: Mapping[str, int]  # by the name of the changed weight
    full: tuple[str, ...]  # names of parameters that are trained in full
    left_out: tuple[str, ...]  # contents of the source that ``path`` lacks, with the reason
    # ‖ΔW - product‖ / ‖ΔW‖ of each dense change that became a product, by its name
    errors: Mapping[str, float]

    def __str__(self) -> str:
        lines = [
            f"{self.source} to {self.to}: {len(self.ranks)} layers,"
            f" {rank_range(self.ranks.values())}"
        ]
        lines += [f"in full: {listing(self.full)}"] if self.full else []
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines.append(f"relative error of a product {self.errors[worst]:.2g} at most ({worst})")
        lines += [f"left out: {reason}" for reason in self.left_out]
        return "\n".join([*lines, f"written to {self.path}"])


def convert(source: str | Path, out: str | Path, **options: Any) -> Path:
    """As ``conversion``, with the path alone as the result."""
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
        base: the base model, or an argument of ``models.load_base``. Where only names and shapes
            are needed, it may be on the meta device or the folder of a diffusers pipeline. It is
            not changed.
        dtype: "fp32", "bf16" or "fp16" for the tensors in ``out``; None keeps the source's, except
            that "veneer" stores 16-bit factors in float32, the dtype in which it trains them.
        part: the model of an image pipeline that the adapter changes, where its paths do not name
            it: "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", or
            "model" for names of LyCORIS.
        rank, energy, whole: how to store a dense change: as a product of this rank, as a product
            of the lowest rank that keeps this share of ‖ΔW‖², or as a parameter trained in full.
            By default: the lowest rank with an error of at most 1e-6 · ‖ΔW‖.
        verify_base: refuse a base that does not match the adapter's fingerprints.

    Warns:
        MisreadElsewhere: ``out`` is correct, but a common reader of its format misreads it.
        UnverifiedAdapter: without the model, Veneer cannot check that PEFT applies the changes to
            weights.

    Raises:
        AdapterError: the source cannot be read, or ``to`` cannot hold it (with every reason).
            Nothing was written.
        BaseMismatchError: the adapter was made for another base.
        ConfigError: no such format, type, part or base.
        OutputExistsError: ``out`` exists and ``overwrite`` is False.
    """
    source, out = Path(source), Path(out)
    target, source_format = FORMATS[to], detect(source)
    options = check_conversion_options(dtype, part, rank, energy, whole, source_format, to)
    must_not_exist(out, overwrite, folder=to == "veneer" or target.write is None)
    base_info = open_base(base)
    tuner = read_tuner_type(source) if source_format == "peft" else None
    if source_format == to and tuner is None:
        problem = f"{source}, which is of the format {to!r} already"
        raise AdapterError(problem, "another format", "copy it, or choose another format")
    if to == "veneer" and base_info.module is None:
        problem = "no base, whose fingerprints the folder is to hold"
        raise AdapterError(
            problem, "the base that the adapter was made for", 'give base, or choose "peft"'
        )
    with tempfile.TemporaryDirectory() as scratch:
        saved, contents, errors = read_source(
            source, source_format, Path(scratch) / "adapter", base_info, options, verify_base
        )
        left_out = [*contents.left_out, *list_losses(saved, to)]
        require_supported(saved, source_format, target, base_info)
        if saved.tuner is not None and to == "peft":
            lora_folder = write_derived(Path(scratch) / "plain", [saved], saved.low, saved.full)
            saved = folder.read(lora_folder)
        of_weights = not FORMATS[source_format].peft
        on_model = partial(_adapter_on_base, base_info, saved, verify_base, of_weights)
        if to == "veneer":
            provenance = {"converted from": source_format, **contents.metadata}
            changes = _write_veneer(saved, out, base_info.facts, on_model, provenance, overwrite)
        elif target.write is None:  # "peft", the only other format without a writer
            changes = _write_peft(saved, out, base_info.facts, options, overwrite)
        else:
            require_token_rows(saved, to, base_info.facts)
            changes = list_changes(saved, base_info.facts)
            adapter = build_adapter(saved, to, changes, base_info, on_model)
            changes = adapter.changes
            with new_file(out, overwrite=overwrite) as file:
                left_out += target.write(adapter, file, base_info.facts, options)
    ranks = {
        parameter_path(path, "weight"): len(tokens.ids) for path, tokens in saved.tokens.items()
    }
    ranks |= {change.weight: change.layer.rank for change in changes}
    full = tuple(
        parameter_path(path, name) for path, tensors in saved.full.items() for name in tensors
    )
    source_name = source_format if tuner is None else f"peft ({tuner})"
    return Conversion(out, source_name, to, ranks, full, tuple(left_out), errors)


def _write_veneer(
    saved: AdapterFiles,
    out: Path,
    facts: BaseFacts,
    on_model: Callable[[], AbstractContextManager[nn.Module]],
    provenance: Mapping[str, Any],
    overwrite: bool,
) -> tuple[LowRankChange, ...]:
    with on_model() as model:
        save(
            model,
            out,
            name=deltas.NAME,
            base_name=saved.peft_config.get("base_model_name_or_path") or facts.name,
            provenance={**provenance, **saved.metadata.get("provenance", {})},
            overwrite=overwrite,
        )
    # read again: on a base, some layers get another rank than in the source
    return list_changes(folder.read(out), facts)


def _write_peft(
    saved: AdapterFiles, out: Path, facts: BaseFacts, options: Options, overwrite: bool
) -> tuple[LowRankChange, ...]:
    tensors, _ = read_tensors(saved.path / peft.TENSORS)
    folder.write(
        out,
        {key: cast(tensor, options.dtype) for key, tensor in tensors.items()},
        saved.peft_config,
        base=None,
        changes=None,
        config=saved.config,
        provenance={},
        overwrite=overwrite,
        parameters={},
    )
    return list_changes(saved, facts)


@contextmanager
def _adapter_on_base(
    base: BaseInfo, saved: AdapterFiles, verify_base: bool, of_weights: bool
) -> Iterator[nn.Module]:
    """The base with the adapter installed. ``UnverifiedAdapter`` is not shown: the conversion
    warns where it matters."""
    assert base.module is not None
    model = base.module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedAdapter)
        install_from(
            model,
            saved.path,
            deltas.NAME,
            trainable=False,
            verify_base=verify_base,
            of_weights=of_weights,
            untie=False,
        )
    try:
        yield model
    finally:
        detach(model, deltas.NAME)


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
    """The options as the formats take them.

    Raises:
        ConfigError: an option has no such value, or neither format uses it.
        AdapterError: ``rank``, ``energy`` and ``whole`` contradict each other.
    """
    formats_with_parts = [name for name in FORMATS.names() if FORMATS[name].parts]
    unknown_dtype = dtype is not None and dtype not in DTYPES
    unknown_part = part is not None and part not in PARTS
    unused_part = part is not None and not {source_format, target_format} & set(formats_with_parts)
    fixed_dtype = dtype is not None and target_format == "veneer"
    unused_rank = source_format != "dense" and not (rank is None and energy is None and not whole)
    checks = [
        (unknown_dtype, f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}", "choose one"),
        (unknown_part, f"part {part!r}", f"one of {', '.join(PARTS)}", "choose one"),
        (
            unused_part,
            f"a part, from {source_format} to {target_format}",
            f"one for {listing(formats_with_parts)} alone",
            "leave it out",
        ),
        (
            fixed_dtype,
            f"dtype {dtype!r} for a veneer folder, which holds the numbers as they train",
            "none",
            'leave it out, or choose "peft"',
        ),
        (
            unused_rank,
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
        AdapterError: nothing exists at ``path``, or no format recognises it.
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
    keys, metadata = header.tensors, header.metadata
    for format_ in FORMATS:
        if format_.recognises(first_bytes, keys, metadata):
            return format_.name
    if any(key.startswith(peft.PREFIX) for key in keys):
        problem = f"{path}, the tensors of a PEFT folder without its {peft.CONFIG}"
        raise AdapterError(problem, "the folder", "name the folder that holds both")
    problem = f"{path} with keys such as {listing(sorted(keys), 2)}" if keys else f"{path}"
    raise AdapterError(problem, f"one of {', '.join(FORMATS.names())}", "check the file")


def _detect_folder(path: Path) -> str:
    tensors = path / peft.TENSORS
    if tensors.is_file():
        return "veneer" if "veneer" in read_header(tensors).metadata else "peft"
    files = sorted(path.iterdir())
    if pickles := [file.name for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]:
        problem = f"{listing(pickles, 2)} in {path}, a pickle, which runs code as it is opened"
        raise AdapterError(problem, peft.TENSORS, "save the adapter again as safetensors")
    single_files = [file.name for file in files if file.suffix in (".safetensors", ".gguf")]
    do = f"name the file, such as {path / single_files[0]}" if single_files else "check the path"
    raise AdapterError(
        f"no {peft.TENSORS} in the folder {path}", "an adapter folder, or a file", do
    )
