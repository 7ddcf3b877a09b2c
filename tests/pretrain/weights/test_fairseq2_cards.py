"""fairseq2's cards, checkpoints and tokenizers as files, read and written without fairseq2; tests/fairseq2
has its own models beside."""

import contextlib
import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.ctc.model import Recognizer, load_recognizer
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.objectives.hubert import Hubert, HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import load_weights, save_checkpoint
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.exporting import export_weights
from pretrain.weights.sentencepiece import read_pieces, write_pieces
from tests.parity.peers import scatter
from wordless.cli import main

PLAIN: dict[str, Any] = {
    "architecture": "tiny",
    "front_end": "waveform",
    "conv_norm": "layer",
    "conv_bias": True,
    "normalize_waveform": True,
}
CODES = Wav2Vec2Config(
    num_entries=4, code_dim=8, final_dim=8, mask_start_probability=0.05, feature_penalty=3.0
)


def make_run(run: Path, model: Any, kind: str = "encoder", **extra: Any) -> Path:
    config = {
        "encoder": model["encoder"].config.resolved()
        if isinstance(model, nn.ModuleDict)
        else model.encoder.config.resolved()
    }
    config |= {
        name: extra.pop(name).resolved() for name in ("wav2vec2", "hubert", "text", "ctc") if name in extra
    }
    save_checkpoint(
        run,
        0,
        scatter(model),
        torch.optim.AdamW(model.parameters()),
        {"kind": kind, "extra": extra, "config": config},
    )
    return run


def wav2vec2_run(run: Path, **changes: Any) -> Path:
    return make_run(
        run, Wav2Vec2(EncoderConfig(**{**PLAIN, **changes}), CODES), objective="wav2vec2", wav2vec2=CODES
    )


def recognizer_run(
    run: Path, symbols: list[str], spelling: Any = "characters", ctc: CTCConfig | None = None, **changes: Any
) -> Path:
    config = EncoderConfig(**{**PLAIN, **changes})
    vocabulary = Vocabulary(symbols, spelling)
    return make_run(
        run,
        Recognizer(config, vocabulary),
        "recognizer",
        text=TextConfig(spelling=spelling),
        ctc=ctc or CTCConfig(),
        vocabulary=vocabulary.to_meta(),
        config_encoder=config.resolved(),
        codebook=None,
    )


def exported(run: Path, out: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The card and the summary of an export; `changes` to the card's model_config are written."""
    summary = export_weights(run, out, "fairseq2")
    card = yaml.safe_load((out / "card.yaml").read_text(encoding="utf-8"))
    if changes:
        inner = card["model_config"]["encoder_config"]
        for key, value in changes.items():
            (inner if key in inner or key not in card["model_config"] else card["model_config"])[key] = value
        (out / "card.yaml").write_text(yaml.safe_dump(card))
    return card, summary


def back(source: Path, run: Path, **options: Any) -> dict[str, Any]:
    return import_weights(ImportConfig(source=str(source), out=str(run), **options))


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = load_weights(run)[0], load_weights(other)[0]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_exported_card_says_all_that_fairseq2_has_a_key_for(tmp_path: Path) -> None:
    card, summary = exported(wav2vec2_run(tmp_path / "run"), tmp_path / "mine")
    assert (card["name"], card["model_family"], card["checkpoint"]) == (
        "mine",
        "wav2vec2",
        "model.safetensors",
    )
    assert "model_arch" not in card  # every key is there
    told, inner = card["model_config"], card["model_config"]["encoder_config"]
    assert (told["max_temporal_mask_prob"], told["temporal_mask_span_len"], told["num_codebook_entries"]) == (
        0.5,
        10,
        4,
    )
    assert (
        inner["norm_order"],
        inner["layer_norm_features"],
        inner["feature_extractor_layer_norm_convs"],
    ) == ("PRE", False, True)
    assert inner["feature_extractor_layer_descs"][0] == [32, 10, 5] and inner["model_dim"] == 64
    names = load_file(tmp_path / "mine/model.safetensors")
    assert "encoder.layer_norm.weight" in names and "encoder_frontend.layer_norm.weight" not in names
    assert names["quantizer.num_updates"].dtype == torch.int64
    assert names["encoder_frontend.pos_encoder.conv.weight_g"].shape == (1, 1, 16)
    assert any("give them normalised" in note for note in summary["notes"])
    assert any("penalty 3.0" in note for note in summary["notes"])


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_exported_folder_is_read_without_fairseq2(norm_first: bool, tmp_path: Path) -> None:
    run = wav2vec2_run(tmp_path / "run", norm_first=norm_first)
    exported(run, tmp_path / "mine")
    for number, source in enumerate([tmp_path / "mine", tmp_path / "mine/card.yaml"]):
        summary = back(source, tmp_path / f"back{number}")
        assert (summary["format"], summary["objective"], summary["heads"], summary["notes"]) == (
            "fairseq2",
            "wav2vec2",
            True,
            [],
        )
        assert_same_weights(run, tmp_path / f"back{number}")
        config = read_meta(tmp_path / f"back{number}", "encoder")["config"]
        assert (
            config["encoder"] == load_weights(run)[1]["config"]["encoder"]
            and config["wav2vec2"] == CODES.resolved()
        )
    moved = exported(tmp_path / "back0", tmp_path / "again/mine")[0]
    assert moved == yaml.safe_load((tmp_path / "mine/card.yaml").read_text())


ALPHABETS: list[list[str]] = [
    ["|", "a", "é", "한", "'", "=", "1", "n", "~", "😀"],
    ["<s>", "</s>", "<unk>", "|", "a"],
    ["a", "<pad>"],
]


@pytest.mark.parametrize("symbols", ALPHABETS)
def test_a_recognisers_tokenizer_has_its_classes_in_their_order(symbols: list[str], tmp_path: Path) -> None:
    run = recognizer_run(tmp_path / "run", symbols)
    card, _ = exported(run, tmp_path / "mine")
    assert (card["model_family"], card["tokenizer_family"]) == ("wav2vec2_asr", "char_tokenizer")
    pieces = read_pieces(tmp_path / "mine/tokenizer.model")
    assert pieces.of_characters and pieces.names[1 : 1 + len(symbols)] == [
        s.replace("|", "\u2581") for s in symbols
    ]
    assert len(pieces.names) == card["model_config"]["target_vocab_size"] and pieces.types.count(2) == 1
    back(tmp_path / "mine", tmp_path / "back")
    assert_same_weights(run, tmp_path / "back")
    assert load_recognizer(tmp_path / "back").vocabulary.symbols == symbols
    del card["wordless"]  # as of a card that somebody else wrote
    (tmp_path / "mine/card.yaml").write_text(yaml.safe_dump(card))
    back(tmp_path / "mine", tmp_path / "plain", normalize_waveform=True)
    assert load_recognizer(tmp_path / "plain").vocabulary.symbols[: len(symbols)] == symbols


def test_phones_have_no_tokenizer_there_and_come_back_by_the_card(tmp_path: Path) -> None:
    run = recognizer_run(tmp_path / "run", ["AA", "SH"], "phones")
    card, summary = exported(run, tmp_path / "mine")
    assert "tokenizer" not in card and any("wordless.vocabulary" in note for note in summary["notes"])
    back(tmp_path / "mine", tmp_path / "back")
    assert load_recognizer(tmp_path / "back").vocabulary == Vocabulary(["AA", "SH"], "phones")


def test_without_masks_in_time_fairseq2_has_no_mask_embedding(tmp_path: Path) -> None:
    ctc = CTCConfig(
        mask_start_probability=0.0, mask_length=5, mask_channel_probability=0.002, mask_channel_length=7
    )
    run = recognizer_run(tmp_path / "run", ["|", "a"], ctc=ctc)
    card, summary = exported(run, tmp_path / "mine")
    assert card["model_config"]["use_masking"] is False
    assert "masker.temporal_mask_embed" not in load_file(tmp_path / "mine/model.safetensors")
    assert any("masks no channels" in note for note in summary["notes"])
    assert any("it is zero" in note for note in back(tmp_path / "mine", tmp_path / "back")["notes"])
    assert read_meta(tmp_path / "back")["config"]["ctc"] == ctc.resolved()  # as the card of ours says


@pytest.mark.parametrize("kind", ["hubert", "encoder", "filterbank", "square", "weighted", "units"])
def test_what_fairseq2_cannot_hold_becomes_a_card_of_ours_and_comes_back(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if kind == "hubert":
        make_run(
            run, Hubert(EncoderConfig(**PLAIN), HubertConfig(), 5), objective="hubert", hubert=HubertConfig()
        )
    elif kind == "encoder":
        make_run(run, nn.ModuleDict({"encoder": Encoder(EncoderConfig(**PLAIN))}), objective="wav2vec2")
    elif kind == "weighted":
        vocabulary, config = Vocabulary(["a"]), EncoderConfig(**PLAIN)
        make_run(
            run,
            Recognizer(config, vocabulary, layers="weighted"),
            "recognizer",
            text=TextConfig(),
            ctc=CTCConfig(layers="weighted"),
            vocabulary=vocabulary.to_meta(),
            config_encoder=config.resolved(),
            codebook=None,
        )
    elif kind == "units":
        vocabulary, config = (
            Vocabulary(["a"]),
            EncoderConfig(architecture="tiny", front_end="units", num_units=7),
        )
        make_run(
            run,
            Recognizer(config, vocabulary),
            "recognizer",
            text=TextConfig(),
            ctc=CTCConfig(),
            vocabulary=vocabulary.to_meta(),
            config_encoder=config.resolved(),
            codebook="0123",
        )
    else:
        wav2vec2_run(
            run,
            **({"front_end": "filterbank", "conv_bias": False} if kind == "filterbank" else {"conv_dim": 64}),
        )
    families = {"hubert": "wordless_hubert", "encoder": "wordless_encoder", "weighted": "wordless_recognizer"}
    card, summary = exported(run, tmp_path / "mine")
    family = families.get(kind, "wordless_recognizer" if kind == "units" else "wordless_wav2vec2")
    assert summary["family"] == card["model_family"] == family
    assert any("where wordless is installed" in note for note in summary["notes"])
    assert load_file(tmp_path / "mine/model.safetensors").keys() == load_weights(run)[0].keys()
    back(tmp_path / "mine", tmp_path / "back")
    assert_same_weights(run, tmp_path / "back")
    meta, found = load_weights(run)[1], load_weights(tmp_path / "back")[1]
    assert found["kind"] == meta["kind"] and found.get("vocabulary") == meta.get("vocabulary")
    assert (
        found.get("codebook") == meta.get("codebook")
        and found["config"]["encoder"] == meta["config"]["encoder"]
    )


def test_encoder_only_leaves_out_the_heads(tmp_path: Path) -> None:
    run = wav2vec2_run(tmp_path / "run")
    summary = export_weights(run, tmp_path / "mine", "fairseq2", encoder_only=True)
    assert summary["family"] == "wordless_encoder" and not summary["heads"]
    assert {name.split(".")[0] for name in load_file(tmp_path / "mine/model.safetensors")} == {"encoder"}


def test_weights_alone_in_safetensors_or_a_pickle_tell_their_architecture(tmp_path: Path) -> None:
    run = wav2vec2_run(tmp_path / "run")
    exported(run, tmp_path / "mine")
    state = load_file(tmp_path / "mine/model.safetensors")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "w.pt")
    for number, source in enumerate([tmp_path / "mine/model.safetensors", tmp_path / "w.pt"]):
        summary = back(source, tmp_path / f"back{number}", num_heads=2, allow_pickle=True)
        assert (summary["format"], summary["heads"], summary["normalize_waveform"]) == (
            "fairseq2",
            True,
            True,
        )
        assert any("taken for 2 groups" in note for note in summary["notes"])
        assert_same_weights(run, tmp_path / f"back{number}")
    with pytest.raises(ValueError, match="say --num-heads N"):
        back(tmp_path / "mine/model.safetensors", tmp_path / "never")
    with pytest.raises(ValueError, match="w.pt: is a pickle.*--allow-pickle"):
        back(tmp_path / "w.pt", tmp_path / "never", num_heads=2)


def test_a_head_alone_needs_its_vocabulary(tmp_path: Path) -> None:
    run = recognizer_run(tmp_path / "run", ["<s>", "</s>", "<unk>", "|", "a"])
    exported(run, tmp_path / "mine")
    source = tmp_path / "mine/model.safetensors"
    summary = back(source, tmp_path / "bare", num_heads=2)
    assert summary["kind"] == "encoder" and any("--vocabulary FILE" in note for note in summary["notes"])
    back(source, tmp_path / "whole", num_heads=2, vocabulary=str(tmp_path / "mine/tokenizer.model"))
    assert load_recognizer(tmp_path / "whole").vocabulary.symbols == ["<s>", "</s>", "<unk>", "|", "a"]
    write_pieces(tmp_path / "long.model", "<pad>", list("abcdefgh"), "<unk>")
    with pytest.raises(ValueError, match="long.model: has 10 pieces, but the CTC head 6 classes"):
        back(source, tmp_path / "never", num_heads=2, vocabulary=str(tmp_path / "long.model"))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<pad>": 1, "b": 2, "c": 3, "d": 4, "e": 5}))
    with pytest.raises(ValueError, match="its blank is number 1; that of fairseq2 is always 0"):
        back(source, tmp_path / "never", num_heads=2, vocabulary=str(tmp_path / "vocab.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_conformer": True},
            "encoder_config.use_conformer = True: a model with Conformer blocks is not supported",
        ),
        ({"use_fbank": True}, "use_fbank = True: a model with log-mel filterbanks"),
        (
            {"pos_encoder_type": "relative"},
            "pos_encoder_type = 'relative': a model with positions in its attention",
        ),
        ({"pos_encoder_depth": 5}, "pos_encoder_depth = 5: a model with several positional convolutions"),
        ({"layer_norm_features": True}, "layer_norm_features = True with norm_order = PRE"),
        ({"norm_order": "SANDWICH"}, "norm_order = 'SANDWICH': only PRE and POST"),
        ({"model_dim": 32}, "feature_dim = 32 = model_dim: a model without a projection"),
        (
            {"feature_extractor_layer_descs": [[32, 10, 5], 7]},
            r"feature_extractor_layer_descs = \[\(32, 10, 5\), 7\]: only",
        ),
        ({"feature_extractor_layer_norm_convs": False}, "conv_bias with a group norm is not supported"),
        ({"num_encoder_attn_heads": 5}, "dim 64 is not a multiple of num_heads 5"),
        ({"final_proj_bias": False}, "final_proj_bias = False: a projection without a bias"),
        (
            {"codebook_sampling_temperature": [2.0, 0.5]},
            r"codebook_sampling_temperature = \[2.0, 0.5\]: first, last and decay",
        ),
        (
            {"max_temporal_mask_prob": 20},
            "card.yaml: max_temporal_mask_prob, here mask_start_probability: .* got 2.0",
        ),
        ({"num_codebooks": 0}, "card.yaml: num_codebooks, here num_groups: "),
        (
            {"num_encoder_layers": 0},
            "card.yaml: encoder_config.num_encoder_layers, here num_layers: .* got 0",
        ),
        ({"lora_rank": 4}, "encoder_config.lora_rank = 4: no key of fairseq2 0.8's config"),
        ({"num_encoder_layer": 4}, "num_encoder_layer = 4: no key .*; near it are .*num_encoder_layers"),
        ({"dropout_p": "much"}, "dropout_p = 'much': like 0.1 is expected"),
        ({"encoder_config": 3}, "encoder_config = 3: a table is expected"),
        ({"num_encoder_layers": 10**30}, "10{30} layers are told, but there are only"),
        ({"model_dim": 10**12}, "no model can be that large"),
        ({"num_encoder_layers": 3}, "missing: encoder.layers.2.self_attn.q_proj.weight"),
        ({"quantized_dim": 16}, r"quantizer.entries: is \(1, 8, 4\); \(1, 8, 8\) is expected"),
    ],
)
def test_a_card_of_another_architecture_is_refused_by_its_key_and_value(
    changes: Any, message: str, tmp_path: Path
) -> None:
    exported(wav2vec2_run(tmp_path / "run"), tmp_path / "mine", **changes)
    with pytest.raises(ValueError, match=message):
        back(tmp_path / "mine", tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_family": "llama"},
            "card.yaml: model_family = 'llama': no speech encoder that wordless knows; supported are "
            "wav2vec2",
        ),
        ({"model_arch": "7b"}, "model_arch = '7b': fairseq2 alone knows what that is; .* fairseq2:mine"),
        ({"base": "wav2vec2_base"}, "base = 'wav2vec2_base': fairseq2 alone knows"),
        (
            {"checkpoint": "https://example.org/w.pt"},
            "https://example.org/w.pt is not on this machine; fairseq2 downloads it",
        ),
        ({"checkpoint": "gone.safetensors"}, "gone.safetensors: no such checkpoint"),
        ({"checkpoint": None}, "card.yaml: has no checkpoint"),
        ({"checkpoint": ""}, "card.yaml: '' stands for the folder of the card"),
        ({"checkpoint": "./"}, "card.yaml: './' stands for the folder of the card"),
        ({"checkpoint": "x" * 5000}, "xxx: no such checkpoint .File name too long"),
        ({"checkpoint_path": 3}, "card.yaml: checkpoint_path = 3: a path inside `checkpoint`"),
        ({"checkpoint_path": "in.pt"}, "model.safetensors/in.pt: no such checkpoint"),
        ({"model_config": 3}, "model_config and wordless are tables"),
        ({"model_arch": "base_10h"}, "model_arch = 'base_10h': fairseq2 alone knows"),
        (
            {"model_config": {"final_dim": [["x" * 1000] * 1001] * 1000}},
            "card.yaml: not valid YAML .its aliases stand for more values",
        ),
        ({"wordless": {"wav2vec2": [1]}}, r"card.yaml: wordless.wav2vec2 = \[1\]: a table is expected"),
        (
            {"model_family": "wordless_hubert"},
            "card.yaml: model_config.*: no key of a wordless_hubert; known are encoder, hubert",
        ),
        (
            {"model_family": "wordless_encoder", "model_config": {"encoder": [1]}},
            r"model_config.encoder = \[1\]: a table is expected",
        ),
        (
            {"model_family": "wordless_encoder", "model_config": {"encoder": {"dims": 1}}},
            "card.yaml: model_config.encoder: dims: unknown key",
        ),
        (
            {
                "model_family": "wordless_recognizer",
                "model_config": {"vocabulary": {"symbols": ["a"], "spelling": "x"}},
            },
            "card.yaml: model_config.vocabulary.spelling: one of characters",
        ),
        (
            {
                "model_family": "wordless_recognizer",
                "model_config": {"vocabulary": {"symbols": ["a", "a", "b"]}},
            },
            "card.yaml: model_config.vocabulary.symbols: 'a' more than once",
        ),
        (
            {
                "model_family": "wordless_recognizer",
                "model_config": {
                    "vocabulary": {"symbols": ["a"], "spelling": "tokenizer", "tokenizer": "{}"}
                },
            },
            "card.yaml: model_config.vocabulary.tokenizer: not the JSON of a Hugging Face tokenizer",
        ),
        ({"model_family": "wordless_hubert", "model_config": {"encoder": PLAIN}}, "has no class_embeddings"),
    ],
)
def test_a_card_that_is_not_of_a_model_here_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    card, _ = exported(wav2vec2_run(tmp_path / "run"), tmp_path / "mine")
    (tmp_path / "mine/card.yaml").write_text(yaml.safe_dump({**card, **changes}))
    with pytest.raises(ValueError, match=message):
        back(tmp_path / "mine", tmp_path / "never")


def test_damaged_files_of_a_card_are_named(tmp_path: Path) -> None:
    exported(recognizer_run(tmp_path / "run", ["|", "a"]), tmp_path / "mine")
    for name, content, message in (
        ("card.yaml", b"name: [", "card.yaml: not valid YAML"),
        ("card.yaml", b"\xff\xfe\x00", "card.yaml: not valid YAML"),
        ("card.yaml", b"- 1\n- 2\n", "neither config.json .* nor an asset card of a model"),
        ("model.safetensors", b"x", "model.safetensors: not a whole safetensors file"),
        ("model.safetensors", None, "model.safetensors: no such checkpoint"),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(tmp_path / "mine", folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            back(folder, tmp_path / "never")
        shutil.rmtree(folder)
    (tmp_path / "bad.model").write_bytes(b"\x0a\xff\xff\xff")
    with pytest.raises(ValueError, match="bad.model: not a SentencePiece model"):
        back(tmp_path / "mine", tmp_path / "never", vocabulary=str(tmp_path / "bad.model"))
    shutil.copy(tmp_path / "mine/card.yaml", tmp_path / "mine/two.yaml")
    with pytest.raises(ValueError, match=r"holds 2 cards of models \(mine, mine\)"):
        back(tmp_path / "mine", tmp_path / "never")


@pytest.mark.parametrize(
    ("name", "tensor", "of_card", "alone"),
    [
        (
            "final_proj.weight",
            torch.tensor(1.0),
            r"target_vocab_size = 4, but final_proj.weight is \(\)",
            "not expected: final_proj",
        ),
        (
            "final_proj.weight",
            None,
            "has no final_proj.weight, so it is no checkpoint of wav2vec2_asr",
            "not expected: final_proj.bias",
        ),
        (
            "final_proj.bias",
            torch.zeros(2),
            r"model.safetensors: .*final_proj.bias, \(4, 64\) and \(2,\), do not fit",
            None,
        ),
        (
            "encoder_frontend.pos_encoder.conv.weight_v",
            torch.zeros(3),
            r"weight_v: is \(3,\); \(64, 16, 16\) is expected",
            r"weight_v' is \(3,\); 3 axes, none empty",
        ),
        ("quantizer.entries", torch.zeros(4), "not expected: quantizer.entries", "not expected: "),
    ],
)
def test_tensors_of_strange_shapes_are_named(
    name: str, tensor: Tensor | None, of_card: str, alone: str | None, tmp_path: Path
) -> None:
    exported(recognizer_run(tmp_path / "run", ["|", "a"]), tmp_path / "mine")
    file = tmp_path / "mine/model.safetensors"
    state = {key: value for key, value in load_file(file).items() if key != name} | (
        {name: tensor} if tensor is not None else {}
    )
    save_file(state, file)
    with pytest.raises(ValueError, match=of_card):
        back(tmp_path / "mine", tmp_path / "never")
    if alone is not None:
        with pytest.raises(ValueError, match=alone):
            back(file, tmp_path / "never", num_heads=2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
@pytest.mark.parametrize(
    "name", ["final_proj.weight", "final_proj.bias", "encoder_frontend.model_dim_proj.bias"]
)
def test_tensors_that_are_no_floating_point_numbers_are_named(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    exported(recognizer_run(tmp_path / "run", ["|", "a"]), tmp_path / "mine")
    file = tmp_path / "mine/model.safetensors"
    state = load_file(file)
    save_file({**state, name: state[name].to(dtype)}, file)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"mine: {name}: holds {kind}; floating-point numbers are expected"):
        back(tmp_path / "mine", tmp_path / "never")


def test_symbols_that_an_exported_card_has_twice_are_refused(tmp_path: Path) -> None:
    card, _ = exported(recognizer_run(tmp_path / "run", ["|", "a"]), tmp_path / "mine")
    card["wordless"]["vocabulary"]["symbols"] = ["a", "a", "|"]
    (tmp_path / "mine/card.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(
        ValueError, match="card.yaml: wordless.vocabulary.symbols: 'a' more than once; each is one class"
    ):
        back(tmp_path / "mine", tmp_path / "never")


def test_channels_that_fairseq2_cannot_mask_come_back(tmp_path: Path) -> None:
    """Of the width 64, spans of 64 channels, which are the default."""
    run = recognizer_run(tmp_path / "run", ["|", "a"])
    card, summary = exported(run, tmp_path / "mine")
    assert (
        card["model_config"]["max_spatial_mask_prob"]
        == 0
        == card["model_config"]["min_num_temporal_mask_spans"]
    )
    assert any("masks no channels where a span of 64 does not fit 64" in note for note in summary["notes"])
    assert not any("min_num" in note for note in back(tmp_path / "mine", tmp_path / "back")["notes"])
    assert read_meta(tmp_path / "back")["config"]["ctc"] == CTCConfig().resolved()


def test_a_least_number_of_spans_is_said_to_stay_behind(tmp_path: Path) -> None:
    card, _ = exported(wav2vec2_run(tmp_path / "run"), tmp_path / "mine", min_num_temporal_mask_spans=5)
    del card["wordless"]
    (tmp_path / "mine/card.yaml").write_text(yaml.safe_dump(card))
    notes = back(tmp_path / "mine", tmp_path / "back")["notes"]
    assert [note for note in notes if "min_num_temporal_mask_spans = 5 is not carried on" in note]
    assert not any("min_num_spatial" in note for note in notes)


def test_the_blank_gets_a_name_that_no_symbol_has(tmp_path: Path) -> None:
    symbols = ["a", "<pad>", "<blank>", "<blank 2>", "<ctc blank>"]
    run = recognizer_run(tmp_path / "run", symbols)
    for form in ("fairseq2", "huggingface"):
        export_weights(run, tmp_path / form, form)  # type: ignore[arg-type]
        back(tmp_path / form, tmp_path / f"back-{form}")
        assert load_recognizer(tmp_path / f"back-{form}").vocabulary.symbols == symbols
    assert read_pieces(tmp_path / "fairseq2/tokenizer.model").names[0] == "<blank 3>"


def test_classes_that_a_card_and_its_checkpoint_count_otherwise_are_refused(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        Hubert(EncoderConfig(**PLAIN), HubertConfig(), 5),
        objective="hubert",
        hubert=HubertConfig(),
    )
    card, _ = exported(run, tmp_path / "mine")
    card["model_config"]["num_classes"] = 9
    (tmp_path / "mine/card.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ValueError, match=r"num_classes = 9, but class_embeddings is \(5, 256\)"):
        back(tmp_path / "mine", tmp_path / "never")


def test_checkpoints_cut_by_tensor_parallelism_are_refused(tmp_path: Path) -> None:
    card, _ = exported(wav2vec2_run(tmp_path / "run"), tmp_path / "mine")
    folder = tmp_path / "checkpoints"
    (folder / "step_3/model/pp_00/tp_01").mkdir(parents=True)
    (folder / "model.yaml").write_text(yaml.safe_dump({**card, "name": "checkpoint"}))
    with pytest.raises(ValueError, match="step_3/model: is cut by pipeline or tensor parallelism"):
        back(folder, tmp_path / "never", allow_pickle=True)
    (folder / "step_3/model/pp_00/tp_01").rmdir()
    with pytest.raises(ValueError, match="has no pp_00/tp_00/sdp_00.pt"):
        back(folder / "step_3", tmp_path / "never", allow_pickle=True)
    (folder / "step_3/model/pp_00/tp_00").mkdir()
    for number, part in enumerate([torch.zeros(3, 4), torch.zeros(3)]):
        torch.save({"w": part}, folder / f"step_3/model/pp_00/tp_00/sdp_{number:02d}.pt")
    with pytest.raises(
        ValueError, match=r"the parts of 'w' in its files do not fit together: \(3, 4\), \(3,\)"
    ):
        back(folder, tmp_path / "never", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("encoder.layers.0.self_attn.sdpa.r_proj.weight", "relative positions"),
        ("encoder.layers.0.conv.depthwise_conv.weight", "Conformer"),
        ("encoder_frontend.pos_encoder.layers.0.conv.weight", "data2vec"),
    ],
)
def test_a_name_that_is_a_sign_of_another_architecture_is_refused(
    name: str, description: str, tmp_path: Path
) -> None:
    exported(wav2vec2_run(tmp_path / "run"), tmp_path / "mine")
    state: dict[str, Tensor] = {**load_file(tmp_path / "mine/model.safetensors"), name: torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=f"{name}.*{description}.* not supported"):
        back(tmp_path / "w.safetensors", tmp_path / "never", num_heads=2)


def test_a_name_that_cannot_be_an_assets_is_refused(tmp_path: Path) -> None:
    run = wav2vec2_run(tmp_path / "run")
    with pytest.raises(ValueError, match="mine@home.*take one without @"):
        export_weights(run, tmp_path / "mine@home", "fairseq2")
    exported(run, tmp_path / "mine")
    with pytest.raises(ValueError, match="is there already"):
        export_weights(run, tmp_path / "mine", "fairseq2")


def test_a_frozen_front_end_is_written_as_fairseq2_can_say_it(tmp_path: Path) -> None:
    card, summary = exported(wav2vec2_run(tmp_path / "run", feature_gradient_scale=0.0), tmp_path / "mine")
    assert card["model_config"]["encoder_config"]["feature_grad_scale"] == 1.0
    assert any("feature_gradient_scale = 0.0 is written as 1" in note for note in summary["notes"])


@pytest.mark.parametrize("found", [None, "0.7.0", "0.9.1"])
def test_naming_a_card_without_fairseq2_exits_2_with_the_remedy(
    found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(_: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr("pretrain.fairseq2.available.version", version)
    assert main(["import", "fairseq2:wav2vec2_base", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "fairseq2:wav2vec2_base needs fairseq2 0.8" in message and "pip install" in message
    assert (found or "not installed") in message and not (tmp_path / "run").exists()


def test_export_and_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = wav2vec2_run(tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "mine"), "--format", "fairseq2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "wav2vec2"
    assert main(["import", str(tmp_path / "mine"), str(tmp_path / "back")]) == 0
    assert_same_weights(run, tmp_path / "back")


@given(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=20, unique=True), st.text(min_size=1))
def test_pieces_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, symbols: list[str], unknown: str
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    write_pieces(path, "<pad>", symbols, unknown)
    found = read_pieces(path)
    assert found.names == ["<pad>", *symbols, *([unknown] if unknown not in ["<pad>", *symbols] else [])]
    assert found.types.count(2) == 1 and found.of_characters


@given(st.binary(max_size=60))
def test_no_bytes_make_the_reader_of_pieces_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        read_pieces(path)
