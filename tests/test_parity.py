"""The same numbers as well-known packages. A test is skipped if its package is missing.

The packages are torch_geometric, pytorch-fid, lpips, transformers and
vector-quantize-pytorch. Trunks have random weights and lpips brings its heads, so nothing
is downloaded.
"""

import numpy as np
import pytest
import torch
import torchvision
from torch.testing import assert_close

import evaluate
import prior
import vqct

EDGES = torch.tensor(
    [(0, 4), (0, 5), (1, 5), (2, 6), (3, 6), (3, 4), (3, 7)]
)  # node 8 has none


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("widths", [(5, 11), (11, 5)], ids=str)  # Â goes before W or after it
def test_graph_convolution_is_torch_geometrics(widths, weighted):
    peer = pytest.importorskip("torch_geometric.nn").GCNConv(*widths, bias=False)
    weights = torch.tensor([3.0, 1, 2, 7, 1, 1, 4]) if weighted else None
    both = torch.cat([EDGES, EDGES.flip(1)]).T  # there an edge has a direction
    layer, adjacency = vqct.GraphConvolution(*widths), vqct.NormalizedAdjacency(
        EDGES, 9, weights
    )
    layer.weight.data.copy_(peer.lin.weight.T)
    nodes, upstream = torch.randn(9, widths[0], requires_grad=True), torch.randn(9, widths[1])
    ours, theirs = layer(nodes, adjacency), peer(
        nodes, both, None if weights is None else weights.repeat(2)
    )
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(y, (nodes, weight), upstream)
        for y, weight in ((ours, layer.weight), (theirs, peer.lin.weight))
    )
    assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert_close(ours[1], theirs[1].T, rtol=1e-5, atol=1e-5)


def random_inception():
    """A state dict of FID's Inception. Every layer keeps its input's variance."""
    network = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 1.5)
    return network.state_dict()


@pytest.mark.parametrize("side", [64, 320])  # enlarged and reduced to 299
def test_inception_is_pytorch_fids(side, monkeypatch):
    inception, state = pytest.importorskip("pytorch_fid.inception"), random_inception()
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *args, **more: state)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    peer = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    with torch.no_grad():
        ours, theirs = evaluate.InceptionFeatures(state)(images), peer(images / 255)[0].flatten(
            1
        )
    assert ours.shape == (2, 2048) and (theirs[0] - theirs[1]).norm() > 0.01 * theirs[0].norm()
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of scipy's older interface
def test_frechet_distance_is_pytorch_fids():
    peer = pytest.importorskip("pytorch_fid.fid_score").calculate_frechet_distance
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((400, 64)) @ rng.standard_normal((64, 64)) + shift
        for shift in (0, 0.3)
    )
    moments = [x for part in (a, b) for x in (part.mean(axis=0), np.cov(part, rowvar=False))]
    assert evaluate.frechet_distance(*moments) == pytest.approx(peer(*moments), rel=1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, of an older argument
@pytest.mark.parametrize("trunk", ["vgg", "squeeze"])
def test_perceptual_distance_is_lpips(trunk):
    peer = pytest.importorskip("lpips").LPIPS(net=trunk, pnet_rand=True, verbose=False)
    ours = vqct.LPIPS(trunk, head_state=peer.state_dict())
    ours.features.load_state_dict(
        {name.partition(".")[2]: x for name, x in peer.net.state_dict().items()}
    )
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    y = (x + torch.tensor([0.02, 0.5]).view(2, 1, 1, 1) * torch.randn_like(x)).requires_grad_()
    found = [
        (distance, *torch.autograd.grad(distance.sum(), y))
        for distance in (ours(x, y), peer(x, y).flatten())
    ]
    for mine, theirs in zip(*found):
        assert (
            mine.shape == theirs.shape
            and theirs.norm() > 0
            and (mine - theirs).norm() < 1e-5 * theirs.norm()
        )


@pytest.mark.parametrize("learnable, beta", [(True, 1.0), (False, 0.25)])
def test_quantizer_is_vector_quantize_pytorchs(learnable, beta):
    """Its learnable codebook has one loss for both terms of Eq. 2, so β = 1.

    Any other codebook has the commitment term alone.
    """
    VectorQuantize = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
    how = dict(
        accept_image_fmap=True,
        rotation_trick=False,
        ema_update=False,
        learnable_codebook=learnable,
    )
    peer, ours = (
        VectorQuantize(6, 20, commitment_weight=beta, **how).train(),
        vqct.VectorQuantizer(beta).train(),
    )
    codes = torch.randn(20, 6, requires_grad=True)
    peer._codebook.embed.data.copy_(codes.detach()[None])
    z, upstream = torch.randn(2, 6, 5, 7, requires_grad=True), torch.randn(2, 6, 5, 7)
    (z_q, indices, loss), (their_z_q, their_indices, their_loss) = ours(z, codes), peer(z)
    assert torch.equal(indices[:, 0], their_indices) and len(indices.unique()) > 10
    assert_close(z_q, their_z_q, rtol=0, atol=1e-6)
    assert_close(loss, their_loss.squeeze() * (1 + beta) / beta, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad((z_q * upstream).sum() + loss, (z, codes))
    wanted = (z, peer._codebook.embed) if learnable else (z,)
    for mine, theirs in zip(
        gradients, torch.autograd.grad((their_z_q * upstream).sum() + their_loss.sum(), wanted)
    ):
        assert_close(mine, theirs.view_as(mine), rtol=1e-5, atol=1e-7)


def test_text_features_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    shape = dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=32,
    )
    peer = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**shape, eos_token_id=49407)
    ).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    prompts = torch.tensor([[49406, 320, 1125, 539, word, 49407] for word in (7, 2866, 30000)])
    with torch.no_grad():
        theirs = peer(prompts).text_embeds
        ours = prior.clip_text_features(prompts, peer.state_dict())
    assert theirs.abs().mean() > 0.1
    assert_close(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())
