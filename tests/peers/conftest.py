"""Other projects' implementations as oracles. A peer that is not installed skips its tests, saying what to install."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


def load_file(package, path):
    """One module of a package by its path, without importing the package (whose other parts may want a GPU)."""
    spec = find_spec(package)
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    file = next((f / path for f in folders if (f / path).is_file()), None)
    if file is None:
        pytest.skip(f"{package} is not installed (pip install --no-deps {package} is enough: only {path} is read)")
    name = f"peer_{package}_{file.stem}"
    loaded = module_from_spec(spec_from_file_location(name, file))
    sys.modules[name] = loaded
    loaded.__spec__.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def vllm_ops():
    return load_file("vllm", "lora/ops/torch_ops/lora_ops.py")


@pytest.fixture(scope="session")
def sglang_ops():
    return load_file("sglang", "srt/lora/torch_ops/lora_ops.py")
