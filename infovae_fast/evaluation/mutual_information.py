"""The mutual information I_q(x; z) between an image and its code: 0 where the code ignores the image."""

import math

import torch
from torch import Tensor

from infovae_fast.models import Posterior

ENTRIES = 2**22  # of the N x N matrix of log-densities at once


def mutual_information(posterior: Posterior, z: Tensor) -> float:
    """I_q(x; z) = E log q(z|x) - log q(z), with q(z) the mixture of the N posteriors, in nats.

        1/N sum_i [ log q(z_i|x_i) - log 1/N sum_j q(z_i|x_j) ],   z_i ~ q(z|x_i)

    Args:
        posterior: q(z|x_i), mu and logvar [N, D]. z: one draw from each, [N, D].

    The estimate cannot exceed log N. Computed in float64 and in log space: it does not underflow for large D. A product
    of matrices gives log q(z_i|x_j), i != j, to 1e-16 of (|z_i|^2 + |mu_j|^2) / variance. Memory O(N D).

    Raises:
        ValueError: no points, or z of another shape than mu.
    """
    if z.ndim != 2 or z.shape != posterior.mu.shape or len(z) == 0:
        shapes = f"z: got shape {tuple(z.shape)}, and mu of shape {tuple(posterior.mu.shape)}"
        raise ValueError(f"{shapes}; accepted: one draw from each of N posteriors, both [N, D]")
    mu, logvar, z = posterior.mu.double(), posterior.logvar.double(), z.double()
    own = Posterior(mu, logvar).log_prob(z)  # [N]
    mean = mu.mean(0)
    mu, z = mu - mean, z - mean
    precision = (-logvar).exp()
    # log q(z_i|x_j) = [z_i^2, z_i, 1] . of_j
    of_square, of_z, of_one = -0.5 * precision, mu * precision, Posterior(mu, logvar).log_prob(torch.zeros_like(z))
    total = 0.0
    for i in torch.arange(len(z), device=z.device).split(max(1, ENTRIES // len(z))):
        log_q = torch.addmm(of_one, z[i].square(), of_square.T).addmm_(z[i], of_z.T)  # [rows, N]
        log_q[torch.arange(len(i)), i] = own[i]
        total += (own[i] - torch.logsumexp(log_q, 1)).sum().item()
    return total / len(z) + math.log(len(z))
