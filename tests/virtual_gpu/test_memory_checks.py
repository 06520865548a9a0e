"""Each check of plain memory of the virtual GPU: a planted bug is reported, its correct twin passes, what is fine is left alone."""
import numpy as np
import pytest

import vgpu
from raw_ptx import caught, kernel, run, twins

# ------------------------------------------------------------------------------------------------------------ planted bugs

# Argument 0: an input of 64 words, each its index. Argument 1: an output of 64 words that is undefined before. 64 threads unless
# the case says otherwise. s: 65 words of shared memory, m: 5 bytes of local memory, c: a constant.
STORE = "\nst.global.u32 [%x1], %r1;"
OWN = "mov.u32 %r9, s; mad.lo.u32 %r9, %t, 4, %r9;\n"     # %r9: the thread's word of s
WRITE = OWN + "ld.global.u32 %r1, [%x0]; st.shared.u32 [%r9], %r1;"
SHUT = "setp.eq.u32 %p1, %t, 5;\n"                        # %p1: thread 5
PLANTED = {
    "global_read_past_the_end": ("out-of-range", "ld.global.u32 %r1, [%x0+<<4|0>>]; // caught"),
    "global_read_before_the_begin": ("out-of-range", "ld.global.u32 %r1, [%x0+<<-4|0>>]; // caught"),
    "global_write_past_the_end": ("out-of-range", "st.global.u32 [%x1+<<4|0>>], 1; // caught"),
    "global_vector_across_the_end": ("out-of-range", "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%a0+<<256|240>>]; // caught",
                                     dict(words=66)),
    "shared_read_past_the_end": ("out-of-range", OWN + "ld.shared.u32 %r1, [%r9+<<8|4>>]; // caught"),
    "shared_write_past_the_end": ("out-of-range", OWN + "st.shared.u32 [%r9+<<8|4>>], 1; // caught"),
    "shared_write_before_the_begin": ("out-of-range", OWN + "st.shared.u32 [%r9+<<-4|0>>], 1; // caught"),
    "dynamic_write_past_the_end": ("out-of-range", "mov.u32 %r9, dynamic; mad.lo.u32 %r9, %t, 4, %r9;\n"
                                   "st.shared.u32 [%r9+<<4|0>>], 1; // caught",
                                  dict(shared=256, module_variables=".extern .shared .align 16 .b8 dynamic[];")),
    "local_write_past_the_end": ("out-of-range", "mov.u64 %l1, m; st.local.u8 [%l1+<<5|4>>], 1; // caught"),
    "local_write_before_the_begin": ("out-of-range", "mov.u64 %l1, m; st.local.u8 [%l1+<<-1|0>>], 1; // caught"),
    "param_read_past_the_end": ("out-of-range", "mov.u64 %l1, q0; ld.param.u64 %l2, [%l1+<<16|8>>]; // caught"),
    "misaligned_global_16": ("misaligned", "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%y0+<<4|0>>]; // caught", dict(block=15)),
    "misaligned_global_8": ("misaligned", "mul.wide.u32 %l1, %t, 8; add.s64 %l1, %l1, %a1; st.global.u64 [%l1+<<4|8>>], 1; "
                            "// caught", dict(block=31)),
    "misaligned_global_2": ("misaligned", "st.global.u16 [%x1+<<1|2>>], 1; // caught"),
    "misaligned_shared_16": ("misaligned", "mad.lo.u32 %r9, %t, 16, <<8|16>>; mov.u32 %r8, s; add.u32 %r9, %r9, %r8; "
                             "st.shared.v2.u64 [%r9], {0, 0}; // caught", dict(block=15)),
    "misaligned_shared_4": ("misaligned", OWN + "st.shared.u32 [%r9+<<2|4>>], 1; // caught"),
    "misaligned_atomic": ("misaligned", "st.shared.v2.u32 [s+8], {0, 0}; bar.sync 0;\n"
                          "red.shared.add.u64 [s+<<12|8>>], 1; // caught", dict(block=1)),
    "never_written_shared_to_global": ("uninitialised", SHUT + OWN + "<<@!%p1|>> st.shared.u32 [%r9], 1; "
                                       "ld.shared.u32 %r1, [%r9];\nst.global.u32 [%x1], %r1; // caught"),
    "never_written_byte_to_global": ("uninitialised", SHUT + OWN + "st.shared.u16 [%r9], 1; st.shared.u8 [%r9+<<2|3>>], 1; "
                                     "ld.shared.u8 %r1, [%r9+3];" + STORE + " // caught"),
    "never_written_part_of_a_word_to_global": ("uninitialised", OWN + "st.shared.u16 [%r9], 1; st.shared.<<u8|u16>> [%r9+2], 1;"
                                               "ld.shared.u32 %r1, [%r9];" + STORE + " // caught"),
    "never_written_shared_to_branch": ("uninitialised", OWN + "<<//|>> st.shared.u32 [%r9], 1;\n"
                                       "ld.shared.u32 %r1, [%r9]; setp.eq.u32 %p2, %r1, 0;\n@%p2 bra L; // caught\nL:"),
    "never_written_shared_to_predicate": ("uninitialised", OWN + "<<//|>> st.shared.u32 [%r9], 1;\n"
                                        "ld.shared.u32 %r1, [%r9]; setp.eq.u32 %p2, %r1, 0; mov.u32 %r2, 1;\n"
                                        "@%p2 add.u32 %r2, %r2, 1; // caught"),
    "never_written_shared_to_address": ("uninitialised", OWN + "<<//|>> st.shared.u32 [%r9], 0;\n"
                                        "ld.shared.u32 %r1, [%r9]; and.b32 %r1, %r1, 12; cvt.u64.u32 %l1, %r1; "
                                        "add.s64 %l1, %a0, %l1;\nld.global.u32 %r1, [%l1]; // caught"),
    "never_written_shared_to_atomic": ("uninitialised", "setp.eq.u32 %p1, %t, 0; <<//|>> @%p1 st.shared.u32 [s], 0;\n"
                                       "bar.sync 0;\nred.shared.add.u32 [s], 1; // caught"),
    "never_written_selection_to_global": ("uninitialised", OWN + "<<//|>> st.shared.u32 [%r9], 0;\n"
                                        "ld.shared.u32 %r1, [%r9]; setp.eq.u32 %p2, %r1, 7; selp.u32 %r1, 1, 2, %p2;" +
                                          STORE + " // caught"),
    "never_written_local_to_global": ("uninitialised", "<<//|>> st.local.u8 [m+3], 1;\nst.local.u16 [m], 1; "
                                      "st.local.u8 [m+2], 1; ld.local.u32 %r1, [m];" + STORE + " // caught"),
    "never_written_through_local_to_global": ("uninitialised", OWN + "<<//|>> st.shared.u32 [%r9], 1;\n"
                                              "ld.shared.u32 %r2, [%r9]; st.local.u32 [m], %r2; ld.local.u32 %r1, [m];" +
                                              STORE + " // caught"),
    "never_written_through_shared_to_global": ("uninitialised", OWN + "<<//|>> mov.u32 %r2, 1;\n"
                                               "st.shared.u32 [%r9], 1; st.shared.u32 [%r9], %r2; "
                                               "ld.shared.u32 %r1, [%r9];" + STORE + " // caught"),
    "never_written_register_to_global": ("uninitialised", SHUT + "<<@!%p1|>> mov.u32 %r1, 1;" + STORE + " // caught"),
    "undefined_buffer_to_global": ("uninitialised", "ld.global.u32 %r1, [<<%x1|%x0>>];" + STORE + " // caught"),
    "write_to_an_input": ("read-only", "<<st.global.u32 [%x0], 1|st.global.u32 [%x1], 1>>; // caught"),
    "write_to_an_input_generic": ("read-only", "cvta.global.u64 %l1, <<%x0|%x1>>; st.u32 [%l1], 1; // caught"),
    "atomic_on_an_input": ("read-only", "st.global.u32 [%x1], 1; red.global.add.u32 [<<%x0|%x1>>], 1; // caught"),
    "write_to_a_constant": ("read-only", "mov.u64 %l1, c; cvta.const.u64 %l1, %l1; <<st|ld>>.u32 <<[%l1], 1|%r1, [%l1]>>; "
                            "// caught"),
    "two_blocks_store_to_a_word": ("race", "mul.wide.u32 %l1, <<%t|%g>>, 4; add.s64 %l1, %l1, %a1;\n"
                                   "st.global.u32 [%l1], 7; // caught", dict(grid=2, block=32)),
    "two_blocks_store_and_load": ("race", "st.global.u32 [%x1], 1; // caught\nmul.wide.u32 %l1, <<%t|%g>>, 4; "
                                  "add.s64 %l1, %l1, %a1; ld.global.u32 %r1, [%l1]; // caught", dict(grid=2, block=32)),
    "two_lanes_store_to_a_word": ("race", "shr.u32 %r1, %t, <<1|0>>; mad.wide.u32 %l1, %r1, 4, %a1;\n"
                                  "st.global.u32 [%l1], 7; // caught"),
    "two_warps_store_to_a_byte": ("race", "and.b32 %r1, %t, <<31|63>>; mov.u32 %r2, s; add.u32 %r1, %r1, %r2;\n"
                                  "st.shared.u8 [%r1], 7; // caught"),
    "nc_load_of_what_it_wrote": ("race", "st.global.u32 [%x1], 1; ld.global<<.nc|>>.u32 %r1, [%x1]; // caught"),
    "nc_load_of_what_it_wrote_in_part": ("race", "st.global.u32 [%y1+12], 1; "
                                        "ld.global<<.nc|>>.v4.u32 {%r1, %r2, %r3, %r4}, [%y1]; // caught", dict(block=16)),
    "nc_load_of_a_byte_that_it_wrote": ("race", "st.global.u8 [%x1], 1; ld.global.nc.u8 %r1, [%x1+<<0|1>>]; // caught"),
    "store_to_what_it_read_as_nc": ("race", "xor.b32 %r9, %t, 32; mad.wide.u32 %l1, %r9, 4, %a1; ld.global<<.nc|>>.u32 %r1, [%l1]; bar.sync 0;\n"
                                    "st.global.u32 [%x1], 1; // caught", dict(fresh=())),
    "store_to_a_byte_that_it_read_as_nc": ("race", "ld.global.nc.u8 %r1, [%x1+1]; bar.sync 0;\nst.global.u8 [%x1+<<1|2>>], 1; // caught",
                                           dict(fresh=())),
    "atomic_on_what_it_read_as_nc": ("race", "ld.global<<.nc|>>.v4.u32 {%r1, %r2, %r3, %r4}, [%a1]; bar.sync 0;\n"
                                     "red.global.add.u32 [%a1+12], 1; // caught", dict(fresh=())),
    "read_without_barrier": ("race", WRITE + " // caught\n<<//|>> bar.sync 0;\nxor.b32 %r9, %r9, 128; ld.shared.u32 %r1, [%r9]; "
                             "// caught"),
    "write_without_barrier": ("race", WRITE + "\nbar.sync 0; xor.b32 %r9, %r9, 128; ld.shared.u32 %r1, [%r9]; // caught\n"
                              "<<//|>> bar.sync 0;\n" + OWN + "st.shared.u32 [%r9], 5; // caught"),
    "weak_initial_store_before_atomics": ("race", "setp.eq.u32 %p1, %t, 0;\n@%p1 st.shared.u32 [s], 0; // caught\n"
                                          "<<//|>> bar.sync 0;\nmov.u32 %r1, 1; red.shared.max.u32 [s], %r1; // caught",
                                          dict(also=[("uninitialised", 4)])),
    "weak_initial_store_before_atomics_of_a_warp": ("race", "setp.eq.u32 %p1, %t, 0;\n@%p1 st.shared.u32 [s], 0; // caught\n"
                                                    "<<//|>> bar.warp.sync -1;\nred.shared.add.u32 [s], 1; // caught", dict(block=32)),
    "atomics_of_block_scope_from_two_blocks": ("race", "red<<.relaxed.cta|.relaxed.gpu>>.global.add.u32 [%a1], 1; // caught",
                                               dict(grid=2, block=32, fresh=())),
    "weak_and_strong_stores": ("race", "st<<|.volatile>>.global.u32 [%a1], 1; // caught", dict(grid=2, block=1)),
    "weak_load_during_atomics": ("race", "setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [s], 0; bar.sync 0;\n"
                                 "red.shared.add.u32 [s], 1; // caught\n<<//|>> bar.sync 0;\nld.shared.u32 %r1, [s]; // caught"),
}


SEEDS = 3


def planted_options(words=64, **options):
    shape = dict(block=64, written={1}, fresh={1}, variables=".shared .align 16 .b8 s[260]; .local .b8 m[5];",
                 module_variables=".const .u32 c = 1;")
    return [np.arange(words, dtype=np.uint32), np.zeros(64, np.uint32)], shape | options


@pytest.mark.parametrize("case", PLANTED)
def test_planted_bugs(case):
    kind, body, *options = PLANTED[case]
    wrong, right = twins(body)
    for seed in range(SEEDS):
        args, more = planted_options(**(options[0] if options else {}))
        reports = caught(kind, wrong, *args, seed=seed, **more)
        assert case != "write_to_an_input" or "argument 0, which is an input" in reports[0]["text"]
        args, more = planted_options(**(options[0] if options else {}))
        more.pop("also", None)
        run(right, *args, seed=seed, **more)


def test_what_was_read_as_nc_may_be_written_by_the_next_kernel():
    x = np.ones(32, np.uint32)
    gpu = vgpu.Gpu()
    module = gpu.module(kernel("setp.eq.u32 %p1, %n1, 0; @%p1 ld.global.nc.u32 %r1, [%x0]; @!%p1 st.global.u32 [%x0], %t;", [x, np.uint32(0)]))
    with gpu.mapped([("x", x, True, True)]):
        for stores in range(2):
            module.launch("k", args=[x, np.uint32(stores)])
    np.testing.assert_array_equal(x, np.arange(32))


# Who races decides what is said to be missing. Blocks of 64 threads.
SHARED_OF_BLOCK_0 = """mov.u32 %r1, s; mapa.shared::cluster.u32 %r2, %r1, 0; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
setp.eq.u32 %p1, %t, 0; @%p1 st.shared::cluster.u32 [%r2], 1; // caught
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
ONE_WORD = "setp.eq.u32 %p1, %t, 0; @%p1 st.global.u32 [%a0], 1; // caught"
MISSING = {
    "the same warp": ("shr.u32 %r1, %t, 1; mad.wide.u32 %l1, %r1, 4, %a0; st.global.u32 [%l1], 1; // caught", {}, "no __syncwarp between them"),
    "the same block": ("and.b32 %r1, %t, 31; mad.wide.u32 %l1, %r1, 4, %a0; st.global.u32 [%l1], 1; // caught", {}, "no barrier between them"),
    "other blocks": (ONE_WORD, dict(grid=2), "nothing orders them (a fence and an atomic, or the end of the kernel)"),
    "blocks of a cluster": (ONE_WORD, dict(grid=2, cluster=2),
                            "nothing orders them (a fence and an atomic, a barrier of the cluster, or the end of the kernel)"),
    "shared memory of a cluster": (SHARED_OF_BLOCK_0, dict(grid=2, cluster=2),
                                   "nothing orders them (a fence and an atomic, a barrier of the cluster)"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing(case):
    body, more, text = MISSING[case]
    for seed in range(SEEDS):
        reports = caught("race", body, np.zeros(64, np.uint32), arch=90, block=64, seed=seed, variables=".shared .align 4 .b8 s[4];", **more)
        assert reports[0]["text"].endswith(" wrote: " + text)


def test_what_is_missing_behind_the_kernel_before():
    x = np.zeros(32, np.uint32)
    gpu = vgpu.Gpu(arch=90)
    module = gpu.module(kernel("st.global.u32 [%x0], 1;", [x], arch=90))
    with gpu.mapped([("x", x, True, True)]):
        module.launch("k", args=[x])
        with pytest.raises(vgpu.Failure, match="the kernel launched before wrote: no griddepcontrol.wait between them"):
            module.launch("k", args=[x], programmatic=True)


WAIT = "griddepcontrol.wait;"
FIRST, SECOND, THIRD = "st.global.u32 [%x0], %t;", "{} st.global.u32 [%x1], %t;", "{} ld.global{}.u32 %r1, [%x0]; {} st.global.u32 [%x2], %r1;"
CHAINS = {  # what the second kernel does first, what the third does before it reads and behind, the report
    "second_and_third_wait": (WAIT, WAIT, "", None),
    "third_waits_too_late": (WAIT, "", WAIT, "the kernel launched before wrote: no griddepcontrol.wait between them"),
    "second_does_not_wait": ("", WAIT, "", "a kernel launched before that one wrote: the kernel between them has no griddepcontrol.wait"),
    "nobody_waits": ("", "", "", "a kernel launched before that one wrote: the kernel between them has no griddepcontrol.wait")}


@pytest.mark.parametrize("load", ("", ".nc"))
@pytest.mark.parametrize("chain", CHAINS)
def test_chain_of_programmatic_launches(chain, load):
    """9.7.13.13: a kernel waits for the one before it, and so for the one before that only if that one waited too."""
    second, before, behind, text = CHAINS[chain]
    x, y, z = (np.zeros(32, np.uint32) for _ in range(3))
    gpu = vgpu.Gpu(arch=90)
    modules = [gpu.module(kernel(body, [x, y, z], arch=90)) for body in (FIRST, SECOND.format(second), THIRD.format(before, load, behind))]
    with gpu.mapped([("x", x, True, True), ("y", y, True, True), ("z", z, True, True)]):
        for i, module in enumerate(modules[:2]):
            module.launch("k", args=[x, y, z], programmatic=i > 0)
        if text:
            with pytest.raises(vgpu.Failure, match=text):
                modules[2].launch("k", args=[x, y, z], programmatic=True)
        else:
            modules[2].launch("k", args=[x, y, z], programmatic=True)
            np.testing.assert_array_equal(z, np.arange(32))
        modules[2].launch("k", args=[x, y, z])  # an ordinary launch waits for all of them


# ------------------------------------------------------------------------------------------------------------ false alarms

GLOBAL_T = np.arange(128)
FINE = {  # body, what argument 1 becomes; 128 threads, argument 0: 128 words, each its index
    "neighbouring_bytes": ("mov.u64 %l1, s; add.s64 %l2, %l1, %tl; st.shared.u8 [%l2], %t; add.s64 %l3, %a1, %tl; "
                           "st.global.u8 [%l3+256], %t;\n"
                           "add.s64 %l3, %l3, %tl; st.global.u16 [%l3], %t;",
                           np.r_[GLOBAL_T.astype("u2").view("u4"), GLOBAL_T.astype("u1").view("u4"), 32 * [0]]),
    "neighbouring_halves_in_shared_memory": (
        "mov.u64 %l1, s; add.s64 %l2, %l1, %tl; add.s64 %l2, %l2, %tl; st.shared.u16 [%l2], %t;\n"
        "bar.sync 0; setp.lt.u32 %p1, %t, 64;\n"
        "mad.wide.u32 %l3, %t, 4, %l1; @%p1 ld.shared.u32 %r1, [%l3]; @%p1 st.global.u32 [%x1], %r1;",
        np.r_[GLOBAL_T.astype("u2").view("u4"), 64 * [0]]),
    "broadcast": ("setp.eq.u32 %p1, %t, 77; @%p1 st.shared.u32 [s], %t; bar.sync 0; ld.shared.u32 %r1, [s]; "
                  "ld.global.u32 %r2, [%a0+20]; add.u32 %r1, %r1, %r2;"
                  "st.global.u32 [%x1], %r1;", np.full(128, 82)),
    "undefined_values_that_nobody_uses": (  # copied through registers, shared and local memory, and not selected
        OWN + "ld.shared.u32 %r1, [%r9]; mov.b32 %r2, %r1; add.u32 %r2, %r2, 1; st.shared.u32 [%r9+512], %r2; "
                                        "ld.shared.u32 %r3, [%r9+512]; st.local.u32 [m], %r3;\n"
        "ld.local.u32 %r4, [m]; shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1; setp.eq.u32 %p1, %r5, 0; setp.lt.u32 %p2, %t, 200; "
                                        "selp.u32 %r6, %t, %r5, %p2;\n"
        "st.global.u32 [%x1], %r6;", GLOBAL_T),
    "undefined_values_overwritten": (OWN + "ld.shared.u32 %r1, [%r9]; st.shared.u32 [%r9], %r1;\n"
                                     "st.shared.u32 [%r9], %t; ld.shared.u32 %r1, [%r9];"
                                     "st.global.u32 [%x1], %r1;", GLOBAL_T),
    "exchange_in_memory_never_written": (OWN + "atom.shared.exch.b32 %r1, [%r9], %t; ld.shared.u32 %r2, [%r9]; "
                                        "st.global.u32 [%x1], %r2;", GLOBAL_T),
    "many_readers_and_a_writer_behind_a_barrier": ("ld.global.u32 %r1, [%a1]; ld.shared.u32 %r2, [s]; bar.sync 0; "
                                        "setp.eq.u32 %p1, %t, 0; @%p1 st.global.u32 [%a1], 5;"
                                                   "@%p1 st.shared.u32 [s], 1;", np.r_[5, 127 * [0]]),
    "in_place": ("ld.global.u32 %r1, [%x1]; add.u32 %r1, %r1, %t; st.global.u32 [%x1], %r1; ld.global.u32 %r1, [%x1]; "
                 "add.u32 %r1, %r1, 1; st.global.u32 [%x1], %r1;",
                 GLOBAL_T + 1),
    "atomics_then_a_read_behind_a_barrier": ("red.global.add.u32 [%a1], %t; bar.sync 0; setp.eq.u32 %p1, %t, 9; "
                                        "@%p1 ld.global.u32 %r1, [%a1]; @%p1 st.global.u32 [%a1+4], %r1;",
                                             np.r_[8128, 8128, 126 * [0]]),
    "strong_accesses_of_everybody": ("st.volatile.global.u32 [%a1], 3; st.relaxed.gpu.global.u32 [%a1], 3; "
                                     "ld.volatile.global.u32 %r1, [%a1]; st.volatile.shared.u32 [s], 3;"
                                     "ld.volatile.shared.u32 %r1, [s];", np.r_[3, 127 * [0]]),
}


@pytest.mark.parametrize("case", FINE)
def test_no_false_alarms(case):
    body, wanted = FINE[case]
    for seed in range(5):
        out = np.zeros(128, np.uint32)
        run(body, GLOBAL_T.astype(np.uint32), out, block=128, written={1}, seed=seed, variables=".shared .align 16 .b8 s[1024]; "
            ".local .align 4 .b8 m[16];")
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.on_silicon
def test_strided_arrays():
    """Padded rows, every other element, and an array that runs backwards, in place in a larger one."""
    whole, source = np.full((8, 40), 7, np.uint32), np.arange(64, dtype=np.uint32)[::-2]
    run(""
        "shr.u32 %r2, %t, 3; mul.wide.u32 %l2, %r2, 4; and.b32 %r3, %t, 7; mad.wide.u32 %l2, %r3, 160, %l2; "
        "add.s64 %l2, %l2, %a0; and.b32 %r4, %t, 31;"
        "mul.wide.u32 %l3, %r4, 8; sub.s64 %l3, %a1, %l3; ld.global.u32 %r5, [%l3]; st.global.u32 [%l2], %r5;", whole[:, 2:34],
        source, block=256, written={0})
    np.testing.assert_array_equal(whole[:, 2:34], source[np.arange(256).reshape(32, 8).T % 32])
    assert (whole[:, :2] == 7).all() and (whole[:, 34:] == 7).all()


def test_neighbours_on_a_page_are_kept():
    """What a kernel wrote to one array stays known when another one on its page is mapped and unmapped."""
    page = np.zeros(64, np.uint32)
    a, b, c = page[:16], page[16:32], page[32:]
    gpu = vgpu.Gpu(arch=80)
    put = gpu.module(kernel("st.global.u32 [%x0], %t;", [a]))
    get = gpu.module(kernel("ld.global.u32 %r1, [%x0]; st.global.u32 [%x1], %r1;", [a, b]))
    with gpu.mapped([("a", a, True, False)]):
        put.launch("k", block=16, args=[a])
        put.launch("k", block=16, args=[b])
        get.launch("k", block=16, args=[a, c], fresh={1})
    np.testing.assert_array_equal(c[:16], np.arange(16))
    with pytest.raises(vgpu.Failure, match="uninitialised"):
        get.launch("k", block=16, args=[a, c], fresh={0, 1})


def test_atomics_of_local_memory_are_not_covered():
    caught("uncovered", "cvta.local.u64 %l1, m; st.local.u32 [m], 3;\natom.add.u32 %r1, [%l1], 1; // caught",
           variables=".local .align 4 .b8 m[4];")


def test_barrier_numbers_and_counts():
    out = np.zeros(64, np.uint32)
    caught("barrier", "and.b32 %r1, %lane, 1;\nbarrier.sync %r1; // caught", block=32, also=[("deadlock", 2)])
    caught("uninitialised", "mov.u32 %r2, never; ld.shared.u32 %r1, [%r2];\nbar.sync 1, %r1; // caught", block=64, also=[("barrier", 2)],
           variables=".shared .align 8 .b8 never[16];")
    caught("uninitialised", "mov.u32 %r2, never; ld.shared.u32 %r1, [%r2];\nmbarrier.init.shared.b64 [%r2+8], %r1; // caught",
           block=1, also=[("mbarrier", 2)], variables=".shared .align 8 .b8 never[16];")


@pytest.mark.parametrize("meeting", ("bar.sync 0;", "bar.warp.sync -1;"))
def test_a_deadlock_is_placed_where_a_lane_polls(meeting):
    """The other lanes would meet, but for what one of them waits for in vain."""
    caught("deadlock", f"setp.ne.u32 %p1, %lane, 0; @%p1 bra meet;\npoll: ld.volatile.global.u32 %r1, [%a0]; setp.eq.u32 %p2, %r1, 0; // caught\n"
           f"@%p2 bra poll;\nmeet: {meeting}", np.zeros(1, np.uint32))


def test_a_race_names_another_lane():
    reports = caught("race", "and.b32 %r1, %lane, 1; mad.wide.u32 %l1, %r1, 4, %a0;\nld.global.u32 %r2, [%l1];\nst.global.u32 [%l1], %r2; // caught",
                     np.zeros(2, np.uint32), block=4)
    threads = [int(part.split()[0]) for part in f"{reports[0]['thread']} {reports[0]['text']}".split("thread ")[1:]]
    assert len(set(threads)) == 2, reports[0]
