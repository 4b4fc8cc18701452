"""Networks, priors and the InfoVAE model."""

from infovae_fast.models.infovae import InfoVAE, LogLikelihood, Output
from infovae_fast.models.pixel_sampler import PixelSampler
from infovae_fast.models.pixelcnn import GatedPixelCNN
from infovae_fast.models.pixelcnn_pp import PixelCNNPlusPlus
from infovae_fast.models.priors import GaussianMixture, Posterior, Prior, SamplerPrior, StandardNormal, Uniform

__all__ = [
    "GatedPixelCNN",
    "GaussianMixture",
    "InfoVAE",
    "LogLikelihood",
    "Output",
    "PixelCNNPlusPlus",
    "PixelSampler",
    "Posterior",
    "Prior",
    "SamplerPrior",
    "StandardNormal",
    "Uniform",
]
