"""`fairseq2:NAME` where fairseq2 is not installed: what is said, and what works all the same."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pretrain.fairseq2 import assets, available
from pretrain.model.encoder import load_encoder
from pretrain.store.artefact import commit, known_by
from pretrain.store.schemes import split_scheme
from pretrain.training.checkpoint import load_weights
from wordless.cli import main
from wordless.recipe import Recipe

NAME = "fairseq2:wav2vec2_base"
RECIPE = """run = "run"
[codebook]
verb = "cluster"
manifest = "speech"
features = "encoder"
encoder = "fairseq2:wav2vec2_base"
layer = 6
[labels]
verb = "encode"
manifest = "speech"
codebook = "@codebook"
encoder = "fairseq2:wav2vec2_base"
[recognizer]
verb = "finetune"
manifest = "speech"
encoder = "fairseq2:wav2vec2_base"
training.max_steps = 1
"""


@pytest.fixture
def without_fairseq2(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(available, "version", version)


def test_a_card_is_told_from_a_folder() -> None:
    assert split_scheme(NAME) == split_scheme(Path(NAME)) == ("fairseq2", "wav2vec2_base")
    assert split_scheme("runs/fairseq2:x") is None and split_scheme("fairseq2") is None
    with pytest.raises(ValueError, match="write fairseq2:NAME"):
        split_scheme("fairseq2:")


def test_the_name_of_a_card_is_read_without_torch() -> None:
    program = "import sys, pretrain.fairseq2.assets; assert not {'torch', 'fairseq2'} & sys.modules.keys()"
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent.parent.parent
    )


@pytest.mark.parametrize("read", [load_weights, load_encoder])
def test_without_fairseq2_a_card_is_refused_with_the_remedy(read: object, without_fairseq2: None) -> None:
    with pytest.raises(
        ValueError,
        match=r"^fairseq2:wav2vec2_base needs fairseq2 0\.8, which is not installed here; install "
        r".*\[fairseq2\]",
    ):
        read(NAME)  # type: ignore[operator]


def test_another_series_of_fairseq2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "version", lambda name: "0.9.2")
    with pytest.raises(ValueError, match=r"needs fairseq2 0\.8; fairseq2 0\.9\.2 is installed"):
        load_weights(NAME)


def test_a_verb_on_a_card_ends_with_status_2_where_fairseq2_is_missing(
    tmp_path: Path, without_fairseq2: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", NAME, str(tmp_path / "out"), "--format", "huggingface"]) == 2
    assert "needs fairseq2 0.8" in capsys.readouterr().err


def test_a_recipe_on_a_card_is_checked_and_planned_without_fairseq2(
    tmp_path: Path,
    without_fairseq2: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert main(["check", "recipe.toml"]) == 0
    assert main(["run", "recipe.toml", "--dry-run", "--on", "slurm"]) == 0
    text = capsys.readouterr().out
    assert text.count('encoder = "fairseq2:wav2vec2_base"') == 3 and "afterok" in text


def test_a_card_is_no_path_into_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a stage writes to the folder that everything is in."""
    monkeypatch.chdir(tmp_path)
    stages = {
        "corpus": {"verb": "index", "source": "audio", "out": "."},
        "codebook": {"verb": "cluster", "encoder": NAME},
    }
    assert Recipe({"run": "run", **stages}, "recipe.toml").reads("codebook") == ()


def test_what_was_made_from_a_card_stands_where_the_card_cannot_be_read(
    without_fairseq2: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As what was made from a folder that is gone."""
    assets.current_fingerprint.cache_clear()
    assert known_by(NAME) == known_by(tmp_path / "gone") == set()
    assets.current_fingerprint.cache_clear()
    monkeypatch.setattr(assets, "load_asset", lambda name: ({}, {}, "0123456789abcdef"))
    assert known_by(NAME) == {"0123456789abcdef"}
    assets.current_fingerprint.cache_clear()


def test_an_artefact_is_known_by_its_own_fingerprint_and_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    fingerprint = commit(tmp_path, "encoder", {}, {}, {"model.safetensors": "a" * 64})
    assert known_by(tmp_path) == {fingerprint, "a" * 16}


@pytest.mark.parametrize("text", ["fairseq2:", "fairseq2: small", "fairseq2:small "])
def test_a_prefix_alone_and_spaces_about_a_name_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no asset card; write fairseq2:NAME"):
        split_scheme(text)
