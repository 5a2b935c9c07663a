// The contract of the rotation kernels: the arguments of one rotation, where a token stands, and how a pair turns.
//
// It says in CUDA what dit_rope/rotation_args.py says in Python, so that a kernel that includes it agrees with every
// other backend. Includes nothing, so that NVRTC needs no include path. Element offsets are 64-bit throughout.

#pragma once

namespace dit_rope {

constexpr int kMaxAxes = 4;

// Arguments of one rotation, passed to a kernel by value. Table is float, or double for float64 data.
// Members go from 8-byte to 4-byte ones: the layout has no padding between them and can be packed by the host.
template <typename Table>
struct RotationArgs {
  const Table* rows;         // [2, R, P]: cos, then sin, of all axes, axis after axis along R; last dim contiguous
  const int* positions;      // [1 or B, count, axes] rows of the table, contiguous; or null: rows come from the grid
  long long sin_offset;      // elements from a cosine to its sine
  long long row_stride;      // elements from a row of the table to the next
  long long position_batch;  // elements from one batch entry of positions to the next; 0 when all share one
  long long token_offset;    // flat grid index of the first token; ignored with positions
  long long prefix;          // tokens before the grid's
  long long count;           // the grid's tokens in this sequence, padding included
  int axes;                  // 1 to kMaxAxes
  int pairs[kMaxAxes];       // channel pairs of each axis
  int sizes[kMaxAxes];       // the local grid, axis 0 slowest; ignored with positions
  int first_rows[kMaxAxes];  // table row of coordinate 0 of each axis; ignored with positions
  int half;                  // 1: pair p is channels (p, p + n), n = sum of pairs; 0: channels (2 p, 2 p + 1)
  int inverse;               // 1: turn backwards
};

// Finds the table rows of one token. Returns false when the token is copied unturned: prefix, suffix or padding.
// A negative row leaves the pairs of that axis unturned.
template <typename Table>
__device__ __forceinline__ bool token_rows(const RotationArgs<Table>& args, long long batch, long long token,
                                           int (&rows)[kMaxAxes]) {
  const long long number = token - args.prefix;
  if (number < 0 || number >= args.count) return false;
  if (args.positions != nullptr) {
    const int* position = args.positions + batch * args.position_batch + number * args.axes;
    for (int axis = 0; axis < args.axes; ++axis) rows[axis] = position[axis];
    return true;
  }
  long long rest = args.token_offset + number;
  for (int axis = args.axes - 1; axis >= 0; --axis) {
    rows[axis] = args.first_rows[axis] + static_cast<int>(rest % args.sizes[axis]);
    rest /= args.sizes[axis];
  }
  return rest == 0;  // what is left over counts whole grids: the token is padding past the last one
}

// Finds the axis that owns pair `pair` of a head, and the pair's column in that axis' rows.
// `pair` must be below the sum of args.pairs.
template <typename Table>
__device__ __forceinline__ int pair_axis(const RotationArgs<Table>& args, int pair, int& column) {
  int axis = 0;
  for (; pair >= args.pairs[axis]; ++axis) pair -= args.pairs[axis];
  column = pair;
  return axis;
}

// Finds the two channels of pair `pair`, of `all_pairs` in all.
template <typename Table>
__device__ __forceinline__ void pair_channels(const RotationArgs<Table>& args, int pair, int all_pairs, int& first,
                                              int& second) {
  first = args.half ? pair : 2 * pair;
  second = args.half ? pair + all_pairs : 2 * pair + 1;
}

// Reads cos and sin of one pair; (1, 0) for a negative row. The sine carries the sign of args.inverse.
template <typename Table>
__device__ __forceinline__ void pair_angle(const RotationArgs<Table>& args, int row, int column, Table& cosine,
                                           Table& sine) {
  if (row < 0) {
    cosine = Table(1);
    sine = Table(0);
    return;
  }
  const Table* entry = args.rows + row * args.row_stride + column;
  cosine = entry[0];
  sine = args.inverse ? -entry[args.sin_offset] : entry[args.sin_offset];
}

// Turns one pair with the roundings of eager code: every product and every sum is rounded on its own. The compiler
// never contracts these intrinsics into a fused multiply-add, whatever its flags.
__device__ __forceinline__ void turn_exact(float& first, float& second, float cosine, float sine) {
  const float a = first, b = second;
  first = __fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine));
  second = __fadd_rn(__fmul_rn(a, sine), __fmul_rn(b, cosine));
}

__device__ __forceinline__ void turn_exact(double& first, double& second, double cosine, double sine) {
  const double a = first, b = second;
  first = __dsub_rn(__dmul_rn(a, cosine), __dmul_rn(b, sine));
  second = __dadd_rn(__dmul_rn(a, sine), __dmul_rn(b, cosine));
}

// Turns one pair with two roundings a channel instead of three.
__device__ __forceinline__ void turn_fast(float& first, float& second, float cosine, float sine) {
  const float a = first, b = second;
  first = __fmaf_rn(a, cosine, -__fmul_rn(b, sine));
  second = __fmaf_rn(a, sine, __fmul_rn(b, cosine));
}

__device__ __forceinline__ void turn_fast(double& first, double& second, double cosine, double sine) {
  const double a = first, b = second;
  first = __fma_rn(a, cosine, -__dmul_rn(b, sine));
  second = __fma_rn(a, sine, __dmul_rn(b, cosine));
}

}  // namespace dit_rope
