import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.manifest import Manifest
from pretrain.data.utterance import num_frames
from pretrain.model.config import EncoderConfig
from pretrain.objectives import pretraining
from pretrain.objectives.pretraining import PretrainConfig, pretrain
from pretrain.objectives.wav2vec2 import (
    GumbelQuantizer,
    Wav2Vec2,
    Wav2Vec2Batch,
    Wav2Vec2Config,
    Wav2Vec2Task,
    draw_distractors,
    wav2vec2_batch,
)
from tests.reference.convolutions import randomize
from tests.reference.losses import contrastive_loss, diversity
from tests.reference.splitting import assert_batch_is_the_sum_of

LENGTHS = [9000, 5000, 7000]


def model(front_end: str = "filterbank", **options: Any) -> Wav2Vec2:
    torch.manual_seed(0)
    encoder = EncoderConfig(
        architecture="tiny", front_end=front_end, input_dropout=0.0, dropout=0.0, num_mels=20
    )  # type: ignore[arg-type]
    module = Wav2Vec2(
        encoder, Wav2Vec2Config(**{"num_entries": 5, "code_dim": 12, "final_dim": 16, **options})
    ).eval()
    randomize(module)
    return module


def utterance(length: int, num_distractors: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Waveform, mask and distractors."""
    rng = np.random.default_rng(length)
    wave = (0.1 * rng.standard_normal(length)).astype(np.float32)
    mask = rng.random(num_frames(length)) < 0.5
    return wave, mask, draw_distractors(int(mask.sum()), num_distractors, rng)


def batch(lengths: list[int] = LENGTHS) -> Wav2Vec2Batch:
    return wav2vec2_batch(*zip(*map(utterance, lengths), strict=True))


def test_a_batch_numbers_its_frames_and_weighs_them_by_utterance() -> None:
    data = batch()
    waves, masks, distractors = zip(*map(utterance, LENGTHS), strict=True)
    assert data.layout.num_samples == tuple(map(len, waves)) and data.num_masked == tuple(
        int(mask.sum()) for mask in masks
    )
    assert np.array_equal(data.mask, np.concatenate(masks)) and torch.equal(
        data.masked, torch.where(data.mask)[0]
    )
    assert np.array_equal(data.distractors, np.concatenate(distractors))
    for weights, count in zip(data.layout.split(data.penalty_weights), data.num_masked, strict=True):
        # float32
        assert weights.unique().numel() == 1 and float(weights.sum()) == pytest.approx(count, rel=1e-6)
    assert data.waveforms.dtype == data.penalty_weights.dtype == torch.float32


@pytest.mark.parametrize(
    "entries", [{"num_entries": 5, "num_groups": 2}, {"num_entries": 2, "num_groups": 1}]
)
def test_the_loss_is_the_papers_summed_over_masked_frames(entries: dict) -> None:
    """With one group of two entries about half of the distractors are the positive in disguise, and some
    frames have no other."""
    module = model(**entries, diversity_weight=0.3)
    data = batch()
    loss = module(data)
    with torch.no_grad():
        encoded = module.encoder.encode(data.waveforms, data.layout, data.mask)
        x = module.project(encoded.last)
        quantized, codes, soft = module.quantizer(encoded.normed)
        targets = module.project_code(quantized)
    each = [data.layout.split(rows) for rows in (x, targets, codes, data.mask)]
    total, count, correct = contrastive_loss(*each, data.distractors.split(data.num_masked), 0.1)  # type: ignore[arg-type]
    assert int(loss.count) == count == int(data.mask.sum()) > 20
    # float32 against float64
    assert loss.metrics["contrastive_loss"][0].item() == pytest.approx(total, rel=1e-5)
    assert loss.metrics["accuracy"][0].item() == correct
    spread = diversity(soft[data.mask])
    # (size - perplexity) cancels: 1e-6 of size remain
    assert loss.metrics["diversity_loss"][0].item() == pytest.approx(spread * count, abs=1e-6 * count * 10)
    assert loss.total.item() == pytest.approx(total + 0.3 * spread * count, rel=1e-5)
    histogram, _ = loss.metrics["_codes"]
    expected = F.one_hot(codes[data.mask], entries["num_entries"]).sum(0)
    assert torch.equal(histogram, expected.float())


def test_a_distractor_with_the_codes_of_the_positive_does_not_count() -> None:
    module = model()
    data = batch()
    torch.nn.init.zeros_(module.quantizer.logits.weight)  # every frame has the same codes
    loss = module(data)
    assert loss.metrics["contrastive_loss"][0].item() == 0
    # which is why a collapse looks like success and the alarm watches the codes
    assert loss.metrics["accuracy"][0] == loss.count
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_the_diversity_is_zero_for_even_use_and_nearly_one_for_one_entry() -> None:
    data = batch()
    for bias, expected in ((0.0, 0.0), (50.0, 1 - 2 / 10)):  # perplexity 5 in each of two groups, or 1
        module = model()
        torch.nn.init.zeros_(module.quantizer.logits.weight)
        with torch.no_grad():
            module.quantizer.logits.bias.zero_()[[0, 7]] = bias
        total, count = module(data).metrics["diversity_loss"]
        assert (total / count).item() == pytest.approx(expected, abs=1e-5)  # the logarithm's 1e-7


def test_batch_mates_change_nothing_but_the_diversity() -> None:
    module = model("waveform", diversity_weight=0.0)
    together = module(batch())
    parts = [module(batch([length])) for length in LENGTHS]
    assert together.metrics["accuracy"][0].item() == sum(part.metrics["accuracy"][0].item() for part in parts)
    # a key's bias moves no attention weight, so its gradient is rounding alone
    assert_batch_is_the_sum_of(together, parts, module, floor=1e-4)


def test_what_lies_between_utterances_changes_nothing() -> None:
    module, data = model("waveform"), batch()
    filled = torch.full_like(data.waveforms, 0.7)
    for (first, _), length in zip(data.layout.slot_bounds, LENGTHS, strict=True):
        filled[320 * first : 320 * first + length] = data.waveforms[320 * first : 320 * first + length]
    assert not torch.equal(filled, data.waveforms)
    assert module(data._replace(waveforms=filled)).total.item() == module(data).total.item()


def test_the_penalty_reaches_a_waveform_front_end() -> None:
    data = batch()
    module = model("waveform", diversity_weight=0.0, feature_penalty=10.0)
    features = data.layout.split(module.encoder.features(data.waveforms, data.layout).detach())
    expected = sum(
        10 * count * float(own.square().mean()) for own, count in zip(features, data.num_masked, strict=True)
    )
    loss = module(data)
    assert (loss.total - loss.metrics["contrastive_loss"][0]).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lengths", [[1100], [700], [700, 9000], [400, 450]])
def test_utterances_with_one_masked_frame_or_none_are_no_fault(lengths: list[int]) -> None:
    waves = [utterance(length)[0] for length in lengths]
    masks = [np.zeros(num_frames(length), bool) for length in lengths]
    masks[0][: 1 if lengths[0] > 1000 else 0] = True
    distractors = [draw_distractors(int(mask.sum()), 8, np.random.default_rng(0)) for mask in masks]
    module = model("waveform").train()
    loss = module(wav2vec2_batch(waves, masks, distractors))
    loss.total.backward()
    assert int(loss.count) == sum(int(mask.sum()) for mask in masks) and loss.total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("front_end", ["waveform", "filterbank"])
def test_autocast_to_bfloat16_runs_with_a_loss_in_float32(front_end: str) -> None:
    module, data = model(front_end), batch()
    expected = module(data).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(data)
    assert loss.total.dtype == torch.float32
    # 8 bits of mantissa, and a code here and there that another entry wins
    assert loss.total.item() == pytest.approx(expected.item(), rel=0.05)
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@given(st.integers(2, 50), st.integers(1, 100), st.integers(0, 1000))
def test_distractors_are_other_masked_frames(num_masked: int, count: int, seed: int) -> None:
    drawn = draw_distractors(num_masked, count, np.random.default_rng(seed))
    assert drawn.shape == (num_masked, count) and drawn.min() >= 0 and drawn.max() < num_masked
    assert not (drawn == np.arange(num_masked)[:, None]).any()


def test_distractors_are_uniform() -> None:
    drawn = draw_distractors(5, 40_000, np.random.default_rng(0))
    for place, row in enumerate(drawn):
        counts = np.bincount(row, minlength=5)
        assert counts[place] == 0
        # 40,000 draws of probability 1/4: standard deviation 87
        assert np.abs(np.delete(counts, place) - 10_000).max() < 450


def test_a_frame_masked_alone_can_only_be_compared_with_itself() -> None:
    assert draw_distractors(1, 3, np.random.default_rng(0)).tolist() == [[0, 0, 0]]
    assert draw_distractors(0, 3, np.random.default_rng(0)).shape == (0, 3)


def test_the_quantizer_picks_one_entry_a_group_and_passes_the_gradient_through() -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(6, Wav2Vec2Config(num_entries=4, code_dim=10, num_groups=2))
    x = torch.randn(50, 6)
    quantized, codes, soft = quantizer(x)
    assert quantized.shape == (50, 10) and codes.shape == (50, 2) and soft.shape == (50, 2, 4)
    for row, numbers in zip(quantized, codes, strict=True):
        expected = torch.cat([quantizer.codes[group, number] for group, number in enumerate(numbers)])
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)  # hard + soft - soft in float32
    quantized.square().sum().backward()
    assert quantizer.logits.weight.grad is not None and quantizer.logits.weight.grad.abs().sum() > 0
    assert not torch.equal(quantizer(x)[1], codes)  # noise in training
    quantizer.eval()
    assert torch.equal(quantizer(x)[1], quantizer.logits(x).unflatten(1, (2, 4)).argmax(2))


def test_the_temperature_anneals_by_the_step() -> None:
    module = model(gumbel_temperature=(2.0, 0.5), gumbel_decay=0.9)
    for step, expected in ((0, 2.0), (1, 1.8), (5, 2 * 0.9**5), (13, 2 * 0.9**13), (14, 0.5), (1000, 0.5)):
        module.set_step(step)
        assert module.quantizer.temperature == pytest.approx(expected)


def config(folder: Path, manifest: Manifest, **changes: Any) -> PretrainConfig:
    tree = {
        "out": str(folder / "run"),
        "manifest": str(manifest.folder),
        "objective": "wav2vec2",
        "encoder": {"architecture": "tiny"},
        "batches": {"batch_seconds": 2.0, "crop_seconds": 1.0},
        "wav2vec2": {"num_entries": 8, "code_dim": 16, "final_dim": 16, "num_distractors": 10},
        "optimizer": {"lr": 2e-3},
        "training": {"max_steps": 6, "log_every": 2, "checkpoint_every": 3, "device": "cpu"},
    }
    return PretrainConfig.model_validate_json(json.dumps({**tree, **changes}))


@pytest.fixture
def manifest(tmp_path: Path, make_corpus: Callable[..., Manifest]) -> Manifest:
    rng = np.random.default_rng(0)
    return make_corpus(
        tmp_path,
        [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in (9000, 12000, 16000, 1600)],
    )


def test_a_run_of_the_verb_tells_its_codes_perplexity(tmp_path: Path, manifest: Manifest) -> None:
    summary = pretrain(config(tmp_path, manifest))
    assert 1 <= summary["code_perplexity"] <= 8 and summary["loss_last"] > 0
    assert {"contrastive_loss", "diversity_loss", "accuracy"} <= summary.keys()


def test_batches_of_the_verb_hold_each_utterances_own_masked_frames(
    tmp_path: Path, manifest: Manifest
) -> None:
    task = Wav2Vec2Task(config(tmp_path, manifest), manifest)
    data = task.collate(np.array([2, 0, 3]), 1)
    assert len(data.num_masked) == 3 and torch.equal(data.masked, torch.where(data.mask)[0])
    for mask, count, drawn in zip(
        data.layout.split(data.mask), data.num_masked, data.distractors.split(data.num_masked), strict=True
    ):
        assert int(mask.sum()) == count > 0 and int(drawn.min()) >= 0 and int(drawn.max()) < count
    assert data.distractors.shape == (sum(data.num_masked), 10)


def test_a_collapsed_codebook_stops_the_run_with_a_message(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Collapsed(Wav2Vec2Task):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            torch.nn.init.zeros_(self.model.quantizer.logits.weight)
            with torch.no_grad():
                self.model.quantizer.logits.bias[[0, 8]] = 100.0

    monkeypatch.setitem(pretraining.TASKS, "wav2vec2", Collapsed)
    with pytest.raises(
        ValueError,
        match=r"stopped at step 4: collapsed: code_perplexity is 1\.00.*higher wav2vec2.diversity_weight",
    ):
        pretrain(config(tmp_path, manifest, alarm={"after_steps": 4}))
    assert (tmp_path / "run" / "step_00000003").is_dir() and not (tmp_path / "run" / "meta.json").exists()
