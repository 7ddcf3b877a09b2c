"""The report's figures, each as an SVG data URI that an <img> can hold. They take plain numbers and know
nothing of folders."""

import base64
import colorsys
import io
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.data.audio import load_audio
from pretrain.data.labels import Labels
from pretrain.data.utterance import HOP, MIN_SAMPLES, SAMPLE_RATE, Utterance
from pretrain.model.frontend import log_mel, mel_matrix
from quantize.layer_figure import PANEL_INCHES, draw_panel, layer_panels
from quantize.quality import matching_labels

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#444",
    "ytick.color": "#444",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.hashsalt": "wordless",
}
COLOURS = ("#2f6690", "#c8622d", "#4a7c59", "#7d5a96", "#8a7a2f", "#6b6b6b")
GREY = (0.88, 0.88, 0.88)
WIDTH = 10.8  # inches: the width of the page
SHOWN_SECONDS = 6.0  # of an utterance, at most
CURVES = {  # by group: the metric that is drawn and its unit
    "pretrain": ("loss", "loss, nats"),
    "lm": ("bits", "bits per unit"),
    "synthesizer": ("loss", "loss, no unit"),
    "ctc": ("loss", "nats per character"),
}

Colour = tuple[float, float, float]


class PhoneCounts(NamedTuple):
    """What a measurement knows of phones: their names, joint counts (phones, classes), and which of them are
    silence."""

    phones: list[str]
    joint: np.ndarray
    silence: list[str]


def draw_curves(runs: dict[str, dict[str, list[dict[str, float]]]], lm: dict[str, Any]) -> dict[str, str]:
    """By group an image of the training and validation losses of `runs` {group: {name: metrics by step}}; the
    unit language model's are in bits, beside its n-gram baselines."""
    images = {}
    for group, (metric, unit) in CURVES.items():
        if not runs.get(group):
            continue
        figure, axes = draw_panel_axes()
        for colour, (name, lines) in zip(itertools.cycle(COLOURS), runs[group].items(), strict=False):
            about = "" if name == group else f"{name}, "
            training = [(line["step"], line[metric]) for line in lines if metric in line]
            validation = [
                (line["step"], line[f"valid_{metric}"]) for line in lines if f"valid_{metric}" in line
            ]
            if training:
                axes.plot(
                    *np.transpose(training), color=colour, linewidth=1, alpha=0.55, label=f"{about}training"
                )
            if validation:
                axes.plot(
                    *np.transpose(validation),
                    "o-",
                    color=colour,
                    linewidth=1.8,
                    markersize=3,
                    label=f"{about}validation",
                )
        if group == "lm" and "bits_per_unit" in lm:
            for baseline, dashes in (("unigram", ":"), ("bigram", "--"), ("trigram", "-.")):
                axes.axhline(
                    lm[f"{baseline}_bits_per_unit"],
                    color="#555",
                    linewidth=1,
                    linestyle=dashes,
                    label=f"{baseline}, scored",
                )
            axes.plot(
                lines[-1]["step"],
                lm["bits_per_unit"],
                "D",
                color=COLOURS[1],
                markersize=5,
                label="model, scored",
            )
        axes.set(xlabel="training step", ylabel=unit)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#ddd", linewidth=0.6)
        axes.legend()
        images[group] = as_image(figure)
    return images


def draw_sweep(summary: dict[str, Any]) -> dict[str, str]:
    """By title an image for each panel of a layer sweep, all of one size, so that the page can set them side
    by side or stack them."""
    images = {}
    for panel in layer_panels(summary):
        figure, axes = draw_panel_axes()
        draw_panel(axes, summary, panel)
        images[panel[0]] = as_image(figure)
    return images


def draw_panel_axes() -> tuple[Figure, Axes]:
    """An empty figure of the size of a panel, which is read on a phone as well."""
    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    return figure, figure.subplots()


def draw_utterance(utterance: Utterance, labels: dict[str, Labels], counts: dict[str, PhoneCounts]) -> str:
    """A row of units for each labels, the log-mel spectrogram, and the phones where they are known; seconds
    along x.

    A unit has the colour of the phone that it mostly occurs with in the `counts` of its labels' name, or one
    of its own.
    """
    shown = min(utterance.length / SAMPLE_RATE, SHOWN_SECONDS)
    wave = torch.from_numpy(load_audio(utterance)[: int(shown * SAMPLE_RATE)])
    window = torch.hann_window(MIN_SAMPLES, periodic=False) ** 0.85  # that of the encoder's filterbanks
    mel = log_mel(wave[None], window, torch.from_numpy(mel_matrix(80)))[0].numpy()  # (frames at 100 Hz, mel)
    phones = [
        (start, min(end, shown), phone) for start, end, phone in utterance.phones or [] if start < shown
    ]
    heights = [0.32] * len(labels) + [1.7] + ([0.36] if phones else [])
    inches = sum(heights) + 0.55
    place = {
        "height_ratios": heights,
        "hspace": 0.08,
        "left": 0.085,
        "right": 0.985,
        "top": 0.99,
        "bottom": 0.5 / inches,
    }
    figure = Figure(figsize=(WIDTH, inches))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=place)[:, 0]
    hues = phone_colours(list(counts.values()))
    for axes, (name, known) in zip(panels, labels.items(), strict=False):
        frames = matching_labels(utterance, known).astype(np.int64)
        changes = np.flatnonzero(np.diff(frames, prepend=-1, append=-1))
        # Frame t covers the 20 ms in the middle of its 25 ms window.
        times = np.minimum((changes * HOP + (MIN_SAMPLES - HOP) / 2) / SAMPLE_RATE, shown).tolist()
        segments = list(zip(times, times[1:], frames[changes[:-1]].tolist(), strict=False))
        colours = {unit: hue(unit) for unit in range(known.num_classes)}
        if name in counts:
            phones_of_units = [counts[name].phones[row] for row in counts[name].joint.argmax(axis=0)]
            colours = {unit: hues[phone] for unit, phone in enumerate(phones_of_units)}
        draw_row(axes, name, segments, colours, 6.5)
    axes = panels[len(labels)]
    first = (MIN_SAMPLES - 160) / 2 / SAMPLE_RATE
    axes.imshow(
        mel.T,
        origin="lower",
        aspect="auto",
        cmap="Greys",
        extent=(first, first + len(mel) / 100, 0, mel.shape[1]),
    )
    axes.set_ylabel("log-mel", rotation=0, ha="right", va="center")
    axes.set_yticks([])
    if phones:
        for start, _, _ in phones[1:]:
            axes.axvline(start, color=COLOURS[0], linewidth=0.5, alpha=0.6)
        draw_row(panels[-1], "phones", phones, {phone: hues.get(phone, GREY) for _, _, phone in phones}, 9)
    for axes in panels[:-1]:
        axes.tick_params(bottom=False, labelbottom=False)
    panels[-1].set(xlim=(0, shown), xlabel="time, seconds")
    return as_image(figure)


def draw_row(
    axes: Axes, name: str, segments: list[tuple[float, float, Any]], colours: dict[Any, Colour], size: float
) -> None:
    """Coloured segments (start, end, class) in a row; the class is printed where it fits."""
    spans = [(start, end - start) for start, end, _ in segments]
    axes.broken_barh(
        spans, (0, 1), facecolors=[colours[it] for _, _, it in segments], edgecolor="white", linewidth=0.7
    )
    points_per_second = WIDTH * 0.9 * 72 / segments[-1][1]
    for start, end, it in segments:
        if (end - start) * points_per_second > 0.62 * size * len(str(it)):
            axes.text((start + end) / 2, 0.47, str(it), ha="center", va="center", fontsize=size, color="#222")
    axes.set(ylim=(0, 1), yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.spines[:].set_visible(False)


def phone_colours(counts: list[PhoneCounts]) -> dict[str, Colour]:
    """A hue for each phone of the measurements; grey for silence."""
    phones, silence = ({name for known in counts for name in known[field]} for field in (0, 2))
    return {phone: GREY if phone in silence else hue(number) for number, phone in enumerate(sorted(phones))}


def hue(number: int) -> Colour:
    """Golden-angle steps round the colour wheel keep neighbours apart."""
    return colorsys.hls_to_rgb(number * 0.618034 % 1, 0.70 + 0.08 * (number % 3), 0.5)


def draw_matrix(counts: PhoneCounts) -> str:
    """P(phone | unit), units sorted by their likeliest phone, phones by how often they are spoken."""
    phones, joint, _ = counts
    used = np.flatnonzero(joint.sum(axis=0))
    given = joint[:, used] / joint[:, used].sum(axis=0)  # (phones, units that occur)
    likeliest = given.argmax(axis=0)
    # Phones without a unit come last.
    rows = np.lexsort((-joint.sum(axis=1), ~np.isin(np.arange(len(phones)), likeliest)))
    columns = np.lexsort((-given.max(axis=0), np.argsort(rows)[likeliest]))
    figure = Figure(figsize=(WIDTH, min(14.0, 1.0 + 0.12 * len(phones))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        given[rows][:, columns], aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_yticks(range(len(phones)), [phones[row] or "(none)" for row in rows], fontsize=7.5)
    if len(columns) <= 120:
        axes.set_xticks(range(len(columns)), used[columns], fontsize=6.5, rotation=90)
    axes.tick_params(length=0)
    axes.set(xlabel="unit", ylabel="phone")
    figure.colorbar(image, ax=axes, label="P(phone | unit)", fraction=0.02, pad=0.01)
    return as_image(figure)


def as_image(figure: Figure) -> str:
    """An SVG as a data URI, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    return svg_image(buffer.getvalue())


def svg_image(svg: bytes) -> str:
    """An SVG as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
