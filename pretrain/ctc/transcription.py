"""The verb `transcribe`: greedy decoding or beam search, times of what was said, alignments of transcripts,
and error rates.

What is longer than `max_seconds` goes through the encoder in windows (pretrain/ctc/windows.py). Streaming
recognisers have no such cuts: what is longer than a batch goes through them online, a chunk at a time, which
gives the same as all at once but for rounding.
"""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pretrain.ctc.alignment import write_alignments
from pretrain.ctc.decoding import Decoder, Hypothesis
from pretrain.ctc.error_rates import count_edits, error_rates
from pretrain.ctc.model import CTCBatch, LoadedRecognizer, load_recognizer
from pretrain.ctc.online import Latency, OnlineRecognizer, recognize_online
from pretrain.ctc.rates_text import as_text as as_text
from pretrain.ctc.searching import Search, decoded, open_search
from pretrain.ctc.text import TextConfig
from pretrain.ctc.transcribe_config import SCHEMA, TranscribeConfig
from pretrain.ctc.transcript_times import Clock, times_of_text, times_said
from pretrain.ctc.unit_input import LabelBatches, unit_batches
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.ctc.windows import in_windows
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import MIN_SAMPLES, SAMPLE_RATE, Utterance, Word
from pretrain.model.totals import utterance_totals
from pretrain.progress import progress
from pretrain.store.artefact import commit, require_absent
from pretrain.store.disk import atomic_path, write_json
from pretrain.training.parallel import resolve_device
from pretrain.training.step import autocast


class Said(NamedTuple):
    """What is kept of an utterance: its hypotheses, the best first, and the times of the best one's words and
    of its transcript."""

    hypotheses: list[Hypothesis]
    words: list[Word] | None = None
    aligned: list[Word] | str | None = None  # a string says why it could not be


def transcribe(config: TranscribeConfig) -> dict[str, Any]:
    """Writes `transcripts.parquet` (docs/formats.md); returns error rates over the rows with a transcript,
    and speeds.

    References are the transcripts after the recogniser's own text normalisation, or its phones. Recordings
    too short for a frame have an empty transcript, and are counted.
    """
    require_absent(config.out)
    manifest, device = Manifest(config.manifest).select(config.split), resolve_device(config.device)
    recognizer = load_recognizer(config.recognizer, config.checkpoint)
    _check(config, recognizer)
    decoder = Decoder(config.decoding, recognizer.vocabulary, recognizer.text)
    recognizer.model.to(device)
    source = _source(config, recognizer, manifest)
    rows = list(manifest)
    references = _references(rows, recognizer.text, decoder)
    clock, latency = Clock(), Latency(recognizer.model) if _streams(recognizer) else None
    with open_search(config.decoding, decoder, recognizer) as search:
        outputs = clock.timed(_log_probs(config, recognizer, source, device, latency))
        if config.tune is not None:
            kept = dict(outputs)
            table, best = _tune(config, kept, references, search)
            outputs = iter(kept.items())
        else:
            table, best = [], None

        def finish(item: int, log_probs: Tensor, hypotheses: list[Hypothesis]) -> Said:
            words = times_said(hypotheses[0], log_probs, recognizer.vocabulary) if config.words else None
            aligned = times_of_text(rows[item], log_probs, recognizer) if config.align == "text" else None
            return Said(hypotheses, words, aligned)

        said = dict(decoded(outputs, search, best, finish))
        clock.searched = search.seconds
    nothing = Said([Hypothesis("", 0.0, 0.0, None)], [] if config.words else None, "is too short for a frame")
    results = [said.get(item, nothing) for item in range(len(rows))]
    windowed = manifest.lengths[source.items] > _longest(config, recognizer)
    summary: dict[str, Any] = {
        "utterances": len(rows),
        "too_short": len(manifest) - len(source.items),
        "cut_in_windows": 0 if latency else int(windowed.sum()),
        **clock.speeds(source.seconds(np.arange(len(manifest)))),
        "notes": decoder.notes,
    }
    if config.online and latency is not None:
        summary["latency"] = latency.summary()
    if best is not None:
        summary |= {"lm_weight": best[0], "word_score": best[1], "tuning": table}
    phones = _writes_phones(recognizer.vocabulary, decoder)
    counted: Literal["words", "phones"] = "phones" if phones else "words"
    texts = [one.hypotheses[0].text for one in results]
    ids, speakers = [row.id for row in rows], [row.speaker for row in rows]
    summary |= error_rates(ids, speakers, references, texts, counted=counted)
    files = _write(config, rows, references, results, summary, recognizer.vocabulary)
    parents = {"manifest": manifest.fingerprint, "recognizer": recognizer.fingerprint}
    if isinstance(source, LabelBatches):
        parents["labels"] = source.labels.fingerprint
    commit(Path(config.out), "transcripts", config.resolved(), parents, files)
    return summary


def _check(config: TranscribeConfig, recognizer: LoadedRecognizer) -> None:
    if (config.labels is None) != (recognizer.codebook is None):
        what = "units; give their `labels`" if config.labels is None else "audio; remove `labels`"
        raise ValueError(f"labels: {config.recognizer} reads {what}")
    if config.online and not _streams(recognizer):
        raise ValueError(
            f"online: {config.recognizer} attends whole utterances; give one that was fine-tuned with "
            "`streaming`"
        )
    if (config.words or config.align or config.online) and recognizer.meta["config"].get("units", {}).get(
        "deduplicate", False
    ):
        raise ValueError(
            f"words, align, online: {config.recognizer} reads units without repeats, which do not tell the "
            "time; remove them"
        )


def _source(config: TranscribeConfig, recognizer: LoadedRecognizer, manifest: Manifest) -> SpeechBatches:
    batches = BatchConfig(
        batch_seconds=config.batch_seconds, crop_seconds=1e9, min_seconds=MIN_SAMPLES / SAMPLE_RATE
    )
    if config.labels is not None:
        return unit_batches(recognizer, config.labels, manifest, batches)
    return SpeechBatches(manifest, batches, 0, crop=False)


def _streams(recognizer: LoadedRecognizer) -> bool:
    return recognizer.model.encoder.config.streaming is not None


def _longest(config: TranscribeConfig, recognizer: LoadedRecognizer) -> float:
    """Samples of the longest recording that goes through the encoder in one piece."""
    if config.online:
        return 0
    return max(config.max_seconds, config.batch_seconds if _streams(recognizer) else 0) * SAMPLE_RATE


def _writes_phones(vocabulary: Vocabulary, decoder: Decoder) -> bool:
    return vocabulary.spelling == "phones" and not decoder.writes_words


def _references(rows: list[Utterance], text: TextConfig, decoder: Decoder) -> list[str | None]:
    """What should be written, None where it is not known and "" of silence; words where a lexicon makes words
    of phones."""
    if decoder.writes_words:
        return [None if row.text is None else text.normalize(row.text) for row in rows]
    return [None if getattr(row, text.column) is None else text.target(row) for row in rows]


# The encoder


@torch.inference_mode()
def _log_probs(
    config: TranscribeConfig,
    recognizer: LoadedRecognizer,
    source: SpeechBatches,
    device: torch.device,
    latency: Latency | None,
) -> Iterator[tuple[int, Tensor]]:
    """Row numbers and their log probabilities (frames, classes) float32 on the CPU, the shortest first."""
    longest = _longest(config, recognizer)
    items, lengths = source.items, source.lengths
    source.items = items[lengths[items] <= longest]  # those are planned in batches
    plan = [*source.plan_in_order(), *(np.array([item]) for item in items[lengths[items] > longest].tolist())]
    source.items = items

    def forward(loaded: list[np.ndarray], totals: dict[str, Tensor] | None = None) -> list[Tensor]:
        inputs, layout = source.pack(loaded)
        with autocast(config.precision, device):
            logits = recognizer.model.logits(CTCBatch.untranscribed(inputs.to(device), layout, totals))
        found = logits.float().log_softmax(2).cpu()
        return [row[:frames] for row, frames in zip(found, layout.num_frames, strict=True)]

    def load(items: np.ndarray) -> list[np.ndarray]:
        return [source.load(item, source.rng(item, -1))[0] for item in items.tolist()]

    with (
        progress("transcribe", source.seconds(items), "s audio") as advance,
        ThreadPoolExecutor(config.workers) as pool,
    ):
        waiting: deque[Future[list[np.ndarray]]] = deque()
        ahead = iter(plan)
        for batch in plan:
            while len(waiting) <= config.workers and (following := next(ahead, None)) is not None:
                waiting.append(pool.submit(load, following))
            loaded = waiting.popleft().result()
            if lengths[batch[0]] <= longest:
                found = forward(loaded)
            elif latency is not None:
                with autocast(config.precision, device):
                    found = [recognize_online(OnlineRecognizer(recognizer.model), loaded[0], latency)[1]]
            else:
                of_windows = partial(forward, totals=utterance_totals(recognizer.model.encoder, loaded[0]))
                found = [in_windows(loaded[0], config.max_seconds, config.batch_seconds, of_windows)]
            for item, log_probs in zip(batch.tolist(), found, strict=True):
                if not log_probs.isfinite().all():
                    raise ValueError(
                        f"{config.recognizer}: its outputs for {source.manifest[item].id!r} are not finite; "
                        "its training broke"
                    )
                yield item, log_probs
            advance(source.seconds(batch))


# Weights and times


def _tune(
    config: TranscribeConfig, outputs: dict[int, Tensor], references: list[str | None], search: Search
) -> tuple[list[dict[str, float]], tuple[float, float]]:
    """The WER of every pair of weights over the rows with a reference, and the pair with the lowest; of
    equals the first."""
    wanted = {item: reference for item in outputs if (reference := references[item]) is not None}
    if not any(wanted.values()):
        raise ValueError(
            "tune: no utterance of this split has a transcript with words; give one whose utterances do"
        )
    table = []
    assert config.tune is not None
    for weights in product(config.tune.lm_weight, config.tune.word_score or (config.decoding.word_score,)):
        scored = ((item, outputs[item]) for item in wanted)
        texts = dict(decoded(scored, search, weights, lambda item, log_probs, found: found[0].text))
        edits = count_edits(list(wanted.values()), [texts[item] for item in wanted])
        rate = float(edits.total.sum() / edits.reference.sum())
        table.append({"lm_weight": weights[0], "word_score": weights[1], "wer": rate})
    best = min(table, key=lambda row: row["wer"])
    return table, (best["lm_weight"], best["word_score"])


# Files


def _write(
    config: TranscribeConfig,
    rows: list[Utterance],
    references: list[str | None],
    results: list[Said],
    summary: dict[str, Any],
    vocabulary: Vocabulary,
) -> list[str]:
    """Write the table, the summary and the alignments; the names of the files. What could not be aligned is
    added to the summary."""
    folder, files = Path(config.out), ["transcripts.parquet", "summary.json"]
    is_beam = config.decoding.method == "beam"
    table = {
        "id": [row.id for row in rows],
        "speaker": [row.speaker for row in rows],
        "text": references,
        "hypothesis": [one.hypotheses[0].text for one in results],
        "score": [one.hypotheses[0].score for one in results],
        "nbest": [
            [_columns(hypothesis) for hypothesis in one.hypotheses] if is_beam else None for one in results
        ],
        "words": [None if one.words is None else [word._asdict() for word in one.words] for one in results],
    }
    with atomic_path(folder / "transcripts.parquet") as temporary:
        pq.write_table(pa.table(table, schema=SCHEMA), temporary)
    if config.align is not None:
        aligned = [
            (row.id, one.aligned)
            for row, one in zip(rows, results, strict=True)
            if isinstance(one.aligned, list)
        ]
        write_alignments(folder / "alignments.jsonl", aligned, vocabulary)
        failed = [
            {"id": row.id, "reason": one.aligned}
            for row, one in zip(rows, results, strict=True)
            if isinstance(one.aligned, str)
        ]
        with atomic_path(folder / "not_aligned.jsonl") as temporary:
            temporary.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in failed), encoding="utf-8"
            )
        summary |= {"aligned": len(aligned), "not_aligned": len(failed)}
        files += ["alignments.jsonl", "not_aligned.jsonl"]
    write_json(folder / "summary.json", summary)
    return files


def _columns(hypothesis: Hypothesis) -> dict[str, Any]:
    return {name: getattr(hypothesis, name) for name in ("text", "score", "ctc_score", "lm_score")}
