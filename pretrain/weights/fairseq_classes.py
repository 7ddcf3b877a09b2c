"""The classes of fairseq's HuBERT models, and its dictionaries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.weights.pickles import FairseqDictionary

NUM_SPECIALS = 4  # <s>, <pad>, </s>, <unk>


def keep_classes(
    tensors: dict[str, Tensor],
    source: Path,
    state: Mapping[str, Any],
    num_classes: int | None,
    notes: list[str],
) -> None:
    """Bring `label_embs_concat` to a row per class, in the order of the labels: fairseq's dictionary puts
    four specials first."""
    rows = len(tensors["label_embs_concat"])
    projection, width = tensors.get("final_proj.weight"), tensors["label_embs_concat"].shape[1]
    if projection is not None and len(projection) != width:
        raise ValueError(
            f"{source}: final_proj has {len(projection)} rows and embeddings {width}: several label sets are "
            "not supported"
        )
    symbols = dictionary_symbols(state)
    if len(symbols) > 1:
        raise ValueError(f"{source}: learned from {len(symbols)} label sets; wordless learns from one")
    if symbols and len(symbols[0]) == rows:
        numbered = {int(symbol): row for row, symbol in enumerate(symbols[0]) if symbol.isdecimal()}
        if sorted(numbered) != list(range(len(numbered))) or not numbered:
            raise ValueError(
                f"{source}: its dictionary's words are not the numbers 0 to K - 1, so no row can be told to "
                "be a class"
            )
        order, told = [numbered[label] for label in range(len(numbered))], "the file's dictionary"
        sure = True
        if num_classes not in (None, len(order)):
            raise ValueError(
                f"{source}: --num-classes {num_classes}, but its dictionary has {len(order)} numbers"
            )
    else:
        kept, told = _count_classes(rows, num_classes, source)
        order, sure = list(range(rows - kept, rows)), num_classes is not None
    tensors["label_embs_concat"] = tensors["label_embs_concat"][order]
    if len(order) < rows:
        notes.append(
            f"of {rows} label embeddings {rows - len(order)} are fairseq's special words, left out ({told}): "
            f"K = {len(order)}"
        )
    elif not sure:
        notes.append(
            f"{rows} label embeddings, none taken for fairseq's special words: K = {rows}; --num-classes "
            "says otherwise"
        )


def _count_classes(rows: int, num_classes: int | None, source: Path) -> tuple[int, str]:
    if num_classes is not None:
        if rows not in (num_classes, num_classes + NUM_SPECIALS):
            raise ValueError(
                f"{source}: {rows} label embeddings; --num-classes {num_classes} would be {num_classes} or "
                f"{num_classes + 4}"
            )
        return num_classes, "--num-classes"
    usual = [
        count
        for count in (rows, rows - NUM_SPECIALS)
        if count >= 32 and (count % 50 == 0 or count.bit_count() == 1)
    ]
    if len(usual) != 1:
        raise ValueError(
            f"{source}: {rows} label embeddings: K = {rows}, or K = {rows - NUM_SPECIALS} and fairseq's four "
            f"special words? Say --num-classes {rows} or --num-classes {rows - NUM_SPECIALS} (`wc -l "
            "dict.km.txt` gives K)"
        )
    return usual[0], f"{rows} = {usual[0]} + {NUM_SPECIALS}; --num-classes says otherwise"


def dictionary_symbols(state: Mapping[str, Any]) -> list[list[str]]:
    """The words of each label dictionary that the checkpoint holds, by row."""
    if "symbols" in state:
        return list(state["symbols"])
    held = [value for key, value in (state.get("task_state") or {}).items() if "dictionar" in key and value]
    groups = [
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for value in held
    ]
    flat = [item for group in groups for item in group]
    return [item.symbols for item in flat if isinstance(item, FairseqDictionary)]
