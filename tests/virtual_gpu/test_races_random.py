"""Random kernels of accesses and barriers: the virtual GPU reports a race if and only if two accesses of different threads to a common
byte, one of them a write and not both atomic, are unordered by vector clocks computed here; and only at statements that have one."""
import numpy as np
import pytest

import vgpu
from raw_ptx import run

WARPS, THREADS = 3, 96
SHARED = ".shared .align 16 .b8 s[1536];"
ORDERS = ("bar.sync 0;", "bar.sync 0;", "bar.warp.sync -1;", "bar.sync {}, 64;", "bar.arrive {}, 96;", "bar.warp.sync %r3;")


def random_program(rng):
    """Statements: ("ld", "st" or "red"; bytes; offset of each thread, or -1), or (one of ORDERS, the warp that stays away or waits, None)."""
    program, own = [], rng.choice([4, 8, 16])
    for i in range(rng.integers(4, 14)):
        if i % 2 if rng.random() < 0.9 else rng.random() < 0.5:
            program.append((str(rng.choice(ORDERS)).format(i + 1), int(rng.integers(0, WARPS)), None))
            continue
        kind = str(rng.choice(["ld", "st", "ld", "st", "red"]))
        size = 4 if kind == "red" else int(rng.choice([n for n in (1, 2, 4, 8, 16) if n <= own]))
        # Mostly each thread has bytes of its own, or those of a neighbour or of another warp; sometimes anything.
        shift = int(rng.choice([0, 0, 0, 1, 32]))
        offsets = np.roll(np.arange(THREADS), shift) * own + rng.integers(0, own // size) * size
        if rng.random() < 0.1:
            offsets = rng.integers(0, own * THREADS // size, THREADS) * size
        program.append((kind, size, np.where(rng.random(THREADS) < rng.choice([0.03, 0.5, 1]), offsets, -1)))
    return program


def ptx_of(program):
    lines = []
    for i, (kind, size, offsets) in enumerate(program):
        if offsets is None:
            if kind.endswith(", 64;"):
                lines.append(f"setp.ne.u32 %p1, %warp, {size}; @%p1 {kind}")
            elif kind.startswith("bar.arrive"):  # one warp waits for the others
                lines.append(f"setp.ne.u32 %p1, %warp, {size}; @%p1 {kind} @!%p1 {kind.replace('arrive', 'sync')}")
            else:
                lines.append(kind)
            continue
        data = {1: "u8 {}", 2: "u16 {}", 4: "u32 {}", 8: "u64 {}", 16: "v2.u64 {}"}[size]
        what = {"ld": f"ld.shared.{data.format({1: '%h1', 2: '%h1', 4: '%r4', 8: '%l4', 16: '{%l4, %l5}'}[size])}, [%r2];",
                "st": f"st.shared.{data.split()[0]} [%r2], {'{0, 0}' if size == 16 else 0};",
                "red": "red.shared.add.u32 [%r2], 1;"}[kind]
        lines.append(f"ld.global.u32 %r1, [%x0+{i * THREADS * 4}]; setp.ne.u32 %p1, %r1, -1; add.u32 %r2, %r1, %r8; @%p1 {what}")
    return "\n".join(["mov.u32 %r8, s; mad.lo.u32 %r7, %t, 16, %r8; st.shared.v2.u64 [%r7], {0, 0};"
                      "and.b32 %r3, %lane, 1; shl.b32 %r3, 0x55555555, %r3; bar.sync 0;", *lines])


def racy_statements(program):
    """Indices of the statements that have an access in a race."""
    known, racy = np.eye(THREADS, dtype=int), set()  # known[t, u]: what t knows of u; its own entry is its time
    history = [[] for _ in range(2048)]  # of each byte: (statement, thread, its time, write, atomic)

    def meet(givers, takers):
        joined = known[givers].max(0)
        known[takers] = np.maximum(known[takers], joined)
        for t in givers:
            known[t, t] += 1

    warp = lambda w: list(range(32 * w, 32 * w + 32))
    for i, (kind, size, offsets) in enumerate(program):
        if offsets is None:
            others = [t for w in range(WARPS) if w != size for t in warp(w)]
            if kind == "bar.sync 0;":
                meet(list(range(THREADS)), list(range(THREADS)))
            elif kind.endswith(", 64;"):
                meet(others, others)
            elif kind.startswith("bar.arrive"):
                meet(list(range(THREADS)), warp(size))
            else:
                for w in range(WARPS):
                    for group in ([warp(w)] if kind.endswith("-1;") else [warp(w)[::2], warp(w)[1::2]]):
                        meet(group, group)
            continue
        write, atomic = kind != "ld", kind == "red"
        for t in range(THREADS):
            for byte in range(offsets[t], offsets[t] + size) if offsets[t] >= 0 else ():
                for j, u, time, wrote, was_atomic in history[byte]:
                    if u != t and (write or wrote) and not (atomic and was_atomic) and known[t, u] < time:
                        racy |= {i, j}
        for t in range(THREADS):  # lanes of one statement are not ordered either
            for byte in range(offsets[t], offsets[t] + size) if offsets[t] >= 0 else ():
                for j, u, *_ in history[byte]:
                    if j == i and u != t and write and not atomic:
                        racy.add(i)
                history[byte].append((i, t, known[t, t], write, atomic))
    return racy


@pytest.mark.parametrize("number", range(60))
def test_races(number):
    program = random_program(np.random.default_rng(number))
    racy = racy_statements(program)
    offsets = np.array([np.full(THREADS, -1) if x is None else x for _, _, x in program], np.int32).view(np.uint32)
    for seed in range(3):
        try:
            run(ptx_of(program), offsets, block=THREADS, seed=seed, variables=SHARED, options=dict(max_reports=1000))
            found = set()
        except vgpu.Failure as failure:
            assert {r["kind"] for r in failure.reports} == {"race"}, str(failure)
            found = {int(r["where"].split(":")[1]) - 2 for r in failure.reports}
        assert found <= racy and bool(found) == bool(racy), (program, found, racy)
