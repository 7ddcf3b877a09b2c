"""Models of other libraries in place of a run's folder: `fairseq2:NAME`, wherever a run of an encoder is
expected.

A scheme is a line in `SCHEMES`: a module that is imported when one of its models is read. It has
- `load_asset(name)`: weights, meta data and fingerprint, as `load_weights` gives them of a run;
- `current_fingerprint(name)`: the fingerprint alone, or None if the model cannot be read here;
- `read_asset(name, vocabulary, options, allow_pickle)`: the model as the verb `import` takes it;
- `objective(name)`: the model's pretraining objective, or None.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

SCHEMES = {"fairseq2": "pretrain.fairseq2.assets"}


def split_scheme(source: str | Path) -> tuple[str, str] | None:
    """(scheme, NAME) of `scheme:NAME`; None for a path.

    Raises ValueError for a scheme alone and for spaces around a name: a model has one name, by which settings
    are compared.
    """
    scheme, separator, name = str(source).partition(":")
    if not separator or scheme not in SCHEMES:
        return None
    if not name or name != name.strip():
        raise ValueError(f"{str(source)!r}: names no asset card; write {scheme}:NAME")
    return scheme, name


def plugin(scheme: str) -> Any:
    """The module that reads the models of a scheme."""
    return import_module(SCHEMES[scheme])
