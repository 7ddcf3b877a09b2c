import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.training.task import TrainingConfig
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.patterns import Pattern
from units.corpus.sequences import Sequences
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import Pieces, first_fit, load_language_model
from units.lm.model import DecoderConfig
from units.lm.training import LanguageModelTask, TrainLMConfig, train_lm

PLAIN = Pattern("flatten", [9])


@pytest.fixture
def corpus(tmp_path: Path) -> UnitCorpus:
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, 9, n).astype(np.uint16) for n in [3, 17, 8, 1, 40, 9, 8]]
    stream = [
        Document(str(i), "train", units, np.ones(len(units), np.uint16)) for i, units in enumerate(drawn)
    ]
    vocabulary = Vocabulary(num_units=9)
    write_corpus(
        tmp_path / "u",
        stream,
        {},
        {},
        vocabulary=vocabulary,
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=False,
    )
    return UnitCorpus(tmp_path / "u")


def test_every_symbol_after_bos_is_predicted_once_from_the_one_before_it(corpus: UnitCorpus) -> None:
    sequences = Sequences(corpus, corpus.documents(), PLAIN)
    pieces = Pieces(sequences, PLAIN, context=8)
    batch = pieces.collate(np.arange(len(pieces)))
    found: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(corpus))}
    owners, tokens = batch.documents.flatten()[batch.steps], batch.tokens.flatten()[batch.steps]
    for piece in range(len(pieces)):
        here = owners == piece
        assert batch.positions[batch.documents == piece].tolist() == list(range(int(here.sum())))
        found[int(pieces.owners[piece])] += zip(
            tokens[here].tolist(), batch.targets[here].tolist(), strict=True
        )
    for i in range(len(corpus)):
        assert found[i] == list(itertools.pairwise([9, *corpus.units(i).tolist(), 10]))
    assert (owners >= 0).all() and batch.tokens.shape[1] <= 8


def test_an_epoch_holds_every_piece_once_in_batches_of_like_size(corpus: UnitCorpus) -> None:
    config = TrainLMConfig(
        corpus="none",
        out="none",
        batch_tokens=24,
        model=DecoderConfig(context=8),
        training=TrainingConfig(max_steps=1),
    )
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
    # the bound of first-fit decreasing
    assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / max(lengths)) + 1


def test_the_loss_of_a_batch_is_the_sum_over_any_split_of_it(corpus: UnitCorpus) -> None:
    config = TrainLMConfig(
        corpus="none",
        out="none",
        model=DecoderConfig(context=8, dropout=0),
        training=TrainingConfig(max_steps=1),
    )
    task = LanguageModelTask(config, corpus)
    items = np.arange(len(task.pieces))
    whole = task.model(task.collate(items, 0))
    parts = [task.model(task.collate(part, 0)) for part in task.split(items, 3)]
    assert whole.count == sum(part.count for part in parts) == corpus.lengths.sum() + len(corpus)
    torch.testing.assert_close(
        whole.total, torch.stack([part.total for part in parts]).sum(), rtol=1e-5, atol=1e-4
    )  # order of sums


def test_padding_moves_neither_loss_nor_gradients(corpus: UnitCorpus) -> None:
    config = TrainLMConfig(
        corpus="none",
        out="none",
        model=DecoderConfig(context=8, dropout=0),
        training=TrainingConfig(max_steps=1),
    )
    task = LanguageModelTask(config, corpus)
    batch = task.collate(np.arange(4), 0)
    width = batch.tokens.shape[1]
    wider = [
        torch.nn.functional.pad(field, (0, 5), value=fill)
        for field, fill in zip(batch[:3], (0, 0, -1), strict=True)
    ]
    padded = type(batch)(*wider, batch.steps // width * (width + 5) + batch.steps % width, batch.targets)
    gradients = []
    for each in (batch, padded):
        task.model.zero_grad()
        task.model(each).total.backward()
        gradients.append(
            torch.cat(
                [weight.grad.flatten() for weight in task.model.parameters() if weight.grad is not None]
            )
        )
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)  # sums in another order


def test_training_goes_through_the_engine_and_reaches_below_its_first_loss(
    planted: UnitCorpus, trained: Path
) -> None:
    decoder, pattern, vocabulary, meta, _, _ = load_language_model(trained, planted)
    assert meta["codebook"] == "c0de" and meta["parents"] == {"corpus": planted.fingerprint}
    assert vocabulary == planted.vocabulary and pattern.vocabularies == decoder.vocabularies == (14,)
    assert not decoder.training
    summary = (trained / "summary.json").read_text()
    assert "valid_bits" in summary


def test_a_model_of_another_codebook_is_refused_with_both_fingerprints(tmp_path: Path, trained: Path) -> None:
    stream = [Document("a", None, np.array([0, 1], np.uint16))]
    vocabulary = Vocabulary(num_units=12)
    write_corpus(
        tmp_path,
        stream,
        {},
        {},
        vocabulary=vocabulary,
        codebook="0ther",
        frame_rate_hz=50.0,
        deduplicated=True,
        timed=False,
    )
    with pytest.raises(
        ValueError, match=r"lm was trained on other units than .* has: codebook 'c0de' against '0ther'"
    ):
        load_language_model(trained, UnitCorpus(tmp_path))


def test_training_names_an_unknown_split(planted: UnitCorpus, tmp_path: Path) -> None:
    config = TrainLMConfig(
        corpus=str(planted.folder),
        out=str(tmp_path / "lm"),
        split="trian",
        training=TrainingConfig(max_steps=1),
    )
    with pytest.raises(ValueError, match="no documents in split 'trian'; its splits: dev, test, train"):
        train_lm(config)


def test_a_model_of_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path, trained: Path) -> None:
    stream = [Document("a", None, np.array([0, 1], np.uint16))]
    vocabulary = Vocabulary(num_units=12, merges=((0, 1),))
    write_corpus(
        tmp_path,
        stream,
        {},
        {},
        vocabulary=vocabulary,
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=True,
        timed=False,
    )
    with pytest.raises(ValueError, match=r"has: merges 0 against 1; pack labels"):
        load_language_model(trained, UnitCorpus(tmp_path))


def test_training_goes_on_from_a_run_of_the_same_units_and_refuses_one_of_others(
    tmp_path: Path, planted: UnitCorpus, trained: Path
) -> None:
    keys = {"init": str(trained), "training": TrainingConfig(max_steps=1, device="cpu")}
    task = LanguageModelTask(TrainLMConfig(corpus=str(planted.folder), out="none", **keys), planted)
    before = load_language_model(trained, planted).decoder.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in task.model.decoder.state_dict().items())

    stream = [Document("a", "train", np.array([0, 1], np.uint16))]
    vocabulary = Vocabulary(num_units=12)
    write_corpus(
        tmp_path,
        stream,
        {},
        {},
        vocabulary=vocabulary,
        codebook="0ther",
        frame_rate_hz=50.0,
        deduplicated=True,
        timed=False,
    )
    with pytest.raises(ValueError, match="codebook 'c0de' against '0ther'"):
        train_lm(TrainLMConfig(corpus=str(tmp_path), out=str(tmp_path / "lm"), **keys))


def test_sizes_beside_initial_and_a_corpus_beside_dpo_are_refused() -> None:
    given = {"out": "o", "training": {"max_steps": 1}}
    with pytest.raises(ValueError, match="leave out model.dim"):
        TrainLMConfig.model_validate(
            {**given, "corpus": "c", "init": "i", "model": {"dim": 64, "dropout": 0.0}}
        )
    with pytest.raises(ValueError, match="give `init` and no `corpus`"):
        TrainLMConfig.model_validate({**given, "corpus": "c", "init": "i", "dpo": {"pairs": "p"}})
    with pytest.raises(ValueError, match="give the `corpus` to learn"):
        TrainLMConfig.model_validate(given)


@pytest.mark.parametrize("layout", ["interleaved", "grid"])
def test_the_loss_can_be_of_speech_or_of_text_alone_and_the_two_make_the_whole(
    tmp_path: Path, layout: str
) -> None:
    text = ("\u2581", "a", "b")
    vocabulary = Vocabulary(num_units=4, text=text, layout=layout)
    if layout == "interleaved":
        speech, words = vocabulary.speech_marker, vocabulary.text_marker
        symbols = np.array([speech, 0, 1, words, 4, 5, 6, speech, 3, 2])
    else:
        symbols = np.array([[0, 1], [1, 2], [3, 3], [3, 0], [2, 1]])
    document = Document("a", "train", symbols)
    write_corpus(
        tmp_path,
        [document],
        {},
        {},
        vocabulary=vocabulary,
        codebook="c",
        frame_rate_hz=50.0,
        deduplicated=False,
        timed=False,
    )
    corpus = UnitCorpus(tmp_path)
    for pattern in ("delay", "flatten"):
        count, total = {}, {}
        for loss_on in ("all", "speech", "text"):
            config = TrainLMConfig(
                corpus="none",
                out="none",
                loss_on=loss_on,
                pattern=pattern,
                model=DecoderConfig(dim=8, num_heads=2, dropout=0.0),
                training=TrainingConfig(max_steps=1),
            )
            task = LanguageModelTask(config, corpus)
            loss = task.model(task.collate(np.arange(len(task.pieces)), 0))
            count[loss_on], total[loss_on] = int(loss.count), float(loss.total.detach())
        spoken = int((~vocabulary.is_text()[symbols]).sum()) if layout == "interleaved" else 5
        written = symbols.size - spoken
        assert (count["speech"], count["text"], count["all"]) == (
            spoken + 1,
            written + 1,
            symbols.size + 1,
        )  # EOS in all three
        of_eos = total["speech"] + total["text"] - total["all"]  # it is in both
        assert 0 < of_eos < 4  # of an untrained model over some ten symbols, log 10 and a little


def test_a_device_that_is_not_here_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="^device: 'foo' is not here; torch .* has cpu"):
        load_language_model(trained, device="foo")
