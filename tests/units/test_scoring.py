import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from units.corpus import Sequences, UnitCorpus
from units.language_model import load_language_model
from units.ngram import Ngram
from units.scoring import ScoreConfig, log_likelihoods, score


@pytest.fixture(scope="module")
def config(planted: UnitCorpus, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreConfig:
    return ScoreConfig(
        corpus=str(planted.folder), lm=str(trained), out=str(tmp_path_factory.mktemp("scores") / "scores"), device="cpu"
    )


@pytest.fixture(scope="module")
def summary(config: ScoreConfig) -> dict[str, float]:
    return score(config)


def test_the_model_beats_the_bigram_on_a_second_order_source(summary: dict[str, float]) -> None:
    assert summary["bits_per_unit"] < summary["bigram_bits_per_unit"] - 0.5
    assert summary["bigram_bits_per_unit"] < summary["unigram_bits_per_unit"] < summary["uniform_bits_per_unit"] + 0.05


def test_summary_and_table_reconcile(config: ScoreConfig, summary: dict[str, float], planted: UnitCorpus) -> None:
    table = pq.read_table(Path(config.out) / "scores.parquet")
    documents = planted.documents("test")
    assert table["id"].to_pylist() == [planted.ids[i] for i in documents]
    assert table["num_tokens"].to_pylist() == (planted.lengths[documents] + 1).tolist()
    bits, frames = -table["sum"].to_numpy().sum() / math.log(2), planted.num_frames[documents].sum()
    assert summary["bits_per_unit"] == pytest.approx(bits / summary["num_tokens"])
    assert summary["bits_per_second"] == pytest.approx(bits / (frames / 50))
    assert summary["bits_per_frame"] == pytest.approx(bits / frames)
    assert summary["perplexity"] == pytest.approx(2 ** summary["bits_per_unit"])
    assert summary["num_tokens"] == summary["num_units"] + len(documents)
    np.testing.assert_allclose(table["mean"].to_numpy(), table["sum"].to_numpy() / table["num_tokens"].to_numpy())


def test_floors_come_from_the_training_split_alone(config: ScoreConfig, summary: dict[str, float], planted: UnitCorpus) -> None:
    bigram = Ngram.fit(Sequences(planted, planted.documents("train")), planted.num_units, 2)
    expected = [bigram.log_probabilities(planted.sequence(i)).sum() for i in planted.documents("test")]
    np.testing.assert_allclose(pq.read_table(Path(config.out) / "scores.parquet")["bigram_sum"].to_numpy(), expected)


@pytest.mark.parametrize("batch_tokens", [1, 97, 100_000])
def test_scores_do_not_move_with_batch_size_padding_or_row_order(planted: UnitCorpus, trained: Path, batch_tokens: int) -> None:
    decoder, _, _ = load_language_model(trained, planted, "cpu")
    documents = planted.documents("test")
    with torch.inference_mode():  # one document at a time, no mask, no packing
        alone = []
        for i in documents:
            sequence = torch.from_numpy(planted.sequence(i))
            logits = decoder(sequence[None, :-1], torch.arange(len(sequence) - 1)[None])[0]
            alone.append(logits.log_softmax(-1).gather(1, sequence[1:, None]).double().sum().item())
    order = np.random.default_rng(0).permutation(len(documents))
    scored = log_likelihoods(decoder, planted, documents[order], batch_tokens)
    np.testing.assert_allclose(scored, np.array(alone)[order], rtol=1e-5)  # float32 rounding of about 30 terms


def test_documents_longer_than_the_context_are_scored_whole(planted: UnitCorpus, trained: Path) -> None:
    decoder, _, _ = load_language_model(trained, planted, "cpu")
    object.__setattr__(decoder, "config", decoder.config.model_copy(update={"context": 7}))
    sequence = torch.from_numpy(planted.sequence(0))
    expected = 0.0
    with torch.inference_mode():
        for start in range(0, len(sequence) - 1, 7):
            piece = sequence[start : start + 8]
            logits = decoder(piece[None, :-1], torch.arange(len(piece) - 1)[None])[0]
            expected += logits.log_softmax(-1).gather(1, piece[1:, None]).double().sum().item()
    assert log_likelihoods(decoder, planted, np.array([0]), 100)[0] == pytest.approx(expected, rel=1e-5)


def test_scoring_again_gives_the_same_bytes(config: ScoreConfig, summary: dict[str, float], tmp_path: Path) -> None:
    again = score(config.model_copy(update={"out": str(tmp_path / "again")}))
    assert again == summary
    assert (tmp_path / "again" / "scores.parquet").read_bytes() == (Path(config.out) / "scores.parquet").read_bytes()


def test_another_corpus_is_scored_beside_floors_of_the_training_corpus(
    config: ScoreConfig, tmp_path: Path, plant: Callable[[Path, int, int], UnitCorpus]
) -> None:
    other = plant(tmp_path / "other", 20, 9)
    moved = config.model_copy(update={"corpus": str(other.folder), "split": None, "out": str(tmp_path / "scores")})
    summary = score(moved)
    assert summary["num_documents"] == 20 and summary["bits_per_unit"] < summary["bigram_bits_per_unit"]
    with pytest.raises(ValueError, match=r"other has fingerprint .*, but .*lm was trained on"):
        score(moved.model_copy(update={"train_corpus": str(other.folder), "out": str(tmp_path / "again")}))
