// The files of a search for a placement: what was measured, which is kept while it runs, and the
// placement it chose, from which `convert` builds the hybrid.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "hybrid/layer_cost.h"
#include "hybrid/placement_search.h"

namespace cambium {

/// Measured placements and costs of one question (models, kinds, data, metric), whatever budget is
/// searched for: another budget finds there what it asks again.
class PlacementTrace {
 public:
  /// Takes what `path` (empty = kept nowhere) holds of the same question. Error that says what
  /// differs when it holds another's, unless `fresh`, which starts anew.
  PlacementTrace(Fingerprint question, std::vector<std::string> kinds, size_t layers,
                 std::filesystem::path path, bool fresh);

  /// Null where it has not been measured.
  const Measured* find(const Choices& choices) const;
  void add(const Choices& choices, const Measured& value, double seconds);
  const LayerCosts* find_costs(CostKind kind, const Fingerprint& question) const;
  void add(LayerCosts costs);

 private:
  struct Entry {
    Choices choices;
    Measured value;
    double seconds = 0.0;
  };
  void read();
  void save() const;

  Fingerprint question_;
  std::vector<std::string> kinds_;
  size_t layers_;
  std::filesystem::path path_;
  std::vector<Entry> entries_;  // in the order of measuring
  std::map<Choices, size_t> places_;
  std::vector<LayerCosts> costs_;
};

/// A kind of mixer as a placement names it.
struct PlacedKind {
  std::string name;
  std::string source;  // the bank's folder
  std::string digest;  // of its mixers
};

/// A placement beside the one that was chosen.
struct ComparedPlacement {
  std::string name;
  Choices choices;
  double cost = 0.0;  // share of the teacher's; NaN = not measured, and `choices` are none
  Measured value;     // on the documents that are reported
  Measured behind;    // its value less that of the chosen one
};

/// What a search found.
struct ChosenPlacement {
  std::string teacher;          // digest
  std::string map;              // of the teacher's layers
  std::vector<int64_t> layers;  // that were open
  std::vector<PlacedKind> kinds;
  Choices choices;
  std::string metric;
  Measured measured;  // on the documents that chose
  Measured reported;  // on others
  std::string chosen_on, reported_on;
  LayerCosts costs;
  double budget = 0.0;  // of the whole model, in the costs' unit
  Fingerprint options;  // of the search
  std::string command;
  SearchResult search;
  std::vector<ComparedPlacement> compared;
};

void write_placement(const ChosenPlacement& placement, const std::filesystem::path& path);

/// What `convert` needs of such a file.
struct PlacementRecipe {
  std::string teacher;
  std::vector<int64_t> layers;
  std::vector<PlacedKind> kinds;
  Choices choices;
};
PlacementRecipe read_placement(const std::filesystem::path& path);

/// Error where `path` cannot be written, or holds something else than `what` of ours.
void check_placement_path(const std::filesystem::path& path, const char* what);
inline constexpr const char* kPlacementFile = "a placement";
inline constexpr const char* kTraceFile = "measured placements";

/// A bank for the recipe: of folders given as "kind=DIR", else of those the recipe names. Error
/// where a bank or the teacher is another than the one that was searched with.
MixerBank bank_for(const PlacementRecipe& recipe, LoadedModel& teacher,
                   const std::vector<std::string>& given, const std::string& where);
/// "kind=DIR" -> {kind, DIR}; Error otherwise.
std::pair<std::string, std::string> parse_bank(const std::string& text);

}  // namespace cambium
