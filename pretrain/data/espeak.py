"""espeak-ng through its C library, which the package `espeakng-loader` brings: sentences in; samples, phone
and word times out."""

import ctypes
import re
import shutil
import tempfile
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

# espeak's IPA marks stress and length, and has a few allophones that English does not tell apart: both are
# folded. What remains are 47 phones and "sil"; vowels before /r/ (ɑɹ ɔɹ ɛɹ ɪɹ), syllabic l (əl) and the flap
# (ɾ) are phones of their own.
SILENCE = "sil"
_PUNCTUATION = '.,;:!?"()'
_FOLD = str.maketrans({"ˈ": None, "ˌ": None, "ː": None, "ᵻ": "ɪ", "ɐ": "ə"})


class _Value(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Value),
    )


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
_PHONEME, _SYNCHRONOUS, _UTF8 = 7, 2, 1
_OPTIONS = 0x8003  # phoneme events, in IPA; return errors instead of exiting
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4


class PhoneEvent(NamedTuple):
    """When a phone begins, its IPA ("" is a pause) and where its word begins in the sentence, in characters
    from 0."""

    seconds: float
    name: str
    position: int


class Spoken(NamedTuple):
    """A sentence, said: float32 samples at `sample_rate`; phones and words as (start, end, name) in seconds,
    in order.

    The phones cover all samples; a word lasts from its first phone to the end of its last.
    """

    wave: np.ndarray
    phones: list[tuple[float, float, str]]
    words: list[tuple[float, float, str]]


class Espeak:
    """One speaker. `voice` is "language+variant", the rate is in words a minute, pitch and its range go from
    0 to 99.

    espeak-ng carries state (flutter, noise) in globals from one sentence to the next, so every speaker loads
    a copy of the library of its own: what it says then depends on its arguments and on what it has said
    before, and on nothing else.
    """

    def __init__(self, voice: str, rate: int, pitch: int, pitch_range: int, seed: int):
        library, data = library_paths()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self._library = ctypes.CDLL(shutil.copy(library, folder))
        self.sample_rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _OPTIONS)
        if self.sample_rate <= 0:
            raise ValueError(
                f"espeak-ng could not start with its data in {data}; install espeakng-loader again"
            )
        self._voice = voice
        self._settings = {_RATE: rate, _VOLUME: 60, _PITCH: pitch, _RANGE: pitch_range}
        self._samples: list[bytes] = []
        self._events: list[PhoneEvent] = []
        self._callback = _CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)
        # Its own generator, and the C library's, which its Klatt voices draw their breath from.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._library.srand(ctypes.c_uint(seed))

    def say(self, sentence: str) -> Spoken:
        self._samples, self._events = [], []
        if self._library.espeak_SetVoiceByName(self._voice.encode()):
            raise ValueError(f"{self._voice!r}: espeak-ng has no such voice; the usual language is 'en-us'")
        for parameter, value in self._settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        text = sentence.encode()
        assert self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8, None, None) == 0
        wave = np.frombuffer(b"".join(self._samples), np.int16).astype(np.float32) / 32768
        duration = len(wave) / self.sample_rate
        return Spoken(wave, true_phones(self._events, duration), true_words(sentence, self._events, duration))

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self._samples.append(ctypes.string_at(samples, 2 * count))
        index = 0
        while events[index].type:
            event = events[index]
            if event.type == _PHONEME:
                name = event.id.string.decode(errors="ignore")
                self._events.append(PhoneEvent(event.audio_position / 1000, name, event.text_position - 1))
            index += 1
        return 0


def true_phones(events: list[PhoneEvent], duration_seconds: float) -> list[tuple[float, float, str]]:
    """Phones from espeak's events: each lasts until the next, the last to the end.

    espeak dates a stop from its release, so the closure before it counts to the phone before it.
    """
    marks = [(0.0, ""), *((event.seconds, event.name) for event in events), (duration_seconds, "")]
    phones: list[tuple[float, float, str]] = []
    for (start, name), (following, _) in pairwise(marks):
        end = min(following, duration_seconds)
        phone = name.translate(_FOLD) or SILENCE
        if end <= start:
            continue
        if phones and phone == SILENCE == phones[-1][2]:
            start = phones.pop()[0]
        phones.append((round(start, 4), round(end, 4), phone))
    return phones


def true_words(
    sentence: str, events: list[PhoneEvent], duration_seconds: float
) -> list[tuple[float, float, str]]:
    """Words (what spaces part, without punctuation around them) from espeak's events: each lasts as long as
    its phones.

    espeak speaks some neighbours, such as "with the", as one word and does not say where the second begins:
    they share the phones in proportion to their letters.
    """
    words = [
        (match.start(), word)
        for match in re.finditer(r"\S+", sentence)
        if (word := match[0].strip(_PUNCTUATION))
    ]
    starts = np.array([start for start, _ in words])
    spans: list[list[tuple[float, float]]] = [[] for _ in words]  # of each word's phones
    for event, following in pairwise([*events, PhoneEvent(duration_seconds, "", len(sentence))]):
        end = min(following.seconds, duration_seconds)
        if event.name.translate(_FOLD) and event.seconds < end:
            spans[int(np.searchsorted(starts, event.position, side="right")) - 1].append((event.seconds, end))
    spoken = [word for word in range(len(words)) if spans[word]]
    for first, last in pairwise([*spoken, len(words)]):
        letters = np.cumsum([len(word) for _, word in words[first:last]])
        ends = [round(len(spans[first]) * share) for share in letters / letters[-1]]
        together = spans[first]
        for number, (start, end) in enumerate(pairwise([0, *ends]), start=first):
            spans[number] = together[start:end]
    return [
        (round(span[0][0], 4), round(span[-1][1], 4), name)
        for span, (_, name) in zip(spans, words, strict=True)
        if span
    ]


def library_paths() -> tuple[str, str]:
    """The library and its data. Not installed: a ValueError with the remedy."""
    try:
        import espeakng_loader
    except ImportError:
        raise ValueError("synthetic speech needs espeakng-loader; pip install '.[demo]'") from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
