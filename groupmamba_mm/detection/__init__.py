"""Parts of detectors that mmdet lacks. Importing this package needs mmdet."""

from groupmamba_mm.extras import explain_missing

with explain_missing('groupmamba_mm.detection'):
    from .fp32_roi_extractor import Fp32RoIExtractor
    from .fp32_rpn_head import Fp32RPNHead
    from .multi_channel import MultiChannelDetDataPreprocessor

__all__ = ['Fp32RPNHead', 'Fp32RoIExtractor', 'MultiChannelDetDataPreprocessor']
