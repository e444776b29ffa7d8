"""Checkpoints: nested dicts and lists of tensors, numbers and strings in one safetensors file; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from beyondprop.lab.runs.files import write_atomically

FORMAT = "beyondprop-checkpoint-1"
_UNSUMMED = "0" * 64  # in place of the checksum while that is computed
_SUMMED = '"sha256":"{}"'  # in the header; quotes within its other texts are escaped


def save_checkpoint(path: Path, tree: Any, **notes: str) -> None:
    """Write `tree` to `path`, whole or not at all, and to the disk before this returns.

    Args:
        path: the file; its folder is there.
        tree: dicts, lists and tuples of tensors, numbers, strings and None, nested as you like.
        **notes: what `read_notes` returns, without reading the tensors.

    Raises:
        TypeError: if something else is in it, saying where.
    """
    tensors: dict[str, Tensor] = {}
    shape = _pack(tree, "", tensors)
    content = save(tensors, {**notes, "format": FORMAT, "tree": json.dumps(shape), "sha256": _UNSUMMED})
    size = 8 + int.from_bytes(content[:8], "little")
    header, rest = content[:size], memoryview(content)[size:]
    checksum = hashlib.sha256(header)
    checksum.update(rest)
    write_atomically(path, _with_sum(header, _UNSUMMED, checksum.hexdigest()), rest)


def dumped(tree: Any) -> bytes:
    """Return a tree as `save_checkpoint` takes it in bytes, for another process; `restored` reads them."""
    tensors: dict[str, Tensor] = {}
    shape = _pack(tree, "", tensors)
    return save(tensors, {"tree": json.dumps(shape)})


def restored(content: bytes) -> Any:
    """Return the tree that `dumped` was given, its tensors on the CPU."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = {key: tensor.clone() for key, tensor in load(content).items()}  # as in `load_checkpoint`
    return _unpack(json.loads(header["__metadata__"]["tree"]), tensors)


def load_checkpoint(path: Path) -> Any:
    """Return what `save_checkpoint` wrote, its tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or no checkpoint of this format. One of an older version, without a checksum, is a
            warning.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} has format {metadata.get('format')!r}; {FORMAT!r} is needed.")
        if set(metadata) == {"format", "tree"}:
            warnings.warn(
                f"{str(path)!r} has no checksum, as those of older versions: if it was damaged, nobody knows.",
                stacklevel=2,
            )
        elif "sha256" not in metadata or metadata["sha256"] != _checksum(path, metadata["sha256"]):
            raise ValueError(f"{str(path)!r} is damaged: its content is not that of its checksum.")
        # Cloned: torch aligns its own memory, and products over memory aligned otherwise may round otherwise.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    try:
        return _unpack(json.loads(metadata["tree"]), tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # without a checksum
        raise ValueError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}.") from error


def read_notes(path: Path) -> dict[str, str]:
    """Return the notes of a checkpoint, which only `load_checkpoint` checks against damage.

    Raises:
        ValueError: if the file is damaged so that it cannot be read.
    """
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged and cannot be read: {error}.") from error


def _with_sum(header: bytes, before: str, after: str) -> bytes:
    return header.replace(_SUMMED.format(before).encode(), _SUMMED.format(after).encode())


def _checksum(path: Path, recorded: str) -> str:
    with open(path, "rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        checksum = hashlib.sha256(size + _with_sum(header, recorded, _UNSUMMED))
        while chunk := file.read(1 << 20):
            checksum.update(chunk)
    return checksum.hexdigest()


# In JSON, every tensor and container is a list that starts with its kind, so that integer keys and tuples come back as such.


def _pack(value: Any, where: str, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, Tensor):
        if tensors is None:
            return None
        # The order of the dimensions in memory is kept: products round by it, and a resumed run shall round alike.
        order = sorted(range(value.ndim), key=lambda d: -value.stride(d))
        # A copy of its own: safetensors refuses memory that two tensors share.
        tensors[where] = value.detach().permute(order).to("cpu", copy=True, memory_format=torch.contiguous_format)
        return ["tensor", [where, order]]
    place = where or "the top level"
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"Keys of a checkpoint are strings or integers, got {key!r} in {place}.")
        return ["dict", [[key, _pack(v, f"{where}/{key}", tensors)] for key, v in value.items()]]
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_pack(v, f"{where}/{i}", tensors) for i, v in enumerate(value)]]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"A checkpoint holds tensors, numbers, strings, None and dicts, lists and tuples of them; {place} is a "
        f"{type(value).__name__}."
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        name, order = content
        return tensors[name].permute([order.index(d) for d in range(len(order))])
    if kind == "dict":
        return {key: _unpack(v, tensors) for key, v in content}
    items = [_unpack(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def check_savable(tree: Any) -> None:
    """Raise `TypeError` where `save_checkpoint` would."""
    _pack(tree, "", None)
