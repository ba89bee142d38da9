"""How far a student's logits are from its teacher's."""

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

KINDS = ('hard', 'soft')


@MODELS.register_module()
class DistillationLoss(nn.Module):
    r"""The teacher's term of the distilled objective (Eq. 10), hard or soft.

    - hard, as in the paper and the released recipe: the cross entropy with the class that the
      teacher holds for the likeliest, ``CE(Z_s, argmax Z_t)``;
    - soft, as in DeiT's paper: ``T**2 * KL(softmax(Z_t / T) || softmax(Z_s / T))``, the mean over
      the batch. DeiT's code also divides by the number of classes; this does not.

    Args:
        kind: 'hard' or 'soft'.
        temperature: T of the soft kind, positive; the hard kind has none, so it must stay 1 there.

    Raises:
        ValueError: An option has a value outside its set.
    """

    def __init__(self, kind: str = 'hard', temperature: float = 1.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f'kind must be one of {KINDS}, got {kind!r}')
        if temperature <= 0:
            raise ValueError(f'temperature must be positive, got {temperature}')
        if kind == 'hard' and temperature != 1:
            raise ValueError(
                f"temperature={temperature} does nothing for kind='hard'; use "
                "kind='soft', or leave it away"
            )
        self.kind = kind
        self.temperature = temperature

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: The student's, (B, K).
            teacher_logits: The teacher's, (B, K); no gradient goes there.

        Returns:
            A scalar.

        Raises:
            ValueError: The two have different shapes.
        """
        if logits.shape != teacher_logits.shape:
            raise ValueError(
                f'the teacher gives logits of shape {tuple(teacher_logits.shape)}, the student of '
                f'{tuple(logits.shape)}; both need the same classes'
            )
        teacher_logits = teacher_logits.detach()
        if self.kind == 'hard':
            return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        divergence = F.kl_div(
            (logits / self.temperature).log_softmax(dim=1),
            (teacher_logits / self.temperature).log_softmax(dim=1),
            reduction='batchmean',
            log_target=True,
        )
        return divergence * self.temperature**2

    def extra_repr(self) -> str:
        """The options, for printing the model."""
        return f'kind={self.kind!r}, temperature={self.temperature}'
