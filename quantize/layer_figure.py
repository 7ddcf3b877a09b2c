"""The figure of a sweep over layers: panels of measures, side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (  # of the plot: title, label of the y axis, and the measures by what the legend calls them
    (
        "Phones: higher is better",
        "share, 0 to 1",
        {
            "pnmi": "PNMI",
            "phone_purity": "phone purity",
            "phone_accuracy_features": "phone probe, accuracy",
        },
    ),
    (
        "ABX error: lower is better",
        "error, %",
        {"abx_within_features": "within a speaker", "abx_across_features": "across speakers"},
    ),
    (
        "Speaker probe: lower is better",
        "accuracy, %",
        {"speaker_accuracy": "of an utterance", "speaker_frame_accuracy": "of one frame"},
    ),
)
USE_PANEL = ("Units in use", "perplexity, units", {"perplexity": "perplexity"})  # where there are no phones
PANEL_INCHES = (4.0, 2.8)

Panel = tuple[str, str, dict[str, str]]


def layer_panels(summary: Mapping[str, Any]) -> list[Panel]:
    """The panels of `PANELS` that a sweep has numbers for; perplexity beside them where it knows no
    phones."""
    known = {key for layer in summary["layers"].values() for key in layer}
    found = [
        (title, label, {key: name for key, name in keys.items() if key in known})
        for title, label, keys in PANELS
    ]
    return [panel for panel in found if panel[2]] + ([] if "pnmi" in known else [USE_PANEL])


def draw_panel(axes: "Axes", summary: Mapping[str, Any], panel: Panel) -> None:
    """One panel's measures over the layers, without its title; the recommended layer is marked."""
    from matplotlib.ticker import MaxNLocator

    _, label, keys = panel
    layers: dict[str, dict[str, float]] = summary["layers"]
    scale = 100 if label.endswith("%") else 1
    for key, name in keys.items():
        points = [
            (int(layer), scale * measures[key]) for layer, measures in layers.items() if key in measures
        ]
        axes.plot(*np.transpose(points), "o-", linewidth=1.6, markersize=3.5, label=name)
    axes.axvline(
        summary["layer"], color="#555", linewidth=1, linestyle="--", label=f"layer {summary['layer']}, chosen"
    )
    axes.set(xlabel="layer (0: the input of the first)" if "0" in layers else "layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)


def draw_layers(summary: Mapping[str, Any]) -> "Figure":
    """The measures over the layers, all panels side by side and each of one size."""
    from matplotlib.figure import Figure

    panels = layer_panels(summary)
    figure = Figure(figsize=(PANEL_INCHES[0] * len(panels), PANEL_INCHES[1]), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, summary, panel)
        axes.set_title(panel[0], fontsize=9, loc="left", fontweight="bold")
    return figure
