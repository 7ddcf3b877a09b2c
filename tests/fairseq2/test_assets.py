"""`fairseq2:NAME` wherever a run of an encoder is expected, beside the run that importing the same card
makes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq2.models.wav2vec2 import get_wav2vec2_model_hub
from safetensors.torch import save_file

from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.finetuning import finetune
from pretrain.ctc.model import load_recognizer
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.fairseq2 import assets
from pretrain.model.encoder import load_encoder
from pretrain.objectives.pretraining import PretrainConfig, pretrain
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import load_weights
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.exporting import export_weights
from quantize.clustering import ClusterConfig, cluster
from quantize.codebook import Codebook
from quantize.encoding import encode
from quantize.encoding_plan import EncodeConfig
from quantize.measuring import MeasureConfig, measure
from tests.parity.peers import scatter
from tests.pretrain.ctc.tones import save_encoder
from tests.quantize.conftest import write_corpus
from wordless.cli import main

SMALL: dict[str, Any] = {
    "quantized_dim": 8,
    "final_dim": 8,
    "num_codebook_entries": 4,
    "num_distractors": 5,
    "encoder_config": {
        "model_dim": 32,
        "feature_dim": 16,
        "num_encoder_layers": 2,
        "num_encoder_attn_heads": 2,
        "ffn_inner_dim": 48,
        "pos_conv_kernel_size": 8,
        "num_pos_conv_groups": 2,
        "feature_extractor_layer_descs": [
            [16, kernel, stride]
            for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True)
        ],
    },
}
NAME = "fairseq2:small"


@pytest.fixture(autouse=True)
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards with that of a small wav2vec 2.0 of fairseq2's, randomly initialised and saved by it;
    fairseq2 started anew."""
    folder = tmp_path / "cards"
    folder.mkdir()
    monkeypatch.setenv("FAIRSEQ2_ASSET_DIR", str(folder))
    write_card(folder, "small", "wav2vec2", SMALL, "small.safetensors")
    start_anew(monkeypatch)
    write_checkpoint(folder / "small.safetensors", seed=0)
    return folder


def start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what fairseq2 and we have read, as a new process has."""
    monkeypatch.setattr("fairseq2.runtime.dependency._resolver", None)
    assets.current_fingerprint.cache_clear()
    assets.resolver()


def write_card(folder: Path, name: str, family: str, config: dict[str, Any], checkpoint: str) -> None:
    card = {"name": name, "model_family": family, "model_config": config, "checkpoint": checkpoint}
    (folder / f"{name}.yaml").write_text(json.dumps(card))  # JSON is YAML


def write_checkpoint(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    hub = get_wav2vec2_model_hub()
    model = scatter(hub.create_new_model(hub.get_model_config("small")), seed=seed)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "audio").mkdir()
    return str(write_corpus(tmp_path / "audio"))


@pytest.fixture
def imported(tmp_path: Path) -> str:
    import_weights(ImportConfig(source=NAME, out=str(tmp_path / "imported")))
    return str(tmp_path / "imported")


def fitted(corpus: str, encoder: str, out: Path, **keys: Any) -> Codebook:
    cluster(
        ClusterConfig(
            manifest=corpus,
            out=str(out),
            features="encoder",
            encoder=encoder,
            layer=1,
            num_classes=6,
            device="cpu",
            **keys,
        )
    )
    return Codebook.open(str(out))


def labelled(corpus: str, codebook: Codebook, encoder: str, out: Path, **keys: Any) -> dict[str, np.ndarray]:
    encode(
        EncodeConfig(
            manifest=corpus,
            codebook=str(codebook.folder),
            out=str(out),
            encoder=encoder,
            device="cpu",
            **keys,
        )
    )
    labels = Labels(str(out))
    return {name: labels[name] for name in Manifest(corpus).ids}


def test_units_cut_from_a_card_are_those_of_importing_it_first(
    corpus: str, imported: str, tmp_path: Path
) -> None:
    ours, theirs = fitted(corpus, NAME, tmp_path / "a"), fitted(corpus, imported, tmp_path / "b")
    assert ours.source == theirs.source and ours.fingerprint == theirs.fingerprint
    assert ours.source["encoder"] == load_weights(imported)[2] == load_encoder(imported)[1]
    expected = labelled(corpus, theirs, imported, tmp_path / "labels b")
    assert len({*np.concatenate([*expected.values()]).tolist()}) > 2
    # also with the codebook of the one and the encoder of the other: they are the same encoder
    for number, (codebook, encoder) in enumerate(((ours, NAME), (ours, imported), (theirs, NAME))):
        found = labelled(corpus, codebook, encoder, tmp_path / f"labels {number}")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_several_processes_read_the_card_each(corpus: str, tmp_path: Path) -> None:
    codebook = fitted(corpus, NAME, tmp_path / "codebook")
    one, two = (
        labelled(corpus, codebook, NAME, tmp_path / f"labels {n}", processes=n, num_shards=4) for n in (1, 2)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_a_card_gives_is_what_its_imported_run_holds(imported: str) -> None:
    weights, meta, fingerprint = load_weights(NAME)
    stored, told, known = load_weights(imported)
    assert weights.keys() == stored.keys() and all(
        torch.equal(tensor, stored[name]) for name, tensor in weights.items()
    )
    assert fingerprint == known
    assert meta["kind"] == told["kind"] == "encoder" and meta["objective"] == "wav2vec2"
    assert all(told["config"][key] == value for key, value in meta["config"].items())


def test_check_reads_a_card(imported: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", NAME]) == 0
    assert capsys.readouterr().out == f"{NAME}: a complete encoder, weights {load_weights(imported)[2]}\n"


def test_fine_tuning_a_card_is_fine_tuning_the_imported_run(
    cards: Path, imported: str, tmp_path: Path, corpus: str
) -> None:
    texts = write_texts(corpus)
    runs = []
    for encoder in (NAME, imported):
        out = tmp_path / f"finetuned {len(runs)}"
        tree = {
            "out": str(out),
            "manifest": texts,
            "split": "",
            "valid_split": "",
            "encoder": encoder,
            "ctc": {"freeze_steps": 1},
            "batches": {"batch_seconds": 8},
            "training": {"max_steps": 2, "log_every": 1, "device": "cpu"},
        }
        finetune(FinetuneConfig.model_validate(tree))
        runs.append(load_weights(out))
    (ours, meta, _), (theirs, other, _) = runs
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert meta["parents"] == other["parents"] and meta["parents"]["encoder"] == load_weights(NAME)[2]
    assert meta["config"]["encoder"] == NAME
    # which of the two alike encoders it is, an export of the fine-tuned run learns from the card
    notes = export_weights(tmp_path / "finetuned 0", tmp_path / "exported", "huggingface")["notes"]
    assert not any("does not say" in note for note in notes)


def write_texts(corpus: str) -> str:
    """The corpus with transcripts."""
    audio, known = Path(corpus).parent, Manifest(corpus)
    rows = [
        {
            "id": row.id,
            "path": str(audio / f"{row.id}.wav"),
            "start": 0,
            "num_samples": row.length,
            "sample_rate": 16000,
            "text": "ab",
        }
        for row in known
    ]
    write_manifest(audio / "texts", rows, {}, {})
    return str(audio / "texts")


def test_pretraining_goes_on_from_a_card(corpus: str, imported: str, tmp_path: Path) -> None:
    config = load_weights(NAME)[1]["config"]
    tree = {
        "manifest": corpus,
        "valid_split": "dev",
        "objective": "wav2vec2",
        "encoder": config["encoder"],
        "wav2vec2": config["wav2vec2"],
        "batches": {"batch_seconds": 8},
        "training": {"max_steps": 1, "log_every": 1, "device": "cpu"},
    }
    weights = []
    for init in (NAME, imported):
        out = str(tmp_path / f"run {len(weights)}")
        pretrain(PretrainConfig.model_validate({**tree, "out": out, "init": init}, strict=False))
        weights.append(load_weights(out)[0])
        assert read_meta(out)["parents"]["init"] == load_weights(imported)[2]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_layers_of_a_card_are_compared(corpus: str, tmp_path: Path) -> None:
    config = MeasureConfig(
        manifest=corpus,
        out=str(tmp_path / "sweep"),
        encoder=NAME,
        layers="all",
        num_classes=4,
        frames=300,
        abx=False,
        probes=False,
        device="cpu",
    )
    summary = measure(config)
    assert [*summary["layers"]] == ["0", "1", "2"]
    assert read_meta(config.out)["parents"]["encoder"] == load_weights(NAME)[2]


def test_another_checkpoint_under_the_same_card_is_another_encoder(
    cards: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codebook = fitted(corpus, NAME, tmp_path / "codebook")
    before = load_weights(NAME)[2]
    assert load_weights(NAME)[2] == before == codebook.source["encoder"]
    write_checkpoint(cards / "small.safetensors", seed=1)
    start_anew(monkeypatch)
    after = load_weights(NAME)[2]
    assert after != before
    with pytest.raises(
        ValueError, match=f"was fitted on encoder {before}, and fairseq2:small is encoder {after}"
    ):
        labelled(corpus, codebook, NAME, tmp_path / "labels")


def test_a_stage_stands_while_the_card_has_the_same_checkpoint(
    cards: Path,
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""run = "{tmp_path / "run"}"
[codebook]
verb = "cluster"
manifest = "{corpus}"
features = "encoder"
encoder = "{NAME}"
layer = 1
num_classes = 4
[labels]
verb = "encode"
manifest = "{corpus}"
codebook = "@codebook"
encoder = "{NAME}"
"""
    )
    assert main(["check", str(recipe)]) == 0
    assert main(["run", str(recipe)]) == 0
    assert main(["run", str(recipe)]) == 0
    assert capsys.readouterr().err.count("finished already") == 2
    write_checkpoint(cards / "small.safetensors", seed=1)
    start_anew(monkeypatch)
    assert main(["run", str(recipe)]) == 2
    assert f"which {NAME} no longer is" in capsys.readouterr().err
    assert main(["run", str(recipe), "--redo"]) == 0


def test_a_card_of_ours_is_the_run_that_it_names(
    cards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_encoder(tmp_path / "ours")
    fingerprint = load_weights(run)[2]
    export_weights(run, cards / "ours", "fairseq2")
    start_anew(monkeypatch)
    found, known = load_encoder("fairseq2:ours")
    expected, _ = load_encoder(run)
    assert known == fingerprint and found.config == expected.config
    assert all(
        torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items()
    )


def test_a_card_of_ours_may_name_a_run_and_change_a_card_below_it(
    cards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_encoder(tmp_path / "ours")
    write_card(cards, "below", "wordless_encoder", {"encoder": {"architecture": "tiny"}}, str(run))
    (cards / "above.yaml").write_text(
        json.dumps({"name": "above", "base": "below", "model_config": {"encoder": {"layer_drop": 0.5}}})
    )
    start_anew(monkeypatch)
    for name, layer_drop in (("below", 0.0), ("above", 0.5)):
        found, fingerprint = load_encoder(f"fairseq2:{name}")
        assert fingerprint == load_encoder(run)[1] and found.config.layer_drop == layer_drop


def test_a_recogniser_of_ours_is_loaded_by_its_card(
    cards: Path, corpus: str, imported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "recogniser"
    tree = {
        "out": str(out),
        "manifest": write_texts(corpus),
        "split": "",
        "valid_split": "",
        "encoder": imported,
        "text": {"case": "upper"},
        "batches": {"batch_seconds": 8},
        "ctc": {"layers": "weighted"},
        "training": {"max_steps": 1, "log_every": 1, "device": "cpu"},
    }
    finetune(FinetuneConfig.model_validate(tree))
    fingerprint = load_weights(out)[2]
    export_weights(out, cards / "writer", "fairseq2")
    start_anew(monkeypatch)
    found, expected = load_recognizer("fairseq2:writer"), load_recognizer(out)
    assert (
        found.fingerprint == fingerprint
        and found.vocabulary == expected.vocabulary
        and found.text == expected.text
    )
    assert all(
        torch.equal(tensor, expected.model.state_dict()[name])
        for name, tensor in found.model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal", "near it are .*small"),
        ("chat", "model_family = 'llama'"),
        ("conformer", "use_conformer"),
        ("torn", "torn"),
    ],
)
def test_a_card_that_is_no_encoder_of_ours_ends_with_status_2(
    name: str,
    message: str,
    cards: Path,
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_card(cards, "chat", "llama", {}, "small.safetensors")
    write_card(
        cards,
        "conformer",
        "wav2vec2",
        {"encoder_config": {**SMALL["encoder_config"], "use_conformer": True}},
        "small.safetensors",
    )
    write_card(cards, "torn", "wav2vec2", SMALL, "torn.safetensors")
    (cards / "torn.safetensors").write_bytes((cards / "small.safetensors").read_bytes()[:1000])
    start_anew(monkeypatch)
    config = tmp_path / "cluster.toml"
    config.write_text(
        f'manifest = "{corpus}"\nout = "{tmp_path / "out"}"\nfeatures = "encoder"\nencoder = '
        f'"fairseq2:{name}"\nlayer = 1\nnum_classes = 4\n'
    )
    assert main(["cluster", str(config)]) == 2
    told = capsys.readouterr().err
    assert "wordless: " in told and "Traceback" not in told
    assert re.search(message, told.replace("\n", " ")), told
