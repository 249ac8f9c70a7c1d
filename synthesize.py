"""The second stage: images as tokens that read as words, and a model that draws them (paper §4.4, Table 6, Fig. 8).

    python synthesize.py runs/demo-vqct train --condition segmentation      a transformer of the run's tokens
    python synthesize.py runs/demo-vqct train --model ldm                   … or a denoiser of its features
    python synthesize.py runs/demo-vqct complete --condition segmentation   keeps the top of images: Fig. 8's grid
    python synthesize.py runs/demo-vqct sample --pin 3,4=red,breast --words     words in their places, the rest drawn
    python synthesize.py runs/demo-vqct runs/demo-vqgan evaluate            Table 6
    python synthesize.py runs/demo-vqct tokens PHOTO.jpg                    what a photograph reads as
    python synthesize.py runs/demo-vqct tokens --decode runs/demo-vqct/tokens-val.npz     and back to images

A token file holds `indices` (N, M, h, w), an adjective and a noun at each position, each codebook's words, labels and
label maps where the data set has them, and the tokenizer's checksum; numpy reads it without pickle. A second stage lies
in its run's folder, `synthesis/<model>-<condition>`.
"""

import contextlib
import copy
import difflib
import hashlib
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Metal lacks runs on the CPU; read as torch is imported

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image

from evaluate import as_markdown, fid, load_inception, load_or_reason, warn_of_fid
from prior import Parser, UserError, atomic_write, save_png, user_error
from train import (Run, add_up, autocast, average_gradients, check_folder, draw_grid, first_process_first, fit, fitting,
                   hold_out, identity, launch, load_checkpoint, lock, open_run, psnr, rank, read_image, refuse_idle,
                   restore, resumed_choices, spread_indices, to_bytes, train_batches)
from vqct import Condition, Denoiser, TokenTransformer, option, sample_features, sample_tokens


@dataclass
class Stage:
    """The flags that name a second stage."""

    model: str = option("gpt", "gpt: a transformer of the tokens; ldm: diffusion of the features before them",
                        choices=("gpt", "ldm"))
    condition: str = option("none", "what a sample is drawn for", choices=("none", "class", "segmentation"))


@dataclass
class SynthesisConfig(Stage):
    """A second stage. Defaults are for f16 tokenizers on a GPU; TINY changes some for tokenizers of the tiny preset."""

    width: int = option(768, "features of the transformer")
    depth: int = option(12, "blocks of the transformer")
    heads: int = option(12, "attention heads, dividing half the width")
    dropout: float = option(0.1, "share of features zeroed in training", most=0.99)
    drop_condition: float = option(0.1, "share of training images without condition, for guided sampling", most=0.99)
    views: int = option(8, "grids of tokens of each training image: its centre crop, and random crops and flips")
    steps: int = option(200_000, "optimizer steps")
    batch_size: int = option(32, "images a micro-step")
    accumulate: int = option(1, "micro-steps whose gradients are averaged before each optimizer step")
    lr: float = option(3e-4, "AdamW's step size, by a cosine to a tenth of it")
    warmup: int = option(500, "steps over which it rises from 0", least=0)
    weight_decay: float = option(0.01, "AdamW's weight decay, of matrices alone")
    ema: float = option(0.9999, "decay of the averaged weights, which are used for sampling and evaluation", most=1)
    amp: bool = option(True, "bfloat16 autocast on CUDA, since Ampere")
    deterministic: bool = option(False, "on CUDA, only algorithms that repeat themselves bit by bit: slower")
    seed: int = option(0, "seed of weights, data order and dropout", least=0)
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    eval_every: int = option(1_000, "steps between validations and checkpoints")


TINY = dict(views=1, width=192, depth=4, heads=4, steps=800, lr=1e-3, warmup=50, ema=0.99, eval_every=200)
MATTERS = {  # flags that matter only where this holds, and are refused elsewhere
    "temperature top_k top_p": lambda config: config.model == "gpt",
    "sampling_steps": lambda config: config.model == "ldm",
    "guidance drop_condition": lambda config: config.condition != "none",
    "label": lambda config: config.condition == "class",
    "count": lambda config: not config.images,
}
CHANGEABLE = "steps log_every eval_every deterministic".split()


@dataclass
class Sampling:
    """The flags of every draw."""

    temperature: float = option(1.0, "gpt: divides the logits; 0 takes the likeliest token")
    top_k: int = option(0, "gpt: only so many of the likeliest tokens; 0: all", least=0)
    top_p: float = option(1.0, "gpt: the fewest likely tokens of so much probability together", least=1e-6, most=1)
    guidance: float = option(1.0, "scale of classifier-free guidance towards a condition; 1: none")
    sampling_steps: int = option(50, "ldm: steps of DDIM")
    seed: int = option(0, "seed of the samples", least=0)


@dataclass
class Drawing(Sampling, Stage):
    """The flags of sample and complete."""

    count: int = option(8, "images, spread over the evaluation split")
    images: tuple = option((), "… or these, by their number", each=int)
    label: str = option("", "class to draw instead of the images' own")
    repeat: int = option(2, "samples of each")
    pin: tuple = option((), "words in their places, ROW,COLUMN=WORDS: 3,4=red,breast", each=str)
    words: bool = option(False, "print what the samples read as")
    output: str = option("", "PNG (default: samples.png or completions.png beside the second stage)")


# ======== Tokens

class Tokens(NamedTuple):
    """A data set as the second stage sees it. Each image may have several rows: random crops and flips of it."""

    indices: torch.Tensor  # (N, M, h, w) int64
    labels: torch.Tensor  # (N,) int64, −1: none
    segmentation: torch.Tensor | None  # (N, S h, S w) int16, S² pixels of each position; −1: unlabeled
    features: np.ndarray | None = None  # (N, C, h, w) float16 on disk, before quantization


SUBSAMPLES = 4  # S, pixels a side of a position at which its label map is kept, enough for shares in sixteenths


@torch.no_grad()
def encode_dataset(run, dataset, views, path=None):
    """Every image of a dataset as Tokens: its centre crop, then `views` − 1 random ones; path: where features go."""
    model, height, done = run.model, run.model.grid[0], 0
    every = range(len(dataset))
    keys = [(index, view * len(dataset) + index) if view else index for view in range(views) for index in every]
    dataset.with_segmentation, kept = True, {name: [] for name in ("indices", "labels", "segmentation")}
    stride = max(1, run.config.resolution // height // SUBSAMPLES)
    shape = features_shape(run, len(keys))
    features = path and np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    if path and hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash when the map is written to
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    for x, batch in run.batches(dataset, keys, "encoding"):
        z = model.features(x)
        kept["indices"].append(model.nearest_indices(z).cpu())
        kept["labels"].append(batch["label"])
        if "segmentation" in batch:
            maps = batch["segmentation"][:, stride // 2 :: stride, stride // 2 :: stride]
            kept["segmentation"].append(maps.clamp(max=2**15 - 1).short())
        if path:
            features[done : done + len(x)] = torch.cat(z, dim=1).half().cpu().numpy()
        done += len(x)
    return Tokens(**{name: torch.cat(parts) if parts else None for name, parts in kept.items()})


def tokens_of(run, split, views=1, with_features=False):
    """A split of a run's data set as Tokens, kept in the run; made anew if tokenizer, files or views change.

    They are made by one process at a time, as several commands share them.
    """
    dataset = run.dataset(split)
    path, stored = run.results / f"tokens-{split}.npz", run.results / f"features-{split}.npy"
    key = json.dumps([run.tokenizer, dataset.fingerprint(), views])
    key, rows = hashlib.sha256(key.encode()).hexdigest(), len(dataset) * views
    kept = lambda: kept_tokens(run, rows, key, path, stored if with_features else None)
    if tokens := kept():
        return tokens
    with open(run.path / "lock", "w") as file:
        lock(file, f"waiting: another process encodes images of '{run.path}'")
        if tokens := kept():
            return tokens
        path.unlink(missing_ok=True)
        stored.unlink(missing_ok=True)
        with atomic_write(stored) if with_features else contextlib.nullcontext() as part:
            tokens = encode_dataset(run, dataset, views, part)
            if part:
                with open(part, "ab") as features:
                    features.write(key.encode())
        maps = torch.zeros(0, dtype=torch.int16) if tokens.segmentation is None else tokens.segmentation
        arrays = {f"{name}_words": np.array(listed) for name, listed in zip(run.names, run.words)}
        arrays.update(indices=tokens.indices.int(), labels=tokens.labels, segmentation=maps)
        arrays.update(classes=np.array(dataset.classes, str), tokenizer=run.tokenizer, key=key)
        with atomic_write(path) as part, open(part, "wb") as file_of_tokens:
            np.savez_compressed(file_of_tokens, **arrays)
    return tokens._replace(features=np.load(stored, mmap_mode="r")) if with_features else tokens


def kept_tokens(run, rows, key, path, stored):
    """Tokens from their files, or None where these are missing, damaged, or of another key or size."""
    try:
        arrays, features = dict(np.load(path)), stored and np.load(stored, mmap_mode="r")
        indices, labels, maps = (torch.from_numpy(arrays[name]) for name in Tokens._fields[:3])
        keys, shape = [str(arrays["key"])], (rows, len(run.model.sizes), *run.model.grid)
        if stored:  # behind the array, where numpy does not read
            with open(stored, "rb") as file:
                file.seek(-len(key), os.SEEK_END)
                keys.append(file.read().decode())
        fits = indices.shape == shape and len(labels) == rows and len(maps) in (0, rows)
        if set(keys) != {key} or not fits or stored and features.shape != features_shape(run, rows):
            return None
    except Exception:  # of whatever kind a damaged file raises
        return None
    return Tokens(indices.long(), labels, maps if len(maps) else None, features)


def features_shape(run, rows):
    """The shape of features before quantization, (N, C, h, w)."""
    return rows, run.model.code_dim * len(run.model.codebook.sizes), *run.model.grid


@torch.no_grad()
def decode_tokens(run, indices):
    """(N, M, h, w) indices → (N, 3, H, W) images in [-1, 1], on the CPU."""
    parts = indices.split(run.config.batch_size)
    return torch.cat([run.model.decode(part.to(run.device)).float().cpu() for part in parts])


# ======== The second stage of a run

def send(x, device):
    """A tensor to the device, asynchronously."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def known_of(config, tokens, rows, device, count):
    """The condition of some images: None, classes (B,), or label shares (B, L, h, w)."""
    if config.condition == "none":
        return None
    if config.condition == "class":
        return send(tokens.labels[rows], device)
    maps, (height, width) = send(tokens.segmentation[rows], device).long(), tokens.indices.shape[2:]
    cells = maps.unflatten(2, (width, -1)).unflatten(1, (height, -1)).transpose(2, 3).flatten(3)  # (B, h, w, S²)
    cells = cells.where((cells >= 0) & (cells < count), count)
    shares = torch.zeros(*cells.shape[:3], count + 1, device=device)
    shares.scatter_add_(3, cells, torch.ones_like(cells).float())
    return shares[..., :count].permute(0, 3, 1, 2) / cells.shape[3]


def check_condition(config, run):
    """Raise UserError for a condition that a run's data set lacks, before anything is encoded."""
    records = run.dataset("train").records if config.condition != "none" else ()
    if config.condition == "class" and all(record.label < 0 for record in records):
        raise UserError("--condition class: the data set has no classes (with --dataset folder, sub-folders are)")
    if config.condition == "segmentation" and all(record.segmentation is None for record in records):
        advice = "with --dataset folder, --labels DIR names them"
        raise UserError(f"--condition segmentation: the data set has no label maps ({advice})")


def condition_count(config, *splits, most=4096):
    """Classes, or labels, of all splits. Raises UserError for none, or more than `most`."""
    if config.condition == "none":
        return 0
    values = [tokens.labels if config.condition == "class" else tokens.segmentation for tokens in splits]
    if any(part is None or part.max() < 0 for part in values):
        raise UserError(f"--condition {config.condition}: this run's data set has none")
    count = max(int(part.max()) for part in values) + 1
    if count > most:
        raise UserError(f"--condition {config.condition}: there are {count:,} labels, more than {most:,}")
    return count


def make_network(config, run, count):
    """The network that a SynthesisConfig names, for a tokenizer."""
    model, codes = run.model, run.model.codebook()
    condition = Condition(config.condition, count, model.grid, config.width, config.heads)
    shape = dict(width=config.width, depth=config.depth, heads=config.heads, dropout=config.dropout)
    if config.model == "gpt":
        codes = model.per_token(codes)
        network = TokenTransformer(model.sizes, model.grid, condition, **shape, codes=codes)
    else:
        network = Denoiser(model.code_dim * len(codes), model.grid, condition, **shape)
    return network.to(run.device)


def stage_folder(run, config, root=None):
    """Where a second stage lies, in its run or below another root."""
    return (root or run.path) / "synthesis" / f"{config.model}-{config.condition}"


def load_stage(run, folder):
    """A second stage that can draw → network (of the best averaged weights), SynthesisConfig, count of classes, step.

    Raises UserError where there is none, or one of another tokenizer.
    """
    if not (folder / "best.pt").is_file():
        there = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/best.pt"))) or "none"
        raise UserError(f"no second stage '{folder.name}' in '{run.path}' (there: {there}); train makes one")
    state = load_checkpoint(folder / "best.pt")
    check_stage(run, state, folder)
    if state["config"]["condition"] == "class" and state["classes"] != run.dataset("val").classes:
        raise UserError(f"'{folder}' was trained with other classes than '{run.config.data}' has; see --data")
    with fitting(folder / "best.pt"):
        config = SynthesisConfig(**state["config"])
        network = make_network(config, run, state["count"])
        network.load_state_dict(state["ema"])
    return network.eval(), config, state["count"], state["step"]


def check_stage(run, state, folder):
    """Raise UserError for a second stage of other tokens than the run's."""
    if state.get("tokenizer") != run.tokenizer:
        raise UserError(f"'{folder}' was trained on tokens of other weights of '{run.path}'; train it with --overwrite")


def losses_of(config, run, count, network, tokens, rows, drop=None, generator=None):
    """What is minimised (in nats, for gpt), and losses by name: bits per token, or mean squared error of the noise."""
    known, ldm = known_of(config, tokens, rows, run.device, count), config.model == "ldm"
    data = torch.from_numpy(tokens.features[np.asarray(rows)]).float() if ldm else tokens.indices[rows]
    losses = network.loss(send(data, run.device), known, drop, generator)
    if ldm:
        return losses[0], {"loss": losses[0], "noise": losses[0]}
    bits = {name: part / math.log(2) for name, part in zip(run.token_names, losses)}
    return sum(losses), {"loss": sum(bits.values()), **bits}


@torch.no_grad()
def validation(config, run, count, network, tokens, images):
    """Mean `losses_of` over some images, with the same noise each time → dict of floats."""
    totals, generator = {}, torch.Generator(run.device).manual_seed(0)
    for rows in torch.tensor(images).split(config.batch_size):
        _, parts = losses_of(config, run, count, network, tokens, rows, None, generator)
        add_up(totals, parts, len(rows) / len(images))
    return {name: float(value) for name, value in totals.items()}


class StageTrainer:
    """State of a second stage's training and its step, for `fit`.

    config: SynthesisConfig; run: Run; count: classes or labels; train_set: Tokens; chosen: rows that choose best.pt.
    """

    def __init__(self, config, run, count, train_set, chosen):
        torch.manual_seed(config.seed)
        dataset = run.dataset("train")
        self.data, self.classes = identity(dataset, run.config.data), dataset.classes
        self.config, self.run, self.device, self.count = config, run, run.device, count
        self.step, self.best, self.train_set, self.chosen = 0, -math.inf, train_set, chosen
        self.network = make_network(config, run, count)
        if config.model == "ldm":
            some = torch.from_numpy(train_set.features[spread_indices(len(train_set.features), 4096)]).float()
            self.network.mean.copy_(some.mean(dim=(0, 2, 3)).view(-1, 1, 1))
            self.network.std.copy_(some.std(dim=(0, 2, 3)).clamp_min(1e-6).view(-1, 1, 1))
        self.ema = copy.deepcopy(self.network).requires_grad_(False).eval()
        parameters = list(self.network.parameters())
        groups = [{"params": [parameter for parameter in parameters if parameter.dim() > 1]}]
        groups += [{"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0}]
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)

    def parts(self):
        """The networks and optimizer that a checkpoint holds, by name."""
        return {"network": self.network, "ema": self.ema, "optimizer": self.optimizer}

    def notes(self):
        """What a checkpoint holds beside them."""
        known = dict(count=self.count, data=self.data, classes=self.classes)
        return {"tokenizer": self.run.tokenizer, **known}

    def usage(self):
        """No codes are learned here."""
        return []

    def train_step(self, batches):
        """One step on a list of lists of rows → dict of () tensors."""
        config, metrics = self.config, {}
        warm = min(1.0, (self.step + 1) / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * warm * (0.55 + 0.45 * math.cos(math.pi * self.step / config.steps))
        self.network.train()
        self.optimizer.zero_grad()
        for rows in batches:
            drop = None
            if config.condition != "none":
                drop = torch.rand(len(rows), device=self.device) < config.drop_condition
            with autocast(self):
                loss, parts = losses_of(config, self.run, self.count, self.network, self.train_set, rows, drop)
            (loss / len(batches)).backward()
            add_up(metrics, parts, 1 / len(batches))
        metrics["gradient"] = average_gradients(self.network)
        torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), 1.0, metrics["gradient"])
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))  # averages less at first
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - decay)
        return metrics

    def validate(self):
        """The averaged weights' loss over the held-out images → score, {name: float}, no picture."""
        values = validation(self.config, self.run, self.count, self.ema, self.train_set, self.chosen)
        return -values["loss"], values, ()


def train_stage(run, given, resume, overwrite):
    """The sub-command train: a run's images become tokens (or features), whose model is trained."""
    config = SynthesisConfig(**{**(TINY if run.config.preset != "f16" else {}), **given})
    refuse_idle(config, given, MATTERS)
    if config.width % (2 * config.heads):
        raise UserError(f"--width {config.width} must be a multiple of twice the {config.heads} heads")
    folder, state, ldm = stage_folder(run, config), None, config.model == "ldm"
    if resume:
        state, choices = resumed_choices(SynthesisConfig, given, CHANGEABLE, folder)
        config = SynthesisConfig(**choices)
        check_stage(run, state, folder)
    elif not rank():
        check_folder(folder, overwrite)  # before images are encoded
    check_condition(config, run)
    with first_process_first():
        train_set, val_set = tokens_of(run, "train", config.views, ldm), tokens_of(run, "val", 1, ldm)
    count = state["count"] if state else condition_count(config, train_set, val_set)
    images = len(train_set.labels) // config.views  # rows go through all images view by view
    trained, chosen = hold_out(images, run.config.eval_images)
    kept = [view * images + row for view in range(config.views) for row in trained]
    trainer = StageTrainer(config, run, count, train_set, chosen)
    if state:
        restore(trainer, state, folder)
    steps = trainer.step * config.accumulate, config.steps * config.accumulate
    order = train_batches(kept, config.batch_size, *steps, config.seed)
    with open_run(folder, trainer, overwrite, state) as journal:
        weights = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
        print(f"{folder}: {weights:.1f} M weights on {run.device}, {len(kept):,} grids of tokens")
        fit(trainer, ([row for row, _ in batch] for batch in order), trainer.validate, folder, journal)
    which = f"--model {config.model} --condition {config.condition}"
    print(f"done: look at samples with: python synthesize.py {shlex.quote(str(run.path))} sample {which}")


# ======== Sampling

def draw_images(run, stage, tokens, rows, choices, seed, given=None):
    """Samples for the conditions of some images → (B, M, h, w) indices, a batch at a time.

    stage: of load_stage; tokens: Tokens of the images, with features where `ldm` keeps some; rows: their indices.
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
        how = (choices.guidance, choices.sampling_steps, generator)
        z = sample_features(network, len(part), known, features, mask, *how)
        indices = run.model.nearest_indices(z.chunk(len(run.model.codebook.sizes), dim=1))
        drawn.append((indices if kept is None else torch.where(kept >= 0, kept, indices)).cpu())
    return torch.cat(drawn)


def given_features(run, tokens, rows, given):
    """What a denoiser is to keep: an image's own features where its tokens are given, codes where words are put.

    Returns (B, C, h, w) features and a mask of the same shape.
    Raises UserError for a word put before Gumbel-VQ, whose codes do not lie among its features.
    """
    features = torch.from_numpy(tokens.features[np.asarray(rows)]).to(run.device).float().chunk(len(run.names), dim=1)
    own, kept, masks = run.model.by_codebook(tokens.indices[rows].to(run.device)), [], []
    for z, codebook, index, true in zip(features, run.model.codebook(), run.model.by_codebook(given), own):
        mask = (index >= 0).all(dim=1, keepdim=True)
        put = ((index >= 0) & (index != true)).any(dim=1, keepdim=True)
        if run.config.quantizer == "gumbel" and put.any():
            raise UserError("--pin with --model ldm is not possible with Gumbel-VQ, whose codes are no features")
        vectors = codebook[index.clamp_min(0)].mean(dim=1).permute(0, 3, 1, 2)  # (B, D, h, w)
        kept.append(torch.where(put, vectors, z))
        masks.append(mask.expand_as(z))
    return torch.cat(kept, dim=1), torch.cat(masks, dim=1)


def known_part(part, grid):
    """(h, w) bool: "top", "bottom", "left", "right", or the white pixels of a PNG; nothing for ""."""
    height, width = grid
    known = torch.zeros(height, width, dtype=torch.bool)
    halves = {"top": (slice(0, height // 2), slice(None)), "bottom": (slice(height // 2, None), slice(None))}
    halves |= {"left": (slice(None), slice(0, width // 2)), "right": (slice(None), slice(width // 2, None))}
    if part in halves:
        known[halves[part]] = True
    elif part:
        if not Path(part).exists():
            raise UserError(f"--part {part}: neither top, bottom, left or right, nor a picture")
        picture = read_image(part).convert("L").resize((width, height), Image.Resampling.BOX)
        known = torch.from_numpy(np.asarray(picture) > 127)
    return known


def pin_words(run, given, pins):
    """(B, M, h, w) given tokens, −1 elsewhere, with words put in their places.

    pins: list of "row,column=adjective,noun"; a word may be left out.
    Raises UserError for a position or a word that is not there.
    """
    (height, width), given, names = run.model.grid, given.clone(), run.token_names
    lists = run.model.per_token(run.words)
    for pin in pins:
        place, _, text = pin.partition("=")
        words = [word.strip().lower() for word in text.split(",")]
        with user_error(f"--pin {pin}: expected row,column={','.join(names)} of a grid of {height} by {width}, from 0"):
            row, column = map(int, place.split(","))
            if not (0 <= row < height and 0 <= column < width and len(words) <= len(lists) and any(words)):
                raise ValueError
        for i, word in enumerate(words):
            if word and word not in lists[i]:
                near = ", ".join(difflib.get_close_matches(word, lists[i], 3)) or "none like it"
                raise UserError(f"--pin {pin}: '{word}' is no {names[i]} of this run's codebook; spelled alike: {near}")
            if word:
                given[:, i, row, column] = lists[i].index(word)
    return given


def draw_samples(runs, choices, part=""):
    """The sub-commands sample and complete: Fig. 8's grid, a column for each image → PNG.

    Rows: label maps and originals, and what each run makes of them: its tokens decoded, completions, samples.
    """
    path = stage_folder(runs[0], choices, runs[0].results) / ("completions.png" if part else "samples.png")
    path, rows, legend, ldm = Path(choices.output or path), [], [], choices.model == "ldm"
    images_of = lambda run: (run.config.resolution, run.config.dataset, Path(run.config.data).resolve())
    if part and choices.output == part:
        raise UserError(f"--output {part} is the picture of --part; name another")
    for run in runs:
        if images_of(run) != images_of(runs[0]):
            raise UserError(f"'{run.path}' is of another resolution or data set than '{runs[0].path}'")
        stage = load_stage(run, stage_folder(run, choices))
        count = stage[2]
        tokens, dataset = tokens_of(run, "val", 1, ldm and bool(part or choices.pin)), run.dataset("val")
        condition_count(choices, tokens, most=count)
        images = torch.tensor(choices.images or spread_indices(len(dataset), choices.count))
        if images.max() >= len(dataset) or images.min() < 0:
            raise UserError(f"--images: there are images 0 … {len(dataset) - 1}")
        if not rows and choices.condition == "segmentation":
            maps = tokens.segmentation[images].long()
            rows.append(("label map", F.interpolate(colours_of_labels(maps, count), size=run.config.resolution)))
            there = maps.unique()
            names = [dataset.labels.get(label, str(label)) for label in there.tolist()]
            legend = [("labels", colours_of_labels(there[:, None, None], count), names)]
        if run is runs[0]:
            originals = [dataset[index]["image"] / 127.5 - 1 for index in images.tolist()]
            rows.append(("original", originals, list(map(str, images.tolist()))))
        if choices.label:
            if choices.label not in dataset.classes[:count]:
                raise UserError(f"--label {choices.label}: classes are {', '.join(dataset.classes[:count])}")
            tokens = tokens._replace(labels=torch.full_like(tokens.labels, dataset.classes.index(choices.label)))
        rows += rows_of_run(run, stage, tokens, images, choices, part)
    draw_grid(rows, path, legend=legend)
    print(f"{path}: images {', '.join(map(str, images.tolist()))} from left to right")


def rows_of_run(run, stage, tokens, images, choices, part):
    """What a run makes of some images: a list of (label, pictures)."""
    name, own = run.path.name, tokens.indices[images]
    known = known_part(part, run.model.grid)
    decoded, pinned = decode_tokens(run, own), pin_words(run, torch.full_like(own, -1), choices.pin)
    rows = [(f"{name}: tokens decoded", decoded)]
    ways = {choices.label or "sample": pinned}
    if part:
        mask = F.interpolate(known[None, None].float(), size=run.config.resolution)[0]
        rows.append((f"{name}: known", decoded * mask))
        ways = {"completed": pin_words(run, torch.where(known, own, -1), choices.pin), **ways}
    if choices.model == "gpt" and (choices.pin or (known.flatten().int().diff() > 0).any()):
        print("gpt draws from the top left: positions before a given token do not see it (--model ldm sees all)")
    for way, given in ways.items():
        for repeat in range(choices.repeat):
            seed = choices.seed + repeat
            drawn = draw_images(run, stage, tokens, images, choices, seed, given if (given >= 0).any() else None)
            label = "\n".join([f"{name}: {way} {repeat + 1}", *choices.pin])
            rows.append((label, framed(decode_tokens(run, drawn), (pinned >= 0).any(1, True))))
            for index, indices in zip(images.tolist(), drawn) if choices.words else ():
                print(f"\n{way} {repeat + 1} for image {index}\n{run.spell(indices)}\n")
    return rows


def framed(images, cells):
    """(B, 3, H, W) images with a white frame in each cell of (B, 1, h, w) that is True."""
    inside = F.interpolate(cells.float(), size=images.shape[2:])
    edge = inside.bool() & (F.max_pool2d(1 - inside, 3, 1, 1) > 0)
    return images.masked_fill(edge, 1.0)


def colours_of_labels(maps, count):
    """(B, R, R) labels → (B, 3, R, R) in [-1, 1], a colour each; −1 is black."""
    hue = torch.arange(count) * 0.618034 % 1  # the golden ratio keeps neighbours apart
    wheel = (hue[:, None] + torch.tensor([0.0, 1 / 3, 2 / 3])) * 2 * math.pi
    palette = torch.cat([wheel.cos() * 0.7, torch.full((1, 3), -1.0)])
    return palette[maps.where((maps >= 0) & (maps < count), count)].permute(0, 3, 1, 2)


# ======== Table 6

@torch.no_grad()
def likelihood(run, stage, tokens):
    """Bits of each image's tokens under a transformer → (N, M) float64."""
    network, config, count, _ = stage
    bits = []
    for rows in torch.arange(len(tokens.labels)).split(config.batch_size):
        known = known_of(config, tokens, rows, run.device, count)
        images = tokens.indices[rows].to(run.device)
        logits = [part.float().mT for part in network(images, known)]
        losses = [F.cross_entropy(part, images[:, i].flatten(1), reduction="none") for i, part in enumerate(logits)]
        bits.append(torch.stack(losses, dim=1).cpu().double().sum(2) / math.log(2))
    return torch.cat(bits)


def evaluate_stage(run, stage, choices, inception):
    """One row of Table 6 → dict, also in evaluation.json."""
    network, config, count, step = stage
    val_set, positions = tokens_of(run, "val", 1, config.model == "ldm"), math.prod(run.model.grid)
    condition_count(config, val_set, most=count)
    result = {"run": str(run.path), "model": config.model, "condition": config.condition, "step": step}
    if config.model == "gpt":
        bits, train_set = likelihood(run, stage, val_set), tokens_of(run, "train", config.views)
        result["bits"] = dict(zip(run.token_names, (bits.mean(0) / positions).tolist()))
        result["bits_image"] = float(bits.sum(1).mean())
        result["bits_uniform"] = sum(map(math.log2, run.model.sizes)) * positions
        result["bits_unigram"] = 0.0  # of the training split's frequencies, one added to each code
        for i, size in enumerate(run.model.sizes):
            counts = torch.bincount(train_set.indices[:, i].flatten(), minlength=size).double() + 1
            bits_of_codes = -(counts / counts.sum()).log2()
            result["bits_unigram"] += float(bits_of_codes[val_set.indices[:, i].flatten()].mean()) * positions
        result["bits_per_bit"] = result["bits_image"] / result["bits_uniform"]
    else:
        result["noise"] = validation(config, run, count, network, val_set, range(len(val_set.labels)))["noise"]
    scores, features, done = [], ([], []), 0
    if inception is not None:  # as many samples as there are evaluation images
        drawn = draw_images(run, stage, val_set, torch.arange(len(val_set.labels)), choices, choices.seed)
    for x, batch in run.batches(run.dataset("val")):
        rows = torch.arange(done, done + len(x))
        scores.append(psnr(decode_tokens(run, val_set.indices[rows]), x.cpu()))
        if inception is not None:
            for kept, images in zip(features, (batch["image"], to_bytes(decode_tokens(run, drawn[rows])))):
                kept.append(inception(images.to(run.device)).cpu().double())
        done += len(x)
    result["psnr"] = torch.cat(scores).mean().item()
    result["fid"] = fid(*(torch.cat(kept).numpy() for kept in features)) if inception is not None and done > 1 else None
    with atomic_write(stage_folder(run, config, run.results) / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1))
    return result


COLUMNS = {  # of Table 6: name in evaluation.json → title, format
    "fid": ("FID ↓", ".2f"),
    "bits_image": ("bits per image ↓", ",.1f"),
    "bits_per_bit": ("over uniform ↓", ".3f"),
    "bits_unigram": ("unigram", ",.0f"),
    "bits_uniform": ("uniform", ",.0f"),
    "noise": ("noise error ↓", ".4f"),
    "psnr": ("PSNR of its tokens, dB ↑", ".2f"),
}


def print_table(runs, choices, path=""):
    """The sub-command evaluate: a table of every second stage of every run; path: of Inception's weights."""
    (inception, reason), results = load_or_reason(load_inception, path), []
    for run in runs:
        for best in sorted((run.path / "synthesis").glob("*/best.pt")):
            network = inception and inception.to(run.device)
            try:
                results.append(evaluate_stage(run, load_stage(run, best.parent), choices, network))
            except UserError as error:
                print(f"not in the table: {error}")
    if not results:
        raise UserError(f"no second stage in {', '.join(str(run.path) for run in runs)}; train makes one")
    rows = [["run", "model", "condition", "bits per position ↓", *(title for title, _ in COLUMNS.values())]]
    for result in results:
        parts = " + ".join(f"{value:.3f}" for value in result.get("bits", {}).values()) or "–"
        cells = ["–" if result.get(name) is None else format(result[name], form) for name, (_, form) in COLUMNS.items()]
        rows.append([result["run"], result["model"], result["condition"], parts, *cells])
    print(as_markdown(rows) + "\n")
    if reason:
        print(f"FID: – ({reason})")
    else:
        warn_of_fid(min(len(run.dataset("val")) for run in runs))


# ======== Command line

def convert(run, photographs, split, decode, output, words):
    """The sub-command tokens: encode photographs or a split, or decode a file."""
    if photographs:
        path = Path(output or run.path / "photographs.png")
        x = torch.cat([run.read(photograph) for photograph in photographs])
        indices, words = run.model.encode(x), words or range(len(x))
        draw_grid([("original", x, photographs), ("from its tokens", run.model.decode(indices))], path)
        print(f"{path}: each image above what its tokens give")
    elif decode:
        with user_error(f"'{decode}' is no token file of this run: {{}}"):
            arrays, shape = dict(np.load(decode)), (len(run.model.sizes), *run.model.grid)
            if arrays["indices"].dtype.kind not in "iu" or arrays["indices"].shape[1:] != shape:
                raise ValueError(f"its indices are not whole numbers of shape {('images', *shape)}")
            indices, sizes = torch.from_numpy(arrays["indices"]).long(), torch.tensor(run.model.sizes)[:, None, None]
            if arrays["tokenizer"] != run.tokenizer or (indices < 0).any() or (indices >= sizes).any():
                raise ValueError("it was made by another tokenizer")
        folder = Path(output or run.path / "decoded")
        images = (image for part in indices.split(run.config.batch_size) for image in decode_tokens(run, part))
        for index, image in enumerate(images):
            save_png(TF.to_pil_image(to_bytes(image)), folder / f"{index:06d}.png")
        print(f"{folder}: {len(indices):,} images")
    else:
        if output and not output.endswith(".npz"):
            raise UserError(f"--output {output} must end in .npz")
        indices, path = tokens_of(run, split).indices, run.results / f"tokens-{split}.npz"
        if output:
            with atomic_write(output) as part:
                part.write_bytes(path.read_bytes())
        print(f"{output or path}: {len(indices):,} images of {run.model.grid} positions, {' + '.join(run.token_names)}")
    for index in words:
        if not 0 <= index < len(indices):
            raise UserError(f"--words {index}: there are images 0 … {len(indices) - 1}")
        print(f"\n{photographs[index] if photographs else f'image {index}'}\n{run.spell(indices[index])}")


def parse(argv=None):
    """Command line → dict: `command`, `runs`, and its flags."""
    argv = sys.argv[1:] if argv is None else argv
    starts = (i for i, word in enumerate(argv) if word in COMMANDS or word.startswith("-"))
    at = next(starts, min(1, len(argv[1:])))  # runs come before it
    parser = Parser(description=__doc__, usage="%(prog)s RUN [RUN ...] COMMAND ...; train and tokens take one RUN")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, (kind, what) in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what, prog=f"{parser.prog} RUN {name}")
        sub.add_argument("--data", default="", help="where the data set lies now, under its old name, or another one")
        sub.add_argument("--labels", default="", help="folder of label maps, of a run with --dataset folder")
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
        if kind:
            sub.add_fields(kind)
        if name == "train":
            start = sub.add_mutually_exclusive_group()
            start.add_argument("--resume", action="store_true", help="go on from its last checkpoint")
            start.add_argument("--overwrite", action="store_true", help="replace one of the same name")
        elif name == "complete":
            sub.add_argument("--part", default="top", help="known: top, bottom, left, right, or a picture's white")
        elif name == "evaluate":
            sub.add_argument("--inception", default="", help="local copy of FID's weights; without any, FID is a dash")
        elif name == "tokens":
            what = sub.add_mutually_exclusive_group()
            what.add_argument("photographs", nargs="*", default=(), metavar="PHOTO", help="images to read as words")
            what.add_argument("--split", default="val", choices=("train", "val"), help="split to encode")
            what.add_argument("--decode", default="", help="token file to turn back into images")
            sub.add_argument("--output", default="", help="PNG of photographs, token file, or folder of --decode")
            sub.add_argument("--words", default=(), nargs="+", type=int, help="images to print as words, by number")
    if argv[:1] and argv[0] in COMMANDS and not {"-h", "--help"} & set(argv):
        parser.error(f"name a run of train.py before {argv[0]}")
    return {**vars(parser.parse_args(argv[at:])), "runs": argv[:at]}


COMMANDS = {  # sub-command → its flags' dataclass, what it does
    "train": (SynthesisConfig, f"Train a second stage on a run's tokens; for tokenizers of the tiny preset {TINY}."),
    "sample": (Drawing, "Draw images for conditions, or with words in their places."),
    "complete": (Drawing, "Keep a part of images and draw the rest: Fig. 8."),
    "evaluate": (Sampling, "Table 6: FID and likelihood of every second stage."),
    "tokens": (None, "Images to tokens and words, and back."),
}


def main(argv=None):
    """Run a sub-command on some runs, whose tokenizers do not change."""
    args = parse(argv)
    torch.backends.cudnn.allow_tf32 = False  # so that tokens are those of a CPU
    name, where = args.pop("command"), [args.pop(flag) for flag in ("device", "data", "labels")]
    runs = [Run(path, *where) for path in args.pop("runs")]
    if name in ("train", "tokens") and len(runs) > 1:
        raise UserError(f"{name} takes one run, not {len(runs)}")
    if name == "train":
        resume, overwrite = args.pop("resume"), args.pop("overwrite")
        train_stage(runs[0], args, resume, overwrite)
    elif name == "tokens":
        convert(runs[0], **args)
    elif name == "evaluate":
        inception = args.pop("inception")
        print_table(runs, Sampling(**args), inception)
    else:
        part = args.pop("part", "")
        draw_samples(runs, refuse_idle(Drawing(**args), args, MATTERS), part)


if __name__ == "__main__":
    launch(main)
