/* SPDX-License-Identifier: Apache-2.0
 *
 * Octolora: int8 linear layers with live LoRA adapters.
 *
 *     y[M,N] = residual + gate * activation(base(x) + bias + sum_i c_i * (x . A_i^T) . B_i^T)
 *
 *   W8A8   base(x)[m,n] = s_x[m] * s_w[n] * sum_k q(x)[m,k] * W[n,k]      (int8 x int8, exact int32 sum)
 *          with outlier columns O:  k in O leaves the int8 sum and is added as  s_w[n] * sum_{k in O} x[m,k] * W[n,k]
 *   W8A16  base(x)[m,n] = s_w[n] * sum_k x[m,k] * W[n,k]                  (int8 widened in registers)
 *          with block scales d:     s_w[n] * sum_b d[n,b] * sum_{k in block b} x[m,k] * W[n,k]
 *
 * Activation, residual [M,N] and gate [N] are optional, and linears that read the same x (q, k and v; gate and up) may
 * share one call. The adapter branch always reads the unquantized x. Every sum but the int32 one, and all that follows
 * it, is kept in fp32; y is rounded once.
 *
 * Conventions
 *   - Matrices are row-major and dense. W [N,K], A [rank,K], B [N,rank], x [M,K], y [M,N].
 *   - Every function returns a status; octolora_last_error() tells the argument and the numbers. No exception, no C++
 *     type, no global state crosses this header.
 *   - "Device pointer" means memory of the device the object lives on: CUDA memory, or plain host memory for the CPU.
 *     Pointers need the alignment of their element type and no more. 16-byte alignment of x, y and of their rows
 *     (K and N multiples of 8 for 16-bit types) is faster.
 *   - A call that takes a stream enqueues and returns. On the CPU device the stream must be NULL and the work is done
 *     on return. Objects may be used from several threads at once; what writes an object (octolora_slots_*,
 *     octolora_linear_write) must not race with calls that read it, except through the order of one stream.
 *   - destroy functions take NULL, wait for the work already enqueued on the object's device, and free. A captured
 *     graph must not outlive the objects it captured.
 */
#ifndef OCTOLORA_OCTOLORA_H
#define OCTOLORA_OCTOLORA_H

#include <stddef.h>
#include <stdint.h>

#if defined(OCTOLORA_BUILDING)
#define OCTOLORA_API __attribute__((visibility("default")))
#else
#define OCTOLORA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a signature, a struct or the meaning of a value does. Compare with octolora_abi_version(). */
#define OCTOLORA_ABI_VERSION 3

/* ---- Status ------------------------------------------------------------------------------------------------------ */

typedef int32_t octolora_status;
#define OCTOLORA_OK 0
#define OCTOLORA_INVALID_ARGUMENT 1    /* a null pointer, a shape or a value outside what the call documents */
#define OCTOLORA_OUT_OF_MEMORY 2       /* host or device; nothing was kept */
#define OCTOLORA_NO_DEVICE 3           /* no CUDA driver, driver too old, no such ordinal, built without CUDA */
#define OCTOLORA_UNSUPPORTED 4         /* valid, but not something this device or build does */
#define OCTOLORA_CUDA_ERROR 5          /* a CUDA call failed; the message has its name and place */
#define OCTOLORA_WORKSPACE_TOO_SMALL 6 /* fewer bytes than octolora_forward_workspace() asks for */
#define OCTOLORA_INTERNAL 7            /* a defect of this library */

/* The last failure of the calling thread: what was wrong, its value, what was allowed. Never NULL; valid until the
 * thread's next failing call. */
OCTOLORA_API const char* octolora_last_error(void);
/* "OCTOLORA_OUT_OF_MEMORY" and so on; "unknown status" for other values. Static. */
OCTOLORA_API const char* octolora_status_name(octolora_status status);
/* OCTOLORA_ABI_VERSION as the library was built. */
OCTOLORA_API uint32_t octolora_abi_version(void);
/* "0.1.0 (cuda 13.0: sm_80 sm_90a ...)" or "0.1.0 (cpu only: built without nvcc)". Static. */
OCTOLORA_API const char* octolora_version(void);

/* ---- Element types ----------------------------------------------------------------------------------------------- */

#define OCTOLORA_FLOAT32 0
#define OCTOLORA_FLOAT16 1
#define OCTOLORA_BFLOAT16 2

/* ---- Device ------------------------------------------------------------------------------------------------------ */

typedef struct octolora_device octolora_device;
/* cudaStream_t or CUstream, without CUDA's headers. NULL is the legacy default stream. */
struct CUstream_st;
typedef struct CUstream_st* octolora_stream;

#define OCTOLORA_CPU (-1)

typedef struct octolora_device_info {
  uint32_t struct_size;       /* in: sizeof as the caller compiled it */
  int32_t ordinal;            /* CUDA ordinal, or OCTOLORA_CPU */
  int32_t compute_capability; /* 90 for 9.0; 0 on the CPU */
  int32_t units;              /* multiprocessors; threads on the CPU */
  uint64_t memory_bytes;      /* total memory of the device; 0 when unknown */
  char name[128];             /* "NVIDIA H200", "AMD EPYC ..." */
  char kernels[32];           /* "wgmma s8, mma.sync s8", "mma.sync s8", "avx512-vnni", "avx2", "portable" */
} octolora_device_info;

/* count: usable CUDA devices. Without one: OCTOLORA_NO_DEVICE, count 0, and octolora_last_error() says why. */
OCTOLORA_API octolora_status octolora_cuda_device_count(int32_t* count);
/* ordinal: OCTOLORA_CPU or a CUDA ordinal. The CPU device takes its instruction set from the processor, or from the
 * environment variable OCTOLORA_CPU_ISA (avx512-vnni, avx2, portable) where that is lower. */
OCTOLORA_API octolora_status octolora_device_create(int32_t ordinal, octolora_device** device);
OCTOLORA_API void octolora_device_destroy(octolora_device* device);
OCTOLORA_API octolora_status octolora_device_get_info(const octolora_device* device, octolora_device_info* info);
/* Threads the CPU device may use in a call, the caller's included: 1 to 1024; default OCTOLORA_NUM_THREADS or the
 * processors this process may run on. OCTOLORA_UNSUPPORTED on CUDA. */
OCTOLORA_API octolora_status octolora_device_set_threads(octolora_device* device, int32_t threads);
/* bytes: what this library holds on the device now, through every object made on this handle. */
OCTOLORA_API octolora_status octolora_device_memory_in_use(const octolora_device* device, uint64_t* bytes);

/* Memory and streams for callers that have no CUDA runtime of their own. bytes 0 gives a non-NULL pointer. */
OCTOLORA_API octolora_status octolora_device_alloc(octolora_device* device, size_t bytes, void** memory);
OCTOLORA_API octolora_status octolora_device_free(octolora_device* device, void* memory);
/* Host memory that the device reads at full speed and copies from without waiting (pinned); on the CPU any memory. It
 * is not counted by octolora_device_memory_in_use. bytes 0 gives a non-NULL pointer. */
OCTOLORA_API octolora_status octolora_host_alloc(octolora_device* device, size_t bytes, void** memory);
OCTOLORA_API octolora_status octolora_host_free(octolora_device* device, void* memory);
/* Host to device, device to host or within the device, told apart by the addresses; ordered on the stream. A copy from
 * or to pageable host memory may wait for the stream. */
OCTOLORA_API octolora_status octolora_device_copy(octolora_device* device, void* to, const void* from, size_t bytes,
                                                  octolora_stream stream);
OCTOLORA_API octolora_status octolora_stream_create(octolora_device* device, octolora_stream* stream);
OCTOLORA_API octolora_status octolora_stream_destroy(octolora_device* device, octolora_stream stream);
/* Waits for all work enqueued on the stream and reports its errors. */
OCTOLORA_API octolora_status octolora_stream_synchronize(octolora_device* device, octolora_stream stream);
/* The same for all streams of the device, whoever made them. */
OCTOLORA_API octolora_status octolora_device_synchronize(octolora_device* device);

/* ---- Linear ------------------------------------------------------------------------------------------------------ */

typedef struct octolora_linear octolora_linear; /* weights of one layer on one device; its description never changes */

#define OCTOLORA_W8A16 0        /* x as it is */
#define OCTOLORA_W8A8_DYNAMIC 1 /* one scale a row of x, from the row's absolute maximum */
#define OCTOLORA_W8A8_STATIC 2  /* one given scale for all of x */

#define OCTOLORA_MAX_K 131071 /* up to here 128 * 128 * K fits an int32 */

/* Read once, at creation; the caller may free it and the arrays it names on return. */
typedef struct octolora_linear_desc {
  uint32_t struct_size; /* sizeof as the caller compiled it; new fields come at the end */
  int32_t n, k;         /* W [n,k]; n >= 1, 1 <= k <= OCTOLORA_MAX_K */
  int32_t mode;         /* OCTOLORA_W8A16, OCTOLORA_W8A8_DYNAMIC, OCTOLORA_W8A8_STATIC */
  int32_t scale_count;  /* n: one scale an output channel; 1: one for the tensor */
  /* W8A8: OCTOLORA_FLOAT16 rounds x to fp16 before anything is measured or quantized, as bitsandbytes does;
   * OCTOLORA_FLOAT32 takes x as it is. Neither touches the adapter branch nor the outlier product. */
  int32_t round_x;
  float x_scale; /* W8A8_STATIC: > 0; q = clamp(rne(x / x_scale), -128, 127), s_x = x_scale */
  /* W8A8_DYNAMIC: q = clamp(rne(x * (x_divisor / a)), -128, 127), s_x = a / x_divisor, a the row's absolute maximum,
   * division and product rounded to fp32. 127 (bitsandbytes, Quanto, ComfyUI) or 127.5 (torchao); 0 means 127. A row of
   * zeros gives q = 0 and s_x = 0. */
  float x_divisor;
  /* W8A8_DYNAMIC: t > 0 takes every column k in which some |x[m,k]| >= t out of the int8 sum and multiplies it
   * unquantized; a[m] is then the maximum over the elements below t (bitsandbytes LLM.int8(), threshold 6). 0: off. */
  float outlier_threshold;
  const int8_t* weight; /* [n,k], host or device; NULL: zeros until octolora_linear_write() */
  const float* scale;   /* [scale_count], host; s_w, so that the real weight is s_w * W */
  const float* bias;    /* [n], host, or NULL */
  /* W8A16: 0, or a multiple of 32: input columns that share a scale beside s_w. Block b of a row is columns
   * b * scale_block and on, the last as short as k makes it, and the real weight is s_w[n] * d[n,b] * W[n,k]. GGUF's
   * Q8_0 has blocks of 32, and no s_w: a scale of 1 for the tensor. */
  int32_t scale_block;
  const uint16_t* block_scale; /* fp16 [n, ceil(k / scale_block)], host; d. NULL without blocks */
} octolora_linear_desc;

OCTOLORA_API octolora_status octolora_linear_create(octolora_device* device, const octolora_linear_desc* desc,
                                                    octolora_linear** linear);
OCTOLORA_API void octolora_linear_destroy(octolora_linear* linear);
/* Replaces rows first_row .. first_row + rows - 1 of W, for weights that do not lie in one piece of memory.
 * weight [rows,k], host or device. Waits until it is done. */
OCTOLORA_API octolora_status octolora_linear_write(octolora_linear* linear, int32_t first_row, int32_t rows,
                                                   const int8_t* weight);

/* ---- Adapters ---------------------------------------------------------------------------------------------------- */

/* Low-rank storage of fixed capacity beside one linear. Filling a slot, changing its scale or clearing it is work on a
 * stream, not an allocation: a graph captured earlier replays with what the slots hold then. */
typedef struct octolora_slots octolora_slots;

#define OCTOLORA_LORA_16BIT 0 /* A and B as one 16-bit number each */
#define OCTOLORA_LORA_SPLIT \
  1 /* A, B and x.A^T as sums of two 16-bit numbers: about 16 more bits, 2 to 3 times the cost */
#define OCTOLORA_LORA_MAGNITUDES \
  2 /* added to either for octolora_slots_create: adapters may have magnitudes, for more memory a slot */

#define OCTOLORA_MAX_RANK 4096

/* 16-bit factors are kept as they are. fp32 factors that a 16-bit type holds exactly are kept in it; others become fp16
 * times a power of two for each factor.
 *
 * With a magnitude m (DoRA) the rows of W + scale * B.A are brought to the lengths m. As in PEFT, adapters apply in the
 * order of their slots, each to what those before it made of the base, where s_w * W stands for the real weight:
 *     y' = g * (y + scale * (x.A^T).B^T)      g[n] = m[n] / |row n of s_w * W + scale * B.A|      before the bias
 * It has no bias of its own; a scale of 0 leaves y' = m / |row of W| * y, clearing the slot leaves y. B times the g of
 * its own and of all later slots is kept in B's 16-bit type, which it must not overflow. */
typedef struct octolora_adapter_desc {
  uint32_t struct_size; /* sizeof as the caller compiled it; new fields come at the end */
  int32_t rank;         /* 1 to the slot's capacity */
  int32_t a_dtype;      /* OCTOLORA_FLOAT32, OCTOLORA_FLOAT16, OCTOLORA_BFLOAT16 */
  int32_t b_dtype;
  int32_t precision; /* OCTOLORA_LORA_16BIT, or OCTOLORA_LORA_SPLIT where the slots were made for it */
  int32_t b_stride;  /* elements from one row of B to the next; 0 means rank */
  const void* a;     /* [rank,k], host or device */
  const void* b;     /* [n,rank], host or device */
  const float* bias; /* [n], host or device, or NULL: added as scale * bias (PEFT's lora_bias) */
  /* [n], host or device, or NULL: not DoRA. Only in slots made with OCTOLORA_LORA_MAGNITUDES. */
  const float* magnitude;
} octolora_adapter_desc;

/* slot_count >= 0 slots; slot i takes adapters up to rank capacity[i] (1 to OCTOLORA_MAX_RANK), all with a bias if they
 * like. precision is the highest that a slot may be asked for. Every slot starts empty. */
OCTOLORA_API octolora_status octolora_slots_create(octolora_linear* linear, int32_t slot_count, const int32_t* capacity,
                                                   int32_t precision, octolora_slots** slots);
OCTOLORA_API void octolora_slots_destroy(octolora_slots* slots);
/* Fills a slot: y += scale * ((x.A^T).B^T + bias). scale is any finite number.
 * What lies in device memory or in pinned host memory (octolora_host_alloc, cudaMallocHost) is read by the device when
 * the stream comes to it, so the call returns at once and may be captured in a CUDA graph, whose replays read it anew;
 * the caller keeps it as it is until then. Pageable host memory is read before the call returns, which may wait for the
 * stream, and is refused during a capture. set_scale, clear and refresh may always be captured. */
OCTOLORA_API octolora_status octolora_slots_set(octolora_slots* slots, int32_t slot,
                                                const octolora_adapter_desc* adapter, float scale,
                                                octolora_stream stream);
/* One slot of one linear's slots, for octolora_slots_set_many. */
typedef struct octolora_slot_fill {
  uint32_t struct_size; /* sizeof as the caller compiled it; new fields come at the end */
  int32_t slot;
  octolora_slots* slots;
  const octolora_adapter_desc* adapter;
  float scale;
} octolora_slot_fill;
/* octolora_slots_set for each of `count` fills in their order, all of one device: an adapter of a whole model in a few
 * launches. Every description is checked before anything is enqueued. */
OCTOLORA_API octolora_status octolora_slots_set_many(const octolora_slot_fill* fills, int32_t count,
                                                     octolora_stream stream);
OCTOLORA_API octolora_status octolora_slots_set_scale(octolora_slots* slots, int32_t slot, float scale,
                                                      octolora_stream stream);
OCTOLORA_API octolora_status octolora_slots_clear(octolora_slots* slots, int32_t slot, octolora_stream stream);
/* scales: the slots' scales, [slot_count] in memory of the device, for as long as the slots live. Work on the stream
 * may write them in place of octolora_slots_set_scale; a forward reads them when it runs. Slots with magnitudes then
 * need octolora_slots_refresh, since g depends on the scale. */
OCTOLORA_API octolora_status octolora_slots_scales(octolora_slots* slots, float** scales);
/* Brings what depends on scales and weights up to date, after either was written behind the slots' back (the scales by
 * the caller's kernels, the weights by octolora_linear_write). Of use for slots with magnitudes alone. */
OCTOLORA_API octolora_status octolora_slots_refresh(octolora_slots* slots, octolora_stream stream);

/* ---- Forward ----------------------------------------------------------------------------------------------------- */

#define OCTOLORA_ACTIVATION_NONE 0
#define OCTOLORA_ACTIVATION_GELU_TANH 1 /* v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 v^3))) */
#define OCTOLORA_ACTIVATION_GELU_ERF 2  /* v / 2 * (1 + erf(v / sqrt(2))) */
#define OCTOLORA_ACTIVATION_SILU 3      /* v / (1 + exp(-v)) */

#define OCTOLORA_MAX_OUTPUTS 8

/* One linear of a forward and where its result goes: y = residual + gate * activation(linear(x)). */
typedef struct octolora_output {
  uint32_t struct_size;          /* sizeof as the caller compiled it; new fields come at the end */
  int32_t activation;            /* OCTOLORA_ACTIVATION_... */
  const octolora_linear* linear; /* n is its own; device, k, mode and all that quantizes x are those of the others */
  const octolora_slots* slots;   /* of this linear; NULL: no adapters */
  void* y;                       /* [rows,n], device */
  /* [rows,n] of y's type, device, or NULL: nothing is added. May be y itself. */
  const void* residual;
  const void* gate; /* [n] of y's type, device, or NULL: 1 */
} octolora_output;

typedef struct octolora_forward_desc {
  uint32_t struct_size; /* sizeof as the caller compiled it; new fields come at the end */
  int32_t rows;         /* 0 or more */
  const void* x;        /* [rows,k], device */
  int32_t x_dtype, y_dtype;
  /* [rows], device, or NULL: every filled slot is added to every row. Else the one slot that a row uses, in each output
   * by its number; a number that an output has no filled slot for, such as -1, adds nothing there, and a row to which
   * no output adds anything has the bits it would have without adapters. OCTOLORA_UNSUPPORTED with slots that were made
   * with OCTOLORA_LORA_MAGNITUDES, whose adapters change the base itself. */
  const int32_t* row_slot;
  const octolora_output* outputs; /* [output_count], host; read before the call returns */
  int32_t output_count;           /* 1 to OCTOLORA_MAX_OUTPUTS */
  void* workspace;                /* device, 256-byte aligned (what cudaMalloc and octolora_device_alloc give) */
  size_t workspace_bytes;
} octolora_forward_desc;

/* bytes: scratch that a forward of this description, or the same with fewer rows, needs on the device. Reads
 * output_count, the outputs' linear and slots, rows and x_dtype: no pointer to data, and for every alignment of it. */
OCTOLORA_API octolora_status octolora_forward_workspace(const octolora_forward_desc* desc, size_t* bytes);
/* Quantizes x once and multiplies it by every output's linear and adapters. No two of x, the y and the workspace
 * overlap, and a residual or a gate overlaps a y only where it is that residual's own y. Enqueues and returns:
 * allocates nothing, waits for nothing, may be captured in a CUDA graph. Two forwards that may run at the same time
 * need two workspaces. The same call on the same device gives the same bits. A NaN or an infinity in x makes its own
 * row of every y NaN or infinite and no other. */
OCTOLORA_API octolora_status octolora_forward(const octolora_forward_desc* desc, octolora_stream stream);

/* text: how such a forward would run, for people: one line for each launch with its kernel and tile, why this kernel,
 * and what was passed over; lines end with a newline. At most size - 1 bytes, closed with a zero; size >= 1. Reads the
 * description as octolora_forward does, alignment of the pointers included, but nothing that they point to. */
OCTOLORA_API octolora_status octolora_forward_explain(const octolora_forward_desc* desc, char* text, size_t size);

/* One linear with every filled slot added, and nothing after it: octolora_forward_workspace and octolora_forward for
 * the plain case. slots NULL: no adapters. */
OCTOLORA_API octolora_status octolora_linear_workspace(const octolora_linear* linear, const octolora_slots* slots,
                                                       int32_t rows, int32_t x_dtype, size_t* bytes);
OCTOLORA_API octolora_status octolora_linear_forward(const octolora_linear* linear, const octolora_slots* slots,
                                                     const void* x, int32_t x_dtype, void* y, int32_t y_dtype,
                                                     int32_t rows, void* workspace, size_t workspace_bytes,
                                                     octolora_stream stream);

/* The same product for tests and for tools that judge a result: the int32 sums of a W8A8 linear before any scale.
 * sums [rows,n] int32 and codes [rows,k] int8 are device pointers and may each be NULL; row_scale [rows] float is s_x.
 * Columns taken out by the outlier rule are 0 in codes. octolora_linear_workspace() without slots says what workspace
 * it needs. OCTOLORA_UNSUPPORTED for W8A16. */
OCTOLORA_API octolora_status octolora_linear_quantized(const octolora_linear* linear, const void* x, int32_t x_dtype,
                                                       int32_t* sums, int8_t* codes, float* row_scale, int32_t rows,
                                                       void* workspace, size_t workspace_bytes, octolora_stream stream);

#ifdef __cplusplus
}
#endif
#endif
