"""The verb `sample`: continue unit sequences with a unit language model, in batches, with a cache of keys and values.

Continuation i draws its random numbers from (seed, i) alone, so it does not depend on the batch it is made in.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pretrain.artefact import atomic_path, commit, require_absent
from pretrain.config import Config
from pretrain.progress import progress
from units.corpus import UnitCorpus
from units.language_model import load_language_model
from units.model import Cache, Decoder


class SampleConfig(Config):
    """Continue `num` prompts: the first `prompt_units` units of one utterance, or of documents drawn from a split."""

    lm: str
    corpus: str
    out: str
    utterance: str | None = Field(None, description="id of the document that prompts; by default documents drawn from `split`")
    split: str | None = "test"
    prompt_units: int = Field(25, ge=0, description="0: begin at BOS")
    num: int = Field(4, ge=1)
    max_units: int = Field(200, ge=1)
    temperature: float = Field(1.0, ge=0, description="0: always the likeliest unit")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest; 0: from all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the fewest likeliest that hold this probability")
    batch_size: int = Field(16, ge=1)
    seed: int = 0
    device: str = "auto"


class Continuation(NamedTuple):
    """One sampled continuation."""

    units: list[int]  # without EOS
    log_likelihood: float  # natural log, of the units and EOS if drawn, under the model itself (temperature 1, nothing cut off)
    finished: bool  # ended by EOS rather than by max_units


def sample(config: SampleConfig) -> dict[str, Any]:
    """Write `samples.jsonl`: a line per continuation with `document`, `prompt`, `continuation`, `log_likelihood`, `finished`."""
    require_absent(config.out)
    corpus = UnitCorpus(config.corpus)
    decoder, _, fingerprint = load_language_model(config.lm, corpus, config.device)
    prompts = _prompts(config, corpus, decoder.config.context)
    lines = []
    with progress("sample", config.num, "continuation") as advance:
        for start in range(0, config.num, config.batch_size):
            chosen = prompts[start : start + config.batch_size]
            symbols = np.stack([corpus.sequence(i, 0, config.prompt_units + 1) for i in chosen])
            draws = np.stack([np.random.default_rng([config.seed, start + n]).random(config.max_units) for n in range(len(chosen))])
            made = generate(decoder, symbols, draws, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
            for document, prompt, continuation in zip(chosen, symbols[:, 1:].tolist(), made, strict=True):
                lines.append({
                    "document": corpus.ids[document], "prompt": prompt, "continuation": continuation.units,
                    "log_likelihood": continuation.log_likelihood, "finished": continuation.finished,
                })  # fmt: skip
            advance(len(chosen))
    out = Path(config.out)
    with atomic_path(out / "samples.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    commit(out, "samples", config.resolved(), {"corpus": corpus.fingerprint, "lm": fingerprint}, ["samples.jsonl"])
    lengths = [len(line["continuation"]) for line in lines]
    return {"num": len(lines), "finished": sum(line["finished"] for line in lines), "mean_units": float(np.mean(lengths))}


def _prompts(config: SampleConfig, corpus: UnitCorpus, context: int) -> np.ndarray:
    """Document numbers of the `num` prompts."""
    if 1 + config.prompt_units + config.max_units > context:
        raise ValueError(
            f"a prompt of BOS and {config.prompt_units} units (prompt_units) with {config.max_units} more (max_units) does not fit "
            f"the {context} tokens of context of {config.lm}; prompt_units + max_units must be at most {context - 1}"
        )
    if config.utterance is not None:
        document = corpus.index(config.utterance)
        if corpus.lengths[document] < config.prompt_units:
            raise ValueError(
                f"{config.corpus}: document {config.utterance!r} has {corpus.lengths[document]} units, "
                f"fewer than prompt_units {config.prompt_units}"
            )
        return np.full(config.num, document)
    documents = corpus.documents(config.split)
    long_enough = documents[corpus.lengths[documents] >= config.prompt_units]
    if not len(long_enough):
        longest = corpus.lengths[documents].max()
        raise ValueError(
            f"{config.corpus}: no document of split {config.split!r} has prompt_units {config.prompt_units} units; "
            f"the longest has {longest}"
        )
    order = np.random.default_rng(config.seed).permutation(long_enough)
    return np.resize(order, config.num)


@torch.inference_mode()
def generate(
    decoder: Decoder, prompts: np.ndarray, draws: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[Continuation]:
    """Continue `prompts` int64 (batch, time), each beginning with BOS, by up to draws.shape[1] units.

    `draws` (batch, max_units) are uniform numbers in [0, 1): step t of row b takes the unit where the cumulative probability,
    likeliest first, passes draws[b, t]. The vocabulary's last two symbols are BOS, which is never drawn, and EOS, which ends a row.
    """
    device = decoder.embed_tokens.weight.device
    bos, eos = decoder.vocabulary_size - 2, decoder.vocabulary_size - 1
    batch, length = prompts.shape
    cache = Cache(decoder, batch, length + draws.shape[1])
    tokens, uniform = torch.from_numpy(prompts).to(device), torch.from_numpy(draws).to(device)
    drawn: list[Tensor] = []
    log_probabilities: list[Tensor] = []
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    for step in range(draws.shape[1]):
        positions = torch.arange(cache.length, cache.length + tokens.shape[1], device=device).expand(batch, -1)
        logits = decoder.logits(decoder.hidden(tokens, positions, cache=cache)[:, -1]).double()
        logits[:, bos] = -torch.inf
        chosen = pick(logits, uniform[:, step], temperature, top_k, top_p)
        chosen = torch.where(ended, eos, chosen)
        drawn.append(chosen)
        log_probabilities.append(torch.where(ended, 0.0, logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]))
        ended |= chosen == eos
        if ended.all():
            break
        tokens = chosen[:, None]
    rows = torch.stack(drawn, dim=1).tolist()
    sums = torch.stack(log_probabilities, dim=1).sum(1).tolist()
    continuations = []
    for row, total in zip(rows, sums, strict=True):
        finished = eos in row
        continuations.append(Continuation(row[: row.index(eos)] if finished else row, total, finished))
    return continuations


def pick(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One symbol per row, (batch,), from logits (batch, vocabulary): the cumulative distribution inverted at `uniform` (batch,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        probabilities[:, top_k:] = 0
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < top_p * probabilities.sum(-1, keepdim=True), probabilities, 0)
    cumulative = probabilities.cumsum(-1)
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    chosen: Tensor = order.gather(1, place[:, None])[:, 0]
    return chosen
