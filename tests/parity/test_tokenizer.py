"""The exported tokenizer, loaded by transformers without our code."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here is to be looked up

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from units.corpus.bpe import Merger, learn, tokenizer
from units.corpus.patterns import Pattern
from units.corpus.vocabulary import Vocabulary


@pytest.mark.parametrize("kind", ["units", "merged", "levels", "interleaved"])
def test_transformers_reads_and_writes_units_with_the_model_s_ids(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    units = [rng.integers(0, 20, 50) // 2 for _ in range(20)]
    vocabulary = {
        "units": Vocabulary(num_units=10),
        "merged": Vocabulary(num_units=10, merges=learn(units, 10, 40)),
        "levels": Vocabulary(num_units=10, num_levels=2),
        "interleaved": Vocabulary(num_units=10, text=("a", " b"), layout="interleaved"),
    }[kind]
    pattern = Pattern("flatten", vocabulary.sizes)
    tokenizer(vocabulary, pattern).save(str(tmp_path / "tokenizer.json"))
    loaded: Any = PreTrainedTokenizerFast  # untyped
    theirs = loaded(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (pattern.bos[0], pattern.eos)

    if kind == "levels":
        codes = np.stack(units[:2], 1)
        text = "".join(f"<Un{coarse}:0><Un{fine}:1>" for coarse, fine in codes)
    elif kind == "interleaved":
        codes = np.array([12, 3, 13, 10, 11, 12, 4])
        text = "<Speech><Un3><Text><Tx:a><Tx: b><Speech><Un4>"
    else:
        codes = Merger(vocabulary).encode(units[0])
        text = "".join(f"<Un{unit}>" for unit in units[0])
    sequence = pattern.arrange(codes).tolist()
    assert theirs(text)["input_ids"] == sequence[:-1]
    assert theirs.decode(sequence, skip_special_tokens=True) == text
    assert theirs(theirs.decode(sequence), add_special_tokens=False)["input_ids"] == sequence
