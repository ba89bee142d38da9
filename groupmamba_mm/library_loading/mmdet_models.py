"""mmpretrain's class for mmdet's models, if mmpretrain was imported without them."""

import importlib
import sys

_module = sys.modules.get('mmpretrain.models.utils.res_layer_extra_norm')
# without the name it is this module that imports mmdet's
if _module is not None and vars(_module).get('ResLayerExtraNorm', _module) is None:
    importlib.reload(_module)
    sys.modules['mmpretrain.models.utils'].ResLayerExtraNorm = _module.ResLayerExtraNorm
