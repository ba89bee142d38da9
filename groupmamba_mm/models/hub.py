"""Saving to and loading from the Hugging Face Hub or a folder, by huggingface_hub's own mixin."""

from pathlib import Path
from typing import Any

from groupmamba_mm.errors import CheckpointError
from groupmamba_mm.extras import explain_missing
from groupmamba_mm.model_zoo import MIM_FOLDER
from groupmamba_mm.version import __version__

from .pretrained import hub_file, load_pretrained

try:
    from huggingface_hub import PyTorchModelHubMixin
except ModuleNotFoundError:

    class PyTorchModelHubMixin:
        """Stands for huggingface_hub's mixin where that is not installed."""

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            """See :class:`huggingface_hub.ModelHubMixin`, whose absence this explains."""
            _needs_hub()

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> None:
            """See :class:`huggingface_hub.ModelHubMixin`, whose absence this explains."""
            _needs_hub()

        def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
            """See :class:`huggingface_hub.ModelHubMixin`, whose absence this explains."""
            _needs_hub()


def _needs_hub() -> None:
    with explain_missing('save_pretrained, from_pretrained and push_to_hub'):
        import huggingface_hub  # noqa: F401


class HubModel(PyTorchModelHubMixin):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of a classifier.

    The weights are in ``model.safetensors``, the arguments that build the model in ``config.json``,
    and the model card is written from the metafile.
    """

    @property
    def config(self) -> dict[str, Any]:
        """What builds this model, as it stands in ``config.json``."""
        raise NotImplementedError

    def save_pretrained(
        self, save_directory: str | Path, *, config: dict[str, Any] | None = None, **kwargs: Any
    ) -> str | None:
        """Save weights, config and model card; see :class:`huggingface_hub.ModelHubMixin`.

        Args:
            save_directory: The folder.
            config: None: what this model is now, not what it was built as.
            **kwargs: See there.

        Returns:
            See there.
        """
        return super().save_pretrained(save_directory, config=config or self.config, **kwargs)

    def generate_model_card(self, **kwargs: Any) -> Any:
        """The model card, from the metafile.

        Args:
            **kwargs: Further metadata of the card.

        Returns:
            A ``huggingface_hub.ModelCard``.
        """
        from huggingface_hub import ModelCard, ModelCardData

        data = ModelCardData(
            license='apache-2.0',
            library_name='groupmamba-mm',
            pipeline_tag='image-classification',
            tags=['image-classification', 'groupmamba', 'mamba', 'pytorch'],
            **kwargs,
        )
        return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{_card_text(self.config)}')

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = 'cpu',
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> 'HubModel':
        if 'arch' not in model_kwargs:
            raise CheckpointError(
                f'{model_id} has no config.json that names an arch; give the '
                'folder or repository of a model saved by save_pretrained, or '
                'load the weights by groupmamba_mm.create_model'
            )
        model = cls(**model_kwargs)
        file = hub_file(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        load_pretrained(model, file)
        return model.to(map_location).eval()


def _card_text(config: dict[str, Any]) -> str:
    """What the metafile says of a size, and how the model is loaded."""
    import yaml

    arch = config['arch']
    lines = [
        f'# GroupMamba {arch if isinstance(arch, str) else "of custom size"}',
        '',
        'An image classifier of [GroupMamba](https://arxiv.org/abs/2407.13772), saved by '
        f'groupmamba-mm {__version__}.',
        '',
        '```python',
        'import groupmamba_mm',
        '',
        "model = groupmamba_mm.GroupMambaClassifier.from_pretrained('FOLDER_OR_REPOSITORY')",
        '```',
        '',
        '## Numbers of this size',
        '',
        '| | value | source |',
        '|---|---|---|',
    ]
    metafile = yaml.safe_load((MIM_FOLDER / 'configs/groupmamba/metafile.yml').read_text())
    for model in metafile['Models']:
        if model['Name'] != f'groupmamba-{arch}_8xb128_in1k':
            continue
        values = {**model['Metadata'], **model['Results'][0]['Metrics']}
        lines += [
            f'| {name} | {value:,} | {model["Sources"][name]} |' for name, value in values.items()
        ]
        break
    else:
        lines = lines[:-4]
    lines += [
        '',
        'Numbers with the source "paper" are of the published weights, not of this file. '
        'How this file was trained is for its author to add.',
        '',
    ]
    return '\n'.join(lines)
