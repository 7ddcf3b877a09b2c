"""Recognisers in the report: error rates, which one is better, the worst speakers and utterances, the curve
of label efficiency.

It reads the outputs of `finetune`, `transcribe` and `label-efficiency`, and computes only the paired
comparison of two sets of transcripts (`pretrain.ctc.comparison`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np
import pyarrow.parquet as pq

from pretrain.ctc.comparison import compare_tables, read_transcripts
from wordless.report.run_stages import Stage

PRETRAINED, SCRATCH = "pretrained", "scratch"  # names whose comparison is put into words
RATES = ("wer", "cer")
SHOWN_EXAMPLES, SHOWN_WORST, SHOWN_SPEAKERS = 8, 4, 12
SIGNIFICANT = 0.05


def summarise_recognisers(runs: Mapping[str, Stage], transcripts: Mapping[str, Stage]) -> dict[str, Any]:
    """Under `ctc` in the report's summary.json: `wer_NAME` and `cer_NAME`, `transcripts` (counts and
    intervals of each, how decoded), `training` (the minutes of labels and the run's summary), and
    `comparisons` with `scratch`, or else the last of them."""
    ctc: dict[str, Any] = {}
    for name, stage in transcripts.items():
        scores = stage.read()
        ctc |= {f"{rate}_{name}": scores[rate] for rate in RATES if rate in scores}
        kept = {
            key: value for key, value in scores.items() if key not in ("worst", "by_speaker", "confusions")
        }
        config = stage.meta["config"]
        decoding = config.get("decoding")
        if "tuning" in scores:  # the weights that were found, in place of the config's
            found = {key: scores[key] for key in ("lm_weight", "word_score")}
            decoding = {**decoding, **found, "tuned": True}
        more = {"split": config["split"], "decoding": decoding_in_words(decoding)}
        ctc.setdefault("transcripts", {})[name] = {**kept, **more}
    for name, stage in runs.items():
        # Older versions have the minutes in the config.
        minutes = stage.meta.get("label_minutes", stage.meta["config"].get("label_minutes"))
        budget = stage.meta["config"].get("budget")
        ctc.setdefault("training", {})[name] = {"label_minutes": minutes, "budget": budget, **stage.read()}
    scored = [name for name in transcripts if f"wer_{name}" in ctc]
    if len(scored) > 1:
        baseline = SCRATCH if SCRATCH in scored else scored[-1]
        ctc["comparisons"] = {
            name: {"baseline": baseline, **compared(transcripts[name], transcripts[baseline])}
            for name in scored
            if name != baseline
        }
    return ctc


def compared(stage: Stage, baseline: Stage) -> dict[str, Any]:
    """`wer_difference` (below 0: better than the baseline), its interval and p-value; or `reason`, where the
    two cannot be compared."""
    try:
        found = compare_tables(
            read_transcripts(baseline.folder)[0], read_transcripts(stage.folder)[0], draws=1000
        )
    except ValueError as error:  # of other utterances, or of other references: a report may well hold both
        return {"reason": str(error)}
    words = found["wer"]
    return {
        "utterances": found["utterances"],
        "wer_difference": words["difference"],
        "wer_difference_interval": words["interval"],
        "p_value": words["permutation_p"],
    }


def decoding_in_words(decoding: Mapping[str, Any] | None) -> str:
    """How texts were found, after "decoded"; None: by a version that knew no other way."""
    if decoding is None or decoding["method"] == "greedy":
        return "greedily, without a language model"
    if decoding.get("lm") is None:
        return "by beam search, without a language model" + (
            " but with a lexicon" if decoding.get("lexicon") else ""
        )
    of = {"words": "", "symbols": " of symbols"}[decoding.get("lm_of", "words")]
    weights = (
        f"weight {decoding['lm_weight']:g}, word score {decoding['word_score']:g}, beam "
        f"{decoding['beam_size']}"
    )
    weights += "; both weights chosen on these utterances" if decoding.get("tuned") else ""
    return f"by beam search with the language model{of} {Path(decoding['lm']).name} ({weights})"


def recognisers_in_words(ctc: Mapping[str, Any], same: float) -> list[str]:
    """Whether pretraining helped, where both are there; differences that chance would bring are not called
    better or worse."""
    if f"wer_{PRETRAINED}" not in ctc or f"wer_{SCRATCH}" not in ctc:
        return []
    pretrained, scratch = ctc[f"wer_{PRETRAINED}"], ctc[f"wer_{SCRATCH}"]
    found = ctc.get("comparisons", {}).get(PRETRAINED, {})
    interval, p = found.get("wer_difference_interval"), found.get("p_value")
    if abs(pretrained - scratch) < same:
        verdict = "makes no difference to"
    elif p is not None and p >= SIGNIFICANT:
        verdict = "makes no certain difference to"
    else:
        verdict = "helps" if pretrained < scratch else "hurts"
    sure = (
        f" (95% interval of the difference {points(interval)}, p {p_value(p)})"
        if interval and p is not None
        else ""
    )
    of = ctc.get("transcripts", {}).get(PRETRAINED, {}).get("counted", "words")
    return [
        f"Pretraining {verdict} the recogniser: {pretrained:.1%} of {of} wrong, {scratch:.1%} from random "
        f"weights{sure}."
    ]


def transfer_in_words(transfer: Mapping[str, Any]) -> list[str]:
    """The two ends of the curve."""
    if not transfer:
        return []
    test = first_test(transfer)[0]["test"]
    compared = [
        c
        for c in transfer["comparisons"]
        if (c["test"], c["system"]) == (test, PRETRAINED) and c["baseline"] == SCRATCH
    ]
    if not compared:
        return []
    better = [c["budget"] for c in compared if c["wer_difference"] < 0 and c["p_value"] < SIGNIFICANT]
    at = "every budget" if len(better) == len(compared) else f"{len(better)} of {len(compared)} budgets"
    ends = ", ".join(
        f"{difference(c['wer_difference'])} points with {c['budget']}"
        for c in (compared[:1] + compared[1:][-1:])
    )
    rate = "phone" if first_test(transfer)[0].get("counted") == "phones" else "word"
    return [f"On {test}, pretraining lowers the {rate} error rate beyond chance at {at} of labels ({ends})."]


def points(interval: Sequence[float]) -> str:
    """An interval of a difference of rates, in percentage points."""
    return f"{difference(interval[0])} to {difference(interval[1])} points"


def difference(rate: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    return f"{rate * 100:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(p: float) -> str:
    """`= 0.031`, or `< 0.0001`."""
    return f"= {p:.2g}" if p >= 1e-4 else "< 0.0001"


class Example(NamedTuple):
    """An utterance, and by name what recognisers wrote: (word, is right) pairs and, where they are known, the
    times of the words."""

    id: str
    text: str
    hypotheses: dict[str, list[tuple[str, bool]]]
    times: dict[str, str]


def transcript_examples(transcripts: Mapping[str, Stage], count: int = SHOWN_EXAMPLES) -> list[Example]:
    """Utterances spread evenly over those that all transcripts have."""
    tables = {
        name: pq.read_table(stage.folder / "transcripts.parquet").to_pylist()
        for name, stage in transcripts.items()
    }
    by_id = {name: {row["id"]: row for row in rows} for name, rows in tables.items()}
    rows = [
        row
        for row in next(iter(tables.values()), [])
        if row["text"] and all(row["id"] in known for known in by_id.values())
    ]
    chosen = (
        [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))] if rows else []
    )
    return [
        Example(
            row["id"],
            row["text"],
            {name: mark_words(row["text"], known[row["id"]]["hypothesis"]) for name, known in by_id.items()},
            {
                name: word_times(words)
                for name, known in by_id.items()
                if (words := known[row["id"]].get("words"))
            },
        )
        for row in chosen
    ]


def worst_examples(
    transcripts: Mapping[str, Stage], count: int = SHOWN_WORST
) -> dict[str, list[dict[str, Any]]]:
    """By name the utterances with the most edits: `id`, `speaker`, `edits`, `reference`, and `words` as
    (word, is right)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, stage in transcripts.items():
        rows = stage.read().get("worst", [])[:count]
        marked = [{**row, "words": [(word, False) for word in row["hypothesis"].split()]} for row in rows]
        found[name] = [
            {**row, "words": mark_words(row["reference"], row["hypothesis"])} if row["reference"] else row
            for row in marked
        ]  # nothing is right where nothing was said
    return {name: rows for name, rows in found.items() if rows}


def speaker_table(transcripts: Mapping[str, Stage]) -> list[dict[str, Any]]:
    """Speakers, those with the highest WER of the first recogniser first: `speaker`, `words`, `utterances`,
    and `wer` by name."""
    tables = {name: table for name, stage in transcripts.items() if (table := stage.read().get("by_speaker"))}
    if not tables:
        return []
    first = next(iter(tables.values()))
    order = sorted(first, key=lambda speaker: (-(first[speaker]["wer"] or 0.0), speaker))
    return [
        {
            "speaker": speaker,
            "words": first[speaker]["reference_words"],
            "utterances": first[speaker]["utterances"],
            "wer": {name: table.get(speaker, {}).get("wer") for name, table in tables.items()},
        }
        for speaker in order
    ]


def word_times(words: Sequence[Mapping[str, Any]]) -> str:
    """Words with the seconds they begin and end at."""
    return "  ".join(f"{word['word']} {word['start']:.2f}\N{EN DASH}{word['end']:.2f}" for word in words)


def mark_words(reference: str, hypothesis: str) -> list[tuple[str, bool]]:
    """The hypothesis' words, each with whether WER's alignment counts it as right."""
    aligned = jiwer.process_words(reference, hypothesis)
    right = {
        i
        for chunk in aligned.alignments[0]
        if chunk.type == "equal"
        for i in range(chunk.hyp_start_idx, chunk.hyp_end_idx)
    }
    return [(word, i in right) for i, word in enumerate(aligned.hypotheses[0])]


def first_test(transfer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of the test that the curve is drawn of; none without a transfer."""
    curve = transfer.get("curve", [])
    return [point for point in curve if point["test"] == curve[0]["test"]]


def transfer_rows(transfer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For the table: `test`, `budget`, `label_minutes` and by system `points` of the curve and `compared`
    with the baseline."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for point in transfer.get("curve", []):
        row = rows.setdefault(
            (point["test"], point["budget"]),
            {"points": {}, "compared": {}, **{k: point[k] for k in ("test", "budget")}},
        )
        row["points"][point["system"]] = point
        row.setdefault("label_minutes", point["label_minutes"])
    for comparison in transfer.get("comparisons", []):
        rows[comparison["test"], comparison["budget"]]["compared"][comparison["system"]] = comparison
    return list(rows.values())
