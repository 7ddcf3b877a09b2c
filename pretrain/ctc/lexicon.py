"""What beam search is guided by: n-gram language models, and lexicons that say how words are spelled in a
vocabulary.

Language models are ARPA files (also .gz) and KenLM binaries, read by KenLM inside of flashlight-text.
Lexicons have fairseq's and flashlight's format, a line a spelling: `word<TAB>w o r d |`.
"""

import gzip
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from pretrain.ctc.text import SPACE, TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.store.plain_text import LONGEST_MARK, UTF_8_MARK, decode_line, raw_lines, wide_encoding

UNKNOWN = "<unk>"
MARKERS = ("<s>", "</s>", UNKNOWN)  # entries of an ARPA that are no words
LINE = "a line is `word<TAB>w o r d |`"
KENLM_MAGIC = b"mmap lm http://kheafield.com/code"


class Entry(NamedTuple):
    """One spelling of a word: `word` as the language model knows it, `text` as it is written, `classes` (n,)
    int64 without the space."""

    word: str
    text: str
    classes: np.ndarray


@dataclass(frozen=True)
class Lexicon:
    """Spellings, and how many words were left out because the vocabulary cannot spell them, the first of them
    by name."""

    entries: list[Entry]
    source: str
    num_left_out: int = 0
    examples: list[str] = field(default_factory=list)


def read_lexicon(path: str, vocabulary: Vocabulary, text: TextConfig) -> Lexicon:
    """The lexicon of a file. Words that cannot be spelled are left out; a malformed line, or a file without
    one to use, is an error."""

    def lines() -> Iterator[tuple[str, str, list[str]]]:
        with _opened(path, "lexicon") as file:
            for number, line in enumerate(file, start=1):
                parts = _parts(line)
                if len(parts) == 1:
                    raise ValueError(
                        f"decoding.lexicon: {path}, line {number}: {line.strip()[:80]!r} has no spelling; "
                        f"{LINE}"
                    )
                if not parts:
                    continue
                word, *symbols = parts
                yield (
                    word,
                    text.normalize(word),
                    symbols[:-1] if symbols[-1] == SPACE and len(symbols) > 1 else symbols,
                )

    numbers = {symbol: number for number, symbol in enumerate(vocabulary.symbols, start=1)}

    def spell(symbols: list[str]) -> np.ndarray | None:
        if vocabulary.spelling in (
            "characters",
            "jamo",
        ):  # as a transcript would be: the case and form of the lexicon do not matter
            return spelled("".join(symbols), vocabulary, text)
        return (
            np.array([numbers[s] for s in symbols], np.int64) if all(s in numbers for s in symbols) else None
        )

    return _lexicon(((word, written, spell(symbols)) for word, written, symbols in lines()), path, vocabulary)


def lexicon_of(words: Iterable[str], source: str, vocabulary: Vocabulary, text: TextConfig) -> Lexicon:
    """Words, such as those of a language model, spelled as transcripts are."""
    if vocabulary.spelling == "phones":
        raise ValueError(
            f"decoding: {source} knows words and the recogniser writes phones; give a `lexicon` that spells "
            "words in phones"
        )
    return _lexicon(
        ((word, text.normalize(word), spelled(word, vocabulary, text)) for word in words), source, vocabulary
    )


def spelled(word: str, vocabulary: Vocabulary, text: TextConfig) -> np.ndarray | None:
    """The classes of a word, normalised; None where the vocabulary lacks a part of it, or nothing is left."""
    normal = text.normalize(word)
    return vocabulary.encode(normal) if normal and not vocabulary.unknown(normal) else None


def _lexicon(
    lines: Iterable[tuple[str, str, np.ndarray | None]], source: str, vocabulary: Vocabulary
) -> Lexicon:
    entries: list[Entry] = []
    left_out: dict[str, None] = {}
    for word, written, classes in lines:
        if classes is None or not len(classes) or not written:
            left_out[word] = None
        else:
            entries.append(Entry(word, written, classes))
    if not entries:
        shown = ", ".join(map(repr, list(left_out)[:5])) or "none at all"
        raise ValueError(
            f"{source}: none of its {len(left_out)} words can be spelled in the recogniser's vocabulary "
            f"({' '.join(vocabulary.symbols[:40])}); words there are {shown}"
        )
    return Lexicon(entries, source, len(left_out), list(left_out)[:5])


def _parts(line: str) -> list[str]:
    # not at every white space of Unicode, which may be in words
    return [part for part in re.split("[ \t\r\n]+", line) if part]


def is_binary(path: str) -> bool:
    """Whether a language model is KenLM's binary, whose words cannot be listed. A missing file is an
    error."""
    _require_file(path, "lm", "an ARPA file, .arpa.gz or a KenLM binary")
    with open(path, "rb") as file:
        return file.read(len(KENLM_MAGIC)) == KENLM_MAGIC


def arpa_words(path: str) -> list[str]:
    """The words of an ARPA file in its order, without <s>, </s> and <unk>."""
    words: list[str] = []
    inside = False
    with _opened(path, "lm") as file:
        for line in file:
            parts = _parts(line)
            if line.startswith("\\"):
                if inside:
                    return words
                inside = parts == ["\\1-grams:"]
            elif inside and parts:
                if len(parts) not in (2, 3):
                    raise ValueError(
                        f"decoding.lm: {path} has {line[:80]!r} among its 1-grams; it is no ARPA file"
                    )
                if parts[1] not in MARKERS:
                    words.append(parts[1])
    end = "ends among its 1-grams" if inside else "has no \\1-grams:"
    raise ValueError(f"decoding.lm: {path} {end}; it is no ARPA file, or not all of one, nor a KenLM binary")


def _require_file(path: str, key: str, wanted: str) -> None:
    if not Path(path).is_file():
        raise ValueError(
            f"decoding.{key}: {path} {'is a folder' if Path(path).is_dir() else 'does not exist'}; it should "
            f"be {wanted}"
        )


@contextmanager
def _opened(path: str, key: str) -> Iterator[Iterator[str]]:
    """The lines of a text file, gzipped or not; what cannot be read is an error that names it."""
    _require_file(path, key, "a text file, gzipped or not")
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            start = file.read(LONGEST_MARK)
            if key == "lm" and (start.startswith(UTF_8_MARK) or wide_encoding(start)):
                raise ValueError(
                    f"decoding.lm: {path} begins with a byte-order mark, which KenLM does not read; write it "
                    "again without, as UTF-8"
                )
            file.seek(0)
            origin = f"decoding.{key}: {path}"
            numbered = enumerate(raw_lines(cast(BinaryIO, file), origin), start=1)
            yield (decode_line(raw, f"{origin} line {number}") for number, raw in numbered)
    except (EOFError, gzip.BadGzipFile, OSError, zlib.error) as error:
        raise ValueError(
            f"decoding.{key}: {path} cannot be read ({error}); it is damaged or something else"
        ) from None


class LanguageModel:
    """An n-gram model over `words`, a number for each; scores are log10, as in ARPA files and in published
    `lm_weight`s."""

    def __init__(self, path: str, words: list[str]):
        try:
            from flashlight.lib.text.decoder.kenlm import KenLM
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError:
            raise ValueError(MISSING_LIBRARY) from None
        self.path, self.words = path, words
        self.unknown = len(words)
        with tempfile.TemporaryFile() as said:
            try:
                with _standard_error_to(said.fileno()):  # a bar of its progress, otherwise
                    self.kenlm: Any = KenLM(path, Dictionary([*words, UNKNOWN]))
            except (
                RuntimeError,
                UnicodeDecodeError,
            ) as error:  # the latter: a message that quotes bytes of the file
                reason = (
                    "it is no text"
                    if isinstance(error, UnicodeDecodeError)
                    else str(error).split("\n", 1)[-1].strip()
                )
                raise ValueError(
                    f"decoding.lm: {path} is no language model that KenLM reads ({reason})"
                ) from None

    def start(self) -> Any:
        return self.kenlm.start(False)

    def unigrams(self) -> np.ndarray:
        """log10 of the probability of each word (words,) at the beginning of a sentence."""
        start = self.start()
        return np.array([self.kenlm.score(start, number)[1] for number in range(len(self.words))], np.float64)

    def knows(self) -> np.ndarray:
        """Which words are in the model, (words,) bool: those with another score than <unk> (equal by chance
        in very small models)."""
        return self.unigrams() != self.kenlm.score(self.start(), self.unknown)[1]

    def score(self, numbers: Iterable[int]) -> float:
        """log10 of the probability of a whole sentence of word numbers, its end included."""
        state, total = self.start(), 0.0
        for number in numbers:
            state, score = self.kenlm.score(state, number)
            total += score
        return total + float(self.kenlm.finish(state)[1])


MISSING_LIBRARY = (
    "decoding: beam search needs flashlight-text; pip install 'wordless[lm]', or in a checkout '.[lm]'"
)


@contextmanager
def _standard_error_to(descriptor: int) -> Iterator[None]:
    """What C++ writes to standard error goes to another file meanwhile."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
