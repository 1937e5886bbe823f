"""Evaluation of trained models."""

from jaxlab.evaluation.grouped import loss_by_position, recall_by_depth
from jaxlab.evaluation.heldout import evaluate

__all__ = ["evaluate", "loss_by_position", "recall_by_depth"]
