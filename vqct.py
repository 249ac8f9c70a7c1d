"""VQCT (CVPR 2024): every network of the paper, in the paper's order:

    §3.1         Eq. 1       nearest_code         the code nearest to each feature
                 Eq. 2       VectorQuantizer      codebook and commitment terms
    §3.3 step 2  Â           NormalizedAdjacency  of the modifying graph
                 Eq. 3       GraphConvolution, CodebookTransfer
    §3.3 step 3  (C_a, C_n)  Codebook, VQModel    each codebook has half of the channels
    §4.1         E, G        Encoder, Decoder     VQGAN's network
                 its losses  Discriminator, hinge_loss, adaptive_weight, LPIPS
    Tables 1, 6  baselines   GumbelQuantizer, ClusteredQuantizer, RegularizedQuantizer
    Tables 1–6   systems     ModelConfig, make_quantizer, make_codebook
    §4.4         stage two   TokenTransformer, sample_tokens; Denoiser, sample_features
                 VQGAN's published weights: load_taming

`prior.py` makes the words, vectors and graph. train.py has Eq. 2's pixel term and the
training step. To see Eq. 3, 1 and 2 worked on four words:

    python vqct.py
"""

import math
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

# ======== §3.1: Eq. 1 and 2

@torch.no_grad()
def nearest_code(z, codebook, neighbours=1):
    """Eq. 1, s_i = argmin_k ‖ẑ_i − e_k‖²: the index of the code nearest to each feature.

    z: (N, D) features; codebook: (K, D) codes, K ≥ 1.
    Returns (N,) int64, or (neighbours, N), nearest first. Ties are broken arbitrarily.

    ‖ẑ − e‖² = ‖ẑ‖² + 2 (½‖e‖² − ẑ·e), so the nearest code has the least score ½‖e‖² − ẑ·e.
    Scores are computed in chunks of at most 2²² numbers, in one buffer. They are float32, or
    float64 if an argument is. Features and codes are first shifted by `origin_of(codes)`, so
    that rounding hardly moves the choice. Codes that are not finite come last.
    """
    dtype = torch.promote_types(z.dtype, codebook.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        codes = codebook.to(dtype)
        origin = origin_of(codes)  # (D,)
        codes = codes - origin  # (K, D)
        half_norms = codes.square().sum(1) / 2  # (K,), ½‖e‖²
        finite = half_norms.isfinite()  # (K,)
        half_norms.masked_fill_(~finite, torch.inf)
        codes.masked_fill_(~finite[:, None], 0)

        indices = torch.empty(neighbours, len(z), dtype=torch.int64, device=z.device)
        chunk = max(1, 2**22 // len(codes))
        buffer = codes.new_empty(min(chunk, len(z)), len(codes))
        for features, chosen in zip(z.split(chunk), indices.split(chunk, dim=1)):
            scores = buffer[: len(features)]  # (chunk, K), ½‖e‖² − ẑ·e
            torch.addmm(half_norms, features - origin, codes.T, alpha=-1, out=scores)
            for nearest in chosen:  # (chunk,) filled with the nearest, then the second nearest
                torch.argmin(scores, 1, out=nearest)
                scores.scatter_(1, nearest[:, None], torch.finfo(dtype).max)
        return indices.squeeze(0)


def origin_of(codes):
    """(K, D) → (D,), the median of about a hundred codes, which outliers do not move."""
    sample = codes[:: len(codes) // 100 + 1].sort(0).values
    return sample[len(sample) // 2].nan_to_num(0, 0, 0)


def look_up(indices, codebook):
    """(B, n, H, W) int64, (K, D) → (B, D, H, W): at each position the mean of n codes."""
    return F.embedding(indices, codebook).mean(1).movedim(-1, 1)


class VectorQuantizer(nn.Module):
    """Eq. 1, and the last two terms of Eq. 2: ‖sg[ẑ] − z_q‖² + β ‖sg[z_q] − ẑ‖².

    Each term is a mean over elements. Only the first one trains the codebook, which may be a
    parameter or the output of a network.

    beta: β (0.25, van den Oord et al. 2017).
    beta_on: the term with β: "commitment", or "codebook", a bug of VQGAN's released code.
    neighbours: how many nearest codes are averaged.
    """

    def __init__(self, beta=0.25, beta_on="commitment", neighbours=1):
        super().__init__()
        self.neighbours = neighbours
        self.codebook_weight = beta if beta_on == "codebook" else 1.0
        self.commitment_weight = beta if beta_on == "commitment" else 1.0

    @torch.no_grad()
    def indices(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → (B, n, H, W) int64, n neighbours by Eq. 1."""
        features = z.movedim(1, -1).flatten(0, -2)  # (B H W, D)
        nearest = nearest_code(features, codebook, self.neighbours)
        return nearest.view(self.neighbours, len(z), *z.shape[2:]).movedim(0, 1)

    def forward(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → z_q (B, D, H, W), indices (B, n, H, W), loss ().

        In training, z_q carries the decoder's gradient straight through to z. In
        evaluation, z_q is exactly the code. Features and their codes become almost equal,
        so all is at least float32, even under autocast.
        """
        with torch.autocast(z.device.type, enabled=False):
            codebook = precise(codebook)
            z = z.to(codebook.dtype)
            return self.quantize(z, codebook, self.indices(z, codebook))

    def quantize(self, z, codebook, indices):
        """z_q, indices and loss as `forward` returns them, for given indices."""
        z_q = look_up(indices, codebook)  # (B, D, H, W)
        codebook_term = F.mse_loss(z_q, z.detach())  # ‖sg[ẑ] − z_q‖²
        commitment_term = F.mse_loss(z, z_q.detach())  # ‖sg[z_q] − ẑ‖²
        loss = self.codebook_weight * codebook_term + self.commitment_weight * commitment_term
        if self.training:
            z_q = z + (z_q - z).detach()
        return z_q, indices, loss


# ======== §3.3 step 2: the modifying graph, and Eq. 3 along it

class NormalizedAdjacency(nn.Module):
    """Â = D^{-1/2} (A + I) D^{-1/2} of an undirected graph, sparse (Kipf & Welling 2017).

    VQCT's nodes are the Na adjectives and then the nouns, so noun j is node Na + j.

    edges: (E, 2) int64 nodes. Repeats count once, as the paper's A is binary.
    nodes: number of nodes N.
    weights: (E,) entries of A instead, where repeats are summed.
    Raises RuntimeError if an edge names a node outside 0 … N−1.

    >>> NormalizedAdjacency([(0, 2), (1, 2)], nodes=3)(torch.eye(3)).diagonal()
    tensor([0.5000, 0.5000, 0.3333])
    """

    def __init__(self, edges, nodes, weights=None):
        super().__init__()
        with torch.device("cpu"):  # on "meta" the number of entries would be unknown
            edges = torch.as_tensor(edges, dtype=torch.int64, device="cpu").reshape(-1, 2)
            loops = torch.arange(nodes)[:, None].expand(-1, 2)
            index = torch.cat([edges, edges.flip(1), loops]).T  # (2, 2E + N)
            ones = torch.ones(len(edges))
            entries = ones if weights is None else torch.as_tensor(weights, device="cpu")
            entries = torch.cat([entries, entries, torch.ones(nodes)]).double()
            matrix = torch.sparse_coo_tensor(
                index, entries, (nodes, nodes), check_invariants=True
            ).coalesce()  # A + I
            row, column = matrix.indices()
            value = torch.ones_like(matrix.values()) if weights is None else matrix.values()
            degree = torch.zeros(nodes).double().index_add_(0, row, value)
            value = value * degree[row].rsqrt() * degree[column].rsqrt()
            row_start = F.pad(row.bincount(minlength=nodes).cumsum(0), (1, 0))
        device = torch.get_default_device()
        self.register_buffer("row_start", row_start.to(device))  # (N + 1,)
        self.register_buffer("column", column.to(device))  # (2E + N,)
        self.register_buffer("value", value.to(device, torch.get_default_dtype()))

    def forward(self, nodes):
        """(N, D) → Â nodes, (N, D)."""
        value = self.value.to(nodes.dtype)
        return SymmetricProduct.apply(self.row_start, self.column, value, nodes)


class SymmetricProduct(torch.autograd.Function):
    """Â H for a constant symmetric Â in compressed rows.

    A row of Â H is a weighted sum of rows of H: an embedding bag, which is faster than
    torch's sparse matrices. The bag's own backward pass takes four times as long and has no
    derivative. But the product is its own derivative.
    """

    @staticmethod
    def forward(ctx, row_start, column, value, nodes):
        ctx.save_for_backward(row_start, column, value)
        bag = dict(mode="sum", per_sample_weights=value, include_last_offset=True)
        return F.embedding_bag(column, nodes, row_start, **bag)

    @staticmethod
    def backward(ctx, gradient):
        product = SymmetricProduct.apply(*ctx.saved_tensors, gradient.contiguous())
        return None, None, None, product


class GraphConvolution(nn.Module):
    """Â H W, one layer of Eq. 3 before its activation."""

    def __init__(self, in_features, out_features):
        super().__init__()
        # He initialisation: before a ReLU, and if Â = I, the input's scale is kept.
        weight = torch.randn(in_features, out_features) * math.sqrt(2 / in_features)
        self.weight = nn.Parameter(weight)

    def forward(self, nodes, adjacency):
        """nodes: (N, in), adjacency: a function (N, D) → (N, D) → (N, out)."""
        # Â is cheaper on the narrower side. If the nodes need no gradient, Â comes first,
        # and then needs no backward pass.
        in_features, out_features = self.weight.shape
        if in_features < out_features or not nodes.requires_grad:
            return adjacency(nodes) @ self.weight
        return adjacency(nodes @ self.weight)


class CodebookTransfer(nn.Module):
    """Eq. 3, the codebook transfer network: H ← ReLU(Â H W), three times.

    widths: (d, …, D) features of the word vectors, hidden layers and codes.
    adjacency: a NormalizedAdjacency; `nn.Identity()` makes the MLP of Tables 2 and 3.
    last_relu: whether a ReLU follows the last layer, as in Eq. 3.
    dropout: share of hidden features zeroed in training.

    >>> adjacency = NormalizedAdjacency([(0, 2), (0, 3), (1, 3)], nodes=4)
    >>> CodebookTransfer((300, 512, 512, 64), adjacency)(torch.randn(4, 300)).shape
    torch.Size([4, 64])
    """

    def __init__(self, widths, adjacency, last_relu=True, dropout=0.0):
        super().__init__()
        self.adjacency = adjacency
        self.layers = nn.ModuleList(map(GraphConvolution, widths[:-1], widths[1:]))
        self.last_relu = last_relu
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes):
        """(N, d) word vectors of the graph's nodes → (N, D) codes."""
        for layer in self.layers[:-1]:
            nodes = F.relu(layer(nodes, self.adjacency))  # (N, hidden)
            nodes = self.dropout(nodes)
        nodes = self.layers[-1](nodes, self.adjacency)  # (N, D)
        return F.relu(nodes) if self.last_relu else nodes


# ======== §3.3 step 3: two codebooks

class Codebook(nn.Module):
    """The codes of all codebooks, which are vectors or what a network makes of them.

    vectors: (ΣK, d) word vectors, or starting codes; trained: whether they are parameters.
    sizes: (K_1, …) number of codes of each codebook, (adjectives, nouns) in VQCT.
    transfer: a module (ΣK, d) → (ΣK, D), or None if the vectors are the codes.
    """

    def __init__(self, vectors, sizes, trained=False, transfer=None):
        super().__init__()
        self.sizes = tuple(sizes)
        if trained:
            self.vectors = nn.Parameter(vectors.clone())
        else:
            self.register_buffer("vectors", vectors.clone())
        self.transfer = transfer
        self.register_buffer("frozen", None, persistent=False)  # (ΣK, D), see `freeze`

    def forward(self):
        """→ a tuple of (K_i, D) codebooks."""
        if self.frozen is not None:
            return self.frozen.split(self.sizes)
        with torch.autocast(self.vectors.device.type, enabled=False):
            codes = self.vectors if self.transfer is None else self.transfer(self.vectors)
            return codes.split(self.sizes)

    @torch.no_grad()
    def freeze(self):
        """Keep the codes as they are now, until `train()` or `load_state_dict`."""
        self.frozen = None
        self.frozen = torch.cat(self())

    def train(self, mode=True):
        """The module itself. Training drops frozen codes."""
        self.frozen = None if mode else self.frozen
        return super().train(mode)

    def _load_from_state_dict(self, *arguments):
        self.frozen = None
        super()._load_from_state_dict(*arguments)


class UnitLength(nn.Module):
    """ℓ2-normalised codes and features, as in ViT-VQGAN (Yu et al. 2022)."""

    def forward(self, x):
        """(N, D, …) → the same, of unit length along D, at least float32."""
        return F.normalize(precise(x), dim=1)


class Output(NamedTuple):
    """The results of VQModel's forward pass."""

    x_hat: torch.Tensor  # (B, 3, H, W) reconstruction, not clamped
    indices: torch.Tensor  # (B, M, h, w) int64
    quantizer_loss: torch.Tensor  # (), Eq. 2's last terms, summed over codebooks


class VQModel(nn.Module):
    """Encoder, codebooks and decoder: (ẑ_a, ẑ_n) = E(x), each with its own codebook.

    A position has M tokens: one for each codebook, or more where neighbours are averaged.

    prior: a mapping with `adjective_vectors` (Na, d), `noun_vectors` (Nn, d), `edges` (E, 2)
        of adjective and noun index, and `edge_counts` (E,) for weighted edges; or None if
        not `needs_prior(config)`.
    Raises ValueError for a missing prior, or choices that exclude each other.
    """

    def __init__(self, config, prior=None):
        super().__init__()
        self.config = config
        factor = 2 ** (len(config.multipliers) - 1)
        if config.resolution % factor:
            raise ValueError(f"resolution {config.resolution} is not a multiple of {factor}")
        side = config.resolution // factor
        self.grid = side, side  # (h, w) positions of an image
        self.codebook = make_codebook(config, prior)
        sizes = self.codebook.sizes
        self.code_dim = config.code_dim // len(sizes)  # D
        if config.transfer in ("none", "unit"):
            self.code_dim = self.codebook.vectors.shape[1]
        network = config.channels, config.multipliers, config.blocks, config.z_channels
        self.encoder = Encoder(*network)
        self.decoder = Decoder(*network)
        self.to_codes = nn.Conv2d(config.z_channels, len(sizes) * self.code_dim, 1)
        self.from_codes = nn.Conv2d(len(sizes) * self.code_dim, config.z_channels, 1)
        keep_variance(self.to_codes)
        keep_variance(self.from_codes)
        self.scale = UnitLength() if config.transfer == "unit" else nn.Identity()
        neighbours = [config.adjective_neighbours, 1] if len(sizes) == 2 else [1]
        self.quantizers = nn.ModuleList(
            make_quantizer(config, self.code_dim, size, count)
            for size, count in zip(sizes, neighbours)
        )
        self.sizes = self.per_token(sizes)  # number of codes for each of the M tokens

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] → Output."""
        inputs = zip(self.quantizers, self.features(x), self.codebook())
        outputs = [quantizer(z, codebook) for quantizer, z, codebook in inputs]
        z_q, indices, losses = zip(*outputs)  # (B, D, h, w), (B, n, h, w), () each
        # A loss is a mean over its own channels, so two codebooks weigh twice as much as one.
        return Output(self.decode_features(z_q), torch.cat(indices, dim=1), sum(losses))

    def features(self, x):
        """(B, 3, H, W) → a tuple of (B, D, h, w) continuous features for each codebook."""
        features = self.to_codes(self.encoder(x))  # (B, ΣD, h, w)
        return tuple(map(self.scale, features.chunk(len(self.codebook.sizes), dim=1)))

    def decode_features(self, z_q):
        """(B, D, h, w) quantized features for each codebook → (B, 3, H, W)."""
        z_q = torch.cat(tuple(z_q), dim=1)  # (B, ΣD, h, w)
        return self.decoder(self.from_codes(z_q.to(self.from_codes.weight.dtype)))

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] → (B, M, h, w) int64 indices, those of `forward`."""
        return self.nearest_indices(self.features(x))

    def nearest_indices(self, features):
        """(B, D, h, w) continuous features for each codebook → (B, M, h, w) int64."""
        inputs = zip(self.quantizers, features, self.codebook())
        indices = [quantizer.indices(z, codebook) for quantizer, z, codebook in inputs]
        return torch.cat(indices, dim=1)

    def decode(self, indices):
        """(B, M, h, w) int64 → (B, 3, H, W), equal to `forward` in evaluation mode."""
        return self.decode_features(map(look_up, self.by_codebook(indices), self.codebook()))

    def per_token(self, values):
        """One value for each codebook → a list of one for each of the M tokens."""
        values = [[x] * each.neighbours for x, each in zip(values, self.quantizers)]
        return sum(values, [])

    def by_codebook(self, indices):
        """(B, M, h, w) → a tuple of (B, n, h, w), the n indices for each codebook."""
        return indices.split([quantizer.neighbours for quantizer in self.quantizers], dim=1)

    def anneal(self, progress):
        """Set the temperature at a progress of 0 … 1, by a cosine from 1 to its end."""
        end = self.config.temperature_end
        share = 0.5 + 0.5 * math.cos(math.pi * progress)
        for quantizer in self.quantizers:
            quantizer.temperature = end + (1 - end) * share


# ======== §4.1: VQGAN's encoder and decoder (Esser et al. 2021)

class GroupNorm(nn.GroupNorm):
    """32 groups as in VQGAN, or the largest power of two that divides the channels.

    Autocast would store float32 copies; the kernel's statistics are float32 anyway.
    """

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, x):
        """(B, C, …) → the same, in the type of x."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, each after group norm and SiLU, around a shortcut."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        hidden = self.conv2(F.silu(self.norm2(hidden)))  # (B, out, H, W)
        return self.shortcut(x) + hidden


class AttentionBlock(nn.Module):
    """Single-head self-attention over positions, around a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        joined = self.query_key_value(self.norm(x)).flatten(2).mT  # (B, HW, 3C)
        query, key, value = joined.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, HW, C)
        return x + self.project(attended.mT.reshape(x.shape))


def level_layers(name, in_channels, channels, blocks, attends):
    """{name: layer} of the residual blocks of a level; if it attends, attention after each."""
    layers = {}
    for block in range(blocks):
        layers[f"{name}-block-{block}"] = ResidualBlock(in_channels, channels)
        in_channels = channels
        if attends:
            layers[f"{name}-attn-{block}"] = AttentionBlock(channels)
    return layers


def middle(width):
    """{name: layer} between the lowest levels, the same in encoder and decoder."""
    return {
        "mid-block_1": ResidualBlock(width, width),
        "mid-attn_1": AttentionBlock(width),
        "mid-block_2": ResidualBlock(width, width),
    }


def keep_variance(network):
    """Initialise convolutions to keep their input's variance, and residual branches to 0.

    torch's default divides it by 3 at each, which costs 2 dB on CUB after 300 steps.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "project")):  # the last of a residual branch
                nn.init.zeros_(module.weight)


class Encoder(nn.Module):
    """ẑ = E(x), an image to continuous features.

    channels, multipliers, blocks, z_channels: as of ModelConfig. Each level after the first
    halves the resolution.
    """

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=256):
        super().__init__()
        # Layers are named as in taming-transformers, with - instead of a dot.
        layers = OrderedDict(conv_in=nn.Conv2d(3, channels, 3, padding=1))
        width = channels
        lowest = len(multipliers) - 1
        for level, multiplier in enumerate(multipliers):
            wider = channels * multiplier
            layers |= level_layers(f"down-{level}", width, wider, blocks, level == lowest)
            width = wider
            if level < lowest:
                pad = nn.ZeroPad2d((0, 1, 0, 1))  # on the right and below
                convolution = nn.Conv2d(width, width, 3, stride=2)
                layers[f"down-{level}-downsample"] = nn.Sequential(pad, convolution)
        layers |= middle(width)
        layers["norm_out"] = GroupNorm(width)
        layers["silu"] = nn.SiLU()
        layers["conv_out"] = nn.Conv2d(width, z_channels, 3, padding=1)
        self.layers = nn.Sequential(layers)
        keep_variance(self)

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] → (B, z_channels, h, w), h = H / 2^(levels − 1)."""
        return self.layers(x)


class Decoder(nn.Module):
    """x̂ = G(z_q): the encoder's levels in reverse, with one more block each."""

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=256):
        super().__init__()
        width = channels * multipliers[-1]
        lowest = len(multipliers) - 1
        layers = OrderedDict(conv_in=nn.Conv2d(z_channels, width, 3, padding=1))
        layers |= middle(width)
        for level in range(lowest, -1, -1):
            narrower = channels * multipliers[level]
            layers |= level_layers(f"up-{level}", width, narrower, blocks + 1, level == lowest)
            width = narrower
            if level > 0:
                double = nn.Upsample(scale_factor=2)  # by nearest neighbour
                convolution = nn.Conv2d(width, width, 3, padding=1)
                layers[f"up-{level}-upsample"] = nn.Sequential(double, convolution)
        layers["norm_out"] = GroupNorm(width)
        layers["silu"] = nn.SiLU()
        self.layers = nn.Sequential(layers)
        # Apart from the others, as the adaptive weight compares gradients at its weight.
        self.to_image = nn.Conv2d(width, 3, 3, padding=1)
        keep_variance(self)

    def forward(self, z_q):
        """(B, z_channels, h, w) → (B, 3, H, W), about [-1, 1], float32 under autocast."""
        hidden = self.layers(z_q)  # (B, channels, H, W)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.to_image(hidden.to(self.to_image.weight.dtype))


# ======== §4.1: the adversary, and the perceptual distance

class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for each overlapping patch.

    Three inner layers give patches of 70 × 70 pixels.
    """

    def __init__(self, channels=64, layers=3):
        super().__init__()
        modules = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [
                nn.Conv2d(width, wider, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        modules.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*modules)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        """(B, 3, H, W) → (B, 1, H/8 − 2, W/8 − 2) logits for three layers, high if real."""
        return self.layers(x)


def hinge_loss(real_logits, fake_logits):
    """() loss of the discriminator, ½ [max(0, 1 − D(x)) + max(0, 1 + D(x̂))], by patch."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def adaptive_weight(x_hat, last_weight, reconstruction_gradient, adversarial_gradient):
    """() λ = ‖∇L_rec‖ / (‖∇L_GAN‖ + 1e-4), at most 1e4 (VQGAN's Eq. 7), a constant.

    x_hat: (B, 3, H, W) reconstruction, attached to its graph.
    last_weight: weight of the layer that produced it, where norms are taken.
    reconstruction_gradient, adversarial_gradient: (B, 3, H, W), of both losses at x_hat.
    """
    norms = []
    for gradient in (reconstruction_gradient, adversarial_gradient):
        (at_weight,) = torch.autograd.grad(x_hat, last_weight, gradient, retain_graph=True)
        norms.append(all_reduce(at_weight).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 (Zhang et al. 2018) on a frozen trunk.

    Features of several layers get unit length over channels. Their squared differences are
    weighted by 1×1 heads and averaged over positions.

    trunk: "vgg" (VGG-16, VQGAN's) or "squeeze" (SqueezeNet 1.1, light).
    trunk_state: state dict of torchvision's network, or None for random weights.
    head_state: that of the LPIPS repository (vgg.pth), or None for equal weights.

    >>> LPIPS("squeeze")(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    tensor([0., 0.])
    """

    TRUNKS = {  # network, the layers of its `features` to compare, and their channels
        "vgg": (torchvision.models.vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
        "squeeze": (torchvision.models.squeezenet1_1, (1, 4, 7, 9, 10, 11, 12),
                    (64, 128, 256, 384, 384, 512, 512)),
    }

    def __init__(self, trunk="vgg", trunk_state=None, head_state=None):
        super().__init__()
        make, self.taps, widths = self.TRUNKS[trunk]
        network = make(weights=None)
        if trunk_state is not None:
            network.load_state_dict(trunk_state)
        self.features = network.features[: self.taps[-1] + 1]
        self.heads = nn.ModuleList()
        for i, width in enumerate(widths):
            head = nn.Conv2d(width, 1, 1, bias=False)
            nn.init.constant_(head.weight, 1.0 / width)
            if head_state is not None:
                head.load_state_dict({"weight": head_state[f"lin{i}.model.1.weight"]})
            self.heads.append(head)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)  # no layer depends on the mode

    def forward(self, x, y):
        """Two (B, 3, H, W) images in [-1, 1] → (B,) distances, at least float32."""
        x = (x - self.shift) / self.scale
        y = (y - self.shift) / self.scale
        distance = 0.0
        heads = iter(self.heads)
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)  # (B, C, h, w)
            if i not in self.taps:
                continue
            with torch.autocast(x.device.type, enabled=False):
                unit_x, unit_y = (F.normalize(precise(z), eps=1e-10) for z in (x, y))
                head = next(heads).weight.to(unit_x.dtype)
                difference = F.conv2d((unit_x - unit_y).square(), head)  # (B, 1, h, w)
                distance = distance + difference.mean(dim=(1, 2, 3))
        return distance


# ======== Tables 1 and 6: the quantizers that VQCT is compared with

# To add one, write a class as these, a branch in `make_quantizer`, and its name among the
# choices of `ModelConfig.quantizer`. It needs methods
# forward(z, codebook) → z_q, indices, loss and indices(z, codebook), equal to those of
# `forward` in evaluation mode; and the attribute `neighbours`. VQModel sets `temperature`.

class GumbelQuantizer(nn.Module):
    """Gumbel-VQ: codes mixed by Gumbel-softmax weights, the likeliest code in evaluation.

    This is DALL-E's relaxation (Ramesh et al. 2021) as VQ-GAN uses it, except that VQ-GAN
    draws the code in evaluation too.

    dim: D, channels of ẑ; size: K, number of codes.
    kl_weight: of the loss KL(softmax(logits) ‖ uniform), a mean over positions.
    straight_through: hard weights forward and soft ones backward; otherwise soft both ways.
    """

    def __init__(self, dim, size, kl_weight=5e-4, straight_through=True):
        super().__init__()
        self.to_logits = nn.Conv2d(dim, size, 1)
        self.kl_weight, self.straight_through = kl_weight, straight_through
        self.neighbours, self.temperature = 1, 1.0

    def logits(self, z):
        """(B, D, H, W) → (B, K, H, W), without autocast."""
        with torch.autocast(z.device.type, enabled=False):
            return self.to_logits(z.to(self.to_logits.weight.dtype))

    def indices(self, z, codebook):
        """(B, D, H, W) → (B, 1, H, W) int64; the codebook is ignored."""
        return self.logits(z).argmax(1, keepdim=True)

    def forward(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → z_q, the likeliest indices (B, 1, H, W), loss ()."""
        logits = self.logits(z)
        with torch.autocast(z.device.type, enabled=False):
            log_share = logits.log_softmax(1)  # (B, K, H, W)
            divergence = (log_share.exp() * (log_share + math.log(logits.shape[1]))).sum(1)
            loss = self.kl_weight * divergence.mean()
            indices = logits.argmax(1, keepdim=True)
            if not self.training:
                return look_up(indices, codebook), indices, loss
            weights = F.gumbel_softmax(
                logits, self.temperature, self.straight_through, dim=1
            )
            return torch.einsum("bkhw,kd->bdhw", weights, codebook), indices, loss


@torch.no_grad()
def gumbel_argmax(logits, generator=None):
    """(…, K) → (…) int64 draws from softmax(logits), without synchronising a GPU."""
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits - noise).argmax(-1)


class ClusteredQuantizer(VectorQuantizer):
    """CVQ: online clustering (Zheng & Vedaldi 2023), which moves codes that are not chosen.

    Let n_k be the batch's share of code k. Each training pass updates

        N_k ← γ N_k + (1 − γ) n_k,    α_k = exp(−10 K N_k / (1 − γ) − 1e-3),
        e_k ← (1 − α_k) e_k + α_k ẑ_k.

    The anchor ẑ_k is a feature of the batch, drawn with probability softmax(−‖ẑ − e_k‖²)
    over features. The source's contrastive loss is left out. The codebook is written to, so
    it must be a leaf parameter or a view of one.

    size: K, number of codes; decay: γ; options: arguments of VectorQuantizer.
    """

    def __init__(self, size, decay=0.99, **options):
        super().__init__(**options)
        self.decay = decay
        self.register_buffer("usage", torch.zeros(size))  # N_k

    def quantize(self, z, codebook, indices):
        """As VectorQuantizer's. The codes move after the loss is taken."""
        z_q, indices, loss = super().quantize(z, codebook, indices)
        if self.training:
            features = z.detach().movedim(1, -1).flatten(0, -2)  # (N, D)
            self.re_anchor(features, indices, codebook.data)  # autograd saved no codes
        return z_q, indices, loss

    @torch.no_grad()
    def re_anchor(self, features, indices, codebook):
        """Move each code by α_k (ẑ_k − e_k), in place."""
        share = torch.zeros_like(self.usage)  # n_k; torch.bincount would wait for the GPU
        each = share.new_full((indices.numel(),), 1 / indices.numel())
        share.index_add_(0, indices.flatten(), each)
        self.usage.lerp_(all_reduce(share), 1 - self.decay)
        alpha = torch.exp(-10 * len(codebook) * self.usage / (1 - self.decay) - 1e-3)
        alpha = alpha[:, None].to(codebook.dtype)  # (K, 1)
        features = all_gather(features)
        chunk = max(1, 2**22 // len(features))  # at most 2²² distances
        for codes, amount in zip(codebook.split(chunk), alpha.split(chunk)):
            anchors = gumbel_argmax(-torch.cdist(codes, features).square())
            codes.lerp_(features[anchors], amount)
        if distributed():
            torch.distributed.broadcast(codebook, 0)  # each process drew other anchors


class RegularizedQuantizer(VectorQuantizer):
    """Reg-VQ: regularized quantization (Zhang et al. 2023), three terms in training.

    1. Prior distribution: KL(p̄ ‖ uniform), where p̄ is the mean over positions of the token
       distribution softmax(−‖ẑ − e_k‖² / τ), with τ the annealed `temperature`.
    2. Stochastic mask: a random share of positions takes a code drawn from it.
    3. Probabilistic contrastive loss: a softmax of cosines between a feature and the codes of
       all positions. The own code's term is multiplied by w = exp(‖e_drawn − e_nearest‖² /
       mean) ≥ 1, so a farther draw has a weaker gradient.

    The paper leaves open, and we chose: squared distances in the softmax; hard draws with
    the straight-through gradient; all constants; in 3, codes instead of VGG's features, w
    instead of the distance, and at most 1,024 evenly spread positions.

    kl_weight, contrastive_weight: weights of terms 1 and 3; mask_ratio: share of positions
    in 2; options: arguments of VectorQuantizer.
    """

    def __init__(self, kl_weight=0.1, mask_ratio=0.3, contrastive_weight=0.01, **options):
        super().__init__(**options)
        self.kl_weight, self.mask_ratio = kl_weight, mask_ratio
        self.contrastive_weight, self.temperature = contrastive_weight, 1.0

    def quantize(self, z, codebook, indices):
        """As VectorQuantizer's, of the drawn codes. The indices stay the nearest ones."""
        if not self.training:
            return super().quantize(z, codebook, indices)
        features = z.movedim(1, -1).flatten(0, -2)  # (N, D)
        nearest = indices.flatten()  # (N,)
        logits = -torch.cdist(features, codebook).square() / self.temperature  # (N, K)
        masked = torch.rand(len(nearest), device=z.device) < self.mask_ratio
        chosen = torch.where(masked, gumbel_argmax(logits), nearest)
        z_q, _, loss = super().quantize(z, codebook, chosen.view(indices.shape))
        loss = loss + self.kl_weight * self.divergence_from_uniform(logits)
        contrast = self.contrast(features, codebook, chosen, nearest)
        return z_q, indices, loss + self.contrastive_weight * contrast

    @staticmethod
    def divergence_from_uniform(logits):
        """(N, K) → () KL of the mean token distribution from uniform, nats."""
        mean = logits.softmax(1).mean(0)
        return (mean * (mean.clamp_min(1e-12) * len(mean)).log()).sum()

    @staticmethod
    def contrast(features, codebook, chosen, nearest, positions=1024, temperature=0.07):
        """(N, D), (K, D), (N,), (N,) → () cross-entropy of each position's own code."""
        count = min(positions, len(features))  # P
        order = torch.arange(count, device=features.device)
        spread = order * (len(features) - 1) // max(1, count - 1)
        features, chosen, nearest = features[spread], chosen[spread], nearest[spread]
        codes = codebook[chosen]  # (P, D)
        noise = (codes - codebook[nearest]).square().sum(1).detach()  # (P,)
        mean = noise.sum() / (noise > 0).sum().clamp_min(1)  # over drawn codes
        log_w = noise / mean.clamp_min(1e-12)  # (P,)
        cosine = F.normalize(features, dim=1) @ F.normalize(codes, dim=1).T  # (P, P)
        logits = cosine / temperature + log_w.diag()
        same = (chosen[:, None] == chosen).fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)  # the same code is no negative
        return F.cross_entropy(logits, order)


# ======== Tables 1 to 6: a system is a ModelConfig

def option(default, reason, **more):
    """A dataclass field with its help text.

    more: choices; bounds `least` (by default 1 for whole numbers, 0 for others) and `most`;
        `each`, the type of several values; `group`, the title of the flags in --help from
        this one on.
    """
    return field(default=default, metadata={"reason": reason, **more})


@dataclass
class ModelConfig:
    """Shape of the network and origin of its codes; defaults are the paper's f16 network."""

    resolution: int = option(256, "pixels per side (paper: 256)", least=24, group="network")
    channels: int = option(128, "width of the first level of encoder and decoder")
    multipliers: tuple = option(
        (1, 1, 2, 2, 4), "relative width of each level; five levels are f16")
    blocks: int = option(2, "residual blocks per level")
    z_channels: int = option(256, "channels between the network and the codes")
    code_dim: int = option(256, "channels of all codebooks together", least=2)
    codes: str = option(
        "words", "starting vectors: words; random: normal; uniform: −1/K to 1/K, as VQGAN",
        choices=("words", "random", "uniform"), group="codes")
    vector_scale: str = option(
        "rms", "word vectors are divided by their RMS, or kept", choices=("rms", "none"))
    codebooks: int = option(
        2, "2: one for adjectives, one for nouns; 1: one for both", choices=(1, 2))
    codebook_size: int = option(
        0, "size of codebooks without words; 0: the prior's numbers of words", least=0,
        most=2**24)
    trained: bool = option(False, "train the starting vectors, instead of freezing them")
    transfer: str = option(
        "gcn", "gcn: Eq. 3; mlp: no graph; linear: one layer; unit: unit length; none",
        choices=("gcn", "mlp", "linear", "unit", "none"))
    transfer_layers: int = option(3, "layers of the transfer network (authors' code: 2)")
    transfer_width: int = option(512, "features of its hidden layers")
    transfer_dropout: float = option(
        0.0, "dropout between its layers (authors' code: 0.5)", most=0.99)
    last_relu: bool = option(
        True, "ReLU after its last layer, as in Eq. 3 (authors' code: none)")
    weighted_edges: bool = option(False, "A counts occurrences of a pair (authors' code)")
    quantizer: str = option(
        "nearest", "nearest code (Eq. 1), Gumbel-VQ, CVQ or Reg-VQ",
        choices=("nearest", "gumbel", "cvq", "regvq"), group="quantizers")
    beta: float = option(0.25, "weight β of Eq. 2")
    beta_on: str = option(
        "commitment", "the term that β multiplies (authors' code: codebook)",
        choices=("commitment", "codebook"))
    adjective_neighbours: int = option(
        1, "nearest adjectives that are averaged (authors' code: 2)")
    kl_weight: float = option(
        5e-4, "gumbel, regvq: weight of the divergence from uniform codes")
    straight_through: bool = option(
        True, "gumbel: hard codes forward, soft weights backward")
    temperature_end: float = option(
        1 / 16, "gumbel, regvq: last temperature, after 1", least=1e-6)
    usage_decay: float = option(
        0.99, "cvq: decay γ of each code's running usage", most=0.9999)
    mask_ratio: float = option(0.3, "regvq: share of positions whose code is drawn", most=1)
    contrastive_weight: float = option(0.0, "regvq: weight of its contrastive loss")


SMALL = dict(resolution=64, channels=24, blocks=1, z_channels=64, code_dim=16, transfer_width=128)
NETWORKS = {  # preset → its departures from ModelConfig's defaults
    "f16": {},
    "tiny": dict(multipliers=(1, 1, 2, 4), **SMALL),  # f8, for photographs on a CPU
    "demo": dict(multipliers=(1, 1, 2), **SMALL),  # f4, for the built-in birds
}


def make_quantizer(config, dim, size, neighbours):
    """The quantizer of a ModelConfig, for a codebook of `size` codes of `dim` channels."""
    if neighbours > size or neighbours > 1 and config.quantizer != "nearest":
        raise ValueError(
            f"a mean of {neighbours} neighbours needs as many codes, and quantizer 'nearest'"
        )
    if config.quantizer == "gumbel":
        return GumbelQuantizer(dim, size, config.kl_weight, config.straight_through)
    options = dict(beta=config.beta, beta_on=config.beta_on, neighbours=neighbours)
    if config.quantizer == "cvq":
        if not config.trained or config.transfer != "none":
            raise ValueError("quantizer 'cvq' needs trained codes without transfer")
        return ClusteredQuantizer(size, config.usage_decay, **options)
    if config.quantizer == "regvq":
        weights = config.kl_weight, config.mask_ratio, config.contrastive_weight
        return RegularizedQuantizer(*weights, **options)
    if config.quantizer != "nearest":
        raise ValueError(f"no quantizer '{config.quantizer}'")
    return VectorQuantizer(**options)


def needs_prior(config):
    """Whether a ModelConfig's codes depend on a prior: its words, graph or sizes."""
    return config.codes == "words" or config.transfer == "gcn" or not config.codebook_size


def make_codebook(config, prior=None):
    """The Codebook of a ModelConfig; VQModel explains the arguments and errors."""
    words, sizes = None, (config.codebook_size,) * config.codebooks
    if needs_prior(config):
        if prior is None:
            raise ValueError("these codes need a prior")
        parts = prior["adjective_vectors"], prior["noun_vectors"]
        dtype = torch.get_default_dtype()
        words = torch.cat([torch.as_tensor(part, dtype=dtype) for part in parts])  # (ΣK, d)
        sizes = tuple(map(len, parts)) if config.codebooks == 2 else (len(words),)
    vectors = starting_vectors(config, words, sizes)
    transfer = make_transfer(config, prior, vectors.shape[1], sizes)
    return Codebook(vectors, sizes, config.trained, transfer)


def starting_vectors(config, words, sizes):
    """(ΣK, d) vectors where codes start; words: (ΣK, d), or None without a prior.

    Language models differ in scale a hundredfold, and the transfer assumes entries of about
    one. So word vectors are scaled here.
    """
    if config.codes == "words":
        rms = words.square().mean().sqrt().clamp_min(1e-12)
        return words / rms if config.vector_scale == "rms" else words
    width = config.code_dim // len(sizes)  # D
    if words is not None and config.transfer in ("gcn", "mlp"):
        width = words.shape[1]
    if config.codes == "random":
        scale = width**-0.5 if config.transfer == "linear" else 1.0
        return torch.randn(sum(sizes), width) * scale
    parts = [torch.empty(size, width).uniform_(-1 / size, 1 / size) for size in sizes]
    return torch.cat(parts)


def make_transfer(config, prior, width, sizes):
    """The module that turns vectors of `width` features into codes, or None."""
    code_dim = config.code_dim // len(sizes)
    if config.transfer == "none":
        return None
    if config.transfer == "unit":
        return UnitLength()
    if config.transfer == "linear":
        return nn.Linear(width, code_dim)
    adjacency = nn.Identity()
    if config.transfer == "gcn":
        edges = torch.as_tensor(prior["edges"], dtype=torch.int64, device="cpu").reshape(-1, 2)
        offset = edges.new_tensor([0, len(prior["adjective_vectors"])])  # nouns come second
        weights = prior["edge_counts"] if config.weighted_edges else None
        adjacency = NormalizedAdjacency(edges + offset, sum(sizes), weights)
    hidden = [config.transfer_width] * (config.transfer_layers - 1)
    widths = width, *hidden, code_dim
    return CodebookTransfer(widths, adjacency, config.last_relu, config.transfer_dropout)


# ======== §4.4: the second stage

class Block(nn.Module):
    """Pre-norm transformer block: attention over positions, then two linear layers.

    If `modulated`, a signal shifts, scales and gates both (DiT, Peebles & Xie 2023).
    """

    def __init__(self, width, heads, modulated=False, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=not modulated)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=not modulated)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        wide = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))
        self.modulation = None
        if modulated:
            self.modulation = nn.Sequential(nn.SiLU(), zero(nn.Linear(width, 6 * width)))

    def attend(self, x, causal, cache, start):
        """(B, T, W) → (B, T, W). With a cache (2, B, H, N, d) of keys and values, x is position
        `start` and attends to all before it.
        """
        joined = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = joined.permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        if cache is not None:
            stop = start + x.shape[1]
            cache[:, :, :, start:stop] = torch.stack([key, value])
            key, value = cache[:, :, :, :stop]  # (B, H, start + T, d)
            causal = False
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.dropout(self.project(attended.transpose(1, 2).flatten(2)))

    def forward(self, x, signal=None, causal=False, cache=None, start=0):
        """x: (B, T, W), signal: (B, 1 or T, W) if modulated → (B, T, W)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = 0, 0, 1, 0, 0, 1
        if self.modulation is not None:
            chunks = self.modulation(signal).chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        hidden = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attend(hidden, causal, cache, start)
        hidden = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(hidden))


def zero(layer):
    """The layer, with weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Positions(nn.Module):
    """Learned positions of a grid: a vector for each row plus one for each column."""

    def __init__(self, grid, width):
        super().__init__()
        self.row = nn.Parameter(0.02 * torch.randn(grid[0], 1, width))
        self.column = nn.Parameter(0.02 * torch.randn(1, grid[1], width))

    def forward(self):
        """→ (N, W), N = h w."""
        return (self.row + self.column).flatten(0, 1)


class Condition(nn.Module):
    """Features of what is given about an image: nothing, its class, or its label map.

    Convolutions show each position the labels around it, attention the whole label map.

    kind: "none", "class" or "segmentation"; count: number of classes or labels.
    grid, width, heads: as of TokenTransformer.
    """

    def __init__(self, kind, count, grid, width, heads=8):
        super().__init__()
        self.kind, self.count = kind, count
        self.absent = nn.Parameter(torch.zeros(width))  # instead of a missing condition
        if kind == "class":
            self.embedding = nn.Embedding(count, width)
        elif kind == "segmentation":
            first = nn.Conv2d(count, width, 3, padding=1)
            second = nn.Conv2d(width, width, 3, padding=1)
            self.embedding = nn.Sequential(first, nn.GELU(), second)
            self.positions = Positions(grid, width)
            self.block = Block(width, heads)
            zero(self.block.project)  # at first, only the surroundings count
            zero(self.block.mlp[2])

    def forward(self, known, batch, drop=None):
        """Condition of a batch → (B, 1 or N, W) features.

        known: (B,) int64 classes, −1 if unknown; or (B, L, h, w) shares of labels; or None.
        drop: (B,) bool, images whose condition is left out.
        """
        absent = self.absent.expand(batch, 1, -1)
        if self.kind == "none" or known is None:
            return absent
        if self.kind == "class":
            features = self.embedding(known.clamp_min(0))[:, None]  # (B, 1, W)
            drop = known < 0 if drop is None else drop | (known < 0)
        else:
            features = self.embedding(known).flatten(2).mT  # (B, N, W)
            features = self.block(features + self.positions())
        return features if drop is None else torch.where(drop[:, None, None], absent, features)


class TokenTransformer(nn.Module):
    """p(tokens | condition) in raster order (Esser et al. 2021, for one codebook).

    The tokens of the previous position enter together, as the sum of their embeddings. At
    each position, the adjective is predicted first, and then the noun given the adjective.

    sizes: number of codes for each of the M tokens of a position.
    grid: (h, w) positions, N in all; condition: a Condition of the same width.
    """

    def __init__(self, sizes, grid, condition, width=256, depth=6, heads=8, dropout=0.0):
        super().__init__()
        self.sizes, self.grid, self.width = tuple(sizes), tuple(grid), width
        self.condition, self.positions = condition, Positions(grid, width)
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(depth))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
            for _ in sizes
        )
        self.outputs = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)
        for layer in (*self.embeddings, *self.outputs):
            nn.init.normal_(layer.weight, std=0.04)

    def forward(self, tokens, known=None, drop=None):
        """(B, M, h, w) tokens → a list of M logits (B, N, K_i), given all tokens before."""
        tokens = tokens.flatten(2)  # (B, M, N)
        start = self.start.expand(len(tokens), 1, -1)  # (B, 1, W), before the first position
        previous = torch.cat([start, self.embed(tokens[:, :, :-1])], dim=1)  # (B, N, W)
        condition = self.condition(known, len(tokens), drop)  # (B, 1 or N, W)
        hidden = self.hidden(previous, condition)  # (B, N, W)
        return [self.logits(hidden, tokens, i) for i in range(len(self.sizes))]

    def embed(self, tokens):
        """(B, m ≤ M, T) tokens of T positions → (B, T, W), the sum of their embeddings."""
        pairs = zip(self.embeddings, tokens.unbind(1))
        return sum(embedding(index) for embedding, index in pairs)

    def hidden(self, previous, condition, cache=None, start=0):
        """(B, T, W) features that predict the positions start … start + T − 1.

        previous: (B, T, W), each the embedding of the position before.
        """
        here = slice(start, start + previous.shape[1])
        if condition.shape[1] > 1:
            condition = condition[:, here]
        x = self.dropout(previous + self.positions()[here] + condition)
        for i, block in enumerate(self.blocks):
            x = block(x, causal=True, cache=cache and cache[i], start=start)
        return self.norm(x)

    def logits(self, hidden, tokens, i):
        """(B, T, K_i) logits of token i, given the tokens (B, ≥ i, T) before i."""
        hidden = hidden + self.embed(tokens[:, :i])
        return self.outputs[i](self.heads[i](hidden))

    def loss(self, tokens, known=None, drop=None, generator=None):
        """A list of M () losses, mean negative log-likelihoods in nats. No noise is drawn."""
        tokens = tokens.long()
        logits = self(tokens, known, drop)
        targets = tokens.flatten(2).unbind(1)  # M times (B, N)
        return [F.cross_entropy(precise(x).mT, target) for x, target in zip(logits, targets)]


def draw_tokens(logits, temperature=1.0, top_k=0, generator=None):
    """(B, K) logits → (B,) int64, an index drawn from each row.

    temperature: divides the logits; 0 takes the likeliest index.
    top_k: draw from so many likeliest indices; 0: all.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = precise(logits) / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return gumbel_argmax(logits, generator)


@torch.no_grad()
def sample_tokens(model, batch, known=None, given=None, scale=1.0, generator=None, **choice):
    """(B, M, h, w) int64 tokens, drawn position by position with cached keys and values.

    model: TokenTransformer in evaluation mode; known: as of Condition.
    given: (B, M, h, w) int64 tokens to keep, −1 where one is to be drawn.
    scale: of classifier-free guidance (Ho & Salimans 2022); 1: none.
    choice: temperature and top_k of `draw_tokens`.
    """
    if given is None:
        shape = batch, len(model.sizes), *model.grid
        given = torch.full(shape, -1, device=model.start.device)
    tokens = given.flatten(2).clone()  # (B, M, N)
    conditions = [model.condition(known, batch)]
    if scale != 1:  # a second copy of the batch has no condition
        conditions.append(model.condition(None, batch).expand_as(conditions[0]))
    condition, copies = torch.cat(conditions), len(conditions)
    positions, heads = tokens.shape[2], model.blocks[0].heads
    shape = 2, copies * batch, heads, positions, model.width // heads
    cache = [model.start.new_empty(shape) for _ in model.blocks]  # keys and values
    previous = model.start.expand(copies * batch, 1, -1)  # (B, 1, W), B here with copies
    for n in range(positions):
        hidden = model.hidden(previous, condition, cache, n)  # (B, 1, W)
        here = tokens[:, :, n : n + 1]  # (B, M, 1), a view
        for i in range(len(model.sizes)):
            logits = model.logits(hidden, here.repeat(copies, 1, 1), i)[:, 0]
            if copies == 2:
                logits, unconditional = logits.chunk(2)
                logits = unconditional + scale * (logits - unconditional)
            drawn = draw_tokens(logits, generator=generator, **choice)
            here[:, i, 0] = torch.where(here[:, i, 0] < 0, drawn, here[:, i, 0])
        previous = model.embed(here.repeat(copies, 1, 1))
    return tokens.unflatten(2, model.grid)


class Denoiser(nn.Module):
    """The noise ε in a noisy grid of features ẑ. Tokens are the nearest codes of ẑ.

    It predicts ε (Ho et al. 2020) by modulated blocks (DiT), under the cosine schedule
    z_t = cos(πt/2) ẑ + sin(πt/2) ε (Nichol & Dhariwal 2021). The buffers `mean` and `std`
    (C, 1, 1), set by training, scale ẑ to about unit variance.

    channels: C, channels of ẑ for all codebooks; others: as of TokenTransformer.

    >>> denoiser = Denoiser(16, (8, 8), Condition("none", 0, (8, 8), 64), width=64, depth=2)
    >>> sample_features(denoiser.eval(), 2, steps=4).shape
    torch.Size([2, 16, 8, 8])
    """

    LAST = 0.98  # largest t; beyond it, an error in ε is amplified thirty times

    def __init__(self, channels, grid, condition, width=256, depth=6, heads=8, dropout=0.0):
        super().__init__()
        self.grid, self.width, self.channels = tuple(grid), width, channels
        self.condition, self.positions = condition, Positions(grid, width)
        self.enter = nn.Linear(channels, width)
        self.leave = zero(nn.Linear(width, channels))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, modulated=True, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, z_t, t, condition):
        """z_t: (B, C, h, w), t: (B,) in [0, 1], condition: (B, 1 or N, W) → ε (B, C, h, w)."""
        frequency = torch.linspace(0, math.log(1000), self.width // 2, device=t.device).exp()
        angle = t[:, None] * frequency  # (B, W/2)
        time = torch.cat([angle.sin(), angle.cos()], dim=1)  # (B, W)
        time = self.time(time.to(self.mean.dtype))
        signal = time[:, None] + condition  # (B, 1 or N, W)
        x = self.enter(z_t.flatten(2).mT) + self.positions()  # (B, N, W)
        for block in self.blocks:
            x = block(x, signal)
        return self.leave(self.norm(x)).mT.unflatten(2, self.grid)

    def loss(self, z, known=None, drop=None, generator=None):
        """(B, C, h, w) features → a list of one () loss, the error of ε at random t."""
        z = (z - self.mean) / self.std
        t = torch.rand(len(z), device=z.device, generator=generator) * self.LAST
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        angle = (t * math.pi / 2).to(z.dtype)[:, None, None, None]
        z_t = angle.cos() * z + angle.sin() * noise
        return [F.mse_loss(self(z_t, t, self.condition(known, len(z), drop)), noise)]


@torch.no_grad()
def sample_features(
    model, batch, known=None, given=None, mask=None, scale=1.0, steps=50, generator=None
):
    """(B, C, h, w) features, drawn by DDIM (Song et al. 2021) in so many `steps`.

    model: Denoiser in evaluation mode; known: as of Condition.
    given: (B, C, h, w) features to keep where mask, (B, C or 1, h, w), is True.
    scale: of classifier-free guidance; 1: none.
    """
    shape = batch, model.channels, *model.grid
    like = dict(device=model.mean.device, dtype=model.mean.dtype)
    condition = model.condition(known, batch)
    z_t = torch.randn(shape, generator=generator, **like)
    angles = torch.linspace(model.LAST, 0, steps + 1, device=z_t.device) * math.pi / 2
    for now, then in zip(angles[:-1], angles[1:]):
        if given is not None:  # given features are noised as this step is
            noise = torch.randn(shape, generator=generator, **like)
            noisy = now.cos() * (given - model.mean) / model.std + now.sin() * noise
            z_t = torch.where(mask, noisy, z_t)
        t = (now / (math.pi / 2)).expand(batch)
        noise = model(z_t, t, condition)
        if scale != 1:
            unconditional = model(z_t, t, model.condition(None, batch))
            noise = unconditional + scale * (noise - unconditional)
        z = ((z_t - now.sin() * noise) / now.cos()).clamp(-5, 5)  # z has unit variance
        noise = (z_t - now.cos() * z) / now.sin()
        z_t = then.cos() * z + then.sin() * noise
    z = z_t * model.std + model.mean
    return z if given is None else torch.where(mask, given, z)


# ======== Published weights of VQGAN, in the names of taming-transformers

TAMING = {  # part of a parameter's name here → there
    "encoder.layers": "encoder",
    "decoder.layers": "decoder",
    "decoder.to_image": "decoder.conv_out",
    "to_codes": "quant_conv",
    "from_codes": "post_quant_conv",
    "codebook.vectors": "quantize.embedding.weight",
    "sample.1": "sample.conv",
    "project": "proj_out",
    "shortcut": "nin_shortcut",
    "-": ".",
}


def published_tensor(name, state):
    """The tensor of a parameter here in the published state, and its first name there."""
    for ours, theirs in TAMING.items():
        name = name.replace(ours, theirs)
    # Theirs has three convolutions in place of one.
    names = dict.fromkeys(name.replace("query_key_value", part) for part in "qkv")
    parts = [state[name] for name in names if name in state]
    return torch.cat(parts) if parts else None, next(iter(names))


def load_taming(model, discriminator, state):
    """Fill our networks from a VQ-GAN of taming-transformers → names of what it leaves.

    A discriminator is filled whole or not at all. The 1×1 convolutions at the codes, and one
    learned codebook, are filled if shapes agree.

    model: VQModel; discriminator: Discriminator or None; state: the published state dict.
    Raises ValueError if encoder or decoder cannot be filled.
    """
    taken, left, codebook = {}, [], model.codebook
    takes_codes = isinstance(codebook.vectors, nn.Parameter) and len(codebook.sizes) == 1
    for name, value in model.state_dict().items():
        tensor, published = published_tensor(name, state)
        shape = "missing" if tensor is None else tuple(tensor.shape)
        wanted = tuple(value.shape)
        if shape == wanted and (takes_codes or name != "codebook.vectors"):
            taken[name] = tensor
        elif name.startswith(("encoder", "decoder")):
            raise ValueError(f"{published} is {shape}, this network wants {wanted}")
        else:
            left.append(name)
    model.load_state_dict(taken, strict=False)

    if discriminator is not None:
        prefix = "loss.discriminator.main"
        taken = {name.replace(prefix, "layers"): tensor
                 for name, tensor in state.items() if name.startswith(prefix)}
        shapes = lambda state: {name: tensor.shape for name, tensor in state.items()}
        if shapes(taken) == shapes(discriminator.state_dict()):
            discriminator.load_state_dict(taken)
        else:
            left.append("discriminator")
    return left


# ======== Show the work: python vqct.py

@torch.no_grad()
def show_equations():
    """Print Eq. 3, 1 and 2 on a graph of four words, small enough to check by hand."""
    words = "orange", "sharp", "breast", "beak"
    vectors = torch.tensor([[1.0, 0.0], [-2.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    adjacency = NormalizedAdjacency([(0, 2), (0, 3), (1, 3)], 4)
    steps = [vectors]
    layer = GraphConvolution(2, 2)
    nn.init.eye_(layer.weight)
    for _ in range(3):
        steps.append(F.relu(layer(steps[-1], adjacency)))
    print("\nEq. 3 on the pairs orange breast, orange beak, sharp beak, with W = I")
    print(f"  {'':8}{'row of Â':30}{'H0':16}{'H1':16}{'H2':16}H3 = code")
    for word, *rows in zip(words, adjacency(torch.eye(4)), *steps):
        row, *vectors = (" ".join(f"{value:.3f}" for value in row) for row in rows)
        print(f"  {word:8}{row:30}" + "".join(f"{vector:16}" for vector in vectors))
    print("  by hand, orange in H1: (1, 0)/√(3·3) + (1, 1)/√(3·2) + (0, 2)/√(3·3)")

    print("\nEq. 1 and 2 at one position, whose channels are split in two (step 3)")
    z = torch.tensor([[1.0, 1.5], [0.0, 2.0]])  # ẑ_a and ẑ_n
    for name, z, codebook, words in zip("an", z, steps[-1].split(2), (words[:2], words[2:])):
        _, indices, loss = VectorQuantizer(beta=0.25)(z.view(1, 2, 1, 1), codebook)
        index, distances = indices.item(), (z - codebook).square().sum(1)
        listed = ", ".join(f"{d:.3f} from {word}" for d, word in zip(distances, words))
        print(f"  ẑ_{name} = {z.tolist()}: ‖ẑ − e‖² = {listed}: s = {index}, {words[index]}")
        print(f"    loss: (1 + β) {distances[index]:.3f} / 2 = {loss:.4f}")


# ======== Helpers of all parts

def precise(x):
    """The tensor in its own floating type, but at least in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def distributed():
    """Whether torch.distributed joins several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(x, how="mean"):
    """The "mean" or "max" of a tensor over all processes, without gradient."""
    if not distributed():
        return x
    x, operation = x.detach().clone(), torch.distributed.ReduceOp
    torch.distributed.all_reduce(x, operation.MAX if how == "max" else operation.SUM)
    return x / torch.distributed.get_world_size() if how == "mean" else x


def all_gather(x):
    """The rows of all processes, joined along the first axis, without gradient."""
    if not distributed():
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack β and ẑ
    show_equations()
