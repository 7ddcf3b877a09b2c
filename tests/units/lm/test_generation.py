import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

from units.corpus.patterns import Pattern
from units.corpus.sequences import ListedSequences
from units.lm.generation import CompactDecoder, Int8Product, Precision, bfloat16_product, perplexity
from units.lm.language_model import log_likelihoods
from units.lm.model import Decoder, DecoderConfig, RopeScaling

CONTEXT = 32
SHAPES: dict[str, dict[str, object]] = {
    "grouped": {"num_kv_heads": 2},
    "untied, every head its own": {"num_kv_heads": 4, "tied_embeddings": False},
    "Qwen2's biases": {"num_kv_heads": 1, "qkv_bias": True},
    "a window": {"num_kv_heads": 2, "sliding_window": 5},
    "wide heads, scaled rotation": {
        "num_kv_heads": 2,
        "attention_dim": 96,
        "rope_scaling": RopeScaling(
            factor=4, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=16
        ),
    },
}


def loud_decoder(vocabularies: int | tuple[int, ...] = 30, **changes: object) -> Decoder:
    """Untrained, with weights so large that attention and norms matter."""
    torch.manual_seed(0)
    sizes = {"dim": 48, "num_layers": 2, "num_heads": 4, "ffn_dim": 80, "context": CONTEXT, "dropout": 0.0}
    decoder = Decoder(DecoderConfig.model_validate({**sizes, **changes}), vocabularies).eval()
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else torch.nn.init.uniform_(
            weight, 0.5, 1.5
        )
    return decoder


def draw(lengths: tuple[int, ...], *streams: int) -> list[np.ndarray]:
    return [np.random.default_rng(length).integers(0, 10, (length, *streams)) for length in lengths]


@torch.inference_mode()
def uncached(decoder: Decoder, sequence: np.ndarray) -> torch.Tensor:
    """Logits after the last step, by the decoder that is trained, alone and without a cache."""
    logits: torch.Tensor = decoder(torch.from_numpy(sequence)[None], torch.arange(len(sequence))[None])[0, -1]
    return logits


def after(model: CompactDecoder, sequences: list[np.ndarray], steps: int) -> torch.Tensor:
    """Logits (batch, vocabulary) when all but `steps` have been read at once and these one by one."""
    reading, logits = model.begin([sequence[: len(sequence) - steps] for sequence in sequences], steps)
    for back in range(steps, 0, -1):
        logits = model.step(reading, torch.from_numpy(np.stack([sequence[-back] for sequence in sequences])))
    return logits


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_steps_of_uneven_prompts_equal_the_uncached_decoder(shape: str) -> None:
    decoder, sequences = (
        loud_decoder(30, **SHAPES[shape]),
        draw((CONTEXT, 14, 9)),
    )  # the first fills the context
    expected = torch.stack([uncached(decoder, sequence) for sequence in sequences])
    for steps in (0, 1, 7):
        # float32 on both sides, other orders of summation; logits are about 10
        torch.testing.assert_close(
            after(CompactDecoder(decoder), sequences, steps), expected, rtol=1e-4, atol=1e-4
        )


def test_several_streams_are_read_as_the_sum_of_their_rows() -> None:
    decoder, sequences = loud_decoder((10, 12, 13), num_kv_heads=2), draw((12, 20), 3)
    expected = torch.stack([uncached(decoder, sequence) for sequence in sequences])
    torch.testing.assert_close(after(CompactDecoder(decoder), sequences, 5), expected, rtol=1e-4, atol=1e-4)


def test_a_window_that_is_asked_for_is_that_of_a_decoder_that_has_it() -> None:
    plain, windowed = loud_decoder(num_kv_heads=2), loud_decoder(num_kv_heads=2, sliding_window=5)
    sequences = draw((20, 11))
    model = CompactDecoder(plain, window=5)
    expected = torch.stack([uncached(windowed, sequence) for sequence in sequences])
    torch.testing.assert_close(after(model, sequences, 4), expected, rtol=1e-4, atol=1e-4)
    assert CompactDecoder(windowed, window=9).window == 5
    assert (expected - torch.stack([uncached(plain, sequence) for sequence in sequences])).abs().max() > 0.1


def test_the_half_precision_cache_of_gpus_gives_nearly_the_same() -> None:
    decoder, sequences = loud_decoder(num_kv_heads=2), draw((20, 11))
    model = CompactDecoder(decoder, "bfloat16")
    model.cache_dtype = torch.bfloat16
    expected = torch.stack([uncached(decoder, sequence) for sequence in sequences])
    found = after(model, sequences, 4)
    assert (found - expected).norm() < 0.05 * expected.norm()  # 8 bits of mantissa, some layers deep


@pytest.mark.parametrize(("precision", "rows"), list(product(["bfloat16", "int8"], [1, 3])))
def test_lower_precision_is_close(precision: Precision, rows: int) -> None:
    decoder, sequences = loud_decoder(num_kv_heads=2), draw((20, 14, 9)[:rows])
    expected = torch.stack([uncached(decoder, sequence) for sequence in sequences])
    found = after(CompactDecoder(decoder, precision), sequences, 4)
    error = float((found - expected).norm() / expected.norm())
    # inputs and weights rounded to 1/256 and, in 8 bits, to 1/127 of the largest; and not float32
    assert 1e-5 < error < 0.1, error


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize(("without_onednn", "width"), [(False, 64), (False, 65), (True, 64)])
def test_8_bit_products_are_those_of_their_rounded_weights(
    rows: int, without_onednn: bool, width: int
) -> None:
    weight, x = torch.randn(37, width), torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]
    quick = Int8Product(weight)
    # half a step, scales of 8 bits
    assert (quick.weight - weight).abs().max() <= 0.502 * (weight.abs().amax(1) / 127).max()
    if without_onednn:
        quick.packed = None
    scale = torch.rand(rows, 1) + 0.5
    expected = x.double() @ quick.weight.double().T
    for found, wanted in ((quick(x, None), expected), (quick(x, scale), expected * scale)):
        # each row's own scale: small rows beside large ones lose nothing. Rounding of inputs and, in one row,
        # of the result
        assert ((found - wanted).norm(dim=1) < 0.02 * wanted.norm(dim=1)).all()


def test_a_product_in_8_bits_does_not_depend_on_the_other_rows() -> None:
    quick, x = Int8Product(torch.randn(32, 64)), torch.randn(9, 64)
    x[5] *= 1000
    # sums of integers are exact
    torch.testing.assert_close(quick(x, None)[:2], quick(x[:2], None), rtol=0, atol=0)


def test_bfloat16_products_are_those_of_rounded_weights() -> None:
    weight, x = torch.randn(33, 64), torch.randn(5, 64)
    expected = x.bfloat16().double() @ weight.bfloat16().double().T
    # one rounding of the result to 8 bits
    torch.testing.assert_close(bfloat16_product(weight)(x, None).double(), expected, rtol=2**-8, atol=1e-2)
    scale = torch.rand(5, 1)
    torch.testing.assert_close(
        bfloat16_product(weight)(x, scale).double(), expected * scale, rtol=2**-7, atol=1e-2
    )


def test_bfloat16_products_run_on_a_processor_without_them() -> None:
    script = (
        "import torch; from units.lm.generation import bfloat16_product; torch.manual_seed(0)\n"
        "weight, x = torch.randn(33, 64), torch.randn(5, 64)\n"
        "expected = x.bfloat16().double() @ weight.bfloat16().double().T\n"
        "torch.testing.assert_close(bfloat16_product(weight)(x, None).double(), expected, rtol=2**-8, "
        "atol=1e-2)"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}  # read once, when a process begins
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["flatten", "delay"])
def test_likelihoods_are_those_that_score_gives(name: str) -> None:
    pattern = Pattern(name, (9, 7))
    decoder = loud_decoder(pattern.vocabularies, num_kv_heads=2)
    codes = [np.random.default_rng(n).integers(0, 7, (n, 2)) for n in (3, 12)]
    sequences = [pattern.arrange(some) for some in codes]
    total, count = CompactDecoder(decoder).log_likelihoods(pattern, sequences)
    assert count == 2 * 15 + 2  # EOS once in each
    expected = log_likelihoods(decoder, pattern, ListedSequences(sequences), 100).sum()
    assert total == pytest.approx(expected, rel=1e-5)
    assert perplexity(total, count) == pytest.approx(np.exp(-expected / count), rel=1e-4)


def test_8_bits_need_a_cpu() -> None:
    decoder = loud_decoder(num_kv_heads=2).to("meta")
    with pytest.raises(ValueError, match='"int8" runs on a CPU, not on meta'):
        CompactDecoder(decoder, "int8")
