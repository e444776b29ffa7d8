"""The data sets by name: what each one is, its files, and how to load it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beyondprop import _checks
from beyondprop.data import _images
from beyondprop.data._arrays import Values, from_arrays
from beyondprop.data._dataset import Dataset
from beyondprop.data._files import REMEDY, DataFile, Progress, Source, user_cache
from beyondprop.data._packed import read_npz
from beyondprop.data.events import Packed, from_events
from beyondprop.errors import DataIntegrityError


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What is known of a data set without loading it.

    Attributes:
        input_shape: The shape of one input: `(channels, height, width)`, or `(features,)` for rows.
        classes: The label names; empty for regression.
        license: Its license as far as its authors state one.
        download_bytes: The size of its files; 0 for one that is embedded.
        has_download: Whether `load` can fetch it; False for a sample that is nowhere public.
        targets: For regression, the names of the numbers to predict.
    """

    name: str
    description: str
    train_size: int
    test_size: int
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    home_page: str
    license: str
    download_bytes: int
    has_download: bool = True
    targets: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """How many numbers a network answers a row with."""
        return len(self.classes or self.targets)


def names() -> list[str]:
    """The names that `load` accepts, smallest set first."""
    return list(_CATALOG)


def describe(name: str) -> DatasetInfo:
    """What is known of a data set, without loading or looking for anything.

    Raises:
        ValueError: There is no set of this name.
    """
    return _CATALOG[_checks.one_of("name", name, _CATALOG)][0]


def load(
    name: str,
    *,
    root: Path | str | None = None,
    download: bool = True,
    progress: Progress | None = None,
    standardize: bool = True,
) -> Dataset:
    """Load a data set: images `(N, channels, height, width)`, or rows, in float32, on the CPU.

    Labels are `(N,)` in int64, the numbers of a regression `(N, k)` in float32. Pixels are divided by their largest
    value; all sets but `digits` are then standardized by the mean and standard deviation of their training rows,
    CIFAR-10 channel by channel, HIGGS and diabetes feature by feature, the targets of diabetes too.

    Args:
        name: One of `names()`.
        root: A folder with `<name>/<file>` to look in first, and to download to. After it, `$BEYONDPROP_DATA`
            and the user's cache are looked in; without it, downloads go to the cache.
        download: Download what is not found.
        progress: Called as `progress(done_bytes, total_bytes, file_name)` during downloads.
        standardize: Subtract the mean and divide by the standard deviation; False keeps pixels in [0, 1], which
            networks that reconstruct their input need.

    Raises:
        ValueError: There is no set of this name.
        DataIntegrityError: A file was found with the wrong content.
        DataUnavailableError: A file was neither found nor downloaded.
    """
    info, loader = _CATALOG[_checks.one_of("name", name, _CATALOG)]
    return loader(info, Source(None if root is None else Path(root).expanduser(), download, progress), standardize)


def at_hand(name: str) -> bool:
    """Return whether `load` would find the set's files without downloading; their content is not looked at."""
    return not describe(name).download_bytes or any(any((place / name).glob("*")) for place in Source().places())


def _diabetes(info: DatasetInfo, source: Source, standardize: bool) -> Dataset:
    del source  # embedded in scikit-learn
    from sklearn.datasets import load_diabetes

    found: Any = load_diabetes(scaled=False)
    x, y = Values("x", found["data"], tuple(found["feature_names"])), Values("y", found["target"], info.targets)
    return from_arrays(x, y, name=info.name, test=info.test_size, standardize=standardize, kind="regression")


def _digits(info: DatasetInfo, source: Source, standardize: bool) -> Dataset:
    del source, standardize  # embedded in scikit-learn, in [0, 1]
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, *info.input_shape) / 16
    # The set has no published split; this one is stratified and fixed.
    x, x_test, y, y_test = train_test_split(images, labels, test_size=info.test_size, stratify=labels, random_state=0)
    return from_arrays(x, y, name=info.name, test=(x_test, y_test), standardize=False)


@dataclass(frozen=True, slots=True)
class _MnistFamily:
    """Loads the four IDX files of MNIST and of the sets that copy its form."""

    mirrors: tuple[str, ...]
    sha256: tuple[str, str, str, str]  # train images, train labels, test images, test labels
    mean: float
    std: float

    def __call__(self, info: DatasetInfo, source: Source, standardize: bool) -> Dataset:
        arrays = []
        stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        for stem, sha256 in zip(stems, self.sha256, strict=True):
            name = f"{stem}-ubyte.gz"
            urls = tuple(mirror + name for mirror in self.mirrors)
            path = source.obtain(DataFile(info.name, name, sha256, urls, most=info.download_bytes))
            array = _images.read_idx(path)
            if "labels" in stem:
                expected = f"{len(arrays[-1])} labels 0 … {len(info.classes) - 1}"
                fits = array.shape == arrays[-1].shape[:1] and array.max() < len(info.classes)
            else:
                expected, fits = (
                    f"images of {info.input_shape[1:]}",
                    array.size and array.shape[1:] == info.input_shape[1:],
                )
            if not fits:
                raise DataIntegrityError(f"{path} must hold {expected}, got an array of shape {array.shape}. {REMEDY}")
            arrays.append(array)
        return _of_arrays(info, arrays, (self.mean,), (self.std,), standardize)


_CIFAR10_ARCHIVE = DataFile(
    "cifar10",
    "cifar-10-python.tar.gz",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    also="or, in the same folders, labels.npz with train_00.webp, …, test_00.webp, … (lossless strips)",
    most=170_498_071,
)


def _cifar10(info: DatasetInfo, source: Source, standardize: bool) -> Dataset:
    folders = [place / _CIFAR10_ARCHIVE.folder for place in source.places()]
    forms = [folder / name for folder in folders for name in (_CIFAR10_ARCHIVE.name, "labels.npz")]
    first = next(filter(os.path.isfile, forms), None)
    if first is not None and first.name == "labels.npz":
        arrays = _images.read_strips(first.parent, user_cache() / _CIFAR10_ARCHIVE.folder)
    else:
        arrays = _images.read_archive(source.obtain(_CIFAR10_ARCHIVE))
    mean, std = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)
    return _of_arrays(info, arrays.values(), mean, std, standardize)


def _of_arrays(
    info: DatasetInfo, arrays: Iterable[_images.Bytes], mean: Sequence[float], std: Sequence[float], standardize: bool
) -> Dataset:
    """Return a set of pixels and labels for training, then pixels and labels for the test."""
    if not standardize:
        mean = std = ()
    shape = (-1, *info.input_shape)
    tensors = (
        torch.from_numpy(array).long() if array.ndim == 1 else _standardized(array.reshape(shape), mean, std)
        for array in arrays
    )
    return Dataset(info.name, *tensors, classes=info.classes)


def _standardized(pixels: _images.Bytes, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(pixels / 255 - mean) / std` by channel, or `pixels / 255`, for `(N, C, H, W)` of any memory layout."""
    # Contiguous, which a conversion of channels-last pixels would not be, and free of the global defaults.
    x = torch.empty(pixels.shape, dtype=torch.float32, device="cpu")
    x.copy_(torch.from_numpy(pixels)).div_(255)
    for channel, (center, scale) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].sub_(center).div_(scale)
    return x


_HIGGS = DataFile(
    "higgs",
    "higgs.npz",
    "be478eefad5d51eca8a11ca1cccd6af8cd79811f450c3f12614b85d97a4d9ecc",
    (),
    "It is a sample of UCI's HIGGS set with the arrays x_head, x_train, x_valid and their labels y_head, y_train, y_valid.",
)


def _higgs(info: DatasetInfo, source: Source, standardize: bool) -> Dataset:
    path = source.obtain(_HIGGS)
    arrays = read_npz(path)
    parts: list[Tensor] = []
    for part in ("train", "head", "valid"):
        x, y = (arrays.get(f"{key}_{part}", np.zeros(0)) for key in "xy")
        is_right = (x.dtype, y.dtype, x.ndim, x.shape[1:]) == (np.float32, np.uint8, 2, info.input_shape)
        if not is_right or y.shape != x.shape[:1] or not np.isfinite(x).all() or y.max(initial=0) > 1:
            raise DataIntegrityError(
                f"{path} must have x_{part}, finite float32 (N, 28), and y_{part}, labels 0 and 1 in uint8 (N,), got "
                f"{x.dtype} {x.shape} and {y.dtype} {y.shape}. {REMEDY}"
            )
        parts += [torch.from_numpy(x), torch.from_numpy(y).long()]
    # The head of the full file is rounded to 3 digits: it comes last.
    x_train, y_train = torch.cat(parts[0:4:2]), torch.cat(parts[1:4:2])
    x_test, y_test = parts[4:]
    if standardize:
        mean, std = x_train.mean(0), x_train.std(0)
        x_train, x_test = (x_train - mean) / std, (x_test - mean) / std
    return Dataset(info.name, x_train, y_train, x_test, y_test, info.classes)


_NMNIST = DataFile(
    "nmnist-small",
    "nmnist_small.npz",
    "93b9dbf1a0707cfe2cc370a2d1cdefbbad0bd68e2c9cf1624577bfc9c6a96d9a",
    (),
    "It is a sample of N-MNIST with the arrays x, y, p, dt, offsets, labels; the whole set is read by Tonic, for from_events.",
)
_NMNIST_MOST = 336_041  # microseconds, the longest recording and one


def _nmnist(info: DatasetInfo, source: Source, standardize: bool) -> Dataset:
    del standardize  # spikes
    path = source.obtain(_NMNIST)
    arrays = read_npz(path)
    rows, count = info.train_size + info.test_size, len(arrays.get("x", ()))
    sizes = {"x": count, "y": count, "dt": count, "p": -(-count // 8), "offsets": rows + 1, "labels": rows}
    found = {name: arrays[name].shape for name in sizes if name in arrays}
    if found != {name: (size,) for name, size in sizes.items()} or int(arrays["offsets"][-1]) != count:
        raise DataIntegrityError(f"{path} must have arrays of the sizes {sizes}, got {found}. {REMEDY}")
    train, test = Packed(arrays, range(info.train_size)), Packed(arrays, range(info.train_size, rows))
    return from_events(train, test, steps=info.input_shape[0], duration=_NMNIST_MOST, name=info.name)


_TEN_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_of_mnist_form = partial(DatasetInfo, train_size=60_000, test_size=10_000, input_shape=(1, 28, 28))

_CATALOG: dict[str, tuple[DatasetInfo, Callable[[DatasetInfo, Source, bool], Dataset]]] = {
    info.name: (info, loader)
    for info, loader in {
        DatasetInfo(
            name="diabetes",
            description="Progression of diabetes from 10 measurements, regression; embedded in scikit-learn",
            train_size=353,
            test_size=89,
            input_shape=(10,),
            classes=(),
            home_page="https://www4.stat.ncsu.edu/~boos/var.select/diabetes.html",
            license="none stated; cite Efron et al. 2004",
            download_bytes=0,
            targets=("progression",),
        ): _diabetes,
        DatasetInfo(
            name="digits",
            description="Handwritten digits, 8x8 grey; embedded in scikit-learn, nothing to download",
            train_size=1437,
            test_size=360,
            input_shape=(1, 8, 8),
            classes=_TEN_DIGITS,
            home_page="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            license="CC BY 4.0",
            download_bytes=0,
        ): _digits,
        DatasetInfo(
            name="nmnist-small",
            description="1,100 recordings of N-MNIST, digits before an event camera, as 50 frames of spikes",
            train_size=1000,
            test_size=100,
            input_shape=(50, 2, 34, 34),
            classes=_TEN_DIGITS,
            home_page="https://www.garrickorchard.com/datasets/n-mnist",
            license="CC BY-SA 4.0",
            download_bytes=11_575_679,
            has_download=False,
        ): _nmnist,
        DatasetInfo(
            name="higgs",
            description="A sample of HIGGS: 20,971 of 11 million simulated particle collisions",
            train_size=18000,
            test_size=2971,
            input_shape=(28,),
            classes=("background", "signal"),
            home_page="https://archive.ics.uci.edu/dataset/280/higgs",
            license="CC BY 4.0",
            download_bytes=1_509_337,
            has_download=False,
        ): _higgs,
        _of_mnist_form(
            name="mnist",
            description="Handwritten digits, 28x28 grey",
            classes=_TEN_DIGITS,
            home_page="http://yann.lecun.com/exdb/mnist/",
            license="CC BY-SA 3.0",
            download_bytes=11_594_722,
        ): _MnistFamily(
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            sha256=(
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
            mean=0.1307,
            std=0.3081,
        ),
        _of_mnist_form(
            name="fashion-mnist",
            description="Pictures of clothes, 28x28 grey, harder than mnist",
            classes=_CLOTHES,
            home_page="https://github.com/zalandoresearch/fashion-mnist",
            license="MIT",
            download_bytes=30_878_645,
        ): _MnistFamily(
            mirrors=(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            ),
            sha256=(
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
            mean=0.2860,
            std=0.3530,
        ),
        DatasetInfo(
            name="cifar10",
            description="Photographs of animals and vehicles, 32x32 color",
            train_size=50000,
            test_size=10000,
            input_shape=(3, 32, 32),
            classes=_THINGS,
            home_page="https://www.cs.toronto.edu/~kriz/cifar.html",
            license="none stated; cite the 2009 report",
            download_bytes=170_498_071,
        ): _cifar10,
    }.items()
}
