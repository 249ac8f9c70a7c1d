"""Measure how well runs reconstruct the evaluation split; draw the paper's figures.

    python evaluate.py runs/demo-vqct --figures
    python evaluate.py runs/cub-vqct runs/cub-vqgan --data CUB_200_2011 --figures
    python evaluate.py runs/cub-vqct --inception pt_inception-2015-12-05-6726825d.pth --save out

Each run gets evaluation.json and reconstructions.png, with --figures also Fig. 1, 3,
5, 6, 7 and curves.png. Results on another data set are in RUN/other/NAME, comparisons
of runs in comparison/ beside the first. Runs that differ only in their seeds share a
row: mean ± standard deviation, p of Welch's test against the first row, and p after
Holm's correction over the table.

ℓ1 and ℓ2 are of images in [-1, 1], not clamped. PSNR and LPIPS are of clamped images
and averaged over images. FID is of images rounded to 8 bits.
"""

import functools
import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont

from prior import (PARTS, Parser, PublishedFile, UserError, WordListSpeech, atomic_write, examples,
                   nearest_words, provide, read_tensors, save_png, user_error)
from train import (Run, draw_grid, first_process_first, identity, launch, load_lpips, lpips_files,
                   processes, psnr, rank, read_journal, spread_indices, to_bytes)
from vqct import (Codebook, CodebookTransfer, NormalizedAdjacency, VectorQuantizer, all_gather,
                  nearest_code, option)


# ======== Metrics

def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Fréchet distance of two Gaussians, a float (Heusel et al. 2017).

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

    With Rᵀ R = Σ_a, the symmetric R Σ_b Rᵀ has the eigenvalues of Σ_a Σ_b. The root
    is therefore real, and two symmetric eigenvalue problems replace a general
    matrix root.

    mean: (d,); covariance: (d, d) symmetric and positive semi-definite, of any
    rank.

    >>> frechet_distance(np.zeros(3), np.eye(3), np.ones(3), 4 * np.eye(3))
    6.0
    """
    values, vectors = scipy.linalg.eigh(covariance_a)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    values = scipy.linalg.eigvalsh(root @ covariance_b @ root.T)
    rounding = values.max() * len(values) * np.finfo(values.dtype).eps
    values[values < rounding] = 0  # the root would make rounding errors large
    traces = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(values).sum()
    return float(np.square(mean_a - mean_b).sum() + traces)


def fid(a, b):
    """Fréchet distance of two (N, d) float64 arrays of features, each taken as a Gaussian."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return frechet_distance(a.mean(axis=0), covariance_a, b.mean(axis=0), covariance_b)


class OtherPool(nn.Module):
    """A block of torchvision's Inception with another pooling in its pooling branch."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x):
        pooled = self.block.branch_pool(self.pool(x))  # always the last channels of a block
        return torch.cat([self.block(x)[:, : -pooled.shape[1]], pooled], dim=1)


class InceptionFeatures(nn.Module):
    """pool3 features of the Inception-v3 that FID was defined with (ported from TensorFlow).

    The network is torchvision's with two changes. The pooling branches of blocks A,
    C and the first E average without the padding. That of the last E takes the
    maximum.

    state: state dict of pt_inception-2015-12-05, 1,008 classes.
    """

    def __init__(self, state):
        super().__init__()
        options = dict(num_classes=1008, aux_logits=False, transform_input=False)
        self.network = torchvision.models.inception_v3(weights=None, init_weights=False, **options)
        self.network.load_state_dict(state)
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        pools = dict.fromkeys("5b 5c 5d 6b 6c 6d 6e 7b".split(), average)
        pools["7c"] = nn.MaxPool2d(3, stride=1, padding=1)
        for name, pool in pools.items():
            block = getattr(self.network, f"Mixed_{name}")
            setattr(self.network, f"Mixed_{name}", OtherPool(block, pool))
        self.network.fc = nn.Identity()
        self.requires_grad_(False).eval()

    def forward(self, x):
        """(B, 3, H, W) uint8 → (B, 2048), in the type of the weights."""
        x = x.to(self.network.Conv2d_1a_3x3.conv.weight.dtype) / 127.5 - 1
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return self.network(x)


def inception_file():
    """The PublishedFile of FID's weights."""
    name = "pt_inception-2015-12-05-6726825d.pth"
    url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}"
    return PublishedFile("FID's Inception", "91 MB", url, "--inception FILE", name, name[-12:-4])


def load_inception(path=""):
    """InceptionFeatures with FID's weights, from a local copy or the cache."""
    path = path or inception_file().get()
    with user_error(f"--inception {path} is not FID's weights: {{}}"):
        return InceptionFeatures(read_tensors(path))


def load_or_reason(load, *paths):
    """A network and "", or None and the reason why there is none.

    Raises UserError for a local copy that cannot be loaded.
    """
    try:
        return load(*paths), ""
    except UserError as error:
        if any(paths):
            raise
        return None, str(error)


def warn_of_fid(images, features=2048):
    """Print a warning if images are too few for the covariance of so many features."""
    if images <= features:
        print(f"FID over {images:,} images is biased upward: {features:,} features have no "
              "covariance of full rank. Compare it only over the same images.")


def code_statistics(counts, names, images):
    """Dict of usage, perplexity and bits of codebooks, from how often each code was chosen.

    bits are of an image by a fixed-length code, log2 K a token; bits_entropy by an
    ideal code for these frequencies.

    counts: list of (K,) arrays over the whole split; names: of the codebooks.
    """
    by_codebook = {name: {} for name in ("usage", "codes_used", "codes", "perplexity")}
    bits = bits_entropy = 0.0
    for name, count in zip(names, counts):
        share = count[count > 0] / count.sum()
        entropy = float(-(share * np.log2(share)).sum())
        by_codebook["codes_used"][name] = len(share)
        by_codebook["codes"][name] = len(count)
        by_codebook["usage"][name] = len(share) / len(count)
        by_codebook["perplexity"][name] = 2.0**entropy
        bits += float(count.sum() / images * math.log2(len(count)))
        bits_entropy += float(count.sum() / images * entropy)
    return {**by_codebook, "bits": bits, "bits_entropy": bits_entropy}


def caption_alignment(run, indices, dataset, permutations=999):
    """How often captions mention the words of an image's codes, relative to chance.

    Frequent codes meet frequent words by chance, so the count is divided by what
    both frequencies predict. For p, words are assigned to codes at random.

    indices: list of (N, n, h, w) arrays, one for each codebook.
    Returns dict part of speech → {"ratio": to chance, or None if no word of a code
    is mentioned, "p": share of assignments at least as good, with the true one,
    "images": with captions}; empty without words or captions.
    """
    captioned = [index for index in range(len(dataset)) if dataset.captions_of(index)]
    if run.prior is None or not captioned:
        return {}
    words = {part: run.prior[f"{part}_words"] for part in PARTS}
    pairs = [(part, word) for part, listed in words.items() for word in listed]
    number = {pair: i for i, pair in enumerate(pairs)}  # of a word's code, through all codebooks
    speech, mentioned = WordListSpeech(*words.values()), []
    for index in captioned:
        said = {(token.part, token.lemma) for caption in dataset.captions_of(index)
                for sentence in speech(caption) for token in sentence}
        mentioned.append([number[pair] for pair in number.keys() & said])
    starts = np.cumsum([0, *map(len, run.words)])
    codes = [chosen[captioned].reshape(len(captioned), -1) + start
             for chosen, start in zip(indices, starts)]
    counts = count_matrix(np.concatenate(codes, axis=1), len(pairs))
    spoken = count_matrix(mentioned, len(pairs))

    alignment, rng, start = {}, np.random.default_rng(0), 0
    for part, listed in words.items():
        columns = slice(start, start + len(listed))
        ratio, p = alignment_of(counts[:, columns], spoken[:, columns], rng, permutations)
        alignment[part] = {"ratio": ratio, "p": p, "images": len(captioned)}
        start += len(listed)
    return alignment


def alignment_of(counts, spoken, rng, permutations):
    """Mentions over chance (None if no word of a code is mentioned), and p.

    counts, spoken: sparse (images, K) whole numbers: of codes, of words in captions.
    """
    images, codes = counts.shape[0], np.arange(counts.shape[1])
    together = counts.T @ spoken  # sparse: of the K² pairs, only those that occur in an image
    of_codes, of_words = counts.sum(0).A1, spoken.sum(0).A1

    def excess(words):
        return images * together[codes, words].sum() - of_codes @ of_words[words]

    true = excess(codes)
    larger = sum(excess(rng.permutation(codes)) >= true for _ in range(permutations))
    chance = of_codes @ of_words / images
    ratio = float(together.trace() / chance) if chance else None
    return ratio, float((1 + larger) / (1 + permutations))


def count_matrix(rows, columns):
    """A sparse int64 matrix of how often each column number is in each row's list."""
    ends = np.cumsum([0, *map(len, rows)])
    numbers = np.concatenate(rows).astype(np.int64)
    shape = len(rows), columns
    return scipy.sparse.csr_matrix((np.ones_like(numbers), numbers, ends), shape)


# ======== One run

@dataclass
class EvaluationConfig:
    """How runs are measured."""

    data: str = option("", "where the data set is now, or another data set")
    labels: str = option("", "where the label maps are now, for runs with --dataset folder")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the first of cuda, mps, cpu")
    checkpoint: str = option("last", "the last step, as in the paper, or the best by validation",
                             choices=("last", "best"))
    download: bool = option(False, "download missing weights of FID and LPIPS (91 and 5 MB)")
    inception: str = option("", "local copy of FID's weights; without any, FID is –")
    perceptual_trunk: str = option(
        "squeeze", "LPIPS network: SqueezeNet 1.1, or VGG-16 as in papers",
        choices=("squeeze", "vgg"))
    trunk_weights: str = option("", "local copy of that network's torchvision weights")
    lpips_weights: str = option("", "local copy of LPIPS v0.1's heads for it")
    figures: bool = option(False, "draw Fig. 1, 3, 5, 6, 7 and curves; Fig. 4 of several runs")
    save: str = option("", "folder for all originals and reconstructions as PNG")


@torch.no_grad()
def mean_image(run, limit=10_000):
    """(3, R, R) mean of at most `limit` training images, the best constant prediction."""
    dataset = run.dataset("train")
    chosen = spread_indices(len(dataset), limit)
    total = sum(x.sum(dim=0) for x, _ in run.batches(dataset, chosen, "averaging"))
    return total / len(chosen)


@torch.no_grad()
def reconstruct(run, dataset, baseline, inception=None, lpips=None, save=None):
    """Scores, indices and features of every image of a dataset through a run's model.

    Each process of torchrun takes its share of the images.

    Returns scores: dict of (N,) arrays psnr, l1, l2, baseline_psnr, and lpips if
        there is a network for it;
    indices: (N, M, h, w) int32;
    features: of originals and reconstructions, (2, N, 2048), or [].
    """
    scores, indices, features = {}, [], []
    share = range(rank(), len(dataset), processes())
    share = share or range(1)  # with fewer images than processes, the first again
    for x, batch in run.batches(dataset, share, "reconstructing"):
        output = run.model(x)
        x_hat = output.x_hat.float()
        values = {
            "psnr": psnr(x_hat, x),
            "l1": (x_hat - x).abs().mean(dim=(1, 2, 3)),
            "l2": (x_hat - x).square().mean(dim=(1, 2, 3)),
            "baseline_psnr": psnr(baseline.expand_as(x), x),
        }
        if lpips is not None:
            values["lpips"] = lpips(x_hat.clamp(-1, 1), x)
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
        indices.append(output.indices.int())
        original = batch["image"].to(run.device, non_blocking=True)
        if inception is not None:
            pair = inception(original), inception(to_bytes(x_hat))
            features.append(torch.stack(pair, dim=1))  # (B, 2, 2048)
        if save and rank() < len(dataset):
            save_images(save / "originals", batch["index"], original)
            save_images(save / "reconstructions", batch["index"], to_bytes(x_hat))

    def gather(batches):
        return of_all_processes(torch.cat(batches), len(dataset)).cpu().numpy()

    scores = {name: gather(values).astype(np.float64) for name, values in scores.items()}
    indices = gather(indices)
    if features:
        features = gather(features).swapaxes(0, 1).astype(np.float64)
    return scores, indices, features


def save_images(folder, indices, images):
    """Write (B, 3, H, W) uint8 images as folder/INDEX.png."""
    for index, image in zip(indices.tolist(), images.cpu()):
        save_png(TF.to_pil_image(image), folder / f"{index:06d}.png")


def of_all_processes(rows, total):
    """(total, …) rows in order; each of n processes has every n-th of them."""
    share = math.ceil(total / processes())
    rows = torch.cat([rows, rows.new_zeros(share - len(rows), *rows.shape[1:])])
    return all_gather(rows).unflatten(0, (-1, share)).transpose(0, 1).flatten(0, 1)[:total]


class Evaluation(NamedTuple):
    """A run and its results."""

    run: Run
    result: dict  # as in evaluation.json
    indices: list  # (N, n, h, w) arrays, one for each codebook


def evaluate(path, choices=EvaluationConfig(), inception=None, lpips=None, save=None):
    """The Evaluation of one run, or None in all processes of torchrun except the first.

    It writes evaluation.json, reconstructions.png and figures into the folder of
    results.

    inception: InceptionFeatures or None; lpips: LPIPS or None; save: folder for
    images, or None.
    """
    run = Run(path, choices.device, choices.data, choices.labels, choices.checkpoint)
    dataset, baseline = run.dataset("val"), mean_image(run)
    networks = [network and network.to(run.device) for network in (inception, lpips)]
    scores, indices, features = reconstruct(run, dataset, baseline, *networks, save)
    if rank():
        return None
    indices = [codes.numpy() for codes in run.model.by_codebook(torch.from_numpy(indices))]
    counts = [np.bincount(codes.ravel(), minlength=len(words))
              for codes, words in zip(indices, run.words)]
    whole = dataset.records is run.dataset("train").records  # without a split, all images evaluate
    result = {
        "run": str(path), "split": "val", "checkpoint": choices.checkpoint, "step": run.step,
        "checkpoint_sha256": run.tokenizer,
        "images": len(dataset),
        "baseline": "these images themselves" if whole else "its train split",
        **{name: getattr(run.config, name) for name in ("method", "dataset", "seed", "resolution")},
        "lpips": None,
        **{name: float(values.mean()) for name, values in scores.items()},
        "fid": fid(*features) if len(features) and len(dataset) > 1 else None,
        "fid_note": "Inception-v3 pool3 of pt_inception-2015-12-05, images bilinearly to 299²",
        "lpips_note": f"LPIPS v0.1, {choices.perceptual_trunk}",
        **code_statistics(counts, run.names, len(dataset)),
        "alignment": caption_alignment(run, indices, dataset),
        "contents": contents_of(run, dataset),
        "config": asdict(run.config),
    }
    keep_earlier(result, run.results)
    with atomic_write(run.results / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1))
    draw_grid(reconstructed(run, dataset, 16), run.results / "reconstructions.png")
    evaluation = Evaluation(run, result, indices)
    if choices.figures:
        draw_figures(evaluation, dataset, run.results)
    print(f"{run.results}: evaluation.json, reconstructions.png" + ", figures" * choices.figures)
    return evaluation


def keep_earlier(result, folder):
    """Add to a result FID and LPIPS that an earlier evaluation of the same checkpoint has.

    Figures of another checkpoint are removed.
    """
    path = folder / "evaluation.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier.get("checkpoint_sha256") != result["checkpoint_sha256"]:
        for figure in (*folder.glob("fig[1-7]_*.png"), folder / "curves.png"):
            figure.unlink(missing_ok=True)
    elif earlier["contents"] == result["contents"]:
        for name in ("fid", "lpips"):
            if result[name] is None:
                result[name], result[f"{name}_note"] = earlier[name], earlier[f"{name}_note"]


def contents_of(run, dataset):
    """Checksums of a run's prior, of its images, and of the code that trained it.

    What `--shuffle` permutes is sorted first, as each seed permutes it differently.
    """
    prior = hashlib.sha256()
    for name, value in (run.prior or {}).items():
        value = np.asarray(value)
        if run.config.shuffle in name:
            value = np.sort(value, axis=0)
        prior.update(value.tobytes())
    images = identity(dataset, run.config.data)
    return {
        "prior": prior.hexdigest(), "data": run.data, "images": images,
        "code": run.code, "processes": run.processes,
    }


@torch.no_grad()
def reconstructed(run, dataset, count):
    """Two rows for `draw_grid`: some originals, and their reconstructions."""
    originals, reconstructions = [], []
    for x, _ in run.batches(dataset, spread_indices(len(dataset), count)):
        originals.append(x)
        reconstructions.append(run.model(x).x_hat)
    return [("original", torch.cat(originals)), ("reconstruction", torch.cat(reconstructions))]


# ======== Tables

MAY_DIFFER = """seed out data prior labels download device compile workers log_every eval_every
    trunk_weights lpips_weights""".split()  # in a row; of data and prior, the contents may not
COLUMNS = {  # in the paper's order, then ours
    "fid": ("FID ↓", "{:.2f}"),
    "psnr": ("PSNR ↑", "{:.2f}"),
    "l1": ("ℓ1 ↓", "{:.4f}"),
    "l2": ("ℓ2 ↓", "{:.4f}"),
    "lpips": ("LPIPS ↓", "{:.4f}"),
    "codes_used": ("codes used", "{:,.0f}"),
    "usage": ("usage", "{:.1%}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "bits": ("bits/image", "{:,.0f}"),
    "bits_entropy": ("entropy bits", "{:,.0f}"),
}


def rows_of(results):
    """A list of (name, results): those of a row differ only in their seeds."""
    rows = {}
    for result in results:
        config = {name: x for name, x in result["config"].items() if name not in MAY_DIFFER}
        known = map(result.get, ("step", "checkpoint", "codes", "contents", "images"))
        key = json.dumps([config, *known])
        if result["config"]["seed"] in [other["config"]["seed"] for other in rows.get(key, ())]:
            key += result["run"]  # a copy of a run has a row of its own
        rows.setdefault(key, []).append(result)
    return [(row[0]["run"] + f" ({len(row)} seeds)" * (len(row) > 1), row)
            for row in rows.values()]


def spread(values, form):
    """Text of a mean, ± the standard deviation of several values; "–" if one is None.

    For values that are a dict with one for each codebook, the texts are joined by +.
    """
    if isinstance(values[0], dict):
        codebooks = ([value[name] for value in values] for name in values[0])
        return " + ".join(spread(of_one, form) for of_one in codebooks)
    if None in values:
        return "–"
    mean = form.format(np.mean(values))
    return f"{mean} ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else mean


def welch(values, others):
    """The p value of Welch's test, or None if a row has one seed or lacks a value."""
    if min(len(values), len(others)) < 2 or None in (*values, *others):
        return None
    return float(scipy.stats.ttest_ind(values, others, equal_var=False).pvalue)


def holm(p_values):
    """The p values after Holm's correction for being several (1979), in the same order.

    The k-th smallest of n is multiplied by n − k + 1; the results are made to rise,
    to at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p_values = np.array(p_values, dtype=np.float64)
    order = p_values.argsort()
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.maximum.accumulate(p_values[order] * factors).clip(max=1)
    return corrected.tolist()


def markdown(results):
    """The table of some results, with p and Holm's p against the first row."""
    rows, tests = rows_of(results), {}
    for number, (_, group) in enumerate(rows[1:], 1):
        for column in ("psnr", "lpips"):
            values, others = ([result[column] for result in of] for of in (group, rows[0][1]))
            if (p := welch(values, others)) is not None:
                tests[number, column] = p
    corrected = dict(zip(tests, holm(list(tests.values()))))
    table = [["run", *(title for title, _ in COLUMNS.values())]]
    for number, (name, group) in enumerate(rows):
        table.append([name])
        for column, (_, form) in COLUMNS.items():
            cell = spread([result[column] for result in group], form)
            if p := tests.get((number, column)):
                cell += f" (p {p:.2g}, Holm {corrected[number, column]:.2g})"
            table[-1].append(cell)
    return as_markdown(table)


def alignment_table(results):
    """The table of `caption_alignment`; "" if no run has captions and words."""
    table = [["run", "codes", "captions mention their words, relative to chance", "p of each seed"]]
    for name, group in rows_of(results):
        for part in group[0]["alignment"]:
            seeds = [result["alignment"][part] for result in group]
            ratio = spread([seed["ratio"] for seed in seeds], "{:.2f}")
            table.append([name, part, ratio, ", ".join(f"{seed['p']:.3f}" for seed in seeds)])
    return as_markdown(table) if len(table) > 1 else ""


def as_markdown(table):
    """Markdown of a list of rows of cells, the first of which has the titles."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


# ======== Figures

def draw_figures(evaluation, dataset, folder):
    """Draw a run's curves and the paper's figures of it into a folder."""
    prior = evaluation.run.prior
    if prior is not None:
        draw_codebook_space(prior, folder / "fig1_space.png")
    if prior is not None and len(prior["edges"]):
        draw_toy(prior, folder / "fig3_toy.png")
    draw_usage([evaluation], folder / "fig5_usage.png")
    draw_similarity(evaluation, folder / "fig6_similarity.png")
    draw_regions(evaluation, dataset, folder / "fig7_regions.png")
    draw_curves([evaluation], folder / "curves.png")


def compare(evaluations, folder):
    """Draw Fig. 4, Fig. 5, curves and rates of several runs into a folder."""
    rows = []
    for run, result, _ in evaluations:
        originals, (_, images) = reconstructed(run, run.dataset("val"), 8)
        rows = rows or [originals]
        rows.append((f"{run.path.name}\n{result['psnr']:.2f} dB", images))
    draw_grid(rows, folder / "fig4_reconstructions.png")
    draw_usage(evaluations, folder / "fig5_usage.png")
    draw_curves(evaluations, folder / "curves.png")
    results = [evaluation.result for evaluation in evaluations]
    draw_rate_distortion(results, folder / "rate_distortion.png")
    print(f"{folder}: fig4_reconstructions.png, fig5_usage.png, curves.png, rate_distortion.png")


def draw_codebook_space(prior, path, neighbours=4):
    """Fig. 1: the paper's words, or others of the prior, and their nearest neighbours.

    Positions are the first two principal components of the words shown. Lines join
    each chosen word to its nearest neighbours in the full space, whose cosines are
    listed below.
    """
    panels = []
    for part in PARTS:
        words, vectors = prior[f"{part}_words"], prior[f"{part}_vectors"].numpy()
        nearest = {word: nearest_words(words, vectors, word, neighbours)
                   for word in examples(words, part)}
        shown = sorted({*nearest, *(word for pairs in nearest.values() for word, _ in pairs)})
        rows = [words.index(word) for word in shown]
        points = F.normalize(prior[f"{part}_vectors"][rows].double(), dim=1).numpy()
        points -= points.mean(axis=0)
        axes = np.linalg.svd(points, full_matrices=False)[2][:2]
        position = dict(zip(shown, points @ axes.T))
        lines, notes = [], ["Lines join chosen words to their nearest by cosine:"]
        for word, pairs in nearest.items():
            lines += [([position[word], position[other]], -1, "") for other, _ in pairs]
            cosines = ", ".join(f"{other} {cosine:.2f}" for other, cosine in pairs)
            notes.append(f"{word}: {cosines}")
        lines += [([position[word]], int(word in nearest), word) for word in shown]
        panels.append(dict(title=f"{part}s: {len(shown)} of {len(words):,} words", lines=lines,
                           x="principal component 1 of the words shown", y="principal component 2",
                           notes=notes, ticked=False))
    draw_plots(panels, path)


def draw_toy(prior, path, steps=80):
    """Fig. 3: codes in two dimensions pulled to one feature, by VQ-VAE and by VQCT.

    The toy is made of a run's prior, not of its weights: the most connected
    adjective, nouns that it modifies, and adjectives of those. Without the last
    ReLU, codes fill the plane.
    """
    edges = prior["edges"].numpy()
    hub = np.bincount(edges[:, 0]).argmax()
    nouns = edges[edges[:, 0] == hub, 1][:6].tolist()
    modifiers = np.unique(edges[np.isin(edges[:, 1], nouns), 0])[:5]
    adjectives = sorted({hub, *modifiers.tolist()})
    names = [prior["adjective_words"][i] for i in adjectives]
    names += [prior["noun_words"][i] for i in nouns]
    vectors = torch.cat([prior["adjective_vectors"][adjectives], prior["noun_vectors"][nouns]])
    vectors = (vectors - vectors.mean(0)) / vectors.std(0).clamp_min(1e-12)
    toy_edges = [(adjectives.index(a), len(adjectives) + nouns.index(n))
                 for a, n in edges.tolist() if a in adjectives and n in nouns]
    graph = NormalizedAdjacency(toy_edges, len(names))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transfer = CodebookTransfer((vectors.shape[1], 64, 64, 2), graph, last_relu=False)
    transferred = Codebook(vectors, (len(names),), transfer=transfer)
    start = transferred()[0].detach()
    learned = Codebook(start, (len(names),), trained=True)

    away = start - start.mean(0)
    order = away.norm(dim=1).argsort()  # the feature is beyond all codes, in the median direction
    direction = F.normalize(away[order[len(order) // 2]], dim=0)
    feature = start.mean(0) + 1.4 * away[order[-1]].norm() * direction
    nearest = nearest_code(feature[None], start).item()
    rate = 1.5 * (feature - start[nearest]).norm().item() / steps
    paths = {
        "VQ-VAE: each code is a parameter": pull(learned, feature, rate, steps),
        "VQCT: one network makes all codes": pull(transferred, feature, 5e-4, steps),
    }
    shown = np.concatenate([feature[None].numpy(), *(x.reshape(-1, 2) for x in paths.values())])
    panels = []
    for title, codes in paths.items():
        lines = [(codes[:, i], int(i == nearest), name) for i, name in enumerate(names)]
        lines.append(([feature.numpy()], 2, "feature"))
        moved = (codes[-1] != codes[0]).any(axis=1).sum()
        notes = [f"circles: start; dots: after {steps} steps; {moved} of {len(names)} codes moved",
                 "no ReLU after the last layer, unlike Eq. 3"]
        panels.append(dict(title=title, lines=lines, notes=notes, starts=True, shown=shown))
    draw_plots(panels, path)


def pull(codebook, feature, lr, steps):
    """(steps, N, D) codes while Adam minimizes Eq. 2's codebook term for the nearest one."""
    optimizer, path = torch.optim.Adam(codebook.parameters(), lr=lr), []
    for _ in range(steps):
        (codes,) = codebook()
        path.append(codes.detach().numpy().copy())
        loss = VectorQuantizer(beta=0.0)(feature.view(1, -1, 1, 1), codes)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.stack(path)


def draw_usage(evaluations, path):
    """Fig. 5: how often each code was chosen, and how many were used by positions seen."""
    panels = []
    for run, _, indices in evaluations:
        ranked, growth, total = [], [], 0
        for colour, (codes, words, name) in enumerate(zip(indices, run.words, run.names)):
            by_position = np.moveaxis(codes, 1, -1).ravel()
            _, first, counts = np.unique(by_position, return_index=True, return_counts=True)
            first = np.sort(first) // codes.shape[1]
            rank_of_code, used = 1 + np.arange(len(counts)), len(counts)
            label = f"{used:,} of {len(words):,} {name}s ({used / len(words):.1%})"
            ranked.append((np.stack([rank_of_code, np.sort(counts)[::-1]], axis=1), colour, label))
            growth.append((np.stack([1 + first, rank_of_code], axis=1), colour, f"{name}s"))
            total += used
        title = f"{run.path.name}: {total / sum(map(len, run.words)):.1%} of all codes used"
        panels.append(dict(title=title, lines=ranked, log="y",
                           x="codes, most used first", y="times chosen, log scale"))
        panels.append(dict(title=title, lines=growth, log="x",
                           x="positions seen, log scale", y="codes used so far"))
    draw_plots(panels, path)


def draw_curves(evaluations, path):
    """Held-out PSNR, losses and codes used against steps, from the runs' metrics.jsonl."""
    titles = {"validation_psnr": "PSNR of held-out images, dB", "loss": "loss",
              "quantizer": "quantizers' loss", "codes_used": "codes used, all codebooks"}
    panels = []
    for name, title in titles.items():
        lines = []
        for colour, (run, *_) in enumerate(evaluations):
            journal = read_journal(run.path / "metrics.jsonl")
            points = [(line["step"], np.sum(line[name])) for line in journal if name in line]
            if points:
                lines.append((points, colour, run.path.name))
        if lines:
            panels.append(dict(title=title, lines=lines, x="steps"))
    if panels:
        draw_plots(panels, path)


def draw_rate_distortion(results, path):
    """PSNR against bits of an ideal code: a dot for each row, ± the deviations of its seeds."""
    lines = []
    for colour, (_, group) in enumerate(rows_of(results)):
        seeds = np.array([(result["bits_entropy"], result["psnr"]) for result in group])
        mean = seeds.mean(axis=0)
        if len(seeds) > 1:
            for bar in seeds.std(axis=0, ddof=1) * np.eye(2):
                lines.append(([mean - bar, mean + bar], colour, ""))
        lines.append(([mean], colour, Path(group[0]["run"]).name))
    draw_plots([dict(title="rate and distortion", lines=lines, x="bits per image, ideal code",
                     y="PSNR, dB")], path, size=(900, 600))


def draw_similarity(evaluation, path, count=10, side=260):
    """Fig. 6: cosines between codes in use, at the start and at the end of training.

    The correlation is over all pairs of at most 1,000 codes in use.
    """
    run, cell = evaluation.run, side / count
    image = Image.new("RGB", (2 * side + 260, len(run.names) * (side + 150) + 50), "white")
    draw = ImageDraw.Draw(image)
    for row, (name, codes, words) in enumerate(zip(run.names, run.model.codebook(), run.words)):
        used = np.random.default_rng(0).permutation(np.unique(evaluation.indices[row]))[:1000]
        cosines = [F.normalize(x[used].float().cpu(), dim=1) for x in (run.start[row], codes)]
        cosines = [(x @ x.T).numpy() for x in cosines]
        pairs = np.triu_indices(len(used), 1)
        kept = scipy.stats.pearsonr(*(x[pairs] for x in cosines))[0] if len(used) > 2 else math.nan
        top, titles = row * (side + 150) + 120, Image.new("RGB", (90, side), "white")
        for i, code in enumerate(used[:count]):
            y = (i + 0.5) * cell
            draw.text((114, top + y), words[code], "black", SMALL, anchor="rm")
            ImageDraw.Draw(titles).text((2, y), words[code], "black", SMALL, anchor="lm")
        for x, left in zip(cosines, (120, side + 240)):
            image.paste(in_colour(x[:count, :count], (side, side)), (left, top))
            image.paste(titles.rotate(90, expand=True), (left, top - 92))
        title = f"{name}s at the start and at the end of training: correlation {kept:.2f}"
        draw.text((10, top - 114), title, "black", FONT)
    scale = in_colour(np.linspace(-1, 1, 21)[None], (side, 12))
    image.paste(scale, (120, image.height - 44))
    for place, cosine in ((0, "-1"), (0.5, "cosine 0"), (1, "1")):
        draw.text((120 + place * side, image.height - 22), cosine, "black", SMALL, anchor="mm")
    save_png(image, path)


def in_colour(cosines, size):
    """A picture of a matrix of cosines: blue for -1, white for 0, red for 1."""
    red, blue = 1 + cosines.clip(max=0), 1 - cosines.clip(min=0)
    colours = np.stack([red, 1 - abs(cosines), blue], axis=-1)
    colours = (255 * colours.clip(0, 1)).astype(np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def regions_of(evaluation, index):
    """Five regions of an image: a list of (box in pixels, the words of its codes)."""
    run, regions = evaluation.run, []
    (height, width), cell = run.model.grid, run.config.resolution // run.model.grid[0]
    for y, x in ((0.25, 0.25), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (0.75, 0.75)):
        row, column = int(y * height), int(x * width)
        box = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
        codes = [torch.from_numpy(part[index, :, row, column]) for part in evaluation.indices]
        regions.append((box, run.spell(torch.cat(codes)[:, None, None])))
    return regions


def draw_regions(evaluation, dataset, path, columns=4, side=256, margin=160):
    """Fig. 7: regions of eight images, and beside each image the words of their codes."""
    chosen = spread_indices(len(dataset), 8)
    rows = math.ceil(len(chosen) / columns)
    image = Image.new("RGB", (columns * (side + margin), rows * (side + 8) + 28), "white")
    draw = ImageDraw.Draw(image)
    for number, index in enumerate(chosen):
        left, top = number % columns * (side + margin), number // columns * (side + 8)
        picture = TF.to_pil_image(dataset[index]["image"])
        image.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        for i, (box, words) in enumerate(regions_of(evaluation, index), 1):
            x, y, right, bottom = np.multiply(box, side / picture.width) + (left, top, left, top)
            draw.rectangle((x - 3, y - 3, right + 2, bottom + 2), outline="black", width=3)
            draw.rectangle((x - 2, y - 2, right + 1, bottom + 1), outline="white")
            draw.text((x - 6, y), str(i), "white", FONT, "ra", stroke_width=2, stroke_fill="black")
            draw.text((left + side + 10, top + 24 * i), f"{i}  {words}", "black", SMALL)
    note = "Words are names of codes; they need not describe what is seen."
    draw.text((4, image.height - 22), note, "black", SMALL)
    save_png(image, path)


# ---- Drawing of plots

INK = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#475569",
       "#b8cbe6")  # the last one is number −1
SMALL, FONT = (ImageFont.load_default(size) for size in (13, 15))


def draw_plots(panels, path, columns=2, size=(520, 400)):
    """Draw plots in a grid → PNG; each panel is a dict of the arguments of `draw_panel`."""
    width, height = size
    height += 20 * max(len(panel.get("notes", ())) for panel in panels)
    rows = math.ceil(len(panels) / columns)
    image = Image.new("RGB", (width * min(columns, len(panels)), height * rows), "white")
    for number, panel in enumerate(panels):
        left, top = number % columns * width, number // columns * height
        box = (left + 70, top + 40, width - 110, size[1] - 100)
        draw_panel(ImageDraw.Draw(image), box, **panel)
    save_png(image, path)


def draw_panel(draw, box, title, lines, x="", y="", log="", notes=(), ticked=True, starts=False,
               shown=None):
    """Draw one plot in a box of (left, top, width, height) pixels.

    lines: list of (points, colour, label). A line with a label ends in a dot.
    x, y: titles of the axes; log: which of them are logarithmic, "x", "y" or "xy".
    notes: lines of text below; ticked: whether the axes have numbers.
    starts: whether circles mark the first points; shown: points to fit, by default
    those of lines.
    """
    left, top, width, height = box
    scaled = []
    for points, _, _ in lines:
        points = np.array(points, dtype=np.float64).reshape(-1, 2)
        for axis in (axis for axis, name in enumerate("xy") if name in log):
            points[:, axis] = np.log10(points[:, axis].clip(min=1e-12))
        scaled.append(points)
    fitted = np.concatenate(scaled) if shown is None else shown
    low, high = fitted.min(axis=0), fitted.max(axis=0)
    margin = np.maximum(0.04 * (high - low), 1e-9)
    low, high = low - margin, high + margin

    def pixel(point):
        across, up = (point - low) / (high - low)
        return left + across * width, top + (1 - up) * height

    draw.text((left, top - 36), title, "black", FONT)
    draw.text((left + width / 2, top + height + 32), x, "black", SMALL, anchor="mm")
    draw.text((left, top - 8), y, "black", SMALL, anchor="lm")
    for row, note in enumerate(notes):
        draw.text((left, top + height + 46 + 20 * row), note, "black", SMALL)
    for place, text in ticks(low[0], high[0], "x" in log) if ticked else ():
        across, _ = pixel(np.full(2, place))
        draw.line((across, top, across, top + height), "#eef2f7")
        draw.text((across, top + height + 12), text, "black", SMALL, anchor="mm")
    for place, text in ticks(low[1], high[1], "y" in log) if ticked else ():
        _, down = pixel(np.full(2, place))
        draw.line((left, down, left + width, down), "#eef2f7")
        draw.text((left - 6, down), text, "black", SMALL, anchor="rm")
    draw.rectangle((left, top, left + width, top + height), outline=INK[-1])
    draw_lines(draw, [list(map(pixel, points)) for points in scaled], lines, left + width, starts)


def draw_lines(draw, pixels, lines, right, starts):
    """Draw lines, their dots, and above all their labels where these fit."""
    inks = [INK[-1] if number < 0 else INK[number % (len(INK) - 1)] for _, number, _ in lines]
    labels = [label for _, _, label in lines]
    taken = [(x, y, x, y) for points in pixels for x, y in points]
    for points, ink in zip(pixels, inks):
        draw.line(points, ink, 2)
    for points, ink, label in zip(pixels, inks, labels):
        if label and starts and len(points) > 1:
            draw.circle(points[0], 5, outline=ink)
        if label:
            draw.circle(points[-1], 4, ink)
            x, y = points[-1]
            taken.append((x - 4, y - 4, x + 4, y + 4))
    for points, ink, label in zip(pixels, inks, labels):
        if label:
            length = draw.textlength(label, SMALL)
            taken.append(free_box(points[-1], length, np.array(taken), right + 36))
            draw.text(taken[-1][:2], label, ink, SMALL, stroke_width=2, stroke_fill="white")


def ticks(low, high, log):
    """Round numbers of an axis, a list of (position, text); a log axis has log10 positions."""
    if log:
        factors = (1, 2, 5) if high - low < 2 else (1,)
        powers = range(math.floor(low), math.ceil(high))
        numbers = [factor * 10.0**power for power in powers for factor in factors]
        positions = [math.log10(number) for number in numbers]
    else:
        least = (high - low) / 7
        power = 10.0 ** math.floor(math.log10(least))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
        numbers = positions = step * np.arange(math.ceil(low / step), high / step)
    return [(position, f"{number:,.6g}") for position, number in zip(positions, numbers)
            if low <= position <= high]


def free_box(point, length, taken, right):
    """The (left, top, right, bottom) of a text near a point, free of taken boxes.

    length: width of the text; taken: (n, 4) boxes; right: where the text has to end.
    """
    ways = [(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)]
    for reach, (across, down) in itertools.product(range(0, 306, 6), ways):
        x = point[0] + across * (7 + reach) + (across - 1) * length / 2
        y = point[1] - 8 + down * (13 + reach)
        beside = (x > taken[:, 2]) | (x + length < taken[:, 0])
        clear = (beside | (y > taken[:, 3]) | (y + 15 < taken[:, 1])).all()
        if clear and x + length <= right or reach == 300:
            return x, y, x + length, y + 15


# ======== Command line

def report(results, reasons):
    """Print tables of results, and how FID and LPIPS were measured or why not."""
    print(f"\n{markdown(results)}\n")
    baselines = ("{dataset}: {images:,} evaluation images; the mean image of {baseline} gives "
                 "{baseline_psnr:.2f} dB\n".format(**result) for result in results)
    print("\n".join(dict.fromkeys(baselines)))
    if table := alignment_table(results):
        print(f"{table}\n")
    for name, reason in zip(("fid", "lpips"), reasons):
        notes = [result[f"{name}_note"] for result in results if result[name] is not None]
        print(f"{name.upper()}: " + (notes[0] if notes else f"– ({reason})"))
        if notes and name == "fid":
            warn_of_fid(min(result["images"] for result in results))


def main(argv=None):
    """Evaluate each run, then print one table of all."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder of train.py")
    parser.add_fields(EvaluationConfig)
    given = vars(parser.parse_args(argv))
    paths, choices = list(dict.fromkeys(given.pop("runs"))), EvaluationConfig(**given)
    for path in paths:
        if not (path / f"{choices.checkpoint}.pt").is_file():
            missing = f"it has no {choices.checkpoint}.pt"
            raise UserError(f"'{path}' is not a run of train.py: {missing}")
    torch.backends.cudnn.allow_tf32 = False  # so that results are those of a CPU
    files = [inception_file(), *lpips_files(choices.perceptual_trunk)]
    local = choices.inception, choices.trunk_weights, choices.lpips_weights
    with first_process_first():
        if choices.download:
            provide([file for file, path in zip(files, local) if not path], True, "")
        inception, no_fid = load_or_reason(load_inception, choices.inception)
        load = functools.partial(load_lpips, choices.perceptual_trunk)
        lpips, no_lpips = load_or_reason(load, *local[1:])
    evaluations = []
    for path in paths:
        save = choices.save and Path(choices.save, path.resolve().name if len(paths) > 1 else "")
        evaluations.append(evaluate(path, choices, inception, lpips, save))
    if rank():
        return
    results = [evaluation.result for evaluation in evaluations]
    images = {(result["contents"]["images"], result["resolution"]) for result in results}
    if choices.figures and len(images) > 1:
        print("no comparison drawn: the runs were evaluated on different images")
    elif choices.figures and len(results) > 1:
        compare(evaluations, evaluations[0].run.results.parent / "comparison")
    report(results, (no_fid, no_lpips))


if __name__ == "__main__":
    launch(main)
