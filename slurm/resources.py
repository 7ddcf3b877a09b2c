"""What a job asks for: the `[slurm]` table of a config.

    [slurm]
    partition = "gpu"
    nodes = 2
    gpus_per_node = 8
    tasks_per_node = 8        # one per GPU
    cpus_per_task = 8
    time_minutes = 1440
    setup = ["module load cuda"]

The same table serves `--on slurm` and `--on local`; a local job has one node, and no queue that partition,
account, qos, constraint, memory, chosen nodes or mail could mean anything to. A stage of a recipe may lay its
own `[STAGE.slurm]` over it.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

# A newline in one of these would end its #SBATCH line and start a shell command.
Word = Annotated[str, StringConstraints(pattern=r"^\S+$")]
Positive = Annotated[int, Field(ge=1)]


class Resources(BaseModel):
    """What a job asks for. A key that is left out, and has no default here, has the cluster's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Word | None = None  # of the job, in the queue; default: wordless-VERB
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None  # features that the nodes must have, e.g. "a100"
    nodes: Positive = 1
    tasks_per_node: Positive = 1  # processes of a distributed run: one per GPU
    gpus_per_node: Annotated[int, Field(ge=0)] = 0  # 0 hides a local machine's GPUs from the job
    cpus_per_task: Positive = 2
    memory_gb: Positive | None = None  # per node
    time_minutes: Positive = 60  # per attempt: a job out of time is requeued and resumes
    signal_seconds: Positive | None = None  # to save before the end; default: a fifth of the time, at most 90
    array: Positive = 1  # elements that share the work of a stage whose verb has `part`
    array_parallelism: Positive = 256  # elements of an array that run at a time
    exclude: Word | None = None  # nodes that must not be used, e.g. "node[3,7]"
    nodelist: Word | None = None  # nodes that must be
    gres: Word | None = None  # generic resources besides gpus_per_node, e.g. "lscratch:200"
    mail_user: Word | None = None
    mail_type: Word | None = None  # e.g. "END,FAIL"
    snapshot: bool = False  # run a copy of the code as it was when the job was submitted
    setup: tuple[str, ...] = ()  # shell lines before the job

    @model_validator(mode="after")
    def _signal_comes_before_the_end(self) -> "Resources":
        if self.signal_seconds is not None and self.signal_seconds >= 60 * self.time_minutes:
            raise ValueError(
                f"signal_seconds ({self.signal_seconds}) must be less than time_minutes ({self.time_minutes} "
                "minutes)"
            )
        return self

    @property
    def signal_delay_seconds(self) -> int:
        """How long before the end of its time a job gets the signal to save."""
        return self.signal_seconds or min(90, 60 * self.time_minutes // 5)

    def slurm_parameters(self) -> dict[str, Any]:
        """The parameters of `submitit.SlurmExecutor`, under its names; what is None there is not written to
        the sbatch file."""
        return {
            "job_name": self.name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "gpus_per_node": self.gpus_per_node or None,  # a cluster without GPUs refuses a request for 0
            "cpus_per_task": self.cpus_per_task,
            "mem": None if self.memory_gb is None else f"{self.memory_gb}GB",
            "time": self.time_minutes,
            "signal_delay_s": self.signal_delay_seconds,
            "array_parallelism": self.array_parallelism,
            "exclude": self.exclude,
            "nodelist": self.nodelist,
            "gres": self.gres,
            "mail_user": self.mail_user,
            "mail_type": self.mail_type,
            "setup": list(self.setup),
        }
