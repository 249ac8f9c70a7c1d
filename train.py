"""Train the first stage: encoder, codebooks and decoder (paper §3.3, §4.1).

    python train.py                    built-in birds, minutes on a CPU
    python train.py --resume           continue it after an interruption
    python train.py --method vqgan     a baseline: 1,024 learned codes
    python train.py --dataset cub --download --device cuda   the paper's system
    python train.py --dataset folder --data DIR --download   own photographs
    torchrun --nproc-per-node 8 train.py --dataset cub       on eight GPUs
"""

import contextlib
import copy
import datetime
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import zipfile
import zlib
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

# Without it, CUDA's matrix products do not repeat bit by bit.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, Subset

from prior import (
    CORES, Need, Parser, Prior, Progress, PublishedFile, UserError, WordListSpeech,
    atomic_write, build_prior, checksum, command, describe_codebook, download,
    language_needs, list_files, load_tensors, made_from, provide,
    read_captions, read_corpora, read_tensors, save_png, shuffled, user_error,
)
from vqct import (
    LPIPS, NETWORKS, Discriminator, ModelConfig, VQModel, adaptive_weight, all_reduce,
    distributed, hinge_loss, load_taming, needs_prior, option)

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


# ======== Configuration: each field is a flag, and a key of config.json and checkpoints

@dataclass
class Config(ModelConfig):
    """A run. The defaults are the paper's f16 network with VQGAN's training."""

    dataset: str = option(
        "demo", "demo: birds drawn by code; folder: any images; or a published set",
        choices=lambda: ("demo", "folder", *DATASETS), group="data and prior")
    data: str = option("", "folder of the photographs (default: its published name, in data/)")
    labels: str = option(
        "", "for --dataset folder: folder of label maps, named as the images")
    prior: str = option(
        "", "a .npz of prior.py (default: CLIP's words of COCO and the data set)")
    shuffle: str = option(
        "none", "control: permute the words' vectors, or rewire the graph",
        choices=("none", "vectors", "edges"))
    download: bool = option(False, "download what is missing: photographs, captions, weights")
    workers: int = option(
        -1, "processes that read images; -1: up to 8 for a GPU, none for a CPU", least=-1)

    method: str = option(
        "vqct", "a system of the paper, or a control", choices=lambda: METHODS, group="run")
    recipe: str = option(
        "paper", "official: the settings of the authors' code", choices=lambda: RECIPES)
    preset: str = option(
        "", "f16: the paper's network; demo, tiny: 64 pixels, minutes on a CPU "
        "(default: f16, for the demo data demo)", choices=("", *NETWORKS))
    init: str = option("", "weights to start from: a VQGAN of taming-transformers")
    out: str = option("", "folder of the run (default: runs/DATASET-METHOD)")
    device: str = option(
        "auto", "cpu, cuda, cuda:1 or mps; auto: cuda or mps if there is one")
    seed: int = option(0, "seed of weights, random codes and the order of images", least=0)
    steps: int = option(500_000, "training steps", least=0)
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    eval_every: int = option(2_000, "steps between validations and checkpoints")
    eval_images: int = option(
        256, "training images held out to choose best.pt, at most a twentieth")
    amp: bool = option(True, "bfloat16 autocast on CUDA (Ampere or newer)")
    compile: bool = option(True, "torch.compile on CUDA")
    deterministic: bool = option(False, "repeat bit by bit on CUDA; slower, and not compiled")

    batch_size: int = option(8, "images per step and process", group="optimisation")
    lr: float = option(
        0.0, "Adam's learning rate; 0: 4.5e-6 times the images of a step (VQGAN)")
    schedule: str = option(
        "constant", "learning rate: constant (VQGAN), or a cosine down to zero",
        choices=("constant", "cosine"))

    pixel_loss: str = option(
        "l2", "l2 as in Eq. 2, or l1 as in VQGAN's code", choices=("l1", "l2"),
        group="losses")
    perceptual_weight: float = option(1.0, "weight of LPIPS (VQGAN); 0: none")
    perceptual_trunk: str = option(
        "vgg", "network of LPIPS: VGG-16 (VQGAN), or SqueezeNet 1.1, which is light",
        choices=("vgg", "squeeze"))
    trunk_weights: str = option("", "local copy of that network's weights")
    lpips_weights: str = option("", "local copy of the linear heads of LPIPS v0.1")
    gan_weight: float = option(
        0.8, "weight of the adversarial loss (VQGAN); 0: no discriminator")
    gan_start: int = option(
        5_000, "step at which the adversarial loss starts; small presets scale it with --steps", least=0)
    discriminator_layers: int = option(3, "inner layers; 3 gives patches of 70 × 70 pixels")


SHORT = dict(batch_size=4, steps=1800, lr=3e-4, schedule="cosine", gan_weight=0.2,
             gan_start=1500, perceptual_weight=0.0, eval_every=300, eval_images=64)
PRESETS = {
    "f16": NETWORKS["f16"],
    "demo": {**NETWORKS["demo"], **SHORT, "steps": 1200, "gan_start": 1000, "lr": 6e-4},
    "tiny": {**NETWORKS["tiny"], **SHORT},
}
RECIPES = {
    "paper": {},
    "official": dict(
        transfer_layers=2, transfer_width=256, transfer_dropout=0.5,
        last_relu=False, pixel_loss="l1", adjective_neighbours=2,
        beta_on="codebook", weighted_edges=True, vector_scale="none",
        straight_through=False, amp=False,
        code_dim=512,  # 256 for each of two codebooks
    ),
}

LEARNED = dict(codes="uniform", codebooks=1, codebook_size=1024, trained=True,
               transfer="none", adjective_neighbours=1)
MATCHED = dict(codes="uniform", trained=True, transfer="none")
PIXEL_LOSS_ONLY = dict(gan_weight=0.0, perceptual_weight=0.0)
METHODS = {
    "vqct": {},  # all tables; Table 3 (vi)
    "vqct-vqvae": PIXEL_LOSS_ONLY,  # Table 4
    "vqvae": {**LEARNED, **PIXEL_LOSS_ONLY},  # Tables 1, 4, 6
    "vqgan": LEARNED,  # Tables 1, 2 (i), 4 (ii), 5 (i), 6
    "gumbel": {**LEARNED, "codes": "random", "quantizer": "gumbel"},  # Tables 1, 6
    "cvq": {**LEARNED, "quantizer": "cvq"},  # Table 1
    "regvq": {**LEARNED, "codes": "random", "quantizer": "regvq",
              "kl_weight": 0.1, "contrastive_weight": 0.01},  # Table 6
    "random-mlp": dict(codes="random", transfer="mlp"),  # Table 2 (ii)
    "frozen": dict(codebooks=1, transfer="none"),  # Table 3 (i)
    "finetune": dict(codebooks=1, transfer="none", trained=True),  # Table 3 (ii)
    "single-mlp": dict(codebooks=1, transfer="mlp"),  # Table 3 (iii)
    "single-gcn": dict(codebooks=1),  # Table 3 (iv)
    "multi-mlp": dict(transfer="mlp"),  # Table 3 (v)
    # Controls: learned codebooks of VQCT's sizes, plain, with CVQ, of unit length.
    "matched": MATCHED,
    "matched-cvq": {**MATCHED, "quantizer": "cvq", "adjective_neighbours": 1},
    "matched-l2": dict(codes="random", trained=True, transfer="unit"),
    # Controls: one linear map of frozen random vectors, or of words (VQGAN-LC).
    "simvq": dict(codes="random", transfer="linear"),
    "words-linear": dict(transfer="linear"),
}


def resolve(given, stored=None):
    """The whole Config of some choices.

    given: flags by name. They win over the method, the recipe and the preset.
    stored: all choices of a resumed run, which replace these.
    Raises UserError for a flag without effect in the chosen system.
    """
    named = Config(**given)
    usual_preset = "demo" if named.dataset == "demo" else "f16"
    preset = named.preset or usual_preset
    usual = {**PRESETS[preset], **RECIPES[named.recipe], **METHODS[named.method]}
    if preset != "f16" and "steps" in given:  # the adversary's share stays the same
        usual["gan_start"] = usual["gan_start"] * given["steps"] // usual["steps"]
    if {**usual, **given}.get("codebooks") == 1:  # a recipe's 512 are for two
        usual["code_dim"] = PRESETS[preset].get("code_dim", Config.code_dim)

    config = Config(**(stored or {**usual, **given, "preset": preset}))
    config.lr = config.lr or 4.5e-6 * images_per_step(config)
    if not config.data and config.dataset in DATASETS:
        config.data = f"data/{DATASETS[config.dataset].folder}"
    config.data, config.labels = map(os.path.expanduser, (config.data, config.labels))
    config.out = config.out or run_name(
        config, given, {**asdict(Config()), **usual, "preset": usual_preset})
    return refuse_idle(config, given, MATTERS)


def run_name(config, given, usual):
    """runs/DATASET-METHOD and the given choices that differ from the usual."""
    words = [config.dataset, config.method]
    if config.prior:
        words.append(Path(config.prior).stem)
    for name in ("preset", "recipe", "shuffle", "seed", "pixel_loss", "gan_weight",
                 "perceptual_weight", *ModelConfig.__annotations__):
        value = given.get(name, usual[name])
        if value not in ("", usual[name]):
            words.append(f"{name}-{value}")
    if config.init:
        words.append("init")
    return "runs/" + "-".join(re.sub(r"[^\w.]+", "-", word).strip("-") for word in words)


def images_per_step(config):
    """How many images the processes together read in one training step."""
    return config.batch_size * processes()


MATTERS = {  # flags → where they have an effect; elsewhere they are refused
    "data": lambda config: config.dataset != "demo",
    "prior": lambda config: needs_prior(config),
    "download": lambda config: config.dataset != "demo" or config.perceptual_weight > 0,
    "labels": lambda config: config.dataset == "folder",
    "shuffle": lambda config: (config.codes == "words" if config.shuffle == "vectors"
                               else config.transfer == "gcn"),
    "code_dim": lambda config: (config.codes != "words"
                                or config.transfer not in ("none", "unit")),
    "codebook_size": lambda config: config.codes != "words" and config.transfer != "gcn",
    "vector_scale": lambda config: config.codes == "words",
    "weighted_edges": lambda config: config.transfer == "gcn",
    "transfer_layers last_relu": lambda config: config.transfer in ("gcn", "mlp"),
    "transfer_width transfer_dropout": lambda config: (
        config.transfer in ("gcn", "mlp") and config.transfer_layers > 1),
    "beta beta_on": lambda config: config.quantizer != "gumbel",
    "adjective_neighbours": lambda config: config.codebooks == 2,
    "straight_through": lambda config: config.quantizer == "gumbel",
    "kl_weight temperature_end": lambda config: config.quantizer in ("gumbel", "regvq"),
    "usage_decay": lambda config: config.quantizer == "cvq",
    "mask_ratio contrastive_weight": lambda config: config.quantizer == "regvq",
    "perceptual_trunk trunk_weights lpips_weights": (
        lambda config: config.perceptual_weight > 0),
    "gan_start discriminator_layers": lambda config: config.gan_weight > 0,
}


def refuse_idle(config, given, matters):
    """The configuration. Raises UserError for a given flag without effect in it."""
    for names, has_effect in matters.items():
        for name in given.keys() & names.split():
            if not has_effect(config):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} changes nothing with these flags; leave it out")
    return config


# ======== One step

class Trainer:
    """The state of a run, and its step.

    prior: dict of `Prior.tensors`, or None; training_images: how many are an epoch;
    data: the `identity` of their data set.
    Raises UserError for incompatible choices.
    """

    def __init__(self, config, prior, device, training_images=1, data=""):
        torch.manual_seed(config.seed)
        self.config, self.prior, self.device, self.data = config, prior, device, data
        self.step, self.best = 0, -math.inf
        self.steps_per_epoch = math.ceil(training_images / images_per_step(config))
        with user_error("{}", ValueError):
            self.model = self._placed(VQModel(config, prior))
        self.generator_optimizer = self._adam(self.model)
        self.discriminator = self.discriminator_optimizer = self.perceptual = None
        if config.gan_weight > 0:
            self.discriminator = self._make_discriminator()
            self.discriminator_optimizer = self._adam(self.discriminator)
        if config.perceptual_weight > 0:
            self.perceptual = self._placed(load_lpips(
                config.perceptual_trunk, config.trunk_weights, config.lpips_weights))
        # The step at which each code was last chosen.
        self.last_used = [torch.full((size,), -1, device=device)
                          for size in self.model.codebook.sizes]
        if config.compile and not config.deterministic and device.type == "cuda":
            self.compile()
        codes = self.model.eval().codebook()
        self.start = [start.detach().clone() for start in codes]  # for Fig. 6

    def _placed(self, network):
        return network.to(self.device, memory_format=torch.channels_last)

    def _adam(self, network):
        return torch.optim.Adam(
            network.parameters(), lr=self.config.lr, betas=(0.5, 0.9), fused=True)

    def _make_discriminator(self):
        layers = self.config.discriminator_layers
        if self.config.resolution // 2**layers < 3:
            raise UserError(f"--discriminator-layers {layers} are too many for these images")
        network = self._placed(Discriminator(layers=layers))
        if self.device.type == "cuda" and distributed():  # gloo cannot
            return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network

    def compile(self):
        """Compile the networks. What cannot be compiled runs as it is."""
        torch._dynamo.config.suppress_errors = True
        # Not the decoder's last layer, which `adaptive_weight` differentiates alone.
        networks = [self.model.encoder, self.model.decoder.layers, self.perceptual]
        if not distributed():  # batch norm of all processes breaks the graph
            networks.append(self.discriminator)
        for network in filter(None, networks):
            network.compile()

    def parts(self):
        """The networks and optimizers that a checkpoint holds, by name."""
        names = ("model", "generator_optimizer", "discriminator", "discriminator_optimizer")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def notes(self):
        """What else a checkpoint holds."""
        return {"prior": self.prior, "last_used": self.last_used,
                "start": self.start, "data": self.data}

    def train_step(self, x):
        """One step on images (B, 3, R, R) in [-1, 1] → dict of () tensors.

        The generator (encoder, codebooks, decoder) minimises

            L = ‖x − x̂‖² + w_p LPIPS(x, x̂)
                + Σ_c (‖sg[ẑ_c] − z_c‖² + β ‖sg[z_c] − ẑ_c‖²)
                + λ w_g (−D(x̂))

        by means over elements, images and patches, and a sum over codebooks c.
        w_p is `perceptual_weight`, w_g `gan_weight`, λ `adaptive_weight`, taken as
        constant. "l1" has |x − x̂|; Gumbel-VQ and Reg-VQ have other terms in the sum.

        From `gan_start` on, the last term is added, and the discriminator minimises its
        hinge loss on x and x̂. The result's "loss" is L without the last term.
        """
        self.model.train()
        self.follow_schedules()
        adversarial = self.discriminator is not None and self.step >= self.config.gan_start
        with autocast(self):
            output = self.model(x)
            # λ needs the gradients of two losses at the decoder's last layer. Both are
            # taken at x̂, where the graph is cut, and then one pass goes through the decoder.
            x_hat = output.x_hat.detach().requires_grad_()  # (B, 3, R, R)
            loss, terms = self.reconstruction_loss(x_hat.to(x.dtype), x)
            (gradient,) = torch.autograd.grad(loss, x_hat)  # (B, 3, R, R)
            if adversarial:
                gradient, gan_terms = self.add_adversary(output.x_hat, x_hat, gradient)
                terms.update(gan_terms)
        self.generator_optimizer.zero_grad()
        torch.autograd.backward([output.x_hat, output.quantizer_loss], [gradient, None])
        terms = {"loss": loss + output.quantizer_loss, **terms,
                 "quantizer": output.quantizer_loss, "gradient": average_gradients(self.model)}
        self.generator_optimizer.step()
        if adversarial:
            terms.update(self.train_discriminator(x, x_hat.detach()))
        for used, chosen in zip(self.last_used, self.model.by_codebook(output.indices)):
            used[chosen.flatten()] = self.step
        self.last_used = [all_reduce(used, "max") for used in self.last_used]
        self.step += 1
        return {name: value.detach() for name, value in terms.items()}

    def follow_schedules(self):
        """Set the learning rate and the quantizers' temperature of this step."""
        progress = self.step / self.config.steps
        self.model.anneal(progress)
        lr = self.config.lr
        if self.config.schedule == "cosine":
            lr = lr * (0.5 + 0.5 * math.cos(math.pi * progress))
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = lr

    def reconstruction_loss(self, x_hat, x):
        """Pixel loss + w_p LPIPS → (total, {name: value})."""
        pixel_loss = F.mse_loss if self.config.pixel_loss == "l2" else F.l1_loss
        terms = {"pixel": pixel_loss(x_hat, x)}
        if self.perceptual is None:
            return terms["pixel"], terms
        terms["perceptual"] = self.perceptual(x_hat, x).mean()
        return terms["pixel"] + self.config.perceptual_weight * terms["perceptual"], terms

    def add_adversary(self, attached, x_hat, gradient):
        """The gradient at x̂ with that of λ w_g (−D(x̂)) → ((B, 3, R, R), {name: value})."""
        generator_loss = -self.discriminator(x_hat).float().mean()
        (gan_gradient,) = torch.autograd.grad(generator_loss, x_hat)  # (B, 3, R, R)
        last_layer = self.model.decoder.to_image.weight
        weight = adaptive_weight(attached, last_layer, gradient, gan_gradient)
        weight = weight * self.config.gan_weight
        terms = {"generator": generator_loss, "adaptive_weight": weight}
        return gradient + weight.to(gradient.dtype) * gan_gradient, terms

    def train_discriminator(self, x, x_hat):
        """One step of the discriminator on the same images → {name: value}."""
        with autocast(self):
            real = self.discriminator(x).float()  # (B, 1, h, w)
            fake = self.discriminator(x_hat).float()  # (B, 1, h, w)
            loss = hinge_loss(real, fake)
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        gradient = average_gradients(self.discriminator)
        self.discriminator_optimizer.step()
        return {"discriminator": loss, "real_logits": real.mean(),
                "fake_logits": fake.mean(), "discriminator_gradient": gradient}

    def usage(self):
        """[codes chosen in the latest epoch, all codes] for each codebook."""
        since = max(0, self.step - self.steps_per_epoch)
        return [[int((used >= since).sum()), len(used)] for used in self.last_used]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # it would compile graphs of its own
    def validate(self, loader, shown=16):
        """Mean PSNR of a loader's images → score, {name: float}, rows for `draw_grid`."""
        self.model.eval().codebook.freeze()
        scores, originals, reconstructions = [], [], []
        drawn = spread_indices(len(loader.dataset), shown)
        for batch in loader:
            x = to_images(batch["image"], self.device)
            x_hat = self.model(x).x_hat
            rows = [row for row in range(len(x)) if len(scores) + row in drawn]
            originals += x[rows]
            reconstructions += x_hat[rows]
            scores.extend(psnr(x_hat, x))
        score = torch.stack(scores).mean().item()
        rows = [("original", originals), ("reconstruction", reconstructions)]
        return score, {"psnr": score}, rows


def psnr(x_hat, x):
    """PSNR of each image, 10 log10(4 / MSE) dB, both clamped. (B, 3, H, W) → (B,)."""
    error = x_hat.clamp(-1, 1) - x.clamp(-1, 1)
    mse = error.square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def autocast(trainer):
    """Autocast to bfloat16 if that is the trainer's `precision`."""
    return torch.autocast(trainer.device.type, torch.bfloat16,
                          enabled=precision(trainer) == "bfloat16")


def precision(trainer):
    """"bfloat16" with --amp on a GPU that computes in it, otherwise "float32"."""
    amp = (trainer.config.amp and trainer.device.type == "cuda"
           and torch.cuda.is_bf16_supported(including_emulation=False))
    return "bfloat16" if amp else "float32"


def average_gradients(network):
    """Average a network's gradients over all processes → their norm, ()."""
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    for gradient in gradients if distributed() else ():
        gradient.copy_(all_reduce(gradient))
    return torch.nn.utils.get_total_norm(gradients)


# ======== One loop, of both stages

def fit(trainer, batches, validate, out, journal):
    """Take a batch, step, log, validate and save, until the last step.

    trainer: Trainer, or StageTrainer of synthesize.py.
    validate: () → score (higher is better), {name: float}, rows of a picture.
    out: folder of last.pt and best.pt; journal: its metrics.jsonl, open.
    Raises UserError if a value is not finite or the folder is gone, and SystemExit
    after a signal, when it has saved.
    """
    config, progress = trainer.config, Progress()
    recent = deque([(trainer.step, time.monotonic())], maxlen=20)
    seed_rank(trainer)
    with noted_signals() as signals:
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not config.deterministic
        while trainer.step < config.steps:
            metrics = trainer.train_step(next(batches))
            last = trainer.step == config.steps
            logs = last or trainer.step % config.log_every == 0
            validates = last or trainer.step % config.eval_every == 0
            stop = max(signals, default=0)
            if distributed():  # all stop at the same step, one at which they meet
                stop = torch.tensor(stop, device=trainer.device)
                stop = int(all_reduce(stop, "max")) if logs else 0
            if logs or validates or stop:
                metrics = {name: all_reduce(x).item() for name, x in metrics.items()}
                check_finite(metrics, trainer)
                seed_rank(trainer)
            if logs:
                metrics["images/s"], left = pace(trainer, recent)
                line = record(metrics, trainer, journal)
                progress(f"{line} left {left}", now=last)
            if validates and not rank():
                score, values, rows = validate()
                values = {f"validation_{name}": value for name, value in values.items()}
                progress(record(values, trainer, journal), now=True)
                if rows:
                    draw_grid(rows, out / "reconstructions.png")
                if score > trainer.best:
                    trainer.best = score
                    save_checkpoint(out / "best.pt", trainer)
            if validates or stop:
                if not rank():
                    check_there(journal)
                    save_checkpoint(out / "last.pt", trainer)
            if stop and not last:
                print(f"stopped by {signal.Signals(stop).name} after step "
                      f"{trainer.step:,}, saved; continue with --resume")
                raise SystemExit(128 + stop)
    if distributed():
        torch.distributed.barrier()  # the first process may still be saving


def check_finite(metrics, trainer):
    """Raise UserError if a value is not finite; if all are, so are the weights."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is not finite at step {trainer.step:,}; "
                            "try a smaller --lr")


def record(values, trainer, journal):
    """Write values and numbers of codes used to metrics.jsonl → the line in words."""
    check_there(journal)
    usage = trainer.usage()
    line = {"step": trainer.step, **values, "codes_used": [used for used, _ in usage]}
    with user_error(f"'{journal.name}' cannot be written: {{}}"):
        journal.write(json.dumps(line).encode() + b"\n")
        journal.flush()
    words = [f"step {trainer.step:,}/{trainer.config.steps:,}"]
    words += [f"{name.replace('_', ' ')} {value:.4g}"
              for name, value in values.items() if "gradient" not in name]
    if usage:
        words.append("codes " + " + ".join(f"{used:,}/{size:,}" for used, size in usage))
    return " ".join(words)


def pace(trainer, recent):
    """Images a second since the first of the `recent` (step, time); the time left."""
    (step, began), now = recent[0], time.monotonic()
    recent.append((trainer.step, now))
    speed = (trainer.step - step) / max(now - began, 1e-9)  # steps a second
    seconds = int((trainer.config.steps - trainer.step) / speed)
    images = round(speed * images_per_step(trainer.config), 2)
    return images, datetime.timedelta(seconds=seconds)


@contextlib.contextmanager
def noted_signals():
    """A list that takes the first SIGINT or SIGTERM; a second one ends the process.

    Outside the main thread, as in a notebook, signals are left alone.
    """
    noted, usual = [], {}
    main_thread = threading.current_thread() is threading.main_thread()

    def note(number, frame):
        noted.append(number)
        signal.signal(number, usual[number])

    for number in (signal.SIGINT, signal.SIGTERM) if main_thread else ():
        usual[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def seed_rank(trainer):
    """Seed by rank and step, except in the first process, whose state is saved."""
    if rank():
        torch.manual_seed(trainer.config.seed + 1_000_003 * rank() + trainer.step)


# ======== Data sets

class Record(NamedTuple):
    """An image on disk and what is known of it."""

    path: Path
    label: int = -1  # index into the data set's classes; −1: none
    captions: Path | list | tuple = ()  # or the path of a text file
    # A label map, or masks as (label, path) to paint in this order.
    segmentation: Path | tuple | None = None


@dataclass
class ImageDataset(Dataset):
    """Square uint8 images with labels.

    Item (index) is the centre crop. Item (index, draw) is a random crop and flip,
    which depend on (seed, draw) alone, not on the workers.

    Set `with_segmentation` for items with label maps, where −1 is "no label".
    """

    records: list  # of Record
    classes: list  # names of their labels
    resolution: int  # pixels per side, to which the shorter side is resized
    seed: int = 0
    unlabeled: int = -1  # value of label maps for "no label", besides 255 or 65,535
    sides: tuple = ()  # pairs of labels that a flip exchanges: left eye, right eye

    with_segmentation = False
    labels = {-1: "none"}  # names of label maps' values, if they are known

    def __len__(self):
        return len(self.records)

    def captions_of(self, index):
        """The captions of an image → list."""
        captions = self.records[index].captions
        return list(read_captions(captions)) if isinstance(captions, Path) else captions

    def read(self, index, rng=None):
        """→ image (3, R, R) uint8, and label map (R, R) int64 or None."""
        record, side = self.records[index], self.resolution
        image = read_image(record.path, side if rng else 0)
        width, height = (int(side * length / min(image.size)) for length in image.size)
        if rng:
            top = int(rng.integers(height - side + 1))
            left = int(rng.integers(width - side + 1))
        else:
            top, left = (height - side) // 2, (width - side) // 2
        box = left / width, top / height, (left + side) / width, (top + side) / height
        labels = None
        if self.with_segmentation and record.segmentation is not None:
            labels = read_label_map(record.segmentation, image.size, side, box)
            labels = torch.from_numpy(labels).long()
            labels[labels == self.unlabeled] = -1
        image = resized_crop(image, side, box, Image.Resampling.BILINEAR)
        return TF.pil_to_tensor(image), labels

    def __getitem__(self, key):
        """→ dict: image, label, index, and segmentation (R, R) if it is wanted."""
        index, draw = key if isinstance(key, tuple) else (key, None)
        rng = None if draw is None else np.random.default_rng((self.seed, draw))
        image, labels = self.read(index, rng)
        if rng and rng.random() < 0.5:
            image = image.flip(-1)
            if labels is not None:
                flipped = labels.flip(-1)
                labels = flipped.clone()
                for label, other in self.sides:
                    labels[flipped == label] = other
        item = {"image": image, "label": self.records[index].label, "index": index}
        return item if labels is None else {**item, "segmentation": labels}


FORMATS = "JPEG PNG BMP PPM TIFF WEBP GIF".split()  # not EPS, which runs Ghostscript
# Long notes in a PNG do not make its image unreadable.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


@contextlib.contextmanager
def open_picture(path, kind="image"):
    """An open picture of the user's. Raises UserError if it is not one of FORMATS."""
    with user_error(f"{kind} '{path}' cannot be read: {{}}"):
        with Image.open(path, formats=FORMATS) as file:
            yield file


def check_images(datasets):
    """Read every image's header. Raises UserError that names all bad images."""
    paths = [record.path for dataset in datasets for record in dataset.records if record.path]
    progress, errors = Progress(), []
    for done, path in enumerate(paths, 1):
        try:
            with open_picture(path):
                pass
        except UserError as error:
            errors.append(str(error))
        progress(f"reading headers: {done:,} of {len(paths):,} images")
    if errors:
        raise UserError("; ".join(errors))


def read_image(path, side=0):
    """An RGB image as a viewer shows it: turned by EXIF, transparency on white.

    side: a JPEG may be reduced while decoding, to twice this many pixels a side.
    Raises UserError if it is missing, damaged or truncated.
    """
    with open_picture(path) as file:
        if side:
            file.draft("RGB", (2 * side, 2 * side))
        try:
            file.load()
        except OSError:
            if file.format != "JPEG":
                raise
            file = end_jpeg(Path(path).read_bytes())
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "FI":  # numbers that Pillow would clip at 255
            raise ValueError("its gray is not of 8 bits; convert it")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def end_jpeg(data):
    """The image of a JPEG that lacks its end mark alone. Otherwise raises ValueError.

    If pixels are missing too, a filler before the mark changes the image.
    """
    plain, filled = (Image.open(io.BytesIO(data + filler + b"\xff\xd9"))
                     for filler in (b"", bytes(range(1, 255)) * 20))
    if plain.tobytes() != filled.tobytes():
        raise ValueError("it is truncated")
    return plain


def resized_crop(image, side, box, resampling):
    """A crop of the resized PIL image, at the cost of the crop alone.

    box: left, top, right, bottom, as shares of the image's sides.
    """
    box = [share * length for share, length in zip(box, 2 * image.size)]
    return image.resize((side, side), resampling, box)


def read_label_map(segmentation, size, side, box):
    """A Record's segmentation, cropped as its image of `size` → (R, R) int32.

    The largest number of 8 or 16 bits becomes −1.
    """
    labels = np.zeros((side, side), np.int32)
    masks = segmentation if isinstance(segmentation, tuple) else ((None, segmentation),)
    for label, path in masks:
        with open_picture(path, "label map") as file:
            image = ImageOps.exif_transpose(file)
            width, height = image.size
            if abs(size[0] * height - size[1] * width) > max(size) + max(width, height):
                raise ValueError(f"its {width}×{height} pixels have other proportions "
                                 "than its image")  # by more than rounding
            if label is None and (len(image.getbands()) > 1 or image.mode == "F"):
                raise ValueError("it is not one channel of whole numbers")
            image = resized_crop(image, side, box, Image.Resampling.NEAREST)
        if label is None:
            labels = np.asarray(image).astype(np.int32)  # of either byte order
            labels[labels == (65535 if image.mode.startswith("I") else 255)] = -1
        else:
            labels[np.asarray(image.convert("L")) > 127] = label
    return labels


# Published layouts: (folder, "train" or "val") → list of Record, names of classes

CUB_TABLES = ("images.txt", "train_test_split.txt", "image_class_labels.txt",
              "classes.txt")
CUB_PARTS = {
    **dict.fromkeys(("size", "shape", "primary"), "the bird is"),
    "upperparts": "its back is", "underparts": "its belly is",
    "wing": "its wings are", "leg": "its legs are", "eye": "its eyes are",
}
CUB_WORDS = {  # values that are not adjectives; an empty one makes no sentence
    "hooked_seabird": "hooked", "long-legged-like": "long-legged",
    "longer_than_head": "long", "shorter_than_head": "short",
    **dict.fromkeys("""dagger needle cone malar eyebrow eyering eyeline
                    about_the_same_as_head""".split(), ""),
}


def cub_records(root, split):
    """CUB-200-2011, the published split: "val" are the test images.

        CUB_200_2011/images.txt, train_test_split.txt, …   CUB_TABLES
        CUB_200_2011/images/001.Black_footed_Albatross/*.jpg
        CUB_200_2011/text_c10/ or text/                    captions of Reed et al.
        CUB_200_2011/attributes/, attributes.txt           used if there are none
    """
    require(root, *CUB_TABLES, "images")
    images, splits, labels, classes = (read_table(root / name) for name in CUB_TABLES)
    texts = root / ("text_c10" if (root / "text_c10").is_dir() else "text")
    sentences = {} if texts.is_dir() else cub_sentences(root)
    records = []
    with user_error(f"the tables of '{root}' are inconsistent; unpack them again: {{}}"):
        for key, name in images.items():
            if name.startswith("/") or ".." in name:
                raise ValueError(f"{name} lies elsewhere")
            if (splits[key] == "1") == (split == "train"):
                text = (texts / name).with_suffix(".txt")
                captions = text if text.exists() else sentences.get(key, ())
                records.append(Record(root / "images" / name, int(labels[key]) - 1, captions))
        return records, [classes[key] for key in sorted(classes, key=int)]


def cub_sentences(root):
    """Image → its attributes as sentences: wing_color::blue is "its wings are blue"."""
    marks = root / "attributes" / "image_attribute_labels.txt"
    names = [path for folder in (root, root / "attributes", root.parent)
             if (path := folder / "attributes.txt").is_file()]
    if not marks.is_file() or not names:
        return {}
    sentences, by_image = {}, defaultdict(list)
    for number, attribute in read_table(names[0]).items():
        group, value = re.fullmatch(r"has_(\w+)::(.*)", attribute).groups()
        part = re.sub(r"^(upper|under)_|_(color|shape|pattern|length)$", "", group)
        word = re.sub(r"_?\(.*|[_-](tail|wings|pattern)$|.*-(like|marsh)$", "", value)
        word = CUB_WORDS.get(value, word.replace("_", " "))
        if word:
            sentences[number] = f"{CUB_PARTS.get(part, f'its {part} is')} {word}"
    for line in marks.read_text().splitlines():
        image, number, present = line.split()[:3]
        if present == "1" and number in sentences:
            by_image[image].append(sentences[number])
    return by_image


def ade20k_records(root, split):
    """ADE20K's scene parsing benchmark; its classes are the scenes.

        ADEChallengeData2016/images/training/, validation/
        ADEChallengeData2016/annotations/…   label maps of 150 classes; 0: no label
        ADEChallengeData2016/sceneCategories.txt
    """
    folder = {"train": "training", "val": "validation"}[split]
    require(root, f"images/{folder}", f"annotations/{folder}", "sceneCategories.txt")
    scenes = read_table(root / "sceneCategories.txt")
    classes = sorted(set(scenes.values()))
    number = {scene: index for index, scene in enumerate(classes)}
    records = [Record(path, number.get(scenes.get(path.stem), -1), (),
                      root / "annotations" / folder / f"{path.stem}.png")
               for path in list_files(root / "images" / folder, [".jpg"])]
    return records, classes


# In the order in which the authors paint them; 0 is the background.
FACE_PARTS = """skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip
    hair hat ear_r neck_l neck cloth"""
FACE_SIDES = [(4, 5), (5, 4), (6, 7), (7, 6), (8, 9), (9, 8)]  # l_ and r_


def celebahq_records(root, split):
    """CelebA-HQ, split as CelebA by the original's number: 24,183 and 2,993 images.

        CelebAMask-HQ/CelebA-HQ-img/0.jpg, …
        CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt
        CelebAMask-HQ/CelebAMask-HQ-mask-anno/0/00000_hair.png, …

    Source: https://github.com/switchablenorms/CelebAMask-HQ, by hand.
    """
    require(root, "CelebA-HQ-img", "CelebA-HQ-to-CelebA-mapping.txt")
    masks = defaultdict(dict)
    for path in (root / "CelebAMask-HQ-mask-anno").glob("*/[0-9]*_*.png"):
        number, _, part = path.stem.partition("_")
        masks[int(number)][part] = path
    first, end = {"train": (0, 162_771), "val": (162_771, 182_638)}[split]
    records = []
    for number, line in read_table(root / "CelebA-HQ-to-CelebA-mapping.txt").items():
        if number.isdigit() and first <= int(line.split()[0]) < end:
            face = masks.get(int(number), {})
            painted = tuple((label, face[part])
                            for label, part in enumerate(FACE_PARTS.split(), 1)
                            if part in face)
            records.append(Record(root / "CelebA-HQ-img" / f"{number}.jpg",
                                  segmentation=painted if masks else None))
    return records, []


def coco_records(root, split):
    """MS-COCO 2017; its classes are not used.

        coco/train2017/, val2017/
        coco/annotations/captions_train2017.json, captions_val2017.json
        coco/stuffthingmaps/train2017/, val2017/   label maps, if wanted
    """
    require(root, "train2017", "val2017")
    table = root / f"annotations/captions_{split}2017.json"
    maps = root / f"stuffthingmaps/{split}2017"
    captions = defaultdict(list)
    if table.is_file():
        with user_error(f"'{table}' is not COCO's captions file: {{}}"):
            content = json.loads(table.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for annotation in content["annotations"]:
                text = " ".join(annotation["caption"].split())
                captions[names[annotation["image_id"]]].append(text)
    records = []
    for path in list_files(root / f"{split}2017", [".jpg"]):
        label_map = maps / f"{path.stem}.png" if maps.is_dir() else None
        records.append(Record(path, -1, captions[path.name], label_map))
    return records, []


class Layout(NamedTuple):
    """A published data set; the last two as in ImageDataset."""

    records: object  # a function
    folder: str  # its usual name
    unlabeled: int = -1
    sides: tuple = ()


DATASETS = {  # for a new data set, add a line here
    "cub": Layout(cub_records, "CUB_200_2011"),
    "ade20k": Layout(ade20k_records, "ADEChallengeData2016", unlabeled=0),
    "celebahq": Layout(celebahq_records, "CelebAMask-HQ", sides=FACE_SIDES),
    "coco": Layout(coco_records, "coco"),
}

COCO = "http://images.cocodataset.org"
COCO_CAPTIONS = [f"annotations/captions_{split}2017.json" for split in ("train", "val")]
ARCHIVES = {  # name, size, URL, md5, what it makes in the data set's folder
    "cub": [("CUB-200-2011", "1.1 GB",
             "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
             "97eceeb196236b17998738112f37df78", "images.txt")],
    "ade20k": [("ADE20K", "923 MB", "http://data.csail.mit.edu/places/ADEchallenge/"
                "ADEChallengeData2016.zip",
                "7328b3957e407ddae1d3cbf487f149ef", "images")],
    "coco": [("COCO's training images", "18 GB", f"{COCO}/zips/train2017.zip",
              "cced6f7f71b7629ddf16f17bbcfab6b2", "train2017"),
             ("COCO's validation images", "778 MB", f"{COCO}/zips/val2017.zip",
              "442b8da7639aecaf257c1dceb8ba8c80", "val2017")],
    "captions": [("COCO's captions", "241 MB",
                  f"{COCO}/annotations/annotations_trainval2017.zip",
                  "f4bbac642086de4f52a3fdda2de5fa2c", COCO_CAPTIONS[0])],
}


@dataclass
class Archive(Need):
    """A published archive, which is unpacked and then deleted."""

    md5: str
    path: Path  # what is there once it is unpacked
    folder: Path  # where it is unpacked

    @property
    def file(self):
        return self.folder / f"download-{self.source.rpartition('/')[2]}"

    def present(self):
        return self.path.exists() and not self.file.exists()

    def fetch(self):
        """Download the archive, unless it lies there already, and unpack it."""
        if not self.file.is_file() or checksum(self.file, "md5") != self.md5:
            download(self.source, self.file, self.md5)
        print(f"unpacking {self.file}", file=sys.stderr, flush=True)
        with user_error(f"'{self.file}' cannot be unpacked: {{}}; "
                        "delete it and run the command again"):
            safe = {} if self.file.suffix == ".zip" else {"filter": "data"}
            shutil.unpack_archive(self.file, self.folder, **safe)
        self.file.unlink()


def archives(name, root):
    """The Archives of a data set, or of COCO's captions, whose folder is `root`."""
    local = f"{root}/annotations" if name == "captions" else "--data DIR"
    folder = root if name in ("coco", "captions") else root.parent
    return [Archive(*texts, local, md5, root / made, folder)
            for *texts, md5, made in ARCHIVES.get(name, ())]


def needs(config, with_prior):
    """What a run needs from elsewhere, photographs last → list of Need."""
    if config.dataset == "folder" and not os.path.isdir(config.data):
        raise UserError(f"--dataset folder needs --data DIR; no such folder: '{config.data}'")
    listed = []
    if with_prior and needs_prior(config) and not config.prior and config.dataset != "demo":
        listed += [*language_needs("clip"), *archives("captions", captions_folder(config))]
    if config.perceptual_weight > 0:
        local = config.trunk_weights, config.lpips_weights
        files = lpips_files(config.perceptual_trunk)
        listed += [file for file, path in zip(files, local) if not path]
    if config.dataset in DATASETS:
        root, folder = Path(config.data), DATASETS[config.dataset].folder
        if (config.download and config.dataset in ("cub", "ade20k")
                and root.name != folder and not (root / "images").exists()):
            raise UserError(f"--download makes a folder {folder}; end --data with this name")
        listed += archives(config.dataset, root)
    return listed


def require(root, *names):
    """Raise UserError for the first of the names that a data set's folder lacks."""
    for name in names:
        if not (root / name).exists():
            raise UserError(f"no {name} in '{root}': point --data at the published folder")


def read_table(path):
    """A text file's lines as a dict: first word → the rest."""
    with user_error(f"'{path}' cannot be read: {{}}"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        pairs = (line.split(maxsplit=1) for line in lines if line.strip())
        return {key: rest.strip() for key, rest in pairs}


SPLITS = ("train", "val")
OTHER_NAMES = "train training val valid validation dev test testing".split()


def folder_records(root, labels="", whole=False):
    """Any tree of images → list of Record for "train" and for "val", class names.

        DIR/train/CLASS/x.jpg   sub-folders are classes
        DIR/train/CLASS/x.txt   captions of x.jpg, a line each
        DIR/val/…               without these two, every tenth image is held out

    labels: a tree of label maps with the same names, x.png for x.jpg.
    whole: hold none out; then both lists are the same.
    """
    for folder in (root, labels):
        if folder and not Path(folder).is_dir():
            raise UserError(f"no such folder: '{folder}'")
    maps = Path(labels).resolve() if labels else None
    named = [path.name for path in Path(root).iterdir() if path.name.lower() in OTHER_NAMES]
    apart = set(SPLITS) <= set(named)
    if named and not apart:
        raise UserError(f"'{root}' holds {', '.join(named)}: name the folders of both splits "
                        "train and val, or neither so")
    splits = []
    for base in [Path(root, split) for split in SPLITS] if apart else [Path(root)]:
        splits.append([])
        for path in list_files(base, torchvision.datasets.folder.IMG_EXTENSIONS):
            if maps and maps in path.resolve().parents:
                continue  # label maps may lie among the images
            captions, name = path.with_suffix(".txt"), path.relative_to(root)
            splits[-1].append(Record(
                path, str(path.parent.relative_to(base)),
                captions if captions.is_file() else (),
                maps / name.with_suffix(".png") if maps else None))
    classes = sorted({record.label for records in splits for record in records} - {"."})
    number = {name: index for index, name in enumerate([".", *classes], -1)}
    train, *val = ([record._replace(label=number[record.label]) for record in records]
                   for records in splits)
    if val or whole:
        return train, val[0] if val else train, classes
    kept = [record for index, record in enumerate(train) if index % 10 != 9]
    return kept, train[9::10], classes


def make_datasets(config, whole=False):
    """The ImageDatasets "train" and "val" of a Config; whole: see `folder_records`."""
    root, layout = Path(config.data), DATASETS.get(config.dataset)
    if config.dataset == "demo":
        return [DemoDataset(split, config.resolution, config.seed) for split in SPLITS]
    more = ()
    if layout:
        (train, classes), (val, _) = (layout.records(root, split) for split in SPLITS)
        more = layout.unlabeled, layout.sides
    else:
        train, val, classes = folder_records(root, config.labels, whole)
    if not train or not val:
        raise UserError(f"too few images in '{root}': ten are needed, "
                        "or some in both train/ and val/")
    return [ImageDataset(records, classes, config.resolution, config.seed, *more)
            for records in (train, val)]


def make_prior(config, dataset):
    """The Prior that a Config names, by default the paper's; None if none is needed."""
    if not needs_prior(config):
        return None
    if config.prior:
        prior, name = Prior.load(config.prior), config.prior
    elif config.dataset == "demo":
        prior, name = build_prior(all_captions(dataset), DEMO_SPEECH, "corpus", min_count=1,
                                  workers=1, name="demo captions"), ""
    else:
        prior, name = default_prior(config, dataset)
    if name:  # the demo's codebook is small, as is meant
        print(f"codebook of {name}: {describe_codebook(prior)}", flush=True)
    return shuffled(prior, config.shuffle, config.seed)


def all_captions(dataset):
    """The captions of all images → list."""
    return [caption for index in range(len(dataset))
            for caption in dataset.captions_of(index)]


def captions_folder(config):
    """The folder of MS-COCO 2017, whose captions every default prior takes."""
    return Path(config.data if config.dataset == "coco" else "data/coco")


def default_prior(config, dataset):
    """CLIP's vectors of the words in COCO 2017's captions and the data set's own.

    Returns the Prior and its path, such as data/cub-clip.npz. It is kept, and made
    again if the captions or the rules differ.
    """
    folder, name = captions_folder(config), config.dataset
    own = [] if name == "coco" else all_captions(dataset)
    captions = [*read_corpora(folder / part for part in COCO_CAPTIONS), *own]
    path = Path(f"data/{Path(config.data).resolve().name if name == 'folder' else name}-clip.npz")
    with contextlib.suppress(UserError):  # it is missing or damaged
        prior = Prior.load(path)
        if prior.provenance.get("made_from") == made_from(captions, "clip", 10):
            return prior, path
    print(f"making '{path}' of {len(captions):,} captions, {len(own):,} of them the data set's",
          flush=True)
    prior = build_prior(captions, workers=max(1, CORES // processes()),
                        name=f"MS-COCO 2017 and {name}")
    prior.save(path)
    return prior, path


def hold_out(length, count):
    """Two lists of indices: training images, and images held out to choose best.pt."""
    chosen = spread_indices(length, min(count, math.ceil(length / 20)))
    return sorted(set(range(length)).difference(chosen)) or [0], chosen


def spread_indices(length, count):
    """At most `count` indices spread over 0 … length − 1: sets are sorted by class."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def train_batches(kept, batch_size, start, steps, seed):
    """Yield a list of (index, draw) for each step from `start` to `steps`.

    The kept images are shuffled each epoch; each process takes its share of a batch.
    """
    epoch, order = -1, None
    for step in range(start, steps):
        batch, first = [], (step * processes() + rank()) * batch_size
        for draw in range(first, first + batch_size):
            if draw // len(kept) != epoch:
                epoch = draw // len(kept)
                order = np.random.default_rng((seed, epoch)).permutation(kept)
            batch.append((int(order[draw % len(kept)]), draw))
        yield batch


def to_images(batch, device):
    """(B, 3, R, R) uint8 → float32 in [-1, 1] on the device."""
    return batch.to(device, non_blocking=True).float().div_(127.5).sub_(1)


def make_loader(dataset, device, workers=-1, **options):
    """A DataLoader of dicts of tensors."""
    if workers < 0:
        share = CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if device.type == "cpu" else min(8, max(1, share))
    return DataLoader(
        dataset, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda", worker_init_fn=worker_init,
        generator=torch.Generator(),  # its own, so that a resumed run draws no more
        **options)


def worker_init(worker):
    """Keep Ctrl-C from a worker, which the current step needs, and let it print nothing."""
    sys.stderr = open(os.devnull, "w")
    if hasattr(os, "setpgrp"):
        os.setpgrp()


# ======== Runs: their folders, checkpoints, and reading them again

VERSION = 5  # of checkpoints
SOURCES = [Path(__file__).with_name(name) for name in ("vqct.py", "train.py")]
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
RUN_FILES = """config.json metrics.jsonl last.pt best.pt prior.npz evaluation.json
    reconstructions.png tokens-train.npz tokens-val.npz features-train.npy
    features-val.npy fig1_space.png fig3_toy.png fig5_usage.png fig6_similarity.png
    fig7_regions.png curves.png samples.png completions.png photographs.png""".split()


def identity(dataset, root, maps=False):
    """sha256 of labels, and of the images' names below `root`, sizes and some bytes.

    maps: also of label maps that are files, not of painted masks.
    """
    images = []
    for record in dataset.records:
        images.append([record.label])
        for path in (record.path, record.segmentation if maps else None):
            if isinstance(path, Path):
                with open(path, "rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(size // 2)
                    middle = zlib.crc32(file.read(4096))  # uncompressed images have equal sizes
                images[-1] += [os.path.relpath(path, root), size, middle]
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()


def check_folder(out, overwrite):
    """Raise UserError for a run that must be kept, or a folder with foreign files."""
    names = sorted(path.name for path in out.glob("*"))
    if "last.pt" in names and not overwrite:
        raise UserError(f"run '{out}' exists; go on with --resume, replace it with "
                        "--overwrite, or name another --out")
    ours = {*RUN_FILES, "lock", "synthesis", "decoded", "other"}
    foreign = [name for name in names if name.removesuffix(".part") not in ours]
    if foreign:
        raise UserError(f"'{out}' holds {', '.join(foreign[:3])}; "
                        "move that away, or name another --out")


def lock(file, waiting=""):
    """Lock a file until it is closed.

    If another process has locked it: print `waiting` and wait, or raise UserError.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not waiting:
            raise UserError(f"another process works in '{Path(file.name).parent}'") from None
        print(waiting, flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks


def open_run(out, trainer, overwrite=False, resumed=None):
    """Prepare a run's folder → its metrics.jsonl, open and locked.

    resumed: the checkpoint to continue from; otherwise an earlier run is deleted.
    """
    if rank():
        return open(os.devnull, "wb")
    out.mkdir(parents=True, exist_ok=True)
    journal = open(out / "metrics.jsonl", "a+b")
    lock(journal)
    if resumed:
        cut_journal(journal, resumed["step"])
    else:
        check_folder(out, overwrite)  # again: a run may have ended here meanwhile
        journal.truncate(0)
        for name in set(RUN_FILES) - {"metrics.jsonl"}:
            (out / name).unlink(missing_ok=True)
            (out / f"{name}.part").unlink(missing_ok=True)
    with atomic_write(out / "config.json") as part:
        config = {**asdict(trainer.config), "torch": torch.__version__}
        part.write_text(json.dumps(config, indent=1))
    if not resumed:
        save_checkpoint(out / "last.pt", trainer)
    return journal


def cut_journal(journal, step):
    """Cut metrics.jsonl before its first line that is later than a step, or half a line."""
    journal.seek(0)
    length = 0
    for line in journal:
        match = re.search(rb'"step": (\d+),', line)
        if match and int(match[1]) > step or not line.endswith(b"\n"):
            break
        length += len(line)
    journal.truncate(length)


def read_journal(path):
    """The lines of a metrics.jsonl that can be read → list of dicts."""
    lines = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # damaged, or cut by a kill
            lines.append(json.loads(line))
    return lines


def check_there(journal):
    """Raise UserError if an open file's folder was deleted or moved."""
    with user_error(f"'{journal.name}' is no longer there: its folder was deleted or moved"):
        if not os.path.samestat(os.stat(journal.name), os.fstat(journal.fileno())):
            raise FileNotFoundError


def save_checkpoint(path, trainer):
    """Save the whole state of a trainer."""
    state = {
        "version": VERSION, "config": asdict(trainer.config), "step": trainer.step,
        "best": trainer.best, "code": CODE, "processes": processes(),
        "random": torch.get_rng_state(), **trainer.notes(),
        **{name: part.state_dict() for name, part in trainer.parts().items()},
    }
    if trainer.device.type == "cuda":
        state["cuda_random"] = torch.cuda.get_rng_state(trainer.device)
    archive = io.BytesIO()
    torch.save(state, archive)
    with atomic_write(path, folder=False) as part:  # it may have been deleted
        part.write_bytes(archive.getbuffer())


def load_checkpoint(path):
    """A dict of `save_checkpoint`, with the file's "sha256". Raises UserError for others."""
    if not Path(path).exists():
        raise UserError(f"no run here: '{path}' is missing")
    with user_error(f"'{path}' is no checkpoint of this program, or damaged: {{}}"):
        data = Path(path).read_bytes()
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()  # torch does not
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = load_tensors(io.BytesIO(data))
        if state["version"] != VERSION:
            raise ValueError(f"it is of version {state['version']}, this code reads {VERSION}")
        return {**state, "sha256": hashlib.sha256(data).hexdigest()}


def restore(trainer, state, out):
    """Give a trainer of either stage the state of a checkpoint of the same images."""
    if state["data"] != trainer.data:
        raise UserError(f"'{out}' was trained on other images than these; "
                        "point --data at a copy of its own")
    with fitting(out / "last.pt"):
        trainer.step, trainer.best = state["step"], state["best"]
        for name, part in trainer.parts().items():
            part.load_state_dict(state[name])
        for name in state.keys() & {"last_used", "start"}:
            setattr(trainer, name, [tensor.to(trainer.device) for tensor in state[name]])
        torch.set_rng_state(state["random"])
        if "cuda_random" in state and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], trainer.device)
    print(f"resumed at step {trainer.step:,}")


def fitting(path):
    """A block in which errors of loading become a UserError."""
    return user_error(f"'{path}' does not match its configuration: {{}}")


def resumed_choices(kind, given, changeable, out):
    """The checkpoint of a run, and its configuration with the flags of --resume.

    changeable: names of the flags that may differ.
    """
    state = load_checkpoint(out / "last.pt")
    with fitting(out / "last.pt"):
        stored = asdict(kind(**state["config"]))
    for name, value in given.items():
        if name not in changeable and value != stored[name]:
            raise UserError(f"--resume cannot change --{name.replace('_', '-')} from "
                            f"{stored[name]!r}; start another run")
    if state["processes"] != processes():
        raise UserError(f"'{out}' was trained by {state['processes']} processes; "
                        "resume with as many")
    choices = {**stored, **given}
    if state["step"] >= choices["steps"]:
        raise UserError(f"'{out}' is at step {state['step']:,} already; "
                        "give a larger --steps")
    return state, choices


class Run:
    """A trained first stage: `model`, `config`, `prior`, `words` of the codes, ….

    device: as --device; data, labels: where the data set is now, or another one;
    checkpoint: "last" or "best".
    """

    def __init__(self, path, device="auto", data="", labels="", checkpoint="last"):
        self.path, self.device = Path(path), pick_device(device)
        file = self.path / f"{checkpoint}.pt"
        state = load_checkpoint(file)
        self.tokenizer = state["sha256"]
        with fitting(file):
            self.config = Config(**state["config"])
            for name in ("prior", "step", "start", "data", "code", "processes"):
                setattr(self, name, state[name])
            self.model = VQModel(self.config, self.prior)
            self.model.load_state_dict(state["model"])
        self.model.to(self.device).eval().requires_grad_(False).codebook.freeze()
        self._name_codes()
        self._find_data(data, labels)

    def _name_codes(self):
        sizes = self.model.codebook.sizes
        self.names = ("adjective", "noun") if len(sizes) == 2 else ("code",)
        tokens = self.model.per_token(self.names)  # two adjectives, if two are averaged
        self.token_names = [name if tokens.count(name) == 1 else f"{name}{index}"
                            for index, name in enumerate(tokens, 1)]
        if self.prior is None:
            self.words = [[str(index) for index in range(size)] for size in sizes]
        else:
            words = [self.prior["adjective_words"], self.prior["noun_words"]]
            self.words = words if len(sizes) == 2 else [sum(words, [])]

    def _find_data(self, data, labels):
        config, self.results, self.datasets = self.config, self.path, None
        if data and config.dataset == "demo" or labels and config.dataset != "folder":
            raise UserError(f"--data or --labels changes nothing with --dataset {config.dataset}")
        if labels or not os.path.isdir(config.labels):  # most commands need no label maps
            config.labels = labels
        if data:
            config.data = os.path.expanduser(data)
            with contextlib.suppress(UserError):  # of a folder without splits
                self.datasets = make_datasets(config)
            if not self.datasets or identity(self.datasets[0], config.data) != self.data:
                self.results = self.path / "other" / Path(data).resolve().name
                config.labels = labels
                self.datasets = make_datasets(config, whole=True)

    def dataset(self, split):
        """The "train" or "val" images of the run's data set, or of another one."""
        if self.datasets is None:  # some commands need none
            self.datasets = make_datasets(self.config)
        return copy.copy(self.datasets[split == "val"])

    def read(self, path):
        """A photograph, its centre cropped to the resolution → (1, 3, R, R)."""
        dataset = ImageDataset([Record(Path(path))], [], self.config.resolution)
        return to_images(dataset[0]["image"][None], self.device)

    def spell(self, indices):
        """(M, h, w) indices of an image → h lines of w words: "red breast"."""
        words = self.model.per_token(self.words)
        rows = [[" ".join(map(list.__getitem__, words, codes)) for codes in row]
                for row in indices.permute(1, 2, 0).tolist()]
        width = max(len(cell) for row in rows for cell in row)
        return "\n".join("  ".join(cell.ljust(width) for cell in row).rstrip()
                         for row in rows)

    def batches(self, dataset, keys=None, doing="reading"):
        """Yield (images (B, 3, R, R) on the device, the loader's dict).

        keys: which images; all by default.
        """
        progress, done = Progress(), 0
        loader = make_loader(dataset, self.device, sampler=keys,
                             batch_size=self.config.batch_size)
        for batch in loader:
            yield to_images(batch["image"], self.device), batch
            done += len(batch["image"])
            progress(f"{doing}: {done:,} of {len(loader.sampler):,} images")


def to_bytes(x):
    """[-1, 1] → uint8, rounded."""
    return x.float().clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


FONT = ImageFont.load_default(14)


def draw_grid(rows, path, size=128, columns=8):
    """Draw labelled rows of pictures as a PNG; long rows continue below.

    rows: list of (label, images (3, H, W) in [-1, 1]), maybe with names to write over the
    images; size: pixels a side at least.
    """
    size = max(size, rows[0][1][0].shape[-1])
    length = max(len(images) for _, images, *_ in rows)
    lines = [(label, *(items[first : first + columns] for items in row))
             for first in range(0, length, columns)
             for label, *row in rows if first < len(row[0])]
    pitch, margin = size + 4, 150
    width = margin + min(length, columns) * pitch
    grid = Image.new("RGB", (width, len(lines) * pitch), "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, images, *names) in enumerate(lines):
        text = "\n".join(textwrap.fill(line, 18) for line in label.split("\n"))
        draw.multiline_text((8, (row + 0.5) * pitch), text, "black", FONT, anchor="lm")
        for column, x in enumerate(images):
            picture = TF.to_pil_image(to_bytes(x).cpu())
            picture = picture.resize((size, size), Image.Resampling.NEAREST)
            corner = margin + column * pitch, row * pitch
            grid.paste(picture, corner)
            for listed in names:
                draw.text(corner, listed[column], "black", FONT, stroke_width=2,
                          stroke_fill="white")
    save_png(grid, path)


# ======== Devices, processes, published weights

def rank():
    """This process's number among those of torchrun; 0 if it is alone."""
    return torch.distributed.get_rank() if distributed() else 0


def processes():
    """How many processes torchrun started, on all machines together."""
    return torch.distributed.get_world_size() if distributed() else 1


def launch(main):
    """Run a script's `main` in each process of torchrun; the first alone prints."""

    def joined():
        if {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            backend = "gloo"
            if torch.cuda.is_available():
                backend = "cpu:gloo,cuda:nccl"
                with user_error("torchrun started more processes than there are GPUs: {}"):
                    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # The first process may download or encode while the others wait.
            torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
        if rank():
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            main()
        except UserError as error:
            raise SystemExit(2) if rank() else error
        finally:
            sys.stderr = sys.__stderr__  # for a traceback
        if distributed():
            torch.distributed.destroy_process_group()

    command(joined)


@contextlib.contextmanager
def first_process_first():
    """A block that the first process runs first; the others then find its files."""
    if rank():
        torch.distributed.barrier()
    yield
    if distributed() and not rank():
        torch.distributed.barrier()


def pick_device(name):
    """torch.device for a --device flag. Raises UserError if this machine lacks it."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and distributed():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with user_error(f"--device {name}: {{}}; give cpu, cuda, cuda:1 or mps"):
        return torch.zeros(1, device=name).device


HEADS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
             "lpips/weights/v0.1/{}.pth")
LPIPS_FILES = {  # network → its URL and size, and sha256 of its heads
    "vgg": (torchvision.models.VGG16_Weights.IMAGENET1K_V1.url, "528 MB",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "squeeze": (torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url, "5 MB",
                "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"),
}


def lpips_files(trunk):
    """LPIPS's network and heads → list of two PublishedFile."""
    url, size, sha256 = LPIPS_FILES[trunk]
    name = url.rpartition("/")[2]  # torchvision's names end in digits of the sha256
    return [PublishedFile(f"LPIPS's trunk {name}", size, url,
                          "--trunk-weights FILE", name, name[-12:-4]),
            PublishedFile("LPIPS's heads", "7 kB", HEADS_URL.format(trunk),
                          "--lpips-weights FILE", f"lpips_{trunk}_v0.1.pth", sha256)]


def load_lpips(trunk, trunk_weights="", lpips_weights=""):
    """LPIPS with its published weights, from local files or the cache."""
    files = zip((trunk_weights, lpips_weights), lpips_files(trunk))
    paths = [local or file.get() for local, file in files]
    with user_error(f"these are not LPIPS's {trunk} trunk and heads: "
                    f"{paths[0]}, {paths[1]}: {{}}"):
        return LPIPS(trunk, *map(read_tensors, paths))


def take_published_weights(trainer, path):
    """Give a Trainer the weights of a taming-transformers checkpoint.

    A prefix of all names, such as "ema.", is left out.
    """
    state = read_tensors(path)
    prefix = re.match(r"(.*\.)?", os.path.commonprefix(list(state)))[0]
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    with user_error(f"--init {path} is no VQGAN of taming-transformers that fits: {{}} "
                    "(published: --preset f16)"):
        unused = load_taming(trainer.model, trainer.discriminator, state)
    trainer.start = [codes.detach().clone() for codes in trainer.model.codebook()]
    networks = sorted({name.partition(".")[0] for name in unused})
    print(f"init: {path}; not taken from it: {', '.join(networks) or 'nothing'}")


# ======== Command line

CHANGEABLE = """out steps lr device data download labels trunk_weights lpips_weights
    workers log_every eval_every amp compile deterministic""".split()  # on --resume


def parse(argv=None):
    """Command line → (Config, checkpoint to resume from or None, --overwrite)."""
    parser = Parser(description=__doc__)
    add_start_flags(parser)
    parser.add_fields(Config, default_text)
    given = vars(parser.parse_args(argv))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    if not resume:
        return resolve(given), None, overwrite
    given["out"] = given.get("out") or resolve(given).out
    state, stored = resumed_choices(Config, given, CHANGEABLE, Path(given["out"]))
    return resolve(given, stored), state, False


def add_start_flags(parser):
    """Add the flags of both stages that say what becomes of an earlier training."""
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue from its last checkpoint")
    start.add_argument("--overwrite", action="store_true", help="replace what is there")


def default_text(name, value, presets=PRESETS):
    """A flag's default in --help: "256; demo: 64; tiny: 64"."""
    others = [f"{preset}: {choices[name]}" for preset, choices in presets.items()
              if choices.get(name, value) != value]
    return "; ".join([str(value), *others])


def main(argv=None):
    """Train a run from its flags to its last step."""
    config, state, overwrite = parse(argv)
    out, device = Path(config.out), pick_device(config.device)
    if state is None and not rank():
        check_folder(out, overwrite)  # before the data are read
    with first_process_first():
        provide(needs(config, with_prior=state is None), config.download, "add --download")
        train_set, val_set = make_datasets(config)  # the latter is for evaluate.py
        if not rank():
            check_images((train_set, val_set))
        # §3.3, steps 1 and 2: words, their vectors and the graph.
        prior = None if state else make_prior(config, train_set)
    kept, chosen = hold_out(len(train_set), config.eval_images)

    tensors = state["prior"] if state else prior and prior.tensors()
    trainer = Trainer(config, tensors, device, len(kept),
                      identity(train_set, config.data))  # step 3
    if state:
        restore(trainer, state, out)
    elif config.init:
        take_published_weights(trainer, config.init)

    order = train_batches(
        kept, config.batch_size, trainer.step, config.steps, config.seed)
    loader = make_loader(train_set, device, config.workers, batch_sampler=order)
    validation = make_loader(Subset(train_set, chosen), device, 0,
                             batch_size=config.batch_size)
    with open_run(out, trainer, overwrite, state) as journal:
        if prior is not None and not rank():
            prior.save(out / "prior.npz")
        if images_per_step(config) > len(kept):
            print(f"note: a step takes {images_per_step(config):,} images, some of them twice")
        print(f"{out}: {config.method} ({config.preset}) on {device} in {precision(trainer)}\n"
              f"{config.dataset}: {len(kept):,} images train, {len(chosen):,} choose best.pt, "
              f"{len(val_set):,} evaluate", flush=True)
        images = (to_images(batch["image"], device) for batch in loader)
        fit(trainer, images, lambda: trainer.validate(validation), out, journal)
    print(f"done: look into {out}; "
          f"measure with: python evaluate.py {shlex.quote(str(out))}")


# ======== Appendix, the demo: flat birds in scenes, drawn and described by code

COLOURS = dict(
    red="#d65a4e", orange="#ee9c50", yellow="#f2d772", green="#6aab63", olive="#99a163",
    teal="#43a0a4", blue="#4f86c9", purple="#9791bd", pink="#f0a0aa", brown="#8c6a50",
    beige="#dccba8", white="#f1efe7", gray="#a0a6ad", dark="#5d6170", black="#363843",
)
PLUMAGE = "leg tail breast belly wing beak head eye".split()
SPECIES = {  # its colours; lengths of legs, tail, beak and crest
    "robin": ("brown brown orange white brown yellow brown black", 0.14, 0.25, 0.10, 0),
    "cardinal": ("orange dark red red dark orange red black", 0.12, 0.40, 0.10, 0.15),
    "jay": ("black blue white white blue black blue black", 0.12, 0.35, 0.14, 0.15),
    "goldfinch": ("orange black yellow yellow black orange black white", 0.10, 0.20, 0.10, 0),
    "kingfisher": ("dark blue orange orange teal dark teal white", 0.10, 0.10, 0.35, 0),
    "heron": ("yellow dark gray gray dark yellow white black", 0.32, 0.15, 0.30, 0),
    "flamingo": ("dark red pink pink red black pink black", 0.34, 0.15, 0.14, 0),
    "crow": ("dark black black black dark dark black white", 0.14, 0.30, 0.20, 0),
    "magpie": ("dark black black white blue dark black white", 0.14, 0.55, 0.14, 0),
    "gull": ("yellow gray white white gray yellow white black", 0.14, 0.20, 0.18, 0),
    "parrot": ("dark blue green yellow blue dark red black", 0.08, 0.50, 0.08, 0),
    "duck": ("yellow black brown white gray yellow teal black", 0.08, 0.15, 0.16, 0),
}
BIRD_SIZES = {"tiny": 0.50, "small": 0.55, "large": 0.60, "big": 0.65}
LIGHTS = {  # adjectives, and the colour of the sky
    "day": "bright sunny #a4d2f4", "morning": "warm golden #f9e3b8",
    "evening": "rosy soft #ecb6ba", "dawn": "misty cold #dde8ea",
}
# Background, ground, perch; the background's bumps and their height; half the perch's width.
PLACES = {
    "forest": ("leafy tall tree green", "soft damp moss olive", "wet log brown", 2, 0.375, 1),
    "meadow": ("low hill olive", "fresh tall grass green", "wooden post brown", 1, 0.125, 0.125),
    "cliff": ("steep high mountain purple", "coarse gravel beige", "rough rock dark", 2, 0.375, 0.25),
    "lake": ("quiet distant shore green", "calm clear water blue", "old root brown", 1, 0.125, 0.375),
    "beach": ("open wide sea teal", "smooth dry sand beige", "round stone dark", 0, 0.5, 0.1875),
    "field": ("distant ridge purple", "deep fresh snow white", "bare stump brown", 2, 0.25, 0.1875),
}
LAYERS = [text.split() for row in PLACES.values() for text in row[:3]]
LEVEL, PERCH = 11 / 16, 14 / 16  # where the ground begins, and where the bird stands
SEGMENTS = ["sky", "behind", "ground", "perch", *PLUMAGE]
DEMO_SPEECH = WordListSpeech(
    {*COLOURS, *BIRD_SIZES, "long", "short", "round",
     *(word for text in LIGHTS.values() for word in text.split()[:-1]),
     *(word for *adjectives, _, _ in LAYERS for word in adjectives)},
    {*SPECIES, *LIGHTS, *PLACES, *PLUMAGE, *(noun for *_, noun, _ in LAYERS),
     *"bird crown bill scene light".split()})
CAPTIONS = (
    "a {size} bird with a {breast} breast, a {bill} {beak} beak and a round {eye} eye",
    "this {size} {name} has a {breast} breast, a {belly} belly and {leg} legs",
    "a bird with {wing} wings and a {long} {tail} tail",
    "the crown of the {name} is {head}, and its {bill} bill is {beak}",
    "a {size} {name} with a {head} head on a {perch} in {lit} light",
    "a {behind} behind a {name} on a {lit} {light}",
    "a {lit} scene of a {place} with {ground} and a {name} on a {perch}",
)


class Scene:
    """One bird in one place, which ("train" or "val", index) determines."""

    def __init__(self, split, index):
        self.rng = np.random.default_rng((list(SPLITS).index(split), index))
        self.name, self.size, self.place, self.light = map(
            self.rng.choice, map(list, (SPECIES, BIRD_SIZES, PLACES, LIGHTS)))
        colours, self.leg, self.tail, self.beak, self.crest = SPECIES[self.name]
        self.colours = dict(zip(PLUMAGE, colours.split()))
        shift = BIRD_SIZES[self.size] * (self.tail - self.beak) / 2
        self.x = round(16 * shift + self.rng.uniform(6.3, 8.7)) / 16  # where it stands
        self.flipped = self.rng.random() < 0.5
        self.captions = self.describe()

    def describe(self):
        """Four captions, whose words are those of DEMO_SPEECH."""
        words = {
            **vars(self), **self.colours,
            "lit": self.rng.choice(LIGHTS[self.light].split()[:-1]),
            "bill": "long" if self.beak > 0.15 else "short",
            "long": "long" if self.tail > 0.3 else "short",
        }
        for layer, text in zip(("behind", "ground", "perch"), PLACES[self.place]):
            *adjectives, noun, colour = text.split()
            words[layer] = f"{self.rng.choice([*adjectives, colour])} {noun}"
        captions = self.rng.choice(CAPTIONS, 4, replace=False)
        return [re.sub(r"\ba (?=[aeiou])", "an ", text.format(**words)) for text in captions]

    def draw(self, resolution):
        """→ image (3, R, R) and label map (1, R, R), uint8, drawn four times as large."""
        side = 4 * resolution
        image, labels = (Image.new(mode, (side, side)) for mode in ("RGB", "L"))
        for segment, colour, shape, *points in (*self.place_shapes(), *self.bird_shapes()):
            points = [(side * x, side * y) for x, y in points]
            getattr(ImageDraw.Draw(image), shape)(points, fill=COLOURS.get(colour, colour))
            getattr(ImageDraw.Draw(labels), shape)(points, fill=SEGMENTS.index(segment))
        labels = labels.resize((resolution, resolution), Image.Resampling.NEAREST)
        pictures = TF.pil_to_tensor(image.reduce(4)), TF.pil_to_tensor(labels)
        return [picture.flip(-1) if self.flipped else picture for picture in pictures]

    def place_shapes(self):
        """Segment, colour, shape and points of all that is not the bird."""
        behind, ground, perch, bumps, high, half = PLACES[self.place]
        *_, noun, colour = behind.split()
        yield "sky", LIGHTS[self.light].split()[-1], "rectangle", (0, 0), (1, 1)
        yield "behind", colour, "rectangle", (0, LEVEL - high / 4), (1, LEVEL)
        for bump in range(bumps):
            left, middle, right = ((bump + share) / bumps for share in (-0.25, 0.5, 1.25))
            shape, *points = "ellipse", (left, LEVEL - high), (right, LEVEL + high)
            if noun in ("mountain", "ridge"):
                shape, *points = "polygon", (left, LEVEL), (middle, LEVEL - high), (right, LEVEL)
            yield "behind", colour, shape, *points
        yield "ground", ground.split()[-1], "rectangle", (0, LEVEL), (1, 1)
        yield "perch", perch.split()[-1], "rectangle", (self.x - half, PERCH), (self.x + half, 1)

    def bird_shapes(self):
        """The same of a bird that looks right. Its points are in units of its size."""
        x, y = (0.36, -0.44) if self.leg > 0.3 else (0.28, -0.28)  # of the head
        size, foot, crest = BIRD_SIZES[self.size], 0.25 + self.leg, self.crest
        tail, tip = -0.36 - self.tail, x + 0.2 + self.beak
        for part, shape, *points in (
            ("leg", "rectangle", (-0.03, 0), (0.02, foot)),
            ("leg", "rectangle", (0.09, 0), (0.14, foot)),
            ("tail", "polygon", (-0.2, -0.1), (tail, 0.02), (tail, 0.15), (-0.2, 0.15)),
            ("breast", "ellipse", (-0.42, -0.27), (0.42, 0.27)),
            ("belly", "ellipse", (-0.36, -0.1), (0.22, 0.27)),
            ("breast", "polygon", (0.1, -0.2), (x - 0.1, y), (x + 0.1, y), (0.4, 0.05)),
            ("wing", "ellipse", (-0.46, -0.26), (0.14, 0.13)),
            ("wing", "polygon", (-0.3, -0.22), (-0.1, 0.12), (-0.58, 0.12)),
            ("beak", "polygon", (x + 0.1, y - 0.08), (tip, y + 0.04), (x + 0.1, y + 0.12)),
            ("head", "polygon", (x, y - 0.19), (x - 0.1 - crest, y - 0.1 - crest), (x - 0.19, y)),
            ("head", "ellipse", (x - 0.19, y - 0.19), (x + 0.19, y + 0.19)),
            ("eye", "ellipse", (x + 0.03, y - 0.08), (x + 0.13, y + 0.02)),
        ):
            points = [(self.x + size * x, PERCH + size * (y - foot)) for x, y in points]
            yield part, self.colours[part], shape, *points


class DemoDataset(ImageDataset):
    """Birds drawn on demand, the same for every seed."""

    SIZES = {"train": 2048, "val": 256}
    labels = dict(enumerate(SEGMENTS))

    def __init__(self, split, resolution, seed=0):
        self.scenes = [Scene(split, index) for index in range(self.SIZES[split])]
        records = [Record(None, list(SPECIES).index(scene.name), scene.captions, ())
                   for scene in self.scenes]
        super().__init__(records, list(SPECIES), resolution, seed)

    def read(self, index, rng=None):
        image, labels = self.scenes[index].draw(self.resolution)
        return image, labels[0].long() if self.with_segmentation else None


if __name__ == "__main__":
    launch(main)
