"""Feature sources: what k-means is fitted on and what a codebook quantises, one vector per 20 ms frame.

A source turns utterances into (frames, dim) float32 arrays, `frames` being `num_frames` of the utterance's length whatever
the source, and describes itself for the codebook. Audio is decoded by threads ahead of the computation.

By default an encoder on a CPU takes one utterance at a time: its features are then bit for bit independent of the company
it is encoded in. With `batch_seconds > 0` utterances are packed end to end; nothing is padded and none sees another, but the
matrix products have other shapes, and the last bits of a feature may differ (a label on the border of two classes with them).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import kaldi_native_fbank
import numpy as np

from pretrain.audio import HOP, MIN_SAMPLES, SAMPLE_RATE, load_audio, num_frames
from pretrain.manifest import Utterance

if TYPE_CHECKING:
    from pretrain.encoder import Encoder

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "int8"]
LayerConvention = Literal["residual", "feed_forward"]  # as pretrain.encoder says; named here too, because that imports torch

NUM_CEPSTRA = 13
WINDOW_FRAMES = 5000  # longer utterances (100 s) go through the encoder in windows, so that memory stays bounded
CONTEXT_FRAMES = 100  # seen on both sides of a window and dropped; the positional convolution reaches 64 frames
GPU_BATCH_SECONDS = 200.0


class FeatureSource(Protocol):
    """Anything that gives features by frame: `dim`, a JSON-able description, and the features of utterances in any order."""

    @property
    def dim(self) -> int: ...
    def describe(self) -> dict[str, Any]: ...
    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]: ...


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
    static = np.stack([computer.get_frame(t) for t in range(computer.num_frames_ready)])  # (frames at 100 Hz, 13)
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
        yield from ahead(lambda utterance: mfcc(load_audio(utterance), self.cmvn), utterances, self.workers)


class EncoderSource:
    """The features of one layer of a trained encoder (0 is the input of the first layer; see `LayerConvention` for the others).

    `batch_seconds`: audio per batch; 0 is one utterance at a time, None is 0 on the CPU and 200 on a GPU. `precision`: of the
    matrix products; int8 changes the encoder for good, and runs on a CPU.
    """

    def __init__(
        self, encoder: "Encoder", fingerprint: str, layer: int, *, device: str = "cpu", batch_seconds: float | None = None,
        workers: int = 2, precision: Precision = "float32", convention: LayerConvention = "residual",
    ):  # fmt: skip
        if device == "cpu":
            from pretrain.kernels import keep_freed_memory

            keep_freed_memory()
        self.precision, self.convention = precision, convention
        if not 0 <= layer <= encoder.config.num_layers:
            raise ValueError(f"layer: {layer} does not exist; this encoder has layers 0 to {encoder.config.num_layers}")
        if precision == "int8":
            if device != "cpu":
                raise ValueError(f'precision: "int8" runs on a CPU, not on {device}; "bfloat16" is for GPUs')
            encoder.use_int8()
        self.encoder, self.fingerprint, self.layer, self.device, self.workers = encoder, fingerprint, layer, device, workers
        self.batch_seconds = batch_seconds if batch_seconds is not None else (0.0 if device == "cpu" else GPU_BATCH_SECONDS)

    @property
    def dim(self) -> int:
        return self.encoder.config.dim

    def describe(self) -> dict[str, Any]:
        other = {} if self.convention == "residual" else {"convention": self.convention}
        return {"kind": "encoder", "encoder": self.fingerprint, "layer": self.layer, **other}

    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]:
        """Features of `utterances`, in the order given."""
        for utterance, layers in self._run(utterances, [self.layer]):
            yield utterance, layers[0]

    def all_layers(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, list[np.ndarray]]]:
        """The same for every layer at once; index 0 is the input of the first layer."""
        yield from self._run(utterances, list(range(self.encoder.config.num_layers + 1)))

    def _run(self, utterances: Sequence[Utterance], layers: list[int]) -> Iterator[tuple[Utterance, list[np.ndarray]]]:
        batches = plan_batches(utterances, self.batch_seconds)
        decoded = ahead(load_audio, [utterance for batch in batches for utterance in batch], self.workers)
        for batch in batches:
            waveforms = [waveform for _, waveform in islice(decoded, len(batch))]
            found = [self._extract_one(waveforms[0], layers)] if len(batch) == 1 else self._extract(waveforms, layers)
            yield from zip(batch, found, strict=True)

    def _extract_one(self, waveform: np.ndarray, layers: list[int]) -> list[np.ndarray]:
        parts = []
        for start, end, first, last in plan_windows(total := num_frames(len(waveform))):
            stop = len(waveform) if last == total else (last - 1) * HOP + MIN_SAMPLES
            (found,) = self._extract([waveform[first * HOP : stop]], layers)
            parts.append([features[start - first : end - first] for features in found])
        return [np.concatenate(windows) if len(windows) > 1 else windows[0] for windows in zip(*parts, strict=True)]

    def _extract(self, waveforms: list[np.ndarray], layers: list[int]) -> list[list[np.ndarray]]:
        """For each waveform its features (frames, dim) of each of `layers`."""
        import torch

        from pretrain.packing import pack

        buffer, layout = pack(waveforms)
        with torch.inference_mode(), torch.autocast(self.device.split(":")[0], torch.bfloat16, self.precision == "bfloat16"):
            outputs = self.encoder.extract_packed(buffer.to(self.device), layout, max(layers), self.convention)
            found = [outputs[layer].float().cpu().numpy() for layer in layers]
        return [[features[first:last] for features in found] for first, last in layout.frame_bounds]


def open_encoder_source(run: str, layer: int, *, device: str, **options: Any) -> EncoderSource:
    """The encoder of a run folder as a feature source, with its `options`; `device` "auto" is the GPU when torch has one."""
    import torch

    from pretrain.encoder import load_encoder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, fingerprint = load_encoder(run, device)
    return EncoderSource(encoder, fingerprint, layer, device=device, **options)


def ahead(function: Callable[[Utterance], T], utterances: Iterable[Utterance], workers: int) -> Iterator[tuple[Utterance, T]]:
    """`(utterance, function(utterance))` in order, computed by `workers` threads a little ahead of the consumer."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Utterance, Future[T]]] = deque()
        try:
            for utterance in utterances:
                pending.append((utterance, pool.submit(function, utterance)))
                if len(pending) > 4 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:  # an error, or a consumer that stopped early: drop what has not begun
            for _, future in pending:
                future.cancel()


def plan_batches(utterances: Sequence[Utterance], batch_seconds: float) -> list[list[Utterance]]:
    """In the order given, at most so much audio each; one at a time if `batch_seconds` is 0."""
    batches: list[list[Utterance]] = []
    room = 0.0
    for utterance in utterances:
        alone = utterance.num_frames > WINDOW_FRAMES  # goes through the encoder in windows, whatever its neighbours
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
    return [(start, end, max(0, start - CONTEXT_FRAMES), min(total, end + CONTEXT_FRAMES)) for start, end in pairwise(bounds)]
