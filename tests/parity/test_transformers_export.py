"""What `wordless export --format huggingface` writes is a transformers model: loaded without a word, and bit
for bit the peer's."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pretrain.config import parse_config
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from pretrain.store.hashes import sha256_file
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.exporting import export_weights
from pretrain.weights.huggingface import HUGGINGFACE_KEYS
from pretrain.weights.naming import canonical, parameters, to_theirs
from tests.parity.peers import import_peer, transformers_model

transformers = pytest.importorskip("transformers")

CODES: dict[str, Any] = {"num_codevectors_per_group": 8, "codevector_dim": 24, "proj_codevector_dim": 20}
MODELS = [
    ("Wav2Vec2ForPreTraining", "base", CODES),
    ("Wav2Vec2ForPreTraining", "large", CODES),
    ("Wav2Vec2Model", "base", {}),
    ("Wav2Vec2Model", "large without conv bias", {}),
    ("HubertModel", "base", {}),
    ("HubertModel", "large", {}),
]


def load_silently(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """`from_pretrained`, where a warning, a log record from WARNING up or a key out of place fails the
    test."""
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    transformers.utils.logging.disable_propagation()
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert [record.getMessage() for record in caplog.records] == []
    return model


def weights_of(run: Path) -> str:
    return sha256_file(run / "step_00000000" / "model.safetensors")


@pytest.mark.parametrize(("name", "kind", "options"), MODELS)
def test_an_exported_model_loads_without_a_word_and_equals_the_peer(
    name: str, kind: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = transformers_model(name, kind, **options)
    run = import_peer(theirs, tmp_path)
    export_weights(run, tmp_path / "exported", "huggingface")
    again = load_silently(name, tmp_path / "exported", caplog)
    assert type(again).__name__ == theirs.__class__.__name__
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in again.state_dict().items())
    own, exported = (tmp_path / folder / "model.safetensors" for folder in ("peer", "exported"))
    with (
        safe_open(own, "pt") as one,
        safe_open(exported, "pt") as other,
    ):  # lenient loaders would forgive a wrong prefix
        assert sorted(one.keys()) == sorted(other.keys())
        assert one.metadata() == other.metadata() == {"format": "pt"}
    wave = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert all(
            torch.equal(a, b) for a, b in zip(again.eval()(wave).values(), theirs(wave).values(), strict=True)
        )
    for key, value in theirs.config.to_dict().items():
        if key not in (
            "architectures",
            "_name_or_path",
            "final_dropout",
            "transformers_version",
            "dtype",
            "torch_dtype",
        ):
            found = getattr(again.config, key, None)
            assert (list(found) == list(value)) if isinstance(value, (list, tuple)) else (found == value), key
    import_weights(ImportConfig(source=str(tmp_path / "exported"), out=str(tmp_path / "again")))
    assert weights_of(tmp_path / "again") == weights_of(run)


def test_the_preprocessor_of_an_export_normalises_where_the_encoder_does(tmp_path: Path) -> None:
    peer = transformers_model("Wav2Vec2Model", "large")
    peer.save_pretrained(tmp_path / "peer")
    for normalize in (True, False):
        run, out = tmp_path / f"run {normalize}", tmp_path / f"out {normalize}"
        import_weights(
            ImportConfig(source=str(tmp_path / "peer"), out=str(run), normalize_waveform=normalize)
        )
        export_weights(run, out, "huggingface")
        processor = transformers.AutoFeatureExtractor.from_pretrained(out)
        assert (processor.do_normalize, processor.return_attention_mask, processor.sampling_rate) == (
            normalize,
            True,
            16000,
        )
        import_weights(ImportConfig(source=str(out), out=str(tmp_path / f"again {normalize}")))
        assert (
            f"normalize_waveform = {str(normalize).lower()}\n"
            in (tmp_path / f"again {normalize}" / "config.toml").read_text()
        )


def test_huberts_heads_lie_beside_the_model_and_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = transformers_model("HubertModel", "base")
    heads = {
        "label_embeddings": torch.randn(11, 20),
        "final_proj.weight": torch.randn(20, 64),
        "final_proj.bias": torch.randn(20),
    }
    run = import_peer(theirs, tmp_path, heads)
    summary = export_weights(run, tmp_path / "exported", "huggingface")
    assert any("pretraining_heads.safetensors" in note for note in summary["notes"])
    load_silently("HubertModel", tmp_path / "exported", caplog)
    back = import_weights(ImportConfig(source=str(tmp_path / "exported"), out=str(tmp_path / "again")))
    assert back["heads"] and weights_of(tmp_path / "again") == weights_of(run)


def test_the_encoder_alone_of_a_pretraining_run_is_a_plain_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = transformers_model("Wav2Vec2ForPreTraining", "base", **CODES)
    summary = export_weights(
        import_peer(theirs, tmp_path), tmp_path / "exported", "huggingface", encoder_only=True
    )
    assert not summary["heads"] and any("--encoder-only" in note for note in summary["notes"])
    again = load_silently("Wav2Vec2Model", tmp_path / "exported", caplog)
    assert all(
        torch.equal(tensor, theirs.wav2vec2.state_dict()[key]) for key, tensor in again.state_dict().items()
    )


def test_a_ctc_model_of_transformers_gives_its_encoder(tmp_path: Path) -> None:
    theirs = transformers_model("Wav2Vec2ForCTC", "base")
    theirs.save_pretrained(tmp_path / "peer")
    summary = import_weights(ImportConfig(source=str(tmp_path / "peer"), out=str(tmp_path / "run")))
    assert not summary["heads"] and any(
        "CTC head (lm_head.*) is left out" in note for note in summary["notes"]
    )


def test_sharded_weights_and_torch_files_give_the_same_run(tmp_path: Path) -> None:
    theirs = transformers_model("Wav2Vec2ForPreTraining", "base", **CODES)
    run = import_peer(theirs, tmp_path)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "torch").mkdir()
    theirs.config.save_pretrained(tmp_path / "torch")
    old = {  # as older versions name the weight norm
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(old, tmp_path / "torch" / "pytorch_model.bin")
    for name in ("sharded", "torch"):
        allowed = name == "torch"
        import_weights(
            ImportConfig(source=str(tmp_path / name), out=str(tmp_path / f"{name} run"), allow_pickle=allowed)
        )
        assert weights_of(tmp_path / f"{name} run") == weights_of(run)
    min((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="names shards that are not there: model-00001"):
        import_weights(ImportConfig(source=str(tmp_path / "sharded"), out=str(tmp_path / "never")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_kernel": (10, 3, 3, 3, 3, 2, 3)}, "conv_kernel"),
        ({"conv_dim": (32,) * 6 + (16,)}, "convolutions of different widths"),
        ({"add_adapter": True}, "a model with an adapter is not supported"),
        ({"adapter_attn_dim": 4}, "attention adapters"),
        ({"hidden_act": "relu"}, "another activation"),
        ({"conv_bias": True}, "conv_bias with a group norm"),
    ],
)
def test_an_architecture_that_we_do_not_have_is_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    transformers_model("Wav2Vec2Model", "base", **options).save_pretrained(tmp_path / "peer")
    with pytest.raises(ValueError, match=message):
        import_weights(ImportConfig(source=str(tmp_path / "peer"), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_batch_norm_in_huberts_positional_convolution_and_other_families_are_refused(tmp_path: Path) -> None:
    transformers_model("HubertModel", "base", conv_pos_batch_norm=True).save_pretrained(tmp_path / "batch")
    with pytest.raises(ValueError, match="batch norm in the positional convolution is not supported"):
        import_weights(ImportConfig(source=str(tmp_path / "batch"), out=str(tmp_path / "run")))
    wavlm = transformers.WavLMModel(
        transformers.WavLMConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    wavlm.save_pretrained(tmp_path / "wavlm")
    with pytest.raises(ValueError, match="model_type 'wavlm' is not supported; 'wav2vec2' and 'hubert' are"):
        import_weights(ImportConfig(source=str(tmp_path / "wavlm"), out=str(tmp_path / "run")))


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec 2.0 BASE": ("Wav2Vec2ForPreTraining", {}),
    "wav2vec 2.0 LARGE": (
        "Wav2Vec2ForPreTraining",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "codevector_dim": 768,
            "proj_codevector_dim": 768,
        },
    ),
    "wav2vec 2.0 LARGE LV-60 and XLSR": (
        "Wav2Vec2ForPreTraining",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
            "conv_bias": True,
            "codevector_dim": 768,
            "proj_codevector_dim": 768,
        },
    ),
    "HuBERT BASE": ("HubertModel", {}),
    "HuBERT LARGE": (
        "HubertModel",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
        },
    ),
    "HuBERT XLARGE": (
        "HubertModel",
        {
            "hidden_size": 1280,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
        },
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_tensor_of_the_published_sizes_has_its_place_and_shape(model: str) -> None:
    """Whole models without their memory: what an export would write against what transformers has."""
    name, options = PUBLISHED[model]
    config = (transformers.HubertConfig if name == "HubertModel" else transformers.Wav2Vec2Config)(**options)
    with torch.device("meta"):
        theirs = getattr(transformers, name)(config)
    prefix = "wav2vec2." if name == "Wav2Vec2ForPreTraining" else ""
    expected = {key: tensor.shape for key, tensor in canonical(theirs.state_dict(), prefix, model).items()}
    keys = {ours: getattr(config, key) for ours, (key, _) in HUGGINGFACE_KEYS.items()}
    encoder = parse_config(EncoderConfig, keys, model)
    with torch.device("meta"):
        if prefix:
            head = {"code_dim": config.codevector_dim, "final_dim": config.proj_codevector_dim}
            ours: torch.nn.Module = Wav2Vec2(encoder, parse_config(Wav2Vec2Config, head, model))
        else:
            ours = torch.nn.ModuleDict({"encoder": Encoder(encoder)})
    table = parameters("huggingface", encoder, "wav2vec2" if prefix else None, 2)
    assert {key: tensor.shape for key, tensor in to_theirs(ours.state_dict(), table).items()} == expected
