"""Audio in: any recording that libsndfile decodes becomes a float32 mono waveform at 16 kHz, and every fault becomes a ValueError.

A recording is a file or a member of an uncompressed tar; of either only the samples that are wanted are read.

Frames are the encoder's: 400-sample windows (25 ms) every 320 samples (20 ms), so frame t is centred on t * 20 + 12.5 ms.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import soxr

from pretrain.data.decoding.recordings import open_recording
from pretrain.data.decoding.spans import Member as Member

if TYPE_CHECKING:
    from pretrain.data.manifest import Phone, Utterance

SAMPLE_RATE = 16000
MIN_SAMPLES = 400
HOP = 320

_BLOCK = (
    1 << 20
)  # native samples, of all channels, decoded at a time while probing: a day-long file needs no day-long array
_LARGEST_READ = 1 << 24  # the same, while loading: 17 minutes at 16 kHz


def num_frames(num_samples: int) -> int:
    """50 Hz frames of `num_samples` at 16 kHz: floor((n - 400) / 320) + 1, and 0 below 400 samples."""
    return (num_samples - MIN_SAMPLES) // HOP + 1 if num_samples >= MIN_SAMPLES else 0


def load_audio(utterance: "Utterance", first: int = 0, count: int | None = None) -> np.ndarray:
    """Decode one utterance: float32, (utterance.length,), mono (channels averaged), 16 kHz; or `count` samples of it from `first`.

    Only these samples are read from a longer recording, except of one that must be resampled, where the whole utterance is. An
    unreadable, truncated or too short recording, another sample rate than the manifest recorded, and NaN or infinite samples are
    ValueErrors that name the file and the utterance.
    """
    rate, start, wanted, length = (
        utterance.sample_rate,
        utterance.start,
        utterance.num_samples,
        utterance.length,
    )
    if rate == SAMPLE_RATE and count is not None:
        start, wanted, length = start + first, count, count
        first = 0
    try:
        with open_recording(utterance.path, utterance.member, needed=start + wanted) as recording:
            if recording.sample_rate != rate:
                raise ValueError(
                    f"is at {recording.sample_rate} Hz where the manifest has {rate}; index it again"
                )
            blocks = recording.blocks(start, wanted, _LARGEST_READ)
            waves = [block[:, 0] if recording.channels == 1 else block.mean(axis=1) for block in blocks]
        wave = waves[0] if len(waves) == 1 else np.concatenate([np.zeros(0, np.float32), *waves])
        _require_samples(len(wave), wanted, rate)
        if rate != SAMPLE_RATE:
            wave = soxr.resample(wave, rate, SAMPLE_RATE)
        if utterance.length < MIN_SAMPLES:
            raise ValueError(_too_short(utterance.length))
    except ValueError as error:
        raise ValueError(f"{utterance.path} (utterance {utterance.id!r}): {error}") from None
    # Resamplers round to the nearest sample, and compressed formats may end a few samples early: make the length exact.
    if len(wave) < length:
        wave = np.pad(wave, (0, length - len(wave)))
    return np.ascontiguousarray(wave[:length] if count is None else wave[first : first + count])


def probe_audio(
    path: str,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    num_samples: int | None = None,
    decode: bool = True,
    member: Member | None = None,
) -> tuple[int, int, int]:
    """Examine a recording or a segment of it: (start, num_samples, sample_rate), in native samples.

    `duration_seconds` cuts a segment; `num_samples` is what a list claims that the whole file has; `member` is where the recording
    lies in a tar at `path`. With `decode` every sample is decoded and checked (in blocks); without it, only the header is read.
    What is wrong is the message of a ValueError.
    """
    with open_recording(path, member, header_only=not decode) as recording:
        rate, available = recording.sample_rate, recording.num_samples
        start = round(
            min(offset_seconds, 1e9) * rate
        )  # beyond any recording, and short of what is no integer
        count = available - start
        if count < 0:
            raise ValueError(
                f"ends after {available / rate:.2f} s, before the segment's start at {offset_seconds:.2f} s"
            )
        if duration_seconds is not None:
            num_samples = round(min(duration_seconds, 1e9) * rate)
            _require_samples(count, num_samples, rate)
            count = min(count, num_samples)
        elif num_samples is not None:
            _require_samples(count, num_samples, rate)
        if decode and count:
            decoded = sum(map(len, recording.blocks(start, count, _BLOCK)))
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
    last = (
        np.searchsorted(starts, centres, side="right") - 1
    )  # the last phone that has begun; -1 before the first
    return np.where((last >= 0) & (centres < ends[last]), names[last], "")


def _require_samples(found: int, wanted: int, sample_rate: int) -> None:
    """At most 10 ms may be missing: rounded durations and codec delays do that, and more is a broken file."""
    if (wanted - found) * 100 > sample_rate:
        raise ValueError(f"is truncated: {found} of {wanted} samples")


def _too_short(length: int) -> str:
    return f"is too short: {length} samples at 16 kHz, and a frame needs {MIN_SAMPLES}"
