"""Metrics against closed forms, and evaluation of a run."""

import dataclasses
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
from evaluate import (
    EvaluationConfig,
    Axes,
    InceptionFeatures,
    alignment_table,
    blank,
    caption_alignment,
    code_statistics,
    code_usage,
    cosines,
    draw_toy,
    evaluate,
    frechet_distance,
    load_inception,
    main,
    markdown,
    mutual_information,
    position_labels,
    rows_of,
    short_names,
    ssim,
    to_bytes,
)
from conftest import run_training
from prior import UserError
from test_train import TINY
from train import DemoDataset, load_lpips, load_weights, resolve

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
    statistics = code_statistics([np.array([4, 4, 0, 0]), np.array([2, 2, 2, 2, 0, 0, 0, 0])], images=2)
    assert statistics["usage"] == {"adjective": 0.5, "noun": 0.5} and statistics["codes_used"] == {"adjective": 2, "noun": 4}
    assert statistics["perplexity"] == {"adjective": 2.0, "noun": 4.0}
    assert statistics["bits"] == 4 * (2 + 3) and statistics["bits_entropy"] == 4 * (1 + 2)  # four tokens per image of each
    single = code_statistics([np.array([0, 70])], images=7)
    assert single["perplexity"] == {"code": 1.0} and single["bits"] == 10 and single["bits_entropy"] == 0


def test_usage_counts_codes_and_when_they_turned_up():
    (usage,) = code_usage([np.array([[[[2, 2], [0, 2]]], [[[4, 0], [2, 2]]]])], [6])
    assert usage.counts.tolist() == [2, 0, 5, 0, 1, 0] and usage.growth.tolist() == [1, 3, 5] and usage.positions == 8
    (pairs,) = code_usage([np.array([[[[0, 1]], [[2, 1]]]])], [3])  # two neighbours at each of two positions
    assert pairs.counts.tolist() == [1, 2, 1] and pairs.growth.tolist() == [1, 1, 2] and pairs.positions == 2


def test_mutual_information_in_bits():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 20000)
    told = mutual_information(labels * 3 + rng.integers(0, 3, 20000), labels)
    assert told["bits"] == pytest.approx(2, abs=0.01) == told["entropy"] and told["chance"] < 0.01
    untold = mutual_information(rng.integers(0, 12, 20000), labels)
    assert untold["bits"] == pytest.approx(untold["chance"], abs=2e-3)


class Captioned:
    """A data set of captions: image i says one of five adjectives, and of five nouns."""

    def __init__(self, images):
        self.rng = np.random.default_rng(0)
        self.words = self.rng.integers(0, 5, (images, 2))

    def __len__(self):
        return len(self.words)

    def captions_of(self, index):
        adjective, noun = self.words[index]
        yield f"a {CODES['adjective_words'][adjective]} {CODES['noun_words'][noun]}s"  # a plural counts as its noun


CODES = {"adjective_words": ["red", "blue", "green", "small", "round"], "noun_words": ["wing", "beak", "tail", "eye", "leg"]}


def test_alignment_tells_words_that_are_said_from_words_that_are_not():
    dataset, everything = Captioned(60), list(range(60))
    spoken = [np.repeat(dataset.words[:, part], 4).reshape(60, 1, 2, 2) for part in (0, 1)]
    found = caption_alignment(spoken, CODES, (5, 5), dataset, everything)
    for part in ("adjective", "noun"):
        assert found[part]["all"]["ratio"] == pytest.approx(5)  # one word in five is said of an image
        assert found[part]["beyond frequency"]["ratio"] == pytest.approx(5, rel=0.2)
        assert found[part]["all"]["p"] < 0.05 and found[part]["beyond frequency"]["p"] < 0.05  # one of 120 permutations is right
    together = [np.concatenate([spoken[0], spoken[1] + 5], axis=1)]  # one codebook of adjectives, then nouns
    assert caption_alignment(together, CODES, (10,), dataset, everything)["noun"]["all"]["ratio"] == pytest.approx(5)


def test_alignments_p_is_uniform_where_codes_mean_nothing():
    dataset, values = Captioned(30), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        codes = [rng.permutation(5)[rng.integers(0, 5, (30, 1, 2, 2))] for _ in range(2)]
        found = caption_alignment(codes, CODES, (5, 5), dataset, list(range(30)), permutations=99)
        values += [found[part]["beyond frequency"]["p"] for part in found]
    assert np.mean(values) == pytest.approx(0.5, abs=0.12) and np.mean(np.array(values) <= 0.1) < 0.25


def test_codes_whose_words_no_one_says_are_not_aligned():
    words = {"adjective_words": ["odd", *CODES["adjective_words"]], "noun_words": CODES["noun_words"]}
    silent = [np.zeros((60, 1, 2, 2), int), np.zeros((60, 1, 2, 2), int)]
    found = caption_alignment(silent, words, (6, 5), Captioned(60), list(range(60)))
    assert found["adjective"]["beyond frequency"] == {"ratio": None, "p": 1.0, "images": 60}


def test_a_frequent_word_on_a_frequent_code_is_not_knowledge_of_the_image():
    dataset = Captioned(60)
    dataset.words[:] = (2, 3)
    found = caption_alignment([np.full((60, 1, 2, 2), 2), np.full((60, 1, 2, 2), 3)], CODES, (5, 5), dataset, list(range(60)))
    assert found["noun"]["all"]["ratio"] == pytest.approx(5)
    assert found["noun"]["beyond frequency"] == {"ratio": pytest.approx(1), "p": 1.0, "images": 60}


def test_labels_of_positions_are_those_of_most_of_their_pixels():
    class Halves:
        resolution, unlabeled = 8, -1

        def __len__(self):
            return 1

        def __getitem__(self, index):
            segmentation = torch.zeros(8, 8, dtype=torch.int64)
            segmentation[:, 3:] = 7
            return {"segmentation": segmentation}

    assert position_labels(Halves(), (2, 2))["part"].tolist() == [[[0, 7], [0, 7]]]
    birds = DemoDataset("val", 64)
    birds.with_segmentation = True
    birds.records = birds.records[:3]
    truth = position_labels(birds, (8, 8))
    seen = {
        train_module.SEGMENTS[part]: list(train_module.COLOURS)[colour]
        for part, colour in zip(truth["part"][0].flat, truth["colour"][0].flat)
        if colour >= 0
    }
    kind = train_module.SPECIES[birds.label(0)]
    assert seen and all(getattr(kind, "crown" if part == "head" else part) == colour for part, colour in seen.items())


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
        with pytest.raises(UserError, match=f"{name} .a test. is unavailable.*--flag FILE"):
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
    out = run_training(resolve({**TINY, "out": str(tmp_path_factory.mktemp("runs") / "run"), "steps": 6}))
    yield out
    DemoDataset.SIZES = sizes


def no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_perceptual", lambda *files: (None, "no LPIPS weights here"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(evaluate_module, "INCEPTION_URL", "http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")


def test_evaluation_of_a_run(run, tmp_path, capsys, monkeypatch):
    no_weights(tmp_path, monkeypatch)
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
    assert "LPIPS: – (no LPIPS weights here)" in printed and f"gives {result['baseline_psnr']:.2f} dB" in printed
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
    drawn = {path.name: Image.open(path) for path in (run / "figures").iterdir()}
    assert sorted(drawn) == ["fig3_toy.gif", "fig3_toy.png", "fig5_usage.png", "fig6_similarity.png", "fig7_regions.png", "fig7_words.png"]
    assert all(image.size[0] > 400 and len(image.convert("RGB").getcolors(2**24)) > 20 for image in drawn.values())
    assert drawn["fig3_toy.gif"].n_frames == 41
    assert (
        {"captions", "information"} == set(result["alignment"])
        and "words said in captions, beyond frequency" in printed
        and "information on colour" in printed
    )
    assert set(result["alignment"]["information"]["noun"]) == {"part", "colour"}


def test_figures_do_not_depend_on_the_batch_size_or_the_time(run):
    results = []
    for batch_size in (1, 4, 4, 11):
        state = train_module.load_checkpoint(run / "last.pt")
        state["config"]["batch_size"] = batch_size
        torch.save(state, run / "other.pt")
        results.append(evaluate(run, EvaluationConfig(checkpoint="other")).result)
    assert all(abs(r["psnr"] - results[0]["psnr"]) < 1e-3 and r["codes_used"] == results[0]["codes_used"] for r in results)
    assert results[1] == results[2]
    assert json.dumps(results[1]["alignment"]) == json.dumps(results[3]["alignment"])


def test_fid_of_saved_images_is_the_reported_one(run, tmp_path, inception_state):
    """Another reading of the saved files gives the same Fréchet distance."""
    inception = InceptionFeatures(inception_state)
    result = evaluate(run, inception=(inception, ""), save=tmp_path).result
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


def test_table_of_runs_that_differ_by_seed_or_more(run):
    result = evaluate(run).result
    seeds = [{**result, "fid": fid, "run": f"seed{i}", "config": {**result["config"], "seed": i}} for i, fid in enumerate((3.0, 5.0))]
    other = {**result, "run": "other", "config": {**result["config"], "beta": 0.5}}
    assert [name for name, _ in rows_of([result, other, *seeds])] == [f"{run} (3 seeds)", "other"]
    lines = markdown([*seeds, other]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| seed0 (2 seeds) | 4.00 ± 1.41 |") and lines[3].startswith("| other | – |")
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| run | FID ↓ | PSNR ↑ | ℓ1 ↓ | ℓ2 ↓ |")  # the paper's order
    assert len(alignment_table([result]).splitlines()) == 2 + 2 and alignment_table([{**result, "alignment": {}}]) == ""


def test_the_official_recipe_is_evaluated_and_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(DemoDataset, "SIZES", {"train": 64, "val": 11})
    out = run_training(resolve({**TINY, "out": str(tmp_path / "run"), "steps": 2, "recipe": "official"}))
    result, usage, _ = evaluate(out, EvaluationConfig(figures=True))
    assert [codebook.counts.sum() for codebook in usage] == [2 * 11 * 256, 11 * 256] and usage[0].positions == usage[1].positions
    assert result["bits"] == pytest.approx(256 * (2 * math.log2(result["codes"]["adjective"]) + math.log2(result["codes"]["noun"])))


def test_runs_are_compared_in_pictures(run, tmp_path, capsys, monkeypatch):
    no_weights(tmp_path, monkeypatch)
    sizes, DemoDataset.SIZES = DemoDataset.SIZES, {"train": 64, "val": 11}
    other = run_training(resolve({**TINY, "out": str(run.parent / "run-vqgan"), "steps": 2, "method": "vqgan"}))
    DemoDataset.SIZES = sizes
    monkeypatch.setattr(DemoDataset, "SIZES", {"train": 64, "val": 11})
    main([str(run), str(other), "--figures"])
    folder = run.parent / "comparison"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fig4_reconstructions.png",
        "fig5_usage.png",
        "rate_distortion.png",
        "table.md",
    ]
    assert Image.open(folder / "fig4_reconstructions.png").size[1] == 3 * 132  # originals and two runs
    assert not (other / "figures" / "fig3_toy.png").exists() and (other / "figures" / "fig6_similarity.png").exists()


def test_names_lose_what_all_begin_with():
    assert short_names(["runs/cub-vqct", "runs/cub-vqgan-seed1"]) == ["vqct", "vqgan-seed1"]
    assert short_names(["runs/a", "other/b"]) == ["a", "b"] and short_names(["runs/cub-vqct"]) == ["vqct"]


def test_axes_place_points_linearly_or_by_their_logarithm():
    axes = Axes(blank(100, 100)[1], (10, 10, 90, 90), (0, 4), (1, 100), "", ("", ""), (False, True))
    assert axes.at(2, 10) == pytest.approx((50, 50)) and axes.at(4, 1) == pytest.approx((90, 90))


def test_cosines_of_codes():
    assert np.allclose(cosines(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])), [[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 0]])


def test_toy_moves_one_code_in_vqvae_and_all_in_vqct(prior, tmp_path, monkeypatch):
    seen, followed = [], []
    frame = evaluate_module.toy_frame
    note = lambda ways, feature, names, code, step: seen.append(ways) or followed.append(code) or frame(ways, feature, names, code, step)
    monkeypatch.setattr(evaluate_module, "toy_frame", note)
    draw_toy(prior, tmp_path / "toy")
    learned, generated = (np.abs(way[-1] - way[0]).max(1) > 0 for way in seen[0].values())
    assert learned.nonzero()[0].tolist() == [followed[0]] and generated.mean() > 0.9  # the one that is drawn as followed
    assert np.allclose(*(way[0] for way in seen[0].values()))  # both from the same codes
    draw_toy(dataclasses.replace(prior, edges=np.array([[0, 0]])), tmp_path / "none")  # Â makes both codes equal
    assert (tmp_path / "toy.png").exists() and not (tmp_path / "none.png").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run of train.py"):
        main([str(tmp_path)])
