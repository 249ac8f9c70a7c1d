"""Shapes, gradients and exactness of the networks."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import vqct
from train import METHODS
from vqct import (
    LPIPS,
    AttentionBlock,
    Codebook,
    CodebookTransfer,
    Decoder,
    Discriminator,
    Downsample,
    Encoder,
    GraphConvolution,
    ModelConfig,
    NormalizedAdjacency,
    ResidualBlock,
    Upsample,
    VectorQuantizer,
    VQModel,
    adaptive_weight,
    hinge_loss,
    nearest_code,
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
    assert z_q.shape == z.shape and indices.shape == (2, 4, 5)
    torch.testing.assert_close(z_q, codebook[indices].permute(0, 3, 1, 2))
    torch.testing.assert_close(loss, 1.4 * F.mse_loss(codebook[indices].permute(0, 3, 1, 2), z))


def test_quantizer_gradients_go_where_equation_2_says():
    z, codebook = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    z_q, indices, loss = VectorQuantizer(beta=0.25)(z, codebook)
    loss.backward()
    residual = (z - codebook[indices].permute(0, 3, 1, 2)).detach()
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


# ---------------------------------------------------------------------------------------------
# Eq. 3

EDGES = torch.tensor([(0, 4), (0, 5), (1, 5), (2, 6)])  # nodes 3 and 7 stand alone


def dense_adjacency(edges, nodes):
    a = torch.eye(nodes, dtype=torch.float64)
    a[edges[:, 0], edges[:, 1]] = a[edges[:, 1], edges[:, 0]] = 1
    scale = torch.diag(a.sum(1) ** -0.5)
    return scale @ a @ scale


@pytest.mark.parametrize("sparse", [True, False])
def test_adjacency_is_the_normalized_one(sparse, monkeypatch):
    if not sparse:
        monkeypatch.setattr(NormalizedAdjacency, "has_sparse_product", staticmethod(lambda device: False))
    adjacency = NormalizedAdjacency(torch.cat([EDGES, EDGES[:1], EDGES[:1].flip(1)]), 8)  # repeats count once
    nodes = torch.randn(8, 3, requires_grad=True)
    product = adjacency(nodes)
    dense = dense_adjacency(EDGES, 8).float()
    torch.testing.assert_close(product, dense @ nodes)
    weight = torch.randn(8, 3)
    torch.testing.assert_close(torch.autograd.grad(product, nodes, weight)[0], dense.T @ weight)


def test_adjacency_gradients_to_second_order():
    adjacency, nodes = NormalizedAdjacency(EDGES, 8), torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(adjacency, (nodes,)) and torch.autograd.gradgradcheck(lambda x: adjacency(x).pow(3), (nodes,))


def test_adjacency_refuses_edges_that_cannot_be():
    for edges in ([(0, 8)], [(-1, 2)], [(3, 3)]):
        with pytest.raises(ValueError, match="two different nodes"):
            NormalizedAdjacency(torch.tensor(edges), 8)
    torch.testing.assert_close(NormalizedAdjacency(torch.empty(0, 2), 3)(torch.ones(3, 2)), torch.ones(3, 2))


@pytest.mark.parametrize("widths", [(5, 3), (3, 5)])
def test_graph_convolution_is_the_dense_formula(widths):
    layer, adjacency, nodes = GraphConvolution(*widths), NormalizedAdjacency(EDGES, 8), torch.randn(8, widths[0])
    torch.testing.assert_close(layer(nodes, adjacency), dense_adjacency(EDGES, 8).float() @ nodes @ layer.weight)


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


def build(method, prior, small):
    return VQModel(ModelConfig(**{k: v for k, v in {**METHODS[method], **small}.items() if k in ModelConfig.__dataclass_fields__}), prior)


@pytest.mark.parametrize("method", METHODS)
def test_decoding_indices_gives_the_forward_pass(method, prior, small):
    model, x = build(method, prior, small).eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        output, indices = model(x), model.encode(x)
        assert torch.equal(output.indices, indices) and torch.equal(model.decode(indices), output.x_hat)
    assert output.x_hat.shape == x.shape and indices.shape == (3, len(model.codebook.sizes), 8, 8) and output.quantizer_loss.shape == ()
    for index, size in zip(indices.unbind(1), model.codebook.sizes):
        assert 0 <= index.min() and index.max() < size


@pytest.mark.parametrize("method, shapes", [("vqct", [(7, 4), (9, 4)]), ("vqgan", [(1024, 8)])])
def test_codebook_shapes_tell_methods_apart(method, shapes, prior, small):
    model = build(method, prior, small)
    assert [tuple(codes.shape) for codes in model.codebook()] == shapes
    trained = [name for name, _ in model.codebook.named_parameters()]
    assert trained == (["vectors"] if method == "vqgan" else [f"transfer.layers.{i}.weight" for i in range(3)])


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


def test_state_dict_carries_all_it_takes_to_decode(prior, small):
    model = build("vqct", prior, small).eval()
    other = build("vqct", prior, small)
    other.codebook.vectors.zero_(), other.codebook.transfer.adjacency.value.zero_()
    other.load_state_dict(model.state_dict())
    indices = torch.randint(0, 7, (1, 2, 8, 8))
    assert torch.equal(other.eval().decode(indices), model.decode(indices))


def test_module_prints_its_shapes(capsys):
    vqct.main()
    printed = capsys.readouterr().out
    assert "29.3 M weights" in printed and "42.4 M weights" in printed
    assert "[0.3333, 0.4082, 0.0000, 0.3333]" in printed  # beak: degree 3, orange's 3, sharp's 2
    assert "s = 0" in printed and "= 0.2483" in printed
