"""Measure how runs reconstruct the evaluation split, and draw what they learned (paper Tables 1 to 5, Fig. 3 to 7).

    python evaluate.py runs/demo-vqct --figures
    python evaluate.py runs/cub-vqct runs/cub-vqgan --data CUB_200_2011 --figures
    python evaluate.py runs/cub-vqct --inception pt_inception-2015-12-05-6726825d.pth --save out

Prints Markdown tables; writes evaluation.json and reconstructions.png into each run (of another data set, into
RUN/other/NAME) and, with --figures, curves.png, Fig. 1, 3 and 5 to 7, and what compares several runs into comparison/
beside the first. Runs that differ only by their seed share a row, mean ± standard deviation, with Welch's p against the
first. ℓ1 and ℓ2 are on [-1, 1] images as the decoder leaves them; PSNR, SSIM and LPIPS on images clamped to that range,
each averaged over images; FID on images rounded to 8 bits, against the same split.
"""

import functools
import itertools
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Metal lacks runs on the CPU; read as torch is imported

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
                   nearest_words, provide, read_tensors,
                   save_png, user_error)
from train import (Run, draw_grid, first_process_first, identity, launch, load_lpips, lpips_files, processes, psnr, rank,
                   read_journal, spread_indices, to_bytes)
from vqct import (Codebook, CodebookTransfer, NormalizedAdjacency, VectorQuantizer, all_gather, nearest_code, option)

FID_FEATURES = 2048  # of so many images or fewer, the covariance of Inception's features has no full rank


@dataclass
class EvaluationConfig:
    """How runs are measured. Weights without a local copy are looked for in torch hub's cache."""

    data: str = option("", "where the data set lies now, under its folder's name, or another one (to RUN/other/NAME)")
    labels: str = option("", "where its label maps lie now, of runs with --dataset folder")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the first of cuda, mps, cpu that is there")
    checkpoint: str = option("last", "the last step, as in the paper, or the best by validation",
                            choices=("last", "best"))
    download: bool = option(False, "download the weights of FID and LPIPS if they are missing (91 and 5 MB)")
    inception: str = option("", "local copy of FID's weights; without them, FID is a dash")
    perceptual_trunk: str = option("squeeze", "LPIPS network: SqueezeNet 1.1, light, or VGG-16, as papers report",
                                   choices=("squeeze", "vgg"))
    trunk_weights: str = option("", "local copy of its torchvision ImageNet weights")
    lpips_weights: str = option("", "local copy of LPIPS v0.1's heads for it")
    figures: bool = option(False, "draw curves, Fig. 1, 3 and 5 to 7 into each run, Fig. 4 of several into comparison/")
    save: str = option("", "folder for originals/*.png and reconstructions/*.png (for several runs, a sub-folder each)")


# ======== Metrics

def ssim(x, y):
    """Structural similarity of each image (Wang et al. 2004): 11×11 Gaussian window of σ 1.5, data range 2.

    x, y: (B, 3, H, W) in [-1, 1], at least 11 pixels per side; clamped to that range.
    Returns (B,), at most 1: mean over colours and the positions where the window fits.

    >>> ssim(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    tensor([1., 1.])
    """
    x, y = x.clamp(-1, 1), y.clamp(-1, 1)
    window = lambda image: TF.gaussian_blur(image, [11, 11], [1.5, 1.5])[..., 5:-5, 5:-5]
    mean_x, mean_y = window(x), window(y)
    variance_x, variance_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    covariance = window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean(dim=(1, 2, 3))


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Fréchet distance of two Gaussians: ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017).

    Σ_a Σ_b has the eigenvalues of the symmetric R Σ_b Rᵀ with Rᵀ R = Σ_a, so the root is real, and two symmetric
    eigenvalue problems replace a general matrix root.

    mean: (d,); covariance: (d, d) symmetric and positive semi-definite, of any rank.
    Returns float.

    >>> frechet_distance(np.zeros(3), np.eye(3), np.ones(3), 4 * np.eye(3))
    6.0
    """
    values, vectors = scipy.linalg.eigh(covariance_a)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    values = scipy.linalg.eigvalsh(root @ covariance_b @ root.T)
    values[values < values.max() * len(values) * np.finfo(values.dtype).eps] = 0  # a root makes rounding errors large
    traces = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(values).sum()
    return float(np.square(mean_a - mean_b).sum() + traces)


def fid(a, b):
    """Fréchet distance of two (N, d) float64 arrays of features, each as a Gaussian; FID when they are Inception's."""
    return frechet_distance(a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False))


class OtherPool(nn.Module):
    """A block of torchvision's Inception whose pooling branch pools otherwise."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x):
        pooled = self.block.branch_pool(self.pool(x))  # always the last channels of a block
        return torch.cat([self.block(x)[:, : -pooled.shape[1]], pooled], dim=1)


class InceptionFeatures(nn.Module):
    """pool3 of the Inception-v3 whose weights FID was defined with (ported from TensorFlow).

    torchvision's network, but the pooling branches of blocks A, C and the first E average without the padding, and
    that of the last E takes the maximum.

    state: state dict of pt_inception-2015-12-05, 1,008 classes.
    """

    def __init__(self, state):
        super().__init__()
        shape = dict(num_classes=1008, aux_logits=False, transform_input=False)
        self.network = torchvision.models.inception_v3(weights=None, init_weights=False, **shape)
        self.network.load_state_dict(state)
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        pools = dict.fromkeys(("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"), average)
        for name, pool in {**pools, "7c": nn.MaxPool2d(3, stride=1, padding=1)}.items():
            block = getattr(self.network, f"Mixed_{name}")
            setattr(self.network, f"Mixed_{name}", OtherPool(block, pool))
        self.network.fc = nn.Identity()
        self.requires_grad_(False).eval()

    def forward(self, x):
        """(B, 3, H, W) uint8 → (B, 2048), in the type of the weights."""
        x = x.to(self.network.Conv2d_1a_3x3.conv.weight.dtype) / 127.5 - 1
        return self.network(F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False))


def inception_file():
    """The Need of FID's weights → PublishedFile."""
    name = "pt_inception-2015-12-05-6726825d.pth"
    url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}"
    return PublishedFile("FID's Inception", "91 MB", url, "--inception FILE", name, name[-12:-4])


def load_inception(path=""):
    """InceptionFeatures with FID's weights, local or in the cache. Raises UserError naming file and flag."""
    path = path or inception_file().get()
    with user_error(f"--inception {path} is not FID's weights: {{}}"):
        return InceptionFeatures(read_tensors(path))


def load_or_reason(load, *paths):
    """A network for a metric, or None and the reason; where a path was given, its failure is an error."""
    try:
        return load(*paths), ""
    except UserError as error:
        if any(paths):
            raise
        return None, str(error)


def code_statistics(counts, names, images):
    """Statistics of codebooks from how often each code was chosen.

    counts: list of (K,) arrays over the whole split; names: of the codebooks; images: of that split.
    Returns dict: usage, codes_used, codes and perplexity by codebook; bits and bits_entropy an image, with a fixed-
    length code (log2 K a token; averaged neighbours are a token each) and with an ideal one for the empirical
    frequencies.
    """
    statistics = {name: {} for name in ("usage", "codes_used", "codes", "perplexity")}
    statistics.update(bits=0.0, bits_entropy=0.0)
    for name, count in zip(names, counts):
        share, tokens = count[count > 0] / count.sum(), count.sum() / images
        entropy = float(-(share * np.log2(share)).sum())
        statistics["codes_used"][name], statistics["codes"][name] = int((count > 0).sum()), len(count)
        statistics["usage"][name], statistics["perplexity"][name] = float((count > 0).mean()), 2.0**entropy
        statistics["bits"] += float(tokens * math.log2(len(count)))
        statistics["bits_entropy"] += float(tokens * entropy)
    return statistics


def words_said(dataset, index, speech):
    """The (part of speech, word) pairs of an image's captions; regular plurals as their noun."""
    sentences = (sentence for caption in dataset.captions_of(index) for sentence in speech(caption))
    return {(token.part, token.lemma) for sentence in sentences for token in sentence}


def caption_alignment(run, indices, dataset, permutations=999):
    """Do codes mean their words? How often an image's captions say the words of its tokens, against chance.

    Frequent codes meet frequent words by chance, so the count is divided by what both frequencies give. For p, words
    are dealt at random to codes, and the counts centred.

    indices: list of (N, n, h, w) arrays, one for each codebook.
    Returns dict part of speech → {"ratio": to chance, "p": share of permutations at least as large, the true one
    included, "images": with captions}; empty without words or captions.
    """
    chosen = [index for index in range(len(dataset)) if dataset.captions_of(index)]
    if run.prior is None or not chosen:
        return {}
    words = {part: run.prior[f"{part}_words"] for part in ("adjective", "noun")}
    speech, starts = WordListSpeech(*words.values()), np.cumsum([0, *map(len, run.words)])
    codes = [start + part[chosen].reshape(len(chosen), -1) for start, part in zip(starts, indices)]
    tokens = count_matrix(np.concatenate(codes, axis=1), starts[-1])  # adjectives come before nouns
    said = [words_said(dataset, index, speech) for index in chosen]
    found, rng, start = {}, np.random.default_rng(0), 0
    for part, listed in words.items():
        column = {word: i for i, word in enumerate(listed)}
        rows = [[column[word] for kind, word in pairs if kind == part and word in column] for pairs in said]
        counts, spoken = tokens[:, start : start + len(listed)], count_matrix(rows, len(listed))
        ratio, p = alignment_of(counts, spoken, rng, permutations)
        found[part], start = {"ratio": ratio, "p": p, "images": len(chosen)}, start + len(listed)
    return found


def alignment_of(counts, spoken, rng, permutations):
    """How often words are said with their codes, over chance (None if no code's word is said), and p.

    counts, spoken: sparse (images, K) whole numbers. Of the K² pairs of code and word, only those that
    occur in an image are kept.
    """
    together, codes = (counts.T @ spoken).tocsr(), np.arange(counts.shape[1])
    of_codes, of_words = counts.sum(0).A1, spoken.sum(0).A1
    excess = lambda dealt: counts.shape[0] * together[codes, dealt].sum() - of_codes @ of_words[dealt]
    least = excess(codes)
    larger = sum(excess(rng.permutation(codes)) >= least for _ in range(permutations))
    chance = of_codes @ of_words / counts.shape[0]
    return float(together.trace() / chance) if chance else None, float((1 + larger) / (1 + permutations))


def count_matrix(rows, columns):
    """Lists of column numbers → a sparse matrix of how often each is in each row, int64."""
    row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    column = np.concatenate([*map(np.asarray, rows), []]).astype(np.int64)
    return scipy.sparse.coo_matrix((np.ones(len(row), np.int64), (row, column)), (len(rows), columns)).tocsr()


# ======== A run

@torch.no_grad()
def mean_image(run, limit=10_000):
    """(3, R, R) mean of at most `limit` training images, evenly spaced: the best constant prediction."""
    dataset = run.dataset("train")
    chosen = spread_indices(len(dataset), limit)
    return sum(x.sum(dim=0) for x, _ in run.batches(dataset, chosen, "averaging")).div(len(chosen))


@torch.no_grad()
def reconstruct(run, dataset, baseline, inception=None, lpips=None, save=None):
    """Every image of a dataset through a run's model, each process of torchrun its share.

    Returns scores: dict of (N,) arrays psnr, l1, l2, ssim, baseline_psnr, and lpips where there is one; indices: (N,
    M, h, w) int32; features: originals' and reconstructions', (2, N, 2048), or an empty list.
    """
    scores, indices, features = {}, [], []
    share = range(rank(), len(dataset), processes()) or range(1)  # with few images, the first again
    for x, batch in run.batches(dataset, share, "reconstructing"):
        output = run.model(x)
        x_hat = output.x_hat.float()
        values = {
            "psnr": psnr(x_hat, x),
            "l1": (x_hat - x).abs().mean(dim=(1, 2, 3)),
            "l2": (x_hat - x).square().mean(dim=(1, 2, 3)),
            "ssim": ssim(x_hat, x),
            "baseline_psnr": psnr(baseline.expand_as(x), x),
        }
        if lpips is not None:
            values["lpips"] = lpips(x_hat.clamp(-1, 1), x)
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
        indices.append(output.indices.int())
        eight_bits = {"originals": batch["image"].to(run.device, non_blocking=True), "reconstructions": to_bytes(x_hat)}
        if inception is not None:
            features.append(torch.stack([inception(images) for images in eight_bits.values()], dim=1))  # (B, 2, 2048)
        for kind, images in eight_bits.items() if save and rank() < len(dataset) else ():
            for index, image in zip(batch["index"].tolist(), images.cpu()):
                save_png(TF.to_pil_image(image), save / kind / f"{index:06d}.png")
    gather = lambda parts: of_all_processes(torch.cat(parts), len(dataset)).cpu().numpy()
    scores = {name: gather(values).astype(np.float64) for name, values in scores.items()}
    return scores, gather(indices), gather(features).swapaxes(0, 1).astype(np.float64) if features else []


def of_all_processes(rows, total):
    """Undo the split of `total` rows among processes, each of which has every n-th: (share, …) → (total, …)."""
    share = math.ceil(total / processes())
    rows = torch.cat([rows, rows.new_zeros(share - len(rows), *rows.shape[1:])])
    return all_gather(rows).unflatten(0, (-1, share)).transpose(0, 1).flatten(0, 1)[:total]


class Evaluation(NamedTuple):
    """What `evaluate` finds out about a run."""

    run: Run
    result: dict  # as in evaluation.json
    indices: list  # (N, n, h, w) arrays, one for each codebook


def evaluate(path, choices=EvaluationConfig(), inception=(None, ""), lpips=(None, ""), save=None):
    """Measure one run over its whole evaluation split; write evaluation.json and reconstructions.png.

    choices: EvaluationConfig.
    inception: InceptionFeatures or None, and the reason for None; lpips: LPIPS likewise.
    save: folder for the images, or None.
    Returns Evaluation; None in all processes of torchrun but the first.
    """
    run = Run(path, choices.device, choices.data, choices.labels, choices.checkpoint)
    dataset, baseline = run.dataset("val"), mean_image(run)
    itself = dataset.records is run.dataset("train").records  # no split: all images of other data evaluate
    networks = [network and network.to(run.device) for network, _ in (inception, lpips)]
    scores, indices, features = reconstruct(run, dataset, baseline, *networks, save)
    if rank():
        return None
    indices = [part.numpy() for part in run.model.by_codebook(torch.from_numpy(indices))]
    counts = [np.bincount(part.ravel(), minlength=len(words)) for part, words in zip(indices, run.words)]
    names = ("method", "dataset", "seed", "resolution")
    result = {
        **{"run": str(path), "split": "val", "checkpoint": choices.checkpoint, "step": run.step},
        "images": len(dataset),
        "baseline": "these images themselves" if itself else "its train split",
        **{name: getattr(run.config, name) for name in names},
        "lpips": None,
        **{name: float(values.mean()) for name, values in scores.items()},
        "fid": fid(*features) if len(features) and len(dataset) > 1 else None,
        "fid_note": inception[1] or f"Inception-v3 pool3, pt_inception-2015-12-05, val split, {len(dataset):,} images, "
        f"centre crops of {run.config.resolution}², bilinearly to 299²",
        "lpips_note": lpips[1] or f"LPIPS v0.1, {choices.perceptual_trunk}",
        **code_statistics(counts, run.names, len(dataset)),
        "alignment": caption_alignment(run, indices, dataset),
        "contents": contents_of(run, dataset),
        "config": asdict(run.config),
    }
    with atomic_write(run.results / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1))
    draw_grid(reconstructed(run, dataset, 16), run.results / "reconstructions.png")
    evaluation = Evaluation(run, result, indices)
    if choices.figures:
        draw_usage([evaluation], run.results / "fig5_usage.png")
        draw_similarity(evaluation, run.results / "fig6_similarity.png")
        draw_regions(evaluation, dataset, run.results / "fig7_regions.png")
        draw_curves([evaluation], run.results / "curves.png")
        if run.prior is not None:
            draw_codebook_space(run.prior, run.results / "fig1_space.png")
        if run.prior is not None and len(run.prior["edges"]):
            draw_toy(run.prior, run.results / "fig3_toy.png")
    print(f"{run.results}: evaluation.json, reconstructions.png{', figures' if choices.figures else ''}")
    return evaluation


def contents_of(run, dataset):
    """Checksums of a run's prior, of its images to train and to evaluate, and of the code that trained it.

    What `--shuffle` permutes is sorted, as each seed permutes it differently.
    """
    prior = hashlib.sha256()
    for name, value in (run.prior or {}).items():
        value = np.asarray(value)
        prior.update((np.sort(value, axis=0) if run.config.shuffle in name else value).tobytes())
    images = identity(dataset, run.config.data)
    return {"prior": prior.hexdigest(), "data": run.data, "images": images, "code": run.code}


@torch.no_grad()
def reconstructed(run, dataset, count):
    """Rows for `draw_grid`: some originals, and their reconstructions."""
    pairs = [(x, run.model(x).x_hat) for x, _ in run.batches(dataset, spread_indices(len(dataset), count))]
    return [(name, torch.cat(images)) for name, images in zip(("original", "reconstruction"), zip(*pairs))]


# ======== Tables

SAME_ROW = """seed out data prior labels download device compile workers log_every eval_every trunk_weights
    lpips_weights""".split()  # may differ within a row; of data and prior, the contents may not


def rows_of(results):
    """Results → list of (name, results of one configuration, step and contents, and of different seeds)."""
    groups, known = {}, ("step", "checkpoint", "codes", "contents", "images")
    for result in results:
        choices = {name: value for name, value in result["config"].items() if name not in SAME_ROW}
        alike = json.dumps([choices, *map(result.get, known)])
        seeds = [other["config"]["seed"] for other in groups.get(alike, ())]
        copy = result["run"] if result["config"]["seed"] in seeds else ""
        groups.setdefault(alike + copy, []).append(result)
    named = lambda group: group[0]["run"] + (f" ({len(group)} seeds)" if len(group) > 1 else "")
    return [(named(group), group) for group in groups.values()]


def spread(values, form):
    """Mean of numbers, ± their standard deviation where there are several; a dash for None."""
    if None in values:
        return "–"
    return form.format(np.mean(values)) + (f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else "")


def against(values, others):
    """Welch's p of two rows' seeds, in brackets; "" where either has one seed or no figure."""
    if min(len(values), len(others)) < 2 or None in (*values, *others):
        return ""
    return f" (p {scipy.stats.ttest_ind(values, others, equal_var=False).pvalue:.2g})"


COLUMNS = {  # in the paper's order, then ours
    "FID ↓": ("fid", "{:.2f}"),
    "PSNR ↑": ("psnr", "{:.2f}"),
    "ℓ1 ↓": ("l1", "{:.4f}"),
    "ℓ2 ↓": ("l2", "{:.4f}"),
    "SSIM ↑": ("ssim", "{:.4f}"),
    "LPIPS ↓": ("lpips", "{:.4f}"),
    "codes used": ("codes_used", "{:,.0f}"),
    "usage": ("usage", "{:.1%}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "bits/image": ("bits", "{:,.0f}"),
    "entropy bits": ("bits_entropy", "{:,.0f}"),
}


def markdown(results):
    """Results → a table, a row for each group of seeds; columns by codebook are joined by a plus.

    For PSNR and LPIPS of several seeds, Welch's p against the first row.
    """
    table, rows = [["run", *COLUMNS]], rows_of(results)
    for name, group in rows:
        row = [name]
        for column, form in COLUMNS.values():
            if isinstance(group[0][column], dict):
                sizes = group[0]["codes"]
                cells = [spread([result[column][part] for result in group], form) for part in sizes]
                if column == "codes_used":
                    cells = [f"{cell}/{size:,} {part}s" for cell, (part, size) in zip(cells, sizes.items())]
                row.append(" + ".join(cells))
            else:
                values, others = ([result[column] for result in of] for of in (group, rows[0][1]))
                tested = column in ("psnr", "lpips") and group is not rows[0][1]
                row.append(spread(values, form) + (against(values, others) if tested else ""))
        table.append(row)
    return as_markdown(table)


def alignment_table(results):
    """Results → a table of what codes have to do with captions; "" where there are none."""
    table = [["run", "codes", "their words said in captions, against what frequencies give", "p"]]
    for name, group in rows_of(results):
        for part in group[0]["alignment"]:
            found = [result["alignment"][part] for result in group]
            p = ", ".join(f"{each['p']:.3f}" for each in found)
            table.append([name, part, spread([each["ratio"] for each in found], "{:.2f}"), p])
    return as_markdown(table) if len(table) > 1 else ""


def as_markdown(table):
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


# ======== Figures

def draw_codebook_space(prior, path, neighbours=4):
    """Fig. 1: the paper's words, or the most frequent ones, and their nearest neighbours among the prior's vectors.

    Positions are the first two principal components of the words shown. Lines join a chosen word to its nearest
    neighbours in the full space, whose cosines stand below.
    """
    panels = []
    for part in PARTS:
        words, vectors = prior[f"{part}_words"], prior[f"{part}_vectors"].numpy()
        near = {word: nearest_words(words, vectors, word, neighbours) for word in examples(words, part)}
        shown = sorted({*near, *(name for names in near.values() for name, _ in names)})
        points = vectors[[words.index(word) for word in shown]].astype(np.float64)
        points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        points = points - points.mean(axis=0)
        place = dict(zip(shown, points @ np.linalg.svd(points, full_matrices=False)[2][:2].T))
        lines = [([place[word], place[name]], -1, "") for word, names in near.items() for name, _ in names]
        lines += [([place[word]], 1 if word in near else 0, word) for word in shown]
        notes = [f"{word}: " + ", ".join(f"{name} {cosine:.2f}" for name, cosine in near[word]) for word in near]
        notes = ["lines lead from chosen words to their nearest, by cosine:", *notes]
        panels.append(dict(title=f"{part} codebook space ({len(words):,} words)", lines=lines, notes=notes,
                           x="first principal component", y="second principal component", ticked=False))
    draw_plots(panels, path)


def draw_toy(prior, path, steps=80):
    """Fig. 3: a 2-d codebook in which one code is pulled to one feature, by VQ-VAE and by VQCT.

    A toy of a run's prior, not of its weights: the most connected adjective, nouns that it modifies, and adjectives
    of those. Both systems start from the same codes. The toy has no last ReLU, so that codes fill the plane.
    """
    edges = prior["edges"].numpy()
    hub = np.bincount(edges[:, 0]).argmax()
    nouns = edges[edges[:, 0] == hub, 1][:6].tolist()
    adjectives = sorted({hub, *np.unique(edges[np.isin(edges[:, 1], nouns), 0])[:5].tolist()})
    names = [prior["adjective_words"][i] for i in adjectives] + [prior["noun_words"][i] for i in nouns]
    vectors = torch.cat([prior["adjective_vectors"][adjectives], prior["noun_vectors"][nouns]])
    among = [(a, n) for a, n in edges.tolist() if a in adjectives and n in nouns]
    among = [(adjectives.index(a), len(adjectives) + nouns.index(n)) for a, n in among]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = (vectors.shape[1], 64, 64, 2)
        transfer = CodebookTransfer(widths, NormalizedAdjacency(among, len(names)), last_relu=False)
    vectors = (vectors - vectors.mean(0)) / vectors.std(0).clamp_min(1e-12)
    generated = Codebook(vectors, (len(names),), transfer=transfer)
    start = generated()[0].detach()
    away = start - start.mean(0)
    far = away.norm(dim=1)
    feature = start.mean(0) + 1.4 * far.max() * F.normalize(away[far.argsort()[len(far) // 2]], dim=0)
    followed = nearest_code(feature[None], start).item()
    rate = 1.5 * (feature - start[followed]).norm().item() / steps
    ways = {
        "VQ-VAE: each code is a parameter": pull(Codebook(start, (len(names),), trained=True), feature, rate, steps),
        "VQCT: one network makes all codes": pull(generated, feature, 5e-4, steps),
    }
    panels = []
    for title, way in ways.items():
        lines = [(way[:, i], 1 if i == followed else 0, name) for i, name in enumerate(names)]
        moved = (np.abs(way[-1] - way[0]).max(axis=1) > 0).sum()
        last = names[nearest_code(feature[None], torch.from_numpy(way[-1])).item()]
        notes = [f"{moved} of {len(names)} codes have moved; dots: after {steps} steps",
                 f"each step pulls the code nearest at the time: at first {names[followed]}, at last {last}",
                 "no ReLU after the last layer, unlike Eq. 3"]
        panels.append(dict(title=title, lines=[*lines, ([feature.numpy()], 2, "feature")], notes=notes))
    draw_plots(panels, path)


def pull(codebook, feature, lr, steps):
    """Each step takes Eq. 1's code nearest to a feature and descends Eq. 2's codebook term by Adam → (steps, N, D)."""
    optimizer, way = torch.optim.Adam(codebook.parameters(), lr=lr), []
    for _ in range(steps):
        (codes,) = codebook()
        way.append(codes.detach().numpy().copy())
        loss = VectorQuantizer(beta=0.0)(feature.view(1, -1, 1, 1), codes)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.stack(way)


def draw_usage(evaluations, path):
    """Fig. 5: the share of all codes in use, how often each was chosen, and codes used by positions seen."""
    panels = []
    for evaluation in evaluations:
        ranked, growth, run = [], [], evaluation.run
        for colour, (codes, words, name) in enumerate(zip(evaluation.indices, run.words, run.names)):
            by_position = np.moveaxis(codes, 1, -1).ravel()
            counts = np.sort(np.bincount(by_position))[::-1]
            used, first = (counts > 0).sum(), np.sort(np.unique(by_position, return_index=True)[1]) // codes.shape[1]
            label = f"{used:,} of {len(words):,} {name}s ({used / len(words):.1%})"
            ranked.append((np.stack([1 + np.arange(used), counts[:used]], axis=1), colour, label))
            growth.append((np.stack([1 + first, 1 + np.arange(used)], axis=1), colour, f"{name}s"))
        total, chosen = sum(map(len, run.words)), sum(len(ends) for ends, _, _ in ranked)
        title = f"{run.path.name}: {chosen / total:.1%} of all codes used"
        panels.append(dict(title=title, lines=ranked, x="codes, most used first", y="times chosen, log scale", log="y"))
        panels.append(dict(title=title, lines=growth, x="positions seen, log scale", y="codes used so far", log="x"))
    draw_plots(panels, path)


def draw_similarity(evaluation, path):
    """Fig. 6: cosine similarity (red: 1, white: 0, blue: −1) of ten codes in use at the start and the end of training.

    Beside each codebook: the ten words, and the correlation of start and end over all pairs of 1,000 codes in use.
    """
    run, rows = evaluation.run, []
    colour = lambda m: torch.stack([1 + 2 * m.clamp(max=0), 1 - 2 * m.abs(), 1 - 2 * m.clamp(min=0)])
    unit = lambda codes: codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    for i, (name, codes, words) in enumerate(zip(run.names, run.model.codebook(), run.words)):
        tables = [unit(run.start[i].cpu().numpy()), unit(codes.float().cpu().numpy())]
        used = np.random.default_rng(0).permutation(np.unique(evaluation.indices[i]))
        matrices = [torch.from_numpy(table[used[:10]] @ table[used[:10]].T).float() for table in tables]
        pairs = np.triu_indices(min(len(used), 1000), 1)
        before, after = ((table[used[:1000]] @ table[used[:1000]].T)[pairs] for table in tables)
        kept = np.corrcoef(before, after)[0, 1] if len(before) > 1 and before.std() * after.std() > 0 else math.nan
        listed = ", ".join(words[code] for code in used[:10])
        label = f"{len(used[:10])} {name}s in use, at start, at end: correlation {kept:.2f}\n{listed}"
        rows.append((label, list(map(colour, matrices))))
    rows.append(("scale: cosines from -1 to 1", [colour(torch.linspace(-1, 1, 11).expand(11, 11))]))
    draw_grid(rows, path, 300)


def draw_regions(evaluation, dataset, path):
    """Fig. 7: five regions of images and the words of their codes, starred where a caption of the image says it."""
    run, rows = evaluation.run, []
    said_by = WordListSpeech(run.prior["adjective_words"], run.prior["noun_words"]) if run.prior else None
    for index in spread_indices(len(dataset), 8):
        image, cell, lines, boxes = dataset[index]["image"], run.config.resolution // run.model.grid[0], [], []
        said = {word for _, word in words_said(dataset, index, said_by)} if said_by else ()
        for row, column in ((0.25, 0.25), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (0.75, 0.75)):
            row, column = int(row * run.model.grid[0]), int(column * run.model.grid[1])
            boxes.append([column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1])
            codes = torch.cat([torch.from_numpy(part[index, :, row, column]) for part in evaluation.indices])
            words = run.spell(codes[:, None, None]).split()
            lines.append(f"{len(boxes)} " + " ".join(word + ("*" if word in said else "") for word in words))
        lines += ["* said in a caption"] if any("*" in line for line in lines) else []
        scale = max(1, 256 // image.shape[-1])
        image = TF.resize(image, image.shape[-1] * scale, TF.InterpolationMode.NEAREST)
        labels = [str(number) for number in range(1, 6)]
        boxes = torch.tensor(boxes) * scale
        image = torchvision.utils.draw_bounding_boxes(image, boxes, labels, "white", width=2)
        rows.append(("\n".join(lines), [image / 127.5 - 1]))
    draw_grid(rows, path, 256)


def draw_curves(evaluations, path):
    """PSNR of the held-out images, losses and codes used against steps, of one run or several, from metrics.jsonl."""
    panels = []
    shown = {"PSNR of held-out images, dB": "validation_psnr", "loss": "loss", "quantizers' loss": "quantizer"}
    for title, name in {**shown, "codes used, all codebooks": "codes_used"}.items():
        lines = []
        for colour, evaluation in enumerate(evaluations):
            logged = read_journal(evaluation.run.path / "metrics.jsonl")
            points = [(line["step"], np.sum(line[name])) for line in logged if name in line]
            lines += [(points, colour, evaluation.run.path.name)] if points else []
        panels += [dict(title=title, lines=lines, x="steps")] if lines else []
    if panels:
        draw_plots(panels, path)


def draw_rate_distortion(results, path):
    """PSNR against bits at the codes' entropy: a dot for each row, ± the standard deviations of its seeds."""
    lines = []
    for colour, (_, group) in enumerate(rows_of(results)):
        seeds = np.array([(result["bits_entropy"], result["psnr"]) for result in group])
        mean, bars = seeds.mean(axis=0), seeds.std(axis=0, ddof=1) * np.eye(2) if len(seeds) > 1 else ()
        lines += [([mean - bar, mean + bar], colour, "") for bar in bars]
        lines.append(([mean], colour, Path(group[0]["run"]).name))
    panel = dict(title="rate and distortion", x="bits per image, ideal code", y="PSNR, dB", lines=lines)
    draw_plots([panel], path, size=(900, 600))


def compare(evaluations, folder):
    """Fig. 4 and 5, the rate–distortion picture and the table of several runs, into a folder."""
    results, rows = [evaluation.result for evaluation in evaluations], []
    for run, result, _ in evaluations:
        originals, (_, images) = reconstructed(run, run.dataset("val"), 8)
        rows += [*([] if rows else [originals]), (f"{run.path.name}\n{result['psnr']:.2f} dB", images)]
    draw_grid(rows, folder / "fig4_reconstructions.png")
    draw_usage(evaluations, folder / "fig5_usage.png")
    draw_curves(evaluations, folder / "curves.png")
    draw_rate_distortion(results, folder / "rate_distortion.png")
    with atomic_write(folder / "table.md") as part:
        part.write_text(f"{markdown(results)}\n\n{alignment_table(results)}\n", encoding="utf-8")
    print(f"{folder}: table.md, curves.png, fig4_reconstructions.png, fig5_usage.png, rate_distortion.png")


# ======== Line plots

INK = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#475569", "#b8cbe6")
GRID = "#eef2f7"
SMALL, FONT = (ImageFont.load_default(size) for size in (13, 15))


def draw_plots(panels, path, columns=2, size=(520, 400)):
    """Plots in a grid → PNG.

    panels: list of dicts: title; lines, a list of (points, colour, label), whose last point has a dot where there is a
        label, and whose colour is a number, −1 for pale; and maybe x, y: names of the axes; log: which of them, "x",
        "y" or "xy"; notes: text below; ticked: whether the axes have numbers.
    """
    notes = 20 * max(len(panel.get("notes", ())) for panel in panels)
    width, height = size[0], size[1] + notes
    image = Image.new("RGB", (width * min(columns, len(panels)), height * math.ceil(len(panels) / columns)), "white")
    for number, panel in enumerate(panels):
        corner = (number % columns * width, number // columns * height)
        draw_panel(ImageDraw.Draw(image), (corner[0] + 70, corner[1] + 40, width - 110, size[1] - 100), **panel)
    save_png(image, path)


def draw_panel(draw, box, title, lines, x="", y="", log="", notes=(), ticked=True):
    """One plot in a box of (left, top, width, height) pixels."""
    left, top, width, height = box
    scaled = [np.array(points, dtype=np.float64).reshape(-1, 2) for points, _, _ in lines]
    for points in scaled:
        for axis in (axis for axis, name in enumerate("xy") if name in log):
            points[:, axis] = np.log10(points[:, axis].clip(min=1e-12))
    low, high = np.concatenate(scaled).min(axis=0), np.concatenate(scaled).max(axis=0)
    margin = np.maximum(0.04 * (high - low), 1e-9)
    low, span = low - margin, high - low + 2 * margin

    def at(point):
        x, y = (point - low) / span
        return left + x * width, top + (1 - y) * height

    def ink(number):
        return INK[number if number < 0 else number % (len(INK) - 1)]

    draw.text((left, top - 36), title, "black", FONT)
    draw.text((left + width / 2, top + height + 32), x, "black", SMALL, anchor="mm")
    draw.text((left, top - 8), y, "black", SMALL, anchor="lm")
    for axis, name in enumerate("xy"):
        for place, value in ticks(low[axis], low[axis] + span[axis], name in log) if ticked else ():
            px, py = at(np.full(2, place))
            ends, text = ((px, top, px, top + height), (px, top + height + 12)), "mm"
            if name == "y":
                ends, text = ((left, py, left + width, py), (left - 6, py)), "rm"
            draw.line(ends[0], GRID)
            draw.text(ends[1], f"{value:,.6g}", "black", SMALL, anchor=text)
    draw.rectangle((left, top, left + width, top + height), outline=INK[-1])
    scaled = [list(map(at, points)) for points in scaled]  # pixels from here on
    for points, (_, number, _) in zip(scaled, lines):
        draw.line(points, ink(number), 2)
    taken = [(px, py, px, py) for points in scaled for px, py in points]
    labelled = [(points[-1], ink(number), label) for points, (_, number, label) in zip(scaled, lines) if label]
    for (px, py), colour, _ in labelled:
        taken.append((px - 4, py - 4, px + 4, py + 4))
        draw.ellipse(taken[-1], colour)
    for point, colour, label in labelled:  # above all lines
        taken.append(free_box(point, draw.textlength(label, SMALL), np.array(taken), left + width + 36))
        draw.text(taken[-1][:2], label, colour, SMALL, stroke_width=2, stroke_fill="white")
    for row, note in enumerate(notes):
        draw.text((left, top + height + 46 + 20 * row), note, "black", SMALL)


def ticks(low, high, log):
    """Round numbers of an axis, whose ends are logarithms where `log`: list of (place on it, number)."""
    if log:
        factors = (1, 2, 5) if high - low < 2 else (1,)
        numbers = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high)) for factor in factors]
        return [(math.log10(number), number) for number in numbers if low <= math.log10(number) <= high]
    least = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return [(step * i, step * i) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def free_box(point, length, taken, right):
    """The box (left, top, right, bottom) of a text that is nearest to a point and free of the `taken` ones, (n, 4)."""
    ways = [(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)]
    for reach, (across, down) in itertools.product(range(0, 306, 6), ways):
        x = point[0] + across * (7 + reach) + (across - 1) * length / 2
        y = point[1] - 8 + down * (13 + reach)
        beside = (x > taken[:, 2]) | (x + length < taken[:, 0])
        clear = (beside | (y > taken[:, 3]) | (y + 15 < taken[:, 1])).all()
        if clear and x + length <= right or reach == 300:
            return x, y, x + length, y + 15


# ======== Command line

def report(results, inception, lpips):
    """Print the tables, and notes to their columns."""
    print(f"\n{markdown(results)}")
    shown = {(r["dataset"], r["images"], r["baseline"], f"{r['baseline_psnr']:.2f}") for r in results}
    for dataset, images, baseline, score in sorted(shown):
        print(f"\n{dataset}: {images:,} evaluation images; the mean image of {baseline} gives {score} dB")
    if table := alignment_table(results):
        print(f"\n{table}")
    print()
    print(f"FID: – ({inception[1]})" if inception[1] else f"FID: {results[0]['fid_note']}")
    print(f"LPIPS: – ({lpips[1]})" if lpips[1] else f"LPIPS: {results[0]['lpips_note']}")
    if inception[0] is not None:
        warn_of_fid(min(result["images"] for result in results))


def warn_of_fid(images):
    """Print what FID over few images means."""
    if images <= FID_FEATURES:
        print(f"FID over {images:,} images is biased upward, as the covariance of {FID_FEATURES:,} features "
              "has no full rank; compare it over the same images only (papers take 5,000 to 50,000)")


def main(argv=None):
    """Reconstruct each run's evaluation split, measure, draw; then one table of all."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders of train.py")
    parser.add_fields(EvaluationConfig)
    given = vars(parser.parse_args(argv))
    torch.backends.cudnn.allow_tf32 = False  # so that figures are those of a CPU
    paths, choices, evaluations = list(dict.fromkeys(given.pop("runs"))), EvaluationConfig(**given), []
    for path in paths:
        if not (path / f"{choices.checkpoint}.pt").is_file():
            raise UserError(f"'{path}' is not a run of train.py: it has no {choices.checkpoint}.pt")
    files = [inception_file(), *lpips_files(choices.perceptual_trunk)]
    local = choices.inception, choices.trunk_weights, choices.lpips_weights
    with first_process_first():
        if choices.download:
            provide([file for file, path in zip(files, local) if not path], True, "")
        inception = load_or_reason(load_inception, choices.inception)
        load = functools.partial(load_lpips, choices.perceptual_trunk)
        lpips = load_or_reason(load, choices.trunk_weights, choices.lpips_weights)
    for path in paths:
        save = choices.save and (Path(choices.save) / path.resolve().name if len(paths) > 1 else Path(choices.save))
        evaluations.append(evaluate(path, choices, inception, lpips, save))
    if not rank():
        results = [evaluation.result for evaluation in evaluations]
        alike = len({(result["contents"]["images"], result["resolution"]) for result in results}) == 1
        if choices.figures and len(results) > 1 and alike:
            compare(evaluations, evaluations[0].run.results.parent / "comparison")
        elif choices.figures and len(results) > 1:
            print("nothing into comparison/: these runs have other evaluation images or another resolution")
        report(results, inception, lpips)


if __name__ == "__main__":
    launch(main)
