"""The published data sets in their own layouts, broken files, downloads, and what priors are made from."""

import functools
import io
import json
import tarfile
import zipfile
from hashlib import md5

import numpy as np
import pytest
import torch
from PIL import Image

import train as train_module
from conftest import SHARED
from evaluate import position_labels
from prior import Prior, UserError, build_from_corpora
from train import (
    CUB_TABLES,
    DATASETS,
    FACE_PARTS,
    Config,
    ImageDataset,
    Record,
    ade20k_records,
    celebahq_records,
    coco_captions,
    coco_records,
    cub_attributes,
    prepare_inputs,
    cub_records,
    download,
    find_prior,
    make_dataset,
    make_loader,
    read_image,
    readable,
    resolve,
)


def photograph(path, size=(48, 40), seed=0):
    """Smooth colours, so that a JPEG decoded at a fraction of its size still looks the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return path


def labels(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def config(dataset, root, **more):
    return resolve(
        {"dataset": dataset, "data": str(root), "preset": "tiny", "resolution": 32, "out": str(root.parent / "runs" / "run"), **more}
    )


def test_every_layout_is_a_choice_of_the_flag():
    choices = Config.__dataclass_fields__["dataset"].metadata["choices"]
    assert choices() == ("demo", "folder", *DATASETS)
    for name in DATASETS:
        assert resolve({"dataset": name}).data == f"data/{DATASETS[name].folder}"


# ---------------------------------------------------------------------------------------------
# Genuine layouts in miniature, each with a broken file in it


@pytest.fixture
def ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for folder, name, count in (("training", "train", 4), ("validation", "val", 2)):
        for i in range(1, count + 1):
            photograph(root / "images" / folder / f"ADE_{name}_{i:08d}.jpg", seed=i)
            labels(root / "annotations" / folder / f"ADE_{name}_{i:08d}.png", np.full((40, 48), 149 + i % 2))
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 street\nADE_train_00000002 beach\nADE_val_00000001 street\n")
    return root


def test_ade20k(ade20k):
    records, classes = ade20k_records(ade20k, "train")
    assert classes == ["beach", "street"] and [record.label for record in records] == [1, 0, -1, -1]
    dataset = make_dataset(config("ade20k", ade20k), "val")
    dataset.with_segmentation = True
    item = dataset[0]
    assert len(dataset) == 2 and item["segmentation"].unique().tolist() == [150] and item["segmentation"].shape == (32, 32)
    truncate(records[1].path)
    records[2].segmentation.unlink()
    records[3].path.unlink()
    labels(records[0].segmentation, np.zeros((40, 48, 3)))
    with pytest.raises(UserError, match="has 3 channels"):
        make_dataset(config("ade20k", ade20k), "train")
    truncate(records[0].segmentation)
    with pytest.raises(UserError) as error:
        make_dataset(config("ade20k", ade20k), "train")
    first, *lines = str(error.value).splitlines()
    assert "label map" in first and "ADE_train_00000001.png' cannot be read: " in first
    assert len(lines) == 4 and "ADE_train_00000002.jpg' cannot be read: " in lines[0] and "truncated" in lines[0]
    assert (
        "label map" in lines[1]
        and lines[1].endswith("cannot be read: missing")
        and lines[2].endswith("00000004.jpg' cannot be read: missing")
    )
    assert lines[3] == "4 of 4 train images are broken: mend them, or leave them out with --skip-broken"
    truncate(ade20k / "images" / "validation" / "ADE_val_00000001.jpg")
    assert len(make_dataset(config("ade20k", ade20k, skip_broken=True), "val")) == 1


@pytest.fixture
def celebahq(tmp_path):
    root, lines = tmp_path / "CelebAMask-HQ", ["idx   orig_idx orig_file"]
    for i, original in enumerate((5, 162_770, 162_771, 182_637, 182_638, 202_598)):
        photograph(root / "CelebA-HQ-img" / f"{i}.jpg", (64, 64), seed=i)
        lines.append(f"{i:<6d}{original:<9d}{original + 1:06d}.jpg")
        skin, hair = np.zeros((32, 32)), np.zeros((32, 32))
        skin[8:], hair[:16] = 255, 255
        for part, mask in (("hair", hair), ("skin", skin)):
            labels(root / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05d}_{part}.png", mask)
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n\n")
    return root


def test_celebahq(celebahq):
    assert [record.path.name for record in celebahq_records(celebahq, "train")[0]] == ["0.jpg", "1.jpg"]
    assert [record.path.name for record in celebahq_records(celebahq, "val")[0]] == ["2.jpg", "3.jpg"]
    dataset = make_dataset(config("celebahq", celebahq), "val")
    dataset.with_segmentation = True
    column, hair, skin = dataset[1]["segmentation"][:, 16], FACE_PARTS.index("hair") + 1, FACE_PARTS.index("skin") + 1
    assert column.tolist() == [hair] * 16 + [skin] * 16  # hair is painted over the skin, wherever the files came first
    (celebahq / "CelebAMask-HQ-mask-anno" / "0" / "._00003_hair.png").write_bytes(b"left by another system")
    for part in ("hair", "skin"):
        (celebahq / "CelebAMask-HQ-mask-anno" / "0" / f"00002_{part}.png").unlink()
    bare = make_dataset(config("celebahq", celebahq), "val")
    bare.with_segmentation = True
    assert bare[0]["segmentation"].unique().tolist() == [0]  # a face without masks is background
    truncate(celebahq / "CelebAMask-HQ-mask-anno" / "0" / "00003_hair.png")
    with pytest.raises(UserError, match="00003_hair.png' cannot be read"):
        dataset[1]
    (celebahq / "CelebA-HQ-img" / "2.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2.jpg' cannot be read.*\n1 of 2 val images are broken"):
        make_dataset(config("celebahq", celebahq), "val")
    with pytest.raises(UserError, match="(?s)no CelebA-HQ-img.*1. get .*2. unzip .*3. python train.py"):
        celebahq_records(celebahq / "elsewhere", "train")


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    for split, numbers in (("train", (9, 25, 30)), ("val", (139, 285))):
        images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers]
        for i, image in enumerate(images):
            photograph(root / f"{split}2017" / image["file_name"], (90, 60), seed=i)
            labels(
                root / "stuffthingmaps" / f"{split}2017" / image["file_name"].replace("jpg", "png"), np.full((60, 90), 255 if i else 181)
            )
        captions = [{"image_id": n, "id": i, "caption": f"a red  bus of {n}\n"} for i, n in enumerate(numbers * 2)]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return root


def test_coco(coco):
    records, _ = coco_records(coco, "train")
    assert [record.path.name for record in records] == ["000000000009.jpg", "000000000025.jpg", "000000000030.jpg"]
    assert list(records[1].captions()) == ["a red bus of 25"] * 2
    dataset = make_dataset(config("coco", coco), "val")
    dataset.with_segmentation = True
    assert [dataset[i]["segmentation"].unique().tolist() for i in range(2)] == [[181], [255]]
    assert np.unique(position_labels(dataset, (4, 4))["part"]).tolist() == [-1, 181]  # 255 says nothing
    records[0].path.unlink()  # listed by the annotations, so known to be missing
    (coco / "train2017" / "000000000030.jpg").write_bytes(b"not a photograph")
    with pytest.raises(UserError, match="2 of 3 train images are broken"):
        make_dataset(config("coco", coco), "train")
    (coco / "annotations" / "captions_val2017.json").write_text('{"images": []}')
    train_module._coco_captions.cache_clear()
    with pytest.raises(UserError, match="is not COCO's captions file"):
        coco_records(coco, "val")
    assert coco_captions(coco / "annotations" / "captions_train2017.json", 9) == ["a red bus of 9"] * 2


def test_coco_2014_and_without_annotations(coco):
    (coco / "val2017").rename(coco / "val2014")
    with pytest.raises(UserError, match="no val2017"):  # most of val2014 is in train2017
        coco_records(coco, "val")
    (coco / "train2017").rename(coco / "train2014")
    records, _ = coco_records(coco, "val")
    assert len(records) == 2 and records[0].segmentation is None and list(records[0].captions()) == []


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    names = [f"00{c}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (1, 2) for i in range(6)]
    for i, name in enumerate(names):
        photograph(root / "images" / name, seed=i)
    write = lambda name, lines: (root / name).write_text("\n".join(lines) + "\n")
    write("images.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    write("train_test_split.txt", [f"{i} {int(i % 3 > 0)}" for i in range(1, 13)])
    write("image_class_labels.txt", [f"{i} {1 + (i > 6)}" for i in range(1, 13)])
    write("classes.txt", ["1 001.Bird_1", "2 002.Bird_2"])
    return root


ATTRIBUTES = """1 has_bill_shape::curved_(up_or_down)
2 has_wing_color::blue
3 has_tail_shape::forked_tail
4 has_upper_tail_color::white
5 has_primary_color::red
6 has_size::small_(5_-_9_in)
7 has_wing_shape::rounded-wings
8 has_head_pattern::unique_pattern
9 has_shape::perching-like"""


def add_attributes(root, inside):
    listed = (root if inside else root.parent) / "attributes.txt"
    listed.write_text(ATTRIBUTES + "\n")
    (root / "attributes").mkdir()
    rows = [f"{image} {number} {int((image + number) % 3 > 0)} 3 7.5" for image in range(1, 13) for number in range(1, 10)]
    (root / "attributes" / "image_attribute_labels.txt").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("inside", [False, True])
def test_cubs_attributes_stand_in_for_captions(cub, inside):
    train_module._cub_attributes.cache_clear()
    add_attributes(cub, inside)
    records, _ = cub_records(cub, "train")
    expected = "bill is curved,tail is forked,tail is white,bird is small,wing is rounded,bird is perching".split(",")
    expected = [f"its {fact}" for fact in expected]
    assert list(records[0].captions()) == expected  # image 1: attributes 1, 3, 4, 6, 7, 9
    second = "wing is blue,tail is forked,bird is red,bird is small,head is unique,bird is perching".split(",")
    assert cub_attributes(cub, "2") == [f"its {fact}" for fact in second]
    text = cub / "text" / "001.Bird_1" / "Bird_1_0.txt"
    text.parent.mkdir(parents=True)
    text.write_text("a small bird\n")
    assert [list(record.captions()) for record in cub_records(cub, "train")[0][:2]] == [["a small bird"], []]


def test_a_published_data_set_makes_its_prior_once(cub, speech, monkeypatch, capsys):
    train_module._cub_attributes.cache_clear()
    add_attributes(cub, True)
    monkeypatch.setattr(train_module, "build_from_corpora", functools.partial(build_from_corpora, speech=speech))
    monkeypatch.setattr(train_module, "PriorConfig", functools.partial(train_module.PriorConfig, min_count=1))
    chosen = config("cub", cub)
    dataset = make_dataset(chosen, "train")
    prior = find_prior(chosen, dataset)
    assert {"curved", "white"} <= set(prior.adjective_words) and {"bill", "tail"} <= set(prior.noun_words)
    (cached,) = (cub.parent / "runs").iterdir()
    assert "made from 48 captions of cub" in capsys.readouterr().out and Prior.load(cached).noun_words.tolist() == prior.noun_words.tolist()
    find_prior(chosen, dataset)
    assert f"prior: {cached}, made earlier" in capsys.readouterr().out
    corpus = cub.parent / "any.txt"
    corpus.write_text("a green meadow and a tall tree\n")
    assert find_prior(config("cub", cub, prior=str(corpus)), dataset).noun_words.tolist() == ["meadow", "tree"]
    corpus.write_text("a green meadow and a tall tower\n")  # another text of that name is another corpus
    assert "tower" in find_prior(config("cub", cub, prior=str(corpus)), dataset).noun_words
    with pytest.raises(UserError, match="corpus 'absent.txt' does not exist"):
        find_prior(config("cub", cub, prior="absent.txt"), dataset)


def test_a_data_set_without_words_says_what_it_wants(ade20k):
    chosen = config("ade20k", ade20k)
    with pytest.raises(UserError, match="no captions in ade20k captions.*--prior CORPUS"):
        find_prior(chosen, make_dataset(chosen, "train"))


# ---------------------------------------------------------------------------------------------
# The real sets at hand, with a broken file in each


def linked(source, target):
    """A tree of links to the files of another."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        place.mkdir(parents=True, exist_ok=True) if path.is_dir() else (
            place.parent.mkdir(parents=True, exist_ok=True),
            place.symlink_to(path),
        )
    return target


def broken_copy(path):
    """Put a truncated copy in a link's place."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.skipif(not (SHARED / "CUB_200_2011").is_dir(), reason="no photographs on this machine")
def test_the_real_cub_folder(tmp_path):
    root = linked(SHARED / "CUB_200_2011", tmp_path / "CUB_200_2011")
    assert len(make_dataset(config("cub", root), "val")) == 1389
    records, classes = cub_records(root, "train")
    assert len(records) == 1500 and len(classes) == 200 and sum(bool(list(record.captions())) for record in records) == 300
    broken_copy(records[17].path)
    records[21].path.unlink()
    with pytest.raises(UserError, match="2 of 1,500 train images are broken"):
        make_dataset(config("cub", root), "train")
    dataset = make_dataset(config("cub", root, skip_broken=True), "train")
    assert len(dataset) == 1498 and dataset[17]["image"].shape == (3, 32, 32)


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="no segmentation set on this machine")
def test_the_real_segmentation_set(tmp_path):
    root = linked(SHARED / "camvid", tmp_path / "camvid")
    chosen = functools.partial(config, "folder", root / "images", labels=str(root / "annotations"))
    sizes = {split: len(make_dataset(chosen(), split)) for split in ("train", "val")}
    assert sizes == {split: len(list((SHARED / "camvid/images" / split).iterdir())) for split in ("train", "val")}
    dataset = make_dataset(chosen(), "val")
    dataset.with_segmentation = True
    values = torch.cat([dataset[i]["segmentation"].unique() for i in range(0, len(dataset), 10)]).unique().tolist()
    assert set(values) <= set(range(12)) and len(values) > 6  # labels, not mixtures of labels
    broken_copy(dataset.records[0].path)
    with pytest.raises(UserError, match="1 of .* val images are broken"):
        make_dataset(chosen(), "val")
    assert len(make_dataset(chosen(skip_broken=True), "val")) == sizes["val"] - 1


# ---------------------------------------------------------------------------------------------
# Broken files, large photographs, crops


def test_ten_broken_images_are_listed_and_the_rest_counted(tmp_path, capsys):
    records = [Record(photograph(tmp_path / f"{i:02d}.{'png' if i % 2 else 'jpg'}", seed=i)) for i in range(20)]
    for record in records[:13]:
        truncate(record.path)
    with pytest.raises(UserError) as error:
        readable(records, "train")
    lines = str(error.value).splitlines()
    assert len(lines) == 12 and lines[10] == "… and 3 more" and lines[11].startswith("13 of 20 train images are broken")
    assert [line.split("'")[1][-6:-4] for line in lines[:10]] == [f"{i:02d}" for i in range(10)]
    assert readable(records, "train", skip_broken=True) == records[13:]
    assert capsys.readouterr().out.splitlines()[-1] == "skipped 13 of 20 train images, which are broken"


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    path = photograph(tmp_path / "large.jpg", (2000, 1600))
    assert read_image(path, 128).size == (250, 200) and read_image(path).size == (2000, 1600)
    with Image.open(path) as file:
        file.convert("RGB").save(tmp_path / "large.png")
    jpeg, png = (ImageDataset([Record(path)], [], 64) for path in (path, tmp_path / "large.png"))
    assert torch.equal(jpeg[0]["image"], png[0]["image"])  # evaluation looks at every pixel
    drafted, whole = jpeg[0, 5]["image"].float(), png[0, 5]["image"].float()
    assert 0 < (drafted - whole).abs().mean() < 1.5


def test_a_label_map_follows_its_photographs_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    labels(tmp_path / "raw.png", pixels[..., 0] // 36)
    labels(tmp_path / "upright.png", np.rot90(pixels[..., 0] // 36, -1))
    for name in ("raw", "upright"):
        dataset = ImageDataset([Record(tmp_path / "x.png", segmentation=tmp_path / f"{name}.png")], [], 40)
        dataset.with_segmentation = True
        assert torch.equal(dataset[0]["segmentation"], dataset[0]["image"][0].long() // 36)


def test_training_crops_and_flips_and_evaluation_does_neither(tmp_path):
    ramp = np.linspace(0, 255, 60)[None, :, None].repeat(30, 0).repeat(3, 2)
    labels(tmp_path / "ramp.png", ramp)
    dataset = ImageDataset([Record(tmp_path / "ramp.png")], [], 30)
    centre = dataset[0]["image"][0, 0].float()
    assert (centre.diff() > 0).all() and abs(centre.mean() - 127.5) < 2  # the middle, and not mirrored
    slopes, means = zip(
        *((row.diff().mean().sign().item(), row.mean().item()) for row in (dataset[0, draw]["image"][0, 0].float() for draw in range(60)))
    )
    assert 15 < sum(slope > 0 for slope in slopes) < 45 and np.ptp(means) > 80
    assert torch.equal(dataset[0, 7]["image"], dataset[0, 7]["image"])


def test_loaders_keep_workers_and_give_the_same_images(tmp_path):
    dataset = ImageDataset([Record(photograph(tmp_path / f"{i}.jpg", seed=i)) for i in range(6)], [], 16)
    alone, pair = (make_loader(dataset, torch.device("cpu"), workers, batch_size=2) for workers in (0, 2))
    assert pair.persistent_workers and not alone.persistent_workers
    for _ in range(2):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(alone, pair, strict=True))


# ---------------------------------------------------------------------------------------------
# Downloads of archives


def tar_of(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def zip_of(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


CUB_FILES = {f"CUB_200_2011/{name}": b"1 a.jpg\n" for name in CUB_TABLES}
CUB_FILES.update({"attributes.txt": b"1 has_wing_color::blue\n", "CUB_200_2011/images/a.jpg": bytes(range(256)) * 200})


@pytest.fixture
def serve(server, monkeypatch):
    """Let an archive of a data set come from the server on this machine."""

    def function(dataset, content, known=True, name="archive.tgz"):
        server.files[f"/{name}"] = content
        (archive, *_) = DATASETS[dataset].archives
        archive = archive._replace(url=f"{server.url}/{name}", md5=md5(content).hexdigest() if known else None)
        monkeypatch.setitem(DATASETS, dataset, DATASETS[dataset]._replace(archives=(archive,)))

    return function


def test_an_archive_is_fetched_once_and_unpacked_in_its_place(server, serve, tmp_path):
    serve("cub", tar_of(CUB_FILES))
    root = tmp_path / "data" / "CUB_200_2011"
    download("cub", root)
    assert (root / "images" / "a.jpg").read_bytes() == CUB_FILES["CUB_200_2011/images/a.jpg"] and [
        path.name for path in root.parent.iterdir()
    ] == ["CUB_200_2011"]
    assert sorted(path.name for path in root.iterdir()) == sorted([*CUB_TABLES, "images", "attributes.txt"])
    server.requests.clear()
    (root / "attributes.txt").rename(root.parent / "attributes.txt")  # where others unpack it
    download("cub", root)
    assert not server.requests
    (root / "images.txt").unlink()
    download("cub", root)  # what is missing comes again, what is there stays
    assert (root / "images.txt").exists() and server.requests


def test_a_download_into_an_empty_folder_on_another_disk(serve, tmp_path):
    serve("cub", tar_of(CUB_FILES))
    (tmp_path / "disk").mkdir()
    (tmp_path / "CUB_200_2011").symlink_to(tmp_path / "disk")
    download("cub", tmp_path / "CUB_200_2011")
    assert (tmp_path / "disk" / "images" / "a.jpg").exists() and not list((tmp_path / "disk").glob(".*"))


def test_a_failed_download_is_tried_once_and_alone(server, serve, tmp_path):
    serve("cub", b"no archive", known=False)
    with pytest.raises(UserError, match="is unavailable: .*unpack it by hand and point --data at the CUB_200_2011 folder"):
        prepare_inputs(config("cub", tmp_path / "data", download=True))
    assert len([path for path, _ in server.requests]) == 2 and not (tmp_path / "data").exists()  # a look for redirects, then the file
    server.requests.clear()
    with pytest.raises(UserError, match="cub is not at"):
        make_dataset(config("cub", tmp_path / "data", download=True), "val")  # as evaluate.py asks for it
    assert not server.requests


def test_each_archive_of_coco_goes_where_it_belongs(server, tmp_path, monkeypatch):
    contents = [{"train2017/1.jpg": b"1"}, {"val2017/2.jpg": b"2"}, {"annotations/captions_val2017.json": b"{}"}]
    contents.append({"train2017/1.png": b"3", "val2017/2.png": b"4"})
    archives = []
    for i, (archive, files) in enumerate(zip(DATASETS["coco"].archives, contents, strict=True)):
        server.files[f"/{i}.zip"] = zip_of(files)
        archives.append(archive._replace(url=f"{server.url}/{i}.zip", md5=None))
    monkeypatch.setitem(DATASETS, "coco", DATASETS["coco"]._replace(archives=tuple(archives)))
    download("coco", tmp_path / "coco")
    found = {str(path.relative_to(tmp_path / "coco")) for path in (tmp_path / "coco").rglob("*.*")}
    assert found == {
        "train2017/1.jpg",
        "val2017/2.jpg",
        "annotations/captions_val2017.json",
        "stuffthingmaps/train2017/1.png",
        "stuffthingmaps/val2017/2.png",
    }


FAULTS = {
    "cut": "ended before",
    "cut with known checksum": "corrupted",
    "wrong checksum": "corrupted",
    "absent": "404",
    "outside": "outside the destination",
    "link outside": "is a link to",
    "link inside": "does not hold files alone",
    "something else": "does not hold images.txt",
    "not an archive": "not a gzip file",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_download_leaves_nothing(server, serve, tmp_path, fault):
    content = tar_of(CUB_FILES)
    if fault == "outside":
        content = tar_of({**CUB_FILES, "../../evil.txt": b"x"})
    if fault == "something else":
        content = tar_of({"another/readme.txt": b"x"})
    if fault == "not an archive":
        content = b"<html>sign in</html>"
    if fault == "link outside":
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as tar:
            link = tarfile.TarInfo("CUB_200_2011/images")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(link)
        content = data.getvalue()
    if fault == "link inside":
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as tar:
            for name in ("CUB_200_2011/elsewhere/images.txt", *(f"CUB_200_2011/{name}" for name in CUB_TABLES)):
                tar.addfile(tarfile.TarInfo(name))
            link = tarfile.TarInfo("CUB_200_2011/images")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
            tar.addfile(link)
        content = data.getvalue()
    serve("cub", content, known=fault in ("cut with known checksum", "wrong checksum"))
    if fault.startswith("cut"):
        server.cuts_after = len(content) // 2
    if fault == "wrong checksum":
        server.files["/archive.tgz"] = tar_of({**CUB_FILES, "CUB_200_2011/images.txt": b"changed"})
    if fault == "absent":
        server.files.clear()
    with pytest.raises(UserError, match=f"archive.tgz is unavailable: .*{FAULTS[fault]}.*nothing of it was kept"):
        download("cub", tmp_path / "data" / "CUB_200_2011")
    assert not list(tmp_path.iterdir())


def test_a_zip_cannot_write_outside(serve, tmp_path):
    files = {f"ADEChallengeData2016/{name}": b"1" for name in ("images/a.jpg", "annotations/a.png")}
    serve("ade20k", zip_of({**files, "../../../evil.txt": b"x", "/evil.txt": b"x"}), name="archive.zip")
    download("ade20k", tmp_path / "data" / "ADEChallengeData2016")
    assert sorted(str(path.relative_to(tmp_path / "data")) for path in tmp_path.rglob("*.*")) == sorted(files)


def test_sets_without_an_archive_say_so(tmp_path):
    for dataset in ("celebahq", "demo", "folder"):
        with pytest.raises(UserError, match="has no public archive"):
            resolve({"dataset": dataset, "download": True, "data": "" if dataset == "demo" else str(tmp_path)})
    with pytest.raises(UserError, match="(?s)ade20k is not at .*--download fetches it"):
        make_dataset(config("ade20k", tmp_path), "train")
