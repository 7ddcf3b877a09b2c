"""Whether the output of an earlier command can be used as it is."""

from typing import Any

from pretrain.config import differences
from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.store.artefact import is_complete, known_by, read_meta
from pretrain.training.task import NEUTRAL

# Keys that say how something is computed, or where it lies, not what.
HOW = {*NEUTRAL, "out", "device", "batch_seconds", "workers", "decoding.processes"}


def is_made(config: FinetuneConfig | TranscribeConfig, kind: str) -> bool:
    """Whether the output of `config` stands; ValueError where it was made with other settings or was made
    from other inputs."""
    if not is_complete(config.out):
        return False
    meta, now = read_meta(config.out, kind), config.resolved()
    changed = {
        key: f"{key}: {old!r} -> {new!r}"
        for key, old, new in differences(meta["config"], now)
        if key not in HOW
    }
    for name, fingerprint in meta["parents"].items():
        folder = now.get(name)
        if isinstance(folder, str) and (known := known_by(folder)):
            if fingerprint not in known:
                raise ValueError(
                    f"{config.out}: was made from {name} {fingerprint}, which {folder} is not; remove it to "
                    "make it again"
                )
            changed.pop(name, None)  # the same thing in another place
    if changed:
        listed = "; ".join(changed.values())
        raise ValueError(
            f"{config.out}: was made with other settings ({listed}); restore them, or remove it to make it "
            "again"
        )
    return True


def merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `over`, table by table."""
    both = {
        key: merged(tree[key], value)
        if isinstance(value, dict) and isinstance(tree.get(key), dict)
        else value
        for key, value in over.items()
    }
    return {**tree, **both}
