"""The verb `report`: one self-contained page of a run, `report.html`, and its numbers, `summary.json`.

It reads the outputs of other stages and computes only the comparison of recognisers
(wordless/report/recognition.py). A stage whose folder is not complete is left out, and the page gives the
reason. Both files are in the run's folder and may be written again at any time: each is replaced in one
piece.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from pydantic import Field

from pretrain.config import Config, PathStr, Split
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE, Utterance
from pretrain.store.artefact import git_commit, library_versions
from pretrain.store.disk import atomic_path, write_json
from quantize.quality import matching_labels, measures_text, table_groups
from wordless.report import captions, readings, recognition
from wordless.report.figures import (
    SHOWN_SECONDS,
    STYLE,
    draw_curves,
    draw_matrix,
    draw_sweep,
    draw_utterance,
    svg_image,
)
from wordless.report.players import listening_groups
from wordless.report.run_stages import KINDS, Stages, find_stages, open_labels
from wordless.report.run_summary import headline, summarise
from wordless.stage_records import read_records, reasons
from wordless.value_lines import value_lines

FEW_EXAMPLES = 3  # transcripts that the page shows where even the best recogniser has most words wrong


class ReportConfig(Config):
    """`out` is the run's folder. Tables map a name that the page uses to the folder of a stage; units are
    compared with `mfcc`.

    A folder that is not complete, or not there, is left out of the page, which names it with the reason in
    `left_out`.
    """

    out: PathStr
    title: str | None = Field(
        None, description="of the page; by default the name of the run and how much audio it is of"
    )
    manifest: PathStr
    split: Split = Field("test", description='the utterance to draw is one of these; "": of all')
    pretrain: dict[str, PathStr] = Field({}, description="name -> pretraining run")
    layers: dict[str, PathStr] = Field(
        {}, description="name -> sweep over an encoder's layers, `measure` with `layers`"
    )
    units: dict[str, PathStr] = Field({}, description="name -> measurement; the last one's matrix is drawn")
    labels: dict[str, PathStr] = Field({}, description="name -> labels to draw")
    lm: PathStr | None = None
    lm_scores: PathStr | None = None
    suites: dict[str, PathStr] = Field({}, description="name -> scores of a suite of minimal pairs")
    samples: PathStr | None = None
    synthesizer: PathStr | None = None
    sounds: PathStr | None = Field(None, description="what `synthesize` made: played in the page")
    ctc: dict[str, PathStr] = Field(
        {}, description="name -> fine-tuning run; `pretrained` and `scratch` are compared"
    )
    transcripts: dict[str, PathStr] = Field({}, description="name -> transcripts, under the names of `ctc`")
    transfer: PathStr | None = Field(None, description="what `transfer` made: the curve is drawn")
    left_out: dict[str, str] = Field(
        {}, description="stage -> why it did not run; the page gives the reasons"
    )


def report(config: ReportConfig) -> dict[str, Any]:
    """Write `out/report.html` and `out/summary.json`; returns the headline numbers and the page's path."""
    manifest, out = Manifest(config.manifest), Path(config.out)
    records = read_records(out)
    stages, left_out = find_stages(
        {group: getattr(config, group) for group in KINDS}, reasons(out) | config.left_out
    )
    summary = summarise(manifest, stages, records, left_out)
    page = page_template().render(
        config=config,
        manifest=manifest,
        stages=stages,
        left_out=left_out,
        summary=summary,
        title=config.title or default_title(config, summary),
        words=readings.in_words(summary),
        glance=readings.glance(summary),
        cautions=readings.cautions(summary["audio"]),
        missing=readings.missing(summary["audio"]),
        unit_words=readings.of_units(summary["units"]),
        recogniser_words=readings.of_recognisers(summary["ctc"]),
        layer_words={name: captions.of_layers(sweep) for name, sweep in summary["layers"].items()},
        measures=table_groups(list(summary["units"].values())),
        shown_seconds=SHOWN_SECONDS,
        **draw(config, manifest, stages, summary),
        **recogniser_rows(stages, summary),
        samples=[line for stage in stages["samples"].values() for line in stage.lines("samples.jsonl")[:4]],
        listening=[
            group for stage in stages["sounds"].values() for group in listening_groups(stage, manifest)
        ],
        command=run_command(out),
        versions={**library_versions(), "matplotlib": matplotlib.__version__},
        git_commit=git_commit(),
    )
    with atomic_path(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(out / "summary.json", summary)
    return {**headline(summary), "report": str(out / "report.html")}


def draw(
    config: ReportConfig, manifest: Manifest, stages: Stages, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """`figures`, and what is needed to describe them: `utterance`, `rates`, `curve_words`, `matrix_of` and
    `matrix_words`."""
    labels = {name: open_labels(stage.folder, manifest) for name, stage in stages["labels"].items()}
    utterance = choose_utterance(
        manifest.select(config.split if config.split in manifest.splits else None), labels
    )
    counts = {
        name: known for name, stage in stages["units"].items() if (known := stage.phone_counts()).phones
    }
    trained = ("pretrain", "lm", "synthesizer", "ctc")
    runs = {
        group: {name: stage.lines("metrics.jsonl") for name, stage in stages[group].items()}
        for group in trained
    }
    with matplotlib.rc_context(STYLE):
        curves = draw_curves(runs, summary["lm"])
        figures = {
            "curves": curves,
            "utterance": draw_utterance(utterance, labels, counts) if utterance else None,
            "matrix": draw_matrix(list(counts.values())[-1]) if counts else None,
            "transfer": next(
                (svg_image((s.folder / "transfer.svg").read_bytes()) for s in stages["transfer"].values()),
                None,
            ),
            "layers": {name: draw_sweep(sweep) for name, sweep in summary["layers"].items()},
        }
    return {
        "figures": figures,
        "utterance": utterance,
        "rates": captions.of_rates(*change_rates(utterance, labels)) if utterance and labels else "",
        "curve_words": {group: captions.of_training(group, runs[group]) for group in curves},
        "matrix_of": list(counts)[-1] if counts else "",
        "matrix_words": captions.of_matrix(list(counts.values())[-1]) if counts else [],
    }


def recogniser_rows(stages: Stages, summary: Mapping[str, Any]) -> dict[str, Any]:
    """`transcripts`, `worst`, `speakers` and `transfer_rows`. Of recognisers with most words wrong there are
    no word times, which would mean nothing, and where all are such, few transcripts: `unclear` are their
    names."""
    scored = {
        name: scores["wer"]
        for name, scores in summary["ctc"].get("transcripts", {}).items()
        if "wer" in scores
    }
    unclear = [name for name, wer in scored.items() if wer > readings.CLEAR_WER]
    few = {"count": FEW_EXAMPLES} if scored and len(unclear) == len(scored) else {}
    by_speaker = recognition.speaker_table(stages["transcripts"])
    examples = recognition.transcript_examples(stages["transcripts"], **few)
    return {
        "transcripts": examples,
        "timed_names": list(dict.fromkeys(name for example in examples for name in example.times)),
        "worst": recognition.worst_examples(stages["transcripts"]),
        "speakers": by_speaker[: recognition.SHOWN_SPEAKERS],
        "num_speakers": len(by_speaker),
        "transfer_rows": recognition.transfer_rows(summary["transfer"]),
        "unclear": unclear,
    }


def page_template() -> jinja2.Template:
    """The page with its filters; a name that it lacks is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    pages.filters |= {
        "number": format_number,
        "points": recognition.points,
        "difference": recognition.difference,
        "p_value": recognition.p_value,
        "spoken_time": readings.spoken_time,
    }
    return pages.get_template("report.html.j2")


def default_title(config: ReportConfig, summary: Mapping[str, Any]) -> str:
    """The name of the run's folder, and what there is to see: `my_talks: speech units from 15.2 minutes of
    audio`."""
    what = "speech units from" if summary["units"] or summary["lm"] else "results on"
    return (
        f"{Path(config.out).resolve().name}: {what} {readings.spoken_time(summary['audio']['hours'])} of "
        "audio"
    )


def run_command(out: Path) -> str | None:
    """The command line that made a recipe's run; None of a folder that no recipe made."""
    record = out / "recipe.json"
    if not record.is_file():
        return None
    return shlex.join(["wordless", *json.loads(record.read_text(encoding="utf-8"))["command"]])


def as_text(shown: dict[str, Any]) -> str:
    """The headline for a terminal: the measures of all units side by side, and a line for each other
    number."""
    lines = value_lines({key: value for key, value in shown.items() if key != "units"})
    return "\n".join([measures_text(shown["units"]), "", *lines] if shown["units"] else lines)


def format_number(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """A number for a table; a dash for none."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}%}" if percent else f"{value:,.{digits}f}"


def choose_utterance(rows: Manifest, labels: dict[str, Labels]) -> Utterance | None:
    """Of the utterances with all `labels`, one whose length is nearest to half of what the figure shows; with
    phones if any has."""
    silent = rows.column("phones").is_null().to_numpy(zero_copy_only=False)
    order = np.lexsort((np.abs(rows.lengths - SHOWN_SECONDS / 2 * SAMPLE_RATE), silent))
    return next(
        (rows[i] for i in order.tolist() if all(rows[i].id in known for known in labels.values())), None
    )


def change_rates(utterance: Utterance, labels: Mapping[str, Labels]) -> tuple[dict[str, float], float | None]:
    """How often the units of an utterance change, by name of the labels, and how many phones it has, both per
    second."""
    seconds = utterance.length / SAMPLE_RATE
    changes = {
        name: np.count_nonzero(np.diff(matching_labels(utterance, known).astype(np.int64)))
        for name, known in labels.items()
    }
    return {name: count / seconds for name, count in changes.items()}, len(
        utterance.phones
    ) / seconds if utterance.phones else None
