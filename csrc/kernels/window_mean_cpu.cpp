#include "kernels/window_mean.h"

#include <algorithm>
#include <vector>

#include "kernels/isa.h"

namespace convviz {

namespace {

// The sums of the grid's columns serve a whole row of pixels, and a row is the one above it where the same
// windows cover both.
template <class T>
struct Loop {
  WindowMeanArgs<T> args;
  double* columns;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t height = args.h.size, width = args.w.size, across = args.w.count;
    Covering before{-1, -1};
    for (int64_t r = begin; r < end; ++r) {
      const int64_t map = r / height, y = r % height;
      const Covering rows = covering(args.h, y);
      T* out = args.out + r * width;
      if (y > 0 && r > begin && rows.begin == before.begin && rows.end == before.end) {
        std::copy(out - width, out, out);
        continue;
      }
      before = rows;
      const T* scores = args.scores + map * args.h.count * across;
      for (int64_t q = 0; q < across; ++q) columns[q] = 0;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        for (int64_t q = 0; q < across; ++q) columns[q] += static_cast<double>(scores[i * across + q]);
      }
      Covering last{-1, -1};
      T mean{};
      for (int64_t x = 0; x < width; ++x) {
        const Covering cols = covering(args.w, x);
        if (cols.begin != last.begin || cols.end != last.end) {
          double sum = 0;
          for (int64_t q = cols.begin; q < cols.end; ++q) sum += columns[q];
          mean = mean_of<T>(sum, rows, cols);
          last = cols;
        }
        out[x] = mean;
      }
    }
  }
};

}  // namespace

template <class T>
void window_mean_cpu(const WindowMeanArgs<T>& args, int64_t begin, int64_t end) {
  std::vector<double> columns(static_cast<size_t>(args.w.count));
  run_widest(Loop<T>{args, columns.data()}, begin, end);
}

#define CONVVIZ_INSTANTIATE(T) template void window_mean_cpu<T>(const WindowMeanArgs<T>&, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
