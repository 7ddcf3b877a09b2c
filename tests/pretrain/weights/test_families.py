"""The configs of our families. (Cards of runs, and fairseq2 itself: tests/fairseq2/test_extension.py.)"""

from typing import Any

import pytest
import torch

from pretrain.ctc.model import Recognizer
from pretrain.model.config import ARCHITECTURES, EncoderConfig
from pretrain.objectives.hubert import Hubert
from pretrain.weights.families import ARCHS, FAMILIES, EncoderModelConfig, encoder_alone
from units.lm.fairseq2 import UnitLMConfig

TINY = {"architecture": "tiny"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_builds_a_model_of_its_family(family: str) -> None:
    config = FAMILIES[family].config(encoder=TINY)
    assert isinstance(config.build(), FAMILIES[family].model)
    assert type(config)(**config.parsed()).parsed() == config.parsed()


def test_what_a_config_says_beside_the_encoder_is_in_the_model() -> None:
    hubert = FAMILIES["wordless_hubert"].config(encoder=TINY, hubert={"final_dim": 8}, num_classes=7).build()  # type: ignore[call-arg]
    assert isinstance(hubert, Hubert) and hubert.class_embeddings.shape == (7, 8)
    tree: dict[str, Any] = {
        "vocabulary": {"symbols": ["a", "b"]},
        "ctc": {"layers": "weighted", "final_dropout": 0.3},
    }
    recognizer = FAMILIES["wordless_recognizer"].config(encoder=TINY, **tree).build()
    assert isinstance(recognizer, Recognizer) and recognizer.layer_weights is not None
    assert recognizer.vocabulary.symbols == ["a", "b"] and recognizer.final_dropout == 0.3
    lm = UnitLMConfig(vocabulary={"num_units": 5, "num_levels": 2}, pattern="flatten").build()
    assert lm.decoder.vocabularies == (12,)


def test_a_config_may_be_sparse_and_every_architecture_can_be_named() -> None:
    assert set(ARCHS) == set(ARCHITECTURES)
    for name in ARCHS:
        config = EncoderModelConfig(encoder={"architecture": name, "layer_drop": 0.3})
        assert EncoderConfig(**config.parsed()["encoder"]) == EncoderConfig(architecture=name, layer_drop=0.3)  # type: ignore[arg-type]
    assert EncoderConfig(**EncoderModelConfig().parsed()["encoder"]) == EncoderConfig()


def test_an_encoder_leaves_the_heads_of_a_checkpoint() -> None:
    state: dict[str, object] = {
        "encoder.norm.weight": torch.ones(1),
        "head.weight": torch.ones(1),
        "encoders.x": 1,
    }
    assert [*encoder_alone(state, EncoderModelConfig())] == ["encoder.norm.weight"]
