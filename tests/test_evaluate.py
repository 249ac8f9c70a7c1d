"""Metrics against closed forms, and evaluation of a run."""

import http.server
import json
import math
import threading

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate as evaluate_module
import train as train_module
from evaluate import InceptionFeatures, code_statistics, evaluate, frechet_distance, load_inception, main, markdown, ssim, to_bytes
from prior import UserError
from test_train import TINY
from train import DemoDataset, load_lpips, load_weights, resolve, train

# ---------------------------------------------------------------------------------------------
# Metrics


def test_ssim_of_constant_images():
    a, b = 0.5, -0.2
    x, y = torch.full((2, 3, 20, 20), a), torch.full((2, 3, 20, 20), b)
    c1 = (0.01 * 2) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)  # no variance: the second factor is one
    torch.testing.assert_close(ssim(x, y), torch.full((2,), expected), rtol=1e-3, atol=1e-4)


def test_ssim_against_its_definition_at_one_position():
    x, y = torch.rand(1, 1, 11, 11) * 2 - 1, torch.rand(1, 1, 11, 11) * 2 - 1
    offset = torch.arange(11) - 5.0
    weight = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    mean = lambda image: (weight * image).sum()
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
    c1, c2 = 0.02**2, 0.06**2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    torch.testing.assert_close(ssim(x.expand(1, 3, 11, 11), y.expand(1, 3, 11, 11))[0], expected, rtol=1e-4, atol=1e-5)
    assert ssim(x, x).item() == pytest.approx(1)


def test_frechet_distance_of_diagonal_gaussians():
    mean_a, mean_b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 2.0])
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mean_a, np.diag(a), mean_b, np.diag(b)) == pytest.approx(expected)


@pytest.mark.parametrize("images", [400, 40])  # more, and fewer, than the 60 dimensions
def test_frechet_distance_against_the_general_matrix_root(images):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((images, 60)), rng.standard_normal((images, 60)) @ np.diag(rng.uniform(0.5, 2, 60)) + 0.3
    gaussians = [part for f in (x, y) for part in (f.mean(0), np.cov(f, rowvar=False))]
    root = scipy.linalg.sqrtm(gaussians[1] @ gaussians[3])
    expected = np.square(gaussians[0] - gaussians[2]).sum() + np.trace(gaussians[1]) + np.trace(gaussians[3]) - 2 * np.trace(root).real
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-5)
    assert abs(frechet_distance(*gaussians[:2], *gaussians[:2])) < 1e-6 * np.trace(gaussians[1])


def test_code_statistics_by_hand():
    statistics = code_statistics([np.array([4, 4, 0, 0]), np.array([2, 2, 2, 2, 0, 0, 0, 0])], positions=64)
    assert statistics["usage"] == {"adjective": 0.5, "noun": 0.5} and statistics["codes_used"] == {"adjective": 2, "noun": 4}
    assert statistics["perplexity"] == {"adjective": 2.0, "noun": 4.0}
    assert statistics["bits"] == 64 * (2 + 3) and statistics["bits_entropy"] == 64 * (1 + 2)
    single = code_statistics([np.array([0, 7])], positions=10)
    assert single["perplexity"] == {"code": 1.0} and single["bits"] == 10 and single["bits_entropy"] == 0


def test_bytes_are_rounded():
    levels = torch.arange(256).float() / 127.5 - 1
    assert to_bytes(levels).tolist() == list(range(256)) and to_bytes(
        torch.tensor([-3.0, 3.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1])
    ).tolist() == [0, 255, 0, 1]


# ---------------------------------------------------------------------------------------------
# Inception


@pytest.fixture(scope="module")
def inception_state():
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    return inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()


def test_inception_pools_as_fids_network_does(inception_state):
    inception = InceptionFeatures(inception_state)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert inception(images).shape == (2, 2048)
    for name, channels, pool in (
        ("Mixed_5b", 192, "average"),
        ("Mixed_6c", 768, "average"),
        ("Mixed_7b", 1280, "average"),
        ("Mixed_7c", 2048, "max"),
    ):
        block, x = getattr(inception.network, name), torch.randn(1, channels, 9, 9)
        pooled = F.max_pool2d(x, 3, 1, 1) if pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        expected = block.branch_pool(pooled)
        torch.testing.assert_close(block(x)[:, -expected.shape[1] :], expected)


def test_inception_sees_images_as_fid_defines(inception_state):
    """Bytes to [-1, 1], then 299×299 by plain bilinear interpolation."""
    inception, seen = InceptionFeatures(inception_state), []
    inception.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ramp = torch.arange(0, 250, 25, dtype=torch.uint8).expand(1, 3, 10, 10)
    inception(ramp)
    assert seen[0].shape == (1, 3, 299, 299)
    centre = (torch.arange(299) + 0.5) * 10 / 299 - 0.5  # without corner alignment
    expected = 25 * centre.clamp(0, 9) / 127.5 - 1
    torch.testing.assert_close(seen[0][0, 1, 150], expected, rtol=1e-4, atol=1e-4)


def test_missing_inception_is_a_reason_and_a_wrong_file_an_error(tmp_path, monkeypatch, inception_state):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(evaluate_module, "INCEPTION_URL", "http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")
    network, reason = load_inception()
    assert network is None and "pt_inception-2015-12-05-6726825d.pth" in reason and "--inception FILE" in reason and "\n" not in reason
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="wrong.pth"):
        load_inception(str(tmp_path / "wrong.pth"))
    torch.save(inception_state, tmp_path / "right.pth")
    assert load_inception(str(tmp_path / "right.pth"))[1] == ""


@pytest.fixture
def server(tmp_path):
    """A local web server on a folder → (folder, address)."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = lambda *args: type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})(
        *args, directory=str(folder)
    )
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    instance.server_close()


def test_weights_are_downloaded_checked_and_cached(server, tmp_path, monkeypatch):
    import hashlib

    folder, address = server
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.save({"w": torch.arange(3)}, folder / "plain.pth")
    digest = hashlib.sha256((folder / "plain.pth").read_bytes()).hexdigest()[:8]
    (folder / "plain.pth").rename(folder / f"net-{digest}.pth")
    assert load_weights(f"{address}/net-{digest}.pth", "", "a test", "--flag")["w"].tolist() == [0, 1, 2]
    (folder / f"net-{digest}.pth").rename(folder / "net-00000000.pth")
    assert load_weights(f"{address}/net-{digest}.pth", "", "a test", "--flag")["w"].tolist() == [0, 1, 2]  # from the cache
    for name in ("net-00000000.pth", "absent-12345678.pth"):  # wrong checksum, no file
        with pytest.raises(UserError, match=f"{name} .a test. cannot be had.*--flag FILE"):
            load_weights(f"{address}/{name}", "", "a test", "--flag")
    assert [p.name for p in (tmp_path / "hub" / "hub" / "checkpoints").iterdir()] == [f"net-{digest}.pth"]


def test_missing_lpips_weights_name_file_and_flag(tmp_path, monkeypatch):
    config = resolve({"perceptual_weight": 1.0, "trunk_weights": str(tmp_path / "absent.pth")})
    with pytest.raises(UserError, match="absent.pth .*vgg trunk.*--trunk-weights FILE"):
        load_lpips(config)


# ---------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sizes, DemoDataset.SIZES = DemoDataset.SIZES, {"train": 64, "val": 11}
    out = train(resolve({**TINY, "out": str(tmp_path_factory.mktemp("runs") / "run"), "steps": 6}))
    yield out
    DemoDataset.SIZES = sizes


def test_evaluation_of_a_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(evaluate_module, "INCEPTION_URL", "http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")
    before = (run / "last.pt").read_bytes()
    main([str(run), "--save", str(tmp_path / "saved"), "--figures"])
    result = json.loads((run / "evaluation.json").read_text())
    assert {"psnr", "l1", "l2", "ssim", "fid", "bits", "usage", "perplexity", "baseline_psnr", "images"} <= set(result)
    assert (
        result["images"] == 11
        and result["fid"] is None
        and "--inception" in result["fid_note"]
        and (run / "last.pt").read_bytes() == before
    )
    assert result["bits"] == pytest.approx(16 * 16 * sum(math.log2(k) for k in result["codes"].values()))
    printed = capsys.readouterr().out
    assert f"| {run} | – | {result['psnr']:.2f} |" in printed and "FID: – (pt_inception" in printed
    names = sorted(p.name for p in (tmp_path / "saved" / "originals").iterdir())
    assert len(names) == 11 and names == sorted(p.name for p in (tmp_path / "saved" / "reconstructions").iterdir())
    pixels = [
        np.stack([np.asarray(Image.open(tmp_path / "saved" / kind / name), np.float64) / 127.5 - 1 for name in names])
        for kind in ("originals", "reconstructions")
    ]
    psnr = (10 * np.log10(4 / ((pixels[0] - pixels[1]) ** 2).mean(axis=(1, 2, 3)))).mean()
    assert psnr == pytest.approx(result["psnr"], abs=0.02)
    originals = np.stack([DemoDataset("val", 32)[i]["image"].permute(1, 2, 0).numpy() for i in range(11)])
    assert np.array_equal(np.round((pixels[0] + 1) * 127.5).astype(np.uint8), originals)
    for name in ("reconstructions.png", "usage.png"):
        assert Image.open(run / name).size[0] > 100


def test_figures_do_not_depend_on_the_batch_size_or_the_time(run):
    results = []
    for batch_size in (1, 4, 4, 11):
        state = train_module.load_checkpoint(run / "last.pt")
        state["config"]["batch_size"] = batch_size
        torch.save(state, run / "other.pt")
        results.append(evaluate(run, checkpoint="other"))
    assert all(abs(r["psnr"] - results[0]["psnr"]) < 1e-3 and r["codes_used"] == results[0]["codes_used"] for r in results)
    assert results[1] == results[2]


def test_fid_of_saved_images_is_the_reported_one(run, tmp_path, inception_state):
    """Another reading of the saved files gives the same Fréchet distance."""
    inception = InceptionFeatures(inception_state)
    result = evaluate(run, inception=(inception, ""), save=tmp_path)
    features = [
        torch.cat(
            [inception(torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None]) for p in sorted((tmp_path / kind).iterdir())]
        )
        .double()
        .numpy()
        for kind in ("originals", "reconstructions")
    ]
    expected = frechet_distance(*[part for f in features for part in (f.mean(0), np.cov(f, rowvar=False))])
    assert result["fid"] == pytest.approx(expected, rel=1e-3) and "11 images" in result["fid_note"]


def test_table_of_two_runs(run):
    result = evaluate(run)
    lines = markdown([result, {**result, "fid": 3.456, "run": "other"}]).splitlines()
    assert len(lines) == 4 and lines[3].startswith("| other | 3.46 |") and len({line.count("|") for line in lines}) == 1


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run of train.py"):
        main([str(tmp_path)])
