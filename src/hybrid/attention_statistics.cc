#include "hybrid/attention_statistics.h"

#include <algorithm>
#include <cmath>

#include "base/parallel.h"

namespace cambium {
namespace {

/// softmax of the scores of query row `t` against key rows [first, t].
void attention_row(const float* q, const float* k, int64_t key_stride, int64_t dim,
                   const AttentionConfig& config, int64_t first, int64_t t,
                   std::vector<double>& row) {
  row.resize(static_cast<size_t>(t - first + 1));
  double most = -INFINITY;
  for (int64_t s = first; s <= t; ++s) {
    double dot = 0.0;
    for (int64_t i = 0; i < dim; ++i) {
      dot += static_cast<double>(q[i]) * k[s * key_stride + i];
    }
    double& score = row[static_cast<size_t>(s - first)];
    score = dot * config.scale;
    if (config.softcap > 0.0F) {
      score = config.softcap * std::tanh(score / config.softcap);
    }
    most = std::max(most, score);
  }
  double sum = 0.0;
  for (double& p : row) {
    p = std::exp(p - most);
    sum += p;
  }
  for (double& p : row) {
    p /= sum;
  }
}

}  // namespace

void AttentionRows::add(const Tensor& q, const Tensor& k, const Segments& segments,
                        const AttentionConfig& config, int64_t rows) {
  const int64_t heads = q.dim(1);
  const int64_t kv_heads = k.dim(1);
  const int64_t dim = q.dim(2);
  CAMBIUM_CHECK(static_cast<size_t>(heads) == heads_.size() && heads % kv_heads == 0 && rows > 0);
  const auto* queries = q.ptr<float>();
  const auto* keys = k.ptr<float>();
  for (int64_t s = 0; s < segments.count(); ++s) {
    count_ += std::min(rows, std::max<int64_t>(segments.length(s) - 1, 0));
  }
  parallel_for(heads, 1, [&](int64_t from, int64_t to) {
    std::vector<double> row;
    for (int64_t h = from; h < to; ++h) {
      Sums& sums = heads_[static_cast<size_t>(h)];
      for (int64_t s = 0; s < segments.count(); ++s) {
        const int64_t begin = segments.start[static_cast<size_t>(s)];
        const int64_t last = segments.length(s) - 1;
        const int64_t taken = std::min(rows, last);
        for (int64_t i = 0; i < taken; ++i) {
          const int64_t t = last - i * last / taken;
          const int64_t first = config.window > 0 ? std::max<int64_t>(0, t - config.window + 1) : 0;
          attention_row(queries + ((begin + t) * heads + h) * dim,
                        keys + (begin * kv_heads + h / (heads / kv_heads)) * dim, kv_heads * dim,
                        dim, config, first, t, row);
          sums.mass.resize(std::max(sums.mass.size(), row.size()));
          double entropy = 0.0;
          for (int64_t key = first; key <= t; ++key) {
            const double p = row[static_cast<size_t>(key - first)];
            const auto back = static_cast<size_t>(t - key);
            sums.look_back += p * static_cast<double>(back);
            sums.mass[back] += p;
            entropy -= p > 0.0 ? p * std::log(p) : 0.0;
          }
          const double even = std::log(static_cast<double>(row.size()));
          sums.concentration += even > 0.0 ? 1.0 - entropy / even : 1.0;
        }
      }
    }
  });
}

std::vector<HeadStatistics> AttentionRows::heads() const {
  const auto count = static_cast<double>(std::max<int64_t>(count_, 1));
  std::vector<HeadStatistics> out;
  for (const Sums& sums : heads_) {
    HeadStatistics head{.look_back = sums.look_back / count,
                        .concentration = sums.concentration / count};
    double so_far = 0.0;
    for (size_t back = 0; back < sums.mass.size(); ++back) {
      so_far += sums.mass[back];
      head.half_distance = static_cast<double>(back);
      if (so_far >= 0.5 * count) {
        break;
      }
    }
    out.push_back(head);
  }
  return out;
}

}  // namespace cambium
