"""DPO against its formula written out, the reading of pairs, and training that raises the margin of pairs it
has not seen."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.training.engine import train
from pretrain.training.run import Run
from pretrain.training.task import OptimizerConfig, TrainingConfig
from units.corpus.bpe import Merger
from units.corpus.patterns import PATTERNS, Pattern
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import load_language_model
from units.lm.model import Decoder, DecoderConfig
from units.lm.preferences import DPOConfig, Preferences, PreferenceTask
from units.lm.training import LMOptimizerConfig, TrainLMConfig, train_lm

K = 8
PLAIN = Vocabulary(num_units=K)
MERGED = Vocabulary(num_units=K, merges=((0, 1), (8, 2), (3, 3)))
LEVELS = Vocabulary(num_units=K, num_levels=2)
ON_CPU = TrainingConfig(max_steps=40, device="cpu")


def decoder_for(pattern: Pattern) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        dim=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=32, context=64, dropout=0.0
    )
    return Decoder(config, pattern.vocabularies)


def drawn_pairs(count: int, seed: int, levels: int = 1) -> list[dict[str, Any]]:
    """The better continuation counts up from where it begins, the worse one is of arbitrary units; prompts
    may be empty."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, start, size = (
            rng.integers(0, K, (rng.integers(0, 6), levels)),
            rng.integers(0, K),
            rng.integers(2, 8),
        )
        chosen = np.tile((start + np.arange(size))[:, None] % K, (1, levels))
        record = {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rng.integers(0, K, (rng.integers(2, 8), levels)),
        }
        pairs.append(
            {part: (codes[:, 0] if levels == 1 else codes).tolist() for part, codes in record.items()}
        )
    return pairs


def written(path: Path, pairs: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def task_of(
    path: Path, pairs: list[dict[str, Any]], vocabulary: Vocabulary, name: str = "delay", **settings: Any
) -> PreferenceTask:
    pattern = Pattern(name, vocabulary.sizes)
    config = DPOConfig(pairs=written(path, pairs), **settings)
    return PreferenceTask(decoder_for(pattern), vocabulary, pattern, config, ON_CPU, batch_tokens=100)


def likelihood_by_hand(
    decoder: Decoder, pattern: Pattern, vocabulary: Vocabulary, prompt: list[Any], answer: list[Any]
) -> float:
    """log p(answer EOS | prompt), a document by itself, as the difference of what everything and the prompt
    alone get."""
    merger = Merger(vocabulary)
    levels = len(vocabulary.sizes)
    codes = [
        merger.encode(np.array(part)) if levels == 1 else np.array(part).reshape(-1, levels)
        for part in (prompt, answer)
    ]
    sequence = pattern.arrange(np.concatenate(codes)).reshape(-1, pattern.num_streams)
    # The same codes without a mark of their own: numbered, so that the prompt's can be told from the answer's
    # in every cell.
    numbers = np.arange(len(sequence) * levels).reshape(-1, levels)[: sum(map(len, codes))]
    wide = Pattern(pattern.name, (numbers.size,) * levels)
    places = wide.arrange(numbers[:, 0] if levels == 1 else numbers).reshape(-1, pattern.num_streams)
    tokens = torch.from_numpy(sequence)[None]
    with torch.no_grad():
        logits = decoder(
            tokens if pattern.num_streams > 1 else tokens[..., 0], torch.arange(len(sequence))[None]
        )
    total = 0.0
    for stream, of_stream in enumerate(decoder.split(logits)):
        table = of_stream[0].double().numpy()
        for step in range(1, len(sequence)):
            place, symbol = places[step, stream], sequence[step, stream]
            code = place < (wide.bos[0] if pattern.num_streams == 1 else wide.bos[stream])
            of_prompt = code and place % numbers.size < len(codes[0]) * levels
            if (code and not of_prompt) or (stream == 0 and symbol == pattern.eos):
                total += table[step - 1, symbol] - math.log(np.exp(table[step - 1]).sum())
    return total


@pytest.mark.parametrize(
    ("vocabulary", "name"),
    [(PLAIN, "delay"), (MERGED, "delay"), *[(LEVELS, name) for name in PATTERNS]],
    ids=str,
)
def test_the_loss_is_the_formula_s(tmp_path: Path, vocabulary: Vocabulary, name: str) -> None:
    pairs = drawn_pairs(5, 0, vocabulary.num_levels)
    beta, smoothing, weight = 0.3, 0.1, 0.7
    settings = {"beta": beta, "label_smoothing": smoothing, "likelihood_weight": weight}
    task = task_of(tmp_path / "pairs.jsonl", pairs, vocabulary, name, **settings)
    decoder, pattern = task.model.decoder, task.pairs.pattern

    def likelihoods() -> np.ndarray:
        asked = [
            [
                likelihood_by_hand(decoder, pattern, vocabulary, p["prompt"], p[y])
                for y in ("chosen", "rejected")
            ]
            for p in pairs
        ]
        return np.array(asked)

    reference = likelihoods()
    with torch.no_grad():
        for weights in decoder.parameters():
            weights.mul_(1.3)
    policy = likelihoods()
    merger = Merger(vocabulary)
    symbols = [
        1
        + (
            len(merger.encode(np.array(p["chosen"])))
            if name == "delay" and vocabulary.num_levels == 1
            else 2 * len(p["chosen"])
        )
        for p in pairs
    ]
    margins = beta * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    sigmoid = 1 / (1 + np.exp(-margins))
    expected = (
        -(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid) - weight * policy[:, 0] / symbols
    )

    loss = task.model(task.collate(np.arange(5), 0))
    # float32 sums of some twenty log probabilities: a few 1e-6 each
    np.testing.assert_allclose(loss.total.item(), expected.sum(), rtol=1e-5)
    assert loss.count == 5
    metrics = {metric: float(total / count) for metric, (total, count) in loss.metrics.items()}
    assert metrics["margin"] == pytest.approx(margins.mean(), abs=1e-4)
    assert metrics["margin"] == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"], abs=1e-5)
    assert metrics["accuracy"] == pytest.approx((margins > 0).mean())
    assert metrics["chosen_bits"] == pytest.approx(
        -policy[:, 0].sum() / np.sum(symbols) / math.log(2), rel=1e-5
    )


def test_the_loss_does_not_depend_on_what_shares_the_batch(tmp_path: Path) -> None:
    task = task_of(tmp_path / "pairs.jsonl", drawn_pairs(6, 1), PLAIN)
    with torch.no_grad():
        task.model.decoder.norm.weight.mul_(1.5)
    together = task.model(task.collate(np.arange(6), 0)).total
    alone = sum(task.model(task.collate(np.array([i]), 0)).total for i in reversed(range(6)))
    torch.testing.assert_close(together, alone)


def test_before_the_first_step_the_loss_is_log_two_and_the_gradient_prefers_the_chosen(
    tmp_path: Path,
) -> None:
    task = task_of(tmp_path / "pairs.jsonl", drawn_pairs(6, 2), PLAIN)
    batch = task.collate(np.arange(6), 0)
    loss = task.model(batch)
    # The reference was computed in batches of other shapes: float32 rounding of sums near 20.
    assert loss.total.item() / 6 == pytest.approx(math.log(2), abs=1e-5)
    loss.total.backward()
    with torch.no_grad():
        for weights in task.model.parameters():
            assert weights.grad is not None
            weights.sub_(0.01 * weights.grad)
    after = task.model(batch)
    assert after.total < loss.total
    assert after.metrics["margin"][0] > 0
    assert after.metrics["chosen_reward"][0] > 0 > after.metrics["rejected_reward"][0]


def test_training_raises_the_margin_of_pairs_it_has_not_seen(tmp_path: Path) -> None:
    held_out = written(tmp_path / "valid.jsonl", drawn_pairs(30, 4))
    task = task_of(tmp_path / "pairs.jsonl", drawn_pairs(60, 3), PLAIN, valid_pairs=held_out)
    assert task.held_out_reference is not None
    before = {name: weights.clone() for name, weights in task.model.state_dict().items()}
    summary = train(
        Run(
            task,
            out=str(tmp_path / "run"),
            kind="unit-lm",
            training=ON_CPU,
            optimizer=OptimizerConfig(lr=3e-3),
            config={},
            parents={},
        )
    )
    assert summary["valid_accuracy"] > 0.9
    assert summary["valid_margin"] > 0.3
    assert summary["valid_loss"] < math.log(2) - 0.1
    assert any(not torch.equal(before[name], weights) for name, weights in task.model.state_dict().items())


def test_train_lm_learns_preferences_from_a_run_and_leaves_a_run(tmp_path: Path, trained: Path) -> None:
    pairs, held_out = (written(tmp_path / f"{seed}.jsonl", drawn_pairs(20, seed)) for seed in (5, 6))
    config = TrainLMConfig(
        out=str(tmp_path / "run"),
        init=str(trained),
        dpo=DPOConfig(pairs=pairs, valid_pairs=held_out),
        batch_tokens=100,
        training=TrainingConfig(max_steps=10, device="cpu"),
        optimizer=LMOptimizerConfig(lr=1e-3, warmup_steps=0),
    )
    summary = train_lm(config)
    assert summary["valid_margin"] > 0.05
    before, after = load_language_model(trained), load_language_model(tmp_path / "run")
    assert (after.vocabulary, after.pattern.name) == (before.vocabulary, before.pattern.name)
    assert after.meta["codebook"] == before.meta["codebook"]
    assert not torch.equal(after.decoder.embed_tokens.weight, before.decoder.embed_tokens.weight)


def test_pairs_are_sequences_of_the_models_symbols_and_prompts_are_no_targets(tmp_path: Path) -> None:
    path = written(
        tmp_path / "pairs.jsonl",
        [{"prompt": [3, 3, 5], "chosen": [0, 1, 2], "rejected": [7], "note": "kept aside"}],
    )
    preferences = Preferences(path, MERGED, Pattern("delay", MERGED.sizes), 64)
    bos, eos = 11, 12
    assert preferences.pieces.sequences[0].tolist() == [
        bos,
        10,
        5,
        9,
        eos,
    ]  # the prompt's (3, 3), the continuation's (0, 1, 2)
    assert preferences.pieces.sequences[1].tolist() == [bos, 10, 5, 7, eos]
    assert preferences.collate(np.array([0])).targets.tolist() == [9, eos, 7, eos]


GOOD = {"prompt": [1], "chosen": [2], "rejected": [3]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON"),
        ("[1, 2]", "line 3: is no object"),
        ('{"prompt": [1], "chosen": [2]}', "line 3: lacks rejected"),
        (json.dumps({**GOOD, "chosen": []}), "line 3: chosen is empty"),
        (
            json.dumps({**GOOD, "rejected": [1, 8]}),
            r"line 3: rejected: unit 8 at position 1 is outside the vocabulary 0 \.\. 7",
        ),
        (json.dumps({**GOOD, "prompt": [-1]}), "line 3: prompt: unit -1 at position 0"),
        (json.dumps({**GOOD, "prompt": "<Un1>"}), "line 3: prompt: a list of units is needed, not"),
        (json.dumps({**GOOD, "prompt": [1.5]}), "line 3: prompt: a list of units is needed"),
        (json.dumps({**GOOD, "prompt": [[1, 2], [3]]}), "line 3: prompt: a list of units is needed"),
        (
            json.dumps({**GOOD, "prompt": [1] * 40, "chosen": [2] * 30}),
            "line 3: the prompt's 40 and the chosen continuation's 30 symbols make 71 steps; the model's "
            "context is 64",
        ),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"pairs.jsonl: {message}"):
        Preferences(path, PLAIN, Pattern("delay", PLAIN.sizes), 64)


def test_of_several_levels_each_time_needs_a_unit_of_each(tmp_path: Path) -> None:
    pattern = Pattern("delay", LEVELS.sizes)
    path = tmp_path / "pairs.jsonl"
    for prompt, message in (
        ([1, 2, 3], "a list with a list of 2 units"),
        ([[1, 2, 3]], "a list with"),
        ([[1, 9]], ".*the code 9 at position 0, level 1"),
    ):
        written(path, [{"prompt": prompt, "chosen": [[1, 1]], "rejected": [[2, 2]]}])
        with pytest.raises(ValueError, match=f"line 1: prompt: {message}"):
            Preferences(path, LEVELS, pattern, 64)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    line = json.dumps({**GOOD, "text": "one\u2028two\u0085three"}, ensure_ascii=False)
    path.write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert len(Preferences(path, PLAIN, Pattern("delay", PLAIN.sizes), 64)) == 2


def test_files_without_pairs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl: cannot be read"):
        Preferences(tmp_path / "absent.jsonl", PLAIN, Pattern("delay", PLAIN.sizes), 64)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: has no pairs"):
        Preferences(tmp_path / "empty.jsonl", PLAIN, Pattern("delay", PLAIN.sizes), 64)
