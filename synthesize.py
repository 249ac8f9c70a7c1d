"""The second stage: images as tokens that read as words, and a model that draws them (paper §4.4, Table 6, Fig. 8).

    python synthesize.py runs/demo-vqct train --condition segmentation      a transformer of the run's tokens
    python synthesize.py runs/demo-vqct train --model ldm                   … or a denoiser of its features
    python synthesize.py runs/demo-vqct complete --condition segmentation   keeps the top of images: Fig. 8's grid
    python synthesize.py runs/demo-vqct sample --pin 3,4=red,breast --words     words in their places, the rest drawn
    python synthesize.py runs/demo-vqct runs/demo-vqgan evaluate            Table 6
    python synthesize.py runs/demo-vqct tokens --words 0                    what image 0 reads as; tokens.npz in the run
    python synthesize.py runs/demo-vqct tokens --decode runs/demo-vqct/tokens.npz     and back to images

A token file holds `indices` (N, M, h, w), an adjective and a noun at each position (`--adjective-neighbours`
adjectives, where they are averaged), each codebook's `words`, `labels`, the names of the classes, label maps
where the data set has them, and the checksum of the tokenizer; numpy reads it without pickle. A second stage
lies in its run's folder, `synthesis/<model>-<condition>`.
"""

import contextlib
import copy
import difflib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Metal lacks runs on the CPU; read when torch is imported

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw

from evaluate import as_markdown, draw_comparison, fid, load_inception, to_bytes

# fmt: off
from prior import (SMALL, Parser, Progress, UserError, add_flags, checksum, command, explained, load_arrays, option, save_arrays, save_png,
                   take_flags, whole_file)
from train import (DEVICES, TrainBatches, check_bounds, code_words, codebook_names, evenly, first_process_first, fitting, new_run_folder,
                   load_checkpoint, load_run, make_dataset, make_loader, parallel, pick_device, psnr, rank, resume_run, resumed_config,
                   run_steps, synchronised, to_images, torchrun)
# fmt: on
from vqct import Condition, Denoiser, TokenTransformer, sample_features, sample_tokens

MOST_LABELS = 1 << 12  # of a data set; more is a map of something else than labels, such as depth

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Choices:
    """What every sub-command may be told."""

    data: str = option("", "where the data set lies now, if not where the run found it")
    labels: str = option("", "folder of label maps, of a run with --dataset folder")
    skip_broken: bool = option(False, "leave out images that are missing or cannot be read")
    device: str = option("auto", DEVICES)


@dataclass
class Stage(Choices):
    """Which second stage of a run."""

    model: str = option("gpt", "gpt: a transformer of the tokens; ldm: diffusion of the features before them", choices=("gpt", "ldm"))
    condition: str = option("none", "what a sample is drawn for", choices=("none", "class", "segmentation"))
    joint: bool = option(True, "gpt: a noun is predicted given its adjective; without, the two are independent heads, a control")


@dataclass
class SynthesisConfig(Stage):
    """A second stage. Defaults are for f16 tokenizers on a GPU; TINY changes some for tokenizers of the tiny preset."""

    width: int = option(768, "features of the transformer")
    depth: int = option(12, "blocks of the transformer")
    heads: int = option(12, "attention heads, dividing the width")
    dropout: float = option(0.1, "share of features zeroed in training")
    drop_condition: float = option(0.1, "share of training images without their condition, for classifier-free guidance")
    views: int = option(8, "grids of tokens of each training image: its centre crop and random crops and flips, encoded once")
    steps: int = option(200_000, "optimizer steps")
    batch_size: int = option(32, "images a micro-step")
    accumulate: int = option(1, "micro-steps whose gradients are summed before each optimizer step")
    lr: float = option(3e-4, "AdamW's step size, by a cosine to a tenth of it")
    warmup: int = option(500, "steps over which it rises from 0")
    weight_decay: float = option(0.01, "AdamW's weight decay, of matrices alone")
    ema: float = option(0.9999, "decay of the averaged weights that sample and are evaluated")
    amp: bool = option(True, "bfloat16 autocast on CUDA")
    deterministic: bool = option(False, "on CUDA, only algorithms that repeat themselves bit by bit, as the CPU's do: slower")
    seed: int = option(0, "seed of weights, data order and dropout")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    eval_every: int = option(1_000, "steps between validations and checkpoints")


@dataclass
class Sampling(Choices):
    """How images are drawn."""

    temperature: float = option(1.0, "gpt: divides the logits; 0 takes the likeliest token")
    top_k: int = option(0, "gpt: only so many of the likeliest tokens; 0: all")
    top_p: float = option(1.0, "gpt: the fewest likely tokens with so much probability together")
    guidance: float = option(1.0, "scale of classifier-free guidance; 1: none")
    sampling_steps: int = option(50, "ldm: steps of DDIM")
    seed: int = option(0, "seed of the samples")


@dataclass
class SampleChoices(Sampling, Stage):
    """Which images are drawn."""

    part = ""  # of an image that is known
    count: int = option(8, "images, spread over the evaluation split")
    images: tuple = option((), "… or these, by their number", each=int)
    label: str = option("", "class to draw instead of the images' own")
    repeat: int = option(2, "samples of each")
    pin: tuple = option((), "words in their places, ROW,COLUMN=WORDS: 3,4=red,breast", each=str)
    words: bool = option(False, "print what the samples read as, and write it into a picture of each")
    output: str = option("", "PNG (default: samples.png or completions.png beside the second stage)")


@dataclass
class CompleteChoices(SampleChoices):
    """Which part of them is known."""

    part: str = option("top", "known part of each image, the rest is drawn: top, bottom, left, right, or a PNG's white pixels")


@dataclass
class TableChoices(Sampling):
    """What Table 6 needs."""

    inception: str = option("", "local copy of FID's Inception weights (default: torch hub's cache, or download; else FID is a dash)")


@dataclass
class TokenChoices(Choices):
    """Which images become tokens, or tokens images."""

    split: str = option("val", "images to encode", choices=("train", "val"))
    decode: str = option("", "token file to turn back into images")
    output: str = option("", "token file, or with --decode folder of images (default: in the run)")
    words: tuple = option((), "images to print as words, by their number", each=int)


BOUNDS = (
    ("views steps batch_size accumulate log_every eval_every width depth heads", lambda value: value >= 1, "be at least 1"),
    ("dropout drop_condition ema", lambda value: 0 <= value < 1, "lie in [0, 1)"),
    ("lr", lambda value: value > 0, "be positive"),
    ("warmup weight_decay", lambda value: value >= 0, "not be negative"),
    ("seed", lambda value: 0 <= value < 1 << 62, "lie in [0, 2^62)"),
)
SAMPLING_BOUNDS = (
    ("temperature top_k", lambda value: value >= 0, "not be negative"),
    ("top_p", lambda value: 0 < value <= 1, "lie in (0, 1]"),
    ("sampling_steps count repeat", lambda value: value >= 1, "be at least 1"),
)
TINY = dict(views=1, width=192, depth=4, heads=4, steps=800, lr=1e-3, warmup=50, ema=0.99, eval_every=200)
CHANGEABLE = "data labels skip_broken device steps log_every eval_every deterministic".split()
SUBSAMPLES = 4  # pixels per side of a position at which its label map is kept, enough for shares in sixteenths


# ---------------------------------------------------------------------------------------------
# Tokens


class Tokens(NamedTuple):
    """A data set as the second stage sees it. Each image may have several rows: random crops and flips of it."""

    indices: torch.Tensor  # (N, M, h, w) int64
    labels: torch.Tensor  # (N,) int64, −1: none
    segmentation: torch.Tensor | None  # (N, S h, S w) int16, S² pixels of each position; −1: says nothing
    features: np.ndarray | None = None  # (N, C, h, w) float16 on disk, before quantization


@torch.no_grad()
def encode_dataset(run, dataset, views, path):
    """Every image of a dataset as Tokens: its centre crop, then `views` − 1 random ones. `path` is where features go, if anywhere."""
    model, (height, width), progress = run.model, run.model.grid, Progress()
    keys = [(index, view * len(dataset) + index) if view else index for view in range(views) for index in range(len(dataset))]
    dataset.with_segmentation, done, kept = True, 0, {name: [] for name in ("indices", "labels", "segmentation")}
    stride = max(1, run.config.resolution // height // SUBSAMPLES)
    shape = (len(keys), run.model.code_dim * len(model.codebook.sizes), height, width)
    features = path and np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    if path and hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash when the map is written to
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    for batch in make_loader(dataset, run.device, -1, sampler=keys, batch_size=run.config.batch_size):
        z = model.features(to_images(batch["image"], run.device))
        kept["indices"].append(model.snap(z).cpu())
        kept["labels"].append(batch["label"])
        if "segmentation" in batch:
            maps = batch["segmentation"][:, stride // 2 :: stride, stride // 2 :: stride]
            kept["segmentation"].append(maps.where(maps != dataset.unlabeled, -1).clamp(-1, 2**15 - 1).short())
        if path:
            features[done : done + len(batch["label"])] = torch.cat(z, dim=1).half().cpu().numpy()
        done += len(batch["label"])
        progress(f"encoding: {done:,}/{len(keys):,} images")
    return Tokens(**{name: torch.cat(parts) if parts else None for name, parts in kept.items()})


def tokens_of(run, split, views=1, with_features=False):
    """A split of a run's data set as Tokens, encoded once and kept in the run under the tokenizer's checksum and the data's place."""
    config, name = run.config, f"-{split}" * (split != "val") + f"-{views}" * (views > 1)
    source = json.dumps([config.dataset, str(Path(config.data).resolve()), config.labels, config.skip_broken, views])
    path, key = run.path / f"tokens{name}.npz", hashlib.sha256(f"{run.tokenizer}{source}".encode()).hexdigest()[:12]
    features, images = run.path / f"features{name}-{key}.npy", fingerprint(config, split)
    if path.is_file() and (features.is_file() or not with_features):
        try:
            arrays = load_tokens(path, run.tokenizer, run.sizes)
        except UserError as error:
            print(f"{error}: made anew")
            arrays = {"source": "", "images": ""}
        if str(arrays["source"]) == source and images in ("", str(arrays["images"])):
            indices, labels, maps = (torch.from_numpy(arrays[name]) for name in TOKEN_FILE[:3])
            tokens = Tokens(indices.long(), labels.long(), maps if len(maps) else None)
            return tokens._replace(features=np.load(features, mmap_mode="r")) if with_features else tokens
    dataset = make_dataset(config, split)
    for stale in run.path.glob(f"features{name}-????????????.npy"):
        stale.unlink()
    with whole_file(features) if with_features else contextlib.nullcontext() as temporary:
        tokens = encode_dataset(run, dataset, views, temporary)
    save_tokens(path, tokens, code_words(run.prior, run.model.codebook.sizes), dataset.classes, run.tokenizer, source, images)
    return tokens._replace(features=np.load(features, mmap_mode="r")) if with_features else tokens


def fingerprint(config, split):
    """A checksum of the names, sizes and times of a split's files; "" where they are not at hand."""
    if config.dataset == "demo":
        return "drawn"
    try:
        records = make_dataset(config, split, check=False).records
    except UserError:
        return ""
    paths = [path for record in records for path in (record.path, record.segmentation) if isinstance(path, Path) and path.exists()]
    seen = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in ((path, path.stat()) for path in paths)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


TOKEN_FILE = ("indices", "labels", "segmentation", "classes", "tokenizer", "source", "images")


def save_tokens(path, tokens, words, classes, tokenizer, source, images):
    """Write a token file, whole or not at all."""
    maps = np.zeros((0,), np.int16) if tokens.segmentation is None else tokens.segmentation.numpy()
    listed = {f"{name}_words": np.array(names) for name, names in zip(codebook_names(words), words)}
    arrays = dict(indices=tokens.indices.int().numpy(), labels=tokens.labels.numpy(), segmentation=maps)
    save_arrays(path, **arrays, classes=np.array(classes, dtype=str), tokenizer=tokenizer, source=source, images=images, **listed)


def load_tokens(path, tokenizer, sizes):
    """The arrays of a token file. Raises UserError where it is missing, something else, or of another tokenizer."""
    arrays = load_arrays(path, TOKEN_FILE, "token file", "python synthesize.py RUN tokens")
    indices, made_by = arrays["indices"], str(arrays["tokenizer"])
    if made_by != tokenizer:
        raise UserError(f"'{path}' was made by another tokenizer (sha256 {made_by[:12]}…, this run's is {tokenizer[:12]}…)")
    if (
        indices.ndim != 4
        or not indices.size
        or indices.dtype.kind not in "iu"
        or indices.shape[1] != len(sizes)
        or indices.min() < 0
        or (indices.max(axis=(0, 2, 3)) >= sizes).any()
        or arrays["labels"].shape != indices.shape[:1]
        or arrays["segmentation"].shape[:1] not in ((0,), indices.shape[:1])
    ):
        raise UserError(f"'{path}' holds indices that are not {len(sizes)} tokens per position of {sizes} codes")
    return arrays


@torch.no_grad()
def decode_tokens(model, indices, device, batch_size):
    """(N, M, h, w) indices → (N, 3, H, W) images in [-1, 1], on the CPU."""
    return torch.cat([model.decode(part.to(device)).float().cpu() for part in torch.as_tensor(indices).long().split(batch_size)])


def per_token(model, values):
    """One value for each codebook → one for each of the M tokens of a position."""
    return [value for value, quantizer in zip(values, model.quantizers) for _ in range(quantizer.neighbours)]


def words_of(indices, words):
    """(M, h, w) indices of an image and the M lists of words → h lines of w cells, each the words of its codes: "red breast"."""
    cells = [
        [" ".join(names[index] for names, index in zip(words, pair)) for pair in row] for row in np.asarray(indices).transpose(1, 2, 0)
    ]
    width = max(len(cell) for row in cells for cell in row)
    return "\n".join("  ".join(cell.ljust(width) for cell in row).rstrip() for row in cells)


def draw_words(image, indices, words, path, given=None, cell=84):
    """An image in [-1, 1], enlarged, with what each of its tokens reads as written into its place → PNG; a frame where it was given."""
    height, width = indices.shape[1:]
    picture = TF.to_pil_image(to_bytes(image)).resize((width * cell, height * cell), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for row, column in np.ndindex(height, width):
        text = "\n".join(names[index] for names, index in zip(words, indices[:, row, column]))
        place = ((column + 0.5) * cell, (row + 0.5) * cell)
        draw.multiline_text(place, text, "white", SMALL, anchor="mm", align="center", stroke_width=1, stroke_fill="black")
        if given is not None and given[row, column]:
            draw.rectangle((column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1), outline="white", width=3)
    save_png(picture, path)


# ---------------------------------------------------------------------------------------------
# A tokenizer's run, and the second stages in it


class Run:
    """A trained first stage: model in evaluation mode, config, prior, and the tokenizer's checksum.

    Args:
        path: its folder; choices: Choices, where its data lies now and the device.
    """

    def __init__(self, path, choices=Choices()):
        self.path, self.device = Path(path), pick_device(choices.device)
        self.model, config, self.prior, _ = load_run(path, self.device)
        if choices.data and config.dataset == "demo" or choices.labels and config.dataset != "folder":
            raise UserError("--data is for runs of a data set with a folder, --labels for those of --dataset folder")
        config.data, config.labels = choices.data or config.data, choices.labels or config.labels
        config.skip_broken = choices.skip_broken or config.skip_broken
        self.config = config
        self.tokenizer = checksum(self.path / "last.pt")
        self.sizes = per_token(self.model, self.model.codebook.sizes)


def known_of(config, tokens, rows, device, count):
    """What a Condition is told of some images: None, classes (B,), or label shares (B, L, h, w)."""
    if config.condition == "none":
        return None
    if config.condition == "class":
        return send(tokens.labels[rows], device)
    maps, (height, width) = send(tokens.segmentation[rows], device).long(), tokens.indices.shape[2:]
    cells = maps.unflatten(2, (width, -1)).unflatten(1, (height, -1)).transpose(2, 3).flatten(3)  # (B, h, w, S²)
    cells = cells.where((cells >= 0) & (cells < count), count)
    shares = torch.zeros(*cells.shape[:3], count + 1, device=device).scatter_add_(3, cells, torch.ones_like(cells, dtype=torch.float))
    return shares[..., :count].permute(0, 3, 1, 2) / cells.shape[3]


def condition_count(config, *splits):
    """Classes, or labels, of all splits. Raises UserError where the data set has none."""
    if config.condition == "none":
        return 0
    values = [tokens.labels if config.condition == "class" else tokens.segmentation for tokens in splits]
    if any(part is None or part.max() < 0 for part in values):
        raise UserError(
            f"--condition {config.condition}: this run's data set has no {'classes' if config.condition == 'class' else 'label maps'}"
        )
    count = max(int(part.max()) for part in values) + 1
    if count > MOST_LABELS:
        raise UserError(
            f"a label map holds label {count - 1:,}{' or more' * (count == 2**15)}; labels are whole numbers from 0 to {MOST_LABELS - 1:,}"
        )
    return count


def make_network(config, run, count):
    """The network that a SynthesisConfig names, for a tokenizer."""
    condition = Condition(config.condition, count, run.model.grid, config.width, config.heads)
    shape = dict(width=config.width, depth=config.depth, heads=config.heads, dropout=config.dropout)
    if config.model == "gpt":
        codes = per_token(run.model, [part.detach().float() for part in run.model.codebook()])
        return TokenTransformer(run.sizes, run.model.grid, condition, **shape, joint=config.joint, codes=codes).to(run.device)
    return Denoiser(run.model.code_dim * len(run.model.codebook.sizes), run.model.grid, condition, **shape).to(run.device)


def stage_folder(run, config):
    """Where a second stage lies."""
    return run.path / "synthesis" / "-".join([config.model, config.condition, *["independent"] * (not config.joint)])


class TrainedStage(NamedTuple):
    """A second stage that can draw."""

    network: torch.nn.Module  # of the best averaged weights, in evaluation mode
    config: SynthesisConfig
    count: int  # classes, or labels of a map
    step: int


def load_stage(run, folder):
    """The TrainedStage in a folder. Raises UserError where there is none, or one of another tokenizer."""
    if not (folder / "best.pt").is_file():
        there = sorted(path.parent.name for path in folder.parent.glob("*/best.pt"))
        said = f"there is {', '.join(there)}" if there else "train one with the sub-command train"
        raise UserError(f"no second stage '{folder.name}' in '{run.path}' (--model and --condition name one); {said}")
    state = load_checkpoint(folder / "best.pt")
    check_tokenizer(run, state, folder)
    stored = SynthesisConfig(**state["config"])
    with fitting(folder / "best.pt"):
        network = make_network(stored, run, state["count"])
        network.load_state_dict(state["ema"])
    return TrainedStage(network.eval(), stored, state["count"], state["step"])


def check_tokenizer(run, state, folder):
    """Raise UserError for a second stage of other tokens than the run's."""
    if state.get("tokenizer") != run.tokenizer:
        raise UserError(f"'{folder}' was trained on tokens of another state of '{run.path}'; train it anew with train --overwrite")


# ---------------------------------------------------------------------------------------------
# Training


class Loss(torch.nn.Module):
    """A network's `loss` as a forward pass, which is what DistributedDataParallel averages the gradients of."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs, **more):
        return self.network.loss(*inputs, **more)


def send(x, device):
    """A tensor to the device, without waiting for what CUDA is still doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def losses_of(config, run, count, loss, tokens, rows, drop=None, generator=None):
    """What is minimised (in nats, for gpt), and the losses by name: bits per token, or mean squared error of the noise; "loss" is their sum."""
    known, ldm = known_of(config, tokens, rows, run.device, count), config.model == "ldm"
    data = torch.from_numpy(tokens.features[np.asarray(rows)]).float() if ldm else tokens.indices[rows]
    losses = loss(send(data, run.device), known, drop, generator)
    names = ["noise"] if ldm else part_names(run)
    parts = {name: part / (1 if ldm else math.log(2)) for name, part in zip(names, losses)}
    return sum(losses), {"loss": sum(parts.values()), **parts}


@torch.no_grad()
def validation(config, run, count, network, tokens):
    """Mean `losses_of` over a split, with the same noise each time → dict of floats."""
    totals, generator = {}, torch.Generator(run.device).manual_seed(0)
    for rows in torch.arange(len(tokens.labels)).split(config.batch_size):
        _, parts = losses_of(config, run, count, network.loss, tokens, rows, None, generator)
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + value * len(rows) / len(tokens.labels)
    return {name: float(value) for name, value in totals.items()}


class StageTrainer:
    """State of a second stage's training and its step, for `run_steps`.

    Args:
        config: SynthesisConfig; run: Run; count: classes or labels.
        train_set, val_set: Tokens.
    """

    def __init__(self, config, run, count, train_set, val_set):
        torch.manual_seed(config.seed)
        self.config, self.run, self.device, self.count = config, run, run.device, count
        self.step, self.best, self.train_set, self.val_set = 0, -math.inf, train_set, val_set
        self.network = make_network(config, run, count)
        if config.model == "ldm":
            some = torch.from_numpy(train_set.features[evenly(len(train_set.features), 4096)]).float()
            self.network.mean.copy_(some.mean(dim=(0, 2, 3)).view(-1, 1, 1))
            self.network.std.copy_(some.std(dim=(0, 2, 3)).clamp_min(1e-6).view(-1, 1, 1))
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.losses = parallel(Loss(self.network), run.device)
        matrices = [parameter for parameter in self.network.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.network.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)

    def state(self):
        """What a checkpoint holds beside step, configuration and random state."""
        networks = {"network": self.network.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"count": self.count, "tokenizer": self.run.tokenizer, **networks}

    def load(self, state):
        """Go on from a checkpoint's `state`."""
        for name in ("network", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def train_step(self, batches):
        """One step on a list of lists of rows → dict of () tensors."""
        config, device, metrics = self.config, self.device, {}
        warm = min(1.0, (self.step + 1) / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * self.step / config.steps))
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        for number, rows in enumerate(batches):
            drop = torch.rand(len(rows), device=device) < config.drop_condition if config.condition != "none" else None
            with synchronised(self.losses, last=number == len(batches) - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.amp and device.type == "cuda"):
                    loss, parts = losses_of(config, self.run, self.count, self.losses, self.train_set, rows, drop)
                (loss / len(batches)).backward()
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() / len(batches)
        metrics["gradient"] = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))  # a short run is not weighed down by its first weights
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - decay)
        return metrics

    def validate(self):
        """The averaged weights' loss over the validation split, for `run_steps`."""
        values = validation(self.config, self.run, self.count, self.ema.eval(), self.val_set)
        unit = (lambda value: f" bits per position (perplexity {2**value:,.0f})") if self.config.model == "gpt" else lambda value: ""
        words = ", ".join(f"{name} {value:.3f}{unit(value)}" for name, value in values.items() if name != "loss")
        return -values["loss"], values, words

    def join_counts(self):
        """Nothing is counted."""

    def statistics(self):
        """Nothing beside the losses."""
        return {}

    def describe(self, line):
        """A line of metrics.jsonl in words."""
        names = ["noise"] if self.config.model == "ldm" else part_names(self.run)
        unit = " bits per position" if self.config.model == "gpt" else ""
        return " ".join(f"{name} {line[name]:.3f}" for name in names) + unit


def part_names(run):
    """("adjective", "noun"), ("code",), or with a number where a position has several of one codebook."""
    names = per_token(run.model, codebook_names(run.model.codebook.sizes))
    return [name if names.count(name) == 1 else f"{name}{i + 1}" for i, name in enumerate(names)]


def train_stage(args, runs):
    """The sub-command: a run's images become tokens (or features), whose model is trained."""
    (run,) = one(runs, "train")
    config = stage_config(args.given, run)
    folder, state = stage_folder(run, config), None
    if args.resume:
        state = load_checkpoint(folder / "last.pt")
        check_tokenizer(run, state, folder)
        with fitting(folder / "last.pt"):
            config = resumed_config(SynthesisConfig, state, args.given, CHANGEABLE, folder)
    elif (folder / "last.pt").exists() and not args.overwrite:
        raise UserError(f"'{folder}' exists already; go on with --resume, or replace it with --overwrite")
    with_features = config.model == "ldm"
    with first_process_first():
        train_set, val_set = tokens_of(run, "train", config.views, with_features), tokens_of(run, "val", 1, with_features)
    if config.batch_size > len(train_set.labels):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(train_set.labels)} training images")
    trainer = StageTrainer(config, run, state["count"] if state else condition_count(config, train_set, val_set), train_set, val_set)
    if state:
        resume_run(trainer, state, folder)
    elif not rank():
        with new_run_folder(folder, config, trainer):
            pass
    weights = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
    print(
        f"{config.model}, condition {config.condition}: {weights:.1f} M parameters on {run.device}, {len(train_set.labels):,} grids "
        f"of {'×'.join(map(str, run.model.grid))} positions, {config.steps:,} steps of {config.batch_size * config.accumulate} → {folder}"
    )
    order = TrainBatches(
        len(train_set.labels), config.batch_size, trainer.step * config.accumulate, config.steps * config.accumulate, config.seed
    )
    run_steps(trainer, ([row for row, _ in batch] for batch in order), trainer.validate, folder)
    print(f"done: look at samples with: python synthesize.py {run.path} sample --model {config.model} --condition {config.condition}")


# ---------------------------------------------------------------------------------------------
# Sampling


def check_choices(choices):
    """Raise UserError for flags of sampling that cannot be, or that say nothing of the model or condition asked for."""
    check_bounds(choices, SAMPLING_BOUNDS)
    if isinstance(choices, SampleChoices):
        if choices.model == "ldm" and (choices.temperature, choices.top_k, choices.top_p, choices.joint) != (1.0, 0, 1.0, True):
            raise UserError("--temperature, --top-k, --top-p and --no-joint are of --model gpt, not ldm")
        if choices.model == "gpt" and choices.sampling_steps != 50:
            raise UserError("--sampling-steps is of --model ldm, not gpt; a transformer takes one step per position")
        if choices.condition == "none" and choices.guidance != 1:
            raise UserError("--guidance is towards a condition; add --condition class or segmentation")
        if choices.label and choices.condition != "class":
            raise UserError("--label needs --condition class")


def draw_images(run, stage, tokens, rows, choices, seed, given=None):
    """Samples for the conditions of some images → (B, M, h, w) indices, a batch at a time.

    Args:
        stage: TrainedStage; tokens: Tokens of the images, with features where `ldm` keeps some; rows: their indices.
        given: (B, M, h, w) int64 tokens to keep, −1 where they are to be drawn.
    """
    network, config, count, _ = stage
    generator, drawn = torch.Generator(run.device).manual_seed(seed), []
    for part in torch.arange(len(rows)).split(config.batch_size):
        known = known_of(config, tokens, rows[part], run.device, count)
        kept = None if given is None else given[part].to(run.device)
        if config.model == "gpt":
            how = dict(temperature=choices.temperature, top_k=choices.top_k, top_p=choices.top_p)
            drawn.append(sample_tokens(network, len(part), known, kept, choices.guidance, generator, **how).cpu())
            continue
        features, mask = (None, None) if kept is None else given_features(run, tokens, rows[part], kept)
        z = sample_features(network, len(part), known, features, mask, choices.guidance, choices.sampling_steps, generator)
        indices = run.model.snap(z.chunk(len(run.model.codebook.sizes), dim=1))
        drawn.append((indices if kept is None else torch.where(kept >= 0, kept, indices)).cpu())
    return torch.cat(drawn)


def given_features(run, tokens, rows, given):
    """What a denoiser is to keep: an image's own features where its tokens are given, a code's vector where a word is put.

    Returns:
        (B, C, h, w) features and a mask of the same shape.
    Raises:
        UserError: for a word put before Gumbel-VQ, whose codes do not lie among its features.
    """
    features = torch.from_numpy(tokens.features[np.asarray(rows)]).to(run.device).float().chunk(len(run.model.codebook.sizes), dim=1)
    own, kept, masks = run.model.by_codebook(tokens.indices[rows].to(run.device)), [], []
    for z, codebook, index, true in zip(features, run.model.codebook(), run.model.by_codebook(given), own):
        mask, put = (index >= 0).all(dim=1, keepdim=True), ((index >= 0) & (index != true)).any(dim=1, keepdim=True)
        if run.config.quantizer == "gumbel" and put.any():
            raise UserError("--pin with --model ldm needs codes that are features; Gumbel-VQ's are not")
        vectors = codebook[index.clamp_min(0)].mean(dim=1).permute(0, 3, 1, 2)  # (B, D, h, w)
        kept.append(torch.where(put, vectors, z))
        masks.append(mask.expand_as(z))
    return torch.cat(kept, dim=1), torch.cat(masks, dim=1)


def known_part(part, grid):
    """(h, w) bool: "top", "bottom", "left", "right", or the white pixels of a PNG; nothing for "". Raises UserError for another."""
    height, width = grid
    known = torch.zeros(height, width, dtype=torch.bool)
    halves = {"top": (slice(0, height // 2), slice(None)), "bottom": (slice(height // 2, None), slice(None))}
    halves |= {"left": (slice(None), slice(0, width // 2)), "right": (slice(None), slice(width // 2, None))}
    if part in halves:
        known[halves[part]] = True
    elif part:
        with explained(f"--part {part}: neither top, bottom, left or right, nor a PNG that can be read", OSError), Image.open(part) as file:
            light, alpha = np.asarray(file.convert("LA").resize((width, height), Image.Resampling.BOX), dtype=float).transpose(2, 0, 1)
        known = torch.from_numpy(light * alpha > 127 * 255)
    return known


def pin_words(run, given, pins):
    """(B, M, h, w) given tokens, −1 elsewhere, with words put in their places.

    Args:
        pins: list of "row,column=adjective,noun"; a word may be left out.
    Raises:
        UserError: for a position or a word that is not there.
    """
    (height, width), given, names = run.model.grid, given.clone(), part_names(run)
    lists, taken = per_token(run.model, code_words(run.prior, run.model.codebook.sizes)), set()
    for pin in pins:
        place, _, text = pin.partition("=")
        try:
            row, column = map(int, place.split(","))
        except ValueError:
            row, column = -1, -1
        words = [word.strip().lower() for word in text.split(",")]
        if not (0 <= row < height and 0 <= column < width) or len(words) > len(lists) or not any(words):
            raise UserError(f"--pin {pin}: expected row,column={','.join(names)} of a grid of {height} by {width}, counted from 0")
        if (row, column) in taken:
            raise UserError(f"--pin {pin}: row {row}, column {column} has its words already")
        taken.add((row, column))
        for i, word in enumerate(words):
            if word and word not in lists[i]:
                others = [name for name, listed in zip(names, lists) if word in listed]
                near = difflib.get_close_matches(word, lists[i], 3) or lists[i][:3]
                advice = f"it is one for {others[0]}; the order is {','.join(names)}" if others else f"the nearest are {', '.join(near)}"
                raise UserError(f"--pin {pin}: '{word}' is no {names[i]} of this run's codebook; {advice}")
            if word:
                given[:, i, row, column] = lists[i].index(word)
    return given


def colours_of_labels(maps, count):
    """(B, R, R) labels → (B, 3, R, R) in [-1, 1], a colour each; −1 is black."""
    hue = torch.arange(count) * 0.618034 % 1  # the golden ratio keeps neighbours apart
    wheel = (hue[:, None] + torch.tensor([0.0, 1 / 3, 2 / 3])) * 2 * math.pi
    palette = torch.cat([wheel.cos() * 0.7, torch.full((1, 3), -1.0)])
    return palette[maps.where((maps >= 0) & (maps < count), count)].permute(0, 3, 1, 2)


def draw_grid(args, runs):
    """The sub-commands sample and complete: Fig. 8's grid, one column per image. Rows: condition, originals, and what each run makes of them."""
    choices, picture_rows = args.choices, []
    path = Path(choices.output or stage_folder(runs[0], choices) / ("completions.png" if choices.part else "samples.png"))
    for run in runs:
        if (run.config.resolution, run.config.dataset) != (runs[0].config.resolution, runs[0].config.dataset):
            raise UserError(f"'{run.path}' is of another resolution or data set than '{runs[0].path}', so their samples share no picture")
        stage = load_stage(run, stage_folder(run, choices))
        tokens = tokens_of(run, "val", with_features=choices.model == "ldm" and bool(choices.part or choices.pin))
        rows = chosen_images(choices, len(tokens.labels))
        picture_rows += [] if picture_rows else condition_rows(run, stage, tokens, rows)
        pinned = pin_words(run, torch.full_like(tokens.indices[rows], -1), choices.pin)
        for name, images, drawn in rows_of_run(choices, run, stage, tokens, rows, pinned):
            picture_rows.append((f"{run.path.name}: {name}", images))
            for index, *parts in zip(rows.tolist(), images, drawn, pinned) if choices.words and drawn is not None else ():
                say_words(run, f"{name} for image {index}", *parts, path)
    draw_comparison(picture_rows, path, len(rows), max(128, runs[0].config.resolution))
    print(f"{path}: {len(picture_rows)} rows of {len(rows)} images")


def rows_of_run(choices, run, stage, tokens, rows, pinned):
    """What a run makes of some images, each row its name, images, and indices where they were drawn."""
    if choices.label:
        classes = make_dataset(run.config, "val", check=False).classes[: stage.count]
        if choices.label not in classes:
            raise UserError(f"--label {choices.label}: classes are {', '.join(classes)}")
        tokens = tokens._replace(labels=torch.full_like(tokens.labels, classes.index(choices.label)))
    decode = lambda indices: list(decode_tokens(run.model, indices, run.device, run.config.batch_size))
    known, decoded = known_part(choices.part, run.model.grid), decode(tokens.indices[rows])
    found, ways = [("its tokens decoded", decoded, None)], [(choices.label or "sample", pinned)]
    if choices.part:
        mask = F.interpolate(known[None, None].float(), size=run.config.resolution)[0]
        found.append(("known", [image * mask for image in decoded], None))
        ways.insert(0, ("completed", pin_words(run, torch.where(known, tokens.indices[rows], -1), choices.pin)))
    if choices.model == "gpt" and (choices.pin or (known.flatten().int().diff() > 0).any()):
        print("gpt draws from the top left: positions before a given token do not see it (--model ldm sees all that is given)")
    for way, given in ways:
        for repeat in range(choices.repeat):
            drawn = draw_images(run, stage, tokens, rows, choices, choices.seed + repeat, given if (given >= 0).any() else None)
            found.append((f"{way} {repeat + 1}", decode(drawn), drawn))
    return found


def say_words(run, what, image, drawn, given, path):
    """Print what an image's tokens read as, and write it into a picture beside `path`."""
    words = per_token(run.model, code_words(run.prior, run.model.codebook.sizes))
    picture = path.with_name(f"{path.stem}-{run.path.name}-{what.replace(' ', '-')}.png")
    draw_words(image, drawn, words, picture, (given >= 0).any(dim=0))
    print(f"\n{what}, {picture}\n{words_of(drawn, words)}\n")


def chosen_images(choices, count):
    """The rows of --images, or --count of them spread over `count`. Raises UserError for one that is not there."""
    rows = torch.tensor(choices.images or evenly(count, choices.count))
    if rows.max() >= count or rows.min() < 0:
        raise UserError(f"--images {int(rows.max() if rows.max() >= count else rows.min())}: there are images 0 … {count - 1}")
    return rows


def condition_rows(run, stage, tokens, rows):
    """The first rows of Fig. 8's grid: label maps where they are the condition, and the images themselves."""
    dataset, shown = make_dataset(run.config, "val", check=run.config.skip_broken), []  # for the numbers of those left
    if stage.config.condition == "segmentation":
        maps = colours_of_labels(tokens.segmentation[rows].long(), stage.count)
        shown.append(("label map", list(F.interpolate(maps, size=run.config.resolution))))
    named = lambda row: f" ({[*dataset.classes, '–'][tokens.labels[row]]})" * (stage.config.condition == "class")
    print("columns: " + ", ".join(f"image {row}{named(row)}" for row in rows.tolist()))
    originals = torch.stack([dataset[int(row)]["image"] for row in rows])
    return [*shown, ("original", list(to_images(originals, torch.device("cpu"))))]


# ---------------------------------------------------------------------------------------------
# Table 6


@torch.no_grad()
def likelihood(run, stage, tokens, order=None):
    """Bits of each image's tokens under a transformer → (N, M) float64; `order` gives each image the condition of another."""
    network, config, count, _ = stage
    bits = []
    for rows in torch.arange(len(tokens.labels)).split(config.batch_size):
        known = known_of(config, tokens, rows if order is None else order[rows], run.device, count)
        images = tokens.indices[rows].to(run.device)
        logits = network(images, known)
        losses = [
            F.cross_entropy(part.float().mT, images[:, i].flatten(1), reduction="none").cpu().double().sum(1)
            for i, part in enumerate(logits)
        ]
        bits.append(torch.stack(losses, dim=1) / math.log(2))
    return torch.cat(bits)


def unigram_bits(train_set, val_set, sizes):
    """Bits of the validation tokens under the training split's frequencies, one added to each code → list of floats, a token each."""
    bits = []
    for i, size in enumerate(sizes):
        counts = torch.bincount(train_set.indices[:, i].flatten(), minlength=size).double() + 1
        bits.append(float(-(counts / counts.sum()).log2()[val_set.indices[:, i].flatten()].mean()))
    return bits


def evaluate_stage(run, stage, choices, inception):
    """One row of Table 6 → dict."""
    network, config, count, step = stage
    with_features = config.model == "ldm"
    val_set, positions = tokens_of(run, "val", 1, with_features), math.prod(run.model.grid)
    result = {"run": str(run.path), "model": config.model, "condition": config.condition, "joint": config.joint, "step": step}
    names = ("temperature", "top_k", "top_p", "guidance", "seed") if config.model == "gpt" else ("sampling_steps", "guidance", "seed")
    result["sampling"] = {name: getattr(choices, name) for name in names}
    if config.model == "gpt":
        bits, train_set = likelihood(run, stage, val_set), tokens_of(run, "train", config.views)
        result["bits"] = dict(zip(part_names(run), (bits.mean(0) / positions).tolist()))
        result["bits_image"] = float(bits.sum(1).mean())
        result["bits_uniform"] = sum(map(math.log2, run.sizes)) * positions
        result["bits_unigram"] = sum(unigram_bits(train_set, val_set, run.sizes)) * positions
        result["bits_per_bit"] = result["bits_image"] / result["bits_uniform"]
        if config.condition == "segmentation":  # half a split away, as neighbours may be frames of one film
            other = likelihood(run, stage, val_set, torch.arange(len(bits)).roll(len(bits) // 2))
            result["own_map_wins"] = float((bits.sum(1) < other.sum(1)).double().mean())
    else:
        result["noise"] = validation(config, run, count, network, val_set)["noise"]
    result["psnr"] = decoded_psnr(run, val_set)
    result["fid"] = sampled_fid(run, stage, val_set, choices, inception[0]) if inception[0] is not None else None
    result["fid_note"] = inception[1]
    with whole_file(stage_folder(run, config) / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


def evaluation_images(run, tokens):
    """Batches of a run's evaluation images, (B, 3, R, R) uint8, with their rows among the tokens."""
    dataset = make_dataset(run.config, "val", check=run.config.skip_broken)
    loader = make_loader(dataset, run.device, -1, batch_size=run.config.batch_size)
    return zip((batch["image"] for batch in loader), torch.arange(len(tokens.labels)).split(run.config.batch_size))


def decoded_psnr(run, tokens):
    """Mean PSNR of the evaluation images' tokens, decoded: what the bits of a tokenizer are worth."""
    scores = []
    for images, rows in evaluation_images(run, tokens):
        decoded = decode_tokens(run.model, tokens.indices[rows], run.device, run.config.batch_size)
        scores.append(psnr(decoded, to_images(images, torch.device("cpu"))))
    return torch.cat(scores).mean().item()


@torch.no_grad()
def sampled_fid(run, stage, tokens, choices, inception):
    """FID of as many samples as there are evaluation images against these, both at the run's resolution."""
    inception, features = inception.to(run.device), ([], [])
    for n, (images, rows) in enumerate(evaluation_images(run, tokens)):
        drawn = decode_tokens(
            run.model, draw_images(run, stage, tokens, rows, choices, choices.seed + n), run.device, run.config.batch_size
        )
        for kept, part in zip(features, (images, to_bytes(drawn))):
            kept.append(inception(part.to(run.device)).cpu().double())
    return fid(*(torch.cat(kept).numpy() for kept in features))


COLUMNS = {  # of Table 6: name in evaluation.json → title, format
    "fid": ("FID ↓", ".2f"),
    "bits_image": ("bits per image ↓", ",.1f"),
    "bits_per_bit": ("per bit of its tokens ↓", ".3f"),
    "bits_unigram": ("unigram", ",.0f"),
    "bits_uniform": ("uniform", ",.0f"),
    "own_map_wins": ("own map likelier", ".1%"),
    "noise": ("noise error ↓", ".4f"),
    "psnr": ("PSNR of its tokens, dB ↑", ".2f"),
}


def print_table(args, runs):
    """The sub-command: a table of every second stage of every run."""
    inception, results = load_inception(args.choices.inception), []
    for run in runs:
        for path in sorted((run.path / "synthesis").glob("*/best.pt")):
            try:
                results.append(evaluate_stage(run, load_stage(run, path.parent), args.choices, inception))
            except UserError as error:
                print(f"not in the table: {error}")
    if not results:
        raise UserError(f"no second stage in {', '.join(str(run.path) for run in runs)}; train one with: python synthesize.py RUN train")
    rows = [["run", "model", "condition", "bits per position ↓", *(title for title, _ in COLUMNS.values())]]
    for result in results:
        cell = lambda name, form: "–" if result.get(name) is None else format(result[name], form)
        parts = " + ".join(f"{value:.3f}" for value in result["bits"].values()) if "bits" in result else "–"
        model = result["model"] + ("" if result["joint"] else ", independent heads")
        rows.append([result["run"], model, result["condition"], parts, *(cell(name, form) for name, (_, form) in COLUMNS.items())])
    print(as_markdown(rows))
    if results[0]["fid"] is None:
        print(f"\nFID: – ({results[0]['fid_note']})")
    if any(result["model"] == "ldm" for result in results):
        print("\nldm has no likelihood of tokens: its noise error is the mean squared error of ε, of variance 1")


# ---------------------------------------------------------------------------------------------
# Command line


def convert(args, runs):
    """The sub-command: encode a split, or decode a file."""
    (run,), choices = one(runs, "tokens"), args.choices
    if choices.decode:
        folder = Path(choices.output or run.path / "decoded")
        indices = load_tokens(choices.decode, run.tokenizer, run.sizes)["indices"]
        for start in range(0, len(indices), run.config.batch_size):
            part = decode_tokens(run.model, indices[start : start + run.config.batch_size], run.device, run.config.batch_size)
            for index, image in enumerate(part, start):
                save_png(TF.to_pil_image(to_bytes(image)), folder / f"{index:06d}.png")
        print(f"{folder}: {len(indices):,} images")
    else:
        kept = tokens_of(run, choices.split)
        indices, path = kept.indices.numpy(), run.path / f"tokens{'' if choices.split == 'val' else '-train'}.npz"
        if choices.output:
            with whole_file(choices.output) as temporary:
                temporary.write_bytes(path.read_bytes())
            path = Path(choices.output)
        print(f"{path}: {len(indices):,} images of {'×'.join(map(str, indices.shape[2:]))} positions, {' + '.join(part_names(run))}")
    for index in choices.words:
        if not 0 <= index < len(indices):
            raise UserError(f"--words {index}: there are images 0 … {len(indices) - 1}")
        print(f"\nimage {index}\n{words_of(indices[index], per_token(run.model, code_words(run.prior, run.model.codebook.sizes)))}")


def one(runs, name):
    """The runs, when they are one. Raises UserError otherwise."""
    if len(runs) != 1:
        raise UserError(f"{name} takes one run, not {len(runs)}")
    return runs


def stage_config(given, run):
    """The SynthesisConfig that flags name for a run: explicit flags before TINY's values."""
    small = TINY if run.config.preset == "tiny" else {}
    config = SynthesisConfig(**{**small, **given})
    check_bounds(config, BOUNDS)
    if config.model == "ldm" and not config.joint:
        raise UserError("--no-joint is of --model gpt; ldm has no heads of tokens")
    if config.width % (2 * config.heads):
        raise UserError(f"--width {config.width} must be a multiple of twice the {config.heads} heads")
    return config


COMMANDS = {  # sub-command → what it calls, its flags, what it does
    "train": (
        train_stage,
        SynthesisConfig,
        "Train a second stage on a run's tokens. For a tokenizer of the tiny preset the defaults are: {}.",
    ),
    "sample": (draw_grid, SampleChoices, "Draw images for conditions, or with words in their places."),
    "complete": (draw_grid, CompleteChoices, "Keep a part of images and draw the rest: Fig. 8."),
    "evaluate": (print_table, TableChoices, "Table 6: FID and likelihood of every second stage."),
    "tokens": (convert, TokenChoices, "Images to tokens and words, and back."),
}


def parse(argv=None):
    """Command line → namespace: `runs`, what to `call`, its `choices`, and those of them that were `given`."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py; train and tokens take one")
    commands = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name, (call, kind, what) in COMMANDS.items():
        what = what.format(", ".join(f"{name} {value}" for name, value in TINY.items()))
        sub = commands.add_parser(name, help=what, description=what)
        add_flags(sub, kind())
        sub.set_defaults(call=call, kind=kind)
        if name == "train":
            start = sub.add_mutually_exclusive_group()
            start.add_argument("--resume", action="store_true", help="go on from its last checkpoint")
            start.add_argument("--overwrite", action="store_true", help="replace one of the same name")
    args = parser.parse_args(argv)
    args.given = take_flags(args.kind, vars(args))
    args.choices = args.kind(**args.given)
    return args


def main(argv=None):
    """Open the runs, whose tokenizers stay as they are, and do with their tokens what the sub-command says."""
    with torchrun():
        args = parse(argv)
        check_choices(args.choices)
        runs = [Run(path, args.choices) for path in args.runs]
        args.call(args, runs)


if __name__ == "__main__":
    command(main)
