"""A benchmark of two sides: tried out, measured in turn, and reported with the keys of DESIGN.md."""

import json
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measure import KEPT, Measurement, load_before, machine, say, sides, take_turns


def try_out(
    module: str, pythons: Mapping[str, str], folder: Path, *, warmup: int, threads: int
) -> dict[str, float | None]:
    """Rates of a peer's variants, the fastest first: one round each after the warm-up, alone with the memory.

    None for a compiled one that ends with an error: not every model can be compiled.
    """
    rates: dict[str, float | None] = {}
    for name, python in pythons.items():
        try:
            rates[name] = take_turns(
                module, {name: python}, folder, rounds=1, warmup=warmup, threads=threads
            )[name].rate
        except RuntimeError as error:
            if "-compiled" not in name:
                raise
            say(f"{name} is left out: {error}")
            rates[name] = None
    return dict(sorted(rates.items(), key=lambda item: -(item[1] or 0)))


def contest(
    module: str,
    variants: list[str],
    folder: Path,
    settings: dict[str, Any],
    flops_per_unit: float,
    *,
    peer_python: str | None,
    usual: str | None = None,
) -> dict[str, Any]:
    """Ours against the fastest of a peer's `variants` (none: ours alone), as DESIGN.md's JSON object.

    On a CPU each variant is tried with the C library's defaults and with freed memory kept. The fastest of
    all, the fastest with the defaults and the one named `usual` then run in the same turns, and are reported.
    `flops_per_unit` are the model's floating-point operations per unit of work; the limit is the rate at
    which the measured matrix products would do them.
    """
    (folder / "settings.json").write_text(json.dumps(settings))
    load = load_before()
    turns, python = {key: settings[key] for key in ("warmup", "threads")}, peer_python or sys.executable
    if settings["device"] == "cpu":
        variants = [name + suffix for name in variants for suffix in ("", KEPT)]
    tried: dict[str, float | None] = dict.fromkeys(variants, 0.0)
    if len(variants) > 1:
        tried = try_out(module, dict.fromkeys(variants, python), folder, **turns)
    plain = [name for name in tried if not name.endswith(KEPT)]
    first = [*list(tried)[:1], *plain[:1]]
    finalists = list(dict.fromkeys([*first, *(name for name in plain if name == usual)]))
    pythons = {"ours": sys.executable, **dict.fromkeys(finalists, python), "gemm": sys.executable}
    measured = take_turns(module, pythons, folder, rounds=settings["rounds"], **turns)
    ours, limit = measured["ours"], measured["gemm"].rate / flops_per_unit
    # Where the two are close the trial may have been wrong about which is faster.
    peer = max(finalists, key=lambda name: measured[name].rate, default=None)
    theirs = measured[peer] if peer else None
    others = {"default": next((name for name in finalists if not name.endswith(KEPT)), None)}
    if usual is not None:
        others["usual"] = usual if usual in finalists else None
    return {
        **sides(ours, theirs),
        **_others(others, measured),
        "limit": limit,
        "share_of_limit": ours.rate / limit,
        "peer_share_of_limit": theirs and theirs.rate / limit,
        "mfu": (peak := settings["peak_tflops"]) and ours.rate * flops_per_unit / 1e12 / peak,
        "gemm_tflops": measured["gemm"].rate / 1e12,
        "model_gflops_per_second_of_audio": flops_per_unit / 1e9,
        "rounds": settings["rounds"],
        "peer_name": peer,
        "peer_variants": tried if len(variants) > 1 else {},
        "ours_about": ours.hello["about"],
        "peer_about": theirs.hello["about"] if theirs else {},
        "settings": settings,
        "load_before": load,
        "machine": {
            **machine(),
            "torch": ours.hello["torch"],
            "peer_torch": theirs and theirs.hello["torch"],
        },
        "date": date.today().isoformat(),
    }


def _others(others: dict[str, str | None], measured: dict[str, Measurement]) -> dict[str, Any]:
    """The figures of further variants of the peer, each key with what the variant is at its end."""
    found: dict[str, Any] = {}
    for which, name in others.items():
        figures = {**sides(measured["ours"], measured[name] if name else None), "peer_name": name}
        found |= {f"{key}_{which}": value for key, value in figures.items() if key[:4] != "ours"}
    return found
