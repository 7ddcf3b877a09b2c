"""Our decoder against transformers' LlamaForCausalLM with the same weights: the same logits."""

import pytest
import torch

from units.model import Decoder, DecoderConfig

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers_llama(tied: bool) -> None:
    config = DecoderConfig(
        dim=48, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=80, context=64, tied_embeddings=tied, rope_theta=500.0
    )
    torch.manual_seed(0)
    ours = Decoder(config, vocabulary_size=23).eval()
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=23,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()
    renamed = {name if name.startswith("lm_head") else f"model.{name}": weight for name, weight in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    theirs.tie_weights()
    tokens = torch.randint(23, (2, 40))
    with torch.no_grad():
        mine, reference = ours(tokens, torch.arange(40).expand(2, -1)), theirs(tokens).logits
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)  # float32, the same operations in another order
