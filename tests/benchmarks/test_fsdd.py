import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.fsdd import pool, write_fold

# Per fold and system: utterance -> (reference, hypothesis).
SAID = {
    "ann": {
        "pretrained": {"0_ann_0": ("zero", "zero"), "1_ann_0": ("one", "on")},
        "scratch": {"0_ann_0": ("zero", "zoo"), "1_ann_0": ("one", "on")},
    },
    "bob": {
        "pretrained": {"0_bob_0": ("zero", "zero"), "1_bob_0": ("one", "one")},
        "scratch": {"0_bob_0": ("zero", "ze ro"), "1_bob_0": ("one", "one")},
    },
}
EDITS = {
    ("ann", "pretrained"): (1, 0),
    ("ann", "scratch"): (2, 0),
    ("bob", "pretrained"): (0, 0),
    ("bob", "scratch"): (1, 1),
}


def write_transfer(folder: Path, speaker: str) -> Path:
    rows = []
    for system, said in SAID[speaker].items():
        transcripts = folder / f"1min_{system}_seed0" / "test"
        transcripts.mkdir(parents=True)
        table = {
            "id": [*said],
            "text": [text for text, _ in said.values()],
            "hypothesis": [heard for _, heard in said.values()],
        }
        pq.write_table(pa.table(table), transcripts / "transcripts.parquet")
        substitutions, insertions = EDITS[speaker, system]
        rows.append(
            {
                "budget": "1min",
                "system": system,
                "seed": 0,
                "test": "test",
                "counted": "words",
                "label_minutes": 1.0,
                "reference_words": 2,
                "wer": (substitutions + insertions) / 2,
                "cer": 0.25,
                "substitutions": substitutions,
                "insertions": insertions,
                "deletions": 0,
                "transcripts": f"1min_{system}_seed0/test",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "transfer.parquet")
    return folder


def test_pooled_folds_count_the_words_of_all_and_pair_the_systems_by_utterance(tmp_path: Path) -> None:
    folds = [write_transfer(tmp_path / speaker, speaker) for speaker in SAID]
    summary = pool(folds, tmp_path / "pooled")
    wer = {point["system"]: point["wer"] for point in summary["curve"]}
    assert wer == {"pretrained": 1 / 4, "scratch": 4 / 4}
    (comparison,) = summary["comparisons"]
    assert comparison["wer_difference"] == pytest.approx(-3 / 4)
    # Utterances with a difference: one of 1 and one of 2, so 2 of the 4 ways to turn them round are as far
    # from 0.
    assert comparison["p_value"] == pytest.approx(2 / 4)


def test_a_fold_tests_on_one_speaker_and_trains_on_the_others(tmp_path: Path) -> None:
    for name in ("3_ann_0", "3_bob_12", "7_cid_1"):
        (tmp_path / f"{name}.wav").touch()
    write_fold(tmp_path, "bob", tmp_path / "bob.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "bob.jsonl").read_text().splitlines()]
    assert [(line["speaker"], line["split"], line["text"]) for line in lines] == [
        ("ann", "train", "three"),
        ("bob", "test", "three"),
        ("cid", "train", "seven"),
    ]
