"""Small methods that contrast rows, and steps of them."""

import torch

from fastssl.trainer import Config, augment, networks, optim
from fastssl.trainer.methods import METHODS

B, D, IMAGES = 8, 6, 20
SMALL = {
    "moco": {"projection_hidden": 16, "projection_dim": D, "queue_length": 20, "momentum": 0.75},
    "supcon": {"projection_hidden": 16, "projection_dim": D},
    "instance": {"projection_dim": D, "temperature": 0.5, "momentum": 0.25},
    "pirl": {"projection_dim": D, "temperature": 0.5, "lambda_param": 0.3, "momentum": 0.25},
}
SHAPES = {
    "moco": [(1, 16, 16)] * 2,
    "supcon": [(1, 16, 16)] * 2,
    "instance": [(1, 16, 16)],
    "pirl": [(1, 16, 16), (9, 1, 8, 8)],
}


def make(method, **options):
    """A small method for digits that keeps what its loss is given."""
    config = Config(method=method, **{**SMALL[method], **options}).resolved()
    torch.manual_seed(0)
    model = METHODS[method](networks.build_backbone("cnn", 1, 16), config, IMAGES).train()
    model.given = []
    model.loss.register_forward_pre_hook(lambda _, given: model.given.append(given))
    model.optimizer = optim.build(model, config)
    return model


def batch_for(method, size=B):
    views = [torch.randn(size, *shape) for shape in SHAPES[method]]
    return augment.Batch(views, torch.randperm(IMAGES)[:size], torch.arange(size) % 3)


def step(model, batch):
    loss, embeddings = model(batch)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    model.after_step(0, 1)
    return loss.detach(), [z.detach() for z in embeddings]
