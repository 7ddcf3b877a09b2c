"""Error rates of transcripts: edits of words (WER) and of characters (CER), by utterance, speaker and word,
with intervals.

An error rate is the least number of substituted, inserted and deleted words (characters) that turn hypotheses
into references, over the words of the references, summed over the corpus: what `jiwer` gives, and a test
holds this to it. Where the transcripts are phones each phone is a word: `wer` is then the phone error rate,
and there is no `cer`. In scripts without spaces between words a whole sentence is one word, WER says only
whether it is right, and CER is the measure.

Intervals are percentile bootstraps (Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR
performance evaluation", ICASSP 2004): what is drawn again are utterances, or speakers, whose utterances have
a voice in common and are less evidence than as many of strangers. The intervals say how much another test set
of the same kind would differ, not another training run.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

Counted = Literal["words", "phones", "characters"]

NUM_WORST = 20  # utterances and confusions that a summary lists
MIN_SPEAKERS = 3  # to draw again; with fewer the interval would be the two speakers themselves
CELLS = 2**24  # counts that are drawn at a time: 128 MB


class Edits(NamedTuple):
    """Counts by utterance, (utterances,) int64 each."""

    hits: np.ndarray
    substitutions: np.ndarray
    insertions: np.ndarray
    deletions: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """All edits of each utterance."""
        return self.substitutions + self.insertions + self.deletions

    @property
    def reference(self) -> np.ndarray:
        """Tokens of each reference."""
        return self.hits + self.substitutions + self.deletions


class Confusions(NamedTuple):
    """How often what was said instead of what, left out, and put in; of one of the least sets of edits,
    always the same one."""

    substitutions: Counter[tuple[str, str]]
    deletions: Counter[str]
    insertions: Counter[str]


def count_edits(
    references: Sequence[str],
    hypotheses: Sequence[str],
    counted: Counted = "words",
    confusions: Confusions | None = None,
) -> Edits:
    """The edits of each pair of texts, and into `confusions` of what; spaces are characters, too."""
    counts = np.zeros((4, len(references)), np.int64)
    for number, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        wanted, got = (
            (reference, hypothesis) if counted == "characters" else (reference.split(), hypothesis.split())
        )
        substitutions = deletions = insertions = 0
        for edit in Levenshtein.editops(wanted, got):
            if edit.tag == "replace":
                substitutions += 1
                if confusions is not None:
                    confusions.substitutions[wanted[edit.src_pos], got[edit.dest_pos]] += 1
            elif edit.tag == "delete":
                deletions += 1
                if confusions is not None:
                    confusions.deletions[wanted[edit.src_pos]] += 1
            else:
                insertions += 1
                if confusions is not None:
                    confusions.insertions[got[edit.dest_pos]] += 1
        counts[:, number] = len(wanted) - substitutions - deletions, substitutions, insertions, deletions
    return Edits(*counts)


def resample(columns: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Sums (draws, columns) float64 over as many rows of `columns` (rows, columns) as there are, drawn with
    replacement.

    Rows that are equal are drawn as one, by how often each value comes up (a multinomial): the same
    distribution with far fewer random numbers, and the draws do not depend on the order of the rows.
    """
    values, counts = np.unique(columns, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    at_once = max(1, CELLS // len(values))
    sizes = [min(at_once, draws - start) for start in range(0, draws, at_once)]
    shares = counts / counts.sum()
    return np.concatenate(
        [rng.multinomial(len(columns), shares, size) @ values.astype(np.float64) for size in sizes]
    )


def interval(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int, seed: int
) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic of column sums over resampled rows; None of a single row, which
    tells nothing."""
    if len(columns) < 2:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        found = statistic(resample(columns, draws, seed))
    # not finite: a draw of empty references alone
    low, high = np.percentile(found[np.isfinite(found)], (2.5, 97.5))
    return float(low), float(high)


def sum_by(names: Sequence[str], columns: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names, sorted, and the sums of each one's rows: (rows, columns) to (names, columns)."""
    distinct, owners = np.unique(np.array(names, dtype=object), return_inverse=True)
    sums = np.zeros((len(distinct), columns.shape[1]), columns.dtype)
    np.add.at(sums, owners, columns)
    return distinct.tolist(), sums


def drawable_speakers(speakers: Sequence[str | None]) -> list[str] | None:
    """The speaker of every row where all are known and there are enough of them to draw again, or None."""
    known = [speaker for speaker in speakers if speaker is not None]
    return known if len(known) == len(speakers) and len(set(known)) >= MIN_SPEAKERS else None


def error_rates(
    ids: Sequence[str],
    speakers: Sequence[str | None],
    references: Sequence[str | None],
    hypotheses: Sequence[str],
    *,
    counted: Literal["words", "phones"] = "words",
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What summary.json tells of a transcript (docs/formats.md); empty where no reference has a word.

    A reference of None is not known and not scored; an empty one says that nothing was said, and all words of
    its hypothesis are insertions. With phones, there is nothing of characters. Intervals are [low, high],
    null where one utterance is all there is; those over speakers are given where every scored utterance has
    one and there are at least three.
    """
    scored = [row for row, reference in enumerate(references) if reference is not None]
    wanted, got = [references[row] or "" for row in scored], [hypotheses[row] for row in scored]
    known = [speakers[row] for row in scored]
    confusions = Confusions(Counter(), Counter(), Counter())
    edits = {"wer": count_edits(wanted, got, counted, confusions)}
    if not edits["wer"].reference.any():
        return {}
    if counted == "words":
        edits["cer"] = count_edits(wanted, got, "characters")
    summary: dict[str, Any] = {"counted": counted, "scored_utterances": len(scored)}
    drawable = drawable_speakers(known)
    for rate, counts in edits.items():
        columns = np.stack([counts.total, counts.reference], axis=1)
        summary[rate] = _rate(columns.sum(axis=0))
        summary[f"{rate}_interval"] = _listed(interval(columns, _rate, draws, seed))
        if drawable is not None:
            summary[f"{rate}_interval_speakers"] = _listed(
                interval(sum_by(drawable, columns)[1], _rate, draws, seed)
            )
    words = edits["wer"]
    summary |= {
        name: int(getattr(words, name).sum()) for name in ("hits", "substitutions", "insertions", "deletions")
    }
    summary |= {
        "reference_words": int(words.reference.sum()),
        "hypothesis_words": int((words.hits + words.substitutions + words.insertions).sum()),
        **({"reference_characters": int(edits["cer"].reference.sum())} if "cer" in edits else {}),
        "utterances_correct": int((words.total == 0).sum()),
        "empty_hypotheses": sum(not hypothesis.split() for hypothesis in got),
        "empty_references": int((words.reference == 0).sum()),
        "insertions_of_empty_references": int(words.insertions[words.reference == 0].sum()),
        "by_speaker": _by_speaker(known, edits),
        "worst": _worst([ids[row] for row in scored], known, wanted, got, words),
        "confusions": {
            "substitutions": [[*pair, count] for pair, count in _commonest(confusions.substitutions)],
            "deletions": [[word, count] for word, count in _commonest(confusions.deletions)],
            "insertions": [[word, count] for word, count in _commonest(confusions.insertions)],
        },
    }
    return summary


def _rate(sums: np.ndarray) -> Any:
    return sums[..., 0] / sums[..., 1] if sums.ndim > 1 else float(sums[0] / sums[1])


def _listed(bounds: tuple[float, float] | None) -> list[float] | None:
    return None if bounds is None else list(bounds)


def _by_speaker(speakers: Sequence[str | None], edits: dict[str, Edits]) -> dict[str, dict[str, Any]]:
    """Rates and counts of each speaker; those of unknown speakers are in no row."""
    rows = [row for row, speaker in enumerate(speakers) if speaker is not None]
    names = [speaker for speaker in speakers if speaker is not None]
    words = edits["wer"]
    columns = [np.ones_like(words.hits), words.reference, *words[1:]]
    if "cer" in edits:
        columns += [edits["cer"].total, edits["cer"].reference]
    table: dict[str, dict[str, Any]] = {}
    for name, sums in zip(*sum_by(names, np.stack(columns, axis=1)[rows]), strict=True):
        utterances, reference, substitutions, insertions, deletions, *characters = sums.tolist()
        table[name] = {
            "utterances": utterances,
            "reference_words": reference,
            "wer": (substitutions + insertions + deletions) / reference if reference else None,
            **({"cer": characters[0] / characters[1] if characters[1] else None} if characters else {}),
            "substitutions": substitutions,
            "insertions": insertions,
            "deletions": deletions,
        }
    return table


def _worst(
    ids: Sequence[str],
    speakers: Sequence[str | None],
    references: Sequence[str],
    hypotheses: Sequence[str],
    edits: Edits,
) -> list[dict[str, Any]]:
    """Those with the most edits, of equals the shorter reference first."""
    total, words = edits.total, edits.reference
    order = sorted(np.flatnonzero(total).tolist(), key=lambda row: (-total[row], words[row], ids[row]))
    return [
        {
            "id": ids[row],
            "speaker": speakers[row],
            "edits": int(total[row]),
            "reference_words": int(words[row]),
            "reference": references[row],
            "hypothesis": hypotheses[row],
        }
        for row in order[:NUM_WORST]
    ]


def _commonest(counts: Counter[Any]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_WORST]


# For a terminal
