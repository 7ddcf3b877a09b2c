"""A unit language model beside transformers' Llama: tokens per second in training, and sampled alone and in a batch.

Both sides have the same weights, a Llama of 26 M parameters by default, and the same tokens, drawn from a Markov source. Training is
loss, backward, clipping and fused AdamW on rows of 1,024 tokens; ours is the product's model, batch and loss. Sampling is what
`sample` runs, a prompt read and a fixed number of tokens drawn; ours in `--precision`, int8 by default on a CPU, the peer in every
precision that it has. What a lower precision costs is measured on a model of this size that has learned the source a little.
"""

import argparse
import hashlib
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import lm_peer
from benchmarks.command import add_model_arguments, argument_parser, run_main
from benchmarks.measure import Contender, ask, contest, say

JOBS = ("train", "sample", "sample-batch")
UNIT = "tokens per second"
SUCCESSORS = 8  # of each symbol of the source


class OursTraining:
    """`LanguageModel` on the batches that `Pieces` makes; the update is the benchmark's own, the same code for everybody."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        from benchmarks.training_peers import Update
        from pretrain.training.memory import keep_freed_memory
        from units.corpus.patterns import Pattern
        from units.corpus.unit_corpus import ListedSequences
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
        from units.lm.generation import CompactDecoder
        from units.lm.sampling import Rules, generate

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
        from units.corpus.unit_corpus import ListedSequences
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
        self.perplexity = float(
            np.exp(-(self.probabilities * np.log(self.probabilities)).sum(1).mean())
        )  # about: states alike

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


class WithInputs:
    """A contender that says which weights and tokens it was given."""

    def __init__(self, contender: Contender, folder: Path):
        self.contender, self.amount, self.run, self.prepare = (
            contender,
            contender.amount,
            contender.run,
            contender.prepare,
        )
        names = ("weights.safetensors", "tokens.npy", "prompts.npy")
        self.digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()

    def about(self) -> dict[str, Any]:
        return {"inputs_sha256": self.digest, **self.contender.about()}


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """The contender of a name."""
    training = settings["job"] == "train"
    if name in ("bandwidth", "quality"):
        return Bandwidth(settings, folder) if name == "bandwidth" else Quality(settings, folder)
    if name == "ours":
        return WithInputs(
            OursTraining(settings, folder) if training else OursSampling(settings, folder), folder
        )
    way = name.partition("-")[2]
    return WithInputs(
        lm_peer.Training(settings, folder, way) if training else lm_peer.Sampling(settings, folder, way),
        folder,
    )


def write_inputs(folder: Path, settings: dict[str, Any]) -> None:
    """Weights, training tokens (steps, rows, time + 1) and prompts (batch, prompt), all of them drawn from the seed."""
    from units.lm.model import Decoder, DecoderConfig

    torch.manual_seed(settings["seed"])
    decoder = Decoder(DecoderConfig.model_validate(settings["sizes"], strict=False), settings["classes"] + 2)
    save_file(dict(decoder.state_dict()), folder / "weights.safetensors")
    rng, source = np.random.default_rng(settings["seed"]), Source(settings["classes"], settings["seed"])
    tokens = source.sequences(rng, settings["steps"] * settings["rows"], settings["tokens"] + 1)
    np.save(folder / "tokens.npy", tokens.reshape(settings["steps"], settings["rows"], -1))
    np.save(folder / "prompts.npy", source.sequences(rng, settings["batch"], settings["prompt_tokens"] + 1))


def matrix_weights(settings: dict[str, Any]) -> float:
    """Weights that every token is multiplied with: the layers' and the head's."""
    sizes = settings["sizes"]
    keys = sizes["dim"] // sizes["num_heads"] * sizes["num_kv_heads"]
    layer = 2 * sizes["dim"] ** 2 + 2 * sizes["dim"] * keys + 3 * sizes["dim"] * sizes["ffn_dim"]
    return float(sizes["num_layers"] * layer + (settings["classes"] + 2) * sizes["dim"])


def weight_bytes(settings: dict[str, Any]) -> float:
    """What a step of ours reads of them."""
    return matrix_weights(settings) * {"float32": 4, "bfloat16": 2, "int8": 1}[settings["precision"]]


def flops_per_token(settings: dict[str, Any]) -> float:
    """2 a multiply-add of products and of attention over what has been read so far on average; three times that in training."""
    sizes, training = settings["sizes"], settings["job"] == "train"
    seen = settings["tokens"] / 2 if training else settings["prompt_tokens"] + settings["new_tokens"] / 2
    return (2 * matrix_weights(settings) + 4 * sizes["num_layers"] * sizes["dim"] * seen) * (
        3 if training else 1
    )


def memory_limit(settings: dict[str, Any], gb_per_second: float) -> float:
    """Tokens per second if a step did nothing but read the weights once and each row's keys and values as `CompactDecoder` keeps them."""
    sizes = settings["sizes"]
    seen = settings["prompt_tokens"] + settings["new_tokens"] / 2
    kept = 2 * sizes["num_layers"] * sizes["dim"] // sizes["num_heads"] * sizes["num_kv_heads"] * seen
    kept *= 2 if settings["device"] == "cuda" and settings["precision"] == "bfloat16" else 4
    return settings["batch"] * gb_per_second * 1e9 / (weight_bytes(settings) + settings["batch"] * kept)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every job asked for; of several, the first job's figures stand at the top and all of them under `jobs`."""
    from units.lm.model import DecoderConfig

    sizes = DecoderConfig(
        dim=arguments.dim,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads or arguments.heads,
        ffn_dim=arguments.ffn_dim,
        context=max(arguments.tokens, arguments.prompt_tokens + arguments.new_tokens),
        dropout=0.0,
    )
    for name in ("steps", "rows", "tokens", "prompt_tokens", "new_tokens", "batch"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1 is needed")
    sampling = arguments.precision or ("int8" if arguments.device == "cpu" else "bfloat16")
    if sampling == "int8" and arguments.device != "cpu":
        raise ValueError("--precision int8: runs on a CPU; use bfloat16")
    given = "classes steps rows tokens prompt_tokens new_tokens device threads rounds warmup seed peak_tflops quality_steps".split()
    common = {name: getattr(arguments, name) for name in given} | {
        "sizes": sizes.resolved(),
        "clip_norm": 1.0,
        "gemm_size": arguments.gemm_size,
    }
    jobs: dict[str, dict[str, Any]] = {}
    for job in JOBS if arguments.job == "all" else (arguments.job,):
        precision = arguments.train_precision if job == "train" else sampling
        settings = {
            **common,
            "job": job,
            "precision": precision,
            "batch": 1 if job == "sample" else arguments.batch,
        }
        judged = jobs.get("sample", {}) if job == "sample-batch" else {}
        found = {
            name: judged[name]
            for name in ("perplexity", "perplexity_of_source", "quality_steps")
            if name in judged
        }
        jobs[job] = run_job(settings | ({"quality_steps": 0} if found else {}), arguments) | found
    first = next(iter(jobs.values()))
    return first if len(jobs) == 1 else {**first, "name": f"lm all {arguments.device}", "jobs": jobs}


def run_job(settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One job's contest, its limits, and what our precision costs."""
    job, device = settings["job"], settings["device"]
    say(f"job {job}")
    names = lm_peer.variants(job, device) if arguments.peer == "transformers" else []
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        write_inputs(folder, settings)
        result = contest(
            "benchmarks.lm",
            names,
            folder,
            settings,
            flops_per_token(settings),
            peer_python=arguments.peer_python,
            usual="transformers-sdpa" if names else None,
        )
        result["model_gflops_per_token"] = result.pop("model_gflops_per_second_of_audio")
        if job != "train":
            bandwidth = ask("benchmarks.lm", "bandwidth", folder, threads=settings["threads"])[
                "gb_per_second"
            ]
            by_memory = memory_limit(settings, bandwidth)
            by_products = (
                None if settings["precision"] == "int8" else result["limit"]
            )  # products of 8 bits are not measured
            limit = by_memory if by_products is None else min(by_memory, by_products)
            result |= {
                "memory_gb_per_second": bandwidth,
                "limit_of_memory": by_memory,
                "limit_of_products": by_products,
                "limit": limit,
                "share_of_limit": result["ours"] / limit,
                "peer_share_of_limit": result["peer"] and result["peer"] / limit,
            }
            if settings["quality_steps"] and settings["precision"] != "float32":
                result |= ask("benchmarks.lm", "quality", folder, threads=settings["threads"])
    return {"name": f"lm {job} {settings['precision']} {device}", "unit": UNIT, **result}


def show(result: dict[str, Any]) -> str:
    """For people."""
    return "\n\n".join(_show_job(job) for job in result.get("jobs", {"": result}).values())


def _show_job(result: dict[str, Any]) -> str:
    lines = [f"{result['name']}: {result['ours']:.1f} {UNIT}, {result['ours_peak_gb']:.2f} GB"]
    for which in ("", "_default", "_usual"):
        if result.get(f"peer{which}"):
            lines.append(  # noqa: PERF401
                f"  {result[f'peer_name{which}']}: {result[f'peer{which}']:.1f}, {result[f'peer_peak_gb{which}']:.2f} GB; "
                f"ours {result[f'ratio{which}']:.2f} times as fast, {result[f'memory_ratio{which}']:.2f} times less memory"
            )
    kind = (
        "memory"
        if result["limit"] == result.get("limit_of_memory")
        else f"{result['gemm_tflops']:.3f} TFLOP/s of matrix products"
    )
    lines.append(f"  limit {result['limit']:.0f} ({kind}): {100 * result['share_of_limit']:.0f} % of it")
    if "perplexity" in result:
        found = ", ".join(f"{name} {value:.4f}" for name, value in result["perplexity"].items())
        exact, quick = result["perplexity"]["float32"], result["perplexity"][result["settings"]["precision"]]
        lines.append(
            f"  perplexity {found}: {100 * math.expm1(math.log(quick / exact)):+.3f} % in {result['settings']['precision']}"
        )
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["transformers"])
    parser.add_argument("--job", choices=[*JOBS, "all"], default="all")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16", "int8"],
        help="of our sampling; int8, on a GPU bfloat16",
    )
    parser.add_argument(
        "--train-precision", choices=["float32", "bfloat16"], default="float32", help="of both sides"
    )
    for name, value, text in (
        ("dim", 512, "of the model"),
        ("layers", 8, ""),
        ("heads", 8, ""),
        ("kv-heads", 0, "0: as many as heads"),
        ("ffn-dim", 1408, ""),
        ("classes", 500, "units; BOS and EOS come in addition"),
        ("rows", 4, "of a training batch"),
        ("tokens", 1024, "of a row"),
        ("steps", 2, "of a round"),
        ("batch", 16, "of sample-batch"),
        ("prompt-tokens", 25, ""),
        ("new-tokens", 200, ""),
        ("quality-steps", 60, "before a lower precision is judged; 0: not judged"),
        ("gemm-size", 2048, "on a CPU"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text or None)
    add_model_arguments(parser)
    return run_main("benchmarks.lm", parser, given, build, compare, show)


if __name__ == "__main__":
    sys.exit(main())
