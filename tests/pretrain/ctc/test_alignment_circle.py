"""A recogniser of phones gives an unlabelled-in-time corpus its phone times: transcribe -> index ->
measure."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pretrain.ctc.model import CTCBatch, Recognizer
from pretrain.ctc.text import TextConfig
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import transcribe
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.label_shards import write_shard
from pretrain.data.labels import commit_labels
from pretrain.data.manifest import Manifest, write_manifest
from pretrain.data.packing import pack
from pretrain.data.utterance import Phone, phone_frames
from pretrain.model.config import EncoderConfig
from pretrain.training.checkpoint import save_checkpoint
from quantize.measuring import MeasureConfig, measure

pytestmark = pytest.mark.slow  # `make test` is to stay short

HERTZ = {"ð": 300.0, "oʊ": 700.0, "tʃ": 1500.0}
VOCABULARY = Vocabulary(list(HERTZ), "phones")


def say(rng: np.random.Generator) -> tuple[np.ndarray, list[Phone]]:
    """Six phones, no two alike beside each other, each a tone of 0.1 to 0.25 s; now and then a pause."""
    waves, phones, at, last = [], [], 0, ""
    for _ in range(6):
        name = str(rng.choice([name for name in HERTZ if name != last]))
        length, pause = int(rng.integers(1600, 4000)), int(rng.integers(3200)) * int(rng.random() < 0.3)
        waves += [0.2 * np.sin(2 * np.pi * HERTZ[name] * np.arange(length) / 16000), np.zeros(pause)]
        phones.append(Phone(at / 16000, (at + length) / 16000, name))
        at, last = at + length + pause, name
    return np.concatenate(waves).astype(np.float32), phones


@pytest.fixture
def recognizer(tmp_path: Path) -> Path:
    """Taught by eight utterances, in a second or two."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    spoken = [say(rng) for _ in range(8)]
    encoder = EncoderConfig(architecture="tiny", dropout=0.0, input_dropout=0.0)
    model = Recognizer(encoder, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    targets = torch.stack(
        [torch.from_numpy(VOCABULARY.encode(" ".join(p.phone for p in phones))) for _, phones in spoken]
    )
    waves, layout = pack([wave + 0.002 * rng.standard_normal(len(wave), np.float32) for wave, _ in spoken])
    for _ in range(60):
        loss = model(CTCBatch(waves, layout, targets, (6,) * 8))
        optimizer.zero_grad()
        loss.total.div(48).backward()
        optimizer.step()
    assert loss.total.detach() / 48 < 0.2  # it has learned them
    config = {"text": TextConfig(spelling="phones").resolved()}
    extra = {
        "vocabulary": VOCABULARY.to_meta(),
        "config_encoder": encoder.resolved(),
        "codebook": None,
        "label_minutes": 1.0,
    }
    save_checkpoint(
        tmp_path / "recognizer",
        60,
        model,
        optimizer,
        {"kind": "recognizer", "config": config, "parents": {}, "extra": extra},
    )
    return tmp_path / "recognizer"


def test_times_from_a_recogniser_become_the_phones_that_measure_counts(
    tmp_path: Path, recognizer: Path
) -> None:
    rng, rows = np.random.default_rng(1), []
    (tmp_path / "audio").mkdir()
    for number in range(6):
        wave, phones = say(rng)
        path = tmp_path / "audio" / f"u{number}.wav"
        soundfile.write(path, wave, 16000, subtype="FLOAT")
        rows.append(
            {
                "id": path.stem,
                "path": str(path),
                "start": 0,
                "num_samples": len(wave),
                "sample_rate": 16000,
                "split": "train",
                "phones": phones,
            }
        )
    write_manifest(tmp_path / "truth", rows, {}, {})
    transcribe(
        TranscribeConfig(
            out=str(tmp_path / "text"),
            manifest=str(tmp_path / "truth"),
            split="train",
            recognizer=str(recognizer),
            align="text",
            device="cpu",
        )
    )
    index(
        IndexConfig(
            source=str(tmp_path / "audio"),
            out=str(tmp_path / "manifest"),
            alignments=str(tmp_path / "text" / "alignments.jsonl"),
            dev_share=0,
            test_share=0,
        )
    )
    truth, aligned = Manifest(tmp_path / "truth"), Manifest(tmp_path / "manifest")
    inside, agree = [], []
    for true, found in zip(truth, aligned, strict=True):
        assert true.id == found.id and true.phones is not None and found.phones is not None
        assert [phone.phone for phone in found.phones] == [phone.phone for phone in true.phones]
        inside += [
            t.start <= (f.start + f.end) / 2 < t.end for t, f in zip(true.phones, found.phones, strict=True)
        ]
        agree += (
            phone_frames(true.phones, true.num_frames) == phone_frames(found.phones, true.num_frames)
        ).tolist()
    # CTC places a symbol somewhere in its tone of 5 to 12 frames, or a frame beside it, and each reaches 3
    # frames further; a phone of the three or a pause drawn at random would agree in a third of the frames.
    assert np.mean(inside) > 0.8 and np.mean(agree) > 0.5

    counts = {row.id: row.num_frames for row in aligned}
    write_shard(tmp_path / "labels", 0, list(counts), [np.arange(count) % 5 for count in counts.values()])
    commit_labels(tmp_path / "labels", 1, {}, {}, codebook="c0de", num_classes=5)
    summary = measure(
        MeasureConfig(
            manifest=str(aligned.folder),
            labels=str(tmp_path / "labels"),
            out=str(tmp_path / "measured"),
            abx=False,
            probes=False,
        )
    )
    assert summary["frames_with_phones"] == sum(counts.values())
    assert set(json.loads((tmp_path / "measured" / "phones.json").read_text())) - {""} == set(HERTZ)
