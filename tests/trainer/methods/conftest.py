"""Fixtures of the methods' tests."""

import pytest

B = 8


@pytest.fixture
def make():
    """A small method for batches of 8 of 16 images, that is for two steps an epoch."""

    def build(method, **options):
        from fastssl.trainer import Config, networks
        from fastssl.trainer.methods import METHODS

        config = Config(method=method, batch_size=B, epochs=5, **options).resolved()
        model = METHODS[method](networks.build_backbone("cnn", 1, 16), config, 2 * B).train()
        model.given = []
        model.loss.register_forward_pre_hook(lambda _, given: model.given.append(given))
        return model

    return build
