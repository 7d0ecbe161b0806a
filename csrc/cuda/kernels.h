// What ops.cpp (checks, registration) and the .cu files (kernels, launches) have in common. Plain C++ without torch and
// CUDA.
//
// Tensors are contiguous; N tokens, D hidden, V vocabulary. Each function queues its kernels on a stream of the current
// device and throws std::runtime_error, with the kernel's name, where a launch is refused.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace fused_losses::cuda {

using Stream = CUstream_st*;

enum class Element { Float32, BFloat16, Float16 };

// Longest segment that segment_product sums in one piece. SPLIT of fused_losses/kernels/schemas.py is the same number.
constexpr int64_t SPLIT = 512;

// The rows of the tensor `rows` [9, N], as in fused_losses/kernels/schemas.py.
enum Row { TOP, LOG_SUM, REF_TOP, REF_LOG_SUM, SHIFT, REST, GAP, GAP_L1, MISSED, ROWS };

// The rows of the tensor `kept` [4, N], likewise.
enum KeptRow { KEPT, KEPT_GAP, KEPT_GAP_L1, KEPT_GAP_L1_OF_TOTALS, KEPTS };

struct RowStatistics {
  int64_t tokens, vocabulary;
  const float *z, *r;  // [N, V]; r null: no reference
  bool difference;
  const int64_t* labels;
  float scale, softcap, reference_scale, reference_softcap;
  float* nll;
  int64_t* prediction;
  float *kl, *entropy, *reference_nll, *reference_entropy;  // null: not wanted
  float* rows;                                              // [9, N]
};
void row_statistics(const RowStatistics&, Stream);

// bits [N, words]: bit j of word w is column 32 · w + j
void count_bits(const uint32_t* bits, int64_t tokens, int64_t words, const int64_t* labels, int64_t capacity,
                int64_t* counts, Stream);
void columns_of_bits(const uint32_t* bits, int64_t tokens, int64_t words, const int64_t* labels,
                     const int64_t* offsets, int32_t* columns, Stream);

struct EntryLogits {
  int64_t tokens, width;        // N, D
  const void *hidden, *weight;  // [N, D], [V, D] of one element type
  const float* bias;            // [V] or null
  const int64_t* offsets;       // [N + 1]
  const int32_t* columns;       // [entries]
  float* out;                   // [entries]
};
void entry_logits(const EntryLogits&, Element, Stream);

struct Attention {
  int64_t tokens, width;
  const void *hidden, *difference, *weight;  // difference null: no reference, or one with a head of its own
  const float *entry_reference, *bias;       // [entries], [V]; null: none
  const int64_t *labels, *offsets;
  const int32_t* columns;
  const float *rows, *nll;  // [9, N], [N]
  float scale, softcap;
  float *nll_values, *kl_values;  // [entries]
  float* kept;                    // [4, N]
  void *nll_rows, *kl_rows;       // [N, D] or null
  bool rows_in_float;             // they are float32, else of the weight's type
};
void attention(const Attention&, Element, Stream);

struct SegmentProduct {
  int64_t segments, width;
  const int64_t* offsets;  // [segments + 1]
  const int32_t* columns;  // [entries]
  const float* values;     // [entries]
  const void* matrix;      // [M, D]
  const float *scale, *vector, *base;  // [segments], [D], [segments, D] or null
  float base_scale;
  int64_t hot_segments, slots;
  const int64_t *hot, *hot_first;  // [hot_segments], [hot_segments + 1]
  float* partial;                  // [slots, D]
  void* out;                       // [segments, D]
};
void segment_product(const SegmentProduct&, Element matrix, Element out, Stream);

}  // namespace fused_losses::cuda
