"""What a corpus of so many hours costs: the tables of docs/scale.md, computed by benchmarks/costs.py from measured rates and stated assumptions.

    python -m benchmarks.scale                                        # every table
    python -m benchmarks.scale --hours 5000 --mfu 0.3 --json          # another corpus
    python -m benchmarks.scale --update docs/scale.md                 # write them into the page

Nothing is run: it takes a second. `python -m benchmarks.rates` measures what is not measured elsewhere.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.costs import (
    A100,
    FLAC_BYTES,
    H100,
    ID_BYTES,
    ITERATIONS,
    LARGE_FROM,
    LOADER,
    MFU,
    PUBLISHED,
    SITES,
    UNITS_PER_SECOND,
    UTTERANCE_SECONDS,
    WAV_BYTES,
    Rates,
    Stage,
    audio_flops,
    lm_sizes,
    loading_seconds,
    num_parameters,
    read_recipe,
    read_result,
    stages,
)

HOURS = (960.0, 60_000.0, 1_000_000.0)
MFU_RANGE = (0.1, 0.4)
NODE_MEMORY = (512e9, 1e12, 2e12)
MARK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def size(count: float) -> str:
    """Bytes for people: 59 GB."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.995 * scale:
            return f"{three(count / scale)} {unit}"
    return f"{count:.0f} B" if count else "–"


def three(value: float) -> str:
    """At most three digits that count, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(hours: float) -> str:
    """Hours for people: 40 s, 12 min, 7.5 h, 21 d."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{three(hours)} h" if hours < 72 else f"{three(hours / 24)} d"


def count(value: float) -> str:
    """288 thousand, 18 million."""
    if value >= 1e6:
        return f"{three(value / 1e6)} million"
    return f"{value:,.0f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def inputs(hours: Sequence[float], mfu: float) -> str:
    """What every other number rests on, and of which kind it is."""
    rates = Rates()
    parameters, token_flops, tokens = lm_sizes()
    loader = read_result(LOADER)["formats"]

    def cost(probe: str, per: str) -> str:
        return f"{three(1e6 * rates[probe].seconds)} µs {per}"

    rows = [
        (
            "flac, wav",
            f"{three(3600e-6 * FLAC_BYTES)}, {three(3600e-6 * WAV_BYTES)} MB an hour",
            "published; computed",
        ),
        (
            "an utterance",
            f"{UTTERANCE_SECONDS:g} s, an id of {ID_BYTES:g} bytes",
            "assumed (LibriSpeech: 12.3 s)",
        ),
        ("units", f"{UNITS_PER_SECOND:g} a second", "measured, on the demo's synthetic speech"),
        (
            "labels",
            f"{size(100 * 3600)} an hour, {three(rates.row['label_table_bytes'])} bytes an utterance",
            "computed; measured",
        ),
        (
            "manifest",
            f"{three(rates.row['bytes'])} bytes a row, written in {three(1e6 * rates.row['seconds'])} µs",
            "measured",
        ),
        (
            "index, headers",
            f"{cost('index_header_file_flac', 'a file')}, {cost('index_header_file_tar', 'a member of a tar')}",
            "measured",
        ),
        (
            "index, decoding",
            f"{three(1 / rates['index_decode_second_flac'].seconds)} s of flac a second of a core",
            "measured",
        ),
        (
            "MFCC and nearest centroid",
            f"{three(1 / rates['encode_mfcc_second'].seconds)} s of flac a second of a core",
            "measured",
        ),
        (
            "HuBERT's loader",
            f"{three(1 / loading_seconds())} s of flac a second of a core: row, decode, crop, mask, labels",
            "measured",
        ),
        (
            "loader alone, two threads",
            ", ".join(f"{name} {three(loader[name]['ours'])}" for name in loader) + " s a second",
            "measured",
        ),
        (
            "pack",
            f"{cost('pack_document', 'a document')}, {three(1 / rates['pack_labels_second'].seconds)} s of labels a second",
            "measured",
        ),
        ("SHA-256", f"{three(1 / rates['sha256_gigabyte'].seconds)} GB a second", "measured"),
        (
            "HuBERT BASE, training",
            f"{three(3e-9 * audio_flops('base', seconds=15.6))} GFLOP a second of audio, LARGE {three(3e-9 * audio_flops('large', seconds=15.6))}",
            "computed",
        ),
        (
            "features, BASE layer 9",
            f"{three(1e-9 * audio_flops('base', 9))} GFLOP a second of audio; LARGE layer 18: {three(1e-9 * audio_flops('large', 18))}",
            "computed",
        ),
        (
            "parameters",
            f"BASE {count(num_parameters('base'))}, LARGE {count(num_parameters('large'))}, unit LM {count(parameters)}",
            "computed",
        ),
        (
            "unit LM",
            f"{three(1e-9 * token_flops)} GFLOP a token, {three(1e-9 * tokens)} billion tokens",
            "computed, recipe",
        ),
        ("k-means", f"{ITERATIONS} iterations", "recipes: at most"),
        (
            "an H100, an A100",
            f"{three(H100.peak_flops / 1e12)}, {three(A100.peak_flops / 1e12)} TFLOP/s in bfloat16, of which {mfu:.0%} ({MFU_RANGE[0]:.0%} to {MFU_RANGE[1]:.0%})",
            "data sheet; assumed",
        ),
    ]
    return markdown(("what", "how much", "kind"), rows)


def published(hours: Sequence[float], mfu: float) -> str:
    """What share of its GPUs' peak others' runs had."""
    rows = []
    for run in PUBLISHED:
        flops = 3 * run.audio_seconds * audio_flops(run.architecture, seconds=15.6)
        share = flops / (3600 * run.gpu_hours * run.peak_flops)
        rows.append((run.what, run.source, f"{flops:.2g}", three(run.gpu_hours), f"{share:.1%}"))
    return markdown(("run", "source", "FLOP", "GPU hours", "share of a V100's 125 TFLOP/s"), rows)


def storage(hours: Sequence[float], mfu: float) -> str:
    """What lies on the disk in the end, and what the work needs beside it."""
    rates = Rates()
    rows: list[list[str]] = [
        ["utterances"],
        ["flac"],
        ["wav"],
        ["manifest"],
        ["one set of labels"],
        ["unit corpus"],
    ]
    rows += [["scratch, at most"], ["checkpoints of a run (2 kept)"], ["labels in default shards"]]
    for number in hours:
        seconds, utterances, found = 3600 * number, 3600 * number / UTTERANCE_SECONDS, stages(number)
        values = [
            count(utterances),
            size(seconds * FLAC_BYTES),
            size(seconds * WAV_BYTES),
            size(utterances * rates.row["bytes"]),
            size(next(stage for stage in found if stage.name.startswith("labels")).writes),
            size(next(stage for stage in found if stage.name == "pack").writes),
            size(max(stage.scratch for stage in found)),
            size(24 * num_parameters("large" if number >= LARGE_FROM else "base")),
            _shards(number),
        ]
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    return markdown(("", *map(_named, hours)), rows)


def summary(hours: Sequence[float], mfu: float) -> str:
    """For each size and site the time of all stages, and the stage that takes longest or does not fit, with what it waits for."""
    rows = []
    for number in hours:
        found, cells = stages(number), [_named(number)]
        for site in SITES:
            alone = {stage.name: stage.wall_hours(site, mfu) for stage in found}
            longest = max(alone, key=lambda name: max(alone[name].values()))
            waits_for = max(alone[longest], key=lambda resource: alone[longest][resource])
            first = f"{longest}, {waits_for}"
            if full := [stage for stage in found if stage.node_memory(site) > site.memory]:
                first = f"**memory of a node: {full[0].name}, {size(full[0].node_memory(site))} of {size(site.memory)}**"
            cells.append(f"{duration(sum(max(times.values()) for times in alone.values()))}; {first}")
        rows.append(cells)
    return markdown(("audio", *(site.name for site in SITES)), rows)


def _shards(hours: float) -> str:
    from quantize.encoding_plan import default_num_shards

    shards = default_num_shards(3600 * hours)
    return f"{2 * shards:,} files, {duration(hours / shards)} of audio in each"


def _named(hours: float) -> str:
    return f"{hours:,.0f} h"


def by_stage(number: float, mfu: float) -> str:
    """Stage by stage."""
    rows = []
    for stage in stages(number):
        gpu = [stage.gpu_hours(H100, share) for share in (mfu, *MFU_RANGE)]
        on_gpu = f"{three(gpu[0])} ({three(gpu[2])} to {three(gpu[1])})" if stage.flops else "–"
        rows.append(
            [
                stage.name,
                size(stage.reads),
                size(stage.writes),
                size(stage.scratch),
                size(stage.memory),
                f"{stage.flops:.1e}" if stage.flops else "–",
                three(stage.core_hours(with_gpu=True)),
                on_gpu,
                three(stage.core_hours(with_gpu=False)),
            ]
        )
    header = (
        "stage",
        "reads",
        "writes",
        "scratch",
        "memory of a process",
        "FLOP",
        "core-hours beside the GPU",
        "H100 hours",
        "core-hours without a GPU",
    )
    return markdown(header, rows)


def bottlenecks(number: float, mfu: float) -> str:
    """Wall time of each stage at each site and what it waits for; what opening a file for each utterance would take instead of tars."""
    found, rows = stages(number), []
    for stage in found:
        cells = [stage.name]
        for site in SITES:
            alone = stage.wall_hours(site, mfu)
            name = max(alone, key=lambda resource: alone[resource])
            need = stage.node_memory(site)
            cells.append(
                f"{duration(alone[name])}, {name}"
                if need <= site.memory
                else f"**{size(need)} of memory in a node**"
            )
        rows.append(
            [
                *cells,
                duration(stage.wall_hours(SITES[0], mfu, files=True)["opening files"])
                if stage.opens
                else "–",
            ]
        )
    totals = [sum(max(stage.wall_hours(site, mfu).values()) for stage in found) for site in SITES]
    rows.append(
        [
            "all, one after another",
            *map(duration, totals),
            duration(sum(stage.opens for stage in found) / SITES[0].opens / 3600),
        ]
    )
    return markdown(
        ("stage", *(site.name for site in SITES), "a file for each utterance: opening them"), rows
    )


def feeding(hours: Sequence[float], mfu: float) -> str:
    """What GPUs in training ask of loaders and of the network."""
    rows, core = [], 1 / loading_seconds()
    for architecture in ("base", "large"):
        for gpu in (A100, H100):
            for share in (MFU_RANGE[0], mfu, MFU_RANGE[1]):
                rate = gpu.peak_flops * share / (3 * audio_flops(architecture, seconds=15.6))
                rows.append(
                    [
                        f"HuBERT {architecture.upper()}, {gpu.name}, {share:.0%}",
                        three(rate),
                        f"{rate / core:.1f}",
                        f"{size(rate * FLAC_BYTES)}/s",
                        *(
                            f"{size(number * rate * FLAC_BYTES)}/s, {size(number * rate * WAV_BYTES)}/s"
                            for number in (8, 32)
                        ),
                    ]
                )
    return markdown(
        (
            "model, GPU, share of peak",
            "audio seconds a second",
            "cores that load",
            "flac, one GPU",
            "flac, wav, 8 GPUs",
            "flac, wav, 32 GPUs",
        ),
        rows,
    )


def checkpoints(hours: Sequence[float], mfu: float) -> str:
    """Twelve bytes a parameter: weights and AdamW's two moments in float32."""
    rows = []
    every = {
        "base": read_recipe("hubert_base_ls960")["hubert2"],
        "large": read_recipe("hubert_large_ll60k")["hubert"],
        "lm": read_recipe("unit_lm")["lm"],
    }
    for name, parameters in (
        ("HuBERT BASE", num_parameters("base")),
        ("HuBERT LARGE", num_parameters("large")),
        ("unit LM", lm_sizes()[0]),
    ):
        training = every[name.split()[-1].lower()]["training"]
        written = training["max_steps"] / training["checkpoint_every"] * 12 * parameters
        rows.append(
            [
                name,
                size(12 * parameters),
                f"{training['checkpoint_every']:,} of {training['max_steps']:,} steps",
                size(36 * parameters),
                size(written),
            ]
        )
    return markdown(
        (
            "model",
            "one checkpoint",
            "one after",
            "on disk at most (2 kept, 1 being written)",
            "written in all",
        ),
        rows,
    )


def limits(hours: Sequence[float], mfu: float) -> str:
    """Memory that grows with the number of utterances: how much, and where a node has no more."""
    rates, rows = Rates(), []
    for what, probe, processes in (
        ("`index`: candidates", "index_row", 1),
        ("`cluster`: the draw of frames", "draw_sample", 1),
        ("`encode`: the last part, which commits", "finish_labels", 1),
        ("`pretrain`, wav2vec 2.0: rows and the epoch's plan", "plan_epoch", 8),
        ("`pretrain`, HuBERT: and the index of the labels", "start_hubert", 8),
        ("`train-lm`: documents", "open_units", 8),
    ):
        each = rates[probe].bytes
        full = [memory / each / processes * UTTERANCE_SECONDS / 3600 for memory in NODE_MEMORY]
        rows.append(
            [
                what,
                three(each),
                f"{processes}",
                size(processes * each * 3600e6 / UTTERANCE_SECONDS),
                *(_named(float(f"{number:.2g}")) for number in full),
            ]
        )
    return markdown(
        (
            "what",
            "bytes an utterance",
            "processes on a node",
            "a node's memory at 1 M h",
            *(f"fills {size(memory)} at" for memory in NODE_MEMORY),
        ),
        rows,
    )


TABLES: dict[str, Callable[[Sequence[float], float], str]] = {
    "summary": summary,
    "inputs": inputs,
    "published": published,
    "storage": storage,
    "feeding": feeding,
    "checkpoints": checkpoints,
    "limits": limits,
}


def table(name: str, hours: Sequence[float], mfu: float) -> str:
    """A table by its name in the page: one of TABLES, or `stages_960`, `bottlenecks_60000`."""
    kind, _, number = name.partition("_")
    if number:
        return {"stages": by_stage, "bottlenecks": bottlenecks}[kind](float(number), mfu)
    return TABLES[name](hours, mfu)


def update(page: str) -> str:
    """The page with each table between its marks made anew."""
    return MARK.sub(lambda found: f"{found[1]}{table(found[2], HOURS, MFU)}\n{found[3]}", page)


def described(stage: Stage, mfu: float) -> dict[str, Any]:
    """For programs."""
    return {**asdict(stage), "h100_hours": stage.gpu_hours(H100, mfu), "core_hours": stage.core_hours(False)}


def main(given: list[str] | None = None) -> int:
    """Print the tables, or write them into a page. Exit status 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, nargs="+", default=list(HOURS), help="of audio")
    parser.add_argument(
        "--mfu", type=float, default=MFU, help="share of a GPU's peak that a model's own operations reach"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write the tables into this page")
    arguments = parser.parse_args(given)
    if min(arguments.hours) <= 0 or not 0 < arguments.mfu <= 1:
        print(
            f"benchmarks.scale: --hours {arguments.hours} --mfu {arguments.mfu}: hours above 0 and a share up to 1 are needed",
            file=sys.stderr,
        )
        return 2
    if arguments.update is not None:
        arguments.update.write_text(update(arguments.update.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if arguments.json:
        print(
            json.dumps(
                {
                    f"{number:g}": [described(stage, arguments.mfu) for stage in stages(number)]
                    for number in arguments.hours
                }
            )
        )
        return 0
    for name in TABLES:
        print(f"\n{name}\n\n{table(name, arguments.hours, arguments.mfu)}")
    for number in arguments.hours:
        print(
            f"\n{_named(number)}\n\n{by_stage(number, arguments.mfu)}\n\n{bottlenecks(number, arguments.mfu)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
