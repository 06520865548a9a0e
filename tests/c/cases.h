/* What the C tests share: memory, one valid call of every op, and a table that says what each argument may be. */
#ifndef CASES_H
#define CASES_H
#include <mixtral_ext.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { F32 = MIXTRAL_DTYPE_F32, BF16 = MIXTRAL_DTYPE_BF16, I32 = MIXTRAL_DTYPE_I32, I64 = MIXTRAL_DTYPE_I64 };

/* Sizes of the valid calls. */
enum { T = 5, E = 4, K = 2, S = T * K, H = 24, I = 40, HQ = 4, HK = 2, D = 64, W = 3,
       PACKED_B = 3, TQ = 8, TK = 11, B = 2, SQ = 3, SK = 6, SLOTS = 3, C = 8, NEW = 6 };

extern int failures;
#define EXPECT(condition, ...) \
  ((condition) ? (void)0 : (void)(++failures, fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr)))

/* All arrays of a call lie in one block, so "nothing was written" is one comparison. */
extern unsigned char arena[1 << 18];
void arena_reset(void);
mixtral_tensor array(int32_t dtype, int ndim, int64_t d0, int64_t d1, int64_t d2, int64_t d3); /* poisoned */
mixtral_tensor numbers(int ndim, int64_t d0, int64_t d1, int64_t d2, int64_t d3);              /* f32 in [-1, 1) */
mixtral_tensor integers(int64_t count, const int32_t *values);                                 /* i32 [count] */
mixtral_context *cpu_context(mixtral_parallel_for parallel_for, void *pool);

/* What each argument may be. */
typedef enum { FLOATS, ONLY_F32, ONLY_I32, IDS } types;         /* f32/bf16/f16; f32; i32; i32 or i64 */
typedef enum { STRIDED, OUTPUT, CONTIGUOUS } layout;            /* as the header words them */
typedef struct {
  const char *name;
  size_t offset;
  types type;
  layout layout;
  int optional;
  /* Which argument the message names when dimension i grows by one: "" itself, NULL nobody (the size is free). */
  const char *blame[4];
} argument;

#define MAX_ARGUMENTS 11
typedef struct {
  const char *label; /* "attention_packed" */
  const char *name;  /* "mixtral_sliding_window_attention" */
  mixtral_op op;
  size_t params_bytes;
  void (*make)(void *params); /* a valid call on fresh arrays; resets the arena */
  argument arguments[MAX_ARGUMENTS];
  size_t (*workspace_size)(const mixtral_context *context, const void *params);
  mixtral_status (*run)(const mixtral_context *context, const void *params, void *workspace, size_t bytes, void *stream);
} op_case;

#define OP_CASES 12
extern const op_case op_cases[OP_CASES];
const op_case *find_case(const char *label);

/* Runs a case with a poisoned workspace of exactly the size asked for. */
mixtral_status run_case(const op_case *c, const mixtral_context *context, const void *params);

/* The parts of the program. */
void test_routing_and_gemm_values(const mixtral_context *context);
void test_attention_values(const mixtral_context *context);
void test_bad_arguments(const mixtral_context *context);
#endif
