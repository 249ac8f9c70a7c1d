"""Two gloo processes on the CPU do what one does with the whole batch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, small_prior
from evaluate import reconstruct
from synthesize import Loss
from test_train import TINY
from train import TrainBatches, Trainer, parallel, portable, resolve
from vqct import ClusteredQuantizer, Condition, TokenTransformer

CHOICES = {
    "vqvae": dict(method="vqvae"),
    "vqct": dict(method="vqct-vqvae"),
    "vqct, accumulated": dict(method="vqct-vqvae", accumulate=2),
    "vqct with adversary": dict(gan_weight=0.8, gan_start=0),
}


def gradients(choice, prior, share, shares):
    """Gradients of one float64 step on a share of sixteen images, and the step's metrics."""
    config = resolve({**TINY, **CHOICES[choice], "seed": 1})
    trainer = Trainer(config, prior, torch.device("cpu"))
    trainer.parallel_model = parallel(trainer.model.double(), torch.device("cpu"))
    if trainer.discriminator is not None:  # by its running statistics: gloo cannot join those of a batch
        trainer.parallel_discriminator = parallel(trainer.discriminator.double().eval(), torch.device("cpu"))
    x = torch.rand(16, 3, config.resolution, config.resolution, generator=torch.manual_seed(0), dtype=torch.float64) * 2 - 1
    micro = x.view(config.accumulate, shares, -1, *x.shape[1:])[:, share]
    trainer.generator_optimizer.step = lambda: None
    metrics = trainer.train_step(list(micro))
    grads = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    return grads, metrics, trainer.statistics()["codes_used"]


def second_stage(share, shares):
    """Gradients of a float64 transformer's loss on a share of eight grids of tokens."""
    torch.manual_seed(0)
    model = TokenTransformer((7, 5), (2, 3), Condition("none", 0, (2, 3), 16), width=16, depth=1, heads=2).double()
    tokens = torch.randint(0, 5, (8, 2, 2, 3)).chunk(shares)[share]
    losses = parallel(Loss(model), torch.device("cpu"))
    sum(losses(tokens)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def cluster(share, shares):
    """CVQ's codes and usage after a pass over a share of 32 features."""
    torch.manual_seed(0)
    quantizer, codebook = ClusteredQuantizer(6), torch.nn.Parameter(torch.randn(6, 3))
    z = torch.randn(2, 3, 4, 4).chunk(shares)[share]
    torch.manual_seed(share)
    quantizer(z, codebook)
    return codebook.detach(), quantizer.usage


def evaluation(prior):
    """Scores, indices and features of seven images, of all processes together."""
    torch.manual_seed(0)
    model = Trainer(resolve(TINY), prior, torch.device("cpu")).model.eval()
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(1))
    dataset = [{"image": image, "index": index, "label": 0} for index, image in enumerate(images)]
    inception = lambda x: x.float().mean(dim=(2, 3))  # any features
    scores, indices, features = reconstruct(model, dataset, torch.device("cpu"), 2, torch.zeros(3, 32, 32), inception)
    return {name: torch.tensor(value) for name, value in {**scores, "indices": indices, "features": features}.items()}


def work(share, shares, folder, prior):
    """What each of two processes does; the first saves it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=share, world_size=shares)
    found = {choice: gradients(choice, prior, share, shares) for choice in CHOICES}
    found["second stage"], found["cluster"] = second_stage(share, shares), cluster(share, shares)
    found["evaluation"] = evaluation(prior)
    found["keys"] = list(TrainBatches(10, 2, 3, 6, seed=0))
    torch.save(found, Path(folder) / f"{share}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (2, str(folder), portable(small_prior())), nprocs=2)
    return [torch.load(folder / f"{share}.pt", weights_only=True) for share in range(2)]


@pytest.mark.parametrize("choice", CHOICES)
def test_two_processes_have_the_gradients_of_one(found, prior, choice):
    expected, metrics, codes_used = gradients(choice, portable(prior), 0, 1)
    for process in found:
        grads, _, used = process[choice]
        assert grads.keys() == expected.keys() and used == codes_used
        worst = max((grads[name] - value).norm() / value.norm().clamp_min(1e-12) for name, value in expected.items())
        assert worst < 1e-8, (choice, worst)
    mean = {name: sum(process[choice][1][name] for process in found) / 2 for name in metrics}
    assert all(math.isclose(mean[name], value, rel_tol=1e-6) for name, value in metrics.items())  # logits are float32


def test_two_processes_share_a_second_stage(found):
    for process in found:
        for name, value in second_stage(0, 1).items():
            assert torch.allclose(process["second stage"][name], value, rtol=1e-8, atol=1e-12), name


def test_two_processes_keep_the_same_codes(found):
    (codes, usage), (others, other_usage) = (process["cluster"] for process in found)
    assert torch.equal(codes, others) and torch.equal(usage, other_usage)
    assert torch.allclose(usage, cluster(0, 1)[1])  # each code's share of the whole batch


def test_two_processes_take_the_batches_of_one(found):
    together = [first + second for first, second in zip(*(process["keys"] for process in found))]
    assert together == list(TrainBatches(10, 4, 3, 6, seed=0))


def test_two_processes_evaluate_each_image_once(found):
    expected = evaluation(portable(small_prior()))
    for process in found:
        for name, value in expected.items():
            assert process["evaluation"][name].shape == value.shape and torch.allclose(process["evaluation"][name], value, rtol=1e-4), name


def test_torchrun_trains_and_resumes(tmp_path):
    flags = "--preset tiny --steps 4 --eval-every 2 --log-every 1 --eval-images 4 --batch-size 2 --gan-start 2 --resolution 32".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = lambda *more: subprocess.run([*command, "--out", "run", *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: run/last.pt") == 1 and "step 4/4" in done.stderr  # one of them speaks
    alone = subprocess.run(
        [sys.executable, command[-1], "--out", "run", "--resume", "--steps", "6"], cwd=tmp_path, capture_output=True, text=True
    )
    assert alone.returncode == 2 and "was trained by 2 processes" in alone.stderr
    done = run(*flags)
    assert done.returncode != 0 and done.stderr.count("run 'run' exists already") == 1 and "Traceback (most" not in done.stdout
    done = run("--resume", "--steps", "6")
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
