"""Measure how runs reconstruct the evaluation split, and draw what they learned (paper Tables 1 to 5, Fig. 3 to 7).

    python evaluate.py runs/demo-vqct --figures
    python evaluate.py runs/cub-vqct runs/cub-vqgan --data CUB_200_2011 --figures
    python evaluate.py runs/cub-vqct --inception pt_inception-2015-12-05-6726825d.pth --save out

Prints Markdown tables; writes evaluation.json and reconstructions.png into each run and, with --figures,
Fig. 3 and 5 to 7 into its figures/ and what compares several runs into comparison/ beside the first.
Runs that differ only by their seed share a row, mean ± standard deviation. ℓ1 and ℓ2 are on [-1, 1]
images as the decoder leaves them; PSNR, SSIM and LPIPS on images clamped to that range, each averaged
over images; FID on images rounded to 8 bits, against the same split.
"""

import dataclasses
import json
import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Metal lacks runs on the CPU; read when torch is imported

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw

# fmt: off
from prior import (BOLD, FONT, PARTS, Parser, Progress, SMALL, UserError, WordListSpeech, add_flags, command, explained, load_arrays,
                   option, save_png, take_flags, whole_file, write_free)
from train import (Config, DEVICES, code_words, codebook_names, draw_pairs, evenly, first_process_first, load_lpips, load_run, load_weights,
                   make_dataset, make_loader, pick_device, processes, psnr, rank, to_images, torchrun)
# fmt: on
from vqct import Codebook, CodebookTransfer, NormalizedAdjacency, VectorQuantizer, across, nearest_code, rescale

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
FID_IMAGES = 2048  # fewer images than feature dimensions make FID large and incomparable


@dataclass
class EvaluationConfig:
    """How runs are measured. Each weight file has a flag for a local copy; without, torch hub's cache is looked into, or it is downloaded."""

    data: str = option("", "where the data set lies now, if not where the run found it")
    skip_broken: bool = option(False, "leave out images that are missing or cannot be read")
    device: str = option("auto", DEVICES)
    checkpoint: str = option("last", "last step, as the paper trains to the end, or best validation PSNR", choices=("last", "best"))
    inception: str = option("", "local copy of FID's weights; where they are unavailable, FID is a dash")
    trunk_weights: str = option("", "local copy of torchvision's SqueezeNet 1.1, for LPIPS")
    lpips_weights: str = option("", "local copy of LPIPS v0.1's heads for it")
    figures: bool = option(False, "draw Fig. 3 to 7 into each run's figures/, and what compares several runs into comparison/")
    save: str = option("", "folder for originals/*.png and reconstructions/*.png (of several runs: each in a folder of its name)")


# ---------------------------------------------------------------------------------------------
# Metrics


def ssim(x, y):
    """Structural similarity of each image (Wang et al. 2004): 11×11 Gaussian window of σ 1.5, data range 2.

    Args:
        x, y: (B, 3, H, W) in [-1, 1], at least 11 pixels per side; clamped to that range.
    Returns:
        (B,), at most 1: mean over colours and the positions where the window fits.
    """
    x, y = x.clamp(-1, 1), y.clamp(-1, 1)
    window = lambda image: TF.gaussian_blur(image, [11, 11], [1.5, 1.5])[..., 5:-5, 5:-5]
    mean_x, mean_y = window(x), window(y)
    variance_x, variance_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    covariance = window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.mean(dim=(1, 2, 3))


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Fréchet distance of two Gaussians: ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017).

    Σ_a Σ_b has the eigenvalues of the symmetric R Σ_b Rᵀ with Rᵀ R = Σ_a, so the root is real, and
    two symmetric eigenvalue problems replace a general matrix root.

    Args:
        mean: (d,); covariance: (d, d) symmetric and positive semi-definite, of any rank.
    Returns:
        float.
    """
    values, vectors = scipy.linalg.eigh(covariance_a)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    values = scipy.linalg.eigvalsh(root @ covariance_b @ root.T)
    values[values < values.max() * len(values) * np.finfo(values.dtype).eps] = 0  # a rounding error's root is no longer small
    return float(np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(values).sum())


def fid(a, b):
    """Fréchet distance of two (N, d) float64 arrays of features, each as a Gaussian; FID when they are Inception's."""
    return frechet_distance(*(moment for part in (a, b) for moment in (part.mean(axis=0), np.cov(part, rowvar=False))))


class InceptionFeatures(nn.Module):
    """pool3 of the Inception-v3 whose weights FID was defined with (ported from TensorFlow).

    torchvision's network, but the pooling branches of blocks A, C and the first E average without
    the padding, and that of the last E takes the maximum.

    Args:
        state: state dict of pt_inception-2015-12-05, 1,008 classes.
    """

    def __init__(self, state):
        super().__init__()
        self.network = torchvision.models.inception_v3(
            weights=None, num_classes=1008, aux_logits=False, init_weights=False, transform_input=False
        )
        self.network.load_state_dict(state)
        average = lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            self._replace_pooling(getattr(self.network, f"Mixed_{name}"), average)
        self._replace_pooling(self.network.Mixed_7c, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.network.fc = nn.Identity()
        self.requires_grad_(False).eval()

    @staticmethod
    def _replace_pooling(block, pool):
        forward = block.forward

        def replaced(x):
            pooled = block.branch_pool(pool(x))  # always the last channels of a block
            return torch.cat([forward(x)[:, : -pooled.shape[1]], pooled], dim=1)

        block.forward = replaced

    def forward(self, x):
        """(B, 3, H, W) uint8 → (B, 2048) float32."""
        x = F.interpolate(x.float() / 127.5 - 1, size=(299, 299), mode="bilinear", align_corners=False)
        return self.network(x)


def load_inception(path=""):
    """InceptionFeatures, or the reason why not. A path that was given and does not work is an error."""
    try:
        with explained(f"--inception {path}: not the FID weights: {{}}", RuntimeError):
            return InceptionFeatures(load_weights(INCEPTION_URL, path, "Inception weights for FID", "--inception")), ""
    except UserError as error:
        if path:
            raise
        return None, str(error)


def to_bytes(x):
    """[-1, 1] → uint8, rounded."""
    return x.float().clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------
# A run


@torch.no_grad()
def mean_image(dataset, device, limit=10_000):
    """(3, R, R) mean of at most `limit` evenly spaced images: the best constant prediction of PSNR's baseline."""
    chosen = torch.utils.data.Subset(dataset, evenly(len(dataset), limit))
    total = 0.0
    for batch in make_loader(chosen, device, -1, batch_size=64):
        total = total + to_images(batch["image"], device).cpu().double().sum(dim=0)
    return (total / len(chosen)).float().to(device)


@torch.no_grad()
def reconstruct(model, dataset, device, batch_size, baseline, inception=None, lpips=None, save=None):
    """Every image of a dataset through a model in evaluation mode, each process of torchrun its share.

    Returns:
        scores: dict of (N,) arrays psnr, l1, l2, ssim, baseline_psnr, and lpips where there is one;
        indices: (N, M, h, w) int32; features: originals' and reconstructions', (N, 2048), or an empty list.
    """
    scores, indices, features, progress = {}, [], [], Progress()
    mine = torch.utils.data.Subset(dataset, range(rank(), len(dataset), processes()))
    for batch in make_loader(mine, device, -1, batch_size=batch_size):
        x = to_images(batch["image"], device)
        output = model(x)
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
        eight_bits = batch["image"].to(device), to_bytes(x_hat)
        if inception is not None:
            features.append(torch.cat([inception(images)[:, None] for images in eight_bits], dim=1).float().cpu())  # (B, 2, 2048)
        if save is not None:
            save_images(save, batch["index"].tolist(), eight_bits)
        progress(f"reconstructing: {sum(map(len, indices)):,}/{len(mine):,} images")
    gather = lambda parts: of_all_processes(torch.cat(parts).to(device), len(dataset)).cpu().numpy()
    scores = {name: gather(values).astype(np.float64) for name, values in scores.items()}
    return scores, gather(indices), gather(features).swapaxes(0, 1).astype(np.float64) if features else []


def of_all_processes(rows, total):
    """The rows of `total` that the processes have in turn, (share, …), put together again, (total, …)."""
    share = math.ceil(total / processes())
    rows = torch.cat([rows, rows.new_zeros(share - len(rows), *rows.shape[1:])])
    return across(rows, "rows").unflatten(0, (-1, share)).transpose(0, 1).flatten(0, 1)[:total]


@torch.no_grad()
def reconstructed_pairs(model, dataset, device, batch_size, count=16):
    """`count` originals and reconstructions in turn."""
    pairs = []
    for batch in make_loader(torch.utils.data.Subset(dataset, evenly(len(dataset), count)), device, 0, batch_size=batch_size):
        x = to_images(batch["image"], device)
        pairs += [image.cpu() for pair in zip(x, model(x).x_hat.float()) for image in pair]
    return pairs


def save_images(folder, indices, images):
    """PNG files of the same names under originals/ and reconstructions/."""
    for name, batch in zip(("originals", "reconstructions"), images):
        for index, image in zip(indices, batch.cpu()):
            with whole_file(Path(folder) / name / f"{index:06d}.png") as temporary:
                TF.to_pil_image(image).save(temporary, "PNG")


class Usage(NamedTuple):
    """How a codebook was used over a split."""

    counts: np.ndarray  # (K,) times each code was chosen
    growth: np.ndarray  # (used,) positions seen when the first, second, … code turned up
    positions: int  # seen in all


def code_usage(indices, sizes):
    """A list of (N, n, h, w) index arrays and of codebook sizes → a list of Usage."""
    usage = []
    for chosen, size in zip(indices, sizes):
        by_position = np.moveaxis(chosen, 1, -1).ravel()
        first = np.unique(by_position, return_index=True)[1] // chosen.shape[1]
        usage.append(Usage(np.bincount(by_position, minlength=size), np.sort(first) + 1, by_position.size // chosen.shape[1]))
    return usage


def code_statistics(counts, images):
    """Use of codebooks from how often each code was chosen.

    Args:
        counts: list of (K,) arrays over the whole split; images: of that split.
    Returns:
        dict: usage, codes_used, codes and perplexity by codebook; bits and bits_entropy an image,
        with a fixed-length code (log2 K a token; averaged neighbours are a token each) and with an ideal
        one for the empirical frequencies.
    """
    statistics = {name: {} for name in ("usage", "codes_used", "codes", "perplexity")}
    statistics.update(bits=0.0, bits_entropy=0.0)
    for name, count in zip(codebook_names(counts), counts):
        share, tokens = count[count > 0] / count.sum(), count.sum() / images
        entropy = float(-(share * np.log2(share)).sum())
        statistics["codes_used"][name], statistics["codes"][name] = int((count > 0).sum()), len(count)
        statistics["usage"][name], statistics["perplexity"][name] = float((count > 0).mean()), 2.0**entropy
        statistics["bits"] += float(tokens * math.log2(len(count)))
        statistics["bits_entropy"] += float(tokens * entropy)
    return statistics


class Evaluation(NamedTuple):
    """What `evaluate` finds out about a run."""

    result: dict  # as in evaluation.json
    usage: list  # of Usage, for each codebook
    pairs: list  # sixteen originals and reconstructions in turn, (3, H, W) in [-1, 1]


def evaluate(path, choices=EvaluationConfig(), inception=(None, ""), lpips=(None, ""), save=None):
    """Measure one run over its whole evaluation split; write evaluation.json and reconstructions.png.

    Args:
        choices: EvaluationConfig.
        inception: InceptionFeatures or None, and the reason for None; lpips: LPIPS likewise.
        save: folder for the images, or None.
    Returns:
        Evaluation; None in all processes of torchrun but the first.
    """
    device = pick_device(choices.device)
    model, config, prior, step = load_run(path, device, choices.checkpoint)
    as_trained = dataclasses.asdict(config)
    config.data, config.labels = (choices.data, "") if choices.data else (config.data, config.labels)
    config.skip_broken = choices.skip_broken or config.skip_broken
    dataset = make_dataset(config, "val")
    baseline = mean_image(make_dataset(config, "train", check=config.skip_broken), device)
    network, perceptual = (part and part.to(device) for part in (inception[0], lpips[0]))
    scores, indices, features = reconstruct(model, dataset, device, config.batch_size, baseline, network, perceptual, save)
    if rank():
        return None
    pairs = reconstructed_pairs(model, dataset, device, config.batch_size)
    by_codebook = [part.numpy() for part in model.by_codebook(torch.from_numpy(indices))]
    usage = code_usage(by_codebook, model.codebook.sizes)
    result = {
        "run": str(path),
        "method": config.method,
        "dataset": config.dataset,
        "split": "val",
        "checkpoint": choices.checkpoint,
        "step": step,
        "seed": config.seed,
        "resolution": config.resolution,
        "images": len(dataset),
        "lpips": None,
        **{name: float(values.mean()) for name, values in scores.items()},
        "fid": None if network is None else fid(*features),
        "fid_note": inception[1] or f"Inception-v3 pool3 (pt_inception-2015-12-05), {len(dataset):,} images at {config.resolution}²",
        "lpips_note": lpips[1] or "LPIPS v0.1, SqueezeNet",
        **code_statistics([codebook.counts for codebook in usage], len(dataset)),
        "alignment": alignment(by_codebook, prior, model.codebook.sizes, dataset),
        "config": as_trained,
    }
    with whole_file(Path(path) / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    draw_pairs(pairs, Path(path) / "reconstructions.png")
    if choices.figures:
        draw_figures(Path(path), model, prior, dataset, by_codebook, usage, f"{Path(path).name}, step {step:,}")
    return Evaluation(result, usage, pairs)


# ---------------------------------------------------------------------------------------------
# Do the codes mean what their words say? (the paper's Fig. 7, measured)


def alignment(indices, prior, sizes, dataset):
    """Codes against captions, where there are any, and against label maps, where there are any.

    Args:
        indices: list of (N, n, h, w) arrays, one for each codebook.
    Returns:
        dict: "captions" → part of speech → against what → ratio, p and images; "information" → codebook → what → bits,
        chance and entropy (see `mutual_information`); what is not known is left out.
    """
    found, dataset.with_segmentation = {}, True
    with_captions = [index for index in range(len(dataset)) if next(iter(dataset.captions_of(index)), None)] if prior else []
    if with_captions:
        found["captions"] = caption_alignment(indices, prior, sizes, dataset, with_captions)
    truth = position_labels(dataset, indices[0].shape[-2:])
    if truth:
        found["information"] = {
            name: {what: mutual_information(codes[:, 0][labels >= 0], labels[labels >= 0]) for what, labels in truth.items()}
            for name, codes in zip(codebook_names(sizes), indices)
        }
    return found


def words_said(dataset, index, speech):
    """The (part of speech, word) pairs of an image's captions; regular plurals as their noun."""
    return {(token.part, token.lemma) for caption in dataset.captions_of(index) for sentence in speech(caption) for token in sentence}


def caption_alignment(indices, prior, sizes, dataset, chosen, permutations=999):
    """How much more often the words of an image's codes occur in its captions than by chance.

    Counted are, over images and tokens, the tokens whose word the image's captions say. "all": against
    words dealt at random to the codes of a part of speech. If often used codes bear frequent words, that
    alone exceeds chance, so "beyond frequency" counts against what the frequencies of codes and words
    would give, and permutes the words over counts whose means over images are taken away.

    Args:
        chosen: images that have captions.
    Returns:
        dict part → "all" and "beyond frequency" → {"ratio": to chance, "p": share of permutations at least
        as large, the observed one included, "images": how many}.
    """
    words = {part: list(map(str, prior[f"{part}_words"])) for part in PARTS}
    speech, first_noun = WordListSpeech(*words.values()), len(words["adjective"])
    said = [words_said(dataset, index, speech) for index in chosen]
    shifted = np.concatenate([codes[chosen].reshape(len(chosen), -1) + first for codes, first in zip(indices, (0, sizes[0]))], axis=1)
    tokens = np.stack([np.bincount(row, minlength=sum(sizes)) for row in shifted]).astype(np.float32)  # (images, codes)
    found, rng = {}, np.random.default_rng(0)
    for part, counts in zip(PARTS, np.split(tokens, [first_noun], axis=1)):
        spoken = np.array([[(part, word) in pairs for word in words[part]] for pairs in said], np.float32)
        along, found[part], observed = np.arange(len(words[part])), {}, (counts * spoken).sum()
        for name, a, b, chance in (
            ("all", counts, spoken, (counts.sum(1) * spoken.sum(1)).sum() / len(along)),
            ("beyond frequency", counts - counts.mean(0), spoken - spoken.mean(0), (counts.sum(0) * spoken.mean(0)).sum()),
        ):
            together = a.T @ b  # (K, K) of code and word
            dealt = np.array([together[along, rng.permutation(along)].sum() for _ in range(permutations)])
            p = (1 + (dealt >= np.trace(together)).sum()) / (1 + permutations)
            known = {"ratio": float(observed / chance), "p": float(p)} if chance else {"ratio": None, "p": 1.0}  # no code's word is said
            found[part][name] = {**known, "images": len(chosen)}
    return found


def position_labels(dataset, grid):
    """What is known of each token position → dict name → (N, h, w) int64, −1 unknown: the commonest label of its pixels."""
    if dataset[0].get("segmentation") is None:
        return {}
    labels, colours = [], []
    for index in range(len(dataset)):
        cells = dataset[index]["segmentation"].unfold(0, dataset.resolution // grid[0], dataset.resolution // grid[0])
        labels.append(cells.unfold(1, dataset.resolution // grid[1], dataset.resolution // grid[1]).flatten(2).mode(-1).values.numpy())
        labels[-1][labels[-1] == dataset.unlabeled] = -1
        if hasattr(dataset, "colours_of"):
            colours.append(dataset.colours_of(index)[labels[-1]])
    return {"part": np.stack(labels), **({"colour": np.stack(colours)} if colours else {})}


def mutual_information(codes, labels, permutations=20):
    """I(code; label) of two equally long integer arrays.

    Returns:
        dict, bits: "bits", "chance": its mean when labels are dealt at random to the same codes, which is
        the estimate's bias, and "entropy" of the labels, the most it could be.
    """

    def entropy(values):
        share = np.unique(values, return_counts=True)[1] / len(values)
        return float(-(share * np.log2(share)).sum())

    rng, width = np.random.default_rng(0), int(labels.max()) + 1
    codes, alone = codes.astype(np.int64), entropy(codes) + entropy(labels)
    chance = np.mean([alone - entropy(codes * width + rng.permutation(labels)) for _ in range(permutations)])
    return {"bits": alone - entropy(codes * width + labels), "chance": float(chance), "entropy": entropy(labels)}


# ---------------------------------------------------------------------------------------------
# Tables


SAME_RUN = ("seed", "out", "device", "workers", "log_every", "eval_every", "eval_images")  # what may differ within a row


def rows_of(results):
    """Results → list of (name, results that differ by their seed only)."""
    groups = {}
    for result in results:
        choices = {name: value for name, value in result["config"].items() if name not in SAME_RUN}
        groups.setdefault(json.dumps([choices, result["step"], result["checkpoint"]]), []).append(result)
    return [(group[0]["run"] + (f" ({len(group)} seeds)" if len(group) > 1 else ""), group) for group in groups.values()]


def spread(values, form):
    """Mean of numbers, ± their standard deviation where there are several; a dash for None."""
    if None in values:
        return "–"
    return form.format(np.mean(values)) + (f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else "")


COLUMNS = {  # in the paper's order, then ours
    "FID ↓": ("fid", "{:.2f}"),
    "PSNR ↑": ("psnr", "{:.2f}"),
    "ℓ1 ↓": ("l1", "{:.4f}"),
    "ℓ2 ↓": ("l2", "{:.4f}"),
    "SSIM ↑": ("ssim", "{:.4f}"),
    "LPIPS ↓": ("lpips", "{:.4f}"),
    "codes used": ("codes_used", "{:.0f}"),
    "usage": ("usage", "{:.1%}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "bits/image": ("bits", "{:.0f}"),
    "entropy bits": ("bits_entropy", "{:.0f}"),
}


def markdown(results):
    """Results → a table, a row for each group of seeds; columns by codebook are joined by a plus."""
    table = [["run", *COLUMNS]]
    for name, group in rows_of(results):
        row = [name]
        for column, form in COLUMNS.values():
            if isinstance(group[0][column], dict):
                ends = {part: f"/{size} {part}s" if column == "codes_used" else "" for part, size in group[0]["codes"].items()}
                row.append(" + ".join(spread([result[column][part] for result in group], form) + end for part, end in ends.items()))
            else:
                row.append(spread([result[column] for result in group], form))
        table.append(row)
    return as_markdown(table)


def alignment_table(results):
    """Results → a table of what codes have to do with captions and labels; "" where nothing is known."""
    rows, columns = {}, {}
    for name, group in rows_of(results):
        known = [result["alignment"] for result in group]
        for part, kinds in known[0].get("captions", {}).items():
            for kind in kinds:
                found = [alignment["captions"][part][kind] for alignment in known]
                p = ", ".join(f"{each['p']:.3f}" for each in found)
                cell = f"{spread([each['ratio'] for each in found], '{:.2f}')} × (p {p})"
                rows.setdefault((name, part), {})[columns.setdefault(kind, f"words said in captions, {kind}")] = cell
        for part, labels in known[0].get("information", {}).items():
            for label in labels:
                found = [alignment["information"][part][label] for alignment in known]
                bits, chance = (spread([each[column] for each in found], "{:.3f}") for column in ("bits", "chance"))
                cell = f"{bits} of {found[0]['entropy']:.2f} bits (chance {chance})"
                rows.setdefault((name, part), {})[columns.setdefault(label, f"information on {label}")] = cell
    table = [["run", "codes", *columns.values()]]
    table += [[*key, *(cells.get(column, "–") for column in columns.values())] for key, cells in rows.items()]
    return as_markdown(table) if rows else ""


def as_markdown(table):
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------
# What people look at


INK = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#475569")


def blank(width, height):
    """→ a white image and its pen."""
    image = Image.new("RGB", (int(width), int(height)), "white")
    return image, ImageDraw.Draw(image)


def picture(x, size):
    """(3, H, W) in [-1, 1] → a square PIL image of `size` pixels."""
    return TF.to_pil_image(to_bytes(x)).resize((size, size), Image.Resampling.LANCZOS if size < x.shape[-1] else Image.Resampling.NEAREST)


class Axes:
    """A frame with ticks inside a drawing, linear or logarithmic in x and y.

    Args:
        box: (left, top, right, bottom) pixels of the frame; x, y: (low, high) ranges.
        title, labels: text above the frame; of the x and the y axis.
        log: which of x and y are logarithmic.
    """

    def __init__(self, draw, box, x, y, title, labels, log=(False, False)):
        self.box, self.log = box, log
        left, top, right, bottom = box
        draw.rectangle(box, outline="#94a3b8")
        draw.text((left, top - 28), title, "black", FONT)
        draw.text(((left + right) / 2, bottom + 32), labels[0], "black", SMALL, anchor="mm")
        draw.text((left - 8, top - 8), labels[1], "black", SMALL, anchor="rm")
        scaled = [tuple(map(math.log10, ends)) if logarithmic else ends for ends, logarithmic in zip((x, y), log)]
        self.ranges = [(low, max(high - low, 1e-9)) for low, high in scaled]
        for axis, ((low, span), logarithmic) in enumerate(zip(self.ranges, log)):
            unit = 10 ** math.floor(math.log10(span))
            step = 1 if logarithmic else next(part * unit for part in (0.1, 0.2, 0.5, 1, 2) if span <= 6 * part * unit)
            for tick in np.arange(math.ceil(low / step - 1e-9), math.floor((low + span) / step + 1e-9) + 1) * step:
                value = 10**tick if logarithmic else tick
                px, py = self.at(value, y[0]) if axis == 0 else self.at(x[0], value)
                draw.line((px, py, px, py - 5) if axis == 0 else (px, py, px + 5, py), "#94a3b8")
                label = (px, py + 12) if axis == 0 else (px - 8, py)
                draw.text(label, f"{value:,.6g}", "black", SMALL, anchor="mm" if axis == 0 else "rm")

    def at(self, x, y):
        """Data → pixels."""
        left, top, right, bottom = self.box
        (x_low, x_span), (y_low, y_span) = self.ranges
        x, y = (math.log10(max(v, 1e-12)) if log else v for v, log in zip((x, y), self.log))
        return left + (x - x_low) / x_span * (right - left), bottom - (y - y_low) / y_span * (bottom - top)


def draw_figures(path, model, prior, dataset, indices, usage, title):
    """Fig. 3 and 5 to 7 of one run into its folder `figures`."""
    folder, names = path / "figures", codebook_names(usage)
    words = code_words(prior, model.codebook.sizes)
    draw_usage([(title, usage)], folder / "fig5_usage.png")
    start = list(load_arrays(path / "codebook_start.npz", names, "codebook at step 0", "python train.py").values())
    end = [codes.detach().float().cpu().numpy() for codes in model.codebook()]
    draw_similarity(start, end, usage, words, names, title, folder / "fig6_similarity.png")
    speech = WordListSpeech(*(map(str, prior[f"{part}_words"]) for part in PARTS)) if prior else None
    draw_regions(dataset, indices, words, speech, title, folder / "fig7_regions.png")
    draw_patches(dataset, indices, usage, words, names, title, folder / "fig7_words.png")
    if prior is not None and len(prior["edges"]):
        draw_toy(prior, folder / "fig3_toy")


def draw_toy(prior, path, steps=80, seed=0):
    """Fig. 3: a 2-d codebook in which one code is pulled to one feature, by VQ-VAE and by VQCT.

    A toy of a run's prior, not of its weights. Both systems start from the same codes. No last ReLU,
    so that codes fill the plane. Writes path.png, the whole way, and path.gif.
    """
    names, vectors, edges = toy_graph(prior)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transfer = CodebookTransfer((vectors.shape[1], 64, 64, 2), NormalizedAdjacency(edges, len(names)), last_relu=False)
        generated = Codebook(rescale(vectors, "standard"), (len(names),), transfer=transfer)
    start = generated()[0].detach()
    away = start - start.mean(0)
    far = away.norm(dim=1)
    if far.max() < 1e-6:
        return  # so few edges that Â makes all codes equal
    feature = start.mean(0) + 1.4 * far.max() * F.normalize(away[far.argsort()[len(far) // 2]], dim=0)
    followed = nearest_code(feature[None], start).item()
    rate = 1.5 * (feature - start[followed]).norm().item() / steps
    ways = {
        "VQ-VAE: each code is a parameter": pull(Codebook(start, (len(names),), trained=True), feature, rate, steps),
        "VQCT: one network makes all codes": pull(generated, feature, 5e-4, steps),
    }
    frames = [toy_frame(ways, feature.numpy(), names, followed, step) for step in (*range(0, steps - 1, 2), steps - 1)]
    save_png(frames[-1], path.with_suffix(".png"))
    with whole_file(path.with_suffix(".gif")) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)


def toy_graph(prior, words=6):
    """The prior's most connected adjective, some nouns that it modifies and adjectives of those → names, vectors (N, d), edges."""
    edges = np.asarray(prior["edges"])
    hub = np.bincount(edges[:, 0]).argmax()
    nouns = edges[edges[:, 0] == hub, 1]
    nouns = nouns[evenly(len(nouns), words)].tolist()
    adjectives = np.unique(edges[np.isin(edges[:, 1], nouns), 0])
    adjectives = sorted({hub, *adjectives[evenly(len(adjectives), words - 1)]})
    chosen = list(zip(PARTS, (adjectives, nouns)))
    names = [str(prior[f"{part}_words"][i]) for part, nodes in chosen for i in nodes]
    vectors = torch.cat([torch.as_tensor(prior[f"{part}_vectors"])[nodes] for part, nodes in chosen]).float()
    kept = [(adjectives.index(a), len(adjectives) + nouns.index(n)) for a, n in edges.tolist() if a in adjectives and n in nouns]
    return names, vectors, kept


def pull(codebook, feature, lr, steps):
    """Each step takes Eq. 1's code nearest to one feature and descends Eq. 2's codebook term by Adam → (steps, N, D) codes before each."""
    optimizer, way = torch.optim.Adam(codebook.parameters(), lr=lr), []
    for _ in range(steps):
        (codes,) = codebook()
        way.append(codes.detach().numpy().copy())
        loss = VectorQuantizer(beta=0.0)(feature.view(1, -1, 1, 1), codes)[2]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return np.stack(way)


def toy_frame(ways, feature, names, followed, step, size=560):
    """One moment of Fig. 3."""
    image, draw = blank(2 * size, size + 40)
    points = np.concatenate([way.reshape(-1, 2) for way in ways.values()] + [feature[None]])
    low, high = points.min(0), points.max(0)
    low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
    for panel, (title, way) in enumerate(ways.items()):
        box, taken = (panel * size + 60, 50, (panel + 1) * size - 40, size - 50), []
        axes = Axes(draw, box, (low[0], high[0]), (low[1], high[1]), f"{title}, step {step + 1}", ("first dimension", "second"))
        for code in sorted(range(len(names)), key=lambda code: code != followed):
            colour = INK[1] if code == followed else INK[0]
            trail = [axes.at(*point) for point in way[: step + 1, code]]
            (x0, y0), (x, y) = trail[0], trail[-1]
            draw.line([*trail, trail[-1]], colour, 2)
            draw.ellipse((x0 - 4, y0 - 4, x0 + 4, y0 + 4), outline=colour)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
            write_free(draw, (x, y), names[code], colour, taken)
        x, y = axes.at(*feature)
        draw.line((x - 7, y - 7, x + 7, y + 7), "black", 3), draw.line((x - 7, y + 7, x + 7, y - 7), "black", 3)
        moved = int((np.abs(way[step] - way[0]).max(1) > 0).sum())
        draw.text((box[0], size + 8), f"{moved} of {len(names)} codes have moved (circles: start, cross: the feature)", "black", FONT)
    return image


def draw_comparison(rows, path, columns=8, size=128):
    """Fig. 4: originals, and below them what each run makes of them. rows: list of (name, images (3, H, W) in [-1, 1])."""
    image, draw = blank(190 + columns * (size + 4), len(rows) * (size + 4))
    for row, (name, images) in enumerate(rows):
        label = "\n".join(part for line in name.split("\n") for part in textwrap.wrap(line, 24))
        draw.multiline_text((8, row * (size + 4) + size / 2), label, "black", FONT, anchor="lm")
        for column, x in enumerate(images[:columns]):
            image.paste(picture(x, size), (190 + column * (size + 4), row * (size + 4)))
    save_png(image, path)


def draw_usage(rows, path, width=430, height=200):
    """Fig. 5: how often each code was chosen, most used first, and codes used against positions seen.

    Shares of unequal codebooks over unequal sets mislead, so the last panel counts codes, on the same axes for every run.

    Args:
        rows: list of (title, list of Usage), a row of panels each.
    """
    panels = max(len(usage) for _, usage in rows)
    image, draw = blank((panels + 1) * width + 20, len(rows) * (height + 130))
    seen = max(codebook.positions for _, usage in rows for codebook in usage)
    most = max(len(codebook.growth) for _, usage in rows for codebook in usage)
    for row, (title, usage) in enumerate(rows):
        top = row * (height + 130) + 62
        draw.text((12, top - 56), title, "black", BOLD)
        right = Axes(
            draw,
            (panels * width + 70, top, (panels + 1) * width - 10, top + height),
            (1, seen),
            (0, most * 1.05),
            "codes used so far",
            ("positions seen", ""),
            (True, False),
        )
        for column, (name, codebook) in enumerate(zip(codebook_names(usage), usage)):
            ranked, colour = np.sort(codebook.counts)[::-1], INK[column]
            used = f"{len(codebook.growth):,} of {len(ranked):,} {name}s used ({100 * len(codebook.growth) / len(ranked):.1f} %)"
            box = (column * width + 70, top, (column + 1) * width - 10, top + height)
            axes = Axes(draw, box, (0, len(ranked)), (0.8, ranked[0] * 1.3), used, (f"{name}s, most used first", "times"), (False, True))
            for pixel in range(box[0] + 1, box[2]):
                times = ranked[int((pixel - box[0]) / (box[2] - box[0]) * len(ranked))]
                if times:
                    draw.line((pixel, axes.at(0, times)[1], pixel, box[3] - 1), colour)
            steps = [(x, y) for i, first in enumerate(codebook.growth) for x, y in ((first, i), (first, i + 1))]
            draw.line([right.at(*point) for point in [*steps, (codebook.positions, len(codebook.growth))]], colour, 2)
            draw.text((right.box[0] + 10, top + 10 + 18 * column), f"{name}s: {len(codebook.growth):,}", colour, SMALL)
    save_png(image, path)


def cosines(codes):
    """(N, D) → (N, N) cosine similarities; a zero code is unlike everything."""
    unit = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def draw_similarity(start, end, usage, words, names, title, path, codes=10, cell=46):
    """Fig. 6: cosine similarity of ten codes in use, drawn at random, at the start and at the end of training.

    Under each codebook: the correlation of start and end over all pairs of codes in use (at most 1,000 codes).
    """
    side = codes * cell
    image, draw = blank(2 * (side + 150), len(names) * (side + 90) + 30)
    draw.text((12, 8), title, "black", BOLD)
    for row, name in enumerate(names):
        used = np.flatnonzero(usage[row].counts)
        rng = np.random.default_rng(0)
        chosen, many = np.sort(rng.permutation(used)[:codes]), np.sort(rng.permutation(used)[:1000])
        top = 70 + row * (side + 90)
        for column, (when, table) in enumerate((("at the start", start[row]), ("at the end", end[row]))):
            left, similarity = 130 + column * (side + 150), cosines(table[chosen])
            draw.text((left, top - 24), f"{name}s {when}", "black", FONT)
            for i, j in np.ndindex(similarity.shape):
                value = similarity[i, j]
                fade = int(255 - 175 * min(abs(value), 1))
                x, y = left + j * cell, top + i * cell
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), (255, fade, fade) if value > 0 else (fade, fade, 255))
                draw.text((x + cell / 2, y + cell / 2), f"{value:.2f}", "black", SMALL, anchor="mm")
            for i, code in enumerate(chosen):
                draw.text((left - 6, top + (i + 0.5) * cell), str(words[row][code])[:15], "black", SMALL, anchor="rm")
        pairs = np.triu_indices(len(many), 1)
        before, after = (cosines(table[many])[pairs] for table in (start[row], end[row]))
        kept = np.corrcoef(before, after)[0, 1] if len(before) > 1 and before.std() > 0 and after.std() > 0 else float("nan")
        draw.text(
            (12, top + side + 6), f"correlation of start and end over all pairs of {len(many):,} {name}s in use: {kept:.2f}", "black", FONT
        )
    save_png(image, path)


def draw_regions(dataset, indices, words, speech, title, path, images=8, size=288):
    """Fig. 7: five regions of images and the words of their codes, in green where a caption of the image says the word."""
    chosen = evenly(len(dataset), images)
    image, draw = blank(4 * (size + 12), math.ceil(len(chosen) / 4) * (size + 118) + 34)
    draw.text((12, 6), f"{title}: regions and the words of their codes (green: said in the image's captions)", "black", BOLD)
    height, width = indices[0].shape[-2:]
    for place, index in enumerate(chosen):
        left, top = 6 + place % 4 * (size + 12), 34 + place // 4 * (size + 118)
        image.paste(picture(to_images(dataset[index]["image"], torch.device("cpu")), size), (left, top))
        said = {word for _, word in words_said(dataset, index, speech)} if speech else ()
        for number, (row, column) in enumerate(((1, 1), (1, 3), (2, 2), (3, 1), (3, 3)), 1):
            row, column = min(row * height // 4, height - 1), min(column * width // 4, width - 1)
            x, y, cell = left + column * size / width, top + row * size / height, size / width
            draw.rectangle((x, y, x + cell, y + cell), outline="white", width=2)
            draw.text((x + cell / 2, y + cell / 2), str(number), "white", BOLD, anchor="mm", stroke_width=2, stroke_fill="black")
            at, line = left, top + size + 4 + 20 * (number - 1)
            for word in [f"{number}:", *(str(names[i]) for names, codes in zip(words, indices) for i in codes[index, :, row, column])]:
                draw.text((at, line), word, "#15803d" if word in said else "black", FONT)
                at += draw.textlength(word + " ", FONT)
    save_png(image, path)


def draw_patches(dataset, indices, usage, words, names, title, path, count=10, patches=14, size=72):
    """Fig. 7 the other way: for the most used words, patches that chose them, with a margin of one cell around the cell itself."""
    image, draw = blank(150 + patches * (size + 3), len(names) * (count * (size + 3) + 34) + 34)
    draw.text((12, 6), f"{title}: patches that chose a word", "black", BOLD)
    top = 34
    for name, codes, codebook, listed in zip(names, indices, usage, words):
        draw.text((12, top + 8), f"most used {name}s", "black", FONT)
        top += 34
        for code in np.argsort(-codebook.counts, kind="stable")[: min(count, len(codebook.growth))]:
            places = np.argwhere((codes == code).any(1))
            draw.text((8, top + size / 2), f"{str(listed[code])[:17]}\n{codebook.counts[code]:,} times", "black", SMALL, anchor="lm")
            for column, at in enumerate(evenly(len(places), patches)):
                index, row, side = places[at]
                x, cell = dataset[int(index)]["image"], dataset.resolution // codes.shape[-1]
                patch = F.pad(x, (cell,) * 4, value=255)[:, row * cell : (row + 3) * cell, side * cell : (side + 3) * cell]
                patch = TF.to_pil_image(patch).resize((size, size), Image.Resampling.BICUBIC)
                ImageDraw.Draw(patch).rectangle((size / 3, size / 3, 2 * size / 3, 2 * size / 3), outline="white")
                image.paste(patch, (150 + column * (size + 3), top))
            top += size + 3
    save_png(image, path)


def draw_rate_distortion(results, path, size=(1000, 640)):
    """Bits an image against PSNR, a pair of points for each run: filled for an ideal code of the frequencies, open for log2 K a token."""
    image, draw = blank(*size)
    points = np.array([[(result[bits], result["psnr"]) for bits in ("bits_entropy", "bits")] for result in results])
    low, high = points.min((0, 1)), points.max((0, 1))
    low, high = low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01
    title = "rate and distortion (filled: entropy of the codes; open: fixed length)"
    axes = Axes(draw, (80, 50, size[0] - 60, size[1] - 60), (low[0], high[0]), (low[1], high[1]), title, ("bits per image", "PSNR, dB"))
    taken = []
    for (name, group), colour in zip(rows_of(results), INK * len(results)):
        for result in group:
            (x, y), (right, _) = axes.at(result["bits_entropy"], result["psnr"]), axes.at(result["bits"], result["psnr"])
            draw.line((x, y, right, y), "#e2e8f0", 1)
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
            draw.ellipse((right - 5, y - 5, right + 5, y + 5), "white", colour, 2)
        write_free(draw, (x, y), Path(name).name, colour, taken)
    save_png(image, path)


def compare(evaluations, folder):
    """Fig. 4 and 5, the rate–distortion picture and the table of several runs, into a folder."""
    names = short_names([evaluation.result["run"] for evaluation in evaluations])
    originals = [("originals", evaluations[0].pairs[0::2])]
    rows = [(f"{name}\n{e.result['psnr']:.2f} dB", e.pairs[1::2]) for name, e in zip(names, evaluations)]
    draw_comparison(originals + rows, folder / "fig4_reconstructions.png")
    draw_usage([(name, e.usage) for name, e in zip(names, evaluations)], folder / "fig5_usage.png")
    results = [{**e.result, "run": name} for name, e in zip(names, evaluations)]
    draw_rate_distortion(results, folder / "rate_distortion.png")
    with whole_file(folder / "table.md") as temporary:
        temporary.write_text(f"{markdown(results)}\n\n{alignment_table(results)}\n", encoding="utf-8")
    print(f"{folder}: table.md, fig4_reconstructions.png, fig5_usage.png, rate_distortion.png")


def short_names(paths):
    """Run folders without what they all begin with, as labels."""
    names = [Path(path).name for path in paths]
    common = os.path.commonprefix(names)
    return [name[common.rfind("-") + 1 :] for name in names]


def parse(argv):
    """Command line → run folders, EvaluationConfig."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    add_flags(parser, EvaluationConfig())
    args = parser.parse_args(argv)
    return args.runs, EvaluationConfig(**take_flags(EvaluationConfig, vars(args)))


def load_perceptual(trunk_weights="", lpips_weights=""):
    """LPIPS on SqueezeNet, or the reason why not. A path that was given and does not work is an error."""
    config = Config(perceptual_trunk="squeeze", trunk_weights=trunk_weights, lpips_weights=lpips_weights)
    try:
        return load_lpips(config), ""
    except UserError as error:
        if trunk_weights or lpips_weights:
            raise
        return None, str(error)


def report(results, inception, lpips):
    """Print the tables, and what is to be said of their columns."""
    print(f"\n{markdown(results)}")
    for dataset, images, score in sorted({(r["dataset"], r["images"], f"{r['baseline_psnr']:.2f}") for r in results}):
        print(f"\n{dataset}: {images:,} evaluation images; predicting the mean training image gives {score} dB")
    if alignment_table(results):
        print(f"\n{alignment_table(results)}")
    print(f"\nFID: – ({inception[1]})" if inception[1] else f"\nFID: {results[0]['fid_note']}")
    print(f"LPIPS: – ({lpips[1]})" if lpips[1] else f"LPIPS: {results[0]['lpips_note']}")
    small = min(result["images"] for result in results)
    if inception[0] is not None and small < FID_IMAGES:
        print(f"FID over {small:,} images is biased upward; compare it only with others over the same images (2,048 or more are usual)")


def main(argv=None):
    """Reconstruct each run's evaluation split, measure, draw; then one table of all."""
    with torchrun():
        paths, choices = parse(argv)
        for path in paths:
            if not (Path(path) / f"{choices.checkpoint}.pt").is_file():
                raise UserError(f"'{path}' is not a run of train.py: it has no {choices.checkpoint}.pt")
        pick_device(choices.device)  # an error now, not after a download
        with first_process_first():  # which downloads what is missing
            inception, lpips = load_inception(choices.inception), load_perceptual(choices.trunk_weights, choices.lpips_weights)
        evaluations = []
        for path in paths:
            save = choices.save and (Path(choices.save) / Path(path).resolve().name if len(paths) > 1 else Path(choices.save))
            evaluations.append(evaluate(path, choices, inception, lpips, save or None))
            print(f"{path}: evaluation.json, reconstructions.png{', figures/' * choices.figures}{f'; images in {save}' * bool(save)}")
        if not rank():
            results = [evaluation.result for evaluation in evaluations]
            alike = len({(r["dataset"], r["config"]["data"], r["resolution"], r["images"]) for r in results}) == 1
            if choices.figures and len(results) > 1 and alike:
                compare(evaluations, Path(paths[0]).parent / "comparison")
            report(results, inception, lpips)


if __name__ == "__main__":
    command(main)
