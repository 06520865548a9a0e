"""Every synchronising statement of the correct kernels is needed: without it, one at a time, a launch is reported. What is not caught
is listed with the reason."""
import re

import pytest

import runs
import vgpu
from runs import SM80, SM90

ARCH = {SM80: "80", SM90: "90a"}
SYNCHRONISES = re.compile(r"(bar\.|barrier\.|cp\.async\.(wait|commit)|cp\.async\.bulk\.(wait|commit)|fence\.|membar|mbarrier\.(init|arrive)|"
                          r"wgmma\.(fence|commit|wait)|griddepcontrol\.wait|setmaxnreg)")
NOT_NEEDED = {  # kernel, statement, how often
    ("gemm_sm90", "setmaxnreg"): 2, ("gemm_cluster", "setmaxnreg"): 2,  # registers are not a resource here
    ("gemm_cluster", "bar."): 2,  # __syncthreads and __syncwarp before a cluster barrier, which orders as much
}


def mutants(source, kernel):
    """(statement, PTX without it) of one kernel."""
    ptx = vgpu.compile(source, ARCH[source])
    begin = ptx.index(f".entry {kernel}(")
    end = ptx.index("\n}\n", begin)
    for match in re.finditer(r"^[ \t]*([a-z][^\n;]*;)", ptx[begin:end], re.M):
        if SYNCHRONISES.match(match[1]):
            yield match[1], ptx[:begin + match.start()] + ptx[begin + match.end():]


@pytest.mark.parametrize("source, kernel, run", runs.CORRECT, ids=[kernel for _, kernel, _ in runs.CORRECT])
def test_every_synchronising_statement_is_needed(source, kernel, run):
    survived, count = {}, 0
    for statement, ptx in mutants(source, kernel):
        count += 1
        for seed in range(2):
            try:
                run(vgpu.Gpu(arch=int(ARCH[source][:2]), seed=seed).module(ptx), kernel)
            except vgpu.Failure:
                break
        else:
            key = next((k for k in NOT_NEEDED if k[0] == kernel and statement.startswith(k[1])), (kernel, statement))
            survived[key] = survived.get(key, 0) + 1
    assert survived == {key: n for key, n in NOT_NEEDED.items() if key[0] == kernel}
    assert count >= {"split_dot_correct": 0, "add_values_correct": 1}.get(kernel, 3)
