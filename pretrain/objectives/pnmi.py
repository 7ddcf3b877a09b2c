"""What classes of frames tell of phones: joint counts, PNMI and purities, and the PNMI of a layer's features while it trains."""

import warnings
from collections.abc import Sequence

import numpy as np

from pretrain.data.utterance import Utterance, phone_frames


class JointCounts:
    """Frames by phone and class, collected utterance by utterance."""

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._rows: dict[str, np.ndarray] = {}

    def add(self, utterance: Utterance, labels: np.ndarray, first: int = 0) -> None:
        """Labels (frames,) of an aligned utterance, or of a piece of it that begins at frame `first`."""
        assert utterance.phones is not None
        phones = phone_frames(utterance.phones, first + len(labels))[first:]
        names, which = np.unique(phones, return_inverse=True)
        pairs, counts = np.unique(which * self._num_classes + labels, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            name = str(names[pair // self._num_classes])
            row = self._rows.setdefault(name, np.zeros(self._num_classes, dtype=np.int64))
            row[pair % self._num_classes] += count

    def matrix(self) -> tuple[list[str], np.ndarray]:
        """Phones in alphabetical order, and their counts (phones, classes) int64."""
        phones = sorted(self._rows)
        return phones, np.array([self._rows[phone] for phone in phones], dtype=np.int64).reshape(
            -1, self._num_classes
        )


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of a distribution given by counts of any shape; 0 of none."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log2(p)).sum() + 0.0)


def phone_metrics(joint: np.ndarray) -> dict[str, float]:
    """Of joint counts (phones, classes): with y the phone and z the class, and p over frames,

    `phone_purity` Σ_z max_y p(y,z), `cluster_purity` Σ_y max_z p(y,z), `pnmi` I(y;z)/H(y) (Hsu et al. 2021, equation 6; it
    is also homogeneity), `completeness` I/H(z), `v_measure` their harmonic mean. A zero entropy leaves nothing to tell: 1.
    """
    total = max(1, joint.sum())
    phone_bits, class_bits = entropy_bits(joint.sum(axis=1)), entropy_bits(joint.sum(axis=0))
    # Between nothing and all there is of either, which rounding may miss by a bit.
    shared = min(max(0.0, phone_bits + class_bits - entropy_bits(joint)), phone_bits, class_bits)
    pnmi = shared / phone_bits if phone_bits else 1.0
    completeness = shared / class_bits if class_bits else 1.0
    return {
        "pnmi": pnmi,
        "phone_purity": float(joint.max(axis=0, initial=0).sum() / total),
        "cluster_purity": float(joint.max(axis=1, initial=0).sum() / total),
        "completeness": completeness,
        "v_measure": 2 * pnmi * completeness / (pnmi + completeness) if pnmi + completeness else 0.0,
    }


def pnmi_of_features(
    pieces: Sequence[tuple[Utterance, int, np.ndarray]], num_classes: int, seed: int
) -> float:
    """PNMI of k-means units of aligned pieces (utterance, first frame, features (frames, dim)), fitted and judged on the same frames.

    A number to watch while an encoder trains: comparable between steps of a run, a little above what `measure` gives on other
    frames. The seed decides the start; with several threads the last bits may vary.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    frames = np.concatenate([features for _, _, features in pieces]).astype(np.float32)
    if not np.isfinite(frames).all():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct frames than classes, as after a collapse
        fit = KMeans(min(num_classes, len(frames)), n_init=1, max_iter=30, random_state=seed % 2**32).fit(
            frames
        )
    joint, done = JointCounts(num_classes), 0
    for utterance, first, features in pieces:
        joint.add(utterance, fit.labels_[done : done + len(features)].astype(np.int64), first)
        done += len(features)
    return phone_metrics(joint.matrix()[1])["pnmi"]
