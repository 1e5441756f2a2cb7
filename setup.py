"""Metadata of the fastssl-losses distribution.

The kernels live in the top-level folder ``kernels/`` and are installed as ``fastssl.kernels``, the
benchmarks as ``fastssl.benchmarks`` likewise, so the packages are named one by one here.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "fastssl/__init__.py").read_text(), re.M)[1]

TRAIN = [
    "torchvision",
    "matplotlib",
    "pyyaml",
    "rich",
    "safetensors",
    "scikit-learn",
    "tensorboard",
    "timm",
]
PEERS = ["lightly", "open_clip_torch", "pytorch-metric-learning"]
BENCH = [*PEERS, "matplotlib", "pytest", "pytest-benchmark", "torchvision"]
TEST = [
    *TRAIN,
    *PEERS,
    "hypothesis",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "setuptools",
    "wheel",
]
DEV = [*TEST, "mypy", "ruff", "types-PyYAML"]

setup(
    name="fastssl-losses",
    version=VERSION,
    description="Fused losses for self-supervised learning, exact and without the N x N matrix.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "fastssl",
        "fastssl.benchmarks",
        "fastssl.integrations",
        "fastssl.kernels",
        "fastssl.losses",
        "fastssl.ops",
        "fastssl.streaming",
        "fastssl.trainer",
        "fastssl.trainer.methods",
    ],
    package_dir={"fastssl.benchmarks": "benchmarks", "fastssl.kernels": "kernels"},
    package_data={"fastssl": ["py.typed"], "fastssl.trainer": ["report.html", "presets/*.yaml"]},
    install_requires=["torch>=2.9", "triton>=3.5; platform_system == 'Linux'", "numpy"],
    extras_require={"train": TRAIN, "test": TEST, "bench": BENCH, "dev": DEV},
    entry_points={"console_scripts": ["fastssl = fastssl.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
