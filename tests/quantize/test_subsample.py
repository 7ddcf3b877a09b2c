import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.utterance import Utterance
from quantize import subsample
from quantize.features import plan_batches
from quantize.subsample import (
    VISIT,
    Sample,
    collect,
    load_sample,
    plan_sample,
    require_space,
    share_out,
    speaker_numbers,
)


class Numbered:
    """Features without audio: frame t of utterance "u7" is (7, t). Counts what it is asked for, and stops
    where told."""

    dim = 2

    def __init__(self, stop_at: str | None = None):
        self.asked: list[str] = []
        self.stop_at = stop_at

    def describe(self) -> dict[str, Any]:
        return {}

    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]:
        return self.stream([utterances])

    def stream(self, groups: Iterable[Sequence[Utterance]]) -> Iterator[tuple[Utterance, np.ndarray]]:
        for utterance in chain.from_iterable(groups):
            if utterance.id == self.stop_at:
                raise KeyboardInterrupt
            self.asked.append(utterance.id)
            frames = np.arange(utterance.num_frames, dtype=np.float32)
            yield utterance, np.stack([np.full_like(frames, int(utterance.id[1:])), frames], axis=1)


def write_rows(
    folder: Path, num_frames: Sequence[int], speakers: Sequence[str | None] | None = None
) -> Manifest:
    rows = [
        {
            "id": f"u{n}",
            "path": f"/nowhere/{n}.wav",
            "start": 0,
            "num_samples": 400 + 320 * (count - 1),
            "sample_rate": 16000,
            "speaker": None if speakers is None else speakers[n],
        }
        for n, count in enumerate(num_frames)
    ]
    write_manifest(folder / "manifest", rows, {}, {})
    return Manifest(folder / "manifest")


def plan_slowly(
    num_frames: list[int], budget: int, seed: int, speakers: list[int]
) -> tuple[list[int], list[int]]:
    """The plan in plain loops and Python's integers, given the same random order and shares."""
    rng = np.random.default_rng([seed, len(num_frames)])
    order = rng.permutation(len(num_frames)).tolist()
    have = np.bincount(speakers, weights=num_frames).astype(np.int64)
    counts: dict[int, int] = {}
    for speaker, quota in enumerate(share_out(have, budget, rng).tolist()):
        visited, held = [], 0
        for row in order:
            if speakers[row] == speaker and held < VISIT * quota:
                visited.append(row)
                held += num_frames[row]
        done = 0
        for row in sorted(visited):
            counts[row] = (done + num_frames[row]) * quota // held - done * quota // held
            done += num_frames[row]
    rows = sorted(row for row, count in counts.items() if count)
    return rows, [counts[row] for row in rows]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 5000), st.integers(0, 3))
def test_a_sample_has_its_size_and_no_utterance_gives_more_than_it_has(
    lengths: list[int], budget: int, seed: int
) -> None:
    num_frames = np.array(lengths)
    rows, counts = plan_sample(num_frames, budget, seed)
    assert counts.sum() == min(budget, num_frames.sum())
    assert (counts > 0).all() and (counts <= num_frames[rows]).all() and (np.diff(rows) > 0).all()
    assert num_frames[rows].sum() <= VISIT * budget + 400


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 400), st.integers(0, 3))
def test_shares_are_level_as_far_as_everybody_has(have: list[int], budget: int, seed: int) -> None:
    quotas = share_out(np.array(have, np.int64), budget, np.random.default_rng(seed))
    assert quotas.sum() == min(budget, sum(have)) and (quotas >= 0).all() and (quotas <= have).all()
    for quota, owned in zip(quotas, have, strict=True):
        assert quota == owned or quota >= quotas.max() - 1  # who gives less than another gives all


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 4)), min_size=1, max_size=40),
    st.integers(1, 2000),
    st.integers(0, 3),
)
def test_the_plan_is_the_one_of_plain_loops(rows: list[tuple[int, int]], budget: int, seed: int) -> None:
    num_frames, speakers = [frames for frames, _ in rows], [speaker for _, speaker in rows]
    found, counts = plan_sample(np.array(num_frames), budget, seed, np.array(speakers))
    assert (found.tolist(), counts.tolist()) == plan_slowly(num_frames, budget, seed, speakers)


def test_frame_counts_whose_product_needs_more_than_64_bits_are_shared_exactly() -> None:
    num_frames, speakers = [5_000_000 + n for n in range(2000)], [n % 2 for n in range(2000)]
    budget = 6_000_000_000
    rows, counts = plan_sample(np.array(num_frames), budget, 0, np.array(speakers))
    assert counts.sum() == budget and (counts <= np.array(num_frames)[rows]).all()
    assert (rows.tolist(), counts.tolist()) == plan_slowly(num_frames, budget, 0, speakers)


def test_speakers_give_alike_and_a_short_one_all_it_has(tmp_path: Path) -> None:
    names = ["long"] * 20 + ["short"] + ["middle"] * 6 + [None, None]
    rows = write_rows(tmp_path, [100] * 20 + [30] + [100] * 6 + [100, 100], names)
    sample = Sample(rows, 330, seed=0)
    assert sample.speaker_frames is not None and sample.speaker_frames.tolist() == [
        100,
        30,
        100,
        100,
    ]  # the nameless are one
    assert sample.size == 330 and len(Sample(rows, 10**6, seed=0)) == len(rows)
    plain = Sample(rows, 330, seed=0, balance="none")
    # 20 of 29 utterances
    assert plain.size == 330 and plain.speaker_frames is not None and plain.speaker_frames[0] > 150


def test_without_speakers_or_with_one_balancing_changes_nothing(tmp_path: Path) -> None:
    num_frames = np.random.default_rng(0).integers(10, 300, size=50).tolist()
    unknown, one = (
        write_rows(tmp_path / "unknown", num_frames),
        write_rows(tmp_path / "one", num_frames, ["a"] * 50),
    )
    assert speaker_numbers(unknown) is None and Sample(unknown, 400, 0).speaker_frames is None
    drawn = [
        [u.id for u in Sample(rows, 400, 0, b).utterances]
        for rows in (unknown, one)
        for b in ("speaker", "none")
    ]  # type: ignore[arg-type]
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


def test_speakers_are_numbered_within_the_chosen_rows(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [10] * 5, ["a", "b", None, "b", "c"])
    numbers = speaker_numbers(rows.take(np.array([4, 1, 2, 3])))
    assert numbers is not None and numbers.tolist() == [0, 1, 2, 1]


def test_a_million_utterances_of_ten_thousand_speakers_are_planned_without_a_loop() -> None:
    rng = np.random.default_rng(0)
    num_frames, speakers = rng.integers(50, 1500, size=10**6), rng.integers(10**4, size=10**6)
    rows, counts = plan_sample(num_frames, 1_800_000, 0, speakers)
    given = np.bincount(speakers[rows], weights=counts)
    assert given.min() == given.max() == 180 and num_frames[rows].sum() < 10**4 * (VISIT * 180 + 1500)


def test_the_file_holds_frames_of_the_corpus_in_manifest_order_each_once(tmp_path: Path) -> None:
    num_frames = np.random.default_rng(0).integers(10, 300, size=60).tolist()
    rows = write_rows(tmp_path, num_frames, [f"s{n % 7}" for n in range(60)])
    sample = Sample(rows, 500, seed=0)
    points = np.load(collect(Numbered(), sample, tmp_path / "partial"))
    assert points.dtype == np.float32 and points.shape == (500, 2)
    pairs = [tuple(pair) for pair in points.astype(int).tolist()]
    assert pairs == sorted(set(pairs)) and all(frame < num_frames[n] for n, frame in pairs)
    by_speaker: dict[int, int] = defaultdict(int)
    for n, _ in pairs:
        by_speaker[n % 7] += 1
    assert (
        sample.speaker_frames is not None
        and [by_speaker[n] for n in range(7)] == sample.speaker_frames.tolist()
    )
    assert sorted(by_speaker.values()) == [71] * 4 + [72] * 3
    other = np.load(collect(Numbered(), Sample(rows, 500, seed=1), tmp_path / "other"))
    assert not np.array_equal(points, other)


@pytest.fixture
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of some utterances, each recorded as soon as it is written."""
    monkeypatch.setattr(subsample, "PIECE_SECONDS", 5.0)
    monkeypatch.setattr(subsample, "RECORD_SECONDS", 0.0)


@pytest.mark.usefixtures("recorded_at_once")
def test_collecting_goes_on_where_it_was_interrupted_and_writes_the_same_bytes(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [60] * 40)
    sample = Sample(rows, 300, seed=0)
    whole = Numbered()
    expected = collect(whole, sample, tmp_path / "whole").read_bytes()
    for number, stop_at in enumerate(whole.asked[::3]):
        folder, begun, rest = tmp_path / f"partial{number}", Numbered(stop_at), Numbered()
        with pytest.raises(KeyboardInterrupt):
            collect(begun, sample, folder)
        assert collect(rest, sample, folder).read_bytes() == expected
        again = begun.asked[len(whole.asked) - len(rest.asked) :]  # what was asked for a second time
        assert begun.asked[: len(begun.asked) - len(again)] + rest.asked == whole.asked and len(again) < 5
        none = Numbered()
        collect(none, sample, folder)
        assert none.asked == []


@pytest.mark.usefixtures("recorded_at_once")
def test_an_interrupted_run_makes_the_same_batches(tmp_path: Path) -> None:
    class Batched(Numbered):
        """Features that tell the company an utterance was computed in: the number of its batch's first, and
        its place."""

        def stream(self, groups: Iterable[Sequence[Utterance]]) -> Iterator[tuple[Utterance, np.ndarray]]:
            for batch in chain.from_iterable(plan_batches(group, 3.0) for group in groups):
                for place, (utterance, features) in enumerate(super().stream([batch])):
                    yield utterance, np.full_like(features, int(batch[0].id[1:]) + place / 16)

    sample = Sample(write_rows(tmp_path, [60] * 40), 300, seed=0)
    expected = collect(whole := Batched(), sample, tmp_path / "whole").read_bytes()
    for number, stop_at in enumerate(whole.asked[::3]):
        with pytest.raises(KeyboardInterrupt):
            collect(Batched(stop_at), sample, tmp_path / f"partial{number}")
        assert collect(Batched(), sample, tmp_path / f"partial{number}").read_bytes() == expected


def test_a_record_without_its_file_is_not_believed(tmp_path: Path) -> None:
    sample = Sample(write_rows(tmp_path, [60] * 10), 100, seed=0)
    path = collect(Numbered(), sample, tmp_path / "partial")
    expected = path.read_bytes()
    path.unlink()
    assert collect(Numbered(), sample, tmp_path / "partial").read_bytes() == expected


def test_what_fits_the_budget_is_in_memory_and_the_rest_stays_on_disk(tmp_path: Path) -> None:
    # 20,128 bytes with the header
    np.save(tmp_path / "sample.npy", np.arange(5000, dtype=np.float32).reshape(-1, 2))
    held, mapped = load_sample(tmp_path / "sample.npy", 20.2e-6), load_sample(tmp_path / "sample.npy", 20e-6)
    assert not isinstance(held, np.memmap) and isinstance(mapped, np.memmap) and np.array_equal(held, mapped)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_frame_that_is_no_number_names_the_utterance(value: float, tmp_path: Path) -> None:
    class Diverged(Numbered):
        def stream(self, groups: Iterable[Sequence[Utterance]]) -> Iterator[tuple[Utterance, np.ndarray]]:
            for utterance, features in super().stream(groups):
                features[41, 1] = value if utterance.id == "u3" else 0
                yield utterance, features

    with pytest.raises(
        ValueError, match=r"/nowhere/3.wav \(utterance 'u3'\): NaN or infinity in the features of frame 41"
    ):
        collect(Diverged(), Sample(write_rows(tmp_path, [60] * 6), 10**6, seed=0), tmp_path / "partial")


def test_a_disk_that_is_too_full_is_an_error_that_says_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 700, 700))  # type: ignore[attr-defined]
    folder = tmp_path / "codebook" / "partial"
    with pytest.raises(
        ValueError,
        match=r"partial: the sample needs 800 bytes of disk and 700 are free; lower `hours` or `frames`",
    ):
        require_space(folder, 100, 2)
    folder.mkdir(parents=True)
    (folder / "sample.npy").write_bytes(b"\0" * 100)  # has its place already
    require_space(folder, 100, 2)


def test_nothing_to_fit_on_is_an_error_that_names_the_manifest(tmp_path: Path) -> None:
    for name, lengths in (("empty", []), ("short", [0, 0])):
        rows = write_rows(tmp_path / name, lengths)
        with pytest.raises(
            ValueError,
            match=rf"{name}/manifest: no frame of 20 ms in the {len(lengths)} utterances to fit on",
        ):
            Sample(rows, 100, seed=0)
