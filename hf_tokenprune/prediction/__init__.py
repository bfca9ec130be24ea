"""Batch prediction and embedding over data of any size: streamed, split over processes, resumable."""

from .arguments import PredictionArguments
from .run import predict_dataset


__all__ = ["PredictionArguments", "predict_dataset"]
