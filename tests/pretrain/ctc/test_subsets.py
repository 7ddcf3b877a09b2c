import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pretrain.config import Config, parse_config
from pretrain.ctc.subsets import (
    Budget,
    amount,
    count_problems,
    draw_subset,
    examine,
    problems_message,
    targets,
    transcribed,
    write_subset,
)
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.manifest import ROW_GROUP, Manifest, write_manifest


def row(name: str, **columns: Any) -> dict[str, Any]:
    return {
        "id": name,
        "path": f"/audio/{name}.wav",
        "start": 0,
        "num_samples": 16000,
        "sample_rate": 16000,
    } | columns


def write(folder: Path, rows: list[dict[str, Any]]) -> Manifest:
    write_manifest(folder, rows, {}, {}, root="/audio")
    return Manifest(folder)


def corpus(folder: Path, count: int = 200, speakers: int = 4) -> Manifest:
    """Utterances of half a second to three, nine of ten with a transcript, in three splits."""
    rng = np.random.default_rng(0)
    return write(
        folder,
        [
            row(
                f"u{n:04d}",
                num_samples=int(rng.integers(8000, 48000)),
                speaker=f"s{int(rng.integers(speakers))}",
                text=f"text {n}" if rng.random() < 0.9 else None,
                split=["train", "train", "dev"][n % 3],
            )
            for n in range(count)
        ],
    )


def minutes(manifest: Manifest, rows: np.ndarray) -> float:
    return float(manifest.lengths[rows].sum()) / 960000


def draw_one_by_one(manifest: Manifest, rows: list[int], order: dict[int, int], wanted: int) -> list[int]:
    """The slow oracle: of the speakers, always the one with the least audio so far; `order` (row to place)
    says what comes first."""
    queues: dict[str | None, list[int]] = {}
    for number in sorted(rows, key=order.__getitem__):
        queues.setdefault(manifest[number].speaker, []).append(number)
    had = dict.fromkeys(queues, 0)
    drawn: list[int] = []
    while sum(manifest[number].length for number in drawn) < wanted:
        # the first drawn of equals
        speaker = min((name for name in queues if queues[name]), key=lambda name: had[name])
        drawn.append(queues[speaker].pop(0))
        had[speaker] += manifest[drawn[-1]].length
    return drawn


@pytest.mark.parametrize("text", ["all", "10min", "90s", "1h", "2.5h", "25%", "100%", "0.5%"])
def test_a_budget_has_one_of_five_forms(text: str) -> None:
    assert Of(budget=text).budget == text


def test_budgets_that_ask_for_the_same_are_of_one_amount() -> None:
    assert (
        amount("1min") == amount("60s") == amount("1.0min")
        and amount("all") == amount("100%")
        and amount("1.5h") == amount("90min")
    )
    assert len({amount(budget) for budget in ("1s", "1min", "1h", "1%")}) == 4


class Of(Config):
    budget: Budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "10 min",
        "10m",
        "-1h",
        "1e3s",
        "½h",
        "٣s",
        "All",
        "0s",
        "0%",
        "101%",
        "10min\n",
        "1.h",
        "infmin",
    ],
)
def test_anything_else_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match=r"a\.toml: budget: .* is no budget"):
        parse_config(Of, {"budget": text}, "a.toml")


def test_a_smaller_draw_lies_inside_a_larger_one_and_passes_its_budget_by_less_than_an_utterance(
    tmp_path: Path,
) -> None:
    manifest = corpus(tmp_path)
    rows = transcribed(manifest, TextConfig())
    budgets = [("6s", 0.1), ("0.5min", 0.5), ("2min", 2.0), ("0.06h", 3.6)]
    draws = [draw_subset(manifest, rows, budget, 3).tolist() for budget, _ in budgets]
    for smaller, larger in pairwise(draws):
        assert larger[: len(smaller)] == smaller
    for draw, (_, wanted) in zip(draws, budgets, strict=True):
        assert wanted <= minutes(manifest, draw) < wanted + minutes(manifest, draw[-1:]) and len(
            set(draw)
        ) == len(draw)
        assert all(manifest[number].text for number in draw)
    assert draw_subset(manifest, rows, "0.5min", 4).tolist() != draws[1]


def test_a_share_is_of_the_audio_that_can_be_used(tmp_path: Path) -> None:
    manifest = corpus(tmp_path)
    rows = transcribed(manifest, TextConfig())
    quarter = draw_subset(manifest, rows, "25%", 0)
    assert 0.25 <= minutes(manifest, quarter) / minutes(manifest, rows) < 0.27
    assert (
        sorted(draw_subset(manifest, rows, "100%", 0).tolist())
        == rows.tolist()
        == draw_subset(manifest, rows, "all", 0).tolist()
    )
    assert draw_subset(manifest, rows, "50%", 0)[: len(quarter)].tolist() == quarter.tolist()


@pytest.mark.parametrize("budget", ["0.8min", "20%"])
def test_speakers_have_equal_audio_to_within_an_utterance(tmp_path: Path, budget: str) -> None:
    manifest = corpus(tmp_path)
    drawn = draw_subset(manifest, np.arange(200), budget, seed=0)
    seconds = Counter[str | None]()
    for number in drawn.tolist():
        seconds[manifest[number].speaker] += manifest[number].length / 16000
    assert len(seconds) == 4 and max(seconds.values()) - min(seconds.values()) < 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None, "c"]), st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(0, 3),
    st.data(),
)
def test_the_draw_is_the_greedy_one(
    tmp_path_factory: Any, utterances: list[tuple[str | None, int]], seed: int, data: Any
) -> None:
    rows = [
        row(f"u{n}", speaker=speaker, num_samples=16000 * length)
        for n, (speaker, length) in enumerate(utterances)
    ]
    manifest = write(tmp_path_factory.mktemp("manifest"), rows)
    everything = draw_subset(manifest, np.arange(len(rows)), "100%", seed)
    assert sorted(everything.tolist()) == list(range(len(rows)))
    # Within each speaker the draw keeps the hashes' order, so a draw of a single speaker's rows gives it for
    # the oracle.
    turns = {
        name: [n for n, (speaker, _) in enumerate(utterances) if speaker == name] for name, _ in utterances
    }
    alone = [draw_subset(manifest, np.array(numbers), "100%", seed).tolist() for numbers in turns.values()]
    place = {number: index for index, number in enumerate(everything.tolist())}
    assert all(sorted(numbers, key=place.__getitem__) == numbers for numbers in alone)
    wanted = data.draw(st.integers(1, sum(length for _, length in utterances)))
    expected = draw_one_by_one(manifest, list(range(len(rows))), place, wanted * 16000)
    assert draw_subset(manifest, np.arange(len(rows)), f"{wanted}s", seed).tolist() == expected


def test_the_draw_is_of_ids_and_not_of_rows(tmp_path: Path) -> None:
    """Another order of the corpus, or a row that is quarantined, leaves the order of the rest; and one fixed
    draw, on any machine."""
    manifest = corpus(tmp_path / "a")
    shuffled = manifest.take(np.random.default_rng(1).permutation(200))
    names = manifest.take(draw_subset(manifest, np.arange(200), "1min", 5)).ids
    assert shuffled.take(draw_subset(shuffled, np.arange(200), "1min", 5)).ids == names
    # of equal lengths: the hashes decide
    among = write(tmp_path / "three", [row(f"u{n}", speaker="xyz"[n % 3]) for n in range(12)])
    assert draw_subset(among, np.arange(12), "100%", 0).tolist() == [3, 2, 10, 0, 11, 7, 9, 5, 1, 6, 8, 4]
    alone = write(tmp_path / "b", [row(f"u{n}") for n in range(20)])
    whole = draw_subset(alone, np.arange(20), "100%", 0).tolist()
    assert whole[:5] == [3, 2, 10, 0, 9]
    assert draw_subset(alone, np.delete(np.arange(20), whole[3]), "100%", 0).tolist() == whole[:3] + whole[4:]


def test_rows_without_a_speaker_are_one_speaker(tmp_path: Path) -> None:
    manifest = write(tmp_path, [row(f"u{n:02d}", speaker="x" if n < 10 else None) for n in range(40)])
    drawn = draw_subset(manifest, np.arange(40), "10s", 0)
    assert (drawn < 10).sum() == 5
    assert len(draw_subset(manifest.take(np.arange(10, 40)), np.arange(30), "10s", 0)) == 10


def test_more_than_there_is_names_both_amounts(tmp_path: Path) -> None:
    manifest = corpus(tmp_path)
    with pytest.raises(
        ValueError, match=r"budget = '1h' is 60\.00 minutes, but only 5\.25 of the 6\.13 minutes there have"
    ):
        draw_subset(manifest, transcribed(manifest, TextConfig()), "1h", 0)
    for budget in ("25%", "1s"):
        with pytest.raises(ValueError, match=r"only 0\.00 of the 6\.13 minutes"):
            draw_subset(manifest, np.zeros(0, np.int64), budget, 0)


def test_a_row_with_a_transcript_is_one_whose_text_or_phones_are_known(tmp_path: Path) -> None:
    manifest = write(
        tmp_path,
        [row("a", text="x"), row("b"), row("c", text="", phones=[(0.0, 0.1, "AH")]), row("d", phones=[])],
    )
    phones = TextConfig(spelling="phones")
    assert transcribed(manifest, TextConfig()).tolist() == [0, 2] and transcribed(
        manifest, phones
    ).tolist() == [2, 3]
    assert transcribed(manifest.take(np.array([2, 1, 0])), TextConfig()).tolist() == [0, 2]
    assert next(targets(manifest, phones))[1] == [None, None, "AH", ""]


@pytest.mark.parametrize("spelling", ["characters", "phones"])
def test_targets_by_column_are_those_by_row(tmp_path: Path, spelling: Any) -> None:
    rng = np.random.default_rng(0)
    names = ["SIL", "AH", "B", "é"]
    rows = [
        row(
            str(n),
            text=None if n % 7 == 0 else f"Text {n}!",
            phones=None
            if n % 5 == 0
            else [
                (0.1 * i, 0.1 * i + 0.1, names[k])
                for i, k in enumerate(rng.integers(4, size=rng.integers(5)))
            ],
        )
        for n in range(ROW_GROUP + 300)
    ]
    manifest = write(tmp_path, rows)
    text = TextConfig(spelling=spelling)
    for chosen in (manifest, manifest.take(rng.permutation(len(rows))[:500])):
        blocks = [*targets(chosen, text)]
        assert len(blocks) == 2 and sorted(np.concatenate([numbers for numbers, _ in blocks])) == list(
            range(len(chosen))
        )
        for numbers, block in blocks:
            assert [target or "" for target in block] == [
                text.target(chosen[number]) for number in numbers.tolist()
            ]


def test_transcripts_that_cannot_be_used_are_named_and_counted(tmp_path: Path) -> None:
    texts = ["ab", "axb", "", None, "abababababababab", "aaaaaaaa", "abababab", "a b", "?!"]
    manifest = write(tmp_path, [row(f"u{n:02d}", text=text) for n, text in enumerate(texts)])
    kept, problems = examine(manifest, np.arange(9), TextConfig(), Vocabulary(["a", "b"]), np.full(9, 10))
    assert kept.tolist() == [0, 6]
    assert count_problems(problems) == {"empty": 3, "not in the vocabulary": 2, "too long": 2}
    message = problems_message(manifest, problems)
    assert message.startswith(
        f"{tmp_path}: 7 transcripts cannot be used (3 empty, 2 not in the vocabulary, 2 too long):\n  'u01': "
    )
    for line in (
        "'u01': 'axb' has ['x'], not in the vocabulary",
        "'u02': nothing is left of the transcript once it is normalised",
        "'u03': no transcript",
        "'u04': 16 symbols need 16 frames, it has 10: 'abababababababab'",
        "'u05': 8 symbols need 15 frames, it has 10: 'aaaaaaaa'",  # 7 blanks between the same
        "'u07': 'a b' has [' '], not in the vocabulary",
        "'u08': nothing is left",
    ):
        assert f"\n  {line}" in message
    assert "u00" not in message and "u06" not in message
    assert problems_message(manifest, problems, shown=2).endswith(
        "'u02': " + problems[1]["reason"] + "\n  and 5 more"
    )


def test_rows_are_examined_in_any_order_with_their_own_frames(tmp_path: Path) -> None:
    manifest = write(tmp_path, [row(f"u{n}", text="abc"[: n + 1]) for n in range(3)])
    rows = np.array([2, 0, 1])
    kept, problems = examine(manifest, rows, TextConfig(), Vocabulary(["a", "b", "c"]), np.array([3, 1, 1]))
    assert kept.tolist() == [2, 0] and [problem["id"] for problem in problems] == ["u1"]
    kept, problems = examine(
        manifest, np.zeros(0, np.int64), TextConfig(), Vocabulary(["a"]), np.zeros(0, np.int64)
    )
    assert kept.tolist() == problems == []


def test_a_transcript_that_its_tokenizer_would_write_otherwise_is_a_problem(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "▁a": 3}, [("▁", "a")]))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = (
        normalizers.Lowercase(),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    manifest = write(
        tmp_path / "manifest", [row("a", text="ab A"), row("b", text="ab"), row("c", text="acb")]
    )
    text = TextConfig(spelling="tokenizer", tokenizer=str(tmp_path / "tokenizer.json"), case="keep")
    kept, problems = examine(manifest, np.arange(3), text, Vocabulary.of([], text), np.full(3, 10))
    assert kept.tolist() == [1]
    assert [(problem["kind"], problem["reason"]) for problem in problems] == [
        ("changed by the tokenizer", "'ab A' is 'ab a' to the tokenizer"),
        ("not in the vocabulary", "'acb' has ['c'], not in the vocabulary"),
    ]


def test_a_subset_is_a_manifest_that_can_be_used_again(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "corpus", count=3000)
    train = manifest.select("train")
    rows = draw_subset(train, transcribed(train, TextConfig()), "10min", 2)
    subset = write_subset(tmp_path / "subset", train, rows, budget="10min", seed=2)
    assert list(subset) == list(train.take(np.sort(rows))) and len(subset) == len(rows)
    meta = json.loads((tmp_path / "subset" / "meta.json").read_text())
    assert meta["parents"] == {"manifest": manifest.fingerprint} and meta["root"] == "/audio" == manifest.root
    assert (meta["budget"], meta["budget_seed"], meta["num_utterances"]) == ("10min", 2, len(rows))
    assert 10 <= meta["minutes"] < 10.05 and meta["minutes"] == pytest.approx(
        meta["hours"] * 60
    ) == pytest.approx(minutes(train, rows))
    assert list(meta["minutes_by_speaker"]) == ["s0", "s1", "s2", "s3"]
    assert sum(meta["minutes_by_speaker"].values()) == pytest.approx(meta["minutes"])
    # A smaller budget drawn from it is that drawn from the corpus.
    small = [
        chosen.take(draw_subset(chosen, transcribed(chosen, TextConfig()), "1min", 2)).ids
        for chosen in (train, subset)
    ]
    assert small[0] == small[1]


def test_a_subset_keeps_every_column_and_needs_no_more_than_its_rows(tmp_path: Path) -> None:
    phones, words = [(0.0, 0.5, "w"), (0.5, 1.0, "ʌ")], [(0.0, 1.0, "one")]
    rows = [
        row(
            "a",
            speaker=None,
            text="żółć",
            phones=phones,
            words=words,
            member_offset=512,
            member_size=9,
            split="dev",
        ),
        row("b"),
    ]
    manifest = write(tmp_path / "all", rows)
    subset = write_subset(tmp_path / "subset", manifest, np.array([0]))
    assert list(subset) == [manifest[0]] and subset.has_words
    assert json.loads((tmp_path / "subset" / "meta.json").read_text())["minutes_by_speaker"] == {
        "": pytest.approx(1 / 60)
    }
    # as if indexed alone
    assert write_manifest(tmp_path / "same", rows[:1], {}, {}, root="/audio") == subset.fingerprint
    assert pq.read_metadata(tmp_path / "subset" / "manifest.parquet").num_row_groups == 1


def test_minutes_of_rows_without_a_speaker_and_of_one_without_a_name_are_told_together(
    tmp_path: Path,
) -> None:
    manifest = write(
        tmp_path / "all",
        [row("a", speaker=None), row("b", speaker=""), row("c", speaker=""), row("d", speaker="x")],
    )
    write_subset(tmp_path / "subset", manifest, np.arange(4))
    told = json.loads((tmp_path / "subset" / "meta.json").read_text())["minutes_by_speaker"]
    assert told == {"": pytest.approx(3 / 60), "x": pytest.approx(1 / 60)}


def test_a_subset_that_stands_is_kept_and_another_one_is_refused(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "corpus")
    rows = draw_subset(manifest, np.arange(200), "30s", 0)
    first = write_subset(tmp_path / "subset", manifest, rows, budget="30s", seed=0)
    written = (tmp_path / "subset" / "meta.json").stat().st_mtime_ns
    again = write_subset(tmp_path / "subset", manifest, rows[::-1].copy(), budget="30s", seed=0)
    assert (
        again.fingerprint == first.fingerprint
        and (tmp_path / "subset" / "meta.json").stat().st_mtime_ns == written
    )
    with pytest.raises(ValueError, match="holds another labelled subset .*budget '30s' there, '1min' now"):
        write_subset(
            tmp_path / "subset",
            manifest,
            draw_subset(manifest, np.arange(200), "1min", 0),
            budget="1min",
            seed=0,
        )
    with pytest.raises(ValueError, match="other utterances"):
        write_subset(
            tmp_path / "subset",
            manifest,
            np.setdiff1d(np.arange(200), rows)[: len(rows)],
            budget="30s",
            seed=0,
        )
    (tmp_path / "subset" / "meta.json").unlink()  # interrupted: written anew
    assert (
        write_subset(tmp_path / "subset", manifest, rows, budget="30s", seed=0).fingerprint
        == first.fingerprint
    )


def test_less_than_the_budget_is_all_of_it_where_that_is_at_least_enough(
    tmp_path: Path, make_corpus: Any
) -> None:
    manifest = make_corpus(tmp_path, [np.zeros(16000, np.float32)] * 5, texts=["a"] * 5)
    rows = np.arange(5)
    assert draw_subset(manifest, rows, "10s", 0, "5s").tolist() == rows.tolist()
    assert len(draw_subset(manifest, rows, "3s", 0, "5s")) == 3
    with pytest.raises(ValueError, match=r"at least 6s would do"):
        draw_subset(manifest, rows, "10s", 0, "6s")
