"""Our models as fairseq2's model families: what the `model_config` of an asset card of each holds. Imports
nothing of fairseq2.

The tensors are ours, under their own names: a card's `checkpoint` is a run's `model.safetensors`, or the
folder of a run (pretrain/weights/card_writing.py writes such cards). A config is a dataclass, as fairseq2
wants it, whose fields are our config trees; they are merged as fairseq2 merges tables, may leave out what
`architecture` fills in, and are read by our own classes, so a mistake is told as everywhere else.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from pretrain.config import parse_config
from pretrain.ctc.model import Recognizer
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.model.config import ARCHITECTURES, EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.objectives.hubert import Hubert, HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config

ENGLISH = [*"|abcdefghijklmnopqrstuvwxyz'"]
Tree = dict[str, object]  # what fairseq2 can read from YAML; None is its null


class EncoderModel(nn.Module):
    """An encoder without heads."""

    def __init__(self, encoder: EncoderConfig):
        super().__init__()
        self.encoder = Encoder(encoder)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """Padded waveforms (batch, samples) float32 16 kHz of lengths (batch,) to the last output (batch,
        frames, dim)."""
        output: Tensor = self.encoder(waveforms, num_samples)
        return output


def _base() -> Tree:
    return {"architecture": "base"}


def _english() -> Tree:
    return {"symbols": ENGLISH, "spelling": "characters", "tokenizer": None}


@dataclass(kw_only=True)
class ModelConfig:
    """What the configs of our families share."""

    def build(self) -> nn.Module:
        """The model, freshly drawn; a ValueError tells what is wrong with the trees."""
        raise NotImplementedError

    def parsed(self) -> dict[str, Any]:
        """The fields with every tree as our classes resolve it; a ValueError as `build`."""
        raise NotImplementedError


@dataclass(kw_only=True)
class EncoderModelConfig(ModelConfig):
    """Of `wordless_encoder`: pretrain.model.encoder.EncoderConfig. Whatever else a checkpoint holds is passed
    over."""

    encoder: Tree = field(default_factory=_base)

    def build(self) -> nn.Module:
        return EncoderModel(self._encoder())

    def parsed(self) -> dict[str, Any]:
        return {"encoder": self._encoder().resolved()}

    def _encoder(self) -> EncoderConfig:
        return parse_config(EncoderConfig, self.encoder, "model_config.encoder")


@dataclass(kw_only=True)
class HubertModelConfig(EncoderModelConfig):
    """Of `wordless_hubert`: pretrain.objectives.hubert.HubertConfig, and the number of classes."""

    hubert: Tree = field(default_factory=dict)
    num_classes: int = 500

    def build(self) -> nn.Module:
        return Hubert(self._encoder(), self._hubert(), self.num_classes)

    def parsed(self) -> dict[str, Any]:
        if self.num_classes < 1:
            raise ValueError(
                f"model_config.num_classes: {self.num_classes}; the rows of class_embeddings are needed"
            )
        return {**super().parsed(), "hubert": self._hubert().resolved(), "num_classes": self.num_classes}

    def _hubert(self) -> HubertConfig:
        return parse_config(HubertConfig, self.hubert, "model_config.hubert")


@dataclass(kw_only=True)
class Wav2Vec2ModelConfig(EncoderModelConfig):
    """Of `wordless_wav2vec2`: pretrain.objectives.wav2vec2.Wav2Vec2Config."""

    wav2vec2: Tree = field(default_factory=dict)

    def build(self) -> nn.Module:
        return Wav2Vec2(self._encoder(), self._wav2vec2())

    def parsed(self) -> dict[str, Any]:
        return {**super().parsed(), "wav2vec2": self._wav2vec2().resolved()}

    def _wav2vec2(self) -> Wav2Vec2Config:
        return parse_config(Wav2Vec2Config, self.wav2vec2, "model_config.wav2vec2")


@dataclass(kw_only=True)
class RecognizerModelConfig(EncoderModelConfig):
    """Of `wordless_recognizer`: its classes (`Vocabulary.to_meta`), what its texts are like
    (pretrain.ctc.text.TextConfig) and how it was fine-tuned (pretrain.ctc.task.CTCConfig)."""

    vocabulary: Tree = field(default_factory=_english)
    text: Tree = field(default_factory=dict)
    ctc: Tree = field(default_factory=dict)

    def build(self) -> nn.Module:
        ctc = self._ctc()
        return Recognizer(
            self._encoder(), self._vocabulary(), final_dropout=ctc.final_dropout, layers=ctc.layers
        )

    def parsed(self) -> dict[str, Any]:
        text = parse_config(TextConfig, self.text, "model_config.text")
        return {
            **super().parsed(),
            "vocabulary": self._vocabulary().to_meta(),
            "text": text.resolved(),
            "ctc": self._ctc().resolved(),
        }

    def _ctc(self) -> CTCConfig:
        return parse_config(CTCConfig, self.ctc, "model_config.ctc")

    def _vocabulary(self) -> Vocabulary:
        symbols, spelling = self.vocabulary.get("symbols"), self.vocabulary.get("spelling", "characters")
        if (
            not isinstance(symbols, list)
            or not symbols
            or not all(isinstance(symbol, str) for symbol in symbols)
        ):
            raise ValueError(
                "model_config.vocabulary.symbols: a list of the symbols is needed, class 1 first (0 is the "
                "blank)"
            )
        spellings = ("characters", "jamo", "phones", "tokenizer")
        if spelling not in spellings or (spelling == "tokenizer") != (
            self.vocabulary.get("tokenizer") is not None
        ):
            raise ValueError(
                f"model_config.vocabulary.spelling: one of {', '.join(spellings)} is needed, the last with "
                f"`tokenizer`, the JSON of one, and no other with it; got {spelling!r}"
            )
        if twice := sorted(symbol for symbol, count in Counter(symbols).items() if count > 1):
            raise ValueError(
                f"model_config.vocabulary.symbols: {', '.join(map(repr, twice[:5]))} more than once; each is "
                "one class"
            )
        if spelling == "tokenizer" and (
            lacking := sorted(set(symbols) - _pieces(self.vocabulary["tokenizer"]))
        ):
            raise ValueError(
                f"model_config.vocabulary.symbols: {', '.join(map(repr, lacking[:5]))}: no pieces of "
                "vocabulary.tokenizer"
            )
        return Vocabulary.from_meta({**self.vocabulary, "spelling": spelling})


def _pieces(definition: Any) -> set[str]:
    """The pieces of a tokenizer, of its JSON."""
    from tokenizers import Tokenizer

    try:
        return set(Tokenizer.from_str(definition).get_vocab(with_added_tokens=True))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"model_config.vocabulary.tokenizer: not the JSON of a Hugging Face tokenizer ({error})"
        ) from None


class Family(NamedTuple):
    """A model family: its config, whose `build` is the factory, and the class of its models."""

    config: type[EncoderModelConfig]
    model: type[nn.Module]


FAMILIES = {
    "wordless_encoder": Family(EncoderModelConfig, EncoderModel),
    "wordless_hubert": Family(HubertModelConfig, Hubert),
    "wordless_wav2vec2": Family(Wav2Vec2ModelConfig, Wav2Vec2),
    "wordless_recognizer": Family(RecognizerModelConfig, Recognizer),
}
ARCHS = tuple(ARCHITECTURES)


def encoder_alone(state_dict: dict[str, object], config: EncoderModelConfig) -> dict[str, object]:
    """What of a checkpoint is its encoder's."""
    return {name: tensor for name, tensor in state_dict.items() if name.startswith("encoder.")}
