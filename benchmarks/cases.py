"""What is measured: every public loss and primitive, at which sizes, beside whose.

A case is one entry of ``CASES``. Its functions take the inputs in order, on their device, and peers
are made when they are measured, so that one that is not installed is skipped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl import functional, reference
from fastssl.benchmarks.report import STEP
from fastssl.ops import backend as backends
from fastssl.ops import energy
from fastssl.ops.similarity import similarity_lse
from fastssl.ops.soft_cross_entropy import soft_cross_entropy

Loss = Callable[..., Tensor]
Size = tuple[int, ...]
Sizes = Mapping[str, Sequence[Size]]  # by level

LEVELS = {
    "tiny": "seconds, for a rehearsal that means nothing",
    "small": "minutes on a CPU; the default there",
    "key": "one to three sizes of each loss that a large GPU trains with",
    "full": "every size; the default on a GPU",
}
OURS = ("fastssl", "plain", "compiled")
CUDA_ONLY = ("inf-cl", "siglip-kernel", "cut-cross-entropy")
PROVIDERS = (*OURS, "lightly", "open_clip", "pml", *CUDA_ONLY)
PASSES = (STEP, "forward")
WHOLE_STEP = "simclr_step"
CHECKED = 2**22  # entries of the plain loss's matrix in a check, in float64 too
TEMPERATURE = 0.1
CLASSES = 100
GLOBAL_CROPS, CROPS = 2, 8


@dataclass(frozen=True)
class Case:
    """A loss or primitive and all that is needed to measure it.

    Args:
        name: Of the function, as ``--losses`` takes it.
        title: What its rows are called.
        inputs: Of a size, float32 on a CPU.
        fused: Ours, called with the inputs.
        plain: The same function in plain PyTorch.
        operations: Of a size: what the products take that no exact method does without, forward
            alone and with the backward pass.
        matrix: Of a size: the entries of the matrix that a plain loss stores.
        sizes: For each of ``LEVELS``, what stands in a row's ``axes``.
        axes: Names of a size's numbers.
        traffic: How many times the inputs that get gradients must be read or written, forward
            alone and with the backward pass.
        fixed: How many inputs, the last ones, get no gradient.
        backward: Whether there is a gradient.
        peers: Makers of other libraries' functions, by provider.
        hungry: Bytes that a peer takes of a size, where that is more than a few of the matrix.
        variants: Makers of functions that are all ours, measured instead of ours, plain and peers.
    """

    name: str
    title: str
    inputs: Callable[..., list[Tensor]]
    fused: Loss
    plain: Loss
    operations: Callable[..., tuple[float, float]]
    matrix: Callable[..., int]
    sizes: Sizes
    axes: tuple[str, ...] = ("rows", "features")
    traffic: tuple[float, float] = (1, 3)
    fixed: int = 0
    backward: bool = True
    peers: dict[str, Callable[[], Loss]] = field(default_factory=dict)
    hungry: dict[str, Callable[..., int]] = field(default_factory=dict)
    variants: dict[str, Callable[[], Loss]] = field(default_factory=dict)

    def providers(self) -> list[str]:
        """Whose functions are measured, ours first."""
        return [*(self.variants or OURS), *self.peers]

    def passes(self) -> tuple[str, ...]:
        """Which of ``PASSES`` are measured."""
        return PASSES if self.backward else PASSES[1:]

    def place(
        self, size: Size, device: str, dtype: torch.dtype, seed: int = 0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs that get gradients, and the others, on a device and rows in a type."""
        torch.manual_seed(seed)
        with torch.device(device):
            inputs = self.inputs(*size)
        inputs = [x.to(dtype) if x.is_floating_point() and x.dim() else x for x in inputs]
        inputs = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        leaves = inputs[: len(inputs) - self.fixed]
        return leaves, inputs[len(leaves) :]

    def checked(self, size: Size) -> Size:
        """A size to check a loss at: this one, or the largest that a check has memory for."""
        sizes = [size, *(x for sizes in self.sizes.values() for x in sizes)]
        few = [x for x in sizes if self.matrix(*x) <= CHECKED]
        return size if size in few else max(few, key=lambda x: self.matrix(*x))

    def make(self, provider: str) -> Loss:
        """A provider's function, or ImportError."""
        if provider == "compiled":
            torch._dynamo.reset()  # else a second size is compiled for all sizes
            return torch.compile(self.plain, dynamic=False)
        ours = {"fastssl": lambda: self.fused, "plain": lambda: self.plain}
        return (ours | self.variants | self.peers)[provider]()


def named(option: str, given: str | None, known: Iterable[str]) -> list[str]:
    """Comma-separated names, all of them known; without any, all that are known."""
    known = list(dict.fromkeys(known))
    names = known if given is None else given.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must be of {', '.join(known)}, got {name!r}")
    return names


def choose(losses: str | None, providers: str | None) -> tuple[list[Case], list[str]]:
    """The cases and providers that these names stand for; routes only where they are named."""
    names = named("losses", losses, [*(case.name for case in CASES), WHOLE_STEP])
    chosen = [case for case in CASES if case.name in names and (losses or not case.variants)]
    return chosen, named("providers", providers, PROVIDERS)


def pairs(n: int, d: int) -> list[Tensor]:
    """Unit rows of two kinds, a pair a little closer than others."""
    one = torch.randn(n, d)
    return [normalize(one, dim=1), normalize(one + 6 * torch.randn(n, d), dim=1)]


def scores(b: int, k: int) -> Tensor:
    """Cosines of samples and prototypes, small enough for no exponential of a peer to overflow."""
    return (0.3 * torch.randn(b, k)).clamp(-1, 1)


def two_view_operations(n: int, d: int) -> tuple[float, float]:
    """Half of the symmetric (2N)^2 products; backward again, and one product for the gradient."""
    product = 2 * (2 * n) ** 2 * d
    return product / 2, 2 * product


def energy_operations(n: int, d: int) -> tuple[float, float]:
    """Squares of a D x D matrix by the shorter route, with its symmetric halves."""
    product = 2 * n * d * min(n, d)
    return product, 3 * product


def summed(function: Callable[..., tuple[Tensor, ...]]) -> Loss:
    """A function of several losses as their sum."""
    return lambda *inputs: torch.stack(function(*inputs)).sum()


def crops_of(function: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Loss:
    """A loss of two lists of crops as one of all crops."""
    return lambda *crops: function(list(crops[:GLOBAL_CROPS]), list(crops[GLOBAL_CROPS:])).sum()


def lightly(name: str, *options: Any) -> Callable[[], Loss]:
    """Make one of lightly's losses."""
    return lambda: getattr(import_module("lightly.loss"), name)(*options)


def lightly_moco() -> Loss:
    """Its loss with a bank that is there already: what the update of it takes is not counted."""
    criterion = import_module("lightly.loss").NTXentLoss(TEMPERATURE, (2, 1))
    criterion.memory_bank._dequeue_and_enqueue = lambda batch: None

    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        criterion.memory_bank.bank = queue
        return criterion(query, key)

    return loss


def lightly_swav() -> Loss:
    return crops_of(import_module("lightly.loss").SwaVLoss())


def open_clip(name: str, of: Callable[[Any], Loss] = lambda loss: loss) -> Callable[[], Loss]:
    """Make one of open_clip's losses, or something of it."""
    return lambda: of(getattr(import_module("open_clip.loss"), name)())


def pml_nt_xent() -> Loss:
    criterion = import_module("pytorch_metric_learning.losses").NTXentLoss(TEMPERATURE)
    return lambda z0, z1: criterion(
        torch.cat([z0, z1]), torch.arange(len(z0), device=z0.device).repeat(2)
    )


def pml_supcon() -> Loss:
    distances = import_module("pytorch_metric_learning.distances")
    products = distances.DotProductSimilarity(normalize_embeddings=False)
    losses = import_module("pytorch_metric_learning.losses")
    criterion = losses.SupConLoss(0.07, distance=products)
    return lambda features, labels: criterion(features.flatten(0, 1), labels.repeat_interleave(2))


def inf_cl(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """Its cross-entropy of each row, in one direction."""
    function = import_module("inf_cl").cal_flash_loss
    return function(q, k, scale=scale, head_dim=min(256, q.shape[1]))


def cut_cross_entropy(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """Its mean cross-entropy, in one direction."""
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return function(scale * q, k, torch.arange(len(q), device=q.device))


def importable(module: str, loss: Loss) -> Callable[[], Loss]:
    """Make a loss whose module is there, or raise ImportError."""

    def make() -> Loss:
        import_module(module)
        return loss

    return make


def both_directions(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """CLIP's loss from a cross-entropy in one direction."""
    return lambda image, text, scale: (
        (function(image, text, scale).mean() + function(text, image, scale).mean()) / 2
    )


def one_direction(function: Callable[[Tensor, Tensor, float], Tensor]) -> Loss:
    """InfoNCE within a batch from a cross-entropy of unit rows."""
    return lambda query, key: function(
        normalize(query, dim=1), normalize(key, dim=1), 1 / TEMPERATURE
    ).mean()


def siglip_kernel() -> Loss:
    function = import_module("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: function(image, text, scale.log(), bias)


def routed(function: Loss, route: str) -> Callable[[], Loss]:
    """A loss that takes one of the two routes of ``cross_energy`` whatever its shape."""

    def loss(*views: Tensor) -> Tensor:
        with mock.patch.object(energy, "takes_dual_route", return_value=route == "dual"):
            return function(*views)

    return lambda: loss


def fused_similarity_lse(q: Tensor, k: Tensor) -> Tensor:
    scale = torch.full((), 1 / TEMPERATURE, device=q.device, dtype=_wide(q))
    return similarity_lse(q, k, scale, backend=backends.resolve("auto", q))


def fused_cross_energy(u: Tensor, v: Tensor) -> Tensor:
    backend = backends.resolve("auto", u)
    return energy.cross_energy(u, v, eps=1e-5, standardize=True, backend=backend)[0]


def plain_cross_energy(u: Tensor, v: Tensor) -> Tensor:
    c = reference.standardize(u, 1e-5).T @ reference.standardize(v, 1e-5) / len(u)
    return c.square().sum() - c.diagonal().square().sum()


def fused_soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    backend = backends.resolve("auto", logits)
    return soft_cross_entropy(logits, targets, temperature=TEMPERATURE, backend=backend)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _with_temperature(function: Loss) -> Loss:
    return lambda *inputs: function(*inputs, temperature=TEMPERATURE)


PAIRS = {  # of pairs N and features D
    "tiny": [(24, 16)],
    "small": [(n, 128) for n in (256, 1024, 4096, 8192, 16384)],
    "key": [(256, 128), (2048, 128), (32768, 128)],
    "full": [(n, d) for d in (128, 256) for n in (256, 1024, 4096, 16384, 32768, 65536)],
}
FEW_PAIRS = {
    "tiny": [(24, 16)],
    "small": [(2048, 128)],
    "key": [(2048, 128)],
    "full": [(n, 128) for n in (256, 2048, 8192, 32768)],
}
IMAGE_TEXT = {
    "tiny": [(24, 16)],
    "small": [(1024, 512), (4096, 512)],
    "key": [(4096, 512), (65536, 768)],
    "full": [(n, d) for d in (512, 768) for n in (4096, 16384, 65536, 131072)],
}
QUEUE = {
    "tiny": [(24, 40, 16)],
    "small": [(256, 65536, 128)],
    "key": [(256, 65536, 128)],
    "full": [(256, 16384, 128), (256, 65536, 128), (1024, 65536, 256)],
}
LABELLED = {  # of views, two of each sample
    "tiny": [(48, 16)],
    "small": [(4096, 128)],
    "key": [(4096, 128)],
    "full": [(n, 128) for n in (512, 4096, 16384, 65536)],
}
PROJECTIONS = {  # small ones: of a small batch ever wider, then a large narrow batch
    "tiny": [(12, 20)],
    "small": [*((512, d) for d in (512, 1024, 2048, 4096, 8192)), (256, 16384), (4096, 1024)],
    "key": [(1024, 8192), (256, 32768), (4096, 2048)],
    "full": [
        *((1024, d) for d in (2048, 4096, 8192, 16384)),
        *((256, 8192), (256, 32768), (4096, 2048), (4096, 8192)),
    ],
}
PROTOTYPES = {
    "tiny": [(24, 40)],
    "small": [(256, 3000), (4096, 3000), (1024, 65536)],
    "key": [(4096, 3000), (4096, 131072)],
    "full": [*((b, 3000) for b in (256, 1024, 4096)), (4096, 16384), (4096, 65536), (4096, 131072)],
}
CROP_SCORES = {
    "tiny": [(24, 40)],
    "small": [(512, 3000)],
    "key": [(4096, 3000)],
    "full": [(256, 3000), (1024, 3000), (4096, 3000)],
}
PREDICTIONS = {
    "tiny": [(24, 16)],
    "small": [(256, 2048), (4096, 2048)],
    "key": [(4096, 2048)],
    "full": [(256, 2048), (4096, 2048)],
}
ROUTES = {
    level: [(n, d) for n in (256, 512, 1024) for d in (256, 512, 768, 1024, 1536, 2048)]
    for level in LEVELS
} | {"tiny": [(12, 20)]}


def _clip(scale: float, sizes: Sizes) -> Case:
    return Case(
        "clip",
        f"CLIP at {scale:g}",
        lambda n, d: [*pairs(n, d), torch.tensor(scale)],
        functional.clip,
        reference.clip,
        lambda n, d: (2 * n * n * d, 4 * 2 * n * n * d),
        lambda n, d: n * n,
        sizes,
        peers={
            "open_clip": open_clip("ClipLoss"),
            "inf-cl": importable("inf_cl", both_directions(inf_cl)),
            "cut-cross-entropy": importable(
                "cut_cross_entropy", both_directions(cut_cross_entropy)
            ),
        },
    )


def _redundancy(name: str, title: str, lightly_name: str) -> list[Case]:
    def case(title: str, sizes: Sizes, **options: Any) -> Case:
        return Case(
            "routes" if "variants" in options else name,
            title,
            lambda n, d: list(torch.randn(2, n, d)),
            getattr(functional, name),
            getattr(reference, name),
            energy_operations,
            lambda n, d: (2 if name == "vicreg" else 1) * d * d,
            sizes,
            **options,
        )

    function = getattr(functional, name)
    routes = {route: routed(function, route) for route in ("features", "dual")}
    return [
        case(title, PROJECTIONS, peers={"lightly": lightly(lightly_name)}),
        case(f"{title} routes", ROUTES, variants=routes),
    ]


CASES: Sequence[Case] = [
    Case(
        "nt_xent",
        "NT-Xent",
        lambda n, d: list(torch.randn(2, n, d)),
        _with_temperature(functional.nt_xent),
        _with_temperature(reference.nt_xent),
        two_view_operations,
        lambda n, d: (2 * n) ** 2,
        PAIRS,
        peers={"lightly": lightly("NTXentLoss", TEMPERATURE), "pml": pml_nt_xent},
        hungry={"pml": lambda n, d: 16 * (2 * n) ** 3},
    ),
    *(_clip(100.0, IMAGE_TEXT), _clip(14.3, IMAGE_TEXT | {"key": [], "full": []})),
    Case(
        "distill_clip",
        "CLIP with a teacher",
        lambda n, d: [*pairs(n, d), torch.tensor(14.3), *pairs(n, d), torch.tensor(50.0)],
        summed(functional.distill_clip),
        summed(reference.distill_clip),
        lambda n, d: (2 * 2 * n * n * d, 6 * 2 * n * n * d),
        lambda n, d: 2 * n * n,
        IMAGE_TEXT,
        fixed=3,
        peers={"open_clip": open_clip("DistillClipLoss", summed)},
    ),
    Case(
        "siglip",
        "SigLIP",
        lambda n, d: [*pairs(n, d), torch.tensor(10.0), torch.tensor(-10.0)],
        functional.siglip,
        reference.siglip,
        lambda n, d: (2 * n * n * d, 3 * 2 * n * n * d),
        lambda n, d: n * n,
        IMAGE_TEXT,
        peers={"open_clip": open_clip("SigLipLoss"), "siglip-kernel": siglip_kernel},
    ),
    Case(
        "info_nce",
        "MoCo queue",
        lambda n, k, d: [*pairs(n, d), normalize(torch.randn(k, d), dim=1)],
        _with_temperature(functional.info_nce),
        _with_temperature(reference.info_nce),
        lambda n, k, d: (2 * n * k * d, 2 * 2 * n * k * d),
        lambda n, k, d: n * k,
        QUEUE,
        axes=("rows", "columns", "features"),
        fixed=2,
        peers={"lightly": lightly_moco},
    ),
    Case(
        "info_nce",
        "InfoNCE",
        pairs,
        _with_temperature(functional.info_nce),
        _with_temperature(reference.info_nce),
        lambda n, d: (2 * n * n * d, 4 * 2 * n * n * d),
        lambda n, d: n * n,
        FEW_PAIRS,
        peers={
            "inf-cl": importable("inf_cl", one_direction(inf_cl)),
            "cut-cross-entropy": importable("cut_cross_entropy", one_direction(cut_cross_entropy)),
        },
    ),
    Case(
        "supcon",
        f"SupCon, {CLASSES} classes",
        lambda n, d: [
            normalize(torch.randn(n // 2, 2, d), dim=2),
            torch.randint(0, CLASSES, (n // 2,)),
        ],
        functional.supcon,
        reference.supcon,
        lambda n, d: two_view_operations(n // 2, d),
        lambda n, d: n * n,
        LABELLED,
        fixed=1,
        peers={"pml": pml_supcon},
    ),
    Case(
        "dcl",
        "DCL",
        pairs,
        functional.dcl,
        reference.dcl,
        two_view_operations,
        lambda n, d: (2 * n) ** 2,
        FEW_PAIRS,
        peers={"lightly": lightly("DCLLoss")},
    ),
    *_redundancy("barlow_twins", "Barlow Twins", "BarlowTwinsLoss"),
    *_redundancy("vicreg", "VICReg", "VICRegLoss"),
    Case(
        "sinkhorn_knopp",
        "Sinkhorn",
        lambda b, k: [scores(b, k)],
        functional.sinkhorn_knopp,
        torch.no_grad()(reference.sinkhorn_knopp),
        lambda b, k: (0, 0),
        lambda b, k: b * k,
        PROTOTYPES,
        traffic=(5, 5),  # four reads and one write
        backward=False,
        peers={"lightly": lambda: import_module("lightly.loss.swav_loss").sinkhorn},
    ),
    Case(
        "swav",
        f"SwaV {GLOBAL_CROPS} + {CROPS - GLOBAL_CROPS} crops",
        lambda b, k: [scores(b, k) for _ in range(CROPS)],
        crops_of(functional.swav),
        crops_of(reference.swav),
        lambda b, k: (0, 0),
        lambda b, k: CROPS * b * k,
        CROP_SCORES,
        # Each crop is read forward and backward and its gradient written; codes take five each.
        traffic=(1 + 5 * GLOBAL_CROPS / CROPS, 3 + 5 * GLOBAL_CROPS / CROPS),
        peers={"lightly": lightly_swav},
    ),
    Case(
        "negative_cosine_similarity",
        "negative cosine",
        lambda n, d: list(torch.randn(2, n, d)),
        functional.negative_cosine_similarity,
        reference.negative_cosine_similarity,
        lambda n, d: (0, 0),
        lambda n, d: n * d,
        PREDICTIONS,
        peers={"lightly": lightly("NegativeCosineSimilarity")},
    ),
    Case(
        "similarity_lse",
        "similarity log-sum-exp",
        pairs,
        fused_similarity_lse,
        lambda q, k: reference.similarity_lse(q, k, 1 / TEMPERATURE),
        lambda n, d: (2 * n * n * d, 4 * 2 * n * n * d),
        lambda n, d: n * n,
        FEW_PAIRS,
    ),
    Case(
        "cross_energy",
        "cross product energy",
        lambda n, d: list(torch.randn(2, n, d)),
        fused_cross_energy,
        plain_cross_energy,
        energy_operations,
        lambda n, d: d * d,
        PROJECTIONS | {"small": [(512, 2048), (2048, 512)]},
    ),
    Case(
        "soft_cross_entropy",
        "soft cross-entropy",
        lambda b, k: [scores(b, k), torch.softmax(scores(b, k) / TEMPERATURE, 1)],
        fused_soft_cross_entropy,
        lambda logits, targets: reference.soft_cross_entropy(logits, targets, TEMPERATURE),
        lambda b, k: (0, 0),
        lambda b, k: b * k,
        CROP_SCORES,
        traffic=(2, 5),  # logits and targets; both again, and the gradient
        fixed=1,
    ),
]
