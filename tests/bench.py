"""Timings against plain forms and installed peers, which take turns on fresh tensors.

    python tests/bench.py                  every row except the last, on the CPU
    python tests/bench.py --device cuda
    python tests/bench.py --only count     FLOPs and memory of an f16 step, by count
    python tests/bench.py --only prior --corpus CORPUS

A ratio is the peer's time over ours, so more is better for us. Its median, least and
largest over the rounds are printed, and the ratio of the least times. CORPUS is what
prior.py reads; NLTK's data must be installed. The peers faiss-cpu, pytorch-fid and
vector-quantize-pytorch are measured if they are installed.
"""

import argparse
import functools
import importlib
import itertools
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import nltk
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
import vqct  # noqa: E402
from prior import CORES, WordNetSpeech, command, count_corpus, read_captions  # noqa: E402
from vqct import (
    CodebookTransfer,
    NormalizedAdjacency,
    VectorQuantizer,
    nearest_code,
)  # noqa: E402

DEVICE = torch.device("cpu")


def seconds(function, *arguments):
    wait = torch.accelerator.synchronize if DEVICE.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - start


def compare(what, ours, peers, make=tuple, rounds=7):
    """Print the times of `ours` and `peers` on arguments by `make`, and their ratios.

    peers: name → function, or the reason why there is none.
    """
    times, forms = {}, {
        "ours": ours,
        **{name: peer for name, peer in peers.items() if callable(peer)},
    }
    for form in forms.values():
        form(*make())  # warm
    for turn in range(rounds):
        for name in sorted(
            forms, key=lambda name: (list(forms).index(name) + turn) % len(forms)
        ):
            times.setdefault(name, []).append(seconds(forms[name], *make()))
    print(f"\n{what}: {show(times['ours'])}")
    for name, peer in peers.items():
        if callable(peer):
            ratios = [theirs / own for theirs, own in zip(times[name], times["ours"])]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
            least = min(times[name]) / min(times["ours"])
            peer = f"{show(times[name])}: {spread}, of least times {least:.2f}"
        print(f"  against {name}: {peer}")


def show(times):
    return f"{1000 * statistics.median(times):.3g} ms"


def growth(function, arguments):
    """Bytes by which this process, on Linux, grows at its peak in a call."""
    size = (
        lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
        * 1024
    )
    arguments = [x.clone() for x in arguments]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = size("VmRSS")
    function(*arguments)
    return size("VmHWM") - before


def extra_memory(function, *arguments):
    """Bytes that a call adds to its arguments at its peak; on a CPU, in a fresh process."""
    if DEVICE.type != "cuda":
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            return fresh.apply(growth, (function, arguments))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*arguments)
    return torch.cuda.max_memory_allocated() - before


def installed(name, make):
    """What `make` makes of a peer's module, or why not."""
    try:
        return make(importlib.import_module(name))
    except ImportError:
        return f"{name} is not installed"


# ======== Eq. 1


def full_distances(z, codebook):
    """Nearest codes by the whole distance matrix, as the field writes it."""
    return (
        z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    ).argmin(1)


def tiled_product(rows, codes, z, codebook):
    """The bare matrix product in tiles, which nothing is done with."""
    for part, tile in itertools.product(z.split(rows), codebook.split(codes)):
        part @ tile.T


def best_tiling(make):
    tilings = itertools.product((256, 512, 1024, 4096, 16384), (512, 2048, 4096, 16384))
    timed = {
        tiling: min(seconds(tiled_product, *tiling, *make()) for _ in range(3))
        for tiling in tilings
    }
    return min(timed, key=timed.get)


def faiss_index(faiss):
    faiss.omp_set_num_threads(torch.get_num_threads())

    def search(z, codebook):
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        return index.search(z.numpy(), 1)[1]

    return search if DEVICE.type == "cpu" else "faiss-cpu is for the CPU"


def whole_layer(codes, dim, module):
    """vector-quantize-pytorch's layer in evaluation mode."""
    layer = module.VectorQuantize(dim=dim, codebook_size=codes).eval().to(DEVICE)

    @torch.no_grad()
    def quantize(z, codebook):
        layer._codebook.embed.copy_(codebook[None])
        return layer(z[None])

    return quantize


def bench_nearest(dim=256):
    """The search among many codes."""
    rows, codes = (65_536, 8_192) if DEVICE.type == "cuda" else (16_384, 16_384)
    make = lambda: (
        torch.randn(rows, dim, device=DEVICE),
        torch.randn(codes, dim, device=DEVICE),
    )
    tiling = best_tiling(make)
    peers = {
        f"the bare product in tiles of {tiling[0]} × {tiling[1]}": functools.partial(
            tiled_product, *tiling
        ),
        "the full distance matrix": full_distances,
        "torch.cdist and argmin": lambda z, codebook: torch.cdist(z, codebook).argmin(1),
        "faiss IndexFlatL2": installed("faiss", faiss_index),
    }
    compare(
        f"nearest code, {rows:,} features of {dim} channels, {codes:,} codes",
        nearest_code,
        peers,
        make,
    )
    data = make()
    for form in (nearest_code, full_distances):
        print(
            f"  extra memory of {form.__name__}: {extra_memory(form, *data) / 2**20:,.1f} MiB"
        )
    agree = (nearest_code(*data) == full_distances(*data)).double().mean().item()
    print(f"  {agree:.4%} have the full matrix's code; the others are ties to its rounding")
    layer = VectorQuantizer().eval()
    peer = installed("vector_quantize_pytorch", functools.partial(whole_layer, codes, dim))
    ours = torch.no_grad()(lambda z, codebook: layer(z.T[None, :, :, None], codebook))
    title = "the whole quantizer in evaluation mode, the same sizes"
    compare(title, ours, {"vector-quantize-pytorch's": peer}, make, rounds=3)


# ======== A training step


def explicit_attention(self, x):
    """AttentionBlock by two matrix products and a softmax between them."""
    query, key, value = (
        self.query_key_value(self.norm(x)).flatten(2).chunk(3, dim=1)
    )  # (B, C, HW)
    weights = (query.mT @ key * query.shape[1] ** -0.5).softmax(-1)  # (B, HW, HW)
    return x + self.project((value @ weights.mT).reshape(x.shape))


@mock.patch.object(vqct, "nearest_code", full_distances)
@mock.patch.object(vqct.AttentionBlock, "forward", explicit_attention)
def taming_step(trainer, x):
    """A step as in taming-transformers.

    It has a forward pass for each optimizer, and both terms of λ start from the loss.
    """
    model, discriminator, last = (
        trainer.model,
        trainer.discriminator,
        trainer.model.decoder.to_image.weight,
    )
    model.train()
    discriminator.requires_grad_(False)
    output = model(x)
    (loss, _), generator_loss = (
        trainer.reconstruction_loss(output.x_hat, x),
        -discriminator(output.x_hat).mean(),
    )
    norms = [
        torch.autograd.grad(part, last, retain_graph=True)[0].norm()
        for part in (loss, generator_loss)
    ]
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach() * trainer.config.gan_weight
    trainer.generator_optimizer.zero_grad()
    (loss + weight * generator_loss + output.quantizer_loss).backward()
    trainer.generator_optimizer.step()
    discriminator.requires_grad_(True)
    with torch.no_grad():  # the generator is frozen for the other optimizer
        x_hat = model(x).x_hat
        trainer.reconstruction_loss(x_hat, x)  # its loss module takes it in both turns
    trainer.discriminator_optimizer.zero_grad()
    vqct.hinge_loss(discriminator(x.detach()), discriminator(x_hat)).backward()
    trainer.discriminator_optimizer.step()


@mock.patch.object(train, "load_lpips", lambda *files: vqct.LPIPS())
def make_trainer(resolution, **more):
    """VQ-GAN with its adversary from the start. Random LPIPS weights take the same time."""
    sizes = dict(
        codes="uniform", codebooks=1, codebook_size=16384, trained=True, transfer="none"
    )
    config = train.Config(
        resolution=resolution, gan_start=0, lr=1e-5, preset="f16", **sizes, **more
    )
    return train.Trainer(config, None, DEVICE)


def bench_step():
    """A step of the f16 network with its adversary against taming-transformers' way."""
    cuda = DEVICE.type == "cuda"
    resolution, batch = (256, 8) if cuda else (128, 2)
    trainers = {"eager, float32": make_trainer(resolution, amp=False, compile=False)}
    if cuda:
        trainers["compiled, bfloat16"] = make_trainer(resolution)
    theirs = make_trainer(resolution, amp=False, compile=False)
    for network in (theirs.model, theirs.discriminator, theirs.perceptual):
        network.to(memory_format=torch.contiguous_format)
    make = lambda: (torch.rand(batch, 3, resolution, resolution, device=DEVICE) * 2 - 1,)
    step = lambda trainer: lambda x: trainer.train_step(
        x.contiguous(memory_format=torch.channels_last)
    )
    taming = functools.partial(taming_step, theirs)
    title = f"training step, f16 network with adversary, {batch} images of {resolution}²"
    for name, trainer in trainers.items():
        compare(
            f"{title}, {name}",
            step(trainer),
            {"as taming-transformers steps, float32": taming},
            make,
            rounds=9,
        )
        if cuda:
            held = [extra_memory(form, *make()) / 2**30 for form in (step(trainer), taming)]
            print(f"  extra memory: {held[0]:.2f} GiB against {held[1]:.2f} GiB")


def kept_bytes(function, *arguments):
    """Bytes of the tensors that autograd keeps for the backward pass of a call."""
    storages = {}

    def note(x):
        storage = x.untyped_storage()
        storages[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = function(*arguments)
    del result
    return sum(storage.nbytes() for storage in storages.values())


@mock.patch(f"{__name__}.DEVICE", DEVICE)  # the CPU, whatever --device says
@mock.patch("weakref.getweakrefs", lambda x: [])  # so that Module.to can swap fake tensors
@mock.patch.object(train, "precision", lambda trainer: "bfloat16")
def bench_count(batch=8):
    """FLOPs and memory of an f16 step at 256², counted on tensors without data."""
    with FakeTensorMode():
        trainer = make_trainer(256, amp=False, compile=False)
        x = torch.empty(batch, 3, 256, 256)
        counter = FlopCounterMode(display=False)
        # Its hooks on modules, for counts by module, do not allow torch.autograd.grad.
        counter.mod_tracker = mock.MagicMock(parents={"Global"})
        with counter:
            trainer.train_step(x)
        networks = trainer.model, trainer.discriminator
        weights = [p for network in networks for p in network.parameters()]

        def forward():
            with train.autocast(trainer):
                x_hat = trainer.model(x).x_hat
                return trainer.reconstruction_loss(x_hat, x)

        kept = kept_bytes(forward)
        state = 4 * 4 * sum(p.numel() for p in weights)  # weight, gradient, Adam's moments
        state += 4 * sum(p.numel() for p in trainer.perceptual.parameters())
    print(f"\na step of the f16 network at 256² with LPIPS and adversary, {batch} images:")
    print(f"  {counter.get_total_flops() / batch / 1e12:.2f} TFLOP an image")
    print(f"  {state / 2**30:.1f} GiB of weights, gradients and Adam's moments in float32")
    print(f"  {kept / 2**30:.1f} GiB kept by autograd in bfloat16, without temporaries")


# ======== The other rows


def bench_transfer(adjectives=1949, nouns=4258, edges=100_000):
    """The transfer network on a graph of the paper's size, forward and backward."""
    nodes, rng = adjectives + nouns, np.random.default_rng(0)
    pairs = rng.choice(adjectives * nouns, edges, replace=False)
    ours = NormalizedAdjacency(
        np.stack([pairs // nouns, adjectives + pairs % nouns], 1), nodes
    ).to(DEVICE)
    network = CodebookTransfer((512, 512, 512, 256), torch.nn.Identity()).to(DEVICE)
    column, row = ours.column, torch.arange(nodes, device=DEVICE).repeat_interleave(
        ours.row_start.diff()
    )

    def products(value):
        """Name → what multiplies by Â, of entries in value's type."""
        matrix = torch.sparse_coo_tensor(
            torch.stack([row, column]), value, (nodes, nodes), check_invariants=True
        )
        matrix, dense = matrix.coalesce(), matrix.to_dense()
        return {
            "ours": ours,
            "the dense formula": lambda x: dense @ x,
            "a scatter of every edge": lambda x: torch.zeros_like(x).index_add(
                0, row, value[:, None] * x[column]
            ),
            "torch.sparse.mm with its own backward": lambda x: torch.sparse.mm(matrix, x),
        }

    def gradients(product, x):
        for layer in network.layers:
            x = torch.relu(layer(x, product) if product is ours else product(x @ layer.weight))
        network.zero_grad()
        x.square().sum().backward()
        return torch.cat([layer.weight.grad.flatten() for layer in network.layers])

    vectors = torch.randn(nodes, 512, device=DEVICE)
    forms = {
        name: functools.partial(gradients, product, vectors)
        for name, product in products(ours.value).items()
    }
    title = f"transfer network, {adjectives:,} + {nouns:,} nodes, {edges:,} edges, both ways"
    compare(title, forms.pop("ours"), forms)
    network.double(), ours.double()
    first, *others = (
        gradients(product, vectors.double()) for product in products(ours.value).values()
    )
    worst = max(((other - first).norm() / first.norm()).item() for other in others)
    print(f"  gradients differ by at most {worst:.1e} in float64, relative")


def straightforward_prior(captions):
    """The builder as one writes it first, which looks words up in lists."""
    adjectives, nouns, edges, lemmatize = [], [], [], nltk.WordNetLemmatizer().lemmatize
    for caption in captions:
        tagged = nltk.pos_tag(nltk.word_tokenize(caption.lower()))
        for (word, tag), (after, after_tag) in zip(tagged, [*tagged[1:], ("", "")]):
            if tag == "JJ" and word not in adjectives:
                adjectives.append(word)
            if tag.startswith("NN") and lemmatize(word, "n") not in nouns:
                nouns.append(lemmatize(word, "n"))
            if tag == "JJ" and after_tag.startswith("NN"):
                pair = word, lemmatize(after, "n")
                if pair not in edges:
                    edges.append(pair)
    return adjectives, nouns, edges


def bench_prior(corpus, size=20_000):
    """Counting captions against the straightforward algorithm."""
    if not corpus:
        return print("\nprior: give a --corpus")
    speech, captions = WordNetSpeech(), list(itertools.islice(read_captions(corpus), size))
    ours = lambda: count_corpus(captions, speech)
    theirs = lambda: straightforward_prior(captions)
    title = f"prior of {len(captions):,} captions on {CORES} cores"
    compare(title, ours, {"the straightforward algorithm": theirs}, rounds=3)


ROWS = {
    name.removeprefix("bench_"): row
    for name, row in [*globals().items()]
    if name.startswith("bench_")
}


def main():
    global DEVICE
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, help="rows to measure (default: all)"
    )
    parser.add_argument("--corpus", default="", help="captions, for the prior's builder")
    args = parser.parse_args()
    DEVICE = train.pick_device(args.device)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, row in ROWS.items():
        if not args.only or name in args.only:
            row(args.corpus) if name == "prior" else row()


if __name__ == "__main__":
    command(main)
