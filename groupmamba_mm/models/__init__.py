"""Whole classifiers in plain PyTorch: built in one line, for timm and for the Hugging Face Hub."""

from .classifier import GroupMambaClassifier
from .factory import create_model
from .pretrained import load_pretrained

__all__ = ['GroupMambaClassifier', 'create_model', 'load_pretrained']
