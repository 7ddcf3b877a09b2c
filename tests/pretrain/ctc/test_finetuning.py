import json
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.finetuning import finetune, require_transcripts
from pretrain.ctc.model import load_recognizer
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import transcribe
from pretrain.data.manifest import Manifest
from pretrain.model.encoder import load_encoder
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import load_weights
from tests.pretrain.ctc.tones import TEXTS, MakeCorpus, save_encoder, settings, spell


@pytest.fixture
def manifest(tmp_path: Path, make_corpus: MakeCorpus) -> Manifest:
    """Four utterances to train on, beside an untrained encoder; no other split."""
    save_encoder(tmp_path / "encoder")
    return make_corpus(tmp_path, [spell(text) for text in TEXTS], texts=[text.upper() for text in TEXTS])


def corpus(folder: Path, make_corpus: MakeCorpus, **said: list[str | None]) -> Manifest:
    """Splits by name, with what their transcripts say; where that is no tones, ab is heard."""
    save_encoder(folder / "encoder")
    texts = [text for split in said.values() for text in split]
    heard = [text if text and set(text) <= set("abcd ") else "ab" for text in texts]
    splits = [name for name, split in said.items() for _ in split]
    return make_corpus(folder, [spell(text) for text in heard], texts=texts, splits=splits)


def test_a_tiny_recogniser_learns_four_utterances_of_tones_and_transcribes_them(
    tmp_path: Path, manifest: Manifest
) -> None:
    config = settings(tmp_path, manifest, init="random", training={"max_steps": 150, "log_every": 50})
    summary = finetune(config)
    assert summary["loss_last"] < 0.1 < summary["loss_first"]
    assert summary["utterances"] == 4 and summary["vocabulary"] == 6 and summary["quarantined"] == 0
    assert summary["label_minutes"] == pytest.approx(sum(map(len, TEXTS)) * 0.15 / 60)
    reading = TranscribeConfig(
        out=str(tmp_path / "text"), manifest=str(manifest.folder), split="train", recognizer=config.out
    )
    result = transcribe(reading)
    table = pq.read_table(tmp_path / "text" / "transcripts.parquet").to_pydict()
    assert table["id"] == manifest.ids and table["hypothesis"] == table["text"] == TEXTS
    assert (
        result["wer"] == result["cer"] == 0
        and result["scored_utterances"] == 4
        and result["reference_words"] == 6
    )


def test_fine_tuning_starts_from_the_pretrained_weights_and_keeps_what_it_needs(
    tmp_path: Path, manifest: Manifest
) -> None:
    finetune(settings(tmp_path, manifest, ctc={"freeze_steps": 100}))
    pretrained, fingerprint = load_encoder(tmp_path / "encoder")
    found = load_recognizer(tmp_path / "recognizer")
    for name, weight in pretrained.state_dict().items():
        assert torch.equal(found.model.encoder.state_dict()[name], weight)  # frozen for all of the run
    assert found.vocabulary.symbols == ["a", "b", "c", "d", "|"]
    assert found.meta["parents"] == {"manifest": manifest.fingerprint, "encoder": fingerprint}
    assert load_encoder(tmp_path / "recognizer")[0].config == pretrained.config


def test_random_weights_are_of_the_seed_and_not_of_what_lies_in_the_encoder(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    texts = ["ab cd", "da"]
    manifest = make_corpus(tmp_path, [spell(text) for text in texts], texts=texts)
    weights = []
    for name, training in (("one", {}), ("two", {}), ("other", {"seed": 1})):
        save_encoder(tmp_path / "encoder")
        out = str(tmp_path / name)
        config = settings(
            tmp_path, manifest, out=out, init="random", training=training, optimizer={"lr": 1e-12}
        )
        finetune(config)
        weights.append(load_weights(out)[0])
    assert torch.equal(weights[0]["encoder.layers.0.qkv.weight"], weights[1]["encoder.layers.0.qkv.weight"])
    assert not torch.allclose(
        weights[0]["encoder.layers.0.qkv.weight"], weights[2]["encoder.layers.0.qkv.weight"]
    )
    assert not torch.allclose(weights[2]["head.weight"], weights[0]["head.weight"])


def test_the_word_error_rate_of_a_validation_is_that_of_transcribe(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    """Of every utterance of the split, also those longer than any that is trained on."""
    long = "ab cd da bb ca cab ab"
    manifest = corpus(tmp_path, make_corpus, train=["ab cd", "da", "cab"], dev=["da ca", long, "bb"])
    config = settings(
        tmp_path,
        manifest,
        init="random",
        batches={"batch_seconds": 2.0, "crop_seconds": 2.0},
        training={"max_steps": 60, "validate_every": 20},
    )
    summary = finetune(config)
    assert summary["valid_utterances"] == 3
    for checkpoint in ("best", "last"):
        said = transcribe(
            TranscribeConfig(
                out=str(tmp_path / checkpoint),
                manifest=str(manifest.folder),
                split="dev",
                recognizer=config.out,
                checkpoint=checkpoint,
            )
        )
        table = pq.read_table(tmp_path / checkpoint / "transcripts.parquet").to_pydict()
        assert jiwer.wer(table["text"], table["hypothesis"]) == pytest.approx(said["wer"])
        assert said["wer"] == pytest.approx(
            summary["best_valid_wer" if checkpoint == "best" else "valid_wer"]
        )
        if checkpoint == "last":
            assert jiwer.cer(table["text"], table["hypothesis"]) == pytest.approx(summary["valid_cer"])


def test_a_budget_is_drawn_of_what_can_be_used_and_written_as_a_manifest(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    train = ["ab", "cd", "abcdabcd", "ca", None, "", "da"]
    manifest = corpus(tmp_path, make_corpus, train=train, dev=["ab"])
    drawn_by_row: dict[str, Any] = {
        "ctc": {"mask_start_probability": 0.05, "mask_length": 3},
        "batches": {"crop_seconds": 0.5},
    }
    config = settings(
        tmp_path,
        manifest,
        budget="0.5s",
        budget_seed=1,
        bad_transcripts="quarantine",
        characters="abcd",
        **drawn_by_row,
    )
    summary = finetune(config)
    subset = Manifest(tmp_path / "recognizer" / "subset")
    assert summary["utterances"] == len(subset) == 2 and set(subset.ids) <= {"u00", "u01", "u03", "u06"}
    assert (
        summary["label_minutes"]
        == pytest.approx(0.6 / 60)
        == read_meta(tmp_path / "recognizer")["label_minutes"]
    )
    assert summary["utterances_left_out"] == 1  # the long one
    lines = (tmp_path / "recognizer" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["u05"]
    assert summary["quarantined"] == 1 and sum(summary["quarantined_because"].values()) == 1
    # The draw was not in the file's order. Used again it is the same run, judged by the dev set of the
    # corpus.
    again = settings(
        tmp_path,
        subset,
        out=str(tmp_path / "again"),
        valid_manifest=str(manifest.folder),
        characters="abcd",
        **drawn_by_row,
    )
    other = finetune(again)
    assert (other["valid_loss"], other["loss_last"]) == (summary["valid_loss"], summary["loss_last"])
    assert load_weights(again.out)[2] == load_weights(config.out)[2]


def test_an_interrupted_run_keeps_its_subset_and_no_other_draw_goes_on_with_it(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(*_: Any, **__: Any) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr("pretrain.ctc.finetuning.train", power_cut)
        finetune(settings(tmp_path, manifest, budget="1s"))
    drawn = Manifest(tmp_path / "recognizer" / "subset").ids
    with pytest.raises(ValueError, match=r"subset: holds another labelled subset \(.*seed"):
        finetune(settings(tmp_path, manifest, budget="1s", budget_seed=1))
    assert finetune(settings(tmp_path, manifest, budget="1s"))["utterances"] == len(drawn)
    assert Manifest(tmp_path / "recognizer" / "subset").ids == drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"characters": "abc "},
            r"2 transcripts cannot be used \(2 not in the vocabulary\):\n  'u00': 'ab cd' has \['d'\].*\n  "
            r"'u01'.*\nMend",
        ),
        ({"budget": "3h"}, r"budget = '3h' is 180\.00 minutes, but only 0\.04"),
        (
            {"valid_split": "dev"},
            "no utterances of split 'dev'; it has train; .* name the corpus as valid_manifest",
        ),
        ({"split": "test"}, "no utterances of split 'test'; it has train"),
        ({"text": {"spelling": "phones"}}, "no utterance of 'train' has phones"),
        (
            {"batches": {"crop_seconds": 0.2}},
            "every utterance with a transcript is shorter than .* or longer than batches.crop_seconds = 0.2",
        ),
        ({"training": {"patience": 2, "validate_every": 1}}, "training.patience needs a validation set"),
        ({"valid_manifest": "elsewhere"}, "elsewhere: no such manifest"),
        ({"encoder": "nowhere"}, "nowhere: holds no checkpoint"),
        ({"characters": "a", "bad_transcripts": "quarantine"}, "None is left to learn from"),
    ],
)
def test_what_cannot_be_fine_tuned_is_named(
    tmp_path: Path, manifest: Manifest, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(settings(tmp_path, manifest, **changes))
    assert not (tmp_path / "recognizer" / "meta.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "labels", "encoder": "encoder"}, "one of them"),
        ({}, "one of them"),
        ({"encoder": "encoder", "units": {"levels": 2}}, "units are about `labels`"),
        ({"encoder": "encoder", "unit_encoder": {"architecture": "tiny"}}, "unit_encoder are about `labels`"),
        (
            {"labels": "labels", "init": "recognizer"},
            "init = 'recognizer': .* begins with random weights",
        ),
        (
            {"labels": "labels", "init": "pretrained"},
            "init = 'pretrained': .* begins with random weights",
        ),
        (
            {"labels": "labels", "unit_encoder": {"front_end": "filterbank"}},
            'unit_encoder\n.*front_end = "filterbank": it reads `labels`',
        ),
        (
            {"labels": "labels", "unit_encoder": {"normalize_waveform": True}},
            "unit_encoder\n.*normalize_waveform = true: it reads",
        ),
        ({"encoder": "encoder", "budget": "ten minutes"}, "'ten minutes' is no budget"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.model_validate({"out": "o", "manifest": "m", "training": {"max_steps": 1}, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": "random"},
        {"unit_encoder": {"architecture": "large", "front_end": "units", "num_units": 5}},
    ],
)
def test_settings_that_say_what_units_mean_anyway_are_none_of_those(changes: dict[str, Any]) -> None:
    tree = {"out": "o", "manifest": "m", "labels": "labels", "training": {"max_steps": 1}, **changes}
    assert FinetuneConfig.model_validate(tree).labels == "labels"


def test_an_empty_valid_split_is_none_or_all_of_the_valid_manifest(
    tmp_path: Path, make_corpus: MakeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = corpus(tmp_path, make_corpus, train=["ab cd", "da"], dev=["ba"], test=["cab"])
    summary = finetune(settings(tmp_path, manifest, valid_split=""))
    assert summary["valid_utterances"] == 0 and "note" not in summary and "valid_wer" not in summary
    every = settings(
        tmp_path, manifest, out=str(tmp_path / "every"), valid_split="", valid_manifest=str(manifest.folder)
    )
    assert finetune(every)["valid_utterances"] == 4
    whole = finetune(settings(tmp_path, manifest, out=str(tmp_path / "whole"), split=""))
    assert whole["utterances"] == 4


def test_a_dev_split_that_is_there_only_by_default_may_be_missing_and_that_is_said(
    tmp_path: Path, manifest: Manifest, make_corpus: MakeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = finetune(settings(tmp_path, manifest))
    assert "no utterances of valid_split = 'dev'" in summary["note"] and summary["valid_utterances"] == 0
    assert summary["note"] in capsys.readouterr().err and "best_step" not in summary
    untold = corpus(tmp_path / "untold", make_corpus, train=["ab"], dev=[None])
    told = settings(tmp_path / "untold", untold)
    assert "no utterance of valid_split = 'dev' has a transcript" in finetune(told)["note"]
    with pytest.raises(
        ValueError, match="no utterance of valid_split = 'dev' has a transcript; name another"
    ):
        finetune(settings(tmp_path / "untold", untold, out=str(tmp_path / "other"), valid_split="dev"))


def test_a_validation_on_what_is_trained_on_and_an_encoder_that_never_learns_are_said(
    tmp_path: Path, make_corpus: MakeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = corpus(tmp_path, make_corpus, train=["ab cd", "da", "cab"], dev=["ba"])
    said = finetune(settings(tmp_path, manifest, valid_split="train", budget="0.5s", ctc={"freeze_steps": 4}))
    drawn = said["utterances"]
    assert 1 <= drawn < 3 and f"{drawn} of the 3 utterances of the validation are trained on" in said["note"]
    assert "the head alone learns: ctc.freeze_steps = 4, training.max_steps = 4" in said["note"]
    assert set(said["note"].split("; ")) <= set(capsys.readouterr().err.splitlines())
    plain = {"out": str(tmp_path / "plain"), "ctc": {"freeze_steps": 3}}
    assert "note" not in finetune(settings(tmp_path, manifest, **plain))
    scratch = {"out": str(tmp_path / "scratch"), "ctc": {"freeze_steps": 9}, "init": "random"}
    assert "note" not in finetune(settings(tmp_path, manifest, **scratch))  # which freezes nothing


def test_the_vocabulary_is_the_corpuss_whatever_is_drawn_or_the_given_characters(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    manifest = corpus(tmp_path, make_corpus, train=["ab", "c"], dev=["d"], test=["\u017c"])
    assert finetune(settings(tmp_path, manifest, budget="0.1s"))["utterances"] == 1
    assert load_recognizer(tmp_path / "recognizer").vocabulary.symbols == ["a", "b", "c", "d"]
    # e and a combining accent
    finetune(settings(tmp_path, manifest, characters="dcbaa e\u0301", out=str(tmp_path / "given")))
    assert load_recognizer(tmp_path / "given").vocabulary.symbols == ["d", "c", "b", "a", "|", "\u00e9"]


def test_a_recogniser_can_go_on_with_its_head_and_vocabulary(
    tmp_path: Path, manifest: Manifest, make_corpus: MakeCorpus
) -> None:
    first = settings(tmp_path, manifest, ctc={"layers": "weighted"})
    finetune(first)
    known = load_recognizer(first.out)
    less = corpus(tmp_path / "less", make_corpus, train=["ab", "ba"])  # without c and d
    on: dict[str, Any] = {"encoder": first.out, "init": "recognizer", "optimizer": {"lr": 1e-12}}
    finetune(settings(tmp_path, less, out=str(tmp_path / "on"), ctc={"layers": "weighted"}, **on))
    again = load_recognizer(tmp_path / "on")
    assert again.vocabulary == known.vocabulary and again.meta["parents"]["encoder"] == known.fingerprint
    for name, weight in known.model.state_dict().items():  # a rate of nearly nothing
        torch.testing.assert_close(again.model.state_dict()[name], weight, rtol=0, atol=1e-9)
    strange = corpus(tmp_path / "strange", make_corpus, train=["ab", "axb"])
    for changes, message in (
        (
            {"characters": "abx "},
            r"fine-tuned with another vocabulary of 6 classes \(without \['x'\], with \['c', 'd'\]",
        ),
        ({"characters": "dcba "}, r"another vocabulary of 6 classes \(in another order\); leave"),
        (
            {"characters": "ab"},
            r"another vocabulary of 6 classes \(with \['c', 'd', '\|'\] that are not here\); leave",
        ),
        ({"text": {"case": "upper"}}, "another `text` \\(case is 'lower' there, 'upper' here\\)"),
        ({"ctc": {"layers": "last"}}, 'ctc.layers = "last", but the head of .* reads "weighted"'),
        ({}, r"'u01': 'axb' has \['x'\], not in the vocabulary"),
    ):
        tree: dict[str, Any] = {
            "out": str(tmp_path / "refused"),
            "ctc": {"layers": "weighted"},
            **on,
            **changes,
        }
        with pytest.raises(ValueError, match=message):
            finetune(settings(tmp_path, strange, **tree))


def test_an_encoder_can_be_made_to_stream_and_a_streaming_one_stays_so(
    tmp_path: Path, manifest: Manifest
) -> None:
    streaming = {"chunk_frames": 8, "look_ahead_frames": 2, "left_chunks": 2}
    finetune(settings(tmp_path, manifest, streaming=streaming))
    found = load_recognizer(tmp_path / "recognizer").model.encoder.config.streaming
    assert found is not None and found.resolved() == streaming
    on = settings(
        tmp_path,
        manifest,
        out=str(tmp_path / "on"),
        encoder=str(tmp_path / "recognizer"),
        init="recognizer",
    )
    finetune(on)
    assert load_recognizer(on.out).model.encoder.config.streaming == found
    wider = {"chunk_frames": 16, "look_ahead_frames": 0}
    other = settings(
        tmp_path,
        manifest,
        out=str(tmp_path / "other"),
        encoder=on.out,
        init="recognizer",
        streaming=wider,
    )
    finetune(other)
    changed = load_recognizer(other.out).model.encoder.config.streaming
    assert changed is not None and changed.chunk_frames == 16


def test_settings_of_regularisation_replace_the_encoders_own_and_only_when_given(
    tmp_path: Path, manifest: Manifest
) -> None:
    finetune(settings(tmp_path, manifest, ctc={"layer_drop": 0.25, "attention_dropout": 0.5}))
    found = load_recognizer(tmp_path / "recognizer").model.encoder.config
    assert (found.layer_drop, found.attention_dropout, found.dropout) == (0.25, 0.5, 0.0)
    assert np.isclose(
        found.activation_dropout, load_encoder(tmp_path / "encoder")[0].config.activation_dropout
    )


def test_a_dev_split_of_bad_transcripts_alone_judges_nothing_where_they_are_to_be_left_out(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    manifest = corpus(tmp_path, make_corpus, train=["ab", "ba", "abb"], dev=["", ""])
    quick: dict[str, Any] = {"training": {"max_steps": 1}, "bad_transcripts": "quarantine"}
    summary = finetune(settings(tmp_path, manifest, **quick))
    assert (
        summary["valid_utterances"] == 0
        and "no validation: " in summary["note"]
        and "2 empty" in summary["note"]
    )
    with pytest.raises(ValueError, match="None is left to learn from"):
        finetune(settings(tmp_path, manifest, out=str(tmp_path / "asked"), valid_split="dev", **quick))


def test_too_few_transcripts_are_seen_without_an_encoder(tmp_path: Path, make_corpus: MakeCorpus) -> None:
    manifest = corpus(tmp_path, make_corpus, train=["ab", "ba"], dev=["a"])
    config = settings(tmp_path, manifest, encoder=str(tmp_path / "not_yet"), budget="1min")
    with pytest.raises(ValueError, match=r"budget = '1min' is 1\.00 minutes, but only 0\.01"):
        require_transcripts(config)
    require_transcripts(config.model_copy(update={"budget": "all"}))
