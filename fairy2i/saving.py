"""Write files whole or not at all: what bears the final name is complete, whatever stopped the run before.

A new folder (`atomic_folder`) is written to a hidden folder beside the target, `.NAME.partial-*`, on the same file
system. Only when every file of it has reached the disk is it renamed, in one step. An error or ctrl-C removes it. A run
that is killed leaves it behind; the next run with that target removes it, and knows it from one that is still being
written by its lock, which the system lets go of when a process ends in any way. Files of a folder that may have files
already (`atomic_files`) are written to a hidden folder in it and renamed one by one.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows: no locks, so leftovers are not removed; they do no harm
    fcntl = None  # type: ignore[assignment]

NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # errno of a full disk


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a temporary folder that becomes ``path`` when the block ends, and is removed when it raises.

    Args:
        path: the folder to make; its parents are made too. It may exist if it is empty.

    Raises:
        FileExistsError: ``path`` has files in it, is a file, or is a mount point, which nothing can be renamed to.
        OSError: the disk is full; names ``path``. Other errors of the block come through as they are.
    """
    path = os.path.realpath(os.path.expanduser(path))
    if os.path.exists(path) and not os.path.isdir(path):
        raise FileExistsError(f"{path} is a file; choose another folder")
    if os.path.isdir(path) and os.listdir(path):
        raise FileExistsError(f"{path} is not empty; choose another folder or remove it first")
    if os.path.ismount(path):
        raise FileExistsError(f"{path} is a mount point; choose a folder inside it")
    parent, name = os.path.split(path)
    with _temporary_folder(parent, f".{name}.partial-", path) as temporary:
        yield temporary
        sync_tree(temporary)
        if os.path.isdir(path):
            os.rmdir(path)  # raises if someone has put files there meanwhile
        os.rename(temporary, path)
        sync(parent)


@contextmanager
def atomic_files(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a temporary folder whose files move to ``path`` when the block ends, or are removed when it raises.

    Each file appears complete, or stays what it was; files of other names stay. A run that is killed between two of the
    last renames leaves some files new and some old.

    Raises:
        NotADirectoryError: ``path`` is a file.
        OSError: the disk is full; names ``path``. Other errors of the block come through as they are.
    """
    path = os.path.realpath(os.path.expanduser(path))
    if os.path.exists(path) and not os.path.isdir(path):
        raise NotADirectoryError(f"{path} is a file; choose another folder")
    with _temporary_folder(path, ".partial-", path) as temporary:
        yield temporary
        sync_tree(temporary)
        for root, _, files in os.walk(temporary):
            folder = os.path.join(path, os.path.relpath(root, temporary))
            os.makedirs(folder, exist_ok=True)
            for file in files:
                os.replace(os.path.join(root, file), os.path.join(folder, file))
        shutil.rmtree(temporary)
        sync(path)


@contextmanager
def _temporary_folder(parent: str, prefix: str, path: str) -> Iterator[str]:
    """Yield a new, locked folder; an error of the block removes it. ``path`` is what errors name."""
    os.makedirs(parent, exist_ok=True)
    _remove_leftovers(parent, prefix)
    temporary = os.path.join(parent, f"{prefix}{uuid.uuid4().hex[:8]}")
    os.mkdir(temporary)
    lock = lock_folder(temporary)
    try:
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (code := system_error(error)) in NO_ROOM:
            raise OSError(code, f"{os.strerror(code)} while writing {path}; nothing of it was kept") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def system_error(error: BaseException) -> int:
    """Return the errno of an error, also of one from Rust code (safetensors, tokenizers), which is not an OSError."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def lock_folder(folder: str) -> int | None:
    """Lock a folder until the returned descriptor is closed, or the process ends in any way.

    Returns:
        The descriptor; None where it is locked already, or cannot be locked (Windows).
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(parent: str, prefix: str) -> None:
    for entry in list(os.scandir(parent)):
        if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
            lock = lock_folder(entry.path)
            if lock is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(lock)


def sync_tree(folder: str) -> None:
    """Wait until all files and folders in a folder have reached the disk."""
    for root, _, files in os.walk(folder):
        for file in files:
            sync(os.path.join(root, file))
        sync(root)


def sync(path: str) -> None:
    """Wait until a file, or the list of entries of a folder, has reached the disk."""
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
