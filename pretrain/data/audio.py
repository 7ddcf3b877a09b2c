"""Recordings to waveforms: float32, mono, 16 kHz. Every fault of a recording is a ValueError.

A recording is a file or a member of an uncompressed tar. Only the samples of the utterance are read.
"""

import numpy as np
import soxr

from pretrain.data.decoding.recordings import open_recording
from pretrain.data.decoding.spans import Member
from pretrain.data.utterance import MIN_SAMPLES, SAMPLE_RATE, Utterance

_BLOCK = 1 << 20  # native samples of all channels, decoded at a time while probing
_LARGEST_READ = 1 << 24  # the same, while loading: 17 minutes at 16 kHz


def load_audio(utterance: Utterance, first: int = 0, count: int | None = None) -> np.ndarray:
    """Decode one utterance: float32, (utterance.length,), mono (channels averaged), 16 kHz; or `count`
    samples of it from `first`.

    Only these samples are read from a longer recording, except of one that must be resampled, where the whole
    utterance is. An unreadable, truncated or too short recording, another sample rate than the manifest
    recorded, and NaN or infinite samples are ValueErrors that name the file and the utterance.
    """
    rate, start = utterance.sample_rate, utterance.start
    wanted, length = utterance.num_samples, utterance.length
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
    # Resamplers round to the nearest sample, and compressed formats may end a few samples early: make the
    # length exact.
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

    `duration_seconds` cuts a segment; `num_samples` is what a list claims that the whole file has; `member`
    is where the recording lies in a tar at `path`. With `decode` every sample is decoded and checked (in
    blocks); without it, only the header is read. What is wrong is the message of a ValueError.
    """
    with open_recording(path, member, header_only=not decode) as recording:
        rate, available = recording.sample_rate, recording.num_samples
        start = round(min(offset_seconds, 1e9) * rate)  # beyond any recording, and still an integer
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


def _require_samples(found: int, wanted: int, sample_rate: int) -> None:
    """At most 10 ms may be missing: rounded durations and codec delays do that, and more is a broken file."""
    if (wanted - found) * 100 > sample_rate:
        raise ValueError(f"is truncated: {found} of {wanted} samples")


def _too_short(length: int) -> str:
    return f"is too short: {length} samples at 16 kHz, and a frame needs {MIN_SAMPLES}"
