"""The second stage: images as tokens that read as words, and a model that draws them (paper §4.4, Table 6, Fig. 8).

    python synthesize.py runs/demo-vqct train --condition segmentation      a transformer of the run's tokens
    python synthesize.py runs/demo-vqct train --model ldm                   … or a denoiser of its features
    python synthesize.py runs/demo-vqct sample --condition segmentation     Fig. 8: label maps, originals, samples
    python synthesize.py runs/demo-vqct sample --complete top               the rest of an image, drawn
    python synthesize.py runs/demo-vqct sample --pin 3,4=red,breast         … with words in their places
    python synthesize.py runs/demo-vqct runs/demo-vqgan evaluate            Table 6
    python synthesize.py runs/demo-vqct tokens --words 0                    what image 0 reads as; tokens.npz in the run
    python synthesize.py runs/demo-vqct tokens --decode runs/demo-vqct/tokens.npz     and back to images

A token file holds `indices` (N, M, h, w), an adjective and a noun at each position (`--adjective-neighbours`
adjectives, where they are averaged), each codebook's `words`, `labels`, the names of the classes, label maps
where the data set has them, and the checksum of the tokenizer; numpy reads it without pickle. A second stage
lies in its run's folder, `synthesis/<model>-<condition>`.
"""

import argparse
import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw

from evaluate import frechet_distance, load_inception, to_bytes
from prior import SMALL, Progress, UserError, add_flags, checksum, command, load_arrays, option, save_arrays, save_png, whole_file
from train import (
    TrainBatches,
    code_words,
    codebook_names,
    load_checkpoint,
    load_run,
    make_dataset,
    make_loader,
    pick_device,
    save_grid,
    to_images,
    trim_metrics,
)
from vqct import Condition, Denoiser, TokenTransformer, sample_features, sample_tokens

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class SynthesisConfig:
    """A second stage. Defaults are for f16 tokenizers on a GPU; TINY changes some for tokenizers of the tiny preset."""

    model: str = option("gpt", "gpt: a transformer of the tokens; ldm: diffusion of the features before them", choices=("gpt", "ldm"))
    condition: str = option("none", "what a sample is drawn for", choices=("none", "class", "segmentation"))
    joint: bool = option(True, "gpt: a noun is predicted given its adjective; without, the two are independent heads, a control")
    width: int = option(768, "features of the transformer")
    depth: int = option(12, "blocks of the transformer")
    heads: int = option(12, "attention heads, dividing the width")
    dropout: float = option(0.1, "share of features zeroed in training")
    drop_condition: float = option(0.1, "share of training images without their condition, for classifier-free guidance")
    steps: int = option(200_000, "optimizer steps")
    batch_size: int = option(32, "images a micro-step")
    accumulate: int = option(1, "micro-steps whose gradients are summed before each optimizer step")
    lr: float = option(3e-4, "AdamW's step size, by a cosine to a tenth of it")
    warmup: int = option(500, "steps over which it rises from 0")
    weight_decay: float = option(0.01, "AdamW's, of matrices")
    ema: float = option(0.9999, "decay of the averaged weights that sample and are evaluated")
    amp: bool = option(True, "bfloat16 autocast on CUDA")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the first of cuda, mps, cpu that is there")
    seed: int = option(0, "of weights, data order and dropout")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    eval_every: int = option(1_000, "steps between validations and checkpoints")


BOUNDS = (
    ("steps batch_size accumulate log_every eval_every width depth heads", lambda value: value >= 1, "be at least 1"),
    ("dropout drop_condition ema", lambda value: 0 <= value < 1, "lie in [0, 1)"),
    ("lr", lambda value: value > 0, "be positive"),
    ("warmup weight_decay seed", lambda value: value >= 0, "not be negative"),
)
TINY = dict(width=192, depth=4, heads=4, steps=800, lr=1e-3, warmup=50, ema=0.99, eval_every=200)
VERSION = 1  # of a second stage's checkpoint


# ---------------------------------------------------------------------------------------------
# Tokens


class Tokens(NamedTuple):
    """A data set as the second stage sees it; arrays in memory."""

    indices: torch.Tensor  # (N, M, h, w) int64
    labels: torch.Tensor  # (N,) int64, −1: none
    segmentation: torch.Tensor | None  # (N, R, R) int16, −1: says nothing
    features: torch.Tensor | None = None  # (N, C, h, w) float32, before quantization


@torch.no_grad()
def encode_dataset(model, dataset, device, batch_size, with_features=False):
    """Every image of a dataset → Tokens."""
    dataset.with_segmentation = True
    kept, progress = {name: [] for name in Tokens._fields}, Progress()
    for batch in make_loader(dataset, device, -1, batch_size=batch_size):
        features = model.features(to_images(batch["image"], device))
        kept["indices"].append(model.snap(features).cpu())
        kept["labels"].append(batch["label"])
        kept["segmentation"] += [batch["segmentation"].short()] if "segmentation" in batch else []
        kept["features"] += [torch.cat(features, dim=1).float().cpu()] if with_features else []
        progress(f"encoding: {sum(map(len, kept['labels'])):,}/{len(dataset):,} images")
    tokens = Tokens(**{name: torch.cat(parts) if parts else None for name, parts in kept.items()})
    if tokens.segmentation is not None:
        tokens.segmentation[tokens.segmentation == dataset.unlabeled] = -1
    return tokens


def tokens_of(run, split, with_features=False):
    """A split of a run's data set as Tokens, encoded once and kept in the run under the tokenizer's checksum and the data's place."""
    path, config = run.path / f"tokens{'' if split == 'val' else '-train'}.npz", run.config
    source = json.dumps([config.dataset, str(Path(config.data).resolve()), config.labels, config.skip_broken])
    if path.is_file() and not with_features:
        try:
            arrays = load_arrays(path, TOKEN_FILE, "token file", "python synthesize.py RUN tokens")
        except UserError as error:
            print(f"{error}: made anew")
            arrays = {"tokenizer": "", "source": ""}
        if (str(arrays["tokenizer"]), str(arrays["source"])) == (run.tokenizer, source):
            maps = torch.from_numpy(arrays["segmentation"])
            return Tokens(
                torch.from_numpy(arrays["indices"]).long(), torch.from_numpy(arrays["labels"]).long(), maps if len(maps) else None
            )
    dataset = make_dataset(config, split)
    tokens = encode_dataset(run.model, dataset, run.device, config.batch_size, with_features)
    save_tokens(path, tokens, code_words(run.prior, run.model.codebook.sizes), dataset.classes, run.tokenizer, source)
    return tokens


TOKEN_FILE = ("indices", "labels", "segmentation", "classes", "tokenizer", "source")


def save_tokens(path, tokens, words, classes, tokenizer, source):
    """Write a token file, whole or not at all."""
    maps = np.zeros((0,), np.int16) if tokens.segmentation is None else tokens.segmentation.numpy()
    listed = {f"{name}_words": np.array(names) for name, names in zip(codebook_names(words), words)}
    arrays = dict(indices=tokens.indices.int().numpy(), labels=tokens.labels.numpy(), segmentation=maps)
    save_arrays(path, **arrays, classes=np.array(classes, dtype=str), tokenizer=tokenizer, source=source, **listed)


def load_tokens(path, tokenizer, sizes):
    """Indices of a token file. Raises UserError where it is missing, something else, or of another tokenizer."""
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
    ):
        raise UserError(f"'{path}' holds indices that are not {len(sizes)} tokens a position of {sizes} codes")
    return indices


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


def draw_words(image, indices, words, path, cell=84):
    """An image in [-1, 1], enlarged, with what each of its tokens reads as written into its place → PNG."""
    height, width = indices.shape[1:]
    picture = TF.to_pil_image(to_bytes(image)).resize((width * cell, height * cell), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for row, column in np.ndindex(height, width):
        text = "\n".join(names[index] for names, index in zip(words, indices[:, row, column]))
        place = ((column + 0.5) * cell, (row + 0.5) * cell)
        draw.multiline_text(place, text, "white", SMALL, anchor="mm", align="center", stroke_width=1, stroke_fill="black")
    save_png(picture, path)


# ---------------------------------------------------------------------------------------------
# A tokenizer's run, and the second stages in it


class Run:
    """A trained first stage: model in evaluation mode, config, prior, and the tokenizer's checksum."""

    def __init__(self, path, device):
        self.path, self.device = Path(path), device
        self.model, self.config, self.prior, _ = load_run(path, device)
        self.tokenizer = checksum(self.path / "last.pt")
        self.sizes = per_token(self.model, self.model.codebook.sizes)


def known_of(config, tokens, rows, device, count):
    """What a Condition is told of some images: None, classes (B,), or label shares (B, L, h, w)."""
    if config.condition == "none":
        return None
    if config.condition == "class":
        return tokens.labels[rows].to(device)
    maps, (height, width) = tokens.segmentation[rows].to(device).long(), tokens.indices.shape[2:]
    cells = maps.unflatten(1, (height, -1)).unflatten(3, (width, -1)).transpose(2, 3).flatten(3).flatten(1, 2)  # (B, N, f²)
    cells = cells.where((cells >= 0) & (cells < count), count)
    shares = torch.zeros(*cells.shape[:2], count + 1, device=device).scatter_add_(2, cells, torch.ones_like(cells, dtype=torch.float))
    return (shares[:, :, :count] / cells.shape[2]).mT.unflatten(2, (height, width))


def condition_count(config, *splits):
    """Classes, or labels, of all splits. Raises UserError where the data set has none."""
    if config.condition == "none":
        return 0
    values = [tokens.labels if config.condition == "class" else tokens.segmentation for tokens in splits]
    if any(part is None or part.max() < 0 for part in values):
        raise UserError(
            f"--condition {config.condition}: this run's data set has no {'classes' if config.condition == 'class' else 'label maps'}"
        )
    return max(int(part.max()) for part in values) + 1


def make_network(config, run, count):
    """The network that a SynthesisConfig names, for a tokenizer."""
    condition = Condition(config.condition, count, config.width)
    shape = dict(width=config.width, depth=config.depth, heads=config.heads, dropout=config.dropout)
    if config.model == "gpt":
        return TokenTransformer(run.sizes, run.model.grid, condition, **shape, joint=config.joint).to(run.device)
    return Denoiser(run.model.code_dim * len(run.model.codebook.sizes), run.model.grid, condition, **shape).to(run.device)


def stage_folder(run, config):
    """Where a second stage lies."""
    return run.path / "synthesis" / "-".join([config.model, config.condition, *["independent"] * (not config.joint)])


def load_stage(run, config):
    """A trained second stage → (network of the averaged weights in evaluation mode, its SynthesisConfig, count, step)."""
    folder = stage_folder(run, config)
    if not (folder / "last.pt").is_file():
        raise UserError(
            f"no second stage in '{folder}'; train one with: python synthesize.py {run.path} train --model {config.model} --condition {config.condition}"
        )
    state = load_checkpoint(folder / "last.pt")
    if state["tokenizer"] != run.tokenizer:
        raise UserError(f"'{folder}' was trained on tokens of another state of '{run.path}'; train it anew with train --overwrite")
    stored = SynthesisConfig(**state["config"])
    network = make_network(stored, run, state["count"])
    network.load_state_dict(state["ema"])
    return network.eval(), stored, state["count"], state["step"]


# ---------------------------------------------------------------------------------------------
# Training


def token_losses(network, tokens, known, drop=None):
    """Mean negative log-likelihood, nats a token, of each of the M tokens of a position → list of () tensors."""
    logits = network(tokens, known, drop)
    return [F.cross_entropy(part.float().mT, tokens[:, i].flatten(1)) for i, part in enumerate(logits)]


class StageTrainer:
    """State of a second stage's training and its step."""

    def __init__(self, config, run, train_set, count):
        torch.manual_seed(config.seed)
        self.config, self.run, self.count, self.step = config, run, count, 0
        self.network = make_network(config, run, count)
        if config.model == "ldm":
            self.network.mean.copy_(train_set.features.mean(dim=(0, 2, 3)).view(-1, 1, 1))
            self.network.std.copy_(train_set.features.std(dim=(0, 2, 3)).clamp_min(1e-6).view(-1, 1, 1))
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        matrices = [parameter for parameter in self.network.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.network.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=run.device.type == "cuda")

    def state(self):
        """Everything that resuming and sampling need, as plain tensors, numbers and strings."""
        return {
            "version": VERSION,
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "count": self.count,
            "tokenizer": self.run.tokenizer,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            **({"cuda_random": torch.cuda.get_rng_state(self.run.device)} if self.run.device.type == "cuda" else {}),
        }

    def load(self, state):
        """Go on from a checkpoint of `state`."""
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if "cuda_random" in state and self.run.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.run.device)

    def loss(self, network, tokens, rows, drop=None):
        """What is minimised, and its parts by name."""
        known = known_of(self.config, tokens, rows, self.run.device, self.count)
        if self.config.model == "ldm":
            loss = network.loss(tokens.features[rows].to(self.run.device), known, drop)
            return loss, {"noise": loss}
        parts = token_losses(network, tokens.indices[rows].to(self.run.device), known, drop)
        names = part_names(self.run)
        return sum(parts), {name: part / math.log(2) for name, part in zip(names, parts)}

    def train_step(self, tokens, batches):
        """One step on a list of index lists → dict of () tensors."""
        config, device = self.config, self.run.device
        progress = min(1.0, (self.step + 1) / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * progress * (0.55 + 0.45 * math.cos(math.pi * self.step / config.steps))
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {}
        for rows in batches:
            drop = torch.rand(len(rows), device=device) < config.drop_condition if config.condition != "none" else None
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp and device.type == "cuda"):
                loss, parts = self.loss(self.network, tokens, rows, drop)
            (loss / len(batches)).backward()
            for name, value in {"loss": loss, **parts}.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() / len(batches)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))  # a short run is not weighed down by its first weights
        for average, parameter in zip(self.ema.parameters(), self.network.parameters()):
            average.lerp_(parameter.detach(), 1 - decay)
        return metrics

    @torch.no_grad()
    def validate(self, tokens):
        """The averaged weights' loss over a split, its parts by name → dict of floats."""
        network, totals = self.ema.eval(), {}
        with torch.random.fork_rng(devices=[self.run.device] if self.run.device.type == "cuda" else []):
            torch.manual_seed(0)  # ldm's noise: the same at each validation
            for rows in torch.arange(len(tokens.labels)).split(self.config.batch_size):
                loss, parts = self.loss(network, tokens, rows)
                for name, value in {"loss": loss, **parts}.items():
                    totals[name] = totals.get(name, 0.0) + value * len(rows) / len(tokens.labels)
        return {name: float(value) for name, value in totals.items()}


def part_names(run):
    """("adjective", "noun"), ("code",), or with a number where a position has several of one codebook."""
    names = per_token(run.model, codebook_names(run.model.codebook.sizes))
    return [name if names.count(name) == 1 else f"{name}{i + 1}" for i, name in enumerate(names)]


def train(args, runs):
    """The sub-command: train a second stage on a run's tokens."""
    (run,) = one(runs, "train")
    config = stage_config(args, run)
    folder = stage_folder(run, config)
    state = load_checkpoint(folder / "last.pt") if args.resume else None
    if state is None and (folder / "last.pt").exists() and not args.overwrite:
        raise UserError(f"'{folder}' exists already; go on with --resume, or replace it with --overwrite")
    fixed = [name for name, value in args.given.items() if state and name not in ("device", "steps") and value != state["config"][name]]
    if fixed:
        raise UserError(
            f"--resume cannot change --{fixed[0].replace('_', '-')} from {state['config'][fixed[0]]!r}; train anew with --overwrite"
        )
    if state is not None and state["tokenizer"] != run.tokenizer:
        raise UserError(f"'{folder}' was trained on tokens of another state of '{run.path}'; train it anew with --overwrite")
    with_features = config.model == "ldm"
    train_set, val_set = (tokens_of(run, split, with_features) for split in ("train", "val"))
    if config.batch_size > len(train_set.labels):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(train_set.labels)} training images")
    if state is not None:
        config = SynthesisConfig(**{**state["config"], "device": config.device, "steps": args.given.get("steps", state["config"]["steps"])})
    trainer = StageTrainer(config, run, train_set, condition_count(config, train_set, val_set) if state is None else state["count"])
    if state is None:
        for name in ("last.pt", "evaluation.json"):  # of one that is overwritten
            (folder / name).unlink(missing_ok=True)
    else:
        trainer.load(state)
        trim_metrics(folder / "metrics.jsonl", trainer.step)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=1))
    weights = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
    print(
        f"{config.model}, condition {config.condition}: {weights:.1f} M parameters on {run.device}, {len(train_set.labels):,} images of "
        f"{'×'.join(map(str, run.model.grid))} positions → {folder}"
    )
    with open(folder / "metrics.jsonl", "a" if state else "w", buffering=1) as log:
        run_steps(trainer, train_set, val_set, folder, log)
    print(
        f"done: {folder / 'last.pt'}; look at samples with: python synthesize.py {run.path} sample --model {config.model} --condition {config.condition}"
    )


def run_steps(trainer, train_set, val_set, folder, log):
    """The loop: step, log, validate, save."""
    config, progress, began, first = trainer.config, Progress(), time.monotonic(), trainer.step
    steps = (trainer.step * config.accumulate, config.steps * config.accumulate)
    batches = iter(TrainBatches(len(train_set.labels), config.batch_size, *steps, config.seed))
    while trainer.step < config.steps:
        metrics = trainer.train_step(train_set, [[index for index, _ in next(batches)] for _ in range(config.accumulate)])
        last = trainer.step == config.steps
        if trainer.step % config.log_every == 0 or last:
            line = {"step": trainer.step, **{name: value.item() for name, value in metrics.items()}}
            if not math.isfinite(line["loss"]):
                raise UserError(
                    f"the loss is not finite at step {trainer.step}; the last checkpoint is '{folder / 'last.pt'}'; try a lower --lr"
                )
            seconds = (time.monotonic() - began) / (trainer.step - first)
            left = int((config.steps - trainer.step) * seconds)
            log.write(json.dumps(line) + "\n")
            parts = " ".join(f"{name} {value:.3f}" for name, value in line.items() if name not in ("step", "loss"))
            unit = " bits a token" if config.model == "gpt" else ""
            speed = config.batch_size * config.accumulate / seconds
            progress(
                f"step {trainer.step:,}/{config.steps:,} loss {line['loss']:.3f} {parts}{unit} {speed:.3g} images/s left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            )
        if trainer.step % config.eval_every == 0 or last:
            scores = trainer.validate(val_set)
            log.write(json.dumps({"step": trainer.step, **{f"validation_{name}": value for name, value in scores.items()}}) + "\n")
            parts = ", ".join(
                f"{name} {value:.3f}" + (f" bits (perplexity {2**value:,.0f})" if config.model == "gpt" else "")
                for name, value in scores.items()
                if name != "loss"
            )
            progress(f"step {trainer.step:,}: validation {parts}", now=True)
            with whole_file(folder / "last.pt") as temporary:
                torch.save(trainer.state(), temporary)


# ---------------------------------------------------------------------------------------------
# Sampling


def check_choices(args):
    """Raise UserError for flags of sampling that cannot be."""
    if args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1 or args.sampling_steps < 1:
        raise UserError("--temperature and --top-k must not be negative, --top-p lie in (0, 1], --sampling-steps be at least 1")
    if getattr(args, "number", 1) < 1 or getattr(args, "repeat", 1) < 1:
        raise UserError("--number and --repeat must be at least 1")


def draw_images(run, stage, tokens, rows, args, seed, given=None):
    """Samples for the conditions of some images → (B, M, h, w) indices, a batch at a time.

    Args:
        stage: of `load_stage`; tokens: Tokens of the images, with features where `ldm` keeps some; rows: their indices.
        given: (B, M, h, w) int64 tokens to keep, −1 where they are to be drawn.
    """
    network, config, count, _ = stage
    generator, drawn = torch.Generator(run.device).manual_seed(seed), []
    for part in torch.arange(len(rows)).split(config.batch_size):
        known = known_of(config, tokens, rows[part], run.device, count)
        kept = None if given is None else given[part].to(run.device)
        if config.model == "gpt":
            choice = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
            drawn.append(sample_tokens(network, len(part), known, kept, args.scale, generator, **choice).cpu())
            continue
        features, mask = (None, None) if kept is None else given_features(run, tokens, rows[part], kept)
        z = sample_features(network, len(part), known, features, mask, args.scale, args.sampling_steps, generator)
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
    features = tokens.features[rows].to(run.device).chunk(len(run.model.codebook.sizes), dim=1)
    own, kept, masks = run.model.by_codebook(tokens.indices[rows].to(run.device)), [], []
    for z, codebook, index, true in zip(features, run.model.codebook(), run.model.by_codebook(given), own):
        mask, put = (index >= 0).all(dim=1, keepdim=True), ((index >= 0) & (index != true)).any(dim=1, keepdim=True)
        if put.any() and run.config.quantizer == "gumbel":
            raise UserError("--pin with --model ldm needs codes that are features; Gumbel-VQ's are not")
        vectors = codebook[index.clamp_min(0)].mean(dim=1).permute(0, 3, 1, 2)  # (B, D, h, w)
        kept.append(torch.where(put, vectors, z) if put.any() else z)
        masks.append(mask.expand_as(z))
    return torch.cat(kept, dim=1), torch.cat(masks, dim=1)


def given_tokens(run, tokens, rows, complete, pins):
    """What of some images is given: a known part, and words in their places → (B, M, h, w) int64, −1 elsewhere.

    Args:
        complete: "", "top", "bottom", "left", "right", or a PNG whose white pixels are known.
        pins: list of "row,column=adjective,noun"; a word may be left out.
    Raises:
        UserError: for a position or a word that is not there.
    """
    height, width = run.model.grid
    known = torch.zeros(height, width, dtype=torch.bool)
    halves = {"top": (slice(0, height // 2), slice(None)), "bottom": (slice(height // 2, None), slice(None))}
    halves |= {"left": (slice(None), slice(0, width // 2)), "right": (slice(None), slice(width // 2, None))}
    if complete in halves:
        known[halves[complete]] = True
    elif complete:
        try:
            with Image.open(complete) as file:
                known = torch.from_numpy(np.asarray(file.convert("L").resize((width, height), Image.Resampling.BOX)) > 127)
        except OSError as error:
            raise UserError(f"--complete {complete}: neither top, bottom, left or right, nor a PNG mask ({error})") from None
    given = torch.where(known, tokens.indices[rows], -1)
    lists = per_token(run.model, code_words(run.prior, run.model.codebook.sizes))
    for pin in pins:
        place, _, words = pin.partition("=")
        try:
            row, column = map(int, place.split(","))
            names = words.split(",")
            for i, (name, listed) in enumerate(zip(names, lists)):
                if name:
                    given[:, i, row, column] = listed.index(name)
            if len(names) > len(lists) or not (0 <= row < height and 0 <= column < width):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(f"--pin {pin}: expected row,column=word,word within {height}×{width}, of this run's words") from None
    return given


def colours_of_labels(maps, count):
    """(B, R, R) labels → (B, 3, R, R) in [-1, 1], a colour each; −1 is black."""
    hue = torch.arange(count) * 0.618034 % 1  # the golden ratio keeps neighbours apart
    wheel = (hue[:, None] + torch.tensor([0.0, 1 / 3, 2 / 3])) * 2 * math.pi
    palette = torch.cat([wheel.cos() * 0.7, torch.full((1, 3), -1.0)])
    return palette[maps.where((maps >= 0) & (maps < count), count)].permute(0, 3, 1, 2)


def sample(args, runs):
    """The sub-command: Fig. 8's grid. Rows: condition, originals, known part, samples of each run; a column an image."""
    rows_of_picture, printed = [], []
    for run in runs:
        stage = load_stage(run, stage_config(args, run))
        tokens = tokens_of(run, "val", with_features=args.model == "ldm" and bool(args.complete or args.pin))
        if run.config.resolution != runs[0].config.resolution or run.config.dataset != runs[0].config.dataset:
            raise UserError(f"'{run.path}' is of another resolution or data set than '{runs[0].path}', so their samples share no picture")
        count = len(tokens.labels)
        rows = torch.tensor(args.images or np.linspace(0, count - 1, min(args.number, count)).astype(int).tolist())
        if rows.max() >= count or rows.min() < 0:
            raise UserError(f"--images {rows.max()}: there are images 0 … {count - 1}")
        if args.label:
            names = make_dataset(run.config, "val", check=False).classes
            if args.label not in names[: stage[2]] or stage[1].condition != "class":
                raise UserError(f"--label {args.label}: needs --condition class and one of {', '.join(names)}")
            tokens = tokens._replace(labels=torch.full_like(tokens.labels, names.index(args.label)))
        given = given_tokens(run, tokens, rows, args.complete, args.pin)
        decode = lambda indices: list(decode_tokens(run.model, indices, run.device, run.config.batch_size))
        if not rows_of_picture:
            if stage[1].condition == "segmentation":
                rows_of_picture += list(colours_of_labels(tokens.segmentation[rows].long(), stage[2]))
            dataset = make_dataset(run.config, "val", check=run.config.skip_broken)  # for the numbers of those left
            rows_of_picture += list(to_images(torch.stack([dataset[int(row)]["image"] for row in rows]), torch.device("cpu")))
        if args.complete:
            shown = (given_tokens(run, tokens, rows, args.complete, [])[:, :1] >= 0).repeat_interleave(
                run.config.resolution // given.shape[2], 2
            )
            shown = shown.repeat_interleave(run.config.resolution // given.shape[3], 3)
            rows_of_picture += [torch.where(mask, image, 0) for mask, image in zip(shown, decode(tokens.indices[rows]))]
        for repeat in range(args.repeat):
            drawn = draw_images(run, stage, tokens, rows, args, args.seed + repeat, given if args.complete or args.pin else None)
            images = decode(drawn)
            rows_of_picture += images
            printed += [(run, index, tokens, image) for index, tokens, image in zip(rows.tolist(), drawn, images)] if args.words else []
    path = Path(args.output or stage_folder(runs[0], stage_config(args, runs[0])) / "samples.png")
    save_grid(rows_of_picture, path, len(rows))
    print(f"{path}: {len(rows)} columns, {len(rows_of_picture) // len(rows)} rows")
    for number, (run, index, drawn, image) in enumerate(printed):
        words = per_token(run.model, code_words(run.prior, run.model.codebook.sizes))
        picture = path.with_name(f"{path.stem}-words-{number}.png")
        draw_words(image, drawn, words, picture)
        print(f"\n{run.path}, image {index}, {picture}\n{words_of(drawn, words)}")


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


def evaluate_stage(run, stage, args, inception):
    """One row of Table 6 → dict."""
    network, config, count, step = stage
    train_set, val_set = (tokens_of(run, split) for split in ("train", "val"))
    positions = math.prod(run.model.grid)
    result = {"run": str(run.path), "model": config.model, "condition": config.condition, "joint": config.joint, "step": step}
    if config.model == "gpt":
        bits = likelihood(run, stage, val_set)
        result["bits"] = dict(zip(part_names(run), (bits.mean(0) / positions).tolist()))
        result["bits_image"] = float(bits.sum(1).mean())
        result["bits_uniform"] = sum(map(math.log2, run.sizes)) * positions
        result["bits_unigram"] = sum(unigram_bits(train_set, val_set, run.sizes)) * positions
        if config.condition == "segmentation":
            other = likelihood(run, stage, val_set, torch.arange(len(bits)).roll(1))
            result["own_map_wins"] = float((bits.sum(1) < other.sum(1)).double().mean())
    path = run.path / "evaluation.json"
    result["psnr"] = json.loads(path.read_text())["psnr"] if path.is_file() else None
    result["fid"] = sampled_fid(run, stage, val_set, args, inception[0]) if inception[0] is not None else None
    result["fid_note"] = inception[1]
    with whole_file(stage_folder(run, config) / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


@torch.no_grad()
def sampled_fid(run, stage, tokens, args, network):
    """FID of as many samples as there are evaluation images against these, both at the run's resolution."""
    network, features = network.to(run.device), ([], [])
    loader = make_loader(make_dataset(run.config, "val", check=run.config.skip_broken), run.device, -1, batch_size=run.config.batch_size)
    for n, (batch, rows) in enumerate(zip(loader, torch.arange(len(tokens.labels)).split(run.config.batch_size))):
        drawn = decode_tokens(run.model, draw_images(run, stage, tokens, rows, args, args.seed + n), run.device, run.config.batch_size)
        for kept, images in zip(features, (batch["image"], to_bytes(drawn))):
            kept.append(network(images.to(run.device)).cpu())
    moments = [
        part
        for kept in features
        for part in (torch.cat(kept).double().numpy().mean(axis=0), np.cov(torch.cat(kept).double().numpy(), rowvar=False))
    ]
    return frechet_distance(*moments)


def evaluate(args, runs):
    """The sub-command: a table of every second stage of every run."""
    inception, results = load_inception(args.inception), []
    for run in runs:
        for path in sorted((run.path / "synthesis").glob("*/last.pt")):
            try:
                stage = load_stage(run, SynthesisConfig(**load_checkpoint(path)["config"]))
                results.append(evaluate_stage(run, stage, args, inception))
            except UserError as error:
                print(f"not in the table: {error}")
    if not results:
        raise UserError(f"no second stage in {', '.join(str(run.path) for run in runs)}; train one with: python synthesize.py RUN train")
    print(
        "| run | model | condition | FID ↓ | bits a position ↓ | bits an image ↓ | unigram | uniform | own map likelier | PSNR of the tokens |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    number = lambda value, form: "–" if value is None else format(value, form)
    for row in results:
        parts = " + ".join(f"{value:.2f}" for value in row["bits"].values()) if "bits" in row else "–"
        cells = [
            row["run"],
            row["model"] + ("" if row["joint"] else ", independent heads"),
            row["condition"],
            number(row["fid"], ".2f"),
            parts,
        ]
        cells += [number(row.get(name), ",.0f") for name in ("bits_image", "bits_unigram", "bits_uniform")]
        print("| " + " | ".join([*cells, number(row.get("own_map_wins"), ".1%"), number(row["psnr"], ".2f")]) + " |")
    if results[0]["fid"] is None:
        print(f"\nFID: – ({results[0]['fid_note']})")


# ---------------------------------------------------------------------------------------------
# Command line


def tokens(args, runs):
    """The sub-command: encode a split, or decode a file."""
    (run,) = one(runs, "tokens")
    if args.decode:
        folder = Path(args.output or run.path / "decoded")
        indices = load_tokens(args.decode, run.tokenizer, run.sizes)
        for start in range(0, len(indices), run.config.batch_size):
            part = decode_tokens(run.model, indices[start : start + run.config.batch_size], run.device, run.config.batch_size)
            for index, image in enumerate(part, start):
                save_png(TF.to_pil_image(to_bytes(image)), folder / f"{index:06d}.png")
        print(f"{folder}: {len(indices):,} images")
    else:
        kept = tokens_of(run, args.split)
        indices, path = kept.indices.numpy(), run.path / f"tokens{'' if args.split == 'val' else '-train'}.npz"
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(args.output) as temporary:
                temporary.write_bytes(path.read_bytes())
            path = Path(args.output)
        print(f"{path}: {len(indices):,} images of {'×'.join(map(str, indices.shape[2:]))} positions, {' + '.join(part_names(run))}")
    for index in args.words:
        if not 0 <= index < len(indices):
            raise UserError(f"--words {index}: there are images 0 … {len(indices) - 1}")
        print(f"\nimage {index}\n{words_of(indices[index], per_token(run.model, code_words(run.prior, run.model.codebook.sizes)))}")


def one(runs, name):
    """The runs, when they are one. Raises UserError otherwise."""
    if len(runs) != 1:
        raise UserError(f"{name} takes one run, not {len(runs)}")
    return runs


def stage_config(args, run):
    """The SynthesisConfig that flags name for a run: explicit flags before TINY's values."""
    small = TINY if run.config.preset == "tiny" else {}
    config = SynthesisConfig(**{**small, **args.given})
    for names, fits, what in BOUNDS:
        for name in names.split():
            if not fits(getattr(config, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must {what}")
    if config.width % (2 * config.heads):
        raise UserError(f"--width {config.width} must be a multiple of twice the {config.heads} heads")
    return config


def parse(argv=None):
    """Command line → namespace, its flags of SynthesisConfig in `given`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py; train and tokens take one")
    commands = parser.add_subparsers(required=True, metavar="train|sample|evaluate|tokens")

    def add(name, call, what):
        sub = commands.add_parser(name, help=what, description=what)
        sub.add_argument("--data", default="", help="where the data set lies now, if not where the run found it")
        sub.add_argument("--labels", default="", help="folder of label maps, of a run with --dataset folder")
        sub.add_argument("--skip-broken", action="store_true", help="leave out images that are missing or cannot be read")
        sub.set_defaults(call=call)
        return sub

    sub = add("train", train, "Train a second stage on a run's tokens.")
    add_flags(sub, SynthesisConfig())
    start = sub.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from its last checkpoint")
    start.add_argument("--overwrite", action="store_true", help="replace one of the same name")
    for name, call, what in (("sample", sample, "Draw images: Fig. 8."), ("evaluate", evaluate, "Table 6: FID and likelihood.")):
        sub = add(name, call, what)
        sub.add_argument("--temperature", type=float, default=1.0, help="gpt: of the logits; 0 takes the likeliest token (default: 1)")
        sub.add_argument("--top-k", type=int, default=0, help="gpt: only so many of the likeliest tokens; 0: all (default: 0)")
        sub.add_argument("--top-p", type=float, default=1.0, help="gpt: the fewest likely tokens with so much probability (default: 1)")
        sub.add_argument("--scale", type=float, default=1.0, help="of classifier-free guidance (default: 1, none)")
        sub.add_argument("--sampling-steps", type=int, default=50, help="ldm: steps of DDIM (default: 50)")
        sub.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
        if name == "sample":
            sub.add_argument("--model", choices=("gpt", "ldm"), default="gpt", help="which second stage (default: gpt)")
            sub.add_argument(
                "--condition", choices=("none", "class", "segmentation"), default="none", help="and which condition (default: none)"
            )
            sub.add_argument("--number", type=int, default=8, help="images, spread over the evaluation split (default: 8)")
            sub.add_argument("--images", type=int, nargs="+", metavar="INDEX", help="… or these")
            sub.add_argument("--label", default="", metavar="CLASS", help="class to draw instead of the images' own")
            sub.add_argument("--repeat", type=int, default=2, help="samples of each (default: 2)")
            sub.add_argument(
                "--complete",
                default="",
                metavar="PART",
                help="keep top, bottom, left, right, or a PNG's white part of each image, and draw the rest",
            )
            sub.add_argument("--pin", nargs="+", default=[], metavar="ROW,COLUMN=WORDS", help="words in their places: 3,4=red,breast")
            sub.add_argument("--words", action="store_true", help="print what the samples read as, and write it into a picture of each")
            sub.add_argument("--output", default="", help="PNG (default: samples.png beside the second stage)")
        else:
            sub.add_argument("--inception", default="", metavar="FILE", help="local copy of the Inception weights of FID")
    sub = add("tokens", tokens, "Images to tokens, and back.")
    sub.add_argument("--split", choices=("train", "val"), default="val", help="images to encode (default: val)")
    sub.add_argument("--output", default="", help="token file, or with --decode folder of images (default: in the run)")
    sub.add_argument("--decode", default="", metavar="FILE", help="a token file to turn back into images")
    sub.add_argument("--words", type=int, nargs="*", default=[], metavar="INDEX", help="images to print as words")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    args.given = {item.name: getattr(args, item.name) for item in dataclasses.fields(SynthesisConfig) if hasattr(args, item.name)}
    return args


def main(argv=None):
    """Run a sub-command on a run, or on several."""
    args = parse(argv)
    if hasattr(args, "temperature"):
        check_choices(args)
    runs = [Run(path, pick_device(args.given.get("device", "auto"))) for path in args.runs]
    for config in (run.config for run in runs):
        config.data, config.labels = args.data or config.data, args.labels or config.labels
        config.skip_broken = args.skip_broken or config.skip_broken
    args.call(args, runs)


if __name__ == "__main__":
    command(main)
