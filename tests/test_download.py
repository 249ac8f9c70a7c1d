"""From nothing to a run: everything that a command needs is downloaded from a server on this machine.

The server holds small archives in the published formats. An opener leads every published address to it.
"""

import hashlib
import io
import json
import shlex
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from PIL import Image

import evaluate
import prior as prior_module
import train
from conftest import ROOT, SHARED
from prior import Prior, UserError, describe_codebook

ADJECTIVES = "red orange yellow blue green brown black white gray small large long short".split()
NOUNS = "bird breast belly wing beak tail crown back leg eye head".split()
ORDERED = "--dataset cub --download --device cuda"  # the README's command
ONE_STEP = (
    "--device cpu --steps 1 --resolution 32 --batch-size 1 --channels 32".split()
)  # as no GPU is at hand


def archive_of(files, kind):
    """A zip or tgz of {name: bytes}."""
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in files.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(fileobj=content, mode="w:gz") as packed:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                packed.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def saved(state):
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def jpeg(seed, size=(64, 48)):
    content, rng = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size).save(content, "JPEG")
    return content.getvalue()


def captions(rows, ending="."):
    """COCO's captions, of which some have newlines and outer spaces, as the published ones have."""
    texts = [
        f"A {adjective} {noun} near a {noun}{ending}" for adjective in ADJECTIVES for noun in NOUNS
    ] * rows
    annotations = [
        {"image_id": 1 + i % 2, "id": i, "caption": (" {}\n" if i % 9 == 0 else "{}").format(text)}
        for i, text in enumerate(texts)
    ]
    images = [{"id": i, "file_name": f"{i:012}.jpg", "license": 1} for i in (1, 2)]
    return json.dumps(
        {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    ).encode()


def cub():
    """CUB-200-2011's archive: four photographs, the tables, and the attributes."""
    names = [f"{n:03}.Bird_{n}/Bird_{n}_{i:04}.jpg" for n in (1, 2) for i in (1, 2)]
    table = lambda values: "".join(f"{i} {value}\n" for i, value in enumerate(values, 1)).encode()
    facts = ["has_wing_color::blue", "has_bill_shape::dagger", "has_breast_pattern::striped"]
    marks = "".join(
        f"{image} {fact} {int(fact != 2)} 3 1.5\n" for image in range(1, 5) for fact in (1, 2, 3)
    )
    tables = {
        "images.txt": table(names),
        "train_test_split.txt": table([1, 0, 1, 0]),
        "image_class_labels.txt": table([1, 1, 2, 2]),
        "classes.txt": table(["001.Bird_1", "002.Bird_2"]),
        "attributes/image_attribute_labels.txt": marks.encode(),
    }
    photographs = {f"images/{name}": jpeg(i) for i, name in enumerate(names)}
    tree = {f"CUB_200_2011/{name}": data for name, data in {**tables, **photographs}.items()}
    return archive_of({**tree, "attributes.txt": table(facts)}, "tgz")


def clip():
    """CLIP's vocabulary, and those of its weights that a prior reads, in Hugging Face's format."""
    words = [f"{word}</w>" for word in ("a", "photo", "of", "object", *ADJECTIVES, *NOUNS)]
    tokens = [
        *words,
        *(f"part{i}" for i in range(49406 - len(words))),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    table = torch.randn(49408 + 511).unfold(
        0, 512, 1
    )  # rows that share their memory, so that the file is small
    state = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "logit_scale": torch.tensor(4.6),
        "text_model.embeddings.token_embedding.weight": table,
    }
    return json.dumps({token: row for row, token in enumerate(tokens)}).encode(), saved(state)


def nltk_files():
    """NLTK's index and its three packages, zipped as published."""
    files, packages = {}, []
    base = "raw.githubusercontent.com/nltk/nltk_data/gh-pages"
    for path in prior_module.NLTK_RESOURCES:
        kind, name, _ = path.split("/")
        source = SHARED / "nltk_data" / kind
        if (source / f"{name}.zip").is_file():
            data = (source / f"{name}.zip").read_bytes()
        else:
            tree = [file for file in (source / name).rglob("*") if file.is_file()]
            data = archive_of(
                {str(file.relative_to(source)): file.read_bytes() for file in tree}, "zip"
            )
        files[f"/{base}/packages/{kind}/{name}.zip"] = data
        unzipped = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(data)).infolist())
        packages.append(
            f'<package id="{name}" name="{name}" subdir="{kind}" unzip="1" size="{len(data)}" '
            f'unzipped_size="{unzipped}" url="https://{base}/packages/{kind}/{name}.zip" '
            f'checksum="{hashlib.md5(data).hexdigest()}" '
            f'sha256_checksum="{hashlib.sha256(data).hexdigest()}"/>'
        )
    files[f"/{base}/index.xml"] = (
        f"<nltk_data><packages>{''.join(packages)}</packages></nltk_data>".encode()
    )
    return files


class Led(urllib.request.HTTPHandler):
    """Leads every address to the server: https://host/path to its /host/path."""

    handler_order = 1

    def __init__(self, server):
        super().__init__()
        self.server = server

    def http_open(self, request):
        request.selector = f"/{request.host}{request.selector}"
        request.host = self.server.url.removeprefix("http://")
        return super().http_open(request)

    https_open = http_open


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """The server with all published files and their digests; an empty home and working directory."""
    if not (SHARED / "nltk_data").is_dir():
        pytest.skip("no NLTK data on this machine")
    home, sha256 = tmp_path / "home", lambda data: hashlib.sha256(data).hexdigest()
    for name, value in {
        "HOME": home,
        "TORCH_HOME": home / "torch",
        "NLTK_DATA": home / "none",
    }.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("nltk.data.path", [str(home / "nltk_data")])
    omw = LazyCorpusLoader("omw-2.0", CorpusReader, r".*")
    monkeypatch.setattr(
        "nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, omw)
    )  # not read yet
    monkeypatch.setattr("nltk.downloader._downloader._index", None)
    monkeypatch.setattr("nltk.downloader._downloader._download_dir", str(home / "nltk_data"))
    monkeypatch.setattr("nltk.downloader._downloader._status_cache", {})
    monkeypatch.setattr(
        "nltk.downloader.urlopen", urllib.request.urlopen
    )  # its own refuses this machine
    monkeypatch.setattr(urllib.request, "_opener", urllib.request.build_opener(Led(server)))

    def serve(url, data):
        server.files["/" + url.partition("://")[2]] = data

    server.files.update(nltk_files())
    for (name, (size, _)), data in zip(list(prior_module.CLIP_FILES.items()), clip()):
        serve(prior_module.CLIP_URL + name, data)
        monkeypatch.setitem(prior_module.CLIP_FILES, name, (size, sha256(data)))
    with torch.device("meta"):
        shapes = {
            name: x.shape for name, x in torchvision.models.vgg16(weights=None).state_dict().items()
        }
    trunk = saved(
        {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    )  # a small file
    url = train.LPIPS_FILES["vgg"][0].replace("397923af", sha256(trunk)[:8])
    heads = saved(
        {
            f"lin{i}.model.1.weight": torch.ones(1, width, 1, 1) / width
            for i, width in enumerate((64, 128, 256, 512, 512))
        }
    )
    serve(url, trunk)
    serve(train.HEADS_URL.format("vgg"), heads)
    monkeypatch.setitem(train.LPIPS_FILES, "vgg", (url, "528 MB", sha256(heads)))
    coco = {
        name: captions(1 + number, "" if number else ".")
        for number, name in enumerate(train.COCO_CAPTIONS)
    }
    ade = {
        f"ADEChallengeData2016/{kind}/{split}/ADE_{split[:5]}_{i:08}.{suffix}": jpeg(i)
        for kind, suffix in (("images", "jpg"), ("annotations", "png"))
        for split in ("training", "validation")
        for i in (1, 2)
    }
    scenes = "".join(f"{Path(name).stem} street\n" for name in ade if name.endswith("jpg"))
    ade["ADEChallengeData2016/sceneCategories.txt"] = scenes.encode()
    trees = {
        "cub": [cub()],
        "captions": [archive_of(coco, "zip")],
        "ade20k": [archive_of(ade, "zip")],
        "coco": [
            archive_of({f"{name}/{i:012}.jpg": jpeg(i) for i in (1, 2)}, "zip")
            for name in ("train2017", "val2017")
        ],
    }
    for dataset, contents in trees.items():
        rows = [list(row) for row in train.ARCHIVES[dataset]]
        for row, content in zip(rows, contents, strict=True):
            serve(row[2], content)
            row[3] = hashlib.md5(content).hexdigest()
        monkeypatch.setitem(train.ARCHIVES, dataset, rows)
    return server


def words_of(dataset, *more):
    """The README's command for a data set, on this machine and for one step."""
    return [
        word
        for word in shlex.split(ORDERED.replace("cub", dataset))
        if word not in ("--device", "cuda")
    ] + [*ONE_STEP, *more]


def test_the_readme_has_the_ordered_command():
    assert f"python train.py {ORDERED}\n" in (ROOT / "README.md").read_text()


def download_all(words):
    """What a command downloads before it does anything else."""
    config, _, _ = train.parse(words)
    prior_module.provide(train.needs(config, with_prior=True), True, "")
    return config


def test_the_ordered_command_goes_from_nothing_to_a_run(published, capsys):
    (archive,) = (path for path in published.files if path.endswith("CUB_200_2011.tgz"))
    whole = published.files[archive]
    published.files[archive] = whole[: len(whole) // 2]  # the connection breaks
    with pytest.raises(
        UserError, match="CUB_200_2011.tgz is unavailable: .*; run the command again"
    ):
        train.main(words_of("cub"))
    published.files[archive] = whole
    train.main(words_of("cub"))
    printed = capsys.readouterr().out
    assert (
        "codebook of data/cub-clip.npz: 13 adjectives + 11 nouns, 7.2 bits per position (the authors: "
        in printed
    )
    assert "done: look into" in printed
    prior = Prior.load("data/cub-clip.npz")
    assert (
        set(prior.adjective_words) == {*ADJECTIVES}
        and set(prior.noun_words) == {*NOUNS}
        and prior["edges"].any()
    )
    assert prior.noun_vectors.shape == (11, 512)
    asked = [path for path, _ in published.requests if not path.endswith("index.xml")]
    assert asked.count(archive) == 2 and len(asked) == len({*asked}) + 1  # each other file once
    published.files.clear()  # the server is gone, and nothing is missing
    published.requests.clear()
    train.main(words_of("cub", "--overwrite"))
    printed = capsys.readouterr().out
    assert (
        not published.requests
        and "codebook of data/cub-clip.npz" in printed
        and "making" not in printed
    )


def test_the_other_data_sets_take_cocos_captions(published, capsys):
    for dataset in ("ade20k", "coco"):
        config = download_all(words_of(dataset))
        images, _ = train.make_datasets(config)
        train.make_prior(config, images)
        assert len(images) == 2
        printed = capsys.readouterr().out
        assert f"codebook of data/{dataset}-clip.npz: 13 adjectives + 11 nouns" in printed


@pytest.mark.parametrize(
    "cut",
    ["vocab.json", "pytorch_model.bin", "annotations_trainval2017.zip", "vgg.pth", "wordnet.zip"],
)
def test_a_download_that_is_cut_is_one_line_and_works_when_run_again(published, cut):
    ((path, whole),) = (
        (path, data) for path, data in published.files.items() if path.endswith(cut)
    )
    published.files[path] = whole[: len(whole) // 2]
    with pytest.raises(UserError, match=r"unavailable: .*; run the command again") as failure:
        download_all(words_of("cub"))
    assert "\n" not in str(failure.value)
    published.files[path] = whole
    download_all(words_of("cub"))
    asked = [path for path, _ in published.requests if not path.endswith("index.xml")]
    assert (
        asked.count(path) == 2 and len(asked) == len({*asked}) + 1
    )  # nothing else was downloaded twice


def test_without_download_one_message_lists_all_that_is_missing(published, capsys):
    words = words_of("cub")
    words.remove("--download")
    with pytest.raises(UserError) as failure:
        train.main(words)
    first, *listed, last = str(failure.value).removeprefix("missing: ").split("\n  ")
    listed.insert(0, first)
    assert last == "to download: add --download"
    for name, size, local in (
        ("NLTK's tagger, tokenizer and WordNet", "17 MB", "NLTK_DATA=DIR"),
        ("CLIP's vocab.json", "0.9 MB", "--weights"),
        ("CLIP's pytorch_model.bin", "605 MB", "--weights DIR"),
        ("COCO's captions", "241 MB", "data/coco/annotations"),
        ("LPIPS's trunk", "528 MB", "--trunk-weights FILE"),
        ("LPIPS's heads", "7 kB", "--lpips-weights FILE"),
        ("CUB-200-2011", "1.1 GB", "--data DIR"),
    ):
        (line,) = [line for line in listed if line.startswith(name)]
        assert f" ({size}): " in line and ", or use a local copy: " in line and local in line, line
    assert len(listed) == 7 and not published.requests and not list(ROOT.cwd().iterdir())


def test_any_photographs_take_the_papers_prior(published, tmp_path, capsys):
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    for index in range(20):
        (holiday / f"{index}.jpg").write_bytes(jpeg(index))
    config = download_all(words_of("folder", "--data", str(holiday)))

    def printed():
        train.make_prior(config, train.make_datasets(config)[0])
        return capsys.readouterr().out

    path = "data/holiday-clip.npz"
    assert f"making '{path}' of 429 captions, 0 of them the data set's\n" in printed()
    assert printed().startswith(f"codebook of {path}: 13 adjectives + 11 nouns")
    for index in range(12):
        (holiday / f"{index}.txt").write_text("a striped bird with a purple throat\n")
    assert "of 440 captions, 11 of them the data set's\n" in printed()
    assert printed().startswith(f"codebook of {path}: ")

    other = Prior.load(path)  # of another option
    other.provenance["made_from"]["min_count"] = 100
    other.save(path)
    assert f"making '{path}'" in printed()
    open(path, "wb").write(b"cut")
    assert f"making '{path}'" in printed()
    assert printed().startswith(f"codebook of {path}: ")


def test_prior_downloads_without_a_corpus_and_evaluate_its_weights(published, monkeypatch):
    with pytest.raises(SystemExit):
        prior_module.main([])
    prior_module.main(["--download"])
    assert prior_module.NLTKData().present() and all(
        need.present() for need in prior_module.clip_needs()
    )
    (ROOT.cwd() / "last.pt").touch()
    with pytest.raises(UserError, match="pt_inception-2015-12-05-6726825d.pth is unavailable"):
        evaluate.main([".", "--download"])


def test_a_codebook_is_described_beside_the_authors(prior):
    text = describe_codebook(prior)
    assert text.startswith("7 adjectives + 9 nouns, 6.0 bits per position (the authors: 1,949 ")
    assert text.endswith(", 23.0 bits)")


def test_an_archive_that_lies_there_is_verified_too(published):
    (archive,) = train.archives("cub", ROOT.cwd() / "data" / "CUB_200_2011")
    archive.file.parent.mkdir()
    archive.file.write_bytes(b"half of it")
    archive.fetch()
    assert archive.present() and len(published.requests) == 1


def test_the_folder_of_photographs_is_looked_for_before_anything_is_downloaded(published):
    with pytest.raises(UserError, match="no such folder: '.*absent'"):
        train.main([*words_of("folder"), "--data", "absent"])
    assert not published.requests
