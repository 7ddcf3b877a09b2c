"""torchaudio's wav2vec 2.0 and HuBERT state dicts: a `.pth` of a Wav2Vec2Model or, with HuBERT's heads, a HuBERTPretrainModel.

There is no config in such a file: shapes tell the architecture, and what they do not tell is as in the published models.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.objectives.hubert import HubertConfig
from pretrain.store.hashes import sha256_file
from pretrain.weights.foreign import Foreign, infer_encoder
from pretrain.weights.naming import canonical
from pretrain.weights.recognizer import read_head


def read_torchaudio(
    source: Path, state: dict[str, Tensor], options: dict[str, Any], vocabulary: Path | None = None
) -> Foreign:
    """Read a loaded state dict. `options` tell what its shapes do not, `vocabulary` what the classes of a CTC head are."""
    notes: list[str] = []
    tensors = canonical(state, "wav2vec2.", str(source))
    recognizer = read_head(tensors, "torchaudio", vocabulary, [], notes, str(source))
    encoder = infer_encoder(source, tensors, "torchaudio", options, notes)
    embeddings = tensors.get("logit_generator.label_embeddings")
    head = None if embeddings is None else HubertConfig(final_dim=embeddings.shape[1])
    return Foreign(
        "torchaudio",
        tensors,
        encoder,
        "hubert" if head else None,
        head,
        sha256_file(source),
        notes,
        recognizer,
    )


def write_torchaudio(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write canonical `tensors`: as a HuBERTPretrainModel with its heads, else as a Wav2Vec2Model, which has no mask embedding."""
    outside = ("mask_generator.", "logit_generator.")
    if any(name.startswith("logit_generator.") for name in tensors):
        state = {
            name if name.startswith(outside) else f"wav2vec2.{name}": tensor
            for name, tensor in tensors.items()
        }
    else:
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith(outside)}
    torch.save(state, path)
