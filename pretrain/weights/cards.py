"""fairseq2's asset cards as files, and its checkpoints.

Nothing of fairseq2 is imported. Checkpoints are a `.pt` or safetensors, or what its trainer writes:
`checkpoints/model.yaml` beside `step_N/model/pp_00/tp_00/sdp_00.pt`, in as many files as data-parallel
processes shared the weights, each tensor cut along its first axis.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.store.hashes import sha256_file
from pretrain.store.plain_text import read_text
from pretrain.training.checkpoint import load_weights
from pretrain.weights.card_config import DEFAULTS, complete_config
from pretrain.weights.families import FAMILIES
from pretrain.weights.foreign import load_safetensors
from pretrain.weights.pickles import load_pickle

OWN_FAMILIES, THEIR_FAMILIES = tuple(FAMILIES), tuple(DEFAULTS)
DEFAULT_ARCHS = {"wav2vec2": "base", "wav2vec2_asr": "base_10h"}  # whose configs `DEFAULTS` has
MOST_VALUES = 1_000_000  # of a file of cards; fairseq2's configs have some fifty
CARD, TRAINER_CARD = "card.yaml", "model.yaml"


@dataclass(frozen=True)
class Card:
    """What an asset card says of a model."""

    source: str  # of which messages speak
    family: str
    config: dict[str, Any]  # every key of the family's config; of our own families what the card says
    checkpoint: Path
    tokenizer: Path | None = None  # a SentencePiece model of characters
    extra: dict[str, Any] = field(default_factory=dict)  # its field `wordless`


def read_card(source: Path) -> Card:
    """The card of the model in a file or a folder; of a folder of fairseq2's trainer the last step, of one of
    its steps that one.

    ValueError: no card or several, a family or an architecture that only fairseq2 knows, keys or values that
    are none of its config.
    """
    step: Path | None = None
    path = source
    if source.is_dir():
        if (source.parent / TRAINER_CARD).is_file() and (source / "model").is_dir():
            step, path = source / "model", source.parent / TRAINER_CARD
        elif (source / TRAINER_CARD).is_file() and (steps := _steps(source)):
            step, path = steps[-1] / "model", source / TRAINER_CARD
    found = [(file, card) for file in _files(path) for card in read_yaml(file) if "model_family" in card]
    if len(found) != 1:
        names = ", ".join(sorted(str(card.get("name")) for _, card in found))
        raise ValueError(
            f"{source}: holds {len(found)} cards of models ({names}); put the folder on FAIRSEQ2_ASSET_DIR "
            "and say fairseq2:NAME"
            if found
            else f"{source}: neither config.json (of transformers) nor an asset card of a model (of "
            "fairseq2) is in it"
        )
    file, card = found[0]
    family = str(card["model_family"])
    require_family(family, str(file))
    if "base" in card or card.get("model_arch") not in (None, DEFAULT_ARCHS.get(family)):
        what = "base" if "base" in card else "model_arch"
        raise ValueError(
            f"{file}: {what} = {card[what]!r}: fairseq2 alone knows what that is; put the folder on "
            f"FAIRSEQ2_ASSET_DIR, in an environment with fairseq2, and say fairseq2:{card.get('name')}"
        )
    given: dict[str, Any] = next((card[key] for key in CONFIG_KEYS if key in card), {})
    if not isinstance(given, Mapping) or not isinstance(card.get("wordless") or {}, Mapping):
        raise ValueError(f"{file}: model_config and wordless are tables")
    config = dict(given) if family in OWN_FAMILIES else complete_config(family, given, str(file))
    if step is None:
        if not isinstance(card.get("checkpoint"), str):
            raise ValueError(
                f"{file}: has no checkpoint; give a card with one, or the folder with fairseq2's checkpoints"
            )
        if not isinstance(inside := card.get("checkpoint_path", "."), str):
            raise ValueError(f"{file}: checkpoint_path = {inside!r}: a path inside `checkpoint` is expected")
        step = local_path(card["checkpoint"], file) / inside
    tokenizer = None
    if card.get("tokenizer_family") == "char_tokenizer" and isinstance(card.get("tokenizer"), str):
        tokenizer = local_path(card["tokenizer"], file)
    return Card(str(file), family, config, step, tokenizer, dict(card.get("wordless") or {}))


CONFIG_KEYS = (
    "model_config_overrides",
    "model_config_override",
    "model_config",
)  # as fairseq2 looks for them


def require_family(family: str, source: str) -> None:
    """ValueError for a family that is none of a speech encoder's."""
    if family not in (*THEIR_FAMILIES, *OWN_FAMILIES):
        raise ValueError(
            f"{source}: model_family = {family!r}: no speech encoder that wordless knows; supported are "
            f"{', '.join(THEIR_FAMILIES)}, and wordless's own {', '.join(OWN_FAMILIES)}"
        )


def is_card(source: Path) -> bool:
    """Whether `source` is, or seems to be, a card, a folder with one, or a folder of fairseq2's trainer."""
    return bool(_files(source)) or (
        source.is_dir() and (source.parent / TRAINER_CARD).is_file() and (source / "model").is_dir()
    )


def read_yaml(path: Path) -> list[dict[str, Any]]:
    """The mappings in a YAML file; ValueError for what is no YAML."""
    import yaml  # type: ignore[import-untyped]

    try:
        trees = [tree for tree in yaml.safe_load_all(read_text(path)) if isinstance(tree, dict)]
        if _weigh(trees, {}) > MOST_VALUES:
            raise ValueError("its aliases stand for more values than a card can have")
        return trees
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None


def _weigh(value: Any, known: dict[int, int]) -> int:
    """How many values and characters a tree has with its aliases written out, as a message or JSON would; too
    many where it holds itself."""
    if not isinstance(value, dict | list | tuple):
        return len(value) if isinstance(value, str) else 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weigh(item, known) for item in inside)
    return known[id(value)]


def local_path(text: str, card: Path) -> Path:
    """The file of a `checkpoint` or `tokenizer` of a card; ValueError where it names none or would have to be
    downloaded."""
    require_path(text, str(card))
    if "://" in text and not text.startswith("file://"):
        raise ValueError(
            f"{card}: {text} is not on this machine; fairseq2 downloads it: say fairseq2:NAME where it is "
            "installed"
        )
    return card.parent / text.removeprefix("file://")


def require_path(text: str, source: str) -> None:
    """ValueError for a field of a card that names nothing but the card's own folder."""
    if Path(text.removeprefix("file://")) == Path():
        raise ValueError(
            f"{source}: {text!r} stands for the folder of the card; name a file, or a folder with one "
            "checkpoint"
        )


def load_checkpoint(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint under their own names, and the SHA-256 of its files; of a run of ours the
    run's fingerprint."""
    try:
        path.stat()
    except (
        OSError,
        ValueError,
    ) as error:  # not there, of a name that no file can have, in a folder that is closed
        reason = (
            error.strerror
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            else None
        )
        raise ValueError(f"{str(path)[:200]}: no such checkpoint{f' ({reason})' if reason else ''}") from None
    if path.is_dir() and (path / "pp_00").is_dir():
        return _load_shards(path, allow_pickle)
    if any(path.glob("step_*/state.json")):  # a run of ours: its best weights, else the newest
        weights, _, fingerprint = load_weights(path)
        return weights, fingerprint
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"{path}: {'has no safetensors and no pp_00 in it' if path.is_dir() else 'no such checkpoint'}"
        )
    state: dict[str, Any] = {}
    for file in files:
        state |= load_safetensors(file) if file.suffix == ".safetensors" else load_pickle(file, allow_pickle)
    return tensors_of(state, str(path)), _sha256(files)


def tensors_of(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The weights in a loaded checkpoint: itself or its `model`, without the prefix of DDP."""
    inside = state.get("model")
    state = inside if isinstance(inside, Mapping) else state
    if strange := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        raise ValueError(
            f"{source}: {strange!r} is a {type(state[strange]).__name__}; a state dict holds tensors alone"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _load_shards(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], str]:
    if (path / "pp_01").exists() or (path / "pp_00" / "tp_01").exists():
        raise ValueError(
            f"{path}: is cut by pipeline or tensor parallelism; save it from one such process, and any "
            "number of FSDP's"
        )
    files: list[Path] = []
    while (file := path / "pp_00" / "tp_00" / f"sdp_{len(files):02d}.pt").is_file():
        files.append(file)
    if not files:
        raise ValueError(f"{path}: has no pp_00/tp_00/sdp_00.pt")
    shards = [tensors_of(load_pickle(file, allow_pickle), str(file)) for file in files]
    whole = {}
    for name, first in shards[0].items():
        parts = [shard[name] for shard in shards if name in shard]
        try:
            whole[name] = torch.cat(parts) if first.ndim and len(parts) > 1 else first
        except RuntimeError:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"{path}: the parts of {name!r} in its files do not fit together: {shapes}"
            ) from None
    return whole, _sha256(files)


def _sha256(files: list[Path]) -> str:
    digests = [sha256_file(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(
            path for path in source.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file()
        )
    return [source] if source.suffix in (".yaml", ".yml") and source.is_file() else []


def _steps(folder: Path) -> list[Path]:
    """The finished steps of fairseq2's trainer, in their order."""
    steps = [
        path for path in folder.glob("step_*") if path.name[5:].isdecimal() and (path / "model").is_dir()
    ]
    return sorted(steps, key=lambda path: int(path.name[5:]))
