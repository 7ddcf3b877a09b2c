"""Beam search against the sum over every path of short inputs, with the language model's arithmetic written
out from its ARPA."""

import base64
import gzip
import itertools
import json
import math
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.ctc.decoding import Decoder, DecodingConfig
from pretrain.ctc.model import greedy
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary, collapse

ARPA = """\\data\\
ngram 1=6
ngram 2=4

\\1-grams:
-1.0	<unk>	0
-99	<s>	-0.3
-0.9	</s>	0
-0.5	ab	-0.2
-0.7	ba	-0.1
-1.1	a	-0.4

\\2-grams:
-0.3	<s> ab
-0.4	ab ba
-0.2	ba </s>
-0.6	a ab

\\end\\
"""
UNIGRAMS = {
    "</s>": (-0.9, 0.0),
    "ab": (-0.5, -0.2),
    "ba": (-0.7, -0.1),
    "a": (-1.1, -0.4),
    "<unk>": (-1.0, 0.0),
    "<s>": (-99.0, -0.3),
}
BIGRAMS = {("<s>", "ab"): -0.3, ("ab", "ba"): -0.4, ("ba", "</s>"): -0.2, ("a", "ab"): -0.6}
SYMBOL_ARPA = """\\data\\
ngram 1=6
ngram 2=1

\\1-grams:
-9	<unk>	0
-99	<s>	-0.1
-0.4	</s>	0
-0.3	a	-0.2
-0.8	b	0
-0.6	|	0

\\2-grams:
-0.05	a b

\\end\\
"""
SYMBOLS = {"a": -0.3, "b": -0.8, "|": -0.6, "</s>": -0.4}

EVERYTHING: dict[str, Any] = {"method": "beam", "beam_size": 100_000, "beam_threshold": 1e6, "nbest": 1000}
TOLERANCE = 1e-4  # emissions and the language model's scores are float32 in the library

Oracle = dict[str, float]


def sentence(words: tuple[str, ...]) -> float:
    """log10 of a sentence under ARPA, backing off by hand."""
    total, before = 0.0, "<s>"
    for word in (*words, "</s>"):
        known = word if word in UNIGRAMS else "<unk>"
        total += BIGRAMS.get((before, known), UNIGRAMS[known][0] + UNIGRAMS[before][1])
        before = known
    return total


def symbol_sequence(symbols: list[str]) -> float:
    """log10 of a sequence under SYMBOL_ARPA, backing off by hand."""
    total, before = 0.0, "<s>"
    for symbol in [*symbols, "</s>"]:
        backoff = {"<s>": -0.1, "a": -0.2}.get(before, 0.0)
        total += -0.05 if (before, symbol) == ("a", "b") else SYMBOLS[symbol] + backoff
        before = symbol
    return total


def emissions(frames: int, classes: int, seed: int) -> Tensor:
    return torch.tensor(
        np.log(np.random.default_rng(seed).dirichlet(np.ones(classes), frames)), dtype=torch.float32
    )


def every_sequence(log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """ln P of every sequence of classes, from every path."""
    sums: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
    rows = log_probs.double().tolist()
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(rows)):
        spelled = tuple(collapse(np.array(path)).tolist())
        sums[spelled] = float(
            np.logaddexp(sums[spelled], sum(row[c] for row, c in zip(rows, path, strict=True)))
        )
    return sums


def with_spaces(
    log_probs: Tensor, symbols: str, words: set[str], score: Callable[[tuple[str, ...]], float]
) -> Oracle:
    """Scores of texts whose words, with any number of spaces between and around, are in `words`."""
    found: Oracle = defaultdict(lambda: -math.inf)
    for spelled, log_prob in every_sequence(log_probs).items():
        said = tuple(part for part in "".join(symbols[c - 1] for c in spelled).split("|") if part)
        if set(said) <= words:
            found[" ".join(said)] = float(np.logaddexp(found[" ".join(said)], log_prob))
    return {text: value + score(tuple(text.split())) for text, value in found.items()}


def ranked(oracle: Oracle) -> list[tuple[str, float]]:
    return sorted(oracle.items(), key=lambda item: (-item[1], item[0]))


def require_equal(decoder: Decoder, log_probs: Tensor, oracle: Oracle) -> None:
    found = decoder.decode(log_probs)
    expected = ranked(oracle)
    assert len({hypothesis.text for hypothesis in found}) == len(found) == len(expected)
    assert [h.score for h in found] == pytest.approx([score for _, score in expected], abs=TOLERANCE)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(oracle[hypothesis.text], abs=TOLERANCE)


@pytest.fixture
def arpa(tmp_path: Path) -> str:
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    return str(path)


@pytest.mark.parametrize("seed", range(3))
def test_search_with_a_lexicon_and_a_language_model_sums_over_every_path(arpa: str, seed: int) -> None:
    config = DecodingConfig(**EVERYTHING, lm=arpa, lm_weight=1.5, word_score=0.3)
    log_probs = emissions(7, 4, seed)
    oracle = with_spaces(
        log_probs, "ab|", {"ab", "ba", "a"}, lambda words: 1.5 * sentence(words) + 0.3 * len(words)
    )
    decoder = Decoder(config, Vocabulary(["a", "b", "|"]), TextConfig())
    require_equal(decoder, log_probs, oracle)
    assert "" in oracle and "a ab" in oracle and "ab ba" in oracle and not decoder.notes
    for hypothesis in decoder.decode(log_probs):
        words = tuple(hypothesis.text.split())
        assert hypothesis.lm_score == pytest.approx(sentence(words), abs=TOLERANCE)
        assert hypothesis.score == pytest.approx(
            hypothesis.ctc_score + 1.5 * sentence(words) + 0.3 * len(words), abs=TOLERANCE
        )
        assert decoder.vocabulary.decode(hypothesis.classes) == hypothesis.text
        assert hypothesis.words == tuple(decoder.vocabulary.words(hypothesis.classes))


def test_other_weights_search_as_if_they_had_been_given(arpa: str) -> None:
    vocabulary, log_probs = Vocabulary(["a", "b", "|"]), emissions(6, 4, 3)
    given = Decoder(
        DecodingConfig(**EVERYTHING, lm=arpa, lm_weight=0.5, word_score=1.0), vocabulary, TextConfig()
    )
    changed = Decoder(DecodingConfig(**EVERYTHING, lm=arpa), vocabulary, TextConfig()).with_weights(0.5, 1.0)
    assert given.decode(log_probs) == changed.decode(log_probs)


def test_a_frame_of_space_is_paid_for_where_it_is_heard_and_not_at_the_end(tmp_path: Path) -> None:
    lexicon = tmp_path / "words.lst"
    lexicon.write_text("ab\ta b |\nba\tb a |\n")
    log_probs = emissions(5, 4, 4)
    paid = log_probs.clone()
    paid[:, 3] += 0.7
    config = DecodingConfig(**EVERYTHING, lexicon=str(lexicon), word_score=0.0, silence_score=0.7)
    oracle = with_spaces(paid, "ab|", {"ab", "ba"}, lambda words: 0.0)
    require_equal(Decoder(config, Vocabulary(["a", "b", "|"]), TextConfig()), log_probs, oracle)


def test_words_of_several_spellings_sum_over_them_and_texts_written_alike_are_one(tmp_path: Path) -> None:
    lexicon = tmp_path / "words.lst"
    # a line without the separator; two words, one text
    lexicon.write_text("ab\ta b |\nab\tb |\nBA\tb a\nba\tb a |\n\n")
    log_probs = emissions(5, 4, 5)
    spelled = {"ab": "ab", "b": "ab", "ba": "ba"}
    found: Oracle = defaultdict(lambda: -math.inf)
    for classes, log_prob in every_sequence(log_probs).items():
        parts = [part for part in "".join("ab|"[c - 1] for c in classes).split("|") if part]
        if all(part in spelled for part in parts):
            text = " ".join(spelled[part] for part in parts)
            readings = 2 ** sum(spelled[part] == "ba" for part in parts)  # BA or ba
            found[text] = float(np.logaddexp(found[text], log_prob + math.log(readings) - 0.5 * len(parts)))
    config = DecodingConfig(**EVERYTHING, lexicon=str(lexicon), word_score=-0.5)
    require_equal(Decoder(config, Vocabulary(["a", "b", "|"]), TextConfig()), log_probs, found)


@pytest.mark.parametrize("spelling", ["characters", "phones"])
def test_a_line_of_a_lexicon_that_is_there_twice_counts_once(
    tmp_path: Path, spelling: Literal["characters", "phones"]
) -> None:
    lexicon = tmp_path / "words.lst"
    vocabulary = Vocabulary(["a", "b", "|" if spelling == "characters" else "c"], spelling)
    found = []
    for lines in ("ab\ta b |\n", "ab\ta b |\nab\ta b\n"):
        lexicon.write_text(lines)
        config = DecodingConfig(**EVERYTHING, lexicon=str(lexicon))
        found.append(Decoder(config, vocabulary, TextConfig(spelling=spelling)).decode(emissions(5, 4, 5)))
    assert found[0] == found[1]


def test_of_many_words_spelled_alike_the_likeliest_are_searched_for_and_the_others_counted(
    tmp_path: Path,
) -> None:
    rare = [
        "AB",
        "Ab",
        "aB",
        "ab,",
        "ab.",
        "ab!",
        "ab?",
    ]  # before the likely one, and more than flashlight's tree holds
    unigrams = {"<unk>": -3.0, "<s>": -99.0, "</s>": -0.9, **dict.fromkeys(rare, -5.0), "ab": -0.3}
    listed = "".join(f"{score}\t{word}\t0\n" for word, score in unigrams.items())
    lm = tmp_path / "cased.arpa"
    head = f"\\data\\\nngram 1={len(unigrams)}\nngram 2=1\n\n\\1-grams:\n"
    lm.write_text(f"{head}{listed}\n\\2-grams:\n-9.0\tAB AB\n\n\\end\\\n")
    decoder = Decoder(
        DecodingConfig(**EVERYTHING, lm=str(lm), lm_weight=1.0), Vocabulary(["a", "b", "|"]), TextConfig()
    )
    assert decoder.notes == [f"2 words of {lm} are spelled like 6 likelier ones and are not searched for"]
    (said,) = [hypothesis for hypothesis in decoder.decode(emissions(4, 4, 0)) if hypothesis.text == "ab"]
    assert said.lm_score == pytest.approx(-0.3 - 0.9, abs=1e-5)  # KenLM has floats


def test_search_without_a_lexicon_sums_over_every_path(tmp_path: Path) -> None:
    log_probs = emissions(5, 4, 6)
    vocabulary = Vocabulary(["a", "b", "|"])
    oracle: Oracle = defaultdict(lambda: -math.inf)
    for classes, log_prob in every_sequence(log_probs).items():
        text = vocabulary.decode(classes)
        oracle[text] = float(np.logaddexp(oracle[text], log_prob))
    decoder = Decoder(DecodingConfig(**EVERYTHING), vocabulary, TextConfig())
    require_equal(decoder, log_probs, oracle)
    assert all(h.ctc_score == h.score and h.lm_score is None for h in decoder.decode(log_probs))


@pytest.mark.parametrize("with_space", [True, False])
def test_a_language_model_of_symbols_scores_each_of_them(tmp_path: Path, with_space: bool) -> None:
    path = tmp_path / "symbols.arpa"
    path.write_text(SYMBOL_ARPA)
    vocabulary = Vocabulary(["a", "b", "|"] if with_space else ["a", "b"])
    log_probs = emissions(5, len(vocabulary), 7)
    oracle: Oracle = defaultdict(lambda: -math.inf)
    rows = log_probs.double().tolist()
    for way in itertools.product(range(len(vocabulary)), repeat=5):
        classes = collapse(np.array(way)).tolist()
        scored = [vocabulary.symbols[c - 1] for c in classes]
        if scored and scored[0] == "|" and way[0] == classes[0]:
            scored = scored[1:]  # a space in the first frame is the silence before the utterance
        total = sum(row[c] for row, c in zip(rows, way, strict=True)) + 0.8 * symbol_sequence(scored)
        text = vocabulary.decode(classes)
        oracle[text] = float(np.logaddexp(oracle[text], total))
    config = DecodingConfig(**EVERYTHING, lm=str(path), lm_of="symbols", lm_weight=0.8)
    require_equal(Decoder(config, vocabulary, TextConfig()), log_probs, oracle)


def spellings(classes: tuple[int, ...], lexicon: dict[str, tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Every sequence of words that spells `classes` end to end."""
    if not classes:
        return [()]
    return [
        (word, *rest)
        for word, spelled in lexicon.items()
        if classes[: len(spelled)] == spelled
        for rest in spellings(classes[len(spelled) :], lexicon)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_phones_become_words_where_nothing_stands_between_them(tmp_path: Path, arpa: str, seed: int) -> None:
    """Last phones that last, words of one phone, the same phone at the end of a word and the beginning of the
    next."""
    spelled = {"ab": (1, 2), "ba": (2, 1), "a": (1,)}
    lexicon = tmp_path / "phones.lst"
    lexicon.write_text("ab\tAA B\nba\tB AA\na\tAA\nlost\tZ\n")
    log_probs = emissions(6, 3, seed)
    oracle: Oracle = defaultdict(lambda: -math.inf)
    for classes, log_prob in every_sequence(log_probs).items():
        for words in spellings(classes, spelled):
            value = log_prob + 1.5 * sentence(words) + 0.3 * len(words)
            oracle[" ".join(words)] = float(np.logaddexp(oracle[" ".join(words)], value))
    config = DecodingConfig(**EVERYTHING, lm=arpa, lexicon=str(lexicon), lm_weight=1.5, word_score=0.3)
    decoder = Decoder(config, Vocabulary(["AA", "B"], "phones"), TextConfig(spelling="phones"))
    require_equal(decoder, log_probs, oracle)
    assert decoder.writes_words and "1 words of" in decoder.notes[0] and "such as lost" in decoder.notes[0]
    assert decoder.decode(log_probs)[0].words is not None


def test_a_script_without_spaces_is_written_without_them(tmp_path: Path, arpa: str) -> None:
    decoder = Decoder(DecodingConfig(**EVERYTHING, lm=arpa), Vocabulary(["a", "b"]), TextConfig())
    texts = [hypothesis.text for hypothesis in decoder.decode(emissions(5, 3, 0))]
    assert "abba" in texts and not any(" " in text for text in texts)


@pytest.mark.parametrize(
    "limits", [{"beam_size": 1}, {"beam_size": 3}, {"beam_threshold": 1.0}, {"beam_tokens": 2}]
)
@pytest.mark.parametrize("guided", [True, False])
def test_a_small_beam_finds_no_more_than_there_is(arpa: str, limits: dict[str, Any], guided: bool) -> None:
    vocabulary = Vocabulary(["a", "b", "|"])
    tree: dict[str, Any] = {**EVERYTHING, **({"lm": arpa} if guided else {})}
    for seed in range(5):
        log_probs = emissions(7, 4, seed)
        exact = {
            h.text: h.score
            for h in Decoder(DecodingConfig(**tree), vocabulary, TextConfig()).decode(log_probs)
        }
        small = DecodingConfig(**{**tree, "nbest": 1, **limits})
        (found,) = Decoder(small, vocabulary, TextConfig()).decode(log_probs)
        if found.text in exact:  # else the beam held words half said, and nothing whole
            assert found.score <= exact[found.text] + TOLERANCE


def test_an_utterance_that_ends_inside_a_word_has_what_was_said_before_it(tmp_path: Path) -> None:
    lexicon = tmp_path / "words.lst"
    lexicon.write_text("ab\ta b |\n")
    log_probs = torch.full((5, 4), -50.0)
    for frame, symbol in enumerate([1, 2, 3, 1, 1]):
        log_probs[frame, symbol] = 0.0
    config = DecodingConfig(method="beam", lexicon=str(lexicon), beam_size=1, word_score=-1.0)
    (found,) = Decoder(config, Vocabulary(["a", "b", "|"]), TextConfig()).decode(log_probs)
    assert (
        found.text == "ab"
        and found.ctc_score == pytest.approx(0.0, abs=1e-3)
        and found.score == pytest.approx(-1.0, abs=1e-3)
    )


def test_greedy_decoding_is_the_best_path() -> None:
    vocabulary = Vocabulary(["a", "b", "|"])
    decoder = Decoder(DecodingConfig(), vocabulary, TextConfig())
    for seed in range(20):
        log_probs = emissions(9, 4, seed)
        (found,) = decoder.decode(log_probs)
        assert [found.text] == greedy(log_probs[None], [9], vocabulary)
        assert found.score == pytest.approx(log_probs.double().max(1).values.sum().item()) == found.ctc_score


def test_words_take_the_case_that_the_recogniser_writes(tmp_path: Path) -> None:
    path = tmp_path / "upper.arpa.gz"
    path.write_bytes(gzip.compress(ARPA.replace("ab", "AB").replace("ba", "B-A").encode()))
    decoder = Decoder(DecodingConfig(**EVERYTHING, lm=str(path)), Vocabulary(["a", "b", "|"]), TextConfig())
    texts = {hypothesis.text for hypothesis in decoder.decode(emissions(6, 4, 0))}
    assert {"ab", "b a", "a"} < texts and not decoder.notes


def test_what_cannot_be_spelled_or_is_not_known_is_counted_and_named(tmp_path: Path, arpa: str) -> None:
    few = Decoder(DecodingConfig(method="beam", lm=arpa), Vocabulary(["a", "|"]), TextConfig())
    assert few.notes == [
        f"2 words of {arpa} cannot be spelled in the vocabulary and are never written, such as ab, ba"
    ]
    lexicon = tmp_path / "words.lst"
    lexicon.write_text("ab\ta b |\nbb\tb b |\n")
    more = Decoder(
        DecodingConfig(**EVERYTHING, lm=arpa, lexicon=str(lexicon)), Vocabulary(["a", "b", "|"]), TextConfig()
    )
    assert more.notes == [f"1 words of {lexicon} are not in {arpa} and score as <unk>, such as 'bb'"]
    scores = {h.text: h.lm_score for h in more.decode(emissions(6, 4, 0))}
    assert scores["bb ab"] == pytest.approx(sentence(("bb", "ab")), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("zz\tz z |\n", "none of its 1 words can be spelled in the recogniser's vocabulary"),
        ("ab\n", "line 1: 'ab' has no spelling; a line is"),
        ("", "none of its 0 words"),
        (
            "bb\tb b |\n",
            r"knows none of the 1 words of .*words.lst, such as 'bb'; is it of another language or case\?",
        ),
    ],
)
def test_a_lexicon_that_does_not_fit_is_an_error(
    tmp_path: Path, arpa: str, content: str, message: str
) -> None:
    lexicon = tmp_path / "words.lst"
    lexicon.write_text(content)
    with pytest.raises(ValueError, match=message):
        Decoder(
            DecodingConfig(method="beam", lm=arpa, lexicon=str(lexicon)),
            Vocabulary(["a", "b", "|"]),
            TextConfig(),
        )


def test_phones_need_a_lexicon_and_missing_files_are_named(tmp_path: Path, arpa: str) -> None:
    phones = Vocabulary(["AA", "B"], "phones")
    with pytest.raises(ValueError, match="the recogniser writes phones; give a `lexicon`"):
        Decoder(DecodingConfig(method="beam", lm=arpa), phones, TextConfig(spelling="phones"))
    for key in ("lm", "lexicon"):
        with pytest.raises(ValueError, match=f"decoding.{key}: nowhere does not exist"):
            Decoder(
                DecodingConfig.model_validate({"method": "beam", key: "nowhere"}),
                phones,
                TextConfig(spelling="phones"),
            )
        with pytest.raises(ValueError, match=f"decoding.{key}: {tmp_path} is a folder; it should be an? "):
            Decoder(
                DecodingConfig.model_validate({"method": "beam", key: str(tmp_path)}),
                phones,
                TextConfig(spelling="phones"),
            )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lm": "x"}, 'give method = "beam"'),
        ({"nbest": 2}, 'give method = "beam"'),
        ({"method": "beam", "lm_of": "symbols"}, "needs an `lm` of symbols"),
        ({"method": "beam", "lm_of": "symbols", "lm": "x", "lexicon": "y"}, "and no lexicon"),
        ({"method": "beam", "nbest": 9, "beam_size": 3}, "nbest = 9 is more than beam_size = 3"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DecodingConfig.model_validate(tree)


def test_beam_search_without_the_library_says_what_to_install(
    arpa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flashlight.lib.text", "flashlight.lib.text.decoder", "flashlight.lib.text.decoder.kenlm"):
        monkeypatch.setitem(sys.modules, name, None)
    for tree in ({"method": "beam"}, {"method": "beam", "lm": arpa}):
        with pytest.raises(
            ValueError,
            match=r"needs flashlight-text; pip install 'wordless\[lm\]', or in a checkout '\.\[lm\]'",
        ):
            Decoder(DecodingConfig.model_validate(tree), Vocabulary(["a", "b", "|"]), TextConfig())


BROKEN = {
    "no_end.arpa": ARPA.replace("\\end\\", ""),
    "cut.arpa": ARPA[:90],
    "cut_later.arpa": ARPA[: ARPA.index("ab ba")],
    "wrong_count.arpa": ARPA.replace("ngram 1=6", "ngram 1=9"),
    "no_start.arpa": ARPA.replace("-99\t<s>\t-0.3\n", "").replace("ngram 1=6", "ngram 1=5"),
    "positive.arpa": ARPA.replace("-0.5\tab", "0.5\tab"),
    "nan.arpa": ARPA.replace("-0.5\tab", "nan\tab"),
    "text.arpa": "once upon a time\n",
    "empty.arpa": "",
    "cut.arpa.gz": gzip.compress(ARPA.encode())[:60],
    "random.arpa": np.random.default_rng(0).bytes(2000),
    "damaged.bin": b"mmap lm http://kheafield.com/code format version 5\n\0"
    + np.random.default_rng(0).bytes(2000),
}
LOAD_ALL = """
import json, sys
from pretrain.ctc.decoding import Decoder, DecodingConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
said = {}
for path in sys.argv[2:]:
    try:
        lexicon = sys.argv[1] if path.endswith("bin") else None
        Decoder(DecodingConfig(method="beam", lm=path, lexicon=lexicon), Vocabulary(["a", "b", "|"]), TextConfig())
        said[path] = None
    except ValueError as error:
        said[path] = str(error)
print(json.dumps(said))
"""


def test_no_file_that_is_no_language_model_gets_past_a_message(tmp_path: Path, arpa: str) -> None:
    """In another process, which an error in C++ could end."""
    lexicon = tmp_path / "words.lst"
    lexicon.write_text("ab\ta b |\n")
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = [str(tmp_path / name) for name in BROKEN]
    ran = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(lexicon), arpa, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr  # KenLM's bar of progress is not shown
    said = json.loads(ran.stdout)
    assert said.pop(arpa) is None
    for path in paths:
        assert said[path] is not None and said[path].startswith(f"decoding.lm: {path} "), (path, said[path])


# `build_binary trie` of KenLM 0.3.0 on ARPA; zlib, base 85.
BINARY = (
    "c-qU&O)OBz$yLZGDJihh*U!#KO-##7%}LQq&d=3P&QD2INXswEO)OC;OD!tS%+FIW<zhg9274f}pAks>2Lg}?BUFY7Odhajf{KAK"
    "8&r-3$pls?T~MdE*RrjYK`=Y}@+EO`_8%96|7~jBm&BFx{bOzMgY5fNtlj^#MGqp`y&ps%_{R>-nmKbHjCb}-&;GM#&g?_73dr|?"
    "^V8DO!1|e>d}Cu{kovvM45)yG0Xw*O=FAsQW8=ry)6&%L11+vak+mt!%eG^%DYj!sWJpY6u+ayyk`fsJN4Zic"
)


def test_a_binary_language_model_scores_as_the_arpa_it_was_made_of_and_needs_a_lexicon(
    tmp_path: Path, arpa: str
) -> None:
    path, lexicon = tmp_path / "lm.bin", tmp_path / "words.lst"
    path.write_bytes(zlib.decompress(base64.b85decode(BINARY)))
    lexicon.write_text("ab\ta b |\nba\tb a |\na\ta |\nbb\tb b |\n")
    vocabulary, log_probs = Vocabulary(["a", "b", "|"]), emissions(6, 4, 0)
    found = []
    for lm in (str(path), arpa):
        decoder = Decoder(DecodingConfig(**EVERYTHING, lm=lm, lexicon=str(lexicon)), vocabulary, TextConfig())
        assert decoder.notes == [f"1 words of {lexicon} are not in {lm} and score as <unk>, such as 'bb'"]
        found.append(decoder.decode(log_probs))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="is a KenLM binary, whose words cannot be listed; give a lexicon"):
        Decoder(DecodingConfig(method="beam", lm=str(path)), vocabulary, TextConfig())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="Binary file has size 200 but the headers say"):
        Decoder(DecodingConfig(method="beam", lm=str(path), lexicon=str(lexicon)), vocabulary, TextConfig())
