"""The sounds that a run's page plays: recordings, what became of their units, and the language model's
continuations."""

from typing import Any

import numpy as np
import soundfile

from pretrain.data.audio import load_audio
from pretrain.data.manifest import Manifest
from pretrain.data.utterance import SAMPLE_RATE
from units.sound.synthesizer import as_data_uri
from wordless.report.run_stages import Stage

SHOWN_SOUNDS = 4  # utterances, and continuations, that the page plays
RECORDING_SECONDS = 15.0  # of the recording that a prompt is the beginning of, at most


def listening_groups(sounds: Stage, manifest: Manifest) -> list[dict[str, Any]]:
    """Of each document the players: `document`, `text`, `of_model`, and `players` with `kind`, `source` (a
    data URI), `seconds`, and the seconds of `prompt` in a continuation.

    A continuation holds its prompt, which by itself is often too short to hear; beside it is the recording
    that the prompt is from, where the manifest has it.
    """
    groups: dict[str, dict[str, Any]] = {}
    for line in sounds.lines("sounds.jsonl"):
        of_model = line["kind"] in ("prompt", "continuation")
        group = groups.setdefault(
            f"{line['document']} {of_model}",
            {"document": line["document"], "of_model": of_model, "players": []},
        )
        group |= {"text": line["text"]} if "text" in line else {}
        group["players"].append(
            {"kind": line["kind"], "file": line["audio_filepath"], "prompt": line.get("prompt_seconds")}
        )
    shown = [
        group
        for kind in (False, True)
        for group in [g for g in groups.values() if g["of_model"] is kind][:SHOWN_SOUNDS]
    ]
    for group in shown:
        if any(player["kind"] == "continuation" for player in group["players"]):
            group["players"] = [player for player in group["players"] if player["kind"] != "prompt"]
        for player in group["players"]:
            set_sound(player, soundfile.read(sounds.folder / player["file"], dtype="float32")[0])
    add_recordings([group for group in shown if group["of_model"]], manifest)
    return shown


def add_recordings(groups: list[dict[str, Any]], manifest: Manifest) -> None:
    """Put the beginning of the recording that prompted before each continuation, where the manifest has
    it."""
    wanted = {group["document"] for group in groups}
    rows = {name: row for row, name in enumerate(manifest.ids) if name in wanted} if wanted else {}
    for group in groups:
        if (row := rows.get(group["document"])) is not None:
            utterance = manifest[row]
            group["players"].insert(0, {"kind": "prompting", "prompt": None})
            set_sound(group["players"][0], load_audio(utterance)[: int(RECORDING_SECONDS * SAMPLE_RATE)])
            group |= {"text": utterance.text} if utterance.text else {}


def set_sound(player: dict[str, Any], waveform: np.ndarray) -> None:
    """Give a player its sound, `source`, and how long it is, `seconds`."""
    player |= {"source": as_data_uri(waveform), "seconds": len(waveform) / SAMPLE_RATE}
