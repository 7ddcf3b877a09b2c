"""An objective is one file: this one, with one line in OBJECTIVES, trains through the verb."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import wordless.cli
from pretrain.config import Config
from pretrain.data.batches import SpeechBatches
from pretrain.data.manifest import Manifest
from pretrain.data.packing import Layout, pack
from pretrain.data.utterance import num_frames
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder, load_encoder
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.collapse import variations
from pretrain.objectives.masking import span_mask
from pretrain.objectives.task import PretrainTask
from pretrain.store.artefact import read_meta
from pretrain.training.task import Loss
from wordless.verbs import VERBS

VERB = "pretrain.objectives.pretraining"


class RegressionConfig(Config):
    mask_start_probability: float = Field(0.1, gt=0, lt=1)
    mask_length: int = Field(3, ge=1)
    least_error: float = Field(0.0, ge=0, description="below it the run stops")


class RegressionBatch(NamedTuple):
    waveforms: Tensor
    layout: Layout
    mask: Tensor  # (frames,) bool


class Regression(nn.Module):
    """Predict the normalised front-end features of masked frames."""

    def __init__(self, encoder: EncoderConfig):
        super().__init__()
        self.encoder = Encoder(encoder)
        self.head = nn.Linear(encoder.dim, self.encoder.front_end.dim)

    def forward(self, batch: RegressionBatch) -> Loss:
        encoded = self.encoder.encode(batch.waveforms, batch.layout, batch.mask)
        context = encoded.last[batch.mask]
        errors = (self.head(context) - encoded.normed[batch.mask].detach()).square().mean(1)
        count = errors.new_full((), len(errors))
        metrics = {"error": (errors.detach().sum(), count)}
        metrics |= variations(batch.waveforms, encoded.features, context, self.training)
        return Loss(errors.sum(), count, metrics)


class RegressionTask(PretrainTask):
    config_class = RegressionConfig

    def build(self) -> Regression:
        return Regression(self.config.encoder)

    def load(self, batches: SpeechBatches, items: np.ndarray, epoch: int) -> RegressionBatch:
        waveforms, masks = [], []
        for item in items.tolist():
            rng = batches.rng(item, epoch)
            waveforms.append(batches.load(item, rng)[0])
            frames = num_frames(len(waveforms[-1]))
            masks.append(span_mask(frames, self.table.mask_start_probability, self.table.mask_length, rng))
        return RegressionBatch(*pack(waveforms), torch.from_numpy(np.concatenate(masks)))

    def collapse(self, metrics: dict[str, float], step: int) -> str | None:
        return "collapsed: too good" if metrics["error"] < self.table.least_error else None


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The line in OBJECTIVES; the verb's module reads the table when it is imported."""
    monkeypatch.setitem(OBJECTIVES, "regression", f"{__name__}:RegressionTask")
    monkeypatch.delitem(sys.modules, VERB, raising=False)
    yield
    sys.modules.pop(VERB, None)


CONFIG = """
out = "{folder}/run"
manifest = "{folder}/manifest"
objective = "regression"
[regression]
mask_length = 4
[encoder]
architecture = "tiny"
num_mels = 20
[batches]
batch_seconds = 2.0
crop_seconds = 0.5
[evaluation]
layer = 1
num_classes = 3
[training]
max_steps = 12
log_every = 4
device = "cpu"
"""


@pytest.fixture
def recipe(tmp_path: Path, make_corpus: Callable[..., Manifest], registered: None) -> Path:
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(length) for length in (9000, 4000, 12000, 7000, 6000)]
    make_corpus(tmp_path, waves, splits=["train"] * 4 + ["dev"])
    (tmp_path / "toy.toml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "toy.toml"


def test_an_objective_in_one_file_trains_through_the_verb(recipe: Path) -> None:
    run = recipe.parent / "run"
    assert wordless.cli.main(["pretrain", str(recipe), "optimizer.lr=0.01"]) == 0
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["error"] < curve[0]["error"] and curve[-1]["valid_loss"] > 0
    assert curve[-1]["feature_variation"] > 0.01
    meta = read_meta(run)
    assert meta["objective"] == "regression"
    assert meta["config"]["regression"] == {
        "mask_start_probability": 0.1,
        "mask_length": 4,
        "least_error": 0.0,
    }
    encoder, _ = load_encoder(run)
    assert encoder.config.architecture == "tiny"


def test_runs_of_other_objectives_have_no_table_of_it(registered: None) -> None:
    config_class, _ = VERBS["pretrain"].load()
    keys = {"out": "o", "manifest": "m", "training": {"max_steps": 1}}
    resolved = config_class.model_validate({**keys, "objective": "wav2vec2"}).resolved()
    assert "regression" not in resolved and {"hubert", "wav2vec2"} < resolved.keys()


def test_its_table_is_checked_with_the_rest(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["regression.mask_lenght=3", "hubert.mask_length=0", "training.max_steps=0"]
    assert wordless.cli.main(["pretrain", str(recipe), *wrong]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "regression.mask_lenght: unknown key; did you mean 'mask_length'?" in said
    assert "hubert.mask_length" in said and "training.max_steps" in said
    assert wordless.cli.main(["pretrain", str(recipe), 'labels="labels"']) == 2
    assert '`labels` is needed for objective = "hubert" and only there' in capsys.readouterr().err


def test_its_collapse_stops_the_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["alarm.after_steps=2", "regression.least_error=100.0"]
    assert wordless.cli.main(["pretrain", str(recipe), *limits]) == 2
    assert "stopped at step 4: collapsed: too good" in capsys.readouterr().err
