"""The command line of every benchmark, and its report: a table for people, a JSON line for programs, a dated
file to keep."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Build, say, serve

HIDDEN = {"contender", "inputs", "json", "out"}


def argument_parser(description: str | None, peers: list[str]) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--peer", choices=[*peers, "none"], default=peers[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write the JSON object there too, as DATE-NAME.json"
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of benchmarks that run a model."""
    parser.add_argument(
        "--peer-python", metavar="PYTHON", help="interpreter of the environment that the peer lives in"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the data sheet, for `mfu`: an H100's 989 in bfloat16, say"
    )


def run_main(
    module: str,
    parser: argparse.ArgumentParser,
    given: list[str] | None,
    build: Build,
    compare: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
) -> int:
    """A contender if we were started as one, else the comparison and its report. Exit status 2 for a user's
    mistake."""
    arguments = parser.parse_args(given)
    if arguments.contender:
        serve(build, arguments.contender, arguments.inputs)
        return 0
    try:
        if getattr(arguments, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
        for name, least in (("rounds", 1), ("warmup", 0), ("threads", 1)):
            if getattr(arguments, name) < least:
                raise ValueError(f"--{name} {getattr(arguments, name)}: at least {least} is needed")
        if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
            raise ValueError(f"--out {arguments.out}: is a file; a folder is needed")
        result = {**compare(arguments), "command": command(module, parser, arguments)}
    except ValueError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    print(show(result))
    if arguments.out is not None:
        say(f"written to {write_result(result, arguments.out)}")
    if arguments.json:
        print(json.dumps(result))
    return 0


def command(module: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """What to type for the same again: the arguments that are not the defaults, an interpreter as PYTHON."""
    words = ["python", "-m", module]
    for name, value in vars(arguments).items():
        if name not in HIDDEN and value != parser.get_default(name):
            shown = (
                []
                if value is True
                else ["PYTHON"]
                if name == "peer_python"
                else list(map(str, value if isinstance(value, list) else [value]))
            )
            words += [f"--{name.replace('_', '-')}", *shown]
    return " ".join(words)


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """`DATE-NAME.json`, pretty-printed; a number goes behind the name where that day has one already."""
    folder.mkdir(parents=True, exist_ok=True)
    peer = [result["peer_name"]] if result["peer_name"] else []
    name = re.sub(
        r"[^a-z0-9]+",
        "-",
        " ".join([result.get("date", date.today().isoformat()), result["name"], *peer]).lower(),
    )
    path, number = folder / f"{name}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def table(result: dict[str, Any]) -> str:
    """A contest for people."""
    both = result["peer_name"] != result["peer_name_default"]
    rows = [("", "ours", result["peer_name"] or "(no peer)", result["peer_name_default"] if both else "")]
    for label, own, peer in (
        (result["unit"], "ours", "peer"),
        ("peak memory, GB", "ours_peak_gb", "peer_peak_gb"),
        ("share of the matrix-product limit", "share_of_limit", "peer_share_of_limit"),
    ):
        other = result.get(f"{peer}_default") if both else None
        ours, theirs, default = (
            "" if value is None else f"{value:.2f}" for value in (result[own], result[peer], other)
        )
        rows.append((label, ours, theirs, default))
    lines = [f"{label:36}{ours:>12}{peer:>36}{default:>36}".rstrip() for label, ours, peer, default in rows]
    lines.append(
        f"limit {result['limit']:.2f} {result['unit']}: {result['gemm_tflops']:.3f} TFLOP/s of matrix "
        "products"
    )
    if result["peer"]:
        lines.append(f"{result['ratio']:.2f} times as fast, {result['memory_ratio']:.2f} times less memory")
    if both:
        speed, memory = result["ratio_default"], result["memory_ratio_default"]
        lines.append(
            f"{speed:.2f} times as fast, {memory:.2f} times less memory, beside the peer with the C "
            "library's defaults"
        )
    return "\n".join(lines)
