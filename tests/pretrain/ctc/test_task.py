from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.ctc.finetuning import finetune
from pretrain.ctc.model import Layers, Recognizer
from pretrain.ctc.task import CTCConfig, CTCTask
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.manifest import Manifest
from pretrain.model.config import EncoderConfig
from pretrain.training.checkpoint import checkpoint_path, load_weights
from tests.pretrain.ctc.tones import TEXTS, MakeCorpus, save_encoder, settings, spell

# Everything that there is to a recipe.
ALL_ON: dict[str, Any] = {
    "layers": "weighted",
    "freeze_steps": 3,
    "head_lr_scale": 4.0,
    "final_dropout": 0.1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "input_dropout": 0.1,
    "layer_drop": 0.5,
    "mask_start_probability": 0.05,
    "mask_length": 3,
    "mask_channel_probability": 0.02,
    "mask_channel_length": 8,
}
REST = {"feature_norm", "project", "mask_embedding", "positional", "norm", "layers"}


@pytest.fixture
def manifest(tmp_path: Path, make_corpus: MakeCorpus) -> Manifest:
    save_encoder(tmp_path / "encoder", front_end="waveform", conv_norm="layer", num_layers=3)
    splits = ["train", "train", "dev", "train"]
    return make_corpus(tmp_path, [spell(text) for text in TEXTS], texts=TEXTS, splits=splits)


def task(
    manifest: Manifest,
    vocabulary: Vocabulary,
    *,
    pretrained: bool = True,
    layers: Layers = "last",
    norm_first: bool = True,
    **ctc: Any,
) -> CTCTask:
    torch.manual_seed(0)
    batches = SpeechBatches(manifest, BatchConfig(), 0, crop=False)
    architecture = EncoderConfig(
        architecture="tiny", front_end="waveform", conv_norm="layer", norm_first=norm_first
    )
    model = Recognizer(architecture, vocabulary, layers=layers)
    return CTCTask(model, CTCConfig(**ctc), TextConfig(), batches, None, frozen_phases=pretrained, seed=0)


def trained(job: CTCTask) -> set[str]:
    return {
        name.split(".")[1] if name.startswith("encoder") else "head"
        for name, p in job.model.named_parameters()
        if p.requires_grad
    }


def test_phases_freeze_the_encoder_first_and_the_front_end_always(manifest: Manifest) -> None:
    vocabulary = Vocabulary(["a", "b"])
    job = task(manifest, vocabulary, freeze_steps=3)
    assert [job.phase(step) for step in (0, 2, 3, 9)] == [0, 0, 1, 1]
    job.enter_phase(0)
    assert trained(job) == {"head"}
    job.enter_phase(1)
    assert trained(job) == REST | {"head"}
    job = task(manifest, vocabulary, freeze_front_end=False, mask_start_probability=0.0)
    job.enter_phase(job.phase(0))
    assert trained(job) == (REST | {"head", "front_end"}) - {"mask_embedding"}
    # random weights are worth no freezing
    scratch = task(manifest, vocabulary, pretrained=False, freeze_steps=3)
    scratch.enter_phase(scratch.phase(0))
    assert trained(scratch) == REST | {"head", "front_end"}
    for norm_first in (False, True):  # a pre-norm encoder's last norm is of the last output alone
        job = task(manifest, vocabulary, layers="weighted", norm_first=norm_first)
        job.enter_phase(1)
        assert trained(job) == (REST - {"norm"} if norm_first else REST) | {"head"}


def test_training_masks_spans_of_time_and_channels_and_validation_nothing(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    manifest = make_corpus(tmp_path, [spell("ab cd ab cd"), spell("abc")], texts=["ab cd ab cd", "abc"])
    job = task(
        manifest, Vocabulary(["a", "b", "c", "d", "|"]), mask_channel_probability=0.05, mask_channel_length=4
    )
    batch = job.collate(np.array([0, 1]), 0)
    assert batch.mask is not None and batch.channel_mask is not None
    assert batch.layout.num_frames == (82, 22) and len(batch.mask) == 104
    assert all(
        mask.any() and not mask.all() for mask in batch.layout.split(batch.mask)
    ) and batch.channel_mask.shape == (2, 64)
    assert batch.num_targets == (11, 3) and batch.targets[1, 3:].tolist() == [0] * 8
    job.valid_set = job.train_set
    plain = job.collate_validation(np.array([0, 1]))
    assert plain.mask is None and plain.channel_mask is None and torch.equal(plain.inputs, batch.inputs)
    again = job.collate(np.array([0, 1]), 0)
    assert (
        again.mask is not None and torch.equal(again.mask, batch.mask) and job.model(batch).total.isfinite()
    )
    other = job.collate(np.array([0, 1]), 1)
    assert other.mask is not None and not torch.equal(other.mask, batch.mask)


def test_the_head_and_the_weights_of_the_layers_have_a_rate_of_their_own(manifest: Manifest) -> None:
    job = task(manifest, Vocabulary(["a", "b"]), layers="weighted", head_lr_scale=10.0)
    groups = job.parameter_groups()
    names = {parameter: name for name, parameter in job.model.named_parameters()}
    # each once
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            own = not names[parameter].startswith("encoder.")
            assert group["lr_scale"] == (10.0 if own else 1.0)
            assert group.get("weight_decay") == (0.0 if parameter.ndim <= 1 else None)
    assert {names[p] for group in groups if group["lr_scale"] == 10.0 for p in group["params"]} == {
        "layer_weights",
        "head.weight",
        "head.bias",
    }


def test_what_is_frozen_stays_to_the_bit_and_what_is_not_moves(tmp_path: Path, manifest: Manifest) -> None:
    config = settings(
        tmp_path,
        manifest,
        ctc=ALL_ON,
        training={"max_steps": 6, "checkpoint_every": 3, "keep_checkpoints": 9},
    )
    finetune(config)
    fresh = load_weights(tmp_path / "encoder")[0]
    frozen, last = (
        load_weights(run)[0] for run in (_alone(tmp_path / "frozen", Path(config.out), 3), config.out)
    )
    for name, tensor in fresh.items():
        assert torch.equal(frozen[name], tensor), name  # the encoder waited for three steps
        # … and the front end for ever; of a pre-norm encoder the weighted sum does not read the last norm
        still = name.startswith(("encoder.front_end.", "encoder.norm."))
        assert torch.equal(last[name], tensor) == still, name
    assert frozen["layer_weights"].any() and not torch.equal(frozen["head.weight"], last["head.weight"])


def _alone(folder: Path, run: Path, step: int) -> Path:
    """A run that has this checkpoint alone."""
    folder.mkdir()
    checkpoint_path(folder, step).symlink_to(checkpoint_path(run, step))
    return folder


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_resume_with_everything_on_is_the_same_run_to_the_bit(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed in the frozen phase, at its end, and after; with patience, in batches of one utterance."""
    on: dict[str, Any] = {
        "ctc": ALL_ON,
        "batches": {"batch_seconds": 1.0},
        "optimizer": {"lr": 5e-3, "clip_norm": 1.0},
        "training": {
            "max_steps": 8,
            "checkpoint_every": 2,
            "validate_every": 2,
            "patience": 2,
            "log_every": 1,
        },
    }
    whole = finetune(settings(tmp_path, manifest, out=str(tmp_path / "whole"), **on))
    before_step = CTCTask.before_step

    def fail(job: CTCTask, now: int) -> None:
        before_step(job, now)
        if now == step:
            raise RuntimeError("power cut")

    cut = settings(tmp_path, manifest, out=str(tmp_path / "cut"), **on)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(CTCTask, "before_step", fail)
        finetune(cut)
    again = finetune(cut)
    assert {
        key: value
        for key, value in whole.items()
        if key.startswith(("best", "loss", "valid", "steps")) and key != "steps_this_time"
    } == {
        key: value
        for key, value in again.items()
        if key.startswith(("best", "loss", "valid", "steps")) and key != "steps_this_time"
    }
    for best in (False, True):
        one, two = (load_weights(tmp_path / name, best=best) for name in ("whole", "cut"))
        assert one[2] == two[2]  # fingerprints of the weights


def test_the_schedule_has_three_stages_unless_told(tmp_path: Path, manifest: Manifest) -> None:
    config = settings(tmp_path, manifest)
    assert config.optimizer.schedule == "tri_stage" and config.optimizer.tri_stage == (0.1, 0.4, 0.5)
    assert config.optimizer.factor(0, 100) == 0.01 and config.optimizer.factor(30, 100) == 1.0
