"""Grouped directional SSM: convolution, projections, scan, norm and gate as one operator."""
from .interface import grouped_ssm

__all__ = ['grouped_ssm']
