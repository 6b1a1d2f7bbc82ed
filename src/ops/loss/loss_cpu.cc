#include "base/parallel.h"
#include "base/simd.h"
#include "ops/loss/loss_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Sums are taken in fp32 over this many elements, then in fp64.
constexpr int64_t kBlock = 64 * kLanes;
// Below every exponent that vexp answers with 0; fills the lanes past the end of a row.
constexpr float kNothing = -1e30F;

// The first n lanes from memory, the others `fill`.
vf load_or(const float* p, int64_t n, float fill) {
  if (n >= kLanes) {
    return vload(p);
  }
  float values[kLanes];
  vstore(values, vset(fill));
  vstore_part(values, vload_part(p, n), n);
  return vload(values);
}

struct Largest {
  float value;
  int64_t index;
};

// The largest of n values, the first of equals.
Largest find_largest(const float* x, int64_t n) {
  vf best = vset(kNothing);
  vi where = {};
  vi index = {};
  for (int l = 0; l < kLanes; ++l) {
    index[l] = l;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf v = load_or(x + i, n - i, kNothing);
    const vi better = v > best;
    best = better ? v : best;
    where = better ? index : where;
    index += kLanes;
  }
  Largest largest{best[0], where[0]};
  for (int l = 1; l < kLanes; ++l) {
    if (best[l] > largest.value || (best[l] == largest.value && where[l] < largest.index)) {
      largest = {best[l], where[l]};
    }
  }
  return largest;
}

// What the gradient pass finds in the buffers of the logits: the logits themselves; or, to spare it
// the exponentials, those of the student (and of the teacher), or those of the student and the
// difference of the scaled logits.
enum class Kept { kLogits, kExponentials, kDifference };

struct RowSums {
  double student = 0;  // sum of exponentials at the temperature
  double teacher = 0;
  double plain = 0;               // of the student's at temperature 1
  double teacher_difference = 0;  // sum of teacher exponentials times the difference
  double student_difference = 0;
};

template <bool kTeacher, Kept kKept>
RowSums exponentials(const LossRows<float>& a, float* s, float* t, float s_max, float t_max) {
  const int64_t n = a.vocabulary();
  const auto inverse = static_cast<float>(1.0 / a.temperature);
  const bool plain = kTeacher && a.temperature != 1.0;
  RowSums sums;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t end = block + kBlock < n ? block + kBlock : n;
    vf student = {};
    vf teacher = {};
    vf at_one = {};
    vf teacher_difference = {};
    vf student_difference = {};
    for (int64_t i = block; i < end; i += kLanes) {
      const vf sx = load_or(s + i, n - i, kNothing) - s_max;
      const vf es = vexp(kTeacher ? sx * inverse : sx);
      student += es;
      if (plain) {
        at_one += vexp(sx);
      }
      if constexpr (kTeacher) {
        const vf tx = load_or(t + i, n - i, kNothing) - t_max;
        const vf et = vexp(tx * inverse);
        const vf difference = (sx - tx) * inverse;
        teacher += et;
        teacher_difference += et * difference;
        student_difference += es * difference;
        if constexpr (kKept != Kept::kLogits) {
          vstore_upto(t + i, kKept == Kept::kDifference ? difference : et, n - i);
        }
      }
      if constexpr (kKept != Kept::kLogits) {
        vstore_upto(s + i, es, n - i);
      }
    }
    sums.student += static_cast<double>(vsum(student));
    sums.teacher += static_cast<double>(vsum(teacher));
    sums.plain += static_cast<double>(vsum(at_one));
    sums.teacher_difference += static_cast<double>(vsum(teacher_difference));
    sums.student_difference += static_cast<double>(vsum(student_difference));
  }
  if (!plain) {
    sums.plain = sums.student;
  }
  return sums;
}

// dL/dlogit = ce (q1 - onehot) + forward (q - p) + reverse q (log q - log p - KL)
template <bool kTeacher, Kept kKept>
void gradient(const LossRows<float>& a, float* s, const float* t, float s_max, float t_max,
              const RowSums& sums, double reverse_offset) {
  const int64_t n = a.vocabulary();
  const auto inverse = static_cast<float>(1.0 / a.temperature);
  const auto plain = static_cast<float>(a.cross_entropy / sums.plain);
  const auto forward_q = static_cast<float>(a.forward_kl / sums.student);
  const auto forward_p = static_cast<float>(kTeacher ? a.forward_kl / sums.teacher : 0.0);
  const auto reverse = static_cast<float>(a.reverse_kl / sums.student);
  const auto offset = static_cast<float>(reverse_offset);
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf sv = vload_upto(s + i, n - i);
    const vf tv = kTeacher ? vload_upto(t + i, n - i) : vf{};
    vf g;
    if constexpr (!kTeacher) {
      g = plain * sv;
    } else if constexpr (kKept == Kept::kExponentials) {
      g = (plain + forward_q) * sv - forward_p * tv;
    } else if constexpr (kKept == Kept::kDifference) {
      g = sv * (plain + reverse * (tv + offset));
    } else {
      const vf sx = sv - s_max;
      const vf tx = tv - t_max;
      const vf es = vexp(sx * inverse);
      g = plain * vexp(sx) + forward_q * es - forward_p * vexp(tx * inverse) +
          reverse * es * ((sx - tx) * inverse + offset);
    }
    vstore_upto(s + i, g, n - i);
  }
}

template <bool kTeacher, Kept kKept>
void loss_row(const LossRows<float>& a, int64_t row) {
  float* s = a.student.row(row);
  float* t = kTeacher ? a.teacher.row(row) : nullptr;
  const int32_t label = a.label[row];
  const Largest largest = find_largest(s, a.vocabulary());
  const Largest teacher = kTeacher ? find_largest(t, a.vocabulary()) : Largest{0.0F, -1};
  const auto label_logit = static_cast<double>(s[label]);
  const RowSums sums = exponentials<kTeacher, kKept>(a, s, t, largest.value, teacher.value);
  LossRow& r = a.result[row];
  r.cross_entropy = __builtin_log(sums.plain) - (label_logit - static_cast<double>(largest.value));
  r.correct = largest.index == label;
  r.agreement = largest.index == teacher.index;
  r.forward_kl = 0.0;
  r.reverse_kl = 0.0;
  double reverse_offset = 0.0;
  if constexpr (kTeacher) {
    // log q - log p = difference - normaliser
    const double normaliser = __builtin_log(sums.student) - __builtin_log(sums.teacher);
    r.forward_kl = normaliser - sums.teacher_difference / sums.teacher;
    r.reverse_kl = sums.student_difference / sums.student - normaliser;
    reverse_offset = -normaliser - r.reverse_kl;
  }
  if (a.gradient) {
    gradient<kTeacher, kKept>(a, s, t, largest.value, teacher.value, sums, reverse_offset);
    s[label] -= static_cast<float>(a.cross_entropy);
  }
}

// The logits of the k tokens are taken out of the row (kNothing stands for them), so that what is
// left is the rest: its gradient is its exponentials times one number.
void stored_loss_row(const StoredLossRows<float>& a, int64_t row) {
  const int64_t n = a.vocabulary();
  float* s = a.student.row(row);
  const int32_t* token = a.token + row * a.k;
  const float* log_p = a.log_p + row * (a.k + 1);
  float* logit = a.logit + row * a.k;
  const int32_t label = a.label[row];
  const auto label_logit = static_cast<double>(s[label]);
  const Largest choice = find_largest(s, n);
  const auto largest = static_cast<double>(choice.value);
  double total = 0.0;  // of exponentials relative to the largest
  for (int64_t i = 0; i < a.k; ++i) {
    logit[i] = s[token[i]];
    s[token[i]] = kNothing;
    total += __builtin_exp(static_cast<double>(logit[i]) - largest);
  }
  const bool rest = a.k < n;
  double rest_sum = 1.0;    // of exponentials relative to its own largest
  double log_rest = -1e30;  // of its exponentials relative to the row's largest
  if (rest) {
    const float rest_largest = find_largest(s, n).value;
    rest_sum = 0.0;
    for (int64_t block = 0; block < n; block += kBlock) {
      const int64_t end = block + kBlock < n ? block + kBlock : n;
      vf sum = {};
      for (int64_t i = block; i < end; i += kLanes) {
        const vf e = vexp(load_or(s + i, n - i, kNothing) - rest_largest);
        sum += e;
        vstore_upto(s + i, e, n - i);
      }
      rest_sum += static_cast<double>(vsum(sum));
    }
    log_rest = static_cast<double>(rest_largest) - largest + __builtin_log(rest_sum);
    total += __builtin_exp(log_rest);
  }
  const double log_total = __builtin_log(total);
  double forward = 0.0;
  double reverse = 0.0;
  for (int64_t c = 0; c < (rest ? a.k + 1 : a.k); ++c) {
    const double log_q = (c < a.k ? static_cast<double>(logit[c]) - largest : log_rest) - log_total;
    const auto p = static_cast<double>(log_p[c]);
    forward += __builtin_exp(p) * (p - log_q);
    reverse += __builtin_exp(log_q) * (log_q - p);
  }
  a.result[row] = {.cross_entropy = log_total - (label_logit - largest),
                   .forward_kl = forward,
                   .reverse_kl = reverse,
                   .agreement = choice.index == token[0],
                   .correct = choice.index == label};
  if (!a.gradient) {
    return;
  }
  const auto by_logits = [&](double log_q, double p) {
    const double q = __builtin_exp(log_q);
    return a.cross_entropy * q + a.forward_kl * (q - __builtin_exp(p)) +
           a.reverse_kl * q * (log_q - p - reverse);
  };
  if (rest) {
    const auto factor = static_cast<float>(
        by_logits(log_rest - log_total, static_cast<double>(log_p[a.k])) / rest_sum);
    for (int64_t i = 0; i < n; i += kLanes) {
      vstore_upto(s + i, factor * vload_upto(s + i, n - i), n - i);
    }
  }
  for (int64_t i = 0; i < a.k; ++i) {
    s[token[i]] = static_cast<float>(by_logits(static_cast<double>(logit[i]) - largest - log_total,
                                               static_cast<double>(log_p[i])));
  }
  s[label] -= static_cast<float>(a.cross_entropy);
}

}  // namespace

void stored_loss_rows(const StoredLossRows<float>& a) {
  parallel_for(a.student.count(), 1 + 16384 / a.vocabulary(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      stored_loss_row(a, row);
    }
  });
}

void loss_rows(const LossRows<float>& a) {
  const int64_t grain = 1 + 16384 / a.vocabulary();
  parallel_for(a.student.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!a.teacher.defined()) {
        a.gradient ? loss_row<false, Kept::kExponentials>(a, row)
                   : loss_row<false, Kept::kLogits>(a, row);
      } else if (!a.gradient || (a.cross_entropy != 0.0 && a.temperature != 1.0) ||
                 (a.forward_kl != 0.0 && a.reverse_kl != 0.0)) {
        loss_row<true, Kept::kLogits>(a, row);
      } else if (a.reverse_kl != 0.0) {
        loss_row<true, Kept::kDifference>(a, row);
      } else {
        loss_row<true, Kept::kExponentials>(a, row);
      }
    }
  });
}

void align_rows(const AlignRows<float>& a) {
  parallel_for(a.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* out = a.out.row(a.row[i]);
      const float* target = a.target.row(a.row[i]);
      vf sum = {};
      for (int64_t c = 0; c < a.out.channels; c += kLanes) {
        const vf d =
            vload_upto(out + c, a.out.channels - c) - vload_upto(target + c, a.out.channels - c);
        sum += d * d;
      }
      const auto square = static_cast<double>(vsum(sum));
      const auto channels = static_cast<double>(a.out.channels);
      const double norm = __builtin_sqrt(square * channels);
      a.result[i] = a.squared ? square / channels : norm / channels;
      if (a.out.grad == nullptr) {
        continue;
      }
      const double factor = a.squared ? 2.0 / channels : (norm > 0.0 ? 1.0 / norm : 0.0);
      const auto scale = static_cast<float>(a.scale * factor);
      float* grad = a.out.grad_row(a.row[i]);
      for (int64_t c = 0; c < a.out.channels; c += kLanes) {
        const int64_t n = a.out.channels - c;
        const vf d = vload_upto(out + c, n) - vload_upto(target + c, n);
        vstore_upto(grad + c, vload_upto(grad + c, n) + scale * d, n);
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
