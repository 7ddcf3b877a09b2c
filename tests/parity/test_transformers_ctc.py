"""Recognisers as transformers' Wav2Vec2ForCTC and HubertForCTC, out and in: the pipeline writes what
`transcribe` writes.

A drawn head changes its mind at every frame, so that texts have doubled letters, leading, trailing and
doubled spaces. transformers keeps doubled spaces, `transcribe` has single ones: texts are compared with
single spaces.
"""

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from pretrain.config import parse_config
from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.finetuning import finetune
from pretrain.ctc.model import CTCBatch, LoadedRecognizer, Recognizer, greedy, load_recognizer
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import transcribe
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.packing import pack
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import load_encoder
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import save_checkpoint
from pretrain.weights.conversion import ImportConfig, import_weights
from pretrain.weights.exporting import export_weights
from tests.parity.peers import NO_DROPOUT, scatter, transformers_model
from tests.parity.test_transformers_export import load_silently
from tests.pretrain.conftest import write_corpus

pytestmark = pytest.mark.slow  # `make test` is to stay short

transformers = pytest.importorskip("transformers")

LETTERS = ["'", "a", "b", "|", "é", "ß"]
KINDS: dict[str, dict[str, Any]] = {
    "base": {"conv_norm": "group", "norm_first": False, "normalize_waveform": False},
    "large": {"conv_norm": "layer", "norm_first": True, "normalize_waveform": True, "conv_bias": True},
}
TINY = {"architecture": "tiny", "front_end": "waveform", "layer_drop": 0.0}


def recognizer(
    folder: Path, vocabulary: Vocabulary, kind: str = "base", objective: str | None = "wav2vec2", **more: Any
) -> Path:
    """A run of `finetune` with drawn weights, as a checkpoint leaves it."""
    torch.manual_seed(0)
    config = parse_config(EncoderConfig, {**TINY, **KINDS[kind], **more.pop("encoder", {})}, "test")
    model = Recognizer(config, vocabulary, layers=more.pop("layers", "last"))
    scatter(model, 0.05)
    with torch.no_grad():
        model.head.weight.mul_(20.0)
    text, ctc = more.pop("text", TextConfig(spelling="characters")), more.pop("ctc", CTCConfig())
    extra = {
        "vocabulary": vocabulary.to_meta(),
        "config_encoder": config.resolved(),
        "codebook": None,
        "objective": objective,
    }
    state = {"kind": "recognizer", "extra": extra, "config": {"text": text.resolved(), "ctc": ctc.resolved()}}
    save_checkpoint(
        folder, more.pop("step", 1), model, torch.optim.AdamW(model.parameters()), {**state, **more}
    )
    return folder


def waves(count: int = 4) -> list[np.ndarray]:
    """Noise of different lengths, loudness and offsets."""
    rng = np.random.default_rng(0)
    return [
        (rng.uniform(0.2, 1) * rng.standard_normal(n) + 0.02).astype(np.float32)
        for n in rng.integers(4000, 12000, count)
    ]


def logits_of(loaded: LoadedRecognizer, wave: np.ndarray) -> Tensor:  # (frames, classes)
    buffer, layout = pack([wave])
    with torch.no_grad():
        return loaded.model.logits(CTCBatch.untranscribed(buffer, layout))[0]


def texts_of(run: Path, folder: Path, spoken: list[np.ndarray]) -> list[str]:
    """By the verb `transcribe`, in the order of `spoken`."""
    manifest = write_corpus(folder / "corpus", spoken)
    transcribe(
        TranscribeConfig(
            out=str(folder / "said"),
            manifest=str(manifest.folder),
            split=None,
            recognizer=str(run),
            device="cpu",
        )
    )
    return [
        str(text) for text in pq.read_table(folder / "said" / "transcripts.parquet")["hypothesis"].to_pylist()
    ]


def pipeline(folder: Path) -> Any:
    return transformers.pipeline("automatic-speech-recognition", model=str(folder), device="cpu")


def single_spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["wav2vec2", "hubert"])
def test_the_pipeline_writes_what_transcribe_writes(
    kind: str, objective: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = recognizer(tmp_path / "run", Vocabulary(LETTERS), kind, objective)
    summary = export_weights(run, tmp_path / "out", "huggingface")
    assert summary["recognizer"] and summary["notes"] == []
    name = {"wav2vec2": "Wav2Vec2ForCTC", "hubert": "HubertForCTC"}[objective]
    theirs = load_silently(name, tmp_path / "out", caplog)
    loaded, spoken = load_recognizer(run), waves()
    feature_extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    for wave in spoken:
        given = feature_extractor(wave, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            logits = theirs(**given).logits[0]
        # float32 sums in another order beside logits up to 40: differences up to 4e-5. A normalised
        # waveform's variance gets 1e-5 in ours (as in fairseq) and 1e-7 in theirs, which at these loudnesses
        # is 1e-4 of its amplitude: up to 2e-4.
        torch.testing.assert_close(
            logits_of(loaded, wave), logits, rtol=0.0, atol=1e-3 if kind == "large" else 2e-4
        )
    transcriber, said = pipeline(tmp_path / "out"), texts_of(run, tmp_path, spoken)
    assert type(transcriber.model).__name__ == name
    assert [single_spaced(transcriber(wave)["text"]) for wave in spoken] == said
    assert (
        all(said) and len(set(said)) == len(said) and any(a == b for text in said for a, b in pairwise(text))
    )


def test_a_recogniser_that_learned_tones_is_exported_with_what_it_learned(tmp_path: Path) -> None:
    """The weights of the best checkpoint, not the last; words and single spaces come out as they were
    taught."""
    tones, texts = {"a": 300.0, "b": 700.0, " ": 0.0}, ["ab ba", "bb a", "a aab"]
    time = np.arange(1920) / 16000
    spoken = [
        np.concatenate([0.3 * np.sin(2 * np.pi * tones[c] * time) for c in text]).astype(np.float32)
        for text in texts
    ]
    vocabulary = Vocabulary(["a", "b", "|"])
    torch.manual_seed(0)
    config = parse_config(
        EncoderConfig, {**TINY, **KINDS["large"], "dropout": 0.0, "input_dropout": 0.0}, "test"
    )
    model = Recognizer(config, vocabulary)
    adam = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    targets = [torch.from_numpy(vocabulary.encode(text)) for text in texts]
    buffer, layout = pack(spoken)
    batch = CTCBatch(buffer, layout, torch.nn.utils.rnn.pad_sequence(targets, True), tuple(map(len, targets)))
    for _ in range(300):
        adam.zero_grad()
        loss = model.train()(batch)
        (loss.total / loss.count).backward()
        adam.step()
        if loss.total.item() < 0.05 * len(texts):
            break
    extra = {"vocabulary": vocabulary.to_meta(), "config_encoder": config.resolved(), "codebook": None}
    state = {
        "kind": "recognizer",
        "extra": extra,
        "config": {"text": TextConfig().resolved(), "ctc": CTCConfig().resolved()},
    }
    save_checkpoint(tmp_path / "run", 1, model, adam, state)
    with torch.no_grad():
        model.head.weight.zero_()
    save_checkpoint(tmp_path / "run", 2, model, adam, {**state, "best": {"step": 1}})
    summary = export_weights(tmp_path / "run", tmp_path / "out", "huggingface")
    assert any("does not say whether it is wav2vec 2.0 or HuBERT" in note for note in summary["notes"])
    transcriber = pipeline(tmp_path / "out")
    assert (
        [transcriber(wave)["text"] for wave in spoken]
        == texts
        == texts_of(tmp_path / "run", tmp_path, spoken)
    )
    words = transcriber(spoken[0], return_timestamps="word")["chunks"]
    assert [word["text"] for word in words] == ["ab", "ba"] and words[0]["timestamp"][1] <= words[1][
        "timestamp"
    ][0]


def test_an_export_reads_the_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read = recognizer(tmp_path / "run", Vocabulary(LETTERS)), []
    monkeypatch.setattr(
        "pretrain.training.checkpoint.load_file", lambda path: read.append(path) or load_file(path)
    )
    export_weights(run, tmp_path / "out", "huggingface")
    assert read == [run / "step_00000001" / "model.safetensors"]


def test_the_processor_spells_transcripts_as_the_vocabulary_does(tmp_path: Path) -> None:
    export_weights(
        recognizer(tmp_path / "run", Vocabulary(LETTERS), "large"), tmp_path / "out", "huggingface"
    )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "Wav2Vec2Processor" and processor.feature_extractor.do_normalize
    text = "aé b'aß"
    assert processor(text=text)["input_ids"] == Vocabulary(LETTERS).encode(text).tolist()
    assert (
        processor.tokenizer.pad_token_id == 0
        and processor.tokenizer.decode([0, 2, 2, 0, 2, 4, 3, 4]) == "aa b"
    )
    # not a class, and so no label: it cannot be trained on by mistake
    assert None in processor(text="ax")["input_ids"]


def test_config_json_says_how_the_recogniser_was_trained(tmp_path: Path) -> None:
    ctc = CTCConfig(
        final_dropout=0.25, mask_start_probability=0.065, mask_length=6, mask_channel_probability=0.002
    )
    run = recognizer(
        tmp_path / "run", Vocabulary(LETTERS), ctc=ctc, encoder={"dropout": 0.05, "layer_drop": 0.2}
    )
    export_weights(run, tmp_path / "out", "huggingface")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    told = (
        "final_dropout",
        "hidden_dropout",
        "layerdrop",
        "mask_time_prob",
        "mask_time_length",
        "mask_feature_length",
        "vocab_size",
    )
    assert [getattr(config, key) for key in told] == [0.25, 0.05, 0.2, 0.39, 6, 64, 7]
    assert (
        config.mask_feature_prob == 0.128
        and config.apply_spec_augment
        and config.ctc_loss_reduction == "mean"
    )
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, None, None)
    import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "again")))
    assert read_meta(tmp_path / "again", "recognizer")["config"]["ctc"] == ctc.resolved()
    plain = CTCConfig(mask_start_probability=0.0, mask_channel_probability=0.0)
    export_weights(
        recognizer(tmp_path / "plain", Vocabulary(LETTERS), ctc=plain), tmp_path / "bare", "huggingface"
    )
    model = transformers.AutoModelForCTC.from_pretrained(tmp_path / "bare")
    assert not model.config.apply_spec_augment and model.wav2vec2.masked_spec_embed is not None
    import_weights(ImportConfig(source=str(tmp_path / "bare"), out=str(tmp_path / "bare again")))
    back = read_meta(tmp_path / "bare again")["config"]["ctc"]
    assert (back["mask_start_probability"], back["mask_channel_probability"]) == (0.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_give_the_same_run(kind: str, tmp_path: Path) -> None:
    run = recognizer(tmp_path / "run", Vocabulary(LETTERS), kind, text=TextConfig(case="lower"))
    export_weights(run, tmp_path / "out", "huggingface")
    summary = import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "again")))
    assert summary["kind"] == "recognizer" and summary["vocabulary"] == 7
    ours, again = load_recognizer(run), load_recognizer(tmp_path / "again")
    assert (
        again.vocabulary == ours.vocabulary
        and again.text == ours.text
        and again.fingerprint == ours.fingerprint
    )
    not_told = {
        "architecture",
        "front_end",
        "num_mels",
        "feature_gradient_scale",
    }  # the name of the sizes, what only training needs
    configs = [
        model.model_dump(exclude=not_told)
        for model in (load_encoder(tmp_path / "again")[0].config, ours.model.encoder.config)
    ]
    assert configs[0] == configs[1]
    spoken = waves(2)
    assert texts_of(tmp_path / "again", tmp_path / "a", spoken) == texts_of(run, tmp_path / "b", spoken)
    export_weights(tmp_path / "again", tmp_path / "out again", "huggingface")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "out again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_our_loss_is_theirs(reduction: str, tmp_path: Path) -> None:
    """Summed, theirs is ours before it is divided by the symbols of the batch; "mean" divides utterance by
    utterance."""
    options = {**NO_DROPOUT, "vocab_size": 7, "ctc_loss_reduction": reduction, "pad_token_id": 0}
    theirs = transformers_model("Wav2Vec2ForCTC", "large", **options)
    theirs.save_pretrained(tmp_path / "peer")
    vocab(tmp_path / "peer", {"<pad>": 0, **{symbol: number for number, symbol in enumerate(LETTERS, 1)}})
    import_weights(
        ImportConfig(source=str(tmp_path / "peer"), out=str(tmp_path / "run"), normalize_waveform=False)
    )
    model, spoken = load_recognizer(tmp_path / "run").model, waves(3)
    targets = [torch.tensor(row) for row in ([1, 2, 2, 5], [3], [4, 4, 6, 1, 1, 2])]
    length = max(map(len, spoken))
    padded = torch.stack([torch.from_numpy(np.pad(wave, (0, length - len(wave)))) for wave in spoken])
    mask = torch.stack([torch.arange(length) < len(wave) for wave in spoken]).long()
    labels = torch.nn.utils.rnn.pad_sequence(targets, True, padding_value=-100)
    expected = theirs(padded, attention_mask=mask, labels=labels).loss
    buffer, layout = pack(spoken)
    single = []
    for wave, target in zip(spoken, targets, strict=True):
        one, place = pack([wave])
        single.append(model(CTCBatch(one, place, target[None], (len(target),))).total / len(target))
    batch = CTCBatch(buffer, layout, torch.nn.utils.rnn.pad_sequence(targets, True), tuple(map(len, targets)))
    found = model(batch).total if reduction == "sum" else torch.stack(single).mean()
    # float32 sums over frames in another order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


def vocab(folder: Path, table: dict[str, Any], **settings: Any) -> None:
    """A tokenizer's files as published models have them."""
    (folder / "vocab.json").write_text(json.dumps(table), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer", **settings})
    )


ENGLISH = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]  # wav2vec2-base-960h
RUSSIAN = [
    "|",
    "а",
    "б",
    "в",
    "-",
    "[UNK]",
    "[PAD]",
]  # as the fine-tunings of XLSR have it; <s> and </s> were added later
PUBLISHED: dict[str, tuple[str, str, dict[str, int], dict[str, Any], dict[str, int]]] = {
    "base-960h": (
        "Wav2Vec2ForCTC",
        "base",
        {token: number for number, token in enumerate(ENGLISH)},
        {"do_lower_case": False},
        {},
    ),
    "lower-cased": (
        "HubertForCTC",
        "large",
        {token: number for number, token in enumerate(ENGLISH)},
        {"do_lower_case": True},
        {},
    ),
    "xlsr": (
        "Wav2Vec2ForCTC",
        "large",
        {token: number for number, token in enumerate(RUSSIAN)},
        {
            "pad_token": "[PAD]",
            "unk_token": {"content": "[UNK]", "__type": "AddedToken"},
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
        {"<s>": 7, "</s>": 8},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recogniser_writes_the_same_after_import(name: str, tmp_path: Path) -> None:
    """Texts and logits, in our order of classes; special words that win a frame are spelled as the pipeline
    spells them."""
    kind, size, table, settings, added = PUBLISHED[name]
    blank = table[settings.get("pad_token", "<pad>")]
    rows = len(table) + len(added)
    theirs = transformers_model(kind, size, vocab_size=rows, pad_token_id=blank)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(10.0)
    source = tmp_path / "peer"
    theirs.save_pretrained(source)
    vocab(source, table, **settings)
    if added:
        (source / "added_tokens.json").write_text(json.dumps(added))
    transformers.Wav2Vec2FeatureExtractor(
        do_normalize=size == "large", return_attention_mask=size == "large"
    ).save_pretrained(source)
    summary = import_weights(ImportConfig(source=str(source), out=str(tmp_path / "run")))
    assert summary["kind"] == "recognizer" and not any("left out" in note for note in summary["notes"])
    loaded, spoken = load_recognizer(tmp_path / "run"), waves(6)
    expected = {"base-960h": "upper", "lower-cased": "lower", "xlsr": "lower"}[name]
    assert loaded.text == TextConfig(case=expected, punctuation="remove")  # type: ignore[arg-type]
    order = [blank, *(row for row in range(rows) if row != blank)]
    transcriber = pipeline(source)
    for wave in spoken:
        given = transcriber.feature_extractor(wave, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            logits = theirs(**given).logits[0][:, order]
        # as above; how much of 1e-4 of the amplitude reaches logits up to 40 hangs on the weights, which each
        # version draws otherwise
        torch.testing.assert_close(
            logits_of(loaded, wave), logits, rtol=0.0, atol=4e-3 if size == "large" else 2e-4
        )
    said = [single_spaced(transcriber(wave)["text"]) for wave in spoken]
    assert texts_of(tmp_path / "run", tmp_path, spoken) == said and all(said)
    # where the blank is 0 and <s> is a token still
    export_weights(tmp_path / "run", tmp_path / "out", "huggingface")
    again = pipeline(tmp_path / "out")
    assert [single_spaced(again(wave)["text"]) for wave in spoken] == said
    assert again.tokenizer.bos_token == "<s>" and again.tokenizer.unk_token == {"xlsr": "[UNK]"}.get(
        name, "<unk>"
    )
    import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "again")))
    assert load_recognizer(tmp_path / "again").fingerprint == loaded.fingerprint


@pytest.mark.parametrize("normalize", [True, False])
def test_what_transformers_saves_anew_is_the_same_run(normalize: bool, tmp_path: Path) -> None:
    """Its version 5 puts the feature extractor's settings into processor_config.json, and writes down every
    token."""
    run = recognizer(
        tmp_path / "run", Vocabulary(LETTERS), "large", encoder={"normalize_waveform": normalize}
    )
    export_weights(run, tmp_path / "out", "huggingface")
    transformers.AutoModelForCTC.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    transformers.AutoProcessor.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    summary = import_weights(ImportConfig(source=str(tmp_path / "saved"), out=str(tmp_path / "again")))
    ours, again = load_recognizer(run), load_recognizer(tmp_path / "again")
    assert (again.vocabulary, again.fingerprint) == (ours.vocabulary, ours.fingerprint)
    assert summary["normalize_waveform"] == normalize and not any(
        "preprocessor" in note for note in summary["notes"]
    )


def test_phones_come_out_with_spaces_between_them(tmp_path: Path) -> None:
    text = TextConfig(spelling="phones")
    vocabulary = Vocabulary(["AA", "T", "SH", "ɪ"], "phones")
    run = recognizer(tmp_path / "run", vocabulary, text=text)
    summary = export_weights(run, tmp_path / "out", "huggingface")
    assert any("phones with spaces between" in note for note in summary["notes"])
    spoken, transcriber = waves(3), pipeline(tmp_path / "out")
    assert [transcriber(wave)["text"] for wave in spoken] == texts_of(run, tmp_path, spoken)
    assert transcriber.tokenizer("SH AA T T").input_ids == vocabulary.encode("SH AA T T").tolist()
    (tmp_path / "out" / "language_model").mkdir()  # of a Wav2Vec2ProcessorWithLM
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    (tmp_path / "out" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "clean_up_tokenization_spaces": True})
    )
    summary = import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "again")))
    assert any("clean_up_tokenization_spaces" in note for note in summary["notes"])
    assert any("n-gram model (language_model/) is left out" in note for note in summary["notes"])
    again = load_recognizer(tmp_path / "again")
    assert (again.vocabulary, again.text, again.fingerprint) == (
        vocabulary,
        text,
        load_recognizer(run).fingerprint,
    )


def test_jamo_come_out_taken_apart_and_compose_to_what_transcribe_writes(tmp_path: Path) -> None:
    text = TextConfig(spelling="jamo")
    vocabulary = Vocabulary.of(["한국 말", "가나"], text)
    run = recognizer(tmp_path / "run", vocabulary, text=text)
    summary = export_weights(run, tmp_path / "out", "huggingface")
    assert any("normalize('NFC', text)" in note for note in summary["notes"])
    spoken, transcriber = waves(3), pipeline(tmp_path / "out")
    assert [single_spaced(transcriber(wave)["text"]) for wave in spoken] == texts_of(run, tmp_path, spoken)
    import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "again")))
    again = load_recognizer(tmp_path / "again")
    assert (again.vocabulary, again.text) == (vocabulary, text)


def pieces(folder: Path, kind: str) -> Path:
    """A tokenizer of pieces: `bpe` by words with a special token around texts, `unigram` with ▁, `bytes` byte
    by byte."""
    if kind == "unigram":
        tokenizer = Tokenizer(
            models.Unigram(
                [("<unk>", 0.0), ("▁a", -1.0), ("▁", -2.0), ("a", -2.0), ("b", -2.0), ("ab", -2.5)], 0
            )
        )
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "bytes":
        letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:40], "Ġ", "Ã", "©", "a", "b"]
        table = {letter: number for number, letter in enumerate(dict.fromkeys(letters))}
        tokenizer = Tokenizer(models.BPE({**table, "ab": len(table)}, [("a", "b")]))
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        tokenizer = Tokenizer(
            models.WordPiece({"[UNK]": 0, "[CLS]": 1, "a": 2, "##b": 3, "b": 4, "##a": 5}, unk_token="[UNK]")
        )
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.Whitespace(),
            decoders.WordPiece(cleanup=False),
        )
        tokenizer.add_special_tokens(["[CLS]"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bytes"])
def test_a_recogniser_of_pieces_is_exported_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    text = TextConfig(spelling="tokenizer", tokenizer=str(pieces(tmp_path, kind)))
    vocabulary = Vocabulary.of([], text)
    run = recognizer(tmp_path / "run", vocabulary, text=text)
    export_weights(run, tmp_path / "out", "huggingface")
    spoken, transcriber = waves(4), pipeline(tmp_path / "out")
    said = texts_of(run, tmp_path, spoken)
    assert [single_spaced(transcriber(wave)["text"]) for wave in spoken] == said and any(said)
    ours = load_recognizer(run)
    labels = transcriber.tokenizer("ab a b").input_ids
    theirs = load_file(tmp_path / "out" / "model.safetensors")["lm_head.bias"]
    # the rows of the same pieces
    assert torch.equal(theirs[labels], ours.model.head.bias[vocabulary.encode("ab a b")])
    import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "again")))
    again = load_recognizer(tmp_path / "again")
    assert again.vocabulary.symbols == vocabulary.symbols and again.fingerprint == ours.fingerprint
    assert texts_of(tmp_path / "again", tmp_path / "a", spoken) == said
    if kind != "wordpiece":  # whose special tokens around a text are not kept
        assert again.vocabulary == vocabulary


def test_fine_tuning_goes_on_from_an_import(tmp_path: Path) -> None:
    """And what comes out knows that it was a HuBERT, through the run that it was fine-tuned from."""
    export_weights(
        recognizer(tmp_path / "run", Vocabulary(["a", "b", "|"]), objective="hubert"),
        tmp_path / "out",
        "huggingface",
    )
    import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "in")))
    manifest = write_corpus(tmp_path / "corpus", waves(2), texts=["ab a", "ba"])
    for initialization in ("recognizer", "pretrained"):
        tree = {
            "out": str(tmp_path / initialization),
            "manifest": str(manifest.folder),
            "encoder": str(tmp_path / "in"),
            "init": initialization,
            "training": {"max_steps": 1, "device": "cpu"},
            "optimizer": {"lr": 1e-9},
        }
        finetune(parse_config(FinetuneConfig, tree, "test"))
        tuned, known = load_recognizer(tmp_path / initialization), load_recognizer(tmp_path / "in")
        new, old = (dict(loaded.model.named_parameters()) for loaded in (tuned, known))
        assert torch.allclose(new["head.weight"], old["head.weight"], atol=1e-6) == (
            initialization == "recognizer"
        )
        assert torch.allclose(new["encoder.project.weight"], old["encoder.project.weight"], atol=1e-6)
    summary = export_weights(tmp_path / "recognizer", tmp_path / "tuned", "huggingface")
    assert (
        summary["notes"] == [] and summary["weights"] == load_recognizer(tmp_path / "recognizer").fingerprint
    )
    assert type(transformers.AutoModelForCTC.from_pretrained(tmp_path / "tuned")).__name__ == "HubertForCTC"


def test_what_transformers_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    letters = Vocabulary(LETTERS)
    cases: dict[str, dict[str, Any]] = {
        "an encoder on filterbank features": {"encoder": {"front_end": "filterbank"}},
        "an encoder on units features": {"encoder": {"front_end": "units", "num_units": 5}},
        "a streaming encoder has no counterpart": {"encoder": {"streaming": {"chunk_frames": 8}}},
        'ctc.layers = "weighted" has no counterpart': {"layers": "weighted"},
    }
    for number, (message, options) in enumerate(cases.items()):
        run = recognizer(tmp_path / f"run {number}", letters, **options)
        with pytest.raises(ValueError, match=message):
            export_weights(run, tmp_path / "out", "huggingface")
        assert not (tmp_path / "out").exists()
    export_weights(run, tmp_path / "bare", "huggingface", encoder_only=True)  # of the weighted one
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["architectures"] == ["Wav2Vec2Model"]
    assert not (tmp_path / "bare" / "vocab.json").exists()


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (
            {"rus": {"<pad>": 0}, "eng": {"<pad>": 0}},
            {},
            r"vocab.json: vocabularies of several languages \(MMS\)",
        ),
        ({"<pad>": 0, "a": 1}, {"target_lang": "eng"}, "target_lang: vocabularies of several languages"),
        ({"[PAD]": 0, "a": 1}, {}, "the blank, '<pad>', is none of the 7 classes"),
        ({"a": 0, "<pad>": 1}, {}, "pad_token_id = 0 but the tokenizer's '<pad>' is number 1"),
        ({"<pad>": 0, "a": 1, "b": 1}, {}, "each token needs a number of its own"),
        (
            {"<pad>": 0, "a": 1, "A": 2},
            {"do_lower_case": True},
            "with do_lower_case two of its tokens are one",
        ),
        (
            {"<pad>": 0, "|": 1, " ": 2},
            {"word_delimiter_token": " "},
            "is a character here and not the space",
        ),
        ({"<pad>": 0, "a": 1}, {"replace_word_delimiter_char": "_"}, "replace_word_delimiter_char = '_'"),
        (
            {"<pad>": 0, "a": 1},
            {"tokenizer_class": "WhisperTokenizer"},
            "'WhisperTokenizer' is not supported; Wav2Vec2CTCTokenizer",
        ),
    ],
)
def test_tokenizers_that_cannot_be_read_are_refused_by_name(
    table: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    transformers_model("Wav2Vec2ForCTC", "base", vocab_size=7).save_pretrained(tmp_path / "peer")
    vocab(tmp_path / "peer", table, **settings)
    with pytest.raises(ValueError, match=message):
        import_weights(ImportConfig(source=str(tmp_path / "peer"), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_head_without_its_tokenizer_takes_a_vocabulary_by_hand(tmp_path: Path) -> None:
    transformers_model("Wav2Vec2ForCTC", "base", vocab_size=5).save_pretrained(tmp_path / "peer")
    (tmp_path / "letters.json").write_text(json.dumps({"<pad>": 0, "|": 1, "A": 2, ".": 3}))
    given = ImportConfig(
        source=str(tmp_path / "peer"), out=str(tmp_path / "run"), vocabulary=str(tmp_path / "letters.json")
    )
    import_weights(given)
    loaded = load_recognizer(tmp_path / "run")
    assert loaded.vocabulary.symbols == ["|", "A", ".", "<4>"]
    assert loaded.text == TextConfig(case="upper", punctuation="keep")
    assert greedy(torch.eye(5)[[2, 0, 2, 1, 3]][None], [5], loaded.vocabulary) == ["AA ."]


PHONES = {"-": 0, "AA": 1, "T": 2, "SH": 3, "[UNK]": 4}


@pytest.mark.parametrize(
    ("table", "symbols", "spelling"),
    [
        ({"a": 0, "b": 1, " ": 2, "[PAD]": 3, "[UNK]": 4}, ["a", "b", "|", "[UNK]"], "characters"),
        (PHONES, ["AA", "T", "SH", "[UNK]"], "phones"),
    ],
)
def test_a_vocabulary_by_hand_may_spell_the_space_as_one_or_be_of_phones(
    table: dict[str, int], symbols: list[str], spelling: str, tmp_path: Path
) -> None:
    transformers_model("Wav2Vec2ForCTC", "base", vocab_size=5).save_pretrained(tmp_path / "peer")
    (tmp_path / "given.json").write_text(json.dumps(table))
    import_weights(
        ImportConfig(
            source=str(tmp_path / "peer"), out=str(tmp_path / "run"), vocabulary=str(tmp_path / "given.json")
        )
    )
    assert load_recognizer(tmp_path / "run").vocabulary == Vocabulary(symbols, spelling)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "held", "message"),
    [
        (
            "given.json",
            json.dumps({**PHONES, "S": 5}),
            "given.json: has a token of number 5, but the CTC head has 5 classes",
        ),
        ("given.json", json.dumps({"-": 0, "AA": 1, "|": 2}), "a dictionary of pieces is not supported"),
        ("given.json", None, "given.json: no such file; give the dict.ltr.txt or the vocab.json"),
        ("", None, "no such file; give the dict.ltr.txt or the vocab.json"),  # a folder
        ("dict.ltr.txt", "a 5\nb 4\n", "2 words and 4 special ones, but the CTC head has 5 classes"),
    ],
)
def test_a_vocabulary_by_hand_that_is_not_the_head_s_is_refused(
    name: str, held: str | None, message: str, tmp_path: Path
) -> None:
    transformers_model("Wav2Vec2ForCTC", "base", vocab_size=5).save_pretrained(tmp_path / "peer")
    if held is not None:
        (tmp_path / name).write_text(held)
    with pytest.raises(ValueError, match=message):
        import_weights(
            ImportConfig(
                source=str(tmp_path / "peer"), out=str(tmp_path / "run"), vocabulary=str(tmp_path / name)
            )
        )


def test_a_head_that_lacks_its_bias_is_named(tmp_path: Path) -> None:
    export_weights(recognizer(tmp_path / "run", Vocabulary(LETTERS)), tmp_path / "out", "huggingface")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "lm_head.bias"},
        tmp_path / "out" / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"lm_head\.bias"):
        import_weights(ImportConfig(source=str(tmp_path / "out"), out=str(tmp_path / "again")))
