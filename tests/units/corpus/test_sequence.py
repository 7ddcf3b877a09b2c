import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from units.corpus.sequence import MAX_DURATION, deduplicate, expand


@given(hnp.arrays(np.uint16, st.integers(0, 60), elements=st.integers(0, 3)))
def test_frames_survive_deduplication_bit_for_bit(frames: np.ndarray) -> None:
    units, durations = deduplicate(frames)
    assert np.array_equal(expand(units, durations), frames)
    assert units.dtype == frames.dtype and durations.dtype == np.uint16
    assert (units[1:] != units[:-1]).all() and (durations > 0).all()


def test_runs_longer_than_a_duration_can_hold_lose_no_frame() -> None:
    frames = np.repeat(np.array([5, 1, 5], np.uint16), [2 * MAX_DURATION, 3, MAX_DURATION + 1])
    units, durations = deduplicate(frames)
    assert units.tolist() == [5, 5, 1, 5, 5]
    assert durations.tolist() == [MAX_DURATION, MAX_DURATION, 3, MAX_DURATION, 1]
    assert np.array_equal(expand(units, durations), frames)
