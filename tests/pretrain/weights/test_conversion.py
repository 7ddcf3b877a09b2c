"""Import and export: fairseq's names and settings, round trips, what is inferred and said, and everything
that is refused.

fairseq does not install beside a current torch, so no checkpoint of its own making is read here: they are put
together from the names and settings that its source documents. transformers' and torchaudio's models are in
tests/parity.
"""

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.ctc.model import load_recognizer
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder, load_encoder
from pretrain.store.artefact import read_meta
from pretrain.store.hashes import sha256_file
from pretrain.training.checkpoint import save_checkpoint
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.exporting import export_weights
from pretrain.weights.naming import Format
from pretrain.weights.pickles import weights_only_hole
from wordless.cli import main

WIDTH, CONV, FFN, KERNEL, GROUPS, LAYERS = 64, 32, 96, 16, 4, 2
STACK = "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2"


def fairseq_weights(
    objective: str | None, *, layer_norm: bool = False, bias: bool = False, rows: int = 54
) -> dict[str, Tensor]:
    """A state dict with fairseq's names: `objective` "wav2vec2" (2 × 8 codes), "hubert" (`rows` label
    embeddings) or no heads."""
    shapes: dict[str, tuple[int, ...]] = {
        "mask_emb": (WIDTH,),
        "layer_norm.weight": (CONV,),
        "layer_norm.bias": (CONV,),
    }
    shapes |= {"post_extract_proj.weight": (WIDTH, CONV), "post_extract_proj.bias": (WIDTH,)}
    for number, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        conv = f"feature_extractor.conv_layers.{number}"
        shapes[f"{conv}.0.weight"] = (CONV, CONV if number else 1, kernel)
        if bias:
            shapes[f"{conv}.0.bias"] = (CONV,)
        if layer_norm or number == 0:
            shapes |= {f"{conv}.2{'.1' if layer_norm else ''}.{kind}": (CONV,) for kind in ("weight", "bias")}
    shapes |= {
        "encoder.pos_conv.0.weight_g": (1, 1, KERNEL),
        "encoder.pos_conv.0.weight_v": (WIDTH, WIDTH // GROUPS, KERNEL),
    }
    shapes |= {
        "encoder.pos_conv.0.bias": (WIDTH,),
        "encoder.layer_norm.weight": (WIDTH,),
        "encoder.layer_norm.bias": (WIDTH,),
    }
    for number in range(LAYERS):
        layer = f"encoder.layers.{number}"
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{layer}.{part}.weight": (WIDTH, WIDTH), f"{layer}.{part}.bias": (WIDTH,)}
        for part in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{part}.weight": (WIDTH,), f"{layer}.{part}.bias": (WIDTH,)}
        shapes |= {f"{layer}.fc1.weight": (FFN, WIDTH), f"{layer}.fc1.bias": (FFN,)}
        shapes |= {f"{layer}.fc2.weight": (WIDTH, FFN), f"{layer}.fc2.bias": (WIDTH,)}
    if objective == "wav2vec2":
        shapes |= {
            "quantizer.vars": (1, 16, 12),
            "quantizer.weight_proj.weight": (16, CONV),
            "quantizer.weight_proj.bias": (16,),
        }
        shapes |= {"project_q.weight": (20, 24), "project_q.bias": (20,)}
    if objective == "hubert":
        shapes["label_embs_concat"] = (rows, 20)
    if objective:
        shapes |= {"final_proj.weight": (20, WIDTH), "final_proj.bias": (20,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fairseq_model(**changes: Any) -> dict[str, Any]:
    """Settings of a model as fairseq writes them."""
    settings = {
        "_name": "wav2vec2",
        "encoder_layers": LAYERS,
        "encoder_embed_dim": WIDTH,
        "encoder_ffn_embed_dim": FFN,
        "encoder_attention_heads": 4,
        "conv_feature_layers": STACK,
        "conv_pos": KERNEL,
        "conv_pos_groups": GROUPS,
        "extractor_mode": "default",
        "layer_norm_first": False,
        "final_dim": 20,
        "encoder_layerdrop": 0.05,
        "dropout_input": 0.1,
        "feature_grad_mult": 0.1,
    }
    return {**settings, **changes}


LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
QUANTIZED = {
    "quantize_targets": True,
    "latent_vars": 8,
    "latent_groups": 2,
    "latent_dim": 24,
    "logit_temp": 0.2,
    "num_negatives": 7,
    "mask_prob": 0.6,
    "mask_length": 8,
    "dropout_features": 0.05,
    "latent_temp": "(2.0,0.25,0.999)",
}


def save(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def checkpoint(folder: Path, objective: str | None, *, large: bool = False, rows: int = 54) -> Path:
    """A whole fairseq checkpoint."""
    changes: dict[str, Any] = {
        "_name": objective or "wav2vec2",
        **(LARGE if large else {}),
        **(QUANTIZED if objective == "wav2vec2" else {}),
    }
    cfg = {"model": fairseq_model(**changes), "task": {"normalize": large}, "criterion": {}}
    state = {
        "args": None,
        "cfg": cfg,
        "model": fairseq_weights(objective, layer_norm=large, bias=large, rows=rows),
    }
    return save(
        folder / f"{objective}.pt",
        {**state, "optimizer_history": [{"num_updates": 4}], "extra_state": {"epoch": 1}},
    )


def run_of(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return import_weights(ImportConfig(source=str(source), out=str(out), **{"allow_pickle": True, **options}))


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "step_00000000" / "model.safetensors")


def weights_hash(run: Path) -> str:
    return sha256_file(run / "step_00000000" / "model.safetensors")


# fairseq


def test_fairseqs_names_and_settings_become_ours(tmp_path: Path) -> None:
    theirs = fairseq_weights("wav2vec2")
    cfg = {
        "model": fairseq_model(**QUANTIZED),
        "task": {"_name": "audio_pretraining", "normalize": True},
        "criterion": {"_name": "wav2vec", "loss_weights": [0.2, 5.0]},
    }
    summary = run_of(save(tmp_path / "w.pt", {"cfg": cfg, "args": None, "model": theirs}), tmp_path / "run")
    assert (summary["objective"], summary["heads"], summary["normalize_waveform"]) == ("wav2vec2", True, True)
    assert summary["notes"] == [note for note in [weights_only_hole()] if note]  # of torch 2.9
    ours, config = weights(tmp_path / "run"), read_meta(tmp_path / "run", "encoder")["config"]
    assert sum(tensor.numel() for tensor in ours.values()) == sum(
        tensor.numel() for tensor in theirs.values()
    )
    attention = "encoder.layers.1.self_attn"
    assert torch.equal(
        ours["encoder.layers.1.qkv.weight"][WIDTH : 2 * WIDTH], theirs[f"{attention}.k_proj.weight"]
    )
    assert torch.equal(
        ours["encoder.front_end.weights.3"][2], theirs["feature_extractor.conv_layers.3.0.weight"][..., 2].T
    )
    assert torch.equal(
        ours["encoder.layers.0.attention_norm.bias"], theirs["encoder.layers.0.self_attn_layer_norm.bias"]
    )
    assert torch.equal(
        ours["encoder.layers.0.ffn_norm.bias"], theirs["encoder.layers.0.final_layer_norm.bias"]
    )
    assert torch.equal(ours["encoder.feature_norm.weight"], theirs["layer_norm.weight"])
    assert torch.equal(ours["quantizer.codes"][1, 3], theirs["quantizer.vars"][0, 11])
    assert torch.equal(ours["project.weight"], theirs["final_proj.weight"])
    assert torch.equal(ours["project_code.weight"], theirs["project_q.weight"])
    assert (
        config["encoder"] | {"layer_drop": 0.05, "input_dropout": 0.1, "feature_gradient_scale": 0.1}
        == config["encoder"]
    )
    told = {
        "num_entries": 8,
        "num_groups": 2,
        "code_dim": 24,
        "final_dim": 20,
        "temperature": 0.2,
        "num_distractors": 7,
        "mask_start_probability": 0.075,
        "mask_length": 8,
        "gumbel_temperature": [2.0, 0.25],
        "gumbel_decay": 0.999,
        "diversity_weight": 0.2,
        "feature_penalty": 5.0,
        "feature_dropout": 0.05,
    }
    assert config["wav2vec2"] == told


def test_an_old_checkpoint_has_its_settings_in_a_namespace(tmp_path: Path) -> None:
    args = argparse.Namespace(
        arch="wav2vec2", normalize=False, task="audio_pretraining", **fairseq_model(**QUANTIZED)
    )
    del args._name
    run_of(save(tmp_path / "old.pt", {"args": args, "model": fairseq_weights("wav2vec2")}), tmp_path / "old")
    run_of(checkpoint(tmp_path, "wav2vec2"), tmp_path / "new")
    assert weights_hash(tmp_path / "old") == weights_hash(tmp_path / "new")
    assert (
        read_meta(tmp_path / "old")["config"]["encoder"] == read_meta(tmp_path / "new")["config"]["encoder"]
    )


@pytest.mark.parametrize("objective", ["wav2vec2", "hubert"])
def test_a_fine_tuned_checkpoint_gives_its_encoder(
    objective: str, tmp_path: Path, fairseq: "Fairseq"
) -> None:
    """Of HuBERT's heads fairseq's fine-tuning removes the projection alone; the dictionary is now the
    letters'."""
    inside = fairseq_weights("hubert" if objective == "hubert" else None)
    model = {
        f"w2v_encoder.w2v_model.{name}": tensor
        for name, tensor in inside.items()
        if not name.startswith("final_proj.")
    }
    model |= {"w2v_encoder.proj.weight": torch.zeros(30, WIDTH), "w2v_encoder.proj.bias": torch.zeros(30)}
    inner = {"model": fairseq_model(_name=objective), "task": {"normalize": True}}
    cfg = {"model": {"_name": f"{objective}_ctc", "w2v_args": inner}, "task": {"normalize": True}}
    with fairseq.installed():
        letters = {"target_dictionary": fairseq.dictionary(["<s>", "<pad>", "</s>", "<unk>", "|", "E"])}
        source = save(tmp_path / "ctc.pt", {"cfg": cfg, "model": model, "task_state": letters})
    summary = run_of(source, tmp_path / "run")
    assert summary["objective"] == objective
    assert any("table of label embeddings" in note for note in summary["notes"]) == (objective == "hubert")
    assert not summary["heads"]
    assert any("CTC head" in note for note in summary["notes"]) and any(
        "encoder alone" in note for note in summary["notes"]
    )
    assert {name.split(".")[0] for name in weights(tmp_path / "run")} == {"encoder"}
    assert read_meta(tmp_path / "run")["heads"] is False


LETTER_WORDS = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "'"]


def fine_tuned(folder: Path, rows: int = len(LETTER_WORDS), **more: Any) -> Path:
    """A recogniser of fairseq's with `rows` classes, each row of its head filled with its number."""
    numbers = torch.arange(float(rows))
    model = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in fairseq_weights(None).items()}
    model |= {"w2v_encoder.proj.weight": numbers[:, None].repeat(1, WIDTH), "w2v_encoder.proj.bias": numbers}
    cfg = {"model": {"_name": "wav2vec_ctc", "w2v_args": {"model": fairseq_model(), "task": {}}}, "task": {}}
    return save(folder / "ctc.pt", {"cfg": cfg, "model": model, **more})


@pytest.mark.parametrize("held", [True, False])
def test_a_fine_tuned_checkpoint_with_its_dictionary_is_a_recogniser(
    held: bool, tmp_path: Path, fairseq: "Fairseq"
) -> None:
    """The dictionary of letters is in newer checkpoints, and in the data folder of older ones, there without
    its special words."""
    lines = (
        f"{word} {count}{' #fairseq:overwrite' if word == 'E' else ''}\n"
        for count, word in enumerate(LETTER_WORDS[4:])
    )
    (tmp_path / "dict.ltr.txt").write_text("".join(lines))
    with fairseq.installed():
        letters: dict[str, Any] = (
            {"task_state": {"target_dictionary": fairseq.dictionary(LETTER_WORDS)}} if held else {}
        )
        source = fine_tuned(tmp_path, **letters)
    given = {} if held else {"vocabulary": str(tmp_path / "dict.ltr.txt")}
    summary = run_of(source, tmp_path / "run", **given)
    assert (summary["kind"], summary["vocabulary"], summary["objective"]) == ("recognizer", 8, "wav2vec2")
    loaded = load_recognizer(tmp_path / "run")
    assert loaded.vocabulary == Vocabulary(LETTER_WORDS[1:]) and loaded.text == TextConfig(case="upper")
    assert loaded.model.head.bias.tolist() == [*range(8)]  # the blank is fairseq's <s>, the first
    assert loaded.vocabulary.decode(loaded.vocabulary.encode("TE'E")) == "TE'E"


def test_the_best_checkpoint_is_loaded_and_exported_where_one_was_kept(tmp_path: Path) -> None:
    model, run = (
        nn.ModuleDict({"encoder": Encoder(EncoderConfig(architecture="tiny", front_end="waveform"))}),
        tmp_path / "run",
    )
    state = {"kind": "encoder", "extra": {}, "config": {"encoder": model["encoder"].config.resolved()}}
    adam = torch.optim.AdamW(model.parameters())
    best = save_checkpoint(run, 1, model, adam, state)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    last = save_checkpoint(run, 2, model, adam, {**state, "best": {"step": 1}})
    kept, newest = (sha256_file(path / "model.safetensors")[:16] for path in (best, last))
    assert (
        load_encoder(run)[1]
        == export_weights(run, tmp_path / "best.pt", "fairseq")["weights"]
        == kept
        != newest
    )


def test_a_dictionary_of_phones_makes_a_recogniser_of_phones_and_pieces_are_refused(tmp_path: Path) -> None:
    source = fine_tuned(tmp_path, 7)
    (tmp_path / "dict.phn.txt").write_text("AA 3\nSH 2\nT 1\n")
    run_of(source, tmp_path / "run", vocabulary=str(tmp_path / "dict.phn.txt"))
    loaded = load_recognizer(tmp_path / "run")
    assert loaded.text.spelling == "phones" and loaded.vocabulary.encode("SH T").tolist() == [5, 6]
    (tmp_path / "dict.txt").write_text("\u2581AA 3\nSH 2\nT 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"dict.txt: a dictionary of pieces is not supported"):
        run_of(source, tmp_path / "never", vocabulary=str(tmp_path / "dict.txt"))


def test_a_torchaudio_recogniser_needs_its_vocabulary(tmp_path: Path) -> None:
    encoder = fairseq_weights(None)
    run_of(checkpoint(tmp_path, None), tmp_path / "bare")
    export_weights(tmp_path / "bare", tmp_path / "bare.pth", "torchaudio")
    state = {f"wav2vec2.{name}": tensor for name, tensor in torch.load(tmp_path / "bare.pth").items()}
    state |= {"aux.weight": torch.zeros(6, len(encoder["mask_emb"])), "aux.bias": torch.arange(6.0)}
    source = save(tmp_path / "ctc.pth", state)
    left = run_of(source, tmp_path / "left", num_heads=4)
    assert left["kind"] == "encoder" and any(
        "--vocabulary dict.ltr.txt does" in note for note in left["notes"]
    )
    (tmp_path / "letters.json").write_text('{"a": 0, "-": 5, "b": 1, "|": 2, ".": 3, "c": 4}')
    run_of(source, tmp_path / "run", num_heads=4, vocabulary=str(tmp_path / "letters.json"))
    loaded = load_recognizer(tmp_path / "run")
    assert loaded.vocabulary.symbols == ["a", "b", "|", ".", "c"] and loaded.text == TextConfig(
        punctuation="keep"
    )
    assert loaded.model.head.bias.tolist() == [5, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dict.txt", "| 3\nE 2\n", "2 words and 4 special ones, but the CTC head has 8 classes"),
        ("dict.txt", "| 3\nE 2\nE 1\nT 1\n", "4 words and 4 special ones"),
        ("v.json", '{"|": 0}', r"the blank, '<pad>', is none of the 8 classes"),
        ("v.json", '{"|": "x"}', "each token needs a number of its own"),
        ("gone.txt", None, "no such file; give the dict.ltr.txt or the vocab.json"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_by_name(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    source, path = fine_tuned(tmp_path), tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{message}"):
        run_of(source, tmp_path / "run", vocabulary=str(path))
    with pytest.raises(ValueError, match="has no CTC head; --vocabulary is for models that have one"):
        run_of(checkpoint(tmp_path, None), tmp_path / "run", vocabulary=str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "classes"), [(54, 50), (504, 500), (104, 100), (500, 500), (260, 256), (100, 100)]
)
def test_the_rows_of_special_words_are_left_out_where_the_count_shows_them(
    rows: int, classes: int, tmp_path: Path
) -> None:
    theirs = fairseq_weights("hubert", rows=rows)["label_embs_concat"]
    summary = run_of(checkpoint(tmp_path, "hubert", rows=rows), tmp_path / "run")
    assert torch.equal(weights(tmp_path / "run")["class_embeddings"], theirs[rows - classes :])
    assert (
        f"4 are fairseq's special words, left out ({rows} = {classes} + 4" in "".join(summary["notes"])
    ) == (rows != classes)
    assert (f"none taken for fairseq's special words: K = {rows}" in "".join(summary["notes"])) == (
        rows == classes
    )


def test_rows_that_can_be_read_two_ways_must_be_told(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "hubert", rows=77)
    with pytest.raises(
        ValueError, match="77 label embeddings: K = 77, or K = 73 .* --num-classes 77 or --num-classes 73"
    ):
        run_of(source, tmp_path / "run")
    with pytest.raises(ValueError, match="--num-classes 50 would be 50 or 54"):
        run_of(source, tmp_path / "run", num_classes=50)
    for classes in (77, 73):
        run_of(source, tmp_path / f"{classes}", num_classes=classes)
        assert len(weights(tmp_path / f"{classes}")["class_embeddings"]) == classes
    with pytest.raises(ValueError, match="--num-classes is for fairseq's HuBERT"):
        run_of(checkpoint(tmp_path, "wav2vec2"), tmp_path / "run", num_classes=77)


@pytest.mark.parametrize("held", ["list", "dict", "single"])
def test_the_checkpoints_own_dictionary_says_which_row_is_which_class(
    held: str, tmp_path: Path, fairseq: "Fairseq"
) -> None:
    """A dictionary that was sorted by frequency has its labels in another order; padding words stand behind
    them."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "2", "0", "1", "madeupword0000"]
    state = torch.load(checkpoint(tmp_path, "hubert", rows=8))
    with fairseq.installed():
        own = fairseq.dictionary(words)
        forms = {
            "list": {"dictionaries": [own]},
            "dict": {"dictionaries": {"km": own}},
            "single": {"target_dictionary": own},
        }
        save(tmp_path / "with.pt", {**state, "task_state": forms[held]})
    theirs = fairseq_weights("hubert", rows=8)["label_embs_concat"]
    run_of(tmp_path / "with.pt", tmp_path / "run")
    assert torch.equal(weights(tmp_path / "run")["class_embeddings"], theirs[[5, 6, 4]])
    with pytest.raises(ValueError, match="--num-classes 8, but its dictionary has 3 numbers"):
        run_of(tmp_path / "with.pt", tmp_path / "other", num_classes=8)


# Round trips


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("objective", ["wav2vec2", "hubert", None])
@pytest.mark.parametrize("form", ["huggingface", "fairseq", "torchaudio"])
def test_import_export_import_is_bit_identical(
    form: Format, objective: str | None, large: bool, tmp_path: Path
) -> None:
    run_of(checkpoint(tmp_path, objective, large=large), tmp_path / "0")
    options = {"num_heads": 4} if form == "torchaudio" else {}
    # torchaudio has no such heads and no mask embedding: the second round counts
    if form == "torchaudio" and objective != "hubert":
        assert export_weights(tmp_path / "0", tmp_path / "first", form)["heads"] is False
        run_of(tmp_path / "first", tmp_path / "1", **options)
        kept = {name for name in weights(tmp_path / "0") if name.startswith("encoder.")} - {
            "encoder.mask_embedding"
        }
        assert all(torch.equal(weights(tmp_path / "0")[name], weights(tmp_path / "1")[name]) for name in kept)
        (tmp_path / "0").rename(tmp_path / "source")
        (tmp_path / "1").rename(tmp_path / "0")
    export_weights(tmp_path / "0", tmp_path / "out", form)
    summary = run_of(tmp_path / "out", tmp_path / "2", **options)
    assert weights_hash(tmp_path / "2") == weights_hash(tmp_path / "0")
    before, after = (read_meta(tmp_path / name)["config"] for name in ("0", "2"))
    silent = {"feature_gradient_scale"} if form == "huggingface" else set()
    if form == "torchaudio":  # such a file holds no config
        silent = {"feature_gradient_scale", "layer_drop"} | {
            name for name in before["encoder"] if "dropout" in name
        }
    assert {key: value for key, value in after["encoder"].items() if key not in silent} == {
        key: value for key, value in before["encoder"].items() if key not in silent
    }
    assert summary["heads"] == (
        objective is not None and not (form == "torchaudio" and objective == "wav2vec2")
    )
    if form == "fairseq" and objective:
        assert after[objective] == before[objective]
    if form == "huggingface" and objective == "wav2vec2":
        assert after[objective]["feature_dropout"] == before[objective]["feature_dropout"] == 0.05


def test_an_exported_fairseq_checkpoint_has_what_fairseqs_loader_reads(tmp_path: Path) -> None:
    run_of(checkpoint(tmp_path, "hubert"), tmp_path / "run")
    summary = export_weights(tmp_path / "run", tmp_path / "out.pt", "fairseq")
    assert any("dict.km.txt" in note for note in summary["notes"])
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    theirs = fairseq_weights("hubert")
    assert {name: tensor.shape for name, tensor in state["model"].items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert all(
        torch.equal(tensor, theirs[name])
        for name, tensor in state["model"].items()
        if name != "label_embs_concat"
    )
    assert torch.equal(state["model"]["label_embs_concat"][4:], theirs["label_embs_concat"][4:])
    # of length other than 0, where a cosine has no gradient
    specials = state["model"]["label_embs_concat"][:4]
    assert (specials.norm(dim=1) > 0).all()
    assert {"args", "cfg", "model", "optimizer_history", "extra_state"} <= state.keys()
    assert {"criterion_name", "optimizer_name", "lr_scheduler_state", "num_updates"} <= state[
        "optimizer_history"
    ][0].keys()
    model, task = state["cfg"]["model"], state["cfg"]["task"]
    assert (model["_name"], model["label_rate"], model["encoder_layers"], task["_name"]) == (
        "hubert",
        50,
        2,
        "hubert_pretraining",
    )
    assert eval(model["conv_feature_layers"]) == eval(STACK)  # as fairseq reads it


# What an imported run is


def test_an_imported_model_is_a_finished_run(tmp_path: Path) -> None:

    source = checkpoint(tmp_path, "hubert")
    run_of(source, tmp_path / "run")
    meta = read_meta(tmp_path / "run", "encoder")
    assert meta["source"] == {"format": "fairseq", "name": "hubert.pt", "sha256": sha256_file(source)}
    assert (meta["objective"], meta["heads"], meta["parents"]) == (
        "hubert",
        True,
        {"source": sha256_file(source)[:16]},
    )
    assert main(["check", str(tmp_path / "run")]) == 0
    encoder, fingerprint = load_encoder(tmp_path / "run")
    assert fingerprint == weights_hash(tmp_path / "run")[:16]
    assert encoder.extract(torch.randn(1, 4000), torch.tensor([4000]), 2).shape == (1, 12, WIDTH)
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        run_of(source, tmp_path / "run")


def test_a_state_dict_without_a_config_is_inferred_and_what_does_not_show_is_said(tmp_path: Path) -> None:
    run_of(checkpoint(tmp_path, None, large=True), tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "out.pth", "torchaudio")
    with pytest.raises(ValueError, match="attention heads does not show in the weights; say --num-heads N"):
        run_of(tmp_path / "out.pth", tmp_path / "never")
    with pytest.raises(ValueError, match="dim 64 is not a multiple of num_heads 5"):
        run_of(tmp_path / "out.pth", tmp_path / "never", num_heads=5)
    summary = run_of(tmp_path / "out.pth", tmp_path / "inferred", num_heads=4)
    assert summary["normalize_waveform"] is True
    for told in (
        "inferred 2 layers of width 64, 4 heads, pre-norm",
        "waveforms are normalised",
        "no mask embedding",
        "alone",
    ):
        assert told in "\n".join(summary["notes"])
    summary = run_of(tmp_path / "out.pth", tmp_path / "given", num_heads=4, normalize_waveform=False)
    assert summary["normalize_waveform"] is False and "normalised" not in "\n".join(summary["notes"])
    bare = save(tmp_path / "bare.pt", fairseq_weights("hubert"))  # fairseq's names without its settings
    assert run_of(bare, tmp_path / "bare", num_heads=4)["heads"]


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    cfg = {"model": fairseq_model(), "task": {}}
    half = {name: tensor.half() for name, tensor in fairseq_weights(None).items()}
    summary = run_of(save(tmp_path / "half.pt", {"cfg": cfg, "model": half}), tmp_path / "run")
    assert any("float16 became float32" in note for note in summary["notes"])
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


# Refusals


class Malice:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_code_is_refused_and_runs_none(legacy: bool, tmp_path: Path) -> None:
    state = {
        "cfg": {"model": fairseq_model(), "task": {}},
        "model": fairseq_weights(None),
        "extra": Malice(tmp_path / "made"),
    }
    torch.save(state, tmp_path / "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"can run code, so it is refused"):
        run_of(tmp_path / "bad.pt", tmp_path / "run")
    assert not (tmp_path / "made").exists() and not (tmp_path / "run").exists()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "wav2vec2"}')
    (tmp_path / "bad.pt").rename(tmp_path / "folder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is refused") as refusal:
        run_of(tmp_path / "folder", tmp_path / "run")
    assert not (tmp_path / "made").exists()
    assert "OUT" not in str(refusal.value)  # what is printed makes the file that is read instead
    exec(str(refusal.value)[str(refusal.value).index("import torch") :], {})
    assert (tmp_path / "folder" / "model.safetensors").is_file()
    torch.load(tmp_path / "folder" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "made").exists()  # the file was what it is taken for


def test_a_pickle_is_read_only_where_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path, None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "wav2vec2"}')
    save(tmp_path / "folder" / "pytorch_model.bin", fairseq_weights(None))
    for version, hole in (("2.9.1+cpu", True), ("2.10.0", False), ("3.0.0a1", False)):
        monkeypatch.setattr(torch, "__version__", version)
        for path, file in (
            (source, source),
            (tmp_path / "folder", tmp_path / "folder" / "pytorch_model.bin"),
        ):
            with pytest.raises(
                ValueError, match=rf"{file}: is a pickle.* can run code.* say --allow-pickle"
            ) as refusal:
                run_of(path, tmp_path / "run", allow_pickle=False)
            assert ("CVE-2026-24747" in str(refusal.value)) == hole
        notes = run_of(source, tmp_path / version)["notes"]
        assert any("CVE-2026-24747" in note and "safetensors" in note for note in notes) == hole
    assert not (tmp_path / "run").exists()


class Fairseq:
    """Classes with the names of fairseq's, which can be imported while it is `installed` alone."""

    def __init__(self) -> None:
        self.modules = {
            name: ModuleType(name)
            for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary", "fairseq.meters")
        }
        for module, name in (("fairseq.data.dictionary", "Dictionary"), ("fairseq.meters", "Meter")):
            setattr(self.modules[module], name, type(name, (), {"__module__": module}))

    def installed(self) -> Any:
        return patch.dict(sys.modules, self.modules)

    def dictionary(self, words: list[str]) -> Any:
        made = self.modules["fairseq.data.dictionary"].Dictionary()
        made.symbols = words
        return made


@pytest.fixture
def fairseq() -> Fairseq:
    return Fairseq()


@pytest.mark.parametrize("held", ["dict", "single"])
def test_the_remedy_that_is_printed_works(held: str, tmp_path: Path, fairseq: Fairseq) -> None:
    state = torch.load(checkpoint(tmp_path, "hubert", rows=7))
    args = argparse.Namespace(
        arch="hubert", meter=fairseq.modules["fairseq.meters"].Meter(), **state["cfg"]["model"]
    )
    words = ["<s>", "<pad>", "</s>", "<unk>", "1", "0", "2"]
    with fairseq.installed():
        own = fairseq.dictionary(words)
        dictionaries = {"dict": {"pt_dictionaries": {"km": own}}, "single": {"target_dictionary": own}}
        save(tmp_path / "with.pt", {**state, "args": args, "cfg": None, "task_state": dictionaries[held]})
    with pytest.raises(ValueError, match=r"holds an object of fairseq\.meters\.Meter") as refusal:
        run_of(tmp_path / "with.pt", tmp_path / "run")
    lines = re.search(
        r"\n\n(import json, torch\n.*)\n\nthen: wordless import (\S+) OUT", str(refusal.value), re.DOTALL
    )
    assert lines is not None
    with fairseq.installed():
        exec(lines[1], {})
    run_of(Path(lines[2]), tmp_path / "run")
    theirs = fairseq_weights("hubert", rows=7)["label_embs_concat"]
    assert torch.equal(weights(tmp_path / "run")["class_embeddings"], theirs[[5, 4, 6]])


def test_wrong_tensors_are_named_with_the_nearest_right_name(tmp_path: Path) -> None:
    theirs = fairseq_weights(None)
    theirs["encoder.layers.0.fc1.wieght"] = theirs.pop("encoder.layers.0.fc1.weight")
    theirs["encoder.layers.1.fc2.bias"] = torch.zeros(3)
    del theirs["layer_norm.bias"]
    source = save(tmp_path / "w.pt", {"cfg": {"model": fairseq_model(), "task": {}}, "model": theirs})
    with pytest.raises(ValueError) as refusal:
        run_of(source, tmp_path / "run")
    for line in (
        f"{source}: missing: encoder.layers.0.fc1.weight (there is 'encoder.layers.0.fc1.wieght')",
        f"{source}: missing: layer_norm.bias",
        f"{source}: not expected: encoder.layers.0.fc1.wieght (the nearest known name is "
        "'encoder.layers.0.fc1.weight')",
        f"{source}: encoder.layers.1.fc2.bias: is (3,); (64,) is expected",
    ):
        assert line in str(refusal.value).splitlines()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_feature_layers": "[(32,10,5)] + [(32,8,4)] * 6"}, "only kernels"),
        ({"conv_feature_layers": "[(32,10,5)] + [(16,3,2)] * 4 + [(32,2,2)] * 2"}, "only kernels"),
        ({"conv_feature_layers": "__import__('os').mkdir('made')"}, "not a list of"),
        ({"conv_feature_layers": "[(32,10,5)] * 999999999"}, "not a list of"),
        ({"latent_temp": "(2, 0.5"}, "latent_temp = '\\(2, 0.5': three numbers"),
        ({"layer_type": "conformer"}, "another kind of layer"),
        ({"pos_conv_depth": 5}, "several positional convolutions"),
        ({"activation_fn": "relu"}, "another activation"),
        ({"conv_bias": True}, "conv_bias with a group norm"),
        ({"encoder_attention_heads": 5}, "dim 64 is not a multiple of num_heads 5"),
        ({"encoder_layers": 3}, "missing: encoder.layers.2"),
    ],
)
def test_settings_that_we_have_no_encoder_for_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    quantized = "wav2vec2" if "latent_temp" in changes else None
    state = {
        "cfg": {"model": fairseq_model(**{**QUANTIZED, **changes}), "task": {}},
        "model": fairseq_weights(quantized),
    }
    with pytest.raises(ValueError, match=message):
        run_of(save(tmp_path / "w.pt", state), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not Path("made").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.layers.0.self_attn.grep_linear.weight", "WavLM"),
        ("encoder.layers.0.conv_module.depthwise_conv.weight", "Conformer"),
        ("encoder.pos_conv.0.running_mean", "batch norm"),
        ("encoder.layers.0.adapter.up.weight", "adapters"),
        ("encoder.pos_conv.1.0.weight", "data2vec"),
    ],
)
def test_a_name_that_is_a_sign_of_another_architecture_is_refused_by_its_name(
    name: str, message: str, tmp_path: Path
) -> None:
    model = {**fairseq_weights(None), name: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"{message}.* not supported"):
        run_of(save(tmp_path / "w.pt", {"model": model}), tmp_path / "run")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello weights")
    (tmp_path / "page.pt").write_text("<html>")
    (tmp_path / "zero.pt").touch()
    (tmp_path / "cut.pt").write_bytes(checkpoint(tmp_path, None).read_bytes()[:5000])
    (tmp_path / "old.pt").write_bytes(b"\x80\x02")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "none.pt", "no such file or folder; nothing is downloaded here"),
        (tmp_path / "text.pt", "text.pt: not a file that torch can load; it begins with b'hello weights'"),
        (tmp_path / "page.pt", "page.pt: not a file that torch can load; it begins with b'<html>'"),
        (tmp_path / "zero.pt", r"zero.pt: is empty \(0 bytes\)"),
        (tmp_path / "cut.pt", r"cut.pt: not a file that torch can load \("),
        (tmp_path / "old.pt", r"old.pt: not a file that torch can load \(pickle exhausted"),
        (tmp_path / "empty", "config.json: no such file"),
        (save(tmp_path / "list.pt", [1, 2]), "holds a list"),
        (
            save(tmp_path / "other.pt", {"weights": 3}),
            "neither a fairseq checkpoint .* it has the keys 'weights'",
        ),
        (
            save(tmp_path / "linear.pth", torch.nn.Linear(2, 2).state_dict()),
            "not a wav2vec 2.0 or HuBERT state dict",
        ),
        (
            save(tmp_path / "hf.pth", {"wav2vec2.encoder.layers.0.x": torch.zeros(1)}),
            "give the folder that holds them",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_of(source, tmp_path / "run")
    run_of(checkpoint(tmp_path, None), tmp_path / "run")
    with pytest.raises(ValueError, match="is an artefact of wordless"):
        run_of(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors.index.json", b"{}", "index.json: no `weight_map`"),
        ("model.safetensors.index.json", b'{"weight_map": ["a"]}', "index.json: no `weight_map`"),
        ("model.safetensors", b"x", "model.safetensors: not a whole safetensors file"),
        ("pretraining_heads.safetensors", b"", "pretraining_heads.safetensors: not a whole safetensors file"),
        ("pytorch_model.bin", None, "pytorch_model.bin: holds a list"),
    ],
)
def test_a_bad_file_in_a_folder_of_transformers_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    run_of(checkpoint(tmp_path, None), tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "out", "huggingface")
    if name.startswith("pytorch"):
        (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / name).write_bytes(content or b"")
    if content is None:
        save(tmp_path / "out" / name, [torch.zeros(1)])
    with pytest.raises(ValueError, match=message):
        run_of(tmp_path / "out", tmp_path / "again")


def test_a_run_is_not_made_where_a_file_is(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, None)
    for out in (source, source / "run"):
        with pytest.raises(ValueError, match=rf"{source}: is a file; give another name"):
            run_of(source, out)


def test_an_export_to_torchaudio_says_what_its_file_cannot(tmp_path: Path) -> None:
    run_of(checkpoint(tmp_path, None), tmp_path / "run", normalize_waveform=True)
    notes = export_weights(tmp_path / "run", tmp_path / "out.pth", "torchaudio")["notes"]
    assert any("needs --num-heads 4 --normalize-waveform" in note for note in notes)
    run_of(checkpoint(tmp_path, None), tmp_path / "usual")
    notes = export_weights(tmp_path / "usual", tmp_path / "usual.pth", "torchaudio")["notes"]
    assert any(note.endswith("needs --num-heads 4") for note in notes)


def test_an_export_never_writes_over_anything(tmp_path: Path) -> None:
    run_of(checkpoint(tmp_path, None), tmp_path / "run")
    forms: tuple[Format, ...] = ("huggingface", "fairseq", "torchaudio")
    for form in forms:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(ValueError, match="is there already"):
            export_weights(tmp_path / "run", tmp_path / "out", form)
        assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_weights(tmp_path / "nothing", tmp_path / "new", "fairseq")
    assert {path.name for path in tmp_path.iterdir()} == {"None.pt", "run", "out"}


def test_a_model_that_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    from pretrain.model.config import EncoderConfig
    from pretrain.model.encoder import Encoder
    from pretrain.training.checkpoint import save_checkpoint

    for name, changes, form, message in (
        ("filterbank", {"architecture": "tiny"}, "huggingface", "only waveform encoders do"),
        (
            "mixed",
            {"architecture": "tiny", "front_end": "waveform", "norm_first": False},
            "torchaudio",
            "conv_norm = 'layer' with",
        ),
        (
            "square",
            {"architecture": "tiny", "front_end": "waveform", "conv_dim": 64},
            "fairseq",
            "conv_dim equals dim",
        ),
    ):
        config = EncoderConfig(**changes)
        model = torch.nn.ModuleDict({"encoder": Encoder(config)})
        state = {"kind": "encoder", "extra": {}, "config": {"encoder": config.resolved()}}
        save_checkpoint(tmp_path / name, 0, model, torch.optim.AdamW(model.parameters()), state)
        with pytest.raises(ValueError, match=message):
            export_weights(tmp_path / name, tmp_path / "out", form)
        assert not (tmp_path / "out").exists()
