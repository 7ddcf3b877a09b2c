"""The peers' training steps, in their own best documented settings. Nothing of ours is imported: a peer may
live in another Python."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.corpus import pad
from benchmarks.flops import CONV_KERNELS, CONV_STRIDES
from benchmarks.training_step import Peer


def transformers_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """Our sizes and dropouts under the names of transformers' wav2vec 2.0 and HuBERT."""
    return {
        "hidden_size": sizes["dim"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "intermediate_size": sizes["ffn_dim"],
        "conv_dim": (sizes["conv_dim"],) * 7,
        "conv_bias": sizes["conv_bias"],
        "num_conv_pos_embeddings": sizes["pos_kernel"],
        "num_conv_pos_embedding_groups": sizes["pos_groups"],
        "feat_extract_norm": sizes["conv_norm"],
        "do_stable_layer_norm": sizes["norm_first"],
        "feat_proj_dropout": sizes["input_dropout"],
        "hidden_dropout": sizes["dropout"],
        "layerdrop": sizes["layer_drop"],
        "attention_dropout": sizes["attention_dropout"],
        "activation_dropout": sizes["activation_dropout"],
        "feat_quantizer_dropout": 0.0,
    }


class TransformersPeer(Peer):
    """Masks drawn before the step, as its data collator does; an attention mask only where something is
    padded."""

    mask_probability: float

    def padded(self, waveforms: list[np.ndarray]) -> tuple[Tensor, Tensor | None, np.ndarray, np.ndarray]:
        """Waveforms, attention mask, valid frames and masked frames."""
        from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

        samples = np.array([len(waveform) for waveform in waveforms])
        frames = (samples - 400) // 320 + 1
        attention = np.arange(samples.max()) < samples[:, None]
        valid = np.arange(frames.max()) < frames[:, None]
        everything = bool(attention.all())
        frame_attention: Any = None if everything else torch.from_numpy(valid.astype(np.int64))
        mask = _compute_mask_indices(
            valid.shape, 10 * self.mask_probability, 10, attention_mask=frame_attention, min_masks=2
        )
        waves = torch.from_numpy(pad(waveforms))
        return waves, None if everything else torch.from_numpy(attention.astype(np.int64)), valid, mask


class TransformersWav2Vec2(TransformersPeer):
    """`Wav2Vec2ForPreTraining`. It has neither the penalty on features nor the scaled gradient of the
    convolutions."""

    mask_probability = 0.065

    def make_model(self, sizes: dict[str, Any], heads: dict[str, Any], variant: str) -> nn.Module:
        import transformers

        config = transformers.Wav2Vec2Config(
            **transformers_config(sizes),
            num_negatives=heads["num_distractors"],
            num_codevectors_per_group=heads["num_entries"],
            num_codevector_groups=heads["num_groups"],
            codevector_dim=heads["code_dim"],
            proj_codevector_dim=heads["final_dim"],
            diversity_loss_weight=heads["diversity_weight"],
            contrastive_logits_temperature=heads["temperature"],
        )
        config._attn_implementation = variant
        model: nn.Module = transformers.Wav2Vec2ForPreTraining(config)
        return model

    def make_batch(self, waveforms: list[np.ndarray], labels: list[np.ndarray]) -> tuple[Any, ...]:
        from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices

        waves, attention, _, mask = self.padded(waveforms)
        negatives = _sample_negative_indices(
            mask.shape, self.settings["heads"]["num_distractors"], mask_time_indices=mask
        )
        return waves, attention, torch.from_numpy(mask), torch.from_numpy(negatives), int(mask.sum())

    def loss(self, *batch: Any) -> Tensor:
        waves, attention, mask, negatives, count = batch
        out = self.called(
            waves, attention_mask=attention, mask_time_indices=mask, sampled_negative_indices=negatives
        )
        loss: Tensor = out.loss / count
        return loss


class HubertWithHead(nn.Module):
    """transformers has no HuBERT pretraining: its HubertModel with the paper's loss as one normalised matrix
    product."""

    def __init__(self, body: nn.Module, dim: int, final_dim: int, num_classes: int):
        super().__init__()
        self.body, self.project = body, nn.Linear(dim, final_dim)
        self.class_embeddings = nn.Parameter(torch.randn(num_classes, final_dim))

    def forward(self, waves: Tensor, attention: Tensor | None, mask: Tensor, labels: Tensor) -> Tensor:
        kept: list[Tensor] = []
        convolutions: Any = self.body.feature_extractor
        hook = convolutions.register_forward_hook(lambda _, __, out: kept.append(out))
        # (masked, dim)
        x = self.body(waves, attention_mask=attention, mask_time_indices=mask).last_hidden_state[mask]
        hook.remove()
        query = F.normalize(self.project(x).float(), dim=1)
        logits = query @ F.normalize(self.class_embeddings.float(), dim=1).T / 0.1
        return F.cross_entropy(logits, labels[mask]) + 10 * kept[0].float().square().mean()


class TransformersHubert(TransformersPeer):
    """`HubertModel` with the usual head on the masked frames."""

    mask_probability = 0.08

    def make_model(self, sizes: dict[str, Any], heads: dict[str, Any], variant: str) -> nn.Module:
        import transformers

        config = transformers.HubertConfig(
            **{k: v for k, v in transformers_config(sizes).items() if k != "feat_quantizer_dropout"}
        )
        config._attn_implementation = variant
        return HubertWithHead(
            transformers.HubertModel(config), sizes["dim"], heads["final_dim"], self.settings["num_classes"]
        )

    def make_batch(self, waveforms: list[np.ndarray], labels: list[np.ndarray]) -> tuple[Any, ...]:
        waves, attention, valid, mask = self.padded(waveforms)
        return waves, attention, torch.from_numpy(mask & valid), torch.from_numpy(pad(labels))

    def loss(self, *batch: Any) -> Tensor:
        loss: Tensor = self.called(*batch)
        return loss


def conv_layers(sizes: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each convolution, as torchaudio and fairseq2 take them."""
    return [
        (sizes["conv_dim"], kernel, stride) for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True)
    ]


def torchaudio_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """Our sizes and dropouts under the names of torchaudio's wav2vec 2.0 and HuBERT."""
    return {
        "extractor_mode": "group_norm" if sizes["conv_norm"] == "group" else "layer_norm",
        "extractor_conv_layer_config": conv_layers(sizes),
        "extractor_conv_bias": sizes["conv_bias"],
        "encoder_embed_dim": sizes["dim"],
        "encoder_projection_dropout": sizes["input_dropout"],
        "encoder_pos_conv_kernel": sizes["pos_kernel"],
        "encoder_pos_conv_groups": sizes["pos_groups"],
        "encoder_num_layers": sizes["num_layers"],
        "encoder_num_heads": sizes["num_heads"],
        "encoder_attention_dropout": sizes["attention_dropout"],
        "encoder_ff_interm_features": sizes["ffn_dim"],
        "encoder_ff_interm_dropout": sizes["activation_dropout"],
        "encoder_dropout": sizes["dropout"],
        "encoder_layer_norm_first": sizes["norm_first"],
        "encoder_layer_drop": sizes["layer_drop"],
    }


class TorchaudioHubert(Peer):
    """`hubert_pretrain_model` with the loss of its recipe. It draws masks in its forward; the logits of
    unmasked frames, which the recipe weighs with 0, are skipped."""

    def make_model(self, sizes: dict[str, Any], heads: dict[str, Any], variant: str) -> nn.Module:
        from torchaudio.models import hubert_pretrain_model

        scale = sizes["feature_gradient_scale"]
        model: nn.Module = hubert_pretrain_model(
            **torchaudio_config(sizes),
            mask_prob=0.8,
            mask_selection="static",
            mask_other=0.0,
            mask_length=10,
            no_mask_overlap=False,
            mask_min_space=1,
            mask_channel_prob=0.0,
            mask_channel_selection="static",
            mask_channel_other=0.0,
            mask_channel_length=10,
            no_mask_channel_overlap=False,
            mask_channel_min_space=1,
            skip_masked=False,
            skip_nomask=True,
            num_classes=self.settings["num_classes"],
            final_dim=heads["final_dim"],
            feature_grad_mult=scale if scale < 1 else None,
        )
        return model

    def make_batch(self, waveforms: list[np.ndarray], labels: list[np.ndarray]) -> tuple[Any, ...]:
        lengths = [len(waveform) for waveform in waveforms]
        same = min(lengths) == max(lengths)
        return (
            torch.from_numpy(pad(waveforms)),
            torch.from_numpy(pad(labels)),
            None if same else torch.tensor(lengths),
        )

    def loss(self, *batch: Any) -> Tensor:
        logits, _, penalty = self.called(*batch)
        loss: Tensor = (
            F.cross_entropy(logits.float(), logits.new_zeros(len(logits), dtype=torch.long)) + 10 * penalty
        )
        return loss


class Fairseq2Wav2Vec2(Peer):
    """fairseq2's wav2vec 2.0 with the losses of its recipe, attention by SDPA as by default or by its
    `NaiveSDPA` ("eager").

    It draws masks and distractors in its forward, and compiles a part of its quantiser there. It takes no
    packed batch.
    """

    def make_model(self, sizes: dict[str, Any], heads: dict[str, Any], variant: str) -> nn.Module:
        from fairseq2.models.transformer import TransformerNormOrder
        from fairseq2.models.transformer.sdpa.default import set_default_sdpa_factory
        from fairseq2.models.transformer.sdpa.naive import NaiveSDPA
        from fairseq2.models.transformer.sdpa.torch import TorchSDPA
        from fairseq2.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2EncoderConfig
        from fairseq2.models.wav2vec2.factory import create_wav2vec2_model

        set_default_sdpa_factory(NaiveSDPA if variant == "eager" else TorchSDPA)
        encoder = Wav2Vec2EncoderConfig(
            model_dim=sizes["dim"],
            feature_dim=sizes["conv_dim"],
            feature_extractor_layer_descs=conv_layers(sizes),
            feature_extractor_bias=sizes["conv_bias"],
            feature_extractor_layer_norm_convs=sizes["conv_norm"] == "layer",
            feature_grad_scale=sizes["feature_gradient_scale"],
            pos_conv_kernel_size=sizes["pos_kernel"],
            num_pos_conv_groups=sizes["pos_groups"],
            num_encoder_layers=sizes["num_layers"],
            num_encoder_attn_heads=sizes["num_heads"],
            ffn_inner_dim=sizes["ffn_dim"],
            dropout_p=sizes["dropout"],
            attn_dropout_p=sizes["attention_dropout"],
            ffn_inner_dropout_p=sizes["activation_dropout"],
            layer_drop_p=sizes["layer_drop"],
            layer_norm_features=not sizes["norm_first"],
            norm_order=TransformerNormOrder.PRE if sizes["norm_first"] else TransformerNormOrder.POST,
        )
        config = Wav2Vec2Config(
            encoder_config=encoder,
            final_dim=heads["final_dim"],
            quantized_dim=heads["code_dim"],
            num_codebooks=heads["num_groups"],
            num_codebook_entries=heads["num_entries"],
            # It trims every row to the fewest masked frames of its batch: with 0.65 it masks 44 % of 4 x 10
            # s, with this our 48 %.
            max_temporal_mask_prob=0.73,
            num_distractors=heads["num_distractors"],
            logit_temp=heads["temperature"],
        )
        model: nn.Module = create_wav2vec2_model(config)
        return model

    def make_batch(self, waveforms: list[np.ndarray], labels: list[np.ndarray]) -> tuple[Any, ...]:
        return torch.from_numpy(pad(waveforms)), [len(waveform) for waveform in waveforms]

    def loss(self, *batch: Any) -> Tensor:
        from fairseq2.nn import BatchLayout

        waves, lengths = batch
        same = min(lengths) == max(lengths)
        layout = BatchLayout(tuple(waves.shape), None if same else lengths, device=waves.device)
        losses, out = self.called(waves, layout)
        loss: Tensor = losses.aggregate / out.num_targets
        return loss


PEERS: dict[tuple[str, str], type[Peer]] = {
    ("wav2vec2", "transformers"): TransformersWav2Vec2,
    ("wav2vec2", "fairseq2"): Fairseq2Wav2Vec2,
    ("hubert", "transformers"): TransformersHubert,
    ("hubert", "torchaudio"): TorchaudioHubert,
}
