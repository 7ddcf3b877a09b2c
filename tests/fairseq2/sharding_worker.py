"""What test_extension runs in two processes: a run of HuBERT that fairseq2 loads, shards by layers and
recomputes in backward, beside the same in one process.

python -m torch.distributed.run --nproc_per_node 2 tests/fairseq2/sharding_worker.py RUN
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fairseq2.assets import AssetCard
from fairseq2.gang import ProcessGroupGang, create_fsdp_gangs, create_parallel_gangs
from fairseq2.models import ModelFamily, load_model
from fairseq2.nn.fsdp import to_fsdp2
from torch.distributed.tensor import DTensor

from pretrain.data.utterance import num_frames
from pretrain.fairseq2.assets import resolver
from pretrain.objectives.hubert import HubertBatch, hubert_batch
from tests.fairseq2.test_extension import WAVEFORM


def batch_of(rank: int) -> HubertBatch:
    rng = np.random.default_rng(rank)
    waves = [rng.standard_normal(length).astype(np.float32) for length in (3200, 4000 + 640 * rank)]
    frames = [num_frames(len(wave)) for wave in waves]
    masks = [np.arange(count) % 3 == 0 for count in frames]
    return hubert_batch(waves, masks, [rng.integers(0, 9, count) for count in frames])


def main(run: Path) -> None:
    family = resolver().resolve(ModelFamily, key="wordless_hubert")
    config = {"encoder": WAVEFORM, "num_classes": 9}
    card = AssetCard(
        "mine", {"model_family": "wordless_hubert", "model_config": config, "checkpoint": str(run)}
    )
    dist.init_process_group("gloo")
    rank, gang = dist.get_rank(), ProcessGroupGang(dist.group.WORLD, torch.device("cpu"))
    gangs = create_fsdp_gangs(create_parallel_gangs(gang))
    alone: Any = load_model(card, device=torch.device("cpu")).eval()
    model: Any = load_model(card, gangs=gangs).eval()
    for name, tensor in model.state_dict().items():  # every process has them
        assert torch.equal(tensor, alone.state_dict()[name]), name
    model = family.apply_layerwise_ac(model, 1)
    model = to_fsdp2(model, gangs, lambda module, wrap: family.apply_fsdp(module, "layer", wrap))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    loss = model(batch_of(rank))
    loss.total.backward()
    for other in range(2):  # FSDP2 averages the gradients of the processes
        total = alone(batch_of(other)).total
        (total / 2).backward()
        if other == rank:
            torch.testing.assert_close(loss.total.detach(), total.detach(), rtol=0, atol=0)
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    found = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in model.named_parameters()
    }
    assert found.keys() == expected.keys() and sum(gradient is not None for gradient in found.values()) > 30
    for name, gradient in found.items():
        if gradient is None:
            assert expected[name] is None, name
            continue
        # two float32 numbers are added in another order, of which the sums over frames are as large as 100
        torch.testing.assert_close(
            gradient.full_tensor(),
            expected[name],
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
