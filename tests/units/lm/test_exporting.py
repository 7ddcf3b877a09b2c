"""What an exported folder says; that transformers loads it is tested in tests/parity/test_llama.py."""

import json
import shutil
from pathlib import Path

import pytest

from units.lm.exporting import export_language_model, transformers_config
from units.lm.language_model import load_language_model
from units.lm.model import DecoderConfig, RopeScaling
from units.lm.warm_start import config_of
from wordless.cli import main


def test_an_export_says_what_its_units_are(trained: Path, tmp_path: Path) -> None:
    summary = export_language_model(trained, tmp_path / "out")
    lm = load_language_model(trained, device="cpu")
    origin = json.loads((tmp_path / "out" / "wordless.json").read_text())
    assert origin["codebook"] == lm.meta["codebook"] and origin["frame_rate_hz"] == lm.meta["frame_rate_hz"]
    assert origin["deduplicated"] == lm.meta["deduplicated"] and origin["lm"] == lm.fingerprint
    assert (
        summary["architecture"] == "LlamaForCausalLM" and summary["num_tokens"] == lm.decoder.vocabulary_size
    )
    assert summary["num_parameters"] == sum(weight.numel() for weight in lm.decoder.parameters())


def test_an_existing_folder_is_not_written_over(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is there already"):
        export_language_model(trained, tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "LlamaForCausalLM"),
        ({"attention_dim": 64}, "LlamaForCausalLM"),
        ({"sliding_window": 8}, "MistralForCausalLM"),
        ({"qkv_bias": True, "attention_dim": 64}, "LlamaForCausalLM"),
        ({"qkv_bias": True, "sliding_window": 8}, "Qwen2ForCausalLM"),
        (
            {
                "rope_scaling": RopeScaling(
                    factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=32
                )
            },
            "LlamaForCausalLM",
        ),
    ],
)
def test_the_class_is_the_one_that_computes_the_same_and_its_config_reads_back(
    changes: dict[str, object], name: str, tmp_path: Path
) -> None:
    config = DecoderConfig(dim=32, dropout=0, context=64, tied_embeddings=False).model_copy(update=changes)
    tree = transformers_config(config, 20)
    assert tree["architectures"] == [name]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert config_of(tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True, "sliding_window": 8, "attention_dim": 64}, "Qwen2, the class with both"),
        ({"dim": 30, "attention_dim": 64}, "dim 30 is no multiple"),
    ],
)
def test_what_no_class_computes_is_refused(changes: dict[str, object], message: str) -> None:
    config = DecoderConfig(**{"dim": 32, **changes})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        transformers_config(config, 20)


def test_a_model_still_in_training_is_exported_like_a_finished_one(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "lm")
    (tmp_path / "lm" / "meta.json").unlink()
    assert main(["export", str(tmp_path / "lm"), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    export_language_model(trained, tmp_path / "finished")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "finished")]
    assert weights[0] == weights[1]


def test_a_model_still_in_training_goes_out_in_its_own_formats_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "lm")
    (tmp_path / "lm" / "meta.json").unlink()
    assert main(["export", str(tmp_path / "lm"), str(tmp_path / "out"), "--format", "fairseq"]) == 2
    assert "is a language model, whose formats are huggingface" in capsys.readouterr().err
