"""CUDA's path on fake tensors, which have shape, type and device but no data, so no GPU is needed. Caught, forward and
backward: operations of two devices, types that do not fit under autocast, a waiting host. Not caught: wrong numbers."""

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

CUDA, PRIOR = torch.device("cuda", 0), small_prior().tensors()
ONE_TYPE = "convolution mm group_norm layer_norm attention bag loss lerp scatter".split()  # fake tensors allow several
CASES = [*({"method": name} for name in train.METHODS), {"recipe": "official"}, {"amp": False}]

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
    pytest.skip("tried with 2.14; 2.6 moves no fake tensor to CUDA without a driver", allow_module_level=True)


class Unwaiting(TorchDispatchMode):
    """Raises where an operation joins devices or types, or where the host waits for CUDA, but for so many `waits`."""
    waits = 0

    def __init__(self):
        super().__init__()
        self.norms = set()  # types of what group norms give

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, named = str(function), {k: None if k == "generator" else x for k, x in (kwargs or {}).items()}
        result = function(*args, **named)
        given, made = ([x for x in tree_leaves(part) if torch.is_tensor(x)] for part in ((args, named), result))
        self.norms |= {made[0].dtype} if "native_group_norm" in name else set()
        copy, kinds = "copy" in name, {x.dtype for x in given if x.is_floating_point()}
        devices = {x.device for x in (*given, *made) if copy or x.dim() or x.device == CUDA}  # a CPU's () is a number
        self.waits -= copy and len(devices) > 1 and (made[0].device != CUDA or True not in (*args[2:], *named.values()))
        assert self.waits >= 0 and (copy or len(devices) < 2), f"{name} joins devices, or waits for one"
        assert "index_put" not in name or all(x.dtype != torch.bool for x in given), f"{name} counts, and waits"
        assert len(kinds) < 2 or not any(part in name for part in ONE_TYPE), f"{name} joins types"
        return result


@torch.no_grad()
def walk_back(outputs, gradients, retain_graph, create_graph, inputs, *flags, **more):
    """What autograd's engine does, which wants the device itself."""
    nodes, found = [y.grad_fn for y in outputs], {(y.grad_fn, y.output_nr): dy for y, dy in zip(outputs, gradients)}
    for node in nodes:  # which grows
        nodes += {parent for parent, _ in node.next_functions if parent} - set(nodes)
    for node in sorted(nodes, key=lambda node: (hasattr(node, "variable"), -node._sequence_nr())):  # leaves are last
        given = [found.get((node, number)) for number in range(len(node._input_metadata))]
        for edge, gradient in zip(node.next_functions, tree_leaves(getattr(node, "apply", node)(*given))):
            if edge[0] is not None and gradient is not None:
                wanted = edge[0]._input_metadata[edge[1]]
                found[edge] = found.get(edge, 0) + gradient.sum_to_size(wanted.shape).to(wanted.dtype)
    return [x.grad for x in inputs]


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    for name, value in {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
        "torch.Generator": lambda device: {CUDA: torch.default_generator}[torch.device(device)],
        "torch._subclasses.fake_tensor.FakeTensorMode.__deepcopy__": lambda mode, memo: mode,  # two free it twice
        "weakref.getweakrefs": lambda x: [],  # for Module.to to swap fake parameters
        "torch.autograd._engine_run_backward": walk_back,
        "torch.Tensor.pin_memory": lambda tensor: tensor,
        "torch.Tensor.numpy": lambda x: {"cpu": np.zeros}[x.device.type](x.shape, str(x.dtype).removeprefix("torch.")),
        "vqct.make_codebook": unset_fake_temporarily()(vqct.make_codebook),  # the sizes of a graph depend on data
        "train.load_lpips": lambda trunk, *files: vqct.LPIPS(trunk),
    }.items():
        monkeypatch.setattr(name, value, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize("more", CASES, ids=str)
def test_a_step_stays_on_the_device(small, more):
    choices, useless = {**small, "resolution": 32, "preset": "f16", "gan_start": 0, "compile": False, **more}, idle(train.resolve(more))
    config = train.resolve({name: x for name, x in choices.items() if name not in useless})
    trainer, x = train.Trainer(config, PRIOR, CUDA), torch.empty(2, 3, 32, 32, device=CUDA)
    with Unwaiting() as mode:
        metrics = trainer.train_step([x])
    assert mode.norms == {torch.bfloat16 if config.amp else torch.float32}
    with Unwaiting():
        output, indices = trainer.model.eval()(x), trainer.model.encode(x)
    assert output.x_hat.dtype == trainer.model.decode(indices).dtype == torch.float32
    assert {x.device for x in (*metrics.values(), *(p.grad for p in trainer.model.parameters()))} == {CUDA}


@pytest.mark.parametrize("stage", "gpt-none gpt-class gpt-segmentation ldm-none ldm-class ldm-segmentation".split())
def test_the_second_stage_stays_on_the_device(small, stage):
    run = train.Trainer(train.resolve({**small, "multipliers": (1, 1, 2), "gan_weight": 0.0, "compile": False}), PRIOR, CUDA)  # as a Run
    vars(run).update(model=run.model.requires_grad_(False), names=["a", "n"], token_names=["a", "n"],
                     dataset=lambda split: train.ImageDataset([], [], 32))
    indices, labels, maps = (torch.zeros(*shape, dtype=torch.int16) for shape in ((4, 2, 4, 4), (4,), (4, 16, 16)))
    tokens = synthesize.Tokens(indices.long(), labels.long(), maps, np.zeros((4, 8, 4, 4), np.float16))
    config = synthesize.SynthesisConfig(*stage.split("-"), width=16, depth=1, heads=2, batch_size=4, steps=4)
    trainer, how = synthesize.StageTrainer(config, run, 3, tokens, [0]), synthesize.Sampling(0.9, 2, 0.9, 2.0, 3)
    with Unwaiting():
        trainer.train_step([[0, 1], [2, 3]])
    with Unwaiting() as mode:  # what is given enters and tokens leave, however many positions or steps there are
        mode.waits, rows, given = 4 if "ldm" in stage else 2, torch.arange(4), torch.full_like(tokens.indices, -1)
        assert len(synthesize.draw_images(run, (trainer.ema, config, 3, 0), tokens, rows, how, 0, given)) == 4


def test_evaluation_waits_for_its_results_alone(small):
    run = train.Trainer(train.resolve({**small, "resolution": 32, "compile": False}), PRIOR, CUDA)
    images = [torch.zeros(1, 3, 32, 32, dtype=torch.uint8) for _ in range(2)]
    run.batches = lambda *which: ((train.to_images(x, CUDA), {"image": x}) for x in images)
    state = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    others = [network.to(CUDA) for network in (evaluate.InceptionFeatures(state), vqct.LPIPS("squeeze"))]
    with Unwaiting() as mode:  # six scores, indices and features leave at the end
        mode.waits = 8
        scores, indices, features = evaluate.reconstruct(run, images, torch.zeros(3, 32, 32, device=CUDA), *others)
    assert {len(x) for x in (*scores.values(), indices, *features)} == {2} and len(scores) == 6
