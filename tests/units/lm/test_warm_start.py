import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from units.lm.language_model import load_language_model
from units.lm.model import Decoder, DecoderConfig
from units.lm.warm_start import config_of, initial_decoder, warm_start

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Rotations as transformers 4 spells them; 5 reads that too, and writes what it calls `rope_parameters`.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


def checkpoint(folder: Path, kind: str, **changes: Any) -> Any:
    """A random model of transformers, saved; every weight far from its initial value, biases and norms,
    too."""
    keys = SIZES | changes
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    made = model(config(**keys)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    made.save_pretrained(folder)
    return made


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-3}),
    "llama with llama3's rotation": (
        "llama",
        {"rope_theta": 50.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama with wide heads": ("llama", {"head_dim": 16}),
    "mistral with a window": ("mistral", {"sliding_window": 7}),
    "mistral without": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2 with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kept_transformer_computes_what_it_did(name: str, tmp_path: Path) -> None:
    kind, changes = KINDS[name]
    theirs = checkpoint(tmp_path, kind, **changes)
    ours = initial_decoder(tmp_path, 40).eval()
    embedded = torch.randn(2, 30, 32)
    ours.embed = lambda tokens: embedded  # type: ignore[method-assign]
    with torch.no_grad():
        mine = ours.hidden(torch.zeros(2, 30, dtype=torch.long), torch.arange(30).expand(2, -1))
        reference = theirs.model(inputs_embeds=embedded).last_hidden_state
    # float32, the same operations in another order
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_new_with_the_spread_of_the_old_ones(tied: bool, tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, "llama", tie_word_embeddings=tied, vocab_size=900)
    with torch.no_grad():
        theirs.model.embed_tokens.weight.mul_(3)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(1)
    ours = initial_decoder(tmp_path, (400, 300))
    assert ours.config.tied_embeddings == tied and ours.vocabularies == (400, 300)
    old = theirs.model.embed_tokens.weight.std().item()
    # 22,400 draws: their deviation is within 0.5 % of its expectation in two cases of three
    assert ours.embed_tokens.weight.std().item() == pytest.approx(old, rel=0.03)
    if not tied:
        assert ours.lm_head.weight.std().item() == pytest.approx(theirs.lm_head.weight.std().item(), rel=0.03)
    assert not torch.equal(ours.embed_tokens.weight[:100], theirs.model.embed_tokens.weight[:100])


def test_shards_with_an_index_are_read(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "whole", "llama")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    states = []
    for folder in ("whole", "shards"):
        torch.manual_seed(0)
        states.append(initial_decoder(tmp_path / folder, 40).state_dict())
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_dropout_context_and_window_can_be_chosen_and_sizes_come_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama")
    chosen = DecoderConfig(dropout=0.25, context=33, sliding_window=9)
    config = initial_decoder(tmp_path, 10, chosen).config
    assert config == config_of(tmp_path).model_copy(
        update={"dropout": 0.25, "context": 33, "sliding_window": 9}
    )
    assert (config.dim, config.num_layers) == (32, 3)
    assert initial_decoder(tmp_path, 10, DecoderConfig()).config == config_of(tmp_path)


def test_a_run_over_the_same_symbols_is_kept_whole_and_over_others_without_embeddings(trained: Path) -> None:
    lm = load_language_model(trained, device="cpu")
    same, other = initial_decoder(trained, lm.pattern.vocabularies), initial_decoder(trained, 99)
    for name, weight in lm.decoder.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight)
        assert name == "embed_tokens.weight" or torch.equal(other.state_dict()[name], weight)


def edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(model_type="gpt2"), r"config.json: model_type: 'gpt2' is not supported"),
        (edit(hidden_act="gelu"), r"config.json: hidden_act: 'gelu'"),
        (edit(attention_bias=True), r"holds no layers.0.self_attn.q_proj.bias"),
        (edit(quantization_config={"bits": 4}), r"config.json: quantization_config"),
        (edit(hidden_size=None), r"config.json: hidden_size: a number is needed"),
        (
            edit(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            r"config.json: rope_parameters: rotations of type 'yarn'",
        ),
        (
            edit(rope_parameters=None, rope_scaling={"type": "llama3", "factor": 2.0}),
            r"rope_scaling.low_freq_factor: is missing",
        ),
        (edit(num_hidden_layers=4), r"holds no layers.3"),
        (edit(num_hidden_layers=2), r"layers.2.*: the decoder has no such tensor"),
        (edit(intermediate_size=50), r"mlp.*proj.weight: has shape"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors: no such file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
            r"model.safetensors: not a whole safetensors file",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            r"holds neither a Hugging Face model \(config.json\) nor a training run",
        ),
    ],
)
def test_what_cannot_be_begun_with_is_named(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, "llama")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        initial_decoder(tmp_path, 10)


def test_a_window_in_some_layers_only_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    with pytest.raises(ValueError, match="use_sliding_window: a window in some layers"):
        config_of(tmp_path)


def test_a_bias_on_the_attention_s_output_is_refused_unless_it_is_zero(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, "llama", attention_bias=True)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.o_proj.bias: the decoder has no such tensor \(3 are unknown\)"
    ):
        initial_decoder(tmp_path, 10)
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    theirs.save_pretrained(tmp_path)
    ours = initial_decoder(tmp_path, 10)
    assert torch.equal(
        ours.state_dict()["layers.2.self_attn.q_proj.bias"], theirs.model.layers[2].self_attn.q_proj.bias
    )


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: no such folder"):
        warm_start(tmp_path / "nothing", Decoder(DecoderConfig(), 5))
