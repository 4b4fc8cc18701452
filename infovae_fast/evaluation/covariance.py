"""The log-determinant of the aggregate posterior's covariance: 0 for a match with N(0, I)."""

import torch
from torch import Tensor


def log_det_covariance(z: Tensor) -> float:
    """log det Cov[q(z)] of draws z ~ q(z|x), x from the data, [N, D] with N > D: in nats, computed in float64.

    Positive where q(z) is spread wider than N(0, I), negative where it is narrower (section 5.1 of the InfoVAE paper,
    natural logarithm, not divided by D).

    Raises:
        ValueError: N <= D, where the covariance is singular.
    """
    if z.ndim != 2 or len(z) <= z.shape[1]:
        raise ValueError(f"z: got shape {tuple(z.shape)}; accepted: [N, D] with N > D")
    covariance = torch.cov(z.double().T).reshape(z.shape[1], z.shape[1])
    return torch.linalg.slogdet(covariance).logabsdet.item()
