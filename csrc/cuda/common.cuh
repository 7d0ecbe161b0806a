// What the kernels share: 16-byte words of elements, sums over a warp, the formulas of a logit and of p − p_ref, and
// how kernels are launched. Where FUSED_LOSSES_ON_CPU is defined, tests/support/cuda_shim/cuda_on_cpu.h stands in for
// CUDA's own headers.
#pragma once

#include "kernels.h"

#ifndef FUSED_LOSSES_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// A kernel is launched through this macro only, so that the tests can run it on a CPU.
#define FL_LAUNCH(name, kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__);           \
  ::fused_losses::cuda::check(cudaGetLastError(), name)
#define FL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fused_losses::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LEAST_LOGIT = -1e30f;  // where a bias rules a token out by −inf: 0 · ∞ must not occur
// −inf by its bits: the macro INFINITY is a conversion that overflows, which compilers warn about.
__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// ---- Launching

#ifndef FUSED_LOSSES_ON_CPU
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// More than 48 KB of dynamic shared memory must be asked for.
template <class Kernel>
void allow_shared(Kernel kernel, int64_t bytes, const char* name) {
  if (bytes <= 48 << 10) return;
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (bytes > most)
    throw std::runtime_error(std::string(name) + ": shared memory a block: expected at most " + std::to_string(most) +
                             " bytes, which this device has, got " + std::to_string(bytes));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

// Shared memory a block of a cluster may have, in bytes; 0 where there are no clusters: before sm_90, or where the code
// was compiled for an earlier architecture and translated when loaded.
template <class Kernel>
int64_t cluster_shared_limit(Kernel kernel) {
  if (!device_attribute(cudaDevAttrClusterLaunch)) return 0;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  if (attributes.ptxVersion < 90) return 0;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// False, and nothing launched, where no such cluster fits the device (for example a part of one).
template <class Argument>
bool launch_clusters(void (*kernel)(Argument), int64_t clusters, int cluster_size, int threads, int64_t shared_bytes,
                     Stream stream, const Argument& argument, const char* name) {
  allow_shared(kernel, shared_bytes, name);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster_size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster_size));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int fitting = 0;
  if (cudaOccupancyMaxActiveClusters(&fitting, kernel, &config) != cudaSuccess || fitting < 1) {
    cudaGetLastError();  // the answer is no; the error is not one of the next call
    return false;
  }
  check(cudaLaunchKernelEx(&config, kernel, argument), name);
  return true;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ unsigned cluster_blocks() { return __clusterSizeInBlocks(); }
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
// The same place in the shared memory of another block of the cluster.
template <class X>
__device__ __forceinline__ const X* of_rank(X* shared, unsigned rank) {
  return static_cast<const X*>(__cluster_map_shared_rank(shared, rank));
}
#define FL_CLUSTERS 1
#else
#define FL_CLUSTERS 0
#endif
#endif  // FUSED_LOSSES_ON_CPU

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }  // true of null

// ---- Elements, 16 bytes at a time

template <class T>
constexpr int ELEMENTS = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

template <class T>
struct Pair;  // two elements in 32 bits
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack(uint32_t u) {
    return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
  }
};
template <>
struct Pair<__half> {
  static __device__ __forceinline__ float2 unpack(uint32_t u) {
    const __half_raw low = {static_cast<unsigned short>(u)}, high = {static_cast<unsigned short>(u >> 16)};
    return make_float2(__half2float(__half(low)), __half2float(__half(high)));
  }
};

template <class T>
__device__ __forceinline__ void unpack(const uint4& word, float (&x)[ELEMENTS<T>]) {
  const uint32_t u[4] = {word.x, word.y, word.z, word.w};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __uint_as_float(u[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = Pair<T>::unpack(u[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

// After this the compiler unpacks the word anew instead of keeping twice the registers from the last time.
__device__ __forceinline__ void keep_packed(uint4& word) {
  asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
}

// The bits of elements [first, first + 16 bytes) of a row of `size` elements, zeros beyond its end. VECTOR: the row
// starts at a multiple of 16 bytes and so does its end.
template <class T, bool VECTOR>
__device__ __forceinline__ uint4 load_word(const T* row, int64_t first, int64_t size) {
  if constexpr (VECTOR) {
    return first < size ? __ldg(reinterpret_cast<const uint4*>(row + first)) : make_uint4(0, 0, 0, 0);
  } else {
    constexpr int E = ELEMENTS<T>;
    uint32_t u[4] = {};
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (first + e >= size) continue;
      if constexpr (sizeof(T) == 4) {
        u[e] = __float_as_uint(row[first + e]);
      } else {
        u[e / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[first + e]) << (16 * (e % 2));
      }
    }
    return make_uint4(u[0], u[1], u[2], u[3]);
  }
}

// x as elements [first, first + E) of a row of `size`; VECTOR as above, for a type of 2 bytes with E = 4 its half.
template <class T, bool VECTOR, int E>
__device__ __forceinline__ void store_elements(T* row, int64_t first, int64_t size, const float (&x)[E]) {
  if constexpr (!VECTOR) {
#pragma unroll
    for (int e = 0; e < E; e++)
      if (first + e < size) row[first + e] = from_float<T>(x[e]);
  } else if constexpr (sizeof(T) == 4) {
    if (first >= size) return;
#pragma unroll
    for (int e = 0; e < E; e += 4)
      *reinterpret_cast<float4*>(row + first + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
  } else {
    if (first >= size) return;
    uint32_t u[E / 2];
#pragma unroll
    for (int e = 0; e < E; e += 2) {
      if constexpr (sizeof(T) == 2) {
        const T low = from_float<T>(x[e]), high = from_float<T>(x[e + 1]);
        u[e / 2] = *reinterpret_cast<const uint16_t*>(&low) |
                   static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&high)) << 16;
      }
    }
    if constexpr (E == 8) {
      *reinterpret_cast<uint4*>(row + first) = make_uint4(u[0], u[1], u[2], u[3]);
    } else {
      *reinterpret_cast<uint2*>(row + first) = make_uint2(u[0], u[1]);
    }
  }
}

// ---- Sums over the lanes of a warp, in a fixed order

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

// COUNT sums at once: lane l has the sum of x[l / (32 / COUNT)] over the warp. Each step halves how many numbers a lane
// has: 9 shuffles for 8 sums, where one after the other would take 40.
template <int COUNT>
__device__ __forceinline__ float warp_sums(float (&x)[COUNT], int lane) {
  int offset = 16;
#pragma unroll
  for (int half = COUNT / 2; half > 0; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; i++) {
      const float keep = upper ? x[i + half] : x[i], give = upper ? x[i] : x[i + half];
      x[i] = keep + __shfl_xor_sync(ALL_LANES, give, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], offset);
  return x[0];
}

// ---- Logits

__device__ __forceinline__ float at_least(float x) { return x < LEAST_LOGIT ? LEAST_LOGIT : x; }  // keeps NaN

// softcap · tanh(x / softcap); softcap 0: none.
struct Softcap {
  float cap, inverse;
  __host__ __device__ explicit Softcap(float softcap) : cap(softcap), inverse(softcap > 0 ? 1 / softcap : 0) {}
  __device__ __forceinline__ float operator()(float x) const { return cap > 0 ? cap * tanhf(x * inverse) : x; }
  __device__ __forceinline__ float slope(float z) const { return 1 - (z * inverse) * (z * inverse); }
};

// expm1(x) − x for |x| < 1 as x² Σ xᵏ / (k + 2)!: to the last digits also where it is tiny.
__device__ __forceinline__ float expm1_less_x(float x) {
  float s = 1.f / 39916800;
  s = fmaf(s, x, 1.f / 3628800);
  s = fmaf(s, x, 1.f / 362880);
  s = fmaf(s, x, 1.f / 40320);
  s = fmaf(s, x, 1.f / 5040);
  s = fmaf(s, x, 1.f / 720);
  s = fmaf(s, x, 1.f / 120);
  s = fmaf(s, x, 1.f / 24);
  s = fmaf(s, x, 1.f / 6);
  s = fmaf(s, x, 0.5f);
  return s * x * x;
}

// p − p_ref, which must not be a difference of two rounded numbers near the reference, and p − p_ref − p_ref · x ≥ 0,
// whose sum over v is the KL. x = log p − log p_ref.
struct Gap {
  float gap, excess;
  __device__ __forceinline__ Gap(float log_p, float log_p_ref, float x) {
    const float p_ref = expf(log_p_ref);
    if (fabsf(x) < 1) {
      const float s = expm1_less_x(x);
      gap = p_ref * (x + s);
      excess = p_ref * s;
    } else {
      gap = expf(log_p) - p_ref;
      excess = gap - (p_ref == 0 ? 0 : p_ref * x);
    }
  }
};

}  // namespace fused_losses::cuda
