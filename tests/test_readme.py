"""What README tells a newcomer to type is typed here, in order, in one folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# What a default would download is replaced: every other word stands as in README.
NEEDS_WEIGHTS = ("extract-features", "train-head", "finetune", "compare")
NEEDS_NETWORK = ("tlc demo",)


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer's folder: photographs of two classes, told apart by colour, new ones, and a file of labels."""
    folder = tmp_path_factory.mktemp("newcomer")
    rng = np.random.default_rng(0)
    for name, colour in {"my_photos/cats": 60, "my_photos/dogs": 190, "new_photos": 120}.items():
        (folder / name).mkdir(parents=True)
        for index in range(8):
            pixels = rng.normal(colour, 25, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")
    (folder / "fixes.csv").write_text("path,label\ncats/0.jpg,dogs\n", encoding="utf-8")
    return folder


def run(words: list[str], folder: Path) -> str:
    """Run a program in `folder`; returns its stdout, and shows its stderr where it fails."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "xdg"), "TORCH_HOME": str(folder / "torch")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_commands__run_in_order(folder: Path) -> None:
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [line for line in lines if line and line not in NEEDS_NETWORK]
    assert len(commands) >= 7
    assert {shlex.split(line)[1] for line in commands} == {*NEEDS_WEIGHTS, "predict", "export", "cache", "doctor"}
    for line in commands:
        words = shlex.split(line)
        weights = ["--weights", "random"] if words[1] in NEEDS_WEIGHTS else []
        run([str(Path(sys.executable).with_name("tlc")), *words[1:], *weights], folder)
    lines_out = (folder / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert lines_out[0] == "path,label,probability,reason,label_2,probability_2"
    assert len(lines_out) == 1 + 8
    assert {line.split(",")[1] for line in lines_out[1:]} <= {"cats", "dogs"}


def test_readme_python__runs(folder: Path) -> None:
    [code] = blocks("python")
    assert code.count('("my_photos/")') == 2
    # The two calls that would download say where the weights come from; the rest stands as in README.
    code = code.replace('("my_photos/")', '("my_photos/", weights="random", cache_dir="python-cache")')
    code = code.replace("import transfercache as tc\n", "import transfercache as tc\nimport numpy as np\n")
    code += "assert X.shape == (12, 512) and X.dtype == np.float32 and y.dtype == np.int64\nprint('done')\n"
    assert run([sys.executable, "-c", code], folder) == "done\n"


def test_wheel__runs_outside_the_repository(tmp_path: Path) -> None:
    # --no-isolation: the build backend is a test extra, so nothing is fetched.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    [wheel] = (tmp_path / "dist").glob("transfercache-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "transfercache/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    # The wheel's own files before the checkout's, dependencies from this environment, the working folder elsewhere.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv = ['tlc', '--version']\n"
        "import transfercache; assert transfercache.__file__.startswith(sys.path[0]), transfercache.__file__\n"
        "from transfercache.cli.main import run; run()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"tlc \d+\.\d+\.\d+\n", done.stdout)
