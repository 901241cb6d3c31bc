from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transfercache.errors import LockedError, UsageError
from transfercache.finetuning.checkpoints import Checkpoints

IDENTITY = {"--batch-size": 4, "images, labels or split": "a" * 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "m.safetensors.checkpoints"


def _checkpoints(folder: Path, **changes: Any) -> Checkpoints:
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpoints(folder, **{"resume": True, "identity": IDENTITY, **changes})


def _write(folder: Path, *numbers: int, keep: int = 2) -> Checkpoints:
    checkpoints = _checkpoints(folder, keep=keep)
    for number in numbers:
        checkpoints.write({"x": torch.full((3,), float(number)), "list": [1, None, "word"]}, epoch=number, n_trained=0)
    return checkpoints


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest__is_what_was_written_last_and_older_ones_are_gone(folder: Path) -> None:
    checkpoints = _write(folder, 9, 10, 11)
    assert _names(folder) == ["000010-000000000000.pt", "000011-000000000000.pt"]
    state = checkpoints.newest()
    assert state is not None
    assert state["x"].tolist() == [11.0] * 3
    assert state["list"] == [1, None, "word"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    """In a tensor, which torch.load alone would take."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((3,), 2.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip])
def test_newest__a_damaged_one_is_named_and_the_one_before_it_taken(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    checkpoints = _write(folder, 1, 2)
    damage(folder / "000002-000000000000.pt")
    with caplog.at_level(logging.WARNING):
        state = checkpoints.newest()
    assert state is not None
    assert state["x"].tolist() == [1.0] * 3
    assert caplog.messages == [f"{folder}/000002-000000000000.pt: torn or damaged; it is passed over"]


def test_newest__code_in_a_file_does_not_run(folder: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    checkpoints = _write(folder, 1)
    torch.save({"identity": Hostile()}, folder / "000002-000000000000.pt")
    state = checkpoints.newest()
    assert state is not None
    assert state["x"].tolist() == [1.0] * 3
    assert not (tmp_path / "ran").exists()


def test_newest__none_to_go_on_from_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _checkpoints(folder).newest() is None
    assert caplog.messages == [f"{folder}: no checkpoint to go on from; the run begins at the first epoch"]


def test_newest__of_another_run_says_what_differs(folder: Path) -> None:
    _write(folder, 1)
    other = _checkpoints(folder, identity={"--batch-size": 8, "images, labels or split": "b" * 64, "--ema": 0.9})
    message = r"of another run \(--batch-size 4 then, 8 now, other images, labels or split, --ema None then, 0.9 now\)"
    with pytest.raises(UsageError, match=message):
        other.newest()


def test_newest__other_versions_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = _write(folder, 1)
    monkeypatch.setattr("transfercache.finetuning.checkpoints.installed_versions", lambda: {"torch": "9"})
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest() is not None
    assert "made by other versions of torch or what decodes" in caplog.text


def test_held__an_unfinished_run_is_not_begun_anew_without_a_word(folder: Path) -> None:
    _write(folder, 1)
    message = (
        r"checkpoints: holds the checkpoints of an unfinished run; go on with it by --resume, or remove that folder"
    )
    with pytest.raises(UsageError, match=message), _checkpoints(folder, resume=False).held():
        pytest.fail("it must not begin")
    assert "000001-000000000000.pt" in _names(folder)


def test_held__leaves_no_folder_behind_where_nothing_is_in_it(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), Checkpoints(folder).held():
        raise ZeroDivisionError
    assert not folder.exists()
    checkpoints = Checkpoints(folder)
    with checkpoints.held():
        checkpoints.write({}, epoch=1, n_trained=0)
        (folder / ".000002-000000000000.pt.99.tmp").touch()  # what a kill leaves
        checkpoints.remove()
    assert not folder.exists()


def test_held__interrupted_after_a_kill_within_the_first_write__leaves_no_folder_and_its_own_error(
    folder: Path,
) -> None:
    folder.mkdir(parents=True)
    (folder / ".000001-000000000000.pt.99.tmp").touch()
    with pytest.raises(KeyboardInterrupt), Checkpoints(folder).held():
        raise KeyboardInterrupt
    assert not folder.exists()


def test_held__by_one_run_at_a_time(folder: Path) -> None:
    first, second = Checkpoints(folder), Checkpoints(folder, resume=True)
    with first.held():
        with pytest.raises(LockedError, match="another process is writing to it"), second.held():
            pytest.fail("two at once")
        first.write({}, epoch=1, n_trained=0)
    assert _names(folder) == ["000001-000000000000.pt", "lock"]


def test_is_due__when_the_last_one_is_old_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = _checkpoints(folder)
    assert not checkpoints.is_due()
    monkeypatch.setattr("transfercache.finetuning.checkpoints._SECONDS_BETWEEN", 0.0)
    assert checkpoints.is_due()
