"""The whole pipeline at tiny size, through the command line: the recipes, running again, changed settings,
one's own audio."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pretrain.store.artefact import META_KEY, is_complete, read_meta
from wordless.cli import main

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
DEMO, DEMO_WAV2VEC2 = ROOT / "recipes/demo.toml", ROOT / "recipes/demo_wav2vec2.toml"
SHRUNK = {  # by verb: what makes a stage take a moment
    "speech": {"hours": 0.03, "num_voices": 7, "num_dev_voices": 1, "num_test_voices": 2},
    "cluster": {"num_classes": 16},
    "pretrain": {
        "encoder.architecture": "tiny",
        "batches.batch_seconds": 20,
        "training.max_steps": 4,
        "training.log_every": 2,
        "training.validate_every": 0,
        "optimizer.warmup_steps": 0,
    },
    "train-lm": {
        "model.dim": 32,
        "model.num_layers": 1,
        "training.max_steps": 4,
        "training.validate_every": 0,
    },
    "sample": {"prompt_units": 5, "max_units": 20},
    "train-synthesizer": {"model.dim": 16, "training.max_steps": 3},
    "synthesize": {"num": 2, "iterations": 2},
    "finetune": {
        "budget": "0.5min",
        "training.max_steps": 4,
        "training.validate_every": 0,
        "ctc.freeze_steps": 1,
        "characters": '"abcdefghijklmnopqrstuvwxyz|"',  # half a minute of transcripts has not every letter
    },
}


def shrunk(recipe: Path) -> list[str]:
    stages = {
        name: table["verb"]
        for name, table in tomllib.loads(recipe.read_text()).items()
        if isinstance(table, dict)
    }
    return [
        f"{name}.{key}={value}"
        for name, verb in stages.items()
        for key, value in SHRUNK.get(verb, {}).items()
    ]


def run(recipe: Path, folder: Path, *arguments: str) -> int:
    return main(["run", str(recipe), f"run={folder}", *shrunk(recipe), *arguments])


def written(folder: Path) -> int:
    return (folder / "meta.json").stat().st_mtime_ns


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert run(DEMO, folder) == 0
    return folder


def test_the_demo_ends_with_a_page_and_the_numbers_that_matter(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["audio"]["hours"] == pytest.approx(0.03, rel=0.2)
    assert all(stage["seconds"] > 0 for stage in summary["stages"].values())
    assert {"speech", "hubert1", "labels2", "lm", "text_scratch"} <= summary["stages"].keys()
    for iteration in ("iteration1", "iteration2"):
        assert {"loss_first", "loss_last"} <= summary["pretrain"][iteration].keys()
    assert summary["units"].keys() == {"mfcc", "iteration1", "iteration2"}
    assert all(0 < units["pnmi"] < 1 and units["num_classes"] == 16 for units in summary["units"].values())
    assert {
        "bits_per_unit",
        "unigram_bits_per_unit",
        "bigram_bits_per_unit",
        "trigram_bits_per_unit",
    } <= summary["lm"].keys()
    assert {
        "frame_agreement_resynthesis",
        "frame_agreement_copy",
        "unit_error_rate_resynthesis_predicted",
    } <= summary["sounds"].keys()
    page = (demo / "report.html").read_text()
    # of each utterance recording, copy and twice from units; prompts and continuations
    assert page.count("<audio") == 2 * 4 + 4 * 2
    assert {"wer_pretrained", "wer_scratch"} <= summary["ctc"].keys()
    assert "</html>" in (demo / "report.html").read_text()


def test_the_demo_prints_the_whole_table_for_mfcc_and_both_iterations(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(DEMO, demo) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["mfcc", "iteration1", "iteration2"]
    titles = {" ".join(line.split()[:-3]) for line in lines}
    assert {
        "PNMI",
        "phone purity",
        "cluster purity",
        "V-measure",
        "perplexity",
        "units per second, deduplicated",
    } <= titles
    assert {
        "phone told from features",
        "speaker told from an utterance's units",
        "squared error / variance",
    } <= titles
    units = json.loads((demo / "summary.json").read_text())["units"]
    assert all(
        "abx_within" in of or any("ABX within" in note for note in of["notes"]) for of in units.values()
    )  # half a minute
    layers = json.loads((demo / "layers1" / "summary.json").read_text())
    assert layers["layer"] == read_meta(demo / "codebook1")["source"]["layer"] == units["iteration1"]["layer"]


def test_every_artefact_of_the_demo_passes_check(demo: Path) -> None:
    folders = sorted(path.parent for path in demo.glob("*/meta.json"))
    assert len(folders) == 25
    for folder in folders:
        assert main(["check", str(folder)]) == 0


def test_each_artefact_names_the_fingerprints_of_what_it_was_made_from(demo: Path) -> None:
    metas = {path.parent.name: read_meta(path.parent) for path in demo.glob("*/meta.json")}
    assert metas["manifest"]["parents"] == {"source": metas["speech"]["fingerprint"]}
    assert metas["hubert2"]["parents"]["labels"] == metas["labels1"]["fingerprint"]
    assert metas["labels2"]["codebook"] == metas["codebook2"]["fingerprint"] == metas["corpus"]["codebook"]
    weights = metas["hubert2"]["files"]["step_00000004/model.safetensors"]
    assert (
        metas["codebook2"]["parents"]["sweep"] == metas["layers2"]["fingerprint"]
        and metas["layers2"]["parents"]["encoder"] == weights[:16]
    )
    assert (
        metas["codebook2"]["source"]["encoder"] == weights[:16] == metas["ctc_scratch"]["parents"]["encoder"]
    )


def test_running_again_skips_every_stage(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # which tells when it was made
    files = [path for path in demo.glob("*/*") if path.is_file() and path.name != "report.json"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run(DEMO, demo) == 0
    told = capsys.readouterr().err
    assert told.count("finished already") == 25
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_changed_setting_is_refused_by_name_until_redo_repeats_what_follows_from_it(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy, symlinks=True)
    for path in copy.glob("*/meta.json"):  # the copy's configs are to name the copy's folders
        meta = json.loads(path.read_text().replace(str(demo), str(copy)))
        del meta[META_KEY]  # of what was written; older versions have none
        path.write_text(json.dumps(meta))
    assert run(DEMO, copy, "lm.training.seed=1") == 2
    assert "lm: " in (told := capsys.readouterr().err)
    assert "training.seed: 0 -> 1" in told
    assert "--redo" in told
    before = {name: written(copy / name) for name in ("corpus", "lm", "lm_scores", "samples", "ctc_scratch")}
    assert run(DEMO, copy, "lm.training.seed=1", "--redo", "--only", "lm") == 0
    capsys.readouterr()
    assert run(DEMO, copy, "lm.training.seed=1") == 2  # what was made from the old one is not taken for new
    assert "lm_scores" in (told := capsys.readouterr().err)
    assert "was made from lm" in told
    assert run(DEMO, copy, "lm.training.seed=1", "--redo") == 0
    changed = {name for name in before if written(copy / name) != before[name]}
    assert changed == {"lm", "lm_scores", "samples"}


def test_the_demo_runs_on_a_folder_of_audio_without_transcripts(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = demo / "speech" / "audio"
    assert run(DEMO, tmp_path / "own", "--skip", "speech", f"manifest.source={audio}") == 0
    told = capsys.readouterr().err
    assert told.count("skipped, the manifest has no text") == 4
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert "pnmi" not in summary["units"]["iteration2"]
    assert summary["units"]["iteration2"]["perplexity"] > 1
    assert summary["lm"]["bits_per_unit"] > 0
    assert "wer_pretrained" not in summary["ctc"]
    assert "middle" in read_meta(tmp_path / "own" / "codebook2")["fit"]["chosen_by"]


def odd_folder(name: str, speech: Path, folder: Path) -> Path:
    """A folder that an honest user may have: recordings of `speech`, few of them, all in one, or none with
    speech in it."""
    folder.mkdir()
    rows = [json.loads(line) for line in (speech / "speech.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(0)
    if name == "no speech":
        waves = [0.1 * rng.standard_normal(48_000), np.zeros(48_000), 0.1 * np.sin(np.arange(48_000) / 8)] * 3
    else:
        waves = [soundfile.read(speech / row["audio_filepath"], dtype="float32")[0] for row in rows]
        waves = {"one file": [np.concatenate(waves)], "three files": waves[:3]}.get(name, waves)
    for number, wave in enumerate(waves):
        soundfile.write(folder / f"{number:02d}.wav", wave, 16000)
    for number in range({"few transcripts": 3, "empty transcripts": len(waves)}.get(name, 0)):
        (folder / f"{number:02d}.txt").write_text("" if name == "empty transcripts" else rows[number]["text"])
    return folder


def test_of_a_folder_with_few_transcripts_the_recogniser_is_left_out_right_after_index(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recognisers = (
        odd_folder("few transcripts", demo / "speech", tmp_path / "audio"),
        ("pretrained", "scratch"),
    )
    stages = ["manifest", *(f"{kind}_{name}" for kind in ("ctc", "text") for name in recognisers), "report"]
    only = [word for stage in stages for word in ("--only", stage)]
    assert run(DEMO, tmp_path / "own", "--skip", "speech", f"manifest.source={folder}", *only) == 0
    told = capsys.readouterr().err
    # at once, and at the end
    assert told.count("have a transcript that can be used (at least 1min would do)") == 2 * 2
    assert (
        "text_scratch: left out: needs ctc_scratch, which was left out" in told
        and "4 of 26 stages were left out" in told
    )
    assert (
        "a transcript that can be used (at least 1min would do)"
        in (tmp_path / "own" / "report.html").read_text()
    )


def test_what_is_transcribed_is_used_where_it_is_less_than_the_budget_but_enough(
    demo: Path, tmp_path: Path
) -> None:
    more = [f"run={tmp_path / 'run'}", "ctc_scratch.budget=1h", "ctc_scratch.budget_at_least=10s"]
    paths = [
        f"ctc_scratch.{key}={demo / value}"
        for key, value in (("manifest", "manifest"), ("encoder", "hubert2"))
    ]
    assert main(["run", str(DEMO), *shrunk(DEMO), *more, *paths, "--only", "ctc_scratch"]) == 0
    summary = json.loads((tmp_path / "run" / "stages" / "ctc_scratch.json").read_text())["summary"]
    assert "budget = '1h': " in summary["note"] and summary["label_minutes"] < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three files", "one file", "no speech", "empty transcripts"])
def test_the_demo_ends_with_a_page_on_an_odd_folder(name: str, demo: Path, tmp_path: Path) -> None:
    folder = odd_folder(name, demo / "speech", tmp_path / "audio")
    classes = [f"{stage}.num_classes=16" for stage in ("layers1", "layers2")]
    assert run(DEMO, tmp_path / "own", "--skip", "speech", f"manifest.source={folder}", *classes) == 0
    page = (tmp_path / "own" / "report.html").read_text()
    assert ("transcripts cannot be used" in page) == (name == "empty transcripts")
    if name == "one file":
        assert read_meta(tmp_path / "own" / "manifest")["num_utterances"] >= 3


def test_wav2vec2_runs_the_same_chain(demo: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "wav2vec2"
    assert (
        run(
            DEMO_WAV2VEC2,
            run_folder,
            "--skip",
            "speech",
            f"manifest.source={demo / 'speech' / 'speech.jsonl'}",
        )
        == 0
    )
    summary = json.loads((run_folder / "summary.json").read_text())
    assert {"loss_first", "loss_last", "code_perplexity"} <= summary["pretrain"]["wav2vec2"].keys()
    assert summary["units"]["wav2vec2"]["pnmi"] > 0
    assert summary["units"]["mfcc"]["pnmi"] > 0
    assert summary["lm"]["bits_per_unit"] > 0
    assert {"wer_pretrained", "wer_scratch"} <= summary["ctc"].keys()
    assert is_complete(run_folder / "samples")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe)]) == 0
    assert f"{recipe}: a valid" in capsys.readouterr().out
