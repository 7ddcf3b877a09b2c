"""Error rates as tables for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any


def as_text(summary: dict[str, Any]) -> str:
    """The summary of `transcribe` for a terminal: rates, kinds of errors, the worst speakers and utterances,
    confusions, notes."""
    parts = [format_columns([*(_rate_rows(summary) if "wer" in summary else []), *_plain_rows(summary)])]
    if "wer" in summary:
        parts += _tables(summary)
    return "\n\n".join([*parts, *summary.get("notes", [])])


def _rate_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = []
    for rate, name in (("wer", "PER" if summary["counted"] == "phones" else "WER"), ("cer", "CER")):
        if rate in summary:
            about = format_interval(summary[f"{rate}_interval"])
            over = summary.get(f"{rate}_interval_speakers")
            rows.append(
                [
                    name,
                    f"{summary[rate]:.2%}",
                    about + (f"; over speakers {format_interval(over)}" if over else ""),
                ]
            )
    counts = ", ".join(
        f"{summary[kind]} {past}"
        for kind, past in zip(_KINDS, ("substituted", "inserted", "deleted"), strict=True)
    )
    of = f"of {summary['reference_words']} {summary['counted']} in {summary['scored_utterances']} utterances"
    return [*rows, ["edits", str(sum(summary[kind] for kind in _KINDS)), f"{counts}, {of}"]]


def _plain_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Single values that the rows of the rates do not tell; counts of nothing are left out."""
    told = {"wer", "cer", "counted", "hits", *_KINDS, "reference_words", "scored_utterances"}
    plain = {
        name: value
        for name, value in summary.items()
        if name not in told and isinstance(value, int | float | str) and value
    }
    return [
        [name, f"{value:.4g}" if isinstance(value, float) else str(value), ""]
        for name, value in plain.items()
    ]


def _tables(summary: dict[str, Any]) -> list[str]:
    parts = []
    speakers = sorted(summary["by_speaker"].items(), key=lambda item: -(item[1]["wer"] or 0.0))
    if len(speakers) > 1:
        more = f", the worst 10 of {len(speakers)}" if len(speakers) > 10 else ""
        header = [
            f"speaker{more}",
            "PER" if summary["counted"] == "phones" else "WER",
            summary["counted"],
            *_KINDS,
        ]
        rows = [
            [
                name,
                "" if row["wer"] is None else f"{row['wer']:.2%}",
                str(row["reference_words"]),
                *(str(row[kind]) for kind in _KINDS),
            ]
            for name, row in speakers[:10]
        ]
        parts.append(format_columns([header, *rows], right=True))
    if worst := summary["worst"][:5]:
        rows = [
            line
            for row in worst
            for line in (
                [row["id"], f"{row['edits']} of {row['reference_words']}", row["reference"]],
                ["", "", row["hypothesis"]],
            )
        ]
        parts.append(format_columns(rows))
    if confused := [
        f"{wanted} → {got} ({count})" for wanted, got, count in summary["confusions"]["substitutions"][:10]
    ]:
        parts.append("confused: " + ", ".join(confused))
    return parts


_KINDS = ("substitutions", "insertions", "deletions")


def format_interval(bounds: Sequence[float] | None) -> str:
    """`[7.51%, 9.02%]`, or nothing where there is no interval."""
    return f"[{bounds[0]:.2%}, {bounds[1]:.2%}]" if bounds else ""


def format_columns(rows: Iterable[Sequence[str]], right: bool = False) -> str:
    """Rows of equal length with their cells under each other; with `right` all columns but the first end at
    the same place."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
