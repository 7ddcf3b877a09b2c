"""The verb `report`: one self-contained page of a run, `report.html`, and its numbers, `summary.json`, in the run's folder.

It reads what other stages wrote and computes nothing anew but the comparison of recognisers (units/recognition.py). A stage whose
folder is not complete is left out, and the page says so. Both files may be written again at any time: each is replaced in one piece,
and nothing else in the folder is touched.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import soundfile
from pydantic import Field

from pretrain.artefact import atomic_path, git_commit, is_complete, library_versions, read_meta, write_json
from pretrain.audio import SAMPLE_RATE
from pretrain.config import Config, Split, flatten
from pretrain.labels import Labels
from pretrain.manifest import Manifest, Utterance
from quantize.quality import FORMATS, measures_text, table_groups
from units import recognition
from units.figures import SHOWN_SECONDS, STYLE, PhoneCounts, draw_curves, draw_matrix, draw_utterance, svg_image
from units.listening import as_data_uri

KINDS = {
    "pretrain": "encoder", "layers": "layer-sweep", "units": "measurement", "labels": "labels", "lm": "unit-lm", "lm_scores": "scores",
    "suites": "scores", "samples": "samples", "synthesizer": "synthesizer", "sounds": "sounds", "ctc": "recognizer",
    "transcripts": "transcripts", "transfer": "transfer",
}  # fmt: skip
SHOWN_SOUNDS = 4  # utterances, and continuations, that the page plays
SAME = 0.005  # differences below this are called neither better nor worse


class ReportConfig(Config):
    """`out` is the run's folder. Tables map a name that the page uses to the folder of a stage; units are compared with `mfcc`."""

    out: str
    title: str = "A run of wordless"
    manifest: str
    split: Split = Field("test", description='the utterance to draw is one of these; "": of all')
    pretrain: dict[str, str] = Field({}, description="name -> pretraining run")
    layers: dict[str, str] = Field({}, description="name -> sweep over an encoder's layers, `measure` with `layers`")
    units: dict[str, str] = Field({}, description="name -> measurement; the last one's matrix is drawn")
    labels: dict[str, str] = Field({}, description="name -> labels to draw")
    lm: str | None = None
    lm_scores: str | None = None
    suites: dict[str, str] = Field({}, description="name -> scores of a suite of minimal pairs")
    samples: str | None = None
    synthesizer: str | None = None
    sounds: str | None = Field(None, description="what `synthesize` made: played in the page")
    ctc: dict[str, str] = Field({}, description="name -> fine-tuning run; `pretrained` and `scratch` are compared")
    transcripts: dict[str, str] = Field({}, description="name -> transcripts, under the names of `ctc`")
    transfer: str | None = Field(None, description="what `transfer` made: the curve is drawn")


class Stage(NamedTuple):
    """A complete artefact that the page tells of."""

    name: str
    folder: Path
    meta: dict[str, Any]

    def read(self, name: str = "summary.json") -> Any:
        return json.loads((self.folder / name).read_text())

    def lines(self, name: str) -> list[Any]:
        with open(self.folder / name, encoding="utf-8") as file:  # not splitlines(), which also breaks at U+2028
            return [json.loads(line) for line in file]

    def phone_counts(self) -> PhoneCounts:
        """Of a measurement."""
        joint = np.load(self.folder / "joint.npy", allow_pickle=False)
        return PhoneCounts(self.read("phones.json"), joint, self.meta["config"]["silence"])


Stages = dict[str, dict[str, Stage]]


def report(config: ReportConfig) -> dict[str, Any]:
    """Write `out/report.html` and `out/summary.json`; returns the headline numbers and the page's path."""
    manifest, out = Manifest(config.manifest), Path(config.out)
    stages, omitted = find_stages(config)
    summary = summarise(config, manifest, stages)
    labels = {name: open_labels(stage.folder, manifest) for name, stage in stages["labels"].items()}
    utterance = choose_utterance(manifest.select(config.split if config.split in manifest.splits else None), labels)
    counts = {name: known for name, stage in stages["units"].items() if (known := stage.phone_counts()).phones}
    trained = ("pretrain", "lm", "synthesizer", "ctc")
    runs = {group: {name: stage.lines("metrics.jsonl") for name, stage in stages[group].items()} for group in trained}
    with matplotlib.rc_context(STYLE):
        figures = {
            "curves": draw_curves(runs, summary["lm"]),
            "utterance": draw_utterance(utterance, labels, counts) if utterance else None,
            "matrix": draw_matrix(list(counts.values())[-1]) if counts else None,
            "transfer": next((svg_image((s.folder / "transfer.svg").read_bytes()) for s in stages["transfer"].values()), None),
            "layers": {name: svg_image((stage.folder / "layers.svg").read_bytes()) for name, stage in stages["layers"].items()},
        }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    pages.filters |= {
        "number": format_number,
        "points": recognition.points,
        "difference": recognition.difference,
        "p_value": recognition.p_value,
    }
    page = pages.get_template("report.html.j2").render(
        config=config, manifest=manifest, stages=stages, omitted=omitted, summary=summary, words=in_words(summary),
        measures=table_groups(list(summary["units"].values())), figures=figures, utterance=utterance, shown_seconds=SHOWN_SECONDS, matrix_of=list(counts)[-1] if counts else "",
        transcripts=recognition.transcript_examples(stages["transcripts"]), worst=recognition.worst_examples(stages["transcripts"]),
        speakers=(by_speaker := recognition.speaker_table(stages["transcripts"]))[:recognition.SHOWN_SPEAKERS], num_speakers=len(by_speaker), transfer_rows=recognition.transfer_rows(summary["transfer"]),
        samples=[line for stage in stages["samples"].values() for line in stage.lines("samples.jsonl")[:4]],
        listening=[group for stage in stages["sounds"].values() for group in listening_groups(stage)],
        versions={**library_versions(), "matplotlib": matplotlib.__version__}, git_commit=git_commit(),
    )  # fmt: skip
    with atomic_path(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(out / "summary.json", summary)
    return {**headline(summary), "report": str(out / "report.html")}


def find_stages(config: ReportConfig) -> tuple[Stages, list[str]]:
    """The complete stages by group and name, and a line for each that is not complete. Another kind of artefact: ValueError."""
    stages: Stages = {}
    omitted = []
    for group, kind in KINDS.items():
        value = getattr(config, group)
        folders = value if isinstance(value, dict) else {group: value} if value else {}
        complete = {name: Path(folder) for name, folder in folders.items() if is_complete(folder)}
        stages[group] = {name: Stage(name, folder, read_meta(folder, kind)) for name, folder in complete.items()}
        if kind == "scores":
            for stage in stages[group].values():
                require_scores(stage, group)
        omitted += [
            f"{folder} ({' '.join(dict.fromkeys((group, name)))})" for name, folder in folders.items() if name not in complete
        ]
    return stages, omitted


def require_scores(stage: Stage, group: str) -> None:
    """Scores of a suite are `suites`, and those of a split `lm_scores`; others: ValueError."""
    known = stage.read()
    if (mine := "suites" if "accuracy" in known else "lm_scores") != group:
        raise ValueError(
            f"{stage.folder}: holds the scores of a {'suite' if mine == 'suites' else 'split'}; give it under `{mine}`, not `{group}`"
        )
    if group == "lm_scores" and "trigram_bits_per_unit" not in known:
        raise ValueError(f"{stage.folder}: scored by an older wordless; remove it and score again")


def open_labels(folder: Path, manifest: Manifest) -> Labels:
    """Labels of this very manifest, or ValueError."""
    labels = Labels(folder)
    if (theirs := labels.meta["parents"].get("manifest")) != manifest.fingerprint:
        raise ValueError(f"{folder}: labels of manifest {theirs}, but {manifest.folder} is {manifest.fingerprint}; encode this one")
    return labels


# Numbers


def summarise(config: ReportConfig, manifest: Manifest, stages: Stages) -> dict[str, Any]:
    """What `summary.json` holds: audio, stages, pretrain, layers, units, lm, suites, sounds, ctc and transfer."""
    read = {path.stem: json.loads(path.read_text()) for path in Path(config.out, "stages").glob("*.json")}
    ran = {name: record for name, record in read.items() if "seconds" in record and record["verb"] != "report"}
    records = dict(sorted(ran.items(), key=lambda item: item[1]["began"]))
    lm = {key: value for stage in stages["lm_scores"].values() for key, value in stage.read().items()}
    sounds = {key: value for stage in stages["sounds"].values() for key, value in stage.read().items()}
    return {
        "audio": count_audio(manifest),
        "stages": {name: {"verb": record["verb"], "seconds": record["seconds"]} for name, record in records.items()},
        "pretrain": {name: stage.read() for name, stage in stages["pretrain"].items()},
        "layers": {name: {**stage.read(), "split": stage.meta["config"]["split"]} for name, stage in stages["layers"].items()},
        "units": {
            name: {**stage.read(), "split": stage.meta["config"]["split"], **origin(stage)}
            for name, stage in stages["units"].items()
        },
        "lm": lm | ({"training": stages["lm"]["lm"].read()} if stages["lm"] else {}),
        "suites": {name: stage.read() for name, stage in stages["suites"].items()},
        "sounds": sounds,
        "ctc": recognition.summarise_recognisers(stages["ctc"], stages["transcripts"]),
        "transfer": {key: value for stage in stages["transfer"].values() for key, value in stage.read().items() if key != "cells"},
    }


def count_audio(manifest: Manifest) -> dict[str, Any]:
    """Hours, utterances and speakers, in all and by split; `held_out` are the splits that share no speaker with `train`."""

    def speakers(rows: Manifest) -> set[str | None]:
        return set(rows.column("speaker").to_pylist())

    def count(rows: Manifest) -> dict[str, Any]:
        hours = float(rows.lengths.sum() / SAMPLE_RATE / 3600)
        return {"hours": hours, "utterances": len(rows), "speakers": len(speakers(rows) - {None})}

    splits = {split: manifest.select(split) for split in sorted(manifest.splits, key=lambda split: (split != "train", split))}
    trained = speakers(splits["train"]) | {None} if "train" in splits else speakers(manifest)
    return {
        **count(manifest),
        "quarantined": read_meta(manifest.folder)["num_quarantined"],
        "splits": {split: count(rows) for split, rows in splits.items()},
        "held_out": [split for split, rows in splits.items() if not speakers(rows) & trained],
    }


def origin(stage: Stage) -> dict[str, Any]:
    """What the measured units were clustered from, if their codebook still stands."""
    labels = stage.meta["config"]["labels"]
    codebook = read_meta(labels)["config"].get("codebook") if is_complete(labels) else None
    meta: dict[str, Any] = read_meta(codebook) if codebook and is_complete(codebook) else {}
    if meta.get("fingerprint") != stage.meta["parents"]["codebook"]:
        return {}
    layer = meta["source"].get("layer")
    if layer is None:
        return {"features": meta["source"]["kind"].upper()}
    choice = {"chosen_by": meta["fit"].get("chosen_by", "given"), "pnmi_by_layer": meta["fit"].get("sweep", {})}
    return {"features": f"layer {layer}", "layer": layer, **choice}


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers to print at the end of a run, under the keys of the summary."""
    lm = ("bits_per_unit", "trigram_bits_per_unit", "bigram_bits_per_unit", "unigram_bits_per_unit")
    heard = ("frame_agreement_copy", "frame_agreement_resynthesis", "frame_agreement_commonest_unit")
    shown = {"audio": ("hours", "utterances", "quarantined"), "lm": lm, "sounds": heard, "ctc": ("wer_pretrained", "wer_scratch")}
    numbers = {group: {key: summary[group][key] for key in keys if key in summary[group]} for group, keys in shown.items()}
    units = {name: {key: unit[key] for key in FORMATS if key in unit} for name, unit in summary["units"].items()}
    layers = {name: sweep["layer"] for name, sweep in summary["layers"].items()}
    minutes = sum(stage["seconds"] for stage in summary["stages"].values()) / 60
    return {
        "audio": numbers["audio"],
        "layer": layers,
        "units": units,
        "lm": numbers["lm"],
        "sounds": numbers["sounds"],
        "ctc": numbers["ctc"],
        "transfer": {f"{point['budget']}.{point['system']}": point["wer"] for point in recognition.first_test(summary["transfer"])},
        "minutes": minutes,
    }


def as_text(shown: dict[str, Any]) -> str:
    """The headline for a terminal: the measures of all units side by side, and a line for each other number."""
    others = flatten({key: value for key, value in shown.items() if key != "units"})
    lines = [f"{key:<40} {value:.4g}" if isinstance(value, float) else f"{key:<40} {value}" for key, value in others.items()]
    return "\n".join([measures_text(shown["units"]), "", *lines] if shown["units"] else lines)


def in_words(summary: dict[str, Any]) -> list[str]:
    """The run in a few sentences that follow from the numbers, whichever way they point."""
    audio, units, lm, ctc = (summary[group] for group in ("audio", "units", "lm", "ctc"))
    spoken = f"{audio['hours']:.2f} hours" if audio["hours"] >= 1 else f"{audio['hours'] * 60:.1f} minutes"
    by = f" by {audio['speakers']} speakers" if audio["speakers"] else ""
    words = [f"The corpus is {spoken} of speech in {audio['utterances']:,} utterances{by}."]
    judged = (*units.values(), lm, *ctc.get("transcripts", {}).values())
    splits = {numbers["split"] for numbers in judged if "split" in numbers}
    if len(splits) == 1 and (split := splits.pop()) is not None:
        unseen = ", whose speakers were never heard in training" if split in audio["held_out"] else ""
        words.append(f"Results are those on the {split} split{unseen}.")
    learned = {name: unit for name, unit in units.items() if "pnmi" in unit and name != "mfcc"}
    if learned and "pnmi" in units.get("mfcc", {}):
        name, last, mfcc = list(learned)[-1], list(learned.values())[-1], units["mfcc"]
        about = "about the phones"
        verdict = compare(last["pnmi"], mfcc["pnmi"], f"less {about} than", f"as much {about} as", f"more {about} than")
        words.append(f"The units of {name} tell {verdict} units from MFCC: PNMI {last['pnmi']:.3f} against {mfcc['pnmi']:.3f}.")
        if last["num_classes"] != mfcc["num_classes"]:
            words.append("Their numbers of classes differ, so this comparison is not a fair one.")
        best = max(learned, key=lambda name: learned[name]["pnmi"])
        if learned[best]["pnmi"] > last["pnmi"] + SAME:
            words.append(f"Those of {best} are better, with {learned[best]['pnmi']:.3f}.")
    elif units and not any("pnmi" in unit for unit in units.values()):
        words.append("There are no phone alignments, so how well the units match phones is not known.")
    if "bits_per_unit" in lm:
        bits = lm["bits_per_unit"]
        floors = {name: lm[f"{name}_bits_per_unit"] for name in ("trigram", "bigram", "unigram")}
        best = min(floors, key=floors.__getitem__)
        verdict = compare(bits, floors[best], f"beats the {best}", f"is no better than a {best}", f"is worse than a {best}")
        others = ", ".join(f"{name} {value:.2f}" for name, value in floors.items() if name != best)
        words.append(f"The unit language model {verdict}: {bits:.2f} bits per unit against {floors[best]:.2f} ({others}).")
    if "frame_agreement_resynthesis" in (sounds := summary["sounds"]):
        back, copy = sounds["frame_agreement_resynthesis"], sounds.get("frame_agreement_copy")
        ceiling = f" ({copy:.0%} from the recording's own spectrogram, inverted alike)" if copy is not None else ""
        words.append(f"Of the units spoken again from units, {back:.0%} come back{ceiling}.")
    words += recognition.recognisers_in_words(ctc, SAME) + recognition.transfer_in_words(summary["transfer"])
    return words


def compare(value: float, other: float, less: str, same: str, more: str) -> str:
    """The phrase for how `value` stands to `other`."""
    return same if abs(value - other) < SAME else less if value < other else more


def format_number(value: float | None, digits: int = 2, percent: bool = False) -> str:
    """A number for a table; a dash for none."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}%}" if percent else f"{value:,.{digits}f}"


def listening_groups(sounds: Stage) -> list[dict[str, Any]]:
    """Of each document the players: `document`, `text`, and `players` with kind, sound as a data URI and seconds of prompt."""
    groups: dict[str, dict[str, Any]] = {}
    for line in sounds.lines("sounds.jsonl"):
        of_model = line["kind"] in ("prompt", "continuation")
        group = groups.setdefault(
            f"{line['document']} {of_model}", {"document": line["document"], "of_model": of_model, "players": []}
        )
        group |= {"text": line["text"]} if "text" in line else {}
        group["players"].append({"kind": line["kind"], "file": line["audio_filepath"], "prompt": line.get("prompt_seconds")})
    shown = [group for kind in (False, True) for group in [g for g in groups.values() if g["of_model"] is kind][:SHOWN_SOUNDS]]
    for player in [player for group in shown for player in group["players"]]:
        waveform, _ = soundfile.read(sounds.folder / player["file"], dtype="float32")
        player["source"] = as_data_uri(waveform)
    return shown


def choose_utterance(rows: Manifest, labels: dict[str, Labels]) -> Utterance | None:
    """Of the utterances with all `labels`, one whose length is nearest to half of what the figure shows; with phones if any has."""
    silent = rows.column("phones").is_null().to_numpy(zero_copy_only=False)
    order = np.lexsort((np.abs(rows.lengths - SHOWN_SECONDS / 2 * SAMPLE_RATE), silent))
    return next((rows[i] for i in order.tolist() if all(rows[i].id in known for known in labels.values())), None)
