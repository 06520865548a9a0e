"""Where an array ends: an overrun is reported although the next array follows, and the report names the nearer one."""
import re

import numpy as np
import pytest

import vgpu
from raw_ptx import aligned, caught, kernel, run, twins

# Two variables of the kernel, one of the module before them, and dynamic memory behind. %r1 to %r4: their addresses; %r5: of the
# thread's word in x; %r7: 16 bytes into y. Argument 0: 256 bytes of input, argument 1: 256 bytes of output.
VARIABLES = ".shared .align 16 .b8 x[260]; .shared .align 16 .b8 y[256];"
MODULE = ".shared .align 4 .b8 before[8]; .extern .shared .align 16 .b8 dynamic[];"
BEGIN = "mov.u32 %r1, x; mov.u32 %r2, y; mov.u32 %r3, before; mov.u32 %r4, dynamic; mad.lo.u32 %r5, %t, 4, %r1; add.u32 %r7, %r2, 16; "\
    "setp.eq.u32 %p1, %t, 0;\n"
BAR = """@%p1 mbarrier.init.shared.b64 [%r4], 1; fence.proxy.async; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 %l1, [%r4], 256;\n"""
WAIT = """\nAGAIN: mbarrier.test_wait.parity.shared.b64 %p2, [%r4], 0; @!%p2 bra AGAIN;
ld.shared.u32 %r6, [%r2]; bar.sync 0; @%p1 mbarrier.inval.shared.b64 [%r4];"""
BEHIND_X = r"ending \d+ bytes behind the 260 bytes of x"
OVERRUNS = {  # body, text
    "store": ("st.shared.u32 [%r5+<<8|4>>], 1; // caught", "writes 4 bytes of shared memory, ending 4 bytes behind the 260 bytes of x"),
    "load": ("st.shared.u32 [%r5+4], 1; bar.sync 0; ld.shared.u32 %r6, [%r5+<<8|4>>]; // caught", "reads 4 bytes of shared memory, " + BEHIND_X),
    "load_before": ("st.shared.u32 [%r2], 1; ld.shared.u32 %r6, [%r2+<<-4|0>>]; // caught", "beginning 4 bytes before y", dict(block=1)),
    "across_the_end": ("st.shared.v2.u32 [%r1+<<256|248>>], {0, 0}; // caught", "ending 4 bytes behind the 260 bytes of x", dict(block=1)),
    "generic": ("cvta.shared.u64 %l1, x; mad.wide.u32 %l1, %t, 4, %l1; st.u32 [%l1+<<8|4>>], 1; // caught", BEHIND_X),
    "atomic": ("st.shared.u32 [%r5+4], 0; bar.sync 0;\nred.shared.add.u32 [%r5+<<8|4>>], 1; // caught", BEHIND_X),
    "from_the_module": ("st.shared.u32 [%r3+<<8|4>>], 1; // caught", "ending 4 bytes behind the 8 bytes of before", dict(block=1)),
    "into_dynamic": ("st.shared.u32 [%r2+<<256|252>>], 1; // caught", "ending 4 bytes behind the 256 bytes of y", dict(block=1)),
    "behind_dynamic": ("st.shared.u32 [%r4+<<512|508>>], 1; // caught", "ending 4 bytes behind the 512 bytes of dynamic", dict(block=1)),
    "cp_async": ("mad.wide.u32 %l1, %t, 4, %a0; cp.async.ca.shared.global [%r5+<<8|4>>], [%l1], 4; // caught\n"
                 "cp.async.wait_all;", "writes 4 bytes of shared memory, " + BEHIND_X),
    "bulk_load": (BAR + "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [<<%r7|%r2>>], [%a0], 256, [%r4]; "
                  "// caught" + WAIT, "writes 256 bytes of shared memory, ending 16 bytes behind the 256 bytes of y",
                  dict(also=[("deadlock", 5)])),
    "bulk_store": ("mad.lo.u32 %r6, %t, 4, %r2; st.shared.u32 [%r6], %t; fence.proxy.async; bar.sync 0;\n"
                   "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%a1], [<<%r7|%r2>>], 256; // caught\n"
                   "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;",
                   "reads 256 bytes of shared memory, ending 16 bytes behind the 256 bytes of y"),
    "mbarrier": ("mbarrier.init.shared.b64 [%r2+<<256|248>>], 1; // caught", "behind the 256 bytes of y", dict(block=1)),
    "ldmatrix": ("st.shared.u32 [%r5], 0; st.shared.u32 [%r5+128], 0; bar.warp.sync -1; mad.lo.u32 %r6, %lane, 16, %r1;\n"
                 "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r6+<<144|128>>]; // caught", BEHIND_X, dict(block=32)),
    "cluster": ("mov.u32 %r6, %cluster_ctarank; xor.b32 %r6, %r6, 1; mapa.shared::cluster.u32 %r7, %r1, %r6;\n"
                "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; st.shared::cluster.u32 [%r7+<<260|256>>], 1; // caught\n"
                "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", BEHIND_X, dict(block=1, grid=2, cluster=2)),
}


@pytest.mark.parametrize("case", OVERRUNS)
def test_overruns_of_shared_variables(case):
    body, text, *options = OVERRUNS[case]
    wrong, right = twins(BEGIN + body)
    more = dict(arch=90, block=64, shared=512, variables=VARIABLES, module_variables=MODULE) | (options[0] if options else {})
    for seed in range(3):
        args = lambda: [aligned(64, np.uint32), aligned(64, np.uint32)]  # noqa: E731
        reports = caught("out-of-range", wrong, *args(), seed=seed, **more)
        assert re.search(text, reports[0]["text"]), reports[0]["text"]
        run(right, *args(), seed=seed, **{k: v for k, v in more.items() if k != "also"})


def test_gaps_are_not_counted():
    """48 KiB of static memory in three variables: what a launch may add to it, and what lies where modulo 1 KiB
    are as without gaps."""
    variables = "".join(f".shared .align {align} .b8 v{i}[{size}];" for i, (align, size) in enumerate(((4, 20), (128, 24448), (16, 24576))))
    out = np.zeros(4, np.uint32)
    text = kernel("mov.u32 %r1, v0; mov.u32 %r2, v1; mov.u32 %r3, v2; mov.u32 %r4, dynamic; sub.u32 %r2, %r2, %r1; sub.u32 %r3, %r3, %r1;"
                  "sub.u32 %r4, %r4, %r1; mov.u32 %r5, %total_smem_size; st.global.v4.u32 [%a0], {%r2, %r3, %r4, %r5};", [out],
                  variables=variables, module_variables=".extern .shared .align 16 .b8 dynamic[];")
    module = vgpu.Gpu(arch=80).module(text)
    most = 163 * 1024 - 49152
    module.launch("k", args=[out], block=1, shared=most)
    np.testing.assert_array_equal(out[:3] % 1024, np.array([128, 128 + 24448, 49152]) % 1024)
    assert out[3] == 163 * 1024 and (np.diff([20, *out[:3]]) >= [128 - 20 + 1024, 24448 + 1024, 24576 + 1024]).all()
    with pytest.raises(vgpu.LaunchError, match="with static ones"):
        module.launch("k", args=[out], block=1, shared=most + 1)


def test_reports_name_the_variable():
    """A byte of one of several variables; of a long name the end."""
    name = "_ZZN12_GLOBAL__N_123a_kernel_with_a_long_nameEPfE4tile"
    body = f"mov.u32 %r1, {name}; st.shared.u32 [%r1+12], %t; // caught"
    more = dict(block=2, variables=f".shared .align 4 .b8 first[20]; .shared .align 4 .b8 {name}[16];")
    assert f"writes shared byte 12 of ..{name[-38:]}, which" in caught("race", body, **more)[0]["text"]
    assert f"4 bytes behind the 16 bytes of ..{name[-38:]}" in caught("out-of-range", body.replace("+12", "+16"), **more)[0]["text"]


@pytest.mark.parametrize("at, text", [
    (-4, ", beginning 4 bytes before argument 0$"), (256, ", ending 4 bytes behind the 256 bytes of argument 0$"),
    (1024 - 4, ", beginning 4 bytes before argument 1$"), (620, ", ending 368 bytes behind the 256 bytes of argument 0$"),
    (640, ", beginning 384 bytes before argument 1$"), (2**21, r"reads 4 bytes at global address 0x\w+$")])
def test_the_nearer_array_is_named(at, text):
    memory = aligned(2**22, np.uint8)
    first, second = memory[:256].view(np.uint32), memory[1024:1280].view(np.uint32)
    reports = caught("out-of-range", f"ld.global.u32 %r1, [%a0+{at}]; // caught", first, second, block=1)
    assert re.search(text, reports[0]["text"]), reports[0]["text"]


def test_an_access_across_the_end_of_an_array():
    memory = aligned(1024, np.uint8)
    reports = caught("out-of-range", "ld.global.v2.u32 {%r1, %r2}, [%a0+248]; // caught", memory[:252], memory[256:512], block=1)
    assert reports[0]["text"].endswith(", ending 4 bytes behind the 252 bytes of argument 0")
