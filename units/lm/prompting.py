"""What a language model is to continue: beginnings of a corpus's documents, or recordings made into its
units."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pretrain.data.audio import probe_audio
from pretrain.data.utterance import Utterance
from units.corpus.bpe import Merger
from units.corpus.sequence import deduplicate
from units.corpus.unit_corpus import UnitCorpus
from units.lm.language_model import LoadedLM


class Prompt(NamedTuple):
    """Codes that begin a document, and where they come from."""

    document: str  # id, or the recording's path
    codes: np.ndarray  # (n,) or (n, levels): symbols of the model's vocabulary, merged where it has merges


def corpus_prompts(
    corpus: UnitCorpus, split: str | None, utterance: str | None, length: int, num: int, seed: int
) -> list[Prompt]:
    """The first `length` units of one document, `num` times, or of `num` documents drawn from a split, anew
    when they run out.

    With unit BPE they are merged as a document of their own would be: units are counted, not merged ones.
    """
    counts = corpus.num_units_of
    if utterance is not None:
        document = corpus.index(utterance)
        if counts[document] < length:
            raise ValueError(
                f"{corpus.folder}: document {utterance!r} has {counts[document]} units, fewer than "
                f"prompt_units {length}"
            )
        chosen = np.full(num, document)
    else:
        documents = corpus.documents(split)
        long_enough = documents[counts[documents] >= length]
        if not len(long_enough):
            raise ValueError(
                f"{corpus.folder}: no document of split {split!r} has prompt_units {length} units; the "
                f"longest has {counts[documents].max()}"
            )
        chosen = np.resize(np.random.default_rng(seed).permutation(long_enough), num)
    merger = Merger(corpus.vocabulary) if corpus.vocabulary.merges else None
    ids, prompts = corpus.ids, []
    for document in chosen.tolist():
        units = corpus.units(document)[:length].astype(np.int64)
        prompts.append(
            Prompt(ids[document], units if merger is None else merger.encode(units).astype(np.int64))
        )
    return prompts


def audio_prompts(
    paths: Sequence[str],
    lm: LoadedLM,
    codebook_folder: str,
    encoder: str | None,
    device: str,
    length: int | None = None,
) -> list[Prompt]:
    """The units of recordings, deduplicated and merged as the model learned them; the first `length` of each,
    or all.

    Errors: ValueError naming the recording, or both sides where the codebook is not the one whose units the
    model learned.
    """
    from quantize.codebook import Codebook
    from quantize.extraction import Extraction, open_source

    codebook = Codebook.open(codebook_folder)
    vocabulary, learned = lm.vocabulary, lm.meta["codebook"]
    if codebook.fingerprint != learned:
        raise ValueError(
            f"codebook: {lm.folder} learned the units of codebook {learned}, and {codebook_folder} is "
            f"codebook {codebook.fingerprint}; give the codebook that its corpus was encoded with"
        )
    utterances = [_whole_recording(path) for path in paths]
    source = open_source(codebook, encoder, Extraction(device="cuda" if device == "cuda" else "cpu"))
    merger = Merger(vocabulary) if vocabulary.merges else None
    prompts = []
    for utterance, features in source.features(utterances):
        labels = codebook.assign(features)
        if labels.ndim > 1:
            labels = labels[:, 0] if vocabulary.num_levels == 1 else labels[:, : vocabulary.num_levels]
        units = (deduplicate(labels)[0] if lm.meta["deduplicated"] else labels).astype(np.int64)[:length]
        if length is not None and len(units) < length:
            raise ValueError(
                f"prompt_audio: {utterance.path} has {len(units)} units, fewer than prompt_units {length}"
            )
        if vocabulary.layout == "interleaved":
            units = np.concatenate([[vocabulary.speech_marker], units])
        elif vocabulary.layout == "grid":
            units = np.column_stack([np.full(len(units), vocabulary.grid_pad), units])
        prompts.append(
            Prompt(utterance.path, units if merger is None else merger.encode(units).astype(np.int64))
        )
    return prompts


def _whole_recording(path: str) -> Utterance:
    try:
        start, num_samples, sample_rate = probe_audio(path)
    except ValueError as error:
        raise ValueError(f"prompt_audio: {path}: {error}") from None
    return Utterance(path, path, start, num_samples, sample_rate)
