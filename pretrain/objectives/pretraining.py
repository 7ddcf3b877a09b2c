"""The verb `pretrain`: train an encoder on a manifest, by one of the OBJECTIVES.

A global batch gives the same update however it is split over ranks and micro-batches, with one exception, as
in fairseq: wav2vec 2.0's diversity term is that of each micro-batch (an entropy of a mean is not a sum over
frames).
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import create_model, model_validator
from torch import nn

from pretrain.data.labels import Labels
from pretrain.data.manifest import Manifest
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.task import PretrainTask, RunConfig, say
from pretrain.training.checkpoint import load_weights
from pretrain.training.engine import train
from pretrain.training.run import Run

TASKS: dict[str, type[PretrainTask]] = {name: resolve_name(place) for name, place in OBJECTIVES.items()}

ALWAYS_RESOLVED = ("hubert", "wav2vec2")  # tables that runs of any objective have had

if TYPE_CHECKING:
    WithTables = RunConfig
else:
    tables = {name: (task.config_class, task.config_class()) for name, task in TASKS.items()}
    WithTables = create_model(
        "WithTables", __base__=RunConfig, objective=(Literal[tuple(TASKS)], ...), **tables
    )


class PretrainConfig(WithTables):
    """Data, objective, architecture and training of an encoder; a table for each objective."""

    @model_validator(mode="after")
    def _check_keys_against_each_other(self) -> "PretrainConfig":
        if TASKS[self.objective].needs_labels != (self.labels is not None):
            names = " or ".join(f'"{name}"' for name, task in TASKS.items() if task.needs_labels)
            raise ValueError(f"`labels` is needed for objective = {names} and only there")
        if self.evaluation is not None and self.evaluation.layer > self.encoder.num_layers:
            layer, top = self.evaluation.layer, self.encoder.num_layers
            raise ValueError(f"evaluation.layer {layer}: this encoder has layers 0 to {top}")
        return self

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, in the order of earlier runs: the tables are behind `encoder`.

        Another objective's table is left out, so that a new objective changes no config of an old one.
        """
        tree = super().resolved()
        tables = [name for name in TASKS if name in ALWAYS_RESOLVED or name == self.objective]
        keys = list(RunConfig.model_fields)
        behind = keys.index("encoder") + 1
        keys[behind:behind] = tables
        return {key: tree[key] for key in keys}


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run the verb; returns the training summary with the number of parameters and of utterances left out."""
    manifest = Manifest(config.manifest)
    parents = {"manifest": manifest.fingerprint}
    extra: dict[str, str] = {"objective": config.objective}
    torch.manual_seed(config.training.seed)  # the initial weights
    labels = None if config.labels is None else Labels(config.labels)
    if labels is not None:
        parents["labels"], extra["codebook"] = labels.fingerprint, labels.codebook
    task = TASKS[config.objective](config, manifest, labels)
    if config.init is not None:
        parents["init"] = initialize(task, config.init, extra.get("codebook"))
    summary = train(
        Run(
            task,
            out=config.out,
            kind="encoder",
            training=config.training,
            optimizer=config.optimizer,
            config=config.resolved(),
            parents=parents,
            extra=extra,
        )
    )
    parameters, left_out = num_parameters(task.model), task.train_set.num_left_out
    return {**summary, "parameters": parameters, "utterances_left_out": left_out}


def initialize(task: PretrainTask, run: str, codebook: str | None = None) -> str:
    """Load the weights of `run` (config key `init`) into the task's model; returns their fingerprint.

    Two kinds of parameters may be missing there, and a line on stderr names them: the heads, where the run
    holds an encoder alone, and what has a row for each class, where the number of classes or the codebook
    differs. They keep their random values. Raises ValueError for any other name or shape that does not fit.
    """
    weights, meta, fingerprint = load_weights(run)
    own = task.model.state_dict()
    other_codebook = meta.get("codebook") not in (None, codebook)

    def of_other_classes(name: str) -> bool:
        if name not in weights:
            return False
        here, there = own[name].shape, weights[name].shape
        return there[1:] == here[1:] and (other_codebook or there != here)

    if all(name.startswith("encoder.") for name in weights):
        fresh = [name for name in own if not name.startswith("encoder.")]
    else:
        fresh = [name for name in task.class_weights if of_other_classes(name)]
    if fresh:
        say(f"init: {run} gives no {', '.join(fresh)} for this run; drawn anew")
    weights = {name: tensor for name, tensor in weights.items() if name not in fresh}
    here, there = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (own, weights))
    problems = [f"{name} is missing there" for name in here if name not in there and name not in fresh]
    problems += [f"{name} is not part of this model" for name in there if name not in here]
    problems += [
        f"{name} is {shape} there and {here[name]} here"
        for name, shape in there.items()
        if here.get(name, shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"init: the weights of {run} do not fit: {'; '.join(problems[:8])}{more}. `objective`, `encoder` "
            "and the head's sizes must be those of that run"
        )
    task.model.load_state_dict(weights, strict=False)
    return fingerprint


def num_parameters(model: nn.Module) -> int:
    """The number of learned numbers."""
    return sum(p.numel() for p in model.parameters())
