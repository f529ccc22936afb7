"""Packaging of the two packages and their extras (each requirement is explained in docs/dependencies.md)."""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.11",
    "torchvision>=0.26",
    "timm>=1.0.20",
    "numpy>=2.0",
    "scipy>=1.13",
    "shapely>=2.0.4",
    "pyogrio>=0.9",
    "opencv-python-headless>=4.9",
    "pillow>=10.0",
    "pytorch-lightning>=2.5,!=2.6.2,!=2.6.3",
    "hydra-core>=1.3.2",
    "safetensors>=0.4.3",
    "fsspec>=2024.6",
    "rich>=13.7",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "tensorboard>=2.17",
]

EXTRAS = {
    "city": ["eclipse-sumo>=1.20", "trimesh>=4.4", "embreex>=2.17.7"],
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.19"],
    "parquet": ["pyarrow>=15"],
    "ray": ["ray>=2.35"],
    "mm": ["mmengine-lite>=0.10.5", "mmcv-lite==2.2.0"],
    "dev": ["pytest>=8.2", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.6"],
}

setup(
    name="diffusiondrive",
    version="0.1.0",
    description="Truncated-diffusion driving planner with an exact, batched NAVSIM evaluator",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["diffusiondrive*", "navsim_eval*"]),
    package_data={"navsim_eval": ["**/*.npz", "**/*.json", "**/*.css", "**/*.js"], "diffusiondrive": ["**/*.npy"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
