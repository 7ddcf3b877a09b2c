"""Words in unit corpora: what becomes of a transcript whose words have times before it lies among units.

Words are normalised as transcripts are for CTC (`pretrain.ctc.text.TextConfig`) and spelled in pieces:
characters, or BPE learnt from the manifest's words. `▁` opens a word, as in SentencePiece, so that pieces
alone say where words begin and spelling is lossless. How pieces and units share a sequence is told in
`units/corpus/interleaving.py` and `units/corpus/grid.py`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, Split
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import HOP, MIN_SAMPLES, SAMPLE_RATE, Utterance, Word
from pretrain.store.artefact import read_meta

WORD = "▁"


class TextConfig(Config):
    """How the words of the manifest, which needs their times, go into the corpus."""

    layout: Literal["interleaved", "grid"]
    pieces: Literal["characters"] | Annotated[int, Field(ge=2)] = Field(
        "characters", description="or how many pieces BPE is to learn"
    )
    split: Split = Field(
        "train",
        description='the words that BPE is learnt from; every split\'s for "" and where there are none',
    )
    pieces_of: PathStr | None = Field(
        None, description="in place of `pieces`: a unit corpus to have the same ones as, for its model"
    )
    case: Literal["lower", "upper", "keep"] = "lower"
    punctuation: Literal["remove", "keep"] = "remove"
    fraction: float = Field(
        0.5, gt=0, lt=1, description="interleaved: share of the words that are written rather than spoken"
    )
    span_words: float = Field(
        8.0, ge=1, description="interleaved: mean length of a span in words, written and spoken ones averaged"
    )
    seed: Seed = Field(0, description="interleaved: of the draw of spans")
    delay: int = Field(
        0, description="grid: frames by which text comes after the speech it is of, or, below 0, before it"
    )

    @model_validator(mode="after")
    def _has_pieces_once(self) -> Self:
        if self.pieces_of is not None and self.model_fields_set & {"pieces", "split"}:
            raise ValueError("`pieces_of` a corpus leaves none to learn; drop `pieces` and `split`")
        return self

    @model_validator(mode="after")
    def _spans_hold_a_word(self) -> Self:
        shorter = 2 * self.span_words * min(self.fraction, 1 - self.fraction)
        if shorter < 1:
            raise ValueError(
                f"fraction {self.fraction} with span_words {self.span_words} makes the spans of one kind "
                f"{shorter:.2f} words long; a span has at least one"
            )
        return self


class TextPieces:
    """Spelling of words by a list of pieces, longer ones behind the ones they are made of.

    A word's characters are joined as BPE does: of all neighbours that together are a piece, those whose piece
    is listed first. The pieces alone say how, so that a corpus's vocabulary is all there is to keep.

    >>> pieces = TextPieces(["a", "b", "▁", "▁a"])
    >>> pieces.encode("ab b"), pieces.decode([3, 1, 2, 1])
    (array([3, 1, 2, 1]), 'ab b')
    """

    def __init__(self, pieces: Sequence[str]):
        self.pieces = tuple(pieces)
        self._ids = {piece: number for number, piece in enumerate(self.pieces)}
        self._spelled: dict[str, list[int]] = {}  # corpora repeat their words

    @classmethod
    def learn(cls, counts: Mapping[str, int], size: int | None = None) -> Self:
        """Every character of the words; with `size`, and the pieces BPE adds to them from words by how often
        each occurs.

        A piece that occurs once is not learnt, so a small corpus may give fewer. ValueError when `size`
        leaves no room for the characters.
        """
        alphabet = sorted({WORD, *(character for word in counts for character in word)})
        if size is None:
            return cls(alphabet)
        if size < len(alphabet):
            raise ValueError(
                f"{size} text pieces are too few: the words have {len(alphabet) - 1} characters, and words a "
                "mark"
            )
        from tokenizers import Tokenizer, models, trainers

        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        )
        words = (WORD + word for word, count in sorted(counts.items()) for _ in range(count))
        tokenizer.train_from_iterator(words, trainer)
        numbers: dict[str, int] = tokenizer.get_vocab()
        return cls([*alphabet, *sorted(numbers.keys() - set(alphabet), key=numbers.__getitem__)])

    def __len__(self) -> int:
        return len(self.pieces)

    def encode_word(self, word: str) -> list[int]:
        """The pieces of one word. A character that no piece has is a ValueError naming both: an unknown piece
        would lose it."""
        if word in self._spelled:
            return self._spelled[word]
        if unknown := sorted(
            {character for character in word if character not in self._ids or character == WORD}
        ):
            named = ", ".join(map(repr, unknown))
            raise ValueError(
                f"the word {word!r} has {named}, for which there are no text pieces; learn them from words "
                "that have it"
            )
        assert word and not any(map(str.isspace, word))
        parts = [WORD, *word]
        while len(parts) > 1:
            joined = [self._ids.get(first + second, len(self)) for first, second in pairwise(parts)]
            place = min(range(len(joined)), key=joined.__getitem__)
            if joined[place] == len(self):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        self._spelled[word] = [self._ids[part] for part in parts]
        return self._spelled[word]

    def encode(self, text: str) -> np.ndarray:
        """The pieces of the words of a normalised text, int64."""
        return np.array([number for word in text.split() for number in self.encode_word(word)], np.int64)

    def decode(self, numbers: Sequence[int] | np.ndarray) -> str:
        """The text that pieces spell, words parted by spaces."""
        return "".join(self.pieces[number] for number in numbers).replace(WORD, " ").removeprefix(" ")


def spoken_words(utterance: Utterance, config: TextConfig) -> list[Word]:
    """The normalised words of an utterance with their times; ValueError if the manifest has none.

    A word that is nothing but punctuation is left out. One that becomes several ("well-known") shares its
    time among them in proportion to their letters.
    """
    if utterance.words is None:
        raise ValueError(
            f"utterance {utterance.id!r} has no word times; index it again with `words` in its source or in "
            "`alignments`"
        )
    words: list[Word] = []
    for start, end, name in utterance.words:
        parts = _normalized(name, config.case, config.punctuation)
        ends = np.cumsum([len(part) for part in parts])
        for part, last in zip(parts, ends.tolist(), strict=True):
            first, last = ((end - start) * edge / int(ends[-1]) for edge in (last - len(part), last))
            words.append(Word(start + first, start + last, part))
    return words


def count_words(manifest: Manifest, config: TextConfig) -> Counter[str]:
    """How often each normalised word occurs in `config.split`; those of other splits are there with 0, for
    their characters.

    Utterances without word times are a ValueError naming the first and how many there are.
    """
    everywhere = config.pieces == "characters" or config.split is None or not manifest.splits
    if not everywhere:
        manifest.select(config.split)
    counts = Counter[str]()
    missing = []
    for utterance in manifest:
        if utterance.words is None:
            missing.append(utterance.id)
            continue
        for word in spoken_words(utterance, config):
            counts[word.word] += int(everywhere or utterance.split == config.split)
    if missing:
        raise ValueError(
            f"{manifest.folder}: text needs words with their times, and {len(missing)} of {len(manifest)} "
            f"utterances have none, first {missing[0]!r}; index again with `words` in the source or in "
            "`alignments`"
        )
    return counts


def learn_pieces(manifest: Manifest, config: TextConfig) -> TextPieces:
    """The pieces that `config` asks for, which spell every word of the manifest.

    Errors: ValueError where it has no words, for a size too small, and for words that the pieces of another
    corpus cannot spell.
    """
    counts = count_words(manifest, config)
    if not counts:
        raise ValueError(f"{manifest.folder}: there is not one word in it to write")
    try:
        if config.pieces_of is not None:
            pieces = read_pieces(config.pieces_of)
            for word in sorted(counts):
                pieces.encode_word(word)
            return pieces
        return TextPieces.learn(counts, None if config.pieces == "characters" else config.pieces)
    except ValueError as error:
        raise ValueError(f"{manifest.folder}: {error}") from None


def read_pieces(corpus: str) -> TextPieces:
    """The pieces of a unit corpus with text. One without is a ValueError."""
    pieces = TextPieces(read_meta(corpus, "units").get("vocabulary", {}).get("text", ()))
    if not len(pieces):
        raise ValueError(f"{corpus}: this unit corpus has no text, so no pieces to spell with")
    return pieces


def word_frames(words: Sequence[Word], num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First frame, and frame after the last, of each word, (words,) int64 each, in order and without overlap.

    A word has the frames whose window's centre lies in start <= t < end, as phones do in
    `pretrain.data.audio.phone_frames`; a short one may have none.
    """
    centres = (np.arange(num_frames) * HOP + MIN_SAMPLES // 2) / SAMPLE_RATE
    starts = np.searchsorted(centres, np.array([word.start for word in words], np.float64))
    ends = np.searchsorted(centres, np.array([word.end for word in words], np.float64))
    # aligners round, so that a word may end a little after the next begins
    ends[:-1] = np.minimum(ends[:-1], starts[1:])
    return starts, ends


@lru_cache(maxsize=1 << 18)  # corpora repeat their words
def _normalized(
    word: str, case: Literal["lower", "upper", "keep"], punctuation: Literal["remove", "keep"]
) -> tuple[str, ...]:
    from pretrain.ctc.text import TextConfig as Transcripts  # brings torch

    return tuple(Transcripts(case=case, punctuation=punctuation).normalize(word).split())
