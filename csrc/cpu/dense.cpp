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

constexpr int64_t IDS = 128, COLUMNS = 64;  // of a block and a panel of `add_outer`
// Columns of a panel of `times_weight`, and ids that are summed before they are added to the others. Measured: panels of 64
// take as long, and 12 % longer where two threads have 5 and 4 of them.
constexpr int64_t PANEL = 32, STEP = 512;

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

// out += factor · row
void add_row(float factor, const uint16_t* row, int64_t size, float* out) {
  for (int64_t d = 0; d < size; d++) out[d] += factor * from_bf16(row[d]);
}

Product product() { return kernels().transposed_bf16 ? micro_kernel<uint16_t>() : nullptr; }

}  // namespace

bool large_numbers(const float* direction, float* large_from, int64_t tokens, int64_t V) {
  if (!product()) return false;
  parallel(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) large_from[t] = kernels().large_from(direction + t * V, V);
  });
  return true;
}

// A block of ids, its directions transposed in a core's cache, times panels of the hidden states (packed once per call):
// each number of the sum is read and written once, and again for the large ones.
bool add_outer(const float* direction, const float* large_from, const uint16_t* hidden, float* total, int64_t tokens,
               int64_t V, int64_t D) {
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
    Aligned<Large> large(tokens * MOST_LARGE);
    for (int64_t begin, end; next(begin, end);) {
      const Large* last = kernels().transposed_bf16(direction + begin, V, tokens, end - begin, large_from, block.data,
                                                    depth, large.data);
      for (int64_t p = 0; p < panels; p++)
        brgemm(end - begin, std::min(COLUMNS, D - p * COLUMNS), depth, depth, COLUMNS, D, true, (const Number*)block.data,
               (const Number*)(packed.data + p * depth * COLUMNS), total + begin * D + p * COLUMNS, true);
      for (const Large* l = large.data; l < last; l++)
        add_row(l->rest, hidden + l->token * D, D, total + (begin + l->id) * D);
    }
    at::native::cpublas::brgemm_release(true);
  });
  return true;
}

// Directions become bfloat16 first, by steps of STEP ids, in `narrow`: [tokens, STEP] one after the other. Then each thread
// has panels of its own of the result, for which it packs the weight's columns a step at a time.
bool times_weight(const float* direction, const float* large_from, const uint16_t* weight, uint16_t* narrow, float* out,
                  float* lost, int64_t tokens, int64_t V, int64_t D) {
  const Product brgemm = product();
  if (!brgemm) return false;
  if (V == 0) std::fill(out, out + tokens * D, 0.0f);
  const int64_t even = V / 2 * 2, steps = (even + STEP - 1) / STEP;
  Aligned<Large> large(tokens * MOST_LARGE);
  Aligned<Large*> ends(tokens);
  parallel(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      Large* last = large.data + t * MOST_LARGE;
      lost[t] = 0;
      for (int64_t first = 0; first < even; first += STEP) {
        const int64_t ids = std::min(STEP, even - first);
        last = kernels().narrow_bf16(direction + t * V + first, ids, first, large_from[t],
                                     narrow + tokens * first + t * ids, lost + t, last);
      }
      ends.data[t] = last;
    }
  });
  const int64_t panels = (D + PANEL - 1) / PANEL;
  parallel(panels, [&](int64_t begin, int64_t end) {
    Aligned<uint16_t> packed(STEP * PANEL);
    for (int64_t s = 0; s < steps; s++) {
      const int64_t first = s * STEP, ids = std::min(STEP, even - first);
      for (int64_t p = begin; p < end; p++) {
        const int64_t column = p * PANEL, columns = std::min(PANEL, D - column);
        pack(weight + first * D + column, D, ids, columns, PANEL, packed.data);
        brgemm(tokens, columns, ids, ids, PANEL, D, s > 0, (const Number*)(narrow + tokens * first),
               (const Number*)packed.data, out + column, true);
      }
    }
    at::native::cpublas::brgemm_release(true);
    const int64_t column = begin * PANEL, columns = std::min(end * PANEL, D) - column;
    for (int64_t t = 0; t < tokens; t++) {
      float* to = out + t * D + column;
      if (even < V) {  // the last id has no pair
        if (!steps) std::fill(to, to + columns, 0.0f);
        add_row(direction[t * V + even], weight + even * D + column, columns, to);
      }
      for (const Large* l = large.data + t * MOST_LARGE; l < ends.data[t]; l++)
        add_row(l->rest, weight + l->id * D + column, columns, to);
    }
  });
  return true;
}

}  // namespace fused_losses
