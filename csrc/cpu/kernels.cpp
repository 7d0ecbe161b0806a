// The kernels once per instruction set, and the choice among them when the library is loaded.
#include "kernels.h"

#include <cmath>
#include <cstdlib>
#include <string>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FL_X86 1
#else
#define FL_X86 0
#endif
#if FL_X86
#include <immintrin.h>
// Instructions of two vectors interleave: one alone has long chains that the processor waits for. Measured with
// AVX-512: of the passes with a logarithm, 22.8 ns a vector become 17.8.
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif

// For what stands in an inner loop: a vector that passes through memory costs more than most of these.
#define FL_INLINE inline __attribute__((always_inline))
#define FL_TABLE(name, ...) \
  {name, compact, tail_profile, exact_statistics, exact_directions, rows_product, columns_product, weighted_sum, \
   few_products, quantize_tokens, quantize_weight, scales_of_weight, multiply_int8, scale_products, __VA_ARGS__}
#define FL_HALF compact_half, half_tail_profile, half_products, scale_entries, halve_entries, label_logits

#if FL_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace fused_losses::avx512 {
#define LANES 16
#include "vector.inc"
#include "rows.inc"
#include "products.inc"
#include "refine.inc"
#include "directions.inc"
#include "bf16.inc"
#include "exact.inc"
#include "quantize.inc"
#include "half.inc"
#include "entries.inc"
#undef LANES
static const Kernels table = FL_TABLE("AVX-512", FL_HALF, nullptr, nullptr, nullptr);
static const Kernels table_bf16 = FL_TABLE("AVX-512", FL_HALF, large_from, transposed_bf16, narrow_bf16);
}  // namespace fused_losses::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fused_losses::avx2 {
#define LANES 8
#include "vector.inc"
#include "rows.inc"
#include "products.inc"
#include "refine.inc"
#include "directions.inc"
#include "exact.inc"
#include "quantize.inc"
#include "half.inc"
#include "entries.inc"
#undef LANES
static const Kernels table = FL_TABLE("AVX2", FL_HALF, nullptr, nullptr, nullptr);
}  // namespace fused_losses::avx2
#pragma GCC pop_options
#endif

namespace fused_losses::baseline {
#define LANES 4
#include "vector.inc"
#include "rows.inc"
#include "products.inc"
#include "refine.inc"
#include "directions.inc"
#include "exact.inc"
#include "quantize.inc"
#undef LANES
static const Kernels table = FL_TABLE("128-bit SIMD", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
}  // namespace fused_losses::baseline

namespace fused_losses {

// FUSED_LOSSES_SIMD=avx2 or baseline, read once at the first call, is for tests of the other versions.
static const Kernels& choose() {
  const char* wanted = std::getenv("FUSED_LOSSES_SIMD");
  const std::string name = wanted ? wanted : "";
#if FL_X86
  if (name != "avx2" && name != "baseline" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? avx512::table_bf16 : avx512::table;
  if (name != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return avx2::table;
#endif
  return baseline::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fused_losses
