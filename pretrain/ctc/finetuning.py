"""The verb `finetune`: CTC on transcripts, from a pretrained encoder or, for comparison, from random weights
or on units.

The labelled audio that a budget draws stands in OUT/subset, a manifest, to be reported and used again;
transcripts that cannot be used in OUT/quarantine.jsonl. Validation is on every transcribed utterance of
`valid_split`, whole, whatever its length.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pretrain.config import parse_config
from pretrain.ctc.finetune_config import FinetuneConfig
from pretrain.ctc.model import LoadedRecognizer, Recognizer, load_recognizer
from pretrain.ctc.subsets import (
    amount,
    count_problems,
    draw_subset,
    targets,
    transcribed,
    write_subset,
)
from pretrain.ctc.task import CTCTask
from pretrain.ctc.unit_input import LabelBatches
from pretrain.ctc.usable import Source, kind_of_target, usable, write_quarantine
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.data.batches import BatchConfig, SpeechBatches
from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import load_encoder
from pretrain.progress import console
from pretrain.store.artefact import require_absent
from pretrain.training.engine import train
from pretrain.training.run import Run


class Splits(NamedTuple):
    """What is to be learned from and judged by, whole, and the symbols of both."""

    chosen: Manifest
    valid: Manifest | None
    vocabulary: Vocabulary
    notes: list[str]


class Transcripts(NamedTuple):
    """What of it is used."""

    source: Source  # of the split
    drawn: np.ndarray  # its rows that the budget takes
    judges: Source | None  # of the validation
    notes: list[str]


def require_transcripts(config: FinetuneConfig) -> None:
    """Raises ValueError if the manifest has too few usable transcripts for the budget. Reads no audio and no
    encoder."""
    if config.labels is None and config.init != "recognizer":  # else their stages are yet to run
        _choose(config, _splits(config), None)


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Runs the verb; returns the training summary with the labelled minutes used, what was left out and the
    vocabulary's size."""
    require_absent(config.out)
    manifest, seed = Manifest(config.manifest), config.training.seed
    labels = Labels(config.labels) if config.labels else None
    from_recognizer = config.encoder and config.init == "recognizer"
    known = load_recognizer(config.encoder) if config.encoder and from_recognizer else None
    chosen, valid, vocabulary, _ = splits = _splits(config, known)
    model, parents = _model(config, vocabulary, labels, known)
    source, drawn, judges, notes = _choose(config, splits, labels)

    def batches(rows: Manifest, limits: BatchConfig) -> SpeechBatches:
        if labels:
            return LabelBatches(rows, labels, limits, seed, config.units)
        return SpeechBatches(rows, limits, seed, crop=False)

    labelled = chosen.take(drawn)
    train_set, valid_set, problems = batches(labelled, config.batches), None, source.problems
    if valid is not None and judges is not None:
        judging = valid.take(judges.rows)
        valid_set, problems = batches(judging, _whole(config)), problems + judges.problems
        if seen := len({*judging.ids}.intersection(labelled.ids)):
            notes.append(
                f"{seen} of the {len(judging)} utterances of the validation are trained on (by their ids)"
            )
    frozen_phases = config.init != "random" and labels is None
    if frozen_phases and config.ctc.freeze_steps >= config.training.max_steps:
        notes.append(
            f"the head alone learns: ctc.freeze_steps = {config.ctc.freeze_steps}, training.max_steps = "
            f"{config.training.max_steps}"
        )
    task = CTCTask(
        model, config.ctc, config.text, train_set, valid_set, frozen_phases=frozen_phases, seed=seed
    )
    _record(config, chosen, drawn, notes, problems)
    minutes = float(labelled.lengths.sum() / SAMPLE_RATE / 60)
    extra = {"vocabulary": vocabulary.to_meta(), "config_encoder": model.encoder.config.resolved()}
    run = Run(
        task,
        out=config.out,
        kind="recognizer",
        training=config.training,
        optimizer=config.optimizer,
        config=config.resolved(),
        parents={"manifest": manifest.fingerprint, **parents},
        monitor=("valid_wer", "valid_loss"),
        extra={**extra, "codebook": labels.codebook if labels else None, "label_minutes": minutes},
    )
    return {
        **train(run),
        "label_minutes": minutes,
        "utterances": len(labelled),
        "utterances_left_out": source.num_left_out,
        "valid_utterances": len(valid_set.items) if valid_set else 0,
        "quarantined": len(problems),
        **({"quarantined_because": count_problems(problems)} if problems else {}),
        "vocabulary": len(vocabulary),
        **({"note": "; ".join(notes)} if notes else {}),
    }


def _record(config: FinetuneConfig, chosen: Manifest, drawn: Any, notes: list[str], problems: Any) -> None:
    """On the first rank: prints the notes, writes the subset that is trained on and the transcripts left
    out."""
    if os.environ.get("RANK", "0") != "0":
        return
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    subset = Path(config.out) / "subset"
    write_subset(subset, chosen, drawn, budget=config.budget, seed=config.budget_seed)
    write_quarantine(Path(config.out) / "quarantine.jsonl", problems)


def _splits(config: FinetuneConfig, known: LoadedRecognizer | None = None) -> Splits:
    manifest = Manifest(config.manifest)
    chosen = manifest.select(config.split)
    valid, note = _validation(config, manifest)
    return Splits(
        chosen,
        valid,
        _vocabulary(config, [chosen, *([valid] if valid else [])], known),
        [note] if note else [],
    )


def _choose(config: FinetuneConfig, splits: Splits, labels: Labels | None) -> Transcripts:
    """The transcripts to learn from and to judge by. ValueError where there are too few of them, or bad
    ones."""
    chosen, valid, vocabulary, notes = splits
    source = usable(chosen, config, config.batches, vocabulary, labels)
    # In the order of the file, as they are in OUT/subset: training on that, with this vocabulary, is the same
    # run.
    drawn = np.sort(
        draw_subset(chosen, source.rows, config.budget, config.budget_seed, config.budget_at_least)
    )
    minutes, (wanted, unit) = chosen.take(drawn).lengths.sum() / (60 * SAMPLE_RATE), amount(config.budget)
    if unit == "s" and minutes * 60 < wanted:
        notes = [
            *notes,
            f"budget = {config.budget!r}: {minutes:.2f} minutes are transcribed, and all of them are used",
        ]
    if valid is None:
        return Transcripts(source, drawn, None, notes)
    try:
        return Transcripts(source, drawn, usable(valid, config, _whole(config), vocabulary, labels), notes)
    except ValueError as error:
        if (
            config.bad_transcripts == "error"
            or config.valid_manifest
            or "valid_split" in config.model_fields_set
        ):
            raise
        return Transcripts(source, drawn, None, [*notes, f"no validation: {error}"])


def _whole(config: FinetuneConfig) -> BatchConfig:
    """Limits of the validation, which has every utterance."""
    return config.batches.model_copy(update={"crop_seconds": 1e9, "min_seconds": 0.025})


def _validation(config: FinetuneConfig, manifest: Manifest) -> tuple[Manifest | None, str | None]:
    """What judges checkpoints, or None and why; a split that was asked for and is not there is a
    ValueError."""
    source = Manifest(config.valid_manifest) if config.valid_manifest else manifest
    by_default = "valid_split" not in config.model_fields_set
    asked, split = config.valid_manifest is not None or not by_default, config.valid_split
    if by_default and config.valid_manifest and not source.splits:
        split = None  # all of it
    elif split is None and not config.valid_manifest:
        return None, None
    elif not asked and split not in source.splits:
        return None, f"no validation: {source.folder} has no utterances of valid_split = {split!r}"
    try:
        valid = source.select(split)
    except ValueError as error:
        if config.valid_manifest:
            raise
        raise ValueError(
            f"{error}; where this is a labelled subset, name the corpus as valid_manifest"
        ) from None
    if len(transcribed(valid, config.text)):
        return valid, None
    lack = f"no utterance of valid_split = {split!r} has {kind_of_target(config.text)}"
    if asked:
        raise ValueError(f"{source.folder}: {lack}; name another split")
    return None, f"no validation: {lack}"


def _vocabulary(config: FinetuneConfig, sets: list[Manifest], known: LoadedRecognizer | None) -> Vocabulary:
    """The characters that are given, or those of the recogniser to go on from, or of all transcripts."""
    if known is not None:
        ours, theirs = (text.resolved() | {"tokenizer": None} for text in (config.text, known.text))
        if differing := [
            f"{key} is {theirs[key]!r} there, {ours[key]!r} here" for key in ours if ours[key] != theirs[key]
        ]:
            raise ValueError(
                f"text: {config.encoder} was fine-tuned with another `text` ({'; '.join(differing)}); give "
                "the same"
            )
    if config.characters is not None:
        vocabulary = Vocabulary.given(config.characters, config.text)
    elif known is not None and config.text.tokenizer is None:
        return known.vocabulary  # whatever else the transcripts have is named as not in it
    else:
        # The alphabet of the whole corpus: a letter that the drawn minutes happen to miss is still a letter.
        said = (target for rows in sets for _, block in targets(rows, config.text) for target in block)
        vocabulary = Vocabulary.of((target for target in said if target), config.text)
    if known is not None and known.vocabulary != vocabulary:
        lacking, surplus = (
            sorted(set(a) - set(b))
            for a, b in (
                (vocabulary.symbols, known.vocabulary.symbols),
                (known.vocabulary.symbols, vocabulary.symbols),
            )
        )
        parts = [f"without {_some(lacking)}"] * bool(lacking) + [
            f"with {_some(surplus)} that are not here"
        ] * bool(surplus)
        raise ValueError(
            f"encoder: {config.encoder} was fine-tuned with another vocabulary of {len(known.vocabulary)} "
            f"classes ({', '.join(parts) or 'in another order'}); leave `characters` out to go on "
            'with its own, or set init = "pretrained", which takes its encoder alone'
        )
    return vocabulary


def _some(symbols: list[str]) -> str:
    return f"{symbols[:20]}{f' and {len(symbols) - 20} more' if len(symbols) > 20 else ''}"


def _model(
    config: FinetuneConfig, vocabulary: Vocabulary, labels: Labels | None, known: LoadedRecognizer | None
) -> tuple[Recognizer, dict[str, str]]:
    """The model to train, and the fingerprints of what it comes from."""

    def build(tree: dict[str, Any], source: str) -> Recognizer:
        streaming = {"streaming": config.streaming.resolved()} if config.streaming is not None else {}
        architecture = parse_config(EncoderConfig, {**tree, **config.ctc.of_encoder, **streaming}, source)
        torch.manual_seed(config.training.seed)
        return Recognizer(
            architecture, vocabulary, final_dropout=config.ctc.final_dropout, layers=config.ctc.layers
        )

    if labels is not None:
        tree = config.unit_encoder.resolved() if config.unit_encoder else {"architecture": "small"}
        num_units = config.units.num_embeddings(labels)
        if (asked := config.unit_encoder and config.unit_encoder.num_units) and asked != num_units:
            raise ValueError(
                f"unit_encoder.num_units = {asked}, but {labels.folder} has {num_units} to read; leave the "
                "key out"
            )
        over_units = {"front_end": "units", "num_units": num_units, "normalize_waveform": False}
        return build({**tree, **over_units}, "unit_encoder"), {"labels": labels.fingerprint}
    assert config.encoder is not None
    if known is not None:
        if (learned := "last" if known.model.layer_weights is None else "weighted") != config.ctc.layers:
            raise ValueError(
                f'ctc.layers = "{config.ctc.layers}", but the head of {config.encoder} reads "{learned}"; '
                "give the same"
            )
        encoder, fingerprint = known.model.encoder, known.fingerprint
    else:
        encoder, fingerprint = load_encoder(config.encoder)
    if encoder.config.front_end == "units":
        raise ValueError(
            f"encoder: {config.encoder} reads units and not audio; give the `labels` in its place"
        )
    model = build(encoder.config.resolved(), "ctc")
    if known is not None:
        model.load_state_dict(known.model.state_dict())
    elif config.init == "pretrained":
        model.encoder.load_state_dict(encoder.state_dict())
    return model, {"encoder": fingerprint}
