"""fairseq2's wav2vec 2.0 and wav2vec 2.0 ASR models: asset cards, the checkpoints of its trainer, files of
weights alone.

A card names a family, a config over that of an architecture, and a checkpoint; fairseq2 finds it by name
(`fairseq2:NAME` here), or it lies in a folder, like those of `export` and of fairseq2's trainer, and needs no
fairseq2 to be read. The classes of a recogniser are those of the card's tokenizer of characters; the blank is
class 0, fairseq2's `ctc_loss` knows no other. What fairseq2's config has no key for (whether waveforms are
normalised, the weights of the losses, the vocabulary) an exported card keeps in its field `wordless`.

Pre-norm models have their last norm in `encoder`, post-norm ones their first in `encoder_frontend`; fairseq2
could build models with both or neither, which nobody trains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from pretrain.config import parse_config
from pretrain.ctc.task import CTCConfig
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import Vocabulary
from pretrain.model.config import EncoderConfig
from pretrain.objectives.hubert import HubertConfig
from pretrain.objectives.wav2vec2 import Wav2Vec2Config
from pretrain.store.disk import atomic_folder
from pretrain.store.hashes import sha256_file
from pretrain.weights.card_config import (
    COMPUTED_KEYS,
    CONTRASTIVE_KEYS,
    COUNTER,
    CTC_KEYS,
    ENCODER_KEYS,
    told_with,
)
from pretrain.weights.card_writing import write_card
from pretrain.weights.cards import OWN_FAMILIES, Card, is_card, load_checkpoint, read_card, tensors_of
from pretrain.weights.fairseq2_classes import (
    given_classes,
    held_classes,
    held_table,
    note_least_spans,
    parsed,
    with_classes,
)
from pretrain.weights.fairseq2_configs import contrastive_tree, encoder_keys
from pretrain.weights.families import FAMILIES
from pretrain.weights.foreign import (
    CTCHead,
    Exported,
    Foreign,
    Source,
    infer_encoder,
    make_encoder,
    normalization_note,
)
from pretrain.weights.naming import CTC_HEADS, Format, Objective, canonical, head_in
from pretrain.weights.pickles import weights_only_hole

NO_OPTIONS: dict[str, Any] = {"num_heads": None, "normalize_waveform": None}


def claims(source: Source) -> bool:
    """Whether a source is a card, a folder with one or of fairseq2's trainer, or a file of fairseq2's
    tensors."""
    if not (source.path / "config.json").is_file() and is_card(source.path):
        return True
    first = "encoder_frontend."
    return source.path.is_file() and any(
        name.removeprefix("module.").startswith(first) for name in source.names
    )


def read(source: Source) -> Foreign:
    """The model of a folder or file."""
    if is_card(source.path):
        return read_folder(source.path, source.vocabulary, source.options, source.allow_pickle)
    sha256 = sha256_file(source.path)
    return read_weights(source.path, source.state, sha256, source.options, source.vocabulary)


def write(out: Path, model: Exported) -> dict[str, Any]:
    """Writes a folder with a card, of fairseq2's own families or of ours; returns the family and the
    objective."""
    if "@" in out.name or not out.name.strip():
        raise ValueError(
            f"{out}: the folder's name becomes the asset's, and {out.name!r} cannot be one; take one without "
            "@"
        )
    foreign = Foreign(
        "wordless",
        model.weights,
        model.encoder,
        model.named,
        model.head,
        model.fingerprint,
        model.notes,
        model.recognizer,
        model.run,
        model.codebook,
    )
    with atomic_folder(out) as temporary:
        family = write_card(temporary, out.name, foreign)
    return {"family": family, "objective": model.named}


def read_folder(
    source: Path, vocabulary: Path | None, options: Mapping[str, Any], allow_pickle: bool
) -> Foreign:
    """The model of a card in a file or a folder, or of a folder of fairseq2's trainer."""
    return read_model(read_card(source), vocabulary, options, allow_pickle, str(source))


def read_model(
    card: Card, vocabulary: Path | None, options: Mapping[str, Any], allow_pickle: bool, source: str
) -> Foreign:
    """The model that a card describes. `options` (of `import`) win over it, `vocabulary` over its
    tokenizer."""
    state, sha256 = load_checkpoint(card.checkpoint, allow_pickle)
    notes: list[str] = []
    if card.checkpoint.suffix != ".safetensors" and (hole := weights_only_hole()):
        notes.append(hole)
    if card.family in OWN_FAMILIES:
        if vocabulary is not None and card.family == "wordless_recognizer":
            raise ValueError(f"{source}: holds its vocabulary; drop --vocabulary")
        return _own(card, state, sha256, options, notes, source)
    told, held = card.config["encoder_config"], held_table(card, "encoder")
    kept = ("architecture", "normalize_waveform")  # what fairseq2's config has no key for
    keys = {key: held[key] for key in kept if key in held}
    keys |= encoder_keys(told, card.source)
    if "normalize_waveform" not in keys:
        keys["normalize_waveform"] = keys["conv_norm"] == "layer"
        if options["normalize_waveform"] is None:
            notes.append(normalization_note("fairseq2's configs do not say", keys["normalize_waveform"]))
    with told_with({ours: f"encoder_config.{theirs}" for ours, theirs in ENCODER_KEYS.items()}, card.source):
        encoder = make_encoder(keys, dict(options), card.source)
    # fairseq2 converts fairseq's own checkpoints where it reads them
    of_fairseq = any(name.endswith("mask_emb") for name in state)
    form: Format = "fairseq" if of_fairseq else "fairseq2"
    tensors = canonical(state, "w2v_encoder.w2v_model." if of_fairseq else "", str(card.checkpoint))
    tensors.pop(COUNTER, None)
    if card.family == "wav2vec2":
        with told_with(CONTRASTIVE_KEYS | COMPUTED_KEYS, card.source):
            head = parse_config(Wav2Vec2Config, contrastive_tree(card, notes), card.source)
        return Foreign(form, tensors, encoder, "wav2vec2", head, sha256, notes, source=source)
    recognizer = _recognizer(tensors, card, form, vocabulary, notes)
    return Foreign(form, tensors, encoder, objective_of(card), None, sha256, notes, recognizer, source)


def objective_of(card: Card) -> Objective | None:
    """What the model was pretrained with; None where the card does not say."""
    if card.family in ("wav2vec2", "wordless_wav2vec2"):
        return "wav2vec2"
    if card.family == "wordless_hubert":
        return "hubert"
    told: Objective | None = next(
        (known for known in get_args(Objective) if known == card.extra.get("objective")), None
    )
    return told or ("wav2vec2" if card.family == "wav2vec2_asr" else None)


def read_weights(
    source: Path, state: Mapping[str, Any], sha256: str, options: dict[str, Any], vocabulary: Path | None
) -> Foreign:
    """A loaded file of fairseq2's tensors alone: its shapes tell the architecture."""
    notes: list[str] = []
    tensors = canonical(tensors_of(state, str(source)), "", str(source))
    tensors.pop(COUNTER, None)
    objective = head_in(tensors, "fairseq2")
    recognizer = None
    if objective is None and (weight := tensors.get("final_proj.weight")) is not None and weight.ndim == 2:
        classes = given_classes(vocabulary, len(weight), notes) if vocabulary else None
        recognizer = with_classes(tensors, "fairseq2", classes, CTCConfig(), notes, str(source))
    encoder = infer_encoder(source, tensors, "fairseq2", options, notes)
    head = None
    if (
        objective == "wav2vec2"
        and (codes := tensors.get("quantizer.entries")) is not None
        and codes.ndim == 3
    ):
        groups, final = 2, len(tensors.get("final_proj.weight", [None] * 256))
        head = Wav2Vec2Config(
            num_groups=groups,
            num_entries=codes.shape[1] // groups,
            code_dim=groups * codes.shape[2],
            final_dim=final,
        )
        notes.append(
            f"no config in the file: its {codes.shape[1]} codes are taken for {groups} groups; losses and "
            "masks as published"
        )
    return Foreign("fairseq2", tensors, encoder, "wav2vec2", head, sha256, notes, recognizer, str(source))


def _recognizer(
    tensors: dict[str, Tensor], card: Card, form: Format, vocabulary: Path | None, notes: list[str]
) -> CTCHead | None:
    """The CTC head of a model; None, and the head left out of `tensors`, where nothing says what its classes
    are."""
    rows, told = card.config["target_vocab_size"], card.config
    if (weight := tensors.get(name := f"{CTC_HEADS[form]}.weight")) is None:
        raise ValueError(f"{card.checkpoint}: has no {name}, so it is no checkpoint of {card.family}")
    if weight.shape[:1] != (rows,):
        raise ValueError(f"{card.source}: target_vocab_size = {rows}, but {name} is {tuple(weight.shape)}")
    tree = {"mask_channel_probability": 0.0, **held_table(card, "ctc")}
    tree |= {"final_dropout": told["final_dropout_p"], "mask_start_probability": 0.0}
    if told["use_masking"]:  # else fairseq2's lengths are of nothing
        for start, ours, theirs in (
            ("mask_start", "mask", "temporal"),
            ("mask_channel", "mask_channel", "spatial"),
        ):
            length, probability = told[f"{theirs}_mask_span_len"], told[f"max_{theirs}_mask_prob"]
            # else fairseq2 has no such mask, and an exported card says which was ours
            if theirs == "temporal" or probability:
                tree |= {
                    f"{ours}_length": length,
                    f"{start}_probability": round(probability / max(1, length), 12),
                }
        note_least_spans(card, notes)
    classes = given_classes(vocabulary, rows, notes) if vocabulary else held_classes(card, rows, notes)
    with told_with(CTC_KEYS | COMPUTED_KEYS, card.source):
        ctc = parse_config(CTCConfig, tree, card.source)
    return with_classes(tensors, form, classes, ctc, notes, str(card.checkpoint))


def _own(
    card: Card,
    state: dict[str, Tensor],
    sha256: str,
    options: Mapping[str, Any],
    notes: list[str],
    source: str,
) -> Foreign:
    """A model of one of our families: our tensors and configs, which need no conversion."""
    told = parsed(card, FAMILIES[card.family].config, card.config)
    given = {key: value for key, value in options.items() if value is not None}
    encoder = parse_config(EncoderConfig, {**told["encoder"], **given}, card.source)
    head: HubertConfig | Wav2Vec2Config | None = None
    recognizer: CTCHead | None = None
    if card.family == "wordless_hubert":
        head, classes = parse_config(HubertConfig, told["hubert"], card.source), state.get("class_embeddings")
        if classes is None:
            raise ValueError(
                f"{card.checkpoint}: has no class_embeddings, so it is no checkpoint of {card.family}"
            )
        if classes.shape[:1] != (told["num_classes"],):
            raise ValueError(
                f"{card.source}: num_classes = {told['num_classes']}, but class_embeddings is "
                f"{tuple(classes.shape)}"
            )
    elif card.family == "wordless_wav2vec2":
        head = parse_config(Wav2Vec2Config, told["wav2vec2"], card.source)
    elif card.family == "wordless_encoder":  # of any run
        state = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    elif card.family == "wordless_recognizer":
        text, ctc = (
            parse_config(TextConfig, told["text"], card.source),
            parse_config(CTCConfig, told["ctc"], card.source),
        )
        recognizer = CTCHead(Vocabulary.from_meta(told["vocabulary"]), text, ctc)
    codebook = card.extra.get("codebook")
    return Foreign(
        "wordless",
        state,
        encoder,
        objective_of(card),
        head,
        sha256,
        notes,
        recognizer,
        source,
        codebook and str(codebook),
    )
