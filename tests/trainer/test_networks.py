"""Backbones, and the file that holds one."""

import pytest
import torch

pytest.importorskip("torchvision")
import torchvision

from fastssl.trainer import load_backbone, networks


@pytest.mark.parametrize("name", [name for name in networks.BACKBONES if name != "cnn"])
def test_resnets_keep_torchvisions_names_and_shapes(name):
    original = getattr(torchvision.models, name)().state_dict()
    ours = networks.build_backbone(name, 3, 224).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in original.items() if not k.startswith("fc.")
    }


def test_resnets_keep_the_resolution_of_small_images():
    for size, side in ((32, 4), (224, 7)):
        backbone = networks.build_backbone("resnet18", 3, size).eval()
        seen = []
        backbone.avgpool.register_forward_hook(lambda *a, seen=seen: seen.append(a[1][0].shape))
        features = backbone(torch.rand(1, 3, size, size))
        assert features.shape == (1, backbone.out_features)
        assert seen[0][-1] == side


@pytest.mark.parametrize(("name", "channels", "size"), [("cnn", 1, 16), ("resnet18", 1, 96)])
def test_an_exported_backbone_computes_the_same(tmp_path, name, channels, size):
    backbone = networks.build_backbone(name, channels, size)
    images = torch.rand(4, channels, size, size)
    backbone(images)  # moves the running statistics
    path = tmp_path / "backbone.safetensors"
    about = {"architecture": name, "channels": channels, "size": size}
    networks.export_backbone(path, backbone, **about, mean=(0.5,), std=(0.25,))
    loaded = load_backbone(tmp_path)
    assert not loaded.training
    assert loaded.about == {**about, "mean": [0.5], "std": [0.25]}
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone.eval()(images))
    written = {path.read_bytes()}
    for _ in range(9):
        networks.export_backbone(path, backbone, **about, mean=(0.5,), std=(0.25,))
        written.add(path.read_bytes())
    assert len(written) == 1
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_backbone(path)
    with pytest.raises(ValueError, match=r"found no .*nowhere"):
        load_backbone(tmp_path / "nowhere")


def test_a_head_without_norm_is_a_plain_perceptron():
    head = networks.ProjectionHead(4, 8, 2, norm="none", last_norm=False)
    x = torch.randn(1, 4)
    first, last = (module for module in head if isinstance(module, torch.nn.Linear))
    torch.testing.assert_close(head(x), last(first(x).relu()))
    assert first.bias is not None
