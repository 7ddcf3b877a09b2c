"""The verb `encode`: audio to labels, two bytes a frame, in one pass.

Utterances are cut into shards of like duration, in manifest order. A shard is computed from its own
utterances alone and appears when it is complete. The same command makes the shards that are missing or
damaged, so an interruption costs at most one shard per process. Any number of processes and machines on one
disk can make shards of the same folder (`processes`, `part`): two that make the same one write the same
bytes, and the one that finds all of them commits. `plan.json` beside the shards prevents a run from going on
with another run's inputs.

Labels of MFCC, and of an encoder on CPUs of one kind, depend on no batch, shard, process or thread. On GPUs
they may, where a frame lies within rounding of a border (see `quantize.features`); the same settings on the
same kind of GPU give the same labels, interrupted or not.
"""

import time
from typing import Any

import numpy as np

from pretrain.data.label_shards import shard_stands
from pretrain.data.labels import Labels, commit_labels, count_classes
from pretrain.data.manifest import Manifest
from pretrain.progress import progress
from pretrain.store.artefact import disagreements, is_complete, keep_to_plan, read_meta, require_absent
from quantize.codebook import Codebook
from quantize.encoding_plan import EncodeConfig, Plan, encode_shards, unless_overtaken
from quantize.encoding_processes import encode_in_processes
from quantize.extraction import open_source
from quantize.quality import usage_metrics

AGREEMENT_UTTERANCES = 50

__all__ = ["EncodeConfig", "encode"]


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Writes the labels of a split (None: of every row). Returns counts, speed and the use of the classes.

    With `part`, the part that finds all shards finishes the labels; until then the summary has
    `shards_missing`.
    """
    began = time.monotonic()
    if config.part is None:
        require_absent(config.out)
    plan = Plan(config)
    if not is_complete(plan.out):
        with unless_overtaken(plan.out):
            _encode_part(plan)
        missing = [shard for shard in range(len(plan.shards)) if not shard_stands(plan.out, shard)]
        if missing:
            return {**_work_done(plan, began), "part": config.part, "shards_missing": len(missing)}
        with unless_overtaken(plan.out):
            _commit(plan)
    _require_same(plan)
    usage = [usage_metrics(counts) for counts in count_classes(plan.out)]
    by_level = {f"{name}_by_level": [level[name] for level in usage] for name in usage[0]}
    return {
        "utterances": len(plan.rows),
        "hours": sum(plan.seconds) / 3600,
        "num_classes": plan.codebook.num_classes,
        **_work_done(plan, began),
        **usage[0],
        **(by_level if len(usage) > 1 else {}),
        **label_agreement(config, plan.codebook, plan.rows),
    }


def _encode_part(plan: Plan) -> None:
    # checked before an encoder is loaded; a new plan is written after that
    if (plan.out / "plan.json").is_file():
        keep_to_plan(plan.out, plan.identity())
    todo = sum(plan.seconds[shard] for shard in plan.part if not shard_stands(plan.out, shard))
    total = sum(plan.seconds[shard] for shard in plan.part)
    with progress("encode", total=total, unit="s", done=total - todo) as advance:
        if plan.config.processes == 1:
            source = open_source(plan.codebook, plan.config.encoder, plan.config, plan.config.precision)
            encode_shards(plan, source, plan.left(), advance)
        else:
            encode_in_processes(plan, advance)


def _work_done(plan: Plan, began: float) -> dict[str, Any]:
    seconds = time.monotonic() - began
    return {
        "num_shards": len(plan.shards),
        "shards_already_done": len(plan.part) - len(plan.begun),
        "audio_seconds_per_second": sum(plan.seconds[shard] for shard in plan.begun) / seconds,
        "seconds": seconds,
    }


def _commit(plan: Plan) -> None:
    """Verify the shards and finish the labels; another process may be doing the same."""
    parents = {"manifest": plan.manifest.fingerprint, "codebook": plan.codebook.fingerprint}
    if plan.codebook.source["kind"] == "encoder":
        parents["encoder"] = plan.codebook.source["encoder"]
    commit_labels(
        plan.out,
        len(plan.shards),
        plan.config.model_copy(update={"part": None}).resolved(),
        parents,
        codebook=plan.codebook.fingerprint,
        num_classes=plan.codebook.num_classes,
        num_levels=plan.codebook.num_levels,
        expected_ids=plan.rows.column("id"),
        expected_frames=plan.rows.num_frames,
    )
    (plan.out / "plan.json").unlink(missing_ok=True)
    for path in plan.out.glob(".*.tmp"):  # of killed processes
        path.unlink(missing_ok=True)


def _require_same(plan: Plan) -> None:
    """The finished labels are those that were asked for: another part may have committed them."""
    meta = read_meta(plan.out, "labels")
    there = {**meta, **meta["config"], **meta["parents"], "num_shards": meta["num_shards"]}
    identity = plan.identity()
    if differing := disagreements({key: there.get(key) for key in identity}, identity):
        raise ValueError(
            f"{plan.out}: holds finished labels of something else ({differing}); choose another `out`"
        )


def label_agreement(config: EncodeConfig, codebook: Codebook, rows: Manifest) -> dict[str, float]:
    """The share of frames, of a seeded draw of utterances, with the label of float32; empty if they are of
    float32.

    `label_agreement` is of level 0. With more levels, `label_agreement_all_levels` counts the frames that
    agree at every level.
    """
    if config.precision == "float32" or config.encoder is None:
        return {}
    rng, labels = np.random.default_rng(0), Labels(config.out)
    chosen = np.sort(rng.choice(len(rows), size=min(len(rows), AGREEMENT_UTTERANCES), replace=False))
    exact = open_source(codebook, config.encoder, config)
    features = exact.features([rows[int(i)] for i in chosen])
    agree = np.concatenate([labels[row.id] == codebook.assign(found) for row, found in features])
    if agree.ndim == 1:  # (frames,), else (frames, levels)
        return {"label_agreement": float(agree.mean())}
    return {
        "label_agreement": float(agree[:, 0].mean()),
        "label_agreement_all_levels": float(agree.all(axis=1).mean()),
    }
