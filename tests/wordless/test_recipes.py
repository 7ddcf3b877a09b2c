"""Every recipe is valid, and those of published models say what was published."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import wordless.cli
from pretrain.config import flatten, read_toml
from pretrain.ctc.cells import LabelEfficiencyConfig, cells
from pretrain.objectives.pretraining import PretrainConfig
from units.lm.model import Decoder
from wordless.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

# fairseq: examples/hubert/config/pretrain/*.yaml,
# examples/wav2vec/config/pretraining/wav2vec2_base_librispeech.yaml; papers
ADAM = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "schedule": "linear", "final_lr_ratio": 0.0}
BASE = {
    "num_layers": 12,
    "dim": 768,
    "ffn_dim": 3072,
    "num_heads": 12,
    "norm_first": False,
    "conv_norm": "group",
    "conv_bias": False,
    "normalize_waveform": False,
    "input_dropout": 0.1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "layer_drop": 0.05,
    "feature_gradient_scale": 0.1,
    "front_end": "waveform",
    "pos_kernel": 128,
    "pos_groups": 16,
}
LARGE = {
    "num_layers": 24,
    "dim": 1024,
    "ffn_dim": 4096,
    "num_heads": 16,
    "norm_first": True,
    "conv_norm": "layer",
    "conv_bias": False,
    "normalize_waveform": True,
    "input_dropout": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "layer_drop": 0.0,
    "feature_gradient_scale": 1.0,
    "front_end": "waveform",
    "pos_kernel": 128,
    "pos_groups": 16,
}
HUBERT = {
    "mask_start_probability": 0.08,
    "mask_length": 10,
    "temperature": 0.1,
    "unmasked_weight": 0.0,
    "feature_penalty": 10.0,
}
WAV2VEC2 = {
    "mask_start_probability": 0.065,
    "mask_length": 10,
    "num_distractors": 100,
    "num_groups": 2,
    "num_entries": 320,
    "code_dim": 256,
    "final_dim": 256,
    "temperature": 0.1,
    "gumbel_temperature": (2.0, 0.5),
    "gumbel_decay": 0.999995,
    "diversity_weight": 0.1,
    "feature_penalty": 10.0,
    "feature_dropout": 0.1,
}
# stage: GPUs, samples on each, steps, warm-up, learning rate, clipping, encoder, head
PUBLISHED: dict[tuple[str, str], tuple[int, int, int, int, float, float, dict[str, Any], dict[str, Any]]] = {
    ("hubert_base_ls960", "hubert1"): (
        32,
        1_400_000,
        250_000,
        20_000,
        5e-4,
        10.0,
        BASE,
        {**HUBERT, "final_dim": 256},
    ),
    ("hubert_base_ls960", "hubert2"): (
        32,
        1_400_000,
        400_000,
        32_000,
        5e-4,
        10.0,
        BASE,
        {**HUBERT, "final_dim": 256},
    ),
    ("hubert_large_ll60k", "hubert"): (
        128,
        900_000,
        400_000,
        32_000,
        1.5e-3,
        1.0,
        LARGE,
        {**HUBERT, "final_dim": 768},
    ),
    ("wav2vec2_base_ls960", "wav2vec2"): (64, 1_400_000, 400_000, 32_000, 5e-4, 0.0, BASE, WAV2VEC2),
}


def stage_config(recipe: str, stage: str) -> PretrainConfig:
    path = next(path for path in RECIPES if path.stem == recipe)
    tree = read_toml(path)
    tree.pop("slurm", None)
    parsed = Recipe(tree, str(path)).parse(stage)
    assert isinstance(parsed, PretrainConfig)
    return parsed


def num_processes(recipe: str, stage: str) -> int:
    """Of the stage's job on SLURM."""
    path = next(path for path in RECIPES if path.stem == recipe)
    resources = Recipe(read_toml(path), str(path)).resources(stage)
    return resources.nodes * resources.tasks_per_node


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_passes_check(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wordless.cli.main(["check", str(path)]) == 0
    assert "a valid recipe" in capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "stage"), PUBLISHED)
def test_a_published_model_is_trained_as_published(recipe: str, stage: str) -> None:
    gpus, samples, steps, warmup, rate, clip, encoder, head = PUBLISHED[recipe, stage]
    config = stage_config(recipe, stage)
    assert config.batches.batch_seconds * 16000 == gpus * samples
    assert config.training.accumulate * num_processes(recipe, stage) == gpus
    assert config.batches.crop_seconds * 16000 == 250_000 and config.batches.min_seconds * 16000 == 32_000
    assert (config.training.max_steps, config.optimizer.warmup_steps) == (
        steps,
        warmup,
    ) and warmup == 0.08 * steps
    assert (config.optimizer.lr, config.optimizer.clip_norm) == (rate, clip)
    assert {name: getattr(config.optimizer, name) for name in ADAM} == ADAM
    assert {name: getattr(config.encoder, name) for name in encoder} == encoder
    of_objective = config.hubert if config.objective == "hubert" else config.wav2vec2
    assert {name: getattr(of_objective, name) for name in head} == head
    assert head.keys() == type(of_objective).model_fields.keys()  # none is left to a default


@pytest.mark.parametrize(("recipe", "stage"), PUBLISHED)
def test_every_value_of_a_published_recipe_has_a_comment(recipe: str, stage: str) -> None:
    text = next(path for path in RECIPES if path.stem == recipe).read_text()
    tables = re.findall(rf"^\[{stage}\.(\w+)\][^\n]*\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    assert {"encoder", "batches", "optimizer", "training"} <= {name for name, _ in tables}
    for name, body in tables:
        lines = [line for line in body.splitlines() if "=" in line and not line.startswith("#")]
        assert name == "evaluation" or all("#" in line for line in lines), (name, lines)


# fairseq: examples/wav2vec/config/finetuning/base_10m.yaml, base_1h.yaml, base_10h.yaml, base_100h.yaml;
# fractions of its masks are start probabilities times span lengths
FINE_TUNED = {  # budget: updates, learning rate, frozen updates, LayerDrop, mask_channel_prob
    "10min": (13_000, 5e-5, 10_000, 0.1, 0.25),
    "1h": (13_000, 5e-5, 10_000, 0.1, 0.25),
    "10h": (20_000, 5e-5, 10_000, 0.05, 0.5),
    "all": (80_000, 3e-5, 0, 0.1, 0.5),
}


def test_base_is_fine_tuned_as_published_on_every_budget() -> None:
    config = transfer_config()
    assert set(config.budgets) == FINE_TUNED.keys() and list(config.all_systems) == ["pretrained", "scratch"]
    for cell in cells(config):
        run = cell.finetuning()
        steps, lr, frozen, layer_drop, channels = FINE_TUNED[cell.budget]
        assert (run.training.max_steps, run.optimizer.lr, run.ctc.freeze_steps, run.ctc.layer_drop) == (
            steps,
            lr,
            frozen,
            layer_drop,
        )
        assert (
            run.ctc.mask_channel_probability * run.ctc.mask_channel_length == channels
            and run.ctc.mask_channel_length == 64
        )
        assert (
            run.ctc.mask_start_probability * run.ctc.mask_length == pytest.approx(0.65)
            and run.ctc.mask_length == 10
        )
        dropouts = (
            run.ctc.dropout,
            run.ctc.attention_dropout,
            run.ctc.input_dropout,
            run.ctc.final_dropout,
            run.ctc.activation_dropout,
        )
        assert dropouts == (0, 0, 0, 0, 0.1) and run.ctc.freeze_front_end and run.ctc.layers == "last"
        assert run.batches.batch_seconds * 16000 == 2 * 4 * 3_200_000 and run.training.accumulate == 2 * 4
        optimizer = run.optimizer
        assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) == (
            (0.9, 0.98),
            1e-8,
            0,
            0,
        )
        assert (optimizer.schedule, optimizer.tri_stage, optimizer.final_lr_ratio) == (
            "tri_stage",
            (0.1, 0.4, 0.5),
            0.05,
        )
        assert (run.valid_manifest or "").endswith("dev_other") and run.training.keep_best


def test_every_value_of_the_fine_tuning_recipe_has_a_comment() -> None:
    text = next(path for path in RECIPES if path.stem == "ctc_10min").read_text()
    tables = re.findall(
        r"^\[transfer\.(finetune\.\w+|by_budget\.\w+)\][^\n]*\n(.*?)(?=^\[|\Z)",
        text,
        re.MULTILINE | re.DOTALL,
    )
    assert {
        "finetune.ctc",
        "finetune.batches",
        "finetune.optimizer",
        "finetune.training",
        "by_budget.10h",
    } <= {name for name, _ in tables}
    for name, body in tables:
        lines = [line for line in body.splitlines() if "=" in line and not line.startswith("#")]
        assert all("#" in line or line.startswith("checkpoint_every") for line in lines), (name, lines)


def test_the_published_language_model_weights_are_those_of_each_budget(tmp_path: Path) -> None:
    config = uncommented("ctc_10min", r"transfer\.tests\.test-clean-4gram", tmp_path).parse("transfer")
    weights = {"10min": (3.23, -0.26), "1h": (2.90, -1.62), "10h": (2.46, -0.59), "all": (2.15, -0.52)}
    assert list(config.tests) == ["test-clean", "test-other", "test-clean-4gram", "test-other-4gram"]
    for cell in cells(config):
        decoding = cell.transcribing("test-clean-4gram").decoding
        assert (decoding.method, decoding.lm_weight, decoding.word_score) == ("beam", *weights[cell.budget])
        assert cell.transcribing("test-clean").decoding.method == "greedy"


def transfer_config() -> LabelEfficiencyConfig:
    path = next(path for path in RECIPES if path.stem == "ctc_10min")
    tree = read_toml(path)
    tree.pop("slurm")
    parsed = Recipe(tree, str(path)).parse("transfer")
    assert isinstance(parsed, LabelEfficiencyConfig)
    return parsed


def uncommented(recipe: str, first_table: str, tmp_path: Path, *edits: tuple[str, str]) -> Recipe:
    """The recipe with the block of comments that begins with `first_table` as settings, and other lines
    replaced."""
    text = next(path for path in RECIPES if path.stem == recipe).read_text()
    block = re.search(rf"^# \[{first_table}\]\n(?:#(?: .*)?\n)+", text, re.MULTILINE)
    assert block is not None
    text = text.replace(block[0], re.sub(r"^# ?", "", block[0], flags=re.MULTILINE))
    for pattern, new in edits:
        text, count = re.subn(pattern, new, text, count=1, flags=re.MULTILINE)
        assert count == 1
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    tree = read_toml(path)
    tree.pop("slurm")
    return Recipe(tree, str(path))


def test_a_sweep_can_choose_the_layer_that_the_recipe_for_base_takes_from_the_paper(tmp_path: Path) -> None:
    recipe = uncommented(
        "hubert_base_ls960", "layers1", tmp_path, (r"^layer = 6 #.*$", 'layer = "best"\nsweep = "@layers1"')
    )
    assert recipe.parse("codebook1").sweep == f"{recipe.folder}/layers1" == recipe.parse("layers1").out


def test_a_sweep_can_choose_the_layer_that_the_recipe_for_large_takes_from_the_paper(tmp_path: Path) -> None:
    recipe = uncommented(
        "hubert_large_ll60k", "layers", tmp_path, (r"^layer = 9 #.*$", 'layer = "best"\nsweep = "@layers"')
    )
    codebook, layers = recipe.parse("codebook"), recipe.parse("layers")
    assert codebook.sweep == f"{recipe.folder}/layers" == layers.out
    assert (layers.manifest, layers.encoder, layers.num_classes) == (
        codebook.manifest,
        codebook.encoder,
        codebook.num_classes,
    )


def test_a_third_iteration_of_base_follows_the_sweep_over_the_second(tmp_path: Path) -> None:
    recipe = uncommented("hubert_base_ls960", "layers2", tmp_path)
    codebook, labels = recipe.parse("codebook2"), recipe.parse("labels2")
    assert (codebook.layer, codebook.sweep, codebook.encoder) == (
        "best",
        recipe.parse("layers2").out,
        recipe.parse("hubert2").out,
    )
    assert (labels.codebook, labels.encoder) == (codebook.out, codebook.encoder)
    text = (tmp_path / "recipe.toml").read_text()
    tables = re.findall(r"^\[hubert2\..*?(?=^\[hubert2\.|^# ---|\Z)", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.toml").write_text(text + "".join(tables).replace("[hubert2.", "[hubert3."))
    tree = read_toml(tmp_path / "recipe.toml")
    tree.pop("slurm")
    second, third = (Recipe(tree, "recipe.toml").parse(name) for name in ("hubert2", "hubert3"))
    assert (
        third.labels == labels.out and third.training == second.training and third.batches == second.batches
    )


@pytest.mark.parametrize(
    ("recipe", "sweeps"),
    [("demo", {"codebook1": "layers1", "codebook2": "layers2"}), ("demo_wav2vec2", {"codebook": "layers"})],
)
def test_the_demos_take_the_layer_that_a_sweep_on_other_voices_than_the_judged_ones_recommends(
    recipe: str, sweeps: dict[str, str]
) -> None:
    tree = read_toml(next(path for path in RECIPES if path.stem == recipe))
    for codebook, sweep in sweeps.items():
        assert (tree[codebook]["layer"], tree[codebook]["sweep"]) == ("best", f"@{sweep}")
        assert (tree[sweep]["encoder"], tree[sweep]["num_classes"]) == (
            tree[codebook]["encoder"],
            tree[codebook]["num_classes"],
        )
        assert (tree[sweep]["fit_split"], tree[sweep]["split"]) == ("train", "dev")
    assert {
        tree[stage]["split"] for stage in tree["report"]["units"].values() for stage in [stage.lstrip("@")]
    } == {"test"}


def test_the_labels_of_the_published_iterations_are_those_of_the_paper() -> None:
    """MFCC, K = 100; layer 6 of iteration 1, K = 500; for LARGE, layer 9 of iteration 2, K = 500."""
    base, large = (flatten(read_toml(path)) for path in RECIPES if path.stem.startswith("hubert_"))
    assert (
        base["codebook_mfcc.features"],
        base["codebook_mfcc.num_classes"],
        base["codebook_mfcc.cmvn"],
    ) == ("mfcc", 100, False)
    assert [base[f"codebook1.{key}"] for key in ("encoder", "layer", "num_classes")] == ["@hubert1", 6, 500]
    assert (
        large["codebook.encoder"] == f"{base['run']}/hubert2"
        and large["codebook.manifest"] == f"{base['run']}/manifest"
    )
    assert (large["codebook.layer"], large["codebook.num_classes"]) == (9, 500)


def test_the_unit_language_model_has_the_size_of_gslms() -> None:
    with torch.device("meta"):
        path = next(path for path in RECIPES if path.stem == "unit_lm")
        tree = read_toml(path)
        tree.pop("slurm")
        decoder = Decoder(Recipe(tree, str(path)).parse("lm").model, tree["codebook"]["num_classes"] + 2)
    assert 100e6 < sum(parameter.numel() for parameter in decoder.parameters()) < 150e6


def test_preferences_go_on_from_the_warm_started_language_model(tmp_path: Path) -> None:
    recipe = uncommented("unit_lm_twist", "dpo", tmp_path)
    preferences, trained = recipe.parse("dpo"), recipe.parse("lm")
    assert preferences.init == trained.out and preferences.dpo.beta == 0.1 and trained.init == "Qwen2.5-0.5B"
