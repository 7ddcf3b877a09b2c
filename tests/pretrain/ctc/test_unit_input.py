from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.ctc.finetuning import finetune
from pretrain.ctc.model import CTCBatch, load_recognizer
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import transcribe
from pretrain.ctc.unit_input import LabelBatches, UnitConfig, unit_batches
from pretrain.data.batches import BatchConfig
from pretrain.data.label_shards import write_shard
from pretrain.data.labels import Labels, commit_labels
from pretrain.data.manifest import Manifest
from tests.pretrain.ctc.tones import MakeCorpus, settings, spell, tone_labels

pytestmark = pytest.mark.slow  # `make test` is to stay short

TRAIN = ["ab cd", "da", "ba ca", "cab", "dcba", "ad bc", "bd ac", "abac"]
DEV = ["cad ba", "bad", "dab ca"]
SMALL = {"architecture": "tiny", "dropout": 0.0, "input_dropout": 0.0}


@pytest.fixture
def manifest(tmp_path: Path, make_corpus: MakeCorpus) -> Manifest:
    texts = [*TRAIN, *DEV]
    splits = ["train"] * len(TRAIN) + ["dev"] * len(DEV)
    return make_corpus(tmp_path, [spell(text) for text in texts], texts=texts, splits=splits)


def over(labels: Path, **changes: Any) -> dict[str, Any]:
    return {"labels": str(labels), "unit_encoder": SMALL, **changes}


@pytest.mark.parametrize("units", [{}, {"deduplicate": True}, {"levels": 2}])
def test_a_recogniser_of_units_learns_what_they_spell(
    tmp_path: Path, manifest: Manifest, units: dict[str, Any]
) -> None:
    """Texts that it has never seen, of the tones that it has."""
    labels = tone_labels(tmp_path / "labels", manifest, [*TRAIN, *DEV], levels=units.get("levels", 1))
    config = settings(
        tmp_path,
        manifest,
        **over(labels, units=units),
        training={"max_steps": 120, "validate_every": 40, "log_every": 40},
        ctc={"mask_start_probability": 0.02, "mask_length": 2, "layer_drop": 0.1},
    )
    summary = finetune(config)
    assert summary["valid_cer"] < 0.1
    found = load_recognizer(config.out)
    assert found.codebook == "c0de" and found.meta["parents"]["labels"] == Labels(labels).fingerprint
    assert found.model.encoder.front_end.embeddings.shape == (5 * units.get("levels", 1), 64)
    result = transcribe(
        TranscribeConfig(
            out=str(tmp_path / "text"),
            manifest=str(manifest.folder),
            split="dev",
            recognizer=config.out,
            labels=str(labels),
        )
    )
    assert result["wer"] == pytest.approx(summary["best_valid_wer"])
    other = tone_labels(tmp_path / "other", manifest, [*TRAIN, *DEV], codebook="beef")
    with pytest.raises(
        ValueError, match="are of codebook beef, and the recogniser learned units of codebook c0de"
    ):
        unit_batches(found, str(other), manifest, BatchConfig())


def test_the_default_is_a_small_encoder_with_an_embedding_for_each_unit(
    tmp_path: Path, manifest: Manifest
) -> None:
    labels = tone_labels(tmp_path / "labels", manifest, [*TRAIN, *DEV])
    finetune(settings(tmp_path, manifest, labels=str(labels), training={"max_steps": 1}))
    model = load_recognizer(tmp_path / "recognizer").model
    assert model.encoder.config.architecture == "small" and model.encoder.config.num_units == 5
    large = {
        "architecture": "large",
        "dim": 64,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 64,
        "pos_groups": 4,
    }  # normalises waveforms
    finetune(
        settings(
            tmp_path,
            manifest,
            out=str(tmp_path / "l"),
            labels=str(labels),
            unit_encoder=large,
            training={"max_steps": 1},
        )
    )
    asked = {**SMALL, "front_end": "units", "num_units": 7}
    with pytest.raises(ValueError, match="unit_encoder.num_units = 7, but .*labels has 5 to read"):
        finetune(
            settings(tmp_path, manifest, out=str(tmp_path / "n"), labels=str(labels), unit_encoder=asked)
        )
    with pytest.raises(ValueError, match="encoder: .* reads units and not audio"):
        finetune(settings(tmp_path, manifest, out=str(tmp_path / "x"), encoder=str(tmp_path / "recognizer")))


def test_units_are_read_as_asked_levels_and_repeats(tmp_path: Path, manifest: Manifest) -> None:
    write_shard(tmp_path / "labels", 0, ["x"], [np.array([[1, 0], [1, 0], [1, 4], [2, 4], [2, 4]])])
    commit_labels(tmp_path / "labels", 1, {}, {}, codebook="c", num_classes=5, num_levels=2)
    labels = Labels(tmp_path / "labels")
    assert UnitConfig().read(labels, "x").tolist() == [1, 1, 1, 2, 2]
    assert UnitConfig(deduplicate=True).read(labels, "x").tolist() == [1, 2]
    assert UnitConfig(levels=2).read(labels, "x").tolist() == [[1, 5], [1, 5], [1, 9], [2, 9], [2, 9]]
    assert UnitConfig(levels=2, deduplicate=True).read(labels, "x").tolist() == [[1, 5], [1, 9], [2, 9]]
    with pytest.raises(ValueError, match=r"units\.levels = 3, but .*labels has 2"):
        UnitConfig(levels=3).num_embeddings(labels)


def test_what_an_utterance_is_batched_with_does_not_change_its_frames(
    tmp_path: Path, manifest: Manifest
) -> None:
    labels = tone_labels(tmp_path / "labels", manifest, [*TRAIN, *DEV], levels=2)
    config = settings(tmp_path, manifest, **over(labels, units={"levels": 2}))
    finetune(config)
    found = load_recognizer(config.out)
    batches = unit_batches(found, str(labels), manifest, BatchConfig())
    loaded = [batches.load(item, batches.rng(item, 0))[0] for item in range(3)]
    with torch.no_grad():
        together = found.model.logits(CTCBatch.untranscribed(*batches.pack(loaded)))
        for row, units in enumerate(loaded):
            alone = found.model.logits(CTCBatch.untranscribed(*batches.pack([units])))[0]
            # other shapes in float32
            torch.testing.assert_close(together[row, : len(units)], alone, rtol=1e-4, atol=1e-5)
    table = found.model.encoder.front_end.embeddings
    summed = found.model.encoder.front_end(torch.from_numpy(loaded[0]), batches.pack(loaded[:1])[1])
    assert torch.equal(summed, torch.stack([table[a] + table[b] for a, b in loaded[0].tolist()]))


def test_a_target_that_fits_the_frames_may_not_fit_the_units(tmp_path: Path, make_corpus: MakeCorpus) -> None:
    texts = ["ab", "aab", "ba"]  # a tone held for two characters is one unit
    manifest = make_corpus(tmp_path, [spell(text) for text in texts], texts=texts)
    labels = tone_labels(tmp_path / "labels", manifest, texts)
    finetune(settings(tmp_path, manifest, **over(labels), out=str(tmp_path / "all")))
    short = over(labels, units={"deduplicate": True})
    with pytest.raises(ValueError, match=r"'u01': 3 symbols need 4 frames, it has 2"):
        finetune(settings(tmp_path, manifest, **short))
    summary = finetune(settings(tmp_path, manifest, **short, bad_transcripts="quarantine"))
    assert (summary["utterances"], summary["quarantined"]) == (2, 1)


@pytest.mark.parametrize("asked", [{"words": True}, {"align": "text"}, {"online": True}])
def test_what_tells_times_is_refused_where_repeats_are_taken_out(
    tmp_path: Path, make_corpus: MakeCorpus, asked: dict[str, Any]
) -> None:
    manifest = make_corpus(tmp_path, [spell("ab")], texts=["ab"])
    labels = tone_labels(tmp_path / "labels", manifest, ["ab"])
    streaming = {"chunk_frames": 8, "look_ahead_frames": 2}
    config = settings(
        tmp_path,
        manifest,
        **over(labels, units={"deduplicate": True}),
        streaming=streaming,
        training={"max_steps": 1},
    )
    finetune(config)
    tree = {
        "out": str(tmp_path / "text"),
        "manifest": str(manifest.folder),
        "split": "",
        "labels": str(labels),
        **asked,
    }
    with pytest.raises(ValueError, match="words, align, online: .* reads units without repeats"):
        transcribe(TranscribeConfig.model_validate({**tree, "recognizer": config.out}))


def test_labels_at_100_hz_are_read_at_50(tmp_path: Path, make_corpus: MakeCorpus) -> None:
    manifest = make_corpus(tmp_path, [spell("ab")], texts=["ab"])
    frames = int(manifest.num_frames[0])
    write_shard(tmp_path / "labels", 0, manifest.ids, [np.arange(2 * frames) % 7])
    commit_labels(tmp_path / "labels", 1, {}, {}, codebook="c", num_classes=7, frame_rate_hz=100)
    batches = LabelBatches(manifest, Labels(tmp_path / "labels"), BatchConfig(), 0)
    assert batches.load(0, batches.rng(0, 0))[0].tolist() == (np.arange(0, 2 * frames, 2) % 7).tolist()


def test_labels_of_other_utterances_or_lengths_are_named(
    tmp_path: Path, make_corpus: MakeCorpus, make_labels: Any
) -> None:
    manifest = make_corpus(tmp_path, [spell("ab"), spell("cd")], texts=["ab", "cd"])
    frames = int(manifest.num_frames[0])
    for counts, message in (
        ({"u00": frames}, "no labels for utterance 'u01'"),
        (
            {"u00": frames, "u01": frames + 5},
            rf"{frames + 5} labels for utterance 'u01', which has {frames} frames",
        ),
        ({"u00": 2 * frames, "u01": 2 * frames}, "look like 100 Hz labels"),
    ):
        labels = make_labels(tmp_path / f"labels{len(message)}", counts)
        with pytest.raises(ValueError, match=message):
            finetune(settings(tmp_path, manifest, **over(labels)))
    with pytest.raises(ValueError, match=r"nowhere: no such labels"):
        finetune(settings(tmp_path, manifest, **over(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"units\.levels = 2, but .* has 1"):
        finetune(
            settings(
                tmp_path,
                manifest,
                **over(tone_labels(tmp_path / "l", manifest, ["ab", "cd"]), units={"levels": 2}),
            )
        )
