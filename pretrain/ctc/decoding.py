"""From log probabilities to texts: the best path, or beam search with a lexicon and an n-gram language model.

Beam search gives a text `score = ln P(text) + lm_weight * log10 P_lm(words) + word_score * number of words`,
where P(text) is CTC's sum over all alignments (Graves et al., 2006) as far as the beam keeps them. These are
the weights of fairseq, flashlight and torchaudio, so published ones can be used: wav2vec 2.0 BASE with
LibriSpeech's 4-gram took 3.23 and -0.26 after ten minutes of labels, 2.15 and -0.52 after 100 hours (arXiv
2006.11477, appendix C). flashlight-text searches, with KenLM inside; where nothing separates words (phones,
tokenizers) `prefix_search` does.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from pretrain.config import Config, PathStr
from pretrain.ctc.lexicon import (
    MISSING_LIBRARY,
    LanguageModel,
    Lexicon,
    arpa_words,
    is_binary,
    lexicon_of,
    read_lexicon,
)
from pretrain.ctc.prefix_search import Node, prefix_search
from pretrain.ctc.text import TextConfig
from pretrain.ctc.vocabulary import BLANK, Vocabulary, collapse

# In place of ln 0: the search compares sums of scores, and differences of infinities are no numbers.
IMPOSSIBLE = -1e9
# flashlight's tree holds no more of one spelling, and says so on standard error alone
MAX_WORDS_SPELLED_ALIKE = 6


class DecodingConfig(Config):
    """How texts are found. Without a lexicon and a language model beam search sums over alignments, and that
    is all."""

    method: Literal["greedy", "beam"] = Field(
        "greedy", description="greedy: the best path; beam: search, needs the extra `lm`"
    )
    lm: PathStr | None = Field(None, description="n-gram language model: ARPA, .arpa.gz or a KenLM binary")
    lm_of: Literal["words", "symbols"] = Field(
        "words", description="symbols: of the vocabulary (characters, phones, pieces)"
    )
    lexicon: PathStr | None = Field(
        None,
        description="lines `word<TAB>w o r d |`; by default the words of an ARPA, spelled as transcripts are",
    )
    lm_weight: float = Field(2.0, ge=0, description="of log10 probabilities, as published weights are")
    word_score: float = Field(-1.0, description="added for each word; with a lexicon")
    silence_score: float = Field(0.0, description="added for each frame of the space between words")
    beam_size: int = Field(500, ge=1)
    beam_tokens: int | None = Field(
        None, ge=1, description="symbols tried in each frame, the likeliest; all by default"
    )
    beam_threshold: float = Field(25.0, gt=0, description="what scores less than the best by more is dropped")
    nbest: int = Field(1, ge=1, description="texts given for each utterance, at most")
    processes: int = Field(
        1, ge=1, description="more than one search beside the encoder, each with its own language model"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.method == "greedy" and (self.lm or self.lexicon or self.nbest > 1):
            raise ValueError(
                'a language model, a lexicon and nbest are for beam search; give method = "beam"'
            )
        if self.lm_of == "symbols" and (self.lm is None or self.lexicon is not None):
            raise ValueError('lm_of = "symbols" needs an `lm` of symbols, and no lexicon')
        if self.nbest > self.beam_size:
            raise ValueError(f"nbest = {self.nbest} is more than beam_size = {self.beam_size}")
        return self


class Hypothesis(NamedTuple):
    """A text. `score` is the log of the sum over its readings (words written alike, other spaces); the parts
    are of the best reading.

    `ctc_score` is a natural logarithm (what `silence_score` adds is in it), `lm_score` a log10 with the end
    of the sentence; None without a language model. `classes` spell the text. With a lexicon, `words` are its
    words and the spans [first, last) of `classes` that spell them (of several spellings the shortest);
    without one `vocabulary.words(classes)` are.
    """

    text: str
    score: float
    ctc_score: float
    lm_score: float | None
    classes: tuple[int, ...] = ()
    words: tuple[tuple[str, int, int], ...] | None = None


class Decoder:
    """Decodes one utterance at a time. `notes` say what of the lexicon could not be used.

    `writes_words`: the texts are words of a lexicon although the vocabulary's are phones.
    """

    def __init__(self, config: DecodingConfig, vocabulary: Vocabulary, text: TextConfig):
        self.config, self.vocabulary = config, vocabulary
        self.notes: list[str] = []
        self.lexicon: Lexicon | None = None
        self.lm: LanguageModel | None = None
        self.writes_words = False
        if config.method == "greedy":
            return
        if config.lexicon is not None:
            self.lexicon = read_lexicon(config.lexicon, vocabulary, text)
        known: set[str] | None = None
        if config.lm is not None and not is_binary(config.lm):
            listed = arpa_words(config.lm)
            known = set(listed)
            if config.lm_of == "words" and self.lexicon is None:
                self.lexicon = lexicon_of(listed, config.lm, vocabulary, text)
        elif config.lm is not None and config.lm_of == "words" and self.lexicon is None:
            raise ValueError(
                f"decoding.lexicon: {config.lm} is a KenLM binary, whose words cannot be listed; give a "
                "lexicon, or the ARPA it was made of"
            )
        if self.lexicon is not None:
            self._use_lexicon(self.lexicon, known)
        elif config.lm is not None:
            # Class 0, the blank, is never scored; an entry keeps the numbers those of the classes.
            self.lm = LanguageModel(config.lm, ["<blank>", *vocabulary.symbols])
            self._require_known(
                self.lm,
                [*vocabulary.symbols],
                np.arange(1, len(vocabulary)),
                known,
                "symbols of the vocabulary",
            )
        _ = self._flashlight  # which must be installed

    def _use_lexicon(self, lexicon: Lexicon, known: set[str] | None) -> None:
        if lexicon.num_left_out:
            self.notes.append(
                f"{lexicon.num_left_out} words of {lexicon.source} cannot be spelled in the vocabulary and "
                f"are never written, such as {', '.join(lexicon.examples)}"
            )
        self._words = list(dict.fromkeys(entry.word for entry in lexicon.entries))
        numbers = {word: number for number, word in enumerate(self._words)}
        texts = {entry.word: entry.text for entry in lexicon.entries}
        self._texts = [texts[word] for word in self._words]
        self._spellings: dict[int, list[int]] = {}
        for entry in sorted(lexicon.entries, key=lambda entry: len(entry.classes)):
            self._spellings.setdefault(numbers[entry.word], entry.classes.tolist())
        self.writes_words = self.vocabulary.spelling == "phones"
        if self.config.lm is not None:
            self.lm = LanguageModel(self.config.lm, self._words)
            self._require_known(
                self.lm, self._words, np.arange(len(self._words)), known, f"words of {lexicon.source}"
            )
        unigrams = np.zeros(len(self._words)) if self.lm is None else self.lm.unigrams()
        entries = [(entry.classes.tolist(), numbers[entry.word]) for entry in lexicon.entries]
        space = self.vocabulary.space
        if space is None:
            self._root = Node()
            for classes, word in entries:
                self._root.insert(classes, word, float(unigrams[word]))
            return
        decoder = self._flashlight
        self._trie = decoder.Trie(len(self.vocabulary), space)
        alike: Counter[tuple[int, ...]] = Counter()
        # a line twice would count twice
        distinct = dict.fromkeys((tuple(classes), word) for classes, word in entries)
        for spelling, word in sorted(distinct, key=lambda entry: -unigrams[entry[1]]):
            alike[spelling] += 1
            if alike[spelling] <= MAX_WORDS_SPELLED_ALIKE:
                self._trie.insert([*spelling, space], word, float(unigrams[word]))
        if dropped := sum(max(0, count - MAX_WORDS_SPELLED_ALIKE) for count in alike.values()):
            self.notes.append(
                f"{dropped} words of {lexicon.source} are spelled like {MAX_WORDS_SPELLED_ALIKE} likelier "
                "ones and are not searched for"
            )
        self._trie.smear(decoder.SmearingMode.MAX)

    def _require_known(
        self, lm: LanguageModel, names: list[str], numbers: np.ndarray, known: set[str] | None, what: str
    ) -> None:
        """Say how many of `names` the model does not know; none at all is the wrong model."""
        found = lm.knows()[numbers] if known is None else np.array([name in known for name in names])
        strange = [name for name, is_known in zip(names, found.tolist(), strict=True) if not is_known]
        shown = ", ".join(map(repr, strange[:5]))
        if len(strange) == len(names):
            raise ValueError(
                f"decoding.lm: {lm.path} knows none of the {len(names)} {what}, such as {shown}; is it of "
                "another language or case?"
            )
        if strange:
            self.notes.append(
                f"{len(strange)} {what} are not in {lm.path} and score as <unk>, such as {shown}"
            )

    @cached_property
    def _flashlight(self) -> Any:
        try:
            from flashlight.lib.text import decoder
        except ImportError:
            raise ValueError(MISSING_LIBRARY) from None
        return decoder

    def with_weights(self, lm_weight: float, word_score: float) -> "Decoder":
        """The same search, model and lexicon with other weights."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"lm_weight": lm_weight, "word_score": word_score})
        return other

    def decode(self, log_probs: Tensor) -> list[Hypothesis]:
        """Texts of one utterance, (frames, classes) float32 on the CPU, the best first and `nbest` at most;
        at least one."""
        if self.config.method == "greedy":
            likeliest, path = log_probs.max(1)
            score = float(likeliest.double().sum())
            classes = collapse(path.numpy()).tolist()
            return [Hypothesis(self.vocabulary.decode(classes), score, score, None, tuple(classes))]
        emissions = np.ascontiguousarray(log_probs.numpy(), np.float32)
        emissions = np.maximum(emissions, np.float32(IMPOSSIBLE))
        if self.lexicon is None:
            readings = self._symbols(emissions)
        elif self.vocabulary.space is None:
            readings = self._words_without_space(emissions)
        else:
            readings = self._words_with_space(emissions, self.vocabulary.space)
        best = _merged(readings)[: self.config.nbest]
        if self.lexicon is None and self.lm is None:  # no part but CTC's
            best = [hypothesis._replace(ctc_score=hypothesis.score) for hypothesis in best]
        return best

    def _symbols(self, emissions: np.ndarray) -> list[Hypothesis]:
        config, decoder = self.config, self._flashlight
        options = decoder.LexiconFreeDecoderOptions(
            config.beam_size,
            self._tokens,
            config.beam_threshold,
            config.lm_weight,
            config.silence_score,
            True,
            decoder.CriterionType.CTC,
        )
        # The number of a space that there is not: no class is ever equal to it.
        space = -1 if self.vocabulary.space is None else self.vocabulary.space
        model = decoder.ZeroLM() if self.lm is None else self.lm.kenlm
        search = decoder.LexiconFreeDecoder(options, model, space, BLANK, [])
        readings = []
        for found in search.decode(emissions.ctypes.data, *emissions.shape):
            classes = collapse(np.array(found.tokens[1:-1], np.int64)).tolist()  # but the start and the end
            # To the search a space in the first frames goes on from one before the beginning, and the model
            # is not asked of it.
            asked = classes[1:] if classes and found.tokens[1] == space else classes
            lm_score = None if self.lm is None else self.lm.score(asked)
            ctc_score = found.score - config.lm_weight * (lm_score or 0.0)
            readings.append(
                Hypothesis(self.vocabulary.decode(classes), found.score, ctc_score, lm_score, tuple(classes))
            )
        return readings

    def _words_with_space(self, emissions: np.ndarray, space: int) -> list[Hypothesis]:
        config, decoder = self.config, self._flashlight
        options = decoder.LexiconDecoderOptions(
            config.beam_size,
            self._tokens,
            config.beam_threshold,
            config.lm_weight,
            config.word_score,
            -math.inf,
            config.silence_score,
            True,
            decoder.CriterionType.CTC,
        )
        # A word counts when the space behind it is heard, and transcripts do not end with one: a last frame
        # that is surely a space. Every path through the utterance's own frames that ends with a word goes on
        # through it in exactly one way, and no other does.
        after = np.full((1, emissions.shape[1]), IMPOSSIBLE, np.float32)
        after[0, space] = 0.0
        emissions = np.concatenate([emissions, after])
        model = decoder.ZeroLM() if self.lm is None else self.lm.kenlm
        search = decoder.LexiconDecoder(options, self._trie, model, space, BLANK, len(self._words), [], False)
        found = search.decode(emissions.ctypes.data, *emissions.shape)
        whole = [one for one in found if one.score > IMPOSSIBLE / 2]
        if whole:
            return [
                self._reading(tuple(w for w in one.words if w >= 0), one.score - config.silence_score)
                for one in whole
            ]
        # Every hypothesis in the beam ends inside a word: what was said before it, with the score of all.
        return [
            self._reading(
                tuple(w for w in one.words if w >= 0),
                one.score - IMPOSSIBLE - config.silence_score,
            )
            for one in found
        ]

    def _words_without_space(self, emissions: np.ndarray) -> list[Hypothesis]:
        config = self.config
        found = prefix_search(
            emissions,
            self._root,
            self.lm,
            lm_weight=config.lm_weight,
            word_score=config.word_score,
            beam_size=config.beam_size,
            beam_tokens=config.beam_tokens,
            beam_threshold=config.beam_threshold,
        )
        return [self._reading(words, score, summed=True) for words, score in found]

    def _reading(self, words: tuple[int, ...], score: float, *, summed: bool = False) -> Hypothesis:
        """Word numbers as a hypothesis, from its whole score or, where `summed`, from CTC's alone."""
        lm_score = None if self.lm is None else self.lm.score(words)
        guided = self.config.lm_weight * (lm_score or 0.0) + self.config.word_score * len(words)
        between = (
            ""
            if self.vocabulary.spelling in ("characters", "jamo") and self.vocabulary.space is None
            else " "
        )
        classes: list[int] = []
        places = []
        for word in words:
            if classes and self.vocabulary.space is not None:
                classes.append(self.vocabulary.space)
            classes += self._spellings[word]
            places.append((self._texts[word], len(classes) - len(self._spellings[word]), len(classes)))
        text = between.join(self._texts[word] for word in words)
        ctc_score, score = (score, score + guided) if summed else (score - guided, score)
        return Hypothesis(text, score, ctc_score, lm_score, tuple(classes), tuple(places))

    @property
    def _tokens(self) -> int:
        return min(self.config.beam_tokens or len(self.vocabulary), len(self.vocabulary))


def _merged(readings: Iterable[Hypothesis]) -> list[Hypothesis]:
    """One hypothesis for each text, the best first; equal scores in the order of the texts."""
    texts: dict[str, Hypothesis] = {}
    for reading in sorted(readings, key=lambda reading: -reading.score):
        best = texts.get(reading.text)
        score = reading.score if best is None else float(np.logaddexp(best.score, reading.score))
        texts[reading.text] = (best or reading)._replace(score=score)
    return sorted(texts.values(), key=lambda one: (-one.score, one.text))
