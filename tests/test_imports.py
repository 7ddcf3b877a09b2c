"""The import rules and the house rules of the product, read from its source.

Every import counts: at the top, in functions, under TYPE_CHECKING, and `import_module` of a constant. Strings
in tables ("module:function") do not: they are how a plug-in is reached without an import.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "pretrain": set(),
    "quantize": {"pretrain"},
    "units": {"pretrain", "quantize"},
    "slurm": set(),
    "wordless": {"pretrain", "quantize", "units", "slurm"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks"}
# From the ground up: a module imports from its own package and from packages listed before it.
FLOORS = {
    "pretrain": "store config progress data training model objectives ctc weights fairseq2".split(),
    "units": "corpus formats sound lm scores packing_config packing_foreign packing".split(),
}
FLAT = {"__init__", "config", "progress"}  # the only modules that are directly in pretrain/
MAX_LINES, MAX_FUNCTION_LINES = 350, 60
PLUG_IN = "pretrain.fairseq2"
MAY_NAME_FAIRSEQ2 = {"units.lm.fairseq2"}  # besides the plug-in itself

PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in MAY_IMPORT
    for path in sorted((ROOT / room).rglob("*.py"))
}
every_module = pytest.mark.parametrize("module", PATHS)

# Other libraries' formats are pickles. Some modules write them; those that read them do so by `weights_only`:
# others' models, and the checkpoints from which fairseq2's trainer continues.
READ_PICKLES = {"pretrain.weights.pickles", "pretrain.fairseq2.checkpoints"}
WRITE_PICKLES = READ_PICKLES | {"pretrain.weights.fairseq", "pretrain.weights.torchaudio"}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def named(module: str) -> Iterator[tuple[str, str | None]]:
    """(module, name in it or None) of every import statement, and of import_module with a constant."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                (argument.value, None) for argument in node.args[:1] if isinstance(argument, ast.Constant)
            )


@cache
def imports(module: str) -> frozenset[str]:
    """Every module, and every name in a module, that is imported."""
    return frozenset(text for name, part in named(module) for text in (name, f"{name}.{part}"))


@cache
def imported_modules(module: str) -> frozenset[str]:
    """The modules of ours that are imported, a package among them if a name of its own is."""
    found = {whole if (whole := f"{name}.{part}") in PATHS else name for name, part in named(module)}
    return frozenset(found & PATHS.keys()) - {module}


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, or a module that imports itself (Tarjan
    1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1 or node in graph[node]:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def floor_of(module: str) -> int | None:
    """The place of a module's package in FLOORS; None where a room is flat, and of a room itself."""
    room, _, rest = module.partition(".")
    return FLOORS[room].index(rest.partition(".")[0]) if room in FLOORS and rest else None


def test_the_walk_finds_the_rooms() -> None:
    assert {module.partition(".")[0] for module in PATHS} == set(MAY_IMPORT)
    assert "pretrain.training.run" in imports("pretrain.objectives.pretraining")
    assert "wordless.shipped" in imported_modules("wordless.cli")  # inside a function
    assert "slurm.resources" in imported_modules("wordless.verbs")  # under TYPE_CHECKING
    assert floor_of("pretrain.data.manifest") == FLOORS["pretrain"].index("data")


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}
    assert circles({name: frozenset(others) for name, others in graph.items()}) == [["a", "b", "c"], ["e"]]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles({module: imported_modules(module) for module in PATHS}) == []


@every_module
def test_a_room_imports_only_the_rooms_before_it(module: str) -> None:
    room = module.partition(".")[0]
    assert {name.partition(".")[0] for name in imports(module)} & OURS <= MAY_IMPORT[room] | {room}


@every_module
def test_a_package_imports_only_the_packages_before_it(module: str) -> None:
    mine = floor_of(module)
    if mine is not None:
        room = module.partition(".")[0]
        floors = {name: floor_of(name) for name in imported_modules(module) if name.startswith(f"{room}.")}
        assert {name for name, floor in floors.items() if floor is not None and floor > mine} == set()


@every_module
def test_only_the_plug_in_names_fairseq2(module: str) -> None:
    if f"{module}.".startswith(f"{PLUG_IN}.") or module in MAY_NAME_FAIRSEQ2:
        return
    assert not {name for name in imports(module) if f"{name}.".startswith((f"{PLUG_IN}.", "fairseq2."))}


def test_pretrain_has_no_flat_modules_but_the_lowest() -> None:
    assert {path.stem for path in (ROOT / "pretrain").glob("*.py")} == FLAT


@every_module
def test_a_file_and_a_function_are_short_enough_to_read(module: str) -> None:
    text = PATHS[module].read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    long = {
        node.name: lines
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long
    assert "fmt: skip" not in text and "fmt: off" not in text


@every_module
def test_nothing_of_ours_is_a_pickle(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(module)}
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert "torch.save" not in imports(module)
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and module in READ_PICKLES:
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options["weights_only"] == "True"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load"):
            allowed = WRITE_PICKLES if node.attr == "save" else READ_PICKLES
            assert module in allowed, f"torch.{node.attr} at line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).partition(".")[0] in ("np", "numpy"):
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False


@every_module
def test_only_slurm_reads_its_variables(module: str) -> None:
    assert module.startswith("slurm") or "SLURM_" not in PATHS[module].read_text(encoding="utf-8")


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [
        path
        for path in (*PATHS.values(), *(ROOT / "tests").rglob("*.py"))
        if drawers & {path.stem, *path.relative_to(ROOT).parts[:-1]}
    ]


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, wordless; sys.exit(bool({'torch', 'typer', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
