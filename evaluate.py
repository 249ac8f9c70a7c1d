"""Measure how well runs reconstruct the evaluation split; draw the paper's figures.

    python evaluate.py runs/demo-vqct --figures
    python evaluate.py runs/cub-vqct runs/cub-vqgan --data CUB_200_2011 --figures

Results on another data set are in RUN/other/NAME, comparisons of runs in comparison/
beside the first. Runs that differ only in their seeds share a row: mean ± standard
deviation, p of Welch's test against the first row, and p after Holm's correction.

ℓ1 and ℓ2 are of images in [-1, 1], not clamped. PSNR and LPIPS are of clamped images
and averaged over images. FID is of images rounded to 8 bits.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.ndimage
import scipy.sparse
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw

from prior import (PARTS, Parser, PublishedFile, UserError, WordListSpeech, atomic_write, command,
                   examples, nearest_words, provide, read_tensors, save_png, user_error)
from train import (FONT, Run, draw_grid, identity, load_lpips, lpips_files, psnr,
                   read_journal, spread_indices, to_bytes)
from vqct import Codebook, CodebookTransfer, NormalizedAdjacency, VectorQuantizer, option


# ======== Metrics

def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Fréchet distance of two Gaussians, a float (Heusel et al. 2017).

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

    With Rᵀ R = Σ_a, the symmetric R Σ_b Rᵀ has the eigenvalues of Σ_a Σ_b, so the
    root is real.

    mean: (d,); covariance: (d, d), of any rank.

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
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b)]
    return frechet_distance(*moments[0], *moments[1])


class OtherPool(nn.Module):
    """A block of torchvision's Inception with another pooling in its pooling branch."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x):
        pooled = self.block.branch_pool(self.pool(x))  # always the last channels of a block
        return torch.cat([self.block(x)[:, : -pooled.shape[1]], pooled], dim=1)


class InceptionFeatures(nn.Module):
    """pool3 features of the Inception-v3 that FID was defined with.

    It is torchvision's, but blocks A, C and the first E average without the padding,
    and the last E takes the maximum.

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
    path = path or inception_file().get("python evaluate.py RUN --download")
    with user_error(f"--inception {path} is not FID's weights: {{}}"):
        return InceptionFeatures(read_tensors(path))


def load_or_reason(load, *paths):
    """A network and "", or None and why. Raises UserError for a damaged local copy."""
    try:
        return load(*paths), ""
    except UserError as error:
        if any(paths):
            raise
        return None, str(error)


def warn_of_fid(images):
    """Print a warning if images are too few for FID's covariances."""
    if images <= 2048:
        print(f"FID over {images:,} images, no more than its features, is biased upward. "
              "Compare it only over the same images.")


def code_statistics(counts, names, images):
    """Dict of usage, perplexity and bits of codebooks, from (K,) counts of each one's codes.

    bits: of an image if each token takes log2 K bits; bits_entropy: if each takes the
    entropy of the frequencies.
    """
    result = {name: {} for name in ("usage", "codes_used", "codes", "perplexity")}
    result |= {"bits": 0.0, "bits_entropy": 0.0}
    for name, count in zip(names, counts):
        share = count[count > 0] / count.sum()
        entropy = -(share * np.log2(share)).sum()
        result["codes_used"][name] = len(share)
        result["codes"][name] = len(count)
        result["usage"][name] = len(share) / len(count)
        result["perplexity"][name] = 2.0**entropy
        result["bits"] += count.sum() / images * math.log2(len(count))
        result["bits_entropy"] += count.sum() / images * entropy
    return result


def caption_alignment(run, indices, dataset, permutations=999):
    """How often captions mention the words of an image's codes, relative to chance.

    Chance is what the frequencies of codes and of words predict. For p, words are
    assigned to codes at random.

    indices: list of (N, n, h, w) arrays, one for each codebook.
    Returns dict part of speech → {"ratio": to chance, "p": share of assignments at
    least as good, with the true one, "images": with captions}; empty without words
    or captions.
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
    starts = np.cumsum([0, *map(len, words.values())])
    codes = [chosen[captioned].reshape(len(captioned), -1) + start
             for chosen, start in zip(indices, starts)]
    counts = count_matrix(np.concatenate(codes, axis=1), len(pairs))
    spoken = count_matrix(mentioned, len(pairs))

    alignment, rng = {}, np.random.default_rng(0)
    for part, start, end in zip(words, starts, starts[1:]):
        ratio, p = alignment_of(counts[:, start:end], spoken[:, start:end], rng, permutations)
        alignment[part] = {"ratio": ratio, "p": p, "images": len(captioned)}
    return alignment


def alignment_of(counts, spoken, rng, permutations):
    """Mentions over chance (None if there is none), and p, from two sparse (images, K)."""
    images, codes = counts.shape[0], np.arange(counts.shape[1])
    together = counts.T @ spoken  # sparse: the pairs that occur in an image
    of_codes, of_words = counts.sum(0).A1, spoken.sum(0).A1

    def excess(words):
        return images * together[codes, words].sum() - of_codes @ of_words[words]

    true = excess(codes)
    larger = sum(excess(rng.permutation(codes)) >= true for _ in range(permutations))
    chance = of_codes @ of_words / images
    ratio = together.trace() / chance if chance else None
    return ratio, (1 + larger) / (1 + permutations)


def count_matrix(rows, columns):
    """Sparse int64: how often each column's number is in each row's list."""
    ends = np.cumsum([0, *map(len, rows)])
    numbers = np.concatenate(rows).astype(np.int64)
    ones = np.ones_like(numbers)
    return scipy.sparse.csr_matrix((ones, numbers, ends), (len(rows), columns))


# ======== One run

@dataclass
class EvaluationConfig:
    """How runs are measured."""

    data: str = option("", "where the data set is now, or another data set")
    labels: str = option("", "where the label maps are now, for runs with --dataset folder")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the first of cuda, mps, cpu")
    checkpoint: str = option("last", "the last step, or the best by validation",
                             choices=("last", "best"))
    download: bool = option(False, "download missing weights of FID and LPIPS")
    inception: str = option("", "local copy of FID's weights; without any, FID is –")
    perceptual_trunk: str = option(
        "squeeze", "LPIPS network: SqueezeNet 1.1, or VGG-16 as in papers",
        choices=("squeeze", "vgg"))
    trunk_weights: str = option("", "local copy of that network's torchvision weights")
    lpips_weights: str = option("", "local copy of LPIPS v0.1's heads for it")
    figures: bool = option(False, "draw Fig. 1, 3, 5, 6, 7 and curves; Fig. 4 of several runs")
    save: str = option("", "folder for originals and reconstructions of each run as PNG")


@torch.no_grad()
def reconstruct(run, dataset, inception=None, lpips=None, save=None):
    """Scores, indices and features of every image of a dataset through a run's model.

    Returns scores: dict of (N,) arrays psnr, l1, l2, maybe lpips;
    indices: (N, M, h, w) int32 tensor;
    features: of originals and reconstructions, a (2, N, 2048) array, or [].
    """
    scores, indices, features = {}, [], []
    for x, batch in run.batches(dataset, None, "reconstructing"):
        output = run.model(x)
        x_hat = output.x_hat.float()
        original, decoded = batch["image"].to(run.device, non_blocking=True), to_bytes(x_hat)
        values = {
            "psnr": psnr(x_hat, x),
            "l1": (x_hat - x).abs().mean(dim=(1, 2, 3)),
            "l2": (x_hat - x).square().mean(dim=(1, 2, 3)),
        }
        if lpips is not None:
            values["lpips"] = lpips(x_hat.clamp(-1, 1), x)
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
        indices.append(output.indices.int())
        if inception is not None:
            pair = inception(original), inception(decoded)
            features.append(torch.stack(pair))  # (2, B, 2048)
        if save:
            save_images(save / "originals", batch["index"], original)
            save_images(save / "reconstructions", batch["index"], decoded)
    scores = {name: torch.cat(values).cpu().double().numpy() for name, values in scores.items()}
    if features:
        features = torch.cat(features, dim=1).cpu().double().numpy()
    return scores, torch.cat(indices).cpu(), features


def save_images(folder, indices, images):
    """Write (B, 3, H, W) uint8 images as folder/INDEX.png."""
    for index, image in zip(indices.tolist(), images.cpu()):
        save_png(TF.to_pil_image(image), folder / f"{index:06d}.png")


class Evaluation(NamedTuple):
    """A run and its results."""

    run: Run
    result: dict  # as in evaluation.json
    indices: list  # (N, n, h, w) arrays, one for each codebook


def evaluate(path, choices=EvaluationConfig(), inception=None, lpips=None):
    """The Evaluation of one run."""
    run = Run(path, choices.device, choices.data, choices.labels, choices.checkpoint)
    dataset = run.dataset("val")
    networks = [network and network.to(run.device) for network in (inception, lpips)]
    save = choices.save and Path(choices.save, run.path.resolve().name)
    scores, indices, features = reconstruct(run, dataset, *networks, save)
    indices = [codes.numpy() for codes in run.model.by_codebook(indices)]
    counts = [np.bincount(codes.ravel(), minlength=len(words))
              for codes, words in zip(indices, run.words)]
    result = {
        "run": str(path), "checkpoint": choices.checkpoint, "step": run.step,
        "checkpoint_sha256": run.tokenizer,
        "images": len(dataset),
        "lpips": None,
        **{name: float(values.mean()) for name, values in scores.items()},
        "fid": fid(*features) if len(features) and len(dataset) > 1 else None,
        "fid_note": "Inception-v3 pool3 of pt_inception-2015-12-05",
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
    """Add FID and LPIPS measured earlier; remove figures of another checkpoint."""
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
    """Checksums of a run's prior, of its images, and of the code that trained it."""
    prior = hashlib.sha256()
    for name, value in (run.prior or {}).items():
        value = np.asarray(value)
        if run.config.shuffle in name:  # each seed permutes it differently
            value = np.sort(value, axis=0)
        prior.update(value.tobytes())
    return {"prior": prior.hexdigest(), "data": run.data,
            "images": identity(dataset, run.config.data),
            "code": run.code, "processes": run.processes}


@torch.no_grad()
def reconstructed(run, dataset, count):
    """Two rows for `draw_grid`: some originals, and their reconstructions."""
    batches = run.batches(dataset, spread_indices(len(dataset), count))
    pairs = [(x, run.model(x).x_hat) for x, _ in batches]
    originals, reconstructions = map(torch.cat, zip(*pairs))
    return [("original", originals), ("reconstruction", reconstructions)]


# ======== Tables

# In these, the runs of a row may differ. The contents of data and prior are compared apart.
MAY_DIFFER = """seed out data prior labels download device compile workers log_every eval_every
    trunk_weights lpips_weights""".split()
COLUMNS = {
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
    """Text of a mean ± standard deviation, of each codebook for dicts; "–" if one is None."""
    if isinstance(values[0], dict):
        codebooks = ([value[name] for value in values] for name in values[0])
        return " + ".join(spread(of_one, form) for of_one in codebooks)
    if None in values:
        return "–"
    mean = form.format(np.mean(values))
    return f"{mean} ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else mean


def holm(p_values):
    """The p values after Holm's correction for being several (1979), in the same order.

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
    columns = [["run", *(name for name, _ in rows)]]
    for column, (title, form) in COLUMNS.items():
        values = [[result[column] for result in group] for _, group in rows]
        for row in range(1, len(rows)) if column in ("psnr", "lpips") else ():
            pair = values[row], values[0]
            if all(len(seeds) > 1 and None not in seeds for seeds in pair):
                welch = scipy.stats.ttest_ind(*pair, equal_var=False)
                tests[len(columns), row] = welch.pvalue
        columns.append([title, *(spread(of_row, form) for of_row in values)])
    for ((column, row), p), corrected in zip(tests.items(), holm(list(tests.values()))):
        columns[column][row + 1] += f" (p {p:.2g}, Holm {corrected:.2g})"
    return as_markdown([*zip(*columns)])


def as_markdown(table):
    """Markdown of a list of rows of cells, the first of which has the titles."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


# ======== Figures

def draw_figures(evaluation, dataset, folder):
    """Draw a run's curves and the paper's figures of it into a folder."""
    if prior := evaluation.run.prior:
        draw_codebook_space(prior, folder / "fig1_space.png")
        if len(prior["edges"]):
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
    draw_rate_distortion([result for _, result, _ in evaluations], folder / "rate_distortion.png")
    print(f"{folder}: figures of all runs")


def draw_codebook_space(prior, path, neighbours=4):
    """Fig. 1: the paper's words, or others of the prior, and their nearest neighbours.

    Positions are the first two principal components of the words shown.
    """
    panels = []
    for part in PARTS:
        words, vectors = prior[f"{part}_words"], prior[f"{part}_vectors"]
        chosen = examples(words, part)
        pairs = [(word, other) for word in chosen
                 for other, _ in nearest_words(words, vectors.numpy(), word, neighbours)]
        shown = sorted({word for pair in pairs for word in pair} | {*chosen})
        points = F.normalize(vectors[[words.index(word) for word in shown]].double(), dim=1)
        points = (points - points.mean(0)).numpy()
        axes = np.linalg.svd(points)[2][:2]
        position = dict(zip(shown, points @ axes.T))
        lines = [([position[word], position[other]], -1, "") for word, other in pairs]
        lines += [([position[word]], int(word in chosen), word) for word in shown]
        title = f"{part}s: {len(shown)} of {len(words):,} words\nprincipal component 2"
        notes = ("principal component 1 of the words shown\n"
                 "Lines join chosen words to their nearest by cosine.")
        panels.append(dict(title=title, lines=lines, x=notes))
    draw_plots(panels, path)


def draw_toy(prior, path, steps=80):
    """Fig. 3: codes in two dimensions pulled to one feature, by VQ-VAE and by VQCT.

    The toy is made of a run's prior, not of its weights: the most connected
    adjective, nouns that it modifies, and adjectives of those.
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
    farthest = away.norm(dim=1).argmax()
    feature = start.mean(0) - 1.5 * away[farthest]
    nearest = (start - feature).norm(dim=1).argmin().item()
    rate = 1.5 * (feature - start[nearest]).norm().item() / steps
    paths = {
        "VQ-VAE: each code is a parameter": pull(learned, feature, rate, steps),
        "VQCT: one network makes all codes": pull(transferred, feature, 5e-5, steps),
    }
    shown = np.concatenate([feature[None].numpy(), *(x.reshape(-1, 2) for x in paths.values())])
    panels = []
    for title, codes in paths.items():
        lines = []
        for i, name in enumerate(names):
            colour = int(i == nearest)
            lines += [(codes[:, i], colour, name), (codes[:1, i], colour, "")]
        lines.append(([feature.numpy()], 2, "feature"))
        x = f"circles: start; dots: after {steps} steps\nno ReLU after the last layer"
        panels.append(dict(title=title, lines=lines, x=x, shown=shown))
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
    """Fig. 5: how often each code was chosen, and the share of codes that were."""
    panels = []
    for run, _, indices in evaluations:
        lines, total = [], 0
        for colour, (codes, words, name) in enumerate(zip(indices, run.words, run.names)):
            counts = np.unique(codes, return_counts=True)[1]
            used = len(counts)
            label = f"{used:,} of {len(words):,} {name}s ({used / len(words):.1%})"
            points = list(enumerate(np.log10(np.sort(counts)[::-1]), 1))
            lines.append((points, colour, label))
            total += used
        title = (f"{run.path.name}: {total / sum(map(len, run.words)):.1%} of all codes used\n"
                 "times chosen, log scale")
        panels.append(dict(title=title, lines=lines, log=True, x="codes, most used first"))
    draw_plots(panels, path)


def draw_curves(evaluations, path):
    """Held-out PSNR, losses and codes used against steps."""
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
    """PSNR against bits at entropy, a dot for each row, ± deviations of its seeds."""
    lines = []
    for colour, (_, group) in enumerate(rows_of(results)):
        seeds = np.array([(result["bits_entropy"], result["psnr"]) for result in group])
        mean = seeds.mean(axis=0)
        if len(seeds) > 1:
            for bar in seeds.std(axis=0, ddof=1) * np.eye(2):
                lines.append(([mean - bar, mean + bar], colour, ""))
        lines.append(([mean], colour, Path(group[0]["run"]).name))
    draw_plots([dict(title="rate and distortion\nPSNR, dB", lines=lines,
                     x="bits per image at entropy", size=(900, 600))], path)


def draw_similarity(evaluation, path, count=10, side=260):
    """Fig. 6: cosines between codes in use at start and end; correlation over at most 1,000."""
    run, pitch = evaluation.run, side + 160
    image = Image.new("RGB", (2 * side + 140, len(run.names) * pitch), "white")
    draw = ImageDraw.Draw(image)
    for row, (name, codes, words) in enumerate(zip(run.names, run.model.codebook(), run.words)):
        used = np.random.default_rng(0).permutation(np.unique(evaluation.indices[row]))[:1000]
        cosines = [F.normalize(x[used].float().cpu(), dim=1) for x in (run.start[row], codes)]
        cosines = [(x @ x.T).numpy() for x in cosines]
        pairs = np.triu_indices(len(used), 1)
        kept = scipy.stats.pearsonr(*(x[pairs] for x in cosines))[0] if len(used) > 2 else math.nan
        cosines = [x[:count, :count] for x in cosines]
        low = min(np.min(cosines), 0.99)
        title = (f"{name}s at the start and end of training: correlation {kept:.2f}\n"
                 f"cosine: {low:.2f} (blue) to 1 (red)")
        draw.text((20, row * pitch + 6), title, "black", FONT)
        titles, top = Image.new("RGB", (100, side), "white"), row * pitch + 144
        for i, code in enumerate(used[:count]):
            place = 4, (i + 0.5) * side / count
            ImageDraw.Draw(titles).text(place, words[code], "black", FONT, anchor="lm")
        image.paste(titles, (side + 20, top))
        for x, left in zip(cosines, (20, side + 120)):
            image.paste(in_colour((2 * x - 1 - low) / (1 - low), side), (left, top))
            image.paste(titles.rotate(90, expand=True), (left, top - 100))
    save_png(image, path)


def in_colour(values, side):
    """A square picture of a matrix: blue for -1, white for 0, red for 1."""
    red, blue = 1 + values.clip(max=0), 1 - values.clip(min=0)
    colours = np.stack([red, 1 - abs(values), blue], axis=-1)
    colours = (255 * colours.clip(0, 1)).astype(np.uint8)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)


def regions_of(evaluation, index):
    """Five positions of an image: a list of (row, column, the words of its codes)."""
    run, regions = evaluation.run, []
    for y, x in ((0.25, 0.25), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (0.75, 0.75)):
        row, column = int(y * run.model.grid[0]), int(x * run.model.grid[1])
        codes = [torch.from_numpy(part[index, :, row, column]) for part in evaluation.indices]
        regions.append((row, column, run.spell(torch.cat(codes)[:, None, None])))
    return regions


def draw_regions(evaluation, dataset, path, columns=4, side=256, margin=160):
    """Fig. 7: regions of eight images, and beside each image the words of their codes."""
    chosen, cell = spread_indices(len(dataset), 8), side / evaluation.run.model.grid[0]
    rows = math.ceil(len(chosen) / columns)
    image = Image.new("RGB", (columns * (side + margin), rows * (side + 8) + 28), "white")
    draw = ImageDraw.Draw(image)
    for number, index in enumerate(chosen):
        left, top = number % columns * (side + margin), number // columns * (side + 8)
        picture = TF.to_pil_image(dataset[index]["image"])
        image.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        for i, (row, column, words) in enumerate(regions_of(evaluation, index), 1):
            x, y = left + column * cell, top + row * cell
            draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), outline="black", width=3)
            draw.rectangle((x - 2, y - 2, x + cell + 1, y + cell + 1), outline="white")
            draw.text((x - 6, y), str(i), "white", FONT, "ra", stroke_width=2, stroke_fill="black")
            draw.text((left + side + 10, top + 24 * i), f"{i}  {words}", "black", FONT)
    note = "Words are names of codes; they need not describe what is seen."
    draw.text((4, image.height - 22), note, "black", FONT)
    save_png(image, path)


# ---- Drawing of plots

INK = "#2563eb #c2410c #15803d #7c3aed #a16207 #0e7490 #be185d #8fa3bf".split()  # -1: pale


def draw_plots(panels, path):
    """Draw plots of one size, two in a row; panels: dicts of arguments of `draw_panel`."""
    images = [draw_panel(**panel) for panel in panels]
    width, height = images[0].size
    shape = min(2, len(images)), math.ceil(len(images) / 2)
    grid = Image.new("RGB", (width * shape[0], height * shape[1]), "white")
    for number, image in enumerate(images):
        grid.paste(image, (number % 2 * width, number // 2 * height))
    save_png(grid, path)


def draw_panel(title, lines, x, log=False, shown=None, size=(520, 400)):
    """An image of one plot, whose title's second line is that of y.

    lines: list of (points, colour, label). A line with a label ends in a dot. One
    point without a label is a circle. x: title of x, and notes below it; log: whether
    y is log10 of what the ticks say; shown: points to fit, by default those of lines.
    """
    left, top, right, bottom = 70, 40, size[0] - 40, size[1] - 60
    image = Image.new("RGB", (size[0], size[1] + 20 * x.count("\n")), "white")
    draw = ImageDraw.Draw(image)
    lines = [(np.array(points, dtype=float), INK[min(colour, colour % 7)], label)
             for points, colour, label in lines]
    fitted = np.concatenate([points for points, *_ in lines]) if shown is None else shown
    low, high = fitted.min(axis=0), fitted.max(axis=0)
    margin = np.where(high > low, 0.04 * (high - low), 0.5)
    low, high = low - margin, high + margin
    scale = (right - left, top - bottom) / (high - low)

    draw.text((left, top - 38), title, "black", FONT)
    draw.text((left, bottom + 24), x, "black", FONT)
    for place, text in ticks(low[0], high[0]):
        across = left + (place - low[0]) * scale[0]
        draw.line((across, top, across, bottom), "#eef2f7")
        draw.text((across, bottom + 12), text, "black", FONT, anchor="mm")
    for place, text in ticks(low[1], high[1], log):
        down = bottom + (place - low[1]) * scale[1]
        draw.line((left, down, right, down), "#eef2f7")
        draw.text((left - 6, down), text, "black", FONT, anchor="rm")
    draw.rectangle((left, top, right, bottom), outline=INK[-1])

    lines = [((left, bottom) + (points - low) * scale, ink, label) for points, ink, label in lines]
    for points, ink, label in lines:
        draw.line(points.ravel().tolist(), ink, 2)
        if label:
            draw.circle(points[-1], 4, ink)
        elif len(points) == 1:
            draw.circle(points[0], 5, outline=ink)
    for points, ink, label in lines:
        if label:
            inside = image.crop((left, top, right, bottom))
            length = draw.textlength(label, FONT)
            place = free_place(inside, points[-1] - (left, top), length) + (left, top)
            half = length / 2, 8
            edge = points[-1].clip(place - half, place + half)
            draw.line((*points[-1], *edge), ink)
            draw.text(place, label, ink, FONT, "mm", stroke_width=2, stroke_fill="white")
    return image


def ticks(low, high, log=False):
    """Round numbers of an axis, a list of (position, text); a log axis has log10 positions."""
    least = max((high - low) / 7, float(log))  # a log axis has powers of ten
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    positions = step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)
    return [(place, f"{10**place if log else place:,.6g}") for place in positions]


def free_place(image, point, length):
    """Where to centre a text of a length: as near to a point as nothing dark is below it."""
    dark, size = np.array(image).min(axis=-1) < 128, (18, math.ceil(length) + 4)
    taken = scipy.ndimage.maximum_filter(dark, size, mode="constant", cval=True)
    down, across = np.indices(dark.shape)
    apart = abs(across - point[0] - 3) - size[1] / 2  # rather to the right
    distance = np.hypot(apart.clip(min=0), down - point[1])
    y, x = np.unravel_index((distance + 1e6 * taken).argmin(), dark.shape)
    return np.array([x, y])


# ======== Command line

def report(results, reasons):
    """Print the table of results, and what to know of it."""
    print(f"\n{markdown(results)}\n")
    for name, group in rows_of(results):
        for part in group[0]["alignment"]:
            seeds = [result["alignment"][part] for result in group]
            ratio = spread([seed["ratio"] for seed in seeds], "{:.2f}")
            p_values = ", ".join(f"{seed['p']:.3f}" for seed in seeds)
            print(f"{name}: captions mention words of its {part} codes {ratio} times as often "
                  f"as chance predicts (p of each seed: {p_values})")
    for name, reason in zip(("fid", "lpips"), reasons):
        notes = [result[f"{name}_note"] for result in results if result[name] is not None]
        print(f"{name.upper()}: " + ("; ".join(dict.fromkeys(notes)) or f"– ({reason})"))
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
            raise UserError(f"'{path}' is not a run of train.py: "
                            f"it has no {choices.checkpoint}.pt")
    torch.backends.cudnn.allow_tf32 = False  # so that results are those of a CPU
    files = [inception_file(), *lpips_files(choices.perceptual_trunk)]
    local = choices.inception, choices.trunk_weights, choices.lpips_weights
    if choices.download:
        provide([file for file, path in zip(files, local) if not path], True, "")
    inception, no_fid = load_or_reason(load_inception, choices.inception)
    lpips, no_lpips = load_or_reason(
        lambda *paths: load_lpips(choices.perceptual_trunk, *paths), *local[1:])
    evaluations = [evaluate(path, choices, inception, lpips) for path in paths]
    results = [evaluation.result for evaluation in evaluations]
    images = {(result["contents"]["images"], result["config"]["resolution"])
              for result in results}
    if len(images) > 1:
        print("the rows do not compare: their evaluation images differ")
    elif choices.figures and len(results) > 1:
        compare(evaluations, evaluations[0].run.results.parent / "comparison")
    report(results, (no_fid, no_lpips))


if __name__ == "__main__":
    command(main)
