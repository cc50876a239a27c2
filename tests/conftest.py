"""Fixtures shared by all tests: tiny models, no network, and results outside the repository."""

import os
from functools import cache

# huggingface_hub reads this once, when it is imported, and most modules below import it.
os.environ["HF_HUB_OFFLINE"] = "1"
# `make test` runs two processes, and two threads each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import sts.stages  # noqa: F401  (registers all stages)
from sts.book.chapters import build_book
from sts.engine.models import load_model
from sts.engine.packaged import save_random_model
from sts.run.stage import STAGES


@pytest.fixture(scope="session", autouse=True)
def isolation(tmp_path_factory):
    """Results go to a temporary folder; local data sets of the caller are not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("STS_RESULTS", str(tmp_path_factory.mktemp("results")))
        patch.delenv("STS_DATA_DIR", raising=False)
        yield


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist 3.8 reads the marks, which it cannot under pytest 9.2
def pytest_collection_modifyitems(items):
    """A file's tests run in one process, and so do all that need a built book: each book is built once."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("book" if item.path.parent.name == "book" else item.path.stem))


@pytest.fixture(scope="session")
def built():
    """Run -> index.html of its book, each built once."""
    return cache(build_book)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Family -> folder of a random two-layer model; the Gemmas' first layer has a sliding window of 32 tokens."""
    folder = tmp_path_factory.mktemp("tiny-models")
    settings = {"llama": {}, "qwen2": {}, "gemma2": {"sliding_window": 32}, "gemma3": {"sliding_window": 32}}
    return {family: save_random_model(family, folder / family, **own) for family, own in settings.items()}


@pytest.fixture(scope="session")
def tiny_lm(request, tiny_models):
    """A random float32 LanguageModel; never change it. Llama unless parametrised:

    `@pytest.mark.parametrize("tiny_lm", ["llama", "qwen2", "gemma2", "gemma3"], indirect=True)`
    """
    return load_model(str(tiny_models[getattr(request, "param", "llama")]), dtype="float32")


@pytest.fixture(scope="session")
def lm_of(tiny_models):
    """Family -> random float32 LanguageModel, each loaded once; never change them."""
    loaded = {}

    def load(family):
        if family not in loaded:
            loaded[family] = load_model(str(tiny_models[family]), dtype="float32")
        return loaded[family]

    return load


@pytest.fixture
def registry():
    """The registered stages; what a test adds to them is gone after it."""
    before = dict(STAGES)
    yield STAGES
    STAGES.clear()
    STAGES.update(before)
