import json
from pathlib import Path

import numpy as np
import pytest
import torch

from units.corpus import UnitCorpus
from units.language_model import load_language_model
from units.model import Decoder
from units.sampling import SampleConfig, generate, pick, sample


def config(planted: UnitCorpus, trained: Path, out: Path, **changes: object) -> SampleConfig:
    settings = {
        "lm": str(trained),
        "corpus": str(planted.folder),
        "out": str(out),
        "prompt_units": 8,
        "max_units": 40,
        "device": "cpu",
    }
    return SampleConfig.model_validate({**settings, **changes})


def read(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def slow_greedy(decoder: Decoder, prompt: np.ndarray, max_units: int) -> tuple[list[int], float]:
    """Without a cache or a batch: the whole sequence is read again for every unit."""
    tokens, total = prompt.tolist(), 0.0
    for _ in range(max_units):
        logits = decoder(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1].double()
        logits[decoder.vocabulary_size - 2] = -torch.inf
        tokens.append(int(logits.argmax()))
        total += float(logits.log_softmax(-1)[tokens[-1]])
        if tokens[-1] == decoder.vocabulary_size - 1:
            return tokens[len(prompt) : -1], total
    return tokens[len(prompt) :], total


@torch.inference_mode()
def test_cached_batched_generation_equals_the_uncached_oracle(planted: UnitCorpus, trained: Path) -> None:
    decoder, _, _ = load_language_model(trained, planted, "cpu")
    prompts = np.stack([planted.sequence(i, 0, 9) for i in range(5)])
    made = generate(decoder, prompts, np.zeros((5, 50)), temperature=0)
    for prompt, continuation in zip(prompts, made, strict=True):
        units, total = slow_greedy(decoder, prompt, 50)
        assert continuation.units == units
        assert continuation.log_likelihood == pytest.approx(total, abs=1e-4)  # float32 logits, sums in another order
        assert continuation.finished == (len(units) < 50)


def test_samples_repeat_with_their_seed_and_whatever_the_batch(planted: UnitCorpus, trained: Path, tmp_path: Path) -> None:
    for name, changes in {"a": {}, "b": {"batch_size": 2}, "c": {"seed": 1}}.items():
        summary = sample(config(planted, trained, tmp_path / name, num=5, **changes))
        assert summary["num"] == 5
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert [line["continuation"] for line in a] == [line["continuation"] for line in b] != [line["continuation"] for line in c]
    assert len({json.dumps(line["continuation"]) for line in a}) == 5


def test_an_utterance_prompts_every_continuation(planted: UnitCorpus, trained: Path, tmp_path: Path) -> None:
    sample(config(planted, trained, tmp_path / "out", utterance="document-3", num=3))
    for line in read(tmp_path / "out"):
        assert line["document"] == "document-3" and line["prompt"] == planted.units(3)[:8].tolist()
        assert all(0 <= unit < planted.num_units for unit in line["continuation"])  # type: ignore[attr-defined]  # a JSON list


def test_continuations_follow_the_planted_rule(planted: UnitCorpus, trained: Path, tmp_path: Path) -> None:
    sample(config(planted, trained, tmp_path / "out", num=20, top_p=0.8, prompt_units=3))
    right = total = 0
    for line in read(tmp_path / "out"):
        units = [*line["prompt"], *line["continuation"]]  # type: ignore[misc]  # JSON lists
        for a, b, c in zip(units[1:], units[2:], units[3:], strict=False):
            right, total = right + (c == (b + 1 + a % 3) % planted.num_units), total + 1
    assert right / total > 0.9


def test_draws_follow_the_distribution_and_its_cuts() -> None:
    logits = torch.tensor([0.1, 0.5, 0.0, 0.4]).log()
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]

    def shares(**cuts: float) -> list[float]:
        drawn = pick(logits.double().expand(1000, -1), uniform, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **cuts})  # type: ignore[arg-type]
        return [round(share, 2) for share in (torch.bincount(drawn, minlength=4) / 1000).tolist()]

    assert shares() == [0.1, 0.5, 0.0, 0.4]
    assert shares(top_k=2) == [0.0, 0.56, 0.0, 0.44]
    assert shares(top_p=0.6) == [0.0, 0.56, 0.0, 0.44]
    assert shares(top_p=0.4) == [0.0, 1.0, 0.0, 0.0]
    assert shares(temperature=0) == [0.0, 1.0, 0.0, 0.0]
    assert shares(temperature=0.5) == [0.02, 0.6, 0.0, 0.38]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_units": 60}, r"prompt of BOS and 60 units .* does not fit the 64 tokens of context .* at most 63"),
        (
            {"prompt_units": 41, "max_units": 5, "utterance": "document-0"},
            "document 'document-0' has .* units, fewer than prompt_units 41",
        ),
        ({"prompt_units": 45, "max_units": 5}, "no document of split 'test' has prompt_units 45 units; the longest has"),
        ({"utterance": "nobody"}, "no document 'nobody'"),
        ({"split": "tset"}, "no documents in split 'tset'; its splits: dev, test, train"),
    ],
)
def test_impossible_prompts_are_named(
    planted: UnitCorpus, trained: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(config(planted, trained, tmp_path / "out", **changes))
