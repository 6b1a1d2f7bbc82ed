// What a run says about its models: the content of summary.json, from which the report page is
// drawn.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace cambium {

/// A measured value with its interval (95 % for accuracies; least and largest for speeds).
struct Measured {
  double value = 0.0;
  double low = 0.0;
  double high = 0.0;
};

struct AccuracySummary {
  int64_t correct = 0;
  int64_t total = 0;
  Measured accuracy;  // fractions
};

struct SpeedSummary {
  int64_t context = 0;  // tokens
  int64_t batch = 1;
  Measured prefill;  // tokens/s
  Measured decode;   // tokens/s over the whole batch
  /// CPU time of all threads, milliseconds a token: what a busy machine does not falsify. Not part
  /// of a run's summary.json.
  Measured prefill_cpu{};
  Measured decode_cpu{};
  /// Whether the logits at its end were numbers, for all sequences. Not part of summary.json.
  bool finite = true;
};

struct GateSummary {
  bool passed = false;
  int64_t attempts = 0;
  std::string reason;  // one sentence: what was measured against what was asked
  int64_t kept = 0;    // the attempt whose model it is, from 1; 0 = not known
};

/// How near the new mixers of a calibrated start are to their attention, before and after the fit:
/// the mean of R^2 over those layers.
struct FitSummary {
  int64_t layers = 0;  // 0 = there was no calibration
  double before = 0.0;
  double after = 0.0;
};

/// Retrieval of one kind and length.
struct RetrievalAt {
  std::string what;  // "retrieval of 600 characters", "passkey of 4096 tokens"
  AccuracySummary found;
};

struct ModelSummary {
  std::string name;
  std::string dir;
  std::string map;                        // layer_map() of model/spec.h
  std::map<std::string, int64_t> mixers;  // layers of each kind
  int64_t converted = 0;
  int64_t parameters = 0;
  int64_t tokens_trained = 0;  // in all stages and attempts up to this model
  int64_t tokens_learned = 0;  // of them, those with a label
  uint64_t next_sample = 0;    // where its training stopped in the data
  std::string from;            // the model its training began with; empty = the teacher
  std::string checksums;       // of its checkpoint's checksums.json; empty = not known
  double seconds = 0.0;        // of the stage that made it
  AccuracySummary accuracy;
  AccuracySummary retrieval;
  std::vector<RetrievalAt> retrieval_at;  // in the plan's order
  AccuracySummary sticky;      // of questions with options: the same letter in every rotation
  double answer_tokens = 0.0;  // mean length of the answers to the problems; 0 = not known
  /// Mean KL a token between texts read at once without a cache and through one, in the worst of
  /// the ways that serving takes; below 0 = not measured.
  double cached_kl = -1.0;
  double cached_limit = 0.0;          // what rounding alone may make of it
  double reverse_kl = 0.0;            // against the teacher, held out, per completion token
  double reverse_kl_converted = 0.0;  // the same before the stage's training
  double selection_reverse_kl = 0.0;  // on documents that are not reported; 0 = not measured
  double nll = 0.0;
  double agreement = 0.0;  // share of tokens on which teacher and model choose alike
  std::vector<SpeedSummary> speed;
  int64_t cache_bytes_per_token = 0;
  int64_t state_bytes_per_sequence = 0;
  FitSummary fit;
  GateSummary gate;
  bool shipped = true;
};

/// Retrieval that is called so; null where it was not asked.
const AccuracySummary* find_retrieval(const ModelSummary& model, const std::string& what);
/// The plan's own texts, or where none were asked the right ones of all kinds and lengths, without
/// an interval.
AccuracySummary overall_retrieval(const ModelSummary& model);

/// What the model finds as a share of what its teacher finds, at most 1, in the kind and length of
/// which it keeps least; the interval is the model's own. Null where nothing was asked of which the
/// teacher has any right.
std::optional<Measured> least_retrieval_kept(const ModelSummary& model,
                                             const ModelSummary& teacher);

/// Right answers a second: accuracy times the decode speed at the longest context over the mean
/// length of an answer. 0 where one of them is not known.
double right_answers_per_second(const ModelSummary& model);

struct ImportanceSummary {
  std::string stage;
  std::string method;
  std::string metric;
  std::vector<double> scores;   // a value a layer; NaN where the layer was not scored
  std::vector<bool> converted;  // the layers chosen by them
  std::string data = {};        // what they were scored on, in words
};

/// One phase of training: what its log says, thinned for drawing.
struct CurveSummary {
  std::string stage;
  std::string phase;  // align, distill, sft
  std::vector<double> tokens;
  std::vector<double> loss;
  std::vector<double> reverse_kl;  // on the training text; zeros where the phase has no teacher
};

struct RunSummary {
  std::string name;
  std::string date;
  std::string machine;
  std::string command;
  std::string plan;  // the plan's text
  std::string task;  // what accuracy means, in words
  double seconds = 0.0;
  std::vector<ModelSummary> models;  // the teacher first
  std::vector<ImportanceSummary> importance;
  std::vector<CurveSummary> curves;
};

/// The letters of each layer of such a map: {"A", "A2", "G"} of "A(A2)G".
std::vector<std::string> layers_of_map(const std::string& map);

/// summary.json as text, and back; `where` names it in errors.
std::string summary_json(const RunSummary& summary);
RunSummary parse_summary(const std::string& text, const std::string& where);
void write_summary(const RunSummary& summary, const std::filesystem::path& path);
RunSummary read_summary(const std::filesystem::path& path);

/// The report page: one HTML file that needs nothing else.
std::string render_report(const RunSummary& summary);
/// Against decode speed at that context and batch: accuracy, and in a chart of its own, where it
/// was asked, least_retrieval_kept(). Each run's models are joined by a line of their own, and
/// apart from them its baselines.
std::vector<std::string> frontier_charts(std::span<const RunSummary> runs, int64_t context,
                                         int64_t batch);
/// The charts as one SVG file, at the longest context and batch at which all runs were measured.
/// Error where there is no such place.
std::string render_frontiers(std::span<const RunSummary> runs);
/// The numbers of the pictures, a line for each model and context, with a first line of names.
std::string frontier_csv(std::span<const RunSummary> runs);
/// Writes report.html, frontier.csv and, where speed was measured, frontier.svg into a run's
/// folder.
void write_report(const RunSummary& summary, const std::filesystem::path& folder);

}  // namespace cambium
