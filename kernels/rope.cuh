// The contract of the rotation kernels: their arguments, where a token stands, how channels are read, by which angles
// they are turned, and how they are written.
//
// It says in CUDA what dit_rope/rotation_args.py says in Python. Element offsets of tokens and heads are 64-bit, offsets
// inside a head 32-bit. A kernel is compiled for a Plan: a struct of constants that dit_rope/rotation/backends/cuda_plan.py
// writes from the shapes and dtypes of a call; everything that varies with length, position or address is an argument.

#pragma once

#include "ptx.cuh"

namespace dit_rope {

constexpr int kMaxAxes = 4;
constexpr int kWarp = 32;

enum Norm { kNoNorm, kPerHead, kAcrossHeads };

// Where one tensor [B, S, H, D] is, where its result goes, and the weight and bias of its norm.
struct Tensor {
  const void* x;
  void* out;           // may be x: a channel is read and written by one thread
  const void* weight;  // [D] per head, [H, D] across heads, or null
  const void* bias;    // the same
};

// Elements from one batch entry, token and head of a tensor and of its result to the next.
struct Strides {
  long long x_batch, x_token, x_head;
  long long out_batch, out_token, out_head;
};

// Arguments of one launch, passed by value. What changes from call to call is in front, and members go from 8-byte to
// 4-byte ones: no padding, so the host packs them field by field.
struct RotationArgs {
  Tensor tensors[2];     // queries and keys; the second is unused where Plan::key_heads is 0
  const void* rows;      // [2, R, P]: cos, then sin, of all axes, axis after axis along R; last dim contiguous
  const int* positions;  // [1 or B, 1 or count, axes] rows of the table; or null: rows come from the grid
  const int* entries;    // [B] which batch entry of x is turned as entry b; read where Plan::shift
  Strides strides[2];
  long long sin_offset;  // elements from a cosine to its sine
  long long row_stride;  // elements from a row of the table to the next
  long long head_rows;   // rows from those of one head to those of the next; read where Plan::own_angles
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

  // Reads what nobody reads again, by a policy that should let tables and weights stay in the caches.
  template <LoadPolicy kPolicy>
  __device__ __forceinline__ void load_once(const Number* from) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<Access*>(words)[i] = load_whole<kPolicy>(reinterpret_cast<const Access*>(from) + i);
    }
  }

  // Reads what lies in shared memory.
  __device__ __forceinline__ void load_staged(const Number* from) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<Access*>(words)[i] = reinterpret_cast<const Access*>(from)[i];
    }
  }

  // Reads what other blocks or calls read too, and nobody writes.
  __device__ __forceinline__ void load_shared(const Number* from) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<Access*>(words)[i] = __ldg(reinterpret_cast<const Access*>(from) + i);
    }
  }

  template <StorePolicy kPolicy>
  __device__ __forceinline__ void store(Number* to) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      store_whole<kPolicy>(reinterpret_cast<Access*>(to) + i, reinterpret_cast<const Access*>(words)[i]);
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

// What a plan implies for one thread and one token.
template <class Plan>
struct Shape {
  static constexpr bool kKeys = Plan::key_heads > 0 && !Plan::split;         // a block has keys beside the queries
  static constexpr int kChunks = Plan::half ? 2 : 1;                         // of one lane in one head
  static constexpr int kPairs = Plan::half ? Plan::chunk : Plan::chunk / 2;  // of one lane
  static constexpr int kPairLanes = (Plan::pairs + kPairs - 1) / kPairs;     // lanes that own pairs
  static constexpr int kAngles = (kPairLanes * kPairs + 3) / 4 * 4;          // of one token, padded to 16 bytes
  static constexpr int kTokenThreads = Plan::rows * Plan::lanes;
  static constexpr int kTokenWarps = (kTokenThreads + kWarp - 1) / kWarp;
  static_assert(Plan::norm != kAcrossHeads || Plan::tokens == 1 || kTokenThreads % kWarp == 0,
                "a norm across heads adds up whole warps");
  static_assert(Plan::norm != kPerHead || kWarp % Plan::lanes == 0, "a norm per head adds up lanes of one warp");
};

// The channels of one lane in one head.
template <class Plan>
using Channels = float[Shape<Plan>::kChunks][Plan::chunk];

// What the threads of a block share; where every head has its own angles, only sums.
template <class Plan>
struct Shared {
  static constexpr int kAngleTokens = Plan::own_angles ? 1 : Plan::tokens;
  alignas(16) float cosines[kAngleTokens][Shape<Plan>::kAngles];
  alignas(16) float sines[kAngleTokens][Shape<Plan>::kAngles];
  int rows[Plan::tokens][kMaxAxes];  // of the table; negative where the axis does not turn
  // Of queries and of keys, warp by warp; of squares last, of a LayerNorm's values before them.
  float sums[Plan::centred ? 2 : 1][Plan::tokens][Shape<Plan>::kTokenWarps][2];
};

// What a block that takes token after token shares: angles by turns, since the last ones may still be read, and what
// tells that a stage has arrived.
template <class Plan>
struct StreamShared {
  Shared<Plan> tokens[2];
  Arrival arrivals[Plan::stages];
};

// Queries and keys of one token on their way: a stage of the dynamic shared memory.
template <class Plan>
struct Stage {
  alignas(128) typename Plan::Data query[Plan::query_heads * Plan::head_dim];
  alignas(128) typename Plan::Data key[Plan::key_heads > 0 ? Plan::key_heads * Plan::head_dim : 1];
};

// Cosines, or sines, of neighbouring pairs from the table, in accesses of Plan::table_access bytes.
template <class Plan, int kPairs>
__device__ __forceinline__ void load_angles(const typename Plan::Table* from, float* values) {
  using Table = typename Plan::Table;
  if constexpr (kPairs % Word<Table>::kNumbers == 0) {
    Chunk<Table, kPairs, Plan::table_access> chunk;
    chunk.load_shared(from);
    float unpacked[kPairs];
    chunk.unpack(unpacked);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) values[i] = unpacked[i];
  } else {
    values[0] = widen(Table{__ldg(&from->bits)});
  }
}

// The angles of one lane, and a bit for each of its pairs that turns.
template <class Plan>
struct Angles {
  static constexpr int kPairs = Shape<Plan>::kPairs;
  static constexpr int kFloats = kPairs % 4 == 0 ? 4 : kPairs % 2 == 0 ? 2 : 1;  // of one access
  using Access = typename AccessOf<4 * kFloats>::Type;

  alignas(16) float cosines[kPairs];
  alignas(16) float sines[kPairs];
  unsigned turning = 0;

  // Those that the heads of a token share.
  __device__ __forceinline__ void read(const Shared<Plan>& shared, int slot, int lane) {
    if (lane >= Shape<Plan>::kPairLanes) return;
#pragma unroll
    for (int i = 0; i < kPairs / kFloats; ++i) {
      const int from = lane * (kPairs / kFloats) + i;
      reinterpret_cast<Access*>(cosines)[i] = reinterpret_cast<const Access*>(shared.cosines[slot])[from];
      reinterpret_cast<Access*>(sines)[i] = reinterpret_cast<const Access*>(shared.sines[slot])[from];
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = lane * kPairs + i;
      int first;
      const bool turns = pair < Plan::pairs && shared.rows[slot][pair_axis<Plan>(pair, first)] >= 0;
      turning |= static_cast<unsigned>(turns) << i;
    }
  }

  // The pairs from number `i` on that one access has, of one axis, from their row of the table.
  template <int kGroup>
  __device__ __forceinline__ void load(int i, const typename Plan::Table* cosine, long long sin_offset) {
    load_angles<Plan, kGroup>(cosine, cosines + i);
    load_angles<Plan, kGroup>(cosine + sin_offset, sines + i);
    turning |= ((1u << kGroup) - 1u) << i;
  }

  // Turns backwards where `inverse`. Apart from load(), where a thread would wait for the sines before it loads more.
  __device__ __forceinline__ void orient(bool inverse) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sines[i] = inverse ? -sines[i] : sines[i];
  }

  __device__ __forceinline__ void turn_pairs(Channels<Plan>& values, unsigned which) const {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      float& a = Plan::half ? values[0][pair] : values[0][2 * pair];
      float& b = Plan::half ? values[Shape<Plan>::kChunks - 1][pair] : values[0][2 * pair + 1];
      if (which >> pair & 1u) turn<Plan>(a, b, cosines[pair], sines[pair]);
    }
  }

  // What does not turn is not multiplied by (1, 0) either, which would change infinities and the signs of zeros.
  __device__ __forceinline__ void turn_all(Channels<Plan>& values) const {
    constexpr unsigned kAll = (1u << kPairs) - 1u;
    if (turning == kAll) {
      turn_pairs(values, kAll);
    } else if (turning != 0) {
      turn_pairs(values, turning);
    }
  }
};

}  // namespace dit_rope
