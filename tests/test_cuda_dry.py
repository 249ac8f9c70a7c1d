"""The path of CUDA on fake tensors, which have shape, type and device, and no data.

No GPU is needed. The tests find operations that join two devices or two types, and
operations that make the host wait for the GPU, forward and backward. They cannot find
wrong numbers.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import inception_v3

import evaluate
import synthesize
import train
import vqct
from conftest import idle, small_prior

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
    reason = "tried with 2.14; 2.6 moves no fake tensor to CUDA without a driver"
    pytest.skip(reason, allow_module_level=True)

CUDA = torch.device("cuda", 0)
PRIOR = small_prior().tensors()
# Fake tensors let these operations join several types. A GPU does not.
ONE_TYPE = (
    *("convolution", "mm", "group_norm", "layer_norm", "attention"),
    *("bag", "loss", "lerp", "scatter"),
)


class Unwaiting(TorchDispatchMode):
    """Raises if an operation joins devices or types, or if the host waits for the GPU.

    waits: how many times the host may wait.
    """

    def __init__(self, waits=0):
        super().__init__()
        self.waits = waits
        self.norm_types = set()  # types of the results of group norms

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function), dict(kwargs or {})
        if "generator" in kwargs:
            kwargs["generator"] = None  # a real one, of the CPU
        result = function(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        made = [x for x in tree_leaves(result) if torch.is_tensor(x)]
        if "native_group_norm" in name:
            self.norm_types.add(made[0].dtype)
        if "copy" in name:
            non_blocking = True in (*args[2:], *kwargs.values())
            self.check_copy(name, given, made, non_blocking)
        else:
            self.check_devices(name, given + made)
        self.check_types(name, given)
        return result

    def check_copy(self, name, given, made, non_blocking):
        """A copy between devices waits, except to the GPU if it is non-blocking."""
        if len({x.device for x in given + made}) > 1:
            self.waits -= made[0].device != CUDA or not non_blocking
        assert self.waits >= 0, f"{name} waits for the GPU"

    def check_devices(self, name, tensors):
        """Any other operation has one device. A () tensor of the CPU is a number."""
        devices = {x.device for x in tensors if x.dim() or x.device == CUDA}
        assert len(devices) < 2, f"{name} joins devices"

    def check_types(self, name, given):
        if "index_put" in name:
            masks = [x for x in given if x.dtype == torch.bool]
            assert not masks, f"{name} counts a mask, and waits for the GPU"
        if any(part in name for part in ONE_TYPE):
            kinds = {x.dtype for x in given if x.is_floating_point()}
            assert len(kinds) < 2, f"{name} joins types"


@torch.no_grad()
def walk_back(outputs, gradients, retain_graph, create_graph, inputs, *flags, **more):
    """The gradients of autograd's engine, which would need a real GPU."""
    known = {(y.grad_fn, y.output_nr): dy for y, dy in zip(outputs, gradients)}
    for node in backward_order(outputs):
        numbers = range(len(node._input_metadata))
        given = [known.get((node, number)) for number in numbers]
        passed_on = tree_leaves(getattr(node, "apply", node)(*given))
        for (parent, number), gradient in zip(node.next_functions, passed_on):
            if parent is not None and gradient is not None:
                expected = parent._input_metadata[number]
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                known[parent, number] = known.get((parent, number), 0) + gradient
    return [x.grad for x in inputs]


def backward_order(outputs):
    """The nodes of a graph, each before its parents, and leaves last."""
    nodes = [y.grad_fn for y in outputs]
    for node in nodes:  # the list grows
        parents = {parent for parent, _ in node.next_functions if parent}
        nodes += parents - set(nodes)
    is_leaf = lambda node: hasattr(node, "variable")
    return sorted(nodes, key=lambda node: (is_leaf(node), -node._sequence_nr()))


def cpu_generator(device):
    """The CPU's generator for the GPU's: there is no GPU to seed."""
    assert torch.device(device) == CUDA
    return torch.default_generator


def zeros_of(tensor):
    """An array of zeros for a tensor without data; only the CPU's tensors have one."""
    assert tensor.device.type == "cpu"
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


STAND_INS = {  # what would need a driver, or data → what replaces it
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
    "torch.Generator": cpu_generator,
    "torch.autograd._engine_run_backward": walk_back,
    "torch.Tensor.pin_memory": lambda tensor: tensor,
    "torch.Tensor.numpy": zeros_of,
    # a copy of the mode would free its memory twice
    "torch._subclasses.fake_tensor.FakeTensorMode.__deepcopy__": lambda mode, memo: mode,
    # so that Module.to can swap fake parameters
    "weakref.getweakrefs": lambda x: [],
    # the number of a graph's entries depends on data
    "vqct.make_codebook": unset_fake_temporarily()(vqct.make_codebook),
    "train.load_lpips": lambda trunk, *files: vqct.LPIPS(trunk),
}


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    for name, stand_in in STAND_INS.items():
        monkeypatch.setattr(name, stand_in, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


CASES = [{"method": method} for method in train.METHODS]
CASES += [{"recipe": "official"}, {"amp": False}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_stays_on_the_device(small, case):
    usual = {**small, "resolution": 32, "preset": "f16", "gan_start": 0}
    useless = idle(train.resolve(case))
    usual = {name: value for name, value in usual.items() if name not in useless}
    config = train.resolve({**usual, "compile": False, **case})
    trainer = train.Trainer(config, PRIOR, CUDA)
    x = torch.empty(2, 3, 32, 32, device=CUDA)
    with Unwaiting() as mode:
        metrics = trainer.train_step(x)
    assert mode.norm_types == {torch.bfloat16 if config.amp else torch.float32}
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    assert {x.device for x in (*metrics.values(), *gradients)} == {CUDA}
    with Unwaiting():
        output = trainer.model.eval()(x)
        x_hat = trainer.model.decode(trainer.model.encode(x))
    assert output.x_hat.dtype == x_hat.dtype == torch.float32


def make_run(small):
    """A Trainer with the attributes of a Run that the second stage uses."""
    choices = {**small, "multipliers": (1, 1, 2), "gan_weight": 0.0, "compile": False}
    run = train.Trainer(train.resolve(choices), PRIOR, CUDA)
    run.model.requires_grad_(False)
    run.names = run.token_names = ["a", "n"]
    run.dataset = lambda split: train.ImageDataset([], [], 32)
    return run


@pytest.mark.parametrize("condition", ["none", "class", "segmentation"])
@pytest.mark.parametrize("kind", ["gpt", "ldm"])
def test_the_second_stage_stays_on_the_device(small, kind, condition):
    run = make_run(small)
    indices = torch.zeros(4, 2, 4, 4, dtype=torch.int64)
    labels = torch.zeros(4, dtype=torch.int64)
    maps = torch.zeros(4, 16, 16, dtype=torch.int16)
    features = np.zeros((4, 8, 4, 4), np.float16)
    tokens = synthesize.Tokens(indices, labels, maps, features)
    shape = dict(width=16, depth=1, heads=2, batch_size=4, steps=4)
    config = synthesize.SynthesisConfig(kind, condition, **shape)
    trainer = synthesize.StageTrainer(config, run, 3, tokens, [0])
    with Unwaiting():
        trainer.train_step([0, 1])
    # Given tokens enter and drawn ones leave, however many positions or steps there are.
    how = synthesize.Sampling(0.9, 2, 2.0, 3)
    stage = trainer.ema, config
    given = torch.full_like(indices, -1)
    with Unwaiting(waits=4 if kind == "ldm" else 2):
        images = synthesize.draw_images(run, stage, tokens, torch.arange(4), how, 0, given)
    assert len(images) == 4


def test_evaluation_waits_only_for_its_results(small):
    config = train.resolve({**small, "resolution": 32, "compile": False})
    run = train.Trainer(config, PRIOR, CUDA)
    images = [torch.zeros(1, 3, 32, 32, dtype=torch.uint8) for _ in range(2)]
    run.batches = lambda *which: ((train.to_images(x, CUDA), {"image": x}) for x in images)
    plain = dict(weights=None, aux_logits=False, init_weights=False)
    state = inception_v3(num_classes=1008, **plain).state_dict()
    inception = evaluate.InceptionFeatures(state).to(CUDA)
    lpips = vqct.LPIPS("squeeze").to(CUDA)
    with Unwaiting(waits=6):  # four scores, indices and features leave at the end
        scores, indices, features = evaluate.reconstruct(run, images, inception, lpips)
    assert len(scores) == 4
    assert {len(x) for x in (*scores.values(), indices, *features)} == {2}
