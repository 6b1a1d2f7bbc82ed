// The naive definition, in the precision of its element type.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/loss/loss_kernels.h"

namespace cambium {

/// log softmax(logits / temperature)
template <class Real>
std::vector<Real> log_softmax(const Real* logits, int64_t n, Real temperature) {
  const Real largest = *std::max_element(logits, logits + n);
  Real sum = 0;
  for (int64_t v = 0; v < n; ++v) {
    sum += std::exp((logits[v] - largest) / temperature);
  }
  std::vector<Real> out(static_cast<size_t>(n));
  for (int64_t v = 0; v < n; ++v) {
    out[static_cast<size_t>(v)] = (logits[v] - largest) / temperature - std::log(sum);
  }
  return out;
}

template <class Real>
void loss_row(const LossRows<Real>& a, int64_t row) {
  const int64_t n = a.vocabulary();
  Real* student = a.student.row(row);
  const int32_t label = a.label[row];
  const auto temperature = static_cast<Real>(a.temperature);
  const int64_t choice = std::max_element(student, student + n) - student;
  LossRow& result = a.result[row];
  result = {.cross_entropy = 0,
            .forward_kl = 0,
            .reverse_kl = 0,
            .agreement = false,
            .correct = choice == label};
  const std::vector<Real> plain = log_softmax<Real>(student, n, 1);
  result.cross_entropy = -static_cast<double>(plain[static_cast<size_t>(label)]);
  std::vector<Real> gradient(static_cast<size_t>(n));
  for (int64_t v = 0; v < n; ++v) {
    const auto i = static_cast<size_t>(v);
    gradient[i] = static_cast<Real>(a.cross_entropy) * (std::exp(plain[i]) - (v == label ? 1 : 0));
  }
  if (a.teacher.defined()) {
    const Real* teacher = a.teacher.row(row);
    result.agreement = std::max_element(teacher, teacher + n) - teacher == choice;
    const std::vector<Real> q = log_softmax(student, n, temperature);
    const std::vector<Real> p = log_softmax(teacher, n, temperature);
    Real forward = 0;
    Real reverse = 0;
    for (size_t i = 0; i < q.size(); ++i) {
      forward += std::exp(p[i]) * (p[i] - q[i]);
      reverse += std::exp(q[i]) * (q[i] - p[i]);
    }
    result.forward_kl = forward;
    result.reverse_kl = reverse;
    for (size_t i = 0; i < q.size(); ++i) {
      gradient[i] += static_cast<Real>(a.forward_kl) * (std::exp(q[i]) - std::exp(p[i])) +
                     static_cast<Real>(a.reverse_kl) * std::exp(q[i]) * (q[i] - p[i] - reverse);
    }
  }
  if (a.gradient) {
    std::copy(gradient.begin(), gradient.end(), student);
  }
}

template <class Real>
void loss_rows::reference(const LossRows<Real>& a) {
  for (int64_t row = 0; row < a.student.count(); ++row) {
    loss_row(a, row);
  }
}

/// Outcomes c are the k tokens and the rest as one, of probability q_c (the sum of its tokens'):
/// forward = sum_c p_c (log p_c - log q_c), by the logit of v in c: q_v (1 - p_c / q_c);
/// reverse = sum_c q_c (log q_c - log p_c), by it: q_v (log q_c - log p_c - reverse).
template <class Real>
void stored_loss_row(const StoredLossRows<Real>& a, int64_t row) {
  const int64_t n = a.vocabulary();
  Real* student = a.student.row(row);
  const int32_t* token = a.token + row * a.k;
  const float* log_p = a.log_p + row * (a.k + 1);
  const int32_t label = a.label[row];
  const int64_t choice = std::max_element(student, student + n) - student;
  const std::vector<Real> log_q = log_softmax<Real>(student, n, 1);
  std::vector<int64_t> outcome(static_cast<size_t>(n), a.k);
  for (int64_t i = 0; i < a.k; ++i) {
    outcome[static_cast<size_t>(token[i])] = i;
  }
  // Of the rest, relative to its likeliest token: it may be too small for its own exponential.
  Real largest = -std::numeric_limits<Real>::infinity();
  for (size_t v = 0; v < log_q.size(); ++v) {
    largest = outcome[v] == a.k ? std::max(largest, log_q[v]) : largest;
  }
  Real rest = 0;
  for (size_t v = 0; v < log_q.size(); ++v) {
    rest += outcome[v] == a.k ? std::exp(log_q[v] - largest) : Real{0};
  }
  const auto log_q_of = [&](int64_t c) {
    return c < a.k ? log_q[static_cast<size_t>(token[c])] : largest + std::log(rest);
  };
  Real forward = 0;
  Real reverse = 0;
  for (int64_t c = 0; c < (a.k < n ? a.k + 1 : a.k); ++c) {
    const auto p = static_cast<Real>(log_p[c]);
    forward += std::exp(p) * (p - log_q_of(c));
    reverse += std::exp(log_q_of(c)) * (log_q_of(c) - p);
  }
  a.result[row] = {.cross_entropy = -static_cast<double>(log_q[static_cast<size_t>(label)]),
                   .forward_kl = static_cast<double>(forward),
                   .reverse_kl = static_cast<double>(reverse),
                   .agreement = token[0] == choice,
                   .correct = choice == label};
  for (int64_t v = 0; a.gradient && v < n; ++v) {
    const auto i = static_cast<size_t>(v);
    const int64_t c = outcome[i];
    const auto p = static_cast<Real>(log_p[c]);
    const Real share = std::exp(log_q[i] - log_q_of(c));  // of its outcome
    student[v] = static_cast<Real>(a.cross_entropy) * (std::exp(log_q[i]) - (v == label ? 1 : 0)) +
                 static_cast<Real>(a.forward_kl) * share * (std::exp(log_q_of(c)) - std::exp(p)) +
                 static_cast<Real>(a.reverse_kl) * std::exp(log_q[i]) * (log_q_of(c) - p - reverse);
  }
}

template <class Real>
void stored_loss_rows::reference(const StoredLossRows<Real>& a) {
  for (int64_t row = 0; row < a.student.count(); ++row) {
    stored_loss_row(a, row);
  }
}

/// |d| / sqrt(C) with gradient d / (|d| sqrt(C)) (0 at d = 0), or mean(d^2) with 2 d / C.
template <class Real>
void align_rows::reference(const AlignRows<Real>& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const Real* out = a.out.row(a.row[i]);
    const Real* target = a.target.row(a.row[i]);
    double square = 0;
    for (int64_t c = 0; c < a.out.channels; ++c) {
      const double d = static_cast<double>(out[c]) - static_cast<double>(target[c]);
      square += d * d;
    }
    const auto channels = static_cast<double>(a.out.channels);
    const double norm = std::sqrt(square * channels);
    a.result[i] = a.squared ? square / channels : norm / channels;
    const double factor = a.squared ? 2 / channels : (norm > 0 ? 1 / norm : 0);
    for (int64_t c = 0; a.out.grad != nullptr && c < a.out.channels; ++c) {
      a.out.grad_row(a.row[i])[c] += static_cast<Real>(a.scale * factor) * (out[c] - target[c]);
    }
  }
}

}  // namespace cambium
