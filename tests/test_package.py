"""What is installed, under which names, and what `import visiontok` costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import visiontok
from visiontok._window import TESTED

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("adapters", "kernels", "eval", "demo")


def python(code: str, cwd: Path, **environment: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # setuptools builds into the source tree and would pick up what an earlier build left there.
    source = folder / "source"
    source.mkdir()
    for name in ("visiontok", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("visiontok-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_wheel_holds_every_package_under_one_name(prefix: Path, tmp_path: Path) -> None:
    names = settings()["tool"]["setuptools"]["packages"]
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    files = python(code, tmp_path, PYTHONPATH=str(prefix)).splitlines()
    assert files == [str(prefix.joinpath(*name.split("."), "__init__.py")) for name in names]


def test_the_window_of_transformers_is_what_is_required_and_pinned() -> None:
    assert f"transformers>={TESTED[0]}" in settings()["project"]["dependencies"]
    assert f"transformers=={TESTED[-1]}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_wheel_has_no_bare_names(prefix: Path) -> None:
    assert {path.name for path in prefix.iterdir() if not path.name.endswith(".dist-info")} <= {"visiontok", "bin"}
    # -I -S: neither the working directory nor anything else that is installed.
    code = (
        f"import sys, importlib.util as u; sys.path[:0] = [{str(prefix)!r}]; print([u.find_spec(n) for n in {FOLDERS}])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([None] * len(FOLDERS))


def test_wheel_holds_every_file(prefix: Path) -> None:
    installed = {path.relative_to(prefix).as_posix() for path in (prefix / "visiontok").rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "visiontok").rglob("*.py")}
    for name in FOLDERS:
        expected |= {f"visiontok/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / name).rglob("*.py")}
    for data in ("demo/weights", "demo/examples", "eval/tasks"):
        files = (path for path in (ROOT / data).rglob("*") if path.is_file() and path.suffix != ".pyc")
        expected |= {f"visiontok/{path.relative_to(ROOT).as_posix()}" for path in files}
    expected |= {"visiontok/py.typed"}
    assert expected - installed == set()


def test_every_folder_with_an_init_is_listed() -> None:
    places = [ROOT / "visiontok", *(ROOT / name for name in FOLDERS)]
    found = set()
    for place in places:
        for init in place.rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "visiontok" else ("visiontok", *parts)))
    assert found == set(settings()["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_editable_install_works_from_any_folder(where: str, tmp_path: Path) -> None:
    code = "import visiontok.adapters, visiontok.kernels, visiontok.eval, visiontok.demo; print(visiontok.__version__)"
    assert python(code, ROOT if where == "root" else tmp_path) == settings()["project"]["version"]


def test_transformers_imports_from_the_repository_root() -> None:
    code = (
        "import visiontok._torchvision\n"
        "from transformers import LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration\n"
        "print('ok')"
    )
    assert python(code, ROOT) == "ok"


def test_torchvision_stand_in_lets_transformers_load_its_models(tmp_path: Path) -> None:
    code = (
        "import visiontok._torchvision\n"
        "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
        "print(LlavaForConditionalGeneration.__name__)"
    )
    assert python(code, tmp_path) == "LlavaForConditionalGeneration"


def test_torchvision_stand_in_is_there_exactly_when_the_builds_do_not_fit(tmp_path: Path) -> None:
    code = (
        "import sys, torch, visiontok._torchvision as t\n"
        "assert 'torchvision' not in sys.modules\n"
        "cpu = torch.version.cuda is None and torch.version.hip is None\n"
        "print(t.is_active() == (cpu and '+cu' in (t.installed_version() or '')))"
    )
    assert python(code, tmp_path) == "True"


def test_import_is_light(tmp_path: Path) -> None:
    code = "import sys, json, visiontok; print(json.dumps(sorted(sys.modules)))"
    assert not {"torch", "transformers", "triton", "numpy", "PIL"} & set(json.loads(python(code, tmp_path)))


def test_public_names() -> None:
    for name in visiontok.__all__:
        assert name in dir(visiontok)
        assert getattr(visiontok, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = visiontok.nonsense


def test_recipe_stays_a_function_when_its_module_is_imported_first(tmp_path: Path) -> None:
    code = "import visiontok.recipe; from visiontok import recipe; print(callable(recipe), callable(visiontok.recipe))"
    assert python(code, tmp_path) == "True True"


def test_core_needs_neither_pydantic_nor_open_clip(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('pydantic', 'open_clip', 'timm', 'triton', 'gradio', 'accelerate'): sys.modules[name] = None\n"
        "import visiontok\n"
        "for name in visiontok.__all__:\n"
        "    if name != 'demo': getattr(visiontok, name)\n"
        "import visiontok.adapters, visiontok.kernels, visiontok.images, visiontok.doctor, visiontok.cli\n"
        "visiontok.doctor.inspect()\n"
        "print('ok')"
    )
    assert python(code, tmp_path) == "ok"
