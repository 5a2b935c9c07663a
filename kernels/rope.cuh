// The contract of the rotation kernels: their arguments, where a token stands, and how channels are read, turned and
// written.
//
// It says in CUDA what dit_rope/rotation_args.py says in Python. Element offsets of tokens and heads are 64-bit, offsets
// inside a head 32-bit. A kernel is compiled for a Plan: a struct of constants that dit_rope/backends/cuda_kernels.py
// writes from the shapes and dtypes of a call; everything that varies with length, position or address is an argument.

#pragma once

#include "ptx.cuh"

namespace dit_rope {

constexpr int kMaxAxes = 4;
constexpr int kWarp = 32;

enum Norm { kNoNorm, kPerHead, kAcrossHeads };

// Where one tensor [B, S, H, D] is, where its result goes, and the weight of its norm.
struct Tensor {
  const void* x;
  void* out;           // may be x: a channel is read and written by one thread
  const void* weight;  // [D] per head, [H, D] across heads, or null
};

// Elements from one batch entry, token and head of a tensor and of its result to the next.
struct Strides {
  long long x_batch, x_token, x_head;
  long long out_batch, out_token, out_head;
};

// Arguments of one launch, passed by value. What changes from call to call is in front, and members go from 8-byte to
// 4-byte ones: no padding, so the host packs them field by field.
struct RotationArgs {
  Tensor query;
  Tensor key;            // unused where Plan::key_heads is 0
  const void* rows;      // [2, R, P]: cos, then sin, of all axes, axis after axis along R; last dim contiguous
  const int* positions;  // [1 or B, 1 or count, axes] rows of the table; or null: rows come from the grid
  const int* entries;    // [B] which batch entry of x is turned as entry b; read where Plan::shift
  Strides query_strides;
  Strides key_strides;
  long long sin_offset;  // elements from a cosine to its sine
  long long row_stride;  // elements from a row of the table to the next
  long long position_batch, position_token, position_axis;
  unsigned batches;          // B, on grid axes y and z; blocks past it do nothing
  unsigned entry_count;      // batch entries that x has; an entry outside of them is left alone
  int row_count;             // R; a row at or past it is never read and does not turn
  unsigned tokens;           // S
  unsigned prefix;           // tokens before the grid's
  unsigned turning;          // how many tokens after the prefix turn
  unsigned token_offset;     // flat grid index of the first of them; ignored with positions
  int inverse;               // 1: turn backwards
  int keep_still;            // 1: tokens that do not turn are neither read nor written
  unsigned sizes[kMaxAxes];  // the grid, axis 0 slowest; ignored with positions
  unsigned spans[kMaxAxes];  // product of the sizes after the axis; ignored with positions
  int first_rows[kMaxAxes];  // table row of coordinate 0 of each axis; ignored with positions
  float eps;
};

// The table row of a token on one axis, -1 where it does not turn. `number` counts from the first token after the
// prefix.
__device__ __forceinline__ int token_row(const RotationArgs& args, unsigned batch, unsigned number, int axis) {
  if (number >= args.turning) return -1;
  if (args.positions == nullptr) {
    return args.first_rows[axis] + (args.token_offset + number) / args.spans[axis] % args.sizes[axis];
  }
  const int row = __ldg(args.positions + batch * args.position_batch + number * args.position_token +
                        axis * args.position_axis);
  return row < args.row_count ? row : -1;
}

// The axis that owns pair `pair` of a head; `first` becomes the axis' first pair.
template <class Plan>
__device__ __forceinline__ int pair_axis(int pair, int& first) {
  first = 0;
  int axis = 0;
  if (Plan::axes > 1 && pair >= Plan::bound1) first = Plan::bound1, axis = 1;
  if (Plan::axes > 2 && pair >= Plan::bound2) first = Plan::bound2, axis = 2;
  if (Plan::axes > 3 && pair >= Plan::bound3) first = Plan::bound3, axis = 3;
  return axis;
}

// Turns the pair (a, b) into (a cos - b sin, a sin + b cos). Exact: every product and every sum is rounded on its own,
// to the dtype that data and table promote to, as eager PyTorch does; the compiler never contracts these intrinsics.
// Fast: one product is fused into the sum, two roundings a channel instead of three.
template <class Plan>
__device__ __forceinline__ void turn(float& a, float& b, float cosine, float sine) {
  if constexpr (!Plan::exact) {
    const float first = __fmaf_rn(a, cosine, -__fmul_rn(b, sine));
    b = __fmaf_rn(a, sine, __fmul_rn(b, cosine));
    a = first;
    return;
  }
  float a_cosine = __fmul_rn(a, cosine), b_sine = __fmul_rn(b, sine);
  float a_sine = __fmul_rn(a, sine), b_cosine = __fmul_rn(b, cosine);
  round_two<typename Plan::Table>(a_cosine, b_sine);
  round_two<typename Plan::Table>(a_sine, b_cosine);
  a = __fsub_rn(a_cosine, b_sine);
  b = __fadd_rn(a_sine, b_cosine);
}

template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<16> {
  using Type = uint4;
};
template <>
struct AccessOf<8> {
  using Type = uint2;
};
template <>
struct AccessOf<4> {
  using Type = unsigned;
};
template <>
struct AccessOf<2> {
  using Type = unsigned short;
};

// Neighbouring channels of one row, kept as they lie in memory. kAccess: bytes of one memory access.
template <typename Number, int kChannels, int kAccess>
struct Chunk {
  using Access = typename AccessOf<kAccess>::Type;
  static constexpr int kNumbers = Word<Number>::kNumbers;
  static constexpr int kWords = kChannels / kNumbers;
  static constexpr int kAccesses = kWords * 4 / kAccess;
  static_assert(kChannels % kNumbers == 0 && kWords * 4 % kAccess == 0, "a chunk is whole words and whole accesses");

  alignas(16) unsigned words[kWords];

  // Reads what nobody reads again: it is first to leave the caches, so that tables and weights stay.
  __device__ __forceinline__ void load_once(const Number* from) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<Access*>(words)[i] = __ldcs(reinterpret_cast<const Access*>(from) + i);
    }
  }

  // Reads what other blocks read too, and nobody writes.
  __device__ __forceinline__ void load_shared(const Number* from) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<Access*>(words)[i] = __ldg(reinterpret_cast<const Access*>(from) + i);
    }
  }

  __device__ __forceinline__ void store(Number* to) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      store_whole(reinterpret_cast<Access*>(to) + i, reinterpret_cast<const Access*>(words)[i]);
    }
  }

  __device__ __forceinline__ void unpack(float (&values)[kChannels]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) Word<Number>::unpack(words[i], values + kNumbers * i);
  }

  __device__ __forceinline__ void pack(const float (&values)[kChannels]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = Word<Number>::pack(values + kNumbers * i);
  }
};

}  // namespace dit_rope
