// Features at points, and their gradients. See cpu.cpp for how.
#pragma once

#include "common/array.h"

namespace instembed::gather_at {

// Where to read. features (B, G, C, *spatial) of 1 to 3 spatial dimensions: channels in G groups,
// each with points of its own. points (B, N, G, S): x, y, z in pixels. valid (B, N, G): > 0, or
// null for all. Any strides. A point counts if its nearest pixel is on the map; `linear` reads
// between the pixels around it, and beyond the outermost centres what is there.
struct Query {
  const Array& points;
  const Array* valid;
  bool linear;
};

// values (B, N, G, C), contiguous; zero where a point does not count.
void forward(const Array& features, const Query& query, const Array& values, int threads);

// grad_values as values. Gradients for whatever is wanted: grad_features has the features' shape
// and type, and strides of its own without gaps; grad_points is (B, N, G, S), contiguous, of the
// points' floating type.
void backward(const Array& grad_values, const Array& features, const Query& query,
              const Array* grad_features, const Array* grad_points, int threads);

}  // namespace instembed::gather_at
