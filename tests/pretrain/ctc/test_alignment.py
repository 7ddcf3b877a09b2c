import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ctc.alignment import Span, forced_alignment, stretch, word_times, write_alignments
from pretrain.ctc.vocabulary import Vocabulary, collapse
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import HOP, MIN_SAMPLES, SAMPLE_RATE, Word, phone_frames
from quantize.measuring import MeasureConfig, measure


def emit(path: list[int], num_classes: int) -> torch.Tensor:
    """Log probabilities that are sure of a path."""
    scores = torch.full((len(path), num_classes), -20.0)
    scores[torch.arange(len(path)), torch.tensor(path)] = 0.0
    return scores.log_softmax(1)


def spans_of(path: np.ndarray, log_probs: np.ndarray) -> list[Span]:
    """Of a path of classes, a frame each."""
    runs, start = [], 0
    for name, group in itertools.groupby(path.tolist()):
        end = start + len(list(group))
        if name:
            runs.append(Span(start, end, float(log_probs[np.arange(start, end), name].mean())))
        start = end
    return runs


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(2, 3),
    st.lists(st.integers(1, 2), max_size=4).map(tuple),
)
def test_the_alignment_is_the_best_of_all_paths(
    seed: int, frames: int, num_classes: int, wanted: tuple[int, ...]
) -> None:
    log_probs = (
        3 * torch.randn(frames, num_classes, generator=torch.Generator().manual_seed(seed))
    ).log_softmax(1)
    classes = np.minimum(np.array(wanted, np.int64), num_classes - 1)
    paths = np.array(list(itertools.product(range(num_classes), repeat=frames)))
    spelling = [np.array_equal(collapse(path), classes) for path in paths]
    if not any(spelling):
        with pytest.raises(ValueError, match=rf"do not fit {frames} frames"):
            forced_alignment(log_probs, classes)
        return
    scores = log_probs.double().numpy()[np.arange(frames), paths].sum(axis=1)
    best = paths[np.where(spelling, scores, -np.inf).argmax()]
    found, expected = forced_alignment(log_probs, classes), spans_of(best, log_probs.double().numpy())
    assert [(span.start, span.end) for span in found] == [(span.start, span.end) for span in expected]
    # float64 means of at most six numbers
    assert [span.score for span in found] == pytest.approx([span.score for span in expected], abs=1e-12)


def slow_score(log_probs: np.ndarray, classes: np.ndarray) -> float:
    """The best path's log probability, by recursion over frames and symbols written as plain dictionaries."""
    states = [0] + [state for number in classes.tolist() for state in (number, 0)]
    best = {0: log_probs[0, 0], 1: log_probs[0, states[1]]}
    for frame in log_probs[1:]:
        reached: dict[int, float] = {}
        for state, score in best.items():
            for step in (0, 1, 2):
                onward = state + step
                if onward < len(states) and (
                    step < 2 or (states[onward] != 0 and states[onward] != states[state])
                ):
                    reached[onward] = max(reached.get(onward, -math.inf), score + frame[states[onward]])
        best = reached
    return float(max(best.get(len(states) - 1, -math.inf), best.get(len(states) - 2, -math.inf)))


def test_long_alignments_have_the_score_of_a_slow_search() -> None:
    rng = np.random.default_rng(0)
    for frames, symbols in (
        (300, 140),
        (200, 3),
        (281, 200),
    ):  # more than 127 states, most frames blank, hardly a frame to spare
        classes = rng.integers(1, 30, symbols)
        log_probs = torch.from_numpy(rng.normal(size=(frames, 30))).log_softmax(1)
        spans = forced_alignment(log_probs, classes)
        path = np.zeros(frames, np.int64)
        for span, number in zip(spans, classes.tolist(), strict=True):
            path[span.start : span.end] = number
        assert np.array_equal(collapse(path), classes)
        score = log_probs.numpy()[np.arange(frames), path].sum()
        # float64 sums of 300 numbers
        assert score == pytest.approx(slow_score(log_probs.numpy(), classes), abs=1e-9)


def test_ties_are_broken_the_same_way_every_time() -> None:
    spans = forced_alignment(torch.zeros(8, 4), np.array([1, 1, 2]))
    # Read from the end, a state is stayed in as long as it may: all the frames to spare are the last
    # symbol's.
    assert [(span.start, span.end) for span in spans] == [(0, 1), (2, 3), (3, 8)]


def test_a_repeated_symbol_has_a_blank_between() -> None:
    log_probs = torch.log(torch.tensor([[0.01, 0.99]] * 5))
    (first, second) = forced_alignment(log_probs, np.array([1, 1]))
    assert second.start == first.end + 1 and second.end - first.start == 5


def test_an_empty_text_has_no_spans() -> None:
    assert forced_alignment(torch.zeros(3, 2), np.zeros(0, np.int64)) == []
    assert word_times([], np.zeros(0, np.int64), Vocabulary(["a"]), 3) == []


@pytest.mark.parametrize(
    ("log_probs", "classes", "message"),
    [
        (torch.zeros(3, 3), [1, 1, 2], "3 symbols, which need 4 frames, do not fit 3 frames"),
        (torch.zeros(0, 3), [1], "do not fit 0 frames"),
        (torch.zeros(3, 3), [1, 3], "classes to align must be 1 to 2, and go from 1 to 3"),
        (torch.zeros(3, 3), [0, 1], "classes to align must be 1 to 2, and go from 0 to 1"),
        (torch.full((3, 3), math.nan), [1], "no path through these log probabilities"),
        (torch.tensor([[0.0, -math.inf]] * 3), [1], "no path through these log probabilities"),
    ],
)
def test_what_cannot_be_aligned_is_refused(log_probs: torch.Tensor, classes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forced_alignment(log_probs, np.array(classes))


def test_impossible_symbols_elsewhere_do_no_harm() -> None:
    log_probs = emit([0, 1, 0, 2], 3).masked_fill(emit([0, 1, 0, 2], 3) < -1, -math.inf)
    assert [(span.start, span.end) for span in forced_alignment(log_probs, np.array([1, 2]))] == [
        (1, 2),
        (3, 4),
    ]


def seconds(frame: float) -> float:
    """Half a hop before the middle of the frame's window."""
    return (frame * HOP + MIN_SAMPLES / 2 - HOP / 2) / SAMPLE_RATE


def test_spans_share_gaps_evenly_and_reach_no_further_than_told() -> None:
    spans = [(3, 4), (6, 8), (30, 31)]
    assert stretch(spans, 40, 0) == [(seconds(a), seconds(b)) for a, b in spans]
    assert stretch(spans, 40, math.inf) == [
        (0.0, seconds(5)),
        (seconds(5), seconds(19)),
        (seconds(19), seconds(40)),
    ]
    assert stretch(spans, 40, 0.06) == [
        (0.0, seconds(5)),
        (seconds(5), seconds(11)),
        (seconds(27), seconds(34)),
    ]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40), st.sampled_from([0.0, 0.02, 0.05, 0.1, math.inf])
)
def test_times_are_in_order_within_the_recording_and_hold_their_frames(path: list[int], reach: float) -> None:
    vocabulary = Vocabulary(["a", "b", "c"], "phones")
    spans = spans_of(np.array(path), np.zeros((len(path), 4)))
    classes = collapse(np.array(path))
    phones = word_times(spans, classes, vocabulary, len(path), reach)
    assert [phone.word for phone in phones] == [vocabulary.symbols[number - 1] for number in classes]
    edges = [time for phone in phones for time in phone[:2]]
    assert edges == sorted(edges) and all(
        0 <= time <= (MIN_SAMPLES + HOP * (len(path) - 1)) / SAMPLE_RATE for time in edges
    )
    frames = phone_frames(phones, len(path)).tolist()  # type: ignore[arg-type]
    names = ["", *vocabulary.symbols]
    assert all(frame == names[number] for frame, number in zip(frames, path, strict=True) if number)
    if reach == 0:  # what a frame stands for is what is read back from the times
        assert frames == [names[number] for number in path]
    if reach == math.inf and phones:
        assert "" not in frames


def test_a_word_lasts_from_its_first_symbol_to_its_last_and_reaches_into_the_space() -> None:
    vocabulary = Vocabulary(["a", "b", "|"])
    path = [0, 1, 0, 2, 2, 0, 3, 0, 0, 1] + [0] * 20
    spans = forced_alignment(emit(path, 4), np.array([1, 2, 3, 1]))
    assert word_times(spans, np.array([1, 2, 3, 1]), vocabulary, 30, 0.0) == [
        Word(seconds(1), seconds(5), "ab"),
        Word(seconds(9), seconds(10), "a"),
    ]
    assert word_times(spans, np.array([1, 2, 3, 1]), vocabulary, 30, 0.06) == [
        Word(0.0, seconds(7), "ab"),
        Word(seconds(7), seconds(13), "a"),
    ]


def test_words_out_of_one_piece_share_its_frames() -> None:
    class Pieces(Vocabulary):
        def words(self, classes: object) -> list[tuple[str, int, int]]:  # type: ignore[override]
            return [("of", 0, 1), ("the", 0, 1), ("sea", 1, 2)]

    words = word_times(
        [Span(2, 6, 0.0), Span(8, 9, 0.0)], np.array([1, 2]), Pieces(["of the", "sea"]), 20, 0.0
    )
    assert words == [
        Word(seconds(2), seconds(4), "of"),
        Word(seconds(4), seconds(6), "the"),
        Word(seconds(8), seconds(9), "sea"),
    ]


def test_written_alignments_come_back_through_index_and_measure_counts_with_them(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    paths = {"u00": [0, 1, 1, 0, 2, 0, 0, 2, 0, 3], "u01": [2] * 5 + [0] + [3] * 4}
    make_corpus(tmp_path / "audio", [np.zeros(MIN_SAMPLES + HOP * 9, np.float32)] * 2)
    vocabulary = Vocabulary(["b", "ð", "oʊ"], "phones")
    times = []
    for name, path in paths.items():
        classes = collapse(np.array(path))
        times.append((name, word_times(forced_alignment(emit(path, 4), classes), classes, vocabulary, 10)))
    write_alignments(tmp_path / "alignments.jsonl", times, vocabulary)
    index(
        IndexConfig(
            source=str(tmp_path / "audio"),
            out=str(tmp_path / "manifest"),
            alignments=str(tmp_path / "alignments.jsonl"),
            dev_share=0,
            test_share=0,
        )
    )
    manifest = Manifest(tmp_path / "manifest")
    assert [utterance.phones for utterance in manifest] == [words for _, words in times]
    assert phone_frames(manifest[0].phones or [], 10).tolist() == ["b"] * 3 + ["ð"] * 5 + ["oʊ"] * 2
    labels = make_labels(tmp_path / "labels", {"u00": 10, "u01": 10})
    summary = measure(
        MeasureConfig(
            manifest=str(manifest.folder),
            labels=str(labels),
            out=str(tmp_path / "m"),
            abx=False,
            probes=False,
        )
    )
    assert (
        summary["frames_with_phones"] == 20 and summary["num_phones"] == 3 and summary["silence_share"] == 0
    )


def test_words_are_written_as_words(tmp_path: Path) -> None:
    write_alignments(
        tmp_path / "a.jsonl", [("u", [Word(0.0, 0.5, "żółw")]), ("v", [])], Vocabulary(["a", "|"])
    )
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"id": "u", "words": [[0.0, 0.5, "żółw"]]}' and json.loads(lines[1]) == {
        "id": "v",
        "words": [],
    }
