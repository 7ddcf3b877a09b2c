import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain import pretraining
from pretrain.checkpoint import latest_checkpoint
from pretrain.encoder import EncoderConfig
from pretrain.frontend import num_frames
from pretrain.hubert import IGNORED, Hubert, HubertBatch, HubertConfig, perplexity
from pretrain.labels import Labels
from pretrain.manifest import Manifest
from pretrain.pretraining import HubertTask, PretrainConfig, pretrain
from tests.reference.convolutions import randomize
from tests.reference.losses import hubert_loss

LENGTHS = [6000, 3000, 9000]


def model(front_end: str = "filterbank", num_classes: int = 7, **options: Any) -> Hubert:
    torch.manual_seed(0)
    encoder = EncoderConfig(architecture="tiny", front_end=front_end, input_dropout=0.0, dropout=0.0, num_mels=20)  # type: ignore[arg-type]
    module = Hubert(encoder, HubertConfig(final_dim=16, **options), num_classes)
    randomize(module)
    return module


def batch(lengths: list[int] = LENGTHS, num_classes: int = 7) -> HubertBatch:
    """Row i is the same whatever the other rows are."""
    waves, frames = torch.zeros(len(lengths), max(lengths)), num_frames(max(lengths))
    mask, labels = torch.zeros(len(lengths), frames, dtype=torch.bool), torch.full((len(lengths), frames), IGNORED)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        waves[row, :length] = 0.1 * torch.randn(length, generator=generator)
        own = num_frames(length)
        mask[row, :own] = torch.rand(own, generator=generator) < 0.4
        labels[row, :own] = torch.randint(num_classes, (own,), generator=generator)
        labels[row, own - 1] = IGNORED  # one label fewer than frames
        mask[row, own - 1] = True
    return HubertBatch(waves, torch.tensor(lengths), mask, labels)


def test_the_loss_is_the_papers_summed_over_masked_frames() -> None:
    module, data = model(), batch()
    loss = module(data)
    with torch.no_grad():
        x = module.project(module.encoder(data.waveforms, data.num_samples, data.mask))
    total, count, correct = hubert_loss(x, module.class_embeddings.detach(), data.labels, data.mask, 0.1)
    assert int(loss.count) == count == int((data.mask & (data.labels != IGNORED)).sum()) > 10
    assert loss.total.item() == pytest.approx(total, rel=1e-5)  # float32 against float64
    assert loss.metrics["prediction_loss"][0].item() == pytest.approx(total, rel=1e-5)
    assert loss.metrics["accuracy"][0].item() == correct
    histogram, _ = loss.metrics["_predicted"]
    assert histogram.shape == (7,) and histogram.sum() == count


def test_the_temperature_divides_and_padding_adds_nothing() -> None:
    module, data = model(temperature=0.5), batch()
    with torch.no_grad():
        x = module.project(module.encoder(data.waveforms, data.num_samples, data.mask))
        total, _, _ = hubert_loss(x, module.class_embeddings, data.labels, data.mask, 0.5)
        assert module(data).total.item() == pytest.approx(total, rel=1e-5)
        wider = HubertBatch(
            F.pad(data.waveforms, (0, 3200)), data.num_samples, F.pad(data.mask, (0, 10)), F.pad(data.labels, (0, 10), value=IGNORED)
        )  # fmt: skip
        assert module(wider).total.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("front_end", ["waveform", "filterbank"])
def test_the_penalty_is_each_utterances_mean_square_feature_times_its_masked_frames(front_end: str) -> None:
    data = batch()
    module = model(front_end, feature_penalty=10.0)
    features = module.encoder.features(data.waveforms, data.num_samples).detach()
    expected = 0.0
    for row, mask, labels in zip(features, data.mask, data.labels, strict=True):
        known = labels != IGNORED
        expected += 10.0 * float((mask & known).sum()) * float(row[known].square().mean())
    if front_end == "filterbank":  # nothing there to keep small
        expected = 0.0
    loss = module(data)
    assert (loss.total - loss.metrics["prediction_loss"][0]).item() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_unmasked_frames_weigh_like_their_mean() -> None:
    data = batch()
    plain, both = model(), model(unmasked_weight=0.5)
    expected = plain(data).total.item()
    x = both.project(both.encoder(data.waveforms, data.num_samples, data.mask)).detach()
    for row, mask, labels in zip(x, data.mask, data.labels, strict=True):
        seen = ~mask & (labels != IGNORED)
        total, count, _ = hubert_loss(row[None], both.class_embeddings.detach(), labels[None], seen[None], 0.1)
        expected += 0.5 * total / count * int((mask & (labels != IGNORED)).sum())
    assert both(data).total.item() == pytest.approx(expected, rel=1e-5)
    assert int(both(data).count) == int(plain(data).count)


@pytest.mark.parametrize("front_end", ["waveform", "filterbank"])
def test_every_term_is_a_sum_over_utterances_so_that_batches_can_be_split(front_end: str) -> None:
    module = model(front_end, unmasked_weight=0.5)
    together = module(batch())
    parts = [module(batch([length])) for length in LENGTHS]
    # float32, matrices of other shapes
    assert together.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-5)
    assert together.count.item() == sum(part.count.item() for part in parts)
    together.total.backward()
    whole = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    sum(part.total for part in parts).backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            # gradients of thousands of summed products in float32, beside the largest of the tensor
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-4 * float(whole[name].abs().max()))


def test_a_batch_without_a_masked_frame_has_loss_and_count_zero() -> None:
    data = batch()
    for front_end in ("waveform", "filterbank"):
        loss = model(front_end, unmasked_weight=1.0)(data._replace(mask=torch.zeros_like(data.mask)))
        loss.total.backward()
        assert loss.total.item() == loss.count.item() == 0


def test_perplexity_counts_classes_in_use() -> None:
    assert perplexity(np.array([3.0, 3, 3, 0])) == pytest.approx(3)
    assert perplexity(np.array([0.0, 5])) == 1
    assert 1 < perplexity(np.array([9.0, 1])) < 2


def config(folder: Path, manifest: Manifest, **changes: Any) -> PretrainConfig:
    tree = {
        "out": str(folder / "run"), "manifest": str(manifest.folder), "objective": "hubert", "labels": str(folder / "labels"),
        "encoder": {"architecture": "tiny", "layer_drop": 0.2, "attention_dropout": 0.1}, "batches": {"batch_seconds": 2.0, "crop_seconds": 0.5},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2}, "alarm": {"after_steps": 1000},
        "training": {"max_steps": 8, "log_every": 2, "checkpoint_every": 3, "device": "cpu"},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return PretrainConfig.model_validate_json(json.dumps(tree))


def corpus(folder: Path, make_corpus: Callable[..., Manifest], lengths: list[int], splits: list[str] | None = None) -> Manifest:
    rng = np.random.default_rng(0)
    return make_corpus(folder, [0.1 * rng.standard_normal(length).astype(np.float32) for length in lengths], splits=splits)


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_a_label_more_or_fewer_is_accepted(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path], difference: int
) -> None:
    manifest = corpus(tmp_path, make_corpus, [4000])
    frames = num_frames(4000)
    make_labels(tmp_path / "labels", {"u00": frames + difference})
    task = HubertTask(config(tmp_path, manifest), manifest, Labels(tmp_path / "labels"))
    labels = task.collate(np.array([0]), 0).labels[0]
    assert len(labels) == frames and int((labels == IGNORED).sum()) == max(0, -difference)


@pytest.mark.parametrize("difference", [-2, 2, 12])
def test_labels_of_another_length_are_fatal_and_the_utterance_named(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path], difference: int
) -> None:
    manifest = corpus(tmp_path, make_corpus, [4000, 5000], splits=["train", "dev"])
    make_labels(tmp_path / "labels", {"u00": num_frames(4000), "u01": num_frames(5000) + difference})
    with pytest.raises(ValueError, match=f"{15 + difference} labels for utterance 'u01', which has 15 frames"):
        pretrain(config(tmp_path, manifest))


def test_an_utterance_without_labels_is_fatal_and_named(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    manifest = corpus(tmp_path, make_corpus, [4000, 5000])
    make_labels(tmp_path / "labels", {"u00": num_frames(4000)})
    with pytest.raises(ValueError, match="no labels for utterance 'u01'"):
        pretrain(config(tmp_path, manifest))


def test_a_hubert_run_stopped_anywhere_continues_bit_for_bit(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
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
        patched.setattr(pretraining, "HubertTask", Cut)
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
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = corpus(tmp_path, make_corpus, [9000, 4000])
    make_labels(tmp_path / "labels", {"u00": num_frames(9000), "u01": num_frames(4000)})

    class Collapsed(HubertTask):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            torch.nn.init.zeros_(self.model.project.weight)  # every frame looks the same

    monkeypatch.setattr(pretraining, "HubertTask", Collapsed)
    with pytest.raises(ValueError, match=r"stopped at step 4: collapsed: prediction_perplexity is 1\.00.*step_00000003"):
        pretrain(config(tmp_path, manifest, alarm={"after_steps": 4}, optimizer={"lr": 1e-9}))
