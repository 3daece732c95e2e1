"""Readers of the files of a store in a local folder or an object store (s3://, gs://, az://, http://).

Every method takes a name below the store, with forward slashes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from samgraft.shared.errors import StorageError, UsageError
from samgraft.shared.files import NUM_ATTEMPTS, read_with_retry, retry


class LocalFiles:
    """Reader of a store in a local folder."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)

    def read(self, name: str) -> bytes:
        """Return a whole file, or raise FileNotFoundError."""
        return read_with_retry(lambda: self._pread(name, 0, None), where=name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return bytes of a file, fewer if the file ends before."""
        return read_with_retry(lambda: self._pread(name, start, length), where=name)

    def _pread(self, name: str, start: int, length: int | None) -> bytes:
        descriptor = os.open(f"{self._root}/{name}", os.O_RDONLY)
        try:
            return os.pread(descriptor, os.fstat(descriptor).st_size if length is None else length, start)
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int | None:
        """Return the size of a file, or None if it is missing."""
        try:
            info = os.stat(f"{self._root}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return info.st_size

    def read_beside(self, name: str) -> bytes:
        """Return a whole file that is beside the folder, or raise FileNotFoundError."""
        return LocalFiles(Path(self._root).absolute().parent).read(name)


class RemoteFiles:
    """Reader of a store in an object store.

    The connection is made at the first use in each process and is never pickled. Credentials and endpoint come from
    the environment: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
    ``AWS_ENDPOINT_URL`` (MinIO, Ceph), ``AWS_REGION``, ``AWS_SKIP_SIGNATURE=true`` (public buckets).
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._connection: Any = None

    # A connection holds threads and sockets that do not survive a fork or a pickle.
    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_connection": None}

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        return self._request(lambda obstore, store: obstore.get(store, name).bytes(), name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return bytes of a file."""
        return self._request(lambda obstore, store: obstore.get_range(store, name, start=start, length=length), name)

    def size(self, name: str) -> int | None:
        """Return None, because the size would cost a request."""
        return None

    def read_beside(self, name: str) -> bytes:
        """Return a whole file that is beside the store."""
        return RemoteFiles(self._url.rpartition("/")[0]).read(name)

    def _request(self, call: Callable[[Any, Any], Any], name: str) -> bytes:
        store = self._connect()
        import obstore
        from obstore.exceptions import NotFoundError

        missing = (FileNotFoundError, NotFoundError)
        try:
            # 503, time-outs and expired keys come under many types: everything but a missing file is repeated.
            return retry(
                lambda: bytes(call(obstore, store)), is_worth_repeating=lambda err: not isinstance(err, missing)
            )
        except missing as err:
            raise FileNotFoundError(name) from err
        except Exception as err:
            raise StorageError(
                f"the object store does not respond ({type(err).__name__}) after {NUM_ATTEMPTS} attempts. "
                "Check network, AWS_ENDPOINT_URL and credentials.",
                where=name,
                kept="every saved training state",
                next_command="run the same command again",
            ) from err

    def _connect(self) -> Any:
        if self._connection is None:
            try:
                from obstore.store import from_url
            except ImportError as err:
                raise UsageError(
                    f"addresses ({self._url.partition('://')[0]}://) need the package obstore.",
                    next_command="pip install 'samgraft[s3]'",
                ) from err
            try:
                # The library does not retry, so that one rule and one message hold for every kind of store.
                self._connection = from_url(
                    self._url, client_options={"allow_http": True, "timeout": "60s"}, retry_config={"max_retries": 0}
                )
            except Exception as err:  # unknown schemes and impossible addresses come under several types
                raise UsageError(
                    f"the address cannot be used ({str(err).splitlines()[0]}). Use s3://, gs://, az:// or http://."
                ) from err
        return self._connection


StoreFiles: TypeAlias = LocalFiles | RemoteFiles


def is_address(path: Path | str) -> bool:
    """Return whether a path is the address of a remote store."""
    return isinstance(path, str) and "://" in path


def is_scans(data: Path | str) -> bool:
    """Return whether DATA exists and is not a store, so that a store must be built from it."""
    path = Path(data)
    return not is_address(data) and path.exists() and path.suffix != ".zarr" and not (path / "zarr.json").is_file()
