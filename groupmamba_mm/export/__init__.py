"""Models for other runtimes: ONNX, torch.export and safetensors, each checked after it is written."""

from .formats import FORMATS, Exported, export_model
from .graph import exported_module

__all__ = ['FORMATS', 'Exported', 'export_model', 'exported_module']
