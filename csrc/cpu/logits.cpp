// The forward product with a float32 result, from oneDNN's micro-kernels; without them `logits` returns false.
//
// A block of the vocabulary (rows of the weight, read as they lie) times panels of tokens (packed once per call) gives
// logits[v, t], transposed as they are written. Measured on 2 cores of a Zen 4 server: float32 1.5 times as fast as
// torch.mm (MKL), bfloat16 as fast as torch.mm, whose result would be rounded to bfloat16.
#include "kernels.h"
#include "micro_kernels.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace fused_losses {
namespace {

constexpr int64_t MOST_TOKENS = 64, VOCABULARY = 64;  // of a panel and a block
// Terms of a dot product that are summed before they are added to the others, in bytes of an operand's row: short sums
// round less. Measured: half the error of sums of 512, in the same time.
constexpr int64_t DEPTH_BYTES = 256;

// `tokens` rows as [D][tokens]; bfloat16 in pairs, [D / 2][tokens][2], without a last number that has none. Zeros beyond
// the last valid one.
template <class T>
void pack(const T* hidden, T* panel, int64_t tokens, int64_t valid, int64_t D) {
  constexpr int64_t pair = 4 / sizeof(T);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t d = 0; d + pair <= D; d += pair) {
      T* to = panel + d * tokens + t * pair;
      if (t < valid) std::memcpy(to, hidden + t * D + d, 4);
      else std::memset(to, 0, 4);
    }
}

float wide(float x) { return x; }
float wide(uint16_t x) { return from_bf16(x); }

// Of so few tokens that reading the weight takes the time: rows one after the other, as memory likes them best.
template <class T>
void few(const T* hidden, const T* weight, const float* bias, float* out, int64_t N, int64_t V, int64_t D) {
  Aligned<float> tokens((N + FEW_TOKENS - 1) / FEW_TOKENS * FEW_TOKENS * D);
  for (int64_t i = 0; i < N * D; i++) tokens.data[i] = wide(hidden[i]);
  std::fill(tokens.data + N * D, tokens.data + (N + FEW_TOKENS - 1) / FEW_TOKENS * FEW_TOKENS * D, 0.0f);
  parallel(V, [&](int64_t begin, int64_t end) {
    kernels().few_products(tokens.data, N, weight, sizeof(T) == 4 ? Element::Float32 : Element::BFloat16, V, D, bias,
                           out, begin, end);
  });
}

template <class T>
bool product(const T* hidden, const T* weight, const float* bias, float* out, int64_t N, int64_t V, int64_t D) {
  constexpr bool vnni = sizeof(T) == 2;
  using Argument = MicroKernelNumber<T>;
  const MicroKernel<T> brgemm = micro_kernel<T>();
  if (!brgemm) return false;

  const int64_t paired = vnni ? D / 2 * 2 : D;  // the last of an odd number has no pair
  if (N <= (vnni ? 1 : 2) * FEW_TOKENS || paired == 0) {
    few(hidden, weight, bias, out, N, V, D);
    return true;
  }
  constexpr int64_t DEPTH = DEPTH_BYTES / sizeof(T);
  const int64_t tokens = N <= 16 ? 16 : N <= 32 ? 32 : MOST_TOKENS;
  const int64_t panels = (N + tokens - 1) / tokens, blocks = (V + VOCABULARY - 1) / VOCABULARY;
  Aligned<T> packed(panels * tokens * D);
  parallel(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      pack(hidden + p * tokens * D, packed.data + p * tokens * D, tokens, std::min(tokens, N - p * tokens), D);
  });
  parallel(blocks, [&](int64_t begin, int64_t end) {
    Aligned<float> tile(panels * tokens * VOCABULARY);
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * VOCABULARY, rows = std::min(VOCABULARY, V - first);
      for (int64_t k = 0; k < paired; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, paired - k);
        for (int64_t p = 0; p < panels; p++)
          brgemm(rows, tokens, depth, D, tokens, tokens, k > 0, (const Argument*)(weight + first * D + k),
                 (const Argument*)(packed.data + p * tokens * D + k * tokens), tile.data + p * tokens * VOCABULARY,
                 vnni);
      }
      for (int64_t t = 0; t < N; t++) {
        const float* from = tile.data + t / tokens * tokens * VOCABULARY + t % tokens;
        float* to = out + t * V + first;
        if (bias)
          for (int64_t v = 0; v < rows; v++) to[v] = from[v * tokens] + bias[first + v];
        else
          for (int64_t v = 0; v < rows; v++) to[v] = from[v * tokens];
        if (paired < D)
          for (int64_t v = 0; v < rows; v++) to[v] += wide(hidden[t * D + paired]) * wide(weight[(first + v) * D + paired]);
      }
    }
    at::native::cpublas::brgemm_release(vnni);
  });
  return true;
}

}  // namespace

bool logits(const void* hidden, const void* weight, Element element, const float* bias, float* out, int64_t tokens,
            int64_t vocabulary, int64_t hidden_size) {
  if (element == Element::Float32)
    return product((const float*)hidden, (const float*)weight, bias, out, tokens, vocabulary, hidden_size);
  return product((const uint16_t*)hidden, (const uint16_t*)weight, bias, out, tokens, vocabulary, hidden_size);
}

}  // namespace fused_losses
