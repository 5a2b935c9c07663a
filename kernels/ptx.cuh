// What is written in PTX: how float16 and bfloat16 become float32 and back, since NVRTC has no header for them without a
// CUDA toolkit; loads and stores that stay one access, since the compiler may split an assignment of 16 bytes, with
// their cache policies; and bulk copies into shared memory, which exist from compute capability 9.0 on.

#pragma once

namespace dit_rope {

struct BFloat16 {
  unsigned short bits;
};

struct Float16 {
  unsigned short bits;
};

__device__ __forceinline__ float widen(float value) { return value; }

__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ __forceinline__ float widen(Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// One 32-bit word holds one float32 or two 16-bit numbers, the first in the low half.
template <typename Number>
struct Word;

template <>
struct Word<float> {
  static constexpr int kNumbers = 1;
  static __device__ __forceinline__ void unpack(unsigned word, float* values) { values[0] = __uint_as_float(word); }
  static __device__ __forceinline__ unsigned pack(const float* values) { return __float_as_uint(values[0]); }
};

template <>
struct Word<BFloat16> {
  static constexpr int kNumbers = 2;
  static __device__ __forceinline__ void unpack(unsigned word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  // Rounds to nearest, ties to even.
  static __device__ __forceinline__ unsigned pack(const float* values) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
  }
};

template <>
struct Word<Float16> {
  static constexpr int kNumbers = 2;
  static __device__ __forceinline__ void unpack(unsigned word, float* values) {
    values[0] = widen(Float16{static_cast<unsigned short>(word & 0xffffu)});
    values[1] = widen(Float16{static_cast<unsigned short>(word >> 16)});
  }
  // Rounds to nearest, ties to even; past the largest float16 it gives infinity.
  static __device__ __forceinline__ unsigned pack(const float* values) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
  }
};

// Rounds two float32 values to Number and back.
template <typename Number>
__device__ __forceinline__ void round_two(float& first, float& second) {
  if constexpr (Word<Number>::kNumbers == 2) {
    const float values[2] = {first, second};
    float rounded[2];
    Word<Number>::unpack(Word<Number>::pack(values), rounded);
    first = rounded[0];
    second = rounded[1];
  }
}

// What the caches do with data that are read once: they are the first to leave, nothing special, they pass by level 1,
// or that and the first to leave level 2.
enum LoadPolicy { kEvictFirst, kCached, kNoAllocate, kNoAllocateEvictFirst };
// And with what is written: nothing special, the first to leave, past level 1.
enum StorePolicy { kWriteBack, kStreaming, kPastLevelOne };

// Loads and stores of one access for every width and policy. They are volatile, so that no load sinks below a store: the
// result may overwrite what it is made of.
#define DIT_ROPE_LOAD(MODIFIERS, HINT)                                                                    \
  static __device__ __forceinline__ void load(uint4& value, const void* from, unsigned long long hint) { \
    asm volatile("ld.global" MODIFIERS ".v4.b32 {%0, %1, %2, %3}, [%4]" HINT(5)                          \
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)                            \
                 : "l"(__cvta_generic_to_global(from)), "l"(hint));                                      \
  }                                                                                                       \
  static __device__ __forceinline__ void load(uint2& value, const void* from, unsigned long long hint) { \
    asm volatile("ld.global" MODIFIERS ".v2.b32 {%0, %1}, [%2]" HINT(3)                                  \
                 : "=r"(value.x), "=r"(value.y)                                                          \
                 : "l"(__cvta_generic_to_global(from)), "l"(hint));                                      \
  }                                                                                                       \
  static __device__ __forceinline__ void load(unsigned& value, const void* from, unsigned long long hint) { \
    asm volatile("ld.global" MODIFIERS ".b32 %0, [%1]" HINT(2)                                           \
                 : "=r"(value)                                                                           \
                 : "l"(__cvta_generic_to_global(from)), "l"(hint));                                      \
  }                                                                                                       \
  static __device__ __forceinline__ void load(unsigned short& value, const void* from, unsigned long long hint) { \
    asm volatile("ld.global" MODIFIERS ".b16 %0, [%1]" HINT(2)                                           \
                 : "=h"(value)                                                                           \
                 : "l"(__cvta_generic_to_global(from)), "l"(hint));                                      \
  }
#define DIT_ROPE_NO_HINT(OPERAND) ";"
#define DIT_ROPE_HINT(OPERAND) ", %" #OPERAND ";"

template <LoadPolicy kPolicy>
struct Load;
template <>
struct Load<kEvictFirst> {
  DIT_ROPE_LOAD(".cs", DIT_ROPE_NO_HINT)
};
template <>
struct Load<kCached> {
  DIT_ROPE_LOAD("", DIT_ROPE_NO_HINT)
};
template <>
struct Load<kNoAllocate> {
  DIT_ROPE_LOAD(".L1::no_allocate", DIT_ROPE_NO_HINT)
};
template <>
struct Load<kNoAllocateEvictFirst> {
  DIT_ROPE_LOAD(".L1::no_allocate.L2::cache_hint", DIT_ROPE_HINT)
};

template <LoadPolicy kPolicy, typename Access>
__device__ __forceinline__ Access load_whole(const Access* from) {
  unsigned long long hint = 0;
  if constexpr (kPolicy == kNoAllocateEvictFirst) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(hint));
  }
  Access value;
  Load<kPolicy>::load(value, from, hint);
  return value;
}

#define DIT_ROPE_STORE(MODIFIERS)                                                          \
  static __device__ __forceinline__ void store(void* to, const uint4& value) {            \
    asm volatile("st.global" MODIFIERS ".v4.b32 [%0], {%1, %2, %3, %4};"                  \
                 :                                                                        \
                 : "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) \
                 : "memory");                                                             \
  }                                                                                        \
  static __device__ __forceinline__ void store(void* to, const uint2& value) {            \
    asm volatile("st.global" MODIFIERS ".v2.b32 [%0], {%1, %2};"                          \
                 :                                                                        \
                 : "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y)          \
                 : "memory");                                                             \
  }                                                                                        \
  static __device__ __forceinline__ void store(void* to, unsigned value) {                \
    asm volatile("st.global" MODIFIERS ".b32 [%0], %1;" : : "l"(__cvta_generic_to_global(to)), "r"(value) : "memory"); \
  }                                                                                        \
  static __device__ __forceinline__ void store(void* to, unsigned short value) {          \
    asm volatile("st.global" MODIFIERS ".b16 [%0], %1;" : : "l"(__cvta_generic_to_global(to)), "h"(value) : "memory"); \
  }

template <StorePolicy kPolicy>
struct Store;
template <>
struct Store<kWriteBack> {
  DIT_ROPE_STORE("")
};
template <>
struct Store<kStreaming> {
  DIT_ROPE_STORE(".cs")
};
template <>
struct Store<kPastLevelOne> {
  DIT_ROPE_STORE(".L1::no_allocate")
};

template <StorePolicy kPolicy, typename Access>
__device__ __forceinline__ void store_whole(Access* to, const Access& value) {
  Store<kPolicy>::store(to, value);
}

// Tells the threads of a block that the bytes of a stage have arrived: an mbarrier, on which one thread announces them.
struct Arrival {
  unsigned long long state;
};

// The shared memory that a launch asks for.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dit_rope_stages[];
  return dit_rope_stages;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// One thread makes every arrival of a block ready; others see it after a barrier.
__device__ __forceinline__ void prepare(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals + i)) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One thread says how many bytes are about to be copied.
__device__ __forceinline__ void announce(Arrival* arrival, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)), "r"(bytes)
               : "memory");
}

// Begins to copy whole 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, unsigned bytes, Arrival* arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(arrival))
               : "memory");
}

// Waits until all that was announced for the `parity`-th use of a stage, 0 or 1 by turns, has arrived.
__device__ __forceinline__ void wait_for(Arrival* arrival, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred arrived;\n"
      "wait: mbarrier.try_wait.parity.shared::cta.b64 arrived, [%0], %1;\n"
      "@!arrived bra wait;\n"
      "}\n" ::"r"(shared_address(arrival)),
      "r"(parity)
      : "memory");
}

}  // namespace dit_rope
