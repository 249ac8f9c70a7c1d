"""Train the first stage: encoder, codebooks and decoder (paper §3.3, §4.1).

    python train.py                                            built-in birds, minutes on a CPU, no download
    python train.py --dataset cub --download --device cuda     data/CUB_200_2011, the paper's f16 network
    python train.py --dataset coco --init vqgan_imagenet_f16_1024.ckpt --device cuda   from published weights
    python train.py --dataset folder --data DIR --prior prior.npz --preset tiny
    python train.py --method vqgan                             the baseline: 1,024 learned codes
    python train.py --resume                                   go on where the last run stopped

The file reads: Config and the paper's systems, data sets, checkpoints, Trainer (what one step does), a run, main; the
demo's birds are an appendix. A run's folder holds config.json, metrics.jsonl, last.pt and best.pt, the prior, the codebook
at step 0, and reconstructions/*.png (originals above reconstructions).
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections import defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Metal lacks runs on the CPU; read when torch is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, CUDA's products do not repeat themselves

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import ExifTags, Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

# fmt: off
from prior import (CORES, PARTS, Parser, Prior, PriorConfig, Progress, UserError, WordListSpeech, add_flags, build_from_corpora, command,
                   did_you_mean, explained, fetch, option, read_captions, read_tensors, save_arrays, save_png, shuffled, whole_file)
# fmt: on
from vqct import LPIPS, NETWORKS, Discriminator, ModelConfig, VQModel, across, adaptive_weight, hinge_loss, load_taming, needs_prior

CHECKPOINT_VERSION = 1
DEVICES = "cpu, cuda, cuda:1, mps; auto takes the first of cuda, mps, cpu that is there"
STOPPING = (signal.SIGINT, signal.SIGTERM)  # after either a run finishes its step, saves, and ends

# ---------------------------------------------------------------------------------------------
# Configuration: one dataclass, from which the flags, config.json and the checkpoint are made


@dataclass
class Config(ModelConfig):
    """A run. Defaults are the paper's f16 network with VQGAN's training; presets and methods change some."""

    dataset: str = option(
        "demo",
        "demo: birds drawn by code; folder: any tree of images; or a published one in its own layout",
        choices=lambda: ("demo", "folder", *DATASETS),
    )
    data: str = option("", "folder of the data set (default: data/ and the published folder's name)")
    download: bool = option(False, "fetch the data set's public archives, where it has some and its folder is not there")
    skip_broken: bool = option(False, "leave out images that are missing or cannot be read, instead of stopping")
    labels: str = option("", "folder of label maps with the images' relative names, for --dataset folder")
    prior: str = option("", "a prior.npz of prior.py, or a corpus to make one from; by default made from the data set's own captions")
    init: str = option("", "published VQGAN weights to start from: a checkpoint of taming-transformers (.ckpt, .pt, .safetensors)")
    method: str = option("vqct", "a system of the paper or a control, as a choice of quantizer, codes, transfer and losses")
    recipe: str = option(
        "paper", "paper, or official: the codebook as the authors' code makes it, each difference a flag too", choices=("paper", "official")
    )
    shuffle: str = option(
        "none",
        "control: vectors permuted within each part of speech, or edges rewired, every word keeping its number of them",
        choices=("none", "vectors", "edges"),
    )
    preset: str = option(
        "", "tiny: 64², f8, CPU minutes (the demo's default); f16: the paper's network at 256² (every other)", choices=("", "tiny", "f16")
    )
    out: str = option("", "run folder (default: runs/<dataset>-<method>)")
    device: str = option("auto", DEVICES)
    seed: int = option(0, "seed of weights, random codes, shuffles and data order; the demo's pictures stay the same")
    steps: int = option(500_000, "generator steps; the paper's 500 epochs of CUB's 5,994 images are 375,000 at batch 8")
    batch_size: int = option(8, "images per process and micro-step (the authors' code: 8)")
    accumulate: int = option(1, "micro-steps whose gradients are summed before each optimizer step")
    lr: float = option(0.0, "Adam's step size; 0 takes VQGAN's 4.5e-6 times the images of a step")
    schedule: str = option(
        "constant",
        "learning rate over the run: constant as in VQGAN, or cosine to zero, which short runs profit from",
        choices=("constant", "cosine"),
    )
    pixel_loss: str = option("l2", "l2 as in Eq. 2, or l1 as in VQGAN's code", choices=("l1", "l2"))
    perceptual_weight: float = option(1.0, "weight of LPIPS beside the pixel loss (VQGAN)")
    perceptual_trunk: str = option(
        "vgg", "LPIPS network: vgg (VGG-16, as in the paper) or squeeze (SqueezeNet 1.1, light)", choices=("vgg", "squeeze")
    )
    trunk_weights: str = option("", "local copy of the trunk's torchvision ImageNet weights (default: torch hub's cache, or download)")
    lpips_weights: str = option("", "local copy of LPIPS v0.1's linear heads (default: torch hub's cache, or download)")
    gan_weight: float = option(0.8, "weight of the adversarial loss, times the adaptive weight (VQGAN); 0: no discriminator")
    gan_start: int = option(5_000, "generator step at which the adversary joins (VQGAN's 10,000 count both optimizers)")
    discriminator_layers: int = option(
        3, "its convolutions but the first and last; 3: patches of 70×70 pixels (VQGAN; its ImageNet weights have 2)"
    )
    amp: bool = option(True, "bfloat16 autocast on CUDA")
    compile: bool = option(False, "torch.compile the networks: slower start, faster steps on CUDA")
    deterministic: bool = option(False, "on CUDA, only algorithms that repeat themselves bit by bit, as the CPU's do: slower")
    workers: int = option(-1, "processes that read images; −1: none on the CPU, where training needs every core, else 8")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    eval_every: int = option(2_000, "steps between validations, checkpoints and reconstruction grids")
    eval_images: int = option(256, "validation images at those times; evaluate.py takes them all")


# fmt: off
PRESETS = {
    "f16": NETWORKS["f16"],
    "tiny": dict(**NETWORKS["tiny"], batch_size=4, steps=1800, lr=3e-4, schedule="cosine", perceptual_weight=0.0, gan_weight=0.2,
                 gan_start=1500, eval_every=300, eval_images=64),
}
RECIPES = {
    "paper": {},
    "official": dict(transfer_layers=2, transfer_dropout=0.5, last_relu=False, adjective_neighbours=2, beta_on="codebook",
                     weighted_edges=True, vector_scale="none"),
}
# fmt: on
LEARNED = dict(
    codes="uniform", codebooks=1, codebook_size=1024, trained=True, transfer="none", adjective_neighbours=1
)  # whatever the recipe
PIXEL_LOSS_ONLY = dict(gan_weight=0.0, perceptual_weight=0.0)
METHODS = {
    "vqct": {},  # every table: Config's defaults, gcn and two codebooks; Table 3 (vi)
    "vqct-vqvae": PIXEL_LOSS_ONLY,  # Table 4
    "vqvae": {**LEARNED, **PIXEL_LOSS_ONLY},  # Tables 1, 4, 6
    "vqgan": LEARNED,  # Tables 1, 2 (i), 4 (ii), 5 (i), 6
    "gumbel": {**LEARNED, "codes": "random", "quantizer": "gumbel"},  # Tables 1, 6
    "cvq": {**LEARNED, "quantizer": "cvq"},  # Table 1
    "regvq": {**LEARNED, "codes": "random", "quantizer": "regvq", "kl_weight": 0.1, "contrastive_weight": 0.01},  # Table 6
    "random-mlp": dict(codes="random", transfer="mlp"),  # Table 2 (ii)
    "frozen": dict(codebooks=1, transfer="none"),  # Table 3 (i)
    "finetune": dict(codebooks=1, transfer="none", trained=True),  # Table 3 (ii)
    "single-mlp": dict(codebooks=1, transfer="mlp"),  # Table 3 (iii)
    "single-gcn": dict(codebooks=1),  # Table 3 (iv)
    "multi-mlp": dict(transfer="mlp"),  # Table 3 (v)
    "matched": dict(codes="uniform", trained=True, transfer="none"),  # control: VQCT's sizes, learned
    "simvq": dict(codes="random", transfer="mlp", transfer_layers=1, last_relu=False),  # control: one linear map (Zhu et al. 2024)
}


def resolve(given, check=True):
    """Explicit choices → the whole Config."""
    method, dataset = given.get("method", Config.method), given.get("dataset", Config.dataset)
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'; methods are {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    preset = given.get("preset") or ("tiny" if dataset == "demo" else "f16")
    recipe = RECIPES[given.get("recipe", Config.recipe)]
    config = Config(**{**PRESETS[preset], **recipe, **METHODS[method], **given, "preset": preset})
    config.lr = config.lr or usual_lr(config)
    config.out = config.out or "runs/" + "-".join([config.dataset, config.method, *variant(config)])
    if config.dataset in DATASETS:
        config.data = config.data or f"data/{DATASETS[config.dataset].folder}"
    return check_config(config) if check else config


def usual_lr(config):
    """VQGAN's: proportional to the images of a step."""
    return 4.5e-6 * config.batch_size * config.accumulate * processes()


def variant(config):
    """What tells a run from others of its data set and method, for its folder's name: recipe, shuffle, other codes, seed."""
    usual = lambda name: METHODS[config.method].get(name, getattr(Config, name))
    names = [str(getattr(config, name)) for name in ("recipe", "shuffle", "codes") if getattr(config, name) != usual(name)]
    return names + ["init"] * bool(config.init) + [f"seed{config.seed}"] * (config.seed != Config.seed)


def check_bounds(values, bounds):
    """Raise UserError for the first of some flags that is out of its bounds."""
    for name, value in vars(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value} must be a finite number")
    for names, fits, what in bounds:
        for name in names.split():
            if hasattr(values, name) and not fits(getattr(values, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(values, name)} must {what}")


def check_config(config):
    """The Config itself. Raises UserError naming a value that cannot be."""
    if config.dataset == "demo" and (config.data or config.labels):
        raise UserError("--data and --labels do nothing for the demo; add --dataset folder or --dataset cub")
    if config.labels and config.dataset != "folder":
        raise UserError(f"--labels is for --dataset folder; {config.dataset} has its label maps in its own layout")
    if config.skip_broken and config.dataset == "demo":
        raise UserError("--skip-broken does nothing for the demo, which is drawn")
    if config.download and not (config.dataset in DATASETS and DATASETS[config.dataset].archives):
        having = ", ".join(name for name, layout in DATASETS.items() if layout.archives)
        by_hand = f"; {DATASETS[config.dataset].get}" if config.dataset in DATASETS else f" ({having} have)"
        raise UserError(f"--download: {config.dataset} has no public archive{by_hand}")
    if config.dataset == "folder" and not config.data:
        raise UserError("--dataset folder needs --data DIR, the folder of images")
    if config.transfer == "none" and config.code_dim % config.codebooks:
        raise UserError(f"--code-dim {config.code_dim} does not divide between {config.codebooks} codebooks")
    if config.resolution < 24:
        raise UserError(f"--resolution {config.resolution} is too small: the patch discriminator needs 24 pixels per side")
    check_bounds(config, BOUNDS)
    if (config.shuffle == "vectors" and config.codes != "words") or (config.shuffle == "edges" and config.transfer != "gcn"):
        raise UserError(f"--shuffle {config.shuffle} changes nothing here: codes are {config.codes}, transfer is {config.transfer}")
    return config


BOUNDS = (
    (
        "lr gan_start gan_weight perceptual_weight beta kl_weight contrastive_weight codebook_size",
        lambda value: value >= 0,
        "not be negative",
    ),
    ("steps batch_size accumulate log_every eval_every eval_images discriminator_layers", lambda value: value >= 1, "be at least 1"),
    ("channels z_channels blocks code_dim transfer_layers transfer_width adjective_neighbours", lambda value: value >= 1, "be at least 1"),
    ("usage_decay transfer_dropout", lambda value: 0 <= value < 1, "lie in [0, 1)"),
    ("mask_ratio", lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    ("temperature_end", lambda value: 0 < value, "be positive"),
    ("seed", lambda value: 0 <= value < 1 << 62, "lie in [0, 2^62)"),
    ("multipliers", lambda value: len(value) > 0 and min(value) >= 1, "be whole numbers from 1 on"),
    ("codebook_size", lambda value: value <= 1 << 24, "be at most 2^24"),
    ("workers", lambda value: value >= -1, "be at least -1"),
)


def rank():
    """This process's number among those that torchrun started; 0 where there is one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def processes():
    """How many processes torchrun started, on all machines together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@contextlib.contextmanager
def torchrun():
    """The processes that torchrun started, joined for the length of a block; only the first of them speaks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"torchrun started more processes on this machine than its {count} GPUs; lower --nproc-per-node")
        torch.cuda.set_device(local)
    torch.distributed.init_process_group(timeout=datetime.timedelta(days=1))  # the first may download or encode for long
    with open(os.devnull, "w") as nowhere:
        out, error = (nowhere, nowhere) if rank() else (sys.stdout, sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                yield
            except UserError:
                if rank():  # the first says it
                    raise SystemExit(2) from None
                raise
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block before the others, which then find the files that it made, or end where it failed."""
    if processes() == 1:
        yield
        return
    well = torch.zeros(())
    if rank():
        torch.distributed.broadcast(well, 0)
        if not well:
            raise SystemExit(2)
        yield
        return
    try:
        yield
        well += 1
    finally:
        torch.distributed.broadcast(well, 0)


def parallel(network, device):
    """A network whose gradients are averaged over all processes; itself where there is one."""
    if processes() == 1:
        return network
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(
        network,
        [device] if device.type == "cuda" else None,
        **{"forward_sync_buffers" if newer else "broadcast_buffers": False},  # the discriminator runs twice before its backward pass
    )


@contextlib.contextmanager
def synchronised(*networks, last):
    """A block of backward passes whose gradients cross the processes in the `last` micro-step of a step, and only add up before."""
    with contextlib.ExitStack() as stack:
        for network in networks:
            if isinstance(network, DistributedDataParallel) and not last:
                stack.enter_context(network.no_sync())
        yield


def pick_device(name):
    """torch.device for a --device flag; auto and cuda are torchrun's share. Raises UserError where this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and processes() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with explained(f"--device {name} is not a device of torch; give cpu, cuda, cuda:1 or mps", RuntimeError):
        device = torch.device(name)
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} cannot train; give cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch sees {count} CUDA devices on this machine; use --device cpu, or install torch for CUDA")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Metal device on this machine; use --device cpu")
    return device


# ---------------------------------------------------------------------------------------------
# Data sets


EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS


class Record(NamedTuple):
    """An image on disk and what is known of it."""

    path: Path
    label: int = -1  # index into the data set's classes; −1: none
    captions: Callable = tuple  # () → iterable of captions
    segmentation: Path | tuple | None = None  # label map, or masks as (label, path) that are painted in this order


class ImageDataset(Dataset):
    """Square uint8 images with labels.

    Item (index) is the centre crop; item (index, draw), as the trainer asks for, is a random crop and
    flip that depend on (seed, draw) alone, so the order and number of workers change nothing.

    Args:
        records: list of Record.
        classes: names of the labels.
        resolution: pixels per side; the shorter side is resized to it, antialiased.

    Set `with_segmentation` for items to hold their label maps, in which `unlabeled` says nothing of a pixel.
    """

    with_segmentation, unlabeled = False, -1

    def __init__(self, records, classes, resolution, seed=0):
        self.records, self.classes, self.resolution, self.seed = records, classes, resolution, seed

    def __len__(self):
        return len(self.records)

    def known(self):
        """What else there is, in words."""
        counts = {"captions": sum(record.captions is not tuple for record in self.records)}
        counts["label maps"] = sum(record.segmentation is not None for record in self.records)
        return "".join(f", {count:,} with {name}," for name, count in counts.items() if count)

    def captions_of(self, index):
        """The captions of an image, an iterable."""
        return self.records[index].captions()

    def captions(self):
        """Yield every caption of every image."""
        for index in range(len(self)):
            yield from self.captions_of(index)

    def label(self, index):
        return self.records[index].label

    def read(self, index, draft=False):
        """→ image (3, h, w) uint8 and segmentation (1, h, w) integers or None, shorter sides the resolution.

        `draft` lets a large JPEG be decoded at a fraction of its size, which training takes and evaluation does not.
        """
        record = self.records[index]
        image = TF.resize(read_image(record.path, 2 * self.resolution if draft else None), self.resolution, antialias=True)
        wanted = record.segmentation is not None and self.with_segmentation
        return TF.pil_to_tensor(image), TF.pil_to_tensor(read_label_map(record, image.size)) if wanted else None

    def __getitem__(self, key):
        """→ dict: image (3, R, R) uint8, label, index, and segmentation (R, R) int64 where asked for."""
        index, draw = key if isinstance(key, tuple) else (key, None)
        image, segmentation = self.read(index, draft=draw is not None)
        size, (height, width) = self.resolution, image.shape[1:]
        top, left, flip = (height - size) // 2, (width - size) // 2, False
        if draw is not None:
            rng = np.random.default_rng((self.seed, draw))
            top, left, flip = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1)), rng.random() < 0.5
        item = {"label": self.label(index), "index": index}
        for name, picture in (("image", image), ("segmentation", segmentation)):
            if picture is not None:
                picture = picture[:, top : top + size, left : left + size]
                item[name] = picture.flip(-1) if flip else picture
        if segmentation is not None:
            item["segmentation"] = item["segmentation"][0].long()
        return item


def read_image(path, side=None):
    """An RGB image as it is meant to be seen; with `side`, a JPEG is decoded at the fraction of its size that keeps so many pixels.

    Raises:
        UserError: if it is missing, damaged or truncated.
    """
    with explained(f"image '{path}' cannot be read: {{}}"), Image.open(path) as file:  # Pillow raises half a dozen types
        if side:
            file.draft("RGB", (side, side))
        return as_rgb(ImageOps.exif_transpose(file))


def as_rgb(image):
    """8-bit RGB of an image in any mode: 16 bits scaled, transparency on white, of an animation the first picture."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_label_map(record, size):
    """A Record's segmentation as a PIL image of integers, resized to (width, height) by nearest neighbour."""
    if isinstance(record.segmentation, Path):
        return _read_mask(record.segmentation, record.path, size)
    labels = np.zeros(size[::-1], np.uint8)
    for label, path in record.segmentation:
        labels[np.asarray(_read_mask(path, record.path, size).convert("L")) > 127] = label
    return Image.fromarray(labels)


def _read_mask(path, photograph, size):
    with explained(f"label map '{path}' cannot be read: {{}}"), Image.open(path) as file:
        if (file.width > file.height) != (size[0] > size[1]):  # the camera's note turned the photograph, and the map lacks it
            with Image.open(photograph) as turned:
                file.getexif()[ExifTags.Base.Orientation] = turned.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(file).resize(size, Image.Resampling.NEAREST)


def readable(records, split, skip_broken=False, shown=10):
    """The records whose images, and label maps that are one file, can be decoded to their end.

    Raises:
        UserError: listing the first broken ones and their number, unless they are to be skipped.
    """

    def broken_by(record):
        try:
            size = read_image(record.path, 1).size  # at an eighth of its size: all of a JPEG's data is read, little is computed
            if isinstance(record.segmentation, Path) and (bands := len(read_label_map(record, size).getbands())) > 1:
                return f"label map '{record.segmentation}' has {bands} channels; one of integers is wanted"
        except UserError as error:
            return str(error)
        return None

    faults, progress = [], Progress()
    with ThreadPool(CORES) as pool:
        for found in pool.imap(broken_by, records, chunksize=16):
            faults.append(found)
            progress(f"checking {split} images: {len(faults):,} of {len(records):,}, {sum(map(bool, faults)):,} broken")
    broken = [found for found in faults if found]
    if broken:
        rest = [f"… and {len(broken) - shown:,} more"] if len(broken) > shown else []
        count = f"{len(broken):,} of {len(records):,} {split} images"
        if not skip_broken:
            raise UserError("\n".join([*broken[:shown], *rest, f"{count} are broken: mend them, or leave them out with --skip-broken"]))
        print("\n".join([*(f"skipped: {found}" for found in broken[:shown]), *rest, f"skipped {count}, which are broken"]))
    return [record for record, found in zip(records, faults) if not found]


# Published layouts. Each function takes the folder and "train" or "val", and gives records and names of classes


CUB_TABLES = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
CUB_PARTS = {"size": "bird", "shape": "bird", "primary": "bird", "upperparts": "back", "underparts": "belly"}  # of its attributes' names


def cub_records(root, split):
    """CUB-200-2011, the published split: val are the test images.

    Captions are Reed et al.'s where text/ is there, otherwise the published attributes of an image as sentences.
    """
    require("cub", root, *CUB_TABLES, "images")
    tables = (dict(line.split(maxsplit=1) for line in (root / name).read_text().splitlines() if line.strip()) for name in CUB_TABLES)
    images, splits, labels, classes = tables
    written, records = (root / "text").is_dir(), []
    for key, name in images.items():
        if (splits[key].strip() == "1") == (split == "train"):
            text = (root / "text" / name.strip()).with_suffix(".txt")
            captions = functools.partial(read_captions, text) if text.exists() else functools.partial(cub_attributes, root, key)
            records.append(Record(root / "images" / name.strip(), int(labels[key]) - 1, captions if written == text.exists() else tuple))
    return records, [classes[key].strip() for key in sorted(classes, key=int)]


def cub_attributes(root, key):
    """What the attributes of an image of CUB say: `has_wing_color::blue` is "its wing is blue", which makes the pair "blue wing"."""
    return _cub_attributes(root).get(key, [])


@functools.lru_cache(1)
def _cub_attributes(root):
    """dict image → sentences; empty where the attributes are not there."""
    listed = next(filter(Path.is_file, (folder / "attributes.txt" for folder in (root, root / "attributes", root.parent))), None)
    labels = root / "attributes" / "image_attribute_labels.txt"
    if listed is None or not labels.is_file():
        return {}
    sentences, found = {}, defaultdict(list)
    for line in filter(str.strip, listed.read_text().splitlines()):
        number, group, value = re.fullmatch(r"(\d+) has_(\w+)::(.*)", line.strip()).groups()
        part = re.sub(r"^(upper|under)_|_(color|shape|pattern|length)$", "", group)
        value = re.sub(r"_?\(.*|[_-](tail|wings|pattern)$|-like$", "", value).replace("_", " ")
        sentences[number] = f"its {CUB_PARTS.get(part, part)} is {value}"
    with open(labels) as lines:
        for line in lines:
            key, number, present = line.split(maxsplit=3)[:3]
            if present == "1":
                found[key].append(sentences[number])
    return dict(found)


def ade20k_records(root, split):
    """ADE20K's scene parsing benchmark; label maps of 150 classes, 0 for anything else; classes are the scenes."""
    folder = {"train": "training", "val": "validation"}[split]
    require("ade20k", root, f"images/{folder}", f"annotations/{folder}")
    stems = {
        path.stem for kind in ("images", "annotations") for path in (root / kind / folder).iterdir() if path.suffix in (".jpg", ".png")
    }
    listed = root / "sceneCategories.txt"
    scenes = dict(line.split(maxsplit=1) for line in listed.read_text().splitlines() if line.strip()) if listed.is_file() else {}
    classes = sorted(set(scenes.values()))
    place = {scene: index for index, scene in enumerate(classes)}
    images, maps = root / "images" / folder, root / "annotations" / folder
    return [Record(images / f"{stem}.jpg", place.get(scenes.get(stem), -1), tuple, maps / f"{stem}.png") for stem in sorted(stems)], classes


# Parts of CelebAMask-HQ in the order in which its authors paint them; 0 is the background
FACE_PARTS = tuple("skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth".split())


def celebahq_records(root, split):
    """CelebA-HQ as CelebAMask-HQ lays it out, split as CelebA is by the original's number: 24,183 / 2,993 (and 2,824 to test)."""
    require("celebahq", root, "CelebA-HQ-img", "CelebA-HQ-to-CelebA-mapping.txt")
    masks = defaultdict(dict)
    for path in (root / "CelebAMask-HQ-mask-anno").glob("*/[0-9]*_*.png"):
        number, _, part = path.stem.partition("_")
        masks[int(number)][part] = path
    first, end = {"train": (0, 162_771), "val": (162_771, 182_638)}[split]
    records = []
    for line in filter(str.strip, (root / "CelebA-HQ-to-CelebA-mapping.txt").read_text().splitlines()[1:]):
        number, original = map(int, line.split()[:2])
        if first <= original < end:
            painted = tuple((label, masks[number][part]) for label, part in enumerate(FACE_PARTS, 1) if part in masks[number])
            records.append(Record(root / "CelebA-HQ-img" / f"{number}.jpg", segmentation=painted if masks else None))
    return records, []


def coco_records(root, split):
    """MS-COCO 2017 (or 2014): captions of annotations/, label maps of stuffthingmaps/ where they are there, 255 for unlabeled."""
    year = 2014 if (root / "train2014").is_dir() and not (root / "train2017").is_dir() else 2017  # never one's training images to test
    require("coco", root, f"train{year}", f"val{year}")
    listed = root / "annotations" / f"captions_{split}{year}.json"
    files = {path.name: None for path in (root / f"{split}{year}").glob("*.jpg")}
    files.update({name: number for number, name in _coco_captions(listed)[0].items()} if listed.is_file() else {})
    maps = root / "stuffthingmaps" / f"{split}{year}"
    return [
        Record(
            root / f"{split}{year}" / name,
            captions=tuple if number is None else functools.partial(coco_captions, listed, number),
            segmentation=(maps / name).with_suffix(".png") if maps.is_dir() else None,
        )
        for name, number in sorted(files.items())
    ], []


def coco_captions(path, number):
    """The captions of one image of a COCO captions file."""
    return _coco_captions(path)[1].get(number, [])


@functools.lru_cache(2)
def _coco_captions(path):
    """dict image → file name, and dict image → captions."""
    with explained(f"'{path}' is not COCO's captions file, or is damaged", ValueError, KeyError, TypeError):
        content, captions = json.loads(path.read_text(encoding="utf-8")), defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        return {image["id"]: image["file_name"] for image in content["images"]}, dict(captions)


class Archive(NamedTuple):
    """A public archive: what it holds, and where that belongs in the data set's folder."""

    url: str
    md5: str | None  # where one is known
    gives: tuple  # what the data set's folder has when the archive is in it
    moves: tuple  # of (pattern in the archive, sub-folder of the data set's) for what is taken


class Layout(NamedTuple):
    """A published data set: its records, its folder's usual name, how to get it."""

    records: Callable  # (root, split) → records, names of classes
    folder: str
    get: str  # for people
    archives: tuple = ()
    unlabeled: int = -1  # the label that says nothing of a pixel; −1: none


# fmt: off
CUB_URL, COCO_URL = "https://data.caltech.edu/records/65de6-vp158", "http://images.cocodataset.org"
ADE_URL, STUFF_URL = "http://data.csail.mit.edu/places/ADEchallenge", "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
DATASETS = {
    "cub": Layout(cub_records, "CUB_200_2011", f"train.py --download fetches it (1.2 GB), or unpack CUB_200_2011.tgz from {CUB_URL}", (
        Archive(f"{CUB_URL}/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78", (*CUB_TABLES, "images"),
                (("CUB_200_2011/*", ""), ("attributes.txt", ""))),)),
    "ade20k": Layout(ade20k_records, "ADEChallengeData2016", f"train.py --download fetches it (1 GB), or unpack ADEChallengeData2016.zip from {ADE_URL}", (
        Archive(f"{ADE_URL}/ADEChallengeData2016.zip", "7328b3957e407ddae1d3cbf487f149ef", ("images", "annotations"),
                (("ADEChallengeData2016/*", ""),)),), 0),
    "celebahq": Layout(celebahq_records, "CelebAMask-HQ", """its terms ask for three steps by hand:
    1. get CelebAMask-HQ.zip by the links on https://github.com/switchablenorms/CelebAMask-HQ
    2. unzip CelebAMask-HQ.zip -d data
    3. python train.py --dataset celebahq --data data/CelebAMask-HQ --prior CAPTIONS.txt"""),
    "coco": Layout(coco_records, "coco", f"train.py --download fetches it (21 GB), or unpack train2017, val2017 and annotations from {COCO_URL}", (
        Archive(f"{COCO_URL}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", ("train2017",), (("train2017", ""),)),
        Archive(f"{COCO_URL}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", ("val2017",), (("val2017", ""),)),
        Archive(f"{COCO_URL}/annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", ("annotations",), (("annotations", ""),)),
        Archive(f"{STUFF_URL}/stuffthingmaps_trainval2017.zip", None, ("stuffthingmaps/train2017", "stuffthingmaps/val2017"),
                (("*2017", "stuffthingmaps"),))), 255)}
# fmt: on


def require(dataset, root, *names):
    """Raise UserError, with how to get the data set, for the first of the names that its folder lacks."""
    missing = next((name for name in names if not (root / name).exists()), None)
    if missing:
        raise UserError(
            f"{dataset} is not at '{root}' (no {missing}): point --data at its {DATASETS[dataset].folder} folder; {DATASETS[dataset].get}"
        )


def download(dataset, root):
    """Fetch and unpack the archives whose contents a data set's folder lacks; each arrives whole, or not at all.

    Raises:
        UserError: for one that is unavailable, broken, or of other contents.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError("--download needs a Python whose tarfile refuses paths outside a folder: 3.10.12, 3.11.4 or newer")
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # older torchvision leaves the choice to Python
    for archive in DATASETS[dataset].archives:
        if all((root / name).exists() for name in archive.gives):
            continue
        made = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
                torchvision.datasets.utils.download_and_extract_archive(archive.url, folder, md5=archive.md5)
                moves = {root / into / path.name: path for pattern, into in archive.moves for path in sorted(Path(folder).glob(pattern))}
                absent = [name for name in archive.gives if not (root / name).exists() and root / name not in moves]
                if absent or any(path.is_symlink() for path in moves.values()):
                    raise ValueError(f"it does not hold {absent[0] if absent else 'files alone'}")
                for target, path in moves.items():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not target.exists():
                        os.replace(path, target)
        except (OSError, EOFError, RuntimeError, ValueError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
            for folder in made:
                if not any(folder.iterdir()):
                    folder.rmdir()
            raise UserError(
                f"{archive.url} is unavailable: {error or type(error).__name__}; nothing of it was kept; try again, or unpack it by hand "
                f"and point --data at the {DATASETS[dataset].folder} folder"
            ) from None


def folder_records(root, split, labels=""):
    """Any tree of images. Top-level folders named train and val (or test) are the splits, otherwise every tenth image is held out.

    Args:
        root: the tree; sub-folders of a split are classes, `x.txt` beside `x.jpg` holds its captions.
        labels: tree of label maps with the same relative names.
    Returns:
        records, class names.
    Raises:
        UserError: if there are no images.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"image folder '{root}' does not exist; point --data at a folder of images")
    names = [name for name in ("val", "test") if (root / name).is_dir()] if (root / "train").is_dir() else []
    bases = {"train": root / "train", "val": root / names[0]} if names else {"train": root, "val": root}
    images = {base: [path for path in sorted(base.rglob("*")) if path.suffix.lower() in EXTENSIONS] for base in bases.values()}
    classes = sorted({str(path.parent.relative_to(base)) for base, paths in images.items() for path in paths} - {"."})
    base = bases[split]
    paths = images[base] if names else [path for i, path in enumerate(images[base]) if (i % 10 == 9) == (split == "val")]
    if not paths:
        raise UserError(f"no images for the {split} split under '{base}' (a folder needs ten images to hold one out)")
    records = []
    for path in paths:
        label, text = str(path.parent.relative_to(base)), path.with_suffix(".txt")
        label_map = _label_map(labels, path.relative_to(root)) if labels else None
        captions = functools.partial(read_captions, text) if text.exists() else tuple
        records.append(Record(path, classes.index(label) if label != "." else -1, captions, label_map))
    return records, classes


def _label_map(labels, name):
    named = [(Path(labels) / name).with_suffix(suffix) for suffix in (".png", name.suffix)]
    return next(filter(Path.exists, named), named[0])


def make_dataset(config, split, check=True):
    """The "train" or "val" split that a Config names, every image of it decoded once unless `check` is off."""
    if config.dataset == "demo":
        return DemoDataset(split, config.resolution, config.seed)  # the seed is that of the flips
    root, layout = Path(config.data), DATASETS.get(config.dataset)
    records, classes = layout.records(root, split) if layout else folder_records(root, split, config.labels)
    records = readable(records, split, config.skip_broken) if check else records
    dataset = ImageDataset(records, classes, config.resolution, config.seed)
    dataset.unlabeled = layout.unlabeled if layout else -1
    return dataset


def make_prior(config, dataset):
    """The prior that a Config names, or one from the data set's own captions; None where no word is needed."""
    if not needs_prior(config):
        return None
    return shuffled(find_prior(config, dataset), config.shuffle, config.seed)


def find_prior(config, dataset):
    """The prior as it was before any shuffling: the file named, or one that is made once and kept beside the runs."""
    if config.prior.endswith(".npz"):
        return Prior.load(config.prior)
    if config.dataset == "demo" and not config.prior:
        return build_from_corpora([("demo captions", dataset.captions())], PriorConfig(min_count=1), speech=DEMO_SPEECH)
    name, captions = f"{config.dataset} captions", dataset.captions
    if config.prior:
        name, captions = config.prior, functools.partial(read_captions, config.prior)
    options, digest, count = PriorConfig(), hashlib.sha256(), 0
    for count, caption in enumerate(captions(), 1):
        digest.update(f"{caption}\n".encode())
    if not count:
        raise UserError(f"no captions in {name} to make a prior from: give any text, --prior CORPUS, or a finished --prior prior.npz")
    digest.update(repr(options).encode())
    path = Path(config.out).parent / f"prior-{config.dataset}-{digest.hexdigest()[:8]}.npz"
    if path.is_file():
        print(f"prior: {path}, made earlier from the same {count:,} captions of {name}")
        return Prior.load(path)
    print(f"prior: made from {count:,} captions of {name} with PPMI + SVD vectors of that corpus, and kept as {path}")
    prior = build_from_corpora([(name, captions())], options, workers=CORES)
    prior.save(path)
    return prior


class TrainBatches:
    """Sampler of (index, draw) keys for micro-steps `start` … `steps`: a new permutation each epoch, any step reachable at once.

    `batch_size` images per process: together the processes take what one would take with a batch so much larger.
    """

    def __init__(self, length, batch_size, start, steps, seed):
        self.length, self.batch_size, self.start, self.steps, self.seed = length, batch_size, start, steps, seed
        self.share, self.shares = rank(), processes()

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.start, self.steps):
            batch = []
            first = (step * self.shares + self.share) * self.batch_size
            for draw in range(first, first + self.batch_size):
                if draw // self.length != epoch:
                    epoch = draw // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                batch.append((int(order[draw % self.length]), draw))
            yield batch


def evenly(length, count):
    """At most `count` indices spread over 0 … length − 1, as data sets are sorted by class."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def to_images(batch, device):
    """(B, 3, R, R) uint8 → float32 in [-1, 1] on the device."""
    return batch.to(device, non_blocking=True).float().div_(127.5).sub_(1)


def make_loader(dataset, device, workers, **options):
    workers = workers if workers >= 0 else 0 if device.type == "cpu" else 8
    own = torch.Generator()  # a resumed run draws no more from the global one than a whole run does
    pinned, kept = device.type == "cuda", workers > 0
    options.update(worker_init_fn=stand_apart, generator=own, pin_memory=pinned, persistent_workers=kept)
    return DataLoader(dataset, num_workers=workers, **options)


def stand_apart(worker):
    """Ctrl-C reaches every process of a group, but the main one is to finish its step, for which it needs its workers."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


# ---------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, trainer):
    """What `trainer.state` holds, the step, the configuration and the random state, as plain tensors, numbers and strings."""
    state = {"version": CHECKPOINT_VERSION, "config": dataclasses.asdict(trainer.config), "step": trainer.step, "best": trainer.best}
    state["processes"] = processes()
    state.update(trainer.state(), random=torch.get_rng_state())
    for name, value in itertools.chain.from_iterable(state.get(part, {}).items() for part in ("model", "discriminator", "network", "ema")):
        if not value.isfinite().all():
            raise UserError(f"{name} is not finite after step {trainer.step:,}, so '{path}' is kept as it was; try a smaller --lr")
    if trainer.device.type == "cuda":
        state["cuda_random"] = torch.cuda.get_rng_state(trainer.device)
    archive = io.BytesIO()  # torch's own writer ends in a RuntimeError where a disk is full
    torch.save(state, archive)
    with whole_file(path) as temporary:
        temporary.write_bytes(archive.getbuffer())


def load_checkpoint(path, device="cpu"):
    """A dict of `save_checkpoint`. Raises UserError for a file that is missing or something else."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint '{path}': it is no run's folder, or nothing was saved there yet")
    with explained(f"'{path}' cannot be read as a checkpoint of train.py; it is damaged or another program's"):
        with zipfile.ZipFile(path) as archive:  # torch writes a checksum of every record and does not read it
            if damaged := archive.testzip():
                raise UserError(f"'{path}' is damaged: the checksum of {damaged} is wrong; use best.pt, or train again")
        state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict) or not {"version", "config", "step", "random"} <= state.keys():
        raise UserError(f"'{path}' is not a checkpoint of train.py")
    if state["version"] != CHECKPOINT_VERSION:
        raise UserError(f"'{path}' is of checkpoint version {state['version']}, this code reads {CHECKPOINT_VERSION}")
    return state


def fitting(path):
    """A block that builds what a checkpoint describes. Raises UserError where its parts do not belong together."""
    message = f"'{path}' holds other than its configuration says: {{}}"
    return explained(message, KeyError, IndexError, TypeError, ValueError, RuntimeError)


def load_run(path, device, checkpoint="last"):
    """A trained run → (model in evaluation mode, Config, prior or None, step).

    Args:
        path: a run folder.
        checkpoint: "last" or "best".
    """
    file = Path(path) / f"{checkpoint}.pt"
    state = load_checkpoint(file)
    with fitting(file):
        config = Config(**state["config"])
        model = VQModel(config, state["prior"])
        model.load_state_dict(state["model"])
    return model.to(device).eval(), config, state["prior"], state["step"]


def portable(prior):
    """A Prior as tensors and lists of strings, which a checkpoint may hold."""
    if prior is None:
        return None
    return {
        name: prior[name].tolist() if name.endswith("words") else torch.from_numpy(prior[name])
        for name in ("adjective_words", "adjective_vectors", "noun_words", "noun_vectors", "edges", "edge_counts")
    }


# ---------------------------------------------------------------------------------------------
# Training


HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/{}.pth"
HEADS_SHA256 = {
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "squeeze": "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
}
TRUNKS = {"vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1, "squeeze": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1}


def load_lpips(config):
    """LPIPS with published weights. Raises UserError naming each file and flag where one is unavailable."""
    trunk = config.perceptual_trunk
    what = f"torchvision's ImageNet weights of LPIPS's {trunk} trunk", f"LPIPS v0.1's linear heads for {trunk}"
    trunk_state = load_weights(TRUNKS[trunk].url, config.trunk_weights, what[0], "--trunk-weights")
    name, sha256 = f"lpips_{trunk}_v0.1.pth", HEADS_SHA256[trunk]
    head_state = load_weights(HEADS_URL.format(trunk), config.lpips_weights, what[1], "--lpips-weights", name, sha256)
    files = f"{config.trunk_weights or TRUNKS[trunk].url}, {config.lpips_weights or HEADS_URL.format(trunk)}"
    with explained(f"these are not LPIPS's {trunk} trunk and heads: {files}: {{}}", RuntimeError, KeyError):
        return LPIPS(trunk, trunk_state, head_state)


def load_weights(url, local, what, flag, name=None, sha256=None):
    """A published state dict: the local file, or `prior.fetch` with the checksum given, or the start of it in the URL's name.

    Raises:
        UserError: one line with the file, its use, its source and the flag for a local copy.
    """
    in_name = re.search(r"-([0-9a-f]{8,})\.\w+$", url)
    path = local or fetch(url, what, f"pass {flag} FILE", sha256 or in_name and in_name[1], name)
    with explained(f"{path} ({what}) is unavailable: {{}}; get it from {url} and pass {flag} FILE"):
        return torch.load(path, map_location="cpu", weights_only=True)


def psnr(x_hat, x):
    """Peak signal-to-noise ratio of each image, dB: 10 log10(4 / MSE), both clamped to [-1, 1]. (B, 3, H, W) twice → (B,)."""
    error = (x_hat.clamp(-1, 1) - x.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


class Trainer:
    """The state of a run and its step.

    Args:
        config: Config.
        prior: dict of `portable`, or None.
        device: torch.device.
        training_images: how many there are.

    `parallel_model` and `parallel_discriminator` are the same networks, their gradients averaged over processes.
    """

    def __init__(self, config, prior, device, training_images=1):
        torch.manual_seed(config.seed)
        self.config, self.prior, self.device = config, prior, device
        self.step, self.best = 0, -math.inf
        self.steps_per_epoch = math.ceil(training_images / (config.batch_size * config.accumulate * processes()))
        with explained("{}", ValueError):
            self.model = VQModel(config, prior)
        self.model = self.model.to(device, memory_format=torch.channels_last)
        self.generator_optimizer = self._adam(self.model)
        self.discriminator = self.discriminator_optimizer = self.parallel_discriminator = self.perceptual = None
        if config.gan_weight > 0:
            self.discriminator = Discriminator(layers=config.discriminator_layers).to(device, memory_format=torch.channels_last)
            if device.type == "cuda" and processes() > 1:  # batch statistics are those of all processes; gloo cannot
                self.discriminator = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.discriminator)
            self.discriminator_optimizer = self._adam(self.discriminator)
            self.parallel_discriminator = parallel(self.discriminator, device)
        if config.perceptual_weight > 0:
            self.perceptual = load_lpips(config).to(device, memory_format=torch.channels_last)
        # the step at which each code was last chosen: it was used in the latest epoch if that is less than an epoch ago
        self.last_used = [torch.full((size,), -1, dtype=torch.int64, device=device) for size in self.model.codebook.sizes]
        self.parallel_model = parallel(self.model, device)
        if config.compile:  # the decoder's last layer stays apart: the adaptive weight differentiates it alone
            for network in filter(None, (self.model.encoder, self.model.decoder.layers, self.discriminator, self.perceptual)):
                network.compile()

    def _adam(self, network):
        return torch.optim.Adam(network.parameters(), lr=self.config.lr, betas=(0.5, 0.9), fused=True)

    def follow_schedules(self):
        """The learning rate and the quantizers' temperature of this step."""
        config = self.config
        self.model.anneal(self.step / config.steps)
        lr = config.lr * (0.5 + 0.5 * math.cos(math.pi * self.step / config.steps) if config.schedule == "cosine" else 1.0)
        for optimizer in filter(None, (self.generator_optimizer, self.discriminator_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def _parts(self):
        names = ("model", "generator_optimizer", "discriminator", "discriminator_optimizer")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def state(self):
        """Everything that resuming and decoding need, as plain tensors, numbers and strings."""
        return {"prior": self.prior, "last_used": self.last_used, **{name: part.state_dict() for name, part in self._parts().items()}}

    def load(self, state):
        """Go on from a checkpoint's `state`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.last_used = [used.to(self.device) for used in state["last_used"]]

    def reconstruction_loss(self, x_hat, x):
        """First term of Eq. 2, and LPIPS beside it → (total, {name: value})."""
        terms = {"pixel": F.mse_loss(x_hat, x) if self.config.pixel_loss == "l2" else F.l1_loss(x_hat, x)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x_hat, x).mean()
        return terms["pixel"] + self.config.perceptual_weight * terms.get("perceptual", 0.0), terms

    def train_step(self, batches):
        """One step of the generator (encoder, codebooks, decoder) and the discriminator on a list of (B, 3, R, R) micro-batches.

        1. x̂ = G(quantize(E(x))), one forward pass.
        2. The pixel loss and LPIPS are differentiated down to x̂, no further; and from `gan_start` on −D(x̂) likewise,
           which λ of both gradients scales.
        3. One backward pass from x̂ and from the quantizers' losses to every weight of the generator.
        4. The discriminator's hinge loss on x and the same x̂.
        5. Both optimizers step.

        Returns:
            dict of () tensors; "loss" is Eq. 2 and LPIPS, without the adversary.
        """
        self.model.train()
        adversarial = self.discriminator is not None and self.step >= self.config.gan_start
        metrics, share = {}, 1.0 / len(batches)
        self.follow_schedules()
        self.generator_optimizer.zero_grad()
        if adversarial:
            self.discriminator_optimizer.zero_grad()
        for number, x in enumerate(batches):
            with synchronised(self.parallel_model, self.parallel_discriminator, last=number == len(batches) - 1):
                terms, indices = self.micro_step(x, share, adversarial)
            for name, value in terms.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() * share
            for used, chosen in zip(self.last_used, self.model.by_codebook(indices)):
                used[chosen.flatten()] = self.step
        metrics["gradient"] = gradient_norm(self.model)
        self.generator_optimizer.step()
        if adversarial:
            metrics["discriminator_gradient"] = gradient_norm(self.discriminator)
            self.discriminator_optimizer.step()
        self.step += 1
        return metrics

    def micro_step(self, x, share, adversarial):
        """Add the gradients of one micro-batch, times its share of the step → ({name: value}, indices)."""
        with self._autocast():
            output = self.parallel_model(x)
            # Both of the adaptive weight's norms and the generator's backward pass start from the gradients at x̂.
            x_hat = output.x_hat.detach().requires_grad_()  # (B, 3, R, R)
            loss, terms = self.reconstruction_loss(x_hat.to(x.dtype), x)
            (gradient,) = torch.autograd.grad(loss, x_hat)  # (B, 3, R, R)
            if adversarial:
                gradient, gan_terms = self.add_adversary(output.x_hat, x_hat, gradient)
                terms.update(gan_terms)
        torch.autograd.backward([output.x_hat, output.quantizer_loss], [gradient * share, torch.full_like(output.quantizer_loss, share)])
        if adversarial:
            terms.update(self.discriminate(x, x_hat.detach(), share))
        return {**terms, "quantizer": output.quantizer_loss, "loss": loss + output.quantizer_loss}, output.indices

    def add_adversary(self, attached, x_hat, gradient):
        """Add −D(x̂), adaptively weighted, to the gradient at the reconstruction → ((B, 3, R, R), {name: value})."""
        self.discriminator.requires_grad_(False)  # and not the parallel one: these gradients stop at x̂
        generator_loss = -self.discriminator(x_hat).float().mean()
        (gan_gradient,) = torch.autograd.grad(generator_loss, x_hat)  # (B, 3, R, R)
        self.discriminator.requires_grad_(True)
        weight = adaptive_weight(attached, self.model.decoder.to_image.weight, gradient, gan_gradient) * self.config.gan_weight
        return gradient + weight.to(gradient.dtype) * gan_gradient, {"generator": generator_loss, "adaptive_weight": weight}

    def discriminate(self, x, x_hat, share):
        """The discriminator's turn on the same images → {name: value}."""
        with self._autocast():
            real, fake = self.parallel_discriminator(x).float(), self.parallel_discriminator(x_hat).float()  # (B, 1, h, w)
            loss = hinge_loss(real, fake)
        (loss * share).backward()
        return {"discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp and self.device.type == "cuda")

    @torch.no_grad()
    def validate(self, loader, folder, pairs=16):
        """Mean PSNR over a loader; some of its images go to a picture, originals above reconstructions. For `run_steps`."""
        self.model.eval()
        scores, shown, wanted = [], [], set(evenly(len(loader.dataset), pairs))
        for batch in loader:
            x = to_images(batch["image"], self.device)
            x_hat = self.model(x).x_hat
            for row in range(len(x)):
                if len(scores) + row in wanted:
                    shown += [x[row].cpu(), x_hat[row].cpu()]
            scores.extend(psnr(x_hat, x))
        draw_pairs(shown, folder / f"step_{self.step:07d}.png")
        score = torch.stack(scores).mean().item()
        return score, {"psnr": score}, f"PSNR {score:.2f} dB over {len(scores)} images"

    def join_counts(self):
        """Give each process what all have counted."""
        self.last_used = [across(used, "max") for used in self.last_used]

    def statistics(self):
        """Codes of each codebook chosen in the latest epoch, by any process, for metrics.jsonl."""
        self.join_counts()
        return {"codes_used": [int((used >= max(0, self.step - self.steps_per_epoch)).sum()) for used in self.last_used]}

    def describe(self, line):
        """A line of metrics.jsonl in words."""
        losses = " ".join(f"{name} {line[name]:.4f}" for name in ("loss", "pixel", "perceptual", "quantizer") if name in line)
        if "real_logits" in line:
            losses += f" D {line['discriminator']:.3f} (real {line['real_logits']:+.2f}, fake {line['fake_logits']:+.2f})"
            losses += f" λ {line['adaptive_weight']:.3g}"
        return losses + " codes " + " + ".join(f"{used}/{len(every)}" for used, every in zip(line["codes_used"], self.last_used))


def gradient_norm(network):
    """Euclidean norm of all of a network's gradients, ()."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters() if parameter.grad is not None])


def draw_pairs(images, path, columns=8):
    """Originals and reconstructions in turn, (3, H, W) in [-1, 1] → PNG, rounded to 8 bits: a row of each in turn."""
    groups = [images[start : start + 2 * columns] for start in range(0, len(images), 2 * columns)]
    rows = torch.stack([image for group in groups for image in group[0::2] + group[1::2]]).clamp(-1, 1) * 0.5 + 0.5
    grid = torchvision.utils.make_grid(rows, nrow=min(columns, len(images) // 2), padding=2, pad_value=1.0)
    save_png(TF.to_pil_image(grid.mul(255).round().to(torch.uint8)), path)


def codebook_names(sizes):
    """("adjective", "noun") for two codebooks, ("code",) for one."""
    return PARTS if len(sizes) == 2 else ("code",)


def code_words(prior, sizes):
    """A list of words for each codebook: adjectives and nouns, both after each other in a single one, or numbers without a prior."""
    if prior is None:
        return [[str(index) for index in range(size)] for size in sizes]
    words = [list(prior[f"{part}_words"]) for part in PARTS]
    return words if len(sizes) == 2 else [words[0] + words[1]]


# ---------------------------------------------------------------------------------------------
# A run


def is_run(out):
    """Whether a folder is a run of this script."""
    try:
        return "method" in json.loads((out / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def check_folder(out, overwrite):
    """Refuse to touch what is there, unless it is a run and may be overwritten."""
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        if not overwrite:
            raise UserError(f"run '{out}' exists already; go on with --resume, replace it with --overwrite, or name another with --out")
        if not is_run(out):
            raise UserError(f"'{out}' is not a run of train.py, so --overwrite leaves it alone; name another with --out")


def save_config(config, out):
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__}
    with whole_file(out / "config.json") as temporary:
        temporary.write_text(json.dumps({**dataclasses.asdict(config), "versions": versions}, indent=1))


def prepare_inputs(config, resume=False, overwrite=False):
    """→ device, training and validation set. Raises one UserError that lists every problem found.

    A resumed run takes its prior and initial weights from the checkpoint, so those files are not asked for.
    """
    if not resume:
        check_folder(Path(config.out), overwrite)
    if config.download:
        download(config.dataset, Path(config.data))
    names = ("trunk_weights", "lpips_weights") if resume else ("prior", "init", "trunk_weights", "lpips_weights")
    paths = {f"--{name.replace('_', '-')}": getattr(config, name) for name in names}
    check = not rank() or config.skip_broken  # what the first process has found readable is so
    found, problems = {}, [f"{flag} '{path}' does not exist" for flag, path in paths.items() if path and not Path(path).exists()]
    for name, make in (
        ("device", lambda: pick_device(config.device)),
        ("train", lambda: make_dataset(config, "train", check=check and not problems)),
        ("val", lambda: make_dataset(config, "val", check=check and not problems)),
    ):
        try:
            found[name] = make()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if len(found["val"]) == 0:
        raise UserError(f"'{config.data}' has no images in its evaluation split")
    if config.batch_size > len(found["train"]):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(found['train'])} training images")
    return found["device"], found["train"], found["val"]


@contextlib.contextmanager
def new_run_folder(out, config, trainer):
    """A new folder with a configuration and a first checkpoint that takes the place of `out` when the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as kept:
        new = Path(kept) / "new"
        new.mkdir()
        save_config(config, new)
        save_checkpoint(new / "last.pt", trainer)
        yield new
        if out.exists():
            out.rename(Path(kept) / "old")
        new.rename(out)  # from here on, a run that is killed can be resumed


def start_run(trainer, prior, out):
    """Write what a run holds from its first moment: configuration, checkpoint, prior, and codebook at step 0."""
    if trainer.config.init:
        take_published_weights(trainer, trainer.config.init)
    if rank():
        return
    with new_run_folder(out, trainer.config, trainer) as new:
        if prior is not None:
            prior.save(new / "prior.npz")
        trainer.model.eval()
        codebooks = zip(codebook_names(trainer.model.codebook.sizes), trainer.model.codebook())
        save_arrays(new / "codebook_start.npz", **{name: codes.cpu().numpy() for name, codes in codebooks})


def resume_run(trainer, state, out):
    """Give a trainer of either stage the state of a checkpoint, random state and all; its folder forgets what came after."""
    with fitting(out / "last.pt"):
        trainer.step, trainer.best = state["step"], state["best"]
        trainer.load(state)
        torch.set_rng_state(state["random"].cpu())
        if "cuda_random" in state and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), trainer.device)
    if not rank():
        trim_metrics(out / "metrics.jsonl", trainer.step)
        save_config(trainer.config, out)
    new = dataclasses.asdict(trainer.config)
    changed = [f"{name} {old} → {new[name]}" for name, old in state["config"].items() if new[name] != old]
    print(f"resumed at step {trainer.step:,}" + (f"; changed: {', '.join(changed)}" if changed else ""))


def trim_metrics(path, step):
    """Drop the lines written after the checkpoint, so that a resumed run's metrics equal an uninterrupted one's; and halves of files."""
    for half in path.parent.rglob(".*-????????.*"):
        if re.fullmatch(r"\.(last|best|config|metrics|prior|codebook_start|step_\d+)-[a-z0-9_]{8}\.\w+", half.name):
            half.unlink()  # `whole_file` in a process that was killed
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            kept += [line + "\n"] if json.loads(line)["step"] <= step else []
        except (ValueError, TypeError, KeyError):  # the last line of a killed run may be half written
            pass
    with whole_file(path) as temporary:
        temporary.write_text("".join(kept))


def take_published_weights(trainer, path):
    """Give a Trainer's networks the weights of a taming-transformers checkpoint. Raises UserError where it does not fit."""
    state = {name: torch.tensor(value) for name, value in read_tensors(path).items()}
    if not any(name.startswith("encoder.conv_in") for name in state):
        raise UserError(f"--init {path} holds no VQGAN of taming-transformers (a run of train.py goes on with --resume)")
    with explained(f"--init {path}: {{}}; the published f16 networks fit --preset f16", ValueError):
        left = {name.partition(".")[0] for name in load_taming(trainer.model, trainer.discriminator, state)}
    parts = ["encoder", "decoder", "to_codes", "from_codes", "codebook", *["discriminator"] * (trainer.discriminator is not None)]
    said = [", ".join(part for part in parts if (part in left) == kept) for kept in (False, True)]
    print(f"init: {said[0]} of {path}" + (f"; {said[1]} as without it" if said[1] else ""))


def announce(config, trainer, train_set, val_set, out):
    """Three lines before the first step: data, network and codes, losses."""
    count = lambda network: f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"
    sizes, (height, width) = trainer.model.codebook.sizes, trainer.model.grid
    images = " and ".join(f"{len(data):,} {name} images{data.known()}" for name, data in (("training", train_set), ("validation", val_set)))
    print(f"{config.dataset}: {images} at {config.resolution}² → {out}")
    codes = " + ".join(f"{size:,} {name}s" for name, size in zip(codebook_names(sizes), sizes))
    print(f"{config.method} ({config.preset}): {count(trainer.model)} on {trainer.device}, {height}×{width} positions of {codes}")
    terms = [config.pixel_loss, "Gumbel-softmax" if config.quantizer == "gumbel" else f"{config.quantizer} codes"]
    terms[1] += "" if config.quantizer == "gumbel" else f" with β {config.beta} on the {config.beta_on} term"
    terms.append(f"LPIPS {config.perceptual_trunk} × {config.perceptual_weight}" if trainer.perceptual else "no perceptual loss (weight 0)")
    adversary = trainer.discriminator and f"adversary from step {config.gan_start:,}, {count(trainer.discriminator)}"
    print(f"losses: {', '.join([*terms, adversary or 'no adversary'])}", flush=True)


@contextlib.contextmanager
def noted_signals():
    """A list to which a signal of STOPPING adds its number, instead of ending the process; a second one does end it."""
    noted, usual = [], {}

    def note(number, frame):
        noted.append(number)
        signal.signal(number, usual[number])

    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        usual.update((number, signal.getsignal(number)) for number in STOPPING)
        for number in STOPPING:
            signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def own_noise(trainer):
    """Noise and dropout of all processes but the first, whose random state is the checkpoint's, follow from seed, rank and step."""
    if rank():
        torch.manual_seed(trainer.config.seed + 1_000_003 * rank() + trainer.step)


class Journal:
    """What a run tells while it trains: lines of metrics.jsonl, the progress line, and the first value that is not finite.

    Args:
        trainer: Trainer, or StageTrainer of synthesize.py; out: folder of metrics.jsonl.
    """

    def __init__(self, trainer, out):
        self.trainer, self.out, self.progress = trainer, out, Progress()
        self.file = open(os.devnull if rank() else out / "metrics.jsonl", "a", buffering=1)
        self.first_fault = {}  # name → () tensor, the first step at which that value was not finite, or infinity
        self.recent = deque([(trainer.step, time.monotonic())], maxlen=20)  # speed is that of the latest lines
        self.waited = 0.0  # seconds for data since the last line

    def waiting(self, batches, count):
        """The next `count` micro-batches, and the time that they took is noted."""
        began = time.monotonic()
        group = [next(batches) for _ in range(count)]
        self.waited += time.monotonic() - began
        return group

    def note_faults(self, values):
        """Of a dict name → () tensor; nothing waits for the device."""
        for name, value in values.items():
            first = torch.where(value.detach().isfinite(), math.inf, self.trainer.step)
            self.first_fault[name] = torch.minimum(self.first_fault[name], first) if name in self.first_fault else first

    def check_finite(self, since=None):
        """Raise UserError for the earliest fault that any process noted, or of a dict name → step, infinity where there is none."""
        since = since or {name: -across(-first, "max").item() for name, first in self.first_fault.items()}
        name = min(since, key=since.get)
        if since[name] < math.inf:
            saved = (
                f"the last good checkpoint is '{self.out / 'last.pt'}'" if (self.out / "last.pt").exists() else "there is no checkpoint yet"
            )
            raise UserError(f"{name.replace('_', ' ')} is not finite at step {since[name]:,.0f}; {saved}; try a smaller --lr")

    def write(self, values):
        """A line of metrics.jsonl."""
        self.file.write(json.dumps({"step": self.trainer.step, **values}) + "\n")

    def write_step(self, metrics, now=False):
        """The line of a step's dict of () tensors, and a line for people: losses, codes used, speed, time left."""
        metrics = {name: across(value, "mean").item() for name, value in metrics.items()}  # waits for the device
        trainer, config, clock = self.trainer, self.trainer.config, time.monotonic()
        wait = self.waited / (trainer.step - self.recent[-1][0])
        self.recent.append((trainer.step, clock))
        steps, seconds = trainer.step - self.recent[0][0], max(clock - self.recent[0][1], 1e-9)
        speed = steps * config.batch_size * config.accumulate * processes() / seconds
        line = {**metrics, **trainer.statistics(), "images_per_second": round(speed, 2), "data_wait": round(wait, 4)}
        self.write(line)
        self.waited, left = 0.0, int((config.steps - trainer.step) * seconds / steps)
        self.progress(
            f"step {trainer.step:,}/{config.steps:,} {trainer.describe(line)} {speed:.3g} images/s "
            f"waits {1000 * wait:.0f} ms/step for data, left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}",
            now,
        )

    def write_validation(self, values, words):
        """The line of a validation's dict of floats, and its words."""
        self.write({f"validation_{name}": value for name, value in values.items()})
        self.progress(f"step {self.trainer.step:,}: validation {words}", now=True)


def run_steps(trainer, batches, validate, out):
    """The loop of both stages: step, log, validate, save. A signal of STOPPING ends it after the step, with a checkpoint.

    Args:
        trainer: Trainer, or StageTrainer of synthesize.py.
        batches: iterator of micro-batches.
        validate: () → score, the higher the better; dict of floats to log; and their words.
        out: folder of metrics.jsonl, last.pt and best.pt.
    Raises:
        UserError: where a value is not finite, before it is saved.
        SystemExit: of 128 + the signal's number.
    """
    config, journal = trainer.config, Journal(trainer, out)
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    own_noise(trainer)
    with journal.file, noted_signals() as signals:
        while trainer.step < config.steps:
            metrics = trainer.train_step(journal.waiting(batches, config.accumulate))
            journal.note_faults(metrics)
            last = trainer.step == config.steps
            logs, validates = (last or trainer.step % every == 0 for every in (config.log_every, config.eval_every))
            stop = max(signals, default=0)
            if processes() > 1:  # all of them stop at the same step, at one where they meet anyway
                stop = int(across(torch.tensor(stop, device=trainer.device), "max")) if logs else 0
            if logs or validates or stop:
                journal.check_finite()
            if logs:
                journal.write_step(metrics, now=last)
            if validates or stop:
                trainer.join_counts()
                own_noise(trainer)
                if not rank():
                    if validates:
                        keep_best(trainer, validate, journal)
                    save_checkpoint(out / "last.pt", trainer)
            if stop and not last:
                name = signal.Signals(stop).name
                journal.progress(f"stopped by {name} after step {trainer.step:,}, which is saved; --resume goes on", now=True)
                raise SystemExit(128 + stop)
    if processes() > 1:
        torch.distributed.barrier()


def keep_best(trainer, validate, journal):
    """Validate, and keep the checkpoint where the score is the best so far."""
    score, values, words = validate()
    journal.check_finite({f"validation {name}": math.inf if math.isfinite(value) else trainer.step for name, value in values.items()})
    journal.write_validation(values, words)
    if score > trainer.best:
        trainer.best = score
        save_checkpoint(journal.out / "best.pt", trainer)


# ---------------------------------------------------------------------------------------------
# The whole of it


def loaders(trainer, train_set, val_set):
    """Iterator of training micro-batches from the trainer's step on, images in [-1, 1]; and a loader of validation images."""
    config, device = trainer.config, trainer.device
    first, last = trainer.step * config.accumulate, config.steps * config.accumulate
    order = TrainBatches(len(train_set), config.batch_size, first, last, config.seed)
    batches = make_loader(train_set, device, config.workers, batch_sampler=order)
    validation = torch.utils.data.Subset(val_set, evenly(len(val_set), config.eval_images))
    validation = make_loader(validation, device, 0, batch_size=min(config.batch_size, len(validation)))
    return (to_images(batch["image"], device) for batch in batches), validation


CHANGEABLE = "out steps lr device data download skip_broken workers log_every eval_every eval_images amp compile deterministic".split()


def resumed_config(kind, state, given, changeable, name):
    """The configuration, a dataclass `kind`, of a checkpoint with the flags of a --resume.

    Raises:
        UserError: for flags or processes that would make it another run, or if nothing is left to do.
    """
    stored = dataclasses.asdict(kind(**state["config"]))
    fixed = [flag for flag, value in given.items() if flag not in changeable and value != stored[flag]]
    if fixed:
        raise UserError(
            f"--resume cannot change --{fixed[0].replace('_', '-')} from {stored[fixed[0]]!r}; start another run, or --overwrite"
        )
    trained_by = state.get("processes", 1)  # checkpoints from before torchrun do not say
    if trained_by != processes():
        raise UserError(f"'{name}' was trained by {trained_by} processes; resume it by as many, not by {processes()}")
    config = kind(**{**stored, **given})
    if state["step"] >= config.steps:
        raise UserError(f"'{name}' is at step {state['step']} already; give --steps more than that")
    return config


def parse(argv=None):
    """Command line → (Config, checkpoint that --resume goes on from or None, whether to overwrite).

    Explicit flags win over the method's choices, these over the recipe's and the preset's.
    """
    presets = [f"{name}: {values}" for name, values in PRESETS.items() if values]
    parser = Parser(description=__doc__, epilog=f"presets: {'; '.join(presets)}\nmethods: {', '.join(METHODS)}")
    add_flags(parser, Config())
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, with its configuration")
    start.add_argument("--overwrite", action="store_true", help="delete a run of the same name first")
    given = vars(parser.parse_args(argv))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    config = resolve(given, check=not resume)
    if not resume:
        return config, None, overwrite
    last = Path(config.out) / "last.pt"
    state = load_checkpoint(last)
    with fitting(last):
        config = resumed_config(Config, state, {**given, "out": config.out}, CHANGEABLE, config.out)
    config.lr = config.lr or usual_lr(config)
    return check_config(config), state, False


def main(argv=None):
    """A run from its flags to its last step."""
    with torchrun():
        config, state, overwrite = parse(argv)
        out, resume = Path(config.out), state is not None
        with first_process_first():
            device, train_set, val_set = prepare_inputs(config, resume, overwrite)
            prior = None if resume else make_prior(config, train_set)  # §3.3 steps 1 and 2: words, vectors, graph
        with fitting(out / "last.pt") if resume else contextlib.nullcontext():
            trainer = Trainer(config, state["prior"] if resume else portable(prior), device, len(train_set))  # step 3: the networks
        if resume:
            resume_run(trainer, state, out)
        else:
            start_run(trainer, prior, out)  # nothing was touched before all this succeeded
        announce(config, trainer, train_set, val_set, out)
        batches, validation = loaders(trainer, train_set, val_set)
        run_steps(trainer, batches, lambda: trainer.validate(validation, out / "reconstructions"), out)  # Eq. 1 to 3, each step
        if not rank():
            picture = sorted((out / "reconstructions").glob("*.png"))[-1]
            print(f"done: {out / 'last.pt'}; look at {picture}; measure with: python evaluate.py {out}")


# ---------------------------------------------------------------------------------------------
# Appendix, the demo: birds in scenes, after the paper's own examples, drawn and described by code

# fmt: off
COLOURS = {  # RGB in [0, 1]
    "red": (.80, .13, .11), "crimson": (.66, .07, .16), "orange": (.93, .48, .11), "golden": (.89, .67, .18), "yellow": (.95, .84, .20),
    "green": (.25, .55, .22), "olive": (.45, .47, .20), "teal": (.08, .50, .53), "blue": (.17, .38, .75), "purple": (.42, .23, .53),
    "pink": (.91, .55, .57), "rusty": (.62, .31, .14), "chestnut": (.47, .24, .13), "brown": (.43, .31, .20), "beige": (.78, .70, .57),
    "white": (.95, .95, .93), "pale": (.86, .84, .77), "gray": (.55, .57, .60), "dark": (.21, .21, .25), "black": (.09, .09, .11)}
# fmt: on


# Plumage and build; sizes are shares of the picture's width, lengths in units of the body, a pattern is that of the breast
Species = namedtuple(
    "Species",
    "name crown throat back breast belly wing tail beak leg size "
    "plump neck beak_length beak_depth hook tail_length legs crest pattern wing_bar mask",
    defaults=(1.0, 0.0, 0.2, 0.055, 0.0, 0.42, 0.22, 0.0, "plain", "", ""),
)
# fmt: off
SPECIES = (
    Species("robin", "dark", "orange", "brown", "orange", "white", "brown", "brown", "yellow", "brown", .40, 1.1),
    Species("cardinal", "red", "black", "crimson", "red", "red", "crimson", "crimson", "orange", "brown",
            .42, 1.0, 0, .15, .09, .02, .62, .2, .24, mask="black"),
    Species("jay", "blue", "white", "blue", "pale", "white", "blue", "blue", "black", "dark",
            .44, 1.0, 0, .2, .06, 0, .55, .22, .2, wing_bar="white"),
    Species("goldfinch", "black", "yellow", "yellow", "yellow", "white", "black", "black", "orange", "pink",
            .34, 1.15, 0, .14, .075, 0, .34, wing_bar="white"),
    Species("kingfisher", "teal", "white", "teal", "orange", "orange", "teal", "blue", "black", "red",
            .38, 1.1, 0, .44, .06, 0, .2, .1, .08),
    Species("heron", "gray", "white", "gray", "pale", "white", "gray", "gray", "yellow", "olive",
            .38, .72, .5, .42, .05, 0, .24, .62, .16, "striped", mask="black"),
    Species("sparrow", "chestnut", "gray", "brown", "beige", "pale", "chestnut", "brown", "dark", "pink",
            .33, 1.15, 0, .13, .075, 0, .36, .2, 0, "striped", "white"),
    Species("crow", "black", "black", "black", "black", "dark", "black", "black", "black", "black",
            .50, .92, .04, .26, .085, .03, .48),
    Species("bullfinch", "black", "pink", "gray", "pink", "pink", "dark", "black", "black", "brown",
            .36, 1.3, 0, .11, .09, .02, .36, .18, wing_bar="white"),
    Species("magpie", "black", "black", "black", "black", "white", "blue", "teal", "black", "black",
            .42, .9, 0, .21, .065, .01, .88, .26, wing_bar="white"),
    Species("oriole", "black", "black", "orange", "golden", "yellow", "black", "orange", "gray", "gray",
            .38, .95, 0, .2, .05, 0, .46, wing_bar="white"),
    Species("gull", "white", "white", "gray", "white", "white", "gray", "white", "yellow", "pink",
            .47, .92, .06, .25, .065, .05, .36, .28),
    Species("parrot", "red", "yellow", "green", "green", "olive", "green", "blue", "beige", "gray",
            .44, 1.0, 0, .14, .11, .12, .7, .14, wing_bar="yellow"),
    Species("duck", "green", "white", "brown", "chestnut", "pale", "gray", "white", "yellow", "orange",
            .48, 1.1, .14, .24, .065, -.03, .2, .14, mask="green"),
    Species("wren", "brown", "beige", "rusty", "beige", "beige", "rusty", "rusty", "dark", "pink",
            .30, 1.35, 0, .19, .04, .04, .22, .18, 0, "striped"),
    Species("thrush", "brown", "white", "olive", "pale", "white", "brown", "olive", "brown", "pink",
            .38, 1.12, 0, .19, .05, 0, .4, .24, 0, "spotted"),
)
LIGHTS = {  # words for it, its colour, the sky's colours above and at the horizon
    "morning": (("warm", "golden"), (1.08, 1.0, .88), (.55, .68, .86), (.98, .84, .66)),
    "noon": (("bright", "sunny"), (1.06, 1.05, 1.0), (.28, .52, .86), (.72, .85, .95)),
    "cloud": (("cloudy", "dim"), (.90, .93, .97), (.62, .66, .71), (.80, .82, .84)),
    "evening": (("rosy", "soft"), (1.04, .90, .82), (.40, .38, .62), (.97, .62, .48)),
    "mist": (("misty", "cold"), (.95, .98, 1.0), (.76, .80, .83), (.88, .90, .91))}
PLACES = {  # what the bird is on, and words for it; words for what is behind
    "forest": ("branch", ("mossy", "bare", "thick"), "tree", ("leafy", "green", "tall")),
    "meadow": ("post", ("wooden", "old", "narrow"), "grass", ("fresh", "tall", "green")),
    "lake": ("water", ("calm", "rippled", "clear"), "shore", ("distant", "green", "quiet")),
    "beach": ("sand", ("smooth", "wet", "pale"), "sea", ("blue", "calm", "open")),
    "cliff": ("rock", ("rough", "gray", "steep"), "sky", ("wide", "open", "empty")),
    "field": ("snow", ("fresh", "white", "deep"), "hill", ("low", "distant", "bare")),
    "garden": ("twig", ("thin", "leafy", "bare"), "flower", ("pink", "bright", "small"))}
# fmt: on
SEGMENTS = ("sky", "tree", "ground", "water", "perch", "back", "breast", "belly", "head", "wing", "tail", "beak", "eye", "leg", "flower")
DEMO_ADJECTIVES = frozenset(COLOURS) | frozenset(
    "tiny small large big plump round slender long short thick thin pointed curved sharp plain spotted striped glossy smooth fluffy folded open "
    "warm bright sunny cloudy dim rosy soft misty cold mossy bare wooden old narrow calm rippled clear wet rough steep fresh deep leafy "
    "tall distant quiet blue wide empty low broad".split()
)
DEMO_NOUNS = frozenset(
    (
        *(species.name for species in SPECIES),
        *LIGHTS,
        *PLACES,
        *"bird breast belly back wing tail head crown crest throat beak bill leg foot eye feather plumage body neck mask bar light day scene "
        "branch post water sand rock snow twig tree grass shore sea sky hill flower spot stripe".split(),
    )
)
DEMO_SPEECH = WordListSpeech(DEMO_ADJECTIVES, DEMO_NOUNS, {"feet": "foot"})


# What does not depend on a picture's resolution: a species' index, a place and a light; its share of the species' size; a pose;
# where it is, which way it faces (1: right, −1: left), its tilt in radians; a word each for light, perch and background; a seed
Scene = namedtuple("Scene", "species place light scale pose x y facing tilt words seed")
POSES = {"lake": "swimming", "forest": "perched", "garden": "perched", "meadow": "perched"}


def sample_scene(seed, split, index):
    """The scene that (seed, split, index) determines."""
    key = (seed, 0 if split == "train" else 1, index)
    rng = np.random.default_rng(key)
    species = int(rng.integers(len(SPECIES)))
    place, light = (str(rng.choice(list(table))) for table in (PLACES, LIGHTS))
    pose = "flying" if rng.random() < 0.18 else POSES.get(place, "standing")
    words = tuple(str(rng.choice(choices)) for choices in (LIGHTS[light][0], PLACES[place][1], PLACES[place][3]))
    scale, x, y = rng.uniform(0.82, 1.18), rng.uniform(0.42, 0.58), rng.uniform(-0.04, 0.04)
    facing, tilt = int(rng.choice((-1, 1))), rng.uniform(-0.18, 0.12)
    return Scene(species, place, light, scale, pose, x, y, facing, tilt, words, (*key, 1))


class Canvas:
    """A square picture painted back to front by signed distances, so edges are smooth at any size."""

    def __init__(self, resolution, rng):
        self.pixel, self.rng = 1.0 / resolution, rng
        centre = (np.arange(resolution, dtype=np.float32) + 0.5) * self.pixel
        self.x, self.y = np.meshgrid(centre, centre)
        self.image = np.zeros((resolution, resolution, 3), np.float32)
        self.segmentation = np.zeros((resolution, resolution), np.uint8)

    def paint(self, colour, cover, segment=None):
        """Blend a colour, (3,) or (R, R, 3), where `cover` in [0, 1] says."""
        self.image += cover[..., None] * (np.asarray(colour, np.float32) - self.image)
        if segment is not None:
            self.segmentation[cover > 0.5] = SEGMENTS.index(segment)

    def inside(self, distance, softness=1.0):
        """Cover of the region of negative signed distance, in units of the picture's width."""
        return np.clip(0.5 - distance / (self.pixel * softness), 0, 1)

    def noise(self, across, along=None, octaves=2, x=None, y=None):
        """Smooth noise in [0, 1] of about `across` × `along` bumps over the picture."""
        x, y = self.x if x is None else x, self.y if y is None else y
        total = 0.0
        for octave in range(octaves):
            columns, rows = (max(2, int(n * 2**octave)) for n in (across, along or across))
            lattice = self.rng.random((rows + 2, columns + 2), dtype=np.float32)
            total = total + 0.5**octave * scipy.ndimage.map_coordinates(lattice, (np.mod(y, 1) * rows, np.mod(x, 1) * columns), order=1)
        return total / (2 - 0.5 ** (octaves - 1))


def stroke(x, y, points, radii):
    """Signed distance to a chain of tapered capsules, and the position along it in [0, 1]."""
    distance, along = np.full(x.shape, 1e3, np.float32), np.zeros(x.shape, np.float32)
    last = len(points) - 1
    for i, ((ax, ay), (bx, by), ra, rb) in enumerate(zip(points, points[1:], radii, radii[1:])):
        dx, dy = bx - ax, by - ay
        t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
        d = np.hypot(x - ax - t * dx, y - ay - t * dy) - (ra + t * (rb - ra))
        along = np.where(d < distance, (i + t) / last, along)
        distance = np.minimum(distance, d)
    return distance, along


def ellipse(x, y, cx, cy, a, b):
    """Approximate signed distance to an ellipse, and its height as a dome in [0, 1]."""
    r2 = ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2
    return (np.sqrt(r2) - 1) * min(a, b), np.sqrt(np.clip(1 - r2, 0, 1))


def rgb(name):
    return np.array(COLOURS[name], np.float32)


def paint_background(canvas, scene):
    """Sky, what lies behind, and what the bird is on; returns the height of the bird's feet."""
    _, _, above, horizon = LIGHTS[scene.light]
    x, y, level = canvas.x, canvas.y, 0.62
    canvas.paint(np.array(above) + np.clip(y / level, 0, 1)[..., None] * (np.array(horizon) - above), np.ones_like(x), "sky")
    clouds = np.clip(canvas.noise(3, 6, 3) * 2.2 - 1.1, 0, 1) * np.clip(1.2 - y / level, 0, 1)
    canvas.paint((0.97, 0.96, 0.95), 0.55 * clouds)
    fbm, fine = canvas.noise(5, 5, 3), canvas.noise(24, 24, 2)
    if scene.place in ("forest", "garden"):
        green = rgb("green") * (0.5 + 0.55 * fbm[..., None]) + 0.10 * fine[..., None] * rgb("yellow")
        canvas.paint(green, np.clip(0.8 + fbm * 0.5, 0, 1), "tree")
        for _ in range(9):
            bx, by, radius, glow = canvas.rng.random(4)
            blob = canvas.inside(np.hypot(x - bx, y - by) - 0.02 - 0.05 * radius, 8 + 0.02 / canvas.pixel)
            if scene.place == "garden":
                petal = rgb(("pink", "yellow", "white", "red", "purple")[int(glow * 5)])
                canvas.paint(petal * (0.75 + 0.3 * fine[..., None]), 0.9 * blob, "flower")
            else:
                canvas.paint(np.array(horizon), 0.35 * glow * blob)
    else:
        ridge = level - 0.05 - 0.16 * canvas.noise(4, 2, 3, x=x, y=np.full_like(x, 0.3))
        far = {"field": rgb("pale") * 0.82, "cliff": rgb("blue") * 0.55 + 0.3, "beach": rgb("teal") * 0.6 + 0.3}
        far = far.get(scene.place, rgb("green") * 0.7 + 0.12) * (0.8 + 0.35 * fbm[..., None])
        canvas.paint(far, canvas.inside(ridge - y, 2), "tree" if scene.place in ("meadow", "lake") else None)
        depth = np.clip((y - level) / (1 - level), 0, 1)
        ground = canvas.inside(level - y, 2)
        if scene.place in ("lake", "beach"):
            waves = canvas.noise(5, 40, 2)
            water = (rgb("teal") * 0.45 + np.array(horizon, np.float32) * 0.4) * (0.75 + 0.5 * waves[..., None] * (0.4 + depth[..., None]))
            canvas.paint(water, ground, "water")
        if scene.place == "beach":
            shore = level + 0.10 + 0.03 * canvas.noise(6, 2, 1, y=np.full_like(x, 0.5))
            canvas.paint((1, 1, 1), 0.6 * canvas.inside(np.abs(y - shore) - 0.008, 3))
            canvas.paint(rgb("beige") * (0.85 + 0.2 * fine[..., None] + 0.1 * depth[..., None]), canvas.inside(shore - y, 2), "ground")
        if scene.place in ("meadow", "field", "cliff"):
            blades = canvas.noise(70, 7, 2)
            surface = {"meadow": ("green", 0.65, 0.55, blades), "field": ("white", 0.86, 0.16, fbm)}
            colour, base, contrast, grain = {**surface, "cliff": ("gray", 0.45, 0.8, canvas.noise(9, 14, 4))}[scene.place]
            surface = rgb(colour) * (base + contrast * grain[..., None])
            canvas.paint(surface * (0.8 + 0.25 * depth[..., None]), ground, "ground")
    return paint_perch(canvas, scene, fine)


def paint_perch(canvas, scene, fine):
    """Branch, twig, post or rock under the bird; returns the height of its top."""
    x, y, foot = canvas.x, canvas.y, 0.74 + scene.y
    bark = rgb("brown") * (0.55 + 0.75 * canvas.noise(14, 60, 2)[..., None])
    slope = canvas.rng.uniform(-0.06, 0.06)
    if scene.place in ("forest", "garden"):
        radius = 0.035 if scene.place == "forest" else 0.016
        top = foot + radius
        distance, _ = stroke(x, y, ((-0.1, top - slope), (scene.x, top), (1.1, top + 1.5 * slope)), (1.3 * radius, radius, 0.7 * radius))
        shade = np.clip(1.15 + (top - y) / radius * 0.35, 0.4, 1.4)
        moss = (scene.words[1] == "mossy") * np.clip(fine * 2 - 0.6, 0, 1)[..., None]
        colour = bark * (1 - 0.75 * moss) + moss * rgb("green") * 0.7
        canvas.paint(colour * shade[..., None], canvas.inside(distance), "perch")
        for _ in range(5 if scene.words[1] != "bare" else 0):
            lx, angle = canvas.rng.uniform(0, 1), canvas.rng.uniform(0.5, 2.6)
            tip = (lx + 0.09 * math.cos(angle), top + 0.09 * math.sin(angle))
            leaf, along = stroke(x, y, ((lx, top), ((lx + tip[0]) / 2, (top + tip[1]) / 2), tip), (0.006, 0.024, 0.002))
            canvas.paint(rgb("green") * (0.65 + 0.5 * along[..., None]), canvas.inside(leaf), "tree")
    elif scene.place == "meadow":
        post = np.maximum(np.abs(x - scene.x) - 0.055, foot - y)
        round_shade = 0.55 + 0.6 * np.sqrt(np.clip(1 - ((x - scene.x + 0.015) / 0.07) ** 2, 0, 1))
        canvas.paint(bark * 1.15 * round_shade[..., None], canvas.inside(post), "perch")
    elif scene.place == "cliff":
        stone, dome = ellipse(x, y, scene.x + 0.03, foot + 0.22, 0.36, 0.24)
        crag = stone + 0.04 * (canvas.noise(7, 7, 3) - 0.5)
        canvas.paint(rgb("gray") * (0.35 + 0.35 * dome[..., None] + 0.5 * canvas.noise(12, 12, 3)[..., None]), canvas.inside(crag), "perch")
    return foot


def paint_bird(canvas, scene, foot):
    """The bird, in its own coordinates: body at the origin, one unit long, facing +x."""
    kind = SPECIES[scene.species]
    scale = 1.2 * kind.size * scene.scale
    depth = 0.25 * kind.plump
    rise = {"perched": depth + 0.55 * kind.legs, "standing": depth + kind.legs, "swimming": 0.4 * depth, "flying": 0.75}[scene.pose]
    cx, cy = scene.x, foot - rise * scale
    if scene.pose == "flying":
        cy = max(cy, 0.75 * scale)  # room for the wings
    tilt = scene.tilt + (0.12 if scene.pose == "swimming" else -0.30 if scene.pose == "perched" else -0.05)
    dx, dy = (canvas.x - cx) * scene.facing / scale, (canvas.y - cy) / scale
    x, y = dx * math.cos(tilt) - dy * math.sin(tilt), dx * math.sin(tilt) + dy * math.cos(tilt)
    bird = BirdPainter(canvas, kind, scene, x, y, dx, dy, scale, depth)
    if scene.pose != "flying" and scene.pose != "swimming":
        bird.legs(foot - cy)
    if scene.pose == "flying":
        bird.raised_wing(0.16, 0.7)
    bird.tail()
    bird.body()
    bird.head()
    if scene.pose == "flying":
        bird.raised_wing(-0.06, 1.0)
    else:
        bird.folded_wing()
    if scene.pose == "swimming":
        waterline = canvas.inside(foot + 0.006 * np.sin(canvas.x * 60) - canvas.y, 2) * canvas.inside(np.abs(dx) - 0.75, 12)
        ripple = canvas.noise(6, 50, 2)[..., None]
        canvas.paint(canvas.image * 0.35 + rgb("teal") * 0.35 * (0.7 + 0.6 * ripple) + 0.12, waterline, "water")


class BirdPainter:
    """Paints the parts of one bird; x, y run along its tilted body, upright dx, dy along gravity."""

    def __init__(self, canvas, kind, scene, x, y, dx, dy, scale, depth):
        self.canvas, self.kind, self.x, self.y, self.dx, self.dy, self.scale, self.depth = canvas, kind, x, y, dx, dy, scale, depth
        self.glow = np.array(LIGHTS[scene.light][1], np.float32)
        self.down = canvas.noise(40, 40, 2, x=x * 0.5 + 0.5, y=y * 0.5 + 0.5)  # fine feathers
        lift, reach = kind.neck, 0.55 * kind.neck
        self.skull = (0.40 + 0.3 * reach, -0.24 - 0.9 * lift)
        self.skull_radius = 0.165 if kind.neck < 0.3 else 0.125
        self.light = (-0.35, -0.75, 0.75)

    def paint(self, colour, distance, segment, shade=1.0, softness=1.0):
        """`distance` in the bird's own units; colour is darkened by `shade` and tinted by the light."""
        colour = np.asarray(colour, np.float32) * np.asarray(shade, np.float32)[..., None] * self.glow
        self.canvas.paint(np.clip(colour, 0, 1), self.canvas.inside(distance * self.scale, softness), segment)

    def shade(self, height):
        """Light on a relief of `height` in bird units: ambient, diffuse and a soft highlight."""
        step = self.canvas.pixel / self.scale
        gy, gx = np.gradient(height, step)
        length = np.sqrt(gx * gx + gy * gy + 1)
        toward = (-gx * self.light[0] - gy * self.light[1] + self.light[2]) / length / 1.12
        gloss = 0.35 if self.kind.back in ("black", "teal", "green") else 0.12
        return 0.48 + 0.62 * np.clip(toward, 0, 1) + gloss * np.clip(toward, 0, 1) ** 12

    def legs(self, ground):
        for offset in (0.02, 0.11):
            knee = (offset - 0.03, self.depth * 0.8 + 0.4 * (ground / self.scale - self.depth))
            foot = (offset + 0.02, ground / self.scale)
            joints = ((offset, self.depth * 0.5), knee, foot, (foot[0] + 0.09, foot[1] + 0.01))
            distance, _ = stroke(self.dx, self.dy, joints, (0.028, 0.017, 0.015, 0.012))
            self.paint(rgb(self.kind.leg), distance, "leg", 0.9 + 0 * self.x)

    def tail(self):
        length = self.kind.tail_length
        feathers = ((-0.28, 0.0), (-0.42, 0.05), (-0.40 - length, 0.10 + 0.12 * length))
        distance, along = stroke(self.x, self.y, feathers, (0.12, 0.085, 0.055))
        barbs = 0.82 + 0.22 * np.sin((self.y - 0.2 * self.x) * 75) * along + 0.15 * self.down
        self.paint(rgb(self.kind.tail), distance, "tail", barbs)

    def body(self):
        """Torso and neck as one relief, coloured by soft regions of plumage."""
        kind, x, y = self.kind, self.x, self.y
        torso, dome = ellipse(x, y, 0, 0, 0.43, self.depth)
        chest, chest_dome = ellipse(x, y, 0.16, 0.02, 0.27, self.depth * 0.98)
        hx, hy = self.skull
        width = self.skull_radius * 0.85
        neck, _ = stroke(x, y, ((0.22, -0.06), ((0.30 + hx) / 2, (hy - 0.05) / 2), (hx, hy)), (self.depth * 0.72, width, width))
        distance = np.minimum(np.minimum(torso, chest), neck)
        blend = np.clip(0.5 + 6 * (torso - neck), 0, 1)
        distance = distance - 0.02 * np.exp(-(((torso - neck) / 0.05) ** 2)) * (neck < 0.08)
        height = np.maximum(np.maximum(dome * self.depth, chest_dome * self.depth), np.sqrt(np.clip(-neck, 0, None) * 0.12) * blend)
        relief = self.shade(scipy.ndimage.gaussian_filter(height, 0.012 * self.scale / self.canvas.pixel) + 0.012 * self.down)
        soft = lambda value, width: 1 / (1 + np.exp(-np.clip(value / width, -30, 30)))
        under = soft(y - 0.02 + 0.25 * (x - 0.1) * (x < 0.1), 0.025)
        front = soft(x + 0.9 * y - 0.16 + 0.04 * self.down, 0.03) * soft(y + 0.16 - 0.1 * x, 0.04)
        colour = rgb(kind.back) + under[..., None] * (rgb(kind.belly) - rgb(kind.back))
        breast = rgb(kind.breast)
        if kind.pattern == "spotted":
            spots = np.clip(np.sin(x * 46 + 3 * np.sin(y * 20)) * np.sin(y * 46) * 3 - 1, 0, 1)
            breast = breast * (1 - 0.75 * spots[..., None])
        elif kind.pattern == "striped":
            streaks = np.clip(np.sin((x - 0.35 * y) * 62) * 2.2 - 0.7 + self.down, 0, 1)
            breast = breast * (1 - 0.5 * streaks[..., None])
        colour = colour + front[..., None] * (breast - colour)
        throat = soft(0.15 - np.hypot(x - hx + 0.02, y - hy - 0.17), 0.03)
        colour = colour + throat[..., None] * (rgb(kind.throat) - colour)
        outline = distance + 0.012 * (self.down - 0.5)
        segments = np.where(front > 0.5, "breast", np.where(under > 0.5, "belly", "back"))
        self.paint(colour * (0.86 + 0.28 * self.down[..., None]), outline, "back", relief)
        covered = self.canvas.inside(outline * self.scale) > 0.5
        for name in ("breast", "belly"):
            self.canvas.segmentation[covered & (segments == name)] = SEGMENTS.index(name)

    def head(self):
        """Crest, beak, skull with crown, throat and mask, and the eye."""
        kind, x, y = self.kind, self.x, self.y
        (hx, hy), radius = self.skull, self.skull_radius
        if kind.crest:
            tip = (hx - 0.17 - 0.3 * kind.crest, hy - radius - 0.55 * kind.crest)
            crest, _ = stroke(
                x, y, ((hx + 0.03, hy - 0.6 * radius), (hx - 0.09, hy - radius - 0.3 * kind.crest), tip), (0.09, 0.055, 0.008)
            )
            self.paint(rgb(kind.crown), crest, "head", 0.75 + 0.35 * self.down)
        length, bend = kind.beak_length, kind.hook
        root, tip = (hx + 0.75 * radius, hy + 0.03), (hx + radius + length, hy + 0.05 + bend)
        middle = ((root[0] + tip[0]) / 2 + 0.35 * abs(bend), (root[1] + tip[1]) / 2 - 0.5 * bend)
        beak, along = stroke(x, y, (root, middle, tip), (kind.beak_depth, kind.beak_depth * 0.72, 0.008 if bend >= 0 else 0.035))
        self.paint(rgb(kind.beak), beak, "beak", np.where(y - hy - 0.035 - 0.5 * bend * along < 0, 1.08, 0.72))
        skull, dome = ellipse(x, y, hx, hy, radius * 1.08, radius)
        lower = 1 / (1 + np.exp(-np.clip((y - hy - 0.03 + 0.35 * (x - hx)) / 0.02, -30, 30)))
        colour = rgb(kind.crown) + lower[..., None] * (rgb(kind.throat) - rgb(kind.crown))
        if kind.mask:
            band = np.exp(-((((x - hx - 0.07) / 0.12) ** 2 + ((y - hy - 0.01) / 0.045) ** 2) ** 2))
            colour = colour + band[..., None] * (rgb(kind.mask) - colour)
        self.paint(colour * (0.88 + 0.24 * self.down[..., None]), skull + 0.008 * (self.down - 0.5), "head", self.shade(dome * radius))
        ex, ey = hx + 0.35 * radius, hy - 0.12 * radius
        eye = np.hypot(x - ex, y - ey)
        self.paint(rgb("pale") * 0.9, eye - 0.043, "eye", 1.0 + 0 * x)
        self.paint((0.05, 0.04, 0.04), eye - 0.033, "eye", 1.0 + 0 * x)
        self.paint((1, 1, 1), np.hypot(x - ex - 0.010, y - ey + 0.012) - 0.010, None, 1.0 + 0 * x)

    def folded_wing(self):
        lift = -0.04 - 0.02 * self.kind.plump
        self._wing(((0.15, lift), (-0.10, lift + 0.05), (-0.46, 0.09)), (0.10, 0.145 * min(self.kind.plump, 1.15), 0.02), 1.0)

    def raised_wing(self, shift, shade):
        self._wing(((0.06 + shift, -0.05), (-0.10 + shift, -0.42), (-0.42 + 0.6 * shift, -0.72)), (0.13, 0.15, 0.015), shade)

    def _wing(self, points, radii, shade):
        distance, along = stroke(self.x, self.y, points, radii)
        across = distance + np.interp(along, (0, 0.5, 1), radii)
        feathers = 0.80 + 0.16 * np.sin(across * 95 + along * 6) * np.clip(along * 1.6 - 0.2, 0, 1) + 0.24 * self.down
        rim = 0.72 + 0.38 * np.clip(-distance / 0.05, 0, 1)
        colour = rgb(self.kind.wing) * (1 - 0.35 * np.clip(along * 2 - 1.1, 0, 1)[..., None])
        if self.kind.wing_bar:
            bars = np.clip(np.exp(-(((along - 0.36) / 0.035) ** 2)) + np.exp(-(((along - 0.52) / 0.03) ** 2)), 0, 1)
            colour = colour + (0.85 * bars)[..., None] * (rgb(self.kind.wing_bar) - colour)
        self.paint(colour, distance, "wing", feathers * rim * shade)


def render_scene(scene, resolution):
    """Scene → image (R, R, 3) uint8 and segmentation (R, R) uint8, classes as in SEGMENTS."""
    canvas = Canvas(resolution, np.random.default_rng(scene.seed))
    foot = paint_background(canvas, scene)
    paint_bird(canvas, scene, foot)
    haze = {"mist": 0.22, "cloud": 0.05}.get(scene.light, 0.0)
    canvas.image += haze * (0.87 - canvas.image)
    vignette = 1 - 0.35 * ((canvas.x - 0.5) ** 2 + (canvas.y - 0.5) ** 2)
    return np.uint8(np.clip(canvas.image * vignette[..., None], 0, 1) * 255 + 0.5), canvas.segmentation


def describe_scene(scene):
    """Four captions of a scene in varied English; the words are those of DEMO_SPEECH."""
    rng = np.random.default_rng((*scene.seed, 2))
    kind, (lit, perch_word, behind_word) = SPECIES[scene.species], scene.words
    perch, _, behind, _ = PLACES[scene.place]
    size = ("tiny", "small", "plump", "large", "big")[min(4, int((kind.size * scene.scale - 0.25) / 0.07))]
    build = "round" if kind.plump > 1.12 else "slender" if kind.plump < 0.95 else "fluffy"
    beak = "long" if kind.beak_length > 0.3 else "short" if kind.beak_length < 0.16 else "sharp"
    bill = "curved" if kind.hook > 0.03 else "thick" if kind.beak_depth > 0.07 else "broad" if kind.hook < 0 else "pointed"
    tail = "long" if kind.tail_length > 0.5 else "short"
    pattern = kind.pattern if kind.pattern != "plain" else "smooth" if rng.random() < 0.5 else "plain"
    doing = {
        "perched": f"perched on a {perch_word} {perch}",
        "standing": f"standing on {perch_word} {perch}",
        "flying": f"flying with open wings over a {scene.place}",
        "swimming": f"swimming on {perch_word} water",
    }[scene.pose]
    mask = f" and a {kind.mask} mask" if kind.mask else ""
    bar = f" with {kind.wing_bar} bars" if kind.wing_bar else ""
    crest = f"its crest is {kind.crown}" if kind.crest else f"its crown is {kind.crown}"
    feathers = "glossy" if kind.back in ("black", "teal", "green", "blue") else "soft"
    first = (
        f"a {size} {kind.back} bird with a {kind.breast} breast and a {beak} {kind.beak} beak",
        f"this {build} {kind.name} has a {kind.breast} breast, a {kind.belly} belly and {kind.leg} legs",
        f"a {size} bird whose back is {kind.back} and whose belly is {kind.belly}",
    )
    second = (
        f"its wings are {kind.wing}{bar} and its tail is {tail} and {kind.tail}",
        f"a {build} bird with {kind.wing} wings{bar}, a {tail} {kind.tail} tail and {kind.leg} feet",
        f"the bird has {feathers} {kind.back} feathers, a {pattern} {kind.breast} breast and a {bill} {kind.beak} bill",
    )
    third = (
        f"a {kind.crown} head, a {kind.throat} throat{mask} and a small dark eye",
        f"{crest} and its {bill} bill is {kind.beak}",
        f"the {kind.name} has a {kind.crown} crown, a {kind.throat} throat{mask} and {pattern} plumage",
    )
    fourth = (
        f"a {kind.name} {doing} in {lit} light",
        f"a {behind_word} {behind} behind a {size} {kind.name} on a {lit} {scene.light if scene.light in ('morning', 'evening') else 'day'}",
        f"a {lit} scene with a {behind_word} {behind} and a {kind.back} {kind.name} {doing}",
    )
    captions = [str(rng.choice(group)) for group in (first, second, third, fourth)]
    return [re.sub(r"\ba (?=[aeiou])", "an ", caption) for caption in captions]


class DemoDataset(ImageDataset):
    """Birds drawn on first use and kept."""

    SIZES = {"train": 2048, "val": 256}

    def __init__(self, split, resolution, seed=0):
        super().__init__(range(self.SIZES[split]), [species.name for species in SPECIES], resolution, seed)
        self.split = split
        self.drawn = torch.zeros(len(self), dtype=torch.bool)
        self.pictures = torch.zeros(len(self), 4, resolution, resolution, dtype=torch.uint8)

    def known(self):
        return ""

    def scene(self, index):
        return sample_scene(0, self.split, index)  # whatever the seed, so that runs can be compared

    def captions_of(self, index):
        return iter(describe_scene(self.scene(index)))

    def colours_of(self, index):
        """The colour of each of SEGMENTS in a picture, as its index in COLOURS; −1 where it has no single one."""
        kind = SPECIES[self.label(index)]
        painted = {**kind._asdict(), "head": kind.crown}
        return np.array([list(COLOURS).index(painted[part]) if painted.get(part) in COLOURS else -1 for part in SEGMENTS])

    def label(self, index):
        return self.scene(index).species

    def read(self, index, draft=False):
        if not self.drawn[index]:
            image, segmentation = render_scene(self.scene(index), self.resolution)
            self.pictures[index] = torch.from_numpy(np.dstack([image, segmentation])).permute(2, 0, 1)
            self.drawn[index] = True
        return self.pictures[index, :3], self.pictures[index, 3:] if self.with_segmentation else None


if __name__ == "__main__":
    command(main)
