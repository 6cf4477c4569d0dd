"""What the documentation says is there: links, anchors, commands with their flags, imports."""

import os
import subprocess
import sys

import pytest

from tests.helpers.pages import Page, code_complaints, inline_complaints, link_complaints
from tests.helpers.shell import ROOT, every_flag

pytestmark = pytest.mark.xdist_group("docs")

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# It tells what flags were before.
OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]


def cases(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("path", cases(PAGES))
def test_links_lead_somewhere(path):
    wrong = list(link_complaints(Page.read(path)))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", cases(PAGES))
def test_code_would_work(path):
    wrong = list(code_complaints(Page.read(path)))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", cases(OF_TODAY))
def test_commands_and_flags_in_sentences_exist(path):
    wrong = list(inline_complaints(Page.read(path), every_flag()))
    assert not wrong, "\n".join(wrong)


WRONG = {
    "[a](nothing.md)": "line 1: nothing.md does not exist",
    "![a\nb](images/nothing.png)": "line 1: images/nothing.png does not exist",
    "text\n\n[a](README.md#nowhere)": "line 3: README.md has no heading for #nowhere",
    "# One\n\n[a](#two)": "line 3: this page has no heading for #two",
    '<img src="nothing.png">': "line 1: nothing.png does not exist",
    "[a](../../elsewhere)": "line 1: ../../elsewhere does not exist",
    "```\nx\n```": "line 1: a block of language ''",
    "    indented": "line 1: a block of language ''",
    "```sh\nif true; then\n```": "line 1: bash: line",
    "```sh\ngaze-jax paint\n```": "line 2: gaze-jax has no paint",
    "```sh\ngaze-jax view a.gaze --out=x --pgn\n```": "line 2: gaze-jax view: Unknown command line",
    "```sh\n# fine\npython eval.py \\\n    --workdri=runs/x\n```": "line 3: gaze-jax eval: Unknown",
    "```sh\ngaze-jax generate --gaze_top_k=many\n```": "line 2: gaze-jax generate: flag --gaze_top_k=many",
    "```sh\ngaze-jax generate photo.jpg\n```": "line 2: gaze-jax generate takes no argument photo.jpg",
    "```sh\ngaze-jax train --config=configs/digits.py --config.stepz=3\n```": "line 2: gaze-jax train: ",
    "```sh\npython nothing.py\n```": "line 2: there is no script nothing.py",
    "```sh\npython -m benchmarks.nothing\n```": "line 2: there is no module benchmarks.nothing",
    "```sh\ncd x && python -m benchmarks.layouts --fast\n```": "line 2: unrecognized arguments: --fast",
    "```sh\npython -m benchmarks.digits --fast\n```": "line 2: benchmarks/digits.py has no flag --fast",
    "```sh\npython examples/steer.py ckpt\n```": "line 2: the following arguments are required: image",
    "```sh\nscripts/nothing.sh\n```": "line 2: scripts/nothing.sh is no program",
    "```sh\nscripts/pods/tpu_vm.sh strat\n```": "line 2: scripts/pods/tpu_vm.sh has no strat",
    "```sh\nscripts/digits.sh out --config.stepz=3\n```": "line 2: gaze-jax train: ",
    "```sh\nscripts/test.sh tests/nothing\n```": "line 2: pytest: tests/nothing does not exist",
    "```sh\npytest --fast\n```": "line 2: pytest: --fast is not in PYTEST_FLAGS",
    "```sh\npip install -e '.[plto]'\n```": "line 2: pyproject.toml has no extra plto",
    "```sh\nrm -r x\n```": "line 2: rm is no command",
    "```python\nx = = 1\n```": "line 2: invalid syntax",
    "```python\n\nimport gaze_jax\n\ngaze_jax.lod()\n```": "line 5: gaze_jax.lod: gaze_jax has no lod",
    "```python\nfrom gaze_jax.infer import smapler\n```": "line 2: gaze_jax.infer has no smapler",
    "```python\nimport gaze_jax.nothing\n```": "line 2: No module named 'gaze_jax.nothing'",
    "```python\nimport gaze_jax\n\ngaze_jax.GazeOptions(kep=1)\n```": "line 4: gaze_jax.GazeOptions(kep=1)",
    "```python\nimport gaze_jax\n\ngaze_jax.LookAt.prase('')\n```": "line 4: gaze_jax.LookAt.prase: ",
    '```json\n{"a": 1,}\n```': "line 2: not JSON",
    "Use `--gaze_top_q=3`.": "line 1: no command has the flag --gaze_top_q",
    "Use\n`python generate.py --chekpoint=x`.": "line 1: gaze-jax generate: Unknown command line flag",
}
"""Pages with one mistake each, and what is said about it."""


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_found(text):
    page = Page(ROOT / "page.md", text)
    found = [*link_complaints(page), *code_complaints(page), *inline_complaints(page, every_flag())]
    assert len(found) == 1 and found[0].startswith(WRONG[text]), found


def test_what_is_right_is_not_complained_about():
    text = (
        "# A `b_c` (d)!\n\n# A `b_c` (d)!\n\n[1](#a-b_c-d) [2](#a-b_c-d-1) [3](https://x.y) ![4](docs)\n\n"
        "```sh\nX=1 .venv/bin/python eval.py --workdir=runs/x > out.txt; scripts/test.sh -m long\n"
        "gaze-jax generate --checkpoint=c --nogaze_dense   # a comment --of=this\n"
        "scripts/digits.sh out --config.steps=3 && python -m gaze_jax.viewer a b --out=x | cd y\n```\n\n"
        "```python\nimport gaze_jax\n\nmodel = gaze_jax.load('x', select_per='head')\nmodel.anything\n```\n\n"
        "`python examples/steer.py` and `--gaze_top_k`, `[not](a-link)`"
    )
    page = Page(ROOT / "page.md", text)
    assert not [*link_complaints(page), *code_complaints(page), *inline_complaints(page, every_flag())]


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path / 'site'}"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stdout + built.stderr
    page = (tmp_path / "site" / "architecture.html").read_text(encoding="utf-8")
    assert '<pre class="mermaid">' in page
    page = (tmp_path / "site" / "api" / "inference.html").read_text(encoding="utf-8")
    assert 'id="gaze_jax.load"' in page and ":class:" not in page
    assert "fonts.googleapis" not in page
