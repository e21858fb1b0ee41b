// SPDX-License-Identifier: Apache-2.0
// Unprojection: where a view samples its features for a voxel, and how the views are put together. Iskakov et al.,
// ICCV 2019, equations (8)-(11). Derivation, conventions at the border and behind the camera: docs/ops/unproject.md.
#pragma once

#include "math/project.h"

TRITOOL_MATH_BEGIN

// The centre of voxel (i, j, k): frame[0] is that of voxel (0, 0, 0), frame[1..3] are the steps.
template <class T>
TRITOOL_HD void voxel_center(const T (&frame)[4][3], T i, T j, T k, T (&point)[3]) {
  for (int a = 0; a < 3; ++a) point[a] = frame[0][a] + i * frame[1][a] + j * frame[2][a] + k * frame[3][a];
}

// A feature map: its size, and what projected coordinates are multiplied by to be its pixels.
template <class T>
struct FeatureMap {
  T width, height;
  T scale_x, scale_y;
};

// Where a view samples its features for a voxel: the pixel (column, row) that is the lower corner of a cell, and the
// fractions of a pixel beyond it. A view sees a voxel in front of it that is less than a pixel outside of the map; the
// column of one that it does not see, or of which it cannot be said, is one of two numbers.
template <class T>
struct Cell {
  T column, row;
  T fraction_x, fraction_y;
};
constexpr int kUnseenColumn = -2, kUnknownColumn = -3;

template <class T>
TRITOOL_HD Cell<T> cell_of(const T (&point)[3], const T (&matrix)[3][4], const FeatureMap<T>& map) {
  T image[3];
  image_of(point, matrix, image);
  // Two divisions: a pixel that is a whole number comes out as one, and so in its own cell.
  const T x = image[0] / image[2] * map.scale_x, y = image[1] / image[2] * map.scale_y;
  const auto behind = image[2] <= T(0);
  // Infinite pixels are known to be outside; those that are not numbers are not, nor is what lies at infinity.
  const auto unknown = (!behind) & ((!is_finite(image[2])) | is_nan(x) | is_nan(y));
  const auto seen = (image[2] > T(0)) & (x > T(-1)) & (x < map.width) & (y > T(-1)) & (y < map.height) & (!unknown);
  Cell<T> cell;
  cell.column = floor_(x);
  cell.row = floor_(y);
  cell.fraction_x = select(seen, x - cell.column, T(0));
  cell.fraction_y = select(seen, y - cell.row, T(0));
  cell.column = select(seen, cell.column, select(unknown, T(kUnknownColumn), T(kUnseenColumn)));
  cell.row = select(seen, cell.row, T(kUnseenColumn));
  return cell;
}

// The same for a voxel whose cell lies in the map with all of its pixels, with one division in place of two and fewer
// questions; false for others, whose cell is of no use.
template <class T>
TRITOOL_HD Mask<T> inner_cell_of(const T (&point)[3], const T (&matrix)[3][4], const FeatureMap<T>& map,
                                 Cell<T>& cell) {
  T image[3];
  image_of(point, matrix, image);
  const T inverse = T(1) / image[2];
  const T x = quotient(image[0], image[2], inverse) * map.scale_x;
  const T y = quotient(image[1], image[2], inverse) * map.scale_y;
  cell.column = floor_(x);
  cell.row = floor_(y);
  cell.fraction_x = x - cell.column;
  cell.fraction_y = y - cell.row;
  // Nothing that is no number is in a range.
  return (image[2] > T(0)) & (x >= T(0)) & (x < map.width - T(1)) & (y >= T(0)) & (y < map.height - T(1));
}

// Bilinear sampling is separable: the pixel with number place[n] along an axis, 0 or 1, has the weight along[n], whose
// derivative is slope[n]. Pixels outside of the map have weight and slope 0 and are moved to the border, so that they
// can be read; so have all of a view that does not see the voxel.
template <class T>
struct Footprint {
  T column[2], row[2];
  T along_x[2], along_y[2];
  T slope_x[2], slope_y[2];
};

template <class T>
TRITOOL_HD void footprint_along(T low, T fraction, T size, T (&place)[2], T (&along)[2], T (&slope)[2]) {
  const T high = low + T(1);
  const auto low_inside = low >= T(0);
  const auto high_inside = (high >= T(0)) & (high < size);
  place[0] = max_(low, T(0));
  place[1] = select(high_inside, high, place[0]);
  along[0] = select(low_inside, T(1) - fraction, T(0));
  along[1] = select(high_inside, fraction, T(0));
  slope[0] = select(low_inside, T(-1), T(0));
  slope[1] = select(high_inside, T(1), T(0));
}

template <class T>
TRITOOL_HD Footprint<T> footprint_of(const Cell<T>& cell, T width, T height) {
  Footprint<T> result;
  footprint_along(cell.column, cell.fraction_x, width, result.column, result.along_x, result.slope_x);
  footprint_along(cell.row, cell.fraction_y, height, result.row, result.along_y, result.slope_y);
  return result;
}

// The same for a cell of inner_cell_of.
template <class T>
TRITOOL_HD Footprint<T> inner_footprint_of(const Cell<T>& cell) {
  return {{cell.column, cell.column + T(1)},
          {cell.row, cell.row + T(1)},
          {T(1) - cell.fraction_x, cell.fraction_x},
          {T(1) - cell.fraction_y, cell.fraction_y},
          {T(-1), T(1)},
          {T(-1), T(1)}};
}

enum class Aggregation { kSum, kMean, kSoftmax, kMax };
// Its gradient to the features does not depend on them.
TRITOOL_HD constexpr bool is_linear(Aggregation aggregation) {
  return aggregation == Aggregation::kSum || aggregation == Aggregation::kMean;
}

// NaN for a confidence that is negative or not finite.
template <class T>
TRITOOL_HD T known_confidence(T confidence) {
  return select((confidence >= T(0)) & is_finite(confidence), confidence, quiet_nan<T>());
}

// The aggregate over the views of one channel of one voxel, and its derivatives. A view of confidence 0 is absent; one
// that is negative or not finite makes the result NaN. Without kWeighted all confidences are 1.
//
// The softmax keeps its sums relative to a level, the largest value yet. Views are added one by one (add), or several
// at a time: first look() at each, then rise() once, then add_looked_at() each, which costs one exponential a view and
// no comparison. add_looked_at<true> is for confidences from known_confidence(), which many voxels may ask once.
//
// After the last view finish(), then value_slope() and confidence_slope() give d result / d value and d result /
// d confidence of a view. `factor` is what add_looked_at() returned since the last rise(), or factor_of(). For the
// maximum the views must be asked in the order in which they were added, once each.
template <class T, Aggregation kBy, bool kWeighted>
class ViewAggregate {
 public:
  static constexpr bool kLooks = kBy == Aggregation::kSoftmax;  // otherwise look() and rise() do nothing

  TRITOOL_HD void look(T value, [[maybe_unused]] T confidence) {
    if constexpr (kBy == Aggregation::kSoftmax) {
      if constexpr (kWeighted) value = select(confidence != T(0), value, seen_);
      seen_ = max_(value, seen_);
    }
  }

  TRITOOL_HD void rise() {
    if constexpr (kBy == Aggregation::kSoftmax) {
      const T factor = select(seen_ == level_, T(1), exp2_((level_ - seen_) * T(Real<T>(kLog2OfE))));
      norm_ = norm_ * factor;
      total_ = total_ * factor;
      level_ = seen_;
    }
  }
  // Before anything was added.
  TRITOOL_HD void start() { level_ = seen_; }

  template <bool kKnown = false>
  TRITOOL_HD T add_looked_at(T value, T confidence) {
    if constexpr (kWeighted) value = select(confidence != T(0), value, T(0));  // 0 * NaN
    if constexpr (kWeighted && !kKnown) confidence = known_confidence(confidence);
    if constexpr (is_linear(kBy)) {
      total_ = kWeighted ? total_ + confidence * value : total_ + value;
      if constexpr (kWeighted || kBy == Aggregation::kMean) norm_ = norm_ + confidence;
      return T(1);
    } else if constexpr (kBy == Aggregation::kSoftmax) {
      const T factor = factor_of(value, confidence);
      const T weight = kWeighted ? confidence * factor : factor;
      norm_ = norm_ + weight;
      total_ = total_ + weight * value;
      return factor;
    } else {
      auto larger = (value > level_) | is_nan(value);
      if constexpr (kWeighted) larger = larger & (confidence != T(0));
      level_ = select(larger, value, level_);
      norm_ = norm_ + confidence;
      return T(1);
    }
  }

  TRITOOL_HD void add(T value, T confidence) {
    if constexpr (kBy == Aggregation::kSoftmax) {
      look(value, confidence);
      rise();
    }
    add_looked_at(value, confidence);
  }

  // A view whose value cannot be known.
  TRITOOL_HD void add_unknown([[maybe_unused]] T confidence) {
    if constexpr (kWeighted)
      norm_ = norm_ + select(confidence == T(0), T(0), quiet_nan<T>());
    else
      norm_ = quiet_nan<T>();
  }

  TRITOOL_HD T finish() {
    const auto nothing = norm_ == T(0);
    if constexpr (kBy == Aggregation::kMean || kBy == Aggregation::kSoftmax)
      inverse_norm_ = T(1) / select(nothing, T(1), norm_);
    if constexpr (kBy == Aggregation::kSum)
      return select(is_nan(norm_), norm_, total_);
    else if constexpr (kBy == Aggregation::kMax)
      return select(nothing, T(0), select(is_nan(norm_), norm_, level_));
    else if constexpr (kBy == Aggregation::kSoftmax)
      return select(level_ < infinity<T>(), total_ * inverse_norm_, quiet_nan<T>());  // of nothing: 0
    else
      return total_ * inverse_norm_;
  }

  // Whether the result is known as far as geometry and confidences are concerned: the gradient to the features of a
  // linear aggregation does not depend on more.
  TRITOOL_HD Mask<T> known() const { return norm_ == norm_; }

  // exp(value - level), at most 1. An absent view may lie above the level: not infinity * 0.
  TRITOOL_HD T factor_of(T value, [[maybe_unused]] T confidence) const {
    if constexpr (kBy != Aggregation::kSoftmax) return T(1);
    T difference = value - level_;
    if constexpr (kWeighted) difference = select(confidence == T(0), T(0), difference);
    return exp2_(difference * T(Real<T>(kLog2OfE)));
  }

  TRITOOL_HD T value_slope(T value, T confidence, T factor, T result) {
    if constexpr (kBy == Aggregation::kSum) {
      return confidence;
    } else if constexpr (kBy == Aggregation::kMean) {
      return confidence * inverse_norm_;
    } else if constexpr (kBy == Aggregation::kSoftmax) {
      const T slope = confidence * (factor * inverse_norm_) * (T(1) + (value - result));
      if constexpr (kWeighted) return select(confidence == T(0), T(0), slope);  // its value may be NaN
      return slope;
    } else {
      auto largest = value == level_;
      if constexpr (kWeighted) largest = largest & (confidence != T(0));
      const T share = select(largest, left_, T(0));
      left_ = left_ - share;
      return share;
    }
  }

  TRITOOL_HD T confidence_slope(T value, T confidence, T factor, T result) const {
    T slope = T(0);
    if constexpr (kBy == Aggregation::kSum) slope = value;
    if constexpr (kBy == Aggregation::kMean) slope = inverse_norm_ * (value - result);
    if constexpr (kBy == Aggregation::kSoftmax) slope = factor * inverse_norm_ * (value - result);
    return select(confidence == T(0), T(0), slope);
  }

 private:
  static constexpr double kLog2OfE = 1.4426950408889634074;

  T norm_ = T(0), total_ = T(0), inverse_norm_ = T(0);
  T level_ = T(0) - infinity<T>(), seen_ = T(0) - infinity<T>();
  T left_ = T(1);  // of the maximum's gradient
};

TRITOOL_MATH_END
