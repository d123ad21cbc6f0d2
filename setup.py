"""Package `vfm` (the library) and `experiments` (the command line)."""

from setuptools import find_packages, setup

setup(
    name="vfm",
    version="0.1.0",
    description="Vertical foundation models from scratch, for any modalities, in JAX and Flax",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["vfm", "vfm.*", "experiments", "experiments.*", "configs"]),
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12.0",
        "grain>=0.2.12",
        "jax>=0.10.0",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pillow>=10.0",
        "scikit-learn>=1.5",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.0"],
        "cuda13": ["jax[cuda13]>=0.10.0"],
        "tpu": ["jax[tpu]>=0.10.0"],
        "tfds": ["tensorflow-datasets>=4.9.9", "array_record>=0.8", "importlib_resources>=6"],
        "test": ["pytest>=8", "pytest-xdist>=3.6", "tensorflow-datasets>=4.9.9", "array_record>=0.8",
                 "importlib_resources>=6", "ruff>=0.9"],
        "parity": ["torch", "transformers", "safetensors"],
    },
)
