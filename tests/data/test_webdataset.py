"""Shards: the same images as from files, found in tar files and never listed in memory."""

import gzip
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from shards import picture, sample, write_set, write_shard
from torchvision.transforms import v2  # noqa: TID253  # the oracle

from compress.data import load_data, parse_reference
from compress.data._images import Names, ShardImages, Subset, shuffled
from compress.data.webdataset import expanded, read_shard
from compress.errors import DataError
from compress.recipe.settings import TrainSettings
from compress.train import CrossEntropy, train
from compress.train.batches import steps_in_epoch, train_batches


def load(reference, **options):
    return load_data(parse_reference(f"webdataset:{reference}", **options))


@pytest.fixture
def root(tmp_path):
    write_set(tmp_path / "shards", {"train": (3, 20), "val": (1, 10), "test": (2, 6)})
    return tmp_path / "shards"


def test_shards_hold_the_images_of_a_folder(tmp_path):
    counts = {"train": 20, "val": 6}
    for number in range(26):
        split = "train" if number < counts["train"] else "val"
        place = tmp_path / "folder" / split / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.png").write_bytes(picture(number, number % 2))
    write_set(tmp_path / "shards", {"train": (2, 10), "val": (1, 6)})
    files = load_data(parse_reference(f"imagefolder:{tmp_path / 'folder'}", image_size=16))
    shards = load(tmp_path / "shards", image_size=16)
    assert shards.classes == files.classes
    for split in ("train", "test"):
        a, b = files.splits[split], shards.splits[split]
        if split == "train":  # before anything is held back
            a, b = a.images, b.images
        by_class = np.argsort(b.labels, kind="stable")  # as folders are read
        assert b.labels[by_class].tolist() == a.labels.tolist()
        assert torch.equal(b.take(by_class), a.take(range(len(a))))


def test_shards_of_the_package_of_the_same_name_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), dtype=np.uint8)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, image in enumerate(pixels):
            writer.write({"__key__": f"part/{number:04d}", "png": image, "cls": number % 3})
    whole = load(tmp_path, image_size=24).splits["test"].images
    assert whole.labels.tolist() == [number % 3 for number in range(20)]
    side = round(24 * 256 / 224)  # resized to, before the crop
    fitted = v2.Compose([v2.Resize(side), v2.CenterCrop(24), v2.PILToTensor()])
    assert torch.equal(whole.take([7])[0], fitted(Image.fromarray(pixels[7])))


def test_splits_go_by_the_names_of_shards(root):
    data = load(root, image_size=16)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 48,
        "validation": 10,
        "calibration": 12,
        "test": 12,
    }


def test_without_test_shards_a_tenth_of_the_images_is_held_back(root):
    data = load(root / "train-{000..002}.tar", image_size=16)
    assert len(data.splits["test"]) == 6
    seen = [split.take(range(len(split))).flatten(1) for split in data.splits.values()]
    assert len({row.numpy().tobytes() for part in seen for row in part}) == 60
    again = load(root / "train-{000..002}.tar", image_size=16)
    assert torch.equal(again.splits["test"].take([0]), data.splits["test"].take([0]))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a,b", ["a", "b"]),
        ("x-{00..02}.tar", ["x-00.tar", "x-01.tar", "x-02.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("d/{train-{0..1},val-{a,b}}.tar", [f"d/{n}.tar" for n in ("train-0", "train-1")]
         + [f"d/{n}.tar" for n in ("val-a", "val-b")]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
    ],
)  # fmt: skip
def test_braces_mean_what_they_mean_in_a_shell(pattern, names):
    assert list(expanded(pattern)) == names


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ({"cls": b"1\n"}, ("0", "1")),
        ({"cls": b"dog"}, ("cat", "dog")),
        ({"json": b'{"label": 1, "width": 3}'}, ("0", "1")),
        ({"json": b'{"class": "dog"}'}, ("cat", "dog")),
        ({"json": b"1"}, ("0", "1")),
        ({"json": b'{"label": 0}', "cls": b"1"}, ("0", "1")),
    ],
)
def test_classes_are_numbers_or_names(tmp_path, label, classes):
    def other(content):
        return content.replace(b"1", b"0").replace(b"dog", b"cat")

    samples = [
        (f"dir.v1/{i}", {"jpg": picture(i, 0, ending="jpg")}
         | {key: value if i % 2 else other(value) for key, value in label.items()})
        for i in range(20)
    ]  # fmt: skip
    write_shard(tmp_path / "a.tar", samples)
    data = load(tmp_path / "a.tar", image_size=16)
    assert data.classes == classes
    whole = data.splits["test"].images
    assert whole.labels.tolist() == [0, 1] * 10


def test_what_is_held_in_memory_is_small_for_each_image(tmp_path):
    content = picture(0, 0, side=4, ending="jpg")
    tiny = [(f"{i:08d}", {"jpg": content, "cls": str(i % 10).encode()}) for i in range(5000)]
    path = write_shard(tmp_path / "a.tar", tiny)
    read_shard(path)  # imports are not counted
    tracemalloc.start()
    shard = read_shard(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(shard.labels) == 5000
    assert held < 30 * 5000
    assert peak < 120 * 5000  # a TarInfo alone has 500 bytes, and there are two for each image


def test_names_of_files_take_the_memory_of_their_letters():
    def names():
        return (f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(20000))

    tracemalloc.start()
    held = Names.of(names())
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(held) == list(names())
    assert memory < 20000 * 48


def images_of(shards, each, window):
    count = shards * each
    numbers = np.arange(count)
    starts = np.arange(0, count + 1, each)
    return ShardImages((), starts, numbers, numbers, numbers % 2, 8, 3, 0, window)


def test_the_order_of_shards_and_images_is_random_within_the_window():
    images = images_of(20, 50, window=100)
    order = shuffled(images, np.random.default_rng(0))
    assert sorted(order) == list(range(1000))
    first = np.random.default_rng(0).permutation(20)
    read = np.concatenate([np.arange(s * 50, s * 50 + 50) for s in first])
    moved = np.abs(np.argsort(order)[read] - np.arange(1000))
    assert 20 < moved.mean() < moved.max() <= 100
    other = shuffled(images, np.random.default_rng(1))
    assert (order != other).mean() > 0.9


def test_a_window_of_one_reads_each_shard_from_front_to_back():
    order = shuffled(images_of(4, 10, window=1), np.random.default_rng(0))
    assert (np.diff(order.reshape(4, 10)) == 1).all()
    assert order[::10].tolist() != [0, 10, 20, 30]


def test_the_images_held_back_for_training_keep_the_order_of_their_shards():
    whole = images_of(10, 20, window=1)
    chosen = np.sort(np.random.default_rng(3).permutation(200)[:150])
    order = shuffled(Subset(whole, chosen), np.random.default_rng(0))
    shards = chosen[order] // 20
    assert sorted(order) == list(range(150))
    assert (np.diff(shards) != 0).sum() == 9


def test_processes_share_the_stream_and_any_step_can_be_the_first(root):
    data = load(root, image_size=16, shuffle_buffer=8)
    settings = TrainSettings(batch_size=8)
    whole = list(train_batches(data, settings, 1, 0))
    parts = [list(train_batches(data, settings, 1, 0, rank=r, world=2)) for r in (0, 1)]
    for step, batch in enumerate(whole):
        both = [parts[rank][step] for rank in (0, 1)]
        assert torch.equal(torch.cat([part.images for part in both]), batch.images)
        assert torch.equal(torch.cat([part.target for part in both]), batch.target)
    later = list(train_batches(data, settings, 1, 0, skip=2))
    assert [b.index.tolist() for b in later] == [b.index.tolist() for b in whole[2:]]


def test_an_epoch_may_be_shorter_than_the_data(root):
    data = load(root, image_size=16)
    settings = TrainSettings(batch_size=8, epoch_images=20)
    assert steps_in_epoch(data, settings) == len(list(train_batches(data, settings, 0, 0))) == 2
    assert steps_in_epoch(data, TrainSettings(batch_size=8, epoch_images=999)) == 6


class Stopping(CrossEntropy):
    def __init__(self, calls):
        super().__init__()
        object.__setattr__(self, "left", [calls])

    def __call__(self, model, images, target):
        self.left[0] -= 1
        if self.left[0] == -1:
            raise KeyboardInterrupt
        return super().__call__(model, images, target)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_interrupted_goes_on_at_the_same_image(root, tmp_path, workers):
    data = load(root, image_size=16, shuffle_buffer=16, workers=workers)
    settings = TrainSettings(epochs=2, batch_size=8, checkpoint_minutes=0.0, precision="fp32")

    def network():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Flatten(), torch.nn.Linear(64, 2)]
        return torch.nn.Sequential(*layers)

    whole, parted = network(), network()
    train(whole, data, settings, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(parted, data, settings, objective=Stopping(8), folder=tmp_path, device="cpu")
    parted = network()
    again = Stopping(100)
    train(parted, data, settings, objective=again, folder=tmp_path, device="cpu")
    assert again.left[0] == 100 - 4  # eight of twelve steps were done
    for mine, theirs in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def changed(ending, content):
    def write(root):
        key, files = sample(99)
        files = {k: v for k, v in files.items() if content is not None or k != ending}
        write_shard(
            root / "train-001.tar", [(key, files | ({} if content is None else {ending: content}))]
        )

    return write


def cut(root):
    path = root / "train-001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def overwritten(root):
    path = root / "train-001.tar"
    whole = bytearray(path.read_bytes())
    second = whole.find(b"00020.cls")
    whole[second : second + 512] = b"x" * 512
    path.write_bytes(whole)


def compressed(root):
    path = root / "train-001.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("pyd", b"cos"), "00099.pyd may hold code, and no pickle is read"),
        (changed("pth", b"PK"), "00099.pth may hold code"),
        (changed("pickle", b"x"), "00099.pickle may hold code"),
        (changed("cls", None), "sample '00099' holds png. Expected one image"),
        (changed("png", None), "sample '00099' holds cls. Expected one image"),
        (changed("jpg", b"x"), "sample '00099' holds png, cls, jpg"),
        (changed("cls", b""), "sample '00099' has the class ''"),
        (changed("cls", b"dog"), "some shards give classes by number, some by name"),
        (changed("cls", b"\xff"), "00099.cls is no text"),
        (changed("json", b"{"), None),
        (cut, "is no readable tar file (unexpected end of data)"),
        (overwritten, "is damaged at byte"),
        (compressed, "Expected a tar, not compressed"),
        (lambda root: write_shard(root / "train-001.tar", []), "holds no images"),
        (lambda root: (root / "train-001.tar").write_bytes(b"no tar"), "no readable tar file"),
    ],
)
def test_shards_that_cannot_be_used_are_named(root, damage, message):
    damage(root)
    if message is None:  # .cls counts
        load(root, image_size=16)
        return
    with pytest.raises(DataError) as caught:
        load(root, image_size=16)
    assert message in str(caught.value)
    if "some shards" not in message:
        assert "train-001.tar" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "shown"), [({"label": -3}, "-3"), ({"label": True}, "True"), ({"a": 1}, "None")]
)
def test_json_without_a_class_is_refused(tmp_path, content, shown):
    files = {"png": picture(0, 0), "json": json.dumps(content).encode()}
    write_shard(tmp_path / "a.tar", [("x", files)])
    with pytest.raises(DataError, match=f"sample 'x' has the class {shown}"):
        load(tmp_path)


def test_a_broken_image_is_named_when_it_is_decoded(root):
    changed("png", b"\x89PNG broken")(root)
    data = load(root, image_size=16)
    whole = data.splits["train"].images
    with pytest.raises(DataError, match=r"train-001.tar, byte 512: is not a readable image"):
        whole.take([20])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("https://host/train-{000..009}.tar", "lies on another machine. Copy or mount"),
        ("pipe:cat x.tar", "lies on another machine"),
        ("train-{000..001.tar", "a brace has no partner"),
        ("/none/train-{000..003}.tar", "4 of 4 shards are not there: /none/train-000.tar"),
        ("{root}", "holds no .tar files"),
    ],
)
def test_references_that_lead_nowhere_say_so(tmp_path, reference, message):
    with pytest.raises(DataError) as caught:
        load(str(tmp_path) if reference == "{root}" else reference)
    assert message in str(caught.value)


def test_only_test_shards_leave_nothing_to_train_on(root):
    with pytest.raises(DataError, match="names no shards to train on"):
        load(root / "test-{000..001}.tar")


def test_file_urls_are_paths(root):
    assert len(load(f"file:{root}/train-000.tar", image_size=16).splits["test"]) == 2


def test_the_fingerprint_follows_the_shards(root):
    before = load(root, image_size=16).fingerprint
    assert load(root, image_size=16).fingerprint == before
    os.remove(root / "train-002.tar")
    assert load(root, image_size=16).fingerprint != before
