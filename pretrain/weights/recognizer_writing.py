"""CTC heads to other libraries' files."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.ctc.text import SPACE
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.weights.foreign import CTCHead
from pretrain.weights.recognizer import CHARACTERS, PHONES, name_blank, piece_numbers, take_rows, write_tree


def write_head(folder: Path, recognizer: CTCHead, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a tokenizer's files into `folder` and bring the head `lm_head` of `tensors` to its classes;
    returns keys for config.json.

    transformers leaves masks out for `apply_spec_augment` alone and not for probabilities of zero, with which
    the mask embedding would have no place. Its losses of reduction "mean" are divided by the number of
    symbols, utterance by utterance, as ours by that of the batch.
    """
    vocabulary, _, ctc = recognizer
    write_classes = _write_pieces if vocabulary.spelling == "tokenizer" else _write_vocab
    settings, rows = write_classes(folder, vocabulary)
    take_rows(tensors, "lm_head", rows, str(folder))
    blank = settings["pad_token"]
    settings |= {
        "clean_up_tokenization_spaces": False,
        "processor_class": "Wav2Vec2Processor",
    }  # " ." stays " ."
    special = {
        key: value
        for key, value in settings.items()
        if key in ("pad_token", "unk_token", "bos_token", "eos_token") and value
    }
    write_tree(folder / "tokenizer_config.json", settings)
    write_tree(folder / "special_tokens_map.json", special)
    names = [blank, *vocabulary.symbols] if vocabulary.spelling != "tokenizer" else []
    ids = {
        key: names.index(token) if (token := settings[key]) in names else None
        for key in ("bos_token", "eos_token")
    }
    masks = ctc.mask_start_probability > 0 or ctc.mask_channel_probability > 0
    told = {
        "mask_time_prob": round(ctc.mask_start_probability * ctc.mask_length, 12),
        "mask_time_length": ctc.mask_length,
        "mask_feature_prob": round(ctc.mask_channel_probability * ctc.mask_channel_length, 12),
        "mask_feature_length": ctc.mask_channel_length,
        "mask_time_min_masks": 2,
        "mask_feature_min_masks": 0,
    }
    return {
        "vocab_size": len(rows),
        "pad_token_id": rows.index(0),
        **{f"{key}_id": value for key, value in ids.items()},
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": False,
        "final_dropout": ctc.final_dropout,
        "apply_spec_augment": masks,
        **(told if masks else {}),
    }


def _write_vocab(folder: Path, vocabulary: Vocabulary) -> tuple[dict[str, Any], list[int]]:
    """vocab.json with our classes in our order. There is a token for unknown characters only where there is a
    class for them."""
    blank = name_blank(vocabulary.symbols)
    write_tree(
        folder / "vocab.json",
        {blank: 0, **{symbol: number for number, symbol in enumerate(vocabulary.symbols, start=1)}},
    )
    unknown = next((name for name in ("<unk>", "[UNK]", "[unk]") if name in vocabulary.symbols), "<unk>")
    ends = {
        key: name if name in vocabulary.symbols else None
        for key, name in (("bos_token", "<s>"), ("eos_token", "</s>"))
    }
    settings: dict[str, Any] = {"pad_token": blank, "unk_token": unknown, **ends}
    if vocabulary.spelling == "phones":
        delimiters = {"phone_delimiter_token": " ", "word_delimiter_token": None}
        return {"tokenizer_class": PHONES, **settings, **delimiters, "do_phonemize": False}, [
            *range(len(vocabulary))
        ]
    settings |= {"word_delimiter_token": SPACE, "replace_word_delimiter_char": " ", "do_lower_case": False}
    return {"tokenizer_class": CHARACTERS, **settings}, [*range(len(vocabulary))]


def _write_pieces(folder: Path, vocabulary: Vocabulary) -> tuple[dict[str, Any], list[int]]:
    """tokenizer.json with the blank as one more token, its decoder after CTC's; the tokenizer's special
    tokens are classes that never win."""
    assert vocabulary.tokenizer is not None
    tree, numbers = json.loads(vocabulary.tokenizer), piece_numbers(vocabulary.tokenizer)
    blank, last = name_blank(numbers), 1 + max(numbers.values())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tree["added_tokens"] = [
        *tree.get("added_tokens", []),
        {"id": last, "content": blank, **plain, "special": True},
    ]
    ctc = {"type": "CTC", "pad_token": blank, "word_delimiter_token": SPACE, "cleanup": False}
    tree["decoder"] = {
        "type": "Sequence",
        "decoders": [ctc, *([tree["decoder"]] if tree.get("decoder") else [])],
    }
    tree["post_processor"] = None  # which may put special tokens around a transcript
    write_tree(folder / "tokenizer.json", tree)
    rows = [-1] * last + [0]
    for row, symbol in enumerate(vocabulary.symbols, start=1):
        rows[numbers[symbol]] = row
    ends = {"bos_token": None, "eos_token": None, "unk_token": None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": blank, **ends}, rows
