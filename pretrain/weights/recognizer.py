"""The CTC heads of other libraries: which text each class is, and the tokenizer files that say so.

transformers tells it in a tokenizer's files. `Wav2Vec2CTCTokenizer` spells characters, `|` the space, and its
`pad_token` is the blank; `Wav2Vec2PhonemeCTCTokenizer` spells phones and puts spaces between them; pieces are
a tokenizer.json whose decoder merges repeats and drops the blank first. fairseq has a dictionary,
`dict.ltr.txt`, after four special words of which `<s>` is the blank; torchaudio has nothing. In ours the
blank is class 0.

Published heads have classes such as `<s>` that are no text. They stay classes, spelled as transformers spells
them where they win a frame, so that logits, probabilities and texts are those of the original.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pretrain.config import parse_config
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import SPACE, Spelling, TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.weights.ctc_vocabularies import (
    Classes,
    blank_first,
    ids,
    of_dictionary,
    of_symbols,
    read_vocabulary,
    symbols_of,
)
from pretrain.weights.foreign import CTCHead, leave_out, read_json
from pretrain.weights.naming import CTC_HEADS, Format

# of a class that is none of ours: its probability is 0 in float32, and half precision can say it
FILLER_BIAS = -1e4
CHARACTERS, PHONES = "Wav2Vec2CTCTokenizer", "Wav2Vec2PhonemeCTCTokenizer"
READ_AS: dict[str | None, Spelling] = {
    None: "characters",
    CHARACTERS: "characters",
    "Wav2Vec2Tokenizer": "characters",
    PHONES: "phones",
    "PreTrainedTokenizerFast": "tokenizer",
    "TokenizersBackend": "tokenizer",
}


def take_rows(tensors: dict[str, Tensor], name: str, rows: Sequence[int], source: str) -> None:
    """Bring the head `name` to these rows, in place; -1 is a class that never wins. `source` is for
    messages."""
    index, absent = torch.tensor(rows), torch.tensor(rows) < 0
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")  # `to_ours` names what a file lacks
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape) if bias is not None else 'none'}"
        raise ValueError(
            f"{source}: the CTC head's {name}.weight and {name}.bias, {shapes}, do not fit each other: "
            "(classes, width) and (classes,)"
        )
    if not weight.is_floating_point() or (bias is not None and not bias.is_floating_point()):
        return  # `to_ours` names it
    tensors[f"{name}.weight"] = weight[index].masked_fill(absent[:, None], 0.0)
    if bias is not None:
        tensors[f"{name}.bias"] = bias[index].masked_fill(absent, FILLER_BIAS)


def name_blank(symbols: Collection[str]) -> str:
    """A name for the blank that none of `symbols` has."""
    return next(
        name
        for name in chain(("<pad>", "<blank>"), map("<blank {}>".format, count(2)))
        if name not in symbols
    )


def read_classes(folder: Path, config: Mapping[str, Any], num_rows: int, notes: list[str]) -> Classes | None:
    """What the `num_rows` classes of a transformers model are; None where the folder has no tokenizer."""
    settings = _optional(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class")
    pieces = READ_AS.get(kind) == "tokenizer" or (kind is None and not (folder / "vocab.json").is_file())
    if not (folder / ("tokenizer.json" if pieces else "vocab.json")).is_file():
        return None
    if kind not in READ_AS:
        known = ", ".join(str(name) for name in READ_AS if name)
        raise ValueError(
            f"{folder}/tokenizer_config.json: tokenizer_class {kind!r} is not supported; {known} are"
        )
    if (folder / "language_model").is_dir():
        notes.append("its n-gram model (language_model/) is left out: give its file to `transcribe`")
    if settings.get("clean_up_tokenization_spaces"):
        notes.append(
            "its texts keep the spaces before marks and 's that transformers takes out "
            "(clean_up_tokenization_spaces)"
        )
    blank = _token({**_optional(folder / "special_tokens_map.json"), **settings}, "pad_token", "<pad>")
    if pieces:
        return _pieces(folder, config, blank, num_rows, notes)
    names = _names(folder, settings)
    rows = blank_first(f"{folder}/config.json", names, blank, config.get("pad_token_id", 0), num_rows)
    symbols = symbols_of(names, rows, notes)
    if READ_AS[kind] == "phones":
        if (delimiter := settings.get("word_delimiter_token")) in symbols:
            raise ValueError(
                f"{folder}/vocab.json: phones with marks between words ({delimiter!r}) are not supported"
            )
        return Classes(Vocabulary(symbols, "phones"), TextConfig(spelling="phones"), rows)
    delimiter, space = (
        _token(settings, "word_delimiter_token", SPACE),
        settings.get("replace_word_delimiter_char", " "),
    )
    if space != " ":
        raise ValueError(
            f"{folder}/tokenizer_config.json: replace_word_delimiter_char = {space!r}; only a space is "
            "supported"
        )
    if delimiter != SPACE and SPACE in symbols:
        raise ValueError(
            f"{folder}/vocab.json: {SPACE!r} is a character here and not the space, as it is in every "
            "vocabulary of ours"
        )
    symbols = [SPACE if symbol == delimiter else symbol for symbol in symbols]
    if settings.get("do_lower_case"):  # the vocabulary is in capitals and texts are not
        symbols = [symbol.lower() for symbol in symbols]
        if len(set(symbols)) < len(symbols):
            raise ValueError(
                f"{folder}/vocab.json: with do_lower_case two of its tokens are one; only different ones are "
                "supported"
            )
    return of_symbols(symbols, rows, notes)


def read_head(
    tensors: dict[str, Tensor],
    form: Format,
    given: Path | None,
    held: Sequence[Sequence[str]],
    notes: list[str],
    source: str,
) -> CTCHead | None:
    """The CTC head of a fairseq or torchaudio model, its rows brought to our order in place; None where there
    is none.

    `given` is the file that says what its classes are; of the dictionaries `held` by `source` one with a word
    for each may. Without either the head is left out of `tensors`.
    """
    name = CTC_HEADS[form]
    if f"{name}.weight" not in tensors:
        return None
    rows = len(tensors[f"{name}.weight"])
    fitting = [words for words in held if len(words) == rows]
    if given is None and not fitting:
        leave_out(tensors, f"{name}.", "a CTC head", notes)
        notes.append(
            "nothing says what the classes of the CTC head are; --vocabulary dict.ltr.txt does, and keeps it"
        )
        return None
    classes = read_vocabulary(given, rows, notes) if given else of_dictionary(fitting[0], rows, notes, source)
    take_rows(tensors, name, classes.rows, source)
    return CTCHead(classes.vocabulary, classes.text)


def read_training(config: Mapping[str, Any], source: str) -> CTCConfig:
    """How transformers' config.json says that a recogniser is trained; p of a frame to begin a span is
    `mask_time_prob` over its length."""
    masked = config.get("apply_spec_augment", True)
    tree: dict[str, Any] = {"final_dropout": config.get("final_dropout", 0.1)}
    for ours, theirs, probability in (("mask", "mask_time", 0.05), ("mask_channel", "mask_feature", 0.0)):
        length = tree[f"{ours}_length"] = config.get(f"{theirs}_length", 10)
        start = "mask_start_probability" if ours == "mask" else "mask_channel_probability"
        tree[start] = round(config.get(f"{theirs}_prob", probability) / length, 12) if masked else 0.0
    return parse_config(CTCConfig, tree, source)


def _pieces(folder: Path, config: Mapping[str, Any], blank: str, num_rows: int, notes: list[str]) -> Classes:
    """The classes of a tokenizer.json whose decoder begins with CTC's: without it and the blank, it is the
    tokenizer of transcripts."""
    path = folder / "tokenizer.json"
    tree = read_json(path)
    decoder = tree.get("decoder") or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    if not steps or steps[0].get("type") != "CTC":
        raise ValueError(
            f"{path}: its decoder does not begin with CTC, which merges repeats and drops the blank; not "
            "supported"
        )
    rest = steps[1:]
    tree["decoder"] = (
        None if not rest else rest[0] if len(rest) == 1 else {"type": "Sequence", "decoders": rest}
    )
    added = [token for token in tree.get("added_tokens", []) if token["content"] != blank]
    with TemporaryDirectory() as plain:
        write_tree(Path(plain, path.name), {**tree, "added_tokens": added})
        vocabulary = Vocabulary.of_tokenizer(Path(plain, path.name))
    assert vocabulary.tokenizer is not None
    numbers = piece_numbers(vocabulary.tokenizer)
    tokens = {token["id"]: token["content"] for token in tree.get("added_tokens", [])}
    rows = blank_first(str(path), tokens, blank, config.get("pad_token_id", 0), num_rows)
    kept = [rows[0], *(numbers[symbol] for symbol in vocabulary.symbols)]
    if max(kept) >= num_rows:
        raise ValueError(f"{path}: has {1 + max(kept)} tokens, but the CTC head {num_rows} classes")
    if len(kept) < num_rows:
        notes.append(f"the classes of special tokens are left out ({num_rows - len(kept)})")
    return Classes(
        vocabulary,
        TextConfig(spelling="tokenizer", tokenizer=str(path), case="keep", punctuation="keep"),
        kept,
    )


def piece_numbers(definition: str) -> dict[str, int]:
    """The tokenizer's number of each of its tokens."""
    from tokenizers import Tokenizer

    numbers: dict[str, int] = Tokenizer.from_str(definition).get_vocab(with_added_tokens=True)
    return numbers


def _names(folder: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """The tokens of a Wav2Vec2 tokenizer by number; those of vocab.json before those that were added to
    it."""
    added = {
        token: number
        for token, number in _optional(folder / "added_tokens.json").items()
        if isinstance(number, int)
    }
    decoder = settings.get("added_tokens_decoder") or {}
    late = {int(number): _content(token) for number, token in decoder.items()} | {
        number: token for token, number in added.items()
    }
    if settings.get("target_lang") is not None:
        raise ValueError(
            f"{folder}/tokenizer_config.json: target_lang: vocabularies of several languages (MMS) are not "
            "supported"
        )
    return late | ids(folder / "vocab.json")


def _token(settings: Mapping[str, Any], key: str, default: str) -> str:
    return _content(settings[key]) if settings.get(key) is not None else default


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def write_tree(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
