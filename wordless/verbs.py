"""The verbs of the pipeline: a config class and a function each, imported when they are needed.

VERBS is the one table that names every room. The command line, recipes and the report start from it, and no
room imports it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurm.resources import Resources


def load(target: str) -> Any:
    """The object that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Verb:
    """Where a verb's config class and function are, and what a recipe has to know about it."""

    module: str
    config: str
    function: str
    help: str
    text: str | None = None  # function that formats the summary for a terminal; None: a line for each value
    # "module:function": raises ValueError if the manifest lacks what the verb needs
    requires: str | None = None
    grows: bool = False  # adds to a finished output that was made with other settings
    distributed: bool = False  # several processes can share the work; any other verb runs in one
    resumes: bool = False  # the same command continues an interrupted one; any other verb starts again

    def load(self) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
        module = import_module(self.module)
        return getattr(module, self.config), getattr(module, self.function)

    def require_feasible(self, config: Any) -> None:
        """Raises ValueError if the config's finished manifest lacks what the verb needs."""
        if self.requires is not None:
            load(self.requires)(config)

    def has_parts(self, table: dict[str, Any]) -> bool:
        """Whether the work, with the settings `table`, can be shared by `part`."""
        return "part" in self.load()[0].model_fields and "part" not in table


VERBS = {
    "speech": Verb(
        "pretrain.data.speech",
        "SpeechConfig",
        "speech",
        "Make synthetic speech with true phone times (espeak-ng).",
    ),
    "index": Verb(
        "pretrain.data.indexing",
        "IndexConfig",
        "index",
        "List and check audio: a manifest from a folder, tars, .tsv or .jsonl.",
    ),
    "pretrain": Verb(
        "pretrain.objectives.pretraining",
        "PretrainConfig",
        "pretrain",
        "Train a HuBERT or wav2vec 2.0 encoder.",
        requires="pretrain.data.batches:require_audio",
        distributed=True,
        resumes=True,
    ),
    "cluster": Verb(
        "quantize.clustering",
        "ClusterConfig",
        "cluster",
        "Fit k-means on MFCC or on an encoder layer.",
        requires="quantize.clustering:require_frames",
        resumes=True,
    ),
    "encode": Verb(
        "quantize.encoding",
        "EncodeConfig",
        "encode",
        "Turn a corpus into labels, in one pass.",
        resumes=True,
    ),
    "measure": Verb(
        "quantize.measuring",
        "MeasureConfig",
        "measure",
        "Unit quality: PNMI, ABX, probes; which layer.",
        "as_text",
        requires="quantize.measuring:require_frames",
    ),
    "pack": Verb(
        "units.packing",
        "PackConfig",
        "pack",
        "Labels, or other tools' units, to a unit corpus.",
        resumes=True,
    ),
    "train-lm": Verb(
        "units.lm.training",
        "TrainLMConfig",
        "train_lm",
        "Train the unit language model; DPO.",
        distributed=True,
        resumes=True,
    ),
    "score": Verb(
        "units.scores.scoring",
        "ScoreConfig",
        "score",
        "Likelihood and minimal pairs, beside n-gram baselines.",
    ),
    "train-synthesizer": Verb(
        "units.sound.synthesis",
        "SynthesizerConfig",
        "train_synthesizer",
        "Learn how units sound.",
        requires="pretrain.data.batches:require_audio",
        distributed=True,
        resumes=True,
    ),
    "sample": Verb(
        "units.lm.sampling",
        "SampleConfig",
        "sample",
        "Continue units or audio; --audio FILE to hear it.",
    ),
    "synthesize": Verb(
        "units.sound.listening",
        "SynthesizeConfig",
        "synthesize",
        "Units back to sound; how many survive the round trip.",
    ),
    "finetune": Verb(
        "pretrain.ctc.finetuning",
        "FinetuneConfig",
        "finetune",
        "Train a CTC recogniser on transcripts.",
        requires="pretrain.ctc.finetuning:require_transcripts",
        distributed=True,
        resumes=True,
    ),
    "transcribe": Verb(
        "pretrain.ctc.transcription",
        "TranscribeConfig",
        "transcribe",
        "Decode speech to text; WER and CER.",
        "as_text",
    ),
    "compare": Verb(
        "pretrain.ctc.comparison",
        "CompareConfig",
        "compare",
        "Is one recogniser better? Paired tests.",
        "as_text",
    ),
    "label-efficiency": Verb(
        "pretrain.ctc.label_efficiency",
        "LabelEfficiencyConfig",
        "label_efficiency",
        "WER against labelled minutes, pretrained and not.",
        "as_text",
        requires="pretrain.ctc.label_efficiency:require_transcripts",
        grows=True,
        resumes=True,
    ),
    "report": Verb(
        "wordless.report.report",
        "ReportConfig",
        "report",
        "One self-contained HTML page of a run.",
        "as_text",
    ),
}
ALIASES = {"transfer": "label-efficiency"}  # earlier names, which recipes and command lines may still use


def canonical(name: Any) -> Any:
    """The present name of a verb."""
    return ALIASES.get(name, name) if isinstance(name, str) else name


def verb_named(name: Any, source: str) -> Verb:
    """The verb of that name or alias. Raises ValueError with the names that exist."""
    if not isinstance(name, str) or canonical(name) not in VERBS:
        raise ValueError(f"{source}: no verb {name!r}; there are {', '.join(VERBS)}")
    return VERBS[canonical(name)]


def require_fitting(name: str, table: dict[str, Any], resources: "Resources", source: str) -> None:
    """Raises ValueError if the verb `name`, with the settings `table`, cannot use that many tasks or an
    array."""
    verb = VERBS[name]
    for key in ("nodes", "tasks_per_node"):
        if (count := getattr(resources, key)) > 1 and not verb.distributed:
            several = ", ".join(name for name, verb in VERBS.items() if verb.distributed)
            raise ValueError(
                f"{source}: slurm.{key}: {count}, but `{name}` runs in one process; several take {several}"
            )
    if resources.array > 1 and not verb.has_parts(table):
        why = "its `part` is given" if "part" in table else f"`{name}` has no `part`"
        raise ValueError(f"{source}: slurm.array: {resources.array}, but {why}")
