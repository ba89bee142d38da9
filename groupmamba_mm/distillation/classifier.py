"""An image classifier that learns from a teacher as well."""

from mmengine.registry import MODELS
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.structures import DataSample
from torch import Tensor

from .heads import DistilledHead
from .teachers import FrozenTeacher, Normalization


@MODELS.register_module()
class DistilledClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with a frozen teacher (Eq. 10).

    The teacher sees the batch that the student sees, after Mixup and CutMix, in the normalisation
    it was trained with. Apart from the loss this is an ``ImageClassifier``: the checkpoints are the
    same, and testing needs no teacher.

    Args:
        backbone: Config of the backbone.
        teacher: Config of a :class:`FrozenTeacher`.
        head: Config of a head that takes the teacher's logits: ``DistilledLinearClsHead`` or
            ``DistilledTwoHeadClsHead``.
        neck: Config of the neck.
        pretrained: See ``ImageClassifier``.
        train_cfg: See ``ImageClassifier``; its ``augments`` mix the batch for both.
        data_preprocessor: Config of the student's ``ClsDataPreprocessor``.
        init_cfg: mmengine's initialisation config.

    Raises:
        TypeError: The head does not take the teacher's logits, or ``teacher`` is no teacher.
    """

    def __init__(
        self,
        backbone: dict,
        teacher: dict,
        head: dict,
        neck: dict | None = None,
        pretrained: str | None = None,
        train_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        # read before the base class puts types and augmentations into it
        self.normalization = Normalization.of_preprocessor(data_preprocessor or {})
        super().__init__(
            backbone,
            neck=neck,
            head=head,
            pretrained=pretrained,
            train_cfg=train_cfg,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        if not isinstance(self.head, DistilledHead):
            raise TypeError(
                f'{type(self.head).__name__} takes no teacher; use the head '
                'DistilledLinearClsHead or DistilledTwoHeadClsHead'
            )
        # not a module, so nothing that happens to the student's modules happens to it
        self.teacher = MODELS.build(teacher)
        if not isinstance(self.teacher, FrozenTeacher):
            raise TypeError(
                f'teacher must be a TimmTeacher or a ConfigTeacher, got '
                f'{type(self.teacher).__name__}'
            )

    def prepare_training(self) -> None:
        """Read the teacher, so that a missing file is found before the data are.

        Raises:
            CheckpointError: The teacher's weights are missing, damaged or do not fit.
            ConfigError: The teacher's config is missing, or it has other classes.
        """
        self.teacher.load(self.head.num_classes)

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Compute both terms of the objective.

        Args:
            inputs: (B, 3, H, W), normalised and mixed.
            data_samples: The labels.

        Returns:
            ``loss_label`` and ``loss_teacher``.
        """
        self.prepare_training()
        teacher_logits = self.teacher.start(inputs, self.normalization)
        feats = self.extract_feat(inputs)  # on a GPU while the teacher runs
        return self.head.loss(feats, data_samples, teacher_logits())
