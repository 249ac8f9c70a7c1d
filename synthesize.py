"""The second stage: images as tokens that read as words (paper §4.4).

    python synthesize.py runs/demo-vqct tokens                       the evaluation split → tokens.npz in the run
    python synthesize.py runs/demo-vqct tokens --words 0             … and what image 0 reads as
    python synthesize.py runs/demo-vqct tokens --decode runs/demo-vqct/tokens.npz     back to images

A token file holds `indices` (N, M, h, w), an adjective and a noun at each position (`--adjective-neighbours`
adjectives, where they are averaged), each codebook's `words`, `labels`, the names of the classes and the
checksum of the tokenizer; numpy reads it without pickle. Training a model of
these tokens is the next step and not here yet.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF

from evaluate import to_bytes
from prior import Progress, UserError, checksum, command, load_arrays, save_arrays, whole_file
from train import code_words, codebook_names, load_run, make_dataset, make_loader, pick_device, to_images

# ---------------------------------------------------------------------------------------------
# Tokens


@torch.no_grad()
def encode_dataset(model, dataset, device, batch_size):
    """Every image of a dataset → indices (N, M, h, w) int32 and labels (N,) int64 (−1: none)."""
    indices, labels, progress = [], [], Progress()
    for batch in make_loader(dataset, device, -1, batch_size=batch_size):
        indices.append(model.encode(to_images(batch["image"], device)).int().cpu())
        labels.append(batch["label"])
        progress(f"encoding: {sum(map(len, indices)):,}/{len(dataset):,} images")
    return torch.cat(indices).numpy(), torch.cat(labels).numpy()


@torch.no_grad()
def decode_tokens(model, indices, folder, device, batch_size):
    """(N, M, h, w) indices → N PNG files in a folder."""
    for start in range(0, len(indices), batch_size):
        batch = torch.from_numpy(indices[start : start + batch_size]).long().to(device)
        for index, image in enumerate(to_bytes(model.decode(batch)).cpu(), start):
            with whole_file(Path(folder) / f"{index:06d}.png") as temporary:
                TF.to_pil_image(image).save(temporary, "PNG")


def per_token(model, values):
    """One value for each codebook → one for each of the M tokens of a position."""
    return [value for value, quantizer in zip(values, model.quantizers) for _ in range(quantizer.neighbours)]


def words_of(indices, words):
    """(M, h, w) indices of an image and the M lists of words → h lines of w cells, each the words of its codes: "red breast"."""
    cells = [[" ".join(names[index] for names, index in zip(words, pair)) for pair in row] for row in indices.transpose(1, 2, 0)]
    width = max(len(cell) for row in cells for cell in row)
    return "\n".join("  ".join(cell.ljust(width) for cell in row).rstrip() for row in cells)


def save_tokens(path, indices, labels, words, classes, tokenizer):
    """Write a token file, whole or not at all."""
    names = codebook_names(words)
    arrays = {f"{name}_words": np.array(listed) for name, listed in zip(names, words)}
    save_arrays(path, indices=indices, labels=labels, classes=np.array(classes, dtype=str), tokenizer=tokenizer, **arrays)


def load_tokens(path, tokenizer, sizes):
    """Indices of a token file. Raises UserError where it is missing, something else, or of another tokenizer."""
    arrays = load_arrays(path, ("indices", "tokenizer"), "token file", "python synthesize.py RUN tokens")
    indices, made_by = arrays["indices"], str(arrays["tokenizer"])
    if made_by != tokenizer:
        raise UserError(f"'{path}' was made by another tokenizer (sha256 {made_by[:12]}…, this run's is {tokenizer[:12]}…)")
    if indices.ndim != 4 or indices.shape[1] != len(sizes) or indices.min() < 0 or (indices.max(axis=(0, 2, 3)) >= sizes).any():
        raise UserError(f"'{path}' holds indices that are not {len(sizes)} tokens a position of {sizes} codes")
    return indices


def check_words(indices, count):
    """Raise UserError for an index that is none of `count` images."""
    for index in indices:
        if not 0 <= index < count:
            raise UserError(f"--words {index}: there are images 0 … {count - 1}")


def tokens(args):
    """The sub-command: encode a split, or decode a file."""
    device, checkpoint = pick_device(args.device), Path(args.run) / "last.pt"
    model, config, prior, _ = load_run(args.run, device)
    tokenizer, words = checksum(checkpoint), code_words(prior, model.codebook.sizes)
    if args.decode:
        folder = Path(args.output or Path(args.run) / "decoded")
        indices = load_tokens(args.decode, tokenizer, per_token(model, model.codebook.sizes))
        decode_tokens(model, indices, folder, device, config.batch_size)
        print(f"{folder}: {len(indices):,} images")
    else:
        config.data, config.skip_broken = args.data or config.data, args.skip_broken or config.skip_broken
        dataset, path = (
            make_dataset(config, args.split),
            Path(args.output or Path(args.run) / f"tokens{'' if args.split == 'val' else '-train'}.npz"),
        )
        check_words(args.words, len(dataset))
        indices, labels = encode_dataset(model, dataset, device, config.batch_size)
        save_tokens(path, indices, labels, words, dataset.classes, tokenizer)
        print(f"{path}: {len(indices):,} images of {indices.shape[2]}×{indices.shape[3]} positions, {' + '.join(codebook_names(words))}")
    check_words(args.words, len(indices))
    for index in args.words:
        print(f"\nimage {index}\n{words_of(indices[index], per_token(model, words))}")


def main(argv=None):
    """Run a sub-command on a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run folder of train.py")
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("tokens", help="images to tokens, and back", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sub.add_argument("--split", choices=("train", "val"), default="val", help="images to encode")
    sub.add_argument("--data", default="", help="where the data set lies now, if not where the run found it")
    sub.add_argument("--skip-broken", action="store_true", help="leave out images that are missing or cannot be read")
    sub.add_argument(
        "--output",
        default="",
        help="token file, or with --decode folder of images; by default tokens.npz (tokens-train.npz) or decoded/ in the run",
    )
    sub.add_argument("--decode", default="", metavar="FILE", help="a token file to turn back into images")
    sub.add_argument("--words", type=int, nargs="*", default=[], metavar="INDEX", help="images to print as words")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    sub.set_defaults(call=tokens)
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    command(main)
