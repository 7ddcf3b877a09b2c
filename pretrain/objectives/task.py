"""What all objectives share: the keys of `pretrain` beside the objective's own table, and the training task.

A subclass of `PretrainTask` names its config class, builds its model, makes its batches (`load`), and may
describe its metrics and recognise its collapse.
"""

import os
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import nn

from pretrain.config import Config, PathStr, Split
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.packing import pack
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.objectives.collapse import AlarmConfig, variation_alarm
from pretrain.objectives.pnmi import pnmi_of_features
from pretrain.progress import console
from pretrain.training.speech_task import SpeechTask
from pretrain.training.task import OptimizerConfig, TrainingConfig


class EvaluationConfig(Config):
    """PNMI of a layer's k-means units at every validation, `valid_pnmi`."""

    layer: int = Field(6, ge=0, description="after that layer's residual; 0 is the first layer's input")
    num_classes: int = Field(100, ge=2)
    max_seconds: float = Field(
        600.0,
        gt=0,
        description="of utterances with phones, drawn once; longer ones are cropped as in training",
    )


class RunConfig(Config):
    """Data, architecture and training of an encoder."""

    out: PathStr
    manifest: PathStr
    split: Split = "train"
    valid_split: Split = Field(
        "dev", description='its loss is reported while training, if it is there; "": no validation'
    )
    objective: str
    labels: PathStr | None = Field(None, description="HuBERT's targets: a labels folder")
    init: PathStr | None = Field(
        None, description="start from the weights of this run, for example an earlier iteration"
    )
    encoder: EncoderConfig = EncoderConfig()
    batches: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    alarm: AlarmConfig = AlarmConfig()
    evaluation: EvaluationConfig | None = Field(None, description="needs phone alignments in the valid split")


class PretrainTask(SpeechTask):
    """A training task of `pretrain`. The model of a subclass has an `encoder`."""

    config_class: ClassVar[type[Config]]
    needs_labels: ClassVar[bool] = False
    class_weights: ClassVar[tuple[str, ...]] = ()  # parameters with a row for each class of the labels

    def __init__(self, config: RunConfig, manifest: Manifest, labels: Labels | None = None):
        self.config, self.labels = config, labels
        self.table: Any = getattr(config, config.objective)  # the objective's own config
        seed, valid = config.training.seed, config.valid_split
        self.train_set = SpeechBatches(manifest.select(config.split), config.batches, seed)
        self.valid_set: SpeechBatches | None = None
        if valid is not None and valid in manifest.splits:
            self.valid_set = SpeechBatches(manifest.select(valid), config.batches, seed)
        elif valid is not None:
            missing = f"{manifest.folder} has no utterances of valid_split = {valid!r}"
            say(f"no validation: {missing}; it has {', '.join(sorted(manifest.splits)) or 'no splits'}")
        self.judged = self._draw_aligned()
        self.model = self.build()

    def build(self) -> nn.Module:
        """The model; its `encoder` is the one that is kept."""
        raise NotImplementedError

    def load(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> Any:
        """A micro-batch of utterances, a NamedTuple; a pure function of its arguments."""
        raise NotImplementedError

    def collapse(self, metrics: dict[str, float], step: int) -> str | None:
        """A message that stops the run where the numbers of a log line show that this objective collapsed."""
        return None

    @property
    def encoder(self) -> Encoder:
        encoder = self.model.encoder
        assert isinstance(encoder, Encoder)
        return encoder

    def blocks(self) -> list[nn.Module]:
        return list(self.encoder.layers)

    def collate(self, items: np.ndarray, epoch: int) -> Any:
        return self.load(self.train_set, items, epoch)

    def collate_validation(self, items: np.ndarray) -> Any:
        assert self.valid_set is not None
        return self.load(self.valid_set, items, -1)

    def before_step(self, step: int) -> None:
        self.encoder.draw_layers(self.config.training.seed, step)

    def alarm(self, metrics: dict[str, float], step: int) -> str | None:
        if step < self.config.alarm.after_steps:
            return None
        return self.collapse(metrics, step) or variation_alarm(metrics, self.config.alarm)

    def evaluate(self) -> dict[str, float]:
        """`pnmi` of the configured layer."""
        wanted = self.config.evaluation
        if wanted is None or not self.judged:
            return {}
        encoder, valid, pieces = self.encoder, self.valid_set, []
        assert valid is not None
        for item in self.judged:
            waveform, first = valid.load(item, valid.rng(item, -1))
            buffer, layout = pack([waveform])
            buffer = buffer.to(encoder.mask_embedding.device)
            features = encoder.extract_packed(buffer, layout, wanted.layer)[-1]
            pieces.append((valid.manifest[item], first, features.float().cpu().numpy()))
        return {"pnmi": pnmi_of_features(pieces, wanted.num_classes, self.config.training.seed)}

    def _draw_aligned(self) -> list[int]:
        """Utterances of the valid split with phones, in random order, up to `evaluation.max_seconds`."""
        if self.config.evaluation is None:
            return []
        chosen: list[int] = []
        seconds = 0.0
        if (valid := self.valid_set) is not None and valid.manifest.has_phones:
            rng = np.random.default_rng([self.config.training.seed, 4])
            for item in rng.permutation(valid.items).tolist():
                if seconds >= self.config.evaluation.max_seconds:
                    break
                if valid.manifest[item].phones:
                    chosen.append(item)
                    seconds += valid.seconds(np.array([item]))
        if not chosen:
            say(
                f"no valid_pnmi: no utterance of valid_split = {self.config.valid_split!r} has phones (index "
                "with `alignments`)"
            )
        return chosen


def say(text: str) -> None:
    """Print a line on stderr, on one rank."""
    if os.environ.get("RANK", "0") == "0":
        console.print(text, markup=False, highlight=False, soft_wrap=True)
