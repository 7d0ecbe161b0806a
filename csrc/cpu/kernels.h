// What the registration in ops.cpp and the kernels, compiled once per instruction set, have in common.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace fused_losses {

// Uninitialised memory that begins on a line of the cache.
template <class T>
struct Aligned {
  explicit Aligned(int64_t count) : data((T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) {
    if (!data) throw std::bad_alloc();
  }
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  T* data;
};

// Has the system give all pages of memory that was just allocated and will be filled, where it can do that at once
// (Linux 5.14): in three quarters of the time that single page faults take. Below FRESH_BYTES allocators keep memory, and
// its pages are there.
void fault_in(void* data, int64_t bytes);
constexpr int64_t FRESH_BYTES = 32 << 20;

// Before other threads read what was written by `stream` of vector.inc.
inline void end_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

enum class Element { Float32, BFloat16 };

// From the bits of a bfloat16.
inline float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Logits of one chunk and what `compact` makes of them. N tokens here are the chunk's; row-major, contiguous.
struct Chunk {
  int64_t vocabulary;
  float* z;                 // [N, V] logits; with `difference`, logits minus r
  float* r;                 // [N, V] logits of the reference, or null
  bool difference;
  const int64_t* labels;    // [N]
  float softcap;            // 0: none. Only for the slope 1 − (z/softcap)²; the logits are capped already
};

struct RowResults {
  // [N] each; the pointers of the reference's are null without r, the entropies' where not wanted
  float *nll, *kl, *entropy, *reference_nll, *reference_entropy;
  int64_t* prediction;
  // Entries are logits above `bound` or r above `reference_bound`, and the label's.
  float *bound, *reference_bound, *log_sum;
  float *tail, *nll_l1, *kl_tail, *kl_tail_l1, *kl_l1;
  int64_t* counts;          // entries of the row, −1 where there are more than capacity
};

struct RowEntries {
  int64_t capacity;
  float threshold;          // entries have p > threshold · √(1 − p[label])
  int32_t* columns;         // [N, capacity]
  float *nll, *kl;          // [N, capacity] ∂nll/∂z and ∂kl/∂z there
};

// What the entries leave out, in directions of the head. `matrix` null: not wanted.
struct RowDirections {
  int64_t width;            // K, a multiple of 16
  const void* matrix;       // [V, K]
  Element element;
  float *nll, *kl;          // [N, K] Σ_v of what is left out of ∂nll/∂z (∂kl/∂z) · matrix[v]
  float *nll_square, *kl_square;  // [N] Σ of its squares
  const uint16_t* pairs;    // its rows v and v + 16 of each 32 beside each other, [⌈V / 32⌉ · 16, K, 2]; or null
};

// What logits are where they are computed again from operands that are not rounded: softcap · tanh(scale / softcap ·
// (hidden · weight + low_hidden · low_rank + bias)), with `difference` of z scale · (hidden · weight + low_hidden ·
// low_rank).
struct Operands {
  const float *hidden, *reference;  // [N, D] of z and of r; null without r
  const void* weight;               // [V, D]
  Element element;
  int64_t dim;
  const float *low_rank, *low_hidden, *low_reference;  // [V, R], [N, R] and [N, R], or null
  int64_t rank;
  const float* bias;                // [V] or null
  float scale, softcap;             // 0: no soft-cap
};

// Statistics of the exact mode, [N] each; null where not wanted. Those of the reference need r, `divergence` also beta.
struct ExactResults {
  float* nll;
  int64_t* prediction;
  float *lse, *kl, *entropy, *reference_nll, *reference_entropy, *log_p2;
  int64_t* rank;
  float *divergence, *rows;  // rows: [8, stride], what the directions need; see fused_losses/kernels/schemas.py
  int64_t stride;
};

// Factors of the directions, [N] each; null: 0.
struct ExactWeights {
  const float *nll, *kl, *entropy, *divergence, *label;
};

struct Sparse {
  int64_t rows, columns_count, hidden;
  const int64_t* offsets;   // [rows + 1]
  const int32_t* columns;   // [nnz] ascending in each row
  const float* values;      // [nnz]
};

// Rows of the weight that are quantised together, for `int8_logits`.
constexpr int64_t INT8_VOCABULARY = 128;

// Logits of one chunk in float16, less `offset_of` the label's. For AVX-512 and AVX2.
constexpr int64_t HALF_MAXIMA = 8;  // of a block of INT8_VOCABULARY ids: the largest of those with the same id modulo it
constexpr float HALF_MOST = 60000;
struct HalfChunk {
  int64_t vocabulary;
  uint16_t *z, *largest;      // [N, padded()], −∞ beyond the vocabulary; [N, maxima()]
  const float* label_logits;  // [N]
  const int64_t* labels;      // [N]

  int64_t blocks() const { return (vocabulary + INT8_VOCABULARY - 1) / INT8_VOCABULARY; }
  int64_t padded() const { return blocks() * INT8_VOCABULARY; }
  int64_t maxima() const { return (blocks() + 1) / 2 * 2 * HALF_MAXIMA; }
};
// Near the logits that count. Where the label is ruled out its logit is not.
inline float offset_of(float label_logit) { return label_logit > -1e4f && label_logit < 1e4f ? label_logit : 0; }
struct HalfBlock {
  alignas(64) float scales[INT8_VOCABULARY], rest[INT8_VOCABULARY], bias[INT8_VOCABULARY];
  int64_t ids;
  bool has_bias;
};

// So many tokens take `few_products`, in float32 twice as many. Measured (V = 49,152, D = 2048): 8 tokens in 18 ms in the
// place of 36, in bfloat16 in 10 in the place of 19.
constexpr int64_t FEW_TOKENS = 8;

// A large number of a direction, and what rounding it to bfloat16 takes. A row has MOST_LARGE of them, or none.
constexpr int64_t MOST_LARGE = 64;
struct Large {
  int32_t token, id;
  float rest;
};

using Range = void (*)(int64_t begin, int64_t end, const void* context);

// One table per instruction set; `kernels()` picks the best that this processor runs.
struct Kernels {
  const char* name;
  // With `operands` the chunk's logits are from 8-bit products, and written where they are computed again.
  void (*compact)(const Chunk&, const RowResults&, const RowEntries&, const RowDirections&, const Operands* operands,
                  int64_t begin, int64_t end);
  void (*tail_profile)(const Chunk&, const float* bound, const float* reference_bound, const float* log_sum,
                       const int64_t* rows, int64_t row_count, float* profile, int64_t begin, int64_t end);
  void (*exact_statistics)(const Chunk&, double beta, const ExactResults&, int64_t begin, int64_t end);
  void (*exact_directions)(const Chunk&, double beta, const float* nll, const float* rows, int64_t stride,
                           const ExactWeights&, float* out, int64_t begin, int64_t end);
  // out[t] = Σ values · matrix[column] + scale[t] · vector, for rows [begin, end)
  void (*rows_product)(const Sparse&, const void* matrix, Element, const float* scale, const float* vector, void* out,
                       Element out_element, int64_t begin, int64_t end);
  // out[v] = base_scale · base[v] + Σ values · matrix[row] + scale[v] · vector, for columns [begin, end)
  void (*columns_product)(int64_t hidden, const int64_t* offsets, const int32_t* rows, const float* values,
                          const void* matrix, Element, const float* scale, const float* vector, const float* base,
                          float base_scale, void* out, Element out_element, int64_t begin, int64_t end);
  // partial[hidden] += Σ_v scale[v] · matrix[v], for v in [begin, end)
  void (*weighted_sum)(int64_t hidden, const void* matrix, Element, const float* scale, float* partial, int64_t begin,
                       int64_t end);
  // out[t, v] = tokens[t] · matrix[v] + bias[v], for v in [begin, end). Rows of tokens go on with zeros to a multiple of
  // FEW_TOKENS.
  void (*few_products)(const float* tokens, int64_t count, const void* matrix, Element, int64_t rows, int64_t hidden,
                       const float* bias, float* out, int64_t begin, int64_t end);
  // See quantize.inc.
  void (*quantize_tokens)(const void* hidden, Element, const float* channel, const float* mean, int64_t count,
                          int64_t hidden_size, int64_t padded, uint8_t* out, float* scales, float* lost);
  void (*quantize_weight)(const void* weight, Element, const float* channel, int64_t rows, int64_t hidden_size,
                          int64_t padded, uint8_t* out, float* scales, int32_t* sums);
  void (*scales_of_weight)(const void* weight, Element, const float* channel, int64_t hidden_size, float* scales,
                           int64_t begin, int64_t end);
  void (*multiply_int8)(const uint8_t* tokens, const uint8_t* weight, int64_t count, int64_t padded, int32_t* products);
  void (*scale_products)(const int32_t* products, const int32_t* sums, float scale, float shift, const float* scales,
                         const float* bias, int64_t count, float* out);
  // See half.inc and quantize.inc; null where there is none.
  void (*compact_half)(const HalfChunk&, const RowResults&, const RowEntries&, const RowDirections&, const Operands&,
                       int64_t begin, int64_t end);
  void (*half_tail_profile)(const HalfChunk&, const float* lse, const int64_t* rows, int64_t row_count, float* profile,
                            int64_t begin, int64_t end);
  void (*half_products)(const int32_t* products, const HalfBlock&, const float* token_scales, const float* shifts,
                        int64_t tokens, float factor, const HalfChunk&, int64_t first_token, int64_t block);
  // See entries.inc.
  void (*scale_entries)(const int64_t* offsets, const void* values, bool half, float scale, const float* factor, float* out,
                        int64_t begin, int64_t end);
  void (*halve_entries)(const int64_t* offsets, const float* values, float half_scale, uint16_t* out, float* scales,
                        float* l1, float* l2, int64_t begin, int64_t end);
  void (*label_logits)(const Operands&, const int64_t* labels, float* out, int64_t begin, int64_t end);
  // See bf16.inc; null where the processor has no products of bfloat16 numbers.
  float (*large_from)(const float* row, int64_t count);
  Large* (*transposed_bf16)(const float* from, int64_t stride, int64_t tokens, int64_t ids, const float* large_from,
                            uint16_t* out, int64_t depth, Large* large);
  Large* (*narrow_bf16)(const float* from, int64_t count, int64_t first, float large_from, uint16_t* out, float* lost,
                        Large* large);

  bool has_pairs() const { return transposed_bf16; }
};

const Kernels& kernels();

// out[t, v] = hidden[t] · weight[v] + bias[v] in float32, by oneDNN's micro-kernels that PyTorch exports. False where
// they are missing; then nothing was written.
bool logits(const void* hidden, const void* weight, Element, const float* bias, float* out, int64_t tokens,
            int64_t vocabulary, int64_t hidden_size);

// The products of a chunk's directions, rounded to bfloat16 but for large numbers, of which the matrices are, with sums in
// float32; by the same. What counts as large of each token, [tokens]: see `large_from` of bf16.inc.
bool large_numbers(const float* direction, float* large_from, int64_t tokens, int64_t vocabulary);
// total[v] += Σ_t direction[t, v] · hidden[t]
bool add_outer(const float* direction, const float* large_from, const uint16_t* hidden, float* total, int64_t tokens,
               int64_t vocabulary, int64_t hidden_size);
// out[t] = Σ_v direction[t, v] · weight[v]; lost [tokens] = Σ_v of what rounding took from the direction; narrow: room for
// it, [tokens · vocabulary].
bool times_weight(const float* direction, const float* large_from, const uint16_t* weight, uint16_t* narrow, float* out,
                  float* lost, int64_t tokens, int64_t vocabulary, int64_t hidden_size);

// weight · channel in 8 bits, a block of INT8_VOCABULARY rows after the other; `channel` [D], or null: ones. The first
// `kept` blocks are there once `int8_head` has made them, the others are made where they are needed.
struct Int8Head {
  const void* weight;  // [V, D]
  Element element;
  const float* channel;
  const float* mean;   // [D] nearly the mean of weight · channel, or null: what rounding a token loses of it is given back
  int64_t vocabulary, hidden, kept;
  uint8_t* blocks;     // [kept, padded / 4, INT8_VOCABULARY, 4]
  float* scales;       // [kept · INT8_VOCABULARY]
  int32_t* sums;

  int64_t padded() const { return (hidden + 3) / 4 * 4; }
};

// With `tokens`, rows as those of `few_products`, also their products with all of the weight, from the rows that are in
// cache then, and the scales of all rows.
void int8_head(const Int8Head&, const float* tokens = nullptr, int64_t count = 0, const float* bias = nullptr,
               float* out = nullptr, float* scales = nullptr);
// out[t, v] = hidden[t] · weight[v] + bias[v] in float32, from products of 8-bit numbers of hidden · inverse and weight ·
// channel. `inverse` [D], or null: ones.
void int8_logits(const void* hidden, Element, const float* inverse, const Int8Head&, const float* bias, float* out,
                 int64_t tokens);
// The same times `factor`, less `offset_of` the label's, as z and `largest` of the chunk.
void half_logits(const void* hidden, Element, const float* inverse, const Int8Head&, const float* bias, float factor,
                 const HalfChunk& out, int64_t tokens);
// Whether oneDNN has the micro-kernel for this processor.
bool int8_is_fast();

// f(begin, end) over [0, count) in parallel, on PyTorch's threads.
void parallel(int64_t count, Range, const void* context);
int threads();

template <class F>
void parallel(int64_t count, const F& f) {
  const auto range = [](int64_t begin, int64_t end, const void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel(count, range, &f);
}

// The same by pieces, each for the thread that is free: where some take longer than others, or a thread is held up. `f`
// takes next(begin, end), which gives a piece, or false after the last, and is called once on each thread.
template <class F>
void shared(int64_t count, int64_t piece, const F& f) {
  std::atomic<int64_t> done{0};
  const auto next = [&](int64_t& begin, int64_t& end) {
    begin = done.fetch_add(piece, std::memory_order_relaxed);
    end = std::min(count, begin + piece);
    return begin < count;
  };
  parallel(std::min<int64_t>(threads(), (count + piece - 1) / piece), [&](int64_t, int64_t) { f(next); });
}

}  // namespace fused_losses
