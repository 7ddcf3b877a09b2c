from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batches import BatchConfig, SpeechBatches, pad
from pretrain.config import parse_config
from pretrain.encoder import EncoderConfig
from pretrain.frontend import num_frames
from pretrain.hubert import IGNORED
from pretrain.labels import Labels
from pretrain.manifest import Manifest
from pretrain.pretraining import HubertTask, PretrainConfig


class Lengths:
    """As much of a manifest as planning needs."""

    def __init__(self, lengths: list[int]):
        self.lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self.lengths)


def planner(lengths: list[int], seed: int = 0, crop: bool = True, **config: float) -> SpeechBatches:
    return SpeechBatches(Lengths(lengths), BatchConfig(**config), seed, crop=crop)  # type: ignore[arg-type]


def ramp(num_samples: int) -> np.ndarray:
    """Sample s is s / 2^20, exactly: its value tells its place."""
    return np.arange(num_samples, dtype=np.float32) / 2**20


@settings(max_examples=150)
@given(st.lists(st.integers(1600, 400_000), min_size=1, max_size=60), st.integers(0, 5), st.sampled_from([2.0, 15.6]))
def test_every_utterance_is_in_every_epoch_once_whatever_its_length(lengths: list[int], epoch: int, crop_seconds: float) -> None:
    batches = planner(lengths, crop_seconds=crop_seconds, batch_seconds=20.0)
    plan = batches.plan(epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert batches.num_left_out == 0
    for items in plan:
        assert batches.lengths[items].max() * len(items) <= 20.0 * 16000
    assert sorted(np.concatenate(batches.plan_in_order()).tolist()) == list(range(len(lengths)))


def test_only_too_short_utterances_are_left_out_and_counted() -> None:
    batches = planner([1599, 1600, 500_000, 0, 399])
    assert batches.items.tolist() == [1, 2] and batches.num_left_out == 3
    assert planner([399, 400], min_seconds=0.025).items.tolist() == [1]


def test_without_crops_long_utterances_are_left_out_too() -> None:
    batches = planner([16000, 16001, 8000], crop=False, crop_seconds=1.0)
    assert batches.items.tolist() == [0, 2] and batches.num_left_out == 1


def test_an_utterance_longer_than_a_batch_is_a_batch_alone() -> None:
    plan = planner([100_000, 20_000, 20_000], batch_seconds=3.0, crop_seconds=15.6).plan(0)
    assert sorted(sorted(items.tolist()) for items in plan) == [[0], [1, 2]]


def test_utterances_of_like_length_share_a_batch() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(16000, 240_000, 500)
    batches = planner(lengths.tolist(), batch_seconds=60.0)
    plan = batches.plan(0)
    padded_samples = sum(batches.lengths[items].max() * len(items) for items in plan)
    assert batches.lengths.sum() / padded_samples > 0.9  # unsorted it is about 0.6
    assert np.corrcoef([batches.lengths[items].mean() for items in plan], np.arange(len(plan)))[0, 1] < 0.5  # in random order


def test_plans_are_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1600, 200_000, 80).tolist()

    def flat(seed: int, epoch: int) -> list[list[int]]:
        batches = planner(lengths, seed)
        for other in range(epoch):  # history must not matter
            batches.plan(other + 5)
        return [items.tolist() for items in batches.plan(epoch)]

    assert flat(0, 3) == flat(0, 3)
    assert len({str(flat(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    batches = planner(lengths)
    draws = {batches.rng(item, epoch).integers(2**60) for item in (0, 1) for epoch in (-1, 0, 1)}
    assert len(draws) == 6 and batches.rng(1, 2).integers(2**60) == planner(lengths).rng(1, 2).integers(2**60)


@pytest.mark.parametrize("crop_seconds", [0.025, 0.1, 0.33, 1.0, 15.6])
def test_a_crop_has_whole_frames_and_at_most_five_milliseconds_more_than_asked(crop_seconds: float) -> None:
    samples = planner([10**6], crop_seconds=crop_seconds).crop_samples
    assert (samples - 400) % 320 == 0 and samples >= 400
    assert abs(samples - crop_seconds * 16000) < 320


def test_a_crop_below_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_seconds"):
        parse_config(BatchConfig, {"crop_seconds": 0.01}, "run.toml")


def test_crops_start_on_frames_and_reach_every_place(tmp_path: Path, make_corpus: Callable[..., Manifest]) -> None:
    manifest = make_corpus(tmp_path, [ramp(4000), ramp(1700)])
    batches = SpeechBatches(manifest, BatchConfig(crop_seconds=0.12), seed=0)
    firsts = set()
    for epoch in range(150):
        wave, first = batches.load(0, batches.rng(0, epoch))
        start = round(float(wave[0]) * 2**20)
        assert start == 320 * first and len(wave) == batches.crop_samples == 2000
        np.testing.assert_array_equal(wave, ramp(4000)[start : start + 2000])
        firsts.add(first)
    assert firsts == set(range((4000 - 2000) // 320 + 1))
    wave, first = batches.load(1, batches.rng(1, 0))
    assert first == 0 and np.array_equal(wave, ramp(1700))  # a short one comes whole
    whole, first = SpeechBatches(manifest, BatchConfig(), seed=0, crop=False).load(0, np.random.default_rng(0))
    assert first == 0 and len(whole) == 4000


def test_labels_stay_on_their_samples_through_crops_and_padding(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    lengths = [4000, 6543, 1700, 2345]
    manifest = make_corpus(tmp_path, [ramp(length) for length in lengths])
    counts = {name: num_frames(length) for name, length in zip(manifest.ids, lengths, strict=True)}
    labels = Labels(make_labels(tmp_path / "labels", counts, num_classes=1000))  # frame t has label t
    config = PretrainConfig(
        out="", manifest="", objective="hubert", labels="", encoder=EncoderConfig(architecture="tiny"),
        batches=BatchConfig(crop_seconds=0.12), training={"max_steps": 1},  # type: ignore[arg-type]
    )  # fmt: skip
    task = HubertTask(config, manifest, labels)
    for epoch in range(20):
        batch = task.collate(np.array([3, 0, 1, 2]), epoch)
        assert batch.num_samples.tolist() == [2000, 2000, 2000, 1700]
        assert batch.labels.shape == batch.mask.shape == (4, num_frames(2000))
        for wave, length, mask, target in zip(*batch[:2], batch.mask, batch.labels, strict=True):
            start = round(float(wave[0]) * 2**20)
            frames = num_frames(int(length))
            assert target[:frames].tolist() == list(range(start // 320, start // 320 + frames))
            assert (target[frames:] == IGNORED).all() and not mask[frames:].any() and mask.any()
            assert not wave[length:].any()


def test_a_batch_is_a_function_of_items_and_epoch(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    manifest = make_corpus(tmp_path, [ramp(6000), ramp(5000), ramp(7000)])
    labels = Labels(
        make_labels(tmp_path / "labels", {name: num_frames(u.length) for name, u in zip(manifest.ids, manifest, strict=True)})
    )
    config = PretrainConfig(
        out="", manifest="", objective="hubert", labels="", batches=BatchConfig(crop_seconds=0.12),
        encoder=EncoderConfig(architecture="tiny"), training={"max_steps": 1},  # type: ignore[arg-type]
    )  # fmt: skip
    task, again = HubertTask(config, manifest, labels), HubertTask(config, manifest, labels)
    together = task.collate(np.array([0, 1, 2]), 4)
    alone = [again.collate(np.array([item]), 4) for item in (2, 0, 1)]  # of a rank that has one item, in another order
    for batch, item in zip(alone, (2, 0, 1), strict=True):
        for tensor, row in zip(batch, together, strict=True):
            assert torch.equal(tensor[0], row[item])
    assert not torch.equal(task.collate(np.array([0]), 5).mask, together.mask[:1])


def test_padding_keeps_type_and_value() -> None:
    rows = pad([np.array([1, 2, 3]), np.array([4])], IGNORED)
    assert rows.dtype == torch.int64 and rows.tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert pad([np.zeros((0, 2)), np.ones((1, 2))], 5).tolist() == [[[5, 5]], [[1, 1]]]
