"""`label-efficiency` on spoken tones: two utterances a second, four letters, an encoder of random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import wordless.cli
from pretrain.config import parse_config
from pretrain.ctc import cells as module
from pretrain.ctc.cells import SCHEMA, LabelEfficiencyConfig, cells
from pretrain.ctc.curve import as_text, draw_curve, minutes_in_words, summarize, write_curve
from pretrain.ctc.label_efficiency import label_efficiency, require_transcripts
from pretrain.ctc.model import Recognizer
from pretrain.ctc.reuse import merged
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.manifest import Manifest
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import load_encoder
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow  # `make test` is to stay short

TONES = {"a": 300.0, "b": 700.0, "c": 1500.0, "d": 3100.0, " ": 0.0}
TEXTS = ["ab cd", "da", "bb ca", "cab", "dab", "ad bc"]


def spell(text: str) -> np.ndarray:
    """Every character a tone of 0.15 s."""
    time = np.arange(2400) / 16000
    return np.concatenate([0.2 * np.sin(2 * np.pi * TONES[c] * time) for c in text]).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_corpus: Callable[..., Manifest]) -> Path:
    """A manifest of 6 training, 1 dev and 6 test utterances, and an encoder."""
    folder = tmp_path_factory.mktemp("transfer")
    texts = [*TEXTS, TEXTS[0], *TEXTS]
    splits = ["train"] * 6 + ["dev"] + ["test"] * 6
    make_corpus(folder, [spell(text) for text in texts], texts=texts, speakers=["s"] * 13, splits=splits)
    write_encoder(folder / "encoder", 0)
    return folder


def write_encoder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Recognizer(EncoderConfig(architecture="tiny", dropout=0.0, input_dropout=0.0), Vocabulary(["a"]))
    config = {"encoder": model.encoder.config.resolved()}
    save_checkpoint(
        folder,
        1,
        model,
        torch.optim.AdamW(model.parameters()),
        {"kind": "encoder", "config": config, "extra": {}},
    )


def tree(made: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "out": str(out),
        "manifest": str(made / "manifest"),
        "encoder": str(made / "encoder"),
        "budgets": ["1s", "50%"],
        "finetune": {
            "ctc": {"mask_start_probability": 0.0, "mask_channel_probability": 0.0},
            "optimizer": {"lr": 1e-3},
            "training": {"max_steps": 2, "log_every": 1, "device": "cpu"},
        },
        **changes,
    }


def config(made: Path, out: Path, **changes: Any) -> LabelEfficiencyConfig:
    return parse_config(LabelEfficiencyConfig, tree(made, out, **changes), "t.toml")


@pytest.fixture(scope="module")
def finished(made: Path) -> tuple[LabelEfficiencyConfig, dict[str, Any]]:
    settings = config(made, made / "finished", seeds=[0, 1], tests={"test": {}, "dev": {}})
    return settings, label_efficiency(settings)


def test_every_budget_system_seed_and_test_has_a_row_and_the_files_are_those_of_the_verbs(
    made: Path,
    finished: tuple[LabelEfficiencyConfig, dict[str, Any]],
) -> None:
    settings, summary = finished
    out = Path(settings.out)
    keys = [(row["budget"], row["system"], row["seed"], row["test"]) for row in summary["cells"]]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * 2
    assert read_meta(out, "transfer")["fingerprint"] and {path.suffix for path in out.glob("transfer.*")} == {
        ".parquet",
        ".svg",
        ".png",
    }
    table = pq.read_table(out / "transfer.parquet").to_pylist()
    assert list(table[0]) == SCHEMA.names
    assert read_meta(out)["parents"]["encoder"] == load_encoder(made / "encoder")[1]
    assert table == json.loads((out / "summary.json").read_text())["cells"] == summary["cells"]
    for row in table:
        cell = out / f"{row['budget'].replace('%', 'percent')}_{row['system']}_seed{row['seed']}"
        assert out / row["transcripts"] == cell / row["test"]
        transcripts = pq.read_table(cell / row["test"] / "transcripts.parquet")
        assert row["wer"] == jiwer.wer(transcripts["text"].to_pylist(), transcripts["hypothesis"].to_pylist())
        run = read_meta(cell / "recognizer", "recognizer")
        assert run["label_minutes"] == row["label_minutes"] > 0
        assert (run["config"]["training"]["seed"], run["config"]["budget_seed"]) == (row["seed"], row["seed"])
        assert (
            row["initialization"]
            == run["config"]["init"]
            == {"pretrained": "pretrained", "scratch": "random"}[row["system"]]
        )


def test_systems_of_one_budget_and_seed_have_the_same_labels_and_seeds_others(
    finished: tuple[LabelEfficiencyConfig, dict[str, Any]],
) -> None:
    out = Path(finished[0].out)
    drawn = {
        name: sorted(Manifest(out / f"50percent_{name}" / "recognizer" / "subset").ids)
        for name in ("pretrained_seed0", "scratch_seed0", "pretrained_seed1")
    }
    assert drawn["pretrained_seed0"] == drawn["scratch_seed0"] != drawn["pretrained_seed1"]


def test_a_point_of_the_curve_is_the_mean_over_seeds(
    finished: tuple[LabelEfficiencyConfig, dict[str, Any]],
) -> None:
    summary = finished[1]
    assert len(summary["curve"]) == 8 and len(summary["comparisons"]) == 4
    for point in summary["curve"]:
        of_point = [
            row
            for row in summary["cells"]
            if all(row[key] == point[key] for key in ("test", "budget", "system"))
        ]
        wers = [row["wer"] for row in of_point]
        assert (
            point["wer"] == pytest.approx(np.mean(wers))
            and point["wer_seeds"] == [min(wers), max(wers)]
            and point["seeds"] == 2
        )
        if point["test"] == "test":  # dev is one utterance, of which there is no interval
            assert point["wer_interval"][0] <= point["wer"] <= point["wer_interval"][1]


def test_what_stands_is_not_made_again_and_the_same_numbers_come_out(
    finished: tuple[LabelEfficiencyConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, summary = finished
    out = Path(settings.out)
    with pytest.raises(
        ValueError, match=r"finished: already holds this curve, finished; budgets, .* that are added"
    ):
        label_efficiency(settings)
    (out / "meta.json").unlink()
    shutil.rmtree(out / "1s_scratch_seed1" / "dev")  # killed before the last of its tests
    # and here before the run was finished
    (out / "50percent_pretrained_seed0" / "recognizer" / "meta.json").unlink()
    made_now: list[str] = []

    def noted(name: str) -> Callable[[Any], Any]:
        original = getattr(module, name)
        return lambda config: (
            made_now.append(f"{name} {Path(config.out).relative_to(out)}"),
            original(config),
        )[1]

    for name in ("finetune", "transcribe"):
        monkeypatch.setattr(module, name, noted(name))
    assert label_efficiency(settings)["curve"] == summary["curve"]
    assert sorted(made_now) == [
        "finetune 50percent_pretrained_seed0/recognizer",
        "transcribe 1s_scratch_seed1/dev",
    ]


def test_cells_with_other_settings_or_inputs_are_refused_by_name(
    made: Path, finished: tuple[LabelEfficiencyConfig, dict[str, Any]]
) -> None:
    out = made / "changed"
    shutil.copytree(finished[0].out, out)
    before = read_meta(out)
    changed = tree(made, out, seeds=[0, 1], systems={"scratch": {"optimizer": {"lr": 0.5}}})
    with pytest.raises(ValueError, match=r"4 of 8 cells failed; the others are kept") as caught:
        label_efficiency(parse_config(LabelEfficiencyConfig, changed, "t.toml"))
    assert "1s_scratch_seed0: " in str(caught.value) and "optimizer.lr: 0.001 -> 0.5" in str(caught.value)
    assert "pretrained" not in str(caught.value).partition("failed")[2]
    assert read_meta(out) == before  # the curve that stood still does


def test_a_cell_that_fails_is_named_and_the_others_are_made(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(
        made,
        made / "failing",
        budgets=["1s", "2s"],
        by_budget={"2h": {"training": {"max_steps": 1}}, "2s": {"characters": "xyz"}},
    )
    with pytest.raises(ValueError, match="2 of 4 cells failed") as caught:
        label_efficiency(settings)
    assert "\n  2s_pretrained_seed0, 2s_scratch_seed0: " in str(caught.value) and "1s_" not in str(
        caught.value
    )
    assert str(caught.value).count("transcripts cannot be used") == 1
    assert [cell.done() for cell in cells(settings)] == [True, True, False, False]
    said = capsys.readouterr().err
    assert (
        "2s_scratch_seed0: failed, as 2s_pretrained_seed0 did" in said
        and said.count("transcripts cannot be used") == 1
    )
    assert "settings of 2h are not used; budgets are 1s, 2s" in said
    assert (
        "0 of 4 cells are done; left: 1s_pretrained_seed0, 1s_scratch_seed0, 2s_pretrained_seed0, "
        "2s_scratch_seed0" in said
    )


def test_what_is_not_there_is_told_once_before_any_cell_is_begun(made: Path) -> None:
    changes: dict[str, Any] = {
        "seeds": [0, 1],
        "budgets": ["1s", "9h"],
        "encoder": str(made / "nowhere"),
        "transcribe": {"device": "foo"},
        "tests": {"test": {}, "tset": {}, "other": {"manifest": str(made / "gone")}},
    }
    with pytest.raises(ValueError, match="nowhere: holds no checkpoint") as caught:
        label_efficiency(config(made, made / "lacking", **changes))
    lines = str(caught.value).split("\n")
    assert len(lines) == 5 and not (made / "lacking").exists()
    for problem in (
        "budget = '9h' is 540.00 minutes",
        "no utterances of split 'tset'",
        "gone: ",
        "transcribe.device: 'foo' is not here",
    ):
        assert sum(problem in line for line in lines) == 1, problem
    with pytest.raises(ValueError, match="^[^\n]*gone: [^\n]*$"):
        label_efficiency(config(made, made / "lacking", manifest=str(made / "gone")))


def test_recognisers_that_stand_need_no_encoder(
    made: Path, finished: tuple[LabelEfficiencyConfig, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0].out, tmp_path / "out")
    (tmp_path / "out" / "1s_scratch_seed1" / "dev" / "meta.json").unlink()
    (made / "encoder").rename(made / "away")
    try:
        assert len(transfer_again(made, tmp_path / "out")["cells"]) == 16
    finally:
        (made / "away").rename(made / "encoder")


def transfer_again(made: Path, out: Path) -> dict[str, Any]:
    (out / "meta.json").unlink()
    return label_efficiency(config(made, out, seeds=[0, 1], tests={"test": {}, "dev": {}}))


def test_cells_of_an_encoder_that_was_still_training_are_not_mixed(made: Path, tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", 0)
    settings = tree(made, tmp_path / "out", budgets=["1s"], encoder=str(tmp_path / "encoder"))
    label_efficiency(parse_config(LabelEfficiencyConfig, {**settings, "part": "1/2"}, "t.toml"))
    write_encoder(tmp_path / "encoder", 1)
    with pytest.raises(ValueError, match="cells come from 2 different weights of .*encoder"):
        label_efficiency(parse_config(LabelEfficiencyConfig, {**settings, "part": "2/2"}, "t.toml"))


def test_parts_share_out_the_cells_and_the_last_writes_the_curve(made: Path) -> None:
    both = [config(made, made / "parts", budgets=["1s"], part=f"{n}/2") for n in (1, 2)]
    first = label_efficiency(both[0])
    assert first == {"part": "1/2", "cells": 1, "cells_missing": ["1s_scratch_seed0"]}
    assert "1s_scratch_seed0" in as_text(first)
    second = label_efficiency(both[1])
    assert len(second["curve"]) == 2 and (made / "parts" / "meta.json").is_file()
    assert read_meta(made / "parts")["config"]["part"] is None


def test_settings_of_a_budget_go_over_the_shared_ones_and_those_of_a_system_over_both(made: Path) -> None:
    settings = config(
        made,
        made / "none",
        by_budget={"50%": {"training": {"max_steps": 7}, "ctc": {"freeze_steps": 3}}},
        systems={
            "scratch": {"ctc": {"freeze_steps": 0}},
            "weighted": {"encoder": "another", "ctc": {"layers": "weighted"}},
        },
    )
    found = {(cell.budget, cell.system): cell.finetuning() for cell in cells(settings)}
    assert list(settings.all_systems) == ["pretrained", "scratch", "weighted"]
    assert [found["1s", system].training.max_steps for system in settings.all_systems] == [2, 2, 2]
    assert [found["50%", system].ctc.freeze_steps for system in settings.all_systems] == [3, 0, 3]
    assert found["50%", "scratch"].training.max_steps == 7 and found["50%", "scratch"].init == "random"
    assert found["1s", "weighted"].encoder == "another" and found["1s", "weighted"].ctc.layers == "weighted"
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


def test_a_test_is_a_split_of_the_manifest_or_a_manifest_of_its_own(made: Path) -> None:
    settings = config(
        made,
        made / "none",
        transcribe={"batch_seconds": 5.0},
        tests={"test": {}, "other": {"manifest": "m"}, "part": {"manifest": "m", "split": "dev"}},
    )
    found = [cells(settings)[0].transcribing(test) for test in settings.tests]
    assert [(Path(test.manifest).name, test.split) for test in found] == [
        ("manifest", "test"),
        ("m", None),
        ("m", "dev"),
    ]
    assert all(test.batch_seconds == 5.0 for test in found)


def test_every_mistake_in_the_settings_is_told_at_once_and_only_once(made: Path) -> None:
    with pytest.raises(ValueError, match="t.toml") as caught:
        config(
            made,
            made / "none",
            finetune={"optimiser": {}, "training": {"max_steps": 0}},
            by_budget={"1s": {"text": {"case": "Upper"}}},
            transcribe={"splitt": "x"},
        )
    lines = str(caught.value).split("\n")
    assert len(lines) == 4
    for mistake in (
        "optimiser: unknown key; did you mean 'optimizer'?",
        "training.max_steps: ",
        "text.case: ",
        "splitt: unknown key",
    ):
        assert sum(mistake in line for line in lines) == 1
    for changes, problem in (
        ({"encoder": None}, "encoder: give a pretraining run, or `systems` of your own"),
        ({"by_budget": {"2hours": {}}}, "'2hours' is no budget; write for example 90s"),
        ({"budgets": ["1 sec"]}, "budgets.0: '1 sec' is no budget"),
        ({"budgets": ["1s", "1s"]}, "budgets: each once"),
        ({"budgets": ["1min", "2min", "60s"]}, "budgets: each once, but there are equal ones in 1min, 60s"),
        (
            {"finetune": {"out": "x", "training": {"max_steps": 1, "seed": 3}}},
            "finetune.out: is set for each cell",
        ),
        (
            {"finetune": {"training": {"max_steps": 1, "seed": 3}}},
            "finetune.training.seed: the seeds are those of `seeds`",
        ),
        ({"systems": {"a/b": {}}}, "systems: 'a/b' is no name for a folder"),
        ({"tests": {"recognizer": {}}}, "tests: 'recognizer' is the name of"),
        ({"baseline": "nothing"}, "baseline: 'nothing' is none of the systems pretrained, scratch"),
        ({"seeds": [1, 1]}, "seeds: each once"),
        ({"part": "3/2"}, 'part: write "2/8"'),
        (
            {"by_budget": {"1s": {"transcribe": 3}}},
            "by_budget.1s.transcribe: a table of keys of `transcribe`, not 3",
        ),
        ({"tests": {"test": {"recognizer": "x"}}}, "tests.test.recognizer: is set for each cell"),
        ({"transcribe": {"out": "x"}}, "transcribe.out: is set for each cell"),
    ):
        with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
            config(made, made / "none", **changes)


def test_systems_of_units_and_of_features_are_compared_and_units_read_their_labels(
    made: Path, make_labels: Callable[..., Path], tmp_path: Path
) -> None:
    frames = {utterance.id: utterance.num_frames for utterance in Manifest(made / "manifest")}
    labels = make_labels(tmp_path / "labels", frames)
    settings = config(
        made,
        tmp_path / "out",
        budgets=["all"],
        baseline="units",
        systems={"units": {"labels": str(labels), "unit_encoder": {"architecture": "tiny"}}},
    )
    summary = label_efficiency(settings)
    assert [row["initialization"] for row in summary["cells"]] == ["pretrained", "random", "random"]
    assert read_meta(tmp_path / "out" / "all_units_seed0" / "test")["config"]["labels"] == str(labels)
    assert [(c["system"], c["baseline"]) for c in summary["comparisons"]] == [
        ("pretrained", "units"),
        ("scratch", "units"),
    ]


def test_several_processes_are_sent_to_parts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="share them out with `part`"):
        label_efficiency(config(made, made / "none"))


def test_the_command_line_runs_it_and_prints_the_table(
    made: Path, finished: tuple[LabelEfficiencyConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = made / "printed"
    shutil.copytree(finished[0].out, out)
    (out / "meta.json").unlink()
    toml = made / "transfer.toml"
    import tomli_w

    toml.write_text(tomli_w.dumps(tree(made, out, seeds=[0, 1], tests={"test": {}, "dev": {}})))
    assert wordless.cli.main(["transfer", str(toml)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["test", "budget", "labels", "system", "WER"] and len(lines) == 9
    shown = finished[1]["curve"][0]
    amount = minutes_in_words(shown["label_minutes"]).split()
    assert lines[1].split()[:6] == ["test", "1s", *amount, "pretrained", f"{shown['wer']:.1%}"]


def test_a_recipe_adds_to_a_finished_curve_and_redo_makes_its_cells_again(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    table = {"verb": "transfer", **tree(made, made / "recipe" / "curve", budgets=["all"])}
    toml = made / "recipe.toml"
    toml.write_text(tomli_w.dumps({"run": str(made / "recipe"), "curve": table}))
    assert wordless.cli.main(["run", str(toml)]) == 0
    cell = made / "recipe" / "curve" / "all_scratch_seed0" / "recognizer" / "meta.json"
    first, written = read_meta(made / "recipe" / "curve"), cell.stat().st_mtime_ns
    assert wordless.cli.main(["run", str(toml), "curve.finetune.training.max_steps=1"]) == 2
    assert (
        "training.max_steps: 2 -> 1" in capsys.readouterr().err
        and read_meta(made / "recipe" / "curve") == first
    )
    assert wordless.cli.main(["run", str(toml), 'curve.budgets=["all", "50%"]']) == 0
    assert (
        len(pq.read_table(made / "recipe" / "curve" / "transfer.parquet")) == 4
        and cell.stat().st_mtime_ns == written
    )
    assert wordless.cli.main(["run", str(toml), "curve.finetune.training.max_steps=1", "--redo"]) == 0
    assert json.loads(cell.read_text())["config"]["training"]["max_steps"] == 1


def test_a_recipe_waits_for_the_part_that_finds_all_cells_standing(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    table = {"verb": "transfer", **tree(made, made / "shared" / "curve", budgets=["all"])}
    after = {
        "verb": "compare",
        "a": "@curve/all_scratch_seed0/test",
        "b": "@curve/all_pretrained_seed0/test",
        "draws": 100,
    }
    toml = made / "shared.toml"
    toml.write_text(tomli_w.dumps({"run": str(made / "shared"), "curve": table, "after": after}))
    assert wordless.cli.main(["run", str(toml), "curve.part=1/2"]) == 0
    told = capsys.readouterr()
    assert "curve: other parts have not made all of it; after and what follows wait" in told.err
    assert (
        "1 of other parts are missing: all_scratch_seed0" in told.out
        and not (made / "shared" / "after").exists()
    )
    assert wordless.cli.main(["run", str(toml), "curve.part=2/2"]) == 0
    assert (made / "shared" / "after" / "meta.json").is_file()
    assert wordless.cli.main(["run", str(toml), "curve.part=1/2"]) == 0  # a job that is started once more
    assert "curve: finished already" in capsys.readouterr().err


# The curve, on invented transcripts


def write_transcripts(out: Path, name: str, texts: list[str], hypotheses: list[str]) -> dict[str, Any]:
    folder = out / name / "test"
    folder.mkdir(parents=True)
    import pyarrow as pa

    order = np.random.default_rng(len(name)).permutation(len(texts))  # the order of rows does not matter
    rows = {
        "id": [f"u{n:04d}" for n in order],
        "text": [texts[n] for n in order],
        "hypothesis": [hypotheses[n] for n in order],
    }
    pq.write_table(pa.table(rows), folder / "transcripts.parquet")
    budget, system, seed = name.split("_")
    wer = jiwer.wer(texts, hypotheses)
    return {
        "budget": budget,
        "system": system,
        "seed": int(seed),
        "test": "test",
        "label_minutes": 10.0,
        "wer": wer,
        "cer": wer,
        "counted": "words",
        "transcripts": f"{name}/test",
    }


def noisy(texts: list[str], rate: float, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join("x" if rng.random() < rate else word for word in text.split()) for text in texts]


def test_the_interval_over_seeds_is_as_wide_as_utterances_drawn_one_by_one_make_it(tmp_path: Path) -> None:
    """Against the plain bootstrap, a loop over utterances with all seeds' edits; seeds that agree make it no
    narrower."""
    texts = ["one two three four"] * 100
    said = noisy(texts, 0.3, 0)
    rows = [write_transcripts(tmp_path, f"10min_pretrained_{seed}", texts, said) for seed in (0, 1, 2)]
    point = summarize(rows, tmp_path, "scratch")["curve"][0]
    errors = np.array([sum(word == "x" for word in text.split()) for text in said])
    rng = np.random.default_rng(1)
    plain = np.percentile([errors[rng.integers(0, 100, 100)].sum() / 400 for _ in range(2000)], (2.5, 97.5))
    assert point["wer"] == pytest.approx(errors.sum() / 400)
    # Percentiles of 1,000 draws are themselves off by about a tenth of the deviation, here 0.022.
    assert point["wer_interval"] == pytest.approx(plain.tolist(), abs=0.006)
    alone = summarize(rows[:1], tmp_path, "scratch")["curve"][0]
    assert alone["wer_interval"] == pytest.approx(point["wer_interval"])


def test_a_comparison_is_paired_and_needs_the_same_references(tmp_path: Path) -> None:
    texts = [f"w{n} two three four" for n in range(60)]
    worse = noisy(texts, 0.4, 0)
    # never worse
    better = [text if n % 2 else said for n, (text, said) in enumerate(zip(texts, worse, strict=True))]
    rows = [
        write_transcripts(tmp_path, "10min_scratch_0", texts, worse),
        write_transcripts(tmp_path, "10min_pretrained_0", texts, better),
        write_transcripts(tmp_path, "10min_phones_0", [text.upper() for text in texts], better),
    ]
    summary = summarize(rows, tmp_path, "scratch")
    (comparison,) = summary["comparisons"]  # phones are written otherwise
    assert (comparison["system"], comparison["baseline"]) == ("pretrained", "scratch")
    assert comparison["wer_difference"] == pytest.approx(rows[1]["wer"] - rows[0]["wer"])
    low, high = comparison["wer_difference_interval"]
    assert low < comparison["wer_difference"] < high < 0
    # Better is right or what was said by both, so the utterances that differ all speak for it: of 2^n
    # patterns of signs two do.
    differing = sum(a != b for a, b in zip(worse, better, strict=True))
    assert comparison["p_value"] == pytest.approx(2 / 2**differing, abs=1e-10)
    assert differing > 8
    assert "pretrained" in as_text(summary)


def test_phones_are_told_as_such_and_have_no_characters(tmp_path: Path) -> None:
    texts = ["a b", "c d"]
    row = {
        **write_transcripts(tmp_path, "10min_pretrained_0", texts, ["a b", "c x"]),
        "cer": None,
        "counted": "phones",
    }
    summary = summarize([row], tmp_path, "scratch")
    point = summary["curve"][0]
    assert "PER" in as_text(summary) and "WER" not in as_text(summary)
    assert "cer" not in point and point["wer"] == 0.25
    assert draw_curve([point]).axes[0].get_ylabel() == "phone error rate"


def test_the_drawing_has_every_point_at_its_minutes_with_its_interval(tmp_path: Path) -> None:
    curve = [
        {
            "test": "t",
            "budget": budget,
            "system": system,
            "counted": "words",
            "label_minutes": minutes,
            "wer": wer,
            "wer_interval": ends,
        }
        for system, shift in (("pretrained", 0.0), ("scratch", 0.2))
        for budget, minutes, wer, ends in (
            ("1h", 60.0, 0.3 + shift, None),
            ("10min", 10.0, 0.5 + shift, [0.4 + shift, 0.7 + shift]),
        )
    ]
    axes = draw_curve(curve).axes[0]
    assert axes.get_xscale() == "log" and [tick.get_text() for tick in axes.get_xticklabels()] == [
        "1 h",
        "10 min",
    ]
    lines = [container for container in axes.containers if container.get_label() in ("pretrained", "scratch")]
    for container, wers in zip(lines, ([0.5, 0.3], [0.7, 0.5]), strict=True):
        line, _, (bars,) = container.lines
        assert line.get_ydata() == pytest.approx(wers)
        # shifted by a hundredth, to lie beside each other
        assert line.get_xdata() == pytest.approx([10, 60], rel=0.02)
        (low, high), none = (segment[:, 1] for segment in bars.get_segments())
        assert (low, high) == pytest.approx((wers[0] - 0.1, wers[0] + 0.2)) and none[0] == none[1]
    first = (
        write_curve(tmp_path, curve),
        [(tmp_path / f"transfer.{form}").read_bytes() for form in ("svg", "png")],
    )[1]
    assert (
        first
        == (
            write_curve(tmp_path, curve),
            [(tmp_path / f"transfer.{form}").read_bytes() for form in ("svg", "png")],
        )[1]
    )


def test_amounts_of_speech_are_named_as_people_do() -> None:
    named = {
        0.5: "30 s",
        1.0: "1 min",
        3.09: "3.1 min",
        10.2: "10 min",
        60.04: "1 h",
        90.0: "1.5 h",
        600.4: "10 h",
        6024.0: "100 h",
    }
    assert {minutes: minutes_in_words(minutes) for minutes in named} == named


def test_budgets_above_what_is_transcribed_are_seen_without_an_encoder(tmp_path: Path, made: Path) -> None:
    changes = {"encoder": str(tmp_path / "not_yet"), "budgets": ["1s", "100h"]}
    with pytest.raises(ValueError, match=r"budget = '100h' is 6000\.00 minutes, but only"):
        require_transcripts(config(made, tmp_path / "out", **changes))
    require_transcripts(
        config(
            made,
            tmp_path / "out",
            **changes,
            finetune={"budget_at_least": "1s", "training": {"max_steps": 1}},
        )
    )
