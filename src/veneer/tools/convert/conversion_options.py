"""Check the options of a conversion against the source format and the target format."""

from __future__ import annotations

import torch

from veneer.errors import ConfigError, listing, raise_all, sentence
from veneer.formats import FORMATS, Options
from veneer.formats.parts import PARTS
from veneer.tools.convert import deltas

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
