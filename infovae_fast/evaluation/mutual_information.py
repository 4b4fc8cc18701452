"""The mutual information I_q(x; z) between an image and its code: 0 where the code ignores the image."""

import math

import torch
from torch import Tensor

from infovae_fast.models import Posterior

ROWS = 1024  # of the N x N matrix of log-densities at once


def mutual_information(posterior: Posterior, z: Tensor) -> float:
    """I_q(x; z) = E log q(z|x) - log q(z), with q(z) the mixture of the N posteriors, in nats.

        1/N sum_i [ log q(z_i|x_i) - log 1/N sum_j q(z_i|x_j) ],   z_i ~ q(z|x_i)

    Args:
        posterior: q(z|x_i), mu and logvar [N, D]. z: one draw from each, [N, D].

    The estimate cannot exceed log N. Computed in float64 and in log space: it does not underflow for large D.
    """
    mu, logvar, z = posterior.mu.double(), posterior.logvar.double(), z.double()
    total = 0.0
    for start in range(0, len(z), ROWS):
        rows = slice(start, start + ROWS)
        log_q = Posterior(mu, logvar).log_prob(z[rows, None])  # [rows, N]
        own = Posterior(mu[rows], logvar[rows]).log_prob(z[rows])  # [rows]
        total += (own - (torch.logsumexp(log_q, 1) - math.log(len(z)))).sum().item()
    return total / len(z)
