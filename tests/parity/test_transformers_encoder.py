"""Every layer of our encoder against transformers' wav2vec 2.0 and HuBERT, their random weights imported by
`wordless import`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.data.utterance import num_frames
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder, load_encoder
from pretrain.weights.huggingface import HUGGINGFACE_KEYS
from pretrain.weights.naming import canonical, parameters, to_ours
from tests.parity.peers import import_peer, layer_outputs, transformers_model

transformers = pytest.importorskip("transformers")

MODELS = [
    ("base", "Wav2Vec2Model"),
    ("large", "Wav2Vec2Model"),
    ("base", "HubertModel"),
    ("large", "HubertModel"),
    ("large without conv bias", "HubertModel"),
]
# Padded batches of one to three utterances from the shortest that has a frame to a little over a second.
LENGTHS = st.lists(st.integers(400, 20000), min_size=1, max_size=3)

Pair = tuple[Any, Encoder]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """(theirs, ours) of a kind and a class, made once."""
    made: dict[tuple[str, str], Pair] = {}

    def get(kind: str, name: str) -> Pair:
        if (kind, name) not in made:
            theirs = transformers_model(name, kind)
            made[kind, name] = theirs, load_encoder(import_peer(theirs, tmp_path_factory.mktemp("peer")))[0]
        return made[kind, name]

    return get


def draw_waves(lengths: list[int], seed: int) -> Tensor:
    """(batch, samples) with an envelope, zero where padded."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.zeros(len(lengths), max(lengths))
    for wave, length in zip(waves, lengths, strict=True):
        loudness = torch.rand(length // 800 + 1, generator=generator).repeat_interleave(800)[:length]
        wave[:length] = 0.3 * loudness * torch.randn(length, generator=generator)
    return waves


def ours_by_layer(encoder: Encoder, waves: Tensor, lengths: list[int]) -> list[Tensor]:
    """The first layer's input, every layer's output and the last output, (batch, frames, dim) each."""
    counts = torch.tensor(lengths)
    with torch.no_grad():
        return [*encoder.extract_all(waves, counts), encoder(waves, counts)]


def assert_equal_layers(ours: list[Tensor], theirs: list[Tensor], row: int, frames: int) -> None:
    assert len(ours) == len(theirs)
    for layer, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        # float32, the same operations in another order through seven convolutions and the layers, features of
        # order 1 to 5: the largest difference seen is 8e-6
        torch.testing.assert_close(
            mine[row, :frames],
            reference[:frames],
            rtol=1e-5,
            atol=5e-5,
            msg=lambda text, at=layer: f"layer {at}: {text}",
        )


@pytest.mark.parametrize(("kind", "name"), MODELS)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
@settings(max_examples=8, derandomize=True)
def test_every_layer_of_every_utterance_equals_that_of_transformers_alone(
    kind: str, name: str, models: Callable[[str, str], Pair], lengths: list[int], seed: int
) -> None:
    """Ours in one batch, theirs one utterance at a time: with a group norm their batches count the padding
    (see below)."""
    theirs, ours = models(kind, name)
    waves = draw_waves(lengths, seed)
    found = ours_by_layer(ours, waves, lengths)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = [x[0] for x in layer_outputs(theirs, waves[row : row + 1, :length])]
        assert_equal_layers(found, expected, row, num_frames(length))


@pytest.mark.parametrize(("kind", "name"), [pair for pair in MODELS if pair[0] != "base"])
@given(lengths=LENGTHS, seed=st.integers(0, 999))
@settings(max_examples=5, derandomize=True)
def test_with_layer_norms_their_padded_batches_equal_ours_too(
    kind: str, name: str, models: Callable[[str, str], Pair], lengths: list[int], seed: int
) -> None:
    theirs, ours = models(kind, name)
    waves = draw_waves(lengths, seed)
    found = ours_by_layer(ours, waves, lengths)
    attention = (torch.arange(waves.shape[1]) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        expected = layer_outputs(theirs, waves, attention_mask=attention)
    for row, length in enumerate(lengths):
        assert_equal_layers(found, [x[row] for x in expected], row, num_frames(length))


@torch.no_grad()
def test_with_a_group_norm_padding_changes_their_features_and_not_ours(
    models: Callable[[str, str], Pair],
) -> None:
    """Why BASE is compared one utterance at a time: a statistic over time that includes padding moves every
    frame."""
    theirs, ours = models("base", "Wav2Vec2Model")
    lengths = [6000, 18000]
    waves = draw_waves(lengths, 0)
    frames = num_frames(lengths[0])
    attention = (torch.arange(waves.shape[1]) < torch.tensor(lengths)[:, None]).long()
    alone, batched = (
        theirs(waves[:1, :6000]).last_hidden_state[0],
        theirs(waves, attention_mask=attention).last_hidden_state[0],
    )
    assert (alone - batched[:frames]).abs().max() > 0.05  # features of order 1
    mine = ours(waves, torch.tensor(lengths))[0, :frames]
    torch.testing.assert_close(mine, alone, rtol=1e-5, atol=5e-5)  # as above


@pytest.mark.parametrize("name", ["Wav2Vec2Model", "HubertModel"])
def test_every_layer_of_a_whole_base_model_equals_that_of_transformers(name: str) -> None:
    """The conversion in memory: a file of this size takes longer to write than all the rest."""
    config = transformers.HubertConfig() if name == "HubertModel" else transformers.Wav2Vec2Config()
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(config).eval()
    ours = EncoderConfig(
        **{key: getattr(config, their_key) for key, (their_key, _) in HUGGINGFACE_KEYS.items()}
    )
    with torch.device("meta"):
        encoder = Encoder(ours).eval()
    shapes = {f"encoder.{key}": tensor.shape for key, tensor in encoder.state_dict().items()}
    found = to_ours(
        canonical(theirs.state_dict(), "", name), parameters("huggingface", ours, None), shapes, name
    )
    assert sum(tensor.numel() for tensor in found.values()) == 94_371_712  # BASE, with its mask embedding
    encoder.load_state_dict(
        {key.removeprefix("encoder."): tensor for key, tensor in found.items()}, assign=True
    )
    lengths = [9000, 5200]
    waves = draw_waves(lengths, 1)
    layers = ours_by_layer(encoder, waves, lengths)
    assert len(layers) == 14
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = [x[0] for x in layer_outputs(theirs, waves[row : row + 1, :length])]
        assert_equal_layers(layers, expected, row, num_frames(length))
