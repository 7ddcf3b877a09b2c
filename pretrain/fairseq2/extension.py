"""fairseq2's entry point for us (group `fairseq2.extension`): our models as its model families, our runs as
its checkpoints.

With wordless installed, `fairseq2.models.load_model("NAME")` loads what an asset card of one of the families
names (pretrain/weights/families.py says what a card has). What is loaded is our own module:

    model = load_model("my_hubert") layers = model.encoder.extract_all(waveforms, num_samples)  # (batch,
    samples) float32 16 kHz, (batch,) int64
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fairseq2.composition import register_model_family
from fairseq2.device import CPU
from fairseq2.error import NotSupportedError
from fairseq2.logging import log
from fairseq2.model_checkpoint import CorruptModelCheckpointError, ModelCheckpointLoader
from fairseq2.models import ModelFamily
from fairseq2.models.utils.ac import apply_layerwise_ac
from fairseq2.models.utils.fsdp import apply_layerwise_fsdp
from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.utils.validation import ValidationResult
from torch import Tensor, get_default_device, nn


def register(container: Any) -> None:
    """Register our families and the reader of run folders; ."""
    if "wordless_encoder" in container.iter_keys(ModelFamily):
        return
    try:
        _register_families(container)
        container.collection.register_instance(ModelCheckpointLoader, RunLoader())
    except Exception as error:  # whatever is missing of ours, fairseq2 goes on
        log.warning("wordless: its model families are not registered ({}: {})", type(error).__name__, error)


def _register_families(container: Any) -> None:
    from pretrain.weights.families import ARCHS, FAMILIES, encoder_alone

    for name, (config, model) in FAMILIES.items():
        register_family(container, name, config, model, encoder_alone if name == "wordless_encoder" else None)
        for arch in ARCHS:
            ConfigRegistrar(container, config)(arch)(partial(config, encoder={"architecture": arch}))


def register_family(
    container: Any, name: str, config: Any, model: type[nn.Module], converter: Any = None
) -> None:
    """Register a family whose configs have `build`, and its models an `encoder` or a `decoder` with `layers`.

    Our modules draw their own weights and have tables that no checkpoint holds, so they are not made on the
    meta device.
    """
    config.validate = _validate
    register_model_family(
        container,
        name,
        model,
        config,
        factory=_build,
        supports_meta=False,
        state_dict_converter=converter,
        fsdp_applier=shard_layers,
        layerwise_ac_applier=recompute_layers,
    )


def _validate(config: Any) -> ValidationResult:
    """fairseq2 calls this before it uses a config."""
    result = ValidationResult()
    try:
        config.parsed()
    except ValueError as error:
        result.add_error(str(error))
    return result


def _build(config: Any) -> nn.Module:
    # fairseq2 sets the device as the default one, which tables made by numpy do not follow
    model: nn.Module = config.build().to(get_default_device())
    return model


def shard_layers(model: Any, granularity: str, wrapper: Any) -> nn.Module:
    """FSDP: each transformer layer is a shard group of its own."""
    if granularity != "layer":
        raise NotSupportedError(
            f'`granularity` is {granularity!r}; models of wordless are sharded by "layer" or as a whole '
            '("model"): their encoder is '
            "called by other methods than `forward`, which FSDP does not see"
        )
    apply_layerwise_fsdp(_layers(model), wrapper)
    sharded: nn.Module = model
    return sharded


def recompute_layers(model: Any, every_nth_layer: int) -> nn.Module:
    """Activation checkpointing of every n-th transformer layer."""
    apply_layerwise_ac(_layers(model), every_nth_layer)
    recomputed: nn.Module = model
    return recomputed


def _layers(model: Any) -> nn.ModuleList:
    layers: nn.ModuleList = (model.decoder if hasattr(model, "decoder") else model.encoder).layers
    return layers


class RunLoader(ModelCheckpointLoader):  # type: ignore[misc]  # fairseq2 has no types where it is not installed
    """Reads the folder of one of our runs: its best checkpoint where one was kept, else the newest; hashes
    are compared."""

    def supports_path(self, path: Path) -> bool:
        return any(path.glob("step_*/state.json"))

    def lazy_load(
        self, path: Path, shard_dims: Mapping[str, int], options: Any = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the run, float32 on the CPU, as `options.state_dict_converter` has them."""
        from pretrain.training.checkpoint import load_weights

        if options is not None and options.gangs is not None and options.gangs.tp.size > 1:
            raise NotSupportedError("models of wordless are not split by tensor parallelism; use FSDP")
        try:
            tensors: dict[str, object] = dict(load_weights(path)[0])
        except ValueError as error:
            raise CorruptModelCheckpointError(path, str(error)) from None
        if options is not None and options.state_dict_converter is not None:
            tensors = options.state_dict_converter(tensors)
        for name, tensor in tensors.items():
            assert isinstance(tensor, Tensor) and tensor.device == CPU
            yield name, tensor
