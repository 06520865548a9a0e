"""The README's examples run, its command lines parse, and what it quotes is what the files say."""
import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"python -m (mixtral_\w+)([^#`|\n]*)", README + (ROOT / "Makefile").read_text())


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


def test_there_is_a_command_line_of_each_program():
    assert {module for module, _ in COMMANDS} == {"mixtral_model", "mixtral_bench"}


@pytest.mark.parametrize("module, arguments", COMMANDS, ids=lambda text: text.strip())
def test_command_line_parses(module, arguments, monkeypatch):
    """With the program's own parser; nothing is run."""
    class Parsed(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, *given):
        raise Parsed(parse_args(self, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        importlib.import_module(f"{module}.__main__").main(shlex.split(arguments))


def test_no_placeholder_is_left():
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|XXX+|PLACEHOLDER|lorem ipsum)\b|\?\?|\{\{|<[A-Za-z][\w -]*>", README, re.I)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_linked_file_exists(link):
    assert (ROOT / link).exists()


def test_what_gpu_check_takes():
    from mixtral_bench import gpu_check

    quoted = re.search(r"`make gpu-check`.*?\n\n", README, re.S).group()
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"`([A-Z]+)=", quoted):
        assert re.search(rf"^{name} =", makefile, re.M), name
    (parts,) = re.findall(r'PARTS="([^"]*)"', quoted)
    assert parts.split() == list(gpu_check.PARTS) and f'PARTS="{parts}"' in makefile


@pytest.mark.parametrize("target", re.findall(r"^make ([a-z-]+)", README, re.M))
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
