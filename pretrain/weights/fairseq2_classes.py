"""The classes of fairseq2's recognisers."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.config import parse_config
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import SPACE, TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.weights.card_config import (
    DEFAULTS,
    near_names,
)
from pretrain.weights.cards import Card
from pretrain.weights.ctc_vocabularies import Classes, of_symbols, read_vocabulary
from pretrain.weights.families import EncoderModelConfig, RecognizerModelConfig
from pretrain.weights.foreign import (
    CTCHead,
    leave_out,
)
from pretrain.weights.naming import CTC_HEADS, Format
from pretrain.weights.recognizer import take_rows
from pretrain.weights.sentencepiece import SPACE_PIECE, Pieces, read_pieces


def note_least_spans(card: Card, notes: list[str]) -> None:
    """fairseq2 raises where an utterance has fewer spans; here there are at least two of time, shorter where
    they have to be."""
    if "encoder" in card.extra:  # it was written by `export`
        return
    notes.extend(
        f"{key} = {card.config[key]} is not carried on: at least two spans of time are masked here, and none "
        "of channels"
        for key in ("min_num_temporal_mask_spans", "min_num_spatial_mask_spans")
        if card.config[key] != DEFAULTS[card.family][key]
    )


def with_classes(
    tensors: dict[str, Tensor],
    form: Format,
    classes: Classes | None,
    ctc: CTCConfig,
    notes: list[str],
    source: str,
) -> CTCHead | None:
    """The CTC head with its classes; with symbols by number if they are unknown."""
    if classes is None:
        leave_out(tensors, f"{CTC_HEADS[form]}.", "a CTC head", notes)
        notes.append(
            "nothing says what the classes of the CTC head are; --vocabulary FILE (its .model or "
            "dict.ltr.txt) does"
        )
        return None
    take_rows(tensors, CTC_HEADS[form], classes.rows, source)
    return CTCHead(classes.vocabulary, classes.text, ctc)


def given_classes(path: Path, rows: int, notes: list[str]) -> Classes:
    """The classes that `--vocabulary` tells: a SentencePiece model of characters, a dictionary of fairseq's
    or a vocab.json."""
    if path.suffix == ".model":
        pieces = read_pieces(path)
        if not pieces.of_characters:
            raise ValueError(
                f"{path}: is no SentencePiece model of characters; a recogniser of pieces is not supported"
            )
        if len(pieces.names) > rows:
            raise ValueError(
                f"{path}: has {len(pieces.names)} pieces, but the CTC head {rows} classes; is it of this "
                "model?"
            )
        return _of_pieces(pieces, rows, notes, str(path))
    classes = read_vocabulary(path, rows, notes)
    if classes.rows[0] != 0:
        raise ValueError(f"{path}: its blank is number {classes.rows[0]}; that of fairseq2 is always 0")
    return classes


def held_classes(card: Card, rows: int, notes: list[str]) -> Classes | None:
    """The classes that a card tells: an exported one itself, others by their tokenizer. None where it is none
    of characters."""
    if meta := held_table(card, "vocabulary"):
        text = parse_config(TextConfig, held_table(card, "text"), f"{card.source}: wordless.text")
        vocabulary = Vocabulary.from_meta(
            parsed(card, RecognizerModelConfig, {"vocabulary": meta}, "wordless")["vocabulary"]
        )
        if len(vocabulary) > rows:
            raise ValueError(
                f"{card.source}: wordless.vocabulary has {len(vocabulary)} classes, target_vocab_size is "
                f"{rows}"
            )
        if len(vocabulary) == rows or card.extra.get("unknown_class"):
            return Classes(vocabulary, text, list(range(len(vocabulary))))
    if card.tokenizer is None:
        return None
    pieces = read_pieces(card.tokenizer)
    if not pieces.of_characters or len(pieces.names) > rows:
        notes.append(
            f"{card.tokenizer.name} has {len(pieces.names)} pieces for {rows} classes, or they are no "
            "characters: not used"
        )
        return None
    return _of_pieces(pieces, rows, notes, str(card.tokenizer))


def _of_pieces(pieces: Pieces, rows: int, notes: list[str], source: str) -> Classes:
    """Classes spelled as a model of characters spells them; its space is ours, and `|` is then a character's
    name, if it has one."""
    symbols = [f"<{row}>" if row >= len(pieces.names) else pieces.names[row] for row in range(1, rows)]
    if SPACE_PIECE in symbols and SPACE in symbols:
        symbols[symbols.index(SPACE)] = "<|>"  # never the space
    symbols = [SPACE if symbol in (SPACE_PIECE, " ") else symbol for symbol in symbols]
    if len(set(symbols)) < len(symbols):
        raise ValueError(f"{source}: two of its pieces are one character; only different ones are supported")
    return of_symbols(symbols, list(range(rows)), notes)


def held_table(card: Card, key: str) -> dict[str, Any]:
    """A table of the card's field `wordless`; empty where it has none."""
    if not isinstance(held := card.extra.get(key) or {}, Mapping):
        raise ValueError(f"{card.source}: wordless.{key} = {held!r}: a table is expected")
    return dict(held)


def parsed(
    card: Card, kind: type[EncoderModelConfig], told: Mapping[str, Any], where: str = "model_config"
) -> dict[str, Any]:
    """Tables of one of our families as fairseq2 would have them; ValueError that names the card for keys and
    values that are not of it."""
    known = {field.name: field.type for field in fields(kind)}
    for key, value in told.items():
        if key not in known:
            raise ValueError(
                f"{card.source}: {where}.{key}: no key of a {card.family}{near_names(str(key), known)}"
            )
        if not isinstance(value, int if known[key] is int else Mapping):
            expected = "a whole number" if known[key] is int else "a table"
            raise ValueError(f"{card.source}: {where}.{key} = {value!r}: {expected} is expected")
    try:
        return kind(**told).parsed()
    except ValueError as error:
        lines = str(error).replace("model_config.", f"{where}.").splitlines()
        raise ValueError("\n".join(f"{card.source}: {line}" for line in lines)) from None
