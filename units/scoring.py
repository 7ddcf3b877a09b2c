"""The verb `score`: how likely a unit language model finds held-out documents, beside unigram and bigram floors.

The probability of a document is that of u1 .. un EOS given BOS: EOS counts as one predicted token of every document, for the
model and for the floors alike. The floors are estimated on the split that the model was trained on and judged on the very
same tokens. `bits_per_unit` divides by units and EOS together; `bits_per_second` and `bits_per_frame` divide the same bits by
the documents' duration, and so describe which units come, not how long each lasts.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from pretrain.artefact import atomic_path, commit, require_absent, write_json
from pretrain.config import Config
from pretrain.progress import progress
from units.corpus import Sequences, UnitCorpus
from units.language_model import IGNORED, Pieces, load_language_model
from units.model import Decoder
from units.ngram import Ngram


class ScoreConfig(Config):
    """Score one split of a unit corpus with a trained unit language model."""

    corpus: str
    lm: str
    out: str
    split: str | None = "test"
    train_corpus: str | None = Field(None, description="for the floors; by default where the model's config found it")
    batch_tokens: int = Field(8192, ge=1)
    device: str = "auto"


def score(config: ScoreConfig) -> dict[str, Any]:
    """Write `summary.json` and `scores.parquet`: per document id, num_tokens, mean, sum, unigram_sum, bigram_sum (natural logs)."""
    require_absent(config.out)
    corpus = UnitCorpus(config.corpus)
    documents = corpus.documents(config.split)
    decoder, meta, fingerprint = load_language_model(config.lm, corpus, config.device)
    training = _training_corpus(config, corpus, meta)
    train_sequences = Sequences(training, training.documents(meta["config"]["split"]))

    sums = {"sum": log_likelihoods(decoder, corpus, documents, config.batch_tokens)}
    for name, order in (("unigram", 1), ("bigram", 2)):
        floor = Ngram.fit(train_sequences, corpus.num_units, order)
        sums[f"{name}_sum"] = np.array([floor.log_probabilities(sequence).sum() for sequence in Sequences(corpus, documents)])

    tokens = corpus.lengths[documents] + 1
    frames = int(corpus.num_frames[documents].sum())
    bits = {name: float(-value.sum() / math.log(2)) for name, value in sums.items()}
    num_tokens = int(tokens.sum())
    summary = {
        "split": config.split,
        "bits_per_unit": bits["sum"] / num_tokens,
        "unigram_bits_per_unit": bits["unigram_sum"] / num_tokens,
        "bigram_bits_per_unit": bits["bigram_sum"] / num_tokens,
        "uniform_bits_per_unit": math.log2(corpus.num_units + 1),
        "perplexity": 2 ** (bits["sum"] / num_tokens),
        "bits_per_frame": bits["sum"] / frames,
        "bits_per_second": bits["sum"] / frames * corpus.frame_rate_hz,
        "num_documents": len(documents),
        "num_units": num_tokens - len(documents),
        "num_tokens": num_tokens,
        "eos_counts": True,
        "seconds_of_speech": frames / corpus.frame_rate_hz,
    }
    out = Path(config.out)
    table = pa.table({"id": [corpus.ids[i] for i in documents], "num_tokens": tokens, "mean": sums["sum"] / tokens, **sums})
    with atomic_path(out / "scores.parquet") as temporary:
        pq.write_table(table, temporary)
    write_json(out / "summary.json", summary)
    parents = {"corpus": corpus.fingerprint, "lm": fingerprint, "train_corpus": training.fingerprint}
    commit(out, "scores", config.resolved(), parents, ["scores.parquet", "summary.json"])
    return summary


@torch.inference_mode()
def log_likelihoods(decoder: Decoder, corpus: UnitCorpus, documents: np.ndarray, batch_tokens: int) -> np.ndarray:
    """Natural log likelihood of each document, its EOS included: float64 (documents,).

    Documents longer than the model's context are scored in consecutive pieces, each given the one unit before it.
    """
    device = decoder.embed_tokens.weight.device
    pieces = Pieces(corpus, documents, decoder.config.context)
    sums = np.zeros(len(documents))
    with progress("score", len(documents), "document") as advance:
        for items in pieces.batches(np.argsort(-pieces.lengths, kind="stable"), batch_tokens):
            batch = pieces.collate(items)
            chosen = batch.targets != IGNORED
            hidden = decoder.hidden(batch.tokens.to(device), batch.positions.to(device), batch.documents.to(device))
            logits = decoder.logits(hidden[chosen.to(device)]).float()
            log_probabilities = logits.log_softmax(-1).gather(1, batch.targets[chosen].to(device)[:, None])[:, 0].double().cpu()
            of_pieces = torch.zeros(len(items), dtype=torch.float64).index_add_(0, batch.documents[chosen], log_probabilities)
            np.add.at(sums, pieces.owners[items], of_pieces.numpy())
            advance(len(np.unique(pieces.owners[items])))
    return sums


def _training_corpus(config: ScoreConfig, corpus: UnitCorpus, meta: dict[str, Any]) -> UnitCorpus:
    """The corpus the model was trained on; ValueError naming both fingerprints if the folder now holds another."""
    if config.train_corpus is None and corpus.fingerprint == meta["corpus"]:
        return corpus
    training = UnitCorpus(config.train_corpus or meta["config"]["corpus"])
    if training.fingerprint != meta["corpus"]:
        raise ValueError(
            f"{training.folder} has fingerprint {training.fingerprint}, but {config.lm} was trained on {meta['corpus']}; "
            "the floors need the corpus of the training: give its folder as train_corpus"
        )
    return training
