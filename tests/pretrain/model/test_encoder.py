from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.ctc.model import Recognizer
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.packing import Layout, pack, pack_padded
from pretrain.data.utterance import num_frames
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder, load_encoder
from pretrain.model.transformer import PositionalConv
from pretrain.training.checkpoint import save_checkpoint
from quantize.assignment import nearest
from tests.reference.convolutions import randomize

LENGTHS = [6000, 4000, 9999, 400]


def encoder(seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    config = EncoderConfig(
        **{"architecture": "tiny", "num_layers": 3, "conv_dim": 24, "num_mels": 20, **options}
    )
    module = Encoder(config).eval()
    randomize(module)
    return module


def padded(lengths: list[int] = LENGTHS, extra: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.zeros(len(lengths), max(lengths) + extra)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = 0.1 * torch.randn(length, generator=generator) + 0.02
    return rows, torch.tensor(lengths)


def packed(lengths: list[int] = LENGTHS) -> tuple[Tensor, Layout]:
    return pack_padded(*padded(lengths))


def own_frames(lengths: Tensor) -> Tensor:
    """(batch, frames) of a padded batch: which belong to an utterance."""
    return torch.arange(num_frames(int(lengths.max()))) < torch.tensor(
        [[num_frames(n)] for n in lengths.tolist()]
    )


KINDS = [
    {"norm_first": True, "front_end": "filterbank"},
    {"norm_first": False, "front_end": "waveform", "conv_norm": "group"},
    {
        "norm_first": True,
        "front_end": "waveform",
        "conv_norm": "layer",
        "conv_bias": True,
        "normalize_waveform": True,
    },
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
            torch.testing.assert_close(
                one[0], many[row, :frames], rtol=1e-4, atol=1e-4, msg=f"layer {layer}, {length} samples"
            )
            assert not many[row, frames:].any()


# wav2vec 2.0 and HuBERT BASE and LARGE, narrower: what else tells them apart from one another is kept
BASE = {"front_end": "waveform", "conv_norm": "group", "norm_first": False, "normalize_waveform": False}
LARGE = {"front_end": "waveform", "conv_norm": "layer", "norm_first": True, "normalize_waveform": True}


@pytest.mark.parametrize("kind", [BASE, LARGE], ids=["base", "large"])
def test_features_and_labels_of_an_utterance_do_not_depend_on_what_it_was_batched_or_padded_with(
    kind: dict,
) -> None:
    """Over random encoders, utterances, batch mates (some a thousand times as loud), padding and codebooks.

    A label is the nearest centroid. Rounding moves a feature and so its distances to centroids: by the
    triangle inequality each by no more than the feature. Where the two nearest are closer to a tie than twice
    what rounding may move a feature, the frame has no label to speak of: such frames are left out, and the
    test says that they are fewer than 1 in 200.
    """
    rounding, compared, left_out = (
        3e-5,
        0,
        0,
    )  # Euclidean, of features of norm 5 to 20; 4e-6 is the most that was measured

    @settings(max_examples=60)
    @given(
        lengths=st.lists(st.integers(400, 12_000), min_size=1, max_size=5),
        bias=st.booleans(),
        seed=st.integers(0, 2**31),
        loud=st.integers(0, 31),
        extra=st.integers(0, 3000),
    )
    def check(lengths: list[int], bias: bool, seed: int, loud: int, extra: int) -> None:
        nonlocal compared, left_out
        module = encoder(seed, **kind, conv_bias=bias and kind["conv_norm"] == "layer")
        rng = np.random.default_rng(seed)
        waves = [
            (0.1 * rng.standard_normal(length) + 0.02 * rng.standard_normal()).astype(np.float32)
            for length in lengths
        ]
        waves = [wave * (1000 if loud >> number & 1 else 1) for number, wave in enumerate(waves)]
        in_batch = [
            layout.split(x)
            for (buffer, layout) in [pack(waves)]
            for x in module.extract_packed(buffer, layout, 3)
        ]
        rows = torch.full((len(waves), max(lengths) + extra), float("nan"))
        for row, wave in zip(rows, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        from_padded = module.extract_all(rows, torch.tensor(lengths))
        for number, wave in enumerate(waves):
            alone = module.extract_packed(*pack([wave]), 3)
            for layer, expected in enumerate(alone):
                codebook = expected.mean(0).numpy() + expected.std().numpy() * rng.standard_normal(
                    (50, 64), dtype=np.float32
                )
                labels = nearest(expected.numpy(), codebook)
                distances = np.linalg.norm(expected.numpy()[:, None].astype(np.float64) - codebook, axis=2)
                first, second = np.sort(distances, axis=1)[:, :2].T
                clear = second - first > 2 * rounding
                compared, left_out = compared + len(clear), left_out + int((~clear).sum())
                for features in (in_batch[layer][number], from_padded[layer][number, : len(expected)]):
                    assert float((features - expected).norm(dim=1).max()) < rounding, f"layer {layer}"
                    assert np.array_equal(nearest(features.numpy(), codebook)[clear], labels[clear]), (
                        f"layer {layer}"
                    )

    check()
    assert compared > 1000 and left_out < compared / 200


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("gain", [1000.0, float("nan")], ids=["loud", "nan"])
def test_what_the_neighbours_hold_does_not_matter_to_the_last_bit(kind: dict, gain: float) -> None:
    module = encoder(**kind)
    buffer, layout = packed()
    expected = module.extract_packed(buffer, layout, 3)
    for number, (first, last) in enumerate(layout.slot_bounds):
        beside = buffer * gain
        beside[320 * first : 320 * last] = buffer[320 * first : 320 * last]
        for one, other in zip(module.extract_packed(beside, layout, 3), expected, strict=True):
            assert torch.equal(layout.split(one)[number], layout.split(other)[number])


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_no_gradient_passes_between_utterances(kind: dict) -> None:
    module = encoder(**kind, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1).train()
    buffer, layout = packed()
    with torch.no_grad():
        features = module.feature_norm(module.features(buffer, layout))
    for number, (first, last) in enumerate(layout.frame_bounds):
        leaf = features.clone().requires_grad_()
        torch.manual_seed(0)
        layout.split(module.contextualize(leaf, layout).last)[number].square().sum().backward()
        assert leaf.grad is not None and leaf.grad[first:last].abs().sum(1).all()
        assert not leaf.grad[:first].any() and not leaf.grad[last:].any()


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_the_gradient_of_a_batch_is_the_sum_of_its_utterances(kind: dict) -> None:
    gradients: list[dict[str, Tensor]] = []
    buffer, layout = packed()
    waves = [
        buffer[320 * first : 320 * first + n]
        for (first, _), n in zip(layout.slot_bounds, LENGTHS, strict=True)
    ]
    for batches in ([(buffer, layout)], [pack([wave.numpy()]) for wave in waves]):
        module = encoder(**kind)
        for samples, one in batches:
            x = module.encode(samples, one).last
            (x * torch.linspace(-1, 1, 64)).square().sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    together, apart = gradients
    assert together.keys() == apart.keys() and len(together) > 40
    for name, gradient in apart.items():
        # float32 sums over frames and samples in another order, beside the largest of the tensor; a key's
        # bias moves no attention weight, so its gradient is rounding alone
        torch.testing.assert_close(
            together[name],
            gradient,
            rtol=1e-3,
            atol=2e-4 * float(gradient.abs().max()) + 1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@torch.no_grad()
def test_padded_waveforms_have_the_outputs_of_packed_ones() -> None:
    module = encoder()
    waves, lengths = padded(extra=500)
    buffer, layout = packed()
    x = module.encode(buffer, layout).last
    noise = torch.where(waves == 0, 0.7, waves)
    assert torch.equal(module(noise, lengths), layout.pad(x))
    for layer, features in enumerate(module.extract_packed(buffer, layout, 3)):
        assert torch.equal(module.extract(noise, lengths, layer), layout.pad(features))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_autocast_to_bfloat16_gives_nearly_the_same_features(kind: dict) -> None:
    module = encoder(**kind)
    buffer, layout = packed()
    expected = module.extract_packed(buffer, layout, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = module.extract_packed(buffer, layout, 3)
    for one, other in zip(features, expected, strict=True):
        # 8 bits of mantissa through seven convolutions and three layers
        assert float((one.float() - other).norm() / other.norm()) < 0.03


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
    valid = own_frames(lengths)
    torch.testing.assert_close(pre(waves, lengths)[valid], pre.norm(pre.extract(waves, lengths, 3))[valid])
    torch.testing.assert_close(post(waves, lengths), post.extract(waves, lengths, 3))
    # and layer 0 of a post-norm model is what that norm gives the first layer
    buffer, layout = packed()
    x = post.project(post.feature_norm(post.features(buffer, layout)))
    expected = post.norm(x + post.positional(x, layout))
    torch.testing.assert_close(post.extract(waves, lengths, 0), layout.pad(expected))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@torch.no_grad()
def test_the_feed_forward_convention_gives_what_a_layers_feed_forward_adds(kind: dict) -> None:
    module = encoder(**kind)
    buffer, layout = packed()
    added: list[Tensor] = []
    for block in module.layers:
        block.ffn_in.register_forward_hook(
            lambda _, __, y, block=block: added.append(block.ffn_out(F.gelu(y)))
        )
    residual = module.extract_packed(buffer, layout, 3)
    expected = [residual[0], *added]
    added.clear()
    for layer, features in enumerate(module.extract_packed(buffer, layout, 3, "feed_forward")):
        # float32 in another order
        torch.testing.assert_close(features, expected[layer], rtol=1e-5, atol=1e-5)
        waves, lengths = padded()
        torch.testing.assert_close(
            module.extract(waves, lengths, layer, "feed_forward"), layout.pad(features)
        )


def test_the_feed_forward_convention_runs_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = encoder(), []
    for number, block in enumerate(module.layers, start=1):
        attend = block._attend
        monkeypatch.setattr(
            block, "_attend", lambda *a, number=number, attend=attend: (calls.append(number), attend(*a))[1]
        )
    module.extract_packed(*packed(), 2, "feed_forward")
    assert calls == [1, 2]


@torch.no_grad()
def test_masked_frames_are_the_mask_embedding_whatever_they_held() -> None:
    module = encoder()
    buffer, layout = packed([8000, 8000])
    features = module.feature_norm(module.features(buffer, layout))
    mask = torch.zeros(len(features), dtype=torch.bool)
    mask[3:9] = True
    changed = features.clone()
    changed[3:9] = 99.0
    one, two = (module.contextualize(x, layout, mask).last for x in (features, changed))
    assert torch.equal(one, two)
    plain = layout.split(module.contextualize(features, layout).last)
    assert torch.equal(layout.split(one)[1], plain[1])  # the other utterance is untouched
    assert not torch.allclose(layout.split(one)[0], plain[0], atol=1e-3)
    x = module.project(features)
    x[3:9] = module.mask_embedding
    first = module.transform(x + module.positional(x, layout), [layout] * 3, None, [0])
    assert torch.equal(module.contextualize(features, layout, mask, layers=[0]).last, first.layers[0])


@torch.no_grad()
def test_masked_channels_are_zero_in_all_frames_of_an_utterance_also_the_masked_ones() -> None:
    module = encoder()
    buffer, layout = packed([8000, 5000])
    features = module.feature_norm(module.features(buffer, layout))
    mask = torch.zeros(len(features), dtype=torch.bool)
    mask[3:9] = True
    channels = torch.zeros(2, 64, dtype=torch.bool)
    channels[0, 10:20], channels[1, 30:35] = True, True
    x = module.project(features)
    x[3:9] = module.mask_embedding
    first, second = layout.split(x)
    first[:, 10:20], second[:, 30:35] = 0, 0
    expected = module.transform(x + module.positional(x, layout), [layout] * 3, None, [0]).layers[0]
    assert torch.equal(module.contextualize(features, layout, mask, channels, layers=[0]).last, expected)


@pytest.mark.parametrize("scale", [0.1, 0.0, 1.0])
def test_the_front_ends_gradient_is_scaled_and_nothing_else(scale: float) -> None:
    gradients = []
    for factor in (1.0, scale):
        module = encoder(front_end="waveform", conv_norm="layer", feature_gradient_scale=factor)
        waves, lengths = padded([4000, 6000])
        module(waves, lengths).square().sum().backward()
        gradients.append(
            {
                name: parameter.grad
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            }
        )
    full, scaled = gradients
    assert full.keys() == scaled.keys() and any(name.startswith("front_end") for name in full)
    for name, gradient in full.items():
        factor = scale if name.startswith("front_end") else 1.0
        torch.testing.assert_close(
            scaled[name], factor * gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
        )


@pytest.mark.parametrize("kernel", [4, 8, 16, 128, 5])
def test_the_positional_convolution_is_a_weight_normalised_conv1d_over_each_utterance(kernel: int) -> None:
    torch.manual_seed(0)
    ours = PositionalConv(32, kernel, 4)
    with torch.no_grad():
        ours.magnitude.mul_(torch.rand_like(ours.magnitude) + 0.5)
        ours.bias.normal_()
    theirs = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.Conv1d(32, 32, kernel, padding=kernel // 2, groups=4), dim=2
    )
    weight = theirs.parametrizations.weight
    weight.original0, weight.original1 = (
        torch.nn.Parameter(x.detach().clone()) for x in (ours.magnitude, ours.direction)
    )
    theirs.bias = torch.nn.Parameter(ours.bias.detach().clone())
    # shorter and longer than the kernel reaches
    layout = Layout((400 + 320 * 39, 400, 1040, 400 + 320 * 199))
    x = torch.randn(layout.total_frames, 32, requires_grad=True)
    expected = []
    for utterance in layout.split(x):
        y = theirs(utterance.T[None])[0]
        expected.append(F.gelu(y if kernel % 2 else y[:, :-1]).T)  # an even kernel gives a frame too many
    y = ours(x, layout)
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-5, atol=1e-5)
    slope = torch.randn(y.shape)
    mine = torch.autograd.grad(y, [x, ours.magnitude, ours.direction, ours.bias], slope)
    reference = torch.autograd.grad(
        torch.cat(expected), [x, weight.original0, weight.original1, theirs.bias], slope
    )
    for one, other in zip(mine, reference, strict=True):
        # float32 sums over 242 frames in another order, beside the largest of the tensor
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_the_positional_convolution_follows_its_parameters_also_outside_training() -> None:
    """Where no gradient is wanted the normalised weight is kept: until the parameters change, however that
    happens."""
    torch.manual_seed(0)
    ours, other, layout = PositionalConv(32, 8, 4), PositionalConv(32, 8, 4), Layout((6000,))
    x = torch.randn(layout.total_frames, 32)

    def check() -> None:
        with torch.no_grad():
            kept, again = ours(x, layout), ours(x, layout)
        assert torch.equal(kept, ours(x, layout)) and torch.equal(kept, again)

    check()
    ours.load_state_dict(other.state_dict())
    check()
    for parameter in (ours.magnitude, ours.direction):
        with torch.no_grad():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        check()
    # which leaves no trace in the versions
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    ours(x, layout).square().sum().backward()
    optimizer.step()
    check()
    ours.double()
    x = x.double()
    check()


def test_the_positional_convolution_takes_parameters_made_in_inference_mode() -> None:
    """Which have no version to tell a change by; transcription loads its model there."""
    torch.manual_seed(0)
    x, layout = torch.randn(18, 32), Layout((6000,))
    with torch.inference_mode():
        module = PositionalConv(32, 8, 4)
        assert torch.equal(module(x, layout), module(x, layout))


@torch.no_grad()
def test_normalised_waveforms_make_the_model_deaf_to_gain_and_offset() -> None:
    module = encoder(**KINDS[2])
    waves, lengths = padded()
    louder = torch.where(waves != 0, 5 * waves + 1, 0.0)
    valid = own_frames(lengths)
    one, two = module(waves, lengths), module(louder, lengths)
    # eps = 1e-5 beside a variance of 0.01
    torch.testing.assert_close(one[valid], two[valid], rtol=2e-3, atol=2e-3)


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
        name.replace("layers.2.", "layers.1."): value
        for name, value in module.state_dict().items()
        if "layers.1." not in name
    }
    shorter.load_state_dict(state)
    torch.testing.assert_close(shorter(waves, lengths), trained)


def write_run(folder: Path, module: torch.nn.Module, config: dict, extra: dict | None = None) -> None:
    optimizer = torch.optim.AdamW(module.parameters())
    save_checkpoint(folder, 1, module, optimizer, {"kind": "test", "config": config, "extra": extra or {}})


def test_the_encoder_of_pretraining_and_of_fine_tuning_runs_can_be_loaded(tmp_path: Path) -> None:
    module = Recognizer(encoder().config, Vocabulary(["a", "b", "c", "d"]))
    resolved = module.encoder.config.resolved()
    write_run(tmp_path / "pretrained", module, {"encoder": resolved})
    write_run(
        tmp_path / "finetuned",
        module,
        {"encoder": "runs/pretrained"},
        {"config_encoder": resolved, "vocabulary": ["a"]},
    )
    for name in ("pretrained", "finetuned"):
        loaded, fingerprint = load_encoder(tmp_path / name)
        assert not loaded.training and len(fingerprint) == 16
        assert loaded.config == module.encoder.config
        for mine, theirs in zip(
            module.encoder.state_dict().values(), loaded.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs)
    write_run(tmp_path / "lm", torch.nn.Linear(2, 2), {"decoder": {}})
    with pytest.raises(ValueError, match="a 'test' run holds no encoder"):
        load_encoder(tmp_path / "lm")
