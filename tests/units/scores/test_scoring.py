import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pretrain.config import parse_config
from pretrain.training.task import TrainingConfig
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.sequences import Sequences
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import LoadedLM, load_language_model, log_likelihoods
from units.lm.model import DecoderConfig
from units.lm.training import LMOptimizerConfig, TrainLMConfig, train_lm
from units.scores.ngram import Ngram
from units.scores.score_config import ScoreConfig
from units.scores.scoring import StreamSequences, score

TINY = DecoderConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, context=16, dropout=0.0)


@pytest.fixture(scope="module")
def config(planted: UnitCorpus, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreConfig:
    out = tmp_path_factory.mktemp("scores") / "scores"
    return ScoreConfig(corpus=str(planted.folder), lm=str(trained), out=str(out), bootstrap=200, device="cpu")


@pytest.fixture(scope="module")
def summary(config: ScoreConfig) -> dict[str, Any]:
    return score(config)


def test_the_model_beats_the_bigram_and_nears_the_trigram_on_a_second_order_source(
    summary: dict[str, Any],
) -> None:
    assert summary["bits_per_unit"] < summary["bigram_bits_per_unit"] - 0.5
    assert (
        summary["bigram_bits_per_unit"]
        < summary["unigram_bits_per_unit"]
        < summary["uniform_bits_per_unit"] + 0.05
    )
    assert summary["trigram_bits_per_unit"] < summary["bigram_bits_per_unit"] - 0.5
    assert summary["uniform_bits_per_unit"] == pytest.approx(math.log2(13))


def test_intervals_hold_their_values_and_the_gain_over_the_bigram_is_clear_of_zero(
    summary: dict[str, Any],
) -> None:
    for name in ("", "unigram_", "bigram_", "trigram_"):
        low, high = summary[f"{name}bits_per_unit_ci95"]
        assert low < summary[f"{name}bits_per_unit"] < high
    assert summary["bits_below_bigram"] == pytest.approx(
        summary["bigram_bits_per_unit"] - summary["bits_per_unit"]
    )
    assert (
        0
        < summary["bits_below_bigram_ci95"][0]
        < summary["bits_below_bigram"]
        < summary["bits_below_bigram_ci95"][1]
    )


def test_summary_tables_and_lines_reconcile(
    config: ScoreConfig, summary: dict[str, Any], planted: UnitCorpus
) -> None:
    table = pq.read_table(Path(config.out) / "scores.parquet")
    documents = planted.documents("test")
    assert table["id"].to_pylist() == [planted.ids[i] for i in documents]
    assert table["num_tokens"].to_pylist() == (planted.lengths[documents] + 1).tolist()
    bits, frames = -table["sum"].to_numpy().sum() / math.log(2), planted.num_frames[documents].sum()
    assert summary["bits_per_unit"] == pytest.approx(bits / summary["num_tokens"])
    assert summary["bits_per_token"] == pytest.approx(summary["bits_per_unit"])  # no merges
    assert summary["bits_per_second"] == pytest.approx(bits / (frames / 50))
    assert summary["bits_per_frame"] == pytest.approx(bits / frames)
    assert summary["perplexity"] == pytest.approx(2 ** summary["bits_per_unit"])
    assert summary["num_tokens"] == summary["num_units"] + len(documents)
    np.testing.assert_allclose(
        table["mean"].to_numpy(), table["sum"].to_numpy() / table["num_tokens"].to_numpy()
    )
    lines = [line.split(" ") for line in (Path(config.out) / "scores.txt").read_text().splitlines()]
    assert [(name, float(value)) for name, value in lines] == list(
        zip(table["id"].to_pylist(), table["mean"].to_pylist(), strict=True)
    )


def test_floors_come_from_the_training_split_alone(
    config: ScoreConfig, summary: dict[str, Any], planted: UnitCorpus
) -> None:
    train, test = (StreamSequences(planted, planted.documents(split), 0) for split in ("train", "test"))
    for name, order in (("unigram", 1), ("bigram", 2), ("trigram", 3)):
        floor = Ngram.fit(train, planted.num_units, order)
        expected = [floor.log_probabilities(sequence).sum() for sequence in test]
        found = pq.read_table(Path(config.out) / "scores.parquet")[f"{name}_sum"].to_numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-12)  # float64 sums, rounded once or at every step
    assert summary["floor_tokens"] == planted.lengths[planted.documents("train")].sum()


def test_floors_can_be_estimated_on_fewer_documents(config: ScoreConfig, tmp_path: Path) -> None:
    fewer = score(config.model_copy(update={"floor_tokens": 500, "out": str(tmp_path / "fewer")}))
    assert 500 <= fewer["floor_tokens"] < 550  # whole documents of up to 41 units


@pytest.mark.parametrize("batch_tokens", [1, 97, 100_000])
def test_likelihoods_do_not_move_with_batch_size_padding_or_row_order(
    planted: UnitCorpus, trained: Path, batch_tokens: int
) -> None:
    decoder, pattern = load_language_model(trained, planted, "cpu")[:2]
    documents = planted.documents("test")
    sequences = Sequences(planted, documents, pattern)
    with torch.inference_mode():  # one document at a time, no mask, no packing
        alone = []
        for sequence in map(torch.from_numpy, sequences):
            logits = decoder(sequence[None, :-1], torch.arange(len(sequence) - 1)[None])[0]
            alone.append(logits.log_softmax(-1).gather(1, sequence[1:, None]).double().sum().item())
    order = np.random.default_rng(0).permutation(len(documents))
    scored = log_likelihoods(decoder, pattern, Sequences(planted, documents[order], pattern), batch_tokens)
    # float32 rounding of about 30 terms
    np.testing.assert_allclose(scored, np.array(alone)[order], rtol=1e-5)


def test_documents_longer_than_the_context_are_scored_whole(planted: UnitCorpus, trained: Path) -> None:
    decoder, pattern = load_language_model(trained, planted, "cpu")[:2]
    object.__setattr__(decoder, "config", decoder.config.model_copy(update={"context": 7}))
    sequences = Sequences(planted, np.array([0]), pattern)
    sequence = torch.from_numpy(sequences[0])
    expected = 0.0
    with torch.inference_mode():
        for start in range(0, len(sequence) - 1, 7):
            piece = sequence[start : start + 8]
            logits = decoder(piece[None, :-1], torch.arange(len(piece) - 1)[None])[0]
            expected += logits.log_softmax(-1).gather(1, piece[1:, None]).double().sum().item()
    assert log_likelihoods(decoder, pattern, sequences, 100)[0] == pytest.approx(expected, rel=1e-5)


def test_scoring_again_gives_the_same_bytes(
    config: ScoreConfig, summary: dict[str, Any], tmp_path: Path
) -> None:
    again = score(config.model_copy(update={"out": str(tmp_path / "again")}))
    assert again == summary
    for name in ("scores.parquet", "scores.txt", "summary.json"):
        assert (tmp_path / "again" / name).read_bytes() == (Path(config.out) / name).read_bytes()


def test_another_corpus_is_scored_beside_floors_of_the_training_corpus(
    config: ScoreConfig, tmp_path: Path, plant: Callable[[Path, int, int], UnitCorpus]
) -> None:
    other = plant(tmp_path / "other", 20, 9)
    moved = config.model_copy(
        update={"corpus": str(other.folder), "split": None, "out": str(tmp_path / "scores")}
    )
    summary = score(moved)
    assert summary["num_documents"] == 20 and summary["bits_per_unit"] < summary["bigram_bits_per_unit"]
    with pytest.raises(ValueError, match=r"other has fingerprint .*, but .*lm was trained on"):
        score(moved.model_copy(update={"train_corpus": str(other.folder), "out": str(tmp_path / "again")}))


def test_a_training_corpus_that_has_moved_is_asked_for_by_its_key(
    config: ScoreConfig, trained: Path, tmp_path: Path, plant: Callable[[Path, int, int], UnitCorpus]
) -> None:
    changes: dict[str, Any] = {
        "corpus": str(plant(tmp_path / "other", 20, 9).folder),
        "lm": str(tmp_path / "lm"),
        "split": None,
    }
    shutil.copytree(trained, tmp_path / "lm")
    meta = json.loads((tmp_path / "lm" / "meta.json").read_text())
    (tmp_path / "lm" / "meta.json").write_text(json.dumps({**meta, "corpus_folder": "runs/gone"}))
    with pytest.raises(ValueError, match=r"runs/gone: no such units; .* give its folder as train_corpus"):
        score(config.model_copy(update={**changes, "out": str(tmp_path / "scores")}))


# Minimal pairs. The lexicon: six words of three units, as likely as each other; nonwords end in the third
# unit of the other word with the same middle, so bigrams cannot tell them apart. A tenth of either is any
# three units.

K, NOISE, PAIRS = 4, 0.1, 200
WORDS = ((0, 1, 2), (3, 1, 0), (1, 2, 3), (0, 2, 1), (2, 3, 0), (1, 3, 2))
NONWORDS = ((0, 1, 0), (3, 1, 2), (1, 2, 1), (0, 2, 3), (2, 3, 2), (1, 3, 0))
STRINGS = list(itertools.product(range(K), repeat=3))


def word(rng: np.random.Generator, real: bool) -> np.ndarray:
    chosen, any_three = (WORDS if real else NONWORDS)[rng.integers(len(WORDS))], rng.integers(0, K, 3)
    return np.array(chosen if rng.random() > NOISE else any_three)


def chance(string: tuple[int, ...], lexicon: tuple[tuple[int, ...], ...] = WORDS) -> float:
    return (1 - NOISE) / len(lexicon) * (string in lexicon) + NOISE / K**3


def bigram_chance(string: tuple[int, ...]) -> float:
    """By a bigram model that knows the source's exact frequencies: BOS is K, EOS K + 1."""
    table = np.zeros((K + 1, K + 2))
    for other in STRINGS:
        for pair in itertools.pairwise((K, *other, K + 1)):
            table[pair] += chance(other)
    table /= table.sum(1, keepdims=True)
    return math.prod(float(table[pair]) for pair in itertools.pairwise((K, *string, K + 1)))


def accuracy_of(scorer: Callable[[tuple[int, ...]], float]) -> float:
    """Of a scorer on words against nonwords: every pair of strings, weighted by how often it is drawn."""
    # the same product in another order is a tie
    scores = {string: round(scorer(string), 12) for string in STRINGS}
    weighted = [
        chance(real)
        * chance(other, NONWORDS)
        * (1.0 if scores[real] > scores[other] else 0.5 if scores[real] == scores[other] else 0.0)
        for real, other in itertools.product(STRINGS, STRINGS)
    ]
    return sum(weighted)


def lexicon_documents(order: np.ndarray | None = None) -> list[Document]:
    rng = np.random.default_rng(0)
    train = [Document(f"train-{i}", "train", word(rng, True), np.ones(3)) for i in range(3000)]
    pairs = [
        Document(f"suite/{i}{'-+'[real]}", None, word(rng, bool(real)), np.ones(3))
        for i in range(2 * PAIRS)
        for real in (1, 0)
    ]
    documents = train + pairs
    return documents if order is None else [documents[i] for i in order]


def write_lexicon(folder: Path, documents: list[Document], **changes: Any) -> UnitCorpus:
    settings = {
        "vocabulary": Vocabulary(num_units=K),
        "codebook": "1ex1c0n",
        "frame_rate_hz": 50.0,
        "deduplicated": False,
    }
    write_corpus(folder, iter(documents), {}, {}, **{**settings, **changes})
    return UnitCorpus(folder)


@pytest.fixture(scope="module")
def lexicon(tmp_path_factory: pytest.TempPathFactory) -> UnitCorpus:
    return write_lexicon(tmp_path_factory.mktemp("lexicon") / "units", lexicon_documents())


def train_tiny(corpus: UnitCorpus, out: Path, steps: int, **changes: Any) -> Path:
    torch.set_num_threads(1)
    training = TrainingConfig(max_steps=steps, device="cpu")
    optimizer = LMOptimizerConfig(lr=1e-2, warmup_steps=10)
    train_lm(
        TrainLMConfig(
            corpus=str(corpus.folder),
            out=str(out),
            batch_tokens=1024,
            model=TINY,
            training=training,
            optimizer=optimizer,
            **changes,
        )
    )
    return out


@pytest.fixture(scope="module")
def speller(lexicon: UnitCorpus) -> Path:
    return train_tiny(lexicon, lexicon.folder.parent / "lm", 100)


def own_gold(path: Path, swap: bool = False, order: Iterator[int] | range = range(2 * PAIRS)) -> str:
    """Two wordings an item, as two voices would be; the items in two groups."""
    sides = ("negative", "positive") if swap else ("positive", "negative")
    rows = [
        {sides[0]: f"{i}+", sides[1]: f"{i}-", "item": f"item-{i // 2}", "group": "ab"[i // 2 % 2]}
        for i in order
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def suite_config(lexicon: UnitCorpus, speller: Path) -> ScoreConfig:
    folder = lexicon.folder.parent
    gold = own_gold(folder / "gold.jsonl")
    return ScoreConfig(
        corpus=str(lexicon.folder),
        lm=str(speller),
        out=str(folder / "s"),
        suite="pairs",
        gold=gold,
        bootstrap=400,
        device="cpu",
    )


@pytest.fixture(scope="module")
def suite_summary(suite_config: ScoreConfig) -> dict[str, Any]:
    return score(suite_config)


def outcome_table(config: ScoreConfig) -> list[dict[str, Any]]:
    rows = pq.read_table(Path(config.out) / "pairs.parquet").to_pylist()
    return [
        {key: value for key, value in row.items() if not key.endswith("_sum") or key.startswith("outcome")}
        for row in rows
    ]


def test_model_and_trigram_reach_the_oracle_of_a_planted_lexicon_and_lower_floors_their_own_bounds(
    suite_summary: dict[str, Any],
) -> None:
    strays = NOISE * len(WORDS) / K**3  # draws that fall into the other lexicon
    words, oracle = 1 - NOISE + strays, accuracy_of(chance)
    # 0.95
    assert oracle == pytest.approx(words * (1 - strays) + 0.5 * (words * strays + (1 - words) * (1 - strays)))
    assert accuracy_of(bigram_chance) < 0.55
    assert suite_summary["num_items"] == PAIRS and suite_summary["num_pairs"] == 2 * PAIRS
    expected = {"lm": oracle, "trigram": oracle, "bigram": accuracy_of(bigram_chance), "length": 0.5}
    for name, accuracy in expected.items():
        low, high = suite_summary["scorers"][name]["ci95"]
        # an interval twice as wide as the 95 % one: four standard errors
        assert 1.5 * low - 0.5 * high <= accuracy <= 1.5 * high - 0.5 * low, name
    assert suite_summary["scorers"]["length"] == {
        "accuracy": 0.5,
        "ci95": [0.5, 0.5],
    }  # all are of one length
    assert suite_summary["over"]["bigram"]["ci95"][0] > 0.3
    assert (
        suite_summary["accuracy"]
        == suite_summary["scorers"]["lm"]["accuracy"]
        == suite_summary["scorers"]["lm_sum"]["accuracy"]
    )


@pytest.mark.parametrize("batch_tokens", [7, 8192])
def test_recordings_of_the_very_same_units_tie_exactly(
    suite_config: ScoreConfig, lexicon: UnitCorpus, tmp_path: Path, batch_tokens: int
) -> None:
    spoken: dict[bytes, list[str]] = {}
    for i in range(3000, len(lexicon)):
        spoken.setdefault(lexicon.units(i).tobytes(), []).append(lexicon.ids[i])
    pairs = [names[:2] for names in spoken.values() if len(names) > 1] + [["suite/0+", "suite/0-"]]
    (tmp_path / "gold.csv").write_text("positive,negative\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    gold = {"gold": str(tmp_path / "gold.csv"), "batch_tokens": batch_tokens, "out": str(tmp_path / "s")}
    config = suite_config.model_copy(update=gold)
    assert score(config)["num_identical_pairs"] == len(pairs) - 1 > 5
    same = [row for row in outcome_table(config) if row["positive"] != "suite/0+"]
    assert all(value == 0.5 for row in same for key, value in row.items() if key.startswith("outcome"))


def test_a_zerospeech_gold_gives_what_the_same_pairs_give(
    suite_config: ScoreConfig, suite_summary: dict[str, Any], tmp_path: Path
) -> None:
    rows = [
        f"{i}{side},item-{i // 2},voice-{i % 2},{'' if side == '-' else i // 2 % 2},{int(side == '+')}"
        for side in "-+"
        for i in reversed(range(2 * PAIRS))
    ]
    (tmp_path / "gold.csv").write_text("\n".join(["filename,id,voice,frequency,correct", *rows]))
    told = score(
        suite_config.model_copy(
            update={"suite": "swuggy", "gold": str(tmp_path / "gold.csv"), "out": str(tmp_path / "s")}
        )
    )
    assert told["scorers"] == suite_summary["scorers"]
    assert told["groups"]["vocabulary"] == {
        "in": suite_summary["groups"]["group"]["b"],
        "oov": suite_summary["groups"]["group"]["a"],
    }
    assert told["num_unused_documents"] == 3000
    # what ZeroSpeech makes of the written lines: outcomes of (voice, id), mean over voices, then over ids
    lines = dict(line.split(" ") for line in (tmp_path / "s" / "scores.txt").read_text().splitlines())
    voices = [float(lines[f"{i}+"]) > float(lines[f"{i}-"]) for i in range(2 * PAIRS)]
    ties = [0.5 * (lines[f"{i}+"] == lines[f"{i}-"]) for i in range(2 * PAIRS)]
    assert np.reshape(np.add(voices, ties), (PAIRS, 2)).mean(1).mean() == pytest.approx(told["accuracy"])


def test_swapping_positive_and_negative_gives_exactly_1_minus_the_accuracy(
    suite_config: ScoreConfig, suite_summary: dict[str, Any], tmp_path: Path
) -> None:
    gold = own_gold(tmp_path / "swapped.jsonl", swap=True)
    swapped = score(suite_config.model_copy(update={"gold": gold, "out": str(tmp_path / "s")}))
    for name, told in suite_summary["scorers"].items():
        # halves: the last bit of a division
        assert swapped["scorers"][name]["accuracy"] == pytest.approx(1 - told["accuracy"], abs=1e-15)


def test_outcomes_do_not_move_with_batch_size_or_the_order_of_gold_and_corpus(
    suite_config: ScoreConfig,
    suite_summary: dict[str, Any],
    speller: Path,
    lexicon: UnitCorpus,
    tmp_path: Path,
) -> None:
    expected = outcome_table(suite_config)
    rng = np.random.default_rng(1)
    gold = own_gold(tmp_path / "gold.jsonl", order=iter(rng.permutation(2 * PAIRS).tolist()))
    shuffled = write_lexicon(tmp_path / "units", lexicon_documents(rng.permutation(3000 + 4 * PAIRS)))
    changes: list[dict[str, Any]] = [
        {"batch_tokens": 1},
        {"batch_tokens": 50_000},
        {"gold": gold, "corpus": str(shuffled.folder), "train_corpus": str(lexicon.folder)},
    ]
    for number, change in enumerate(changes):
        config = suite_config.model_copy(update={**change, "out": str(tmp_path / str(number))})
        told = score(config)
        assert outcome_table(config) == expected
        assert told["scorers"] == suite_summary["scorers"] and told["groups"] == suite_summary["groups"]
    # the order of rows moves no bit of the likelihoods either
    rows = pq.read_table(tmp_path / "2" / "pairs.parquet")
    assert rows.equals(pq.read_table(Path(suite_config.out) / "pairs.parquet"))


def test_scores_are_written_by_file_name_as_zerospeech_reads_them(
    suite_config: ScoreConfig, suite_summary: dict[str, Any], tmp_path: Path
) -> None:
    lines = [line.split(" ") for line in (Path(suite_config.out) / "scores.txt").read_text().splitlines()]
    written = {name: float(value) for name, value in lines}
    assert (
        written.keys() == {f"{i}{side}" for i in range(2 * PAIRS) for side in "+-"}
        and len(lines) == 4 * PAIRS
    )
    sums = score(suite_config.model_copy(update={"by": "sum", "out": str(tmp_path / "s")}))
    totals = {
        name: float(value)
        for name, value in map(str.split, (tmp_path / "s" / "scores.txt").read_text().splitlines())
    }
    assert totals["0+"] == pytest.approx(4 * written["0+"])  # three units and EOS
    assert sums["by"] == "sum" and sums["scorers"]["lm_mean"] == suite_summary["scorers"]["lm"]


def test_an_indifferent_model_scores_exactly_half_by_mean_and_prefers_the_shorter_by_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    documents = [
        Document(f"{i}{side}", "train", rng.integers(0, K, size), np.ones(size))
        for i in range(30)
        for side, size in (("+", 3 + i % 3), ("-", 3 + i % 4))
    ]
    corpus = write_lexicon(tmp_path / "units", documents)
    run = train_tiny(corpus, tmp_path / "lm", 1)

    def indifferent(*arguments: Any) -> LoadedLM:
        lm = load_language_model(*arguments)
        # hidden states of zeros: every symbol has the same logit
        torch.nn.init.zeros_(lm.decoder.embed_tokens.weight)
        return lm

    monkeypatch.setattr("units.scores.scoring.load_language_model", indifferent)
    gold = tmp_path / "gold.csv"
    gold.write_text("positive,negative\n" + "".join(f"{i}+,{i}-\n" for i in range(30)))
    told = score(
        ScoreConfig(
            corpus=str(corpus.folder),
            lm=str(run),
            out=str(tmp_path / "s"),
            suite="pairs",
            gold=str(gold),
            device="cpu",
        )
    )
    rows = pq.read_table(tmp_path / "s" / "pairs.parquet").to_pylist()
    assert all(row["outcome_lm"] == 0.5 for row in rows) and told["scorers"]["lm"] == {
        "accuracy": 0.5,
        "ci95": [0.5, 0.5],
    }
    assert [row["outcome_lm_sum"] for row in rows] == [row["outcome_length"] for row in rows]
    shorter = [1.0 if i % 3 < i % 4 else 0.5 if i % 3 == i % 4 else 0.0 for i in range(30)]
    assert told["scorers"]["length"]["accuracy"] == pytest.approx(np.mean(shorter))


def test_several_levels_are_scored_beside_n_grams_of_each_level(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def document(i: int) -> Document:
        first = rng.integers(0, K, rng.integers(3, 8))
        return Document(
            f"d{i}",
            "test" if i % 5 == 0 else "train",
            np.stack([first, (first + 1) % K], axis=1),
            np.ones(len(first)),
        )

    corpus = write_lexicon(
        tmp_path / "units",
        [document(i) for i in range(200)],
        vocabulary=Vocabulary(num_units=K, num_levels=2),
    )
    summaries = {}
    for pattern in ("parallel", "flatten"):
        run = train_tiny(corpus, tmp_path / pattern, 40, pattern=pattern)
        config = ScoreConfig(
            corpus=str(corpus.folder), lm=str(run), out=str(tmp_path / f"{pattern}-scores"), device="cpu"
        )
        summaries[pattern] = score(config)
    documents = corpus.documents("test")
    codes, ends = 2 * int(corpus.lengths[documents].sum()), len(documents)
    for told in summaries.values():
        assert told["num_tokens"] == codes + ends and told["num_units"] == codes
    assert {f"{name}_bits_per_unit" for name in ("unigram", "bigram", "trigram")} <= summaries[
        "parallel"
    ].keys()
    assert summaries["parallel"]["bigram_bits_per_unit"] == summaries["flatten"]["bigram_bits_per_unit"]
    train = corpus.documents("train")
    expected = 0.0
    for level in range(2):
        floor = Ngram.fit(StreamSequences(corpus, train, level), K, 1, ends=level == 0)
        expected -= sum(
            floor.log_probabilities(sequence).sum() for sequence in StreamSequences(corpus, documents, level)
        )
    assert summaries["flatten"]["unigram_bits_per_unit"] == pytest.approx(
        expected / math.log(2) / (codes + ends)
    )
    fewer = score(config.model_copy(update={"floor_tokens": 300, "out": str(tmp_path / "fewer")}))
    # codes of both levels, as in the config; documents are whole
    assert 300 <= fewer["floor_tokens"] < 300 + 2 * 7
    # level 1 is a function of level 0: who sees it (flatten) need not guess, who does not (parallel) guesses
    # as unigrams do
    assert summaries["flatten"]["bits_per_unit"] < 0.75 * summaries["parallel"]["bits_per_unit"]


def test_merges_are_undone_in_bits_per_unit_and_unknown_durations_leave_times_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(num_units=K, merges=((0, 1), (K, 2)))
    documents = [
        Document(
            f"d{i}", "test" if i % 5 == 0 else "train", np.concatenate([[0, 1, 2], rng.integers(0, K, 4)])
        )
        for i in range(50)
    ]
    corpus = write_lexicon(tmp_path / "units", documents, vocabulary=vocabulary, timed=False)
    run = train_tiny(corpus, tmp_path / "lm", 5)
    told = score(ScoreConfig(corpus=str(corpus.folder), lm=str(run), out=str(tmp_path / "s"), device="cpu"))
    assert (
        told["num_units"] == 7 * 10
        and told["num_tokens"] == corpus.lengths[corpus.documents("test")].sum() + 10 < 80
    )
    assert told["bits_per_unit"] == pytest.approx(told["bits_per_token"] * told["num_tokens"] / 80)
    assert told["bits_per_second"] is told["bits_per_frame"] is told["seconds_of_speech"] is None


def write_interleaved(folder: Path) -> UnitCorpus:
    """Two pieces of text, heard for 5 frames, then three units of 2 frames each; ten documents are test."""
    vocabulary = Vocabulary(num_units=K, text=("a", "b"), layout="interleaved")
    speech, text = vocabulary.speech_marker, vocabulary.text_marker
    rng, lasting = np.random.default_rng(0), np.array([0, 5, 0, 0, 2, 2, 2])
    documents = [
        Document(
            f"d{i}",
            "test" if i % 5 == 0 else "train",
            np.array([text, K, K + 1, speech, *rng.integers(0, K, 3)]),
            lasting,
        )
        for i in range(50)
    ]
    return write_lexicon(folder, documents, vocabulary=vocabulary)


def test_text_and_speech_of_an_interleaved_corpus_are_scored_apart(tmp_path: Path) -> None:
    corpus = write_interleaved(tmp_path / "units")
    vocabulary = corpus.vocabulary
    run = train_tiny(corpus, tmp_path / "lm", 5)
    parts = {
        part: score(
            ScoreConfig(
                corpus=str(corpus.folder), lm=str(run), out=str(tmp_path / part), score_on=part, device="cpu"
            )
        )
        for part in ("all", "speech", "text")
    }
    assert [(told["num_units"], told["num_text_symbols"]) for told in parts.values()] == [
        (30, 40),
        (30, 10),
        (0, 30),
    ]
    assert [told["seconds_of_speech"] for told in parts.values()] == [11 * 10 / 50, 6 * 10 / 50, 5 * 10 / 50]
    for told in parts.values():
        bits = told["bits_per_token"] * told["num_tokens"]
        assert told["bits_per_second"] * told["seconds_of_speech"] == pytest.approx(bits)
        assert told["bits_per_unit"] == pytest.approx(
            bits / (told["num_units"] + told["num_text_symbols"] + 10)
        )
    sums = {part: pq.read_table(tmp_path / part / "scores.parquet") for part in parts}
    train, test = (StreamSequences(corpus, corpus.documents(split), 0) for split in ("train", "test"))
    floor = Ngram.fit(train, vocabulary.sizes[0], 2)
    # EOS is in both parts, so together they have it twice
    ends = np.array([floor.log_probabilities(sequence)[-1] for sequence in test])
    for name in ("sum", "bigram_sum"):
        both = sums["speech"][name].to_numpy() + sums["text"][name].to_numpy()
        assert (both < sums["all"][name].to_numpy()).all()
    # the same logarithms in another order
    np.testing.assert_allclose(both - ends, sums["all"]["bigram_sum"].to_numpy(), rtol=1e-12)


def test_what_is_scored_is_what_was_learnt_as_the_run_says_or_its_config_of_an_older_run(
    tmp_path: Path,
) -> None:
    corpus = write_interleaved(tmp_path / "units")
    run = train_tiny(corpus, tmp_path / "lm", 1, loss_on="speech")
    meta = json.loads((run / "meta.json").read_text())
    assert meta.pop("loss_on", "speech") == meta["config"]["loss_on"] == "speech"
    dpo = {
        **meta,
        "loss_on": "speech",
        "config": {**meta["config"], "loss_on": "all"},
    }  # whose config knows nothing of it
    for name, described in (("older", meta), ("dpo", dpo)):
        (run / "meta.json").write_text(json.dumps(described))
        told = score(
            ScoreConfig(corpus=str(corpus.folder), lm=str(run), out=str(tmp_path / name), device="cpu")
        )
        assert (told["num_units"], told["num_text_symbols"]) == (30, 10)


def test_mistakes_about_suites_are_told_before_anything_is_read(
    suite_config: ScoreConfig, tmp_path: Path
) -> None:
    keys = {"corpus": "c", "lm": "l", "out": "o"}
    with pytest.raises(ValueError, match=r"score.toml: `gold` goes with a `suite`"):
        parse_config(ScoreConfig, {**keys, "gold": "g"}, "score.toml")
    with pytest.raises(ValueError, match=r'score.toml: suite = "swuggy" needs `gold`'):
        parse_config(ScoreConfig, {**keys, "suite": "swuggy"}, "score.toml")
    (tmp_path / "gold.csv").write_text("positive,negative\n0+,nowhere\n")
    with pytest.raises(
        ValueError,
        match=r"lacks 1 of the 2 recordings of the suite; the first is 'nowhere' \(.*gold.csv line 2\)",
    ):
        score(
            suite_config.model_copy(update={"gold": str(tmp_path / "gold.csv"), "out": str(tmp_path / "s")})
        )
