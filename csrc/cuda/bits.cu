// From one bit per logit (32 MB for 2,048 tokens and 128,256 ids) to entries row by row, in order.
//
// count_bits reads 4·words bytes a row and writes 8; columns_of_bits reads the same once more and writes 4 bytes an
// entry. Integer work only, some 10 operations a word. Floor of each: 4·N·words / bandwidth, by the data sheet of the
// H100 10 µs for 33 MB; the second reading comes from L2 where the bits fit.
#include "common.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, WIDTH = 4;  // WIDTH words a thread and step

// Words [first, first + WIDTH) of a row, with the label's bit set; zeros beyond the end.
template <bool VECTOR>
__device__ __forceinline__ uint4 load_words(const uint32_t* row, int64_t first, int64_t words, int64_t label) {
  uint32_t u[WIDTH];
  if constexpr (VECTOR) {
    const uint4 v = first < words ? __ldg(reinterpret_cast<const uint4*>(row + first)) : make_uint4(0, 0, 0, 0);
    u[0] = v.x, u[1] = v.y, u[2] = v.z, u[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) u[i] = first + i < words ? __ldg(row + first + i) : 0;
  }
#pragma unroll
  for (int i = 0; i < WIDTH; i++)
    if (first + i == label / 32) u[i] |= 1u << (label % 32);
  return make_uint4(u[0], u[1], u[2], u[3]);
}

__device__ __forceinline__ int bits_in(const uint4& v) { return __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w); }

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

template <bool VECTOR>
__global__ __launch_bounds__(THREADS) void count_bits_kernel(const uint32_t* bits, int64_t words, const int64_t* labels,
                                                             int64_t capacity, int64_t* counts) {
  __shared__ int of_warp[WARPS];
  const int64_t t = blockIdx.x, label = labels[t];
  const int thread = static_cast<int>(threadIdx.x);
  int count = 0;
  for (int64_t first = WIDTH * thread; first < words; first += WIDTH * THREADS)
    count += bits_in(load_words<VECTOR>(bits + t * words, first, words, label));
  count = warp_sum(count);
  if (thread % 32 == 0) of_warp[thread / 32] = count;
  __syncthreads();
  if (thread == 0) {
    int64_t total = 0;
    for (int i = 0; i < WARPS; i++) total += of_warp[i];
    counts[t] = total <= capacity ? total : -1;
  }
}

template <bool VECTOR>
__global__ __launch_bounds__(THREADS) void columns_of_bits_kernel(const uint32_t* bits, int64_t words,
                                                                  const int64_t* labels, const int64_t* offsets,
                                                                  int32_t* columns) {
  __shared__ int of_warp[2][WARPS];
  const int64_t t = blockIdx.x, label = labels[t], end = offsets[t + 1];
  int64_t base = offsets[t];
  if (base == end) return;  // the whole block: it has no entries
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int parity = 0;
  for (int64_t start = 0; start < words; start += WIDTH * THREADS, parity ^= 1) {
    const int64_t first = start + WIDTH * thread;
    const uint4 v = load_words<VECTOR>(bits + t * words, first, words, label);
    const int count = bits_in(v);
    int before = count;  // inclusive scan over the warp
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(ALL_LANES, before, offset);
      if (lane >= offset) before += other;
    }
    if (lane == 31) of_warp[parity][warp] = before;
    __syncthreads();
    int64_t at = base + before - count;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
      if (i < warp) at += of_warp[parity][i];
      base += of_warp[parity][i];
    }
    const uint32_t u[WIDTH] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      for (uint32_t left = u[i]; left; left &= left - 1, at++)
        if (at < end) columns[at] = static_cast<int32_t>(32 * (first + i) + __ffs(static_cast<int>(left)) - 1);
  }
}

bool vector(const uint32_t* bits, int64_t words) { return words % WIDTH == 0 && aligned(bits); }

}  // namespace

void count_bits(const uint32_t* bits, int64_t tokens, int64_t words, const int64_t* labels, int64_t capacity,
                int64_t* counts, Stream stream) {
  if (tokens == 0) return;
  const auto kernel = vector(bits, words) ? count_bits_kernel<true> : count_bits_kernel<false>;
  FL_LAUNCH("count_bits_kernel", kernel, static_cast<unsigned>(tokens), THREADS, 0, stream, bits, words,
            labels, capacity, counts);
}

void columns_of_bits(const uint32_t* bits, int64_t tokens, int64_t words, const int64_t* labels,
                     const int64_t* offsets, int32_t* columns, Stream stream) {
  if (tokens == 0) return;
  const auto kernel = vector(bits, words) ? columns_of_bits_kernel<true> : columns_of_bits_kernel<false>;
  FL_LAUNCH("columns_of_bits_kernel", kernel, static_cast<unsigned>(tokens), THREADS, 0, stream, bits, words,
            labels, offsets, columns);
}

}  // namespace fused_losses::cuda
