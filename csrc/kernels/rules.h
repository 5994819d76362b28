// The backward rules of a ReLU: what passes of the signal R, given whether the forward's input was alive.
#pragma once

#include <limits>

#include "kernels/types.h"

namespace convviz {

// Codes as in the ops' schemas.
enum class RuleCode : int64_t { kIdentity = 0, kGradient = 1, kDeconvnet = 2, kGuided = 3 };

// A rule as two numbers instead of a type of its own: every kernel here is bound by memory, so that choosing
// at run time costs nothing, and it keeps four times as many instantiations out of the binary.
template <class A>
struct Rule {
  int ignores_forward;  // 1: passes dead elements too
  A floor;              // signals <= floor stop; NaN (nothing is <= NaN) lets all pass

  CONVVIZ_HD bool stops(int alive, A signal) const {
    return (signal <= floor) | ((alive | ignores_forward) == 0);
  }

  // Selects, never multiplies: NaN passes an open gate, infinity at a closed one gives 0.
  CONVVIZ_HD A apply(int alive, A signal) const { return stops(alive, signal) ? A(0) : signal; }
};

template <class A>
Rule<A> make_rule(RuleCode code) {
  const bool forward = code == RuleCode::kGradient || code == RuleCode::kGuided;
  const bool backward = code == RuleCode::kDeconvnet || code == RuleCode::kGuided;
  return {forward ? 0 : 1, backward ? A(0) : std::numeric_limits<A>::quiet_NaN()};
}

}  // namespace convviz
