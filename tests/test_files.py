"""Files that are written whole or not at all, and only where a file may stand."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hmn_replay.data.lookup import Images, join_images
from hmn_replay.files import check_target, clear_stale, digest_tensors, write_atomically


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.hmn"


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    broken: str, error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(type(error)):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == [path.name]


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 251 + ".hmn", "é" * 125 + ".hmn"):
        write_atomically(tmp_path / name, b"new")
        (tmp_path / f".{name[:200].encode()[:200].decode()}.0123456789abcdef.tmp").touch()
        clear_stale(tmp_path / name)
        assert os.listdir(tmp_path) == [name]
        os.unlink(tmp_path / name)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_is_readable_by_those_whom_the_umask_lets(path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(path, b"new")
    finally:
        assert os.umask(old) == 0o027
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_folder_that_is_not_there_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "memory.hmn", b"new")


def test_an_error_names_the_file_that_was_to_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, *_: object) -> int:
        raise PermissionError(13, "Permission denied", name)

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        with pytest.raises(PermissionError) as caught:
            write_atomically(path, b"new")
    assert caught.value.filename == os.path.realpath(path)


def test_so_does_an_error_of_a_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")

    def refuse(*_: object) -> int:
        raise OSError(27, "File too large")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(OSError, match="File too large") as caught:
            write_atomically(path, b"new")
    assert caught.value.filename == os.path.realpath(path)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_link_is_written_through(path: Path) -> None:
    (path.parent / "folder").mkdir()
    target = path.parent / "folder" / "target"
    path.symlink_to("folder/target")
    for data in (b"first", b"second"):
        write_atomically(path, data)
        assert path.is_symlink()
        assert target.read_bytes() == data
    assert os.listdir(target.parent) == ["target"]


def test_a_function_may_write_the_file(path: Path) -> None:
    def write(name: str) -> None:
        assert Path(name).parent == path.parent
        assert not path.exists()
        Path(name).write_bytes(b"new")

    def fail(name: str) -> None:
        Path(name).write_bytes(b"less")
        raise ZeroDivisionError

    write_atomically(path, write)
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(10)
def test_what_is_no_regular_file_is_left_alone(path: Path) -> None:
    os.mkfifo(path)
    for target in (path, Path(os.devnull)):
        mode = target.stat().st_mode
        with pytest.raises(OSError, match="Not a regular file"):
            write_atomically(target, b"new")
        assert target.stat().st_mode == mode
    with pytest.raises(IsADirectoryError):
        write_atomically(path.parent, b"new")
    assert os.listdir(path.parent) == [path.name]


def test_a_target_is_checked_without_a_write(path: Path) -> None:
    assert check_target(path) == Path(os.path.realpath(path))
    with pytest.raises(FileNotFoundError, match="No such folder"):
        check_target(path / "memory.hmn")
    assert not path.exists()


def test_a_digest_is_of_the_values_however_they_are_held() -> None:
    images = torch.arange(7 * 3 * 8 * 9, dtype=torch.int16).view(7, 8, 9, 3)
    values: dict[str, Images] = {
        "images": images.permute(0, 3, 1, 2),
        "one": torch.tensor(3.0),
        "column": images[:, 0, 0, :1],
    }
    digest = digest_tensors("text", values)
    contiguous = images.permute(0, 3, 1, 2).contiguous()
    for same_images in (contiguous, join_images([contiguous[:4], contiguous[4:]])):
        column = images[:, 0, 0, :1].contiguous()
        same = {**values, "images": same_images, "column": column}
        assert digest_tensors("text", same) == digest
    assert digest_tensors("text", {**values, "images": images}) != digest
    assert digest_tensors("test", values) != digest
    assert digest_tensors("text", {**values, "one": torch.tensor(4.0)}) != digest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_digest_is_the_same_wherever_the_values_are() -> None:
    values = {"rows": torch.rand(7, 3), "one": torch.tensor(3.0)}
    moved = {name: value.cuda() for name, value in values.items()}
    assert digest_tensors("text", moved) == digest_tensors("text", values)


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_what_a_killed_write_has_left_is_cleared_and_nothing_else(path: Path) -> None:
    script = f"""
        import os, signal, time
        from hmn_replay.files import write_atomically
        def wait(temporary):
            open(temporary, "wb").write(b"half")
            print(temporary, flush=True)
            time.sleep(60)
        write_atomically({str(path)!r}, wait)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        temporary = Path(writer.stdout.readline().strip())
        others = [
            path.with_name(".memory.hmn.tmp"),
            path.with_name(".memory.hmn.0123.tmp"),
            path.with_name(".other.hmn.0123456789abcdef.tmp"),
        ]
        for other in others:
            other.touch()
        clear_stale(path)
        assert temporary.exists()  # someone is writing it
        writer.kill()
        writer.wait()
    assert temporary.exists()
    clear_stale(path)
    assert not temporary.exists()
    assert all(other.exists() for other in others)
    clear_stale(path.parent / "absent" / "memory.hmn")


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_a_writer_whose_file_is_taken_for_stale_at_once_takes_another(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat, taken = os.fstat, list[str]()

    def after_a_thief(descriptor: int) -> os.stat_result:
        if not taken:
            (found,) = os.listdir(path.parent)
            taken.append(found)
            os.unlink(path.with_name(found))
        return fstat(descriptor)

    monkeypatch.setattr("os.fstat", after_a_thief)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == [path.name]
