"""Instance discrimination: an image is told from all others, as a memory bank remembers them."""

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastssl import InfoNCELoss, SampleMemoryBank
from fastssl.distributed import gather_rows
from fastssl.trainer.methods.base import Method
from fastssl.trainer.networks import LinearHead

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from fastssl.trainer.augment import Batch
    from fastssl.trainer.config import Config


class InstanceDiscrimination(Method):
    """One view of an image, its own row of the memory bank as positive, other rows as negatives.

    Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018. With
    all rows the loss is the paper's equation 3; with some of them, drawn at random, it is a softmax
    over those, where the paper estimates it by binary decisions. The paper's head is ours without
    a norm (``head_norm`` of "none").
    """

    defaults: ClassVar = {
        "projection_dim": 128,
        "temperature": 0.07,
        "negatives": 4096,
        "momentum": 0.5,
    }
    recipes: ClassVar = {
        "digits": {"temperature": 0.2, "negatives": 0},
        "mnist": {"temperature": 0.2},
        "fashion-mnist": {"temperature": 0.2},
    }

    def __init__(self, backbone: Any, config: "Config", images: int) -> None:
        super().__init__()
        self.negatives = config.negatives
        self.backbone = backbone
        self.head = LinearHead(backbone.out_features, config.projection_dim, config.head_norm)
        self.memory = SampleMemoryBank(images, config.projection_dim, config.momentum)
        self.loss = InfoNCELoss(config.temperature, backend=config.backend)

    @staticmethod
    def views(config: "Config", size: int) -> "list[v2.Transform]":
        """A single one."""
        return Method.views(config, size)[:1]

    def forward(self, batch: "Batch") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of the embeddings against the bank, and both the embeddings and their rows."""
        bank, ids = self.memory.bank, self.memory.ids
        if self.negatives:
            bank, ids = self.memory.sample(self.negatives)
        z, rows = self.head(self.backbone(batch.views[0])).to(bank.dtype), self.memory(batch.index)
        self.seen = z.detach(), batch.index
        return self.loss(z, rows, bank, batch.index, ids), (z, rows)

    def after_step(self, step: int, per_epoch: int) -> None:
        """The rows move towards the embeddings."""
        self.memory.update(*(gather_rows(x)[0] for x in self.seen))
