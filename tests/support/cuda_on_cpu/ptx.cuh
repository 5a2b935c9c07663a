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

enum LoadPolicy { kEvictFirst, kCached, kNoAllocate, kNoAllocateEvictFirst };
enum StorePolicy { kWriteBack, kStreaming, kPastLevelOne };

// A policy changes no value.
template <LoadPolicy, typename Access>
inline Access load_whole(const Access* from) {
  return __ldcs(from);
}

template <StorePolicy, typename Access>
inline void store_whole(Access* to, const Access& value) {
  cuda_on_cpu::check(to, sizeof(Access));
  if (cuda_on_cpu::error == nullptr) std::memcpy(to, &value, sizeof value);
}

// What a GPU does while a block goes on, as late as it may: bytes are copied when the first thread waits for them, and
// until then a stage holds NaN.
struct Arrival {
  unsigned long long state;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
};

struct Arriving {
  unsigned announced = 0, copied = 0, uses = 0;
  std::vector<Copy> copies;
};

inline std::map<const Arrival*, Arriving> arriving;
__shared__ unsigned char dynamic_bytes[227 << 10];

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(dynamic_bytes) + 127) / 128 * 128);
}

inline void prepare(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i) arriving[arrivals + i] = Arriving();
}

inline void announce(Arrival* arrival, unsigned bytes) {
  Arriving& now = arriving[arrival];
  if (now.announced != 0) cuda_on_cpu::fail("a stage filled before it was waited for", arrival);
  now.announced = bytes;
}

inline void copy_bulk(void* to, const void* from, unsigned bytes, Arrival* arrival) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(to), first = reinterpret_cast<uintptr_t>(dynamic_bytes);
  if (bytes % 16 != 0 || address % 16 != 0) cuda_on_cpu::fail("a bulk copy of broken 16 bytes", to);
  if (address < first || address + bytes > first + sizeof dynamic_bytes) {
    cuda_on_cpu::fail("a bulk copy outside of shared memory", to);
  }
  for (unsigned i = 0; i < bytes; i += 16) cuda_on_cpu::check(static_cast<const char*>(from) + i, 16);
  if (cuda_on_cpu::error != nullptr) return;
  std::memset(to, 0xff, bytes);
  arriving[arrival].copies.push_back({to, from, bytes});
  arriving[arrival].copied += bytes;
}

inline void wait_for(Arrival* arrival, unsigned parity) {
  Arriving& now = arriving[arrival];
  if (now.uses % 2 != parity) return;
  if (now.announced == 0 || now.announced != now.copied) cuda_on_cpu::fail("a wait that never ends", arrival);
  for (const Copy& copy : now.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  now = Arriving{0, 0, now.uses + 1, {}};
}

}  // namespace dit_rope
