"""fairseq2's C++ reader and decoder in place of soundfile's calls: files are mapped, and decoded without holding Python's lock.

For whole wav and flac recordings at 16 kHz, in files or tars. Everything else, and whatever does not come out exactly as the manifest says, goes to
`pretrain.data.audio.load_audio`, which reads parts, resamples, and tells what is wrong: fairseq2 takes a wav that was cut short, or
one that holds NaN, as it comes.
"""

import threading
from typing import Any

import numpy as np
import torch
from fairseq2.data.audio import AudioDecoder
from fairseq2.data.data_pipeline import FileMapper

from pretrain.data.audio import MIN_SAMPLES, SAMPLE_RATE, load_audio
from pretrain.data.manifest import Utterance

_OPEN_FILES = 100  # mapped at a time, as in fairseq2's recipes
# libsndfile's numbers of how samples are coded: integers of 8 to 32 bits (also flac's), and float32. The lossy ones come out of another
# version of their decoder, which fairseq2 may be linked with, with other last bits.
_SUBTYPE, _EXACT, _FLOAT = 0xFFFF, range(1, 7), 6


class _Reader(threading.local):
    """A mapper for each thread: what it says of its cache of files does not include several of them."""

    def __init__(self) -> None:
        self.map: Any = FileMapper(cached_fd_count=_OPEN_FILES)
        self.decode: Any = AudioDecoder(dtype=torch.float32)


_reader = _Reader()


def load_whole(utterance: Utterance) -> np.ndarray:
    """`load_audio` of a whole utterance: the same samples to the bit, and the same errors."""
    wave = None
    if utterance.start == 0 and utterance.sample_rate == SAMPLE_RATE and utterance.length >= MIN_SAMPLES:
        wave = _decoded(utterance)
    return load_audio(utterance) if wave is None else wave


def _decoded(utterance: Utterance) -> np.ndarray | None:
    """(utterance.length,) float32; None for what fairseq2 cannot read, or reads as something else than the manifest has."""
    member = utterance.member
    if ":" in utterance.path:  # where fairseq2 would look for an offset
        return None
    name = utterance.path if member is None else f"{utterance.path}:{member.offset}:{member.size}"
    try:
        audio = _reader.decode(_reader.map(name)["data"])
    except (RuntimeError, ValueError):
        return None
    wave: np.ndarray = audio["waveform"].numpy()  # (samples,) or (samples, channels)
    if audio["sample_rate"] != SAMPLE_RATE or len(wave) != utterance.length:
        return None
    if (coded := audio["format"] & _SUBTYPE) not in _EXACT or (
        coded == _FLOAT and not np.isfinite(wave).all()
    ):
        return None
    return wave if wave.ndim == 1 else wave.mean(axis=1)
