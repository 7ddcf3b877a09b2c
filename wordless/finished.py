"""Finished outputs: whether one was made with the settings, and from the inputs, that a config has now."""

from pathlib import Path
from typing import Any

from pretrain.config import differences
from pretrain.store.artefact import is_complete, known_by, read_meta


def is_current(config: Any) -> bool:
    """Whether the output of a verb is complete and was made with this config from inputs that are still the
    same."""
    return is_complete(config.out) and not any(deviations(config))


def deviations(config: Any) -> tuple[list[str], list[str]]:
    """Of a config's complete output: the settings that differ now, and the inputs that were made again
    since."""
    meta, resolved = read_meta(config.out), config.resolved()
    changed = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in differences(meta["config"], resolved)
        if key != "part"
    ]
    return changed, _replaced_inputs(meta, resolved)


def _replaced_inputs(meta: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """Inputs that were made again since, with other contents: `key FINGERPRINT, which FOLDER no longer
    is`."""
    inputs: dict[str, Any] = {}
    for key, value in resolved.items():  # those of a list are `source`, `source_1`, …
        values = value if isinstance(value, list) else [value]
        inputs |= {key + (f"_{n}" if n else ""): item for n, item in enumerate(values)}
    replaced = []
    for key, fingerprint in meta["parents"].items():
        path = Path(str(inputs.get(key)))
        folder = path.parent if path.is_file() else path
        if (known := known_by(folder)) and fingerprint not in known:
            replaced.append(f"{key} {fingerprint}, which {folder} no longer is")
    return replaced
