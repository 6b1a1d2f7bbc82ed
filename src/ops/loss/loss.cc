#include "ops/loss/loss.h"

#include <algorithm>

#include "ops/activation/activation.h"
#include "ops/checks.h"
#include "ops/loss/loss_kernels.h"
#include "ops/loss/loss_ref.h"
#include "ops/matmul/matmul.h"
#include "ops/run.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

void check_head(const char* whose, const Tensor& hidden, const Tensor& head, const Tensor& like) {
  expect(hidden.rank == 2 && hidden.row_contiguous() && hidden.dtype == like.dtype &&
             hidden.dim(0) == like.dim(0) && is_computed(hidden),
         "[head_loss] expected the {}'s hidden states ({}, C), f32 or f64, got {}", whose,
         like.dim(0), hidden);
  expect(head.rank == 2 && head.contiguous() && head.dim(1) == hidden.dim(1) &&
             (head.dtype == sum_dtype(hidden.dtype) ||
              (head.dtype == Dtype::kBF16 && hidden.dtype != Dtype::kF64)),
         "[head_loss] expected the {}'s head (V, {}) of {}, got {}", whose, hidden.dim(1),
         hidden.dtype == Dtype::kF64 ? "f64" : "f32 or bf16", head);
}

void check_stored(const LossInputs& in, const LossConfig& config) {
  const int64_t rows = in.hidden.dim(0);
  const int64_t vocabulary = in.head.dim(0);
  const StoredTeacher& stored = in.stored;
  expect(!in.teacher_hidden.defined(), "[head_loss] expected a teacher or a stored one, not both");
  expect(config.temperature == 1.0F,
         "[head_loss] a stored teacher is known at temperature 1 alone, got temperature {}",
         config.temperature);
  expect(stored.k <= vocabulary && static_cast<int64_t>(stored.tokens.size()) == rows * stored.k &&
             static_cast<int64_t>(stored.log_p.size()) == rows * (stored.k + 1),
         "[head_loss] expected {} rows of k <= {} stored tokens and k + 1 log-probabilities, got "
         "k={} with {} and {}",
         rows, vocabulary, stored.k, stored.tokens.size(), stored.log_p.size());
  for (const int32_t token : stored.tokens) {
    expect(token >= 0 && token < vocabulary,
           "[head_loss] expected stored tokens below the vocabulary {}, got {}", vocabulary, token);
  }
}

void check(const LossInputs& in, const LossConfig& config) {
  check_head("student", in.hidden, in.head, in.hidden);
  expect(in.head.dtype != Dtype::kBF16 || !in.head.has_grad(),
         "[head_loss] a bf16 head has no gradient; train the f32 head, got {}", in.head);
  expect(static_cast<int64_t>(in.labels.size()) == in.hidden.dim(0),
         "[head_loss] expected a label for each of {} rows, got {}", in.hidden.dim(0),
         in.labels.size());
  for (const int32_t label : in.labels) {
    expect(label < in.head.dim(0), "[head_loss] expected labels below the vocabulary {}, got {}",
           in.head.dim(0), label);
  }
  expect(config.temperature > 0.0F, "[head_loss] expected a temperature above 0, got {}",
         config.temperature);
  if (in.stored.k > 0) {
    check_stored(in, config);
    return;
  }
  if (!in.teacher_hidden.defined()) {
    expect(config.forward_kl == 0.0F && config.reverse_kl == 0.0F,
           "[head_loss] the KL terms need a teacher; give its hidden states and head");
    return;
  }
  check_head("teacher", in.teacher_hidden, in.teacher_head, in.hidden);
  expect(in.teacher_head.dim(0) == in.head.dim(0),
         "[head_loss] expected a teacher with the student's vocabulary of {}, got {}",
         in.head.dim(0), in.teacher_head.dim(0));
}

// Rows of t, one after another.
Tensor gather(Arena& arena, const Tensor& t, std::span<const int64_t> rows) {
  const Tensor out = arena.empty(t.dtype, {static_cast<int64_t>(rows.size()), t.dim(1)});
  gather_rows(out, t, rows);
  return out;
}

// The kernel of a stored teacher: what is stored of the rows goes where the device reads it.
void run_stored(Context& ctx, const LossInputs& in, const LossConfig& config,
                std::span<const int64_t> rows, const Tensor& logits, const int32_t* labels,
                LossRow* result) {
  const int64_t k = in.stored.k;
  const auto count = static_cast<int64_t>(rows.size());
  auto* tokens = ctx.shared_scratch<int32_t>(count * k);
  auto* log_p = ctx.shared_scratch<float>(count * (k + 1));
  auto* taken = ctx.shared_scratch<float>(count * k);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[static_cast<size_t>(i)];
    std::copy_n(in.stored.tokens.data() + row * k, k, tokens + i * k);
    std::copy_n(in.stored.log_p.data() + row * (k + 1), k + 1, log_p + i * (k + 1));
  }
  const auto args = [&]<class T>() {
    return StoredLossRows<T>{.student = view<T>(logits),
                             .token = tokens,
                             .log_p = log_p,
                             .logit = taken,
                             .k = k,
                             .label = labels,
                             .gradient = in.hidden.has_grad() || in.head.has_grad(),
                             .cross_entropy = in.scale * static_cast<double>(config.cross_entropy),
                             .forward_kl = in.scale * static_cast<double>(config.forward_kl),
                             .reverse_kl = in.scale * static_cast<double>(config.reverse_kl),
                             .result = result};
  };
  run<stored_loss_rows>(ctx, logits, args);
}

// The losses of rows that all have labels; adds their gradients. `head`: the values of in.head, in
// the type that products take.
void chunk_loss(Context& ctx, const LossInputs& in, const Tensor& head, const LossConfig& config,
                std::span<const int64_t> rows, LossRow* result) {
  const ArenaScope scope(*ctx.arena);
  const auto count = static_cast<int64_t>(rows.size());
  const Tensor hidden = gather(*ctx.arena, in.hidden, rows);
  const Tensor logits = ctx.arena->empty(hidden.dtype, {count, in.head.dim(0)});
  matmul_into(ctx, logits, hidden, head);
  const bool gradient = in.hidden.has_grad() || in.head.has_grad();
  Tensor capped;  // the logits themselves become their gradient
  if (in.logit_cap > 0.0F) {
    soft_cap(ctx, logits, in.logit_cap);
    if (gradient) {
      capped = ctx.arena->empty(logits.dtype, {count, in.head.dim(0)});
      copy(capped, logits);
    }
  }
  Tensor teacher;
  if (in.teacher_hidden.defined()) {
    teacher = ctx.arena->empty(hidden.dtype, {count, in.head.dim(0)});
    matmul_into(ctx, teacher, gather(*ctx.arena, in.teacher_hidden, rows), in.teacher_head);
    if (in.teacher_logit_cap > 0.0F) {
      soft_cap(ctx, teacher, in.teacher_logit_cap);
    }
  }
  auto* labels = ctx.shared_scratch<int32_t>(count);
  for (size_t i = 0; i < rows.size(); ++i) {
    labels[i] = in.labels[static_cast<size_t>(rows[i])];
  }
  const auto args = [&]<class T>() {
    const double kl = in.scale * static_cast<double>(config.temperature);
    return LossRows<T>{.student = view<T>(logits),
                       .teacher = view<T>(teacher),
                       .label = labels,
                       .gradient = gradient,
                       .cross_entropy = in.scale * static_cast<double>(config.cross_entropy),
                       .forward_kl = kl * static_cast<double>(config.forward_kl),
                       .reverse_kl = kl * static_cast<double>(config.reverse_kl),
                       .temperature = static_cast<double>(config.temperature),
                       .result = result};
  };
  if (in.stored.k > 0) {
    run_stored(ctx, in, config, rows, logits, labels, result);
  } else {
    run<loss_rows>(ctx, hidden, args);
  }
  if (capped.defined()) {
    soft_cap_grad(ctx, logits, capped, in.logit_cap);
  }
  if (in.head.has_grad()) {
    const bool set = in.head.takes_grad();
    matmul_grad_weight(ctx, in.head.grad_tensor(), logits, hidden, !set);
  }
  if (in.hidden.has_grad()) {
    const Tensor dhidden = ctx.arena->empty(hidden.dtype, {count, hidden.dim(1)});
    matmul_grad_input(ctx, dhidden, logits, head, false);
    add_rows(in.hidden.grad_tensor(), dhidden, rows);
  }
}

// The rows with labels.
std::span<const int64_t> valid_rows(const Context& ctx, int64_t rows,
                                    std::span<const int32_t> labels) {
  auto* valid = ctx.shared_scratch<int64_t>(rows);
  size_t count = 0;
  for (int64_t t = 0; t < rows; ++t) {
    if (labels.empty() || labels[static_cast<size_t>(t)] >= 0) {
      valid[count++] = t;
    }
  }
  return {valid, count};
}

}  // namespace

LossSums& LossSums::operator+=(const LossSums& other) {
  cross_entropy += other.cross_entropy;
  forward_kl += other.forward_kl;
  reverse_kl += other.reverse_kl;
  total += other.total;
  tokens += other.tokens;
  agreement += other.agreement;
  correct += other.correct;
  return *this;
}

int64_t head_loss_rows(int64_t vocabulary, Device device) {
  if (device.kind == Device::kCpu) {
    return std::clamp<int64_t>((int64_t{1} << 20) / vocabulary, 64, 1024);
  }
  constexpr int64_t kTile = 256;
  const int64_t rows = std::clamp<int64_t>((int64_t{1} << 28) / vocabulary, 64, 8192);
  return rows < kTile ? rows : rows / kTile * kTile;
}

LossSums head_loss(Context& ctx, const LossInputs& inputs, const LossConfig& config) {
  check(inputs, config);
  const ArenaScope scope(*ctx.arena);
  const ArenaScope host_scope(ctx.host_arena());
  const std::span<const int64_t> rows = valid_rows(ctx, inputs.hidden.dim(0), inputs.labels);
  const auto chunk = static_cast<size_t>(config.chunk_tokens > 0
                                             ? config.chunk_tokens
                                             : head_loss_rows(inputs.head.dim(0), ctx.device()));
  Tensor head = inputs.head;
  if (inputs.hidden.dtype == Dtype::kBF16 && head.dtype != Dtype::kBF16) {
    head = inputs.head.rounded_tensor();
    if (!head.defined()) {
      // Rounded once, not for every product of every chunk.
      head = ctx.arena->empty(Dtype::kBF16, {inputs.head.dim(0), inputs.head.dim(1)});
      copy(head, inputs.head);
    }
  }
  // What the host writes for a chunk stays until all are done: they are queued without a wait.
  auto* result = ctx.shared_scratch<LossRow>(static_cast<int64_t>(rows.size()));
  for (size_t begin = 0; begin < rows.size(); begin += chunk) {
    const ArenaScope chunk_scope(*ctx.arena);
    chunk_loss(ctx, inputs, head, config, rows.subspan(begin, std::min(chunk, rows.size() - begin)),
               result + begin);
  }
  ctx.synchronize();
  LossSums sums;
  for (const LossRow& row : std::span(result, rows.size())) {
    sums.cross_entropy += row.cross_entropy;
    sums.forward_kl += row.forward_kl;
    sums.reverse_kl += row.reverse_kl;
    sums.agreement += row.agreement ? 1 : 0;
    sums.correct += row.correct ? 1 : 0;
  }
  const auto square = static_cast<double>(config.temperature * config.temperature);
  sums.tokens = static_cast<int64_t>(rows.size());
  sums.total = static_cast<double>(config.cross_entropy) * sums.cross_entropy +
               square * (static_cast<double>(config.forward_kl) * sums.forward_kl +
                         static_cast<double>(config.reverse_kl) * sums.reverse_kl);
  return sums;
}

double align_loss(Context& ctx, const Tensor& out, const Tensor& target,
                  std::span<const int32_t> labels, bool squared, double scale) {
  expect(out.rank == 2 && out.row_contiguous() && is_computed(out),
         "[align_loss] expected out (T, C), f32 or f64, got {}", out);
  expect(target.same_shape(out) && target.dtype == out.dtype && target.row_contiguous(),
         "[align_loss] expected a target shaped like out {}, got {}", out, target);
  expect(labels.empty() || static_cast<int64_t>(labels.size()) == out.dim(0),
         "[align_loss] expected a label for each of {} rows, or none, got {}", out.dim(0),
         labels.size());
  const ArenaScope scope(ctx.host_arena());
  const std::span<const int64_t> rows = valid_rows(ctx, out.dim(0), labels);
  auto* result = ctx.shared_scratch<double>(static_cast<int64_t>(rows.size()));
  out.settle_grad();
  const auto args = [&]<class T>() {
    return AlignRows<T>{static_cast<int64_t>(rows.size()),
                        rows.data(),
                        view<T>(out),
                        view<T>(target),
                        squared,
                        scale,
                        result};
  };
  run<align_rows>(ctx, out, args);
  ctx.synchronize();
  double sum = 0.0;
  for (size_t i = 0; i < rows.size(); ++i) {
    sum += result[i];
  }
  return sum;
}

}  // namespace cambium
