import gc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pretrain.ctc.finetuning import finetune
from pretrain.ctc.model import CTCBatch, Recognizer, greedy
from pretrain.ctc.online import Latency, OnlineRecognizer, recognize_online
from pretrain.ctc.transcribe_config import TranscribeConfig
from pretrain.ctc.transcription import transcribe
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.packing import Layout, pack
from pretrain.model.config import EncoderConfig
from tests.pretrain.ctc.tones import TEXTS, MakeCorpus, save_encoder, settings, spell
from tests.pretrain.model.test_streaming import CHUNKS, KINDS, speech
from tests.reference.convolutions import randomize

pytestmark = pytest.mark.slow  # `make test` is to stay short

# float32 products in matrices of another shape: log probabilities of order 1 after three layers of features
# of order 1
ROUNDING = {"rtol": 1e-4, "atol": 5e-5}
LENGTHS = [20000, 399, 400, 401, 320 * 30 + 80, 320 * 30 + 240, 320 * 31 + 79]


@cache
def recognizer(kind: str, cut: int = 0, **options: Any) -> Recognizer:
    torch.manual_seed(0)
    tree = {
        "architecture": "tiny",
        "num_layers": 3,
        "conv_dim": 24,
        "num_mels": 20,
        **KINDS.get(kind, {"front_end": "units", "num_units": 9}),
        "streaming": CHUNKS[cut],
    }
    layers = options.pop("layers", "last")
    vocabulary = Vocabulary(**{"symbols": ["a", "b", "c", "|"], **options})
    model = Recognizer(EncoderConfig.model_validate(tree), vocabulary, layers=layers).eval()
    randomize(model.encoder)
    torch.nn.init.normal_(model.head.weight, std=0.3)  # paths that change often
    return model


def offline(model: Recognizer, wave: np.ndarray) -> tuple[str, torch.Tensor]:
    with torch.no_grad():
        batch = CTCBatch.untranscribed(*pack([wave])) if wave.dtype == np.float32 else units_batch(wave)
        log_probs = model.logits(batch).log_softmax(2)
    return greedy(log_probs, batch.layout.num_frames, model.vocabulary)[0], log_probs[0]


def units_batch(units: np.ndarray) -> CTCBatch:
    return CTCBatch.untranscribed(torch.from_numpy(units), Layout((400 + 320 * (len(units) - 1),)))


def online(model: Recognizer, wave: np.ndarray, cuts: list[int]) -> tuple[str, torch.Tensor]:
    one = OnlineRecognizer(model)
    parts = [one.accept(piece) for piece in np.split(wave, sorted(cuts))] + [one.finish()]
    return " ".join(part.text for part in parts if part.text), torch.cat([part.log_probs for part in parts])


@pytest.mark.parametrize("kind", [*KINDS, "units"])
@pytest.mark.parametrize("cut", range(len(CHUNKS)))
@examples(max_examples=12, deadline=None)
@given(length=st.sampled_from(LENGTHS), shares=st.lists(st.floats(0, 1), max_size=12))
@example(length=20000, shares=[])
def test_however_the_audio_comes_the_frames_and_the_text_are_those_of_the_whole(
    kind: str, cut: int, length: int, shares: list[float]
) -> None:
    model = recognizer(kind, cut)
    wave = (
        speech([length])[0]
        if kind != "units"
        else np.random.default_rng(length).integers(0, 9, length // 320)
    )
    text, log_probs = online(model, wave, [int(share * len(wave)) for share in shares])
    if length < 400:
        assert text == "" and len(log_probs) <= 1
        return
    wanted, expected = offline(model, wave)
    torch.testing.assert_close(log_probs, expected, **ROUNDING)
    first, second = expected.topk(2, dim=1).values.unbind(1)
    if (first - second).min() > 1e-3:  # nowhere could rounding change the best path
        assert text == wanted


def test_texts_are_long_enough_to_show_a_difference() -> None:
    model = recognizer("small")
    wanted, _ = offline(model, speech([20000])[0])
    assert len(wanted.split()) >= 3


def test_samples_one_by_one_are_the_same() -> None:
    model = recognizer("small")
    (wave,) = speech([5000])
    text, log_probs = online(model, wave, list(range(1, len(wave))))
    wanted, expected = offline(model, wave)
    torch.testing.assert_close(log_probs, expected, **ROUNDING)
    assert text == wanted


def test_a_chunk_is_out_as_soon_as_its_last_sample_is_there() -> None:
    for kind in KINDS:
        model = recognizer(kind)
        (wave,) = speech([20000])
        one = OnlineRecognizer(model)
        size, ahead, tail = 4, 3, model.encoder.front_end.tail
        known = 0
        for chunk in range(5):
            needed = 320 * ((chunk + 1) * size + ahead) + tail
            assert len(one.accept(wave[known : needed - 1]).log_probs) == 0
            got = one.accept(wave[needed - 1 : needed])
            assert len(got.log_probs) == size and len(got.chunk_seconds) == 1
            known = needed


def test_the_head_over_all_layers_runs_online_too() -> None:
    model = recognizer("base", 1, layers="weighted")
    assert model.layer_weights is not None
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([0.5, -1.0, 0.3, 1.0]))
    (wave,) = speech([9999])
    torch.testing.assert_close(online(model, wave, [5000])[1], offline(model, wave)[1], **ROUNDING)


def pieces() -> str:
    """The definition of a tokenizer one of whose pieces has a space inside."""
    table = [("<unk>", 0.0), ("▁a", -1.0), ("▁", -2.0), ("b▁c", -2.0), ("b", -2.5), ("▁b", -2.5)]
    tokenizer = Tokenizer(models.Unigram(table, 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return str(tokenizer.to_str())


@pytest.mark.parametrize("spelling", ["characters", "jamo", "phones", "tokenizer"])
def test_words_come_whole_and_what_is_begun_is_partial(spelling: str) -> None:
    symbols = {
        "characters": ["a", "b", "c", "|"],
        "jamo": ["ᄀ", "ᅡ", "ᆨ", "|"],
        "phones": ["AA", "B", "K", "SH"],
        "tokenizer": ["▁a", "▁", "b▁c", "b", "▁b"],
    }[spelling]
    tokenizer = pieces() if spelling == "tokenizer" else None
    model = recognizer("small", 0, symbols=tuple(symbols), spelling=spelling, tokenizer=tokenizer)
    (wave,) = speech([30000])
    wanted, _ = offline(model, wave)
    one, said, early = OnlineRecognizer(model), "", 0
    for start in range(0, len(wave), 1600):
        part = one.accept(wave[start : start + 1600])
        said, early = f"{said} {part.text}".strip(), early + bool(part.text)
        assert f"{wanted} ".startswith(f"{said} ") or not said
        assert spelling != "phones" or not part.partial
        if spelling == "characters":
            assert wanted.startswith(f"{said} {part.partial}".strip())
    assert f"{said} {one.finish().text}".strip() == wanted
    assert early, wanted


@pytest.mark.filterwarnings("error")
def test_samples_as_np_frombuffer_gives_them_are_taken_without_a_warning() -> None:
    (wave,) = speech([9000])
    model = recognizer("small")
    parts = [(one := OnlineRecognizer(model)).accept(np.frombuffer(wave.tobytes(), np.float32)), one.finish()]
    assert torch.equal(torch.cat([part.log_probs for part in parts]), online(model, wave, [])[1])


def test_after_the_end_another_utterance_begins() -> None:
    model = recognizer("large")
    one = OnlineRecognizer(model)
    for wave in speech([9000, 12345]):
        parts = [one.accept(wave), one.finish()]
        torch.testing.assert_close(
            torch.cat([part.log_probs for part in parts]), offline(model, wave)[1], **ROUNDING
        )


def held(one: OnlineRecognizer) -> int:
    """Bytes of all tensors and lists that hang on it, the model's aside."""
    own = {id(tensor) for tensor in one.model.state_dict().values()} | {id(p) for p in one.model.parameters()}
    seen: set[int] = set()
    stack: list[Any] = [one._encoder.__dict__ | {"encoder": None}, one._pending]
    storages: dict[int, int] = {}
    while stack:
        thing = stack.pop()
        if id(thing) in seen or id(thing) in own or isinstance(thing, (type, torch.nn.Module)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (dict, list, tuple)) or type(thing).__module__.startswith("pretrain"):
            stack += gc.get_referents(thing)
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_the_same_however_long_one_speaks(kind: str) -> None:
    (wave,) = speech([160000])
    bounded, growing = OnlineRecognizer(recognizer(kind, 0)), OnlineRecognizer(recognizer(kind, 1))
    sizes: list[list[int]] = [[], []]
    for start in range(0, len(wave), 16000):
        for one, found in zip((bounded, growing), sizes, strict=True):
            one.accept(wave[start : start + 16000])
            found.append(held(one))
    samples = 4 * 320 * 8  # between two calls the samples that wait differ by less than a chunk
    assert max(sizes[0]) - min(sizes[0][1:]) <= samples
    assert sizes[1][-1] > 3 * sizes[1][1]  # keys and values of all that was said


def test_latency_is_what_is_waited_for_and_what_is_computed() -> None:
    model = recognizer("small")
    latency = Latency(model)
    (wave,) = speech([20000])
    text, log_probs = recognize_online(OnlineRecognizer(model), wave, latency)
    wanted, expected = offline(model, wave)
    assert text == wanted
    torch.testing.assert_close(log_probs, expected, **ROUNDING)
    summary = latency.summary()
    assert summary["algorithmic_ms"] == {"worst": (4 + 3) * 20 + 15, "mean": (2.5 + 3) * 20 + 15}
    assert len(latency.chunk_seconds) == -(-len(expected) // 4)
    assert 0 < summary["chunk_ms"]["p50"] <= summary["chunk_ms"]["p95"] <= summary["chunk_ms"]["worst"]
    assert summary["real_time_factor"] == pytest.approx(sum(latency.chunk_seconds) / (20000 / 16000))


def test_mistakes_are_named() -> None:
    one = OnlineRecognizer(recognizer("small"))
    with pytest.raises(ValueError, match="int16 .2,.*divided by 32768"):
        one.accept(np.zeros(2, np.int16))
    with pytest.raises(ValueError, match="one channel"):
        one.accept(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="sample 1 .* not a finite number"):
        one.accept(np.array([0, np.nan], np.float32))
    units = OnlineRecognizer(recognizer("units"))
    with pytest.raises(ValueError, match="units 0 to 8; got 3 to 9"):
        units.accept(np.array([3, 9]))
    with pytest.raises(ValueError, match="integers"):
        units.accept(np.zeros(3, np.float32))
    model = Recognizer(EncoderConfig(architecture="tiny"), Vocabulary(["a"])).eval()
    with pytest.raises(ValueError, match="cannot run online; train one with"):
        OnlineRecognizer(model)


def test_a_streaming_recogniser_learns_and_transcribes_alike_in_batches_and_online(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    save_encoder(tmp_path / "encoder")
    texts = [*TEXTS, " ".join(TEXTS)]
    manifest = make_corpus(tmp_path, [spell(text) for text in texts], texts=texts)
    streaming = {"chunk_frames": 6, "look_ahead_frames": 3, "left_chunks": 2}
    config = settings(
        tmp_path,
        manifest,
        init="random",
        streaming=streaming,
        training={"max_steps": 150, "log_every": 50},
    )
    assert finetune(config)["loss_last"] < 0.1

    def tables(name: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        tree = {
            "manifest": str(manifest.folder),
            "split": "train",
            "recognizer": config.out,
            "words": True,
            **options,
        }
        summary = transcribe(TranscribeConfig(out=str(tmp_path / name), **tree))
        return summary, pq.read_table(tmp_path / name / "transcripts.parquet").to_pydict()

    batched, expected = tables("batched")
    assert expected["hypothesis"] == texts and "latency" not in batched
    online, found = tables("online", online=True)
    longer, cut = tables("longer", max_seconds=1.0, batch_seconds=1.0)  # the longest texts go through online
    for table in (found, cut):
        # of log probabilities that differ by rounding
        assert table.pop("score") == pytest.approx(expected["score"], abs=1e-3)
        assert table == {name: column for name, column in expected.items() if name != "score"}
    assert longer["cut_in_windows"] == online["cut_in_windows"] == 0
    assert online["latency"]["algorithmic_ms"] == {"worst": (6 + 3) * 20 + 15, "mean": (3.5 + 3) * 20 + 15}
    assert online["latency"]["real_time_factor"] > 0


def test_a_recogniser_that_attends_whole_utterances_is_not_asked_to_run_online(
    tmp_path: Path, make_corpus: MakeCorpus
) -> None:
    save_encoder(tmp_path / "encoder")
    manifest = make_corpus(tmp_path, [spell("ab")], texts=["ab"])
    run = settings(tmp_path, manifest, training={"max_steps": 1, "log_every": 1})
    finetune(run)
    with pytest.raises(ValueError, match="online: .* attends whole utterances"):
        transcribe(
            TranscribeConfig(
                out=str(tmp_path / "t"),
                manifest=str(manifest.folder),
                split="train",
                recognizer=run.out,
                online=True,
            )
        )
