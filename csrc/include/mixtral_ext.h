/* mixtral_ext: kernels of the Mistral/Mixtral family behind one C API (C99; no CUDA, torch or C++ header needed).
 *
 * How every op is called
 *   1. Fill a params struct: zero it, set struct_size, describe each array by a mixtral_tensor.
 *   2. Ask mixtral_<op>_workspace_size(ctx, &params) for the scratch bytes (0 for most ops). It depends on shapes and
 *      declared maxima only, never on values, and returns 0 if the params are not acceptable (the op itself says why).
 *   3. Call mixtral_<op>(ctx, &params, workspace, workspace_bytes, stream).
 *
 * Rules that hold for every op
 *   - No op allocates, synchronises, throws, starts a thread, or reads a device value on the host. On CUDA a call
 *     enqueues work on `stream` (a cudaStream_t passed as void *; NULL is the default stream) and can be captured in a
 *     graph and replayed with other values in the same arrays; the context's device must be the thread's current one.
 *     On the CPU `stream` must be NULL, and the call returns when the result is complete.
 *   - What the host can see (dtype, rank, shape, stride, alignment, NULL, limits, workspace) is checked before anything
 *     is written; the first violation is returned and mixtral_last_error() names the argument, what was expected and
 *     what came.
 *   - What only the arrays hold (offsets, ids, slots, lengths): on the CPU it is checked too, before anything is written.
 *     On CUDA nothing is read or written out of range whatever they hold: offsets are clamped to a monotone range,
 *     bad indices are skipped.
 *   - Outputs must not overlap inputs or each other, except where a field says "in place". The caller sees to it.
 *   - Workspace contents are undefined on entry and on return; any alignment. Results are bitwise equal from run to run
 *     and do not depend on the number of threads.
 *   - 16-bit inputs are accumulated in f32 and rounded once at the end of each stage that a field or op names.
 *
 * Shape letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token (top-k), S = T*K rows,
 * Hq/Hk query/key heads, D head dim, B sequences, W window, C cache slots per sequence, M/N/Kd GEMM sizes.
 *
 * Limits: 1 <= K <= 8 (moe_gate: K <= E too), 1 <= E <= 256, D in {64, 128}, S < 2^31, Hq a multiple of Hk, query tokens of all
 * sequences * Hq/Hk < 2^31.
 * CPU dtypes: f32, bf16, f16. CUDA dtypes: bf16, f16 (router logits also f32); of arrays in the model's dtype the data
 * pointers and all strides but the innermost are multiples of 16 bytes. Else any alignment that suits the element. The
 * innermost stride is 1 everywhere. The grouped products and moe_experts on CUDA: Kd, H and I multiples of 8.
 */
#ifndef MIXTRAL_EXT_H
#define MIXTRAL_EXT_H

#include <stddef.h>
#include <stdint.h>

#define MIXTRAL_VERSION_MAJOR 0
#define MIXTRAL_VERSION_MINOR 1
#define MIXTRAL_VERSION_PATCH 0

#define MIXTRAL_MAX_TOP_K 8
#define MIXTRAL_MAX_EXPERTS 256

#if defined(__GNUC__) || defined(__clang__)
#define MIXTRAL_API __attribute__((visibility("default")))
#else
#define MIXTRAL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------- status, version */

typedef enum mixtral_status {
  MIXTRAL_OK = 0,
  MIXTRAL_ERROR_INVALID_ARGUMENT = 1, /* dtype, rank, shape, stride, alignment, NULL, limit, or (CPU) a value in an index array */
  MIXTRAL_ERROR_NOT_SUPPORTED = 2,    /* valid, but this library, device or architecture does not do it */
  MIXTRAL_ERROR_WORKSPACE = 3,        /* workspace NULL or shorter than mixtral_<op>_workspace_size says */
  MIXTRAL_ERROR_CUDA = 4,             /* the CUDA runtime refused; the message carries its text */
  MIXTRAL_ERROR_OUT_OF_MEMORY = 5     /* mixtral_context_create only */
} mixtral_status;

/* Message of the last call on this thread that did not return MIXTRAL_OK, "" if there was none. Valid until the next
 * failing call on this thread. */
MIXTRAL_API const char *mixtral_last_error(void);

/* major * 10000 + minor * 100 + patch of the library that is loaded. */
MIXTRAL_API int mixtral_version(void);

/* --------------------------------------------------------------------------------------------------------- tensors */

/* The four bytes of a DLPack DLDataType {code, bits, lanes = 1} read as a little-endian integer. */
typedef enum mixtral_dtype {
  MIXTRAL_DTYPE_I32 = 0x00012000,
  MIXTRAL_DTYPE_I64 = 0x00014000,
  MIXTRAL_DTYPE_F16 = 0x00011002,
  MIXTRAL_DTYPE_F32 = 0x00012002,
  MIXTRAL_DTYPE_BF16 = 0x00011004
} mixtral_dtype;

/* A strided array on the context's device. All bytes zero means "absent", allowed where a field says optional. */
typedef struct mixtral_tensor {
  void *data;        /* first element; may be NULL when the array has no elements; only outputs are written */
  int32_t dtype;     /* a mixtral_dtype */
  int32_t ndim;      /* 1 to 4 (0 = absent) */
  int64_t shape[4];  /* elements per dimension, outermost first; entries from ndim on are ignored */
  int64_t stride[4]; /* elements (not bytes) between neighbours; may not be negative; ignored where shape <= 1 */
} mixtral_tensor;

/* --------------------------------------------------------------------------------------------------------- context */

typedef enum mixtral_device_type { /* DLPack codes */
  MIXTRAL_DEVICE_CPU = 1,
  MIXTRAL_DEVICE_CUDA = 2
} mixtral_device_type;

typedef enum mixtral_arch {
  MIXTRAL_ARCH_AUTO = 0,            /* the best that machine and library have */
  MIXTRAL_ARCH_CPU_PORTABLE = 1,    /* baseline instructions of the build */
  MIXTRAL_ARCH_CPU_AVX2 = 2,        /* AVX2, FMA, F16C */
  MIXTRAL_ARCH_CPU_AVX512 = 3,      /* AVX-512 F, BW, DQ, VL */
  MIXTRAL_ARCH_CPU_AVX512_BF16 = 4, /* the above + AVX512_BF16 */
  MIXTRAL_ARCH_CPU_AMX = 5,         /* the above + AMX-TILE, AMX-BF16 */
  MIXTRAL_ARCH_CUDA_SM80 = 80,      /* portable CUDA kernels: compute capability 8.0 and up */
  MIXTRAL_ARCH_CUDA_SM90 = 90       /* Hopper kernels where there are any, else the portable ones */
} mixtral_arch;

/* A caller's thread pool: runs task(task_data, i) for every i in [0, count) exactly once, in any order and on any
 * threads, and returns when all are done. Called from the thread that calls the op, never nested. */
typedef void (*mixtral_task)(void *task_data, int64_t index);
typedef void (*mixtral_parallel_for)(void *pool, int64_t count, mixtral_task task, void *task_data);

typedef struct mixtral_context_options {
  size_t struct_size;                /* sizeof(mixtral_context_options) */
  int32_t device_type;               /* a mixtral_device_type */
  int32_t device_index;              /* CUDA ordinal; 0 for the CPU */
  int32_t arch;                      /* a mixtral_arch; one the device or library lacks is MIXTRAL_ERROR_NOT_SUPPORTED */
  int32_t reserved;                  /* 0 */
  mixtral_parallel_for parallel_for; /* CPU: NULL = run serially on the calling thread; CUDA: must be NULL */
  void *pool;                        /* passed to parallel_for as it is */
} mixtral_context_options;

/* Device properties, function attributes and the thread pool, set up once. Immutable after creation, so any number of
 * threads may use one context at a time. */
typedef struct mixtral_context mixtral_context;

MIXTRAL_API mixtral_status mixtral_context_create(const mixtral_context_options *options, mixtral_context **context);
/* NULL is allowed. No op may be running on the context. */
MIXTRAL_API void mixtral_context_destroy(mixtral_context *context);
/* The architecture in use: never MIXTRAL_ARCH_AUTO for a live context; MIXTRAL_ARCH_AUTO for NULL. */
MIXTRAL_API mixtral_arch mixtral_context_arch(const mixtral_context *context);

typedef enum mixtral_op {
  MIXTRAL_OP_MOE_GATE = 1,
  MIXTRAL_OP_MOE_SORT = 2,
  MIXTRAL_OP_MOE_PERMUTE = 3,
  MIXTRAL_OP_MOE_COMBINE = 4,
  MIXTRAL_OP_GROUPED_GEMM = 5,
  MIXTRAL_OP_GROUPED_GEMM_SWIGLU = 6,
  MIXTRAL_OP_MOE_EXPERTS = 7,
  MIXTRAL_OP_SLIDING_WINDOW_ATTENTION = 8,
  MIXTRAL_OP_ROLLING_ATTENTION = 9,
  MIXTRAL_OP_APPLY_ROPE = 10
} mixtral_op;

/* MIXTRAL_OK if mixtral_<op>(context, params, ...) would be accepted as far as the host can see (workspace and index
 * values aside); otherwise the status it would return. params NULL asks whether the op exists on the context at all. */
MIXTRAL_API mixtral_status mixtral_supports(const mixtral_context *context, mixtral_op op, const void *params);

/* -------------------------------------------------------------------------------------------------------- moe_gate */

/* Router: the K largest logits of each token, their softmax, and the permutation that sorts the T*K (token, expert)
 * pairs by expert. Order is by the f32 value of the logit; ties and -0/+0 go to the lower expert id; NaN ranks highest
 * (a token with a NaN logit gets NaN weights, its ids stay distinct and in range). A -inf logit has weight 0. As in
 * torch.softmax, a token with a +inf logit and one whose logits are all -inf get NaN weights. */
typedef struct mixtral_moe_gate_params {
  size_t struct_size;           /* sizeof(mixtral_moe_gate_params) */
  mixtral_tensor router_logits; /* [T, E] f32, bf16 or f16; any row stride */
  int32_t top_k;                /* K */
  int32_t renormalize;          /* nonzero: softmax over the K chosen logits (Mixtral); 0: over all E, then chosen */
  mixtral_tensor topk_weights;  /* out [T, K] f32 contiguous, in descending order of logit */
  mixtral_tensor topk_ids;      /* out [T, K] i32 contiguous */
  mixtral_tensor expert_offsets; /* out [E+1] i32: rows of expert e are [expert_offsets[e], expert_offsets[e+1]); [0] is 0 */
  mixtral_tensor sorted_slots;  /* out [T*K] i32: sorted_slots[r] = t*K + j of row r, rows by expert, then slot (stable) */
  mixtral_tensor slot_rows;     /* out [T, K] i32 contiguous: the inverse, slot_rows[t][j] = r */
} mixtral_moe_gate_params;

MIXTRAL_API size_t mixtral_moe_gate_workspace_size(const mixtral_context *context, const mixtral_moe_gate_params *params);
MIXTRAL_API mixtral_status mixtral_moe_gate(const mixtral_context *context, const mixtral_moe_gate_params *params,
                                            void *workspace, size_t workspace_bytes, void *stream);

/* -------------------------------------------------------------------------------------------------------- moe_sort */

/* The permutation of moe_gate for routing made elsewhere. An id outside [0, num_experts) is a skip marker: it gets no
 * row, slot_rows is -1 there, and the tail of sorted_slots (from expert_offsets[E] on) is -1. */
typedef struct mixtral_moe_sort_params {
  size_t struct_size;            /* sizeof(mixtral_moe_sort_params) */
  mixtral_tensor topk_ids;       /* [T, K] i32 or i64; any row stride */
  int32_t num_experts;           /* E */
  int32_t reserved;              /* 0 */
  mixtral_tensor expert_offsets; /* out [E+1] i32 */
  mixtral_tensor sorted_slots;   /* out [T*K] i32 */
  mixtral_tensor slot_rows;      /* out [T, K] i32 contiguous */
} mixtral_moe_sort_params;

MIXTRAL_API size_t mixtral_moe_sort_workspace_size(const mixtral_context *context, const mixtral_moe_sort_params *params);
MIXTRAL_API mixtral_status mixtral_moe_sort(const mixtral_context *context, const mixtral_moe_sort_params *params,
                                            void *workspace, size_t workspace_bytes, void *stream);

/* ------------------------------------------------------------------------------------------------------ moe_permute */

/* rows[r] = hidden[sorted_slots[r] / K]; a row whose slot is -1 is not written. CPU: slots outside [-1, T*K) are an
 * error; CUDA: such rows are not written. */
typedef struct mixtral_moe_permute_params {
  size_t struct_size;          /* sizeof(mixtral_moe_permute_params) */
  mixtral_tensor hidden;       /* [T, H] f32, bf16 or f16; any row stride */
  mixtral_tensor sorted_slots; /* [S] i32 contiguous */
  int32_t top_k;               /* K, 1 to 8 */
  int32_t reserved;            /* 0 */
  mixtral_tensor rows;         /* out [S, H], dtype of hidden; any row stride */
} mixtral_moe_permute_params;

MIXTRAL_API size_t mixtral_moe_permute_workspace_size(const mixtral_context *context, const mixtral_moe_permute_params *params);
MIXTRAL_API mixtral_status mixtral_moe_permute(const mixtral_context *context, const mixtral_moe_permute_params *params,
                                               void *workspace, size_t workspace_bytes, void *stream);

/* ------------------------------------------------------------------------------------------------------ moe_combine */

/* out[t] = sum over j of topk_weights[t][j] * rows[slot_rows[t][j]], in order of j, f32 accumulation, one rounding. A
 * slot_rows of -1 contributes nothing and its weight is not read. CPU: slot_rows outside [-1, S) is an error; CUDA: it
 * contributes nothing. */
typedef struct mixtral_moe_combine_params {
  size_t struct_size;          /* sizeof(mixtral_moe_combine_params) */
  mixtral_tensor rows;         /* [S, H] f32, bf16 or f16; any row stride */
  mixtral_tensor slot_rows;    /* [T, K] i32; any row stride */
  mixtral_tensor topk_weights; /* [T, K] f32; any row stride */
  mixtral_tensor out;          /* out [T, H], dtype of rows; any row stride */
} mixtral_moe_combine_params;

MIXTRAL_API size_t mixtral_moe_combine_workspace_size(const mixtral_context *context, const mixtral_moe_combine_params *params);
MIXTRAL_API mixtral_status mixtral_moe_combine(const mixtral_context *context, const mixtral_moe_combine_params *params,
                                               void *workspace, size_t workspace_bytes, void *stream);

/* ----------------------------------------------------------------------------------------------------- grouped_gemm */

/* For every row r of expert e: out[r] = A(r) @ b[e]^T with A(r) = a[r], or a[a_rows[r] / a_rows_divisor] if a_rows is
 * given (so a_rows = sorted_slots with divisor K gathers tokens inside the product). Rows of out outside
 * [0, expert_offsets[E]) are not touched, and their a_rows are not read. CPU: expert_offsets must start at 0, not
 * decrease and end at R or less, and a_rows of rows in range must satisfy 0 <= a_rows[r] / a_rows_divisor < M; CUDA: A(r) is
 * zeros for other a_rows. A row's bits depend neither on the other rows nor on the
 * kernel that their number selects. */
typedef struct mixtral_grouped_gemm_params {
  size_t struct_size;            /* sizeof(mixtral_grouped_gemm_params) */
  mixtral_tensor a;              /* [M, Kd] f32, bf16 or f16; any row stride */
  mixtral_tensor b;              /* [E, N, Kd], dtype of a; any expert and row stride */
  mixtral_tensor expert_offsets; /* [E+1] i32 */
  mixtral_tensor a_rows;         /* optional [R] i32; without it R = M */
  int32_t a_rows_divisor;        /* 1 or more; 1 without a_rows */
  int32_t reserved;              /* 0 */
  mixtral_tensor out;            /* out [R, N], dtype of a; any row stride */
} mixtral_grouped_gemm_params;

MIXTRAL_API size_t mixtral_grouped_gemm_workspace_size(const mixtral_context *context, const mixtral_grouped_gemm_params *params);
MIXTRAL_API mixtral_status mixtral_grouped_gemm(const mixtral_context *context, const mixtral_grouped_gemm_params *params,
                                                void *workspace, size_t workspace_bytes, void *stream);

/* ---------------------------------------------------------------------------------------------- grouped_gemm_swiglu */

/* As grouped_gemm with b[e] = [gate; up] (gate rows first, as transformers v5 and vLLM concatenate them):
 * out[r] = silu(A(r) @ gate^T) * (A(r) @ up^T), silu(x) = x / (1 + exp(-x)), all in f32, one rounding. */
typedef struct mixtral_grouped_gemm_swiglu_params {
  size_t struct_size;            /* sizeof(mixtral_grouped_gemm_swiglu_params) */
  mixtral_tensor a;              /* [M, H] f32, bf16 or f16; any row stride */
  mixtral_tensor w_gate_up;      /* [E, 2I, H], dtype of a; any expert and row stride */
  mixtral_tensor expert_offsets; /* [E+1] i32 */
  mixtral_tensor a_rows;         /* optional [R] i32; without it R = M */
  int32_t a_rows_divisor;        /* 1 or more; 1 without a_rows */
  int32_t reserved;              /* 0 */
  mixtral_tensor out;            /* out [R, I], dtype of a; any row stride */
} mixtral_grouped_gemm_swiglu_params;

MIXTRAL_API size_t mixtral_grouped_gemm_swiglu_workspace_size(const mixtral_context *context,
                                                              const mixtral_grouped_gemm_swiglu_params *params);
MIXTRAL_API mixtral_status mixtral_grouped_gemm_swiglu(const mixtral_context *context,
                                                       const mixtral_grouped_gemm_swiglu_params *params,
                                                       void *workspace, size_t workspace_bytes, void *stream);

/* ----------------------------------------------------------------------------------------------------- moe_experts */

/* The whole expert layer: out[t] = sum over j of topk_weights[t][j] * FFN(topk_ids[t][j], hidden[t]) with
 * FFN(e, x) = w_down[e] @ (silu(gate[e] @ x) * (up[e] @ x)). Rounds to the dtype of hidden after SwiGLU, after the
 * second product and after the sum. Ids outside [0, E) are skip markers: no contribution, weight not read. The three
 * maps come from moe_gate or moe_sort for the same topk_ids; give all or none (none: the call sorts). A token's bits do not
 * depend on the other tokens.
 * CUDA: 3 launches with maps, 4 or 5 without. The workspace is K*(I+H)*2 bytes a token; without maps 8*K more, and a few KB
 * for offsets and the sort. */
typedef struct mixtral_moe_experts_params {
  size_t struct_size;            /* sizeof(mixtral_moe_experts_params) */
  mixtral_tensor hidden;         /* [T, H] f32, bf16 or f16; any row stride */
  mixtral_tensor w_gate_up;      /* [E, 2I, H], dtype of hidden; any expert and row stride */
  mixtral_tensor w_down;         /* [E, H, I], dtype of hidden; any expert and row stride */
  mixtral_tensor topk_weights;   /* [T, K] f32; any row stride */
  mixtral_tensor topk_ids;       /* [T, K] i32 or i64; any row stride; with the maps its data is not read, but not NULL either */
  mixtral_tensor expert_offsets; /* optional [E+1] i32 */
  mixtral_tensor sorted_slots;   /* optional [T*K] i32 */
  mixtral_tensor slot_rows;      /* optional [T, K] i32 contiguous */
  mixtral_tensor out;            /* out [T, H], dtype of hidden; any row stride */
} mixtral_moe_experts_params;

MIXTRAL_API size_t mixtral_moe_experts_workspace_size(const mixtral_context *context, const mixtral_moe_experts_params *params);
MIXTRAL_API mixtral_status mixtral_moe_experts(const mixtral_context *context, const mixtral_moe_experts_params *params,
                                               void *workspace, size_t workspace_bytes, void *stream);

/* ------------------------------------------------------------------------------------------ sliding_window_attention */

/* Causal grouped-query attention, bottom-right aligned: of a sequence with n queries and m keys, query i stands at key
 * position p = m - n + i and sees the keys at positions max(0, p-W+1) .. p, W of them including its own (transformers'
 * rule; flash-attn's window_size=(W-1, 0)); window 0 sees 0 .. p. out = softmax(scale * q k^T) v. A query that sees no
 * key, or keys with scores of -inf alone, gets out 0 and lse -inf. Query head h reads key head h / (Hq/Hk).
 *
 * Packed layout: q [Tq, Hq, D], k and v [Tk, Hk, D], out [Tq, Hq, D], lse [Hq, Tq]; cu_seqlens_q and cu_seqlens_k
 *   [B+1] i32 give the sequence bounds: sequence b has queries [cu_seqlens_q[b], cu_seqlens_q[b+1]). Without both, the
 *   arrays hold one sequence. Queries outside the bounds are not written.
 * Batched layout: q [B, Sq, Hq, D], k and v [B, Sk, Hk, D], out [B, Sq, Hq, D], lse [B, Hq, Sq]; k_start and k_length
 *   [B] i32 optionally restrict sequence b to the keys k_start[b] .. k_start[b] + k_length[b] - 1 (m = k_length[b];
 *   default 0 and Sk - k_start[b]); keys outside are never read.
 * Every array may have any batch, token and head stride (so [B, H, S, D] storage is passed as a view).
 *
 * A sequence's bits do not depend on the other sequences. CUDA: a NaN or infinity in k or v may also reach queries that do not see
 * it, if they share a block (128 rows, tokens * Hq/Hk) with one that does. Scores are good to |scale * q k^T| < 1e8. Keys beyond
 * max_seqlen_k are not there, queries beyond max_seqlen_q are left alone; of cu_seqlens_k each pair is clamped by itself, and a bad
 * one may spoil the results of other sequences. 1 or 2 launches where all sequences have as many queries, up to 3 else. The
 * workspace is at most (D+2)*4 bytes a span, query token and head of sequences with up to 64 rows, where declared maxima admit
 * more than 512 keys: the keys that a sequence sees are divided into spans of 512, or into 64 if they are more than 32768. */
typedef struct mixtral_sliding_window_attention_params {
  size_t struct_size;          /* sizeof(mixtral_sliding_window_attention_params) */
  mixtral_tensor q;            /* f32, bf16 or f16, 3-D packed or 4-D batched */
  mixtral_tensor k;            /* dtype and rank of q */
  mixtral_tensor v;            /* dtype and shape of k */
  mixtral_tensor cu_seqlens_q; /* optional [B+1] i32, packed only, together with cu_seqlens_k; first 0, not decreasing, last <= Tq */
  mixtral_tensor cu_seqlens_k; /* optional [B+1] i32; first 0, not decreasing, last <= Tk */
  mixtral_tensor k_start;      /* optional [B] i32, batched only; 0 <= k_start <= Sk */
  mixtral_tensor k_length;     /* optional [B] i32, batched only; 0 <= k_length <= Sk - k_start */
  int64_t max_seqlen_q;        /* no sequence has more queries than this; 0 = unknown (Tq is used); of use with cu_seqlens */
  int64_t max_seqlen_k;        /* no sequence has more keys than this; 0 = unknown (Tk is used); of use with cu_seqlens */
  int64_t window;              /* W >= 1, or 0 for plain causal */
  double softmax_scale;        /* finite; 0 selects 1/sqrt(D) */
  mixtral_tensor out;          /* out, dtype and shape of q */
  mixtral_tensor lse;          /* optional out f32, natural log of the sum of exp(scale * q k^T); contiguous */
} mixtral_sliding_window_attention_params;

MIXTRAL_API size_t mixtral_sliding_window_attention_workspace_size(const mixtral_context *context,
                                                                   const mixtral_sliding_window_attention_params *params);
MIXTRAL_API mixtral_status mixtral_sliding_window_attention(const mixtral_context *context,
                                                            const mixtral_sliding_window_attention_params *params,
                                                            void *workspace, size_t workspace_bytes, void *stream);

/* ------------------------------------------------------------------------------------------------ rolling_attention */

/* Attention of a chunk of new tokens over a ring of cached keys and values, then the append. Position p of a sequence
 * lives in ring slot p % C. Sequence b has n = cu_seqlens_q[b+1] - cu_seqlens_q[b] new tokens at positions
 * L .. L+n-1, L = cache_lengths[b] (tokens seen so far; may exceed C). The query at position p sees positions
 * max(0, p-W+1) .. p (window 0: 0 .. p): those below L from the ring, the rest from k and v themselves. Then the last
 * min(n, C) tokens of k and v are stored in the ring. cache_lengths is not changed: the caller advances it by n.
 *
 * With k and v absent nothing is stored and the ring already holds the chunk itself: all positions up to L+n-1 are read
 * from it. A window then needs W + max_seqlen_q - 1 <= C.
 * With window 0 no position may be overwritten: max_cache_length + max_seqlen_q <= C. On the CPU the lengths themselves are
 * checked; on CUDA both maxima must be given for that (without k and v max_seqlen_q), and the device drops stores beyond slot
 * C-1. There positions more than max_cache_length before the chunk are not seen, and new tokens beyond max_seqlen_q are left alone.
 * With rope_theta > 0, q and k arrive unrotated; both are rotated by their positions (as apply_rope does, rounded to
 * their dtype) before use, and the ring holds rotated keys. q, k and v themselves are not changed.
 *
 * A sequence's bits do not depend on the other sequences. CUDA: a decoding step (max_seqlen_q 1) is 3 launches at most, longer
 * chunks up to 5; see sliding_window_attention for NaN and the workspace, which with rope_theta holds the rotated q, and k of
 * longer chunks. */
typedef struct mixtral_rolling_attention_params {
  size_t struct_size;           /* sizeof(mixtral_rolling_attention_params) */
  mixtral_tensor q;             /* [Tq, Hq, D] f32, bf16 or f16; any token and head stride */
  mixtral_tensor k;             /* optional [Tq, Hk, D], dtype of q; together with v */
  mixtral_tensor v;             /* optional [Tq, Hk, D], dtype of q */
  mixtral_tensor k_cache;       /* in place [slots, C, Hk, D], dtype of q; any slot, token and head stride */
  mixtral_tensor v_cache;       /* in place, dtype and shape of k_cache */
  mixtral_tensor cu_seqlens_q;  /* [B+1] i32; first 0, not decreasing, last <= Tq */
  mixtral_tensor cache_lengths; /* [B] i32, 0 or more; cache_lengths[b] + n < 2^31 */
  mixtral_tensor cache_slots;   /* optional [B] i32: sequence b uses k_cache[cache_slots[b]]; default b; distinct, in [0, slots) */
  int64_t max_seqlen_q;         /* no sequence has more new tokens than this; 0 = unknown (Tq is used: more workspace) */
  int64_t max_cache_length;     /* no cache_lengths entry exceeds this; -1 = unknown */
  int64_t window;               /* 1 <= W <= C, or 0 for plain causal */
  double softmax_scale;         /* finite; 0 selects 1/sqrt(D) */
  double rope_theta;            /* 0: q and k arrive rotated; else 1e-30 to 1e30 */
  int32_t rope_interleaved;     /* see apply_rope */
  int32_t reserved;             /* 0 */
  mixtral_tensor out;           /* out, dtype and shape of q; queries outside the bounds are not written */
  mixtral_tensor lse;           /* optional out [Hq, Tq] f32 contiguous */
} mixtral_rolling_attention_params;

MIXTRAL_API size_t mixtral_rolling_attention_workspace_size(const mixtral_context *context,
                                                            const mixtral_rolling_attention_params *params);
MIXTRAL_API mixtral_status mixtral_rolling_attention(const mixtral_context *context,
                                                     const mixtral_rolling_attention_params *params,
                                                     void *workspace, size_t workspace_bytes, void *stream);

/* ------------------------------------------------------------------------------------------------------- apply_rope */

/* Rotary embedding in place: pair i of a head turns by the f32 angle positions[t] * theta^(-2i/D), i in [0, D/2). The
 * pair is (x[i], x[i + D/2]) for half-split (transformers checkpoints) and (x[2i], x[2i+1]) for interleaved (Mistral's
 * consolidated checkpoints): (a, b) -> (a cos - b sin, a sin + b cos), f32, one rounding (Su et al., RoFormer, eq. 34). */
typedef struct mixtral_apply_rope_params {
  size_t struct_size;       /* sizeof(mixtral_apply_rope_params) */
  mixtral_tensor q;         /* in place [T, Hq, D] f32, bf16 or f16; any token and head stride */
  mixtral_tensor k;         /* optional, in place [T, Hk, D], dtype of q; any token and head stride */
  mixtral_tensor positions; /* [T] i32 or i64, 0 <= position < 2^31 (CUDA: other positions leave the token unchanged) */
  double theta;             /* 1e-30 to 1e30 */
  int32_t interleaved;      /* 0: half-split, else interleaved */
  int32_t reserved;         /* 0 */
} mixtral_apply_rope_params;

MIXTRAL_API size_t mixtral_apply_rope_workspace_size(const mixtral_context *context, const mixtral_apply_rope_params *params);
MIXTRAL_API mixtral_status mixtral_apply_rope(const mixtral_context *context, const mixtral_apply_rope_params *params,
                                              void *workspace, size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* MIXTRAL_EXT_H */
