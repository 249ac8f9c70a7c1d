"""Images on disk: published layouts, broken files, downloads, priors of captions."""

import functools
import io
import json
import multiprocessing
import os
import resource
import shutil
import tarfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, PngImagePlugin

import train as train_module
from conftest import SHARED
from prior import UserError, build_prior, command, modifying_pairs, provide
from test_train import CPU, few_birds_and_a_folder_of_its_own  # noqa: F401, a fixture
from train import (
    ARCHIVES,
    COCO_CAPTIONS,
    CUB_TABLES,
    DATASETS,
    FACE_PARTS,
    Config,
    ImageDataset,
    Record,
    archives,
    check_images,
    cub_sentences,
    folder_records,
    hold_out,
    identity,
    make_datasets,
    make_loader,
    make_prior,
    resolve,
    to_images,
    train_batches,
)


def pixels(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path, **options)
    return path


def photograph(path, size=(48, 40), seed=0):
    """Smooth colours, so that a JPEG decoded at a fraction of its size still looks the same."""
    small = Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    )
    return pixels(path, small.resize(size, Image.Resampling.BICUBIC), quality=95)


def write(folder, **files):
    """Text files of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def config(dataset, root, **more):
    return resolve(
        {
            "dataset": dataset,
            "data": str(root),
            "preset": "tiny",
            "resolution": 32,
            **more,
        }
    )


def split_of(dataset, root, split="val", **more):
    """A split with its label maps."""
    made = make_datasets(config(dataset, root, **more))[split == "val"]
    made.with_segmentation = True
    return made


def images_at(resolution, *paths, seed=0, **known):
    return ImageDataset([Record(path, **known) for path in paths], [], resolution, seed)


def captions_in(dataset):
    return [list(dataset.captions_of(index)) for index in range(len(dataset))]


def names_in(dataset):
    return [record.path.name for record in dataset.records]


# ======== Genuine layouts in miniature


def test_every_layout_is_a_choice_of_the_flag():
    assert Config.__dataclass_fields__["dataset"].metadata["choices"]() == (
        "demo",
        "folder",
        *DATASETS,
    )
    for name, layout in DATASETS.items():
        assert resolve({"dataset": name}).data == f"data/{layout.folder}"
        with pytest.raises(
            UserError,
            match=f"no .* in 'data/{layout.folder}': point --data at the published folder",
        ):
            make_datasets(resolve({"dataset": name}))


@pytest.fixture
def ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for folder, name, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(1, count + 1):
            photograph(root / "images" / folder / f"ADE_{name}_{i:08d}.jpg", seed=i)
            pixels(
                root / "annotations" / folder / f"ADE_{name}_{i:08d}.png",
                np.full((40, 48), 149 + i % 2),
            )
        (root / "images" / folder / f"._ADE_{name}_00000001.jpg").write_bytes(
            b"left by another system"
        )
    write(
        root,
        sceneCategories=[
            "ADE_train_00000001 street",
            "ADE_train_00000002 beach",
            "ADE_val_00000001 street",
        ],
    )
    return root


def test_ade20k(ade20k):
    train, dataset = split_of("ade20k", ade20k, "train"), split_of("ade20k", ade20k)
    assert train.classes == ["beach", "street"]
    assert [record.label for record in train.records] == [1, 0, -1]
    item = dataset[0]
    assert len(dataset) == 2
    assert item["label"] == 1
    assert item["segmentation"].unique().tolist() == [150]
    assert item["segmentation"].shape == (32, 32)


@pytest.fixture(params=["header", "no header"])
def celebahq(request, tmp_path):
    """As published, masks are RGB, white on black, and half as wide as the images."""
    root, lines = (
        tmp_path / "CelebAMask-HQ",
        ["idx             orig_idx        orig_file"],
    )
    skin, hair, eye = np.zeros((3, 32, 32, 3))
    skin[8:], hair[:16], eye[20:24, 20:24] = 255, 255, 255
    for i, original in enumerate((5, 162_770, 162_771, 182_637, 182_638, 202_598)):
        photograph(root / "CelebA-HQ-img" / f"{i}.jpg", (64, 64), seed=i)
        lines.append(f"{i:<16d}{original:<16d}{original + 1:06d}.jpg")
        for part, mask in (
            dict(hair=hair, skin=skin, l_eye=eye, r_eye=eye[:, ::-1]).items()
            if i != 2
            else ()
        ):
            pixels(root / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05d}_{part}.png", mask)
    (root / "CelebAMask-HQ-mask-anno" / "0" / "._00003_hair.png").write_bytes(
        b"left by another system"
    )
    lines = lines[
        request.param == "no header" :
    ]  # its authors say: "remove 1st line in advance"
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n\n")
    return root


def test_celebahq(celebahq):
    train, val = split_of("celebahq", celebahq, "train"), split_of("celebahq", celebahq)
    assert (names_in(train), names_in(val)) == (["0.jpg", "1.jpg"], ["2.jpg", "3.jpg"])
    assert not val[0]["segmentation"].any()
    hair, skin, left, right = (
        FACE_PARTS.split().index(part) + 1 for part in ("hair", "skin", "l_eye", "r_eye")
    )
    assert (
        val[1]["segmentation"][:, 16].tolist() == [hair] * 16 + [skin] * 16
    )  # hair is painted over the skin
    assert val[1]["segmentation"][22, [10, 21]].tolist() == [
        right,
        left,
    ]  # the person's left is on the right


def test_a_flipped_face_keeps_its_left_eye_on_the_right(celebahq):
    train = split_of("celebahq", celebahq, "train")
    items = [train[0, draw] for draw in range(20)]
    flipped = [not torch.equal(item["image"], train[0]["image"]) for item in items]
    assert 4 < sum(flipped) < 16  # the crop is the whole picture
    assert all(
        torch.equal(item["segmentation"], train[0]["segmentation"]) for item in items
    )  # which is symmetric


def test_coco(tmp_path):
    root, numbers = tmp_path / "coco", {"train": (9, 25, 30), "val": (139, 285)}
    (root / "annotations").mkdir(parents=True)
    for split in numbers:
        for i, n in enumerate(numbers[split]):
            photograph(root / f"{split}2017" / f"{n:012d}.jpg", (90, 60), seed=i)
            pixels(
                root / "stuffthingmaps" / f"{split}2017" / f"{n:012d}.png",
                np.full((60, 90), 255 if i else 181),
            )
        (root / f"{split}2017" / "._000000000139.jpg").write_bytes(
            b"left by another system"
        )
        said = [
            (n, f"A bus of {n}.{end}") for end in ("", " ", "\n") for n in numbers[split]
        ]  # as they end there
        captions = [
            {"image_id": n, "id": i, "caption": text} for i, (n, text) in enumerate(said)
        ]
        captions[0]["caption"] = captions[0]["caption"].replace(" of ", "\nof ")
        content = {"info": {"year": 2017}, "licenses": [], "annotations": captions}
        content["images"] = [
            {"id": n, "file_name": f"{n:012d}.jpg", "width": 90} for n in numbers[split]
        ]
        (root / "annotations" / f"captions_{split}2017.json").write_text(
            json.dumps(content)
        )
    train, val = split_of("coco", root, "train"), split_of("coco", root)
    assert names_in(train) == [f"{number:012d}.jpg" for number in numbers["train"]]
    assert captions_in(train) == [
        [f"A bus of {number}."] * 3 for number in numbers["train"]
    ]
    assert [val[i]["segmentation"].unique().tolist() for i in range(2)] == [[181], [-1]]
    (root / "annotations" / "captions_val2017.json").write_text('{"images": []}')
    with pytest.raises(
        UserError, match="captions_val2017.json' is not COCO's captions file"
    ):
        split_of("coco", root)
    (root / "val2017").rename(root / "val2014")
    with pytest.raises(UserError, match="no val2017"):  # most of val2014 is in train2017
        split_of("coco", root)


@pytest.fixture
def cub(tmp_path):
    root, numbers = tmp_path / "CUB_200_2011", range(1, 13)
    names = [f"00{c}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (1, 2) for i in range(6)]
    for i, name in enumerate(names):
        photograph(root / "images" / name, seed=i)
    write(
        root,
        images=[f"{i} {name}" for i, name in zip(numbers, names)],
        classes=["1 001.Bird_1", "2 002.Bird_2"],
    )
    write(root, train_test_split=[f"{i} {int(i % 3 > 0)}" for i in numbers])
    write(root, image_class_labels=[f"{i} {1 + (i > 6)}" for i in numbers])
    return root


ATTRIBUTES = """
    has_bill_shape::curved_(up_or_down) has_wing_color::blue
    has_tail_shape::forked_tail has_upper_tail_color::white
    has_primary_color::red has_size::small_(5_-_9_in)
    has_wing_shape::rounded-wings has_head_pattern::unique_pattern
    has_shape::long-legged-like""".split()


def add_attributes(root, place):
    write(
        root / place,
        attributes=[f"{number} {name}" for number, name in enumerate(ATTRIBUTES, 1)],
    )
    rows = [
        f"{image} {a} {int((image + a) % 3 > 0)} 3 7.5"
        for image in range(1, 13)
        for a in range(1, 10)
    ]
    write(root / "attributes", image_attribute_labels=rows)


@pytest.mark.parametrize("name", CUB_TABLES[:3])
@pytest.mark.parametrize("left", ["<html>\n<body>no</body>\n", "1 1\n2"])
def test_damaged_tables_are_a_line(cub, name, left):
    (cub / name).write_text(left)
    with pytest.raises(UserError, match="are inconsistent|cannot be read"):
        split_of("cub", cub, "train")


def test_cub_layout_split_and_captions(cub):
    train, val = split_of("cub", cub, "train"), split_of("cub", cub)
    assert train.classes == ["001.Bird_1", "002.Bird_2"]
    assert [r.label for r in train.records] == [0] * 4 + [1] * 4
    assert names_in(val) == [f"Bird_{c}_{i}.jpg" for c in (1, 2) for i in (2, 5)]
    assert captions_in(val) == [[]] * 4


@pytest.mark.parametrize("place", [".", "..", "attributes"])
def test_cubs_attributes_stand_in_for_captions(cub, place):
    add_attributes(cub, place)
    first = [
        "its bill is curved",
        "its tail is forked",
        "its tail is white",
        "the bird is small",
        "its wings are rounded",
    ]
    second = [
        "its wings are blue",
        "its tail is forked",
        "the bird is red",
        "the bird is small",
        "its head is unique",
    ]
    expected = [
        [*facts, "the bird is long-legged"] for facts in (first, second)
    ]  # 1 3 4 6 7 9; 2 3 5 6 8 9
    assert captions_in(split_of("cub", cub, "train"))[:2] == expected


@pytest.mark.parametrize(
    "folder", ["text", "text_c10"]
)  # as it is often renamed, and as published
def test_captions_take_the_place_of_cubs_attributes(cub, folder):
    add_attributes(cub, ".")
    write(cub / folder / "001.Bird_1", Bird_1_0=["a small bird", "its belly is white"])
    assert (
        captions_in(split_of("cub", cub, "train"))
        == [["a small bird", "its belly is white"]] + [[]] * 7
    )


def attributes_of_cub():
    """The names of all 312 attributes."""
    colours = """blue brown iridescent purple rufous grey yellow olive green pink orange
        black white red buff"""
    coloured = """wing upperparts underparts back upper_tail breast throat forehead
        under_tail nape belly primary leg bill crown"""
    patterned = "breast back tail belly wing"
    values = {
        **{f"{part}_color": colours for part in coloured.split()},
        "eye_color": colours.replace("iridescent ", ""),
        **{
            f"{part}_pattern": "solid spotted striped multi-colored"
            for part in patterned.split()
        },
        "bill_shape": """curved_(up_or_down) dagger hooked needle hooked_seabird
            spatulate all-purpose cone specialized""",
        "bill_length": "about_the_same_as_head longer_than_head shorter_than_head",
        "tail_shape": """forked_tail rounded_tail notched_tail fan-shaped_tail
            pointed_tail squared_tail""",
        "head_pattern": """spotted malar crested masked unique_pattern eyebrow eyering
            plain eyeline striped capped""",
        "wing_shape": """rounded-wings pointed-wings broad-wings tapered-wings
            long-wings""",
        "size": """large_(16_-_32_in) small_(5_-_9_in) very_large_(32_-_72_in)
            medium_(9_-_16_in) very_small_(3_-_5_in)""",
        "shape": """upright-perching_water-like chicken-like-marsh long-legged-like
            duck-like owl-like gull-like hummingbird-like pigeon-like
            tree-clinging-like hawk-like sandpiper-like upland-ground-like
            swallow-like perching-like""",
    }
    return [
        f"has_{group}::{value}"
        for group, listed in values.items()
        for value in listed.split()
    ]


def test_every_attribute_of_cub_is_a_pair_or_left_out(tmp_path, speech):
    names, left_out = attributes_of_cub(), []
    write(
        tmp_path, attributes=[f"{number} {name}" for number, name in enumerate(names, 1)]
    )
    write(
        tmp_path / "attributes",
        image_attribute_labels=[f"{number} {number} 1 3 7.5" for number in range(1, 313)],
    )
    sentences = cub_sentences(tmp_path)
    for number, name in enumerate(names, 1):
        for sentence in sentences.get(str(number), ()):
            (pair,) = (
                pair for tokens in speech(sentence) for pair in modifying_pairs(tokens)
            )
            assert pair == (sentence.split()[-1], sentence.split()[1].removesuffix("s"))
        left_out += [] if str(number) in sentences else [name.split("::")[1]]
    assert len(names) == 312
    assert len(left_out) == 21
    assert {word for word in left_out if not word.endswith(("-like", "-marsh"))} == set(
        "dagger needle cone malar eyebrow eyering eyeline about_the_same_as_head".split()
    )


def test_the_prior_is_the_papers_or_the_one_that_is_named(
    cub, speech, prior, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    few = functools.partial(build_prior, speech=speech, embeddings="corpus", min_count=1)
    monkeypatch.setattr(train_module, "build_prior", few)
    for name in COCO_CAPTIONS:
        path = tmp_path / "data" / "coco" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"annotations": [{"caption": "a green meadow"}] * 3}))
    add_attributes(cub, ".")
    dataset = split_of("cub", cub, "train")
    made = make_prior(config("cub", cub), dataset)
    assert {"curved", "white", "green"} <= set(made.adjective_words)
    assert {"tail", "meadow"} <= set(made.noun_words)
    assert made.provenance["captions"] == 6 + sum(map(len, captions_in(dataset)))
    prior.save(tmp_path / "words.npz")
    assert make_prior(
        config("cub", cub, prior="words.npz"), dataset
    ).noun_words.tolist() == list("ABCDEFGHI")
    shuffled = make_prior(
        config("cub", cub, prior="words.npz", shuffle="vectors", seed=3), dataset
    )
    assert (
        sorted(shuffled.noun_vectors[:, 0])
        == sorted(prior.noun_vectors[:, 0])
        != list(shuffled.noun_vectors[:, 0])
    )


def test_folder_of_images_with_classes_captions_and_label_maps(tmp_path):
    for i in range(10):
        name = f"{'red' if i < 5 else 'blue'}/{i}.png"
        pixels(tmp_path / "data" / name, np.full((16, 20, 3), (i, 0, 0)))
        pixels(tmp_path / "maps" / name, np.full((16, 20), i))
    write(tmp_path / "data" / "red", **{"3": ["a red thing"]})
    dataset, held_out = (
        split_of("folder", "data", split, labels="maps") for split in ("train", "val")
    )
    assert dataset.classes == held_out.classes == ["blue", "red"]
    assert (len(dataset), len(held_out)) == (9, 1)
    assert not set(names_in(dataset)) & set(names_in(held_out))
    assert [caption for captions in captions_in(dataset) for caption in captions] == [
        "a red thing"
    ]
    for index in range(9):
        item = dataset[index]
        assert (item["segmentation"] == item["image"][0]).all()
        assert item["segmentation"].dtype == torch.int64
        assert dataset.classes[item["label"]] == dataset.records[index].path.parent.name
    assert (
        "segmentation" not in make_datasets(config("folder", "data", labels="maps"))[0][0]
    )


def test_folder_with_splits_of_its_own(tmp_path):
    for path in (
        *(f"train/{c}/{i}.png" for c in "ab" for i in range(6)),
        "val/c/0.png",
        "val/1.png",
    ):
        photograph(tmp_path / path)
    train, val, classes = folder_records(tmp_path)
    assert len(train) == 12
    assert [record.label for record in val] == [
        -1,
        2,
    ]  # a class of either split is one of both
    assert classes == ["a", "b", "c"]
    (tmp_path / "unlabeled").mkdir()
    assert folder_records(tmp_path)[1] == val
    (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(UserError, match="name the folders of both splits"):
        folder_records(tmp_path)


def test_hidden_images_are_none_and_linked_folders_are_classes(tmp_path):
    for name in (
        "cats/1.jpg",
        "cats/.thumbnails/1.jpg",
        "cats/._1.jpg",
        "__MACOSX/cats/1.jpg",
        ".Trash-0/2.jpg",
    ):
        photograph(tmp_path / "data" / name)
    for i in range(9):
        photograph(tmp_path / "elsewhere" / f"{i}.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "dogs")
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    train, val, classes = folder_records(tmp_path / "data")
    assert classes == ["cats", "dogs"]
    assert [record.label for record in train + val] == [0] + [1] * 9


def test_a_tree_is_listed_once_for_both_splits(tmp_path, monkeypatch):
    for i in range(20):
        photograph(tmp_path / "data" / f"{i}.jpg")
    listed, whole = [], train_module.list_files
    monkeypatch.setattr(
        train_module,
        "list_files",
        lambda root, *more: listed.append(root) or whole(root, *more),
    )
    assert list(map(len, make_datasets(config("folder", tmp_path / "data")))) == [18, 2]
    assert listed == [tmp_path / "data"]


def test_a_folder_that_is_not_there_is_named_and_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in range(10):
        photograph(tmp_path / "data" / f"{i}.jpg")
    assert len(split_of("folder", "~/data", "train")) == 9
    with pytest.raises(UserError, match="^no such folder: 'nowhere'"):
        split_of("folder", "~/data", labels="nowhere")
    for name in ("absent", "data/0.jpg"):
        with pytest.raises(
            UserError, match=f"^no such folder: '{tmp_path / name}'"
        ):
            split_of("folder", f"~/{name}")


@pytest.mark.skipif(
    not (SHARED / "CUB_200_2011").is_dir(), reason="no photographs on this machine"
)
def test_the_real_cub_folder():
    train, val = (
        split_of("cub", SHARED / "CUB_200_2011", split) for split in ("train", "val")
    )
    assert (
        len(train),
        len(val),
        len(train.classes),
        sum(map(bool, captions_in(train))),
    ) == (1500, 1389, 200, 300)
    assert train[17]["image"].shape == (3, 32, 32)
    assert train[17]["image"].float().std() > 10


@pytest.mark.skipif(
    not (SHARED / "camvid").is_dir(), reason="no segmentation set on this machine"
)
def test_the_real_segmentation_set():
    images, maps = SHARED / "camvid" / "images", str(SHARED / "camvid" / "annotations")
    train, val = (
        split_of("folder", images, split, labels=maps) for split in ("train", "val")
    )
    assert [len(train), len(val)] == [
        len(list((images / split).iterdir())) for split in ("train", "val")
    ]
    values = (
        torch.cat([val[i]["segmentation"].unique() for i in range(0, len(val), 10)])
        .unique()
        .tolist()
    )
    assert set(values) <= set(range(12))
    assert len(values) > 6  # labels, not mixtures of labels


# ======== Reading: broken files, large photographs, orientation, crops, order


@pytest.mark.parametrize("kind", ["image", "label map"])
def test_a_broken_file_is_named_when_it_is_read(ade20k, kind, capsys, monkeypatch):
    dataset = split_of("ade20k", ade20k)
    path = dataset.records[1].path if kind == "image" else dataset.records[1].segmentation
    for content in (b"nothing", path.read_bytes()[: path.stat().st_size // 2], None):
        path.write_bytes(content) if content else path.unlink()
        assert dataset[0]["image"].shape == (3, 32, 32)
        with pytest.raises(UserError, match=f"{kind} '.*{path.name}' cannot be read: "):
            dataset[1]
    monkeypatch.setattr(
        "signal.signal", lambda number, handler: None
    )  # pytest keeps its own
    with pytest.raises(SystemExit) as ended:  # and a worker's error is a line too
        command(lambda: list(make_loader(dataset, CPU, 1)))
    for worker in multiprocessing.active_children():
        worker.kill()  # torch would wait five seconds for it
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith(f"error: {kind} '")
    assert f"{path.name}' cannot be read: " in line
    pixels(dataset.records[0].segmentation, np.zeros((40, 48, 3)))  # RGB
    with pytest.raises(
        UserError,
        match="ADE_val_00000001.png' cannot be read: it is not one channel of whole numbers",
    ):
        dataset[0]


@pytest.mark.parametrize(
    "shape, fits",
    [((40, 48), True), ((20, 24), True), ((27, 33), True), ((48, 40), False)],
)
def test_a_label_map_of_other_proportions_is_refused(ade20k, shape, fits):
    """Maps for 48 × 40 pixels: whole, half, two thirds as rounded, and turned."""
    dataset = split_of("ade20k", ade20k)
    pixels(dataset.records[0].segmentation, np.full(shape, 3))
    if fits:
        assert dataset[0]["segmentation"].unique().tolist() == [3]
    else:
        with pytest.raises(
            UserError,
            match="ADE_val_00000001.png' cannot be read: its 40×48 pixels have other prop",
        ):
            dataset[0]


@pytest.mark.parametrize("dtype, void", [(np.uint8, 255), (np.uint16, 65_535)])
def test_the_largest_number_of_a_label_map_is_no_label(tmp_path, dtype, void):
    values = np.full((16, 16), void - 1, dtype)
    values[8:] = void
    Image.fromarray(values).save(tmp_path / "map.png")
    dataset = images_at(
        16, photograph(tmp_path / "x.jpg", (16, 16)), segmentation=tmp_path / "map.png"
    )
    dataset.with_segmentation = True
    assert dataset[0]["segmentation"][:, 3].tolist() == [void - 1] * 8 + [-1] * 8


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 98}]
)
def test_a_jpeg_without_its_end_is_read_and_a_half_is_not(tmp_path, options):
    whole = photograph(tmp_path / "x.jpg", (75, 50), 3)
    Image.open(whole).save(whole, **options)
    content, expected = whole.read_bytes(), images_at(32, whole)[0]["image"]
    for missing in (1, 2, len(content) // 10, len(content) // 2):
        (tmp_path / "cut.jpg").write_bytes(content[: len(content) - missing])
        dataset = images_at(32, tmp_path / "cut.jpg")
        if missing < 3:
            assert torch.equal(dataset[0]["image"], expected)
        else:
            with pytest.raises(
                UserError, match="cut.jpg' cannot be read: .*[Tt]runcated"
            ):
                dataset[0]


@pytest.mark.parametrize("size", [(30_000, 3), (2, 40_000)])
def test_a_thin_image_costs_no_more_than_its_crop(tmp_path, size):
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "x.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = images_at(256, tmp_path / "x.png")
    for key in (0, (0, 5)):
        assert dataset[key]["image"].flatten(1).unique(dim=1).flatten().tolist() == [
            9,
            8,
            7,
        ]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_crop_is_that_of_the_whole_image_resized(tmp_path):
    path = photograph(tmp_path / "x.png", (211, 97), 5)
    dataset, whole = (
        images_at(40, path),
        TF.pil_to_tensor(TF.resize(Image.open(path), 40)),
    )
    apart = lambda x, y: (x.int() - y.int()).abs().amax((-3, -2, -1))
    assert apart(dataset[0]["image"], whole[:, :, 23:63]) <= 1  # as they round
    both = torch.cat([side.unfold(2, 40, 1) for side in (whole, whole.flip(-1))], dim=2)
    crops = both.permute(2, 0, 1, 3)  # (crop, 3, 40, 40)
    places = [apart(crops, dataset[0, draw]["image"]).min(0) for draw in range(20)]
    assert all(place.values <= 1 for place in places)
    assert len({int(place.indices) for place in places}) > 12


def test_all_images_whose_headers_are_broken_are_named_at_once(tmp_path):
    dataset = images_at(16, *(photograph(tmp_path / f"{i}.jpg") for i in range(600)))
    check_images([dataset])
    for i, content in {
        3: b"",
        300: b"<html>",
        599: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }.items():
        (tmp_path / f"{i}.jpg").write_bytes(content)
    (tmp_path / "400.jpg").unlink()
    with pytest.raises(UserError) as raised:
        check_images([dataset, dataset])
    parts = str(raised.value).split("; ")
    assert [part.split("'")[1] for part in parts] == [
        str(tmp_path / f"{i}.jpg") for i in (3, 300, 400, 599) * 2
    ]
    assert all(" cannot be read: " in part for part in parts)
    assert "No such file" in parts[2]


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_in_training(tmp_path):
    path = photograph(tmp_path / "large.jpg", (2000, 1600))
    with Image.open(path) as file:
        file.convert("RGB").save(tmp_path / "large.png")
    jpeg, png = images_at(64, path), images_at(64, tmp_path / "large.png")
    assert torch.equal(
        jpeg[0]["image"], png[0]["image"]
    )  # evaluation looks at every pixel
    drafted, whole = jpeg[0, 5]["image"].float(), png[0, 5]["image"].float()
    assert 0 < (drafted - whole).abs().mean() < 1.5


@pytest.mark.parametrize("turned_too", [False, True])
def test_a_label_map_fits_a_photograph_that_its_camera_turned(tmp_path, turned_too):
    exif, values = Image.Exif(), np.zeros((41, 67), np.uint8)
    exif[274] = 6  # to be turned clockwise
    values[:20, 30:] = 252
    pixels(tmp_path / "x.png", values[..., None].repeat(3, 2), exif=exif)
    as_seen = values if turned_too else np.rot90(values, -1)
    pixels(tmp_path / "map.png", as_seen // 36, exif=exif if turned_too else None)
    dataset = images_at(41, tmp_path / "x.png", segmentation=tmp_path / "map.png")
    dataset.with_segmentation = True
    assert torch.equal(dataset[0]["segmentation"], dataset[0]["image"][0].long() // 36)


def test_training_crops_and_flips_and_evaluation_does_neither(tmp_path):
    pixels(
        tmp_path / "x.png", np.arange(40)[None, :, None].repeat(16, 0).repeat(3, 2) * 5
    )
    dataset, other = (images_at(16, tmp_path / "x.png", seed=seed) for seed in (0, 1))
    assert dataset[0]["image"][0, 0].tolist() == [
        5 * x for x in range(12, 28)
    ]  # the middle, and not mirrored
    rows = [dataset[0, draw]["image"][0, 0].int() for draw in range(60)]
    assert len({row.min().item() for row in rows}) > 12  # of 25 places
    assert 15 < sum(row[0].item() < row[-1].item() for row in rows) < 45
    assert all(
        torch.equal(row, dataset[0, draw]["image"][0, 0].int())
        for draw, row in enumerate(rows)
    )
    assert any(
        not torch.equal(row, other[0, draw]["image"][0, 0].int())
        for draw, row in enumerate(rows[:9])
    )


def test_loaders_keep_workers_and_give_the_same_uint8_images(tmp_path):
    dataset = images_at(
        16, *(photograph(tmp_path / f"{i}.jpg", seed=i) for i in range(6))
    )
    alone, pair = (
        make_loader(dataset, CPU, workers, batch_size=2) for workers in (-1, 2)
    )
    assert pair.persistent_workers
    assert not alone.persistent_workers
    for _ in range(2):
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(alone, pair, strict=True)
        )
    x = to_images(next(iter(alone))["image"], CPU)
    assert torch.equal(x, torch.stack([dataset[i]["image"] for i in (0, 1)]) / 127.5 - 1)


def test_every_epoch_sees_every_image_once_from_any_step():
    kept = list(range(3, 23, 2))
    whole = list(train_batches(kept, 4, 0, 10, seed=3))
    indices = [index for batch in whole for index, _ in batch]
    assert [draw for batch in whole for _, draw in batch] == list(range(40))
    assert indices[:10] != indices[10:20]
    assert all(sorted(indices[epoch : epoch + 10]) == kept for epoch in (0, 10, 20, 30))
    assert list(train_batches(kept, 4, 6, 10, seed=3)) == whole[6:]
    assert list(train_batches(kept, 4, 0, 10, seed=4)) != whole


def test_what_validation_reads_is_held_out_and_no_more():
    kept, chosen = hold_out(41, 256)
    assert chosen == [0, 20, 40]
    assert sorted([*kept, *chosen]) == list(range(41))  # at most a twentieth
    kept, chosen = hold_out(118_287, 256)  # COCO's
    assert len(kept) == 118_031
    assert len(chosen) == 256
    assert not set(kept) & set(chosen)
    assert set(np.diff(chosen)) == {463, 464}  # evenly
    assert hold_out(1, 256)[0] == [0]  # one image does both


# ======== Downloads of archives

CUB_FILES = [f"CUB_200_2011/{name}" for name in (*CUB_TABLES, "images/a.jpg")] + [
    "attributes.txt"
]


@pytest.fixture
def serve(server, monkeypatch, tmp_path_factory):
    """Serve the archives of a data set on this machine, with folders as published."""

    def function(dataset, *trees):
        rows = []
        for (what, size, source, _, *where), files in zip(
            ARCHIVES[dataset], trees, strict=True
        ):
            name, folder = (
                f"/{len(rows)}{Path(source).suffix}",
                tmp_path_factory.mktemp("archive"),
            )
            for path in files:
                (folder / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / "tree" / path).write_text(path)
            made = shutil.make_archive(
                folder / "made",
                "zip" if name.endswith("zip") else "gztar",
                folder / "tree",
            )
            server.files[name] = Path(made).read_bytes()
            rows.append(
                (
                    what,
                    size,
                    server.url + name,
                    md5(server.files[name]).hexdigest(),
                    *where,
                )
            )
        monkeypatch.setitem(ARCHIVES, dataset, rows)

    return function


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_archive_is_fetched_once_and_unpacked_in_its_place(server, serve, tmp_path):
    serve("cub", CUB_FILES)
    root = tmp_path / "data" / "CUB_200_2011"
    provide(archives("cub", root), True, "")
    assert files_in(root.parent) == set(CUB_FILES)  # and the archive is gone
    assert (root / "images" / "a.jpg").read_text() == "CUB_200_2011/images/a.jpg"
    server.requests.clear()
    provide(archives("cub", root), True, "")
    assert not server.requests
    (root / "images.txt").unlink()
    provide(archives("cub", root), True, "")
    assert files_in(root.parent) == set(CUB_FILES)
    assert server.requests


def test_an_archive_whose_unpacking_was_killed_is_unpacked_again(server, serve, tmp_path):
    serve("cub", CUB_FILES)
    root = tmp_path / "CUB_200_2011"
    (tmp_path / "download-0.tgz").write_bytes(server.files["/0.tgz"])
    (root / "images").mkdir(parents=True)
    (root / "images.txt").write_text("half")
    provide(archives("cub", root), True, "")
    assert files_in(tmp_path) == set(CUB_FILES)
    assert not server.requests


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/tmp/outside.txt", "link/outside.txt"]
)
def test_an_archive_writes_nothing_outside_its_folder(
    server, monkeypatch, tmp_path, name
):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        for entry in (
            (link, tarfile.TarInfo(name))
            if name.startswith("link")
            else (tarfile.TarInfo(name),)
        ):
            packed.addfile(entry, io.BytesIO(b""))
    server.files["/0.tgz"] = content.getvalue()
    row = [*ARCHIVES["cub"][0]]
    row[2:4] = f"{server.url}/0.tgz", md5(content.getvalue()).hexdigest()
    monkeypatch.setitem(ARCHIVES, "cub", [row])
    try:
        provide(archives("cub", tmp_path / "data" / "CUB_200_2011"), True, "")
    except UserError as error:
        assert "cannot be unpacked" in str(error)
    assert not (tmp_path / "outside.txt").exists()
    assert not Path("/tmp/outside.txt").exists()


@pytest.mark.parametrize(
    "fault, message",
    {"cut": "md5 is not", "another md5": "md5 is not", "absent": "404"}.items(),
)
def test_a_failed_download_is_a_line_and_succeeds_when_it_is_tried_again(
    server, serve, tmp_path, fault, message
):
    serve("cub", CUB_FILES)
    content = server.files.pop("/0.tgz")
    server.cuts_after = len(content) // 2 if fault == "cut" else None
    server.files = (
        {}
        if fault == "absent"
        else {"/0.tgz": content + (b"more" if fault == "another md5" else b"")}
    )
    root = tmp_path / "CUB_200_2011"
    with pytest.raises(
        UserError, match=f"0.tgz is unavailable: .*{message}.*; run the command again"
    ):
        provide(archives("cub", root), True, "")
    assert not root.exists()
    server.cuts_after, server.files = None, {"/0.tgz": content}
    provide(archives("cub", root), True, "")
    assert files_in(tmp_path) == set(CUB_FILES)


def test_images_of_equal_names_and_sizes_are_told_apart(tmp_path):
    for seed, folder in enumerate("ab"):
        for index in range(3):
            photograph(tmp_path / folder / f"{index}.bmp", seed=10 * seed + index)
    first, second = (images_at(16, *sorted((tmp_path / folder).iterdir())) for folder in "ab")
    assert first.records[0].path.stat().st_size == second.records[0].path.stat().st_size
    assert identity(first, tmp_path / "a") != identity(second, tmp_path / "b")


def test_cubs_tables_name_nothing_outside_its_folder(cub):
    for name in ("../../elsewhere.jpg", "/elsewhere.jpg"):
        write(cub, images=[f"1 {name}"])
        with pytest.raises(UserError, match=f"are inconsistent.*{name} lies elsewhere"):
            split_of("cub", cub, "train")


def test_long_notes_in_a_png_do_not_spoil_its_image(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(
        "XML:com.adobe.xmp", "<x/>" * 10**6, zip=True
    )  # as photograph editors keep their history
    pixels(tmp_path / "x.png", np.full((20, 20, 3), 7), pnginfo=notes)
    assert (images_at(16, tmp_path / "x.png")[0]["image"] == 7).all()


@pytest.mark.parametrize("folders", [("photos", "validation"), ("training", "val"), ("Train", "test")])
def test_splits_of_other_names_are_refused(tmp_path, folders):
    for folder in folders:
        photograph(tmp_path / folder / "0.png")
    with pytest.raises(UserError, match="name the folders of both splits train and val"):
        folder_records(tmp_path)
