"""Radial kernels on the GPU: phi and its derivative phi' to the squared distance, for a mixture of scales.

The formulas are those of `infovae_fast/radial.py`; with the rate r_s = 1 / (2 b_s^2):

    "rbf"   phi = sum_s w_s exp(-r_s d2)                    phi' = -sum_s w_s r_s exp(-r_s d2)
    "rq"    phi = sum_s w_s (1 + r_s d2 / alpha)^-alpha     phi' = -sum_s w_s r_s (1 + r_s d2 / alpha)^(-alpha - 1)
"""

import triton
import triton.language as tl


@triton.jit
def radial(d2, bandwidth, weight, SCALES: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """phi and phi' of a tile of squared distances, in the tile's dtype (float32 or float64).

    Args:
        d2: a tile of any shape, d2 >= 0.
        bandwidth, weight: pointers to SCALES numbers each. In memory and not in the code, so that a bandwidth which
            changes in training neither recompiles the kernel nor visits the host.
        KIND: "rbf" or "rq".
        ALPHA: the power of "rq"; 1 and 1/2 need no logarithm.
    """
    phi = tl.zeros_like(d2)
    dphi = tl.zeros_like(d2)
    for s in range(SCALES):
        b = tl.load(bandwidth + s).to(d2.dtype)
        w = tl.load(weight + s).to(d2.dtype)
        rate = 0.5 / (b * b)
        if KIND == "rbf":
            p = w * tl.exp(-rate * d2)
            slope = rate * p
        else:
            u = (rate / ALPHA) * d2
            base = 1.0 + u
            if ALPHA == 1.0:
                # In float32 "/" is off by 2^-23, to one side: the sums of an MMD would show it.
                p = tl.div_rn(w + tl.zeros_like(base), base) if d2.dtype == tl.float32 else w / base
            elif ALPHA == 0.5:
                p = w * tl.rsqrt(base)
            else:
                lost = tl.where(u < 16777216.0, u - (base - 1.0), 0.0)  # above, it is nothing beside log(base)
                p = w * tl.exp(-ALPHA * (tl.log(base) + lost / base))
            slope = rate * p / base
        phi += p
        dphi -= slope
    return phi, dphi
