"""Ours and a peer in turn on the same inputs, each in a process of its own.

A contender is a process that lives for the whole run and works when it is told to: ours, peer, matrix
product, ours, peer, ...; never two at once, each with the same number of threads. So its peak memory is its
own, and what slows the machine for a minute slows all of them. A peer may live in another Python
(`--peer-python`): contenders are `PYTHON -m benchmarks.NAME --contender NAME --inputs FOLDER`, read commands
from standard input and answer on standard output, one JSON object a line. The inputs lie in FOLDER, written
once by the parent. The machine's matrix-product rate is a contender like the others ("gemm").

A contender whose name ends with "-kept" has a C library that keeps freed memory, as ours asks its own to; the
others have its defaults, whatever the environment of the parent says.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parents[1]
KEPT = "-kept"
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}  # of glibc; elsewhere nothing happens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Contender(Protocol):
    """What runs in a child. `amount` is the work of a round in the benchmark's unit times seconds (audio
    seconds, say), known at the latest after the round. `parts`, where a contender has it, are the seconds of
    the last round's parts by name; `seconds`, where a contender times itself, those that count."""

    amount: float

    def about(self) -> dict[str, Any]:
        """Anything to report; `inputs_sha256` is compared between the contenders."""
        ...

    def prepare(self, number: int) -> None:
        """What is not timed before round `number`: loading, drawing masks."""
        ...

    def run(self) -> None: ...


Build = Callable[[str, dict[str, Any], Path], Contender]  # (name, settings, folder of inputs)


class Gemm:
    """The physical limit: a square matrix product, 2048 wide on a CPU, 8192 on a GPU, in the precision that
    is measured."""

    def __init__(self, settings: dict[str, Any]):
        size, self.repeats = (
            (8192, 50) if settings["device"] == "cuda" else (settings.get("gemm_size", 2048), 10)
        )
        dtype = DTYPES.get(settings["precision"], torch.float32)  # int8 is held against float32
        self.a = torch.randn(size, size, device=settings["device"]).to(dtype)
        self.b, self.c = torch.randn_like(self.a), torch.empty_like(self.a)
        self.amount = 2.0 * size**3 * self.repeats  # floating-point operations

    def about(self) -> dict[str, Any]:
        return {}

    def prepare(self, number: int) -> None: ...

    def run(self) -> None:
        for _ in range(self.repeats):
            torch.mm(self.a, self.b, out=self.c)


# In the child


def serve(build: Build, name: str, folder: Path) -> None:
    """Build the contender and run its rounds as told, until standard input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])

    def answer(**values: Any) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    try:
        contender: Contender = (
            Gemm(settings) if name == "gemm" else build(name.removesuffix(KEPT), settings, folder)
        )
    except ValueError as error:
        answer(error=f"{name}: {error}")
        return
    except ImportError as error:
        if name == "ours":
            raise
        answer(error=f"{name}: {error}; --peer-python gives the interpreter of an environment that has it")
        return
    answer(
        about=contender.about(),
        start_gb=_peak_gb(settings["device"]),
        torch=torch.__version__,
        python=platform.python_version(),
    )
    for line in sys.stdin:
        contender.prepare(json.loads(line)["round"])
        _synchronize(settings["device"])
        began = time.perf_counter()
        contender.run()
        _synchronize(settings["device"])
        seconds, parts = time.perf_counter() - began, getattr(contender, "parts", {})
        seconds = getattr(contender, "seconds", seconds)
        answer(seconds=seconds, amount=contender.amount, peak_gb=_peak_gb(settings["device"]), parts=parts)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_gb(device: str) -> float:
    """Peak memory in GB (1e9 bytes): of the GPU, or of this process since it began."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:  # ru_maxrss would begin at what the parent had when it forked
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    except (OSError, IndexError):
        return (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024)
            / 1e9
        )


# In the parent


class Child:
    """A contender's process, seen from the parent."""

    def __init__(
        self,
        module: str,
        name: str,
        folder: Path,
        python: str,
        threads: int,
        environment: Mapping[str, str] | None = None,
    ):
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        own = (
            {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
            | limits
            | dict(environment or {})
        )
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", module, "--contender", name, "--inputs", str(folder)],
            cwd=ROOT,
            env=own | (KEEP_FREED_MEMORY if name.endswith(KEPT) else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self.answer()

    def round(self, number: int) -> dict[str, Any]:
        self.begin(number)
        return self.answer()

    def begin(self, number: int) -> None:
        """Tell it to work, without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"round": number}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.name}: its process ended with status {self.process.wait()}; see its messages above"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise ValueError(answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Measurement:
    """One contender: the rates of its rounds (amount per second), its peak memory, what it said of itself,
    its parts' seconds."""

    rates: list[float]
    peak_gb: float
    hello: dict[str, Any]
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def take_turns(
    module: str, pythons: Mapping[str, str], folder: Path, *, rounds: int, warmup: int, threads: int
) -> dict[str, Measurement]:
    """Run the contenders in turn, `warmup` rounds that do not count and `rounds` that do. `pythons`:
    interpreter by name."""
    with ExitStack() as stack:
        children = {}
        for name, python in pythons.items():
            children[name] = Child(module, name, folder, python, threads)
            stack.callback(children[name].close)
        digests = {child.hello["about"].get("inputs_sha256") for child in children.values()} - {None}
        if len(digests) > 1:
            raise RuntimeError(f"the contenders were given different inputs: {sorted(digests)}")
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
        for number in range(warmup + rounds):
            for name, child in children.items():
                answer = child.round(number)
                say(
                    f"round {number - warmup + 1}/{rounds} {name}: {answer['seconds']:.2f} s"
                    + (" (warm-up)" * (number < warmup))
                )
                answers[name].append(answer)
        return {
            name: Measurement(
                [answer["amount"] / answer["seconds"] for answer in got[warmup:]],
                got[-1]["peak_gb"],
                children[name].hello,
                {
                    part: statistics.median(answer["parts"][part] for answer in got[warmup:])
                    for part in got[-1]["parts"]
                },
            )
            for name, got in answers.items()
        }


def ask(module: str, name: str, folder: Path, *, threads: int) -> dict[str, Any]:
    """What a contender says of itself, without a round."""
    child = Child(module, name, folder, sys.executable, threads)
    child.close()
    about: dict[str, Any] = child.hello["about"]
    return about


def sides(ours: Measurement, peer: Measurement | None) -> dict[str, Any]:
    """The keys of DESIGN.md that hold two contenders against each other; above 1 a ratio is in our favour."""
    return {
        "ours": ours.rate,
        "peer": peer and peer.rate,
        "ratio": peer and ours.rate / peer.rate,
        "ours_peak_gb": ours.peak_gb,
        "peer_peak_gb": peer and peer.peak_gb,
        "memory_ratio": peer and peer.peak_gb / ours.peak_gb,
        "ours_rounds": ours.rates,
        "peer_rounds": peer.rates if peer else [],
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    models = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def say(text: str) -> None:
    """To the person who waits."""
    print(text, file=sys.stderr, flush=True)


def load_before() -> float:
    """The machine's load, with a warning if other processes would spoil the figures."""
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"the machine is busy (load {load:.1f}): the figures will be low and may be uneven")
    return load
