"""How much classes of frames share with phones: joint counts, PNMI, purities."""

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
        shape = len(names), self._num_classes
        counts = np.bincount(which * shape[1] + labels, minlength=shape[0] * shape[1]).reshape(shape)
        for name, row in zip(names.tolist(), counts, strict=True):
            self._rows[name] = self._rows.get(name, 0) + row

    def matrix(self) -> tuple[list[str], np.ndarray]:
        """Phones in alphabetical order, and their counts (phones, classes) int64."""
        phones = sorted(self._rows)
        rows = np.array([self._rows[phone] for phone in phones], dtype=np.int64)
        return phones, rows.reshape(-1, self._num_classes)


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy in bits of a distribution given by counts of any shape; 0 of none."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log2(p)).sum() + 0.0)


def perplexity(histogram: np.ndarray) -> float:
    """2 to the entropy in bits of a histogram: the number of classes in effective use."""
    return float(2 ** entropy_bits(histogram))


def phone_metrics(joint: np.ndarray) -> dict[str, float]:
    """Metrics of joint counts (phones, classes): with y the phone, z the class, and p over frames,

    `phone_purity` Σ_z max_y p(y,z), `cluster_purity` Σ_y max_z p(y,z), `pnmi` I(y;z)/H(y) (Hsu et al. 2021,
    equation 6; it is also homogeneity), `completeness` I/H(z), `v_measure` their harmonic mean. Where an
    entropy is zero its ratio is 1.
    """
    total = max(1, joint.sum())
    phone_bits, class_bits = entropy_bits(joint.sum(axis=1)), entropy_bits(joint.sum(axis=0))
    # Between 0 and either entropy, which rounding may miss by a bit.
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
    """PNMI of k-means units of aligned pieces (utterance, first frame, features (frames, dim)).

    It is fitted and judged on the same frames: comparable between steps of a run, a little above what
    `measure` gives on other frames. The seed decides the start; with several threads the last bits may vary.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    frames = np.concatenate([features for _, _, features in pieces]).astype(np.float32)
    if not np.isfinite(frames).all():
        return float("nan")
    kmeans = KMeans(min(num_classes, len(frames)), n_init=1, max_iter=30, random_state=seed % 2**32)
    with warnings.catch_warnings():
        # Fewer distinct frames than classes, as after a collapse.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = kmeans.fit(frames)
    joint, done = JointCounts(num_classes), 0
    for utterance, first, features in pieces:
        joint.add(utterance, fit.labels_[done : done + len(features)].astype(np.int64), first)
        done += len(features)
    return phone_metrics(joint.matrix()[1])["pnmi"]
