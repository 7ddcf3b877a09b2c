"""What pretraining is worth on real speech: `recipes/fsdd.toml` with each of four speakers held out in turn,
and all of them together.

RECORDINGS is the folder of the Free Spoken Digit Dataset, files `{digit}_{speaker}_{index}.wav`. Each fold is
a run of the recipe in `--runs`; what stands there is not repeated. Pooled, every recording of every speaker
is transcribed once by a recogniser that never heard its speaker. Settings were chosen with lucas and nicolas
held out, so `untouched` is the pool of the others.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import machine
from pretrain.ctc.curve import as_text, summarize, write_curve
from pretrain.store.artefact import read_meta
from pretrain.store.disk import write_json

WORDS = "zero one two three four five six seven eight nine".split()
CHOSEN_WITH = {"lucas", "nicolas"}
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "fsdd.toml"


def write_fold(recordings: Path, held_out: str, path: Path) -> None:
    """The source of `index`: JSON lines, the test split the speaker `held_out`."""
    lines = []
    for recording in sorted(recordings.glob("*.wav")):
        digit, speaker, _ = recording.stem.split("_")
        split = "test" if speaker == held_out else "train"
        line = {
            "audio_filepath": str(recording.resolve()),
            "id": recording.stem,
            "text": WORDS[int(digit)],
            "speaker": speaker,
            "split": split,
        }
        lines.append(json.dumps(line) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def pool(folds: Sequence[Path], out: Path) -> dict[str, Any]:
    """The transcripts of several folds as those of one test, in `out`: its `curve` and `comparisons`
    (pretrain.ctc.curve)."""
    cells = {
        (row["budget"], row["system"], row["seed"]): row
        for row in pq.read_table(folds[0] / "transfer.parquet").to_pylist()
    }
    pooled = []
    for (budget, system, seed), row in cells.items():
        tables = [
            pq.read_table(
                fold / row["transcripts"] / "transcripts.parquet", columns=["id", "text", "hypothesis"]
            )
            for fold in folds
        ]
        folder = out / row["transcripts"]
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), folder / "transcripts.parquet")
        same = [_cell(fold, budget, system, seed) for fold in folds]
        totals = {
            key: sum(cell[key] for cell in same)
            for key in ("substitutions", "insertions", "deletions", "reference_words")
        }
        edits = totals["substitutions"] + totals["insertions"] + totals["deletions"]
        minutes = sum(cell["label_minutes"] for cell in same) / len(same)
        # Everybody says each digit equally often, so the characters of every fold are as many.
        cer = sum(cell["cer"] for cell in same) / len(same)
        pooled.append(
            {
                **row,
                **totals,
                "wer": edits / totals["reference_words"],
                "cer": cer,
                "label_minutes": minutes,
                "test": "held-out speakers",
            }
        )
    return summarize(pooled, out, "scratch")


def _cell(fold: Path, budget: str, system: str, seed: int) -> dict[str, Any]:
    wanted = (budget, system, seed)
    rows: list[dict[str, Any]] = pq.read_table(fold / "transfer.parquet").to_pylist()
    return next(row for row in rows if (row["budget"], row["system"], row["seed"]) == wanted)


def main(given: list[str] | None = None) -> int:
    """Run the folds that do not stand, then show, draw and keep the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/folds"))
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="keep the numbers there as DATE-fsdd.json, and the curve as fsdd.svg",
    )
    arguments = parser.parse_args(given)
    speakers = sorted({path.stem.split("_")[1] for path in arguments.recordings.glob("*_*_*.wav")})
    if len(speakers) < 2:
        parser.error(
            f"{arguments.recordings}: no recordings named digit_speaker_index.wav of two or more speakers"
        )
    for speaker in speakers:
        source, run = arguments.runs / f"{speaker}.jsonl", arguments.runs / speaker
        if not (run / "transfer" / "meta.json").is_file():
            write_fold(arguments.recordings, speaker, source)
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "wordless",
                    "run",
                    str(RECIPE),
                    f"run={run}",
                    f"manifest.source={source}",
                ],
                check=True,
            )
    folds = {speaker: arguments.runs / speaker / "transfer" for speaker in speakers}
    found = {speaker: json.loads((fold / "summary.json").read_text()) for speaker, fold in folds.items()}
    for name, chosen in (("untouched", set(speakers) - CHOSEN_WITH), ("all", set(speakers))):
        if len(chosen) > 1:
            found[name] = pool(
                [folds[speaker] for speaker in sorted(chosen)], arguments.runs / f"pooled_{name}"
            )
    for name, summary in found.items():
        print(f"{name}\n{as_text(summary)}\n")
    write_curve(arguments.runs, found["all"]["curve"])
    if arguments.out is not None:
        kept = {
            name: {key: summary[key] for key in ("curve", "comparisons")} for name, summary in found.items()
        }
        fingerprints = {speaker: read_meta(fold)["fingerprint"] for speaker, fold in folds.items()}
        result = {
            "name": "fsdd",
            "date": date.today().isoformat(),
            "machine": machine(),
            "folds": fingerprints,
            **kept,
        }
        write_json(arguments.out / f"{date.today().isoformat()}-fsdd.json", result)
        (arguments.out / "fsdd.svg").write_bytes((arguments.runs / "transfer.svg").read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
