"""The verb `transcribe`: greedy CTC decoding, and WER and CER where there are transcripts."""

import time
from pathlib import Path
from typing import Any

import jiwer
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pretrain.artefact import atomic_path, commit, require_absent, write_json
from pretrain.audio import SAMPLE_RATE, load_audio
from pretrain.batches import BatchConfig, SpeechBatches
from pretrain.config import Config
from pretrain.ctc import CTCBatch, load_recognizer
from pretrain.manifest import Manifest
from pretrain.packing import pack
from pretrain.progress import progress


class TranscribeConfig(Config):
    """What is transcribed with which recogniser."""

    out: str
    manifest: str
    split: str | None = "test"
    recognizer: str
    batch_seconds: float = 60.0
    device: str = "auto"


@torch.inference_mode()
def transcribe(config: TranscribeConfig) -> dict[str, Any]:
    """Write `transcripts.parquet` (id, speaker, text, hypothesis); returns WER and CER over the rows with a transcript.

    WER and CER are edits over reference words and characters, summed over the corpus (jiwer), after the recogniser's own text
    normalisation on both sides.
    """
    require_absent(config.out)
    manifest = Manifest(config.manifest).select(config.split)
    model, vocabulary, text, fingerprint = load_recognizer(config.recognizer)
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu"))
    model.to(device)
    batches = SpeechBatches(
        manifest, BatchConfig(batch_seconds=config.batch_seconds, crop_seconds=1e9, min_seconds=0.025), 0, crop=False
    )
    hypotheses = {}
    began = time.monotonic()
    with progress("transcribe", batches.seconds(batches.items), "s audio") as advance:
        for items in batches.plan_in_order():
            waveforms = [load_audio(manifest[item]) for item in items.tolist()]
            buffer, layout = pack(waveforms)
            batch = CTCBatch(buffer.to(device), layout, torch.zeros(0), (), None, None)
            paths = model.logits(batch).argmax(2).cpu().numpy()
            for item, path, frames in zip(items.tolist(), paths, layout.num_frames, strict=True):
                hypotheses[item] = text.normalize(vocabulary.decode(path[:frames]))
            advance(batches.seconds(items))
    seconds = time.monotonic() - began
    rows = [manifest[item] for item in sorted(hypotheses)]
    said = [hypotheses[item] for item in sorted(hypotheses)]
    references = [text.normalize(row.text) if row.text else None for row in rows]
    summary: dict[str, Any] = {
        "utterances": len(rows),
        "audio_seconds_per_second": float(manifest.lengths.sum()) / SAMPLE_RATE / seconds,
    }
    pairs = [(reference, hypothesis) for reference, hypothesis in zip(references, said, strict=True) if reference]
    if pairs:
        wanted, got = map(list, zip(*pairs, strict=True))
        summary |= {"wer": jiwer.wer(wanted, got), "cer": jiwer.cer(wanted, got), "scored_utterances": len(pairs)}
        summary["reference_words"] = sum(len(reference.split()) for reference in wanted)
    folder = Path(config.out)
    table = {"id": [r.id for r in rows], "speaker": [r.speaker for r in rows], "text": references, "hypothesis": said}
    with atomic_path(folder / "transcripts.parquet") as temporary:
        pq.write_table(pa.table(table), temporary)
    write_json(folder / "summary.json", summary)
    parents = {"manifest": manifest.fingerprint, "recognizer": fingerprint}
    commit(folder, "transcripts", config.resolved(), parents, ["transcripts.parquet", "summary.json"])
    return summary
