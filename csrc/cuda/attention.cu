// Vocabulary attention: decode attention with query hidden[t] and keys = values = the entries' rows of the weight.
//
// attention gathers entries·D·itemsize bytes of the weight, once for both the dot products and the sums, reads
// (1 or 2)·N·D of hidden states and 4 bytes an entry, writes 4 or 8 bytes an entry and (0, 1 or 2)·N·D.
// 4·entries·D FLOP, 8 with a reference. Floor: entries·D·itemsize / bandwidth, that of L2 for rows that recur: for
// 8,192 tokens of 200 entries at D = 4096 in bf16 13.4 GB, 2.4 ms at 5.5 TB/s (estimated, not measured).
// entry_logits gathers the same and writes 4 bytes an entry; 2·entries·D FLOP; the same floor.
#include "common.cuh"

namespace fused_losses::cuda {
namespace {

// What the values of a token's entries depend on; in shared memory, since every register counts in the loops.
struct Token {
  float top, log_sum, ref_top, ref_log_sum, shift, missed, label_value;
  int label;

  template <bool REFERENCE>
  __device__ __forceinline__ void read(const Attention& a, int64_t t) {
    const int64_t N = a.tokens;
    const float* rows = a.rows + t;
    top = rows[TOP * N], log_sum = rows[LOG_SUM * N];
    label = static_cast<int>(a.labels[t]), label_value = expm1f(-a.nll[t]);
    if constexpr (REFERENCE) {
      ref_top = rows[REF_TOP * N], ref_log_sum = rows[REF_LOG_SUM * N];
      shift = rows[SHIFT * N], missed = rows[MISSED * N];
    }
  }
};

// The sums of one thread's or one token's entries, by the names of the rows of `kept`.
struct Kept {
  float x[KEPTS];
};

struct Values {
  float nll, kl;
};

// ∂nll/∂z and ∂kl/∂z at entry j, from the dot products of the weight's row with hidden and with difference.
template <bool REFERENCE>
__device__ __forceinline__ Values values_of(const Attention& a, const Token& token, int64_t j, int column,
                                            float product, float product_difference, Kept& kept) {
  const Softcap cap(a.softcap);
  if (a.bias) product += __ldg(a.bias + column);
  float z = a.scale * at_least(product), r = 0, d = 0;
  if (REFERENCE && a.difference) {
    r = z;
    d = a.scale * product_difference;
    z = r + d;
  }
  if (a.softcap > 0) z = cap(z);
  if constexpr (REFERENCE) {
    if (!a.difference) {
      r = a.entry_reference[j];
      d = z - r;
    } else if (a.softcap > 0) {
      r = cap(r);
      d = z - r;
    }
  }
  const bool is_label = column == token.label;
  const float slope = a.softcap > 0 ? cap.slope(z) : 1;
  const float log_p = (z - token.top) - token.log_sum, p = expf(log_p);
  Values values = {(is_label ? token.label_value : p) * slope, 0};
  kept.x[KEPT] += is_label ? 0 : p * slope;
  if constexpr (REFERENCE) {
    const float log_p_ref = (r - token.ref_top) - token.ref_log_sum, x = d - token.shift;
    values.kl = Gap(log_p, log_p_ref, x - token.missed).gap * slope;
    kept.x[KEPT_GAP] += values.kl;
    kept.x[KEPT_GAP_L1] += fabsf(values.kl);
    kept.x[KEPT_GAP_L1_OF_TOTALS] += fabsf(Gap(log_p_ref + x, log_p_ref, x).gap * slope);
  }
  return values;
}

// Elements [first, first + E) of the rows' row t.
template <class T, bool VECTOR>
__device__ __forceinline__ void store_row(const Attention& a, void* rows, int64_t t, int64_t first,
                                          const float (&x)[ELEMENTS<T>]) {
  const int64_t D = a.width;
  if (a.rows_in_float) store_elements<float, VECTOR>(static_cast<float*>(rows) + t * D, first, D, x);
  else store_elements<T, VECTOR>(static_cast<T*>(rows) + t * D, first, D, x);
}

// How attention_kernel divides a row of the weight: WORDS of 16 bytes a thread and at most WARPS warps.
template <class T, int SIZE>
struct Division {
  static constexpr int HALVES = sizeof(T) / 2;  // 4-byte elements need twice the words
  static constexpr int WORDS = SIZE == 0 ? HALVES : 2 * HALVES, WARPS = SIZE == 0 ? 4 : 16;
  static constexpr int64_t ELEMENTS_OF_WARP = 32 * WORDS * ELEMENTS<T>;
  static constexpr int64_t LARGEST = WARPS * ELEMENTS_OF_WARP;  // D: 1,024 and 8,192
};

// A warp's part of the dot products of x, whose words are in shared memory, with GROUP rows: to its GROUP of `partial`.
template <class T, int GROUP, int WORDS>
__device__ __forceinline__ void dot_products(const uint4* x_words, const uint4 (&words)[GROUP][WORDS],
                                             int threads, int thread, float* partial) {
  constexpr int E = ELEMENTS<T>;
  const int lane = thread % 32, warp = thread / 32;
  float dot[GROUP] = {};
#pragma unroll
  for (int k = 0; k < WORDS; k++) {
    float x[E], w[E];
    unpack<T>(x_words[k * threads + thread], x);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      unpack<T>(words[g][k], w);
#pragma unroll
      for (int e = 0; e < E; e++) dot[g] = fmaf(x[e], w[e], dot[g]);
    }
  }
  const float sum = warp_sums<GROUP>(dot, lane);
  if (lane % (32 / GROUP) == 0) partial[warp * GROUP + lane / (32 / GROUP)] = sum;
}

// Adds value · row for GROUP rows, still in registers; lane g has the values of row g.
template <class T, bool REFERENCE, int GROUP, int WORDS, int KL_WORDS>
__device__ __forceinline__ void add_products(const Values& values, uint4 (&words)[GROUP][WORDS],
                                             float (&nll_sum)[WORDS][ELEMENTS<T>],
                                             float (&kl_sum)[KL_WORDS][ELEMENTS<T>]) {
  constexpr int E = ELEMENTS<T>;
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    const float nll_value = __shfl_sync(ALL_LANES, values.nll, g);
    const float kl_value = REFERENCE ? __shfl_sync(ALL_LANES, values.kl, g) : 0;
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
      float w[E];
      keep_packed(words[g][k]);
      unpack<T>(words[g][k], w);
#pragma unroll
      for (int e = 0; e < E; e++) {
        nll_sum[k][e] = fmaf(nll_value, w[e], nll_sum[k][e]);
        if constexpr (REFERENCE) kl_sum[k][e] = fmaf(kl_value, w[e], kl_sum[k][e]);
      }
    }
  }
}

// The sums over a warp's lanes.
__device__ __forceinline__ void store_kept(const Attention& a, const Kept& kept, int64_t t, int lane) {
#pragma unroll
  for (int i = 0; i < KEPTS; i++) {
    const float sum = warp_sum(kept.x[i]);
    if (lane == 0) a.kept[i * a.tokens + t] = sum;
  }
}

// One block a token. Word k of thread i is number k · threads + i of a row; a thread sees only its own part of hidden
// and difference, which stay in shared memory to save registers. GROUP entries at a time: every thread loads its part
// of GROUP rows of the weight and multiplies; the dot products meet in shared memory; every warp then forms the GROUP
// values itself, lane g that of entry g, and adds its part of the rows, still in registers, to its sums.
template <class T, int SIZE, bool REFERENCE>
__global__ __launch_bounds__(32 * Division<T, SIZE>::WARPS, SIZE == 0 ? 5 : 1) void attention_kernel(
    const Attention a) {
  constexpr int E = ELEMENTS<T>, WORDS = Division<T, SIZE>::WORDS;
  constexpr int GROUP = (REFERENCE && sizeof(T) == 2 ? 4 : 8) / WORDS;  // more would spill registers
  FL_DYNAMIC_SHARED(shared);
  __shared__ float partial[2][2][Division<T, SIZE>::WARPS][GROUP];
  __shared__ Token token;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int64_t t = blockIdx.x, D = a.width;
  const int64_t begin = a.offsets[t], end = a.offsets[t + 1];
  const T* weight = static_cast<const T*>(a.weight);
  const bool shared_head = REFERENCE && a.difference;

  // Load x
  uint4* hidden = reinterpret_cast<uint4*>(shared);
  uint4* difference = hidden + WORDS * threads;
#pragma unroll
  for (int k = 0; k < WORDS; k++) {
    const int word = k * threads + thread;
    hidden[word] = load_word<T, true>(static_cast<const T*>(a.hidden) + t * D, word * E, D);
    if (shared_head) difference[word] = load_word<T, true>(static_cast<const T*>(a.difference) + t * D, word * E, D);
  }
  if (thread == 0) token.read<REFERENCE>(a, t);  // used after the first __syncthreads

  float nll_sum[WORDS][E] = {}, kl_sum[REFERENCE ? WORDS : 1][E] = {};
  Kept kept = {};  // of lane g: of the entries that it forms the values of
  int next = lane < GROUP && begin + lane < end ? a.columns[begin + lane] : 0;
  int parity = 0;
  for (int64_t j = begin; j < end; j += GROUP, parity ^= 1) {
    const int count = end - j < GROUP ? static_cast<int>(end - j) : GROUP;

    // Read the group
    const int column = next;  // lane g: of entry j + g
    uint4 words[GROUP][WORDS];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const T* row = weight + __shfl_sync(ALL_LANES, column, g) * D;
#pragma unroll
      for (int k = 0; k < WORDS; k++)
        words[g][k] = g < count ? load_word<T, true>(row, (k * threads + thread) * E, D) : make_uint4(0, 0, 0, 0);
    }
    next = lane < GROUP && j + GROUP + lane < end ? a.columns[j + GROUP + lane] : 0;

    // Dot products
    dot_products<T>(hidden, words, threads, thread, partial[parity][0][0]);
    if (shared_head) dot_products<T>(difference, words, threads, thread, partial[parity][1][0]);
    __syncthreads();  // the only one: the next group writes to the other half of `partial`

    // Values
    Values values = {0, 0};
    if (lane < count) {
      float product = 0, product_difference = 0;
      for (int w = 0; w < warps; w++) product += partial[parity][0][w][lane];
      if (shared_head)
        for (int w = 0; w < warps; w++) product_difference += partial[parity][1][w][lane];
      values = values_of<REFERENCE>(a, token, j + lane, column, product, product_difference, kept);
      if (warp == 0) {
        a.nll_values[j + lane] = values.nll;
        if constexpr (REFERENCE) a.kl_values[j + lane] = values.kl;
      }
    }

    // Sums
    if (a.nll_rows == nullptr && (!REFERENCE || a.kl_rows == nullptr)) continue;
    add_products<T, REFERENCE>(values, words, nll_sum, kl_sum);
  }

  if (warp == 0) store_kept(a, kept, t, lane);
#pragma unroll
  for (int k = 0; k < WORDS; k++) {
    const int first = (k * threads + thread) * E;
    if (a.nll_rows) store_row<T, true>(a, a.nll_rows, t, first, nll_sum[k]);
    if constexpr (REFERENCE)
      if (a.kl_rows) store_row<T, true>(a, a.kl_rows, t, first, kl_sum[k]);
  }
}

// Σ x · row over D elements, the same in every lane.
template <class T, bool VECTOR>
__device__ __forceinline__ float warp_dot(const T* x, const T* row, int64_t D, int lane) {
  constexpr int E = ELEMENTS<T>, BATCH = 4;  // loads in flight
  float sum = 0;
  for (int64_t first = lane * E; first < D; first += BATCH * 32 * E) {
    uint4 words[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; k++) words[k] = load_word<T, VECTOR>(row, first + k * 32 * E, D);
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      float h[E], w[E];
      unpack<T>(load_word<T, VECTOR>(x, first + k * 32 * E, D), h);
      unpack<T>(words[k], w);
#pragma unroll
      for (int e = 0; e < E; e++) sum = fmaf(h[e], w[e], sum);
    }
  }
  return warp_sum(sum);
}

constexpr int PART_THREADS = 256, PART_WARPS = PART_THREADS / 32;

// The same for any D and any alignment, one block a token, in two steps that gather the weight once each: the values,
// one warp an entry; then the sums, part of D by part.
template <class T, bool REFERENCE, bool VECTOR>
__global__ __launch_bounds__(PART_THREADS) void attention_parts_kernel(const Attention a) {
  constexpr int E = ELEMENTS<T>, GROUP = 4;
  __shared__ Token token;
  __shared__ Kept of_warp[PART_WARPS];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t t = blockIdx.x, D = a.width, begin = a.offsets[t], end = a.offsets[t + 1];
  const T* weight = static_cast<const T*>(a.weight);
  if (thread == 0) token.read<REFERENCE>(a, t);
  __syncthreads();

  Kept kept = {};
  for (int64_t j = begin + warp; j < end; j += PART_WARPS) {
    const int column = a.columns[j];
    const T* row = weight + column * D;
    const float product = warp_dot<T, VECTOR>(static_cast<const T*>(a.hidden) + t * D, row, D, lane);
    float product_difference = 0;
    if (REFERENCE && a.difference)
      product_difference = warp_dot<T, VECTOR>(static_cast<const T*>(a.difference) + t * D, row, D, lane);
    const Values values = values_of<REFERENCE>(a, token, j, column, product, product_difference, kept);
    if (lane == 0) {
      a.nll_values[j] = values.nll;
      if constexpr (REFERENCE) a.kl_values[j] = values.kl;
    }
  }
  if (lane == 0) of_warp[warp] = kept;
  __syncthreads();  // also for the values in global memory
  if (thread < KEPTS) {
    float sum = 0;
    for (int w = 0; w < PART_WARPS; w++) sum += of_warp[w].x[thread];
    a.kept[thread * a.tokens + t] = sum;
  }

  if (a.nll_rows == nullptr && (!REFERENCE || a.kl_rows == nullptr)) return;
  for (int64_t first = thread * E; first < D; first += PART_THREADS * E) {
    float nll_sum[E] = {}, kl_sum[E] = {};
    for (int64_t j = begin; j < end; j += GROUP) {
      uint4 words[GROUP];
      Values values[GROUP];
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        const bool valid = j + g < end;
        values[g] = {valid ? a.nll_values[j + g] : 0, REFERENCE && valid ? a.kl_values[j + g] : 0};
        words[g] = valid ? load_word<T, VECTOR>(weight + a.columns[j + g] * D, first, D) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        float w[E];
        unpack<T>(words[g], w);
#pragma unroll
        for (int e = 0; e < E; e++) {
          nll_sum[e] = fmaf(values[g].nll, w[e], nll_sum[e]);
          if constexpr (REFERENCE) kl_sum[e] = fmaf(values[g].kl, w[e], kl_sum[e]);
        }
      }
    }
    if (a.nll_rows) store_row<T, VECTOR>(a, a.nll_rows, t, first, nll_sum);
    if constexpr (REFERENCE)
      if (a.kl_rows) store_row<T, VECTOR>(a, a.kl_rows, t, first, kl_sum);
  }
}

// One block a token, one warp an entry; hidden[t] comes from L1.
template <class T, bool VECTOR>
__global__ __launch_bounds__(PART_THREADS) void entry_logits_kernel(const EntryLogits a) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t t = blockIdx.x, D = a.width, end = a.offsets[t + 1];
  for (int64_t j = a.offsets[t] + warp; j < end; j += PART_WARPS) {
    const int64_t column = a.columns[j];
    const T* row = static_cast<const T*>(a.weight) + column * D;
    const float sum = warp_dot<T, VECTOR>(static_cast<const T*>(a.hidden) + t * D, row, D, lane);
    if (lane == 0) a.out[j] = at_least(a.bias ? sum + __ldg(a.bias + column) : sum);
  }
}

template <class T, int SIZE, bool REFERENCE>
void launch_whole(const Attention& a, Stream stream) {
  using Part = Division<T, SIZE>;
  const int64_t threads = 32 * ((a.width + Part::ELEMENTS_OF_WARP - 1) / Part::ELEMENTS_OF_WARP);
  const int64_t shared_bytes = threads * Part::WORDS * 16 * (a.difference ? 2 : 1);
  const auto kernel = attention_kernel<T, SIZE, REFERENCE>;
  allow_shared(kernel, shared_bytes, "attention_kernel");
  FL_LAUNCH("attention_kernel", kernel, static_cast<unsigned>(a.tokens), static_cast<unsigned>(threads),
            static_cast<unsigned>(shared_bytes), stream, a);
}

template <class T, bool REFERENCE>
void launch_attention(const Attention& a, Stream stream) {
  const bool vector = a.width % ELEMENTS<T> == 0 && aligned(a.hidden) && aligned(a.difference) && aligned(a.weight) &&
                      aligned(a.nll_rows) && aligned(a.kl_rows);
  if (vector && a.width <= Division<T, 0>::LARGEST) return launch_whole<T, 0, REFERENCE>(a, stream);
  if (vector && a.width <= Division<T, 1>::LARGEST) return launch_whole<T, 1, REFERENCE>(a, stream);
  const auto kernel = vector ? attention_parts_kernel<T, REFERENCE, true> : attention_parts_kernel<T, REFERENCE, false>;
  FL_LAUNCH("attention_parts_kernel", kernel, static_cast<unsigned>(a.tokens), PART_THREADS, 0, stream, a);
}

template <class T>
void launch(const Attention& a, Stream stream) {
  if (a.difference || a.entry_reference) launch_attention<T, true>(a, stream);
  else launch_attention<T, false>(a, stream);
}

template <class T>
void launch(const EntryLogits& a, Stream stream) {
  const bool vector = a.width % ELEMENTS<T> == 0 && aligned(a.hidden) && aligned(a.weight);
  const auto kernel = vector ? entry_logits_kernel<T, true> : entry_logits_kernel<T, false>;
  FL_LAUNCH("entry_logits_kernel", kernel, static_cast<unsigned>(a.tokens), PART_THREADS, 0, stream, a);
}

template <class Arguments>
void of_element(const Arguments& a, Element element, Stream stream) {
  if (a.tokens == 0) return;
  if (element == Element::Float32) launch<float>(a, stream);
  else if (element == Element::BFloat16) launch<__nv_bfloat16>(a, stream);
  else launch<__half>(a, stream);
}

}  // namespace

void attention(const Attention& a, Element element, Stream stream) { of_element(a, element, stream); }

void entry_logits(const EntryLogits& a, Element element, Stream stream) { of_element(a, element, stream); }

}  // namespace fused_losses::cuda
