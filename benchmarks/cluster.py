"""K-means beside the peers' on the same features: seconds, the inertia that is reached, peak memory, and
assignment at its limit.

Ours is the product's `kmeans` with the defaults of the verb `cluster`. scikit-learn's is MiniBatchKMeans as
HuBERT's authors call it, and once more with a single initialisation in place of their twenty, its cheapest;
FAISS's is `faiss.Kmeans` with its defaults, with our start, points and stopping rule, and its approximate
SuperKmeans. A fit of scikit-learn's takes minutes: each way of a peer runs `--peer-rounds` times, alone,
between the two halves of our rounds. Every inertia is computed by one float64 oracle from the centroids that
a contender leaves. The limit is the matrix-product rate, in turn with `nearest` on our centroids.
"""

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster_fitters import ROWS, Assignment, Faiss, Fitter, Ours, Sklearn
from benchmarks.command import argument_parser, run_main
from benchmarks.measure import Contender, Measurement, load_before, machine, say, take_turns

MODULE = "benchmarks.cluster"
# The published or default setting first: the headline is against it, whichever is fastest.
VARIANTS = {
    "sklearn": ["sklearn-hubert", "sklearn-single"],
    "faiss": ["faiss-default", "faiss-matched", "faiss-matched-kernels", "faiss-super-kernels"],
    "none": [],
}
COMPONENTS = 4000
SILENCE_SHARE = 0.2


def build(name: str, settings: dict[str, Any], folder: Path) -> Contender:
    """The contender of a name: "ours", "assignment", or a peer's, with its variant behind a hyphen."""
    kinds: dict[str, type[Fitter]] = {
        "ours": Ours,
        "assignment": Assignment,
        "sklearn": Sklearn,
        "faiss": Faiss,
    }
    return kinds[name.partition("-")[0]](name, settings, folder)


def draw_points(path: Path, num_points: int, dim: int, seed: int) -> None:
    """Write (num_points, dim) float32 that look like an encoder's features.

    Some thousands of components of very different weights, a fifth of all points in a narrow one (silence); a
    variance that falls as 1 / rank, in rotated directions; Student's t with 4 degrees of freedom around each
    centre; and a mean far from zero.
    """
    rng = np.random.default_rng([seed, 5])
    spectrum = np.arange(1, dim + 1) ** -0.5
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    mean = 2 * rng.standard_normal(dim)
    count = min(COMPONENTS, max(2, num_points // 50))
    weights = 1 / (np.arange(count) + 20)  # Zipf's law, its head flattened
    weights[0] = 0
    weights *= (1 - SILENCE_SHARE) / weights.sum()
    weights[0] = SILENCE_SHARE
    centres = 3 * rng.standard_normal((count, dim)) * spectrum
    widths = np.exp(0.3 * rng.standard_normal(count))
    widths[0] = 0.2
    points = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_points, dim))
    for first in range(0, num_points, ROWS):
        drawn = rng.choice(count, size=min(ROWS, num_points - first), p=weights)
        widest = widths[drawn] * np.sqrt(4 / rng.chisquare(4, size=len(drawn)))
        around = rng.standard_normal((len(drawn), dim)) * spectrum * widest[:, None]
        points[first : first + ROWS] = (centres[drawn] + around) @ rotation + mean
    points.flush()


def mean_squared_distance(points: np.ndarray, centroids: np.ndarray) -> float:
    """Inertia of `centroids` (K, dim) on `points` (n, dim), divided by n: nearest by float64 distances,
    summed from differences."""
    wide, total = centroids.astype(np.float64), 0.0
    squares = np.square(wide).sum(axis=1)
    for first in range(0, len(points), ROWS):
        block = points[first : first + ROWS].astype(np.float64)
        nearest = (squares - 2 * block @ wide.T).argmin(axis=1)
        total += float(np.square(block - wide[nearest]).sum())
    return total / len(points)


def read_features(path: Path, classes: int) -> np.ndarray:
    """A user's own features, memory-mapped; anything but finite float32 of two dimensions is a ValueError."""
    try:
        points = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--features {path}: cannot be read ({error}); a .npy of float32 (frames, dim) is needed"
        ) from None
    if (
        not isinstance(points, np.ndarray)
        or points.ndim != 2
        or points.dtype != np.float32
        or not points.flags.c_contiguous
    ):
        raise ValueError(f"--features {path}: a .npy of float32 (frames, dim), C-contiguous, is needed")
    if len(points) < classes:
        raise ValueError(f"--features {path}: {len(points)} frames are fewer than --classes {classes}")
    return points


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the points or take the user's, let the contenders fit them, and hold what they leave against the
    oracle."""
    for name, least in (("points", 1), ("dim", 1), ("classes", 2), ("peer_rounds", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least} is needed"
            )
    if arguments.features is None and arguments.points < arguments.classes:
        raise ValueError(f"--points {arguments.points}: fewer than --classes {arguments.classes}")
    load = load_before()
    with tempfile.TemporaryDirectory(prefix="benchmark_") as temporary:
        folder = Path(temporary)
        file = folder / "points.npy" if arguments.features is None else arguments.features.resolve()
        if arguments.features is None:
            draw_points(file, arguments.points, arguments.dim, arguments.seed)
        points = read_features(file, arguments.classes)
        given = "classes threads rounds peer_rounds warmup seed".split()
        settings = {
            **{name: getattr(arguments, name) for name in given},
            "points": len(points),
            "dim": points.shape[1],
            "points_file": str(file),
            "device": "cpu",
            "precision": "float32",
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        measured = measure(arguments, folder)
        say("inertia of each, in float64")
        found = {name: figures(name, measurements, points, folder) for name, measurements in measured.items()}
    settings["points_file"] = None if arguments.features is None else arguments.features.name
    kind = "drawn" if arguments.features is None else "own"
    hello = measured["ours"][0].hello
    return {
        "name": f"cluster {len(points)} x {points.shape[1]} K {arguments.classes} {kind}",
        "unit": "seconds",
        **sides(found, VARIANTS[arguments.peer]),
        "rounds": arguments.rounds,
        "ours_about": hello["about"],
        "settings": settings,
        "load_before": load,
        "machine": {**machine(), "torch": hello["torch"]},
        "date": date.today().isoformat(),
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[Measurement]]:
    """By contender: half of our fits, the peer's ways one after another, the other half; then assignment and
    matrix product."""

    def turns(
        names: list[str], rounds: int, warmup: int, python: str = sys.executable
    ) -> dict[str, Measurement]:
        return take_turns(
            MODULE,
            dict.fromkeys(names, python),
            folder,
            rounds=rounds,
            warmup=warmup,
            threads=arguments.threads,
        )

    def ours(rounds: int) -> list[Measurement]:
        return list(turns(["ours"], rounds, arguments.warmup).values()) if rounds else []

    before = ours(-(-arguments.rounds // 2))
    peers = {
        name: [turns([name], arguments.peer_rounds, 0, arguments.peer_python or sys.executable)[name]]
        for name in VARIANTS[arguments.peer]
    }
    fits = {"ours": before + ours(arguments.rounds // 2), **peers}
    limits = turns(["assignment", "gemm"], arguments.rounds, 1)
    return fits | {name: [measurement] for name, measurement in limits.items()}


def figures(name: str, measurements: list[Measurement], points: np.ndarray, folder: Path) -> dict[str, Any]:
    """One contender: operations a second of "assignment" and "gemm", else seconds and memory of a fit and
    what it left."""
    rates = [rate for measurement in measurements for rate in measurement.rates]
    if name in ("assignment", "gemm"):
        return {"rate": statistics.median(rates)}
    fits = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {
        "seconds": statistics.median(1 / rate for rate in rates),
        "rounds": [1 / rate for rate in rates],
        "peak_gb": max(measurement.peak_gb for measurement in measurements),
        "inertia": mean_squared_distance(points, np.load(folder / f"{name}.npy")),
        "iterations": fits[-1]["iterations"],
        "distinct_codebooks": len({fit["centroids_sha256"] for fit in fits}),
    }


def sides(found: dict[str, dict[str, Any]], variants: list[str]) -> dict[str, Any]:
    """DESIGN.md's keys, ours against the first of the peer's `variants`; ratios are above 1 where ours is
    better."""
    ours, peer = found["ours"], found[variants[0]] if variants else None
    fastest = min(variants, key=lambda name: found[name]["seconds"], default=None)
    return {
        "ours": ours["seconds"],
        "peer": peer and peer["seconds"],
        "ratio": peer and peer["seconds"] / ours["seconds"],
        "ours_inertia": ours["inertia"],
        "peer_inertia": peer and peer["inertia"],
        "ours_peak_gb": ours["peak_gb"],
        "peer_peak_gb": peer and peer["peak_gb"],
        "memory_ratio": peer and peer["peak_gb"] / ours["peak_gb"],
        "ours_rounds": ours["rounds"],
        "peer_rounds": peer["rounds"] if peer else [],
        "iterations": ours["iterations"],
        "peer_iterations": peer and peer["iterations"],
        "ours_distinct_codebooks": ours["distinct_codebooks"],
        "peer_name": variants[0] if variants else None,
        "peer_name_fastest": fastest,
        "ratio_fastest": fastest and found[fastest]["seconds"] / ours["seconds"],
        "peer_variants": {
            name: {**found[name], "ratio": found[name]["seconds"] / ours["seconds"]} for name in variants
        },
        "limit": found["gemm"]["rate"] / 1e12,
        "limit_unit": "TFLOP/s of matrix products",
        "assignment_tflops": found["assignment"]["rate"] / 1e12,
        "share_of_limit": found["assignment"]["rate"] / found["gemm"]["rate"],
    }


def show(result: dict[str, Any]) -> str:
    """A line for each contender."""
    lines = [f"{'':24}{'seconds':>10}{'x ours':>8}{'inertia':>12}{'iterations':>12}{'GB':>7}"]
    ours = {key: result[f"ours_{key}"] for key in ("inertia", "peak_gb")} | {
        "seconds": result["ours"],
        "ratio": 1.0,
    }
    for name, found in {
        "ours": {**ours, "iterations": result["iterations"]},
        **result["peer_variants"],
    }.items():
        speed = f"{found['seconds']:10.2f}{found['ratio']:8.2f}"
        lines.append(
            f"{name:24}{speed}{found['inertia']:12.5g}{found['iterations']:12d}{found['peak_gb']:7.2f}"
        )
    share = f"{result['share_of_limit']:.2f} of the matrix product's {result['limit']:.3f}"
    lines.append(f"assignment {result['assignment_tflops']:.3f} TFLOP/s, {share}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argument_parser(__doc__, ["sklearn", "faiss"])
    parser.set_defaults(rounds=3, warmup=0)  # a fit is long and done once; nobody warms it up
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FILE.npy",
        help="float32 (frames, dim) of your own, in place of drawn points",
    )
    parser.add_argument("--peer-rounds", type=int, default=1, help="fits of each way of the peer")
    parser.add_argument(
        "--peer-python", metavar="PYTHON", help="interpreter of the environment that the peer lives in"
    )
    return run_main(MODULE, parser, given, build, compare, show)


if __name__ == "__main__":
    sys.exit(main())
