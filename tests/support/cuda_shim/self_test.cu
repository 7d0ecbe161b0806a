// Kernels with mistakes, which the shim must find. Returns the length of the message; 0: no error.
#include "common.cuh"

namespace {

__global__ void block_barrier_missed(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void warp_barrier_missed(float* out) {
  float x = 1;
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(fused_losses::cuda::ALL_LANES, x, 1);
  out[threadIdx.x] = x;
}
__global__ void different_barriers(float* out) {
  float x = 1;
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(fused_losses::cuda::ALL_LANES, x, 1);
  else __syncwarp();
  out[threadIdx.x] = x;
}
__global__ void unaligned_load(float* out) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(out + 1));
  out[threadIdx.x] = static_cast<float>(x.x);
}
// No mistake: the sum over the block of the thread's number, with a ballot of the odd ones.
__global__ void correct(float* out) {
  __shared__ float sums[2];
  const float sum = fused_losses::cuda::warp_sum(static_cast<float>(threadIdx.x));
  const unsigned odd = __ballot_sync(fused_losses::cuda::ALL_LANES, threadIdx.x % 2);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  out[threadIdx.x] = sums[0] + sums[1] + static_cast<float>(odd == 0xaaaaaaaau);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int shim_self_test(int which, float* out, char* message, int size) {
  void (*const kernels[])(float*) = {correct, block_barrier_missed, warp_barrier_missed, different_barriers,
                                     unaligned_load};
  const auto kernel = kernels[which];
  try {
    FL_LAUNCH("self_test", kernel, 1, 64, 0, nullptr, out);
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), static_cast<size_t>(size) - 1);
    return static_cast<int>(std::strlen(error.what()));
  }
}
