// segment_product: out[i] = base_scale · base[i] + Σ_j values[j] · matrix[columns[j]] + scale[i] · vector, j over
// segment i. With segments = tokens that is dx = S'W + m'(qᵀW), with segments = vocabulary dW = S'ᵀx + q(m'ᵀx).
//
// Gathers entries·D·itemsize bytes of the matrix, reads 8 bytes an entry and 4·I·D of the base, writes I·D·itemsize.
// 2·(entries + I)·D FLOP. Floor: entries·D·itemsize / L2 bandwidth + I·D·itemsize / HBM bandwidth: for 1.6 million
// entries, I = 128,256 and D = 4096 in bf16 2.4 ms at 5.5 TB/s + 0.3 ms at 3.35 TB/s (estimated, not measured).
#include "common.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t SEGMENTS_OF_BLOCK = 8;  // so that a thread's part of the vector is read once for all of them

// The columns and values of up to SPLIT entries, read once by the whole block.
struct Staged {
  int32_t columns[SPLIT];
  float values[SPLIT];
};

// sum += Σ values · matrix[column] over the entries [begin, end), at most SPLIT, in order, for this thread's words.
template <class T, int WORDS, bool VECTOR>
__device__ __forceinline__ void add_entries(const SegmentProduct& a, Staged& staged, int64_t begin, int64_t end,
                                            int64_t first, float (&sum)[WORDS][ELEMENTS<T>]) {
  constexpr int E = ELEMENTS<T>, GROUP = (VECTOR ? 8 : 4) / WORDS;  // rows in flight
  const int count = static_cast<int>(end - begin), threads = static_cast<int>(blockDim.x);
  __syncthreads();  // the last segment's entries are no longer needed
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
    staged.columns[i] = a.columns[begin + i];
    staged.values[i] = a.values[begin + i];
  }
  __syncthreads();
  const T* matrix = static_cast<const T*>(a.matrix);
  const auto load = [&](int i, int k) {
    return load_word<T, VECTOR>(matrix + staged.columns[i] * a.width, first + static_cast<int64_t>(k) * threads * E,
                                a.width);
  };
  const auto add = [&](float value, const uint4& word, int k) {
    float x[E];
    unpack<T>(word, x);
#pragma unroll
    for (int e = 0; e < E; e++) sum[k][e] = fmaf(value, x[e], sum[k][e]);
  };
  int i = 0;
  for (; i + GROUP <= count; i += GROUP) {
    uint4 words[GROUP][WORDS];
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
      for (int k = 0; k < WORDS; k++) words[g][k] = load(i + g, k);
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
      for (int k = 0; k < WORDS; k++) add(staged.values[i + g], words[g][k], k);
  }
  for (; i < count; i++) {
    uint4 words[WORDS];
#pragma unroll
    for (int k = 0; k < WORDS; k++) words[k] = load(i, k);
#pragma unroll
    for (int k = 0; k < WORDS; k++) add(staged.values[i], words[k], k);
  }
}

template <bool VECTOR, int E>
__device__ __forceinline__ void load_floats(const float* row, int64_t first, int64_t size, float (&x)[E]) {
#pragma unroll
  for (int e = 0; e < E; e += 4) {
    float part[4];
    unpack<float>(load_word<float, VECTOR>(row, first + e, size), part);
#pragma unroll
    for (int i = 0; i < 4; i++) x[e + i] = part[i];
  }
}

// out[i] from the sum of the entries; rounded once.
template <bool VECTOR, int E>
__device__ __forceinline__ void write(const SegmentProduct& a, Element out, int64_t i, int64_t first, float (&sum)[E],
                                      const float (&vector)[E]) {
  const int64_t D = a.width;
  const float scale = a.scale[i];
#pragma unroll
  for (int e = 0; e < E; e++) sum[e] = fmaf(scale, vector[e], sum[e]);
  if (a.base) {
    float base[E];
    load_floats<VECTOR>(a.base + i * D, first, D, base);
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] = fmaf(a.base_scale, base[e], sum[e]);
  }
  if (out == Element::Float32)
    store_elements<float, VECTOR, E>(static_cast<float*>(a.out) + i * D, first, D, sum);
  else if (out == Element::BFloat16)
    store_elements<__nv_bfloat16, VECTOR, E>(static_cast<__nv_bfloat16*>(a.out) + i * D, first, D, sum);
  else
    store_elements<__half, VECTOR, E>(static_cast<__half*>(a.out) + i * D, first, D, sum);
}

// Blocks [0, slots) each sum one slot of a hot segment, which take longest and so start first; the others each write
// some segments, far apart because hot ones are often neighbours. blockIdx.y is a part of D. Word k of thread i is
// number k · threads + i of the part.
template <class T, int WORDS, bool VECTOR>
__global__ __launch_bounds__(THREADS) void segment_kernel(const SegmentProduct a, Element out, int64_t stride) {
  constexpr int E = ELEMENTS<T>;
  __shared__ Staged staged;
  const int64_t threads = blockDim.x, D = a.width;
  const int64_t first = (blockIdx.y * WORDS * threads + threadIdx.x) * E;
  const auto word_at = [&](int k) { return first + k * threads * E; };

  if (blockIdx.x < a.slots) {
    const int64_t slot = blockIdx.x;
    if (slot >= a.hot_first[a.hot_segments]) return;
    int64_t low = 0, high = a.hot_segments - 1;  // the last h with hot_first[h] ≤ slot
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (a.hot_first[middle] <= slot) low = middle;
      else high = middle - 1;
    }
    const int64_t i = a.hot[low], begin = a.offsets[i] + SPLIT * (slot - a.hot_first[low]);
    const int64_t left = a.offsets[i + 1] - begin;
    float sum[WORDS][E] = {};
    add_entries<T, WORDS, VECTOR>(a, staged, begin, begin + (left < SPLIT ? left : SPLIT), first, sum);
#pragma unroll
    for (int k = 0; k < WORDS; k++) store_elements<float, VECTOR, E>(a.partial + slot * D, word_at(k), D, sum[k]);
    return;
  }

  float vector[WORDS][E];
#pragma unroll
  for (int k = 0; k < WORDS; k++) load_floats<VECTOR>(a.vector, word_at(k), D, vector[k]);
  for (int64_t i = blockIdx.x - a.slots; i < a.segments; i += stride) {
    const int64_t begin = a.offsets[i], end = a.offsets[i + 1];
    if (end - begin > SPLIT) continue;
    float sum[WORDS][E] = {};
    if (end > begin) add_entries<T, WORDS, VECTOR>(a, staged, begin, end, first, sum);
#pragma unroll
    for (int k = 0; k < WORDS; k++) write<VECTOR>(a, out, i, word_at(k), sum[k], vector[k]);
  }
}

// One block a hot segment: its slots in order.
template <bool VECTOR>
__global__ __launch_bounds__(THREADS) void hot_segment_kernel(const SegmentProduct a, Element out) {
  constexpr int E = 4;
  const int64_t h = blockIdx.x, D = a.width, first = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * E;
  float sum[E] = {}, x[E];
  for (int64_t slot = a.hot_first[h]; slot < a.hot_first[h + 1]; slot++) {
    load_floats<VECTOR>(a.partial + slot * D, first, D, x);
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] += x[e];
  }
  load_floats<VECTOR>(a.vector, first, D, x);
  write<VECTOR>(a, out, a.hot[h], first, sum, x);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads that cover D with words of `elements` each, at most THREADS; the rest of D are further parts.
int64_t threads_for(int64_t D, int64_t elements) {
  const int64_t wanted = 32 * ceil_div(D, 32 * elements);
  return wanted < THREADS ? wanted : THREADS;
}

template <class T, int WORDS, bool VECTOR>
void launch(const SegmentProduct& a, Element out, Stream stream) {
  constexpr int64_t elements = WORDS * ELEMENTS<T>;
  const int64_t threads = threads_for(a.width, elements), stride = ceil_div(a.segments, SEGMENTS_OF_BLOCK);
  const dim3 grid(static_cast<unsigned>(a.slots + stride),
                  static_cast<unsigned>(ceil_div(a.width, threads * elements)));
  const auto kernel = segment_kernel<T, WORDS, VECTOR>;
  FL_LAUNCH("segment_kernel", kernel, grid, static_cast<unsigned>(threads), 0, stream, a, out, stride);
  if (a.hot_segments == 0) return;
  const int64_t hot_threads = threads_for(a.width, 4);
  const dim3 hot_grid(static_cast<unsigned>(a.hot_segments),
                      static_cast<unsigned>(ceil_div(a.width, 4 * hot_threads)));
  const auto hot_kernel = hot_segment_kernel<VECTOR>;
  FL_LAUNCH("hot_segment_kernel", hot_kernel, hot_grid, static_cast<unsigned>(hot_threads), 0, stream, a, out);
}

template <class T>
void launch(const SegmentProduct& a, Element out, Stream stream) {
  constexpr int HALVES = sizeof(T) / 2;  // 4-byte elements need twice the words
  const bool vector = a.width % 8 == 0 && aligned(a.matrix) && aligned(a.vector) && aligned(a.base) &&
                      aligned(a.partial) && aligned(a.out);
  if (!vector) launch<T, HALVES, false>(a, out, stream);
  else if (a.width <= 8 * THREADS) launch<T, HALVES, true>(a, out, stream);
  else launch<T, 2 * HALVES, true>(a, out, stream);
}

}  // namespace

void segment_product(const SegmentProduct& a, Element matrix, Element out, Stream stream) {
  if (a.segments == 0) return;
  if (matrix == Element::Float32) launch<float>(a, out, stream);
  else if (matrix == Element::BFloat16) launch<__nv_bfloat16>(a, out, stream);
  else launch<__half>(a, out, stream);
}

}  // namespace fused_losses::cuda
