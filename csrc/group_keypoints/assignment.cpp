#include "group_keypoints/assignment.h"

#include <algorithm>
#include <cmath>

#include "group_keypoints/group_keypoints.h"
#include "group_keypoints/tags.h"

namespace instembed::group_keypoints {
namespace {

// Rows and columns of a growing assignment, with prices under which no pair costs less than
// nothing, and those that are assigned cost nothing.
class Assignment {
 public:
  Assignment(const std::vector<Cost>& costs, int64_t rows, int64_t columns)
      : column_of(rows, -1),
        costs_(costs),
        columns_(columns),
        row_of_(columns, -1),
        row_price_(rows),
        column_price_(columns, 0) {
    for (int64_t i = 0; i < rows; ++i) {  // each row takes its cheapest column, if that is free
      const Cost* row = costs_.data() + i * columns_;
      const int64_t j = std::min_element(row, row + columns_) - row;
      row_price_[i] = row[j];
      if (row_of_[j] < 0) {
        row_of_[j] = i;
        column_of[i] = j;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (column_of[i] < 0) waiting_.push_back(i);
    }
    for (const int64_t i : waiting_) augment(i);
  }

  std::vector<int64_t> column_of;

 private:
  // Dijkstra's algorithm from the row to the nearest free column, over reduced costs. Every row on
  // the path then moves on by one column.
  void augment(int64_t start) {
    length_.assign(columns_, 0);
    via_.assign(columns_, -1);
    open_.resize(columns_);
    for (int64_t j = 0; j < columns_; ++j) open_[j] = j;
    done_.clear();
    int64_t i = start, end = -1;
    Cost reached = 0;
    for (;;) {
      size_t nearest = 0;
      for (size_t k = 0; k < open_.size(); ++k) {
        const int64_t j = open_[k];
        const Cost through = reached + costs_[i * columns_ + j] - row_price_[i] - column_price_[j];
        if (via_[j] < 0 || through < length_[j]) {
          length_[j] = through;
          via_[j] = i;
        }
        if (length_[j] < length_[open_[nearest]]) nearest = k;
      }
      end = open_[nearest];
      reached = length_[end];
      if (row_of_[end] < 0) break;
      open_.erase(open_.begin() + static_cast<int64_t>(nearest));  // in ascending order still
      done_.push_back(end);
      i = row_of_[end];
    }
    row_price_[start] += reached;
    for (const int64_t j : done_) {
      column_price_[j] -= reached - length_[j];
      row_price_[row_of_[j]] += reached - length_[j];
    }
    for (int64_t j = end; j >= 0;) {
      i = via_[j];
      row_of_[j] = i;
      std::swap(column_of[i], j);
    }
  }

  const std::vector<Cost>& costs_;
  int64_t columns_;
  std::vector<int64_t> row_of_;
  std::vector<Cost> row_price_, column_price_, length_;
  std::vector<int64_t> via_, open_, done_, waiting_;
};

}  // namespace

std::vector<int64_t> least_cost_assignment(const std::vector<Cost>& costs, int64_t rows,
                                           int64_t columns) {
  return Assignment(costs, rows, columns).column_of;
}

std::vector<int64_t> match(const std::vector<double>& distances, const std::vector<double>& scores,
                           double tag_threshold) {
  const auto candidates = static_cast<int64_t>(scores.size());
  std::vector<int64_t> matches(candidates, -1);
  if (candidates == 0 || distances.empty()) return matches;
  const auto people = static_cast<int64_t>(distances.size()) / candidates;
  expect(people * candidates == static_cast<int64_t>(distances.size()),
         "distances: expected candidates x people");
  const bool usable = std::all_of(distances.begin(), distances.end(),
                                  [](double d) { return d >= 0 && d <= kFar; }) &&
                      std::all_of(scores.begin(), scores.end(), [](double s) { return s >= 0; });
  expect(usable, "match: expected distances from 0 to 2^30, and scores from 0 on");

  constexpr double kScoreUnit = 4294967296.0, kTieUnit = 16777216.0;  // 2^32, 2^24
  std::vector<Cost> costs(distances.size());
  const bool in_order = candidates <= people;  // the shorter side are the rows
  for (int64_t i = 0; i < candidates; ++i) {
    const auto score = static_cast<int64_t>(std::nearbyint(std::min(scores[i], kFar) * kScoreUnit));
    for (int64_t p = 0; p < people; ++p) {
      const double distance = distances[i * people + p];
      const Cost first = Cost{static_cast<int64_t>(rounded(distance)) * 100} * (Cost{1} << 32);
      const double share = tag_threshold > 0 ? std::min(distance / tag_threshold, 1.0) : 0.0;
      costs[in_order ? i * people + p : p * candidates + i] =
          (first - score) * (Cost{1} << 40) +
          static_cast<int64_t>(rounded(share * share * kTieUnit));
    }
  }
  if (in_order) return least_cost_assignment(costs, candidates, people);
  const std::vector<int64_t> of_people = least_cost_assignment(costs, people, candidates);
  for (int64_t p = 0; p < people; ++p) matches[of_people[p]] = p;
  return matches;
}

}  // namespace instembed::group_keypoints
