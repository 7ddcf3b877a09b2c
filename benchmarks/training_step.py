"""A peer's training step and its optimiser. Nothing of ours is imported: a peer may live in another
Python."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.corpus import digest, plan_padded, read_corpus


class Update:
    """Backward, gradient clipping and AdamW (fused), the same for everybody."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], settings: dict[str, Any]):
        self.parameters, self.clip_norm = list(model.parameters()), settings["clip_norm"]
        # the published rate would blow up untrained weights without its warm-up
        self.adamw = torch.optim.AdamW(
            groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )

    def __call__(self, loss: Tensor) -> None:
        loss.backward()
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


class Peer:
    """Padded batches of like lengths; a subclass makes the model, the batch and the loss. A variant ends with
    "compiled" or not."""

    model: nn.Module

    def __init__(self, settings: dict[str, Any], folder: Path, variant: str):
        self.settings, self.device = settings, settings["device"]
        compiled, variant = variant.endswith("compiled"), variant.removesuffix("compiled").removesuffix("-")
        self.audio = read_corpus(folder)
        self.plan = plan_padded(
            np.array([len(waveform) for waveform in self.audio.waveforms]), settings["batch_seconds"]
        )
        self.amount = sum(map(len, self.audio.waveforms)) / 16000
        torch.manual_seed(settings["seed"])
        self.model = self.make_model(settings["sizes"], settings["heads"], variant).to(self.device).train()
        self.update = Update(self.model, [{"params": list(self.model.parameters())}], settings)
        self.called: Any = torch.compile(self.model) if compiled else self.model
        self.batches: list[tuple[Any, ...]] = []

    def about(self) -> dict[str, Any]:
        return {
            "inputs_sha256": digest(self.audio.waveforms),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps_per_round": len(self.plan),
            "padded_seconds": sum(self._longest(items) * len(items) for items in self.plan) / 16000,
        }

    def _longest(self, items: np.ndarray) -> int:
        return max(len(self.audio.waveforms[item]) for item in items)

    def prepare(self, number: int) -> None:
        np.random.seed(number)  # noqa: NPY002  # transformers draws its masks from the global generator
        self.batches = []
        for items in self.plan:
            waveforms = [self.audio.waveforms[item] for item in items]
            self.batches.append(self.make_batch(waveforms, [self.audio.labels[item] for item in items]))

    def run(self) -> None:
        precise = self.settings["precision"] == "float32"
        for batch in self.batches:
            moved = [x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch]
            with torch.autocast(self.device, torch.bfloat16, enabled=not precise):
                loss = self.loss(*moved)
            self.update(loss)

    def make_model(self, sizes: dict[str, Any], heads: dict[str, Any], variant: str) -> nn.Module:
        raise NotImplementedError

    def make_batch(self, waveforms: list[np.ndarray], labels: list[np.ndarray]) -> tuple[Any, ...]:
        raise NotImplementedError

    def loss(self, *batch: Any) -> Tensor:
        raise NotImplementedError
