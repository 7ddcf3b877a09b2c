"""Feature sources: what k-means is fitted on and what a codebook quantises, one vector per 20 ms frame.

A source turns utterances into (frames, dim) float32 arrays, `frames` being `num_frames` of the utterance's length whatever
the source, and describes itself for the codebook. Audio is decoded by threads ahead of the computation.

By default an encoder on a CPU takes one utterance at a time: its features are then bit for bit independent of the company
it is encoded in. With `batch_seconds > 0` utterances of like length share a batch; padding is masked in the encoder, but the
matrix products see other shapes, and the last bits of a feature may differ (a label on the border of two classes with them).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import kaldi_native_fbank
import numpy as np

from pretrain.audio import HOP, MIN_SAMPLES, SAMPLE_RATE, load_audio, num_frames
from pretrain.manifest import Utterance

if TYPE_CHECKING:
    from pretrain.encoder import Encoder

T = TypeVar("T")
Extract = Callable[..., list[Any]]  # (waveforms, num_samples) to tensors (batch, frames, dim)

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
    """The output of one layer of a trained encoder (0 is the input of the first layer; layer L follows its residual).

    `batch_seconds`: padded audio per batch; 0 is one utterance at a time, None is 0 on the CPU and 200 on a GPU.
    """

    def __init__(
        self, encoder: "Encoder", fingerprint: str, layer: int, *,
        device: str = "cpu", batch_seconds: float | None = None, workers: int = 2,
    ):  # fmt: skip
        if not 0 <= layer <= encoder.config.num_layers:
            raise ValueError(f"layer: {layer} does not exist; this encoder has layers 0 to {encoder.config.num_layers}")
        self.encoder, self.fingerprint, self.layer, self.device, self.workers = encoder, fingerprint, layer, device, workers
        self.batch_seconds = batch_seconds if batch_seconds is not None else (0.0 if device == "cpu" else GPU_BATCH_SECONDS)

    @property
    def dim(self) -> int:
        return self.encoder.config.dim

    def describe(self) -> dict[str, Any]:
        return {"kind": "encoder", "encoder": self.fingerprint, "layer": self.layer}

    def features(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, np.ndarray]]:
        """Features of `utterances`, one at a time in the order given, otherwise by length."""
        for utterance, layers in self._run(utterances, lambda w, n: [self.encoder.extract(w, n, self.layer)]):
            yield utterance, layers[0]

    def all_layers(self, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, list[np.ndarray]]]:
        """The same for every layer at once; index 0 is the input of the first layer."""
        yield from self._run(utterances, self.encoder.extract_all)

    def _run(self, utterances: Sequence[Utterance], extract: Extract) -> Iterator[tuple[Utterance, list[np.ndarray]]]:
        batches = plan_batches(utterances, self.batch_seconds)
        decoded = ahead(load_audio, [utterance for batch in batches for utterance in batch], self.workers)
        for batch in batches:
            waveforms = [waveform for _, waveform in islice(decoded, len(batch))]
            if len(batch) == 1:
                yield batch[0], self._extract_one(waveforms[0], extract)
                continue
            layers = self._extract(waveforms, extract)
            for row, utterance in enumerate(batch):
                yield utterance, [layer[row, : utterance.num_frames] for layer in layers]

    def _extract_one(self, waveform: np.ndarray, extract: Extract) -> list[np.ndarray]:
        parts = []
        for start, end, first, last in plan_windows(total := num_frames(len(waveform))):
            stop = len(waveform) if last == total else (last - 1) * HOP + MIN_SAMPLES
            layers = self._extract([waveform[first * HOP : stop]], extract)
            parts.append([layer[0, start - first : end - first] for layer in layers])
        return [np.concatenate(windows) if len(windows) > 1 else windows[0] for windows in zip(*parts, strict=True)]

    def _extract(self, waveforms: list[np.ndarray], extract: Extract) -> list[np.ndarray]:
        import torch

        lengths = [len(waveform) for waveform in waveforms]
        padded = np.zeros((len(waveforms), max(lengths)), dtype=np.float32)
        for row, waveform in enumerate(waveforms):
            padded[row, : len(waveform)] = waveform
        with torch.inference_mode():
            layers = extract(torch.from_numpy(padded).to(self.device), torch.tensor(lengths, device=self.device))
            return [layer.float().cpu().numpy() for layer in layers]  # each (batch, frames, dim)


def open_encoder_source(run: str, layer: int, *, device: str, batch_seconds: float | None, workers: int) -> EncoderSource:
    """The encoder of a run folder as a feature source; `device` "auto" is the GPU when torch has one."""
    import torch

    from pretrain.encoder import load_encoder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, fingerprint = load_encoder(run, device)
    return EncoderSource(encoder, fingerprint, layer, device=device, batch_seconds=batch_seconds, workers=workers)


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
    """One at a time in the order given if `batch_seconds` is 0; else sorted by length, at most so much padded audio each."""
    if batch_seconds == 0:
        return [[utterance] for utterance in utterances]
    batches: list[list[Utterance]] = []
    for utterance in sorted(utterances, key=lambda utterance: (utterance.length, utterance.id)):
        if batches and utterance.length * (len(batches[-1]) + 1) <= batch_seconds * SAMPLE_RATE:
            batches[-1].append(utterance)
        else:
            batches.append([utterance])
    return batches


def plan_windows(total: int) -> list[tuple[int, int, int, int]]:
    """Windows of an utterance of `total` frames: (start, end) kept of (first, last) computed. Equal parts, exact cover."""
    count = -(-total // WINDOW_FRAMES)
    bounds = [total * part // count for part in range(count + 1)]
    return [(start, end, max(0, start - CONTEXT_FRAMES), min(total, end + CONTEXT_FRAMES)) for start, end in pairwise(bounds)]
