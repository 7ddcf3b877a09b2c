"""Our encoder and HuBERT's loss against torchaudio's with the same weights, and torchaudio's loading of what we export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.artefact import sha256_file
from pretrain.audio import num_frames
from pretrain.encoder import Encoder, load_encoder
from pretrain.hubert import Hubert, hubert_batch
from pretrain.weights.conversion import ImportConfig, export_weights, import_weights
from pretrain.weights.foreign import infer_encoder
from pretrain.weights.naming import canonical, parameters, to_theirs
from tests.parity.peers import compare_gradients, load_pretraining, scatter

models = pytest.importorskip("torchaudio.models", reason="torchaudio is not installed; it goes with torch 2.9 and no later one")

KINDS: dict[str, dict[str, Any]] = {
    "base": {"extractor_mode": "group_norm", "extractor_conv_bias": False, "encoder_layer_norm_first": False},
    "large": {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True},
    "large without conv bias": {"extractor_mode": "layer_norm", "extractor_conv_bias": False, "encoder_layer_norm_first": True},
}
SMALL: dict[str, Any] = {
    "extractor_conv_layer_config": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2, "encoder_embed_dim": 64,
    "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4, "encoder_num_layers": 3,
    "encoder_num_heads": 4, "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 96, "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0, "encoder_layer_drop": 0.0,
}  # fmt: skip
HUBERT: dict[str, Any] = {
    "mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10, "no_mask_overlap": False,
    "mask_min_space": 1, "mask_channel_prob": 0.0, "mask_channel_selection": "static", "mask_channel_other": 0.0,
    "mask_channel_length": 10, "no_mask_channel_overlap": False, "mask_channel_min_space": 1, "skip_masked": False,
    "skip_nomask": False, "num_classes": 11, "final_dim": 20, "feature_grad_mult": None,
}  # fmt: skip


def hubert(kind: str) -> Any:
    torch.manual_seed(0)
    return scatter(models.hubert_pretrain_model(**SMALL, **KINDS[kind], **HUBERT))


def wav2vec2(kind: str) -> Any:
    torch.manual_seed(0)
    return scatter(models.wav2vec2_model(**SMALL, **KINDS[kind], aux_num_out=None))


def import_peer(theirs: Any, folder: Path) -> Path:
    torch.save(theirs.state_dict(), folder / "peer.pth")
    options: dict[str, Any] = {"num_heads": 4, "normalize_waveform": False, "allow_pickle": True}  # they get the same waveforms
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
        for mine, reference in zip(found, [*theirs.extract_features(alone)[0], theirs(alone)[0]], strict=True):
            # float32, the same operations in another order, features of order 1 to 5: differences up to 1e-5
            torch.testing.assert_close(mine[row, : num_frames(length)], reference[0], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hubert_loss_and_gradients_equal_those_of_torchaudio(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks; penalty and cross entropy put together as torchaudio's recipe does, for utterances of one length."""
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
    loss = F.cross_entropy(masked, torch.zeros(len(masked), dtype=torch.long), reduction="sum") + 10 * len(masked) * penalty
    mine = ours.train()(hubert_batch(waves, masks, labels))
    assert mine.count == len(masked) == 27
    assert mine.total.item() == pytest.approx(loss.item(), rel=1e-5)  # float32 sums
    mine.total.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compare_gradients(ours, gradients, "torchaudio", "hubert", "wav2vec2.")


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
    import_weights(ImportConfig(source=str(tmp_path / "exported.pth"), out=str(tmp_path / "again"), **options))
    weights = "step_00000000/model.safetensors"
    assert sha256_file(tmp_path / "again" / weights) == sha256_file(run / weights)


def test_a_whole_base_model_needs_no_option(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = models.hubert_base().eval()
    torch.save(theirs.state_dict(), tmp_path / "peer.pth")
    summary = import_weights(ImportConfig(source=str(tmp_path / "peer.pth"), out=str(tmp_path / "run"), allow_pickle=True))
    assert (summary["layers"], summary["dim"], summary["num_heads"], summary["normalize_waveform"]) == (12, 768, 12, False)
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
    encoder = infer_encoder(Path(name), tensors, "torchaudio", {"num_heads": None, "normalize_waveform": None}, notes)
    attention = theirs.encoder.transformer.layers[0].attention
    assert encoder.num_heads == attention.num_heads
    assert encoder.norm_first == (not theirs.encoder.transformer.layer_norm_first)  # theirs says where the whole stack's norm is
    with torch.device("meta"):
        ours = torch.nn.ModuleDict({"encoder": Encoder(encoder)}).state_dict()
    written = to_theirs(ours, parameters("torchaudio", encoder, None))
    del written["mask_generator.mask_embedding"]
    assert {key: tensor.shape for key, tensor in written.items()} == {key: tensor.shape for key, tensor in tensors.items()}
