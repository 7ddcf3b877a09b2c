from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, model_validator

from pretrain.config import Config, apply_overrides, differences, parse_config, read_toml, without_none
from pretrain.ctc.task import CTCConfig
from pretrain.model.config import ARCHITECTURES, EncoderConfig
from pretrain.objectives.pretraining import PretrainConfig
from pretrain.training.task import OptimizerConfig
from wordless.verbs import VERBS


class Inner(Config):
    dropout: float = Field(0.1, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.98)


class Outer(Config):
    num_steps: int
    schedule: Literal["linear", "cosine"] = "linear"
    name: str = "x"
    inner: Inner = Inner()
    other: Inner | None = None

    @model_validator(mode="after")
    def _steps(self) -> "Outer":
        if self.num_steps == 13:
            raise ValueError("num_steps 13 brings bad luck")
        return self


def errors(tree: dict, config_class: type[Config] = Outer) -> list[str]:
    with pytest.raises(ValueError) as caught:
        parse_config(config_class, tree, "run.toml")
    return str(caught.value).splitlines()


def test_every_mistake_is_reported_at_once_with_its_dotted_key() -> None:
    tree = {
        "schedule": "cosin",
        "nam": "y",
        "inner": {"dropout": 1.5, "dropuot": 0.2},
        "other": {"beats": [1, 2]},
    }
    lines = errors(tree)
    assert len(lines) == 6 and all(line.startswith("run.toml: ") for line in lines)
    text = "\n".join(lines)
    assert "num_steps: this key is needed" in text
    assert "schedule: " in text and "'linear'" in text and "'cosin'" in text
    assert "nam: unknown key; did you mean 'name'?" in text
    assert "inner.dropout: " in text and "less than 1" in text and "1.5" in text
    assert "inner.dropuot: unknown key; did you mean 'dropout'?" in text
    assert "other.beats: unknown key; did you mean 'betas'?" in text


def splits_of(config_class: type[Config]) -> dict[str, TypeAdapter]:
    """The keys that name a split, those of tables inside too."""
    found = {}
    for name, field in config_class.model_fields.items():
        if name == "split" or name.endswith("_split"):
            found[name] = TypeAdapter(Annotated[field.annotation, name, *field.metadata])
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Config):
                found |= {f"{name}.{key}": adapter for key, adapter in splits_of(kind).items()}
    return found


def test_no_split_is_an_empty_name_in_every_config() -> None:
    classes = {name: getattr(import_module(verb.module), verb.config) for name, verb in VERBS.items()}
    found = {
        f"{verb}.{key}": adapter for verb, of in classes.items() for key, adapter in splits_of(of).items()
    }
    asked = {
        "pretrain.valid_split",
        "finetune.split",
        "transcribe.split",
        "cluster.select_split",
        "pack.bpe.split",
        "report.split",
    }
    assert asked < found.keys() and len(found) > 15
    for name, adapter in found.items():
        assert adapter.validate_python("") is None and adapter.validate_python("dev") == "dev", name


def test_an_unknown_key_without_a_neighbour_lists_the_known_ones() -> None:
    assert errors({"num_steps": 1, "inner": {"zzz": 1}}) == [
        "run.toml: inner.zzz: unknown key; known here: betas, dropout"
    ]


@pytest.mark.parametrize(
    "tree",
    [
        {"num_steps": 1.0},
        {"num_steps": "1"},
        {"num_steps": True},
        {"num_steps": 1, "name": 3},
        {"num_steps": 1, "inner": {"dropout": "0.1"}},
        {"num_steps": 1, "inner": {"betas": [0.9]}},
        {"num_steps": 1, "inner": 3},
        {"num_steps": 1, "inner": {"dropout": float("nan")}},
    ],
)
def test_types_are_strict(tree: dict) -> None:
    (line,) = errors(tree)
    assert "got " in line or line.endswith("betas.1: this key is needed")


def test_integers_are_floats_and_lists_are_tuples_as_in_toml() -> None:
    config = parse_config(Outer, {"num_steps": 1, "inner": {"dropout": 0, "betas": [0, 1]}}, "run.toml")
    assert config.inner == Inner(dropout=0.0, betas=(0.0, 1.0))


def test_a_validators_own_message_is_the_line() -> None:
    assert errors({"num_steps": 13}) == ["run.toml: num_steps 13 brings bad luck"]


def test_a_config_is_frozen_and_resolves_to_every_key() -> None:
    config = parse_config(Outer, {"num_steps": 1}, "run.toml")
    with pytest.raises(ValueError, match="frozen"):
        config.num_steps = 2  # type: ignore[misc]
    resolved = config.resolved()
    assert resolved == {
        "num_steps": 1,
        "schedule": "linear",
        "name": "x",
        "inner": {"dropout": 0.1, "betas": [0.9, 0.98]},
        "other": None,
    }
    assert parse_config(Outer, resolved, "again") == config
    assert "other" not in without_none(resolved)


def test_toml_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.toml: no such config file"):
        read_toml(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="is a folder"):
        read_toml(tmp_path)
    (tmp_path / "bad.toml").write_text("lr = \n")
    with pytest.raises(ValueError, match=r"bad\.toml: not valid TOML.*line 1"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes("name = 'é'".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.toml: not valid TOML"):
        read_toml(tmp_path / "latin.toml")


def test_overrides_reach_into_tables_and_leave_the_tree_alone() -> None:
    tree = {"optimizer": {"lr": 1.0}, "out": "a"}
    new = apply_overrides(
        tree,
        [
            "optimizer.lr=1e-3",
            "optimizer.betas=[0.9, 0.95]",
            "out=runs/b=c",
            "encoder.architecture=tiny",
            "flag=true",
            "n=3",
        ],
    )
    assert new == {
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
        "out": "runs/b=c",
        "encoder": {"architecture": "tiny"},
        "flag": True,
        "n": 3,
    }
    assert tree == {"optimizer": {"lr": 1.0}, "out": "a"}
    assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [("lr", "write key=value"), ("=3", "write key=value"), ("out.x=3", "'out' is a value")],
)
def test_an_override_that_says_nothing_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides({"out": "a"}, [override])


@given(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["C"]), min_size=1))
def test_any_text_can_be_an_overrides_value(text: str) -> None:
    value = apply_overrides({}, [f"key={text}"])["key"]
    assert value == text or not isinstance(value, str) or text.lstrip()[0] in "'\"" or "#" in text


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_an_architecture_fills_what_is_not_given_and_what_is_given_wins(name: str) -> None:
    config = parse_config(EncoderConfig, {"architecture": name}, "run.toml")
    for key, value in ARCHITECTURES[name].items():
        assert getattr(config, key) == value
    changed = parse_config(
        EncoderConfig,
        {"architecture": name, "num_layers": 3, "norm_first": False, "layer_drop": 0.5},
        "run.toml",
    )
    assert (changed.num_layers, changed.norm_first, changed.layer_drop) == (3, False, 0.5)
    assert changed.ffn_dim == ARCHITECTURES[name]["ffn_dim"]
    assert EncoderConfig() == EncoderConfig(architecture="base")  # the defaults are the preset
    # a resolved config does not move
    assert parse_config(EncoderConfig, config.resolved(), "again") == config


def test_published_architectures_have_the_published_sizes() -> None:
    base, large, xlarge = (EncoderConfig(architecture=name) for name in ("base", "large", "xlarge"))
    assert (base.dim, base.num_layers, base.num_heads, base.ffn_dim) == (768, 12, 12, 3072)
    assert (base.norm_first, base.conv_norm, base.conv_bias, base.normalize_waveform) == (
        False,
        "group",
        False,
        False,
    )
    assert (large.dim, large.num_layers, large.num_heads, large.ffn_dim) == (1024, 24, 16, 4096)
    assert (large.norm_first, large.conv_norm, large.normalize_waveform) == (True, "layer", True)
    assert (xlarge.dim, xlarge.num_layers, xlarge.num_heads, xlarge.ffn_dim) == (1280, 48, 16, 5120)
    for config in (base, large, xlarge):
        assert (config.conv_dim, config.pos_kernel, config.pos_groups, config.front_end) == (
            512,
            128,
            16,
            "waveform",
        )


@pytest.mark.parametrize("architecture", ["huge", ["base"], {"a": 1}, 3, None])
def test_an_architecture_that_is_none_is_a_message_and_no_traceback(architecture: object) -> None:
    (line,) = errors({"architecture": architecture}, EncoderConfig)
    assert line.startswith("run.toml: architecture: Input should be 'base'")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"num_heads": 7}, "dim 768 is not a multiple of num_heads 7"),
        ({"pos_groups": 7}, "dim 768 is not a multiple of pos_groups 7"),
        ({"conv_bias": True}, "conv_bias has no effect before the group norm"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tree: dict, message: str) -> None:
    (line,) = errors(tree, EncoderConfig)
    assert message in line


def test_pretraining_wants_labels_for_hubert_and_only_there() -> None:
    tree = {"out": "o", "manifest": "m", "objective": "hubert", "training": {"max_steps": 1}}
    assert "`labels` is needed" in errors(tree, PretrainConfig)[0]
    parse_config(PretrainConfig, {**tree, "labels": "l"}, "run.toml")
    assert "`labels` is needed" in errors({**tree, "objective": "wav2vec2", "labels": "l"}, PretrainConfig)[0]
    groups = {**tree, "objective": "wav2vec2", "wav2vec2": {"num_groups": 3}}
    assert errors(groups, PretrainConfig) == [
        "run.toml: wav2vec2: code_dim 256 is not a multiple of num_groups 3"
    ]


@pytest.mark.parametrize("config", [OptimizerConfig(), CTCConfig(), EncoderConfig()])
def test_defaults_are_valid_themselves(config: Config) -> None:
    assert parse_config(type(config), config.resolved(), "defaults") == config


def test_a_key_of_earlier_versions_has_its_new_name_and_counts_as_no_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Warm(Config):
        init: str | None = None

    monkeypatch.setattr("pretrain.config._noted", set())
    for _ in range(2):
        assert parse_config(Warm, {"initial": "run"}, "c.toml").resolved() == {"init": "run"}
    assert capsys.readouterr().err == "note: the key initial is called init now\n"
    with pytest.raises(ValueError, match="initial: is called init now; give one of the two"):
        parse_config(Warm, {"initial": "a", "init": "b"}, "c.toml")
    assert differences({"initial": "run"}, {"init": "run"}) == []
    assert differences({"initial": "run"}, {"init": "other"}) == [("init", "run", "other")]
    assert differences({"batches": {"decoder": "soundfile"}}, {"batches": {}}) == []
