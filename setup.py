"""Package metadata. pyproject.toml configures the tools; constraints.txt pins the tested versions."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron_gmpo",
    version="0.1.0",
    description=(
        "GMPO reinforcement learning of dense and mixture-of-experts language models on Megatron-Core"
    ),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_gmpo", "megatron_gmpo.*"]),
    entry_points={"console_scripts": ["megatron-gmpo = megatron_gmpo.commands:main"]},
    package_data={"megatron_gmpo": ["py.typed", "lab/templates/*.html", "view/page/*"]},
    install_requires=[
        "aiohttp>=3.11,<4",
        "datasets>=4.0",
        "httpx>=0.28,<1",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        # the tests run with these two versions; 0.17 and later need Python 3.12
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        "numpy>=2.0",
        "orjson>=3.10",
        "pandas>=2.2",
        "pillow>=10.1",  # the size of its own font
        "psutil>=6.0",
        "pybase64>=1.4",
        "pydantic>=2.12",
        "rich>=13.9",
        "safetensors>=0.8",
        "sympy>=1.13",
        "tensorboard>=2.18",
        "tomli-w>=1.0",
        "torch>=2.9",
        "transformers>=5.22",
        "xxhash>=3.5",
    ],
    extras_require={
        "gpu": [  # the versions that megatron-core 0.16.1 and 0.19.2 accept
            "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[core_cu13,pytorch]>=2.9; python_version >= '3.12'",
        ],
        "games": ["alfworld==0.4.2", "textworld[pddl]==1.7.0"],  # compiles C++ for minutes: make games
        "reasoning": [
            "reasoning-gym==0.1.25",
            "six>=1.16",  # imported by zss, which reasoning-gym needs, without being declared
        ],
        "wandb": ["wandb>=0.19"],
        "dev": [
            "megatron_gmpo[reasoning]",
            "hypothesis>=6.130",
            "import-linter>=2.3",
            "playwright>=1.50",  # drives Chromium in the tests of the page
            "pyright[nodejs]>=1.1.400",  # node from a wheel: lint needs no network after installation
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "trl==1.16.0",  # an independent GMPO loss to compare with
        ],
    },
)
