import warnings

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet():
    """PEFT and transformers warn a lot about tiny models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
