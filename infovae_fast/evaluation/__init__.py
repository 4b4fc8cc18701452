"""The paper's metrics, one file each."""

from infovae_fast.evaluation.classes import class_divergence, fit_classifier, predict_classes
from infovae_fast.evaluation.covariance import log_det_covariance
from infovae_fast.evaluation.full_mmd import full_set_mmd
from infovae_fast.evaluation.mutual_information import mutual_information
from infovae_fast.evaluation.semi_supervised import semi_supervised_errors
from infovae_fast.evaluation.summary import encode_all, summarize

__all__ = [
    "class_divergence",
    "encode_all",
    "fit_classifier",
    "full_set_mmd",
    "log_det_covariance",
    "mutual_information",
    "predict_classes",
    "semi_supervised_errors",
    "summarize",
]
