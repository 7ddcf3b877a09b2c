"""The verb `pretrain` beyond its losses: what it says, judges, starts from, and when it stops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.utterance import Phone, Utterance
from pretrain.model.encoder import Context, Encoder
from pretrain.objectives.collapse import AlarmConfig, variation_alarm, variations
from pretrain.objectives.hubert import HubertTask, hubert_alarm
from pretrain.objectives.pnmi import pnmi_of_features
from pretrain.objectives.pretraining import PretrainConfig, pretrain
from pretrain.objectives.wav2vec2 import GumbelQuantizer, Wav2Vec2Task, wav2vec2_alarm
from pretrain.store.artefact import read_meta
from pretrain.store.hashes import sha256_file
from pretrain.training.checkpoint import latest_checkpoint

LENGTHS = [9000, 4000, 12000, 30000, 7000, 16000, 5000, 6000]


@pytest.fixture
def corpus(tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]) -> Path:
    """A folder with a manifest (six utterances of split train, two of dev, noise), and labels of five classes
    for it."""
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(length) for length in LENGTHS]
    manifest = make_corpus(tmp_path, waves, splits=["train"] * 6 + ["dev"] * 2)
    make_labels(tmp_path / "labels", {utterance.id: utterance.num_frames for utterance in manifest})
    return tmp_path


def align(corpus: Path) -> str:
    """The same utterances with phones, in a manifest of its own."""
    rows = [
        {
            "id": u.id,
            "path": u.path,
            "start": 0,
            "num_samples": u.num_samples,
            "sample_rate": 16000,
            "split": u.split,
            "phones": [(0.0, 0.1, "a"), (0.1, 0.2, "b"), (0.2, 2.0, "c")],
        }
        for u in Manifest(corpus / "manifest")
    ]
    write_manifest(corpus / "aligned", rows, {}, {})
    return str(corpus / "aligned")


def config(corpus: Path, **changes: Any) -> PretrainConfig:
    objective = changes.get("objective", "hubert")
    tree: dict[str, Any] = {
        "out": str(corpus / "run"),
        "manifest": str(corpus / "manifest"),
        "objective": objective,
        "encoder": {"architecture": "tiny", "num_mels": 20, "dim": 32, "ffn_dim": 32},
        "hubert": {"final_dim": 16},
        "wav2vec2": {"final_dim": 16, "code_dim": 16, "num_entries": 40, "num_distractors": 5},
        "batches": {"batch_seconds": 2.0, "crop_seconds": 0.8},
        "optimizer": {"lr": 1e-3},
        "alarm": {"after_steps": 1000},
        "training": {
            "max_steps": 4,
            "log_every": 1,
            "checkpoint_every": 4,
            "device": "cpu",
            **changes.pop("training", {}),
        },
    }
    if objective == "hubert":
        tree["labels"] = str(corpus / "labels")
    return PretrainConfig.model_validate({**tree, **changes})


def last_line(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(run)
    assert path is not None
    return load_file(path / "model.safetensors")


# --- validation
#
# ------------------------------------------------------------------------------------------------------------
# --


def test_a_valid_split_that_is_not_there_is_said(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(config(corpus, valid_split="valid"))
    assert "no validation" in (said := capsys.readouterr().err) and "'valid'; it has dev, train" in said
    assert "valid_loss" not in last_line(corpus / "run")
    pretrain(config(corpus, out=str(corpus / "quiet"), valid_split=None))
    assert "no validation" not in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["hubert", "wav2vec2"])
def test_a_validation_tells_loss_accuracy_perplexity_and_pnmi(corpus: Path, objective: str) -> None:
    aligned = {
        "manifest": align(corpus),
        "objective": objective,
        "evaluation": {"layer": 2, "num_classes": 4},
    }
    for name in ("run", "again"):
        summary = pretrain(config(corpus, out=str(corpus / name), **aligned))
    used = "prediction_perplexity" if objective == "hubert" else "code_perplexity"
    assert {"valid_loss", "valid_accuracy", f"valid_{used}", "valid_pnmi"} <= summary.keys()
    assert 0 < last_line(corpus / "run")["valid_pnmi"] < 1
    assert last_line(corpus / "run")["valid_pnmi"] == last_line(corpus / "again")["valid_pnmi"]


def test_without_alignments_the_pnmi_is_left_out_and_the_reason_given(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(config(corpus, evaluation={"layer": 1}))
    assert "no valid_pnmi: no utterance of valid_split = 'dev' has phones" in capsys.readouterr().err
    assert "valid_pnmi" not in last_line(corpus / "run") and "valid_loss" in last_line(corpus / "run")


def test_a_layer_that_is_not_there_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.layer 3: this encoder has layers 0 to 2"):
        config(corpus, evaluation={"layer": 3})


def test_the_judged_utterances_hold_max_seconds_and_depend_on_the_seed_alone(corpus: Path) -> None:
    aligned = {
        "manifest": align(corpus),
        "valid_split": "train",
        "evaluation": {"layer": 1, "max_seconds": 1.0},
    }
    first, again, other = (pretrain_task(corpus, **aligned, training={"seed": seed}) for seed in (0, 0, 5))
    assert first.valid_set is not None and first.judged == again.judged != other.judged
    assert (
        first.valid_set.seconds(np.array(first.judged))
        >= 1.0
        > first.valid_set.seconds(np.array(first.judged[:-1]))
    )


def pretrain_task(corpus: Path, **changes: Any) -> Wav2Vec2Task:
    chosen = config(corpus, objective="wav2vec2", **changes)
    return Wav2Vec2Task(chosen, Manifest(chosen.manifest))


def test_pnmi_of_features_is_one_where_features_are_phones_and_little_where_they_are_noise() -> None:
    """Also for a piece from the middle of an utterance: its phones are those of its own frames."""
    rng = np.random.default_rng(0)
    phones = [Phone(0.2 * n, 0.2 * (n + 1), "abcde"[n % 5]) for n in range(100)]
    utterance = Utterance("u", "u.wav", 0, 20 * 16000, 16000, phones=phones)
    frame_phone = np.minimum((np.arange(999) * 0.02 + 0.0125) // 0.2, 99).astype(int) % 5
    clear = np.eye(5)[frame_phone] + 0.01 * rng.standard_normal((999, 5))
    noise = rng.standard_normal((999, 5))
    assert pnmi_of_features([(utterance, 0, clear)], 5, seed=0) == pytest.approx(1.0)
    assert pnmi_of_features(
        [(utterance, 0, clear[:100]), (utterance, 207, clear[207:])], 5, seed=0
    ) == pytest.approx(1.0)
    # the same frames said to begin elsewhere
    assert pnmi_of_features([(utterance, 0, clear[207:])], 5, seed=0) < 0.9
    assert pnmi_of_features([(utterance, 0, noise)], 5, seed=0) < 0.1
    assert pnmi_of_features([(utterance, 0, np.zeros((999, 5)))], 5, seed=0) == 0.0  # collapsed: one cluster


# --- collapse
# ------------------------------------------------------------------------------------------------------------
# ----


def test_silence_stops_a_run_because_its_features_do_not_vary(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    manifest = make_corpus(tmp_path, [np.zeros(length) for length in LENGTHS])
    make_labels(tmp_path / "labels", {utterance.id: utterance.num_frames for utterance in manifest})
    with pytest.raises(
        ValueError,
        match=r"stopped at step 2: collapsed: feature_variation is 0\.0000, below "
        r"alarm\.variation.*silent.*none yet",
    ):
        pretrain(config(tmp_path, valid_split=None, alarm={"after_steps": 2, "perplexity": 0.0}))


def test_a_silent_valid_split_stops_no_run(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    waves = [0.1 * np.random.default_rng(length).standard_normal(length) for length in LENGTHS[:4]]
    manifest = make_corpus(tmp_path, [*waves, np.zeros(9000)], splits=["train"] * 4 + ["dev"])
    make_labels(tmp_path / "labels", {utterance.id: utterance.num_frames for utterance in manifest})
    training = {"max_steps": 2, "log_every": 1, "checkpoint_every": 2, "device": "cpu", "validate_every": 1}
    pretrain(config(tmp_path, alarm={"after_steps": 1, "perplexity": 0.0}, training=training))
    assert last_line(tmp_path / "run")["valid_feature_variation"] == 1.0


def test_labels_that_are_all_alike_are_refused_before_the_first_step(
    tmp_path: Path, make_corpus: Callable[..., Manifest], make_labels: Callable[..., Path]
) -> None:
    manifest = make_corpus(tmp_path, [np.zeros(length) for length in LENGTHS])
    make_labels(
        tmp_path / "labels", {utterance.id: utterance.num_frames for utterance in manifest}, num_classes=1
    )
    with pytest.raises(
        ValueError, match="has the same label for every frame of split 'train': there is nothing to learn"
    ):
        pretrain(config(tmp_path, valid_split=None))
    assert not (tmp_path / "run").exists()


def test_context_that_varies_too_little_stops_a_run(corpus: Path) -> None:
    alarm = {"after_steps": 3, "perplexity": 0.0, "variation": 0.9}
    with pytest.raises(
        ValueError,
        match=r"step 3: collapsed: context_variation is 0\.\d+, below alarm\.variation = 0\.9: the enc",
    ):
        pretrain(config(corpus, alarm=alarm))


def test_an_encoder_that_collapsed_behind_its_dropout_is_seen_by_the_validation(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contextualize = Encoder.contextualize

    def collapsed(self: Encoder, *arguments: Any, **named: Any) -> Context:
        x = contextualize(self, *arguments, **named).last
        return Context(torch.nn.functional.dropout(0.0 * x + 1.0, 0.1, self.training), [])

    monkeypatch.setattr(Encoder, "contextualize", collapsed)
    training = {"max_steps": 4, "log_every": 1, "checkpoint_every": 4, "device": "cpu", "validate_every": 3}
    with pytest.raises(
        ValueError, match=r"stopped at step 3: collapsed: valid_context_variation is 0\.0000, below alarm"
    ):
        pretrain(config(corpus, alarm={"after_steps": 2, "perplexity": 0.0}, training=training))


def test_hubert_at_chance_after_the_warm_up_stops(corpus: Path) -> None:
    """Five labels in turn: the commonest has a fifth, and five times that cannot be had."""
    alarm = {"after_steps": 0, "perplexity": 0.0, "variation": 0.0, "chance_steps": 1, "chance_ratio": 5.0}
    with pytest.raises(
        ValueError,
        match=r"step 3: collapsed: accuracy is 0\.\d+, below 0\.\d+: alarm\.chance_ratio.*chance_steps",
    ):
        pretrain(config(corpus, alarm=alarm, optimizer={"lr": 1e-3, "warmup_steps": 2}))


def test_wav2vec2_that_is_always_right_with_withered_codes_stops(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one code everywhere no distractor counts. The alarm on the perplexity itself is off here."""
    forward = GumbelQuantizer.forward

    def withered(self: GumbelQuantizer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            self.logits.weight.zero_()
            self.logits.bias.zero_()
            self.logits.bias.view(self.groups, -1)[:, 0] = 50.0
        return forward(self, x)

    monkeypatch.setattr(GumbelQuantizer, "forward", withered)
    alarm = {"after_steps": 2, "perplexity": 0.0, "code_share": 0.1}
    with pytest.raises(
        ValueError,
        match=r"step 2: collapsed: accuracy is 1\.000, from alarm\.contrastive_accuracy.*code_perplexity is "
        r"1\.00, below "
        r"alarm\.code_share \(0\.1\).*diversity_weight \(now 0\.1\).*num_entries \(now 40\)",
    ):
        pretrain(config(corpus, objective="wav2vec2", alarm=alarm))


GOOD = {
    "feature_variation": 0.7,
    "context_variation": 0.3,
    "accuracy": 0.4,
    "prediction_perplexity": 60.0,
    "code_perplexity": 90.0,
}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"feature_variation": 0.009}, "feature_penalty"),
        ({"context_variation": 0.0}, "norm_first"),
        ({"valid_context_variation": 0.004}, "norm_first"),
        ({"prediction_perplexity": 1.9}, "wordless measure"),
        ({"accuracy": 0.054}, "wordless|labels of other audio"),
        ({"code_perplexity": 1.2}, "diversity_weight"),
        ({"accuracy": 0.96, "code_perplexity": 15.0}, "trivial"),
        ({"accuracy": 0.96}, None),
        ({"code_perplexity": 15.0}, None),
    ],
)
def test_every_alarm_names_its_number_its_key_and_a_remedy(
    changes: dict[str, float], word: str | None
) -> None:
    metrics, limits = {**GOOD, **changes}, AlarmConfig()
    messages = [
        variation_alarm(metrics, limits),
        hubert_alarm(metrics, 37_000, limits, chance=0.05, warmup_steps=32_000),
        wav2vec2_alarm(metrics, limits, 320, 0.1),
    ]
    raised = [message for message in messages if message]
    assert len(raised) == (word is not None)
    for message in raised:
        assert message.startswith("collapsed: ") and "alarm." in message and "Try " in message
        assert any(f"{name} is {value:.2f}"[:-1] in message for name, value in changes.items())
        assert any(part in message for part in (word or "").split("|"))


def test_alarms_wait_and_can_be_switched_off() -> None:
    bad = {**GOOD, "accuracy": 0.01, "feature_variation": 0.0}
    assert hubert_alarm(bad, 36_999, AlarmConfig(), chance=0.05, warmup_steps=32_000) is None
    assert hubert_alarm(bad, 99_999, AlarmConfig(chance_steps=0), chance=0.05, warmup_steps=32_000) is None
    assert variation_alarm(bad, AlarmConfig(variation=0.0)) is None


def test_variation_is_the_deviation_over_frames_as_a_share_of_the_size() -> None:
    x = torch.tensor([[3.0, 3.0], [1.0, 1.0]])
    metrics = variations(torch.zeros(5), x, x[:1], training=True)
    total, count = metrics["feature_variation"]
    # deviation 1, root mean square √5
    assert count == 2 and float(total / count) == pytest.approx(1 / 5**0.5)
    assert metrics.keys() == {"feature_variation", "context_variation"}
    assert metrics["context_variation"] == (1, 1)  # of a single frame nothing can be said
    assert variations(torch.zeros(5), torch.ones(4, 2), x, training=True)["feature_variation"] == (0, 4)
    assert variations(torch.zeros(5), torch.ones(4, 2), x, training=False)["feature_variation"] == (4, 4)


# --- init
# ------------------------------------------------------------------------------------------------------------
# --------


@pytest.fixture
def begun(corpus: Path) -> Path:
    pretrain(config(corpus))
    return corpus


def test_a_run_starts_from_the_weights_of_another_and_names_it_as_a_parent(begun: Path) -> None:
    pretrain(config(begun, out=str(begun / "next"), init=str(begun / "run"), optimizer={"lr": 1e-12}))
    for name, weight in weights(begun / "run").items():
        # a step of 1e-12
        torch.testing.assert_close(weights(begun / "next")[name], weight, rtol=0, atol=1e-7, msg=name)
    path = latest_checkpoint(begun / "run")
    assert path is not None
    assert read_meta(begun / "next")["parents"]["init"] == sha256_file(path / "model.safetensors")[:16]


def test_class_embeddings_of_another_codebook_or_number_are_drawn_anew_and_that_is_said(
    begun: Path, make_labels: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_labels(begun / "more", {u.id: u.num_frames for u in Manifest(begun / "manifest")}, num_classes=7)
    changes = {
        "out": str(begun / "next"),
        "labels": str(begun / "more"),
        "init": str(begun / "run"),
        "optimizer": {"lr": 1e-12},
    }
    pretrain(config(begun, **changes))
    assert "no class_embeddings for this run; drawn anew" in capsys.readouterr().err
    old, new = weights(begun / "run"), weights(begun / "next")
    assert new["class_embeddings"].shape == (7, 16)
    torch.testing.assert_close(
        new["encoder.project.weight"], old["encoder.project.weight"], rtol=0, atol=1e-7
    )


def test_a_bare_encoder_is_accepted(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_only(begun / "run", lambda name: name.startswith("encoder."))
    pretrain(
        config(
            begun,
            out=str(begun / "next"),
            objective="wav2vec2",
            init=str(begun / "run"),
            optimizer={"lr": 1e-12},
        )
    )
    assert (
        "gives no quantizer.codes" in (said := capsys.readouterr().err).replace("\n", " ")
        and "drawn anew" in said
    )
    for name, weight in weights(begun / "run").items():
        torch.testing.assert_close(weights(begun / "next")[name], weight, rtol=0, atol=1e-7, msg=name)


def keep_only(run: Path, wanted: Callable[[str], bool]) -> None:
    """Remove weights from a run's checkpoint."""
    path = latest_checkpoint(run)
    assert path is not None
    kept = {name: weight for name, weight in load_file(path / "model.safetensors").items() if wanted(name)}
    save_file(kept, path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["sha256"] = {
        name: sha256_file(path / name) for name in ("model.safetensors", "optimizer.safetensors")
    }
    (path / "state.json").write_text(json.dumps(state))


def test_weights_that_do_not_fit_are_named(begun: Path) -> None:
    start = {"out": str(begun / "next"), "init": str(begun / "run")}
    wide = {"architecture": "tiny", "num_mels": 20, "dim": 32, "ffn_dim": 48}
    with pytest.raises(
        ValueError,
        match=r"init: the weights of .*run do not fit: .*encoder\.layers\.0\.ffn_in\.weight is \(32, 32\) "
        r"there and \(48, 32\)",
    ):
        pretrain(config(begun, **start, encoder=wide))
    with pytest.raises(
        ValueError, match=r"quantizer\.codes is missing there.*class_embeddings is not part of this model"
    ):
        pretrain(config(begun, **start, objective="wav2vec2"))
    with pytest.raises(ValueError, match=r"class_embeddings is \(5, 16\) there and \(5, 24\) here"):
        pretrain(config(begun, **start, hubert={"final_dim": 24}))
    with pytest.raises(ValueError, match="nowhere: holds no checkpoint"):
        pretrain(config(begun, **{**start, "init": str(begun / "nowhere")}))
    keep_only(begun / "run", lambda name: name != "project.bias")
    with pytest.raises(ValueError, match=r"do not fit: project\.bias is missing there"):
        pretrain(config(begun, **start))


# --- activation checkpointing
# ------------------------------------------------------------------------------------------------


def test_recomputed_layers_give_the_same_losses_and_gradients_with_dropout(corpus: Path) -> None:
    noisy = {
        "architecture": "tiny",
        "num_mels": 20,
        "dim": 32,
        "ffn_dim": 32,
        "num_layers": 3,
        "dropout": 0.2,
        "attention_dropout": 0.2,
        "activation_dropout": 0.2,
        "layer_drop": 0.5,
    }
    for name, recompute in (("kept", False), ("recomputed", True)):
        training = {"max_steps": 6, "checkpoint_every": 6, "activation_checkpointing": recompute}
        pretrain(config(corpus, out=str(corpus / name), encoder=noisy, training=training))
    rates = ("s_per_second",)
    curves = [
        [
            {key: value for key, value in json.loads(line).items() if key not in rates}
            for line in path.read_text().splitlines()
        ]
        for path in (corpus / "kept" / "metrics.jsonl", corpus / "recomputed" / "metrics.jsonl")
    ]
    assert curves[0] == curves[1]  # losses and gradient norms
    kept, recomputed = weights(corpus / "kept"), weights(corpus / "recomputed")
    chosen = config(corpus, encoder=noisy)
    fresh = HubertTask(chosen, Manifest(chosen.manifest), Labels(corpus / "labels")).model.state_dict()
    assert kept.keys() == recomputed.keys() == fresh.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
