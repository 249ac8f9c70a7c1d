"""Tokens of a run, their file and the way back; the second stage and what it draws."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from evaluate import fid
from prior import UserError
from synthesize import (Drawing, StageTrainer, Tokens, draw_images, evaluate_stage,
                        known_of, known_part, load_stage, losses_of, main, pin_words,
                        stage_folder, tokens_of, validation)
from test_evaluate import FEW, QUARTERS, own_folder, trained
from train import DemoDataset, Run, psnr, to_bytes, to_images
from vqct import Condition

SMALL = """--device=cpu --steps=3 --width=16 --depth=1 --heads=2 --batch-size=8
    --eval-every=2 --log-every=1""".split()
RUNS = {
    "vqct": "--method=vqct",
    "vqgan": "--method=vqgan",
    "official": "--recipe=official --code-dim=16",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind of tokenizer; the official one has a second stage.

    The official one has three tokens a position.
    """
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoDataset, "SIZES", FEW)
        for name, flag in RUNS.items():
            trained(folder / name, *flag.split())
        main([str(folder / "official"), "train", "--condition=segmentation", *SMALL])
    return folder


@pytest.fixture
def run(runs, request, own_folder):
    return Path(shutil.copytree(runs / getattr(request, "param", "official"), "run"))


every_run = pytest.mark.parametrize("run", RUNS, indirect=True)
every_model = pytest.mark.parametrize("model", ["gpt", "ldm"])


def go(command, *flags):
    main(["run", command, "--device=cpu", *flags])


def stage(run, **which):
    """A second stage, trained if it is not there → Run, load_stage(…), validation Tokens, Drawing."""
    here, choices = Run(run, "cpu"), Drawing(**which)
    if not stage_folder(here, choices).exists():
        main(["run", "train", *(f"--{name}={value}" for name, value in which.items()), *SMALL])
    return here, load_stage(here, stage_folder(here, choices)), tokens_of(here, "val", 1, True), choices


def images_of(run):
    images = torch.stack([item["image"] for item in run.dataset("val")])
    return images, to_images(images, run.device)  # (11, 3, 32, 32) each: uint8, and in [-1, 1]


@every_run
def test_tokens_decode_to_the_reconstruction(run, capsys):
    go("tokens", "--words=1")
    here, printed = Run(run, "cpu"), capsys.readouterr().out
    file = np.load("run/tokens-val.npz", allow_pickle=False)
    tokens = {"vqgan": 1, "vqct": 2}[here.config.method] + (here.config.recipe == "official")
    assert file["indices"].shape == (11, tokens, 8, 8)
    assert file["labels"].tolist() == [item["label"] for item in here.dataset("val")]
    words = here.model.per_token([file[f"{name}_words"] for name in here.names])

    def spell(row, column):
        codes = file["indices"][1, :, row, column]
        return " ".join(listed[i] for listed, i in zip(words, codes))

    cells = [re.split("  +", line) for line in printed.split("image 1\n")[1].splitlines()]
    assert cells == [[spell(row, column) for column in range(8)] for row in range(8)]
    go("tokens", "--decode=run/tokens-val.npz", "--output=images")
    expected = to_bytes(here.model(images_of(here)[1]).x_hat.detach()).permute(0, 2, 3, 1).numpy()
    decoded = np.stack([np.array(Image.open(path)) for path in sorted(Path("images").iterdir())])
    assert np.abs(decoded.astype(int) - expected).max() <= 1  # batches round differently


def test_foreign_token_files_are_named(run):
    go("tokens", "--output=mine.npz")
    arrays = dict(np.load("mine.npz"))
    np.savez("other.npz", **{**arrays, "tokenizer": "0" * 64})
    np.savez("large.npz", **{**arrays, "indices": arrays["indices"] + 5000})
    np.savez("halves.npz", **{**arrays, "indices": arrays["indices"] / 2})
    np.savez("narrow.npz", **{**arrays, "indices": arrays["indices"][..., :4]})
    for name in ("other.npz", "large.npz", "halves.npz", "narrow.npz", "absent.npz", "run/config.json"):
        with pytest.raises(UserError, match=f"'{name}' is no token file of this run: "):
            go("tokens", f"--decode={name}", "--output=images")


def test_views_are_crops_and_flips_with_their_maps(run):
    here = Run(run, "cpu")
    one, three, dataset = tokens_of(here, "val"), tokens_of(here, "val", 3), here.dataset("val")
    assert torch.equal(three.indices[:11], one.indices)
    assert torch.equal(three.labels, one.labels.repeat(3))
    dataset.with_segmentation = True
    item = dataset[2, 11 + 2]  # the second view of image 2
    assert torch.equal(three.segmentation[13].long(), item["segmentation"])
    image = to_images(item["image"][None], here.device)
    assert torch.equal(three.indices[13], here.model.encode(image)[0])
    assert any(torch.equal(three.segmentation[11 + i], one.segmentation[i].flip(-1)) for i in range(11))


def test_features_are_encoded_once_and_belong_to_their_tokens(run):
    here, paths = Run(run, "cpu"), [run / "tokens-val.npz", run / "features-val.npy"]
    tokens, made = tokens_of(here, "val", 1, True), [path.stat().st_mtime_ns for path in paths]
    assert np.array_equal(tokens_of(here, "val", 1, True).features, tokens.features)
    assert [path.stat().st_mtime_ns for path in paths] == made
    features = torch.cat(here.model.features(images_of(here)[1]), dim=1).detach().numpy()
    assert np.allclose(tokens.features, features, atol=2e-3 * abs(features).max())  # half precision
    here.tokenizer = "0" * 64
    tokens_of(here, "val", 3)
    assert len(tokens_of(here, "val", 3, True).features) == 33  # not those of one view that were there


def of_another_run(run):
    """Replace a run's features by those of another run, as they are."""
    trained(Path("another"), *RUNS["official"].split(), "--seed=1")
    tokens_of(Run("another", "cpu"), "val", 1, True)
    shutil.copy("another/features-val.npy", run / "features-val.npy")


def zeros(run):
    """Replace a run's features by zeros; the key behind them is lost."""
    path = run / "features-val.npy"
    np.save(path, np.zeros_like(np.load(path)))


SPOILED = {
    "cut tokens": lambda run: os.truncate(run / "tokens-val.npz", 500),
    "cut features": lambda run: os.truncate(run / "features-val.npy", 500),
    "zeros": zeros,
    "another run's": of_another_run,
    "other data": lambda run: None,
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_cache_that_is_damaged_or_of_other_data_is_made_anew(run, what, monkeypatch):
    here, path = Run(run, "cpu"), run / "tokens-val.npz"
    before, made = tokens_of(here, "val", 1, True), path.stat().st_mtime_ns
    features = np.array(before.features)
    if what == "other data":
        monkeypatch.setattr("synthesize.identity", lambda *_, **__: "other files")
    SPOILED[what](run)
    tokens = tokens_of(here, "val", 1, True)
    assert path.stat().st_mtime_ns > made and torch.equal(tokens.indices, before.indices)
    assert np.array_equal(tokens.features, features)


def test_a_tokenizer_is_the_checkpoint_that_was_read(run, monkeypatch):
    digest = hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()
    loaded = torch.load

    def replaced_meanwhile(*arguments, **options):
        """As a training that goes on replaces it."""
        (run / "last.pt").write_bytes(b"the next checkpoint")
        return loaded(*arguments, **options)

    monkeypatch.setattr(torch, "load", replaced_meanwhile)
    assert Run(run, "cpu").tokenizer == digest


def test_label_shares_are_those_of_each_positions_pixels():
    maps = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 1], [-1, 0, 2, 9], [0, 0, 2, 2]]], dtype=torch.int16)
    tokens = Tokens(torch.zeros(1, 1, 2, 2), torch.zeros(1), maps)
    network = torch.nn.Module()
    network.condition = Condition("segmentation", 3, (2, 2), width=8, heads=1)
    shares = known_of(network, tokens, torch.tensor([0]))
    assert (4 * shares[0]).tolist() == [[[3, 0], [3, 0]], [[0, 4], [0, 0]], [[1, 0], [0, 3]]]


@every_run
@every_model
@pytest.mark.parametrize("condition", ["none", "class", "segmentation"])
def test_every_second_stage_trains_and_completes(run, model, condition):
    here, trained, tokens, choices = stage(run, model=model, condition=condition)
    given = torch.where(known_part("top", here.model.grid), tokens.indices[:4], -1)
    assert torch.equal(given[:, :, :4], tokens.indices[:4, :, :4]) and (given[:, :, 4:] == -1).all()
    choices.guidance = 1.5
    draw = lambda seed, rows: draw_images(here, trained, tokens, torch.tensor(rows), choices, seed, given[rows])
    drawn = draw(0, [0, 1, 2, 3])
    assert torch.equal(drawn[given >= 0], given[given >= 0])
    assert torch.equal(draw(0, [3])[:, :, :4], given[3:, :, :4])
    assert torch.equal(drawn, draw(0, [0, 1, 2, 3]))  # as its seed says
    assert not torch.equal(drawn, draw(1, [0, 1, 2, 3]))
    network, config = trained
    once, again = (validation(config, here, network, tokens, range(4)) for _ in range(2))
    assert once == again  # one noise
    network.loss = lambda x, *_: [torch.tensor(float(len(x)))]
    assert losses_of(config, here, network, tokens, torch.tensor([3]))[0] == 1  # one image
    here.tokenizer = "0" * 64
    with pytest.raises(UserError, match="of other weights"):
        load_stage(here, stage_folder(here, choices))


@every_model
def test_a_resumed_second_stage_equals_an_uninterrupted_one(run, model, monkeypatch):
    folder, which = run / "synthesis" / f"{model}-class", [f"--model={model}", "--condition=class"]
    flags = [*which, *SMALL, "--steps=4", "--dropout=0.2"]
    read = lambda: re.sub(r'"images/s": [\d.]+', "", (folder / "metrics.jsonl").read_text())
    main(["run", "train", *flags])
    whole, lines, step = torch.load(folder / "last.pt"), read(), StageTrainer.train_step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # after three steps
        patch.setattr(StageTrainer, "train_step", lambda self, rows: 1 / (self.step < 3) and step(self, rows))
        main(["run", "train", *flags, "--overwrite"])
    go("train", *which, "--resume")
    for a, b in zip(tree_leaves(whole), tree_leaves(torch.load(folder / "last.pt")), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert read() == lines and lines.count("\n") == 6  # four steps, two validations


def test_averaged_weights_follow_without_a_graph(run):
    here, (network, config), tokens, _ = stage(run, condition="segmentation")
    stored = torch.load(run / "synthesis/gpt-segmentation/best.pt")["ema"]
    torch.testing.assert_close(dict(network.state_dict()), dict(stored), rtol=0, atol=0)
    trainer = StageTrainer(config, here, network.condition.count, tokens, range(4))
    vector = lambda network: torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    start, _ = vector(trainer.network), trainer.train_step([0, 1])
    expected = start.lerp(vector(trainer.network), 9 / 11)  # a decay of 2 / 11
    torch.testing.assert_close(vector(trainer.ema), expected)
    assert not any(average.requires_grad for average in trainer.ema.parameters())


def test_bits_add_up_in_the_table(run, capsys, monkeypatch):
    here, trained, tokens, choices = stage(run, condition="segmentation")
    bits, (images, x) = torch.zeros(11, 3), images_of(here)
    known = known_of(trained[0], tokens, torch.arange(11))
    for i, logits in enumerate(trained[0](tokens.indices, known)):
        likely = logits.detach().double().log_softmax(-1)
        bits[:, i] = -likely.gather(2, tokens.indices[:, i].flatten(1)[..., None]).sum((1, 2)) / math.log(2)
    result = evaluate_stage(here, trained, choices, QUARTERS)
    assert result["bits"] == pytest.approx(dict(zip(here.token_names, (bits.mean(0) / 64).tolist())))
    image, uniform = bits.sum(1).mean().item(), 64 * sum(map(math.log2, here.model.sizes))
    found = [result[f"bits_{name}"] for name in ("image", "per_bit")]
    assert found == pytest.approx([image, image / uniform])
    assert result["psnr"] == pytest.approx(psnr(here.model(x).x_hat, x).mean().item(), rel=1e-5)
    nothing = torch.full_like(tokens.indices, -1)
    drawn = draw_images(here, trained, tokens, torch.arange(11), choices, 0, nothing)
    drawn = to_bytes(here.model.decode(drawn).detach())
    features = (QUARTERS(part).double().numpy() for part in (images, drawn))
    assert result["fid"] == pytest.approx(fid(*features), rel=1e-3)
    assert json.loads(Path("run/synthesis/gpt-segmentation/evaluation.json").read_text()) == result
    go("evaluate")
    row = r"\n\| run \| gpt \| segmentation \|.*\n\nFID: – .missing: FID"
    assert re.search(row, capsys.readouterr().out)
    monkeypatch.setattr("synthesize.load_or_reason", lambda *_: (QUARTERS, ""))
    go("evaluate")
    warning = "FID over 11 images, no more than its features, is biased upward"
    assert warning in capsys.readouterr().out


@every_run
@every_model
def test_a_word_in_its_place_stays(run, model):
    here, trained, tokens, choices = stage(run, model=model, condition="none")
    nothing, rows = torch.full_like(tokens.indices[:2], -1), torch.arange(2)
    for i, words in enumerate(here.model.per_token(here.words)):
        given = pin_words(here, nothing, ["1,2=" + "," * i + words[2]])
        assert (given >= 0).sum() == 2 and (nothing == -1).all()
        assert (draw_images(here, trained, tokens, rows, choices, 0, given)[:, i, 1, 2] == 2).all()


def test_words_are_pinned_and_parts_completed(run, capsys):
    adjectives, nouns = Run(run, "cpu").words
    flags = ["--condition=segmentation", "--words", "--output=s.png"]
    pin = f"3,4={adjectives[3]},{adjectives[5]},{nouns[4]}"
    go("sample", *flags, "--pin", pin, "--count=1", "--repeat=1")
    grid = capsys.readouterr().out.split("sample 1 for image 0\n")[1].splitlines()
    assert f"{adjectives[3]} {adjectives[5]} {nouns[4]}" in grid[3]
    left = [[True, True, False, False]] * 4
    assert known_part("left", (4, 4)).tolist() == left
    assert known_part("right", (4, 4)).tolist() == (~np.array(left)).tolist()
    assert known_part("bottom", (4, 2)).tolist() == [[False] * 2] * 2 + [[True] * 2] * 2
    go("complete", *flags, "--part=left", "--count=3")
    labels = stage(run, condition="segmentation")[2].segmentation[[0, 5, 10]].unique()
    legend = 20 * math.ceil(len(labels) / 6)  # below originals, maps, decoded, known, 2 completed
    assert Image.open("s.png").size == (150 + 3 * 132, 6 * 132 + legend)


def test_two_runs_share_a_picture(run):
    main("run run sample --device=cpu --condition=segmentation --count=2 --repeat=1 --output=s.png".split())
    rows = np.array(Image.open("s.png"))[: 6 * 132, 150 : 150 + 2 * 132].reshape(6, 132, -1, 3)
    # originals, maps; twice decoded, drawn
    assert np.array_equal(rows[2:4], rows[4:6]) and not np.array_equal(rows[2], rows[3])
    first = images_of(Run(run, "cpu"))[0][0].permute(1, 2, 0).numpy()
    assert np.array_equal(rows[0][20:128:4, :128:4], first[5:])  # above them stands the image's number
    state = torch.load("run/last.pt", weights_only=True)
    shutil.copytree("run", "moved")
    torch.save({**state, "config": {**state["config"], "data": "elsewhere"}}, "moved/last.pt")
    with pytest.raises(UserError, match="these runs are of several resolutions or data sets"):
        main("run moved sample --device=cpu --condition=segmentation --count=2".split())


def test_photographs_are_read_as_they_are(run, capsys):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), np.uint8)
    for name, picture in zip("ab", pictures):
        Image.fromarray(picture).save(f"{name}.png")
    go("tokens", "a.png", "b.png")
    here, printed = Run(run, "cpu"), capsys.readouterr().out
    for name in "ab":
        x = here.read(f"{name}.png")
        assert f"\n{name}.png\n{here.spell(here.model.encode(x)[0])}\n" in printed


def test_photographs_become_a_token_file_and_images_again(run, capsys):
    for name in "ab":
        Image.effect_noise((48, 40), 80).convert("RGB").save(f"{name}.png")
    go("tokens", "a.png", "b.png", "--output=x.npz", "--words", "1")
    here, printed = Run(run, "cpu"), capsys.readouterr().out
    x = torch.cat([here.read(f"{name}.png") for name in "ab"])
    indices = here.model.encode(x)
    assert torch.equal(torch.from_numpy(np.load("x.npz")["indices"]).long(), indices)
    assert f"\nb.png\n{here.spell(indices[1])}\n" in printed and "\na.png\n" not in printed
    go("tokens", "--decode=x.npz", "--output=images")
    expected = to_bytes(here.model.decode(indices).detach()).permute(0, 2, 3, 1).numpy()
    decoded = np.stack([np.array(Image.open(path)) for path in sorted(Path("images").iterdir())])
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_the_only_second_stage_needs_no_name(run, capsys):
    flags = ["--count=2", "--repeat=1", "--output=s.png"]
    go("sample", *flags, "--words", "10")
    printed = capsys.readouterr().out
    assert "sample 1 for image 10" in printed and "for image 0" not in printed
    shutil.copytree("run/synthesis/gpt-segmentation", "run/synthesis/ldm-segmentation")
    with pytest.raises(UserError, match="several second stages in 'run' .there: gpt-seg.*, ldm-seg"):
        go("sample", *flags)
    go("sample", *flags, "--model=gpt")


def test_sub_commands_have_their_own_page(capsys):
    for words in (["train", "--help"], ["run", "train", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        page = capsys.readouterr().out
        assert "--weight-decay" in page and "(default: 768; tiny: 192; demo: 128)" in " ".join(page.split())
    with pytest.raises(SystemExit):
        main(["train", "run", "--steps=3"])
    message = "name a command after a run of train.py: train, sample, complete, evaluate, tokens"
    assert message in capsys.readouterr().err
    for words in (["runs/demo-vqct"], ["runs/demo-vqct", "complte"], []):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


REFUSED = """
train --stepz 3 → unrecognized arguments: --stepz 3; see .* --help
tokens a.png --split train → argument --split: not allowed with argument PHOTO
train --condition class --heads 5 → must be a multiple of twice the 5 heads
train --condition segmentation → exists; go on with --resume
train --condition segmentation --resume --lr 1 → --resume cannot change --lr from
train --condition segmentation --resume --steps 2 → is at step 3 already
train --dropout 1.5 → 2 error: argument --dropout
complete --words 77 --repeat 1 → --words 77: there are images .0, 1, 2
sample --sampling-steps 5 → --sampling-steps changes nothing
sample --condition none → no such second stage in 'run' .there: gpt-segmentation.
complete --condition segmentation --pin 3,99=red → --pin 3,99=red: expected row,column=adjective1,adjective2,noun
complete --condition segmentation --pin=-1,4=red → -1 is not in range
complete --condition segmentation --pin 3,4=,,zqxv → with words of this run: 'zqxv' is not in list
complete --condition segmentation --pin 3,4=red,wing,red,wing → --pin 3,4=red,wing,red,wing: expected row,column=
complete --part nowhere → argument --part: invalid choice: 'nowhere'
tokens --words 11 → there are images .0, 1, 2
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_flags_that_cannot_be_are_a_line(run, line, capsys):
    flags, message = line.split(" → ")
    with pytest.raises((UserError, SystemExit)) as error:
        go(*flags.split())
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
