"""The rule for how many labels or units a recording has, against the formulas of the tools that make them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.frame_counts import count_bounds, count_frames, differing, likely_rate
from pretrain.data.utterance import num_frames


def convolved(num_samples: int, layers: list[tuple[int, int]]) -> int:
    """Frames of stacked convolutions (kernel, stride) without padding."""
    for kernel, stride in layers:
        num_samples = max(0, (num_samples - kernel) // stride + 1)
    return num_samples


HUBERT = [(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]


def chunked(num_samples: int) -> int:
    """fairseq's `dump_hubert_feature.py`: pieces of 100 s one after the other, those too short for a frame
    left out."""
    pieces = [min(1_600_000, num_samples - start) for start in range(0, num_samples, 1_600_000)]
    return sum(convolved(piece, HUBERT) for piece in pieces if piece >= 400)


TOOLS: dict[str, tuple[float, Callable[[int], int]]] = {
    "HuBERT": (50, lambda n: convolved(n, HUBERT)),
    "HuBERT in pieces of 100 s": (50, chunked),
    "HuBERT with 40 samples of padding at both ends": (50, lambda n: convolved(n + 80, HUBERT)),
    "HuBERT at 25 Hz, a further layer": (25, lambda n: convolved(n, [*HUBERT, (2, 2)])),
    "Kaldi, windows that fit": (100, lambda n: (n - 400) // 160 + 1),
    "Kaldi, windows about their centres": (100, lambda n: (n + 80) // 160),
    "CPC": (100, lambda n: n // 160),
    "a codec with hops of 320": (50, lambda n: math.ceil(n / 320)),
    "EnCodec, resampled to 24 kHz": (75, lambda n: math.ceil(round(n * 1.5) / 320)),
    "Mimi, resampled to 24 kHz": (12.5, lambda n: math.ceil(round(n * 1.5) / 1920)),
    "DAC at 44.1 kHz": (44100 / 512, lambda n: math.ceil(round(n * 2.75625) / 512)),
}


@pytest.mark.parametrize("tool", TOOLS)
@settings(max_examples=300)
@given(st.integers(400, 8_000_000))
def test_what_a_tool_makes_of_a_whole_recording_is_allowed(tool: str, num_samples: int) -> None:
    rate, frames = TOOLS[tool]
    fewest, most = count_bounds(num_samples, rate)
    assert fewest <= frames(num_samples) <= most
    assert most - fewest <= 4 + num_samples // 1_600_000  # and little else is


@settings(max_examples=200)
@given(st.integers(0, 8_000_000))
def test_at_50_hz_the_rule_is_that_of_labels(num_samples: int) -> None:
    frames = num_frames(num_samples)
    assert count_frames(num_samples, 50) == frames
    fewest, most = count_bounds(num_samples, 50)
    allowed = [
        count
        for count in range(max(0, frames - 1), frames + 2)
        if not len(differing(np.array([count]), np.array([frames])))
    ]
    assert fewest <= min(allowed) and most >= max(allowed)
    assert not fewest <= 2 * frames <= most or frames <= 2


def test_the_likely_rate_is_a_common_one() -> None:
    assert [likely_rate(round(rate * 10) - 1, 160_000) for rate in (12.5, 50, 75, 86.13, 100)] == [
        12.5,
        50,
        75,
        86.1328125,
        100,
    ]
    assert likely_rate(600, 160_000) is None and likely_rate(5, 0) is None
