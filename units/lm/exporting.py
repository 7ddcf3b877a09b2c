"""A unit language model as a folder that `transformers.AutoModelForCausalLM.from_pretrained`, and so vLLM,
loads without our code.

The class is the one whose arithmetic the model has: Llama (with biases on queries, keys and values it has one
on the output, too, written as zeros), Mistral with a sliding window, Qwen2 with both. The tokenizer writes
units as `<Un0> …`; `wordless.json` says what they are: codebook, frame rate, deduplicated or not.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pretrain.store.artefact import library_versions
from pretrain.store.disk import atomic_folder, write_json
from units.corpus.bpe import BOS, EOS, tokenizer
from units.lm.language_model import LoadedLM, load_language_model
from units.lm.model import DecoderConfig


def export_language_model(run: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the weights of `run`, the best that it kept or the newest, as the folder `out`.

    Returns what was written: class, parameters, tokens, fingerprints.

    Errors: ValueError when `out` exists, `run` is no unit language model, or no class of transformers
    computes what it does (several streams of symbols; a size that a class does not take).
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already; remove it or choose another name")
    lm = load_language_model(run, device="cpu")
    if lm.pattern.num_streams > 1:
        raise ValueError(
            f"{run}: its pattern {lm.pattern.name!r} reads and predicts {lm.pattern.num_streams} symbols at "
            "each step, and no causal "
            'language model of transformers does; train one with pattern = "flatten" or "coarse-first", '
            "which have one stream"
        )
    try:
        config = transformers_config(lm.decoder.config, lm.decoder.vocabulary_size)
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None
    bos, eos = int(lm.pattern.bos[0]), lm.pattern.eos
    # In coarse-first order EOS ends level 0 and the other levels follow: transformers must not stop there.
    stop = None if lm.pattern.name == "coarse-first" and lm.pattern.num_levels > 1 else eos
    tensors = {
        name if name.startswith("lm_head.") else f"model.{name}": weight.contiguous()
        for name, weight in lm.decoder.state_dict().items()
    }
    if config.get("attention_bias"):
        for number in range(lm.decoder.config.num_layers):
            tensors[f"model.layers.{number}.self_attn.o_proj.bias"] = torch.zeros(lm.decoder.config.dim)
    ends = {"bos_token_id": bos, "eos_token_id": stop}
    with atomic_folder(out) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(folder, lm)
        write_json(folder / "generation_config.json", {**ends, "pad_token_id": eos})
        write_json(folder / "config.json", {**config, **ends})
        write_json(folder / "wordless.json", _origin(lm))
    notes = []
    if config["model_type"] == "qwen2":
        notes.append(
            "transformers 5 gives every Qwen2 the tokenizer of its text models: load this one's with "
            "PreTrainedTokenizerFast.from_pretrained instead of AutoTokenizer"
        )
    return {
        "architecture": config["architectures"][0],
        "num_parameters": sum(weight.numel() for weight in tensors.values()),
        "num_tokens": lm.decoder.vocabulary_size,
        "codebook": lm.meta["codebook"],
        "lm": lm.fingerprint,
        "notes": notes,
    }


def _write_tokenizer(folder: Path, lm: LoadedLM) -> None:
    tokenizer(lm.vocabulary, lm.pattern).save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS}
    write_json(folder / "special_tokens_map.json", special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": lm.decoder.config.context,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)


def _origin(lm: LoadedLM) -> dict[str, Any]:
    """What the symbols are, and where the weights come from."""
    kept = ("codebook", "corpus", "deduplicated", "frame_rate_hz")
    return {
        **{key: lm.meta.get(key) for key in kept},
        "pattern": lm.pattern.name,
        "vocabulary": lm.vocabulary.model_dump(mode="json"),
        "lm": lm.fingerprint,
        "versions": library_versions(),
    }


def transformers_config(config: DecoderConfig, vocabulary_size: int) -> dict[str, Any]:
    """`config.json` of the class that computes what a decoder of `config` does, without the ids of special
    tokens.

    The rotation is written as every version of transformers and vLLM reads it: `rope_theta` and
    `rope_scaling`.
    """
    if config.dim % config.num_heads:
        raise ValueError(
            f"dim {config.dim} is no multiple of num_heads {config.num_heads}, which transformers' classes "
            "want"
        )
    tree: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if config.rope_scaling is not None:
        tree["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling.model_dump()}
    if config.qkv_bias and config.sliding_window is not None:
        if config.attention_dim not in (None, config.dim):
            raise ValueError(
                f"qkv_bias and sliding_window with attention_dim {config.attention_dim} other than dim "
                f"{config.dim}: Qwen2, the class with both, has no head_dim of its own"
            )
        # The layers from max_window_layers on have the window.
        window = {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": 0}
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **tree, **window}
    tree["head_dim"] = config.head_dim
    if config.sliding_window is not None:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            **tree,
            "sliding_window": config.sliding_window,
        }
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": False}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **tree, **biases}
