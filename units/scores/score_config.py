"""The config of the verb `score`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pretrain.config import Config, PathStr, Seed, Split
from units.lm.training import LossOn
from units.scores.suites import GOLD_NEEDED, SuiteName


class ScoreConfig(Config):
    """Score one split of a unit corpus, or a suite of minimal pairs, with a trained unit language model."""

    corpus: PathStr
    lm: PathStr
    out: PathStr
    split: Split = Field(
        "test", description='whose likelihood is told ("": of all); a suite names its documents itself'
    )
    suite: SuiteName | None = Field(None, description="minimal pairs instead")
    gold: PathStr | None = Field(
        None,
        description="the suite's file, or for tstorycloze and salmon its folder (default: the ids say it)",
    )
    by: Literal["mean", "sum"] = Field(
        "mean", description="what pairs are compared by: log likelihood per token or of the whole"
    )
    score_on: LossOn | None = Field(
        None, description="of a corpus with text: which symbols count; by default those that were learnt"
    )
    train_corpus: PathStr | None = Field(
        None, description="for the floors; by default where the model's config found it"
    )
    floor_tokens: int = Field(
        50_000_000,
        ge=1,
        description="the floors are estimated on about so many training tokens, of all streams, at most",
    )
    bootstrap: int = Field(1000, ge=100, description="draws behind the 95 % intervals")
    seed: Seed = Field(
        0, description="of these draws, and of the documents for the floors if there are too many"
    )
    batch_tokens: int = Field(8192, ge=1)
    device: str = "auto"

    @model_validator(mode="after")
    def _gold_and_suite(self) -> Self:
        if self.gold is not None and self.suite is None:
            raise ValueError("`gold` goes with a `suite`")
        if self.suite in GOLD_NEEDED and self.gold is None:
            raise ValueError(
                f'suite = "{self.suite}" needs `gold`, the file that says which recordings make a pair'
            )
        return self
