"""The verb `measure` on labels: planted units, real codebooks of MFCC and of a tiny encoder, and corpora that
lack something."""

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config import parse_config
from pretrain.data.label_shards import write_shard
from pretrain.data.labels import Labels, commit_labels
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import Utterance, phone_frames
from pretrain.objectives.pnmi import entropy_bits
from pretrain.store.artefact import read_meta
from quantize.abx import Mode, abx
from quantize.clustering import ClusterConfig, cluster
from quantize.codebook import Codebook, write_codebook
from quantize.encoding import encode
from quantize.encoding_plan import EncodeConfig
from quantize.features import MfccSource
from quantize.measuring import MeasureConfig, as_text, measure
from quantize.phone_tokens import phone_items

MODES: tuple[Mode, ...] = ("within", "across")
NAMES = ["", "sil", "aa", "iy", "ss"]


def write_labels(
    folder: Path, labels: dict[str, np.ndarray], num_classes: int, codebook: str = "codebook"
) -> str:
    levels = 1 if (first := next(iter(labels.values()))).ndim == 1 else first.shape[1]
    write_shard(folder, 0, list(labels), list(labels.values()))
    commit_labels(folder, 1, {}, {}, codebook=codebook, num_classes=num_classes, num_levels=levels)
    return str(folder)


def planted_labels(utterances: list[Utterance], num_frames: int = 0) -> dict[str, np.ndarray]:
    """The number of each frame's phone; `num_frames` more than there are."""
    return {
        utterance.id: np.array(
            [
                NAMES.index(phone)
                for phone in phone_frames(utterance.phones or [], utterance.num_frames + num_frames)
            ],
            dtype=np.uint16,
        )
        for utterance in utterances
    }


# Planted labels


def test_measure_of_labels_that_are_the_phones(corpus: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels", planted_labels(list(Manifest(corpus))), 8)
    out = tmp_path / "measured"
    summary = measure(MeasureConfig(manifest=str(corpus), labels=labels, split="dev", out=str(out)))
    rows = list(Manifest(corpus).select("dev"))
    assert summary["pnmi"] == summary["pnmi_speech"] == summary["phone_purity"] == summary["v_measure"] == 1.0
    assert (
        summary["frames"] == summary["frames_with_phones"] == sum(utterance.num_frames for utterance in rows)
    )
    assert (
        0 < summary["silence_share"] < 1 and summary["utterances"] == 3 and summary["bitrate_frames"] == 150.0
    )
    assert json.loads((out / "summary.json").read_text()) == summary
    joint, phones = np.load(out / "joint.npy"), json.loads((out / "phones.json").read_text())
    assert joint.shape == (len(phones), 8) and joint.sum() == summary["frames"]
    meta = read_meta(out, "measurement")
    assert set(meta["files"]) == {"summary.json", "joint.npy", "phones.json"}
    assert meta["parents"]["codebook"] == "codebook"


def test_units_that_are_the_phones_make_no_abx_error_and_tell_the_phone_but_not_the_speaker(
    speech: str, tmp_path: Path
) -> None:
    labels = write_labels(tmp_path / "labels", planted_labels(list(Manifest(speech))), 5)
    summary = measure(
        MeasureConfig(manifest=speech, labels=labels, out=str(tmp_path / "measured"), abx_context="phoneme")
    )
    assert summary["abx_within"] == summary["abx_across"] == 0.0
    assert summary["phone_accuracy"] == 1.0 > summary["phone_majority"]
    assert summary["speaker_accuracy"] < 0.8 and summary["speaker_chance"] == pytest.approx(1 / 3)
    assert summary["judged_utterances"] == 18
    assert [note for note in summary["notes"] if re.match(r"ABX within rests on \d\d comparisons", note)]
    text = as_text(summary)
    assert "units, within speaker" in text and "PNMI" in text and "1.000" in text


def test_units_that_know_nothing_are_judged_as_chance(speech: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = write_labels(
        tmp_path / "labels", {u.id: rng.integers(50, size=u.num_frames) for u in Manifest(speech)}, 50
    )
    summary = measure(
        MeasureConfig(manifest=speech, labels=labels, out=str(tmp_path / "measured"), abx_context="any")
    )
    # Some 1,000 tokens: a standard error of 2 % is generous, as the triples share tokens.
    assert summary["abx_within"] == pytest.approx(0.5, abs=0.06) and summary["abx_across"] == pytest.approx(
        0.5, abs=0.06
    )
    assert summary["phone_accuracy"] == pytest.approx(summary["phone_majority"], abs=0.1)


def test_a_draw_of_utterances_is_the_seeds_and_what_needs_no_draw_is_of_all(
    speech: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    labels = write_labels(
        tmp_path / "labels", {u.id: rng.integers(9, size=u.num_frames) for u in Manifest(speech)}, 9
    )
    same, again, other, whole = (
        measure(
            MeasureConfig(
                manifest=speech,
                labels=labels,
                out=str(tmp_path / f"m{n}"),
                frames=frames,
                seed=seed,
                abx_context="any",
            )
        )
        for n, (frames, seed) in enumerate([(400, 0), (400, 0), (400, 1), (None, 0)])
    )
    assert same == again and same["abx_within"] != other["abx_within"]
    assert 400 <= same["judged_frames"] < 800 < whole["judged_frames"] == whole["frames"] == same["frames"]
    assert same["perplexity"] == other["perplexity"] == whole["perplexity"]


def test_two_levels_are_measured_each_and_together(speech: str, tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), list(Manifest(speech))
    labels = {u.id: np.repeat(rng.integers([6, 3], size=(30, 2)), 2, axis=0)[: u.num_frames] for u in rows}
    folder = write_labels(tmp_path / "labels", labels, 6)
    summary = measure(MeasureConfig(manifest=speech, labels=folder, out=str(tmp_path / "measured")))
    first, second = np.concatenate(list(labels.values())).T
    joint = np.array([pair for frames in labels.values() for pair, _ in groupby(map(tuple, frames.tolist()))])
    seconds = len(first) / 50
    assert summary["num_levels"] == 2 and summary["usage_by_level"] == [1.0, 0.5]
    assert (
        summary["perplexity"]
        == summary["perplexity_by_level"][0]
        == pytest.approx(2 ** entropy_bits(np.bincount(first)))
    )
    assert summary["perplexity_by_level"][1] == pytest.approx(2 ** entropy_bits(np.bincount(second)))
    assert (
        summary["units_per_second"]
        == sum(len(list(groupby(frames[:, 0].tolist()))) for frames in labels.values()) / seconds
    )
    bits = sum(entropy_bits(np.bincount(level)) for level in joint.T)
    assert summary["bitrate_joint"] == pytest.approx(len(joint) / seconds * bits)
    assert summary["bitrate_frames"] == pytest.approx(50 * np.log2(6) * 2)
    assert np.load(tmp_path / "measured" / "joint.npy").shape[1] == 6


# What is missing


def test_measure_without_alignments_gives_what_labels_alone_can_tell(
    make_speech: Callable[..., str], tmp_path: Path
) -> None:
    manifest = make_speech(tmp_path / "speech", ["ann", "bob"], phones=False)
    labels = write_labels(
        tmp_path / "labels", {u.id: np.arange(u.num_frames) % 5 for u in Manifest(manifest)}, 8
    )
    summary = measure(MeasureConfig(manifest=manifest, labels=labels, out=str(tmp_path / "measured")))
    assert (
        not {"pnmi", "abx_within", "abx_across", "phone_accuracy"} & set(summary)
        and summary["usage"] == 5 / 8
    )
    assert {"perplexity", "units_per_second", "bitrate_frames", "bitrate_units", "bitrate_entropy"} <= set(
        summary
    )
    assert 0 <= summary["speaker_accuracy"] <= 1
    assert summary["notes"] == ["no phone alignments: PNMI, purities, ABX and the phone probe need them"]
    assert np.load(tmp_path / "measured" / "joint.npy").shape == (0, 8)


def test_with_one_speaker_what_compares_speakers_is_left_out_and_the_notes_say_so(
    make_speech: Callable[..., str], tmp_path: Path
) -> None:
    manifest = make_speech(tmp_path / "speech", ["ann"])
    labels = write_labels(tmp_path / "labels", planted_labels(list(Manifest(manifest))), 5)
    summary = measure(
        MeasureConfig(manifest=manifest, labels=labels, out=str(tmp_path / "measured"), abx_context="phoneme")
    )
    assert summary["abx_within"] == 0.0 and summary["phone_accuracy"] == 1.0
    assert not {"abx_across", "speaker_accuracy"} & set(summary)
    assert any("ABX across" in note for note in summary["notes"]) and any(
        "speaker probe" in note for note in summary["notes"]
    )


def test_without_speakers_there_is_no_abx_and_the_phone_probe_remains(corpus: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels", planted_labels(list(Manifest(corpus))), 8)
    summary = measure(MeasureConfig(manifest=str(corpus), labels=labels, out=str(tmp_path / "measured")))
    assert summary["phone_accuracy"] == 1.0 and not {"abx_within", "abx_across", "speaker_accuracy"} & set(
        summary
    )
    assert any("speaker" in note for note in summary["notes"])


def test_abx_and_probes_can_be_left_out(speech: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = write_labels(tmp_path / "labels", planted_labels(list(Manifest(speech))), 8)
    monkeypatch.setattr("quantize.judging.histogram", None)  # nobody is to count what nobody reads
    config = MeasureConfig(
        manifest=speech, labels=labels, out=str(tmp_path / "measured"), abx=False, probes=False
    )
    assert not {"abx_within", "phone_accuracy", "speaker_accuracy", "notes"} & set(measure(config))


def test_where_all_is_silence_there_is_no_pnmi_of_speech_and_a_note_says_so(
    speech: str, tmp_path: Path
) -> None:
    labels = write_labels(tmp_path / "labels", planted_labels(list(Manifest(speech))), 8)
    keys: dict[str, Any] = {"manifest": speech, "labels": labels, "abx": False, "probes": False}
    summary = measure(MeasureConfig(**keys, silence=NAMES, out=str(tmp_path / "measured")))
    assert summary["pnmi"] == summary["silence_share"] == 1.0 and "pnmi_speech" not in summary
    assert summary["notes"] == ["no PNMI without silence: every phone is one of `silence`"]
    assert "PNMI without silence" not in as_text(summary)


def test_a_probe_that_stops_early_is_noted(
    speech: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = write_labels(
        tmp_path / "labels", {u.id: rng.integers(9, size=u.num_frames) for u in Manifest(speech)}, 9
    )
    keys: dict[str, Any] = {"manifest": speech, "labels": labels, "abx": False}
    assert not [
        note
        for note in measure(MeasureConfig(**keys, out=str(tmp_path / "m"))).get("notes", [])
        if "stopped" in note
    ]
    monkeypatch.setattr("quantize.probes.MAX_ITERATIONS", 1)
    notes = measure(MeasureConfig(**keys, out=str(tmp_path / "again")))["notes"]
    assert [note for note in notes if re.match(r"a speaker probe stopped after \d+ iterations", note)]
    assert not [note for note in notes if "phone probe" in note]  # of units, that is counting


def test_one_frame_of_difference_is_allowed_and_two_are_not(corpus: Path, tmp_path: Path) -> None:
    utterances = list(Manifest(corpus))
    for extra in (-1, 1):
        labels = write_labels(tmp_path / f"labels{extra}", planted_labels(utterances, extra), 8)
        assert measure(
            MeasureConfig(manifest=str(corpus), labels=labels, out=str(tmp_path / f"measured{extra}"))
        )["pnmi"] == pytest.approx(1.0)
    labels = write_labels(tmp_path / "labels2", planted_labels(utterances, 2), 8)
    frames = utterances[0].num_frames
    with pytest.raises(ValueError, match=rf"utterance 'u00' has {frames + 2} labels and {frames} frames"):
        measure(MeasureConfig(manifest=str(corpus), labels=labels, out=str(tmp_path / "measured2")))


def test_labels_of_another_corpus_are_an_error_that_names_the_utterance(corpus: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels", {"other": np.zeros(10, dtype=np.uint16)}, 8)
    with pytest.raises(ValueError, match="no labels for utterance 'u00'"):
        measure(MeasureConfig(manifest=str(corpus), labels=labels, out=str(tmp_path / "measured")))


# With the codebook


FEATURES = {
    "abx_within_features",
    "abx_across_features",
    "abx_within_centroids",
    "abx_across_centroids",
    "phone_accuracy_features",
    "speaker_accuracy_features",
    "quantisation_error",
}


def test_a_codebook_of_mfcc_needs_no_encoder_and_its_features_are_measured_too(
    speech: str, tmp_path: Path
) -> None:
    # Two classes: fewer than phones, so that the centroids make errors where the features make none.
    cluster(ClusterConfig(manifest=speech, num_classes=2, out=str(tmp_path / "codebook")))
    encode(EncodeConfig(manifest=speech, codebook=str(tmp_path / "codebook"), out=str(tmp_path / "labels")))
    config = MeasureConfig(
        manifest=speech,
        labels=str(tmp_path / "labels"),
        codebook=str(tmp_path / "codebook"),
        out=str(tmp_path / "measured"),
        abx_context="phoneme",
    )
    summary = measure(config)
    assert set(summary) >= FEATURES
    assert summary["abx_within_features"] < 0.2 and summary["phone_accuracy_features"] > 0.8  # tones are easy
    codebook, labels = Codebook.open(tmp_path / "codebook"), Labels(tmp_path / "labels")
    found = {u.id: features for u, features in MfccSource().features(list(Manifest(speech)))}
    frames = np.concatenate(list(found.values())).astype(np.float64)
    centroids = np.concatenate([codebook.decode(labels[name]) for name in found])
    # float64 here and there; centroids come through a float32 sum
    assert summary["quantisation_error"] == pytest.approx(
        ((frames - centroids) ** 2).sum(1).mean() / frames.var(0).sum(), rel=1e-5
    )
    assert sorted(path.name for path in (tmp_path / "measured").iterdir()) == [
        "joint.npy",
        "meta.json",
        "phones.json",
        "summary.json",
    ]
    items = phone_items(list(Manifest(speech)), context="phoneme", silence=config.silence)
    decoded = {name: codebook.decode(labels[name]) for name in found}
    for mode in MODES:
        assert summary[f"abx_{mode}_centroids"] == abx(items, decoded, mode=mode).error
        assert summary[f"abx_{mode}_features"] == abx(items, found, mode=mode).error
    assert summary["abx_within_centroids"] != summary["abx_within_features"]


def test_a_codebook_of_an_encoder_needs_its_encoder(
    speech: str, run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"manifest": speech, "codebook": str(tmp_path / "codebook")}
    cluster(
        ClusterConfig(
            manifest=speech,
            features="encoder",
            encoder=str(run),
            layer=1,
            num_classes=12,
            out=str(tmp_path / "codebook"),
        )
    )
    encode(EncodeConfig(**keys, encoder=str(run), out=str(tmp_path / "labels")))
    keys |= {"labels": str(tmp_path / "labels"), "out": str(tmp_path / "measured"), "abx_context": "phoneme"}
    summary = measure(MeasureConfig(**keys, encoder=str(run)))
    assert set(summary) >= FEATURES and 0 < summary["quantisation_error"] < 1
    assert (
        read_meta(tmp_path / "measured")["parents"]["encoder"]
        == Codebook.open(tmp_path / "codebook").source["encoder"]
    )
    keys["out"] = str(tmp_path / "again")
    with pytest.raises(ValueError, match="encoder: .* quantises layer 1"):
        measure(MeasureConfig(**keys))
    with pytest.raises(ValueError, match="was fitted on encoder"):
        measure(MeasureConfig(**keys, encoder=str(make_run(tmp_path / "other", seed=1))))


def test_each_level_of_a_codebook_takes_some_of_the_error(speech: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = {u.id: features for u, features in MfccSource().features(list(Manifest(speech)))}
    frames = np.concatenate(list(found.values()))
    mean = frames.mean(0)
    first = (frames - mean)[rng.choice(len(frames), 8, replace=False)]
    # one of them changes nothing: no frame gets worse
    second = rng.standard_normal((8, 39)) * 0.5 * (np.arange(8) > 0)[:, None]
    source = {"kind": "mfcc", "cmvn": False}
    fingerprint = write_codebook(tmp_path / "codebook", np.stack([first, second]), mean, source, {}, {}, {})
    codebook = Codebook.open(tmp_path / "codebook")
    labels = {name: codebook.assign(features) for name, features in found.items()}
    folder = write_labels(tmp_path / "labels", labels, 8, fingerprint)
    config = MeasureConfig(
        manifest=speech,
        labels=folder,
        codebook=str(tmp_path / "codebook"),
        out=str(tmp_path / "measured"),
        abx=False,
        probes=False,
    )
    summary = measure(config)
    one, two = summary["quantisation_error_by_level"]
    both = np.concatenate([codebook.decode(levels) for levels in labels.values()])
    assert 1 > one > two == summary["quantisation_error"]
    # frames are float32 here
    assert two == pytest.approx(((frames - both) ** 2).sum(1).mean() / frames.var(0).sum(), rel=1e-4)


def test_a_spherical_codebook_has_no_quantisation_error_and_the_notes_say_so(
    speech: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"manifest": speech, "codebook": str(tmp_path / "codebook")}
    cluster(ClusterConfig(manifest=speech, num_classes=4, spherical=True, out=config["codebook"]))
    encode(EncodeConfig(**config, out=str(tmp_path / "labels")))
    summary = measure(
        MeasureConfig(**config, labels=str(tmp_path / "labels"), out=str(tmp_path / "measured"), probes=False)
    )
    assert "quantisation_error" not in summary and any("spherical" in note for note in summary["notes"])


def test_the_codebook_is_that_of_the_labels_or_an_error_names_both(speech: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        cluster(ClusterConfig(manifest=speech, num_classes=4 + seed, out=str(tmp_path / f"codebook{seed}")))
    labels = write_labels(
        tmp_path / "labels",
        planted_labels(list(Manifest(speech))),
        5,
        Codebook.open(tmp_path / "codebook0").fingerprint,
    )
    with pytest.raises(ValueError, match=r"labels of codebook \w+, and .*codebook1 is"):
        measure(
            MeasureConfig(
                manifest=speech,
                labels=labels,
                codebook=str(tmp_path / "codebook1"),
                out=str(tmp_path / "measured"),
            )
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "either `labels`"),
        ({"labels": "l", "layers": "all", "encoder": "e"}, "either `labels`"),
        ({"layers": "all"}, "`layers` needs `encoder`"),
        ({"layers": [1], "encoder": "e", "codebook": "c"}, "no `codebook`"),
        ({"labels": "l", "encoder": "e"}, "`encoder` needs the `codebook`"),
        ({"labels": "l", "num_classes": 50}, "num_classes: a matter of `layers`"),
        ({"layers": [], "encoder": "e"}, "layers"),
        ({"layers": "some", "encoder": "e"}, "layers"),
        ({"labels": "l", "abx_context": "biphone"}, "abx_context"),
        ({"labls": "l"}, "did you mean 'labels'"),
    ],
)
def test_keys_that_do_not_fit_are_reported(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(MeasureConfig, {"manifest": "m", "out": "o", **keys}, "m.toml")
