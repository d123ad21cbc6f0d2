"""Package `vfm` (the library) and `experiments` (the command line)."""

import pathlib

from setuptools import find_packages, setup

TFDS = ["tensorflow-datasets>=4.9.10", "array_record>=0.8.6", "importlib_resources>=6"]
PREPARE = ["rjieba>=0.2.2"]  # words of Chinese in experiments.prepare

setup(
    name="vfm",
    version="0.1.0",
    description="Vertical foundation models from scratch, for any modalities, in JAX and Flax",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["vfm", "vfm.*", "experiments", "experiments.*"]),
    # Lower bounds are the versions that the tests were run with.
    install_requires=[
        "absl-py>=2.5",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "matplotlib>=3.11",
        "ml_collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13",
        "safetensors>=0.8",
        "scikit-learn>=1.9",
        "scipy>=1.17",
        "tensorboardX>=2.6.5",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "tfds": TFDS,
        "test": [*TFDS, *PREPARE, "pytest>=9.2", "pytest-xdist>=3.8", "ruff>=0.17"],
        "prepare": PREPARE,
        # What parity tests compare with; they skip where it is absent.
        "parity": [
            "torch>=2.13",
            "transformers>=5.23",
            "datasketch>=2.0",
            "tokenizers>=0.23",
            "tiktoken>=0.14",
            "sentencepiece>=0.2.3",
        ],
    },
)
