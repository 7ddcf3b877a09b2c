"""What README.md and CONTRIBUTING.md show is run: commands in order at tiny size, configs as shown, make's targets, links."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import joblib
import numpy as np
import pytest
import soundfile
from sklearn.cluster import KMeans
from transformers import HubertConfig, HubertModel

from pretrain.config import read_toml
from wordless.cli import main
from wordless.recipe import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
KNOWN = {
    "wordless",
    "make",
    ".venv/bin/pre-commit",
    ".venv/bin/python",
}  # first words that are checked here or need no check
SHRUNK = {  # by verb: what makes the README's sizes tiny
    "cluster": ["num_classes=8"],
    "pretrain": ["encoder.architecture=tiny", "training.max_steps=2", "batches.batch_seconds=8"],
    "train-lm": ["training.max_steps=2", "model.dim=16", "model.num_layers=1"],
    "finetune": ["training.max_steps=2", "training.validate_every=1"],
    "sample": ["max_units=20"],
    "train-synthesizer": ["training.max_steps=2", "model.dim=16"],
    "run": ["--dry-run"],  # tests/test_pipeline.py runs the recipes
}


def fences(page: Path, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line.removeprefix("$ ") for fence in fences(page, "sh|console") for line in fence.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_shown_is_one_that_these_tests_know() -> None:
    assert {words[0] for page in PAGES for words in commands(page)} <= KNOWN


def test_the_readmes_commands_run_in_order_from_a_folder_of_audio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    Path("audio").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        envelope = np.repeat(rng.uniform(0.05, 1, 12 + number % 5), 1600)
        soundfile.write(
            f"audio/{number:02}.wav", 0.1 * envelope * rng.standard_normal(len(envelope)).clip(-3, 3), 16000
        )
        Path(f"audio/{number:02}.txt").write_text("one two" if number % 2 else "two one")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (8,) * 7,
    }
    HubertModel(HubertConfig(**sizes, num_conv_pos_embedding_groups=2)).save_pretrained("hubert-base-ls960")
    joblib.dump(KMeans(8, n_init=1, random_state=0).fit(rng.standard_normal((50, 16))), "km.bin")
    Path("units.txt").write_text("".join(f"{number}|{number} 1 2\n" for number in range(100)))
    Path("pairs.csv").write_text("positive,negative\n00,01\n02,03\n04,05\n")
    shutil.copyfile("audio/07.wav", "hello.wav")
    np.save("centroids.npy", rng.standard_normal((8, 39)).astype(np.float32))
    for fence in fences(ROOT / "README.md", "toml"):
        name = re.match(r"# (\S+\.toml)\n", fence)
        assert name is not None, f"the first line of a config says where it goes: {fence}"
        Path(name[1]).write_text(fence)
        assert main(["check", name[1]]) == 0
    for words in commands(ROOT / "README.md"):
        if words[0] == "wordless":
            assert main([*words[1:], *SHRUNK.get(words[1], [])]) == 0, shlex.join(words)
    assert "</html>" in Path("runs/own/report.html").read_text()
    assert soundfile.info("continuations.wav").duration > 2
    (hello,) = {
        json.loads(line)["document"]
        for line in Path("runs/own/samples_hello/samples.jsonl").read_text().splitlines()
    }
    assert hello == "hello.wav"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_within_the_text_is_a_pattern_not_a_step(page: Path) -> None:
    """What a user may copy lies in a block of commands, where it is run; in a sentence it has a word in capitals to be replaced."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    verbs = "|".join(VERBS)
    for inline in re.findall(rf"`(wordless (?:{verbs}|import|export|run|check) [^`]+)`", text):
        assert re.search(r"\b[A-Z]{2,}\b", inline), f"{page.name}: `{inline}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_two_commands_shown_write_to_one_place(page: Path) -> None:
    tables = {
        match[1]: tomllib.loads(fence)
        for fence in fences(page, "toml")
        if (match := re.match(r"# (\S+\.toml)\n", fence))
    }
    outs = []
    for words in commands(page):
        if (
            words[0] == "wordless"
            and words[1] in {*VERBS, "run"}
            and words[2] in tables
            and "--dry-run" not in words
        ):
            given = dict(word.split("=", 1) for word in words[3:] if "=" in word)
            outs += [given.get("out", tables[words[2]]["out"])]
    assert len(outs) == len(set(outs)), outs


def test_the_configs_of_the_other_pages_are_valid(tmp_path: Path) -> None:
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.stem != "formats"]
    configs = [fence for page in pages for fence in fences(page, "toml")]
    assert configs
    for config in configs:
        (tmp_path / "config.toml").write_text(config)
        assert main(["check", str(tmp_path / "config.toml")]) == 0, config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_make_targets_shown_exist(page: Path) -> None:
    shown = [words for words in commands(page) if words[0] == "make"]
    assert shown
    for words in shown:
        done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_readme_lists_every_recipe() -> None:
    text = (ROOT / "README.md").read_text()
    for recipe in (ROOT / "recipes").glob("*.toml"):
        assert read_toml(recipe)
        assert f"recipes/{recipe.name}" in text
