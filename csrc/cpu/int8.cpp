// The forward product from 8-bit operands: rows of the weight are quantised on the way, a block at a time, in a core's
// cache, so that there is no copy of the head. Tokens have scales of their own, and so have the weight's rows.
//
// Products: oneDNN's u8 · s8 micro-kernel, which PyTorch exports (see logits.cpp), where the processor has VNNI or AMX;
// else `multiply_int8`. Tokens have an offset of 128, which the sums of the weight's rows take out again.
#include "kernels.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

namespace at::native::cpublas {
[[gnu::weak]] void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
                          const unsigned char* A, const signed char* B, int32_t* C, bool is_vnni);
[[gnu::weak]] void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace fused_losses {
namespace {

constexpr int64_t TOKENS = 64, DEPTH = 512;  // a block of the weight of about that depth stays in the first cache

template <class T>
struct Aligned {
  explicit Aligned(int64_t count) : data((T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) {
    if (!data) throw std::bad_alloc();
  }
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  T* data;
};

bool processor_has_vnni() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

bool int8_is_fast() {
  static const bool fast = at::native::cpublas::brgemm && at::native::cpublas::brgemm_release && processor_has_vnni() &&
                           kernels().name == std::string("AVX-512");
  return fast;
}

void int8_logits(const void* hidden, Element element, const float* inverse, const void* weight, Element weight_element,
                 const float* channel, const float* bias, float* out, int64_t N, int64_t V, int64_t D) {
  const int64_t padded = (D + 3) / 4 * 4, W = INT8_VOCABULARY, panels = (N + TOKENS - 1) / TOKENS;
  const auto row = [D](const void* rows, Element of, int64_t i) {
    return (const char*)rows + i * D * (of == Element::Float32 ? 4 : 2);
  };
  const int64_t depth = (padded / ((padded + DEPTH / 2) / DEPTH > 0 ? (padded + DEPTH / 2) / DEPTH : 1) + 63) / 64 * 64;
  const bool fast = int8_is_fast();
  Aligned<uint8_t> tokens(N * padded);
  Aligned<float> token_scales(N);
  parallel(panels, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * TOKENS, last = std::min(end * TOKENS, N);
    kernels().quantize_tokens(row(hidden, element, first), element, inverse, last - first, D, padded,
                              tokens.data + first * padded, token_scales.data + first);
  });
  parallel((V + W - 1) / W, [&](int64_t begin, int64_t end) {
    Aligned<uint8_t> block(padded * W);
    Aligned<float> scales(W);
    Aligned<int32_t> sums(W), tile(N * W);
    for (int64_t first = begin * W; first < std::min(end * W, V); first += W) {
      const int64_t rows = std::min(W, V - first);
      kernels().quantize_weight(row(weight, weight_element, first), weight_element, channel, rows, D, padded,
                                block.data, scales.data, sums.data);
      if (fast) {
        for (int64_t k = 0; k < padded; k += depth)
          for (int64_t t = 0; t < N; t += TOKENS)
            at::native::cpublas::brgemm(std::min(TOKENS, N - t), W, std::min(depth, padded - k), padded, W, W, k > 0,
                                        tokens.data + t * padded + k, (const signed char*)block.data + k * W,
                                        tile.data + t * W, true);
      } else {
        kernels().multiply_int8(tokens.data, block.data, N, padded, tile.data);
      }
      for (int64_t t = 0; t < N; t++)
        kernels().scale_products(tile.data + t * W, sums.data, token_scales.data[t], scales.data,
                                 bias ? bias + first : nullptr, rows, out + t * V + first);
    }
    if (fast) at::native::cpublas::brgemm_release(true);
  });
}

}  // namespace fused_losses
