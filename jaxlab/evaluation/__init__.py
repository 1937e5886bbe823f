"""Measuring trained models."""

from jaxlab.evaluation.heldout import evaluate

__all__ = ["evaluate"]
