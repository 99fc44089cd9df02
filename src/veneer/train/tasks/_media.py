"""Read the image or the audio of a data row, which holds it as the path of a file or as numbers.

image   a path, an image of PIL, or nested lists [height][width] or [height][width][channels] of
        numbers from 0 to 255 (a form that transformers' image processors take)
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


def read_image(value: Any, row_location: str, folder: Path) -> np.ndarray:
    """The image as a uint8 array [height, width, 3].

    Args:
        value: the path of an image file, an image of PIL in any mode, as the data sets of the hub
            hold it, or nested lists of numbers from 0 to 255.
        row_location: where the row is in the data, for errors.
        folder: the folder that relative paths start from.

    Raises:
        DataError: there is no readable image at the path, or the lists are no image.
    """
    if isinstance(value, str):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(folder / Path(value).expanduser()) as image:
                # copied, because torch expects a writable array
                return np.array(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(
                f"{row_location}: no image at {value} ({error})", "an image file", "check the path"
            ) from error
    if hasattr(value, "convert"):  # an image of PIL, such as one of palette indices
        return np.array(value.convert("RGB"))
    try:
        pixels = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        pixels = np.zeros(0)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or not pixels.size:
        raise DataError(
            f"{row_location}: an image of shape {pixels.shape}",
            "[h][w], [h][w][1] or [h][w][3], or the path of a file",
            "fix or remove that row",
        )
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(
            f"{row_location}: an image of {pixels.min()} to {pixels.max()}",
            "numbers of 0 to 255",
            "scale them, or remove that row",
        )
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8)


def list_labelled_images(folder: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """List the images at the paths folder/LABEL/FILE as rows, sorted by path. Raises `DataError` if
    there are none.

    Returns:
        ([("LABEL/FILE", {"image": absolute path, "label": LABEL})], the SHA-256 of the paths and
        contents in hexadecimal digits).
    """
    located_rows = [
        (
            f"{label_folder.name}/{image_path.name}",
            {"image": str(image_path.resolve()), "label": label_folder.name},
        )
        for label_folder in sorted(folder.iterdir())
        if label_folder.is_dir()
        for image_path in sorted(label_folder.iterdir())
        if image_path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not located_rows:
        raise DataError(
            f"no image in {folder}", "a folder for each label, with images in it", "check the path"
        )
    digest = hashlib.sha256()
    for location, row in located_rows:
        digest.update(location.encode() + hashlib.sha256(Path(row["image"]).read_bytes()).digest())
    return located_rows, digest.hexdigest()


def read_audio(value: Any, row_location: str, folder: Path, sample_rate: int) -> np.ndarray:
    """The audio as a float32 array [samples]. Samples of a .wav file are from -1 to 1.

    Args:
        value: the path of a .wav file, the samples, or {"array": samples, "sampling_rate": number}.
        row_location: where the row is in the data, for errors.
        folder: the folder that relative paths start from.
        sample_rate: the required number of samples a second. Audio without a rate is taken to have
            this one.

    Raises:
        DataError: the file cannot be read, the samples are not a list of finite numbers, or the
            sample rate is another.
    """
    if isinstance(value, str):
        samples, recorded_rate = _read_wav(folder / Path(value).expanduser(), row_location)
    else:
        audio_fields = value if isinstance(value, dict) else {"array": value}
        recorded_rate = audio_fields.get("sampling_rate") or sample_rate
        try:
            samples = np.asarray(audio_fields.get("array"), dtype=np.float32)
        except (TypeError, ValueError):
            samples = np.zeros((0, 0))
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise DataError(
            f"{row_location}: audio of shape {samples.shape}",
            "one channel of finite numbers, or the path of a .wav file",
            "fix or remove that row",
        )
    if recorded_rate != sample_rate:
        raise DataError(
            f"{row_location}: audio of {recorded_rate} samples a second",
            f"{sample_rate}, as the base hears",
            f"resample it, such as ffmpeg -i in.wav -ar {sample_rate} out.wav",
        )
    return samples


def _read_wav(path: Path, row_location: str) -> tuple[np.ndarray, int]:
    """Read a 16-bit .wav file: (float32 samples from -1 to 1, averaged over the channels; number of
    samples a second). Raises `DataError` for any other file."""
    try:
        with wave.open(str(path)) as wav_file:
            sample_bytes = wav_file.getsampwidth()
            channel_count = wav_file.getnchannels()
            recorded_rate = wav_file.getframerate()
            frame_bytes = wav_file.readframes(wav_file.getnframes())
    except (OSError, wave.Error, EOFError) as error:
        raise DataError(
            f"{row_location}: no sound at {path} ({error})", "a .wav file of PCM", "check the path"
        ) from error
    if sample_bytes != 2:
        raise DataError(
            f"{row_location}: {path} with {8 * sample_bytes} bits a sample",
            "16 bits",
            "convert it to 16-bit PCM",
        )
    samples = np.frombuffer(frame_bytes, dtype="<i2").astype(np.float32) / 32768
    return samples.reshape(-1, channel_count).mean(axis=1), recorded_rate
