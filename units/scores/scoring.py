"""The verb `score`: how likely a unit language model finds held-out documents, and which of two recordings it
finds likelier.

Without a `suite`, the documents of a split are scored, beside unigram, bigram and trigram floors
(units/scores/ngram.py). With one (units/scores/suites.py), its minimal pairs are, and beside the floors
stands a fourth: length alone, where the shorter is preferred.

The probability of a document is that of u1 .. un EOS given BOS: EOS counts as one predicted token of every
document, for the model and for the floors alike. The floors are estimated on the split that the model was
trained on and judged on the very same tokens; of several streams (levels, text on the frame grid) they are
n-grams of each stream by itself, summed. `bits_per_token` divides by predicted tokens; `bits_per_unit` by
units and EOS together, with unit BPE undone, so that it can be compared across vocabularies (of a corpus with
text, its pieces, PADs and markers count there as units do); `bits_per_second` and `bits_per_frame` divide the
same bits by how long what is scored lasts, and so describe which units come, not how long each lasts.
Intervals are 95 % bootstrap intervals over documents, for pairs over items.

Documents of the very same tokens are scored once, in an order that their tokens decide: two recordings with
the same units tie exactly, and neither the order of the corpus nor that of the gold moves a bit.
"""

import csv
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.store.artefact import commit, require_absent
from pretrain.store.disk import atomic_path, write_json
from units.corpus.sequences import Sequences
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import LoadedLM, load_language_model, log_likelihoods
from units.lm.training import LossOn, scored_symbols
from units.scores.ngram import Ngram
from units.scores.pairs import bootstrap, outcomes, summarise
from units.scores.score_config import ScoreConfig
from units.scores.suites import Joined, Pair, join, read_suite

FLOORS = {"unigram": 1, "bigram": 2, "trigram": 3}


class Scores(NamedTuple):
    """Of some documents, all (documents,) but the last two."""

    documents: np.ndarray  # their numbers in the corpus
    digests: np.ndarray  # equal where the tokens are
    num_tokens: np.ndarray  # predicted and scored, EOS included
    num_units: np.ndarray  # scored units, unit BPE undone; of several levels every code is one
    # the other scored symbols but EOS: pieces of text, PADs, the markers of spans
    num_text_symbols: np.ndarray
    num_frames: np.ndarray | None  # that the scored symbols last; None if nobody knows
    sums: dict[str, np.ndarray]  # natural log likelihood under "lm" and each floor
    per_stream: np.ndarray  # scored tokens of each stream without EOS, (documents, streams)


def score(config: ScoreConfig) -> dict[str, Any]:
    """Write `summary.json`, `scores.parquet`, `scores.txt` (ZeroSpeech's `filename score`) and, of a suite,
    `pairs.parquet`.

    Errors: ValueError for a model of other units than the corpus has, recordings of the suite that the corpus
    lacks, a training corpus that is not there any more.
    """
    require_absent(config.out)
    corpus = UnitCorpus(config.corpus)
    pairs: list[Pair] = []
    if config.suite is None:
        documents = corpus.documents(config.split)
    else:
        pairs = read_suite(config.suite, config.gold, corpus.ids)
        joined = join(pairs, corpus.ids, config.corpus)
        documents = np.unique(np.concatenate([joined.positive, joined.negative]))
    lm = load_language_model(config.lm, corpus, config.device)
    training = _training_corpus(config, corpus, lm.meta)
    scores, floor_tokens = _scores(config, corpus, documents, lm, training)

    out, files = Path(config.out), ["scores.parquet", "scores.txt", "summary.json"]
    if config.suite is None:
        names = _filenames([corpus.ids[i] for i in documents])
        summary = {"split": config.split, **_likelihood(config, corpus, scores)}
    else:
        named = dict(zip(joined.positive.tolist(), [pair.positive for pair in pairs], strict=True))
        named |= dict(zip(joined.negative.tolist(), [pair.negative for pair in pairs], strict=True))
        names = [named[i] for i in documents.tolist()]
        values = _outcomes(config, scores, joined)
        summary = {"suite": config.suite, "by": config.by, **_accuracy(config, scores, pairs, joined, values)}
        with atomic_path(out / "pairs.parquet") as temporary:
            pq.write_table(_pair_table(corpus, scores, pairs, joined, values), temporary)
        files.append("pairs.parquet")
    long = int((Sequences(corpus, documents, lm.pattern).lengths > lm.decoder.config.context).sum())
    summary |= {"num_longer_than_context": long, "floor_tokens": floor_tokens}

    own = scores.sums["lm"]
    means = own / scores.num_tokens
    floors = {f"{name}_sum": scores.sums[name] for name in FLOORS}
    columns = {
        "id": [corpus.ids[i] for i in documents],
        "num_tokens": scores.num_tokens,
        "mean": means,
        "sum": own,
        **floors,
    }
    with atomic_path(out / "scores.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary)
    with (
        atomic_path(out / "scores.txt") as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        # a name with a space is quoted, as pandas reads it
        lines = csv.writer(file, delimiter=" ", lineterminator="\n")
        lines.writerows(zip(names, (means if config.by == "mean" else own).tolist(), strict=True))
    write_json(out / "summary.json", summary)
    parents = {"corpus": corpus.fingerprint, "lm": lm.fingerprint, "train_corpus": training.fingerprint}
    commit(out, "scores", config.resolved(), parents, files)
    return summary


def _scores(
    config: ScoreConfig, corpus: UnitCorpus, documents: np.ndarray, lm: LoadedLM, training: UnitCorpus
) -> tuple[Scores, int]:
    """Everything that is counted of the documents, and how many tokens the floors are estimated on."""
    score_on: LossOn = config.score_on or lm.meta.get("loss_on", lm.meta["config"].get("loss_on", "all"))
    scored = scored_symbols(lm.vocabulary, lm.pattern, score_on)
    of_streams = _scored_of_streams(lm.vocabulary, score_on)
    digests = np.array(
        [hashlib.blake2b(corpus.tokens(i).tobytes(), digest_size=16).hexdigest() for i in documents]
    )
    _, firsts, inverse = np.unique(digests, return_index=True, return_inverse=True)
    distinct = documents[firsts]

    sequences = Sequences(corpus, distinct, lm.pattern)
    sums = {"lm": log_likelihoods(lm.decoder, lm.pattern, sequences, config.batch_tokens, scored)}
    if not np.isfinite(sums["lm"]).all():
        worst = corpus.ids[distinct[int(np.flatnonzero(~np.isfinite(sums["lm"]))[0])]]
        raise ValueError(
            f"{config.lm}: the likelihood of document {worst!r} is not a number: the training diverged"
        )
    train_documents = training.documents(lm.meta["split"])
    drawn = np.random.default_rng(config.seed).permutation(train_documents)
    enough = (
        np.searchsorted(np.cumsum(training.lengths[drawn]) * training.num_streams, config.floor_tokens) + 1
    )
    fitted = np.sort(drawn[:enough])
    for name, order in FLOORS.items():
        sums[name] = np.zeros(len(distinct))
        for stream, size in enumerate(corpus.vocabulary.sizes):
            floor = Ngram.fit(StreamSequences(training, fitted, stream), size, order, ends=stream == 0)
            sums[name] += floor.log_likelihoods(StreamSequences(corpus, distinct, stream), of_streams[stream])

    per_stream = np.array([_count(corpus.tokens(i), of_streams) for i in distinct], np.int64)
    spoken = [of_streams[0] & np.append(corpus.vocabulary.unit_counts > 0, [False, False]), *of_streams[1:]]
    units = np.array([sum(_count(corpus.tokens(i), spoken)) for i in distinct], np.int64)
    text = per_stream.sum(1) - units
    if corpus.vocabulary.merges:
        units = corpus.num_units_of[distinct]
    num_tokens = per_stream.sum(1) + 1
    every = {name: values[inverse] for name, values in sums.items()}
    floor_tokens = int(training.lengths[fitted].sum()) * training.num_streams
    counts = (num_tokens[inverse], units[inverse], text[inverse], _num_frames(corpus, documents, of_streams))
    return Scores(documents, digests, *counts, every, per_stream[inverse]), floor_tokens


class StreamSequences(Sequence[np.ndarray]):
    """One stream of some documents as n-grams read it: BOS, its symbols and, of stream 0, EOS; int64
    (steps,)."""

    def __init__(self, corpus: UnitCorpus, documents: np.ndarray, stream: int):
        self.corpus, self.documents, self.stream = corpus, documents, stream

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: Any) -> Any:
        tokens = self.corpus.tokens(self.documents[i])
        size = self.corpus.vocabulary.sizes[self.stream]
        symbols = tokens.reshape(len(tokens), -1)[:, self.stream]
        return np.concatenate([[size], symbols, [size + 1] if self.stream == 0 else []]).astype(np.int64)


def _scored_of_streams(vocabulary: Vocabulary, score_on: LossOn) -> list[np.ndarray]:
    """Which symbols of each stream count, BOS and EOS behind them: (size + 2,) bool each."""
    every = [np.ones(size, bool) for size in vocabulary.sizes]
    if score_on != "all":
        every = [vocabulary.is_text(stream) == (score_on == "text") for stream in range(len(every))]
    return [np.append(symbols, [False, True]) for symbols in every]


def _count(tokens: np.ndarray, of_streams: list[np.ndarray]) -> list[int]:
    table = tokens.reshape(len(tokens), -1)
    return [int(scored[table[:, stream]].sum()) for stream, scored in enumerate(of_streams)]


def _num_frames(corpus: UnitCorpus, documents: np.ndarray, of_streams: list[np.ndarray]) -> np.ndarray | None:
    """How many frames the scored symbols of each document last, int64 (documents,); None if nobody knows."""
    if not corpus.timed:
        return None
    if corpus.vocabulary.layout != "interleaved":  # in a grid every frame has both, text (or PAD) and units
        return corpus.num_frames[documents]
    lasting = [corpus.durations(i)[of_streams[0][corpus.tokens(i)]].sum(dtype=np.int64) for i in documents]
    return np.array(lasting, np.int64)


def _likelihood(config: ScoreConfig, corpus: UnitCorpus, scores: Scores) -> dict[str, Any]:
    """The summary of a split."""
    names = list(scores.sums)
    bits = np.stack([-scores.sums[name] for name in names], axis=1) / math.log(2)  # (documents, scorers)
    ends = len(scores.documents)
    units = scores.num_units + scores.num_text_symbols + 1

    def per_unit(sums: np.ndarray) -> np.ndarray:
        """Bits per unit of each scorer, then by how many the bigram has more than the model."""
        rates = sums[:, :-1] / sums[:, -1:]
        return np.concatenate([rates, rates[:, names.index("bigram"), None] - rates[:, :1]], axis=1)

    columns = np.column_stack([bits, units])
    values = per_unit(columns.sum(0)[None])[0].tolist()
    intervals = bootstrap(columns, per_unit, config.bootstrap, config.seed).T.tolist()
    totals, num_tokens = bits.sum(0), int(scores.num_tokens.sum())
    of_stream = np.log2([size + (stream == 0) for stream, size in enumerate(corpus.vocabulary.sizes)])
    uniform = scores.per_stream.sum(0) @ of_stream + ends * of_stream[0]
    frames = None if scores.num_frames is None else int(scores.num_frames.sum())
    return {
        "bits_per_unit": values[0],
        **{f"{name}_bits_per_unit": value for name, value in zip(names[1:], values[1:-1], strict=True)},
        "uniform_bits_per_unit": float(uniform / units.sum()),
        "bits_per_unit_ci95": intervals[0],
        **{
            f"{name}_bits_per_unit_ci95": interval
            for name, interval in zip(names[1:], intervals[1:-1], strict=True)
        },
        "bits_below_bigram": values[-1],
        "bits_below_bigram_ci95": intervals[-1],
        "bits_per_token": float(totals[0] / num_tokens),
        "perplexity": float(2 ** (totals[0] / num_tokens)),
        "bits_per_frame": float(totals[0] / frames) if frames else None,
        "bits_per_second": float(totals[0] / frames * corpus.frame_rate_hz) if frames else None,
        "num_documents": ends,
        "num_units": int(scores.num_units.sum()),
        "num_text_symbols": int(scores.num_text_symbols.sum()),
        "num_tokens": num_tokens,
        "eos_counts": True,
        "seconds_of_speech": frames / corpus.frame_rate_hz if frames else None,
    }


def _outcomes(config: ScoreConfig, scores: Scores, joined: Joined) -> dict[str, np.ndarray]:
    """Outcomes (pairs,) by scorer: the model and the floors as `by` has it, then both as the other rule has
    it (`lm_sum`, ...)."""
    positive, negative = (
        np.searchsorted(scores.documents, rows) for rows in (joined.positive, joined.negative)
    )
    other = "sum" if config.by == "mean" else "mean"

    def judged(values: np.ndarray) -> np.ndarray:
        return outcomes(values[positive], values[negative])

    found = {}
    for rule, suffix in ((config.by, ""), (other, f"_{other}")):
        for name, sums in scores.sums.items():
            found[name + suffix] = judged(sums / scores.num_tokens if rule == "mean" else sums)
        if not suffix:
            found["length"] = judged(-scores.num_tokens)
    return found


def _accuracy(
    config: ScoreConfig, scores: Scores, pairs: list[Pair], joined: Joined, values: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The summary of a suite."""
    told = summarise(pairs, values, config.bootstrap, config.seed)
    positive, negative = (
        scores.digests[np.searchsorted(scores.documents, rows)] for rows in (joined.positive, joined.negative)
    )
    headline = told["scorers"]["lm"]
    return {
        "accuracy": headline["accuracy"],
        "accuracy_ci95": headline["ci95"],
        **told,
        "num_identical_pairs": int((positive == negative).sum()),
        "num_unused_documents": joined.num_unused,
    }


def _pair_table(
    corpus: UnitCorpus, scores: Scores, pairs: list[Pair], joined: Joined, values: dict[str, np.ndarray]
) -> pa.Table:
    """A row per pair: what it is, its two log likelihoods and token counts, and every scorer's outcome."""
    columns: dict[str, Any] = {"item": [pair.item for pair in pairs]}
    for side, rows in (("positive", joined.positive), ("negative", joined.negative)):
        at = np.searchsorted(scores.documents, rows)
        columns[side] = [corpus.ids[i] for i in rows]
        columns |= {f"{side}_sum": scores.sums["lm"][at], f"{side}_num_tokens": scores.num_tokens[at]}
    for grouping in dict.fromkeys(key for pair in pairs for key in pair.groups):
        columns[f"group_{grouping}"] = pa.array([pair.groups.get(grouping) for pair in pairs], pa.string())
    return pa.table(columns | {f"outcome_{name}": value for name, value in values.items()})


def _filenames(ids: list[str]) -> list[str]:
    """Ids as ZeroSpeech names files: without their folders, as long as that tells them apart."""
    names = [name.rpartition("/")[2] for name in ids]
    return names if len(set(names)) == len(names) else ids


def _training_corpus(config: ScoreConfig, corpus: UnitCorpus, meta: dict[str, Any]) -> UnitCorpus:
    """The corpus the model was trained on; ValueError naming both fingerprints if the folder now holds
    another."""
    if config.train_corpus is None and corpus.fingerprint == meta["corpus"]:
        return corpus
    needed = "the floors need the corpus of the training: give its folder as train_corpus"
    try:
        training = UnitCorpus(config.train_corpus or meta["corpus_folder"])
    except ValueError as error:
        raise ValueError(f"{error}; {needed}") from None
    if training.fingerprint != meta["corpus"]:
        raise ValueError(
            f"{training.folder} has fingerprint {training.fingerprint}, but {config.lm} was trained on "
            f"{meta['corpus']}; {needed}"
        )
    return training
