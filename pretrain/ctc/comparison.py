"""The verb `compare`: whether one recogniser is better than another on the same utterances.

The two transcripts of each utterance are joined by id. The result, for words and for characters, is the
difference of the error rates, b minus a (below 0: b is better), with
- its paired bootstrap interval, and the probability of improvement, the share of resampled test sets on which
  b is better (Bisani & Ney, 2004); a tie counts half;
- the p-value of a sign-flip permutation test: were the systems alike, either transcript of an utterance could
  as well be the other's, so every difference of edits could have the other sign. All 2^n patterns are
  counted, not sampled: see `sign_flip_p`;
- the p-value of the matched-pairs test (Gillick & Cox, ICASSP 1989) with utterances as the segments, a normal
  approximation. Where there are three speakers or more, the interval and the permutation test are also over
  speakers in place of utterances.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from pretrain.config import Config, PathStr, Seed
from pretrain.ctc.error_rates import Counted, count_edits, drawable_speakers, resample, sum_by
from pretrain.ctc.rates_text import format_columns
from pretrain.store.artefact import commit, read_meta, require_absent
from pretrain.store.disk import write_json

SMALLEST_P = 1e-10  # what rounding leaves exact
NUM_SHOWN = 20  # utterances that differ most, each way


class CompareConfig(Config):
    """Two folders of transcripts (`transcribe`) of the same utterances."""

    out: PathStr
    a: PathStr
    b: PathStr
    names: tuple[str, str] = Field(("a", "b"), description="what tables call the two")
    draws: int = Field(10_000, ge=100, description="resampled test sets behind the intervals")
    seed: Seed = 0

    @field_validator("names")
    @classmethod
    def _tell_them_apart(cls, names: tuple[str, str]) -> tuple[str, str]:
        if names[0] == names[1]:
            raise ValueError(f"both are {names[0]!r}; give the two different names")
        return names


class Transcripts(NamedTuple):
    """What `compare` needs of a folder of transcripts, by row."""

    ids: list[str]
    speakers: list[str | None]
    references: list[str | None]
    hypotheses: list[str]
    counted: Counted = "words"  # what the references are made of, words or phones


def read_transcripts(folder: str | Path) -> tuple[Transcripts, str]:
    """The transcripts that `transcribe` wrote into `folder`, and their fingerprint."""
    meta = read_meta(folder, "transcripts")
    columns = pq.read_table(
        Path(folder) / "transcripts.parquet", columns=["id", "speaker", "text", "hypothesis"]
    ).to_pydict()
    counted = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")).get("counted", "words")
    table = Transcripts(columns["id"], columns["speaker"], columns["text"], columns["hypothesis"], counted)
    return table, meta["fingerprint"]


def compare(config: CompareConfig) -> dict[str, Any]:
    """Write summary.json, which is what this returns: see `compare_tables`."""
    require_absent(config.out)
    (a, of_a), (b, of_b) = read_transcripts(config.a), read_transcripts(config.b)
    try:
        summary = compare_tables(a, b, names=config.names, draws=config.draws, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"{config.a} and {config.b}: {error}") from None
    write_json(Path(config.out) / "summary.json", summary)
    commit(Path(config.out), "comparison", config.resolved(), {"a": of_a, "b": of_b}, ["summary.json"])
    return summary


def compare_tables(
    a: Transcripts, b: Transcripts, *, names: Sequence[str] = ("a", "b"), draws: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Error rates of both on their common utterances, and `wer` and `cer` with tests, as the module's
    docstring defines them.

    Utterances of one side only, and those without a reference, are counted and left out. Raises ValueError
    for different references and for no utterance in common.
    """
    pairs = _common(a, b)
    scored = [(one, other) for one, other in pairs if a.references[one] is not None]
    references = [a.references[one] or "" for one, _ in scored]
    hypotheses = [a.hypotheses[one] for one, _ in scored], [b.hypotheses[other] for _, other in scored]
    kinds: dict[str, Counted] = {"wer": a.counted} | ({"cer": "characters"} if a.counted == "words" else {})
    edits = {
        rate: [count_edits(references, texts, counted) for texts in hypotheses]
        for rate, counted in kinds.items()
    }
    if not scored or not edits["wer"][0].reference.any():
        raise ValueError(
            "no utterance has a reference; `compare` needs transcripts of speech whose text is known"
        )
    summary: dict[str, Any] = {
        "names": list(names),
        "counted": a.counted,
        "utterances": len(scored),
        "unscored": len(pairs) - len(scored),
        "only_a": len({*a.ids}) - len(pairs),
        "only_b": len({*b.ids}) - len(pairs),
        "reference_words": int(edits["wer"][0].reference.sum()),
    }
    drawable = drawable_speakers([a.speakers[one] for one, _ in scored])
    for rate, (of_a, of_b) in edits.items():
        columns = np.stack([of_a.total, of_b.total, of_a.reference], axis=1)
        summary[rate] = paired_test(columns, draws, seed)
        if drawable is not None:
            by_speaker = paired_test(sum_by(drawable, columns)[1], draws, seed)
            summary[rate] |= {f"{key}_speakers": by_speaker[key] for key in ("interval", "permutation_p")}
    gained = edits["wer"][1].total - edits["wer"][0].total
    for name, count in (("better", gained < 0), ("worse", gained > 0), ("same", gained == 0)):
        summary[name] = int(count.sum())
    for name, sign in (("improved", 1), ("worsened", -1)):
        shown = min(NUM_SHOWN, int((sign * gained < 0).sum()))
        rows = np.argsort(sign * gained, kind="stable")[:shown].tolist()
        columns_of = [a.ids[scored[row][0]] for row in rows], [int(gained[row]) for row in rows]
        texts_of = [[texts[row] for row in rows] for texts in (references, *hypotheses)]
        keys = "id", "edits", "reference", "a", "b"
        summary[name] = [
            dict(zip(keys, row, strict=True)) for row in zip(*columns_of, *texts_of, strict=True)
        ]
    return summary


def _common(a: Transcripts, b: Transcripts) -> list[tuple[int, int]]:
    """The rows of both of their common utterances, by id."""
    if a.counted != b.counted:
        raise ValueError(
            f"one is of {a.counted} and the other of {b.counted}; transcribe both with the same kind of text"
        )
    rows_a, rows_b = ({name: row for row, name in enumerate(side.ids)} for side in (a, b))
    ids = sorted(rows_a.keys() & rows_b.keys())
    if not ids:
        raise ValueError(
            f"no utterance in common: one has {a.ids[:1]}, the other {b.ids[:1]}; transcribe the same split "
            "with both"
        )
    pairs = [(rows_a[name], rows_b[name]) for name in ids]
    if different := [pair for pair in pairs if a.references[pair[0]] != b.references[pair[1]]]:
        one, other = different[0]
        raise ValueError(
            f"{len(different)} references differ, such as that of {a.ids[one]!r}: {a.references[one]!r} and "
            f"{b.references[other]!r}; transcribe both from one manifest, with recognisers of the same "
            "`text` settings"
        )
    return pairs


def paired_test(columns: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    """Of columns edits of a, edits of b and reference tokens, (rows, 3) int64: rates, difference b minus a,
    interval and tests.

    `a` and `b` (the rates), `difference`, `interval` and `probability_of_improvement` (both None of one row),
    `permutation_p` and `matched_pairs_p`.
    """
    edits_a, edits_b, tokens = columns.sum(axis=0).tolist()
    differences = columns[:, 1] - columns[:, 0]
    found: dict[str, Any] = {
        "a": edits_a / tokens,
        "b": edits_b / tokens,
        "difference": (edits_b - edits_a) / tokens,
    }
    found |= {"interval": None, "probability_of_improvement": None}
    if len(columns) > 1:
        sums = resample(np.stack([differences, columns[:, 2]], axis=1), draws, seed)
        sums = sums[sums[:, 1] > 0]
        found["interval"] = np.percentile(sums[:, 0] / sums[:, 1], (2.5, 97.5)).tolist()
        found["probability_of_improvement"] = float(np.mean((sums[:, 0] < 0) + 0.5 * (sums[:, 0] == 0)))
    return found | {
        "permutation_p": sign_flip_p(differences),
        "matched_pairs_p": matched_pairs_p(differences),
    }


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the sum of whole numbers (rows,) where every sign is a coin's: P(|sum of flipped|
    >= |sum|).

    Exact, for any number of rows: the sum of coins ±d has the characteristic function Π cos(d θ), and the
    discrete Fourier transform of that at as many angles as there are possible sums is their distribution.
    Rounding is below SMALLEST_P, the least that is returned.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    reach = int((sizes * counts).sum())  # sums lie in -reach to reach
    if reach == 0:
        return 1.0
    angles = 2 * np.pi * np.arange(2 * reach + 1) / (2 * reach + 1)
    characteristic = np.ones(len(angles))
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        characteristic *= np.cos(size * angles) ** count
    # of the sums 0, 1, ..., reach, -reach, ..., -1
    probabilities = np.fft.fft(characteristic).real / len(angles)
    observed = abs(int(differences.sum()))
    if observed == 0:
        return 1.0
    return float(np.clip(2 * probabilities[observed : reach + 1].sum(), SMALLEST_P, 1.0))


def matched_pairs_p(differences: np.ndarray) -> float:
    """Two-sided p-value of their mean against 0 by the normal approximation, which is for some fifty rows and
    more.

    1 of fewer than two or where nothing differs, SMALLEST_P at the least.
    """
    if len(differences) < 2 or not differences.any():
        return 1.0
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    z = abs(float(differences.mean())) / error if error > 0 else math.inf
    return max(SMALLEST_P, math.erfc(z / math.sqrt(2)))


def as_text(summary: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    a, b = summary["names"]
    rows = [["", a, b, "difference", "95 % interval", f"P({b} better)", "p, permutation", "p, matched pairs"]]
    for rate, name in (("wer", "PER" if summary["counted"] == "phones" else "WER"), ("cer", "CER")):
        if found := summary.get(rate):
            rows.append(
                [
                    name,
                    f"{found['a']:.2%}",
                    f"{found['b']:.2%}",
                    f"{found['difference']:+.2%}",
                    _interval(found["interval"]),
                    ""
                    if found["probability_of_improvement"] is None
                    else f"{found['probability_of_improvement']:.3f}",
                    format_p(found["permutation_p"]),
                    format_p(found["matched_pairs_p"]),
                ]
            )
            if "interval_speakers" in found:
                over = [
                    _interval(found["interval_speakers"]),
                    "",
                    format_p(found["permutation_p_speakers"]),
                    "",
                ]
                rows.append(["  over speakers", "", "", "", *over])
    counts = f"{summary['utterances']} utterances, {summary['reference_words']} {summary['counted']}: "
    counts += (
        f"{b} has fewer edits in {summary['better']}, more in {summary['worse']}, as many in "
        f"{summary['same']}"
    )
    left = {"unscored": "without a reference", "only_a": f"only in {a}", "only_b": f"only in {b}"}
    missing = [f"{summary[key]} {text}" for key, text in left.items() if summary[key]]
    return "\n".join(
        [format_columns(rows, right=True), counts, *([f"left out: {', '.join(missing)}"] if missing else [])]
    )


def format_p(p: float) -> str:
    """Two digits of a p-value."""
    return f"< {SMALLEST_P:g}" if p <= SMALLEST_P else f"{p:.2g}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"[{bounds[0]:+.2%}, {bounds[1]:+.2%}]" if bounds else ""
