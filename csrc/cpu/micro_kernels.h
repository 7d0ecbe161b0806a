// oneDNN's micro-kernels, C = A · B or C += A · B with a float32 or int32 result, of row-major A [M, K] and B [K, N]; B of
// half-precision numbers in pairs along K, [K / 2, N, 2], of 8-bit ones in fours. PyTorch exports them but not in its
// stable interface: the symbols are weak, and their mangled names carry the types of all arguments, so a PyTorch without
// them, or with others, leaves null here. `brgemm_release` at the end of a thread's work.
#pragma once

#include <cstdint>
#include <type_traits>

namespace c10 {
struct BFloat16;
}

namespace at::native::cpublas {
[[gnu::weak]] void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
                          const float* A, const float* B, float* C, bool is_vnni);
[[gnu::weak]] void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
                          const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
[[gnu::weak]] void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
                          const unsigned char* A, const signed char* B, int32_t* C, bool is_vnni);
[[gnu::weak]] void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace fused_losses {

// T: float or uint16_t, the bits of a bfloat16.
template <class T>
using MicroKernelNumber = std::conditional_t<std::is_same_v<T, uint16_t>, c10::BFloat16, T>;
template <class A, class B = A, class C = float>
using MicroKernel = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const MicroKernelNumber<A>*,
                             const MicroKernelNumber<B>*, C*, bool);

// Null where PyTorch has none.
template <class A, class B = A, class C = float>
MicroKernel<A, B, C> micro_kernel() {
  MicroKernel<A, B, C> kernel = at::native::cpublas::brgemm;
  return at::native::cpublas::brgemm_release ? kernel : nullptr;
}

}  // namespace fused_losses
