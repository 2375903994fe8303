"""A small real corpus, prepared once: 120 documents of made-up Python, about 60 kB."""

import pytest
from made_up import made_up_documents, write_documents

from dsmoe.config import DataConfig
from dsmoe.data.prepare import prepare


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Folder of 120 text files."""
    return write_documents(tmp_path_factory.mktemp("texts"), made_up_documents(120))


@pytest.fixture(scope="session")
def dataset(texts, tmp_path_factory):
    """The texts, prepared; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare([str(texts)], folder, vocab_size=400, valid_fraction=0.1, workers=1)
    return folder


@pytest.fixture
def data(dataset, tmp_path):
    """The `data` section that reads it."""
    return DataConfig(path=str(dataset), cache_dir=str(tmp_path / "cache"))
