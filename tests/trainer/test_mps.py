"""Nothing in a run needs an operator or a type that PyTorch does not have for a Mac's GPU."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from small_methods import SMALL
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("torchvision")

from torch._C import DispatchKey, DispatchKeySet

import fastssl
from fastssl.streaming import two_views
from fastssl.trainer import Config, data, evaluate, loop, networks, pretrain
from fastssl.trainer.methods import METHODS

# Listed for reasons that do not hold here: float64, which is looked for by itself, pooling to sizes
# that do not divide the input's, and results of another type than the CPU's.
NOT_MEANT = {"to", "double", "cdouble", "float_power", "bincount"}
NOT_MEANT |= {"adaptive_avg_pool1d", "adaptive_avg_pool2d"}
# Of PyTorch 2.14.1's list, where that cannot be read.
KNOWN = ("nn.functional.pdist", "linalg.eig", "linalg.eigvals", "put", "take", "mode", "frexp")


def plain(name: str) -> str:
    """An operator's name without what forward and backward, in-place and module add to it."""
    name = name.removeprefix("nn.functional.").replace(".", "_").strip("_")
    return name.removesuffix("_forward").removesuffix("_backward")


def missing_operators() -> dict[str, list[str]]:
    """The operators that PyTorch's own tests expect not to work, with the types if not for all."""
    spec = find_spec("torch.testing._internal.common_mps")
    tree = ast.parse(Path(spec.origin).read_text() if spec else "")
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "UNIMPLEMENTED_XFAILLIST"
        ):
            names = [ast.literal_eval(key) for key in node.value.keys]
            types = [
                [ast.unparse(x) for x in getattr(value, "elts", ())] for value in node.value.values
            ]
            return {plain(name): of for name, of in zip(names, types, strict=True)}
    return {plain(name): [] for name in KNOWN}


MISSING = {name: of for name, of in missing_operators().items() if name not in NOT_MEANT}


class Mac(TorchDispatchMode):
    """Refuses what the list names, and float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastssl":  # what it consists of is seen too
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        name = plain(func._schema.name.removeprefix("aten::"))
        given = [str(x.dtype) for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if name in MISSING and (not MISSING[name] or given[0] in MISSING[name]):
            raise NotImplementedError(f"{func} is not implemented for MPS")
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func} makes float64, which MPS does not have")
        return result


def test_no_file_that_runs_on_a_device_names_what_is_missing():
    """Devices other than CPUs take ways of their own, which no CPU goes."""
    always = {name for name, types in MISSING.items() if not types} - {"put"}  # a ring has its own
    root = Path(fastssl.__file__).parent
    sources = [root / f"{name}.py" for name in ("distributed", "memory_bank", "trainer/optim")]
    for folder in ("streaming", "ops", "losses", "trainer/methods"):
        sources += (root / folder).glob("*.py")
    for source in sources:
        named = {
            x.attr for x in ast.walk(ast.parse(source.read_text())) if isinstance(x, ast.Attribute)
        }
        assert not {plain(name) for name in named} & always, source


def test_pdist_and_float64_are_refused(monkeypatch):
    """Inside of an operator of fastssl too."""
    assert "pdist" in MISSING
    z = torch.randn(4, 2)
    with Mac(), pytest.raises(NotImplementedError, match="_pdist_forward"):
        F.pdist(z)
    with Mac(), pytest.raises(TypeError, match="float64"):
        z.double()
    monkeypatch.setattr(two_views, "two_view_lse_fwd", lambda z0, *_: F.pdist(z0))
    with Mac(), pytest.raises(NotImplementedError, match="pdist"):
        fastssl.functional.nt_xent(z, z)


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_of_a_method_is_a_macs(tiny, monkeypatch, method):
    def watch(name):
        own = getattr(loop.Trainer, name)

        def watched(*given):
            with Mac():
                return own(*given)

        monkeypatch.setattr(loop.Trainer, name, watched)

    watch("_train_step")  # beside the loader, which keeps to the CPU
    watch("_end_epoch")
    run = pretrain(Config(**tiny(method=method, epochs=1, knn_every=1, **SMALL[method])))
    assert run.history[0]["knn_accuracy"] is not None


def test_an_evaluation_is_a_macs(monkeypatch):
    monkeypatch.setitem(evaluate.FEW_LABELS, "steps", 2)
    digits = data.load("digits")
    few = torch.utils.data.Subset(digits.train, range(20))
    digits.test = few
    with Mac():
        backbone = networks.build_backbone("cnn", 1, 16)
        network = evaluate.train_on_few(backbone, few, data=digits, device="cpu", seed=0)
        assert 0 <= evaluate.accuracy(network, digits, "cpu") <= 1
