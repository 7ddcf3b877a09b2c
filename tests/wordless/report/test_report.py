"""`report` on small runs made with the artefacts' own writers: noise for audio, invented losses."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pretrain.ctc.curve import write_curve
from pretrain.ctc.error_rates import error_rates
from pretrain.data.label_shards import write_shard
from pretrain.data.labels import commit_labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.store.artefact import commit
from pretrain.store.disk import write_json
from quantize.codebook import write_codebook
from quantize.layer_figure import draw_layers
from quantize.measuring import MeasureConfig, measure
from wordless.report.readings import in_words
from wordless.report.report import ReportConfig, as_text, report

HOSTILE = "<script>alert('x')</script> $a_{b \\frac & \"c"
NUM_CLASSES = 6


def write_speech(run: Path, text: str | None, phones: bool) -> Manifest:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number, split in enumerate(["train", "train", "dev", "test", "test", "test"]):
        name = f"{split}-{number}"
        (run / "audio").mkdir(parents=True, exist_ok=True)
        soundfile.write(run / "audio" / f"{name}.wav", 0.1 * rng.standard_normal(8000), 16000)
        alignment = [(0.0, 0.1, "sil"), (0.1, 0.3, "$a$"), (0.3, 0.5, "<b>")] if phones else None
        where = {
            "path": str(run / "audio" / f"{name}.wav"),
            "start": 0,
            "num_samples": 8000,
            "sample_rate": 16000,
        }
        rows.append(
            {
                "id": name,
                **where,
                "split": split,
                "speaker": f"{split} speaker",
                "text": text,
                "phones": alignment,
            }
        )
    quarantine = [{"id": "bad", "path": "bad.wav", "reason": "is empty"}]
    write_manifest(run / "manifest", rows, {}, {}, quarantine)
    return Manifest(run / "manifest")


def write_units(run: Path, manifest: Manifest, name: str, source: dict[str, Any], quality: float) -> None:
    """A codebook, labels that follow the phones in `quality` of the frames, and their measurement on the test
    split."""
    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((1, NUM_CLASSES, 4))
    fit = {"sweep": {"0": 0.2, "1": 0.3}, "chosen_by": "highest PNMI on 'dev'"} if "layer" in source else {}
    codebook = write_codebook(run / f"codebook_{name}", centroids, np.zeros(4), source, fit, {}, {})
    truth = (np.arange(24) > 4).astype(int) + (np.arange(24) > 14)
    noisy = [
        np.where(rng.random(24) < quality, truth, rng.integers(0, NUM_CLASSES, 24)) for _ in manifest.ids
    ]
    write_shard(run / f"labels_{name}", 0, manifest.ids, noisy)
    config = {"codebook": str(run / f"codebook_{name}"), "encoder": None}
    parents = {"manifest": manifest.fingerprint, "codebook": codebook}
    commit_labels(run / f"labels_{name}", 1, config, parents, codebook=codebook, num_classes=NUM_CLASSES)
    labels, out = str(run / f"labels_{name}"), str(run / f"units_{name}")
    measure(MeasureConfig(manifest=str(run / "manifest"), labels=labels, out=out, split="test"))


def write_sweep(run: Path) -> None:
    """A layer sweep as `measure` writes one, of invented numbers."""
    (run / "layers1").mkdir()
    layers = {
        str(layer): {"pnmi": 0.2 + layer / 10, "perplexity": 4.0, "abx_within_features": 0.2}
        for layer in range(3)
    }
    summary = {"layers": layers, "layer": 2, "chosen_by": "highest PNMI on 'dev'"}
    write_json(run / "layers1" / "summary.json", summary)
    draw_layers(summary).savefig(run / "layers1" / "layers.svg", metadata={"Date": None})
    commit(run / "layers1", "layer-sweep", {"split": "dev"}, {}, ["summary.json", "layers.svg"], choice={})


def write_training(folder: Path, kind: str, metric: str, config: dict[str, Any], **extra: Any) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "loss": 5 - step / 10, metric: 4 - step / 10, f"valid_{metric}": 4.0}
        for step in (10, 20, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "steps": 30,
        "seconds": 1.5,
        "loss_first": 4.0,
        "loss_last": 2.0,
        "valid_loss": 4.0,
        "valid_accuracy": 0.1,
    }
    write_json(folder / "summary.json", summary)
    commit(folder, kind, config, {}, ["summary.json"], **extra)


def write_language_model(run: Path) -> None:
    write_training(run / "lm", "unit-lm", "bits", {})
    floors = {
        "unigram_bits_per_unit": 2.5,
        "bigram_bits_per_unit": 2.2,
        "trigram_bits_per_unit": 2.3,
        "uniform_bits_per_unit": 2.8,
    }
    bits = {
        "bits_per_unit": 2.0,
        "bits_per_unit_ci95": [1.9, 2.1],
        **floors,
        "bits_below_bigram": 0.2,
        "bits_below_bigram_ci95": [0.1, 0.3],
    }
    rates = {
        "perplexity": 4.0,
        "bits_per_second": 40.0,
        "bits_per_frame": 0.8,
        "num_documents": 3,
        "num_units": 60,
        "num_text_symbols": 7,
        "num_tokens": 70,
    }
    write_json(
        run / "lm_scores" / "summary.json", {"split": "test", **bits, **rates, "seconds_of_speech": 1.5}
    )
    commit(run / "lm_scores", "scores", {}, {}, ["summary.json"])
    (run / "samples").mkdir()
    line = {
        "document": "test-3",
        "prompt": [1, 2],
        "continuation": [3] * 80,
        "log_likelihood": -1.0,
        "finished": False,
    }
    (run / "samples" / "samples.jsonl").write_text(json.dumps(line) + "\n")
    commit(run / "samples", "samples", {}, {}, ["samples.jsonl"])


def write_sounds(run: Path) -> None:
    """A synthesizer's training, an utterance and a continuation as `synthesize` writes them, and a suite's
    scores."""
    write_training(run / "synthesizer", "synthesizer", "loss", {})
    (run / "sounds").mkdir()
    lines = []
    for number, (document, kind) in enumerate(
        [("test-3", "original"), ("test-3", "resynthesis"), ("test-4", "prompt"), ("test-4", "continuation")]
    ):
        soundfile.write(run / "sounds" / f"{number}.wav", 0.1 * np.sin(np.arange(4000) / (9 + number)), 16000)
        more = (
            {"prompt_seconds": 0.1}
            if kind == "continuation"
            else {"text": HOSTILE}
            if kind == "original"
            else {}
        )
        lines.append({"document": document, "kind": kind, "audio_filepath": f"{number}.wav", **more})
    (run / "sounds" / "sounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trip = {
        "documents": 1,
        "frame_agreement_resynthesis": 0.4,
        "unit_error_rate_resynthesis": 0.6,
        "frame_agreement_commonest_unit": 0.05,
    }
    write_json(run / "sounds" / "summary.json", trip)
    commit(run / "sounds", "sounds", {}, {}, ["sounds.jsonl", "summary.json"])
    scorers = {
        name: {"accuracy": accuracy}
        for name, accuracy in (("bigram", 0.6), ("unigram", 0.55), ("length", 0.5))
    }
    write_json(
        run / "swuggy" / "summary.json",
        {"by": "mean", "accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "scorers": scorers},
    )
    commit(run / "swuggy", "scores", {}, {}, ["summary.json"])


def write_recogniser(run: Path, manifest: Manifest, name: str, wer: float, hypothesis: str) -> None:
    """A recogniser and its transcripts of the test split; its rates are `wer` and half of that, all else is
    of the transcripts."""
    write_training(run / f"ctc_{name}", "recognizer", "cer", {"budget": "5min"}, label_minutes=5.0)
    rows = manifest.select("test")
    texts = [utterance.text for utterance in rows]
    said, speakers = [hypothesis] * (len(rows) - 1) + [""], ["hers", "his", "his"]
    words = [[{"start": 0.1, "end": 0.3, "word": "one"}]] * (len(rows) - 1) + [None]
    (run / f"text_{name}").mkdir()
    table = {"id": rows.ids, "speaker": speakers, "text": texts, "hypothesis": said, "words": words}
    pq.write_table(pa.table(table), run / f"text_{name}" / "transcripts.parquet")
    scores = error_rates(rows.ids, speakers, texts, said)
    write_json(run / f"text_{name}" / "summary.json", {**scores, "utterances": 3, "wer": wer, "cer": wer / 2})
    decoding = {"method": "greedy", "lm": None}
    commit(run / f"text_{name}", "transcripts", {"split": "test", "decoding": decoding}, {}, ["summary.json"])


def write_transfer(run: Path) -> None:
    """A curve of two budgets, of which pretraining helps at one beyond chance, on two tests."""
    out = run / "transfer"
    out.mkdir()
    tests, budgets = ("clean", "other"), (("10min", 10.2, 0.5, 0.8), ("1h", 60.1, 0.3, 0.31))
    curve = [
        {
            "test": test,
            "budget": budget,
            "system": system,
            "seeds": 2,
            "counted": "words",
            "label_minutes": minutes,
            "wer": wer,
            "wer_interval": [wer - 0.02, wer + 0.03],
            "wer_seeds": [wer, wer],
        }
        for test in tests
        for budget, minutes, *wers in budgets
        for system, wer in zip(("pretrained", "scratch"), wers, strict=True)
    ]
    comparisons = [
        {
            "test": test,
            "budget": budget,
            "system": "pretrained",
            "baseline": "scratch",
            "wer_difference": ours - theirs,
            "wer_difference_interval": [ours - theirs - 0.02, ours - theirs + 0.02],
            "p_value": p,
        }
        for test in tests
        for (budget, _, ours, theirs), p in zip(budgets, (1e-10, 0.4), strict=True)
    ]
    write_json(
        out / "summary.json", {"cells": [], "baseline": "scratch", "curve": curve, "comparisons": comparisons}
    )
    write_curve(out, curve)
    commit(out, "transfer", {}, {}, ["summary.json", "transfer.svg"])


def write_run(
    run: Path, *, text: str | None = "one two three", phones: bool = True, lm: bool = True
) -> ReportConfig:
    """A run with what is asked for; the config names every stage, as a recipe does."""
    manifest = write_speech(run, text, phones)
    write_units(run, manifest, "mfcc", {"kind": "mfcc"}, 0.3)
    write_units(run, manifest, "iteration1", {"kind": "encoder", "encoder": "e", "layer": 1}, 0.9)
    write_training(run / "hubert1", "encoder", "prediction_loss", {})
    if phones:
        write_sweep(run)
    if lm:
        write_language_model(run)
        write_sounds(run)
    if text:
        write_recogniser(run, manifest, "pretrained", 0.25, "one too three")
        write_recogniser(run, manifest, "scratch", 0.75, HOSTILE)
        write_transfer(run)
    records = {
        "labels1": {"verb": "encode", "began": 8.0, "seconds": 2.5, "summary": {}},
        "hubert1": {"verb": "pretrain", "began": 2.0, "seconds": 1.5, "summary": {}},
        "ctc_words": {"verb": "finetune", "skipped": "the manifest has no words"},
        "lm": {"verb": "train-lm", "began": 9.0, "host": "here", "pid": 1},  # at work
        "report": {"verb": "report", "began": 1.0, "seconds": 9, "summary": {}},
    }
    for name, record in records.items():
        write_json(run / "stages" / f"{name}.json", record)
    names, models = ("mfcc", "iteration1"), ("pretrained", "scratch")
    return ReportConfig(
        out=str(run),
        title="A <small> run",
        manifest=str(run / "manifest"),
        pretrain={"iteration1": str(run / "hubert1")},
        layers={"iteration1": str(run / "layers1")} if phones else {},
        units={name: str(run / f"units_{name}") for name in names},
        labels={name: str(run / f"labels_{name}") for name in names},
        lm=str(run / "lm"),
        lm_scores=str(run / "lm_scores"),
        suites={"swuggy": str(run / "swuggy")} if lm else {},
        samples=str(run / "samples"),
        synthesizer=str(run / "synthesizer"),
        sounds=str(run / "sounds"),
        ctc={name: str(run / f"ctc_{name}") for name in models},
        transcripts={name: str(run / f"text_{name}") for name in models},
        transfer=str(run / "transfer"),
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> ReportConfig:
    config = write_run(tmp_path_factory.mktemp("report") / "run")
    report(config)
    return config


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not written as SVG, which is most of the time of a page whose figures a test does
    not look at."""
    monkeypatch.setattr("wordless.report.figures.as_image", lambda _: "data:image/svg+xml;base64,")


class Loads(HTMLParser):
    """What a page would fetch or run."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]


def page_of(config: ReportConfig) -> str:
    return Path(config.out, "report.html").read_text()


def test_the_summary_holds_the_numbers_of_every_stage(full: ReportConfig) -> None:
    summary = json.loads(Path(full.out, "summary.json").read_text())
    assert summary["audio"]["hours"] == pytest.approx(3 / 3600)
    assert (summary["audio"]["utterances"], summary["audio"]["quarantined"]) == (6, 1)
    assert summary["audio"]["splits"]["test"] == {
        "hours": pytest.approx(1.5 / 3600),
        "utterances": 3,
        "speakers": 1,
    }
    assert summary["audio"]["held_out"] == ["dev", "test"]
    told = [
        ("hubert1", {"verb": "pretrain", "seconds": 1.5}),
        ("labels1", {"verb": "encode", "seconds": 2.5}),
    ]
    assert list(summary["stages"].items()) == told  # what ran to its end, in the order in which it began
    assert (
        summary["pretrain"]["iteration1"]["loss_first"],
        summary["pretrain"]["iteration1"]["loss_last"],
    ) == (4.0, 2.0)
    assert 0 < summary["units"]["mfcc"]["pnmi"] < summary["units"]["iteration1"]["pnmi"] < 1
    assert summary["units"]["mfcc"]["features"] == "MFCC"
    assert summary["units"]["iteration1"]["layer"] == 1
    assert summary["layers"]["iteration1"]["layer"] == 2
    lm = summary["lm"]
    assert (lm["bits_per_unit"], lm["unigram_bits_per_unit"], lm["bigram_bits_per_unit"]) == (2.0, 2.5, 2.2)
    assert (lm["perplexity"], lm["bits_per_second"]) == (4.0, 40.0)
    ctc = summary["ctc"]
    assert (ctc["wer_pretrained"], ctc["wer_scratch"], ctc["cer_pretrained"], ctc["cer_scratch"]) == (
        0.25,
        0.75,
        0.125,
        0.375,
    )


def test_the_page_loads_nothing_from_elsewhere(full: ReportConfig) -> None:
    page = page_of(full)
    loads = Loads(page)
    assert not {"script", "link", "iframe", "object", "embed"} & set(loads.tags)
    # Four panels of curves, the transfer curve, two panels of layers, the utterance, the matrix, and four
    # sounds.
    assert len(loads.sources) == 13
    assert "url(" not in page
    assert "@import" not in page
    for source in loads.sources:
        prefix, content = source.split(",", 1)
        if prefix in ("data:audio/mpeg;base64", "data:audio/wav;base64"):
            continue
        assert prefix == "data:image/svg+xml;base64"
        svg = base64.b64decode(content).decode()
        assert "<script" not in svg
        assert all(link.startswith(("#", "data:")) for link in re.findall(r'href="([^"]*)"', svg))


@pytest.mark.usefixtures("undrawn")
def test_abx_is_between_the_same_neighbours_only_where_its_context_says_so(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, lm=False)
    folder = tmp_path / "run" / "units_mfcc"
    summary, meta = (json.loads((folder / name).read_text()) for name in ("summary.json", "meta.json"))
    write_json(folder / "summary.json", {**summary, "abx_within": 0.1, "abx_across": 0.2})
    for context, told in (("triphone", True), ("phoneme", True), ("any", False)):
        write_json(folder / "meta.json", {**meta, "config": {**meta["config"], "abx_context": context}})
        report(config)
        page = page_of(config)
        assert "ABX error is how often" in page and ("between the same neighbours" in page) is told


def test_the_page_tells_what_the_stages_found(full: ReportConfig) -> None:
    page = page_of(full)
    assert "The units of iteration1 carry more information about the phone than units from MFCC" in page
    assert (
        "The unit language model beats the bigram: 2.00 bits per unit against 2.20 (trigram 2.30, unigram "
        "2.50)." in page
    )
    assert "1.90 to 2.10" in page and "0.800 bits per 20 ms frame" in page
    bigram = '<td>2.200</td><td class="whole"></td><td>4.6</td><td>44.0</td>'
    assert bigram in page  # the model's 40 bits a second, times 2.2 / 2.0
    assert "60 units and 7 symbols of text of 3 utterances of the test split" in page
    assert "Units turned into sound and encoded again are the same in 40% of the frames." in page
    assert "For comparison: 5% for always guessing the commonest unit." in page
    assert "Continuation of test-4" in page and "(the model takes over at 0.1 s)" in page
    assert (
        "<td>swuggy</td><td><b>70.0%</b></td><td>60.0% to "
        "80.0%</td><td>60.0%</td><td>55.0%</td><td>50.0%</td>" in page
    )
    assert (
        "Pretraining makes no certain difference to the recogniser: 25.0% of words wrong, 75.0% from "
        "random weights (95% inter" in page
    )
    assert "whose speakers were never heard in training" in page
    assert '<span class="wrong">too</span>' in page
    assert "Trained on 5.0 minutes of transcribed speech." in page
    assert "no complete output" not in page
    assert "Left out as unusable: 1 (quarantine.jsonl" in page


def test_the_page_has_every_measure_by_units_and_the_plot_of_layers(full: ReportConfig) -> None:
    page, units = page_of(full), json.loads(Path(full.out, "summary.json").read_text())["units"]
    for title, key, form in (
        ("PNMI", "pnmi", ".3f"),
        ("V-measure", "v_measure", ".3f"),
        ("phone told from a unit", "phone_accuracy", ".1%"),
    ):
        cells = "".join(f"<td>{format(units[name][key], form)}</td>" for name in ("mfcc", "iteration1"))
        assert f"<tr><td>{title}</td>{cells}</tr>" in page
    assert "iteration1: layer 2 (highest PNMI on &#39;dev&#39;)" in page
    assert page.count("No speaker probe: ") == 1  # the same note of both units is given once


def test_the_terminal_gets_the_measures_side_by_side(full: ReportConfig) -> None:
    shown = report(full)
    lines = as_text(shown).splitlines()
    assert lines[0].split() == ["mfcc", "iteration1"]
    pnmi = next(line for line in lines if line.split()[0] == "PNMI").split()[1:]
    assert pnmi == [f"{shown['units'][name]['pnmi']:.3f}" for name in ("mfcc", "iteration1")]
    assert any(line.split() == ["layer.iteration1", "2"] for line in lines)
    assert any(line.split() == ["ctc.wer_scratch", "0.75"] for line in lines)
    bare = {**shown, "units": {}}
    assert as_text(bare).splitlines()[0].split()[0] == "audio.hours"


def test_the_page_tells_how_recognisers_err(full: ReportConfig) -> None:
    page, ctc = page_of(full), json.loads(Path(full.out, "summary.json").read_text())["ctc"]
    interval = ctc["transcripts"]["pretrained"]["wer_interval"]
    assert interval == [pytest.approx(1 / 3), 1.0]  # an utterance is wrong in 1 or 3 of 3 words
    assert '<tr><td>pretraining</td><td><b>25.0%</b></td><td class="whole">33.3% to 100.0%</td>' in page
    assert "<td>2</td><td>0</td><td>3</td><td>9</td><td>0.0%</td></tr>" in page
    # one of three words, and all three
    assert "<tr><td>his</td><td>2</td><td>6</td><td>66.7%</td><td>" in page
    assert (
        "decoded greedily, without a language model." in page and "Worst utterances: random weights" in page
    )
    assert "3 edits of 3; test-5" in page and "one 0.10–0.30" in page
    found = ctc["comparisons"]["pretrained"]
    assert (found["baseline"], found["utterances"]) == ("scratch", 3) and found["wer_difference"] < 0
    # Two of three utterances differ, by as much: chance has both signs alike half of the time.
    assert (
        found["p_value"] == pytest.approx(0.5)
        and "p = 0.5 (paired permutation test over 3 utterances)" in page
    )


def test_the_page_has_the_transfer_curve_and_its_table(full: ReportConfig) -> None:
    page, shown = page_of(full), report(full)
    assert (
        "On clean, pretraining lowers the word error rate beyond chance at 1 of 2 budgets of labels" in page
    )
    assert "(−30.0 points with 10min, −1.0 points with 1h)" in page
    assert (
        '<tr><td>clean</td><td class="left">10min</td><td>10.2</td><td><b>50.0%</b></td><td '
        'class="whole">48.0% to 53.0%</td>' in page
    )
    assert '<td class="whole">−30.0 (−32.0 to −28.0 points)</td><td class="whole">&lt; 0.0001</td>' in page
    assert "Points are means over 2 seeds." in page
    assert shown["transfer"] == {
        "10min.pretrained": 0.5,
        "10min.scratch": 0.8,
        "1h.pretrained": 0.3,
        "1h.scratch": 0.31,
    }


@pytest.mark.usefixtures("undrawn")
def test_transcripts_of_an_older_wordless_have_their_rates_alone(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", lm=False)
    for name in ("pretrained", "scratch"):
        folder = tmp_path / "run" / f"text_{name}"
        write_json(folder / "summary.json", {"utterances": 3, "wer": 0.25, "cer": 0.1})
        commit(folder, "transcripts", {"split": "test"}, {}, ["summary.json"])
    report(config)
    page = page_of(config)
    assert (
        '<td><b>25.0%</b></td><td class="whole">–</td><td>10.0%</td>' in page
        and "Errors of the recogniser" not in page
    )


@pytest.mark.usefixtures("undrawn")
def test_transcripts_of_several_splits_are_told_with_theirs(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", lm=False)
    report(config)
    assert "Judged on the test split, decoded" in page_of(
        config
    ) and "Results are those on the test split" in page_of(config)
    meta = tmp_path / "run" / "text_scratch" / "meta.json"
    tree = json.loads(meta.read_text())
    write_json(meta, {**tree, "config": {**tree["config"], "split": None}})
    report(config)
    page = page_of(config)
    assert "Judged on the test split (pretrained), the whole corpus (scratch), decoded" in page
    assert "Results are those on" not in page


def test_text_of_the_corpus_cannot_become_markup(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=HOSTILE, lm=False)
    report(config)
    page = page_of(config)
    assert "script" not in Loads(page).tags
    assert "&lt;script&gt;" in page
    assert "A &lt;small&gt; run" in page


def test_a_run_without_phones_transcripts_and_language_model_has_a_page_that_says_so(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False, lm=False)
    shown = report(config)
    page = page_of(config)
    for absent in (
        "lm",
        "lm_scores",
        "samples",
        "synthesizer",
        "sounds",
        "ctc pretrained",
        "ctc scratch",
        "transcripts pretrained",
        "transcripts scratch",
        "transfer",
    ):
        assert f"({absent})" in page
    assert "There are no phone alignments" in page
    assert "PNMI is" not in page
    assert "Recogniser" not in page
    assert len(Loads(page).sources) == 2  # the curves and the utterance; no matrix
    summary = json.loads(Path(config.out, "summary.json").read_text())
    assert all(summary[group] == {} for group in ("lm", "ctc", "sounds", "suites", "transfer"))
    assert "pnmi" not in summary["units"]["mfcc"]
    assert shown["units"]["mfcc"]["perplexity"] > 1


def test_a_manifest_alone_is_enough(full: ReportConfig, tmp_path: Path) -> None:
    report(ReportConfig(out=str(tmp_path / "new"), manifest=full.manifest, split="no such split"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "summary.json"]


def test_writing_again_gives_the_same_files_and_touches_no_other(full: ReportConfig) -> None:
    run = Path(full.out)

    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = contents()
    shown = report(full)
    assert contents() == before
    assert shown["report"] == str(run / "report.html")
    assert shown["ctc"] == {"wer_pretrained": 0.25, "wer_scratch": 0.75}


def test_labels_of_another_manifest_are_refused_by_name(full: ReportConfig, tmp_path: Path) -> None:
    other = write_speech(tmp_path / "other", None, phones=False)
    with pytest.raises(ValueError, match=rf"labels_mfcc: labels of manifest .* is {other.fingerprint}"):
        report(full.model_copy(update={"manifest": str(other.folder), "out": str(tmp_path / "new")}))


def test_an_artefact_of_the_wrong_kind_is_refused(full: ReportConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'unit-lm' is needed"):
        report(full.model_copy(update={"lm": full.lm_scores, "out": str(tmp_path)}))


def test_scores_under_the_wrong_key_are_refused_with_the_right_one(
    full: ReportConfig, tmp_path: Path
) -> None:
    assert full.lm_scores is not None
    for key, value, problem in (
        (
            "suites",
            {"test": full.lm_scores},
            "lm_scores: holds the scores of a split; give it under `lm_scores`, not `suites`",
        ),
        (
            "lm_scores",
            full.suites["swuggy"],
            "swuggy: holds the scores of a suite; give it under `suites`, not `lm_scores`",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            report(full.model_copy(update={key: value, "out": str(tmp_path)}))


def test_scores_of_an_older_wordless_are_refused(full: ReportConfig, tmp_path: Path) -> None:
    older = {"split": "test", "bits_per_unit": 2.0, "bigram_bits_per_unit": 2.2, "unigram_bits_per_unit": 2.5}
    write_json(tmp_path / "scores" / "summary.json", older)
    commit(tmp_path / "scores", "scores", {}, {}, ["summary.json"])
    with pytest.raises(ValueError, match="scores: scored by an older wordless; remove it and score again"):
        report(full.model_copy(update={"lm_scores": str(tmp_path / "scores"), "out": str(tmp_path)}))


def rewrite_sounds(run: Path, lines: list[dict[str, Any]], trip: dict[str, Any]) -> None:
    (run / "sounds" / "sounds.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    write_json(run / "sounds" / "summary.json", trip)


@pytest.mark.usefixtures("undrawn")
def test_what_is_said_of_sounds_is_true_of_those_that_there_are(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False)
    trip = {
        "documents": 1,
        "frame_agreement_commonest_unit": 0.05,
        "unit_error_rate_resynthesis_predicted": 0.6,
    }
    spoken = {"document": "a\u2028b", "kind": "resynthesis-predicted", "audio_filepath": "1.wav"}
    recording, ceiling = "first player is the recording", "The first row is the ceiling"
    rewrite_sounds(tmp_path / "run", [spoken], trip)  # durations = "predicted", no manifest
    report(config)
    page = page_of(config)
    assert recording not in page and ceiling not in page and "a\u2028b" in page
    assert "<tr><td>from units, predicted durations</td><td>–</td><td>60.0%</td></tr>" in page
    assert (
        "metallic, with a flat melody, in a voice of the training or a mean one" in page
        and "without the speaker" not in page
    )
    original = {"document": "a\u2028b", "kind": "original", "audio_filepath": "0.wav"}
    rewrite_sounds(
        tmp_path / "run",
        [original, spoken],
        {**trip, "frame_agreement_copy": 0.7, "unit_error_rate_copy": 0.4},
    )
    report(config)
    assert recording in page_of(config) and ceiling in page_of(config)


@pytest.mark.usefixtures("undrawn")
def test_only_sounds_that_the_page_plays_are_read(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False)
    kinds = ("resynthesis", "continuation")
    lines = [
        {"document": f"d{i}", "kind": kind, "audio_filepath": "0.wav" if i < 4 else "nowhere.wav"}
        for i in range(9)
        for kind in kinds
    ]
    rewrite_sounds(tmp_path / "run", lines, {})
    report(config)
    page = page_of(config)
    assert page.count("<audio") == 8 and "Continuation of d3" in page and "Units spoken again" not in page


def test_the_words_are_honest_when_learning_did_not_pay(full: ReportConfig) -> None:
    summary = json.loads(Path(full.out, "summary.json").read_text())
    summary["units"]["iteration1"]["pnmi"] = summary["units"]["mfcc"]["pnmi"] - 0.1
    summary["lm"]["bits_per_unit"] = 2.3
    summary["ctc"]["wer_pretrained"] = 0.7501
    words = " ".join(in_words(summary))
    assert "carry less information about the phone than units from MFCC" in words
    assert "is worse than a bigram" in words
    assert "Pretraining makes no difference to the recogniser" in words


def test_an_earlier_iteration_that_was_better_is_named(full: ReportConfig) -> None:
    summary = json.loads(Path(full.out, "summary.json").read_text())
    summary["units"]["iteration2"] = {**summary["units"]["iteration1"], "pnmi": 0.01, "num_classes": 50}
    words = " ".join(in_words(summary))
    assert "The units of iteration2 carry less" in words
    assert "Those of iteration1 are better" in words
    assert "not a fair one" in words


@pytest.mark.usefixtures("undrawn")
def test_the_title_is_the_runs_name_and_how_much_audio_it_is_of_unless_one_is_given(tmp_path: Path) -> None:
    config = write_run(tmp_path / "my talks", text=None, phones=False, lm=False)
    report(config.model_copy(update={"title": None}))
    assert "<title>my talks: speech units from 3 seconds of audio</title>" in page_of(config)
    report(config)
    assert "<title>A &lt;small&gt; run</title>" in page_of(config)


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_without_alignments_has_panels_of_the_usual_size_with_labels_on_both_axes(
    tmp_path: Path,
) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False, lm=False)
    layers = {str(layer): {"perplexity": 80.0 + layer, "speaker_accuracy": 0.5} for layer in range(4)}
    summary = {
        "layers": layers,
        "layer": 2,
        "chosen_by": "no phone alignments to judge layers by, so the middle one: 2 of 3",
    }
    for name, more in (("layers1", {}), ("layers2", {"notes": ["no phone alignments: PNMI needs them"]})):
        write_json(tmp_path / "run" / name / "summary.json", {**summary, **more})
        commit(tmp_path / "run" / name, "layer-sweep", {"split": "dev"}, {}, ["summary.json"], choice={})
    config = config.model_copy(
        update={"layers": {name: str(tmp_path / "run" / name) for name in ("layers1", "layers2")}}
    )
    report(config)
    page = page_of(config)
    assert (
        page.count(">Units in use</figcaption>")
        == page.count(">Speaker probe: lower is better</figcaption>")
        == 2
    )
    # each sweep has its reading
    assert page.count("<p>Without phone alignments there is nothing to compare the layers by") == 2
    assert (
        ">Phones: higher is better</figcaption>" not in page
        and "No phone alignments: PNMI needs them." in page
    )
    figure = draw_layers(summary)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Speaker probe: lower is better",
        "Units in use",
    ]
    assert all(
        axes.get_ylabel() and axes.get_xlabel() == "layer (0: the input of the first)" for axes in figure.axes
    )
    one = draw_layers({**summary, "layers": {layer: {"perplexity": 80.0} for layer in layers}})
    assert one.get_figwidth() == figure.get_figwidth() / 2 == draw_layers(summary).get_figwidth() / 2


def test_every_figure_has_a_text_for_those_who_do_not_see_it(full: ReportConfig) -> None:
    page = page_of(full)
    alts = re.findall(r'<img src="[^"]*" alt="([^"]*)">', page)
    assert len(alts) == page.count("<img") == 9 and all(len(alt) > 40 for alt in alts)


def test_a_continuation_is_played_with_its_prompt_marked_beside_the_recording_that_prompted(
    full: ReportConfig,
) -> None:
    page = page_of(full)
    assert "the recording that begins with the prompt" in page and "the prompt, from units" not in page
    # a sound of a quarter of a second
    assert 'aria-label="0.1 seconds of prompt, then 0.1 seconds by the model"' in page
    assert '<span class="prompt" style="flex: 100"></span><span style="flex: 150"></span>' in page


@pytest.mark.usefixtures("undrawn")
def test_a_prompt_without_a_continuation_is_played_by_itself(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False)
    rewrite_sounds(
        tmp_path / "run", [{"document": "elsewhere", "kind": "prompt", "audio_filepath": "2.wav"}], {}
    )
    report(config)
    assert page_of(config).count("<audio") == 1 and "the prompt, from units" in page_of(config)


@pytest.mark.usefixtures("undrawn")
def test_word_times_are_folded_away_and_those_of_gibberish_are_not_shown(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", lm=False)
    report(config)
    page = page_of(config)
    folded = page[page.index("<summary>When each word was said") :]
    # none of random weights
    assert "one 0.10–0.30" in folded[: folded.index("</details>")] and page.count("one 0.10–0.30") == 2
    summary = tmp_path / "run" / "text_pretrained" / "summary.json"
    write_json(summary, {**json.loads(summary.read_text()), "wer": 0.93})
    report(config)
    page = page_of(config)
    assert "one 0.10–0.30" not in page and "The times of the words are not shown" in page
    assert "so only a few examples are shown" in page


@pytest.mark.usefixtures("undrawn")
def test_what_was_left_out_is_named_with_the_recipes_reason_or_the_stages_own(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False, lm=False)
    reasons = {
        "ctc_pretrained": "3 minutes are asked for, 1.5 are transcribed",
        "lm": "train-lm failed: <no> units",
        "gone": "of no key",
    }
    shown = report(config.model_copy(update={"left_out": reasons}))
    page, summary = page_of(config), json.loads(Path(config.out, "summary.json").read_text())
    section = page[page.index("What was left out, and why") :]
    assert (
        "<code>ctc_pretrained</code> (ctc pretrained): 3 minutes are asked for, 1.5 are transcribed</li>"
        in section
    )
    assert "<code>lm</code> (lm): train-lm failed: &lt;no&gt; units</li>" in section
    assert "<code>gone</code>: of no key</li>" in section
    # a stage that the recipe skipped
    assert "<code>ctc_words</code>: the manifest has no words</li>" in section
    assert "<code>samples</code> (samples): no complete output</li>" in section
    assert summary["left_out"]["lm"] == "train-lm failed: <no> units" and shown["report"].endswith(
        "report.html"
    )
    assert "the manifest has no phone alignments" in section and "alignments=alignments.jsonl" in section
    assert "the manifest has no transcripts" in section and "names no speakers" not in page


@pytest.mark.usefixtures("undrawn")
def test_a_corpus_without_speakers_is_said_to_be_one_and_short_splits_are_warned_of(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False, lm=False)
    folder = tmp_path / "unnamed" / "manifest"
    rows = [
        {"id": u.id, "path": u.path, "start": 0, "num_samples": 8000, "sample_rate": 16000, "split": u.split}
        for u in Manifest(config.manifest)
    ]
    write_manifest(folder, rows, {}, {}, [])
    report(ReportConfig(out=str(tmp_path / "unnamed"), manifest=str(folder)))
    page = (tmp_path / "unnamed" / "report.html").read_text()
    assert (
        "The manifest names no speakers, so the voices of the test recordings may have been heard in "
        "training." in page
    )
    assert "speaker_pattern=" in page and "never heard" not in page[: page.index("What was left out")]
    assert "The test split is only 2 seconds long." in page


@pytest.mark.usefixtures("undrawn")
def test_the_next_step_repeats_the_recipes_own_command(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", text=None, phones=False, lm=False)
    report(config)
    assert "wordless run" not in page_of(config)
    command = ["run", "recipes/demo.toml", "--skip", "speech", "manifest.source=my talks"]
    write_json(tmp_path / "run" / "recipe.json", {"command": command})
    report(config)
    again = (
        "wordless run recipes/demo.toml --skip speech &#39;manifest.source=my talks&#39; "
        "hubert1.training.max_steps=2000 --redo"
    )
    assert again in page_of(config)
