"""The page in words: what a run found, what each figure shows, what to be careful with and what is missing,
all from the numbers.

Every sentence follows from the numbers whichever way they point: that learning did not pay is written as
plainly as that it did.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pretrain.data.splits import SHORT_SECONDS
from wordless.report import recognition

SAME = 0.005  # differences below this are called neither better nor worse
CLEAR_WER = 0.5  # above, most words of a recogniser are wrong, and the times of its words mean nothing


class Missing(NamedTuple):
    """Something that could not be measured: what, why, and how to have it next time, in words and as a
    command."""

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
        baselines = {name: lm[f"{name}_bits_per_unit"] for name in ("trigram", "bigram", "unigram")}
        best = min(baselines, key=baselines.__getitem__)
        low, high = lm.get("bits_below_bigram_ci95", (0.0, 0.0))
        by_chance = best == "bigram" and low < 0 < high  # only the bigram has an interval of its difference
        verdict = compare(
            bits,
            baselines[best],
            f"beats the {best}",
            f"is no better than a {best}",
            f"is worse than a {best}",
        )
        verdict = "is not certainly better than a bigram" if by_chance else verdict
        others = ", ".join(f"{name} {value:.2f}" for name, value in baselines.items() if name != best)
        words.append(
            f"The unit language model {verdict}: {bits:.2f} bits per unit against {baselines[best]:.2f} "
            f"({others})."
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
        f"The units of {name} carry {verdict} units from MFCC: PNMI {last['pnmi']:.3f} against "
        f"{mfcc['pnmi']:.3f}."
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
        "Units turned into sound and encoded again are the same in "
        f"{sounds['frame_agreement_resynthesis']:.0%} of the frames."
    ]
    others = []
    if "frame_agreement_copy" in sounds:
        others.append(
            f"{sounds['frame_agreement_copy']:.0%} for the recording’s own spectrogram, turned into sound by "
            "the same method"
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
            f"Most {counted} are wrong, so these transcripts are of no use yet. More transcribed speech, or "
            "more training steps, may help; until then a difference between recognisers means little."
        )
    for name, scores in scored.items():
        if scores.get("empty_hypotheses"):
            words.append(
                f"{name}: nothing was written for {scores['empty_hypotheses']:,} of "
                f"{scores['scored_utterances']:,} utterances."
            )
    return words


def of_units(units: Mapping[str, Any]) -> list[str]:
    """What the table of units does not put into words: ABX of the last units beside MFCC's, and classes that
    are never used."""
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


def cautions(audio: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the numbers: short splits, voices that training and test
    share."""
    words = []
    for split, count in audio["splits"].items():
        if count["hours"] * 3600 < SHORT_SECONDS:
            length = spoken_time(count["hours"])
            words.append(
                f"The {split} split is only {length} long. Numbers from less than two minutes of speech are "
                "rough."
            )
    others = [split for split in audio["splits"] if split != "train"]
    shared = (
        [split for split in others if split not in audio["held_out"]] if "train" in audio["splits"] else []
    )
    if not audio["with_speaker"] and others:
        words.append(
            "The manifest names no speakers, so the voices of the test recordings may have been heard in "
            "training."
        )
    elif shared:
        words.append(
            f"Some voices of {' and '.join(shared)} may have been heard in training: they share speakers, or "
            "not all are known."
        )
    if 0 < audio["with_speaker"] < audio["utterances"]:
        words.append(
            f"{audio['utterances'] - audio['with_speaker']:,} of {audio['utterances']:,} utterances have no "
            "speaker."
        )
    for key, what in (("with_phones", "phone alignments"), ("with_text", "a transcript")):
        if 0 < audio[key] < audio["utterances"]:
            words.append(
                f"{audio[key]:,} of {audio['utterances']:,} utterances have {what}; what needs them rests on "
                "those alone."
            )
    return words


def missing(audio: Mapping[str, Any]) -> list[Missing]:
    """What the corpus lacks, what could not be measured without it, and how to have it."""
    found = []
    if not audio["with_phones"]:
        found.append(
            Missing(
                "PNMI, phone purity, ABX, the phone probe, the phones of each unit, and the choice of the "
                "layer by its phones",
                "the manifest has no phone alignments",
                'Make phone times with a forced aligner, or with transcribe and align = "text" of a '
                "recogniser of phones, and index again:",
                "wordless index DIR OUT alignments=alignments.jsonl",
            )
        )
    if not audio["with_text"]:
        found.append(
            Missing(
                "word error rates, and what pretraining is worth to a recogniser",
                "the manifest has no transcripts",
                "Put NAME.txt beside NAME.wav and index again; a few minutes of transcribed speech are "
                "enough to begin:",
                "wordless index DIR OUT",
            )
        )
    if not audio["with_speaker"]:
        found.append(
            Missing(
                "results on voices never heard in training, ABX across speakers, and the speaker probes",
                "the manifest names no speakers",
                "If paths contain the speaker, give a pattern and index again. For folders named after "
                "speakers:",
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
