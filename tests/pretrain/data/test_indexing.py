import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import parse_config
from pretrain.data.audio import load_audio
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import Phone, Word
from pretrain.store.artefact import read_meta
from wordless.cli import main


def record(path: Path, num_samples: int = 4000, rate: int = 16000, value: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(num_samples).uniform(-0.5, 0.5, num_samples).astype(np.float32)
    if value is not None:
        wave[-1] = value
    soundfile.write(path, wave, rate, subtype="FLOAT" if value is not None else None)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path, **keys: Any) -> tuple[dict[str, Any], Manifest]:
    out = source.parent / "manifest"
    summary = index(
        IndexConfig(source=str(source), out=str(out), **({"dev_share": 0.0, "test_share": 0.0} | keys))
    )
    return summary, Manifest(out)


# Sources


def test_a_folder_is_searched_for_every_format(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name in ("b/x.wav", "a/y.FLAC", "a/deep/z.ogg", "w.mp3"):
        record(corpus / name)
    record(corpus / ".hidden/n.wav")
    record(corpus / "a/._y.wav")
    (corpus / "notes.txt").write_text("not audio")
    summary, manifest = run(corpus)
    assert manifest.ids == ["w", "a/y", "a/deep/z", "b/x"]
    assert (
        summary["found"] == summary["utterances"] == 4 and summary["quarantined"] == summary["speakers"] == 0
    )
    assert (
        summary["hours"] == pytest.approx(1 / 3600) and not summary["has_text"] and not summary["has_phones"]
    )
    assert summary["splits"] == {"train": {"utterances": 4, "hours": pytest.approx(1 / 3600), "speakers": 0}}
    assert all(len(load_audio(utterance)) == 4000 for utterance in manifest)


def test_librispeech_transcripts_and_speakers_are_picked_up(tmp_path: Path) -> None:
    chapter = tmp_path / "LibriSpeech/84/121123"
    for number in range(2):
        record(chapter / f"84-121123-000{number}.flac")
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT\n")
    _, manifest = run(tmp_path / "LibriSpeech")
    assert [(u.id, u.text, u.speaker) for u in manifest] == [
        ("84/121123/84-121123-0000", "GO DO YOU HEAR", "84"),
        ("84/121123/84-121123-0001", "BUT", "84"),
    ]


def test_a_text_beside_a_recording_is_its_transcript(tmp_path: Path) -> None:
    record(tmp_path / "c/x.wav").with_suffix(".txt").write_text("one\ntwo\n")
    record(tmp_path / "c/y.wav")
    assert [u.text for u in run(tmp_path / "c")[1]] == ["one two", None]


def test_a_fairseq_list_and_its_words(tmp_path: Path) -> None:
    record(tmp_path / "audio/s/x.wav")
    record(tmp_path / "audio/s/y.wav", 8000, 8000)
    source = tmp_path / "train.tsv"
    source.write_text(f"{tmp_path / 'audio'}\ns/x.wav\t4000\ns/y.wav\t8000\n")
    source.with_suffix(".wrd").write_text("ONE\nTWO\n")
    _, manifest = run(source)
    assert [(u.id, u.text, u.num_samples, u.length) for u in manifest] == [
        ("s/x", "ONE", 4000, 4000),
        ("s/y", "TWO", 8000, 16000),
    ]


def test_a_fairseq_list_that_claims_more_than_there_is(tmp_path: Path) -> None:
    record(tmp_path / "x.wav")
    record(tmp_path / "y.wav")
    (tmp_path / "l.tsv").write_text(f"{tmp_path}\nx.wav\t5000\ny.wav\t3000\n")
    summary, manifest = run(tmp_path / "l.tsv", max_bad_share=0.5)
    assert summary["quarantined"] == 1 and [(u.id, u.num_samples) for u in manifest] == [("y", 4000)]
    assert "truncated: 4000 of 5000" in (manifest.folder / "quarantine.jsonl").read_text()


def test_a_fairseq_list_with_a_bad_row_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "l.tsv").write_text("/audio\nx.wav\t5000\ny.wav 3000\n")
    with pytest.raises(ValueError, match=r"l.tsv line 3: expected path<TAB>samples, got 'y.wav 3000'"):
        run(tmp_path / "l.tsv")
    (tmp_path / "l.tsv").write_text("/audio\nx.wav\t5000\n")
    (tmp_path / "l.wrd").write_text("ONE\nTWO\n")
    with pytest.raises(ValueError, match=r"l.wrd: 2 transcripts for the 1 rows of l.tsv"):
        run(tmp_path / "l.tsv")


def test_json_lines_give_everything_that_is_known(tmp_path: Path) -> None:
    record(tmp_path / "audio/x.wav", 16000)
    elsewhere = record(tmp_path / "audio/y.wav", 16000)
    phones = [[0.2, 0.3, "b"], [0.0, 0.2, "a"]]
    words = [
        [0.3, 0.4, ""],
        [0.1, 0.3, " one "],
        [0.3, 0.3, "two"],
    ]  # a pause has no name, and a word may be very short
    rows: list[dict[str, Any]] = [
        {
            "audio_filepath": "audio/x.wav",
            "text": "one",
            "speaker": 7,
            "split": "dev",
            "phones": phones,
            "words": words,
            "lang": "en",
        },
        {"audio_filepath": str(elsewhere), "id": "why", "offset": 0.25, "duration": 0.5, "split": "test"},
    ]
    summary, manifest = run(write_lines(tmp_path / "list.json", rows))
    first, second = manifest
    assert (first.id, first.text, first.speaker, first.split) == ("audio/x", "one", "7", "dev")
    assert first.phones == [Phone(0.0, 0.2, "a"), Phone(0.2, 0.3, "b")]
    assert first.words == [Word(0.1, 0.3, "one"), Word(0.3, 0.3, "two")] and second.words is None
    assert (second.id, second.start, second.num_samples, second.split) == ("why", 4000, 8000, "test")
    assert (
        summary["has_text"]
        and summary["has_phones"]
        and summary["has_words"]
        and set(summary["splits"]) == {"dev", "test"}
    )


def test_segments_of_one_file_get_ids_of_their_own(tmp_path: Path) -> None:
    record(tmp_path / "x.wav", 16000)
    rows = [{"audio_filepath": "x.wav", "offset": offset, "duration": 0.25} for offset in (0, 0.25, 0.5)]
    manifest = run(write_lines(tmp_path / "l.jsonl", rows))[1]
    assert manifest.ids == ["x-0.000", "x-0.250", "x-0.500"] and [u.start for u in manifest] == [
        0,
        4000,
        8000,
    ]


def test_several_sources_make_one_index_whose_ids_stay_apart(tmp_path: Path) -> None:
    """One folder, a list over several roots and a glob of lists; equal names in different corpora."""
    record(tmp_path / "libri/x.wav")
    record(tmp_path / "elsewhere/vox/x.wav", 5000)
    write_lines(tmp_path / "lists/vox.jsonl", [{"audio_filepath": str(tmp_path / "elsewhere/vox/x.wav")}])
    for number in range(2):
        record(tmp_path / f"parts/{number}/x.wav", 6000 + number)
        (tmp_path / f"parts/{number}.tsv").write_text(f"{tmp_path}/parts/{number}\nx.wav\t{6000 + number}\n")
    sources = [str(tmp_path / name) for name in ("libri", "lists/vox.jsonl", "parts/*.tsv")]
    index(IndexConfig(source=sources, out=str(tmp_path / "m"), dev_share=0.0, test_share=0.0))
    manifest = Manifest(tmp_path / "m")
    assert manifest.ids == ["libri/x", "vox/x", "0/x", "1/x"] and manifest.root == str(tmp_path)
    assert [len(load_audio(utterance)) for utterance in manifest] == [4000, 5000, 6000, 6001]


def test_indexing_a_corpus_again_elsewhere_gives_the_same_fingerprint(tmp_path: Path) -> None:
    fingerprints = set()
    for place in ("a", "b/c"):
        record(tmp_path / place / "corpus/s/x.wav")
        record(tmp_path / place / "corpus/y.wav", 0)
        record(tmp_path / place / "corpus/z.wav")
        manifest = run(tmp_path / place / "corpus", max_bad_share=0.5)[1]
        fingerprints.add(manifest.fingerprint)
        assert [u.path for u in manifest] == [
            str(tmp_path / place / "corpus" / name) for name in ("z.wav", "s/x.wav")
        ]
    assert len(fingerprints) == 1
    (tmp_path / "a/corpus").rename(tmp_path / "moved")
    meta = tmp_path / "a/manifest/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"root": str(tmp_path / "moved")}))
    assert all(len(load_audio(utterance)) == 4000 for utterance in Manifest(tmp_path / "a/manifest"))


def test_versions_of_a_corpus_stay_apart(tmp_path: Path) -> None:
    for version in ("cv-1.0", "cv-1.1"):
        record(tmp_path / version / "x.wav")
    folders = [str(tmp_path / version) for version in ("cv-1.0", "cv-1.1")]
    for name, source in (("list", folders), ("glob", str(tmp_path / "cv-*"))):
        index(IndexConfig(source=source, out=str(tmp_path / name), dev_share=0.0, test_share=0.0))
        assert Manifest(tmp_path / name).ids == ["cv-1.0/x", "cv-1.1/x"]
    record(tmp_path / "other/cv-1.0/x.wav")
    with pytest.raises(
        ValueError,
        match=r"id 'cv-1.0/x' names both .*; ids must differ. Give `id` in JSON lines, rename a source",
    ):
        index(IndexConfig(source=[folders[0], str(tmp_path / "other/cv-1.0")], out=str(tmp_path / "m")))


def test_the_quarantine_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "c/x.wav")
    (tmp_path / "c/bad.wav").touch()
    monkeypatch.chdir(tmp_path)
    index(IndexConfig(source="c", out="m", dev_share=0.0, test_share=0.0, max_bad_share=0.5))
    assert json.loads(Path("m/quarantine.jsonl").read_text())["path"] == str(tmp_path / "c/bad.wav")


def test_ids_of_recordings_elsewhere_start_where_they_share_a_folder(tmp_path: Path) -> None:
    rows = [{"audio_filepath": str(record(tmp_path / f"data/{name}.wav"))} for name in ("a/x", "b/x")]
    (tmp_path / "lists").mkdir()
    assert run(write_lines(tmp_path / "lists/l.jsonl", rows))[1].ids == ["a/x", "b/x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"audio_filepth": "x.wav", "text": "a"}',
            r"l.jsonl line 2: no 'audio_filepath'; did you mean it by 'audio_filepth'\?",
        ),
        ('{"wav": "x.wav"}', r"line 2: no 'audio_filepath'; it has wav"),
        ("{}", r"line 2: no 'audio_filepath'; it has no keys"),
        ('{"audio_filepath": 3.5, "offset": "x"}', r"line 2: offset: .*number.*'x'"),
        ('{"audio_filepath": "x.wav", "offset": -1}', r"line 2: offset: .*greater than or equal to 0"),
        ('{"audio_filepath": "x.wav", "duration": 0}', r"line 2: duration: .*greater than 0"),
        ('{"audio_filepath": "x.wav", "duration": NaN}', r"line 2: duration: .*finite"),
        ('{"audio_filepath": "x.wav", "phones": [[0, 1]]}', r"line 2: phones.0.2: "),
        (
            '{"audio_filepath": "x.wav", "phones": [[0, 1, "a"], [0.5, 2, "b"]]}',
            r"line 2: phone 'a' at 0.0 s .*overlaps",
        ),
        (
            '{"audio_filepath": "x.wav", "phones": [[1, 0.5, "a"]]}',
            r"line 2: phone 'a' at 1.0 s ends before it starts",
        ),
        (
            '{"audio_filepath": "x.wav", "words": [[0, 1, "a"], [0.5, 2, "b"]]}',
            r"line 2: word 'a' at 0.0 s .*overlaps",
        ),
        (
            '{"audio_filepath": "x.wav", "words": [[-1, 0.5, "a"]]}',
            r"line 2: words.0.0: .*greater than or equal to 0",
        ),
        (
            '{"audio_filepath": "x.wav", "words": [[0, 0.5, "New York"]]}',
            r"line 2: word 'New York' at 0.0 s is several words",
        ),
        ('{"audio_filepath": "x.wav",', r"line 2: .*JSON"),
        ('["x.wav"]', r"line 2: .*"),
    ],
)
def test_a_mistake_in_json_lines_names_its_line_and_key(tmp_path: Path, line: str, message: str) -> None:
    record(tmp_path / "ok.wav")
    (tmp_path / "l.jsonl").write_text('{"audio_filepath": "ok.wav"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "l.jsonl")


def test_a_source_must_exist_and_hold_audio(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder or file"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty", "empty.tsv", "empty.jsonl"):
        with pytest.raises(ValueError, match=f"{name}: no audio found"):
            run(tmp_path / name)
    (tmp_path / "list.csv").touch()
    with pytest.raises(
        ValueError, match=r"list.csv: a source is a folder, a .tar, a .tsv, JSON lines .* or a glob"
    ):
        run(tmp_path / "list.csv")


def test_duplicate_ids_are_an_error_that_names_both(tmp_path: Path) -> None:
    record(tmp_path / "c/x.wav")
    record(tmp_path / "c/x.flac")
    rows = [
        {"audio_filepath": "c/x.wav", "id": "u"},
        {"audio_filepath": "c/x.flac"},
        {"audio_filepath": "c/x.flac", "id": "u"},
    ]
    with pytest.raises(ValueError, match=r"id 'u' names both .*l.jsonl line 1 and .*l.jsonl line 3"):
        run(write_lines(tmp_path / "l.jsonl", rows))


# Speakers and alignments


def test_speakers_come_from_a_pattern_over_the_path(tmp_path: Path) -> None:
    for name in ("0_ann_1.wav", "0_bob_1.wav", "1_ann_1.wav"):
        record(tmp_path / "c" / name)
    assert [u.speaker for u in run(tmp_path / "c", speaker_pattern=r"\d_([a-z]+)_")[1]] == [
        "ann",
        "bob",
        "ann",
    ]


def test_a_speaker_pattern_must_fit(tmp_path: Path) -> None:
    record(tmp_path / "c/x.wav")
    with pytest.raises(ValueError, match=r"speaker_pattern '\(\[0-9\]\)' names no speaker in 'x.wav'"):
        run(tmp_path / "c", speaker_pattern="([0-9])")
    for pattern, problem in (("[a-z]+", "has no group"), ("(a", "not a regular expression")):
        with pytest.raises(ValueError, match=f"conf.toml: speaker_pattern: .*{problem}"):
            parse_config(IndexConfig, {"source": "s", "out": "o", "speaker_pattern": pattern}, "conf.toml")


def test_alignments_are_joined_by_id(tmp_path: Path) -> None:
    for name in "xy":
        record(tmp_path / f"c/{name}.wav")
    rows: list[dict[str, Any]] = [
        {"id": "y", "phones": [[0, 0.1, "a"]]},
        {"id": "of another corpus", "phones": []},
    ]
    alignments = write_lines(tmp_path / "phones.jsonl", rows)
    manifest = run(tmp_path / "c", alignments=str(alignments))[1]
    assert [u.phones for u in manifest] == [None, [Phone(0, 0.1, "a")]] and not manifest.has_words
    write_lines(alignments, rows[1:])
    with pytest.raises(
        ValueError, match=r"phones.jsonl: none of its 1 ids is among the utterances, such as 'x'"
    ):
        index(IndexConfig(source=str(tmp_path / "c"), out=str(tmp_path / "m2"), alignments=str(alignments)))


def test_alignments_may_be_of_words_and_leave_the_phones_as_they_were(tmp_path: Path) -> None:
    record(tmp_path / "x.wav")
    source = write_lines(tmp_path / "l.jsonl", [{"audio_filepath": "x.wav", "phones": [[0, 0.1, "a"]]}])
    alignments = write_lines(tmp_path / "words.jsonl", [{"id": "x", "words": [[0, 0.2, "ah"]]}])
    (utterance,) = run(source, alignments=str(alignments))[1]
    assert utterance.words == [Word(0, 0.2, "ah")] and utterance.phones == [Phone(0, 0.1, "a")]
    write_lines(alignments, [{"id": "x", "word": [[0, 0.2, "ah"]]}])
    with pytest.raises(ValueError, match=r"words.jsonl line 1: neither 'phones' nor 'words' of 'x'"):
        index(IndexConfig(source=str(source), out=str(tmp_path / "m2"), alignments=str(alignments)))


def test_librispeech_alignments_give_word_times(tmp_path: Path) -> None:
    chapter = tmp_path / "LibriSpeech/84/121123"
    for number in range(2):
        record(chapter / f"84-121123-000{number}.flac", 16000)
    alignments = chapter / "84-121123.alignment.txt"
    alignments.write_text(
        '84-121123-0000 ",GO,DO,,YOU," "0.1,0.3,0.45,0.5,0.9,1.0"\n84-121123-0001 "" "1.0"\n'
    )
    assert [u.words for u in run(tmp_path / "LibriSpeech")[1]] == [
        [Word(0.1, 0.3, "GO"), Word(0.3, 0.45, "DO"), Word(0.5, 0.9, "YOU")],
        [],
    ]
    for line, message in (
        ('84-1 ",GO" "0.1"', "expected ID"),
        ("84-1 GO 0.1", "expected ID"),
        ('84-1 ",GO" "0.1,1.1.1"', "not all"),
        ('84-1 "A,GO" "0.2,0.1"', "word 'GO' at 0.2 s ends before it starts"),
    ):
        alignments.write_text(f'84-121123-0000 ",GO" "0.1,0.3"\n{line}\n')
        with pytest.raises(ValueError, match=f"alignment.txt line 2: {message}"):
            index(IndexConfig(source=str(tmp_path / "LibriSpeech"), out=str(tmp_path / "m2")))


def test_other_files_of_the_name_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "audio"
    record(source / "84-1-0000.wav", 16000)
    for number, text in enumerate((b"", b"\n", b"IntervalTier words\n0 1 go\n", b"\xff\xfe\n")):
        (source / f"{number}.alignment.txt").write_bytes(text)
    (source / "84-1.alignment.txt").write_bytes(b'84-1-0000 ",GO" "0.1,0.3"\r\n\n\n')
    assert [u.words for u in run(source)[1]] == [[Word(0.1, 0.3, "GO")]]


# Quarantine


@pytest.mark.parametrize("kind", ["phone", "word"])
def test_times_after_the_end_are_of_another_recording(tmp_path: Path, kind: str) -> None:
    """Aligners round the end: up to 100 ms after it pass. A segment's times start with the segment."""
    rows: list[dict[str, Any]] = [
        {"audio_filepath": f"{end}.wav", f"{kind}s": [[0.1, end, "a"]]} for end in (0.25, 0.34, 0.36)
    ]
    for row in rows:
        record(tmp_path / row["audio_filepath"])
    rows.append(
        {"audio_filepath": str(record(tmp_path / "long.wav", 16000)), "offset": 0.5, "duration": 0.3}
        | {f"{kind}s": [[0.0, 0.8, "a"]]}
    )
    manifest = run(write_lines(tmp_path / "l.jsonl", rows), max_bad_share=0.5)[1]
    assert manifest.ids == ["0.25", "0.34"]
    reasons = [
        json.loads(line)["reason"] for line in (manifest.folder / "quarantine.jsonl").read_text().splitlines()
    ]
    assert reasons == [
        f"{kind} 'a' at 0.1 s ends at 0.36 s, after the recording (0.250 s)",
        f"{kind} 'a' at 0.0 s ends at 0.8 s, after the recording (0.300 s)",
    ]


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.touch(), "is empty"),
    "unreadable": (lambda path: path.write_bytes(b"noise" * 99), "cannot be decoded"),
    "zero": (lambda path: record(path, 0), "no samples"),
    "short": (lambda path: record(path, 1000, 48000), "too short: 333 samples"),
    "nan": (lambda path: record(path, value=np.nan), "NaN"),
    "inf": (lambda path: record(path, value=-np.inf), "infinite"),
    "truncated": (lambda path: path.write_bytes(record(path).read_bytes()[:3000]), "truncated"),
}


@settings(max_examples=12, deadline=None)  # each starts workers
@given(st.lists(st.sampled_from([None, *BAD]), min_size=1, max_size=12), st.floats(0, 1), st.integers(1, 4))
def test_found_is_kept_plus_quarantined_up_to_the_limit(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str | None], max_bad_share: float, workers: int
) -> None:
    folder = tmp_path_factory.mktemp("q")
    for number, kind in enumerate(kinds):
        (BAD[kind][0] if kind else record)(folder / f"{number}.wav")
    source = write_lines(
        folder / "l.jsonl", [{"audio_filepath": f"{number}.wav"} for number in range(len(kinds))]
    )
    num_bad = sum(kind is not None for kind in kinds)
    if num_bad == len(kinds) or num_bad > max_bad_share * len(kinds):
        first = next(number for number, kind in enumerate(kinds) if kind)
        with pytest.raises(
            ValueError, match=rf"{num_bad} of {len(kinds)} recordings cannot be used(.|\n)*/{first}.wav: "
        ):
            run(source, max_bad_share=max_bad_share, workers=workers)
        assert not (folder / "manifest").exists()
        return
    summary, manifest = run(source, max_bad_share=max_bad_share, workers=workers)
    assert summary["found"] == len(kinds) == summary["utterances"] + summary["quarantined"]
    assert manifest.ids == [str(number) for number, kind in enumerate(kinds) if kind is None]
    quarantine = [
        json.loads(line) for line in (folder / "manifest/quarantine.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in quarantine] == [str(number) for number, kind in enumerate(kinds) if kind]
    for row in quarantine:
        kind = kinds[int(row["id"])]
        assert (
            kind is not None
            and BAD[kind][1] in row["reason"]
            and row["path"] == str(folder / f"{row['id']}.wav")
        )


def test_what_is_left_out_is_listed_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        record(tmp_path / f"c/{number}.wav")
    (tmp_path / "c/[bad]").mkdir()
    (tmp_path / "c/[bad]/x.wav").touch()
    run(tmp_path / "c", max_bad_share=0.3)
    printed = capfd.readouterr()
    assert "1 of 4 recordings left out" in printed.err and "is empty" in printed.err and printed.out == ""


def test_reading_headers_only_is_a_choice(tmp_path: Path) -> None:
    record(tmp_path / "c/nan.wav", value=np.nan)
    record(tmp_path / "c/ok.wav")
    (tmp_path / "c/empty.wav").touch()
    assert run(tmp_path / "c", verify="header", max_bad_share=0.5)[1].ids == ["nan", "ok"]


def test_a_finished_manifest_is_never_written_over(tmp_path: Path) -> None:
    record(tmp_path / "c/x.wav")
    run(tmp_path / "c")
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        run(tmp_path / "c")


# Splits


def config(**keys: Any) -> IndexConfig:
    return IndexConfig(source="corpus", out="manifest", **keys)


def test_too_few_utterances_to_split_is_an_error(tmp_path: Path) -> None:
    record(tmp_path / "c/x.wav")
    with pytest.raises(
        ValueError,
        match="1 are too few to draw test from and leave a train split; set dev_share or test_share to 0",
    ):
        run(tmp_path / "c", test_share=0.1)
    with pytest.raises(ValueError, match="leave nothing to train on"):
        config(dev_share=0.5, test_share=0.5)


@pytest.mark.parametrize("num_speakers", [1, 2, 3, 5])
def test_splits_share_no_speaker_once_three_are_known(tmp_path: Path, num_speakers: int) -> None:
    for number in range(20):
        record(tmp_path / f"c/s{number % num_speakers}/{number}.wav")
    summary, manifest = run(tmp_path / "c", speaker_pattern="(s[0-9])/", dev_share=0.1, test_share=0.2)
    speakers = {split: {u.speaker for u in manifest.select(split)} for split in ("train", "dev", "test")}
    assert sum(split["utterances"] for split in summary["splits"].values()) == summary["utterances"] == 20
    if num_speakers >= 3:
        assert sum(len(group) for group in speakers.values()) == num_speakers
    else:
        assert [summary["splits"][split]["utterances"] for split in ("train", "dev", "test")] == [14, 2, 4]


def test_utterances_of_unknown_speakers_stay_in_train(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(8):
        record(tmp_path / f"{number}.wav")
        rows.append({"audio_filepath": f"{number}.wav", "speaker": f"s{number}" if number < 4 else None})
    manifest = run(write_lines(tmp_path / "l.jsonl", rows), dev_share=0.2, test_share=0.2)[1]
    assert {u.split for u in manifest if u.speaker is None} == {"train"} and manifest.splits == {
        "train",
        "dev",
        "test",
    }


def test_a_split_given_for_some_rows_only_is_an_error(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for name in "xy":
        record(tmp_path / f"{name}.wav")
        rows.append({"audio_filepath": f"{name}.wav"} | ({"split": "train"} if name == "x" else {}))
    with pytest.raises(ValueError, match="'y' has no split though others do"):
        run(write_lines(tmp_path / "l.jsonl", rows))


def lasting(folder: Path, minutes: dict[str, float]) -> Path:
    """A list of recordings of so many minutes, at 1 kHz so that they are quickly written; their first letter
    is the speaker."""
    rows = []
    for name, length in minutes.items():
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(
            path, np.random.default_rng(0).uniform(-0.5, 0.5, int(length * 60_000)).astype(np.float32), 1000
        )
        rows.append({"audio_filepath": path.name, "speaker": None if name.startswith("_") else name[0]})
    return write_lines(folder / "l.jsonl", rows)


def test_splits_have_their_share_of_the_hours_not_of_the_speakers(tmp_path: Path) -> None:
    minutes = {"a": 20.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 4.0, "f": 6.0, "g": 3.0}
    source = lasting(tmp_path / "c", minutes)
    summary, manifest = run(source, dev_share=0.1, test_share=0.15)
    hours = {name: split["hours"] * 60 for name, split in summary["splits"].items()}
    assert hours == {"train": pytest.approx(30), "dev": pytest.approx(4), "test": pytest.approx(6)}
    assert summary["splits_drawn_by"] == "speaker" and "notes" not in summary
    source.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    index(IndexConfig(source=str(source), out=str(tmp_path / "again"), dev_share=0.1, test_share=0.15))
    assert {u.id: u.split for u in Manifest(tmp_path / "again")} == {u.id: u.split for u in manifest}


def test_a_split_of_under_two_minutes_or_over_twice_its_share_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lasting(tmp_path / "c", {"a": 9.0, "b": 8.0, "c": 6.0})
    assert main(["index", str(source), str(tmp_path / "m"), "test_share=0"]) == 0
    told = capsys.readouterr().err
    assert (
        "note: split 'dev' has 26.1% of the hours, and dev_share asks for 10.0%: whole speakers allow "
        "nothing nearer" in told
    )
    assert read_meta(tmp_path / "m")["split_notes"][0] in told
    source = lasting(tmp_path / "d", {"a": 9.0, "b": 8.0, "c": 1.5})
    assert main(["index", str(source), str(tmp_path / "n"), "test_share=0", "--json"]) == 0
    printed = capsys.readouterr()
    assert (
        "note: split 'dev' has 90 s, under two minutes: too little to rely on; raise dev_share or add audio"
        in printed.err
    )
    assert len(json.loads(printed.out)["notes"]) == 1


@pytest.mark.parametrize(
    ("names", "drawn_by", "note"),
    [
        ("abc", "speaker", None),
        (
            "abc_",
            "speaker",
            r"1 utterances have no speaker and are in train: voices of test and dev may be among them; "
            r"name them with",
        ),
        (
            "ab_",
            "utterance",
            r"splits are drawn by utterance, not by speaker \(only 2 of them are known\): voices of test "
            r"and dev may be heard in training",
        ),
        (
            "____",
            "utterance",
            r"\(none is known\): voices of test and dev may be heard in training; name them with "
            r"speaker_pattern",
        ),
    ],
)
def test_without_speakers_it_is_said_that_test_voices_may_be_heard_in_training(
    tmp_path: Path, names: str, drawn_by: str, note: str | None
) -> None:
    source = lasting(tmp_path / "c", {f"{name}{number}": 2.5 for number, name in enumerate(names)})
    summary, manifest = run(source, dev_share=0.2, test_share=0.2)
    notes = [text for text in summary.get("notes", []) if "voices" in text]
    assert len(notes) == (note is not None) and (note is None or re.search(note, notes[0]))
    meta = read_meta(manifest.folder)
    assert meta["splits_drawn_by"] == summary["splits_drawn_by"] == drawn_by and meta[
        "split_notes"
    ] == summary.get("notes", [])


def test_splits_of_the_source_or_none_at_all_are_no_reason_for_notes(tmp_path: Path) -> None:
    record(tmp_path / "x.wav")
    summary, _ = run(
        write_lines(tmp_path / "l.jsonl", [{"audio_filepath": "x.wav", "split": "test"}]), test_share=0.1
    )
    assert summary["splits_drawn_by"] == "source" and "notes" not in summary
    (tmp_path / "l.jsonl").write_text('{"audio_filepath": "x.wav"}\n')
    summary = index(
        IndexConfig(source=str(tmp_path / "l.jsonl"), out=str(tmp_path / "n"), dev_share=0.0, test_share=0.0)
    )
    assert summary["splits_drawn_by"] == "none" and "notes" not in summary


# Long recordings


def test_a_long_recording_is_cut_into_utterances_that_have_its_samples_and_its_words_between_them(
    tmp_path: Path,
) -> None:
    record(tmp_path / "audio" / "talk.wav", 10 * 8000, rate=8000)
    record(tmp_path / "audio" / "short.wav", 2 * 8000, rate=8000)
    lines = [
        {
            "id": "talk",
            "words": [[0.5, 1.0, "one"], [2.9, 3.6, "two"], [9.0, 9.5, "three"]],
            "phones": [[2.9, 3.5, "t"]],
        }
    ]
    rows = [
        {"audio_filepath": "audio/talk.wav", "text": "one two three", **lines[0]},
        {"audio_filepath": "audio/short.wav"},
    ]
    summary, manifest = run(write_lines(tmp_path / "a.jsonl", rows), max_seconds=4)
    pieces = [utterance for utterance in manifest if utterance.id != "audio/short"]
    assert [piece.id for piece in pieces] == ["talk-0", "talk-1", "talk-2"] and len(manifest) == 4
    assert [piece.text for piece in pieces] == ["one two", None, "three"]
    assert pieces[2].words == [
        Word(pytest.approx(9 - 20 / 3, abs=1e-4), pytest.approx(9.5 - 20 / 3, abs=1e-4), "three")
    ]
    # its middle is just before the cut
    assert pieces[0].phones == [Phone(2.9, pytest.approx(10 / 3, abs=1e-4), "t")]
    whole = soundfile.read(tmp_path / "audio" / "talk.wav", dtype="float32")[0]
    again = [
        soundfile.read(piece.path, piece.num_samples, piece.start, dtype="float32")[0] for piece in pieces
    ]
    assert np.array_equal(np.concatenate(again), whole)
    assert summary["notes"][-1] == "1 recordings longer than max_seconds were cut into 3 utterances"


def test_one_long_recording_gives_every_split_pieces_and_of_several_each_is_of_one_split(
    tmp_path: Path,
) -> None:
    record(tmp_path / "one" / "talk.wav", 16000 * 10)
    (tmp_path / "one" / "talk.txt").write_text("nobody knows when")
    summary, manifest = run(tmp_path / "one", max_seconds=2, dev_share=0.2, test_share=0.2)
    assert {split: count["utterances"] for split, count in summary["splits"].items()} == {
        "dev": 1,
        "test": 1,
        "train": 3,
    }
    assert not manifest.has_text and "1 of their transcripts have no word times" in summary["notes"][-1]
    for number in range(3):
        record(tmp_path / "three" / f"{number}.wav", 16000 * (6 + number))
    (tmp_path / "manifest").rename(tmp_path / "before")
    _, manifest = run(tmp_path / "three", max_seconds=2, dev_share=0.2, test_share=0.2)
    assert len(manifest) == 3 + 4 + 4
    assert len({(utterance.id[0], utterance.split) for utterance in manifest}) == 3


def test_a_piece_with_the_name_of_another_recording_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "audio" / "talk.wav", 16000 * 4)
    record(tmp_path / "audio" / "talk-1.wav", 16000)
    with pytest.raises(ValueError, match=r"max_seconds: a piece of .*talk\.wav would have the id 'talk-1'"):
        run(tmp_path / "audio", max_seconds=3)
