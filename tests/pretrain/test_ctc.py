import itertools
import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.batches import BatchConfig, SpeechBatches
from pretrain.checkpoint import save_checkpoint
from pretrain.ctc import CTCBatch, CTCConfig, CTCTask, Recognizer, TextConfig, Vocabulary, load_recognizer
from pretrain.encoder import EncoderConfig, load_encoder
from pretrain.finetuning import FinetuneConfig, draw_labelled, finetune
from pretrain.manifest import Manifest
from pretrain.packing import pack
from pretrain.transcription import TranscribeConfig, transcribe

TONES = {"a": 300.0, "b": 700.0, "c": 1500.0, "d": 3100.0, " ": 0.0}
TEXTS = ["ab cd", "da", "bb ca", "cab"]
NOTHING = torch.zeros(0)


def spell(text: str, seed: int = 0) -> np.ndarray:
    """Every character a tone of 0.15 s, with a little noise."""
    time = np.arange(2400) / 16000
    wave = np.concatenate([0.2 * np.sin(2 * np.pi * TONES[c] * time) for c in text])
    return (wave + 0.002 * np.random.default_rng(seed).standard_normal(len(wave))).astype(np.float32)


@pytest.fixture
def encoder_run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Recognizer(EncoderConfig(architecture="tiny", dropout=0.0, input_dropout=0.0), 2)
    config = {"encoder": model.encoder.config.resolved()}
    save_checkpoint(
        tmp_path / "encoder", 1, model, torch.optim.AdamW(model.parameters()), {"kind": "encoder", "config": config, "extra": {}}
    )
    return tmp_path / "encoder"


def config(folder: Path, manifest: Manifest, **changes: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "out": str(folder / "recognizer"), "manifest": str(manifest.folder), "encoder": str(folder / "encoder"),
        "optimizer": {"lr": 5e-3}, "ctc": {"mask_start_probability": 0.0, "mask_channel_probability": 0.0, "final_dropout": 0.0},
        "training": {"max_steps": 4, "log_every": 2, "device": "cpu"},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return FinetuneConfig.model_validate_json(json.dumps(tree))


@pytest.mark.parametrize("text", ["ab ba", "żółć", "naïve café", "हिन्दी", "don't stop", "aa bb"])
def test_a_transcript_survives_encoding_and_decoding(text: str) -> None:
    text = TextConfig().normalize(text)
    vocabulary = Vocabulary.of([text])
    numbers = vocabulary.encode(text)
    assert numbers.min() >= 1 and numbers.max() < len(vocabulary)
    assert vocabulary.decode(np.repeat(np.insert(numbers, range(len(numbers)), 0), 3)) == text


@given(st.text(max_size=20), st.sampled_from(["lower", "upper", "keep"]), st.sampled_from(["remove", "keep"]))
def test_normalised_text_is_a_fixed_point_with_single_spaces_that_any_vocabulary_can_spell(
    text: str, case: Any, punctuation: Any
) -> None:
    config = TextConfig(case=case, punctuation=punctuation)
    normal = config.normalize(text)
    assert unicodedata.is_normalized("NFC", normal) and " ".join(normal.split()) == normal and "|" not in normal
    assert config.normalize(normal) == normal
    vocabulary = Vocabulary.of([normal])
    assert not vocabulary.unknown(normal)
    numbers = vocabulary.encode(normal)
    assert vocabulary.decode(np.insert(numbers, range(len(numbers)), 0)) == normal


def test_the_same_word_in_two_unicode_forms_is_one() -> None:
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    assert TextConfig().normalize(composed) == TextConfig().normalize(decomposed) == "caf\u00e9"
    assert len(Vocabulary.of([TextConfig().normalize(text) for text in (composed, decomposed)])) == 5


def test_case_and_punctuation_follow_the_config() -> None:
    assert TextConfig().normalize("Well-known: don't  STOP! (“now”)") == "well known don't stop now"
    assert TextConfig(case="upper").normalize("don't") == "DON'T"
    assert TextConfig(case="keep", punctuation="keep").normalize(" A, b|c.") == "A, b c."


def test_greedy_decoding_merges_repeats_and_drops_blanks() -> None:
    vocabulary = Vocabulary(["a", "b", "|"])
    for path, text in (
        ([], ""), ([0, 0], ""), ([1, 1, 2], "ab"), ([1, 0, 1], "aa"), ([0, 1, 1, 0, 0, 1, 3, 2, 2], "aa b"), ([3, 1, 3], "a"),
    ):  # fmt: skip
        assert vocabulary.decode(np.array(path, dtype=np.int64)) == text


def test_the_loss_sums_over_all_alignments() -> None:
    """Against every path of the frames that spells the target, and only over the utterance's own frames."""
    torch.manual_seed(0)
    model = Recognizer(EncoderConfig(architecture="tiny"), 3).eval()
    targets = torch.tensor([[1, 2, 2], [1, 0, 0]])
    waves, layout = pack([0.1 * np.random.default_rng(n).standard_normal(n, dtype=np.float32) for n in (1680, 1040)])  # 5, 3 frames
    batch = CTCBatch(waves, layout, targets, (3, 1), None, None)
    loss = model(batch)
    expected = 0.0
    with torch.no_grad():
        log_probs = model.logits(batch).log_softmax(2)
    for row, frames, target in ((0, 5, [1, 2, 2]), (1, 3, [1])):
        total = 0.0
        for path in itertools.product(range(3), repeat=frames):
            merged = [c for t, c in enumerate(path) if c != 0 and (t == 0 or path[t - 1] != c)]
            if merged == target:
                total += math.exp(sum(float(log_probs[row, t, c]) for t, c in enumerate(path)))
        expected -= math.log(total)
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)  # float32 log sums
    assert loss.count.item() == 4


def task(manifest: Manifest, vocabulary: Vocabulary, *, pretrained: bool = True, crop_seconds: float = 15.6, **ctc: Any) -> CTCTask:
    torch.manual_seed(0)
    batches = SpeechBatches(manifest, BatchConfig(crop_seconds=crop_seconds), 0, crop=False)
    model = Recognizer(EncoderConfig(architecture="tiny", front_end="waveform", conv_norm="layer"), len(vocabulary))
    return CTCTask(model, CTCConfig(**ctc), vocabulary, TextConfig(), batches, None, frozen_phases=pretrained, seed=0)


def test_transcripts_that_cannot_be_used_are_named_in_one_error(tmp_path: Path, make_corpus: Callable[..., Manifest]) -> None:
    texts = ["ab", "axb", "", None, "abababababababab", "aaaaaaaa", "abababab", "a b"]
    waves = [np.zeros(400 + 320 * 9, np.float32)] * len(texts)  # 10 frames
    manifest = make_corpus(tmp_path, waves, texts=texts)
    with pytest.raises(ValueError) as caught:
        task(manifest, Vocabulary(["a", "b"]))
    message = str(caught.value)
    assert "6 transcripts cannot be used" in message and str(manifest.folder) in message
    for line in (
        "'u01': 'axb' has ['x'], not in the vocabulary", "'u02': no transcript", "'u03': no transcript",
        "'u04': 16 characters do not fit 10 frames", "'u05': 8 characters do not fit 10 frames",  # 7 blanks between the same
        "'u07': 'a b' has [' '], not in the vocabulary",
    ):  # fmt: skip
        assert line in message
    assert "u00" not in message and "u06" not in message


def trained(job: CTCTask) -> set[str]:
    return {
        name.split(".")[1] if name.startswith("encoder") else "head" for name, p in job.model.named_parameters() if p.requires_grad
    }


def test_phases_freeze_the_encoder_first_and_the_front_end_always(tmp_path: Path, make_corpus: Callable[..., Manifest]) -> None:
    manifest = make_corpus(tmp_path, [spell("ab")], texts=["ab"])
    vocabulary = Vocabulary(["a", "b"])
    job = task(manifest, vocabulary, freeze_steps=3)
    assert [job.phase(step) for step in (0, 2, 3, 9)] == [0, 0, 1, 1]
    job.enter_phase(0)
    assert trained(job) == {"head"}
    job.enter_phase(1)
    rest = {"head", "feature_norm", "project", "mask_embedding", "positional", "norm", "layers"}
    assert trained(job) == rest
    job = task(manifest, vocabulary, freeze_front_end=False, mask_start_probability=0.0)
    job.enter_phase(job.phase(0))
    assert trained(job) == (rest | {"front_end"}) - {"mask_embedding"}
    scratch = task(manifest, vocabulary, pretrained=False, freeze_steps=3)  # random weights are worth no freezing
    scratch.enter_phase(scratch.phase(0))
    assert trained(scratch) == rest | {"front_end"}


def test_training_masks_spans_of_time_and_channels_and_validation_nothing(
    tmp_path: Path, make_corpus: Callable[..., Manifest]
) -> None:
    manifest = make_corpus(tmp_path, [spell("ab cd ab cd"), spell("abc")], texts=["ab cd ab cd", "abc"])
    job = task(manifest, Vocabulary.of(["ab cd"]), mask_channel_probability=0.05, mask_channel_length=4)
    batch = job.collate(np.array([0, 1]), 0)
    assert batch.mask is not None and batch.channel_mask is not None
    assert batch.layout.num_frames == (82, 22) and len(batch.mask) == 104
    assert all(mask.any() and not mask.all() for mask in batch.layout.split(batch.mask)) and batch.channel_mask.shape == (2, 64)
    assert batch.num_targets == (11, 3) and batch.targets[1, 3:].tolist() == [0] * 8
    job.valid_set = job.train_set
    plain = job.collate_validation(np.array([0, 1]))
    assert plain.mask is None and plain.channel_mask is None and torch.equal(plain.waveforms, batch.waveforms)
    assert torch.equal(job.collate(np.array([0, 1]), 0).mask, batch.mask) and job.model(batch).total.isfinite()


class Rows(list):
    """As much of a manifest as the draw needs."""

    folder = Path("manifest")

    @property
    def lengths(self) -> np.ndarray:
        return np.array([row.length for row in self])


class Row:
    def __init__(self, speaker: str | None, length: int, text: str | None = "a"):
        self.speaker, self.length, self.text = speaker, length, text


def rows(seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(
        Row(f"s{int(rng.integers(4))}", int(rng.integers(8000, 48000)), "a" if rng.random() < 0.9 else None) for _ in range(200)
    )


def test_a_smaller_draw_of_labelled_speech_lies_inside_a_larger_one() -> None:
    corpus = rows()
    draws = [draw_labelled(corpus, minutes, seed=3).tolist() for minutes in (0.1, 0.5, 2.0, 4.0)]  # type: ignore[arg-type]
    for smaller, larger, minutes in zip(draws, draws[1:], (0.1, 0.5, 2.0), strict=False):
        assert larger[: len(smaller)] == smaller
        seconds = corpus.lengths[smaller].sum() / 16000
        assert minutes * 60 <= seconds < minutes * 60 + 3
    assert draw_labelled(corpus, 0.5, seed=4).tolist() != draws[1]  # type: ignore[arg-type]
    assert all(corpus[row].text for row in draws[-1]) and len(set(draws[-1])) == len(draws[-1])


def test_speakers_take_turns() -> None:
    corpus = rows()
    drawn = draw_labelled(corpus, 0.8, seed=0)  # type: ignore[arg-type]
    counts = np.unique([corpus[row].speaker for row in drawn], return_counts=True)[1]
    assert len(counts) == 4 and counts.max() - counts.min() <= 1


def test_without_a_budget_everything_transcribed_is_used_and_too_large_a_budget_is_refused() -> None:
    corpus = rows()
    assert draw_labelled(corpus, None, 0).tolist() == [i for i, row in enumerate(corpus) if row.text]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_minutes = 60\.0 but only \d\.\d minutes are transcribed"):
        draw_labelled(corpus, 60.0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no utterance has a transcript"):
        draw_labelled(Rows([Row("s", 8000, None)]), None, 0)  # type: ignore[arg-type]


def test_a_tiny_recogniser_learns_four_utterances_of_tones_and_transcribes_them(
    tmp_path: Path, encoder_run: Path, make_corpus: Callable[..., Manifest]
) -> None:
    manifest = make_corpus(tmp_path, [spell(text) for text in TEXTS], texts=[text.upper() for text in TEXTS])
    settings = config(tmp_path, manifest, initialization="random", training={"max_steps": 150, "log_every": 50})
    summary = finetune(settings)
    assert summary["loss_last"] < 0.1 < summary["loss_first"]
    assert summary["utterances"] == 4 and summary["vocabulary"] == 6
    assert summary["label_minutes"] == pytest.approx(sum(map(len, TEXTS)) * 0.15 / 60)
    result = transcribe(
        TranscribeConfig(out=str(tmp_path / "text"), manifest=str(manifest.folder), split="train", recognizer=settings.out)
    )
    table = pq.read_table(tmp_path / "text" / "transcripts.parquet").to_pydict()
    assert table["id"] == manifest.ids and table["hypothesis"] == table["text"] == TEXTS
    assert result["wer"] == result["cer"] == 0 and result["scored_utterances"] == 4 and result["reference_words"] == 6
    with pytest.raises(ValueError, match="already holds a finished artefact"):
        transcribe(
            TranscribeConfig(out=str(tmp_path / "text"), manifest=str(manifest.folder), split="train", recognizer=settings.out)
        )


def test_wer_and_cer_count_edits_over_the_corpus_and_only_rows_with_a_transcript(
    tmp_path: Path, encoder_run: Path, make_corpus: Callable[..., Manifest]
) -> None:
    texts = ["ab cd", None, "DA, da!", ""]
    manifest = make_corpus(tmp_path, [spell("ab cd"), spell("ab"), spell("da da"), spell("c")], texts=texts)
    settings = config(tmp_path, manifest, characters="abcd ")
    finetune(settings)
    for batch_seconds in (60.0, 0.5):
        out = tmp_path / f"text{batch_seconds}"
        result = transcribe(TranscribeConfig(
            out=str(out), manifest=str(manifest.folder), split=None, recognizer=settings.out, batch_seconds=batch_seconds,
        ))  # fmt: skip
        table = pq.read_table(out / "transcripts.parquet").to_pydict()
        assert table["text"] == ["ab cd", None, "da da", None] and result["utterances"] == 4
        said = [table["hypothesis"][0], table["hypothesis"][2]]
        assert result["scored_utterances"] == 2 and result["reference_words"] == 4
        assert result["wer"] == jiwer.wer(["ab cd", "da da"], said) and result["cer"] == jiwer.cer(["ab cd", "da da"], said)


def test_fine_tuning_starts_from_the_pretrained_weights_and_keeps_what_it_needs(
    tmp_path: Path, encoder_run: Path, make_corpus: Callable[..., Manifest]
) -> None:
    manifest = make_corpus(tmp_path, [spell(text) for text in TEXTS], texts=TEXTS)
    finetune(config(tmp_path, manifest, ctc={"freeze_steps": 100}))
    pretrained, _ = load_encoder(encoder_run)
    model, vocabulary, text, fingerprint = load_recognizer(tmp_path / "recognizer")
    for name, weight in pretrained.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], weight)  # frozen for all of the run
    assert vocabulary.symbols == ["a", "b", "c", "d", "|"] and text == TextConfig() and len(fingerprint) == 16
    again, _ = load_encoder(tmp_path / "recognizer")
    assert again.config == pretrained.config
    with pytest.raises(ValueError, match="has no vocabulary; give a `finetune` run"):
        load_recognizer(encoder_run)


def test_transcripts_outside_the_given_characters_stop_fine_tuning(
    tmp_path: Path, encoder_run: Path, make_corpus: Callable[..., Manifest]
) -> None:
    manifest = make_corpus(tmp_path, [spell(text) for text in TEXTS], texts=TEXTS)
    with pytest.raises(
        ValueError, match=r"2 transcripts cannot be used:\n  'u00': 'ab cd' has \['d'\].*\n  'u01': 'da' has \['d'\]"
    ):
        finetune(config(tmp_path, manifest, characters="abc "))


def test_the_vocabulary_is_the_corpuss_or_the_given_characters_each_once(
    tmp_path: Path, encoder_run: Path, make_corpus: Callable[..., Manifest]
) -> None:
    splits = ["train", "train", "dev", "test"]
    texts = ["ab", "c", "d", "\u017c"]
    manifest = make_corpus(tmp_path, [spell(text) for text in ("ab", "c", "d", "a")], texts=texts, splits=splits)
    summary = finetune(config(tmp_path, manifest, label_minutes=0.002))  # the draw misses letters, the corpus does not
    assert summary["utterances"] == 1 and load_recognizer(tmp_path / "recognizer")[1].symbols == ["a", "b", "c", "d"]
    finetune(config(tmp_path, manifest, characters="dcbaa e\u0301", out=str(tmp_path / "given")))  # e and a combining accent
    assert load_recognizer(tmp_path / "given")[1].symbols == ["d", "c", "b", "a", "|", "\u00e9"]


def test_utterances_too_long_for_a_batch_are_counted_as_left_out(
    tmp_path: Path, encoder_run: Path, make_corpus: Callable[..., Manifest]
) -> None:
    manifest = make_corpus(tmp_path, [spell("ab"), spell("abcdabcd")], texts=["ab", "abcdabcd"])
    summary = finetune(config(tmp_path, manifest, batches={"crop_seconds": 0.5}))
    assert (summary["utterances"], summary["utterances_left_out"]) == (1, 1)
    assert summary["label_minutes"] == pytest.approx(0.3 / 60)
