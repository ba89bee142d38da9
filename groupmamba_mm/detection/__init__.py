"""Parts of mmdet's detectors that mixed precision needs. Importing this package needs mmdet."""
from .fp32_roi_extractor import Fp32RoIExtractor
from .fp32_rpn_head import Fp32RPNHead

__all__ = ['Fp32RPNHead', 'Fp32RoIExtractor']
