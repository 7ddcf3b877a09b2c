import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pretrain.data.audio import load_audio
from pretrain.data.utterance import Utterance
from pretrain.store.artefact import read_meta
from pretrain.training.checkpoint import save_checkpoint
from pretrain.training.task import TrainingConfig
from quantize.codebook import Codebook, write_codebook
from quantize.mfcc import mfcc
from units.corpus.corpus_writing import Document, write_corpus
from units.corpus.patterns import PATTERNS, Pattern
from units.corpus.sequence import deduplicate
from units.corpus.sequences import ListedSequences
from units.corpus.unit_corpus import UnitCorpus
from units.corpus.vocabulary import Vocabulary
from units.lm import continuing, sampling
from units.lm.continuing import Rules, generate, pick
from units.lm.generation import CompactDecoder
from units.lm.language_model import load_language_model, log_likelihoods
from units.lm.model import Decoder, DecoderConfig
from units.lm.preferences import DPOConfig
from units.lm.sampling import SampleConfig, sample
from units.lm.training import TrainLMConfig, train_lm
from units.sound import synthesis
from units.sound.unit_to_mel import SynthesizerModelConfig, UnitToMel


def config(planted: UnitCorpus, trained: Path, out: Path, **changes: object) -> SampleConfig:
    settings = {
        "lm": str(trained),
        "corpus": str(planted.folder),
        "out": str(out),
        "prompt_units": 8,
        "max_units": 40,
        "device": "cpu",
    }
    return SampleConfig.model_validate({**settings, **changes})


def read(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def loud_decoder(vocabularies: Sequence[int], context: int = 64) -> Decoder:
    """Untrained, and far from uniform."""
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(
            dim=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=48, context=context, dropout=0.0
        ),
        vocabularies,
    )
    for weight in decoder.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.25)
    return decoder.eval()


def slow_greedy(decoder: Decoder, prompt: np.ndarray, max_units: int) -> tuple[list[int], float]:
    """Without a cache or a batch: the whole sequence is read again for every unit."""
    bos, eos = decoder.vocabulary_size - 2, decoder.vocabulary_size - 1
    tokens, total = [bos, *prompt.tolist()], 0.0
    for _ in range(max_units):
        logits = decoder(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1].double()
        logits[[bos, eos] if len(tokens) == 1 else [bos]] = -torch.inf
        tokens.append(int(logits.argmax()))
        total += float(
            decoder(torch.tensor([tokens[:-1]]), torch.arange(len(tokens) - 1)[None])[0, -1].log_softmax(-1)[
                tokens[-1]
            ]
        )
        if tokens[-1] == eos:
            return tokens[len(prompt) + 1 : -1], total
    return tokens[len(prompt) + 1 :], total


@torch.inference_mode()
def test_cached_generation_in_a_batch_of_uneven_prompts_equals_the_uncached_oracle(
    planted: UnitCorpus, trained: Path
) -> None:
    lm = load_language_model(trained, planted, "cpu")
    prompts = [planted.units(i)[:length].astype(np.int64) for i, length in enumerate((9, 1, 20, 0, 13))]
    made = generate(
        CompactDecoder(lm.decoder),
        lm.pattern,
        prompts,
        [[0, i] for i in range(5)],
        Rules(max_units=34, temperature=0),
    )
    assert {continuation.ended_by for continuation in made} == {
        "eos",
        "length",
    }  # after 26 and 30 steps, and those of 35 and more
    for prompt, continuation in zip(prompts, made, strict=True):
        units, total = slow_greedy(lm.decoder, prompt, 34)
        assert continuation.codes.tolist() == units
        # float32 logits, sums in another order
        assert continuation.log_likelihood == pytest.approx(total, abs=1e-4)
        assert (continuation.ended_by == "eos") == (len(units) < 34)


@torch.inference_mode()
@pytest.mark.parametrize("name", PATTERNS)
def test_generation_of_several_levels_equals_the_uncached_oracle(name: str) -> None:
    pattern = Pattern(name, (7, 6, 5))
    decoder = loud_decoder(pattern.vocabularies)
    prompts = [np.random.default_rng(n).integers(0, 5, (n, 3)) for n in (4, 0, 2)]
    made = generate(CompactDecoder(decoder), pattern, prompts, [[3, i] for i in range(3)], Rules(max_units=6))
    assert len({json.dumps(continuation.codes.tolist()) for continuation in made}) == 3
    for number, (prompt, continuation) in enumerate(zip(prompts, made, strict=True)):
        whole = np.concatenate([prompt, continuation.codes])
        sequence = pattern.arrange(whole)
        assert (pattern.restore(sequence) == whole).all() and len(continuation.codes) <= 6
        # Each drawn cell, drawn again from logits of the sequence before it, read anew.
        uniform = np.random.default_rng([3, number]).random((len(sequence), pattern.num_streams))
        table = sequence.reshape(len(sequence), -1)
        predicted = pattern.predicted(sequence).reshape(table.shape)
        level = pattern.levels(sequence).reshape(table.shape)
        start = int(pattern.prefix_length(len(prompt)))
        total = 0.0
        given = {
            (row, stream)
            for row, stream in np.argwhere(pattern.predicted(sequence).reshape(table.shape))
            if row < start
        }
        counts = dict.fromkeys(range(3), 0)
        for row in range(1, len(sequence)):
            logits = decoder(torch.from_numpy(sequence[:row])[None], torch.arange(row)[None])[0, -1]
            for stream, own in enumerate(decoder.split(logits)):
                symbol = int(table[row, stream])
                if not predicted[row, stream]:
                    continue
                code_level = int(level[row, stream])
                if code_level >= 0:
                    counts[code_level] += 1
                    forced = counts[code_level] <= len(prompt)
                    first = int(pattern.offsets[code_level])
                    allowed = np.arange(first, first + pattern.sizes[code_level])
                    if code_level == 0 and counts[0] > 1:
                        allowed = np.append(allowed, pattern.eos)
                else:
                    forced, allowed = (
                        continuation.ended_by == "length",
                        np.append(np.arange(pattern.sizes[0]), pattern.eos),
                    )
                if forced or (row, stream) in given:
                    continue
                masked = torch.full_like(own, -torch.inf)
                masked[allowed] = own[allowed]
                drawn = pick(masked[None], torch.tensor([uniform[row - start, stream]]), 1.0, 0, 1.0)
                assert int(drawn) == symbol, (name, row, stream)
                total += float(own.log_softmax(-1)[symbol])
        assert continuation.log_likelihood == pytest.approx(total, abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", PATTERNS)
def test_of_several_levels_what_is_drawn_after_a_stop_is_not_in_the_likelihood(name: str) -> None:
    pattern = Pattern(name, (7, 6, 5))
    decoder = loud_decoder(pattern.vocabularies)
    model, prompts = (
        CompactDecoder(decoder),
        [np.random.default_rng(n).integers(0, 5, (n, 3)) for n in (4, 0, 2)] * 3,
    )
    seeds, ways = [[3, i] for i in range(9)], set()
    free = generate(model, pattern, prompts, seeds, Rules(max_units=6))
    made = generate(model, pattern, prompts, seeds, Rules(max_units=6, stops=(0, 3, 5)))
    for prompt, whole, stopped in zip(prompts, free, made, strict=True):
        ways.add(stopped.ended_by)
        if stopped.ended_by != "stop":
            assert stopped.codes.tolist() == whole.codes.tolist() and stopped[1:] == whole[1:]
            continue
        kept = int(np.flatnonzero(np.isin(whole.codes[:, 0], (0, 3, 5)))[0])
        assert stopped.codes.tolist() == whole.codes[:kept].tolist()
        # By hand: the cells of what is kept and level 0 of the stop, in the whole sequence read anew.
        sequence = pattern.arrange(np.concatenate([prompt, whole.codes]))
        table, levels = (
            sequence.reshape(len(sequence), -1),
            pattern.levels(sequence).reshape(len(sequence), -1),
        )
        streams = decoder.split(
            decoder(torch.from_numpy(sequence)[None], torch.arange(len(sequence))[None])[0]
        )
        total, seen = (
            0.0,
            dict.fromkeys(range(-1, 3), 0),
        )  # of each level, in the order of time under every pattern
        for row in range(1, len(sequence)):
            for stream in range(pattern.num_streams):
                level = int(levels[row, stream])
                t = seen[level] - len(prompt)
                seen[level] += 1
                if level >= 0 and t >= 0 and (t < kept or (t == kept and level == 0)):
                    total += float(streams[stream][row - 1].double().log_softmax(-1)[table[row, stream]])
        assert stopped.log_likelihood == pytest.approx(total, abs=1e-4)  # float32 logits, by another way
    assert "stop" in ways


@torch.inference_mode()
@pytest.mark.parametrize(("stops", "ways"), [((), {"eos", "length"}), ((2, 4), {"eos", "stop"})])
def test_the_short_way_of_a_single_level_is_the_way_of_several(
    stops: tuple[int, ...], ways: set[str]
) -> None:
    pattern = Pattern("delay", (9,))
    model = CompactDecoder(loud_decoder(pattern.vocabularies))
    prompts = [np.random.default_rng(n).integers(0, 9, n) for n in (0, 5, 2, 7)]
    seeds, rules = [[0, n] for n in range(4)], Rules(30, 3, stops, 1.3, 6, 0.9)
    short = continuing._continue_plain(model, pattern, prompts, seeds, rules)
    long = continuing._continue_levels(model, pattern, prompts, seeds, rules)
    assert {one.ended_by for one in short} == ways and (stops or min(len(one.codes) for one in short) >= 3)
    for one, other in zip(short, long, strict=True):
        assert one.codes.tolist() == other.codes.tolist() and one.ended_by == other.ended_by
        # the same float32 numbers, added in another order
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)


@torch.inference_mode()
def test_the_likelihood_of_a_continuation_is_what_score_gives_it(planted: UnitCorpus, trained: Path) -> None:
    lm = load_language_model(trained, planted, "cpu")
    made = generate(
        CompactDecoder(lm.decoder),
        lm.pattern,
        [np.zeros(0, np.int64)] * 4,
        [[5, n] for n in range(4)],
        Rules(max_units=60),
    )
    finished = [continuation for continuation in made if continuation.ended_by == "eos"]
    assert len(finished) > 1
    sequences = ListedSequences([lm.pattern.arrange(continuation.codes) for continuation in finished])
    expected = log_likelihoods(lm.decoder, lm.pattern, sequences, 100)
    # float32 through two layers, 40 terms; the temperature of 1 and nothing cut off
    np.testing.assert_allclose(
        [continuation.log_likelihood for continuation in finished], expected, atol=1e-3
    )


def test_samples_repeat_with_their_seed_and_whatever_the_batch(
    planted: UnitCorpus, trained: Path, tmp_path: Path
) -> None:
    for name, changes in {"a": {}, "b": {"batch_size": 2}, "c": {"seed": 1}}.items():
        summary = sample(config(planted, trained, tmp_path / name, num=5, **changes))
        assert summary["num"] == 5
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert (
        [line["continuation"] for line in a]
        == [line["continuation"] for line in b]
        != [line["continuation"] for line in c]
    )
    assert len({json.dumps(line["continuation"]) for line in a}) == 5


def test_an_utterance_prompts_every_continuation(planted: UnitCorpus, trained: Path, tmp_path: Path) -> None:
    sample(config(planted, trained, tmp_path / "out", utterance="document-3", num=3))
    for line in read(tmp_path / "out"):
        assert line["document"] == "document-3" and line["prompt"] == planted.units(3)[:8].tolist()
        assert all(0 <= unit < planted.num_units for unit in line["continuation"])  # type: ignore[attr-defined]  # a JSON list


def test_continuations_follow_the_planted_rule(planted: UnitCorpus, trained: Path, tmp_path: Path) -> None:
    sample(config(planted, trained, tmp_path / "out", num=20, top_p=0.8, prompt_units=3))
    right = total = 0
    for line in read(tmp_path / "out"):
        units = [*line["prompt"], *line["continuation"]]  # type: ignore[misc]  # JSON lists
        for a, b, c in zip(units[1:], units[2:], units[3:], strict=False):
            right, total = right + (c == (b + 1 + a % 3) % planted.num_units), total + 1
    assert right / total > 0.9


def test_draws_follow_the_distribution_and_its_cuts() -> None:
    logits = torch.tensor([0.1, 0.5, 0.0, 0.4]).log()
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]

    def shares(**cuts: float) -> list[float]:
        drawn = pick(
            logits.expand(1000, -1), uniform, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **cuts}
        )  # type: ignore[arg-type]
        return [round(share, 2) for share in (torch.bincount(drawn, minlength=4) / 1000).tolist()]

    assert shares() == [0.1, 0.5, 0.0, 0.4]
    assert shares(top_k=2) == [0.0, 0.56, 0.0, 0.44]
    assert shares(top_p=0.6) == [0.0, 0.56, 0.0, 0.44]
    assert shares(top_p=0.4) == [0.0, 1.0, 0.0, 0.0]
    assert shares(temperature=0) == [0.0, 1.0, 0.0, 0.0]
    assert shares(temperature=0.5) == [0.02, 0.6, 0.0, 0.38]
    assert shares(top_k=2, top_p=0.55) == [0.0, 1.0, 0.0, 0.0]  # of what top_k leaves: 0.556
    assert shares(top_k=9) == shares()


def test_top_p_keeps_the_smallest_set() -> None:
    """By a slow oracle, over random distributions: the likeliest first, until they hold top_p."""
    rng = np.random.default_rng(0)
    uniform = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    for top_p in (0.05, 0.5, 0.9, 0.999):
        probabilities = rng.dirichlet(np.full(20, 0.5))
        order = np.argsort(-probabilities)
        kept = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1]
        logits = torch.from_numpy(np.log(np.maximum(probabilities, 1e-30))).float()
        drawn = pick(logits.expand(4000, -1), uniform, 1.0, 0, top_p)
        shares = torch.bincount(drawn, minlength=20).numpy() / 4000
        expected = np.zeros(20)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        # 4,000 evenly spaced numbers, each share's ends rounded
        np.testing.assert_allclose(shares, expected, atol=2 / 4000)


def test_a_continuation_ends_before_a_stop_unit(planted: UnitCorpus, trained: Path, tmp_path: Path) -> None:
    sample(config(planted, trained, tmp_path / "free", num=6))
    summary = sample(config(planted, trained, tmp_path / "stopped", num=6, stop_units=[3, 7]))
    ways = set()
    for free, stopped in zip(read(tmp_path / "free"), read(tmp_path / "stopped"), strict=True):
        units = free["continuation"]
        first = next((place for place, unit in enumerate(units) if unit in (3, 7)), None)  # type: ignore[arg-type, var-annotated]
        assert stopped["continuation"] == units[:first]  # type: ignore[index]
        assert stopped["ended_by"] == (free["ended_by"] if first is None else "stop")
        ways.add(stopped["ended_by"])
    assert "stop" in ways and summary["finished"] == sum(
        line["ended_by"] == "eos" for line in read(tmp_path / "stopped")
    )


def test_sliding_lifts_the_limit_of_the_context_and_changes_nothing_within_it(
    planted: UnitCorpus, trained: Path, tmp_path: Path
) -> None:
    sample(config(planted, trained, tmp_path / "long", sliding=True, max_units=90, num=8))
    sample(config(planted, trained, tmp_path / "short", max_units=50, num=8))
    for line, short in zip(read(tmp_path / "long"), read(tmp_path / "short"), strict=True):
        assert line["continuation"][:50] == short["continuation"]  # type: ignore[index]  # a JSON list


@torch.inference_mode()
def test_beyond_the_context_the_last_of_it_is_seen() -> None:
    decoder = loud_decoder((9 + 2,), context=16)
    windowed = Decoder(
        decoder.config.model_copy(update={"sliding_window": 16, "context": 60}), decoder.vocabularies
    ).eval()
    windowed.load_state_dict(decoder.state_dict())
    prompt = np.arange(20) % 9
    (made,) = generate(
        CompactDecoder(decoder, window=16),
        Pattern("flatten", (9,)),
        [prompt],
        [[0]],
        Rules(max_units=35, temperature=0),
    )
    units, _ = slow_greedy(windowed, prompt, 35)
    assert len(units) > 1 and made.codes.tolist() == units


@torch.inference_mode()
@pytest.mark.parametrize("name", PATTERNS)
def test_no_level_ends_before_its_least_units(name: str) -> None:
    pattern = Pattern(name, (7, 6))
    model, prompts = (
        CompactDecoder(loud_decoder(pattern.vocabularies)),
        [np.zeros((n, 2), np.int64) for n in (0, 3, 1)] * 4,
    )
    for least, most in ((0, 9), (4, 9), (9, 9)):
        made = generate(model, pattern, prompts, [[0, n] for n in range(12)], Rules(most, least))
        lengths = [len(continuation.codes) for continuation in made]
        assert least <= min(lengths) and max(lengths) <= most and (least > 0 or min(lengths) < 4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_lower_precision_says_what_it_costs(
    planted: UnitCorpus, trained: Path, tmp_path: Path, precision: str
) -> None:
    summary = sample(config(planted, trained, tmp_path / "out", precision=precision))
    # a tiny model on a planted rule: measured 0.0003 with int8
    assert 0 < abs(summary["perplexity"] / summary["perplexity_float32"] - 1) < 0.02
    assert (
        f"precision {precision}: perplexity" in summary["notes"][0]
        and "20 documents of split 'test'" in summary["notes"][0]
    )
    lm = load_language_model(trained, planted, "cpu")
    documents = np.random.default_rng(0).permutation(planted.documents("test"))[:20]
    sequences = ListedSequences([lm.pattern.arrange(planted.tokens(i)) for i in documents])
    expected = np.exp(
        -log_likelihoods(lm.decoder, lm.pattern, sequences, 100).sum() / sequences.lengths.sum()
    )
    assert summary["perplexity_float32"] == pytest.approx(expected, rel=1e-5)


def test_the_cost_of_a_precision_is_known_of_a_model_that_learned_preferences(
    planted: UnitCorpus, trained: Path, spoken: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": [0, 1], "chosen": [2], "rejected": [5]}))
    train_lm(
        TrainLMConfig(
            out=str(tmp_path / "dpo"),
            init=str(trained),
            dpo=DPOConfig(pairs=str(tmp_path / "pairs.jsonl")),
            training=TrainingConfig(max_steps=1, device="cpu"),
        )
    )
    lm = load_language_model(tmp_path / "dpo", device="cpu")
    asked = config(planted, tmp_path / "dpo", tmp_path / "out", precision="bfloat16")
    # as with `prompt_audio` and no `corpus`
    cost = sampling.precision_cost(asked, lm, None, CompactDecoder(lm.decoder, "bfloat16"))
    assert cost["perplexity"] == pytest.approx(cost["perplexity_float32"], rel=0.02)


@pytest.fixture
def voice(tmp_path: Path) -> str:
    """An untrained synthesizer of the planted corpus's units."""
    model = UnitToMel(SynthesizerModelConfig(dim=8, unit_layers=1, frame_layers=1), 12, 1, 0)
    described = {"codebook": "c0de", "num_units": 12, "num_levels": 1, "deduplicated": True, "speakers": []}
    state = {"kind": synthesis.KIND, "config": {"model": model.config.resolved()}, "extra": described}
    save_checkpoint(tmp_path / "voice", 1, model, torch.optim.AdamW(model.parameters()), state)
    return str(tmp_path / "voice")


def test_samples_are_spoken_into_a_new_file_in_a_new_folder(
    planted: UnitCorpus, trained: Path, voice: str, tmp_path: Path
) -> None:
    spoken = {"synthesizer": voice, "audio": str(tmp_path / "new" / "all.wav"), "num": 2, "max_units": 3}
    sample(config(planted, trained, tmp_path / "out", **spoken))
    assert soundfile.info(spoken["audio"]).duration > 1  # two pauses of half a second, and what is said
    assert read_meta(tmp_path / "out")["parents"].keys() == {"lm", "corpus", "synthesizer"}
    (tmp_path / "file").touch()
    for audio, message in (
        (spoken["audio"], "all.wav exists already"),
        (str(tmp_path / "file" / "a.wav"), "file cannot be made: "),
    ):
        with pytest.raises(ValueError, match=f"audio: .*{message}"):
            sample(config(planted, trained, tmp_path / "again", **{**spoken, "audio": audio}))
    assert not (tmp_path / "again").exists()


def test_of_continuations_that_a_stop_empties_the_pauses_are_left(
    planted: UnitCorpus, trained: Path, voice: str, tmp_path: Path
) -> None:
    nothing = {"prompt_units": 0, "stop_units": list(range(12)), "num": 2}
    sample(
        config(
            planted, trained, tmp_path / "out", synthesizer=voice, audio=str(tmp_path / "all.wav"), **nothing
        )
    )
    assert soundfile.info(tmp_path / "all.wav").frames == 16000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_units": 30},
            r"prompt of BOS and 30 units .* with 40 more .* takes 70 tokens, which does not fit the 64 "
            r"tokens of context",
        ),
        ({"stop_units": [3, 12]}, "stop_units: 12 is no unit of .*, which has 0 .. 11"),
        (
            {"prompt_units": 41, "max_units": 5, "utterance": "document-0"},
            "document 'document-0' has .* units, fewer than prompt_units 41",
        ),
        (
            {"prompt_units": 45, "max_units": 5},
            "no document of split 'test' has prompt_units 45 units; the longest has",
        ),
        ({"utterance": "nobody"}, "no document 'nobody'"),
        ({"split": "tset"}, "no documents in split 'tset'; its splits: dev, test, train"),
    ],
)
def test_impossible_prompts_are_named(
    planted: UnitCorpus, trained: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(config(planted, trained, tmp_path / "out", **changes))


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with recordings of 0.5 and 0.3 s, 8 kHz and 16 kHz, and an MFCC codebook of two levels of six
    classes; its fingerprint."""
    folder, rng = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    for name, rate, seconds in (("a", 16000, 0.5), ("b", 8000, 0.3)):
        wave = np.concatenate(
            [rng.standard_normal(rate // 10) * loud for loud in 0.3 * rng.random(int(seconds * 10))]
        )
        soundfile.write(folder / f"{name}.wav", wave, rate, subtype="PCM_16")
    features = mfcc(soundfile.read(folder / "a.wav", dtype="float32")[0])
    centroids = np.stack(
        [(features - features.mean(0))[[0, 5, 10, 15, 20, 22]], rng.standard_normal((6, 39))]
    )
    fingerprint = write_codebook(
        folder / "codebook", centroids, features.mean(0), {"kind": "mfcc", "cmvn": False}, {}, {}, {}
    )
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    return folder, fingerprint


def teach(folder: Path, codebook: str, vocabulary: Vocabulary, pattern: str, deduplicated: bool) -> Path:
    """A run folder: a model that knows these symbols, and little of them."""
    rng = np.random.default_rng(0)
    shape = (30,) if vocabulary.num_levels == 1 else (30, vocabulary.num_levels)
    documents = [
        Document(f"d{number}", "train", rng.integers(0, vocabulary.num_units, shape)) for number in range(8)
    ]
    described = {"codebook": codebook, "frame_rate_hz": 50.0, "deduplicated": deduplicated, "timed": False}
    write_corpus(folder / "units", documents, {}, {}, vocabulary=vocabulary, **described)  # type: ignore[arg-type]
    train_lm(
        TrainLMConfig(
            corpus=str(folder / "units"),
            out=str(folder / "lm"),
            pattern=pattern,
            valid_split=None,  # type: ignore[arg-type]
            model=DecoderConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=16, context=64),
            training=TrainingConfig(max_steps=1, device="cpu"),
        )
    )
    return folder / "lm"


@pytest.mark.parametrize("kind", ["deduplicated", "merged", "two levels"])
def test_a_recording_prompts_with_its_units_as_the_model_learned_them(
    kind: str, spoken: tuple[Path, str], tmp_path: Path
) -> None:
    folder, fingerprint = spoken
    vocabulary = {
        "deduplicated": Vocabulary(num_units=6),
        "merged": Vocabulary(num_units=6, merges=tuple((a, b) for a in range(6) for b in range(6) if a != b)),
        "two levels": Vocabulary(num_units=6, num_levels=2),
    }[kind]
    lm = teach(tmp_path, fingerprint, vocabulary, "delay", kind != "two levels")
    sample(
        SampleConfig(
            lm=str(lm),
            out=str(tmp_path / "out"),
            prompt_audio=[str(folder / "a.wav"), str(folder / "b.wav")],
            codebook=str(folder / "codebook"),
            num=3,
            max_units=5,
            device="cpu",
        )
    )
    lines = read(tmp_path / "out")
    assert read_meta(tmp_path / "out")["parents"]["codebook"] == fingerprint
    assert [Path(str(line["document"])).name for line in lines] == ["a.wav", "b.wav", "a.wav"]
    book = Codebook.open(folder / "codebook")
    for line in lines:
        utterance = Utterance("x", str(line["document"]), 0, *soundfile_size(str(line["document"])))
        labels = book.assign(mfcc(load_audio(utterance)))
        expected = labels if kind == "two levels" else deduplicate(labels[:, 0])[0]
        assert line["prompt"] == expected.tolist() and len(expected) > 2
        assert len(line["continuation"]) <= 5 * (2 if kind == "merged" else 1)  # type: ignore[arg-type]  # a JSON list
    assert any(line["continuation"] for line in lines)


def soundfile_size(path: str) -> tuple[int, int]:
    described = soundfile.info(path)
    return described.frames, described.samplerate


def test_a_recording_that_cannot_prompt_is_named(spoken: tuple[Path, str], tmp_path: Path) -> None:
    folder, fingerprint = spoken
    lm = teach(tmp_path, fingerprint, Vocabulary(num_units=6), "delay", False)
    settings = {
        "lm": str(lm),
        "out": str(tmp_path / "out"),
        "prompt_audio": str(folder / "a.wav"),
        "codebook": str(folder / "codebook"),
        "device": "cpu",
        "max_units": 10,
    }
    other = str(tmp_path / "other")
    theirs = write_codebook(
        Path(other),
        np.ones((1, 6, 39), np.float32),
        np.zeros(39, np.float32),
        {"kind": "mfcc", "cmvn": False},
        {},
        {},
        {},
    )
    for changes, message in (
        (
            {"codebook": other},
            rf"learned the units of codebook {fingerprint}, and {other} is codebook {theirs}",
        ),
        ({"prompt_audio": str(folder / "empty.wav")}, r"prompt_audio: .*empty.wav: holds no samples"),
        ({"prompt_audio": "nowhere.wav"}, "prompt_audio: nowhere.wav: no such file"),
        ({"prompt_units": 25}, r"prompt_audio: .*a.wav has 24 units, fewer than prompt_units 25"),
        ({"encoder": "run"}, "encoder: .* quantises MFCC; remove encoder = 'run'"),
        (
            {"max_units": 41},
            r"BOS and 24 units .* with 41 more .* takes 65 tokens, which does not fit the 64 tokens",
        ),
        ({"corpus": str(tmp_path / "units"), "stop_units": [6]}, "stop_units: 6 is no unit"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(SampleConfig.model_validate({**settings, **changes}))
    long = str(tmp_path / "long.wav")
    soundfile.write(long, np.random.default_rng(0).standard_normal(32000) / 10, 16000)
    with pytest.raises(
        ValueError, match=r"long.wav' has 99 units, 100 tokens with BOS, and .*lm has 64 tokens of context"
    ):
        sample(SampleConfig.model_validate({**settings, "prompt_audio": long}))
    sample(SampleConfig.model_validate({**settings, "prompt_audio": long, "sliding": True, "num": 1}))
    assert len(read(tmp_path / "out")[0]["prompt"]) == 99  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"corpus": "c", "min_units": 9, "max_units": 8}, "min_units 9 is more than max_units 8"),
        ({}, "give the `corpus` whose documents prompt, or `prompt_audio`"),
        ({"corpus": "c", "codebook": "b"}, "codebook: of `prompt_audio` only"),
        ({"prompt_audio": "a.wav"}, "needs the `codebook`"),
        ({"prompt_audio": [], "codebook": "b"}, "no recordings are listed"),
        ({"prompt_audio": "a.wav", "codebook": "b", "utterance": "u"}, "not both"),
        ({"prompt_audio": ["a", "b"], "codebook": "b", "num": 1}, "num 1: fewer than the 2 recordings"),
    ],
)
def test_prompts_of_two_kinds_or_none_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig.model_validate({"lm": "lm", "out": "out", **given})
