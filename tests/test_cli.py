"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from visiontok import _window, cli, doctor
from visiontok.errors import ConfigError, UnsupportedError

Call = Callable[..., SimpleNamespace]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `visiontok ARGUMENTS` in this process; gives code, out and err."""

    def run(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["visiontok", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        streams = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=streams.out, err=streams.err)

    return run


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for `visiontok.run`: notes what it was called with."""
    note = SimpleNamespace(arguments=None, error=None)

    def run_job(**arguments: object) -> SimpleNamespace:
        note.arguments = arguments
        if note.error:
            raise note.error
        return SimpleNamespace(to_dict=lambda: {"answer": "a cat"}, render=lambda console: console.print("a cat"))

    module = ModuleType("visiontok.run")
    module.run_job = run_job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "visiontok.run", module)
    return note


def test_help_is_light(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from visiontok import cli\n"
        "sys.argv = ['visiontok', '--help']\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich.console'}\n"
        "try: cli.main()\n"
        "finally: print(*heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert all(command in done.stdout for command in ("run", "methods", "doctor"))


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("visiontok")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.1.0\n", "")


def test_run_hands_over_its_arguments(call: Call, job: SimpleNamespace) -> None:
    done = call(
        *(
            "run",
            "--image",
            "cat.png",
            "--ask",
            "What is it?",
            "--method",
            "fastv",
            "--keep",
            "0.5",
            "--mass",
            "--model",
            "m",
        ),
        *("--device", "cpu", "--overlay", "out.png", "--seed", "3", "--max-new-tokens", "7"),
        *("--option", "layer=2", "--option", "note = a=b"),
    )
    assert (done.code, done.out, done.err) == (0, "a cat\n", "")
    assert job.arguments == {
        "image": "cat.png",
        "ask": "What is it?",
        "method": "fastv",
        "keep": "0.5",
        "mass": True,
        "model": "m",
        "device": "cpu",
        "overlay": "out.png",
        "seed": 3,
        "max_new_tokens": 7,
        "options": {"layer": "2", "note": "a=b"},
    }


def test_run_needs_no_argument(call: Call, job: SimpleNamespace) -> None:
    assert call("run").code == 0
    assert job.arguments["image"] is job.arguments["ask"] is job.arguments["keep"] is job.arguments["overlay"] is None
    assert (job.arguments["model"], job.arguments["device"], job.arguments["options"]) == ("tiny", "auto", {})


def test_run_json(call: Call, job: SimpleNamespace) -> None:
    assert json.loads(call("run", "--json").out) == {"answer": "a cat"}


@pytest.mark.parametrize("error", [ConfigError("keep=7:\n  too much; give less"), UnsupportedError("no way; use that")])
def test_user_errors_are_one_line(call: Call, job: SimpleNamespace, error: Exception) -> None:
    job.error = error
    done = call("run")
    assert (done.code, done.out, done.err) == (2, "", f"visiontok: {' '.join(str(error).split())}\n")


def test_other_errors_keep_their_traceback(call: Call, job: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    job.error = RuntimeError("a bug")
    monkeypatch.setattr(sys, "argv", ["visiontok", "run"])
    # Python itself turns it into a traceback and exit code 1.
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--option", "layer"], "--option 'layer': write it as name=value"),
        (["run", "--option", "=3"], "--option '=3': write it as name=value"),
        (["run", "--option", "a=1", "--option", "a=2"], "--option 'a' is given twice"),
        (["methods", "divprun"], "method='divprun': unknown; did you mean divprune"),
        (["methods", "xyzzy"], "method='xyzzy': unknown; known methods: visiontok, random, "),
    ],
)
def test_wrong_arguments(call: Call, job: SimpleNamespace, arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"visiontok: {message}")
    assert done.err.count("\n") == 1
    assert job.arguments is None


@pytest.mark.parametrize(
    "arguments", [["run", "--bogus"], ["run", "--seed", "x"], ["bogus"], ["run", "--max-new-tokens", "0"]]
)
def test_usage_errors(call: Call, arguments: list[str]) -> None:
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err
    assert "Traceback" not in done.err


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """A picture of no particular size."""
    path = tmp_path / "picture.png"
    Image.effect_noise((90, 60), 80).convert("RGB").save(path)
    return str(path)


def test_the_real_run(call: Call, picture: str, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.png"
    asked = ("--image", picture, "--ask", "what color is the circle?", "--max-new-tokens", "3")
    done = call("run", *asked, "--method", "divprune", "--keep", "0.25", "--overlay", str(overlay), "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result["tokens_kept"] == result["tokens_in"] // 4
    with Image.open(overlay) as image:
        assert min(image.size) > 0


def test_the_real_run_without_arguments(call: Call) -> None:
    done = call("run")
    assert (done.code, done.err) == (0, "")
    assert "36 (25.0%)" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nope.png", "--ask", "what?"], "image 'nope.png' does not exist; check the path"),
        (["--method", "divprun"], "method='divprun': unknown; did you mean divprune"),
        (["--keep", "7x"], "keep='7x': "),
        (["--model", "/nonexistent"], "--model '/nonexistent': there is no such folder"),
        (["--option", "bogus=1"], "bogus='1': "),
        (["--device", "bogus"], "--device 'bogus': "),
        (["--overlay", "/nonexistent/o.png"], "--overlay '/nonexistent/o.png': there is no folder"),
    ],
)
def test_the_real_run_with_wrong_arguments(call: Call, arguments: list[str], message: str) -> None:
    done = call("run", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"visiontok: {message}")
    assert done.err.count("\n") == 1


def test_methods_lists_every_method(call: Call) -> None:
    import visiontok

    done = call("methods")
    names = [card.name for card in visiontok.methods()]
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines() if not line.startswith(" ")] == ["method", *names]
    assert [card["name"] for card in json.loads(call("methods", "--json").out)] == names


def test_every_card_can_be_printed(call: Call) -> None:
    import visiontok

    for card in visiontok.methods():
        done = call("methods", card.name)
        assert done.code == 0
        assert done.out.startswith("name")
        assert card.formula[:20] in done.out
        assert json.loads(call("methods", card.name, "--json").out) == dataclasses.asdict(card)
    assert json.loads(call("methods", "--json").out) == [dataclasses.asdict(card) for card in visiontok.methods()]


def test_the_table_of_methods_is_written_by_a_command(call: Call, tmp_path: Path) -> None:
    from visiontok import catalogue

    file = tmp_path / "README.md"
    file.write_text(f"{catalogue.BEGIN}\n{catalogue.END}\n")
    assert call("methods", "--markdown", str(file)).code == 0
    assert catalogue.table() in file.read_text()
    done = call("methods", "divprune", "--markdown", str(file))
    assert done.code == 2
    assert "leave NAME and --json out" in done.err


def test_doctor(call: Call) -> None:
    done = call("doctor")
    assert done.code == 0
    assert "sdpa" in done.out
    findings = json.loads(call("doctor", "--json").out)
    assert findings["devices"][0]["device"] == "cpu"
    assert findings["versions"]["visiontok"] == "0.1.0"
    assert findings["transformers"] == _window.describe(findings["versions"]["transformers"])
    assert findings["transformers"] in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("4.57.6", "is not supported: it is older than"),
        ("5.9.0", "is not supported: it is older than"),
        ("5.13.1", "is not supported: it is older than"),
        ("5.14.0", "lies in"),
        ("5.20.2", "lies in"),
        ("5.23.9", "lies in"),
        ("5.24.0.dev0", "is untested: it is newer than"),
        ("6.0rc1", "is untested: it is newer than"),
    ],
)
def test_doctor_tells_whether_transformers_is_tested(
    call: Call, monkeypatch: pytest.MonkeyPatch, version: str, verdict: str
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    monkeypatch.setattr(_window, "TESTED", ("5.14.1", "5.20.2", "5.23.0"))
    findings = json.loads(call("doctor", "--json").out)
    assert findings["transformers"] == f"{version} {verdict} the tested window 5.14 – 5.23"


def test_doctor_where_everything_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "torchvision", "triton", "visiontok.demo"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(doctor, "_version", lambda name: doctor.NOT_INSTALLED)
    findings = json.loads(call("doctor", "--json").out)
    for name in ("transformers", "torch", "torchvision", "embedded models"):
        assert findings[name] == "not installed"
    assert findings["triton"].startswith("not installed")
    assert findings["devices"] == []
    assert call("doctor").code == 0


def test_doctor_tells_why_a_package_does_not_import(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "triton.py").write_text("raise OSError('libcuda.so: cannot open\\nmore')")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    findings = json.loads(call("doctor", "--json").out)
    assert findings["triton"].startswith("cannot be imported: OSError: libcuda.so: cannot open; ")


# ----------------------------------------------------------------------------------------------------------------- cost


def test_cost_prints_a_published_row(call: Call) -> None:
    done = call("cost", "--schedule", "2x576,30x288", "--convention", "B")
    assert (done.code, done.err) == (0, "")
    head, published, *rest, schedule = done.out.splitlines()
    assert schedule == "schedule: 2x576,30x288"
    assert head.split() == ["32x576", "schedule", "left"]
    assert published.split()[-6:] == ["3.817", "T", "2.007", "T", "52.6", "%"]
    assert [line.split()[-2] for line in rest] == ["52.6", "53.1", "53.1"]
    assert "A:" not in done.out


def test_cost_solves_a_shape(call: Call) -> None:
    arguments = ("cost", "--schedule", "single@2", "--average", "192", "--stock", "576", "--stop", "24", "--json")
    assert json.loads(call(*arguments).out)["schedule"]["schedule"] == "2x576,22x226,8x0"


def test_cost_in_json_has_every_convention_and_the_text(call: Call) -> None:
    arguments = ("cost", "--model", "llava-onevision-7b", "--schedule", "28x100", "--stock", "6272", "--text", "100")
    found = json.loads(call(*arguments, "--json").out)
    assert list(found["schedule"]["published"]) == ["A", "B", "C", "D"]
    assert found["stock"]["schedule"] == "28x6272"
    assert f"{found['stock']['published']['D'] / 1e12:.2f}" == "99.63"
    assert found["stock"]["kv"] == 28 * 6372 * 2 * 512 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--schedule", "2x"), "cannot read '2x'"),
        (("--schedule", "2x5"), "has 2 layers, the model 32"),
        (("--schedule", "32x5", "--convention", "E"), "convention='E'"),
        (("--schedule", "32x5", "--model", "m"), "model='m'"),
        (("--schedule", "32x5", "--text", "-1"), "text=-1"),
        (("--schedule", "single@2"), "--average"),
        (("--schedule", "32x5", "--stop", "3"), "--average"),
        (("--schedule", "single@2", "--average", "64"), "--stock 576"),
        (("--schedule", "32x5", "--average", "64", "--stock", "576"), "write single@2"),
    ],
)
def test_cost_names_what_is_wrong(call: Call, arguments: tuple[str, ...], said: str) -> None:
    done = call("cost", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
