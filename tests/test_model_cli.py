"""python -m mixtral_model: output, exit codes, and errors without a traceback."""
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mixtral_model import Completion, Model, ModelError, Tokenizer, demo, generate
from mixtral_model.__main__ import main
from model_checkpoints import WINDOW, edit_json, mixtral_tokenizer, one_thread, tiny, write  # noqa: F401


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = write(tmp_path_factory.mktemp("checkpoint"), tiny(vocab_size=32000))
    mixtral_tokenizer(directory)
    return directory


def _environment(**variables):
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | variables


def _command(*arguments, **variables):
    return subprocess.run([sys.executable, "-m", "mixtral_model", *map(str, arguments)], capture_output=True, text=True,
                          env=_environment(**variables))


def _expected(checkpoint, prompt, count, **settings):
    tokenizer = Tokenizer(checkpoint)
    ids = tokenizer.encode(prompt)
    return ids, generate(Model.load(checkpoint), [ids], count, **settings)[0], tokenizer


def test_generate_as_a_process(checkpoint):
    result = _command("generate", "--checkpoint", checkpoint, "--prompt", "The window of attention", "--max-tokens", 6)
    assert result.returncode == 0, result.stderr
    ids, expected, tokenizer = _expected(checkpoint, "The window of attention", 6)
    continued = tokenizer.decode(ids + expected.token_ids).removeprefix(tokenizer.decode(ids))
    assert result.stdout == continued + "\n"
    assert "loading" in result.stderr and "prefill" in result.stderr
    assert f"{len(ids)} prompt tokens at " in result.stderr and "6 new tokens at " in result.stderr


def test_an_error_as_a_process(checkpoint, tmp_path):
    result = _command("generate", "--checkpoint", tmp_path / "nowhere", "--prompt", "x")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: {tmp_path}/nowhere: no such directory\n"


def test_batch_from_files_with_sampling_and_log_probabilities(checkpoint, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Zwei drei", encoding="utf-8")
    main(["generate", "--checkpoint", str(checkpoint), "--prompt", "One", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-tokens", "4",
          "--temperature", "0.7", "--top-p", "0.9", "--seed", "5", "--chunk-size", "2", "--logprobs"])
    lines = capsys.readouterr().out.splitlines()
    for i, prompt in enumerate(("One", "Zwei drei")):
        ids, expected, tokenizer = _expected(checkpoint, prompt, 4, temperature=0.7, top_p=0.9, seed=5 + i)
        assert f"[{i}] {tokenizer.decode(ids + expected.token_ids)}" in "\n".join(lines)
        new = [line.split()[1] for line in lines if line.startswith("new")][4 * i:4 * i + 4]
        assert new == [str(token) for token in expected.token_ids]
    assert sum(line.startswith("prompt") for line in lines) == len(Tokenizer(checkpoint).encode("One")) + len(Tokenizer(checkpoint).encode("Zwei drei")) - 2


def test_chat_and_dtype(checkpoint, capsys):
    main(["generate", "--checkpoint", str(checkpoint), "--prompt", "Hello world", "--chat", "--max-tokens", "0", "--dtype", "bf16"])
    captured = capsys.readouterr()
    assert captured.out == "\n" and "10 prompt tokens" in captured.err and "0 new tokens" in captured.err


def test_stops_at_the_end_of_sequence(checkpoint, tmp_path, capsys):
    ids, expected, tokenizer = _expected(checkpoint, "One", 5)
    directory = write(tmp_path, tiny(vocab_size=32000))
    mixtral_tokenizer(directory)
    edit_json(directory / "config.json", eos_token_id=expected.token_ids[2])
    (directory / "generation_config.json").unlink()
    main(["generate", "--checkpoint", str(directory), "--prompt", "One", "--max-tokens", "5"])
    stop = expected.token_ids.index(expected.token_ids[2]) + 1
    assert f"{stop} new tokens" in (err := capsys.readouterr().err) and err.rstrip().endswith("eos")


def test_stops_at_the_tokenizers_end_of_sequence(tmp_path, capsys):
    """params.json names none."""
    model = tiny(vocab_size=32000)
    mixtral_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    with torch.no_grad():
        first = int(model(torch.tensor([tokenizer.encode("One")])).logits[0, -1].argmax())
        head = model.lm_head.weight
        head[[first, tokenizer.eos_id]] = head[[tokenizer.eos_id, first]]
    write(tmp_path, model, "consolidated")
    main(["generate", "--checkpoint", str(tmp_path), "--prompt", "One", "--max-tokens", "5"])
    assert "1 new tokens" in (err := capsys.readouterr().err) and err.rstrip().endswith("eos")


@pytest.mark.parametrize("arguments, message", [
    (["--prompt-file", "/nonexistent/prompt.txt"], "No such file or directory: '/nonexistent/prompt.txt'"),
    ([], "no prompt: give --prompt or --prompt-file"),
    (["--prompt", "x\udcff"], r"text: expected a str that UTF-8 can encode, got 'x\\udcff'"),
    (["--prompt", "x", "--temperature", "-1"], "temperature: expected a finite number of at least 0, got -1.0"),
    (["--prompt", "x", "--device", "cuda"], "device: cuda is not there: torch .* sees 0 NVIDIA GPUs"),
    (["--prompt", "x", "--chunk-size", "0"], "chunk_size: expected an integer of at least 1, got 0"),
    (["--prompt", "x", "--seed", str(2**63)], r"seed: expected an integer from 0 to 2\*\*63 - 1, got 9223372036854775808"),
])
def test_errors_have_a_message_and_no_traceback(checkpoint, arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=message):
        main(["generate", "--checkpoint", str(checkpoint), *arguments])


def test_a_gpu_must_hold_weights_and_cache(checkpoint, monkeypatch):
    asked = []

    def check_memory(config, dtype, device, positions, mapped):
        asked.append((dtype, str(device), positions, mapped))
        raise ModelError("too small")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("mixtral_model.weights.check_memory", check_memory)
    for count in (2, 100):
        with pytest.raises(SystemExit, match="error: too small"):
            main(["generate", "--checkpoint", str(checkpoint), "--prompt", "One", "--prompt", "One two", "--max-tokens", str(count), "--dtype", "bf16",
                  "--device", "cuda"])
    longest = len(Tokenizer(checkpoint).encode("One two"))
    assert asked == [(torch.bfloat16, "cuda", 2 * min(longest + count, WINDOW), 0) for count in (2, 100)]


@pytest.mark.parametrize("module", ["safetensors", "tqdm", "mistral_common.tokens.tokenizers.mistral", "tokenizers"])
def test_a_missing_extra_is_named(checkpoint, tmp_path, monkeypatch, module):
    if module == "tokenizers":
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
        (tmp_path / "tokenizer.model.v1").rename(tmp_path / "tokenizer.json")
        checkpoint = tmp_path
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(SystemExit, match=rf"^error: .*{module.partition('.')[0]}.*: pip install 'mixtral_ext\[model\]'$"):
        main(["generate", "--checkpoint", str(checkpoint), "--prompt", "x", "--max-tokens", "1"])


def test_without_any_extra(checkpoint, tmp_path):
    """inspect works, and the demo says what it needs."""
    code = ("import sys; sys.modules.update(dict.fromkeys(['safetensors', 'tqdm', 'mistral_common', 'tokenizers', 'transformers']));"
            "from mixtral_model.__main__ import main; main(sys.argv[1:3]); main(['demo', '--output', sys.argv[3]])")
    result = subprocess.run([sys.executable, "-c", code, "inspect", checkpoint, tmp_path], capture_output=True, text=True, env=_environment())
    assert "vocab_size           32000" in result.stdout
    assert result.stderr == "error: safetensors is not installed: pip install 'mixtral_ext[model]'\n" and result.returncode == 1
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away(checkpoint):
    """As `| head -c 1` does: the output ends, without a word and without a traceback."""
    process = subprocess.Popen([sys.executable, "-m", "mixtral_model", "generate", "--checkpoint", checkpoint, "--prompt", "One", "--max-tokens",
                                "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment())
    assert process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 1
    assert "Broken pipe" not in errors and "Traceback" not in errors and "Exception" not in errors
    inspected = subprocess.run(f"{sys.executable} -m mixtral_model inspect {checkpoint} | true", shell=True, capture_output=True, env=_environment())
    assert inspected.stderr == b""


def test_output_that_cannot_show_every_character(checkpoint):
    """The prompt is part of a batch's output."""
    result = _command("generate", "--checkpoint", checkpoint, "--prompt", "naïve 你好", "--prompt", "plain", "--max-tokens", 1,
                      PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "[0] na?ve ??" in result.stdout


def test_the_stream_ends_with_what_was_held_back(checkpoint, capsys, monkeypatch):
    """An unfinished character at the last token is shown as U+FFFD."""
    tokenizer = Tokenizer(checkpoint)
    unfinished = tokenizer.encode("🦜")[1:-1]  # byte tokens without the last

    def generate(model, prompts, *_, on_token, **__):
        for token in unfinished:
            on_token(0, token)
        return [Completion(unfinished)]

    monkeypatch.setattr("mixtral_model.__main__.generate", generate)
    main(["generate", "--checkpoint", str(checkpoint), "--prompt", "One", "--max-tokens", "9"])
    prompt = tokenizer.encode("One")
    expected = tokenizer.decode(prompt + unfinished).removeprefix(tokenizer.decode(prompt))
    assert expected.endswith("\ufffd")
    assert capsys.readouterr().out == expected + "\n"


def test_a_prompt_beyond_the_positions(tmp_path):
    directory = write(tmp_path, tiny(vocab_size=32000, window=None, max_position_embeddings=8))
    mixtral_tokenizer(directory)
    with pytest.raises(SystemExit, match="prompt 0: expected at most 8 positions"):
        main(["generate", "--checkpoint", str(directory), "--prompt", "a b c d e f g h i j k"])


def test_a_prompt_file_that_is_not_text(checkpoint, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match="binary: expected UTF-8 text"):
        main(["generate", "--checkpoint", str(checkpoint), "--prompt-file", str(tmp_path / "binary")])


def test_other_devices_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="device: cuda is not there"):
        main(["demo", "--output", str(tmp_path / "demo"), "--device", "cuda"])
    assert not (tmp_path / "demo").exists()
    with pytest.raises(SystemExit):
        main(["generate", "--checkpoint", "x", "--device", "tpu"])
    assert "argument --device: invalid choice: 'tpu'" in capsys.readouterr().err


def test_demo_on_a_smaller_scale(tmp_path, capsys, monkeypatch, device):
    for module in ("mistral_common", "matplotlib"):  # a machine with a GPU need not have them
        pytest.importorskip(module)
    monkeypatch.setattr(demo, "CONFIG", demo.CONFIG | dict(hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                                                           num_attention_heads=4, sliding_window=32))
    monkeypatch.setattr(demo, "PROMPT_TOKENS", 128)
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    main(["demo", "--output", str(tmp_path), "--device", device])
    output = capsys.readouterr().out
    assert "128 tokens, 4 windows" in output and "decode, bf16" in output
    assert ("8 of 8" if device == "cpu" else "median error of log-probabilities") in output
    assert (tmp_path / "expert_load.png").stat().st_size > 1000
    loads = [line.split()[2:] for line in output.splitlines() if line.startswith("layer ")]
    assert len(loads) == 2 and all(sum(map(float, row)) == pytest.approx(100, abs=0.5) for row in loads)
    directory = tmp_path / "checkpoint"
    ours, theirs = demo._bf16_errors(directory, torch.device(device), list(range(3, 131)))
    assert 0 < ours <= 2 * theirs < 0.1
