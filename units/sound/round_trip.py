"""How many units survive being spoken: sounds made of units are encoded again and compared with the
recordings' own units."""

from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from pretrain.data.utterance import SAMPLE_RATE, Utterance
from quantize.codebook import Codebook
from quantize.extraction import Extraction, open_source
from units.corpus.sequence import deduplicate
from units.corpus.unit_corpus import UnitCorpus


class RoundTrip:
    """The codebook and the features that it quantises, to encode the sounds again as their originals were."""

    def __init__(self, codebook: str, encoder: str | None, corpus: UnitCorpus):
        self.corpus, self.codebook = corpus, Codebook.open(codebook)
        if self.codebook.fingerprint != corpus.codebook:
            raise ValueError(
                f"codebook: {codebook} is codebook {self.codebook.fingerprint}, and {corpus.folder} has "
                f"units of codebook {corpus.codebook}; give the one that its labels were encoded with"
            )
        self.source = open_source(self.codebook, encoder, Extraction())

    def measure(self, folder: Path, lines: list[dict[str, Any]]) -> dict[str, float]:
        """How much of the units comes back, of every kind of sound that was made of recorded utterances.

        `frame_agreement_KIND` is the share of frames with the same label (level 0), for kinds that last as
        long as the recording; `unit_error_rate_KIND` the edits between deduplicated units over those of the
        recordings, all levels together. Beside them the floors: always the unit with most frames, and the
        units of another of the utterances. `copy` is the ceiling.
        """
        kinds = ("copy", "resynthesis", "resynthesis-predicted")
        rows = [line for line in lines if line["kind"] in kinds]
        sounds = [
            Utterance(
                line["id"],
                str(folder / line["audio_filepath"]),
                0,
                round(line["duration"] * SAMPLE_RATE),
                SAMPLE_RATE,
            )
            for line in rows
        ]
        again: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
        for line, (_, features) in zip(rows, self.source.features(sounds), strict=True):
            labels = self.codebook.assign(features)
            again[line["kind"]].append(labels.reshape(len(labels), -1)[:, : self.corpus.num_levels])
        names = dict.fromkeys(line["document"] for line in rows)
        recorded = [self.corpus.frames(self.corpus.index(name)) for name in names]
        recorded = [frames.reshape(len(frames), -1) for frames in recorded]
        found: dict[str, float] = {}
        for kind, labels_of in again.items():
            if not labels_of:
                continue
            name = kind.replace("-", "_")
            found[f"unit_error_rate_{name}"] = unit_error_rate(recorded, labels_of)
            if kind != "resynthesis-predicted":
                found[f"frame_agreement_{name}"] = frame_agreement(recorded, labels_of)
            else:
                found["duration_ratio"] = sum(map(len, labels_of)) / sum(map(len, recorded))
        first = np.concatenate(recorded)[:, 0]
        found["frame_agreement_commonest_unit"] = float(np.bincount(first).max() / len(first))
        if len(recorded) > 1:
            found["unit_error_rate_another_utterance"] = unit_error_rate(
                recorded, recorded[1:] + recorded[:1]
            )
        return {"documents": len(recorded), **found}


def frame_agreement(recorded: list[np.ndarray], heard: list[np.ndarray]) -> float:
    """Share of frames with the same label at level 0; both are lists of (frames, levels) of the same
    lengths."""
    return float(np.concatenate([a[:, 0] == b[:, 0] for a, b in zip(recorded, heard, strict=True)]).mean())


def unit_error_rate(recorded: list[np.ndarray], heard: list[np.ndarray]) -> float:
    """Insertions, deletions and substitutions over the units of `recorded`, summed over utterances of
    (frames, levels) labels."""
    edits = total = 0
    for frames, others in zip(recorded, heard, strict=True):
        reference, hypothesis = (
            [tuple(unit) for unit in deduplicate(labels)[0].tolist()] for labels in (frames, others)
        )
        edits += Levenshtein.distance(reference, hypothesis)
        total += len(reference)
    return edits / total
