"""atomic_folder and atomic_files: whole or not at all, whatever happens on the way."""

import errno
import os

import pytest

from fairy2i.saving import atomic_files, atomic_folder


def write(folder, name="file", text="text"):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


def test_the_folder_appears_when_the_block_ends_and_nothing_stays_beside_it(tmp_path):
    target = tmp_path / "not there yet" / "out"
    with atomic_folder(target) as folder:
        assert not target.exists()
        write(folder)
        os.mkdir(os.path.join(folder, "inner"))
        write(os.path.join(folder, "inner"))
    assert sorted(os.listdir(target)) == ["file", "inner"]
    assert (target / "inner" / "file").read_text() == "text"
    assert os.listdir(target.parent) == ["out"]


def test_it_has_the_permissions_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_path_is_taken_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/one", "two/"):
        with atomic_folder(path) as folder:
            write(folder)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_and_ctrl_c_leave_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        write(folder)
        raise error
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_is_taken_and_a_link_to_one_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        write(folder)
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["file"]


def test_what_is_there_is_never_overwritten(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    write(tmp_path / "full", text="old")
    with pytest.raises(FileExistsError, match="full is not empty; choose another"), atomic_folder(tmp_path / "full"):
        pass
    with pytest.raises(FileExistsError, match="file is a file"), atomic_folder(tmp_path / "full" / "file"):
        pass
    with pytest.raises(OSError), atomic_folder(tmp_path / "out") as folder:
        write(folder, text="new")
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", text="old")
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "out" / "file").read_text() == "old"
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(FileExistsError, match="mount point; choose a folder inside it"), atomic_folder(tmp_path / "m"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["full", "out"]


def test_files_and_folders_reach_the_disk_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), events.append(os.fstat(fd).st_ino)))
    monkeypatch.setattr(os, "rename", lambda old, new: (rename(old, new), events.append("rename")))
    with atomic_folder(tmp_path / "out") as folder:
        os.mkdir(os.path.join(folder, "inner"))
        write(folder)
        write(os.path.join(folder, "inner"))
    done = events.index("rename")
    paths = [tmp_path / "out" / name for name in (".", "file", "inner", "inner/file")]
    assert {path.stat().st_ino for path in paths} == set(events[:done])
    assert events[done + 1 :] == [tmp_path.stat().st_ino]


def test_a_leftover_is_removed_and_a_folder_still_being_written_is_not(tmp_path):
    for name in (".out.partial-0123abcd", ".other.partial-0123abcd"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    with pytest.raises(OSError), atomic_folder(tmp_path / "out") as first:
        write(first, text="first")
        with atomic_folder(tmp_path / "out") as second:
            assert os.path.isfile(os.path.join(first, "file"))
            write(second, text="second")
    assert (tmp_path / "out" / "file").read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == [".other.partial-0123abcd", "out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["Python", "Rust"],
)
def test_a_full_disk_is_an_error_that_says_so_and_leaves_nothing(tmp_path, error):
    with pytest.raises(OSError) as caught, atomic_folder(tmp_path / "out") as folder:
        write(folder)
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert f"No space left on device while writing {tmp_path / 'out'}; nothing of it was kept" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_only_when_it_has_to_keep_its_promise(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="while writing"), atomic_folder(tmp_path / "out") as folder:
        write(folder)
    assert os.listdir(tmp_path) == []


def test_other_errors_of_the_system_come_through_as_they_are(tmp_path):
    error = FileNotFoundError(errno.ENOENT, "gone", "source")
    with pytest.raises(FileNotFoundError) as caught, atomic_folder(tmp_path / "out"):
        raise error
    assert caught.value is error


def test_files_take_the_place_of_those_of_their_name_and_others_stay(tmp_path):
    write(tmp_path, "file", "old")
    write(tmp_path, "other", "old")
    with atomic_files(tmp_path) as folder:
        write(folder, "file", "new")
        os.mkdir(os.path.join(folder, "inner"))
        write(os.path.join(folder, "inner"))
        assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "inner", "other"]
    assert [(tmp_path / name).read_text() for name in ("file", "other", "inner/file")] == ["new", "old", "text"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_files_as_they_were(tmp_path, error):
    write(tmp_path, "file", "old")
    with pytest.raises(error), atomic_files(tmp_path) as folder:
        write(folder, "file", "new")
        raise error
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_files_need_a_folder(tmp_path):
    write(tmp_path, "file")
    with pytest.raises(NotADirectoryError, match="is a file; choose another folder"), atomic_files(tmp_path / "file"):
        pass
