"""The page in words: what a run found, what each figure shows, what to be careful with and what is missing, all from the numbers.

Every sentence follows from the numbers whichever way they point: that learning did not pay is written as plainly as that it did.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.splits import SHORT_SECONDS
from wordless.report import recognition
from wordless.report.figures import CURVES, PhoneCounts

SAME = 0.005  # differences below this are called neither better nor worse
CLEAR_WER = 0.5  # above, most words of a recogniser are wrong, and the times of its words mean nothing
FLAT = 0.01  # a validation loss that changes by less of itself has levelled off
NAMED = 8  # phones that a sentence names, at most


class Missing(NamedTuple):
    """Something that could not be measured: what, why, and how to have it next time, in words and as a command."""

    what: str
    why: str
    remedy: str
    command: str


def in_words(summary: Mapping[str, Any]) -> list[str]:
    """The run in a few sentences."""
    audio, units, lm, ctc = (summary[group] for group in ("audio", "units", "lm", "ctc"))
    by = f" by {audio['speakers']} speaker{'s' * (audio['speakers'] != 1)}" if audio["speakers"] else ""
    words = [
        f"The corpus is {spoken_time(audio['hours'])} of speech in {audio['utterances']:,} utterances{by}."
    ]
    judged = (*units.values(), lm, *ctc.get("transcripts", {}).values())
    splits = {numbers["split"] for numbers in judged if "split" in numbers}
    if len(splits) == 1 and (split := splits.pop()) is not None:
        unseen = ", whose speakers were never heard in training" if split in audio["held_out"] else ""
        words.append(f"Results are those on the {split} split{unseen}.")
    words += compare_units(units)
    if "bits_per_unit" in lm:
        bits = lm["bits_per_unit"]
        floors = {name: lm[f"{name}_bits_per_unit"] for name in ("trigram", "bigram", "unigram")}
        best = min(floors, key=floors.__getitem__)
        low, high = lm.get("bits_below_bigram_ci95", (0.0, 0.0))
        by_chance = best == "bigram" and low < 0 < high  # the one floor whose difference has an interval
        verdict = compare(
            bits, floors[best], f"beats the {best}", f"is no better than a {best}", f"is worse than a {best}"
        )
        verdict = "is not certainly better than a bigram" if by_chance else verdict
        others = ", ".join(f"{name} {value:.2f}" for name, value in floors.items() if name != best)
        words.append(
            f"The unit language model {verdict}: {bits:.2f} bits per unit against {floors[best]:.2f} ({others})."
        )
    words += of_sounds(summary["sounds"])
    words += recognition.recognisers_in_words(ctc, SAME) + recognition.transfer_in_words(summary["transfer"])
    return words


def compare_units(units: Mapping[str, Any]) -> list[str]:
    """The last units beside those from MFCC, and the best ones where these are others."""
    learned = {name: unit for name, unit in units.items() if "pnmi" in unit and name != "mfcc"}
    if units and not any("pnmi" in unit for unit in units.values()):
        return ["There are no phone alignments, so how well the units match phones is not known."]
    if not learned or "pnmi" not in units.get("mfcc", {}):
        return []
    name, last, mfcc = list(learned)[-1], list(learned.values())[-1], units["mfcc"]
    verdict = compare(
        last["pnmi"],
        mfcc["pnmi"],
        "less information about the phone than",
        "as much information about the phone as",
        "more information about the phone than",
    )
    words = [
        f"The units of {name} carry {verdict} units from MFCC: PNMI {last['pnmi']:.3f} against {mfcc['pnmi']:.3f}."
    ]
    if last["num_classes"] != mfcc["num_classes"]:
        words.append("Their numbers of classes differ, so this comparison is not a fair one.")
    best = max(learned, key=lambda name: learned[name]["pnmi"])
    if learned[best]["pnmi"] > last["pnmi"] + SAME:
        words.append(f"Those of {best} are better, with {learned[best]['pnmi']:.3f}.")
    return words


def of_sounds(sounds: Mapping[str, Any]) -> list[str]:
    """The round trip from units to sound and back."""
    if "frame_agreement_resynthesis" not in sounds:
        return []
    words = [
        f"Units turned into sound and encoded again are the same in {sounds['frame_agreement_resynthesis']:.0%} of the frames."
    ]
    others = []
    if "frame_agreement_copy" in sounds:
        others.append(
            f"{sounds['frame_agreement_copy']:.0%} for the recording’s own spectrogram, turned into sound by the same method"
        )
    if "frame_agreement_commonest_unit" in sounds:
        others.append(
            f"{sounds['frame_agreement_commonest_unit']:.0%} for always guessing the commonest unit"
        )
    return [" ".join([*words, f"For comparison: {', and '.join(others)}."])] if others else words


def of_recognisers(ctc: Mapping[str, Any]) -> list[str]:
    """Recognisers that have most words wrong, or that wrote nothing."""
    scored = {name: scores for name, scores in ctc.get("transcripts", {}).items() if "wer" in scores}
    words = []
    if scored and all(scores["wer"] > CLEAR_WER for scores in scored.values()):
        counted = next(iter(scored.values())).get("counted", "words")
        words.append(
            f"Most {counted} are wrong, so these transcripts are of no use yet. More transcribed speech, or more training steps, may help; "
            "until then a difference between recognisers means little."
        )
    for name, scores in scored.items():
        if scores.get("empty_hypotheses"):
            words.append(
                f"{name}: nothing was written for {scores['empty_hypotheses']:,} of {scores['scored_utterances']:,} utterances."
            )
    return words


def of_units(units: Mapping[str, Any]) -> list[str]:
    """What the table of units does not put into words: ABX of the last units beside MFCC's, and classes that are never used."""
    words = []
    name, last = (list(units)[-1], list(units.values())[-1]) if units else ("", {})
    for key, where in (("abx_within", "Within a speaker"), ("abx_across", "Across speakers")):
        if name != "mfcc" and key in last and key in units.get("mfcc", {}):
            ours, theirs = last[key], units["mfcc"][key]
            verdict = compare(ours, theirs, "better than", "as good as", "worse than")
            error = f"ABX error {ours:.1%} against {theirs:.1%}"
            words.append(
                f"{where}, the units of {name} are {verdict} MFCC’s at keeping phones apart: {error}."
            )
    words += [
        f"Only {unit['usage']:.0%} of the classes of {name} occur."
        for name, unit in units.items()
        if unit["usage"] < 0.5
    ]
    return words


def of_layers(sweep: Mapping[str, Any]) -> list[str]:
    """What a sweep shows: how the chosen layer compares with layer 0, which is the input of the first layer."""
    layers, layer = sweep["layers"], str(sweep["layer"])
    chosen, first = layers[layer], layers.get("0", {})
    if "pnmi" not in chosen:
        return [
            "Without phone alignments there is nothing to compare the layers by, so the middle one was taken; another may be better. "
            "Perplexity, the effective number of units in use, does not show which."
        ]
    if "pnmi" not in first or layer == "0":
        return []
    layer_0, scores = (
        "layer 0, which is the input of the first layer",
        f"PNMI {chosen['pnmi']:.3f} against {first['pnmi']:.3f}",
    )
    lost = (
        f"The chosen layer is worse than {layer_0}: {scores}. At this size, and after this much training, the encoder has not learned "
        "more about phones than its input already shows. More audio or more training steps may change that."
    )
    level = f"The chosen layer is no better than {layer_0}: {scores}. By this measure, training has added nothing to the input."
    won = f"The chosen layer is better than {layer_0}: {scores}. Training has made the phones easier to find."
    words, changes = [compare(chosen["pnmi"], first["pnmi"], lost, level, won)], []
    for key, where in (
        ("abx_within_features", "within a speaker"),
        ("abx_across_features", "across speakers"),
    ):
        if key in chosen and key in first:
            changes.append(compare(chosen[key], first[key], "better", "about the same", "worse"))
            change = f"goes from {first[key]:.1%} at layer 0 to {chosen[key]:.1%} at layer {layer}"
            words.append(f"ABX error {where} {change}: {changes[-1]}.")
    if changes == ["better", "worse"]:
        words.append(
            "So the encoder separates the phones of one voice better than its input does, and those of different voices less well."
        )
    return words


def of_training(group: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """What the validation losses of a group of `CURVES` did, by run."""
    key, words = f"valid_{CURVES[group][0]}", []
    for name, lines in runs.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        begin = "" if name == group else f"{name}: "
        words.append(
            begin
            + of_curve(points, [line[CURVES[group][0]] for line in lines if CURVES[group][0] in line])
            + "."
        )
    return [
        sentence[0].upper() + sentence[1:] if sentence.startswith(("validation", "the ")) else sentence
        for sentence in words
    ]


def of_curve(validation: Sequence[tuple[float, float]], training: Sequence[float]) -> str:
    """What a loss did, of (step, value) in validation, or of the training losses where validation has too few."""
    if len(validation) < 2:
        at_end = f", and validation ended at {validation[-1][1]:.2f}" if validation else ""
        return (
            f"the training loss went from {training[0]:.2f} to {training[-1]:.2f}{at_end}"
            if training
            else "no losses are known"
        )
    (first_step, first), (_, before), (last_step, last) = validation[0], validation[-2], validation[-1]
    step, best = min(validation, key=lambda point: point[1])
    change = f"{first:.2f} to {last:.2f}"
    if last > best * (1 + FLAT) and step < last_step:
        return f"validation was best at step {step:,} ({best:.2f}) and has risen since to {last:.2f}: later steps fit the training data only"
    if last > first * (1 - FLAT):
        return f"validation hardly changed from step {first_step:,} on ({change})"
    if last < before * (1 - FLAT):
        return f"validation fell from {change} and was still falling at the last step, so longer training would probably help"
    return f"validation fell from {change} and has levelled off"


def of_matrix(counts: PhoneCounts) -> list[str]:
    """How clearly the units stand for phones, and which phones have no unit."""
    joint = counts.joint[:, counts.joint.sum(axis=0) > 0]
    units = np.flatnonzero(counts.joint.sum(axis=0))
    given = joint / joint.sum(axis=0)
    spoken = np.array([phone not in counts.silence for phone in counts.phones])
    share = np.where(spoken[:, None], given, 0.0)
    clear = int((given.max(axis=0) > 0.5).sum())
    words = [
        f"Of the {len(units)} units that occur, {clear} have one phone in more than half of their frames."
    ]
    if spoken.any():
        row, column = np.unravel_index(share.argmax(), share.shape)
        words.append(
            f"The clearest is unit {units[column]}, which is {counts.phones[row]} in {share.max():.0%} of its frames."
        )
    without = [
        phone
        for row, phone in enumerate(counts.phones)
        if phone and row not in set(given.argmax(axis=0).tolist())
    ]
    if without:
        more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
        words.append(f"No unit is chiefly {', '.join(without[:NAMED])}{more}.")
    return words


def of_rates(rates: Mapping[str, float], phones_per_second: float | None) -> str:
    """How often the units of the utterance shown change, beside its phones."""
    changes = ", ".join(f"{rate:.1f} times a second ({name})" for name, rate in rates.items())
    return f"Here the unit changes {changes}." + (
        f" There are {phones_per_second:.1f} phones a second." if phones_per_second else ""
    )


def cautions(audio: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the numbers: short splits, voices that training and test share."""
    words = []
    for split, count in audio["splits"].items():
        if count["hours"] * 3600 < SHORT_SECONDS:
            length = spoken_time(count["hours"])
            words.append(
                f"The {split} split is only {length} long. Numbers from less than two minutes of speech are rough."
            )
    others = [split for split in audio["splits"] if split != "train"]
    shared = (
        [split for split in others if split not in audio["held_out"]] if "train" in audio["splits"] else []
    )
    if not audio["with_speaker"] and others:
        words.append(
            "The manifest names no speakers, so the voices of the test recordings may have been heard in training."
        )
    elif shared:
        words.append(
            f"Some voices of {' and '.join(shared)} may have been heard in training: they share speakers, or not all are known."
        )
    if 0 < audio["with_speaker"] < audio["utterances"]:
        words.append(
            f"{audio['utterances'] - audio['with_speaker']:,} of {audio['utterances']:,} utterances have no speaker."
        )
    for key, what in (("with_phones", "phone alignments"), ("with_text", "a transcript")):
        if 0 < audio[key] < audio["utterances"]:
            words.append(
                f"{audio[key]:,} of {audio['utterances']:,} utterances have {what}; what needs them rests on those alone."
            )
    return words


def missing(audio: Mapping[str, Any]) -> list[Missing]:
    """What the corpus lacks, what could not be measured without it, and how to have it."""
    found = []
    if not audio["with_phones"]:
        found.append(
            Missing(
                "PNMI, phone purity, ABX, the phone probe, the phones of each unit, and the choice of the layer by its phones",
                "the manifest has no phone alignments",
                'Make phone times with a forced aligner, or with transcribe and align = "text" of a recogniser of phones, and index again:',
                "wordless index DIR OUT alignments=alignments.jsonl",
            )
        )
    if not audio["with_text"]:
        found.append(
            Missing(
                "word error rates, and what pretraining is worth to a recogniser",
                "the manifest has no transcripts",
                "Put NAME.txt beside NAME.wav and index again; a few minutes of transcribed speech are enough to begin:",
                "wordless index DIR OUT",
            )
        )
    if not audio["with_speaker"]:
        found.append(
            Missing(
                "results on voices never heard in training, ABX across speakers, and the speaker probes",
                "the manifest names no speakers",
                "If paths contain the speaker, give a pattern and index again. For folders named after speakers:",
                "wordless index DIR OUT speaker_pattern='^([^/]+)/'",
            )
        )
    return found


def glance(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The page's first numbers, as (value, what it is)."""
    audio, units, ctc = summary["audio"], summary["units"], summary["ctc"]
    found = [(spoken_time(audio["hours"]), f"of speech, {audio['utterances']:,} utterances")]
    if audio["speakers"]:
        found.append((f"{audio['speakers']:,}", "speaker" if audio["speakers"] == 1 else "speakers"))
    if units:
        name, last = list(units.items())[-1]
        found.append(
            (
                f"{last['units_per_second']:.1f}",
                f"units a second ({name}), of {last['num_classes']:,} classes",
            )
        )
        if "pnmi" in last:
            found.append((f"{last['pnmi']:.3f}", f"PNMI with phones ({name})"))
    if "bits_per_unit" in summary["lm"]:
        found.append((f"{summary['lm']['bits_per_unit']:.2f}", "bits per unit, language model"))
    rates = {name: scores for name, scores in ctc.get("transcripts", {}).items() if "wer" in scores}
    if rates:
        name, scores = next(iter(rates.items()))
        found.append((f"{scores['wer']:.0%}", f"{scores.get('counted', 'words')} wrong ({name})"))
    return found


def spoken_time(hours: float) -> str:
    """A duration for a sentence: hours, minutes (with a decimal below ten) or whole seconds."""
    minutes = hours * 60
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return (
        f"{minutes:.0f} minutes"
        if minutes >= 9.95
        else f"{minutes:.1f} minutes"
        if minutes >= 1
        else f"{minutes * 60:.0f} seconds"
    )


def compare(value: float, other: float, less: str, same: str, more: str) -> str:
    """The phrase for `value` beside `other`: below, about the same, or above."""
    return same if abs(value - other) < SAME else less if value < other else more
