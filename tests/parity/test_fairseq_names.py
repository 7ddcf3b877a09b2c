"""fairseq's names for the weights of a model of transformers: the same run comes out of both files.

fairseq itself does not install beside a current torch. What stands in for it is transformers' state dict
under fairseq's names, by the substitutions that transformers' and torchaudio's own converters make; their
features are compared elsewhere here.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.model.encoder import load_encoder
from pretrain.store.hashes import sha256_file
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.exporting import export_weights
from tests.parity.peers import import_peer, transformers_model

transformers = pytest.importorskip("transformers")

SUBSTITUTIONS = [
    (r"^(wav2vec2|hubert)\.", ""),
    (r"^masked_spec_embed$", "mask_emb"),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"\.pos_conv_embed\.conv\.parametrizations\.weight\.original0$", ".pos_conv.0.weight_g"),
    (r"\.pos_conv_embed\.conv\.parametrizations\.weight\.original1$", ".pos_conv.0.weight_v"),
    (r"\.pos_conv_embed\.conv\.", ".pos_conv.0."),
    (r"(layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"\.feed_forward\.intermediate_dense\.", ".fc1."),
    (r"\.feed_forward\.output_dense\.", ".fc2."),
    (r"(conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"^quantizer\.codevectors$", "quantizer.vars"),
    (r"^project_hid\.", "final_proj."),
]


def as_fairseq(model: Any) -> dict[str, Tensor]:
    norm = ".2." if model.config.feat_extract_norm == "group" else ".2.1."
    renamed = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in [*SUBSTITUTIONS, (r"(conv_layers\.\d+)\.layer_norm\.", rf"\g<1>{norm}")]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Wav2Vec2ForPreTraining", "base"),
        ("Wav2Vec2ForPreTraining", "large"),
        ("HubertModel", "large without conv bias"),
    ],
)
def test_both_files_give_the_same_run_and_an_export_has_the_same_names(
    name: str, kind: str, tmp_path: Path
) -> None:
    peer = transformers_model(
        name, kind, num_codevectors_per_group=8, codevector_dim=24, proj_codevector_dim=20
    )
    model = {
        "_name": "hubert" if name == "HubertModel" else "wav2vec2",
        "encoder_layers": 3,
        "encoder_embed_dim": 64,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "latent_vars": 8,
        "conv_bias": peer.config.conv_bias,
        "layer_norm_first": peer.config.do_stable_layer_norm,
        "final_dim": 20,
        "extractor_mode": "default" if kind == "base" else "layer_norm",
        "latent_dim": 24,
        "conv_feature_layers": "[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32,2,2)] + [(32,2,2)]",
    }
    theirs = as_fairseq(peer)
    torch.save(
        {"args": None, "cfg": {"model": model, "task": {"normalize": False}}, "model": theirs},
        tmp_path / "peer.pt",
    )
    import_weights(
        ImportConfig(source=str(tmp_path / "peer.pt"), out=str(tmp_path / "fairseq"), allow_pickle=True)
    )
    run, weights = import_peer(peer, tmp_path), "step_00000000/model.safetensors"
    assert sha256_file(tmp_path / "fairseq" / weights) == sha256_file(run / weights)
    wave = torch.randn(1, 5000)
    ours = [load_encoder(path)[0](wave, torch.tensor([5000])) for path in (run, tmp_path / "fairseq")]
    assert torch.equal(*ours)  # the settings are the same too
    export_weights(run, tmp_path / "exported.pt", "fairseq")
    exported = torch.load(tmp_path / "exported.pt", weights_only=True)["model"]
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in exported.items())
