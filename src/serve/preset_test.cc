// Requests on several presets of one supernet: an engine each, over views of the same weights.
#include <gtest/gtest.h>

#include "base/test_folder.h"
#include "model/supernet.h"
#include "serve/engine.h"
#include "serve/testing.h"

namespace cambium {
namespace {

/// Four layers that choose among attention, a window and a delta net.
ModelSpec small_supernet() {
  ModelSpec spec = testing::mixed_spec({"attention", "attention", "attention", "attention"});
  const ModelSpec others = testing::mixed_spec({"sliding_window", "gated_delta_net"});
  for (LayerSpec& layer : spec.layers) {
    BranchSpec& branch = layer.branches.front();
    branch.active = 0;
    for (const LayerSpec& other : others.layers) {
      branch.units.push_back(*other.mixer());
      branch.units.back().name = mixer_unit_name(other.mixer()->kind);
    }
  }
  put_preset(spec, {"exact", {0, 0, 0, 0}});
  put_preset(spec, {"middle", {1, 0, 2, 1}});
  put_preset(spec, {"fast", {2, 2, 2, 2}});
  return spec;
}

GenerationRequest request_of(int64_t length, uint64_t stream) {
  GenerationRequest request;
  for (int64_t i = 0; i < length; ++i) {
    request.prompt.push_back(static_cast<int32_t>((i * i * 7 + i * 13 + length) % 96));
  }
  request.max_new_tokens = 20;
  request.sampling.temperature = 0.8F;
  request.seed = 3;
  request.stream = stream;
  return request;
}

std::vector<GenerationRequest> requests() {
  return {request_of(40, 0), request_of(7, 1), request_of(70, 2)};
}

std::vector<std::vector<int32_t>> tokens_of(const std::vector<GenerationResult>& results) {
  std::vector<std::vector<int32_t>> tokens;
  for (const GenerationResult& result : results) {
    tokens.push_back(result.tokens);
  }
  return tokens;
}

TEST(Presets, TakeTurnsWithoutLeavingAnythingBehind) {
  const TestFolder folder;
  const LoadedModel whole = fresh_model(small_supernet(), 7, 0.2);
  save_model(*whole.model, folder.at("supernet"), {});
  const std::map<std::string, Tensor> tensors = tensors_of(*whole.model);

  std::vector<LoadedModel> views;
  std::vector<std::unique_ptr<Engine>> engines;
  std::vector<std::vector<std::vector<int32_t>>> expected;
  for (const Preset& preset : whole.model->spec().presets) {
    views.push_back(view_hybrid(*whole.model, preset.active));
    // Nothing is loaded or copied: all of it is the supernet's own memory.
    EXPECT_EQ(views.back().weights.bytes(), 0);
    views.back().model->visit([&](const std::string& name, Parameter& p) {
      EXPECT_EQ(p.tensor.data,
                tensors.at(supernet_name(whole.model->spec(), preset.active, name)).data);
    });
    engines.push_back(std::make_unique<Engine>(*views.back().model));
    // What an engine gives that never had another beside it, on a load of its own.
    const LoadedModel alone = load_model(folder.at("supernet"), {.preset = preset.name});
    expected.push_back(tokens_of(Engine(*alone.model).generate(requests())));
  }
  EXPECT_NE(expected[0], expected[1]);
  EXPECT_NE(expected[1], expected[2]);

  // One after the other, back and forth.
  for (const size_t turn : {0, 2, 1, 2, 0, 1, 1}) {
    EXPECT_EQ(tokens_of(engines[turn]->generate(requests())), expected[turn]) << turn;
  }
  // And step by step beside each other.
  std::vector<std::vector<Engine::Ticket>> tickets(engines.size());
  for (size_t i = 0; i < engines.size(); ++i) {
    for (GenerationRequest& request : requests()) {
      tickets[i].push_back(engines[i]->submit(std::move(request)));
    }
  }
  for (bool any = true; any;) {
    any = false;
    for (const auto& engine : engines) {
      any = engine->step() || any;
    }
  }
  for (size_t i = 0; i < engines.size(); ++i) {
    std::vector<GenerationResult> results;
    for (const Engine::Ticket ticket : tickets[i]) {
      results.push_back(engines[i]->take(ticket));
    }
    EXPECT_EQ(tokens_of(results), expected[i]) << i;
  }
}

}  // namespace
}  // namespace cambium
