"""What a recipe foresees: the stages that cannot be made, by the manifest alone, before hours of work on others."""

from importlib import import_module
from typing import Any

# Of a verb, the function that raises ValueError where the manifest of its config alone shows that it cannot be done.
FORESEEN = {
    "pretrain": "pretrain.data.batches:require_audio",
    "cluster": "quantize.clustering:require_frames",
    "measure": "quantize.measuring:require_frames",
    "train-synthesizer": "pretrain.data.batches:require_audio",
    "finetune": "pretrain.ctc.finetuning:require_transcripts",
    "transfer": "pretrain.ctc.transfer:require_transcripts",
}


def require_feasible(verb: str, config: Any) -> None:
    """ValueError where the config's finished manifest lacks what the verb needs."""
    if verb in FORESEEN:
        module, _, function = FORESEEN[verb].partition(":")
        getattr(import_module(module), function)(config)
