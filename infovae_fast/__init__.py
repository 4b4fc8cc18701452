"""The InfoVAE family with fast MMD, Stein and PixelCNN kernels behind plain PyTorch functions."""

from pathlib import Path

# In a checkout the Triton kernels lie beside this package, installed they lie in it; found in both.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").exists() and (_checkout / "kernels" / "__init__.py").exists():
    __path__.append(str(_checkout))

from infovae_fast.data import ImageData, binarize, load_data, to_unit
from infovae_fast.divergences import (
    AdversarialLoss,
    MMDLoss,
    SteinLoss,
    gaussian_kl,
    mmd,
    stein_direction,
    stein_loss,
)
from infovae_fast.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    Gaussian,
    bernoulli_nll,
    categorical_nll,
    discretized_logistic_mixture_nll,
    gaussian_nll,
)
from infovae_fast.masked_conv import MaskedConv2d, masked_conv2d
from infovae_fast.models import GatedPixelCNN, InfoVAE, PixelCNNPlusPlus, PixelSampler
from infovae_fast.models.priors import GaussianMixture, Prior, SamplerPrior, StandardNormal, Uniform
from infovae_fast.normal_prior import NormalMMDLoss, mmd_to_normal
from infovae_fast.objective import (
    Objective,
    aae,
    beta_vae,
    elbo,
    mmd_vae,
    stein_vae,
    unregularized,
    wae,
)
from infovae_fast.radial import (
    IMQ,
    RBF,
    Kernel,
    RationalQuadratic,
    cmmd,
    five_scale_rbf,
    median_rbf,
    paper_few_samples,
    paper_pixelcnn,
    wae_imq,
)
from infovae_fast.two_sample import MMDTest, mmd_test

__version__ = "0.1.0"

__all__ = [
    "IMQ",
    "RBF",
    "AdversarialLoss",
    "Bernoulli",
    "Categorical",
    "DiscretizedLogisticMixture",
    "GatedPixelCNN",
    "Gaussian",
    "GaussianMixture",
    "ImageData",
    "InfoVAE",
    "Kernel",
    "MMDLoss",
    "MMDTest",
    "MaskedConv2d",
    "NormalMMDLoss",
    "Objective",
    "PixelCNNPlusPlus",
    "PixelSampler",
    "Prior",
    "RationalQuadratic",
    "SamplerPrior",
    "StandardNormal",
    "SteinLoss",
    "Uniform",
    "aae",
    "bernoulli_nll",
    "beta_vae",
    "binarize",
    "categorical_nll",
    "cmmd",
    "discretized_logistic_mixture_nll",
    "elbo",
    "five_scale_rbf",
    "gaussian_kl",
    "gaussian_nll",
    "load_data",
    "masked_conv2d",
    "median_rbf",
    "mmd",
    "mmd_test",
    "mmd_to_normal",
    "mmd_vae",
    "paper_few_samples",
    "paper_pixelcnn",
    "stein_direction",
    "stein_loss",
    "stein_vae",
    "to_unit",
    "unregularized",
    "wae",
    "wae_imq",
]
