"""Unit BPE against a merge loop written out, and without loss; the exported tokenizer against it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from units.corpus.bpe import Merger, learn, tokenizer
from units.corpus.patterns import Pattern
from units.corpus.vocabulary import Vocabulary

K = 6


def documents(count: int, seed: int) -> list[np.ndarray]:
    """Silence (unit 0) of 30 to 60 frames between units of which some follow each other often."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        words = [rng.permutation([[1, 2, 3], [4, 5, 1, 2], [3, 3]][rng.integers(3)]) for _ in range(6)]
        made.append(np.concatenate([np.zeros(rng.integers(30, 60), int), *words]).astype(np.uint16))
    return made


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(num_units=K, merges=learn(documents(80, 0), K, 60, max_units=5))


def merged_by_hand(units: list[int], merges: tuple[tuple[int, int], ...], num_units: int) -> list[int]:
    """The earliest merge that occurs is applied from the left wherever it occurs, until none does (Sennrich
    et al., 2016)."""
    while True:
        pairs = set(itertools.pairwise(units))
        number = next((i for i, pair in enumerate(merges) if pair in pairs), None)
        if number is None:
            return units
        result: list[int] = []
        at = 0
        while at < len(units):
            if tuple(units[at : at + 2]) == merges[number]:
                result.append(num_units + number)
                at += 2
            else:
                result.append(units[at])
                at += 1
        units = result


def counted_by_hand(sequences: list[list[int]], num_units: int, count: int) -> list[tuple[int, int]]:
    """The most frequent pair of neighbours, `count` times; of equals the one of smaller symbols."""
    merges: list[tuple[int, int]] = []
    for _ in range(count):
        pairs: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            for pair in itertools.pairwise(sequence):
                pairs[pair] = pairs.get(pair, 0) + 1
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        sequences = [merged_by_hand(sequence, tuple(merges), num_units) for sequence in sequences]
    return merges


def test_the_most_frequent_pair_is_merged_first() -> None:
    rng = np.random.default_rng(0)
    # No two neighbours alike: the trainer counts "aaa" as two pairs and merges one, by which a count would
    # differ.
    sequences = [np.cumsum(rng.choice([1, 1, 1, 2, 3], 60)) % 5 for _ in range(40)]
    learned = learn(sequences, 5, 15, max_units=100)
    assert list(learned) == counted_by_hand([sequence.tolist() for sequence in sequences], 5, 10)


@given(st.lists(st.integers(0, K - 1), max_size=200))
def test_tokens_are_those_of_the_merge_loop_and_expand_gives_the_units_back(
    vocabulary: Vocabulary, units: list[int]
) -> None:
    tokens = Merger(vocabulary).encode(np.array(units, np.uint16))
    assert tokens.tolist() == merged_by_hand(units, vocabulary.merges, K)
    assert vocabulary.expand(tokens).tolist() == units


@given(
    st.integers(1, 5),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=40), min_size=1, max_size=5),
    st.integers(2, 6),
)
def test_whatever_is_learned_is_a_lossless_vocabulary_within_the_cap(
    more: int, sequences: list[list[int]], max_units: int
) -> None:
    merges = learn([np.array(sequence) for sequence in sequences], 5, 5 + 4 * more, max_units=max_units)
    vocabulary = Vocabulary(num_units=5, merges=merges)
    assert len(merges) <= 4 * more
    assert vocabulary.unit_counts.max() <= max_units
    assert len(set(vocabulary.names())) == 5 + len(merges)
    for sequence in sequences:
        tokens = Merger(vocabulary).encode(np.array(sequence))
        assert vocabulary.expand(tokens).tolist() == sequence


@pytest.mark.parametrize("max_units", [2, 3, 4, 8])
def test_runs_of_silence_stop_at_the_cap_and_reach_it(max_units: int) -> None:
    vocabulary = Vocabulary(num_units=K, merges=learn(documents(80, 0), K, 200, max_units=max_units))
    runs = [
        spelled
        for i in range(len(vocabulary.merges))
        if not (spelled := vocabulary.expand(np.array([K + i]))).any()
    ]
    assert max(len(run) for run in runs) == max_units
    assert vocabulary.unit_counts.max() == max_units


def test_learning_is_deterministic_streams_and_respects_min_frequency() -> None:
    assert learn(iter(documents(80, 0)), K, 60) == learn(documents(80, 0), K, 60)
    sequences = [np.array([0, 1]), np.array([2, 3]), np.array([0, 1])]
    assert learn(sequences, K, 60, min_frequency=2) == ((0, 1),)
    assert learn(sequences, K, 60, min_frequency=3) == ()


def test_a_large_corpus_is_learned_from_a_sample_of_it() -> None:
    sequences = documents(300, 0)
    learned = [learn(sequences, K, 16, sample_units=units) for units in (10_000, 10_000, 10**7)]
    assert learned[0] == learned[1]
    assert len({*learned[0]} & {*learned[2]}) > 5  # the most frequent pairs of a half are those of the whole
    assert learn([*sequences, np.full(3000, 5)], K, 16, sample_units=500) != learned[2]
    assert learn(sequences, K, 16, sample_units=0) == ()


def test_sixty_thousand_units_and_documents_of_a_hundred_thousand_work() -> None:
    rng, num_units = np.random.default_rng(0), 60_000
    units = np.cumsum(rng.integers(1, 3, 100_000)).astype(np.uint16) % num_units
    vocabulary = Vocabulary(num_units=num_units, merges=learn([units], num_units, num_units + 500))
    assert len(vocabulary.merges) == 500
    tokens = Merger(vocabulary).encode(units)
    assert len(tokens) < len(units)
    assert np.array_equal(vocabulary.expand(tokens), units)


def test_mistakes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"sequence 1: unit 6 at position 2 is outside the vocabulary 0 \.\. 5"
    ):
        learn([np.array([0]), np.array([1, 2, 6])], K, 10)
    with pytest.raises(ValueError, match="vocabulary_size 6 counts the 6 units"):
        learn([], K, 6)
    with pytest.raises(ValueError, match="max_units 1"):
        learn([], K, 10, max_units=1)
    with pytest.raises(ValueError, match="at most 131072 units; the corpus has 131073"):
        learn([], 2**17 + 1, 2**18)
    with pytest.raises(ValueError, match=r"^unit -1 at position 0 is outside the vocabulary 0 \.\. 5"):
        Merger(Vocabulary(num_units=K)).encode(np.array([-1]))


def through_json(made: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(made.to_str())


def test_the_tokenizer_of_units_reads_and_writes_the_ids_of_the_model() -> None:
    pattern = Pattern("delay", (12,))
    made = through_json(tokenizer(Vocabulary(num_units=12), pattern))
    assert made.encode("<Un3> <Un11>\n<Un0>").ids == [pattern.bos[0], 3, 11, 0]
    assert made.encode("<Un3></s>", add_special_tokens=False).ids == [3, pattern.eos]
    assert made.decode([12, 3, 11, 13]) == "<Un3><Un11>"
    assert made.decode([12, 3, 11, 13], skip_special_tokens=False) == "<s><Un3><Un11></s>"
    assert made.get_vocab_size() == pattern.vocabularies[0]
    with pytest.raises(Exception, match="Missing"):  # tokenizers raises plain Exceptions
        made.encode("<Un3><Un12>")


@given(st.lists(st.integers(0, K - 1), max_size=100))
def test_the_tokenizer_of_merges_gives_the_merger_s_tokens(vocabulary: Vocabulary, units: list[int]) -> None:
    made = tokenizer(vocabulary, Pattern("flatten", vocabulary.sizes))
    text = "".join(f"<Un{unit}>" for unit in units)
    ids = made.encode(text, add_special_tokens=False).ids
    assert ids == Merger(vocabulary).encode(np.array(units)).tolist()
    assert made.decode(ids) == text


def test_units_of_several_digits_merge_whole() -> None:
    vocabulary = Vocabulary(num_units=123, merges=((1, 2), (12, 1), (123, 0), (111, 11)))
    made = through_json(tokenizer(vocabulary, Pattern("flatten", vocabulary.sizes)))
    for units in ([1, 2, 0, 12, 1, 2], [12, 1, 111, 11, 1], [122, 111, 11, 0]):
        text = "".join(f"<Un{unit}>" for unit in units)
        ids = made.encode(text).ids
        assert ids == [127, *Merger(vocabulary).encode(np.array(units))]
        assert made.decode([*ids, 128]) == text
    assert max(made.encode("<Un123>").ids) >= 129  # no such unit: an id that the model has no embedding for


@pytest.mark.parametrize("name", ["flatten", "coarse-first"])
def test_the_tokenizer_of_several_levels_writes_the_pattern_s_sequence(name: str) -> None:
    vocabulary = Vocabulary(num_units=4, num_levels=2)
    pattern = Pattern(name, vocabulary.sizes)
    made = through_json(tokenizer(vocabulary, pattern))
    sequence = pattern.arrange(np.array([[3, 1], [0, 2]]))
    text = made.decode(sequence.tolist(), skip_special_tokens=False)
    flat = "<Un3:0><Un1:1><Un0:0><Un2:1></s>" if name == "flatten" else "<Un3:0><Un0:0></s><Un1:1><Un2:1>"
    assert text == "<s>" + flat
    assert made.encode(flat).ids == sequence.tolist()
    with pytest.raises(ValueError, match="'parallel' has 2 streams"):
        tokenizer(vocabulary, Pattern("parallel", vocabulary.sizes))


@pytest.mark.parametrize("layout", ["interleaved", "grid"])
def test_text_pieces_with_blanks_and_brackets_round_trip(layout: str) -> None:
    pieces = ("a", " b", "<", ">", "Un1>", "a>", " ", "Ünï", "</s>")
    vocabulary = Vocabulary.model_validate({"num_units": 4, "text": pieces, "layout": layout})
    pattern = Pattern("flatten", vocabulary.sizes)
    made = through_json(tokenizer(vocabulary, pattern))
    rng = np.random.default_rng(0)
    codes = rng.integers(vocabulary.sizes, size=(200, len(vocabulary.sizes)))
    sequence = pattern.arrange(codes if len(vocabulary.sizes) > 1 else codes[:, 0])
    text = made.decode(sequence.tolist(), skip_special_tokens=False)
    assert made.encode(text.removeprefix("<s>")).ids == sequence.tolist()
