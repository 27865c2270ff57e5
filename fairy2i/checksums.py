"""Checksums of tensors, in the header of the safetensors file that holds them.

The field "crc32" of the metadata is a JSON object {tensor name: CRC-32 of its bytes, 8 hexadecimal digits}. A flipped
bit in codes does not show by itself: any byte is a valid code. With the checksums it is an error. A file without the
field is read unchecked.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FIELD = "crc32"


def crc32(tensor: Tensor) -> str:
    """Return the CRC-32 of the bytes of a tensor (any dtype, device and shape), as 8 hexadecimal digits."""
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()):08x}"


def checksum_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata for a file that holds these tensors; those on "meta" have no bytes and are left out."""
    sums = {name: crc32(tensor) for name, tensor in tensors.items() if not tensor.is_meta}
    return {FIELD: json.dumps(sums, sort_keys=True)}


def verify_checksums(opened: Any, file: str) -> set[str]:
    """Compare the tensors of a file with its checksums.

    Args:
        opened: what ``safetensors.safe_open(file, "pt")`` gives.
        file: its name, for the error.

    Returns:
        The names of the tensors that have a checksum here. They may lie in other files of the same checkpoint.

    Raises:
        ValueError: a tensor is damaged (names file and tensor), or the field cannot be read.
    """
    field = (opened.metadata() or {}).get(FIELD)
    if field is None:
        return set()
    try:
        expected = dict(json.loads(field))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: the checksums in its header are damaged: {error}") from error
    for name in opened.keys():
        if name in expected and crc32(opened.get_tensor(name)) != expected[name]:
            raise ValueError(f"{file}: {name} is damaged, its checksum is not {expected[name]}; copy the file again")
    return set(expected)


def sort_metadata(path: str | os.PathLike[str]) -> None:
    """Sort the metadata in the header of a safetensors file, which has them in random order: equal tensors, equal file.

    Written in place, before the file has its final name. Its length and its tensors do not change.
    """
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:  # a name that JSON can write in several ways may take more room: then it stays
            file.seek(8)
            file.write(text)
