"""What a recogniser is taught to write: transcripts, normalised, or phones. For training and for scoring
alike.

A transcript becomes Unicode NFC with single spaces and without `|`, which spells the space in vocabularies.
Whatever else is configured, characters that cannot be seen go (soft hyphens, byte order marks, marks of
writing direction; the joiners of Persian, Indic scripts and emoji stay), and the apostrophes ’ ʼ ＇ become '.
Numbers, abbreviations and symbols ($, +, emoji) stay as they are: writing them out is a matter of the
language, and of tools made for it.
"""

import re
import unicodedata
from typing import Literal, Self

from pydantic import Field, model_validator

from pretrain.config import Config, PathStr
from pretrain.data.utterance import Utterance

SPACE = "|"  # how the space between words is spelled in a vocabulary

Spelling = Literal["characters", "jamo", "phones", "tokenizer"]


class TextConfig(Config):
    """What the targets are, and how transcripts are normalised. Of phones, only `silence` is looked at."""

    spelling: Spelling = Field(
        "characters", description="jamo: Hangul syllables taken apart; phones: of the manifest's alignments"
    )
    case: Literal["lower", "upper", "keep"] = Field(
        "lower", description="Unicode's, of no language: I is i in Turkish, too; ß is SS"
    )
    punctuation: Literal["remove", "keep"] = Field(
        "remove",
        description="remove: hyphens and the like part words; apostrophes that touch a word stay, and · ׳ ״ "
        "inside one",
    )
    tokenizer: PathStr | None = Field(
        None, description="with spelling = tokenizer: a Hugging Face tokenizer.json"
    )
    silence: tuple[str, ...] = Field(
        ("", "SIL", "sil", "SPN", "spn", "sp", "<eps>"), description="phones that are no targets"
    )

    @model_validator(mode="after")
    def _names_a_tokenizer_where_one_is_used(self) -> Self:
        if self.spelling == "tokenizer" and self.tokenizer is None:
            raise ValueError('spelling = "tokenizer" needs `tokenizer`, the tokenizer.json to spell with')
        if self.spelling != "tokenizer" and self.tokenizer is not None:
            raise ValueError(
                f'a tokenizer is given but spelling is {self.spelling!r}; set spelling = "tokenizer" or '
                "drop it"
            )
        return self

    @property
    def column(self) -> Literal["text", "phones"]:
        """The column of the manifest that targets come from."""
        return "phones" if self.spelling == "phones" else "text"

    def normalize(self, text: str) -> str:
        """`text` as it is trained on and scored; normalising twice changes nothing more."""
        # first: one may stand between a letter and its accent
        text = _UNSEEN.sub("", text.replace(SPACE, " "))
        # before the case, which makes a letter of Greek's iota below
        text = unicodedata.normalize("NFC", text)
        text = {"lower": text.lower(), "upper": text.upper(), "keep": text}[self.case]
        text = unicodedata.normalize("NFC", text)  # and after it, which can take characters apart
        if self.punctuation == "remove":
            text = _QUOTED.sub(r" \1 ", text)
        text = _APOSTROPHES.sub("'", text)
        if self.punctuation == "remove":
            text = _LOOSE.sub(" ", text.translate(_PUNCTUATION))
        return " ".join(text.split())

    def target(self, utterance: Utterance) -> str:
        """What the recogniser should write for `utterance`, words or phones with single spaces between; empty
        where not known."""
        if self.spelling == "phones":
            return self.join_phones([phone.phone for phone in utterance.phones or []])
        return self.normalize(utterance.text or "")

    def join_phones(self, phones: list[str]) -> str:
        """The target of an utterance of `phones`: without silences, NFC, a space between two. A space inside
        a phone becomes _."""
        return " ".join(
            "_".join(unicodedata.normalize("NFC", phone).split())
            for phone in phones
            if phone not in self.silence
        )


class _Punctuation(dict[int, str]):
    """For `str.translate`: Unicode's punctuation, but for apostrophes and what else may be of a word, to
    spaces."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        removed = unicodedata.category(character).startswith("P") and character not in _INNER
        return self.setdefault(code, " " if removed else character)


_INNER = "'·׳״"  # Catalan's l·l, Hebrew's geresh and gershayim
_WORD = rf"[^\s{_INNER}]"
_LOOSE = re.compile(rf"'(?<!{_WORD}')(?!{_WORD})|[·׳״](?:(?<!{_WORD}[·׳״])|(?!{_WORD}))")
# ‘so’: the last of them is no apostrophe; 'so' cannot be told
_QUOTED = re.compile(r"‘((?:[^‘’]|’(?=\w))*)’")
_PUNCTUATION = _Punctuation()
_APOSTROPHES = re.compile("[’ʼ＇]")
# Controls but white space, soft hyphen, marks of direction and of order, zero-width spaces.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
)
