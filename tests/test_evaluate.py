"""Metrics against closed forms, and evaluation of a run."""

import copy
import itertools
import json
import math
import re
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2 as TF
from PIL import Image, ImageColor, ImageDraw

import train
from conftest import ROOT
from evaluate import (INK, Evaluation, EvaluationConfig, InceptionFeatures, caption_alignment,
                      code_statistics, draw_codebook_space, draw_curves, draw_plots,
                      draw_rate_distortion, draw_toy, draw_usage, evaluate, fid,
                      frechet_distance, free_place, holm, load_inception, load_or_reason, main,
                      markdown, regions_of, report, rows_of, ticks)
from prior import UserError
from test_parity import random_inception
from train import DemoDataset, ImageDataset, Record, Run, load_lpips, to_bytes, to_images
from vqct import LPIPS

TINY = """--resolution=32 --channels=8 --multipliers=1,1,2 --blocks=1 --z-channels=8
    --batch-size=4 --lr=2e-3 --gan-weight=0 --log-every=1 --eval-every=2 --eval-images=4
    --device=cpu""".split()
FEW = {"train": 24, "val": 11}
QUARTERS = torch.nn.Sequential(  # features of an image
    TF.ToDtype(torch.float32), torch.nn.AvgPool2d(16), torch.nn.Flatten())


def trained(out, *flags):
    """A run of a few thousand weights on 8×8 positions, of two steps → its folder."""
    train.main([*TINY, "--steps=2", f"--out={out}", *flags])
    return out


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no published weights
    monkeypatch.setattr(DemoDataset, "SIZES", FEW)


@pytest.fixture
def run(own_folder):
    return trained(Path("run"))


# ======== Metrics, and the weights of those that are networks

@torch.no_grad()
def test_inception_is_copied_whole_and_computes_in_the_type_of_its_weights():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = InceptionFeatures(random_inception())
    before, twin = features(images), copy.deepcopy(features)
    for parameter in features.parameters():
        parameter.zero_()
    assert torch.equal(twin(images), before) and before.std() > 0.01
    for dtype, error in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
        found = copy.deepcopy(twin).to(dtype)(images)
        assert found.dtype == dtype and (found - before).norm() < error * before.norm()


def test_frechet_distance_in_closed_form():
    mean_a, mean_b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
    a, b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.0, 1.0])  # deviations
    expected = np.square(mean_a - mean_b).sum() + np.square(a - b).sum()
    assert frechet_distance(mean_a, np.diag(a**2), mean_b, np.diag(b**2)) == pytest.approx(expected)


@pytest.mark.parametrize("images", [400, 40])  # more, and fewer, than the 60 dimensions
def test_frechet_distance_against_the_general_matrix_root(images):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, images, 60))
    y = y @ np.diag(rng.uniform(0.5, 2, 60)) + 0.3
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.square(x.mean(0) - y.mean(0)).sum()
    expected += np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b)).real
    assert fid(x, y) == pytest.approx(expected, rel=1e-5) and abs(fid(x, x)) < 1e-11 * np.trace(a)


def test_code_statistics_by_hand():
    counts, names = [np.array([4, 4, 0, 0]), np.array([2, 2, 2, 2, 0, 0, 0, 0])], ("adjective", "noun")
    expected = dict(usage=[0.5, 0.5], codes_used=[2, 4], codes=[4, 8], perplexity=[2.0, 4.0])
    expected = {name: dict(zip(names, values)) for name, values in expected.items()}
    expected.update(bits=4 * (2 + 3), bits_entropy=4 * (1 + 2))  # four tokens per image of each
    assert code_statistics(counts, names, images=2) == expected
    single = code_statistics([np.array([0, 70])], ("code",), images=7)
    assert single["perplexity"] == {"code": 1.0}
    assert single["bits"] == 10 and single["bits_entropy"] == 0


CODES = {
    "adjective_words": "red blue green small round".split(),
    "noun_words": "wing beak tail eye leg".split(),
}


def captioned(words, silent=0):
    """A data set whose captions have an adjective and a plural noun, by their numbers.

    The last `silent` images have no caption.
    """
    adjectives, nouns = CODES.values()
    said = [[f"a {adjectives[a]} {nouns[n]}s"] for a, n in words]
    said[len(said) - silent :] = [()] * silent
    return ImageDataset([Record(None, captions=captions) for captions in said], [], 16)


def aligned(indices, dataset, words=CODES, **options):
    """`caption_alignment` of a run with two codebooks, or one of adjectives, then nouns."""
    lists = list(words.values())
    run = SimpleNamespace(prior=words, words=lists if len(indices) == 2 else [sum(lists, [])])
    return caption_alignment(run, indices, dataset, **options)


@pytest.mark.parametrize("codebooks", [2, 1])
def test_alignment_tells_words_that_are_said_from_words_that_are_not(codebooks):
    words = np.random.default_rng(0).integers(0, 5, (80, 2))
    said = [np.repeat(words[:, part], 4).reshape(80, 1, 2, 2) for part in (0, 1)]
    if codebooks == 1:
        said = [np.concatenate([said[0], said[1] + 5], axis=1)]
    dataset = captioned(words, 20)
    for found in [aligned(said, dataset)[part] for part in ("adjective", "noun")]:
        assert found["ratio"] == pytest.approx(5, rel=0.2)  # an image says one word in five
        assert found["images"] == 60
        assert found["p"] < 0.05  # one of 120 permutations is right
    others = [(part + 1) % 5 + part // 5 * 5 for part in said]  # the next word of its part
    assert all(found["ratio"] == 0 and found["p"] > 0.5 for found in aligned(others, dataset).values())


def test_alignments_p_is_uniform_where_codes_mean_nothing():
    dataset, values = captioned(np.random.default_rng(0).integers(0, 5, (30, 2))), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        codes = [rng.permutation(5)[rng.integers(0, 5, (30, 1, 2, 2))] for _ in range(2)]
        values += [found["p"] for found in aligned(codes, dataset, permutations=99).values()]
    assert np.mean(values) == pytest.approx(0.5, abs=0.12) and np.mean(np.array(values) <= 0.1) < 0.25


def test_what_no_one_says_and_what_everyone_says_is_not_aligned():
    words, dataset = {**CODES, "adjective_words": ["odd"]}, [(2, 3)] * 60
    codes = [np.zeros((60, 1, 2, 2), int)] * 2
    adjective = aligned(codes, captioned(dataset), words)["adjective"]
    assert adjective == {"ratio": None, "p": 1.0, "images": 60}
    assert {} == aligned(codes, captioned(dataset, silent=60), words)
    assert {} == caption_alignment(SimpleNamespace(prior=None), codes, captioned(dataset))
    found = aligned([np.full((60, 1, 2, 2), 2), np.full((60, 1, 2, 2), 3)], captioned(dataset))
    # a frequent word on a frequent code is not knowledge of the image
    assert found["noun"] == found["adjective"] == {"ratio": pytest.approx(1), "p": 1.0, "images": 60}


def test_inception_is_fids_network():
    shape = dict(num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(torchvision.models.inception_v3(weights=None, **shape).state_dict(), "right.pth")
    (inception, reason), seen = load_or_reason(load_inception, "right.pth"), []
    for name, channels in {"5b": 192, "6c": 768, "7b": 1280, "7c": 2048}.items():
        block, x = getattr(inception.network, f"Mixed_{name}"), torch.randn(1, channels, 9, 9)
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if name == "7c":
            pooled = F.max_pool2d(x, 3, 1, 1)
        expected = block.block.branch_pool(pooled)
        torch.testing.assert_close(block(x)[:, -expected.shape[1] :], expected)
    first = inception.network.Conv2d_1a_3x3
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ramp = torch.arange(0, 250, 25, dtype=torch.uint8).expand(1, 3, 10, 10)
    assert inception(ramp).shape == (1, 2048) and not reason
    centre = (torch.arange(299) + 0.5) * 10 / 299 - 0.5  # bilinear, without corner alignment
    assert seen[0].shape == (1, 3, 299, 299)
    expected = 25 * centre.clamp(0, 9) / 127.5 - 1
    torch.testing.assert_close(seen[0][0, 1, 150], expected, rtol=1e-4, atol=1e-4)


WEIGHTS = {  # file → how to load it, its use, its flag
    "pt_inception-2015-12-05-6726825d": (load_inception, "FID's Inception", "--inception"),
    "squeezenet1_1-b8a52dc0": (
        lambda p: load_lpips("squeeze", p, p), "LPIPS's trunk", "--trunk-weights"),
    "squeeze": (
        lambda p: load_lpips("squeeze", "wrong.pth", p), "LPIPS's heads", "--lpips-weights"),
}


@pytest.mark.parametrize("file", WEIGHTS)
def test_missing_weights_are_a_reason_and_a_wrong_file_an_error(file):
    load, use, flag = WEIGHTS[file]
    torch.save({"wrong": torch.zeros(1)}, "wrong.pth")
    network, reason = load_or_reason(load, "")
    assert network is None and reason.startswith(f"missing: {use}") and "\n" not in reason
    advice = rf"{file}.pth, or use a local copy: {flag} FILE; to download: (add|python evaluate.py RUN) --download$"
    assert re.search(rf": https://\S+{advice}", reason)
    with pytest.raises(UserError, match="not .*: .*wrong.pth|wrong.pth is not FID's weights"):
        load_or_reason(load, "wrong.pth")


# ======== A run

def test_evaluation_of_a_run(run, capsys):
    before = (run / "last.pt").read_bytes()
    main(["run", "--figures", "--device=cpu"])
    result, printed = json.loads((run / "evaluation.json").read_text()), capsys.readouterr().out
    assert (run / "last.pt").read_bytes() == before and result["images"] == 11 and result["step"] == 2
    assert result["bits"] == pytest.approx(8 * 8 * sum(math.log2(k) for k in result["codes"].values()))
    assert result["fid"] is result["lpips"] is None
    for expected in (
        f"| run | – | {result['psnr']:.2f} |",
        "run: captions mention words of its noun codes ",
        "FID: – (missing: FID's Inc",
        "LPIPS: – (missing: LPIPS",
    ):
        assert expected in printed
    drawn = {path.stem: Image.open(path).getcolors(2**24) for path in run.glob("*.png")}
    names = "curves fig1_space fig3_toy fig5_usage fig6_similarity fig7_regions reconstructions".split()
    assert sorted(drawn) == names and all(len(colours) > 20 for colours in drawn.values())
    with pytest.raises(UserError, match="'hub' is not a run of train.py: it has no last.pt"):
        main(["run", "hub"])


def test_a_later_evaluation_keeps_what_was_measured_and_removes_old_figures(run, capsys):
    choices = EvaluationConfig(device="cpu", figures=True)
    measured = evaluate(run, choices, QUARTERS, LPIPS("squeeze")).result
    main(["run", "--device=cpu"])
    again = json.loads((run / "evaluation.json").read_text())
    assert again["fid"] == measured["fid"] > 0 and again["lpips"] == measured["lpips"] > 0
    assert "\nFID: Inception-v3 pool3" in capsys.readouterr().out
    assert (run / "fig5_usage.png").exists()
    train.main(["--out=run", "--resume", "--steps=3"])
    main(["run", "--device=cpu"])
    later = json.loads((run / "evaluation.json").read_text())
    assert later["fid"] is later["lpips"] is None and later["step"] == 3
    assert {path.name for path in run.glob("*.png")} == {"reconstructions.png"}


def test_scores_are_means_over_images_and_fid_is_that_of_the_saved_ones(run):
    lpips, chosen = LPIPS("squeeze"), EvaluationConfig(device="cpu", checkpoint="best", save="saved")
    result = evaluate(run, chosen, QUARTERS, lpips).result
    here = Run(run, "cpu", checkpoint="best")
    images = torch.stack([item["image"] for item in here.dataset("val")])
    x = to_images(images, here.device)
    x_hat = here.model(x).x_hat.detach()
    decibels = lambda y: 10 * torch.log10(4 / (y.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)))
    expected = dict(
        psnr=decibels(x_hat),
        lpips=lpips(x_hat.clamp(-1, 1), x), l1=(x_hat - x).abs(), l2=(x_hat - x).square())
    expected = {name: value.mean().item() for name, value in expected.items()}
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    paths = (sorted(Path(f"saved/run/{kind}").iterdir()) for kind in ("originals", "reconstructions"))
    saved = [torch.stack([TF.functional.pil_to_tensor(Image.open(path)) for path in listed])
             for listed in paths]
    assert torch.equal(saved[0], images)
    assert (saved[1].int() - to_bytes(x_hat).int()).abs().max() <= 1  # of rounding
    values = torch.tensor([-3.0, 3.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1])
    assert to_bytes(values).tolist() == [0, 255, 0, 1]
    features = (QUARTERS(images).double().numpy() for images in saved)
    assert result["fid"] == pytest.approx(fid(*features), rel=1e-6)


def test_results_do_not_depend_on_the_batch_size_or_the_time(run):
    results, state = [], train.load_checkpoint(run / "last.pt")
    for state["config"]["batch_size"] in (4, 4, 11):
        torch.save(state, run / "best.pt")
        results.append(evaluate(run, EvaluationConfig(device="cpu", checkpoint="best")).result)
    first, again, other = results
    assert first == again and first["psnr"] == pytest.approx(other["psnr"], abs=1e-3)
    assert all(first[name] == other[name] for name in ("codes_used", "alignment"))


def test_table_of_runs_that_differ_by_seed_or_more(capsys):
    result = dict(run="run", psnr=20.0, l1=0.1, l2=0.02, lpips=None, fid=None,
                  bits=64.0, bits_entropy=32.0)
    for name in ("codes", "codes_used", "usage", "perplexity"):
        result[name] = {"adjective": 4, "noun": 5}
    result |= dict(step=2, checkpoint="last", config={"beta": 0.25, "seed": 0, "out": "run"})
    result["alignment"] = {part: {"ratio": 2.0, "p": 0.01, "images": 9}
                           for part in ("adjective", "noun")}
    seeded = lambda seed: {**result["config"], "seed": seed, "out": f"seed{seed}"}
    seeds = [{**result, "fid": 3.0 + 2 * i, "run": f"seed{i}", "config": seeded(i)} for i in range(2)]
    other = {**result, "run": "other", "config": {**result["config"], "beta": 0.5}}
    seeds[1]["config"]["download"] = True
    names = [name for name, _ in rows_of([*seeds, other, result, {**result, "step": 4}])]
    assert names == ["seed0 (2 seeds)", "other", "run", "run"]  # the first "run" has the seed of seed0
    lines = markdown([*seeds, other]).splitlines()
    assert lines[0].startswith("| run | FID ↓ | PSNR ↑ | ℓ1 ↓ | ℓ2 ↓ |")  # the paper's order
    assert lines[2].startswith("| seed0 (2 seeds) | 4.00 ± 1.41 | 20.00 ± 0.00 |") and len(lines) == 4
    assert lines[3].startswith("| other | – | 20.00 | 0.1000 | 0.0200 | – "
                               "| 4 + 5 | 400.0% + 500.0% |")
    assert len({line.count("|") for line in lines}) == 1
    better = [{**seed, "psnr": 21.0 + i, "config": {**seed["config"], "beta": 0.5}}
              for i, seed in enumerate(seeds)]
    worse = [{**seed, "psnr": 20.0 + 0.5 * i} for i, seed in enumerate(seeds)]
    p = scipy.stats.ttest_ind([21.0, 22.0], [20.0, 20.5], equal_var=False).pvalue
    cell = f"| 21.50 ± 0.71 (p {p:.2g}, Holm {p:.2g}) |"  # one test needs no correction
    assert cell in markdown([*worse, *better]) and "(p" not in markdown([*worse, other])
    for number, seed in enumerate([*worse, *better]):
        seed["lpips"] = 0.5 + 0.1 * (number % 2) + 0.01 * number  # alike
    assert f"| 21.50 ± 0.71 (p {p:.2g}, Holm {2 * p:.2g}) |" in markdown([*worse, *better])
    seen = dict(images=9, fid_note="of 9")
    for result in (*seeds, other, result):
        result.update(seen, config={**result["config"], "dataset": "cub"})
    report([*seeds, other], ("none", "none"))
    said = capsys.readouterr().out
    assert ("seed0 (2 seeds): captions mention words of its adjective codes 2.00 ± 0.00 times as "
            "often as chance predicts (p of each seed: 0.010, 0.010)") in said
    assert said.count("captions mention") == 4
    report([{**result, "alignment": {}}], ("none", "none"))
    assert "captions mention" not in capsys.readouterr().out


def test_holms_correction_by_hand():
    # in order: 0.01 × 4, 0.02 × 3, 0.03 × 2 = 0.06, and 0.5
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]  # no p is larger than one
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_stored_results_make_tables():
    paths = sorted((ROOT / "tests/reference/cub64").glob("*-[01].json"))
    table = markdown([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    assert table.count("(2 seeds)") == len(paths) / 2 > 10 and table.count("Holm") > 20


@pytest.mark.parametrize("name, value", [
    ("step", 3), ("checkpoint", "best"), ("codes", {"code": 7}), ("images", 8),
    ("contents", {"prior": "other words", "data": "birds"}),
    ("contents", {"prior": "words", "data": "cats"}),
    ("config", {"seed": 1, "prior": "a.npz", "beta": 1}),
    (None, None),
])
def test_seeds_are_runs_of_the_same_contents(name, value):
    result = dict(run="a", step=2, checkpoint="last", codes={"code": 9}, images=9,
                  contents={"prior": "words", "data": "birds"},
                  config={"seed": 0, "prior": "a.npz", "beta": 0})
    seed = {**result, "run": "b", "config": {"seed": 1, "prior": "elsewhere/a.npz", "beta": 0}}
    rows = rows_of([result, {**seed, name: value} if name else seed])
    assert [title for title, _ in rows] == (["a", "b"] if name else ["a (2 seeds)"])


def test_a_checkpoint_tells_runs_of_other_contents_apart(run, prior, capsys):
    """Priors under one name, a run and its copy; but the permutations of two seeds are of one prior."""
    for folder, noun in (("one", "A"), ("two", "Z")):
        prior.noun_words[0] = noun
        prior.save(f"{folder}/prior.npz")
    flags = ["--shuffle=vectors", "--method=vqct"]
    for seed in (0, 1):
        trained(Path(f"one-{seed}"), f"--seed={seed}", *flags, "--prior=one/prior.npz")
    trained(Path("two-2"), "--seed=2", *flags, "--prior=two/prior.npz")
    shutil.copytree("one-0", "copy")
    results = [evaluate(path, EvaluationConfig(device="cpu")).result
               for path in ("one-0", "one-1", "two-2", "copy")]
    assert [name for name, _ in rows_of(results)] == ["one-0 (2 seeds)", "two-2", "copy"]


def test_alignment_of_many_words_takes_little_memory():
    """The dense table of 20,000 nouns and codes would be 1.6 GB."""
    letters = str.maketrans("0123456789", "abcdefghij")
    nouns = [f"w{number:05}".translate(letters) for number in range(20_000)]
    words, rng = {"adjective_words": ["red"], "noun_words": nouns}, np.random.default_rng(0)
    said, codes = rng.integers(0, 20_000, (300, 4)), rng.integers(0, 20_000, (300, 1, 2, 2))
    records = [Record(None, captions=[f"a {nouns[i]}" for i in row]) for row in said]
    dataset = ImageDataset(records, [], 16)
    tracemalloc.start()
    found = aligned([np.zeros_like(codes), said.reshape(300, 1, 2, 2)], dataset, words, permutations=19)
    assert found["noun"]["p"] == 0.05 and found["noun"]["ratio"] > 100
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_other_systems_are_evaluated_drawn_and_compared(run, capsys):
    trained(Path("vqgan"), "--method=vqgan")
    trained(Path("official"), "--recipe=official", "--code-dim=16")
    main(["run", "vqgan", "official", "--figures", "--save=saved", "--device=cpu"])
    result = json.loads(Path("official/evaluation.json").read_text())
    adjectives, nouns = map(math.log2, result["codes"].values())
    assert result["bits"] == pytest.approx(64 * (2 * adjectives + nouns))  # the two nearest adjectives
    vqgan, official, both = ({path.stem for path in Path(name).glob("*.png")}
                             for name in ("vqgan", "official", "comparison"))
    assert official - vqgan == {"fig1_space", "fig3_toy"} and len(vqgan) == 5  # its codes have no words
    assert both == {"curves", "fig4_reconstructions", "fig5_usage", "rate_distortion"}
    picture = Image.open("comparison/fig4_reconstructions.png")
    assert picture.size == (150 + 8 * 132, 4 * 132)  # originals, three runs
    printed = capsys.readouterr().out
    assert printed.count("\n| official |") == 1 and printed.count("\nofficial: captions") == 2
    assert len(list(Path("saved/vqgan/reconstructions").iterdir())) == 11
    trained(Path("larger"), "--resolution=64")
    main(["larger", "run", "--figures", "--device=cpu"])
    assert "the rows do not compare: their evaluation images differ" in capsys.readouterr().out


@pytest.fixture
def seen(monkeypatch):
    """What is given to the functions that draw."""
    found = []
    for name in ("draw_grid", "draw_plots"):
        monkeypatch.setattr(f"evaluate.{name}", lambda what, *more, **size: found.append(what))
    return found


def test_usage_counts_codes(seen):
    run = SimpleNamespace(names=("code",), words=[list("abcdef")], path=Path("somewhere/run"))
    # two images of two positions, two codes at each
    codes = np.array([[[[2, 0]], [[2, 2]]], [[[4, 2]], [[0, 2]]]])
    draw_usage([Evaluation(run, {}, [codes])], "usage.png")
    assert seen[0][0]["title"].startswith("run: 50.0% of all codes used\n") and len(seen[0]) == 1
    ((ranked, _, label),) = seen[0][0]["lines"]
    assert np.allclose(ranked, [(1, np.log10(5)), (2, np.log10(2)), (3, 0)]) and label == "3 of 6 codes (50.0%)"
    pair = SimpleNamespace(names=("adjective", "noun"), words=[list("abcdef"), list("gh")],
                           path=Path("pair"))
    draw_usage([Evaluation(pair, {}, [codes, codes // 4])], "usage.png")  # three of six and two of two
    assert seen[1][0]["title"].startswith("pair: 62.5% of all codes used\n")


def test_regions_are_those_of_their_words(run):
    evaluation = evaluate(run, EvaluationConfig(device="cpu"))
    places = ((2, 2), (2, 6), (4, 4), (6, 2), (6, 6))
    for index in (0, 7):
        regions = regions_of(evaluation, index)
        for (row, column, words), place in zip(regions, places, strict=True):
            codes = [indices[index, 0, row, column] for indices in evaluation.indices]
            expected = [listed[code] for listed, code in zip(evaluation.run.words, codes)]
            assert words == " ".join(expected) and (row, column) == place


def test_rate_and_distortion_have_bars_of_the_seeds(seen):
    results = [dict(run=f"a/r{seed}", bits_entropy=10.0 + seed, psnr=20.0, step=1, checkpoint="last",
                    config=dict(seed=seed, method=method)) for seed, method in ((0, "x"), (2, "x"), (0, "y"))]
    draw_rate_distortion(results, "rate.png")
    bars = [(np.array(points).tolist(), label) for points, _, label in seen[0][0]["lines"]]
    half = 2**0.5
    assert bars == [
        ([[11 - half, 20], [11 + half, 20]], ""), ([[11, 20], [11, 20]], ""), ([[11, 20]], "r0"),
        ([[10, 20]], "r0"),
    ]


def test_curves_are_those_of_the_journal(seen):
    lines = [{"step": 2, "loss": 3.0, "codes_used": [5, 7]},
             {"step": 2, "validation_psnr": 14.0, "codes_used": [5, 7]}]
    Path("a").mkdir()
    damaged = '{"step": 3, "loss\0 x}', '{"step": 4, "lo'
    text = "\r\n".join([*map(json.dumps, lines), *damaged])
    Path("a/metrics.jsonl").write_text("\ufeff" + text)
    draw_curves([Evaluation(SimpleNamespace(path=Path("a")), {}, [])], "curves.png")
    drawn = {panel["title"]: panel["lines"] for panel in seen[0]}
    assert drawn == {
        "PSNR of held-out images, dB": [([(2, 14.0)], 0, "a")],
        "loss": [([(2, 3.0)], 0, "a")],
        "codes used, all codebooks": [([(2, 12), (2, 12)], 0, "a")],
    }


def test_toy_moves_one_code_in_vqvae_and_all_in_vqct(prior, seen):
    draw_toy(prior.tensors(), "toy.png")
    learned, generated = ([line for line in panel["lines"] if line[2] not in ("", "feature")]
                          for panel in seen[0])
    assert all("no ReLU after the last layer" in panel["x"] for panel in seen[0])
    for panel in seen[0]:  # a circle is where a code starts
        circles = [points[0] for points, _, label in panel["lines"] if not label]
        starts = [points[0] for points, _, label in panel["lines"] if len(points) > 1]
        assert np.array_equal(circles, starts)
    assert seen[0][0]["shown"] is seen[0][1]["shown"]  # the same axes
    moved = lambda lines: [int((points[-1] != points[0]).any()) for points, _, _ in lines]
    assert sum(moved(learned)) == 1 and np.mean(moved(generated)) > 0.9
    once = [sum(line[1] == other[1] for other in learned) == 1 for line in learned]
    assert once == moved(learned)  # drawn as the one that is followed
    for line, other in zip(learned, generated):  # both start from the same codes
        assert np.allclose(line[0][0], other[0][0])
    alike = {**prior.tensors(), "edges": torch.tensor([[0, 0]])}  # Â makes both codes equal
    draw_toy(alike, "alike.png")
    assert np.isfinite([line[0][-1] for panel in seen[1] for line in panel["lines"]]).all()


# ======== Plots

def test_codebook_space_shows_words_and_their_neighbours(tmp_path, prior):
    few = prior.tensors()
    few["adjective_words"], few["adjective_vectors"] = few["adjective_words"][:1], few["adjective_vectors"][:1]
    draw_codebook_space(few, tmp_path / "few.png")  # a word without neighbours
    assert (tmp_path / "few.png").stat().st_size > 1000
    draw_codebook_space(prior.tensors(), tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert image.width == 1040 and set(map(ImageColor.getrgb, INK[:2])) <= colours


@pytest.mark.parametrize("log", [False, True])
def test_a_line_runs_straight_on_its_own_axes(tmp_path, log):
    steps = np.linspace(0, 1, 9)
    panel = dict(title="t\ny", lines=[(np.stack([steps, 3 * steps], 1), 0, "")], x="x", log=log)
    draw_plots([panel] * 3, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        assert image.size == (1040, 800)
        for (left, top), share in itertools.product(((0, 0), (520, 0), (0, 400)), (0.25, 0.5, 0.75)):
            place = (left + 70 + round(410 * share), top + 40 + round(300 * (1 - share)))
            near = itertools.product((-1, 0, 1), repeat=2)
            colours = [image.getpixel((place[0] + i, place[1] + j)) for i, j in near]
            assert ImageColor.getrgb(INK[0]) in colours


def test_ticks_are_round_and_labels_lie_apart():
    assert [text for _, text in ticks(17.5, 22.7)] == "18 19 20 21 22".split()
    assert [text for _, text in ticks(60, 1334)] == "200 400 600 800 1,000 1,200".split()
    assert [text for _, text in ticks(-0.1, 3.2, True)] == "1 10 100 1,000".split()
    assert ticks(0.9, 2.1, True) == [(1, "10"), (2, "100")]
    image, taken = Image.new("RGB", (160, 200), "white"), []
    for _ in range(30):  # labels of one point
        x, y = free_place(image, (100, 100), 40)
        left, top, right, bottom = box = x - 20, y - 7, x + 20, y + 7
        assert all(left > other[2] or right < other[0] or top > other[3] or bottom < other[1]
                   for other in taken)
        assert left >= 0 and top >= 0 and right <= 160 and bottom <= 200
        ImageDraw.Draw(image).rectangle(box, "black")
        taken.append(box)
    assert taken[0][1] < 100 < taken[0][3]  # beside the point, where there is room
    assert len(free_place(image, (100, 100), 500)) == 2  # wider than the image
