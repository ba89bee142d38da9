"""Fused LayerNorms over channels-last tokens, and the channel affinity between them."""
from .operators import (add_layer_norm, channel_affinity, layer_norm, scaled_layer_norm,
                        scaled_norm_linear)

__all__ = [
    'add_layer_norm', 'channel_affinity', 'layer_norm', 'scaled_layer_norm', 'scaled_norm_linear'
]
