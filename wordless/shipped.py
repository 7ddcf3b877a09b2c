"""The recipes that come with wordless, by name: `wordless run demo`.

A wheel has them in the package, a checkout beside it. The first line of each describes it, with four fields
between bars: what for, data, hardware, time.
"""

import difflib
import re
from pathlib import Path

PACKAGE = Path(__file__).parent
FIELDS = ("recipe", "what for", "data", "hardware", "time")


def recipes() -> dict[str, Path]:
    """The files of the recipes by name."""
    folders = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def is_name(text: str) -> bool:
    """Whether a text of the command line names a recipe: a word that is no existing path."""
    return re.fullmatch(r"[\w-]+", text) is not None and not Path(text).exists()


def find_recipe(name: str) -> Path:
    """The file of a recipe. Raises ValueError with the nearest name and all names."""
    known = recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"{name}: no such recipe; {hint}There are {', '.join(known) or 'none'}, and any FILE.toml"
    )


def describe(path: Path) -> tuple[str, ...]:
    """What a recipe is for, its data, hardware and time. Raises ValueError if its first line lacks one of
    them."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    fields = tuple(field.strip() for field in first.removeprefix("#").split("|"))
    if not first.startswith("#") or len(fields) != len(FIELDS) - 1:
        raise ValueError(f"{path}: the first line must be `# {' | '.join(FIELDS[1:])}`")
    return fields


def copy_recipe(name: str, out: Path) -> None:
    """Write a recipe to a new file. Raises ValueError if there is one already."""
    text = find_recipe(name).read_text(encoding="utf-8")
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{out}: exists already; remove it or choose another name") from None
