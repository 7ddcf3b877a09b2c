"""Units of other tools whose numbers do not fit the recordings they are said to be of."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.data.manifest import write_manifest
from pretrain.data.utterance import num_frames
from units.corpus.corpus_writing import Document
from units.corpus.unit_corpus import UnitCorpus
from units.formats.description import Described
from units.formats.known import FORMATS
from units.formats.writing import write_units
from units.packing import pack
from units.packing_config import PackConfig
from wordless.cli import main

SAMPLES = {"a": 16000, "b": 24000, "c": 40000}  # 49, 74 and 124 frames
LABELS = {name: np.arange(num_frames(samples)) % 7 for name, samples in SAMPLES.items()}
SUFFIX = {
    "km": ".km",
    "textlesslib": ".units",
    "parquet": ".parquet",
    "codec": "",
    "gslm": ".txt",
    "resynthesis": ".txt",
}


def manifest(root: Path, rates: dict[str, int] | None = None) -> str:
    rows = [
        {
            "id": name,
            "path": f"{name}.wav",
            "start": 0,
            "num_samples": count * rate // 16000,
            "sample_rate": rate,
            "split": "train",
        }
        for name, count in SAMPLES.items()
        for rate in [(rates or {}).get(name, 16000)]
    ]
    write_manifest(root / "manifest", rows, {}, {})
    return str(root / "manifest")


def km(root: Path, labels: list[np.ndarray], samples: dict[str, int] = SAMPLES, **keys: Any) -> PackConfig:
    (root / "train.km").write_text("".join(" ".join(map(str, line.tolist())) + "\n" for line in labels))
    (root / "train.tsv").write_text(
        "/audio\n" + "".join(f"{name}.flac\t{count}\n" for name, count in samples.items())
    )
    return PackConfig(
        source=str(root / "train.km"), codebook="theirs", num_units=7, out=str(root / "out"), **keys
    )


@pytest.mark.parametrize("with_manifest", [False, True])
@pytest.mark.parametrize("change", [-1, 0, 1])
def test_a_km_whose_lines_fit_its_tsv_give_or_take_a_frame_is_packed(
    tmp_path: Path, change: int, with_manifest: bool
) -> None:
    labels = [np.arange(len(line) + change) % 7 for line in LABELS.values()]
    pack(km(tmp_path, labels, manifest=manifest(tmp_path) if with_manifest else None))
    assert UnitCorpus(tmp_path / "out").num_frames.tolist() == [49 + change, 74 + change, 124 + change]


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_km_whose_lines_are_in_another_order_is_refused_with_both_numbers(
    tmp_path: Path, with_manifest: bool
) -> None:
    given = {"manifest": manifest(tmp_path)} if with_manifest else {}
    config = km(tmp_path, list(LABELS.values())[::-1], **given)
    where = "manifest" if with_manifest else "train.tsv: line 2"
    with pytest.raises(
        ValueError,
        match=r"train.km: line 1: 124 units for utterance 'a', which has 49 frames at 50 Hz by the 16000 "
        rf"samples \(16 kHz\) in .*{where} "
        r"\(2 of 3 utterances differ\); give the ",
    ):
        pack(config)
    assert not (tmp_path / "out/meta.json").exists() and not (tmp_path / "out/partial").exists()


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_tsv_whose_samples_disagree_with_the_lines_is_refused(tmp_path: Path, with_manifest: bool) -> None:
    """Also where the manifest agrees with the lines: which utterances they are is known from the .tsv
    alone."""
    given = {"manifest": manifest(tmp_path)} if with_manifest else {}
    with pytest.raises(
        ValueError,
        match=r"line 2: 74 units for utterance 'b', which has 77 frames at 50 Hz by the 25000 samples \(16 "
        r"kHz\) in "
        r".*train.tsv: line 3 \(1 of 3 utterances differ\); give the .tsv that .*train.km was made from",
    ):
        pack(km(tmp_path, list(LABELS.values()), {**SAMPLES, "b": 25000}, **given))


@pytest.mark.parametrize("with_manifest", [False, True])
def test_units_of_twice_the_rate_are_refused_and_the_rate_is_named(
    tmp_path: Path, with_manifest: bool
) -> None:
    given = {"manifest": manifest(tmp_path)} if with_manifest else {}
    labels = [np.arange((count - 400) // 160 + 1) % 7 for count in SAMPLES.values()]  # Kaldi's, of 10 ms
    message = (
        r"line 1: 98 units for utterance 'a', which has 49 frames .*\(3 of 3 .*they look like 100 Hz units; "
        r"say frame_rate_hz = 100"
    )
    with pytest.raises(ValueError, match=message):
        pack(km(tmp_path, labels, **given))
    pack(km(tmp_path, labels, frame_rate_hz=100.0, **given))
    assert UnitCorpus(tmp_path / "out").frame_rate_hz == 100
    with pytest.raises(
        ValueError,
        match=r"49 units for utterance 'a', which has 98 frames at 100 Hz .* look like 50 Hz units",
    ):
        pack(
            km(tmp_path, list(LABELS.values()), frame_rate_hz=100.0, **given).model_copy(
                update={"out": str(tmp_path / "half")}
            )
        )


def test_a_tsv_may_count_samples_at_the_recordings_own_rate_where_the_manifest_knows_it(
    tmp_path: Path,
) -> None:
    samples = {"a": 8000, "b": 36000, "c": 40000}
    with pytest.raises(ValueError, match=r"line 1: 49 units for utterance 'a', which has 24 frames"):
        pack(km(tmp_path, list(LABELS.values()), samples))
    everything_at_8_khz = {name: count // 2 for name, count in SAMPLES.items()}
    with pytest.raises(
        ValueError, match="samples at another rate than 16 kHz are understood with the `manifest`"
    ):
        pack(km(tmp_path, list(LABELS.values()), everything_at_8_khz))
    pack(km(tmp_path, list(LABELS.values()), samples, manifest=manifest(tmp_path, {"a": 8000, "b": 24000})))


def test_a_recording_over_100_s_may_lack_a_frame_for_each_piece_that_fairseq_cuts(tmp_path: Path) -> None:
    samples = 250 * 16000
    pack(km(tmp_path, [np.zeros(num_frames(samples) - 2, int)], {"a": samples}))
    # its first piece alone
    with pytest.raises(ValueError, match=r"4999 units for utterance 'a', which has 12499 frames"):
        pack(
            km(tmp_path, [np.zeros(4999, int)], {"a": samples}).model_copy(
                update={"out": str(tmp_path / "cut")}
            )
        )


def documents(form: str, change: int) -> list[Document]:
    """Units of runs of two frames, of the utterances' lengths and `change` frames more; of codecs in two
    levels."""
    found = []
    for name, labels in LABELS.items():
        durations = np.full(len(labels) // 2, 2)
        durations[0] += len(labels) % 2 + change
        units = np.arange(len(durations)) % 7
        found.append(
            Document(name, None, np.stack([units, units], 1) if form == "codec" else units, durations)
        )
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("change", [0, 60])
def test_units_with_known_durations_fit_the_manifest_in_every_format(
    tmp_path: Path, form: str, change: int
) -> None:
    path = tmp_path / f"units{SUFFIX.get(form, '.jsonl')}"
    known = Described(
        codebook="c0de", num_units=7, num_levels=1 + (form == "codec"), deduplicated=True, timed=True
    )
    write_units(path, form, documents(form, change), known)
    config = PackConfig(
        source=str(path), manifest=manifest(tmp_path), out=str(tmp_path / "out"), levels="all"
    )
    if change:
        with pytest.raises(
            ValueError,
            match=r"units.*: .*for utterance 'a', which has 49 frames at 50 Hz by the 16000 samples \(16 "
            rf"kHz\) in {config.manifest}",
        ) as error:
            pack(config)
        assert "109" in str(error.value)  # 49 + 60, of units or of frames that they last
    else:
        pack(config)
        assert UnitCorpus(tmp_path / "out").num_frames.tolist() == [49, 74, 124]


def write_untimed(root: Path, form: str, units: dict[str, list[int]]) -> Path:
    path = root / f"units{SUFFIX.get(form, '.jsonl')}"
    spaced = {name: " ".join(map(str, row)) for name, row in units.items()}
    if form == "parquet":
        pq.write_table(pa.table({"id": list(units), "units": list(units.values())}), path)
    elif form == "slamkit-tokens":
        rows = [
            {"file_name": f"{name}.wav", "audio_repr": "".join(f"<Un{unit}>" for unit in row)}
            for name, row in units.items()
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(
            "".join(f"{name}{'|' if form == 'gslm' else chr(9)}{row}\n" for name, row in spaced.items())
        )
    return path


@pytest.mark.parametrize("form", ["gslm", "textlesslib", "slamkit-tokens", "parquet"])
def test_units_without_durations_are_not_more_than_the_frames(tmp_path: Path, form: str) -> None:
    given: dict[str, Any] = {
        "manifest": manifest(tmp_path),
        "codebook": "theirs",
        "num_units": 7,
        "format": form,
    }
    source = write_untimed(tmp_path, form, {"a": [0, 1] * 20, "b": [3]})
    pack(PackConfig(source=str(source), out=str(tmp_path / "fewer"), **given))
    # too few where a unit is a frame
    with pytest.raises(ValueError, match=r"40 units for utterance 'a', which has 49 frames"):
        pack(
            PackConfig(
                source=str(source), out=str(tmp_path / "frames"), source_options={"per_frame": True}, **given
            )
        )
    source = write_untimed(tmp_path, form, {"b": [3], "a": [0, 1] * 26})
    with pytest.raises(
        ValueError,
        match=r"52 units for utterance 'a', which has 49 frames at 50 Hz .*\(1 of 2 .*or their frame_rate_hz",
    ):
        pack(PackConfig(source=str(source), out=str(tmp_path / "more"), **given))


def test_units_of_speech_resynthesis_fit_the_durations_beside_them(tmp_path: Path) -> None:
    given: dict[str, Any] = {"source": str(tmp_path / "val.txt"), "codebook": "theirs", "num_units": 7}

    def write(units: int) -> None:
        row = {"audio": "x/a.wav", "hubert": " ".join(["1"] * units), "duration": 2.0}
        (tmp_path / "val.txt").write_text(f"{row!r}\n")

    write(99)
    pack(PackConfig(**given, out=str(tmp_path / "whole")))
    write(60)
    with pytest.raises(
        ValueError,
        match=r"val.txt: line 1: 60 units for utterance 'x/a', which has 99 frames at 50 Hz by the 32000 "
        r"samples \(16 kHz\) in "
        r".*val.txt: line 1: 'duration' .* differ\); its units or its length are of another recording",
    ):
        pack(PackConfig(**given, out=str(tmp_path / "cut")))


def test_a_rate_that_the_file_states_is_corrected_there(tmp_path: Path) -> None:
    known = Described(codebook="c0de", num_units=7, frame_rate_hz=25.0, deduplicated=True, timed=True)
    write_units(tmp_path / "units.txt", "gslm", documents("gslm", 0), known)
    with pytest.raises(
        ValueError, match=r"look like 50 Hz units; correct .*units.txt.meta.json: frame_rate_hz = 50"
    ):
        pack(
            PackConfig(
                source=str(tmp_path / "units.txt"), manifest=manifest(tmp_path), out=str(tmp_path / "out")
            )
        )


def test_a_wrong_length_is_exit_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = km(tmp_path, list(LABELS.values())[::-1])
    (tmp_path / "pack.toml").write_text(
        f'source = "{config.source}"\ncodebook = "theirs"\nnum_units = 7\nout = "{config.out}"\n'
    )
    assert main(["pack", str(tmp_path / "pack.toml")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"wordless: .*train.km: line 1: 124 units for utterance 'a', which has 49 frames", told)
