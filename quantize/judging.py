"""ABX and probes of one draw of utterances: of their units, centroids, or features of a layer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pretrain.data.utterance import SAMPLE_RATE, Utterance, phone_frames
from pretrain.progress import progress
from quantize.abx import Distance, Mode, abx
from quantize.codebook import Codebook
from quantize.features import FeatureSource
from quantize.phone_tokens import Context, phone_items
from quantize.probes import (
    MAX_ITERATIONS,
    histogram,
    phone_probe,
    pooled,
    speaker_frame_probe,
    speaker_probe,
    split_utterances,
)
from quantize.subsample import frame_file, require_finite

T = TypeVar("T")

# Tokens of a phone in a context and speakers of x, as in Libri-light; frames that a probe learns from.
FULL = 10, 5, 10_000
BRIEF = 5, 3, 5_000
FEW_CELLS = 100  # of ABX: below, its error is a rough number, and a note says so


class Judge:
    """ABX and probes of one set of utterances: of their units, centroids, or features of a layer.

    Measures that cannot be computed (no phones, one speaker, too few tokens) are left out; `notes` has the
    reasons. `brief`: for comparing layers, with fewer triples and frames, no ABX of units, and the speaker
    probe of units only.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        *,
        use_abx: bool = True,
        context: Context = "triphone",
        distance: Distance = "angular",
        use_probes: bool = True,
        silence: Collection[str] = (),
        seed: int = 0,
        brief: bool = False,
    ):
        self.utterances, self.notes, self.brief = utterances, list[str](), brief
        self.distance, self._seed = distance, seed
        self._max_group, self._max_x_across, self._probe_frames = BRIEF if brief else FULL
        self._aligned = any(utterance.phones is not None for utterance in utterances)
        if not self._aligned:
            self._note("no phone alignments: PNMI, purities, ABX and the phone probe need them")
        use_abx = use_abx and self._aligned
        self._items = phone_items(utterances, context=context, silence=silence) if use_abx else None
        self._speakers = [utterance.speaker for utterance in utterances]
        self._training = split_utterances(self._speakers, seed=seed) if use_probes else None

    @property
    def ids(self) -> list[str]:
        return [utterance.id for utterance in self.utterances]

    def of_units(self, labels: Mapping[str, np.ndarray], num_classes: int) -> dict[str, float]:
        """Of labels (frames,) by utterance: `abx_within`, `abx_across`; `phone_accuracy` and `phone_majority`
        (its chance); `speaker_accuracy` and `speaker_chance`, of an utterance by its shares of the units;
        `speaker_frame_accuracy` and `speaker_frame_majority`, of a single unit."""
        found = {} if self.brief else self.abx(labels, "discrete")
        return (
            found | self.phones(labels) | self.speakers(labels, lambda units: histogram(units, num_classes))
        )

    def of_features(self, features: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of features (frames, dim): the same under keys that end in `_features`, of an utterance by its
        mean, without chances."""
        found = self.phones(features)
        if not self.brief:
            found |= self.speakers(features, pooled)
        accuracies = {f"{key}_features": value for key, value in found.items() if key.endswith("accuracy")}
        return self.abx(features, self.distance, "_features") | accuracies

    def abx(
        self, features: Mapping[str, np.ndarray], distance: Distance, suffix: str = ""
    ) -> dict[str, float]:
        """ABX error rates, `abx_within` and `abx_across` and the suffix."""
        scores: dict[str, float] = {}
        modes: tuple[Mode, ...] = ("within", "across")
        if self._items is None:
            return scores
        for mode in modes:
            groups, speakers = self._max_group, self._max_x_across
            options: dict[str, Any] = {"max_group": groups, "max_x_across": speakers, "seed": self._seed}
            score = abx(self._items, features, mode=mode, distance=distance, **options)
            if score.error is None:
                self._note(f"no ABX {mode}: {score.reason}")
            else:
                scores[f"abx_{mode}{suffix}"] = score.error
                if score.num_cells < FEW_CELLS:
                    self._note(
                        f"ABX {mode} rests on {score.num_cells} comparisons of phones in a context only"
                    )
        return scores

    def phones(self, frames: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Accuracy of the phone probe, on frames."""
        if self._training is None or not self._aligned:
            return {}
        pieces = [
            (phone_frames(utterance.phones, len(frames[utterance.id])), frames[utterance.id])
            if utterance.phones
            else None
            for utterance in self.utterances
        ]
        found = phone_probe(*self._halves(pieces), max_frames=self._probe_frames, seed=self._seed)
        return self._unless_reason("phone probe", found, ("phone_accuracy", "phone_majority"))

    def speakers(
        self, frames: Mapping[str, np.ndarray], vector: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, float]:
        """Accuracy of the speaker probes: on an utterance's vector, (frames, …) to (dim,), and on frames."""
        if self._training is None:
            return {}
        found = speaker_probe(
            np.stack([vector(frames[name]) for name in self.ids]), self._speakers, seed=self._seed
        )
        known = self._unless_reason("speaker probe", found, ("speaker_accuracy", "speaker_chance"))
        if not known:
            return {}
        named = zip(self._speakers, self.ids, strict=True)
        pieces = [None if speaker is None else (speaker, frames[name]) for speaker, name in named]
        found = speaker_frame_probe(*self._halves(pieces), max_frames=self._probe_frames, seed=self._seed)
        return known | self._unless_reason(
            "speaker probe of frames", found, ("speaker_frame_accuracy", "speaker_frame_majority")
        )

    def _halves(self, pieces: Sequence[T | None]) -> tuple[list[T], list[T]]:
        """The pieces of the utterances to learn from, and of those to be judged on; None is left out."""
        assert self._training is not None
        halves: tuple[list[T], list[T]] = [], []
        for piece, training in zip(pieces, self._training, strict=True):
            if piece is not None:
                halves[0 if training else 1].append(piece)
        return halves

    def _unless_reason(self, what: str, found: Mapping[str, Any], keys: Sequence[str]) -> dict[str, float]:
        if "reason" in found:
            self._note(f"no {what}: {found['reason']}")
            return {}
        if found.get("stopped"):
            self._note(
                f"a {what} stopped after {MAX_ITERATIONS} iterations: with more, its accuracy could differ a "
                "little"
            )
        return {key: float(found[key]) for key in keys}

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def judge_features(
    judge: Judge,
    units: Mapping[str, np.ndarray],
    codebook: Codebook,
    source: FeatureSource,
    folder: str | Path,
) -> dict[str, Any]:
    """ABX and probes of the features of a judge's utterances, ABX of their centroids, and the loss by
    quantising.

    `units` are labels (frames, levels) by utterance. `quantisation_error` is the mean squared distance of a
    frame to the sum of its centroids, over the variance of the frames: 1 is the error of the frames' mean
    alone. Spherical centroids are directions, without such a distance. Features and centroids are in an
    unnamed file in `folder` meanwhile.
    """
    spherical = bool(codebook.meta["config"].get("spherical"))
    total = sum(utterance.num_frames for utterance in judge.utterances)
    stored = frame_file(folder, (2, total, codebook.dim))
    features, centroids = dict[str, np.ndarray](), dict[str, np.ndarray]()
    errors, squares, sums, done = np.zeros(codebook.num_levels), 0.0, np.zeros(codebook.dim), 0
    seconds = sum(utterance.length for utterance in judge.utterances) / SAMPLE_RATE
    with progress("features", total=seconds, unit="s") as advance:
        for utterance, found in source.features(judge.utterances):
            require_finite(utterance, found)
            levels = units[utterance.id]
            count = min(len(found), len(levels))  # labels may be one frame short
            found, levels, used = found[:count], levels[:count], slice(done, done + count)
            stored[0, used], stored[1, used] = found, codebook.decode(levels)
            features[utterance.id], centroids[utterance.id] = stored[0, used], stored[1, used]
            done = used.stop
            advance(utterance.length / SAMPLE_RATE)
            if spherical:
                continue
            residual = found.astype(np.float64) - codebook.mean
            squares, sums = squares + np.square(residual).sum(), sums + residual.sum(axis=0)
            for level, centroid in enumerate(codebook.centroids):
                residual -= centroid[levels[:, level]]
                errors[level] += np.square(residual).sum()
    scores: dict[str, Any] = {}
    if spherical:
        judge.notes.append(
            "no quantisation error: the codebook is spherical, and its centroids are directions"
        )
    else:
        variance = squares - np.square(sums).sum() / max(1, done)
        relative = [float(error / variance) if variance > 0 else 0.0 for error in errors]
        scores = {"quantisation_error": relative[-1]}
        scores |= {"quantisation_error_by_level": relative} if len(relative) > 1 else {}
    return scores | judge.abx(centroids, judge.distance, "_centroids") | judge.of_features(features)
