"""torchaudio's wav2vec 2.0 and HuBERT state dicts: a `.pth` of a Wav2Vec2Model or, with HuBERT's heads, a
HuBERTPretrainModel.

There is no config in such a file: shapes tell the architecture, and what they do not tell is as in the
published models.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.model.config import EncoderConfig
from pretrain.objectives.hubert import HubertConfig
from pretrain.store.disk import atomic_path
from pretrain.store.hashes import sha256_file
from pretrain.weights.foreign import NUM_HEADS, Exported, Foreign, Source, infer_encoder
from pretrain.weights.naming import canonical
from pretrain.weights.recognizer import read_head


def claims(source: Source) -> bool:
    """Whether a file holds nothing but tensors."""
    return all(isinstance(tensor, Tensor) for tensor in source.state.values())


def read(source: Source) -> Foreign:
    """The model of a file."""
    return read_torchaudio(source.path, source.state, source.options, source.vocabulary)


def write(out: Path, model: Exported) -> dict[str, Any]:
    """Writes a file; returns the objective."""
    if model.objective is None:
        model.notes.append("the mask embedding is left out: torchaudio's Wav2Vec2Model has none")
    if flags := _flags_to_import_again(model.encoder):
        model.notes.append(f"a torchaudio file has no config: `wordless import` of this one needs {flags}")
    with atomic_path(out) as temporary:
        write_torchaudio(temporary, model.tensors("torchaudio"))
    return {"objective": model.named or "wav2vec2"}


def read_torchaudio(
    source: Path, state: dict[str, Tensor], options: dict[str, Any], vocabulary: Path | None = None
) -> Foreign:
    """Read a loaded state dict. `options` tell what its shapes do not, `vocabulary` what the classes of a CTC
    head are."""
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
    """Write canonical `tensors`: as a HuBERTPretrainModel with its heads, else as a Wav2Vec2Model, which has
    no mask embedding."""
    outside = ("mask_generator.", "logit_generator.")
    if any(name.startswith("logit_generator.") for name in tensors):
        state = {
            name if name.startswith(outside) else f"wav2vec2.{name}": tensor
            for name, tensor in tensors.items()
        }
    else:
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith(outside)}
    torch.save(state, path)


def _flags_to_import_again(encoder: EncoderConfig) -> str:
    """What `import` would take otherwise from the shapes of a file without a config."""
    flags = [f"--num-heads {encoder.num_heads}"] if NUM_HEADS.get(encoder.dim) != encoder.num_heads else []
    if encoder.normalize_waveform != (encoder.conv_norm == "layer"):
        flags.append("--normalize-waveform" if encoder.normalize_waveform else "--no-normalize-waveform")
    return " ".join(flags)
