"""Audio in: any wav, flac, ogg or mp3 becomes a float32 mono waveform at 16 kHz, and every fault becomes a ValueError.

A recording is a file or a member of an uncompressed tar; of either only the samples that are wanted are read.

Frames are the encoder's: 400-sample windows (25 ms) every 320 samples (20 ms), so frame t is centred on t * 20 + 12.5 ms.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile
import soxr

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from pretrain.manifest import Phone, Utterance

SAMPLE_RATE = 16000
MIN_SAMPLES = 400
HOP = 320

RATES = (1000, 768_000)  # Hz, of recordings that are read: resampling makes 16,000 samples of each one at 1 Hz

_BLOCK = 1 << 20  # native samples, of all channels, decoded at a time while probing: a day-long file needs no day-long array
_LARGEST_READ = 1 << 24  # the same, while loading: 17 minutes at 16 kHz
_DENSEST = 8192  # samples in a byte: more than flac's emptiest frames hold, 65,535 in 12 bytes, and those of Vorbis and Opus
_NO_LENGTH = 2**63 - 1  # frames that libsndfile tells of a flac whose writer could not go back to fill them in
_READ_AHEAD = 1 << 17  # bytes read from a tar at a time: half of ten seconds of flac
_HEADER = 1 << 14  # the same, for a header alone, of which flac's takes one such read, and mp3 and wav two or three
_UNKNOWN_SIZE = 0x7FFFFF00  # streamed WAVs carry a data size of (nearly) 2 or 4 GiB that means nothing


def num_frames(num_samples: int) -> int:
    """50 Hz frames of `num_samples` at 16 kHz: floor((n - 400) / 320) + 1, and 0 below 400 samples."""
    return (num_samples - MIN_SAMPLES) // HOP + 1 if num_samples >= MIN_SAMPLES else 0


class Member(NamedTuple):
    """Where a recording lies in an uncompressed tar, in bytes."""

    offset: int
    size: int


def load_audio(utterance: "Utterance", first: int = 0, count: int | None = None) -> np.ndarray:
    """Decode one utterance: float32, (utterance.length,), mono (channels averaged), 16 kHz; or `count` samples of it from `first`.

    Only these samples are read from a longer recording, except of one that must be resampled, where the whole utterance is. An
    unreadable, truncated or too short recording, another sample rate than the manifest recorded, and NaN or infinite samples are
    ValueErrors that name the file and the utterance.
    """
    rate, start, wanted, length = utterance.sample_rate, utterance.start, utterance.num_samples, utterance.length
    if rate == SAMPLE_RATE and count is not None:
        start, wanted, length = start + first, count, count
        first = 0
    try:
        with _open(utterance.path, utterance.member) as file:
            if file.samplerate != rate:
                raise ValueError(f"is at {file.samplerate} Hz where the manifest has {rate}; index it again")
            file.seek(min(start, file.frames))
            wave = _read(file, wanted)
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
    with _open(path, member, header_only=not decode) as file:
        rate, available = file.samplerate, file.frames
        start = round(min(offset_seconds, 1e9) * rate)  # beyond any recording, and short of what is no integer
        count = available - start
        if count < 0:
            raise ValueError(f"ends after {available / rate:.2f} s, before the segment's start at {offset_seconds:.2f} s")
        if duration_seconds is not None:
            num_samples = round(min(duration_seconds, 1e9) * rate)
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
def _open(path: str, member: Member | None, header_only: bool = False) -> Iterator[soundfile.SoundFile]:
    """Open for reading; the reasons for which a recording cannot be read or decoded, as short ValueErrors without its name."""
    if not os.path.isfile(path):
        raise ValueError("no such file")
    size = os.path.getsize(path)
    if (size if member is None else member.size) == 0:
        raise ValueError("is empty (0 bytes)")
    if member is not None and min(member) < 0:
        raise ValueError(f"lies nowhere in the tar: {member.size} bytes from {member.offset}")
    if member is not None and size < sum(member):
        raise ValueError(f"is truncated: {max(0, size - member.offset)} of {member.size} bytes are in the tar")
    try:
        source: AbstractContextManager[str | io.BufferedReader] = (
            nullcontext(path)
            if member is None
            else io.BufferedReader(_Window(path, member), _HEADER if header_only else _READ_AHEAD)
        )
        with source as opened, soundfile.SoundFile(opened) as file:
            # libsndfile quietly shortens a WAV whose data chunk promises more than the file holds; its log tells.
            cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
            if cut and int(cut[2]) < int(cut[1]) < _UNKNOWN_SIZE:
                raise ValueError(f"is truncated: {cut[2]} of {cut[1]} bytes of samples")
            _require_plausible(file, size if member is None else member.size)
            yield file
    except soundfile.LibsndfileError as error:
        detail = error.error_string.rstrip(".") or f"decoder error {error.code}"
        raise ValueError(f"cannot be decoded ({detail}): damaged, truncated or not audio") from None


def _require_plausible(file: soundfile.SoundFile, num_bytes: int) -> None:
    """Headers may claim anything, and every size that follows from them would be believed."""
    lowest, highest = RATES
    if not lowest <= file.samplerate <= highest:
        raise ValueError(f"is at {file.samplerate} Hz; {lowest} to {highest} are read")
    if file.frames == _NO_LENGTH:
        raise ValueError("does not say how long it is, as a flac that was written to a pipe; write it again to a file")
    if file.frames > _DENSEST * num_bytes:
        raise ValueError(f"has a header that claims {file.frames} samples, more than its {num_bytes} bytes can hold")


class _Window(io.RawIOBase):
    """A member of a tar as a file of its own: nothing before or behind it can be read."""

    def __init__(self, path: str, member: Member):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._member, self._position = member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._member.size)[whence])
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)[: max(0, self._member.size - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._member.offset + self._position)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read(file: soundfile.SoundFile, count: int) -> np.ndarray:
    """The next `count` samples, or as many as there are, as the mean of the channels, (samples,). What is not there takes no memory."""
    blocks, most, left = [], max(1, _LARGEST_READ // file.channels), count
    while left > 0:
        block = _read_block(file, min(most, left))
        blocks.append(block[:, 0] if file.channels == 1 else block.mean(axis=1))
        left = left - len(block) if len(block) == min(most, left) else 0
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros(0, np.float32), *blocks])


def _read_block(file: soundfile.SoundFile, count: int) -> np.ndarray:
    """Samples (count, channels) as float32, in [-1, 1) where they are stored as integers."""
    if file.subtype == "PCM_16":  # finite, and the same numbers as libsndfile's own floats, in half the time
        return np.multiply(file.read(count, dtype="int16", always_2d=True), np.float32(1 / 32768), dtype=np.float32)
    block: np.ndarray = file.read(count, dtype="float32", always_2d=True)
    _require_finite(block)
    return block


def _decode(file: soundfile.SoundFile, start: int, count: int) -> int:
    """Decode `count` samples from `start`, block by block; how many there were."""
    file.seek(start)
    done, most = 0, max(1, _BLOCK // file.channels)
    while len(block := file.read(min(most, count - done), dtype="float32")):
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
