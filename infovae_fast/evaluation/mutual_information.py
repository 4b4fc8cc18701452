"""The mutual information I_q(x; z) between an image and its code: 0 where the code ignores the image."""

import math

import torch
from torch import Tensor

from infovae_fast.models import Posterior

ENTRIES = 2**22  # of the N x N matrix of log-densities at once
LOST = 1e-4  # nats that rounding may cost one of them


def mutual_information(posterior: Posterior, z: Tensor) -> float:
    """I_q(x; z) = E log q(z|x) - log q(z), with q(z) the mixture of the N posteriors, in nats.

        1/N sum_i [ log q(z_i|x_i) - log 1/N sum_j q(z_i|x_j) ],   z_i ~ q(z|x_i)

    Args:
        posterior: q(z|x_i), mu and logvar [N, D]. z: one draw from each, [N, D].

    The estimate cannot exceed log N. Computed in float64 and in log space: it does not underflow for large D. A product
    of matrices gives log q(z_i|x_j), i != j, where that loses no digits that matter; where codes are 10^5 standard
    deviations of a posterior apart, differences do, which take longer. Memory O(N D).

    Raises:
        ValueError: no points, z of another shape than mu or logvar, or a number that is not finite.
    """
    given = {"z": z, "mu": posterior.mu, "logvar": posterior.logvar}
    if z.ndim != 2 or not z.shape == posterior.mu.shape == posterior.logvar.shape or len(z) == 0:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
        raise ValueError(f"got shapes {shapes}; accepted: one draw from each of N posteriors, all [N, D]")
    for name, t in given.items():
        if bad := int((~t.isfinite()).sum()):
            raise ValueError(f"{name}: got {bad} values that are not finite; accepted: finite ones")
    mu, logvar, z = posterior.mu.double(), posterior.logvar.double(), z.double()
    posterior = Posterior(mu, logvar)
    own = posterior.log_prob(z)  # [N]
    precision, mean = (-logvar).exp(), mu.mean(0)
    m, c = mu - mean, z - mean
    size = (precision * (m.square().amax(0) + c.square().amax(0))).sum(1).max()
    exact = not size * torch.finfo(z.dtype).eps <= LOST  # of an overflow too
    # log q(z_i|x_j) = [c_i^2, c_i, 1] . of_j
    of_square, of_c, of_one = -0.5 * precision, m * precision, Posterior(m, logvar).log_prob(torch.zeros_like(m))
    total = 0.0
    for i in torch.arange(len(z), device=z.device).split(max(1, ENTRIES // (z.numel() if exact else len(z)))):
        if exact:
            log_q = posterior.log_prob(z[i, None])  # [rows, N]
        else:
            log_q = torch.addmm(of_one, c[i].square(), of_square.T).addmm_(c[i], of_c.T)
            log_q[torch.arange(len(i)), i] = own[i]
        total += (own[i] - torch.logsumexp(log_q, 1)).sum().item()
    return total / len(z) + math.log(len(z))
