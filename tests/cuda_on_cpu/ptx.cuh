// The same functions as kernels/ptx.cuh, in C++ for a CPU.

#pragma once

namespace dit_rope {

struct BFloat16 {
  unsigned short bits;
};

struct Float16 {
  unsigned short bits;
};

inline float as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline unsigned as_bits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return as_float(static_cast<unsigned>(value.bits) << 16); }
inline float widen(Float16 value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
}

inline unsigned short narrow(float value, BFloat16) {
  const unsigned bits = as_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline unsigned short narrow(float value, Float16) {
  const _Float16 half = static_cast<_Float16>(value);
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

template <typename Number>
struct Word {
  static constexpr int kNumbers = 2;
  static void unpack(unsigned word, float* values) {
    values[0] = widen(Number{static_cast<unsigned short>(word)});
    values[1] = widen(Number{static_cast<unsigned short>(word >> 16)});
  }
  static unsigned pack(const float* values) {
    return narrow(values[0], Number{}) | static_cast<unsigned>(narrow(values[1], Number{})) << 16;
  }
};

template <>
struct Word<float> {
  static constexpr int kNumbers = 1;
  static void unpack(unsigned word, float* values) { values[0] = as_float(word); }
  static unsigned pack(const float* values) { return as_bits(values[0]); }
};

template <typename Number>
inline void round_two(float& first, float& second) {
  if constexpr (Word<Number>::kNumbers == 2) {
    first = widen(Number{narrow(first, Number{})});
    second = widen(Number{narrow(second, Number{})});
  }
}

template <typename Access>
inline void store_whole(Access* to, const Access& value) {
  cuda_on_cpu::check(to, sizeof(Access));
  if (cuda_on_cpu::error == nullptr) std::memcpy(to, &value, sizeof value);
}

}  // namespace dit_rope
