"""The demo, the command line, and training itself: steps, run folders, checkpoints, resuming."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_module
from conftest import ROOT, Foreign, idle, run_training
from prior import UserError, command, count_captions
from test_vqct import Published
from train import (
    Config,
    DEMO_SPEECH,
    DemoDataset,
    LAYERS,
    METHODS,
    RUN_FILES,
    Run,
    SEGMENTS,
    SPECIES,
    Scene,
    Trainer,
    load_checkpoint,
    make_loader,
    parse,
    precision,
    psnr,
    read_journal,
    resolve,
    save_checkpoint,
    to_images,
)
from vqct import LPIPS, ModelConfig, adaptive_weight, hinge_loss, needs_prior

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_birds_and_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(DemoDataset, "SIZES", {"train": 96, "val": 8})
    monkeypatch.chdir(tmp_path)


# ======== The demo


def test_demo_pictures_depend_on_split_and_index_alone():
    dataset, scene = DemoDataset("val", 48), Scene("val", 7)
    dataset.with_segmentation = True
    item, (image, labels) = dataset[7], scene.draw(48)
    assert item["image"].dtype == torch.uint8
    assert torch.equal(item["image"], image)
    assert item["segmentation"].dtype == torch.int64
    assert torch.equal(item["segmentation"], labels[0].long())
    assert dataset.classes[item["label"]] == scene.name
    assert dataset.captions_of(7) == scene.captions
    assert torch.equal(DemoDataset("val", 48, seed=1)[7]["image"], item["image"])
    for other in (Scene("train", 7), Scene("val", 6)):
        assert not torch.equal(other.draw(48)[0], image)


@pytest.mark.parametrize("index", range(4))
def test_demo_pictures_are_the_same_scene_at_any_resolution(index):
    (small, small_labels), (large, large_labels) = (
        Scene("train", index).draw(side) for side in (64, 256)
    )
    shrunk = torch.nn.functional.avg_pool2d(large.float(), 4)
    assert (shrunk - small).abs().mean() < 2  # of 255
    assert (large_labels[:, 2::4, 2::4] == small_labels).float().mean() > 0.97


def test_demo_is_varied_and_shows_a_whole_bird():
    scenes = [Scene("train", index) for index in range(60)]
    images, labels = (
        torch.stack(parts) for parts in zip(*(scene.draw(64) for scene in scenes))
    )
    bird = labels > SEGMENTS.index("perch")
    assert bird.float().mean(dim=(1, 2, 3)).min() > 0.06
    assert not bird[:, :, 0].any()
    assert (labels == SEGMENTS.index("eye")).flatten(1).any(1).all()
    assert len(labels.unique()) >= 8
    assert len({scene.name for scene in scenes}) >= 12
    assert images.float().std(dim=0).mean() > 30


def test_demo_captions_use_the_word_list_and_tell_what_is_drawn():
    function = set(
        "a an and in is has its the this of on with behind".split()
    )
    seen, everything = set(), []
    for scene in (Scene("train", index) for index in range(300)):
        words = {
            word
            for caption in scene.captions
            for word in caption.replace(",", " ").split()
        }
        assert len(set(scene.captions)) == len(scene.captions) >= 3
        assert SPECIES.keys() & words <= {scene.name}
        seen, everything = seen | words, everything + scene.captions
    assert {
        word
        for word in seen
        if not DEMO_SPEECH.is_adjective(word) and DEMO_SPEECH.noun(word) is None
    } <= function
    counts = count_captions(everything, DEMO_SPEECH)
    words = {
        part: {word for word, kind in counts.words if kind == part}
        for part in ("adjective", "noun")
    }
    assert len(words["adjective"]) >= 40
    assert len(words["noun"]) >= 40
    assert words["adjective"] <= DEMO_SPEECH.adjectives
    assert words["noun"] <= DEMO_SPEECH.nouns
    assert {noun for *_, noun, _ in LAYERS} | SPECIES.keys() <= words["noun"]
    assert all(
        counts.pairs[pair] > 5
        for pair in (("orange", "breast"), ("white", "belly"), ("calm", "water"))
    )
    assert counts.pairs["orange", "water"] == 0


# ======== Configuration

TINY = dict(
    resolution=32,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    z_channels=8,
    code_dim=8,
    transfer_width=16,
)
TINY |= dict(
    batch_size=4,
    log_every=1,
    eval_every=4,
    eval_images=4,
    gan_start=3,
    lr=2e-3,
    schedule="constant",
)


def tiny(**choices):
    """A Config of a network of a few thousand weights, whatever its method."""
    useless = idle(resolve(choices))
    usual = {
        name: value
        for name, value in {**TINY, "discriminator_layers": 1}.items()
        if name not in useless
    }
    return resolve({**usual, **choices})


def run_tiny(out, *flags, **choices):
    return run_training(tiny(**{"out": str(out), "steps": 8, **choices}), *flags)


def test_other_processes_are_seeded_at_every_step_at_which_a_run_can_stop(monkeypatch):
    seeded = []
    monkeypatch.setattr("train.seed_rank", lambda trainer: seeded.append(trainer.step))
    run_tiny("run", log_every=2, eval_every=3)
    assert seeded == [0, 2, 3, 4, 6, 8]


def lines_of(out, kind="loss"):
    """The lines of metrics.jsonl that hold `kind`, without their times."""
    lines = [
        json.loads(line)
        for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {name: line[name] for name in line if name != "images/s"}
        for line in lines
        if kind in line
    ]


def contents(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


def test_flags_win_over_method_over_recipe_over_preset():
    config, *others = parse(
        "--method vqgan --codebook-size 77 --multipliers 1,2 --no-amp".split()
    )
    assert (config.preset, config.codes, config.codebook_size, config.multipliers) == (
        "demo",
        "uniform",
        77,
        (1, 2),
    )
    assert not config.amp
    assert config.trained
    assert others == [None, False]  # neither resumed nor overwritten
    config = resolve({"dataset": "cub", "batch_size": 8})
    assert (config.preset, config.resolution, config.channels, config.data) == (
        "f16",
        256,
        128,
        "data/CUB_200_2011",
    )
    assert config.lr == pytest.approx(4.5e-6 * 8)
    assert config.out == "runs/cub-vqct"
    official = dict(
        code_dim=512,
        straight_through=False,
        amp=False,
        transfer_layers=2,
        transfer_width=256,
        last_relu=False,
        beta_on="codebook",
        adjective_neighbours=2,
        transfer_dropout=0.1,
    )
    assert (
        vars(resolve({"recipe": "official", "transfer_dropout": 0.1})).items()
        >= official.items()
    )
    assert resolve({}).transfer_layers == 3
    assert resolve({"method": "simvq", "recipe": "official"}).transfer == "linear"
    assert resolve({"method": "vqgan", "recipe": "official"}).adjective_neighbours == 1
    dims = {
        name: resolve({"dataset": "cub", "method": name, "recipe": "official"}).code_dim
        for name in METHODS
    }
    assert dims["vqct"] == dims["matched"] == 512
    assert dims["vqgan"] == dims["gumbel"] == dims["single-gcn"] == 256
    assert not resolve({"method": "gumbel", "recipe": "official"}).straight_through
    assert resolve({}).straight_through


@pytest.mark.parametrize(
    "name, given",
    [
        ("demo-vqct", dict(steps=5, lr=1.0)),
        ("coco-vqgan-recipe-official", dict(dataset="coco", method="vqgan", recipe="official")),
        ("demo-vqct-shuffle-edges-seed-2-codes-random", dict(shuffle="edges", codes="random", seed=2)),
        # Neither of these choices differs from what the method does anyway.
        ("demo-random-mlp", dict(method="random-mlp", codes="random", seed=0)),
        ("demo-vqct-glove", dict(prior="priors/glove.npz")),
        ("demo-matched-quantizer-cvq", dict(method="matched", quantizer="cvq")),
        ("demo-vqct-transfer-none", dict(transfer="none")),
        ("demo-vqct-multipliers-1-2", dict(multipliers=(1, 2))),
        ("demo-vqct-gan_weight-0.5-init", dict(init="vqgan.ckpt", gan_weight=0.5)),
    ],
)
def test_a_default_folder_names_what_departs_from_the_method(name, given):
    assert resolve(given).out == f"runs/{name}"


def test_help_shows_groups_of_flags_and_the_defaults_of_the_presets(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    titles = [
        field.metadata["group"]
        for field in Config.__dataclass_fields__.values()
        if "group" in field.metadata
    ]
    inherited, own = titles[:3], titles[3:]
    assert inherited == ["network", "codes", "quantizers"]
    assert own == ["data and prior", "run", "optimisation", "losses"]
    places = [text.index(f" {title}: --") for title in own + inherited]
    assert places == sorted(places)
    for words in (
        "(default: 256; demo: 64; tiny: 64)",
        "(default: 500000; demo: 1200; tiny: 1800)",
        "(default: (1, 1, 2, 2, 4); demo: (1, 1, 2); tiny: (1, 1, 2, 4))",
    ):
        assert words in text
    reasons = [
        field.metadata["reason"]
        for name, field in Config.__dataclass_fields__.items()
        if name not in ModelConfig.__dataclass_fields__
    ]
    assert all(len(reason.partition(" (default:")[0]) <= 80 for reason in reasons)


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert all(
        f"--{name.replace('_', '-')}" in text for name in Config.__dataclass_fields__
    )
    assert (
        text.count("(default:")
        >= sum(getattr(Config, name) != "" for name in Config.__dataclass_fields__)
        > 50
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--blocks 0", "argument --blocks: 0 does not lie between 1 and"),
        ("--beta nan", "argument --beta: nan does not lie"),
        ("--lr -1", "argument --lr: -1 does not lie between 0"),
        ("--workers -2", "argument --workers: -2 does not lie"),
        (
            "--resolution 16",
            "argument --resolution: 16 does not lie between 24 and",
        ),  # the patch discriminator's
        (
            "--usage-decay 1.0",
            "argument --usage-decay: 1.0 does not lie between 0 and 0.9999",
        ),
        ("--multipliers 1,0", "argument --multipliers: 1,0 does not lie between 1"),
        ("--multipliers 1,x", "argument --multipliers: invalid tuple value: '1,x'"),
        (
            "--method vqcat",
            "argument --method: invalid choice: 'vqcat' (choose from 'vqct'",
        ),
        (
            "--resume --overwrite",
            "argument --overwrite: not allowed with argument --resume",
        ),
        ("--reso 64", "unrecognized arguments: --reso 64"),
        ("--device gpu", "--device gpu: "),
        ("--data photos", "--data changes nothing with these flags; leave it out"),
        (
            "--dataset cub --data photos --download",
            "--download makes a folder CUB_200_2011; end --data with this name",
        ),
        ("--code-dim 1", "argument --code-dim: 1 "),
        (
            "--resume",
            "no run here: 'runs/demo-vqct/last.pt' is missing",
        ),
    ],
)
def test_bad_flags_are_a_line_each(capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(
        "signal.signal", lambda number, handler: None
    )  # pytest keeps its own
    with pytest.raises(SystemExit) as ended:
        command(lambda: train_module.main(flags.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag, given",
    [
        ("download", dict(download=True)),
        ("labels", dict(dataset="cub", labels="maps")),
        ("shuffle", dict(method="vqgan", shuffle="edges")),
        ("shuffle", dict(method="random-mlp", shuffle="vectors")),
        ("code-dim", dict(transfer="none", code_dim=8)),
        ("codebook-size", dict(codebook_size=9)),
        ("weighted-edges", dict(transfer="mlp", weighted_edges=True)),
        ("beta", dict(method="gumbel", beta=1.0)),
        ("transfer-dropout", dict(method="matched", transfer_dropout=0.1)),
        ("temperature-end", dict(method="cvq", temperature_end=0.5)),
        ("gan-start", dict(gan_weight=0.0, gan_start=4)),
        (
            "perceptual-trunk",
            dict(perceptual_trunk="squeeze"),
        ),  # the demo's preset has no LPIPS
        (None, dict(perceptual_trunk="squeeze", perceptual_weight=1.0)),
        (None, dict(shuffle="vectors")),
        (None, dict(dataset="folder", data="x", labels="maps")),
        (None, dict(method="regvq", temperature_end=0.5)),
    ],
)
def test_flags_that_change_nothing_are_refused(flag, given):
    if flag is None:
        assert asdict(resolve(given)).items() >= given.items()
    else:
        with pytest.raises(UserError, match=f"--{flag} changes nothing"):
            resolve(given)


def test_a_start_that_fails_is_named_and_touches_nothing(tmp_path):
    out = run_tiny(tmp_path / "run", steps=1)
    before = contents(out)
    for flags, message in (
        ("--resolution 33", "resolution 33 is not a multiple of"),
        ("--quantizer cvq", "quantizer 'cvq' needs trained codes without transfer"),
        ("--prior absent.npz", "'absent.npz' is no prior: .*No such file"),
        ("--init absent.ckpt", "weights 'absent.ckpt' cannot be read: .*No such file"),
        (
            "--perceptual-weight 1 --trunk-weights absent.pth --lpips-weights x",
            "absent.pth' cannot be read",
        ),
    ):
        for where in ("--out run --overwrite", "--out new"):
            with pytest.raises(UserError, match=message):
                train_module.main([*flags.split(), *where.split()])
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


# ======== Steps


def test_training_lowers_the_loss_and_leaves_a_whole_run(tmp_path):
    out = run_tiny(tmp_path / "run", steps=40, eval_every=20, gan_start=30)
    lines, pixel = lines_of(out), [line["pixel"] for line in lines_of(out)]
    assert [line["step"] for line in lines_of(out, "validation_psnr")] == [20, 40]
    assert len(lines) == 40
    assert np.mean(pixel[-10:]) < 0.5 * np.mean(pixel[:5])
    assert all(
        {"step", "loss", "quantizer", "gradient", "codes_used"} <= set(line)
        for line in lines
    )
    adversary = {
        "generator",
        "adaptive_weight",
        "discriminator",
        "real_logits",
        "fake_logits",
    }
    assert not adversary & set(lines[29])
    assert {*adversary, "discriminator_gradient"} <= set(lines[30])
    left = {
        "config.json",
        "metrics.jsonl",
        "last.pt",
        "best.pt",
        "prior.npz",
        "reconstructions.png",
    }
    assert set(contents(out)) == left
    assert left < set(RUN_FILES)
    noted, run = json.loads((out / "config.json").read_text()), Run(out, "cpu")
    assert noted.pop("torch") == torch.__version__
    assert Config(**{**noted, "multipliers": tuple(noted["multipliers"])}) == run.config
    for began, codes, words in zip(run.start, run.model.codebook(), run.words):
        assert began.shape == codes.shape == (len(words), 4)
        assert len(words) >= 40
        assert not torch.equal(began, codes)
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.size == (
            150 + 4 * 132,
            2 * 132,
        )  # four originals and, below, what became of them


def test_small_presets_begin_their_adversary_at_the_same_share_of_the_steps():
    assert resolve({"steps": 600}).gan_start == 500
    assert resolve({}).gan_start == 1000
    assert resolve({"steps": 600, "gan_start": 7}).gan_start == 7
    assert resolve({"preset": "tiny"}).gan_start == 1500
    assert resolve({"preset": "tiny", "steps": 1200}).gan_start == 1000
    assert resolve({"dataset": "cub", "steps": 1200}).gan_start == 5000


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_reloads(method, tmp_path):
    run = Run(run_tiny(tmp_path / "run", method=method, steps=4), "cpu")
    assert (run.config.method, run.step) == (method, 4)
    assert not run.model.training
    assert ("discriminator" in load_checkpoint(run.path / "last.pt")) == (
        run.config.gan_weight > 0
    )
    assert (run.prior is None) == (not needs_prior(run.config))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run.model.decode(run.model.encode(x)), run.model(x).x_hat)


@pytest.mark.parametrize("pixel_loss", ["l2", "l1"])
def test_shared_forward_gives_the_gradients_of_the_written_loss(prior, pixel_loss):
    """One backward pass from gradients at the reconstruction equals backward through Eq. 2 + λ·GAN."""
    trainer = Trainer(tiny(gan_start=0, pixel_loss=pixel_loss), prior.tensors(), CPU)
    trainer.generator_optimizer.step = trainer.discriminator_optimizer.step = lambda: None
    model, discriminator = trainer.model.double(), trainer.discriminator.double()
    x = torch.randn(4, 3, 32, 32).double()
    metrics = [trainer.train_step(x) for _ in range(2)][1]  # nothing adds up over steps
    found = [
        {name: p.grad.clone() for name, p in network.named_parameters()}
        for network in (model, discriminator)
    ]
    model.zero_grad()
    output = model(x)
    pixel = (
        (output.x_hat - x).square().mean()
        if pixel_loss == "l2"
        else (output.x_hat - x).abs().mean()
    )
    losses = pixel, discriminator(output.x_hat).mean()
    at_x_hat = (
        torch.autograd.grad(loss, output.x_hat, retain_graph=True)[0] for loss in losses
    )
    weight = trainer.config.gan_weight * adaptive_weight(
        output.x_hat, model.decoder.to_image.weight, *at_x_hat
    )
    assert metrics["adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-5)
    (pixel + output.quantizer_loss - metrics["adaptive_weight"] * losses[1]).backward()
    discriminator.zero_grad()
    hinge_loss(discriminator(x), discriminator(output.x_hat.detach())).backward()
    for network, gradients, name in zip(
        (model, discriminator), found, ("gradient", "discriminator_gradient")
    ):
        for part, parameter in network.named_parameters():
            torch.testing.assert_close(
                gradients[part], parameter.grad, rtol=1e-5, atol=1e-8
            )  # logits are float32
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert metrics[name].item() == pytest.approx(norm.item())


def test_a_step_follows_the_schedules(prior):
    trainer, found = (
        Trainer(tiny(method="gumbel", steps=2, schedule="cosine"), prior.tensors(), CPU),
        [],
    )
    for _ in range(2):
        trainer.train_step(torch.zeros(1, 3, 32, 32))
        optimizers = trainer.generator_optimizer, trainer.discriminator_optimizer
        assert all(each.defaults["betas"] == (0.5, 0.9) for each in optimizers)  # VQGAN's
        found += [
            trainer.model.quantizers[0].temperature,
            *(each.param_groups[0]["lr"] for each in optimizers),
        ]
    assert found == pytest.approx([1.0, 2e-3, 2e-3, (1 + 1 / 16) / 2, 1e-3, 1e-3])
    assert trainer.last_used[0].max() == 1  # steps count from 0


def test_codes_used_counts_the_latest_epoch(prior):
    trainer = Trainer(tiny(batch_size=8), prior.tensors(), CPU, training_images=75)  # ten steps
    assert trainer.usage() == [[0, 7], [0, 9]]
    trainer.step = 30
    trainer.last_used[0][:] = torch.tensor([-1, 5, 19, 20, 25, 29, 0])
    assert trainer.usage() == [[3, 7], [0, 9]]  # chosen in steps 20 … 29
    trainer.steps_per_epoch = 100
    assert trainer.usage() == [[6, 7], [0, 9]]


def test_validation_is_the_mean_of_its_images_some_of_which_are_drawn(prior):
    trainer, dataset, calls = (
        Trainer(tiny(), prior.tensors(), CPU),
        DemoDataset("val", 32),
        [],
    )
    trainer.model.train().codebook.transfer.register_forward_hook(
        lambda *call: calls.append(call)
    )
    score, values, rows = trainer.validate(make_loader(dataset, CPU, batch_size=3), 3)
    assert not trainer.model.training
    assert len(calls) == 1  # codes are made once, not for each batch
    x = torch.stack([to_images(dataset[i]["image"], CPU) for i in range(8)])
    with torch.no_grad():
        x_hat = trainer.model(x).x_hat
    assert (
        score == values["psnr"] == pytest.approx(psnr(x_hat, x).mean().item(), rel=1e-5)
    )
    (_, originals), (_, reconstructions) = rows
    assert torch.equal(torch.stack(originals), x[[0, 3, 7]])
    torch.testing.assert_close(torch.stack(reconstructions), x_hat[[0, 3, 7]])
    x_hat = torch.stack(
        [torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 5.0)]
    )  # the second is clamped to 1
    assert psnr(x_hat, torch.zeros(2, 3, 4, 4)).tolist() == pytest.approx(
        [10 * np.log10(4 / 0.04), 10 * np.log10(4)]
    )


def test_a_compiled_step_is_the_step(monkeypatch, prior):
    as_traced = lambda network: compile_in_place(network, backend="aot_eager")
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", as_traced)
    trainers = [Trainer(tiny(gan_start=0), prior.tensors(), CPU) for _ in range(2)]
    trainers[1].compile()
    for step in range(2):
        x = torch.rand(trainers[0].config.batch_size, 3, 32, 32) * 2 - 1
        values = [trainer.train_step(x) for trainer in trainers]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trainers[1].validate(make_loader(DemoDataset("val", 32), CPU, batch_size=3))
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    )  # evaluation compiles nothing


def test_what_does_not_compile_well_stays_apart(monkeypatch, prior):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda network: compiled.append(network)
    )
    trainer = Trainer(tiny(gan_start=0, method="matched-cvq"), prior.tensors(), CPU)
    monkeypatch.setattr(train_module, "distributed", lambda: True)
    trainer.compile()  # not the discriminator, whose batch norm is of all processes
    assert compiled == [trainer.model.encoder, trainer.model.decoder.layers]


def test_without_a_compiler_networks_are_trained_as_they_are(monkeypatch, prior):
    def no_compiler(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda network: compile_in_place(network, backend=no_compiler),
    )
    monkeypatch.setattr(
        torch._dynamo.config, "suppress_errors", False
    )  # and again afterwards
    trainer = Trainer(tiny(gan_start=0), prior.tensors(), CPU)
    trainer.compile()
    assert trainer.train_step(torch.rand(2, 3, 32, 32))["loss"].isfinite()


@pytest.mark.parametrize(
    "amp, since_ampere, expected",
    [(True, True, "bfloat16"), (True, False, "float32"), (False, True, "float32")],
)
def test_bfloat16_is_for_gpus_that_compute_in_it(
    monkeypatch, amp, since_ampere, expected
):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: since_ampere or including_emulation,
    )
    trainer = SimpleNamespace(config=Config(amp=amp), device=torch.device("cuda"))
    assert precision(trainer) == expected
    assert precision(SimpleNamespace(config=Config(), device=CPU)) == "float32"


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_seeks_its_fastest_unless_runs_shall_repeat(deterministic):
    run_tiny("run", steps=1, deterministic=deterministic)
    assert torch.backends.cudnn.benchmark == (not deterministic)


def test_a_run_leaves_the_process_as_it_is_and_its_model_can_be_trained(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run = Run(run_tiny(tmp_path / "run", steps=1))
    assert (
        torch.backends.cudnn.allow_tf32
    )  # evaluate.py and synthesize.py set it, for the tokens of a CPU
    x, model = torch.zeros(1, 3, 32, 32), copy.deepcopy(run.model)
    codes = run.model.codebook()[0]
    assert (
        codes.data_ptr() == run.model.codebook()[0].data_ptr()
    )  # made once, not for each batch
    assert pickle.loads(pickle.dumps(run.model)).encode(x).equal(run.model.encode(x))
    model.train().requires_grad_(True)(x).quantizer_loss.backward()
    assert all(
        parameter.grad is not None for parameter in model.codebook.transfer.parameters()
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("processes, expected", [(1, 8), (4, 4), (32, 1)])
def test_processes_share_the_cores_that_read_images(monkeypatch, processes, expected):
    monkeypatch.setattr(train_module, "CORES", 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    dataset = DemoDataset("val", 32)
    assert make_loader(dataset, torch.device("cuda")).num_workers == expected
    assert make_loader(dataset, CPU).num_workers == 0
    assert make_loader(dataset, CPU, 3).num_workers == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_cuda_is_finite_and_resumes(tmp_path, compiled):
    out = run_tiny(tmp_path / "run", device="cuda", compile=compiled)
    assert all(np.isfinite(line["loss"]) for line in lines_of(out))
    train_module.main(["--out", str(out), "--resume", "--steps", "10"])
    assert len(lines_of(out)) == 10


# ======== Runs: what they repeat, resume, keep and refuse


def test_seed_repeats_a_run_whatever_the_workers():
    runs = [
        run_tiny(f"{i}", steps=4, **more)
        for i, more in enumerate(({}, {"workers": 2}, {"seed": 1}))
    ]
    first, again, other = map(lines_of, runs)
    assert first == again != other


@pytest.mark.parametrize("method", ["vqct", "cvq", "regvq", "gumbel"])
def test_resuming_equals_an_uninterrupted_run(method, prior):
    prior.save("prior.npz")
    choices = dict(method=method, batch_size=4, steps=6, eval_every=3)
    if method == "vqct":
        choices["prior"] = "prior.npz"
    if method in ("regvq", "gumbel"):
        choices |= dict(
            codebook_size=32, temperature_end=1.0
        )  # a schedule would depend on the length of the run
    whole, parts = (
        run_tiny("whole", **choices),
        run_tiny("parts", **{**choices, "steps": 3}),
    )
    with open(parts / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 4, "loss": 0}\n{"step": 5, "lo'
        )  # written after the checkpoint by a run that was killed
    Path("prior.npz").unlink()  # the run has its own
    train_module.main(["--out", "parts", "--resume", "--steps", "6"])
    for kind in ("loss", "validation_psnr"):
        assert lines_of(whole, kind) == lines_of(parts, kind)
    first, second = load_checkpoint(whole / "last.pt"), load_checkpoint(parts / "last.pt")
    for part in ("model", "discriminator", "last_used", "random", "best", "step"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    for part in ("generator_optimizer", "discriminator_optimizer"):
        torch.testing.assert_close(
            first[part]["state"], second[part]["state"], rtol=0, atol=0
        )


def test_resuming_refuses_to_become_another_run():
    out = run_tiny("run", steps=1)
    before = contents(out)
    for flags, message in (
        ("--channels 16 --steps 2", "cannot change --channels from 8"),
        ("--method vqgan --steps 2", "cannot change --method from 'vqct'"),
        ("", "is at step 1 already; give a larger --steps"),
        ("--labels maps --steps 2", "--labels changes nothing with these flags"),
    ):
        with pytest.raises(UserError, match=message):
            train_module.main(["--out", "run", "--resume", *flags.split()])
    assert contents(out) == before


@pytest.mark.parametrize("choices", [dict(method="gumbel", schedule="cosine"), {}])
def test_resuming_with_flags_means_what_it_means_at_the_start(choices, capsys):
    out = run_tiny("run", steps=2, **choices)
    train_module.main(["--out", "run", "--resume", "--steps", "3", "--lr", "0"])
    state = load_checkpoint(out / "last.pt")
    assert (
        state["config"]["lr"]
        == resolve({"batch_size": 4, "lr": 0.0}).lr
        == pytest.approx(4 * 4.5e-6)
    )
    rate = state["generator_optimizer"]["param_groups"][0]["lr"] / state["config"]["lr"]
    assert rate == pytest.approx(0.25 if "schedule" in choices else 1)
    assert "\nresumed at step 2\n" in "\n" + capsys.readouterr().out


def test_lines_later_than_the_checkpoint_are_cut():
    out = run_tiny("run", steps=4)
    journal = out / "metrics.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)  # 1, 2, 3, 4, and a validation
    lines[1] = lines[1][:9] + b"\xff\0" + lines[1][9:]
    later = lines[3].replace(b'"step": 4', b'"step": 5')
    journal.write_bytes(b"".join([*lines, later, b"\x80 damaged\n", b'{"step": 7, "lo']))
    train_module.main(["--out", "run", "--resume", "--steps", "5"])
    kept = journal.read_bytes().splitlines(keepends=True)
    assert kept[: len(lines)] == lines
    assert len(kept) == len(lines) + 2
    assert [line["step"] for line in read_journal(journal)] == [1, 3, 4, 4, 5, 5]
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"step": 5, "lo')  # half a line, as a kill leaves it
    with open(journal, "a+b") as file:
        train_module.cut_journal(file, 6)
    assert journal.read_bytes() == whole


def test_a_folder_trains_with_a_prior_lpips_and_the_cosine(prior, monkeypatch):
    """Own photographs: folder, prior file, LPIPS, cosine; then resuming."""
    monkeypatch.setattr(
        train_module,
        "load_lpips",
        lambda trunk, trunk_weights, lpips_weights: LPIPS(trunk),
    )
    monkeypatch.setattr(train_module, "lpips_files", lambda trunk: [])
    Path("data").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"data/{i:02d}.png")
    prior.save("prior.npz")
    choices = dict(
        dataset="folder",
        preset="tiny",
        data="data",
        prior="prior.npz",
        perceptual_trunk="squeeze",
    )
    out = run_tiny(
        "run", steps=4, perceptual_weight=0.5, schedule="cosine", eval_every=2, **choices
    )
    lines, state = lines_of(out), load_checkpoint(out / "last.pt")
    for line in lines:
        assert (
            line["loss"] - line["pixel"] - line["quantizer"]
            == pytest.approx(line["perceptual"] / 2, rel=1e-3)
            != 0
        )
    rates = [
        state[f"{name}_optimizer"]["param_groups"][0]["lr"]
        for name in ("generator", "discriminator")
    ]
    assert rates == pytest.approx([2e-3 * (0.5 + 0.5 * np.cos(np.pi * 3 / 4))] * 2)
    train_module.main(["--out", "run", "--resume", "--steps", "5"])
    assert len(lines_of(out)) == 5
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    assert Run(out, "cpu").words == [list("abcdefg"), list("ABCDEFGHI")]


def test_training_starts_from_published_weights(capsys):
    theirs = Published().state
    torch.save({"epoch": 3, "state_dict": theirs}, "vqgan.ckpt")
    sizes = dict(
        channels=128,
        z_channels=16,
        batch_size=2,
        eval_images=2,
        init="vqgan.ckpt",
        lr=1e-12,
    )
    state = load_checkpoint(run_tiny("run", steps=1, **sizes) / "last.pt")["model"]
    for ours, name in (
        ("encoder.layers.conv_in.weight", "encoder.conv_in.weight"),
        ("to_codes.bias", "quant_conv.bias"),
    ):
        assert torch.allclose(state[ours], theirs[name], atol=1e-9)
    assert (
        "init: vqgan.ckpt; not taken from it: codebook, discriminator\n"
        in capsys.readouterr().out
    )
    sizes = dict(
        channels=128,
        z_channels=16,
        init="vqgan.ckpt",
        method="vqgan",
        codebook_size=12,
        code_dim=8,
    )
    run = Run(
        run_tiny("published", steps=0, **sizes, gan_weight=0.0), "cpu"
    )  # to be evaluated as it is
    assert torch.equal(run.model.codebook()[0], theirs["quantize.embedding.weight"])
    assert run.step == 0
    assert torch.equal(
        run.model.state_dict()["decoder.to_image.bias"], theirs["decoder.conv_out.bias"]
    )
    with pytest.raises(
        UserError, match=r"encoder.conv_in.weight is .*this network wants .*--preset f16"
    ):
        run_tiny("other", init="vqgan.ckpt")
    assert not Path("other").exists()


def test_weights_with_objects_are_refused_in_plain_words():
    torch.save({"weights": Foreign()}, "objects.ckpt")
    with pytest.raises(
        UserError,
        match=r"^weights 'objects.ckpt' cannot be read: it is damaged, or holds objects other "
        r"than tensors, numbers and strings$",
    ):
        run_tiny("run", init="objects.ckpt")


@pytest.mark.parametrize(
    "foreign", ["thesis.tex", ".DS_Store", "last.pt.bak", "a folder"]
)
def test_a_foreign_file_is_refused_and_kept(foreign):
    run = run_tiny("run", steps=1)
    for out, flags in (
        (Path("mine"), []),
        (Path("mine"), ["--overwrite"]),
        (run, ["--overwrite"]),
    ):
        out.mkdir(exist_ok=True)
        (out / foreign).mkdir(exist_ok=True) if foreign == "a folder" else (
            out / foreign
        ).write_text("years of work")
        before = contents(out)
        with pytest.raises(UserError, match=f"'{out}' holds {foreign}"):
            run_tiny(out, *flags, steps=1)
        assert contents(out) == before
        assert foreign in before


def test_a_run_is_kept_or_overwritten_whole(tmp_path):
    out = run_tiny("run", steps=1)
    before = contents(out)
    with pytest.raises(UserError, match="'run' exists; .*--resume.*--overwrite"):
        run_tiny(out, steps=1)
    assert contents(out) == before
    for name in {*RUN_FILES, "last.pt.part"} - before.keys():
        (out / name).write_text("of the run that goes")
    Path("beside.txt").write_text("years of work")
    run_tiny(out, "--overwrite", steps=2)
    assert contents(out).keys() == before.keys()
    assert load_checkpoint(out / "last.pt")["step"] == 2
    assert [line["step"] for line in lines_of(out)] == [1, 2]
    with pytest.raises(FileExistsError, match="beside.txt"):
        run_tiny("beside.txt", "--overwrite", steps=1)
    assert Path("beside.txt").read_text() == "years of work"


def test_a_run_reads_photographs_and_spells_codes_as_words(prior):
    prior.save("prior.npz")
    plain = Run(run_tiny("plain", prior="prior.npz", steps=1), "cpu")
    assert plain.names == ("adjective", "noun") == tuple(plain.token_names)
    with pytest.raises(
        UserError, match="--data or --labels changes nothing with --dataset demo"
    ):
        Run("plain", "cpu", data="elsewhere")
    assert plain.spell(torch.tensor([[[0, 6]], [[8, 0]]])) == "a I  g A"
    Image.new("RGB", (50, 40), (255, 0, 51)).save("photo.png")
    x = plain.read("photo.png")
    assert x.shape == (1, 3, 32, 32)
    assert torch.equal(x[0, :, 5, 5], torch.tensor([1.0, -1.0, 51 / 127.5 - 1]))
    rows = plain.spell(plain.model.encode(x)[0]).split("\n")
    assert len(rows) == 16
    assert all(len(row.split()) == 2 * 16 for row in rows)
    official = Run(
        run_tiny("official", recipe="official", prior="prior.npz", steps=1),
        "cpu",
        checkpoint="best",
    )
    assert official.token_names == ["adjective1", "adjective2", "noun"]
    assert (
        official.spell(torch.tensor([[[0], [2]], [[6], [3]], [[8], [1]]]))
        == "a g I\nc d B"
    )
    bare = Run(run_tiny("bare", method="vqgan", codebook_size=12, steps=1), "cpu")
    assert bare.prior is None
    assert bare.spell(torch.tensor([[[11, 3]]])) == "11  3"
    assert bare.names == ("code",)


def test_bad_checkpoints_are_named(tmp_path, prior):
    save_checkpoint(tmp_path / "last.pt", Trainer(tiny(), prior.tensors(), CPU))
    state = load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:50_000])
    for name, content in (
        ("list", [1, 2]),
        ("older", {**state, "version": 1}),
        ("other", {"weights": state}),
    ):
        torch.save(content, f"{name}.pt")
    with pytest.raises(UserError, match="no run here: 'absent.pt' is missing"):
        load_checkpoint("absent.pt")
    for name in ("cut", "list", "older", "other"):
        with pytest.raises(
            UserError, match=f"{name}.pt' is no checkpoint of this program, or damaged: "
        ):
            load_checkpoint(tmp_path / f"{name}.pt")
    torch.save({**state, "config": {**state["config"], "channels": 16}}, "best.pt")
    with pytest.raises(UserError, match="best.pt' does not match its configuration"):
        Run(tmp_path, "cpu", checkpoint="best")


@pytest.mark.slow
def test_a_new_run_of_the_demo_is_like_the_reference(tmp_path):
    """Bounds: 0.3 dB, 8 codes of a codebook, a tenth of each loss's last line."""
    for script, *words in (
        ("train.py",),
        ("evaluate.py", "runs/demo-vqct", "--device", "cpu"),
    ):
        subprocess.run(
            [sys.executable, ROOT / script, *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    found, known = tmp_path / "runs/demo-vqct", ROOT / "tests/reference"
    old, new = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (known, found)
    )
    assert abs(new["psnr"] - old["psnr"]) < 0.3
    assert all(
        abs(new["codes_used"][part] - used) <= 8
        for part, used in old["codes_used"].items()
    )
    last = [
        [
            line
            for line in map(json.loads, (folder / "metrics.jsonl").open())
            if "loss" in line
        ][-1]
        for folder in (known, found)
    ]
    assert all(
        abs(last[1][name] / last[0][name] - 1) < 0.1
        for name in ("loss", "pixel", "quantizer")
    )


def test_other_data_are_told_by_their_contents_not_by_their_name(tmp_path, prior):
    prior.save("prior.npz")
    for seed, folder in ((0, "a"), (1, "moved"), (7, "other")):
        for index in range(20):
            image = np.random.default_rng(index + 100 * (seed > 1)).integers(0, 256, (40, 40, 3), np.uint8)
            (tmp_path / folder / "birds").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / folder / "birds" / f"{index:02}.bmp")
    data = dict(dataset="folder", preset="tiny", data="a/birds", prior="prior.npz", eval_images=4)
    out = run_tiny("run", steps=1, eval_every=1, **data)
    moved = Run(out, "cpu", data="moved/birds")
    assert moved.results == out and len(moved.dataset("val")) == 2
    other = Run(out, "cpu", data="other/birds")
    assert other.results == out / "other" / "birds" and len(other.dataset("val")) == 20


def test_a_batch_larger_than_the_data_set_is_said(tmp_path, capsys):
    run_tiny(tmp_path / "run", steps=0, batch_size=100)
    assert "note: a step takes 100 images, some of them twice" in capsys.readouterr().out


@pytest.mark.parametrize("inside, prefix", [("model", ""), ("state_dict", "ema."), ("", "module.")])
def test_published_weights_may_be_wrapped(inside, prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = Published().state
    named = {f"{prefix}{name}": value for name, value in theirs.items()}
    torch.save({"epoch": 3, inside: named} if inside else named, "vqgan.ckpt")
    sizes = dict(channels=128, z_channels=16, codebook_size=12, code_dim=8, gan_weight=0.0)
    run_tiny("run", steps=0, init="vqgan.ckpt", method="vqgan", **sizes)
    bias = Run("run", "cpu").model.state_dict()["decoder.to_image.bias"]
    assert torch.equal(bias, theirs["decoder.conv_out.bias"])
