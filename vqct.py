"""VQCT: every network of "Codebook Transfer with Part-of-Speech for Vector-Quantized Image Modeling".

The file reads in the paper's order:

    §3.1         Eq. 1      nearest_code        the code nearest to each feature
                 Eq. 2      VectorQuantizer     straight-through, codebook and commitment terms
    §3.3 step 2  Â          NormalizedAdjacency the modifying graph of adjectives and nouns
                 Eq. 3      GraphConvolution, CodebookTransfer
                 (C_a, C_n) Codebook            where codes come from, and how they are transferred
    §4.1         E, G       Encoder, Decoder    VQGAN's network
    losses       VQ-GAN     Discriminator, LPIPS, hinge_loss, adaptive_weight
    §3.3 step 3             VQModel             image → indices → image

Nothing here reads a configuration file or a corpus; `prior.py` makes the graph, `train.py` trains.
Each class can be lifted out with the imports below. To see the shapes, and Eq. 3, 1 and 2 on four words:

    python vqct.py
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

# torch calls its compressed sparse rows a beta on first use; the one product taken here is tested
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# ---------------------------------------------------------------------------------------------
# §3.1: Eq. 1, the nearest code


@torch.no_grad()
def nearest_code(z, codebook, row_chunk=None, code_chunk=None):
    """Index of the code nearest to each feature in Euclidean distance (paper Eq. 1).

    ‖z − e‖² = ‖z‖² − 2 (z·e − ½‖e‖²), and ‖z‖² is the same for every code, so a matrix product and
    a running minimum over tiles suffice; the (N, K) distance matrix never exists.

    Args:
        z: (N, D) features of any floating type; computed in float32, or float64 if either is.
        codebook: (K, D) codes, K ≥ 1.
        row_chunk, code_chunk: the tile; by default one that fits a core's cache on the CPU and
            one that fills the device elsewhere. Memory is O(row_chunk · code_chunk + (N + K) D).
    Returns:
        (N,) int64; of equally near codes the one with the lowest index.
    Raises:
        ValueError: if the shapes do not match or the codebook is empty.

    Exact to the rounding of the product, which is relative to the codes' distance from their middle:
    tight clusters far apart want float64. On CUDA leave float32 products at their default precision.
    """
    if z.dim() != 2 or codebook.dim() != 2 or z.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"nearest_code takes (N, D) and (K, D) with K ≥ 1, got {tuple(z.shape)} and {tuple(codebook.shape)}")
    on_cpu = z.device.type == "cpu"
    row_chunk = row_chunk or (512 if on_cpu else 8192)
    code_chunk = code_chunk or (2048 if on_cpu else 8192)
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        codebook = codebook.to(dtype)
        first = _first_of_equal(codebook)
        offset = _exact_offset(codebook)
        codebook = codebook - offset
        half_norms = codebook.square().sum(1).mul_(0.5)  # (K,)
        tiles = list(zip(half_norms.split(code_chunk), codebook.split(code_chunk)))
        indices = torch.empty(len(z), dtype=torch.int64, device=z.device)
        for rows, out in zip(z.split(row_chunk), indices.split(row_chunk)):
            rows = rows.to(dtype) - offset
            best, start = None, 0
            for tile_norms, tile in tiles:
                score, index = torch.addmm(tile_norms, rows, tile.T, alpha=-1).min(dim=1)  # (rows,)
                if best is None:
                    best = score
                    out.copy_(index)
                else:
                    closer = score < best  # strict, so that ties stay with the lower index
                    best = torch.where(closer, score, best)
                    out.copy_(torch.where(closer, index + start, out))
                start += len(tile)
    return first[indices]


def _first_of_equal(codebook):
    """(K,) the lowest index of a code equal to each code, by sorting a 64-bit hash of their bits.

    A product may round equal columns differently by where they stand in a tile, so it cannot tell ties.
    Two different codes share a hash with a chance of 2⁻⁶⁴.
    """
    hashed, order = torch.cat([_hash_rows(codes) for codes in codebook.split(1024)]).sort(stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = hashed[1:] != hashed[:-1]
    start = torch.where(new, torch.arange(len(order), device=order.device), 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, order[start])


def _hash_rows(codes):
    """(K, D) float32 or float64 → (K,) int64: splitmix64 (Steele et al. 2014) of each entry and its place, summed."""
    bits = (codes + 0.0).view(torch.int32 if codes.dtype == torch.float32 else torch.int64).long()  # −0 becomes 0
    mixed = bits + torch.arange(1, bits.shape[1] + 1, device=bits.device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum(1)


def _exact_offset(codebook):
    """(D,) the middle of the codes, rounded to a power of two of their spread.

    Distances do not depend on the origin, but the rounding of a product does: codes far from zero
    and close together would be confused. Medians of a sample, so that no outlier moves the middle;
    a coarse grid, so that the subtraction itself is exact.
    """
    sample = codebook[:: max(1, len(codebook) // 64)]
    middle = sample.median(0).values
    limits = torch.finfo(codebook.dtype)
    spread = (sample - middle).abs().median() + middle.abs().amax() * limits.eps + limits.tiny
    grid = torch.exp2(spread.log2().ceil())
    return (middle / grid).round() * grid


class VectorQuantizer(nn.Module):
    """Eq. 1 and the last two terms of Eq. 2: ‖sg[ẑ] − z_q‖² + β ‖sg[z_q] − ẑ‖².

    Each term is a mean over elements. The codebook is an argument, so it may be a parameter or
    the output of a network; the first term is its only gradient.

    Args:
        beta: weight of the commitment term (0.25, van den Oord et al. 2017).
    """

    def __init__(self, beta=0.25):
        super().__init__()
        self.beta = beta

    def indices(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → (B, H, W) int64, Eq. 1."""
        features = z.movedim(1, -1)  # (B, H, W, D)
        return nearest_code(features.reshape(-1, features.shape[-1]), codebook).view(features.shape[:-1])

    def forward(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → z_q (B, D, H, W), indices (B, H, W), loss ().

        In training z_q carries the decoder's gradient straight through to z; in evaluation it is
        exactly the code, so that decoding by indices gives the same image. Always float32.
        """
        with torch.autocast(z.device.type, enabled=False):
            codebook = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
            z = z.to(codebook.dtype)
            indices = self.indices(z, codebook)  # (B, H, W)
            z_q = F.embedding(indices, codebook).movedim(-1, 1)  # (B, D, H, W)
            loss = F.mse_loss(z_q, z.detach()) + self.beta * F.mse_loss(z, z_q.detach())
            if self.training:
                z_q = z + (z_q - z).detach()
        return z_q, indices, loss


# ---------------------------------------------------------------------------------------------
# §3.3 step 2: the modifying graph and Eq. 3


class _SymmetricProduct(torch.autograd.Function):
    """Â H for a constant symmetric sparse Â: the gradient is the same product, no transpose kept."""

    @staticmethod
    def forward(ctx, adjacency, nodes):
        ctx.adjacency = adjacency
        return adjacency @ nodes

    @staticmethod
    def backward(ctx, gradient):
        return None, _SymmetricProduct.apply(ctx.adjacency, gradient.contiguous())


class NormalizedAdjacency(nn.Module):
    """Â = D^{-1/2} (A + I) D^{-1/2} of an undirected graph, sparse (Kipf & Welling 2017).

    Args:
        edges: (E, 2) int64 node indices, each undirected edge once; repeats count once, as the
            paper's A is binary.
        nodes: number of nodes N.
    Raises:
        ValueError: if an edge names a node outside 0 … N−1 or joins a node to itself.
    """

    def __init__(self, edges, nodes):
        super().__init__()
        edges = torch.as_tensor(edges, dtype=torch.int64).reshape(-1, 2)
        if len(edges) and (edges.min() < 0 or edges.max() >= nodes or (edges[:, 0] == edges[:, 1]).any()):
            raise ValueError(f"edges must join two different nodes of 0 … {nodes - 1}")
        loops = torch.arange(nodes)[:, None].expand(-1, 2)
        pairs = torch.cat([edges, edges.flip(1), loops]).unique(dim=0)  # sorted by row, then column
        degree = torch.bincount(pairs[:, 0], minlength=nodes)
        scale = degree.double().rsqrt()
        self.nodes = nodes
        self.register_buffer("row", pairs[:, 0].contiguous())  # (2E + N,)
        self.register_buffer("column", pairs[:, 1].contiguous())  # (2E + N,)
        self.register_buffer("row_start", F.pad(degree.cumsum(0), (1, 0)))  # (N + 1,)
        self.register_buffer("value", (scale[pairs[:, 0]] * scale[pairs[:, 1]]).float())  # (2E + N,)

    def forward(self, nodes):
        """(N, D) → Â nodes, (N, D)."""
        value = self.value.to(nodes.dtype)
        if not self.has_sparse_product(nodes.device):
            messages = value[:, None] * nodes[self.column]
            return torch.zeros_like(nodes).index_add(0, self.row, messages)
        adjacency = torch.sparse_csr_tensor(self.row_start, self.column, value, (self.nodes, self.nodes), check_invariants=False)
        return _SymmetricProduct.apply(adjacency, nodes)

    @staticmethod
    def has_sparse_product(device):
        """Whether torch multiplies compressed sparse matrices there: CUDA, and CPUs with MKL."""
        return device.type == "cuda" or (device.type == "cpu" and torch.backends.mkl.is_available())


class GraphConvolution(nn.Module):
    """One layer of Eq. 3 before its activation: Â H W."""

    def __init__(self, in_features, out_features):
        super().__init__()
        # Scaled for the ReLU that follows: three layers keep the scale of their input.
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * math.sqrt(2 / in_features))

    def forward(self, nodes, adjacency):
        """nodes: (N, in_features); adjacency: a module or function (N, D) → (N, D)."""
        if self.weight.shape[0] < self.weight.shape[1]:  # the product with Â on the narrower side
            return adjacency(nodes) @ self.weight
        return adjacency(nodes @ self.weight)  # (N, out_features)


class CodebookTransfer(nn.Module):
    """Eq. 3, the graph convolution-based codebook transfer network: H ← ReLU(Â H W), thrice.

    Args:
        widths: (d, …, D) features of the language model's vectors, of each hidden layer and of
            the codes; four numbers make the paper's three convolutions.
        adjacency: a NormalizedAdjacency; `nn.Identity()` makes the paper's MLP (Tables 2 and 3).
    """

    def __init__(self, widths, adjacency):
        super().__init__()
        self.adjacency = adjacency
        self.layers = nn.ModuleList(GraphConvolution(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, vectors):
        """(N, d) vectors of the graph's nodes → (N, D) codes."""
        nodes = vectors
        for layer in self.layers:
            nodes = F.relu(layer(nodes, self.adjacency))
        return nodes


class Codebook(nn.Module):
    """The codes of every codebook: vectors, sent through a transfer network where there is one.

    Every system of the paper is a choice of these three arguments: learned codes are trained
    vectors without transfer; VQCT's are frozen word vectors through CodebookTransfer.

    Args:
        vectors: (ΣK, d) starting codes, or the language model's word vectors.
        sizes: (K_1, …) codes of each codebook: (adjectives, nouns) in VQCT.
        trained: whether the vectors are parameters.
        transfer: a module (ΣK, d) → (ΣK, D), or None for the vectors themselves.

    In evaluation mode the codes are computed once and kept until `train()`, `load_state_dict` or a
    move to another device or type; they carry no gradient then.
    """

    def __init__(self, vectors, sizes, trained=False, transfer=None):
        super().__init__()
        if sum(sizes) != len(vectors):
            raise ValueError(f"{len(vectors)} vectors cannot make codebooks of {tuple(sizes)} codes")
        self.sizes = tuple(sizes)
        if trained:
            self.vectors = nn.Parameter(vectors.clone())
        else:
            self.register_buffer("vectors", vectors.clone())
        self.transfer = transfer
        self._cached = None

    def forward(self):
        """→ a tuple of (K_i, D) codebooks."""
        if self.training:
            return self._generate()
        if self._cached is None:
            with torch.no_grad():
                self._cached = tuple(codes.detach() for codes in self._generate())
        return self._cached

    def _generate(self):
        with torch.autocast(self.vectors.device.type, enabled=False):
            codes = self.vectors if self.transfer is None else self.transfer(self.vectors)
            return codes.split(self.sizes)

    def _forget(self):
        self._cached = None

    def train(self, mode=True):
        self._forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args):
        self._forget()
        super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)


# ---------------------------------------------------------------------------------------------
# §4.1: VQGAN's encoder and decoder (Esser et al. 2021)


def group_norm(channels):
    """32 groups as in VQGAN; networks narrower than 128 keep at least four channels to a group."""
    return nn.GroupNorm(math.gcd(32, channels, max(1, channels // 4)), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, each after group norm and SiLU, around a shortcut."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    @property
    def last(self):
        return self.conv2

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        hidden = self.conv2(F.silu(self.norm2(hidden)))  # (B, out, H, W)
        return self.shortcut(x) + hidden


class AttentionBlock(nn.Module):
    """Single-head self-attention over positions, around a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    @property
    def last(self):
        return self.project

    def forward(self, x):
        query, key, value = self.query_key_value(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)  # (B, HW, C)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, HW, C)
        return x + self.project(attended.mT.reshape(x.shape))


class Downsample(nn.Module):
    """Half the resolution by a strided 3×3 convolution, padded on the right and below."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


def keep_variance(network):
    """Initialise convolutions to keep their input's variance, and residual branches to zero.

    torch's default shrinks the signal by √3 at each convolution, which costs a network of thirty its first
    hundreds of steps; the paper and VQGAN leave the choice open.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, (ResidualBlock, AttentionBlock)):
            nn.init.zeros_(module.last.weight)


class Encoder(nn.Module):
    """Image to continuous features, ẑ = E(x).

    Args:
        channels: width of the first level.
        multipliers: width of each level in units of `channels`; each level after the first halves
            the resolution, so (1, 1, 2, 2, 4) is f16.
        blocks: residual blocks a level.
        z_channels: channels of the output.
    """

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=256):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 3, padding=1)]
        width = channels
        for level, multiplier in enumerate(multipliers):
            lowest = level == len(multipliers) - 1
            for _ in range(blocks):
                layers.append(ResidualBlock(width, channels * multiplier))
                width = channels * multiplier
                if lowest:
                    layers.append(AttentionBlock(width))
            if not lowest:
                layers.append(Downsample(width))
        layers += [ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)]
        layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, z_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        keep_variance(self)

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] → (B, z_channels, h, w), h = H / 2^(levels − 1)."""
        return self.layers(x)


class Decoder(nn.Module):
    """Quantized features to an image, x̂ = G(z_q): the encoder's levels in reverse, one block more each."""

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=256):
        super().__init__()
        width = channels * multipliers[-1]
        layers = [nn.Conv2d(z_channels, width, 3, padding=1)]
        layers += [ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)]
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                layers.append(ResidualBlock(width, channels * multiplier))
                width = channels * multiplier
                if level == len(multipliers) - 1:
                    layers.append(AttentionBlock(width))
            if level > 0:
                layers.append(Upsample(width))
        self.layers = nn.Sequential(*layers, group_norm(width), nn.SiLU())
        self.to_image = nn.Conv2d(width, 3, 3, padding=1)  # apart: the adaptive weight compares gradients at its weight
        keep_variance(self)

    def forward(self, z_q):
        """(B, z_channels, h, w) → (B, 3, H, W), about [-1, 1] but not clamped; float32 under autocast."""
        hidden = self.layers(z_q)  # (B, channels, H, W)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.to_image(hidden.to(self.to_image.weight.dtype))


# ---------------------------------------------------------------------------------------------
# Losses: the adversary and the perceptual distance of VQ-GAN


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for each overlapping patch.

    Args:
        channels: width of the first layer.
        layers: strided convolutions; three see patches of 70×70 pixels.
    """

    def __init__(self, channels=64, layers=3):
        super().__init__()
        modules = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [nn.Conv2d(width, wider, 4, stride, padding=1, bias=False), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        """(B, 3, H, W) → (B, 1, H/8 − 2, W/8 − 2) logits, high for real patches."""
        return self.layers(x)


def hinge_loss(real_logits, fake_logits):
    """Discriminator's loss, ½ [max(0, 1 − D(x)) + max(0, 1 + D(x̂))] averaged over patches → ()."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def adaptive_weight(x_hat, last_weight, reconstruction_gradient, adversarial_gradient):
    """λ = ‖∇L_rec‖ / (‖∇L_GAN‖ + 1e-4) at the decoder's last layer, at most 1e4 (VQGAN Eq. 7).

    Args:
        x_hat: (B, 3, H, W) reconstruction, still attached to its graph.
        last_weight: the weight that produced it.
        reconstruction_gradient, adversarial_gradient: (B, 3, H, W) gradients of both losses at
            x_hat. Taken there once, they serve both λ and the generator's own backward pass.
    Returns:
        () float32, without gradient.
    """
    norms = []
    for gradient in (reconstruction_gradient, adversarial_gradient):
        (at_weight,) = torch.autograd.grad(x_hat, last_weight, gradient, retain_graph=True)
        norms.append(at_weight.float().norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 (Zhang et al. 2018) on a frozen torchvision trunk.

    Features of seven or five layers are normalised to unit length over channels, their squared
    differences weighted by published non-negative 1×1 heads, and averaged over positions.

    Args:
        trunk: "vgg" (VGG-16, the paper's) or "squeeze" (SqueezeNet 1.1, light).
        trunk_state: torchvision's ImageNet state dict; None leaves random weights.
        head_state: published heads, keys `lin{i}.model.1.weight`; None weights channels equally.
    """

    TAPS = {"vgg": (3, 8, 15, 22, 29), "squeeze": (1, 4, 7, 9, 10, 11, 12)}  # indices into `features`

    def __init__(self, trunk="vgg", trunk_state=None, head_state=None):
        super().__init__()
        self.taps = self.TAPS[trunk]
        network = {"vgg": torchvision.models.vgg16, "squeeze": torchvision.models.squeezenet1_1}[trunk](weights=None)
        if trunk_state is not None:
            network.load_state_dict(trunk_state)
        self.features = network.features[: self.taps[-1] + 1]
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.heads = nn.ModuleList()
        widths = {"vgg": (64, 128, 256, 512, 512), "squeeze": (64, 128, 256, 384, 384, 512, 512)}[trunk]
        for i, width in enumerate(widths):
            head = nn.Conv2d(width, 1, 1, bias=False)
            nn.init.constant_(head.weight, 1.0 / width)
            if head_state is not None:
                head.load_state_dict({"weight": head_state[f"lin{i}.model.1.weight"]})
            self.heads.append(head)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Frozen: always in evaluation mode."""
        return super().train(False)

    @staticmethod
    def _difference(x, y, head):
        """Two (B, C, H, W) features → (B,); in float32, as nearly equal directions are subtracted."""
        with torch.autocast(x.device.type, enabled=False):
            difference = F.normalize(x.float(), dim=1, eps=1e-10) - F.normalize(y.float(), dim=1, eps=1e-10)
            return head(difference.square()).mean(dim=(1, 2, 3))

    def forward(self, x, y):
        """Two (B, 3, H, W) images in [-1, 1] → (B,) distances ≥ 0, differentiable in both."""
        x, y = (x - self.shift) / self.scale, (y - self.shift) / self.scale
        distance, tap = 0.0, 0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.taps:
                distance = distance + self._difference(x, y, self.heads[tap])
                tap += 1
        return distance


# ---------------------------------------------------------------------------------------------
# §3.3 step 3: the model


def option(default, reason, **more):
    """A dataclass field whose `reason` becomes the help of its command-line flag."""
    return field(default=default, metadata={"help": reason, **more})


@dataclass
class ModelConfig:
    """Shape of the network and origin of its codes; the defaults are the paper's f16 network."""

    resolution: int = option(256, "pixels a side; the paper resizes every data set to 256")
    channels: int = option(128, "width of the first level of encoder and decoder (VQGAN)")
    multipliers: tuple = option((1, 1, 2, 2, 4), "width of each level; levels − 1 halvings, so five levels are f16")
    blocks: int = option(2, "residual blocks a level (VQGAN)")
    z_channels: int = option(256, "channels between network and codes (VQGAN)")
    code_dim: int = option(256, "channels of all codes of a position together; the paper splits them between its codebooks")
    codes: str = option(
        "words",
        "where codes start: the prior's word vectors, random vectors, or VQ-VAE's small uniform ones",
        choices=("words", "random", "uniform"),
    )
    codebooks: int = option(2, "2: adjectives and nouns apart (MCB); 1: together (SCB), or no prior at all", choices=(1, 2))
    codebook_size: int = option(0, "codes when there is no prior; 0 takes the prior's adjectives and nouns")
    trained: bool = option(False, "train the starting vectors themselves")
    transfer: str = option(
        "gcn", "how vectors become codes: graph convolutions, the same layers without graph, or not at all", choices=("gcn", "mlp", "none")
    )
    transfer_layers: int = option(3, "layers of the transfer network (paper: three)")
    transfer_width: int = option(512, "features of its hidden layers; the width of CLIP's token vectors")
    beta: float = option(0.25, "weight of the commitment term of Eq. 2")


class Output(NamedTuple):
    """What a forward pass gives."""

    x_hat: torch.Tensor  # (B, 3, H, W) reconstruction, not clamped
    indices: torch.Tensor  # (B, M, h, w) int64 codes, M codebooks
    quantizer_loss: torch.Tensor  # () codebook and commitment terms of Eq. 2, summed over codebooks


class VQModel(nn.Module):
    """Encoder, codebooks and decoder: (ẑ_a, ẑ_n) = E(x), each quantized by its own codebook (step 3).

    Args:
        config: a ModelConfig.
        prior: mapping with `adjective_vectors` (Na, d), `noun_vectors` (Nn, d) and `edges` (E, 2) of
            adjective and noun index, as prior.py writes; may be None when `codebook_size` is set.
    Raises:
        ValueError: if the resolution does not divide, or the choice of codes needs a missing prior.
    """

    def __init__(self, config, prior=None):
        super().__init__()
        factor = 2 ** (len(config.multipliers) - 1)
        if config.resolution % factor or config.resolution < factor:
            raise ValueError(f"resolution {config.resolution} is not a multiple of {factor}, the network's downsampling factor")
        self.config = config
        self.codebook = make_codebook(config, prior)
        self.code_dim = self._code_dim()
        total = self.code_dim * len(self.codebook.sizes)
        shape = (config.channels, tuple(config.multipliers), config.blocks, config.z_channels)
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.to_codes = nn.Conv2d(config.z_channels, total, 1)
        self.from_codes = nn.Conv2d(total, config.z_channels, 1)
        keep_variance(self.to_codes), keep_variance(self.from_codes)
        self.quantizers = nn.ModuleList(VectorQuantizer(config.beta) for _ in self.codebook.sizes)

    def _code_dim(self):
        transfer = self.codebook.transfer
        return self.codebook.vectors.shape[1] if transfer is None else transfer.layers[-1].weight.shape[1]

    @property
    def grid(self):
        """(h, w) positions of an image's tokens."""
        side = self.config.resolution // 2 ** (len(self.config.multipliers) - 1)
        return side, side

    def features(self, x):
        """(B, 3, H, W) → a tuple of (B, D, h, w) continuous features, one for each codebook."""
        return self.to_codes(self.encoder(x)).chunk(len(self.codebook.sizes), dim=1)

    def decode_features(self, z_q):
        """Sequence of (B, D, h, w) quantized features → (B, 3, H, W)."""
        z_q = torch.cat(tuple(z_q), dim=1).to(self.from_codes.weight.dtype)  # (B, M D, h, w)
        return self.decoder(self.from_codes(z_q))

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] → Output."""
        quantized = [quantizer(z, codebook) for quantizer, z, codebook in zip(self.quantizers, self.features(x), self.codebook())]
        z_q, indices, losses = zip(*quantized)
        return Output(self.decode_features(z_q), torch.stack(indices, dim=1), sum(losses))

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] → (B, M, h, w) int64 indices, those of `forward`."""
        quantized = zip(self.quantizers, self.features(x), self.codebook())
        return torch.stack([quantizer.indices(z, codebook) for quantizer, z, codebook in quantized], dim=1)

    def decode(self, indices):
        """(B, M, h, w) int64 → (B, 3, H, W); in evaluation mode what `forward` gives for these codes."""
        codes = zip(self.codebook(), indices.unbind(1))
        return self.decode_features([F.embedding(index, codebook).movedim(-1, 1) for codebook, index in codes])


def needs_prior(config):
    """Whether a ModelConfig's codes depend on a prior: its words, its graph or its sizes."""
    return config.codes == "words" or config.transfer == "gcn" or not config.codebook_size


def make_codebook(config, prior=None):
    """The Codebook that a ModelConfig describes; see VQModel for its arguments and errors."""
    if needs_prior(config) and prior is None:
        raise ValueError(f"codes from '{config.codes}' with transfer '{config.transfer}' need a prior of adjectives and nouns")
    if needs_prior(config):
        words = torch.cat([torch.as_tensor(prior[f"{part}_vectors"], dtype=torch.float32) for part in ("adjective", "noun")])
        sizes = (len(prior["adjective_vectors"]), len(prior["noun_vectors"]))
        sizes = sizes if config.codebooks == 2 else (sum(sizes),)
    else:
        words, sizes = None, (config.codebook_size,) * config.codebooks
    dim = config.code_dim // len(sizes)
    input_dim = dim if config.transfer == "none" or words is None else words.shape[1]
    if config.codes == "words":
        # Language models differ in scale a hundredfold; the layers' initialisation assumes entries of about one.
        vectors = words if config.transfer == "none" else words / words.square().mean().sqrt().clamp_min(1e-12)
    elif config.codes == "random":
        vectors = torch.randn(sum(sizes), input_dim)
    else:  # van den Oord et al.'s common initialisation, ±1/K within each codebook
        vectors = torch.cat([torch.empty(size, input_dim).uniform_(-1 / size, 1 / size) for size in sizes])
    transfer = None
    if config.transfer != "none":
        widths = (vectors.shape[1], *(config.transfer_width,) * (config.transfer_layers - 1), dim)
        adjacency = nn.Identity()
        if config.transfer == "gcn":
            first_noun = len(prior["adjective_vectors"])
            edges = torch.as_tensor(prior["edges"], dtype=torch.int64).reshape(-1, 2) + torch.tensor([0, first_noun])
            adjacency = NormalizedAdjacency(edges, sum(sizes))
        transfer = CodebookTransfer(widths, adjacency)
    return Codebook(vectors, sizes, config.trained, transfer)


# ---------------------------------------------------------------------------------------------
# Show the work: python vqct.py


def main():
    """Print the paper's network, and Eq. 3, 1 and 2 on a graph small enough to check by hand."""
    x = torch.randn(1, 3, 64, 64)
    encoder, decoder, discriminator = Encoder(), Decoder(), Discriminator()
    z = encoder(x)
    print("the f16 network on one 64×64 image, 16×16 positions at the paper's 256×256")
    for network, before, after in ((encoder, x, z), (decoder, z, decoder(z)), (discriminator, x, discriminator(x))):
        weights = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(f"  {type(network).__name__:14} {tuple(before.shape)!s:18} → {tuple(after.shape)!s:18} {weights:6.1f} M weights")
    print("\nEq. 3 on adjectives {orange, sharp} and nouns {breast, beak}; orange breast, orange beak, sharp beak")
    adjacency = NormalizedAdjacency([(0, 2), (0, 3), (1, 3)], 4)
    layer, vectors = GraphConvolution(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    nn.init.eye_(layer.weight)
    print(f"  degrees with self-loops 3, 2, 2, 3; Â =\n{adjacency(torch.eye(4))}")
    codes = F.relu(layer(vectors, adjacency)).detach()
    print(f"  one convolution with W = I of P = {vectors.tolist()}:\n{codes}")
    feature = torch.tensor([[1.0, 0.5]])
    distance = (feature - codes[:2]).square().sum(1)
    index = nearest_code(feature, codes[:2])
    print(f"Eq. 1: ẑ = {feature[0].tolist()} lies {distance.tolist()} from the adjective codes: s = {index.item()}")
    _, _, loss = VectorQuantizer(beta=0.25)(feature.view(1, 2, 1, 1), codes[:2])
    print(f"Eq. 2: codebook and commitment terms 1.25 × {distance.min().item():.4f} / 2 = {loss.item():.4f}")


if __name__ == "__main__":
    main()
