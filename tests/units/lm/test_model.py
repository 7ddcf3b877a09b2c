import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from units.lm.attention import PackedDocuments, block_causal_mask, packs_on
from units.lm.model import Decoder, DecoderConfig

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
        layer = {
            name.removeprefix(f"layers.{number}."): w
            for name, w in weights.items()
            if name.startswith(f"layers.{number}.")
        }
        normed = [norm(x, layer["input_layernorm.weight"]) for x in states]
        q, k, v = (
            [(layer[f"self_attn.{p}_proj.weight"] @ x).split(config.head_dim) for x in normed] for p in "qkv"
        )
        for t in range(len(tokens)):
            heads = []
            for h in range(config.num_heads):
                query = turned(q[t][h], t)
                scores = torch.stack([query @ turned(k[s][h // group], s) for s in range(t + 1)]) / math.sqrt(
                    config.head_dim
                )
                heads.append(sum(p * v[s][h // group] for s, p in enumerate(scores.softmax(0))))
            states[t] = states[t] + layer["self_attn.o_proj.weight"] @ torch.cat(heads)
            x = norm(states[t], layer["post_attention_layernorm.weight"])
            gate = layer["mlp.gate_proj.weight"] @ x
            states[t] = states[t] + layer["mlp.down_proj.weight"] @ (
                gate * gate.sigmoid() * (layer["mlp.up_proj.weight"] @ x)
            )
    head = weights["embed_tokens.weight"] if config.tied_embeddings else weights["lm_head.weight"]
    return torch.stack([head @ norm(x, weights["norm.weight"]) for x in states])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_logits_equal_the_slow_oracle(tied: bool, num_kv_heads: int) -> None:
    model = decoder(tied_embeddings=tied, num_kv_heads=num_kv_heads)
    tokens = [9, 3, 3, 7, 0, 10, 5]
    logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0]
    # float32 against float64
    torch.testing.assert_close(logits.double(), slow_logits(model, tokens), rtol=1e-4, atol=1e-4)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3, [2] * 12, [3] * 4 + [4] * 4 + [5] * 4])
POSITIONS = torch.tensor([[*range(5), *range(4), 0, 0, 0], [*range(12)], [*range(4)] * 3])


@pytest.mark.parametrize("path", ["mask", "varlen"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("here", [True, False])
def test_changing_one_document_moves_no_logit_of_another(
    path: Literal["mask", "varlen"], window: int | None, here: bool
) -> None:
    model = decoder(sliding_window=window)
    tokens = torch.randint(VOCABULARY, (3, 12))
    with torch.set_grad_enabled(here):  # `units.lm.cpu_kernels` compute where gradients are wanted
        before = model(tokens, POSITIONS, PackedDocuments(DOCUMENTS, path))
        for document in range(-1, 6):
            changed = torch.where(torch.eq(DOCUMENTS, document), (tokens + 1) % VOCABULARY, tokens)
            after = model(changed, POSITIONS, PackedDocuments(DOCUMENTS, path))
            others = torch.ne(DOCUMENTS, document)
            assert torch.equal(after[others], before[others])
            assert (after != before).any(-1)[~others].all()


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("here", [True, False])
def test_both_paths_agree(window: int | None, here: bool) -> None:
    model = decoder(sliding_window=window)
    tokens = torch.randint(VOCABULARY, (3, 12))
    with torch.set_grad_enabled(here):
        masked, alone = (
            model(tokens, POSITIONS, PackedDocuments(DOCUMENTS, path)) for path in ("mask", "varlen")
        )
    read = DOCUMENTS >= 0
    # another kernel, sums in another order
    torch.testing.assert_close(masked[read], alone[read], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    not packs_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16),
    reason="needs a GPU",
)
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_for_documents_end_to_end_agrees_with_the_mask_and_leaks_nothing(
    window: int | None,
) -> None:
    config = DecoderConfig(
        dim=48, num_layers=2, num_heads=6, num_kv_heads=2, ffn_dim=40, sliding_window=window
    )  # heads of 8
    model = Decoder(config, VOCABULARY).eval().to("cuda", torch.bfloat16)
    tokens, positions, documents = (
        torch.randint(VOCABULARY, (3, 12)).cuda(),
        POSITIONS.cuda(),
        DOCUMENTS.cuda(),
    )
    packed = PackedDocuments(documents)
    alone = model(tokens, positions, packed)
    assert packed.path == "varlen"
    masked = model(tokens, positions, PackedDocuments(documents, "mask"))
    read = documents >= 0
    torch.testing.assert_close(alone[read], masked[read], rtol=0.02, atol=0.02)  # bfloat16 has 8 bits
    changed = model(torch.where(documents.eq(3), 0, tokens), positions, PackedDocuments(documents))
    assert torch.equal(changed[documents.ne(3)], alone[documents.ne(3)])


def test_many_short_documents_take_the_mask_and_few_long_ones_are_attended_to_alone() -> None:
    for lengths, path in (([3, 5] * 128, "mask"), ([500, 524], "varlen")):
        packed = PackedDocuments(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None])
        packed.choose(torch.float32, 4, 16, None)
        assert packed.path == path


def test_neighbours_of_one_length_are_one_run() -> None:
    assert PackedDocuments(DOCUMENTS).runs == [
        (1, 5, False),
        (1, 4, False),
        (1, 3, True),
        (1, 12, False),
        (3, 4, False),
    ]
    assert PackedDocuments(DOCUMENTS).bounds.tolist() == [0, 5, 9, 12, 24, 28, 32, 36]


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_ends_where_it_should(window: int) -> None:
    """One layer: the gradient of a logit reaches the token itself and window - 1 before it (transformers'
    semantics)."""
    embedded: list[Tensor] = []
    model = decoder(sliding_window=window, num_layers=1)
    model.embed_tokens.register_forward_hook(
        lambda _module, _input, output: embedded.append(output.retain_grad() or output)
    )
    model(torch.randint(VOCABULARY, (1, 12)), torch.arange(12)[None])[0, 8].sum().backward()
    assert embedded[0].grad is not None
    assert (embedded[0].grad[0] != 0).any(-1).nonzero()[:, 0].tolist() == list(range(max(0, 9 - window), 9))


def test_streams_are_summed_and_split() -> None:
    torch.manual_seed(0)
    several, one = Decoder(CONFIG, (3, 5, 4)).eval(), Decoder(CONFIG, 12).eval()
    one.load_state_dict(several.state_dict())
    tokens, positions = (
        torch.stack([torch.randint(size, (2, 7)) for size in (3, 5, 4)], -1),
        torch.arange(7).expand(2, -1),
    )
    summed = sum(one.embed_tokens(tokens[..., stream] + offset) for stream, offset in enumerate((0, 3, 8)))
    torch.testing.assert_close(several.embed(tokens), summed)
    logits = several(tokens, positions)
    assert [part.shape for part in several.split(logits)] == [(2, 7, 3), (2, 7, 5), (2, 7, 4)]
    assert torch.equal(torch.cat(several.split(logits), -1), logits)
    torch.testing.assert_close(Decoder.embed(one, tokens[..., 0]), one.embed_tokens(tokens[..., 0]))


def test_a_document_scores_alone_as_in_a_packed_row() -> None:
    model = decoder()
    a, b = torch.randint(VOCABULARY, (1, 5)), torch.randint(VOCABULARY, (1, 6))
    packed = model(
        torch.cat([a, b], 1), torch.tensor([[*range(5), *range(6)]]), torch.tensor([[0] * 5 + [1] * 6])
    )
    alone = torch.cat([model(a, torch.arange(5)[None]), model(b, torch.arange(6)[None])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)  # another attention kernel


def test_no_token_sees_a_later_one() -> None:
    embedded: list[Tensor] = []
    model = decoder()
    model.embed_tokens.register_forward_hook(
        lambda _module, _input, output: embedded.append(output.retain_grad() or output)
    )
    logits = model(
        torch.randint(VOCABULARY, (1, 8)), torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.long)
    )
    logits[0, 4].sum().backward()
    assert embedded[0].grad is not None
    seen = (embedded[0].grad[0] != 0).any(-1)
    assert seen.tolist() == [True] * 5 + [False] * 3


def test_the_mask_is_block_diagonal_and_causal() -> None:
    mask = block_causal_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    mask = block_causal_mask(torch.tensor([[0, 0, 0, 1]]), window=2)[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "even multiple"),
        ({"num_kv_heads": 4}, "must be a multiple"),
        ({"attention_dim": 30}, "attention_dim 30 must be an even multiple"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**CONFIG.model_dump(), **changes})
