"""The hinge losses of SN-PatchGAN (paper, eq. 4), in float32 whatever the networks run in."""

import torch.nn.functional as F

from models.types import Scalar, Scores


def hinge_discriminator(real_score: Scores, fake_score: Scores) -> Scalar:
    """½·mean max(0, 1 − real) + ½·mean max(0, 1 + fake): 1 when all scores are 0.

    The ½ is the authors' code's, not the paper's.
    """
    real = F.relu(1 - real_score.float()).mean()
    fake = F.relu(1 + fake_score.float()).mean()
    return 0.5 * (real + fake)


def hinge_generator(fake_score: Scores) -> Scalar:
    """−mean fake: no margin, so it may fall below zero."""
    return -fake_score.float().mean()
