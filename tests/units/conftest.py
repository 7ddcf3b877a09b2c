"""A small unit corpus from a planted second-order source, and a language model trained on it for a few
steps."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.training.task import TrainingConfig
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.sequence import deduplicate
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.model import DecoderConfig
from units.lm.training import LMOptimizerConfig, TrainLMConfig, train_lm

NUM_UNITS = 12
TINY = DecoderConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, context=64, dropout=0.0)


def planted_documents(count: int, seed: int) -> Iterator[Document]:
    """The next unit is a function of the two before it nine times in ten: a bigram model cannot know it."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        units = [0, 1]
        for _ in range(rng.integers(20, 40)):
            likely = (units[-1] + 1 + (units[-2] % 3)) % NUM_UNITS
            units.append(
                likely
                if rng.random() < 0.9
                else int(rng.choice([u for u in range(NUM_UNITS) if u != units[-1]]))
            )
        frames = np.repeat(np.array(units, np.uint16), rng.integers(1, 4, len(units)))
        split = "test" if number % 10 == 9 else "dev" if number % 10 == 8 else "train"
        yield Document(f"document-{number}", split, *deduplicate(frames))


@pytest.fixture(scope="session")
def plant() -> Callable[[Path, int, int], UnitCorpus]:
    """plant(folder, number of documents, seed) writes a corpus and opens it."""

    def plant(folder: Path, count: int, seed: int) -> UnitCorpus:
        stream = planted_documents(count, seed)
        write_corpus(
            folder,
            stream,
            {},
            {},
            vocabulary=Vocabulary(num_units=NUM_UNITS),
            codebook="c0de",
            frame_rate_hz=50.0,
            deduplicated=True,
        )
        return UnitCorpus(folder)

    return plant


@pytest.fixture(scope="session")
def planted(
    tmp_path_factory: pytest.TempPathFactory, plant: Callable[[Path, int, int], UnitCorpus]
) -> UnitCorpus:
    return plant(tmp_path_factory.mktemp("planted") / "units", 300, 0)


@pytest.fixture(scope="session")
def trained(planted: UnitCorpus) -> Path:
    """Run folder of a language model that has seen the planted corpus about ten times."""
    torch.set_num_threads(1)
    out = planted.folder.parent / "lm"
    train_lm(
        TrainLMConfig(
            corpus=str(planted.folder),
            out=str(out),
            batch_tokens=512,
            model=TINY,
            training=TrainingConfig(max_steps=150, device="cpu"),
            optimizer=LMOptimizerConfig(lr=1e-2, warmup_steps=15),
        )
    )
    return out
