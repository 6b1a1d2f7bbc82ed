// Plans of attention by cuDNN, through the header-only cudnn-frontend: the one file that knows
// either. The library is loaded when attention first asks for it. Its header declares functions and
// the frontend calls them by name; the names are made pointers below, so that nothing is linked
// that a machine may not have.
#include "ops/attention/attention_cudnn.h"

#include <mutex>

#include "base/progress.h"

#if CAMBIUM_CUDNN
#include <cuda_runtime_api.h>
#include <cudnn.h>
#include <dlfcn.h>
#include <nvrtc.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "ops/cuda_launch.h"
#include "tensor/work_recorder.h"

#define CAMBIUM_CUDNN_FUNCTIONS(X) \
  X(cudnnBackendCreateDescriptor)  \
  X(cudnnBackendDestroyDescriptor) \
  X(cudnnBackendExecute)           \
  X(cudnnBackendFinalize)          \
  X(cudnnBackendGetAttribute)      \
  X(cudnnBackendSetAttribute)      \
  X(cudnnCreate)                   \
  X(cudnnCreateFilterDescriptor)   \
  X(cudnnDestroyFilterDescriptor)  \
  X(cudnnGetErrorString)           \
  X(cudnnGetLastErrorString)       \
  X(cudnnGetStream)                \
  X(cudnnGetVersion)               \
  X(cudnnReorderFilterAndBias)     \
  X(cudnnSetFilterNdDescriptor)    \
  X(cudnnSetStream)                \
  CAMBIUM_CUDNN_NEWER_FUNCTIONS(X)
#if CUDNN_VERSION >= 92300
#define CAMBIUM_CUDNN_NEWER_FUNCTIONS(X) X(cudnnGetExecutionPlanWorkspaceSize)
#else
#define CAMBIUM_CUDNN_NEWER_FUNCTIONS(X)
#endif
// Of an engine for RMS norm that the frontend brings along: it never runs here.
#define CAMBIUM_NVRTC_FUNCTIONS(X) \
  X(nvrtcCompileProgram)           \
  X(nvrtcCreateProgram)            \
  X(nvrtcDestroyProgram)           \
  X(nvrtcGetCUBIN)                 \
  X(nvrtcGetCUBINSize)             \
  X(nvrtcGetProgramLog)            \
  X(nvrtcGetProgramLogSize)

namespace cambium::cuda::attention {
namespace {

struct Functions {
#define CAMBIUM_MEMBER(name) decltype(&::name) name = nullptr;
  CAMBIUM_CUDNN_FUNCTIONS(CAMBIUM_MEMBER)
  CAMBIUM_NVRTC_FUNCTIONS(CAMBIUM_MEMBER)
#undef CAMBIUM_MEMBER
};
Functions functions;  // set once by load()

/// Older ones lack grouped heads in packed segments.
constexpr size_t kOldestVersion = 90600;

std::string version_text(size_t version) {
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

/// Loads the library from the file that the user names, or where the loader finds it; returns what
/// is wrong, or nothing.
std::string load(const std::string& wanted) {
  if (wanted == "none") {
    return "CAMBIUM_CUDNN_LIBRARY is none";
  }
  const bool named = !wanted.empty();
  const std::string name = named ? wanted : "libcudnn.so." + std::to_string(CUDNN_MAJOR);
  void* file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (file == nullptr && !named) {
    file = dlopen(("/usr/local/cuda/lib64/" + name).c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (file == nullptr) {
    return named ? fmt::format("CAMBIUM_CUDNN_LIBRARY={} cannot be loaded: {}", name, dlerror())
                 : name + " was not found";
  }
  Functions found;
#define CAMBIUM_LOAD(function)                                                         \
  found.function = reinterpret_cast<decltype(found.function)>(dlsym(file, #function)); \
  if (found.function == nullptr) {                                                     \
    return fmt::format("{} has no {}; install cuDNN {} or newer", name, #function,     \
                       version_text(CUDNN_VERSION));                                   \
  }
  CAMBIUM_CUDNN_FUNCTIONS(CAMBIUM_LOAD)
#undef CAMBIUM_LOAD
  const size_t version = found.cudnnGetVersion();
  if (version < kOldestVersion || version / 10000 != CUDNN_MAJOR) {
    return fmt::format("{} is version {}; wanted is {} or newer of {}", name, version_text(version),
                       version_text(kOldestVersion), CUDNN_MAJOR);
  }
  functions = found;
  return {};
}

}  // namespace
}  // namespace cambium::cuda::attention

// From here on the names are what was loaded.
#define CAMBIUM_LOADED(name) (*::cambium::cuda::attention::functions.name)
#define cudnnBackendCreateDescriptor CAMBIUM_LOADED(cudnnBackendCreateDescriptor)
#define cudnnBackendDestroyDescriptor CAMBIUM_LOADED(cudnnBackendDestroyDescriptor)
#define cudnnBackendExecute CAMBIUM_LOADED(cudnnBackendExecute)
#define cudnnBackendFinalize CAMBIUM_LOADED(cudnnBackendFinalize)
#define cudnnBackendGetAttribute CAMBIUM_LOADED(cudnnBackendGetAttribute)
#define cudnnBackendSetAttribute CAMBIUM_LOADED(cudnnBackendSetAttribute)
#define cudnnCreate CAMBIUM_LOADED(cudnnCreate)
#define cudnnCreateFilterDescriptor CAMBIUM_LOADED(cudnnCreateFilterDescriptor)
#define cudnnDestroyFilterDescriptor CAMBIUM_LOADED(cudnnDestroyFilterDescriptor)
#define cudnnGetErrorString CAMBIUM_LOADED(cudnnGetErrorString)
#define cudnnGetExecutionPlanWorkspaceSize CAMBIUM_LOADED(cudnnGetExecutionPlanWorkspaceSize)
#define cudnnGetLastErrorString CAMBIUM_LOADED(cudnnGetLastErrorString)
#define cudnnGetStream CAMBIUM_LOADED(cudnnGetStream)
#define cudnnGetVersion CAMBIUM_LOADED(cudnnGetVersion)
#define cudnnReorderFilterAndBias CAMBIUM_LOADED(cudnnReorderFilterAndBias)
#define cudnnSetFilterNdDescriptor CAMBIUM_LOADED(cudnnSetFilterNdDescriptor)
#define cudnnSetStream CAMBIUM_LOADED(cudnnSetStream)
#define nvrtcCompileProgram CAMBIUM_LOADED(nvrtcCompileProgram)
#define nvrtcCreateProgram CAMBIUM_LOADED(nvrtcCreateProgram)
#define nvrtcDestroyProgram CAMBIUM_LOADED(nvrtcDestroyProgram)
#define nvrtcGetCUBIN CAMBIUM_LOADED(nvrtcGetCUBIN)
#define nvrtcGetCUBINSize CAMBIUM_LOADED(nvrtcGetCUBINSize)
#define nvrtcGetProgramLog CAMBIUM_LOADED(nvrtcGetProgramLog)
#define nvrtcGetProgramLogSize CAMBIUM_LOADED(nvrtcGetProgramLogSize)
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

namespace cambium::cuda::attention {

namespace fe = cudnn_frontend;

/// A finished graph of one operation.
class SdpaPlan {
 public:
  fe::graph::Graph graph;
  int64_t workspace = 0;
};

namespace {

/// Names of the tensors of a graph.
enum Uid : int64_t {
  kQ = 1,
  kK,
  kV,
  kY,
  kStats,
  kDy,
  kDq,
  kDk,
  kDv,
  kQueryLengths,
  kKeyLengths,
  kOffsets = 100,  // + the tensor's
};

using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

/// Builds the graph of a shape.
class Builder {
 public:
  Builder(const SdpaShape& shape, fe::graph::Graph& graph) : s_(shape), graph_(graph) {
    graph_.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
  }

  void forward() {
    auto attributes = with_masks(fe::graph::SDPA_attributes().set_name("attention"));
    attributes.set_generate_stats(s_.stats);
    auto [y, stats] =
        graph_.sdpa(queries(kQ, s_.head_dim, s_.q_row), keys(kK, s_.head_dim, s_.k_row),
                    keys(kV, s_.value_dim, s_.v_row), attributes);
    place_queries(*y, kY, s_.value_dim, s_.y_row);
    y->set_output(true);
    if (s_.stats) {
      place_stats(*stats);
      stats->set_output(true);
    }
  }

  void backward() {
    auto attributes = with_masks(fe::graph::SDPA_backward_attributes().set_name("attention"));
    attributes.set_deterministic_algorithm(!s_.any_order);
    fe::graph::Tensor_attributes stats;
    place_stats(stats);
    auto [dq, dk, dv] = graph_.sdpa_backward(
        queries(kQ, s_.head_dim, s_.q_row), keys(kK, s_.head_dim, s_.k_row),
        keys(kV, s_.value_dim, s_.v_row), queries(kY, s_.value_dim, s_.y_row),
        queries(kDy, s_.value_dim, s_.y_row), graph_.tensor(stats), attributes);
    place_queries(*dq, kDq, s_.head_dim, s_.dq_row);
    place_keys(*dk, kDk, s_.head_dim, s_.dk_row);
    place_keys(*dv, kDv, s_.value_dim, s_.dv_row);
    for (const Tensor& gradient : {dq, dk, dv}) {
      gradient->set_output(true);
    }
  }

 private:
  Tensor numbers(int64_t uid, int64_t count) {
    return graph_.tensor(fe::graph::Tensor_attributes()
                             .set_uid(uid)
                             .set_dim({count, 1, 1, 1})
                             .set_stride({1, 1, 1, 1})
                             .set_data_type(fe::DataType_t::INT32));
  }
  /// (batch, heads, length, dim), as the library orders axes.
  void place(fe::graph::Tensor_attributes& t, int64_t uid, int64_t heads, int64_t length,
             int64_t dim, int64_t row) {
    t.set_uid(uid)
        .set_dim({s_.batch, heads, length, dim})
        .set_stride({length * row, dim, row, 1})
        .set_data_type(fe::DataType_t::BFLOAT16);
    if (s_.ragged) {
      t.set_ragged_offset(numbers(kOffsets + uid, s_.batch + 1));
    }
  }
  void place_queries(fe::graph::Tensor_attributes& t, int64_t uid, int64_t dim, int64_t row) {
    place(t, uid, s_.heads, s_.length, dim, row);
  }
  void place_keys(fe::graph::Tensor_attributes& t, int64_t uid, int64_t dim, int64_t row) {
    place(t, uid, s_.kv_heads, s_.key_length, dim, row);
  }
  Tensor queries(int64_t uid, int64_t dim, int64_t row) {
    fe::graph::Tensor_attributes t;
    place_queries(t, uid, dim, row);
    return graph_.tensor(t);
  }
  Tensor keys(int64_t uid, int64_t dim, int64_t row) {
    fe::graph::Tensor_attributes t;
    place_keys(t, uid, dim, row);
    return graph_.tensor(t);
  }
  void place_stats(fe::graph::Tensor_attributes& t) const {
    t.set_uid(kStats)
        .set_dim({s_.batch, s_.heads, s_.length, 1})
        .set_stride({s_.heads * s_.length, s_.length, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
  }
  /// Row i sees columns i - window + 1 to i, both counted from the first or, where queries are the
  /// last tokens of keys, from the last of each segment.
  template <class Attributes>
  Attributes with_masks(Attributes attributes) {
    attributes.set_attn_scale(s_.scale)
        .set_diagonal_alignment(s_.continues ? fe::DiagonalAlignment_t::BOTTOM_RIGHT
                                             : fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
    if (s_.window > 0 && s_.window < s_.key_length) {
      attributes.set_diagonal_band_left_bound(static_cast<int>(s_.window));
    }
    if (s_.ragged) {
      attributes.set_padding_mask(true)
          .set_seq_len_q(numbers(kQueryLengths, s_.batch))
          .set_seq_len_kv(numbers(kKeyLengths, s_.batch));
    }
    return attributes;
  }

  const SdpaShape& s_;
  fe::graph::Graph& graph_;
};

/// Plans remembered at most.
constexpr size_t kMostPlans = 512;

/// The library, and what was made with it on each device. Never destroyed: the driver may be gone
/// before the program ends.
struct State {
  explicit State(const std::string& library) : missing(load(library)) {
    if (!missing.empty() && library != "none") {
      note(
          "attention is computed by this program's own kernels, which train and read prompts "
          "slower: {}; install "
          "cuDNN {}, name its folder in LD_LIBRARY_PATH or its file in CAMBIUM_CUDNN_LIBRARY "
          "(none: without it, and without this note)",
          missing, CUDNN_MAJOR);
    }
  }

  std::mutex mutex;
  const std::string missing;
  bool allowed = true;
  int64_t calls = 0;
  std::string refusal;  // why the last shape that was not served was not
  std::map<int, cudnnHandle_t> handles;
  std::map<std::pair<int, SdpaShape>, std::shared_ptr<const SdpaPlan>> plans;
};

State& state() {
  static State& s = *new State([] {
    const char* library = std::getenv("CAMBIUM_CUDNN_LIBRARY");
    return std::string(library == nullptr ? "" : library);
  }());
  return s;
}

int current_device() {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  expect(status == cudaSuccess, "[attention] {}", cudaGetErrorString(status));
  return device;
}

/// The handle of a device, which must be current; null where it cannot be made.
cudnnHandle_t handle_of(State& s, int device) {
  const auto [at, added] = s.handles.try_emplace(device, nullptr);
  if (added) {
    if (const cudnnStatus_t status = cudnnCreate(&at->second); status != CUDNN_STATUS_SUCCESS) {
      at->second = nullptr;
      s.refusal = fmt::format("cudnnCreate: {}", cudnnGetErrorString(status));
    }
  }
  return at->second;
}

std::shared_ptr<const SdpaPlan> make_plan(State& s, const SdpaShape& shape, int device) {
  cudnnHandle_t handle = handle_of(s, device);
  if (handle == nullptr) {
    return nullptr;
  }
  auto plan = std::make_shared<SdpaPlan>();
  Builder builder(shape, plan->graph);
  if (shape.backward) {
    builder.backward();
  } else {
    builder.forward();
  }
  fe::error_t status = plan->graph.validate();
  const auto then = [&](const auto& step) {
    if (status.is_good()) {
      status = step();
    }
  };
  then([&] { return plan->graph.build_operation_graph(handle); });
  then([&] { return plan->graph.create_execution_plans({fe::HeurMode_t::A}); });
  then([&] { return plan->graph.check_support(); });
  then([&] { return plan->graph.build_plans(); });
  then([&] { return plan->graph.get_workspace_size(plan->workspace); });
  if (status.is_bad()) {
    s.refusal = status.get_message();
    return nullptr;
  }
  return plan;
}

}  // namespace

std::shared_ptr<const SdpaPlan> sdpa_plan(const SdpaShape& shape) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (!s.missing.empty() || !s.allowed) {
    return nullptr;
  }
  const int device = current_device();
  const auto known = s.plans.find({device, shape});
  if (known != s.plans.end()) {
    return known->second;
  }
  if (s.plans.size() >= kMostPlans) {
    s.plans.clear();
  }
  std::shared_ptr<const SdpaPlan> plan;
  try {
    plan = make_plan(s, shape, device);
  } catch (const std::exception& e) {  // what the frontend throws
    s.refusal = e.what();
  }
  s.plans.emplace(std::pair(device, shape), plan);
  return plan;
}

int64_t sdpa_workspace(const SdpaPlan& plan) {
  return plan.workspace;
}

void sdpa_run(const SdpaPlan& plan, const SdpaTensors& t, void* workspace, const Launch& on) {
  const auto pointer = [](const auto* p) { return const_cast<void*>(static_cast<const void*>(p)); };
  std::unordered_map<int64_t, void*> tensors = {
      {kQ, pointer(t.q)},
      {kK, pointer(t.k)},
      {kV, pointer(t.v)},
      {kY, pointer(t.y)},
      {kStats, pointer(t.stats)},
      {kDy, pointer(t.dy)},
      {kDq, pointer(t.dq)},
      {kDk, pointer(t.dk)},
      {kDv, pointer(t.dv)},
      {kQueryLengths, pointer(t.lengths)},
      {kKeyLengths, pointer(t.key_lengths)},
      {kOffsets + kQ, pointer(t.q_at)},
      {kOffsets + kK, pointer(t.k_at)},
      {kOffsets + kV, pointer(t.v_at)},
      {kOffsets + kY, pointer(t.y_at)},
      {kOffsets + kDy, pointer(t.y_at)},
      {kOffsets + kDq, pointer(t.dq_at)},
      {kOffsets + kDk, pointer(t.dk_at)},
      {kOffsets + kDv, pointer(t.dv_at)},
  };
  if (on.recorder != nullptr && on.recorder->notes()) {
    on.recorder->refuse();
    return;
  }
  State& s = state();
  const std::lock_guard lock(s.mutex);  // the handle has one stream at a time
  cudnnHandle_t handle = handle_of(s, current_device());
  const cudnnStatus_t stream = cudnnSetStream(handle, on.stream);
  expect(stream == CUDNN_STATUS_SUCCESS, "[attention] cuDNN: {}", cudnnGetErrorString(stream));
  fe::error_t status = plan.graph.execute(handle, tensors, workspace);
  expect(status.is_good(), "[attention] cuDNN failed: {}", status.get_message());
  ++s.calls;
}

int64_t cudnn_calls() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  return s.calls;
}

void allow_cudnn(bool allowed) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.allowed = allowed;
}

std::string cudnn_status() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (!s.missing.empty()) {
    return "no cuDNN: " + s.missing;
  }
  const std::string name = "cuDNN " + version_text(cudnnGetVersion());
  return s.refusal.empty() ? name : name + ", which last refused: " + s.refusal;
}

}  // namespace cambium::cuda::attention

#else

namespace cambium::cuda::attention {

class SdpaPlan {};

std::shared_ptr<const SdpaPlan> sdpa_plan(const SdpaShape&) {
  static std::once_flag once;
  std::call_once(once, [] {
    note(
        "attention is computed by this program's own kernels, which train and read prompts slower: "
        "it was built "
        "without cuDNN");
  });
  return nullptr;
}
int64_t sdpa_workspace(const SdpaPlan&) {
  return 0;
}
void sdpa_run(const SdpaPlan&, const SdpaTensors&, void*, const Launch&) {}
int64_t cudnn_calls() {
  return 0;
}
void allow_cudnn(bool) {}
std::string cudnn_status() {
  return "no cuDNN: this build has none";
}

}  // namespace cambium::cuda::attention
#endif
