"""Kernels of the tests as PTX text. Every line of a body is a source line of "k.cu", so that a report can be matched to it.

    ring = Kernel("u64 x, u64 out, u32 rounds, map m", '''
    st.shared.u32 [at], value;
    bar.sync 0;
    ''', shared=64)
    ring.launch(vgpu.Gpu(), block=64, args=[...])
    ring.edit("bar.sync 0;", "").caught(run, "race", at="ld.shared.u32 v, [at];")

A body finds tid, lane, warp, cta and rank (of its cluster) in registers of these names, its parameters too (a map as its generic
address), and `smem`, the 32-bit address of its shared memory.
"""
import re

import pytest

import vgpu

HEADER = """.version 8.7
.target sm_90a
.address_size 64
.file 1 "k.cu"
"""


class Kernel:
    def __init__(self, params, body, shared=16, align=1024, directives="", registers=""):
        self.params, self.body, self.shared, self.align = params, body, shared, align
        self.directives, self.registers = directives, registers

    @property
    def ptx(self):
        params = [p.split() for p in self.params.split(",") if p]
        declared = [f".param .align 128 .b8 p_{name}[128]" if kind == "map" else f".param .{kind} p_{name}" for kind, name in params]
        lines = [HEADER + f".visible .entry k({', '.join(declared)}) {self.directives} {{",
                 f".shared .align {self.align} .b8 memory[{self.shared}];",
                 ".reg .b32 tid, lane, warp, cta, rank, smem;", self.registers]
        for kind, name in params:
            if kind == "map":
                lines.append(f".reg .b64 {name}; mov.b64 {name}, p_{name}; cvta.param.u64 {name}, {name};")
            else:
                lines.append(f".reg .b{kind[1:]} {name}; ld.param.{kind} {name}, [p_{name}];")
        lines.append("mov.u32 tid, %tid.x; and.b32 lane, tid, 31; shr.u32 warp, tid, 5; mov.u32 smem, memory;")
        lines.append("mov.u32 cta, %ctaid.x; mov.u32 rank, %cluster_ctarank;")
        for i, line in enumerate(self.body.splitlines(), 1):
            lines += [f".loc 1 {i} 1"] * bool(line.strip()) + [line]
        return "\n".join([*lines, "ret;", "}"])

    def edit(self, *changes):
        """The kernel with pieces of its text replaced: old, new, old, new, ... Each must be there once."""
        body = self.body
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert body.count(old) == 1, (old, body.count(old))
            body = body.replace(old, new)
        return Kernel(self.params, body, self.shared, self.align, self.directives, self.registers)

    def launch(self, gpu, **shape):
        gpu.module(self.ptx).launch("k", **shape)

    def caught(self, run, kind, at, text="", least=None):
        """Each run(self, seed) must end in a report whose kind matches, at the line that holds `at`, whose text matches `text`; or
        at least so many of eight, where the schedule decides what goes wrong first."""
        lines = [i for i, line in enumerate(self.body.splitlines(), 1) if at in line]
        assert len(lines) == 1, (at, lines)
        hits, seeds = 0, range(8 if least else 3)
        for seed in seeds:
            with pytest.raises(vgpu.Failure) as failure:
                run(self, seed)
            found = [r for r in failure.value.reports if re.fullmatch(kind, r["kind"]) and r["where"] == f"k.cu:{lines[0]}"]
            hits += any(re.search(text, r["text"]) for r in found)
            assert hits > seed or least, f"expected {kind} at line {lines[0]}, got\n{failure.value}"
        assert hits >= (least or 3), f"{hits} of 8 schedules showed {kind} at line {lines[0]}, the last one\n{failure.value}"


def only(condition, body):
    """`body` for the threads of which a comparison holds: only("tid eq 0", ...)."""
    a, op, b = condition.split()
    return f"{{ .reg .pred here; setp.{op}.u32 here, {a}, {b}; @!here bra AFTER;\n{body}\nAFTER: }}"


def wait(barrier, parity, how="try_wait.parity"):
    return f"{{ .reg .pred done; AGAIN: mbarrier.{how}.shared::cta.b64 done, [{barrier}], {parity}; @!done bra AGAIN; }}"
