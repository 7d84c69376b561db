"""A policy that is small enough to be exact with, and a few questions about images of noise."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image

from medrl.policy.policy import Policy
from medrl.policy.tiny import build_model, train_processor
from medrl.types import LETTERS, Example

# How long an example takes says something about the machine, not about the program.
hypothesis.settings.register_profile("medrl", deadline=None)
hypothesis.settings.load_profile("medrl")

WORDS = ("Which modality was used?", "CT", "MRI", "ultrasound", "X-ray", "Reason in think, then give the letter.")
SIZES: dict[str, Any] = {
    "hidden": 32,
    "layers": 2,
    "intermediate": 48,
    "vision_hidden": 32,
    "vision_layers": 2,
    "context_tokens": 512,
}


def pytest_collection_modifyitems(items):
    """Tests of the CUDA kernels are skipped where there is no GPU, by name, not left out in silence."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def run_interpreted():
    """Run a test file again in a process in which Triton interprets its kernels: it decides that when imported."""

    def run(file: str) -> None:
        if Version(version("triton")) < Version("3.9") and Version(np.__version__) >= Version("2.5"):
            pytest.skip("this Triton's interpreter needs a numpy below 2.5")
        words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not gpu", file]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
        assert " passed" in found.stdout

    return run


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Fingerprints of test images are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors are faster without threads, and sums then have one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor():
    """56 pixels squared per image: 16 patches, 4 image tokens."""
    return train_processor(WORDS * 4, vocab_size=320, image_px=56)


@pytest.fixture(scope="session")
def make_model(processor) -> Callable[..., Any]:
    """A random Qwen2-VL as transformers has it, untouched by a policy; the same arguments give the same weights."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 0.34, **sizes: int) -> Any:
        model = build_model(processor, seed=seed, dtype=dtype, **SIZES, **sizes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                # The initial weights of so narrow a model are so large that rounding shows and one token takes all.
                if parameter.ndim >= 2:
                    parameter.mul_(spread)
                else:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.1 * noise.to(dtype))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_policy(make_model, processor) -> Callable[..., Policy]:
    def make(dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 0.34, **sizes: int) -> Policy:
        return Policy(make_model(dtype, seed, spread, **sizes), copy.deepcopy(processor))

    return make


@pytest.fixture(scope="session")
def policy(make_policy) -> Policy:
    """The float64 policy. Shared: whoever changes weights makes one with ``make_policy``."""
    return make_policy()


@pytest.fixture(scope="session")
def noise() -> Callable[..., Image.Image]:
    """A picture of random colors; the seed decides them."""

    def make(seed: int, width: int = 56, height: int = 56) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="session")
def make_examples(noise) -> Callable[..., list[Example]]:
    """Questions of different lengths about different images."""

    def make(folder: Path, n: int = 6, prefix: str = "example") -> list[Example]:
        folder.mkdir(parents=True, exist_ok=True)
        examples = []
        for i in range(n):
            path = folder / f"{prefix}-{i}.png"
            noise(1000 + i).save(path)
            options = ("CT", "MRI", "ultrasound", "X-ray")[: 2 + i % 3]
            examples.append(
                Example(
                    id=f"{prefix}-{i}",
                    source="noise",
                    images=(path,),
                    question="Which modality was used?" + " Look again." * (i % 3),
                    options=options,
                    target=LETTERS[i % len(options)],
                    modality="MRI" if i % 2 else "CT",
                    question_type="Modality Recognition",
                )
            )
        return examples

    return make
