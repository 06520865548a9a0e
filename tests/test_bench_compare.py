"""Two result files beside each other."""
import re

import bench_results as made
import pytest

from mixtral_bench.compare import compare


def shown(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][1:]


@pytest.fixture
def pair(tmp_path):
    def write(a, b):
        return compare(made.saved(a, tmp_path / "a.json"), made.saved(b, tmp_path / "b.json"))
    return write


def test_rows_are_matched_and_the_largest_change_is_first(pair):
    a = made.ops([made.experts(1, 200.0, Liger=300.0), made.experts(8, 1000.0), made.decode(1, 24.0), made.experts(8, 1000.0, routing="few")])
    b = made.ops([made.experts(8, 1010.0), made.experts(1, 100.0, Liger=900.0, SGLang=50.0), made.experts(8, 1300.0, routing="few"), made.prompt(4096, 400.0)])
    text = pair(a, b)
    assert shown(text) == [
        ["moe_experts", "mixtral-8x7b T=1", "bf16", "Liger", "300 us", "900 us", "3.000", ""],
        ["moe_experts", "mixtral-8x7b T=1", "bf16", "mixtral_ext", "200 us", "100 us", "0.500", ""],
        ["moe_experts", "mixtral-8x7b T=8 few", "bf16", "mixtral_ext", "1.00 ms", "1.30 ms", "1.300", ""],
        ["moe_experts", "mixtral-8x7b T=8", "bf16", "mixtral_ext", "1.00 ms", "1.01 ms", "1.010", "~"],
    ]
    assert re.search(r"Only in A:\n\n- rolling_attention, mistral-7b B=1, C=4096, W=4096, bf16\n", text)
    assert re.search(r"Only in B:\n\n- sliding_window_attention, mixtral-8x7b T=4096, bf16\n", text)
    assert "- timed only in B: moe_experts, mixtral-8x7b T=1, bf16: SGLang" in text
    assert "Not the same conditions" not in text


def test_rows_of_another_dtype_are_others(pair):
    text = pair(made.ops([made.experts(8, 1000.0)]), made.ops([made.experts(8, 1000.0, dtype="f32")]))
    assert shown(text) == [] and "Nothing was timed in both" in text and "dtype: bf16 and f32" in text


def test_header_names_both_and_warns(pair):
    a, b = made.ops([made.experts(8, 1000.0)]), made.ops([made.experts(8, 1000.0)], name="NVIDIA X2", date="2027-02-03T00:00:00+00:00")
    b["machine"]["versions"]["torch"] = "2.14.0"
    b["limits"] = a["limits"] | {"copy_tb_s": 3.3, "bf16_tflop_s": 810.0}
    text = pair(a, b)
    assert "- A: `a.json`: NVIDIA X1, commit abc1234, 2027-01-02T03:04:05+00:00" in text and "- B: `b.json`: NVIDIA X2, commit abc1234, 2027-02-03" in text
    warning = re.search(r"\*\*Not the same conditions\*\*: (.*)", text).group(1)
    assert "name NVIDIA X1 and NVIDIA X2" in warning and "copy limit: 3.00 TB/s and 3.30 TB/s" in warning
    assert "bf16 limit" not in warning  # 1 % apart


def test_versions_and_quick_runs_warn(pair):
    a, b = made.ops([made.experts(8, 1000.0)]), made.ops([made.experts(8, 1000.0)], quick=True)
    b["machine"]["versions"] = b["machine"]["versions"] | {"transformers": "5.24.0"}
    text = pair(a, b)
    assert "transformers 5.23.0 and 5.24.0" in text and "one is a quick run" in text


def test_models_are_compared_too(pair):
    rows = shown(pair(made.model([made.step(us=8000.0)]), made.model([made.step(us=6000.0)])))
    assert rows[0] == ["mistral-7b decode", "B=1, 128 tokens, context 4096", "bf16", "mixtral_model", "8.00 ms", "6.00 ms", "0.750", ""]
    assert rows[1][3:] == ["transformers 5.23 eager", "16.0 ms", "12.0 ms", "0.750", ""]


def test_wrong_files_are_named(tmp_path, pair):
    with pytest.raises(ValueError, match="'ops' results and .*b.json 'model'"):
        pair(made.ops([]), made.model([]))
    with pytest.raises(ValueError, match="c.json: no such file"):
        compare(tmp_path / "a.json", tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="c.json: not a result of mixtral_bench"):
        compare(tmp_path / "a.json", tmp_path / "c.json")
