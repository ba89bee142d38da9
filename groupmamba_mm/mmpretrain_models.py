"""Our classifiers in mmpretrain's model hub: for ``get_model``, ``list_models``, inferencers."""

from mmpretrain.apis.model import ModelHub

from .backbones import ARCHS
from .model_zoo import MIM_FOLDER

for metafile in ('configs/groupmamba/metafile.yml', 'configs/groupmamba/ablations/metafile.yml'):
    ModelHub.register_model_index(MIM_FOLDER / metafile, config_prefix=MIM_FOLDER)
for arch in ARCHS:
    # A size alone stands for its ImageNet config. The hub has no public way to add a second name.
    ModelHub._models_dict[f'groupmamba-{arch}'] = ModelHub._models_dict[
        f'groupmamba-{arch}_8xb128_in1k'
    ]
