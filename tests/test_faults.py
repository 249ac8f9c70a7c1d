"""Killed processes, damaged files, bad numbers, bad input. -m slow: many more kills."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from PIL import Image

import evaluate
import prior as prior_module
import synthesize
import train
from conftest import small_prior
from prior import Prior, UserError, read_tensors
from train import Run, Trainer, load_checkpoint, read_image, read_label_map

LONG = [
    pytest.param(number, marks=pytest.mark.slow)
    for number in (signal.SIGTERM, signal.SIGKILL)
]
STAGE = """train --steps=100 --batch-size=4 --width=16 --depth=1 --heads=2
    --log-every=1 --eval-every=25""".split()


@pytest.fixture(autouse=True, scope="module")
def as_a_process():
    """One thread, so that all processes take sums in the same order; then as before."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads), signal.signal(signal.SIGINT, handler)
    for process in (
        child for child in multiprocessing.active_children() if hasattr(child, "log")
    ):  # a test failed
        process.kill()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of 24 small pictures with label maps beside it, and a prior."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for kind, shape, most in (("images", (6, 6, 3), 256), ("maps", (6, 6), 4)):
            (folder / kind / split).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(rng.integers(0, most, shape, np.uint8)).resize(
                    (48, 40), 0
                )
                image.save(folder / kind / split / f"{index}.png")
    small_prior().save(folder / "prior.npz")
    return folder


def flags(photographs, out, *more, **choices):
    """Flags of train.py for the photographs and a small network, without None."""
    small = dict(
        resolution=32,
        channels=8,
        multipliers="1,2",
        blocks=1,
        z_channels=8,
        code_dim=8,
        transfer_width=16,
    )
    often = dict(
        steps=24,
        batch_size=4,
        lr=2e-3,
        schedule="constant",
        log_every=1,
        eval_every=4,
        eval_images=4,
    )
    data = dict(
        dataset="folder",
        data=photographs / "images",
        prior=photographs / "prior.npz",
        preset="tiny",
    )
    choices = {
        **small,
        **often,
        **data,
        "gan_start": 3,
        "discriminator_layers": 1,
        "out": out,
        **choices,
    }
    return [
        *(
            f"--{name.replace('_', '-')}={x}"
            for name, x in choices.items()
            if x is not None
        ),
        *more,
    ]


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main(flags(photographs, out))
    return out


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def begin(folder, main, arguments):
    """A process of a script in a group of its own, as of a shell; it prints to a file."""
    log, (ended, alive) = folder / "log", os.pipe()

    def process():
        os.setsid()
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        prior_module.command(lambda: main(arguments))

    begun = multiprocessing.get_context("fork").Process(target=process)
    begun.start()
    begun.log, begun.ended = log, ended
    os.close(alive)  # `ended` can be read when no process has this any more
    return begun


def finish(process, code=0):
    """What a process printed. It must end with the status and its own processes."""
    process.join(100)
    text = process.log.read_text()
    assert process.exitcode == code and (code < 0 or "Traceback" not in text), text
    assert select.select([process.ended], [], [], 10)[0], "a process of it goes on"
    return text


def wait_for(process, path, lines=1):
    """Wait until a file has so many lines, or the process is over."""
    while process.is_alive() and not (
        path.exists() and path.read_bytes().count(b"\n") >= lines
    ):
        time.sleep(0.005)


def equal(a, b):
    """Whether two values of a checkpoint are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b)


def lines_of(run):
    """metrics.jsonl, without what a clock measured."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if name != "images/s"}
        for line in lines
    ]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_same_run(first, second):
    """Weights, optimizers, random state, metrics, and configurations except `out`."""
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(run / name) for run in (first, second)]
        for state in states:
            del state["sha256"]
            state["config"] = {
                key: x
                for key, x in state["config"].items()
                if key not in ("out", "workers")
            }
        assert equal(*states)
    assert lines_of(first) == lines_of(second)
    assert files_of(first).keys() == files_of(second).keys()


def said(main, capsys, arguments):
    """The one line that a script prints on stderr for arguments that it must refuse."""
    with pytest.raises(SystemExit) as ended:
        prior_module.command(lambda: main(arguments))
    error = capsys.readouterr().err
    assert (
        ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    ), error
    return error


@pytest.mark.parametrize(
    "stage, kills",
    [
        ("first", 3),
        *(
            pytest.param(*chain, marks=pytest.mark.slow)
            for chain in (("first", 25), ("second", 10))
        ),
    ],
)
def test_a_run_killed_again_and_again_is_the_uninterrupted_one(
    whole, run, photographs, tmp_path, stage, kills
):
    out, main, rng, killed = tmp_path / "new", train.main, random.Random(kills), 0
    arguments = flags(photographs, out)
    if stage == "second":
        out, main, arguments = (
            run / "synthesis" / "gpt-none",
            synthesize.main,
            [str(run), *STAGE],
        )
        main(arguments)
        whole = out.rename(tmp_path / "whole")
    again = lambda: [*arguments, *["--resume"] * (out / "last.pt").exists()]
    while killed < kills:
        process, log = begin(tmp_path, main, again()), out / "metrics.jsonl"
        if killed % 4:  # most in the middle of training, the others whenever
            wait_for(
                process, log, 1 + (log.read_bytes().count(b"\n") if log.exists() else 0)
            )
        time.sleep(rng.uniform(0, 0.3 if killed % 4 else 1))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it was faster
            assert_same_run(whole, out)
            shutil.rmtree(out)
    if (
        not (out / "last.pt").exists()
        or lines_of(out)[-1]["step"] < lines_of(whole)[-1]["step"]
    ):
        main(again())
    assert_same_run(whole, out)


@pytest.mark.slow
def test_a_prior_killed_again_and_again_is_the_uninterrupted_one(
    speech, tmp_path, monkeypatch
):
    corpus, rng = tmp_path / "corpus.txt", random.Random(0)
    corpus.write_text(
        "a small red bird with a long red wing and a bright tail\nits long beak is red and small\n"
        * 20_000
    )
    monkeypatch.setattr(prior_module, "WordNetSpeech", lambda: speech)
    options = f"{corpus} --embeddings=corpus --min-count=1 --workers=2 --out={tmp_path}"
    whole, again = (f"{options}/{name}.npz".split() for name in "ab")
    prior_module.main(whole)
    for _ in range(10):
        process = begin(tmp_path, prior_module.main, again)
        time.sleep(rng.uniform(0, 3))
        os.killpg(process.pid, signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        assert files_of(tmp_path).keys() <= {"corpus.txt", "log", "a.npz", "b.npz.part"}
    prior_module.main(again)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, *LONG])
@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_stage_that_is_stopped_goes_on_as_if_it_was_not(
    whole, run, photographs, tmp_path, stage, number
):
    folder, main, reference = tmp_path / "again", train.main, whole
    arguments = flags(photographs, folder, workers=1)
    if stage == "second":
        folder, main, arguments = (
            run / "synthesis" / "gpt-none",
            synthesize.main,
            [str(run), *STAGE],
        )
        main(arguments)
        reference = folder.rename(tmp_path / "whole")
    process = begin(tmp_path, main, arguments)
    wait_for(process, folder / "metrics.jsonl", 6)
    os.killpg(process.pid, number)  # as a terminal does
    text = finish(process, -number if number == signal.SIGKILL else 128 + number)
    step = load_checkpoint(folder / "last.pt")["step"]
    if number != signal.SIGKILL:
        assert (
            f"stopped by {signal.Signals(number).name} after step {step}, saved" in text
        )
        assert step >= 5
    main([*arguments, "--resume"])
    assert_same_run(reference, folder)


def test_a_second_signal_ends_a_run_at_once(photographs, tmp_path):
    process = begin(
        tmp_path,
        train.main,
        flags(photographs, tmp_path / "run", batch_size=40_000, workers=1),
    )
    wait_for(process, process.log, 4)
    status = Path(f"/proc/{process.pid}/status")
    while status.exists():  # until the run takes SIGTERM: its worker has started then
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.005)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGINT,
    ):  # the first of either is noted
        time.sleep(0.5)
        assert process.is_alive()
        os.kill(process.pid, number)
    assert "stopped" not in finish(process, 130)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 0


def test_a_killed_worker_is_one_line(photographs, tmp_path):
    process = begin(
        tmp_path,
        train.main,
        flags(photographs, tmp_path / "run", workers=2, steps=10_000),
    )
    wait_for(process, tmp_path / "run" / "metrics.jsonl", 3)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    os.kill(int(workers.split()[0]), signal.SIGKILL)
    lines = finish(process, 2).splitlines()
    assert re.match(
        r"error: DataLoader worker .* (exited unexpectedly|killed)",
        lines[-1],
    )
    assert [line for line in lines if "rror" in line] == lines[-1:], lines


def test_a_lack_of_file_handles_is_one_line(photographs, tmp_path):
    def main(arguments):
        used = set(map(int, os.listdir("/proc/self/fd")))
        free = [number for number in range(4096) if number not in used]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[8], 4096))  # eight more
        train.main(arguments)

    text = finish(
        begin(
            tmp_path, main, flags(photographs, tmp_path / "run", workers=2, steps=50)
        ),
        2,
    )
    assert text.splitlines()[-1].startswith("error: ")
    assert "Too many open files" in text.splitlines()[-1]
    assert text.count("Error") == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nframe"),
    ],
)
@pytest.mark.parametrize("place", ["to_images", "read_image"])
def test_a_lack_of_memory_is_one_line(
    photographs, tmp_path, monkeypatch, place, error
):
    def lack(*_):
        raise error

    monkeypatch.setattr(train, place, lack)
    lines = finish(
        begin(tmp_path, train.main, flags(photographs, tmp_path / "run", batch_size=16)),
        2,
    ).splitlines()
    assert re.fullmatch("error: .*(of|allocate) memory:?", lines[-1])
    assert "frame" not in lines[-1]
    assert sum(line.startswith("error") for line in lines) == 1


def test_a_lack_of_memory_is_not_called_damaged_data(monkeypatch):
    def lack(*_):
        raise MemoryError

    monkeypatch.setattr("nltk.data.find", lack)
    with pytest.raises(MemoryError):
        prior_module.WordNetSpeech()


def test_a_rank_without_its_group_is_one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as some batch systems and notebooks leave it
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    counted = []
    train.launch(lambda: counted.append(train.processes()))
    assert counted == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, *LONG])
@pytest.mark.parametrize("place", ["read", "write"])
def test_a_prior_that_is_cut_is_made_anew_byte_for_byte(
    speech, tmp_path, monkeypatch, place, number
):
    """Cut while two processes tag captions, or in the middle of the file."""
    corpus, out = tmp_path / "corpus.txt", tmp_path / "prior.npz"
    corpus.write_text(
        "a small red bird with a long red wing and a bright tail\nits long beak is red and small\n"
        * 6
    )
    monkeypatch.setattr(prior_module, "WordNetSpeech", lambda: speech)
    monkeypatch.setattr(prior_module, "CHUNK", 3)
    arguments = (
        f"{corpus} --embeddings=corpus --workers=2 --min-count=1 --out={out}".split()
    )

    def stuck(file, *_, **__):
        if place == "write":
            file.write(b"half of a prior")
        print("stuck")
        time.sleep(100)

    with monkeypatch.context() as patch:
        patch.setattr(
            *(
                (np, "savez_compressed")
                if place == "write"
                else (prior_module, "count_captions")
            ),
            stuck,
        )
        process = begin(tmp_path, prior_module.main, arguments)
        wait_for(process, process.log)
        os.killpg(process.pid, number)
        finish(process, -number if number == signal.SIGKILL else 128 + number)
    assert files_of(tmp_path).keys() == {
        "corpus.txt",
        "log",
        *["prior.npz.part"] * (place == "write"),
    }
    prior_module.main(arguments)
    assert files_of(tmp_path).keys() == {"corpus.txt", "log", "prior.npz"}
    prior_module.main([*arguments[:-1], f"--out={tmp_path / 'again.npz'}", "--workers=1"])
    assert out.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_two_processes_do_not_work_in_one_folder(whole, photographs, tmp_path, capsys):
    process, out = (
        begin(tmp_path, train.main, flags(photographs, tmp_path / "run")),
        tmp_path / "run",
    )
    wait_for(process, out / "metrics.jsonl", 6)
    os.kill(process.pid, signal.SIGSTOP)
    for more, message in (
        ("", "exists; go on"),
        ("--resume", "another process"),
        ("--overwrite", "another process"),
    ):
        assert message in said(train.main, capsys, flags(photographs, out, *more.split()))
    os.kill(process.pid, signal.SIGCONT)
    finish(process)
    assert_same_run(whole, out)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    "place, log_every", [("train_step", 1), ("validate", 1), ("train_step", 10**6)]
)
def test_a_folder_that_goes_while_it_trains_ends_the_run(
    photographs, tmp_path, monkeypatch, place, log_every, replaced
):
    """It is moved in a step or a validation. Nothing is written to another in its place."""
    out, written = tmp_path / "run", getattr(Trainer, place)

    def and_move(self, *arguments):
        found = written(self, *arguments)
        if self.step == (5 if place == "train_step" else 8):
            out.rename(tmp_path / "moved")
            replaced and out.mkdir()
            log_every > 1 and signal.raise_signal(
                signal.SIGINT
            )  # which saves without a line
        return found

    monkeypatch.setattr(Trainer, place, and_move)
    with pytest.raises(
        UserError,
        match=f"'{out}/metrics.jsonl' is no longer there: its folder was deleted or moved",
    ):
        train.main(flags(photographs, out, log_every=log_every))
    assert not out.exists() or list(out.iterdir()) == []
    assert load_checkpoint(tmp_path / "moved" / "last.pt")["step"] == 4


def test_other_photographs_do_not_go_on_with_a_run(photographs, run, tmp_path):
    """Neither of the first stage nor of the second; a copy of its own does."""
    synthesize.main([str(run), *STAGE, "--steps=1"])
    copy, others = (
        shutil.copytree(photographs / "images", tmp_path / name / "images")
        for name in ("copy", "others")
    )
    os.rename(others / "train" / "3.png", others / "train" / "3a.png")
    for data, message in ((others, "was trained on other images than these"), (copy, "")):
        for main, words in (
            (train.main, [f"--out={run}", "--resume", "--steps=25"]),
            (synthesize.main, [str(run), "train", "--resume", "--steps=2"]),
        ):
            with (
                pytest.raises(UserError, match=message)
                if message
                else contextlib.nullcontext()
            ):
                run_before = shutil.copytree(
                    run, tmp_path / f"{data.parent.name}-{main.__module__}"
                )
                main([*words, f"--data={data}"])
            if (
                main == train.main and not message
            ):  # the second stage is of the tokens before that
                shutil.rmtree(run), run_before.rename(run)


def test_two_second_stages_of_a_run_share_its_tokens(
    photographs, run, tmp_path, monkeypatch
):
    """One of them encodes, and the other one waits, says so, and takes what was made."""
    encode, encoded = synthesize.encode_dataset, tmp_path / "encoded"

    def slowly(run, dataset, *more):
        with open(encoded, "a") as file:
            file.write(f"{len(dataset)} ")
        time.sleep(2)
        return encode(run, dataset, *more)

    monkeypatch.setattr(synthesize, "encode_dataset", slowly)
    words = [
        str(run),
        *STAGE,
        "--model=ldm",
        "--steps=3",
        f"--labels={photographs / 'maps'}",
    ]
    conditions = "none", "segmentation"
    (tmp_path / "none").mkdir(), (tmp_path / "segmentation").mkdir()
    begun = [
        begin(tmp_path / each, synthesize.main, [*words, f"--condition={each}"])
        for each in conditions
    ]
    printed = [finish(process) for process in begun]
    assert (
        sum(
            f"waiting: another process encodes images of '{run}'" in text
            for text in printed
        )
        >= 1
    )
    assert encoded.read_text() == "16 8 "


@pytest.mark.parametrize(
    "name, read",
    [
        ("last.pt", lambda x: {**load_checkpoint(x), "sha256": None}),
        ("prior.npz", lambda x: vars(Prior.load(x))),
    ],
)
def test_a_changed_byte_is_found_or_changes_nothing(whole, tmp_path, name, read):
    data, expected, rng, found = (
        (whole / name).read_bytes(),
        read(whole / name),
        random.Random(0),
        0,
    )
    for _ in range(100):
        damaged, place = bytearray(data), rng.randrange(len(data))
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            assert equal(read(tmp_path / name), expected)  # it lay between the records
        except UserError as error:
            assert "\n" not in str(error)
            assert name in str(error)
            found += 1
    assert found > 30


@pytest.mark.parametrize("read", [load_checkpoint, read_tensors, Prior.load])
def test_a_hostile_pickle_does_not_run(prior, tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    hostile = type("Hostile", (), {"__reduce__": lambda self: (open, ("it_ran", "w"))})()
    torch.save({"version": 2, "model": hostile}, "file.npz")
    if read == Prior.load:
        np.savez("file.npz", **{**vars(prior), "noun_words": np.array([hostile] * 9)})
    with pytest.raises(UserError, match="file.npz"):
        read("file.npz")
    assert os.listdir() == ["file.npz"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({}, None),
        (
            {"version": 3},
            "last.pt' is no checkpoint of this program, or damaged: it is of version 3, this code reads 5",
        ),
        ({"config": {"channels": 16}}, "last.pt' does not match its configuration: "),
        ({"config": {"colour": "red"}}, "last.pt' does not match its configuration: "),
        ({"prior": None}, "last.pt' does not match its configuration: "),
    ],
)
def test_other_checkpoints_are_refused_in_a_line(
    whole, tmp_path, capsys, changed, message
):
    state = load_checkpoint(whole / "last.pt")
    torch.save(
        {**state, **changed, "config": {**state["config"], **changed.get("config", {})}},
        tmp_path / "last.pt",
    )
    if message:
        assert message in said(lambda _: Run(tmp_path), capsys, ())
    else:  # on another machine, with no other file: the codes, their words and the network are in it
        there, here, x = Run(tmp_path), Run(whole), torch.rand(2, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            assert torch.equal(
                there.model.decode(there.model.encode(x)), here.model(x).x_hat
            )
        assert there.words == [list("abcdefg"), list("ABCDEFGHI")]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("tokens --output=last.pt", "--output last.pt must end in .npz"),
        ("sample --output=last.pt", "'last.pt' must end in .png"),
    ],
)
def test_an_output_is_of_its_own_kind(run, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(run)
    if not flags.startswith("tokens"):
        synthesize.main([".", *STAGE, "--steps=1", "--overwrite"])
    before = capsys.readouterr() and files_of(run)
    assert message in said(synthesize.main, capsys, [".", *flags.split()])
    assert {name: files_of(run)[name] for name in before} == before


def test_a_full_disk_is_a_line_and_keeps_the_last_checkpoint(
    whole, photographs, tmp_path
):
    """The first checkpoint, without the optimizers' state, is just below the limit."""
    limit, out = int(0.9 * (whole / "last.pt").stat().st_size), tmp_path / "run"
    limited = lambda arguments: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        train.main(arguments),
    )
    error = finish(begin(tmp_path, limited, flags(photographs, out)), 2).splitlines()[-1]
    assert re.match("error: '.*best.pt' cannot be written: .*File too large", error)
    assert load_checkpoint(out / "last.pt")["step"] == 0
    assert not list(out.glob("*.part"))
    (out / "last.pt.part").write_text("what a kill leaves")
    (out / "metrics.jsonl").write_text('{"step": 1, "lo')
    train.main(flags(photographs, out, "--resume"))
    assert_same_run(whole, out)


@pytest.mark.parametrize(
    "broken, at, log_every, step, kept",
    [
        ("pixel", 3, 1, 3, 0),
        ("gradient", 3, 1, 3, 0),
        ("gradient", 6, 6, 6, 4),
        ("loss", 5, 99, 8, 4),
        ("stopped", 7, 99, 7, 4),
    ],
)
def test_what_is_not_finite_is_not_saved(
    photographs, tmp_path, monkeypatch, broken, at, log_every, step, kept
):
    """A loss breaks, or a gradient and the weights, before a validation or a signal."""
    written = Trainer.reconstruction_loss

    def loss(self, x_hat, x):
        total, terms = written(self, x_hat, x)
        if self.step == at - 1 and broken == "pixel":
            terms["pixel"] = terms["pixel"] / 0
        elif self.step == at - 1:
            x_hat.register_hook(lambda gradient: gradient * float("nan"))
            broken == "stopped" and signal.raise_signal(signal.SIGINT)
        return total, terms

    monkeypatch.setattr(Trainer, "reconstruction_loss", loss)
    named = "gradient" if broken == "stopped" else broken
    with pytest.raises(
        UserError,
        match=f"^{named} is not finite at step {step}; try a smaller --lr",
    ):
        train.main(
            flags(photographs, tmp_path / "run", log_every=log_every, gan_start=60)
        )
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == kept
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    "method, edge",
    [
        *(
            (m, e)
            for m in ("vqct", "vqgan", "gumbel", "cvq", "regvq")
            for e in ("constant", "one image", "one code")
        ),
        *(("vqct", edge) for edge in ("one adjective", "no edges", "strange shapes")),
    ],
)
def test_losses_stay_finite_at_the_edges(photographs, tmp_path, method, edge):
    data, rng, count = (
        tmp_path / "images",
        np.random.default_rng(0),
        1 if edge == "one image" else 4,
    )
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for index in range(count):
            noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
            plain, strange = (
                Image.new("RGB", (40, 40), "gray"),
                Image.new("L", (1 + 20_000 * (index % 2), 1)),
            )
            {"constant": plain, "strange shapes": strange}.get(edge, noise).save(
                data / split / f"{index}.png"
            )
    sizes = {
        "one adjective": (1, 9, 9),
        "no edges": (7, 9, 0),
        "one code": (1, 1, 1),
    }.get(edge, (7, 9, 9))
    words = [
        (np.array(list("ABCDEFGHI"[:n])), rng.standard_normal((n, 12), np.float32))
        for n in sizes[:2]
    ]
    edges = np.argwhere(np.ones(sizes[:2]))[: sizes[2]]
    Prior(*words[0], *words[1], edges, np.ones(len(edges), np.int64), {}).save(
        tmp_path / "prior.npz"
    )
    learned = dict(
        prior=None, transfer_width=None, codebook_size=1 if edge == "one code" else None
    )
    of_method = dict(prior=tmp_path / "prior.npz") if method == "vqct" else learned
    short = dict(data=data, batch_size=count, gan_start=0, eval_every=3, steps=3)
    train.main(flags(photographs, tmp_path / "run", method=method, **short, **of_method))
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 4
    assert all(np.isfinite(value).all() for line in lines for value in line.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_repeats_a_run_and_overwriting_leaves_nothing_of_the_old(
    whole, run, photographs, workers
):
    for name in ("evaluation.json", "tokens-val.npz", "last.pt.part"):
        (run / name).write_text("of the old run")
    train.main(flags(photographs, run, "--overwrite", workers=workers))
    assert_same_run(whole, run)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--method=vqtc", "--method: invalid choice: 'vqtc' (choose from 'vqct', "),
        ("--metod=vqct", "ents: --metod=vqct"),
        ("--steps=many", "--steps: invalid int value: 'many'"),
        ("--multipliers=1,x", "invalid tuple value: '1,x'"),
        ("--multipliers=1,0", "1,0 does not lie between 1 and 46"),
        ("--channels=0", "0 does not lie between 1 and 46"),
        ("--beta=nan", "nan does not lie between 0 and 46"),
        ("--lr=inf", "--lr: inf does not lie between 0 and "),
        (
            "--seed=9999999999999999999",
            "--seed: 9999999999999999999 does not lie between 0 and 4611686018427387904",
        ),
        (
            "--codebook-size=99999999999999",
            "--codebook-size: 99999999999999 does not lie between 0 and 16777216",
        ),
        ("--codebook-size=9", "changes nothing with these flags"),
        ("--resolution=33", "is not a multiple of 2"),
        ("--prior=absent.npz", "'absent.npz' is no prior: "),
        ("--device=tpu", "--device tpu: "),
        ("--discriminator-layers=4", "layers 4 are too many for these images"),
        ("--out=/dev/null", "File exists"),
        ("--out=/dev/null/run", "Not a directory"),
        ("--seed=4611686018427387904 --batch-size=17", None),
        ("--multipliers=1,1,2 --resolution=36 --device=cpu", None),
    ],
)
def test_a_bad_flag_is_one_line_that_leaves_nothing_and_a_good_one_is_not(
    photographs, tmp_path, capsys, flag, message
):
    os.chdir(photographs)
    arguments = flags(photographs, tmp_path / "run", *flag.split(), steps=1)
    if message:
        assert message in said(train.main, capsys, arguments)
        assert not list(tmp_path.iterdir())
    else:
        train.main(arguments)


@pytest.mark.parametrize(
    "names, named",
    [("b.txt a.txt", "a.txt, b.txt"), (".notes", ".notes"), ("last.pt .x", ".x")],
)
@pytest.mark.parametrize("is_run", [False, True])
def test_a_folder_with_foreign_files_is_left_alone(
    whole, photographs, tmp_path, capsys, names, named, is_run
):
    out = tmp_path / "run"
    shutil.copytree(whole, out) if is_run else out.mkdir()
    for name in names.split():
        (out / name).write_text("mine")
    before = files_of(tmp_path)
    said(train.main, capsys, flags(photographs, out))
    assert f"holds {named}; " in said(
        train.main, capsys, flags(photographs, out, "--overwrite")
    )
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["last.pt", "chapter.txt"])
@pytest.mark.parametrize(
    "call", ["train --resume --out=thesis", "evaluate thesis", "synthesize thesis train"]
)
def test_what_is_no_run_is_named(tmp_path, capsys, monkeypatch, call, name):
    monkeypatch.chdir(tmp_path)
    os.mkdir("thesis")
    torch.save({"weights": torch.ones(2)}, f"thesis/{name}")
    script, *more = call.split()
    assert re.search(
        "thesis(/last.pt)?' is (no|missing)", said(globals()[script].main, capsys, more)
    )
    assert os.listdir("thesis") == [name]


def test_label_maps_of_sixteen_bits_are_read_in_either_byte_order(tmp_path):
    labels = np.arange(16, dtype=np.uint16).reshape(4, 4) * 100
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        Image.frombytes(mode, (4, 4), labels.astype(order).tobytes()).save(
            tmp_path / "map.tif"
        )
        assert np.array_equal(
            read_label_map(tmp_path / "map.tif", (4, 4), 4, (0, 0, 1, 1)), labels
        )


def test_images_of_every_kind_are_read_right(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray, seen = (
        np.repeat(ramp[..., None], 3, 2),
        np.where(ramp < 128, 0, 255).astype(np.uint8),
    )
    picture, turned = map(Image.fromarray, (ramp, gray))
    red, blue, cyan = (
        Image.new("RGB", (16, 16), "red"),
        Image.new("RGB", (16, 16), "blue"),
        (255, 0, 0, 0),
    )
    exif, on_white = turned.getexif(), np.where(gray < 128, 255, gray)
    exif[0x0112] = 6
    for name, image, expected, options in (
        ("gray.png", picture, gray, {}),
        ("palette.png", picture.convert("P"), gray, {}),
        ("bits.png", Image.fromarray(seen > 0), seen[..., None], {}),
        (
            "clear.png",
            picture.convert("P"),
            np.where(gray == 7, 255, gray),
            {"transparency": 7},
        ),
        ("alpha.png", Image.fromarray(np.dstack([gray, seen])), on_white, {}),
        ("gray_alpha.png", Image.fromarray(np.dstack([ramp, seen])), on_white, {}),
        ("moving.gif", red, (255, 0, 0), {"save_all": True, "append_images": [blue]}),
        ("cmyk.jpg", Image.new("CMYK", (16, 16), cyan), (0, 255, 255), {"quality": 100}),
        ("turned.png", turned, np.rot90(gray, -1), {"exif": exif}),
    ):
        image.save(tmp_path / name, **options)
        found = np.asarray(read_image(tmp_path / name)).astype(int)
        assert np.abs(found - expected).max() <= (3 if name == "cmyk.jpg" else 0), name


@pytest.mark.parametrize(
    "content, message",
    [
        (b"P5 9 9 255\n half", "truncated|not large enough"),
        (b"P5 20000 20000 255\n", "bomb"),
        (b"Pf\n1 1\n-1.0\n0000", "not of 8 bits"),
        (b"P5 48 40 65535\n" + bytes(48 * 40 * 2), "not of 8 bits"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(
    photographs, tmp_path, content, message, workers
):
    data, bad = (
        shutil.copytree(photographs / "images", tmp_path / "images"),
        tmp_path / "images" / "train" / "bad.jpg",
    )
    bad.write_bytes(content)
    arguments = flags(
        photographs, tmp_path / "run", data=data, batch_size=17, workers=workers
    )
    error = finish(begin(tmp_path, train.main, arguments), 2).splitlines()[-1]
    assert error.startswith(f"error: image '{bad}' cannot be read: ")
    assert re.search(message, error)
    at_the_start = not (tmp_path / "run").exists()  # unless the header is right
    assert at_the_start == (message in ("bomb", "cannot identify"))


@pytest.mark.parametrize(
    "image, message",
    [
        *(
            (Image.new(mode, (48, 40)), "it is not one channel of whole numbers")
            for mode in ("F", "RGB")
        ),
        *(
            (Image.fromarray(np.full((40, 48), label, np.uint16)), "more than 4,096")
            for label in (4096, 65_534)
        ),
    ],
)
def test_label_maps_of_other_than_labels_are_a_line(
    photographs, run, tmp_path, capsys, image, message
):
    maps, stage = (
        shutil.copytree(photographs / "maps", tmp_path / "maps"),
        [*STAGE, "--condition=segmentation"],
    )
    image.save(maps / "train" / "3.png", "TIFF")
    assert message in said(
        synthesize.main, capsys, [str(run), *stage, f"--labels={maps}"]
    )
    assert not (run / "synthesis").exists()
    synthesize.main([str(run), *stage, f"--labels={photographs / 'maps'}", "--steps=1"])


def test_tokens_follow_what_they_were_made_of(photographs, run, tmp_path):
    data, path = (
        shutil.copytree(photographs / "images", tmp_path / "images"),
        run / "tokens-val.npz",
    )
    tokens = lambda *more: synthesize.tokens_of(Run(run, data=data), "val", *more)
    before, made = tokens().indices, path.stat().st_mtime_ns
    assert tokens().indices.equal(before)
    assert path.stat().st_mtime_ns == made  # kept
    path.write_bytes(path.read_bytes()[:-100])
    assert tokens().indices.equal(before)
    assert path.stat().st_mtime_ns > made  # made anew
    assert len(tokens(2).indices) == 2 * len(before)
    features = np.array(tokens(1, True).features)
    os.truncate(run / "features-val.npy", 200)
    assert np.array_equal(tokens(1, True).features, features)
    shutil.copy(data / "train" / "0.png", data / "val" / "0.png")
    changed = tokens().indices
    assert not changed[0].equal(before[0])
    assert changed[1:].equal(before[1:])
    assert not np.array_equal(tokens(1, True).features[0], features[0])
    state = torch.load(run / "last.pt", weights_only=True)
    state["model"]["to_codes.weight"] *= -1
    torch.save(state, run / "last.pt")
    assert not tokens().indices.equal(changed)


def test_results_of_other_data_lie_apart(photographs, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_or_reason", lambda *_: (None, "none here"))
    data, before = (
        shutil.copytree(photographs / "images", tmp_path / "others"),
        files_of(run),
    )
    (data / "train" / "3.png").rename(data / "train" / "3a.png")
    evaluate.main([str(run), f"--data={data}"])
    synthesize.main([str(run), "tokens", f"--data={data}"])
    other = run / "other" / "others"
    assert set(files_of(other)) >= {
        "evaluation.json",
        "reconstructions.png",
        "tokens-val.npz",
    }
    assert {
        name: content
        for name, content in files_of(run).items()
        if name != "lock" and "other" not in name
    } == before
    assert json.loads((other / "evaluation.json").read_text())["config"]["data"] == str(
        data
    )
    flat = shutil.copytree(photographs / "images" / "val", tmp_path / "flat")
    assert (
        len(Run(run, data=flat).dataset("val")) == 8
    )  # none is held out of what did not train
    evaluate.main([str(run), f"--data={flat}"])
    results = json.loads((run / "other" / "flat" / "evaluation.json").read_text())
    assert results["images"] == 8
    moved = shutil.copytree(photographs / "images", tmp_path / "moved" / "images")
    evaluate.main([str(run), f"--data={moved}"])  # the same data set elsewhere
    assert "evaluation.json" in files_of(run)
    synthesize.main([str(run), *STAGE, "--steps=2"])
    synthesize.main([str(run), "sample", "--count=1", f"--data={data}"])
    assert list(run.rglob("samples.png")) == [
        other / "synthesis" / "gpt-none" / "samples.png"
    ]
    synthesize.main([str(run), "train", f"--data={moved}", "--resume", "--steps=3"])
    shutil.copy(data / "train" / "0.png", data / "train" / "one more.png")
    with pytest.raises(UserError, match="was trained on other images than these"):
        synthesize.main([str(run), "train", f"--data={data}", "--resume", "--steps=4"])
    lone = tmp_path / "lone"
    shutil.copytree(
        photographs / "images" / "val",
        lone,
        ignore=lambda folder, names: sorted(names)[1:],
    )
    monkeypatch.setattr(
        evaluate,
        "load_or_reason",
        lambda load, *_: (features if "inception" in str(load) else None, ""),
    )
    features = torch.nn.Sequential(
        T.ToDtype(torch.float32), torch.nn.AvgPool2d(16), torch.nn.Flatten()
    )
    evaluate.main([str(run), f"--data={lone}"])  # of one image, which has no covariance
    assert (
        json.loads((run / "other" / "lone" / "evaluation.json").read_text())["fid"]
        is None
    )


def test_a_second_stage_knows_the_classes_that_it_was_trained_with(
    photographs, run, tmp_path, capsys
):
    data, which = (
        tmp_path / "kinds",
        ["--condition=class", f"--data={tmp_path / 'kinds'}"],
    )
    for kind in "ab":
        for split in ("train", "val"):
            shutil.copytree(photographs / "images" / split, data / split / kind)
        if kind == "a":
            synthesize.main([str(run), *STAGE, *which, "--steps=2"])
            synthesize.main([str(run), "sample", *which, "--count=1"])
    for command in ("sample", "evaluate"):
        more = which if command == "sample" else which[1:]
        with pytest.raises(
            UserError,
            match="was trained with other classes than '.*kinds' has|no second stage",
        ):
            synthesize.main([str(run), command, *more])
    shutil.rmtree(data / "train" / "b"), shutil.rmtree(data / "val" / "b")
    elsewhere = [
        which[0],
        f"--data={data.rename(tmp_path / 'sorts')}",
    ]  # the same files, moved
    for words in (["sample", "--count=1"], ["train", "--resume", "--steps=4"]):
        synthesize.main([str(run), *words, *elsewhere])


def test_label_maps_among_photographs_are_no_photographs(photographs, tmp_path):
    data = tmp_path / "data"
    for kind in ("images", "maps"):
        shutil.copytree(photographs / kind, data / "train" / kind)
    shutil.copytree(photographs / "images" / "val", data / "val")
    records, _, classes = train.folder_records(data, data / "train" / "maps")
    assert {record.path.relative_to(data).parts[1] for record in records} == {"images"}
    assert classes == ["images/train", "images/val"]


def test_label_maps_that_moved_are_named_again(photographs, tmp_path, monkeypatch):
    out, maps = tmp_path / "run", shutil.copytree(photographs / "maps", tmp_path / "maps")
    train.main(flags(photographs, out, steps=2, labels=maps))
    moved, found = maps.rename(tmp_path / "moved"), []
    train.main([f"--out={out}", "--resume", "--steps=3", f"--labels={moved}"])
    monkeypatch.setattr(evaluate, "load_or_reason", lambda *_: (None, "none here"))
    statistics = evaluate.contents_of
    monkeypatch.setattr(
        evaluate,
        "contents_of",
        lambda run, *more: found.append(run.config.labels) or statistics(run, *more),
    )
    evaluate.main([str(out)])
    again = moved.rename(maps)
    evaluate.main([str(out)])  # which needs none
    evaluate.main([str(out), f"--labels={again}"])
    assert found == [str(moved), "", str(again)]
    for main, flag in (
        (train.main, [f"--out={out}", "--resume", "--steps=4"]),
        (evaluate.main, [str(out), "--labels=x"]),
    ):
        with pytest.raises(UserError, match="no such folder: '(.*moved|x)'"):
            main(flag)


@pytest.mark.parametrize(
    "condition, message",
    [
        ("class", "has nothing for --condition class"),
        (
            "segmentation",
            "has nothing for --condition segmentation; in a folder, sub-folders are",
        ),
    ],
)
def test_a_condition_that_the_data_lack_is_refused_before_encoding(
    photographs, run, tmp_path, capsys, condition, message
):
    data, words = tmp_path / "images", [*STAGE, f"--condition={condition}"]
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for path in (photographs / "images" / split).rglob("*.png"):
            shutil.copy(path, data / split)
    assert message in said(synthesize.main, capsys, [str(run), *words, f"--data={data}"])
    assert not list(run.glob("tokens-*"))


def test_evaluation_changes_nothing_and_repeats_itself(run, monkeypatch):
    before = files_of(run)
    monkeypatch.setattr(evaluate, "load_or_reason", lambda *_: (None, "none here"))
    after, again = (evaluate.main([str(run)]) or files_of(run) for _ in range(2))
    assert {name for name in after if after[name] != before.get(name)} == {
        "evaluation.json",
        "reconstructions.png",
    }
    assert again == after


def test_a_run_in_another_thread_leaves_signals_alone(
    photographs, whole, tmp_path, capsys
):
    before, out = signal.getsignal(signal.SIGINT), tmp_path / "my run"
    with ThreadPoolExecutor() as pool:  # as a server has
        pool.submit(train.main, flags(photographs, out)).result()
    assert signal.getsignal(signal.SIGINT) == before
    assert_same_run(whole, out)
    assert capsys.readouterr().out.endswith(
        f"measure with: python evaluate.py '{out}'\n"
    )  # as a shell reads it
