"""What the package needs: torch for the backbone, an extra for the rest, which the error names."""

import subprocess
import sys
import textwrap

from groupmamba_mm.extras import EXTRAS

#: An environment without any extra: their libraries are not found.
WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder
LIBRARIES = {sum(EXTRAS.values(), ())!r}
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition('.')[0] not in LIBRARIES:
            return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run(code, folder):
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_EXTRAS + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_backbone_runs_and_loads_with_torch_alone(tmp_path):
    out = run(
        """
        import torch
        import groupmamba_mm
        from groupmamba_mm import GroupMamba
        from groupmamba_mm.checkpoint import load_checkpoint_file, state_dict_of
        arch = dict(family='paper', stem_channels=6, embed_dims=(8, 12), depths=(1, 1),
                    ffn_ratios=(2, 2))
        saved = GroupMamba(arch)
        torch.save(dict(state_dict=saved.state_dict()), 'saved.pth')
        init = dict(type='Pretrained', checkpoint='saved.pth')
        model = GroupMamba(arch, out_indices=(0, 1), init_cfg=init)
        model.init_weights()
        print([tuple(m.shape) for m in model(torch.rand(1, 3, 32, 48))])
        classifier = groupmamba_mm.create_model(arch, pretrained='saved.pth', num_classes=3)
        try:
            classifier.save_pretrained('folder')
        except groupmamba_mm.errors.MissingExtraError as error:
            assert "'groupmamba-mm[hub]'" in str(error)
            print(classifier(torch.rand(1, 3, 32, 48)).shape[1])
    """,
        tmp_path,
    )
    assert out == '[(1, 8, 8, 12), (1, 12, 4, 6)]\n3\n'


def test_checkpoints_of_a_runner_are_read_without_mmengine(tmp_path):
    import torch
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([0.5, 0.25], [1, 1])
    torch.save(
        dict(state_dict=dict(weight=torch.ones(2)), message_hub=dict(loss=history)),
        tmp_path / 'epoch_1.pth',
    )
    out = run(
        """
        from groupmamba_mm.checkpoint import load_checkpoint_file
        print(load_checkpoint_file('epoch_1.pth')['state_dict'])
    """,
        tmp_path,
    )
    assert 'tensor([1., 1.])' in out


def test_each_module_imports_or_names_its_extra(tmp_path):
    out = run(
        """
        import importlib, pkgutil
        import groupmamba_mm
        from groupmamba_mm.errors import MissingExtraError
        #: Imported by the library's own import, so never without it.
        REGISTERING = groupmamba_mm.registration.REGISTRATIONS.values()
        named = {}
        def walk(path, prefix):
            for module in pkgutil.iter_modules(path, prefix):
                if module.name in REGISTERING:
                    continue
                try:
                    imported = importlib.import_module(module.name)
                except MissingExtraError as error:
                    assert "pip install 'groupmamba-mm[" in str(error), error
                    named[module.name] = str(error)
                else:
                    if module.ispkg:
                        walk(imported.__path__, f'{module.name}.')
        walk(groupmamba_mm.__path__, 'groupmamba_mm.')
        for name in ('engine', 'heads', 'distillation', 'detection', 'evaluation', 'analysis'):
            assert '[mm]' in named[f'groupmamba_mm.{name}'], name
        assert '[demo]' in named['groupmamba_mm.datasets.demo_scenes']
        assert not any(name.startswith(('groupmamba_mm.ops', 'groupmamba_mm.layers',
                                        'groupmamba_mm.checkpoint')) for name in named
                       if not name.endswith('kernels')), named
        try:
            groupmamba_mm.get_config('groupmamba-tiny_8xb128_in1k')
        except MissingExtraError as error:
            print(error)
    """,
        tmp_path,
    )
    assert out == (
        "get_config needs mmengine, which is not installed: pip install 'groupmamba-mm[mm]'\n"
    )
