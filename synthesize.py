"""The second stage: images as words, and a model that draws them (Table 6, Fig. 8).

    python synthesize.py runs/demo-vqct train --condition segmentation
    python synthesize.py runs/demo-vqct complete
    python synthesize.py runs/demo-vqct sample --pin 3,4=red,breast --words
    python synthesize.py runs/demo-vqct runs/demo-vqgan evaluate
    python synthesize.py runs/demo-vqct tokens PHOTO.jpg --output photo.npz

A second stage is kept in its run, in `synthesis/<model>-<condition>`. A token file
holds `indices` (N, M, h, w), an adjective and a noun at each position, the words of
each codebook, and the tokenizer's checksum; numpy reads it without pickle.
"""

import copy
import hashlib
import json
import math
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from evaluate import as_markdown, fid, load_inception, load_or_reason, save_images, warn_of_fid
from prior import Parser, UserError, atomic_write, save_png, user_error
from train import (FONT, Run, add_start_flags, autocast, average_gradients, check_folder,
                   default_text, draw_grid, first_process_first, fit, fitting, hold_out,
                   identity, launch, load_checkpoint, lock, open_run, psnr, rank, refuse_idle,
                   restore, resumed_choices, spread_indices, to_bytes, train_batches)
from vqct import (Condition, Denoiser, TokenTransformer, look_up, option, sample_features,
                  sample_tokens)


# ======== Commands and their flags

@dataclass
class Stage:
    """The flags that name a second stage."""

    model: str = option("gpt", "gpt: a transformer of tokens; ldm: diffusion of their features",
                        choices=("gpt", "ldm"))
    condition: str = option(
        "none", "what the model is given: nothing, the class, or the label map",
        choices=("none", "class", "segmentation"))


@dataclass
class SynthesisConfig(Stage):
    """The flags of train. The defaults are for f16 tokenizers on a GPU."""

    width: int = option(768, "features of the transformer")
    depth: int = option(12, "blocks of the transformer")
    heads: int = option(12, "attention heads; the width is a multiple of twice this number")
    dropout: float = option(0.1, "share of features zeroed in training", most=0.99)
    drop_condition: float = option(
        0.1, "probability of dropping the condition in training, for guidance", most=0.99)
    views: int = option(8, "token grids of each image: its centre crop, and random crops")
    steps: int = option(200_000, "optimizer steps")
    batch_size: int = option(32, "images a step and process")
    lr: float = option(3e-4, "AdamW's step size, by a cosine to a tenth of it")
    warmup: int = option(500, "steps over which the step size rises from 0", least=0)
    weight_decay: float = option(0.01, "AdamW's weight decay of matrices")
    ema: float = option(0.9999, "decay of the averaged weights, which are evaluated", most=1)
    amp: bool = option(True, "bfloat16 autocast on CUDA (Ampere or newer)")
    deterministic: bool = option(False, "use only repeatable algorithms on CUDA (slower)")
    seed: int = option(0, "seed of weights, data order and dropout", least=0)
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    eval_every: int = option(1_000, "steps between validations and checkpoints")


TINY = dict(views=1, width=192, depth=4, heads=4, steps=800, lr=1e-3, warmup=50, ema=0.99,
            eval_every=200)
SMALL = {  # preset of the tokenizer → defaults in place of SynthesisConfig's
    "tiny": TINY,
    "demo": {**TINY, "width": 128, "steps": 500, "batch_size": 16, "eval_every": 100},
}
CHANGEABLE = "steps log_every eval_every deterministic".split()
MATTERS = {  # flags that matter only where this holds, and are refused elsewhere
    "temperature top_k": lambda config: config.model == "gpt",
    "sampling_steps": lambda config: config.model == "ldm",
    "guidance drop_condition": lambda config: config.condition != "none",
}


@dataclass
class Sampling:
    """The flags of evaluate, and of every draw."""

    temperature: float = option(1.0, "gpt: divides the logits; 0 takes the likeliest token")
    top_k: int = option(0, "gpt: draw from this many likeliest tokens; 0: from all", least=0)
    guidance: float = option(1.0, "scale of classifier-free guidance; 1: none")
    sampling_steps: int = option(50, "ldm: steps of DDIM")
    seed: int = option(0, "seed of the samples", least=0)


@dataclass
class Drawing(Sampling, Stage):
    """The flags of sample and complete."""

    count: int = option(8, "how many images, spread over the evaluation split")
    repeat: int = option(2, "samples of each image")
    pin: tuple = option((), "words in their places, ROW,COLUMN=WORDS: 3,4=red,breast", each=str)
    output: str = option("", "PNG (default: samples.png or completions.png of the second stage)")


COMMANDS = {  # name → the dataclass of its flags, what it does
    "train": (SynthesisConfig, "Train a second stage on a run's tokens."),
    "sample": (Drawing, "Draw images for conditions, or with words in their places."),
    "complete": (Drawing, "Keep a part of images and draw the rest: Fig. 8."),
    "evaluate": (Sampling, "Print Table 6: FID and likelihood of every second stage."),
    "tokens": (None, "Turn images into tokens and words, and tokens into images."),
}


def parse(argv=None):
    """Command line → dict: `command`, `runs`, and its flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(description=__doc__, usage="%(prog)s RUN [RUN ...] COMMAND [flags]")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, (kind, what) in COMMANDS.items():
        usage = f"{parser.prog} RUN {name}"
        command = commands.add_parser(name, help=what, description=what, prog=usage)
        command.add_argument("--data", default="", help="where the data set is now, or another one")
        command.add_argument("--labels", default="", help="where its label maps are now")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
        if kind:
            command.add_fields(kind, lambda flag, default: (
                "the only stage there is" if kind is Drawing and hasattr(Stage, flag)
                else default_text(flag, default, SMALL)))
        if name in ("sample", "complete", "tokens"):
            command.add_argument("--words", nargs="*", type=int, metavar="X",
                                 help="print the words of these images; without numbers, of all")
    add_own_flags(**commands.choices)
    starts = (i for i, word in enumerate(argv) if word in COMMANDS or word.startswith("-"))
    at = next(starts, 0)  # runs come before the command
    if at == 0 and not {"-h", "--help"} & set(argv):
        parser.error(f"name a command after a run of train.py: {', '.join(COMMANDS)}")
    return {**vars(parser.parse_args(argv[at:])), "runs": argv[:at]}


def add_own_flags(train, complete, evaluate, tokens, **others):
    """Add the flags that one command alone has to the parsers of these commands."""
    add_start_flags(train)
    complete.add_argument("--part", default="top", choices=("top", "bottom", "left", "right"),
                          help="the half that is kept; gpt sees it only above and to the left")
    evaluate.add_argument("--inception", default="", help="local copy of FID's weights")
    source = tokens.add_mutually_exclusive_group()
    source.add_argument("photographs", nargs="*", default=(), metavar="PHOTO",
                        help="photographs to turn into tokens and words")
    source.add_argument("--split", default="val", choices=("train", "val"),
                        help="split of the data set to turn into tokens")
    source.add_argument("--decode", default="", help="token file to turn into images")
    tokens.add_argument("--output", default="", help="token file, or folder for --decode")


def main(argv=None):
    """Run a command on some runs, whose tokenizers do not change."""
    given = parse(argv)
    torch.backends.cudnn.allow_tf32 = False  # so that tokens are those of a CPU
    name = given.pop("command")
    where = [given.pop(flag) for flag in ("device", "data", "labels")]
    runs = [Run(path, *where) for path in given.pop("runs")]
    if name in ("train", "tokens") and len(runs) > 1:
        raise UserError(f"{name} takes one run, not {len(runs)}")
    if name == "train":
        train_stage(runs[0], **given)
    elif name == "tokens":
        convert(runs[0], **given)
    elif name == "evaluate":
        inception = given.pop("inception")
        print_table(runs, Sampling(**given), inception)
    else:
        part, words = given.pop("part", ""), given.pop("words")
        choices = Drawing(**{**given, **only_stage(runs[0], given)})
        refuse_idle(choices, given, MATTERS)
        draw_samples(runs, choices, part, words)


def only_stage(run, given):
    """{"model", "condition"} of the only second stage of a run that has the given ones.

    Raises UserError if there is none, or more than one.
    """
    name = f"{given.get('model', '*')}-{given.get('condition', '*')}"
    names = [path.parent.name for path in run.path.glob(f"synthesis/{name}/best.pt")]
    if len(names) != 1:
        problem = "several second stages" if names else "no such second stage"
        stages = sorted(path.parent.name for path in run.path.glob("synthesis/*/best.pt"))
        raise UserError(f"{problem} in '{run.path}' (there: {', '.join(stages) or 'none'}); "
                        "train makes one, --model and --condition name one")
    return dict(zip(("model", "condition"), names[0].split("-")))


def convert(run, photographs, split, decode, output, words):
    """The command tokens: photographs or a split to tokens, or tokens to images."""
    path = output or run.results / f"tokens-{split}.npz"
    if decode:
        path, indices = Path(output or run.path / "decoded"), read_tokens(run, decode)
        for numbers in torch.arange(len(indices)).split(run.config.batch_size):
            save_images(path, numbers, to_bytes(decode_tokens(run, indices[numbers])))
    elif photographs:
        path, words = output or run.path / "photographs.png", words or []
        x = torch.cat([run.read(photograph) for photograph in photographs])
        indices = run.model.encode(x)
        if not output:
            names = [Path(photograph).name for photograph in photographs]
            draw_grid([("original", x, names),
                       ("from its tokens", run.model.decode(indices))], path)
    else:
        indices = tokens_of(run, split).indices
    if output and not decode:
        write_tokens(output, run, indices)
    print(f"{path}: {len(indices):,} images of {run.model.grid} positions")
    titles = photographs or [f"image {number}" for number in range(len(indices))]
    print_words(run, dict(enumerate(titles)), indices, words)


def print_words(run, titles, indices, words):
    """Print the words of the images that --words names.

    titles: dict from an image's number to its title; indices: (N, M, h, w) in the
    same order.
    words: numbers, [] for all, or None for no image.
    """
    tokens = dict(zip(titles, indices))
    for number in titles if words == [] else words or ():
        if number not in titles:
            raise UserError(f"--words {number}: there are images {[*titles][:9]} (the first 9)")
        print(f"\n{titles[number]}\n{run.spell(tokens[number])}")


# ======== Tokens

class Tokens(NamedTuple):
    """A data set for the second stage; an image has a row for each crop or flip."""

    indices: torch.Tensor  # (N, M, h, w) int64
    labels: torch.Tensor  # (N,) int64, −1: none
    segmentation: torch.Tensor  # (N or 0, S h, S w) int16, S² pixels a position; −1: unlabeled
    features: np.ndarray | None = None  # (N, C, h, w) float16 on disk, before quantization


SUBSAMPLES = 4  # S, pixels a side of a position at which its label map is kept


@torch.no_grad()
def encode_dataset(run, dataset, views, file):
    """Tokens of every image: its centre crop, then `views` − 1 random ones.

    file: binary file that takes the features, as an array of numpy.
    """
    size = len(dataset)
    keys = [(index, view * size + index) if view else index
            for view in range(views) for index in range(size)]
    dataset.with_segmentation = True
    stride = max(1, run.config.resolution // run.model.grid[0] // SUBSAMPLES)
    indices, labels, segmentation = [], [], [torch.zeros(0, dtype=torch.int16)]
    shape = len(keys), run.model.to_codes.out_channels, *run.model.grid
    header = dict(descr="<f2", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    for x, batch in run.batches(dataset, keys, "encoding"):
        z = run.model.features(x)
        indices.append(run.model.nearest_indices(z).cpu())
        labels.append(batch["label"])
        if "segmentation" in batch:
            maps = batch["segmentation"][:, stride // 2 :: stride, stride // 2 :: stride]
            segmentation.append(maps.clamp(max=2**15 - 1).short())
        file.write(torch.cat(z, dim=1).half().cpu().numpy().tobytes())
    return Tokens(torch.cat(indices), torch.cat(labels), torch.cat(segmentation))


def tokens_of(run, split, views=1, with_features=False):
    """Tokens of a split, kept in the run; made again if tokenizer, files or views change."""
    dataset = run.dataset(split)
    path, stored = run.results / f"tokens-{split}.npz", run.results / f"features-{split}.npy"
    key = json.dumps([run.tokenizer, identity(dataset, run.config.data, maps=True), views])
    key = hashlib.sha256(key.encode()).hexdigest()
    wanted = path, stored if with_features else None, key
    if tokens := kept_tokens(*wanted):
        return tokens
    with open(run.path / "lock", "w") as file:
        lock(file, f"waiting: another process encodes images of '{run.path}'")
        if tokens := kept_tokens(*wanted):
            return tokens
        stored.unlink(missing_ok=True)
        place = atomic_write(stored) if with_features else nullcontext(os.devnull)
        with place as part, open(part, "wb") as features:
            tokens = encode_dataset(run, dataset, views, features)
            features.write(key.encode())  # behind the array, where numpy does not read
        write_tokens(path, run, tokens.indices, labels=tokens.labels,
                     segmentation=tokens.segmentation, key=key)
    return kept_tokens(*wanted)


def kept_tokens(path, stored, key):
    """Tokens from their files, or None if these are missing, damaged, or of another key."""
    try:
        arrays, features = dict(np.load(path)), None
        indices, labels, maps = (torch.from_numpy(arrays[name]) for name in Tokens._fields[:3])
        fits = str(arrays["key"]) == key
        if stored:
            features = np.load(stored, mmap_mode="r")
            fits = fits and bytes(np.memmap(stored, mode="r")[-len(key) :]) == key.encode()
    except Exception:  # of any kind that a damaged file raises
        return None
    return Tokens(indices.long(), labels, maps, features) if fits else None


def write_tokens(path, run, indices, **arrays):
    """Write a token file: indices, the words of each codebook, and more arrays by name."""
    if Path(path).suffix != ".npz":
        raise UserError(f"--output {path} must end in .npz")
    words = {f"{name}_words": np.array(listed) for name, listed in zip(run.names, run.words)}
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, indices=indices.int().cpu(), tokenizer=run.tokenizer, **words,
                            **arrays)


def read_tokens(run, path):
    """(N, M, h, w) indices of a token file. Raises UserError if it is not of this run."""
    with user_error(f"'{path}' is no token file of this run: {{}}"):
        arrays = np.load(path)
        if arrays["tokenizer"] != run.tokenizer:
            raise ValueError("it was made by another tokenizer")
        indices = torch.from_numpy(arrays["indices"])
        sizes = torch.tensor(run.model.sizes)[:, None, None]
        fits = indices.shape[1:] == (len(sizes), *run.model.grid)
        if not fits or indices.is_floating_point() or ((indices < 0) | (indices >= sizes)).any():
            raise ValueError("its indices are no codes of this run")
    return indices.long()


@torch.no_grad()
def decode_tokens(run, indices):
    """(N, M, h, w) indices → (N, 3, H, W) images in [-1, 1], on the CPU."""
    batches = indices.split(run.config.batch_size)
    return torch.cat([run.model.decode(part.to(run.device)).float().cpu() for part in batches])


# ======== The second stage of a run

def send(x, device):
    """The tensor on the device. A GPU does not wait for what comes from pinned memory."""
    x = x.pin_memory() if device.type == "cuda" else x
    return x.to(device, non_blocking=True)


def known_of(network, tokens, rows):
    """The condition of some images: None, classes (B,), or label shares (B, L, h, w)."""
    kind, count = network.condition.kind, network.condition.count
    device = network.condition.absent.device
    if kind == "none":
        return None
    if kind == "class":
        return send(tokens.labels[rows], device)
    height, width = tokens.indices.shape[2:]
    maps = send(tokens.segmentation[rows], device).long()
    cells = maps.unflatten(2, (width, -1)).unflatten(1, (height, -1))
    cells = cells.transpose(2, 3).flatten(3)  # (B, h, w, S²)
    cells = cells.where((cells >= 0) & (cells < count), count)
    shares = torch.zeros(*cells.shape[:3], count + 1, device=device)
    shares.scatter_add_(3, cells, torch.ones_like(cells).float())
    return shares[..., :count].permute(0, 3, 1, 2) / cells.shape[3]


def check_condition(condition, run, *splits, most=4096):
    """How many classes or labels a condition has in the Tokens of some splits.

    Raises UserError if the data set or a split has none, or more than `most`.
    Without splits, only the data set is checked, before it is encoded.
    """
    if condition == "none":
        return 0
    dataset = run.dataset("train")
    if condition == "class":
        there, labels = dataset.classes, [tokens.labels for tokens in splits]
    else:
        there = dataset.records[0].segmentation is not None
        labels = [tokens.segmentation for tokens in splits]
    counts = [int(values.max()) + 1 if len(values) else 0 for values in labels]
    if not there or 0 in counts:
        raise UserError(f"the data set has nothing for --condition {condition}; in a folder, "
                        "sub-folders are classes, and --labels names label maps")
    count = max(counts, default=0)
    if count > most:
        raise UserError(f"these images have {count:,} labels, more than {most:,}")
    return count


def make_network(config, run, count):
    """The network that a SynthesisConfig names, for a tokenizer."""
    model = run.model
    condition = Condition(config.condition, count, model.grid, config.width, config.heads)
    shape = dict(width=config.width, depth=config.depth, heads=config.heads,
                 dropout=config.dropout)
    if config.model == "gpt":
        network = TokenTransformer(model.sizes, model.grid, condition, **shape)
    else:
        channels = model.code_dim * len(model.codebook.sizes)
        network = Denoiser(channels, model.grid, condition, **shape)
    return network.to(run.device)


def stage_folder(run, config, root=None):
    """The folder of a second stage, in its run or below another root."""
    return (root or run.path) / "synthesis" / f"{config.model}-{config.condition}"


def load_stage(run, folder):
    """A network, with its best averaged weights, and its SynthesisConfig.

    Raises UserError if there is none, or one of another tokenizer or other classes.
    """
    state = load_checkpoint(folder / "best.pt")
    check_stage(run, state, folder)
    if state["config"]["condition"] == "class" and state["classes"] != run.dataset("val").classes:
        raise UserError(f"'{folder}' was trained with other classes than '{run.config.data}' has; "
                        "see --data")
    with fitting(folder / "best.pt"):
        config = SynthesisConfig(**state["config"])
        network = make_network(config, run, state["count"])
        network.load_state_dict(state["ema"])
    return network.eval(), config


def check_stage(run, state, folder):
    """Raise UserError for a second stage of other tokens than the run's."""
    if state.get("tokenizer") != run.tokenizer:
        raise UserError(f"'{folder}' was trained on tokens of other weights of '{run.path}'; "
                        "train it with --overwrite")


def losses_of(config, run, network, tokens, rows, drop=None, generator=None):
    """What is minimised, and by name bits per token (gpt) or the noise's error (ldm)."""
    known = known_of(network, tokens, rows)
    if config.model == "ldm":
        features = torch.from_numpy(tokens.features[np.asarray(rows)])
        features = send(features, run.device).float()
        (loss,) = network.loss(features, known, drop, generator)
        return loss, {"loss": loss, "noise": loss}
    indices = send(tokens.indices[rows], run.device)
    losses = network.loss(indices, known, drop, generator)
    bits = {name: part / math.log(2) for name, part in zip(run.token_names, losses)}
    return sum(losses), {"loss": sum(bits.values()), **bits}


@torch.no_grad()
def validation(config, run, network, tokens, images):
    """Mean losses by name of `losses_of` over some images, with the same noise each time."""
    totals, generator = {}, torch.Generator(run.device).manual_seed(0)
    for rows in torch.as_tensor(images).split(config.batch_size):
        _, losses = losses_of(config, run, network, tokens, rows, None, generator)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value * (len(rows) / len(images))
    return {name: float(value) for name, value in totals.items()}


class StageTrainer:
    """The state of a second stage's training and its step, for `fit`.

    config: SynthesisConfig; run: Run; count: classes or labels; train_set: Tokens;
    chosen: rows that choose best.pt.
    """

    def __init__(self, config, run, count, train_set, chosen):
        torch.manual_seed(config.seed)
        dataset = run.dataset("train")
        self.data, self.classes = identity(dataset, run.config.data), dataset.classes
        self.config, self.run, self.device = config, run, run.device
        self.train_set, self.chosen = train_set, chosen
        self.step, self.best = 0, -math.inf
        self.network = make_network(config, run, count)
        if config.model == "ldm":
            rows = spread_indices(len(train_set.features), 4096)
            features = torch.from_numpy(train_set.features[rows]).float()
            std = features.std(dim=(0, 2, 3)).clamp_min(1e-6)
            self.network.mean.copy_(features.mean(dim=(0, 2, 3)).view(-1, 1, 1))
            self.network.std.copy_(std.view(-1, 1, 1))
        self.ema = copy.deepcopy(self.network).requires_grad_(False).eval()
        parameters = list(self.network.parameters())
        groups = [
            {"params": [x for x in parameters if x.dim() > 1]},
            {"params": [x for x in parameters if x.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95),
                                           weight_decay=config.weight_decay, fused=True)

    def parts(self):
        """The networks and optimizer that a checkpoint holds, by name."""
        return {"network": self.network, "ema": self.ema, "optimizer": self.optimizer}

    def notes(self):
        """What else a checkpoint holds, by name."""
        return {"tokenizer": self.run.tokenizer, "count": self.network.condition.count,
                "data": self.data, "classes": self.classes}

    def usage(self):
        """An empty list, as no codes are learned."""
        return []

    def train_step(self, rows):
        """Metrics by name, () tensors, of one step on some rows of the tokens."""
        config = self.config
        rise = min(1.0, (self.step + 1) / max(1, config.warmup))
        fall = 0.55 + 0.45 * math.cos(math.pi * self.step / config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * rise * fall
        self.network.train()
        drop = None
        if config.condition != "none":
            drop = torch.rand(len(rows), device=self.device) < config.drop_condition
        with autocast(self):
            loss, metrics = losses_of(config, self.run, self.network, self.train_set,
                                      rows, drop)
        self.optimizer.zero_grad()
        loss.backward()
        metrics["gradient"] = average_gradients(self.network)
        parameters = list(self.network.parameters())
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, metrics["gradient"])
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))  # averages less at first
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), parameters, 1 - decay)
        return {name: value.detach() for name, value in metrics.items()}

    def validate(self):
        """Score, losses by name, and no picture, of averaged weights on held-out images."""
        values = validation(self.config, self.run, self.ema, self.train_set, self.chosen)
        return -values["loss"], values, ()


def train_stage(run, resume, overwrite, **given):
    """The command train: encode a run's images, and train a model of their tokens."""
    config = SynthesisConfig(**{**SMALL.get(run.config.preset, {}), **given})
    refuse_idle(config, given, MATTERS)
    if config.width % (2 * config.heads):
        raise UserError(f"--width {config.width} must be a multiple of twice the "
                        f"{config.heads} heads")
    folder, state = stage_folder(run, config), None
    if resume:
        state, choices = resumed_choices(SynthesisConfig, given, CHANGEABLE, folder)
        config = SynthesisConfig(**choices)
        check_stage(run, state, folder)
    elif not rank():
        check_folder(folder, overwrite)
    check_condition(config.condition, run)
    with first_process_first():
        train_set = tokens_of(run, "train", config.views, config.model == "ldm")
        val_set = tokens_of(run, "val", 1, config.model == "ldm")
    count = check_condition(config.condition, run, train_set, val_set)
    images = len(train_set.labels) // config.views  # rows go through all images view by view
    trained, chosen = hold_out(images, run.config.eval_images)
    rows = [view * images + row for view in range(config.views) for row in trained]
    trainer = StageTrainer(config, run, count, train_set, chosen)
    if state:
        restore(trainer, state, folder)
    order = train_batches(rows, config.batch_size, trainer.step, config.steps, config.seed)
    batches = ([row for row, _ in batch] for batch in order)
    with open_run(folder, trainer, overwrite, state) as journal:
        weights = sum(map(torch.numel, trainer.network.parameters())) / 1e6
        print(f"{folder}: {weights:.1f} M weights on {run.device}, {len(rows):,} grids of tokens")
        fit(trainer, batches, trainer.validate, folder, journal)
    print(f"done: look at samples with: python synthesize.py {shlex.quote(str(run.path))} "
          f"sample --model {config.model} --condition {config.condition}")


# ======== Sampling

def draw_images(run, stage, tokens, rows, choices, seed, given):
    """(B, M, h, w) samples for the conditions of some images.

    stage: of `load_stage`; rows: indices of the images among tokens, a Tokens;
    choices: Sampling.
    given: (B, M, h, w) int64 tokens to keep, −1 where they are to be drawn.
    """
    network, config = stage
    generator, drawn = torch.Generator(run.device).manual_seed(seed), []
    for part in torch.arange(len(rows)).split(config.batch_size):
        known = known_of(network, tokens, rows[part])
        kept = given[part].to(run.device)
        if config.model == "gpt":
            indices = sample_tokens(
                network, len(part), known, kept, choices.guidance, generator,
                temperature=choices.temperature, top_k=choices.top_k)
        else:
            codes, mask = codes_of(run, kept)
            z = sample_features(network, len(part), known, codes, mask, choices.guidance,
                                choices.sampling_steps, generator)
            indices = run.model.nearest_indices(z.chunk(len(run.model.codebook.sizes), dim=1))
            indices = torch.where(kept >= 0, kept, indices)
        drawn.append(indices.cpu())
    return torch.cat(drawn)


def codes_of(run, given):
    """(B, M, h, w) tokens, or −1 → (B, C, h, w) their codes, and a mask of where they are."""
    if run.config.quantizer == "gumbel" and (given >= 0).any():
        raise UserError("--model ldm cannot keep tokens of Gumbel-VQ, whose codes are no features")
    codes, masks = [], []
    for indices, codebook in zip(run.model.by_codebook(given), run.model.codebook()):
        codes.append(look_up(indices.clamp_min(0), codebook))  # (B, D, h, w)
        masks.append((indices >= 0).all(dim=1, keepdim=True).expand_as(codes[-1]))
    return torch.cat(codes, dim=1), torch.cat(masks, dim=1)


def known_part(part, grid):
    """(h, w) bool, True in the half "top", "bottom", "left" or "right"; "": nowhere."""
    row, column = (length // 2 for length in grid)
    halves = {"": np.s_[:0], "top": np.s_[:row], "bottom": np.s_[row:],
              "left": np.s_[:, :column], "right": np.s_[:, column:]}
    known = torch.zeros(grid, dtype=torch.bool)
    known[halves[part]] = True
    return known


def pin_words(run, given, pins):
    """(B, M, h, w) given tokens, −1 elsewhere, with words put in their places.

    pins: list of "row,column=adjective,noun"; a word may be left out.
    Raises UserError for a position or a word that does not exist.
    """
    given = given.clone()
    lists, names = run.model.per_token(run.words), ",".join(run.token_names)
    for pin in pins:
        with user_error(f"--pin {pin}: expected row,column={names}, from 0,0 in a grid of "
                        f"{run.model.grid}, with words of this run: {{}}"):
            place, words = pin.split("=")
            row, column = (range(side).index(int(number)) for side, number
                           in zip(run.model.grid, place.split(","), strict=True))
            for i, word in enumerate(words.lower().split(",")):
                if word:
                    given[:, i, row, column] = lists[i].index(word)
    return given


def draw_samples(runs, choices, part, words):
    """The commands sample and complete: a PNG with a column for each image.

    part: half that is kept, or ""; words: as in `print_words`.
    """
    folder = stage_folder(runs[0], choices, runs[0].results)
    path = Path(choices.output or folder / ("completions.png" if part else "samples.png"))
    origins = {(run.config.resolution, run.config.dataset, Path(run.config.data).resolve())
               for run in runs}
    if len(origins) > 1:
        raise UserError("these runs are of several resolutions or data sets")
    dataset, legend = runs[0].dataset("val"), {}
    images = torch.tensor(spread_indices(len(dataset), choices.count))
    names = list(map(str, images.tolist()))
    originals = [dataset[index]["image"] / 127.5 - 1 for index in images.tolist()]
    rows = [("original", originals, names)]
    for run in runs:
        stage = load_stage(run, stage_folder(run, choices))
        tokens = tokens_of(run, "val")
        check_condition(choices.condition, run, tokens, most=stage[0].condition.count)
        if choices.condition == "segmentation" and not legend:
            maps = tokens.segmentation[images].long()
            rows.append(("label map", colours_of_labels(maps)))
            labels = maps.unique()
            titles = [dataset.labels.get(label, str(label)) for label in labels.tolist()]
            legend = dict(zip(titles, colours_of_labels(labels[:, None, None])))
        rows += rows_of_run(run, stage, tokens, images, choices, part, words)
    draw_grid(rows, path)
    if legend:
        add_legend(path, legend)
    print(f"{path}: images {', '.join(names)} from left to right")


def rows_of_run(run, stage, tokens, images, choices, part, words):
    """Tokens decoded, what is kept of them, and samples → list of (label, pictures)."""
    name, indices = run.path.name, tokens.indices[images]
    known, decoded = known_part(part, run.model.grid), decode_tokens(run, indices)
    rows, title = [(f"{name}: tokens decoded", decoded)], "sample"
    if part:
        mask = F.interpolate(known[None, None].float(), size=run.config.resolution)[0]
        rows.append((f"{name}: known", decoded * mask))
        title = "completed"
    given = pin_words(run, torch.where(known, indices, -1), choices.pin)
    for repeat in range(choices.repeat):
        drawn = draw_images(run, stage, tokens, images, choices, choices.seed + repeat, given)
        label = "\n".join([f"{name}: {title} {repeat + 1}", *choices.pin])
        rows.append((label, decode_tokens(run, drawn)))
        titles = {i: f"{title} {repeat + 1} for image {i}" for i in images.tolist()}
        print_words(run, titles, drawn, words)
    return rows


def add_legend(path, colours, columns=6, size=14, pitch=20):
    """Add to a PNG, below its rows, names beside small squares of their colours."""
    with Image.open(path) as image:
        height = pitch * math.ceil(len(colours) / columns)
        picture = ImageOps.expand(image, (0, 0, 0, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, colour) in enumerate(colours.items()):
        row, column = divmod(number, columns)
        x, y = 8 + column * image.width // columns, image.height + row * pitch
        ink = tuple(to_bytes(colour).flatten().tolist())
        draw.rectangle((x, y, x + size, y + size), ink, "black")
        draw.text((x + pitch, y + size / 2), name, "black", FONT, anchor="lm")
    save_png(picture, path)


def colours_of_labels(maps):
    """(B, R, R) labels → (B, 3, R, R) in [-1, 1], a colour each; −1 is black."""
    maps, thirds = maps[:, None], torch.arange(3).view(3, 1, 1) / 3
    hue, tone = maps * 0.618034, maps % 3 - 1  # the golden ratio keeps neighbours apart
    colours = ((hue + thirds) * 2 * math.pi).cos() * 0.6 + tone * 0.4
    return colours.where(maps >= 0, -1.0)


# ======== Table 6

def evaluate_stage(run, stage, choices, inception):
    """The row of Table 6 of a second stage, a dict, which evaluation.json keeps."""
    network, config = stage
    val_set = tokens_of(run, "val", 1, config.model == "ldm")
    check_condition(config.condition, run, val_set, most=network.condition.count)
    every = torch.arange(len(val_set.labels))
    losses = validation(config, run, network, val_set, every)
    loss = losses.pop("loss")
    result = dict(run=str(run.path), model=config.model, condition=config.condition, fid=None)
    if config.model == "gpt":
        result["bits"] = losses  # of each token of a position
        result["bits_image"] = loss * math.prod(run.model.grid)
        result["bits_per_bit"] = loss / sum(map(math.log2, run.model.sizes))
    else:
        result["noise"] = loss
    if inception is not None:  # a sample for each evaluation image
        nothing = torch.full_like(val_set.indices, -1)
        drawn = draw_images(run, stage, val_set, every, choices, choices.seed, nothing)
    scores, features = [], ([], [])
    for x, batch in run.batches(run.dataset("val")):
        rows = batch["index"]
        scores.append(psnr(decode_tokens(run, val_set.indices[rows]), x.cpu()))
        if inception is not None:
            samples = to_bytes(decode_tokens(run, drawn[rows]))
            for kept, images in zip(features, (batch["image"], samples)):
                kept.append(inception(images.to(run.device)).cpu().double())
    result["psnr"] = torch.cat(scores).mean().item()
    if inception is not None and len(every) > 1:
        result["fid"] = fid(*(torch.cat(kept).numpy() for kept in features))
    with atomic_write(stage_folder(run, config, run.results) / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1))
    return result


COLUMNS = {  # of Table 6: name in evaluation.json → title, format
    "run": ("run", ""),
    "model": ("model", ""),
    "condition": ("condition", ""),
    "fid": ("FID ↓", ".2f"),
    "bits_image": ("bits per image ↓", ",.1f"),
    "bits_per_bit": ("over uniform ↓", ".3f"),
    "noise": ("noise error ↓", ".4f"),
    "psnr": ("PSNR of its tokens, dB ↑", ".2f"),
}


def print_table(runs, choices, path=""):
    """The command evaluate: print Table 6; path: of Inception's weights."""
    inception, reason = load_or_reason(load_inception, path)
    table = [[title for title, _ in COLUMNS.values()]]
    for run in runs:
        network = inception and inception.to(run.device)
        for best in sorted((run.path / "synthesis").glob("*/best.pt")):
            try:
                result = evaluate_stage(run, load_stage(run, best.parent), choices, network)
            except UserError as error:
                print(f"not in the table: {error}")
                continue
            table.append(["–" if result.get(name) is None else format(result[name], form)
                          for name, (_, form) in COLUMNS.items()])
    if len(table) == 1:
        raise UserError("these runs have no second stage; train makes one")
    print(as_markdown(table) + "\n")
    if reason:
        print(f"FID: – ({reason})")
    else:
        warn_of_fid(min(len(run.dataset("val")) for run in runs))


if __name__ == "__main__":
    launch(main)
