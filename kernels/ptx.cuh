// What is written in PTX: how float16 and bfloat16 become float32 and back, since NVRTC has no header for them without a
// CUDA toolkit, and stores that stay one access, since the compiler may split an assignment of 16 bytes.

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

__device__ __forceinline__ void store_whole(uint4* to, const uint4& value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_whole(uint2* to, const uint2& value) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y)
               : "memory");
}

template <typename Scalar>
__device__ __forceinline__ void store_whole(Scalar* to, const Scalar& value) {
  *to = value;
}

}  // namespace dit_rope
