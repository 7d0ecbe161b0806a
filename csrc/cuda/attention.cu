// Vocabulary attention: decode attention with query hidden[t] and keys = values = the entries' rows of the weight.
//
// attention gathers entries·D·itemsize bytes of the weight, once for both the dot products and the sums, reads (1 or 2)·N·D
// of hidden states and 4 bytes an entry, writes 4 or 8 bytes an entry and (0, 1 or 2)·N·D. 4·entries·D FLOP, 8 with a
// reference. Floor: entries·D·itemsize / bandwidth, that of L2 for rows that recur: for 8,192 tokens of 200 entries at
// D = 4096 in bf16 13.4 GB, 2.4 ms at 5.5 TB/s.
// entry_logits gathers the same and writes 4 bytes an entry; 2·entries·D FLOP; the same floor.
#include "common.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int MOST_WARPS = 16;

// One block a token. A thread owns WORDS words of 16 bytes of a row of D elements, word k of thread i being number
// k · threads + i; it sees only its own part of hidden and difference, which stay in shared memory to save registers.
// GROUP entries at a time: every thread loads its part of GROUP rows of the weight and multiplies; the dot products meet in
// shared memory; every warp then forms the GROUP values itself, lane g that of entry g, and adds its part to its sums.
template <class T, int WORDS, bool REFERENCE, bool VECTOR>
__global__ __launch_bounds__(32 * MOST_WARPS) void attention_kernel(const Attention a) {
  constexpr int E = ELEMENTS<T>, GROUP = 8 / WORDS;  // 32 registers of the weight
  FL_DYNAMIC_SHARED(shared);
  __shared__ float partial[2][2][GROUP][MOST_WARPS];
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int64_t t = blockIdx.x, D = a.width, N = a.tokens;
  const int64_t begin = a.offsets[t], end = a.offsets[t + 1];
  const T* weight = static_cast<const T*>(a.weight);
  const bool shared_head = REFERENCE && a.difference;

  uint4* hidden = reinterpret_cast<uint4*>(shared);
  uint4* difference = hidden + WORDS * threads;
#pragma unroll
  for (int k = 0; k < WORDS; k++) {
    const int word = k * threads + thread;
    const int64_t first = static_cast<int64_t>(word) * E;
    hidden[word] = load_word<T, VECTOR>(static_cast<const T*>(a.hidden) + t * D, first, D);
    if (shared_head)
      difference[word] = load_word<T, VECTOR>(static_cast<const T*>(a.difference) + t * D, first, D);
  }

  const Softcap cap(a.softcap);
  const int64_t label = a.labels[t];
  const float label_value = expm1f(-a.nll[t]);
  const float top = a.rows[TOP * N + t], log_sum = a.rows[LOG_SUM * N + t];
  float ref_top = 0, ref_log_sum = 0, shift = 0, totals_shift = 0;
  if constexpr (REFERENCE) {
    ref_top = a.rows[REF_TOP * N + t], ref_log_sum = a.rows[REF_LOG_SUM * N + t];
    shift = a.rows[SHIFT * N + t], totals_shift = a.rows[TOTALS_SHIFT * N + t];
  }

  float nll_sum[WORDS][E] = {}, kl_sum[REFERENCE ? WORDS : 1][E] = {};
  float kept[4] = {};  // of lane g: of the entries that it forms the values of
  int32_t next = lane < GROUP && begin + lane < end ? a.columns[begin + lane] : 0;
  int parity = 0;
  for (int64_t j = begin; j < end; j += GROUP, parity ^= 1) {
    const int count = end - j < GROUP ? static_cast<int>(end - j) : GROUP;
    const int32_t column = next;  // lane g: of entry j + g
    uint4 words[GROUP][WORDS];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const T* row = weight + __shfl_sync(ALL_LANES, column, g) * D;
#pragma unroll
      for (int k = 0; k < WORDS; k++)
        words[g][k] = g < count ? load_word<T, VECTOR>(row, static_cast<int64_t>(k * threads + thread) * E, D)
                                : make_uint4(0, 0, 0, 0);
    }
    next = lane < GROUP && j + GROUP + lane < end ? a.columns[j + GROUP + lane] : 0;

    float dot[GROUP] = {}, dot_difference[GROUP] = {};
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
      float h[E], d[E], w[E];
      unpack<T>(hidden[k * threads + thread], h);
      if (shared_head) unpack<T>(difference[k * threads + thread], d);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        unpack<T>(words[g][k], w);
#pragma unroll
        for (int e = 0; e < E; e++) {
          dot[g] = fmaf(h[e], w[e], dot[g]);
          if (shared_head) dot_difference[g] = fmaf(d[e], w[e], dot_difference[g]);
        }
      }
    }
    const float sum = warp_sums<GROUP>(dot, lane);
    const float sum_difference = shared_head ? warp_sums<GROUP>(dot_difference, lane) : 0;
    if (lane % (32 / GROUP) == 0) {
      partial[parity][0][lane / (32 / GROUP)][warp] = sum;
      if (shared_head) partial[parity][1][lane / (32 / GROUP)][warp] = sum_difference;
    }
    __syncthreads();  // the only one: the next group writes to the other half of `partial`

    float nll_value = 0, kl_value = 0;
    if (lane < count) {
      float product = 0;
      for (int w = 0; w < warps; w++) product += partial[parity][0][lane][w];
      if (a.bias) product += __ldg(a.bias + column);
      float z = a.scale * at_least(product), r = 0, d = 0;
      if (shared_head) {
        float product_difference = 0;
        for (int w = 0; w < warps; w++) product_difference += partial[parity][1][lane][w];
        r = z;
        d = a.scale * product_difference;
        z = r + d;
      }
      if (a.softcap > 0) z = cap(z);
      if constexpr (REFERENCE) {
        if (!shared_head) {
          r = a.entry_reference[j + lane];
          d = z - r;
        } else if (a.softcap > 0) {
          r = cap(r);
          d = z - r;
        }
      }
      const float slope = a.softcap > 0 ? cap.slope(z) : 1;
      const float log_p = (z - top) - log_sum, p = expf(log_p);
      nll_value = (column == label ? label_value : p) * slope;
      kept[0] += column == label ? 0 : p * slope;
      if constexpr (REFERENCE) {
        const float log_p_ref = (r - ref_top) - ref_log_sum, x = d - totals_shift;
        kl_value = Gap(log_p, log_p_ref, d - shift).gap * slope;
        kept[1] += kl_value;
        kept[2] += fabsf(kl_value);
        kept[3] += fabsf(Gap(log_p_ref + x, log_p_ref, x).gap * slope);
      }
      if (warp == 0) {
        a.nll_values[j + lane] = nll_value;
        if constexpr (REFERENCE) a.kl_values[j + lane] = kl_value;
      }
    }

    if (a.nll_rows == nullptr && (!REFERENCE || a.kl_rows == nullptr)) continue;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const float nll_factor = __shfl_sync(ALL_LANES, nll_value, g);
      const float kl_factor = REFERENCE ? __shfl_sync(ALL_LANES, kl_value, g) : 0;
#pragma unroll
      for (int k = 0; k < WORDS; k++) {
        float w[E];
        unpack<T>(words[g][k], w);
#pragma unroll
        for (int e = 0; e < E; e++) {
          nll_sum[k][e] = fmaf(nll_factor, w[e], nll_sum[k][e]);
          if constexpr (REFERENCE) kl_sum[k][e] = fmaf(kl_factor, w[e], kl_sum[k][e]);
        }
      }
    }
  }

  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float sum = warp_sum(kept[i]);
      if (lane == 0) a.kept[i * N + t] = sum;
    }
  }
  const auto store = [&](void* rows, const float(&x)[E], int64_t first) {
    if (a.rows_in_float) store_elements<float, VECTOR, E>(static_cast<float*>(rows) + t * D, first, D, x);
    else store_elements<T, VECTOR, E>(static_cast<T*>(rows) + t * D, first, D, x);
  };
#pragma unroll
  for (int k = 0; k < WORDS; k++) {
    const int64_t first = static_cast<int64_t>(k * threads + thread) * E;
    if (a.nll_rows) store(a.nll_rows, nll_sum[k], first);
    if constexpr (REFERENCE)
      if (a.kl_rows) store(a.kl_rows, kl_sum[k], first);
  }
}

constexpr int ENTRY_THREADS = 256;

// One block a token, one warp an entry; hidden[t] comes from L1.
template <class T, bool VECTOR>
__global__ __launch_bounds__(ENTRY_THREADS) void entry_logits_kernel(const EntryLogits a) {
  constexpr int E = ELEMENTS<T>, BATCH = 4;  // loads in flight
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t t = blockIdx.x, D = a.width, end = a.offsets[t + 1];
  const T* hidden = static_cast<const T*>(a.hidden) + t * D;
  for (int64_t j = a.offsets[t] + warp; j < end; j += ENTRY_THREADS / 32) {
    const int64_t column = a.columns[j];
    const T* row = static_cast<const T*>(a.weight) + column * D;
    float sum = 0;
    for (int64_t first = lane * E; first < D; first += BATCH * 32 * E) {
      uint4 words[BATCH];
#pragma unroll
      for (int k = 0; k < BATCH; k++) words[k] = load_word<T, VECTOR>(row, first + k * 32 * E, D);
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        float h[E], w[E];
        unpack<T>(load_word<T, VECTOR>(hidden, first + k * 32 * E, D), h);
        unpack<T>(words[k], w);
#pragma unroll
        for (int e = 0; e < E; e++) sum = fmaf(h[e], w[e], sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) a.out[j] = at_least(a.bias ? sum + __ldg(a.bias + column) : sum);
  }
}

template <class T, int WORDS, bool VECTOR>
void launch(const Attention& a, Stream stream) {
  constexpr int64_t elements_of_warp = 32 * WORDS * ELEMENTS<T>;
  const int64_t threads = 32 * ((a.width + elements_of_warp - 1) / elements_of_warp);
  const bool reference = a.difference || a.entry_reference;
  const auto kernel = reference ? attention_kernel<T, WORDS, true, VECTOR> : attention_kernel<T, WORDS, false, VECTOR>;
  const int64_t shared_bytes = threads * WORDS * 16 * (a.difference ? 2 : 1);
  allow_shared(kernel, shared_bytes, "attention_kernel");
  FL_LAUNCH(kernel, static_cast<unsigned>(a.tokens), static_cast<unsigned>(threads),
            static_cast<unsigned>(shared_bytes), stream, a);
}

// As few words a thread as 16 warps allow: more rows of the weight are then in flight.
template <class T>
void launch(const Attention& a, Stream stream) {
  constexpr int HALVES = sizeof(T) / 2;  // 4-byte elements need twice the words
  const bool vector = a.width % ELEMENTS<T> == 0 && aligned(a.hidden) && aligned(a.difference) && aligned(a.weight) &&
                      aligned(a.nll_rows) && aligned(a.kl_rows);
  if (!vector) launch<T, 4 * HALVES, false>(a, stream);
  else if (a.width <= LARGEST_HIDDEN / 4) launch<T, HALVES, true>(a, stream);
  else if (a.width <= LARGEST_HIDDEN / 2) launch<T, 2 * HALVES, true>(a, stream);
  else launch<T, 4 * HALVES, true>(a, stream);
}

template <class T>
void launch(const EntryLogits& a, Stream stream) {
  const bool vector = a.width % ELEMENTS<T> == 0 && aligned(a.hidden) && aligned(a.weight);
  const auto kernel = vector ? entry_logits_kernel<T, true> : entry_logits_kernel<T, false>;
  FL_LAUNCH(kernel, static_cast<unsigned>(a.tokens), ENTRY_THREADS, 0, stream, a);
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
