"""mmpretrain's class for mmdet's models, if mmpretrain was imported without them; see
:mod:`groupmamba_mm.quick_imports`.
"""

import importlib
import sys

_module = sys.modules.get('mmpretrain.models.utils.res_layer_extra_norm')
if _module is not None and _module.ResLayerExtraNorm is None:
    importlib.reload(_module)
