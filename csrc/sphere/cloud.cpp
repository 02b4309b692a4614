#include "sphere/cloud.h"

namespace instembed::sphere {

template <class A>
Cloud<A> build_cloud(const Image<const A>& points, const std::vector<int32_t>& pixels,
                     int threads) {
  const auto count = static_cast<int64_t>(pixels.size());
  Cloud<A> cloud;
  cloud.channels = points.channels;
  cloud.padded = (points.channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  Lines<A> rows(count * cloud.padded);
  for_each(count, threads, [&](int64_t i) {
    const A* from = at(points, pixels[i]);
    A* to = rows.data() + i * cloud.padded;
    for (int64_t d = 0; d < points.channels; ++d) to[d] = from[d * points.channel_stride];
  });
  cloud.tiles = order_points(rows.data(), count, cloud.padded, threads);
  const int64_t slots = cloud.tiles.slots();
  cloud.points = Field<A>(cloud.channels, cloud.padded, slots);
  for_each(slots, threads, [&](int64_t s) {
    int32_t& point = cloud.tiles.point[s];
    if (point < 0) return;
    std::copy_n(rows.data() + point * cloud.padded, cloud.padded,
                cloud.points.rows.data() + s * cloud.padded);
    point = pixels[point];
  });
  fill_planar(cloud, &cloud.points, threads);
  return cloud;
}

template <class A>
void fill_planar(const Cloud<A>& cloud, Field<A>* field, int threads) {
  parallel_for(cloud.tiles.size(), threads, [&](int64_t t) {
    const int64_t begin = cloud.tiles.begin[t], width = cloud.width(t);
    const A* rows = field->rows.data() + begin * cloud.padded;
    A* planar = field->planar.data() + begin * cloud.channels;
    for (int64_t d = 0; d < cloud.channels; ++d) {
      for (int64_t i = 0; i < width; ++i) planar[d * width + i] = rows[i * cloud.padded + d];
    }
  });
}

#define INSTEMBED_INSTANTIATE(A)                                                          \
  template Cloud<A> build_cloud(const Image<const A>&, const std::vector<int32_t>&, int); \
  template void fill_planar(const Cloud<A>&, Field<A>*, int);
INSTEMBED_INSTANTIATE(float)
INSTEMBED_INSTANTIATE(double)
#undef INSTEMBED_INSTANTIATE

}  // namespace instembed::sphere
