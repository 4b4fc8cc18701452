"""MMD between the aggregate posterior of a whole data set and the prior."""

from torch import Tensor

from infovae_fast.divergences import KernelLike, mmd
from infovae_fast.models import Prior


def full_set_mmd(z: Tensor, prior: Prior, kernel: KernelLike = None, *, backend: str = "auto") -> float:
    """Unbiased MMD^2 between z ~ q(z), [N, D], one draw for every image, and N points of the prior.

    Args:
        kernel: as in `mmd`; default RBF with b = sqrt(D).

    Unbiased, so that it scatters around 0, and may be negative, where q(z) matches the prior.
    """
    return mmd(z, prior.sample(len(z)).to(z), kernel, "unbiased", backend=backend).item()
