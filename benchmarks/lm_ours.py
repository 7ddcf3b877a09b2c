"""Our side of the benchmark lm: training, sampling, and what a lower precision costs."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

SUCCESSORS = 8  # of each symbol of the source


class OursTraining:
    """`LanguageModel` on the batches that `Pieces` makes; the update is the benchmark's own, the same code
    for everybody."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        from benchmarks.training_step import Update
        from pretrain.training.memory import keep_freed_memory
        from units.corpus.patterns import Pattern
        from units.corpus.sequences import ListedSequences
        from units.lm.language_model import LanguageModel, Pieces

        if settings["device"] == "cpu":
            keep_freed_memory()
        self.settings, self.device = settings, settings["device"]
        self.model = LanguageModel(open_decoder(settings, folder)).to(self.device).train()
        self.update = Update(self.model, [{"params": list(self.model.parameters())}], settings)
        tokens = np.load(folder / "tokens.npy")  # (steps, rows, time + 1)
        self.amount = float(tokens[:, :, 1:].size)
        pattern = Pattern("flatten", (settings["classes"],))
        pieces = [Pieces(ListedSequences(list(rows)), pattern, settings["tokens"]) for rows in tokens]
        self.batches = [rows.collate(np.arange(len(rows))) for rows in pieces]
        self.losses: list[float] = []

    def about(self) -> dict[str, Any]:
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        for batch in self.batches:
            moved = type(batch)(*[field.to(self.device) for field in batch])
            with torch.autocast(
                self.device, torch.bfloat16, enabled=self.settings["precision"] == "bfloat16"
            ):
                loss = self.model(moved)
            self.update(loss.total / loss.count)
            self.losses.append(float(loss.total.detach() / loss.count))


class OursSampling:
    """`generate` on a `CompactDecoder`."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        from units.corpus.patterns import Pattern
        from units.lm.continuing import Rules, generate
        from units.lm.generation import CompactDecoder

        count = settings["new_tokens"]
        self.generate = partial(generate, rules=Rules(count, count))
        self.settings = settings
        self.model = CompactDecoder(
            open_decoder(settings, folder).to(settings["device"]).eval(), settings["precision"]
        )
        self.pattern = Pattern("flatten", (settings["classes"],))
        self.prompts = list(np.load(folder / "prompts.npy")[:, 1:])
        self.amount, self.number = float(len(self.prompts) * settings["new_tokens"]), 0

    def about(self) -> dict[str, Any]:
        return {"precision": self.settings["precision"]}

    def prepare(self, number: int) -> None:
        self.number = number

    def run(self) -> None:
        seeds = [[self.number, row] for row in range(len(self.prompts))]
        made = self.generate(self.model, self.pattern, self.prompts, seeds)
        assert {len(continuation.codes) for continuation in made} == {self.settings["new_tokens"]}


class Bandwidth:
    """How fast as many bytes as the weights have are read, again and again: the other limit of sampling."""

    amount = 0.0

    def __init__(self, settings: dict[str, Any], folder: Path):
        self.settings = settings

    def about(self) -> dict[str, Any]:
        buffer = torch.ones(int(weight_bytes(self.settings)) // 4, device=self.settings["device"])
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            float(buffer.sum())
            seconds.append(time.perf_counter() - began)
        return {"gb_per_second": buffer.nbytes / sorted(seconds)[len(seconds) // 2] / 1e9}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None: ...


class Quality(Bandwidth):
    """The perplexity in every precision of a model of this size, after some steps on the source."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        self.settings, self.folder = settings, folder

    def about(self) -> dict[str, Any]:
        from units.corpus.patterns import Pattern
        from units.corpus.sequences import ListedSequences
        from units.lm.generation import CompactDecoder, perplexity
        from units.lm.language_model import LanguageModel, Pieces

        settings = self.settings
        rng, source = (
            np.random.default_rng(settings["seed"] + 1),
            Source(settings["classes"], settings["seed"]),
        )
        pattern = Pattern("flatten", (settings["classes"],))
        model = LanguageModel(open_decoder(settings, self.folder)).to(settings["device"]).train()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        for step in range(settings["quality_steps"]):
            adamw.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
            rows = ListedSequences(list(source.sequences(rng, settings["rows"], settings["tokens"] + 1)))
            pieces = Pieces(rows, pattern, settings["tokens"])
            batch = pieces.collate(np.arange(len(pieces)))
            loss = model(type(batch)(*[field.to(settings["device"]) for field in batch]))
            (loss.total / loss.count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        held_out = list(source.sequences(rng, 8, settings["tokens"] + 1))
        precisions = ["float32", "bfloat16", *(["int8"] if settings["device"] == "cpu" else [])]
        found = {}
        for precision in precisions:
            decoder = CompactDecoder(model.decoder.eval(), precision)  # type: ignore[arg-type]
            found[precision] = perplexity(*decoder.log_likelihoods(pattern, held_out))
        return {
            "perplexity": found,
            "perplexity_of_source": source.perplexity,
            "quality_steps": settings["quality_steps"],
        }


class Source:
    """Symbols each of which has a few successors, with probabilities of its own."""

    def __init__(self, classes: int, seed: int):
        rng = np.random.default_rng(seed)
        self.classes = classes
        self.successors = rng.integers(0, classes, (classes, SUCCESSORS))
        self.probabilities = rng.dirichlet(np.ones(SUCCESSORS), classes)
        # about: states alike
        self.perplexity = float(np.exp(-(self.probabilities * np.log(self.probabilities)).sum(1).mean()))

    def sequences(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """BOS and symbols, int64 (count, length)."""
        found = np.full((count, length), self.classes)
        found[:, 1] = rng.integers(0, self.classes, count)
        cumulative, uniform = self.probabilities.cumsum(1), rng.random((count, length))
        for t in range(2, length):
            before = found[:, t - 1]
            place = (cumulative[before] < uniform[:, t, None]).sum(1).clip(max=SUCCESSORS - 1)
            found[:, t] = self.successors[before, place]
        return found


def open_decoder(settings: dict[str, Any], folder: Path) -> Any:
    """Our decoder with the weights that every contender has."""
    from units.lm.model import Decoder, DecoderConfig

    decoder = Decoder(DecoderConfig.model_validate(settings["sizes"], strict=False), settings["classes"] + 2)
    decoder.load_state_dict(load_file(folder / "weights.safetensors"))
    return decoder


def matrix_weights(settings: dict[str, Any]) -> float:
    """Weights that every token is multiplied with: the layers' and the head's."""
    sizes = settings["sizes"]
    keys = sizes["dim"] // sizes["num_heads"] * sizes["num_kv_heads"]
    layer = 2 * sizes["dim"] ** 2 + 2 * sizes["dim"] * keys + 3 * sizes["dim"] * sizes["ffn_dim"]
    return float(sizes["num_layers"] * layer + (settings["classes"] + 2) * sizes["dim"])


def weight_bytes(settings: dict[str, Any]) -> float:
    """What a step of ours reads of them."""
    return matrix_weights(settings) * {"float32": 4, "bfloat16": 2, "int8": 1}[settings["precision"]]
