"""Trained models at work on images of one's own."""
from .building import build_with_weights

__all__ = ['build_with_weights']
