"""The command `check`: a config, a recipe, an artefact or a model of another library, validated."""

from pathlib import Path

from pretrain.config import parse_config, read_toml
from pretrain.store.artefact import read_meta, require_as_written
from pretrain.store.hashes import sha256_file
from pretrain.store.schemes import plugin, split_scheme
from wordless.job_resources import parse_resources
from wordless.recipe import Recipe
from wordless.verbs import verb_named


def check(path: Path) -> str:
    """A line that describes what `path` is. Raises ValueError with all that is wrong with it."""
    if (named := split_scheme(path)) is not None:
        scheme, name = named
        _, meta, fingerprint = plugin(scheme).load_asset(name)
        return f"{path}: a complete {meta['kind']}, weights {fingerprint}"
    return _check_artefact(path) if path.is_dir() else _check_toml(path)


def _check_artefact(path: Path) -> str:
    meta = read_meta(path)
    require_as_written(path, meta)
    absent = [name for name in meta["files"] if not (path / name).is_file()]
    if absent:
        raise ValueError(f"{path}: missing: {', '.join(absent)}")
    damaged = [name for name, expected in meta["files"].items() if sha256_file(path / name) != expected]
    if damaged:
        raise ValueError(f"{path}: differ from their recorded SHA-256: {', '.join(damaged)}")
    return f"{path}: a complete {meta['kind']}, fingerprint {meta['fingerprint']}"


def _check_toml(path: Path) -> str:
    tree = read_toml(path)
    if "verb" not in tree:
        recipe = Recipe(tree, str(path))
        recipe.check()
        return f"{path}: a valid recipe with {len(recipe.stages)} stages"
    parse_resources(tree.pop("slurm", {}), str(path))
    name = tree.pop("verb")
    parse_config(verb_named(name, str(path)).load()[0], tree, str(path))
    return f"{path}: a valid config for `{name}`"
