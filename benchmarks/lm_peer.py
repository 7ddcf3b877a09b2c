"""transformers' Llama on the weights and tokens of `benchmarks/lm.py`, trained and sampled. Nothing of ours
is imported.

Ways: `sdpa` and `eager` attention; for sampling also `static`, its static cache, and below float32 `bfloat16`
and, on a CPU, `int8`, torch's dynamic quantisation of its linear layers.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.training_step import Update


def variants(job: str, device: str) -> list[str]:
    """The ways of a job, each a contender's name."""
    if job == "train":
        return ["transformers-sdpa", "transformers-eager"]
    names = ["sdpa", "eager", "static", "bfloat16", *(["int8"] if device == "cpu" else [])]
    return [f"transformers-{name}" for name in names]


def open_model(settings: dict[str, Any], folder: Path, way: str) -> nn.Module:
    """`LlamaForCausalLM` with the weights of the folder; the base of the rotation is both sides' default,
    10,000."""
    import transformers

    sizes, vocabulary = settings["sizes"], settings["classes"] + 2
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes["dim"],
        intermediate_size=sizes["ffn_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        max_position_embeddings=sizes["context"],
        rms_norm_eps=sizes["norm_eps"],
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    config._attn_implementation = "eager" if way == "eager" else "sdpa"
    model: nn.Module = transformers.LlamaForCausalLM(config)
    weights = {f"model.{name}": weight for name, weight in load_file(folder / "weights.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return model.to(settings["device"])


class Training:
    """A loop over rows of tokens: loss, backward, clipping, fused AdamW. There is no padding, so no attention
    mask is given."""

    def __init__(self, settings: dict[str, Any], folder: Path, way: str):
        self.settings, self.device = settings, settings["device"]
        self.model = open_model(settings, folder, way).train()
        self.update = Update(self.model, [{"params": list(self.model.parameters())}], settings)
        self.tokens = torch.from_numpy(np.load(folder / "tokens.npy"))  # (steps, rows, time + 1)
        self.amount = float(self.tokens[:, :, 1:].numel())
        self.losses: list[float] = []

    def about(self) -> dict[str, Any]:
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        for batch in self.tokens.to(self.device):
            with torch.autocast(
                self.device, torch.bfloat16, enabled=self.settings["precision"] == "bfloat16"
            ):
                logits: Tensor = self.model(batch[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            self.update(loss)
            self.losses.append(float(loss.detach()))


class Sampling:
    """`generate` with do_sample and nothing cut off, a fixed number of tokens: EOS is not drawn before."""

    def __init__(self, settings: dict[str, Any], folder: Path, way: str):
        self.settings = settings
        self.model = open_model(settings, folder, way).eval()
        if way == "bfloat16":
            self.model = self.model.bfloat16()
        if way == "int8":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is to move to torchao
                self.model = torch.ao.quantization.quantize_dynamic(
                    self.model, {nn.Linear}, dtype=torch.qint8
                )
        self.cache = {"cache_implementation": "static"} if way == "static" else {}
        # (batch, prompt), BOS first
        self.prompts = torch.from_numpy(np.load(folder / "prompts.npy")).to(settings["device"])
        self.amount = float(len(self.prompts) * settings["new_tokens"])
        self.made = 0

    def about(self) -> dict[str, Any]:
        return {"dtype": str(self.model.dtype)}

    def prepare(self, number: int) -> None:
        torch.manual_seed(number)

    def run(self) -> None:
        count: int = self.settings["new_tokens"]
        made: Tensor = self.model.generate(  # type: ignore[operator]
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=count,
            min_new_tokens=count,
            **self.cache,
        )
        self.made = made.shape[1] - self.prompts.shape[1]
        assert self.made == count
