"""Metrics of generated images.  Whatever compares with private images is private itself."""

from __future__ import annotations

from dpsyngen.evaluation.cas import ClassifierResult, best_by_validation, classification_accuracy
from dpsyngen.evaluation.distances import FeatureStatistics, frechet_distance
from dpsyngen.evaluation.extractors import FeatureSpec, make_extractor
from dpsyngen.evaluation.features import FeatureExtractor
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
