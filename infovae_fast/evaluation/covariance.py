"""The log-determinant of the aggregate posterior's covariance: 0 for a match with N(0, I)."""

import math

import torch
from torch import Tensor

from infovae_fast.arguments import at_least_float32
from infovae_fast.clouds import samples


def log_det_covariance(z: Tensor) -> float:
    """log det Cov[q(z)] of draws z ~ q(z|x), x from the data, [N, D] with N > D: in nats, computed in float64.

    Positive where q(z) is spread wider than N(0, I), negative where it is narrower (section 5.1 of the InfoVAE paper,
    natural logarithm, not divided by D). -inf where the points lie in a plane of fewer dimensions, up to rounding.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: N <= D, where the covariance is singular; NaN or infinity.
    """
    (z,) = samples(z=z)
    if len(z) <= z.shape[1]:
        raise ValueError(f"z: got shape {tuple(z.shape)}; accepted: [N, D] with N > D")
    if bad := int((~z.isfinite()).any(1).sum()):
        raise ValueError(f"z: {bad} of {len(z)} points hold NaN or infinity")
    centred = z.double() - z[0].double()  # exact where a coordinate is the same everywhere
    centred = centred - centred.mean(0)
    deviations = centred.square().sum(0).div(len(z) - 1).sqrt()  # [D]
    if not (deviations > 0).all():
        return -math.inf
    # of the correlations, whose rank does not depend on the units of the axes
    singular = torch.linalg.svdvals(centred / (deviations * math.sqrt(len(z) - 1)))
    if singular[-1] <= len(singular) * torch.finfo(at_least_float32(z).dtype).eps * singular[0]:
        return -math.inf
    return 2 * (singular.log().sum() + deviations.log().sum()).item()
