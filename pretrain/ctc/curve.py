"""The transfer curve: error rates against labelled minutes, from the transcripts of every budget, system and
seed.

Points with several seeds are means over them. Intervals are bootstraps over the test's utterances
(`error_rates`), each drawn with its edits of all seeds: how much another test set would change the mean. How
much the seeds differ is told beside it (`wer_seeds`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from pretrain.ctc.comparison import sign_flip_p
from pretrain.ctc.error_rates import count_edits, interval
from pretrain.ctc.rates_text import format_columns, format_interval
from pretrain.store.disk import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 1000
# Told apart in print by marker and dashes, too; the colours are dark enough for white paper and differ in
# lightness.
LOOKS = (
    ("#2f6690", "o", "-"),
    ("#c8622d", "s", "--"),
    ("#4a7c59", "^", "-."),
    ("#7d5a96", "D", ":"),
    ("#8a7a2f", "v", "-"),
)


class Scored(NamedTuple):
    """A system at one budget on one test: which utterances and references, and counts (utterances, 2), edits
    and tokens, of all seeds."""

    references: list[tuple[str, str]]
    words: np.ndarray
    characters: np.ndarray | None


def summarize(cells: Sequence[dict[str, Any]], out: str | Path, baseline: str) -> dict[str, Any]:
    """`curve`: a point for each test, budget and system, of all its seeds; `comparisons`: each system against
    `baseline`, paired.

    A point has `test`, `budget`, `system`, `seeds`, `counted` (words or phones), `label_minutes`, `wer` and
    `cer` (means over seeds) with `wer_interval` and `cer_interval`, and `wer_seeds` (lowest, highest). A
    comparison has `wer_difference` (system minus baseline: below 0 the system is better) with its paired
    `wer_difference_interval` and the `p_value` of a paired permutation test. Systems whose references differ
    (another normalisation of text) are not compared.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["test"], cell["budget"], cell["system"]), []).append(cell)
    scored = {key: score(group, Path(out)) for key, group in groups.items()}
    curve, comparisons = [], []
    for (test, budget, system), group in groups.items():
        found, wers = scored[test, budget, system], [cell["wer"] for cell in group]
        point = {
            "test": test,
            "budget": budget,
            "system": system,
            "seeds": len(group),
            "counted": group[0]["counted"],
            "label_minutes": float(np.mean([cell["label_minutes"] for cell in group])),
            "wer": float(np.mean(wers)),
            "wer_interval": bounds(found.words),
            "wer_seeds": [min(wers), max(wers)],
        }
        if found.characters is not None:
            point |= {
                "cer": float(np.mean([cell["cer"] for cell in group])),
                "cer_interval": bounds(found.characters),
            }
        curve.append(point)
        other = scored.get((test, budget, baseline))
        if system != baseline and other is not None and other.references == found.references:
            comparisons.append(
                {
                    "test": test,
                    "budget": budget,
                    "system": system,
                    "baseline": baseline,
                    **paired(found, other),
                }
            )
    return {"baseline": baseline, "curve": curve, "comparisons": comparisons}


def score(cells: Sequence[dict[str, Any]], out: Path) -> Scored:
    """The edits of cells that differ in their seed alone."""
    found: list[Scored] = []
    for cell in cells:
        table = pq.read_table(
            out / cell["transcripts"] / "transcripts.parquet", columns=["id", "text", "hypothesis"]
        )
        rows = [row for row in table.sort_by("id").to_pylist() if row["text"] is not None]
        texts, said = [row["text"] for row in rows], [row["hypothesis"] for row in rows]
        edits = [
            count_edits(texts, said),
            *([count_edits(texts, said, "characters")] if cell["cer"] is not None else []),
        ]
        columns = [np.stack([counts.total, counts.reference], axis=1) for counts in edits]
        found.append(
            Scored(
                [(row["id"], row["text"]) for row in rows],
                columns[0],
                columns[1] if len(columns) > 1 else None,
            )
        )
        if found[0].references != found[-1].references:
            one, other = cells[0]["transcripts"], cell["transcripts"]
            raise ValueError(
                f"{out / other}: has other utterances or references than {one}; remove the older one to make "
                "it again"
            )
    characters = [of_seed.characters for of_seed in found if of_seed.characters is not None]
    words = sum((of_seed.words for of_seed in found[1:]), found[0].words)
    return Scored(found[0].references, words, sum(characters[1:], characters[0]) if characters else None)


def bounds(columns: np.ndarray) -> list[float] | None:
    """The 95 % interval of a rate."""
    found = interval(columns, lambda sums: sums[..., 0] / sums[..., 1], DRAWS, 0)
    return list(found) if found else None


def paired(ours: Scored, theirs: Scored) -> dict[str, Any]:
    """Of two systems' edits of the same utterances, the difference of their rates, per seed, and what speaks
    for it."""
    rates = [float(scored.words[:, 0].sum() / scored.words[:, 1].sum()) for scored in (ours, theirs)]
    columns = np.concatenate([ours.words, theirs.words], axis=1)
    found = interval(columns, lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], DRAWS, 0)
    # an utterance's transcripts of all seeds change sides together
    return {
        "wer_difference": rates[0] - rates[1],
        "wer_difference_interval": list(found) if found else None,
        "p_value": sign_flip_p(ours.words[:, 0] - theirs.words[:, 0]),
    }


def draw_curve(curve: Sequence[Mapping[str, Any]]) -> "Figure":
    """WER of one test over labelled minutes, a line for each system, with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    systems = list(dict.fromkeys(point["system"] for point in curve))
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, system in enumerate(systems):
        colour, marker, dashes = LOOKS[number % len(LOOKS)]
        points = sorted(
            (point for point in curve if point["system"] == system), key=lambda point: point["label_minutes"]
        )
        # Intervals that would lie over each other stand side by side.
        minutes = np.array([point["label_minutes"] for point in points]) * 1.02 ** (
            number - (len(systems) - 1) / 2
        )
        wer = np.array([point["wer"] for point in points])
        ends = np.array([point["wer_interval"] or [point["wer"]] * 2 for point in points])
        errors = np.maximum(0, np.stack([wer - ends[:, 0], ends[:, 1] - wer]))
        axes.errorbar(
            minutes,
            wer,
            errors,
            color=colour,
            marker=marker,
            linestyle=dashes,
            linewidth=1.8,
            markersize=5.5,
            elinewidth=1.2,
            capsize=3.5,
            label=system,
        )
    axes.set_xscale("log")
    ticks = list({point["budget"]: point["label_minutes"] for point in curve}.values())
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([minutes_in_words(minutes) for minutes in ticks])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_ylim(0, 1.06 * max(max(point["wer_interval"] or [point["wer"]]) for point in curve) or 1)
    axes.set(
        xlabel="labelled speech",
        ylabel="phone error rate" if curve[0]["counted"] == "phones" else "word error rate",
    )
    axes.set_title(f"Test set: {curve[0]['test']}", fontsize=9, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    axes.legend(frameon=False)
    return figure


def minutes_in_words(minutes: float) -> str:
    """`45 s`, `3.1 min`, `1 h`: two digits, or whole numbers."""
    value, unit = (
        (minutes * 60, "s")
        if minutes < 0.995
        else (minutes, "min")
        if minutes < 59.5
        else (minutes / 60, "h")
    )
    return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"


def write_curve(out: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """`transfer.svg` and `transfer.png` of the first test; the same bytes for the same numbers."""
    import matplotlib

    first = [point for point in curve if point["test"] == curve[0]["test"]]
    with matplotlib.rc_context({"svg.hashsalt": "wordless", "text.parse_math": False}):
        for form, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            with atomic_path(out / f"transfer.{form}") as temporary:
                draw_curve(first).savefig(temporary, format=form, dpi=160, metadata=metadata)


def as_text(summary: Mapping[str, Any]) -> str:
    """The table for a terminal: a row for each test, budget and system, and how it compares with the
    baseline."""
    if "cells_missing" in summary:
        missing = summary["cells_missing"]
        return (
            f"part {summary['part']}: {summary['cells']} cells are done; {len(missing)} of other parts are "
            f"missing: {', '.join(missing)}"
        )
    against = {(c["test"], c["budget"], c["system"]): c for c in summary["comparisons"]}
    rate = "PER" if any(point["counted"] == "phones" for point in summary["curve"]) else "WER"
    rows = [
        [
            "test",
            "budget",
            "labels",
            "system",
            rate,
            "95 %",
            "CER",
            f"less {summary['baseline']}",
            "95 %",
            "p",
        ]
    ]
    for point in summary["curve"]:
        compared = against.get((point["test"], point["budget"], point["system"]), {})
        rows.append(
            [
                point["test"],
                point["budget"],
                minutes_in_words(point["label_minutes"]),
                point["system"],
                f"{point['wer']:.1%}",
                format_interval(point["wer_interval"]),
                f"{point['cer']:.1%}" if "cer" in point else "",
                f"{compared['wer_difference']:+.1%}" if compared else "",
                format_interval(compared.get("wer_difference_interval")),
                f"{compared['p_value']:.2g}" if compared.get("p_value") is not None else "",
            ]
        )
    return format_columns(rows, right=True)
