from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastssl import NTXentLoss, SwaVLoss
from fastssl.functional import nt_xent
from fastssl.trainer import Config, networks, verify
from fastssl.trainer.methods import METHODS

SMALL = {"steps": 4, "batch_size": 16}
forward = NTXentLoss.forward


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def test_every_method_with_a_loss_of_ours_has_a_reference() -> None:
    plain = set()
    for name, method in METHODS.items():
        config = Config(method=name).resolved()
        loss = method(networks.build_backbone("cnn", 1, 16), config, 256).loss
        if type(loss).__module__.startswith("torch."):
            plain.add(name)
    assert plain == {"rotation", "jigsaw", "relative-patch"}
    assert verify.REFERENCES.keys() == METHODS.keys() - plain


@pytest.mark.parametrize("method", verify.REFERENCES)
def test_the_fused_loss_passes_and_is_plotted(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.verify(method, **SMALL, out=tmp_path / "plots")
    assert (tmp_path / f"plots/verify-{method}.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    has_triton = torch.cuda.is_available() and method not in verify.KERNEL_FREE
    assert printed.count("│ pass") == 2 + has_triton
    assert "FAIL" not in printed


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * (1 + 1e-3)


MUTATIONS = {
    "value off by a thousandth": lambda self, a, b: forward(self, a, b) * (1 + 1e-3),
    "gradient off by a thousandth": lambda self, a, b: WrongGradient.apply(forward(self, a, b)),
    "half of the gradient missing": lambda self, a, b: forward(self, a, b.detach()),
    "not a number": lambda self, a, b: forward(self, a, b) * float("nan"),
    "another temperature": lambda self, a, b: nt_xent(a, b, 0.501),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_loss_fails(
    mutation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(NTXentLoss, "forward", MUTATIONS[mutation])
    assert not verify.verify("simclr", **SMALL)
    printed = capsys.readouterr().out
    assert printed.count("│ FAIL") == 2 + torch.cuda.is_available()
    assert "torch, float32:" in printed


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("barlow", "lambda_param", 5.05e-3),
        ("vicreg", "lambda_param", 25.1),
        ("swav", "temperature", 0.1001),
        ("supcon", "temperature", 0.1001),
        ("moco", "temperature", 0.2002),
        ("pirl", "temperature", 0.2002),
        ("swav", "sinkhorn_epsilon", 0.0501),
    ],
)
def test_a_wrong_option_fails(
    method: str, option: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = METHODS[method].__init__

    def wrong(self: torch.nn.Module, *arguments: object) -> None:
        right(self, *arguments)
        setattr(self.loss, option, value)

    monkeypatch.setattr(METHODS[method], "__init__", wrong)
    assert not verify.verify(method, **SMALL)


def test_a_queue_that_is_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SwaVLoss.forward
    monkeypatch.setattr(SwaVLoss, "forward", lambda self, high, low, queue: right(self, high, low))
    assert not verify.verify("swav", **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "simclear"},
            "method must be one whose loss is fastssl's, simclr.*got 'simclear'",
        ),
        ({"method": "rotation"}, "method must be one whose loss is .* got 'rotation'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be 2 to 1437, got 1"),
        ({"batch_size": 9999}, "batch_size must be 2 to 1437, got 9999"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify.verify(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU here")
@pytest.mark.parametrize("method", verify.REFERENCES)
def test_the_triton_backend_joins_in_the_interpreter(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert verify.verify(method, steps=2)
    printed = capsys.readouterr().out
    has_triton = method not in verify.KERNEL_FREE
    assert ("triton, float32" in printed) == has_triton
    assert printed.count("│ pass") == 2 + has_triton
    assert "2 steps of 12 images" in " ".join(printed.split())
