"""Losses for training loops."""

from .loss import TaskLoss, TaskStats

__all__ = ["TaskLoss", "TaskStats"]
