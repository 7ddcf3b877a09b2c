"""The classes of a recogniser: class 0 is CTC's blank, class n the symbol n - 1.

What a symbol is depends on the spelling. `characters`: a Unicode code point of NFC text, so that a Korean
syllable is one symbol, and a Devanagari vowel sign, an Arabic vowel mark or the joiner inside an emoji is one
too. `jamo`: the same with Hangul syllables taken apart into the two or three letters they are written with
(Unicode's conjoining jamo, first, middle and last ones apart). `phones`: a phone. `tokenizer`: a piece. Any
sequence of classes can be decoded, whether or not it is a word of anything; of `encode` it is the inverse.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.ctc.text import SPACE, Spelling, TextConfig
from pretrain.store.plain_text import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLANK = 0


class Vocabulary:
    """Symbols that texts are spelled in; spaces between words are the symbol `|`. With phones there are none,
    each is a word.

    `tokenizer` is the JSON of a Hugging Face tokenizer, whose pieces, in its order and without special
    tokens, are the symbols.

    >>> vocabulary = Vocabulary(["a", "b", "|"])
    >>> vocabulary.encode("ab b"), vocabulary.decode([1, 2, 3, 2]), vocabulary.words([1, 2, 3, 2])
    (array([1, 2, 3, 2]), 'ab b', [('ab', 0, 2), ('b', 3, 4)])
    """

    def __init__(
        self, symbols: Sequence[str], spelling: Spelling = "characters", tokenizer: str | None = None
    ):
        assert (spelling == "tokenizer") == (tokenizer is not None)
        self.symbols, self.spelling, self.tokenizer = list(symbols), spelling, tokenizer
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols, start=1)}
        self._lost: dict[str, bool] = {}  # of the tokenizer's characters

    @classmethod
    def of(cls, targets: Iterable[str], text: TextConfig) -> "Vocabulary":
        """Every symbol of `targets` (of `text.target`), sorted; with a tokenizer its pieces, whatever the
        targets."""
        if text.tokenizer is not None:
            return cls.of_tokenizer(text.tokenizer)
        symbols: set[str] = set()
        for target in targets:
            symbols.update(target.split(" ") if text.spelling == "phones" else target)
        if text.spelling == "phones":
            return cls(sorted(symbols - {""}), text.spelling)
        return cls(sorted(_as_symbols(symbols, text.spelling)), text.spelling)

    @classmethod
    def given(cls, characters: str, text: TextConfig) -> "Vocabulary":
        """The characters of a string, or phones with spaces between, each once, in their order.

        ValueError for none, for one that `text` never leaves in a transcript, and for a tokenizer, which
        brings its own.
        """
        if text.spelling == "tokenizer":
            raise ValueError("characters: the tokenizer's pieces are the vocabulary; drop `characters`")
        phones = text.spelling == "phones"
        characters = unicodedata.normalize("NFC", characters)
        symbols = (
            characters.split()
            if phones
            else list(" ".join(f"-{characters}-".replace(SPACE, " ").split())[1:-1])
        )
        if not symbols:
            raise ValueError("characters: is empty; leave it out to take those of the transcripts")
        if phones:
            if silences := sorted(set(symbols) & set(text.silence)):
                raise ValueError(f"characters: {silences} are among text.silence, so no targets")
            return cls(list(dict.fromkeys(symbols)), text.spelling)
        # Between letters that no case or accent changes into something else.
        lost = sorted({c for c in symbols if c != " " and c not in text.normalize(f"q{c}q")})
        if lost:
            raise ValueError(
                f"characters: {lost} are in no transcript after text.case = {text.case!r} and "
                f"text.punctuation = {text.punctuation!r}; drop them or change these"
            )
        return cls(_as_symbols(symbols, text.spelling), text.spelling)

    @classmethod
    def of_tokenizer(cls, path: str | Path) -> "Vocabulary":
        """The pieces of a tokenizer.json. Special tokens, and the one for what is unknown, are no classes."""
        try:
            tree = json.loads(read_text(path))
            tree |= {"truncation": None, "padding": None}  # neither may touch a transcript
            definition = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
            pieces = _pieces(_tokenizer(definition), tree)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such tokenizer; give a Hugging Face tokenizer.json") from None
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
        if not pieces:
            raise ValueError(f"{path}: has no pieces but special tokens")
        return cls(pieces, "tokenizer", definition)

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Vocabulary":
        return cls(meta["symbols"], meta["spelling"], meta.get("tokenizer"))

    def to_meta(self) -> dict[str, Any]:
        """What a run's meta.json keeps of it: all of it, the tokenizer too."""
        return {"symbols": self.symbols, "spelling": self.spelling, "tokenizer": self.tokenizer}

    def __len__(self) -> int:
        """Classes, the blank among them."""
        return len(self.symbols) + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_meta() == other.to_meta()

    __hash__ = None  # type: ignore[assignment]

    @property
    def space(self) -> int | None:
        """The class between words; None where there is none (phones, tokenizers)."""
        return self._numbers.get(SPACE) if self.spelling in ("characters", "jamo") else None

    def unknown(self, text: str) -> set[str]:
        """What in a normalised text cannot be spelled: characters or phones, or with a tokenizer stretches of
        the text."""
        if self.spelling == "tokenizer":
            return self._unknown_to_tokenizer(text)
        return {
            " " if symbol == SPACE else symbol for symbol in set(self._split(text)) - self._numbers.keys()
        }

    def encode(self, text: str) -> np.ndarray:
        """A normalised text as classes (n,) int64; KeyError for what is `unknown`."""
        if self.spelling == "tokenizer":
            classes = self._classes[self._pieces.encode(text, add_special_tokens=False).ids]
            if not classes.all():
                raise KeyError(text)
            return classes
        return np.array([*map(self._numbers.__getitem__, self._split(text))], dtype=np.int64)

    def decode(self, classes: Iterable[int]) -> str:
        """Classes without blanks and repeats back to a text, NFC with single spaces; the inverse of
        `encode`."""
        if self.spelling == "tokenizer":
            text = self._pieces.decode(
                [self._ids[number - 1] for number in classes], skip_special_tokens=False
            )
        elif self.spelling == "phones":
            return " ".join(self.symbols[number - 1] for number in classes)
        else:
            text = "".join(self.symbols[number - 1] for number in classes).replace(SPACE, " ")
        return " ".join(unicodedata.normalize("NFC", text).split())

    def words(self, classes: Sequence[int] | np.ndarray) -> list[tuple[str, int, int]]:
        """The words that `classes` (without blanks and repeats) spell, and the span [first, last) of
        `classes` each is made of.

        They are those of `decode`, in order. Spans do not overlap unless one piece of a tokenizer has more
        than one word; classes between words are of none. With phones, each class is a word. A script without
        spaces has one word.
        """
        numbers = [int(number) for number in classes]
        if self.spelling == "tokenizer":
            return self._words_of_tokenizer(numbers)
        if self.spelling == "phones":
            return [(self.symbols[number - 1], place, place + 1) for place, number in enumerate(numbers)]
        edges = [-1, *(place for place, number in enumerate(numbers) if number == self.space), len(numbers)]
        spans = [(first + 1, last) for first, last in pairwise(edges)]
        return [(word, first, last) for first, last in spans if (word := self.decode(numbers[first:last]))]

    def _split(self, text: str) -> Sequence[str]:
        """A text as symbols, known or not."""
        if self.spelling == "phones":
            return text.split()
        if self.spelling == "jamo":
            text = _take_apart(text)
        return text.replace(" ", SPACE)

    @cached_property
    def _pieces(self) -> "Tokenizer":
        assert self.tokenizer is not None
        return _tokenizer(self.tokenizer)

    @cached_property
    def _ids(self) -> list[int]:
        """The tokenizer's number of each symbol."""
        numbers = self._pieces.get_vocab(with_added_tokens=True)
        return [numbers[symbol] for symbol in self.symbols]

    @cached_property
    def _classes(self) -> np.ndarray:
        """The class of each of the tokenizer's numbers; 0 for special tokens."""
        classes = np.zeros(1 + max(self._pieces.get_vocab(with_added_tokens=True).values()), np.int64)
        classes[self._ids] = np.arange(1, len(self))
        return classes

    def _unknown_to_tokenizer(self, text: str) -> set[str]:
        encoding = self._pieces.encode(text, add_special_tokens=False)
        pieces = zip(self._classes[encoding.ids], encoding.offsets, strict=True)
        stretches = {text[first:last].strip() for number, (first, last) in pieces if number == 0}
        # Some models have nothing for what they do not know and leave it out: then the offsets of what
        # follows are off, too.
        return stretches | {character for character in set(text) - {" "} if self._is_lost(character)}

    def _is_lost(self, character: str) -> bool:
        if character not in self._lost:
            alone = self._pieces.encode(character, add_special_tokens=False).ids
            self._lost[character] = not self._pieces.decode(alone, skip_special_tokens=False).strip()
        return self._lost[character]

    def _words_of_tokenizer(self, numbers: list[int]) -> list[tuple[str, int, int]]:
        """By how much more of the text each piece decodes to. One that adds nothing yet (a byte of a
        character) is of the next word."""
        text, done, ends, begun = self.decode(numbers), 0, [0], [False]
        for count in range(1, len(numbers) + 1):
            so_far = self.decode(numbers[:count])
            agreeing = next(
                (i for i, (a, b) in enumerate(zip(so_far, text, strict=False)) if a != b),
                min(len(so_far), len(text)),
            )
            done = max(done, agreeing)  # a decoder may tidy up once more follows
            ends.append(done)
            begun.append(len(so_far) > agreeing)  # the first bytes of a character
        words, letter, first = [], 0, 0
        for word in text.split():
            while ends[first + 1] <= letter:
                first += 1
            begin, last = first, first
            while begin > 0 and (ends[begin] == ends[begin - 1] or (begun[begin] and ends[begin] == letter)):
                begin -= 1
            while ends[last + 1] < letter + len(word):
                last += 1
            words.append((word, begin, last + 1))
            letter += len(word) + 1
        return words


def collapse(path: np.ndarray) -> np.ndarray:
    """A class per frame to what it spells: repeats merged, blanks removed."""
    kept = path[np.r_[True, path[1:] != path[:-1]]] if len(path) else path
    return kept[kept != BLANK]


def _as_symbols(characters: Iterable[str], spelling: Spelling) -> list[str]:
    """Each once, in order, the space as `|`."""
    text = "".join(characters).replace(" ", SPACE)
    return list(dict.fromkeys(_take_apart(text) if spelling == "jamo" else text))


def _take_apart(text: str) -> str:
    """Hangul syllables as conjoining jamo; nothing else changes."""
    return "".join(unicodedata.normalize("NFD", c) if "\uac00" <= c <= "\ud7a3" else c for c in text)


def _tokenizer(definition: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer: Tokenizer = Tokenizer.from_str(definition)
    tokenizer.encode_special_tokens = True  # "<s>" in a transcript is text
    return tokenizer


def _pieces(tokenizer: "Tokenizer", tree: dict[str, Any]) -> list[str]:
    """Pieces in the order of their numbers, without special tokens."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    model = tree["model"]
    special.add(model.get("unk_token"))
    if model.get("unk_id") is not None:  # Unigram has a list of pairs
        special.add(model["vocab"][model["unk_id"]][0])
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(numbers.keys() - special, key=numbers.__getitem__)
