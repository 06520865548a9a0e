"""What the virtual GPU does not model it refuses: forms with a modifier or operand that it does not know stop as `uncovered`, text that
is not PTX is refused when it is loaded or launched. Nothing of it is guessed, nothing ends the process."""
import json
import re

import numpy as np
import pytest

import raw_ptx
import vgpu
from runs import SM80, SM90

VARIABLES = ".shared .align 16 .b8 s[64];"
BEGIN = "mov.u32 %r1, 0; mov.u32 %r2, s; mov.u64 %l1, 0; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 1; mov.f32 %f1, 0f00000000;\n"


def uncovered(ptx):
    """{kernel: [statement]}"""
    lib = vgpu.library()
    module = vgpu.Gpu().module(ptx)
    return {k["kernel"]: k["uncovered"] for k in json.loads(lib.c.vgpu_describe(module.handle))}


def uncovered_in(statement, **more):
    body = BEGIN + statement + "\nE:"
    return uncovered(raw_ptx.kernel(body, [np.zeros(32, np.uint32)], arch="90a", variables=VARIABLES, **more))["k"]


V4, V2 = "{%r1, %r2, %r3, %r4}", "{%r1, %r2}"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
NOT_COVERED = """
fence.acquire.gpu; fence.release.cluster; fence.acquire.sync_restrict::shared::cluster.cluster; fence.foo.bar; fence.gpu.sc; fence;
fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster; fence.proxy.alias; fence.proxy.tensormap::generic.release.gpu;
fence.mbarrier_init.acquire.cluster; fence.proxy.async.local; membar; membar.gpu; membar.gl.bogus
redux.sync.add.s64 %r3, %r1, -1; redux.sync.and.u32 %r3, %r1, -1; redux.sync.min.f32 %f2, %f1, -1; redux.add.u32 %r3, %r1, -1
shfl.idx.b32 %r3, %r1, 0, 31; shfl.sync.idx.b32.b64 %r3, %r1, 0, 31, -1; shfl.sync.idx.b32 %r3|%r4, %r1, 0, 31, -1
vote.sync.all.b32 %r3, %p1, -1; vote.sync.ballot.b32 %p3, %p1, -1; vote.sync.all.pred %r3, %p1, -1; vote.all.pred %p3, %p1; vote.sync.any.uni.pred %p3, %p1, -1
match.any.b32 %r3, %r1; match.any.sync.b32 %r3|%p3, %r1, -1; elect.sync.bogus %r3|%p3, -1; elect.sync %r3, -1; activemask.b64 %l2; activemask.b32
atom.global.inc.s32 %r3, [%a0], 1; atom.global.add.bogus.u32 %r3, [%a0], 1; atom.global.and.u32 %r3, [%a0], 1; atom.global.add.f32.bogus %f2, [%a0], %f1
atom.global.exch.b128 %l2, [%a0], %l1; atom.global.cas.b32 %r3, [%a0], 1; atom.global.min.f32 %f2, [%a0], %f1; atom.global.cas.u32 %r3, [%a0], 1, 2
atom.global.add.s32 %r3; atom.sc.gpu.global.add.u32 %r3, [%a0], 1; atom.global.sub.u32 %r3, [%a0], 1; atom.global.add.noftz.f32 %f2, [%a0], %f1
red.global.exch.b32 [%a0], 1; red.global.add.u32 [%a0]; red.global.add.v4.f32 [%a0], {%f1, %f1}; atom.global.add.v2.f32 %f2, [%a0], {%f1, %f1}
red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r2], 1, [%r2]; red.global.add.u32 [%a0], 1, 2
ld.bogus.global.u32 %r3, [%a0]; ld.global.bogus.u32 %r3, [%a0]; ld.global.u32.bogus %r3, [%a0]; ld.global.shared.u32 %r3, [%a0]; ld..global.u32 %r3, [%a0]
ld.param::func.u32 %r3, [q0]; ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%a0]; ld.global.b128 %l2, [%a0]; ld.relaxed.global.u32 %r3, [%a0]
ld.global.L2::cache_hint.u32 %r3, [%a0]; ld.global.L2::evict_bogus.u32 %r3, [%a0]; ld.weak.gpu.global.u32 %r3, [%a0]; ld.shared.nc.u32 %r3, [%r2]
ld.global.u32 %r1; ld.global.u32; ld.global.u32 [%a0]; ld.global.u32 %p3, [%a0]; ld.global.u64 %r3, [%a0]; ld.global.u32 %h1, [%a0]; ld.global.u32 %r3, [%p1]
ld.global.v4.u32 {%r1, %r2}, [%a0]; ld.global.v2.u32 {%r1, %r2, %r3}, [%a0]; ld.global.v2.u32 %r3, [%a0]; ld.global.u32 {%r1}, [%a0]; ld.global.v2.u16 {%h1, %r3}, [%a0]
ld.global.u32 %r3, [%a0], %l1; ld.global.u32 %tid.x, [%a0]; ld.global.v2.u16 {%h1, %l2}, [%a0]; ld.global.f16 %h1, [%a0]
st.global.v4.u32 [%a0], %r1; st.global.v4.u32 [%a0], {%r1, %r2}; st.global.u32 [%a0], %p1; st.global.u64 [%a0], %r1; st.global.u32 [%a0], !%r1; st.global.u32 [%a0]
st.acquire.gpu.global.u32 [%a0], 1; st.global.nc.u32 [%a0], 1; st.bogus.global.u32 [%a0], 1; st.global.u32 [%a0], 1, 2; st.global.ca.u32 [%a0], 1
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r2], 1, [%r2]; st.bulk.weak.shared::cta [%r2], 64, 0; st.global.u32 [%a0], %h1
cvta.global.u32 %r3, %r1; cvta.u64 %l2, %l1; cvta.global.u64 %l2; cvta.bogus.u64 %l2, %l1; isspacep.global %p3; isspacep.global %r3, %l1; mapa.u64 %l2; mapa.bogus.u32 %r3, %r2, 0
mov.bogus.u64 %l2, %clock64; mov.u32 %r3, %clock_hi; mov.u32 %r3, %clockwise; prefetch.global.L3 [%a0]; prefetch.global.bogus.L1 [%a0]; discard.global.L2 [%a0], 128
createpolicy.bogus.b64 %l2; createpolicy.fractional.L2::evict_last.b64 %r3; applypriority.global.L2::evict_last [%a0], 128; prefetchu.L1.bogus [%a0]
bar.arrive 1; bar.sync; bar.sync 1, 32, 32; bar.bogus.sync 0; bar.sync.bogus 0; bar.red.popc.u32 %r3, 0; bar.red.popc.u32 %p3, 0, %p1; bar.red.and.pred %r3, 0, %p1; bar.red.xor.pred %p3, 0, %p1
barrier.cluster.bogus; barrier.cluster.arrive.acquire; barrier.cluster.sync; barrier.cluster.wait.relaxed; barrier.sync.bogus 0; bar.warp.sync.bogus -1; bar.warp.sync; bar.warp -1
griddepcontrol.bogus; griddepcontrol; nanosleep.u64 %l1; nanosleep.u32; setmaxnreg.inc.sync.aligned.u32; setmaxnreg.inc.sync.aligned.u32 %r1; setmaxnreg.bogus.sync.aligned.u32 40
mbarrier.init.b64 [%r2]; mbarrier.init.shared::cta.b64 [%r2], 1, 2; mbarrier.init.shared::cluster.b64 [%r2], 1; mbarrier.init.bogus.shared.b64 [%r2], 1; mbarrier.init.shared.b32 [%r2], 1
mbarrier.arrive.noComplete.shared.b64 %l2, [%r2], 1; mbarrier.arrive_drop.shared.b64 %l2, [%r2]; mbarrier.arrive.expect_tx.shared.b64 _, [%r2]; mbarrier.arrive.shared.b64 [%r2]
mbarrier.arrive.acquire.cta.shared.b64 _, [%r2]; mbarrier.arrive.shared.b64 %r3, [%r2]; mbarrier.test_wait.shared.b64 %r3, [%r2], %l1; mbarrier.test_wait.shared.b64 %p3, [%r2], %r1
mbarrier.try_wait.parity.release.cta.shared.b64 %p3, [%r2], 0; mbarrier.try_wait.parity.shared.b64 %p3, [%r2]; mbarrier.pending_count.b64 %r3, %l1; mbarrier.inval.b64; mbarrier
cp.async.bogus.shared.global [%r2], [%a0], 16; cp.async.cg.shared.global [%r2], [%a0], 8; cp.async.ca.shared.global [%r2], [%a0], 12; cp.async.ca.shared.global [%r2], [%a0], %r1
cp.async.ca.shared.global [%r2], [%a0]; cp.async.wait_group; cp.async.wait_group %r1; cp.async.commit_group.bogus; cp.async.wait_all 0; cp
cp.async.ca.global.shared [%a0], [%r2], 16; cp.async.mbarrier.arrive.bogus.b64 [%r2]; cp.bogus; cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%a0], [%r2], 16
cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r2], [%r2], 16, [%r2]; cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%a0], [%r2], 16, 1
cp.async.bulk.wait_group.bogus 0; cp.async.bulk.wait_group; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%a0], 16, [%r2]
cp.async.bulk.tensor.2d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%r2], [%l1, {0, 0}], [%r2]; cp.async.bulk.tensor.6d.global.shared::cta.bulk_group [%l1, {0, 0}], [%r2]
cp.async.bulk.tensor.2d.shared::cluster.global.tile::gather4.mbarrier::complete_tx::bytes [%r2], [%l1, {0, 0}], [%r2]; cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%l1, {0}], [%r2]
mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {V4}, {V2}, {%r1}, {V4}; mma.sync.aligned.m16n8k16.col.col.f32.bf16.bf16.f32 {V4}, {V4}, {V2}, {V4}
{MMA}{V2}, {V4}, {V2}, {V4}; {MMA}{V4}, {V2}, {V2}, {V4}; {MMA}{V4}, {V4}, {V4}, {V4}; {MMA}{V4}, {V4}, {V2}, {V2}; {MMA}{V4}, {V4}, {V2}; {MMA}%r1, %r1, %r1, %r1
mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {V4}, {V4}, {V2}, {V4}; mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {V4}, {V4}, {%r1}, {V4}
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {V2}, [%r2]; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {V2}, [%r2]; ldmatrix.sync.aligned.m8n16.x4.shared.b8x16.b6x16_p32 {V4}, [%r2]
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {V4}; ldmatrix.sync.aligned.m8n8.x3.shared.b16 {V2}, [%r2]; ldmatrix.sync.aligned.m8n8.x4.global.b16 {V4}, [%a0]
stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {V2}; stmatrix.sync.aligned.m8n8.x2.bogus.shared.b16 [%r2], {V2}; movmatrix.sync.aligned.m8n8.b16 %r3, %r1; movmatrix.sync.aligned.m8n8.trans.b16 %r3
wgmma.fence.bogus; wgmma.wait_group.sync.aligned; wgmma.wait_group.sync.aligned %r1; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {V4}, %l1, %l1, 1, 1, 1, 0
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {V2}, %l1, %l1, 1, 1, 1, 0, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {V4}, {V2}, %l1, 1, 1, 1, 0
wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {V4}, %l1, %l1, 1; wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {V4}, %l1, %l1, 1, 1, 1, 0, 0; wgmma
bra; bra.bogus E; ret.bogus; exit.bogus; trap.bogus; brkpt; call; call.bogus f, (); call %l1; brx.idx %r1, t; tex.1d.v4.f32.s32 {V4}, [s, {%r1}]
add.u32 %p3, %r1, %r1; add.u32 %r3, %p1, 1; selp.u32 %r3, %p1, 1, %p2; selp.u32 %r3, 1, 2, %r1; setp.eq.u32 %r3, %r1, 0; mov.u32 %r3, %p1; mov.u32 %p3, 1; mov.pred %r3, %p1
cvt.u32.u16 %r3, %p1; cvt.u16.u32 %p3, %r1; mov.b64 %l2, {%p1, %p2}; mov.b64 {%p3, %p4}, %l1; and.pred %r3, %p1, %p2; mov.u32 !%r3, %r1; add.u32; mov; cvt.u32.u32; cvt.rn.bf16x2.f32 %r3
"""
NOT_COVERED = [s.strip().replace("{V4}", V4).replace("{V2}", V2).replace("{MMA}", MMA) for s in re.split("[;\n]", NOT_COVERED) if s.strip()]


@pytest.mark.parametrize("statement", NOT_COVERED)
def test_forms_that_are_not_modelled(statement):
    assert uncovered_in(statement + ";") == [statement]
    with pytest.raises(vgpu.Failure) as failure:
        raw_ptx.run(BEGIN + statement + ";\nE:", np.zeros(32, np.uint32), arch="90a", variables=VARIABLES)
    assert [(r["kind"], r["where"]) for r in failure.value.reports] == [("uncovered", "k.cu:2")]


COVERED = """
ld.weak.global.u32 %r3, [%a0]; ld.volatile.global.v2.u32 {%r3, _}, [%a0]; ld.acquire.gpu.u32 %r3, [%a0]; ld.mmio.relaxed.sys.global.u32 %r3, [%a0]
ld.global.ca.nc.L2::128B.v4.f32 {%f1, %f2, %f3, %f4}, [%a0]; ld.global.nc.L1::no_allocate.L2::evict_first.L2::cache_hint.L2::256B.v2.b64 {%l2, %l3}, [%a0], %l1
ld.relaxed.cluster.shared::cluster.L1::evict_last.u32 %r3, [%r2]; ld.global.u8 %l2, [%a0]; ld.global.s16 %h1, [%a0]; ld.param::entry.u32 %r3, [q0]
st.release.sys.global.u32 [%a0], 1; st.global.L1::evict_first.L2::cache_hint.v4.u32 [%a0], {%r1, 1, 2, 3}, %l1; st.global.u8 [%a0], %l1
atom.acq_rel.cta.shared::cta.max.s64 %l2, [%r2], %l1; atom.exch.b64 %l2, [%a0], %l1; atom.global.add.L2::cache_hint.u32 %r3, [%a0], 1, %l1; red.dec.u32 [%a0], 3
atom.add.acquire.gpu.u32 %r3, [%a0], 1; atom.global.add.noftz.v4.bf16x2 {%r3, %r4, %r5, _}, [%a0], {%r1, %r1, %r1, %r1}; atom.global.cas.b16 %h1, [%a0], %h2, 3
fence.gpu; fence.sc.cluster; fence.acq_rel.sys; membar.proxy.async; fence.proxy.async.shared::cluster; bar.cta.arrive 1, 64; barrier.red.and.aligned.pred %p3, 1, 64, !%p1
barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire; mbarrier.try_wait.relaxed.cluster.shared::cta.b64 %p3, [%r2], %l1, 100; mbarrier.arrive.b64 %l2, [%r2], 2
cp.async.cg.shared::cta.global.L2::cache_hint.L2::64B [%r2], [%a0], 16, %r1, %l1; cp.async.ca.shared.global [%r2], [%a0], 4, !%p1; cp.async.ca.shared.global.L2::cache_hint [%r2], [%a0], 8, %p1, %l1; prefetch.local.L1 [%l1]; prefetch.tensormap [%l1]; isspacep.shared::cluster %p3, %l1
cp.async.bulk.tensor.1d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%r2], [%l1, {0}], [%r2], %l1; cp.async.bulk.prefetch.tensor.1d.L2.global [%l1, {0}]
createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %l2, 1.0; mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {V2}, {V2}, %r1, {V2}; vote.sync.any.pred %p3, !%p1, -1
match.all.sync.b64 %r3|%p3, %l1, -1; shfl.sync.up.b32 _|%p3, %r1, 1, 0, -1; bra.uni E; ret.uni; exit; griddepcontrol.launch_dependents; mov.u64 %l2, %globaltimer; mov.u32 %r3, %clock
"""
COVERED = [s.strip().replace("{V4}", V4).replace("{V2}", V2) for s in re.split("[;\n]", COVERED) if s.strip()]


@pytest.mark.parametrize("statement", COVERED)
def test_forms_that_are_modelled(statement):
    """Optional modifiers, hints and operands of the PTX ISA."""
    assert uncovered_in(statement + ";") == []


@pytest.mark.parametrize("source, arch", [(SM80, "80"), (SM90, "90a"), ("kernels_forms.cu", "90a"), ("kernels_divergence.cu", "80"), ("library", "")])
def test_an_unknown_modifier_of_any_statement(source, arch):
    """Of every statement that nvcc makes of these kernels, behind the opcode's name and at its end."""
    known = set()
    for ptx in vgpu.Gpu.library_ptx() if source == "library" else [vgpu.compile(source, arch)]:
        for at in (r"([a-z0-9]+)", r"([a-z][\w.:]*)"):
            def mutant(match):
                opcode = match[2] + match[3]
                if re.match("call|mov.*%clock", opcode):  # a call that stays is not covered anyway
                    return match[0]
                known.add(opcode)
                return f"{match[1]}{match[2]}.bogus{match[3]}"
            changed = re.sub(r"^([ \t{]*(?:@!?%p\d+[ \t]+)?)" + at + r"((?:\.[\w.:]*)?[ \t][^;\n]*;|;)", mutant, ptx, flags=re.M)
            for kernel, statements in uncovered(changed).items():
                begin = changed.index(f".entry {kernel}(")
                body = changed[begin:changed.index("\n}\n", begin)]
                assert len(statements) >= body.count(".bogus") > 0, kernel
    assert len(known) > 10


LOADS = ".visible .entry f() { ret; }"
MALFORMED = {
    "a section without an end": (".section .debug", "the text ends here"), "a section of nothing": (".section", "the text ends here"),
    "an entry without an end": (".visible .entry g() {", "a kernel without an end"), "a statement without an end": (".entry g() { mov.u32", "a statement without an end"),
    "a function without a body": (".func", "the text ends here"), "a call without an end": (".entry g() { call (", "the text ends here"),
    "a pragma without an end": (".entry g() { .pragma", "the text ends here"), "a vector without an end": (".entry g() { mov.b64 {", "the text ends here"),
    "a guard that is an integer": (".entry g() {\n.reg .b32 %r<2>;\n@%r1 mov.u32 %r1, 0; }", 'line 7: at "mov.u32": the guard is not a predicate'),
    "a guard that is not declared": (".entry g() { @%q exit; }", "the guard is not a predicate"),
    "too many registers": (".entry g() { .reg .b32 %r<99999999>; }", "too many registers"),
    "a branch to a register": (".entry g() { .reg .b32 %r<2>; bra %r1; }", "no label"),
    "a table of functions": (".func h() { ret; }\n.global .align 8 .u64 table[1] = {h};", 'at "h": the variable table is initialised with an address'),
    "a target of another kind": (".target x", "not a target"), "huge global memory": (".global .b8 big[0x1000000000000000];", "the variable big has 1152921504606846976 bytes, more than 4 GiB"),
    "nonsense": ("bogus", "not covered at module scope")}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_text_is_refused(case):
    text, message = MALFORMED[case]
    with pytest.raises(vgpu.LaunchError, match=re.escape(message)):
        vgpu.Gpu().module("\n".join([".version 8.7", ".target sm_80", ".address_size 64", LOADS, text]))


@pytest.mark.parametrize("declared", [".local .b8 big[1000000];", ".shared .b8 big[0x100000000];"])
def test_too_much_memory_is_refused(declared):
    with pytest.raises(vgpu.LaunchError, match="kernel k declares more shared or local memory than there is"):
        raw_ptx.run("", variables=declared)
