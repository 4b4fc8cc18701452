"""Networks, priors and the InfoVAE model."""

from infovae_fast.models.infovae import InfoVAE, LogLikelihood, Output
from infovae_fast.models.priors import GaussianMixture, Posterior, Prior, SamplerPrior, StandardNormal, Uniform

__all__ = [
    "GaussianMixture",
    "InfoVAE",
    "LogLikelihood",
    "Output",
    "Posterior",
    "Prior",
    "SamplerPrior",
    "StandardNormal",
    "Uniform",
]
