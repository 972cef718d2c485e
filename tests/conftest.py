"""What every test runs under: no hub, quiet libraries, one thread, a fixed seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import pytest
import torch
import transformers

torch.set_num_threads(1)  # the models here are tiny, and a fork-join costs more than their products
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser):
    parser.addoption(
        "--require-cuda", action="store_true", help="fail instead of skipping where there is no GPU"
    )
    parser.addoption("--served-at", metavar="URL", help="clients' tests ask this server and start none")
    parser.addoption(
        "--openai", metavar="MAJOR", help="clients' tests fail unless this is the client's version"
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
