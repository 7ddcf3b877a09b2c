"""What README.md, CONTRIBUTING.md and docs/ show is run: commands in order at tiny size, Python as shown,
configs, links."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
import unicodedata
from pathlib import Path

import joblib
import numpy as np
import pytest
import soundfile
from sklearn.cluster import KMeans
from transformers import HubertConfig, HubertModel

from pretrain.config import read_toml
from wordless.cli import main
from wordless.verbs import VERBS

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
KNOWN = {"wordless", "make", ".venv/bin/pre-commit", ".venv/bin/python"}  # checked here, or need no check
WALK = [
    "walk",
    "units-and-lms",
    "weights",
    "recognition",
    "questions",
    "results",
]  # share a folder, in this order
PYTHON_PAGES = ["README", "recognition", "questions"]  # their Python is run in that folder
SHRUNK = {  # by verb: what makes the pages' sizes tiny
    "cluster": ["num_classes=8"],
    "pretrain": ["encoder.architecture=tiny", "training.max_steps=2", "batches.batch_seconds=8"],
    "train-lm": ["training.max_steps=2", "model.dim=16", "model.num_layers=1"],
    "finetune": ["training.max_steps=2", "training.validate_every=1"],
    "sample": ["max_units=20"],
    "train-synthesizer": ["training.max_steps=2", "model.dim=16"],
    "run": ["--dry-run"],  # tests/test_pipeline.py runs the recipes
}
RECIPE = [  # and of README's own recipe, which is run
    "codebook_mfcc.num_classes=8",
    *(f"hubert.{item}" for item in SHRUNK["pretrain"]),
]
NOT_RUN = {  # command as shown: why
    "python3.11 -m venv env && env/bin/pip install --constraint constraints-fairseq2.txt .[fairseq2]": "8 GB",
    "wordless import fairseq2:wav2vec2_large_lv60k runs/lv60k --allow-pickle": "a download",
    "wordless import checkpoints/ runs/mine --allow-pickle": "needs fairseq2: tests/fairseq2",
    "wordless export runs/hubert cards/my_hubert --format fairseq2": "needs fairseq2: tests/fairseq2",
}


def fences(page: Path, languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line.removeprefix("$ ") for fence in fences(page, "sh|console") for line in fence.splitlines()]
    found = [words for line in lines if (words := shlex.split(line, comments=True))]
    return [words for words in found if " ".join(words) not in NOT_RUN]


def configs(page: Path) -> list[tuple[str, str]]:
    """File name and text of each config; those that no command reads have no name."""
    found = fences(page, "toml")
    return [
        ((named[1] if (named := re.match(r"# (\S+\.toml)\b", text)) else "unnamed.toml"), text)
        for text in found
    ]


def write_configs(page: Path) -> None:
    for name, text in configs(page):
        Path(name).write_text(text, encoding="utf-8")
        assert main(["check", name]) == 0, text


def run_commands(page: Path, shrunk: dict[str, list[str]]) -> None:
    for words in commands(page):
        if words[0] == "wordless":
            assert main([*words[1:], *shrunk.get(words[1], [])]) == 0, f"{page.name}: {shlex.join(words)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for given: a folder of audio, a recording, models, units and pairs of other
    tools."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        envelope = np.repeat(rng.uniform(0.05, 1, 12 + number % 5), 1600)
        wave = 0.1 * envelope * rng.standard_normal(len(envelope)).clip(-3, 3)
        soundfile.write(folder / f"audio/{number:02}.wav", wave, 16000)
        (folder / f"audio/{number:02}.txt").write_text("one two" if number % 2 else "two one")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (8,) * 7,
    }
    hubert = HubertModel(HubertConfig(**sizes, num_conv_pos_embedding_groups=2))
    hubert.save_pretrained(folder / "hubert-base-ls960")
    joblib.dump(KMeans(8, n_init=1, random_state=0).fit(rng.standard_normal((50, 16))), folder / "km.bin")
    (folder / "units.txt").write_text("".join(f"{number}|{number} 1 2\n" for number in range(100)))
    (folder / "pairs.csv").write_text("positive,negative\n00,01\n02,03\n04,05\n")
    shutil.copyfile(folder / "audio/07.wav", folder / "hello.wav")
    np.save(folder / "centroids.npy", rng.standard_normal((8, 39)).astype(np.float32))
    return folder


def test_every_command_shown_is_one_that_these_tests_know() -> None:
    assert {words[0] for page in PAGES for words in commands(page)} <= KNOWN
    shown = {
        " ".join(shlex.split(line, comments=True))
        for page in PAGES
        for fence in fences(page, "sh|console")
        for line in fence.splitlines()
    }
    assert NOT_RUN.keys() <= shown, "a command that is not run is not shown any more"
    run_here = {"README", "slurm", *WALK}  # of slurm.md the rest: tests/slurm/test_real_page.py
    with_verbs = {page.stem for page in PAGES for words in commands(page) if words[0] == "wordless"}
    assert with_verbs <= run_here
    assert {page.stem for page in PAGES if fences(page, "python")} <= {*PYTHON_PAGES, "fairseq2"}


@pytest.fixture(scope="module")
def walked(folder: Path) -> Path:
    """The folder after the commands of all pages that share it, in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stem in WALK:
            write_configs(DOCS / f"{stem}.md")
            run_commands(DOCS / f"{stem}.md", SHRUNK)
        write_configs(README)
        run_commands(README, {"run": RECIPE})
    return folder


def test_the_pages_commands_run_in_order_from_a_folder_of_audio(walked: Path) -> None:
    assert "</html>" in (walked / "runs/own/report.html").read_text(encoding="utf-8")
    assert soundfile.info(walked / "continuations.wav").duration > 2
    (hello,) = {
        json.loads(line)["document"]
        for line in (walked / "runs/own/samples_hello/samples.jsonl").read_text().splitlines()
    }
    assert hello == "hello.wav"


@pytest.mark.parametrize("stem", PYTHON_PAGES)
def test_the_pages_python_runs(
    stem: str, walked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On what the pages' commands have made; README's names are those of the demo."""
    monkeypatch.chdir(walked)
    for name, made in (("hubert2", "hubert"), ("codebook2", "codebook")):
        if not (link := Path("runs/demo") / name).exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path("../own") / made)
    wave, _ = soundfile.read("hello.wav", dtype="float32")
    page = README if stem == "README" else DOCS / f"{stem}.md"
    for code in fences(page, "python"):
        names = {"microphone": np.array_split(wave, 7)}
        exec(compile(code, page.name, "exec"), names)
        if "durations" in names:
            assert len(names["labels"]) == np.sum(names["durations"]) == (len(wave) - 400) // 320 + 1
        else:
            assert capsys.readouterr().out.strip() or stem == "recognition"  # two steps write little


def test_the_cluster_pages_commands_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is submitted here; tests/slurm/test_real_page.py does that on a real SLURM."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "slurm.md"
    write_configs(page)
    tried = 0
    for words in commands(page):
        if words[1] in {*VERBS, "run", "check"}:
            dry = [] if words[1] == "check" or "--dry-run" in words else ["--dry-run"]
            assert main([*words[1:], *dry]) == 0, shlex.join(words)
            tried += 1
        else:
            assert words[1] in {"status", "logs", "cancel"} and words[2] == "runs/units"
    assert tried >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_within_the_text_is_a_pattern_not_a_step(page: Path) -> None:
    """What a user may copy lies in a block of commands, where it is run; in a sentence it has a word in
    capitals to be replaced."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    verbs = "|".join(VERBS)
    for inline in re.findall(rf"`(wordless (?:{verbs}|import|export|run|check) [^`]+)`", text):
        assert re.search(r"\b[A-Z]{2,}\b", inline), f"{page.name}: `{inline}`"


@pytest.mark.parametrize(
    "pages",
    [[README], [DOCS / f"{stem}.md" for stem in WALK], [DOCS / "slurm.md"]],
    ids=["README", "walk", "slurm"],
)
def test_no_two_commands_shown_write_to_one_place(pages: list[Path]) -> None:
    tables = {name: tomllib.loads(text) for page in pages for name, text in configs(page)}
    outs = []
    for words in [words for page in pages for words in commands(page)]:
        if words[0] == "wordless" and words[1] in VERBS and words[2] in tables and "--dry-run" not in words:
            given = dict(word.split("=", 1) for word in words[3:] if "=" in word)
            outs += [given.get("out", tables[words[2]]["out"])]
    assert len(outs) == len(set(outs)), outs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_configs_are_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_configs(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_make_targets_shown_exist(page: Path) -> None:
    shown = [words for words in commands(page) if words[0] == "make"]
    assert shown or page.parent == DOCS
    for words in shown:
        done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    kept = [
        "".join(c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
        for heading in headings
    ]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/README.md"], ids=lambda page: str(page.name))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            goal = page.parent / target if target else page
            assert goal.exists(), link
            assert not anchor or anchor in anchors(goal), link


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_the_modules_named_exist(page: Path) -> None:
    rooms = "pretrain|quantize|units|slurm|wordless"
    for path in re.findall(rf"`((?:{rooms})/[\w/]+(?:\.py|/))`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_questions_list_every_recipe() -> None:
    text = (DOCS / "questions.md").read_text(encoding="utf-8")
    for recipe in (ROOT / "recipes").glob("*.toml"):
        assert read_toml(recipe)
        assert f"recipes/{recipe.name}" in text


def test_the_readme_is_a_front_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_prose_is_wrapped(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    ", "!", "#"))]
    assert max(map(len, prose)) <= 120, max(prose, key=len)
