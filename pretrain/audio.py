"""Audio in: any wav, flac, ogg or mp3 becomes a float32 mono waveform at 16 kHz, and every fault becomes a ValueError.

Frames are the encoder's: 400-sample windows (25 ms) every 320 samples (20 ms), so frame t is centred on t * 20 + 12.5 ms.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

if TYPE_CHECKING:
    from pretrain.manifest import Phone, Utterance

SAMPLE_RATE = 16000
MIN_SAMPLES = 400
HOP = 320

_BLOCK = 1 << 20  # native samples decoded at a time while probing, so that a day-long file needs no day-long array
_UNKNOWN_SIZE = 0x7FFFFF00  # streamed WAVs carry a data size of (nearly) 2 or 4 GiB that means nothing


def num_frames(num_samples: int) -> int:
    """50 Hz frames of `num_samples` at 16 kHz: floor((n - 400) / 320) + 1, and 0 below 400 samples."""
    return (num_samples - MIN_SAMPLES) // HOP + 1 if num_samples >= MIN_SAMPLES else 0


def load_audio(utterance: "Utterance") -> np.ndarray:
    """Decode one utterance: float32, (utterance.length,), mono (channels averaged), 16 kHz.

    Only the utterance's own samples are read from a longer file. An unreadable, truncated or too short file, another sample
    rate than the manifest recorded, and NaN or infinite samples are ValueErrors that name the file.
    """
    path, wanted = utterance.path, utterance.num_samples
    try:
        with _open(path) as file:
            if file.samplerate != utterance.sample_rate:
                raise ValueError(f"is at {file.samplerate} Hz where the manifest has {utterance.sample_rate}; index it again")
            file.seek(min(utterance.start, file.frames))
            wave = file.read(wanted, dtype="float32", always_2d=True)
        _require_samples(len(wave), wanted, utterance.sample_rate)
        _require_finite(wave)
        wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
        if utterance.sample_rate != SAMPLE_RATE:
            wave = soxr.resample(wave, utterance.sample_rate, SAMPLE_RATE)
        if utterance.length < MIN_SAMPLES:
            raise ValueError(_too_short(utterance.length))
    except ValueError as error:
        raise ValueError(f"{path} (utterance {utterance.id!r}): {error}") from None
    # Resamplers round to the nearest sample, and compressed formats may end a few samples early: make the length exact.
    wave = wave[: utterance.length]
    return np.ascontiguousarray(np.pad(wave, (0, utterance.length - len(wave))))


def probe_audio(
    path: str,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    num_samples: int | None = None,
    decode: bool = True,
) -> tuple[int, int, int]:
    """Examine a recording or a segment of it: (start, num_samples, sample_rate), in native samples.

    `duration_seconds` cuts a segment; `num_samples` is what a list claims that the whole file has. With `decode` every sample
    is decoded and checked (in blocks); without it, only the header is read. What is wrong is the message of a ValueError.
    """
    with _open(path) as file:
        rate, available = file.samplerate, file.frames
        start = round(offset_seconds * rate)
        count = available - start
        if count < 0:
            raise ValueError(f"ends after {available / rate:.2f} s, before the segment's start at {offset_seconds:.2f} s")
        if duration_seconds is not None:
            num_samples = round(duration_seconds * rate)
            _require_samples(count, num_samples, rate)
            count = min(count, num_samples)
        elif num_samples is not None:
            _require_samples(count, num_samples, rate)
        if decode and count:
            decoded = _decode(file, start, count)
            _require_samples(decoded, count, rate)
            count = decoded
    if count == 0:
        raise ValueError("holds no samples")
    length = count * SAMPLE_RATE // rate
    if length < MIN_SAMPLES:
        raise ValueError(_too_short(length))
    return start, count, rate


def phone_frames(phones: "Sequence[Phone]", num_frames: int) -> np.ndarray:
    """The phone at the centre of each frame's window, (num_frames,) of str, "" where there is none.

    `phones` are (start, end, phone) in seconds, in order and without overlap; a phone covers start <= t < end.
    """
    if not phones:
        return np.full(num_frames, "")
    starts, ends, names = (np.array(column) for column in zip(*phones, strict=True))
    centres = (np.arange(num_frames) * HOP + MIN_SAMPLES // 2) / SAMPLE_RATE
    last = np.searchsorted(starts, centres, side="right") - 1  # the last phone that has begun; -1 before the first
    return np.where((last >= 0) & (centres < ends[last]), names[last], "")


@contextmanager
def _open(path: str) -> Iterator[soundfile.SoundFile]:
    """Open for reading; the reasons for which a file cannot be read or decoded, as short ValueErrors without its name."""
    if not os.path.isfile(path):
        raise ValueError("no such file")
    if os.path.getsize(path) == 0:
        raise ValueError("is empty (0 bytes)")
    try:
        with soundfile.SoundFile(path) as file:
            # libsndfile quietly shortens a WAV whose data chunk promises more than the file holds; its log tells.
            cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
            if cut and int(cut[2]) < int(cut[1]) < _UNKNOWN_SIZE:
                raise ValueError(f"is truncated: {cut[2]} of {cut[1]} bytes of samples")
            yield file
    except soundfile.LibsndfileError as error:
        detail = error.error_string.rstrip(".") or f"decoder error {error.code}"
        raise ValueError(f"cannot be decoded ({detail}): damaged, truncated or not audio") from None


def _decode(file: soundfile.SoundFile, start: int, count: int) -> int:
    """Decode `count` samples from `start`, block by block; how many there were."""
    file.seek(start)
    done = 0
    while len(block := file.read(min(_BLOCK, count - done), dtype="float32")):
        _require_finite(block)
        done += len(block)
    return done


def _require_samples(found: int, wanted: int, sample_rate: int) -> None:
    """At most 10 ms may be missing: rounded durations and codec delays do that, and more is a broken file."""
    if (wanted - found) * 100 > sample_rate:
        raise ValueError(f"is truncated: {found} of {wanted} samples")


def _require_finite(wave: np.ndarray) -> None:
    if not np.isfinite(wave).all():
        raise ValueError("holds NaN or infinite samples")


def _too_short(length: int) -> str:
    return f"is too short: {length} samples at 16 kHz, and a frame needs {MIN_SAMPLES}"
