"""What a linear classifier can read from units or features: the phone of a frame, and the speaker of an
utterance.

Units should tell the phone and not the speaker. Both probes learn on some utterances and are judged on
others; what cannot be done (one speaker, no phones) comes back as {"reason": why} instead of figures. A
regression that stops at `MAX_ITERATIONS` adds `stopped`, True, to its figures.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_ITERATIONS = 100  # of L-BFGS: the last digits of a probe are not worth the minutes
MIN_PER_SPEAKER = 2  # utterances: one to learn from and one to be judged on
# names (frames,) of str, "" where there is none; features (frames, dim) or labels (frames,)
Frames = tuple[np.ndarray, np.ndarray]


def pooled(features: np.ndarray) -> np.ndarray:
    """An utterance's features (frames, dim) by their mean, (dim,) float64; zeros of none."""
    return features.sum(axis=0, dtype=np.float64) / max(1, len(features))


def histogram(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The share of an utterance's labels (frames,) that each class has, (num_classes,) float64; zeros of
    none."""
    return np.bincount(labels.astype(np.int64), minlength=num_classes) / max(1, len(labels))


def split_utterances(speakers: Sequence[str | None], *, seed: int = 0) -> np.ndarray:
    """Which utterances to learn from, (utterances,) bool: half of each speaker's (the larger half), drawn by
    the seed."""
    rng = np.random.default_rng(seed)
    training = np.zeros(len(speakers), bool)
    for mine in _by_name(speakers).values():
        training[rng.permutation(mine)[: (len(mine) + 1) // 2]] = True
    return training


def speaker_probe(vectors: np.ndarray, speakers: Sequence[str | None], *, seed: int = 0) -> dict[str, Any]:
    """How well the speaker is told from a vector for each utterance, (utterances, dim): unit histograms or
    mean features.

    Multinomial logistic regression, speakers weighted alike, on standardised vectors of half of each
    speaker's utterances. `speaker_accuracy` is the mean over speakers of the share of their other utterances
    that is told right, `speaker_chance` what guessing gives, 1 / `num_speakers`; `speaker_utterances` is how
    many are judged. Speakers with one utterance, and utterances without a speaker, are left out; with fewer
    than two speakers left there is a `reason` instead.
    """
    assert len(vectors) == len(speakers)
    kept = [
        mine for name, mine in _by_name(speakers).items() if name is not None and len(mine) >= MIN_PER_SPEAKER
    ]
    if len(kept) < 2:
        return {
            "reason": f"{len(kept)} speakers with {MIN_PER_SPEAKER} or more utterances; telling speakers "
            "apart needs two"
        }
    chosen = np.concatenate(kept)
    truth = np.repeat(np.arange(len(kept)), [len(mine) for mine in kept])
    training = split_utterances(speakers, seed=seed)[chosen]
    found, stopped = _regression(
        vectors[chosen[training]], truth[training], vectors[chosen[~training]], balanced=True
    )
    right = found == truth[~training]
    shares = np.bincount(truth[~training], right) / np.bincount(truth[~training])
    return {
        "speaker_accuracy": float(shares.mean()),
        "speaker_chance": 1 / len(kept),
        "num_speakers": len(kept),
        "speaker_utterances": len(right),
        **stopped,
    }


def phone_probe(
    train: Sequence[Frames], test: Sequence[Frames], *, max_frames: int = 20_000, seed: int = 0
) -> dict[str, Any]:
    """How well the phone of a single frame is told, of (phones, frames) by utterance; learnt on `train` and
    judged on `test`.

    Of labels (frames,), integers, by the commonest phone of each unit in `train`: no linear classifier of
    one-hot vectors is right more often there. Of features (frames, dim) by multinomial logistic regression on
    standardised features, at most `max_frames` of train and of test, drawn by the seed. `phone_accuracy` and
    `phone_majority`, that of always naming train's commonest phone, are shares of the `phone_frames` judged.
    Frames without a phone, "", are left out; a phone that only `test` has is never told.
    """
    return _frame_probe(_known(train), _known(test), "phone", "phone", max_frames, seed)


def speaker_frame_probe(
    train: Sequence[tuple[str, np.ndarray]],
    test: Sequence[tuple[str, np.ndarray]],
    *,
    max_frames: int = 20_000,
    seed: int = 0,
) -> dict[str, Any]:
    """As `phone_probe`, of (speaker, frames) by utterance: how well the speaker is told from a single frame
    or unit.

    The harder question of the two: a few seconds of anything tell a few voices apart.
    `speaker_frame_accuracy`, `speaker_frame_majority` and `speaker_frames`, or a `reason`. Train and test
    hold other utterances of the same speakers.
    """
    learnt, judged = (
        _known([(np.full(len(frames), speaker), frames) for speaker, frames in half])
        for half in (train, test)
    )
    return _frame_probe(learnt, judged, "speaker", "speaker_frame", max_frames, seed)


def _frame_probe(
    learnt: Frames | None, judged: Frames | None, what: str, key: str, max_frames: int, seed: int
) -> dict[str, Any]:
    """Accuracy, that of train's commonest name, and frames judged, of the names of frames, or why there is
    none."""
    if learnt is None or judged is None:
        return {"reason": f"no frames with a {what} to {'learn from' if learnt is None else 'be judged on'}"}
    names, truth = np.unique(learnt[0], return_inverse=True)
    if len(names) < 2:
        return {"reason": f"one {what} only ({names[0]})"}
    numbers = {name: number for number, name in enumerate(names.tolist())}
    wanted = np.array([numbers.get(name, -1) for name in judged[0].tolist()])
    majority = int(np.bincount(truth).argmax())
    stopped: dict[str, bool] = {}
    if learnt[1].ndim == 1:
        found = _commonest(learnt[1], truth, judged[1], majority)
    else:
        rng = np.random.default_rng(seed)
        mine, theirs = (np.sort(rng.permutation(len(frames))[:max_frames]) for _, frames in (learnt, judged))
        wanted = wanted[theirs]
        found, stopped = _regression(learnt[1][mine], truth[mine], judged[1][theirs], balanced=False)
    return {
        f"{key}_accuracy": float((found == wanted).mean()),
        f"{key}_majority": float((wanted == majority).mean()),
        f"{what}_frames": len(wanted),
        **stopped,
    }


def _by_name(names: Sequence[str | None]) -> dict[str | None, np.ndarray]:
    """Places of each name, names in alphabetical order."""
    places: dict[str | None, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return {
        name: np.array(places[name])
        for name in sorted(places, key=lambda name: (name is not None, name or ""))
    }


def _known(pieces: Sequence[Frames]) -> Frames | None:
    """Names and frames of all pieces, where there is a name; None where there are none at all."""
    assert all(len(names) == len(frames) for names, frames in pieces)
    kept = [(names[names != ""], frames[names != ""]) for names, frames in pieces if (names != "").any()]
    return (
        (np.concatenate([names for names, _ in kept]), np.concatenate([frames for _, frames in kept]))
        if kept
        else None
    )


def _commonest(labels: np.ndarray, truth: np.ndarray, judged: np.ndarray, otherwise: int) -> np.ndarray:
    """For each of `judged` the commonest class that its label has in training; `otherwise` where it does not
    occur there."""
    num_labels = 1 + max(int(labels.max()), int(judged.max()))
    num_classes = int(truth.max()) + 1
    counts = np.bincount(labels.astype(np.int64) * num_classes + truth, minlength=num_labels * num_classes)
    counts = counts.reshape(num_labels, num_classes)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), otherwise)[judged]


def _regression(
    train: np.ndarray, truth: np.ndarray, test: np.ndarray, *, balanced: bool
) -> tuple[np.ndarray, dict[str, bool]]:
    """Classes (test,) by logistic regression learnt on train (n, dim), standardised by train's mean and
    deviation; `stopped`, if it was."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    for vectors in (train, test):
        if not np.isfinite(vectors).all():
            raise ValueError("probe: NaN or infinity in the features")
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    deviation[deviation == 0] = 1  # a unit that train never has
    train, test = (((vectors - mean) / deviation).astype(np.float32) for vectors in (train, test))
    model = LogisticRegression(class_weight="balanced" if balanced else None, max_iter=MAX_ITERATIONS)
    # One thread: the many small products of L-BFGS are ten times slower on two that share a busy machine.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by `stopped`
        found = np.asarray(model.fit(train, truth).predict(test))
    return found, {"stopped": True} if model.n_iter_.max() >= MAX_ITERATIONS else {}
