"""Small peers with random weights, and what the parity tests do with them. Their weights reach us through
`wordless import`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.config import parse_config
from pretrain.model.config import EncoderConfig
from pretrain.objectives.hubert import Hubert, HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from pretrain.training.checkpoint import load_weights
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.huggingface import HEADS_FILE
from pretrain.weights.naming import Format, Objective, canonical, parameters

KINDS: dict[str, dict[str, Any]] = {
    "base": {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "large without conv bias": {
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
        "conv_bias": False,
    },
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
NO_DROPOUT: dict[str, Any] = dict.fromkeys(
    (
        "layerdrop",
        "hidden_dropout",
        "attention_dropout",
        "activation_dropout",
        "feat_proj_dropout",
        "final_dropout",
    ),
    0.0,
)


def scatter(module: nn.Module, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """Move every parameter a little: norms and biases, born as ones and zeros, would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def transformers_model(name: str, kind: str, **options: Any) -> Any:
    """A transformers model in eval mode, for example `transformers_model("HubertModel", "base")`."""
    import transformers

    config = getattr(transformers, "HubertConfig" if name.startswith("Hubert") else "Wav2Vec2Config")
    torch.manual_seed(0)
    return scatter(
        getattr(transformers, name)(config(**{**SMALL, **KINDS[kind], **NO_DROPOUT, **options}))
    ).eval()


def import_peer(peer: Any, folder: Path, heads: Mapping[str, Tensor] | None = None) -> Path:
    """Save a transformers model and import it; waveforms are not normalised, as the peer gets them too."""
    peer.save_pretrained(folder / "peer")
    if heads is not None:
        save_file(dict(heads), folder / "peer" / HEADS_FILE)
    import_weights(
        ImportConfig(source=str(folder / "peer"), out=str(folder / "run"), normalize_waveform=False)
    )
    return folder / "run"


def load_pretraining(run: Path, **settings: Any) -> Hubert | Wav2Vec2:
    """The model of an imported run with its heads, without dropout and with whole gradients."""
    weights, meta, _ = load_weights(run)
    whole = {"input_dropout": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    encoder = parse_config(
        EncoderConfig, {**meta["config"]["encoder"], **whole, "feature_gradient_scale": 1.0}, str(run)
    )
    tree = {**meta["config"][meta["objective"]], **settings}
    model: Hubert | Wav2Vec2
    if meta["objective"] == "hubert":
        model = Hubert(encoder, parse_config(HubertConfig, tree, str(run)), len(weights["class_embeddings"]))
    else:
        model = Wav2Vec2(encoder, parse_config(Wav2Vec2Config, tree, str(run)))
    model.load_state_dict(weights)
    return model


def compare_gradients(
    ours: Hubert | Wav2Vec2,
    theirs: Mapping[str, Tensor | None],
    form: Format,
    objective: Objective,
    prefix: str,
) -> None:
    """Every gradient of ours beside theirs, given under their names."""
    groups = ours.config.num_groups if isinstance(ours.config, Wav2Vec2Config) else 1
    known = canonical(
        {name: tensor for name, tensor in theirs.items() if tensor is not None}, prefix, "gradients"
    )
    own = dict(ours.named_parameters())
    table = parameters(form, ours.encoder.config, objective, groups)
    assert {parameter.ours for parameter in table} == set(own)
    for parameter in table:
        assert all(name in known for name in parameter.theirs), parameter
        expected, gradient = (
            parameter.read([known[name] for name in parameter.theirs]),
            own[parameter.ours].grad,
        )
        assert gradient is not None
        # float32 sums over frames and samples in another order, beside the largest entry of the tensor. A
        # key's bias moves no attention weight, so its gradient is rounding alone: 1e-5 beside gradients of
        # order 1 to 100.
        torch.testing.assert_close(
            gradient,
            expected,
            rtol=1e-3,
            atol=2e-4 * float(expected.abs().max()) + 1e-5,
            msg=lambda text, name=parameter.ours: f"{name}: {text}",
        )


def layer_outputs(theirs: Any, waves: Tensor, **inputs: Any) -> list[Tensor]:
    """transformers: the first layer's input, every layer's output, and the last hidden state, by hooks."""
    outputs: list[Tensor] = []
    hooks = [theirs.encoder.dropout.register_forward_hook(lambda _, __, y: outputs.append(y))]
    for layer in theirs.encoder.layers:
        hooks.append(
            layer.register_forward_hook(lambda _, __, y: outputs.append(y[0] if isinstance(y, tuple) else y))
        )
    outputs.append(theirs(waves, **inputs).last_hidden_state)
    for hook in hooks:
        hook.remove()
    return outputs
