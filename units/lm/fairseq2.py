"""Unit language models as a model family of fairseq2 (`wordless_unit_lm`), by an entry point of their own in
`fairseq2.extension`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pretrain.config import parse_config
from pretrain.store.disk import atomic_folder
from pretrain.weights.card_writing import TENSORS
from pretrain.weights.cards import CARD
from pretrain.weights.families import ModelConfig, Tree
from units.corpus.patterns import PATTERNS, Pattern
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import LanguageModel, load_language_model
from units.lm.model import Decoder, DecoderConfig

FAMILY = "wordless_unit_lm"


@dataclass(kw_only=True)
class UnitLMConfig(ModelConfig):
    """units.lm.model.DecoderConfig, units.corpus.vocabulary.Vocabulary, and how several levels stand in a
    sequence (units/corpus/patterns.py)."""

    decoder: Tree = field(default_factory=dict)
    vocabulary: Tree = field(default_factory=lambda: {"num_units": 500})
    pattern: str = "delay"

    def build(self) -> LanguageModel:
        return LanguageModel(
            Decoder(self._decoder(), Pattern(self.pattern, self._vocabulary().sizes).vocabularies)
        )

    def parsed(self) -> dict[str, Any]:
        if self.pattern not in PATTERNS:
            raise ValueError(f"model_config.pattern: {self.pattern!r}; there are {', '.join(PATTERNS)}")
        vocabulary = self._vocabulary().model_dump(mode="json")
        return {"decoder": self._decoder().resolved(), "vocabulary": vocabulary, "pattern": self.pattern}

    def _decoder(self) -> DecoderConfig:
        return parse_config(DecoderConfig, self.decoder, "model_config.decoder")

    def _vocabulary(self) -> Vocabulary:
        return parse_config(Vocabulary, self.vocabulary, "model_config.vocabulary")


def export_card(run: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the weights of `run`, the best that it kept or the newest, as the folder `out`:
    `model.safetensors` and a card that names it for fairseq2 by the folder's name. Returns what was written.
    ValueError when `out` exists or `run` is no unit language model."""
    import yaml  # type: ignore[import-untyped]

    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already; remove it or choose another name")
    lm = load_language_model(run, device="cpu")
    config = {name: lm.meta[name] for name in ("decoder", "vocabulary", "pattern")}
    card = {"name": out.name, "model_family": FAMILY, "checkpoint": TENSORS, "model_config": config}
    tensors = {f"decoder.{name}": weight.contiguous() for name, weight in lm.decoder.state_dict().items()}
    with atomic_folder(out) as folder:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / CARD).write_text(
            yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8"
        )
    note = "fairseq2 knows the family of this card where wordless is installed beside it"
    return {"out": str(out), "format": "fairseq2", "family": FAMILY, "lm": lm.fingerprint, "notes": [note]}


def register(container: Any) -> None:
    """Registers the family, once. A failure is logged, and does not affect other extensions."""
    from fairseq2.logging import log
    from fairseq2.models import ModelFamily

    from pretrain.fairseq2.extension import register_family

    if FAMILY in container.iter_keys(ModelFamily):
        return
    try:
        register_family(container, FAMILY, UnitLMConfig, LanguageModel)
    except Exception as error:
        log.warning("wordless: {} is not registered ({}: {})", FAMILY, type(error).__name__, error)
