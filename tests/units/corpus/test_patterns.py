"""Patterns against slow oracles, their inverse, their causality through a real decoder, and growth under
their rules."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from units.corpus.patterns import PATTERNS, Continuation, Pattern
from units.lm.model import Decoder, DecoderConfig

SIZES = (3, 5, 2)
A, B, C = [0, 1, 2, 2], [4, 3, 0, 1], [1, 0, 0, 1]
CODES = np.array([A, B, C]).T


@st.composite
def patterns_and_codes(draw: Any, smallest: int = 0) -> tuple[Pattern, np.ndarray]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    n = draw(st.integers(smallest, 12))
    rows = [draw(st.lists(st.integers(0, size - 1), min_size=n, max_size=n)) for size in sizes]
    codes = np.array(rows, draw(st.sampled_from([np.uint16, np.int64]))).reshape(len(sizes), n).T
    return Pattern(draw(st.sampled_from(PATTERNS)), sizes), codes[:, 0] if len(sizes) == 1 else codes


def test_sequences_are_as_the_docstring_draws_them() -> None:
    # Streams of 3, 5 and 2 symbols: BOS 3, 5, 2; EOS 4 in the first; PAD 5, 7, 4. One stream: offsets 0, 3,
    # 8; BOS 10, EOS 11.
    assert Pattern("parallel", SIZES).arrange(CODES).T.tolist() == [[3, *A, 4], [5, *B, 7], [2, *C, 4]]
    assert Pattern("delay", SIZES).arrange(CODES).T.tolist() == [[3, *A, 4, 5], [5, 7, *B, 7], [2, 4, 4, *C]]
    b, c = [3 + code for code in B], [8 + code for code in C]
    interleaved = [code for frame in zip(A, b, c, strict=True) for code in frame]
    assert Pattern("flatten", SIZES).arrange(CODES).tolist() == [10, *interleaved, 11]
    assert Pattern("coarse-first", SIZES).arrange(CODES).tolist() == [10, *A, 11, *b, *c]


@pytest.mark.parametrize("name", PATTERNS)
def test_with_one_level_every_pattern_is_the_plain_sequence(name: str) -> None:
    pattern = Pattern(name, (6,))
    assert pattern.arrange(np.array([2, 5], np.uint16)).tolist() == [6, 2, 5, 7]
    assert pattern.vocabularies == (8,)
    assert pattern.num_streams == 1


@given(patterns_and_codes())
def test_restore_undoes_arrange(drawn: tuple[Pattern, np.ndarray]) -> None:
    pattern, codes = drawn
    sequence = pattern.arrange(codes)
    assert sequence.dtype == np.int64
    assert len(sequence) == pattern.length(len(codes))
    assert (
        (sequence >= 0)
        & (sequence < (pattern.vocabularies if sequence.ndim == 2 else pattern.vocabularies[0]))
    ).all()
    assert np.array_equal(pattern.restore(sequence), codes)


@given(patterns_and_codes())
def test_every_code_and_eos_are_predicted_once_and_levels_are_told(drawn: tuple[Pattern, np.ndarray]) -> None:
    pattern, codes = drawn
    sequence = pattern.arrange(codes)
    asked, levels = pattern.predicted(sequence), pattern.levels(sequence)
    assert asked.sum() == codes.size + 1
    assert not asked[0].any()
    first = sequence if sequence.ndim == 1 else sequence[:, 0]
    assert ((first == pattern.eos) & (asked if asked.ndim == 1 else asked[:, 0])).sum() == 1
    assert np.array_equal(
        np.bincount(levels[levels >= 0], minlength=len(pattern.sizes)), [len(codes)] * len(pattern.sizes)
    )
    assert (asked[levels >= 0]).all()


@given(patterns_and_codes(smallest=1), st.data())
def test_a_sequence_with_one_cell_changed_is_another_document_or_no_arrangement(
    drawn: tuple[Pattern, np.ndarray], data: st.DataObject
) -> None:
    pattern, codes = drawn
    sequence = pattern.arrange(codes)
    cell = tuple(data.draw(st.integers(0, size - 1)) for size in sequence.shape)
    stream = cell[1] if len(cell) == 2 else 0
    sequence[cell] = data.draw(
        st.integers(0, pattern.vocabularies[stream] - 1).filter(lambda symbol: symbol != sequence[cell])
    )
    try:
        restored = pattern.restore(sequence)
    except ValueError:
        return
    assert (restored != codes).sum() == 1


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_no_arrangement_is_refused(name: str) -> None:
    pattern = Pattern(name, SIZES)
    sequence = pattern.arrange(CODES)
    with pytest.raises(ValueError, match="no arrangement"):
        pattern.restore(sequence[:2])
    with pytest.raises(ValueError, match="no arrangement"):
        pattern.restore(np.roll(sequence, 1, axis=0))
    with pytest.raises(ValueError, match="has the shape"):
        pattern.restore(sequence[..., None])


def test_wrong_codes_and_patterns_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"'delayed' is not known; there are parallel, delay, flatten, coarse-first"
    ):
        Pattern("delayed", (2,))
    with pytest.raises(ValueError, match="one or more levels"):
        Pattern("delay", ())
    with pytest.raises(ValueError, match=r"the code 5 at position 1, level 1 is outside 0 \.\. 4"):
        Pattern("flatten", SIZES).arrange(np.array([[0, 0, 0], [0, 5, 0]]))
    with pytest.raises(ValueError, match=r"the code -1 at position 0 is outside"):
        Pattern("flatten", (4,)).arrange(np.array([-1]))
    with pytest.raises(ValueError, match=r"shape \(n, 3\), not \(4, 2\)"):
        Pattern("flatten", SIZES).arrange(CODES[:, :2])


def reach(pattern: Pattern, codes: np.ndarray, t: int, level: int) -> set[tuple[int, int]]:
    """The codes (t, level) that the logits of code (t, level) depend on, by the gradient through a decoder of
    random weights."""
    torch.manual_seed(0)
    config = DecoderConfig(
        dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=16, context=64, dropout=0.0
    )
    decoder = Decoder(config, pattern.vocabularies).double().eval()
    # each code's number, to be found again where the pattern puts it
    numbered = np.arange(codes.size).reshape(codes.shape)
    wide = Pattern(pattern.name, (codes.size,) * len(pattern.sizes))
    place = wide.arrange(numbered).reshape(-1, pattern.num_streams)
    cells = {}
    for (at, of), number in np.ndenumerate(numbered):
        cells[at, of] = tuple(int(x) for x in np.argwhere(place == number + wide.offsets[of])[0])
    sequence = torch.from_numpy(pattern.arrange(codes)).reshape(-1, pattern.num_streams)
    rows = (decoder.embed_tokens(sequence + decoder.offsets)).detach().requires_grad_()  # (steps, Q, dim)
    decoder.embed = lambda tokens: rows.sum(1)[None]  # type: ignore[method-assign]
    tokens = sequence[None] if pattern.num_streams > 1 else sequence[None, :, 0]
    logits = decoder.split(decoder(tokens, torch.arange(len(sequence))[None]))
    step, stream = cells[t, level]
    (gradient,) = torch.autograd.grad(logits[stream][0, step - 1].square().sum(), rows)
    touched = gradient.abs().sum(-1) > 0
    return {frame for frame, cell in cells.items() if touched[cell]}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_code_is_predicted_from_the_codes_that_theory_says_and_no_others(name: str) -> None:
    frames, levels = CODES.shape
    everything = [(t, level) for t in range(frames) for level in range(levels)]
    for t, level in everything:
        if name == "parallel":  # all of the past, nothing of its own frame
            expected = {(s, k) for s, k in everything if s < t}
        elif name == "delay":  # level k at s stands in row s + k
            expected = {(s, k) for s, k in everything if s + k < t + level}
        elif name == "flatten":  # all of the past and the lower levels of its own frame
            expected = {(s, k) for s, k in everything if (s, k) < (t, level)}
        else:  # all of the lower levels, past and future, and the past of its own
            expected = {(s, k) for s, k in everything if (k, s) < (level, t)}
        assert reach(Pattern(name, SIZES), CODES, t, level) == expected, (t, level)


@given(patterns_and_codes(smallest=1), st.integers(0, 12))
def test_a_continuation_offered_a_document_grows_exactly_into_it(
    drawn: tuple[Pattern, np.ndarray], given_codes: int
) -> None:
    pattern, codes = drawn
    sequence = pattern.arrange(codes).reshape(-1, pattern.num_streams)
    growing = Continuation(pattern, [codes[: min(given_codes, len(codes))]], max_codes=len(codes) + 1)
    step = len(growing.prefixes[0])
    assert np.array_equal(growing.prefixes[0].reshape(-1, pattern.num_streams), sequence[:step])
    while not growing.done[0]:
        allowed, row = growing.allowed(), sequence[step]
        for stream, symbol in enumerate(row):
            inside = allowed.low[0, stream] <= symbol < allowed.high[0, stream]
            # Under parallel the row of EOS has PAD beside it, which is not offered: `append` puts it there.
            replaced = pattern.name == "parallel" and row[0] == pattern.eos and stream > 0
            assert inside or replaced or (stream == 0 and symbol == pattern.eos and allowed.eos[0])
        growing.append(sequence[[step]] if pattern.num_streams > 1 else sequence[step])
        step += 1
    assert step == len(sequence)
    assert np.array_equal(growing.codes(0), codes)
    assert not growing.cut[0]


@given(
    st.sampled_from(PATTERNS),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 2**32),
    st.floats(0, 1),
)
def test_whatever_is_drawn_of_what_is_allowed_becomes_documents(
    name: str, sizes: list[int], seed: int, ending: float
) -> None:
    rng, pattern = np.random.default_rng(seed), Pattern(name, sizes)
    prompts = [rng.integers(sizes, size=(n, len(sizes))) for n in (0, 1, 4)]
    prompts = [prompt[:, 0] for prompt in prompts] if len(sizes) == 1 else prompts
    limits = [3, 6, 4]
    growing = Continuation(pattern, prompts, limits)
    for _ in range(pattern.length(max(limits))):
        low, high, eos = growing.allowed()
        drawn = rng.integers(low, high)
        drawn[eos & (rng.random(3) < ending), 0] = pattern.eos
        growing.append(drawn if pattern.num_streams > 1 else drawn[:, 0])
    assert growing.done.all()
    for i, prompt in enumerate(prompts):
        codes = growing.codes(i)
        assert np.array_equal(codes[: len(prompt)], prompt)
        assert max(1, len(prompt)) <= len(codes) <= limits[i]
        assert growing.cut[i] == (len(codes) == limits[i])


def test_a_limit_below_the_prompt_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="prompt 1 has 3 codes; max_codes 2"):
        Continuation(Pattern("delay", (4,)), [np.array([1]), np.array([1, 2, 3])], 2)
