"""Unit BPE: frequent runs of units become symbols of their own, without loss; and the tokenizer that an
exported model leaves with.

The library `tokenizers` learns and applies the merges. It works on characters, so unit u is the character
U+F0000 + u (private use) and a document is one word. What is learned stands in the `Vocabulary`: symbol K + i
is merges[i]; `Vocabulary.expand` undoes it.

Merging units: Ren et al., 2022, "Speech pre-training with acoustic piece"; Shen et al., 2024, "Acoustic BPE
for speech generation".
"""

import heapq
import json
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from units.corpus.patterns import Pattern
from units.corpus.vocabulary import Vocabulary

MAX_UNITS = 0x20000  # as many characters follow U+F0000
LEARNING_PIECE = 1000  # units: the trainer's time for a word grows with the square of its length
BOS, EOS = "<s>", "</s>"


def learn(
    sequences: Iterable[np.ndarray],
    num_units: int,
    vocabulary_size: int,
    max_units: int = 8,
    min_frequency: int = 2,
    sample_units: int = 10_000_000,
) -> tuple[tuple[int, int], ...]:
    """Merges (`Vocabulary.merges`) from documents of units (units,), which are read once, one at a time.

    `vocabulary_size` counts units and merges; fewer come where no pair is left that occurs `min_frequency`
    times. No symbol stands for more than `max_units` units, so that long silences do not fill the vocabulary
    with runs of themselves. The same documents give the same merges. Of more than `sample_units` units a
    random sample of so many is learned from, in pieces of 1,000: the trainer takes about 115 bytes a unit.

    Errors: ValueError naming a sequence with a unit outside 0 .. num_units - 1, or sizes that leave nothing
    to learn.
    """
    if num_units > MAX_UNITS:
        raise ValueError(f"unit BPE is for at most {MAX_UNITS} units; the corpus has {num_units}")
    if vocabulary_size <= num_units:
        raise ValueError(
            f"vocabulary_size {vocabulary_size} counts the {num_units} units; it must exceed them for any "
            "merge"
        )
    if max_units < 2:
        raise ValueError(f"max_units {max_units}: a merge is of 2 units at least")

    # max_token_length is the first length that is *not* made, save for 2, which it treats as 3
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=min_frequency,
        max_token_length=max_units + 1,
        show_progress=False,
        initial_alphabet=[chr(0xF0000 + unit) for unit in range(num_units)],
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(_sampled(sequences, num_units, sample_units), trainer)
    numbers = {chr(0xF0000 + unit): unit for unit in range(num_units)}
    merges: list[tuple[int, int]] = []
    for first, second in json.loads(tokenizer.to_str())["model"]["merges"]:
        # Never spelled before: what a run of units has become at some point does not depend on its
        # neighbours.
        assert first + second not in numbers
        numbers[first + second] = num_units + len(merges)
        merges.append((numbers[first], numbers[second]))
    return tuple(merges)


def _sampled(sequences: Iterable[np.ndarray], num_units: int, sample_units: int) -> Iterator[str]:
    """The documents as words of at most LEARNING_PIECE units, or a random part of them that has at most
    `sample_units`.

    Each piece draws a lot; while there are too many units, the piece with the highest lot is let go.
    """
    rng, kept, size = np.random.default_rng(0), list[tuple[float, str]](), 0
    for number, units in enumerate(sequences):
        _check(units, num_units, f"sequence {number}: ")
        for start in range(0, len(units), LEARNING_PIECE):
            word = _characters(units[start : start + LEARNING_PIECE])
            heapq.heappush(kept, (-rng.random(), word))
            size += len(word)
            while size > sample_units:
                size -= len(heapq.heappop(kept)[1])
    return (word for _, word in kept)


class Merger:
    """Applies a vocabulary's merges to whole documents, the earliest merge first, as `tokenizers` does; the
    identity without any.

    >>> Merger(Vocabulary(num_units=2, merges=((0, 1), (2, 0)))).encode(np.array([0, 1, 0, 1, 1]))
    array([3, 1, 1])
    """

    def __init__(self, vocabulary: Vocabulary):
        self.num_units = vocabulary.sizes[0] - len(vocabulary.merges)
        self._model: Tokenizer | None = None
        if vocabulary.merges:
            spelled = [chr(0xF0000 + unit) for unit in range(self.num_units)]
            for first, second in vocabulary.merges:
                spelled.append(spelled[first] + spelled[second])
            self._model = Tokenizer(_bpe(spelled, vocabulary, {}))

    def encode(self, units: np.ndarray) -> np.ndarray:
        """Tokens int64 (tokens,) of units (units,). ValueError naming a unit outside the vocabulary."""
        _check(units, self.num_units)
        if self._model is None or not len(units):
            return units.astype(np.int64)
        return np.array(self._model.encode(_characters(units), add_special_tokens=False).ids, np.int64)


def tokenizer(vocabulary: Vocabulary, pattern: Pattern) -> Tokenizer:
    """Text such as `<Un3><Un49>` to the ids of a model's one stream and back, for `tokenizer.json`; blanks
    between symbols are ignored.

    The ids are the pattern's, `<s>` (put in front, as the model reads it) and `</s>` among them; levels are
    `<Un3:0><Un49:1>`, in the order of the pattern; text pieces `<Tx:…>`. Decoding gives the units, merges
    undone.

    What is no symbol is an error, "Missing [UNK] token". With merges it is an id past the model's vocabulary
    (see `_spell`), which the model's embedding then refuses.

    Errors: ValueError for a pattern with a stream per level, whose steps have no writing as one line of text.
    """
    if pattern.num_streams > 1:
        raise ValueError(
            f"pattern {pattern.name!r} has {pattern.num_streams} streams; a tokenizer is for one (flatten, "
            "coarse-first)"
        )
    assert pattern.sizes == vocabulary.sizes
    names = [name for stream in range(len(vocabulary.sizes)) for name in vocabulary.names(stream)]
    bos, eos = int(pattern.bos[0]), pattern.eos
    if vocabulary.merges:
        made = Tokenizer(_spell(names, vocabulary, {BOS: bos, EOS: eos}))
    else:
        made = Tokenizer(
            models.WordLevel({**{name: number for number, name in enumerate(names)}, BOS: bos, EOS: eos})
        )
        made.pre_tokenizer = pre_tokenizers.Split(Regex("<[^<>]*>"), "isolated")
    made.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    made.add_special_tokens([AddedToken(name, normalized=False) for name in (BOS, EOS)])
    # Pieces of text may hold blanks and brackets: found before anything else is done to the line.
    made.add_tokens([AddedToken(name, normalized=False) for name in names if name.startswith("<Tx:")])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    made.decoder = decoders.Fuse()
    return made


def _spell(names: list[str], vocabulary: Vocabulary, special: dict[str, int]) -> models.BPE:
    """A BPE model of the names themselves, letter by letter: first a unit's name is put together from the
    left, then units merge.

    The letters and beginnings (`<Un`, `<Un4`) are tokens, too, with the ids after all others.
    A name's merges come before all merges of units, so that these see whole units only, as `Merger` does.
    """
    units = names[: vocabulary.num_units]
    parts: dict[str, None] = dict.fromkeys("<Un0123456789>")
    chains: dict[tuple[str, str], None] = {}
    for name in units:
        for end in range(1, len(name)):
            parts.setdefault(name[:end])
            chains.setdefault((name[:end], name[end]))
    first = max(len(names) - 1, *special.values()) + 1
    return _bpe(
        names,
        vocabulary,
        {**special, **{part: first + number for number, part in enumerate(parts)}},
        list(chains),
    )


def _bpe(
    spelled: list[str],
    vocabulary: Vocabulary,
    more: dict[str, int],
    earlier: list[tuple[str, str]] | None = None,
) -> models.BPE:
    """The model whose symbol i is spelled[i], with the tokens `more` and merges that come before the
    vocabulary's."""
    ids = {spelling: number for number, spelling in enumerate(spelled)}
    assert len(ids) == len(spelled)
    merges = [*(earlier or []), *[(spelled[first], spelled[second]) for first, second in vocabulary.merges]]
    return models.BPE(vocab={**ids, **more}, merges=merges)


def _characters(units: np.ndarray) -> str:
    return (units.astype("<u4") + np.uint32(0xF0000)).tobytes().decode("utf-32-le")


def _check(units: np.ndarray, num_units: int, where: str = "") -> None:
    wrong = np.flatnonzero((units < 0) | (units >= num_units))
    if len(wrong):
        raise ValueError(
            f"{where}unit {units[wrong[0]]} at position {wrong[0]} is outside the vocabulary 0 .. "
            f"{num_units - 1}"
        )
