import itertools
import math
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ctc.finetuning import finetune
from pretrain.ctc.model import CTCBatch, Recognizer, greedy, load_recognizer
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.packing import pack
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import load_encoder
from pretrain.training.checkpoint import save_checkpoint
from tests.pretrain.ctc.tones import TEXTS, MakeCorpus, save_encoder, settings, spell

AB = Vocabulary(["a", "b"])


def noise(*lengths: int) -> list[np.ndarray]:
    return [0.1 * np.random.default_rng(n).standard_normal(n, dtype=np.float32) for n in lengths]


def test_the_loss_sums_over_all_alignments() -> None:
    """Against every path of the frames that spells the target, and only over the utterance's own frames."""
    torch.manual_seed(0)
    model = Recognizer(EncoderConfig(architecture="tiny"), AB).eval()
    targets = torch.tensor([[1, 2, 2], [1, 0, 0]])
    waves, layout = pack(noise(1680, 1040))  # 5 and 3 frames
    batch = CTCBatch(waves, layout, targets, (3, 1))
    loss = model(batch)
    expected = 0.0
    with torch.no_grad():
        log_probs = model.logits(batch).log_softmax(2)
    for row, frames, target in ((0, 5, [1, 2, 2]), (1, 3, [1])):
        total = 0.0
        for path in itertools.product(range(3), repeat=frames):
            merged = [c for t, c in enumerate(path) if c != 0 and (t == 0 or path[t - 1] != c)]
            if merged == target:
                total += math.exp(sum(float(log_probs[row, t, c]) for t, c in enumerate(path)))
        expected -= math.log(total)
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)  # float32 log sums
    assert loss.count.item() == 4


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("front_end", ["filterbank", "waveform"])
def test_a_weighted_head_reads_the_average_of_all_layers_each_normalised(
    norm_first: bool, front_end: str
) -> None:
    """Against the layers' features, one utterance after another, summed in a loop."""
    torch.manual_seed(0)
    tree = {"architecture": "tiny", "norm_first": norm_first, "front_end": front_end, "num_layers": 3}
    model = Recognizer(EncoderConfig.model_validate(tree), AB, layers="weighted").eval()
    assert model.layer_weights is not None and model.layer_weights.shape == (4,)
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([0.3, -1.0, 2.0, 0.5]))
        waves = noise(4000, 2000)
        logits = model.logits(CTCBatch.untranscribed(*pack(waves)))
        shares = torch.exp(model.layer_weights) / torch.exp(model.layer_weights).sum()
        for row, wave in enumerate(waves):
            layers = model.encoder.extract_all(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
            mean = torch.zeros_like(layers[0][0])
            for share, layer in zip(shares, layers, strict=True):
                x = layer[0]
                mean += (
                    share
                    * (x - x.mean(1, keepdim=True))
                    / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                )
            expected = F.linear(mean, model.head.weight, model.head.bias)
            # other batch shapes and orders of sums in float32
            torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_a_dropped_layer_counts_as_its_input_and_every_parameter_keeps_a_gradient() -> None:
    torch.manual_seed(0)
    tree = {
        "architecture": "tiny",
        "dropout": 0.0,
        "input_dropout": 0.0,
        "norm_first": False,
        "num_layers": 3,
    }
    model = Recognizer(EncoderConfig.model_validate(tree), AB, layers="weighted").train()
    model.encoder.gates = [True, False, True]
    batch = CTCBatch(
        *pack(noise(4000, 2000)), torch.tensor([[1, 2], [2, 0]]), (2, 1), torch.arange(18) % 2 == 0
    )
    model(batch).total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    dropped = [gradient for name, gradient in gradients.items() if name.startswith("encoder.layers.1.")]
    assert dropped and all(not gradient.any() for gradient in dropped if gradient is not None)
    weights = gradients["layer_weights"]
    # The softmax's weights are equal, so those of layers 1 and 2, which are one output, get the same
    # gradient.
    assert weights is not None and weights[1] == weights[2] != weights[3]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=8), st.text("ab |", max_size=8)),
        min_size=1,
        max_size=5,
    )
)
def test_error_rates_of_a_validation_are_jiwers(rows: list[tuple[list[int], str]]) -> None:
    vocabulary, text = Vocabulary(["a", "b", "|"]), TextConfig()
    wanted = [text.normalize(target) or "a" for _, target in rows]
    model = Recognizer(EncoderConfig(architecture="tiny"), vocabulary)
    frames = [max(1, len(path)) for path, _ in rows]
    log_probs = torch.full((len(rows), max(frames), 4), -9.0)
    for row, (path, _) in enumerate(rows):
        log_probs[row, range(frames[row]), path or [0]] = 0.0
    targets = [vocabulary.encode(target) for target in wanted]
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(target) for target in targets], batch_first=True
    )
    layout = pack([np.zeros(400 + 320 * (n - 1), np.float32) for n in frames])[1]
    batch = CTCBatch(torch.zeros(0), layout, padded, tuple(map(len, targets)))
    rates = {
        name: float(total / count) for name, (total, count) in model._error_rates(log_probs, batch).items()
    }
    said = greedy(log_probs, frames, vocabulary)
    assert rates == pytest.approx({"wer": jiwer.wer(wanted, said), "cer": jiwer.cer(wanted, said)})


def test_of_phones_each_is_a_word_and_there_are_no_characters() -> None:
    vocabulary = Vocabulary(["ah", "b", "tʃ"], "phones")
    model = Recognizer(EncoderConfig(architecture="tiny"), vocabulary)
    log_probs = F.one_hot(torch.tensor([[1, 1, 0, 3, 2]]), 4).float()
    batch = CTCBatch(torch.zeros(0), pack([np.zeros(1680, np.float32)])[1], torch.tensor([[1, 2, 2]]), (3,))
    rates = {name: (float(a), float(b)) for name, (a, b) in model._error_rates(log_probs, batch).items()}
    assert rates == {"wer": (1.0, 3.0)}  # ah tʃ b for ah b b


def test_a_loaded_recogniser_is_the_best_one_or_the_last(tmp_path: Path, make_corpus: MakeCorpus) -> None:
    save_encoder(tmp_path / "encoder")
    splits = ["train", "train", "dev", "train"]
    manifest = make_corpus(tmp_path, [spell(text) for text in TEXTS], texts=TEXTS, splits=splits)
    config = settings(
        tmp_path,
        manifest,
        ctc={"layers": "weighted"},
        training={"max_steps": 6, "validate_every": 1, "keep_checkpoints": 9},
    )
    summary = finetune(config)
    assert summary["best_step"] in range(1, 7) and summary["best_valid_wer"] <= summary["valid_wer"]
    best, last = (load_recognizer(config.out, which) for which in ("best", "last"))  # type: ignore[arg-type]
    assert (
        best.vocabulary.symbols == ["a", "b", "c", "d", "|"]
        and best.text == TextConfig()
        and best.codebook is None
    )
    assert not best.model.training and best.model.layer_weights is not None and len(last.fingerprint) == 16
    assert (best.fingerprint == last.fingerprint) == (summary["best_step"] == 6)
    encoder, fingerprint = load_encoder(config.out)
    assert fingerprint == best.fingerprint
    for name, weight in best.model.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], weight)
    with pytest.raises(ValueError, match="has no vocabulary; give a `finetune` run"):
        load_recognizer(tmp_path / "encoder")


def test_a_run_of_the_vocabularies_before_is_refused(tmp_path: Path) -> None:
    model = Recognizer(EncoderConfig(architecture="tiny"), AB)
    state = {"kind": "recognizer", "config": {}, "extra": {"vocabulary": ["a", "b"]}}
    save_checkpoint(tmp_path, 1, model, torch.optim.AdamW(model.parameters()), state)
    with pytest.raises(
        ValueError, match="by an earlier wordless, whose vocabularies are not read; fine-tune again"
    ):
        load_recognizer(tmp_path)
