"""Train the first stage: encoder, codebooks and decoder (paper §3.3, §4.1).

    python train.py                                            built-in birds, minutes on a CPU, no download
    python train.py --dataset cub --download --device cuda     the paper's system, from nothing
    torchrun --nproc-per-node 8 train.py --dataset cub         on all GPUs of a machine
    python train.py --dataset coco --init vqgan_imagenet_f16_1024.ckpt --device cuda   from published weights
    python train.py --dataset folder --data DIR --prior prior.npz --preset tiny
    python train.py --method vqgan                             the baseline: 1,024 learned codes
    python train.py --resume                                   go on where the last run stopped

The file reads: Config and the paper's systems, one step, one loop, data sets, runs, main; the demo is an appendix. A
run's folder holds config.json, metrics.jsonl, last.pt, best.pt, prior.npz and reconstructions.png.
"""

import contextlib
import copy
import datetime
import functools
import hashlib
import io
import itertools
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
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Metal lacks runs on the CPU; read as torch is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, CUDA's products do not repeat themselves

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, Subset

from prior import (CORES, Need, Parser, Prior, Progress, PublishedFile, UserError, WordListSpeech, atomic_write,
                   build_prior, command, describe_codebook, download, is_hidden, language_needs, list_files,
                   load_tensors, provide, read_captions, read_corpora, read_tensors, regular, save_png, shuffled,
                   text_checksum, user_error)
from vqct import (LPIPS, NETWORKS, Discriminator, ModelConfig, VQModel, adaptive_weight, all_reduce,
                  distributed, hinge_loss, load_taming, needs_prior, option)

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# ======== Configuration: one dataclass, from which the flags, config.json and the checkpoint are made

@dataclass
class Config(ModelConfig):
    """A run. Defaults are the paper's f16 network with VQGAN's training; presets and methods change some."""

    dataset: str = option("demo", "demo: birds drawn by code; folder: any tree of images; or a published layout",
                          choices=lambda: ("demo", "folder", *DATASETS))
    data: str = option("", "folder of the data set (default: data/ and the published folder's name)")
    download: bool = option(False, "download all that is missing (photographs, captions, CLIP, NLTK, LPIPS)")
    labels: str = option("", "folder of label maps with the images' relative names, for --dataset folder")
    prior: str = option("", "a .npz of prior.py (default: CLIP's, of COCO's captions and the data set's own)")
    init: str = option("", "published VQGAN weights to start from, of taming-transformers (.ckpt, .pt, .safetensors)")
    method: str = option("vqct", "a system of the paper or a control: quantizer, codes, transfer and losses",
                         choices=lambda: METHODS)
    recipe: str = option("paper", "official: the settings of the authors' code, as far as flags go (see the README)",
                         choices=lambda: RECIPES)
    shuffle: str = option("none", "control: word vectors permuted, or edges rewired, each word keeping its number",
                          choices=("none", "vectors", "edges"))
    preset: str = option("", "f16: the paper's network (default); demo, tiny: 64 px, minutes on a CPU",
                         choices=("", *NETWORKS))
    out: str = option("", "run folder (default: runs/, data set, method and what departs from it)")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the first of cuda, mps, cpu that is there")
    seed: int = option(0, "seed of weights, random codes, shuffles and data order", least=0)
    steps: int = option(500_000, "generator steps (the authors: 500 epochs)", least=0)
    batch_size: int = option(8, "images per process and micro-step (the authors' code: 8)")
    accumulate: int = option(1, "micro-steps whose gradients are averaged before each optimizer step")
    lr: float = option(0.0, "Adam's step size; 0 takes VQGAN's 4.5e-6 times the images of a step")
    schedule: str = option("constant", "learning rate: constant as in VQGAN, or a cosine to zero, for short runs",
                           choices=("constant", "cosine"))
    pixel_loss: str = option("l2", "l2 as in Eq. 2, or l1 as in VQGAN's code", choices=("l1", "l2"))
    perceptual_weight: float = option(1.0, "weight of LPIPS beside the pixel loss (VQGAN)")
    perceptual_trunk: str = option("vgg", "LPIPS network: VGG-16, as in the paper, or SqueezeNet 1.1, light",
                                   choices=("vgg", "squeeze"))
    trunk_weights: str = option("", "local copy of its torchvision ImageNet weights")
    lpips_weights: str = option("", "local copy of LPIPS v0.1's linear heads")
    gan_weight: float = option(0.8, "adversarial loss, times the adaptive weight (VQGAN); 0: no discriminator")
    gan_start: int = option(5_000, "step at which the adversary joins (authors: 10,000 of both networks); "
                            "demo, tiny: after five sixths of the steps", least=0)
    discriminator_layers: int = option(3, "inner layers; 3 gives patches of 70 × 70 pixels")
    amp: bool = option(True, "bfloat16 autocast on CUDA, since Ampere")
    compile: bool = option(True, "torch.compile on CUDA, unless --deterministic: a slower start, faster steps")
    deterministic: bool = option(False, "on CUDA, only algorithms that repeat themselves bit by bit: slower")
    workers: int = option(-1, "processes that read images; −1: at most 8 for a GPU, none on the CPU", least=-1)
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    eval_every: int = option(2_000, "steps between validations, with checkpoint and picture")
    eval_images: int = option(256, "training images held out to choose best.pt, at most a twentieth")


PRESETS = {
    "f16": NETWORKS["f16"],
    **{name: dict(**NETWORKS[name], batch_size=4, steps=1800, lr=3e-4, schedule="cosine", perceptual_weight=0.0,
                  gan_weight=0.2, gan_start=1500, eval_every=300, eval_images=64) for name in ("demo", "tiny")},
}
RECIPES = {
    "paper": {},
    "official": dict(transfer_layers=2, transfer_width=256, transfer_dropout=0.5, last_relu=False, pixel_loss="l1",
                     adjective_neighbours=2, beta_on="codebook", weighted_edges=True, vector_scale="none",
                     code_dim=512, straight_through=False, amp=False),  # 256 for each of two codebooks
}
LEARNED = dict(codes="uniform", codebooks=1, codebook_size=1024, trained=True, transfer="none", adjective_neighbours=1)
PIXEL_LOSS_ONLY = dict(gan_weight=0.0, perceptual_weight=0.0)
METHODS = {
    "vqct": {},  # every table: Config's defaults, gcn and two codebooks; Table 3 (vi)
    "vqct-vqvae": PIXEL_LOSS_ONLY,  # Table 4
    "vqvae": {**LEARNED, **PIXEL_LOSS_ONLY},  # Tables 1, 4, 6
    "vqgan": LEARNED,  # Tables 1, 2 (i), 4 (ii), 5 (i), 6
    "gumbel": {**LEARNED, "codes": "random", "quantizer": "gumbel"},  # Tables 1, 6
    "cvq": {**LEARNED, "quantizer": "cvq"},  # Table 1
    "regvq": {**LEARNED, "codes": "random", "quantizer": "regvq", "kl_weight": 0.1, "contrastive_weight": 0.01},  # T. 6
    "random-mlp": dict(codes="random", transfer="mlp"),  # Table 2 (ii)
    "frozen": dict(codebooks=1, transfer="none"),  # Table 3 (i)
    "finetune": dict(codebooks=1, transfer="none", trained=True),  # Table 3 (ii)
    "single-mlp": dict(codebooks=1, transfer="mlp"),  # Table 3 (iii)
    "single-gcn": dict(codebooks=1),  # Table 3 (iv)
    "multi-mlp": dict(transfer="mlp"),  # Table 3 (v)
    "matched": dict(codes="uniform", trained=True, transfer="none"),  # control: VQCT's sizes, learned
    "matched-cvq": dict(codes="uniform", trained=True, transfer="none", quantizer="cvq",
                        adjective_neighbours=1),  # control: … kept alive
    "matched-l2": dict(codes="random", trained=True, transfer="unit"),  # control: … of unit length
    "simvq": dict(codes="random", transfer="linear"),  # control: frozen vectors, one linear map (Zhu et al.)
    "words-linear": dict(transfer="linear"),  # control: … the words' vectors, VQGAN-LC's form
}


def resolve(given, stored=None):
    """Explicit choices → the whole Config: flags come before the method, then the recipe, then the preset.

    stored: the choices of a run that is resumed, which then take the place of these three.
    Raises UserError for a choice that changes nothing in this system.
    """
    dataset, method = given.get("dataset", Config.dataset), given.get("method", Config.method)
    default = "demo" if dataset == "demo" else "f16"
    preset = given.get("preset") or default
    usual = {**PRESETS[preset], **RECIPES[given.get("recipe", Config.recipe)], **METHODS[method]}
    if preset != "f16" and "steps" in given:
        usual["gan_start"] = usual["gan_start"] * given["steps"] // usual["steps"]
    if {**usual, **given}.get("codebooks") == 1:
        usual["code_dim"] = PRESETS[preset].get("code_dim", Config.code_dim)
    config = Config(**({**stored, **given} if stored else {**usual, **given, "preset": preset}))
    config.lr = config.lr or 4.5e-6 * config.batch_size * config.accumulate * processes()
    if not config.data and config.dataset in DATASETS:
        config.data = f"data/{DATASETS[config.dataset].folder}"
    config.data, config.labels = map(os.path.expanduser, (config.data, config.labels))
    if not config.out:
        usual["preset"], words = default, [dataset, method]
        words += [Path(config.prior).stem] if config.prior else []
        losses = ("pixel_loss", "gan_weight", "perceptual_weight")
        for name in ("preset", "recipe", "shuffle", "seed", *losses, *ModelConfig.__annotations__):
            if name in given and given[name] != usual.get(name, getattr(Config, name)):
                told = isinstance(given[name], str) and given[name] != "none"
                words.append(given[name] if told else f"{name}-{given[name]}")
        words = [re.sub(r"[^\w.]+", "-", word) for word in [*words, *(["init"] if config.init else [])]]
        config.out = "runs/" + "-".join(words)
    if config.data and config.dataset == "demo":
        raise UserError(f"--data {config.data} needs --dataset too: folder for any photographs, or a published data set")
    if config.prior and not config.prior.endswith(".npz"):
        raise UserError(f"--prior takes a .npz; make one with: python prior.py {shlex.quote(config.prior)} --out NAME.npz")
    return refuse_idle(config, given, MATTERS)


MATTERS = {  # flags that matter only where this holds, and are refused elsewhere
    "prior": lambda config: needs_prior(config),
    "download": lambda config: config.dataset != "demo" or config.perceptual_weight > 0,
    "labels": lambda config: config.dataset == "folder",
    "shuffle": lambda config: config.codes == "words" if config.shuffle == "vectors" else config.transfer == "gcn",
    "code_dim": lambda config: config.codes != "words" or config.transfer not in ("none", "unit"),
    "codebook_size": lambda config: config.codes != "words" and config.transfer != "gcn",
    "vector_scale": lambda config: config.codes == "words",
    "weighted_edges": lambda config: config.transfer == "gcn",
    "transfer_layers last_relu": lambda config: config.transfer in ("gcn", "mlp"),
    "transfer_width transfer_dropout": lambda config: config.transfer in ("gcn", "mlp") and config.transfer_layers > 1,
    "beta beta_on": lambda config: config.quantizer != "gumbel",
    "adjective_neighbours": lambda config: config.codebooks == 2,
    "straight_through": lambda config: config.quantizer == "gumbel",
    "kl_weight temperature_end": lambda config: config.quantizer in ("gumbel", "regvq"),
    "usage_decay": lambda config: config.quantizer == "cvq",
    "mask_ratio contrastive_weight": lambda config: config.quantizer == "regvq",
    "perceptual_trunk trunk_weights lpips_weights": lambda config: config.perceptual_weight > 0,
    "gan_start discriminator_layers": lambda config: config.gan_weight > 0,
}


def refuse_idle(config, given, matters):
    """The configuration. Raises UserError for a flag among those `given` that changes nothing in it."""
    for names, holds in matters.items():
        for name in given.keys() & names.split():
            if not holds(config):
                raise UserError(f"--{name.replace('_', '-')} changes nothing beside the other flags; leave it out")
    return config


# ======== One step

class Trainer:
    """The state of a run, and its step.

    config: Config; prior: dict of `Prior.tensors`, or None; device: torch.device.
    training_images: how many train; `usage` counts the codes chosen in the latest epoch.
    data: the `identity` of their data set.
    Raises UserError for incompatible choices.
    """

    def __init__(self, config, prior, device, training_images=1, data=""):
        torch.manual_seed(config.seed)
        self.config, self.prior, self.device, self.data = config, prior, device, data
        self.step, self.best = 0, -math.inf
        self.steps_per_epoch = math.ceil(training_images / (config.batch_size * config.accumulate * processes()))
        with user_error("{}", ValueError):
            self.model = VQModel(config, prior).to(device, memory_format=torch.channels_last)
        self.generator_optimizer = self._adam(self.model)
        self.discriminator = self.discriminator_optimizer = self.perceptual = None
        if config.gan_weight > 0:
            if config.resolution // 2**config.discriminator_layers < 3:
                raise UserError(f"--discriminator-layers {config.discriminator_layers} are too many for these images")
            self.discriminator = Discriminator(layers=config.discriminator_layers)
            self.discriminator.to(device, memory_format=torch.channels_last)
            if device.type == "cuda" and distributed():  # batch statistics are those of all processes; gloo cannot
                self.discriminator = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.discriminator)
            self.discriminator_optimizer = self._adam(self.discriminator)
        if config.perceptual_weight > 0:
            self.perceptual = load_lpips(config.perceptual_trunk, config.trunk_weights, config.lpips_weights)
            self.perceptual.to(device, memory_format=torch.channels_last)
        # the step at which each code was last chosen
        self.last_used = [torch.full((size,), -1, device=device) for size in self.model.codebook.sizes]
        for network in filter(None, (self.model, self.discriminator)) if distributed() else ():
            for tensor in network.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        if config.compile and config.steps and not config.deterministic and device.type == "cuda":
            self.compile()
        self.start = [codes.detach().clone() for codes in self.model.eval().codebook()]  # for Fig. 6

    def _adam(self, network):
        return torch.optim.Adam(network.parameters(), lr=self.config.lr, betas=(0.5, 0.9), fused=True)

    def compile(self):
        """Compile the networks; torch runs, and says why, what it cannot compile as it is."""
        torch._dynamo.config.suppress_errors = True
        # Not compiled: the last layer, which the adaptive weight differentiates alone, and the codes.
        parts = [self.model.encoder, self.model.decoder.layers, self.perceptual]
        if not distributed():  # batch norm of all processes breaks the graph
            parts.append(self.discriminator)
        for network in filter(None, parts):
            network.compile()

    def parts(self):
        """The networks and optimizers that a checkpoint holds, by name."""
        names = ("model", "generator_optimizer", "discriminator", "discriminator_optimizer")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def notes(self):
        """What a checkpoint holds beside them."""
        return {"prior": self.prior, "last_used": self.last_used, "start": self.start, "data": self.data}

    def train_step(self, batches):
        """One step of generator (encoder, codebooks, decoder) and discriminator on a list of (B, 3, R, R) images.

        The generator minimises, by means over elements, images and patches and a sum over the codebooks c,

            L = ‖x − x̂‖² + w_p LPIPS(x, x̂) + Σ_c (‖sg[ẑ_c] − z_c‖² + β ‖sg[z_c] − ẑ_c‖²) + λ w_g (−D(x̂))

        where w_p is `perceptual_weight`, w_g `gan_weight`, and λ `adaptive_weight`, a constant. With
        `pixel_loss` "l1", the first term is |x − x̂|. Gumbel-VQ and Reg-VQ have their own terms in the sum.

        1. x̂ = G(quantize(E(x))), one forward pass.
        2. The pixel loss and LPIPS are differentiated down to x̂, no further; and from `gan_start` on −D(x̂)
           likewise, which λ of both gradients scales.
        3. One backward pass from x̂ and from the quantizers' losses to every weight of the generator.
        4. The discriminator's hinge loss on x and the same x̂.
        5. Both optimizers step, by the mean gradients of all processes.

        Returns dict of () tensors; "loss" is Eq. 2 and LPIPS, without the adversary.
        """
        self.model.train()
        adversarial = self.discriminator is not None and self.step >= self.config.gan_start
        metrics, share = {}, 1.0 / len(batches)
        self.follow_schedules()
        self.generator_optimizer.zero_grad()
        if adversarial:
            self.discriminator_optimizer.zero_grad()
        for x in batches:
            terms, indices = self.micro_step(x, share, adversarial)
            add_up(metrics, terms, share)
            for used, chosen in zip(self.last_used, self.model.by_codebook(indices)):
                used[chosen.flatten()] = self.step
        self.last_used = [all_reduce(used, "max") for used in self.last_used]
        metrics["gradient"] = average_gradients(self.model)
        self.generator_optimizer.step()
        if adversarial:
            metrics["discriminator_gradient"] = average_gradients(self.discriminator)
            self.discriminator_optimizer.step()
        self.step += 1
        return metrics

    def follow_schedules(self):
        """The learning rate and the quantizers' temperature of this step."""
        progress = self.step / self.config.steps
        self.model.anneal(progress)
        lr = self.config.lr * (0.5 + 0.5 * math.cos(math.pi * progress) if self.config.schedule == "cosine" else 1.0)
        for optimizer in filter(None, (self.generator_optimizer, self.discriminator_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def micro_step(self, x, share, adversarial):
        """Add the gradients of one micro-batch, times its share of the step → ({name: value}, indices)."""
        with autocast(self):
            output = self.model(x)
            # Both of the adaptive weight's norms and the generator's backward pass start from the gradients at x̂.
            x_hat = output.x_hat.detach().requires_grad_()  # (B, 3, R, R)
            loss, terms = self.reconstruction_loss(x_hat.to(x.dtype), x)
            (gradient,) = torch.autograd.grad(loss, x_hat)  # (B, 3, R, R)
            if adversarial:
                gradient, gan_terms = self.add_adversary(output.x_hat, x_hat, gradient)
                terms.update(gan_terms)
        gradients = [gradient * share, torch.full_like(output.quantizer_loss, share)]
        torch.autograd.backward([output.x_hat, output.quantizer_loss], gradients)
        if adversarial:
            terms.update(self.discriminate(x, x_hat.detach(), share))
        return {"loss": loss + output.quantizer_loss, **terms, "quantizer": output.quantizer_loss}, output.indices

    def reconstruction_loss(self, x_hat, x):
        """First term of Eq. 2, and LPIPS beside it → (total, {name: value})."""
        terms = {"pixel": F.mse_loss(x_hat, x) if self.config.pixel_loss == "l2" else F.l1_loss(x_hat, x)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x_hat, x).mean()
        return terms["pixel"] + self.config.perceptual_weight * terms.get("perceptual", 0.0), terms

    def add_adversary(self, attached, x_hat, gradient):
        """Add −D(x̂), adaptively weighted, to the gradient at the reconstruction → ((B, 3, R, R), {name: value})."""
        generator_loss = -self.discriminator(x_hat).float().mean()
        (gan_gradient,) = torch.autograd.grad(generator_loss, x_hat)  # (B, 3, R, R)
        weight = adaptive_weight(attached, self.model.decoder.to_image.weight, gradient, gan_gradient)
        weight = weight * self.config.gan_weight
        terms = {"generator": generator_loss, "adaptive_weight": weight}
        return gradient + weight.to(gradient.dtype) * gan_gradient, terms

    def discriminate(self, x, x_hat, share):
        """The discriminator's turn on the same images → {name: value}."""
        with autocast(self):
            real, fake = self.discriminator(x).float(), self.discriminator(x_hat).float()  # (B, 1, h, w)
            loss = hinge_loss(real, fake)
        (loss * share).backward()
        return {"discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}

    def usage(self):
        """[codes chosen in the latest epoch, of how many] for each codebook."""
        since = max(0, self.step - self.steps_per_epoch)
        return [[int((used >= since).sum()), len(used)] for used in self.last_used]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # evaluation would compile graphs of its own
    def validate(self, loader, shown=16):
        """Mean PSNR over a loader, and some of its images → score, {name: float}, rows for `draw_grid`."""
        self.model.eval().codebook.freeze()
        scores, originals, reconstructions, wanted = [], [], [], spread_indices(len(loader.dataset), shown)
        for batch in loader:
            x = to_images(batch["image"], self.device)
            x_hat = self.model(x).x_hat
            rows = [row for row in range(len(x)) if len(scores) + row in wanted]
            originals += x[rows]
            reconstructions += x_hat[rows]
            scores.extend(psnr(x_hat, x))
        score = torch.stack(scores).mean().item()
        return score, {"psnr": score}, [("original", originals), ("reconstruction", reconstructions)]


def psnr(x_hat, x):
    """Peak signal-to-noise ratio of each image, dB: 10 log10(4 / MSE), both clamped to [-1, 1]. (B, 3, H, W) → (B,)."""
    error = (x_hat.clamp(-1, 1) - x.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


# What the steps of both stages share


def autocast(trainer):
    """Autocast to bfloat16 where `precision` says so."""
    return torch.autocast(trainer.device.type, torch.bfloat16, enabled=precision(trainer) == "bfloat16")


def precision(trainer):
    """What networks compute in: bfloat16 where it is wanted and the GPU has it, as since Ampere; else float32."""
    wanted = trainer.config.amp and trainer.device.type == "cuda"
    return "bfloat16" if wanted and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def add_up(metrics, terms, share):
    """Add a micro-step's terms, times its share of the step, to the step's metrics."""
    for name, value in terms.items():
        metrics[name] = metrics.get(name, 0.0) + value.detach() * share


def average_gradients(network):
    """Give a network the mean of all processes' gradients, in one exchange → their norm, ()."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    if distributed():
        mean = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
    return torch.nn.utils.get_total_norm(gradients)


# ======== One loop, of both stages

def fit(trainer, batches, validate, out, journal):
    """Take a batch, step, log, validate, save. A signal ends it after its step, with a checkpoint.

    trainer: Trainer, or StageTrainer of synthesize.py; batches: iterator of micro-batches.
    validate: () → score, the higher the better, a dict of floats, and rows of reconstructions.png, if any.
    out: folder of last.pt and best.pt; journal: its metrics.jsonl, open.
    Raises UserError if a value is not finite or the folder is gone, before anything is written, and
    SystemExit of 128 + the signal's number.
    """
    config, progress = trainer.config, Progress()
    recent = deque([(trainer.step, time.monotonic())], maxlen=20)  # speed is that of the latest lines
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not config.deterministic
    seed_rank(trainer)
    with noted_signals() as signals:
        while trainer.step < config.steps:
            metrics = trainer.train_step([next(batches) for _ in range(config.accumulate)])
            last = trainer.step == config.steps
            logs = last or trainer.step % config.log_every == 0
            validates = last or trainer.step % config.eval_every == 0
            stop = max(signals, default=0)
            if distributed():  # all must stop at the same step, one at which they meet anyway
                stop = int(all_reduce(torch.tensor(stop, device=trainer.device), "max")) if logs else 0
            if logs or validates or stop:  # what is written or saved follows from these
                metrics = {name: all_reduce(value).item() for name, value in metrics.items()}
                check_finite(metrics, trainer, out)
            if logs:
                metrics["images/s"], left = pace(trainer, recent)
                progress(f"{record(metrics, trainer, journal)} left {left}", now=last)
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
                seed_rank(trainer)
            if stop and not last:
                print(f"stopped by {signal.Signals(stop).name} after step {trainer.step:,}, saved; go on with --resume")
                raise SystemExit(128 + stop)
    if distributed():
        torch.distributed.barrier()  # the first may still be saving


def check_finite(metrics, trainer, out):
    """Raise UserError for a value that is not finite. Where loss and gradients are, the weights are too."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            advice = f"'{out / 'last.pt'}' is unchanged; try a smaller --lr"
            raise UserError(f"{name} is not finite at step {trainer.step:,}; {advice}")


def record(values, trainer, journal):
    """Write floats by name, and how many codes are in use, as a line of metrics.jsonl → the line in words."""
    check_there(journal)
    usage = trainer.usage()
    line = {"step": trainer.step, **values, "codes_used": [used for used, _ in usage]}
    with user_error(f"'{journal.name}' cannot be written: {{}}"):
        journal.write(json.dumps(line) + "\n")
        journal.flush()
    words = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if "gradient" not in name]
    codes = " + ".join(f"{used:,}/{size:,}" for used, size in usage)
    return f"step {trainer.step:,}/{trainer.config.steps:,} {' '.join(words)}" + (f" codes {codes}" if codes else "")


def pace(trainer, recent):
    """Images a second since the first of the `recent` (step, time), and the time left."""
    config, (before, began), now = trainer.config, recent[0], time.monotonic()
    recent.append((trainer.step, now))
    speed = (trainer.step - before) / max(now - began, 1e-9)
    left = datetime.timedelta(seconds=int((config.steps - trainer.step) / speed))
    return round(speed * config.batch_size * config.accumulate * processes(), 2), left


@contextlib.contextmanager
def noted_signals():
    """A list to which SIGINT and SIGTERM add their number instead of ending the process; a second one ends it.

    Outside the main thread, as in a notebook's server, signals are left alone.
    """
    noted, usual = [], {}
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()

    def note(number, frame):
        noted.append(number)
        signal.signal(number, usual[number])

    usual.update({number: signal.signal(number, note) for number in numbers})
    try:
        yield noted
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def seed_rank(trainer):
    """Seed every process but the first by rank and step: the checkpoint holds the random state of the first alone."""
    if rank():
        torch.manual_seed(trainer.config.seed + 1_000_003 * rank() + trainer.step)


# ======== Data sets

class Record(NamedTuple):
    """An image on disk and what is known of it."""

    path: Path
    label: int = -1  # index into the data set's classes; −1: none
    captions: Path | list | tuple = ()  # or the text file that holds them
    segmentation: Path | tuple | None = None  # label map, or masks as (label, path) that are painted in this order


class ImageDataset(Dataset):
    """Square uint8 images with labels.

    Item (index) is the centre crop; item (index, draw), as the trainer asks for, is a random crop and flip that
    depend on (seed, draw) alone, so the order and number of workers change nothing.

    records: list of Record; classes: names of the labels.
    resolution: pixels per side; the shorter side is resized to it, antialiased.
    unlabeled: the number of a label map that stands for no label, beside the largest of its 8 or 16 bits.
    sides: label → the label that it becomes when an image is flipped, such as left eye → right eye.

    Set `with_segmentation` for items to hold their label maps, in which −1 stands for no label.
    """

    with_segmentation = False
    labels = {-1: "none"}  # names of label maps' values, where they have any

    def __init__(self, records, classes, resolution, seed=0, unlabeled=-1, sides=()):
        self.records, self.classes, self.resolution, self.seed = records, classes, resolution, seed
        self.unlabeled, self.sides = unlabeled, dict(sides)

    def __len__(self):
        return len(self.records)

    def captions_of(self, index):
        """The captions of an image."""
        captions = self.records[index].captions
        return list(read_captions(captions)) if isinstance(captions, Path) else captions

    def fingerprint(self):
        """Identity of the files but painted masks, for caching: labels, names, sizes and times of change."""
        found = [(record.label, isinstance(record.segmentation, tuple)) for record in self.records]
        paths = [path for record in self.records for path in (record.path, record.segmentation)]
        stats = [(str(path), path.stat()) for path in paths if isinstance(path, Path)]
        return found + [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def read(self, index, rng=None):
        """→ image (3, R, R) uint8 and label map (R, R) int64 or None: the centre, or a crop that `rng` draws.

        With `rng`, for training, a large JPEG may be decoded at a fraction of its size.
        """
        record, side = self.records[index], self.resolution
        image = read_image(record.path, side if rng else 0)
        width, height = (int(side * length / min(image.size)) for length in image.size)
        if rng:
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        else:
            top, left = (height - side) // 2, (width - side) // 2
        box = left / width, top / height, (left + side) / width, (top + side) / height
        labels = None
        if self.with_segmentation and record.segmentation is not None:
            labels = torch.from_numpy(read_label_map(record.segmentation, image.size, side, box)).long()
            labels[labels == self.unlabeled] = -1
        return TF.pil_to_tensor(resized_crop(image, side, box, Image.Resampling.BILINEAR)), labels

    def __getitem__(self, key):
        """→ dict: image (3, R, R) uint8, label, index, and segmentation (R, R) int64 where asked for."""
        index, draw = key if isinstance(key, tuple) else (key, None)
        rng = None if draw is None else np.random.default_rng((self.seed, draw))
        image, labels = self.read(index, rng)
        flip = rng is not None and rng.random() < 0.5
        image = image.flip(-1) if flip else image
        item = {"image": image, "label": self.records[index].label, "index": index}
        if labels is not None:
            item["segmentation"] = labels.flip(-1) if flip else labels
            for label, other in self.sides.items() if flip else ():
                item["segmentation"][labels.flip(-1) == label] = other
        return item


EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # not EPS, which runs Ghostscript
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long notes in a file do not spoil its image


@contextlib.contextmanager
def open_picture(path, kind="image"):
    """An open picture file; every picture of the user's is opened here.

    Raises UserError if it is missing, damaged or no regular file of one of FORMATS, here or in the block.
    """
    with user_error(f"{kind} '{path}' cannot be read: {{}}"):
        with Image.open(regular(path), formats=FORMATS) as file:
            yield file


def unreadable(paths):
    """The errors of those image files whose headers cannot be read."""
    errors = []
    for path in paths:
        try:
            with open_picture(path):
                pass
        except UserError as error:
            errors.append(str(error))
    return errors


def check_images(datasets, device, workers=-1):
    """Read the header of every image. Raises UserError that names all images that cannot be read."""
    paths = [record.path for dataset in datasets for record in dataset.records if record.path]
    progress, errors = Progress(), []
    for done, found in enumerate(make_loader(paths, device, workers, batch_size=256, collate_fn=unreadable)):
        errors += found
        progress(f"reading headers: {min(256 * done + 256, len(paths)):,} of {len(paths):,} images")
    if errors:
        raise UserError("; ".join(errors))


def read_image(path, side=0):
    """An RGB image as it is meant to be seen: turned as its EXIF says, 16 bits scaled to 8, transparency on
    white, of an animation the first picture.

    side: a JPEG may be decoded at a fraction of its size that keeps twice so many pixels a side; 0: whole.
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
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers; convert it to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def end_jpeg(data):
    """The image of a JPEG that lacks its end mark. Raises ValueError if pixels are missing too.

    Only then does it matter what stands between the data and the mark.
    """
    fillers = b"", bytes(range(1, 255)) * 20
    plain, other = (Image.open(io.BytesIO(data + filler + b"\xff\xd9")) for filler in fillers)
    if plain.tobytes() != other.tobytes():
        raise ValueError("it is truncated")
    return plain


def resized_crop(image, side, box, resampling):
    """A PIL image's part in a box (left, top, right, bottom, as shares of its sides), `side` pixels square.

    Up to rounding it is what resizing the whole and cropping gives, at the cost of the crop alone.
    """
    box = [share * length for share, length in zip(box, 2 * image.size)]
    return image.resize((side, side), resampling, box)


def read_label_map(segmentation, size, side, box):
    """A Record's segmentation, cropped as its image of (width, height) `size` is → (R, R) int32.

    The largest number of 8 or of 16 bits becomes −1, no label; painted masks may have any number of channels.
    """
    labels = np.zeros((side, side), np.int32)
    for label, path in segmentation if isinstance(segmentation, tuple) else ((None, segmentation),):
        with open_picture(path, "label map") as file:
            image = ImageOps.exif_transpose(file)
            (width, height), error = image.size, size[0] * image.height - size[1] * image.width
            if abs(error) > max(size) + max(image.size):  # more than rounding makes
                raise ValueError(f"its {width}×{height} pixels have other proportions than its image")
            if label is None and (len(image.getbands()) > 1 or image.mode == "F"):
                raise ValueError("it is not one channel of whole numbers")
            image = resized_crop(image, side, box, Image.Resampling.NEAREST)
        if label is None:
            labels = np.asarray(image).astype(np.int32)  # of either byte order
            labels[labels == (65535 if image.mode.startswith("I") else 255)] = -1
        else:
            labels[np.asarray(image.convert("L")) > 127] = label
    return labels


# Published layouts. Each function takes the folder and "train" or "val", and gives records and names of classes


CUB_TABLES = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
CUB_PARTS = {
    "size": "the bird is", "shape": "the bird is", "primary": "the bird is", "upperparts": "its back is",
    "underparts": "its belly is", "wing": "its wings are", "leg": "its legs are", "eye": "its eyes are",
}
CUB_WORDS = {  # values that are no adjective as they stand; an empty one makes no sentence
    "hooked_seabird": "hooked", "long-legged-like": "long-legged", "longer_than_head": "long",
    "shorter_than_head": "short",
    **dict.fromkeys("dagger needle cone malar eyebrow eyering eyeline about_the_same_as_head".split(), ""),
}


def cub_records(root, split):
    """CUB-200-2011, the published split: val are the test images.

    Captions are Reed et al.'s in text_c10/ or text/, otherwise an image's published attributes as sentences.
    """
    require(root, *CUB_TABLES, "images")
    images, splits, labels, classes = (read_table(root / name) for name in CUB_TABLES)
    texts = root / ("text_c10" if (root / "text_c10").is_dir() else "text")
    sentences, records = {} if texts.is_dir() else cub_sentences(root), []
    with user_error(f"the tables of '{root}' are inconsistent; unpack them again: {{}}"):
        for key, name in images.items():
            if ".." in name or os.path.isabs(name):
                raise ValueError(f"{name} lies elsewhere")
            if (splits[key] == "1") == (split == "train"):
                text = (texts / name).with_suffix(".txt")
                captions = text if text.exists() else sentences.get(key, ())
                records.append(Record(root / "images" / name, int(labels[key]) - 1, captions))
        return records, [classes[key] for key in sorted(classes, key=int)]


def cub_sentences(root):
    """dict image → its attributes as sentences: `has_wing_color::blue` is "its wings are blue".

    Attributes without an adjective, such as `has_bill_shape::dagger`, are left out.
    """
    places = [folder / "attributes.txt" for folder in (root, root / "attributes", root.parent)]
    labels, sentences, found = root / "attributes" / "image_attribute_labels.txt", {}, defaultdict(list)
    if not labels.is_file() or not any(map(Path.is_file, places)):
        return {}
    for number, fact in read_table(next(filter(Path.is_file, places))).items():
        group, value = re.fullmatch(r"has_(\w+)::(.*)", fact).groups()
        part = re.sub(r"^(upper|under)_|_(color|shape|pattern|length)$", "", group)
        plain = re.sub(r"_?\(.*|[_-](tail|wings|pattern)$|.*-(like|marsh)$", "", value).replace("_", " ")
        if word := CUB_WORDS.get(value, plain):
            sentences[number] = f"{CUB_PARTS.get(part, f'its {part} is')} {word}"
    for line in labels.read_text().splitlines():
        key, number, present = line.split()[:3]
        if present == "1" and number in sentences:
            found[key].append(sentences[number])
    return found


def ade20k_records(root, split):
    """ADE20K's scene parsing benchmark; label maps of 150 classes, 0 for anything else; classes are the scenes."""
    folder = {"train": "training", "val": "validation"}[split]
    require(root, f"images/{folder}", f"annotations/{folder}")
    listed, maps = root / "sceneCategories.txt", root / "annotations" / folder
    scenes = read_table(listed) if listed.is_file() else {}
    place = {scene: index for index, scene in enumerate(sorted(set(scenes.values())))}
    images = list_files(root / "images" / folder, [".jpg"])
    records = [Record(p, place.get(scenes.get(p.stem), -1), (), maps / f"{p.stem}.png") for p in images]
    return records, list(place)


# Parts of CelebAMask-HQ in the order in which its authors paint them; 0 is the background
FACE_PARTS = "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth"
FACE_SIDES = [(4, 5), (5, 4), (6, 7), (7, 6), (8, 9), (9, 8)]  # l_ and r_ are the person's own left and right


def celebahq_records(root, split):
    """CelebA-HQ as CelebAMask-HQ lays it out, split as CelebA is by the original's number: 24,183 / 2,993."""
    require(root, "CelebA-HQ-img", "CelebA-HQ-to-CelebA-mapping.txt")
    masks = defaultdict(dict)
    for path in (root / "CelebAMask-HQ-mask-anno").glob("*/[0-9]*_*.png"):
        number, _, part = path.stem.partition("_")
        masks[int(number)][part] = path
    first, end = {"train": (0, 162_771), "val": (162_771, 182_638)}[split]
    records = []
    for number, line in read_table(root / "CelebA-HQ-to-CelebA-mapping.txt").items():
        if number.isdigit() and first <= int(line.split()[0]) < end:  # its first line is a header
            mine = masks.get(int(number), {})
            painted = tuple((label, mine[part]) for label, part in enumerate(FACE_PARTS.split(), 1) if part in mine)
            records.append(Record(root / "CelebA-HQ-img" / f"{number}.jpg", segmentation=painted if masks else None))
    return records, []


def coco_records(root, split):
    """MS-COCO 2017 (or 2014): captions of annotations/, label maps of stuffthingmaps/ if there."""
    year = 2014 if (root / "train2014").is_dir() and not (root / "train2017").is_dir() else 2017
    require(root, f"train{year}", f"val{year}")
    listed, maps = root / "annotations" / f"captions_{split}{year}.json", root / "stuffthingmaps" / f"{split}{year}"
    captions = defaultdict(list)
    if listed.is_file():
        with user_error(f"'{listed}' is not COCO's captions file: {{}}"):
            content = json.loads(listed.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for annotation in content["annotations"]:
                captions[names[annotation["image_id"]]].append(" ".join(annotation["caption"].split()))
    paths = list(list_files(root / f"{split}{year}", [".jpg"]))
    labels = [maps / f"{path.stem}.png" if maps.is_dir() else None for path in paths]
    return [Record(path, -1, captions[path.name], label_map) for path, label_map in zip(paths, labels)], []


class Layout(NamedTuple):
    """A published data set."""

    records: Callable  # (root, split) → records, names of classes
    folder: str  # its usual name
    captions: str  # where its own captions are, if it has any
    unlabeled: int = -1  # as of ImageDataset
    sides: tuple = ()  # as of ImageDataset


DATASETS = {  # --dataset: the one place where a new one is added
    "cub": Layout(cub_records, "CUB_200_2011", "text/, text_c10/ or attributes/"),
    "ade20k": Layout(ade20k_records, "ADEChallengeData2016", "", 0),
    "celebahq": Layout(celebahq_records, "CelebAMask-HQ", "", sides=FACE_SIDES),
    "coco": Layout(coco_records, "coco", "annotations/"),
}


COCO = "http://images.cocodataset.org"
COCO_CAPTIONS = ("annotations/captions_train2017.json", "annotations/captions_val2017.json")
ARCHIVES = {  # name, size, URL, md5 ("": by hand), what is there once it is unpacked, where it is unpacked
    "cub": [("CUB-200-2011", "1.1 GB", "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
             "97eceeb196236b17998738112f37df78", "images.txt", "..")],
    "ade20k": [("ADE20K", "923 MB", "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "7328b3957e407ddae1d3cbf487f149ef", "images", "..")],
    "celebahq": [("CelebAMask-HQ, by hand", "2.7 GB", "https://github.com/switchablenorms/CelebAMask-HQ",
                  "", "CelebA-HQ-img", "..")],
    "coco": [("COCO's training images", "18 GB", f"{COCO}/zips/train2017.zip",
              "cced6f7f71b7629ddf16f17bbcfab6b2", "train2017", "."),
             ("COCO's validation images", "778 MB", f"{COCO}/zips/val2017.zip",
              "442b8da7639aecaf257c1dceb8ba8c80", "val2017", ".")],
    "captions": [("COCO's captions", "241 MB", f"{COCO}/annotations/annotations_trainval2017.zip",
                  "f4bbac642086de4f52a3fdda2de5fa2c", COCO_CAPTIONS[0], ".")],
}


@dataclass
class Archive(Need):
    """A published archive, which is unpacked and then deleted."""

    md5: str
    path: Path  # what is there once it is unpacked
    folder: Path  # where it is unpacked

    def __post_init__(self):
        self.file = self.folder / f"download-{self.source.rpartition('/')[2]}"
        self.fetch = self.download_and_unpack if self.md5 else None

    def present(self):
        return self.path.exists() and not self.file.exists()

    def download_and_unpack(self):
        if not self.file.is_file():
            download(self.source, self.file, self.md5)
        print(f"unpacking {self.file}", file=sys.stderr, flush=True)
        with user_error(f"'{self.file}' cannot be unpacked: {{}}; delete it and run the command again"):
            within = {} if self.file.suffix == ".zip" else {"filter": "data"}  # nothing leaves the folder
            shutil.unpack_archive(self.file, self.folder, **within)
        self.file.unlink()


def archives(name, root):
    """The Archives of a data set, or of COCO's captions, whose folder is `root` → list."""
    if name == "coco" and (root / "train2014").is_dir():  # an older year, which people have
        return []
    folder = DATASETS["coco" if name == "captions" else name].folder
    if root.name != folder and ARCHIVES[name][0][-1] == ".." and not root.exists():
        raise UserError(f"no folder '{root}'; a download makes one named {folder}: give --data {root.parent / folder}")
    local = f"{root}/annotations" if name == "captions" else "--data DIR"
    return [Archive(*texts, local, md5, root / there, Path(os.path.normpath(root / into)))
            for *texts, md5, there, into in ARCHIVES[name]]


def captions_folder(config):
    """The folder of MS-COCO 2017's annotations/, whose 617 thousand captions every real data set's prior takes."""
    return Path(config.data if config.dataset == "coco" else "data/coco")


def needs(config, with_prior):
    """What a run needs that this repository does not hold, the photographs last → list of Need."""
    listed = []
    if with_prior and needs_prior(config) and not config.prior and config.dataset != "demo":
        listed += [] if prior_path(config).is_file() else language_needs("clip")
        listed += archives("captions", captions_folder(config))
    if config.perceptual_weight > 0:
        local = config.trunk_weights, config.lpips_weights
        listed += [file for file, path in zip(lpips_files(config.perceptual_trunk), local) if not path]
    return listed + (archives(config.dataset, Path(config.data)) if config.dataset in DATASETS else [])


def require(root, *names):
    """Raise UserError for the first of the names that a data set's folder lacks."""
    for missing in (name for name in names if not (root / name).exists()):
        raise UserError(f"no {missing} in '{root}': point --data at the published folder")


def read_table(path):
    """A text file's lines as a dict, first word → the rest."""
    with user_error(f"'{path}' cannot be read: {{}}"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return {key: rest.strip() for key, rest in (line.split(maxsplit=1) for line in lines if line.strip())}


SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "test", "testing")}


def split_folders(root, maps):
    """A tree's folders with the usual names of splits, in any case → {"train": Path, "val": Path} or {}.

    Raises UserError for train/ beside other folders (except label maps) without a usual name.
    """
    shown = sorted(path for path in root.iterdir() if not is_hidden(path.name) and path.is_dir())
    folders = {path.name.lower(): path for path in shown if path.resolve() != maps}
    splits = {}
    for split, names in SPLITS.items():
        splits.update({split: folders[name] for name in reversed(names) if name in folders})
    if "train" in splits and "val" not in splits and len(folders) > 1:
        others = ", ".join(f"'{path.name}'" for path in folders.values())
        raise UserError(f"'{root}' holds {others}: which one evaluates? Name it val, or name train otherwise")
    return splits if len(splits) == 2 else {}


def folder_records(root, labels="", whole=False):
    """Any tree of images. Folders named as SPLITS are the splits; otherwise every tenth image is held out.

    root: the tree; sub-folders of a split are classes, `x.txt` beside `x.jpg` holds its captions.
    labels: tree of label maps with the same relative names; whole: hold none out, as these did not train.
    Returns records of "train" and of "val" (the same list if none is held out), class names.
    Raises UserError for a folder that is not there.
    """
    for name, folder in (("data", root), ("labels", labels)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"--{name}: no such folder: '{folder}'")
    maps = Path(labels).resolve() if labels else None
    outside = functools.cache(lambda folder: maps is None or maps not in (folder.resolve() / "x").parents)
    splits, found = split_folders(root, maps), {}
    for base in (splits or {"": root}).values():
        files = [path for path in list_files(base, (*EXTENSIONS, ".txt")) if outside(path.parent)]
        texts, found[base] = {path for path in files if path.suffix == ".txt"}, []
        for path in files:
            if path.suffix.lower() in EXTENSIONS:
                text, label = path.with_suffix(".txt"), str(path.parent.relative_to(base))
                label_map = (maps / path.relative_to(root)).with_suffix(".png") if maps else None
                found[base].append(Record(path, label, text if text in texts else (), label_map))
    classes = sorted({record.label for records in found.values() for record in records} - {"."})
    numbers = {".": -1, **{label: number for number, label in enumerate(classes)}}
    numbered = lambda records: [record._replace(label=numbers[record.label]) for record in records]
    train, *val = map(numbered, found.values())
    if not val and not whole:
        val, train = [train[9::10]], [record for i, record in enumerate(train) if i % 10 != 9]
    return train, val[0] if val else train, classes


def make_datasets(config, whole=False):
    """The "train" and "val" splits that a Config names, as ImageDatasets; whole: of `folder_records`."""
    root, layout = Path(config.data), DATASETS.get(config.dataset)
    if config.dataset == "demo":
        return [DemoDataset(split, config.resolution, config.seed) for split in SPLITS]
    if config.dataset == "folder" and not config.data:
        raise UserError("--dataset folder needs --data DIR, the folder of images")
    if layout:
        (train, classes), (val, _) = (layout.records(root, split) for split in SPLITS)
    else:
        train, val, classes = folder_records(root, config.labels, whole)
    if not train or not val:
        split = "val" if train else "train"
        raise UserError(f"no images for the {split} split in '{root}' (which needs ten, or train/ and val/)")
    more = (layout.unlabeled, layout.sides) if layout else ()
    return [ImageDataset(records, classes, config.resolution, config.seed, *more) for records in (train, val)]


def make_prior(config, dataset):
    """The prior that a Config names, by default the paper's → Prior, or None where no word is needed."""
    if not needs_prior(config):
        return None
    if config.prior:
        prior, name = Prior.load(config.prior), config.prior
    elif config.dataset == "demo":
        captions = [caption for index in range(len(dataset)) for caption in dataset.captions_of(index)]
        prior = build_prior(captions, DEMO_SPEECH, "corpus", min_count=1, workers=1, name="demo captions")
        name = "the demo's captions"
    else:
        prior, name = default_prior(config, dataset), prior_path(config)
    text, _, warning = describe_codebook(prior).partition("\n")
    print(f"codebook of {name}: {text}" + (f"\n{warning}" if warning and config.dataset != "demo" else ""), flush=True)
    return shuffled(prior, config.shuffle, config.seed)


def prior_path(config):
    """Where the default prior of a data set is kept: data/cub-clip.npz."""
    name = Path(config.data).resolve().name if config.dataset == "folder" else config.dataset
    return Path(f"data/{name}-clip.npz")


def default_prior(config, dataset):
    """The paper's prior: CLIP's vectors of the words of MS-COCO 2017's captions and of a data set's own.

    It is kept with a checksum of its captions, and made anew when they are others.
    """
    path, folder, own = prior_path(config), captions_folder(config), []
    if config.dataset != "coco":
        own = [caption for index in range(len(dataset)) for caption in dataset.captions_of(index)]
    captions = [*read_corpora(folder / name for name in COCO_CAPTIONS), *own]
    if path.is_file():
        prior = Prior.load(path)
        if prior.provenance.get("captions_sha256") == text_checksum(captions):
            return prior
        print(f"'{path}' is of other captions; it is made anew")
    else:
        where = DATASETS[config.dataset].captions if config.dataset in DATASETS else "x.txt beside x.jpg"
        print(f"making '{path}' once: {len(captions):,} captions, {len(own):,} of them of {config.dataset}"
              + (f" itself (in {where})" if where else ""), flush=True)
    provide(language_needs("clip"), config.download, "add --download")
    name = f"MS-COCO 2017 and {config.dataset}"
    prior = build_prior(captions, workers=max(1, CORES // processes()), name=name)
    prior.save(path)
    return prior


def hold_out(length, count):
    """Indices of training images: those that train; and those that choose best.pt, evenly spread: `count`, but at
    most a twentieth."""
    chosen = spread_indices(length, min(count, math.ceil(length / 20)))
    return sorted(set(range(length)).difference(chosen)) or [0], chosen


def train_batches(kept, batch_size, start, steps, seed):
    """Yield a list of (index, draw) keys for each micro-step `start` … `steps`: the kept images, shuffled each epoch.

    Each of n processes takes its n-th of a batch of n · `batch_size` images.
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


def spread_indices(length, count):
    """At most `count` indices spread over 0 … length − 1, as data sets are sorted by class."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int)).tolist()


def to_images(batch, device):
    """(B, 3, R, R) uint8 → float32 in [-1, 1] on the device."""
    return batch.to(device, non_blocking=True).float().div_(127.5).sub_(1)


def make_loader(dataset, device, workers=-1, **options):
    """A DataLoader of dicts of tensors, in pinned memory for CUDA."""
    fair = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = workers if workers >= 0 else 0 if device.type == "cpu" else min(8, fair)
    options.update(generator=torch.Generator(), worker_init_fn=worker_init)  # its own: a resumed run draws no more
    options.update(pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    return DataLoader(dataset, num_workers=workers, **options)


def worker_init(worker):
    """Leave the group that Ctrl-C reaches, as the main process needs its workers to finish its step. Nothing is
    printed here, as errors are sent to that process."""
    sys.stderr = open(os.devnull, "w")
    if hasattr(os, "setpgrp"):
        os.setpgrp()


# ======== Runs: their folders, checkpoints, and reading them again

VERSION = 4  # of checkpoints
SOURCES = (Path(__file__).with_name(name).read_bytes() for name in ("vqct.py", "train.py"))
CODE = hashlib.sha256(b"".join(SOURCES)).hexdigest()  # of what trains, kept in checkpoints
RUN_FILES = """config.json metrics.jsonl last.pt best.pt prior.npz reconstructions.png evaluation.json
    tokens-train.npz tokens-val.npz features-train.npy features-val.npy fig1_space.png fig3_toy.png fig5_usage.png fig6_similarity.png
    fig7_regions.png curves.png samples.png completions.png photographs.png""".split()


def identity(dataset, root):
    """sha256 of a data set's labels, and its images' names below `root` and sizes: a move keeps it."""
    images = ((record.label, record.path) for record in dataset.records)
    listed = [(label, path and [os.path.relpath(path, root), path.stat().st_size]) for label, path in images]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def check_folder(out, overwrite):
    """Raise UserError for a run that may not be overwritten, or a folder that holds what no run of train.py writes."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    ours = (*RUN_FILES, "lock", "synthesis", "decoded", "other")  # the last four are other scripts', and kept
    foreign = [name for name in names if name.removesuffix(".part") not in ours]
    if "last.pt" in names and not overwrite:
        raise UserError(f"run '{out}' exists; go on with --resume, replace it with --overwrite, or name another --out")
    if foreign or out.exists() and not out.is_dir():
        raise UserError(f"'{out}' holds {', '.join(foreign[:3]) or 'no folder'}; move that away, or name another --out")


def lock(file, waiting=""):
    """Lock a file until it is closed. If another process has it: print `waiting` and wait, or UserError."""
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
    """Lock a run's folder and empty it, for config.json and a first checkpoint; or trim it to the checkpoint `resumed`.

    Returns metrics.jsonl, open to append, and locked as long as it is; nothing in other processes of torchrun.
    Raises UserError where another process works in it, or as check_folder, which is to be called before.
    """
    if rank():
        return open(os.devnull, "w")
    out.mkdir(parents=True, exist_ok=True)
    journal = open(out / "metrics.jsonl", "a+", encoding="utf-8", errors="surrogateescape", newline="\n")
    lock(journal)
    if resumed is None:
        check_folder(out, overwrite)  # a run may have ended in it meanwhile
        journal.truncate(0)
        for name in set(RUN_FILES) - {"metrics.jsonl"}:
            (out / name).unlink(missing_ok=True)
            (out / f"{name}.part").unlink(missing_ok=True)
    else:
        cut_journal(journal, resumed["step"])
    with atomic_write(out / "config.json") as part:
        part.write_text(json.dumps({**asdict(trainer.config), "torch": torch.__version__}, indent=1))
    if resumed is None:
        save_checkpoint(out / "last.pt", trainer)
    return journal


def cut_journal(journal, step):
    """Cut the lines of metrics.jsonl that are later than a step; a whole one that cannot be read stays."""
    journal.seek(0)
    lines, steps = journal.readlines(), []
    for line in lines:
        found = re.search(r'"step": (\d+),', line)
        steps.append(int(found[1]) if found else 0 if line.endswith("\n") else math.inf)
    first = next((i for i, found in enumerate(steps) if found > step), len(lines))
    journal.truncate(len("".join(lines[:first]).encode("utf-8", "surrogateescape")))
    journal.writelines(line for line, found in zip(lines[first:], steps[first:]) if found <= step)
    if cut := sum(found > step for found in steps):
        print(f"{journal.name}: {cut:,} lines later than step {step:,} are cut")


def read_journal(path):
    """The lines of a metrics.jsonl that can be read → list of dicts."""
    lines = []
    for text in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # damaged, or cut by a kill
            lines.append(json.loads(text))
    return lines


def check_there(journal):
    """Raise UserError if an open file is no longer where it was opened: its folder was deleted or moved."""
    with user_error(f"'{journal.name}' is no longer there: its folder was deleted or moved; training ends"):
        if not os.path.samestat(os.stat(journal.name), os.fstat(journal.fileno())):
            raise FileNotFoundError


def save_checkpoint(path, trainer):
    """A trainer's networks, optimizers, notes, step, configuration and random state, as tensors, numbers, strings."""
    state = {"version": VERSION, "config": asdict(trainer.config), "step": trainer.step, "best": trainer.best}
    state.update(code=CODE, processes=processes(), random=torch.get_rng_state(), **trainer.notes())
    if trainer.device.type == "cuda":
        state["cuda_random"] = torch.cuda.get_rng_state(trainer.device)
    for name, part in trainer.parts().items():
        state[name] = part.state_dict()
    archive = io.BytesIO()
    torch.save(state, archive)
    with atomic_write(path, folder=False) as part:  # of a run, which may have been deleted or moved meanwhile
        part.write_bytes(archive.getbuffer())


def load_checkpoint(path):
    """A dict of `save_checkpoint`. Raises UserError for a file that is missing, damaged or something else."""
    return read_checkpoint(path)[0]


def read_checkpoint(path):
    """A checkpoint, and the sha256 of its file, which is read once, as a running training may replace it."""
    with user_error(f"'{path}' is no checkpoint of this program, or damaged: {{}}"):
        data = Path(regular(path)).read_bytes()
        if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():  # torch writes checksums and reads none
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = load_tensors(io.BytesIO(data))
        if state["version"] != VERSION:
            raise ValueError(f"it is of version {state['version']}, this code reads {VERSION}")
        return state, hashlib.sha256(data).hexdigest()


def restore(trainer, state, out):
    """Give a trainer of either stage the state of a checkpoint, random state and all.

    Raises UserError for a checkpoint of other images, or one that does not fit.
    """
    if state["data"] != trainer.data:
        raise UserError(f"'{out}' was trained on other images than these; point --data at a copy of its own")
    with fitting(out / "last.pt"):
        trainer.step, trainer.best = state["step"], state["best"]
        for name, part in trainer.parts().items():
            part.load_state_dict(state[name])
            for parameter, moments in getattr(part, "state", {}).items():  # an optimizer's, which a fused step trusts
                if any(x.dim() and x.shape != parameter.shape for x in moments.values()):
                    raise ValueError(f"{name} has other shapes than the weights")
        for name in state.keys() & {"last_used", "start"}:
            setattr(trainer, name, [part.to(trainer.device) for part in state[name]])
        torch.set_rng_state(state["random"])
        if "cuda_random" in state and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], trainer.device)
    old, new = state["config"]["steps"], trainer.config.steps
    print(f"resumed at step {trainer.step:,}", end="\n" if new == old else "; ")
    if new != old:
        print(f"a cosine's rate and a temperature now follow {new:,} steps instead of {old:,}")


def fitting(path):
    """A block in which errors of loading become a UserError."""
    return user_error(f"'{path}' does not match its configuration: {{}}")


def resumed_choices(kind, given, changeable, out):
    """The checkpoint of a run, and the fields of its configuration, a `kind`, with the flags of a --resume.

    Raises UserError for flags or processes that would make it another run, for a checkpoint that config.json
    does not describe, or if nothing is left to do.
    """
    state, noted = load_checkpoint(out / "last.pt"), {}
    with fitting(out / "last.pt"):
        stored = asdict(kind(**state["config"]))
    if (out / "config.json").exists():
        with user_error(f"'{out / 'config.json'}' cannot be read: {{}}; last.pt goes on without that file"):
            noted = json.loads((out / "config.json").read_text())
    for name in (name for name in stored if name not in changeable):
        flag = f"--{name.replace('_', '-')}"
        if given.get(name, stored[name]) != stored[name]:
            raise UserError(f"--resume cannot change {flag} from {stored[name]!r}; start another run")
        if name in noted and noted[name] != json.loads(json.dumps(stored[name])):
            is_not = f"{flag} {stored[name]} instead of {noted[name]}"
            raise UserError(f"'{out}' holds last.pt of another run, with {is_not}")
    if state["processes"] != processes():
        raise UserError(f"'{out}' was trained by {state['processes']} processes; resume with as many")
    choices = {**stored, **given}
    if state["step"] >= choices["steps"]:
        raise UserError(f"'{out}' is at step {state['step']:,} already; give a larger --steps")
    return state, choices


class Run:
    """A trained first stage: `model` in evaluation mode, `config`, `prior`, `step`, codes at `start`, their `words`.

    path: a run folder.
    device: as --device; data, labels: where the data set lies now; checkpoint: "last" or "best".
    Raises UserError if there is no such checkpoint, or it is damaged.
    """

    def __init__(self, path, device="auto", data="", labels="", checkpoint="last"):
        self.path, self.device, file = Path(path), pick_device(device), Path(path) / f"{checkpoint}.pt"
        state, self.tokenizer = read_checkpoint(file)
        with fitting(file):
            self.config, self.prior, self.step = Config(**state["config"]), state["prior"], state["step"]
            self.start, self.data, self.code = state["start"], state["data"], state["code"]
            self.model = VQModel(self.config, self.prior)
            self.model.load_state_dict(state["model"])
        self.model.to(self.device).eval().requires_grad_(False).codebook.freeze()
        if data and self.config.dataset == "demo" or labels and self.config.dataset != "folder":
            kind = f"a run of {self.config.dataset} (synthesize.py RUN tokens PHOTO reads any photograph)"
            raise UserError(f"--data or --labels changes nothing for '{path}', {kind}")
        self.results = self.path  # where results go; those on another data set have a folder of their own
        if data and Path(data).resolve().name != Path(self.config.data).resolve().name:
            self.results, self.config.labels = self.path / "other" / Path(data).resolve().name, ""
        stored = self.config.labels if os.path.isdir(self.config.labels) else ""  # few need label maps
        self.config.data, self.config.labels = data or self.config.data, labels or stored
        self.datasets = None  # when they are asked for
        sizes = self.model.codebook.sizes
        self.names = ("adjective", "noun") if len(sizes) == 2 else ("code",)
        tokens = self.model.per_token(self.names)
        self.token_names = [n if tokens.count(n) == 1 else f"{n}{i + 1}" for i, n in enumerate(tokens)]
        self.words = [[str(index) for index in range(size)] for size in sizes]  # of codes without a prior
        if self.prior is not None:
            adjectives, nouns = self.prior["adjective_words"], self.prior["noun_words"]
            self.words = [adjectives, nouns] if len(sizes) == 2 else [adjectives + nouns]

    def dataset(self, split):
        """The "train" or "val" images that the run was made with, or of another data set."""
        self.datasets = self.datasets or make_datasets(self.config, whole=self.results != self.path)
        return copy.copy(self.datasets[split == "val"])

    def read(self, path):
        """A photograph, its centre cropped to the run's resolution → (1, 3, R, R) in [-1, 1]."""
        return to_images(ImageDataset([Record(Path(path))], [], self.config.resolution)[0]["image"][None], self.device)

    def spell(self, indices):
        """(M, h, w) indices of an image → h lines of w cells, each the words of its codes: "red breast"."""
        lists, rows = self.model.per_token(self.words), indices.permute(1, 2, 0).tolist()
        cells = [[" ".join(words[code] for words, code in zip(lists, codes)) for codes in row] for row in rows]
        width = max(len(cell) for row in cells for cell in row)
        return "\n".join("  ".join(cell.ljust(width) for cell in row).rstrip() for row in cells)

    def batches(self, dataset, keys=None, doing="reading"):
        """Yield (x, batch): images (B, 3, R, R) in [-1, 1] on the device, and the loader's dict; keys: which images."""
        progress, done = Progress(), 0
        loader = make_loader(dataset, self.device, sampler=keys, batch_size=self.config.batch_size)
        for batch in loader:
            yield to_images(batch["image"], self.device), batch
            done += len(batch["image"])
            progress(f"{doing}: {done:,} of {len(loader.sampler):,} images")


def to_bytes(x):
    """[-1, 1] → uint8, rounded."""
    return x.float().clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8)


def draw_grid(rows, path, size=128, columns=8, legend=()):
    """Rows of pictures, each with a label at its left → PNG; rows longer than `columns` go on below.

    rows: list of (label, images (3, H, W) in [-1, 1]), and maybe the images' names; size: pixels a side at the least.
    legend: rows that stand below all others.
    """
    size, parts = max(size, rows[0][1][0].shape[-1]), []
    length = max(len(images) for _, images, *_ in (*rows, *legend))
    for group, i in itertools.product((rows, legend), range(0, length, columns)):
        parts += [(label, *(x[i : i + columns] for x in row)) for label, *row in group if i < len(row[0])]
    grid = Image.new("RGB", (150 + min(length, columns) * (size + 4), len(parts) * (size + 4)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(14)
    for row, (label, images, *names) in enumerate(parts):
        lines = [part for line in label.split("\n") for part in textwrap.wrap(line, 18)]
        draw.multiline_text((8, (row + 0.5) * (size + 4)), "\n".join(lines), "black", font, anchor="lm")
        for column, x in enumerate(images):
            picture = TF.to_pil_image(to_bytes(x).cpu()).resize((size, size), Image.Resampling.NEAREST)
            corner = 150 + column * (size + 4), row * (size + 4)
            grid.paste(picture, corner)
            for name in (part[column] for part in names):
                draw.text((corner[0] + 4, corner[1]), name, "black", font, stroke_width=2, stroke_fill="white")
    save_png(grid, path)


# ======== Devices, processes, published weights

def rank():
    """This process's number among those that torchrun started; 0 where there is one."""
    return torch.distributed.get_rank() if distributed() else 0


def processes():
    """How many processes torchrun started, on all machines together."""
    return torch.distributed.get_world_size() if distributed() else 1


def launch(main):
    """Run a script's `main` in every process that torchrun started, of which only the first one prints."""

    def joined():
        if {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            on_cuda = torch.cuda.is_available()
            if on_cuda:
                with user_error("torchrun started more processes than there are GPUs: {}"):
                    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            long = datetime.timedelta(days=1)  # the first process may download or encode while the others wait
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=long)
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
    """A block that the first process runs before the others, which then find the files that it made."""
    if distributed() and rank():
        torch.distributed.barrier()
    yield
    if distributed() and not rank():
        torch.distributed.barrier()


def pick_device(name):
    """torch.device for a --device flag. Raises UserError where this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and distributed():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with user_error(f"--device {name}: {{}}; give cpu, cuda, cuda:1 or mps"):
        return torch.zeros(1, device=name).device


HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/{}.pth"
LPIPS_FILES = {  # trunk → its URL and size, and sha256 of its heads
    "vgg": (torchvision.models.VGG16_Weights.IMAGENET1K_V1.url, "528 MB",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "squeeze": (torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url, "5 MB",
                "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"),
}


def lpips_files(trunk):
    """LPIPS's trunk and heads → list of two PublishedFile."""
    url, size, heads_sha256 = LPIPS_FILES[trunk]
    name = url.rpartition("/")[2]  # torchvision's names end in the first digits of the sha256
    return [PublishedFile(f"LPIPS's trunk {name}", size, url, "--trunk-weights FILE", name, name[-12:-4]),
            PublishedFile("LPIPS's heads", "7 kB", HEADS_URL.format(trunk), "--lpips-weights FILE",
                          f"lpips_{trunk}_v0.1.pth", heads_sha256)]


def load_lpips(trunk, trunk_weights="", lpips_weights=""):
    """LPIPS with published weights, local or in the cache. Raises UserError naming file and flag."""
    cached = lpips_files(trunk)
    paths = [local or file.get() for local, file in zip((trunk_weights, lpips_weights), cached)]
    with user_error(f"these are not LPIPS's {trunk} trunk and heads: {paths[0]}, {paths[1]}: {{}}"):
        return LPIPS(trunk, *map(read_tensors, paths))


def take_published_weights(trainer, path):
    """Give a Trainer's networks the weights of a taming-transformers checkpoint.

    A prefix that all names share, such as "module.", is left out. Raises UserError if they don't fit.
    """
    state = read_tensors(path)
    prefix = re.match(r"(.*\.)?", os.path.commonprefix(list(state)))[0]
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    without = f", names without '{prefix}'" if prefix else ""
    advice = f"(published: --preset f16{without})"
    with user_error(f"--init {path} is no VQGAN of taming-transformers that fits: {{}} {advice}"):
        left = {name.partition(".")[0] for name in load_taming(trainer.model, trainer.discriminator, state)}
    trainer.start = [codes.detach().clone() for codes in trainer.model.codebook()]
    print(f"init: {path}{without}" + (f"; not taken from it: {', '.join(sorted(left))}" if left else ""))


# ======== Command line

CHANGEABLE = """out steps lr device data download labels trunk_weights lpips_weights workers log_every eval_every
    amp compile deterministic""".split()


def parse(argv=None):
    """Command line → (Config, checkpoint that --resume goes on from or None, whether to overwrite)."""
    parser = Parser(description=__doc__)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    start.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    parser.add_fields(Config)
    given = vars(parser.parse_args(argv))
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    config = resolve({name: x for name, x in given.items() if not resume or name == "out" or name not in CHANGEABLE})
    if not resume:
        return config, None, overwrite
    if not (Path(config.out) / "last.pt").is_file():
        raise UserError(f"no run '{config.out}' to resume: it has no last.pt; --out names a run")
    given["out"] = config.out
    state, stored = resumed_choices(Config, given, CHANGEABLE, Path(config.out))
    return resolve(given, stored), state, False


def main(argv=None):
    """A run from its flags to its last step."""
    config, state, overwrite = parse(argv)
    again = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv), "--download"])
    out, device = Path(config.out), pick_device(config.device)
    if state is None and not rank():
        check_folder(out, overwrite)  # before the data are scanned
    with first_process_first():
        provide(needs(config, with_prior=state is None), config.download, again)
        train_set, val_set = make_datasets(config)  # the latter is for evaluate.py
        if not rank():
            check_images((train_set, val_set), device, config.workers)
        prior = None if state else make_prior(config, train_set)  # §3.3 steps 1 and 2: words, vectors, graph
    kept, chosen = hold_out(len(train_set), config.eval_images)
    tensors = state["prior"] if state else prior and prior.tensors()
    data = identity(train_set, config.data)
    trainer = Trainer(config, tensors, device, len(kept), data)  # step 3: the networks
    if state:
        restore(trainer, state, out)
    elif config.init:
        take_published_weights(trainer, config.init)
    first, last = trainer.step * config.accumulate, config.steps * config.accumulate
    order = train_batches(kept, config.batch_size, first, last, config.seed)
    loader = make_loader(train_set, device, config.workers, batch_sampler=order)
    validation = make_loader(Subset(train_set, chosen), device, 0, batch_size=config.batch_size)
    with open_run(out, trainer, overwrite, state) as journal:  # nothing was touched before all this succeeded
        if prior is not None and not rank():
            prior.save(out / "prior.npz")
        codes = " + ".join(f"{len(used):,}" for used in trainer.last_used)
        sizes = f"{len(kept):,} images train, {len(chosen):,} choose best.pt, {len(val_set):,} evaluate"
        print(f"{config.dataset}: {sizes}; run {out}")
        where = f"on {device} in {precision(trainer)}"
        print(f"{config.method} ({config.preset}) {where}: {trainer.model.grid} positions of {codes} codes")
        never = ", that is never" if config.gan_start >= config.steps else ""
        adversary = f"adversary × {config.gan_weight} from step {config.gan_start:,}{never}"
        print(f"losses: {config.pixel_loss}, LPIPS × {config.perceptual_weight}, {adversary}", flush=True)
        images = (to_images(batch["image"], device) for batch in loader)
        fit(trainer, images, lambda: trainer.validate(validation), out, journal)
    look = f"look at {out / 'reconstructions.png'}; " if config.steps else ""
    print(f"done: {look}measure with: python evaluate.py {shlex.quote(str(out))}")


# ======== Appendix, the demo: birds in scenes, drawn and described by code, in flat colours

COLOURS = {  # RGB
    "red": "#cc2420", "crimson": "#96142a", "orange": "#ee7c1c", "golden": "#e0ac30", "yellow": "#f4d832",
    "green": "#3f8c3a", "olive": "#737834", "teal": "#148088", "blue": "#2c62c0", "pink": "#ea8e96",
    "chestnut": "#804024", "brown": "#6e5034", "beige": "#c8b690", "white": "#f4f4ee", "pale": "#dcd8c4",
    "gray": "#8c9298", "dark": "#36363e", "black": "#141418"}
PLUMAGE = "crown throat back breast belly wing bar tail beak leg".split()
SPECIES = {  # colours of the plumage; then size, plumpness, and lengths of beak, tail, legs and crest
    "robin": ("dark orange brown orange white brown dark brown yellow brown", .60, 1.1, .18, .35, .22, 0),
    "cardinal": ("red black crimson red red crimson red crimson orange brown", .62, 1.0, .15, .60, .20, .22),
    "jay": ("blue white blue pale white blue white blue black dark", .64, 1.0, .20, .50, .22, .18),
    "goldfinch": ("black yellow yellow yellow beige black white black orange pink", .52, 1.15, .14, .30, .22, 0),
    "kingfisher": ("teal white teal orange orange teal blue blue black red", .58, 1.1, .46, .18, .12, .12),
    "heron": ("dark white gray pale white gray dark gray yellow olive", .60, .75, .44, .20, .52, .16),
    "sparrow": ("chestnut gray brown beige pale chestnut white brown dark pink", .50, 1.15, .12, .34, .20, 0),
    "crow": ("black black black black dark black dark black black black", .70, .92, .28, .44, .22, 0),
    "bullfinch": ("black pink gray pink pink dark white black black brown", .54, 1.3, .10, .34, .18, 0),
    "magpie": ("black black black black white blue white teal black black", .60, .90, .20, .80, .26, 0),
    "gull": ("white white gray white white gray dark gray yellow pink", .68, .92, .26, .32, .28, 0),
    "parrot": ("red golden green green olive green yellow blue beige gray", .64, 1.0, .12, .70, .14, 0),
    "duck": ("green green brown chestnut pale gray white beige yellow orange", .68, 1.1, .26, .18, .14, 0)}
LIGHTS = {  # what the sky may be called, and its colour
    "morning": ("warm golden", "#f6dcae"), "day": ("bright sunny", "#8ec4f2"), "afternoon": ("cloudy dim", "#b4bcc4"),
    "evening": ("rosy soft", "#dc96a4"), "dawn": ("misty cold", "#d2dee4")}
PLACES = {  # what is behind, with its bumps and their height; the ground; the perch, with its half width and height
    "forest": (("tree leafy tall", "green", 5, .40), ("moss soft damp", "olive"), ("twig thin bare", "brown", .9, .05)),
    "meadow": (("hill low distant", "olive", 2, .20), ("grass tall fresh", "green"),
               ("post wooden old", "brown", .06, .5)),
    "cliff": (("mountain steep blue", "blue", 3, .45), ("gravel gray coarse", "gray"), ("rock rough big", "dark", .3, .2)),
    "lake": (("shore quiet distant", "green", 1, .10), ("water calm clear", "teal"), ("log wet brown", "brown", .5, .1)),
    "beach": (("sea open blue", "blue", 0, .16), ("sand smooth pale", "beige"), ("stone wet dark", "dark", .2, .15)),
    "field": (("ridge distant gray", "gray", 4, .20), ("snow white deep", "white"), ("stump old round", "brown", .15, .4))}
SEGMENTS = "sky behind ground perch back breast belly head wing tail beak eye leg".split()
NAMED = [row[0].split() for layers in PLACES.values() for row in layers]  # a noun and its adjectives
DEMO_SPEECH = WordListSpeech(
    {*COLOURS, *"tiny small large big long short".split(), *" ".join(words for words, _ in LIGHTS.values()).split(),
     *(word for _, *adjectives in NAMED for word in adjectives)},
    {*SPECIES, *LIGHTS, *PLACES, *(noun for noun, *_ in NAMED),
     *"bird breast belly back wing bar tail crown crest throat beak bill leg foot eye scene light".split()},
    plurals={"feet": "foot"})
CAPTIONS = (
    "a {size} {back} bird with a {breast} breast, a {bill} {beak} beak and a small dark eye",
    "this {size} {name} has a {breast} breast, a {belly} belly and {leg} legs",
    "a {size} bird whose back is {back} and whose belly is {belly}",
    "its wings are {wing} with {bar} bars and its tail is {long} and {tail}",
    "a bird with {wing} wings, a {long} {tail} tail and {leg} feet",
    "the {top} of the {name} is {crown}, its throat is {throat} and its {bill} bill is {beak}",
    "a {size} {name} perched on a {perch} in {lit} light",
    "a {behind} behind a {name} on a {lit} {light}",
    "a {lit} scene of a {place} with {ground} and a {back} {name} on a {perch}")


class Scene:
    """One bird in one place, which ("train" or "val", index) determines."""

    def __init__(self, split, index):
        self.rng = np.random.default_rng((("train", "val").index(split), index))
        self.label, self.facing = int(self.rng.integers(len(SPECIES))), int(self.rng.choice((-1, 1)))
        self.name, self.place, self.light = list(SPECIES)[self.label], *map(self.pick, (PLACES, LIGHTS))
        plumage, size, *self.build = SPECIES[self.name]
        self.colours, self.size = dict(zip(PLUMAGE, plumage.split())), size * self.rng.uniform(0.85, 1.12)
        self.x, self.y, self.shift = self.rng.uniform((0.44, 0.80, -0.1), (0.56, 0.88, 0.1))
        self.captions = self.describe()

    def pick(self, names):
        return str(self.rng.choice(list(names)))

    def describe(self):
        """Four captions in varied English, whose words are those of DEMO_SPEECH."""
        _, beak_length, tail_length, _, crest = self.build
        words = {**self.colours, "name": self.name, "place": self.place, "light": self.light,
                 "lit": self.pick(LIGHTS[self.light][0].split()),
                 "size": ("tiny", "small", "large", "big")[int(np.digitize(self.size, (0.50, 0.58, 0.66)))],
                 "bill": "long" if beak_length > 0.19 else "short", "long": "long" if tail_length > 0.45 else "short",
                 "top": "crest" if crest else "crown"}
        for part, (names, *_) in zip(("behind", "ground", "perch"), PLACES[self.place]):
            noun, *adjectives = names.split()
            words[part] = f"{self.pick(adjectives)} {noun}"
        chosen = self.rng.choice(CAPTIONS, 4, replace=False)
        return [re.sub(r"\ba (?=[aeiou])", "an ", caption.format(**words)) for caption in chosen]

    def draw(self, resolution):
        """→ image (3, R, R) and label map (1, R, R), both uint8; drawn at four times the size."""
        side = 4 * resolution
        canvases = [Image.new(mode, (side, side)) for mode in ("RGB", "L")]
        brushes = [ImageDraw.Draw(canvas) for canvas in canvases]

        def paint(segment, colour, shape, points, **angles):
            inks = COLOURS.get(colour, colour), SEGMENTS.index(segment)
            for brush, ink in zip(brushes, inks):
                getattr(brush, shape)([(side * x, side * y) for x, y in points], fill=ink, **angles)

        self.paint_place(paint)
        self.paint_bird(paint)
        image, labels = canvases[0].reduce(4), canvases[1].resize((resolution, resolution), Image.Resampling.NEAREST)
        return TF.pil_to_tensor(image), TF.pil_to_tensor(labels)

    def paint_place(self, paint):
        """The sky, what is behind, the ground and the perch."""
        (_, behind, bumps, height), (_, ground), (_, perch, half, thick) = PLACES[self.place]
        level = 0.66
        paint("sky", LIGHTS[self.light][1], "rectangle", ((0, 0), (1, 1)))
        paint("behind", behind, "rectangle", ((0, level - 0.3 * height), (1, level)))
        for bump in range(bumps):
            x, wide = self.shift + (bump + 0.5) / bumps, 0.7 / bumps
            if behind in ("green", "olive"):
                paint("behind", behind, "ellipse", ((x - wide, level - height), (x + wide, level + height)))
            else:
                paint("behind", behind, "polygon", ((x - wide, level), (x, level - height), (x + wide, level)))
        paint("ground", ground, "rectangle", ((0, level), (1, 1)))
        paint("perch", perch, "rectangle", ((self.x - half, self.y), (self.x + half, self.y + thick)))

    def paint_bird(self, paint):
        """The bird, in units of its size from the middle of its body; it faces right, or is mirrored."""
        plump, beak, tail, leg, crest = self.build
        deep, hx, hy = 0.23 * plump, 0.36, -0.26 - 0.3 * (leg > 0.5)  # half its depth; its head
        x0, y0 = self.x, self.y - self.size * (deep + 0.5 * leg)

        def part(segment, name, shape, *points, **angles):
            points = [(x0 + self.facing * self.size * x, y0 + self.size * y) for x, y in points]
            if shape != "polygon" and self.facing < 0:  # an ellipse needs its left corner first
                (right, top), (left, bottom) = points
                points = [(left, top), (right, bottom)]
            paint(segment, self.colours.get(name, name), shape, points, **angles)

        def around(x, y, wide, high):
            return (x - wide, y - high), (x + wide, y + high)

        for x in (0.0, 0.1):
            part("leg", "leg", "polygon", (x, 0), (x + 0.04, 0), (x + 0.04, deep + 0.5 * leg), (x, deep + 0.5 * leg))
        end = -0.42 - 0.7 * tail
        part("tail", "tail", "polygon", (-0.28, -0.08), (end, 0.02), (end, 0.14), (-0.28, 0.10))
        part("back", "back", "ellipse", *around(0, 0, 0.42, deep))
        part("back", "back", "polygon", (0.05, -0.15), (hx - 0.10, hy), (hx + 0.10, hy), (0.40, 0.05))
        part("belly", "belly", "chord", *around(0, 0, 0.42, deep), start=0, end=180)
        part("breast", "breast", "ellipse", *around(0.25, 0.02, 0.17, 0.85 * deep))
        part("wing", "wing", "polygon", (0.16, -0.10), (0.02, 0.10), (-0.50, 0.10), (-0.22, -0.14))
        part("wing", "bar", "polygon", (-0.10, -0.06), (-0.04, -0.06), (-0.14, 0.10), (-0.20, 0.10))
        part("head", "crown", "polygon", (hx + 0.08, hy - 0.1), (hx - 0.12 - crest, hy - 0.1 - crest), (hx - 0.14, hy))
        part("beak", "beak", "polygon", (hx + 0.1, hy - 0.05), (hx + 0.2 + beak, hy + 0.05), (hx + 0.1, hy + 0.09))
        part("head", "throat", "ellipse", *around(hx, hy, 0.16, 0.16))
        part("head", "crown", "chord", *around(hx, hy, 0.16, 0.16), start=180, end=360)
        part("eye", "white", "ellipse", *around(hx + 0.06, hy - 0.02, 0.05, 0.05))
        part("eye", "black", "ellipse", *around(hx + 0.07, hy - 0.02, 0.032, 0.032))


class DemoDataset(ImageDataset):
    """Birds drawn on first use and kept, the same whatever the seed, so that runs can be compared."""

    SIZES = {"train": 2048, "val": 256}
    labels = dict(enumerate(SEGMENTS))

    def __init__(self, split, resolution, seed=0):
        self.scenes, self.drawn = [Scene(split, index) for index in range(self.SIZES[split])], {}
        records = [Record(None, scene.label, scene.captions, ()) for scene in self.scenes]
        super().__init__(records, list(SPECIES), resolution, seed)

    def read(self, index, rng=None):
        if index not in self.drawn:
            self.drawn[index] = self.scenes[index].draw(self.resolution)
        image, labels = self.drawn[index]
        return image, labels[0].long() if self.with_segmentation else None


if __name__ == "__main__":
    launch(main)
