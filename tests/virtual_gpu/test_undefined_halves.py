"""Undefined values are known by the 16-bit parts of a register: what uses the defined half of a pair passes, what uses the other
one is reported, in kernels from nvcc and for each group of instructions that keeps the halves apart."""
import numpy as np
import pytest

import vgpu
from c_api import to_bf16, to_f32
from raw_ptx import caught, run, twins

SEEDS = range(4)

# ------------------------------------------------------------------------------------------------------------------ from nvcc

T = np.arange(64)


def eights(n):
    out = np.full((64, 8), -1.0)
    out[:, :n] = (T ^ 1)[:, None] + np.arange(n)
    return out.reshape(-1)


KERNELS = {  # bytes of the pairs, further arguments, what argument 0 becomes
    "shared_pair": (0, [], lambda: 63 - T),
    "global_pair": (256, [], lambda: 2 * T),
    "odd_row": (256, [np.int32(77)], lambda: np.where(np.arange(512) < 77, to_f32(to_bf16(np.arange(512) * 3.0)), -1)),
    "eights": (1024, [np.int32(5)], lambda: eights(5)),
}


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name, arch):
    size, more, wanted = KERNELS[name]
    for seed in SEEDS:
        for twin in ("right", "wrong"):
            out = np.full(512, -1, np.float32)
            args = [out, *([np.zeros(size, np.uint8)] if size else []), *more]
            module = vgpu.Gpu(arch=arch, seed=seed).module(vgpu.compile("kernels_halves.cu", str(arch)))
            launch = lambda: module.launch(f"{name}_{twin}", block=64, args=args, fresh={1} if size else ())  # noqa: B023
            if twin == "right":
                launch()
                np.testing.assert_array_equal(out[:len(wanted())], wanted())
                continue
            with pytest.raises(vgpu.Failure) as failure:
                launch()
            assert all(r["kind"] == "uninitialised" and r["statement"].startswith("st.global") for r in failure.value.reports)


# ------------------------------------------------------------------------------------------------------- by instruction group

# 64 threads. Every body begins with this: %r1 is a word of which the thread's number fills the low half and nothing the high one,
# %r2 one with only the high half, %r3 both, %r4 none, %l1 a double word with %r1 below %r2; of %h1 and %f1 nothing is defined,
# %h2 and %f2 are the thread's number. It ends by storing a half (%h9) or a word (%r9), which is that number.
BEGIN = """mov.u32 %r10, s; mad.lo.u32 %r10, %t, 16, %r10; cvt.u16.u32 %h2, %t; cvt.rn.f32.u32 %f2, %t;
st.shared.u16 [%r10], %h2; st.shared.u16 [%r10+6], %h2; st.shared.v2.u16 [%r10+8], {%h2, %h2};
ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r10]; ld.shared.b64 %l1, [%r10]; ld.shared.u16 %h1, [%r10+2]; ld.shared.f32 %f1, [%r10+12];
mad.wide.u32 %l9, %t, 2, %a0;
"""
HALF, WORD, BOTH = "\nst.global.u16 [%l9], %h9; // caught", "\nst.global.u32 [%x0], %r9; // caught", T | T << 16
HALVES = {  # body, its end, the result if it is not the thread's number
    "load": ("ld.shared.b32 %r5, [%r10]; mov.b32 {<<%h8, %h9|%h9, %h8>>}, %r5;", HALF),
    "load_high": ("ld.shared.u32 %r5, [%r10+4]; mov.b32 {<<%h9, %h8|%h8, %h9>>}, %r5;", HALF),
    "load_pair": ("ld.shared.v2.b32 {%r5, %r6}, [%r10]; mov.b32 {<<%h9, %h8|%h8, %h9>>}, %r6;", HALF),
    "load_float": ("ld.shared.f32 %f5, [%r10]; mov.b32 %r5, %f5; mov.b32 {<<%h8, %h9|%h9, %h8>>}, %r5;", HALF),
    "load_generic": ("cvta.shared.u64 %l2, s; mad.wide.u32 %l2, %t, 16, %l2; ld.b32 %r5, [%l2]; mov.b32 {<<%h8, %h9|%h9, %h8>>}, %r5;", HALF),
    "load_double": ("mov.b64 {%h5, %h6, %h7, %h8}, %l1; mov.b16 %h9, <<%h6|%h8>>;", HALF),
    "load_64_of_32": ("ld.shared.u32 %l2, [%r10+<<0|8>>]; cvt.u32.u64 %r9, %l2;", WORD, BOTH),
    "fresh_global": ("st.global.u16 [%x1+2], %h2; ld.global.b32 %r5, [%x1]; mov.b32 {<<%h9, %h8|%h8, %h9>>}, %r5;", HALF),
    "local": ("st.local.u16 [m+2], %h2; ld.local.b32 %r5, [m]; mov.b32 {<<%h9, %h8|%h8, %h9>>}, %r5;", HALF),
    "store_to_shared": ("st.shared.b32 [%r10+8], %r1; ld.shared.u16 %h9, [%r10+<<10|8>>];", HALF),
    "store_pair_to_shared": ("st.shared.v2.b32 [%r10+8], {%r1, %r2}; ld.shared.u16 %h9, [%r10+<<12|14>>];", HALF),
    "store_double_to_shared": ("st.shared.b64 [%r10+8], %l1; ld.shared.u16 %h9, [%r10+<<12|14>>];", HALF),
    "store_to_local": ("st.local.b32 [m], %r2; ld.local.u16 %h9, [m+<<0|2>>];", HALF),
    "store_a_word_to_global": ("mov.b32 %r9, <<%r1|%r3>>;", WORD, BOTH),
    "store_of_a_cut_word": ("", "\nst.global.u16 [%l9], <<%r2|%r1>>; // caught"),
    "store_of_a_cut_double": ("mov.b64 %l2, {<<%r2|%r1>>, %r3};", "\nst.global.b16 [%l9], %l2; // caught"),
    "copy": ("mov.b32 %r5, %r1; mov.b32 {<<%h8, %h9|%h9, %h8>>}, %r5;", HALF),
    "copy_double": ("mov.b64 %l2, %l1; mov.b64 {%h5, %h6, %h7, %h8}, %l2; mov.b16 %h9, <<%h7|%h5>>;", HALF),
    "pack": ("mov.b32 %r5, {%h1, %h2}; mov.b32 {<<%h9, %h8|%h8, %h9>>}, %r5;", HALF),
    "pack_and_unpack_two": ("mov.b64 %l2, {%r1, %r2}; mov.b64 {%r5, %r6}, %l2; mov.b32 {<<%h9, %h8|%h8, %h9>>}, %r6;", HALF),
    "pack_and_unpack_four": ("mov.b64 %l2, {%h1, %h2, %h2, %h1}; mov.b64 {%h5, %h6, %h7, %h8}, %l2; mov.b16 %h9, <<%h8|%h7>>;", HALF),
    "unpack_two_of_four": ("mov.b64 %l2, {%h1, %h2, %h2, %h1}; mov.b64 {%r5, %r6}, %l2; mov.b32 {<<%h8, %h9|%h9, %h8>>}, %r6;", HALF),
    "prmt": ("prmt.b32 %r9, %r1, %r2, <<0x7630|0x7610>>;", WORD, BOTH),
    "prmt_sign": ("prmt.b32 %r9, %r1, 0, <<0xba10|0x9810>>;", WORD),
    "set_pair": ("set.eq.u32.f16x2 %r5, %r1, %r1; mov.b32 {<<%h7, %h8|%h8, %h7>>}, %r5; and.b16 %h9, %h8, %h2;", HALF),
    "and_low": ("and.b32 %r9, <<%r2|%r1>>, 0xffff;", WORD),
    "and_high": ("and.b32 %r9, <<%r1|%r2>>, 0xffff0000;", WORD, T << 16),
    "shl": ("shl.b32 %r9, <<%r2|%r1>>, 16;", WORD, T << 16),
    "shr": ("shr.u32 %r9, <<%r1|%r2>>, 16;", WORD),
    "shr_sign": ("shr.s32 %r9, <<%r1|%r2>>, 16;", WORD),
    "shr_by_an_undefined_amount": ("shr.u32 %r9, %r3, 16; <<shr.u32 %r9, %r9, %r4;|>>", WORD),
    "shr_double": ("shr.u64 %l2, %l1, <<32|48>>; cvt.u16.u64 %h9, %l2;", HALF),
    "or": ("and.b32 %r5, %r1, 0xffff; and.b32 %r6, %r2, 0xffff0000; or.b32 %r9, <<%r1|%r5>>, %r6;", WORD, BOTH),
    "or_ones": ("or.b32 %r9, %r1, <<0xff000000|0xffff0000>>;", WORD, T | 0xffff0000),
    "xor": ("xor.b32 %r9, %r1, -1; and.b32 %r9, %r9, <<-1|0xffff>>;", WORD, T ^ 0xffff),
    "not": ("not.b32 %r5, %r1; not.b32 %r5, %r5; mov.b32 {<<%h8, %h9|%h9, %h8>>}, %r5;", HALF),
    "lop3": ("lop3.b32 %r9, %r1, %r3, <<0x00ffffff|0x0000ffff>>, 0x80;", WORD),
    "lop3_of_both": ("mov.b32 %r5, 0xffff; lop3.b32 %r9, %r5, %r1, %r2, <<0xac|0xca>>;", WORD, BOTH),
    "shf": ("shf.l.wrap.b32 %r9, %r2, %r1, <<8|16>>;", WORD, BOTH),
    "bfe": ("bfe.u32 %r9, %r2, <<15|16>>, 16;", WORD),
    "bfi": ("bfi.b32 %r9, %r1, %r2, 0, <<15|16>>;", WORD, BOTH),
    "cvt_cuts": ("cvt.u16.u32 %h9, <<%r2|%r1>>;", HALF),
    "cvt_extends": ("cvt.u64.u32 %l2, %r1; mov.b64 {%h5, %h6, %h7, %h8}, %l2; mov.b16 %h9, <<%h6|%h5>>;", HALF),
    "cvt_extends_with_zeros": ("cvt.<<s64.s32|u64.u32>> %l2, %r1; shr.u64 %l2, %l2, 32; cvt.u32.u64 %r9, %l2; or.b32 %r9, %r9, %t;", WORD),
    "cvt_saturates": ("cvt<<.sat|>>.u16.u32 %h9, %r1;", HALF),
    "selp": ("setp.lt.u32 %p1, %t, <<30|64>>; selp.b32 %r5, %r1, %r2, %p1; mov.b32 {%h9, %h8}, %r5;", HALF),
    "selp_by_an_undefined_predicate": ("setp.eq.u32 %p1, <<%r4|%r3>>, 0; selp.b32 %r5, %r1, %r1, %p1; mov.b32 {%h9, %h8}, %r5;", HALF),
    "setp_packed": ("setp.eq.f16x2 %p1|%p2, %r1, %r1; selp.u32 %r9, %t, 0, <<%p2|%p1>>;", WORD),
    "anything_else": ("add.u32 %r5, <<%r1|%r3>>, 0; mov.b32 {%h9, %h8}, %r5;", HALF),
}
PACKED = {"add": "{a}, {z}", "sub": "{a}, {z}", "mul": "{a}, {one}", "fma.rn": "{a}, {one}, {z}", "min": "{a}, {a}", "max": "{a}, {a}",
          "abs": "{a}", "neg": "{a}"}
ONES = {"f16x2": "%r20", "bf16x2": "%r21"}
for op, operands in PACKED.items():
    for t in ONES:
        # The thread's number as a subnormal or small number: none of these operations changes it, but for the sign.
        begin = "mov.b32 %r20, 0x3c003c00; mov.b32 %r21, 0x3f803f80; mov.b32 %r22, <<%r2|%r1>>; mov.b32 %r23, 0;"
        body = f"{begin} {op}.{t} %r5, {operands.format(a='%r22', z='%r23', one=ONES[t])}; mov.b32 {{%h9, %h8}}, %r5;"
        HALVES[f"{op}.{t}"] = body, HALF, T | 0x8000 if op == "neg" else T
for t, one in ("f16x2", 0x3c00), ("bf16x2", 0x3f80):
    HALVES[f"ex2.{t}"] = (f"sub.u32 %r6, %r3, %r3; and.b32 %r5, %r1, 0xffff0000; ex2.approx{'.ftz' if t == 'bf16x2' else ''}.{t} %r5, %r5; "
                          f"mov.b32 {{<<%h8, %h9|%h9, %h8>>}}, %r5;", HALF, one + 0 * T)
    HALVES[f"cvt.{t}"] = (f"mov.f32 %f5, 0f3F800000; cvt.rn.{t}.f32 %r5, %f1, %f5; mov.b32 {{<<%h8, %h9|%h9, %h8>>}}, %r5;", HALF, one + 0 * T)
    HALVES[f"cvt_high.{t}"] = (f"mov.f32 %f5, 0f3F800000; cvt.rn.{t}.f32 %r5, %f5, %f1; mov.b32 {{<<%h9, %h8|%h8, %h9>>}}, %r5;", HALF, one + 0 * T)


@pytest.mark.parametrize("case", HALVES)
def test_instructions(case):
    body, end, *result = HALVES[case]
    wrong, right = twins(BEGIN + body + end)
    more = dict(arch=90, block=64, fresh={1}, variables=".shared .align 16 .b8 s[1024]; .local .align 4 .b8 m[4];")
    for seed in SEEDS:
        caught("uninitialised", wrong, np.zeros(64, np.uint32), np.zeros(64, np.uint32), seed=seed, **more)
        out = np.zeros(64, np.uint32)
        run(right, out, np.zeros(64, np.uint32), seed=seed, **more)
        np.testing.assert_array_equal(out.view(np.uint16)[:64] if end == HALF or "[%l9]" in end else out, result[0] if result else T)


@pytest.mark.parametrize("trans", ("", ".trans"))
def test_matrices_of_halves(trans):
    """stmatrix of registers with one defined half, and ldmatrix of the same elements."""
    wrong, right = twins(BEGIN + f"""mov.u32 %r11, s2; mad.lo.u32 %r11, %lane, 16, %r11;
stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r11], {{%r1}};
bar.warp.sync -1;
ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r5}}, [%r11]; mov.b32 {{%h9, %h8}}, %r5;
st.global.u16 [%l9], <<%h8|%h9>>; // caught""")
    more = dict(arch=90, block=32, variables=".shared .align 16 .b8 s[1024]; .shared .align 16 .b8 s2[512];")
    for seed in SEEDS:
        caught("uninitialised", wrong, np.zeros(32, np.uint32), seed=seed, **more)
        out = np.zeros(32, np.uint32)
        run(right, out, seed=seed, **more)
        np.testing.assert_array_equal(out.view(np.uint16)[:32], T[:32])
