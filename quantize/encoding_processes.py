"""`encode` in several processes of one machine, each with a share of its threads and GPUs."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from pretrain.data.label_shards import shard_stands
from pretrain.store.interrupts import IgnoringContext
from quantize.encoding_plan import EncodeConfig, Plan, encode_shards, unless_overtaken
from quantize.extraction import open_source


def encode_in_processes(plan: Plan, advance: Callable[[float], object]) -> None:
    """Encodes the shards that are left in processes, which ask for one after another.

    Raises ValueError if one of them dies; the others are ended.
    """
    left, context = plan.left(), IgnoringContext()
    count = min(plan.config.processes, len(plan.part))
    workers: dict[Any, SpawnProcess] = {}
    connection: Any
    worker: SpawnProcess
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(plan.config, theirs), daemon=True)
            with _share_of_the_machine(plan.config, number, count):
                worker.start()
            theirs.close()
            workers[ours] = worker
        while workers:
            for connection in wait(list(workers)):
                try:
                    message = connection.recv()
                    if message is None:
                        connection.send(next(left, None))
                    elif isinstance(message, str):
                        raise ValueError(message)
                    else:
                        advance(message)
                except (EOFError, ConnectionError):
                    worker = workers.pop(connection)
                    worker.join()
                    if worker.exitcode:
                        raise ValueError(_why_it_ended(plan, worker.exitcode)) from None
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _work(config: EncodeConfig, connection: Connection) -> None:
    """A worker process. It sends None to ask for a shard (None is the end), seconds of audio, or the text of
    a ValueError."""
    try:
        plan = Plan(config)
        source = open_source(plan.codebook, config.encoder, config, config.precision)
        with unless_overtaken(plan.out):
            encode_shards(plan, source, iter(partial(_ask, connection), None), connection.send)
    except (EOFError, ConnectionError):
        pass  # the parent has ended
    except ValueError as error:
        connection.send(str(error))


def _ask(connection: Connection) -> int | None:
    connection.send(None)
    shard: int | None = connection.recv()
    return shard


@contextmanager
def _share_of_the_machine(config: EncodeConfig, number: int, count: int) -> Iterator[None]:
    """The environment in which worker `number` of `count` starts: its share of the threads, and one of
    several GPUs."""
    import torch

    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    on_gpu = config.encoder is not None and config.device in ("auto", "cuda")
    if on_gpu and (gpus := torch.cuda.device_count()) > 1:
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        share["CUDA_VISIBLE_DEVICES"] = names.split(",")[number % gpus]
    before = {name: os.environ.get(name) for name in share}
    os.environ.update(share)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _why_it_ended(plan: Plan, exit_code: int) -> str:
    cause = f"ended with status {exit_code}; its messages are above"
    if exit_code < 0:
        cause = f"was ended by {signal.Signals(-exit_code).name}"
        if -exit_code == signal.SIGKILL:
            cause += ", as happens when memory runs out: fewer `processes` or threads need less"
    done = sum(shard_stands(plan.out, shard) for shard in plan.part)
    return (
        f"{plan.out}: one of {plan.config.processes} processes {cause}. {done} of {len(plan.part)} shards "
        "are done; the same command makes the rest"
    )
