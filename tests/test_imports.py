"""The rooms' import direction and a few house rules, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"pretrain": set(), "quantize": {"pretrain"}, "units": {"pretrain", "quantize"}, "slurm": set()}
MODULES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
OURS = {*MAY_IMPORT, "omissions", "recipe", "wordless", "tests", "benchmarks"}
TOP = [ROOT / "omissions.py", ROOT / "recipe.py", ROOT / "wordless.py"]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]
# Other libraries' formats are pickles: these modules write them. Read by `weights_only` are
# others' models, and the checkpoints that fairseq2's trainer goes on from.
READ_PICKLES = {"weights/foreign.py", "fairseq2/checkpoints.py"}
WRITE_PICKLES = READ_PICKLES | {"weights/fairseq.py", "weights/torchaudio.py"}  # other libraries' files


def imports(path: Path) -> set[str]:
    """Every module named by an import statement, wherever it stands, and by import_module with a constant."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {node.args[0].value} if node.args and isinstance(node.args[0], ast.Constant) else set()
    return found


def test_the_walk_finds_the_rooms() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(MAY_IMPORT)
    assert "pretrain.config" in imports(ROOT / "pretrain" / "encoder.py")
    assert "torch.utils.tensorboard" in imports(ROOT / "pretrain" / "runlog.py")  # inside a function


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_room_imports_only_the_rooms_before_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    rooms = {name.split(".")[0] for name in imports(path)} & OURS
    assert rooms <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("path", [*MODULES, *TOP], ids=[*NAMES, *(path.name for path in TOP)])
def test_nothing_of_ours_is_a_pickle(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert "torch.save" not in imports(path)
    name = f"{path.parent.name}/{path.name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and name in READ_PICKLES:
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options["weights_only"] == "True"
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in ("save", "load")
            and getattr(node.value, "id", None) == "torch"
        ):
            if name in (WRITE_PICKLES if node.attr == "save" else READ_PICKLES):
                continue
            pytest.fail(f"torch.{node.attr} at line {node.lineno}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in ("np", "numpy"):
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False


@pytest.mark.parametrize("path", [*MODULES, *TOP], ids=[*NAMES, *(path.name for path in TOP)])
def test_only_slurm_reads_its_variables(path: Path) -> None:
    assert path.parent.name == "slurm" or "SLURM_" not in path.read_text()


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [
        path
        for path in (*MODULES, *(ROOT / "tests").rglob("*.py"))
        if drawers & {path.stem, *path.relative_to(ROOT).parts[:-1]}
    ]
