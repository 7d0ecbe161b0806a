// The products of a chunk's directions with the head and with the hidden states, from oneDNN's micro-kernels: directions
// rounded to bfloat16, sums in float32. PyTorch's product of bfloat16 matrices would round each chunk's sum, and that of
// float32 ones takes twice as long (measured on a Zen 4 server: 2.1 times).
#include "kernels.h"
#include "micro_kernels.h"

#include <algorithm>
#include <cstring>

namespace fused_losses {
namespace {

using Number = MicroKernelNumber<uint16_t>;
using Product = MicroKernel<uint16_t>;

constexpr int64_t IDS = 128, COLUMNS = 64;  // of a block of `add_outer` and of a panel
constexpr int64_t STEP = 512;               // ids of `times_weight` that are summed before they are added to the others

// `rows` rows as pairs, [⌈rows / 2⌉][width][2], of `valid` numbers each, with zeros beyond.
void pack(const uint16_t* matrix, int64_t stride, int64_t rows, int64_t valid, int64_t width, uint16_t* panel) {
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t *first = matrix + i * stride, *second = first + (i + 1 < rows ? stride : 0);
    const uint16_t mask = i + 1 < rows ? 0xffff : 0;
    uint16_t* to = panel + i * width;
    for (int64_t d = 0; d < valid; d++) to[2 * d] = first[d], to[2 * d + 1] = second[d] & mask;
    std::memset(to + 2 * valid, 0, (width - valid) * 2 * sizeof(uint16_t));
  }
}

Product product() { return kernels().transposed_bf16 ? micro_kernel<uint16_t>() : nullptr; }

// Of panels: so many that the threads have nearly the same number. Narrow ones take longer (measured: 48 columns 3 %, 32
// 15 %).
int64_t panel_width(int64_t D) {
  constexpr struct { int64_t width; double speed; } CHOICES[] = {{64, 1}, {48, 0.97}, {32, 0.85}};
  const int64_t T = threads();
  int64_t best = 0;
  double fastest = 0;
  for (const auto& [width, speed] : CHOICES) {
    const int64_t each = ((D + width - 1) / width + T - 1) / T;  // panels of a thread
    const double here = speed / (double)(each * width);
    if (here > fastest) fastest = here, best = width;
  }
  return best;
}

}  // namespace

// A block of ids, its directions transposed in a core's cache, times panels of the hidden states (packed once per call):
// each number of the sum is read and written once.
bool add_outer(const float* direction, const uint16_t* hidden, float* total, int64_t tokens, int64_t V, int64_t D) {
  const Product brgemm = product();
  if (!brgemm) return false;
  const int64_t depth = (tokens + 1) / 2 * 2, panels = (D + COLUMNS - 1) / COLUMNS;
  Aligned<uint16_t> packed(panels * depth * COLUMNS);
  parallel(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      pack(hidden + p * COLUMNS, D, tokens, std::min(COLUMNS, D - p * COLUMNS), COLUMNS,
           packed.data + p * depth * COLUMNS);
  });
  shared(V, IDS, [&](const auto& next) {
    Aligned<uint16_t> block(IDS * depth);
    for (int64_t begin, end; next(begin, end);) {
      kernels().transposed_bf16(direction + begin, V, tokens, end - begin, block.data, depth);
      for (int64_t p = 0; p < panels; p++)
        brgemm(end - begin, std::min(COLUMNS, D - p * COLUMNS), depth, depth, COLUMNS, D, true, (const Number*)block.data,
               (const Number*)(packed.data + p * depth * COLUMNS), total + begin * D + p * COLUMNS, true);
    }
    at::native::cpublas::brgemm_release(true);
  });
  return true;
}

// Directions become bfloat16 first, by steps of STEP ids, in `narrow`: [tokens, STEP] one after the other. Then each thread
// has panels of its own of the result, for which it packs the weight's columns a step at a time.
bool times_weight(const float* direction, const uint16_t* weight, uint16_t* narrow, float* out, float* lost,
                  int64_t tokens, int64_t V, int64_t D) {
  const Product brgemm = product();
  if (!brgemm) return false;
  if (V == 0) std::fill(out, out + tokens * D, 0.0f);
  const int64_t even = V / 2 * 2, steps = (even + STEP - 1) / STEP;
  Aligned<float> lost_of(std::max<int64_t>(1, steps * tokens));
  parallel(steps, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      const int64_t first = s * STEP, ids = std::min(STEP, even - first);
      for (int64_t t = 0; t < tokens; t++)
        lost_of.data[s * tokens + t] =
            kernels().narrow_bf16(direction + t * V + first, ids, narrow + tokens * first + t * ids);
    }
  });
  for (int64_t t = 0; t < tokens; t++) {
    double sum = 0;
    for (int64_t s = 0; s < steps; s++) sum += lost_of.data[s * tokens + t];
    lost[t] = (float)sum;
  }
  const int64_t width = panel_width(D), panels = (D + width - 1) / width;
  parallel(panels, [&](int64_t begin, int64_t end) {
    Aligned<uint16_t> packed(STEP * width);
    for (int64_t s = 0; s < steps; s++) {
      const int64_t first = s * STEP, ids = std::min(STEP, even - first);
      for (int64_t p = begin; p < end; p++) {
        const int64_t column = p * width, columns = std::min(width, D - column);
        pack(weight + first * D + column, D, ids, columns, width, packed.data);
        brgemm(tokens, columns, ids, ids, width, D, s > 0, (const Number*)(narrow + tokens * first),
               (const Number*)packed.data, out + column, true);
      }
    }
    at::native::cpublas::brgemm_release(true);
    if (even < V)  // the last id has no pair
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = begin * width; d < std::min(end * width, D); d++)
          out[t * D + d] = (steps ? out[t * D + d] : 0) + direction[t * V + even] * from_bf16(weight[even * D + d]);
  });
  return true;
}

}  // namespace fused_losses
