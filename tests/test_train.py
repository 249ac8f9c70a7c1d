"""Data sets, the command line, and training itself: steps, checkpoints, resuming."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import norm

import prior as prior_module
import train as train_module
from conftest import ROOT, SHARED, run_training, safetensors_bytes
from prior import Prior, UserError, count_captions
from test_vqct import Published
from train import (
    DEMO_ADJECTIVES,
    DEMO_NOUNS,
    DEMO_SPEECH,
    METHODS,
    SEGMENTS,
    SPECIES,
    Config,
    DemoDataset,
    ImageDataset,
    TrainBatches,
    Trainer,
    prepare_inputs,
    cub_records,
    describe_scene,
    folder_records,
    load_checkpoint,
    load_run,
    make_loader,
    parse,
    portable,
    psnr,
    render_scene,
    resolve,
    sample_scene,
)


@pytest.fixture
def few_birds(monkeypatch):
    monkeypatch.setattr(DemoDataset, "SIZES", {"train": 96, "val": 8})


pytestmark = pytest.mark.usefixtures("few_birds")

# ---------------------------------------------------------------------------------------------
# The demo


def test_demo_pictures_depend_on_seed_split_and_index_alone():
    image, segmentation = render_scene(sample_scene(3, "train", 5), 48)
    again, _ = render_scene(sample_scene(3, "train", 5), 48)
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8 and segmentation.shape == (48, 48)
    assert np.array_equal(image, again)
    others = [sample_scene(4, "train", 5), sample_scene(3, "val", 5), sample_scene(3, "train", 6)]
    assert all(not np.array_equal(render_scene(scene, 48)[0], image) for scene in others)


@pytest.mark.parametrize("index", range(4))
def test_demo_pictures_are_the_same_scene_at_any_resolution(index):
    scene = sample_scene(0, "train", index)
    small, small_map = render_scene(scene, 64)
    large, large_map = render_scene(scene, 256)
    shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 6  # of 255: edges and fine texture differ, nothing else
    assert (large_map[2::4, 2::4] == small_map).mean() > 0.9


def test_demo_is_varied_and_smooth():
    images, segments, species = [], set(), set()
    for index in range(48):
        scene = sample_scene(0, "train", index)
        image, segmentation = render_scene(scene, 64)
        images.append(image)
        segments |= set(np.unique(segmentation))
        species.add(scene.species)
        assert (segmentation >= SEGMENTS.index("back")).mean() > 0.03  # a bird is in the picture
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500  # shading, not flat colour
    assert len(segments) >= 8 and len(species) >= 12 and len(SPECIES) >= 12
    assert np.stack(images).std(axis=0).mean() > 30


def test_demo_captions_use_the_word_list():
    words, function = (
        set(),
        "a an the and or but with of in on over behind is are has its this it whose to standing perched flying swimming".split(),
    )
    for index in range(400):
        captions = describe_scene(sample_scene(0, "train", index))
        assert len(captions) >= 3 and len(set(captions)) == len(captions)
        for caption in captions:
            words |= set(caption.replace(",", " ").split())
    unknown = {w for w in words if not DEMO_SPEECH.is_adjective(w) and DEMO_SPEECH.noun(w) is None and w not in function}
    assert not unknown
    assert sum(w in DEMO_ADJECTIVES for w in words) >= 40 and len({DEMO_SPEECH.noun(w) for w in words} & DEMO_NOUNS) >= 40


def test_demo_prior_knows_the_birds():
    counts = count_captions((c for i in range(300) for c in describe_scene(sample_scene(0, "train", i))), DEMO_SPEECH)
    assert counts.pairs[("orange", "breast")] > 5 and counts.pairs[("white", "belly")] > 5 and counts.pairs[("orange", "water")] == 0
    assert sum(part == "adjective" for _, part in counts.words) >= 40 and sum(part == "noun" for _, part in counts.words) >= 40


def test_demo_dataset_keeps_what_it_drew():
    dataset = DemoDataset("val", 32)
    dataset.with_segmentation = True
    item = dataset[7]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.uint8 and item["segmentation"].shape == (32, 32)
    assert dataset.drawn.sum() == 1 and torch.equal(dataset[7]["image"], item["image"])
    assert dataset.classes[item["label"]] == SPECIES[sample_scene(0, "val", 7).species].name


# ---------------------------------------------------------------------------------------------
# Data on disk


def save_image(path, size=(20, 16), colour=(10, 200, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    names = [f"00{c}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (1, 2) for i in range(3)]
    for name in names:
        save_image(root / "images" / name)
    write = lambda name, lines: (root / name).write_text("\n".join(lines) + "\n")
    write("images.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    write("train_test_split.txt", [f"{i} {int(i % 3 > 0)}" for i in range(1, 7)])
    write("image_class_labels.txt", [f"{i} {1 + (i > 3)}" for i in range(1, 7)])
    write("classes.txt", ["1 001.Bird_1", "2 002.Bird_2"])
    for name in names[:2]:
        text = (root / "text" / name).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("a small bird\nits belly is white\n")
    return root


def test_cub_layout_and_split(cub):
    records, classes = cub_records(cub, "train")
    assert classes == ["001.Bird_1", "002.Bird_2"] and [r.label for r in records] == [0, 0, 1, 1]
    assert [r.path.name for r in cub_records(cub, "val")[0]] == ["Bird_1_2.jpg", "Bird_2_2.jpg"]
    assert list(ImageDataset(records, classes, 8).captions()) == ["a small bird", "its belly is white"] * 2
    (cub / "classes.txt").unlink()
    with pytest.raises(UserError, match="no classes.txt"):
        cub_records(cub, "train")


@pytest.mark.skipif(not (SHARED / "CUB_200_2011").is_dir(), reason="no photographs on this machine")
def test_cub_on_real_photographs():
    sizes = {split: len(cub_records(SHARED / "CUB_200_2011", split)[0]) for split in ("train", "val")}
    assert sizes == {"train": 1500, "val": 1389}
    records, classes = cub_records(SHARED / "CUB_200_2011", "train")
    item = ImageDataset(records, classes, 64)[0]
    assert item["image"].shape == (3, 64, 64) and len(classes) == 200 and item["image"].float().std() > 10


def test_folder_of_images_with_classes_captions_and_label_maps(tmp_path):
    for i in range(10):
        save_image(tmp_path / "data" / ("red" if i < 5 else "blue") / f"{i}.png", colour=(i, 0, 0))
        (tmp_path / "maps" / ("red" if i < 5 else "blue")).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 20), i, np.uint8)).save(tmp_path / "maps" / ("red" if i < 5 else "blue") / f"{i}.png")
    (tmp_path / "data" / "red" / "3.txt").write_text("a red thing\n")
    records, classes = folder_records(tmp_path / "data", "train", tmp_path / "maps")
    held_out, _ = folder_records(tmp_path / "data", "val", tmp_path / "maps")
    assert (
        classes == ["blue", "red"]
        and len(records) == 9
        and len(held_out) == 1
        and not {r.path for r in records} & {r.path for r in held_out}
    )
    dataset = ImageDataset(records, classes, 16)
    assert list(dataset.captions()) == ["a red thing"] and "segmentation" not in dataset[0]
    dataset.with_segmentation = True
    for index in range(9):
        item = dataset[index]
        assert (item["segmentation"] == item["image"][0].long()).all() and item["segmentation"].dtype == torch.int64
        assert item["label"] == classes.index(records[index].path.parent.name)
    (tmp_path / "maps" / "red" / "1.png").unlink()
    with pytest.raises(UserError, match="1.png' cannot be read: missing"):
        train_module.readable(folder_records(tmp_path / "data", "train", tmp_path / "maps")[0], "train")


def test_classes_are_those_of_both_splits(tmp_path):
    for i, name in enumerate("aaaaabbbbbccccc"):
        save_image(tmp_path / name / f"{i:02d}.png")
    (train_records, train_classes), (val_records, val_classes) = (folder_records(tmp_path, split) for split in ("train", "val"))
    assert train_classes == val_classes == ["a", "b", "c"] and [r.label for r in val_records] == [1]


def test_label_maps_fit_photographs_of_any_shape_and_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned
    save_image(tmp_path / "data" / "x.jpg", size=(661, 287), exif=exif)
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.arange(661 * 287, dtype=np.uint32).reshape(661, 287).astype(np.uint8)).save(tmp_path / "maps" / "x.png")
    record = train_module.Record(tmp_path / "data" / "x.jpg", segmentation=tmp_path / "maps" / "x.png")
    dataset = ImageDataset([record], [], 64)
    dataset.with_segmentation = True
    image, segmentation = dataset.read(0)
    assert image.shape[1:] == segmentation.shape[1:] and image.shape[1] > image.shape[2] == 64


def test_folder_with_splits_of_its_own(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            save_image(tmp_path / split / f"{i}.png")
    assert [len(folder_records(tmp_path, split)[0]) for split in ("train", "val")] == [3, 2]
    with pytest.raises(UserError, match="does not exist"):
        folder_records(tmp_path / "absent", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        folder_records(tmp_path / "empty", "train")


def test_crops_are_central_in_evaluation_and_random_in_training(tmp_path):
    gradient = np.zeros((16, 40, 3), np.uint8)
    gradient[..., 0] = np.arange(40) * 5
    Image.fromarray(gradient).save(tmp_path / "x.png")
    dataset = ImageDataset([train_module.Record(tmp_path / "x.png")], [], 16)
    assert dataset[0]["image"][0, 0].tolist() == [5 * x for x in range(12, 28)]
    rows = [dataset[(0, draw)]["image"][0, 0].int() for draw in range(40)]
    assert len({row.min().item() for row in rows}) > 8  # places
    assert {bool(row[0] > row[-1]) for row in rows} == {True, False}  # flips
    assert torch.equal(dataset[(0, 7)]["image"], dataset[(0, 7)]["image"])


def test_unreadable_image_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="x.png' cannot be read"):
        ImageDataset([train_module.Record(tmp_path / "x.png")], [], 16)[0]


def test_every_epoch_sees_every_image_once_from_any_step():
    whole = list(TrainBatches(10, 4, 0, 10, seed=3))
    indices = [index for batch in whole for index, _ in batch]
    assert [draw for batch in whole for _, draw in batch] == list(range(40))
    assert all(sorted(indices[e : e + 10]) == list(range(10)) for e in (0, 10, 20, 30)) and indices[:10] != indices[10:20]
    assert list(TrainBatches(10, 4, 6, 10, seed=3)) == whole[6:]


# ---------------------------------------------------------------------------------------------
# Configuration


def test_flags_win_over_method_over_preset():
    config = parse(["--method", "vqgan", "--codebook-size", "77", "--multipliers", "1,2", "--no-amp"])[0]
    assert (config.preset, config.codes, config.codebook_size, config.multipliers, config.amp) == ("tiny", "uniform", 77, (1, 2), False)
    assert config.out == "runs/demo-vqgan"
    config = resolve({"dataset": "cub", "batch_size": 4, "accumulate": 2})
    assert (config.preset, config.resolution, config.channels, config.data) == ("f16", 256, 128, "data/CUB_200_2011")
    assert config.lr == pytest.approx(4.5e-6 * 8)


def test_recipes_and_controls_are_flags():
    official = resolve({"recipe": "official", "transfer_dropout": 0.1})
    assert (official.transfer_layers, official.transfer_dropout, official.last_relu, official.beta_on) == (2, 0.1, False, "codebook")
    assert official.adjective_neighbours == 2 and official.weighted_edges and official.out == "runs/demo-vqct-official"
    assert resolve({}).transfer_layers == 3 and resolve({"method": "simvq", "recipe": "official"}).transfer_layers == 1
    assert resolve({"method": "vqgan", "recipe": "official"}).adjective_neighbours == 1
    assert resolve({"shuffle": "edges", "codes": "random", "seed": 2}).out == "runs/demo-vqct-edges-random-seed2"
    assert resolve({"method": "random-mlp", "codes": "random"}).out == "runs/demo-random-mlp"


def test_seeds_share_the_demos_pictures_and_a_step_follows_the_schedules(prior):
    assert torch.equal(DemoDataset("val", 32, seed=0)[1]["image"], DemoDataset("val", 32, seed=1)[1]["image"])
    trainer = Trainer(resolve({**TINY, "method": "gumbel", "steps": 2, "gan_weight": 0.0}), None, torch.device("cpu"))
    temperatures = []
    for _ in range(2):
        trainer.train_step([torch.zeros(1, 3, 32, 32)])
        temperatures.append(trainer.model.quantizers[0].temperature)
    assert temperatures == [1.0, pytest.approx((1 + 1 / 16) / 2)]


def test_a_shuffled_prior_is_the_runs_own(tmp_path):
    plain, edges = (run_tiny(tmp_path / what, shuffle=what, steps=1) for what in ("none", "edges"))
    a, b = Prior.load(plain / "prior.npz"), Prior.load(edges / "prior.npz")
    assert not np.array_equal(a.edges, b.edges) and np.array_equal(np.bincount(a.edges[:, 0]), np.bincount(b.edges[:, 0]))
    stored = load_checkpoint(edges / "last.pt")["prior"]["edges"]
    assert np.array_equal(stored.numpy(), b.edges)


def command(*args, cwd=None):
    return subprocess.run([sys.executable, ROOT / "train.py", *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_help_names_every_flag_with_its_default():
    text = command("--help").stdout
    for name in Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    valued = [name for name in Config.__dataclass_fields__ if getattr(Config, name) != ""]
    assert text.count("(default:") >= len(valued) > 50


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_missing_data_and_missing_cuda_are_a_line_each(tmp_path):
    result = command("--dataset", "cub", "--device", "cuda", cwd=tmp_path)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == 2 and "--device cuda" in lines[0] and "cub is not at 'data/CUB_200_2011'" in lines[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(resolution=16), "the patch discriminator needs 24"),
        (dict(lr=-1.0), "must not be negative"),
        (dict(dataset="folder"), "needs --data DIR"),
        (dict(method="vqcat"), "unknown method 'vqcat'; methods are vqct"),
        (dict(steps=0), "--steps 0 must be at least 1"),
        (dict(code_dim=9, transfer="none"), "does not divide"),
        (dict(adjective_neighbours=0), "--adjective-neighbours 0 must be at least 1"),
        (dict(usage_decay=1.0), "--usage-decay 1.0 must lie in"),
        (dict(method="vqgan", shuffle="edges"), "--shuffle edges changes nothing here: codes are uniform, transfer is none"),
        (dict(method="random-mlp", shuffle="vectors"), "--shuffle vectors changes nothing"),
    ],
)
def test_bad_choices_are_named(given, message):
    with pytest.raises(UserError, match=message):
        resolve(given)


def test_bad_device_and_batch_are_named():
    for name in ("meta", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}"):
            prepare_inputs(resolve({"device": name}))
    with pytest.raises(UserError, match="not a device"):
        prepare_inputs(resolve({"device": "gpu"}))
    with pytest.raises(UserError, match="more than the 96 training images"):
        prepare_inputs(resolve({"batch_size": 5000}))


# ---------------------------------------------------------------------------------------------
# Training


TINY = dict(
    resolution=32,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    z_channels=8,
    code_dim=8,
    transfer_width=16,
    batch_size=4,
    log_every=1,
    eval_every=4,
    eval_images=4,
    gan_start=3,
    lr=2e-3,
    schedule="constant",
)


def run_tiny(out, **choices):
    return run_training(resolve({**TINY, "out": str(out), "steps": 8, **choices}))


def lines_of(out, kind="loss"):
    """The lines of metrics.jsonl that hold `kind`, without their times."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    timeless = [{name: value for name, value in line.items() if name not in ("images_per_second", "data_wait")} for line in lines]
    return [line for line in timeless if kind in line]


def test_training_lowers_the_loss_and_leaves_a_whole_run(tmp_path):
    out = run_tiny(tmp_path / "run", steps=60, eval_every=30, gan_start=40)
    lines, pixel = lines_of(out), [line["pixel"] for line in lines_of(out)]
    assert [line["step"] for line in lines_of(out, "validation_psnr")] == [30, 60]
    assert len(lines) == 60 and np.mean(pixel[-10:]) < 0.5 * np.mean(pixel[:5])
    assert all({"step", "loss", "codes_used"} <= set(line) for line in lines)
    assert "adaptive_weight" not in lines[39] and {"adaptive_weight", "real_logits", "fake_logits", "discriminator"} <= set(lines[40])
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "last.pt",
        "best.pt",
        "prior.npz",
        "codebook_start.npz",
        "reconstructions",
    }
    assert [p.name for p in sorted((out / "reconstructions").iterdir())] == ["step_0000030.png", "step_0000060.png"]
    with np.load(out / "codebook_start.npz") as start:
        assert start["adjective"].shape[1] == start["noun"].shape[1] == 4 and len(start["adjective"]) >= 40
    assert json.loads((out / "config.json").read_text())["steps"] == 60


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_reloads(method, tmp_path):
    out = run_tiny(tmp_path / "run", method=method)
    model, config, prior, step = load_run(out, torch.device("cpu"))
    assert (config.method, step) == (method, 8) and not model.training
    state = load_checkpoint(out / "last.pt")
    assert ("discriminator" in state) == (config.gan_weight > 0) and (prior is None) == (not train_module.needs_prior(config))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x)), model(x).x_hat)


@pytest.mark.parametrize("method", ["vqct", "cvq", "regvq", "gumbel"])
def test_resuming_equals_an_uninterrupted_run(method, tmp_path):
    choices = dict(method=method, accumulate=2, temperature_end=1.0)  # a schedule over the run would depend on its length
    whole = run_tiny(tmp_path / "whole", **choices)
    run_tiny(tmp_path / "parts", steps=4, **choices)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')  # written after the checkpoint by a run that was killed
    train_module.main(["--out", str(tmp_path / "parts"), "--resume", "--steps", "8"])
    assert lines_of(whole) == lines_of(tmp_path / "parts")
    first, second = load_checkpoint(whole / "last.pt"), load_checkpoint(tmp_path / "parts" / "last.pt")
    for part in ("model", "discriminator"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    for part in ("generator_optimizer", "discriminator_optimizer"):
        for index, slot in first[part]["state"].items():
            assert all(torch.equal(slot[name], second[part]["state"][index][name]) for name in slot)


def test_seed_repeats_a_run_whatever_the_workers(tmp_path):
    assert (
        lines_of(run_tiny(tmp_path / "a", steps=5))
        == lines_of(run_tiny(tmp_path / "b", steps=5, workers=2))
        != lines_of(run_tiny(tmp_path / "c", steps=5, seed=1))
    )


def test_accumulating_equals_one_large_batch(tmp_path):
    """Without the adversary, whose batch norm sees micro-batches."""
    states = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        out = run_tiny(tmp_path / f"{accumulate}", method="vqct-vqvae", batch_size=batch_size, accumulate=accumulate, steps=1, lr=1e-3)
        states.append(load_checkpoint(out / "last.pt")["generator_optimizer"]["state"])
    for index, slot in states[0].items():
        assert norm(slot["exp_avg"].flatten() - states[1][index]["exp_avg"].flatten()) <= 1e-4 * norm(slot["exp_avg"].flatten()) + 1e-7


def test_shared_forward_gives_the_gradients_of_the_written_loss(prior):
    """One backward pass from gradients at the reconstruction equals backward through Eq. 2 + λ·GAN."""
    config = resolve({**TINY, "gan_start": 0})
    trainer = Trainer(config, portable(prior), torch.device("cpu"))
    x = torch.randn(4, 3, 32, 32)
    trainer.generator_optimizer.step = trainer.discriminator_optimizer.step = lambda: None
    metrics = trainer.train_step([x])
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    judged = {name: p.grad.clone() for name, p in trainer.discriminator.named_parameters()}
    trainer.model.zero_grad(), trainer.discriminator.zero_grad()
    output = trainer.model(x)
    total = (
        torch.nn.functional.mse_loss(output.x_hat, x)
        + output.quantizer_loss
        - metrics["adaptive_weight"] * trainer.discriminator(output.x_hat).mean()
    )
    total.backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)
    trainer.discriminator.zero_grad()
    train_module.hinge_loss(trainer.discriminator(x), trainer.discriminator(output.x_hat.detach())).backward()
    for name, p in trainer.discriminator.named_parameters():
        torch.testing.assert_close(judged[name], p.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--channels", "16"), "cannot change --channels from 8"),
        (("--method", "vqgan"), "cannot change --method from 'vqct'"),
        (("--gan-weight", "0"), "cannot change --gan-weight"),
        (("--lr", "-1", "--steps", "2"), "--lr -1.0 must not be negative"),
        ((), "is at step 1 already; give --steps more"),
    ],
)
def test_resuming_refuses_to_become_another_run(tmp_path, flags, message):
    out = run_tiny(tmp_path / "run", steps=1)
    before = (out / "last.pt").read_bytes()
    with pytest.raises(UserError, match=message):
        train_module.main(["--out", str(out), "--resume", *flags])
    assert (out / "last.pt").read_bytes() == before


def test_a_start_that_fails_touches_nothing(tmp_path):
    out = run_tiny(tmp_path / "run", steps=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for choices in (dict(prior=str(tmp_path / "absent.npz")), dict(resolution=33), dict(perceptual_weight=1.0, trunk_weights="absent.pth")):
        with pytest.raises(UserError):
            run_training(resolve({**TINY, "out": str(out), **choices}), "--overwrite")
        with pytest.raises(UserError):
            run_training(resolve({**TINY, "out": str(tmp_path / "new"), **choices}))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before and not (tmp_path / "new").exists()


def random_lpips(config):
    torch.manual_seed(1)
    return train_module.LPIPS(config.perceptual_trunk)


def test_a_folder_trains_with_a_prior_lpips_and_the_cosine(tmp_path, prior, monkeypatch):
    """The path of one's own photographs: folder, prior file, perceptual loss, decaying rate; then evaluation and resuming."""
    monkeypatch.setattr(train_module, "load_lpips", random_lpips)
    for i in range(20):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            save_image(tmp_path / "data" / f"{i:02d}.png")
        )
    prior.save(tmp_path / "prior.npz")
    choices = dict(
        dataset="folder", data=str(tmp_path / "data"), prior=str(tmp_path / "prior.npz"), perceptual_trunk="squeeze", perceptual_weight=1.0
    )
    out = run_tiny(tmp_path / "run", steps=4, schedule="cosine", eval_every=2, **choices)
    assert all(line["perceptual"] > 0 for line in lines_of(out))
    rates = [load_checkpoint(out / "last.pt")[name]["param_groups"][0]["lr"] for name in ("generator_optimizer", "discriminator_optimizer")]
    assert rates == pytest.approx([2e-3 * (0.5 + 0.5 * np.cos(np.pi * 3 / 4))] * 2)
    model, _, stored, _ = load_run(out, torch.device("cpu"))
    assert model.codebook.sizes == (7, 9) and stored["noun_words"] == list("ABCDEFGHI")
    train_module.main(["--out", str(out), "--resume", "--steps", "6"])
    assert len(lines_of(out)) == 6 and json.loads((out / "config.json").read_text())["steps"] == 6


def test_an_image_that_breaks_while_a_worker_reads_is_one_line(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(b"nothing")
    loader = make_loader(ImageDataset([train_module.Record(tmp_path / "0.png")], [], 16), torch.device("cpu"), 1)
    with pytest.raises(SystemExit) as stop:
        prior_module.command(lambda: next(iter(loader)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: image '") and "0.png' cannot be read" in error and error.count("\n") == 1


def test_a_run_resumes_without_the_files_it_began_with(tmp_path, prior):
    prior.save(tmp_path / "prior.npz")
    chosen = dict(**TINY, prior=str(tmp_path / "prior.npz"), out=str(tmp_path / "run"))
    run_training(resolve({**chosen, "steps": 1}))
    (tmp_path / "prior.npz").unlink()
    run_training(resolve({**chosen, "steps": 2}), "--resume")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
    with pytest.raises(UserError, match="--prior .* does not exist"):
        run_training(resolve({**chosen, "out": str(tmp_path / "other")}))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_training_starts_from_published_weights(tmp_path, capsys, suffix):
    theirs, path = Published(), tmp_path / f"last{suffix}"
    if suffix == ".ckpt":
        torch.save({"epoch": 3, "state_dict": theirs.state}, path)
    else:
        path.write_bytes(safetensors_bytes({name: ("F32", value.shape, value.numpy().tobytes()) for name, value in theirs.state.items()}))
    sizes = dict(channels=128, multipliers=(1, 2), blocks=1, z_channels=16, code_dim=8, resolution=32, batch_size=2)
    chosen = resolve({"init": str(path), **sizes, "steps": 1, "eval_images": 2, "lr": 1e-12, "out": str(tmp_path / "run")})
    assert resolve({"init": "x"}).out == "runs/demo-vqct-init"
    run_training(chosen)
    state = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert torch.allclose(state["encoder.layers.0.weight"], theirs.state["encoder.conv_in.weight"], atol=1e-9)
    said = capsys.readouterr().out
    assert f"init: encoder, decoder, to_codes, from_codes of {path}; codebook, discriminator as without it" in said
    with pytest.raises(UserError, match=r"encoder.conv_in.weight is .*this network wants .*fit --preset f16"):
        run_training(resolve({"init": str(path), "out": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_cuda_is_finite_and_resumes(tmp_path, compiled):
    out = run_tiny(tmp_path / "run", device="cuda", compile=compiled)
    assert all(np.isfinite(line["loss"]) for line in lines_of(out))
    train_module.main(["--out", str(out), "--resume", "--steps", "10"])
    assert len(lines_of(out)) == 10


def test_an_existing_run_is_kept(tmp_path):
    out = run_tiny(tmp_path / "run", steps=1)
    before = (out / "last.pt").read_bytes()
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        run_tiny(out, steps=1)
    assert (out / "last.pt").read_bytes() == before
    run_training(resolve({**TINY, "out": str(out), "steps": 2}), "--overwrite")
    assert load_checkpoint(out / "last.pt")["step"] == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="not a run"):
        run_training(resolve({**TINY, "out": str(tmp_path / "other")}), "--overwrite")
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_bad_checkpoints_are_named(tmp_path):
    out = run_tiny(tmp_path / "run", steps=1)
    data = (out / "last.pt").read_bytes()
    for name, content in (("cut.pt", data[: len(data) // 2]), ("empty.pt", b""), ("text.pt", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}' cannot be read"):
            load_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")


def test_codes_used_counts_the_latest_epoch(prior):
    config = resolve(TINY)
    trainer = Trainer(config, portable(prior), torch.device("cpu"), training_images=10 * config.batch_size)
    assert trainer.statistics() == {"codes_used": [0, 0]}
    trainer.step = 30
    trainer.last_used[0][:] = torch.tensor([-1, 5, 19, 20, 25, 29, 0])
    assert trainer.statistics() == {"codes_used": [3, 0]}  # chosen in steps 20 … 29
    trainer.steps_per_epoch = 100
    assert trainer.statistics() == {"codes_used": [6, 0]}


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 4, 4)
    x_hat = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 5.0)])  # the second is clamped to 1
    np.testing.assert_allclose(psnr(x_hat, x).numpy(), [10 * np.log10(4 / 0.04), 10 * np.log10(4 / 1)], rtol=1e-5)


def test_loader_gives_uint8_batches():
    batch = next(iter(make_loader(DemoDataset("val", 16), torch.device("cpu"), -1, batch_size=3)))
    images = train_module.to_images(batch["image"], torch.device("cpu"))
    assert batch["image"].dtype == torch.uint8 and images.shape == (3, 3, 16, 16) and -1 <= images.min() < images.max() <= 1
