// The least-cost assignment of the rows of a table to its columns.
#pragma once

#include <cstdint>
#include <vector>

namespace instembed::group_keypoints {

// Wide enough for sums of costs to be exact: a tie is a tie, whatever order it was added up in.
using Cost = __int128;

// A column for each row, none twice, at the least total cost; costs are rows x columns, with no
// more rows than columns. Shortest augmenting paths (Jonker and Volgenant, 1987); ties go to the
// lower index.
std::vector<int64_t> least_cost_assignment(const std::vector<Cost>& costs, int64_t rows,
                                           int64_t columns);

}  // namespace instembed::group_keypoints
