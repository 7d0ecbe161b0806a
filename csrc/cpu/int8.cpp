// The forward product from 8-bit operands: rows of the weight are quantised on the way, a block at a time, in a core's
// cache, so that the head is not copied, but for the part that `int8_head` keeps. Tokens have scales of their own, and
// so have the weight's rows.
//
// Products: oneDNN's u8 · s8 micro-kernel, which PyTorch exports (micro_kernels.h), where the processor has VNNI or AMX;
// else `multiply_int8`. Tokens have an offset of 128, which the sums of the weight's rows take out again.
#include "kernels.h"
#include "micro_kernels.h"

#include <algorithm>
#include <exception>
#include <string>
#include <vector>

namespace fused_losses {
namespace {

constexpr int64_t TOKENS = 128, DEPTH = 512;  // of one product, about: a block of the weight of that depth stays in cache

bool processor_has_vnni() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

void quantize_block(const Int8Head& head, int64_t block, uint8_t* out, float* scales, int32_t* sums) {
  const int64_t first = block * INT8_VOCABULARY, size = head.element == Element::Float32 ? 4 : 2;
  kernels().quantize_weight((const char*)head.weight + first * head.hidden * size, head.element, head.channel,
                            std::min(INT8_VOCABULARY, head.vocabulary - first), head.hidden, head.padded(), out, scales,
                            sums);
}

// About DEPTH, and `padded` in pieces of nearly the same size.
int64_t depth_of(int64_t padded) {
  const int64_t pieces = std::max<int64_t>(1, (padded + DEPTH / 2) / DEPTH);
  return (padded / pieces + 63) / 64 * 64;
}

// Tried on a product of ones: oneDNN may be told to leave VNNI alone (ONEDNN_MAX_CPU_ISA), and then throws.
bool has_micro_kernel() {
  if (!micro_kernel<uint8_t, int8_t, int32_t>() || !processor_has_vnni() || kernels().name != std::string("AVX-512"))
    return false;
  try {
    constexpr int64_t DEPTH_TRIED = 64;
    const std::vector<uint8_t> ones(DEPTH_TRIED * INT8_VOCABULARY, 1);
    std::vector<int32_t> products(INT8_VOCABULARY);
    at::native::cpublas::brgemm(1, INT8_VOCABULARY, DEPTH_TRIED, DEPTH_TRIED, INT8_VOCABULARY, INT8_VOCABULARY, false,
                                ones.data(), (const signed char*)ones.data(), products.data(), true);
    at::native::cpublas::brgemm_release(true);
    return std::count(products.begin(), products.end(), DEPTH_TRIED) == INT8_VOCABULARY;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

bool int8_is_fast() {
  static const bool fast = has_micro_kernel();
  return fast;
}

void int8_head(const Int8Head& head, const float* tokens, int64_t count, const float* bias, float* out, float* scales) {
  const int64_t W = INT8_VOCABULARY, blocks = tokens ? (head.vocabulary + W - 1) / W : head.kept;
  fault_in(head.blocks, head.kept * head.padded() * W);
  parallel(blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      if (block < head.kept)
        quantize_block(head, block, head.blocks + block * head.padded() * W, head.scales + block * W,
                       head.sums + block * W);
      if (!tokens) continue;
      const int64_t first = block * W, last = std::min(first + W, head.vocabulary);
      kernels().few_products(tokens, count, head.weight, head.element, head.vocabulary, head.hidden, bias, out, first, last);
      if (block < head.kept) std::copy(head.scales + first, head.scales + last, scales + first);
      else kernels().scales_of_weight(head.weight, head.element, head.channel, head.hidden, scales, first, last);
    }
  });
}

// begin(block, scales and sums of its rows), then finish(block, first token, so many, their products, their scales).
template <class Block>
static void products(const void* hidden, Element element, const float* inverse, const Int8Head& head, int64_t N,
                     const Block& start) {
  const int64_t V = head.vocabulary, D = head.hidden, padded = head.padded(), W = INT8_VOCABULARY;
  const int64_t panels = (N + TOKENS - 1) / TOKENS, depth = depth_of(padded);
  const int64_t size = element == Element::Float32 ? 4 : 2;
  const bool fast = int8_is_fast();
  Aligned<uint8_t> tokens(N * padded);
  Aligned<float> token_scales(N), shifts(N);
  parallel(panels, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * TOKENS, last = std::min(end * TOKENS, N);
    kernels().quantize_tokens((const char*)hidden + first * D * size, element, inverse, head.mean, last - first, D,
                              padded, tokens.data + first * padded, token_scales.data + first, shifts.data + first);
  });
  shared((V + W - 1) / W, 1, [&](auto& next) {
    Aligned<uint8_t> own(padded * W);
    Aligned<float> own_scales(W);
    Aligned<int32_t> own_sums(W), tile(TOKENS * W);
    Block of_block = start;
    for (int64_t block, end; next(block, end);) {
      const bool kept = block < head.kept;
      const uint8_t* weight = kept ? head.blocks + block * padded * W : own.data;
      const float* scales = kept ? head.scales + block * W : own_scales.data;
      const int32_t* sums = kept ? head.sums + block * W : own_sums.data;
      if (!kept) quantize_block(head, block, own.data, own_scales.data, own_sums.data);
      of_block.begin(block, scales, sums);
      for (int64_t first = 0; first < N; first += TOKENS) {
        const int64_t count = std::min(TOKENS, N - first);
        if (fast)
          for (int64_t k = 0; k < padded; k += depth)
            at::native::cpublas::brgemm(count, W, std::min(depth, padded - k), padded, W, W, k > 0,
                                        tokens.data + first * padded + k, (const signed char*)weight + k * W, tile.data,
                                        true);
        else kernels().multiply_int8(tokens.data + first * padded, weight, count, padded, tile.data);
        of_block.finish(block, first, count, tile.data, token_scales.data + first, shifts.data + first);
      }
    }
    if (fast) at::native::cpublas::brgemm_release(true);
    end_streams();
  });
}

void int8_logits(const void* hidden, Element element, const float* inverse, const Int8Head& head, const float* bias,
                 float* out, int64_t N) {
  struct Block {
    float* out;
    const float* bias;
    int64_t vocabulary;
    const float* scales = nullptr;
    const int32_t* sums = nullptr;

    void begin(int64_t, const float* of_rows, const int32_t* sums_of_rows) { scales = of_rows, sums = sums_of_rows; }
    void finish(int64_t block, int64_t first, int64_t count, const int32_t* tile, const float* token_scales,
                const float* shifts) {
      const int64_t v = block * INT8_VOCABULARY;
      for (int64_t t = 0; t < count; t++)
        kernels().scale_products(tile + t * INT8_VOCABULARY, sums, token_scales[t], shifts[t], scales,
                                 bias ? bias + v : nullptr, std::min(INT8_VOCABULARY, vocabulary - v),
                                 out + (first + t) * vocabulary + v);
    }
  };
  products(hidden, element, inverse, head, N, Block{out, bias, head.vocabulary});
}

void half_logits(const void* hidden, Element element, const float* inverse, const Int8Head& head, const float* bias,
                 float factor, const HalfChunk& out, int64_t N) {
  struct Block {
    const HalfChunk& out;
    const float* bias;
    float factor;
    HalfBlock of = {};

    void begin(int64_t block, const float* scales, const int32_t* sums) {
      const int64_t first = block * INT8_VOCABULARY;
      of.ids = std::min(INT8_VOCABULARY, out.vocabulary - first), of.has_bias = bias;
      for (int64_t v = 0; v < of.ids; v++) {
        of.scales[v] = scales[v], of.rest[v] = -128.0f * (float)sums[v] * scales[v];
        if (bias) of.bias[v] = std::max(bias[first + v], -1e30f);
      }
    }
    void finish(int64_t block, int64_t first, int64_t count, const int32_t* tile, const float* token_scales,
                const float* shifts) {
      kernels().half_products(tile, of, token_scales, shifts, count, factor, out, first, block);
    }
  };
  products(hidden, element, inverse, head, N, Block{out, bias, factor});
}

}  // namespace fused_losses
