"""Metrics of generated images.  Whatever compares with private images is private itself."""

from __future__ import annotations

from dpsyngen.evaluation.cas import ClassifierResult, best_by_validation, classification_accuracy
from dpsyngen.evaluation.features import FeatureExtractor, FeatureSpec, make_extractor
from dpsyngen.evaluation.frechet import FeatureStatistics, frechet_distance
from dpsyngen.evaluation.metrics import evaluate_images

__all__ = [
    "ClassifierResult",
    "FeatureExtractor",
    "FeatureSpec",
    "FeatureStatistics",
    "best_by_validation",
    "classification_accuracy",
    "evaluate_images",
    "frechet_distance",
    "make_extractor",
]
