"""Fast reader of single slices from the shards of a store.

The index of a shard is read once, and then one byte range per slice. zarr itself needs about a millisecond per slice,
most of it for its event loop and its own records.

Arrays of a store have exactly one layout (see ``write.py``). :func:`check_layout` refuses every other layout before a
byte is decoded, so a crafted file can neither choose a codec nor announce a size that is allocated unchecked.

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
"""Offset and size in the index of a chunk that was never written."""
_DTYPES = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"}
_ZSTD_LEVELS = range(1, 20)
"""Levels of any writer. Stores have been written with 3 and 1, and reading does not depend on it."""
_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class ShardedArray:
    """Array (Z, H, W) of a store, open for reading slices."""

    def __init__(
        self, files: StoreFiles, folder: str, *, shape_zyx: tuple[int, int, int], sizes: Mapping[str, int], where: str
    ) -> None:
        """Read and check the metadata of the array.

        Args:
            files: Reader of the store's files.
            folder: Name of the array's folder in the store.
            shape_zyx: Shape of the array in the table of series.
            sizes: Size in bytes of every file of the array, by name below ``folder``, from the table.
            where: Name of the array in messages.
        """
        try:
            metadata = json.loads(files.read(f"{folder}/zarr.json"))
        except (OSError, ValueError) as err:
            if isinstance(err, SamgraftError):
                raise
            raise DataError("the metadata of an array cannot be read. The store is damaged.", where=where) from err
        self.dtype, self.shard_slices = check_layout(metadata, shape_zyx=shape_zyx, where=where)
        self.shape_zyx = shape_zyx
        self._files = files
        self._folder = folder
        self._sizes = sizes
        self._where = where
        # Only the indices are cached, about 1 kB per shard. The system's page cache keeps the slices, where a cache
        # here would hold them once per loader worker.
        self._indices: dict[int, npt.NDArray[np.uint64]] = {}
        self._decoder = Zstd()

    def read_slice(self, slice_index: int) -> npt.NDArray[Any]:
        """Return one slice (H, W) after verifying its checksum.

        Raises:
            DataError: If the file is damaged or missing.
            IndexError: If there is no such slice.
        """
        num_slices, height, width = self.shape_zyx
        if not 0 <= slice_index < num_slices:
            raise IndexError(f"slice_index must be in 0..{num_slices - 1}, got {slice_index}.")
        shard, inner = divmod(slice_index, self.shard_slices)
        slice_HW = np.empty((height, width), dtype=self.dtype)
        try:
            if shard not in self._indices:
                self._indices[shard] = self._read_index(shard)
            offset, size = (int(v) for v in self._indices[shard][inner])
            # zstd expands incompressible data by well under a percent. A larger chunk cannot be one slice, and its size
            # must not be trusted before it is read into memory.
            if offset == _MISSING or size > 2 * slice_HW.nbytes + 1024:
                raise ValueError("chunk missing or of an impossible size")
            data = self._files.read_range(f"{self._folder}/c/{shard}/0/0", offset, size)
            if len(data) != size:
                raise ValueError("chunk cut short")
            # Decoding into a buffer of known size: a frame that announces more raises instead of allocating. zstd
            # verifies the checksum at the end of the frame.
            self._decoder.decode(data, slice_HW)
        except (OSError, ValueError, RuntimeError) as err:
            if isinstance(err, SamgraftError):
                raise
            raise DataError(
                f"slice {slice_index} cannot be decoded ({err}). The store is damaged.",
                where=self._where,
                kept="the source scans",
                next_command="samgraft store check STORE",
            ) from err
        return slice_HW

    def read_all(self) -> npt.NDArray[Any]:
        """Return all slices (Z, H, W)."""
        return np.stack([self.read_slice(index) for index in range(self.shape_zyx[0])])

    def _read_index(self, shard: int) -> npt.NDArray[np.uint64]:
        # The index is at the end of the shard: offset and size of every chunk as two uint64, then a CRC32C. Its place
        # follows from the size in the table, so a file that changed after opening must be noticed here.
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
    """Refuse an array that ``write.py`` would not have written.

    Returns:
        The dtype, and the number of slices of a shard.

    Raises:
        DataError: For a shape that differs from the table, an unknown type or codec, or slices of implausible size.
    """
    # The metadata come from a file that anybody may have edited, so every key may be missing or have another type.
    try:
        shape = tuple(metadata["shape"])
        name = metadata["data_type"]
        grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        sharding = metadata["codecs"][0]["configuration"]
        codecs = [metadata["codecs"][0]["name"], len(metadata["codecs"]), sharding["index_location"]]
    except (KeyError, TypeError, IndexError) as err:
        raise DataError("the metadata of an array are not those of a store.", where=where) from err
    if metadata.get("zarr_format") != 3 or metadata.get("node_type") != "array":
        raise DataError("an array of a store must be zarr format 3.", where=where)
    if shape != shape_zyx:
        raise DataError(f"an array must have the shape {shape_zyx} of the table, got {shape}.", where=where)
    if name not in _DTYPES:
        raise DataError(f"an array must hold numbers of 8 to 32 bits, got {name!r}.", where=where)
    # The one accepted pipeline is shard -> bytes in little endian -> zstd with checksum. Names of other codecs are
    # compared and never looked up, because a lookup could import code.
    inner = [codec for codec in sharding["codecs"] if codec.get("name") != "bytes"]
    level = inner[0].get("configuration", {}).get("level") if len(inner) == 1 else None
    is_zstd = inner == [{"name": "zstd", "configuration": {"level": level, "checksum": True}}]
    byte_codecs = [codec for codec in sharding["codecs"] if codec.get("name") == "bytes"]
    # zarr leaves the configuration out for types of one byte, which have no endianness.
    expected = codecs == ["sharding_indexed", 1, "end"] and is_zstd and level in _ZSTD_LEVELS and len(byte_codecs) == 1
    endian = byte_codecs[0].get("configuration", {}).get("endian", "little") if byte_codecs else None
    if not expected or endian != "little" or sharding["index_codecs"] != _INDEX:
        raise DataError("an array of a store must be sharded zstd with checksum, got other codecs.", where=where)
    _, height, width = shape_zyx
    dtype = np.dtype(name).newbyteorder("<")
    if list(sharding["chunk_shape"]) != [1, height, width] or list(grid[1:]) != [height, width] or grid[0] < 1:
        raise DataError("an array of a store must have one chunk per slice.", where=where)
    if dtype.itemsize * height * width > MAX_SLICE_BYTES:
        raise DataError(f"a slice of {height} x {width} pixels is implausibly large.", where=where)
    return dtype, int(grid[0])
