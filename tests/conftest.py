"""Shared fixtures. Real data beside the checkout is used where it is there; the suite passes without."""

import http.server
import os
import shutil
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long, run by pytest -m slow alone")
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.(script|load). is deprecated:FutureWarning")


def pytest_collection_modifyitems(config, items):
    last = "cuda_dry", "compile"  # after autograd of CUDA, which compiling begins, no process may be forked
    items.sort(key=lambda item: any(name in item.nodeid for name in last))
    if "slow" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; pytest -m slow"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """WordNetSpeech on NLTK's own data: installed, or a private copy of what lies beside the checkout."""
    import nltk
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
    nltk.data.path.insert(0, str(copy))
    os.environ["NLTK_DATA"] = str(copy)  # for the commands that tests run
    return WordNetSpeech()


@pytest.fixture(name="prior")
def small_prior_fixture():
    return small_prior()


def small_prior():
    """A small prior of random vectors: 7 adjectives, 9 nouns, 12 dimensions."""
    from prior import Prior

    rng = np.random.default_rng(0)
    edges = np.array([(0, 0), (0, 1), (1, 1), (2, 3), (3, 3), (4, 5), (5, 6), (6, 7)])
    adjectives, nouns = (rng.standard_normal((rows, 12), dtype=np.float32) for rows in (7, 9))
    words = np.array(list("abcdefg")), np.array(list("ABCDEFGHI"))
    return Prior(words[0], adjectives, words[1], nouns, edges, np.ones(len(edges), np.int64), {"dim": 12})


@pytest.fixture
def small():
    """Overrides that make any method a network of a few thousand weights."""
    return dict(resolution=16, channels=8, multipliers=(1, 2), blocks=1, z_channels=8, code_dim=8, transfer_width=16)


def idle(config):
    """Names of a Config's fields that change nothing in it, which the command line refuses."""
    import train

    return {name for names, holds in train.MATTERS.items() if not holds(config) for name in names.split()}


def run_training(config, *flags):
    """`python train.py` with what departs from the usual in a Config as flags → the run's folder."""
    import train

    named = {name: getattr(config, name) for name in ("dataset", "method", "recipe", "preset", "out")}
    usual = vars(train.resolve(named))
    for name, value in vars(config).items():
        flag, text = "--" + name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, tuple) else value
        switch = flag if value else flag.replace("--", "--no-")
        if name in named or value != usual[name] and name not in idle(config):
            flags += (switch if isinstance(value, bool) else f"{flag}={text}",)
    train.main(flags)
    return Path(config.out)


class Foreign:
    """An object that a published checkpoint may carry beside its tensors."""


class Server:
    """Files over HTTP on this machine; set `cuts_after`, bytes of a body, for a connection that breaks."""

    def __init__(self):
        self.files, self.cuts_after, self.requests = {}, None, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                server.requests.append((self.path, self.headers.get("Range")))
                data = server.files.get(self.path)
                if data is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data[: server.cuts_after])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield (server := Server())
    server.http.shutdown()
