// One kernel for rotation, for RMSNorm with rotation, and for the shift of rotated keys.
//
// A block owns Plan::tokens whole tokens of queries and keys. Its threads are [tokens][rows][lanes]: a lane owns the
// same channels of every head, so that the cosines and sines of its pairs stay in registers, and walks down the heads in
// steps of Plan::rows. A thread issues all its loads before anything else. While they are under way the block finds the
// table rows of its tokens and reads their angles into shared memory, each once per token.
//
// Interleaved pairing: a lane owns one chunk of whole pairs. Half pairing: a lane owns two chunks whose channels are
// each other's partners; lanes past the last pair own two chunks each of the channels that do not turn.

#include "rope.cuh"

namespace dit_rope {

// What a plan implies for one thread and one token.
template <class Plan>
struct Shape {
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

// What the threads of a block share.
template <class Plan>
struct Shared {
  alignas(16) float cosines[Plan::tokens][Shape<Plan>::kAngles];
  alignas(16) float sines[Plan::tokens][Shape<Plan>::kAngles];
  int rows[Plan::tokens][kMaxAxes];                        // of the table; negative where the axis does not turn
  float square_sums[Plan::tokens][Shape<Plan>::kTokenWarps][2];  // of queries and of keys, warp by warp
};

// Where one thread stands, and whether it has anything to read and write. Unsigned: 64-bit offsets are cheaper so.
struct Place {
  unsigned slot, row, lane;
  unsigned batch, token, entry;
  bool live;
};

// First channel of a lane.
template <class Plan>
__device__ __forceinline__ int first_channel(int lane) {
  constexpr int kPairLanes = Shape<Plan>::kPairLanes;
  return !Plan::half || lane < kPairLanes ? lane * Plan::chunk
                                          : 2 * Plan::pairs + 2 * (lane - kPairLanes) * Plan::chunk;
}

// Channels from the first chunk of a lane to chunk number `chunk`, which the lane owns if it is below Plan::width.
template <class Plan>
__device__ __forceinline__ int chunk_offset(int lane, int chunk) {
  return chunk * (lane < Shape<Plan>::kPairLanes ? Plan::pairs : Plan::chunk);
}

template <class Plan>
__device__ __forceinline__ Place find_place(const RotationArgs& args) {
  constexpr unsigned kTokenThreads = Shape<Plan>::kTokenThreads, kLanes = Plan::lanes, kTokens = Plan::tokens;
  const unsigned thread = threadIdx.x;
  Place place;
  place.slot = min(thread / kTokenThreads, kTokens - 1);
  place.row = thread % kTokenThreads / kLanes;
  place.lane = thread % kLanes;
  place.batch = blockIdx.z * gridDim.y + blockIdx.y;
  place.token = blockIdx.x * kTokens + place.slot;
  place.entry = place.batch < args.batches ? place.batch : args.entry_count;  // the latter is none
  if (Plan::shift && place.batch < args.batches) place.entry = args.entries[place.batch];
  const bool still = args.keep_still && place.token - args.prefix >= args.turning;  // wraps around before the prefix
  place.live = thread < kTokens * kTokenThreads && place.token < args.tokens && !still &&
               place.entry < args.entry_count && first_channel<Plan>(place.lane) < Plan::width;
  return place;
}

// Table rows of the block's tokens, one thread for each token and axis.
template <class Plan>
__device__ __forceinline__ void find_rows(const RotationArgs& args, const Place& place, Shared<Plan>& shared) {
  const unsigned first_number = place.token - place.slot - args.prefix;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < Plan::tokens * Plan::axes; i += Plan::threads) {
    const unsigned slot = i / Plan::axes, axis = i % Plan::axes;
    const bool there = place.entry < args.entry_count;
    shared.rows[slot][axis] = there ? token_row(args, place.batch, first_number + slot, axis) : -1;
  }
}

// Cosines and sines of the block's tokens, one thread for each token and pair; those that do not turn are left unset.
template <class Plan>
__device__ __forceinline__ void read_angles(const RotationArgs& args, Shared<Plan>& shared) {
  using Table = typename Plan::Table;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < Plan::tokens * Plan::pairs; i += Plan::threads) {
    const unsigned slot = i / Plan::pairs, pair = i % Plan::pairs;
    int first;
    const int row = shared.rows[slot][pair_axis<Plan>(pair, first)];
    if (row < 0) continue;
    const Table* entry = static_cast<const Table*>(args.rows) + row * args.row_stride + (pair - first);
    const float sine = widen(entry[args.sin_offset]);
    shared.cosines[slot][pair] = widen(entry[0]);
    shared.sines[slot][pair] = args.inverse ? -sine : sine;
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
  unsigned turning;

  __device__ __forceinline__ Angles(const Shared<Plan>& shared, int slot, int lane) : turning(0) {
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

// Sum over groups of kLanes neighbouring threads, a power of two; every thread of the warp takes part.
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float sum) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// 1 / sqrt(square_sum / count + eps) to about one unit in the last place. The correctly rounded division and root are
// subroutines, a third of a norm's instructions; one Newton step makes the approximate root about as good.
__device__ __forceinline__ float inverse_rms(float square_sum, int count, float eps) {
  const float mean = __fmaf_rn(square_sum, 1.0f / static_cast<float>(count), eps);
  const float root = rsqrtf(mean);
  const float error = __fmaf_rn(-__fmul_rn(mean, root), root, 1.0f);
  return error == error ? __fmaf_rn(__fmul_rn(0.5f, root), error, root) : root;  // 0 and infinity have no error
}

// What one thread has of one tensor: its chunks of kRows heads, and of their weights.
template <class Plan, typename Weight, int kHeads>
struct Heads {
  using Data = typename Plan::Data;
  static constexpr int kChunks = Shape<Plan>::kChunks;
  static constexpr int kRows = (kHeads + Plan::rows - 1) / Plan::rows;
  static constexpr int kWeightRows = Plan::norm == kAcrossHeads ? kRows : 1;

  const Tensor& tensor;
  const Strides& strides;
  const Place& place;
  Chunk<Data, Plan::chunk, Plan::access> data[kRows][kChunks];
  Chunk<Weight, Plan::chunk, Plan::weight_access> weights[kWeightRows][kChunks];

  __device__ __forceinline__ Heads(const Tensor& tensor, const Strides& strides, const Place& place)
      : tensor(tensor), strides(strides), place(place) {}

  __device__ __forceinline__ bool owns(int i, int chunk) const {
    const bool head = kHeads % Plan::rows == 0 || place.row + i * Plan::rows < kHeads;
    const int channel = first_channel<Plan>(place.lane) + chunk_offset<Plan>(place.lane, chunk);
    return place.live && head && (!Plan::half || channel < Plan::width);
  }

  __device__ __forceinline__ void load() {
    const Data* head = static_cast<const Data*>(tensor.x) + first_channel<Plan>(place.lane) +
                       place.entry * strides.x_batch + place.token * strides.x_token + place.row * strides.x_head;
#pragma unroll
    for (int i = 0; i < kRows; ++i, head += Plan::rows * strides.x_head) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (owns(i, chunk)) data[i][chunk].load_once(head + chunk_offset<Plan>(place.lane, chunk));
      }
    }
  }

  __device__ __forceinline__ void load_weights() {
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      const int head = Plan::norm == kAcrossHeads ? place.row + i * Plan::rows : 0;
      const Weight* weight =
          static_cast<const Weight*>(tensor.weight) + head * Plan::head_dim + first_channel<Plan>(place.lane);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (owns(i, chunk)) weights[i][chunk].load_shared(weight + chunk_offset<Plan>(place.lane, chunk));
      }
    }
  }

  __device__ __forceinline__ void unpack(int i, Channels<Plan>& values) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) data[i][chunk].unpack(values[chunk]);
  }

  // Sum over this thread's channels of row i.
  __device__ __forceinline__ float square_sum(int i, const Channels<Plan>& values) const {
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < Plan::chunk; ++j) part = __fmaf_rn(values[chunk][j], values[chunk][j], part);
      if (owns(i, chunk)) sum += part;
    }
    return sum;
  }

  __device__ __forceinline__ float square_sum_of_rows() const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Channels<Plan> values;
      unpack(i, values);
      sum += square_sum(i, values);
    }
    return sum;
  }

  __device__ __forceinline__ void scale(int i, float factor, Channels<Plan>& values) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float weight[Plan::chunk];
      if constexpr (Plan::weighted) weights[Plan::norm == kAcrossHeads ? i : 0][chunk].unpack(weight);
#pragma unroll
      for (int j = 0; j < Plan::chunk; ++j) {
        values[chunk][j] = __fmul_rn(values[chunk][j], factor);
        if constexpr (Plan::weighted) values[chunk][j] = __fmul_rn(values[chunk][j], weight[j]);
      }
    }
  }

  // Norms, turns and writes every row. `factor` is 1 / rms where the norm is across heads.
  __device__ __forceinline__ void finish(const Angles<Plan>& angles, float factor, float eps) {
    Data* head = static_cast<Data*>(tensor.out) + first_channel<Plan>(place.lane) +
                 place.entry * strides.out_batch + place.token * strides.out_token + place.row * strides.out_head;
#pragma unroll
    for (int i = 0; i < kRows; ++i, head += Plan::rows * strides.out_head) {
      Channels<Plan> values;
      unpack(i, values);
      if constexpr (Plan::norm == kPerHead) {
        factor = inverse_rms(sum_of_lanes<Plan::lanes>(square_sum(i, values)), Plan::head_dim, eps);
      }
      if constexpr (Plan::norm != kNoNorm) scale(i, factor, values);
      angles.turn_all(values);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (!owns(i, chunk)) continue;
        data[i][chunk].pack(values[chunk]);
        data[i][chunk].store(head + chunk_offset<Plan>(place.lane, chunk));
      }
    }
  }
};

// Adds up the sums of one token's threads, of queries and of keys, for every thread of the token.
template <class Plan>
__device__ __forceinline__ void add_up_token(const Place& place, float (&sums)[2], Shared<Plan>& shared) {
  constexpr int kTokenWarps = Shape<Plan>::kTokenWarps;
  const int warp = threadIdx.x / kWarp % kTokenWarps;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    sums[side] = sum_of_lanes<kWarp>(sums[side]);
    if (threadIdx.x % kWarp == 0) shared.square_sums[place.slot][warp][side] = sums[side];
  }
  __syncthreads();
  sums[0] = sums[1] = 0.0f;
#pragma unroll
  for (int other = 0; other < kTokenWarps; ++other) {
    sums[0] += shared.square_sums[place.slot][other][0];
    sums[1] += shared.square_sums[place.slot][other][1];
  }
}

template <class Plan>
__device__ __forceinline__ void rotate_tokens(const RotationArgs& args, Shared<Plan>& shared) {
  constexpr bool kKeys = Plan::key_heads > 0;
  const Place place = find_place<Plan>(args);
  Heads<Plan, typename Plan::QueryWeight, Plan::query_heads> query(args.query, args.query_strides, place);
  Heads<Plan, typename Plan::KeyWeight, kKeys ? Plan::key_heads : 1> key(args.key, args.key_strides, place);
  query.load();
  if constexpr (kKeys) key.load();
  if constexpr (Plan::weighted) query.load_weights();
  if constexpr (Plan::weighted && kKeys) key.load_weights();

  find_rows(args, place, shared);
  __syncthreads();
  read_angles(args, shared);
  float factors[2] = {0.0f, 0.0f};
  if constexpr (Plan::norm == kAcrossHeads) {
    factors[0] = query.square_sum_of_rows();
    if constexpr (kKeys) factors[1] = key.square_sum_of_rows();
    add_up_token(place, factors, shared);  // holds the barrier that the angles need
    factors[0] = inverse_rms(factors[0], Plan::query_heads * Plan::head_dim, args.eps);
    if constexpr (kKeys) factors[1] = inverse_rms(factors[1], Plan::key_heads * Plan::head_dim, args.eps);
  } else {
    __syncthreads();
  }
  // A norm per head has yet to shuffle, for which it needs every thread.
  if (Plan::norm != kPerHead && !place.live) return;
  const Angles<Plan> angles(shared, place.slot, place.lane);
  query.finish(angles, factors[0], args.eps);
  if constexpr (kKeys) key.finish(angles, factors[1], args.eps);
}

}  // namespace dit_rope
