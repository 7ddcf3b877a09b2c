from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.checkpoint import save_checkpoint
from pretrain.ctc import Recognizer
from pretrain.encoder import Encoder, EncoderConfig, PositionalConv, load_encoder
from pretrain.frontend import num_frames
from tests.reference.convolutions import randomize

LENGTHS = [6000, 4000, 9999, 400]


def encoder(seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    config = EncoderConfig(**{"architecture": "tiny", "num_layers": 3, "conv_dim": 24, "num_mels": 20, **options})
    module = Encoder(config).eval()
    randomize(module)
    return module


def padded(lengths: list[int] = LENGTHS, extra: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.zeros(len(lengths), max(lengths) + extra)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = 0.1 * torch.randn(length, generator=generator) + 0.02
    return rows, torch.tensor(lengths)


KINDS = [
    {"norm_first": True, "front_end": "filterbank"},
    {"norm_first": False, "front_end": "waveform", "conv_norm": "group"},
    {"norm_first": True, "front_end": "waveform", "conv_norm": "layer", "conv_bias": True, "normalize_waveform": True},
]
NAMES = ["small", "base", "large"]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_an_utterance_has_the_same_features_alone_and_in_any_batch_at_every_layer(kind: dict) -> None:
    module = encoder(**kind)
    waves, lengths = padded(extra=1234)
    together = module.extract_all(waves, lengths)
    assert len(together) == 4
    for row, length in enumerate(lengths.tolist()):
        alone = module.extract_all(waves[row : row + 1, :length], lengths[row : row + 1])
        for layer, (one, many) in enumerate(zip(alone, together, strict=True)):
            frames = num_frames(length)
            # the same float32 products in matrices of another shape; features are of order 1
            torch.testing.assert_close(one[0], many[row, :frames], rtol=1e-4, atol=1e-4, msg=f"layer {layer}, {length} samples")


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_extracting_one_layer_equals_that_layer_of_all(kind: dict) -> None:
    module = encoder(**kind)
    waves, lengths = padded()
    for layer, features in enumerate(module.extract_all(waves, lengths)):
        assert features.shape == (4, num_frames(9999), 64)
        torch.testing.assert_close(module.extract(waves, lengths, layer), features, rtol=0, atol=0)


def test_extracting_a_layer_runs_none_beyond_it() -> None:
    module = encoder()
    calls: list[int] = []
    for number, block in enumerate(module.layers, start=1):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    module.extract(*padded(), 2)
    assert calls == [1, 2]


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer}: this encoder has layers 0 to 3"):
        encoder().extract(*padded(), layer)


@torch.no_grad()
def test_the_last_output_has_passed_the_final_norm_of_pre_norm_models_only() -> None:
    waves, lengths = padded()
    pre, post = encoder(norm_first=True), encoder(norm_first=False)
    torch.testing.assert_close(pre(waves, lengths), pre.norm(pre.extract(waves, lengths, 3)))
    torch.testing.assert_close(post(waves, lengths), post.extract(waves, lengths, 3))
    # and layer 0 of a post-norm model is what that norm gives the first layer
    x = post.project(post.feature_norm(post.features(waves, lengths)))
    valid = torch.arange(x.shape[1]) < num_frames(lengths)[:, None]
    x = x * valid[..., None]
    expected = post.norm(x + post.positional(x))
    torch.testing.assert_close(post.extract(waves, lengths, 0)[valid], expected[valid])


@torch.no_grad()
def test_masked_frames_are_the_mask_embedding_whatever_they_held() -> None:
    module = encoder()
    waves, lengths = padded([8000, 8000])
    features = module.feature_norm(module.features(waves, lengths))
    mask = torch.zeros(features.shape[:2], dtype=torch.bool)
    mask[0, 3:9] = True
    changed = features.clone()
    changed[0, 3:9] = 99.0
    one, two = (module.contextualize(x, lengths, mask) for x in (features, changed))
    assert torch.equal(one, two)
    torch.testing.assert_close(
        one[1], module.contextualize(features, lengths)[1], rtol=1e-5, atol=1e-5
    )  # the other row is untouched
    assert not torch.allclose(one[0], module.contextualize(features, lengths)[0], atol=1e-3)
    x = module.project(features)
    x[0, 3:9] = module.mask_embedding
    outputs: list[Tensor] = []
    module._run(x, lengths, None, outputs)
    assert torch.equal(module.contextualize(features, lengths, mask, layer=0), outputs[0])


@torch.no_grad()
def test_masked_channels_are_zero_in_all_frames_also_the_masked_ones() -> None:
    module = encoder()
    waves, lengths = padded([8000])
    features = module.feature_norm(module.features(waves, lengths))
    mask = torch.zeros(features.shape[:2], dtype=torch.bool)
    mask[0, 3:9] = True
    channels = torch.zeros(1, 64, dtype=torch.bool)
    channels[0, 10:20] = True
    x = module.project(features)
    x[0, 3:9] = module.mask_embedding
    x[:, :, 10:20] = 0
    outputs: list[Tensor] = []
    module._run(x, lengths, None, outputs)
    assert torch.equal(module.contextualize(features, lengths, mask, channels, layer=0), outputs[0])


@pytest.mark.parametrize("scale", [0.1, 0.0, 1.0])
def test_the_front_ends_gradient_is_scaled_and_nothing_else(scale: float) -> None:
    gradients = []
    for factor in (1.0, scale):
        module = encoder(front_end="waveform", conv_norm="layer", feature_gradient_scale=factor)
        waves, lengths = padded([4000, 6000])
        module(waves, lengths).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None})
    full, scaled = gradients
    assert full.keys() == scaled.keys() and any(name.startswith("front_end") for name in full)
    for name, gradient in full.items():
        factor = scale if name.startswith("front_end") else 1.0
        torch.testing.assert_close(scaled[name], factor * gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("kernel", [4, 16, 128, 5])
def test_the_positional_convolution_is_a_weight_normalised_conv1d(kernel: int) -> None:
    torch.manual_seed(0)
    ours = PositionalConv(32, kernel, 4)
    with torch.no_grad():
        ours.magnitude.mul_(torch.rand_like(ours.magnitude) + 0.5)
        ours.bias.normal_()
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(32, 32, kernel, padding=kernel // 2, groups=4), dim=2)
    theirs.parametrizations.weight.original0 = torch.nn.Parameter(ours.magnitude.detach())
    theirs.parametrizations.weight.original1 = torch.nn.Parameter(ours.direction.detach())
    theirs.bias = torch.nn.Parameter(ours.bias.detach())
    x = torch.randn(2, 40, 32)
    y = theirs(x.transpose(1, 2))
    y = F.gelu(y if kernel % 2 else y[..., :-1]).transpose(1, 2)  # an even kernel gives a frame too many
    torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_normalised_waveforms_make_the_model_deaf_to_gain_and_offset() -> None:
    module = encoder(**KINDS[2])
    waves, lengths = padded()
    louder = torch.where(waves != 0, 5 * waves + 1, 0.0)
    valid = torch.arange(num_frames(9999)) < num_frames(lengths)[:, None]
    one, two = module(waves, lengths), module(louder, lengths)
    torch.testing.assert_close(one[valid], two[valid], rtol=2e-3, atol=2e-3)  # eps = 1e-5 beside a variance of 0.01


def test_layer_drop_is_a_function_of_seed_and_step_with_its_rate() -> None:
    module = encoder(layer_drop=0.3)
    drawn = []
    for step in range(2000):
        module.draw_layers(5, step)
        drawn.append(list(module.gates))
    # 6000 draws: a standard error of 0.006
    assert 1 - np.mean(drawn) == pytest.approx(0.3, abs=0.02)
    module.draw_layers(5, 17)
    assert module.gates == drawn[17]
    assert len({tuple(gates) for gates in drawn}) == 8


def test_a_dropped_layer_is_passed_by_in_training_and_keeps_a_gradient_of_zero() -> None:
    module = encoder(layer_drop=0.5, dropout=0.0, input_dropout=0.0, activation_dropout=0.0)
    waves, lengths = padded([4000, 4000])
    module.gates = [True, False, True]
    evaluated = module(waves, lengths)
    module.train()
    trained = module(waves, lengths)
    assert not torch.allclose(trained, evaluated, atol=1e-3)  # all layers take part outside training
    trained.square().sum().backward()
    for name, parameter in module.layers[1].named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    shorter = encoder(num_layers=2, dropout=0.0, input_dropout=0.0)
    state = {
        name.replace("layers.2.", "layers.1."): value for name, value in module.state_dict().items() if "layers.1." not in name
    }
    shorter.load_state_dict(state)
    torch.testing.assert_close(shorter(waves, lengths), trained)


def write_run(folder: Path, module: torch.nn.Module, config: dict, extra: dict | None = None) -> None:
    optimizer = torch.optim.AdamW(module.parameters())
    save_checkpoint(folder, 1, module, optimizer, {"kind": "test", "config": config, "extra": extra or {}})


def test_the_encoder_of_pretraining_and_of_fine_tuning_runs_can_be_loaded(tmp_path: Path) -> None:
    module = Recognizer(encoder().config, 5)
    resolved = module.encoder.config.resolved()
    write_run(tmp_path / "pretrained", module, {"encoder": resolved})
    write_run(tmp_path / "finetuned", module, {"encoder": "runs/pretrained"}, {"config_encoder": resolved, "vocabulary": ["a"]})
    for name in ("pretrained", "finetuned"):
        loaded, fingerprint = load_encoder(tmp_path / name)
        assert not loaded.training and len(fingerprint) == 16
        assert loaded.config == module.encoder.config
        for mine, theirs in zip(module.encoder.state_dict().values(), loaded.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)
    write_run(tmp_path / "lm", torch.nn.Linear(2, 2), {"decoder": {}})
    with pytest.raises(ValueError, match="a 'test' run holds no encoder"):
        load_encoder(tmp_path / "lm")
