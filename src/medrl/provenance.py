"""Where a number came from: versions and machine, as plain facts for run and evaluation folders."""

import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("medrl", "torch", "transformers", "tokenizers", "numpy", "pillow", "peft", "accelerate")


def describe_versions() -> dict[str, Any]:
    """{"versions": {package: version}} of what computes; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions}


def medrl_version() -> str:
    """``0.1.0``; ``uninstalled`` where the program runs from its source alone."""
    try:
        return importlib.metadata.version("medrl")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"


@functools.cache
def code_version() -> str:
    """``0.1.0+3f9c0a1b2c4d``: medrl's version, and a hash over its source, which tells two working copies apart."""
    source = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(f"{path.relative_to(source).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return f"{medrl_version()}+{digest.hexdigest()[:12]}"


def describe_machine() -> dict[str, Any]:
    """{"machine": {...}}: kind of processor and accelerator; no host or user name."""
    import torch

    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    return {"machine": machine}
