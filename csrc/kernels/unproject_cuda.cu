// SPDX-License-Identifier: Apache-2.0
// A few neighbouring threads serve one voxel, each for 16 bytes of its channels, so that a warp reads whole rows of
// features. Every thread projects the voxel for itself: arithmetic is cheap beside the loads, and nothing has to be
// exchanged. The backward runs over the views twice, first for the aggregate, then to scatter each view's gradient;
// the second reading of the features finds them in the cache.
//
// Scattering adds with atomics, whose order changes the last bits. Where that must not be, contributions are added as
// 64-bit integers in units small enough for the largest: a first run finds that one, a second adds.
#include <type_traits>

#include "kernels/launch.cuh"
#include "kernels/unproject.h"
#include "math/unproject.h"

namespace tritool {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarpSize;
constexpr int kMaxLanes = 8;  // threads per voxel in the usual case
constexpr int kInvalidExponent = 4096;

// Blocks that a multiprocessor is to hold: with float32 128 registers a thread suffice without spills, with the eight
// channels of a vector of 16-bit features, or float64, they do not.
template <class In>
constexpr int kMinBlocks = sizeof(In) == 4 ? 2 : 1;

// How the threads of a block divide voxels and channels.
struct Tiling {
  int lanes;         // threads per voxel, a power of two
  int voxels;        // per block
  int rounds;        // over the vectors of a row
  bool transposed;   // the volume is channels first: written and read through shared memory
  bool vectors;      // the volume is channels last and aligned for 16 bytes at once
  int64_t per_item;  // tiles of an item
};

template <class T>
struct alignas(16) Geometry {
  T frame[4][3];
  T map[4];  // width, height, scale_x, scale_y
};

// The shared memory of a block: geometry, matrices [C, 12], then what the kernel wants.
template <class T>
__host__ __device__ constexpr int64_t geometry_bytes(int64_t views) {
  return int64_t(sizeof(Geometry<T>)) + views * 12 * int64_t(sizeof(T));
}

// Loads the geometry of an item; the block then has to be synchronised.
template <class In, class T = Accumulator<In>>
__device__ __forceinline__ void load_geometry(const UnprojectParams<In>& params, const int64_t* offset,
                                              Geometry<T>* geometry) {
  using Params = UnprojectParams<In>;
  T* matrices = reinterpret_cast<T*>(geometry + 1);
  for (int n = int(threadIdx.x); n < params.views * 12; n += kBlock) {
    const int view = n / 12, row = n / 4 % 3, column = n % 4;
    matrices[n] = params.projections[offset[Params::kProjections] + view * params.projections_stride[0] +
                                     row * params.projections_stride[1] + column * params.projections_stride[2]];
  }
  if (threadIdx.x < 12 && params.grid_size[0] != 0) {
    const int row = threadIdx.x / 3, a = threadIdx.x % 3;
    geometry->frame[row][a] =
        params.grid[offset[Params::kGrid] + row * params.grid_stride[0] + a * params.grid_stride[1]];
  }
  if (threadIdx.x == 0) {
    const T width = T(params.width), height = T(params.height);
    geometry->map[0] = width;
    geometry->map[1] = height;
    geometry->map[2] = params.official ? (width - T(1)) / height : T(1);
    geometry->map[3] = params.official ? (height - T(1)) / width : T(1);
  }
}

template <class T>
struct VoxelPoint {
  T index[3];
  T world[3];
};

template <class In, class T = Accumulator<In>>
__device__ __forceinline__ VoxelPoint<T> voxel_point(const UnprojectParams<In>& params, const int64_t* offset,
                                                     const Geometry<T>* geometry, unsigned voxel) {
  VoxelPoint<T> point{};
  if (params.grid_size[0] == 0) {
    const T* from = params.grid + offset[UnprojectParams<In>::kGrid] + voxel * params.grid_stride[0];
    for (int a = 0; a < 3; ++a) point.world[a] = from[a * params.grid_stride[1]];
    return point;
  }
  const unsigned depth = static_cast<unsigned>(params.grid_size[1]), width = static_cast<unsigned>(params.grid_size[2]);
  const unsigned line = voxel / width, i = line / depth;
  point.index[0] = T(int(i));
  point.index[1] = T(int(line - i * depth));
  point.index[2] = T(int(voxel - line * width));
  voxel_center(geometry->frame, point.index[0], point.index[1], point.index[2], point.world);
  return point;
}

template <class T>
__device__ __forceinline__ void load_matrix(const Geometry<T>* geometry, int view, T (&matrix)[3][4]) {
  const T* from = reinterpret_cast<const T*>(geometry + 1) + 12 * view;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j) matrix[i][j] = from[4 * i + j];
}

template <class T>
struct Sight {
  bool seen, unknown;
  Footprint<T> footprint;
};

template <class T>
__device__ __forceinline__ Sight<T> sight_of(const Geometry<T>* geometry, int view, const T (&world)[3]) {
  T matrix[3][4];
  load_matrix(geometry, view, matrix);
  const FeatureMap<T> map{geometry->map[0], geometry->map[1], geometry->map[2], geometry->map[3]};
  const Cell<T> cell = cell_of(world, matrix, map);
  return {cell.column >= T(-1), cell.column == T(kUnknownColumn), footprint_of(cell, map.width, map.height)};
}

template <class T>
__device__ __forceinline__ unsigned tap_offset(const Footprint<T>& footprint, int tap, int64_t width, int64_t row) {
  const int x = int(footprint.column[tap % 2]), y = int(footprint.row[tap / 2]);
  return (unsigned(y) * unsigned(width) + unsigned(x)) * unsigned(row);
}

template <class In, int kWidth, class T>
__device__ __forceinline__ void sample(const In* map, const Footprint<T>& footprint, int64_t width, int64_t row,
                                       T (&value)[kWidth]) {
  Vector<In, kWidth> vector[4];
  for (int tap = 0; tap < 4; ++tap)
    vector[tap] = *reinterpret_cast<const Vector<In, kWidth>*>(map + tap_offset(footprint, tap, width, row));
  for (int n = 0; n < kWidth; ++n) value[n] = T(0);
  for (int tap = 0; tap < 4; ++tap) {
    const T weight = footprint.along_x[tap % 2] * footprint.along_y[tap / 2];
    for (int n = 0; n < kWidth; ++n) value[n] = value[n] + weight * load(&vector[tap].element[n]);
  }
}

template <class In>
__device__ __forceinline__ const In* feature_rows(const UnprojectParams<In>& params, const int64_t* offset) {
  using Params = UnprojectParams<In>;
  return params.rows.staged ? static_cast<const In*>(params.staged) + offset[Params::kStaged]
                            : params.features + offset[Params::kFeatures];
}

// The confidences of a view in kWidth channels; 1 beyond the channels and where there are none.
template <int kWidth, class In, class T = Accumulator<In>>
__device__ __forceinline__ void load_confidences(const UnprojectParams<In>& params, const int64_t* offset, int view,
                                                 int64_t channel, T (&confidence)[kWidth]) {
  for (int n = 0; n < kWidth; ++n) confidence[n] = T(1);
  if (params.confidences == nullptr) return;
  const T* from = params.confidences + offset[UnprojectParams<In>::kConfidences] + view * params.confidences_stride[0];
  for (int n = 0; n < kWidth; ++n)
    if (channel + n < params.channels) confidence[n] = from[(channel + n) * params.confidences_stride[1]];
}

// One thread's channels of one voxel; `sampled` false: with values of 0.
template <class In, Aggregation kBy, int kWidth, class T = Accumulator<In>>
__device__ __forceinline__ void aggregate(const UnprojectParams<In>& params, const int64_t* offset,
                                          const Geometry<T>* geometry, const T (&world)[3], int64_t channel,
                                          bool sampled, ViewAggregate<T, kBy, true> (&result)[kWidth]) {
  const In* features = feature_rows(params, offset) + channel;
#pragma unroll 1  // several views at once would spill registers
  for (int view = 0; view < params.views; ++view) {
    const Sight<T> sight = sight_of(geometry, view, world);
    if (!sight.seen && !sight.unknown && params.exclude) continue;
    T value[kWidth] = {};
    if (sight.seen && sampled)
      sample(features + view * params.rows.view, sight.footprint, params.width, params.rows.row, value);
    T confidence[kWidth];
    load_confidences(params, offset, view, channel, confidence);
    for (int n = 0; n < kWidth; ++n) {
      if (sight.unknown)
        result[n].add_unknown(confidence[n]);
      else
        result[n].add(value[n], confidence[n]);
    }
  }
}

template <class In>
__global__ void __launch_bounds__(kBlock) unproject_stage_kernel(UnprojectParams<In> params, int64_t count) {
  const int64_t (&stride)[4] = params.features_stride;
  for (int64_t index = thread_index(); index < count; index += thread_count()) {
    const int64_t pixel = index / params.rows.row, k = index - pixel * params.rows.row;
    const int64_t line = pixel / params.width, x = pixel - line * params.width;
    const int64_t map = line / params.height, y = line - map * params.height;
    const int64_t item = map / params.views, view = map - item * params.views;
    int64_t offset[2];
    params.own_maps.offsets(item, offset);
    In element{};
    if (k < params.channels)
      element = params.features[offset[0] + view * stride[0] + k * stride[1] + y * stride[2] + x * stride[3]];
    static_cast<In*>(params.staged)[index] = element;
  }
}

// In one instruction, by intrinsic: an assignment of a Vector in registers becomes a store for each element.
template <class In, int kWidth>
__device__ __forceinline__ void store_vector(In* to, const Vector<In, kWidth>& vector) {
#if defined(__CUDA_ARCH__)
  static_assert(sizeof vector == sizeof(uint4), "16 bytes");
  uint4 bits;
  memcpy(&bits, &vector, sizeof bits);
  __stwb(reinterpret_cast<uint4*>(to), bits);
#else
  *reinterpret_cast<Vector<In, kWidth>*>(to) = vector;
#endif
}

// kWidth: elements per vector of 16 bytes.
template <class In, Aggregation kBy, int kWidth>
__global__ void __launch_bounds__(kBlock, kMinBlocks<In>) unproject_kernel(UnprojectParams<In> params, Tiling tiling) {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  TRITOOL_DYNAMIC_SHARED(Geometry<T>, geometry);
  In* tile = reinterpret_cast<In*>(reinterpret_cast<unsigned char*>(geometry) + geometry_bytes<T>(params.views));
  const int lane = threadIdx.x % tiling.lanes, local = threadIdx.x / tiling.lanes;
  const int64_t (&stride)[2] = params.volume_stride;
  for (int64_t block = blockIdx.x; block < params.batch.count * tiling.per_item; block += gridDim.x) {
    const int64_t item = block / tiling.per_item, first = (block - item * tiling.per_item) * tiling.voxels;
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    __syncthreads();  // the block before may still be read
    load_geometry(params, offset, geometry);
    __syncthreads();
    const int64_t voxel = first + local;
    const bool active = voxel < params.points;
    const VoxelPoint<T> point = voxel_point(params, offset, geometry, unsigned(active ? voxel : params.points - 1));
    In* out = params.volume + offset[Params::kVolume];
    for (int round = 0; round < tiling.rounds; ++round) {
      const int64_t channel = (int64_t(round) * tiling.lanes + lane) * kWidth;
      const bool there = channel < params.rows.row;
      Vector<In, kWidth> vector{};
      if (there) {
        ViewAggregate<T, kBy, true> result[kWidth];
        aggregate<In, kBy, kWidth>(params, offset, geometry, point.world, channel, true, result);
        for (int n = 0; n < kWidth; ++n) store(&vector.element[n], result[n].finish());
      }
      if (!tiling.transposed) {
        if (!there || !active) continue;
        In* to = out + voxel * stride[1] + channel * stride[0];
        if (tiling.vectors) {
          store_vector(to, vector);
        } else {
          for (int n = 0; n < kWidth; ++n)
            if (channel + n < params.channels) to[n * stride[0]] = vector.element[n];
        }
        continue;
      }
      const int width = tiling.lanes * kWidth, pitch = tiling.voxels + 1;
      for (int n = 0; n < kWidth; ++n) tile[(lane * kWidth + n) * pitch + local] = vector.element[n];
      __syncthreads();
      for (int n = int(threadIdx.x); n < width * tiling.voxels; n += kBlock) {
        const int k = n / tiling.voxels, v = n - k * tiling.voxels;
        const int64_t k_out = int64_t(round) * width + k;
        if (k_out < params.channels && first + v < params.points)
          out[k_out * stride[0] + (first + v) * stride[1]] = tile[k * pitch + v];
      }
      __syncthreads();
    }
  }
}

// ---- Backward ----

enum class Scatter { kNone, kAtomic, kMeasure, kFixedPoint };

// Of 16 bytes of float32 in one instruction where the device has it.
template <int kWidth>
__device__ __forceinline__ void add_vector(float* to, const float (&value)[kWidth]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  for (int n = 0; n < kWidth; n += 4)
    atomicAdd(reinterpret_cast<float4*>(to + n), make_float4(value[n], value[n + 1], value[n + 2], value[n + 3]));
#else
  for (int n = 0; n < kWidth; ++n) atomicAdd(to + n, value[n]);
#endif
}
template <int kWidth>
__device__ __forceinline__ void add_vector(double* to, const double (&value)[kWidth]) {
  for (int n = 0; n < kWidth; ++n) atomicAdd(to + n, value[n]);
}

// e with |x| < 2^e; for a number that is not finite the exponent that says so.
template <class T>
__device__ __forceinline__ int exponent_above(T x) {
  if (!is_finite(x)) return kInvalidExponent;
  return x == T(0) ? -kInvalidExponent : ::ilogb(double(x)) + 1;
}

// The power of two that turns contributions below 2^exponent into integers of which `points` can be added.
__device__ __forceinline__ int fixed_point_shift(int exponent, int64_t points) {
  int bits = 1;
  while ((int64_t(1) << bits) < points) ++bits;
  return 62 - bits - exponent;
}

template <class T>
struct BackwardShared {
  Geometry<T>* geometry;
  T* pixels;  // [C, voxels, 2], gradients to the pixels
  T* world;   // [kWarps, 32, 3]
};

template <class In, int kWidth, class T = Accumulator<In>>
__device__ __forceinline__ void load_grad(const UnprojectParams<In>& params, const Tiling& tiling, const In* volume,
                                          int64_t voxel, int64_t channel, T (&grad)[kWidth]) {
  const int64_t (&stride)[2] = params.volume_stride;
  const In* from = volume + voxel * stride[1] + channel * stride[0];
  if (tiling.vectors) {
    const auto vector = *reinterpret_cast<const Vector<In, kWidth>*>(from);
    for (int n = 0; n < kWidth; ++n) grad[n] = load(&vector.element[n]);
  } else {
    for (int n = 0; n < kWidth; ++n) grad[n] = channel + n < params.channels ? load(from + n * stride[0]) : T(0);
  }
}

// The gradients to the pixels of a tile's voxels, taken on to the projections, the frame or the points.
template <class In, class T = Accumulator<In>>
__device__ __forceinline__ void move_gradients(const UnprojectParams<In>& params,
                                               const UnprojectGradients<In>& gradients, const Tiling& tiling,
                                               const int64_t* offset, const BackwardShared<T>& shared, int64_t item,
                                               int64_t first, T* partial) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Geometry<T>* geometry = shared.geometry;
  for (int start = 0; start < tiling.voxels; start += kWarpSize) {
    const int local = start + lane;
    const bool active = local < tiling.voxels && first + local < params.points;
    const VoxelPoint<T> point =
        voxel_point(params, offset, geometry, unsigned(active ? first + local : params.points - 1));
    T grad_world[3] = {T(0), T(0), T(0)};
    for (int view = warp; view < params.views; view += kWarps) {
      T matrix[3][4], grad_matrix[3][4], grad[2] = {T(0), T(0)};
      load_matrix(geometry, view, matrix);
      for (int a = 0; active && a < 2; ++a)
        grad[a] = shared.pixels[(view * tiling.voxels + local) * 2 + a] * geometry->map[2 + a];
      project_point_vjp(point.world, matrix, grad, grad_world, grad_matrix);
      for (int i = 0; gradients.projections != nullptr && i < 3; ++i) {
        for (int j = 0; j < 4; ++j) {
          const T total = warp_sum(grad_matrix[i][j]);
          if (lane == 0) partial[12 * view + 4 * i + j] += total;
        }
      }
    }
    if (gradients.grid == nullptr) continue;
    for (int a = 0; a < 3; ++a) shared.world[(warp * kWarpSize + lane) * 3 + a] = grad_world[a];
    __syncthreads();
    if (warp == 0) {
      for (int a = 0; a < 3; ++a) {
        T total = T(0);
        for (int w = 0; w < kWarps; ++w) total += shared.world[(w * kWarpSize + lane) * 3 + a];
        if (params.grid_size[0] == 0) {
          if (active) gradients.grid[(item * params.points + first + local) * 3 + a] = total;
          continue;
        }
        for (int n = 0; n < 4; ++n) {
          const T moment = warp_sum(n == 0 ? total : total * point.index[n == 0 ? 0 : n - 1]);
          if (lane == 0) partial[12 * params.views + 3 * n + a] += moment;
        }
      }
    }
    __syncthreads();
  }
}

// A unit's partial sums: [C, 12], [4, 3], and for each warp [C, row].
template <class In>
__host__ __device__ int64_t partial_entries(const UnprojectParams<In>& params, bool moving, bool confidences) {
  return (moving ? params.views * 12 + 12 : 0) + (confidences ? kWarps * params.views * params.rows.row : 0);
}

template <class In, Aggregation kBy, int kWidth>
__global__ void __launch_bounds__(kBlock, kMinBlocks<In>)
    unproject_backward_kernel(UnprojectParams<In> params, UnprojectGradients<In> gradients, UnprojectPlan plan,
                              Tiling tiling, Scatter scatter, int* exponents) {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  constexpr bool kLinear = is_linear(kBy);
  TRITOOL_DYNAMIC_SHARED(Geometry<T>, geometry);
  BackwardShared<T> shared;
  shared.geometry = geometry;
  shared.pixels = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(geometry) + geometry_bytes<T>(params.views));
  shared.world = shared.pixels + params.views * tiling.voxels * 2;
  const bool small = scatter != Scatter::kMeasure;
  const bool moving = small && (gradients.projections != nullptr || gradients.grid != nullptr);
  const bool confident = small && gradients.confidences != nullptr;
  const bool sampled = !kLinear || moving || confident;
  const int lane = threadIdx.x % tiling.lanes, local = threadIdx.x / tiling.lanes, warp = threadIdx.x / kWarpSize;
  for (int64_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    const int64_t item = unit / plan.parts, part = unit - item * plan.parts;
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T* partial = static_cast<T*>(gradients.partial) + unit * plan.entries;
    __syncthreads();
    load_geometry(params, offset, geometry);
    for (int64_t n = threadIdx.x; small && n < plan.entries; n += kBlock) partial[n] = T(0);
    __syncthreads();
    T* warp_confidences = partial + (plan.entries - (kWarps - warp) * params.views * params.rows.row);
    T* sums = gradients.direct
                  ? reinterpret_cast<T*>(gradients.features) + offset[Params::kGradFeatures]
                  : gradients.sums + item * params.views * params.rows.view * (plan.fixed_point ? 8 / sizeof(T) : 1);
    int largest = -kInvalidExponent;
    const int shift = scatter == Scatter::kFixedPoint ? fixed_point_shift(exponents[item], params.points) : 0;
    const bool representable = scatter != Scatter::kFixedPoint || exponents[item] != kInvalidExponent;

    for (int64_t tile = part; tile < tiling.per_item; tile += plan.parts) {
      const int64_t first = tile * tiling.voxels, voxel = first + local;
      const bool active = voxel < params.points;
      const VoxelPoint<T> point = voxel_point(params, offset, geometry, unsigned(active ? voxel : params.points - 1));
      if (moving) {
        for (int n = int(threadIdx.x); n < params.views * tiling.voxels * 2; n += kBlock) shared.pixels[n] = T(0);
        __syncthreads();
      }
      for (int round = 0; round < tiling.rounds; ++round) {
        const int64_t channel = (int64_t(round) * tiling.lanes + lane) * kWidth;
        const bool there = active && channel < params.rows.row;
        ViewAggregate<T, kBy, true> result_of[kWidth];
        T result[kWidth] = {}, grad[kWidth] = {}, linear[kWidth] = {};
        if (there) {
          aggregate<In, kBy, kWidth>(params, offset, geometry, point.world, channel, sampled, result_of);
          load_grad(params, tiling, params.volume + offset[Params::kVolume], voxel, channel, linear);
          for (int n = 0; n < kWidth; ++n) {
            result[n] = result_of[n].finish();
            grad[n] = is_nan(result[n]) ? T(0) : linear[n];
            linear[n] = kLinear ? (result_of[n].known() ? linear[n] : T(0)) : grad[n];
          }
        }
#pragma unroll 1
        for (int view = 0; view < params.views; ++view) {
          T along[2] = {T(0), T(0)}, share[kWidth] = {};
          const Sight<T> sight = sight_of(geometry, view, point.world);
          const Footprint<T>& footprint = sight.footprint;
          const bool takes_part = there && !sight.unknown && (sight.seen || !params.exclude);
          if (takes_part) {
            const In* map = feature_rows(params, offset) + view * params.rows.view + channel;
            T value[kWidth] = {}, grad_value[kWidth], confidence[kWidth];
            if (sight.seen && sampled) sample(map, footprint, params.width, params.rows.row, value);
            load_confidences(params, offset, view, channel, confidence);
            for (int n = 0; n < kWidth; ++n) {
              const T factor = result_of[n].factor_of(value[n], confidence[n]);
              const T slope = result_of[n].value_slope(value[n], confidence[n], factor, result[n]);
              grad_value[n] = linear[n] == T(0) ? T(0) : linear[n] * slope;
              if (confident && grad[n] != T(0))
                share[n] = grad[n] * result_of[n].confidence_slope(value[n], confidence[n], factor, result[n]);
            }
#pragma unroll  // or the footprint, indexed by the tap, would lie in local memory
            for (int tap = 0; sight.seen && tap < 4; ++tap) {
              const int i = tap % 2, j = tap / 2;
              const unsigned at = tap_offset(footprint, tap, params.width, params.rows.row);
              const T weight = footprint.along_x[i] * footprint.along_y[j];
              if (weight != T(0) && scatter != Scatter::kNone) {
                T contribution[kWidth];
                for (int n = 0; n < kWidth; ++n) contribution[n] = weight * grad_value[n];
                const int64_t place = view * params.rows.view + channel + at;
                if (scatter == Scatter::kAtomic) {
                  add_vector<kWidth>(sums + place, contribution);
                } else if (scatter == Scatter::kMeasure) {
                  for (int n = 0; n < kWidth; ++n) {
                    const int exponent = exponent_above(contribution[n]);
                    largest = exponent > largest ? exponent : largest;
                  }
                } else if (representable) {
                  for (int n = 0; n < kWidth; ++n)
                    atomicAdd(reinterpret_cast<unsigned long long*>(sums) + place + n,
                              static_cast<unsigned long long>(::llrint(::ldexp(double(contribution[n]), shift))));
                }
              }
              if (moving) {
                const auto vector = *reinterpret_cast<const Vector<In, kWidth>*>(map + at);
                T total = T(0);
                for (int n = 0; n < kWidth; ++n)
                  if (grad[n] != T(0) && grad_value[n] != T(0)) total += grad_value[n] * load(&vector.element[n]);
                along[0] += footprint.slope_x[i] * footprint.along_y[j] * total;
                along[1] += footprint.along_x[i] * footprint.slope_y[j] * total;
              }
            }
          }
          if (moving) {
            for (int a = 0; a < 2; ++a) {
              for (int mask = tiling.lanes / 2; mask > 0; mask /= 2)
                along[a] += __shfl_xor_sync(kFullWarp, along[a], mask);
              if (lane == 0) shared.pixels[(view * tiling.voxels + local) * 2 + a] += along[a];
            }
          }
          if (confident) {
            for (int n = 0; n < kWidth; ++n) {
              for (int mask = kWarpSize / 2; mask >= tiling.lanes; mask /= 2)
                share[n] += __shfl_xor_sync(kFullWarp, share[n], mask);
              if (int(threadIdx.x % kWarpSize) < tiling.lanes && channel < params.rows.row)
                warp_confidences[view * params.rows.row + channel + n] += share[n];
            }
          }
        }
      }
      if (moving) {
        __syncthreads();
        move_gradients(params, gradients, tiling, offset, shared, item, first, partial);
        __syncthreads();
      }
    }
    if (scatter == Scatter::kMeasure) {
      largest = warp_max(largest);
      if (threadIdx.x % kWarpSize == 0) atomicMax(exponents + item, largest);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) unproject_fill_kernel(T* to, int64_t count, T value) {
  for (int64_t n = thread_index(); n < count; n += thread_count()) to[n] = value;
}

// The sums of the features' gradient, in the tensor's layout and type. kFixedPoint: they are integers.
template <class In, bool kFixedPoint>
__global__ void __launch_bounds__(kBlock)
    unproject_features_kernel(UnprojectParams<In> params, UnprojectGradients<In> gradients, const int* exponents,
                              int64_t count) {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  const int64_t (&stride)[4] = gradients.features_stride;
  for (int64_t index = thread_index(); index < count; index += thread_count()) {
    const int64_t pixel = index / params.rows.row, k = index - pixel * params.rows.row;
    if (k >= params.channels) continue;
    const int64_t line = pixel / params.width, x = pixel - line * params.width;
    const int64_t map = line / params.height, y = line - map * params.height;
    const int64_t item = map / params.views, view = map - item * params.views;
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T value;
    if constexpr (kFixedPoint) {
      const long long sum = reinterpret_cast<const long long*>(gradients.sums)[index];
      const int shift = fixed_point_shift(exponents[item], params.points);
      value = exponents[item] == kInvalidExponent ? quiet_nan<T>() : T(::ldexp(double(sum), -shift));
    } else {
      value = gradients.sums[index];
    }
    store(gradients.features + offset[Params::kGradFeatures] + view * stride[0] + k * stride[1] + y * stride[2] +
              x * stride[3],
          value);
  }
}

// One warp per number of every item: adds up its units' partial sums in a fixed order.
template <class In>
__global__ void __launch_bounds__(kBlock)
    unproject_sums_kernel(UnprojectParams<In> params, UnprojectGradients<In> gradients, UnprojectPlan plan) {
  using T = Accumulator<In>;
  const bool moving = gradients.projections != nullptr || gradients.grid != nullptr;
  const int64_t matrices = params.views * 12, geometry = moving ? matrices + 12 : 0;
  const int64_t numbers = geometry + (gradients.confidences != nullptr ? params.views * params.channels : 0);
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t index = thread_index() / kWarpSize; index < params.batch.count * numbers;
       index += thread_count() / kWarpSize) {
    const int64_t item = index / numbers, n = index - item * numbers;
    const bool confident = n >= geometry;
    const int64_t view = confident ? (n - geometry) / params.channels : 0;
    const int64_t k = confident ? n - geometry - view * params.channels : 0;
    const int64_t copies = confident ? kWarps : 1;
    T total = T(0);
    for (int64_t m = lane; m < plan.parts * copies; m += kWarpSize) {
      const int64_t part = m / copies, copy = m - part * copies;
      const int64_t entry = confident ? geometry + (copy * params.views + view) * params.rows.row + k : n;
      total += static_cast<const T*>(gradients.partial)[(item * plan.parts + part) * plan.entries + entry];
    }
    total = warp_sum(total);
    if (lane != 0) continue;
    if (confident) {
      gradients.confidences[item * params.views * params.channels + n - geometry] = total;
    } else if (n < matrices) {
      if (gradients.projections != nullptr) gradients.projections[item * matrices + n] = total;
    } else if (gradients.grid != nullptr && params.grid_size[0] != 0) {
      gradients.grid[item * 12 + n - matrices] = total;
    }
  }
}

// ---- Launching ----

template <class In>
constexpr int kVectorWidth = 16 / int(sizeof(In));

template <class In>
Tiling tiling_of(const UnprojectParams<In>& params, bool moving) {
  using Params = UnprojectParams<In>;
  constexpr int kWidth = kVectorWidth<In>;
  const int64_t vectors = params.rows.row / kWidth;
  Tiling tiling{};
  tiling.lanes = 1;
  while (tiling.lanes < kMaxLanes && tiling.lanes < vectors) tiling.lanes *= 2;
  // Each voxel's gradients to the pixels of all views lie in shared memory: fewer voxels where there are many views.
  const int64_t voxel_bytes = moving ? params.views * 2 * int64_t(sizeof(Accumulator<In>)) : 0;
  while (tiling.lanes < kWarpSize && kBlock / tiling.lanes * voxel_bytes > 24 * 1024) tiling.lanes *= 2;
  tiling.voxels = kBlock / tiling.lanes;
  tiling.rounds = int(ceil_div(vectors, tiling.lanes));
  tiling.per_item = ceil_div(params.points, tiling.voxels);
  tiling.transposed = params.volume_stride[1] == 1 && params.volume_stride[0] != 1;
  tiling.vectors = params.volume_stride[0] == 1 && params.volume_stride[1] % kWidth == 0 &&
                   params.channels % kWidth == 0 && reinterpret_cast<uintptr_t>(params.volume) % 16 == 0;
  for (int d = 0; d < params.batch.dims; ++d)
    tiling.vectors = tiling.vectors && params.batch.stride[d][Params::kVolume] % kWidth == 0;
  return tiling;
}

template <class In>
int64_t shared_bytes(const UnprojectParams<In>& params, const Tiling& tiling) {
  const int64_t tile = int64_t(tiling.lanes) * kVectorWidth<In> * (tiling.voxels + 1) * int64_t(sizeof(In));
  return geometry_bytes<Accumulator<In>>(params.views) + (tiling.transposed ? tile : 0);
}
template <class In>
int64_t backward_shared_bytes(const UnprojectParams<In>& params, const Tiling& tiling, bool moving) {
  using T = Accumulator<In>;
  return geometry_bytes<T>(params.views) +
         (moving ? (params.views * tiling.voxels * 2 + kBlock * 3) * int64_t(sizeof(T)) : 0);
}

// Calls run with the aggregation as a constant.
template <class Run>
void for_aggregation(int aggregation, Run&& run) {
  switch (static_cast<Aggregation>(aggregation)) {
    case Aggregation::kSum:
      return run(std::integral_constant<Aggregation, Aggregation::kSum>());
    case Aggregation::kMean:
      return run(std::integral_constant<Aggregation, Aggregation::kMean>());
    case Aggregation::kSoftmax:
      return run(std::integral_constant<Aggregation, Aggregation::kSoftmax>());
    default:
      return run(std::integral_constant<Aggregation, Aggregation::kMax>());
  }
}

template <class In>
void launch_stage(const UnprojectParams<In>& params, Stream stream) {
  const int64_t count = staged_count(params);
  if (count == 0) return;
  TRITOOL_LAUNCH(unproject_stage_kernel<In>, grid_size(count, kBlock), kBlock, 0, stream, params, count);
}

template <class T>
void fill(T* to, int64_t count, T value, Stream stream) {
  if (count == 0) return;
  TRITOOL_LAUNCH(unproject_fill_kernel<T>, grid_size(count, kBlock), kBlock, 0, stream, to, count, value);
}

template <class In>
int* exponents_of(const UnprojectGradients<In>& gradients, const UnprojectPlan& plan) {
  return reinterpret_cast<int*>(static_cast<unsigned char*>(gradients.partial) +
                                plan.units * plan.entries * int64_t(sizeof(Accumulator<In>)));
}

}  // namespace

namespace cuda {

template <class In>
UnprojectRows unproject_rows(const UnprojectParams<In>& params) {
  UnprojectRows rows = tritool::unproject_rows(params, params.features_stride, kVectorWidth<In>, true);
  rows.staged = rows.staged || reinterpret_cast<uintptr_t>(params.features) % 16 != 0;
  return rows;
}

template <class In>
UnprojectPlan unproject_plan(const UnprojectParams<In>& params, UnprojectGradients<In>& gradients, bool deterministic) {
  using T = Accumulator<In>;
  const bool moving = gradients.projections != nullptr || gradients.grid != nullptr;
  const int64_t items = params.batch.count;
  UnprojectPlan plan{};
  plan.fixed_point = deterministic && gradients.features != nullptr;
  plan.entries = partial_entries(params, moving, gradients.confidences != nullptr);
  plan.groups = 1;
  plan.group_channels = params.rows.row;
  const int64_t tiles = tiling_of(params, moving).per_item;
  // Enough blocks for a large device, but not more than 32 MB of partial sums.
  plan.parts = items == 0 ? 1 : ceil_div(4096, items);
  const int64_t room = items * plan.entries == 0 ? plan.parts : (8 << 20) / (items * plan.entries);
  plan.parts = plan.parts < room ? plan.parts : room;
  plan.parts = plan.parts < tiles ? plan.parts : tiles;
  plan.parts = plan.parts < 1 ? 1 : plan.parts;
  plan.units = items * plan.parts;
  plan.partial_bytes = plan.units * plan.entries * int64_t(sizeof(T)) + items * int64_t(sizeof(int));
  gradients.direct = gradients.features != nullptr && !plan.fixed_point && sizeof(In) == sizeof(T) &&
                     !tritool::unproject_rows(params, gradients.features_stride, kVectorWidth<In>, true).staged &&
                     reinterpret_cast<uintptr_t>(gradients.features) % 16 == 0;
  const int64_t features = items * params.views * params.rows.view;
  plan.sums_count = gradients.features == nullptr || gradients.direct ? 0
                    : plan.fixed_point                                ? features * int64_t(8 / sizeof(T))
                                                                      : features;
  return plan;
}

template <class In>
int unproject(const UnprojectParams<In>& params, CUstream_st* stream) {
  if (params.batch.count * params.points * params.channels == 0) return 0;
  launch_stage(params, stream);
  const Tiling tiling = tiling_of(params, false);
  for_aggregation(params.aggregation, [&](auto by) {
    TRITOOL_LAUNCH(TRITOOL_KERNEL(unproject_kernel<In, by.value, kVectorWidth<In>>),
                   grid_size(params.batch.count * tiling.per_item, 1), kBlock, shared_bytes(params, tiling), stream,
                   params, tiling);
  });
  return last_launch_error();
}

template <class In>
int unproject_backward(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients,
                       const UnprojectPlan& plan, CUstream_st* stream) {
  using T = Accumulator<In>;
  const bool moving = gradients.projections != nullptr || gradients.grid != nullptr;
  const int64_t features = params.batch.count * params.views * params.rows.view;
  if (params.batch.count == 0) return 0;
  if (unproject_backward_samples(params, gradients)) launch_stage(params, stream);
  int* exponents = exponents_of(gradients, plan);
  if (gradients.direct)
    fill(reinterpret_cast<T*>(gradients.features), features, T(0), stream);
  else
    fill(gradients.sums, plan.sums_count, T(0), stream);
  const Tiling tiling = tiling_of(params, moving);
  const auto run = [&](Scatter scatter) {
    for_aggregation(params.aggregation, [&](auto by) {
      TRITOOL_LAUNCH(TRITOOL_KERNEL(unproject_backward_kernel<In, by.value, kVectorWidth<In>>),
                     grid_size(plan.units, 1), kBlock, backward_shared_bytes(params, tiling, moving), stream, params,
                     gradients, plan, tiling, scatter, exponents);
    });
  };
  if (plan.fixed_point) {
    fill(exponents, params.batch.count, -kInvalidExponent, stream);
    run(Scatter::kMeasure);
  }
  run(plan.fixed_point ? Scatter::kFixedPoint : gradients.features != nullptr ? Scatter::kAtomic : Scatter::kNone);
  if (gradients.features != nullptr && !gradients.direct && features > 0) {
    if (plan.fixed_point)
      TRITOOL_LAUNCH(TRITOOL_KERNEL(unproject_features_kernel<In, true>), grid_size(features, kBlock), kBlock, 0,
                     stream, params, gradients, exponents, features);
    else
      TRITOOL_LAUNCH(TRITOOL_KERNEL(unproject_features_kernel<In, false>), grid_size(features, kBlock), kBlock, 0,
                     stream, params, gradients, exponents, features);
  }
  if (plan.entries > 0)
    TRITOOL_LAUNCH(unproject_sums_kernel<In>, grid_size(params.batch.count * plan.entries, kWarps), kBlock, 0, stream,
                   params, gradients, plan);
  return last_launch_error();
}

#define TRITOOL_INSTANTIATE(In)                                                                                        \
  template UnprojectRows unproject_rows<In>(const UnprojectParams<In>&);                                               \
  template UnprojectPlan unproject_plan<In>(const UnprojectParams<In>&, UnprojectGradients<In>&, bool);                \
  template int unproject<In>(const UnprojectParams<In>&, CUstream_st*);                                                \
  template int unproject_backward<In>(const UnprojectParams<In>&, const UnprojectGradients<In>&, const UnprojectPlan&, \
                                      CUstream_st*);
TRITOOL_INSTANTIATE(float)
TRITOOL_INSTANTIATE(double)
TRITOOL_INSTANTIATE(Float16)
TRITOOL_INSTANTIATE(BFloat16)
#undef TRITOOL_INSTANTIATE

}  // namespace cuda
}  // namespace tritool
