"""VQCT: every network of "Codebook Transfer with Part-of-Speech for Vector-Quantized Image Modeling" (CVPR 2024).

The file reads in the paper's order:

    §3.1         Eq. 1       nearest_code        the code nearest to each feature
                 Eq. 2       VectorQuantizer     straight-through gradient, codebook and commitment terms
    §3.3 step 2  Â           NormalizedAdjacency of the modifying graph of adjectives and nouns
                 Eq. 3       GraphConvolution, CodebookTransfer
    §3.3 step 3  (C_a, C_n)  Codebook, VQModel   two codebooks, each for its half of the channels
    §4.1         E, G        Encoder, Decoder    VQGAN's network
                 its losses  Discriminator, hinge_loss, adaptive_weight, LPIPS
    Tables 1, 6  baselines   GumbelQuantizer, ClusteredQuantizer (CVQ), RegularizedQuantizer (Reg-VQ)
    Tables 1–6   systems     ModelConfig, make_quantizer, make_codebook
    §4.4         stage two   TokenTransformer, sample_tokens; Denoiser, sample_features
    VQGAN's published weights  load_taming

`prior.py` makes the words, vectors and graph that VQModel starts from; Eq. 2's pixel term and the training step are
`Trainer` in train.py. Each class and function can be copied out together with the names it uses from this file.
To see Eq. 3, 1 and 2 worked on four words:

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

# ======== §3.1, Eq. 1 and 2: the nearest code, and the losses of a code that was chosen

def precise(x):
    """The tensor in its own floating type, but at least in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def nearest_code(z, codebook, neighbours=1):
    """Eq. 1, s_i = argmin_k ‖ẑ_i − e_k‖²: the index of the code nearest to each feature.

    ‖ẑ − e‖² = ‖ẑ‖² + 2 (½‖e‖² − ẑ·e), and ‖ẑ‖² is the same for every code, so ½‖e‖² − ẑ·e is minimised.
    Chunks of rows share one buffer of at most 2²² scores (of one row, if K is larger).

    z: (N, D) features of any floating type; codebook: (K, D) codes, K ≥ 1.
    neighbours: how many codes to find for each feature.
    Returns (N,) int64, or (neighbours, N) if there are several, nearest first; ties are broken arbitrarily.

    Scores are float32, or float64 if either argument is. Their origin is m, the median of about a hundred
    codes, so a squared distance exceeds the least by a few rounding errors of (‖ẑ − m‖ + ‖e − m‖)² at most.
    Codes for which ‖e − m‖² is not finite come after all others.
    """
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        codes = codebook.to(dtype)
        # Distances do not depend on the origin, but their rounding does. A median is not moved by outliers.
        sample = codes[:: len(codes) // 100 + 1].sort(0).values
        origin = sample[len(sample) // 2].nan_to_num(0, 0, 0)  # (D,)
        codes = codes - origin  # (K, D)
        half_norms = codes.square().sum(1) / 2  # (K,)
        finite = half_norms.isfinite()
        half_norms.masked_fill_(~finite, torch.inf)
        codes.masked_fill_(~finite[:, None], 0)
        size = max(1, 2**22 // len(codes))
        buffer = codes.new_empty(min(size, len(z)), len(codes))
        indices = torch.empty(neighbours, len(z), dtype=torch.int64, device=z.device)
        for rows, found in zip(z.split(size), indices.split(size, 1)):
            scores = buffer[: len(rows)]  # ½‖e‖² − ẑ·e, (rows, K)
            torch.addmm(half_norms, rows - origin, codes.T, alpha=-1, out=scores)
            for nearest in found:
                torch.argmin(scores, 1, out=nearest)
                scores.scatter_(1, nearest[:, None], torch.finfo(dtype).max)
        return indices.squeeze(0)


def look_up(indices, codebook):
    """(B, n, H, W) int64 and (K, D) codes → (B, D, H, W): the code of each position, or the mean of its n codes."""
    return F.embedding(indices, codebook).mean(1).movedim(-1, 1)


class VectorQuantizer(nn.Module):
    """Eq. 1 and the last two terms of Eq. 2: ‖sg[ẑ] − z_q‖² + β ‖sg[z_q] − ẑ‖².

    Each term is a mean over elements. The codebook is an argument, so it may be a parameter or the output of a
    network; only the first term trains it.

    beta: weight of the commitment term (0.25, van den Oord et al. 2017).
    beta_on: "commitment" as in Eq. 2, or "codebook", the well-known slip of VQGAN's code.
    neighbours: nearest codes whose mean is z_q; the paper takes one, the authors' code two for adjectives.
    """

    def __init__(self, beta=0.25, beta_on="commitment", neighbours=1):
        super().__init__()
        self.neighbours = neighbours
        self.codebook_weight = beta if beta_on == "codebook" else 1.0
        self.commitment_weight = beta if beta_on == "commitment" else 1.0

    @torch.no_grad()
    def indices(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → (B, n, H, W) int64, Eq. 1; n neighbours, nearest first."""
        features = z.movedim(1, -1)  # (B, H, W, D)
        rows = features.reshape(-1, features.shape[-1])
        found = nearest_code(rows, codebook, self.neighbours)  # (n, B H W), or without n if it is one
        return found.view(self.neighbours, *features.shape[:-1]).movedim(0, 1)

    def forward(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → z_q (B, D, H, W), indices (B, n, H, W), loss ().

        In training z_q carries the decoder's gradient straight through to z; in evaluation it is exactly the code, so
        that decoding by indices gives the same image. All is at least float32, also under autocast, since
        features and their codes come to differ by little.
        """
        with torch.autocast(z.device.type, enabled=False):
            codebook = precise(codebook)
            z = z.to(codebook.dtype)
            return self.quantize(z, codebook, self.indices(z, codebook))

    def quantize(self, z, codebook, indices):
        """z_q, indices and loss as `forward` returns them, for indices already chosen."""
        z_q = look_up(indices, codebook)  # (B, D, H, W)
        loss = self.codebook_weight * F.mse_loss(z_q, z.detach()) + self.commitment_weight * F.mse_loss(z, z_q.detach())
        if self.training:
            z_q = z + (z_q - z).detach()
        return z_q, indices, loss


# ======== §3.3 step 2, Eq. 3: the modifying graph, and the graph convolutions that transfer codes along it

class SymmetricProduct(torch.autograd.Function):
    """Â H for a constant symmetric Â in compressed rows; its derivative, either way, is the same product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(row_start, column, value, nodes):
        # A row of Â H is a weighted sum of H's rows: an embedding bag, which is faster than torch's sparse matrices.
        return F.embedding_bag(column, nodes, row_start, mode="sum", per_sample_weights=value, include_last_offset=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx, gradient):  # an embedding bag's own takes four times as long and has no derivative
        return None, None, None, SymmetricProduct.apply(*ctx.saved_tensors, gradient.contiguous())

    @staticmethod
    def jvp(ctx, *tangents):
        return SymmetricProduct.apply(*ctx.saved_tensors, tangents[3].contiguous())


class NormalizedAdjacency(nn.Module):
    """Â = D^{-1/2} (A + I) D^{-1/2} of an undirected graph, sparse (Kipf & Welling 2017).

    edges: (E, 2) int64 node indices, each undirected edge once; repeats count once, as the paper's A is binary.
    nodes: number of nodes N.
    weights: (E,) entries of A instead, repeats summed; the authors' code has the times a pair occurs.
    Raises RuntimeError if an edge names a node outside 0 … N−1.

    >>> NormalizedAdjacency([(0, 2), (1, 2)], nodes=3)(torch.eye(3)).diagonal()
    tensor([0.5000, 0.5000, 0.3333])
    """

    def __init__(self, edges, nodes, weights=None):
        super().__init__()
        with torch.device("cpu"):  # not "meta": the number of entries depends on the edges
            edges = torch.as_tensor(edges, dtype=torch.int64, device="cpu").reshape(-1, 2)
            loops = torch.arange(nodes)[:, None].expand(-1, 2)
            entries = torch.ones(len(edges)) if weights is None else torch.as_tensor(weights, device="cpu")
            entries = torch.cat([entries, entries, torch.ones(nodes)]).double()
            index = torch.cat([edges, edges.flip(1), loops]).T  # (2, 2E + N)
            matrix = torch.sparse_coo_tensor(index, entries, (nodes, nodes), check_invariants=True)  # A + I
            matrix = matrix.coalesce()
            (row, column), value = matrix.indices(), matrix.values()
            if weights is None:
                value = torch.ones_like(value)
            scale = torch.zeros(nodes).double().index_add_(0, row, value).rsqrt()  # D^{-1/2}
            row_start = F.pad(row.bincount(minlength=nodes).cumsum(0), (1, 0))
        device = torch.get_default_device()
        self.register_buffer("row_start", row_start.to(device))  # (N + 1,)
        self.register_buffer("column", column.to(device))  # (2E + N,)
        value = (value * scale[row] * scale[column]).to(device, torch.get_default_dtype())
        self.register_buffer("value", value)  # (2E + N,)

    def forward(self, nodes):
        """(N, D) → Â nodes, (N, D)."""
        return SymmetricProduct.apply(self.row_start, self.column, self.value.to(nodes.dtype), nodes)


class GraphConvolution(nn.Module):
    """One layer of Eq. 3 before its activation: Â H W."""

    def __init__(self, in_features, out_features):
        super().__init__()
        # Scaled for the ReLU that follows: without a graph, layers keep the scale of their input (Â averages it down).
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * math.sqrt(2 / in_features))

    def forward(self, nodes, adjacency):
        """nodes: (N, in_features); adjacency: a module or function (N, D) → (N, D)."""
        # Â multiplies the narrower side; first, if the nodes need no gradient, as it needs no backward pass then.
        if self.weight.shape[0] < self.weight.shape[1] or not nodes.requires_grad:
            return adjacency(nodes) @ self.weight
        return adjacency(nodes @ self.weight)  # (N, out_features)


class CodebookTransfer(nn.Module):
    """Eq. 3, the graph convolution-based codebook transfer network: H ← ReLU(Â H W), three times.

    widths: (d, …, D) features of the language model's vectors, of each hidden layer and of the codes; four numbers
        make the paper's three convolutions.
    adjacency: a NormalizedAdjacency; `nn.Identity()` makes the paper's MLP (Tables 2 and 3).
    last_relu: whether a ReLU follows the last layer too, as in Eq. 3; the authors' code has none.
    dropout: share of hidden features zeroed in training; the authors' code has 0.5.

    >>> adjacency = NormalizedAdjacency([(0, 2), (0, 3), (1, 3)], nodes=4)
    >>> CodebookTransfer((300, 512, 512, 64), adjacency)(torch.randn(4, 300)).shape
    torch.Size([4, 64])
    """

    def __init__(self, widths, adjacency, last_relu=True, dropout=0.0):
        super().__init__()
        self.adjacency = adjacency
        self.layers = nn.ModuleList(GraphConvolution(a, b) for a, b in zip(widths, widths[1:]))
        self.last_relu, self.dropout = last_relu, nn.Dropout(dropout)

    def forward(self, vectors):
        """(N, d) vectors of the graph's nodes → (N, D) codes."""
        nodes = vectors
        for layer in self.layers[:-1]:
            nodes = self.dropout(F.relu(layer(nodes, self.adjacency)))
        nodes = self.layers[-1](nodes, self.adjacency)
        return F.relu(nodes) if self.last_relu else nodes


# ======== §3.3 step 3: two codebooks, each for its half of the channels

class Codebook(nn.Module):
    """The codes of every codebook: vectors, sent through a transfer network where there is one.

    Every system of the paper is a choice of these four arguments: learned codes are trained vectors without
    transfer; VQCT's are frozen word vectors through CodebookTransfer.

    vectors: (ΣK, d) starting codes, or the language model's word vectors.
    sizes: (K_1, …) codes of each codebook: (adjectives, nouns) in VQCT.
    trained: whether the vectors are parameters.
    transfer: a module (ΣK, d) → (ΣK, D), or None for the vectors themselves.
    Raises RuntimeError from the forward pass, if the sizes do not add up to the vectors.

    >>> transfer = CodebookTransfer((300, 512, 512, 64), NormalizedAdjacency([(0, 1), (0, 2)], nodes=3))
    >>> adjectives, nouns = Codebook(torch.randn(3, 300), sizes=(1, 2), transfer=transfer)()
    >>> nouns.shape
    torch.Size([2, 64])
    """

    def __init__(self, vectors, sizes, trained=False, transfer=None):
        super().__init__()
        self.sizes = tuple(sizes)
        if trained:
            self.vectors = nn.Parameter(vectors.clone())
        else:
            self.register_buffer("vectors", vectors.clone())
        self.transfer = transfer
        self.register_buffer("frozen", None, persistent=False)  # (ΣK, D), the codes that `freeze` keeps

    @torch.no_grad()
    def freeze(self):
        """Make the codes once and keep them, without gradient, until `train()` or `load_state_dict`."""
        self.frozen = None
        self.frozen = torch.cat(self())

    def train(self, mode=True):
        """As of any module; frozen codes are dropped, since training changes them."""
        self.frozen = None if mode else self.frozen
        return super().train(mode)

    def _load_from_state_dict(self, *arguments):
        self.frozen = None
        super()._load_from_state_dict(*arguments)

    def forward(self):
        """→ a tuple of (K_i, D) codebooks."""
        if self.frozen is not None:
            return self.frozen.split(self.sizes)
        with torch.autocast(self.vectors.device.type, enabled=False):
            codes = self.vectors if self.transfer is None else self.transfer(self.vectors)
            return codes.split(self.sizes)


class UnitLength(nn.Module):
    """ℓ2-normalised codes and features, as in ViT-VQGAN (Yu et al. 2022), which takes 32 channels."""

    def forward(self, x):
        """(N, D, …) → the same, of unit length along D, at least float32, as its neighbours are near."""
        return F.normalize(precise(x), dim=1)


class Output(NamedTuple):
    """What a forward pass gives."""

    x_hat: torch.Tensor  # (B, 3, H, W) reconstruction, not clamped
    indices: torch.Tensor  # (B, M, h, w) int64 codes, one for each codebook (more where neighbours are averaged)
    quantizer_loss: torch.Tensor  # () the quantizers' losses, Eq. 2's last terms in VQCT, summed over codebooks


class VQModel(nn.Module):
    """Encoder, codebooks and decoder: (ẑ_a, ẑ_n) = E(x), each quantized by its own codebook (step 3).

    config: a ModelConfig.
    prior: mapping with `adjective_vectors` (Na, d), `noun_vectors` (Nn, d) and `edges` (E, 2) of adjective and noun
        index, as prior.py writes (`edge_counts` too for weighted edges); None where not `needs_prior(config)`.
    Raises ValueError if the resolution is not a multiple of the encoder's reduction, or a prior is missing.

    >>> prior = {"adjective_vectors": torch.randn(70, 100), "noun_vectors": torch.randn(61, 100), "edges": [(0, 0)]}
    >>> model = VQModel(ModelConfig(**NETWORKS["tiny"]), prior).eval()
    >>> indices = model.encode(torch.zeros(1, 3, 64, 64))  # (1, 2, 8, 8), of adjectives and nouns
    >>> model.decode(indices).shape
    torch.Size([1, 3, 64, 64])
    """

    def __init__(self, config, prior=None):
        super().__init__()
        factor = 2 ** (len(config.multipliers) - 1)
        if config.resolution % factor or config.resolution < factor:
            raise ValueError(f"resolution {config.resolution} is not a multiple of {factor}, the encoder's reduction")
        self.config = config
        self.codebook = make_codebook(config, prior)
        own = config.codes == "words" and config.transfer in ("none", "unit")  # codes as wide as the words' vectors
        self.code_dim = self.codebook.vectors.shape[1] if own else config.code_dim // len(self.codebook.sizes)
        total = self.code_dim * len(self.codebook.sizes)
        shape = (config.channels, tuple(config.multipliers), config.blocks, config.z_channels)
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.to_codes = nn.Conv2d(config.z_channels, total, 1)
        self.from_codes = nn.Conv2d(total, config.z_channels, 1)
        keep_variance(self.to_codes)
        keep_variance(self.from_codes)
        self.scale = UnitLength() if config.transfer == "unit" else nn.Identity()
        neighbours = [config.adjective_neighbours, 1] if len(self.codebook.sizes) == 2 else [1]
        self.quantizers = nn.ModuleList(
            make_quantizer(config, self.code_dim, size, count) for size, count in zip(self.codebook.sizes, neighbours)
        )

    @property
    def grid(self):
        """(h, w) positions of an image's tokens."""
        side = self.config.resolution // 2 ** (len(self.config.multipliers) - 1)
        return side, side

    @property
    def sizes(self):
        """Codes of each of the M tokens of a position."""
        return self.per_token(self.codebook.sizes)

    def per_token(self, values):
        """One value for each codebook → a list of one for each of the M tokens of a position."""
        return [value for value, quantizer in zip(values, self.quantizers) for _ in range(quantizer.neighbours)]

    def by_codebook(self, indices):
        """(B, M, h, w) → a tuple of (B, n, h, w), the n indices of each codebook."""
        return indices.split([quantizer.neighbours for quantizer in self.quantizers], dim=1)

    def features(self, x):
        """(B, 3, H, W) → a tuple of (B, D, h, w) continuous features, one for each codebook."""
        return tuple(map(self.scale, self.to_codes(self.encoder(x)).chunk(len(self.codebook.sizes), dim=1)))

    def decode_features(self, z_q):
        """Sequence of (B, D, h, w) quantized features → (B, 3, H, W)."""
        z_q = torch.cat(tuple(z_q), dim=1).to(self.from_codes.weight.dtype)  # (B, M D, h, w)
        return self.decoder(self.from_codes(z_q))

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] → Output."""
        parts = zip(self.quantizers, self.features(x), self.codebook())
        z_q, indices, losses = zip(*(quantizer(z, codebook) for quantizer, z, codebook in parts))
        # each loss is a mean over its own channels, so two codebooks weigh twice what one does
        return Output(self.decode_features(z_q), torch.cat(indices, dim=1), sum(losses))

    def nearest_indices(self, features):
        """Sequence of (B, D, h, w) continuous features, one for each codebook → (B, M, h, w) int64, their codes."""
        parts = zip(self.quantizers, features, self.codebook())
        return torch.cat([quantizer.indices(z, codebook) for quantizer, z, codebook in parts], dim=1)

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] → (B, M, h, w) int64 indices, those of `forward`."""
        return self.nearest_indices(self.features(x))

    def decode(self, indices):
        """(B, M, h, w) int64 → (B, 3, H, W); in evaluation mode what `forward` gives for these codes."""
        parts = zip(self.by_codebook(indices), self.codebook())
        return self.decode_features(look_up(index, codebook) for index, codebook in parts)

    def anneal(self, progress):
        """Set the quantizers' temperature, by a cosine from 1 to its end; progress: the share done, 0 … 1."""
        end = self.config.temperature_end
        for quantizer in self.quantizers:
            if hasattr(quantizer, "temperature"):
                quantizer.temperature = end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


# ======== §4.1, the network: VQGAN's encoder and decoder (Esser et al. 2021)

class GroupNorm(nn.GroupNorm):
    """32 groups as in VQGAN, or the most below that which divide the channels.

    Autocast would run it in float32 and keep the copies; the kernel's statistics are in float32 anyway.
    """

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, x):
        """(B, C, …) → the same, in the type of x."""
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, each after group norm and SiLU, around a shortcut."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

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
        query, key, value = self.query_key_value(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)  # (B, HW, C)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, HW, C)
        return x + self.project(attended.mT.reshape(x.shape))


def downsample(channels):
    """Half the resolution by a strided 3×3 convolution, padded on the right and below."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


def upsample(channels):
    """Twice the resolution by nearest neighbour, then a 3×3 convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))


def keep_variance(network):
    """Initialise convolutions to keep their input's variance, and residual branches to zero.

    The paper and VQGAN leave the choice open. torch's default shrinks the signal by √3 at each convolution:
    300 steps of the tiny preset on CUB reach 17.7±0.2 dB with it, and 19.9±0.1 with this (three seeds).
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "project")):  # the last of a residual branch
                nn.init.zeros_(module.weight)


class Encoder(nn.Module):
    """Image to continuous features, ẑ = E(x). Layers are named as in taming-transformers, with - for a dot.

    channels: width of the first level; multipliers: width of each level in units of it. Each level after the first
        halves the resolution, so (1, 1, 2, 2, 4) is f16.
    blocks: residual blocks per level; z_channels: channels of the output.
    """

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=256):
        super().__init__()
        layers, width = {"conv_in": nn.Conv2d(3, channels, 3, padding=1)}, channels
        for level, multiplier in enumerate(multipliers):
            lowest = level == len(multipliers) - 1
            for block in range(blocks):
                layers[f"down-{level}-block-{block}"] = ResidualBlock(width, channels * multiplier)
                width = channels * multiplier
                if lowest:
                    layers[f"down-{level}-attn-{block}"] = AttentionBlock(width)
            if not lowest:
                layers[f"down-{level}-downsample"] = downsample(width)
        layers |= {"mid-block_1": ResidualBlock(width, width), "mid-attn_1": AttentionBlock(width)}
        layers |= {"mid-block_2": ResidualBlock(width, width), "norm_out": GroupNorm(width), "silu": nn.SiLU()}
        layers["conv_out"] = nn.Conv2d(width, z_channels, 3, padding=1)
        self.layers = nn.Sequential(OrderedDict(layers))
        keep_variance(self)

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] → (B, z_channels, h, w), h = H / 2^(levels − 1)."""
        return self.layers(x)


class Decoder(nn.Module):
    """Quantized features to an image, x̂ = G(z_q): the encoder's levels in reverse, one block more each."""

    def __init__(self, channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, z_channels=256):
        super().__init__()
        width = channels * multipliers[-1]
        layers = {"conv_in": nn.Conv2d(z_channels, width, 3, padding=1), "mid-block_1": ResidualBlock(width, width)}
        layers |= {"mid-attn_1": AttentionBlock(width), "mid-block_2": ResidualBlock(width, width)}
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                layers[f"up-{level}-block-{block}"] = ResidualBlock(width, channels * multiplier)
                width = channels * multiplier
                if level == len(multipliers) - 1:
                    layers[f"up-{level}-attn-{block}"] = AttentionBlock(width)
            if level > 0:
                layers[f"up-{level}-upsample"] = upsample(width)
        self.layers = nn.Sequential(OrderedDict(layers, norm_out=GroupNorm(width), silu=nn.SiLU()))
        self.to_image = nn.Conv2d(width, 3, 3, padding=1)  # apart: the adaptive weight compares gradients at its weight
        keep_variance(self)

    def forward(self, z_q):
        """(B, z_channels, h, w) → (B, 3, H, W), about [-1, 1] but not clamped; float32 under autocast."""
        hidden = self.layers(z_q)  # (B, channels, H, W)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.to_image(hidden.to(self.to_image.weight.dtype))


# ======== §4.1, the losses of VQ-GAN: the adversary and the perceptual distance

class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for each overlapping patch, of 70×70 pixels for three inner `layers`."""

    def __init__(self, channels=64, layers=3):
        super().__init__()
        modules = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [nn.Conv2d(width, wider, 4, stride, padding=1, bias=False), nn.BatchNorm2d(wider)]
            modules += [nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        """(B, 3, H, W) → (B, 1, H/8 − 2, W/8 − 2) logits for three layers, high for real patches."""
        return self.layers(x)


def hinge_loss(real_logits, fake_logits):
    """Discriminator's loss, ½ [max(0, 1 − D(x)) + max(0, 1 + D(x̂))] averaged over patches → ()."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def distributed():
    """Whether torch.distributed joins several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(x, how="mean"):
    """The "mean" or "max" of a tensor over all processes, without gradient; x itself where there is one process."""
    if not distributed():
        return x
    x = x.detach().clone()
    operations = {"mean": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
    torch.distributed.all_reduce(x, operations[how])
    return x / torch.distributed.get_world_size() if how == "mean" else x


def all_gather(x):
    """Every process's rows, concatenated along the first axis, without gradient."""
    if not distributed():
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def adaptive_weight(x_hat, last_weight, reconstruction_gradient, adversarial_gradient):
    """λ = ‖∇L_rec‖ / (‖∇L_GAN‖ + 1e-4) at the decoder's last layer, at most 1e4 (VQGAN Eq. 7, its code's
    constants).

    x_hat: (B, 3, H, W) reconstruction, still attached to its graph; last_weight: the weight that produced it.
    reconstruction_gradient, adversarial_gradient: (B, 3, H, W) gradients of both losses at x_hat. Taken there once,
        they serve both λ and the generator's own backward pass.
    Returns () without gradient; where several processes share a batch, their gradients are averaged first.
    """
    norms = []
    for gradient in (reconstruction_gradient, adversarial_gradient):
        (at_weight,) = torch.autograd.grad(x_hat, last_weight, gradient, retain_graph=True)
        norms.append(all_reduce(at_weight).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 (Zhang et al. 2018) on a frozen torchvision trunk.

    Features of five or seven layers are normalised to unit length over channels, their squared differences weighted
    by published non-negative 1×1 heads, and averaged over positions.

    trunk: "vgg" (VGG-16, the paper's) or "squeeze" (SqueezeNet 1.1, light).
    trunk_state: torchvision's ImageNet state dict; None leaves random weights.
    head_state: published heads, keys `lin{i}.model.1.weight`; None weights channels equally.

    >>> LPIPS("squeeze")(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    tensor([0., 0.])
    """

    TRUNKS = {  # network, the layers of its `features` that are compared, and their channels
        "vgg": (torchvision.models.vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
        "squeeze": (torchvision.models.squeezenet1_1, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)),
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
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Frozen: always in evaluation mode."""
        return super().train(False)

    def forward(self, x, y):
        """Two (B, 3, H, W) images in [-1, 1] → (B,) distances ≥ 0 in float32 at least, differentiable."""
        x, y = (x - self.shift) / self.scale, (y - self.shift) / self.scale
        distance, heads = 0.0, iter(self.heads)
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)  # (B, C, h, w)
            if i in self.taps:
                with torch.autocast(x.device.type, enabled=False):  # nearly equal directions are subtracted
                    unit = [F.normalize(precise(part), dim=1, eps=1e-10) for part in (x, y)]
                    head = next(heads).weight.to(unit[0].dtype)
                    distance = distance + F.conv2d((unit[0] - unit[1]).square(), head).mean(dim=(1, 2, 3))
        return distance


# ======== Tables 1 and 6: the quantizers that VQCT is compared with, each with VectorQuantizer's interface
# forward(z, codebook) → z_q, indices, loss; indices(z, codebook), those of forward in evaluation; `neighbours`, the
# codes averaged at a position; and, where training anneals it, `temperature`

class GumbelQuantizer(nn.Module):
    """Gumbel-VQ: codes mixed by Gumbel-softmax weights while training, the likeliest code in evaluation.

    DALL-E's relaxation (Ramesh et al. 2021) as VQ-GAN uses it: a 1×1 convolution gives K logits a position, so the
    codebook does not choose the codes; the loss is KL(softmax(logits) ‖ uniform), summed over codes and averaged over
    positions. VQ-GAN's code differs in two points: it draws the code in evaluation too, and its published
    configuration has a weight of 1e-8. The paper cites vq-wav2vec (Baevski et al. 2020), which is not here.

    dim: channels of ẑ; size: codes K; kl_weight: of that loss; 5e-4 is the layer's default in VQ-GAN's code.
    straight_through: hard weights forward, soft ones backward; otherwise soft both ways.

    `temperature` of the weights is the trainer's to anneal, DALL-E's from 1 to 1/16.
    """

    def __init__(self, dim, size, kl_weight=5e-4, straight_through=True):
        super().__init__()
        self.to_logits = nn.Conv2d(dim, size, 1)
        self.kl_weight, self.straight_through = kl_weight, straight_through
        self.neighbours, self.temperature = 1, 1.0

    def indices(self, z, codebook):
        """z: (B, D, H, W) → (B, 1, H, W) int64; the codebook is not looked at."""
        with torch.autocast(z.device.type, enabled=False):
            return self.to_logits(z.to(self.to_logits.weight.dtype)).argmax(1, keepdim=True)

    def forward(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → z_q (B, D, H, W), the likeliest indices (B, 1, H, W), loss ()."""
        with torch.autocast(z.device.type, enabled=False):
            logits = self.to_logits(z.to(self.to_logits.weight.dtype))  # (B, K, H, W)
            log_share = logits.log_softmax(1)
            loss = self.kl_weight * (log_share.exp() * (log_share + math.log(logits.shape[1]))).sum(1).mean()
            indices = logits.argmax(1, keepdim=True)
            if not self.training:
                return look_up(indices, codebook), indices, loss
            weights = F.gumbel_softmax(logits, tau=self.temperature, hard=self.straight_through, dim=1)
            return torch.einsum("bkhw,kd->bdhw", weights, codebook), indices, loss


@torch.no_grad()
def gumbel_argmax(logits, generator=None):
    """(…, K) → (…) int64, each a draw from softmax(logits), by the Gumbel trick, which does not synchronise a GPU."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(-1)


class ClusteredQuantizer(VectorQuantizer):
    """CVQ: online clustering (Zheng & Vedaldi 2023). Codes that are not chosen move to features of the batch.

    With n_k the batch's share of code k, N_k ← γ N_k + (1 − γ) n_k and α_k = exp(−10 K N_k / (1 − γ) − 1e-3), each
    training pass moves e_k ← (1 − α_k) e_k + α_k ẑ_k. The anchor ẑ_k is a feature of the batch, drawn with
    probability softmax(−‖ẑ − e_k‖²) over features (the paper's "probabilistic random"). The optional
    contrastive loss of the source is left out.

    size: codes K; decay: γ; others: as VectorQuantizer.

    The codebook must be a leaf parameter (or views of one), float32 or float64, since it is written to.

    >>> codebook = nn.Parameter(torch.randn(512, 64))
    >>> z_q, indices, loss = ClusteredQuantizer(size=512)(torch.randn(2, 64, 8, 8), codebook)
    """

    def __init__(self, size, decay=0.99, **eq2):
        super().__init__(**eq2)
        self.decay = decay
        self.register_buffer("usage", torch.zeros(size))  # N_k

    def quantize(self, z, codebook, indices):
        """As VectorQuantizer; the codes are moved after the loss is taken."""
        z_q, indices, loss = super().quantize(z, codebook, indices)
        if self.training:
            features = z.detach().movedim(1, -1).flatten(0, -2)  # (N, D)
            self.re_anchor(features, indices, codebook.data)  # nothing saved for autograd depends on codes
        return z_q, indices, loss

    @torch.no_grad()
    def re_anchor(self, features, indices, codebook):
        """Move each code by α_k (ẑ_k − e_k), in place."""
        size = len(codebook)
        share = torch.zeros_like(self.usage)  # (K,), not by bincount, which waits for the device
        share.index_add_(0, indices.flatten(), share.new_full((indices.numel(),), 1 / indices.numel()))
        self.usage.lerp_(all_reduce(share), 1 - self.decay)
        features = all_gather(features)
        alpha = torch.exp(-10 * size * self.usage / (1 - self.decay) - 1e-3)  # (K,)
        alpha = alpha[:, None].to(codebook.dtype)
        rows = max(1, 2**22 // len(features))  # as in `nearest_code`, a chunk has 2²² distances at most
        for codes, amount in zip(codebook.split(rows), alpha.split(rows)):
            drawn = gumbel_argmax(-torch.cdist(codes, features).square())
            codes.lerp_(features[drawn], amount)
        if distributed():
            torch.distributed.broadcast(codebook, 0)  # each process drew other anchors


class RegularizedQuantizer(VectorQuantizer):
    """Reg-VQ: regularized quantization (Zhang et al. 2023). Three terms keep the codes in use while training.

    (1) Prior distribution: KL(p̄ ‖ uniform) of the batch's mean token distribution p̄, a position's own being
    softmax(−‖ẑ − e_k‖² / τ). (2) Stochastic mask: a random share of positions takes a code drawn from its
    distribution by the Gumbel trick, the others the nearest. (3) Probabilistic contrastive loss: a position's feature
    and code are pulled together against the codes of other positions by cosine at temperature 0.07, its own code
    counting w = exp(‖e_drawn − e_nearest‖² / mean) times: the farther the draw, the weaker the pull.

    kl_weight: of (1); mask_ratio: of (2); contrastive_weight: of (3); others: as VectorQuantizer, with one neighbour.

    Our choice, not the paper's:
    - the softmax over squared distances;
    - hard draws with the straight-through gradient, without a relaxation;
    - in (3), features and codes instead of VGG's features of both images;
    - in (3), the weight w instead of the distance itself, the temperature, and the number of positions,
      at most 1,024, evenly spread;
    - the defaults of all three arguments.
    `temperature` τ is the trainer's to anneal.
    """

    def __init__(self, kl_weight=0.1, mask_ratio=0.3, contrastive_weight=0.01, **eq2):
        super().__init__(**eq2)
        self.kl_weight, self.mask_ratio, self.contrastive_weight = kl_weight, mask_ratio, contrastive_weight
        self.temperature = 1.0

    def quantize(self, z, codebook, indices):
        """As VectorQuantizer, but z_q and its loss are of the drawn codes; the indices stay the nearest."""
        if not self.training:
            return super().quantize(z, codebook, indices)
        features, nearest = z.movedim(1, -1).flatten(0, -2), indices.flatten()  # (N, D), (N,)
        logits = -torch.cdist(features, codebook).square() / self.temperature  # (N, K)
        masked = torch.rand(len(nearest), device=z.device) < self.mask_ratio
        chosen = torch.where(masked, gumbel_argmax(logits), nearest)
        z_q, _, loss = super().quantize(z, codebook, chosen.view(indices.shape))
        loss = loss + self.kl_weight * self.divergence_from_uniform(logits)
        return z_q, indices, loss + self.contrastive_weight * self.contrast(features, codebook, chosen, nearest)

    @staticmethod
    def divergence_from_uniform(logits):
        """(N, K) → (): KL of the mean token distribution from uniform, nats."""
        mean = logits.softmax(1).mean(0)
        return (mean * (mean.clamp_min(1e-12) * len(mean)).log()).sum()

    @staticmethod
    def contrast(features, codebook, chosen, nearest, positions=1024, temperature=0.07):
        """(N, D), (K, D), (N,), (N,) → (): cross-entropy of each position's own code among those of others."""
        count = min(positions, len(features))
        spread = torch.arange(count, device=features.device) * (len(features) - 1) // max(1, count - 1)
        features, chosen, nearest = features[spread], chosen[spread], nearest[spread]
        codes = codebook[chosen]  # (P, D)
        noise = (codes - codebook[nearest]).square().sum(1).detach()  # (P,), zero where the nearest was taken
        mean = noise.sum() / (noise > 0).sum().clamp_min(1)
        log_w = noise / mean.clamp_min(1e-12)  # (P,)
        cosine = F.normalize(features, dim=1) @ F.normalize(codes, dim=1).T / temperature  # (P, P)
        own = torch.eye(len(features), dtype=torch.bool, device=features.device)
        same = (chosen[:, None] == chosen[None]) & ~own  # the same code elsewhere is no negative
        logits = torch.where(own, cosine + log_w[:, None], cosine).masked_fill(same, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(features), device=features.device))


# ======== Tables 1 to 6: every system is a ModelConfig, a choice of quantizer, of codes and of their transfer

QUANTIZERS = {  # `quantizer` → what makes it: (ModelConfig, channels D, codes K, arguments of VectorQuantizer) → module
    "nearest": lambda config, dim, size, eq2: VectorQuantizer(**eq2),
    "gumbel": lambda config, dim, size, eq2: GumbelQuantizer(dim, size, config.kl_weight, config.straight_through),
    "cvq": lambda config, dim, size, eq2: ClusteredQuantizer(size, config.usage_decay, **eq2),
    "regvq": lambda config, dim, size, eq2: RegularizedQuantizer(
        config.kl_weight, config.mask_ratio, config.contrastive_weight, **eq2),
}


def option(default, reason, **more):
    """A dataclass field with the reason for it. For its flag, `more` may hold: choices; least (by default 1 for whole
    numbers, 0 for others); most; each, the type of several values."""
    return field(default=default, metadata={"reason": reason, **more})


@dataclass
class ModelConfig:
    """Shape of the network and origin of its codes; the defaults are the paper's f16 network."""

    resolution: int = option(256, "pixels per side; the paper resizes every data set to 256", least=24)
    channels: int = option(128, "width of the first level of encoder and decoder (VQGAN)")
    multipliers: tuple = option((1, 1, 2, 2, 4), "width of each level; five levels halve four times: f16")
    blocks: int = option(2, "residual blocks per level (VQGAN)")
    z_channels: int = option(256, "channels between network and codes (VQGAN)")
    code_dim: int = option(256, "channels of all codes of a position together, split between the codebooks")
    codes: str = option("words", "where codes start: the prior's words, random vectors, or VQGAN's ±1/K",
                        choices=("words", "random", "uniform"))
    vector_scale: str = option("rms", "word vectors over their root mean square, standardised, or as they come",
                               choices=("rms", "standard", "none"))
    codebooks: int = option(2, "2: adjectives and nouns apart (MCB); 1: together (SCB), or no prior", choices=(1, 2))
    codebook_size: int = option(0, "codes of a codebook without a prior; 0: the prior's words", least=0, most=2**24)
    trained: bool = option(False, "train the starting vectors themselves")
    transfer: str = option("gcn", "how vectors become codes: by graph convolutions, the same without graph, one linear "
                           "map (SimVQ), scaling to unit length (ViT-VQGAN), or not at all",
                           choices=("gcn", "mlp", "linear", "unit", "none"))
    transfer_layers: int = option(3, "layers of the transfer network (authors' code: 2)")
    transfer_width: int = option(512, "features of its hidden layers, as CLIP's vectors have")
    transfer_dropout: float = option(0.0, "share of them zeroed in training (authors' code: 0.5)", most=0.99)
    last_relu: bool = option(True, "ReLU after the last layer too, as in Eq. 3 (authors' code: none)")
    weighted_edges: bool = option(False, "A counts a pair's occurrences (authors' code); the paper's is binary")
    quantizer: str = option("nearest", "nearest code (Eq. 1), Gumbel-VQ, CVQ or Reg-VQ", choices=tuple(QUANTIZERS))
    beta: float = option(0.25, "weight of the commitment term of Eq. 2")
    beta_on: str = option("commitment", "the term that beta weighs: Eq. 2's, or the authors' code's",
                          choices=("commitment", "codebook"))
    adjective_neighbours: int = option(1, "nearest adjectives whose mean is a position's (authors' code: 2)")
    kl_weight: float = option(5e-4, "gumbel, regvq: weight of the divergence from uniform codes (regvq's: 0.1)")
    straight_through: bool = option(True, "gumbel: hard codes forward, soft weights backward; else soft both ways")
    temperature_end: float = option(1 / 16, "gumbel, regvq: at the end, by a cosine from 1 (DALL-E)", least=1e-6)
    usage_decay: float = option(0.99, "cvq: decay γ of each code's running usage", most=0.9999)
    mask_ratio: float = option(0.3, "regvq: share of positions whose code is drawn, not nearest", most=1)
    contrastive_weight: float = option(0.0, "regvq: weight of its contrastive loss (the method's: 0.01)")


SMALL = dict(resolution=64, channels=24, blocks=1, z_channels=64, code_dim=16, transfer_width=128)
NETWORKS = {  # what the presets change of ModelConfig
    "f16": {},
    "tiny": dict(multipliers=(1, 1, 2, 4), **SMALL),  # f8, for photographs on a CPU
    "demo": dict(multipliers=(1, 1, 2), **SMALL),  # f4, for the built-in birds
}


def needs_prior(config):
    """Whether a ModelConfig's codes depend on a prior: its words, its graph or its sizes."""
    return config.codes == "words" or config.transfer == "gcn" or not config.codebook_size


def make_quantizer(config, dim, size, neighbours):
    """The quantizer that a ModelConfig names, for one codebook of `size` codes of `dim` channels.

    Raises ValueError for incompatible choices.
    """
    if neighbours > size or neighbours > 1 and config.quantizer != "nearest":
        raise ValueError(f"a mean of {neighbours} neighbours needs as many codes, and quantizer 'nearest'")
    if config.quantizer == "cvq" and (not config.trained or config.transfer != "none"):
        raise ValueError("quantizer 'cvq' moves the codes themselves, so they must be trained and without transfer")
    eq2 = dict(beta=config.beta, beta_on=config.beta_on, neighbours=neighbours)
    return QUANTIZERS[config.quantizer](config, dim, size, eq2)


def make_codebook(config, prior=None):
    """The Codebook that a ModelConfig describes; see VQModel for its arguments and errors."""
    words, sizes = None, (config.codebook_size,) * config.codebooks
    if needs_prior(config):
        if prior is None:
            raise ValueError(f"codes from '{config.codes}' with transfer '{config.transfer}' need a prior")
        dtype = torch.get_default_dtype()
        parts = [torch.as_tensor(prior[name], dtype=dtype) for name in ("adjective_vectors", "noun_vectors")]
        words, sizes = torch.cat(parts), tuple(map(len, parts))  # (ΣK, d)
        sizes = sizes if config.codebooks == 2 else (sum(sizes),)
    dim = config.code_dim // len(sizes)
    input_dim = words.shape[1] if words is not None and config.transfer in ("gcn", "mlp") else dim
    if config.codes == "words":  # language models differ in scale a hundredfold; the layers assume entries of about one
        centred = words - words.mean(0) if config.vector_scale == "standard" else words
        over = {"rms": words.square().mean().sqrt(), "standard": words.std(0), "none": torch.ones(())}
        vectors = centred / over[config.vector_scale].clamp_min(1e-12)
    elif config.codes == "random":
        vectors = torch.randn(sum(sizes), input_dim) * (dim**-0.5 if config.transfer == "linear" else 1.0)
    else:  # as in VQGAN's code, ±1/K within each codebook
        vectors = torch.cat([torch.empty(size, input_dim).uniform_(-1 / size, 1 / size) for size in sizes])
    transfer = UnitLength() if config.transfer == "unit" else None
    if config.transfer == "linear":
        transfer = nn.Linear(vectors.shape[1], dim)
    elif config.transfer in ("gcn", "mlp"):
        widths = (vectors.shape[1], *(config.transfer_width,) * (config.transfer_layers - 1), dim)
        adjacency = nn.Identity()
        if config.transfer == "gcn":
            edges = torch.as_tensor(prior["edges"], dtype=torch.int64, device="cpu").reshape(-1, 2)
            edges = edges + edges.new_tensor([0, len(parts[0])])  # nouns come after adjectives
            weights = prior["edge_counts"] if config.weighted_edges else None
            adjacency = NormalizedAdjacency(edges, sum(sizes), weights)
        transfer = CodebookTransfer(widths, adjacency, config.last_relu, config.transfer_dropout)
    return Codebook(vectors, sizes, config.trained, transfer)


# ======== §4.4, the second stage: a model of the tokens of an image

class Block(nn.Module):
    """Pre-norm transformer block: attention over positions, then two linear layers.

    Where `modulated`, a signal shifts, scales and gates both branches (DiT's adaLN-zero, Peebles & Xie 2023).
    """

    def __init__(self, width, heads, modulated=False, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=not modulated) for _ in range(2))
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), zero(nn.Linear(width, 6 * width))) if modulated else None

    def attend(self, x, causal, cache, start):
        """(B, T, W) → (B, T, W). With a cache (2, B, H, N, d), x is position `start` and sees all before it."""
        parts = self.query_key_value(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, T, d)
        if cache is not None:
            stop = start + x.shape[1]
            cache[0, :, :, start:stop], cache[1, :, :, start:stop] = key, value
            key, value = cache[:, :, :, :stop]  # (B, H, start + T, d)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal and cache is None)
        return self.dropout(self.project(attended.transpose(1, 2).flatten(2)))

    def forward(self, x, signal=None, causal=False, cache=None, start=0):
        """x: (B, T, W); signal: (B, 1, W) or (B, T, W) where modulated → (B, T, W)."""
        if self.modulation is None:
            x = x + self.attend(self.norm1(x), causal, cache, start)
            return x + self.dropout(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(signal).chunk(6, dim=-1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, causal, cache, start)
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))


def zero(layer):
    """A layer with its weights set to zero."""
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
    """What is known of an image, as features at each position: nothing, its class, or its label map.

    Convolutions let each position see the labels in and around it, a block of attention the whole label map.
    300 steps of a small TokenTransformer on the demo end at 4.83±0.02 nats a position with the block, and at
    5.16±0.02 without (three seeds).

    kind: "none", "class" or "segmentation"; count: of classes, or labels of the map.
    grid, width, heads: as of TokenTransformer.
    """

    def __init__(self, kind, count, grid, width, heads=8):
        super().__init__()
        self.kind, self.count = kind, count
        self.absent = nn.Parameter(torch.zeros(width))  # stands for a condition that is dropped or not known
        if kind == "class":
            self.embedding = nn.Embedding(count, width)
        elif kind == "segmentation":
            convolutions = [nn.Conv2d(inside, width, 3, padding=1) for inside in (count, width)]
            self.embedding = nn.Sequential(convolutions[0], nn.GELU(), convolutions[1])
            self.positions, self.block = Positions(grid, width), Block(width, heads)
            zero(self.block.project)  # at first each position sees its own surroundings alone
            zero(self.block.mlp[2])

    def forward(self, known, batch, drop=None):
        """known: None, classes (B,) int64 with −1 unknown, or label shares (B, L, h, w); drop: (B,) bool
        → (B, N or 1, W)."""
        absent = self.absent.expand(batch, 1, -1)
        if self.kind == "none" or known is None:
            return absent
        if self.kind == "class":
            features = self.embedding(known.clamp_min(0))[:, None]  # (B, 1, W)
            drop = known < 0 if drop is None else drop | (known < 0)
        else:
            features = self.block(self.embedding(known).flatten(2).mT + self.positions())  # (B, N, W)
        return features if drop is None else torch.where(drop[:, None, None], absent, features)


class CodeEmbedding(nn.Module):
    """A vector for each code, into and out of a transformer: learned, plus a linear map of the code itself.

    With the map, codes that lie close begin alike, and what is learned of one serves its neighbours. 300
    steps of a small TokenTransformer on the demo end at 4.83±0.02 nats a position with it, and at 4.95±0.01
    without (three seeds).

    size: codes; width: features; codes: (size, D) vectors that are known of them, or None.
    """

    def __init__(self, size, width, codes=None):
        super().__init__()
        self.learned, self.map = nn.Parameter(0.04 * torch.randn(size, width)), None
        if codes is not None:
            self.register_buffer("codes", (codes - codes.mean(dim=0)) / codes.std().clamp_min(1e-6))
            self.map = nn.Parameter(0.5 * codes.shape[1] ** -0.5 * torch.randn(codes.shape[1], width))

    def forward(self, indices):
        """(…) indices → (…, W)."""
        rows = F.embedding(indices, self.learned)
        return rows if self.map is None else rows + F.embedding(indices, self.codes) @ self.map

    def logits(self, x):
        """(…, W) → (…, K), inner products with every code's vector."""
        scores = F.linear(x, self.learned)
        return scores if self.map is None else scores + F.linear(F.linear(x, self.map), self.codes)


class TokenTransformer(nn.Module):
    """p(tokens | condition) in raster order, one step per position (§4.4; Esser et al. 2021 for one codebook).

    The tokens of the position before enter together, as the sum of their embeddings. Of a position, the adjective is
    predicted first and the noun given it, so that their joint distribution is modelled.

    sizes: codes of each of the M tokens of a position; grid: (h, w) positions.
    condition: Condition of the same width.
    codes: M tensors (K_i, D), the tokenizer's codes, so that tokens that are alike start alike; or None.

    >>> gpt = TokenTransformer((70, 61), (8, 8), Condition("class", 16, (8, 8), 64), width=64, depth=2).eval()
    >>> adjective, noun = gpt.loss(torch.zeros(2, 2, 8, 8, dtype=torch.int64), torch.tensor([3, 5]))  # nats
    >>> sample_tokens(gpt, 2, torch.tensor([3, 5]), top_p=0.9).shape
    torch.Size([2, 2, 8, 8])
    """

    def __init__(self, sizes, grid, condition, width=256, depth=6, heads=8, dropout=0.0, codes=None):
        super().__init__()
        self.sizes, self.grid, self.width = tuple(sizes), tuple(grid), width
        self.condition, self.positions = condition, Positions(grid, width)
        pairs = list(zip(sizes, codes or [None] * len(sizes)))
        self.embeddings = nn.ModuleList(CodeEmbedding(size, width, vectors) for size, vectors in pairs)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(depth))
        heads_of_tokens = (nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)) for _ in sizes)
        self.heads = nn.ModuleList(heads_of_tokens)
        self.outputs = nn.ModuleList(CodeEmbedding(size, width, vectors) for size, vectors in pairs)
        for output in self.outputs:  # no code is much likelier than another before anything is learned
            if output.map is not None:
                nn.init.zeros_(output.map)

    def cache(self, batch):
        """Room for keys and values of every position: depth tensors (2, B, H, N, d)."""
        heads = self.blocks[0].heads
        shape = (2, batch, heads, math.prod(self.grid), self.width // heads)
        return [self.start.new_empty(shape) for _ in self.blocks]

    def before(self, tokens):
        """(B, M, T) tokens of some positions → (B, T, W), the sum of their embeddings."""
        return sum(embedding(tokens[:, i]) for i, embedding in enumerate(self.embeddings))

    def hidden(self, previous, condition, cache=None, start=0):
        """Features (B, T, W) from which positions start … start + T − 1 are predicted.

        previous: (B, T, W) of `before`, or `self.start` at position 0; condition: (B, N or 1, W) of Condition.
        """
        here = slice(start, start + previous.shape[1])
        condition = condition if condition.shape[1] == 1 else condition[:, here]
        x = self.dropout(previous + self.positions()[here] + condition)
        for i, block in enumerate(self.blocks):
            x = block(x, causal=True, cache=cache and cache[i], start=start)
        return self.norm(x)

    def logits(self, hidden, tokens, i):
        """(B, T, K_i) logits of token i; tokens (B, ≥ i, T) are those of the same positions before it."""
        hidden = hidden + sum(self.embeddings[j](tokens[:, j]) for j in range(i))
        return self.outputs[i].logits(self.heads[i](hidden))

    def forward(self, tokens, known=None, drop=None):
        """(B, M, h, w) tokens → a list of M logits, (B, N, K_i), each given all tokens before it."""
        tokens = tokens.flatten(2)  # (B, M, N)
        start = self.start.expand(len(tokens), 1, -1)
        previous = torch.cat([start, self.before(tokens[:, :, :-1])], dim=1)  # (B, N, W)
        hidden = self.hidden(previous, self.condition(known, len(tokens), drop))
        return [self.logits(hidden, tokens, i) for i in range(len(self.sizes))]

    def loss(self, tokens, known=None, drop=None, generator=None):
        """Mean negative log-likelihood of each of a position's M tokens → list of () tensors, nats; draws nothing."""
        tokens = tokens.long()
        logits = self(tokens, known, drop)
        return [F.cross_entropy(precise(part).mT, tokens[:, i].flatten(1)) for i, part in enumerate(logits)]


def draw_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One index from each row of (B, K) logits → (B,).

    Temperature 0 takes the likeliest; top_k, only so many of the likeliest (0: all); top_p, the fewest of the
    likeliest with so much probability, above 0, together (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = precise(logits) / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(probability.cumsum(dim=-1) - probability >= top_p, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ordered)
    return gumbel_argmax(logits, generator)


@torch.no_grad()
def sample_tokens(model, batch, known=None, given=None, scale=1.0, generator=None, **choice):
    """Draw images as tokens, position by position, keeping keys and values of those drawn.

    model: TokenTransformer in evaluation mode; known: of Condition, for `batch` images.
    given: (B, M, h, w) int64, −1 where a token is to be drawn; others stay.
    scale: of classifier-free guidance; 1 is the conditional model itself (Ho & Salimans 2022).
    choice: temperature, top_k and top_p of `draw_tokens`.
    Returns (B, M, h, w) int64.
    """
    guided = scale != 1 and known is not None
    copies, positions = 2 if guided else 1, math.prod(model.grid)
    tokens = torch.zeros(batch, len(model.sizes), positions, dtype=torch.int64, device=model.start.device)
    given = torch.full_like(tokens, -1) if given is None else given.flatten(2)
    condition = model.condition(known, batch)
    if guided:  # the second half of the batch goes without the condition
        condition = torch.cat([condition, model.condition(None, batch).expand_as(condition)])
    cache, previous = model.cache(copies * batch), model.start.expand(copies * batch, 1, -1)
    for n in range(positions):
        hidden = model.hidden(previous, condition, cache, n)  # (B, 1, W), or twice as many rows
        here = tokens[:, :, n : n + 1]  # (B, M, 1), a view that fills as tokens are drawn
        for i in range(len(model.sizes)):
            logits = model.logits(hidden, here.repeat(copies, 1, 1), i)[:, 0]
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + scale * (conditional - unconditional)
            drawn = draw_tokens(logits, generator=generator, **choice)
            tokens[:, i, n] = torch.where(given[:, i, n] < 0, drawn, given[:, i, n])
        previous = model.before(here.repeat(copies, 1, 1))
    return tokens.unflatten(2, model.grid)


class Denoiser(nn.Module):
    """The noise in a noisy grid of continuous features ẑ, from which tokens are taken as the nearest codes.

    A transformer of modulated blocks (DiT) on the grid's positions, trained to predict ε (Ho et al. 2020) under the
    cosine schedule z_t = cos(πt/2) ẑ + sin(πt/2) ε (Nichol & Dhariwal 2021), t from 0 to 1.

    channels: of ẑ, all codebooks together.
    grid, condition, width, depth, heads, dropout: as of TokenTransformer.

    `mean` and `std`, (C, 1, 1), scale ẑ to about unit variance; whoever trains sets them.

    >>> denoiser = Denoiser(16, (8, 8), Condition("none", 0, (8, 8), 64), width=64, depth=2).eval()
    >>> sample_features(denoiser, 2, steps=4).shape
    torch.Size([2, 16, 8, 8])
    """

    LAST = 0.98  # of t; beyond it almost nothing of ẑ is left, and an error in ε grows thirtyfold

    def __init__(self, channels, grid, condition, width=256, depth=6, heads=8, dropout=0.0):
        super().__init__()
        self.grid, self.width, self.channels = tuple(grid), width, channels
        self.condition, self.positions = condition, Positions(grid, width)
        self.enter, self.leave = nn.Linear(channels, width), zero(nn.Linear(width, channels))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, modulated=True, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, z_t, t, condition):
        """z_t: (B, C, h, w); t: (B,) in [0, 1]; condition: (B, N or 1, W) of Condition → ε, (B, C, h, w)."""
        frequency = torch.exp(torch.linspace(0, math.log(1000), self.width // 2, device=t.device))
        angle = t[:, None] * frequency  # (B, W/2)
        time = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.mean.dtype)  # (B, W)
        signal = self.time(time)[:, None] + condition  # (B, N or 1, W)
        x = self.enter(z_t.flatten(2).mT) + self.positions()  # (B, N, W)
        for block in self.blocks:
            x = block(x, signal)
        return self.leave(self.norm(x)).mT.unflatten(2, self.grid)

    def loss(self, z, known=None, drop=None, generator=None):
        """Mean squared error of ε at a random t for each of (B, C, h, w) features → a list of one () tensor."""
        z = (z - self.mean) / self.std
        t = torch.rand(len(z), device=z.device, generator=generator) * self.LAST
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        angle = (t * math.pi / 2).to(z.dtype)[:, None, None, None]
        z_t = angle.cos() * z + angle.sin() * noise
        return [F.mse_loss(self(z_t, t, self.condition(known, len(z), drop)), noise)]


@torch.no_grad()
def sample_features(model, batch, known=None, given=None, mask=None, scale=1.0, steps=50, generator=None):
    """Draw grids of features by DDIM (Song et al. 2021), whose only noise is the first and that of given features.

    model: Denoiser in evaluation mode; known: of Condition, for `batch` images.
    given: (B, C, h, w) features to keep where mask, of that shape or (B, 1, h, w), is True; noised as each step is.
    scale: of classifier-free guidance; steps: evaluations of the network (twice as many with guidance).
    Returns (B, C, h, w).
    """
    shape, like = (batch, model.channels, *model.grid), dict(device=model.mean.device, dtype=model.mean.dtype)
    condition, absent = model.condition(known, batch), model.condition(None, batch)
    z_t = torch.randn(shape, generator=generator, **like)
    angles = torch.linspace(model.LAST, 0, steps + 1, device=z_t.device) * math.pi / 2
    for now, then in zip(angles[:-1], angles[1:]):
        if given is not None:
            noise = torch.randn(shape, generator=generator, **like)
            z_t = torch.where(mask, now.cos() * (given - model.mean) / model.std + now.sin() * noise, z_t)
        t = (now / (math.pi / 2)).expand(batch)
        noise = model(z_t, t, condition)
        if scale != 1 and known is not None:
            unconditional = model(z_t, t, absent)
            noise = unconditional + scale * (noise - unconditional)
        z = ((z_t - now.sin() * noise) / now.cos()).clamp(-5, 5)  # features have unit variance
        noise = (z_t - now.cos() * z) / now.sin()
        z_t = then.cos() * z + then.sin() * noise
    z = z_t * model.std + model.mean
    return z if given is None else torch.where(mask, given, z)


# ======== Published weights: VQGAN's, in the names of taming-transformers

TAMING = {  # part of a parameter's name here → there
    "encoder.layers": "encoder",
    "decoder.layers": "decoder",
    "decoder.to_image": "decoder.conv_out",
    "to_codes": "quant_conv",
    "from_codes": "post_quant_conv",
    "codebook.vectors": "quantize.embedding.weight",
    "layers": "loss.discriminator.main",
    "sample.1": "sample.conv",
    "project": "proj_out",
    "shortcut": "nin_shortcut",
    "-": ".",
}


def taming_names(name):
    """A parameter's name here → its names there, whose tensors are concatenated."""
    for ours, theirs in TAMING.items():
        name = name.replace(ours, theirs)
    if "query_key_value" not in name:
        return [name]
    return [name.replace("query_key_value", part) for part in ("q", "k", "v")]


def load_taming(model, discriminator, state):
    """Copy the networks of a taming-transformers VQ-GAN (Esser et al. 2021), by its state dict.

    The 1×1 convolutions beside the codes are taken where they have the shape of ours, and learned codes where they
    are of one codebook of the same shape, so a VQ-GAN of ours computes what theirs does.

    model: VQModel; discriminator: Discriminator or None; state: dict name → tensor.
    Returns names of our parameters that were not taken; a discriminator is taken whole or not at all.
    Raises ValueError naming a parameter of encoder or decoder that is missing or of another shape.
    """
    taken, left = renamed(model, state)
    one_learned = isinstance(model.codebook.vectors, nn.Parameter) and len(model.codebook.sizes) == 1
    if "codebook.vectors" in taken and not one_learned:
        del taken["codebook.vectors"]
        left.append("codebook.vectors")
    for name in left:
        if name.startswith(("encoder", "decoder")):
            there = [tuple(state[key].shape) for key in taming_names(name) if key in state]
            wanted = tuple(model.state_dict()[name].shape)
            raise ValueError(f"{taming_names(name)[0]} is {there or 'missing'}, this network wants {wanted}")
    model.load_state_dict(taken, strict=False)
    if discriminator is not None:
        taken, missing = renamed(discriminator, state)
        if missing or sum(name.startswith(TAMING["layers"]) for name in state) > len(taken):
            return [*left, "discriminator"]
        discriminator.load_state_dict(taken)
    return left


def renamed(network, state):
    """Of a network's parameters those that `state` holds under taming's names in the same shape; names of the rest."""
    taken = {}
    for name, value in network.state_dict().items():
        found = [state[key] for key in taming_names(name) if key in state]
        found = torch.cat(found) if len(found) > 1 else found[0] if found else None
        if found is not None and found.shape == value.shape:
            taken[name] = found
    return taken, [name for name in network.state_dict() if name not in taken]


# ======== Show the work: python vqct.py

@torch.no_grad()
def show_equations():
    """Print Eq. 3, 1 and 2 on a graph of four words, small enough to check by hand."""
    words = ("orange", "sharp", "breast", "beak")
    nodes = torch.tensor([[1.0, 0.0], [-2.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    transfer = CodebookTransfer((2, 2, 2, 2), NormalizedAdjacency([(0, 2), (0, 3), (1, 3)], 4))
    layers = [nodes]
    for layer in transfer.layers:
        nn.init.eye_(layer.weight)
        layers.append(F.relu(layer(layers[-1], transfer.adjacency)))
    print("\nEq. 3 on the pairs orange breast, orange beak, sharp beak, with W = I in all three layers")
    print(f"  {'':8}{'row of Â':30}" + "".join(f"{name:16}" for name in ("H0", "H1", "H2", "H3 = code")))
    for word, row, *vectors in zip(words, transfer.adjacency(torch.eye(4)), *layers):
        cells = " ".join(f"{value:.3f}" for value in row)
        print(f"  {word:8}{cells:30}" + "".join(f"{f'{a:.3f} {b:.3f}':16}" for a, b in vectors))
    print("  by hand, degrees + 1 being 3, 2, 2, 3: the first layer gives orange")
    print(f"  (1, 0)/√(3·3) + (1, 1)/√(3·2) + (0, 2)/√(3·3) = {1 / 3 + 6**-0.5:.3f} {2 / 3 + 6**-0.5:.3f}")
    print("\nEq. 1 and 2 on one position, whose channels are split in two (step 3)")
    z = torch.tensor([[1.0, 1.5], [0.0, 2.0]])  # ẑ_a and ẑ_n
    for name, part, codes, listed in zip(("ẑ_a", "ẑ_n"), z, layers[-1].split(2), (words[:2], words[2:])):
        distance, index = (part - codes).square().sum(1), nearest_code(part[None], codes).item()
        loss = VectorQuantizer(beta=0.25)(part.view(1, 2, 1, 1), codes)[2].item()
        apart = ", ".join(f"{value:.3f} from {word}" for value, word in zip(distance, listed))
        print(f"  {name} = {part.tolist()} lies ‖ẑ − e‖² = {apart}: s = {index}, {listed[index]}")
        print(f"    codebook and commitment terms, means over channels: (1 + β) {distance[index]:.3f} / 2 = {loss:.4f}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack β and ẑ
    show_equations()
