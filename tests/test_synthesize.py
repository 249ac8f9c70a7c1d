"""Tokens of a run, their file, and the way back."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run_training
from evaluate import to_bytes
from prior import UserError
from synthesize import (
    Run,
    StageTrainer,
    SynthesisConfig,
    draw_images,
    known_of,
    known_part,
    likelihood,
    load_stage,
    main,
    parse,
    pin_words,
    stage_folder,
    tokens_of,
    unigram_bits,
    words_of,
)
from test_train import TINY
from train import DemoDataset, load_run, psnr, resolve, to_images


@pytest.fixture(scope="module", params=[{"method": "vqct"}, {"method": "vqgan"}, {"recipe": "official"}], ids=str)
def run(request, tmp_path_factory):
    sizes, DemoDataset.SIZES = DemoDataset.SIZES, {"train": 64, "val": 5}
    yield run_training(resolve({**TINY, **request.param, "out": str(tmp_path_factory.mktemp("runs") / "run"), "steps": 2}))
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
        ("large", "not . tokens per position"),
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


# ---------------------------------------------------------------------------------------------
# The second stage

SMALL = "--width 16 --depth 1 --heads 2 --batch-size 8 --eval-every 2 --log-every 1".split()


def stage(run, *flags):
    """Train a second stage for three steps, once; → Run, load_stage(…), validation Tokens, SampleChoices."""
    choices = parse([str(run), "sample", *flags, "--device", "cpu"]).choices
    here = Run(run, choices)
    if not stage_folder(here, choices).exists():
        main([str(run), "train", *flags, *SMALL, "--steps", "3"])
    return here, load_stage(here, stage_folder(here, choices)), tokens_of(here, "val", 1, choices.model == "ldm"), choices


@pytest.mark.parametrize("model", ["gpt", "ldm"])
@pytest.mark.parametrize("condition", ["none", "class", "segmentation"])
def test_every_second_stage_trains_and_completes(run, model, condition):
    here, trained, tokens, choices = stage(run, "--model", model, "--condition", condition)
    rows = torch.arange(4)
    given = torch.where(known_part("top", here.model.grid), tokens.indices[rows], -1)
    assert (given[:, :, :8] == tokens.indices[rows][:, :, :8]).all() and (given[:, :, 8:] == -1).all()
    choices.guidance = 1.5
    drawn = draw_images(here, trained, tokens, rows, choices, 0, given)
    assert torch.equal(drawn[given >= 0], given[given >= 0]) and not torch.equal(drawn, tokens.indices[rows])
    assert torch.equal(drawn, draw_images(here, trained, tokens, rows, choices, 0, given))  # by its seed
    assert not torch.equal(drawn, draw_images(here, trained, tokens, rows, choices, 1, given))


def test_a_resumed_second_stage_equals_an_uninterrupted_one(run):
    folder = run / "synthesis" / "gpt-segmentation"
    flags = ["--condition", "segmentation", "--dropout", "0.2", *SMALL]
    main([str(run), "train", *flags, "--overwrite", "--steps", "4"])
    whole = torch.load(folder / "last.pt", weights_only=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    calls, step = [], StageTrainer.train_step
    try:

        def stop(self, *arguments):
            calls.append(self.step)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(self, *arguments)

        StageTrainer.train_step = stop
        with pytest.raises(KeyboardInterrupt):
            main([str(run), "train", *flags, "--overwrite", "--steps", "4"])
    finally:
        StageTrainer.train_step = step
    main([str(run), "train", "--condition", "segmentation", "--resume"])
    again = torch.load(folder / "last.pt", weights_only=True)
    trainer = StageTrainer(
        SynthesisConfig(**{**whole["config"], "steps": 1}),
        here := Run(run),
        whole["count"],
        *[tokens_of(here, "val")] * 2,
    )
    trainer.train_step([[0, 1]])
    assert not any(average.requires_grad for average in trainer.ema.parameters())  # no graph grows from step to step
    for name in ("network", "ema"):
        assert all(torch.equal(value, again[name][key]) for key, value in whole[name].items())
    repeated = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = lambda line: {name: value for name, value in line.items() if name not in ("images_per_second", "data_wait")}
    assert list(map(timeless, repeated)) == list(map(timeless, lines)) and len(lines) == 6  # four steps, two validations


def test_likelihood_adds_up_and_has_its_baselines(run, capsys):
    here, trained, tokens, _ = stage(run, "--condition", "segmentation")
    bits = likelihood(here, trained, tokens)
    network, config, count, _ = trained
    known = known_of(config, tokens, torch.tensor([2]), here.device, count)
    with torch.no_grad():
        logits = network(tokens.indices[2:3], known)
    for i, part in enumerate(logits):
        chosen = part[0].double().log_softmax(-1)[torch.arange(256), tokens.indices[2, i].flatten()]
        assert math.isclose(bits[2, i], -chosen.sum().item() / math.log(2), rel_tol=1e-5)
    train_set = tokens_of(here, "train")
    uniform = unigram_bits(train_set._replace(indices=train_set.indices[:0]), tokens, here.sizes)
    assert np.allclose(uniform, np.log2(here.sizes))
    main([str(run), "evaluate"])
    printed = capsys.readouterr().out
    assert "| gpt | segmentation | " in printed and "FID: – (" in printed
    saved = json.loads((run / "synthesis" / "gpt-segmentation" / "evaluation.json").read_text())
    assert math.isclose(saved["bits_per_bit"], saved["bits_image"] / (256 * sum(map(math.log2, here.sizes))))
    x = to_images(torch.stack([DemoDataset("val", 32)[i]["image"] for i in range(5)]), torch.device("cpu"))
    with torch.no_grad():
        assert math.isclose(saved["psnr"], psnr(here.model(x).x_hat, x).mean(), rel_tol=1e-5)
    assert math.isclose(saved["bits_image"], bits.sum(1).mean(), rel_tol=1e-6) and 0 <= saved["own_map_wins"] <= 1


def test_label_shares_are_those_of_each_positions_pixels(run):
    here = Run(run)
    tokens = tokens_of(here, "val")
    shares = known_of(SynthesisConfig(condition="segmentation"), tokens, torch.arange(5), here.device, 15)
    cells = tokens.segmentation[3].long().unfold(0, 2, 2).unfold(1, 2, 2)[5, 7].flatten()
    assert shares.shape == (5, 15, 16, 16) and torch.allclose(shares[3, :, 5, 7], torch.bincount(cells, minlength=15) / 4)
    assert torch.allclose(shares.sum(1), torch.ones(5, 16, 16))


def test_words_are_pinned_and_pictures_drawn(run, tmp_path, capsys):
    here, _, _, _ = stage(run, "--condition", "segmentation")
    if here.prior is None:
        pytest.skip("codes without words")
    words = [here.prior["adjective_words"][3]] * (len(here.sizes) - 1) + [here.prior["noun_words"][5]]
    shared = ["--condition", "segmentation", "--output", str(tmp_path / "s.png")]
    main([str(run), "sample", *shared, "--pin", f"3,4={','.join(words)}", "--words", "--count", "1", "--repeat", "1"])
    printed = capsys.readouterr().out
    with Image.open(tmp_path / f"s-{run.name}-sample-1-for-image-0.png") as picture:
        assert picture.size == (16 * 84, 16 * 84)
    grid = printed.split("sample 1 for image 0, ")[1].splitlines()[1:17]
    assert " ".join(words) in grid[3] and len(grid[3].split("  ")) >= 16
    Image.fromarray(np.uint8(255 * (np.indices((32, 32))[1] < 8))).save(tmp_path / "mask.png")
    main([str(run), "complete", *shared, "--part", str(tmp_path / "mask.png"), "--count", "3"])
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (190 + 3 * 132, 8 * 132)  # maps, originals, decoded, known parts, two completed, two samples
    transparent = np.uint8(255 * (np.indices((32, 32))[1] < 8))
    Image.fromarray(np.dstack([np.full_like(transparent, 255), transparent]), "LA").save(tmp_path / "alpha.png")
    assert (
        known_part(str(tmp_path / "alpha.png"), (4, 4)).tolist()
        == known_part(str(tmp_path / "mask.png"), (4, 4)).tolist()
        == [[True] + [False] * 3] * 4
    )
    for flags, message in (
        (["--pin", "3,99=red"], "--pin 3,99=red"),
        (["--pin", "3,4=zqxv"], "--pin 3,4=zqxv"),
        (["--pin", "3,4=,zqxv"], "'zqxv' is no noun of this run's codebook; the nearest are")
        if len(here.sizes) == 2
        else (["--pin", "0,0="], "expected row,column=adjective1,adjective2,noun"),
        (["--pin", f"3,4={words[-1]}"], "it is one for noun; the order is adj"),
        (["--pin", f"3,4={words[0]}", f"3,4={words[0]}"], "has its words already"),
        (["--part", "nowhere"], "neither top, bottom"),
        (["--output", str(tmp_path)], "is a folder; name a file"),
        (["--images", "77"], "images 0 … 4"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(run), "complete", *shared, *flags])


def test_one_image_is_completed_as_several_are(run):
    here, trained, tokens, choices = stage(run, "--model", "ldm", "--condition", "none")
    given = torch.where(known_part("top", here.model.grid), tokens.indices[3:4], -1)
    drawn = draw_images(here, trained, tokens, torch.tensor([3]), choices, 0, given)
    assert drawn.shape == given.shape and torch.equal(drawn[given >= 0], given[given >= 0])


@pytest.mark.parametrize("model", ["gpt", "ldm"])
def test_a_word_in_its_place_stays(run, model):
    here, trained, tokens, choices = stage(run, "--model", model, "--condition", "none")
    if here.prior is None:
        pytest.skip("codes without words")
    nothing = torch.full_like(tokens.indices[:2], -1)
    for words, stay in ((here.prior["adjective_words"][2], 0), ("," * (len(here.sizes) - 1) + here.prior["noun_words"][2], -1)):
        given = pin_words(here, nothing, [f"1,2={words}"])
        assert (given >= 0).sum() == 2 and (nothing == -1).all()
        drawn = draw_images(here, trained, tokens, torch.arange(2), choices, 0, given)
        assert (drawn[:, stay, 1, 2] == 2).all() and drawn.shape == nothing.shape


def test_views_are_crops_and_flips_with_their_maps(run):
    here = Run(run)
    one, three = tokens_of(here, "val"), tokens_of(here, "val", 3)
    made = (run / "tokens.npz").stat().st_mtime_ns
    assert torch.equal(tokens_of(here, "val").indices, one.indices) and (run / "tokens.npz").stat().st_mtime_ns == made  # both are kept
    dataset = DemoDataset("val", 32)
    assert len(three.labels) == 15 and torch.equal(three.indices[:5], one.indices) and torch.equal(three.labels[5:10], one.labels)
    dataset.with_segmentation = True
    item = dataset[2, 5 + 2]  # the second view of image 2
    with torch.no_grad():
        assert torch.equal(here.model.encode(to_images(item["image"][None], here.device))[0], three.indices[7])
    assert torch.equal(three.segmentation[7].long(), item["segmentation"].where(item["segmentation"] != dataset.unlabeled, -1))
    assert any(torch.equal(three.segmentation[5 + i], one.segmentation[i].flip(-1)) for i in range(5))


def test_features_are_encoded_once(run):
    here = Run(run)
    tokens = tokens_of(here, "val", with_features=True)
    (path,) = run.glob("features-????????????.npy")
    made = path.stat().st_mtime_ns
    again = tokens_of(here, "val", with_features=True)
    assert path.stat().st_mtime_ns == made and np.array_equal(again.features, tokens.features)
    x = to_images(torch.stack([DemoDataset("val", 32)[i]["image"] for i in range(5)]), here.device)
    with torch.no_grad():
        features = torch.cat(here.model.features(x), dim=1).numpy()
    assert np.allclose(tokens.features, features, atol=2e-3 * abs(features).max())  # half precision
    here.tokenizer = "0" * 64
    tokens_of(here, "val", with_features=True)
    assert not path.exists() and len(list(run.glob("features-????????????.npy"))) == 1  # those of another tokenizer are gone


def test_a_second_stage_belongs_to_its_tokenizer(run):
    here, _, _, choices = stage(run, "--condition", "none")
    here.tokenizer = "0" * 64
    with pytest.raises(UserError, match="another state"):
        load_stage(here, stage_folder(here, choices))
    with pytest.raises(UserError, match="no second stage 'absent' in .*; there is .*gpt-none"):
        load_stage(here, run / "synthesis" / "absent")


def test_flags_that_cannot_be_are_a_line(run, tmp_path):
    stage(run, "--condition", "none")
    for flags, message in (
        (["train", "--condition", "class", "--heads", "5"], "must be a multiple of twice"),
        (["train", "--condition", "class", "--log-every", "0"], "--log-every 0 must be at least 1"),
        (["train", "--condition", "class", "--dropout", "1.5"], "--dropout 1.5 must lie"),
        (["train", "--condition", "none"], "exists already; go on with --resume"),
        (["train", "--condition", "none", "--resume", "--lr", "1"], "--resume cannot change --lr"),
        (["train", "--condition", "none", "--resume", "--steps", "2"], "is at step 3 already"),
        (["train", "--model", "ldm", "--no-joint"], "--no-joint is of --model gpt"),
        (["sample", "--top-p", "0"], r"--top-p 0.0 must lie in \(0, 1\]"),
        (["sample", "--count", "0"], "--count 0 must be at least 1"),
        (["sample", "--labels", "/nope"], "--labels for those of --dataset folder"),
        (["sample", "--label", "robin"], "needs --condition class"),
        (["sample", "--guidance", "2"], "--guidance is towards a condition"),
        (["sample", "--model", "ldm", "--top-k", "5"], "are of --model gpt"),
        (["sample", "--sampling-steps", "5"], "--sampling-steps is of --model ldm"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(run), *flags, *(["--output", str(tmp_path / "x.png")] if flags[0] == "sample" else [])])
    with pytest.raises(UserError, match="train takes one run"):
        main([str(run), str(run), "train"])


def test_a_damaged_cache_is_made_anew(run, capsys):
    here = Run(run)
    tokens = tokens_of(here, "val")
    (run / "tokens.npz").write_bytes((run / "tokens.npz").read_bytes()[:500])
    assert torch.equal(tokens_of(here, "val").indices, tokens.indices) and "made anew" in capsys.readouterr().out
    made = (run / "tokens.npz").stat().st_mtime_ns
    tokens_of(here, "val")
    assert (run / "tokens.npz").stat().st_mtime_ns == made
    here.config.labels = "elsewhere"  # other data are other tokens, whatever the file holds
    tokens_of(here, "val")
    assert (run / "tokens.npz").stat().st_mtime_ns > made


def test_two_runs_share_a_picture(run, tmp_path):
    stage(run, "--condition", "segmentation")
    flags = ["--condition", "segmentation", "--count", "2", "--repeat", "1", "--output", str(tmp_path / "s.png")]
    main([str(run), str(run), "sample", *flags])
    with Image.open(tmp_path / "s.png") as picture:
        rows = np.array(picture)[:, 190:].reshape(6, 132, -1, 3)  # maps, originals, and of each tokens decoded and a sample
    assert np.array_equal(rows[3], rows[5]) and np.array_equal(rows[2], rows[4]) and not np.array_equal(rows[2], rows[3])
    assert np.array_equal(rows[1][:128:4, :128:4], DemoDataset("val", 32)[0]["image"].permute(1, 2, 0).numpy())
