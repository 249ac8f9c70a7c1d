"""Measure how runs reconstruct the evaluation split (paper Tables 1 to 5, Fig. 4 and 5).

    python evaluate.py runs/demo-vqct
    python evaluate.py runs/cub-vqct runs/cub-vqgan --data CUB_200_2011 --figures
    python evaluate.py runs/cub-vqct --inception pt_inception-2015-12-05-6726825d.pth --save out

Prints a Markdown table and writes evaluation.json and reconstructions.png into each run. ℓ1 and ℓ2
are on [-1, 1] images as the decoder leaves them; PSNR and SSIM on images clamped to that range, each
averaged over images; FID on images rounded to 8 bits, against the same split.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont

from prior import Progress, UserError, command, whole_file
from train import codebook_names, draw_pairs, evenly, load_run, load_weights, make_dataset, make_loader, pick_device, psnr, to_images

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
FID_IMAGES = 2048  # fewer images than feature dimensions make FID large and incomparable

# ---------------------------------------------------------------------------------------------
# Metrics


def ssim(x, y):
    """Structural similarity of each image (Wang et al. 2004): 11×11 Gaussian window of σ 1.5, data range 2.

    Args:
        x, y: (B, 3, H, W) in [-1, 1], at least 11 pixels a side; clamped to that range.
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
        state = load_weights(INCEPTION_URL, path, "Inception weights for FID", "--inception")
        return InceptionFeatures(state), ""
    except (UserError, RuntimeError) as error:
        if path:
            raise UserError(f"--inception {path}: not the FID weights: {str(error).splitlines()[0]}") from None
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
def reconstruct(model, dataset, device, batch_size, baseline, inception=None, save=None):
    """Every image of a dataset through a model in evaluation mode.

    Returns:
        scores: dict of (N,) arrays psnr, l1, l2, ssim, baseline_psnr; counts: (K,) arrays, how often
        each code of each codebook was chosen; features: originals' and reconstructions', (N, 2048)
        or empty lists; pairs: sixteen originals and reconstructions in turn.
    """
    scores = {name: [] for name in ("psnr", "l1", "l2", "ssim", "baseline_psnr")}
    counts = [torch.zeros(size, dtype=torch.int64, device=device) for size in model.codebook.sizes]
    features, pairs, done, progress = ([], []), [], 0, Progress()
    shown = set(evenly(len(dataset), 16))
    for batch in make_loader(dataset, device, -1, batch_size=batch_size):
        x = to_images(batch["image"], device)
        output = model(x)
        x_hat = output.x_hat.float()
        for name, value in (
            ("psnr", psnr(x_hat, x)),
            ("l1", (x_hat - x).abs().mean(dim=(1, 2, 3))),
            ("l2", (x_hat - x).square().mean(dim=(1, 2, 3))),
            ("ssim", ssim(x_hat, x)),
            ("baseline_psnr", psnr(baseline.expand_as(x), x)),
        ):
            scores[name].append(value)
        for total, indices in zip(counts, model.by_codebook(output.indices)):
            total += torch.bincount(indices.flatten(), minlength=len(total))
        eight_bits = batch["image"].to(device), to_bytes(x_hat)
        if inception is not None:
            for kept, images in zip(features, eight_bits):
                kept.append(inception(images).cpu().double())
        if save is not None:
            save_images(save, batch["index"].tolist(), eight_bits)
        for row in (row for row, index in enumerate(batch["index"].tolist()) if index in shown):
            pairs += [x[row].cpu(), x_hat[row].cpu()]
        done += len(x)
        progress(f"reconstructing: {done:,}/{len(dataset):,} images")
    scores = {name: torch.cat(values).cpu().double().numpy() for name, values in scores.items()}
    return scores, [total.cpu().numpy() for total in counts], [torch.cat(kept).numpy() if kept else kept for kept in features], pairs


def save_images(folder, indices, images):
    """PNG files of the same names under originals/ and reconstructions/."""
    for name, batch in zip(("originals", "reconstructions"), images):
        for index, image in zip(indices, batch.cpu()):
            with whole_file(Path(folder) / name / f"{index:06d}.png") as temporary:
                TF.to_pil_image(image).save(temporary, "PNG")


def code_statistics(counts, positions):
    """Use of codebooks from how often each code was chosen.

    Args:
        counts: list of (K,) arrays over the whole split; positions: tokens of an image.
    Returns:
        dict: usage, codes_used, codes and perplexity by codebook; bits and bits_entropy an image,
        with a fixed-length code (log2 K a token) and with an ideal one for the empirical frequencies.
    """
    statistics = {name: {} for name in ("usage", "codes_used", "codes", "perplexity")}
    statistics.update(bits=0.0, bits_entropy=0.0)
    for name, count in zip(codebook_names(counts), counts):
        share = count[count > 0] / count.sum()
        entropy = float(-(share * np.log2(share)).sum())
        statistics["codes_used"][name], statistics["codes"][name] = int((count > 0).sum()), len(count)
        statistics["usage"][name], statistics["perplexity"][name] = float((count > 0).mean()), 2.0**entropy
        statistics["bits"] += positions * math.log2(len(count))
        statistics["bits_entropy"] += positions * entropy
    return statistics


def evaluate(path, data="", device="auto", inception=(None, ""), save=None, checkpoint="last", figures=False):
    """Measure one run over its whole evaluation split; write evaluation.json and reconstructions.png.

    Args:
        inception: InceptionFeatures or None, and the reason for None.
    Returns:
        dict as in evaluation.json.
    """
    device = pick_device(device)
    model, config, _, step = load_run(path, device, checkpoint)
    config.data, config.labels = data or config.data, ""
    dataset = make_dataset(config, "val")
    baseline = mean_image(make_dataset(config, "train"), device)
    network, reason = inception
    scores, counts, features, pairs = reconstruct(model, dataset, device, config.batch_size, baseline, network and network.to(device), save)
    fid = None
    if network is not None:
        gaussians = [part for kept in features for part in (kept.mean(axis=0), np.cov(kept, rowvar=False))]
        fid = frechet_distance(*gaussians)
    result = {
        "run": str(path),
        "method": config.method,
        "dataset": config.dataset,
        "split": "val",
        "checkpoint": checkpoint,
        "step": step,
        "seed": config.seed,
        "resolution": config.resolution,
        "images": len(dataset),
        **{name: float(values.mean()) for name, values in scores.items()},
        "fid": fid,
        "fid_note": reason or f"Inception-v3 pool3 (pt_inception-2015-12-05), {len(dataset):,} images at {config.resolution}²",
        **code_statistics(counts, model.grid[0] * model.grid[1]),
    }
    with whole_file(Path(path) / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    draw_pairs(pairs, Path(path) / "reconstructions.png")
    if figures:
        draw_usage(counts, codebook_names(counts), Path(path) / "usage.png", f"{config.dataset} {config.method}, step {step:,}")
    return result


# ---------------------------------------------------------------------------------------------
# What people look at


def draw_usage(counts, names, path, title, width=640, height=300):
    """Fig. 5: how often each code of each codebook was chosen, most used first, on a logarithmic scale."""
    image = Image.new("RGB", (width * len(counts), height + 70), "white")
    draw, font, bold = ImageDraw.Draw(image), ImageFont.load_default(14), ImageFont.load_default(17)
    draw.text((12, 8), title, "black", bold)
    for panel, (name, count) in enumerate(zip(names, counts)):
        left, ranked = panel * width + 50, np.sort(count)[::-1]
        top = math.log10(ranked[0] + 1)
        for column in range(width - 70):
            code = column * len(ranked) // (width - 70)
            bar = height * 0.82 * math.log10(ranked[code] + 1) / top
            draw.line((left + column, height + 30, left + column, height + 30 - bar), "#2563eb" if ranked[code] else "white")
        draw.line((left, height + 30, left + width - 70, height + 30), "black")
        for exponent in range(int(top) + 1):
            y = height + 30 - height * 0.82 * math.log10(10**exponent + 1) / top
            draw.text((left - 8, y), f"{10**exponent:,}", "black", font, anchor="rm")
        used = int((count > 0).sum())
        draw.text(
            (left, height + 40),
            f"{name}s by rank: {used:,} of {len(count):,} used ({100 * used / len(count):.1f} %) over {int(count.sum()):,} positions",
            "black",
            font,
        )
    with whole_file(path) as temporary:
        image.save(temporary, "PNG")


def markdown(results):
    """Results → a table, columns as the paper orders them."""
    both = lambda values, form: " + ".join(form.format(value) for value in values.values())
    rows = [
        (
            "run",
            "FID ↓",
            "PSNR ↑",
            "ℓ1 ↓",
            "ℓ2 ↓",
            "SSIM ↑",
            "codes used",
            "usage",
            "perplexity",
            "bits/image",
            "entropy bits",
            "mean image's PSNR",
            "images",
        )
    ]
    for r in results:
        used = " + ".join(f"{r['codes_used'][name]}/{r['codes'][name]} {name}s" for name in r["codes"])
        rows.append(
            (
                r["run"],
                "–" if r["fid"] is None else f"{r['fid']:.2f}",
                f"{r['psnr']:.2f}",
                f"{r['l1']:.4f}",
                f"{r['l2']:.4f}",
                f"{r['ssim']:.4f}",
                used,
                both(r["usage"], "{:.1%}"),
                both(r["perplexity"], "{:.1f}"),
                f"{r['bits']:.0f}",
                f"{r['bits_entropy']:.0f}",
                f"{r['baseline_psnr']:.2f}",
                f"{r['images']:,}",
            )
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(argv=None):
    """Evaluate every run named, then print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--data", default="", help="where the data set lies now (default: where the run found it)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="last step, or best validation PSNR (default: last, as the paper trains to the end)",
    )
    parser.add_argument(
        "--inception",
        default="",
        metavar="FILE",
        help="local copy of FID's weights (default: torch hub's cache, or download; else FID is a dash)",
    )
    parser.add_argument("--figures", action="store_true", help="also draw Fig. 5, usage.png in each run")
    parser.add_argument(
        "--save", default=None, metavar="DIR", help="write DIR/originals/*.png and DIR/reconstructions/*.png (several runs: DIR/<run>/…)"
    )
    args = parser.parse_args(argv)
    for path in args.runs:
        if not (Path(path) / f"{args.checkpoint}.pt").is_file():
            raise UserError(f"'{path}' is not a run of train.py: it has no {args.checkpoint}.pt")
    inception = load_inception(args.inception)
    results = []
    for path in args.runs:
        save = args.save and (Path(args.save) / Path(path).resolve().name if len(args.runs) > 1 else Path(args.save))
        results.append(evaluate(path, args.data, args.device, inception, save, args.checkpoint, args.figures))
        print(f"{path}: evaluation.json, reconstructions.png{', usage.png' if args.figures else ''}{f'; images in {save}' if save else ''}")
    print(f"\n{markdown(results)}")
    print(f"\nFID: – ({inception[1]})" if inception[1] else f"\nFID: {results[0]['fid_note']}")
    small = min(result["images"] for result in results)
    if inception[0] is not None and small < FID_IMAGES:
        print(f"FID over {small:,} images is biased upward; compare it only with others over the same images (2,048 or more are usual)")


if __name__ == "__main__":
    command(main)
