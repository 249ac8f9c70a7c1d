"""Shapes, gradients and exactness of the networks."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import vqct
from train import METHODS, RECIPES
from vqct import (
    LPIPS,
    AttentionBlock,
    Block,
    ClusteredQuantizer,
    CodeEmbedding,
    Codebook,
    CodebookTransfer,
    Condition,
    Decoder,
    Denoiser,
    Discriminator,
    Downsample,
    Encoder,
    GraphConvolution,
    GumbelQuantizer,
    ModelConfig,
    NormalizedAdjacency,
    RegularizedQuantizer,
    ResidualBlock,
    TokenTransformer,
    Upsample,
    VectorQuantizer,
    VQModel,
    adaptive_weight,
    draw,
    draw_tokens,
    hinge_loss,
    load_taming,
    look_up,
    nearest_code,
    sample_features,
    sample_tokens,
)

# ---------------------------------------------------------------------------------------------
# Eq. 1


def distances(z, codebook):
    return (z.double()[:, None] - codebook.double()[None]).square().sum(-1)


@pytest.mark.parametrize("rows, codes, dim", [(1, 1, 1), (1, 5, 3), (5, 1, 3), (13, 17, 1), (101, 53, 7), (64, 64, 8), (97, 211, 16)])
@pytest.mark.parametrize("row_chunk, code_chunk", [(None, None), (1, 1), (7, 11), (64, 16), (1000, 3)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_nearest_code_is_the_nearest(rows, codes, dim, row_chunk, code_chunk, offset):
    z, codebook = torch.randn(rows, dim) + offset, torch.randn(codes, dim) + offset
    indices = nearest_code(z, codebook, row_chunk, code_chunk)
    assert indices.shape == (rows,) and indices.dtype == torch.int64
    exact = distances(z, codebook)
    chosen = exact.gather(1, indices[:, None])[:, 0]
    assert (chosen <= exact.min(1).values * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("copies, code_chunk", [(2, 8), (50, 64), (56, None)])
def test_equal_codes_give_the_lowest_index(copies, code_chunk):
    codebook = torch.randn(37, 24)
    z = torch.randn(301, 24)
    first = nearest_code(z, codebook)
    assert torch.equal(nearest_code(z, codebook.repeat(copies, 1), code_chunk=code_chunk), first)
    assert torch.equal(nearest_code(z[:1], codebook.repeat(copies, 1), code_chunk=code_chunk), first[:1])


def test_equal_codes_are_told_from_all_others():
    """The hash behind ties: no two different codes meet, also where codes differ in few bits."""
    for codebook in (torch.randn(5000, 3), torch.randint(-4, 5, (5000, 4)).float(), torch.randint(0, 2, (4096, 12)).double()):
        rows = [tuple(row) for row in codebook.tolist()]
        lowest = {}
        for index, row in enumerate(rows):
            lowest.setdefault(row, index)
        assert vqct._first_of_equal(codebook).tolist() == [lowest[row] for row in rows]
    assert vqct._first_of_equal(torch.tensor([[0.0], [-0.0], [1.0]])).tolist() == [0, 0, 2]


def test_equally_near_codes_give_the_lowest_index():
    codebook = torch.tensor([[3.0], [1.0], [-1.0], [1.0], [-3.0]])
    assert nearest_code(torch.tensor([[0.0], [2.0], [-2.0], [1.0]]), codebook).tolist() == [1, 0, 2, 1]
    grid = torch.cartesian_prod(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0))
    between = grid + 0.5
    expected = distances(between, grid).min(1).indices
    for code_chunk in (None, 1, 5):
        assert torch.equal(nearest_code(between, grid, code_chunk=code_chunk), expected)


@pytest.mark.parametrize(
    "rows, codes, row_chunk, code_chunk", [(50, 1, 7, 3), (200, 70, 64, 64), (130, 300, 50, 130), (64, 64, 8192, 8192)]
)
def test_both_searches_find_the_same(rows, codes, row_chunk, code_chunk):
    """The one that GPUs take, and the one that CPUs take."""
    z, codebook = torch.randn(rows, 5, dtype=torch.float64), torch.randn(codes, 5, dtype=torch.float64)
    data = z, codebook, 0.5 * codebook.square().sum(1), row_chunk, code_chunk
    found = vqct._search_tiles(*data)
    assert torch.equal(found, vqct._search_blocks(*data)) and torch.equal(found, torch.cdist(z, codebook).argmin(1))


def test_a_remote_code_does_not_confuse_the_others():
    codebook = torch.cat([100 + 0.01 * torch.randn(300, 4), torch.full((1, 4), -1000.0)])
    z = codebook[:300] + 0.002 * torch.randn(300, 4)
    exact = distances(z, codebook)
    chosen = exact.gather(1, nearest_code(z, codebook)[:, None])[:, 0]
    assert (chosen <= exact.min(1).values * (1 + 1e-3) + 1e-9).all()


def test_nearest_code_in_low_and_high_precision():
    z, codebook = torch.randn(200, 16), torch.randn(90, 16)
    low = nearest_code(z.bfloat16(), codebook.bfloat16())
    assert torch.equal(low, distances(z.bfloat16(), codebook.bfloat16()).min(1).indices)
    assert torch.equal(nearest_code(z.double(), codebook.double()), distances(z, codebook).min(1).indices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(z, codebook), nearest_code(z.double(), codebook.double()))


def test_nearest_code_takes_no_rows_and_refuses_no_codes():
    assert nearest_code(torch.randn(0, 4), torch.randn(3, 4)).shape == (0,)
    for z, codebook in (
        (torch.randn(2, 4), torch.randn(0, 4)),
        (torch.randn(2, 4), torch.randn(3, 5)),
        (torch.randn(2, 2, 4), torch.randn(3, 4)),
    ):
        with pytest.raises(ValueError, match=r"\(N, D\) and \(K, D\)"):
            nearest_code(z, codebook)


def test_nearest_code_never_holds_the_distance_matrix():
    z, codebook = torch.randn(4096, 8), torch.randn(4096, 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        nearest_code(z, codebook)
    assert 4096 * 8 <= largest <= 4096 * 4096 // 8


# ---------------------------------------------------------------------------------------------
# Eq. 2


def test_quantizer_computes_equation_2():
    z, codebook = torch.randn(2, 3, 4, 5), torch.randn(6, 3)
    z_q, indices, loss = VectorQuantizer(beta=0.4)(z, codebook)
    assert z_q.shape == z.shape and indices.shape == (2, 1, 4, 5)
    torch.testing.assert_close(z_q, codebook[indices[:, 0]].permute(0, 3, 1, 2))
    torch.testing.assert_close(loss, 1.4 * F.mse_loss(codebook[indices[:, 0]].permute(0, 3, 1, 2), z))


def test_quantizer_gradients_go_where_equation_2_says():
    z, codebook = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    z_q, indices, loss = VectorQuantizer(beta=0.25)(z, codebook)
    loss.backward()
    residual = (z - codebook[indices[:, 0]].permute(0, 3, 1, 2)).detach()
    torch.testing.assert_close(z.grad, 0.25 * 2 * residual / z.numel())  # β on the commitment term
    expected = torch.zeros_like(codebook).index_add(0, indices.flatten(), -2 * residual.permute(0, 2, 3, 1).reshape(-1, 3) / z.numel())
    torch.testing.assert_close(codebook.grad, expected)
    unused = torch.ones(40, dtype=torch.bool)
    unused[indices.flatten()] = False
    assert unused.any() and (codebook.grad[unused] == 0).all()  # a plain codebook moves only what was chosen
    z.grad = None
    weight = torch.randn_like(z)
    VectorQuantizer()(z, codebook.detach())[0].backward(weight)
    torch.testing.assert_close(z.grad, weight)  # straight through


def test_quantizer_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        z_q, _, loss = VectorQuantizer()(torch.randn(1, 4, 2, 2, dtype=torch.bfloat16), torch.randn(5, 4))
    assert z_q.dtype == loss.dtype == torch.float32


def test_beta_weighs_the_term_it_is_told_to():
    z, codebook = torch.randn(1, 3, 2, 2, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    gradients = {}
    for beta_on in ("commitment", "codebook"):
        _, _, loss = VectorQuantizer(0.25, beta_on)(z, codebook)
        gradients[beta_on] = torch.autograd.grad(loss, (z, codebook))
    torch.testing.assert_close(gradients["codebook"][0], 4 * gradients["commitment"][0])
    torch.testing.assert_close(gradients["codebook"][1], 0.25 * gradients["commitment"][1])


def test_two_neighbours_are_averaged():
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    z = torch.tensor([[0.1, 0.0], [3.0, 0.1]]).T.view(1, 2, 1, 2)
    quantizer = VectorQuantizer(neighbours=2).eval()
    z_q, indices, _ = quantizer(z, codebook)
    assert indices.shape == (1, 2, 1, 2) and indices[0, :, 0, 0].tolist() == [0, 2] and indices[0, :, 0, 1].tolist() == [1, 2]
    assert z_q[0, :, 0, 0].tolist() == [0.5, 0.5] and torch.equal(z_q, look_up(indices, codebook))


# ---------------------------------------------------------------------------------------------
# The other quantizers


def test_gumbel_is_hard_forward_and_soft_backward():
    """The straight-through gradient of the hard weights is that of the soft ones under the same noise."""
    z, codebook = torch.randn(2, 4, 3, 3), torch.randn(7, 4)
    gradients = []
    for straight_through in (True, False):
        torch.manual_seed(1)
        quantizer = GumbelQuantizer(4, 7, kl_weight=0.0, straight_through=straight_through)
        torch.manual_seed(2)
        z_q, indices, loss = quantizer(z, codebook)
        (z_q * torch.linspace(-1, 1, z_q.numel()).view_as(z_q)).sum().backward()
        gradients.append(quantizer.to_logits.weight.grad)
        to_a_code = torch.cdist(z_q.movedim(1, -1).reshape(-1, 4), codebook).min(1).values
        assert to_a_code.max() < 1e-5 if straight_through else to_a_code.max() > 0.1
        assert torch.equal(indices, quantizer.indices(z, codebook))  # the likeliest, whatever was drawn
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0 and loss == 0


def test_gumbel_is_deterministic_in_evaluation_and_sharp_when_cold():
    quantizer, z, codebook = GumbelQuantizer(4, 7, straight_through=False), torch.randn(2, 4, 3, 3), torch.randn(7, 4)
    quantizer.temperature = 1e-6
    z_q = quantizer(z, codebook)[0]
    assert torch.cdist(z_q.movedim(1, -1).reshape(-1, 4), codebook).min(1).values.max() < 1e-2  # soft weights near one
    quantizer.eval()
    z_q, indices, _ = quantizer(z, codebook)
    assert torch.equal(indices, quantizer.indices(z, codebook)) and torch.equal(z_q, look_up(indices, codebook))
    assert torch.equal(indices, quantizer.to_logits(z).argmax(1, keepdim=True))


def test_gumbel_divergence_is_zero_at_uniform_and_log_k_at_one_code():
    quantizer = GumbelQuantizer(4, 8, kl_weight=1.0)
    nn.init.zeros_(quantizer.to_logits.weight), nn.init.zeros_(quantizer.to_logits.bias)
    assert quantizer(torch.randn(1, 4, 2, 2), torch.randn(8, 4))[2].item() == pytest.approx(0, abs=1e-6)
    quantizer.to_logits.bias.data[3] = 50.0
    assert quantizer(torch.randn(1, 4, 2, 2), torch.randn(8, 4))[2].item() == pytest.approx(math.log(8), rel=1e-5)


def test_cvq_moves_each_code_by_its_decay_toward_an_anchor():
    """e_k ← e_k + α_k (ẑ_k − e_k), α_k = exp(−10 K N_k / (1 − γ) − 1e-3); all features equal, so every anchor is known."""
    codebook = nn.Parameter(torch.tensor([[0.0, 0.0], [0.9, 1.1], [5.0, -5.0], [-3.0, 4.0]]))
    before, quantizer = codebook.detach().clone(), ClusteredQuantizer(4, decay=0.9)
    z = torch.ones(1, 2, 3, 3)
    quantizer(z, codebook)
    usage = torch.tensor([0.0, 0.1, 0.0, 0.0])  # code 1 is nearest to all: (1 − γ) · 1
    alpha = torch.exp(-10 * 4 * usage / 0.1 - 1e-3)
    torch.testing.assert_close(quantizer.usage, usage)
    torch.testing.assert_close(codebook.detach(), before + alpha[:, None] * (torch.ones(2) - before))
    assert (codebook[1] - before[1]).abs().max() < 1e-6 and (codebook[2] - 1).abs().max() < 0.01
    moved = codebook.detach().clone()
    quantizer.eval()(z, codebook)
    assert torch.equal(codebook.detach(), moved)  # evaluation writes nothing


def test_cvq_writes_to_the_codebook_it_was_given_and_its_gradient_is_equation_2s():
    codebook = Codebook(torch.randn(9, 3), (4, 5), trained=True)
    before, z = codebook.vectors.detach().clone(), torch.randn(2, 3, 2, 2)
    codes = codebook()
    _, _, loss = ClusteredQuantizer(5, contrastive_weight=0.1)(z, codes[1])
    loss.backward()
    assert torch.equal(codebook.vectors.detach()[:4], before[:4]) and not torch.equal(codebook.vectors.detach()[4:], before[4:])
    old = before[4:].clone().requires_grad_()
    _, indices, expected = VectorQuantizer()(z, old)
    features = z.movedim(1, -1).flatten(0, -2)
    (expected + 0.1 * ClusteredQuantizer.contrast(features, old)).backward()
    torch.testing.assert_close(codebook.vectors.grad[4:], old.grad)


def test_cvq_draws_nearer_features_more_often():
    features = torch.tensor([[0.0], [1.0], [3.0]])
    codebook = torch.zeros(4000, 1)
    quantizer = ClusteredQuantizer(4000)
    quantizer.re_anchor(features, torch.full((3,), 3999), codebook)  # all codes but the last unused
    anchors = codebook[:3999, 0] / math.exp(-1e-3)  # e = 0, so the code is α ẑ
    expected = torch.softmax(-features.flatten().square(), 0)
    for value, share in zip((0.0, 1.0), expected):
        assert ((anchors - value).abs() < 1e-3).float().mean().item() == pytest.approx(share.item(), abs=0.03)


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, -2.0]])
    shares = torch.bincount(draw(logits.expand(20000, 3)), minlength=3) / 20000
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=0.015, rtol=0)


def test_cvq_contrast_by_hand():
    """One code, four features: the mean of the 4/1 nearest is positive, the far half negative."""
    features, codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), torch.tensor([[2.0, 0.0]])
    logits = torch.tensor([0.0, 0.0, -1.0]) / 0.07  # cosines 1, 0, 0, −1
    assert ClusteredQuantizer.contrast(features, codebook).item() == pytest.approx(logits.logsumexp(0).item() - logits[0].item(), rel=1e-5)


def test_regvq_tends_to_uniform_under_its_prior_term_alone():
    z, codebook = nn.Parameter(torch.randn(64, 2) * 0.1 + 1), nn.Parameter(torch.randn(6, 2) * 2)
    optimizer, divergences = torch.optim.Adam([z, codebook], lr=0.05), []
    for _ in range(300):
        divergences.append(RegularizedQuantizer.divergence_from_uniform(-torch.cdist(z, codebook).square()))
        optimizer.zero_grad(), divergences[-1].backward(), optimizer.step()
    assert divergences[0] > 0.3 and divergences[-1] < 1e-3


def test_regvq_without_its_terms_is_vector_quantization():
    z, codebook = torch.randn(2, 3, 4, 4), torch.randn(9, 3)
    plain, regularized = VectorQuantizer()(z, codebook), RegularizedQuantizer(0.0, 0.0, 0.0)(z, codebook)
    assert all(torch.equal(a, b) for a, b in zip(plain, regularized))
    in_evaluation = RegularizedQuantizer(1.0, 1.0, 1.0).eval()(z, codebook)
    assert torch.equal(in_evaluation[1], plain[1]) and torch.equal(in_evaluation[0], look_up(plain[1], codebook))


def test_regvq_draws_masked_positions_from_their_distribution():
    z, codebook = torch.zeros(1, 1, 100, 100), torch.tensor([[0.0], [1.0], [-1.5]])
    quantizer = RegularizedQuantizer(mask_ratio=0.5)
    quantizer.temperature = 2.0
    z_q, indices, _ = quantizer(z, codebook)
    assert (indices == 0).all()  # the nearest, whatever was drawn
    drawn = torch.bincount(torch.cdist(z_q.reshape(-1, 1), codebook).argmin(1), minlength=3) / 1e4
    expected = 0.5 * torch.softmax(-codebook.flatten().square() / 2, 0) + 0.5 * torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(drawn, expected, atol=0.03, rtol=0)


def test_regvq_adds_its_terms_by_their_weights():
    z, codebook = torch.randn(2, 3, 4, 4), torch.randn(9, 3)

    def loss(*weights):
        torch.manual_seed(3)
        return RegularizedQuantizer(*weights)(z, codebook)[2]

    features = z.movedim(1, -1).flatten(0, -2)
    nearest = nearest_code(features, codebook)
    divergence = RegularizedQuantizer.divergence_from_uniform(-torch.cdist(features, codebook).square())
    contrast = RegularizedQuantizer.contrast(features, codebook, nearest, nearest)
    torch.testing.assert_close(loss(0.5, 0.0, 0.25) - loss(0.0, 0.0, 0.0), 0.5 * divergence + 0.25 * contrast)
    assert divergence > 0 and contrast > 0 and loss(0.0, 1.0, 0.0) > loss(0.0, 0.0, 0.0)  # drawn codes are farther


def test_regvq_contrast_pulls_a_far_draw_less():
    features = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.2], [0.3, 0.0, 1.0]], requires_grad=True)
    codebook = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.1, 0.9, 0.1], [0.6, 0.6, 0.6]])
    nearest, pulls = torch.tensor([0, 1, 2]), {}
    for drawn in ([0, 1, 2], [0, 3, 4]):  # the third far from its nearest, the second close to it
        drawn = torch.tensor(drawn)
        noise = (codebook[drawn] - codebook[nearest]).square().sum(1)
        weight = torch.exp(-noise / noise[noise > 0].mean()) if noise.any() else torch.ones(3)
        cosine = (F.normalize(features, dim=1) @ F.normalize(codebook[drawn], dim=1).T / 0.07).detach().requires_grad_()
        expected = F.cross_entropy(cosine * (1 - torch.eye(3)) + torch.diag(cosine.diag() * weight), torch.arange(3))
        loss = RegularizedQuantizer.contrast(features, codebook, drawn, nearest)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        pulls[drawn.tolist()[2]] = weight
    assert pulls[2].tolist() == [1, 1, 1] and pulls[4][0] == 1 > pulls[4][1] > pulls[4][2]


# ---------------------------------------------------------------------------------------------
# Eq. 3

EDGES = torch.tensor([(0, 4), (0, 5), (1, 5), (2, 6)])  # nodes 3 and 7 stand alone


def dense_adjacency(edges, nodes):
    a = torch.eye(nodes, dtype=torch.float64)
    a[edges[:, 0], edges[:, 1]] = a[edges[:, 1], edges[:, 0]] = 1
    scale = torch.diag(a.sum(1) ** -0.5)
    return scale @ a @ scale


@pytest.mark.parametrize("bags", [("cpu",), ()])
def test_adjacency_is_the_normalized_one(bags, monkeypatch):
    monkeypatch.setattr(NormalizedAdjacency, "WITH_WEIGHTED_BAGS", bags)
    adjacency = NormalizedAdjacency(torch.cat([EDGES, EDGES[:1], EDGES[:1].flip(1)]), 8)  # repeats count once
    nodes = torch.randn(8, 3, requires_grad=True)
    product = adjacency(nodes)
    dense = dense_adjacency(EDGES, 8).float()
    torch.testing.assert_close(product, dense @ nodes)
    weight = torch.randn(8, 3)
    torch.testing.assert_close(torch.autograd.grad(product, nodes, weight)[0], dense.T @ weight)


def test_weighted_adjacency_counts_each_pair():
    weights = torch.tensor([3.0, 1.0, 2.0])
    edges, dense = torch.tensor([(0, 2), (1, 2), (3, 1)]), torch.eye(4, dtype=torch.float64)
    for (a, b), weight in zip(edges.tolist(), weights):
        dense[a, b] = dense[b, a] = weight
    scale = dense.sum(1).rsqrt()
    expected = scale[:, None] * dense * scale
    torch.testing.assert_close(NormalizedAdjacency(edges, 4, weights)(torch.eye(4)), expected.float())
    binary, ones = NormalizedAdjacency(edges, 4), NormalizedAdjacency(edges, 4, torch.ones(3))
    assert torch.equal(binary.value, ones.value)


def test_adjacency_gradients_to_second_order():
    adjacency, nodes = NormalizedAdjacency(EDGES, 8), torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(adjacency, (nodes,)) and torch.autograd.gradgradcheck(lambda x: adjacency(x).pow(3), (nodes,))


def test_adjacency_refuses_edges_that_cannot_be():
    for edges in ([(0, 8)], [(-1, 2)], [(3, 3)]):
        with pytest.raises(ValueError, match="two different nodes"):
            NormalizedAdjacency(torch.tensor(edges), 8)
    torch.testing.assert_close(NormalizedAdjacency(torch.empty(0, 2), 3)(torch.ones(3, 2)), torch.ones(3, 2))


@pytest.mark.parametrize("widths", [(5, 3), (3, 5)])
@pytest.mark.parametrize("constant", [True, False])
def test_graph_convolution_is_the_dense_formula(widths, constant):
    layer, adjacency, nodes = GraphConvolution(*widths), NormalizedAdjacency(EDGES, 8), torch.randn(8, widths[0])
    found, expected = (
        form(nodes.requires_grad_(not constant))
        for form in (lambda nodes: layer(nodes, adjacency), lambda nodes: dense_adjacency(EDGES, 8).float() @ nodes @ layer.weight)
    )
    torch.testing.assert_close(found, expected)
    inputs = [layer.weight] if constant else [layer.weight, nodes]
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected)))


def test_transfer_network_is_three_convolutions_each_with_relu():
    transfer, nodes = CodebookTransfer((5, 7, 6, 4), NormalizedAdjacency(EDGES, 8)), torch.randn(8, 5)
    expected, dense = nodes, dense_adjacency(EDGES, 8).float()
    for layer in transfer.layers:
        expected = F.relu(dense @ expected @ layer.weight)
    assert len(transfer.layers) == 3 and sum(p.numel() for p in transfer.parameters()) == 5 * 7 + 7 * 6 + 6 * 4
    torch.testing.assert_close(transfer(nodes), expected)


def test_one_selected_code_moves_the_others_through_the_transfer_network():
    """§3.4: with generated codes every code moves; with learned codes only the selected one."""

    def moves(codebook):
        before = [codes.detach().clone() for codes in codebook()]
        optimizer = torch.optim.SGD([p for p in codebook.parameters()], lr=0.1)
        target = (before[0][0] + 0.01)[None, :, None, None]  # nearest to code 0 of the first codebook
        _, indices, loss = VectorQuantizer()(target, codebook()[0])
        loss.backward()
        optimizer.step()
        assert indices.unique().tolist() == [0]
        return [(after - old).norm(dim=1) for after, old in zip(codebook(), before)], codebook

    vectors = torch.randn(8, 5)
    adjective_moves, noun_moves = moves(
        Codebook(vectors, (4, 4), transfer=CodebookTransfer((5, 32, 32, 6), NormalizedAdjacency(EDGES, 8)))
    )[0]
    assert (adjective_moves > 0).all() and (noun_moves > 0).all()  # nodes 3 and 7 too, by the shared weights
    adjective_moves, noun_moves = moves(Codebook(vectors, (4, 4), trained=True))[0]
    assert adjective_moves[0] > 0 and (adjective_moves[1:] == 0).all() and (noun_moves == 0).all()


def test_one_code_moves_its_neighbourhood_most():
    """A step on one code moves codes within two hops more than codes beyond six, over 20 seeds, on a ring of words."""
    count = 40
    edges = torch.stack([torch.arange(count), (torch.arange(count) + 1) % count], 1)
    hops = torch.minimum(torch.arange(count), count - torch.arange(count))  # from node 0
    near, far = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        codebook = Codebook(torch.randn(count, 16), (count,), transfer=CodebookTransfer((16, 32, 32, 8), NormalizedAdjacency(edges, count)))
        (codes,) = codebook()
        before = codes.detach().clone()
        (codes[0] - codes[0].detach() - 0.1).square().sum().backward()  # only node 0 is selected
        torch.optim.SGD(codebook.parameters(), lr=0.1).step()
        move = (codebook()[0] - before).norm(dim=1)
        near.append(move[(hops > 0) & (hops <= 2)].mean().item())
        far.append(move[hops > 6].mean().item())
    assert all(value > 0 for value in far)  # by the shared weights, out of reach of three convolutions
    assert sum(near) > 1.2 * sum(far) and sum(n > f for n, f in zip(near, far)) >= 16


def test_transfer_options_are_those_of_the_authors_code():
    nodes, adjacency = torch.randn(8, 5), NormalizedAdjacency(EDGES, 8)
    transfer = CodebookTransfer((5, 64, 4), adjacency, last_relu=False, dropout=0.5)
    first, last = (layer.weight for layer in transfer.layers)
    plain = adjacency(F.relu(adjacency(nodes @ first)) @ last)
    torch.testing.assert_close(transfer.eval()(nodes), plain)
    assert plain.min() < 0 and CodebookTransfer((5, 64, 4), adjacency)(nodes).min() == 0
    kept = transfer.train().dropout(torch.ones(10000))
    assert sorted(kept.unique().tolist()) == [0.0, 2.0] and not torch.allclose(transfer(nodes), plain)


# ---------------------------------------------------------------------------------------------
# Codebooks and their cache


class CountingTransfer(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_codebook_is_computed_once_in_evaluation_mode():
    CountingTransfer.calls = 0
    codebook = Codebook(torch.randn(5, 3), (2, 3), transfer=CountingTransfer(3, 4)).eval()
    first = codebook()
    assert [tuple(codes.shape) for codes in first] == [(2, 4), (3, 4)]
    assert codebook() is first and CountingTransfer.calls == 1
    nn.init.ones_(codebook.transfer.weight)
    codebook.load_state_dict(codebook.state_dict())
    assert not torch.equal(codebook()[0], first[0]) and CountingTransfer.calls == 2
    codebook.train()
    codebook(), codebook()
    assert CountingTransfer.calls == 4
    assert codebook.eval().double()()[0].dtype == torch.float64
    nn.Sequential(codebook).load_state_dict(nn.Sequential(codebook).state_dict())  # as part of a model, too
    calls = CountingTransfer.calls
    codebook()
    assert CountingTransfer.calls == calls + 1


def test_codebook_sizes_must_add_up():
    with pytest.raises(ValueError, match="5 vectors cannot make codebooks"):
        Codebook(torch.randn(5, 3), (2, 2))


# ---------------------------------------------------------------------------------------------
# Networks


def test_blocks_keep_or_change_shapes():
    x = torch.randn(2, 8, 12, 10)
    assert ResidualBlock(8, 8)(x).shape == x.shape and ResidualBlock(8, 20)(x).shape == (2, 20, 12, 10)
    assert AttentionBlock(8)(x).shape == x.shape
    assert Downsample(8)(x).shape == (2, 8, 6, 5) and Upsample(8)(x).shape == (2, 8, 24, 20)


def test_attention_is_the_explicit_formula():
    block, x = AttentionBlock(8), torch.randn(2, 8, 3, 5)
    query, key, value = block.query_key_value(block.norm(x)).flatten(2).chunk(3, dim=1)
    weight = (query.mT @ key / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(block(x), x + block.project((value @ weight.mT).view_as(x)))


def test_encoder_and_decoder_at_f16():
    encoder, decoder = Encoder(8, (1, 1, 2, 2, 4), 2, 6), Decoder(8, (1, 1, 2, 2, 4), 2, 6)
    z = encoder(torch.randn(2, 3, 64, 64))
    assert z.shape == (2, 6, 4, 4) and decoder(z).shape == (2, 3, 64, 64)
    assert (
        sum(isinstance(m, AttentionBlock) for m in encoder.modules()) == 3
        and sum(isinstance(m, AttentionBlock) for m in decoder.modules()) == 4
    )
    assert decoder.to_image.weight.shape == (3, 8, 3, 3)


def test_the_paper_network_has_vqgans_size():
    with torch.device("meta"):
        encoder, decoder = Encoder(), Decoder()
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 29.3
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == 42.4


def test_discriminator_judges_patches():
    discriminator = Discriminator()
    assert discriminator(torch.randn(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert round(sum(p.numel() for p in discriminator.parameters()) / 1e6, 2) == 2.77


def test_hinge_loss_by_hand():
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    last, hidden, x = nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6)
    x_hat = last(hidden)
    reconstruction, adversarial = F.mse_loss(x_hat, x), x_hat.tanh().mean()
    norm = lambda loss: torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
    expected = norm(reconstruction) / (norm(adversarial) + 1e-4)
    gradients = [torch.autograd.grad(loss, x_hat, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    torch.testing.assert_close(adaptive_weight(x_hat, last.weight, *gradients), expected)
    assert adaptive_weight(x_hat, last.weight, gradients[0] * 1e9, gradients[1] * 0).item() == 1e4


@pytest.mark.parametrize("trunk, taps", [("vgg", 5), ("squeeze", 7)])
def test_lpips_is_zero_on_equal_images_and_differentiable(trunk, taps):
    lpips = LPIPS(trunk).train()
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    distance = lpips(x, y)
    assert distance.shape == (2,) and (distance > 0).all() and len(lpips.heads) == taps
    assert (lpips(x, x).abs() < 1e-9).all()
    distance.sum().backward()
    assert y.grad.abs().sum() > 0 and not any(p.requires_grad for p in lpips.parameters()) and not lpips.training


def test_lpips_is_its_formula():
    """By hand on the first tap: unit features, squared difference, head, mean over positions."""
    lpips = LPIPS("squeeze")
    for head in lpips.heads[1:]:
        nn.init.zeros_(head.weight)
    nn.init.uniform_(lpips.heads[0].weight)
    x, y = torch.rand(1, 3, 32, 32) * 2 - 1, torch.rand(1, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    features = [F.relu(lpips.features[0]((image - shift) / scale)) for image in (x, y)]
    unit = [f / f.square().sum(1, keepdim=True).sqrt() for f in features]
    expected = ((unit[0] - unit[1]).square() * lpips.heads[0].weight.view(1, -1, 1, 1)).sum(1).mean()
    torch.testing.assert_close(lpips(x, y)[0], expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# The model


def build(method, prior, small, recipe="paper"):
    choices = {**RECIPES[recipe], **METHODS[method], **small}
    return VQModel(ModelConfig(**{k: v for k, v in choices.items() if k in ModelConfig.__dataclass_fields__}), prior)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_decoding_indices_gives_the_forward_pass(method, recipe, prior, small):
    model, x = build(method, prior, small, recipe).eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        output, indices = model(x), model.encode(x)
        assert torch.equal(output.indices, indices) and torch.equal(model.decode(indices), output.x_hat)
    tokens = len(model.codebook.sizes) + (recipe == "official" and len(model.codebook.sizes) == 2)
    assert output.x_hat.shape == x.shape and indices.shape == (3, tokens, 8, 8) and output.quantizer_loss.shape == ()
    for index, size in zip(model.by_codebook(indices), model.codebook.sizes):
        assert 0 <= index.min() and index.max() < size


WORDS, LEARNED = [(7, 4), (9, 4)], [(1024, 8)]
TOLD_APART = {  # shapes of the codes, trained tensors of the codebook, layers with a graph, quantizer, same codes from another prior
    "vqct": (WORDS, 3, 3, VectorQuantizer, False),
    "vqct-vqvae": (WORDS, 3, 3, VectorQuantizer, False),
    "vqvae": (LEARNED, 1, 0, VectorQuantizer, True),
    "vqgan": (LEARNED, 1, 0, VectorQuantizer, True),
    "gumbel": (LEARNED, 1, 0, GumbelQuantizer, True),
    "cvq": (LEARNED, 1, 0, ClusteredQuantizer, True),
    "regvq": (LEARNED, 1, 0, RegularizedQuantizer, True),
    "random-mlp": (WORDS, 3, 0, VectorQuantizer, True),
    "frozen": ([(16, 12)], 0, 0, VectorQuantizer, False),
    "finetune": ([(16, 12)], 1, 0, VectorQuantizer, False),
    "single-mlp": ([(16, 8)], 3, 0, VectorQuantizer, False),
    "single-gcn": ([(16, 8)], 3, 3, VectorQuantizer, False),
    "multi-mlp": (WORDS, 3, 0, VectorQuantizer, False),
    "matched": (WORDS, 1, 0, VectorQuantizer, True),
    "simvq": (WORDS, 1, 0, VectorQuantizer, True),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_told_apart_by_what_they_are(method, prior, small):
    shapes, trained, graph_layers, quantizer, deaf = TOLD_APART[method]
    torch.manual_seed(0)
    model = build(method, prior, small)
    assert [tuple(codes.shape) for codes in model.codebook()] == shapes
    assert len(list(model.codebook.parameters())) == trained
    transfer = model.codebook.transfer
    with_graph = transfer is not None and isinstance(transfer.adjacency, NormalizedAdjacency)
    assert (len(transfer.layers) if with_graph else 0) == graph_layers
    assert all(type(q) is quantizer for q in model.quantizers)
    torch.manual_seed(0)
    other = build(method, dataclasses.replace(prior, adjective_vectors=prior.adjective_vectors + 1), small)
    assert all(torch.equal(a, b) for a, b in zip(model.codebook(), other.codebook())) == deaf  # whether the words' vectors matter
    torch.manual_seed(0)
    other = build(method, dataclasses.replace(prior, edges=prior.edges[:3]), small)
    assert all(torch.equal(a, b) for a, b in zip(model.codebook(), other.codebook())) == (graph_layers == 0)  # whether edges do


@pytest.mark.parametrize("method", METHODS)
def test_unselected_codes_move_only_where_codes_are_generated(method, prior, small):
    """§3.4 for every system: one step of Eq. 2 on one position."""
    model = build(method, prior, small)
    if method in ("frozen", "gumbel", "cvq", "regvq"):  # nothing to move, or not Eq. 2's rule: tested apart
        return
    before = [codes.detach().clone() for codes in model.codebook()]
    optimizer = torch.optim.SGD(model.codebook.parameters(), lr=0.1)
    followed = before[0][before[0].norm(dim=1).argmax()]  # not one that the last ReLU has silenced
    z = followed.view(1, -1, 1, 1) + 0.01 * torch.rand(1, len(followed), 1, 1)
    _, indices, loss = model.quantizers[0](z, model.codebook()[0])
    optimizer.zero_grad(), loss.backward(), optimizer.step()
    moves = torch.cat([(after - old).norm(dim=1) for after, old in zip(model.codebook(), before)])
    chosen = indices.item()
    others = torch.cat([moves[:chosen], moves[chosen + 1 :]])
    assert moves[chosen] > 0 and ((others > 0).float().mean() > 0.5 if model.codebook.transfer is not None else (others == 0).all())


def test_shared_codebooks_put_adjectives_and_nouns_in_one(prior, small):
    single, double = build("single-gcn", prior, small).eval(), build("vqct", prior, small).eval()
    x = torch.randn(1, 3, 16, 16)
    assert single.encode(x).shape == (1, 1, 8, 8) and double.encode(x).shape == (1, 2, 8, 8)
    assert single.encode(x).max() < 16 and double.encode(x)[:, 0].max() < 7


def test_edges_are_weighted_when_asked(prior, small):
    prior = dataclasses.replace(prior, edge_counts=np.arange(1, len(prior.edges) + 1))
    weighted, binary = (VQModel(ModelConfig(**small, weighted_edges=which), prior).codebook.transfer.adjacency for which in (True, False))
    edges = torch.from_numpy(prior.edges) + torch.tensor([0, 7])
    assert torch.equal(weighted.value, NormalizedAdjacency(edges, 16, prior.edge_counts).value)
    assert torch.equal(binary.value, NormalizedAdjacency(edges, 16).value) and not torch.equal(weighted.value, binary.value)


def test_word_vectors_are_scaled_as_asked(prior, small):
    def vectors(how):
        return VQModel(ModelConfig(**{**small, "vector_scale": how}), prior).codebook.vectors

    words = torch.from_numpy(np.concatenate([prior.adjective_vectors, prior.noun_vectors]))
    assert torch.equal(vectors("none"), words)
    assert vectors("rms").square().mean().item() == pytest.approx(1) and torch.allclose(
        vectors("rms") * words.square().mean().sqrt(), words
    )
    standard = vectors("standard")
    assert standard.mean(0).abs().max() < 1e-6 and torch.allclose(standard.std(0), torch.ones(12))


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel", "cvq", "regvq"])
@pytest.mark.parametrize("generated", [True, False])
def test_every_quantizer_trains_two_codebooks(quantizer, generated, prior, small):
    if quantizer == "cvq" and generated:
        return  # refused: see below
    origin = {} if generated else dict(codes="random", trained=True, transfer="none")
    model = VQModel(ModelConfig(**small, **origin, quantizer=quantizer, contrastive_weight=0.1, kl_weight=0.1), prior)
    x = torch.randn(2, 3, 16, 16)
    output = model(x)
    (F.mse_loss(output.x_hat, x) + output.quantizer_loss).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.codebook.parameters())
    model.eval()
    assert torch.equal(model.decode(model.encode(x)), model(x).x_hat)


def test_temperature_goes_from_one_to_its_end(prior, small):
    model = build("gumbel", prior, small)
    for progress, expected in ((0.0, 1.0), (0.5, (1 + 1 / 16) / 2), (1.0, 1 / 16)):
        model.anneal(progress)
        assert model.quantizers[0].temperature == pytest.approx(expected)


def test_orthogonal_choices(prior, small):
    """Each row of Table 3 is one choice away from the next."""

    def codebook(**choices):
        return VQModel(ModelConfig(**{**small, **choices}), prior).codebook

    assert [c.shape[0] for c in codebook(codebooks=1)()] == [16]
    assert isinstance(codebook(transfer="mlp").transfer.adjacency, nn.Identity)
    frozen = codebook(codebooks=1, transfer="none")
    assert not list(frozen.parameters()) and frozen()[0].shape == (16, 12)
    assert [name for name, _ in codebook(codebooks=1, transfer="none", trained=True).named_parameters()] == ["vectors"]
    assert [c.shape for c in codebook(codes="uniform", transfer="none", trained=True)()] == [(7, 4), (9, 4)]


def test_losses_reach_the_weights_they_should(prior, small):
    model, x = build("vqct", prior, small), torch.randn(2, 3, 16, 16)
    output = model(x)
    F.mse_loss(output.x_hat, x).backward(retain_graph=True)
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in (model.encoder.layers[0].weight, model.decoder.to_image.weight, model.to_codes.weight)
    )
    assert all(p.grad is None for p in model.codebook.parameters())  # reconstruction passes straight through
    model.zero_grad(set_to_none=True)
    output.quantizer_loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.codebook.parameters())  # every weight of the transfer network
    assert all(p.grad is None for p in model.decoder.parameters())
    assert model.encoder.layers[0].weight.grad.abs().sum() > 0


def test_commitment_reaches_only_the_encoder(prior, small):
    model, x = build("vqct", prior, small), torch.randn(2, 3, 16, 16)
    frozen = [codes.detach() for codes in model.codebook()]
    loss = sum(q(z, codes)[2] for q, z, codes in zip(model.quantizers, model.features(x), frozen))
    loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "to_codes"}


def test_reconstruction_and_losses_are_float32_under_autocast(prior, small):
    model, x = build("vqct", prior, small), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(x).dtype == torch.bfloat16
        output = model(x)
    assert output.x_hat.dtype == output.quantizer_loss.dtype == torch.float32
    gradient = torch.randn_like(output.x_hat)
    assert adaptive_weight(output.x_hat, model.decoder.to_image.weight, gradient, gradient).dtype == torch.float32


def test_model_refuses_what_cannot_be(prior, small):
    with pytest.raises(ValueError, match="not a multiple of 2"):
        VQModel(ModelConfig(**{**small, "resolution": 17}), prior)
    with pytest.raises(ValueError, match="need a prior"):
        VQModel(ModelConfig(**small), None)
    with pytest.raises(ValueError, match="'cvq' moves the codes themselves"):
        VQModel(ModelConfig(**small, quantizer="cvq"), prior)
    with pytest.raises(ValueError, match="2 neighbours needs"):
        VQModel(ModelConfig(**small, quantizer="gumbel", adjective_neighbours=2), prior)


def test_state_dict_carries_all_it_takes_to_decode(prior, small):
    model = build("vqct", prior, small).eval()
    other = build("vqct", prior, small)
    other.codebook.vectors.zero_(), other.codebook.transfer.adjacency.value.zero_()
    other.load_state_dict(model.state_dict())
    indices = torch.randint(0, 7, (1, 2, 8, 8))
    assert torch.equal(other.eval().decode(indices), model.decode(indices))


def test_module_shows_shapes_parameters_and_equations(capsys):
    vqct.main()
    printed = capsys.readouterr().out
    for line in (
        r"encoder +1×3×256×256 +→ 1×256×16×16 +29,298,176 parameters",
        r"decoder +1×256×16×16 +→ 1×3×256×256 +42,449,795 parameters",
        r"codebook +6207×512 +→ 1949×8 4258×8 +82,944 parameters",
        r"beak +3 +0\.333 0\.408 0\.000 0\.333 ",  # degree 3, orange's 3, sharp's 2
        r"sharp .* 0\.000 1\.316 ",  # (−2, 1)/2 + (0, 2)/√6, of which ReLU leaves the second
        r"ẑ_a = .* 0\.406 from orange, 1\.002 from sharp: s = 0",
        r"\(1 \+ β\) 0\.767 / 2 = 0\.4796 with β = 0\.25",
    ):
        assert re.search(line, printed), line


# ---------------------------------------------------------------------------------------------
# Published weights: taming-transformers' network written out by its own names, two levels deep


class Published:
    """VQGAN as its published state dict names it: 128 channels, multipliers 1 and 2, one residual block a level, random weights."""

    def __init__(self):
        self.state = {}
        self.convolution("encoder.conv_in", 128, 3)
        self.residual("encoder.down.0.block.0", 128, 128)
        self.convolution("encoder.down.0.downsample.conv", 128, 128)
        self.residual("encoder.down.1.block.0", 256, 128)
        self.attention("encoder.down.1.attn.0", 256)
        for network in ("encoder", "decoder"):
            self.residual(f"{network}.mid.block_1", 256, 256)
            self.attention(f"{network}.mid.attn_1", 256)
            self.residual(f"{network}.mid.block_2", 256, 256)
        self.norm("encoder.norm_out", 256)
        self.convolution("encoder.conv_out", 16, 256)
        self.convolution("quant_conv", 8, 16, 1)
        self.convolution("post_quant_conv", 16, 8, 1)
        self.state["quantize.embedding.weight"] = torch.randn(12, 8)
        self.convolution("decoder.conv_in", 256, 16)
        for block, before in enumerate((256, 256)):
            self.residual(f"decoder.up.1.block.{block}", 256, before)
            self.attention(f"decoder.up.1.attn.{block}", 256)
        self.convolution("decoder.up.1.upsample.conv", 256, 256)
        for block, before in enumerate((256, 128)):
            self.residual(f"decoder.up.0.block.{block}", 128, before)
        self.norm("decoder.norm_out", 128)
        self.convolution("decoder.conv_out", 3, 128)

    def convolution(self, name, after, before, size=3):
        self.state[f"{name}.weight"] = torch.randn(after, before, size, size) / math.sqrt(before * size * size)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(after)

    def norm(self, name, width):
        self.state[f"{name}.weight"], self.state[f"{name}.bias"] = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)

    def residual(self, name, after, before):
        self.norm(f"{name}.norm1", before), self.convolution(f"{name}.conv1", after, before)
        self.norm(f"{name}.norm2", after), self.convolution(f"{name}.conv2", after, after)
        if after != before:
            self.convolution(f"{name}.nin_shortcut", after, before, 1)

    def attention(self, name, width):
        self.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.convolution(f"{name}.{part}", width, width, 1)

    def conv(self, x, name, **more):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **more})

    def act(self, x, name):
        x = F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)
        return x * torch.sigmoid(x)

    def block(self, x, name):
        hidden = self.conv(self.act(self.conv(self.act(x, f"{name}.norm1"), f"{name}.conv1"), f"{name}.norm2"), f"{name}.conv2")
        return hidden + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.state else x)

    def attend(self, x, name):
        normal = F.group_norm(x, 32, self.state[f"{name}.norm.weight"], self.state[f"{name}.norm.bias"], 1e-6)
        q, k, v = (self.conv(normal, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.mT @ k / math.sqrt(q.shape[1])).softmax(dim=2)
        return x + self.conv((v @ weights.mT).view_as(x), f"{name}.proj_out")

    def middle(self, x, network):
        return self.block(self.attend(self.block(x, f"{network}.mid.block_1"), f"{network}.mid.attn_1"), f"{network}.mid.block_2")

    def encode(self, x):
        x = self.block(self.conv(x, "encoder.conv_in"), "encoder.down.0.block.0")
        x = self.conv(F.pad(x, (0, 1, 0, 1)), "encoder.down.0.downsample.conv", stride=2, padding=0)
        x = self.middle(self.attend(self.block(x, "encoder.down.1.block.0"), "encoder.down.1.attn.0"), "encoder")
        return self.conv(self.conv(self.act(x, "encoder.norm_out"), "encoder.conv_out"), "quant_conv")

    def decode(self, z):
        x = self.middle(self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in"), "decoder")
        for block in range(2):
            x = self.attend(self.block(x, f"decoder.up.1.block.{block}"), f"decoder.up.1.attn.{block}")
        x = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "decoder.up.1.upsample.conv")
        for block in range(2):
            x = self.block(x, f"decoder.up.0.block.{block}")
        return self.conv(self.act(x, "decoder.norm_out"), "decoder.conv_out")


PUBLISHED = dict(resolution=16, multipliers=(1, 2), blocks=1, z_channels=16, code_dim=8)


def test_published_weights_compute_what_the_published_network_does():
    theirs = Published()
    ours = VQModel(ModelConfig(**PUBLISHED, codes="uniform", codebooks=1, codebook_size=12, trained=True, transfer="none")).eval()
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


def test_published_weights_serve_word_codes_and_name_what_does_not_fit(prior):
    theirs = Published().state
    model, discriminator = VQModel(ModelConfig(**PUBLISHED), prior), Discriminator()
    shallow = Discriminator(layers=2).state_dict()
    theirs.update({f"loss.discriminator.main.{name.removeprefix('layers.')}": value for name, value in shallow.items()})
    before = {name: value.clone() for name, value in model.codebook.state_dict().items()}
    left = load_taming(model, discriminator, theirs)
    assert "discriminator" in left and not torch.equal(discriminator.layers[0].weight, shallow["layers.0.weight"])  # all of it or none
    of_two = Discriminator(layers=2)
    assert "discriminator" not in load_taming(model, of_two, theirs)
    assert all(torch.equal(value, of_two.state_dict()[name]) for name, value in shallow.items())
    assert all(torch.equal(value, model.codebook.state_dict()[name]) for name, value in before.items()) and "codebook.vectors" in left
    assert torch.equal(model.to_codes.weight, theirs["quant_conv.weight"])
    assert not any(name.startswith(("encoder", "decoder", "to_codes", "from_codes")) for name in left)
    with pytest.raises(ValueError, match=r"encoder.conv_in.weight.*\(128, 3, 3, 3\).*this network wants \(64, 3, 3, 3\)"):
        load_taming(VQModel(ModelConfig(**PUBLISHED, channels=64), prior), None, theirs)
    del theirs["decoder.up.1.attn.1.k.bias"]
    with pytest.raises(ValueError, match="decoder.up.1.attn.1.q.bias.*this network wants"):
        load_taming(model, None, theirs)


# ---------------------------------------------------------------------------------------------
# §4.4: the second stage


def transformer(sizes=(7, 5), grid=(3, 4), condition=None, **more):
    condition = condition or Condition("segmentation", 3, grid, 16)
    codes = [torch.randn(size, 3) for size in sizes]
    model = TokenTransformer(sizes, grid, condition, width=16, depth=2, heads=2, codes=codes, **more).eval()
    for parameter in model.parameters():  # nothing may be hidden by a zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("sizes", [(7,), (7, 5), (7, 7, 5)])
@pytest.mark.parametrize("choice", [dict(temperature=0), dict(), dict(top_k=3), dict(top_p=0.7, temperature=1.3)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_sampling_equals_uncached(sizes, choice, scale):
    model, known = transformer(sizes), torch.rand(4, 3, 3, 4)
    draws = [sample_tokens(model, 4, known, None, scale, torch.manual_seed(3), cached, **choice) for cached in (True, False)]
    assert torch.equal(*draws) and draws[0].shape == (4, len(sizes), 3, 4)
    assert all(0 <= draws[0][:, i].min() and draws[0][:, i].max() < size for i, size in enumerate(sizes))
    assert torch.equal(draws[0], sample_tokens(model, 4, known, None, scale, torch.manual_seed(3), **choice))
    if choice.get("temperature") != 0:  # greedily a random network may say one thing always
        assert not torch.equal(draws[0], sample_tokens(model, 4, known.flip(1), None, scale, torch.manual_seed(3), **choice))


def test_cached_sampling_equals_uncached_at_256_positions():
    model = TokenTransformer((40, 60), (16, 16), Condition("none", 0, (16, 16), 32), width=32, depth=2, heads=2).eval()
    for choice in (dict(temperature=0), dict()):
        draws = [sample_tokens(model, 2, generator=torch.manual_seed(0), cached=cached, **choice) for cached in (True, False)]
        assert torch.equal(*draws)


def test_a_token_is_predicted_from_those_before_it_alone():
    model, tokens = transformer(), torch.randint(0, 5, (1, 2, 3, 4))
    known, before = torch.rand(1, 3, 3, 4), None
    before = [part.detach() for part in model(tokens, known)]
    for i, n in ((0, 5), (1, 5), (0, 0), (1, 11)):
        changed = tokens.clone()
        changed.flatten(2)[0, i, n] += 1 if tokens.flatten(2)[0, i, n] < 4 else -1
        for j, (old, new) in enumerate(zip(before, model(changed, known))):
            moved = (old != new).any(dim=-1)[0]
            first = n if j > i else n + 1  # the noun of a position sees its adjective
            assert not moved[:first].any() and moved[first:].all()
    apart = transformer(joint=False)
    changed = tokens.clone()
    changed[0, 0, 1, 1] = (changed[0, 0, 1, 1] + 1) % 5
    old, new = apart(tokens, known)[1], apart(changed, known)[1]
    assert torch.equal(old[0, : 1 * 4 + 2], new[0, : 1 * 4 + 2]) and not torch.equal(old, new)


def test_sampling_follows_the_models_own_probabilities():
    model = transformer((3, 2), (1, 1), Condition("none", 0, (1, 1), 16))
    draws = sample_tokens(model, 20_000, generator=torch.manual_seed(0)).flatten(1)
    first = model(torch.zeros(1, 2, 1, 1, dtype=torch.int64))[0][0, 0].softmax(-1)
    for a in range(3):
        assert abs((draws[:, 0] == a).double().mean() - first[a]) < 0.015
        second = model(torch.tensor([a, 0]).view(1, 2, 1, 1))[1][0, 0].softmax(-1)
        assert abs((draws[draws[:, 0] == a, 1] == 1).double().mean() - second[1]) < 0.04


def test_only_likely_tokens_are_drawn():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.06, 0.04]]).log().repeat(4000, 1)
    counted = lambda **choice: torch.bincount(draw_tokens(logits, generator=torch.manual_seed(0), **choice), minlength=5) / 4000
    assert torch.allclose(counted(), logits[0].exp(), atol=0.03)
    assert counted(top_k=1).tolist() == counted(temperature=0).tolist() == [1, 0, 0, 0, 0]
    assert (counted(top_p=0.85)[3:] == 0).all() and (counted(top_p=0.85)[:3] > 0.1).all() and counted(top_p=0.91)[3] > 0
    assert counted(temperature=3.0)[4] > 0.08 and counted(temperature=0.3)[4] == 0


def test_conditions_are_those_of_each_image_and_position():
    for condition, known in (
        (Condition("class", 4, (4, 4), 8), torch.tensor([2, -1, 2])),
        (Condition("segmentation", 3, (4, 4), 8), torch.rand(1, 3, 4, 4).repeat(3, 1, 1, 1)),
    ):
        torch.nn.init.normal_(condition.absent)
        features = condition(known, 3, torch.tensor([False, False, True]))
        assert (features[2] == condition.absent).all() and not (features[0] == condition.absent).any()
        assert (features[1] == condition.absent).all() == (condition.kind == "class")  # an unknown class is an absent one
        assert (condition(None, 3) == condition.absent).all()
    shares = torch.zeros(1, 3, 4, 4)
    one = shares.clone()
    one[0, 1, 0, 0] = 1
    moved = (condition.embedding(shares) != condition.embedding(one)).any(1)[0]
    assert moved[:3, :3].all() and not moved[3].any() and not moved[:, 3].any()  # aligned, with what is around
    assert ((condition(shares, 1) != condition(one, 1)).any(-1).view(4, 4) == moved).all()  # nothing more at the start
    torch.nn.init.normal_(condition.block.project.weight)
    assert (condition(shares, 1) != condition(one, 1)).any(-1).all()  # later every position hears of it


def test_a_codes_embedding_starts_from_the_code():
    codes = torch.randn(6, 3)
    codes[4] = codes[1]
    embedding = CodeEmbedding(6, 8, codes)
    assert torch.allclose(embedding.logits(torch.eye(8)).T, embedding(torch.arange(6)), atol=1e-6)
    torch.nn.init.zeros_(embedding.learned)
    rows = embedding(torch.tensor([[1, 4], [2, 0]]))
    assert rows.shape == (2, 2, 8) and torch.equal(rows[0, 0], rows[0, 1]) and not torch.equal(rows[1, 0], rows[1, 1])
    plain = CodeEmbedding(6, 8)
    assert torch.equal(plain(torch.tensor([2])), plain.learned[2:3]) and "codes" in embedding.state_dict()


def test_given_tokens_stay():
    model, given = transformer(), torch.full((2, 2, 3, 4), -1)
    given[:, :, 1] = torch.randint(0, 5, (2, 2, 4))
    given[0, 0, 2, 3] = 6
    drawn = sample_tokens(model, 2, torch.rand(2, 3, 3, 4), given, generator=torch.manual_seed(0))
    assert torch.equal(drawn[given >= 0], given[given >= 0])


def test_two_heads_cannot_model_what_a_noun_owes_to_its_adjective():
    """Adjectives are uniform, the noun is the adjective's: log₂ 8 bits a position suffice, independent heads need twice that."""
    found = {}
    for joint in (True, False):
        torch.manual_seed(0)
        model = TokenTransformer((8, 8), (2, 2), Condition("none", 0, (2, 2), 32), width=32, depth=1, heads=2, joint=joint)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            adjectives = torch.randint(0, 8, (64, 1, 2, 2))
            tokens = torch.cat([adjectives, (3 * adjectives + 1) % 8], dim=1)
            losses = model.loss(tokens)
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        found[joint] = sum(losses).item() / math.log(2)
    assert found[True] < 3.2 and found[False] > 5.8


def test_modulated_blocks_start_as_the_identity():
    x = torch.randn(2, 5, 16)
    assert torch.equal(Block(16, 2, modulated=True)(x, torch.randn(2, 1, 16)), x)


class KnowsTheAnswer(Denoiser):
    """The noise that leads to one grid of features."""

    def forward(self, z_t, t, condition):
        t = (t * math.pi / 2)[:, None, None, None]
        return (z_t - t.cos() * (self.answer - self.mean) / self.std) / t.sin()


def test_diffusion_finds_what_the_noise_hides_and_keeps_what_is_given():
    model = KnowsTheAnswer(6, (3, 4), Condition("none", 0, (3, 4), 16), width=16, depth=1, heads=2).eval()
    model.mean += 0.5
    model.std *= 2
    model.answer = torch.randn(2, 6, 3, 4)
    assert torch.allclose(sample_features(model, 2, generator=torch.manual_seed(0)), model.answer, atol=1e-4)
    given, mask = torch.randn(2, 6, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    mask[:, :, 0] = True
    z = sample_features(model, 2, None, given, mask, generator=torch.manual_seed(0))
    assert torch.equal(z[:, :, 0], given[:, :, 0]) and torch.allclose(z[:, :, 1:], model.answer[:, :, 1:], atol=1e-4)


def test_the_denoiser_learns():
    torch.manual_seed(0)
    model = Denoiser(4, (2, 2), Condition("class", 2, (2, 2), 32), width=32, depth=2, heads=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    centres = torch.randn(2, 4, 2, 2)
    for _ in range(300):
        labels = torch.randint(0, 2, (64,))
        (loss,) = model.loss(centres[labels] + 0.05 * torch.randn(64, 4, 2, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.tensor([0, 1, 0, 1])
    drawn = sample_features(model.eval(), 4, labels, generator=torch.manual_seed(0))
    assert (drawn - centres[labels]).abs().mean() < 0.5 * (drawn - centres[1 - labels]).abs().mean()
