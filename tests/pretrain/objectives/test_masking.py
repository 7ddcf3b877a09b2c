import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.objectives.masking import span_mask

PUBLISHED = [(0.065, 10), (0.08, 10)]


@settings(max_examples=400, deadline=None)
@given(st.integers(4, 400), st.sampled_from(PUBLISHED), st.integers(0, 2**32))
def test_something_is_masked_and_something_is_left(
    num_frames: int, setting: tuple[float, int], seed: int
) -> None:
    mask = span_mask(num_frames, *setting, np.random.default_rng(seed))
    assert mask.shape == (num_frames,) and mask.dtype == bool
    assert 0 < mask.sum() < num_frames


@pytest.mark.parametrize("num_frames", [20, 21, 29, 30, 38, 40])
def test_spans_that_could_cover_everything_leave_something(num_frames: int) -> None:
    masks = [span_mask(num_frames, 0.08, 10, np.random.default_rng(seed)) for seed in range(3000)]
    assert all(not mask.all() for mask in masks)


@given(st.integers(0, 3), st.integers(0, 100))
def test_an_utterance_of_hardly_any_frames_is_no_fault(num_frames: int, seed: int) -> None:
    mask = span_mask(num_frames, 0.08, 10, np.random.default_rng(seed))
    assert len(mask) == num_frames and mask.sum() < max(1, num_frames)


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 400), st.integers(0, 1000))
def test_masked_runs_are_whole_spans(num_frames: int, seed: int) -> None:
    mask = span_mask(num_frames, 0.065, 10, np.random.default_rng(seed))
    if num_frames > 60:  # too long to be covered, so nothing was taken back
        edges = np.flatnonzero(np.diff(np.r_[0, mask.astype(int), 0]))
        assert ((edges[1::2] - edges[::2]) >= 10).all()


@pytest.mark.parametrize(("probability", "length"), [*PUBLISHED, (0.02, 5)])
def test_the_masked_share_is_the_formulas(probability: float, length: int) -> None:
    """Starts without replacement: a frame is free if none of the L starts that reach it is drawn, (1 - p)^L
    for long utterances."""
    shares = [span_mask(3000, probability, length, np.random.default_rng(seed)).mean() for seed in range(40)]
    # 40 draws of 3000 frames: the standard error of the mean is below 0.002
    assert np.mean(shares) == pytest.approx(1 - (1 - probability) ** length, abs=0.01)


def test_the_number_of_spans_is_right_on_average() -> None:
    """0.065 x 1007 = 65.455 spans of one frame: 65 or 66, rounded at random."""
    counts = [int(span_mask(1007, 0.065, 1, np.random.default_rng(seed)).sum()) for seed in range(2000)]
    assert set(counts) == {65, 66} and np.mean(counts) == pytest.approx(65.455, abs=0.05)


def test_without_a_minimum_a_small_share_often_masks_nothing() -> None:
    masks = [span_mask(768, 0.0016, 64, np.random.default_rng(seed), min_spans=0) for seed in range(300)]
    counts = np.array([mask.sum() for mask in masks])
    assert (counts > 0).all()  # 1.23 spans: 1 or 2
    masks = [span_mask(256, 0.0016, 64, np.random.default_rng(seed), min_spans=0) for seed in range(300)]
    assert 0.3 < np.mean([mask.any() for mask in masks]) < 0.5  # 0.41 spans: 0 or 1


def test_a_mask_is_a_function_of_its_generator() -> None:
    one, two, other = (span_mask(200, 0.08, 10, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
