"""Both objectives and their gradients against transformers: its wav2vec 2.0 loss, and HuBERT's by a slow
oracle on its encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.utterance import num_frames
from pretrain.objectives.hubert import Hubert, hubert_batch
from pretrain.objectives.wav2vec2 import Wav2Vec2, draw_distractors, wav2vec2_batch
from tests.parity.peers import compare_gradients, import_peer, load_pretraining, transformers_model
from tests.reference.losses import hubert_loss

transformers = pytest.importorskip("transformers")

CODES: dict[str, Any] = {
    "num_codevectors_per_group": 8,
    "codevector_dim": 24,
    "proj_codevector_dim": 20,
    "diversity_loss_weight": 0.3,
    "num_negatives": 9,
    "contrastive_logits_temperature": 0.15,
    "feat_quantizer_dropout": 0.0,
}


def draw(lengths: list[int], rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Waveforms, and masks of different sizes."""
    waves = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in lengths]
    masks = []
    for number, length in enumerate(lengths):
        mask = np.zeros(num_frames(length), bool)
        mask[rng.choice(len(mask), 6 + 2 * number, replace=False)] = True
        masks.append(mask)
    return waves, masks


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("base", [9000, 9000, 9000]),
        ("large", [9000, 5000, 7040]),
        ("large without conv bias", [7040, 9000, 4000]),
    ],
)
def test_wav2vec2_loss_and_gradients_equal_those_of_transformers(
    kind: str, lengths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks and distractors, and the argmax instead of a Gumbel draw with the softmax's gradient, in
    both.

    BASE on equal lengths: transformers' group norm counts padding.
    """

    def without_noise(logits: Tensor, tau: float = 1, hard: bool = False, dim: int = -1) -> Tensor:
        soft = (logits / tau).softmax(dim)
        return F.one_hot(soft.argmax(dim), soft.shape[dim]).to(soft.dtype) - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", without_noise)
    theirs = transformers_model("Wav2Vec2ForPreTraining", kind, **CODES)
    ours = load_pretraining(import_peer(theirs, tmp_path), feature_penalty=0.0)  # transformers has none
    assert isinstance(ours, Wav2Vec2)
    assert (ours.config.temperature, ours.config.num_distractors, ours.config.diversity_weight) == (
        0.15,
        9,
        0.3,
    )
    theirs.set_gumbel_temperature(0.7)
    ours.quantizer.temperature = 0.7

    rng = np.random.default_rng(0)
    waves, masks = draw(lengths, rng)
    distractors = [draw_distractors(int(mask.sum()), 9, rng) for mask in masks]
    longest = num_frames(max(lengths))
    padded, attention = torch.zeros(3, max(lengths)), torch.zeros(3, max(lengths), dtype=torch.long)
    mask_time, negatives = torch.zeros(3, longest, dtype=torch.bool), np.zeros((3, longest, 9), np.int64)
    for row, (wave, mask, drawn) in enumerate(zip(waves, masks, distractors, strict=True)):
        padded[row, : len(wave)], attention[row, : len(wave)] = torch.from_numpy(wave), 1
        mask_time[row, : len(mask)] = torch.from_numpy(mask)
        places = np.flatnonzero(mask)
        negatives[row, places] = places[drawn] + row * longest
    mine = ours.train()(wav2vec2_batch(waves, masks, distractors))
    reference = theirs.train()(
        padded,
        attention_mask=attention,
        mask_time_indices=mask_time,
        sampled_negative_indices=torch.from_numpy(negatives),
    )
    assert mine.count == mask_time.sum()
    assert mine.metrics["contrastive_loss"][0].item() == pytest.approx(
        reference.contrastive_loss.item(), rel=1e-5
    )  # float32 sums
    assert mine.metrics["diversity_loss"][0].item() == pytest.approx(
        reference.diversity_loss.item(), rel=1e-5
    )
    assert mine.total.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    mine.total.backward()
    reference.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compare_gradients(ours, gradients, "huggingface", "wav2vec2", "wav2vec2.")


@pytest.mark.parametrize("kind", ["base", "large without conv bias"])
def test_hubert_loss_and_gradients_equal_a_slow_oracle_on_transformers_encoder(
    kind: str, tmp_path: Path
) -> None:
    """Frame by frame, the true class and then all classes with its duplicate at minus infinity, as fairseq
    has it."""
    theirs = transformers_model("HubertModel", kind)
    generator = torch.Generator().manual_seed(1)
    heads = {"label_embeddings": (11, 20), "final_proj.weight": (20, 64), "final_proj.bias": (20,)}
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in heads.items()}
    ours = load_pretraining(import_peer(theirs, tmp_path, drawn), feature_penalty=10.0)
    assert isinstance(ours, Hubert)
    lengths, rng = [9000, 5000, 7040], np.random.default_rng(0)
    waves, masks = draw(lengths, rng)
    labels = [rng.integers(11, size=len(mask)) for mask in masks]
    labels[1] = labels[1][:-1]  # the last frame has no label

    parameters = {name: tensor.requires_grad_() for name, tensor in drawn.items()}
    loss = torch.zeros((), dtype=torch.float64)
    projected, targets, counted = [], [], []
    for wave, mask, known in zip(waves, masks, labels, strict=True):
        source, masked = torch.from_numpy(wave)[None], torch.from_numpy(mask)[None]
        hidden = theirs(source, mask_time_indices=masked).last_hidden_state[0]
        query = F.linear(hidden, parameters["final_proj.weight"], parameters["final_proj.bias"])
        frames = [t for t in np.flatnonzero(mask).tolist() if t < len(known)]
        for t in frames:
            scores = (
                F.cosine_similarity(query[t].double(), parameters["label_embeddings"].double(), dim=-1) / 0.1
            )
            positive = scores[known[t]]
            negatives = torch.where(torch.arange(11) == known[t], -torch.inf, scores)
            loss = loss + torch.cat([positive[None], negatives]).logsumexp(0) - positive
        loss = loss + 10 * len(frames) * theirs.feature_extractor(source).double().square().mean()
        projected.append(query.detach())
        targets.append(F.pad(torch.from_numpy(known), (0, len(mask) - len(known)), value=-1))
        counted.append(len(frames))
    loss.backward()

    mine = ours.train()(hubert_batch(waves, masks, labels))
    assert mine.count == sum(counted)
    known_masks = [torch.from_numpy(mask) for mask in masks]
    plain, _, _ = hubert_loss(projected, drawn["label_embeddings"].detach(), targets, known_masks, 0.1)
    # float32 sums against float64
    assert mine.metrics["prediction_loss"][0].item() == pytest.approx(plain, rel=1e-5)
    assert mine.total.item() == pytest.approx(loss.item(), rel=1e-5)
    mine.total.backward()
    gradients = {
        name: parameter.grad for name, parameter in [*theirs.named_parameters(), *parameters.items()]
    }
    compare_gradients(ours, gradients, "huggingface", "hubert", "hubert.")
