"""Two gloo processes on the CPU do what one does with the whole batch."""

import os
import socket

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, start_processes

from conftest import small_prior
from prior import UserError
from test_train import few_birds_and_a_folder_of_its_own  # noqa: F401, a fixture
from test_train import CPU, lines_of, run_tiny, tiny
from train import Trainer, average_gradients, launch, processes, rank, train_batches
from vqct import ClusteredQuantizer, Condition, TokenTransformer, all_gather

METHODS = (
    dict(method="vqvae"),
    dict(method="vqct-vqvae"),
    dict(gan_start=0),
)


def gradients(choice):
    """Gradients, metrics and usage of a float64 step on a share of sixteen images."""
    trainer = Trainer(tiny(**choice, seed=1), small_prior().tensors(), CPU)
    for network in filter(None, (trainer.model, trainer.discriminator)):
        # The discriminator takes its running statistics: gloo cannot join a batch's.
        network.double().eval()
    x = (
        torch.rand(16, 3, 32, 32, generator=torch.manual_seed(0), dtype=torch.float64) * 2
        - 1
    )
    metrics = trainer.train_step(
        x.view(processes(), -1, 3, 32, 32)[rank()]
    )
    return (
        {name: parameter.grad for name, parameter in trainer.model.named_parameters()},
        metrics,
        trainer.usage(),
    )


def second_stage():
    """Gradients of a float64 transformer's loss on a share of eight grids of tokens."""
    torch.manual_seed(0)
    model = TokenTransformer(
        (7, 5), (2, 3), Condition("none", 0, (2, 3), 16), width=16, depth=1, heads=2
    ).double()
    sum(
        model.loss(torch.randint(0, 5, (8, 2, 2, 3)).chunk(processes())[rank()])
    ).backward()
    average_gradients(model)
    return [parameter.grad for parameter in model.parameters()]


def codes_and_order():
    """CVQ's usage after a share of 32 features, the images of three steps, codes."""
    torch.manual_seed(0)
    quantizer, codebook, z = (
        ClusteredQuantizer(6),
        torch.nn.Parameter(torch.randn(6, 3)),
        torch.randn(2, 3, 4, 4),
    )
    torch.manual_seed(rank())
    quantizer(z.chunk(processes())[rank()], codebook)
    keys = torch.tensor(
        list(train_batches(range(10), 4 // processes(), 3, 6, seed=0))
    ).transpose(0, 1)  # (images, steps, 2)
    return [quantizer.usage, all_gather(keys), codebook.detach()][
        : 1 + processes()
    ]  # in two, the codes of the first


def group_on_gpus(
    backend="cuda:nccl", begin=torch.distributed.init_process_group, **more
):
    """As on a machine with GPUs, with gloo in place of nccl."""
    begin(backend.replace("nccl", "gloo"), **more)


def in_two(function, gpus=False):
    """Call a function in two processes that are told what torchrun tells them."""
    with socket.create_server(("127.0.0.1", 0)) as free:  # a port
        place = dict(
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free.getsockname()[1]),
        )

    def process(share):
        torch.set_num_threads(1)
        torch.cuda.is_available = lambda: gpus
        if gpus:
            torch.cuda.set_device, torch.distributed.init_process_group = (
                id,
                group_on_gpus,
            )
        os.environ.update(place, RANK=str(share), LOCAL_RANK=str(share))
        launch(function)

    start_processes(process, nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, shared = (
        tmp_path_factory.mktemp("two"),
        (second_stage, codes_and_order),
    )
    found = lambda: {
        "steps": list(map(gradients, METHODS)),
        **{shares.__name__: shares() for shares in shared},
    }
    in_two(lambda: torch.save(found(), folder / f"{rank()}.pt"))
    return [torch.load(folder / f"{share}.pt") for share in range(2)]


@pytest.mark.parametrize("choice", range(len(METHODS)))
def test_two_processes_have_the_gradients_of_one(found, choice):
    expected, metrics, usage = gradients(METHODS[choice])
    steps = [process["steps"][choice] for process in found]
    for theirs, _, used in steps:
        apart = [
            ((theirs[name] - value).norm(), value.norm())
            for name, value in expected.items()
        ]
        assert used == usage
        assert all(difference <= 1e-8 * norm + 1e-14 for difference, norm in apart)
    for name, value in metrics.items():  # with float32 logits
        assert sum(step[1][name] for step in steps).item() / 2 == pytest.approx(
            value.item(), rel=1e-6
        ), name


@pytest.mark.parametrize(
    "function, precision",
    [(second_stage, 1e-8), (codes_and_order, 1e-6)],
)
def test_two_processes_share_the_work(found, function, precision):
    first, second = (process[function.__name__] for process in found)
    assert all(map(torch.equal, first, second))
    for value, expected in zip(first, function()):
        torch.testing.assert_close(value, expected, rtol=precision, atol=1e-12)


def test_a_group_on_gpus_joins_tensors_of_the_cpu_too(tmp_path):
    in_two(
        lambda: torch.save(all_gather(torch.tensor([rank()])), tmp_path / str(rank())),
        gpus=True,
    )
    assert torch.load(tmp_path / "1").tolist() == [0, 1]


def test_torchrun_trains_and_resumes(capfd):
    in_two(lambda: run_tiny("run", steps=4))
    assert list(
        map(str.count, capfd.readouterr(), ("done: ", "step 4/4 validation"))
    ) == [1, 1]  # one of them speaks
    with pytest.raises(UserError, match="was trained by 2 processes"):
        run_tiny("run", "--resume", steps=6)
    with pytest.raises(ProcessExitedException, match="exit code 2"):
        in_two(lambda: run_tiny("run", steps=6))
    assert capfd.readouterr().err.count("error: run 'run' exists") == 1
    in_two(lambda: run_tiny("run", "--resume", steps=6))
    assert "resumed at step 4" in capfd.readouterr().out
    assert [line["step"] for line in lines_of("run")] == [1, 2, 3, 4, 5, 6]
