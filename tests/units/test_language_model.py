import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.engine import TrainingConfig
from units.corpus import Document, UnitCorpus, write_corpus
from units.language_model import IGNORED, LanguageModelTask, Pieces, TrainLMConfig, first_fit, load_language_model, train_lm
from units.model import DecoderConfig


@pytest.fixture
def corpus(tmp_path: Path) -> UnitCorpus:
    rng = np.random.default_rng(0)
    stream = [Document(str(i), "train", rng.integers(0, 9, n).astype(np.uint16)) for i, n in enumerate([3, 17, 8, 1, 40, 9, 8])]
    write_corpus(tmp_path / "u", stream, {}, {}, num_units=9, codebook="c0de", frame_rate_hz=50.0, deduplicated=False)
    return UnitCorpus(tmp_path / "u")


def test_every_symbol_after_bos_is_predicted_once_from_the_one_before_it(corpus: UnitCorpus) -> None:
    pieces = Pieces(corpus, corpus.documents(), context=8)
    batch = pieces.collate(np.arange(len(pieces)))
    found: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(corpus))}
    for piece in range(len(pieces)):
        here = batch.documents == piece
        assert batch.positions[here].tolist() == list(range(int(here.sum())))
        found[int(pieces.owners[piece])] += zip(batch.tokens[here].tolist(), batch.targets[here].tolist(), strict=True)
    for i in range(len(corpus)):
        whole = corpus.sequence(i).tolist()
        assert found[i] == list(itertools.pairwise(whole))
    padded = batch.documents == -1
    assert (batch.targets[padded] == IGNORED).all() and batch.tokens.shape[1] <= 8


def test_an_epoch_holds_every_piece_once_in_batches_of_like_size(corpus: UnitCorpus) -> None:
    config = TrainLMConfig(corpus="", out="", batch_tokens=24, model=DecoderConfig(context=8), training=TrainingConfig(max_steps=1))
    task = LanguageModelTask(config, corpus)
    plan = task.plan(3)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(task.pieces)))
    assert all(abs(task.amount(items) - 24) <= 8 for items in plan)
    assert all(np.array_equal(a, b) for a, b in zip(plan, task.plan(3), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(plan, task.plan(4), strict=False))


def test_first_fit_fills_rows_without_overflowing_them() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    rows = first_fit(lengths)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= max(lengths)
    assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / max(lengths)) + 1  # the bound of first-fit decreasing


def test_the_loss_of_a_batch_is_the_sum_over_any_split_of_it(corpus: UnitCorpus) -> None:
    config = TrainLMConfig(corpus="", out="", model=DecoderConfig(context=8, dropout=0), training=TrainingConfig(max_steps=1))
    task = LanguageModelTask(config, corpus)
    items = np.arange(len(task.pieces))
    whole = task.model(task.collate(items, 0))
    parts = [task.model(task.collate(part, 0)) for part in task.split(items, 3)]
    assert whole.count == sum(part.count for part in parts) == corpus.lengths.sum() + len(corpus)
    torch.testing.assert_close(
        whole.total, torch.stack([part.total for part in parts]).sum(), rtol=1e-5, atol=1e-4
    )  # order of sums


def test_padding_moves_neither_loss_nor_gradients(corpus: UnitCorpus) -> None:
    config = TrainLMConfig(corpus="", out="", model=DecoderConfig(context=8, dropout=0), training=TrainingConfig(max_steps=1))
    task = LanguageModelTask(config, corpus)
    batch = task.collate(np.arange(4), 0)
    padded = type(batch)(
        *[torch.nn.functional.pad(field, (0, 5), value=fill) for field, fill in zip(batch, (0, IGNORED, 0, -1), strict=True)]
    )
    gradients = []
    for each in (batch, padded):
        task.model.zero_grad()
        task.model(each).total.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in task.model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)  # sums in another order


def test_training_goes_through_the_engine_and_reaches_below_its_first_loss(planted: UnitCorpus, trained: Path) -> None:
    decoder, meta, _ = load_language_model(trained, planted)
    assert (
        meta["codebook"] == "c0de" and meta["num_units"] == planted.num_units and meta["parents"] == {"corpus": planted.fingerprint}
    )
    assert not decoder.training
    summary = (trained / "summary.json").read_text()
    assert "valid_bits" in summary


def test_a_diverging_run_is_stopped(planted: UnitCorpus) -> None:
    task = LanguageModelTask(TrainLMConfig(corpus="", out="", training=TrainingConfig(max_steps=1)), planted)
    assert task.alarm({"loss": 2.0}, 10) is None
    assert "diverged" in (task.alarm({"loss": 9.0}, 10) or "")


def test_a_model_of_another_codebook_is_refused_with_both_fingerprints(tmp_path: Path, trained: Path) -> None:
    stream = [Document("a", None, np.array([0, 1], np.uint16))]
    write_corpus(tmp_path, stream, {}, {}, num_units=12, codebook="0ther", frame_rate_hz=50.0, deduplicated=True)
    with pytest.raises(ValueError, match=r"lm was trained on units with codebook 'c0de', but .* has codebook '0ther'"):
        load_language_model(trained, UnitCorpus(tmp_path))


def test_training_names_an_unknown_split(planted: UnitCorpus, tmp_path: Path) -> None:
    config = TrainLMConfig(
        corpus=str(planted.folder), out=str(tmp_path / "lm"), split="trian", training=TrainingConfig(max_steps=1)
    )
    with pytest.raises(ValueError, match="no documents in split 'trian'; its splits: dev, test, train"):
        train_lm(config)
