// Conditions on rows, as abi/ring.h says them, in code.
#pragma once

#include <vector>

#include "levels.h"

namespace dmi {

// A dmi_watch as it was latched; the same bytes on a device.
struct Condition {
  double above = INFINITY, below = -INFINITY, bias = 0;
  uint32_t weight = 0, elements = 0;  // of a probe: the first of its weights, among all that there are; how many
  uint8_t condition = DMI_CONDITION_NONE;
  uint8_t statistic = 0;
  uint8_t spare[6] = {};

  DMI_BOTH bool outside(double v) const { return v > above || v < below; }  // NaN is not

  DMI_BOTH bool met_by(const Sums& sums) const {
    if (condition == DMI_CONDITION_NONFINITE) return sums.count != sums.finite;
    return condition == DMI_CONDITION_STATISTIC && statistic < DMI_STATS && outside(sums.figure(statistic));
  }
};

// With its weights.
struct Watch : Condition {
  using Condition::met_by;

  std::vector<float> weights;

  // Elements as they lie in the row, of which there are as many as weights. Four sums beside each other, in an order that does not depend
  // on the machine.
  template <typename Value>
  bool met_by(const Value* elements) const {
    double sum[4] = {};
    size_t i = 0;
    for (; i + 4 <= weights.size(); i += 4) {
      for (size_t k = 0; k < 4; ++k) sum[k] += double(weights[i + k]) * double(elements[i + k]);
    }
    for (; i < weights.size(); ++i) sum[0] += double(weights[i]) * double(elements[i]);
    return outside(bias + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
};

}  // namespace dmi
