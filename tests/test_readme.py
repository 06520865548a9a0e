"""The README's examples run, and what it quotes is what the files say."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_is_an_example_for_each_python_user():
    text = "\n".join(PYTHON_BLOCKS)
    for use in ("integrations.transformers", "mixtral_ext.moe_experts", "mixtral_ext.numpy"):
        assert use in text


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_example_runs(block):
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_c_example_is_quoted_word_for_word():
    quoted = re.search(r"```c\n(.*?)```", README, re.S).group(1)
    assert quoted == (ROOT / "tests/c/example.c").read_text()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_linked_file_exists(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("target", re.findall(r"^make ([a-z-]+)", README, re.M))
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
