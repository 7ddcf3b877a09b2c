"""Feature sources: what k-means is fitted on and what a codebook quantises, one vector per 20 ms frame.

A source turns utterances into (frames, dim) float32 arrays, `frames` being `num_frames` of the utterance's length whatever
the source, and describes itself for the codebook. Audio is decoded by threads ahead of the computation.

MFCC, and an encoder's features on a CPU, are a function of the samples and the weights, to the last bit: each utterance goes
through the encoder alone and in one thread, as many at a time as torch has threads, so that threads, batches, shards and
company change nothing. (Splitting one matrix product over threads does change its last bits, and so does another number of
rows.) They may still differ between kinds of processor and versions of torch, whose kernels add in another order.

On a GPU utterances are packed end to end into batches of `batch_seconds`. Nothing is padded and none sees another, but the matrix
products have other shapes in another batch, and the last bits of a feature may differ (a label on the border of two classes
with them). The same batches on the same kind of GPU give the same bits.

Utterances of more than 100 s go through the encoder in windows: equal parts of at most 100 s, each with 2 s on both sides that are seen and
dropped. What is normalised over time is normalised by the statistics of the whole utterance, taken before (pretrain/model/totals.py), and
the positional convolution reaches less than 2 s. So the input of the first layer is that of the whole utterance, to rounding, and what
the cuts change is attention, which sees a window (docs/formats.md has numbers). Decoded samples and the features of one utterance are
in memory (per hour 230 MB, and 550 MB of BASE), activations of one window for each thread. A streaming encoder, whose chunks and
statistics count from the beginning, has no cuts and takes long utterances chunk by chunk (pretrain/model/online.py).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import kaldi_native_fbank
import numpy as np

from pretrain.data.audio import HOP, MIN_SAMPLES, SAMPLE_RATE, load_audio, num_frames
from pretrain.data.manifest import Utterance

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.model.encoder import Encoder

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "int8"]
Layers = Iterator[
    tuple[Utterance, list[np.ndarray]]
]  # of an utterance the features (frames, dim) of some layers
Totals = dict[str, "Tensor"]  # pretrain/model/totals.py
LayerConvention = Literal[
    "residual", "feed_forward"
]  # as pretrain.model.encoder says; named here too, because that imports torch

NUM_CEPSTRA = 13
WINDOW_FRAMES = 5000  # longer utterances (100 s) go through the encoder in windows
CONTEXT_FRAMES = (
    100  # seen on both sides of a window and dropped; the positional convolution reaches 64 frames
)
GPU_BATCH_SECONDS = 200.0
AHEAD_SECONDS = 3600.0  # of audio decoded ahead at most (230 MB), but for one utterance that is longer


class FeatureSource(Protocol):
    """Anything that gives features by frame, in the order given: `dim`, a JSON-able description, and the features of utterances.

    `stream` takes group after group as it needs them, so that decoding does not pause in between; no batch has utterances of two.
    """

    @property
    def dim(self) -> int: ...
    def describe(self) -> dict[str, Any]: ...
    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]: ...
    def stream(self, groups: Iterable[Sequence[Utterance]]) -> Iterator[tuple[Utterance, np.ndarray]]: ...


def mfcc(waveform: np.ndarray, cmvn: bool = False) -> np.ndarray:
    """MFCC + Δ + ΔΔ at 50 Hz: (num_frames(samples), 39) float32 of a float32 waveform in [-1, 1] at 16 kHz.

    HuBERT's first targets (Hsu et al. 2021, section IV-B; fairseq `dump_mfcc_feature.py`): Kaldi's 13 MFCC from 23 mel bins
    with snip_edges, c0 rather than energy, no dither, samples not scaled to 16 bits; Δ over 5 frames, edges repeated. Kaldi
    frame 2t spans the 400 samples of convolution frame t, so every second frame is kept. `cmvn` normalises mean and variance
    of the 13 over the utterance before Δ, as Kaldi recipes do and HuBERT does not.
    """
    options = kaldi_native_fbank.MfccOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.num_ceps = NUM_CEPSTRA
    options.use_energy = False
    computer = kaldi_native_fbank.OnlineMfcc(options)
    computer.accept_waveform(SAMPLE_RATE, waveform)
    computer.input_finished()
    static = np.stack(
        [computer.get_frame(t) for t in range(computer.num_frames_ready)]
    )  # (frames at 100 Hz, 13)
    if cmvn:
        static = (static - static.mean(axis=0)) / np.maximum(static.std(axis=0), 1e-5)
    first = deltas(static)
    return np.ascontiguousarray(np.hstack([static, first, deltas(first)])[::2])


def deltas(features: np.ndarray) -> np.ndarray:
    """Regression slope over 5 frames, Σ n·x[t+n] / Σ n² for n = -2…2, with the edge frames repeated. (frames, dim)"""
    padded = np.pad(features, ((2, 2), (0, 0)), mode="edge")
    slopes: np.ndarray = (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / np.float32(10)
    return slopes


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
        yield from ahead(
            lambda utterance: mfcc(load_audio(utterance), self.cmvn),
            chain.from_iterable(groups),
            self.workers,
        )


class EncoderSource:
    """The features of one layer of a trained encoder (0 is the input of the first layer; see `LayerConvention` for the others).

    `batch_seconds`: audio per batch on a GPU, None is 200; 0 is one utterance at a time, and a CPU does nothing else. `precision`: of
    the matrix products; int8 changes the encoder for good, and runs on a CPU.
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
            from pretrain.model.cpu_kernels import keep_freed_memory

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
        self.encoder, self.fingerprint, self.layer, self.device, self.workers = (
            encoder,
            fingerprint,
            layer,
            device,
            workers,
        )
        self.batch_seconds = (
            0.0 if device == "cpu" else GPU_BATCH_SECONDS if batch_seconds is None else batch_seconds
        )

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
        """Features of group after group; batches end with their group, so that they do not depend on what was done before."""
        for utterance, layers in self._run(groups, [self.layer]):
            yield utterance, layers[0]

    def all_layers(self, utterances: Sequence[Utterance], layers: Sequence[int] | None = None) -> Layers:
        """The same for several layers at once, or for every one; layer 0 is the input of the first. None beyond the last runs."""
        yield from self._run(
            [utterances], list(range(self.encoder.config.num_layers + 1)) if layers is None else list(layers)
        )

    def _run(self, groups: Iterable[Sequence[Utterance]], layers: list[int]) -> Layers:
        if self.device == "cpu":
            yield from self._each_alone(chain.from_iterable(groups), layers)
        else:
            yield from self._in_batches(groups, layers)

    def _each_alone(self, utterances: Iterable[Utterance], layers: list[int]) -> Layers:
        """Window by window, each in one thread from front end to last layer, as many at a time as torch has threads."""
        import torch

        threads = torch.get_num_threads()
        decoded = ahead(load_audio, utterances, self.workers)
        pending: deque[tuple[Utterance, list[Future[list[np.ndarray]]]]] = deque()
        # set_num_threads is about the thread that calls it (and about threads yet to come, hence the restoring below)
        with ThreadPoolExecutor(threads, "encoder", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for utterance, waveform in decoded:
                    pending.append((utterance, self._submit(pool, waveform, layers)))
                    while pending and sum(len(parts) for _, parts in pending) > 2 * threads:
                        yield _joined(*pending.popleft())
                while pending:
                    yield _joined(*pending.popleft())
            finally:  # an error, or a consumer that stopped early: drop what has not begun
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
            return [pool.submit(self._extract_window, waveform, *windows[0], layers)]
        # Asked for first, so begun first: no window holds a thread that the totals still need.
        totals = pool.submit(self._totals, waveform)

        def extract(window: tuple[int, int, int, int]) -> list[np.ndarray]:
            return self._extract_window(waveform, *window, layers, totals.result())

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
            if len(batch) == 1:
                windows = self._windows(waveforms[0])
                totals = self._totals(waveforms[0]) if len(windows) > 1 else None
                found = [
                    _stitched(
                        [self._extract_window(waveforms[0], *window, layers, totals) for window in windows]
                    )
                ]
            else:
                found = self._extract(waveforms, layers)
            yield from zip(batch, found, strict=True)

    def _windows(self, waveform: np.ndarray) -> list[tuple[int, int, int, int]]:
        total = num_frames(len(waveform))
        return plan_windows(total) if self.encoder.config.streaming is None else [(0, total, 0, total)]

    def _totals(self, waveform: np.ndarray) -> "Totals | None":
        """What windows of a waveform share."""
        from pretrain.model.totals import utterance_totals

        return utterance_totals(self.encoder, waveform)

    def _extract_window(
        self,
        waveform: np.ndarray,
        start: int,
        end: int,
        first: int,
        last: int,
        layers: list[int],
        totals: "Totals | None" = None,
    ) -> list[np.ndarray]:
        """Frames start … end of one waveform, of each of `layers`, computed from its frames first … last; `totals` are of the whole."""
        if self.encoder.config.streaming is not None and last > WINDOW_FRAMES:
            return self._extract_online(waveform, layers)
        stop = len(waveform) if last == num_frames(len(waveform)) else (last - 1) * HOP + MIN_SAMPLES
        (found,) = self._extract([waveform[first * HOP : stop]], layers, totals)
        return [features[start - first : end - first] for features in found]

    def _extract(
        self, waveforms: Sequence[np.ndarray], layers: list[int], totals: "Totals | None" = None
    ) -> list[list[np.ndarray]]:
        """For each waveform its features (frames, dim) of each of `layers`; with `totals` they are windows of one utterance."""
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

        online = OnlineEncoder(self.encoder, max(layers), self.convention)
        with self._inference():
            chunks = [
                [chunk.outputs[layer].float().cpu().numpy() for layer in layers]
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


def _joined(
    utterance: Utterance, windows: list[Future[list[np.ndarray]]]
) -> tuple[Utterance, list[np.ndarray]]:
    return utterance, _stitched([window.result() for window in windows])


def _stitched(windows: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The layers of consecutive windows end to end, by layer."""
    return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*windows, strict=True)]


def open_encoder_source(run: str, layer: int, *, device: str, **options: Any) -> EncoderSource:
    """The encoder of a run folder as a feature source, with its `options`; `device` "auto" is the GPU when torch has one."""
    from pretrain.model.encoder import load_encoder
    from pretrain.training.parallel import resolve_device

    device = str(resolve_device(device))
    encoder, fingerprint = load_encoder(run, device)
    return EncoderSource(encoder, fingerprint, layer, device=device, **options)


def ahead(
    function: Callable[[Utterance], T], utterances: Iterable[Utterance], workers: int
) -> Generator[tuple[Utterance, T], None, None]:
    """`(utterance, function(utterance))` in order, computed by `workers` threads a little ahead of the consumer; of hour-long recordings
    two at a time are in memory."""
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
        finally:  # an error, or a consumer that stopped early: drop what has not begun
            for _, future in pending:
                future.cancel()


def _seconds(pending: Iterable[tuple[Utterance, object]]) -> float:
    return sum(utterance.length for utterance, _ in pending) / SAMPLE_RATE


def plan_batches(utterances: Sequence[Utterance], batch_seconds: float) -> list[list[Utterance]]:
    """In the order given, at most so much audio each; one at a time if `batch_seconds` is 0."""
    batches: list[list[Utterance]] = []
    room = 0.0
    for utterance in utterances:
        alone = (
            utterance.num_frames > WINDOW_FRAMES
        )  # goes through the encoder in windows, whatever its neighbours
        if alone or utterance.length > room:
            batches.append([])
            room = batch_seconds * SAMPLE_RATE
        batches[-1].append(utterance)
        room = 0.0 if alone else room - utterance.length
    return batches


def plan_windows(total: int) -> list[tuple[int, int, int, int]]:
    """Windows of an utterance of `total` frames: (start, end) kept of (first, last) computed. Equal parts, exact cover."""
    count = -(-total // WINDOW_FRAMES)
    bounds = [total * part // count for part in range(count + 1)]
    return [
        (start, end, max(0, start - CONTEXT_FRAMES), min(total, end + CONTEXT_FRAMES))
        for start, end in pairwise(bounds)
    ]
