"""What people look at: the table of a model's layers, and pictures of a training."""

from hf_stompp.report.dynamics import TrainingLog, plot
from hf_stompp.report.table import LayerSummary, Summary, summary

__all__ = ["LayerSummary", "Summary", "TrainingLog", "plot", "summary"]
