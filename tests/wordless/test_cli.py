"""The command line: its help, configs and overrides, places to run, exit statuses, and what it says about bad
input."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pretrain.config import without_none
from pretrain.data.label_shards import write_shard
from pretrain.data.labels import Labels, commit_labels
from pretrain.data.manifest import Manifest
from pretrain.store.artefact import commit, is_complete, read_meta
from wordless.cli import main
from wordless.verbs import VERBS

TINY = {
    "encoder": {"architecture": "tiny"},
    "batches": {"batch_seconds": 8},
    "training": {"max_steps": 2, "log_every": 1},
    "valid_split": "dev",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `audio` (twelve recordings of noise with transcripts), its `manifest`, a `codebook` and
    `labels`."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        envelope = np.repeat(rng.uniform(0.05, 1, 10 + number), 1600)
        soundfile.write(
            folder / f"audio/{number:02}.wav",
            0.3 * envelope * rng.standard_normal(len(envelope)).clip(-3, 3) / 3,
            16000,
        )
        (folder / f"audio/{number:02}.txt").write_text("a bad cab" if number % 2 else "a cab")
    assert main(["index", str(folder / "audio"), str(folder / "manifest")]) == 0
    codebook = config(folder, "cluster", manifest=folder / "manifest", num_classes=8, out=folder / "codebook")
    assert main(["cluster", codebook]) == 0
    labels = config(
        folder, "encode", manifest=folder / "manifest", codebook=folder / "codebook", out=folder / "labels"
    )
    assert main(["encode", labels]) == 0
    return folder


def config(folder: Path, name: str, **keys: Any) -> str:
    """Write a config as TOML and return its path."""
    import tomli_w

    path = folder / f"{name}.toml"
    path.write_text(
        tomli_w.dumps({key: str(value) if isinstance(value, Path) else value for key, value in keys.items()})
    )
    return str(path)


# Help


def test_help_lists_the_verbs_in_the_order_of_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    places = [
        text.index(f"\n  {name} ")
        for name in [*VERBS, "run", "status", "cancel", "logs", "check", "import", "export"]
    ]
    assert places == sorted(places)


def test_help_imports_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'pydantic', 'faiss', 'submitit'}"
    code = (
        f"import sys, wordless.cli; status = wordless.cli.main(['--help']); sys.exit(status or {heavy} & "
        "sys.modules.keys() or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", [*VERBS, "run", "status", "cancel", "logs", "check", "import", "export"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"Usage: wordless {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [["encod"], ["encode"], ["encode", "--jsn", "a.toml"], ["index", "a.tsv", "b", "--on", "moon"], []],
)
def test_a_mistaken_command_line_ends_with_status_2(argv: list[str]) -> None:
    assert main(argv) == 2


# Configs


def test_every_mistake_in_a_config_is_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(
        tmp_path,
        "hubert",
        out="x",
        objective="hubert",
        manifst="m",
        training={"max_steps": "ten"},
        optimizer={"lrr": 1},
    )
    assert main(["pretrain", path]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(f"{path}: " in line for line in lines)
    told = "\n".join(lines)
    for expected in (
        "manifst: unknown key; did you mean 'manifest'?",
        "manifest: this key is needed",
        "optimizer.lrr: unknown key; did you mean 'lr'?",
        "training.max_steps: Input should be a valid integer, got 'ten'",
    ):
        assert expected in told
    assert "Traceback" not in told


def test_mistakes_in_several_stages_of_a_recipe_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {
        "one": {"verb": "index", "sorce": "a"},
        "two": {"verb": "index", "source": "a", "workers": "many"},
    }
    path = config(tmp_path, "recipe", run="runs", **stages)
    for command in (["run", path], ["check", path]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "one.sorce: unknown key; did you mean 'source'?" in told
        assert "two.workers: Input should be a valid integer" in told


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"verb": "index", "source": "@later"}, "two: '@later' is no earlier stage; there are one"),
        ({"verb": "indx", "source": "a"}, "two: no verb 'indx'; there are speech, index"),
        ({"source": "a"}, "two: a stage needs a `verb`"),
        ({"verb": "transcribe", "manifest": "m", "recognizer": "r", "needs": "txt"}, "two.needs: "),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(
    stage: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, later = ({"verb": "index", "source": "a"} for _ in range(2))
    assert (
        main(["run", config(tmp_path, "recipe", run=tmp_path / "run", one=one, two=stage, later=later)]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_is_refused_and_the_known_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = config(tmp_path, "recipe", run=tmp_path / "run", one={"verb": "index", "source": "a"})
    assert main(["run", recipe, "--skip", "oen"]) == 2
    assert "no stage oen; there are one" in capsys.readouterr().err


def test_a_missing_config_and_a_folder_in_its_place_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", str(tmp_path / "none.toml")]) == 2
    assert f"{tmp_path}/none.toml: no such config file" in capsys.readouterr().err
    assert main(["encode", str(tmp_path)]) == 2
    assert "is a folder; a TOML file is needed" in capsys.readouterr().err


def test_a_config_for_another_verb_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, "c", verb="cluster", manifest=corpus / "manifest", out=tmp_path / "x")
    assert main(["encode", path]) == 2
    assert f"{path}: verb: is a config for another verb than `encode`" in capsys.readouterr().err


def test_overrides_win_over_the_file_and_the_dry_run_prints_toml_that_can_be_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, "c", manifest=corpus / "manifest", out=tmp_path / "file", num_classes=3)
    assert main(["cluster", path, "num_classes=5", f"out={tmp_path / 'override'}", "--dry-run"]) == 0
    text = capsys.readouterr().out
    resolved = tomllib.loads(text)
    assert (resolved["num_classes"], resolved["features"], resolved["out"]) == (
        5,
        "mfcc",
        str(tmp_path / "override"),
    )
    assert not (tmp_path / "override").exists()
    (tmp_path / "resolved.toml").write_text(text)
    assert main(["cluster", str(tmp_path / "resolved.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_classes"] == 5
    assert without_none(read_meta(tmp_path / "override", "codebook")["config"]) == resolved


def test_json_prints_one_object_and_nothing_else_on_stdout(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(corpus / "audio"), str(tmp_path / "m"), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) | {"hours": 0} == json.loads(out) | {
        "found": 12,
        "utterances": 12,
        "quarantined": 0,
        "hours": 0,
    }


def test_a_finished_artefact_is_never_written_over(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (corpus / "manifest/manifest.parquet").read_bytes()
    assert main(["index", str(corpus / "audio"), str(corpus / "manifest")]) == 2
    assert "already holds a finished artefact" in capsys.readouterr().err
    assert (corpus / "manifest/manifest.parquet").read_bytes() == before


# check


def test_check_tells_a_damaged_artefact_from_a_sound_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(corpus / "audio"), str(tmp_path / "m")]) == 0
    assert main(["check", str(tmp_path / "m")]) == 0
    assert "a complete manifest, fingerprint" in capsys.readouterr().out
    table = tmp_path / "m" / "manifest.parquet"
    table.write_bytes(table.read_bytes()[:-1] + b"!")
    assert main(["check", str(tmp_path / "m")]) == 2
    assert "differ from their recorded SHA-256: manifest.parquet" in capsys.readouterr().err
    table.unlink()
    assert main(["check", str(tmp_path / "m")]) == 2
    assert "missing: manifest.parquet" in capsys.readouterr().err
    (tmp_path / "m" / "meta.json").unlink()
    assert main(["check", str(tmp_path / "m")]) == 2
    assert "not a complete artefact" in capsys.readouterr().err


def test_check_reads_a_config_with_its_verb_and_its_resources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "check",
                config(
                    tmp_path, "good", verb="encode", manifest="m", codebook="c", out="l", slurm={"nodes": 1}
                ),
            ]
        )
        == 0
    )
    assert "a valid config for `encode`" in capsys.readouterr().out
    assert (
        main(
            [
                "check",
                config(
                    tmp_path, "bad", verb="encode", manifest="m", codebook="c", out="l", slurm={"node": 1}
                ),
            ]
        )
        == 2
    )
    assert "slurm.node: unknown key; did you mean 'nodes'?" in capsys.readouterr().err


def test_a_source_of_several_that_was_made_anew_is_noticed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of the sources is a file of an artefact."""
    for text in ("one", "two"):
        row = {"audio_filepath": str(corpus / "audio" / "03.wav"), "id": text}
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "speech.jsonl").write_text(json.dumps(row))
        commit(tmp_path / "made", "speech", {}, {}, ["speech.jsonl"])
        sources = [str(corpus / "audio"), str(tmp_path / "made" / "speech.jsonl")]
        path = config(tmp_path, "recipe", run=tmp_path / "run", manifest={"verb": "index", "source": sources})
        assert main(["run", path]) == (0 if text == "one" else 2)
    assert "was made from source_1" in capsys.readouterr().err


# Places


def test_a_recipe_waits_for_the_other_parts_of_a_stage(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = {"verb": "encode", "manifest": str(corpus / "manifest"), "codebook": str(corpus / "codebook")}
    pack = {"verb": "pack", "labels": "@labels", "manifest": encode["manifest"]}
    recipe = config(tmp_path, "recipe", run=tmp_path / "run", labels=encode, units=pack)
    packed = tmp_path / "run" / "units"
    assert main(["run", recipe, "labels.part=1/2"]) == 0
    assert (
        "labels: other parts have not made all of it; units and what follows wait" in capsys.readouterr().err
    )
    assert not packed.exists()
    assert main(["run", recipe, "labels.part=2/2"]) == 0 and is_complete(packed)
    assert main(["run", recipe, "labels.part=1/2"]) == 0  # a job that is started once more
    assert "labels: finished already" in capsys.readouterr().err


def test_a_device_that_is_not_here_ends_with_status_2(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {**TINY["training"], "device": "foo"}
    pretrain = config(
        tmp_path,
        "pretrain",
        objective="hubert",
        manifest=corpus / "manifest",
        labels=corpus / "labels",
        out=tmp_path / "run",
        **{**TINY, "training": training},
    )
    assert main(["pretrain", pretrain]) == 2
    assert "wordless: training.device: 'foo' is not here; torch " in capsys.readouterr().err


def test_a_slurm_dry_run_prints_the_config_and_the_sbatch_text(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = {"partition": "gpu", "gpus_per_node": 4, "tasks_per_node": 4, "time_minutes": 90}
    path = config(
        tmp_path,
        "w",
        manifest=corpus / "manifest",
        out=tmp_path / "w",
        objective="wav2vec2",
        slurm=slurm,
        **TINY,
    )
    assert main(["pretrain", path, "training.max_steps=7", "--on", "slurm", "--dry-run"]) == 0
    text = capsys.readouterr().out
    resolved, sbatch = text.split("# what sbatch would get")
    assert tomllib.loads(resolved)["training"]["max_steps"] == 7
    for line in ("partition=gpu", "gpus-per-node=4", "ntasks-per-node=4", "time=90"):
        assert f"#SBATCH --{line}" in sbatch
    # a file with the settings as they are now
    assert f"# wordless pretrain {tmp_path}/jobs/w/settings-" in sbatch
    assert not (tmp_path / "w").exists()
    assert not (tmp_path / "jobs").exists()


def test_a_recipes_slurm_dry_run_resolves_every_stage(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codebook = {"verb": "cluster", "manifest": "@manifest", "num_classes": 4}
    stages = {"manifest": {"verb": "index", "source": str(corpus / "audio")}, "codebook": codebook}
    path = config(tmp_path, "recipe", run=tmp_path / "run", **stages)
    assert main(["run", path, "--on", "slurm", "--dry-run"]) == 0
    resolved, sbatch = capsys.readouterr().out.split("# what sbatch would get")
    assert tomllib.loads(resolved)["codebook"]["manifest"] == str(tmp_path / "run" / "manifest")
    assert (
        f"# wordless run {tmp_path}/run/jobs/codebook/settings-" in sbatch
        and "--dependency=afterok:manifest" in sbatch
    )


def test_indexing_runs_as_a_local_job(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(corpus / "audio"), str(tmp_path / "m"), "--on", "local", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["utterances"] == 12
    assert f"logs in {tmp_path}/jobs/" in told.err
    assert len(Manifest(tmp_path / "m")) == 12


def test_pretraining_runs_as_a_local_job(corpus: Path, tmp_path: Path) -> None:
    path = config(
        tmp_path,
        "h",
        manifest=corpus / "manifest",
        labels=corpus / "labels",
        out=tmp_path / "h",
        objective="hubert",
        **TINY,
    )
    assert main(["pretrain", path, "--on", "local"]) == 0
    assert is_complete(tmp_path / "h")
    assert json.loads((tmp_path / "h" / "summary.json").read_text())["steps"] == 2


def test_a_users_mistake_inside_a_local_job_keeps_its_status_and_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["index", str(tmp_path / "empty"), str(tmp_path / "m"), "--on", "local"]) == 2
    assert "no audio found" in capsys.readouterr().err


# Bad input, end to end


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    """The command ends with status 2 and its message has every expected part."""
    assert main(argv) == 2
    told = capsys.readouterr().err
    for part in expected:
        assert part in told
    assert "Traceback" not in told


def write_labels(folder: Path, manifest: Manifest, *, codebook: str, extra_frames: int = 0) -> Path:
    frames = [np.zeros(utterance.num_frames + extra_frames, np.uint16) for utterance in manifest]
    write_shard(folder, 0, manifest.ids, frames)
    commit_labels(folder, 1, {}, {}, codebook=codebook, num_classes=8)
    return folder


@pytest.mark.parametrize("verb", ["pretrain", "measure", "pack"])
def test_labels_of_another_length_are_refused(
    verb: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest(corpus / "manifest")
    labels = write_labels(tmp_path / "labels", manifest, codebook="0123456789abcdef", extra_frames=3)
    keys = {"objective": "hubert", **TINY} if verb == "pretrain" else {}
    path = config(tmp_path, verb, manifest=corpus / "manifest", labels=labels, out=tmp_path / "x", **keys)
    refused([verb, path], capsys, str(labels), "labels", "frames", "'0")
    assert not is_complete(tmp_path / "x")


def test_units_of_another_codebook_are_refused_by_the_language_model(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest(corpus / "manifest")
    foreign = write_labels(tmp_path / "labels", manifest, codebook="0123456789abcdef")
    for name, labels in (("ours", corpus / "labels"), ("theirs", foreign)):
        assert (
            main(
                [
                    "pack",
                    config(tmp_path, name, manifest=corpus / "manifest", labels=labels, out=tmp_path / name),
                ]
            )
            == 0
        )
    model = {"dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 16}
    lm = config(
        tmp_path, "lm", corpus=tmp_path / "ours", out=tmp_path / "lm", model=model, training=TINY["training"]
    )
    assert main(["train-lm", lm]) == 0
    capsys.readouterr()
    path = config(tmp_path, "score", corpus=tmp_path / "theirs", lm=tmp_path / "lm", out=tmp_path / "s")
    refused(
        ["score", path], capsys, "codebook", "0123456789abcdef", read_meta(corpus / "codebook")["fingerprint"]
    )


def test_more_classes_than_frames_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, "c", manifest=corpus / "manifest", out=tmp_path / "c", num_classes=5000)
    refused(["cluster", path], capsys, "5000", "frames")


def test_an_artefact_of_another_kind_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(
        tmp_path, "e", manifest=corpus / "codebook", codebook=corpus / "codebook", out=tmp_path / "e"
    )
    refused(
        ["encode", path], capsys, str(corpus / "codebook"), "is a 'codebook'; a 'manifest' is needed here"
    )


def test_duplicate_ids_are_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"audio_filepath": str(corpus / f"audio/0{n}.wav"), "id": "same"} for n in (1, 2)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(
        ["index", str(source), str(tmp_path / "m")], capsys, "'same'", f"{source} line 1", f"{source} line 2"
    )


def test_bad_recordings_are_quarantined_and_the_counts_reconcile(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "audio").mkdir()
    for path in (corpus / "audio").glob("*.wav"):
        os.link(path, tmp_path / "audio" / path.name)
    (tmp_path / "audio" / "empty.wav").touch()
    (tmp_path / "audio" / "noise.flac").write_bytes(b"not audio")
    soundfile.write(tmp_path / "audio" / "short.wav", np.zeros(300), 16000)
    refused(
        ["index", str(tmp_path / "audio"), str(tmp_path / "m")],
        capsys,
        "3 of 15 recordings cannot be used",
        "max_bad_share",
    )
    assert main(["index", str(tmp_path / "audio"), str(tmp_path / "m"), "max_bad_share=0.3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["found"], summary["utterances"], summary["quarantined"]) == (15, 12, 3)
    listed = [json.loads(line) for line in (tmp_path / "m" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {"empty", "noise", "short"}
    assert all(row["reason"] for row in listed)


def test_a_manifest_that_names_a_missing_file_is_refused_by_name(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "audio").mkdir()
    for path in (corpus / "audio").glob("*.wav"):
        os.link(path, tmp_path / "audio" / path.name)
    assert main(["index", str(tmp_path / "audio"), str(tmp_path / "m")]) == 0
    (tmp_path / "audio" / "03.wav").unlink()
    capsys.readouterr()
    encode = config(tmp_path, "e", manifest=tmp_path / "m", codebook=corpus / "codebook", out=tmp_path / "l")
    refused(["encode", encode], capsys, str(tmp_path / "audio" / "03.wav"))
    everything = {**TINY, "split": "train", "batches": {"batch_seconds": 100}}
    train = config(
        tmp_path, "w", manifest=tmp_path / "m", out=tmp_path / "w", objective="wav2vec2", **everything
    )
    refused(["pretrain", train], capsys, str(tmp_path / "audio" / "03.wav"))
    (tmp_path / "audio" / "03.wav").write_bytes((corpus / "audio" / "03.wav").read_bytes())
    assert main(["encode", encode]) == 0  # goes on where it stopped: nothing already written is lost


def test_transcripts_outside_the_vocabulary_are_refused_by_row(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = config(
        tmp_path, "w", manifest=corpus / "manifest", out=tmp_path / "w", objective="wav2vec2", **TINY
    )
    assert main(["pretrain", encoder]) == 0
    keys = {"training": TINY["training"], "batches": TINY["batches"], "characters": "abc "}
    path = config(
        tmp_path, "f", manifest=corpus / "manifest", encoder=tmp_path / "w", out=tmp_path / "f", **keys
    )
    capsys.readouterr()
    refused(
        ["finetune", path], capsys, str(corpus / "manifest"), "'a bad cab' has ['d'], not in the vocabulary"
    )
    assert main(["finetune", path, "characters=abcd "]) == 0
    transcribe = config(
        tmp_path, "t", manifest=corpus / "manifest", recognizer=tmp_path / "f", out=tmp_path / "t"
    )
    assert main(["transcribe", transcribe]) == 0
    assert json.loads((tmp_path / "t" / "summary.json").read_text())["scored_utterances"] == 1


def test_a_run_that_is_no_recogniser_does_not_transcribe(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(
        tmp_path, "t", manifest=corpus / "manifest", recognizer=corpus / "codebook", out=tmp_path / "t"
    )
    refused(["transcribe", path], capsys, str(corpus / "codebook"), "holds no checkpoint")


# import and export


def test_a_trained_model_goes_out_and_back_in_and_the_verbs_take_it(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = {"architecture": "tiny", "front_end": "waveform"}
    trained = config(
        tmp_path,
        "w",
        manifest=corpus / "manifest",
        out=tmp_path / "w",
        objective="wav2vec2",
        **{**TINY, "encoder": encoder},
    )
    assert main(["pretrain", trained]) == 0
    assert main(["export", str(tmp_path / "w"), str(tmp_path / "w.pt"), "--format", "fairseq"]) == 0
    capsys.readouterr()
    refused(
        ["import", str(tmp_path / "w.pt"), str(tmp_path / "run")],
        capsys,
        f"{tmp_path}/w.pt: is a pickle",
        "--allow-pickle",
    )
    assert main(["import", str(tmp_path / "w.pt"), str(tmp_path / "run"), "--allow-pickle", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["format"], summary["objective"], summary["heads"]) == ("fairseq", "wav2vec2", True)
    weights = [next((tmp_path / name).glob("step_*/model.safetensors")).read_bytes() for name in ("w", "run")]
    assert weights[0] == weights[1]

    assert main(["check", str(tmp_path / "run")]) == 0
    keys = {"manifest": corpus / "manifest", "encoder": tmp_path / "run"}
    assert (
        main(
            [
                "cluster",
                config(tmp_path, "c", **keys, features="encoder", layer=1, num_classes=4, out=tmp_path / "c"),
            ]
        )
        == 0
    )
    labels = {"manifest": corpus / "manifest", "codebook": tmp_path / "c", "encoder": tmp_path / "run"}
    assert main(["encode", config(tmp_path, "e", **labels, out=tmp_path / "e")]) == 0
    assert (
        main(["export", str(tmp_path / "c"), str(tmp_path / "c.safetensors"), "--format", "safetensors"]) == 0
    )
    again = [
        str(tmp_path / "c.safetensors"),
        str(tmp_path / "c2"),
        "--codebook",
        "--encoder",
        str(tmp_path / "run"),
    ]
    assert main(["import", *again, "--layer", "1"]) == 0
    assert (
        main(
            ["encode", config(tmp_path, "e2", **labels | {"codebook": tmp_path / "c2"}, out=tmp_path / "e2")]
        )
        == 0
    )
    same = [Labels(tmp_path / "e"), Labels(tmp_path / "e2")]
    assert all(np.array_equal(same[0][name], same[1][name]) for name in same[0].ids)
    tuned = {"training": TINY["training"], "batches": TINY["batches"], "characters": "abcd "}
    assert main(["finetune", config(tmp_path, "f", **keys, **tuned, out=tmp_path / "f")]) == 0
    assert main(["export", str(tmp_path / "f"), str(tmp_path / "f.pth"), "--format", "torchaudio"]) == 0
    told = capsys.readouterr().err
    assert "note: the CTC head is left out: the encoder alone is exported" in told


def test_mistakes_of_import_and_export_end_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        ["import", str(tmp_path / "none.pt"), str(tmp_path / "r")],
        capsys,
        f"{tmp_path}/none.pt: no such file or folder",
    )
    refused(
        ["export", str(tmp_path / "r"), str(tmp_path / "o"), "--format", "fairseq"],
        capsys,
        "holds no checkpoint",
    )
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "o")]) == 2
    refused(
        ["export", str(tmp_path / "r"), str(tmp_path / "o"), "--format", "keras"],
        capsys,
        f"{tmp_path}/r: no such artefact",
    )
    refused(
        ["export", str(tmp_path / "r"), str(tmp_path / "o"), "--format", "npy"],
        capsys,
        f"{tmp_path}/r: no such artefact",
    )
    into = [str(tmp_path / "none.npy"), str(tmp_path / "r")]
    refused(["import", *into, "--layer", "6"], capsys, "import: --layer is for codebooks; say --codebook too")
    refused(
        ["import", *into, "--codebook", "--num-heads", "6"],
        capsys,
        "import: --num-heads is for runs, not codebooks",
    )
    refused(
        ["import", *into, "--codebook"],
        capsys,
        "say what the centroids are of: --mfcc, or --encoder RUN --layer L",
    )
    refused(["import", *into, "--codebook", "--mfcc"], capsys, f"{tmp_path}/none.npy: no such file")


def test_a_codebook_goes_out_and_back_in_and_encodes_the_same_labels(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codebook, plain, manifest = corpus / "codebook", tmp_path / "c.npy", corpus / "manifest"
    assert main(["export", str(codebook), str(plain), "--format", "npy"]) == 0
    assert np.load(plain).shape == (8, 39)
    capsys.readouterr()
    refused(
        ["export", str(codebook), str(tmp_path / "c.pt"), "--format", "fairseq"],
        capsys,
        f"{codebook}: is a codebook, whose formats are npy",
    )
    refused(
        ["export", str(manifest), str(tmp_path / "c"), "--format", "npy"],
        capsys,
        f"{manifest}: is a 'manifest'; what is exported",
    )
    assert main(["import", str(plain), str(tmp_path / "back"), "--codebook", "--mfcc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_classes"] == 8
    assert main(["check", str(tmp_path / "back")]) == 0
    assert (
        main(
            [
                "encode",
                config(tmp_path, "e", manifest=manifest, codebook=tmp_path / "back", out=tmp_path / "labels"),
            ]
        )
        == 0
    )
    theirs, ours = Labels(corpus / "labels"), Labels(tmp_path / "labels")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.ids)


def test_labels_of_two_levels_go_through_every_verb_that_reads_labels(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"manifest": corpus / "manifest"}
    assert (
        main(["cluster", config(tmp_path, "c", **given, num_classes=8, levels=2, out=tmp_path / "codebook")])
        == 0
    )
    assert (
        main(
            [
                "encode",
                config(tmp_path, "e", **given, codebook=tmp_path / "codebook", out=tmp_path / "labels"),
            ]
        )
        == 0
    )
    labels, plain = Labels(tmp_path / "labels"), Labels(corpus / "labels")
    for name in plain.ids:
        assert labels[name].shape == (len(plain[name]), 2) and np.array_equal(
            labels.first_level(name), plain[name]
        )
    given["labels"] = tmp_path / "labels"
    capsys.readouterr()
    assert (
        main(["pretrain", config(tmp_path, "p", **given, objective="hubert", **TINY, out=tmp_path / "run")])
        == 0
    )
    assert "has 2 levels; the targets are level 0" in " ".join(capsys.readouterr().err.split())
    one_level = {**given, "labels": corpus / "labels"}
    assert (
        main(
            [
                "pretrain",
                config(tmp_path, "q", **one_level, objective="hubert", **TINY, out=tmp_path / "plain"),
            ]
        )
        == 0
    )
    weights = [
        next((tmp_path / name).glob("step_*/model.safetensors")).read_bytes() for name in ("run", "plain")
    ]
    # level 0 is the plain codebook's labels, and nothing else was learned from
    assert weights[0] == weights[1]
    capsys.readouterr()
    assert main(["pack", config(tmp_path, "u", **given, out=tmp_path / "units")]) == 0
    assert "has 2 levels; level 0 is packed" in capsys.readouterr().err
    assert main(["pack", config(tmp_path, "v", **one_level, out=tmp_path / "plain_units")]) == 0
    assert read_meta(tmp_path / "units")["fingerprint"] == read_meta(tmp_path / "plain_units")["fingerprint"]
    assert main(["measure", config(tmp_path, "m", **given, out=tmp_path / "measured")]) == 0
    drawn = {"units": {"two": str(tmp_path / "measured")}, "labels": {"two": str(tmp_path / "labels")}}
    assert (
        main(["report", config(tmp_path, "r", manifest=corpus / "manifest", **drawn, out=tmp_path / "page")])
        == 0
    )
