"""The stages of a run that its page is made of: which of them are complete, and which were left out and
why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.store.artefact import is_complete, read_meta
from wordless.report.figures import PhoneCounts

KINDS = {
    "pretrain": "encoder",
    "layers": "layer-sweep",
    "units": "measurement",
    "labels": "labels",
    "lm": "unit-lm",
    "lm_scores": "scores",
    "suites": "scores",
    "samples": "samples",
    "synthesizer": "synthesizer",
    "sounds": "sounds",
    "ctc": "recognizer",
    "transcripts": "transcripts",
    "transfer": "transfer",
}
INCOMPLETE = "no complete output"


class Stage(NamedTuple):
    """A complete artefact."""

    name: str
    folder: Path
    meta: dict[str, Any]

    def read(self, name: str = "summary.json") -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def lines(self, name: str) -> list[Any]:
        # Not splitlines(), which also breaks at U+2028.
        with open(self.folder / name, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def phone_counts(self) -> PhoneCounts:
        """The phones of a measurement."""
        joint = np.load(self.folder / "joint.npy", allow_pickle=False)
        return PhoneCounts(self.read("phones.json"), joint, self.meta["config"]["silence"])


Stages = dict[str, dict[str, Stage]]


class LeftOut(NamedTuple):
    """A stage that the page has nothing of: its name, the key of the report that asked for it ("" for none),
    and the reason."""

    stage: str
    use: str
    reason: str


def find_stages(groups: Mapping[str, Any], reasons: Mapping[str, str]) -> tuple[Stages, list[LeftOut]]:
    """The complete stages by group and name, and those left out: with their reason of `reasons`, by a stage's
    folder name, where it has one. `groups` are folders, or tables of them, under the keys of `KINDS`. Another
    kind of artefact: ValueError."""
    stages: Stages = {}
    left_out: list[LeftOut] = []
    for group, kind in KINDS.items():
        value = groups.get(group)
        folders = value if isinstance(value, dict) else {group: value} if value else {}
        complete = {name: Path(folder) for name, folder in folders.items() if is_complete(folder)}
        stages[group] = {
            name: Stage(name, folder, read_meta(folder, kind)) for name, folder in complete.items()
        }
        if kind == "scores":
            for stage in stages[group].values():
                require_scores(stage, group)
        for name, folder in folders.items():
            if name not in complete:
                stage_name = Path(folder).name
                left_out.append(
                    LeftOut(
                        stage_name,
                        " ".join(dict.fromkeys((group, name))),
                        reasons.get(stage_name, INCOMPLETE),
                    )
                )
    asked = {known.stage for known in left_out} | {
        stage.folder.name for group in stages.values() for stage in group.values()
    }
    return stages, left_out + [
        LeftOut(name, "", reason) for name, reason in reasons.items() if name not in asked
    ]


def require_scores(stage: Stage, group: str) -> None:
    """Scores of a suite are `suites`, and those of a split `lm_scores`; others: ValueError."""
    known = stage.read()
    if (mine := "suites" if "accuracy" in known else "lm_scores") != group:
        raise ValueError(
            f"{stage.folder}: holds the scores of a {'suite' if mine == 'suites' else 'split'}; give it "
            f"under `{mine}`, not `{group}`"
        )
    if group == "lm_scores" and "trigram_bits_per_unit" not in known:
        raise ValueError(f"{stage.folder}: scored by an older wordless; remove it and score again")


def open_labels(folder: Path, manifest: Manifest) -> Labels:
    """Labels of this very manifest, or ValueError."""
    labels = Labels(folder)
    if (theirs := labels.meta["parents"].get("manifest")) != manifest.fingerprint:
        raise ValueError(
            f"{folder}: labels of manifest {theirs}, but {manifest.folder} is {manifest.fingerprint}; encode "
            "this one"
        )
    return labels
