"""`~` and variables wherever a command takes a path: arguments, overrides, recipes, and what a job is
given."""

import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tomli_w

from pretrain.store.artefact import is_complete, read_meta
from wordless.cli import main
from wordless.recipe import Recipe
from wordless.recipe_jobs import plan
from wordless.recipe_run import RecipeRun

NO_SPLITS = ["dev_share=0.0", "test_share=0.0"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a recording, and where commands are given, elsewhere."""
    (tmp_path / "home/audio").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    soundfile.write(tmp_path / "home/audio/x.wav", np.zeros(16000), 16000)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("WORDLESS_NONE", raising=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_arguments_and_overrides_are_paths_of_the_user(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "~/audio", "$SCRATCH/m", *NO_SPLITS]) == 0
    config = read_meta(tmp_path / "scratch/m")["config"]
    assert (config["source"], config["out"]) == (str(home / "audio"), str(tmp_path / "scratch/m"))
    assert main(["check", "${SCRATCH}/m"]) == 0
    (home / "c.toml").write_text('source = "$HOME/audio"\ndev_share = 0.0\ntest_share = 0.0\n')
    assert main(["index", "~/c.toml", "out=~/m"]) == 0 and main(["check", "~/c.toml"]) == 2  # it has no verb
    assert is_complete(home / "m") and os.listdir() == []
    capsys.readouterr()
    assert main(["index", "~/c.toml", "out=~/m2", "--dry-run"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["out"] == str(home / "m2")


def test_what_cannot_be_replaced_or_is_empty_is_a_message(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "c.toml").write_text('source = "$HOME/audio"\n')
    for argv, message in (
        (
            ["index", "~/c.toml", "out=$WORDLESS_NONE/x"],
            "c.toml: out: '$WORDLESS_NONE/x' has the variable $WORDLESS_NONE, which is not set",
        ),
        (["index", "~/c.toml", "out="], "c.toml: out: is '', and a path is needed"),
        (["index", "~/audio", ""], "out: is '', and a path is needed"),
        (["check", "$WORDLESS_NONE/x"], "$WORDLESS_NONE, which is not set"),
        (["export", "$WORDLESS_NONE/x", "a", "--format", "km"], "$WORDLESS_NONE, which is not set"),
        (["import", "a", "", "--allow-pickle"], "is '', and a path is needed"),
        (["status", "~no-such-user/run"], "is no user's home here"),
    ):
        assert main(argv) == 2
        said = capfd.readouterr().err
        assert message in " ".join(said.replace("│", " ").split()) and "Traceback" not in said
    assert os.listdir() == []


def test_a_recipe_and_the_settings_of_its_jobs_have_the_paths_that_are_meant(
    home: Path, tmp_path: Path
) -> None:
    tree = {
        "run": "~/run",
        "manifest": {
            "verb": "index",
            "source": ["$HOME/audio"],
            "dev_share": 0.0,
            "test_share": 0.0,
            "speaker_pattern": "(x)$SCRATCH|(x)",
        },
        "codebook": {
            "verb": "cluster",
            "manifest": "${HOME}/run/manifest",
            "num_classes": 2,
            "out": "$SCRATCH/codebook",
        },
        "labels": {"verb": "encode", "manifest": "@manifest", "codebook": "@codebook"},
    }
    recipe = Recipe(tree, "r.toml")
    assert recipe.folder == home / "run"
    assert recipe.parse("labels").codebook == str(tmp_path / "scratch/codebook")
    assert recipe.reads("codebook") == ("manifest",) and recipe.reads("labels") == ("manifest", "codebook")
    jobs = plan(RecipeRun(recipe, ["manifest", "codebook"]), write=True)
    first, second = (tomllib.loads(Path(job.argv[1]).read_text(encoding="utf-8")) for job in jobs)
    assert first["run"] == str(home / "run") and first["manifest"]["source"] == [str(home / "audio")]
    assert first["manifest"]["speaker_pattern"] == "(x)$SCRATCH|(x)"  # no path
    assert second["codebook"]["manifest"] == str(home / "run/manifest") and second["codebook"]["out"] == str(
        tmp_path / "scratch/codebook"
    )
    (home / "r.toml").write_text(
        tomli_w.dumps(tree | {"manifest": tree["manifest"] | {"speaker_pattern": "(x)"}}), encoding="utf-8"
    )  # type: ignore[operator]
    assert main(["run", "~/r.toml", "--only", "manifest"]) == 0 and is_complete(home / "run/manifest")
    assert os.listdir() == []
