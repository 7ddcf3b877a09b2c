"""What each figure of the page shows, in words that follow from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wordless.report.figures import CURVES, PhoneCounts
from wordless.report.readings import compare

FLAT = 0.01  # a validation loss that changes by less of itself has levelled off
NAMED = 8  # phones that a sentence names, at most


def of_layers(sweep: Mapping[str, Any]) -> list[str]:
    """What a sweep shows: how the chosen layer compares with layer 0, which is the input of the first
    layer."""
    layers, layer = sweep["layers"], str(sweep["layer"])
    chosen, first = layers[layer], layers.get("0", {})
    if "pnmi" not in chosen:
        return [
            "Without phone alignments there is nothing to compare the layers by, so the middle one was "
            "taken; another may be better. Perplexity, the effective number of units in use, does not show "
            "which."
        ]
    if "pnmi" not in first or layer == "0":
        return []
    layer_0, scores = (
        "layer 0, which is the input of the first layer",
        f"PNMI {chosen['pnmi']:.3f} against {first['pnmi']:.3f}",
    )
    lost = (
        f"The chosen layer is worse than {layer_0}: {scores}. At this size, and after this much training, "
        "the encoder has not learned more about phones than its input already shows. More audio or more "
        "training steps may change that."
    )
    level = (
        f"The chosen layer is no better than {layer_0}: {scores}. By this measure, training has added "
        "nothing to the input."
    )
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
            "So the encoder separates the phones of one voice better than its input does, and those of "
            "different voices less well."
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
    """What a loss did, of (step, value) in validation, or of the training losses where validation has too
    few."""
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
        return (
            f"validation was best at step {step:,} ({best:.2f}) and has risen since to {last:.2f}: later "
            "steps fit the training data only"
        )
    if last > first * (1 - FLAT):
        return f"validation hardly changed from step {first_step:,} on ({change})"
    if last < before * (1 - FLAT):
        return (
            f"validation fell from {change} and was still falling at the last step, so longer training would "
            "probably help"
        )
    return f"validation fell from {change} and has levelled off"


def of_matrix(counts: PhoneCounts) -> list[str]:
    """How clearly the units match phones, and which phones have no unit."""
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
            f"The clearest is unit {units[column]}, which is {counts.phones[row]} in {share.max():.0%} of "
            "its frames."
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
