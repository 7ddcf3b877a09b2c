"""The verb `train-lm` end to end: what it begins with, what it says of itself, when it stops, and that it
resumes to the same bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.store.artefact import read_meta
from pretrain.store.hashes import sha256_file
from pretrain.training import run as run_module
from pretrain.training.task import TrainingConfig
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm.language_model import load_language_model
from units.lm.model import DecoderConfig
from units.lm.training import LanguageModelTask, LMOptimizerConfig, TrainLMConfig, train_lm
from units.lm.warm_start import fingerprint_of
from units.scores.score_config import ScoreConfig
from units.scores.scoring import score

SMALL = {"dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 16, "context": 64}
UNTIMED = {"codebook": "c0de", "frame_rate_hz": 50.0, "deduplicated": False, "timed": False}


def train_small(out: Path, steps: int = 1, every: int = 2, **keys: Any) -> dict[str, Any]:
    training = TrainingConfig(max_steps=steps, checkpoint_every=every, keep_checkpoints=9, device="cpu")
    model = DecoderConfig.model_validate(keys.pop("model", {} if "init" in keys else SMALL))
    return train_lm(TrainLMConfig(out=str(out), batch_tokens=200, model=model, training=training, **keys))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty arbitrary preferences among units of the planted corpus."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    drawn = [
        {part: rng.integers(0, 12, 5).tolist() for part in ("prompt", "chosen", "rejected")}
        for _ in range(40)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in drawn))
    return str(path)


@pytest.mark.parametrize("kind", ["corpus", "preferences"])
def test_a_run_that_was_killed_resumes_to_the_same_bits(
    kind: str, planted: UnitCorpus, trained: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preferences = {
        "init": str(trained),
        "dpo": {"pairs": pairs, "valid_pairs": pairs},
        "model": {"dropout": 0.2},
    }
    keys: dict[str, Any] = {"corpus": str(planted.folder)} if kind == "corpus" else preferences

    def save_until_step_4(run: Path, step: int, *rest: Any, **options: Any) -> Path:
        if step == 4:
            raise RuntimeError("power cut")
        return save(run, step, *rest, **options)

    save = run_module.save_checkpoint
    train_small(tmp_path / "whole", 8, **keys)
    monkeypatch.setattr(run_module, "save_checkpoint", save_until_step_4)
    with pytest.raises(RuntimeError, match="power cut"):
        train_small(tmp_path / "cut", 8, **keys)
    monkeypatch.undo()
    assert train_small(tmp_path / "cut", 8, **keys)["steps_this_time"] == 6

    def digests(run: str) -> dict[str, str]:
        return {
            str(path.relative_to(tmp_path / run)): sha256_file(path)
            for path in (tmp_path / run).glob("step_*/*.safetensors")
        }

    assert digests("whole") == digests("cut") and len(digests("cut")) == 8  # of four checkpoints, each file


def test_preferences_are_learnt_without_dropout_unless_it_is_given(
    trained: Path, pairs: str, tmp_path: Path
) -> None:
    train_small(
        tmp_path / "begun",
        init=str(trained),
        corpus=str(UnitCorpus(trained.parent / "units").folder),
        model={"dropout": 0.1},
    )
    first = {}
    for name, model in {"default": {}, "given": {"dropout": 0.3}}.items():
        keys = {"init": str(tmp_path / "begun"), "dpo": {"pairs": pairs, "beta": 1.0}, "model": model}
        train_small(tmp_path / name, **keys)
        first[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        assert read_meta(tmp_path / name)["decoder"]["dropout"] == model.get("dropout", 0.0)
    # Before any step the model is its reference: float32 sums of six log probabilities, in batches of other
    # shapes.
    assert first["default"]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(first["given"]["loss"] - np.log(2)) > 0.01


def test_a_diverging_run_is_stopped_once_it_is_warm(planted: UnitCorpus) -> None:
    config = TrainLMConfig(
        corpus="none",
        out="none",
        training=TrainingConfig(max_steps=1),
        optimizer=LMOptimizerConfig(warmup_steps=25),
    )
    task = LanguageModelTask(config, planted)
    losses = {10: 9.0, 20: 9.5, 30: 8.0, 40: 2.0, 50: 3.0, 60: 9.0, 70: 9.1}
    assert [
        step for step, loss in losses.items() if "diverged" in (task.alarm({"loss": loss}, step) or "")
    ] == [60, 70]


def test_a_warm_start_may_begin_far_off(planted: UnitCorpus, tmp_path: Path) -> None:
    """A norm as loud as Qwen2's last one: other embeddings' logits are large until the first steps have been
    made."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    loud = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    with torch.no_grad():
        loud.model.norm.weight.fill_(7.0)
        loud.model.embed_tokens.weight.normal_(std=0.3)
        loud.lm_head.weight.normal_(std=0.3)
    loud.save_pretrained(tmp_path / "text")
    train_small(tmp_path / "lm", 50, 10, corpus=str(planted.folder), init=str(tmp_path / "text"))
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "lm" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[2] > np.log(14) + 1 > losses[-1] + 0.5  # of steps 21 to 30: the warm-up is over


def test_a_run_is_not_begun_with_in_another_pattern(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    levels = [Document(f"d{n}", "train", rng.integers(0, 6, (20, 2))) for n in range(4)]
    write_corpus(
        tmp_path / "units", levels, {}, {}, vocabulary=Vocabulary(num_units=6, num_levels=2), **UNTIMED
    )  # type: ignore[arg-type]
    corpus = {"corpus": str(tmp_path / "units"), "valid_split": None}
    train_small(tmp_path / "lm", pattern="flatten", **corpus)
    for other in ("delay", "coarse-first"):
        with pytest.raises(
            ValueError,
            match=rf"lm learned its streams in the pattern 'flatten', and `pattern` is '{other}': .* set "
            r"pattern = \"flatten\"",
        ):
            train_small(tmp_path / "next", init=str(tmp_path / "lm"), pattern=other, **corpus)
    train_small(tmp_path / "next", init=str(tmp_path / "lm"), pattern="flatten", **corpus)


def test_of_a_single_stream_the_pattern_is_of_no_matter(
    planted: UnitCorpus, trained: Path, tmp_path: Path
) -> None:
    train_small(tmp_path / "lm", init=str(trained), corpus=str(planted.folder), pattern="flatten")


def test_a_run_names_what_it_came_from(
    planted: UnitCorpus, trained: Path, pairs: str, tmp_path: Path
) -> None:
    train_small(tmp_path / "next", init=str(trained), corpus=str(planted.folder))
    begun = load_language_model(trained).fingerprint
    assert read_meta(tmp_path / "next")["parents"] == {"corpus": planted.fingerprint, "initial": begun}
    train_small(tmp_path / "dpo", init=str(trained), dpo={"pairs": pairs, "valid_pairs": pairs})
    digest = sha256_file(Path(pairs))[:16]
    assert read_meta(tmp_path / "dpo")["parents"] == {
        "initial": begun,
        "pairs": digest,
        "valid_pairs": digest,
    }


def test_the_fingerprint_of_a_text_model_changes_with_its_config_and_with_any_weight(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    def saved(**options: Any) -> str:
        model.save_pretrained(tmp_path, **options)
        return fingerprint_of(tmp_path)

    found = [saved(), saved(max_shard_size="20KB")]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    found.append(saved(max_shard_size="20KB"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    found.append(fingerprint_of(tmp_path))
    assert len(set(found)) == 4 and found[3] == fingerprint_of(tmp_path) and len(found[0]) == 16


def test_keys_of_the_corpus_beside_dpo_are_refused_by_name() -> None:
    given = {"out": "o", "training": {"max_steps": 1}, "init": "i", "dpo": {"pairs": "p"}}
    TrainLMConfig.model_validate(given)
    for keys, named in (
        ({"split": "train"}, "split"),
        ({"valid_split": "dev"}, "valid_split"),
        ({"pattern": "flatten", "loss_on": "speech"}, "loss_on, pattern"),
    ):
        with pytest.raises(ValueError, match=f"`dpo` learns from its pairs alone; leave out {named}"):
            TrainLMConfig.model_validate({**given, **keys})


def test_preferences_keep_what_the_first_training_was_about(tmp_path: Path) -> None:
    """A speech-only model's preferences are scored on speech, as that model is."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(num_units=4, text=("▁", "a", "b"), layout="grid")
    grid = [
        Document(f"d{n}", "train", np.column_stack([rng.integers(0, 4, 20), rng.integers(0, 4, 20)]))
        for n in range(6)
    ]
    write_corpus(tmp_path / "units", grid, {}, {}, vocabulary=vocabulary, **UNTIMED)  # type: ignore[arg-type]
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"prompt": [[3, 1]], "chosen": [[3, 2]], "rejected": [[3, 0]]})
    )
    train_small(tmp_path / "lm", corpus=str(tmp_path / "units"), valid_split=None, loss_on="speech")
    train_small(tmp_path / "dpo", init=str(tmp_path / "lm"), dpo={"pairs": str(tmp_path / "pairs.jsonl")})
    for name in ("lm", "dpo"):
        scores = ScoreConfig(
            lm=str(tmp_path / name),
            corpus=str(tmp_path / "units"),
            out=str(tmp_path / f"{name}_scores"),
            split="train",
            device="cpu",
        )
        assert score(scores)["num_tokens"] == 6 * 21  # the units and EOS, not the text beside them
        assert read_meta(tmp_path / name)["loss_on"] == "speech"
