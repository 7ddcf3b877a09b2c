"""Vocabularies of CTC heads in files of their own: vocab.json, dict.ltr.txt, SentencePiece models."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.ctc.text import SPACE, TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.store.plain_text import read_text
from pretrain.weights.foreign import read_json

FAIRSEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # the first is the blank


OVERWRITE = " #fairseq:overwrite"  # ends the line of a word that is to replace one of the same name


class Classes(NamedTuple):
    """The classes of a foreign head: `rows` are its rows in the order of our classes, the blank's first."""

    vocabulary: Vocabulary
    text: TextConfig
    rows: list[int]


def read_vocabulary(path: Path, num_rows: int, notes: list[str]) -> Classes:
    """The classes of a head whose file does not tell them: a transformers vocab.json, or a fairseq dictionary
    (`dict.ltr.txt`)."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the dict.ltr.txt or the vocab.json of the model")
    if path.suffix == ".json":
        names = ids(path)
        if (last := max(names, default=0)) >= num_rows:
            raise ValueError(
                f"{path}: has a token of number {last}, but the CTC head has {num_rows} classes; is it the "
                "vocabulary of this model?"
            )
        blank = next(
            (token for token in ("<pad>", "[PAD]", "<blank>", "-") if token in names.values()), "<pad>"
        )
        rows = blank_first(str(path), names, blank, None, num_rows)
        symbols = symbols_of(names, rows, notes)
        if SPACE not in symbols:
            symbols = [SPACE if symbol == " " else symbol for symbol in symbols]
        return _of_words(symbols, rows, notes, str(path))
    try:
        lines = [line.rstrip().removesuffix(OVERWRITE) for line in read_text(path).splitlines()]
        words = [line.rsplit(" ", 1)[0] for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"{path}: not a text file ({error}); give the dict.ltr.txt or the vocab.json of the model"
        ) from None
    return of_dictionary(words, num_rows, notes, str(path))


def of_dictionary(words: Sequence[str], num_rows: int, notes: list[str], source: str) -> Classes:
    """The classes of a fairseq dictionary: its four special words, which its file leaves out, and then its
    lines."""
    symbols = list(words) if tuple(words[:4]) == FAIRSEQ_SPECIALS else [*FAIRSEQ_SPECIALS, *words]
    if len(symbols) != num_rows or len(set(symbols)) != num_rows:
        raise ValueError(
            f"{source}: {len(words)} words and {len(symbols) - len(words)} special ones, but the CTC head "
            f"has {num_rows} classes; is it the dictionary of this model?"
        )
    return _of_words(symbols[1:], list(range(num_rows)), notes, source)


def _of_words(symbols: list[str], rows: list[int], notes: list[str], source: str) -> Classes:
    """Classes of which nothing says whether they are letters or phones: the names of some phones have several
    letters."""
    if any(len(word) > 1 and not word.startswith(("<", "[", "madeupword")) for word in symbols):
        if SPACE in symbols or any("\u2581" in word for word in symbols):
            raise ValueError(f"{source}: a dictionary of pieces is not supported; of letters or of phones is")
        return Classes(Vocabulary(symbols, "phones"), TextConfig(spelling="phones"), rows)
    return of_symbols(symbols, rows, notes)


def symbols_of(names: Mapping[int, str], rows: Sequence[int], notes: list[str]) -> list[str]:
    """The symbols of all rows but the blank's, which is the first."""
    if lacking := [row for row in rows[1:] if row not in names]:
        notes.append(f"{len(lacking)} classes have no token; they are spelled <{lacking[0]}> and so on")
    return [names.get(row, f"<{row}>") for row in rows[1:]]


def of_symbols(symbols: list[str], rows: list[int], notes: list[str]) -> Classes:
    """Classes that spell characters or jamo; how transcripts are to be normalised follows from which there
    are."""
    letters = [symbol for symbol in symbols if len(symbol) == 1 and symbol != SPACE]
    small, large = any(c != c.upper() for c in letters), any(c != c.lower() for c in letters)
    plain = TextConfig()
    text = TextConfig(
        spelling="jamo" if any("\u1100" <= c <= "\u11ff" for c in letters) else "characters",
        case="keep" if small and large else "upper" if large else "lower",
        punctuation="keep"
        if any(unicodedata.category(c) == "Po" and c not in plain.normalize(f"q{c}q") for c in letters)
        else "remove",
    )
    notes.append(
        f"transcripts are normalised as its vocabulary tells: case = {text.case!r}, punctuation = "
        f"{text.punctuation!r}"
    )
    return Classes(Vocabulary(symbols, text.spelling), text, rows)


def blank_first(
    source: str, names: Mapping[int, str], blank: str, told: int | None, num_rows: int
) -> list[int]:
    """All rows, the blank's first."""
    found = [number for number, name in names.items() if name == blank]
    if not found or found[0] >= num_rows:
        raise ValueError(f"{source}: the blank, {blank!r}, is none of the {num_rows} classes of the CTC head")
    if told is not None and told != found[0]:
        raise ValueError(
            f"{source}: pad_token_id = {told} but the tokenizer's {blank!r} is number {found[0]}: CTC's "
            "blank cannot be both; set pad_token_id to that of the training"
        )
    return [found[0], *(row for row in range(num_rows) if row != found[0])]


def ids(path: Path) -> dict[int, str]:
    """The numbers of a mapping of symbols, checked."""
    table = read_json(path)
    if any(isinstance(value, dict) for value in table.values()):
        raise ValueError(f"{path}: vocabularies of several languages (MMS) are not supported")
    if not all(isinstance(value, int) and value >= 0 for value in table.values()) or len(
        set(table.values())
    ) < len(table):
        raise ValueError(f"{path}: each token needs a number of its own")
    return {number: token for token, number in table.items()}
