"""Trained models at work on images of one's own."""

from .building import build_with_weights
from .predictor import Predictor, find_config

__all__ = ['Predictor', 'build_with_weights', 'find_config']
