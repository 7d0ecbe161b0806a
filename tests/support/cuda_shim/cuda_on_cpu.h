// What the .cu files of csrc/cuda need of CUDA, for g++: it is included before them (-x c++ -include). Blocks run one after
// the other, the threads of a block as fibres of one thread of the system (fibres.cpp). Blocks of a cluster run together, each
// with shared memory of its own, so distributed shared memory works too.
//
// What it finds: barriers, shuffles and ballots that not all threads reach; 16-byte loads that are not aligned; dynamic
// shared memory read before it is written (it starts as NaN), written just beyond its end, or read after its block has ended;
// with `reversed`, results that depend on the order in which blocks, warps and lanes run, as where a barrier is missing.
// What it cannot find: anything of the memory model, of launch limits and of speed.
#pragma once

#define FUSED_LOSSES_ON_CPU

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- Threads

namespace shim {

struct Thread {
  dim3 thread_index, block_index;
  unsigned lane, rank;          // in the warp; of the block in its cluster
  unsigned exchanges;           // shuffles and ballots so far
  uint64_t (*slots)[32];        // [2][32] of the warp
  unsigned char* const* shared;  // of each block of the cluster
  size_t* running;               // threads of each that have not ended
};
extern Thread* current;
extern dim3 block_dim, grid_dim;
extern unsigned cluster_blocks;
// Set by the tests: bytes a block of a cluster may have, 0: no clusters; and whether everything runs in reverse order.
extern int64_t cluster_limit;
extern bool reversed;

enum class Scope { Warp, Block, Cluster };
void wait(Scope, const char* what);
void run(const char* name, dim3 grid, dim3 block, int64_t shared_bytes, int cluster_size, const std::function<void()>& kernel);

// All lanes give a value; returns where they are. The next exchange uses the other half, so one barrier is enough.
inline const uint64_t* exchange(uint64_t value, const char* what) {
  uint64_t* slots = current->slots[current->exchanges++ % 2];
  slots[current->lane] = value;
  wait(Scope::Warp, what);
  return slots;
}

template <class X>
X shuffle(unsigned mask, X x, unsigned from, const char* what) {
  static_assert(sizeof(X) <= 8);
  if (mask != 0xffffffffu) throw std::runtime_error(std::string(what) + ": only full masks are supported");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  const uint64_t got = exchange(bits, what)[from];
  std::memcpy(&x, &got, sizeof x);
  return x;
}

}  // namespace shim

#define threadIdx (::shim::current->thread_index)
#define blockIdx (::shim::current->block_index)
#define blockDim (::shim::block_dim)
#define gridDim (::shim::grid_dim)

inline void __syncthreads() { shim::wait(shim::Scope::Block, "__syncthreads"); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::wait(shim::Scope::Warp, "__syncwarp"); }
template <class X>
X __shfl_sync(unsigned mask, X x, int lane) {
  return shim::shuffle(mask, x, static_cast<unsigned>(lane) % 32, "__shfl_sync");
}
template <class X>
X __shfl_xor_sync(unsigned mask, X x, int lanes) {
  return shim::shuffle(mask, x, shim::current->lane ^ static_cast<unsigned>(lanes), "__shfl_xor_sync");
}
template <class X>
X __shfl_up_sync(unsigned mask, X x, unsigned by) {
  const unsigned lane = shim::current->lane;
  return shim::shuffle(mask, x, lane >= by ? lane - by : lane, "__shfl_up_sync");
}
template <class X>
X __shfl_down_sync(unsigned mask, X x, unsigned by) {
  const unsigned lane = shim::current->lane;
  return shim::shuffle(mask, x, lane + by < 32 ? lane + by : lane, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned, bool yes) {
  const uint64_t* votes = shim::exchange(yes, "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= static_cast<unsigned>(votes[i]) << i;
  return bits;
}
template <class X>
X atomicAdd(X* at, X x) {
  const X old = *at;
  *at += x;
  return old;
}

// ---- Vectors, bits, numbers

struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class X>
X __ldg(const X* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(X)) throw std::runtime_error("a load is not aligned to its size");
  return *p;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float __int_as_float(int u) { return __uint_as_float(static_cast<uint32_t>(u)); }
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
struct __half_raw { unsigned short x; };
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(__half_raw raw) : bits(raw.x) {}
};
inline float __half2float(__half x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
}
inline __half __float2half_rn(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  __half_raw raw;
  std::memcpy(&raw.x, &h, 2);
  return __half(raw);
}

// ---- Launching, as in common.cuh

#define FL_LAUNCH(name, kernel, grid, block, shared_bytes, stream, ...) \
  static_cast<void>(stream);                                            \
  ::shim::run(name, grid, block, shared_bytes, 1, [&] { kernel(__VA_ARGS__); })
#define FL_DYNAMIC_SHARED(name) unsigned char* name = ::shim::current->shared[::shim::current->rank]
#define FL_CLUSTERS 1

struct CUstream_st;
namespace fused_losses::cuda {
using Stream = CUstream_st*;

inline int multiprocessors() { return 4; }

template <class Kernel>
void allow_shared(Kernel, int64_t bytes, const char* name) {
  if (bytes > 227 << 10) throw std::runtime_error(std::string(name) + ": more shared memory than any device has");
}
template <class Kernel>
int64_t cluster_shared_limit(Kernel) {
  return shim::cluster_limit;
}
template <class Argument>
bool launch_clusters(void (*kernel)(Argument), int64_t clusters, int cluster_size, int threads, int64_t shared_bytes,
                     Stream, const Argument& argument, const char* name) {
  shim::run(name, dim3(static_cast<unsigned>(clusters * cluster_size)), dim3(static_cast<unsigned>(threads)),
            shared_bytes, cluster_size, [&] { kernel(argument); });
  return true;
}
inline unsigned cluster_rank() { return shim::current->rank; }
inline unsigned cluster_blocks() { return shim::cluster_blocks; }
inline void cluster_sync() { shim::wait(shim::Scope::Cluster, "cluster_sync"); }
template <class X>
const X* of_rank(X* shared, unsigned rank) {
  if (shim::current->running[rank] == 0) throw std::runtime_error("shared memory of a block that has ended is read");
  const auto offset = reinterpret_cast<unsigned char*>(shared) - shim::current->shared[shim::current->rank];
  return reinterpret_cast<const X*>(shim::current->shared[rank] + offset);
}
}  // namespace fused_losses::cuda
