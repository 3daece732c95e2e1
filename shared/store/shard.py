"""Fast reading of single slices from the shards of a store: one index read per file, one byte range per slice.

zarr itself needs about a millisecond per slice, most of it event loop and bookkeeping. Arrays of a store have exactly
one layout (see ``store_write``), and :func:`check_layout` refuses every other before a byte is decoded: no codec named
by a file is ever looked up, no size announced by a file is allocated unchecked.

Source of the shard layout: zarr v3 specification, sharding-indexed codec, version 1.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd
from samgraft.shared.errors import DataError, SamgraftError
from samgraft.shared.store.files import StoreFiles

MAX_SLICE_BYTES = 2**30
_MISSING = 2**64 - 1
_DTYPES = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"}
_ZSTD_LEVELS = range(1, 20)
"""Any: it matters to the writer only. Stores have been written with 3 and 1."""
_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class ShardedArray:
    """One array (Z, H, W) of a store, open for reading slices."""

    def __init__(
        self, files: StoreFiles, folder: str, *, shape_zyx: tuple[int, int, int], sizes: Mapping[str, int], where: str
    ) -> None:
        """Read and check the metadata.

        Args:
            files: The store.
            folder: Name of the array's folder in the store.
            shape_zyx: Shape that the table of series announces.
            sizes: Size of every file of the array, by name below ``folder``, from the table.
            where: Name for messages.
        """
        try:
            metadata = json.loads(files.read(f"{folder}/zarr.json"))
        except (OSError, ValueError) as err:
            if isinstance(err, SamgraftError):
                raise
            raise DataError("the metadata of an array cannot be read: the store is damaged.", where=where) from err
        self.dtype, self.shard_slices = check_layout(metadata, shape_zyx=shape_zyx, where=where)
        self.shape_zyx = shape_zyx
        self._files = files
        self._folder = folder
        self._sizes = sizes
        self._where = where
        self._indices: dict[int, npt.NDArray[np.uint64]] = {}
        self._decoder = Zstd()

    def read(self, slice_index: int) -> npt.NDArray[Any]:
        """Return one slice (H, W); its checksum is verified.

        Raises:
            DataError: If the file is damaged or missing.
            IndexError: If there is no such slice.
        """
        num_slices, height, width = self.shape_zyx
        if not 0 <= slice_index < num_slices:
            raise IndexError(f"slice_index must lie in 0..{num_slices - 1}, got {slice_index}.")
        shard, inner = divmod(slice_index, self.shard_slices)
        out = np.empty((height, width), dtype=self.dtype)
        try:
            if shard not in self._indices:
                self._indices[shard] = self._read_index(shard)
            offset, size = (int(v) for v in self._indices[shard][inner])
            if offset == _MISSING or size > 2 * out.nbytes + 1024:
                raise ValueError("chunk missing or of an impossible size")
            data = self._files.read_range(f"{self._folder}/c/{shard}/0/0", offset, size)
            if len(data) != size:
                raise ValueError("chunk cut short")
            self._decoder.decode(data, out)
        except (OSError, ValueError, RuntimeError) as err:
            if isinstance(err, SamgraftError):
                raise
            raise DataError(
                f"slice {slice_index} could not be decoded ({err}): the store is damaged.",
                where=self._where,
                kept="the source scans",
                next_command="samgraft store check STORE",
            ) from err
        return out

    def _read_index(self, shard: int) -> npt.NDArray[np.uint64]:
        name = f"c/{shard}/0/0"
        size = self._files.size(f"{self._folder}/{name}")
        if size is not None and size != self._sizes.get(name):
            raise ValueError("the file changed after the store was opened")
        num_bytes = 16 * self.shard_slices + 4
        start = self._sizes.get(name, 0) - num_bytes
        if start < 0:
            raise ValueError("shard not in the table or too short")
        data = self._files.read_range(f"{self._folder}/{name}", start, num_bytes)
        if len(data) != num_bytes or google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ValueError("checksum of the shard index differs")
        return np.frombuffer(data[:-4], dtype="<u8").reshape(self.shard_slices, 2)


def check_layout(metadata: Any, *, shape_zyx: tuple[int, int, int], where: str) -> tuple[np.dtype[Any], int]:
    """Refuse an array that :mod:`store_write` would not have written.

    Returns:
        The dtype, and how many slices a shard holds.

    Raises:
        DataError: For another shape than the table's, an unknown type or codec, or slices of absurd size.
    """
    try:
        shape = tuple(metadata["shape"])
        name = metadata["data_type"]
        grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        sharding = metadata["codecs"][0]["configuration"]
        codecs = [metadata["codecs"][0]["name"], len(metadata["codecs"]), sharding["index_location"]]
    except (KeyError, TypeError, IndexError) as err:
        raise DataError("the metadata of an array is not that of a store.", where=where) from err
    if metadata.get("zarr_format") != 3 or metadata.get("node_type") != "array":
        raise DataError("an array of a store must be zarr format 3.", where=where)
    if shape != shape_zyx:
        raise DataError(f"an array must have the shape {shape_zyx} of the table, got {shape}.", where=where)
    if name not in _DTYPES:
        raise DataError(f"an array must hold numbers of 8 to 32 bits, got {name!r}.", where=where)
    inner = [codec for codec in sharding["codecs"] if codec.get("name") != "bytes"]
    level = inner[0].get("configuration", {}).get("level") if len(inner) == 1 else None
    is_zstd = inner == [{"name": "zstd", "configuration": {"level": level, "checksum": True}}]
    byte_codecs = [codec for codec in sharding["codecs"] if codec.get("name") == "bytes"]
    # Types of one byte have no endianness: zarr then leaves the configuration out.
    expected = codecs == ["sharding_indexed", 1, "end"] and is_zstd and level in _ZSTD_LEVELS and len(byte_codecs) == 1
    endian = byte_codecs[0].get("configuration", {}).get("endian", "little") if byte_codecs else None
    if not expected or endian != "little" or sharding["index_codecs"] != _INDEX:
        raise DataError("an array of a store must be sharded zstd with checksum, got other codecs.", where=where)
    _, height, width = shape_zyx
    dtype = np.dtype(name).newbyteorder("<")
    if list(sharding["chunk_shape"]) != [1, height, width] or list(grid[1:]) != [height, width] or grid[0] < 1:
        raise DataError("an array of a store must have one chunk per slice.", where=where)
    if dtype.itemsize * height * width > MAX_SLICE_BYTES:
        raise DataError(f"a slice of {height} x {width} pixels is too large to be real.", where=where)
    return dtype, int(grid[0])
