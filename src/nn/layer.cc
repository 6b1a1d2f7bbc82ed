#include "nn/layer.h"

#include <algorithm>
#include <set>

#include "base/checked.h"

namespace cambium {
namespace {

/// A part of the state of one token; what models keep is far below.
constexpr int64_t kMaxTokenBytes = int64_t{1} << 26;

std::string norm_name(size_t branch) {
  return branch == 0   ? "input_norm"
         : branch == 1 ? "post_norm"
                       : "norm_" + std::to_string(branch + 1);
}

/// Sizes are bounded one by one where options are read; here what they make together.
void check_sizes(const std::string& name, Unit& unit, const StateLayout& layout) {
  unit.visit([&](const std::string& parameter, Parameter& p) {
    int64_t numel = 1;
    for (const int64_t size : p.shape) {
      numel = checked_product(name, parameter, {numel, size});
    }
  });
  for (const auto& [parts, most] :
       {std::pair{&layout.pages, kMaxTokenBytes}, std::pair{&layout.slots, kMaxElements}}) {
    for (const Part& part : *parts) {
      int64_t bytes = dtype_size(part.dtype);
      for (const int64_t size : part.shape) {
        bytes = checked_product(name, part.name, {bytes, size}, most);
      }
    }
  }
  checked_product(name, "the window's state", {layout.most_tokens(), layout.bytes_per_token()});
}

}  // namespace

const UnitSpec* LayerSpec::find(UnitRole role) const {
  for (const BranchSpec& branch : branches) {
    for (size_t i = 0; i < branch.units.size(); ++i) {
      if (branch.runs(i) && find_unit_kind(branch.units[i].kind).role == role) {
        return &branch.units[i];
      }
    }
  }
  return nullptr;
}

namespace {

std::vector<UnitSpec> mixers_in(const std::vector<BranchSpec>& branches, bool only_running) {
  std::vector<UnitSpec> found;
  for (const BranchSpec& branch : branches) {
    for (size_t i = 0; i < branch.units.size(); ++i) {
      if ((!only_running || branch.runs(i)) &&
          find_unit_kind(branch.units[i].kind).role == UnitRole::kMixer) {
        found.push_back(branch.units[i]);
      }
    }
  }
  return found;
}

}  // namespace

std::vector<UnitSpec> LayerSpec::mixers() const {
  return mixers_in(branches, true);
}

std::vector<UnitSpec> LayerSpec::all_mixers() const {
  return mixers_in(branches, false);
}

const BranchSpec* LayerSpec::choice() const {
  const auto it = std::find_if(branches.begin(), branches.end(),
                               [](const BranchSpec& branch) { return branch.active >= 0; });
  return it == branches.end() ? nullptr : &*it;
}

LayerSpec decoder_layer(UnitSpec mixer, int64_t inner, const NormSpec& norm) {
  return {{{.norm = norm, .units = {std::move(mixer)}},
           {.norm = norm, .units = {{"swiglu", {{"inner", inner}}}}}}};
}

Layer::Layer(const LayerSpec& spec, int64_t width) {
  std::set<std::string> names;
  for (const BranchSpec& branch : spec.branches) {
    const auto count = static_cast<int>(branch.units.size());
    expect(branch.active >= -1 && branch.active < count,
           "a branch of {} units: expected active from 0 to {} or -1, got {}", count, count - 1,
           branch.active);
    expect(branch.beside == 0 ||
               (branch.beside > 0 && branch.active + branch.beside < count && branch.active >= 0),
           "a branch of {} units of which unit {} is active: expected as many beside a choice as "
           "stand after it, got {}",
           count, branch.active, branch.beside);
    expect(
        branch.out_norm.kind == NormKind::kNone || count == 1 ||
            (branch.active >= 0 && branch.beside == 0),
        "a branch of {} units: expected one unit, or a choice of one, where the output has a norm",
        count);
    Branch& made = branches_.emplace_back(Branch{norm_name(branches_.size()),
                                                 "out_norm_" + std::to_string(branches_.size() + 1),
                                                 Norm(branch.norm, width),
                                                 Norm(branch.out_norm, width),
                                                 branch.keep,
                                                 branch.residual_normed,
                                                 branch.active >= 0 ? branch.choices() : 0,
                                                 {}});
    for (size_t i = 0; i < branch.units.size(); ++i) {
      const UnitSpec& unit = branch.units[i];
      const std::string name = unit_name(unit);
      expect(names.insert(name).second,
             "two units of a layer are named '{}'; give one of them a name of its own", name);
      Piece piece{name,  find_unit_kind(unit.kind).role, unit.out, branch.runs(i),
                  false, make_unit(unit, width)};
      check_sizes(unit.kind, *piece.unit, piece.unit->state_layout());
      piece.has_state = !piece.unit->state_layout().empty();
      made.pieces.push_back(std::move(piece));
    }
  }
  note_what_runs();
}

void Layer::note_what_runs() {
  passes_ = true;
  mixer_ = nullptr;
  state_layouts_.clear();
  for (const Branch& branch : branches_) {
    passes_ = passes_ && !branch.runs();
    for (const Piece& piece : branch.pieces) {
      if (!piece.runs) {
        continue;
      }
      if (piece.role == UnitRole::kMixer && mixer_ == nullptr) {
        mixer_ = piece.unit.get();
      }
      if (piece.has_state) {
        state_layouts_.push_back(piece.unit->state_layout());
      }
    }
  }
}

void Layer::activate(int unit) {
  const auto branch = std::find_if(branches_.begin(), branches_.end(),
                                   [](const Branch& candidate) { return candidate.choices > 0; });
  CAMBIUM_CHECK(
      branch != branches_.end() && unit >= 0 && static_cast<size_t>(unit) < branch->choices,
      "unit {}", unit);
  for (size_t i = 0; i < branch->choices; ++i) {
    branch->pieces[i].runs = i == static_cast<size_t>(unit);
  }
  note_what_runs();
}

bool Layer::Branch::runs() const {
  const bool scales = pieces.empty() && (residual_normed || keep != 1.0F);
  return scales ||
         std::any_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.runs; });
}

const Norm* Layer::first_norm() const {
  const auto first = std::find_if(branches_.begin(), branches_.end(),
                                  [](const Branch& branch) { return branch.runs(); });
  return first == branches_.end() ? nullptr : &first->norm;
}

Tensor Layer::forward(Context& ctx, const Tensor& h, const LayerInputs& inputs,
                      MixerTap* tap) const {
  Residual residual(h);
  forward(ctx, residual, inputs, tap);
  return residual.value(ctx);
}

void Layer::forward(Context& ctx, Residual& h, const LayerInputs& inputs, MixerTap* tap) const {
  size_t states = 0;
  const auto last = std::find_if(branches_.rbegin(), branches_.rend(),
                                 [](const Branch& branch) { return branch.runs(); });
  for (const Branch& branch : branches_) {
    if (!branch.runs()) {
      continue;
    }
    const bool unread = inputs.unread && &branch == &*last;
    const Tensor x = h.normed(ctx, branch.norm);
    if (branch.residual_normed) {
      h.replace(ctx, x);
    }
    float keep = branch.keep;
    for (const Piece& piece : branch.pieces) {
      if (!piece.runs) {
        continue;
      }
      const UnitState* state = nullptr;
      if (piece.has_state && !inputs.states.empty()) {
        state = &inputs.states[states++];
      }
      const Tensor y = piece.unit->forward(
          ctx, x, {inputs.batch, inputs.rope, state, unread, inputs.noise, inputs.router});
      if (tap != nullptr && piece.unit.get() == mixer_) {
        *tap = {x, y};
      }
      h.add(ctx, keep, piece.out, branch.out_norm.forward(ctx, y));
      keep = 1.0F;
    }
    if (branch.pieces.empty()) {
      h.add(ctx, keep, 0.0F, x);
    }
  }
}

void Layer::visit(const ParameterVisitor& visitor) {
  for (Branch& branch : branches_) {
    branch.norm.visit(branch.norm_name, visitor);
    branch.out_norm.visit(branch.out_norm_name, visitor);
    for (const Piece& piece : branch.pieces) {
      piece.unit->visit(
          [&](const std::string& name, Parameter& p) { visitor(piece.name + "." + name, p); });
    }
  }
}

void Layer::set_out(const std::string& unit, float out) {
  for (Branch& branch : branches_) {
    for (Piece& piece : branch.pieces) {
      if (piece.name == unit) {
        piece.out = out;
        return;
      }
    }
  }
  CAMBIUM_CHECK(false, "no unit {}", unit);
}

std::vector<std::string> Layer::missing() const {
  std::vector<std::string> all;
  const auto add = [&](const std::string& what) {
    if (!what.empty() && std::find(all.begin(), all.end(), what) == all.end()) {
      all.push_back(what);
    }
  };
  for (const Branch& branch : branches_) {
    for (const Piece& piece : branch.pieces) {
      add(piece.unit->missing());
    }
  }
  return all;
}

}  // namespace cambium
