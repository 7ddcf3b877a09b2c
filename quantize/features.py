"""Feature sources: one vector per 20 ms frame, on which k-means is fitted and which a codebook quantises.

A source turns utterances into (frames, dim) float32 arrays, with `num_frames` frames of each utterance, and
describes itself for the codebook. Threads decode audio ahead of the computation.

On a CPU, MFCC and the features of an encoder are a function of the samples and the weights, to the last bit.
Each utterance goes through the encoder alone, in one thread; torch's number of threads go on at once. So the
numbers of threads, batches and shards change nothing. (A matrix product that is split over threads, or has
another number of rows, differs in its last bits.) Other kinds of processor and other versions of torch may
add in another order.

On a GPU, utterances are packed end to end into batches of `batch_seconds`, without padding. No utterance
affects another, but the matrix products have other shapes in another batch, and the last bits of a feature
may differ, and with them a label on the border of two classes. The same batches on the same kind of GPU give
the same bits.

Utterances of more than 100 s go through the encoder in windows: equal parts of at most 100 s, each with 2 s
of context on both sides, which are dropped. Normalisation over time uses the statistics of the whole
utterance (pretrain/model/totals.py), and the positional convolution reaches less than 2 s. So the input of
the first layer equals that of the whole utterance, to rounding; only attention is limited to the window
(docs/formats.md has numbers). Memory holds the decoded samples and the features of one utterance (per hour
230 MB, and 550 MB of BASE), and activations of one window per thread. A streaming encoder needs no windows:
it takes long utterances chunk by chunk (pretrain/model/online.py).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np

from pretrain.data.audio import load_audio
from pretrain.data.utterance import SAMPLE_RATE, Utterance, num_frames
from pretrain.data.windows import Window, equal_windows
from pretrain.model.config import LayerConvention
from quantize.mfcc import NUM_CEPSTRA, mfcc

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.encoder import Encoder

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "int8"]
# an utterance, its features (frames, dim) of some layers
Layers = Iterator[tuple[Utterance, list[np.ndarray]]]
Totals = dict[str, "Tensor"]  # pretrain/model/totals.py
WINDOW_FRAMES = 5000  # longer utterances (100 s) go through the encoder in windows
CONTEXT_FRAMES = 100  # on both sides of a window; the positional convolution reaches 64 frames
GPU_BATCH_SECONDS = 200.0
AHEAD_SECONDS = 3600.0  # of audio decoded ahead at most (230 MB), but for one utterance that is longer


class FeatureSource(Protocol):
    """Gives the features of utterances, in the order given, their `dim`, and a description that JSON can
    hold.

    `stream` takes group after group as it needs them, so that decoding does not pause in between. No batch
    has utterances of two groups.
    """

    @property
    def dim(self) -> int: ...
    def describe(self) -> dict[str, Any]: ...
    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]: ...
    def stream(self, groups: Iterable[Sequence[Utterance]]) -> Iterator[tuple[Utterance, np.ndarray]]: ...


@dataclass(frozen=True)
class MfccSource:
    """`mfcc` of every utterance, in the order given."""

    cmvn: bool = False
    workers: int = 2
    dim: int = 3 * NUM_CEPSTRA

    def describe(self) -> dict[str, Any]:
        return {"kind": "mfcc", "cmvn": self.cmvn}

    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]:
        yield from self.stream([utterances])

    def stream(self, groups: Iterable[Sequence[Utterance]]) -> Iterator[tuple[Utterance, np.ndarray]]:
        utterances = chain.from_iterable(groups)
        yield from ahead(lambda utterance: mfcc(load_audio(utterance), self.cmvn), utterances, self.workers)


class EncoderSource:
    """The features of one layer of a trained encoder (0 is the input of the first layer; see
    `LayerConvention` for the others).

    `batch_seconds`: audio per batch on a GPU; None is 200, 0 is one utterance at a time, as always on a CPU.
    `precision`: of the matrix products; int8 changes the encoder for good, and runs on a CPU.
    """

    def __init__(
        self,
        encoder: "Encoder",
        fingerprint: str,
        layer: int,
        *,
        device: str = "cpu",
        batch_seconds: float | None = None,
        workers: int = 2,
        precision: Precision = "float32",
        convention: LayerConvention = "residual",
    ):
        if device == "cpu":
            from pretrain.training.memory import keep_freed_memory

            keep_freed_memory()
        self.precision, self.convention = precision, convention
        if not 0 <= layer <= encoder.config.num_layers:
            raise ValueError(
                f"layer: {layer} does not exist; this encoder has layers 0 to {encoder.config.num_layers}"
            )
        if precision == "int8":
            if device != "cpu":
                raise ValueError(f'precision: "int8" runs on a CPU, not on {device}; "bfloat16" is for GPUs')
            encoder.use_int8()
        self.encoder, self.fingerprint, self.layer = encoder, fingerprint, layer
        self.device, self.workers = device, workers
        on_gpu = GPU_BATCH_SECONDS if batch_seconds is None else batch_seconds
        self.batch_seconds = 0.0 if device == "cpu" else on_gpu

    @property
    def dim(self) -> int:
        return self.encoder.config.dim

    def describe(self) -> dict[str, Any]:
        other = {} if self.convention == "residual" else {"convention": self.convention}
        return {"kind": "encoder", "encoder": self.fingerprint, "layer": self.layer, **other}

    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]:
        """Features of `utterances`, in the order given."""
        yield from self.stream([utterances])

    def stream(self, groups: Iterable[Sequence[Utterance]]) -> Iterator[tuple[Utterance, np.ndarray]]:
        """Features of group after group. Batches end with their group, so they do not depend on earlier
        work."""
        for utterance, layers in self._run(groups, [self.layer]):
            yield utterance, layers[0]

    def all_layers(self, utterances: Sequence[Utterance], layers: Sequence[int] | None = None) -> Layers:
        """The same for several layers at once, or for all; layer 0 is the input of the first. Later layers do
        not run."""
        every = range(self.encoder.config.num_layers + 1)
        yield from self._run([utterances], list(every if layers is None else layers))

    def _run(self, groups: Iterable[Sequence[Utterance]], layers: list[int]) -> Layers:
        if self.device == "cpu":
            return self._each_alone(chain.from_iterable(groups), layers)
        return self._in_batches(groups, layers)

    def _each_alone(self, utterances: Iterable[Utterance], layers: list[int]) -> Layers:
        """Window by window, each in one thread from front end to last layer, as many at a time as torch has
        threads."""
        import torch

        threads = torch.get_num_threads()
        decoded = ahead(load_audio, utterances, self.workers)
        pending: deque[tuple[Utterance, list[Future[list[np.ndarray]]]]] = deque()

        def finished() -> tuple[Utterance, list[np.ndarray]]:
            utterance, parts = pending.popleft()
            return utterance, _stitched([part.result() for part in parts])

        # set_num_threads is about the thread that calls it (and about threads yet to come, hence the
        # restoring below)
        with ThreadPoolExecutor(threads, "encoder", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for utterance, waveform in decoded:
                    pending.append((utterance, self._submit(pool, waveform, layers)))
                    while pending and sum(len(parts) for _, parts in pending) > 2 * threads:
                        yield finished()
                while pending:
                    yield finished()
            finally:  # after an error, or where the consumer stopped early
                for part in chain.from_iterable(parts for _, parts in pending):
                    part.cancel()
                decoded.close()
                torch.set_num_threads(threads)

    def _submit(
        self, pool: ThreadPoolExecutor, waveform: np.ndarray, layers: list[int]
    ) -> list[Future[list[np.ndarray]]]:
        """The windows of one utterance as tasks of the pool."""
        windows = self._windows(waveform)
        if len(windows) == 1:
            return [pool.submit(self._extract_window, waveform, windows[0], layers)]
        # Submitted first, so begun first: no window holds a thread that the totals still need.
        totals = pool.submit(self._totals, waveform)

        def extract(window: Window) -> list[np.ndarray]:
            return self._extract_window(waveform, window, layers, totals.result())

        return [pool.submit(extract, window) for window in windows]

    def _in_batches(self, groups: Iterable[Sequence[Utterance]], layers: list[int]) -> Layers:
        sizes: deque[int] = deque()  # of the batches whose decoding has begun

        def in_order() -> Iterator[Utterance]:
            for group in groups:
                for batch in plan_batches(group, self.batch_seconds):
                    sizes.append(len(batch))
                    yield from batch

        decoded = ahead(load_audio, in_order(), self.workers)
        for first in decoded:
            batch, waveforms = zip(first, *islice(decoded, sizes.popleft() - 1), strict=True)
            if len(batch) > 1:
                yield from zip(batch, self._extract(waveforms, layers), strict=True)
                continue
            windows = self._windows(waveforms[0])
            totals = self._totals(waveforms[0]) if len(windows) > 1 else None
            parts = [self._extract_window(waveforms[0], window, layers, totals) for window in windows]
            yield batch[0], _stitched(parts)

    def _windows(self, waveform: np.ndarray) -> list[Window]:
        total = num_frames(len(waveform))
        if self.encoder.config.streaming is not None:
            return [Window(0, total, 0, total)]
        return equal_windows(total, WINDOW_FRAMES, CONTEXT_FRAMES)

    def _totals(self, waveform: np.ndarray) -> "Totals | None":
        """Statistics that all windows of a waveform use."""
        from pretrain.model.totals import utterance_totals

        return utterance_totals(self.encoder, waveform)

    def _extract_window(
        self, waveform: np.ndarray, window: Window, layers: list[int], totals: "Totals | None" = None
    ) -> list[np.ndarray]:
        """The frames that a window of a waveform keeps, of each of `layers`; `totals` are of the whole
        waveform."""
        if self.encoder.config.streaming is not None and window.last > WINDOW_FRAMES:
            return self._extract_online(waveform, layers)
        samples = window.samples(waveform, num_frames(len(waveform)))
        (found,) = self._extract([samples], layers, totals)
        return [features[window.kept] for features in found]

    def _extract(
        self, waveforms: Sequence[np.ndarray], layers: list[int], totals: "Totals | None" = None
    ) -> list[list[np.ndarray]]:
        """Of each waveform the features (frames, dim) of each of `layers`; with `totals`, of a window of one
        utterance."""
        from pretrain.data.packing import pack

        buffer, layout = pack(waveforms)
        with self._inference():
            outputs = self.encoder.extract_packed(
                buffer.to(self.device), layout, max(layers), self.convention, totals
            )
            found = [outputs[layer].float().cpu().numpy() for layer in layers]
        return [[features[first:last] for features in found] for first, last in layout.frame_bounds]

    def _extract_online(self, waveform: np.ndarray, layers: list[int]) -> list[np.ndarray]:
        """The same for one waveform and a streaming encoder, chunk by chunk."""
        import torch

        from pretrain.model.online import OnlineEncoder

        online = OnlineEncoder(self.encoder, range(max(layers) + 1), self.convention)
        with self._inference():
            chunks = [
                [chunk.layers[layer].float().cpu().numpy() for layer in layers]
                for chunk in online.feed(torch.from_numpy(waveform), last=True)
            ]
        return _stitched(chunks)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        import torch

        with (
            torch.inference_mode(),
            torch.autocast(self.device.split(":")[0], torch.bfloat16, self.precision == "bfloat16"),
        ):
            yield


def _stitched(windows: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The layers of consecutive windows end to end, by layer."""
    return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*windows, strict=True)]


def open_encoder_source(run: str, layer: int, *, device: str, **options: Any) -> EncoderSource:
    """The encoder of a run folder as a feature source, with its `options`; `device` "auto" is the GPU when
    torch has one."""
    from pretrain.model.encoder import load_encoder
    from pretrain.training.parallel import resolve_device

    device = str(resolve_device(device))
    encoder, fingerprint = load_encoder(run, device)
    return EncoderSource(encoder, fingerprint, layer, device=device, **options)


def ahead(
    function: Callable[[Utterance], T], utterances: Iterable[Utterance], workers: int
) -> Generator[tuple[Utterance, T], None, None]:
    """`(utterance, function(utterance))` in order, computed by `workers` threads a little ahead of the
    consumer.

    Of hour-long recordings, two at a time are in memory.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Utterance, Future[T]]] = deque()
        try:
            for utterance in utterances:
                pending.append((utterance, pool.submit(function, utterance)))
                while len(pending) > 4 * workers or (len(pending) > 1 and _seconds(pending) > AHEAD_SECONDS):
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:  # after an error, or where the consumer stopped early
            for _, future in pending:
                future.cancel()


def _seconds(pending: Iterable[tuple[Utterance, object]]) -> float:
    return sum(utterance.length for utterance, _ in pending) / SAMPLE_RATE


def plan_batches(utterances: Sequence[Utterance], batch_seconds: float) -> list[list[Utterance]]:
    """In the order given, at most so much audio each; one at a time if `batch_seconds` is 0."""
    batches: list[list[Utterance]] = []
    room = 0.0
    for utterance in utterances:
        alone = utterance.num_frames > WINDOW_FRAMES  # goes through the encoder in windows
        if alone or utterance.length > room:
            batches.append([])
            room = batch_seconds * SAMPLE_RATE
        batches[-1].append(utterance)
        room = 0.0 if alone else room - utterance.length
    return batches
