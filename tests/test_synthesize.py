"""Tokens of a run, their file, and the way back."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import to_bytes
from prior import UserError
from synthesize import main, words_of
from test_train import TINY
from train import DemoDataset, load_run, resolve, to_images, train


@pytest.fixture(scope="module", params=[{"method": "vqct"}, {"method": "vqgan"}, {"recipe": "official"}], ids=str)
def run(request, tmp_path_factory):
    sizes, DemoDataset.SIZES = DemoDataset.SIZES, {"train": 64, "val": 5}
    yield train(resolve({**TINY, **request.param, "out": str(tmp_path_factory.mktemp("runs") / "run"), "steps": 2}))
    DemoDataset.SIZES = sizes


def test_tokens_decode_to_the_reconstruction(run, tmp_path, capsys):
    main([str(run), "tokens", "--words", "1"])
    printed = capsys.readouterr().out
    model, config, prior, _ = load_run(run, torch.device("cpu"))
    with np.load(run / "tokens.npz", allow_pickle=False) as file:
        indices, labels, classes = file["indices"], file["labels"], file["classes"]
    tokens = {"vqgan": 1, "vqct": 2}[config.method] + (config.recipe == "official")
    assert indices.shape == (5, tokens, 16, 16) and len(classes) == 16
    dataset = DemoDataset("val", 32)
    assert labels.tolist() == [dataset.label(i) for i in range(5)]
    if prior is not None:
        *adjectives, noun = indices[1, :, 0, 0]
        read = [prior["adjective_words"][index] for index in adjectives] + [prior["noun_words"][noun]]
        assert printed.split("image 1\n")[1].startswith(" ".join(read))
    main([str(run), "tokens", "--decode", str(run / "tokens.npz"), "--output", str(tmp_path)])
    x = to_images(torch.stack([dataset[i]["image"] for i in range(5)]), torch.device("cpu"))
    with torch.no_grad():
        expected = to_bytes(model(x).x_hat)
    decoded = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in sorted(tmp_path.iterdir())])
    assert (decoded.int() - expected.int()).abs().max() <= 1  # batches round differently


def test_foreign_token_files_are_named(run, tmp_path):
    main([str(run), "tokens", "--output", str(tmp_path / "t.npz")])
    with np.load(tmp_path / "t.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "other.npz", **{**arrays, "tokenizer": "0" * 64})
    np.savez(tmp_path / "large.npz", **{**arrays, "indices": arrays["indices"] + 5000})
    (tmp_path / "text.npz").write_text("no")
    for name, message in (
        ("other", "another tokenizer"),
        ("large", "not . tokens a position"),
        ("text", "not a token file"),
        ("absent", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(run), "tokens", "--decode", str(tmp_path / f"{name}.npz"), "--output", str(tmp_path / "x")])
    with pytest.raises(UserError, match="images 0 … 4"):
        main([str(run), "tokens", "--output", str(tmp_path / "t.npz"), "--words", "5"])


def test_words_are_a_grid():
    indices = np.array([[[0, 1], [1, 0]], [[2, 0], [1, 1]]])
    assert words_of(indices, [["red", "small"], ["wing", "eye", "breast"]]) == "red breast  small wing\nsmall eye   red eye"
