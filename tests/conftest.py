"""Shared fixtures. Real data beside the checkout is used where it is there; the suite passes without."""

import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """WordNetSpeech on NLTK's own data: installed, or a private copy of what lies beside the checkout."""
    from prior import UserError, WordNetSpeech

    try:
        return WordNetSpeech()
    except UserError:
        source = SHARED / "nltk_data"
    if not source.is_dir():
        pytest.skip("no NLTK data on this machine")
    copy = tmp_path_factory.mktemp("nltk") / "nltk_data"
    shutil.copytree(source, copy)
    (copy / "taggers").chmod(0o755)
    for archive in copy.glob("taggers/*.zip"):  # NLTK 3.9 reads them unpacked only
        shutil.unpack_archive(archive, archive.parent)
    for path in (copy, *copy.rglob("*")):  # NLTK refuses data that others may write
        path.chmod((path.stat().st_mode | stat.S_IWUSR) & ~(stat.S_IWGRP | stat.S_IWOTH))
    import nltk

    nltk.data.path.insert(0, str(copy))
    os.environ["NLTK_DATA"] = str(copy)  # for the commands that tests run
    return WordNetSpeech()


@pytest.fixture
def prior():
    """A small prior of random vectors: 7 adjectives, 9 nouns, 12 dimensions."""
    from prior import Prior

    rng = np.random.default_rng(0)
    edges = np.array([(0, 0), (0, 1), (1, 1), (2, 3), (3, 3), (4, 5), (5, 6), (6, 7)])
    return Prior(
        np.array(list("abcdefg")),
        rng.standard_normal((7, 12), dtype=np.float32),
        np.array(list("ABCDEFGHI")),
        rng.standard_normal((9, 12), dtype=np.float32),
        edges,
        np.ones(len(edges), np.int64),
        {"dim": 12},
    )


@pytest.fixture
def small():
    """Overrides that make any method a network of a few thousand weights."""
    return dict(resolution=16, channels=8, multipliers=(1, 2), blocks=1, z_channels=8, code_dim=8, transfer_width=16)
