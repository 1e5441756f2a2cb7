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


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet", "timm/test_efficientnet"])
def test_a_backbone_of_timms_takes_the_images_and_comes_back_from_its_file(tmp_path, name):
    backbone = networks.build_backbone(name, 2, 32)
    images = torch.rand(4, 2, 32, 32)
    features = backbone(images)
    assert features.shape == (4, backbone.out_features)
    about = {"architecture": name, "channels": 2, "size": 32}
    networks.export_backbone(tmp_path / "b.safetensors", backbone, **about, mean=(0,), std=(1,))
    loaded = load_backbone(tmp_path / "b.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone.eval()(images))
    every_stage = networks.StageFeatures(loaded)
    assert torch.equal(every_stage(images), loaded(images))
    assert every_stage.widths == {"features": backbone.out_features}


def test_a_transformer_takes_views_of_other_sizes_if_its_patches_do():
    backbone = networks.build_backbone("timm/test_vit", 3, 32)
    assert networks.try_on(backbone, "timm/test_vit", (3, 48, 48)) == backbone.out_features
    assert backbone.training
    with pytest.raises(
        ValueError, match=r"'timm/test_vit' does not take images \[3, 40, 40\] \(.*"
    ):
        networks.try_on(backbone, "timm/test_vit", (3, 40, 40))
    with pytest.raises(
        ValueError, match=r"'timm/test_vit' does not take images \[3, 20, 20\] \(.*"
    ):
        networks.build_backbone("timm/test_vit", 3, 20)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm/test_vitt", r"is none of timm \d.*; did you mean timm/test_vit"),
        ("vgg", r"backbone must be cnn, resnet18, resnet34, resnet50 or timm/NAME, got 'vgg'"),
    ],
)
def test_an_unknown_backbone_is_an_error(name, says):
    with pytest.raises(ValueError, match=says):
        networks.build_backbone(name, 3, 32)


def begin(source, name="timm/test_vit", size=32):
    backbone = networks.build_backbone(name, 3, size)
    return networks.load_weights(backbone, name, str(source), 3, size), backbone


def test_weights_to_begin_with_come_from_any_safetensors_file(tmp_path):
    from safetensors.torch import save_file
    from timm import create_model

    whole = create_model("test_vit", img_size=32).state_dict()
    save_file(whole, tmp_path / "model.safetensors")
    left, backbone = begin(tmp_path / "model.safetensors")
    assert left == ["head.bias", "head.weight"]
    assert all(torch.equal(x, whole[name]) for name, x in backbone.state_dict().items())
    half = {name: x.bfloat16() for name, x in whole.items()}
    save_file(half, tmp_path / "half.safetensors")
    _, backbone = begin(tmp_path / "half.safetensors")
    assert all(x.dtype == torch.float32 for x in backbone.state_dict().values())


def test_weights_to_begin_with_come_from_timm(monkeypatch):
    import timm

    create, asked = timm.create_model, []

    def pretend(name, pretrained, **options):
        asked.append((name, pretrained))
        model = create(name, pretrained=False, **options)
        for parameter in model.parameters() if pretrained else ():
            torch.nn.init.constant_(parameter, 0.125)
        return model

    monkeypatch.setattr(timm, "create_model", pretend)
    _, backbone = begin("timm/test_vit.r160_in1k")
    assert asked == [("test_vit", False), ("test_vit.r160_in1k", True)]
    assert all((x == 0.125).all() for x in backbone.parameters())

    def offline(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"'timm/test_vit' cannot be read \(no network at all\)"):
        networks.load_weights(backbone, "timm/test_vit", "timm/test_vit", 3, 32)


def test_weights_that_do_not_fit_say_where(tmp_path):
    from safetensors.torch import save_file

    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.safetensors")
    left, _ = begin(tmp_path / "resnet.safetensors", "resnet18", 224)
    assert left == ["fc.bias", "fc.weight"]
    says = (
        r"do not fit backbone 'resnet18' for images \[3, 32, 32\]: conv1.weight is \[64, 3, 7, 7\] "
    )
    with pytest.raises(ValueError, match=says + r"there and \[64, 3, 3, 3\] here$"):
        begin(tmp_path / "resnet.safetensors", "resnet18", 32)
    with pytest.raises(ValueError, match=r"cls_token is missing, .* and \d+ more"):
        begin(tmp_path / "resnet.safetensors")


def test_weights_in_a_pickle_are_refused_unread(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "weights.pth").write_bytes((tmp_path / "weights.pt").read_bytes())
    with pytest.raises(ValueError, match=r"weights.pt' cannot be read .*from safetensors files"):
        begin(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pth' cannot be read .*not a safetensors file"):
        begin(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"nowhere' cannot be read .*found no"):
        begin(tmp_path / "nowhere")
