"""The verb `sample`: continue unit sequences, or recordings, with a unit language model, in batches, with
keys and values kept.

Continuation i draws its random numbers from (seed, i) alone, so it does not depend on the batch it is made in
(up to rounding: products of another number of rows may differ in their last bits, below float32 by more, and
turn a draw on the border of two units).
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, PathStrs, Seed, Split
from pretrain.data.utterance import SAMPLE_RATE
from pretrain.progress import progress
from pretrain.store.artefact import commit, require_absent
from pretrain.store.disk import atomic_path
from units.corpus.patterns import Pattern
from units.corpus.sequences import Sequences
from units.corpus.unit_corpus import UnitCorpus
from units.lm.continuing import Continuation, Rules, generate
from units.lm.generation import CompactDecoder, Precision, perplexity
from units.lm.language_model import LoadedLM, load_language_model
from units.lm.prompting import Prompt, audio_prompts, corpus_prompts
from units.sound.synthesizer import Synthesizer, load_synthesizer, write_wav

HELD_OUT_DOCUMENTS = 20


class SampleConfig(Config):
    """Continue `num` prompts: beginnings of a corpus's documents, or recordings."""

    lm: PathStr
    out: PathStr
    corpus: PathStr | None = Field(None, description="whose documents prompt; with `prompt_audio` not needed")
    utterance: str | None = Field(
        None, description="id of the document that prompts; by default documents drawn from `split`"
    )
    split: Split = "test"
    prompt_units: int | None = Field(
        None,
        ge=0,
        description=(
            "steps of a document that prompt, the first, 25 by default; of a recording all by default. 0: "
            "begin at BOS"
        ),
    )
    prompt_audio: PathStrs | None = Field(
        None, description="recordings that prompt, in turn, in place of documents"
    )
    codebook: PathStr | None = Field(
        None, description="of `prompt_audio`: the codebook whose units the model learned"
    )
    encoder: PathStr | None = Field(
        None, description="of `prompt_audio`: the run folder whose features the codebook was fitted on"
    )
    num: int = Field(4, ge=1)
    max_units: int = Field(200, ge=1, description="steps that are added at most; with unit BPE, merged units")
    min_units: int = Field(0, ge=0, description="steps that are added at least: EOS is not drawn before")
    stop_units: list[int] = Field(
        [],
        description="the continuation ends before any of these, or the merged unit that holds it; of several "
        "levels, those of the first",
    )
    sliding: bool = Field(
        False, description="go on beyond the context, seeing its last steps; otherwise that is an error"
    )
    temperature: float = Field(1.0, ge=0, description="0: always the likeliest unit")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest; 0: from all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the fewest likeliest that hold this probability"
    )
    precision: Precision = Field(
        "float32",
        description=(
            "of the matrix products, int8 on a CPU only; with another, the summary has the perplexity of both"
        ),
    )
    synthesizer: PathStr | None = Field(None, description="a run of train-synthesizer, which speaks `audio`")
    audio: PathStr | None = Field(
        None, description="a WAV file to write: prompts with their continuations, one after the other"
    )
    batch_size: int = Field(16, ge=1)
    seed: Seed = 0
    device: str = "auto"

    @property
    def recordings(self) -> list[str]:
        return [self.prompt_audio] if isinstance(self.prompt_audio, str) else self.prompt_audio or []

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> Self:
        if self.audio is not None and self.synthesizer is None:
            raise ValueError("audio: needs the `synthesizer` that speaks the units (verb train-synthesizer)")
        if self.min_units > self.max_units:
            raise ValueError(f"min_units {self.min_units} is more than max_units {self.max_units}")
        if self.prompt_audio is None:
            if self.corpus is None:
                raise ValueError("give the `corpus` whose documents prompt, or `prompt_audio`")
            if given := [name for name in ("codebook", "encoder") if getattr(self, name) is not None]:
                raise ValueError(
                    f"{', '.join(given)}: of `prompt_audio` only; documents of a corpus are units already"
                )
            return self
        if not self.recordings:
            raise ValueError("prompt_audio: no recordings are listed")
        if self.codebook is None:
            raise ValueError("prompt_audio: needs the `codebook` that makes units of it")
        if self.utterance is not None:
            raise ValueError("utterance: a document of the corpus prompts, or `prompt_audio`, not both")
        if self.num < len(self.recordings):
            raise ValueError(
                f"num {self.num}: fewer than the {len(self.recordings)} recordings of prompt_audio"
            )
        return self


def sample(config: SampleConfig) -> dict[str, Any]:
    """Write `samples.jsonl`, a line for each continuation.

    `document`, `prompt` and `continuation` (units, merges undone; of several levels a list for each step),
    `log_likelihood`, `finished` (by EOS) and `ended_by`.
    """
    require_absent(config.out)
    corpus = None if config.corpus is None else UnitCorpus(config.corpus)
    lm = load_language_model(config.lm, corpus, config.device)
    device = lm.decoder.embed_tokens.weight.device
    model = CompactDecoder(
        lm.decoder, config.precision, window=lm.decoder.config.context if config.sliding else None
    )
    prompts = _prompts(config, lm, corpus, device.type)
    rules = Rules(
        config.max_units,
        config.min_units,
        _stop_symbols(config, lm),
        config.temperature,
        config.top_k,
        config.top_p,
    )
    _require_room(config, lm, prompts)
    voice = _voice(config, lm)
    lines: list[dict[str, Any]] = []
    steps, began = 0, time.monotonic()
    with progress("sample", config.num, "continuation") as advance:
        for start in range(0, config.num, config.batch_size):
            chosen = prompts[start : start + config.batch_size]
            seeds = [[config.seed, start + n] for n in range(len(chosen))]
            made = generate(model, lm.pattern, [prompt.codes for prompt in chosen], seeds, rules)
            lines += [_line(lm, *pair) for pair in zip(chosen, made, strict=True)]
            steps += sum(len(continuation.codes) for continuation in made)
            advance(len(chosen))
    seconds = time.monotonic() - began
    out = Path(config.out)
    with atomic_path(out / "samples.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if voice is not None and config.audio is not None:
        _write_audio(Path(config.audio), voice, lines, lm.meta["deduplicated"])
    parents = {"lm": lm.fingerprint} | ({} if corpus is None else {"corpus": corpus.fingerprint})
    parents |= {"codebook": lm.meta["codebook"]} if config.recordings else {}
    parents |= {} if voice is None else {"synthesizer": voice.fingerprint}
    described = {name: lm.meta[name] for name in ("codebook", "deduplicated", "frame_rate_hz")}
    commit(out, "samples", config.resolved(), parents, ["samples.jsonl"], **described)
    return {
        "num": len(lines),
        "finished": sum(line["finished"] for line in lines),
        "mean_units": float(np.mean([len(line["continuation"]) for line in lines])),
        "steps_per_second": steps / seconds,
        **precision_cost(config, lm, corpus, model),
    }


def _line(lm: LoadedLM, prompt: Prompt, continuation: Continuation) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    return {
        "document": prompt.document,
        "prompt": lm.vocabulary.expand(prompt.codes).tolist(),
        "continuation": lm.vocabulary.expand(continuation.codes).tolist(),
        "log_likelihood": continuation.log_likelihood,
        "finished": continuation.ended_by == "eos",
        "ended_by": continuation.ended_by,
    }


def _write_audio(path: Path, voice: Synthesizer, lines: list[dict[str, Any]], deduplicated: bool) -> None:
    """All prompts with their continuations, half a second apart; nothing of a line without units."""
    pause, parts = np.zeros(SAMPLE_RATE // 2, np.float32), []
    for line in lines:
        units = np.array([*line["prompt"], *line["continuation"]])
        parts += [voice.speak(units, deduplicated=deduplicated) if len(units) else pause[:0], pause]
    write_wav(path, np.concatenate(parts))


def _voice(config: SampleConfig, lm: LoadedLM) -> Synthesizer | None:
    """Who speaks, having learned the units that the model continues; ValueError for an `audio` that cannot be
    written."""
    if config.audio is None or config.synthesizer is None:
        return None
    if lm.vocabulary.layout != "units":
        raise ValueError(f"audio: {config.lm} mixes text with units; samples of units alone can be spoken")
    voice = load_synthesizer(config.synthesizer)
    learned = {
        "codebook": lm.meta["codebook"],
        "num_units": lm.vocabulary.num_units,
        "num_levels": lm.vocabulary.num_levels,
    }
    voice.require_units(learned, config.lm)
    path = Path(config.audio)
    if path.exists():
        raise ValueError(f"audio: {path} exists already; remove it or choose another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"audio: {path.parent} cannot be made: {error}") from None
    return voice


def _prompts(config: SampleConfig, lm: LoadedLM, corpus: UnitCorpus | None, device: str) -> list[Prompt]:
    """The `num` prompts."""
    if config.prompt_audio is None:
        assert corpus is not None
        length = 25 if config.prompt_units is None else config.prompt_units
        return corpus_prompts(corpus, config.split, config.utterance, length, config.num, config.seed)
    assert config.codebook is not None
    found = audio_prompts(config.recordings, lm, config.codebook, config.encoder, device, config.prompt_units)
    return [found[number % len(found)] for number in range(config.num)]


def _require_room(config: SampleConfig, lm: LoadedLM, prompts: Sequence[Prompt]) -> None:
    """ValueError for a prompt that does not fit the context together with what is to follow."""
    longest, context = max(prompts, key=lambda prompt: len(prompt.codes)), lm.decoder.config.context
    length = len(longest.codes)
    begun, steps = int(lm.pattern.prefix_length(length)), _steps_read(lm.pattern, length, config.max_units)
    hint = "" if lm.pattern.length(1) == 3 else f", under the pattern {lm.pattern.name}"
    if begun > context and not config.sliding:
        raise ValueError(
            f"the prompt {longest.document!r} has {length} units, {begun} tokens with BOS{hint}, and "
            f"{config.lm} has {context} tokens of context; prompt with fewer (prompt_units), or set sliding "
            "= true"
        )
    if steps > context and not config.sliding:
        raise ValueError(
            f"a prompt of BOS and {length} units (prompt_units) with {config.max_units} more (max_units) "
            f"takes {steps} tokens{hint}, which does not fit the {context} tokens of context of {config.lm}; "
            "lower one of them, or set sliding = true"
        )


def _steps_read(pattern: Pattern, prompt: int, more: int) -> int:
    """The longest input that continuing a prompt of `prompt` codes by `more` takes: the last symbol is drawn,
    and not read."""
    return prompt + more if pattern.num_levels == 1 else int(pattern.length(prompt + more)) - 1


def _stop_symbols(config: SampleConfig, lm: LoadedLM) -> set[int]:
    """The symbols of stream 0 that stand for, or hold, a stop unit."""
    vocabulary = lm.vocabulary
    limit = vocabulary.num_units if vocabulary.layout == "units" else vocabulary.sizes[0]
    if wrong := [unit for unit in config.stop_units if not 0 <= unit < limit]:
        raise ValueError(f"stop_units: {wrong[0]} is no unit of {config.lm}, which has 0 .. {limit - 1}")
    if not config.stop_units:
        return set()
    symbols = np.arange(vocabulary.sizes[0])
    return {
        int(symbol)
        for symbol in symbols
        if np.isin(vocabulary.expand(symbols[symbol : symbol + 1]), config.stop_units).any()
    }


def precision_cost(
    config: SampleConfig, lm: LoadedLM, corpus: UnitCorpus | None, model: CompactDecoder
) -> dict[str, Any]:
    """With a precision below float32: the perplexity of some held-out documents in both, each cut to the
    context, with a note."""
    if config.precision == "float32":
        return {}
    corpus = corpus or _training_corpus(lm)
    if corpus is None:
        return {
            "notes": [f"precision {config.precision}: its cost in perplexity is not known without a `corpus`"]
        }
    split = config.split if corpus.has_split(config.split) else None
    documents = np.random.default_rng(0).permutation(corpus.documents(split))[:HELD_OUT_DOCUMENTS]
    sequences = list(Sequences(corpus, documents, lm.pattern))
    exact = perplexity(*CompactDecoder(lm.decoder).log_likelihoods(lm.pattern, sequences))
    quick = perplexity(*model.log_likelihoods(lm.pattern, sequences))
    note = (
        f"precision {config.precision}: perplexity {quick:.4f} against {exact:.4f} in float32, on "
        f"{len(documents)} documents of split {split!r}"
    )
    return {"perplexity": quick, "perplexity_float32": exact, "notes": [note]}


def _training_corpus(lm: LoadedLM) -> UnitCorpus | None:
    """The corpus that the model was trained on, where it still stands."""
    folder = lm.meta.get("corpus_folder")
    try:
        corpus = None if folder is None else UnitCorpus(folder)
    except ValueError:
        return None
    return corpus if corpus is not None and corpus.fingerprint == lm.meta.get("corpus") else None
