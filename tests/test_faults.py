"""Nothing lost, nothing silent: killed processes, damaged files, bad numbers and bad input.

pytest -m slow        the long form: twenty kills instead of three
"""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as evaluate_module
import prior as prior_module
import synthesize as synthesize_module
import train as train_module
from conftest import ROOT, run_training, small_prior
from prior import Prior, UserError, WordNetSpeech
from test_train import TINY, lines_of
from train import Trainer, fitting, load_checkpoint, load_run, noted_signals, read_image, resolve

FLAGS = [f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in TINY.items()]
MARKED = pytest.mark.slow


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of 24 small pictures with label maps beside it, and a prior."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for index in range(count):
            for kind, shape in (("images", (6, 6, 3)), ("maps", (6, 6))):
                path = folder / kind / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256 if kind == "images" else 4, shape, np.uint8)).resize((48, 40), 0).save(path)
    small_prior().save(folder / "prior.npz")
    return folder


def flags_for(photographs, out, *more):
    """Flags of train.py for the photographs."""
    data = [
        "--dataset=folder",
        f"--data={photographs / 'images'}",
        f"--prior={photographs / 'prior.npz'}",
        "--preset=tiny",
        "--discriminator-layers=1",
    ]
    return [*FLAGS, *data, f"--out={out}", "--steps=60", *more]


def begin(photographs, out, *more, **options):
    """A process of train.py on the photographs, as a user starts it."""
    return launch("train.py", *flags_for(photographs, out, *more), **options)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the processes here have: sums must be taken in the same order."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def launch(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], env=environment, **pipes, **options)


def finish(process, code=0):
    """stderr of a process that must end with a status, and without a traceback."""
    out, error = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in error, (process.returncode, out, error)
    return error


def wait_for(path, process, lines=1):
    """Wait until a file has so many lines, or the process is over."""
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)


def equal(a, b):
    """Whether two values of a checkpoint are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(first, second):
    """Weights, optimizers, random state and metrics are equal; the configurations but for where the runs lie."""
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(run / name) for run in (first, second)]
        for state in states:
            state["config"].pop("out", None), state["config"].pop("workers", None), state.pop("tokenizer", None)
        assert equal(*states)
    assert lines_of(first) == lines_of(second)
    assert not [path for path in second.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """A run that nothing interrupted, and a second stage of it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_module.main(flags_for(photographs, out))
    return out


# ---------------------------------------------------------------------------------------------
# Kill and resume


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=MARKED)])
def test_a_run_killed_again_and_again_is_the_uninterrupted_one(whole, photographs, tmp_path, kills):
    out, rng, killed = tmp_path / "run", random.Random(kills), 0
    again = lambda: ["--resume"] if (out / "last.pt").exists() else ["--overwrite"] * out.exists()
    while killed < kills:
        process, log = begin(photographs, out, *again()), out / "metrics.jsonl"
        if killed % 4:  # most in the middle of training, the others whenever
            wait_for(log, process, 1 + (log.read_bytes().count(b"\n") if log.exists() else 0))
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(1, 6))
        process.kill()
        process.communicate()
        for name in ("last.pt", "best.pt"):
            if (out / name).exists():
                assert torch.isfinite(load_checkpoint(out / name)["model"]["encoder.layers.0.weight"]).all()
        if process.returncode == 0:  # it was faster
            assert_same_run(whole, out)
            shutil.rmtree(out)
        else:
            killed += 1
    if not (out / "last.pt").exists() or load_checkpoint(out / "last.pt")["step"] < 60:
        train_module.main(flags_for(photographs, out, *again()))
    assert_same_run(whole, out)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=MARKED)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(whole, photographs, tmp_path, number):
    out = tmp_path / "run"
    process = begin(photographs, out, "--workers=1")
    wait_for(out / "metrics.jsonl", process, 6)
    os.killpg(process.pid, number)  # as a terminal does: the loader's worker is signalled too
    error = finish(process, 128 + number)
    step = load_checkpoint(out / "last.pt")["step"]
    assert f"stopped by {signal.Signals(number).name} after step {step}, which is saved" in error and 5 <= step < 60
    train_module.main(flags_for(photographs, out, "--resume"))
    assert_same_run(whole, out)


def test_a_second_signal_ends_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    with noted_signals() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGTERM, *[pytest.param(signal.SIGKILL, marks=MARKED)] * 4])
def test_a_second_stage_that_is_stopped_goes_on_as_if_it_was_not(whole, tmp_path, number):
    flags = "train --steps=40 --batch-size=4 --width=16 --depth=1 --heads=2 --log-every=1 --eval-every=10 --dropout=0.1".split()
    folder = whole / "synthesis" / "gpt-none"
    synthesize_module.main([str(whole), *flags, "--overwrite"])
    folder.rename(tmp_path / "whole")
    process = launch("synthesize.py", str(whole), *flags)
    wait_for(folder / "metrics.jsonl", process, 3)
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(number)
    process.communicate()
    assert process.returncode in (128 + number, -number)
    synthesize_module.main([str(whole), *flags, "--resume"])
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=MARKED), pytest.param(signal.SIGKILL, marks=MARKED)])
def test_a_prior_that_is_cut_leaves_nothing_and_is_made_anew(speech, tmp_path, number):
    words = [("red", "small", "long", "bright"), ("wing", "tail", "beak", "head", "breast")]
    captions = [f"a {a} bird with a {b} {n} and a {a} {m}" for a in words[0] for b in words[0] for n in words[1] for m in words[1]]
    (tmp_path / "corpus.txt").write_text("\n".join(captions * 120))
    out = tmp_path / "prior.npz"
    arguments = ("prior.py", str(tmp_path / "corpus.txt"), "--embeddings=random", "--workers=2", f"--out={out}")
    process = launch(*arguments)
    time.sleep(3)  # of about seven
    os.killpg(process.pid, number)
    _, error = process.communicate()
    assert process.returncode in (128 + number, -number) and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
    if number == signal.SIGKILL:
        finish(launch(*arguments))
        finish(launch(*arguments[:-1], f"--out={tmp_path / 'again.npz'}"))
        assert out.read_bytes() == (tmp_path / "again.npz").read_bytes()


# ---------------------------------------------------------------------------------------------
# Checkpoints


def test_a_changed_byte_is_found_or_changes_nothing(whole, tmp_path):
    data, rng, found = (whole / "last.pt").read_bytes(), random.Random(0), 0
    state = load_checkpoint(whole / "last.pt")
    for _ in range(60):
        damaged, place = bytearray(data), rng.randrange(len(data))
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "last.pt").write_bytes(damaged)
        try:
            assert equal(load_checkpoint(tmp_path / "last.pt"), state)  # it lay between the records
        except UserError as error:
            assert "\n" not in str(error) and "last.pt" in str(error)
            found += 1
    assert found > 40


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_other_checkpoints_are_refused_in_a_line(whole, tmp_path, capsys):
    state = load_checkpoint(whole / "last.pt")

    def kept(**changed):
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.save({**state, **changed}, tmp_path / "run" / "last.pt")
        return tmp_path / "run"

    with pytest.raises(UserError, match="is of checkpoint version 0, this code reads 1"):
        load_run(kept(version=0), "cpu")
    for changed in ({"channels": 16}, {"method": "vqgan", "codes": "uniform", "codebooks": 1}, {"colour": "red"}):
        with pytest.raises(UserError, match="last.pt' holds other than its configuration says: "):
            load_run(kept(config={**state["config"], **changed}), "cpu")
    with pytest.raises(UserError, match="holds other than its configuration says"):
        load_run(kept(prior=None), "cpu")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_run(kept(model=Hostile(tmp_path / "it_ran")), "cpu")
    assert not (tmp_path / "it_ran").exists()
    assert load_run(kept(), "cpu")[3] == 60


def test_a_checkpoint_decodes_alone(whole, tmp_path):
    """On another machine, with no other file: the codes, their words and the network are in it."""
    (tmp_path / "last.pt").write_bytes((whole / "last.pt").read_bytes())
    (model, _, prior, _), (here, *_) = load_run(tmp_path, "cpu"), load_run(whole, "cpu")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x)), here(x).x_hat) and prior["noun_words"] == list("ABCDEFGHI")


def test_a_full_disk_is_a_line_and_keeps_the_last_checkpoint(photographs, whole, tmp_path):
    """A limit on the size of files that the first checkpoint, before the optimizers have state, just meets."""
    last = load_checkpoint(whole / "last.pt")
    torch.save({**last, "generator_optimizer": {}, "discriminator_optimizer": {}}, tmp_path / "small.pt")
    limit = (tmp_path / "small.pt").stat().st_size + 60_000
    assert limit < (whole / "last.pt").stat().st_size
    out = tmp_path / "run"
    error = finish(begin(photographs, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))), 2)
    assert error.splitlines()[-1].startswith("error: ") and "File too large" in error
    assert load_checkpoint(out / "last.pt")["step"] == 0 and not [path for path in out.iterdir() if path.name.startswith(".")]
    train_module.main(flags_for(photographs, out, "--resume"))
    assert_same_run(whole, out)


def test_a_full_disk_keeps_the_run_that_was_to_be_replaced(photographs, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("synthesis"))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
    assert "File too large" in finish(begin(photographs, out, "--overwrite", preexec_fn=limit), 2)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before and list(tmp_path.iterdir()) == [out]


def test_weights_that_are_not_finite_are_not_saved(photographs, tmp_path):
    out = run_training(choices(photographs, tmp_path / "run", method="vqgan", steps=1))
    before, state = (out / "last.pt").read_bytes(), load_checkpoint(out / "last.pt")
    trainer = Trainer(train_module.Config(**state["config"]), None, torch.device("cpu"))
    trainer.model.decoder.to_image.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="decoder.to_image.bias is not finite after step 0, so '.*last.pt' is kept as it was"):
        train_module.save_checkpoint(out / "last.pt", trainer)
    assert (out / "last.pt").read_bytes() == before


def test_damaged_metrics_and_strange_files_do_not_stop_a_resumed_run(whole, photographs, tmp_path):
    out = tmp_path / "run"
    train_module.main(flags_for(photographs, out, "--steps=8"))
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n5\n{}\n{"step": 9, "lo')
    (out / ".my-notes").write_text("mine")
    (out / ".last-abcd_123.pt").write_text("half of a checkpoint")
    train_module.main(flags_for(photographs, out, "--resume"))
    assert (out / ".my-notes").exists() and not (out / ".last-abcd_123.pt").exists()
    (out / ".my-notes").unlink()
    assert len(lines_of(out)) == 60


def test_a_changed_byte_of_a_prior_is_a_line_or_changes_nothing(prior, tmp_path):
    prior.save(tmp_path / "prior.npz")
    data, rng, found = (tmp_path / "prior.npz").read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            read = Prior.load(tmp_path / "damaged.npz")
            assert (read.edges == prior.edges).all() and (read.noun_vectors == prior.noun_vectors).all()
        except UserError as error:
            assert "\n" not in str(error)
            found += 1
    assert found > 100
    with pytest.raises(UserError, match="is a device; name a file"), prior_module.whole_file("/dev/null"):
        pass


# ---------------------------------------------------------------------------------------------
# Numbers


def choices(photographs, out, **more):
    data = dict(dataset="folder", data=str(photographs / "images"), prior=str(photographs / "prior.npz"), preset="tiny")
    return resolve({**TINY, **data, "out": str(out), "steps": 6, **more})


def test_the_step_and_the_term_that_broke_are_named(photographs, tmp_path, monkeypatch):
    written = Trainer.reconstruction_loss

    def broken(self, x_hat, x):
        loss, terms = written(self, x_hat, x)
        return loss, {**terms, "pixel": terms["pixel"] + (math_inf if self.step == 3 else 0)}

    math_inf = float("inf")
    monkeypatch.setattr(Trainer, "reconstruction_loss", broken)
    with pytest.raises(UserError, match="pixel is not finite at step 4; the last good checkpoint is '.*last.pt'; try a smaller --lr"):
        run_training(choices(photographs, tmp_path / "run", log_every=5))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] in (0, 4)


def test_a_gradient_that_is_not_finite_is_found_behind_finite_losses(photographs, tmp_path, monkeypatch):
    written = train_module.Trainer.__init__

    def hooked(self, *arguments):
        written(self, *arguments)
        weight = self.model.encoder.layers[0].weight
        weight.register_hook(lambda gradient: gradient * (float("nan") if self.step == 2 else 1))

    monkeypatch.setattr(train_module.Trainer, "__init__", hooked)
    with pytest.raises(UserError, match="^gradient is not finite at step 3"):
        run_training(choices(photographs, tmp_path / "run", eval_every=3, log_every=100))
    state = load_checkpoint(tmp_path / "run" / "last.pt")  # not overwritten by what broke
    assert state["step"] == 0 and all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())


def one_of_each(prior, adjectives, nouns, edges):
    chosen = prior.edges[(prior.edges[:, 0] < adjectives) & (prior.edges[:, 1] < nouns)][:edges]
    return Prior(
        prior.adjective_words[:adjectives],
        prior.adjective_vectors[:adjectives],
        prior.noun_words[:nouns],
        prior.noun_vectors[:nouns],
        chosen.reshape(-1, 2),
        np.ones(len(chosen), np.int64),
        prior.provenance,
    )


@pytest.mark.parametrize("method", ["vqct", "vqgan", "gumbel", "cvq", "regvq"])
@pytest.mark.parametrize("edge", ["constant images", "one image, batch 1", "one adjective", "no edges", "one code"])
def test_losses_stay_finite_at_the_edges(photographs, prior, tmp_path, method, edge):
    if edge in ("one adjective", "no edges") and method != "vqct":
        pytest.skip("has no prior")
    data = tmp_path / "images"
    more = {"data": str(data), "gan_start": 0, "log_every": 1, "eval_every": 3, "steps": 3}
    count = 1 if edge.startswith("one image") else 4
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for index in range(count):
            pixels = (
                np.full((40, 40, 3), 128, np.uint8)
                if edge == "constant images"
                else np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8)
            )
            Image.fromarray(pixels).save(data / split / f"{index}.png")
    if count == 1:
        more["batch_size"] = 1
    if edge in ("one adjective", "no edges", "one code"):
        smaller = {"one adjective": (1, 9, 99), "no edges": (7, 9, 0), "one code": (1, 1, 1)}[edge]
        one_of_each(prior, *smaller).save(tmp_path / "prior.npz")
        more["prior"] = str(tmp_path / "prior.npz")
    if edge == "one code" and method != "vqct":
        more["codebook_size"] = 1
    out = run_training(choices(photographs, tmp_path / "run", method=method, **more))
    lines = lines_of(out)
    assert len(lines) == 3 and all(np.isfinite(value).all() for line in lines for value in line.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_repeats_a_run_of_files(photographs, tmp_path, workers):
    first = run_training(choices(photographs, tmp_path / "a", workers=workers))
    second = run_training(choices(photographs, tmp_path / "b", deterministic=True))
    assert lines_of(first) == lines_of(second) and lines_of(first, "validation_psnr") == lines_of(second, "validation_psnr")
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------
# Bad input, and beside it the nearest good one


def said(call, capsys, arguments):
    """What a script prints on stderr for arguments that it must refuse."""
    with pytest.raises(SystemExit) as ended:
        prior_module.command(lambda: call(arguments))
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    return error


BAD_FLAGS = [
    ("--method=vqtc", "unknown method 'vqtc'; methods are vqct", "did you mean 'vqct'?"),
    ("--dataset=coc", "invalid choice: 'coc'", "did you mean 'coco'?"),
    ("--metod=vqct", "unrecognized arguments: --metod=vqct", "did you mean '--method'?"),
    ("--transfer=gnc", "invalid choice: 'gnc'", "did you mean 'gcn'?"),
    ("--steps=many", "--steps: invalid int value: 'many'", ""),
    ("--multipliers=1,x", "'1,x' is not a list of whole numbers", ""),
    ("--resolution=33", "resolution 33 is not a multiple of 2", ""),
    ("--batch-size=17", "--batch-size 17 is more than the 16 training images", ""),
    ("--prior=absent.npz", "--prior 'absent.npz' does not exist", ""),
    ("--device=tpu", "--device tpu is not a device", ""),
    ("--lr=inf", "--lr inf must be a finite number", ""),
    ("--beta=nan", "--beta nan must be a finite number", ""),
    ("--channels=0", "--channels 0 must be at least 1", ""),
    ("--multipliers=1,0", "--multipliers (1, 0) must be whole numbers from 1 on", ""),
    ("--seed=99999999999999999999", "must lie in [0, 2^62)", ""),
    ("--codebook-size=99999999999999", "must be at most 2^24", ""),
]


@pytest.mark.parametrize("flag, message, hint", BAD_FLAGS)
def test_a_bad_flag_is_one_line(photographs, tmp_path, capsys, flag, message, hint):
    error = said(train_module.main, capsys, flags_for(photographs, tmp_path / "run", flag))
    assert message in error and hint in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_nearest_good_flags_succeed(photographs, tmp_path):
    near = ["--method=vqct", "--transfer=gcn", "--steps=1", "--multipliers=1,1,2", "--resolution=36", "--batch-size=16", "--device=cpu"]
    train_module.main(flags_for(photographs, tmp_path / "run", *near))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


def test_folders_that_are_no_runs_are_left_alone(photographs, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    torch.save({"weights": torch.ones(2)}, tmp_path / "thesis" / "last.pt")
    good, where = flags_for(photographs, "absent"), f"--out={tmp_path / 'thesis'}"
    assert "exists already" in said(train_module.main, capsys, [*good, where])
    assert "is not a run of train.py" in said(train_module.main, capsys, [*good, where, "--overwrite"])
    assert "is not a checkpoint of train.py" in said(train_module.main, capsys, [where, "--resume"])
    assert "is not a checkpoint of train.py" in said(evaluate_module.main, capsys, [str(tmp_path / "thesis")])
    assert "is not a checkpoint of train.py" in said(synthesize_module.main, capsys, [str(tmp_path / "thesis"), "train"])
    (tmp_path / "file").write_text("a file")
    assert "exists already" in said(train_module.main, capsys, [*good, f"--out={tmp_path / 'file'}"])
    assert "'" in said(train_module.main, capsys, [*good, f"--out={tmp_path / 'file' / 'run'}"])
    assert sorted(path.name for path in (tmp_path / "thesis").iterdir()) == ["chapter.txt", "last.pt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_a_line(photographs, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in said(train_module.main, capsys, flags_for(photographs, tmp_path / "closed" / "run"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no captions|no adjective or noun|is empty"),
        ("der rote Vogel sitzt auf dem Ast und singt\n" * 30, "no adjective is left of 30 captions: .* give a larger English corpus"),
        ("it is what it is\n" * 30, "no adjective or noun|no adjective is left"),
        ("a bird on a branch\n" * 30, "no adjective is left"),
    ],
)
def test_a_corpus_without_words_is_a_line(speech, tmp_path, capsys, content, message):
    (tmp_path / "corpus.txt").write_text(content)
    out = tmp_path / "prior.npz"
    arguments = [str(tmp_path / "corpus.txt"), "--embeddings=random", "--workers=1", f"--out={out}"]
    error = said(prior_module.main, capsys, arguments)
    assert re.search(message, error) and not out.exists()
    (tmp_path / "corpus.txt").write_text("the red bird sits on a small branch\n" * 31)
    prior_module.main(arguments)
    assert len(Prior.load(out).noun_words) == 2


def test_a_tagger_from_a_pickle_is_not_loaded(tmp_path, monkeypatch):
    import nltk

    folder = tmp_path / "taggers" / "averaged_perceptron_tagger"
    folder.mkdir(parents=True)
    (folder / "averaged_perceptron_tagger.pickle").write_bytes(pickle.dumps(Hostile(tmp_path / "it_ran")))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="nltk.downloader"):
        WordNetSpeech()
    assert not (tmp_path / "it_ran").exists()


# ---------------------------------------------------------------------------------------------
# Images


def saved(path, image, **options):
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_images_of_every_kind_are_read_right(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = np.repeat(ramp[..., None], 3, 2)
    assert (saved(tmp_path / "gray.png", Image.fromarray(ramp)) == gray).all()
    assert (saved(tmp_path / "sixteen.png", Image.fromarray(ramp.astype(np.uint16) * 257)) == gray).all()
    assert (saved(tmp_path / "sixteen.tif", Image.fromarray(ramp.astype(np.uint16) * 257)) == gray).all()
    assert (saved(tmp_path / "palette.png", Image.fromarray(ramp).convert("P")) == gray).all()
    assert (saved(tmp_path / "bits.png", Image.fromarray(ramp > 127)) == np.where(gray > 127, 255, 0)).all()
    seen = np.dstack([gray, np.where(ramp < 128, 0, 255)]).astype(np.uint8)
    assert (saved(tmp_path / "alpha.png", Image.fromarray(seen)) == np.where(gray < 128, 255, gray)).all()
    assert (saved(tmp_path / "gray_alpha.png", Image.fromarray(seen[..., 2:])) == np.where(gray < 128, 255, gray)).all()
    clear = Image.fromarray(ramp).convert("P")
    assert (saved(tmp_path / "clear.png", clear, transparency=7) == np.where(gray == 7, 255, gray)).all()
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert (saved(tmp_path / "moving.gif", red, save_all=True, append_images=[blue]) == (255, 0, 0)).all()
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(saved(tmp_path / "cmyk.jpg", cyan, quality=100).astype(int) - (0, 255, 255)).max() <= 3
    assert (saved(tmp_path / "dot.png", Image.new("RGB", (1, 1), "lime")) == (0, 255, 0)).all()
    turned = Image.fromarray(gray)
    exif = turned.getexif()
    exif[0x0112] = 6
    assert (saved(tmp_path / "turned.png", turned, exif=exif) == np.rot90(gray, -1)).all()


def test_wide_and_tiny_images_train(photographs, prior, tmp_path):
    data = tmp_path / "images"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        Image.linear_gradient("L").resize((20_000, 8)).save(data / split / "wide.png")
        Image.new("RGB", (1, 1), "red").save(data / split / "dot.png")
    out = run_training(choices(photographs, tmp_path / "run", data=str(data), batch_size=2, steps=1, eval_every=1))
    assert np.isfinite(lines_of(out, "validation_psnr")[0]["validation_psnr"])


def test_images_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    Image.new("L", (40, 40)).save(tmp_path / "bomb.png")
    for name, message in (("cut.jpg", "truncated"), ("text.png", "cannot identify"), ("float.tif", "floating-point"), ("bomb.png", "bomb")):
        if name == "bomb.png":
            assert read_image(tmp_path / name).size == (40, 40)
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # Pillow's limit, and twice it is a bomb
        with pytest.raises(UserError, match=f"{name}' cannot be read: .*{message}"):
            read_image(tmp_path / name)


def test_tokens_follow_the_images_they_were_made_of(photographs, tmp_path):
    data = tmp_path / "images"
    shutil.copytree(photographs / "images", data)
    out = run_training(choices(photographs, tmp_path / "run", data=str(data), steps=1))
    run = synthesize_module.Run(out)
    before = synthesize_module.tokens_of(run, "val").indices
    assert synthesize_module.tokens_of(run, "val").indices.equal(before)
    shutil.copy(data / "train" / "0.png", data / "val" / "00.png")
    after = synthesize_module.tokens_of(run, "val").indices
    assert len(after) == len(before) + 1 and not after[1].equal(before[1])
    shutil.rmtree(data)
    assert synthesize_module.tokens_of(run, "val").indices.equal(after)


def test_label_maps_out_of_range_are_named(photographs, whole, tmp_path, capsys):
    maps = tmp_path / "maps"
    for path in (photographs / "maps").rglob("*.png"):
        (maps / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).save(maps / path.parent.name / path.name)
    Image.fromarray(np.full((40, 48), 65_535, np.uint16)).save(maps / "train" / "3.png")
    train_flags = "train --condition=segmentation --steps=1 --batch-size=4 --width=16 --depth=1 --heads=2".split()
    error = said(synthesize_module.main, capsys, [str(whole), *train_flags, f"--labels={maps}", f"--data={photographs / 'images'}"])
    assert "holds label 32,767 or more; labels are whole numbers from 0 to 4,095" in error
    assert not (whole / "synthesis" / "gpt-segmentation").exists()
    synthesize_module.main([str(whole), *train_flags, f"--labels={photographs / 'maps'}", "--overwrite"])


# ---------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_changes_nothing_and_repeats_itself(whole, monkeypatch):
    files = [path for path in whole.iterdir() if path.suffix in (".pt", ".npz", ".jsonl") or path.name == "config.json"]
    before, results = {path: path.read_bytes() for path in files}, []
    monkeypatch.setattr(evaluate_module, "load_inception", lambda path: (None, "none here"))
    monkeypatch.setattr(evaluate_module, "load_perceptual", lambda *paths: (None, "none here"))
    for _ in range(2):
        evaluate_module.main([str(whole)])
        results.append(json.loads((whole / "evaluation.json").read_text()))
        assert {path: path.read_bytes() for path in files if path.name != "evaluation.json"} == before
    assert results[0] == results[1]


def test_metal_falls_back_to_the_cpu_and_checkpoints_are_archives_with_checksums(whole):
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    with zipfile.ZipFile(whole / "last.pt") as archive:
        assert archive.testzip() is None and all(entry.CRC for entry in archive.infolist() if entry.file_size > 64)
    with pytest.raises(UserError, match="^'x' holds other than its configuration says: two"), fitting("x"):
        raise ValueError("two\nlines")
