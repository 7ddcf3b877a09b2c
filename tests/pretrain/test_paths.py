"""Paths and seeds in configs: which keys they are, and what becomes of `~`, variables and nothing at all."""

import ast
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from pretrain.config import Config, expand_path, parse_config
from pretrain.data.indexing import IndexConfig
from pretrain.weights.conversion import ImportConfig
from quantize.importing import CodebookImportConfig
from units.formats.reading import read_units
from units.lm.sampling import SampleConfig
from wordless.verbs import VERBS

# Keys with any text that is no path. A new key of text is a path (`PathStr`), or is added here.
TEXTS = {
    "device",
    "speaker_pattern",
    "language",
    "title",
    "utterance",
    "utterances",
    "speaker",
    "characters",
    "baseline",
    "format",
    "names",
    "split",
    "valid_split",
    "select_split",
    "fit_split",
    "part",
    "silence",
    "budget",
    "budget_at_least",
    "budgets",
    "left_out",
}
CLASSES: dict[str, type[Config]] = {name: verb.load()[0] for name, verb in VERBS.items()}
CLASSES |= {"import": ImportConfig, "import --codebook": CodebookImportConfig}


def keys_of(config_class: type[Config], prefix: str) -> dict[str, Any]:
    """The type of every key, those of tables inside too."""
    found: dict[str, Any] = {}
    for name, field in config_class.model_fields.items():
        found[f"{prefix}.{name}"] = Annotated[field.annotation, "", *field.metadata]
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Config):
                found |= keys_of(kind, f"{prefix}.{name}")
    return found


KEYS = {
    key: kind for name, config_class in CLASSES.items() for key, kind in keys_of(config_class, name).items()
}


def takes(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def test_every_key_of_text_is_a_path_or_known_to_be_none() -> None:
    texts = {
        key for key, kind in KEYS.items() for value in ("a/b", ["a/b"], {"x": "a/b"}) if takes(kind, value)
    }
    of_free_tables = {key for key in texts if not takes(KEYS[key], "a/b") and takes(KEYS[key], {"x": 1})}
    paths = {key for key in texts - of_free_tables if key.rpartition(".")[2] not in TEXTS}
    assert {
        "index.source",
        "index.alignments",
        "finetune.text.tokenizer",
        "transcribe.decoding.lm",
        "report.pretrain",
    } <= paths
    assert len(paths) > 70
    for key in paths:
        values: list[Any] = ["$WORDLESS_NONE/x", "", " ", "a\0b"]
        for value in values:
            assert not any(takes(KEYS[key], given) for given in (value, [value], {"x": value})), (key, value)
    assert {key.rpartition(".")[2] for key in of_free_tables} == {
        "finetune",
        "transcribe",
        "source_options",
    }  # expanded where used


def test_every_seed_names_its_key_where_it_is_none() -> None:
    seeds = [key for key in KEYS if key.rpartition(".")[2].endswith(("seed", "seeds"))]
    assert len(seeds) > 14
    for key in seeds:
        for value in (-1, 2**63, 1.5, True):
            assert not takes(KEYS[key], value) and not takes(KEYS[key], (value,)), (key, value)
        assert any(takes(KEYS[key], value) for value in (2**63 - 1, (2**63 - 1,)))
    with pytest.raises(ValueError, match=r"^x\.toml: split_seed: .*greater than or equal to 0, got -3$"):
        parse_config(IndexConfig, {"source": "a", "out": "b", "split_seed": -3}, "x.toml")


def test_home_and_variables_are_replaced_in_paths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("YEAR", "2026")
    tree = {
        "source": ["~/a", "$DATA/${YEAR}_b/*.tar"],
        "out": "~/$YEAR",
        "alignments": "a$/~b$5",
        "speaker_pattern": "(?P<speaker>~$DATA|x)$",
    }
    config = parse_config(IndexConfig, tree, "x.toml")
    assert config.sources == ["/home/ann/a", "/data/2026_b/*.tar"] and config.out == "/home/ann/2026"
    assert config.alignments == "a$/~b$5" and config.speaker_pattern == "(?P<speaker>~$DATA|x)$"
    assert parse_config(IndexConfig, config.resolved(), "again") == config
    plain = {"source": "data/./x.tsv", "out": "runs//x/"}
    # nothing else of a path is touched
    assert parse_config(IndexConfig, plain, "x.toml").resolved()["out"] == "runs//x/"
    assert SampleConfig(lm="~/l", out="o", prompt_audio=["~/p.wav"], codebook="$DATA/c").recordings == [
        "/home/ann/p.wav"
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"out: is '', and a path is needed"),
        (
            "$WORDLESS_NONE/x",
            r"out: '\$WORDLESS_NONE/x' has the variable \$WORDLESS_NONE, which is not set; set it, or",
        ),
        ("/a/${WORDLESS_EMPTY}/x", r"out: .*\$WORDLESS_EMPTY, which is empty"),
        (
            "~no-such-user/x",
            r"out: .*begins with '~no-such-user', which is no user's home here; write \./~no-such-user/x",
        ),
    ],
)
def test_a_path_that_cannot_be_meant_names_its_key(
    path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORDLESS_EMPTY", "")
    monkeypatch.delenv("WORDLESS_NONE", raising=False)
    with pytest.raises(ValueError, match=rf"^x\.toml: {message}"):
        parse_config(IndexConfig, {"source": "a", "out": path}, "x.toml")


def test_a_folder_whose_name_has_a_dollar_is_found_below_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "a$none_such").mkdir()
    assert expand_path(f"{tmp_path}/a$none_such/new") == f"{tmp_path}/a$none_such/new"
    with pytest.raises(ValueError, match="not set"):
        expand_path(f"{tmp_path}/b$none_such/new")


def test_files_beside_units_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    (tmp_path / "a.km").write_text("1 2\n")
    (tmp_path / "names.tsv").write_text(".\nx.wav\t800\n")
    assert [document.id for document in read_units(tmp_path / "a.km", "km", tsv="$HERE/names.tsv")] == ["x"]
    with pytest.raises(ValueError, match=r"option tsv: .*\$WORDLESS_NONE"):
        read_units(tmp_path / "a.km", "km", tsv="$WORDLESS_NONE/names.tsv")


def test_no_module_opens_text_in_the_encoding_of_the_locale() -> None:
    """`open`, `read_text`, `write_text` and their like name their encoding, or read bytes."""
    root = Path(__file__).parents[2]
    wrong = []
    for path in [
        *root.glob("*.py"),
        *(
            file
            for room in ("pretrain", "quantize", "units", "slurm")
            for file in (root / room).rglob("*.py")
        ),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = getattr(function, "id", getattr(function, "attr", ""))
            given = {keyword.arg for keyword in node.keywords}
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "r"
            is_open = (isinstance(function, ast.Name) and name == "open") or ast.unparse(function) in (
                "gzip.open",
                "os.fdopen",
            )
            # plain_text's is bytes
            reads = name in ("read_text", "write_text") and ast.unparse(function) != "read_text"
            if (reads or (is_open and "b'" not in mode)) and not given & {"encoding", "mode"}:
                wrong.append(f"{path.relative_to(root)}:{node.lineno}")
    assert wrong == []
