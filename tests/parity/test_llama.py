"""Our decoder and its export against transformers: the same logits, the same greedy continuation, the
tokenizer's ids."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here is to be looked up

import numpy as np
import pytest
import torch

from pretrain.training.task import TrainingConfig
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.patterns import Pattern
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.exporting import export_language_model, transformers_config
from units.lm.language_model import load_language_model
from units.lm.model import Decoder, DecoderConfig, RopeScaling
from units.lm.training import TrainLMConfig, train_lm

transformers = pytest.importorskip("transformers")

BASE = DecoderConfig(
    dim=48, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=80, context=64, rope_theta=500.0
)
LLAMA3 = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=24)


def planted(folder: Path, levels: int = 1) -> UnitCorpus:
    """Twelve units in a cycle, now and then another."""
    rng = np.random.default_rng(0)
    units = (
        np.arange(30)[:, None]
        + np.arange(levels)
        + rng.integers(0, 12, (20, 1, levels)) * (rng.random((20, 30, levels)) < 0.1)
    ) % 12
    documents = (
        Document(str(number), "train", row if levels > 1 else row[:, 0])
        for number, row in enumerate(units.astype(np.uint16))
    )
    vocabulary = Vocabulary(num_units=12, num_levels=levels)
    write_corpus(
        folder,
        documents,
        {},
        {},
        vocabulary=vocabulary,
        codebook="c0de",
        frame_rate_hz=50.0,
        deduplicated=False,
        timed=False,
    )
    return UnitCorpus(folder)


def shaken(config: DecoderConfig, vocabulary_size: int) -> Decoder:
    """Far from the initial values, so that every part counts."""
    torch.manual_seed(0)
    ours = Decoder(config, vocabulary_size).eval()
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return ours


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_embeddings": True},
        {"tied_embeddings": False},
        {"attention_dim": 96},
        {"rope_scaling": LLAMA3},
        {"sliding_window": 5},
        {"qkv_bias": True},
        {"qkv_bias": True, "sliding_window": 5},
    ],
)
def test_logits_equal_those_of_the_class_of_transformers(changes: dict[str, Any]) -> None:
    config = BASE.model_copy(update=changes)
    ours, tree = shaken(config, 23), transformers_config(config, 23)
    theirs = getattr(transformers, tree["architectures"][0])(transformers.AutoConfig.for_model(**tree)).eval()
    renamed = {
        name if name.startswith("lm_head") else f"model.{name}": weight
        for name, weight in ours.state_dict().items()
    }
    if tree.get("attention_bias"):
        renamed |= {f"model.layers.{number}.self_attn.o_proj.bias": torch.zeros(48) for number in range(3)}
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tied_embeddings else [])
    theirs.tie_weights()
    tokens = torch.randint(23, (2, 40))
    with torch.no_grad():
        mine, reference = ours(tokens, torch.arange(40).expand(2, -1)), theirs(tokens).logits
    # float32, the same operations in another order
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False, "sliding_window": 6},
        {"qkv_bias": True},
        {"qkv_bias": True, "sliding_window": 6},
        {"rope_scaling": LLAMA3},
    ],
)
def test_an_exported_folder_is_a_model_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    config = BASE.model_copy(update=changes)
    training = TrainingConfig(max_steps=8, device="cpu")
    train_lm(
        TrainLMConfig(
            corpus=str(planted(tmp_path / "units").folder), out=str(run), model=config, training=training
        )
    )
    notes = export_language_model(run, out)["notes"]
    lm = load_language_model(run, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    # transformers overrules what the folder of a Qwen2 says, and the export says so
    loader = transformers.PreTrainedTokenizerFast if notes else transformers.AutoTokenizer
    assert bool(notes) == (changes == {"qkv_bias": True, "sliding_window": 6})
    tokenizer = loader.from_pretrained(out)

    ids = tokenizer("<Un3><Un1>")["input_ids"]
    assert ids == [int(lm.pattern.bos[0]), 3, 1] == lm.pattern.arrange(np.array([3, 1])).tolist()[:-1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (lm.pattern.bos[0], lm.pattern.eos)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<Un3><Un1>"

    tokens = torch.randint(lm.decoder.vocabulary_size, (2, 30))
    with torch.no_grad():
        mine, reference = lm.decoder(tokens, torch.arange(30).expand(2, -1)), theirs(tokens).logits
    torch.testing.assert_close(
        mine, reference, rtol=1e-5, atol=1e-5
    )  # float32, the same operations in another order

    continued = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()
    greedy = list(ids)
    with torch.no_grad():
        while len(greedy) < len(ids) + 12 and greedy[-1] != lm.pattern.eos:
            greedy.append(
                int(lm.decoder(torch.tensor([greedy]), torch.arange(len(greedy))[None])[0, -1].argmax())
            )
    assert continued == greedy


def test_levels_in_one_stream_leave_as_a_llama_and_in_several_do_not(tmp_path: Path) -> None:
    corpus = planted(tmp_path / "units", levels=2)
    for name in ("coarse-first", "flatten", "delay"):
        run, out = tmp_path / name, tmp_path / f"{name} exported"
        training = TrainingConfig(max_steps=1, device="cpu")
        train_lm(
            TrainLMConfig(
                corpus=str(corpus.folder), out=str(run), pattern=name, model=BASE, training=training
            )
        )
        if name == "delay":
            with pytest.raises(ValueError, match="pattern 'delay' reads and predicts 2 symbols at each step"):
                export_language_model(run, out)
            continue
        export_language_model(run, out)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        codes = np.array([[3, 1], [4, 2]])
        text = "<Un3:0><Un1:1><Un4:0><Un2:1>" if name == "flatten" else "<Un3:0><Un4:0></s><Un1:1><Un2:1>"
        wanted = Pattern(name, (12, 12)).arrange(codes).tolist()
        assert tokenizer(text)["input_ids"] == (wanted[:-1] if name == "flatten" else wanted)
        # In coarse-first order more comes after EOS.
        stop = transformers.GenerationConfig.from_pretrained(out).eos_token_id
        assert stop == (25 if name == "flatten" else None)
