import math

import pytest
import torch
from torch import Tensor

from units.model import Cache, Decoder, DecoderConfig, block_causal_mask

CONFIG = DecoderConfig(dim=24, num_layers=2, num_heads=6, num_kv_heads=2, ffn_dim=40, context=32, dropout=0.1)
VOCABULARY = 11


def decoder(**changes: object) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG.model_copy(update=changes), VOCABULARY).eval()
    with torch.no_grad():
        for weight in model.parameters():  # far from the initial values, so that every part counts
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def slow_logits(model: Decoder, tokens: list[int]) -> Tensor:
    """Llama for one sequence, a head, a position and a rotated pair at a time; float64."""
    config, weights = model.config, {name: w.double() for name, w in model.state_dict().items()}
    half, group = config.head_dim // 2, config.num_heads // config.num_kv_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + config.norm_eps).sqrt() * weight

    def turned(head: Tensor, position: int) -> Tensor:
        out = head.clone()
        for i in range(half):
            angle = position / config.rope_theta ** (2 * i / config.head_dim)
            out[i] = head[i] * math.cos(angle) - head[i + half] * math.sin(angle)
            out[i + half] = head[i + half] * math.cos(angle) + head[i] * math.sin(angle)
        return out

    states = [weights["embed_tokens.weight"][token] for token in tokens]
    for number in range(config.num_layers):
        layer = {name.removeprefix(f"layers.{number}."): w for name, w in weights.items() if name.startswith(f"layers.{number}.")}
        normed = [norm(x, layer["input_layernorm.weight"]) for x in states]
        q, k, v = ([(layer[f"self_attn.{p}_proj.weight"] @ x).split(config.head_dim) for x in normed] for p in "qkv")
        for t in range(len(tokens)):
            heads = []
            for h in range(config.num_heads):
                query = turned(q[t][h], t)
                scores = torch.stack([query @ turned(k[s][h // group], s) for s in range(t + 1)]) / math.sqrt(config.head_dim)
                heads.append(sum(p * v[s][h // group] for s, p in enumerate(scores.softmax(0))))
            states[t] = states[t] + layer["self_attn.o_proj.weight"] @ torch.cat(heads)
            x = norm(states[t], layer["post_attention_layernorm.weight"])
            gate = layer["mlp.gate_proj.weight"] @ x
            states[t] = states[t] + layer["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * (layer["mlp.up_proj.weight"] @ x))
    head = weights["embed_tokens.weight"] if config.tied_embeddings else weights["lm_head.weight"]
    return torch.stack([head @ norm(x, weights["norm.weight"]) for x in states])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_logits_equal_the_slow_oracle(tied: bool, num_kv_heads: int) -> None:
    model = decoder(tied_embeddings=tied, num_kv_heads=num_kv_heads)
    tokens = [9, 3, 3, 7, 0, 10, 5]
    logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0]
    torch.testing.assert_close(logits.double(), slow_logits(model, tokens), rtol=1e-4, atol=1e-4)  # float32 against float64


def test_changing_one_document_moves_no_logit_of_another() -> None:
    model = decoder()
    tokens = torch.randint(VOCABULARY, (2, 12))
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3, [2] * 12])
    positions = torch.tensor([[*range(5), *range(4), 0, 0, 0], [*range(12)]])
    before = model(tokens, positions, documents)
    for document in (0, 1, 2):
        changed = torch.where(documents == document, (tokens + 1) % VOCABULARY, tokens)
        moved = (model(changed, positions, documents) != before).any(-1)
        assert moved[documents == document].all() and not moved[documents != document].any()


def test_a_document_scores_alone_as_in_a_packed_row() -> None:
    model = decoder()
    a, b = torch.randint(VOCABULARY, (1, 5)), torch.randint(VOCABULARY, (1, 6))
    packed = model(torch.cat([a, b], 1), torch.tensor([[*range(5), *range(6)]]), torch.tensor([[0] * 5 + [1] * 6]))
    alone = torch.cat([model(a, torch.arange(5)[None]), model(b, torch.arange(6)[None])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)  # another attention kernel


def test_no_token_sees_a_later_one() -> None:
    embedded: list[Tensor] = []
    model = decoder()
    model.embed_tokens.register_forward_hook(lambda _module, _input, output: embedded.append(output.retain_grad() or output))
    logits = model(torch.randint(VOCABULARY, (1, 8)), torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.long))
    logits[0, 4].sum().backward()
    assert embedded[0].grad is not None
    seen = (embedded[0].grad[0] != 0).any(-1)
    assert seen.tolist() == [True] * 5 + [False] * 3


def test_cached_logits_equal_uncached_ones() -> None:
    model = decoder()
    tokens, positions = torch.randint(VOCABULARY, (3, 10)), torch.arange(10).expand(3, -1)
    cache = Cache(model, batch=3, capacity=10)
    with torch.no_grad():
        parts = [model(tokens[:, :4], positions[:, :4], cache=cache)]
        parts += [model(tokens[:, t : t + 1], positions[:, t : t + 1], cache=cache) for t in range(4, 10)]
        whole = model(tokens, positions)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)  # sums in another order


def test_the_mask_is_block_diagonal_and_causal() -> None:
    mask = block_causal_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(("changes", "message"), [({"num_heads": 5}, "even multiple"), ({"num_kv_heads": 4}, "must be a multiple")])
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**CONFIG.model_dump(), **changes})
