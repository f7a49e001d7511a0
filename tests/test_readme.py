"""The Python of the README does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import visiontok
from visiontok import catalogue
from visiontok.conformance.zoo import batch, build
from visiontok.errors import ConfigError

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def block(start):
    (found,) = [b for b in BLOCKS if b.startswith(start)]
    return found


@pytest.fixture
def names():
    model = build("llava")
    return {"visiontok": visiontok, "model": model, "inputs": batch("llava", model)}


def test_the_block_on_top(names):
    source = block("import visiontok").replace("**inputs)", "**inputs, max_new_tokens=2)")
    exec(source, names)
    assert names["compression"].report.images[0].kept == (4,) * 4


def test_the_table_of_methods_is_made_of_the_cards():
    table = README.read_text().split(catalogue.BEGIN)[1].split(catalogue.END)[0]
    assert table == f"\n{catalogue.table()}\n", "run `visiontok methods --markdown README.md`"


def test_what_needs_weights_that_are_not_there_is_never_ticked():
    for card, line in zip(visiontok.methods(), catalogue.table().splitlines()[2:], strict=True):
        cells = dict(zip(catalogue.HEADINGS, (cell.strip() for cell in line.strip("|").split(" | ")), strict=True))
        assert cells["name"].startswith(f"`{card.name}")
        assert (cells["published"] == "weights") == (card.trained != "none") == (card.trained in cells["idea"])
        assert cells["sync"] == ("✓" if card.contract.sync_free else "")


def test_the_table_is_written_between_its_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"above\n{catalogue.BEGIN}\nstale\n{catalogue.END}\nbelow\n")
    catalogue.write(file)
    assert file.read_text() == f"above\n{catalogue.BEGIN}\n{catalogue.table()}\n{catalogue.END}\nbelow\n"
    for bad in ("nothing", f"{catalogue.END}\n{catalogue.BEGIN}\n"):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="needs one line"):
            catalogue.write(file)
        assert file.read_text() == bad
