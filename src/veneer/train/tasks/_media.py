"""Images and sounds of a row: a file, or the numbers themselves.

image   a path, or rows of numbers [h][w] or [h][w][c], 0 to 255 (as transformers' processors take them)
audio   a path to a .wav file, numbers of -1 to 1, or {"array": […], "sampling_rate": 16000}
"""

from __future__ import annotations

import hashlib
import wave
from pathlib import Path
from typing import Any

import numpy as np

from veneer.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def image_of(value: Any, where: str, folder: Path) -> np.ndarray:
    """[h, w, 3] in 0 to 255. `folder`: what a relative path begins at."""
    if isinstance(value, str):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(folder / Path(value).expanduser()) as image:
                return np.array(image.convert("RGB"))  # which torch may write to
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(
                f"{where}: no image at {value} ({error})", "an image file", "check the path"
            ) from error
    try:
        pixels = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        pixels = np.zeros(0)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or not pixels.size:
        problem = f"{where}: an image of shape {pixels.shape}"
        raise DataError(
            problem,
            "[h][w], [h][w][1] or [h][w][3], or the path of a file",
            "fix or remove that row",
        )
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        problem = f"{where}: an image of {pixels.min()} to {pixels.max()}"
        raise DataError(problem, "numbers of 0 to 255", "scale them, or remove that row")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8)


def folder_of_images(folder: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """([(place, {"image", "label"})] of folder/LABEL/FILE in the order of their names, a hash of it
    all)."""
    found = [
        (f"{sub.name}/{file.name}", {"image": str(file.resolve()), "label": sub.name})
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
        for file in sorted(sub.iterdir())
        if file.suffix.lower() in IMAGES
    ]
    if not found:
        raise DataError(
            f"no image in {folder}", "a folder for each label, with images in it", "check the path"
        )
    whole = hashlib.sha256()
    for place, row in found:
        whole.update(place.encode() + hashlib.sha256(Path(row["image"]).read_bytes()).digest())
    return found, whole.hexdigest()


def sound_of(value: Any, where: str, folder: Path, rate: int) -> np.ndarray:
    """[samples] in -1 to 1, at `rate` samples a second."""
    own = rate
    if isinstance(value, str):
        samples, own = _wav(folder / Path(value).expanduser(), where)
    else:
        table = value if isinstance(value, dict) else {"array": value}
        own = table.get("sampling_rate") or rate
        try:
            samples = np.asarray(table.get("array"), dtype=np.float32)
        except (TypeError, ValueError):
            samples = np.zeros((0, 0))
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        problem = f"{where}: audio of shape {samples.shape}"
        raise DataError(
            problem,
            "one channel of finite numbers, or the path of a .wav file",
            "fix or remove that row",
        )
    if own != rate:
        problem = f"{where}: audio of {own} samples a second"
        raise DataError(
            problem,
            f"{rate}, as the base hears",
            f"resample it, such as ffmpeg -i in.wav -ar {rate} out.wav",
        )
    return samples


def _wav(path: Path, where: str) -> tuple[np.ndarray, int]:
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, wave.Error, EOFError) as error:
        raise DataError(
            f"{where}: no sound at {path} ({error})", "a .wav file of PCM", "check the path"
        ) from error
    if width != 2:
        raise DataError(
            f"{where}: {path} with {8 * width} bits a sample", "16 bits", "convert it to 16-bit PCM"
        )
    samples = np.frombuffer(content, dtype="<i2").astype(np.float32) / 32768
    return samples.reshape(-1, channels).mean(axis=1), rate
