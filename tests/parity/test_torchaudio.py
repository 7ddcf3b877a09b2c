"""Our encoder, CTC head, HuBERT's loss and its MFCC against torchaudio's, and torchaudio's loading of what we
export.

torchaudio's wheels end with torch 2.9, so these run in the environment with fairseq2 (`make test-fairseq2`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.ctc.model import CTCBatch, load_recognizer
from pretrain.data.packing import pack
from pretrain.data.utterance import num_frames
from pretrain.model.encoder import Encoder, load_encoder
from pretrain.objectives.hubert import Hubert, hubert_batch
from pretrain.store.hashes import sha256_file
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.exporting import export_weights
from pretrain.weights.foreign import infer_encoder
from pretrain.weights.naming import canonical, parameters, to_theirs
from quantize.mfcc import deltas, mfcc
from tests.parity.peers import compare_gradients, load_pretraining, scatter, transformers_model
from tests.parity.peers import import_peer as import_transformers

models = pytest.importorskip(
    "torchaudio.models", reason="torchaudio is not installed; it goes with torch 2.9 and no later one"
)

KINDS: dict[str, dict[str, Any]] = {
    "base": {"extractor_mode": "group_norm", "extractor_conv_bias": False, "encoder_layer_norm_first": False},
    "large": {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True},
    "large without conv bias": {
        "extractor_mode": "layer_norm",
        "extractor_conv_bias": False,
        "encoder_layer_norm_first": True,
    },
}
SMALL: dict[str, Any] = {
    "extractor_conv_layer_config": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
    "encoder_embed_dim": 64,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 3,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 96,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}
HUBERT: dict[str, Any] = {
    "mask_prob": 0.8,
    "mask_selection": "static",
    "mask_other": 0.0,
    "mask_length": 10,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "mask_channel_length": 10,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "skip_masked": False,
    "skip_nomask": False,
    "num_classes": 11,
    "final_dim": 20,
    "feature_grad_mult": None,
}


def hubert(kind: str) -> Any:
    torch.manual_seed(0)
    return scatter(models.hubert_pretrain_model(**SMALL, **KINDS[kind], **HUBERT))


def wav2vec2(kind: str, aux_num_out: int | None = None) -> Any:
    torch.manual_seed(0)
    return scatter(models.wav2vec2_model(**SMALL, **KINDS[kind], aux_num_out=aux_num_out))


def import_peer(theirs: Any, folder: Path, **more: Any) -> Path:
    torch.save(theirs.state_dict(), folder / "peer.pth")
    options: dict[str, Any] = {
        "num_heads": 4,
        "normalize_waveform": False,
        "allow_pickle": True,
        **more,
    }  # they get the same waveforms
    import_weights(ImportConfig(source=str(folder / "peer.pth"), out=str(folder / "run"), **options))
    return folder / "run"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_layer_equals_that_of_torchaudio(kind: str, tmp_path: Path) -> None:
    theirs = wav2vec2(kind).eval()
    ours, _ = load_encoder(import_peer(theirs, tmp_path))
    lengths = [9000, 5000, 431]
    waves = 0.1 * torch.randn(3, 9000, generator=torch.Generator().manual_seed(1))
    found = [*ours.extract_all(waves, torch.tensor(lengths))[1:], ours(waves, torch.tensor(lengths))]
    for row, length in enumerate(lengths):  # one at a time: their group norm counts padding
        alone = waves[row : row + 1, :length]
        for mine, reference in zip(
            found, [*theirs.extract_features(alone)[0], theirs(alone)[0]], strict=True
        ):
            # float32, the same operations in another order, features of order 1 to 5: differences up to 1e-5
            torch.testing.assert_close(mine[row, : num_frames(length)], reference[0], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", ["large", "large without conv bias"])
@torch.no_grad()
def test_every_layer_of_a_padded_batch_equals_that_of_torchaudio(kind: str, tmp_path: Path) -> None:
    """Padded frames are zeroed before the positional convolution and seen by no attention. (The zeros at
    BASE's first norm: below.)"""
    theirs = wav2vec2(kind).eval()
    ours, _ = load_encoder(import_peer(theirs, tmp_path))
    lengths = torch.tensor([9000, 5000, 431])
    waves = 0.1 * torch.randn(3, 9000, generator=torch.Generator().manual_seed(1))
    waves[torch.arange(9000) >= lengths[:, None]] = 0.0
    found = [*ours.extract_all(waves, lengths)[1:], ours(waves, lengths)]
    for mine, reference in zip(
        found, [*theirs.extract_features(waves, lengths)[0], theirs(waves, lengths)[0]], strict=True
    ):
        for row, length in enumerate(lengths.tolist()):
            frames = num_frames(length)
            # as above
            torch.testing.assert_close(mine[row, :frames], reference[row, :frames], rtol=1e-5, atol=5e-5)


@torch.no_grad()
def test_torchaudio_s_group_norm_counts_padding_and_ours_does_not(tmp_path: Path) -> None:
    """The same utterance has other features in another batch there (torchaudio #2242), and the same ones
    here."""
    theirs = wav2vec2("base").eval()
    ours, _ = load_encoder(import_peer(theirs, tmp_path))
    wave = 0.1 * torch.randn(1, 5000, generator=torch.Generator().manual_seed(1))
    padded, length, frames = F.pad(wave, (0, 4000)), torch.tensor([5000]), num_frames(5000)
    alone, beside = theirs(wave, length)[0], theirs(padded, length)[0][:, :frames]
    assert (alone - beside).abs().max() > 0.1  # beside features of order 1
    torch.testing.assert_close(ours(wave, length), alone, rtol=1e-5, atol=5e-5)  # as above
    torch.testing.assert_close(ours(padded, length)[:, :frames], alone, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hubert_loss_and_gradients_equal_those_of_torchaudio(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks; penalty and cross entropy put together as torchaudio's recipe does, for utterances of
    one length."""
    theirs = hubert(kind).train()
    ours = load_pretraining(import_peer(theirs, tmp_path), feature_penalty=10.0)
    assert isinstance(ours, Hubert)
    rng = np.random.default_rng(0)
    waves = [(0.1 * rng.standard_normal(9000)).astype(np.float32) for _ in range(3)]
    frames = num_frames(9000)
    masks = [np.isin(np.arange(frames), rng.choice(frames, 9, replace=False)) for _ in waves]
    labels = [rng.integers(11, size=frames) for _ in waves]

    def given_mask(x: torch.Tensor, padding_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.from_numpy(np.stack(masks))
        return torch.where(mask[..., None], theirs.mask_generator.mask_embedding, x), mask

    monkeypatch.setattr(theirs.mask_generator, "forward", given_mask)
    masked, _, penalty = theirs(torch.from_numpy(np.stack(waves)), torch.from_numpy(np.stack(labels)))
    loss = (
        F.cross_entropy(masked, torch.zeros(len(masked), dtype=torch.long), reduction="sum")
        + 10 * len(masked) * penalty
    )
    mine = ours.train()(hubert_batch(waves, masks, labels))
    assert mine.count == len(masked) == 27
    assert mine.total.item() == pytest.approx(loss.item(), rel=1e-5)  # float32 sums
    mine.total.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compare_gradients(ours, gradients, "torchaudio", "hubert", "wav2vec2.")


@pytest.mark.parametrize("kind", ["large", "large without conv bias"])
def test_cross_entropy_of_a_padded_batch_with_masks_of_different_sizes_equals_that_of_torchaudio(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the penalty, of which theirs is a mean that counts padding."""
    theirs = hubert(kind).train()
    ours = load_pretraining(import_peer(theirs, tmp_path), feature_penalty=0.0)
    rng = np.random.default_rng(0)
    lengths = [9000, 5000, 7040]
    waves = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in lengths]
    masks = [
        np.isin(np.arange(num_frames(n)), rng.choice(num_frames(n), 5 + row, replace=False))
        for row, n in enumerate(lengths)
    ]
    labels = [rng.integers(11, size=num_frames(length)) for length in lengths]
    frames = num_frames(9000)
    mask = torch.zeros(3, frames, dtype=torch.bool)
    targets = torch.zeros(3, frames, dtype=torch.long)
    for row, label in enumerate(labels):
        mask[row, : len(label)], targets[row, : len(label)] = (
            torch.from_numpy(masks[row]),
            torch.from_numpy(label),
        )

    def given_mask(x: torch.Tensor, padding_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert padding_mask is not None
        return torch.where(mask[..., None], theirs.mask_generator.mask_embedding, x), mask

    monkeypatch.setattr(theirs.mask_generator, "forward", given_mask)
    padded = torch.stack([F.pad(torch.from_numpy(wave), (0, 9000 - len(wave))) for wave in waves])
    masked, _, _ = theirs(padded, targets, torch.tensor(lengths))
    loss = F.cross_entropy(masked, torch.zeros(len(masked), dtype=torch.long), reduction="sum")
    mine = ours.train()(hubert_batch(waves, masks, labels))
    assert mine.count == len(masked) == 5 + 6 + 7
    assert mine.total.item() == pytest.approx(loss.item(), rel=1e-5)  # float32 sums
    mine.total.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compare_gradients(ours, gradients, "torchaudio", "hubert", "wav2vec2.")


@pytest.mark.parametrize("kind", KINDS)
def test_a_recogniser_has_torchaudio_s_logits_and_leaves_as_it_came(kind: str, tmp_path: Path) -> None:
    theirs = wav2vec2(kind, aux_num_out=6).eval()
    (tmp_path / "letters.json").write_text('{"a": 0, "-": 5, "b": 1, "|": 2, ".": 3, "c": 4}')
    run = import_peer(theirs, tmp_path, vocabulary=str(tmp_path / "letters.json"))
    ours = load_recognizer(run).model.eval()
    wave = 0.1 * np.random.default_rng(1).standard_normal(9000).astype(np.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(wave)[None])[0][0]  # (frames, classes), their blank last
        mine = ours.logits(CTCBatch.untranscribed(*pack([wave])))[0]
    torch.testing.assert_close(mine, logits[:, [5, 0, 1, 2, 3, 4]], rtol=1e-5, atol=5e-5)  # as above


@pytest.mark.parametrize("kind", KINDS)
def test_torchaudio_s_own_converter_from_transformers_finds_what_we_export_for_torchaudio(
    kind: str, tmp_path: Path
) -> None:
    """One more hand that has written down the names of both."""
    from torchaudio.models.wav2vec2.utils import import_huggingface_model

    theirs = transformers_model("Wav2Vec2Model", kind)
    export_weights(import_transformers(theirs, tmp_path), tmp_path / "exported.pth", "torchaudio")
    converted = import_huggingface_model(theirs)
    expected = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    scatter(converted)
    converted.load_state_dict(torch.load(tmp_path / "exported.pth", weights_only=True))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state_dict().items())


def test_mfcc_equal_those_of_fairseq_s_recipe_for_hubert() -> None:
    """`dump_mfcc_feature.py` takes them from torchaudio's Kaldi with these options, and Δ from
    `compute_deltas`."""
    import torchaudio

    wave = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    options: dict[str, Any] = {"sample_frequency": 16000, "use_energy": False}
    # (frames at 100 Hz, 13)
    static = torchaudio.compliance.kaldi.mfcc(torch.from_numpy(wave)[None], dither=0.0, **options)
    first = torchaudio.functional.compute_deltas(static.T)
    expected = torch.cat([static, first.T, torchaudio.functional.compute_deltas(first).T], dim=1)
    found = mfcc(wave)
    assert len(static) == 98 and len(found) == num_frames(16000) == 49
    # float32 FFTs and logarithms, on values up to 40
    np.testing.assert_allclose(found, expected[::2], atol=2e-3)
    np.testing.assert_allclose(deltas(static.numpy()), first.T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [hubert, wav2vec2])
def test_what_we_export_loads_strictly_and_is_the_same(make: Any, kind: str, tmp_path: Path) -> None:
    theirs = make(kind)
    run = import_peer(theirs, tmp_path)
    export_weights(run, tmp_path / "exported.pth", "torchaudio")
    again = make(kind)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    state = torch.load(tmp_path / "exported.pth", weights_only=True)
    again.load_state_dict(state)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())
    options: dict[str, Any] = {"num_heads": 4, "normalize_waveform": False, "allow_pickle": True}
    import_weights(
        ImportConfig(source=str(tmp_path / "exported.pth"), out=str(tmp_path / "again"), **options)
    )
    weights = "step_00000000/model.safetensors"
    assert sha256_file(tmp_path / "again" / weights) == sha256_file(run / weights)


def test_a_whole_base_model_needs_no_option(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = models.hubert_base().eval()
    torch.save(theirs.state_dict(), tmp_path / "peer.pth")
    summary = import_weights(
        ImportConfig(source=str(tmp_path / "peer.pth"), out=str(tmp_path / "run"), allow_pickle=True)
    )
    assert (summary["layers"], summary["dim"], summary["num_heads"], summary["normalize_waveform"]) == (
        12,
        768,
        12,
        False,
    )
    assert any("inferred 12 layers of width 768, 12 heads, post-norm" in note for note in summary["notes"])
    ours, _ = load_encoder(tmp_path / "run")
    wave = 0.1 * torch.randn(1, 9000)
    with torch.no_grad():  # the tolerance as above
        torch.testing.assert_close(ours(wave, torch.tensor([9000])), theirs(wave)[0], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    "name",
    [
        "wav2vec2_base",
        "wav2vec2_large",
        "wav2vec2_large_lv60k",
        "hubert_base",
        "hubert_large",
        "hubert_xlarge",
        "wav2vec2_xlsr_300m",
    ],
)
def test_the_architecture_of_every_published_size_shows_in_its_shapes(name: str) -> None:
    """Whole models without their memory: what is inferred makes the same tensors."""
    with torch.device("meta"):
        theirs = getattr(models, name)()
    tensors = canonical(theirs.state_dict(), "", name)
    notes: list[str] = []
    encoder = infer_encoder(
        Path(name), tensors, "torchaudio", {"num_heads": None, "normalize_waveform": None}, notes
    )
    attention = theirs.encoder.transformer.layers[0].attention
    assert encoder.num_heads == attention.num_heads
    # theirs says where the whole stack's norm is
    assert encoder.norm_first == (not theirs.encoder.transformer.layer_norm_first)
    with torch.device("meta"):
        ours = torch.nn.ModuleDict({"encoder": Encoder(encoder)}).state_dict()
    written = to_theirs(ours, parameters("torchaudio", encoder, None))
    del written["mask_generator.mask_embedding"]
    assert {key: tensor.shape for key, tensor in written.items()} == {
        key: tensor.shape for key, tensor in tensors.items()
    }
