#include "group_keypoints/people.h"

#include <algorithm>

#include "group_keypoints/tags.h"

namespace instembed::group_keypoints {
namespace {

struct Group {
  Person person;
  std::vector<double> sum;  // of the joints' tags
  int64_t count = 0;

  Group(int64_t joints, int64_t dims) : sum(dims, 0.0) {
    person.joints.assign(joints, {0.0, -1});
    person.visibility.assign(joints, 0);
    person.tag.resize(dims);
  }

  void add(int64_t k, const Peak& peak, const double* tag) {
    person.joints[k] = peak;
    person.visibility[k] = 2;
    ++count;
    for (size_t d = 0; d < sum.size(); ++d) {
      sum[d] += tag[d];
      person.tag[d] = sum[d] / static_cast<double>(count);
    }
  }
};

}  // namespace

std::vector<Person> group_people(const Candidates* candidates, int64_t joints, int64_t dims,
                                 const Options& options) {
  std::vector<Group> groups;
  groups.reserve(2 * candidates[options.joint_order[0]].peaks.size());
  std::vector<double> distances, scores;
  for (const int64_t k : options.joint_order) {
    const std::vector<Peak>& peaks = candidates[k].peaks;
    const double* tags = candidates[k].tags.data();
    const size_t people = groups.size();
    distances.resize(peaks.size() * people);
    scores.resize(peaks.size());
    for (size_t i = 0; i < peaks.size(); ++i) {
      scores[i] = peaks[i].score;
      for (size_t p = 0; p < people; ++p) {
        distances[i * people + p] = distance(tags + i * dims, groups[p].person.tag.data(), dims);
      }
    }
    const std::vector<int64_t> matches = match(distances, scores, options.tag_threshold);
    for (size_t i = 0; i < peaks.size(); ++i) {
      int64_t p = matches[i];
      if (p < 0 || !(distances[i * people + p] < options.tag_threshold)) {
        p = static_cast<int64_t>(groups.size());
        groups.emplace_back(joints, dims);
      }
      groups[p].add(k, peaks[i], tags + i * dims);
    }
  }

  std::vector<Person> people;
  for (Group& group : groups) {
    for (const Peak& joint : group.person.joints) group.person.score += joint.score;
    group.person.score /= static_cast<double>(joints);
    people.push_back(std::move(group.person));
  }
  std::stable_sort(people.begin(), people.end(),
                   [](const Person& p, const Person& q) { return p.score > q.score; });
  if (static_cast<int64_t>(people.size()) > options.max_people) {
    people.erase(people.begin() + options.max_people, people.end());
  }
  return people;
}

}  // namespace instembed::group_keypoints
