// One kernel for rotation, for a norm with rotation, and for the shift of rotated keys.
//
// A block owns Plan::tokens whole tokens of queries and keys. Its threads are [tokens][rows][lanes]: a lane owns the
// same channels of every head, so that the cosines and sines of its pairs stay in registers, and walks down the heads in
// steps of Plan::rows. A thread issues all its loads before anything else. While they are under way the block finds the
// table rows of its tokens and reads their angles into shared memory, each once per token. Where every head has angles
// of its own, nobody shares them: a thread reads those of its heads itself, once for queries and keys, and waits for no
// other.
//
// Plan::split: blocks by turns own queries and keys, of as many heads, instead of both.
//
// Plan::stages: a block takes token after token, and bulk copies bring the next ones into stages of shared memory.
//
// Interleaved pairing: a lane owns one chunk of whole pairs. Half pairing: a lane owns two chunks whose channels are
// each other's partners; lanes past the last pair own two chunks each of the channels that do not turn.

#include "rope.cuh"

namespace dit_rope {

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

// `first_token` is the first of the block.
template <class Plan>
__device__ __forceinline__ Place find_place(const RotationArgs& args, unsigned first_token) {
  constexpr unsigned kTokenThreads = Shape<Plan>::kTokenThreads, kLanes = Plan::lanes, kTokens = Plan::tokens;
  const unsigned thread = threadIdx.x;
  Place place;
  place.slot = min(thread / kTokenThreads, kTokens - 1);
  place.row = thread % kTokenThreads / kLanes;
  place.lane = thread % kLanes;
  place.batch = blockIdx.z * gridDim.y + blockIdx.y;
  place.token = first_token + place.slot;
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

// The angles of every head of this thread, of which queries and keys have the same. The pairs of one access are of one
// axis. What does not turn leaves early, in branches: the compiler then keeps all these loads in front of a norm's sums.
template <class Plan, int kRows>
__device__ __forceinline__ void load_own_angles(
    const RotationArgs& args, const Place& place, Angles<Plan> (&angles)[kRows]) {
  using Table = typename Plan::Table;
  constexpr int kPairs = Shape<Plan>::kPairs, kGroup = Plan::table_access / sizeof(Table);
  constexpr int kHeads = Plan::query_heads > Plan::key_heads ? Plan::query_heads : Plan::key_heads;
  const int first_pair = place.lane * kPairs;
  if (!place.live || first_pair >= Plan::pairs) return;
  int row = 0, last_axis = -1;
#pragma unroll
  for (int i = 0; i < kPairs; i += kGroup) {
    int first;
    const int axis = pair_axis<Plan>(first_pair + i, first);
    if (axis != last_axis) row = token_row(args, place.batch, place.token - args.prefix, axis);
    last_axis = axis;
    if (row < 0 || first_pair + i >= Plan::pairs) continue;
    const Table* from = static_cast<const Table*>(args.rows) + row * args.row_stride + (first_pair + i - first);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int head = place.row + j * Plan::rows;
      const long long further = head * args.head_rows;
      const bool there = head < kHeads && row + further < args.row_count;
      if (there) angles[j].template load<kGroup>(i, from + further * args.row_stride, args.sin_offset);
    }
  }
}

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

// sum / count, the product with the reciprocal put right by what is left of it: a mean may be far larger than what it
// is subtracted for.
__device__ __forceinline__ float mean_of(float sum, int count) {
  const float inverse = 1.0f / static_cast<float>(count);
  const float mean = __fmul_rn(sum, inverse);
  return __fmaf_rn(__fmaf_rn(-static_cast<float>(count), mean, sum), inverse, mean);
}

// What one thread has of one tensor: its chunks of kRows heads, and of their weights and biases.
template <class Plan, typename Weight, typename Bias, int kHeads>
struct Heads {
  using Data = typename Plan::Data;
  static constexpr int kChunks = Shape<Plan>::kChunks;
  static constexpr int kRows = (kHeads + Plan::rows - 1) / Plan::rows;
  static constexpr bool kAcross = Plan::norm == kAcrossHeads;
  // Weights across heads are all held from the start, or those of one row and of the next.
  static constexpr bool kLate = kAcross && Plan::weighted && Plan::late_weights;
  static constexpr int kWeightRows = !kAcross ? 1 : kLate ? 2 : kRows;
  template <typename Number>
  using Parameters = Chunk<Number, Plan::chunk, Plan::weight_access>[kChunks];

  const Tensor& tensor;
  const Strides& strides;
  const Place& place;
  Chunk<Data, Plan::chunk, Plan::access> data[kRows][kChunks];
  Parameters<Weight> weights[kWeightRows];
  Parameters<Bias> bias;

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
        if (owns(i, chunk)) {
          data[i][chunk].template load_once<Plan::loads>(head + chunk_offset<Plan>(place.lane, chunk));
        }
      }
    }
  }

  // The same from the heads of this token in shared memory, which lie one behind the other.
  __device__ __forceinline__ void load_staged(const Data* heads) {
    const Data* head = heads + first_channel<Plan>(place.lane) + place.row * Plan::head_dim;
#pragma unroll
    for (int i = 0; i < kRows; ++i, head += Plan::rows * Plan::head_dim) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (owns(i, chunk)) data[i][chunk].load_staged(head + chunk_offset<Plan>(place.lane, chunk));
      }
    }
  }

  // Weights or biases of this thread's channels of the head of row i, `from` by reference: it is read from the arguments
  // here, not held before.
  template <typename Number>
  __device__ __forceinline__ void load_parameters(
      const void* const& from, int i, Parameters<Number>& parameters) const {
    const int head = kAcross ? place.row + i * Plan::rows : 0;
    const Number* start = static_cast<const Number*>(from) + head * Plan::head_dim + first_channel<Plan>(place.lane);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (owns(i, chunk)) parameters[chunk].load_shared(start + chunk_offset<Plan>(place.lane, chunk));
    }
  }

  // All weights that are held from the start, and the biases that heads share. Biases across heads are read when they
  // are added: a thread has no registers for both of many heads.
  __device__ __forceinline__ void load_norm() {
    if constexpr (Plan::weighted && !kLate) {
#pragma unroll
      for (int i = 0; i < kWeightRows; ++i) load_parameters<Weight>(tensor.weight, i, weights[i]);
    }
    if constexpr (Plan::biased && !kAcross) load_parameters<Bias>(tensor.bias, 0, bias);
  }

  __device__ __forceinline__ void unpack(int i, Channels<Plan>& values) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) data[i][chunk].unpack(values[chunk]);
  }

  // Sum over this thread's channels of row i.
  __device__ __forceinline__ float sum(int i, const Channels<Plan>& values) const {
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < Plan::chunk; ++j) part = __fadd_rn(part, values[chunk][j]);
      if (owns(i, chunk)) sum += part;
    }
    return sum;
  }

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

  __device__ __forceinline__ float sum_of_rows() const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Channels<Plan> values;
      unpack(i, values);
      total += sum(i, values);
    }
    return total;
  }

  __device__ __forceinline__ float square_sum_of_rows(float mean) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Channels<Plan> values;
      unpack(i, values);
      if constexpr (Plan::centred) centre(mean, values);
      sum += square_sum(i, values);
    }
    return sum;
  }

  __device__ __forceinline__ void centre(float mean, Channels<Plan>& values) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int j = 0; j < Plan::chunk; ++j) values[chunk][j] = __fsub_rn(values[chunk][j], mean);
    }
  }

  __device__ __forceinline__ void scale(int i, float factor, Channels<Plan>& values) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float weight[Plan::chunk], added[Plan::chunk];
      if constexpr (Plan::weighted) weights[i % kWeightRows][chunk].unpack(weight);
      if constexpr (Plan::biased) bias[chunk].unpack(added);
#pragma unroll
      for (int j = 0; j < Plan::chunk; ++j) {
        float& value = values[chunk][j];
        value = __fmul_rn(value, factor);
        if constexpr (Plan::weighted && Plan::biased && !Plan::rounds_steps) {
          value = __fmaf_rn(value, weight[j], added[j]);
        } else if constexpr (Plan::weighted && !Plan::rounds_steps) {
          value = __fmul_rn(value, weight[j]);
        } else if constexpr (Plan::biased && !Plan::rounds_steps) {
          value = __fadd_rn(value, added[j]);
        }
      }
      if constexpr (Plan::rounds_steps && Plan::weighted) {
        round_all(values[chunk]);
#pragma unroll
        for (int j = 0; j < Plan::chunk; ++j) values[chunk][j] = __fmul_rn(values[chunk][j], weight[j]);
      }
      if constexpr (Plan::rounds_steps && Plan::biased) {
        round_all(values[chunk]);
#pragma unroll
        for (int j = 0; j < Plan::chunk; ++j) values[chunk][j] = __fadd_rn(values[chunk][j], added[j]);
      }
      if constexpr (Plan::rounds) round_all(values[chunk]);
    }
  }

  // Rounds the channels of a chunk to the dtype of the data.
  __device__ __forceinline__ void round_all(float (&values)[Plan::chunk]) const {
    if constexpr (Word<Data>::kNumbers == 2) {
#pragma unroll
      for (int j = 0; j < Plan::chunk; j += 2) round_two<Data>(values[j], values[j + 1]);
    }
  }

  // Norms, turns and writes every row, by one angle for all of them or by one for each. `mean` and `factor`, which is
  // 1 / rms, are of a norm across heads.
  __device__ __forceinline__ void finish(const Angles<Plan>* angles, float mean, float factor, float eps) {
    Data* head = static_cast<Data*>(tensor.out) + first_channel<Plan>(place.lane) +
                 place.entry * strides.out_batch + place.token * strides.out_token + place.row * strides.out_head;
    if constexpr (kLate) load_parameters<Weight>(tensor.weight, 0, weights[0]);
#pragma unroll
    for (int i = 0; i < kRows; ++i, head += Plan::rows * strides.out_head) {
      if constexpr (kLate) {  // before this row's stores, which no later load overtakes
        if (i + 1 < kRows) load_parameters<Weight>(tensor.weight, i + 1, weights[(i + 1) % kWeightRows]);
      }
      if constexpr (Plan::biased && kAcross) load_parameters<Bias>(tensor.bias, i, bias);
      Channels<Plan> values;
      unpack(i, values);
      if constexpr (Plan::norm == kPerHead) {
        if constexpr (Plan::centred) mean = mean_of(sum_of_lanes<Plan::lanes>(sum(i, values)), Plan::head_dim);
      }
      if constexpr (Plan::centred) centre(mean, values);
      if constexpr (Plan::norm == kPerHead) {
        factor = inverse_rms(sum_of_lanes<Plan::lanes>(square_sum(i, values)), Plan::head_dim, eps);
      }
      if constexpr (Plan::norm != kNoNorm) scale(i, factor, values);
      angles[Plan::own_angles ? i : 0].turn_all(values);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (!owns(i, chunk)) continue;
        data[i][chunk].pack(values[chunk]);
        data[i][chunk].template store<Plan::stores>(head + chunk_offset<Plan>(place.lane, chunk));
      }
    }
  }
};

// Adds up the sums of one token's threads, of queries and of keys, for every thread of the token.
template <class Plan>
__device__ __forceinline__ void add_up_token(
    const Place& place, float (&sums)[2], float (&of_warps)[Plan::tokens][Shape<Plan>::kTokenWarps][2]) {
  constexpr int kTokenWarps = Shape<Plan>::kTokenWarps;
  const int warp = threadIdx.x / kWarp % kTokenWarps;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    sums[side] = sum_of_lanes<kWarp>(sums[side]);
    if (threadIdx.x % kWarp == 0) of_warps[place.slot][warp][side] = sums[side];
  }
  __syncthreads();
  sums[0] = sums[1] = 0.0f;
#pragma unroll
  for (int other = 0; other < kTokenWarps; ++other) {
    sums[0] += of_warps[place.slot][other][0];
    sums[1] += of_warps[place.slot][other][1];
  }
}

// Means, where they are subtracted, and reciprocal root mean squares of a norm across heads, of queries and of keys.
// Holds a barrier.
template <class Plan, class Query, class Key>
__device__ __forceinline__ void norm_token(
    const Query& query, const Key& key, const Place& place, float eps, float (&means)[2], float (&factors)[2],
    Shared<Plan>& shared) {
  constexpr bool kKeys = Shape<Plan>::kKeys;
  constexpr int kQueryChannels = Plan::query_heads * Plan::head_dim, kKeyChannels = Plan::key_heads * Plan::head_dim;
  if constexpr (Plan::centred) {
    means[0] = query.sum_of_rows();
    if constexpr (kKeys) means[1] = key.sum_of_rows();
    add_up_token<Plan>(place, means, shared.sums[0]);
    means[0] = mean_of(means[0], kQueryChannels);
    if constexpr (kKeys) means[1] = mean_of(means[1], kKeyChannels);
  }
  factors[0] = query.square_sum_of_rows(means[0]);
  if constexpr (kKeys) factors[1] = key.square_sum_of_rows(means[1]);
  add_up_token<Plan>(place, factors, shared.sums[Plan::centred ? 1 : 0]);
  factors[0] = inverse_rms(factors[0], kQueryChannels, eps);
  if constexpr (kKeys) factors[1] = inverse_rms(factors[1], kKeyChannels, eps);
}

// What a thread has of queries and of keys; where a block has one of them, it is the first.
template <class Plan>
using Query = Heads<Plan, typename Plan::QueryWeight, typename Plan::QueryBias, Plan::query_heads>;
template <class Plan>
using Key = Heads<Plan, typename Plan::KeyWeight, typename Plan::KeyBias, Shape<Plan>::kKeys ? Plan::key_heads : 1>;

template <class Plan>
__device__ __forceinline__ void rotate_tokens(const RotationArgs& args, Shared<Plan>& shared) {
  constexpr bool kKeys = Shape<Plan>::kKeys;
  const unsigned side = Plan::split ? blockIdx.x % 2 : 0, block = Plan::split ? blockIdx.x / 2 : blockIdx.x;
  const Place place = find_place<Plan>(args, block * Plan::tokens);
  Query<Plan> query(args.tensors[side], args.strides[side], place);
  Key<Plan> key(args.tensors[1], args.strides[1], place);
  query.load();
  if constexpr (kKeys) key.load();
  query.load_norm();
  if constexpr (kKeys) key.load_norm();

  constexpr int kRows = Query<Plan>::kRows > Key<Plan>::kRows ? Query<Plan>::kRows : Key<Plan>::kRows;
  Angles<Plan> angles[Plan::own_angles ? kRows : 1];
  if constexpr (Plan::own_angles) {
    load_own_angles(args, place, angles);
  } else {
    find_rows(args, place, shared);
    __syncthreads();
    read_angles(args, shared);
  }
  float means[2] = {0.0f, 0.0f}, factors[2] = {0.0f, 0.0f};
  if constexpr (Plan::norm == kAcrossHeads) {
    norm_token(query, key, place, args.eps, means, factors, shared);  // holds the barrier that the angles need
  } else if constexpr (!Plan::own_angles) {
    __syncthreads();
  }
  // A norm per head has yet to shuffle, for which it needs every thread.
  if (Plan::norm != kPerHead && !place.live) return;
  if constexpr (Plan::own_angles) {
#pragma unroll
    for (Angles<Plan>& of_head : angles) of_head.orient(args.inverse);
  } else {
    angles[0].read(shared, place.slot, place.lane);
  }
  query.finish(angles, means[0], factors[0], args.eps);
  if constexpr (kKeys) key.finish(angles, means[1], factors[1], args.eps);
}

// Begins to copy the heads of one token into shared memory, at once where they lie one behind the other.
template <class Plan, int kHeads>
__device__ __forceinline__ void fetch_heads(
    const Tensor& tensor, const Strides& strides, unsigned batch, unsigned token, typename Plan::Data* to,
    Arrival* arrival) {
  using Data = typename Plan::Data;
  constexpr unsigned kHeadBytes = Plan::head_dim * sizeof(Data);
  const Data* from = static_cast<const Data*>(tensor.x) + batch * strides.x_batch + token * strides.x_token;
  const bool dense = strides.x_head == Plan::head_dim;
  const int copies = dense ? 1 : kHeads;
#pragma unroll 1
  for (int i = 0; i < copies; ++i) {
    copy_bulk(to + i * Plan::head_dim, from + i * strides.x_head, dense ? kHeads * kHeadBytes : kHeadBytes, arrival);
  }
}

template <class Plan>
__device__ __forceinline__ void fetch_token(
    const RotationArgs& args, unsigned batch, unsigned token, Stage<Plan>& stage, Arrival* arrival) {
  constexpr int kHeads = Plan::query_heads + Plan::key_heads;
  announce(arrival, kHeads * Plan::head_dim * sizeof(typename Plan::Data));
  fetch_heads<Plan, Plan::query_heads>(args.tensors[0], args.strides[0], batch, token, stage.query, arrival);
  if constexpr (Plan::key_heads > 0) {
    fetch_heads<Plan, Plan::key_heads>(args.tensors[1], args.strides[1], batch, token, stage.key, arrival);
  }
}

// A norm across heads by blocks that stay: token after token, weights in registers, the next Plan::stages tokens on their
// way into shared memory. A stage is filled anew after the barrier of the norm, when every thread has read it.
template <class Plan>
__device__ __forceinline__ void rotate_tokens(const RotationArgs& args, StreamShared<Plan>& shared) {
  static_assert(Plan::norm == kAcrossHeads && Plan::tokens == 1 && !Plan::own_angles && !Plan::shift && !Plan::split,
                "a norm across heads, one token a block");
  constexpr bool kKeys = Shape<Plan>::kKeys;
  Stage<Plan>* stages = reinterpret_cast<Stage<Plan>*>(dynamic_shared());
  Place place = find_place<Plan>(args, blockIdx.x);
  if (place.entry >= args.entry_count) return;  // the same for the whole block
  Query<Plan> query(args.tensors[0], args.strides[0], place);
  Key<Plan> key(args.tensors[1], args.strides[1], place);
  const bool fetches = threadIdx.x == 0;
  if (fetches) {  // the others wait for nothing before a barrier
    prepare(shared.arrivals, Plan::stages);
    for (unsigned i = 0; i < Plan::stages && blockIdx.x + i * gridDim.x < args.tokens; ++i) {
      fetch_token(args, place.entry, blockIdx.x + i * gridDim.x, stages[i], shared.arrivals + i);
    }
  }
  query.load_norm();
  if constexpr (kKeys) key.load_norm();

  unsigned at = 0, parity = 0, turn = 0;
#pragma unroll 1
  for (unsigned token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    place = find_place<Plan>(args, token);
    Shared<Plan>& of_token = shared.tokens[turn];
    find_rows(args, place, of_token);
    __syncthreads();
    read_angles(args, of_token);
    wait_for(shared.arrivals + at, parity);
    query.load_staged(stages[at].query);
    if constexpr (kKeys) key.load_staged(stages[at].key);
    float means[2] = {0.0f, 0.0f}, factors[2] = {0.0f, 0.0f};
    norm_token(query, key, place, args.eps, means, factors, of_token);
    const unsigned next = token + Plan::stages * gridDim.x;
    if (fetches && next < args.tokens) fetch_token(args, place.entry, next, stages[at], shared.arrivals + at);
    if (place.live) {
      Angles<Plan> angles;
      angles.read(of_token, place.slot, place.lane);
      query.finish(&angles, means[0], factors[0], args.eps);
      if constexpr (kKeys) key.finish(&angles, means[1], factors[1], args.eps);
    }
    turn ^= 1;
    if (++at == Plan::stages) at = 0, parity ^= 1;
  }
}

}  // namespace dit_rope
