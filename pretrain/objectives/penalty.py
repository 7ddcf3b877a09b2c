"""The penalty on large front-end features that wav2vec 2.0 and HuBERT share."""

import numpy as np
from torch import Tensor

from pretrain.data.packing import Layout


def weigh_frames(num_masked: np.ndarray, layout: Layout) -> np.ndarray:
    """Each utterance's number of masked frames, spread evenly over its frames: (frames,) float32."""
    return np.repeat(num_masked / np.array(layout.num_frames), layout.num_frames).astype(np.float32)


def feature_penalty(features: Tensor, weights: Tensor, scale: float) -> Tensor:
    """`scale` times the frames' mean square (frames, channels), summed with the weights of `weigh_frames`.

    In the papers it is a mean; here it is an utterance's mean times its number of masked frames, so that it
    is a sum over utterances and no split of a batch changes it. It is 0 for a fixed front end.
    """
    if scale == 0 or not features.requires_grad:
        return features.new_zeros(())
    return scale * (features.float().square().mean(1) * weights).sum()  # no product that autocast would round
