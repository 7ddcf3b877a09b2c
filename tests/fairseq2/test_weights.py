"""Our weights and fairseq2's, both ways: every layer, the contrastive loss with its gradients, CTC logits,
cards and checkpoints.

Their models are made by fairseq2's own factories, small and with random weights, and reach us through cards
in a local asset folder.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fairseq2.runtime.dependency
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped]
from fairseq2.data.tokenizers import load_tokenizer
from fairseq2.models import load_model
from fairseq2.models.transformer import TransformerNormOrder
from fairseq2.models.wav2vec2 import Wav2Vec2Config as TheirConfig
from fairseq2.models.wav2vec2 import Wav2Vec2EncoderConfig, create_wav2vec2_model, get_wav2vec2_model_hub
from fairseq2.models.wav2vec2.asr import (
    Wav2Vec2AsrConfig,
    Wav2Vec2AsrFactory,
    create_wav2vec2_asr_model,
    get_wav2vec2_asr_model_hub,
)
from fairseq2.nn import BatchLayout
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.ctc.model import Recognizer, load_recognizer
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.utterance import num_frames
from pretrain.fairseq2.assets import find_card, plain_config, read_asset
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder, load_encoder
from pretrain.objectives.hubert import Hubert, HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config, draw_distractors, wav2vec2_batch
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import load_weights, save_checkpoint
from pretrain.weights.card_config import DEFAULTS, complete_config
from pretrain.weights.card_writing import _ctc_config
from pretrain.weights.cards import load_checkpoint, read_card
from pretrain.weights.conversion import ImportConfig, import_weights, in_memory
from pretrain.weights.exporting import _pretrained_with, export_weights
from pretrain.weights.fairseq2_configs import encoder_keys
from pretrain.weights.naming import parameters, to_theirs
from pretrain.weights.sentencepiece import write_pieces
from tests.parity.peers import compare_gradients, load_pretraining, scatter

KINDS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"model_dim": 96, "num_encoder_attn_heads": 6},
    "large_lv60k": {
        "layer_norm_features": False,
        "feature_extractor_bias": True,
        "feature_extractor_layer_norm_convs": True,
        "norm_order": TransformerNormOrder.PRE,
    },
}
SMALL: dict[str, Any] = {
    "model_dim": 64,
    "num_encoder_layers": 3,
    "num_encoder_attn_heads": 4,
    "ffn_inner_dim": 96,
    "feature_dim": 32,
    "feature_extractor_layer_descs": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
    "pos_conv_kernel_size": 16,
    "num_pos_conv_groups": 4,
    "dropout_p": 0.0,
    "attn_dropout_p": 0.0,
    "layer_drop_p": 0.0,
    "feature_grad_scale": 0.5,
}
CODES: dict[str, Any] = {
    "num_codebook_entries": 8,
    "quantized_dim": 24,
    "final_dim": 20,
    "num_distractors": 9,
    "logit_temp": 0.15,
    "max_temporal_mask_prob": 0.6,
    "temporal_mask_span_len": 8,
    "codebook_sampling_temperature": (0.7, 0.7, 1.0),
}
LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "e", "t", "'"]

SYMBOLS = [
    "|",
    "e",
    "t",
    "'",
    "=",
    "1",
    "n",
    "~",
    "é",
    "한",
    "😀",
    "\u0930",
]  # some of which YAML takes for something else

Assets = Callable[..., str]


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assets:
    """A folder of cards that fairseq2 looks in: `assets(name, family, config, state)` puts a model there and
    returns its name."""
    folder = tmp_path / "assets"
    folder.mkdir()
    monkeypatch.setenv("FAIRSEQ2_ASSET_DIR", str(folder))
    monkeypatch.setenv("FAIRSEQ2_NO_PROGRESS", "1")
    monkeypatch.setattr(fairseq2.runtime.dependency, "_resolver", None)  # it reads the folder once

    def put(name: str, family: str, config: Any, model: nn.Module | None = None, **fields: Any) -> str:
        card = {
            "name": name,
            "model_family": family,
            "model_config": plain_config(asdict(config)),
            "checkpoint": f"{name}.pt",
            **fields,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(card))
        if model is not None:
            torch.save(model.state_dict(), folder / f"{name}.pt")
        return name

    return put


def their_encoder(kind: str, **changes: Any) -> Wav2Vec2EncoderConfig:
    return Wav2Vec2EncoderConfig(**{**SMALL, **KINDS[kind], **changes})


def their_model(kind: str, **changes: Any) -> tuple[TheirConfig, Any]:
    torch.manual_seed(0)
    config = TheirConfig(encoder_config=their_encoder(kind), **{**CODES, **changes})
    return config, scatter(create_wav2vec2_model(config)).eval()


def their_recognizer(kind: str, **changes: Any) -> tuple[Wav2Vec2AsrConfig, Any]:
    torch.manual_seed(0)
    config = Wav2Vec2AsrConfig(encoder_config=their_encoder(kind), target_vocab_size=len(LETTERS), **changes)
    return config, scatter(create_wav2vec2_asr_model(config)).eval()


def draw_waves(lengths: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    waves = torch.zeros(len(lengths), max(lengths))
    for wave, length in zip(waves, lengths, strict=True):
        wave[:length] = 0.1 * torch.randn(length, generator=generator)
    return waves


def their_layers(model: Any, waves: Tensor, lengths: list[int]) -> list[Tensor]:
    """The first layer's input, every layer's output and the encoder's, by hooks."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, y: outputs.append(y)) for layer in model.encoder.layers
    ]
    x, layout = model.encoder_frontend(waves, BatchLayout.of(waves, lengths))
    outputs.insert(0, x)
    outputs.append(model.encoder(x, layout))
    for hook in hooks:
        hook.remove()
    return outputs


def our_layers(encoder: Encoder, waves: Tensor, lengths: list[int]) -> list[Tensor]:
    counts = torch.tensor(lengths)
    return [*encoder.extract_all(waves, counts), encoder(waves, counts)]


def assert_equal_layers(ours: Encoder, theirs: Any, lengths: list[int], batched: bool) -> None:
    """Ours in one batch; theirs too, or one utterance at a time, since with a group norm their batches count
    the padding."""
    waves = draw_waves(lengths)
    found = our_layers(ours, waves, lengths)
    for row, length in enumerate(lengths):
        one = slice(None) if batched else slice(row, row + 1)
        reference = their_layers(
            theirs, waves[one] if batched else waves[one, :length], lengths if batched else [length]
        )
        assert len(found) == len(reference) == ours.config.num_layers + 2
        for layer, (mine, other) in enumerate(zip(found, reference, strict=True)):
            # float32, the same operations in another order through seven convolutions and the layers,
            # features of order 1 to 5
            torch.testing.assert_close(
                mine[row, : num_frames(length)],
                other[row if batched else 0, : num_frames(length)],
                rtol=1e-5,
                atol=5e-5,
                msg=lambda text, at=layer: f"layer {at}: {text}",
            )


def imported(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    given = {"allow_pickle": True, "normalize_waveform": False, **options}
    return import_weights(ImportConfig(source=f"fairseq2:{name}", out=str(folder), **given))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_layer_of_an_imported_asset_is_fairseq2s(kind: str, assets: Assets, tmp_path: Path) -> None:
    config, theirs = their_model(kind)
    summary = imported(assets("w2v", "wav2vec2", config, theirs), tmp_path / "run")
    assert (summary["objective"], summary["heads"], summary["kind"]) == ("wav2vec2", True, "encoder")
    ours, _ = load_encoder(tmp_path / "run")
    assert ours.config.norm_first == (kind == "large_lv60k")
    assert_equal_layers(ours, theirs, [9000, 5000, 12345], batched=kind == "large_lv60k")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_layer_of_an_exported_run_is_ours_where_fairseq2_loads_its_card(
    kind: str, assets: Assets, tmp_path: Path
) -> None:
    run, encoder = our_run(tmp_path / "run", "wav2vec2", kind)
    summary = export_weights(run, tmp_path / "assets" / "mine", "fairseq2")
    assert (summary["family"], summary["heads"]) == ("wav2vec2", True)
    theirs = load_model("mine").eval()
    assert_equal_layers(encoder, theirs, [9000, 5000, 12345], batched=kind == "large_lv60k")


ENCODERS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"dim": 96, "num_heads": 6},
    "large_lv60k": {"norm_first": True, "conv_norm": "layer", "conv_bias": True},
}
OUR_SMALL: dict[str, Any] = {
    "dim": 64,
    "num_layers": 3,
    "num_heads": 4,
    "ffn_dim": 96,
    "conv_dim": 32,
    "pos_kernel": 16,
    "pos_groups": 4,
    "feature_gradient_scale": 0.5,
    "layer_drop": 0.0,
    "input_dropout": 0.125,
}
OUR_CODES = Wav2Vec2Config(
    mask_start_probability=0.07,
    mask_length=7,
    num_distractors=5,
    num_groups=3,
    num_entries=8,
    code_dim=24,
    final_dim=20,
    feature_dropout=0.2,
    temperature=0.2,
    gumbel_temperature=(2.0, 0.1),
    gumbel_decay=0.999,
    diversity_weight=0.3,
    feature_penalty=7.0,
)


def our_run(run: Path, objective: str, kind: str = "base", **changes: Any) -> tuple[Path, Encoder]:
    """A run in training with random weights, and its encoder in eval mode."""
    config = EncoderConfig(**{**OUR_SMALL, **ENCODERS[kind], **changes})
    tree: dict[str, Any] = {"objective": objective, "encoder": config.resolved()}
    extra: dict[str, Any] = {"objective": objective}
    model: Any
    torch.manual_seed(1)
    if objective == "wav2vec2":
        model, tree["wav2vec2"] = Wav2Vec2(config, OUR_CODES), OUR_CODES.resolved()
    elif objective == "hubert":
        model, tree["hubert"] = Hubert(config, HubertConfig(), 11), HubertConfig().resolved()
    else:
        vocabulary, text = Vocabulary(SYMBOLS), TextConfig(punctuation="keep")
        model = Recognizer(config, vocabulary)
        ctc = CTCConfig(
            mask_start_probability=0.065,
            mask_channel_probability=0.04,
            mask_channel_length=16,
            final_dropout=0.2,
            freeze_steps=3,
        )
        tree |= {"text": text.resolved(), "ctc": ctc.resolved()}
        extra = {
            "vocabulary": vocabulary.to_meta(),
            "config_encoder": config.resolved(),
            "codebook": None,
            "objective": "hubert",
        }
    scatter(model)
    kind = "recognizer" if objective == "ctc" else "encoder"
    save_checkpoint(
        run, 1, model, torch.optim.AdamW(model.parameters()), {"kind": kind, "extra": extra, "config": tree}
    )
    return run, model.encoder.eval()


@pytest.mark.parametrize(("kind", "objective"), [(k, o) for k in ENCODERS for o in ("wav2vec2", "ctc")])
def test_ours_to_fairseq2_to_ours_is_exact(kind: str, objective: str, assets: Assets, tmp_path: Path) -> None:
    """Through a model that fairseq2 loaded and saved, and by the exported folder alone; the config comes
    back, too."""
    run, _ = our_run(tmp_path / "run", objective, kind, normalize_waveform=kind != "base")
    weights, meta, _ = load_weights(run)
    export_weights(run, tmp_path / "assets" / "mine", "fairseq2")
    model = load_model("mine")
    card = yaml.safe_load((tmp_path / "assets/mine/card.yaml").read_text())
    (tmp_path / "assets/again").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "assets/again/saved.pt")
    (tmp_path / "again.yaml").write_text(
        yaml.safe_dump({**card, "name": "again", "checkpoint": "assets/again/saved.pt"})
    )
    for number, source in enumerate(["fairseq2:mine", tmp_path / "assets/mine", tmp_path / "again.yaml"]):
        summary = import_weights(
            ImportConfig(source=str(source), out=str(tmp_path / f"back{number}"), allow_pickle=True)
        )
        assert not any("normalised, as in published" in note for note in summary["notes"])
        back, found, _ = load_weights(tmp_path / f"back{number}")
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
        assert found["config"]["encoder"] == meta["config"]["encoder"]
        for key in ("wav2vec2", "ctc", "text"):
            assert found["config"].get(key) == meta["config"].get(key)
        assert found.get("vocabulary") == meta.get("vocabulary")
        assert found["objective"] == meta["objective"]


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("base", [9000, 9000, 9000]), ("large", [7040, 7040]), ("large_lv60k", [9000, 5000, 7040])],
)
def test_contrastive_loss_and_gradients_equal_those_of_fairseq2(
    kind: str, lengths: list[int], assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks and distractors, and the argmax in place of a Gumbel draw, in both. fairseq2 masks as
    many frames in each row.

    With unequal lengths its features penalty is a mean over the padded batch, padding included, and ours one
    of each utterance's own frames, weighed by its masked frames: the penalties differ and are compared apart,
    the gradients without. Diversity is over masked frames in both. With a group norm lengths are equal, since
    its statistics count padding there.
    """

    def without_noise(logits: Tensor, tau: float = 1, hard: bool = False, dim: int = -1) -> Tensor:
        soft = (logits / tau).softmax(dim)
        return F.one_hot(soft.argmax(dim), soft.shape[dim]).to(soft.dtype) - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    monkeypatch.setattr("fairseq2.models.wav2vec2.vector_quantizer.gumbel_softmax", without_noise)
    # it needs a compiler of C++
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
    config, theirs = their_model(kind)
    imported(assets("w2v", "wav2vec2", config, theirs), tmp_path / "run")
    equal = len(set(lengths)) == 1
    penalty = 10.0 if equal else 0.0
    ours = load_pretraining(tmp_path / "run", feature_penalty=penalty, diversity_weight=0.3)
    assert isinstance(ours, Wav2Vec2)
    ours.quantizer.temperature = 0.7
    scale = read_meta(tmp_path / "run")["config"]["encoder"]["feature_gradient_scale"]
    assert scale == config.encoder_config.feature_grad_scale == 0.5
    ours.encoder.config = ours.encoder.config.model_copy(update={"feature_gradient_scale": scale})
    assert (ours.config.mask_start_probability, ours.config.mask_length) == (0.075, 8)

    rng = np.random.default_rng(0)
    waves = draw_waves(lengths)
    masks = [np.zeros(num_frames(length), bool) for length in lengths]
    for mask in masks:
        mask[rng.choice(len(mask), 7, replace=False)] = True
    drawn = [draw_distractors(7, 9, rng) for _ in masks]
    padded = torch.zeros(len(masks), max(map(len, masks)), dtype=torch.bool)
    for row, mask in zip(padded, masks, strict=True):
        row[: len(mask)] = torch.from_numpy(mask)

    def mask_given(seqs: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor]:
        return torch.where(padded[..., None], theirs.masker.temporal_mask_embed, seqs), padded

    def distractors_given(targets: Tensor) -> Tensor:
        return torch.stack(
            [row[torch.from_numpy(places)] for row, places in zip(targets, drawn, strict=True)]
        )

    monkeypatch.setattr(theirs.masker, "forward", mask_given)
    monkeypatch.setattr(theirs, "_sample_distractors", distractors_given)
    theirs.train()
    loss, output = theirs(
        waves, BatchLayout.of(waves, lengths), diversity_weight=0.3, features_penalty_weight=penalty
    )
    own = [wave[:length].numpy() for wave, length in zip(waves, lengths, strict=True)]
    mine = ours.train()(wav2vec2_batch(own, masks, drawn))
    assert mine.count == output.num_targets == 7 * len(lengths)
    for name, reference in (("contrastive_loss", loss.contrastive), ("diversity_loss", loss.diversity)):
        assert mine.metrics[name][0].item() == pytest.approx(reference.item(), rel=1e-5)  # float32 sums
    assert mine.total.item() == pytest.approx(loss.aggregate.item(), rel=1e-5)
    mine.total.backward()
    loss.aggregate.backward()
    compare_gradients(
        ours, {name: p.grad for name, p in theirs.named_parameters()}, "fairseq2", "wav2vec2", ""
    )
    if not equal:  # the statement about padding, in numbers
        raw = output.raw_features.detach()
        shares = [raw[row, : len(mask)].square().mean() for row, mask in enumerate(masks)]
        assert loss.features_penalty.item() == pytest.approx(raw.square().mean().item() * 21, rel=1e-5)
        assert abs(loss.features_penalty.item() / (7 * sum(shares).item()) - 1) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ctc_logits_of_an_imported_asset_are_fairseq2s(kind: str, assets: Assets, tmp_path: Path) -> None:
    config, theirs = their_recognizer(kind, final_dropout_p=0.3)
    name = assets(
        "asr", "wav2vec2_asr", config, theirs, tokenizer_family="char_tokenizer", tokenizer="letters.model"
    )
    write_letters(tmp_path / "assets/letters.model")
    summary = imported(name, tmp_path / "run")
    assert (summary["kind"], summary["vocabulary"]) == ("recognizer", 8)
    loaded = load_recognizer(tmp_path / "run")
    assert loaded.vocabulary == Vocabulary(["<pad>", "</s>", "<unk>", "|", "e", "t", "'"])
    told = read_meta(tmp_path / "run")["config"]["ctc"]
    assert (told["final_dropout"], told["mask_start_probability"], told["mask_length"]) == (0.3, 0.069, 10)
    assert (told["mask_channel_probability"], told["mask_channel_length"]) == (pytest.approx(0.55 / 64), 64)
    lengths = [9000, 5000] if kind == "large_lv60k" else [9000]
    waves = draw_waves(lengths)
    logits, _ = theirs(waves, BatchLayout.of(waves, lengths))
    hidden = loaded.model.encoder(waves, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        mine = loaded.model.head(hidden[row, : num_frames(length)])
        # as for the layers, and a product of 64 numbers of order 1 on top
        torch.testing.assert_close(mine, logits[row, : num_frames(length)], rtol=1e-5, atol=2e-4)


def write_letters(path: Path) -> None:
    write_pieces(path, LETTERS[0], LETTERS[1:], "<unk>")


@torch.no_grad()
def test_fairseq2_reads_an_exported_recogniser_with_its_tokenizer(assets: Assets, tmp_path: Path) -> None:
    """Our classes first, in our order; one more for unknown characters, which SentencePiece must have, never
    wins."""
    run, _ = our_run(tmp_path / "run", "ctc", "large_lv60k")
    export_weights(run, tmp_path / "assets/mine", "fairseq2")
    theirs, ours = load_model("mine").eval(), load_recognizer(run)
    waves = draw_waves([9000])
    logits, _ = theirs(waves, BatchLayout.of(waves, [9000]))
    hidden = ours.model.encoder(waves, torch.tensor([9000]))
    assert logits.shape[2] == len(ours.vocabulary) + 1
    # as above
    torch.testing.assert_close(ours.model.head(hidden[0]), logits[0, :, :-1], rtol=1e-5, atol=2e-4)
    assert logits[..., -1].max() < -9000
    tokenizer = load_tokenizer("mine")
    assert tokenizer.vocab_info.size == logits.shape[2] and tokenizer.vocab_info.pad_idx == 0
    assert tokenizer.create_encoder()("te=1 et").tolist() == ours.vocabulary.encode("te=1 et").tolist()
    assert tokenizer.create_decoder()(torch.from_numpy(ours.vocabulary.encode("te=1 et"))) == "te=1 et"
    config = get_wav2vec2_asr_model_hub().get_model_config("mine")
    assert (config.max_temporal_mask_prob, config.temporal_mask_span_len) == (0.65, 10)
    assert config.max_spatial_mask_prob == pytest.approx(0.64) and config.final_dropout_p == 0.2


@pytest.mark.parametrize(
    ("channels", "length", "written"),
    [(0.04, 16, 0.64), (0.001, 16, 0.0), (0.0016, 64, 0.0), (0.5, 64, 0.0), (0.0, 16, 0.0)],
)
def test_fairseq2_trains_with_the_masks_of_an_exported_recogniser(
    channels: float, length: int, written: float
) -> None:
    """Of the width 64. With fairseq2's own least numbers of spans a short utterance, and spans of all
    channels, end the training."""
    ctc = CTCConfig(
        mask_start_probability=0.05, mask_channel_probability=channels, mask_channel_length=length
    )
    notes: list[str] = []
    told = _ctc_config(ctc, 64, notes)
    assert told["max_spatial_mask_prob"] == written
    assert any("max_spatial_mask_prob is 0" in note for note in notes) == (channels > 0 and not written)
    theirs = Wav2Vec2AsrConfig(encoder_config=their_encoder("base"), **told)
    masker = Wav2Vec2AsrFactory(theirs).create_masker()
    seqs = torch.ones(2, 50, 64)
    masked, _ = masker(seqs.clone(), BatchLayout.of(seqs, [50, 45]))
    assert (masked == 0).all(dim=1).any().item() == (written > 0) and not torch.equal(masked, seqs)
    unmasked, _ = masker(seqs.clone(), BatchLayout.of(seqs, [50, 12]))
    assert ((unmasked == 1) | (unmasked == 0)).all()  # in time; the embedding is drawn between
    theirs.min_num_temporal_mask_spans = 2
    with pytest.raises(ValueError, match="`min_num_spans` is 2"):
        Wav2Vec2AsrFactory(theirs).create_masker()(seqs, BatchLayout.of(seqs, [50, 12]))


def test_masks_and_losses_go_to_fairseq2s_config(assets: Assets, tmp_path: Path) -> None:
    run, _ = our_run(tmp_path / "run", "wav2vec2")
    notes = export_weights(run, tmp_path / "assets/mine", "fairseq2")["notes"]
    config = get_wav2vec2_model_hub().get_model_config("mine")
    assert config.max_temporal_mask_prob == 0.49 and config.temporal_mask_span_len == 7
    assert config.codebook_sampling_temperature == (2.0, 0.1, 0.999) and config.logit_temp == 0.2
    assert config.encoder_config.first_pass_dropout_p == 0.125
    assert any("feature_dropout = 0.2 is not" in note for note in notes) and any(
        "penalty 7.0" in note for note in notes
    )


def test_the_defaults_known_here_are_fairseq2s() -> None:
    assert DEFAULTS["wav2vec2"] == plain_config(asdict(TheirConfig()))
    assert DEFAULTS["wav2vec2_asr"] == plain_config(asdict(Wav2Vec2AsrConfig()))


@pytest.mark.parametrize("arch", ["base", "large", "large_lv60k"])
def test_every_architecture_of_fairseq2_has_our_config(arch: str, assets: Assets, tmp_path: Path) -> None:
    """On a meta device: names, shapes and settings of whole models, and of Omnilingual ASR's widths."""
    config = get_wav2vec2_model_hub().get_arch_config(arch)
    config.encoder_config.num_encoder_layers = 1
    for width, ffn in [(0, 0), (1280, 5120), (1920, 7680), (2048, 8192)]:
        if width:
            config.encoder_config.model_dim, config.encoder_config.ffn_inner_dim = width, ffn
            config.encoder_config.num_encoder_attn_heads = 16
        with torch.device("meta"):
            shapes = {
                name: tensor.shape for name, tensor in create_wav2vec2_model(config).state_dict().items()
            }
        encoder = EncoderConfig(**encoder_keys(plain_config(asdict(config.encoder_config)), arch))
        with torch.device("meta"):
            ours = Wav2Vec2(
                encoder, Wav2Vec2Config(code_dim=config.quantized_dim, final_dim=config.final_dim)
            ).state_dict()
        expected = {"quantizer.num_updates": torch.Size([])}
        for parameter in parameters("fairseq2", encoder, "wav2vec2", 2):
            parts = parameter.write(ours[parameter.ours])
            expected |= {name: part.shape for name, part in zip(parameter.theirs, parts, strict=True)}
        assert expected == shapes


def test_an_asset_in_memory_is_what_its_imported_run_holds(assets: Assets, tmp_path: Path) -> None:
    config, theirs = their_model("base")
    imported(assets("w2v", "wav2vec2", config, theirs), tmp_path / "run", normalize_waveform=None)
    weights, meta, _ = load_weights(tmp_path / "run")
    found, told = in_memory(read_asset("w2v"))
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)
    for key in ("kind", "objective", "heads"):
        assert told[key] == meta[key]
    assert all(meta["config"][key] == told["config"][key] for key in told["config"])


def test_checkpoints_of_fairseq2s_trainer_are_read_in_one_file_or_several(
    assets: Assets, tmp_path: Path
) -> None:
    """`model.yaml` beside steps, whose weights each data-parallel process has a part of; merged as by
    fairseq2's own loader."""
    config, theirs = their_model("large_lv60k")
    folder = tmp_path / "checkpoints"
    whole = theirs.state_dict()
    for step, shards in ((2, 1), (10, 2)):
        (folder / f"step_{step}/model/pp_00/tp_00").mkdir(parents=True)
        cut: list[dict[str, Tensor]] = [{} for _ in range(shards)]
        for name, tensor in whole.items():
            parts = (
                tensor.chunk(shards)
                if tensor.ndim
                else [tensor + step if tensor.is_floating_point() else tensor]
            )
            for shard, part in zip(cut, parts, strict=False):
                shard[name] = (part + step if part.is_floating_point() else part).clone()
        for number, shard in enumerate(cut):
            torch.save(shard, folder / f"step_{step}/model/pp_00/tp_00/sdp_{number:02d}.pt")
    card = {"name": "checkpoint", "model_family": "wav2vec2", "model_config": plain_config(asdict(config))}
    (folder / "model.yaml").write_text(yaml.safe_dump(card))
    for number, (source, step) in enumerate([(folder, 10), (folder / "step_2", 2)]):
        import_weights(
            ImportConfig(source=str(source), out=str(tmp_path / f"run{number}"), allow_pickle=True)
        )
        weights, _, _ = load_weights(tmp_path / f"run{number}")
        assert torch.equal(weights["project.weight"], whole["final_proj.weight"] + step)
    from fairseq2.model_checkpoint import ModelCheckpointLoader

    loader = fairseq2.runtime.dependency.get_dependency_resolver().resolve(ModelCheckpointLoader)
    theirs_read = dict(loader.lazy_load(folder / "step_2/model", {}))
    ours_read, _ = load_checkpoint(folder / "step_2/model", True)
    assert theirs_read.keys() == ours_read.keys() and all(
        torch.equal(theirs_read[name], ours_read[name]) for name in ours_read
    )


def test_a_run_that_no_family_of_fairseq2_holds_becomes_a_card_of_ours(
    assets: Assets, tmp_path: Path
) -> None:
    run, _ = our_run(tmp_path / "run", "hubert")
    summary = export_weights(run, tmp_path / "assets/units", "fairseq2")
    assert summary["family"] == "wordless_hubert" and "fairseq2 has no HuBERT" in summary["notes"][0]
    weights, meta, _ = load_weights(run)
    found, told = in_memory(read_asset("fairseq2:units"))
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)
    assert (
        told["config"]["encoder"] == meta["config"]["encoder"]
        and told["config"]["hubert"] == meta["config"]["hubert"]
    )
    assert told["objective"] == "hubert" and told["heads"]


def test_an_unknown_card_is_refused_with_the_names_near_it(assets: Assets) -> None:
    assets("my_wav2vec2", "wav2vec2", their_model("base")[0])
    with pytest.raises(
        ValueError,
        match=r"fairseq2:my_wav2vec: fairseq2 has no asset card of that name; near it are my_wav2vec2",
    ):
        read_asset("my_wav2vec")


def test_cards_of_other_families_and_of_no_model_are_refused(assets: Assets) -> None:
    with pytest.raises(
        ValueError,
        match=r"fairseq2:llama3_2_1b: model_family = 'llama': no speech encoder .* wav2vec2, wav2vec2_asr",
    ):
        read_asset("llama3_2_1b")
    with pytest.raises(ValueError, match="is the card of something else than a model"):
        read_asset("librispeech_960h")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_conformer": True, "depthwise_conv_kernel_size": 31},
            "use_conformer = True: a model with Conformer blocks",
        ),
        ({"use_fbank": True}, "use_fbank = True: a model with log-mel filterbanks"),
        (
            {"pos_encoder_type": "rotary"},
            "pos_encoder_type = 'rotary': a model with positions in its attention",
        ),
        ({"pos_encoder_depth": 5}, "pos_encoder_depth = 5: a model with several positional convolutions"),
        ({"layer_norm_features": False}, "layer_norm_features = False with norm_order = POST"),
        ({"feature_dim": 64}, r"feature_extractor_layer_descs = \[\(32, 10, 5\)"),
    ],
)
def test_an_unsupported_architecture_is_refused_by_its_key_and_value(
    changes: dict[str, Any], message: str, assets: Assets
) -> None:
    config, theirs = their_model("base")
    for key, value in changes.items():
        setattr(config.encoder_config, key, value)
    assets("odd", "wav2vec2", config, theirs)
    with pytest.raises(ValueError, match=message):
        read_asset("odd")


def test_an_architecture_that_fairseq2_does_not_know_is_refused(assets: Assets) -> None:
    config, theirs = their_model("base")
    assets("omni", "wav2vec2", config, theirs, model_arch="7b")
    with pytest.raises(
        ValueError,
        match=r"fairseq2:omni: .*7b.*a package that brings its architecture may have to be installed",
    ):
        read_asset("omni")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": {"lora": 4}}, "fairseq2:odd: model_config field of the odd asset card .*lora"),
        (
            {"model_config": {"final_dim": "x"}},
            "fairseq2:odd: model_config field of the odd asset card .*final_dim",
        ),
        ({"checkpoint": "ftp://there/w.pt"}, "fairseq2:odd: .*ftp"),
        ({"checkpoint": 3}, "fairseq2:odd: checkpoint field of the odd asset card"),
        ({"base": "gone"}, "fairseq2:odd: gone base asset"),
        ({"base": "odd"}, "fairseq2:odd: Metadata of the odd@ asset .*; is a card its own base?"),
        ({"checkpoint": ""}, "fairseq2:odd: checkpoint: '' stands for the folder of the card"),
        ({"checkpoint": "x" * 5000}, "xxx: no such checkpoint .File name too long"),
        ({"wordless": {"encoder": 3}}, "fairseq2:odd: wordless.encoder = 3: a table is expected"),
    ],
)
def test_a_card_that_fairseq2_cannot_read_is_refused_by_its_key(
    changes: dict[str, Any], message: str, assets: Assets
) -> None:
    assets("odd", "wav2vec2", *their_model("base"), **changes)
    with pytest.raises(ValueError, match=message):
        read_asset("odd")


def test_a_card_that_is_not_utf_8_is_named(assets: Assets, tmp_path: Path) -> None:
    """fairseq2 reads every card of its folders before it finds one."""
    assets("w2v", "wav2vec2", *their_model("base"))
    (tmp_path / "assets/latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"fairseq2:w2v: .*assets/latin.yaml is not UTF-8"):
        read_asset("w2v")


def test_a_checkpoint_path_is_followed_with_and_without_fairseq2(assets: Assets, tmp_path: Path) -> None:
    config, theirs = their_model("base")
    assets("w2v", "wav2vec2", config, checkpoint="whole", checkpoint_path="model/w.pt")
    (tmp_path / "assets/whole/model").mkdir(parents=True)
    torch.save(theirs.state_dict(), tmp_path / "assets/whole/model/w.pt")
    named, read = find_card("w2v"), read_card(tmp_path / "assets/w2v.yaml")
    assert named.checkpoint == read.checkpoint == tmp_path / "assets/whole/model/w.pt"
    assert named.config == read.config


def test_the_objective_of_a_card_is_known_without_its_weights(assets: Assets, tmp_path: Path) -> None:
    """Of a run that was fine-tuned from it, say."""
    run, _ = our_run(tmp_path / "run", "hubert")
    export_weights(run, tmp_path / "assets/units", "fairseq2")
    (tmp_path / "assets/units/model.safetensors").write_bytes(b"")
    assert _pretrained_with({"config": {"encoder": "fairseq2:units"}}) == "hubert"
    assert _pretrained_with({"config": {"encoder": "fairseq2:gone"}}) is None


def test_weights_that_do_not_fit_their_card_are_refused(assets: Assets, tmp_path: Path) -> None:
    config, theirs = their_model("base")
    config.encoder_config.ffn_inner_dim = 128
    assets("odd", "wav2vec2", config, theirs)
    with pytest.raises(ValueError, match=r"ffn.inner_proj.weight: is \(96, 64\); \(128, 64\) is expected"):
        in_memory(read_asset("odd"))
    (tmp_path / "assets/odd.pt").write_bytes((tmp_path / "assets/odd.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="odd.pt: not a file that torch can load"):
        read_asset("odd")
    (tmp_path / "assets/odd.pt").unlink()
    with pytest.raises(ValueError, match="odd.pt: no such checkpoint"):
        read_asset("odd")


def test_importing_an_asset_that_is_a_pickle_needs_the_flag(assets: Assets, tmp_path: Path) -> None:
    config, theirs = their_model("base")
    assets("w2v", "wav2vec2", config, theirs)
    with pytest.raises(ValueError, match="w2v.pt: is a pickle.*--allow-pickle"):
        imported("w2v", tmp_path / "run", allow_pickle=False)
    summary = imported("w2v", tmp_path / "run")
    assert any("CVE-2026-24747" in note for note in summary["notes"]) == (torch.__version__ < "2.10")


def test_an_incomplete_config_gets_fairseq2s_defaults(assets: Assets, tmp_path: Path) -> None:
    """What a card leaves out, with and without fairseq2."""
    (tmp_path / "assets/c.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "c",
                "model_family": "wav2vec2_asr",
                "model_config": {"encoder_config": {"num_encoder_layers": 2}, "target_vocab_size": 9},
            }
        )
    )
    theirs = plain_config(asdict(get_wav2vec2_asr_model_hub().get_model_config("c")))
    given = {"encoder_config": {"num_encoder_layers": 2}, "target_vocab_size": 9}
    assert complete_config("wav2vec2_asr", given, "c") == theirs


def test_a_card_over_a_checkpoint_of_fairseqs_is_read_as_fairseq2_converts_it(
    assets: Assets, tmp_path: Path
) -> None:
    """As MMS's are: fairseq's names, which fairseq2 brings to its own when it loads a recogniser."""
    run, _ = our_run(tmp_path / "run", "ctc")
    weights = load_weights(run)[0]
    table = parameters("fairseq", EncoderConfig(**OUR_SMALL), None, ctc=True)
    named = {
        n if n.startswith("w2v_encoder.proj") else f"w2v_encoder.w2v_model.{n}": t
        for n, t in to_theirs(weights, table).items()
    }
    export_weights(run, tmp_path / "assets/mine", "fairseq2")
    card = yaml.safe_load((tmp_path / "assets/mine/card.yaml").read_text())
    card["model_config"]["target_vocab_size"] = classes = len(SYMBOLS) + 1
    torch.save({"model": named}, tmp_path / "assets/old.pt")
    (tmp_path / "assets/old.yaml").write_text(yaml.safe_dump({**card, "name": "old", "checkpoint": "old.pt"}))
    found, _ = in_memory(read_asset("old"))
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    theirs, ours = load_model("old").state_dict(), load_model("mine").state_dict()
    assert all(
        torch.equal(theirs[name], ours[name][:classes] if "final_proj" in name else ours[name])
        for name in theirs
    )


def test_a_recogniser_without_a_tokenizer_gives_its_encoder_and_says_so(
    assets: Assets, tmp_path: Path
) -> None:
    config, theirs = their_recognizer("base")
    assets("asr", "wav2vec2_asr", config, theirs)
    foreign = read_asset("asr")
    assert foreign.recognizer is None and any("--vocabulary FILE" in note for note in foreign.notes)
    write_letters(tmp_path / "letters.model")
    assert read_asset("asr", tmp_path / "letters.model").recognizer is not None
    (tmp_path / "dict.ltr.txt").write_text("| 9\ne 3\nt 2\n' 1\n")
    told = read_asset("asr", tmp_path / "dict.ltr.txt").recognizer
    assert told is not None and told.vocabulary.symbols == ["<pad>", "</s>", "<unk>", "|", "e", "t", "'"]


def test_weights_alone_tell_their_architecture(assets: Assets, tmp_path: Path) -> None:
    config, theirs = their_model("large_lv60k")
    torch.save({"model": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "w.pt")
    options: dict[str, Any] = {"num_heads": 4, "normalize_waveform": False, "allow_pickle": True}
    import_weights(ImportConfig(source=str(tmp_path / "w.pt"), out=str(tmp_path / "run"), **options))
    imported(assets("w2v", "wav2vec2", config, theirs), tmp_path / "card")
    paths = [tmp_path / run / "step_00000000/model.safetensors" for run in ("run", "card")]
    alone, told = map(load_file, paths)
    assert alone.keys() == told.keys() and all(torch.equal(alone[name], told[name]) for name in told)
