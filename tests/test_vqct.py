"""Shapes, gradients and exactness of the networks.

pytest tests/test_vqct.py -k equation    Eq. 1, 2 and 3
pytest tests/test_vqct.py -k shape
pytest tests/test_vqct.py -k gradient
"""

import copy
import dataclasses
import math
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import vqct
from train import METHODS, RECIPES
from vqct import LPIPS, AttentionBlock, Block, ClusteredQuantizer, Codebook
from vqct import CodebookTransfer, Condition, Decoder, Denoiser, Discriminator
from vqct import Encoder, GraphConvolution, GroupNorm, GumbelQuantizer, ModelConfig
from vqct import NormalizedAdjacency, RegularizedQuantizer, TokenTransformer, UnitLength
from vqct import VectorQuantizer, VQModel, adaptive_weight, draw_tokens, hinge_loss
from vqct import load_taming, look_up, nearest_code, precise, sample_features, sample_tokens

# ======== Eq. 1


def distances(z, codebook):
    return torch.cdist(
        z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()


def assert_nearest(z, codebook, indices, origin=None):
    """Each row has a code as near as the nearest, up to the rounding of scores."""
    exact, sample = distances(z, codebook), codebook[:: len(codebook) // 100 + 1].double()
    origin = sample.sort(0).values[len(sample) // 2] if origin is None else origin
    rows, best = torch.arange(len(z)), exact.argmin(1)
    size = (codebook[torch.stack([best, indices])].double() - origin).norm(dim=2).amax(0)
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    slack = 8 * torch.finfo(dtype).eps * ((z.double() - origin).norm(dim=1) + size).square()
    assert (exact[rows, indices] <= exact[rows, best] + slack).all()


PLACES = {  # normally distributed features and codes → those to search
    "scattered": lambda z, codes: (z, codes),
    "far from zero": lambda z, codes: (300 + z, 300 + codes),
    "in near ties": lambda z, codes: (1 + 1e-3 * z, -1 + 1e-3 * codes),
    "in ties": lambda z, codes: (z.round() + 0.5, codes.round()),
    "the same": lambda z, codes: (z, codes[:1].expand_as(codes)),
    "beside a remote one": lambda z, codes: (
        100 + 0.01 * z,
        torch.cat([100 + 0.01 * codes[1:], codes[:1] - 1000]),
    ),
}
TYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
]
SIZES = [
    (1, 1, 1),
    (1, 5, 3),
    (5, 1, 3),
    (0, 3, 4),
    (13, 17, 1),
    (101, 53, 7),
    (64, 64, 8),
    (97, 211, 16),
    (9, 99, 99),
]


@pytest.mark.parametrize("rows, codes, dim", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_equation_1_finds_the_nearest_code(rows, codes, dim, place):
    both = PLACES[place](torch.randn(rows, dim), torch.randn(codes, dim))
    for types in TYPES:
        z, codebook = (x.to(dtype) for x, dtype in zip(both, types))
        indices = nearest_code(z, codebook)
        assert indices.shape == (rows,) and indices.dtype == torch.int64
        assert_nearest(z, codebook, indices)


def test_equations_1_and_2_are_float32_under_autocast():
    z, codebook = torch.randn(2000, 16), torch.randn(
        90, 16
    )  # of which bfloat16 finds 1 % another code
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(z, codebook), distances(z, codebook).argmin(1))
        z_q, _, loss = VectorQuantizer()(
            torch.randn(1, 16, 2, 2, dtype=torch.bfloat16), codebook
        )
    assert z_q.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_equation_1_with_features_that_are_not_finite(bad):
    z, codebook = torch.randn(9, 4), torch.randn(70, 4)
    z[3, 1], z[5] = bad, bad
    found, finite = nearest_code(z, codebook), z.isfinite().all(1)
    assert 0 <= found.min() and found.max() < 70 and finite.sum() == 7
    assert_nearest(z[finite], codebook, found[finite])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    "offset", [0, 1000]
)  # codes far from zero, as the outputs of a ReLU may be
@pytest.mark.parametrize("factor", [1, 0, 1e6, -1e8, 1e30, math.inf, math.nan])
def test_equation_1_stays_exact_beside_an_outlier(factor, offset, scale):
    z, codebook = scale * (offset + torch.randn(500, 16)), scale * (
        offset + torch.randn(1024, 16)
    )
    centre = codebook.double().mean(0)
    codebook[[11, 22]] *= factor  # the second is one of those whose median is the origin
    assert_nearest(z, codebook.nan_to_num(1e38, 1e38, 1e38), nearest_code(z, codebook), centre)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_equation_1_takes_codes_that_are_not_finite_last(bad):
    codebook = torch.full((300, 4), bad)
    codebook[7], codebook[9] = 1e6, torch.tensor([0, bad, 0, 0])
    assert (nearest_code(torch.randn(20, 4), codebook) == 7).all()
    assert (
        nearest_code(torch.randn(20, 4), codebook, 2) == 7
    ).all()  # rather twice than such a code
    codebook[7] = bad
    assert nearest_code(torch.randn(20, 4), codebook).shape == (20,)  # some code


@pytest.mark.parametrize(
    "z, codebook", [((2, 4), (3, 5)), ((2, 4), (3, 1)), ((2, 2, 4), (3, 4))]
)
def test_equation_1_refuses_other_shapes(z, codebook):
    with pytest.raises(RuntimeError):
        nearest_code(torch.randn(z), torch.randn(codebook))


@pytest.mark.parametrize("neighbours", [1, 2])
def test_equation_1_never_holds_the_distance_matrix(neighbours):
    """The search holds at most 2²² scores at a time, and keeps the order of features."""
    z, codebook, held = torch.randn(5000, 2), torch.randn(8192, 2), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            held.extend(
                x.numel()
                for x in torch.utils._pytree.tree_leaves(result)
                if isinstance(x, torch.Tensor)
            )
            return result

    with Watch():
        found = VectorQuantizer(neighbours=neighbours).indices(z.T[None, :, :, None], codebook)[
            0, :, :, 0
        ]
    assert 8192 * 250 < max(held) <= 2**22 < 5000 * 8192
    exact = distances(z[::97], codebook)
    chosen, wanted = (
        exact.gather(1, found[:, ::97].T),
        exact.topk(neighbours, largest=False).values,
    )
    torch.testing.assert_close(
        chosen, wanted, rtol=0, atol=1e-5
    )  # of entries up to 4, float32's rounding


RESIDENT = """
import torch, vqct
torch.set_num_threads({threads})
z, codebook = torch.randn(1, 4, 100, 200), torch.randn(4096, 4)
quantizer = vqct.VectorQuantizer(neighbours={neighbours})
quantizer.indices(z[:, :, :1, :9], codebook)
size = lambda name: int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) // 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = size("VmRSS")
quantizer.indices(z, codebook)
print(size("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells the resident size"
)
@pytest.mark.parametrize("threads, neighbours", [(1, 1), (2, 1), (1, 2)])
def test_equation_1_keeps_the_process_small(threads, neighbours):
    """One buffer serves all chunks. All distances together are 312 MiB."""
    script = RESIDENT.format(threads=threads, neighbours=neighbours)
    command, folder = [sys.executable, "-c", script], Path(vqct.__file__).parent
    grown = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert int(grown.stdout) < 50, grown.stderr


# ======== Eq. 2


@pytest.mark.parametrize(
    "beta_on, of_codebook, of_commitment", [("commitment", 1.0, 0.4), ("codebook", 0.4, 1.0)]
)
def test_equation_2_and_its_gradients(beta_on, of_codebook, of_commitment):
    z, codebook = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(
        40, 3, requires_grad=True
    )
    z_q, indices, loss = VectorQuantizer(0.4, beta_on)(z, codebook)
    chosen = codebook[indices[:, 0]].permute(0, 3, 1, 2)
    residual = (z - chosen).detach()
    assert indices.shape == (2, 1, 4, 5)
    torch.testing.assert_close(z_q, chosen)
    torch.testing.assert_close(loss, 1.4 * residual.square().mean())
    loss.backward()
    torch.testing.assert_close(z.grad, of_commitment * 2 * residual / z.numel())
    rows = -of_codebook * 2 * residual.permute(0, 2, 3, 1).reshape(-1, 3) / z.numel()
    torch.testing.assert_close(
        codebook.grad, torch.zeros_like(codebook).index_add(0, indices.flatten(), rows)
    )
    assert not codebook.grad.any(1).all()  # a plain codebook moves only what was chosen
    z.grad, weight = None, torch.randn_like(z)
    VectorQuantizer()(z, codebook.detach())[0].backward(weight)
    torch.testing.assert_close(z.grad, weight)  # straight through


def test_equation_1_with_two_neighbours_averages_them():
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    z = torch.tensor([[0.1, 0.0], [3.0, 0.1]]).T.view(1, 2, 1, 2)
    z_q, indices, _ = VectorQuantizer(neighbours=2).eval()(z, codebook)
    assert indices[0, :, 0].T.tolist() == [[0, 2], [1, 2]]
    assert z_q[0, :, 0, 0].tolist() == [0.5, 0.5] and torch.equal(
        z_q, look_up(indices, codebook)
    )
    assert torch.equal(
        VectorQuantizer(neighbours=2).indices(z + 1e4, codebook + 1e4), indices
    )  # far from zero


# ======== The other quantizers


def test_gumbel_is_hard_forward_and_its_gradient_is_soft():
    """With the same noise, hard and soft weights have the same gradient."""
    z, codebook, gradients = torch.randn(2, 4, 3, 3), torch.randn(7, 4), []
    for straight_through in (True, False):
        torch.manual_seed(1)
        quantizer = GumbelQuantizer(4, 7, kl_weight=0.0, straight_through=straight_through)
        torch.manual_seed(2)
        z_q, indices, loss = quantizer(z, codebook)
        (z_q * torch.linspace(-1, 1, z_q.numel()).view_as(z_q)).sum().backward()
        gradients.append(quantizer.to_logits.weight.grad)
        to_a_code = torch.cdist(z_q.movedim(1, -1).reshape(-1, 4), codebook).min(1).values
        assert to_a_code.max() < 1e-5 if straight_through else to_a_code.max() > 0.1
        assert torch.equal(
            indices, quantizer.indices(z, codebook)
        )  # the likeliest, whatever was drawn
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0 and loss == 0


def test_gumbel_is_deterministic_in_evaluation_and_sharp_when_cold():
    quantizer, z, codebook = (
        GumbelQuantizer(4, 7, straight_through=False),
        torch.randn(2, 4, 3, 3),
        torch.randn(7, 4),
    )
    quantizer.temperature = 1e-6
    z_q = quantizer(z, codebook)[0]
    assert (
        torch.cdist(z_q.movedim(1, -1).reshape(-1, 4), codebook).min(1).values.max() < 1e-2
    )  # soft weights near one
    quantizer.eval()
    z_q, indices, _ = quantizer(z, codebook)
    assert torch.equal(indices, quantizer.indices(z, codebook)) and torch.equal(
        z_q, look_up(indices, codebook)
    )
    assert torch.equal(indices, quantizer.to_logits(z).argmax(1, keepdim=True))


@pytest.mark.parametrize("bias, divergence", [(0.0, 0.0), (50.0, math.log(8))])
def test_gumbel_divergence_is_zero_at_uniform_and_log_k_at_one_code(bias, divergence):
    quantizer = GumbelQuantizer(4, 8, kl_weight=1.0)
    quantizer.to_logits.weight.data.zero_(), quantizer.to_logits.bias.data.zero_()[3].fill_(
        bias
    )
    found = quantizer(torch.randn(1, 4, 2, 2), torch.randn(8, 4))[2].item()
    assert found == pytest.approx(divergence, rel=1e-5, abs=1e-6)


def test_cvq_moves_each_code_by_its_decay_toward_an_anchor():
    """e_k ← e_k + α_k (ẑ_k − e_k), with α_k = exp(−10 K N_k / (1 − γ) − 1e-3).

    All features are equal, so the anchors are known.
    """
    codebook = nn.Parameter(torch.tensor([[0.0, 0.0], [0.9, 1.1], [5.0, -5.0], [-3.0, 4.0]]))
    before, quantizer, z = (
        codebook.detach().clone(),
        ClusteredQuantizer(4, decay=0.9),
        torch.ones(1, 2, 3, 3),
    )
    quantizer(z, codebook)
    usage = torch.tensor([0.0, 0.1, 0.0, 0.0])  # code 1 is nearest to all: (1 − γ) · 1
    alpha = torch.exp(-10 * 4 * usage / 0.1 - 1e-3)
    torch.testing.assert_close(quantizer.usage, usage)
    torch.testing.assert_close(
        codebook.detach(), before + alpha[:, None] * (torch.ones(2) - before)
    )
    assert (codebook[1] - before[1]).abs().max() < 1e-6 and (codebook[2] - 1).abs().max() < 0.01
    moved = codebook.detach().clone()
    quantizer.eval()(z, codebook)
    assert torch.equal(codebook.detach(), moved)  # evaluation writes nothing


def test_cvq_moves_its_codebook_and_has_the_gradient_of_equation_2():
    codebook = Codebook(torch.randn(9, 3), (4, 5), trained=True)
    before, z = codebook.vectors.detach().clone(), torch.randn(2, 3, 2, 2)
    ClusteredQuantizer(5)(z, codebook()[1])[2].backward()
    after = codebook.vectors.detach()
    assert torch.equal(after[:4], before[:4]) and not torch.equal(after[4:], before[4:])
    old = before[4:].clone().requires_grad_()
    VectorQuantizer()(z, old)[2].backward()
    torch.testing.assert_close(codebook.vectors.grad[4:], old.grad)


def test_cvq_draws_nearer_features_more_often():
    features, codebook = torch.tensor([[0.0], [0.5], [1.5]]), torch.zeros(4000, 1)
    ClusteredQuantizer(4000).re_anchor(
        features, torch.full((3,), 3999), codebook
    )  # all codes but the last unused
    anchors = codebook[:3999, 0] / math.exp(-1e-3)  # e = 0, so the code is α ẑ
    expected = torch.softmax(-features.flatten().square(), 0)
    for value, share in zip((0.0, 0.5), expected):
        assert ((anchors - value).abs() < 1e-3).float().mean().item() == pytest.approx(
            share.item(), abs=0.03
        )


def test_cvq_draws_its_anchors_in_chunks(monkeypatch):
    cdist, sizes = torch.cdist, []
    monkeypatch.setattr(
        torch, "cdist", lambda a, b: sizes.append(len(a) * len(b)) or cdist(a, b)
    )
    features, codebook = torch.randn(9000, 2), torch.randn(3000, 2)
    ClusteredQuantizer(3000).re_anchor(features, torch.zeros(9000, dtype=torch.int64), codebook)
    assert max(sizes) <= 2**22 and sum(sizes) == 9000 * 3000
    assert (
        torch.cdist(codebook[1:], features).amin(1).max() < 0.01
    )  # all unused codes have moved to features


def test_regvq_contrasts_positions_of_all_images():
    features, codebook = torch.randn(5000, 4, requires_grad=True), torch.randn(50, 4)
    nearest = nearest_code(features, codebook)
    RegularizedQuantizer.contrast(features, codebook, nearest, nearest).backward()
    rows = features.grad.any(1).nonzero().flatten()
    assert len(rows) == 1024 and rows[0] == 0 and rows[-1] == 4999 and rows.diff().max() == 5


def test_regvq_tends_to_uniform_under_its_prior_term_alone():
    z, codebook = nn.Parameter(torch.randn(64, 2) * 0.1 + 1), nn.Parameter(
        torch.randn(6, 2) * 2
    )
    optimizer, divergences = torch.optim.Adam([z, codebook], lr=0.05), []
    for _ in range(300):
        divergences.append(
            RegularizedQuantizer.divergence_from_uniform(-torch.cdist(z, codebook).square())
        )
        optimizer.zero_grad(), divergences[-1].backward(), optimizer.step()
    assert divergences[0] > 0.3 and divergences[-1] < 1e-3
    mean = RegularizedQuantizer.divergence_from_uniform(
        torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    )  # (5, 3) / 8
    assert mean.item() == pytest.approx(
        5 / 8 * math.log(5 / 4) + 3 / 8 * math.log(3 / 4), rel=1e-4
    )


def test_regvq_draws_masked_positions_from_their_distribution():
    z, codebook = torch.zeros(1, 1, 100, 100), torch.tensor([[0.0], [1.0], [-1.5]])
    quantizer = RegularizedQuantizer(mask_ratio=0.5)
    quantizer.temperature = 2.0
    z_q, indices, _ = quantizer(z, codebook)
    assert (indices == 0).all()  # the nearest, whatever was drawn
    drawn = (
        torch.bincount(torch.cdist(z_q.reshape(-1, 1), codebook).argmin(1), minlength=3) / 1e4
    )
    expected = 0.5 * torch.softmax(-codebook.flatten().square() / 2, 0) + 0.5 * torch.tensor(
        [1.0, 0.0, 0.0]
    )
    torch.testing.assert_close(drawn, expected, atol=0.03, rtol=0)


def test_regvq_adds_its_terms_by_their_weights():
    z, codebook = torch.randn(2, 3, 4, 4), torch.randn(9, 3)
    plain = VectorQuantizer()(z, codebook)

    def outputs(*weights):
        torch.manual_seed(3)
        return RegularizedQuantizer(*weights)(z, codebook)

    features, nearest = z.movedim(1, -1).flatten(0, -2), plain[1].flatten()
    divergence = RegularizedQuantizer.divergence_from_uniform(
        -torch.cdist(features, codebook).square()
    )
    contrast = RegularizedQuantizer.contrast(features, codebook, nearest, nearest)
    torch.testing.assert_close(
        outputs(0.5, 0.0, 0.25)[2], plain[2] + 0.5 * divergence + 0.25 * contrast
    )
    assert (
        divergence > 0 and contrast > 0 and outputs(0.0, 1.0, 0.0)[2] > plain[2]
    )  # drawn codes are farther
    in_evaluation = RegularizedQuantizer(1.0, 1.0, 1.0).eval()(z, codebook)
    for found, expected in (
        (outputs(0.0, 0.0, 0.0), plain),
        (in_evaluation, VectorQuantizer().eval()(z, codebook)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_regvq_contrast_pulls_a_far_draw_less():
    features = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.2], [0.3, 0.0, 1.0]])
    codebook = torch.cat([torch.eye(3), torch.tensor([[0.1, 0.9, 0.1], [0.6, 0.6, 0.6]])])
    nearest = torch.tensor([0, 1, 2])
    # one code twice; then the third far from its nearest, the second close to it
    for drawn in (nearest, torch.tensor([0, 0, 2]), torch.tensor([0, 3, 4])):
        noise = (codebook[drawn] - codebook[nearest]).square().sum(1)
        weight = torch.exp(noise / noise[noise > 0].mean()) if noise.any() else torch.ones(3)
        cosine = F.normalize(features, dim=1) @ F.normalize(codebook[drawn], dim=1).T / 0.07
        others = cosine.exp() * (
            drawn[:, None] != drawn
        )  # the same code elsewhere is no negative
        own = weight * cosine.diag().exp()
        found = RegularizedQuantizer.contrast(
            features, codebook.requires_grad_(), drawn, nearest
        )
        torch.testing.assert_close(found, -(own / (own + others.sum(1))).log().mean())
    assert not torch.autograd.grad(found, codebook)[0][
        1:3
    ].any()  # a nearest code that was not drawn only weighs
    codes, chosen = F.normalize(torch.randn(5, 8), dim=1), torch.arange(4)
    features = (codes[chosen] + 0.1 * torch.randn(4, 8)).requires_grad_()
    # Pulls on the feature of position 0 by one code: drawn and nearest, or drawn instead
    # of the nearest.
    pulls = []
    for nearest in (chosen, torch.tensor([4, 1, 2, 3])):
        loss = RegularizedQuantizer.contrast(features, codes, chosen, nearest)
        pulls.append(torch.autograd.grad(loss, features)[0][0].norm())
    assert 0.3 < pulls[1] / pulls[0] < 0.5  # e^-1, where the pull is weak


def test_group_norms_divide_the_channels():
    assert [GroupNorm(width).num_groups for width in (24, 96, 128, 160, 192, 512)] == [
        8,
        32,
        32,
        32,
        32,
        32,
    ]


# ======== Eq. 3

EDGES = torch.tensor([(0, 4), (0, 5), (1, 5), (2, 6)])  # nodes 3 and 7 stand alone


def dense_adjacency(edges, nodes, weights=None):
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    for (i, j), weight in zip(
        edges.tolist(), torch.ones(len(edges)) if weights is None else weights
    ):
        a[i, j] = a[j, i] = a[i, j] + weight
    a = torch.eye(nodes) + (a.sign() if weights is None else a)
    return (a / a.sum(0).sqrt() / a.sum(1, keepdim=True).sqrt()).float()


@pytest.mark.parametrize("weights", [None, torch.tensor([3.0, 1.0, 2.0, 0.5, 4.0, 0.3])])
def test_equation_3_adjacency_and_its_gradient(weights):
    edges = torch.cat([EDGES, EDGES[:1], EDGES[:1].flip(1)])  # repeats count once, or add up
    adjacency, dense = NormalizedAdjacency(edges, 8, weights), dense_adjacency(
        edges, 8, weights
    )
    nodes, weight = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    product = adjacency(nodes)
    torch.testing.assert_close(product, dense @ nodes)
    torch.testing.assert_close(torch.autograd.grad(product, nodes, weight)[0], dense.T @ weight)


def test_equation_3_adjacency_at_its_limits():
    plain, nodes = NormalizedAdjacency(EDGES, 8), torch.randn(3, 2)
    for same in (
        NormalizedAdjacency([*EDGES.tolist(), (3, 3)], 8),
        NormalizedAdjacency(EDGES, 8, torch.ones(4)),
    ):
        assert torch.equal(
            plain.value, same.value
        )  # a loop is there already; counts of one are binary
    torch.testing.assert_close(NormalizedAdjacency([], 3)(nodes), nodes)
    for outside in ((0, 8), (8, 0), (-1, 2)):
        with pytest.raises(RuntimeError):
            NormalizedAdjacency([outside], 8)


def test_equation_3_gradients_to_second_order():
    adjacency, nodes = NormalizedAdjacency(EDGES, 8), torch.randn(
        8, 2, dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(adjacency, (nodes,))
    assert torch.autograd.gradgradcheck(lambda x: adjacency(x).pow(3), (nodes,))


@pytest.mark.parametrize("widths", [(5, 3), (3, 5)])
@pytest.mark.parametrize("constant", [True, False])
def test_equation_3_layer_is_the_dense_formula_with_its_gradient(widths, constant):
    layer, adjacency = GraphConvolution(*widths), NormalizedAdjacency(EDGES, 8)
    nodes = torch.randn(8, widths[0], requires_grad=not constant)
    found, expected = layer(nodes, adjacency), dense_adjacency(EDGES, 8) @ nodes @ layer.weight
    torch.testing.assert_close(found, expected)
    inputs = [layer.weight] if constant else [layer.weight, nodes]
    torch.testing.assert_close(
        *(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))
    )


@pytest.mark.parametrize("options", [{}, dict(last_relu=False, dropout=0.5)])
def test_equation_3_is_the_transfer_network(options):
    """Three convolutions with ReLU; or none at the end and dropout, as the authors' code has."""
    transfer, nodes = CodebookTransfer(
        (5, 64, 64, 4), NormalizedAdjacency(EDGES, 8), **options
    ), torch.randn(8, 5)
    expected, dense = nodes, dense_adjacency(EDGES, 8)
    for i, layer in enumerate(transfer.layers):
        expected = dense @ expected @ layer.weight
        expected = F.relu(expected) if i < 2 or not options else expected
    assert (expected.min() < 0) == bool(options) and len(list(transfer.parameters())) == 3
    torch.testing.assert_close(transfer.eval()(nodes), expected)
    assert transfer.train().dropout(torch.ones(10000)).unique().tolist() == (
        [0.0, 2.0] if options else [1.0]
    )
    assert torch.allclose(transfer(nodes), expected) != bool(options)
    words = CodebookTransfer((64, 512, 512, 256), nn.Identity())(
        torch.randn(400, 64)
    )  # no graph: the same scale
    assert words.square().mean().item() == pytest.approx(1, rel=0.2)


def test_gradient_of_one_code_moves_its_neighbourhood_most():
    """On a ring of words, a step on one code moves near codes more than far ones."""
    count = 40
    edges = torch.stack([torch.arange(count), (torch.arange(count) + 1) % count], 1)
    hops = torch.minimum(torch.arange(count), count - torch.arange(count))  # from node 0
    near, far = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        vectors, transfer = torch.randn(count, 16), CodebookTransfer(
            (16, 32, 32, 8), NormalizedAdjacency(edges, count)
        )
        codebook = Codebook(vectors, (count,), transfer=transfer)
        (codes,) = codebook()
        before = codes.detach().clone()
        (
            codes[0] - codes[0].detach() - 0.1
        ).square().sum().backward()  # only node 0 is selected
        torch.optim.SGD(codebook.parameters(), lr=0.1).step()
        move = (codebook()[0] - before).norm(dim=1)
        near.append(move[(hops > 0) & (hops <= 2)].mean().item())
        far.append(move[hops > 6].mean().item())
    assert all(
        value > 0 for value in far
    )  # by the shared weights, out of reach of three convolutions
    assert sum(near) > 1.2 * sum(far) and sum(n > f for n, f in zip(near, far)) >= 16


def test_codes_are_transferred_vectors_in_the_shape_of_the_sizes():
    transfer = nn.Linear(3, 4)
    codebook = Codebook(torch.randn(5, 3), (2, 3), transfer=transfer)
    assert torch.equal(torch.cat(codebook()), transfer(codebook.vectors)) and [
        len(part) for part in codebook()
    ] == [2, 3]
    assert codebook.double()()[0].dtype == torch.float64
    with pytest.raises(RuntimeError):
        Codebook(torch.randn(5, 3), (2, 2))()  # sizes that do not add up


def test_simvq_starts_as_published(prior, small):
    model = build("simvq", prior, {**small, "code_dim": 512})
    assert (
        isinstance(model.codebook.transfer, nn.Linear)
        and model.codebook.transfer.bias.abs().max() > 0
    )
    assert not isinstance(
        model.codebook.vectors, nn.Parameter
    ) and model.codebook.vectors.shape == (16, 256)
    assert model.codebook.vectors.std().item() == pytest.approx(
        256**-0.5, rel=0.05
    )  # N(0, 1/D)
    largest = [
        codes.abs().max().item()
        for codes in build("matched", prior, {**small, "code_dim": 512}).codebook()
    ]
    assert largest == pytest.approx(
        [1 / 7, 1 / 9], rel=0.02
    )  # VQ-VAE's ±1/K, of each codebook's own K


def test_frozen_codes_last_until_training_or_loading(prior, small):
    model, other = (build("vqct", prior, small) for _ in range(2))
    codebook = model.eval().codebook
    codebook.freeze()
    first, state = codebook()[0], model.state_dict()
    assert first.data_ptr() == codebook()[0].data_ptr() and not first.requires_grad
    assert not any("frozen" in name for name in state)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model
    for model in copies:
        model.codebook.freeze()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model.codebook()[0], other.codebook()[0])  # those that were loaded
        model.codebook.freeze()
        assert (
            model.double().codebook()[0].dtype == torch.float64
        )  # what moves the model moves them
        model.train().codebook()[0].sum().backward()
        assert all(p.grad is not None for p in model.codebook.parameters())
        with torch.no_grad():
            model.codebook.transfer.layers[0].weight.zero_()
        model.eval().codebook.freeze()
        assert not model.codebook()[0].any()


def test_unit_codes_are_the_nearest_by_cosine(prior, small):
    model, x = build("matched-l2", prior, small).eval(), torch.randn(2, 3, 16, 16)
    adjectives, z = model.codebook()[0], model.features(x)[0]
    assert torch.allclose(adjectives.norm(dim=1), torch.ones(7)) and torch.allclose(
        z.norm(dim=1), torch.ones(2, 8, 8)
    )
    cosine = F.cosine_similarity(
        z[:, None], model.codebook.vectors[:7, :, None, None], dim=2
    )  # (B, K, h, w)
    assert torch.equal(cosine.argmax(1), model.encode(x)[:, 0])


# ======== Networks


def test_networks_have_the_shapes_of_vqgan():
    networks = encoder, decoder = Encoder(8, (1, 1, 2, 2, 4), 2, 6), Decoder(
        8, (1, 1, 2, 2, 4), 2, 6
    )
    z = encoder(torch.randn(2, 3, 64, 32))
    assert z.shape == (2, 6, 4, 2) and decoder(z).shape == (2, 3, 64, 32)
    assert [
        sum(isinstance(m, AttentionBlock) for m in network.modules()) for network in networks
    ] == [3, 4]
    assert decoder.to_image.weight.shape == (3, 8, 3, 3)
    assert Discriminator()(torch.randn(2, 3, 64, 64)).shape == (
        2,
        1,
        6,
        6,
    )  # a logit for each patch
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in network.parameters())
            for network in (Encoder(), Decoder(), Discriminator())
        ]
    assert [round(size / 1e6, 2) for size in sizes] == [29.30, 42.45, 2.77]
    assert not any(
        m.conv2.weight.any() for m in encoder.modules() if isinstance(m, vqct.ResidualBlock)
    )  # at first
    spread, discriminator = (
        decoder.layers.conv_in.weight.std() * 54**0.5,
        Discriminator().layers,
    )
    assert [spread.item(), discriminator[0].weight.std().item()] == pytest.approx(
        [1, 0.02], rel=0.1
    )
    assert {m.negative_slope for m in discriminator if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_hinge_loss_by_hand():
    assert hinge_loss(
        torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    ).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    last, hidden, x = (
        nn.Conv2d(4, 3, 3, padding=1),
        torch.randn(2, 4, 6, 6),
        torch.randn(2, 3, 6, 6),
    )
    x_hat = last(hidden)
    losses = F.mse_loss(x_hat, x), x_hat.tanh().mean()
    norms = [
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in losses
    ]
    gradients = [torch.autograd.grad(loss, x_hat, retain_graph=True)[0] for loss in losses]
    found = adaptive_weight(x_hat, last.weight, *gradients)
    torch.testing.assert_close(found, norms[0] / (norms[1] + 1e-4))
    assert not found.requires_grad
    assert (
        adaptive_weight(x_hat, last.weight, gradients[0] * 1e9, gradients[1] * 0).item() == 1e4
    )


@pytest.mark.parametrize(
    "trunk, taps", [("vgg", (3, 8, 15, 22, 29)), ("squeeze", (1, 4, 7, 9, 10, 11, 12))]
)
def test_lpips_is_zero_on_equal_images_and_has_a_gradient(trunk, taps):
    lpips = LPIPS(trunk)
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    distance = lpips(x, y)
    assert distance.shape == (2,) and (distance > 0).all() and lpips.taps == taps
    assert [head.weight.sum().item() for head in lpips.heads] == pytest.approx([1] * len(taps))
    assert (lpips(x, x).abs() < 1e-9).all()
    distance.sum().backward()
    assert y.grad.abs().sum() > 0 and not any(p.requires_grad for p in lpips.parameters())


def test_lpips_is_its_formula():
    """By hand on the first tap: unit features, squared difference, head, mean over positions."""
    widths = LPIPS.TRUNKS["squeeze"][2]
    heads = {
        f"lin{i}.model.1.weight": (i == 0) * torch.rand(1, width, 1, 1)
        for i, width in enumerate(widths)
    }
    lpips = LPIPS("squeeze", None, heads)
    x, y = torch.rand(1, 3, 32, 32) * 2 - 1, torch.rand(1, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(
        2, 3, 1, 1
    )
    features = [F.relu(lpips.features[0]((image - shift) / scale)) for image in (x, y)]
    unit = [f / f.square().sum(1, keepdim=True).sqrt() for f in features]
    expected = (
        ((unit[0] - unit[1]).square() * lpips.heads[0].weight.view(1, -1, 1, 1)).sum(1).mean()
    )
    torch.testing.assert_close(lpips(x, y)[0], expected)


# ======== Types and devices


def second_stages(dtype):
    """Each second stage in a type, with the arguments of its loss."""
    labels, none = torch.tensor([1, 0]), lambda: Condition("class", 2, (2, 2), 8)
    gpt = TokenTransformer((7, 5), (2, 2), none(), width=8, depth=1, heads=2).to(dtype)
    denoiser = Denoiser(4, (2, 2), none(), width=8, depth=1, heads=2).to(dtype)
    tokens = torch.randint(0, 5, (2, 2, 2, 2), dtype=torch.int32)
    return (gpt, (tokens, labels)), (denoiser, (torch.randn(2, 4, 2, 2, dtype=dtype), labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_compute_in_the_type_of_their_weights(dtype):
    x, y = torch.rand(2, 2, 3, 40, 40) * 2 - 1
    lpips = LPIPS("squeeze")
    exact, found = lpips(x, y), lpips.to(dtype)(x.to(dtype), y.to(dtype))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0)
    for network, batch in second_stages(dtype):
        sum(network.loss(*batch)).backward()
        gradients = [
            parameter.grad for parameter in network.parameters() if parameter.grad is not None
        ]
        assert all(
            gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients
        )
    assert sample_features(network.eval(), 2, steps=3).dtype == dtype
    z, codebook = torch.randn(1, 4, 3, 3).to(dtype), torch.randn(9, 4).to(dtype)
    exact = VectorQuantizer(neighbours=2).indices(z.double(), codebook.double())
    assert torch.equal(VectorQuantizer(neighbours=2).indices(z, codebook), exact)
    leaf = nn.Parameter(precise(codebook).clone())
    assert ClusteredQuantizer(9)(z, leaf)[0].dtype == leaf.dtype and not torch.equal(
        leaf, precise(codebook)
    )


@pytest.fixture
def doubled():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_models_are_double_where_that_is_the_default(method, prior, small, doubled):
    model, x = build(method, prior, small), torch.randn(2, 3, 16, 16)
    output = model(x)
    (F.mse_loss(output.x_hat, x) + output.quantizer_loss).backward()
    assert {t.dtype for t in (*output, *model.state_dict().values())} <= {
        torch.float64,
        torch.int64,
    }
    for network, batch in second_stages(torch.float64):
        assert sum(network.loss(*batch)).dtype == torch.float64
    assert (
        LPIPS("squeeze")(x.new_zeros(1, 3, 40, 40), x.new_ones(1, 3, 40, 40)).dtype
        == torch.float64
    )


def test_unit_length_gradient():
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(UnitLength(), x)


@pytest.mark.parametrize("method", METHODS)
def test_models_are_built_on_meta_and_take_weights(method, prior, small):
    model, x = build(method, prior, small).eval(), torch.randn(1, 3, 16, 16)
    with torch.device("meta"):
        empty = build(method, prior, small).eval()
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x).x_hat, model(x).x_hat)


# ======== The model


def build(method, prior, small, recipe="paper"):
    choices = {**RECIPES[recipe], **METHODS[method], **small}
    return VQModel(
        ModelConfig(
            **{k: v for k, v in choices.items() if k in ModelConfig.__dataclass_fields__}
        ),
        prior,
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_that_decoding_indices_gives_the_forward_pass(method, recipe, prior, small):
    model, x = build(method, prior, small, recipe).eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        output, indices = model(x), model.encode(x)
        assert torch.equal(output.indices, indices) and torch.equal(
            model.decode(indices), output.x_hat
        )
        assert torch.equal(model.nearest_indices(model.features(x)), indices)
    sizes = [len(codes) for codes in model.codebook()]
    if (
        recipe == "official" and len(sizes) == 2 and method != "matched-cvq"
    ):  # a position has two adjectives
        sizes = sizes[:1] + sizes
        assert [part.shape[1] for part in model.by_codebook(indices)] == [
            2,
            1,
        ] and model.per_token("an") == [*"aan"]
    assert (
        model.sizes == sizes
        and output.x_hat.shape == x.shape
        and output.quantizer_loss.shape == ()
    )
    assert (
        indices.shape == (3, len(sizes), *model.grid)
        and model.grid == (8, 8)
        and indices.min() >= 0
    )
    assert (indices.amax(dim=(0, 2, 3)) < torch.tensor(sizes)).all()


WORDS, LEARNED = [(7, 4), (9, 4)], [(1024, 8)]
# method → shapes of codes, trained tensors of the codebook, layers with a graph, quantizer,
# whether words matter
KINDS = {
    "vqct": (WORDS, 3, 3, VectorQuantizer, True),
    "vqct-vqvae": (WORDS, 3, 3, VectorQuantizer, True),
    "vqvae": (LEARNED, 1, 0, VectorQuantizer, False),
    "vqgan": (LEARNED, 1, 0, VectorQuantizer, False),
    "gumbel": (LEARNED, 1, 0, GumbelQuantizer, False),
    "cvq": (LEARNED, 1, 0, ClusteredQuantizer, False),
    "regvq": (LEARNED, 1, 0, RegularizedQuantizer, False),
    "random-mlp": (WORDS, 3, 0, VectorQuantizer, False),
    "frozen": ([(16, 12)], 0, 0, VectorQuantizer, True),
    "finetune": ([(16, 12)], 1, 0, VectorQuantizer, True),
    "single-mlp": ([(16, 8)], 3, 0, VectorQuantizer, True),
    "single-gcn": ([(16, 8)], 3, 3, VectorQuantizer, True),
    "multi-mlp": (WORDS, 3, 0, VectorQuantizer, True),
    "matched": (WORDS, 1, 0, VectorQuantizer, False),
    "matched-cvq": (WORDS, 1, 0, ClusteredQuantizer, False),
    "matched-l2": (WORDS, 1, 0, VectorQuantizer, False),
    "simvq": (WORDS, 2, 0, VectorQuantizer, False),
    "words-linear": (WORDS, 2, 0, VectorQuantizer, True),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ_in_shape_and_kind_of_their_codes(method, prior, small):
    shapes, trained, graph_layers, quantizer, heeds_words = KINDS[method]

    def build_from(**changes):
        torch.manual_seed(0)
        return build(method, dataclasses.replace(prior, **changes), small)

    model = build_from()
    codes, transfer = model.codebook(), model.codebook.transfer
    assert [tuple(part.shape) for part in codes] == shapes and len(
        list(model.codebook.parameters())
    ) == trained
    with_graph = isinstance(getattr(transfer, "adjacency", None), NormalizedAdjacency)
    assert with_graph * len(getattr(transfer, "layers", [])) == graph_layers
    assert all(type(q) is quantizer for q in model.quantizers)
    others = build_from(adjective_vectors=prior.adjective_vectors + 1), build_from(
        edges=prior.edges[:3]
    )
    for other, heeded in zip(others, (heeds_words, graph_layers > 0)):
        assert all(torch.equal(a, b) for a, b in zip(codes, other.codebook())) == (not heeded)


# the five others have other rules
@pytest.mark.parametrize(
    "method", sorted(set(METHODS) - {"frozen", "gumbel", "cvq", "matched-cvq", "regvq"})
)
def test_gradient_moves_unselected_codes_only_where_codes_are_generated(method, prior, small):
    """§3.4 for every system: one step of Eq. 2 on one position."""
    model = build(method, prior, small)
    codes, before = model.codebook()[0], torch.cat(model.codebook()).detach().clone()
    followed = codes[
        codes.norm(dim=1).argmax()
    ].detach()  # not one that the last ReLU has silenced
    z = followed.view(1, -1, 1, 1) + 0.01 * torch.rand(1, len(followed), 1, 1)
    _, indices, loss = model.quantizers[0](z, codes)
    loss.backward(), torch.optim.SGD(model.codebook.parameters(), lr=0.1).step()
    moved, others = (torch.cat(model.codebook()) != before).any(dim=1), torch.arange(
        len(before)
    ) != indices.item()
    assert moved[indices.item()]
    if model.codebook.transfer is None or isinstance(model.codebook.transfer, UnitLength):
        assert not moved[others].any()
    else:  # all, those without an edge too, but what the last ReLU has silenced
        assert moved[others & before.any(1)].all() and moved.double().mean() > 0.5


def test_edges_are_weighted_when_asked(prior, small):
    prior.edge_counts[:] = np.arange(1, len(prior.edges) + 1)
    for asked, weights in ((True, prior.edge_counts), (False, None)):
        adjacency = VQModel(
            ModelConfig(**small, weighted_edges=asked), prior
        ).codebook.transfer.adjacency
        assert torch.equal(
            adjacency.value, NormalizedAdjacency(prior.edges + [0, 7], 16, weights).value
        )


def test_word_vectors_are_scaled_as_asked(prior, small):
    words = torch.from_numpy(np.concatenate([prior.adjective_vectors, prior.noun_vectors]))
    none, rms = (
        VQModel(ModelConfig(**small, vector_scale=how), prior).codebook.vectors
        for how in ("none", "rms")
    )
    assert torch.equal(none, words)
    assert rms.square().mean().item() == pytest.approx(1) and torch.allclose(
        rms * words.square().mean().sqrt(), words
    )


@pytest.mark.parametrize(
    "quantizer, generated",
    [(name, 0) for name in ("nearest", "gumbel", "cvq", "regvq")]
    + [(name, 1) for name in ("nearest", "gumbel", "regvq")],  # cvq is refused: see below
)
def test_every_quantizer_gives_gradients_to_two_codebooks(quantizer, generated, prior, small):
    origin = {} if generated else dict(codes="random", trained=True, transfer="none")
    model = VQModel(
        ModelConfig(
            **small, **origin, quantizer=quantizer, contrastive_weight=0.1, kl_weight=0.1
        ),
        prior,
    )
    output = model(x := torch.randn(2, 3, 16, 16))
    (F.mse_loss(output.x_hat, x) + output.quantizer_loss).backward()
    assert all(
        p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.codebook.parameters()
    )
    model.eval()
    assert torch.equal(model.decode(model.encode(x)), model(x).x_hat)


def test_temperature_goes_from_one_to_its_end(prior, small):
    model = build("gumbel", prior, small)
    for progress, expected in ((0.0, 1.0), (0.5, (1 + 1 / 16) / 2), (1.0, 1 / 16)):
        model.anneal(progress)
        assert model.quantizers[0].temperature == pytest.approx(expected)


def test_gradients_of_each_loss_reach_its_weights(prior, small):
    model, x = build("vqct", prior, small), torch.randn(2, 3, 16, 16)

    def reached(loss):
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        return {
            name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None
        }

    output, frozen = model(x), [codes.detach() for codes in model.codebook()]
    assert reached(F.mse_loss(output.x_hat, x)) == {
        "encoder",
        "to_codes",
        "from_codes",
        "decoder",
    }  # straight through
    assert reached(output.quantizer_loss) == {"encoder", "to_codes", "codebook"}
    assert all(
        p.grad.any() for p in model.codebook.parameters()
    )  # every weight of the transfer network
    commitment = sum(
        q(z, codes)[2] for q, z, codes in zip(model.quantizers, model.features(x), frozen)
    )
    torch.testing.assert_close(
        commitment, output.quantizer_loss
    )  # the sum over codebooks, not the mean
    assert (
        reached(commitment) == {"encoder", "to_codes"}
        and model.encoder.layers[0].weight.grad.any()
    )


@pytest.mark.parametrize("method", METHODS)
def test_reconstruction_codes_and_losses_are_float32_under_autocast(method, prior, small):
    model, x = build(method, prior, small), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(x).dtype == torch.bfloat16
        output, codes = model(x), model.codebook()
    assert output.x_hat.dtype == output.quantizer_loss.dtype == codes[0].dtype == torch.float32
    gradient = torch.randn_like(output.x_hat)
    assert (
        adaptive_weight(output.x_hat, model.decoder.to_image.weight, gradient, gradient).dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    "message, choices",
    [
        ("not a multiple of 2", dict(resolution=17)),
        ("need a prior", dict()),
        ("'cvq' needs trained codes without transfer", dict(quantizer="cvq")),
        ("2 neighbours needs", dict(quantizer="gumbel", adjective_neighbours=2)),
        ("8 neighbours needs", dict(adjective_neighbours=8)),
        ("no quantizer 'mine'", dict(quantizer="mine")),
    ],
)
def test_model_refuses_what_cannot_be(message, choices, prior, small):
    with pytest.raises(ValueError, match=message):
        VQModel(ModelConfig(**{**small, **choices}), prior if choices else None)


def test_state_dict_carries_all_it_takes_to_decode(prior, small):
    model, other = build("vqct", prior, small).eval(), build("vqct", prior, small)
    other.codebook.vectors.zero_(), other.codebook.transfer.adjacency.value.zero_()
    other.load_state_dict(model.state_dict())
    indices = torch.randint(0, 7, (1, 2, 8, 8))
    assert torch.equal(other.eval().decode(indices), model.decode(indices))


def test_module_shows_the_equations(capsys):
    runpy.run_path(vqct.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    for line in (
        r"beak +0\.333 0\.408 0\.000 0\.333 ",  # degree 3, orange's 3, sharp's 2
        r"sharp .* 0\.000 1\.316 ",  # (−2, 1)/2 + (0, 2)/√6, of which ReLU leaves the second
        r"ẑ_a = .* 0\.406 from orange, 1\.002 from sharp: s = 0",
        r"\(1 \+ β\) 0\.767 / 2 = 0\.4796",
    ):
        assert re.search(line, printed), line


# ======== Published weights: taming-transformers' network by its own names, two levels deep


class Published:
    """VQGAN with the published names and random weights, made at first use."""

    def __init__(self):
        self.state = {"quantize.embedding.weight": torch.randn(12, 8)}
        self.decode(self.encode(torch.zeros(1, 3, 16, 16)))

    def named(self, name, weight, bias):
        return self.state.setdefault(f"{name}.weight", weight), self.state.setdefault(
            f"{name}.bias", bias
        )

    def conv(self, x, name, width, size=3, **more):
        weight = torch.randn(width, x.shape[1], size, size) / math.sqrt(x.shape[1] * size**2)
        return F.conv2d(
            x,
            *self.named(name, weight, 0.1 * torch.randn(width)),
            **{"padding": size // 2, **more},
        )

    def norm(self, x, name):
        weight, bias = 0.1 * torch.randn(2, x.shape[1])
        return F.group_norm(x, 32, *self.named(name, 1 + weight, bias), 1e-6)

    def act(self, x, name):
        x = self.norm(x, name)
        return x * torch.sigmoid(x)

    def block(self, x, name, width):
        hidden = self.conv(self.act(x, f"{name}.norm1"), f"{name}.conv1", width)
        hidden = self.conv(self.act(hidden, f"{name}.norm2"), f"{name}.conv2", width)
        return hidden + (
            x if x.shape[1] == width else self.conv(x, f"{name}.nin_shortcut", width, 1)
        )

    def attend(self, x, name):
        normal, width = self.norm(x, f"{name}.norm"), x.shape[1]
        q, k, v = (self.conv(normal, f"{name}.{part}", width, 1).flatten(2) for part in "qkv")
        weights = (q.mT @ k / math.sqrt(width)).softmax(dim=2)
        return x + self.conv((v @ weights.mT).view_as(x), f"{name}.proj_out", width, 1)

    def middle(self, x, network):
        x = self.attend(self.block(x, f"{network}.mid.block_1", 256), f"{network}.mid.attn_1")
        return self.block(x, f"{network}.mid.block_2", 256)

    def encode(self, x):
        x = self.block(self.conv(x, "encoder.conv_in", 128), "encoder.down.0.block.0", 128)
        x = self.conv(
            F.pad(x, (0, 1, 0, 1)), "encoder.down.0.downsample.conv", 128, stride=2, padding=0
        )
        x = self.middle(
            self.attend(self.block(x, "encoder.down.1.block.0", 256), "encoder.down.1.attn.0"),
            "encoder",
        )
        return self.conv(
            self.conv(self.act(x, "encoder.norm_out"), "encoder.conv_out", 16),
            "quant_conv",
            8,
            1,
        )

    def decode(self, z):
        x = self.middle(
            self.conv(self.conv(z, "post_quant_conv", 16, 1), "decoder.conv_in", 256), "decoder"
        )
        for block in range(2):
            x = self.attend(
                self.block(x, f"decoder.up.1.block.{block}", 256), f"decoder.up.1.attn.{block}"
            )
        x = self.conv(
            x.repeat_interleave(2, 2).repeat_interleave(2, 3), "decoder.up.1.upsample.conv", 256
        )
        for block in range(2):
            x = self.block(x, f"decoder.up.0.block.{block}", 128)
        return self.conv(self.act(x, "decoder.norm_out"), "decoder.conv_out", 3)


PUBLISHED = dict(resolution=16, multipliers=(1, 2), blocks=1, z_channels=16, code_dim=8)


def test_published_weights_give_the_published_results():
    theirs, learned = Published(), dict(
        codes="uniform", codebooks=1, codebook_size=12, trained=True, transfer="none"
    )
    ours = VQModel(ModelConfig(**PUBLISHED, **learned)).eval()
    ours.codebook()  # the codes kept for evaluation are not those of before
    assert load_taming(ours, None, theirs.state) == []
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z, (features,) = theirs.encode(x), ours.features(x)
        assert features.std() > 0.1 and (features - z).abs().max() < 1e-5
        output, codes = ours(x), theirs.state["quantize.embedding.weight"]
        indices = (z.permute(0, 2, 3, 1)[..., None, :] - codes).square().sum(-1).argmin(-1)
        assert torch.equal(output.indices[:, 0], indices) and len(indices.unique()) > 2
        x_hat = theirs.decode(codes[indices].permute(0, 3, 1, 2))
        assert x_hat.std() > 0.1 and (output.x_hat - x_hat).abs().max() < 1e-5


def test_published_weights_that_do_not_fit_are_named(prior):
    theirs, model, discriminator = (
        Published().state,
        VQModel(ModelConfig(**PUBLISHED), prior),
        Discriminator(),
    )
    shallow, of_two = Discriminator(layers=2).state_dict(), Discriminator(layers=2)
    theirs.update(
        {
            f"loss.discriminator.main.{name.removeprefix('layers.')}": x
            for name, x in shallow.items()
        }
    )
    before = {name: value.clone() for name, value in model.codebook.state_dict().items()}
    left = load_taming(model, discriminator, theirs)
    assert "discriminator" in left  # all of it or none
    assert not torch.equal(discriminator.layers[0].weight, shallow["layers.0.weight"])
    assert "discriminator" not in load_taming(model, of_two, theirs)
    assert all(torch.equal(value, of_two.state_dict()[name]) for name, value in shallow.items())
    assert all(
        torch.equal(value, model.codebook.state_dict()[name]) for name, value in before.items()
    )
    assert (
        torch.equal(model.to_codes.weight, theirs["quant_conv.weight"])
        and "codebook.vectors" in left
    )
    assert not any(
        name.startswith(("encoder", "decoder", "to_codes", "from_codes")) for name in left
    )
    with pytest.raises(
        ValueError,
        match=r"encoder.conv_in.weight.*\(128, 3, 3, 3\).*network wants \(64, 3, 3, 3\)",
    ):
        load_taming(VQModel(ModelConfig(**PUBLISHED, channels=64), prior), None, theirs)
    del theirs["decoder.up.1.attn.1.k.bias"]
    with pytest.raises(ValueError, match="decoder.up.1.attn.1.q.bias.*this network wants"):
        load_taming(model, None, theirs)


# ======== §4.4: the second stage


def transformer(sizes=(7, 5), grid=(3, 4), condition=None, **more):
    condition = condition or Condition("segmentation", 3, grid, 16)
    model = TokenTransformer(sizes, grid, condition, width=16, depth=2, heads=2, **more).eval()
    for parameter in model.parameters():  # nothing may be hidden by a zero
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def sample_by_forward_passes(model, batch, known=None, scale=1.0, generator=None, **choice):
    """sample_tokens without a cache: the whole model for every token."""
    tokens = torch.zeros(batch, len(model.sizes), *model.grid, dtype=torch.int64)
    for n in range(math.prod(model.grid)):
        for i in range(len(model.sizes)):
            logits = model(tokens, known)[i][:, n]
            if scale != 1:
                without = model(tokens)[i][:, n]
                logits = without + scale * (logits - without)
            tokens.flatten(2)[:, i, n] = draw_tokens(logits, generator=generator, **choice)
    return tokens


CHOICES = dict(temperature=0), dict(), dict(top_k=3, temperature=1.3)
DRAWS = [
    (sizes, (3, 4), scale, choice)
    for sizes in ((7,), (7, 5), (7, 7, 5))
    for scale in (1.0, 2.5)
    for choice in CHOICES
]


@pytest.mark.parametrize("sizes, grid, scale, choice", [*DRAWS, ((7, 5), (16, 16), 1.0, {})])
def test_cached_sampling_equals_uncached(sizes, grid, scale, choice):
    model, batch = transformer(sizes, grid), max(1, 48 // math.prod(grid))
    known = torch.rand(batch, 3, *grid)

    def draw(form, known):
        return form(model, batch, known, scale=scale, generator=torch.manual_seed(3), **choice)

    drawn = draw(sample_tokens, known)
    assert torch.equal(drawn, draw(sample_by_forward_passes, known)) and torch.equal(
        drawn, draw(sample_tokens, known)
    )
    if choice.get("temperature") != 0:  # greedily a random network may say one thing always
        assert not torch.equal(drawn, draw(sample_tokens, known.flip(1)))


def test_a_token_is_predicted_from_earlier_ones_only():
    model, tokens, known = (
        transformer(),
        torch.randint(0, 5, (1, 2, 3, 4)),
        torch.rand(1, 3, 3, 4),
    )
    before = model(tokens, known)
    for i, n in ((0, 5), (1, 5), (0, 0), (1, 11)):
        changed = tokens.clone()
        changed.flatten(2)[0, i, n] += 1 if tokens.flatten(2)[0, i, n] < 4 else -1
        for j, (old, new) in enumerate(zip(before, model(changed, known))):
            moved = (old != new).any(dim=-1)[0]
            first = n if j > i else n + 1  # the noun of a position sees its adjective
            assert not moved[:first].any() and moved[first:].all()


def test_tokens_are_drawn_from_their_softmax_or_its_likeliest():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.06, 0.04]]).log().repeat(20_000, 1)

    def counted(**choice):
        drawn, again = (
            draw_tokens(logits, generator=torch.Generator().manual_seed(0), **choice)
            for _ in range(2)
        )
        assert torch.equal(drawn, again)
        return drawn.bincount(minlength=5) / 20_000

    for temperature in (1.0, 0.7, 3.0):
        expected = (logits[0] / temperature).softmax(0)
        torch.testing.assert_close(
            counted(temperature=temperature), expected, atol=0.015, rtol=0
        )
    assert counted(top_k=1).tolist() == counted(temperature=0).tolist() == [1, 0, 0, 0, 0]
    of_four = counted(top_k=4)
    assert of_four[4] == 0 and (of_four[:4] > 0.03).all()


@pytest.mark.parametrize(
    "kind, known",
    [("class", torch.tensor([2, -1, 2])), ("segmentation", torch.full((3, 3, 4, 4), 0.3))],
)
def test_conditions_are_those_of_each_image(kind, known):
    condition = Condition(kind, 3, (4, 4), 8)
    torch.nn.init.normal_(condition.absent)
    features = condition(known, 3, torch.tensor([False, False, True]))
    assert (features[2] == condition.absent).all() and not (
        features[0] == condition.absent
    ).any()
    assert (features[1] == condition.absent).all() == (
        kind == "class"
    )  # an unknown class is an absent one
    assert (condition(None, 3) == condition.absent).all()


def test_a_label_map_conditions_each_position_by_its_surroundings():
    condition, shares = Condition("segmentation", 3, (4, 4), 8), torch.zeros(1, 3, 4, 4)
    one = shares.clone()
    one[0, 1, 0, 0] = 1
    moved = (condition.embedding(shares) != condition.embedding(one)).any(1)[0]
    assert (
        moved[:3, :3].all() and not moved[3].any() and not moved[:, 3].any()
    )  # aligned, with what is around
    assert (
        (condition(shares, 1) != condition(one, 1)).any(-1).view(4, 4) == moved
    ).all()  # nothing more at the start
    torch.nn.init.normal_(condition.block.project.weight)
    assert (
        (condition(shares, 1) != condition(one, 1)).any(-1).all()
    )  # later every position hears of it


def test_given_tokens_stay():
    model, given = transformer(), torch.full((2, 2, 3, 4), -1)
    given[:, :, 1] = torch.randint(0, 5, (2, 2, 4))
    given[0, 0, 2, 3] = 6
    drawn = sample_tokens(
        model, 2, torch.rand(2, 3, 3, 4), given, generator=torch.manual_seed(0)
    )
    assert torch.equal(drawn[given >= 0], given[given >= 0]) and drawn.min() >= 0


def train(model, batch, steps):
    """The last losses of so many steps of Adam on batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        losses = model.loss(*batch())
        optimizer.zero_grad(), sum(losses).backward(), optimizer.step()
    return losses


def test_a_noun_is_predicted_given_its_adjective():
    """Adjectives are uniform and give the noun, so a position has log₂ 8 = 3 bits.

    Independent heads would need twice that.
    """
    none = Condition("none", 0, (2, 2), 32)
    model = TokenTransformer((8, 8), (2, 2), none, width=32, depth=1, heads=2)

    def batch():
        adjectives = torch.randint(0, 8, (64, 1, 2, 2))
        return (torch.cat([adjectives, (3 * adjectives + 1) % 8], dim=1),)

    bits = sum(train(model, batch, 150)).item() / math.log(2)
    assert bits < 3.2


def test_modulated_blocks_start_as_the_identity():
    x = torch.randn(2, 5, 16)
    block, plain = Block(16, 2, modulated=True), Block(16, 2)
    assert torch.equal(block(x, torch.randn(2, 1, 16)), x)
    block.load_state_dict(plain.state_dict(), strict=False)
    block.modulation[1].bias.data.view(6, 16)[[2, 5]] = 1  # open gates
    torch.testing.assert_close(block(x, torch.randn(2, 1, 16)), plain(x))


def test_diffusion_finds_what_the_noise_hides_and_keeps_what_is_given():
    model = Denoiser(
        6, (3, 4), Condition("none", 0, (3, 4), 16), width=16, depth=1, heads=2
    ).eval()
    model.mean.fill_(0.5), model.std.fill_(2.0)
    answer = torch.randn(2, 6, 3, 4)

    def noise(z_t, t, condition):  # that which leads to the answer
        t, sought = (t * math.pi / 2)[:, None, None, None], answer * (
            1 + condition[:, :, :1, None]
        )
        return (z_t - t.cos() * (sought - model.mean) / model.std) / t.sin()

    model.forward = noise
    assert torch.allclose(
        sample_features(model, 2, generator=torch.manual_seed(0)), answer, atol=1e-4
    )
    assert model.loss(answer)[0] < 1e-6
    given, mask = torch.randn(2, 6, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    mask[:, :, 0] = True
    z = sample_features(model, 2, None, given, mask, generator=torch.manual_seed(0))
    assert torch.equal(z[:, :, 0], given[:, :, 0]) and torch.allclose(
        z[:, :, 1:], answer[:, :, 1:], atol=1e-4
    )
    model.condition.forward = lambda known, batch: torch.full(
        (batch, 1, 16), 0.0 if known is None else 1.0
    )
    guided = sample_features(model, 2, answer, scale=1.5, generator=torch.manual_seed(0))
    assert torch.allclose(
        guided, 2.5 * answer, atol=1e-3
    )  # one answer without the condition, two with it


def test_the_denoiser_learns():
    model = Denoiser(4, (2, 2), Condition("class", 2, (2, 2), 32), width=32, depth=2, heads=2)
    centres = torch.randn(2, 4, 2, 2)

    def batch():
        labels = torch.randint(0, 2, (64,))
        return centres[labels] + 0.05 * torch.randn(64, 4, 2, 2), labels

    train(model, batch, 300)
    labels = torch.tensor([0, 1, 0, 1])
    drawn = sample_features(model.eval(), 4, labels, generator=torch.manual_seed(0))
    assert (drawn - centres[labels]).abs().mean() < 0.5 * (
        drawn - centres[1 - labels]
    ).abs().mean()
    assert not torch.equal(
        drawn, sample_features(model, 4, labels, scale=3.0, generator=torch.manual_seed(0))
    )
