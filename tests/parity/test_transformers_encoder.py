"""Our encoder and wav2vec 2.0 loss against transformers' with the same random weights."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.encoder import Encoder, EncoderConfig
from pretrain.wav2vec2 import Wav2Vec2, Wav2Vec2Batch, Wav2Vec2Config, draw_distractors

transformers = pytest.importorskip("transformers")

KINDS = {
    "base": {"norm_first": False, "conv_norm": "group", "conv_bias": False},
    "large": {"norm_first": True, "conv_norm": "layer", "conv_bias": True},
    "hubert_large": {"norm_first": True, "conv_norm": "layer", "conv_bias": False},
}


def sizes(kind: str, **options: Any) -> tuple[EncoderConfig, dict[str, Any]]:
    ours = EncoderConfig(
        conv_dim=32, dim=64, num_layers=3, num_heads=4, ffn_dim=96, pos_kernel=16, pos_groups=4, input_dropout=0.0, dropout=0.0,
        attention_dropout=0.0, layer_drop=0.0, feature_gradient_scale=1.0, **KINDS[kind], **options,
    )  # fmt: skip
    theirs = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "conv_dim": (32,) * 7,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "conv_bias": ours.conv_bias,
        "feat_extract_norm": ours.conv_norm, "do_stable_layer_norm": ours.norm_first, "layerdrop": 0.0, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "feat_quantizer_dropout": 0.0,
    }  # fmt: skip
    return ours, theirs


def randomize(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def pairs(ours: Encoder, theirs: Any) -> list[tuple[Tensor, Tensor, Any]]:
    """(our parameter, theirs, how it lies in ours: a function of theirs or our rows) of every parameter of the encoder."""
    front, body = theirs.feature_extractor.conv_layers, theirs.encoder
    found: list[tuple[Tensor, Tensor, Any]] = []
    for i, layer in enumerate(front):
        found.append((ours.front_end.weights[i], layer.conv.weight, lambda w: w.permute(2, 1, 0)))
        if ours.front_end.biases is not None:
            found.append((ours.front_end.biases[i], layer.conv.bias, None))
    norms = [layer.layer_norm for layer in front if getattr(layer, "layer_norm", None) is not None]
    position = body.pos_conv_embed.conv
    modules = [*zip(ours.front_end.norms, norms, strict=True), (ours.norm, body.layer_norm),
               (ours.feature_norm, theirs.feature_projection.layer_norm), (ours.project, theirs.feature_projection.projection)]  # fmt: skip
    for mine, layer in zip(ours.layers, body.layers, strict=True):
        attention, feed_forward = layer.attention, layer.feed_forward
        modules += [(mine.attention_out, attention.out_proj), (mine.attention_norm, layer.layer_norm), (mine.ffn_norm, layer.final_layer_norm),
                    (mine.ffn_in, feed_forward.intermediate_dense), (mine.ffn_out, feed_forward.output_dense)]  # fmt: skip
        for part, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
            rows = slice(64 * part, 64 * part + 64)
            found += [(mine.qkv.weight, linear.weight, rows), (mine.qkv.bias, linear.bias, rows)]
    for mine, reference in modules:
        found += [(mine.weight, reference.weight, None), (mine.bias, reference.bias, None)]
    found += [
        (ours.positional.magnitude, position.parametrizations.weight.original0, None),
        (ours.positional.direction, position.parametrizations.weight.original1, None),
        (ours.positional.bias, position.bias, None), (ours.mask_embedding, theirs.masked_spec_embed, None),
    ]  # fmt: skip
    return found


def copy(ours: Encoder, theirs: Any) -> None:
    filled = 0
    with torch.no_grad():
        for mine, reference, layout in pairs(ours, theirs):
            (mine[layout] if isinstance(layout, slice) else mine).copy_(layout(reference) if callable(layout) else reference)
            filled += reference.numel()
    assert filled == sum(parameter.numel() for parameter in ours.parameters())  # nothing left out, nothing filled twice


def layer_outputs(theirs: Any, waves: Tensor, **inputs: Any) -> list[Tensor]:
    """The first layer's input, every layer's output, and the last hidden state, by hooks."""
    outputs: list[Tensor] = []
    hooks = [theirs.encoder.dropout.register_forward_hook(lambda _, __, y: outputs.append(y))]
    for layer in theirs.encoder.layers:
        hooks.append(layer.register_forward_hook(lambda _, __, y: outputs.append(y[0] if isinstance(y, tuple) else y)))
    outputs.append(theirs(waves, **inputs).last_hidden_state)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize(
    ("kind", "family"), [("base", "Wav2Vec2"), ("large", "Wav2Vec2"), ("base", "Hubert"), ("hubert_large", "Hubert")]
)
@torch.no_grad()
def test_every_layer_equals_that_of_transformers(kind: str, family: str) -> None:
    torch.manual_seed(0)
    config, theirs_config = sizes(kind)
    theirs = randomize(getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**theirs_config))).eval()
    ours = Encoder(config).eval()
    copy(ours, theirs)
    waves = 0.1 * torch.randn(3, 9000)
    lengths = torch.full((3,), 9000)
    expected = layer_outputs(theirs, waves)
    for layer, features in enumerate([*ours.extract_all(waves, lengths), ours(waves, lengths)]):
        # float32, the same operations in another order through seven convolutions and three layers; features of order 1 to 10
        torch.testing.assert_close(
            features, expected[layer], rtol=1e-4, atol=1e-4, msg=lambda text, at=layer: f"layer {at}: {text}"
        )
    if config.conv_norm == "layer":  # with GroupNorm theirs see the padding, and ours do not
        lengths, attention = torch.tensor([9000, 5000, 7040]), torch.ones(3, 9000, dtype=torch.long)
        for row, length in enumerate(lengths.tolist()):
            waves[row, length:], attention[row, length:] = 0, 0
        expected = layer_outputs(theirs, waves, attention_mask=attention)
        for mine, reference in zip(ours.extract_all(waves, lengths), expected, strict=False):
            for row, frames in enumerate(((lengths - 400) // 320 + 1).tolist()):
                torch.testing.assert_close(mine[row, :frames], reference[row, :frames], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["base", "large"])
def test_loss_and_gradients_equal_those_of_transformers_wav2vec2(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks and distractors, and the argmax instead of a Gumbel draw with the softmax's gradient, in both."""

    def without_noise(logits: Tensor, tau: float = 1, hard: bool = False, dim: int = -1) -> Tensor:
        soft = (logits / tau).softmax(dim)
        return F.one_hot(soft.argmax(dim), soft.shape[dim]).to(soft.dtype) - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    torch.manual_seed(0)
    config, theirs_config = sizes(kind)
    codes = {"num_codevectors_per_group": 8, "codevector_dim": 24, "proj_codevector_dim": 20, "diversity_loss_weight": 0.3}
    theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**theirs_config, **codes, num_negatives=9))
    randomize(theirs)
    ours = Wav2Vec2(
        config, Wav2Vec2Config(num_entries=8, code_dim=24, final_dim=20, diversity_weight=0.3, feature_penalty=0.0, num_distractors=9)
    )  # fmt: skip
    copy(ours.encoder, theirs.wav2vec2)
    with torch.no_grad():
        ours.quantizer.codes.copy_(theirs.quantizer.codevectors.view(2, 8, 12))
        for mine, reference in ((ours.quantizer.logits, theirs.quantizer.weight_proj), (ours.project_code, theirs.project_q),
                                (ours.project, theirs.project_hid)):  # fmt: skip
            mine.load_state_dict(reference.state_dict())
    theirs.set_gumbel_temperature(0.7)
    ours.quantizer.temperature = 0.7

    rng, frames = np.random.default_rng(0), 27
    masks = np.zeros((3, frames), bool)
    masks[0, 3:12], masks[1, 8:17], masks[2, [1, 5, 6, 9, 20, 21, 22, 23, 26]] = True, True, True
    places = np.stack([np.flatnonzero(mask) for mask in masks])  # (3, 9)
    distractors = np.stack([draw_distractors(9, 9, rng) for _ in masks])  # (3, 9, 9)
    negatives = np.zeros((3, frames, 9), dtype=np.int64)
    for row in range(3):
        negatives[row, places[row]] = places[row][distractors[row]] + row * frames
    waves = 0.1 * torch.randn(3, 9000)
    batch = Wav2Vec2Batch(waves, torch.full((3,), 9000), *(torch.from_numpy(x) for x in (masks, places)), torch.full((3,), 9),
                          torch.from_numpy(distractors))  # fmt: skip
    mine = ours.train()(batch)
    reference = theirs.train()(waves, mask_time_indices=batch.mask, sampled_negative_indices=torch.from_numpy(negatives))
    assert mine.metrics["contrastive_loss"][0].item() == pytest.approx(reference.contrastive_loss.item(), rel=1e-5)  # float32 sums
    assert mine.metrics["diversity_loss"][0].item() == pytest.approx(reference.diversity_loss.item(), rel=1e-5)
    assert mine.total.item() == pytest.approx(reference.loss.item(), rel=1e-5)

    mine.total.backward()
    reference.loss.backward()
    compared = [*pairs(ours.encoder, theirs.wav2vec2)]
    compared += [(ours.quantizer.codes, theirs.quantizer.codevectors, lambda g: g.view(2, 8, 12)),
                 (ours.quantizer.logits.weight, theirs.quantizer.weight_proj.weight, None),
                 (ours.project.weight, theirs.project_hid.weight, None), (ours.project_code.bias, theirs.project_q.bias, None)]  # fmt: skip
    for parameter, other, layout in compared:
        gradient = parameter.grad[layout] if isinstance(layout, slice) else parameter.grad
        expected = layout(other.grad) if callable(layout) else other.grad
        # float32 sums over frames and samples in another order, beside the largest entry of the tensor; a key's bias moves no
        # attention weight, so its gradient is rounding alone
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()) + 1e-5)
