"""The hinge losses of SN-PatchGAN (paper, section 3.2, eq. 4), always in float32.

The paper's other term is the plain ℓ1 distance of both stages to the whole image, without the
spatial discount of DeepFill v1: ``torch.nn.functional.l1_loss``. Both terms weigh the same.
"""

import torch.nn.functional as F

from models.types import Scalar, Scores


def hinge_discriminator(real_score: Scores, fake_score: Scores) -> Scalar:
    """L_D (eq. 4): ½·mean max(0, 1 − real) + ½·mean max(0, 1 + fake), 1 when all scores are 0.

    The ½ is in the authors' code, not in the paper.
    """
    real = F.relu(1 - real_score.float()).mean()
    fake = F.relu(1 + fake_score.float()).mean()
    return 0.5 * (real + fake)


def hinge_generator(fake_score: Scores) -> Scalar:
    """L_G (eq. 4): −mean fake; it has no margin, so it may fall below zero."""
    return -fake_score.float().mean()
