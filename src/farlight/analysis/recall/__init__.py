"""Recall of a causal language model over long texts: generated questions (`tasks`), asked under patterns (`answers`)."""

from farlight.analysis.recall.answers import Recall, RecallScore, evaluate
from farlight.analysis.recall.tasks import TASKS, Question, question

__all__ = ["TASKS", "Question", "Recall", "RecallScore", "evaluate", "question"]
