"""The numbers of a run's page, which are its `summary.json`, and the few of them that a terminal shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE
from pretrain.store.artefact import is_complete, read_meta
from quantize.quality import FORMATS
from wordless.report import recognition
from wordless.report.run_stages import LeftOut, Stage, Stages


def summarise(
    manifest: Manifest, stages: Stages, records: Mapping[str, Mapping[str, Any]], left_out: Sequence[LeftOut]
) -> dict[str, Any]:
    """The contents of `summary.json`: audio, stages, pretrain, layers, units, lm, suites, sounds, ctc,
    transfer and left_out."""
    ran = [(name, it) for name, it in records.items() if "seconds" in it and it["verb"] != "report"]
    ran.sort(key=lambda item: item[1]["began"])

    def of_each(group: str) -> dict[str, Any]:
        return {name: stage.read() for name, stage in stages[group].items()}

    def of_one(group: str) -> dict[str, Any]:
        return {key: value for found in of_each(group).values() for key, value in found.items()}

    splits = {
        group: {name: {"split": stage.meta["config"]["split"]} for name, stage in stages[group].items()}
        for group in ("layers", "units")
    }
    return {
        "audio": count_audio(manifest),
        "stages": {name: {"verb": it["verb"], "seconds": it["seconds"]} for name, it in ran},
        "pretrain": of_each("pretrain"),
        "layers": {name: found | splits["layers"][name] for name, found in of_each("layers").items()},
        "units": {
            name: found | splits["units"][name] | origin(stages["units"][name])
            for name, found in of_each("units").items()
        },
        "lm": of_one("lm_scores") | ({"training": stages["lm"]["lm"].read()} if stages["lm"] else {}),
        "suites": of_each("suites"),
        "sounds": of_one("sounds"),
        "ctc": recognition.summarise_recognisers(stages["ctc"], stages["transcripts"]),
        "transfer": {key: value for key, value in of_one("transfer").items() if key != "cells"},
        "left_out": {known.stage: known.reason for known in left_out},
    }


def count_audio(manifest: Manifest) -> dict[str, Any]:
    """Hours, utterances and speakers, in all and by split; `held_out` are the splits that share no speaker
    with `train`, and `with_…` the numbers of utterances that have a speaker, a transcript, or phone times."""

    def speakers(rows: Manifest) -> set[str | None]:
        return set(rows.column("speaker").to_pylist())

    def count(rows: Manifest) -> dict[str, Any]:
        hours = float(rows.lengths.sum() / SAMPLE_RATE / 3600)
        return {"hours": hours, "utterances": len(rows), "speakers": len(speakers(rows) - {None})}

    splits = {
        split: manifest.select(split)
        for split in sorted(manifest.splits, key=lambda split: (split != "train", split))
    }
    trained = speakers(splits["train"]) | {None} if "train" in splits else speakers(manifest)
    return {
        **count(manifest),
        **{
            f"with_{column}": len(manifest) - manifest.column(column).null_count
            for column in ("speaker", "text", "phones")
        },
        "quarantined": read_meta(manifest.folder)["num_quarantined"],
        "splits": {split: count(rows) for split, rows in splits.items()},
        "held_out": [split for split, rows in splits.items() if not speakers(rows) & trained],
    }


def origin(stage: Stage) -> dict[str, Any]:
    """What the measured units were clustered from, if their codebook is still there."""
    labels = stage.meta["config"]["labels"]
    codebook = read_meta(labels)["config"].get("codebook") if is_complete(labels) else None
    meta: dict[str, Any] = read_meta(codebook) if codebook and is_complete(codebook) else {}
    if meta.get("fingerprint") != stage.meta["parents"]["codebook"]:
        return {}
    layer = meta["source"].get("layer")
    if layer is None:
        return {"features": meta["source"]["kind"].upper()}
    choice = {
        "chosen_by": meta["fit"].get("chosen_by", "given"),
        "pnmi_by_layer": meta["fit"].get("sweep", {}),
    }
    return {"features": f"layer {layer}", "layer": layer, **choice}


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers to print at the end of a run, under the keys of the summary."""
    lm = ("bits_per_unit", "trigram_bits_per_unit", "bigram_bits_per_unit", "unigram_bits_per_unit")
    heard = ("frame_agreement_copy", "frame_agreement_resynthesis", "frame_agreement_commonest_unit")
    shown = {
        "audio": ("hours", "utterances", "quarantined"),
        "lm": lm,
        "sounds": heard,
        "ctc": ("wer_pretrained", "wer_scratch"),
    }
    numbers = {
        group: {key: summary[group][key] for key in keys if key in summary[group]}
        for group, keys in shown.items()
    }
    units = {
        name: {key: unit[key] for key in FORMATS if key in unit} for name, unit in summary["units"].items()
    }
    layers = {name: sweep["layer"] for name, sweep in summary["layers"].items()}
    minutes = sum(stage["seconds"] for stage in summary["stages"].values()) / 60
    return {
        "audio": numbers["audio"],
        "layer": layers,
        "units": units,
        "lm": numbers["lm"],
        "sounds": numbers["sounds"],
        "ctc": numbers["ctc"],
        "transfer": {
            f"{point['budget']}.{point['system']}": point["wer"]
            for point in recognition.first_test(summary["transfer"])
        },
        "minutes": minutes,
    }
