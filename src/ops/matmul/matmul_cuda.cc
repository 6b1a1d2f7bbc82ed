// Products by cuBLASLt, which is loaded when first needed. It thinks in columns: a row-major matrix
// (R, C) is its column-major (C, R), so y (T, N) = x (T, K) weight (N, K)^T is y' = weight x'.
#include "ops/matmul/matmul_cuda.cuh"
#include "ops/matmul/side_by_side_cuda.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "ops/cuda_launch.h"
#include "ops/matmul/matmul_choices.h"
#include "tensor/work_recorder.h"

namespace cambium::cuda {
namespace {

struct Library {
#define CAMBIUM_CUBLASLT(X)               \
  X(cublasLtCreate)                       \
  X(cublasLtMatmul)                       \
  X(cublasLtMatmulDescCreate)             \
  X(cublasLtMatmulDescSetAttribute)       \
  X(cublasLtMatmulDescDestroy)            \
  X(cublasLtMatrixLayoutCreate)           \
  X(cublasLtMatrixLayoutDestroy)          \
  X(cublasLtMatrixLayoutSetAttribute)     \
  X(cublasLtMatmulPreferenceCreate)       \
  X(cublasLtMatmulPreferenceSetAttribute) \
  X(cublasLtMatmulPreferenceDestroy)      \
  X(cublasLtMatmulAlgoGetHeuristic)       \
  X(cublasLtMatmulAlgoCheck)              \
  X(cublasLtGetVersion)
#define CAMBIUM_MEMBER(name) decltype(&::name) name = nullptr;
  CAMBIUM_CUBLASLT(CAMBIUM_MEMBER)
#undef CAMBIUM_MEMBER
  cublasLtHandle_t handle = nullptr;
};

void check(const char* what, cublasStatus_t status) {
  expect(status == CUBLAS_STATUS_SUCCESS, "[matmul] cuBLASLt: {} failed with status {}", what,
         static_cast<int>(status));
}

const Library& library() {
  static const Library loaded = [] {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* file = nullptr;
    for (const std::string& path : {name, "/usr/local/cuda/lib64/" + name,
                                    "/usr/local/cuda/targets/x86_64-linux/lib/" + name}) {
      file = file == nullptr ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : file;
    }
    expect(file != nullptr,
           "[matmul] {} was not found ({}); install CUDA's libraries or name their folder in "
           "LD_LIBRARY_PATH, or take --device cpu",
           name, dlerror());
    Library l;
#define CAMBIUM_LOAD(function)                                                               \
  l.function = reinterpret_cast<decltype(l.function)>(dlsym(file, #function));               \
  expect(l.function != nullptr, "[matmul] {} has no {}; install cuBLAS {}", name, #function, \
         CUBLAS_VER_MAJOR);
    CAMBIUM_CUBLASLT(CAMBIUM_LOAD)
#undef CAMBIUM_LOAD
    check("its start", l.cublasLtCreate(&l.handle));
    return l;
  }();
  return loaded;
}
#undef CAMBIUM_CUBLASLT

constexpr int64_t kWorkspace = 32 << 20;
/// c (m, n) = [c +] op(a) op(b), column-major; or `count` of them whose operands lie so many
/// elements apart.
struct Product {
  int64_t m, n, k;
  bool a_transposed, b_transposed;
  int64_t a_stride, b_stride, c_stride;
  bool bf16_inputs, bf16_output;
  int alignment_a, alignment_b, alignment_c;  // of the addresses, in bytes up to 16
  int64_t count = 1, a_step = 0, b_step = 0, c_step = 0;
  auto operator<=>(const Product&) const = default;  // NOLINT(modernize-use-nullptr)
};

int alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  int bytes = 16;
  while (address % static_cast<uintptr_t>(bytes) != 0) {
    bytes /= 2;
  }
  return bytes;
}

std::string key_of(const Product& p) {
  const std::string one = fmt::format(
      "{} {} {} {}{} {} {} {} {}{} {} {} {}", p.m, p.n, p.k, p.a_transposed ? 't' : 'n',
      p.b_transposed ? 't' : 'n', p.a_stride, p.b_stride, p.c_stride, p.bf16_inputs ? 'h' : 'f',
      p.bf16_output ? 'h' : 'f', p.alignment_a, p.alignment_b, p.alignment_c);
  return p.count == 1 ? one
                      : fmt::format("{} x {} {} {} {}", one, p.count, p.a_step, p.b_step, p.c_step);
}

/// Whether it is worth measuring: products that take long enough to be told apart, of row counts
/// that come again. (Decode's are few; a prompt's last piece has any.)
bool worth_measuring(const Product& p) {
  static const bool wanted = [] {
    const char* value = std::getenv("CAMBIUM_MEASURE_PRODUCTS");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  constexpr double kLeast = 2e9;  // operations
  const double operations = 2.0 * static_cast<double>(p.count) * static_cast<double>(p.m) *
                            static_cast<double>(p.n) * static_cast<double>(p.k);
  return wanted && operations >= kLeast && (p.n <= 512 || p.n % 256 == 0);
}

/// What was measured on this machine's devices with this library.
ProductChoices& measured_choices() {
  static auto& choices = *[] {
    cudaDeviceProp properties{};
    int device = 0;
    std::string name = "products";
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
      name += fmt::format("-{}-{}", properties.name, properties.multiProcessorCount);
    }
    for (char& c : name) {
      c = c == ' ' || c == '/' ? '_' : c;
    }
    return new ProductChoices(ProductChoices::cache_file(
        fmt::format("{}-cublas{}.txt", name, library().cublasLtGetVersion())));
  }();
  return choices;
}

/// How a product is computed: made once for its sizes.
class Planned {
 public:
  explicit Planned(const Product& p) : sizes_(p) {
    const Library& l = library();
    const cudaDataType input = p.bf16_inputs ? CUDA_R_16BF : CUDA_R_32F;
    check("a description", l.cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const auto set = [&](cublasLtMatmulDescAttributes_t what, bool transposed) {
      const cublasOperation_t value = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
      check("an attribute",
            l.cublasLtMatmulDescSetAttribute(operation_, what, &value, sizeof(value)));
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.a_transposed);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.b_transposed);
    const auto layout = [&](cublasLtMatrixLayout_t& to, cudaDataType type, int64_t rows,
                            int64_t columns, int64_t stride, int64_t step) {
      check("a layout", l.cublasLtMatrixLayoutCreate(&to, type, static_cast<uint64_t>(rows),
                                                     static_cast<uint64_t>(columns), stride));
      if (p.count > 1) {
        const auto count = static_cast<int32_t>(p.count);
        check("a layout", l.cublasLtMatrixLayoutSetAttribute(to, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                             &count, sizeof(count)));
        check("a layout",
              l.cublasLtMatrixLayoutSetAttribute(to, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                 &step, sizeof(step)));
      }
    };
    layout(a_, input, p.a_transposed ? p.k : p.m, p.a_transposed ? p.m : p.k, p.a_stride, p.a_step);
    layout(b_, input, p.b_transposed ? p.n : p.k, p.b_transposed ? p.k : p.n, p.b_stride, p.b_step);
    layout(c_, p.bf16_output ? CUDA_R_16BF : CUDA_R_32F, p.m, p.n, p.c_stride, p.c_step);
    choose(p);
  }
  Planned(const Planned&) = delete;
  Planned& operator=(const Planned&) = delete;
  ~Planned() {
    const Library& l = library();
    l.cublasLtMatrixLayoutDestroy(a_);
    l.cublasLtMatrixLayoutDestroy(b_);
    l.cublasLtMatrixLayoutDestroy(c_);
    l.cublasLtMatmulDescDestroy(operation_);
  }

  /// Whether the library knows how.
  bool found() const { return found_; }

  void run(const void* a, const void* b, void* c, bool accumulate, const Launch& on) const {
    void* workspace = on.scratch(kWorkspace);
    if (on.recorder != nullptr && on.recorder->notes()) {
      on.recorder->add_value(Call{sizes_, this, a, b, c, workspace, accumulate});
      if (on.recorder->compares()) {
        return;
      }
    } else if (!accumulate && candidates_.size() > 1) {
      std::call_once(measured_, [&] { measure(a, b, c, workspace, on); });
    }
    check("a product", multiply(algorithm_, a, b, c, accumulate, workspace, on));
  }

 private:
  /// What tells one call from another.
  struct Call {
    Product sizes;
    const Planned* plan;
    const void *a, *b, *c, *workspace;
    bool accumulate;
  };

  void choose(const Product& p) {
    const Library& l = library();
    cublasLtMatmulPreference_t preference = nullptr;
    check("a preference", l.cublasLtMatmulPreferenceCreate(&preference));
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, auto value) {
      check("a preference",
            l.cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof(value)));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<size_t>(kWorkspace));
    // Sums in a fixed order: nothing is reduced in place by whoever comes first.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(p.alignment_a));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(p.alignment_b));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(p.alignment_c));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(p.alignment_c));
    constexpr int kCandidates = 6;
    const bool measured = worth_measuring(p);
    cublasLtMatmulHeuristicResult_t results[kCandidates] = {};
    int count = 0;
    const cublasStatus_t status =
        l.cublasLtMatmulAlgoGetHeuristic(l.handle, operation_, a_, b_, c_, c_, preference,
                                         measured ? kCandidates : 1, results, &count);
    l.cublasLtMatmulPreferenceDestroy(preference);
    found_ = status == CUBLAS_STATUS_SUCCESS && count > 0;
    algorithm_ = results[0].algo;
    if (!found_ || !measured) {
      return;
    }
    key_ = key_of(p);
    if (const auto known = measured_choices().find(key_)) {
      cublasLtMatmulAlgo_t algorithm{};
      static_assert(sizeof(algorithm) == sizeof(*known));
      std::memcpy(&algorithm, known->data(), sizeof(algorithm));
      cublasLtMatmulHeuristicResult_t checked{};
      if (l.cublasLtMatmulAlgoCheck(l.handle, operation_, a_, b_, c_, c_, &algorithm, &checked) ==
              CUBLAS_STATUS_SUCCESS &&
          checked.workspaceSize <= static_cast<size_t>(kWorkspace)) {
        algorithm_ = algorithm;
        return;
      }
    }
    for (int i = 0; i < count; ++i) {
      candidates_.push_back(results[i].algo);
    }
  }

  cublasStatus_t multiply(const cublasLtMatmulAlgo_t& algorithm, const void* a, const void* b,
                          void* c, bool accumulate, void* workspace, const Launch& on) const {
    const float one = 1.0F;
    const float beta = accumulate ? 1.0F : 0.0F;
    return library().cublasLtMatmul(library().handle, operation_, &one, a, a_, b, b_, &beta, c, c_,
                                    c, c_, &algorithm, workspace, kWorkspace, on.stream);
  }

  // Takes the fastest of the candidates, if it is faster than the library's first by more than a
  // measurement errs. c is about to be written: it may hold their results.
  void measure(const void* a, const void* b, void* c, void* workspace, const Launch& on) const {
    constexpr int kRuns = 3;
    constexpr float kFaster = 0.98F;
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    float best = 0.0F;
    if (cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess) {
      for (const cublasLtMatmulAlgo_t& candidate : candidates_) {
        bool runs = multiply(candidate, a, b, c, false, workspace, on) == CUBLAS_STATUS_SUCCESS;
        runs = runs && cudaEventRecord(begin, on.stream) == cudaSuccess;
        for (int i = 0; i < kRuns; ++i) {
          runs =
              runs && multiply(candidate, a, b, c, false, workspace, on) == CUBLAS_STATUS_SUCCESS;
        }
        float taken = 0.0F;
        runs = runs && cudaEventRecord(end, on.stream) == cudaSuccess &&
               cudaEventSynchronize(end) == cudaSuccess &&
               cudaEventElapsedTime(&taken, begin, end) == cudaSuccess;
        if (runs && (best == 0.0F || taken < kFaster * best)) {
          best = taken;
          algorithm_ = candidate;
        }
      }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    ProductChoices::Choice choice{};
    std::memcpy(choice.data(), &algorithm_, sizeof(choice));
    if (best > 0.0F) {
      measured_choices().add(key_, choice);
    }
  }

  Product sizes_;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr;
  cublasLtMatrixLayout_t b_ = nullptr;
  cublasLtMatrixLayout_t c_ = nullptr;
  mutable cublasLtMatmulAlgo_t algorithm_{};
  // Where the fastest is yet to be found: the library's proposals, its first first.
  std::vector<cublasLtMatmulAlgo_t> candidates_;
  mutable std::once_flag measured_;
  std::string key_;
  bool found_ = false;
};

/// Products remembered at most: prompts of any length come by in serving.
constexpr size_t kMostPlans = 4096;

std::shared_ptr<const Planned> planned(const Product& p) {
  static std::mutex mutex;
  // Never destroyed: the driver may be gone before the program ends.
  static auto& plans = *new std::map<Product, std::shared_ptr<const Planned>>;
  const std::lock_guard lock(mutex);
  if (plans.size() >= kMostPlans) {
    plans.clear();
  }
  std::shared_ptr<const Planned>& plan = plans[p];
  if (plan == nullptr) {
    plan = std::make_shared<const Planned>(p);
  }
  return plan;
}

/// c (m, n) row-major, rows c_row apart: c = [c +] a b. a is (m, k) with rows `a_row` apart, or its
/// transpose (k, m); b is (k, n), or its transpose (n, k).
template <class In, class Out>
void multiply(int64_t m, int64_t n, int64_t k, const In* a, int64_t a_row, bool a_transposed,
              const In* b, int64_t b_row, bool b_transposed, Out* c, int64_t c_row, bool accumulate,
              const Launch& on) {
  if (m == 0 || n == 0) {
    return;
  }
  if (k > 0) {
    // Column-major: c' (n, m) = b' a'.
    const std::shared_ptr<const Planned> plan =
        planned({n, m, k, b_transposed, a_transposed, b_row, a_row, c_row, sizeof(In) == 2,
                 sizeof(Out) == 2, alignment_of(b), alignment_of(a), alignment_of(c)});
    if (plan->found()) {
      return plan->run(b, a, c, accumulate, on);
    }
  }
  plain_product<In, Out>({m, n, k, a, a_transposed ? 1 : a_row, a_transposed ? a_row : 1, b,
                          b_transposed ? 1 : b_row, b_transposed ? b_row : 1, c, c_row, accumulate},
                         on);
}

/// Products as one, as far as weights and results lie one after the other.
template <class T, class Y>
struct Joined {
  MatmulTo<T, Y> whole;  // without biases
  int64_t count;         // products in it
};
/// Of the products from `begin` on.
template <class T, class Y>
Joined<T, Y> joined(const MatmulsTo<T, Y>& all, int64_t begin) {
  MatmulTo<T, Y> whole = all.each[begin];
  int64_t end = begin + 1;
  for (; end < all.count; ++end) {
    const MatmulTo<T, Y>& p = all.each[end];
    const auto after = [&](const auto& a, const auto& b) {
      return a.defined() && b.defined() && a.data + a.count() * a.channels == b.data;
    };
    if ((!after(whole.weight.narrow, p.weight.narrow) &&
         !after(whole.weight.wide, p.weight.wide)) ||
        p.y.data != whole.y.data + whole.y.channels ||
        (p.y.count() > 1 && (p.y.rows.outer_stride != whole.y.rows.outer_stride ||
                             p.y.rows.outer_stride < whole.y.channels + p.y.channels)) ||
        p.accumulate != whole.accumulate) {
      break;
    }
    whole.weight.narrow.rows.outer += p.weight.narrow.rows.outer;
    whole.weight.wide.rows.outer += p.weight.wide.rows.outer;
    whole.y.channels += p.y.channels;
  }
  // A single row may lie in tensors of its own.
  whole.y.rows.outer_stride = std::max(whole.y.rows.outer_stride, whole.y.channels);
  return {whole, end - begin};
}

template <class T, class Y>
void forward(const MatmulsTo<T, Y>& all, const Launch& on) {
  if (on.batch_invariant && all.each[0].weight.inputs() > 0) {
    return batch_invariant_products(all, on);
  }
  if (few_rows(all, on)) {
    return;
  }
  for (int64_t begin = 0; begin < all.count;) {
    const auto [p, count] = joined(all, begin);
    const int64_t k = p.weight.inputs();
    multiply(p.y.count(), p.y.channels, k, p.x.data, p.x.rows.outer_stride, false,
             weight_as(p.weight, on), k, true, p.y.data, p.y.rows.outer_stride, p.accumulate, on);
    for (const int64_t end = begin + count; begin < end; ++begin) {
      if (all.each[begin].bias.defined()) {
        add_bias(all.each[begin].y, all.each[begin].bias.data, on);
      }
    }
  }
}

template <class T>
void grad_input(const MatmulGradInput<T>& p, const Launch& on) {
  const int64_t k = p.weight.inputs();
  multiply(p.out.count(), k, p.dy.channels, p.dy.data, p.dy.rows.outer_stride, false,
           weight_as(p.weight, on), k, false, p.out.data, p.out.rows.outer_stride, p.accumulate,
           on);
}

template <class T>
void grad_weight(const MatmulGradWeight<T>& p, const Launch& on) {
  multiply(p.dy.channels, p.x.channels, p.dy.count(), p.dy.data, p.dy.rows.outer_stride, true,
           p.x.data, p.x.rows.outer_stride, false, p.out.data, p.out.rows.outer_stride,
           p.accumulate, on);
}

/// In bytes up to 16: of all addresses that begin at p and are `step` elements apart.
template <class T>
int alignment_of_all(const T* p, int64_t step) {
  return std::min(
      alignment_of(p),
      alignment_of(reinterpret_cast<const void*>(step * static_cast<int64_t>(sizeof(T)))));
}

}  // namespace

template <class T>
bool side_by_side(const SideBySide<T>& p, const Launch& on) {
  if (p.m == 0 || p.n == 0 || p.k == 0) {
    return false;
  }
  // Column-major: c' (n, m) = b' a'.
  Product sizes{p.n,
                p.m,
                p.k,
                p.b_transposed,
                false,
                p.b_row,
                p.a_row,
                p.c_row,
                sizeof(T) == 2,
                sizeof(T) == 2,
                alignment_of_all(p.b, p.b_step),
                alignment_of_all(p.a, p.a_step),
                alignment_of_all(p.c, p.c_step)};
  sizes.count = p.count;
  sizes.a_step = p.b_step;
  sizes.b_step = p.a_step;
  sizes.c_step = p.c_step;
  const std::shared_ptr<const Planned> plan = planned(sizes);
  if (!plan->found()) {
    return false;
  }
  plan->run(p.b, p.a, p.c, p.accumulate, on);
  return true;
}
template bool side_by_side(const SideBySide<float>&, const Launch&);
template bool side_by_side(const SideBySide<bf16>&, const Launch&);

namespace {

template <class T>
void batch(const MatmulBatch<T>& a, const Launch& on) {
  const SideBySide<T> all{.count = a.count,
                          .m = a.rows,
                          .n = a.columns,
                          .k = a.inner,
                          .a = a.x,
                          .a_row = a.inner,
                          .a_step = a.rows * a.inner,
                          .b = a.weight,
                          .b_row = a.turned ? a.columns : a.inner,
                          .b_step = a.inner * a.columns,
                          .b_transposed = !a.turned,
                          .c = a.y,
                          .c_row = a.columns,
                          .c_step = a.rows * a.columns,
                          .accumulate = false};
  if (a.count > 1 && side_by_side(all, on)) {
    return;
  }
  for (int64_t i = 0; i < a.count; ++i) {
    multiply(a.rows, a.columns, a.inner, a.x + i * all.a_step, all.a_row, false,
             a.weight + i * all.b_step, all.b_row, !a.turned, a.y + i * all.c_step, all.c_row,
             false, on);
  }
}

}  // namespace

void matmul_forward(const Matmuls<float>& a, const Launch& on) {
  forward(a, on);
}
void matmul_forward(const Matmuls<bf16>& a, const Launch& on) {
  forward(a, on);
}
void matmul_unrounded_forward(const UnroundedMatmuls<float>& a, const Launch& on) {
  forward(a, on);
}
void matmul_unrounded_forward(const UnroundedMatmuls<bf16>& a, const Launch& on) {
  forward(a, on);
}
void matmul_grad_input_of(const MatmulGradInput<float>& a, const Launch& on) {
  grad_input(a, on);
}
void matmul_grad_input_of(const MatmulGradInput<bf16>& a, const Launch& on) {
  grad_input(a, on);
}
void matmul_grad_weight_of(const MatmulGradWeight<float>& a, const Launch& on) {
  grad_weight(a, on);
}
void matmul_grad_weight_of(const MatmulGradWeight<bf16>& a, const Launch& on) {
  grad_weight(a, on);
}
void matmul_batch(const MatmulBatch<float>& a, const Launch& on) {
  batch(a, on);
}
void matmul_batch(const MatmulBatch<bf16>& a, const Launch& on) {
  batch(a, on);
}

}  // namespace cambium::cuda
