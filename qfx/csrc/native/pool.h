// Pooling over images of integers, by the loop of ../pooling.h.

#pragma once

#include <cstdint>

#include "../pooling.h"
#include "team.h"

namespace qfx {

template <class Op>
void pool(const Team& team, const Pooling& p, int64_t count, const typename Op::In* x, const Op& op) {
  const auto lines = team.share(count * p.out_h);
  for (int64_t line = lines.begin; line < lines.end; ++line) pool_line(op, x, p, line);
}

}  // namespace qfx
