"""Read the image or audio of a row, given as a file or as numbers.

image   a path, or nested lists [height][width] or [height][width][channels] of numbers from 0 to
        255 (a form that transformers' image processors take)
audio   a path to a .wav file, numbers from -1 to 1, or {"array": […], "sampling_rate": 16000}
"""

from __future__ import annotations

import hashlib
import wave
from pathlib import Path
from typing import Any

import numpy as np

from veneer.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def read_image(value: Any, location: str, folder: Path) -> np.ndarray:
    """The image as an array [height, width, 3] of numbers from 0 to 255.

    Args:
        location: the row, for errors.
        folder: the folder that relative paths start from.

    Raises:
        DataError: the value is no image.
    """
    if isinstance(value, str):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(folder / Path(value).expanduser()) as image:
                return np.array(image.convert("RGB"))  # a writable copy, as torch expects
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(
                f"{location}: no image at {value} ({error})", "an image file", "check the path"
            ) from error
    try:
        pixels = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        pixels = np.zeros(0)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or not pixels.size:
        raise DataError(
            f"{location}: an image of shape {pixels.shape}",
            "[h][w], [h][w][1] or [h][w][3], or the path of a file",
            "fix or remove that row",
        )
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(
            f"{location}: an image of {pixels.min()} to {pixels.max()}",
            "numbers of 0 to 255",
            "scale them, or remove that row",
        )
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8)


def list_labelled_images(folder: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Read the images of the files folder/LABEL/FILE, sorted by name.

    Returns:
        ([(location, {"image": path, "label": label})], a hash of the names and contents).
    """
    images = [
        (
            f"{label_folder.name}/{file.name}",
            {"image": str(file.resolve()), "label": label_folder.name},
        )
        for label_folder in sorted(folder.iterdir())
        if label_folder.is_dir()
        for file in sorted(label_folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not images:
        raise DataError(
            f"no image in {folder}", "a folder for each label, with images in it", "check the path"
        )
    digest = hashlib.sha256()
    for location, row in images:
        digest.update(location.encode() + hashlib.sha256(Path(row["image"]).read_bytes()).digest())
    return images, digest.hexdigest()


def read_audio(value: Any, location: str, folder: Path, rate: int) -> np.ndarray:
    """The audio as an array [samples] of numbers from -1 to 1. Raises `DataError` unless it has
    `rate` samples a second."""
    if isinstance(value, str):
        samples, recorded_rate = _read_wav(folder / Path(value).expanduser(), location)
    else:
        audio = value if isinstance(value, dict) else {"array": value}
        recorded_rate = audio.get("sampling_rate") or rate
        try:
            samples = np.asarray(audio.get("array"), dtype=np.float32)
        except (TypeError, ValueError):
            samples = np.zeros((0, 0))
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise DataError(
            f"{location}: audio of shape {samples.shape}",
            "one channel of finite numbers, or the path of a .wav file",
            "fix or remove that row",
        )
    if recorded_rate != rate:
        raise DataError(
            f"{location}: audio of {recorded_rate} samples a second",
            f"{rate}, as the base hears",
            f"resample it, such as ffmpeg -i in.wav -ar {rate} out.wav",
        )
    return samples


def _read_wav(path: Path, location: str) -> tuple[np.ndarray, int]:
    """(samples from -1 to 1, the mean of all channels; samples a second) of a 16-bit .wav file."""
    try:
        with wave.open(str(path)) as file:
            sample_bytes = file.getsampwidth()
            channels = file.getnchannels()
            rate = file.getframerate()
            frames = file.readframes(file.getnframes())
    except (OSError, wave.Error, EOFError) as error:
        raise DataError(
            f"{location}: no sound at {path} ({error})", "a .wav file of PCM", "check the path"
        ) from error
    if sample_bytes != 2:
        raise DataError(
            f"{location}: {path} with {8 * sample_bytes} bits a sample",
            "16 bits",
            "convert it to 16-bit PCM",
        )
    samples = np.frombuffer(frames, dtype="<i2").astype(np.float32) / 32768
    return samples.reshape(-1, channels).mean(axis=1), rate
