import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.ctc.decoding import Decoder, DecodingConfig
from pretrain.ctc.error_rates import count_edits
from pretrain.ctc.finetuning import finetune
from pretrain.ctc.model import CTCBatch, LoadedRecognizer, Recognizer, greedy, load_recognizer
from pretrain.ctc.text import TextConfig
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import _references, transcribe
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.ctc.windows import CONTEXT, in_windows
from pretrain.data.indexing import IndexConfig, index
from pretrain.data.manifest import Manifest
from pretrain.data.packing import pack
from pretrain.data.utterance import Utterance, num_frames
from pretrain.data.windows import overlapping_windows
from pretrain.store.artefact import read_meta
from tests.pretrain.conftest import write_corpus
from tests.pretrain.ctc.tones import TEXTS, save_encoder, settings, spell, tone_labels

ARPA = """\\data\\
ngram 1=8
ngram 2=2

\\1-grams:
-3	<unk>	0
-99	<s>	0
-0.9	</s>	0
-1.0	ab	-0.2
-1.0	cd	-0.2
-1.0	da	-0.2
-1.0	cab	-0.2
-1.0	bx	0

\\2-grams:
-0.1	ab cd
-0.1	<s> cab

\\end\\
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Four utterances of tones that the recogniser has learned, one without a transcript, and one too short
    for a frame."""
    folder = tmp_path_factory.mktemp("tones")
    texts = [*TEXTS, None, "d"]
    waves = [*(spell(text) for text in TEXTS), spell("ab", seed=5), spell("d")[:399]]
    return write_corpus(
        folder,
        waves,
        texts=texts,
        speakers=["x", "y", "x", "y", "x", "y"],
        splits=["train"] * 4 + ["other"] * 2,
    )


@pytest.fixture(scope="module")
def recognizer(corpus: Manifest) -> str:
    folder = corpus.folder.parent
    save_encoder(folder / "encoder")
    config = settings(
        folder,
        corpus,
        init="random",
        valid_split="train",
        training={"max_steps": 150, "log_every": 50, "validate_every": 50},
    )
    finetune(config)
    return config.out


@pytest.fixture
def arpa(tmp_path: Path) -> str:
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    return str(path)


def run(
    out: Path, corpus: Manifest, recognizer: str, **keys: Any
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The summary and the table of a `transcribe` with `keys`, of the whole corpus unless told."""
    tree = {
        "out": str(out),
        "manifest": str(corpus.folder),
        "split": None,
        "recognizer": recognizer,
        "device": "cpu",
        **keys,
    }
    summary = transcribe(TranscribeConfig.model_validate_json(json.dumps(tree)))
    return summary, pq.read_table(out / "transcripts.parquet").to_pydict()


def log_probs_alone(loaded: LoadedRecognizer, wave: np.ndarray) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model.logits(CTCBatch.untranscribed(*pack([wave]))).log_softmax(2)[0]
    return found


def test_greedy_texts_are_those_of_the_best_paths(tmp_path: Path, corpus: Manifest, recognizer: str) -> None:
    loaded = load_recognizer(recognizer)
    summary, table = run(tmp_path / "text", corpus, recognizer)
    assert table["id"] == corpus.ids and table["speaker"] == ["x", "y", "x", "y", "x", "y"]
    assert (
        table["text"] == [*TEXTS, None, "d"]
        and table["hypothesis"][:4] == TEXTS
        and table["hypothesis"][5] == ""
    )
    for row, text in enumerate([*TEXTS, "ab"]):
        log_probs = log_probs_alone(loaded, spell(text, seed=5 * (row == 4)))
        assert [table["hypothesis"][row]] == greedy(log_probs[None], [len(log_probs)], loaded.vocabulary)
        # float32 products of other shapes, over some dozens of frames
        assert table["score"][row] == pytest.approx(log_probs.max(1).values.sum().item(), abs=1e-3)
    assert table["nbest"] == table["words"] == [None] * 6
    assert summary["too_short"] == 1 and summary["utterances"] == 6 and summary["scored_utterances"] == 5
    assert (
        summary["wer"] == pytest.approx(1 / 7) and summary["reference_words"] == 7 and summary["notes"] == []
    )
    for rate in ("", "encoder_", "search_"):
        assert summary[f"{rate}audio_seconds_per_second"] > 0
    assert summary == json.loads((tmp_path / "text" / "summary.json").read_text())
    meta = read_meta(tmp_path / "text", "transcripts")
    assert meta["parents"] == {"manifest": corpus.fingerprint, "recognizer": loaded.fingerprint}


def test_batches_change_no_text_and_the_last_checkpoint_can_be_asked_for(
    tmp_path: Path, corpus: Manifest, recognizer: str
) -> None:
    _, table = run(tmp_path / "together", corpus, recognizer)
    _, alone = run(tmp_path / "alone", corpus, recognizer, batch_seconds=0.1, checkpoint="last", workers=1)
    assert table["hypothesis"][:4] == alone["hypothesis"][:4]
    last = load_recognizer(recognizer, "last").fingerprint
    assert read_meta(tmp_path / "alone")["parents"]["recognizer"] == last


def test_beam_search_writes_the_best_texts_with_their_scores(
    tmp_path: Path, corpus: Manifest, recognizer: str, arpa: str
) -> None:
    decoding = {"method": "beam", "lm": arpa, "nbest": 3, "lm_weight": 0.5, "word_score": 0.0}
    summary, table = run(tmp_path / "text", corpus, recognizer, decoding=decoding)
    assert (
        table["hypothesis"][0] == "ab cd" and table["hypothesis"][3] == "cab" and table["hypothesis"][5] == ""
    )
    assert "1 words of" in summary["notes"][0] and "bx" in summary["notes"][0]
    loaded = load_recognizer(recognizer)
    decoder = Decoder(DecodingConfig.model_validate(decoding), loaded.vocabulary, loaded.text)
    for row in range(4):
        nbest = table["nbest"][row]
        assert (
            1 <= len(nbest) <= 3
            and nbest[0]["text"] == table["hypothesis"][row]
            and nbest[0]["score"] == table["score"][row]
        )
        assert [one["score"] for one in nbest] == sorted((one["score"] for one in nbest), reverse=True)
        expected = decoder.decode(log_probs_alone(loaded, spell(TEXTS[row])))
        assert [one["text"] for one in nbest] == [hypothesis.text for hypothesis in expected]
        assert nbest[0]["lm_score"] == pytest.approx(expected[0].lm_score)
        assert nbest[0]["score"] == pytest.approx(nbest[0]["ctc_score"] + 0.5 * nbest[0]["lm_score"])
    assert table["nbest"][5] == [{"text": "", "score": 0.0, "ctc_score": 0.0, "lm_score": None}]


@pytest.mark.slow  # two processes that import torch
def test_other_processes_find_the_same_texts(
    tmp_path: Path, corpus: Manifest, recognizer: str, arpa: str
) -> None:
    keys = {"tune": {"lm_weight": [0.5, 1.0], "word_score": [0.0]}, "words": True}
    tables = []
    for processes in (1, 2):
        decoding = {"method": "beam", "lm": arpa, "nbest": 3, "processes": processes}
        tables.append(run(tmp_path / str(processes), corpus, recognizer, decoding=decoding, **keys)[1])
    assert tables[0] == tables[1]


def test_tuning_tries_every_pair_of_weights_and_uses_the_best(
    tmp_path: Path, corpus: Manifest, recognizer: str, arpa: str
) -> None:
    decoding = {"method": "beam", "lm": arpa}
    tune = {"lm_weight": [50.0, 0.5], "word_score": [-100.0, 0.0]}
    summary, table = run(tmp_path / "tuned", corpus, recognizer, decoding=decoding, tune=tune)
    pairs = [(row["lm_weight"], row["word_score"]) for row in summary["tuning"]]
    assert pairs == [(50.0, -100.0), (50.0, 0.0), (0.5, -100.0), (0.5, 0.0)]
    assert (summary["lm_weight"], summary["word_score"]) == (0.5, 0.0)
    for row, (lm_weight, word_score) in zip(summary["tuning"], pairs, strict=True):
        fixed = {**decoding, "lm_weight": lm_weight, "word_score": word_score}
        alone, texts = run(tmp_path / f"{lm_weight} {word_score}", corpus, recognizer, decoding=fixed)
        # The row that is too short has no outputs to tune on: its word is missed whatever the weights.
        assert row["wer"] == pytest.approx((alone["wer"] * 7 - 1) / 6)
    assert texts["hypothesis"] == table["hypothesis"] and texts["nbest"] == table["nbest"]


def test_a_weight_that_is_not_tuned_is_the_one_that_decoding_gives(
    tmp_path: Path, corpus: Manifest, recognizer: str, arpa: str
) -> None:
    decoding = {"method": "beam", "lm": arpa, "word_score": -0.6}
    summary, _ = run(tmp_path / "tuned", corpus, recognizer, decoding=decoding, tune={"lm_weight": [0.5]})
    assert (summary["lm_weight"], summary["word_score"]) == (0.5, -0.6)


def test_tuning_needs_a_language_model_and_transcripts(
    tmp_path: Path, corpus: Manifest, recognizer: str, arpa: str
) -> None:
    with pytest.raises(ValidationError, match="finds the weights of a language model"):
        run(tmp_path / "a", corpus, recognizer, tune={"lm_weight": [1.0]})
    with pytest.raises(ValueError, match="no utterance of this split has a transcript"):
        run(
            tmp_path / "b",
            corpus,
            recognizer,
            split="other",
            decoding={"method": "beam", "lm": arpa},
            tune={"lm_weight": [1.0]},
        )
    silent = write_corpus(tmp_path / "silent", [spell("ab")], texts=[""], speakers=["x"], splits=["dev"])
    with pytest.raises(ValueError, match="no utterance of this split has a transcript with words"):
        run(
            tmp_path / "c",
            silent,
            recognizer,
            decoding={"method": "beam", "lm": arpa},
            tune={"lm_weight": [1.0]},
        )
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        run(
            tmp_path / "d",
            corpus,
            recognizer,
            decoding={"method": "beam", "lm": arpa},
            tune={"lm_weight": [1.0, -1.0]},
        )


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_words_are_found_where_their_tones_are(
    tmp_path: Path, corpus: Manifest, recognizer: str, arpa: str, method: str
) -> None:
    decoding = {"method": "beam", "lm": arpa, "lm_weight": 0.5, "word_score": 0.0} if method == "beam" else {}
    _, table = run(tmp_path / "text", corpus, recognizer, words=True, decoding=decoding)
    (ab, cd), (cab,), nothing = table["words"][0], table["words"][3], table["words"][5]
    assert [ab["word"], cd["word"], cab["word"]] == ["ab", "cd", "cab"] and nothing == []
    for word, start, end in ((ab, 0.0, 0.3), (cd, 0.45, 0.75), (cab, 0.0, 0.45)):
        # a tone lasts 0.15 s, the recogniser may emit it anywhere in it, and a word reaches 0.1 s further
        assert abs(word["start"] - start) < 0.15 and abs(word["end"] - end) < 0.15


def test_aligned_transcripts_can_be_indexed_and_what_cannot_be_aligned_is_listed(
    tmp_path: Path, corpus: Manifest, recognizer: str
) -> None:
    summary, _ = run(tmp_path / "text", corpus, recognizer, align="text")
    assert summary["aligned"] == 4 and summary["not_aligned"] == 2
    failed = [json.loads(line) for line in (tmp_path / "text" / "not_aligned.jsonl").read_text().splitlines()]
    assert failed == [
        {"id": "u04", "reason": "has no text"},
        {"id": "u05", "reason": "is too short for a frame"},
    ]
    wave = tmp_path / "audio"
    wave.mkdir()
    (wave / "u00.wav").write_bytes((corpus.folder.parent / "u00.wav").read_bytes())
    again = tmp_path / "again"
    index(
        IndexConfig(
            out=str(again),
            source=str(wave),
            dev_share=0,
            test_share=0,
            alignments=str(tmp_path / "text" / "alignments.jsonl"),
        )
    )
    words = Manifest(again)[0].words
    assert words is not None and [word.word for word in words] == ["ab", "cd"]
    assert 0 <= words[0].start < words[0].end <= words[1].start < words[1].end <= 0.75 + 0.1


@pytest.mark.parametrize(("frames", "size"), [(10, 10), (11, 10), (1499, 50), (30, 12), (31, 12), (100, 7)])
def test_windows_cover_every_frame_once_with_context_on_both_sides(frames: int, size: int) -> None:
    windows = overlapping_windows(frames, size, CONTEXT)
    taken = [frame for _, _, begin, end in windows for frame in range(begin, end)]
    assert taken == list(range(frames))
    for first, last, begin, end in windows:
        assert 0 <= first <= begin < end <= last <= frames and last - first <= size
        assert first == 0 or begin - first == size // 6
        assert last == frames or last - end == size // 6


@pytest.mark.parametrize("samples", [15999, 16000, 16000 * 3 + 17, 16000 * 7 + 399])
def test_windows_put_together_are_the_whole_where_frames_depend_on_their_own_samples(samples: int) -> None:
    wave = np.random.default_rng(0).standard_normal(samples, dtype=np.float32)
    sizes = []

    def forward(loaded: list[np.ndarray]) -> list[Tensor]:
        sizes.append(sum(map(len, loaded)))
        return [
            torch.from_numpy(np.lib.stride_tricks.sliding_window_view(one, 400)[::320].copy())
            for one in loaded
        ]

    (whole,) = forward([wave])
    sizes.clear()
    assert torch.equal(in_windows(wave, 1.0, 3.0, forward), whole) and len(whole) == num_frames(samples)
    assert max(sizes) <= 3 * (16000 + 400)
    units = np.arange(len(whole))
    assert (
        in_windows(units, 1.0, 3.0, lambda loaded: [torch.from_numpy(one) for one in loaded]).tolist()
        == units.tolist()
    )


def test_long_recordings_are_cut_and_what_was_short_enough_is_not(
    tmp_path: Path, corpus: Manifest, recognizer: str
) -> None:
    said = "ab cd da bb ca cab"
    long = write_corpus(tmp_path, [spell(said), spell("ab cd")], texts=[said, "ab cd"])
    whole, at_once = run(tmp_path / "whole", long, recognizer)
    cut, in_windows = run(tmp_path / "cut", long, recognizer, max_seconds=1.0)
    assert whole["cut_in_windows"] == 0 and cut["cut_in_windows"] == 1
    assert (
        in_windows["hypothesis"][1] == at_once["hypothesis"][1]
        and in_windows["score"][1] == at_once["score"][1]
    )
    # Trained on utterances of less than a second, it should not do worse in windows of one than on 2.7 s
    assert cut["cer"] <= whole["cer"] + 0.2


def test_recognisers_of_units_need_labels_and_those_of_audio_none(
    tmp_path: Path, corpus: Manifest, recognizer: str
) -> None:
    train = corpus.select("train")
    labels = tone_labels(tmp_path / "labels", train, TEXTS)
    with pytest.raises(ValueError, match="reads audio; remove `labels`"):
        run(tmp_path / "text", train, recognizer, labels=str(labels))
    small = {"architecture": "tiny", "dropout": 0.0, "input_dropout": 0.0}
    for deduplicate in (False, True):
        folder = tmp_path / str(deduplicate)
        config = settings(
            folder,
            train,
            labels=str(labels),
            unit_encoder=small,
            units={"deduplicate": deduplicate},
            training={"max_steps": 1},
            bad_transcripts="quarantine",
        )
        finetune(config)
        with pytest.raises(ValueError, match="reads units; give their `labels`"):
            run(tmp_path / "text", train, config.out, split="train")
        keys: dict[str, Any] = {"split": "train", "labels": str(labels), "words": True}
        if deduplicate:
            with pytest.raises(ValueError, match="which do not tell the time; remove them"):
                run(folder / "text", train, config.out, **keys)
        else:
            summary, table = run(folder / "text", train, config.out, **keys, max_seconds=1.0)
            assert table["id"] == train.ids and summary["utterances"] == 4


def test_words_made_of_phones_are_held_against_the_text() -> None:
    row = Utterance(id="u", path="", start=0, num_samples=16000, sample_rate=16000, text="Hi!", phones=[])
    rows = [row, replace(row, text=None), replace(row, text="?", phones=None)]
    text = TextConfig(spelling="phones")
    decoder = Decoder(DecodingConfig(), Vocabulary(["HH", "AY"], "phones"), text)
    assert _references(rows, text, decoder) == [
        "",
        "",
        None,
    ]  # no phones are silence, no list of them is not known
    decoder.writes_words = True
    assert _references(rows, text, decoder) == ["hi", None, ""]


def test_words_written_of_silence_are_insertions(tmp_path: Path, recognizer: str, arpa: str) -> None:
    texts = ["ab cd", "", "?!", None]
    waves = [spell("ab cd"), spell("da"), spell("cab"), spell("da")]
    silent = write_corpus(tmp_path / "silent", waves, texts=texts, speakers=["x"] * 4, splits=["dev"] * 4)
    decoding = {"method": "beam", "lm": arpa}
    summary, table = run(tmp_path / "text", silent, recognizer, decoding=decoding, tune={"lm_weight": [0.5]})
    assert table["text"] == ["ab cd", "", "", None]
    written = [len(hypothesis.split()) for hypothesis in table["hypothesis"]]
    assert (summary["scored_utterances"], summary["reference_words"], summary["empty_references"]) == (
        3,
        2,
        2,
    )
    assert summary["insertions_of_empty_references"] == written[1] + written[2] > 0
    alone = count_edits(["ab cd"], table["hypothesis"][:1]).total.sum()
    assert summary["wer"] == (alone + written[1] + written[2]) / 2 == summary["tuning"][0]["wer"]


def test_a_device_that_is_not_here_is_refused(tmp_path: Path, corpus: Manifest, recognizer: str) -> None:
    with pytest.raises(ValueError, match="^device: 'foo' is not here; torch .* has cpu"):
        run(tmp_path / "text", corpus, recognizer, device="foo")


def test_a_recogniser_whose_training_broke_is_named(
    tmp_path: Path, corpus: Manifest, recognizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Recognizer, batch: CTCBatch) -> Tensor:
        return batch.layout.pad(torch.full((batch.layout.total_frames, 6), torch.nan))

    monkeypatch.setattr(Recognizer, "logits", broken)
    with pytest.raises(ValueError, match="its outputs for 'u0.' are not finite; its training broke"):
        run(tmp_path / "text", corpus, recognizer)
