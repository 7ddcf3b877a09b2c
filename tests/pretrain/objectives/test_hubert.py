import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import num_frames
from pretrain.model.config import EncoderConfig
from pretrain.objectives import pretraining
from pretrain.objectives.hubert import Hubert, HubertBatch, HubertConfig, HubertTask, hubert_batch
from pretrain.objectives.penalty import feature_penalty
from pretrain.objectives.pnmi import perplexity
from pretrain.objectives.pretraining import PretrainConfig, pretrain
from pretrain.training.checkpoint import latest_checkpoint
from tests.reference.convolutions import randomize
from tests.reference.losses import hubert_loss
from tests.reference.splitting import assert_batch_is_the_sum_of

LENGTHS = [6000, 3000, 9000]


def model(front_end: str = "filterbank", num_classes: int = 7, **options: Any) -> Hubert:
    torch.manual_seed(0)
    encoder = EncoderConfig(
        architecture="tiny", front_end=front_end, input_dropout=0.0, dropout=0.0, num_mels=20
    )  # type: ignore[arg-type]
    module = Hubert(encoder, HubertConfig(final_dim=16, **options), num_classes)
    randomize(module)
    return module


def utterance(length: int, num_classes: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Waveform, mask and labels, one label fewer than frames; the frame without is masked."""
    rng = np.random.default_rng(length)
    frames = num_frames(length)
    mask = rng.random(frames) < 0.4
    mask[-1] = True
    return (
        (0.1 * rng.standard_normal(length)).astype(np.float32),
        mask,
        rng.integers(0, num_classes, frames - 1),
    )


def batch(lengths: list[int] = LENGTHS) -> HubertBatch:
    return hubert_batch(*zip(*map(utterance, lengths), strict=True))


def parts(lengths: list[int] = LENGTHS) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Masks, labels (-1 where there is none) and, of frames with a label, which are masked: of each
    utterance."""
    found = [utterance(length) for length in lengths]
    masks = [torch.from_numpy(mask) for _, mask, _ in found]
    labels = [torch.from_numpy(np.append(known, -1)) for *_, known in found]
    return masks, labels, [mask & (known >= 0) for mask, known in zip(masks, labels, strict=True)]


@torch.no_grad()
def projected(module: Hubert, data: HubertBatch) -> tuple[Tensor, ...]:
    """What the loss compares with the class embeddings: (frames, final_dim) of each utterance."""
    x = module.encoder.encode(data.waveforms, data.layout, data.mask).last
    return data.layout.split(module.project(x))


def test_a_batch_numbers_its_frames_and_weighs_them_by_utterance() -> None:
    data, (masks, labels, targets) = batch(), parts()
    assert data.layout.num_samples == tuple(LENGTHS) and torch.equal(data.mask, torch.cat(masks))
    whole, owner = torch.cat(labels), torch.repeat_interleave(torch.tensor(data.layout.num_frames))
    assert torch.equal(data.masked, torch.where(torch.cat(targets))[0]) and torch.equal(
        data.masked_labels, whole[data.masked]
    )
    unmasked = torch.where((whole >= 0) & ~data.mask)[0]
    assert torch.equal(data.unmasked, unmasked) and torch.equal(data.unmasked_labels, whole[unmasked])
    for number, (target, frames) in enumerate(zip(targets, data.layout.num_frames, strict=True)):
        own, its = owner == number, owner[data.unmasked] == number
        count = float(target.sum())
        # float32 sums: an utterance's weights amount to its masked frames with a label
        assert float(data.penalty_weights[own].sum()) == pytest.approx(count, rel=1e-6)
        assert float(data.unmasked_weights[its].sum()) == pytest.approx(count, rel=1e-6)
        assert data.penalty_weights[own].unique().numel() == data.unmasked_weights[its].unique().numel() == 1
        assert int(own.sum()) == frames
    assert [x.dtype for x in (data.waveforms, data.unmasked_weights, data.penalty_weights)] == [
        torch.float32
    ] * 3


def test_an_utterance_all_of_whose_frames_are_masked_has_none_to_see() -> None:
    wave, mask, labels = utterance(3000)
    data = hubert_batch([wave, wave], [np.ones_like(mask), mask], [labels, labels])
    assert data.unmasked_weights.isfinite().all() and (data.unmasked >= len(mask)).all()
    assert float(data.penalty_weights[: len(mask)].sum()) == pytest.approx(len(labels))


def test_the_loss_is_the_papers_summed_over_masked_frames() -> None:
    module, data, (masks, labels, targets) = model(), batch(), parts()
    loss = module(data)
    total, count, correct = hubert_loss(
        projected(module, data), module.class_embeddings.detach(), labels, masks, 0.1
    )
    assert int(loss.count) == count == int(torch.cat(targets).sum()) > 10
    assert loss.total.item() == pytest.approx(total, rel=1e-5)  # float32 against float64
    assert loss.metrics["prediction_loss"][0].item() == pytest.approx(total, rel=1e-5)
    assert loss.metrics["accuracy"][0].item() == correct
    histogram, _ = loss.metrics["_predicted"]
    assert histogram.shape == (7,) and histogram.sum() == count


def test_the_temperature_divides_and_what_lies_between_utterances_adds_nothing() -> None:
    module, data, (masks, labels, _) = (
        model("waveform", temperature=0.5, feature_penalty=0.0),
        batch(),
        parts(),
    )
    total, _, _ = hubert_loss(projected(module, data), module.class_embeddings.detach(), labels, masks, 0.5)
    assert module(data).total.item() == pytest.approx(total, rel=1e-5)
    filled = torch.full_like(data.waveforms, 0.7)
    for (first, _), length in zip(data.layout.slot_bounds, LENGTHS, strict=True):
        filled[320 * first : 320 * first + length] = data.waveforms[320 * first : 320 * first + length]
    assert not torch.equal(filled, data.waveforms)
    assert module(data._replace(waveforms=filled)).total.item() == module(data).total.item()


@pytest.mark.parametrize("front_end", ["waveform", "filterbank"])
def test_the_penalty_is_each_utterances_mean_square_feature_times_its_masked_frames(front_end: str) -> None:
    data, (_, _, targets) = batch(), parts()
    module = model(front_end, feature_penalty=10.0)
    features = data.layout.split(module.encoder.features(data.waveforms, data.layout).detach())
    expected = sum(
        10.0 * float(target.sum()) * float(own.square().mean())
        for own, target in zip(features, targets, strict=True)
    )
    if front_end == "filterbank":  # nothing there to keep small
        expected = 0.0
    loss = module(data)
    assert (loss.total - loss.metrics["prediction_loss"][0]).item() == pytest.approx(
        expected, rel=1e-4, abs=1e-3
    )


def test_unmasked_frames_weigh_like_their_mean() -> None:
    data, (masks, labels, targets) = batch(), parts()
    plain, both = model(), model(unmasked_weight=0.5)
    expected, unmasked_correct, unmasked_count = plain(data).total.item(), 0, 0
    for x, mask, label, target in zip(projected(both, data), masks, labels, targets, strict=True):
        total, count, correct = hubert_loss([x], both.class_embeddings.detach(), [label], [~mask], 0.1)
        expected += 0.5 * total / count * int(target.sum())
        unmasked_correct, unmasked_count = unmasked_correct + correct, unmasked_count + count
    loss = both(data)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert int(loss.count) == int(plain(data).count)
    assert [int(value) for value in loss.metrics["accuracy_unmasked"]] == [unmasked_correct, unmasked_count]


@pytest.mark.parametrize("front_end", ["waveform", "filterbank"])
def test_every_term_is_a_sum_over_utterances_so_that_batches_can_be_split(front_end: str) -> None:
    module = model(front_end, unmasked_weight=0.5)
    together = module(batch())
    assert_batch_is_the_sum_of(together, [module(batch([length])) for length in LENGTHS], module)


@pytest.mark.parametrize("front_end", ["waveform", "filterbank"])
def test_a_batch_without_a_masked_frame_has_loss_and_count_zero(front_end: str) -> None:
    waves, masks, labels = zip(*map(utterance, LENGTHS), strict=True)
    module = model(front_end, unmasked_weight=1.0)
    loss = module(hubert_batch(waves, [np.zeros_like(mask) for mask in masks], labels))
    loss.total.backward()
    assert loss.total.item() == loss.count.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("front_end", ["waveform", "filterbank"])
def test_autocast_to_bfloat16_runs_with_a_loss_in_float32(front_end: str) -> None:
    module, data = model(front_end, unmasked_weight=0.5), batch()
    expected = module(data).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(data)
    assert loss.total.dtype == torch.float32
    # 8 bits of mantissa, averaged over 50 frames
    assert loss.total.item() == pytest.approx(expected.item(), rel=0.02)
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_the_penalty_is_in_float32_under_autocast() -> None:
    features, weights = torch.randn(300, 8, requires_grad=True), torch.rand(300)
    expected = feature_penalty(features, weights, 10.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_penalty(features, weights, 10.0)
    assert found.dtype == torch.float32 and found.item() == expected.item()


def test_perplexity_counts_classes_in_use() -> None:
    assert perplexity(np.array([3.0, 3, 3, 0])) == pytest.approx(3)
    assert perplexity(np.array([0.0, 5])) == 1
    assert 1 < perplexity(np.array([9.0, 1])) < 2


def config(folder: Path, manifest: Manifest, **changes: Any) -> PretrainConfig:
    tree = {
        "out": str(folder / "run"),
        "manifest": str(manifest.folder),
        "objective": "hubert",
        "labels": str(folder / "labels"),
        "encoder": {"architecture": "tiny", "layer_drop": 0.2, "attention_dropout": 0.1},
        "batches": {"batch_seconds": 2.0, "crop_seconds": 0.5},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "alarm": {"after_steps": 1000},
        "training": {"max_steps": 8, "log_every": 2, "checkpoint_every": 3, "device": "cpu"},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return PretrainConfig.model_validate_json(json.dumps(tree))


def corpus(
    folder: Path, make_corpus: Callable[..., Manifest], lengths: list[int], splits: list[str] | None = None
) -> Manifest:
    rng = np.random.default_rng(0)
    return make_corpus(
        folder, [0.1 * rng.standard_normal(length).astype(np.float32) for length in lengths], splits=splits
    )


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_a_label_more_or_fewer_is_accepted(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path], difference: int
) -> None:
    manifest = corpus(tmp_path, make_corpus, [4000])
    frames = num_frames(4000)
    make_labels(tmp_path / "labels", {"u00": frames + difference})
    task = HubertTask(config(tmp_path, manifest), manifest, Labels(tmp_path / "labels"))
    data = task.collate(np.array([0]), 0)
    assert data.layout.num_frames == (frames,)
    known = torch.cat([data.masked, data.unmasked]).sort().values
    assert known.tolist() == list(range(frames + min(0, difference)))  # each frame that has a label, once
    assert torch.equal(
        torch.cat([data.masked_labels, data.unmasked_labels]), torch.cat([data.masked, data.unmasked]) % 5
    )


@pytest.mark.parametrize("difference", [-2, 2, 12])
def test_labels_of_another_length_are_fatal_and_the_utterance_named(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path], difference: int
) -> None:
    manifest = corpus(tmp_path, make_corpus, [4000, 5000], splits=["train", "dev"])
    make_labels(tmp_path / "labels", {"u00": num_frames(4000), "u01": num_frames(5000) + difference})
    with pytest.raises(
        ValueError, match=f"{15 + difference} labels for utterance 'u01', which has 15 frames"
    ):
        pretrain(config(tmp_path, manifest))


def test_an_utterance_without_labels_is_fatal_and_named(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    manifest = corpus(tmp_path, make_corpus, [4000, 5000])
    make_labels(tmp_path / "labels", {"u00": num_frames(4000)})
    with pytest.raises(ValueError, match="no labels for utterance 'u01'"):
        pretrain(config(tmp_path, manifest))


def test_a_hubert_run_stopped_anywhere_continues_bit_for_bit(
    tmp_path: Path,
    make_corpus: Callable[..., Manifest],
    make_labels: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With crops, masks, dropout, attention dropout and LayerDrop, across the end of an epoch."""
    lengths = [9000, 4000, 12000, 30000, 7000, 16000]
    manifest = corpus(tmp_path, make_corpus, lengths, splits=["train"] * 5 + ["dev"])
    make_labels(tmp_path / "labels", {f"u{i:02d}": num_frames(length) for i, length in enumerate(lengths)})
    whole = config(tmp_path, manifest, out=str(tmp_path / "whole"))
    summary = pretrain(whole)
    assert summary["parameters"] > 1e5 and summary["utterances_left_out"] == 0
    assert {"valid_loss", "valid_accuracy", "prediction_perplexity", "accuracy"} <= summary.keys()

    class Cut(HubertTask):
        def before_step(self, step: int) -> None:
            super().before_step(step)
            if step == 5:
                raise RuntimeError("power cut")

    cut = config(tmp_path, manifest, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setitem(pretraining.TASKS, "hubert", Cut)
        pretrain(cut)
    assert pretrain(cut)["steps_this_time"] == 5
    ends = [latest_checkpoint(Path(run.out)) for run in (whole, cut)]
    assert ends[0] is not None and ends[1] is not None
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    curves = [
        [
            {k: v for k, v in json.loads(line).items() if k != "s_per_second"}
            for line in Path(run.out, "metrics.jsonl").read_text().splitlines()
        ]
        for run in (whole, cut)
    ]
    assert curves[0] == curves[1]


def test_a_collapsed_hubert_run_stops_with_a_message(
    tmp_path: Path,
    make_corpus: Callable[..., Manifest],
    make_labels: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = corpus(tmp_path, make_corpus, [9000, 4000])
    make_labels(tmp_path / "labels", {"u00": num_frames(9000), "u01": num_frames(4000)})

    class Collapsed(HubertTask):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            torch.nn.init.zeros_(self.model.project.weight)  # every frame looks the same

    monkeypatch.setitem(pretraining.TASKS, "hubert", Collapsed)
    with pytest.raises(
        ValueError, match=r"stopped at step 4: collapsed: prediction_perplexity is 1\.00.*step_00000003"
    ):
        pretrain(config(tmp_path, manifest, alarm={"after_steps": 4}, optimizer={"lr": 1e-9}))
