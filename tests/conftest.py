"""Fixtures for every room, and the closing lines: the figures of long tests, and what the `real` ones did."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FIGURES = pytest.StashKey[list[str]]()
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_ABSENT = "the real photographs and weights are not beside this checkout (../shared/data)"

_KEPT_OUT = ("TORCH_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "TRANSFERCACHE_DIR", "NO_COLOR")
_KEPT_OUT_PREFIXES = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaign", action="store_true", help="run the long campaigns (tests/campaign) ten times as long"
    )


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> int:
    """How many times as long as by default the campaigns run."""
    return 10 if request.config.getoption("--campaign") else 1


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines that the terminal shows at the end."""
    return request.config.stash.setdefault(FIGURES, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the figures of a process of pytest-xdist to the one that has the terminal."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = session.config.stash.get(FIGURES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take them there; a process that died has none."""
    node.config.stash.setdefault(FIGURES, []).extend(getattr(node, "workeroutput", {}).get("figures", []))


@pytest.fixture(autouse=True, scope="session")
def clean_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same for what is made once for many tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _clean_environment(monkeypatch, tmp_path_factory)
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads the developer's own caches, proxies or colours, or writes into them."""
    _clean_environment(monkeypatch, tmp_path_factory)


def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in list(os.environ):
        if name in _KEPT_OUT or name.startswith(_KEPT_OUT_PREFIXES):
            monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On images this small, torch's threads spend their time waiting for each other."""
    import torch  # here, as most tests do without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ants-and-bees folder with train/ and val/ (244 and 153 photographs)."""
    folder = tmp_path_factory.mktemp("real-photos")
    with zipfile.ZipFile(REAL_DATA / "hymenoptera_data.zip") as archive:
        archive.extractall(folder)
    return folder / "hymenoptera_data"


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """ImageNet weights of a ResNet-18, a stand-in for torchvision's own."""
    return REAL_DATA / "weights" / "resnet18-imagenet-pqf.pth"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the `real` tests, saying why, where their data is absent."""
    if REAL_DATA.is_dir():
        return
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason=REAL_ABSENT))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the figures, and say how many `real` tests ran, or why they did not."""
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(line)
    ran = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    n_ran = sum("real" in report.keywords and report.when == "call" for report in ran)
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "real" in report.keywords]
    if skipped:
        terminalreporter.write_line(f"real tests: {n_ran} ran, {len(skipped)} skipped: {REAL_ABSENT}")
    else:
        terminalreporter.write_line(f"real tests: {n_ran} ran")
