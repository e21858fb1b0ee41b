// SPDX-License-Identifier: Apache-2.0
// A block of voxels is projected into every view at once, one SIMD lane per voxel, in float64: that is cheap beside the
// sampling, and float32 would cost 1e-5 pixels. Then each voxel's channels are sampled and aggregated, lanes along the
// channels. The backward samples again and scatters each view's gradient before it turns to the next voxel, so nothing
// per view and voxel is ever kept.
#include <cstdlib>
#include <type_traits>

#include "kernels/map_lanes.h"
#include "kernels/unproject.h"
#include "math/unproject.h"

namespace tritool {
namespace cpu {
namespace TRITOOL_ISA {
namespace {

constexpr int kBlock = int(kUnprojectBlock);  // a multiple of the lanes of every type
constexpr int64_t kGridTile = 8;              // see BlockWalk
using Lanes = NativePack<double>;
constexpr int kLanes = Lanes::kLanes;

// Memory of one call, released with it.
template <class E>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<E*>(std::aligned_alloc(64, bytes(count)))) {
    if (data_ == nullptr) std::abort();  // a few kilobytes
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  E& operator[](int64_t i) { return data_[i]; }
  E* data() { return data_; }

 private:
  static size_t bytes(int64_t count) { return (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64 + 64; }
  E* data_;
};

// Where one view samples a block of voxels.
template <class T>
struct alignas(64) BlockTaps {
  uint32_t offset[4][kBlock];  // elements from the start of the view's map: pixels (0, 0), (1, 0), (0, 1), (1, 1)
  T weight[4][kBlock];
  T slope_x[4][kBlock];  // d weight / d pixel
  T slope_y[4][kBlock];
  int32_t column[kBlock];  // of math/unproject.h's Cell: whether the voxel is seen
  bool all_seen;
};

template <class In>
void load_matrices(const UnprojectParams<In>& params, const Accumulator<In>* projections, double* matrices) {
  for (int view = 0; view < params.views; ++view)
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j)
        *matrices++ = double(projections[view * params.projections_stride[0] + i * params.projections_stride[1] +
                                         j * params.projections_stride[2]]);
}

// Confidences as rows of the features' length, 1 beyond the channels.
template <class In>
void load_confidences(const UnprojectParams<In>& params, const Accumulator<In>* confidences, Accumulator<In>* rows) {
  for (int view = 0; view < params.views; ++view)
    for (int64_t k = 0; k < params.rows.row; ++k)
      *rows++ =
          k < params.channels
              ? known_confidence(confidences[view * params.confidences_stride[0] + k * params.confidences_stride[1]])
              : Accumulator<In>(1);
}

// Several packs of double lanes as one of T, next to each other.
template <class P, int kParts>
TRITOOL_HD P join(const Lanes (&parts)[kParts]) {
  if constexpr (kParts == 1) {
    return parts[0];
  } else {
    static_assert(kParts == 2 && P::kLanes == 2 * kLanes);
    using Half = Pack<Real<P>, kLanes>;
    const Half low = convert_lanes<Half>(parts[0]), high = convert_lanes<Half>(parts[1]);
    return join_halves<P>(low, high);
  }
}

// Index coordinates and world coordinates of a block of voxels, axis by axis; those past the last voxel repeat it.
struct BlockPoints {
  alignas(64) double index[3][kBlock];
  alignas(64) double world[3][kBlock];

  TRITOOL_HD void load(const double (&axes)[3][kBlock], int lane, Lanes (&lanes)[3]) const {
    for (int a = 0; a < 3; ++a) lanes[a] = load_pack<Lanes>(axes[a] + lane);
  }
};

template <class In>
void load_points(const UnprojectParams<In>& params, const Accumulator<In>* grid, int64_t first, int lanes,
                 BlockPoints& points) {
  if (params.grid_size[0] == 0) {
    for (int lane = 0; lane < kBlock; ++lane) {
      const auto* point = grid + (first + (lane < lanes ? lane : lanes - 1)) * params.grid_stride[0];
      for (int a = 0; a < 3; ++a) points.world[a][lane] = double(point[a * params.grid_stride[1]]);
    }
    return;
  }
  const int64_t depth = params.grid_size[1], width = params.grid_size[2];
  const int64_t line = first / width;
  int64_t k = first - line * width, i = line / depth, j = line - i * depth;
  if (lanes == kBlock && k + kBlock <= width) {  // all of one row of the grid
    for (int lane = 0; lane < kBlock; ++lane) {
      points.index[0][lane] = double(i);
      points.index[1][lane] = double(j);
      points.index[2][lane] = double(k) + double(lane);
    }
  } else {
    for (int lane = 0; lane < kBlock; ++lane) {
      points.index[0][lane] = double(i);
      points.index[1][lane] = double(j);
      points.index[2][lane] = double(k);
      if (lane + 1 >= lanes) continue;
      if (++k == width) {
        k = 0;
        if (++j == depth) {
          j = 0;
          ++i;
        }
      }
    }
  }
  Lanes frame[4][3];
  for (int row = 0; row < 4; ++row)
    for (int a = 0; a < 3; ++a)
      frame[row][a] = Lanes(double(grid[row * params.grid_stride[0] + a * params.grid_stride[1]]));
  for (int lane = 0; lane < kBlock; lane += kLanes) {
    Lanes index[3], world[3];
    points.load(points.index, lane, index);
    voxel_center(frame, index[0], index[1], index[2], world);
    for (int a = 0; a < 3; ++a) store_pack(points.world[a] + lane, world[a]);
  }
}

TRITOOL_HD void load_matrix(const double* matrix, Lanes (&lanes)[3][4]) {
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j) lanes[i][j] = Lanes(matrix[4 * i + j]);
}

template <class In>
FeatureMap<double> feature_map(const UnprojectParams<In>& params) {
  const double width = double(params.width), height = double(params.height);
  return {width, height, params.official ? (width - 1) / height : 1.0, params.official ? (height - 1) / width : 1.0};
}

// Whole lanes as integers.
template <class T, int N>
TRITOOL_HD typename PackMask<T, N>::Vector integers(const Pack<T, N>& whole) {
  return __builtin_convertvector(whole.v, typename PackMask<T, N>::Vector);
}
template <class Integer, class Vector>
TRITOOL_HD void store_integers(Integer* to, const Vector& integers) {
  constexpr int kCount = sizeof(Vector) / sizeof(integers[0]);
  for (int n = 0; n < kCount; ++n) to[n] = Integer(integers[n]);
}

// The number of a pixel in memory, see UnprojectRows::tiled: that of its row and that of its column together; of
// integers or of vectors of them. `width`: of the rows, in whole tiles where tiled.
template <class Integers>
TRITOOL_HD Integers place_of_row(Integers row, Integers width, bool tiled) {
  if (!tiled) return row * width;
  const Integers in_tile = row & (int(cpu::kTileRows) - 1);
  return (row - in_tile) * width + in_tile * int(cpu::kTileColumns);
}
template <class Integers>
TRITOOL_HD Integers place_of_column(Integers column, bool tiled) {
  if (!tiled) return column;
  const Integers in_tile = column & (int(cpu::kTileColumns) - 1);
  return (column - in_tile) * int(cpu::kTileRows) + in_tile;
}
template <class In>
int64_t width_in_memory(const UnprojectParams<In>& params) {
  return params.rows.tiled ? cpu::tiles_up(params.width, cpu::kTileColumns) : params.width;
}
// The number of an element of a map.
template <class In>
int64_t pixel_row(const UnprojectParams<In>& params, int64_t column, int64_t row) {
  const bool tiled = params.rows.tiled;
  return (place_of_row(row, width_in_memory(params), tiled) + place_of_column(column, tiled)) * params.rows.row;
}

// The cells of as many voxels as P has lanes, from cell_of_lanes(point, cell); returns whether that was true of all.
template <class P, class CellOfLanes>
TRITOOL_HD bool cells_of(const BlockPoints& points, int lane, const CellOfLanes& cell_of_lanes, Cell<P>& cell) {
  constexpr int kParts = P::kLanes / kLanes;
  Lanes column[kParts], row[kParts], fraction_x[kParts], fraction_y[kParts];
  Mask<Lanes> all_are = Lanes(0.0) == Lanes(0.0);
#pragma GCC unroll 2  // else the parts go through memory
  for (int part = 0; part < kParts; ++part) {
    Lanes world[3];
    points.load(points.world, lane + part * kLanes, world);
    Cell<Lanes> lanes;
    all_are = all_are & cell_of_lanes(world, lanes);
    column[part] = lanes.column;
    row[part] = lanes.row;
    fraction_x[part] = lanes.fraction_x;
    fraction_y[part] = lanes.fraction_y;
  }
  cell = {join<P>(column), join<P>(row), join<P>(fraction_x), join<P>(fraction_y)};
  return all(all_are);
}

template <bool kSlopes, class In>
void find_taps(const UnprojectParams<In>& params, const BlockPoints& points, const double* matrix,
               BlockTaps<Accumulator<In>>& taps) {
  using T = Accumulator<In>;
  using P = NativePack<T>;
  const FeatureMap<double> map = feature_map(params);
  const FeatureMap<Lanes> map_lanes{Lanes(map.width), Lanes(map.height), Lanes(map.scale_x), Lanes(map.scale_y)};
  Lanes matrix_lanes[3][4];
  load_matrix(matrix, matrix_lanes);
  using Integers = typename PackMask<T, P::kLanes>::Vector;
  using Integer = typename IntegerOf<T>::type;
  const Integers width = Integers{} + Integer(width_in_memory(params));
  const Integers pixel_size = Integers{} + Integer(params.rows.row);
  const bool tiled = params.rows.tiled;
  taps.all_seen = true;
  for (int lane = 0; lane < kBlock; lane += P::kLanes) {
    const auto inner_cell = [&](const Lanes(&world)[3], Cell<Lanes>& cell) {
      return inner_cell_of(world, matrix_lanes, map_lanes, cell);
    };
    const auto any_cell = [&](const Lanes(&world)[3], Cell<Lanes>& cell) {
      cell = cell_of(world, matrix_lanes, map_lanes);
      return cell.column >= Lanes(-1.0);
    };
    Cell<P> cell;
    Footprint<P> footprint;
    if (cells_of<P>(points, lane, inner_cell, cell)) {
      footprint = inner_footprint_of(cell);
    } else {
      taps.all_seen = cells_of<P>(points, lane, any_cell, cell) && taps.all_seen;
      footprint = footprint_of(cell, P(T(params.width)), P(T(params.height)));
    }
    store_integers(taps.column + lane, integers(cell.column));
    Integers column_place[2], row_place[2];
    for (int n = 0; n < 2; ++n) {
      column_place[n] = place_of_column(integers(footprint.column[n]), tiled) * pixel_size;
      row_place[n] = place_of_row(integers(footprint.row[n]), width, tiled) * pixel_size;
    }
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 2; ++i) {
        const int tap = 2 * j + i;
        store_integers(taps.offset[tap] + lane, column_place[i] + row_place[j]);
        store_pack(taps.weight[tap] + lane, footprint.along_x[i] * footprint.along_y[j]);
        if constexpr (kSlopes) {
          store_pack(taps.slope_x[tap] + lane, footprint.slope_x[i] * footprint.along_y[j]);
          store_pack(taps.slope_y[tap] + lane, footprint.along_x[i] * footprint.slope_y[j]);
        }
      }
    }
  }
}

// kPacks packs of the channels of one voxel in one view.
template <class P, int kPacks>
TRITOOL_HD void sample(const BlockTaps<Real<P>>& taps, int lane, const Real<P>* map, P (&value)[kPacks]) {
  using T = Real<P>;
  const T* from[4];
  P weight[4];
  for (int tap = 0; tap < 4; ++tap) {
    from[tap] = map + taps.offset[tap][lane];
    weight[tap] = P(taps.weight[tap][lane]);
  }
  for (int p = 0; p < kPacks; ++p) {
    const int64_t at = p * P::kLanes;
    value[p] = weight[0] * load_pack<P>(from[0] + at) +
               (weight[1] * load_pack<P>(from[1] + at) +
                (weight[2] * load_pack<P>(from[2] + at) + weight[3] * load_pack<P>(from[3] + at)));
  }
}

// What the inner loops see of an item: views' taps, and rows of features and confidences.
template <class T>
struct Views {
  int count;
  bool exclude;
  bool all_seen;  // every voxel of the block, by every view
  const BlockTaps<T>* taps;
  const T* features;
  int64_t map;           // elements from one view's features to the next
  const T* confidences;  // [C, row] or null
  int64_t row;
};

template <class P, bool kWeighted>
TRITOOL_HD P confidence_of(const Views<Real<P>>& views, int view, int64_t channel) {
  if constexpr (kWeighted) return load_pack<P>(views.confidences + view * views.row + channel);
  return P(Real<P>(1));
}

// So many views are sampled before they are put together; the backward finds the samples of the first ones kept.
constexpr int kKept = 8;

template <class P, int kPacks>
struct Kept {
  P value[kKept][kPacks];
  P factor[kKept][kPacks];  // of ViewAggregate; valid where all views are kept
};

TRITOOL_HD bool takes_part(int column, bool exclude) { return column != kUnseenColumn || !exclude; }

// The views of the channels `channel` .. of one voxel, put together; `sampled` false: with values of 0. `kKeep`:
// what is sampled is kept.
template <class P, int kPacks, bool kKeep, Aggregation kBy, bool kWeighted>
TRITOOL_HD void aggregate(const Views<Real<P>>& views, int lane, int64_t channel, bool sampled,
                          ViewAggregate<P, kBy, kWeighted> (&result)[kPacks], Kept<P, kPacks>& kept) {
  using T = Real<P>;
  if (views.all_seen && !ViewAggregate<P, kBy, kWeighted>::kLooks && !(kKeep && sampled)) {
    for (int view = 0; view < views.count; ++view) {
      P value[kPacks];
      for (int p = 0; p < kPacks; ++p) value[p] = P(T(0));
      if (sampled) sample(views.taps[view], lane, views.features + view * views.map + channel, value);
      for (int p = 0; p < kPacks; ++p)
        result[p].template add_looked_at<true>(value[p],
                                               confidence_of<P, kWeighted>(views, view, channel + p * P::kLanes));
    }
    return;
  }
  if (views.all_seen && sampled && views.count <= kKept) {  // what follows, without its questions
    for (int view = 0; view < views.count; ++view) {
      sample(views.taps[view], lane, views.features + view * views.map + channel, kept.value[view]);
      for (int p = 0; p < kPacks; ++p)
        result[p].look(kept.value[view][p], confidence_of<P, kWeighted>(views, view, channel + p * P::kLanes));
    }
    for (int p = 0; p < kPacks; ++p) result[p].start();
    for (int view = 0; view < views.count; ++view)
      for (int p = 0; p < kPacks; ++p)
        kept.factor[view][p] = result[p].template add_looked_at<true>(
            kept.value[view][p], confidence_of<P, kWeighted>(views, view, channel + p * P::kLanes));
    return;
  }
  for (int first = 0; first < views.count; first += kKept) {
    const int last = first + kKept < views.count ? first + kKept : views.count;
    Kept<P, kPacks> later;
    Kept<P, kPacks>& here = first == 0 ? kept : later;
    for (int view = first; view < last; ++view) {
      const BlockTaps<T>& taps = views.taps[view];
      const int column = taps.column[lane];
      P(&value)[kPacks] = here.value[view - first];
      if (column >= -1 && sampled) {
        sample(taps, lane, views.features + view * views.map + channel, value);
      } else {
        for (int p = 0; p < kPacks; ++p) value[p] = P(T(0));
      }
      if (column == kUnknownColumn || !takes_part(column, views.exclude)) continue;
      for (int p = 0; p < kPacks; ++p)
        result[p].look(value[p], confidence_of<P, kWeighted>(views, view, channel + p * P::kLanes));
    }
    for (int p = 0; p < kPacks; ++p) first == 0 ? result[p].start() : result[p].rise();
    for (int view = first; view < last; ++view) {
      const int column = views.taps[view].column[lane];
      if (!takes_part(column, views.exclude)) continue;
      for (int p = 0; p < kPacks; ++p) {
        const P confidence = confidence_of<P, kWeighted>(views, view, channel + p * P::kLanes);
        if (column == kUnknownColumn)
          result[p].add_unknown(confidence);
        else
          here.factor[view - first][p] =
              result[p].template add_looked_at<true>(here.value[view - first][p], confidence);
      }
    }
  }
}

// kPacks packs of channels of a block of voxels, to tile [voxel, channel].
template <class P, int kPacks, Aggregation kBy, bool kWeighted>
void forward_tile(const Views<Real<P>>& views, int lanes, int64_t channel, Real<P>* tile) {
  for (int lane = 0; lane < lanes; ++lane) {
    ViewAggregate<P, kBy, kWeighted> result[kPacks];
    Kept<P, kPacks> kept;
    aggregate<P, kPacks, false>(views, lane, channel, true, result, kept);
    for (int p = 0; p < kPacks; ++p) store_pack(tile + (lane * kPacks + p) * P::kLanes, result[p].finish());
  }
}

// The gradients of one block of voxels, as they are summed.
template <class T>
struct Sums {
  T* features;     // rows, as Views::features; null: not wanted
  T* confidences;  // [C, row]; null: not wanted
  T* pixels;       // [C, 2, kBlock], to the pixels; null: not wanted
};

// Lines of memory that are read soon, each so many bytes behind the last.
struct MemoryLines {
  const char* first;
  int64_t stride;
  int count;
};

template <class P, int kPacks, Aggregation kBy, bool kWeighted>
void backward_tile(const Views<Real<P>>& views, int lanes, int64_t channel, const Real<P>* tile,
                   const Sums<Real<P>>& sums, const MemoryLines& next) {
  using T = Real<P>;
  constexpr int N = P::kLanes;
  constexpr bool kLinear = is_linear(kBy);
  const bool all_kept = views.count <= kKept;
  const bool sampled = !kLinear || sums.confidences != nullptr || sums.pixels != nullptr;
  for (int lane = 0; lane < lanes; ++lane) {
    // A few for each voxel: all at once would wait for each other. For the second cache: the lines are often a power of
    // two apart, and the first has no room for so many of one remainder.
    constexpr int kEach = (kPacks * N + kBlock - 1) / kBlock;
    for (int n = lane * kEach; n < (lane + 1) * kEach && n < next.count; ++n)
      __builtin_prefetch(next.first + n * next.stride, 0, 2);
    ViewAggregate<P, kBy, kWeighted> aggregate_of[kPacks];
    Kept<P, kPacks> kept;
    aggregate<P, kPacks, true>(views, lane, channel, sampled, aggregate_of, kept);
    P result[kPacks], grad[kPacks], linear[kPacks];
    for (int p = 0; p < kPacks; ++p) {
      result[p] = aggregate_of[p].finish();
      const P incoming = load_pack<P>(tile + (lane * kPacks + p) * N);
      grad[p] = select(is_nan(result[p]), P(T(0)), incoming);
      linear[p] = kLinear ? select(aggregate_of[p].known(), incoming, P(T(0))) : grad[p];
    }
    for (int view = 0; view < views.count; ++view) {
      const BlockTaps<T>& taps = views.taps[view];
      const int column = taps.column[lane];
      if (column == kUnknownColumn || !takes_part(column, views.exclude)) continue;
      P value[kPacks], grad_value[kPacks];
      if (sampled && view < kKept) {
        for (int p = 0; p < kPacks; ++p) value[p] = kept.value[view][p];
      } else if (column >= -1 && sampled) {
        sample(taps, lane, views.features + view * views.map + channel, value);
      } else {
        for (int p = 0; p < kPacks; ++p) value[p] = P(T(0));
      }
      for (int p = 0; p < kPacks; ++p) {
        const P confidence = confidence_of<P, kWeighted>(views, view, channel + p * N);
        P factor = P(T(1));
        if constexpr (ViewAggregate<P, kBy, kWeighted>::kLooks)
          factor = all_kept ? kept.factor[view < kKept ? view : 0][p] : aggregate_of[p].factor_of(value[p], confidence);
        const P slope = aggregate_of[p].value_slope(value[p], confidence, factor, result[p]);
        grad_value[p] = linear[p] * select(linear[p] == P(T(0)), P(T(0)), slope);
        if (sums.confidences != nullptr) {
          T* sum = sums.confidences + view * views.row + channel + p * N;
          const P weight_slope = aggregate_of[p].confidence_slope(value[p], confidence, factor, result[p]);
          const P share = grad[p] * select(grad[p] == P(T(0)), P(T(0)), weight_slope);
          store_pack(sum, load_pack<P>(sum) + share);
        }
      }
      if (column < -1) continue;
      if (sums.features != nullptr) {
        T* map = sums.features + view * views.map + channel;
        constexpr int kAhead = 2;
        if (lane + kAhead < kBlock)  // voxels go on to new rows of pixels
          for (int tap = 0; tap < 2; ++tap)
            for (int p = 0; p < kPacks; ++p) __builtin_prefetch(map + taps.offset[tap][lane + kAhead] + p * N, 1);
        for (int tap = 0; tap < 4; ++tap) {
          T* to = map + taps.offset[tap][lane];
          const P weight = P(taps.weight[tap][lane]);
          for (int p = 0; p < kPacks; ++p) store_pack(to + p * N, load_pack<P>(to + p * N) + weight * grad_value[p]);
        }
      }
      if (sums.pixels != nullptr) {
        const T* map = views.features + view * views.map + channel;
        T along[2] = {T(0), T(0)};
        for (int tap = 0; tap < 4; ++tap) {
          P product = P(T(0));
          for (int p = 0; p < kPacks; ++p) {
            const P moving = select(grad[p] == P(T(0)), P(T(0)), grad_value[p]);
            const P feature = load_pack<P>(map + taps.offset[tap][lane] + p * N);
            product = product + select(moving == P(T(0)), P(T(0)), moving * feature);
          }
          const T total = sum_lanes(product, N);
          along[0] += taps.slope_x[tap][lane] * total;
          along[1] += taps.slope_y[tap][lane] * total;
        }
        sums.pixels[(2 * view) * kBlock + lane] += along[0];
        sums.pixels[(2 * view + 1) * kBlock + lane] += along[1];
      }
    }
  }
}

// ---- The loops over tiles, chosen once a call ----

template <class T>
using ForwardTile = void (*)(const Views<T>& views, int lanes, int64_t channel, T* tile);
template <class T>
using BackwardTile = void (*)(const Views<T>& views, int lanes, int64_t channel, const T* tile, const Sums<T>& sums,
                              const MemoryLines& next);

template <class T, int kPacks>
struct Tiles {
  ForwardTile<T> forward;
  BackwardTile<T> backward;
};

template <class T, int kPacks, Aggregation kBy>
Tiles<T, kPacks> tiles_of(bool weighted) {
  using P = NativePack<T>;
  if (weighted) return {&forward_tile<P, kPacks, kBy, true>, &backward_tile<P, kPacks, kBy, true>};
  return {&forward_tile<P, kPacks, kBy, false>, &backward_tile<P, kPacks, kBy, false>};
}

template <class T, int kPacks>
Tiles<T, kPacks> tiles_for(int aggregation, bool weighted) {
  switch (static_cast<Aggregation>(aggregation)) {
    case Aggregation::kSum:
      return tiles_of<T, kPacks, Aggregation::kSum>(weighted);
    case Aggregation::kMean:
      return tiles_of<T, kPacks, Aggregation::kMean>(weighted);
    case Aggregation::kSoftmax:
      return tiles_of<T, kPacks, Aggregation::kSoftmax>(weighted);
    default:
      return tiles_of<T, kPacks, Aggregation::kMax>(weighted);
  }
}

// Runs over the channels begin .. end-1, two packs at a time and one where no more are left; rows go on for a whole
// pack beyond the end.
template <class T, class Run>
void for_channels(int64_t begin, int64_t end, Run&& run) {
  constexpr int N = kLanesOf<T>;
  for (int64_t channel = begin; channel < end;) {
    if (channel + N < end && channel % (2 * N) == 0) {
      run(channel, std::integral_constant<int, 2>());
      channel += 2 * N;
    } else {
      run(channel, std::integral_constant<int, 1>());
      channel += N;
    }
  }
}

// Whether packs can be streamed to the volume: large, and every pack of a tile on a boundary of its size.
template <class In>
bool streams(const UnprojectParams<In>& params) {
  constexpr int64_t kPack = kLanesOf<In>;
  const int64_t (&stride)[2] = params.volume_stride;
  const bool channels_first = stride[1] == 1;
  bool fits = (channels_first || stride[0] == 1) && params.points % kPack == 0 && params.channels % kPack == 0 &&
              is_aligned(params.volume) && stride[channels_first ? 0 : 1] % kPack == 0;
  for (int d = 0; d < params.batch.dims; ++d)
    fits = fits && params.batch.stride[d][UnprojectParams<In>::kVolume] % kPack == 0;
  return fits && is_streamed(params.batch.count * params.channels * params.points * int64_t(sizeof(In)));
}

// to(column)[row] = from(row)[column], in whole squares of lanes as far as they go.
template <class T, class To, class From>
TRITOOL_HD void transpose_lines(const To& to, const From& from, int64_t rows, int64_t columns, bool stream = false) {
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  const int64_t whole_rows = rows - rows % N, whole_columns = columns - columns % N;
  for (int64_t row = 0; row < whole_rows; row += N) {
    for (int64_t column = 0; column < whole_columns; column += N) {
      P square[N];
      for (int n = 0; n < N; ++n) square[n] = load_pack<P>(from(row + n) + column);
      transpose(square);
      for (int n = 0; n < N; ++n) {
        T* const line = to(column + n) + row;
        stream ? stream_pack(line, square[n]) : store_pack(line, square[n]);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
      to(column)[row] = from(row)[column];
}
template <class T>
auto lines_of(T* first, int64_t stride) {
  return [=](int64_t line) { return first + line * stride; };
}

// Between a tile [voxel, channel] and the volume, both ways; channels beyond the last are read as 0.
template <class In, class T>
void write_tile(const UnprojectParams<In>& params, In* item, int64_t first, int lanes, int64_t channel, int width,
                const T* tile, bool stream) {
  const int64_t (&stride)[2] = params.volume_stride;
  const int channels = int(params.channels - channel < width ? params.channels - channel : width);
  In* to = item + first * stride[1] + channel * stride[0];
  if constexpr (std::is_same_v<In, T>) {
    if (stride[1] == 1)
      return transpose_lines<T>(lines_of(to, stride[0]), lines_of(tile, width), lanes, channels, stream);
    using P = NativePack<T>;
    for (int lane = 0; stream && lane < lanes; ++lane)
      for (int k = 0; k < channels; k += P::kLanes)
        stream_pack(to + lane * stride[1] + k, load_pack<P>(tile + lane * width + k));
    if (stream) return;
    for (int lane = 0; lane < lanes && stride[0] == 1; ++lane)
      memcpy(to + lane * stride[1], tile + lane * width, size_t(channels) * sizeof(T));
    if (stride[0] == 1) return;
  }
  for (int lane = 0; lane < lanes; ++lane)
    for (int k = 0; k < channels; ++k) store(to + k * stride[0] + lane * stride[1], tile[lane * width + k]);
}

template <class In, class T>
void read_tile(const UnprojectParams<In>& params, const In* item, int64_t first, int lanes, int64_t channel, int width,
               T* tile) {
  const int64_t (&stride)[2] = params.volume_stride;
  const int channels = int(params.channels - channel < width ? params.channels - channel : width);
  const In* from = item + first * stride[1] + channel * stride[0];
  if (channels < width)
    for (int n = 0; n < lanes * width; ++n) tile[n] = T(0);
  if constexpr (std::is_same_v<In, T>) {
    if (stride[1] == 1) return transpose_lines<T>(lines_of(tile, width), lines_of(from, stride[0]), channels, lanes);
    for (int lane = 0; lane < lanes && stride[0] == 1; ++lane)
      memcpy(tile + lane * width, from + lane * stride[1], size_t(channels) * sizeof(T));
    if (stride[0] == 1) return;
  }
  for (int lane = 0; lane < lanes; ++lane)
    for (int k = 0; k < channels; ++k) tile[lane * width + k] = load(from + k * stride[0] + lane * stride[1]);
}

// What read_tile reads; none where the channels of a voxel lie side by side.
template <class In>
MemoryLines memory_lines_of_tile(const UnprojectParams<In>& params, const In* item, int64_t first, int64_t channel,
                                 int width) {
  const int64_t (&stride)[2] = params.volume_stride;
  if (stride[1] != 1) return {};
  return {reinterpret_cast<const char*>(item + first + channel * stride[0]), stride[0] * int64_t(sizeof(In)),
          int(params.channels - channel < width ? params.channels - channel : width)};
}

// Goes from block to block of an item's voxels. In a grid the blocks that follow each other lie side by side in a tile,
// not one behind the other along a row: they see the same pixels, which are then still in the caches. After the last
// block comes the first.
class BlockWalk {
 public:
  template <class In>
  BlockWalk(const UnprojectParams<In>& params, int64_t block) {
    const int64_t width = params.grid_size[2];
    if (params.points == 0 || width == 0 || width % kBlock != 0) {
      size_[kAlong] = unproject_blocks(params.points);
      at_[kAlong] = block;
      return;
    }
    size_[kI] = params.grid_size[0];
    size_[kJ] = params.grid_size[1];
    size_[kAlong] = width / kBlock;
    const int64_t slab = block / (kGridTile * size_[kJ] * size_[kAlong]);
    tile_[kI] = slab * kGridTile;
    const int64_t in_slab = block - tile_[kI] * size_[kJ] * size_[kAlong];
    tile_[kJ] = in_slab / (in_tile(kI) * kGridTile * size_[kAlong]) * kGridTile;
    const int64_t rest = in_slab - tile_[kJ] * in_tile(kI) * size_[kAlong];
    const int64_t layer = in_tile(kI) * in_tile(kJ);
    at_[kAlong] = rest / layer;
    at_[kI] = rest % layer / in_tile(kJ);
    at_[kJ] = rest % layer % in_tile(kJ);
  }

  int64_t first_voxel() const {
    return (((tile_[kI] + at_[kI]) * size_[kJ] + tile_[kJ] + at_[kJ]) * size_[kAlong] + at_[kAlong]) * kBlock;
  }

  void next() {
    if (++at_[kJ] < in_tile(kJ)) return;
    at_[kJ] = 0;
    if (++at_[kI] < in_tile(kI)) return;
    at_[kI] = 0;
    if (++at_[kAlong] < size_[kAlong]) return;
    at_[kAlong] = 0;
    if ((tile_[kJ] += kGridTile) < size_[kJ]) return;
    tile_[kJ] = 0;
    if ((tile_[kI] += kGridTile) < size_[kI]) return;
    tile_[kI] = 0;
  }

 private:
  enum Axis { kI, kJ, kAlong };
  int64_t in_tile(Axis axis) const {
    const int64_t left = size_[axis] - tile_[axis];
    return left < kGridTile ? left : kGridTile;
  }

  int64_t size_[3] = {1, 1, 1};  // of the grid, blocks
  int64_t tile_[2] = {0, 0};     // where the tile begins
  int64_t at_[3] = {0, 0, 0};    // of the block: in the tile, and along the rows of the grid
};

// ---- The passes ----

template <class In>
void stage(const UnprojectParams<In>& params, int64_t begin, int64_t end) {
  using T = Accumulator<In>;
  const int64_t (&stride)[4] = params.features_stride;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t map = index / params.height, y = index - map * params.height;
    const int64_t item = map / params.views, view = map - item * params.views;
    int64_t offset[2];
    params.own_maps.offsets(item, offset);
    const In* from = params.features + offset[0] + view * stride[0] + y * stride[2];
    T* to = static_cast<T*>(params.staged) + offset[1] + view * params.rows.view;
    const int64_t row = params.rows.row;
    const auto pixel = [&](int64_t x) { return to + pixel_row(params, x, y); };
    if constexpr (std::is_same_v<In, T>) {
      if (stride[3] == 1) {
        for (int64_t x = 0; x < params.width; ++x)
          for (int64_t k = params.channels; k < row; ++k) pixel(x)[k] = T(0);
        transpose_lines<T>(pixel, lines_of(from, stride[1]), params.channels, params.width);
        continue;
      }
    }
    for (int64_t x = 0; x < params.width; ++x)
      for (int64_t k = 0; k < row; ++k)
        pixel(x)[k] = k < params.channels ? load(from + k * stride[1] + x * stride[3]) : T(0);
  }
}

template <class In>
const Accumulator<In>* feature_rows(const UnprojectParams<In>& params, const int64_t* offset) {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  if (params.rows.staged) return static_cast<const T*>(params.staged) + offset[Params::kStaged];
  return reinterpret_cast<const T*>(params.features) + offset[Params::kFeatures];
}

// What a range of blocks needs of its item, loaded anew where the item changes.
template <class In>
class ItemViews {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;

 public:
  explicit ItemViews(const Params& params)
      : params_(params),
        taps_(params.views),
        matrices_(params.views * 12),
        confidences_(params.confidences == nullptr ? 0 : params.views * params.rows.row) {}

  void load(int64_t item) {
    if (item == item_) return;
    item_ = item;
    params_.batch.offsets(item, offset);
    load_matrices(params_, params_.projections + offset[Params::kProjections], matrices_.data());
    if (params_.confidences != nullptr)
      load_confidences(params_, params_.confidences + offset[Params::kConfidences], confidences_.data());
    views = {params_.views,
             params_.exclude,
             false,
             taps_.data(),
             feature_rows(params_, offset),
             params_.rows.view,
             params_.confidences == nullptr ? nullptr : confidences_.data(),
             params_.rows.row};
  }

  // Projects the block of voxels that starts with `first`; returns how many there are.
  template <bool kSlopes>
  int project(int64_t first) {
    const int lanes = int(params_.points - first < kBlock ? params_.points - first : kBlock);
    load_points(params_, params_.grid + offset[Params::kGrid], first, lanes, points);
    views.all_seen = true;
    for (int view = 0; view < params_.views; ++view) {
      find_taps<kSlopes>(params_, points, matrix(view), taps_[view]);
      views.all_seen = views.all_seen && taps_[view].all_seen;
    }
    return lanes;
  }

  const double* matrix(int view) { return matrices_.data() + 12 * view; }

  int64_t offset[Params::kOperands] = {};
  Views<T> views{};
  BlockPoints points{};

 private:
  const Params& params_;
  int64_t item_ = -1;
  Scratch<BlockTaps<T>> taps_;
  Scratch<double> matrices_;
  Scratch<T> confidences_;
};

template <class In>
void forward(const UnprojectParams<In>& params, int64_t begin, int64_t end) {
  if (begin == end) return;
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  constexpr int N = kLanesOf<T>;
  const bool weighted = params.confidences != nullptr;
  const auto two = tiles_for<T, 2>(params.aggregation, weighted);
  const auto one = tiles_for<T, 1>(params.aggregation, weighted);
  const int64_t blocks = unproject_blocks(params.points);
  const bool stream = std::is_same_v<In, T> && streams(params);
  ItemViews<In> item(params);
  alignas(64) T tile[kBlock * 2 * N];
  int64_t number = begin / blocks;
  BlockWalk walk(params, begin - number * blocks);
  for (int64_t index = begin; index < end; ++index, walk.next()) {
    if (index == (number + 1) * blocks) ++number;
    const int64_t first = walk.first_voxel();
    item.load(number);
    const int lanes = item.template project<false>(first);
    for_channels<T>(0, params.channels, [&](int64_t channel, auto packs) {
      if constexpr (packs.value == 2)
        two.forward(item.views, lanes, channel, tile);
      else
        one.forward(item.views, lanes, channel, tile);
      write_tile(params, params.volume + item.offset[Params::kVolume], first, lanes, channel, packs.value * N, tile,
                 stream);
    });
  }
  if (stream) fence_streams();
}

// Sums of the small operands' gradients over the voxels of a unit, one lane per voxel of a block; projections and frame
// in float64, confidences in float64 after every few blocks.
template <class In>
class SmallSums {
  using T = Accumulator<In>;

 public:
  SmallSums(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients)
      : params_(params),
        frame_wanted_(gradients.grid != nullptr && params.grid_size[0] != 0),
        confidences_wanted_(gradients.confidences != nullptr),
        matrices_(params.views * 12),
        confidences_(params.views * params.rows.row),
        confidences_total_(params.views * params.rows.row) {}

  void clear() {
    for (int64_t n = 0; n < params_.views * 12; ++n) matrices_[n] = Lanes(0.0);
    for (int64_t n = 0; n < 12; ++n) frame_[n] = Lanes(0.0);
    for (int64_t n = 0; n < params_.views * params_.rows.row; ++n) {
      confidences_[n] = T(0);
      confidences_total_[n] = 0.0;
    }
  }

  T* confidences() { return confidences_wanted_ ? confidences_.data() : nullptr; }

  // The gradients to the pixels of a block, taken on to projections and points.
  void add_pixels(ItemViews<In>& item, const T* pixels, int lanes, T* grad_points) {
    const FeatureMap<double> map = feature_map(params_);
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      Lanes index[3], world[3], grad_world[3] = {Lanes(0.0), Lanes(0.0), Lanes(0.0)};
      item.points.load(item.points.world, lane, world);
      for (int view = 0; view < params_.views; ++view) {
        Lanes matrix[3][4], grad_matrix[3][4], grad[2];
        load_matrix(item.matrix(view), matrix);
        for (int a = 0; a < 2; ++a)
          for (int n = 0; n < kLanes; ++n)
            grad[a].v[n] = double(pixels[(2 * view + a) * kBlock + lane + n]) * (a == 0 ? map.scale_x : map.scale_y);
        project_point_vjp(world, matrix, grad, grad_world, grad_matrix);
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 4; ++j)
            matrices_[12 * view + 4 * i + j] = matrices_[12 * view + 4 * i + j] + grad_matrix[i][j];
      }
      for (int a = 0; a < 3; ++a)
        for (int n = 0; grad_points != nullptr && n < kLanes && lane + n < lanes; ++n)
          grad_points[3 * (lane + n) + a] = T(grad_world[a].v[n]);
      if (!frame_wanted_) continue;
      item.points.load(item.points.index, lane, index);
      for (int a = 0; a < 3; ++a) {
        frame_[a] = frame_[a] + grad_world[a];
        for (int n = 0; n < 3; ++n) frame_[3 * (n + 1) + a] = frame_[3 * (n + 1) + a] + grad_world[a] * index[n];
      }
    }
  }

  void flush_confidences() {
    if (!confidences_wanted_) return;
    for (int64_t n = 0; n < params_.views * params_.rows.row; ++n) {
      confidences_total_[n] += double(confidences_[n]);
      confidences_[n] = T(0);
    }
  }

  // [C, 12], [12], [C, row]
  void store(double* to) {
    for (int64_t n = 0; n < params_.views * 12; ++n) *to++ = sum_lanes(matrices_[n], kLanes);
    for (int64_t n = 0; n < 12; ++n) *to++ = sum_lanes(frame_[n], kLanes);
    for (int64_t n = 0; n < params_.views * params_.rows.row; ++n) *to++ = confidences_total_[n];
  }

 private:
  const UnprojectParams<In>& params_;
  bool frame_wanted_, confidences_wanted_;
  Scratch<Lanes> matrices_;
  Lanes frame_[12];
  Scratch<T> confidences_;
  Scratch<double> confidences_total_;
};

// Where a part of an item sums the features' gradient.
template <class In>
Accumulator<In>* gradient_rows(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients, int64_t item,
                               int64_t part, const int64_t* offset) {
  using T = Accumulator<In>;
  if (gradients.features == nullptr || (!gradients.direct && gradients.sums == nullptr)) return nullptr;
  if (gradients.direct) return reinterpret_cast<T*>(gradients.features) + offset[UnprojectParams<In>::kGradFeatures];
  return gradients.sums + (part * params.batch.count + item) * params.views * params.rows.view;
}

template <class In>
void backward(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients, const UnprojectPlan& plan,
              int64_t begin, int64_t end) {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  constexpr int N = kLanesOf<T>;
  constexpr int64_t kBlocksPerFlush = 64;
  const bool weighted = params.confidences != nullptr;
  const auto two = tiles_for<T, 2>(params.aggregation, weighted);
  const auto one = tiles_for<T, 1>(params.aggregation, weighted);
  const bool moving = gradients.projections != nullptr || gradients.grid != nullptr;
  const int64_t blocks = unproject_blocks(params.points);
  ItemViews<In> item(params);
  SmallSums<In> small(params, gradients);
  Scratch<T> pixels(params.views * 2 * kBlock);
  alignas(64) T tile[kBlock * 2 * N];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t number = unit / (plan.groups * plan.parts), rest = unit - number * plan.groups * plan.parts;
    const int64_t group = rest / plan.parts, part = rest - group * plan.parts;
    const int64_t first_channel = group * plan.group_channels, row = params.rows.row;
    const int64_t last_channel =
        first_channel + plan.group_channels < params.channels ? first_channel + plan.group_channels : params.channels;
    item.load(number);
    T* features = gradient_rows(params, gradients, number, part, item.offset);
    if (features != nullptr && plan.group_channels >= row) {
      memset(features, 0, size_t(params.views * params.rows.view) * sizeof(T));
    } else {
      for (int64_t pixel = 0; features != nullptr && pixel < params.views * params.rows.view; pixel += row)
        for (int64_t k = first_channel; k < row && k < first_channel + plan.group_channels; ++k)
          features[pixel + k] = T(0);
    }
    small.clear();
    const Sums<T> sums{features, small.confidences(), moving ? pixels.data() : nullptr};
    T* grad_points =
        gradients.grid != nullptr && params.grid_size[0] == 0 ? gradients.grid + number * params.points * 3 : nullptr;
    const int64_t first_block = blocks * part / plan.parts, last_block = blocks * (part + 1) / plan.parts;
    BlockWalk walk(params, first_block);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = walk.first_voxel();
      walk.next();
      const int lanes = moving ? item.template project<true>(first) : item.template project<false>(first);
      for (int64_t n = 0; moving && n < params.views * 2 * kBlock; ++n) pixels[n] = T(0);
      for_channels<T>(first_channel, last_channel, [&](int64_t channel, auto packs) {
        read_tile(params, params.volume + item.offset[Params::kVolume], first, lanes, channel, packs.value * N, tile);
        MemoryLines next{};
        if (block + 1 < last_block)
          next = memory_lines_of_tile(params, params.volume + item.offset[Params::kVolume], walk.first_voxel(), channel,
                                      packs.value * N);
        if constexpr (packs.value == 2)
          two.backward(item.views, lanes, channel, tile, sums, next);
        else
          one.backward(item.views, lanes, channel, tile, sums, next);
      });
      if (moving)
        small.add_pixels(item, pixels.data(), lanes, grad_points == nullptr ? nullptr : grad_points + 3 * first);
      if ((block + 1) % kBlocksPerFlush == 0 || block + 1 == last_block) small.flush_confidences();
    }
    small.store(static_cast<double*>(gradients.partial) + unit * plan.entries);
  }
}

template <class In>
void backward_rows(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients,
                   const UnprojectPlan& plan, int64_t begin, int64_t end) {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  const int64_t (&stride)[4] = gradients.features_stride;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t map = index / params.height, y = index - map * params.height;
    const int64_t item = map / params.views, view = map - item * params.views;
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    In* to = gradients.features + offset[Params::kGradFeatures] + view * stride[0] + y * stride[2];
    const int64_t row = params.rows.row, copy = params.batch.count * params.views * params.rows.view;
    T* sums = gradients.sums + map * params.rows.view;
    const auto pixel = [&](int64_t x) { return sums + pixel_row(params, x, y); };
    for (int64_t part = 1; part < plan.parts; ++part)
      for (int64_t x = 0; x < params.width; ++x)
        for (int64_t k = 0; k < row; ++k) pixel(x)[k] += pixel(x)[part * copy + k];
    if constexpr (std::is_same_v<In, T>) {
      if (stride[3] == 1) {
        transpose_lines<T>(lines_of(to, stride[1]), pixel, params.width, params.channels);
        continue;
      }
    }
    for (int64_t x = 0; x < params.width; ++x)
      for (int64_t k = 0; k < params.channels; ++k) store(to + k * stride[1] + x * stride[3], pixel(x)[k]);
  }
}

template <class In>
void backward_sums(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients,
                   const UnprojectPlan& plan, int64_t begin, int64_t end) {
  using T = Accumulator<In>;
  const int64_t units = plan.groups * plan.parts;
  for (int64_t item = begin; item < end; ++item) {
    const double* partial = static_cast<const double*>(gradients.partial) + item * units * plan.entries;
    const auto total = [&](int64_t entry) {
      double sum = 0.0;
      for (int64_t unit = 0; unit < units; ++unit) sum += partial[unit * plan.entries + entry];
      return T(sum);
    };
    const int64_t matrices = params.views * 12;
    for (int64_t n = 0; gradients.projections != nullptr && n < matrices; ++n)
      gradients.projections[item * matrices + n] = total(n);
    for (int64_t n = 0; gradients.grid != nullptr && params.grid_size[0] != 0 && n < 12; ++n)
      gradients.grid[item * 12 + n] = total(matrices + n);
    for (int64_t n = 0; gradients.confidences != nullptr && n < params.views * params.channels; ++n) {
      const int64_t view = n / params.channels, k = n - view * params.channels;
      gradients.confidences[item * params.views * params.channels + n] =
          total(matrices + 12 + view * params.rows.row + k);
    }
  }
}

}  // namespace

template <class In>
const UnprojectKernels<In>& unproject_kernels() {
  static const UnprojectKernels<In> kernels{&stage<In>, &forward<In>, &backward<In>, &backward_rows<In>,
                                            &backward_sums<In>};
  return kernels;
}
template const UnprojectKernels<float>& unproject_kernels<float>();
template const UnprojectKernels<double>& unproject_kernels<double>();
template const UnprojectKernels<Float16>& unproject_kernels<Float16>();
template const UnprojectKernels<BFloat16>& unproject_kernels<BFloat16>();

}  // namespace TRITOOL_ISA
}  // namespace cpu
}  // namespace tritool
