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

`prior.py` makes the words, vectors and graph that VQModel starts from; Eq. 2's pixel term and the training step
are `Trainer` in train.py. Each class and function can be lifted out with what else it names here, and nothing more. To see both networks'
shapes, and Eq. 3, 1 and 2 worked on four words:

    python vqct.py
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from prior import PARTS, command, option

# ---------------------------------------------------------------------------------------------
# §3.1, Eq. 1 and 2: the nearest code, and the losses of a code that was chosen


@torch.no_grad()
def nearest_code(z, codebook, row_chunk=None, code_chunk=None):
    """Index of the code nearest to each feature in Euclidean distance (paper Eq. 1).

    ‖z − e‖² = ‖z‖² + 2 (½‖e‖² − z·e), and ‖z‖² is the same for every code, so this is

        (0.5 * codebook.square().sum(1) - z @ codebook.T).argmin(1)

    taken tile by tile with a running minimum, as the (N, K) matrix of a real codebook fills gigabytes; and with
    care for rounding: the origin is moved to the codes' middle, and equal codes are told apart by their bits.

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
    row_chunk = row_chunk or (1024 if on_cpu else 8192)
    code_chunk = code_chunk or (512 if on_cpu else 8192)
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        codebook = codebook.to(dtype)
        first, offset = _first_of_equal(codebook), _exact_offset(codebook)
        codes = codebook - offset
        half_norms = codes.square().sum(1).mul_(0.5)  # (K,)
        rows = z.to(dtype) - offset
        search = _search_blocks if on_cpu else _search_tiles
        return first[search(rows, codes, half_norms, row_chunk, code_chunk)]


def _search_tiles(z, codes, half_norms, row_chunk, code_chunk):
    """(N,) the code of least score of each row, by a running minimum over tiles; nothing waits for the device."""
    indices = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for rows, out in zip(z.split(row_chunk), indices.split(row_chunk)):
        best = rows.new_full((len(rows),), math.inf)
        for start in range(0, len(codes), code_chunk):
            tile = slice(start, start + code_chunk)
            score, index = torch.addmm(half_norms[tile], rows, codes[tile].T, alpha=-1).min(dim=1)  # (rows,)
            out.copy_(torch.where(score < best, index + start, out))  # strict, so that ties stay with the lower index
            best = torch.minimum(score, best)
    return indices


def _search_blocks(z, codes, half_norms, row_chunk, code_chunk, block=64):
    """The same where a minimum is found twenty times as fast as its place: each row's best block of codes, then the code in it."""
    block = min(block, code_chunk)
    code_chunk -= code_chunk % block
    missing = -len(codes) % block
    codes, half_norms = F.pad(codes, (0, 0, 0, missing)), F.pad(half_norms, (0, missing), value=math.inf)
    best = torch.zeros(len(z), dtype=torch.int64)
    room = z.new_empty(min(row_chunk, len(z)), min(code_chunk, len(codes)))  # one tile's scores, again and again
    least = z.new_empty(len(room), len(codes) // block)
    for rows, out in zip(z.split(row_chunk), best.split(row_chunk)):
        for start in range(0, len(codes) if least.shape[1] > 1 else 0, code_chunk):
            tile = codes[start : start + code_chunk]
            scores = torch.addmm(half_norms[start : start + code_chunk], rows, tile.T, alpha=-1, out=room[: len(rows), : len(tile)])
            place = slice(start // block, (start + len(tile)) // block)
            torch.amin(scores.unflatten(1, (-1, block)), dim=2, out=least[: len(rows), place])
        if least.shape[1] > 1:
            out.copy_(least[: len(rows)].argmin(dim=1))
    indices = torch.empty_like(best)
    for number, group in enumerate(best.argsort(stable=True).split(best.bincount(minlength=least.shape[1]).tolist())):
        inside = slice(number * block, (number + 1) * block)
        for part in group.split(row_chunk):
            scores = torch.addmm(half_norms[inside], z[part], codes[inside].T, alpha=-1)  # (part, block)
            indices[part] = scores.argmin(dim=1) + inside.start
    return indices


def _first_of_equal(codebook):
    """(K,) the lowest index of a code equal to each code, by sorting a 64-bit hash of their bits.

    A product may round equal columns differently by where they stand in a tile, so it cannot tell ties.
    Two different codes share a hash with a chance of 2⁻⁶⁴, of 2⁻⁴⁰ if their entries are small integers.
    """
    hashed, order = torch.cat([_hash_rows(codes) for codes in codebook.split(1024)]).sort(stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = hashed[1:] != hashed[:-1]
    start = torch.where(new, torch.arange(len(order), device=order.device), 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, order[start])


def _hash_rows(codes):
    """(K, D) float32 or float64 → (K,) int64: the bits of the entries times fixed odd numbers, summed modulo 2⁶⁴."""
    bits = (codes + 0.0).view(torch.int32 if codes.dtype == torch.float32 else torch.int64).long()  # −0 becomes 0
    bits = bits ^ (bits >> 32)  # round numbers have their bits at the top, where a product loses them
    number = torch.arange(1, bits.shape[1] + 1, device=bits.device) * -0x61C8864680B583EB
    number = (number ^ (number >> 30)) * -0x40A7B892E31B1A47  # mixed as by splitmix64 (Steele et al. 2014)
    return (bits * (number ^ (number >> 27) | 1)).sum(1)


def _exact_offset(codebook):
    """(D,) the middle of the codes, rounded to a power of two of their spread.

    Distances do not depend on the origin, but the rounding of a product does: codes far from zero
    and close together would be confused. Medians of a sample, so that no outlier moves the middle;
    a coarse grid, so that the subtraction itself is exact.
    """
    sample = codebook[:: max(1, len(codebook) // 64)]
    middle = sample.sort(0).values[(len(sample) - 1) // 2]  # the median, whose own kernel is not deterministic on CUDA
    limits = torch.finfo(codebook.dtype)
    spread = (sample - middle).abs().median() + middle.abs().amax() * limits.eps + limits.tiny
    grid = torch.exp2(spread.log2().ceil())
    return (middle / grid).round() * grid


def look_up(indices, codebook):
    """(B, n, H, W) int64 and (K, D) codes → (B, D, H, W): the code of each position, or the mean of its n codes."""
    return F.embedding(indices, codebook).mean(1).movedim(-1, 1)


class VectorQuantizer(nn.Module):
    """Eq. 1 and the last two terms of Eq. 2: ‖sg[ẑ] − z_q‖² + β ‖sg[z_q] − ẑ‖².

    Each term is a mean over elements. The codebook is an argument, so it may be a parameter or
    the output of a network; the first term is its only gradient.

    Args:
        beta: weight of the commitment term (0.25, van den Oord et al. 2017).
        beta_on: "commitment" as in Eq. 2, or "codebook", the well-known slip of VQGAN's code.
        neighbours: nearest codes whose mean is z_q; the paper takes one, the authors' code two for adjectives.
    """

    def __init__(self, beta=0.25, beta_on="commitment", neighbours=1):
        super().__init__()
        self.neighbours = neighbours
        self.codebook_weight, self.commitment_weight = (1.0, beta) if beta_on == "commitment" else (beta, 1.0)

    @torch.no_grad()
    def indices(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → (B, n, H, W) int64, Eq. 1; n neighbours, nearest first."""
        features = z.movedim(1, -1)  # (B, H, W, D)
        rows = features.reshape(-1, features.shape[-1])
        if self.neighbours == 1:
            found = nearest_code(rows, codebook)
        else:
            mode = "donot_use_mm_for_euclid_dist"  # exact for near ties
            distances = (torch.cdist(part, codebook, compute_mode=mode) for part in rows.to(codebook.dtype).split(1024))
            found = torch.cat([part.topk(self.neighbours, largest=False).indices for part in distances])
        return found.view(*features.shape[:-1], self.neighbours).movedim(-1, 1)

    def forward(self, z, codebook):
        """z: (B, D, H, W), codebook: (K, D) → z_q (B, D, H, W), indices (B, n, H, W), loss ().

        In training z_q carries the decoder's gradient straight through to z; in evaluation it is
        exactly the code, so that decoding by indices gives the same image. Always float32.
        """
        with torch.autocast(z.device.type, enabled=False):
            codebook = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
            z = z.to(codebook.dtype)
            return self.quantize(z, codebook, self.indices(z, codebook))

    def quantize(self, z, codebook, indices):
        """The given indices' codes: what `forward` returns."""
        z_q = look_up(indices, codebook)  # (B, D, H, W)
        loss = self.codebook_weight * F.mse_loss(z_q, z.detach()) + self.commitment_weight * F.mse_loss(z, z_q.detach())
        if self.training:
            z_q = z + (z_q - z).detach()
        return z_q, indices, loss


# ---------------------------------------------------------------------------------------------
# §3.3 step 2, Eq. 3: the modifying graph, and the graph convolutions that transfer codes along it


class _SymmetricProduct(torch.autograd.Function):
    """Â H for a constant symmetric sparse Â in compressed rows: the gradient is the same product, no transpose kept."""

    @staticmethod
    def forward(ctx, row_start, column, value, nodes):
        ctx.adjacency = row_start, column, value
        # A weighted sum of looked-up rows: embedding bags' kernels take half the time of sparse matrices' on CPUs.
        return F.embedding_bag(column, nodes, row_start, mode="sum", per_sample_weights=value, include_last_offset=True)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, None, _SymmetricProduct.apply(*ctx.adjacency, gradient.contiguous())


class NormalizedAdjacency(nn.Module):
    """Â = D^{-1/2} (A + I) D^{-1/2} of an undirected graph, sparse (Kipf & Welling 2017).

    Args:
        edges: (E, 2) int64 node indices, each undirected edge once; repeats count once, as the
            paper's A is binary.
        nodes: number of nodes N.
        weights: (E,) entries of A instead of ones, each edge then given once; the authors' code has
            the times a pair occurs.
    Raises:
        ValueError: if an edge names a node outside 0 … N−1 or joins a node to itself.
    """

    WITH_WEIGHTED_BAGS = ("cpu", "cuda")  # elsewhere every edge's message is scattered

    def __init__(self, edges, nodes, weights=None):
        super().__init__()
        edges = torch.as_tensor(edges, dtype=torch.int64).reshape(-1, 2)
        if len(edges) and (edges.min() < 0 or edges.max() >= nodes or (edges[:, 0] == edges[:, 1]).any()):
            raise ValueError(f"edges must join two different nodes of 0 … {nodes - 1}")
        loops = torch.arange(nodes)[:, None].expand(-1, 2)
        pairs, place = torch.cat([edges, edges.flip(1), loops]).unique(dim=0, return_inverse=True)  # sorted by row, then column
        value = torch.ones(len(pairs), dtype=torch.float64)
        if weights is not None:
            weights = torch.as_tensor(weights, dtype=torch.float64)
            value[place] = torch.cat([weights, weights, torch.ones(nodes, dtype=torch.float64)])
        entries = torch.bincount(pairs[:, 0], minlength=nodes)
        scale = torch.bincount(pairs[:, 0], value, minlength=nodes).rsqrt()
        self.nodes = nodes
        self.register_buffer("row", pairs[:, 0].contiguous())  # (2E + N,)
        self.register_buffer("column", pairs[:, 1].contiguous())  # (2E + N,)
        self.register_buffer("row_start", F.pad(entries.cumsum(0), (1, 0)))  # (N + 1,)
        self.register_buffer("value", (value * scale[pairs[:, 0]] * scale[pairs[:, 1]]).float())  # (2E + N,)

    def forward(self, nodes):
        """(N, D) → Â nodes, (N, D)."""
        value = self.value.to(nodes.dtype)
        if nodes.device.type in self.WITH_WEIGHTED_BAGS:
            return _SymmetricProduct.apply(self.row_start, self.column, value, nodes)
        return torch.zeros_like(nodes).index_add(0, self.row, value[:, None] * nodes[self.column])


class GraphConvolution(nn.Module):
    """One layer of Eq. 3 before its activation: Â H W."""

    def __init__(self, in_features, out_features):
        super().__init__()
        # Scaled for the ReLU that follows: without a graph, layers keep the scale of their input (Â averages it down).
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * math.sqrt(2 / in_features))

    def forward(self, nodes, adjacency):
        """nodes: (N, in_features); adjacency: a module or function (N, D) → (N, D)."""
        # The product with Â on the narrower side; of a constant, it needs no backward pass.
        if self.weight.shape[0] < self.weight.shape[1] or not nodes.requires_grad:
            return adjacency(nodes) @ self.weight
        return adjacency(nodes @ self.weight)  # (N, out_features)


class CodebookTransfer(nn.Module):
    """Eq. 3, the graph convolution-based codebook transfer network: H ← ReLU(Â H W), three times.

    Args:
        widths: (d, …, D) features of the language model's vectors, of each hidden layer and of
            the codes; four numbers make the paper's three convolutions.
        adjacency: a NormalizedAdjacency; `nn.Identity()` makes the paper's MLP (Tables 2 and 3).
        last_relu: whether a ReLU follows the last layer too, as in Eq. 3; the authors' code has none.
        dropout: share of hidden features zeroed in training; the authors' code has 0.5.
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


# ---------------------------------------------------------------------------------------------
# §3.3 step 3: two codebooks, each for its half of the channels


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

    def train(self, mode=True):
        self._cached = None
        return super().train(mode)

    def _load_from_state_dict(self, *args):
        self._cached = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse=True):
        self._cached = None
        return super()._apply(fn, recurse)


class Output(NamedTuple):
    """What a forward pass gives."""

    x_hat: torch.Tensor  # (B, 3, H, W) reconstruction, not clamped
    indices: torch.Tensor  # (B, M, h, w) int64 codes, one for each codebook (more where neighbours are averaged)
    quantizer_loss: torch.Tensor  # () the quantizers' losses, Eq. 2's last terms in VQCT, summed over codebooks


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
        transfer = self.codebook.transfer
        self.code_dim = self.codebook.vectors.shape[1] if transfer is None else transfer.layers[-1].weight.shape[1]
        total = self.code_dim * len(self.codebook.sizes)
        shape = (config.channels, tuple(config.multipliers), config.blocks, config.z_channels)
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.to_codes = nn.Conv2d(config.z_channels, total, 1)
        self.from_codes = nn.Conv2d(total, config.z_channels, 1)
        keep_variance(self.to_codes), keep_variance(self.from_codes)
        neighbours = [config.adjective_neighbours, 1] if len(self.codebook.sizes) == 2 else [1]
        self.quantizers = nn.ModuleList(
            make_quantizer(config, self.code_dim, size, count) for size, count in zip(self.codebook.sizes, neighbours)
        )

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
        # each loss is a mean over its own channels, so two codebooks weigh twice what one does
        return Output(self.decode_features(z_q), torch.cat(indices, dim=1), sum(losses))

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] → (B, M, h, w) int64 indices, those of `forward`."""
        return self.snap(self.features(x))

    def snap(self, features):
        """Sequence of (B, D, h, w) continuous features, one for each codebook → (B, M, h, w) int64, their codes."""
        quantized = zip(self.quantizers, features, self.codebook())
        return torch.cat([quantizer.indices(z, codebook) for quantizer, z, codebook in quantized], dim=1)

    def decode(self, indices):
        """(B, M, h, w) int64 → (B, 3, H, W); in evaluation mode what `forward` gives for these codes."""
        return self.decode_features(look_up(index, codebook) for codebook, index in zip(self.codebook(), self.by_codebook(indices)))

    def by_codebook(self, indices):
        """(B, M, h, w) → a tuple of (B, n, h, w), the n indices of each codebook."""
        return indices.split([quantizer.neighbours for quantizer in self.quantizers], dim=1)

    def anneal(self, progress):
        """Set the quantizers' temperature for a share `progress` of training, 0 … 1, by a cosine from 1 to its end."""
        end = self.config.temperature_end
        for quantizer in (quantizer for quantizer in self.quantizers if hasattr(quantizer, "temperature")):
            quantizer.temperature = end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------
# §4.1, the network: VQGAN's encoder and decoder (Esser et al. 2021)


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
    for module in network.modules():  # in a second pass, as a block comes before its convolutions
        if isinstance(module, (ResidualBlock, AttentionBlock)):
            nn.init.zeros_(module.last.weight)


class Encoder(nn.Module):
    """Image to continuous features, ẑ = E(x).

    Args:
        channels: width of the first level.
        multipliers: width of each level in units of `channels`; each level after the first halves
            the resolution, so (1, 1, 2, 2, 4) is f16.
        blocks: residual blocks per level.
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
# §4.1, the losses of VQ-GAN: the adversary and the perceptual distance


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
        """(B, 3, H, W) → (B, 1, H/8 − 2, W/8 − 2) logits for three layers, high for real patches."""
        return self.layers(x)


def hinge_loss(real_logits, fake_logits):
    """Discriminator's loss, ½ [max(0, 1 − D(x)) + max(0, 1 + D(x̂))] averaged over patches → ()."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def across(x, how):
    """A tensor of every process of torch.distributed, joined without gradient; x itself where there is one process.

    Args:
        how: "mean" or "max", elementwise; "rows": concatenated along the first axis; "first": the first process's.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    count, x = torch.distributed.get_world_size(), x.detach().clone()
    if how == "rows":
        parts = [torch.empty_like(x) for _ in range(count)]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts)
    if how == "first":
        torch.distributed.broadcast(x, 0)
    else:
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX if how == "max" else torch.distributed.ReduceOp.SUM)
    return x / count if how == "mean" else x


def adaptive_weight(x_hat, last_weight, reconstruction_gradient, adversarial_gradient):
    """λ = ‖∇L_rec‖ / (‖∇L_GAN‖ + 1e-4) at the decoder's last layer, at most 1e4 (VQGAN Eq. 7).

    Args:
        x_hat: (B, 3, H, W) reconstruction, still attached to its graph.
        last_weight: the weight that produced it.
        reconstruction_gradient, adversarial_gradient: (B, 3, H, W) gradients of both losses at
            x_hat. Taken there once, they serve both λ and the generator's own backward pass.
    Returns:
        () without gradient; of the mean gradients, where several processes share a batch.
    """
    norms = []
    for gradient in (reconstruction_gradient, adversarial_gradient):
        (at_weight,) = torch.autograd.grad(x_hat, last_weight, gradient, retain_graph=True)
        norms.append(across(at_weight, "mean").norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)


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
        distance = 0.0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.taps:
                distance = distance + self._difference(x, y, self.heads[self.taps.index(i)])
        return distance


# ---------------------------------------------------------------------------------------------
# Tables 1 and 6: the quantizers that VQCT is compared with, each with VectorQuantizer's interface:
# forward(z, codebook) → z_q, indices, loss; indices(z, codebook), those of forward in evaluation; `neighbours`, the codes
# averaged at a position; and, where training anneals it, `temperature`


class GumbelQuantizer(nn.Module):
    """Gumbel-VQ: codes mixed by Gumbel-softmax weights while training, the likeliest code in evaluation.

    DALL-E's relaxation (Ramesh et al. 2021) as VQ-GAN uses it: a 1×1 convolution gives K logits a
    position, so the codebook is only decoded from; the loss is KL(softmax(logits) ‖ uniform), summed
    over codes and averaged over positions.

    Args:
        dim: channels of ẑ; size: codes K.
        kl_weight: of that loss; 5e-4 is the layer's default in VQ-GAN's code.
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
def draw(logits):
    """(N, K) → (N,) int64, each row one draw from softmax(logits), by the Gumbel trick: no check that waits for the device."""
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(1)


class ClusteredQuantizer(VectorQuantizer):
    """CVQ: online clustering (Zheng & Vedaldi 2023). Codes that are not chosen move to features of the batch.

    With n_k the batch's share of code k, N_k ← γ N_k + (1 − γ) n_k and α_k = exp(−10 K N_k / (1 − γ) − 1e-3),
    each training pass moves e_k ← (1 − α_k) e_k + α_k ẑ_k. The anchor ẑ_k is a feature of the batch, drawn
    with probability softmax(−‖ẑ − e_k‖²) over features (the paper's "probabilistic random").

    Args:
        size: codes K.
        decay: γ.
        contrastive_weight: of the optional loss that, for each code, holds the nearest N/K features
            against the far half, by cosine at temperature 0.07.
        others: as VectorQuantizer.

    The codebook must be a leaf parameter (or views of one), since it is written to.
    """

    def __init__(self, size, decay=0.99, contrastive_weight=0.0, **eq2):
        super().__init__(**eq2)
        self.decay, self.contrastive_weight = decay, contrastive_weight
        self.register_buffer("usage", torch.zeros(size))  # N_k

    def quantize(self, z, codebook, indices):
        """As VectorQuantizer; the codes are moved after the loss is taken."""
        z_q, indices, loss = super().quantize(z, codebook, indices)
        if self.training:
            features = z.movedim(1, -1).flatten(0, -2)  # (N, D)
            if self.contrastive_weight > 0:
                loss = loss + self.contrastive_weight * self.contrast(features, codebook.clone())  # the original is about to change
            self.re_anchor(features.detach(), indices, codebook.data)  # autograd need not know: nothing saved for it depends on the codes
        return z_q, indices, loss

    @torch.no_grad()
    def re_anchor(self, features, indices, codebook):
        """Move each code by α_k (ẑ_k − e_k), in place."""
        size = len(codebook)
        share = torch.zeros_like(self.usage)  # (K,), not by bincount, which waits for the device
        share.index_add_(0, indices.flatten(), share.new_full((indices.numel(),), 1 / indices.numel()))
        self.usage.lerp_(across(share, "mean"), 1 - self.decay)
        features = across(features, "rows")
        alpha = torch.exp(-10 * size * self.usage / (1 - self.decay) - 1e-3)[:, None]  # (K, 1)
        anchors = torch.cat([features[draw(-torch.cdist(codes, features).square())] for codes in codebook.split(1024)])
        codebook.copy_(across(codebook.lerp(anchors, alpha), "first"))

    @staticmethod
    def contrast(features, codebook, temperature=0.07):
        """(N, D), (K, D) → (): cross-entropy of each code's positive against its negatives."""
        cosine = F.normalize(codebook, dim=1) @ F.normalize(features, dim=1).T  # (K, N)
        ranked = cosine.sort(dim=1, descending=True).values
        count, size = len(features), len(codebook)
        positive = ranked[:, : max(1, count // size)].mean(1, keepdim=True)  # (K, 1)
        logits = torch.cat([positive, ranked[:, count - count // 2 :]], dim=1) / temperature  # (K, 1 + N/2)
        return F.cross_entropy(logits, logits.new_zeros(size, dtype=torch.int64))


class RegularizedQuantizer(VectorQuantizer):
    """Reg-VQ: regularized quantization (Zhang et al. 2023). Three terms keep the codes in use while training.

    (1) Prior distribution: KL(p̄ ‖ uniform) of the batch's mean token distribution p̄, a position's own
    being softmax(−‖ẑ − e_k‖² / τ). (2) Stochastic mask: a random share of positions takes a code drawn from
    its distribution by the Gumbel trick, the others the nearest. (3) Probabilistic contrastive loss: a
    position's feature and code are pulled together against the codes of other positions by cosine at
    temperature 0.07, the pull weakened by w = exp(−‖e_drawn − e_nearest‖² / mean), the noise of the draw.

    Args:
        kl_weight: of (1); mask_ratio: of (2); contrastive_weight: of (3).
        others: as VectorQuantizer.

    Our choice, not the paper's: the softmax over squared distances, w, the temperature 0.07, at most
    1,024 positions in (3), and the defaults of all three arguments. `temperature` τ is the trainer's to
    anneal.
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
        chosen = torch.where(masked, draw(logits), nearest)
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
        features, chosen, nearest = features[:positions], chosen[:positions], nearest[:positions]
        codes = codebook[chosen]  # (P, D)
        noise = (codes - codebook[nearest]).square().sum(1).detach()  # (P,), zero where the nearest was taken
        mean = noise.sum() / (noise > 0).sum().clamp_min(1)
        pull = torch.exp(-noise / mean.clamp_min(1e-12))
        cosine = F.normalize(features, dim=1) @ F.normalize(codes, dim=1).T / temperature  # (P, P)
        own = torch.eye(len(features), dtype=torch.bool, device=features.device)
        same = (chosen[:, None] == chosen[None]) & ~own  # the same code elsewhere is no counter-example
        logits = torch.where(own, cosine * pull[:, None], cosine).masked_fill(same, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(features), device=features.device))


# ---------------------------------------------------------------------------------------------
# Tables 1 to 6: every system is a ModelConfig, a choice of quantizer, of codes and of their transfer


QUANTIZERS = {  # `quantizer` → what makes it: (ModelConfig, channels D, codes K, arguments of VectorQuantizer) → module
    "nearest": lambda config, dim, size, eq2: VectorQuantizer(**eq2),
    "gumbel": lambda config, dim, size, eq2: GumbelQuantizer(dim, size, config.kl_weight, config.straight_through),
    "cvq": lambda config, dim, size, eq2: ClusteredQuantizer(size, config.usage_decay, config.contrastive_weight, **eq2),
    "regvq": lambda config, dim, size, eq2: RegularizedQuantizer(config.kl_weight, config.mask_ratio, config.contrastive_weight, **eq2),
}


@dataclass
class ModelConfig:
    """Shape of the network and origin of its codes; the defaults are the paper's f16 network."""

    resolution: int = option(256, "pixels per side; the paper resizes every data set to 256")
    channels: int = option(128, "width of the first level of encoder and decoder (VQGAN)")
    multipliers: tuple = option((1, 1, 2, 2, 4), "width of each level; levels − 1 halvings, so five levels are f16")
    blocks: int = option(2, "residual blocks per level (VQGAN)")
    z_channels: int = option(256, "channels between network and codes (VQGAN)")
    code_dim: int = option(256, "channels of all codes of a position together; the paper splits them between its codebooks")
    codes: str = option(
        "words", "where codes start: the prior's words, random vectors, or VQ-VAE's ±1/K", choices=("words", "random", "uniform")
    )
    vector_scale: str = option(
        "rms", "word vectors over their root mean square, standardised, or as they come", choices=("rms", "standard", "none")
    )
    codebooks: int = option(2, "2: adjectives and nouns apart (MCB); 1: together (SCB), or no prior at all", choices=(1, 2))
    codebook_size: int = option(0, "codes when there is no prior; 0 takes the prior's adjectives and nouns")
    trained: bool = option(False, "train the starting vectors themselves")
    transfer: str = option(
        "gcn", "how vectors become codes: graph convolutions, the same without graph, not at all", choices=("gcn", "mlp", "none")
    )
    transfer_layers: int = option(3, "layers of the transfer network (paper: three; authors' code: two)")
    transfer_width: int = option(512, "features of its hidden layers; the width of CLIP's token vectors")
    transfer_dropout: float = option(0.0, "share of its hidden features zeroed in training (authors' code: 0.5)")
    last_relu: bool = option(True, "ReLU after its last layer too, as in Eq. 3 (authors' code: none)")
    weighted_edges: bool = option(False, "A counts how often a pair occurs, as in the authors' code; the paper's is binary")
    quantizer: str = option("nearest", "nearest code (Eq. 1), Gumbel-VQ, CVQ or Reg-VQ", choices=tuple(QUANTIZERS))
    beta: float = option(0.25, "weight of the commitment term of Eq. 2")
    beta_on: str = option("commitment", "the term that beta weighs: Eq. 2's, or the authors' code's", choices=("commitment", "codebook"))
    adjective_neighbours: int = option(1, "nearest adjectives whose mean is a position's adjective code (authors' code: two)")
    kl_weight: float = option(
        5e-4, "weight of the divergence from uniform codes: gumbel's per position (VQ-GAN's code), regvq's per batch (0.1)"
    )
    straight_through: bool = option(True, "gumbel: hard codes forward, soft weights backward; else soft both ways")
    temperature_end: float = option(1 / 16, "gumbel, regvq: temperature at the end of training, by a cosine from 1 (DALL-E)")
    usage_decay: float = option(0.99, "cvq: decay γ of each code's running usage")
    mask_ratio: float = option(0.3, "regvq: share of positions whose code is drawn, not nearest")
    contrastive_weight: float = option(0.0, "cvq, regvq: weight of their contrastive losses (regvq's: 0.01)")


NETWORKS = {  # what the presets change of ModelConfig
    "f16": {},
    "tiny": dict(resolution=64, channels=24, multipliers=(1, 1, 2, 4), blocks=1, z_channels=64, code_dim=16, transfer_width=128),
}


def make_quantizer(config, dim, size, neighbours):
    """The quantizer that a ModelConfig names, for one codebook of `size` codes of `dim` channels.

    Raises:
        ValueError: if the choices exclude each other.
    """
    if neighbours > size or neighbours > 1 and config.quantizer != "nearest":
        raise ValueError(f"the mean of {neighbours} neighbours needs as many codes and quantizer 'nearest', not {config.quantizer}")
    if config.quantizer == "cvq" and (not config.trained or config.transfer != "none"):
        raise ValueError("quantizer 'cvq' moves the codes themselves, so they must be trained and without transfer")
    eq2 = dict(beta=config.beta, beta_on=config.beta_on, neighbours=neighbours)
    return QUANTIZERS[config.quantizer](config, dim, size, eq2)


def needs_prior(config):
    """Whether a ModelConfig's codes depend on a prior: its words, its graph or its sizes."""
    return config.codes == "words" or config.transfer == "gcn" or not config.codebook_size


def make_codebook(config, prior=None):
    """The Codebook that a ModelConfig describes; see VQModel for its arguments and errors."""
    if needs_prior(config) and prior is None:
        raise ValueError(f"codes from '{config.codes}' with transfer '{config.transfer}' need a prior of adjectives and nouns")
    if needs_prior(config):
        words = torch.cat([torch.as_tensor(prior[f"{part}_vectors"], dtype=torch.float32) for part in PARTS])
        sizes = (len(prior["adjective_vectors"]), len(prior["noun_vectors"]))
        sizes = sizes if config.codebooks == 2 else (sum(sizes),)
    else:
        words, sizes = None, (config.codebook_size,) * config.codebooks
    dim = config.code_dim // len(sizes)
    input_dim = dim if config.transfer == "none" or words is None else words.shape[1]
    if config.codes == "words":
        vectors = rescale(words, config.vector_scale)
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
            adjacency = NormalizedAdjacency(edges, sum(sizes), prior["edge_counts"] if config.weighted_edges else None)
        transfer = CodebookTransfer(widths, adjacency, config.last_relu, config.transfer_dropout)
    return Codebook(vectors, sizes, config.trained, transfer)


def rescale(vectors, how):
    """(N, d) word vectors as a ModelConfig's `vector_scale` wants them.

    Language models differ in scale a hundredfold; the layers' initialisation assumes entries of about one.
    """
    if how == "rms":
        return vectors / vectors.square().mean().sqrt().clamp_min(1e-12)
    if how == "standard":
        return (vectors - vectors.mean(0)) / vectors.std(0).clamp_min(1e-12)
    return vectors


# ---------------------------------------------------------------------------------------------
# §4.4, the second stage: a model of the tokens of an image


class Block(nn.Module):
    """Pre-norm transformer block: attention over positions, then two linear layers.

    Args:
        width: features; heads: attention heads, dividing it.
        modulated: whether a signal shifts, scales and gates both branches (DiT's adaLN-zero, Peebles & Xie 2023).
    """

    def __init__(self, width, heads, modulated=False, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=not modulated) for _ in range(2))
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = None
        if modulated:
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            nn.init.zeros_(self.modulation[1].weight)
            nn.init.zeros_(self.modulation[1].bias)

    def attend(self, x, causal, cache, start):
        """(B, T, W) → (B, T, W). With a cache (2, B, H, N, d), x is position `start` and sees all before it."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.query_key_value(x).chunk(3, dim=-1))
        if cache is not None:
            cache[0, :, :, start : start + x.shape[1]], cache[1, :, :, start : start + x.shape[1]] = key, value
            key, value = cache[:, :, :, : start + x.shape[1]]  # (B, H, start + T, d)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal and cache is None)  # (B, H, T, d)
        return self.dropout(self.project(attended.transpose(1, 2).flatten(2)))

    def forward(self, x, signal=None, causal=False, cache=None, start=0):
        """x: (B, T, W); signal: (B, 1, W) or (B, T, W) where modulated → (B, T, W)."""
        if self.modulation is None:
            x = x + self.attend(self.norm1(x), causal, cache, start)
            return x + self.dropout(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(signal).chunk(6, dim=-1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, causal, cache, start)
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))


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

    Of a label map each position sees the labels in and around it, and by a block of attention all others.

    Args:
        kind: "none", "class" or "segmentation".
        count: classes, or labels of the map.
        grid, width, heads: as of TokenTransformer.
    """

    def __init__(self, kind, count, grid, width, heads=8):
        super().__init__()
        self.kind, self.count = kind, count
        self.absent = nn.Parameter(torch.zeros(width))  # stands for a condition that is dropped or not known
        if kind == "class":
            self.embedding = nn.Embedding(count, width)
        elif kind == "segmentation":
            self.embedding = nn.Sequential(nn.Conv2d(count, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
            self.positions, self.block = Positions(grid, width), Block(width, heads)
            for layer in (self.block.project, self.block.mlp[2]):  # at first each position sees its own surroundings alone
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, known, batch, drop=None):
        """known: None, classes (B,) int64 with −1 unknown, or label shares (B, L, h, w); drop: (B,) bool → (B, N or 1, W)."""
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

    With the map, codes that lie close begin alike, and what is learned of one serves its neighbours.

    Args:
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

    The tokens of the position before enter together, as the sum of their embeddings. Of a position, the
    adjective is predicted first and the noun given it, so that their joint distribution is modelled.

    Args:
        sizes: codes of each of the M tokens of a position.
        grid: (h, w) positions.
        condition: Condition of the same width.
        joint: whether a token's prediction sees those before it at its position; a control without.
        codes: M tensors (K_i, D), the tokenizer's codes, as a first idea of which tokens are alike; or None.
    """

    def __init__(self, sizes, grid, condition, width=256, depth=6, heads=8, dropout=0.0, joint=True, codes=None):
        super().__init__()
        self.sizes, self.grid, self.width, self.joint = tuple(sizes), tuple(grid), width, joint
        self.condition, self.positions = condition, Positions(grid, width)
        codes = codes or [None] * len(sizes)
        self.embeddings = nn.ModuleList(CodeEmbedding(size, width, vectors) for size, vectors in zip(sizes, codes))
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)) for _ in sizes)
        self.outputs = nn.ModuleList(CodeEmbedding(size, width, vectors) for size, vectors in zip(sizes, codes))
        for output in self.outputs:  # no code is much likelier than another before anything is learned
            if output.map is not None:
                nn.init.zeros_(output.map)

    def cache(self, batch):
        """Room for keys and values of every position: depth tensors (2, B, H, N, d)."""
        heads, (height, width) = self.blocks[0].heads, self.grid
        shape = (2, batch, heads, height * width, self.width // heads)
        return [self.start.new_empty(shape) for _ in self.blocks]

    def before(self, tokens):
        """(B, M, T) tokens of some positions → (B, T, W), what the positions after them see of them."""
        return sum(embedding(tokens[:, i]) for i, embedding in enumerate(self.embeddings))

    def hidden(self, previous, condition, cache=None, start=0):
        """Features from which positions start … start + T − 1 are predicted.

        Args:
            previous: (B, T, W) of `before`, or `self.start` at position 0.
            condition: (B, N or 1, W) of Condition.
        Returns:
            (B, T, W).
        """
        here = slice(start, start + previous.shape[1])
        condition = condition if condition.shape[1] == 1 else condition[:, here]
        x = self.dropout(previous + self.positions()[here] + condition)
        for i, block in enumerate(self.blocks):
            x = block(x, causal=True, cache=cache and cache[i], start=start)
        return self.norm(x)

    def logits(self, hidden, tokens, i):
        """(B, T, K_i) logits of token i; tokens (B, ≥ i, T) are those of the same positions before it."""
        if self.joint:
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
        """Mean negative log-likelihood of each of the M tokens of a position → list of () tensors, nats; draws nothing (Denoiser's does)."""
        return [F.cross_entropy(part.float().mT, tokens[:, i].flatten(1)) for i, part in enumerate(self(tokens, known, drop))]


def draw_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One index from each row of (B, K) logits → (B,).

    Args:
        temperature: 0 takes the likeliest.
        top_k: only so many of the likeliest, 0 all; top_p: the fewest of the likeliest with so much probability together.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(probability.cumsum(dim=-1) - probability >= top_p, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ordered)
    # the largest of p over an exponential variate is distributed as p, and no check of p waits for the device
    return (logits.softmax(dim=-1) / torch.empty_like(logits).exponential_(generator=generator)).argmax(dim=-1)


@torch.no_grad()
def sample_tokens(model, batch, known=None, given=None, scale=1.0, generator=None, cached=True, **choice):
    """Draw images as tokens, position by position.

    Args:
        model: TokenTransformer in evaluation mode.
        known: of Condition, for `batch` images.
        given: (B, M, h, w) int64, −1 where a token is to be drawn; others stay.
        scale: of classifier-free guidance; 1 is the conditional model itself (Ho & Salimans 2022).
        cached: whether keys and values are kept; without, every position is computed anew each time, to check and time the cache.
        choice: temperature, top_k and top_p of `draw_tokens`.
    Returns:
        (B, M, h, w) int64.
    """
    guided = scale != 1 and known is not None
    height, width = model.grid
    tokens = torch.zeros(batch, len(model.sizes), height * width, dtype=torch.int64, device=model.start.device)
    given = torch.full_like(tokens, -1) if given is None else given.flatten(2)
    condition = model.condition(known, batch)
    if guided:  # the second half of the batch goes without the condition
        condition = torch.cat([condition, model.condition(None, batch).expand_as(condition)])
    rows = batch * (1 + guided)
    cache, start = model.cache(rows) if cached else None, model.start.expand(rows, 1, -1)
    for n in range(height * width):
        both = tokens.repeat(1 + guided, 1, 1)
        if cached:
            previous = start if n == 0 else model.before(both[:, :, n - 1 : n])
            hidden = model.hidden(previous, condition, cache, n)
        else:
            hidden = model.hidden(torch.cat([start, model.before(both[:, :, :n])], dim=1), condition)[:, -1:]
        for i in range(len(model.sizes)):
            logits = model.logits(hidden, tokens[:, :, n : n + 1].repeat(1 + guided, 1, 1), i)[:, 0]
            if guided:
                with_it, without = logits.chunk(2)
                logits = without + scale * (with_it - without)
            drawn = draw_tokens(logits, generator=generator, **choice)
            tokens[:, i, n] = torch.where(given[:, i, n] < 0, drawn, given[:, i, n])
    return tokens.unflatten(2, (height, width))


class Denoiser(nn.Module):
    """The noise in a noisy grid of continuous features ẑ, from which tokens are taken as the nearest codes.

    A transformer of modulated blocks (DiT) on the grid's positions, trained to predict ε (Ho et al. 2020) under
    the cosine schedule z_t = cos(πt/2) ẑ + sin(πt/2) ε (Nichol & Dhariwal 2021), t from 0 to 1.

    Args:
        channels: of ẑ, all codebooks together.
        grid, condition, width, depth, heads, dropout: as of TokenTransformer.

    `mean` and `std`, (C, 1, 1), scale ẑ to about unit variance; whoever trains sets them.
    """

    LAST = 0.98  # beyond it almost nothing of ẑ is left, and an error in ε grows thirtyfold

    def __init__(self, channels, grid, condition, width=256, depth=6, heads=8, dropout=0.0):
        super().__init__()
        self.grid, self.width, self.channels = tuple(grid), width, channels
        self.condition, self.positions = condition, Positions(grid, width)
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, modulated=True, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z_t, t, condition):
        """z_t: (B, C, h, w); t: (B,) in [0, 1]; condition: (B, N or 1, W) of Condition → ε, (B, C, h, w)."""
        frequency = torch.exp(torch.linspace(0, math.log(1000), self.width // 2, device=t.device))
        angle = t[:, None] * frequency  # (B, W/2)
        signal = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))[:, None] + condition  # (B, N or 1, W)
        x = self.enter(z_t.flatten(2).mT) + self.positions()  # (B, N, W)
        for block in self.blocks:
            x = block(x, signal)
        return self.leave(self.norm(x)).mT.unflatten(2, self.grid)

    def loss(self, z, known=None, drop=None, generator=None):
        """Mean squared error of ε at a random t for each of (B, C, h, w) features → a list of one () tensor."""
        z = (z - self.mean) / self.std
        t = torch.rand(len(z), device=z.device, generator=generator) * self.LAST
        noise = torch.randn(z.shape, device=z.device, generator=generator)
        z_t = (t * math.pi / 2).cos()[:, None, None, None] * z + (t * math.pi / 2).sin()[:, None, None, None] * noise
        return [F.mse_loss(self(z_t, t, self.condition(known, len(z), drop)), noise)]


@torch.no_grad()
def sample_features(model, batch, known=None, given=None, mask=None, scale=1.0, steps=50, generator=None):
    """Draw grids of features by DDIM (Song et al. 2021), deterministic after the first noise.

    Args:
        model: Denoiser in evaluation mode.
        known: of Condition, for `batch` images.
        given: (B, C, h, w) features to keep where mask, of that shape or (B, 1, h, w), is True; at each step they get its noise.
        scale: of classifier-free guidance.
        steps: evaluations of the network (twice as many with guidance).
    Returns:
        (B, C, h, w).
    """
    device, guided = model.mean.device, scale != 1 and known is not None
    draw = lambda: torch.randn(batch, model.channels, *model.grid, generator=generator, device=device)
    condition, absent = model.condition(known, batch), model.condition(None, batch)
    z_t, times = draw(), torch.linspace(model.LAST, 0, steps + 1, device=device) * math.pi / 2
    for now, then in zip(times[:-1], times[1:]):
        if given is not None:
            z_t = torch.where(mask, now.cos() * (given - model.mean) / model.std + now.sin() * draw(), z_t)
        t = (now / (math.pi / 2)).expand(batch)
        noise = model(z_t, t, condition)
        if guided:
            without = model(z_t, t, absent)
            noise = without + scale * (noise - without)
        z = ((z_t - now.sin() * noise) / now.cos()).clamp(-5, 5)  # of a unit normal nothing lies beyond
        noise = (z_t - now.cos() * z) / now.sin()
        z_t = then.cos() * z + then.sin() * noise
    z = z_t * model.std + model.mean
    return z if given is None else torch.where(mask, given, z)


# ---------------------------------------------------------------------------------------------
# Published weights: VQGAN's, in the names of taming-transformers


def taming_names(config):
    """A function from a parameter's name here to those in taming-transformers whose concatenation it is, or () for none.

    Args:
        config: ModelConfig; the network's levels and blocks.
    """
    levels, middle = range(len(config.multipliers)), ["mid.block_1", "mid.attn_1", "mid.block_2"]
    down, up = [], []
    for level in levels:
        for block in range(config.blocks):
            down += [f"down.{level}.block.{block}"] + ([f"down.{level}.attn.{block}"] if level == levels[-1] else [])
        down += [f"down.{level}.downsample"] if level < levels[-1] else []
    for level in reversed(levels):
        for block in range(config.blocks + 1):
            up += [f"up.{level}.block.{block}"] + ([f"up.{level}.attn.{block}"] if level == levels[-1] else [])
        up += [f"up.{level}.upsample"] if level > 0 else []
    layers = {"encoder": ["conv_in", *down, *middle, "norm_out", "", "conv_out"], "decoder": ["conv_in", *middle, *up, "norm_out"]}
    whole = {"to_codes": "quant_conv", "from_codes": "post_quant_conv", "decoder.to_image": "decoder.conv_out"}
    inner = {"query_key_value": ("q", "k", "v"), "project": ("proj_out",), "shortcut": ("nin_shortcut",)}

    def names(name):
        """One name of ours → theirs, each for a part along the first axis."""
        if name == "codebook.vectors":
            return ("quantize.embedding.weight",)
        module, _, kind = name.rpartition(".")
        if module in whole:
            return (f"{whole[module]}.{kind}",)
        network, _, rest = module.partition(".layers.")
        if network not in layers:
            return ()
        index, _, part = rest.partition(".")
        return tuple(".".join(filter(None, (network, layers[network][int(index)], theirs, kind))) for theirs in inner.get(part, (part,)))

    return names


def load_taming(model, discriminator, state):
    """Copy the encoder, decoder and discriminator of a taming-transformers VQ-GAN (Esser et al. 2021), by its state dict.

    The 1×1 convolutions beside the codes are taken where they have the shape of ours, and learned codes where they
    are of one codebook of the same shape, so a VQ-GAN of ours computes what theirs does.

    Args:
        model: VQModel; discriminator: Discriminator or None.
        state: dict name → tensor.
    Returns:
        names of our parameters that were not taken; a discriminator is taken whole or not at all.
    Raises:
        ValueError: naming the first parameter of encoder or decoder that is missing or of another shape.
    """
    learned = isinstance(model.codebook.vectors, nn.Parameter) and len(model.codebook.sizes) == 1
    names = taming_names(model.config)
    names_but_codes = lambda name: () if name.startswith("codebook") else names(name)
    taken, left = _renamed(model, names if learned else names_but_codes, state)
    for name in left:
        if name.startswith(("encoder", "decoder")):
            shapes = {key: tuple(state[key].shape) for key in names(name) if key in state}
            raise ValueError(f"{names(name)[0]} is {shapes or 'missing'}, this network wants {tuple(model.state_dict()[name].shape)}")
    model.load_state_dict(taken, strict=False)
    if discriminator is not None:  # its layers are numbered alike
        theirs = "loss.discriminator.main."
        taken, missing = _renamed(discriminator, lambda name: (theirs + name.removeprefix("layers."),), state)
        if missing or sum(name.startswith(theirs) for name in state) > len(taken):
            return [*left, "discriminator"]
        discriminator.load_state_dict(taken)
    return left


def _renamed(network, names, state):
    """Of a network's parameters those that `state` holds under other names and in the same shape, and the names of the rest."""
    taken, left = {}, []
    for name, value in network.state_dict().items():
        found = [state[key] for key in names(name) if key in state]
        found = torch.cat(found) if len(found) > 1 else found[0] if found else None
        if found is not None and found.shape == value.shape:
            taken[name] = found
        else:
            left.append(name)
    return taken, left


# ---------------------------------------------------------------------------------------------
# Show the work: python vqct.py


@torch.no_grad()
def show_network(preset):
    """Print what each part of a preset's network takes and gives, with a prior as large as the authors', and its parameters."""
    prior = {"adjective_vectors": torch.randn(1949, 512), "noun_vectors": torch.randn(4258, 512), "edges": torch.zeros(0, 2)}
    model, discriminator = VQModel(ModelConfig(**NETWORKS[preset]), prior).eval(), Discriminator()
    x = torch.randn(1, 3, model.config.resolution, model.config.resolution)
    z, codes = model.encoder(x), model.codebook()
    features = model.to_codes(z).chunk(len(codes), dim=1)
    z_q = torch.cat([quantizer(*pair)[0] for quantizer, *pair in zip(model.quantizers, features, codes)], dim=1)
    hidden = model.from_codes(z_q)
    x_hat = model.decoder(hidden)
    print(f"{preset}")
    for name, module, given, made in (
        ("encoder", model.encoder, [x], [z]),
        ("to_codes", model.to_codes, [z], features),
        ("codebook", model.codebook, [model.codebook.vectors], codes),
        ("quantizers", model.quantizers, [*features, *codes], [z_q]),
        ("from_codes", model.from_codes, [z_q], [hidden]),
        ("decoder", model.decoder, [hidden], [x_hat]),
        ("discriminator", discriminator, [x_hat], [discriminator(x_hat)]),
    ):
        shapes = [" ".join("×".join(map(str, each.shape)) for each in part) for part in (given, made)]
        print(f"  {name:14} {shapes[0]:46} → {shapes[1]:24} {sum(each.numel() for each in module.parameters()):12,} parameters")


@torch.no_grad()
def show_equations():
    """Print Eq. 3, 1 and 2 on a graph of four words, small enough to check by hand."""
    words, nodes = ("orange", "sharp", "breast", "beak"), torch.tensor([[1.0, 0.0], [-2.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    adjacency = NormalizedAdjacency([(0, 2), (0, 3), (1, 3)], 4)
    transfer = CodebookTransfer((2, 2, 2, 2), adjacency)
    layers = [nodes]
    for layer in transfer.layers:
        nn.init.eye_(layer.weight)
        layers.append(F.relu(layer(layers[-1], adjacency)))
    print("\nEq. 3 on the pairs orange breast, orange beak, sharp beak, with W = I in all three layers")
    print(f"  {'':8} {'degree + 1':12}{'row of Â':30}" + "".join(f"{name:16}" for name in ("H0", "H1", "H2", "H3 = code")))
    for word, degree, row, *vectors in zip(words, (3, 2, 2, 3), adjacency(torch.eye(4)), *layers):
        cells = " ".join(f"{value:.3f}" for value in row)
        print(f"  {word:8} {degree:<12}{cells:30}" + "".join(f"{f'{a:.3f} {b:.3f}':16}" for a, b in vectors))
    print(f"  by hand, orange: (1, 0)/√(3·3) + (1, 1)/√(3·2) + (0, 2)/√(3·3) = {1 / 3 + 6**-0.5:.3f} {2 / 3 + 6**-0.5:.3f}")
    print("  by hand, sharp: (−2, 1)/√(2·2) + (0, 2)/√(2·3) = (−1.000, 1.316), of which ReLU leaves 0.000 1.316")
    codebooks = Codebook(nodes, (2, 2), transfer=transfer).eval()()
    assert torch.equal(torch.cat(codebooks), layers[-1])
    z = torch.tensor([[1.0, 1.5], [0.0, 2.0]])  # ẑ_a and ẑ_n of one position
    print("\nEq. 1 and 2 on one position, whose channels are split in two (step 3)")
    for name, part, codes, listed in zip(("ẑ_a", "ẑ_n"), z, codebooks, (words[:2], words[2:])):
        distance, index = (part - codes).square().sum(1), nearest_code(part[None], codes).item()
        loss = VectorQuantizer(beta=0.25)(part.view(1, 2, 1, 1), codes)[2].item()
        apart = ", ".join(f"{value:.3f} from {word}" for value, word in zip(distance, listed))
        print(f"  {name} = {part.tolist()} lies ‖ẑ − e‖² = {apart}: s = {index}, {listed[index]}")
        print(f"    codebook and commitment terms, means over 2 channels: (1 + β) {distance[index]:.3f} / 2 = {loss:.4f} with β = 0.25")


def main():
    """Print the networks of both presets, then the paper's equations on numbers."""
    for preset in NETWORKS:
        show_network(preset)
    show_equations()


if __name__ == "__main__":
    command(main)
