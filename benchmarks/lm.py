"""A unit language model beside transformers' Llama: tokens per second in training, and sampled alone and in a
batch.

Both sides have the same weights, a Llama of 26 M parameters by default, and the same tokens, drawn from a
Markov source. Training is loss, backward, clipping and fused AdamW on rows of 1,024 tokens; ours is the
product's model, batch and loss. Sampling is what `sample` runs, a prompt read and a fixed number of tokens
drawn; ours in `--precision`, int8 by default on a CPU, the peer in every precision that it has. What a lower
precision costs is measured on a model of this size that has learned the source a little.
"""

import argparse
import hashlib
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import lm_peer
from benchmarks.command import add_model_arguments, argument_parser, run_main
from benchmarks.contest import contest
from benchmarks.lm_ours import (
    Bandwidth,
    OursSampling,
    OursTraining,
    Quality,
    Source,
    matrix_weights,
    weight_bytes,
)
from benchmarks.measure import Contender, ask, say

JOBS = ("train", "sample", "sample-batch")
UNIT = "tokens per second"


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
    """Weights, training tokens (steps, rows, time + 1) and prompts (batch, prompt), all of them drawn from
    the seed."""
    from units.lm.model import Decoder, DecoderConfig

    torch.manual_seed(settings["seed"])
    decoder = Decoder(DecoderConfig.model_validate(settings["sizes"], strict=False), settings["classes"] + 2)
    save_file(dict(decoder.state_dict()), folder / "weights.safetensors")
    rng, source = np.random.default_rng(settings["seed"]), Source(settings["classes"], settings["seed"])
    tokens = source.sequences(rng, settings["steps"] * settings["rows"], settings["tokens"] + 1)
    np.save(folder / "tokens.npy", tokens.reshape(settings["steps"], settings["rows"], -1))
    np.save(folder / "prompts.npy", source.sequences(rng, settings["batch"], settings["prompt_tokens"] + 1))


def flops_per_token(settings: dict[str, Any]) -> float:
    """2 a multiply-add of products and of attention over what has been read so far on average; three times
    that in training."""
    sizes, training = settings["sizes"], settings["job"] == "train"
    seen = settings["tokens"] / 2 if training else settings["prompt_tokens"] + settings["new_tokens"] / 2
    return (2 * matrix_weights(settings) + 4 * sizes["num_layers"] * sizes["dim"] * seen) * (
        3 if training else 1
    )


def memory_limit(settings: dict[str, Any], gb_per_second: float) -> float:
    """Tokens per second if a step did nothing but read the weights once and each row's keys and values as
    `CompactDecoder` keeps them."""
    sizes = settings["sizes"]
    seen = settings["prompt_tokens"] + settings["new_tokens"] / 2
    kept = 2 * sizes["num_layers"] * sizes["dim"] // sizes["num_heads"] * sizes["num_kv_heads"] * seen
    kept *= 2 if settings["device"] == "cuda" and settings["precision"] == "bfloat16" else 4
    return settings["batch"] * gb_per_second * 1e9 / (weight_bytes(settings) + settings["batch"] * kept)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every job asked for; of several, the first job's figures stand at the top and all of them under
    `jobs`."""
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
    given = (
        "classes steps rows tokens prompt_tokens new_tokens device threads rounds warmup seed peak_tflops "
        "quality_steps".split()
    )
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
            # products of 8 bits are not measured
            by_products = None if settings["precision"] == "int8" else result["limit"]
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
        names = ("peer_name", "peer", "peer_peak_gb", "ratio", "memory_ratio")
        name, rate, gb, faster, less = (result.get(f"{key}{which}") for key in names)
        if rate:
            ours = f"ours {faster:.2f} times as fast, {less:.2f} times less memory"
            lines.append(f"  {name}: {rate:.1f}, {gb:.2f} GB; {ours}")
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
            f"  perplexity {found}: {100 * math.expm1(math.log(quick / exact)):+.3f} % in "
            f"{result['settings']['precision']}"
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
