"""Configuration: TOML in, frozen pydantic models out, every mistake reported at once.

A config class stands beside the code it configures and derives from `Config`. Reading is strict: an unknown
key or a wrong type is an error that names the file, the dotted key, what was expected and the nearest right
name. Nothing rewrites a config.

A key that is a path has the type `PathStr`, and a seed the type `Seed`. In a path `~`, `~user`, `$NAME` and
`${NAME}` are replaced; no other text is touched.
"""

import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from pretrain.store.plain_text import read_text

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


class Config(BaseModel):
    """Base of every config: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain JSON types."""
        return self.model_dump(mode="json")


# Keys of earlier versions, and their names now. They still work.
RENAMED = {"initial": "init", "initialization": "init"}
REMOVED = {"batches.decoder"}  # changed no result
_noted: set[str] = set()


def with_new_names(keys: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """`keys` with those of earlier versions renamed, with a note on stderr, if `known` has only the new name.

    Raises ValueError for both names.
    """
    for old, new in RENAMED.items():
        if old in keys and old not in known and new in known:
            if new in keys:
                raise ValueError(f"{old}: is called {new} now; give one of the two")
            if old not in _noted:
                _noted.add(old)
                print(f"note: the key {old} is called {new} now", file=sys.stderr)
            keys = {new if key == old else key: value for key, value in keys.items()}
    return keys


Split = Annotated[
    str | None,
    BeforeValidator(lambda name: None if name == "" else name),
    Field(description='"": every row, whatever its split'),
]
"""For configs: the name of a split of a manifest or a corpus, or "", which becomes None: TOML has no other
way to say none."""


def expand_path(path: str) -> str:
    """`path` with a leading `~` or `~user` and each `$NAME` and `${NAME}` replaced.

    Raises ValueError if the path is blank or has a NUL byte, if there is no such user, and if a variable is
    not set or empty. A variable that is not set stays where a folder or file of that very name exists below
    an absolute path.
    """
    if not path.strip() or "\0" in path:
        raise ValueError(f"is {path!r}, and a path is needed")

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if found := os.environ.get(name):
            return found
        whole = path[: match.end()] + path[match.end() :].partition("/")[0]
        if os.path.isabs(whole) and os.path.lexists(whole):
            return match[0]
        raise ValueError(
            f"{path!r} has the variable ${name}, which is {'empty' if found == '' else 'not set'}; set it, "
            "or write the path in full"
        )

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if path.startswith("~") and expanded.startswith("~"):
        raise ValueError(
            f"{path!r} begins with {path.partition('/')[0]!r}, which is no user's home here; write ./{path} "
            "for a name with ~"
        )
    return expanded


def _expand_paths(paths: str | list[str]) -> str | list[str]:
    return expand_path(paths) if isinstance(paths, str) else [expand_path(path) for path in paths]


PathStr = Annotated[str, AfterValidator(expand_path)]
"""For configs: a path, with `~` and environment variables replaced."""

PathStrs = Annotated[str | list[str], AfterValidator(_expand_paths)]
"""For configs: a path or a list of paths."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""For configs: what random numbers start from; as much as numpy, torch and Parquet's integers take."""


def part_of(example: str) -> Any:
    """The type of a config's `part`, which of how many shares of the work; None is all of it. `example` is
    for the message."""

    def require(part: str | None) -> str | None:
        if part is not None:
            first, _, count = part.partition("/")
            if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
                raise ValueError(f"write {example}, not {part!r}")
        return part

    return AfterValidator(require)


def share(part: str | None) -> slice:
    """Which places of a list of work a `part` is: every count-th from its own on."""
    first, count = (int(number) for number in (part or "1/1").split("/"))
    return slice(first - 1, None, count)


C = TypeVar("C", bound=Config)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file. A missing or malformed file is a ValueError naming it."""
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; a TOML file is needed") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid TOML: {str(error).removeprefix(f'{path}').removeprefix(':').strip()}"
        ) from None


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `tree` with `dotted.key=value` applied in order. Values are TOML; what does not parse as TOML
    is a string."""
    tree = json.loads(json.dumps(tree, default=str))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r}: write key=value, for example optimizer.lr=0.001")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {override!r}: {parent!r} is a value, not a table")
        node[leaf] = value
    return tree


def parse_config(config_class: type[C], tree: dict[str, Any], source: str) -> C:
    """Validate `tree`; all mistakes in one ValueError, a line each: `source: dotted.key: what is wrong`."""
    try:
        tree = with_new_names(tree, config_class.model_fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    try:
        return config_class.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = [f"{source}: {_describe(config_class, problem)}" for problem in error.errors()]
        raise ValueError("\n".join(lines)) from None


def _describe(config_class: type[Config], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            names = _names_at(config_class, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(names))}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: this key is needed"
        case "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            return f"{key}: {message}" if key else message
        case _:
            return f"{f'{key}: ' if key else ''}{problem['msg']}, got {problem['input']!r}"


def _names_at(config_class: type[Config], location: tuple[Any, ...]) -> list[str]:
    """Field names of the config class that `location` leads to, for the 'did you mean' hint."""
    current: Any = config_class
    for part in location:
        annotation = (
            current.model_fields[part].annotation if part in getattr(current, "model_fields", {}) else None
        )
        options = [annotation, *get_args(annotation)]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)


def without_none(value: Any) -> Any:
    """`value` without the keys that are None, which TOML cannot say."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key; a list is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) where two configs differ; a key that is not there counts as None."""
    before, after = flatten(old), flatten(new)
    for name, now in RENAMED.items():
        if name in before and name not in after and now in after:
            before[now] = before.pop(name)
    before = {key: value for key, value in before.items() if key not in REMOVED - after.keys()}
    keys = sorted(before.keys() | after.keys())
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
