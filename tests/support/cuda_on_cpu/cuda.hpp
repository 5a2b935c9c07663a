// As much of CUDA as the kernels use, on a CPU: the threads of a block are fibers of one thread, which change places only
// at barriers and shuffles. Blocks run one after another, their fibers upwards and downwards by turns. A test includes
// this before a kernel, builds a shared library and calls run(): unchanged kernels then run on host memory.
//
// Found on the way, besides wrong results: loads and stores outside the ranges that the caller allows or off their
// alignment, barriers that only some threads reach, and shared memory read before it is written (it holds NaN).

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x, y, z;
};

// Weak: a kernel without shared memory has no such section, and both are null.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_on_cpu {

enum Stop { kRunning, kShuffle, kBarrier, kDone };

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  Stop stop = kRunning;
  int shuffles = 0;
};

struct Range {
  uintptr_t first, last;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current = 0;
inline float exchanged[2][1024];
inline std::vector<Range> ranges;
inline char message[256];
inline const char* error = nullptr;
inline void (*kernel)(const void*) = nullptr;
inline const void* arguments = nullptr;

inline void fail(const char* what, const void* address) {
  if (error != nullptr) return;
  std::snprintf(message, sizeof message, "%s at %p", what, address);
  error = message;
}

inline void check(const void* address, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  if (first % bytes != 0) fail("misaligned access", address);
  for (const Range& range : ranges) {
    if (range.first <= first && first + bytes <= range.last) return;
  }
  fail("access outside of every tensor", address);
}

inline void stop(Stop why) {
  Fiber& fiber = fibers[current];
  fiber.stop = why;
  swapcontext(&fiber.context, &scheduler);
}

}  // namespace cuda_on_cpu

inline Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { cuda_on_cpu::stop(cuda_on_cpu::kBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  using namespace cuda_on_cpu;
  const int me = current, turn = fibers[me].shuffles++ % 2;
  exchanged[turn][me] = value;
  stop(kShuffle);
  return exchanged[turn][me ^ distance];
}

template <typename Access>
inline Access __ldcs(const Access* from) {
  cuda_on_cpu::check(from, sizeof(Access));
  Access value;
  if (cuda_on_cpu::error != nullptr) return Access{};
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename Access>
inline Access __ldg(const Access* from) {
  return __ldcs(from);
}

inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// As far off as the GPU's approximation may be: two units in the last place.
inline float rsqrtf(float a) { return static_cast<float>((1.0 + 0x1p-22) / std::sqrt(static_cast<double>(a))); }

namespace cuda_on_cpu {

inline void enter() {
  kernel(arguments);
  fibers[current].stop = kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

// Runs the fibers of one warp until all are done or wait at a barrier.
inline Stop run_warp(int warp, bool upwards) {
  for (;;) {
    int at[4] = {0, 0, 0, 0};
    for (int i = 0; i < kWarp; ++i) {
      current = warp * kWarp + (upwards ? i : kWarp - 1 - i);
      Fiber& fiber = fibers[current];
      threadIdx = {static_cast<unsigned>(current), 0, 0};
      if (fiber.stop == kRunning) swapcontext(&scheduler, &fiber.context);
      ++at[fiber.stop];
    }
    if (at[kBarrier] == kWarp || at[kDone] == kWarp) return fibers[warp * kWarp].stop;
    if (at[kShuffle] != kWarp) {
      fail("threads of one warp at different barriers or shuffles", nullptr);
      return kDone;
    }
    for (int i = 0; i < kWarp; ++i) fibers[warp * kWarp + i].stop = kRunning;
  }
}

inline void run_block(int threads, bool upwards) {
  std::memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.stop = kRunning;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    int done = 0;
    for (int warp = 0; warp < threads / kWarp; ++warp) {
      done += run_warp(upwards ? warp : threads / kWarp - 1 - warp, upwards) == kDone;
      if (error != nullptr) return;
    }
    if (done == threads / kWarp) return;
    if (done != 0) return fail("some warps done while others wait at a barrier", nullptr);
    for (int thread = 0; thread < threads; ++thread) fibers[thread].stop = kRunning;
  }
}

// Runs a grid of blocks. `allowed` are pairs of addresses [first, last) of what may be loaded and stored. Returns null,
// or what went wrong.
inline const char* run(void (*function)(const void*), Index grid, int threads, const void* args,
                       const uintptr_t* allowed, int count) {
  kernel = function;
  arguments = args;
  error = nullptr;
  gridDim = grid;
  ranges.clear();
  for (int i = 0; i < count; ++i) ranges.push_back({allowed[2 * i], allowed[2 * i + 1]});
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  bool upwards = true;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads, upwards);
        if (error != nullptr) return error;
        upwards = !upwards;
      }
    }
  }
  return nullptr;
}

}  // namespace cuda_on_cpu
