"""The encoder's settings: sizes, normalisation, dropout, streaming; and the named architectures.

`base` and `large` are the published architectures (wav2vec 2.0: arXiv 2006.11477, section 4; HuBERT: arXiv
2106.07447, table I), `xlarge` is HuBERT's. `small` and `tiny` run on a CPU.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pretrain.config import Config

FRAME_MS = 20.0
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]

LayerConvention = Literal["residual", "feed_forward"]
"""What the features of a layer are.

"residual" is its output, after the residual and in post-norm models the norm (fairseq's `output_layer`;
HuBERT's and wav2vec 2.0's units); "feed_forward" is what its feed-forward adds to the residual (data2vec's
and DinoSR's targets).
"""

_LARGE: dict[str, Any] = {
    "num_heads": 16,
    "norm_first": True,
    "conv_norm": "layer",
    "normalize_waveform": True,
    "feature_gradient_scale": 1.0,
    "input_dropout": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "layer_drop": 0.0,
}
_CPU: dict[str, Any] = {
    "norm_first": True,
    "conv_norm": "layer",
    "front_end": "filterbank",
    "attention_dropout": 0.0,
    "layer_drop": 0.0,
}
_SMALL = {"dim": 256, "num_layers": 4, "num_heads": 4, "ffn_dim": 1024, "conv_dim": 128}
_TINY = {"dim": 64, "num_layers": 2, "num_heads": 2, "ffn_dim": 128, "conv_dim": 32}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "base": {"dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072},
    "large": {**_LARGE, "dim": 1024, "num_layers": 24, "ffn_dim": 4096},
    "xlarge": {**_LARGE, "dim": 1280, "num_layers": 48, "ffn_dim": 5120},
    "small": {**_CPU, **_SMALL, "pos_kernel": 32, "pos_groups": 8},
    "tiny": {**_CPU, **_TINY, "pos_kernel": 16, "pos_groups": 4},
}


class StreamingConfig(Config):
    """What of an utterance an encoder sees at a time, in frames of 20 ms."""

    chunk_frames: int = Field(gt=0, description="computed together")
    look_ahead_frames: int = Field(0, ge=0, description="beyond a chunk's end that it may see")
    left_chunks: int | None = Field(
        None, ge=0, description="before a chunk that it attends; all when not given, and memory grows"
    )

    def latency_ms(self, tail: int) -> dict[str, float]:
        """Algorithmic latency, the worst and the mean over a chunk's frames.

        It is the time from a frame's first sample to the last sample that the frame's output needs.
        `tail` is the number of samples that the front end needs beyond the last hop.
        """
        rest = self.look_ahead_frames * FRAME_MS + tail / 16
        worst, mean = self.chunk_frames * FRAME_MS, (self.chunk_frames + 1) / 2 * FRAME_MS
        return {"worst": worst + rest, "mean": mean + rest}


class EncoderConfig(Config):
    """`architecture` fills every key that is not given; the defaults are wav2vec 2.0 / HuBERT BASE.

    Released wav2vec 2.0 LARGE models have `conv_bias = true`, HuBERT LARGE models do not.
    """

    architecture: Literal["base", "large", "xlarge", "small", "tiny"] = "base"
    front_end: Literal["waveform", "filterbank", "units"] = "waveform"
    conv_dim: Positive = 512
    conv_norm: Literal["group", "layer"] = "group"
    conv_bias: bool = False
    num_units: int | None = Field(
        None, gt=0, description="of the front end of units: discrete labels in place of audio"
    )
    num_mels: int = Field(80, gt=0, description="of the filterbank front end; two frames are stacked")
    warp: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="of the filterbank: in training frequencies are stretched at random, by up to this share"
        " (VTLP)",
    )
    normalize_waveform: bool = Field(
        False, description="zero mean and unit variance over the utterance as cropped (LARGE)"
    )
    dim: Positive = 768
    num_layers: Positive = 12
    num_heads: Positive = 12
    ffn_dim: Positive = 3072
    norm_first: bool = False
    pos_kernel: Positive = 128
    pos_groups: Positive = 16
    input_dropout: Rate = 0.1
    dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    activation_dropout: Rate = 0.0
    layer_drop: Rate = 0.05
    feature_gradient_scale: float = Field(0.1, ge=0, description="multiplies the front end's gradient")
    streaming: StreamingConfig | None = Field(
        None, description="work in chunks with a bounded look-ahead (pretrain/model/streaming.py)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_architecture(cls, given: Any) -> Any:
        if isinstance(given, dict):
            name = given.get("architecture", "base")
            return {**(ARCHITECTURES.get(name, {}) if isinstance(name, str) else {}), **given}
        return given

    @model_validator(mode="after")
    def _check_keys_against_each_other(self) -> "EncoderConfig":
        for name, divisor in (("num_heads", self.num_heads), ("pos_groups", self.pos_groups)):
            if self.dim % divisor:
                raise ValueError(f"dim {self.dim} is not a multiple of {name} {divisor}")
        other = f"; front_end is {self.front_end!r}"
        if (self.num_units is None) == (self.front_end == "units"):
            raise ValueError(f'num_units goes with front_end = "units" and with no other{other}')
        if self.warp and self.front_end != "filterbank":
            raise ValueError(f"warp is of the filterbank front end{other}")
        if self.conv_bias and self.conv_norm == "group":
            raise ValueError(
                'conv_bias has no effect before the group norm; it goes with conv_norm = "layer"'
            )
        return self
